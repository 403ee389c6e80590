"""Tables of scores that were made elsewhere, to be compared with the methods of a run.

Columns: ``example_id``, ``method``, ``value``; optionally ``target`` (as in ``scores.parquet``: score,
behavior:GROUP, coefficient:ID). A row without one counts for every target, and so does one of a concept,
which was not retrained for: of ``concept:NAME`` the method is called NAME:method.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path
from typing import NamedTuple

from taught.core.names import TargetName
from taught.data.tables import read_rows
from taught.errors import UserError, refuse, shown
from taught.validation.comparison import Scores

COLUMNS = ("example_id", "method", "value")


class ScoreRow(NamedTuple):
    """An example's value by a method; target None: for every target. Positive: raises the target."""

    method: str
    target: str | None
    example_id: str
    value: float


def read_scores(path: Path) -> list[ScoreRow]:
    """Rows of a table of scores (Parquet, CSV, JSONL or JSON).

    Raises
    ------
    UserError
        The file cannot be read or is empty; a column is missing; a value is not a finite number.
    """
    rows = read_rows(path)
    missing = [name for name in COLUMNS if not rows or any(name not in row for row in rows)]
    if missing:
        value = f"without {', '.join(missing)}" if rows else "no rows"
        rule, fix = "columns example_id, method and value; target may be there", "name the columns like this"
        raise UserError(f"{path.name}: not a table of scores", value=value, rule=rule, fix=fix)
    found = []
    for row in rows:
        try:
            number = math.nan if isinstance(row["value"], bool) else float(row["value"])
        except (TypeError, ValueError, OverflowError):
            number = math.nan
        if not math.isfinite(number):
            raise UserError(
                f"{path.name}: a score is not a finite number",
                value=f"{shown(row['value'])} of the example {shown(row['example_id'])}",
                rule="every row has a number in the column value",
                fix="correct it, or leave the method out",
            )
        method, target, example_id = row["method"], row.get("target") or None, row["example_id"]
        whole = isinstance(example_id, int) and not isinstance(example_id, bool)
        named = isinstance(method, str) and method.strip() and isinstance(target, str | None)
        if not named or not (whole or (isinstance(example_id, str) and example_id)):
            raise UserError(
                f"{path.name}: a row does not say of what its score is",
                value={key: row[key] for key in ("example_id", "method", "target") if key in row},
                rule="example_id, method and target are text; only target may be missing",
                fix="correct this row",
            )
        if target is not None and target.startswith("concept:"):
            method, target = f"{TargetName.parse(target).about}:{method}", None
        found.append(ScoreRow(method, target, str(example_id), number))
    return found


def placed(
    rows: Iterable[ScoreRow], example_ids: Collection[str], targets: Sequence[str], taken: Collection[str] = ()
) -> Scores:
    """The scores by method and target, checked against the examples and targets of a run.

    Parameters
    ----------
    taken : names that methods already have

    Raises
    ------
    UserError
        A name is taken; a target or an example is unknown; an example has two values, or none.
    """
    found: Scores = {}
    for row in rows:
        if row.method in taken:
            rule = "names of methods and baselines: " + ", ".join(sorted(taken))
            fix = "give the method another name in its table"
            raise UserError("there is a method of this name already", value=row.method, rule=rule, fix=fix)
        if row.target is not None and row.target not in targets:
            rule, fix = "one of " + ", ".join(targets) + "; or none, for all of them", "leave these rows out"
            raise UserError("scores are of a target that is not compared", value=row.target, rule=rule, fix=fix)
        for target in targets if row.target is None else (row.target,):
            values = found.setdefault(row.method, {}).setdefault(target, {})
            if row.example_id in values:
                value, rule = f"{row.example_id}, by {row.method}", "one for each method, target and example"
                raise UserError("an example has two scores", value=value, rule=rule, fix="leave one of the rows out")
            values[row.example_id] = row.value
    for method, of in found.items():
        for target, values in of.items():
            unknown, missing = values.keys() - set(example_ids), set(example_ids) - values.keys()
            refuse(
                sorted(unknown or missing),
                f"scores by {method} {'are of unknown examples' if unknown else 'are missing'} ({target})",
                rule=f"one for each of the {len(example_ids)} examples of the run, no others",
                fix="score the examples of this study",
            )
    return found
