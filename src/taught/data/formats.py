"""The formats that training data come in, each turned into records.

    messages          ``messages`` or ShareGPT's ``conversations``: a list of {role, content} or {from, value}
    prompt, response  also ``instruction`` or ``question`` with ``completion``, ``output`` or ``answer``; each a
                      text or a list of messages
    Alpaca, Dolly     ``instruction`` with ``input`` or ``context``: the user's turn is both, a line break between
                      them; with ``system`` and ``history`` ([[question, answer], ...])
    text              a document, where documents are asked for
    chosen, rejected  a preference, where preferences are asked for: two answers to one ``prompt`` (a text or messages),
                      or two conversations that differ in their last answer alone; with the log-probabilities of
                      both under a reference (``ref_chosen_logps``, ``ref_rejected_logps``), where that is no model

``system`` is a system turn, ``tools`` go to the chat template. Whatever else is known to change an
example (pictures, a weight of the row, keys of a message that no template gets, a second prompt) is refused by name
where it holds something (:mod:`taught.data.unused`); other columns of a row are kept as its flags.
"""

from __future__ import annotations

import json
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import replace
from typing import Any

from taught.data.columns import cell, detect_columns, folded, text_cell
from taught.data.examples import Message, Record, Turns, content_id
from taught.data.readers import Row
from taught.data.tables import Table
from taught.data.unused import (
    ANSWERED,
    ASKED,
    FOR_TEMPLATE,
    MARKS,
    holds,
    refuse_cells,
    refuse_columns,
    refuse_keys,
    refuse_rivals,
)
from taught.errors import UserError, refuse

_ABOUT = {"label": ("label", "group"), "category": ("category", "topic"), "source": ("source",)}
PAIR_COLUMNS: Mapping[str, tuple[str, ...]] = {
    "id": ("id", "example_id"),
    "messages": ("messages", "conversations", "conversation"),
    "prompt": ("prompt", "instruction", "question", "input"),
    "context": ("input", "context"),
    "response": ("response", "completion", "output", "answer"),
    "system": ("system", "system_prompt"),
    "history": ("history",),
    "tools": ("tools",),
    **_ABOUT,
}
DOCUMENT_COLUMNS: Mapping[str, tuple[str, ...]] = {
    "id": ("id", "example_id", "document_id"),
    "text": ("text", "document", "content"),
    **_ABOUT,
}
PREFERENCE_COLUMNS: Mapping[str, tuple[str, ...]] = {
    "id": ("id", "example_id"),
    "chosen": ("chosen",),
    "rejected": ("rejected",),
    "prompt": ("prompt", "instruction", "question", "input"),
    "context": ("input", "context"),
    "system": ("system", "system_prompt"),
    "history": ("history",),
    "tools": ("tools",),
    "reference_chosen": ("ref_chosen_logps", "reference_chosen_logps"),
    "reference_rejected": ("ref_rejected_logps", "reference_rejected_logps"),
    **_ABOUT,
}
_ROLES = {
    **{role: role for role in ("system", "developer", "user", "assistant", "tool")},
    **{"human": "user", "gpt": "assistant", "chatgpt": "assistant", "model": "assistant"},
}
_ORDER = re.compile("s?(u(at+)*a)+")
# A text that is a list of messages, or of [question, answer], as JSON or as Python writes it.
_MESSAGES = re.compile(r"""\s*\[\s*\{.*['"](role|from)['"]\s*:.*\}\s*\]\s*""", re.DOTALL)
_EXCHANGES = re.compile(r"\s*\[\s*\[.*\]\s*\]\s*", re.DOTALL)
_IN_ONE = "put the whole conversation into one `messages` column"
# Log-probabilities of a reference under names that are not read.
_OTHER_REFERENCES = tuple(
    f"{ref}_{a}_{b}"
    for ref in ("ref", "reference")
    for side in ("chosen", "rejected")
    for log in ("logp", "logps", "logprob", "logprobs", "log_prob", "log_probs")
    for a, b in ((side, log), (log, side))
)


