"""Charts as SVG text, drawn here so that the page needs no plotting library.

Colours come from the style sheet: ``pos`` (blue) raises, ``neg`` (orange) lowers. Every chart has
its numbers in text beside it, so colour is never the only carrier.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from markupsafe import Markup, escape
from numpy.typing import ArrayLike

from taught.report.text import number
from taught.stats.intervals import Interval

BINS = 8


@dataclass(frozen=True)
class Scale:
    """A linear map of the values ``lo..hi`` to the pixels ``start..end``."""

    lo: float
    hi: float
    start: float
    end: float

    def __call__(self, value: float) -> float:
        """The pixel of a value, held inside the drawing."""
        share = (min(max(value, self.lo), self.hi) - self.lo) / (self.hi - self.lo)
        return round(self.start + share * (self.end - self.start), 2)


def ticks(lo: float, hi: float, n: int = 5) -> list[float]:
    """Round numbers (1, 2 or 5 times a power of ten) between lo and hi, about n of them."""
    if not hi > lo:
        return [lo]
    raw = (hi - lo) / max(n, 1)
    unit = 10.0 ** math.floor(math.log10(raw))
    step = next(m * unit for m in (1, 2, 5, 10) if m * unit >= raw * (1 - 1e-9))
    first, last = math.ceil(lo / step - 1e-9), math.floor(hi / step + 1e-9)
    return [k * step for k in range(first, last + 1)]


def tick_text(value: float, values: Sequence[float]) -> str:
    """A tick with just the digits that its neighbours need."""
    step = values[1] - values[0] if len(values) > 1 else 1.0
    return number(value, max(0, -math.floor(math.log10(step) + 1e-9)) if step > 0 else 1)


def span(estimates: Sequence[Interval]) -> tuple[float, float]:
    """The range that holds all intervals and zero, a little wider."""
    ends = [0.0, *(v for e in estimates for v in e if math.isfinite(v))]
    lo, hi = min(ends), max(ends)
    pad = 0.04 * (hi - lo) or 1.0
    return lo - pad, hi + pad


def scaled(interval: Interval, factor: float) -> Interval:
    """All three numbers times a positive factor."""
    return Interval(*(part * factor for part in interval))


def sign_class(value: float) -> str:
    """The style class of a sign."""
    return "pos" if value > 0 else "neg" if value < 0 else "nil"


def forest_row(estimate: Interval, scale: Scale, *, height: int = 18) -> Markup:
    """One row of a forest plot: interval, point and the zero line. The numbers stand beside it."""
    mid = height / 2
    parts = [f'<line class="zero" x1="{scale(0)}" y1="0" x2="{scale(0)}" y2="{height}"/>']
    kind = sign_class(estimate.value)
    if not math.isnan(estimate.lo) and not math.isnan(estimate.hi):
        sure = "" if estimate.includes_zero else " sure"
        ends = f'x1="{scale(estimate.lo)}" y1="{mid:g}" x2="{scale(estimate.hi)}" y2="{mid:g}"'
        parts.append(f'<line class="ci {kind}{sure}" {ends}/>')
    hollow = " hollow" if estimate.includes_zero else ""
    parts.append(f'<circle class="dot {kind}{hollow}" cx="{scale(estimate.value)}" cy="{mid:g}" r="3.5"/>')
    return _svg("".join(parts), scale.end + scale.start, height, "forest")


def forest_axis(scale: Scale, *, height: int = 18) -> Markup:
    """The axis of a forest plot, for the head of the column."""
    values = ticks(scale.lo, scale.hi, 4)
    parts = [
        f'<text x="{scale(v)}" y="11" text-anchor="middle">{tick_text(v, values)}</text>'
        f'<line class="tick" x1="{scale(v)}" y1="14" x2="{scale(v)}" y2="{height}"/>'
        for v in values
    ]
    return _svg("".join(parts), scale.end + scale.start, height, "forest axis")


def bar(value: float, largest: float, *, width: int = 48, height: int = 10) -> Markup:
    """A small bar from the middle, to the right if positive."""
    half = width / 2
    length = 0.0 if not largest or not math.isfinite(value) else half * min(abs(value) / largest, 1.0)
    x = half if value >= 0 else half - length
    body = f'<rect class="{sign_class(value)}" x="{x:.1f}" y="1" width="{length:.1f}" height="{height - 2}"/>'
    body += f'<line class="zero" x1="{half:g}" y1="0" x2="{half:g}" y2="{height}"/>'
    return _svg(body, width, height, "bar")


def _svg(body: str, width: float, height: float, kind: str, rest: str = "") -> Markup:
    """A drawing; without attributes of its own one whose numbers stand beside it."""
    box = f'width="{width:g}" height="{height:g}" viewBox="0 0 {width:g} {height:g}"'
    rest = rest or 'aria-hidden="true" focusable="false"'
    return Markup(f'<svg class="{kind}" {box} {rest}>{body}</svg>')


@dataclass(frozen=True)
class Point:
    """One point: position, which mark, its example's place in the page's data (-1: it is none), and its text."""

    x: float
    y: float
    kind: int
    index: int
    text: str


SIZE, LEFT, BOTTOM, EDGE = 440, 56, 44, 12


def one_scale(points: Sequence[Point]) -> bool:
    """Whether one scale for both axes leaves each pathway at least a quarter of the room."""
    small, large = sorted(max(map(abs, side), default=0.0) for side in ([p.x for p in points], [p.y for p in points]))
    return small * 4 >= large


def scatter(points: Sequence[Point], names: tuple[str, str], title: str, sums: bool = True) -> Markup:
    """Scatter of x against y with both zero lines; of the parts of a sum the line x + y = 0 too.

    These share one scale, which keeps the slope honest, unless ``one_scale`` says no.
    """
    x, y = span([Interval(p.x) for p in points]), span([Interval(p.y) for p in points])
    if sums and one_scale(points):
        x = y = (min(x[0], y[0]), max(x[1], y[1]))
    at_x, at_y = Scale(*x, LEFT, SIZE - EDGE), Scale(*y, SIZE - BOTTOM, EDGE)
    start, end = max(x[0], -y[1]), min(x[1], -y[0])
    even = f'<line class="even" x1="{at_x(start)}" y1="{at_y(-start)}" x2="{at_x(end)}" y2="{at_y(-end)}"/>'
    even = even if sums else ""
    marks = "".join(_mark(p, at_x(p.x), at_y(p.y)) for p in points)
    return _titled_svg(_frame(at_x, at_y, names) + even + marks, SIZE, SIZE, "scatter", title)


def _frame(at_x: Scale, at_y: Scale, names: tuple[str, str]) -> str:
    floor, left, right, top = SIZE - BOTTOM, LEFT, SIZE - EDGE, EDGE
    across, up = ticks(at_x.lo, at_x.hi), ticks(at_y.lo, at_y.hi)
    grid = [
        f'<line class="{_line(v)}" x1="{at_x(v)}" y1="{top}" x2="{at_x(v)}" y2="{floor}"/>'
        f'<text x="{at_x(v)}" y="{floor + 16}" text-anchor="middle">{tick_text(v, across)}</text>'
        for v in across
    ]
    grid += [
        f'<line class="{_line(v)}" x1="{left}" y1="{at_y(v)}" x2="{right}" y2="{at_y(v)}"/>'
        f'<text x="{left - 7}" y="{at_y(v) + 4:g}" text-anchor="end">{tick_text(v, up)}</text>'
        for v in up
    ]
    middle, height = (left + right) / 2, (top + floor) / 2
    return (
        f"{''.join(grid)}"
        f'<text class="name" x="{middle:g}" y="{SIZE - 8}" text-anchor="middle">{escape(names[0])}'
        f'</text><text class="name" x="14" y="{height:g}" text-anchor="middle" '
        f'transform="rotate(-90 14 {height:g})">{escape(names[1])}</text>'
    )


def _line(value: float) -> str:
    return "zero" if abs(value) < 1e-12 else "grid"


def _mark(point: Point, x: float, y: float) -> str:
    """Circle, diamond, square or triangle: labels differ in shape as well as in colour."""
    shapes = (
        f'<circle cx="{x}" cy="{y}" r="3.6"',
        f'<path d="M{x} {y - 4.8:.2f}l4.8 4.8l-4.8 4.8l-4.8 -4.8z"',
        f'<rect x="{x - 3.4:.2f}" y="{y - 3.4:.2f}" width="6.8" height="6.8"',
        f'<path d="M{x} {y - 4.6:.2f}l4.4 8h-8.8z"',
    )
    kind = point.kind % len(shapes)
    tag = "circle" if kind == 0 else "rect" if kind == 2 else "path"
    title = f"<title>{escape(point.text)}</title>"
    example = f' data-example="{point.index}"' if point.index >= 0 else ""
    return f'{shapes[kind]} class="mark k{kind}"{example}>{title}</{tag}>'


def legend_mark(kind: int) -> Markup:
    """The mark of a label, for the legend."""
    return _svg(_mark(Point(0, 0, kind, -1, ""), 7, 7), 14, 14, "key")


def heatmap(values: ArrayLike, names: Sequence[str], title: str) -> Markup:
    """Symmetric map of correlations in [-1, 1]; strength is opacity, the sign is the colour.

    Cells of one shade share one path, which keeps 75 x 75 cells under 100 kB.
    """
    r = np.nan_to_num(np.asarray(values, dtype=np.float64)).clip(-1, 1)
    d = len(r)
    cell = 9 if d > 40 else 14
    margin = 8 + 6 * max((len(n) for n in names), default=0) * (0.62 if cell == 9 else 0.95)
    shade = np.rint(np.abs(r) * BINS).astype(int)
    paths = []
    for kind, side in (("pos", r > 0), ("neg", r < 0)):
        for k in range(1, BINS + 1):
            rows, columns = np.nonzero(side & (shade == k))
            cells = "".join(f"M{j} {i}h1v1h-1z" for i, j in zip(rows, columns, strict=True))
            if cells:
                paths.append(f'<path class="{kind}" fill-opacity="{k / BINS:g}" d="{cells}"/>')
    sides = []
    for i, name in enumerate(names):
        low = margin + (i + 0.5) * cell + 0.3 * cell
        sides.append(f'<text x="{margin - 3:g}" y="{low:.1f}" text-anchor="end">{escape(name)}</text>')
        turned = f'transform="rotate(-90 {low:.1f} {margin - 3:g})"'
        sides.append(f'<text x="{low:.1f}" y="{margin - 3:g}" {turned}>{escape(name)}</text>')
    size = margin + d * cell
    body = (
        f'<g transform="translate({margin:g} {margin:g}) scale({cell})">'
        f'<rect class="plate" width="{d}" height="{d}"/>{"".join(paths)}</g>{"".join(sides)}'
    )
    return _titled_svg(body, size, size, f"heat cell{cell}", title, f'data-margin="{margin:g}" data-cell="{cell}"')


WIDE, TALL, LETTER = 34, 24, 6.6  # of a cell of a grid, and of a letter beside it


def grid(
    values: ArrayLike,
    rows: Sequence[str],
    columns: Sequence[str],
    marked: ArrayLike,
    faint: ArrayLike,
    about: Sequence[Sequence[str]],
    title: str,
) -> Markup:
    """Values [R, C] in colour: strength is opacity, the sign is the colour; a dot on those that are marked.

    Faint ones are drawn smaller, and the strongest colour is that of the largest that is not faint. Nothing is drawn
    where a value is nan.
    """
    x, dots, small = np.asarray(values, np.float64), np.asarray(marked, bool), np.asarray(faint, bool)
    known = np.isfinite(x)
    largest = float(np.abs(x[known & ~small]).max(initial=0.0)) or float(np.abs(x[known]).max(initial=0.0)) or 1.0
    left = 12 + LETTER * max(map(len, rows))
    # Names of columns stand askew above them, and go beyond the last one.
    top = right = 14 + 0.71 * LETTER * max(map(len, columns))
    parts = []
    for i, name in enumerate(rows):
        y = top + i * TALL
        parts.append(f'<text x="{left - 8:g}" y="{y + 0.68 * TALL:g}" text-anchor="end">{escape(name)}</text>')
        for j in range(len(columns)):
            at = left + j * WIDE
            plate = f'<rect class="plate" x="{at:g}" y="{y:g}" width="{WIDE - 2}" height="{TALL - 2}"/>'
            if not known[i, j]:
                parts.append(plate)
                continue
            inset = 7 if small[i, j] else 0
            size = f'width="{WIDE - 2 - 2 * inset}" height="{TALL - 2 - 2 * inset}"'
            strength = min(abs(x[i, j]) / largest, 1.0)
            cell = f'<rect class="{sign_class(x[i, j])}" fill-opacity="{0.08 + 0.92 * strength:.2f}" '
            cell += f'x="{at + inset:g}" y="{y + inset:g}" {size}/>'
            dot = f'<circle class="dot" cx="{at + WIDE / 2 - 1:g}" cy="{y + TALL / 2 - 1:g}" r="3.5"/>'
            cell += dot if dots[i, j] else ""
            parts.append(f"<g><title>{escape(about[i][j])}</title>{plate}{cell}</g>")
    for j, name in enumerate(columns):
        at, low = left + (j + 0.5) * WIDE - 4, top - 8
        parts.append(f'<text x="{at:g}" y="{low:g}" transform="rotate(-45 {at:g} {low:g})">{escape(name)}</text>')
    width, height = left + len(columns) * WIDE + right, top + len(rows) * TALL + 2
    return _titled_svg("".join(parts), round(width), round(height), "tiles", title)


def _titled_svg(body: str, width: float, height: float, kind: str, title: str, extra: str = "") -> Markup:
    return _svg(body, width, height, kind, f'role="img" aria-label="{escape(title)}" {extra}')
