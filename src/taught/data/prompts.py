"""Evaluation prompts: what the behavior is measured on, and what a policy is fitted on."""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from taught.data.choices import ANSWERS, OPTIONS, Apart, Options, options_apart, read_options
from taught.data.columns import cell, detect_columns, folded, refuse_spellings, repeated, text_cell
from taught.data.formats import add_context, read_history, read_turns, rivals, role_letters, with_messages, with_system
from taught.data.readers import Row
from taught.data.tables import Table, open_table
from taught.data.unused import MARKS, refuse_columns, refuse_keys, refuse_rivals
from taught.data.words import normalise
from taught.errors import UserError, refuse

Message = Mapping[str, Any]

COLUMNS: Mapping[str, tuple[str, ...]] = {
    "id": ("id", "prompt_id"),
    "messages": ("messages", "conversations", "conversation"),
    "text": ("text", "prompt", "instruction", "question", "goal", "behavior"),
    "group": ("group", "label", "skill", "benchmark"),
    "category": ("category", "topic"),
    "source": ("source",),
    "licence": ("licence", "license"),
    "answer": ("answer", "response", "completion", "output", "target"),
    "options": ("options", "choices"),
    "context": ("input", "context", "passage"),
    "system": ("system", "system_prompt"),
    "history": ("history",),
}
# The same of a table whose questions bring options (``taught.data.choices``).
CHOICE_COLUMNS: Mapping[str, tuple[str, ...]] = {
    **COLUMNS,
    "text": (*COLUMNS["text"], "question_stem", "ctx", "query", "sentence"),
    "group": ("group", "skill", "benchmark", "label"),
    "category": (*COLUMNS["category"], "subject"),
    "options": OPTIONS,
    "answer": (*ANSWERS, *COLUMNS["answer"]),
    "context": ("passage", "context", "support", "article", "input"),
}
_NOTES = ("goal", "behavior")  # a short name of the prompt, where another column is its text
ONE_GROUP = "all"  # the group of prompts whose file has no groups


@dataclass(frozen=True)
class Prompt:
    """One evaluation prompt: what the user says, and the group and category it belongs to.

    Attributes
    ----------
    text : the user's message; of a conversation the last one
    answer : the answer that the prompt brings: a text; of a prompt with options also the letter or index of one
    options : answers to choose among
    messages : the conversation up to and with the user's message; empty for that message alone
    """

    id: str
    text: str
    group: str = ONE_GROUP
    category: str = ""
    source: str = ""
    licence: str = ""
    answer: str | int = ""
    options: tuple[str, ...] = ()
    messages: tuple[Message, ...] = field(default=(), hash=False)

    @property
    def content(self) -> str | tuple[Message, ...]:
        """The user's message, or the messages that end in it: what a chat format renders."""
        return self.messages or self.text

    def extended(self, more: str) -> str | tuple[Message, ...]:
        """The content with more text at the end of the user's message."""
        if not self.messages:
            return self.text + more
        return (*self.messages[:-1], {**self.messages[-1], "content": self.text + more})


@dataclass(frozen=True)
class PromptSet:
    """Evaluation prompts in the order of their file.

    Attributes
    ----------
    prompts : the prompts; ids are unique
    columns : field -> the column it was read from
    sha256 : hex digest of the file, or of the rows
    """

    prompts: tuple[Prompt, ...]
    columns: Mapping[str, str]
    sha256: str

    def __iter__(self) -> Iterator[Prompt]:
        return iter(self.prompts)

    def __len__(self) -> int:
        return len(self.prompts)

    @property
    def ids(self) -> tuple[str, ...]:
        """Ids, in order."""
        return tuple(prompt.id for prompt in self.prompts)

    @property
    def groups(self) -> tuple[str, ...]:
        """Group names, each once, in order of first appearance."""
        return tuple(dict.fromkeys(prompt.group for prompt in self.prompts))


