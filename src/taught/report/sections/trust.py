"""Whether the policy can be trusted: numbered checks, predictors without features, sets of prompts."""

from __future__ import annotations

from collections.abc import Iterator

from taught.report.blocks import Block, Column, Line, Sentence, Table, Text, Word, columns
from taught.report.sections import Section, add
from taught.report.tables import Rows, Tables
from taught.report.text import count, interval_text, listed, number, percent, read_interval

PREDICTORS = {
    "group": "group label",
    "category": "category label",
    "length": "prompt length",
    "direction": "difference of the groups’ mean residuals",
    "words": "words of the prompt",
}


def _blocks(tables: Tables) -> Iterator[Block]:
    card = tables.json("faithfulness")
    checks, d = card["checks"], card["signs"]["n"]
    passed, warned, failed = (sum(c["status"] == s for c in checks) for s in ("pass", "warn", "fail"))
    text = f"{passed} of {count(len(checks), 'check')} pass, {warned} warn, {failed} fail."
    if needed := read_interval(card["features"]["needed"]):
        share = percent(card["features"]["share"])
        text += f" {interval_text(needed, 0)} of {count(d, 'feature')} give {share} of the held-out fit."
    text += " Everything is held out; thresholds are rules of thumb. Each check has a section in "
    yield Text(Line((text, Word("docs/checks.md", "code"), ".")))
    names = Column("Check", only="page"), Column("Check", only="terminal")
    heads = columns("Code", *names, ("Value", "interval"), "Passes", "Status", Column("To do", only="terminal"))
    made = []
    for c in checks:
        meaning, found = f"{c['name']}: {c['meaning']}", [c["name"], read_interval(c), c["threshold"]]
        if c["status"] == "pass":
            made.append([c["code"], Line((meaning,)), *found, "pass", ""])
        else:
            said = Line((meaning, Word(f"To do: {c['action']}", "soft")), "\n")
            made.append([c["code"], said, *found, Word(c["status"], "badge"), c["action"]])
    yield Table(heads, made, "Checks, with 95% intervals where there are any", head=len(checks))
    gains = {n: (read_interval(r["r2"]), read_interval(r["gain"])) for n, r in card["predictors"].items()}
    known = [(PREDICTORS.get(n, n), r2, gain) for n, (r2, gain) in gains.items() if r2 and gain]
    heads = columns("Predictor", ("R²", "interval"), Column("Policy above it", "interval", plot="fit"))
    caption = "Predictors without features: held-out R², and what the policy’s is above it"
    yield Table(heads, known, caption, empty="Not defined: the behavior does not vary.")
    heads = columns("Sets", "Prompts", "Correlation of coefficients", "Signs that differ", "Of the sure ones")
    caption = "Policies fitted on different sets of prompts. In brackets: random sets of the smaller size against all"
    sets = [
        (
            ", ".join(s["sets"]),
            ", ".join(map(str, s["n"])),
            f"{number(s['correlation'])} ({number(s['control_correlation'])})",
            f"{s['flips']} of {d} ({number(s['control_flips'], 1)})",
            f"{s['sure_flips']} of {s['sure']} ({number(s['control_sure_flips'], 1)})",
        )
        for s in card["sets"]
    ]
    yield Table(heads, sets, caption)


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


def _sentences(tables: Tables) -> list[Sentence]:
    return [trust_sentence(tables.json("faithfulness")["checks"])]


_NEEDS = ("coefficients", "faithfulness")
add(Section("trust", "Trust", _NEEDS, _blocks, _sentences, overview=True, heading="Can the policy be trusted?"))
