"""What editing each feature in the model does to the behavior, beside its coefficient."""

from __future__ import annotations

from collections.abc import Iterator

from taught.report.blocks import Block, Column, Feature, Sentence, Table, Text, columns
from taught.report.detail import feature_labels
from taught.report.sections import Section, add
from taught.report.tables import Row, Tables
from taught.report.text import count, interval_of, interval_text, percent, read_interval, shorten

AGREEMENTS = {
    "all": "all features",
    "sure": "coefficients whose interval excludes 0",
    "clear": "features that move y more than random directions",
    "predicted": "all features, against what the policy predicts of the edit itself",
    "control": "one random direction a feature (control)",
}
MEASURES = ("same_sign", "spearman", "size")


def _blocks(tables: Tables) -> Iterator[Block]:
    it = tables.json("clamp")
    yield Text(
        "Each feature’s part of the residual is scaled in the model, at the tokens at which the policy reads it, and "
        "the behavior is read again. A coefficient says what a feature predicts beside the others; the slope says "
        "what its direction does. If coefficients were causes, they would be equal. "
        f"{it['clear']} of {count(it['active'], 'active feature')} move the behavior more than {it['controls']} random "
        "directions of the same size."
    )
    measures = (Column(name, "interval") for name in ("Same sign", "Rank correlation", "Seen per predicted"))
    rows = [
        [AGREEMENTS.get(name, name), found["n"], *(read_interval(found[key]) for key in MEASURES)]
        for name, found in it["agreement"].items()
    ]
    caption = (
        "Agreement of slopes with coefficients, 95% intervals (same sign: exact binomial; the others: bootstrap over "
        "features)"
    )
    yield Table(columns("Over", ("Features", "number", 0), *measures), rows, caption)
    scales, labels = it["scales"], feature_labels(tables)
    label, slope = Column("Label", only="page"), Column("Slope", "interval", plot="fit")
    heads = columns(("Feature", "id"), label, ("Coefficient", "signed"), slope, ("p", "p"), ("Prompts", "number", 0))
    made = []
    for r in sorted(tables.rows("clamp"), key=lambda r: -abs(r["coef"])):
        found = interval_of(r, "slope") or "not active on any prompt"
        doses = [d["value"] for d in r.get("doses") or []] or [None] * len(scales)
        named = Feature(r["feature_id"]), shorten(labels.get(r["feature_id"], ""), 60)
        made.append([*named, r["coef"], found, r.get("p_adjusted"), r["n"], *doses])
    caption = (
        "Slope: change of y per unit of activation, 95% bootstrap over prompts on which the feature is active; mean "
        "change of y at each scale; p against random directions, corrected for the number of features"
    )
    yield Table([*heads, *(Column(f"{s:g}×", "signed") for s in scales)], made, caption, tall=True)


def clamp_sentence(clamping: Row) -> Sentence | None:
    """Whether editing a feature in the model moves the behavior as its coefficient says."""
    agreed = clamping["agreement"]["all"]
    same, rank, size = (read_interval(agreed[k]) for k in MEASURES)
    if same is None:
        return None
    scales = clamping["scales"]
    text = (
        f"Scaling a feature's part of the residual by {min(scales):g} to {max(scales):g} moves the "
        f"behavior to the side of the coefficient for {percent(same.value)} of "
        f"{count(agreed['n'], 'feature')} (95% {percent(same.lo)} to {percent(same.hi)})"
    )
    text += f", by {interval_text(size)} of what the coefficients say" if size else ""
    text += f"; rank correlation with the coefficients {interval_text(rank)}." if rank else "."
    text += f" {clamping['clear']} of them move it more than random directions of the same size do "
    text += "(corrected for their number)."
    shown = same.lo > 0.5 and clamping["clear"]
    text += "" if shown else " So the coefficients are not shown to be causes: read them as predictors."
    return Sentence("Clamping", "found" if shown else "caution", text)


def _sentences(tables: Tables) -> list[Sentence | None]:
    return [clamp_sentence(tables.json("clamp"))]


add(Section("clamp", "Clamping", ("coefficients", "clamp"), _blocks, _sentences, overview=True))
