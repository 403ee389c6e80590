"""A card for each selected feature."""

from __future__ import annotations

from taught.report.blocks import Block, Card, Cards, Text
from taught.report.detail import feature_blocks
from taught.report.sections import Section, add
from taught.report.tables import Tables
from taught.report.text import count


def _blocks(tables: Tables) -> list[Block]:
    rows = sorted(tables.rows("coefficients"), key=lambda r: -abs(r["coef"]))
    largest = max((abs(r["coef"]) for r in rows), default=1.0)
    lede = f"The {count(len(rows), 'selected feature')}, strongest coefficient first. "
    lede += "Activations are means over the prompts of a group."
    cards = [Card(r["feature_id"], r["label"] or "", r["coef"], largest, feature_blocks(tables, r)) for r in rows]
    return [Text(lede), Cards(cards)]


add(Section("features", "Features", ("coefficients",), _blocks))
