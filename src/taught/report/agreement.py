"""Where methods agree on one target: rank correlations over examples."""

from __future__ import annotations

from taught.report.blocks import Block, Cell, Column, Items, Table, Word
from taught.report.tables import Tables
from taught.report.text import interval_text, number, read_interval, words
from taught.stats.intervals import Interval

AGREE = 0.5  # below it methods measure different things


def agreement_blocks(tables: Tables, target: str) -> list[Block]:
    """Warnings where methods rank the examples differently, and the table of all couples."""
    couples = [
        (row["method"], row["other"], read_interval([row["rank_correlation"], row.get("lo"), row.get("hi")]))
        for row in tables.rows("agreement") or []
        if row["target"] == target
    ]
    if not couples:
        return []
    apart = [_apart(a, b, r) for a, b, r in couples if r is not None and r.value < AGREE]
    found = {key: r for a, b, r in couples for key in ((a, b), (b, a))}
    methods = list(dict.fromkeys(name for a, b, _ in couples for name in (a, b)))
    cells: dict[tuple[str, str], Cell] = {(name, name): 1 for name in methods}
    for key, r in found.items():
        cells[key] = r if r is None or r.value >= AGREE else Word(interval_text(r), "badge")
    rows = [[a, *(cells.get((a, b)) for b in methods)] for a in methods]
    caption = (
        f"{words(target)}: rank correlation of methods over examples [95%]; below {number(AGREE, 1)} they measure "
        "different things"
    )
    table = Table([Column("Method"), *(Column(b, "interval", digits=2) for b in methods)], rows, caption)
    return [*([Items(apart, warning=True)] if apart else []), table]


def _apart(a: str, b: str, r: Interval) -> str:
    if r.hi >= AGREE:
        may = "may rank the examples differently: more examples would tell"
        return f"Undecided: {a} and {b} {may} (rank correlation {interval_text(r)})."
    return f"Disagree: {a} and {b} rank the examples differently (rank correlation {interval_text(r)})."