def read_pairs(
    table: Table, columns: Mapping[str, str] | None, turns: Turns
) -> tuple[tuple[Record, ...], dict[str, str]]:
    """Read a record from every row, and which column was taken for what."""
    found = detect_columns(table.columns, PAIR_COLUMNS, columns, table.name)
    present = set(map(folded, table.columns))
    if {"chosen", "rejected"} <= present and not columns:
        raise UserError(
            f"{table.name} holds preference pairs (chosen, rejected)",
            value=f"columns: {', '.join(sorted(table.columns))}",
            rule="an example of kind pair has one response",
            fix="use --set examples.kind=preference, or rename one of the columns to response to attribute to it alone",
        )
    if "messages" not in found and not {"prompt", "response"} <= set(found):
        fix = "rename the columns, or load with columns={'prompt': …, 'response': …}"
        raise UserError(
            f"{table.name} has neither messages nor a prompt and a response",
            value=f"columns: {', '.join(table.columns)}",
            rule="an example is `messages`, or `prompt` with `response` (or `completion`)",
            fix="use --set examples.kind=document" if "text" in present else fix,
        )
    table, names = with_messages(table, found), _row_names(table, found)
    refuse_columns(table, found, names)
    refuse_keys(table, found, names)
    if folded(found.get("response", "")) == "completion":  # of KTO some completions are to be unlearned
        rows = zip(table.rows, names, strict=True)
        against = [name for row, name in rows if cell(row, found, "label") is False]
        refuse(
            against,
            f"{table.name}: {len(against)} completions have the label false",
            rule="training moves a pair's response up; data of KTO move those of the label false down",
            fix="remove these rows, or write the labels as words if they are notes",
        )
    records = tuple(_pair(row, found, name, turns) for row, name in zip(table.rows, names, strict=True))
    refuse_rivals(table, found, rivals(PAIR_COLUMNS, columns), [record.whole for record in records], names)
    return records, found


def document_columns(present: Sequence[str], columns: Mapping[str, str] | None, where: str) -> dict[str, str]:
    """Which column of a corpus is taken for what; UserError where none is its text."""
    found = detect_columns(present, DOCUMENT_COLUMNS, columns, where)
    if "text" not in found:
        raise UserError(
            f"{where} has no text",
            value=f"columns: {', '.join(present)}",
            rule="a document is a `text`",
            fix="rename the column, or use --set examples.kind=pair",
        )
    return found


def read_document(row: Row, columns: Mapping[str, str], number: int) -> Record:
    """Read a document from a row; ``number`` is its place."""
    name = _row_name(row, columns, number)
    refuse_cells(row, name)
    text = text_cell(row, columns, "text", name)
    return _record(row, columns, name, (), (text,), kind="document")


def read_preferences(table: Table, columns: Mapping[str, str] | None) -> tuple[tuple[Record, ...], dict[str, str]]:
    """Read a preference from every row, and which column was taken for what."""
    found = detect_columns(table.columns, PREFERENCE_COLUMNS, columns, table.name)
    if not {"chosen", "rejected"} <= set(found):
        raise UserError(
            f"{table.name} has no chosen and rejected answers",
            value=f"columns: {', '.join(table.columns)}",
            rule="a preference is `prompt`, `chosen` and `rejected`, or two conversations",
            fix="rename the columns, or use --set examples.kind=pair",
        )
    table, names = with_messages(table, found), _row_names(table, found)
    refuse_columns(table, found, names, more=_OTHER_REFERENCES)
    refuse_keys(table, found, names)
    records = tuple(_preference(row, found, name) for row, name in zip(table.rows, names, strict=True))
    usual = [*rivals(PREFERENCE_COLUMNS, columns), *PAIR_COLUMNS["messages"]]
    refuse_rivals(table, found, usual, [record.whole for record in records], names)
    return records, found


def rivals(usual: Mapping[str, Sequence[str]], given: Mapping[str, str] | None) -> list[str]:
    """Names of columns that could be what is said, but for those of a field whose column the user named."""
    said = ("messages", "text", "prompt", "context", "response", "system", "history")
    return [
        *(name for field in said if field in usual and field not in (given or {}) for name in usual[field]),
        *ASKED,
        *(ANSWERED if "text" not in usual else ()),
    ]


