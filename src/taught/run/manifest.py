"""The manifest of a run folder: read, checked, and replaced as a whole."""

from __future__ import annotations

import json
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, cast

import taught
from taught.errors import UserError
from taught.run import files

FORMAT = 1
NAME = "manifest.json"
Manifest = dict[str, Any]


def load_manifest(folder: Path) -> Manifest:
    """Return the manifest of a run folder, or a new one for a folder that is new or empty.

    Raises
    ------
    UserError
        A folder with other files and no manifest, a damaged manifest, another format.
    """
    file = folder / NAME
    if folder.exists() and not folder.is_dir():
        raise UserError("the run folder is a file", value=str(folder), fix="choose another --run folder")
    if folder.exists() and not file.exists() and any(not other.name.startswith(".") for other in folder.iterdir()):
        raise UserError(
            "the folder holds other files",
            value=str(folder),
            rule=f"a run folder is new, empty, or holds {NAME}",
            fix="choose another --run folder",
        )
    if not file.exists():
        return {"format": FORMAT, "created": now(), "stages": {}, "inputs": {}, "files": {}}
    try:
        manifest = json.loads(file.read_text(encoding="utf-8"))
        version = manifest["format"]
        _ = manifest["stages"], manifest["inputs"], manifest["files"]
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UserError(
            "the manifest of the run folder is damaged", value=f"{file}: {error}", fix="choose another --run folder"
        ) from None
    if version != FORMAT:
        raise UserError(
            "the run folder has another format",
            value=f"{file}: format {version}",
            rule=f"taught {taught.__version__} reads format {FORMAT}",
            fix="use the version that made it, or another --run folder",
        )
    return cast(Manifest, manifest)


def save_manifest(folder: Path, manifest: Manifest) -> None:
    """Replace the manifest as a whole."""
    files.write_bytes(folder / NAME, files.json_bytes(manifest))


def now() -> str:
    """Return the time, as it stands in manifests."""
    return datetime.now(UTC).isoformat(timespec="seconds")
