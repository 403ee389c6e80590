"""Where methods agree on one target: rank correlations over examples."""

from __future__ import annotations

from taught.report.blocks import Block, Cell, Column, Items, Table, Word
from taught.report.tables import Tables
from taught.report.text import interval_of, interval_text, number, words

AGREE = 0.5  # below it methods measure different things


def agreement_blocks(tables: Tables, target: str) -> list[Block]:
    """Warnings where methods rank the examples differently, and the table of all couples."""
    rows = [row for row in tables.rows("agreement") if row["target"] == target]
    couples = [(row["method"], row["other"], interval_of(row, "rank_correlation")) for row in rows]
    if not couples:
        return []
    apart = []
    for a, b, r in couples:
        if r is not None and r.value < AGREE:
            said = f"Disagree: {a} and {b} rank the examples differently"
            if r.hi >= AGREE:
                said = f"Undecided: {a} and {b} may rank the examples differently: more examples would tell"
            apart.append(f"{said} (rank correlation {interval_text(r)}).")
    found = {key: r for a, b, r in couples for key in ((a, b), (b, a))}
    methods = list(dict.fromkeys(name for a, b, _ in couples for name in (a, b)))
    cells: dict[tuple[str, str], Cell] = {(name, name): 1 for name in methods}
    for key, r in found.items():
        cells[key] = r if r is None or r.value >= AGREE else Word(interval_text(r), "badge")
    made = [[a, *(cells.get((a, b)) for b in methods)] for a in methods]
    caption = (
        f"{words(target)}: rank correlation of methods over examples [95%]; below {number(AGREE, 1)} they measure "
        "different things"
    )
    table = Table([Column("Method"), *(Column(b, "interval", digits=2) for b in methods)], made, caption)
    return [*([Items(apart, warning=True)] if apart else []), table]