def with_messages(table: Table, columns: Mapping[str, str]) -> Table:
    """The table with messages in the place of the JSON that a cell writes them in.

    Raises
    ------
    UserError
        A cell is written as messages and is no JSON.
    """
    written = dict.fromkeys(("messages", "text", "prompt", "response", "chosen", "rejected"), _MESSAGES)
    written["history"] = _EXCHANGES
    forms = {columns[field]: form for field, form in written.items() if field in columns}
    rows = []
    for number, row in enumerate(table.rows, 1):
        texts = {column: row[column] for column in forms if isinstance(row.get(column), str)}
        read = {c: _from_json(text, c, number) for c, text in texts.items() if forms[c].fullmatch(text)}
        rows.append({**row, **read} if read else row)
    return replace(table, rows=rows)


def _from_json(value: str, column: str, number: int) -> Any:
    try:
        return json.loads(value)
    except ValueError as error:
        raise UserError(
            f"the {column} of row {number} is written as messages and is no JSON",
            value=value,
            rule='in a text messages are JSON: [{"role": "user", "content": "…"}]',
            fix="write the cell with json.dumps, or save the table as JSONL or Parquet",
        ) from error


def _preference(row: Row, columns: Mapping[str, str], name: str) -> Record:
    chosen, rejected = (_side(row, columns, side, name) for side in ("chosen", "rejected"))
    before, last = tuple(chosen[:-1]), chosen[-1]
    if before != tuple(rejected[:-1]):
        raise UserError(
            f"the chosen and the rejected conversation of {name} differ before their last answer",
            value=[turn["content"] for turn in rejected[:-1] if turn not in before] or "their length",
            rule="both answer the same messages",
            fix="cut both after the first answer in which they differ",
        )
    if last == rejected[-1]:
        raise UserError(
            f"the chosen and the rejected answer of {name} are the same",
            value=last["content"],
            rule="a preference moves the model from one answer to another",
            fix="remove the row",
        )
    asked = before[-1]["content"].strip()
    texts = all(isinstance(cell(row, columns, side), str) for side in ("chosen", "rejected"))
    repeating = all(turn["content"].strip().startswith(asked) for turn in (last, rejected[-1]))
    if texts and repeating and len(asked.split()) > 2:
        raise UserError(
            f"both answers of {name} begin with their prompt",
            value=asked,
            rule="an answer is what follows the prompt",
            fix="cut the prompt off; answers that do begin so are messages: [{role: assistant, content: …}]",
        )
    extras = [{k: v for k, v in turn.items() if k not in ("role", "content")} for turn in (last, rejected[-1])]
    if extras[0] or extras[1]:
        raise UserError(
            f"an answer of {name} holds more than its text",
            value=[*extras[0], *extras[1]],
            rule="the chosen and the rejected answer are texts",
            fix="remove the keys, or put the thoughts into the text",
        )
    answers, reference = (last["content"], rejected[-1]["content"]), _reference(row, columns, name)
    return _record(row, columns, name, before, answers, reference=reference, kind="preference")


def _side(row: Row, columns: Mapping[str, str], side: str, name: str) -> list[Message]:
    """The conversation that ends in the chosen, or in the rejected answer."""
    value = cell(row, columns, side)
    first = read_turns(value, name)[0] if isinstance(value, list | tuple) and value else None
    whole = first is not None and first["role"] != "assistant"
    if not whole and "prompt" not in columns:
        raise UserError(
            f"the {side} answer of {name} has no prompt",
            value=value,
            rule="an answer stands beside a `prompt`, or in a conversation of messages",
            fix="split the text into a prompt and its answer",
        )
    turns = _conversation(row, {**columns, "messages" if whole else "response": columns[side]}, name)
    if marked := [key for turn in turns for key in MARKS if key in turn]:
        raise UserError(
            f"a message of {name} is marked with a {marked[0]}",
            value=value,
            rule="of a preference the last answers count, and no others",
            fix=f"remove the {marked[0]} from its messages",
        )
    return turns


