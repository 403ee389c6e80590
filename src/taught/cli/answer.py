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

    from taught.run.folder import RunFolder


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
    """The table that answers ``what``; None for the overview, and for details of an example or a feature.

    Raises
    ------
    UserError
        Nothing of this name is in the run.
    """
    from taught.run import query

    if what is None:
        return None
    if what.lstrip().lower().startswith(("select", "with ", "from ")):
        return query.select(run, what)
    if what == "tables":
        return query.tables(run)
    if what in run.finished_tables():
        table = run.read_table(what)
        return table if asked.every_row else table.slice(0, asked.top)
    if what in _ids(run):
        return None
    return _target(run, what, asked)


def _ids(run: RunFolder) -> list[str]:
    """Ids of examples and features."""
    known = run.finished_tables()
    columns = {"summary": "example_id", "coefficients": "feature_id"}
    return [
        str(i) for name, column in columns.items() if name in known for i in run.read_table(name)[column].to_pylist()
    ]


def _target(run: RunFolder, what: str, asked: Asked) -> pa.Table:
    from taught.run import query

    try:
        target = str(TargetName.parse(what))
    except UserError as error:
        raise _unknown(run, what, error) from None
    later = bool(asked.groups or asked.changes)
    if later or (target not in query.targets(run, asked.method) and _has_sketches(run)):
        return _from_sketches(run, target, asked)
    if asked.quantiles:
        return query.quantiles(run, target, method=asked.method)
    top = run.footer("summary").num_rows if asked.every_row else asked.top
    return query.top_examples(run, target, top, method=asked.method, label=asked.label)


def _unknown(run: RunFolder, what: str, error: UserError) -> UserError:
    known = [*run.finished_tables(), *_ids(run)]
    close = difflib.get_close_matches(what, known, n=3, cutoff=0.5)
    return UserError(
        "nothing in this run has this name",
        value=what,
        rule="an id of an example or a feature, a table, SELECT ..., or a target (" + str(error.rule) + ")",
        fix="did you mean " + " or ".join(close) + "?" if close else "`taught show RUN tables` lists the tables",
    )


def _has_sketches(run: RunFolder) -> bool:
    return "sketch.json" in run.manifest["files"]


def _from_sketches(run: RunFolder, target: str, asked: Asked) -> pa.Table:
    from taught.stages.ask import Question, ask

    keys = {"policy.alpha": "alpha", "policy.intercept": "intercept", "features.ids": "features"}
    keys["attribution.curvature"] = "curvature"
    unknown = [key for key in asked.changes if key not in keys]
    if unknown:
        raise UserError(
            "sketches cannot answer under another value of this",
            value=unknown[0],
            rule="some of " + ", ".join(keys),
            fix="change the study, and run it in another folder",
        )
    values = {keys[key]: value for key, value in asked.changes.items()}
    if values.get("features") is not None:
        values["features"] = tuple(values["features"])
    table = ask(run, Question(target, groups=asked.groups or None, **values))
    if asked.label is not None:
        import pyarrow.compute as pc

        table = table.filter(pc.field("label") == asked.label)
    return table if asked.every_row else table.slice(0, asked.top)
