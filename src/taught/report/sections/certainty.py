"""How sure the ranking of examples is: labels, trivial predictors, real steps, sketches, safe ranks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from types import MappingProxyType

import numpy as np

from taught.report.blocks import Block, Column, Line, Mark, Sentence, Table, Text, Tone, Word, columns
from taught.report.examples import PRIMARY, SE, Summary, is_behavior, primary, scored, shown, targets
from taught.report.sections import Section, add
from taught.report.sections.examples import NOTHING
from taught.report.tables import Rows, Tables
from taught.report.text import common_power, count, interval_text, listed, number, percent, tens, words
from taught.stats.intervals import Interval, mean_interval
from taught.stats.ranks import spearman_interval

STRONG = 0.5  # rank correlation from which a trivial predictor gives much of the ranking
STEP_TOLERANCE = 0.05  # between S and a real step
RELIABLE = 0.95  # correlation with the exact S from which a ranking by sketches is taken as it is
MAX_LABELS = 4
TRIVIAL = {"n_scored": "response length", "loss": "loss"}


def _blocks(tables: Tables) -> Iterator[Block]:
    summary = Summary.read(tables)
    yield Text(
        "If something trivial ranks the examples as a target does, the values may be measuring just that. Labels "
        "are a control too: where the interval of a label’s mean includes zero, its examples have no common effect."
    )
    ranked = main_targets(tables)
    rows = [(words(t), name, e) for t in ranked for name, e in trivial_correlations(summary, t)]
    heads = columns("Target", "Predictor", Column("Rank correlation", "interval", plot=(-1.05, 1.05)))
    yield Table(heads, rows, "Rank correlation with trivial predictors, 95% bootstrap intervals over examples")
    if len(summary.finite.names) <= MAX_LABELS:
        yield label_table(summary, behaviors(tables))
    if statements := tables.rows("statements"):
        sizes, ranks = rank_table(statements)
        caption = (
            "Do the k strongest examples stay the k strongest? In brackets: share of resampled sets of prompts in "
            "which they do"
        )
        yield Table(columns("Ranked by", *(f"k = {k}" for k in sizes)), [[n, *cells] for n, cells in ranks], caption)
        note = (
            "Safe: at 95%, against other prompts of the same kind, the exact refit and the error of sketches "
            "together; reasons stand in "
        )
        yield Text(Line((note, Word("statements.parquet", "code"), ".")), "note")
    if again := [[r["example_id"], words(r["target"]), r["first"], r["exact"]] for r in tables.rows("rescored")]:
        exact = Column("Exact, per step", "signed", power=common_power(row[-1] for row in again))
        caption = "The strongest by sketches, and what they are by whole gradients"
        yield Table(columns(("Example", "id"), "Of", ("By sketches", "signed"), exact), again, caption, head=20)


def behaviors(tables: Tables) -> list[str]:
    """The first behaviors that the summary has."""
    return [t for t in targets(tables) if is_behavior(t)][:MAX_LABELS]


def main_targets(tables: Tables) -> list[str]:
    """What the ranking goes by, and where it is a behavior the others too."""
    first = primary(tables)
    return list(dict.fromkeys([first, *(behaviors(tables) if is_behavior(first) else ())]))


def label_table(summary: Summary, names: Sequence[str], marks: Mapping[str, int] = MappingProxyType({})) -> Table:
    """The mean of each label on each target; ``marks``: label -> its mark in a scatter."""
    known = summary.finite
    means = [(label, name, e) for name in names for label, e in label_means(summary, name)]
    means.sort(key=lambda row: known.names.index(row[0]))
    power = common_power(v for *_, e in means for v in e)
    mean = Column("Mean", "interval", power=power, plot="fit")
    rows = [
        (Line((Mark(marks[label]), " ", label)) if marks else label, words(name), len(known.own(label, name)), e)
        for label, name, e in means
    ]
    caption = "Mean effect of an example by label, with 95% bootstrap intervals over examples"
    return Table(columns("Label", "Of", ("Examples", "number", 0), mean), rows, caption, head=20)


def label_means(summary: Summary, target: str) -> list[tuple[str, Interval]]:
    """The mean of each label's examples with its interval."""
    found = ((name, mean_interval(summary.finite.own(name, target))) for name in summary.finite.names)
    return [(name, e) for name, e in found if e is not None]


def trivial_correlations(summary: Summary, target: str) -> list[tuple[str, Interval]]:
    """Rank correlation of a target with response length, loss and, with two labels, the label."""
    known = summary.finite
    trivial = {name: known.columns[key] for key, name in TRIVIAL.items() if key in known.columns}
    if len(known.names) == 2:
        first = min(known.names)
        trivial[f"the label ({first} = 1)"] = (known.label == known.names.index(first)).astype(np.float64)
    found = ((name, spearman_interval(known.columns[target], values)) for name, values in trivial.items())
    return [(name, e) for name, e in found if e is not None]


# The verdict


def _sentences(tables: Tables) -> list[Sentence | None]:
    summary, rows = Summary.read(tables), shown(tables)
    statements = tables.rows("statements")
    if not len(summary.finite):
        return []
    first = primary(tables)
    return [
        ranking_sentence(statements) if statements else None,
        label_sentence(summary.finite, first),
        trivial_sentence(summary, first),
        step_sentence(rows, first),
        sketch_sentence(summary.finite, first),
    ]


