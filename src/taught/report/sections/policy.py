"""The policy: how well it explains the behavior, and its coefficients."""

from __future__ import annotations

import math
from collections.abc import Iterator

from taught.report.blocks import Block, Column, Feature, Sentence, Table, Text, columns
from taught.report.charts import scaled
from taught.report.sections import Section, add
from taught.report.sections.examples import NOTHING
from taught.report.tables import Row, Tables
from taught.report.text import count, interval_of, interval_text, listed, percent, read_interval
from taught.stats.intervals import Interval

BASELINES = {"group": "the group label alone", "length": "prompt length alone", "constant": "a constant"}


def _blocks(tables: Tables) -> Iterator[Block]:
    rows = sorted(tables.rows("coefficients"), key=lambda r: -abs(r["coef"]))
    estimates = [interval_of(r, "coef") for r in rows]
    yield Text(
        "A ridge regression of the behavior y (natural logarithm of the answer’s probability) on the features’ "
        "activations. A positive coefficient: the more active the feature, the likelier the behavior."
    )
    policy = tables.json("policy")
    r2, rank, accuracy, majority = (read_interval(policy.get(k)) for k in ("r2", "spearman", "accuracy", "majority"))
    named = [("R²", "policy", r2), *(("R²", name, e) for name, e in baselines(policy))]
    named += [("Rank correlation", "policy", rank), ("Accuracy", "policy, thresholded", accuracy)]
    named += [("Accuracy", "larger class always", majority)]
    if fit := [row for row in named if row[2] is not None]:
        heads = columns("Measure", "Of", Column("Value", "interval", plot=(-0.05, 1.05)))
        yield Table(heads, fit, "Fit on held-out prompts, with 95% intervals")
    unsure = sum(e is not None and e.includes_zero for e in estimates)
    value = Column("Coefficient", "interval", plot="fit")
    heads = columns(("Feature", "id"), "Label", value, ("Same sign", "percent"))
    parts = zip(rows, estimates, strict=True)
    made = [(Feature(r["feature_id"]), r["label"] or "", e, r["sign_stability"]) for r, e in parts]
    caption = f"{count(len(rows), 'coefficient')} with 95% bootstrap intervals, strongest first. "
    caption += f"Hollow: the interval includes zero ({unsure})."
    yield Table(heads, made, caption, fold=20, sortable=True)
    note = "Same sign: share of bootstrap resamples of the prompts in which the coefficient keeps its sign."
    yield Text(note, "note")


def fit_sentence(policy: Row) -> Sentence | None:
    """How much of the behavior the policy explains on held-out prompts."""
    r2 = read_interval(policy.get("r2"))
    if r2 is None:
        return None
    trivial = baselines(policy)
    beside = listed([f"{interval_text(e)} from {name}" for name, e in trivial], 4)
    against = f", against {beside}" if beside else ""
    said, fails = "", False
    accuracy, majority = (read_interval(policy.get(key)) for key in ("accuracy", "majority"))
    if accuracy is not None and majority is not None:
        gain = read_interval(policy.get("accuracy_gain")) or Interval(accuracy.value - majority.value)
        fails = gain.value <= 0 if math.isnan(gain.lo) else gain.lo <= 0
        said = (
            f" With a threshold it is right on {percent(accuracy.value, 1)} of them, against "
            f"{percent(majority.value, 1)} for always naming the larger class: {interval_text(scaled(gain, 100), 1)} "
            f"points more{', no gain that can be told from zero.' if fails else '.'}"
        )
    if r2.lo <= 0:
        text = f"{NOTHING}: what the policy explains on held-out prompts cannot be told from zero"
        return Sentence("Fit", "none", f"{text} (R²\u00a0{interval_text(r2)}){against}.{said}")
    text = (
        f"On held-out prompts the policy of {count(policy['d'], 'feature')} explains {percent(r2.value)} of the "
        f"variance of the behavior (R²\u00a0{interval_text(r2)}){against}.{said}"
    )
    low = r2.value if math.isnan(r2.lo) else r2.lo
    rivals = [name for name, e in trivial if not low > (e.value if math.isnan(e.hi) else e.hi)]
    if rivals:
        do = "does" if len(rivals) == 1 else "do"
        text += f" Caution: {listed(rivals)} {do} about as well, so the features may add nothing."
    return Sentence("Fit", "caution" if rivals or fails else "found", text)


def baselines(policy: Row) -> list[tuple[str, Interval]]:
    """Held-out R² of the trivial predictors, with a readable name each."""
    found = []
    for name, record in (policy.get("baselines") or {}).items():
        estimate = read_interval(record.get("r2", record) if isinstance(record, dict) else record)
        if estimate is not None:
            found.append((BASELINES.get(name, name.replace("_", " ")), estimate))
    return found


def _sentences(tables: Tables) -> list[Sentence | None]:
    return [fit_sentence(tables.json("policy"))]


add(Section("policy", "Policy", ("coefficients", "policy"), _blocks, _sentences, overview=True))
