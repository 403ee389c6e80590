"""The stages ``curate`` and ``report``: what follows from the tables, without a model."""

from __future__ import annotations

from typing import Any

import pyarrow as pa

from taught.analysis.curate import curate as decide
from taught.data.pairs import load_pairs
from taught.data.tables import read_rows
from taught.errors import UserError
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
    with run.stage("curate", study):
        summary = run.read_table("summary").to_pylist()
        column = _score_column(summary, study.curation.rule, target)
        decisions = decide(
            [row["pair_id"] for row in summary],
            [row["label"] for row in summary],
            [row[column] for row in summary],
            rule=study.curation.rule,
            k=study.curation.k if study.curation.rule == "top-k" else None,
        )
        run.write_table("curation", pa.Table.from_pylist(decisions))
        _write_choice(run, study, decisions)


def _score_column(summary: list[dict[str, Any]], rule: str, target: str | None) -> str:
    if target in (None, "score"):
        return "score"
    column = target.replace(":", "_") if target else ""
    if rule != "top-k" or column not in summary[0] or not column.startswith("mean_y_"):
        known = [name.replace("mean_y_", "mean_y:") for name in summary[0] if "mean_y_" in name]
        raise UserError(
            "this target cannot be curated by",
            value=target,
            rule=f"score, or with --rule top-k one of {', '.join(known)}",
            fix="taught curate RUN --rule top-k --target mean_y:GROUP",
        )
    return column


def _write_choice(run: RunFolder, study: Study, decisions: list[dict[str, Any]]) -> None:
    """The rows of the pair file, split by decision."""
    from taught.files import json_line

    path = study.pairs.path
    loaded = load_pairs(path)
    row = dict(zip(loaded.ids, read_rows(path), strict=True))
    for action in ("keep", "drop"):
        chosen = [d["pair_id"] for d in decisions if d["action"] == action]
        lines = [json_line({"id": pair_id, **row[pair_id]}) for pair_id in chosen]
        run.write_text(f"{action}.jsonl", "".join(lines))


def report(run: RunFolder) -> None:
    """Write ``report.html``."""
    from taught.report.build import render
    from taught.report.view import load_view

    with run.stage("report", run.study):
        run.verify()
        run.write_text("report.html", render(load_view(run.folder)))
