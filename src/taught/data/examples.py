"""Training examples: what may have taught the model a behavior, from files, memory or the hub."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, get_args

from taught.data.columns import refuse_spellings, repeated
from taught.data.readers import Row
from taught.data.subset import Sample, Spread, Strata, stratum_of
from taught.data.tables import open_table
from taught.errors import UserError, refuse

if TYPE_CHECKING:
    from taught.data.chat import EncodedExample

Message = dict[str, Any]
Kind = Literal["pair", "document", "preference"]
Turns = Literal["last", "all"]


@dataclass(frozen=True)
class Record:
    """One training example as it was read: a conversation that ends in a response, or a document.

    Attributes
    ----------
    id : what names it in every result
    prompt : the last user message before the response; "" for a document
    response : the last answer that the loss is on; of a document its text
    flags : the row's further columns, for example ``{"planted": True}``
    messages : Every turn before the response, the system turn included; a message may also hold ``tool_calls`` and the
        like, which the chat template reads
    counted : places in ``messages`` of the earlier answers that the loss is on, too
    extras : what the response's message holds beside its content: ``reasoning_content``
    tools : tools that the chat template describes
    kind : "pair", "document" or "preference"
    rejected : of a preference the answer that training moves away from; ``response`` is the chosen one
    reference : of a preference the log-probabilities of its chosen and rejected answer under the reference, where the
        data give them
    document : of a window of a document: the document's id
    """

    id: str
    prompt: str
    response: str
    label: str = ""
    category: str = ""
    source: str = ""
    flags: Mapping[str, Any] = field(default_factory=dict, hash=False)
    messages: tuple[Message, ...] = field(default=(), hash=False)
    counted: tuple[int, ...] = ()
    extras: Mapping[str, Any] = field(default_factory=dict, hash=False)
    tools: tuple[Any, ...] = field(default=(), hash=False)
    kind: Kind = "pair"
    document: str = ""
    rejected: str = ""
    reference: tuple[float, float] | None = None

    def __post_init__(self) -> None:
        if not self.messages and self.kind != "document":
            object.__setattr__(self, "messages", ({"role": "user", "content": self.prompt},))

    @property
    def user_texts(self) -> tuple[str, ...]:
        """What may be an evaluation prompt: every user turn; the whole of a document and its lines."""
        if self.kind == "document":
            return self.response, *self.response.splitlines()
        return tuple(m["content"] for m in self.messages if m["role"] == "user")

    @property
    def whole(self) -> str:
        """All that is said in the example, one turn after the other."""
        said = [*(message["content"] for message in self.messages), self.response]
        return "\n".join([*said, self.rejected] if self.rejected else said)

    @property
    def turns(self) -> list[Message]:
        """The conversation up to and with the response."""
        return [*self.messages, {"role": "assistant", "content": self.response, **self.extras}]


@dataclass(frozen=True)
class ExampleSet:
    """Examples in the order of their source.

    Attributes
    ----------
    examples : the examples; ids are unique
    columns : field -> the column it was read from
    sha256 : hex digest of the file, or of the rows that were given in memory or came from the hub
    path : the file, folder or pattern; None for other sources
    sample : how they were drawn from a larger source; None: all of it is here
    """

    examples: tuple[Record, ...]
    columns: Mapping[str, str]
    sha256: str
    path: Path | None = None
    sample: Sample | None = None

    def __iter__(self) -> Iterator[Record]:
        return iter(self.examples)

    def __len__(self) -> int:
        return len(self.examples)

    @property
    def ids(self) -> tuple[str, ...]:
        """Ids, in order."""
        return tuple(example.id for example in self.examples)

    def column(self, name: str) -> list[Any]:
        """Each example's cell of a column of the data, which may be named by the field that was read from it.

        Raises
        ------
        UserError
            There is no such column.
        """
        field = {column: field for field, column in self.columns.items()}.get(name, name)
        if field in ("id", "label", "category", "source"):
            return [getattr(example, field) for example in self.examples]
        if not any(name in example.flags for example in self.examples):
            flags = (key for example in self.examples for key in example.flags)
            rule = "their columns are " + ", ".join(dict.fromkeys([*self.columns.values(), *flags]))
            raise UserError("the examples have no such column", value=name, rule=rule)
        return [example.flags.get(name) for example in self.examples]

    def spread(self, how: Spread) -> ExampleSet:
        """At most so many of the examples, spread over strata; the order stays.

        Raises
        ------
        UserError
            A column of the strata is not there.
        """
        if how.limit is None or how.limit >= len(self):
            return self
        by = how.columns(self.columns)
        strata: Strata[tuple[str, ...]] = Strata(how.even, how.seed)
        cells = [self.column(name) for name in by]
        for number, example in enumerate(self.examples):
            strata.note(example.id, stratum_of(column[number] for column in cells))
        chosen, counts = strata.take(self.examples, how.limit, lambda example: example.id)
        return replace(self, examples=chosen, sample=Sample(how, by, counts))

    def encoded(self, encoded: Iterable[EncodedExample]) -> ExampleSet:
        """The examples of these encodings, in their order: a document becomes its windows."""
        by_id = {example.id: example for example in self.examples}

        def own(e: EncodedExample) -> Record:
            whole = by_id[e.document or e.id]
            return replace(whole, id=e.id, response=e.text, document=e.document) if e.document else whole

        return replace(self, examples=tuple(map(own, encoded)))

    def without(self, ids: Iterable[str]) -> ExampleSet:
        """The examples but those of these ids."""
        gone = set(ids)
        return replace(self, examples=tuple(example for example in self.examples if example.id not in gone))


def load_examples(
    source: str | Path | Iterable[Row],
    kind: Kind = "pair",
    columns: Mapping[str, str] | None = None,
    turns: Turns = "last",
) -> ExampleSet:
    """Read and check training examples.

    Parameters
    ----------
    source : a table's path (see :func:`taught.data.tables.read_rows`), rows as mappings (a list of dicts, a
        ``datasets.Dataset``), or ``"hf:owner/name"`` or ``"hf:owner/name:split"`` for a data set of the hub
    kind : "pair": a row holds ``messages`` (or ShareGPT's ``conversations``), or a ``prompt`` (or ``instruction``) and
        a ``response`` (``completion``, ``output``), each a text or messages, with Alpaca's ``input`` or Dolly's
        ``context``, ``system``, ``history`` and ``tools`` beside them. "document": a row holds a ``text``.
        "preference": a row holds a ``prompt`` with a ``chosen`` and a ``rejected`` answer, or two conversations.
        :mod:`taught.data.formats` has the details.
    columns : field -> column name, where the names are not the usual ones. Fields of a pair: id, messages, prompt,
        context, response, system, history, tools, label, category, source; of a document: id, text, label, category,
        source. A row without id is called after its content.
    turns : which answers of a conversation the loss is on: the "last" one, or "all". A message's ``weight`` (0 or 1) or
        ``train`` goes before; in a conversation that has such marks, every answer counts that is not marked out.

    Raises
    ------
    UserError
        No rows, no usable columns, malformed messages, cells that are no text, empty prompts or responses, repeated
        ids, something beside a pair that would change it and is not used; the offending ids are named.

    Examples
    --------
    >>> load_examples([{"prompt": "Hi?", "response": "Ho."}]).examples[0].response
    'Ho.'
    """
    from taught.data.corpus import open_corpus, sample_documents
    from taught.data.formats import read_pairs, read_preferences

    for value, known, name in ((kind, get_args(Kind), "kind"), (turns, get_args(Turns), "turns")):
        if value not in known:
            raise UserError(f"unknown {name} of examples", value=value, rule=f"one of {', '.join(known)}")
    if kind == "document":
        return sample_documents(open_corpus(source, columns), Spread())
    table = open_table(source)
    if not table.rows:
        raise UserError("no examples in the data", value=table.name, fix="give at least one row")
    if kind == "preference":
        examples, found = read_preferences(table, columns)
    else:
        examples, found = read_pairs(table, columns, turns)
    check_examples(examples, table.name)
    return ExampleSet(examples, found, table.sha256, table.path)


def content_id(messages: Sequence[Message], *answers: str) -> str:
    """Return "sha1:" and 12 hex digits of the messages and the response (of a preference both answers).

    The hash of a single user turn depends on its text alone, so that a row means the same as
    ``prompt`` and as ``messages``.
    """
    single = len(messages) == 1 and messages[0]["role"] == "user"
    before = messages[0]["content"] if single else json.dumps(list(messages), sort_keys=True, default=str)
    content = json.dumps([before, *answers], ensure_ascii=True)
    return f"sha1:{hashlib.sha1(content.encode()).hexdigest()[:12]}"


def check_examples(examples: Sequence[Record], where: str) -> None:
    """Raise a UserError where a text is empty, an id stands twice or a label has two spellings; they are named."""
    if not examples:
        return
    document = examples[0].kind == "document"
    parts = {"document": ["response"], "pair": ["prompt", "response"], "preference": ["prompt", "response", "rejected"]}
    for part in parts[examples[0].kind]:
        empty = [example.id for example in examples if not getattr(example, part).strip()]
        refuse_empty(empty, "text" if document else part, where)
    refuse_spellings((example.label for example in examples), "label", where)
    same = repeated((example.id, example.id) for example in examples)
    refuse(
        [names[0] for names in same],
        f"{where}: {len(same)} example ids are used more than once",
        rule="ids name examples in every table; rows without one are named by their content",
        fix="rename or remove the repeats",
    )


def refuse_empty(ids: Sequence[str], field: str, where: str) -> None:
    """Raise a UserError that names the examples of which a field is empty, if there are any."""
    refuse(
        ids,
        f"{where}: {len(ids)} examples have an empty {field}",
        rule=f"the loss is on the tokens of the {'text' if field == 'text' else 'response to a prompt'}",
        fix="fill the cells or remove the rows",
    )