def label_sentence(scores: Summary, target: str) -> Sentence | None:
    """The mean effect of each label with its interval, and of a score the share of each pathway."""
    if len(scores.names) > MAX_LABELS:
        return None
    known = label_means(scores, target)
    if not known:
        return None
    power = common_power([end for _, e in known for end in e])
    parts = [
        f"{name} examples move {words(target)} by {interval_text(e, power=power)}{tens(power)} on average"
        + (f" ({NOTHING.lower()}: the interval includes zero)" if e.includes_zero else "")
        for name, e in known
    ]
    share = ""
    if f"{target}:x" in scores.columns:
        x, y = (float(np.abs(scores.columns[f"{target}:{k}"]).sum()) for k in ("x", "y"))
        if x + y > 0:
            share = f" {percent(y / (x + y))} of the absolute effect runs through output probability, "
            share += f"{percent(x / (x + y))} through feature activation."
    nothing = all(e.includes_zero for _, e in known)
    return Sentence("Labels", "none" if nothing else "found", f"{'; '.join(parts)}.{share}")


def trivial_sentence(summary: Summary, target: str) -> Sentence | None:
    """Whether something trivial ranks the examples as the target does."""
    found = trivial_correlations(summary, target)
    if not found:
        return None
    parts = listed([f"{interval_text(e)} with {name}" for name, e in found], 4)
    text = f"The rank correlation of {words(target)} is {parts}."
    tone: Tone = "found"
    if strong := [name.split(" (")[0] for name, e in found if abs(e.value) >= STRONG and not e.includes_zero]:
        tone, text = "caution", f"{text} Caution: {listed(strong)} alone gives much of the same ranking."
    elif all(e.includes_zero for _, e in found):
        tone, text = "none", f"{NOTHING}: every interval includes zero. {text}"
    return Sentence("Trivial predictors", tone, text)


def step_sentence(summary: Rows, target: str) -> Sentence | None:
    """How far the linear value is from a real step, on the examples where one was taken.

    Where values are estimates, these examples have an exact one too, and that is compared. A refit is
    of the policy, so it is compared with its score.
    """
    rows = [r for r in scored(summary, target) if r.get("step_score") and r[target]]
    if not rows:
        return None
    steps = ("a real step", "step_score", target), ("an exact refit", "refit_score", PRIMARY)
    apart = {
        name: max(abs(r[key] / ((of == target and r.get("exact_score")) or r[of]) - 1) for r in rows)
        for name, key, of in steps
        if all(r.get(key) and r.get(of) for r in rows)
    }
    sizes = {name: percent(v, 1) if v < 1 else f"{number(v, 1)} times their size" for name, v in apart.items()}
    differences = " and ".join(f"{size} ({name})" for name, size in sizes.items())
    good = max(apart.values()) <= STEP_TOLERANCE
    text = (
        f"Values are first-order effects of one step. On the {count(len(rows), 'example')} with the largest "
        f"|{words(target)}| they differ by at most {differences} from what the step does."
    )
    if not good:
        text += (
            f" That is above {percent(STEP_TOLERANCE)}: the step is too large for first-order values to be exact. "
            "With a smaller lr the difference shrinks in proportion."
        )
    return Sentence("Linear value", "found" if good else "caution", text)


def sketch_sentence(scores: Summary, target: str) -> Sentence | None:
    """How far the ranking can be trusted where the values come from sketches.

    Of the variance over the examples, mean(se^2) is the sketches' error; what is left, as a share, is
    the reliability, and its square root the correlation with the exact values to be expected.
    """
    value, se = scores.columns[target], scores.columns.get(target + SE)
    if se is None or not len(value) or not np.isfinite(se).all():
        return None
    spread = float(np.var(value))
    reliability = max(0.0, 1 - float(np.mean(se**2)) / spread) if spread > 0 else 0.0
    clear = int((np.abs(value) > 2 * se).sum())
    text = (
        f"{words(target)} is estimated from sketches of gradients. {clear:,} of {count(len(value), 'example')} have "
        f"a value more than two standard errors from zero; a correlation of about "
        f"{number(math.sqrt(reliability), 3)} with the exact one is to be expected."
    )
    unsure = reliability**0.5 < RELIABLE
    if unsure:
        text += " Larger sketches (attribution.estimator.dim) or the estimator adjoint give a surer ranking."
    return Sentence("Sketches", "caution" if unsure else "found", text)


def rank_table(statements: Rows) -> tuple[list[int], list[tuple[str, list[str]]]]:
    """The sizes k, and for each ranking a cell per size: safe, or undecided and the share."""
    sizes, ranked = sorted({row["k"] for row in statements}), dict.fromkeys(row["target"] for row in statements)
    cells = {}
    for row in statements:
        share = f" ({percent(row['share'], 1)})" if isinstance(row["share"], float) else ""
        cells[row["target"], row["k"]] = f"{row['verdict']}{share}"
    return sizes, [(f"|{words(t)}|", [cells.get((t, k), "–") for k in sizes]) for t in ranked]


def ranking_sentence(statements: Rows) -> Sentence:
    """Which sets of strongest examples stay the strongest, and why it is undecided of others."""
    parts, undecided = [], False
    for target in dict.fromkeys(row["target"] for row in statements):
        own = [row for row in statements if row["target"] == target]
        safe = [str(row["k"]) for row in own if row["verdict"] == "safe"]
        open_ = next((row for row in own if row["verdict"] != "safe"), None)
        undecided |= not safe
        name = f"|{words(target)}|"
        text = f"by {name} the top {listed(safe, len(safe))} safe" if safe else f"by {name} none"
        if open_ is not None:
            text += f" (top {open_['k']} undecided: {open_['reason']})"
        parts.append(text)
    text = (
        "That the strongest examples stay the strongest, at 95%, for other prompts of the same kind "
        f"and against the exact refit and the error of sketches: {'; '.join(parts)}."
    )
    return Sentence("Ranking", "caution" if undecided else "found", text)


HEADING = "How sure is the ranking?"
add(Section("certainty", "How sure", ("summary",), _blocks, _sentences, overview=True, heading=HEADING))