def _reference(row: Row, columns: Mapping[str, str], name: str) -> tuple[float, float] | None:
    """Log-probabilities of both answers under a reference, where the row gives them."""
    given = [cell(row, columns, f"reference_{side}") for side in ("chosen", "rejected")]
    if not any(holds(value) for value in given):
        return None
    numbers: list[float] = []
    with suppress(ValueError, OverflowError):
        numbers = [float(v) for v in given if isinstance(v, int | float | str) and not isinstance(v, bool)]
    if len(numbers) < 2 or not all(math.isfinite(number) and number <= 0 for number in numbers):
        raise UserError(
            f"the log-probabilities of the reference of {name} are not two numbers",
            value=given,
            rule="the sum over an answer's tokens, natural logarithm, at most 0, for both answers",
            fix="correct them, or leave both out: the reference is then the base model",
        )
    return numbers[0], numbers[1]


def _row_names(table: Table, columns: Mapping[str, str]) -> list[str]:
    """What the rows are called in messages."""
    return [_row_name(row, columns, number) for number, row in enumerate(table.rows, 1)]


def _row_name(row: Row, columns: Mapping[str, str], number: int) -> str:
    """What a row is called in messages: its id, or its number."""
    given = text_cell(row, columns, "id", f"row {number}")
    return given if given.strip() else f"row {number}"


def _record(
    row: Row,
    columns: Mapping[str, str],
    name: str,
    messages: tuple[Message, ...],
    answers: tuple[str, ...],
    **fields: Any,
) -> Record:
    """The record of messages and their answer, of a preference the chosen and the rejected one; or of a text."""
    used, given = set(columns.values()), text_cell(row, columns, "id", name)
    return Record(
        id=given if given.strip() else content_id(messages, *answers),
        prompt=next((turn["content"] for turn in reversed(messages) if turn["role"] == "user"), ""),
        response=answers[0],
        rejected="".join(answers[1:]),
        messages=messages,
        tools=_tools(cell(row, columns, "tools"), name),
        label=text_cell(row, columns, "label", name),
        category=text_cell(row, columns, "category", name),
        source=text_cell(row, columns, "source", name),
        flags={key: value for key, value in row.items() if key not in used},
        **fields,
    )


def _pair(row: Row, columns: Mapping[str, str], name: str, turns: Turns) -> Record:
    given = _conversation(row, columns, name)
    messages = [{key: value for key, value in turn.items() if key not in MARKS} for turn in given]
    counted = _counted(given, turns, name)
    last = counted[-1]
    before, response = tuple(messages[:last]), messages[last]
    for place in counted:
        if messages[place].get("tool_calls"):
            raise UserError(
                f"an answer of {name} that counts calls a tool",
                value=messages[place]["tool_calls"],
                rule="the loss is on answers in words; calls of tools stand before them",
                fix="mark that message with weight: 0, or end the conversation with an answer",
            )
        if place != last and not messages[place]["content"].strip():
            fix = "fill it, or mark it with weight: 0"
            raise UserError(f"an answer of {name} that counts is empty", value=messages[place], fix=fix)
    extras = {key: value for key, value in response.items() if key not in ("role", "content")}
    return _record(row, columns, name, before, (response["content"],), counted=tuple(counted[:-1]), extras=extras)


def _conversation(row: Row, columns: Mapping[str, str], name: str) -> list[Message]:
    """All turns of a row, in the order that a conversation has."""
    system = text_cell(row, columns, "system", name)
    given = cell(row, columns, "messages")
    if given is not None:
        turns = read_turns(given, name)
        _refuse_beside(row, columns, turns, name)
    elif not {"prompt", "response"} <= set(columns):
        raise UserError(
            f"the messages of {name} are empty",
            rule="an example is `messages`, or `prompt` with `response` (or `completion`)",
            fix="fill the cell or remove the row",
        )
    else:
        prompt = _part(row, columns, "prompt", "user", name)
        add_context(row, columns, prompt, name)
        turns = [
            *read_history(cell(row, columns, "history"), name),
            *prompt,
            *_part(row, columns, "response", "assistant", name),
        ]
        if turns[0]["role"] != "system" and prompt[0]["role"] == "system":
            raise UserError(f"{name} has a history before its system turn", value=prompt[0]["content"], fix=_IN_ONE)
    turns = with_system(system, turns, name)
    if not _ORDER.fullmatch(role_letters(turns)):
        raise UserError(
            f"the messages of {name} do not end in one answer to a user",
            value=" ".join(turn["role"] for turn in turns),
            rule="an optional system turn, then user and assistant in turn, the assistant last",
            fix="cut the conversation after an assistant turn, or join the turns of one speaker",
        )
    return turns


