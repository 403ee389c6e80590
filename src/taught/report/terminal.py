"""Blocks as text for a terminal.

All text from data is put in :class:`rich.text.Text`, which parses no markup, and lost its control
characters when the run was read, so that it can neither style nor steer the terminal.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from dataclasses import replace
from typing import Any

from rich.console import Group, RenderableType
from rich.padding import Padding
from rich.table import Table as Grid
from rich.text import Text as Words

from taught.report import blocks as b
from taught.report.blocks import Block, Cell, Column, Line, Table, columns, plain, value_of
from taught.report.text import clean, count, number, shorten, signed, tens

STYLES = {"found": "", "none": "dim", "caution": "yellow"}
WORDS = {"badge": "bold yellow", "soft": "dim", "code": "bold", "file": ""}
MAX_CELL = 400
MAX_COLUMNS = 8  # of a grid


def render(blocks: Iterable[Block]) -> RenderableType:
    """Blocks under each other, ready for a rich console."""
    return Group(*(Padding(part, (0, 0, 1, 0)) for part in _parts(blocks)))


def _parts(blocks: Iterable[Block]) -> Iterable[RenderableType]:
    for block in blocks:
        if isinstance(block, b.Beside):
            yield from _parts((*block.left, *block.right))
        elif isinstance(block, b.Details):
            if block.open:
                yield Words(clean(plain(block.title)), "bold")
                yield from _parts(block.blocks)
        elif isinstance(block, Table) and not block.head:
            continue
        elif type(block) in _RENDER:
            yield _RENDER[type(block)](block)


def words(cell: Cell, style: str = "") -> Words:
    """A cell as it stands in running text."""
    if isinstance(cell, Line):
        return Words(cell.between).join([words(part, style) for part in cell.parts])
    own = WORDS[cell.style] if isinstance(cell, b.Word) else style
    return Words(clean(plain(cell)), own)


def _lines(lines: Iterable[Words]) -> Words:
    return Words("\n").join(list(lines))


def _verdict(it: b.Verdict) -> Grid:
    grid = Grid.grid(padding=(0, 2))
    grid.add_column(no_wrap=True)
    grid.add_column()
    for s in it.sentences:
        grid.add_row(Words(s.topic, "bold"), Words(clean(s.text), STYLES[s.tone]))
    return grid


def _table(it: Table) -> RenderableType:
    there = [(i, column) for i, column in enumerate(it.columns) if column.only != "page"]
    grid = Grid(box=None, pad_edge=False, padding=(0, 2, 0, 0))
    for _, column in there:
        title = Words(clean(column.title) + tens(column.power), "dim")
        grid.add_column(title, justify="right" if column.right else "left", overflow="fold")
    for row in it.rows[: it.head]:
        grid.add_row(*(_cell(column, row[i]) for i, column in there))
    parts: list[RenderableType] = [words(it.caption, "italic")] if it.caption else []
    parts.append(grid if it.rows else Words(it.empty or "Nothing.", "dim"))
    if len(it.rows) > it.head:
        parts.append(Words(f"{count(len(it.rows) - it.head, 'more row')} on the page", "dim"))
    return Group(*parts)


def _cell(column: Column, value: Cell) -> Words:
    if isinstance(value, Line):
        return Words(value.between).join([_cell(column, part) for part in value.parts])
    if isinstance(value, b.Inline):
        return words(value)
    text = shorten(clean(column.shown(value)), MAX_CELL)
    at = value_of(value) if column.kind == "signed" else None
    return Words(text, "" if not at else "blue" if at > 0 else "yellow")


def _grid(it: b.Grid) -> RenderableType:
    """Its numbers, where they are not too many for a line: marked ones with a star, faint ones in brackets."""
    if len(it.columns) > MAX_COLUMNS:
        return Words(f"{it.title}: {len(it.rows)} x {len(it.columns)}, on the page", "dim")
    form = replace(it.column, title="", plot=None)

    def cell(i: int, j: int) -> str:
        if not math.isfinite(it.values[i][j]):
            return ""
        text = form.shown(float(it.values[i][j]))
        return f"({text})" if it.faint[i][j] else f"{text}*" if it.marked[i][j] else text

    rows = [(name, *(cell(i, j) for j in range(len(it.columns)))) for i, name in enumerate(it.rows)]
    heads = [Column(tens(it.column.power).strip()), *(Column(name, "number") for name in it.columns)]
    return Group(_table(Table(heads, rows, it.title, head=len(rows))), Words(clean(it.key), "dim"))


def _strips(it: b.Strips) -> Words:
    """What carries most, and the tokens: blue and underlined raises, yellow in reverse lowers, small ones are plain."""
    lines = []
    for name, strip in it.rows:
        line = words(name, "bold") + Words(f" {strip.total}, most by {clean(strip.largest)}\n  ")
        for token in strip.tokens:
            side, _, level = token.shade.partition(" s")
            style = "blue underline" if side == "up" else "yellow reverse"
            style += " bold" if int(level or 0) > 5 else ""
            line += Words(clean(token.text), style if int(level or 0) >= 3 else "")
        lines.append(line)
    return _lines(lines)


def _excerpts(it: b.Excerpts) -> RenderableType:
    if not it.rows:
        return Words()
    grid = Grid(title=Words(it.title + tens(it.power)), title_justify="left", box=None, padding=(0, 2, 0, 0))
    grid.add_column(justify="right")
    grid.add_column()
    for row in it.rows:
        value = (signed if row.change else number)(row.value, power=it.power)
        text = Words(clean(shorten(row.before, 120))) + Words(clean(row.marked), "bold") + Words(clean(row.after))
        grid.add_row(Words(value), text + Words(f"  {clean(row.about)}", "dim"))
    return grid


_CARDS = columns(("feature", "id"), ("coefficient", "signed"), "label")
# Drawings are for the page only; of cards ``taught show RUN ID`` shows one whole.
_RENDER: dict[type, Callable[[Any], RenderableType]] = {
    b.Text: lambda it: words(it.text, {"text": "", "note": "dim", "title": "bold"}[it.role]),
    b.Items: lambda it: _lines(Words("- ") + words(item, "yellow" if it.warning else "") for item in it.items),
    b.Facts: lambda it: _lines(Words(f"{clean(name)}  ", "dim") + words(value) for name, value in it.pairs),
    b.Pre: lambda it: Words(f"{it.title}\n" if it.title else "", "dim") + Words(clean(it.text)),
    b.Verdict: _verdict,
    Table: _table,
    b.Strips: _strips,
    b.Grid: _grid,
    b.Cards: lambda it: _table(
        Table(_CARDS, [(card.feature, card.value, card.label) for card in it.cards], head=len(it.cards))
    ),
    b.Excerpts: _excerpts,
}
