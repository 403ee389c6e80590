"""What a section says: a list of blocks of plain values.

One renderer makes HTML of them (``html.py``), one writes them to the terminal (``terminal.py``). A block says what is
there and what stands out, never how it looks. Text may come from data: renderers escape all of it.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

from taught.report.charts import Point
from taught.report.strips import Strip
from taught.report.text import interval_text, number, percent, signed
from taught.stats.intervals import Interval

Cell = Any  # text, a number, an Interval, None, or something Inline
Kind = Literal["text", "id", "number", "signed", "percent", "p", "interval"]
Tone = Literal["found", "none", "caution"]


class Inline:
    """What stands in a cell or in running text and is more than text or a number."""


@dataclass(frozen=True)
class Example(Inline):
    """The id of a training example; on the page it opens the example."""

    id: str


@dataclass(frozen=True)
class Feature(Inline):
    """The id of a feature, with its label where there is room; on the page it leads to its card."""

    id: int
    label: str = ""


@dataclass(frozen=True)
class Mark(Inline):
    """The mark of a label in a scatter, by the label's place."""

    kind: int


@dataclass(frozen=True)
class Word(Inline):
    """Words that stand out (badge) or back (soft), are typed (code), or name a file of the run folder."""

    text: str
    style: Literal["badge", "soft", "code", "file"]


@dataclass(frozen=True)
class Line(Inline):
    """Several cells as one; ``between`` may be a line feed."""

    parts: Sequence[Cell]
    between: str = ""


class Block:
    """What a section is made of."""


@dataclass(frozen=True)
class Text(Block):
    """A paragraph, a note for who wants to know more, or the title of what follows."""

    text: Cell
    role: Literal["text", "note", "title"] = "text"


@dataclass(frozen=True)
class Items(Block):
    """A list of sentences; ``warning``: of what to look out for."""

    items: Sequence[Cell]
    warning: bool = False


@dataclass(frozen=True)
class Pre(Block):
    """Lines as they are: a command, a file, a prompt."""

    text: str
    title: str = ""


@dataclass(frozen=True)
class Sentence:
    """One statement of the verdict: what about, how sure, in words."""

    topic: str
    tone: Tone
    text: str


@dataclass(frozen=True)
class Verdict(Block):
    """The result in sentences."""

    sentences: Sequence[Sentence]


@dataclass(frozen=True)
class Facts(Block):
    """Names with values; ``style``: side by side, one a line, or equations."""

    pairs: Sequence[tuple[str, Cell]]
    style: Literal["line", "list", "equations"] = "line"


@dataclass(frozen=True)
class Column:
    """A column of a table.

    Attributes
    ----------
    kind : what its cells are, which says how they are written, aligned and sorted
    power : values are shown divided by ten to this power, and the head says so
    plot : ends of an interval plot beside the numbers; "fit": those of its values
    bar : a small bar beside the numbers, in proportion to the largest
    only : "page" or "terminal": left out in the other
    """

    title: str
    kind: Kind = "text"
    digits: int = 2
    power: int = 0
    plot: tuple[float, float] | Literal["fit"] | None = None
    bar: bool = False
    only: Literal["page", "terminal"] | None = None

    @property
    def right(self) -> bool:
        """Whether its cells are aligned to the right."""
        return self.kind not in ("text", "id")

    def shown(self, value: Cell) -> str:
        """A plain value as text."""
        if value is None:
            return "" if self.kind == "text" else "–"
        if isinstance(value, Interval):
            return interval_text(value, self.digits, power=self.power)
        if isinstance(value, str) or self.kind in ("text", "id"):
            return str(value)
        if self.kind == "p":
            return "< 0.001" if value < 0.001 else number(value, 3)
        if self.kind == "percent":
            return percent(value, max(self.digits - 2, 0))
        return (signed if self.kind == "signed" else number)(value, self.digits, power=self.power)


def columns(*given: str | tuple[Any, ...] | Column) -> list[Column]:
    """Columns of text by their titles, others by title, kind and digits, or as they are."""
    return [c if isinstance(c, Column) else Column(c) if isinstance(c, str) else Column(*c) for c in given]


