"""Studies that ship with the package: one folder each, with a ``study.yaml`` and its data."""

from __future__ import annotations

import difflib
from pathlib import Path

from taught.errors import UserError

_HERE = Path(__file__).parent


def list_presets() -> list[str]:
    """Names of the presets, sorted."""
    return sorted(file.parent.name for file in _HERE.glob("*/study.yaml"))


def preset_path(name: str) -> Path:
    """Folder of a preset.

    Raises
    ------
    UserError
        There is no preset of this name.
    """
    if name in list_presets():
        return _HERE / name
    close = difflib.get_close_matches(name, list_presets(), n=1)
    raise UserError(
        "no such preset",
        value=name,
        rule="presets: " + ", ".join(list_presets()),
        fix=f"did you mean {close[0]}?" if close else None,
    )
