"""What the result of a stage depends on, as a flat record that can be compared and shown.

A record maps a name (``policy.alpha``, ``examples.path sha256``, ``code``) to a plain value. Two runs
may share results only when their records are equal; when they differ, the record says in what.
Left out on purpose, because the result does not depend on them: where a file lies (its content
counts), the name of the study, ``attribution.memory_gb``, ``attribution.batch_tokens`` and
``sketch.store`` (a store knows by itself what it holds).
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from functools import cache
from pathlib import Path
from typing import Any

import taught
from taught.data.tables import table_sha256
from taught.errors import UserError
from taught.run.files import sha256_file
from taught.study.schema import Study

Inputs = dict[str, Any]

_POLICY = ("model", "sae", "readout", "behavior", "prompts", "features", "policy")
# Attribution runs the model again, so it names what the policy names: the two must agree. The later
# stages read only the run folder, and are tied to what they read by its fingerprint (run.py).
_SECTIONS = {
    "policy": _POLICY,
    "clamp": _POLICY,
    "attribute": (*_POLICY, "examples", "attribution", "sketch"),
    "curate": ("curation",),
    "clusters": (),
    "concept-influence": (*_POLICY, "examples", "attribution", "sketch"),
    "validate": (*_POLICY, "examples", "validation"),
    "compare": (*_POLICY, "examples", "attribution", "sketch", "validation"),
    "report": (),
}
_CONTENT_KEYS = (
    "model.id",
    "model.adapter",
    "model.chat_template",
    "sae.path",
    "prompts.path",
    "examples.path",
    "features.labels",
    "attribution.moments",
)
_IGNORED = ("attribution.memory_gb", "attribution.batch_tokens", "attribution.checkpointing", "sketch.store")
_CHECKPOINTS = "attribution.checkpoints"
_FOLDERS = ("model.id", "model.adapter", "sae.path", _CHECKPOINTS)
# Files of a model or SAE folder that define it (a README does not).
_DEFINING = ("*.safetensors", "*.json", "*.jinja", "*.model", "*.gguf", "*.txt")
# Files that only show results: changing them does not change what a stage computes.
_PRESENTATION = ("cli/", "__main__.py", "progress.py", "run/query.py", "report/")


def stage_inputs(stage: str, study: Study, extra: Mapping[str, Any] | None = None) -> Inputs:
    """Everything that the result of a stage depends on.

    Parameters
    ----------
    stage
        One of ``taught.run.folder.STAGES``.
    study
        The study; its local files are read for their checksums.
    extra
        What only the caller knows: ``Subject.identity``, the weights that a name stands for.

    Raises
    ------
    UserError
        A file of the study is missing or cannot be read.
    """
    inputs: Inputs = {}
    for key, value in study.flat().items():
        if key.split(".")[0] not in _SECTIONS[stage] or key in _IGNORED:
            continue
        if key in _CONTENT_KEYS and value is not None and Path(value).is_absolute():
            inputs[f"{key} sha256"] = content_digest(key, Path(value))
        elif key == _CHECKPOINTS and value is not None:
            inputs[key] = [_by_content(item) for item in value]
        else:
            inputs[key] = value
    inputs["code"] = code_version()
    return {**inputs, **(extra or {})}


def _by_content(checkpoint: Mapping[str, Any]) -> dict[str, Any]:
    """A local folder by the digest of its content, a hub id by its name."""
    path = Path(checkpoint["id"])
    known = content_digest(_CHECKPOINTS, path) if path.is_absolute() else checkpoint["id"]
    return {**checkpoint, "id": known}


def fingerprint(inputs: Mapping[str, Any]) -> str:
    """Hex digest of a record; equal records have equal fingerprints."""
    text = json.dumps(inputs, sort_keys=True, ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()


def differences(
    old: Mapping[str, Any], new: Mapping[str, Any], keys: Iterable[str] | None = None
) -> dict[str, tuple[Any, Any]]:
    """Names whose values differ, with the old and the new value (``None`` where absent)."""
    names = sorted({*old, *new} if keys is None else keys)
    return {name: (old.get(name), new.get(name)) for name in names if old.get(name) != new.get(name)}


def content_digest(key: str, path: Path) -> str:
    """Digest of a table, or of the files that define a model or an SAE."""
    if not path.exists():
        raise UserError(f"{key} does not exist", value=str(path), fix=f"correct {key} in the study")
    try:
        if key not in _FOLDERS:
            return table_sha256(path)
        files = sorted({file for pattern in _DEFINING for file in path.glob(pattern)})
        lines = [f"{sha256_file(file)}  {file.name}\n" for file in files]
    except OSError as error:
        raise UserError(f"{key} cannot be read", value=str(error)) from None
    return hashlib.sha256("".join(lines).encode()).hexdigest()


def code_version() -> str:
    """Return the version of the package and the digest of the sources that compute."""
    return f"taught {taught.__version__}, sources {code_digest()}"


@cache
def code_digest() -> str:
    """First 16 hex digits of a digest over the package's sources, those that only show left out."""
    root = Path(taught.__file__).parent
    digest = hashlib.sha256()
    for file in sorted(root.rglob("*.py")):
        name = file.relative_to(root).as_posix()
        if not name.startswith(_PRESENTATION):
            digest.update(name.encode() + b"\0" + file.read_bytes() + b"\0")
    return digest.hexdigest()[:16]