@dataclass(frozen=True)
class Table(Block):
    """Rows of cells under columns.

    Attributes
    ----------
    empty : said where there is no row
    fold : the page shows so many rows at first; 0: all
    head : the terminal shows so many; 0: the table is left out there
    sortable, tall : on the page: by every column; in a box of its own that scrolls
    flagged : places of the rows that stand out
    filters : name of a field of an example -> the values to choose from; the rows are examples
    """

    columns: Sequence[Column]
    rows: Sequence[Sequence[Cell]]
    caption: Cell = ""
    empty: str = ""
    fold: int = 0
    head: int = 10
    sortable: bool = False
    tall: bool = False
    flagged: frozenset[int] = frozenset()
    filters: Mapping[str, Sequence[str]] | None = None


@dataclass(frozen=True)
class Scatter(Block):
    """Points over two axes.

    Attributes
    ----------
    sums : whether the axes are parts of a sum: one scale where that is legible, and the line on which it is zero
    kinds : what the marks are; none: the labels of examples
    """

    points: Sequence[Point]
    axes: tuple[str, str]
    title: str
    caption: Cell = ""
    sums: bool = True
    kinds: Sequence[str] = ()


@dataclass(frozen=True)
class Heatmap(Block):
    """A symmetric matrix in [-1, 1] with the ids of its rows."""

    values: Any
    ids: Sequence[str]
    title: str
    caption: Cell = ""


@dataclass(frozen=True)
class Grid(Block):
    """Values of rows by columns, in colour.

    Attributes
    ----------
    values : [R, C]; nan: there is nothing
    marked : [R, C], which stand out
    faint : [R, C], which are not to be relied on: drawn smaller, and no measure of the colours
    about : [R, C] words on each value
    column : how a value is written
    key : what the marks mean
    """

    values: Any
    rows: Sequence[str]
    columns: Sequence[str]
    marked: Any
    faint: Any
    about: Sequence[Sequence[str]]
    title: str
    column: Column
    key: str = ""


@dataclass(frozen=True)
class Strips(Block):
    """Tokens shaded by their shares, a strip a name."""

    rows: Sequence[tuple[Cell, Strip]]
    key: bool = False


@dataclass(frozen=True)
class Excerpt:
    """Words with a number before and a remark behind; ``marked`` stands out between the other two."""

    value: float | None
    before: str
    marked: str = ""
    after: str = ""
    about: str = ""
    change: bool = False


@dataclass(frozen=True)
class Excerpts(Block):
    """Pieces of text under a title."""

    title: str
    rows: Sequence[Excerpt]
    power: int = 0


@dataclass(frozen=True)
class Details(Block):
    """Blocks behind a title; the terminal shows them only where they are ``open``."""

    title: Cell
    blocks: Sequence[Block]
    open: bool = False


@dataclass(frozen=True)
class Card:
    """What is known of one feature, behind its label; ``value`` in proportion to ``largest``."""

    feature: int
    label: str
    value: float
    largest: float
    blocks: Sequence[Block] = field(default=())


@dataclass(frozen=True)
class Cards(Block):
    """Cards that can be searched."""

    cards: Sequence[Card]


@dataclass(frozen=True)
class Beside(Block):
    """Two lists of blocks side by side where there is room; ``lean``: the left as narrow as it can be."""

    left: Sequence[Block]
    right: Sequence[Block]
    lean: bool = False


def plain(cell: Cell) -> str:
    """The words of a cell."""
    if isinstance(cell, Line):
        return cell.between.join(plain(part) for part in cell.parts)
    if isinstance(cell, Feature):
        return f"{cell.id} {cell.label}".rstrip()
    if isinstance(cell, Example | Word | Interval):
        return cell.id if isinstance(cell, Example) else cell.text if isinstance(cell, Word) else interval_text(cell)
    return "" if cell is None or isinstance(cell, Mark) else str(cell)


def value_of(cell: Cell) -> float | None:
    """The number to sort a cell by, or None."""
    if isinstance(cell, Interval):
        return cell.value
    if isinstance(cell, Feature):
        return cell.id
    if isinstance(cell, Line):
        return value_of(cell.parts[0]) if cell.parts else None
    return cell if isinstance(cell, int | float) and math.isfinite(cell) else None
