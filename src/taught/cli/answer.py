"""``taught show RUN WHAT``: which kind of thing is asked for, and its table."""

from __future__ import annotations

import difflib
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from taught.core.names import TargetName
from taught.errors import UserError

if TYPE_CHECKING:
    import pyarrow as pa

    from taught.core.scores import Scores
    from taught.run.folder import RunFolder

QUANTILES = (0.0, 0.01, 0.05, 0.25, 0.5, 0.75, 0.95, 0.99, 1.0)


@dataclass(frozen=True)
class Asked:
    """The flags of ``taught show``."""

    top: int
    label: str | None
    method: str | None
    quantiles: bool
    groups: tuple[str, ...]
    changes: Mapping[str, Any]
    every_row: bool


def answer(run: RunFolder, what: str | None, asked: Asked) -> pa.Table | None:
    """The table that answers ``what``; None for what is shown otherwise: the overview, a section, an id.

    Raises
    ------
    UserError
        Nothing of this name is in the run.
    """
    from taught.report.sections import SECTIONS
    from taught.run import query

    if what is None:
        return None
    if what.lstrip().lower().startswith(("select", "with ", "from ")):
        return query.select(run, what)
    if what == "tables":
        return query.tables(run)
    if what in run.finished_tables():
        return _head(run.read_table(what), asked)
    if what in _ids(run) or what in SECTIONS.names():
        return None
    return _target(run, what, asked)


def _head(table: pa.Table, asked: Asked) -> pa.Table:
    return table if asked.every_row else table.slice(0, asked.top)


def _ids(run: RunFolder) -> list[str]:
    """Ids of examples and features."""
    known = run.finished_tables()
    columns = {"summary": "example_id", "coefficients": "feature_id"}
    found = [run.read_table(name, [column])[column] for name, column in columns.items() if name in known]
    return [str(value) for column in found for value in column.to_pylist()]


def _target(run: RunFolder, what: str, asked: Asked) -> pa.Table:
    """Every example's value of a target, strongest first, or quantiles of these by label."""
    from taught.report.sections import SECTIONS
    from taught.stages.scored import read_scores

    try:
        target = str(TargetName.parse(what))
    except UserError as error:
        known = [*run.finished_tables(), *_ids(run), *SECTIONS.names()]
        close = difflib.get_close_matches(what, known, n=3, cutoff=0.5)
        raise UserError(
            "nothing in this run has this name",
            value=what,
            rule=f"an id of an example or a feature, a table, a section, SELECT ..., or a target ({error.rule})",
            fix=f"did you mean {' or '.join(close)}?" if close else "`taught show RUN tables` lists the tables",
        ) from None
    scores = None
    if not (asked.groups or asked.changes):
        try:
            scores = read_scores(run, [target], asked.method)
        except UserError:
            if asked.method is not None or "sketches" not in run.read_json("attribution"):
                raise
    table = _by_strength(run, scores or _from_sketches(run, target, asked), asked.label)
    if not asked.quantiles:
        return _head(table, asked)
    import numpy as np
    import pyarrow as pa

    rows: dict[str, list[float]] = {}
    for label, value in zip(table["label"].to_pylist(), table["value"].to_pylist(), strict=True):
        rows.setdefault(label or "", []).append(value)
    found = []
    for label, values in sorted(rows.items()):
        found.append(
            {"label": label, "n": len(values), **{f"q{q:g}": float(np.quantile(values, q)) for q in QUANTILES}}
        )
    return pa.Table.from_pylist(found)


def _by_strength(run: RunFolder, scores: Scores, label: str | None) -> pa.Table:
    """example_id, label, value and se (for a target with pathways along each, too); ties by id."""
    import pyarrow as pa

    summary = run.read_table("summary", ["example_id", "label"])
    of = dict(zip(*(column.to_pylist() for column in summary.columns), strict=True))
    labels = [of[example_id] for example_id in scores.example_ids]
    if label is not None and label not in labels:
        known = sorted({str(name) for name in labels})
        raise UserError("no example has this label", value=label, rule="one of " + ", ".join(known))
    columns: dict[str, Any] = {"example_id": list(scores.example_ids), "label": labels}
    for number, target in enumerate(scores.targets):
        columns["value" if not number else str(target)] = scores[target]
    errors = scores.error(scores.targets[0])
    columns["se"] = pa.array([None] * len(labels) if errors is None else errors, pa.float64(), from_pandas=True)
    order = sorted(range(len(labels)), key=lambda i: (-abs(columns["value"][i]), scores.example_ids[i]))
    return pa.table(columns).take([i for i in order if label in (None, labels[i])])


def _from_sketches(run: RunFolder, target: str, asked: Asked) -> Scores:
    """The answer of the run's store, for another policy where one is asked for."""
    from taught.stages.ask import Question, ask

    keys = {"policy.alpha": "alpha", "policy.intercept": "intercept", "features.ids": "features"}
    keys["attribution.curvature"] = "curvature"
    study = run.study
    for key, value in asked.changes.items():
        if key not in keys:
            what, rule = "sketches cannot answer under another value of this", "some of " + ", ".join(keys)
            raise UserError(what, value=key, rule=rule, fix="change the study, and run it in another folder")
        study = study.replace(key, value)
    values = {keys[key]: study.get(key) for key in asked.changes}
    if "curvature" in values:
        values["curvature"] = values["curvature"].kind
    return ask(run, Question(target, groups=asked.groups or None, **values))
