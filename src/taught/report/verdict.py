"""The result in a few plain sentences, with numbers and intervals and no causal overclaim.

Every function is pure: tables in, one :class:`Sentence` out (or None when its tables are missing).
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

from taught.report.compared import removal_sentence
from taught.report.scores import Curated, Scores
from taught.report.stats import Control, Estimate, mean_interval, spearman_interval
from taught.report.text import common_power, count, listed, number, percent, signed, tens
from taught.report.view import Row, Rows, View

Tone = Literal["found", "none", "caution"]
NOTHING = "No effect found"
STRONG = 0.5  # rank correlation from which a trivial predictor gives much of the ranking
STEP_TOLERANCE = 0.05  # between S and a real step
RELIABLE = 0.95  # correlation with the exact S from which a ranking by sketches is taken as it is
NEGLIGIBLE = 0.02  # of the largest |S|
MAINLY = 1.5  # one pathway this many times the other carries the score
BASELINES = {"group": "the group label alone", "length": "prompt length alone", "constant": "a constant"}


@dataclass(frozen=True)
class Sentence:
    """One statement of the verdict: what about, how sure, in words."""

    topic: str
    tone: Tone
    text: str


def verdict(view: View) -> list[Sentence]:
    """All sentences that the files of the run allow, at most thirteen."""
    summary = scored(view.summary or [])
    sentences = [
        view.policy and fit_sentence(view.policy),
        view.faithfulness and trust_sentence(view.faithfulness["checks"]),
        view.clamping and clamp_sentence(view.clamping),
        view.audit and audit_sentence(view.audit, positive_group(view)),
        summary and push_sentence(summary),
        summary and label_sentence(view.scores.finite),
        summary and step_sentence(summary),
        summary and sketch_sentence(view.scores.finite),
        view.statements and ranking_sentence(view.statements),
        view.control and unintended_sentence(view.control),
        summary and trivial_sentence(view.scores.finite),
        view.curation and curation_sentence(view.curation),
        retraining_sentence(view),
    ]
    return [s for s in sentences if isinstance(s, Sentence)]


def scored(summary: Rows) -> Rows:
    """Examples that have a score; the others gave a loss that is not finite."""
    return [r for r in summary if r["score"] is not None and math.isfinite(r["score"])]


def fit_sentence(policy: Row) -> Sentence | None:
    """How much of the behavior the policy explains on held-out prompts."""
    r2 = Estimate.of(policy.get("r2"))
    if r2 is None:
        return None
    trivial = baselines(policy)
    beside = listed([f"{e.text()} from {name}" for name, e in trivial], 4)
    against = f", against {beside}" if beside else ""
    accuracy, accuracy_fails = _accuracy(policy)
    if r2.lo is not None and r2.lo <= 0:
        text = f"{NOTHING}: what the policy explains on held-out prompts cannot be told from zero"
        return Sentence("Fit", "none", f"{text} (R²\u00a0{r2.text()}){against}.{accuracy}")
    text = (
        f"On held-out prompts the policy of {count(policy['d'], 'feature')} explains "
        f"{percent(r2.value)} of the variance of the behavior (R²\u00a0{r2.text()}){against}."
        f"{accuracy}"
    )
    rivals = [name for name, e in trivial if not _beats(r2, e)]
    if rivals:
        do = "does" if len(rivals) == 1 else "do"
        text += f" Caution: {listed(rivals)} {do} about as well, so the features may add nothing."
    return Sentence("Fit", "caution" if rivals or accuracy_fails else "found", text)


def baselines(policy: Row) -> list[tuple[str, Estimate]]:
    """Held-out R² of the trivial predictors, with a readable name each."""
    found = []
    for name, record in (policy.get("baselines") or {}).items():
        inner = record.get("r2", record) if isinstance(record, dict) else record
        estimate = Estimate.of(inner)
        if estimate is not None:
            found.append((BASELINES.get(name, name.replace("_", " ")), estimate))
    return found


def _beats(ours: Estimate, theirs: Estimate) -> bool:
    low = ours.value if ours.lo is None else ours.lo
    high = theirs.value if theirs.hi is None else theirs.hi
    return low > high


def _accuracy(policy: Row) -> tuple[str, bool]:
    accuracy, majority = (Estimate.of(policy.get(key)) for key in ("accuracy", "majority"))
    if accuracy is None or majority is None:
        return "", False
    gain = Estimate.of(policy.get("accuracy_gain")) or Estimate(accuracy.value - majority.value)
    text = (
        f" With a threshold it is right on {percent(accuracy.value, 1)} of them, against "
        f"{percent(majority.value, 1)} for always naming the larger class: "
        f"{gain.scaled(100).text(1)} points more"
    )
    fails = gain.value <= 0 if gain.lo is None else gain.lo <= 0
    return text + (", no gain that can be told from zero." if fails else "."), fails


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


AGREEMENTS = {
    "all": "all features",
    "sure": "coefficients whose interval excludes 0",
    "clear": "features that move y more than random directions",
    "predicted": "all features, against what the policy predicts of the edit itself",
    "control": "one random direction a feature (control)",
}


def clamp_sentence(clamping: Row) -> Sentence | None:
    """Whether editing a feature in the model moves the behavior as its coefficient says."""
    agreed = clamping["agreement"]["all"]
    same, rank, size = (Estimate.of(agreed[k]) for k in ("same_sign", "spearman", "size"))
    if same is None:
        return None
    scales = clamping["scales"]
    text = (
        f"Scaling a feature's part of the residual by {min(scales):g} to {max(scales):g} moves the "
        f"behavior to the side of the coefficient for {percent(same.value)} of "
        f"{count(agreed['n'], 'feature')} (95% {percent(same.lo)} to {percent(same.hi)})"
    )
    text += f", by {size.text()} of what the coefficients say" if size else ""
    text += f"; rank correlation with the coefficients {rank.text()}." if rank else "."
    text += (
        f" {clamping['clear']} of them move it more than random directions of the same size do "
        "(corrected for their number)."
    )
    if not (same.lo or 0) > 0.5 or not clamping["clear"]:
        text += " So the coefficients are not shown to be causes: read them as predictors."
        return Sentence("Clamping", "caution", text)
    return Sentence("Clamping", "found", text)


def audit_sentence(audit: Rows, positive: str | None = None) -> Sentence:
    """Which categories the policy does not cover, and where the behavior shows up uncalled for.

    Parameters
    ----------
    audit
        Rows of ``audit.parquet``.
    positive
        The group that should show the behavior; None: all groups count as such.
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
    gap = f"mean y {_gap(row).text()} against the rest of its group"
    return f"{row['category']} ({gap}, adjusted {_p(row['p_adjusted'])}, n = {row['n']})"


