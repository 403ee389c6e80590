"""An Arrow table for people (a rich table in the terminal) and for programs (CSV)."""

from __future__ import annotations

import csv
import json
from collections.abc import Callable, Iterator
from typing import IO

import pyarrow as pa
from rich.console import RenderableType

from taught.report.blocks import Block, Column, Table, Text
from taught.report.terminal import render
from taught.report.text import clean, count, shorten

ROWS = 200
WIDTH = 400


def rich_table(table: pa.Table) -> RenderableType:
    """The first rows, numbers to the right; says how many there are beyond them."""

    def shown(cell: object) -> str:
        if cell is None:
            return ""
        return shorten(clean(f"{cell:.6g}" if isinstance(cell, float) else str(_plain(cell))), WIDTH)

    is_number = {f.name: pa.types.is_integer(f.type) or pa.types.is_floating(f.type) for f in table.schema}
    columns = [Column(field.name, "number" if is_number[field.name] else "text") for field in table.schema]
    rows = [[shown(cell) for cell in row] for row in _rows(table.slice(0, ROWS))]
    blocks: list[Block] = [Table(columns, rows, head=ROWS)]
    if table.num_rows > ROWS:
        blocks.append(Text(f"{count(table.num_rows - ROWS, 'more row')}; --csv has all", "note"))
    return render(blocks)


def write_csv(table: pa.Table, out: IO[str], text: Callable[[str], str] = str) -> None:
    """All rows; nothing for a missing value, JSON for lists and records.

    Parameters
    ----------
    text : what is done with text, such as :func:`taught.errors.printable` where a terminal reads it
    """
    writer = csv.writer(out, lineterminator="\n")
    writer.writerow(map(text, table.column_names))
    for batch in table.to_batches(max_chunksize=10_000):
        for row in _rows(batch):
            plain = ("" if cell is None else _plain(cell) for cell in row)
            writer.writerow(text(cell) if isinstance(cell, str) else cell for cell in plain)


def _rows(table: pa.Table | pa.RecordBatch) -> Iterator[tuple[object, ...]]:
    return zip(*(column.to_pylist() for column in table.columns), strict=True)


def _plain(cell: object) -> object:
    return json.dumps(cell, ensure_ascii=False) if isinstance(cell, list | dict) else cell
