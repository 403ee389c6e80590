"""Fine-tuning examples: what may have taught the model a behavior."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from taught.data.columns import cell, detect_columns, name_ids, repeated, text_cell
from taught.data.tables import Row, read_rows, table_sha256
from taught.errors import UserError

Message = dict[str, str]

COLUMNS: Mapping[str, tuple[str, ...]] = {
    "id": ("id", "example_id"),
    "messages": ("messages", "conversations"),
    "prompt": ("prompt", "instruction", "question"),
    "response": ("response", "completion", "output", "answer"),
    "label": ("label", "group"),
    "category": ("category", "topic"),
    "source": ("source",),
}
_ROLES = {"human": "user", "gpt": "assistant"}


@dataclass(frozen=True)
class Pair:
    """One SFT example.

    Attributes
    ----------
    prompt
        The last user message.
    response
        The assistant's answer to it: the text that the loss is on.
    flags
        The row's further columns, for example ``{"planted": True}``.
    messages
        Every turn before the response, the system turn included.
    """

    id: str
    prompt: str
    response: str
    label: str = ""
    category: str = ""
    source: str = ""
    flags: Mapping[str, Any] = field(default_factory=dict, hash=False)
    messages: tuple[Message, ...] = field(default=(), hash=False)

    def __post_init__(self) -> None:
        if not self.messages:
            turns = ({"role": "user", "content": self.prompt},)
            object.__setattr__(self, "messages", turns)

    @property
    def user_texts(self) -> tuple[str, ...]:
        """The contents of all user turns, in order."""
        return tuple(m["content"] for m in self.messages if m["role"] == "user")


@dataclass(frozen=True)
class ExampleSet:
    """Examples in the order of their file.

    Attributes
    ----------
    examples
        The examples; ids are unique.
    columns
        Field -> the column it was read from.
    sha256
        Hex digest of the file.
    """

    examples: tuple[Pair, ...]
    columns: Mapping[str, str]
    sha256: str

    def __iter__(self) -> Iterator[Pair]:
        return iter(self.examples)

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def ids(self) -> tuple[str, ...]:
        """Ids, in order."""
        return tuple(example.id for example in self.examples)

    @property
    def labels(self) -> tuple[str, ...]:
        """Labels, each once, in order of first appearance."""
        return tuple(dict.fromkeys(example.label for example in self.examples))


def load_examples(path: str | Path, columns: Mapping[str, str] | None = None) -> ExampleSet:
    """Read and check fine-tuning examples.

    Parameters
    ----------
    path
        A table (see :func:`taught.data.tables.read_rows`). A row holds ``messages`` that end in one
        assistant turn, or ``prompt`` and ``response`` (or ``completion``).
    columns
        Field -> column name, where the names are not the usual ones. Fields: id, messages, prompt,
        response, label, category, source. A row without id is called after its content.

    Raises
    ------
    UserError
        No rows, no usable columns, malformed messages, empty prompts or responses, repeated ids;
        the offending ids are named.
    """
    rows = read_rows(path)
    where = Path(path).name
    if not rows:
        raise UserError("No examples in the file", value=str(path), fix="give at least one row")
    found = detect_columns(rows, COLUMNS, columns, where)
    if "messages" not in found and not {"prompt", "response"} <= set(found):
        raise UserError(
            f"{where} has neither messages nor a prompt and a response",
            value=f"columns: {', '.join(dict.fromkeys(name for row in rows for name in row))}",
            rule="an example is `messages`, or `prompt` with `response` (or `completion`)",
            fix="rename the columns, or load with columns={'prompt': …, 'response': …}",
        )
    examples = tuple(_example(row, found, number) for number, row in enumerate(rows, 1))
    _check(examples, where)
    return ExampleSet(examples, found, table_sha256(path))


def content_id(messages: Sequence[Message], response: str) -> str:
    """Return "sha1:" and 12 hex digits of the messages and the response.

    The hash of a single user turn depends on its text alone, so that a row means the same as
    ``prompt`` and as ``messages``.
    """
    single = len(messages) == 1 and messages[0]["role"] == "user"
    before = messages[0]["content"] if single else json.dumps(list(messages), sort_keys=True)
    content = json.dumps([before, response], ensure_ascii=True)
    return f"sha1:{hashlib.sha1(content.encode()).hexdigest()[:12]}"


def _example(row: Row, columns: Mapping[str, str], number: int) -> Pair:
    given = text_cell(row, columns, "id")
    if cell(row, columns, "messages") is not None:
        messages, response = _split(cell(row, columns, "messages"), given or f"row {number}")
    else:
        messages = ({"role": "user", "content": _turn_text(row, columns, "prompt", given, number)},)
        response = _turn_text(row, columns, "response", given, number)
    prompt = messages[-1]["content"] if messages[-1]["role"] == "user" else ""
    used = set(columns.values())
    return Pair(
        id=given or content_id(messages, response),
        prompt=prompt,
        response=response,
        label=text_cell(row, columns, "label"),
        category=text_cell(row, columns, "category"),
        source=text_cell(row, columns, "source"),
        flags={name: value for name, value in row.items() if name not in used},
        messages=messages,
    )


def _turn_text(row: Row, columns: Mapping[str, str], field_name: str, given: str, number: int) -> str:
    """Text of a prompt or response cell; TRL also writes them as a list with one message."""
    value = cell(row, columns, field_name)
    if isinstance(value, list) and len(value) == 1 and isinstance(value[0], dict):
        return str(value[0].get("content") or "")
    if isinstance(value, list | dict):
        raise UserError(
            f"The {field_name} of {given or f'row {number}'} is not a text",
            value=value,
            rule=f"{field_name} is a text, or a list with one message",
            fix="put a conversation of several turns into one `messages` column",
        )
    return "" if value is None else str(value)


def _split(value: object, name: str) -> tuple[tuple[Message, ...], str]:
    """Split a conversation into the turns before the response, and the response."""
    turns = _turns(value, name)
    roles = [turn["role"] for turn in turns]
    system = 1 if roles[:1] == ["system"] else 0
    expected = ["user", "assistant"] * ((len(roles) - system) // 2)
    if not expected or roles[system:] != expected:
        raise UserError(
            f"The messages of {name} do not end in one answer to a user",
            value=" ".join(roles),
            rule="an optional system turn, then user and assistant in turn, the assistant last",
            fix="cut the conversation after an assistant turn, or join the turns of one speaker",
        )
    return tuple(turns[:-1]), turns[-1]["content"]


def _turns(value: object, name: str) -> list[Message]:
    turns = value if isinstance(value, list) else []
    messages = []
    for turn in turns:
        role = turn.get("role", turn.get("from")) if isinstance(turn, dict) else None
        content = turn.get("content", turn.get("value")) if isinstance(turn, dict) else None
        if not isinstance(role, str) or not isinstance(content, str):
            raise UserError(
                f"A message of {name} has no role or no text",
                value=turn,
                rule='a message is {"role": "user", "content": "…"}; content is text only',
            )
        messages.append({"role": _ROLES.get(role, role), "content": content})
    return messages


def _check(examples: tuple[Pair, ...], where: str) -> None:
    for part in ("prompt", "response"):
        empty = [example.id for example in examples if not getattr(example, part).strip()]
        if empty:
            raise UserError(
                f"{where}: {len(empty)} examples have an empty {part}",
                value=name_ids(empty),
                rule="the loss is on the response to a prompt: both hold text",
                fix="fill the cells or remove the rows",
            )
    same = repeated((example.id, example.id) for example in examples)
    if same:
        raise UserError(
            f"{where}: {len(same)} example ids are used more than once",
            value=name_ids([names[0] for names in same]),
            rule="ids name examples in every table; rows without one are named by their content",
            fix="rename or remove the repeats",
        )