def load_prompts(
    source: str | Path | Iterable[Mapping[str, Any]], columns: Mapping[str, str] | None = None
) -> PromptSet:
    """Read and check evaluation prompts.

    Parameters
    ----------
    source : a table, or rows: a list of dicts, a ``datasets.Dataset``, anything that yields mappings (see
        :func:`taught.data.tables.open_table`)
    columns : field -> column name, where the names are not the usual ones. Fields: id, text, messages, group, category,
        source, licence, answer, options, context, system, history (as those of a pair, :mod:`taught.data.formats`). A
        prompt without id is called after what it holds; without groups all prompts are of the group "all". A text may
        be a list of messages.

    Raises
    ------
    UserError
        No rows, no text column, empty texts or groups, repeated ids or prompts, messages that do not
        end with the user, options that are no list of texts, a column that would change the prompt and is not used;
        the offending ids are named.
    """
    table = open_table(source)
    where = table.name
    if not table.rows:
        fix = "check which file prompts.path names"
        raise UserError("there are no prompts", value=where, rule="at least one row", fix=fix)
    apart = options_apart(table.columns)
    found = _columns(table, apart, columns)
    if "text" not in found and "messages" not in found:
        raise UserError(
            f"{where} has no text column",
            value="columns: " + ", ".join(table.columns),
            rule=f"usual names of the text are {', '.join(COLUMNS['text'])}; of a conversation, messages",
            fix="rename the column to prompt, or load with columns={'text': …}",
        )
    table = with_messages(table, found)
    rows = table.rows
    names = [text_cell(row, found, "id", f"row {number}") or f"row {number}" for number, row in enumerate(rows, 1)]
    refuse_columns(table, found, names, "prompts", ("tools",))
    refuse_keys(table, found, names, "prompts")
    prompts = tuple(_prompt(row, found, apart, name) for row, name in zip(rows, names, strict=True))
    usual = [name for name in rivals(COLUMNS if apart is None else CHOICE_COLUMNS, columns) if name not in _NOTES]
    # Messages go before a text: one beside them has to be among them.
    read = {field: column for field, column in found.items() if field != "text" or "messages" not in found}
    refuse_rivals(table, read, usual, ["\n".join(_whole(prompt)) for prompt in prompts], names, "prompts")
    _check(prompts, where)
    return PromptSet(prompts, found, table.sha256)


def _columns(table: Table, apart: Apart | None, given: Mapping[str, str] | None) -> dict[str, str]:
    """Which column of a table of prompts is what; ``label`` is the answer where it names options, else the group."""
    given = dict(given or {})
    if apart is None and not {*OPTIONS, folded(given.get("options", ""))} & set(map(folded, table.columns)):
        return detect_columns(table.columns, COLUMNS, given, table.name)
    found = detect_columns(table.columns, CHOICE_COLUMNS, given, table.name)
    if "answer" in found or "label" not in table.columns or "label" in given.values():
        return found
    options = (read_options(row, found.get("options"), apart, "a row") for row in table.rows)
    named = sum(own.place(row.get("label")) is not None for row, own in zip(table.rows, options, strict=True))
    if 2 * named <= len(table.rows):
        return found
    # Some labels may name no option: what is scored says which.
    return detect_columns(table.columns, CHOICE_COLUMNS, {**given, "answer": "label"}, table.name)


def _prompt(row: Row, columns: Mapping[str, str], apart: Apart | None, name: str) -> Prompt:
    texts = {f: text_cell(row, columns, f, name) for f in ("id", "group", "category", "source", "licence")}
    if "group" not in columns:
        texts["group"] = ONE_GROUP
    options = read_options(row, columns.get("options"), apart, name)
    answer = _answer(row, columns, options, name)
    field = "text" if cell(row, columns, "messages") is None else "messages"
    messages = _conversation(row, columns, field, name, first=bool(options.texts))
    text = messages[-1]["content"]
    if len(messages) == 1 and set(messages[0]) == {"role", "content"}:  # the same prompt as its text alone
        messages = ()
    given = texts.pop("id") or content_id(text, answer, options.texts, messages)
    return Prompt(given, text, **texts, answer=answer, options=options.texts, messages=messages)


