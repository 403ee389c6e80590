"""One self-contained HTML page for a run: no network, works without JavaScript, opens from disk.

Text from data reaches the page in two ways only: escaped (markupsafe), or as JSON in a data block that the script puts
in place with ``textContent``. Script and style are allowed by their hash, nothing else.
"""

from __future__ import annotations

import base64
import hashlib
import json
import math
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape

from taught.report import blocks as b
from taught.report import charts
from taught.report.blocks import Block, Cell, Column, Line, Table, plain, value_of
from taught.report.charts import Scale, scaled
from taught.report.detail import page_data
from taught.report.examples import shown
from taught.report.sections import blocks_of, in_report
from taught.report.sections.verdict import head_facts
from taught.report.tables import Tables
from taught.report.text import number, signed, tens
from taught.stats.intervals import Interval

HERE = Path(__file__).parent
FOREST = (6.0, 234.0)
WORDS = {"badge": ("span", "badge warn"), "soft": ("span", "soft"), "code": ("code", ""), "file": ("a", "")}
TONES = {"found": "", "none": "no effect", "caution": "caution"}
STRIP_KEY = (
    ": training on the token raises the target. ",
    ": it lowers it. The darker, the larger the share; shares of a strip add up to its total, in the same unit. "
    "Point at a token for its share.",
)