def _gap(row: Row) -> Estimate:
    return Estimate(row["gap"], row.get("lo"), row.get("hi"))


def _p(p: float) -> str:
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}"


def push_sentence(summary: Rows) -> Sentence | None:
    """The examples that push the policy most, and along which pathway."""
    if not summary:
        return None
    power = common_power(r["score"] for r in summary)
    top, bottom = max(summary, key=lambda r: r["score"]), min(summary, key=lambda r: r["score"])
    largest = max(top["score"], -bottom["score"])
    if largest <= 0:
        return Sentence("Examples", "none", f"{NOTHING}: every example has a score of zero.")
    parts = []
    for row, size, does in (
        (top, top["score"], "pushes the policy along itself"),
        (bottom, -bottom["score"], "pushes against it" if top["score"] > 0 else "pushes against the policy"),
    ):
        if size >= NEGLIGIBLE * largest:
            parts.append(_pushed(row, f"{does} most", power))
        else:
            first = "no" if parts else "No"
            parts.append(f"{first} example {does} by more than {percent(NEGLIGIBLE)} of the largest |S|")
    ending = "That an example strengthens the policy does not by itself mean more of the behavior."
    text = "; ".join(parts)
    return Sentence("Examples", "found", f"{text}. {ending}{_direct(summary)}")


def _direct(summary: Rows) -> str:
    """The example that changes the behavior itself most, by group of prompts."""
    groups = [k.removeprefix("mean_y_") for k in summary[0] if k.startswith("mean_y_")]
    sizes = [max((abs(r[f"mean_y_{g}"] or 0.0) for g in groups), default=0.0) for r in summary]
    if not max(sizes):
        return ""
    row = summary[sizes.index(max(sizes))]
    power = common_power(sizes)
    changes = [f"{signed(row[f'mean_y_{g}'], power=power)}{tens(power)} on {g}" for g in groups]
    return (
        f" The behavior itself moves most with {row['example_id']} ({row['label']}): mean y "
        f"{listed(changes)} prompts, per step."
    )


def _pushed(row: Row, does: str, power: int) -> str:
    x, y = (signed(row[k], power=power) for k in ("score_x", "score_y"))
    total = f"{signed(row['score'], power=power)}{tens(power)}"
    through = _through(row["score_x"], row["score_y"])
    name = f"{row['example_id']} ({row['label']})"
    return f"{name} {does}: S\u00a0=\u00a0{total} per step, {through} (x {x}, y {y})"


def _through(x: float, y: float) -> str:
    if abs(x) > MAINLY * abs(y):
        return "mainly through feature activation"
    if abs(y) > MAINLY * abs(x):
        return "mainly through output probability"
    return "through both pathways"