def _answer(row: Row, columns: Mapping[str, str], options: Options, name: str) -> str | int:
    """The answer as it stands; where the data name their options by labels, the option's place."""
    answer = cell(row, columns, "answer")
    if options.texts and isinstance(answer, list | tuple) and len(answer) == 1:
        answer = answer[0]
        row = {**row, columns["answer"]: answer}
    if isinstance(answer, int) and not isinstance(answer, bool):
        said: str | int = answer
        given = cell(row, columns, "options")
        if isinstance(given, list | tuple) and answer in given and given.index(answer) != answer:
            raise UserError(
                f"the answer of {name} names one option by its number and another by what it says",
                value=answer,
                rule=f"options: {', '.join(options.texts)}",
                fix="write the answer as a text where it is what an option says, and the options as texts where not",
            )
    else:
        said = text_cell(row, columns, "answer", name)
    if not options.labels or said == "":
        return said
    place = options.place(said)
    return -1 if place is None else place  # what names no option by its label names none by its number


def _conversation(row: Row, columns: Mapping[str, str], field: str, name: str, *, first: bool) -> tuple[Message, ...]:
    """Messages in which the user speaks last: the prompt with what stands beside it.

    A passage stands before its question; so does what is called context, where the question brings options (``first``).
    """
    content, system = cell(row, columns, field), text_cell(row, columns, "system", name)
    if isinstance(content, list | tuple):
        asked = [{k: v for k, v in turn.items() if k not in MARKS} for turn in read_turns(content, name)]
    else:
        asked = [{"role": "user", "content": text_cell(row, columns, field, name)}]
    context = text_cell(row, columns, "context", name).strip()
    first = (first or folded(columns.get("context", "")) == "passage") and folded(columns[field]) != "instruction"
    if context and first and len(asked) == 1:
        if context not in asked[0]["content"]:
            asked[0]["content"] = f"{context}\n{asked[0]['content']}"
    else:
        add_context(row, columns, asked, name, field)
    messages = with_system(system, [*read_history(cell(row, columns, "history"), name), *asked], name)
    roles = " ".join(message["role"] for message in messages)
    if not roles.endswith("user"):
        raise UserError(
            f"the last message of {name} is not the user's",
            value=roles or "no messages",
            rule="a prompt ends where the model answers",
            fix="cut the conversation after a user's message; put what was answered into a column `answer`",
        )
    if not re.fullmatch("s?(u(at+)*a)*u", role_letters(messages)):
        raise UserError(
            f"the messages of {name} are in no order that a conversation has",
            value=roles,
            rule="an optional system turn, then user and assistant in turn, the user last",
            fix="join the turns of one speaker",
        )
    return tuple(messages)


def content_id(text: str, answer: str | int = "", options: Sequence[str] = (), messages: Sequence[Message] = ()) -> str:
    """Return "sha1:" and 12 hex digits of what a prompt holds: the same wherever the row stands."""
    more = [answer, list(options), [dict(m) for m in messages]]
    content = json.dumps([text, *more], sort_keys=True) if any(more) or answer == 0 else text
    return "sha1:" + hashlib.sha1(content.encode(), usedforsecurity=False).hexdigest()[:12]


def _check(prompts: tuple[Prompt, ...], where: str) -> None:
    for name in ("text", "group"):
        empty = [prompt.id for prompt in prompts if not getattr(prompt, name).strip()]
        refuse(
            empty,
            f"{where}: {len(empty)} prompts have an empty {name}",
            rule="every evaluation prompt has a text, and a group where the file has groups",
            fix="fill the cells or remove the rows",
        )
    refuse_spellings((prompt.group for prompt in prompts), "group", where)
    same_id = repeated((prompt.id, prompt.id) for prompt in prompts)
    refuse(
        [names[0] for names in same_id],
        f"{where}: {len(same_id)} prompt ids are used more than once",
        rule="ids name prompts in every table and must be unique",
        fix="rename or remove the repeats",
    )
    # What makes a prompt another one: its conversation, its answer and its options.
    said = ([[normalise(text) for text in _whole(prompt)], prompt.answer, prompt.options] for prompt in prompts)
    same_text = repeated((json.dumps(parts), prompt.id) for parts, prompt in zip(said, prompts, strict=True))
    refuse(
        [" = ".join(names) for names in same_text],
        f"{where}: {len(same_text)} prompt texts occur more than once",
        rule="a repeated prompt would count twice (case and spacing are ignored)",
        fix="remove the repeats, or give each another answer",
    )


def _whole(prompt: Prompt) -> list[str]:
    """The text of each message, up to the prompt's own."""
    return [m["content"] for m in prompt.messages] or [prompt.text]
