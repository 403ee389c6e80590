"""Which column of a table holds what: by the user's mapping, else by the usual names."""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence, Sized
from pathlib import Path

from taught.data.readers import Row
from taught.errors import UserError

_NOTHING = ("nan", "NaN", "<NA>", "None", "null", "NULL", "<noinput>")  # as tools write a cell that is empty


def detect_columns(
    present: Sequence[str], usual: Mapping[str, Sequence[str]], given: Mapping[str, str] | None, where: str
) -> dict[str, str]:
    """Map field names to column names.

    Parameters
    ----------
    present : names of the table's columns
    usual : field -> column names to try, in this order, however they are written (:func:`folded`); a column is one
        field's
    given : the user's own field -> column; wins over the usual names
    where : name of the table, for messages

    Raises
    ------
    UserError
        A given field is unknown or its column is not in the table; two columns are the same but for their writing.
    """
    found: dict[str, str] = {}
    spelled: dict[str, list[str]] = defaultdict(list)
    for column in present:
        spelled[folded(column)].append(column)
    for field, column in (given or {}).items():
        if field not in usual:
            what, rule = f"unknown field in the columns of {where}", f"fields are {', '.join(usual)}"
            raise UserError(what, value=field, rule=rule)
        if column not in present:
            raise UserError(
                f"{where} has no column {column!r}",
                rule=f"its columns are {', '.join(present)}",
                fix=f"name the column that holds the {field}",
            )
        found[field] = column
    for field, names in usual.items():
        if field in found:
            continue
        matching = [[column for column in spelled[folded(name)] if column not in found.values()] for name in names]
        first = next(filter(None, matching), [])
        if len(first) > 1:
            raise UserError(
                f"two columns of {where} have one name, written in two ways",
                value=", ".join(map(repr, first)),
                rule=f"one column holds the {field}",
                fix="rename or remove one of them",
            )
        if first:
            found[field] = first[0]
    return found


def folded(name: str) -> str:
    """A column's name without what may differ between spellings: case, spaces around it, "-" or a space for "_"."""
    return re.sub(r"[\s-]+", "_", name.strip()).casefold()


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
        The cell holds a list, a mapping, bytes, or a number that is none (NaN); a context or a system turn is a word
        for nothing.
    """
    value = cell(row, columns, field)
    if (text := plain_text(value)) is None:
        raise UserError(
            f"the {field} of {name} is not a text",
            value=value,
            rule="a text, or a number that is written out",
            fix=f"turn the column {columns[field]} into text; leave a cell empty where there is none",
        )
    if field in ("context", "system") and text.strip() in _NOTHING:
        raise UserError(
            f"the {field} of {name} is a word for nothing",
            value=text,
            rule=f"what the column {columns[field]} holds is said to the model",
            fix="leave a cell empty where there is none",
        )
    return text


def plain_text(value: object) -> str | None:
    """What a cell says: "" for null; None where it is no text: a list, a mapping, bytes, or a number that is none."""
    if value is None or isinstance(value, str):
        return value or ""
    return None if isinstance(value, Sized) or str(value) in ("nan", "inf", "-inf", "NaT", "<NA>") else written(value)


def written(value: object) -> str:
    """A cell as text: a whole number is the same whether its shard holds whole numbers or, for a gap, fractions."""
    return str(int(value)) if isinstance(value, float) and value.is_integer() else str(value)


def repeated(items: Iterable[tuple[str, str]]) -> list[tuple[str, ...]]:
    """Return the names, in groups of two or more, that carry the same key: (key, name) in."""
    groups: dict[str, list[str]] = defaultdict(list)
    for key, name in items:
        groups[key].append(name)
    return [tuple(names) for names in groups.values() if len(names) > 1]


def refuse_spellings(names: Iterable[str], what: str, where: str) -> None:
    """Raise a UserError where two names are the same but for case and spaces; ``what`` they are of."""
    if same := repeated((" ".join(name.split()).casefold(), repr(name)) for name in dict.fromkeys(names)):
        raise UserError(
            f"{where}: a {what} is written in several ways",
            value=", ".join(same[0]),
            rule=f"each spelling would be a {what} of its own",
            fix="write it in one way",
        )


def name_ids(ids: Sequence[str]) -> str:
    """Name ids in a message: the first few, and how many more."""
    return ", ".join(ids[:8]) + (f" and {len(ids) - 8} more" if len(ids) > 8 else "")


def columns_note(path: str | Path, columns: Mapping[str, str]) -> str:
    """One line that says which columns of a file were taken for what."""
    return f"{Path(path).name}: " + ", ".join(f"{field} = {name}" for field, name in columns.items())
