"""Whether the policy can be trusted: numbered checks, predictors without features, sets of prompts."""

from __future__ import annotations

from collections.abc import Iterator
from typing import cast

from taught.report.blocks import Block, Column, Line, Sentence, Table, Text, Word
from taught.report.sections import SECTIONS, Section
from taught.report.tables import Row, Rows, Tables
from taught.report.text import count, interval_text, listed, number, percent, read_interval

PREDICTORS = {
    "group": "group label",
    "category": "category label",
    "length": "prompt length",
    "direction": "difference of the groups’ mean residuals",
    "words": "words of the prompt",
}


def _blocks(tables: Tables) -> Iterator[Block]:
    card = cast(Row, tables.json("faithfulness"))
    checks, d = card["checks"], card["signs"]["n"]
    passed, warned, failed = (sum(c["status"] == s for c in checks) for s in ("pass", "warn", "fail"))
    text = f"{passed} of {count(len(checks), 'check')} pass, {warned} warn, {failed} fail."
    if needed := read_interval(card["features"]["needed"]):
        share = percent(card["features"]["share"])
        text += f" {interval_text(needed, 0)} of {count(d, 'feature')} give {share} of the held-out fit."
    text += " Everything is held out; thresholds are rules of thumb. Each check has a section in "
    yield Text(Line((text, Word("docs/checks.md", "code"), ".")))
    yield Table(
        [
            Column("Code"),
            Column("Check", only="page"),
            Column("Check", only="terminal"),
            Column("Value", "interval"),
            Column("Passes"),
            Column("Status"),
            Column("To do", only="terminal"),
        ],
        [_check(c) for c in checks],
        "Checks, with 95% intervals where there are any",
        head=len(checks),
    )
    found = [
        (PREDICTORS.get(n, n), read_interval(r["r2"]), read_interval(r["gain"])) for n, r in card["predictors"].items()
    ]
    yield Table(
        [Column("Predictor"), Column("R²", "interval"), Column("Policy above it", "interval", plot="fit")],
        [row for row in found if row[1] and row[2]],
        "Predictors without features: held-out R², and what the policy’s is above it",
        empty="Not defined: the behavior does not vary.",
    )
    yield Table(
        [Column(name) for name in ("Sets", "Prompts", "Correlation of coefficients", "Signs that differ")]
        + [Column("Of the sure ones")],
        [_set(row, d) for row in card["sets"]],
        "Policies fitted on different sets of prompts. In brackets: random sets of the smaller size against all",
    )


def _check(c: Row) -> list[object]:
    passed = c["status"] == "pass"
    said: list[object] = [f"{c['name']}: {c['meaning']}"]
    if not passed:
        said.append(Word(f"To do: {c['action']}", "soft"))
    status = c["status"] if passed else Word(c["status"], "badge")
    action = "" if passed else c["action"]
    return [c["code"], Line(said, "\n"), c["name"], read_interval(c), c["threshold"], status, action]


def _set(s: Row, d: int) -> list[str]:
    return [
        ", ".join(s["sets"]),
        ", ".join(map(str, s["n"])),
        f"{number(s['correlation'])} ({number(s['control_correlation'])})",
        f"{s['flips']} of {d} ({number(s['control_flips'], 1)})",
        f"{s['sure_flips']} of {s['sure']} ({number(s['control_sure_flips'], 1)})",
    ]


def trust_sentence(checks: Rows) -> Sentence:
    """How many of the numbered checks of the policy pass, and which do not."""
    of = {status: [c for c in checks if c["status"] == status] for status in ("fail", "warn")}
    passed = len(checks) - sum(map(len, of.values()))
    text = f"{passed} of {count(len(checks), 'check')} of the policy pass."
    for status, verb in (("fail", "Fails"), ("warn", "Warns")):
        if of[status]:
            names = [f"{c['code']} {c['name']}" for c in of[status]]
            text += f" {verb}: {listed(names, len(names))}."
    if passed == len(checks):
        return Sentence("Trust", "found", text)
    return Sentence("Trust", "caution", f"{text} What they mean: docs/checks.md.")


SECTIONS.register("trust")(
    Section(
        "trust",
        "Trust",
        ("coefficients", "faithfulness"),
        _blocks,
        lambda tables: [trust_sentence(cast(Row, tables.json("faithfulness"))["checks"])],
        overview=True,
        heading="Can the policy be trusted?",
    )
)