def label_sentence(scores: Scores) -> Sentence | None:
    """The mean score of each label with its interval, and the share of each pathway."""
    if len(scores.names) > 4:
        return None
    means = {name: mean_interval(scores.own(name, "score")) for name in scores.names}
    known = {name: e for name, e in means.items() if e is not None}
    if not known:
        return None
    power = common_power([end for e in known.values() for end in (e.value, e.lo, e.hi)])
    parts = [
        f"{name} examples average S\u00a0=\u00a0{e.text(power=power)}{tens(power)}"
        + (f" ({NOTHING.lower()}: the interval includes zero)" if e.includes_zero else "")
        for name, e in known.items()
    ]
    x, y = (float(np.abs(scores.columns[f"score_{k}"]).sum()) for k in ("x", "y"))
    share = ""
    if x + y > 0:
        share = f" {percent(y / (x + y))} of the absolute effect runs through output probability, "
        share += f"{percent(x / (x + y))} through feature activation."
    tone: Tone = "none" if all(e.includes_zero for e in known.values()) else "found"
    return Sentence("Pathways", tone, f"{'; '.join(parts)}.{share}")


def positive_group(view: View) -> str | None:
    """The group of prompts that should show the behavior."""
    return (view.study.get("prompts") or {}).get("positive_group")


def unintended_sentence(control: Control) -> Sentence:
    """How many examples act mainly on features that they are not about."""
    lo, hi = control.random.lo, control.random.hi
    text = (
        f"{control.flagged} of {count(control.n, 'example')} ({percent(control.flagged / control.n)}) "
        "act mainly on a feature that they are not about; random features of the same number "
        f"would give {control.random.text(0)}"
    )
    if lo is not None and hi is not None and lo <= control.flagged <= hi:
        return Sentence("Interference", "none", f"{NOTHING}: {text}, which is no different.")
    side = "fewer" if control.flagged < control.random.value else "more"
    text += f", so {side} than chance. With the intended features of another example it would be "
    return Sentence("Interference", "found", f"{text}{number(control.swapped, 0)}.")


TRIVIAL = {"n_response": "response length", "loss": "loss"}


def trivial_correlations(scores: Scores) -> list[tuple[str, Estimate]]:
    """Rank correlation of S with response length, loss and, with two labels, the label."""
    columns = {name: scores.columns[key] for key, name in TRIVIAL.items()}
    if len(scores.names) == 2:
        first = min(scores.names)
        is_first = scores.label == scores.names.index(first)
        columns[f"the label ({first} = 1)"] = is_first.astype(np.float64)
    score = scores.columns["score"]
    found = ((name, spearman_interval(score, values)) for name, values in columns.items())
    return [(name, e) for name, e in found if e is not None]


def trivial_sentence(scores: Scores) -> Sentence | None:
    """Whether something trivial ranks the examples as the score does."""
    found = trivial_correlations(scores)
    if not found:
        return None
    parts = listed([f"{e.text()} with {name}" for name, e in found], 4)
    text = f"The score's rank correlation is {parts}."
    strong = [name.split(" (")[0] for name, e in found if abs(e.value) >= STRONG and not e.includes_zero]
    if strong:
        text += f" Caution: {listed(strong)} alone gives much of the same ranking."
        return Sentence("Trivial predictors", "caution", text)
    if all(e.includes_zero for _, e in found):
        text = f"{NOTHING}: every interval includes zero. {text}"
        return Sentence("Trivial predictors", "none", text)
    return Sentence("Trivial predictors", "found", text)


def step_sentence(summary: Rows) -> Sentence | None:
    """How far the linear value is from a real step, on the examples where one was taken.

    Where S is an estimate, these examples have an exact one too, and that is compared.
    """
    rows = [r for r in scored(summary) if r.get("step_score") and r["score"]]
    if not rows:
        return None
    apart = {
        name: max(abs(r[key] / (r.get("exact_score") or r["score"]) - 1) for r in rows)
        for name, key in (("a real step", "step_score"), ("an exact refit", "refit_score"))
        if all(r.get(key) for r in rows)
    }
    differences = " and ".join(f"{percent(value, 1)} ({name})" for name, value in apart.items())
    good = max(apart.values()) <= STEP_TOLERANCE
    text = (
        f"S is the first-order effect of one step. On the {count(len(rows), 'example')} with the "
        f"largest |S| it differs by at most {differences} from what the step does."
    )
    if not good:
        text += f" That is above {percent(STEP_TOLERANCE)}: with a smaller lr it shrinks in proportion."
    return Sentence("Linear value", "found" if good else "caution", text)


