"""What rows hold beside what is read: refused by name where it could change what the model is given.

Columns that nothing here knows are notes, and stay with their row. Those below are none: a column with a known part in
training, and a second one that could be the prompt, the answer or what stands beside them. A text that the conversation
says too is a copy, and changes nothing.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from taught.data.columns import cell, folded, name_ids
from taught.data.readers import Row
from taught.data.tables import Table
from taught.errors import UserError

# Columns that change what a model is trained on and that nothing here reads, with what they hold where they do not.
_REFUSED: Mapping[str, tuple[object, ...]] = {
    **dict.fromkeys(("functions", "function_call", "tool_calls", "documents", "chat_template_kwargs"), ()),
    **dict.fromkeys(("image", "images", "audio", "audios", "video", "videos"), ()),
    **dict.fromkeys(("reasoning_content", "thinking"), ()),
    **dict.fromkeys(("weight", "train", "loss_weight", "sample_weight", "example_weight", "weights"), (1, True)),
    **dict.fromkeys(("train_on_inputs", "train_on_input", "mask_history"), (0, False)),
    **dict.fromkeys(("segments", "input_ids", "labels", "loss_mask", "completion_mask", "assistant_masks"), ()),
}
# Columns that are a part of what is said wherever they hold something: of what a user says, and of an answer.
ASKED = (
    *("system_message", "system_instruction", "passage", "passages", "contexts", "contextstring"),
    *("support", "article", "options", "choices"),
)
ANSWERED = ("reasoning", "rationale", "cot", "chain_of_thought", "thought", "thoughts")
# Keys of a message that are read by themselves: marks of what counts, and what its chat template gets.
MARKS = ("weight", "train", "training")
FOR_TEMPLATE = ("tool_calls", "tool_call_id", "name", "reasoning_content", "thinking")
# Keys that only say where it came from.
_NOTES = ("id", "message_id", "timestamp", "created_at", "model", "language", "lang", "index", "token_count")


def refuse_columns(
    table: Table, columns: Mapping[str, str], names: Sequence[str], what: str = "examples", more: Sequence[str] = ()
) -> None:
    """Refuse columns that would change what the model sees and have no use, where they hold something.

    Parameters
    ----------
    names : what each row is called
    what : what the rows are
    more : names of columns that these rows have no use for, either
    """
    refused = {**_REFUSED, **dict.fromkeys(more, ())}
    for column in sorted(set(table.columns) - set(columns.values())):
        if (neutral := refused.get(folded(column))) is None:
            continue
        rows = zip(table.rows, names, strict=True)
        if holding := [name for row, name in rows if holds(row.get(column)) and not _is_one_of(row[column], neutral)]:
            raise _refused(table.name, column, holding, what)


def refuse_rivals(
    table: Table,
    columns: Mapping[str, str],
    usual: Iterable[str],
    said: Sequence[str],
    names: Sequence[str],
    what: str = "examples",
) -> None:
    """Refuse columns that could have been read in the place of others, where they say something else.

    Parameters
    ----------
    columns : field -> the column that is read
    usual : names of columns that could be read
    said : all that each row's conversation says
    names : what each row is called
    what : what the rows are
    """
    could = {folded(name) for name in usual}
    for column in sorted(set(table.columns) - set(columns.values())):
        if folded(column) not in could:
            continue
        rows = zip(table.rows, said, names, strict=True)
        if holding := [name for row, text, name in rows if any(part not in text for part in _texts(row.get(column)))]:
            raise _refused(table.name, column, holding, what)


def refuse_keys(table: Table, columns: Mapping[str, str], names: Sequence[str], what: str = "examples") -> None:
    """Refuse keys of messages that are neither used nor known to be notes; ``what`` the rows are."""
    known = {"role", "from", "content", "value", *MARKS, *FOR_TEMPLATE, *_NOTES}
    holding: dict[str, dict[str, None]] = defaultdict(dict)
    for row, name in zip(table.rows, names, strict=True):
        for field in ("messages", "text", "prompt", "response", "chosen", "rejected"):
            value = cell(row, columns, field)
            for turn in value if isinstance(value, list | tuple) else ():
                for key in set(turn) - known if isinstance(turn, Mapping) else ():
                    if holds(turn[key]):
                        holding[key][name] = None
    if holding:
        key, ids = sorted(holding.items())[0]
        raise UserError(
            f"{table.name}: messages of {len(ids)} {what} have a {key}, which is not used",
            value=name_ids(list(ids)),
            rule=f"of a message are used: role, content, weight, train, {', '.join(FOR_TEMPLATE)}",
            fix="rename the key if it is one of these, or remove it from the messages",
        )


def refuse_cells(row: Row, name: str) -> None:
    """Refuse the columns of one row of a stream that :func:`refuse_columns` refuses of a table."""
    for column, value in row.items():
        if (neutral := _REFUSED.get(folded(column))) is not None and holds(value) and not _is_one_of(value, neutral):
            raise _refused(name, column, [name], "documents")


def holds(value: object) -> bool:
    """Whether a cell says something: not null, nor an empty text, list or mapping."""
    if isinstance(value, str):
        return value.strip() not in ("", "[]", "{}", "null")
    return value is not None and not (isinstance(value, list | tuple | Mapping) and not value)


def _refused(where: str, column: str, ids: Sequence[str], what: str) -> UserError:
    return UserError(
        f"{where}: the column {column} would change {len(ids)} {what} and is not used",
        value=name_ids(list(ids)),
        rule="nothing that a model is given is ignored silently",
        fix=f"rename the column {column} if it is a note, or remove it",
    )


def _is_one_of(value: object, neutral: Sequence[object]) -> bool:
    """Whether a cell is one of these values; in a CSV numbers and flags are texts."""
    if not isinstance(value, str):
        return value in neutral
    said = value.strip().lower()
    return said in {str(item).lower() for item in neutral} | {f"{item:.1f}" for item in neutral if type(item) is int}


def _texts(value: Any) -> list[str]:
    """The texts in a cell, of messages their contents."""
    if isinstance(value, Mapping):
        return _texts(value.get("content", value.get("value", list(value.values()))))
    if isinstance(value, list | tuple):
        return [text for part in value for text in _texts(part)]
    return [str(value).strip()] if holds(value) else []
