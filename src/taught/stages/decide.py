"""The stages ``curate`` and ``report``: what follows from the tables, without a model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pyarrow as pa

from taught.analysis.curate import curate as decide
from taught.data.pairs import load_pairs
from taught.data.tables import read_rows
from taught.errors import UserError
from taught.files import json_line
from taught.fingerprint import content_digest
from taught.run import RunFolder
from taught.study import Study


def curate(
    run: RunFolder, rule: str | None = None, k: int | None = None, target: str | None = None
) -> None:
    """Write which pairs to keep and which to drop, with the reason of each.

    Parameters
    ----------
    rule, k
        Instead of the study's.
    target
        What ``top-k`` sorts by: ``score`` or ``mean_y:GROUP``.
    """
    study = run.study
    study = study if rule is None else study.replace("curation.rule", rule)
    study = study if k is None else study.replace("curation.k", k)
    target = target or "score"
    with run.stage("curate", study, {"curation.target": target}):
        names = run.footer("summary").schema.to_arrow_schema().names
        column = _score_column(names, study.curation.rule, target)
        summary = run.read_table("summary", ["pair_id", "label", column])
        decisions = decide(
            summary["pair_id"].to_pylist(),
            summary["label"].to_pylist(),
            summary[column].to_pylist(),
            rule=study.curation.rule,
            k=study.curation.k if study.curation.rule == "top-k" else None,
            target=target,
        )
        run.write_table("curation", pa.Table.from_pylist(decisions))
        _write_choice(run, study, decisions)


def _score_column(names: list[str], rule: str, target: str | None) -> str:
    if target in (None, "score"):
        return "score"
    column = target.replace(":", "_") if target else ""
    if rule != "top-k" or column not in names or not column.startswith("mean_y_"):
        known = [name.replace("mean_y_", "mean_y:") for name in names if "mean_y_" in name]
        raise UserError(
            "this target cannot be curated by",
            value=target,
            rule=f"score, or with --rule top-k one of {', '.join(known)}",
            fix="taught curate RUN --rule top-k --target mean_y:GROUP",
        )
    return column


def _write_choice(run: RunFolder, study: Study, decisions: list[dict[str, Any]]) -> None:
    """The rows of the pair file, split by decision; a row is in exactly one of the files."""
    rows = _scored_rows(run, study)
    files: dict[str, list[str]] = {"keep": [], "drop": [], "unscored": []}
    for decision in decisions:
        row = rows.pop(decision["pair_id"])
        files[decision["action"]].append(_line(decision["pair_id"], row, decision["reason"]))
    dropped = run.read_json("dropped")
    why = {pair_id: f"not scored: {kind}" for kind, ids in dropped.items() for pair_id in ids}
    for pair_id, row in rows.items():
        reason = why.get(pair_id, "not scored: pairs.limit")
        files["unscored"].append(_line(pair_id, row, reason))
    for name, lines in files.items():
        run.write_text(f"{name}.jsonl", "".join(lines))


def _scored_rows(run: RunFolder, study: Study) -> dict[str, dict[str, Any]]:
    """Pair id -> its row, from a file that has not changed since it was scored."""
    path = Path(study.pairs.path)
    scored = run.manifest["inputs"]["attribute"].get("pairs.path sha256")
    if content_digest("pairs.path", path) != scored:
        raise UserError(
            "the pair file has changed since it was scored",
            value=str(path),
            rule="decisions belong to the pairs that were scored",
            fix=f"restore the file, or taught attribute STUDY --run {run.folder} --fresh",
        )
    return dict(zip(load_pairs(path).ids, read_rows(path), strict=True))


def _line(pair_id: str, row: dict[str, Any], reason: str) -> str:
    try:
        return json_line({**row, "id": pair_id, "curation_reason": reason})
    except (TypeError, ValueError) as error:
        raise UserError(
            "a row of the pair file cannot be written as JSON",
            value=f"{pair_id}: {error}",
            rule="keep.jsonl and drop.jsonl hold the rows of your file",
            fix="turn the column into text or numbers, or leave it out",
        ) from None


def report(run: RunFolder) -> None:
    """Write ``report.html``."""
    from taught.report.build import render
    from taught.report.view import load_view

    with run.stage("report", run.study):
        run.verify()
        run.write_text("report.html", render(load_view(run.folder)))