def sketch_sentence(scores: Scores) -> Sentence | None:
    """How far the ranking by S can be trusted where S comes from sketches.

    Of the variance of S over the examples, mean(se^2) is the sketches' error; what is left, as a
    share, is the reliability, and its square root the correlation with the exact S to be expected.
    """
    score, se = scores.columns["score"], scores.columns["score_se"]
    if not len(score) or not np.isfinite(se).all():
        return None
    spread = float(np.var(score))
    reliability = max(0.0, 1 - float(np.mean(se**2)) / spread) if spread > 0 else 0.0
    clear = int((np.abs(score) > 2 * se).sum())
    text = (
        f"S is estimated from sketches of gradients. {clear:,} of {count(len(score), 'example')} have "
        "an S more than two standard errors from zero; a correlation of about "
        f"{number(math.sqrt(reliability), 3)} with the exact S is to be expected."
    )
    if reliability**0.5 < RELIABLE:
        text += " Larger sketches (sketch.dim) or the estimator adjoint give a surer ranking."
        return Sentence("Sketches", "caution", text)
    return Sentence("Sketches", "found", text)


RANKED_BY = {"score": "|S|", "score_y": "|S| through output probability"}


def ranked_by(target: str) -> str:
    """What a ranking goes by, in words."""
    return RANKED_BY.get(target, f"|mean y| on {target.removeprefix('mean_y:')}")


def rank_table(statements: Rows) -> tuple[list[int], list[tuple[str, list[str]]]]:
    """The sizes k, and for each ranking a cell per size: safe, or undecided and the share."""
    sizes = sorted({row["k"] for row in statements})
    found = {(row["target"], row["k"]): _ranked(row) for row in statements}
    targets = dict.fromkeys(row["target"] for row in statements)
    return sizes, [(ranked_by(t), [found.get((t, k), "–") for k in sizes]) for t in targets]


def _ranked(row: Row) -> str:
    share = "" if row["share"] is None else f" ({percent(row['share'], 1)})"
    return f"{row['verdict']}{share}"


def ranking_sentence(statements: Rows) -> Sentence:
    """Which sets of strongest examples stay the strongest, and why it is undecided of others."""
    parts, undecided = [], False
    for target in dict.fromkeys(row["target"] for row in statements):
        own = [row for row in statements if row["target"] == target]
        name = ranked_by(target)
        safe = [str(row["k"]) for row in own if row["verdict"] == "safe"]
        open_ = next((row for row in own if row["verdict"] != "safe"), None)
        undecided |= not safe
        text = f"by {name} the top {listed(safe, len(safe))} safe" if safe else f"by {name} none"
        if open_ is not None:
            text += f" (top {open_['k']} undecided: {open_['reason']})"
        parts.append(text)
    text = (
        "That the strongest examples stay the strongest, at 95%, for other prompts of the same kind "
        f"and against the exact refit and the error of sketches: {'; '.join(parts)}."
    )
    return Sentence("Ranking", "caution" if undecided else "found", text)


def curation_sentence(curation: Curated) -> Sentence:
    """What to drop under the study's rule."""
    rule = curation.rule
    rule += "" if curation.target == "score" else f" by {curation.target}"
    rule += f", {curation.protect} protected" if curation.protect else ""
    if not curation.n_drops:
        text = f"The rule “{rule}” keeps all {count(curation.n, 'example')}: nothing to drop."
        return Sentence("Curation", "none", text)
    kinds = sorted(curation.counts.items(), key=lambda item: -item[1]["drop"])
    split = listed([f"{own['drop']} {name}" for name, own in kinds if own["drop"]], 4)
    text = (
        f"The rule “{rule}” suggests to drop {curation.n_drops} of {count(curation.n, 'example')} "
        f"({split}), first of all {listed(curation.farthest)}. It rests on estimates before "
        "training; whether dropping them helps is known only after retraining."
    )
    return Sentence("Curation", "found", text)


def curation_change(record: Row) -> str:
    """What dropping is predicted to do to the target and to the protected one."""
    changes = [(record["target"], record["change"])]
    if record["protect"]:
        changes.append((f"{record['protect']} (protected)", record["protected_change"]))
    parts = []
    for name, change in changes:
        if change is not None:
            power = common_power([change])
            parts.append(f"{name} {signed(change, power=power)}{tens(power)}")
    text = f"{count(record['dropped'], 'example')} to drop."
    if parts:
        text += f" Predicted change without them, one step an example at lr {record['lr']:g}: {', '.join(parts)}."
    if record["change"] is None:
        text += f" {record['target']} ranks examples, and predicts no change."
    if record["missing"]:
        text += f" {count(record['missing'], 'example')} fewer than asked for: the others raise {record['protect']}."
    return text


def retraining_sentence(view: View) -> Sentence | None:
    """What training without the named examples did, at the first budget; None if it was not tried."""
    point = next((row for row in view.curves or [] if row["design"] == "removal"), None)
    if point is None:
        return None
    done = removal_sentence(point, view.study["validation"]["remove_by"])
    if point["lo"] <= 0 <= point["hi"]:
        return Sentence("Retraining", "none", f"{NOTHING}: {done[0].lower()}{done[1:]}.")
    return Sentence("Retraining", "found", f"{done}.")
