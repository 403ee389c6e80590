"""Studies that ship with the package: one folder each, with a ``study.yaml`` and its data."""

from __future__ import annotations

from pathlib import Path

from taught.errors import UserError, did_you_mean

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
    raise UserError(
        "no such preset",
        value=name,
        rule="presets: " + ", ".join(list_presets()),
        fix=did_you_mean(name, list_presets(), 0.6),
    )
