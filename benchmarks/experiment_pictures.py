"""The picture of one experiment (``benchmarks.experiments``): three panels in one SVG.

AUC with intervals; rank correlations; mean y after training without, or on, what a method names,
with its interval, over the range of the random sets.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

from markupsafe import escape

from taught.report.charts import Scale, heatmap, tick_text, ticks

Row = Mapping[str, Any]
WIDTH, NAMES, STEP, EDGE = 900, 220, 18, 20
STYLE = """
svg { background: #fff; font-family: sans-serif; } text { font-size: 11px; fill: #1b1f24; }
.title { font-size: 14px; font-weight: 600; } .grid { stroke: #e2e5e8; } .zero { stroke: #767f89; }
.pos { fill: #1b6ec2; } .neg { fill: #b85500; } .plate { fill: #f6f7f8; } .band { fill: #d5d9de; }
.ci { stroke: #1b1f24; stroke-width: 1.5; } .dot { fill: #1b1f24; }
.all { stroke: #b85500; stroke-dasharray: 4 3; } .base { stroke: #00806a; stroke-dasharray: 1 3; }
"""
WAYS = {"drop": "trained without its highest", "keep": "trained on its lowest quarter"}


def picture(record: Row, baselines: Collection[str]) -> str:
    """SVG of a complete result; correlations leave the baselines out."""
    rows = [row for row in record["rows"] if "auc" in row]
    parts, y = [_text(EDGE, 24, record["name"], "title")], 40.0
    for part, height in (
        _aucs(rows),
        _correlations([row for row in rows if row["method"] not in baselines]),
        _outcomes(record),
    ):
        parts.append(f'<g transform="translate(0 {y:g})">{part}</g>')
        y += height + EDGE
    return (
        f'<svg xmlns="http://www.w3.org/2000/svg" width="{WIDTH}" height="{y:g}" '
        f'viewBox="0 0 {WIDTH} {y:g}"><style>{STYLE}</style>{"".join(parts)}</svg>\n'
    )


def _aucs(rows: list[Row]) -> tuple[str, float]:
    scale = Scale(0, 1, NAMES, WIDTH - EDGE)
    parts = [_text(EDGE, 14, "AUC of the planted examples, 95% interval", "title")]
    parts.append(_axis(scale, 24, len(rows), middle=0.5))
    for i, row in enumerate(rows):
        at = 24 + (i + 0.5) * STEP
        left, right = sorted((scale(0.5), scale(row["auc"])))
        side = "pos" if row["auc"] > 0.5 else "neg"
        parts.append(_text(NAMES - 8, at + 4, row["method"], anchor="end"))
        size = f'width="{right - left:.2f}" height="10"'
        parts.append(f'<rect class="{side}" x="{left}" y="{at - 5}" {size}/>')
        parts.append(_interval(scale, row["auc_lo"], row["auc_hi"], at))
    return "".join(parts), 24 + len(rows) * STEP + 20


def _correlations(rows: list[Row]) -> tuple[str, float]:
    names = [row["method"] for row in rows]
    r = [[row["correlation"][name] for name in names] for row in rows]
    values = [[float("nan") if cell is None else cell for cell in line] for line in r]
    title = "Rank correlation between methods: blue positive, orange negative"
    chart = heatmap(values, names, title)
    size = 14 * len(names) + 8 + 5.7 * max(map(len, names))
    title_part = _text(EDGE, 14, title, "title")
    return f'{title_part}<g transform="translate({EDGE} 24)">{chart}</g>', size + 24


def _outcomes(record: Row) -> tuple[str, float]:
    summary, parts, y = record["summary"], [], 0.0
    leak = record["conditions"]["leak_group"]
    for way, said in WAYS.items():
        rows = [row for row in record["rows"] if way in row]
        for group in sorted(rows[0][way], key=lambda name: name != leak):
            random = summary[f"{way}, random"][group]
            marks = {"base": summary["mean_y"]["base"][group], "all": summary["mean_y"]["all examples"][group]}
            title = f"Mean y of {group}, {said}; grey: random sets, green: base model, orange: trained on all"
            part = _dots([(row["method"], row[way][group]) for row in rows], random, marks, title)
            parts.append(f'<g transform="translate(0 {y:g})">{part}</g>')
            y += 24 + len(rows) * STEP + 30
    return "".join(parts), y


def _dots(rows: list[tuple[str, Row]], random: list[float], marks: Mapping[str, float], title: str) -> str:
    """Dots with the interval of their difference, set at the mean of the random sets."""
    ends = [e for _, of in rows for e in (of["random"] + of["lo"], of["random"] + of["hi"])]
    ends += [*random, *marks.values(), *(of["method"] for _, of in rows)]
    pad = 0.03 * (max(ends) - min(ends)) or 1.0
    scale = Scale(min(ends) - pad, max(ends) + pad, NAMES, WIDTH - EDGE)
    height = len(rows) * STEP
    left, right = scale(min(random)), scale(max(random))
    parts = [
        _text(EDGE, 14, title, "title"),
        f'<rect class="band" x="{left}" y="24" width="{right - left:.2f}" height="{height}"/>',
    ]
    parts.append(_axis(scale, 24, len(rows), middle=sum(random) / len(random)))
    parts += [_line(name, scale(value), 24, 24 + height) for name, value in marks.items()]
    for i, (name, of) in enumerate(rows):
        at = 24 + (i + 0.5) * STEP
        parts.append(_text(NAMES - 8, at + 4, name, anchor="end"))
        parts.append(_interval(scale, of["random"] + of["lo"], of["random"] + of["hi"], at))
        parts.append(f'<circle class="dot" cx="{scale(of["method"])}" cy="{at}" r="4"/>')
    return "".join(parts)


def _axis(scale: Scale, top: float, rows: int, *, middle: float) -> str:
    values, floor = ticks(scale.lo, scale.hi), top + rows * STEP
    parts = [_line("grid", scale(v), top, floor) for v in values]
    parts += [_text(scale(v), floor + 14, tick_text(v, values), anchor="middle") for v in values]
    return "".join(parts) + _line("zero", scale(middle), top, floor)


def _interval(scale: Scale, lo: float, hi: float, at: float) -> str:
    return f'<line class="ci" x1="{scale(lo)}" y1="{at}" x2="{scale(hi)}" y2="{at}"/>'


def _line(kind: str, x: float, top: float, floor: float) -> str:
    return f'<line class="{kind}" x1="{x}" y1="{top}" x2="{x}" y2="{floor}"/>'


def _text(x: float, y: float, text: str, kind: str = "", anchor: str = "start") -> str:
    return f'<text class="{kind}" x="{x}" y="{y}" text-anchor="{anchor}">{escape(text)}</text>'
