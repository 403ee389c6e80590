"""Concepts: the strongest examples by every method, where methods differ, and tokens."""

from __future__ import annotations

from collections.abc import Iterator

import numpy as np
import pyarrow.compute as pc

from taught.core.point import RESID_POST, Point
from taught.report.agreement import agreement_blocks
from taught.report.blocks import Block, Example, Line, Strips, Table, Text, Word, columns
from taught.report.examples import own_method, score_index, shown
from taught.report.sections import Section, add
from taught.report.strips import strips
from taught.report.tables import Row, Tables
from taught.report.text import amount, clean, common_power, interval_text, read_interval

STRONGEST = 5
KIND = "concept:"


def _blocks(tables: Tables) -> Iterator[Block]:
    yield Text(
        "What training on each example does to the read-out of a direction. The gradient is a change "
        f"{tables.per}; the other methods read activations and differ in unit, so methods are compared by rank."
    )
    facts = {concept["name"]: concept for concept in tables.json("concepts").get("concepts", [])}
    named = list(dict.fromkeys(target for _, target in score_index(tables) if target.startswith(KIND)))
    if not named:
        yield Text("No concept is among the targets of this run.", "note")
    for target in named:
        yield from _concept(tables, target, facts.get(clean(target.removeprefix(KIND)), {}))


def _concept(tables: Tables, target: str, facts: Row) -> Iterator[Block]:
    provenance = facts.get("provenance", {})
    point = str(Point(facts["block"], facts.get("point", RESID_POST))) if "block" in facts else ""
    about = [point, str(provenance.get("source") or "")]
    title = Line((clean(target.removeprefix(KIND)), " ", Word(", ".join(filter(None, about)), "soft")))
    yield Text(title, "title")
    card = facts.get("card", {})
    if separation := read_interval(card.get("auc")):
        answers = "examples sha256" in provenance  # labelled ones judge the direction, in place of the prompts
        sides = "examples with and without the behavior" if answers else "the two groups of prompts"
        held = ", on rows it was not fitted on" if card.get("held_out") else ""
        yield Text(f"Quality: AUC {interval_text(separation)} between {sides}{held}; .5 is chance.")
    yield from agreement_blocks(tables, clean(target))
    yield _strongest(tables, target)
    own = [s for s in strips(tables.rows("token_shares")) if s.target == clean(target)]
    if own:
        yield Strips([(Example(s.example_id), s) for s in own], key=True)


def _strongest(tables: Tables, target: str) -> Table:
    labels = {row["example_id"]: row["label"] for row in shown(tables)}
    methods = [method for method, own in score_index(tables) if own == target]
    own = own_method(tables)
    rows = []
    for method in sorted(dict.fromkeys(methods), key=lambda name: name != own):
        condition = (pc.field("target") == target) & (pc.field("method") == method)
        found = tables.columns("scores", ["example_id", "value"], condition)
        assert found is not None
        values = found["value"].to_numpy()
        order = np.argsort(-np.abs(values), kind="stable")[:STRONGEST]
        power = common_power(values[order].tolist())
        for i, example in zip(order, map(clean, found["example_id"].take(order).to_pylist()), strict=True):
            rows.append((clean(method), Example(example), amount(float(values[i]), power), labels.get(example, "")))
    caption = "Examples with the largest absolute values, positive: towards the concept"
    return Table(columns("Method", "Example", ("Value", "number"), "Label"), rows, caption, head=20)


add(Section("concepts", "Concepts", ("concepts", "scores"), _blocks))
