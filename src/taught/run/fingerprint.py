"""What the result of a stage depends on, as a flat record that can be compared and shown.

A record maps a name (``policy.alpha``, ``examples.path sha256``, ``code``) to a plain value. Two runs may share results
only when their records are equal; when they differ, the record says in what. Left out on purpose, because the result
does not depend on them: where a file lies (its content counts), the name of the study, how much memory is used and how
much is computed at once, and where sketches are kept (a store knows by itself what it holds).
"""

from __future__ import annotations

import glob
import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from taught.data.tables import table_sha256
from taught.errors import UserError
from taught.run.code import code_version
from taught.run.files import sha256_folder
from taught.run.stage import Stage
from taught.study.schema import Study, methods_of

Inputs = dict[str, Any]


def stage_inputs(stage: Stage, study: Study, extra: Mapping[str, Any] | None = None) -> Inputs:
    """Everything that the result of a stage depends on.

    Parameters
    ----------
    study : its local files are read for their checksums
    extra : what only the caller knows: ``Subject.identity``, the weights that a name stands for

    Raises
    ------
    UserError
        A file of the study is missing or cannot be read.
    """
    digests: dict[str, str] = {}
    left_out = set(Study.pace_keys())

    def visit(key: str, path: str, kind: str) -> str:
        if kind == "made":
            left_out.add(key)
        elif stage.depends_on(key) and Path(path).is_absolute():
            digests[key] = content_digest(key, Path(path), table=kind in ("file", "table"))
            return digests[key]
        return path

    inputs: Inputs = {}
    for key, value in study.visited(visit).flat().items():
        if stage.depends_on(key) and key not in left_out:
            inputs[f"{key} sha256" if value is not None and digests.get(key) == value else key] = value
    inputs["code"] = stage_code(stage, study)
    return {**inputs, **(extra or {})}


def stage_code(stage: Stage, study: Study) -> str:
    """Version and digest of the sources that a stage's numbers come from."""
    named = methods_of(study)
    chosen = [registry.module(choice.kind) for key, registry, choice in named if stage.depends_on(key)]
    return code_version((stage.module, *stage.code, *chosen))


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


def content_digest(key: str, path: Path, *, table: bool = True) -> str:
    """Digest of a table, or of the files that define a model, an SAE or a concept."""
    if not path.exists() and not (table and glob.glob(str(path), recursive=True)):
        raise UserError(f"{key} does not exist", value=str(path), fix=f"correct {key} in the study")
    try:
        return table_sha256(path) if table else sha256_folder(path)
    except OSError as error:
        raise UserError(f"{key} cannot be read", value=str(error)) from None
