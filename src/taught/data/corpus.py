"""A corpus: documents of many shards, read one at a time, and sampled while they are read."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from taught.data.examples import ExampleSet, Record, check_examples, refuse_empty
from taught.data.formats import document_columns, read_document
from taught.data.readers import Row
from taught.data.subset import Sample, Spread, Strata, stratum_of
from taught.data.tables import Source, open_source
from taught.errors import UserError


@dataclass(frozen=True)
class Corpus:
    """Documents of a source: every iteration reads them anew, one batch of rows in memory.

    Attributes
    ----------
    columns : field -> the column it is read from
    """

    source: Source
    columns: Mapping[str, str]

    def __iter__(self) -> Iterator[Record]:
        return (record for _, record in self.rows())

    def rows(self) -> Iterator[tuple[Row, Record]]:
        """Each row as it stands in its file, with its document.

        Raises
        ------
        UserError
            A cell that should be a text is none; the document is named.
        """
        for number, row in enumerate(self.source, 1):
            yield row, read_document(row, self.columns, number)


def open_corpus(source: str | Path | Iterable[Mapping[str, Any]], columns: Mapping[str, str] | None = None) -> Corpus:
    """Find the documents of a source, and which column is what; texts are not held.

    Parameters
    ----------
    source : a file, a folder of shards, a pattern such as ``corpus/*.parquet``, ``"hf:owner/name:split"``, or anything
        that yields mappings, as for :func:`taught.data.tables.open_source`
    columns : field -> column name, as for :func:`taught.load_examples`

    Raises
    ------
    UserError
        There are no rows or no text; shards disagree in their columns.
    """
    found = open_source(source)
    if not found.columns:
        raise UserError("no examples in the data", value=found.name, fix="give at least one row")
    return Corpus(found, document_columns(found.columns, columns, found.name))


def sample_documents(corpus: Corpus, spread: Spread) -> ExampleSet:
    """Read every document and keep some, spread over strata.

    The source is read twice: once to count the strata, once for the texts. Which documents are kept depends on their
    ids and on what the strata hold, and not on the order of shards. Memory: the documents that are kept, and about 40
    bytes for each that is read.

    Raises
    ------
    UserError
        As :func:`open_corpus`; documents without text, ids that stand twice, a column of ``spread.by`` that is not
        there, a source that changes while it is read.
    """
    source = corpus.source
    if spread.limit is None:
        kept = tuple(corpus)
        check_examples(kept, source.name)
        return ExampleSet(kept, corpus.columns, source.sha256, source.path)
    by = spread.columns(corpus.columns)
    if unknown := [name for name in by if name not in source.columns]:
        what, rule = "the examples have no such column", f"their columns are {', '.join(source.columns)}"
        raise UserError(what, value=", ".join(unknown), rule=rule, fix="correct examples.spread")
    strata: Strata[tuple[str, ...]] = Strata(spread.even, spread.seed)
    empty, read = [], 0
    for row, record in corpus.rows():
        if not record.response.strip():
            empty.append(record.id)
        strata.note(record.id, stratum_of(row.get(name) for name in by))
        read += 1
    refuse_empty(empty, "text", source.name)
    if twice := strata.repeated():
        # Hashes of other ids may meet: then this is no error.
        check_examples([record for n, record in enumerate(corpus) if n in twice], source.name)
    if spread.limit >= read:
        return sample_documents(corpus, Spread())
    chosen, counts = strata.take(corpus, spread.limit, lambda record: record.id)
    return ExampleSet(chosen, corpus.columns, source.sha256, source.path, Sample(spread, by, counts))
