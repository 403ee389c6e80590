"""Which column of a table holds what: by the user's mapping, else by the usual names."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence, Sized
from pathlib import Path

from taught.data.readers import Row
from taught.errors import UserError


def detect_columns(
    present: Sequence[str], usual: Mapping[str, Sequence[str]], given: Mapping[str, str] | None, where: str
) -> dict[str, str]:
    """Map field names to column names.

    Parameters
    ----------
    present : names of the table's columns
    usual : field -> column names to try, in this order; a column is one field's
    given : the user's own field -> column; wins over the usual names
    where : name of the table, for messages

    Raises
    ------
    UserError
        A given field is unknown or its column is not in the table.
    """
    found = {}
    for field, column in (given or {}).items():
        if field not in usual:
            raise UserError(
                f"unknown field in the columns of {where}", value=field, rule=f"fields are {', '.join(usual)}"
            )
        if column not in present:
            raise UserError(
                f"{where} has no column {column!r}",
                rule=f"its columns are {', '.join(present)}",
                fix=f"name the column that holds the {field}",
            )
        found[field] = column
    for field, names in usual.items():
        matching = [name for name in names if name in present and name not in found.values()]
        if field not in found and matching:
            found[field] = matching[0]
    return found


def cell(row: Row, columns: Mapping[str, str], field: str) -> object:
    """Return a row's value of a field, None where the table has no such column or cell."""
    return row.get(columns[field]) if field in columns else None


def text_cell(row: Row, columns: Mapping[str, str], field: str, name: str = "a row") -> str:
    """Return a row's text of a field, "" where there is none (numbers become text, as :func:`written`).

    Parameters
    ----------
    name : what the row is called in a message

    Raises
    ------
    UserError
        The cell holds a list, a mapping, bytes, or a number that is none (NaN).
    """
    value = cell(row, columns, field)
    if value is None:
        return ""
    no_number = not isinstance(value, str) and str(value) in ("nan", "inf", "-inf", "NaT", "<NA>")
    if no_number or (not isinstance(value, str) and isinstance(value, Sized)):
        raise UserError(
            f"the {field} of {name} is not a text",
            value=value,
            rule="a text, or a number that is written out",
            fix=f"turn the column {columns[field]} into text; leave a cell empty where there is none",
        )
    return written(value)


def written(value: object) -> str:
    """A cell as text: a whole number is the same whether its shard holds whole numbers or, for a gap, fractions."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def repeated(items: Iterable[tuple[str, str]]) -> list[tuple[str, ...]]:
    """Return the names, in groups of two or more, that carry the same key: (key, name) in."""
    groups: dict[str, list[str]] = defaultdict(list)
    for key, name in items:
        groups[key].append(name)
    return [tuple(names) for names in groups.values() if len(names) > 1]


def name_ids(ids: Sequence[str], limit: int = 8) -> str:
    """Name ids in a message: the first few, and how many more."""
    shown = ", ".join(ids[:limit])
    return shown if len(ids) <= limit else f"{shown} and {len(ids) - limit} more"


def columns_note(path: str | Path, columns: Mapping[str, str]) -> str:
    """One line that says which columns of a file were taken for what."""
    return f"{Path(path).name}: " + ", ".join(f"{field} = {name}" for field, name in columns.items())