def with_system(system: str, turns: list[Message], name: str) -> list[Message]:
    """The turns behind a system turn with this text; as they are where there is no text, or they begin with it.

    Raises
    ------
    UserError
        They begin with another system text.
    """
    if not system or not (turns and turns[0]["role"] == "system"):
        return [{"role": "system", "content": system}, *turns] if system else turns
    if turns[0]["content"] != system:
        raise UserError(
            f"{name} has two system texts",
            value=f"{system!r} beside the turn {turns[0]['content']!r}",
            rule="a conversation has one system turn",
            fix="keep one of them",
        )
    return turns


def role_letters(turns: Sequence[Message]) -> str:
    """The roles of a conversation, a letter each: s, u, a, t."""
    letters = {"system": "s", "developer": "s", "user": "u", "assistant": "a", "tool": "t"}
    return "".join(letters[turn["role"]] for turn in turns)


def _counted(turns: Sequence[Message], which: Turns, name: str) -> list[int]:
    """Places of the answers that the loss is on."""
    marks = [_mark(turn, name) for turn in turns]
    answers = [place for place, turn in enumerate(turns) if turn["role"] == "assistant"]
    marked = any(marks[place] is not None for place in answers)
    otherwise = {place: marked or which == "all" or place == answers[-1] for place in answers}
    counted = [place for place in answers if (otherwise[place] if marks[place] is None else marks[place])]
    if any(marks[place] for place in range(len(turns)) if place not in otherwise):
        raise UserError(
            f"a turn of {name} that is no answer is marked to count",
            rule="the loss is on turns of the assistant",
            fix="remove the weight, or set it to 0",
        )
    if not counted:
        raise UserError(
            f"no answer of {name} counts",
            rule="the loss is on one answer at least; weight: 0 and train: false leave an answer out",
            fix="remove the row, or mark an answer with weight: 1",
        )
    return counted


def _mark(turn: Message, name: str) -> bool | None:
    """Whether a message says that the loss is on it; None where it says nothing."""
    given = {key: turn[key] for key in MARKS if turn.get(key) is not None}
    if any(value not in (0, 1) for value in given.values()) or len({bool(v) for v in given.values()}) > 1:
        raise UserError(
            f"a message of {name} has a weight that is neither 0 nor 1",
            value=given,
            rule="an answer counts or it does not: weight 0 or 1, train false or true",
            fix="use 0 or 1",
        )
    return next((bool(value) for value in given.values()), None)


def read_turns(value: object, name: str) -> list[Message]:
    """Messages of a conversation, as {role, content} or ShareGPT's {from, value}.

    Raises
    ------
    UserError
        A message has no role, one that is not known, or no text as its content.
    """
    turns = []
    for turn in value if isinstance(value, list | tuple) else [value]:
        given: Mapping[str, Any] = turn if isinstance(turn, Mapping) else {}
        role, content = (_one_of(given, keys, name) for keys in (("role", "from"), ("content", "value")))
        kept = {key: given[key] for key in (*MARKS, *FOR_TEMPLATE) if holds(given.get(key))}
        wrong = [k for k in FOR_TEMPLATE if k in kept and not isinstance(kept[k], list if k == "tool_calls" else str)]
        if wrong:
            raise UserError(
                f"the {wrong[0]} of a message of {name} is malformed",
                value=kept[wrong[0]],
                rule=f"of {', '.join(FOR_TEMPLATE)} the first is a list of objects, the others are texts",
                fix="correct it, or remove the key",
            )
        content = "" if content is None and "tool_calls" in kept else content
        if not isinstance(role, str) or not isinstance(content, str):
            raise UserError(
                f"a message of {name} has no role or no text",
                value=turn,
                rule='a message is {"role": "user", "content": "…"}; content is text only',
                fix="write the content as one text",
            )
        if (known := _ROLES.get(role.strip().lower())) is None:
            raise UserError(
                f"a message of {name} has a role that is not known",
                value=role,
                rule=f"a role is one of {', '.join(_ROLES)}",
                fix="rename it; a call of a tool is an assistant's `tool_calls`, what it returns a message of `tool`",
            )
        turns.append({"role": known, "content": content, **kept})
    return turns