def render(tables: Tables) -> str:
    """Return the page of a run."""
    environment = Environment(
        loader=FileSystemLoader(HERE), autoescape=True, undefined=StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    script, style = ((HERE / name).read_text(encoding="utf-8") for name in ("script.js", "style.css"))
    digests = (base64.b64encode(hashlib.sha256(body.encode()).digest()).decode() for body in (script, style))
    own = "script-src 'sha256-{}'; style-src 'sha256-{}'".format(*digests)
    page = _Page({row["example_id"]: i for i, row in enumerate(shown(tables))})
    return environment.get_template("page.html.j2").render(
        name=tables.name,
        facts=page.block(b.Facts(head_facts(tables))),
        sections=[(section, page.blocks(blocks_of(section, tables))) for section in in_report(tables)],
        script=Markup(script),
        style=Markup(style),
        csp=f"default-src 'none'; {own}; base-uri 'none'; form-action 'none'",
        data=Markup(embed(page_data(tables))),
    )


def embed(record: object) -> str:
    """Return JSON that cannot end its script element: no ``<``, ``>``, ``&`` or line separator."""
    raw = json.dumps(_finite(record), ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    for char in "<>&\u2028\u2029":
        raw = raw.replace(char, f"\\u{ord(char):04x}")
    return raw


def tag(name: str, /, *children: object, cls: str = "", **attributes: object) -> Markup:
    """An element; children and attributes are escaped unless they are markup, None attributes left out."""
    given = ({"class": cls} if cls else {}) | {key.rstrip("_").replace("_", "-"): v for key, v in attributes.items()}
    written = "".join(f' {key}="{escape(value)}"' for key, value in given.items() if value is not None)
    return Markup(f"<{name}{written}>{''.join(map(escape, children))}</{name}>")


class _Page:
    """Renders blocks; knows the place of each example in the data block."""

    def __init__(self, places: Mapping[str, int]) -> None:
        self.places = places

    def blocks(self, blocks: Iterable[Block]) -> Markup:
        return Markup("\n").join(self.block(block) for block in blocks)

    def block(self, block: Block) -> Markup:
        """The method with the name of the block's class."""
        made: Markup = getattr(self, type(block).__name__.lower())(block)
        return made

    def inline(self, cell: Cell) -> Markup:
        """A cell as it stands in running text."""
        if isinstance(cell, Line):
            between = Markup("<br>") if cell.between == "\n" else cell.between
            return escape(between).join(self.inline(part) for part in cell.parts)
        if isinstance(cell, b.Example):
            return tag("span", cell.id, cls="example id", title=cell.id, data_example=self.places.get(cell.id))
        if isinstance(cell, b.Feature):
            link = tag("a", cell.id, cls="id", href=f"#feature-{cell.id}")
            return link + " " + tag("span", tag("bdi", cell.label), cls="soft") if cell.label else link
        if isinstance(cell, b.Mark):
            return charts.legend_mark(cell.kind)
        if isinstance(cell, b.Word):
            name, cls = WORDS[cell.style]
            text = tag("bdi", cell.text) if cell.style == "soft" else cell.text
            return tag(name, text, cls=cls, href=cell.text if cell.style == "file" else None)
        return escape(plain(cell))

    def text(self, it: b.Text) -> Markup:
        cls = {"text": "lede", "note": "note", "title": ""}[it.role]
        return tag("h3" if it.role == "title" else "p", self.inline(it.text), cls=cls)

    def items(self, it: b.Items) -> Markup:
        cls = "warnings" if it.warning else "reading"
        return tag("ul", *(tag("li", tag("bdi", self.inline(item))) for item in it.items), cls=cls)

    def pre(self, it: b.Pre) -> Markup:
        title = tag("h4", it.title) if it.title else Markup("")
        return title + tag("pre", tag("code", it.text), cls="command")

    def verdict(self, it: b.Verdict) -> Markup:
        rows = []
        for s in it.sentences:
            topic = tag("dt", s.topic, tag("span", TONES[s.tone], cls="tone"))
            rows.append(tag("div", topic, tag("dd", tag("bdi", s.text)), cls=f"tone-{s.tone}"))
        return tag("dl", *rows, cls="verdict")

    def facts(self, it: b.Facts) -> Markup:
        cls = {"line": "facts small", "list": "settings wide", "equations": "equations"}[it.style]
        eq = "eq" if it.style == "equations" else ""
        rows = (tag("div", tag("dt", name), tag("dd", self.inline(value), cls=eq)) for name, value in it.pairs)
        return tag("dl", *rows, cls=cls)

    # Tables

    def table(self, it: Table) -> Markup:
        columns = [(i, c) for i, c in enumerate(it.columns) if c.only != "terminal"]
        parts = [_Drawn(c, [row[i] for row in it.rows]) for i, c in columns]
        head = [self._head(c, drawn, it.sortable) for (_, c), drawn in zip(columns, parts, strict=True)]
        body = []
        for place, row in enumerate(it.rows):
            cells = [
                self._cell(c, drawn, row[i], head=it.tall and n == 0)
                for n, ((i, c), drawn) in enumerate(zip(columns, parts, strict=True))
            ]
            index = place if it.filters is not None else None
            body.append(tag("tr", *cells, cls="flag" if place in it.flagged else "", data_index=index))
        body = body or [tag("tr", tag("td", it.empty or "Nothing.", cls="soft", colspan=len(columns)))]
        name = plain(it.caption) or "Table"
        table = tag(
            "table",
            tag("caption", tag("bdi", self.inline(it.caption))) if it.caption else "",
            tag("thead", tag("tr", *head)),
            tag("tbody", Markup("\n").join(body)),
            cls=("sortable" if it.sortable else "plain") + " fold" * bool(it.fold) + " pin" * it.tall,
            data_fold=it.fold or None,
            id="example-table" if it.filters is not None else None,
        )
        box = _scrolling(table, name, cls="scroll" + " tall" * it.tall)
        return self._filters(it.filters, len(it.rows)) + box if it.filters is not None else box

    def _head(self, column: Column, drawn: _Drawn, sortable: bool) -> Markup:
        unit = tag("small", tens(column.power)) if column.power else ""
        sort = ("text" if column.kind == "text" else "number") if sortable else None
        cls = "num" if column.right else ""
        cells = tag("th", column.title, unit, cls=cls, scope="col", data_sort=sort)
        if drawn.scale is not None:
            axis = charts.forest_axis(drawn.scale)
            cells += tag("th", axis, cls="plot", scope="col", aria_label=f"Interval plot, {column.title}")
        if column.bar:
            cells += tag("th", cls="barcell", scope="col", aria_label=f"Bar of {column.title}")
        return cells

    def _cell(self, column: Column, drawn: _Drawn, value: Cell, head: bool = False) -> Markup:
        """One cell, and beside it its plot or bar where the column has one."""
        number_of = None if column.kind == "text" else value_of(value)
        inside = self.inline(value) if isinstance(value, b.Inline) else column.shown(value)
        inside = tag("bdi", inside) if isinstance(value, str) else inside
        words = plain(value)  # short ones stay on one line
        width = "nowrap" if len(words) <= 24 else "reason" if len(words) > 60 else "label"
        cls = "num" if column.right else "ids" if column.kind == "id" else width
        name = "th" if head else "td"
        cell = tag(name, inside, cls=cls, data_v=number_of, scope="row" if head else None)
        if drawn.scale is not None:
            known = isinstance(value, Interval)
            plot = charts.forest_row(scaled(value, 10.0**-column.power), drawn.scale) if known else ""
            cell += tag("td", plot, cls="plot")
        if column.bar:
            cell += tag("td", charts.bar(number_of or 0.0, drawn.largest), cls="barcell")
        return cell

    def _filters(self, fields: Mapping[str, Sequence[str]], n: int) -> Markup:
        box = Markup('<input type="search" name="q" placeholder="id, text, category" autocomplete="off">')
        search = tag("label", "Search ", box)
        chosen = []
        for name, values in fields.items():
            if values:
                options = (tag("option", "all", value=""), *(tag("option", value) for value in values))
                chosen.append(tag("label", f"{name.capitalize()} ", tag("select", *options, name=name)))
        if "unintended" in fields:
            box = Markup('<input type="checkbox" name="unintended"> unintended only')
            chosen.append(tag("label", box, cls="check"))
        count = tag("output", f"{n} of {n}", name="count", aria_live="polite")
        return tag("form", search, *chosen, count, cls="filters js-only", id="filters")

    # Charts

    def scatter(self, it: b.Scatter) -> Markup:
        chart = charts.scatter(it.points, it.axes, it.title, it.sums)
        one = it.sums and charts.one_scale(it.points)
        scales = "Both axes have one scale." if one else "The axes have different scales."
        marks = [Markup(" ").join((charts.legend_mark(k), escape(name))) + " " for k, name in enumerate(it.kinds)]
        return tag("figure", chart, tag("figcaption", *marks, self.inline(it.caption), " ", scales))

    def heatmap(self, it: b.Heatmap) -> Markup:
        box = _scrolling(charts.heatmap(it.values, it.ids, it.title), it.title)
        key = (tag("span", cls="swatch pos"), " move together ", tag("span", cls="swatch neg"), " move apart. ")
        out = tag("output", "Point at a cell to read it.", id="heat-out", cls="js-only", aria_live="off")
        return tag("figure", box, tag("figcaption", *key, self.inline(it.caption), " ", out), cls="wide")

    def grid(self, it: b.Grid) -> Markup:
        chart = charts.grid(it.values, it.rows, it.columns, it.marked, it.faint, it.about, it.title)
        box = _scrolling(chart, it.title)
        key = (tag("span", cls="swatch pos"), " above, ", tag("span", cls="swatch neg"), " below. ", it.key, " ")
        return tag("figure", box, tag("figcaption", *key), cls="wide")

    def strips(self, it: b.Strips) -> Markup:
        made = []
        for name, strip in it.rows:
            tokens = (tag("span", t.text, cls=t.shade, title=t.number) for t in strip.tokens)
            said = tag("p", tag("b", self.inline(name)), f" {strip.total}, most by {strip.largest}", cls="note")
            made.append(tag("div", said, tag("p", *tokens, cls="strip", dir="auto"), cls="carried"))
        if it.key:
            lines = (("up", "Solid line"), ("down", "Dotted line"))
            up, down = (tag("span", tag("span", text, cls=f"{side} s8"), cls="strip") for side, text in lines)
            made.append(tag("p", up, STRIP_KEY[0], down, STRIP_KEY[1], cls="note"))
        return Markup("\n").join(made)

    # Text

    def excerpts(self, it: b.Excerpts) -> Markup:
        if not it.rows:
            return Markup("")
        title = tag("h4", it.title + tens(it.power))
        rows = []
        for row in it.rows:
            marked = tag("mark", row.marked) if row.marked else ""
            about = tag("span", row.about, cls="soft") if row.about else ""
            words = tag("span", tag("bdi", row.before, marked, row.after), " ", about, cls="words")
            value = (signed if row.change else number)(row.value, power=it.power)
            rows.append(tag("li", tag("span", value, cls="num"), " ", words))
        return title + tag("ol", *rows, cls="examples")

    def details(self, it: b.Details) -> Markup:
        title = tag("summary", self.inline(it.title))
        return tag("details", title, self.blocks(it.blocks), cls="more", open="" if it.open else None)

    def cards(self, it: b.Cards) -> Markup:
        box = Markup('<input type="search" id="feature-search" placeholder="id or label" autocomplete="off">')
        cards = []
        for card in it.cards:
            name, value = tag("span", card.feature, cls="id"), tag("span", signed(card.value), cls="num")
            label = tag("span", tag("bdi", card.label or "unlabelled"), cls="label")
            title = tag("summary", name, value, charts.bar(card.value, card.largest), label)
            body = tag("div", self.blocks(card.blocks), cls="card")
            cards.append(tag("details", title, body, cls="feature", id=f"feature-{card.feature}"))
        return tag("label", "Search ", box, cls="filters js-only") + Markup("\n").join(cards)

    def beside(self, it: b.Beside) -> Markup:
        cls = "columns lean" if it.lean else "columns" if isinstance(it.left[0], b.Scatter) else "columns even"
        return tag("div", tag("div", self.blocks(it.left)), tag("div", self.blocks(it.right)), cls=cls)


class _Drawn:
    """What the drawings of a column have in common: the scale of its plot, the largest of its bars."""

    def __init__(self, column: Column, values: Sequence[Cell]) -> None:
        self.largest = max((abs(v) for v in map(value_of, values) if v is not None), default=1.0)
        self.scale: Scale | None = None
        if column.plot is None:
            return
        known = [scaled(v, 10.0**-column.power) for v in values if isinstance(v, Interval)]
        ends = charts.span(known) if column.plot == "fit" else column.plot
        self.scale = Scale(*ends, *FOREST)


def _scrolling(child: Markup, label: str, cls: str = "scroll") -> Markup:
    return tag("div", child, cls=cls, tabindex=0, role="region", aria_label=label)


def _finite(value: Any) -> Any:
    if isinstance(value, float):
        return float(f"{value:.6g}") if math.isfinite(value) else None
    if isinstance(value, dict):
        return {k: _finite(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(v) for v in value]
    return value
