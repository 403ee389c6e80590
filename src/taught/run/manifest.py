"""The manifest of a run folder: read, checked, and replaced as a whole."""

from __future__ import annotations

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import taught
from taught.errors import UserError
from taught.run import files
from taught.stages import BY_NAME

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
        manifest = files.read_json_mapping(file)
        version = manifest["format"]
        if version == FORMAT:
            _check(manifest)
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise damaged(file, error) from None
    if version != FORMAT:
        raise UserError(
            "the run folder has another format",
            value=f"{file}: format {version}",
            rule=f"taught {taught.__version__} reads format {FORMAT}",
            fix="use the version that made it, or another --run folder",
        )
    return manifest


def damaged(file: Path, error: Exception) -> UserError:
    """The error for a manifest that says something else than a stage wrote."""
    said = f"without {error}" if isinstance(error, KeyError) else error
    what, fix = "the manifest of the run folder is damaged", "choose another --run folder"
    return UserError(what, value=f"{file}: {said}", fix=fix)


def _check(manifest: Manifest) -> None:
    """ValueError, KeyError or TypeError unless every part that is read is there, and of its type."""
    for part in ("stages", "inputs", "files", *({"study", "data", "weights", "versions"} & manifest.keys())):
        if not isinstance(manifest[part], dict):
            raise TypeError(f"{part} is no mapping")
    texts: list[object] = []
    for name, stage in manifest["stages"].items():
        texts += [stage["status"], stage["fingerprint"], manifest["inputs"][name]["code"], manifest["study"]["name"]]
        numbers = [stage.get(key, 0) for key in ("seconds", "peak_memory_gb", "attempts")]
        if name not in BY_NAME or not all(isinstance(number, int | float | None) for number in numbers):
            raise ValueError(f"{name} is no stage")
    for name, record in manifest["files"].items():
        texts += [record["stage"], record["sha256"]]
        plain = Path(name).name == name and len(name.encode()) < 256
        if not isinstance(record["bytes"], int) or not plain or name == NAME or name.startswith("."):
            raise ValueError(f"{name} is no file of a run")
    if not all(isinstance(text, str) for text in texts) or not isinstance(manifest.get("command", ""), str | None):
        raise TypeError("a name or digest is no text")


def save_manifest(folder: Path, manifest: Manifest) -> None:
    """Replace the manifest as a whole."""
    files.write_bytes(folder / NAME, files.json_bytes(manifest))


def now() -> str:
    """Return the time, as it stands in manifests."""
    return datetime.now(UTC).isoformat(timespec="seconds")
