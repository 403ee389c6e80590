"""Which categories of prompts the behavior does not cover, and where it shows up uncalled for."""

from __future__ import annotations

from taught.report.blocks import Block, Column, Feature, Line, Sentence, Table, Text, Word, columns
from taught.report.sections import Section, add
from taught.report.sections.examples import NOTHING
from taught.report.tables import Row, Rows, Tables
from taught.report.text import count, interval_of, interval_text, listed


def _blocks(tables: Tables) -> list[Block]:
    rows = sorted(tables.rows("audit"), key=lambda r: (not r["uncovered"], r["gap"] or 0.0))
    lede = (
        "Mean behavior of each category of prompts against the rest of its group. A category is uncovered when, after "
        "correction for the number of categories, the behavior falls short where it is wanted or shows up where it is "
        "not."
    )
    heads = columns(
        "Category", "Group", ("n", "number", 0), ("Mean y", "number"), Column("Gap", "interval", plot="fit")
    )
    heads += columns(("Adjusted p", "p"), "Covered", ("Tied features", "id"))
    covered = {None: Word("not tested", "soft"), False: Word("yes", "soft"), True: Word("uncovered", "badge")}
    made = []
    for r in rows:
        shown, tied = covered[r["uncovered"]], Line([Feature(f) for f in r["features"] or []], " ")
        gap = interval_of(r, "gap")
        made.append((r["category"], r["group"], r["n"], r["mean_y"], gap, r["p_adjusted"], shown, tied))
    flagged = frozenset(i for i, r in enumerate(rows) if r["uncovered"])
    caption = "Audit by category: gap of mean y to the rest of the group, with 95% interval"
    return [Text(lede), Table(heads, made, caption, head=20, sortable=True, flagged=flagged)]


def audit_sentence(audit: Rows, positive: str | None = None) -> Sentence:
    """Which categories the policy does not cover, and where the behavior shows up uncalled for.

    The behavior should show in the group ``positive``; None: in all groups.
    """
    tested = count(sum(r["uncovered"] is not None for r in audit), "tested category", "tested categories")
    marked = sorted((r for r in audit if r["uncovered"]), key=lambda r: -abs(r["gap"]))
    short = [_named(r) for r in marked if positive in (None, r["group"])]
    spill = [_named(r) for r in marked if positive not in (None, r["group"])]
    if not marked:
        text = f"{NOTHING}: none of {tested} stands out from the rest of its group after correction."
        return Sentence("Coverage", "none", text)
    parts = []
    if short:
        parts.append(f"{len(short)} of {tested} not covered: the behavior falls short in {listed(short)}.")
    if spill:
        parts.append(f"{len(spill)} of {tested} with the behavior uncalled for: {listed(spill)}.")
    return Sentence("Coverage", "caution", " ".join(parts))


def _named(row: Row) -> str:
    gap = interval_text(interval_of(row, "gap"))
    p = "p < 0.001" if row["p_adjusted"] < 0.001 else f"p = {row['p_adjusted']:.3f}"
    return f"{row['category']} (mean y {gap} against the rest of its group, adjusted {p}, n = {row['n']})"


def _sentences(tables: Tables) -> list[Sentence]:
    return [audit_sentence(tables.rows("audit"), tables.setting("prompts.positive_group"))]


add(Section("coverage", "Coverage", ("coefficients", "audit"), _blocks, _sentences, overview=True))