def _one_of(turn: Mapping[str, Any], keys: tuple[str, str], name: str) -> Any:
    """What a message holds under one of two keys that mean the same."""
    given = [turn[key] for key in keys if holds(turn.get(key))]
    if len(given) == 2 and given[0] != given[1]:
        raise UserError(
            f"a message of {name} has a {keys[0]} and another {keys[1]}",
            value=given,
            rule="both keys mean the same",
            fix="remove one of them",
        )
    return given[0] if given else turn.get(keys[0], turn.get(keys[1]))


def _part(row: Row, columns: Mapping[str, str], field: str, role: str, name: str) -> list[Message]:
    """The turns of a prompt or a response: a text, or messages."""
    value = cell(row, columns, field)
    if isinstance(value, list | tuple) and value and all(isinstance(turn, Mapping) for turn in value):
        return read_turns(value, name)
    return [{"role": role, "content": text_cell(row, columns, field, name)}]


def read_history(value: object, name: str) -> Iterator[Message]:
    """Earlier turns, of a list of [question, answer]."""
    for turn in value if isinstance(value, list | tuple) else [value] if holds(value) else []:
        if not isinstance(turn, list | tuple) or len(turn) != 2 or not all(isinstance(text, str) for text in turn):
            raise UserError(f"the history of {name} is no list of [question, answer]", value=turn, fix=_IN_ONE)
        yield {"role": "user", "content": turn[0]}
        yield {"role": "assistant", "content": turn[1]}


def add_context(row: Row, columns: Mapping[str, str], prompt: list[Message], name: str, field: str = "prompt") -> None:
    """Put Alpaca's input, Dolly's context behind the instruction, as a part of the user's turn.

    Parameters
    ----------
    prompt : the turns of the prompt, changed in place
    field : whose column the prompt is

    Raises
    ------
    UserError
        The prompt is no instruction: where the context belongs is not known.
    """
    context = text_cell(row, columns, "context", name)
    if not context.strip():
        return
    if folded(columns[field]) == "instruction" and len(prompt) == 1:
        prompt[0]["content"] += "\n" + context
    elif not any(context in turn["content"] for turn in prompt):
        raise UserError(
            f"{name} has a {columns['context']} beside its {columns[field]}",
            value=context,
            rule="only what stands beside an `instruction` has a known place in the user's turn",
            fix=f"rename the {columns[field]} to instruction, or put both into one text",
        )


def _refuse_beside(row: Row, columns: Mapping[str, str], turns: Sequence[Message], name: str) -> None:
    """Refuse texts beside messages that the messages do not hold."""
    for field in ("prompt", "context", "response", "history"):
        value = cell(row, columns, field)
        if not holds(value):
            continue
        part = isinstance(value, list | tuple) and all(isinstance(turn, Mapping) for turn in value)
        texts = [turn["content"] for turn in read_turns(value, name)] if part else [str(value)]
        last = slice(-1, None) if field == "response" else slice(None)  # the last answer is trained on
        if not all(any(text in turn["content"] for turn in turns[last]) for text in texts[last]):
            raise UserError(
                f"{name} has messages and a {columns[field]} that is not among them",
                value=value,
                rule="an example is given once: as messages, or as a prompt and a response",
                fix=f"remove the {columns[field]}, or put it into the messages",
            )


def _tools(value: object, name: str) -> tuple[Any, ...]:
    given = value
    if isinstance(value, str) and value.strip():
        with suppress(ValueError):
            given = json.loads(value)
    if not holds(given):
        return ()
    if not isinstance(given, list | tuple) or not all(isinstance(tool, Mapping) for tool in given):
        raise UserError(
            f"the tools of {name} are no list of descriptions",
            value=value,
            rule="a tool is a JSON schema, as the chat template reads it",
            fix="write a list of objects, or leave the cell empty",
        )
    return tuple(given)
