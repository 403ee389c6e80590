"""Curation: which examples to drop, by a rule that is decided for each id alone.

*Paper's rule* (SMDA, arXiv 2606.29171): drop an example of the positive label (that should teach the behavior:
harmful-refusal) whose score is below the median score of the negative label's (that should teach its absence:
harmless-compliance), and one of the negative label whose score is above the median of the positive label's. Equal to
the median: kept. Examples with another label are kept, since the rule has no threshold for them.

*top-k*: drop the k examples that raise the chosen target most, such as the behavior on the harmless
group (over-refusal). *keep-k*: keep the k safest, those that raise it least; drop the others. *swap-k*: exchange
the chosen and the rejected answer of the k preferences that raise it most. A preference with u = beta (s + reference)
loses softplus(u) (:class:`taught.core.example.Dpo`) and pulls at the model with the slope sigma(u); exchanged it
pulls the other way with sigma(-u). So exchanging moves the target by -influence (sigma(u) + sigma(-u)) / sigma(u)
= -influence / sigma(u): at the reference, where u = 0, by twice what dropping does.

*Protection.* Removing an example takes its influence away: the target moves by minus the influence. So
under these three an example may be dropped only if its influence on the protected target is at
most 0, and what is dropped, one example or all of them, does not lower that target to first order.
Where fewer examples may be dropped than the rule asks for, these are dropped and no others.

No decision goes through a mask over rows: in a public reimplementation a wrong boolean mask
changed 101 of 200 decisions unnoticed.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any, Literal, NamedTuple

from taught.errors import UserError, misfit, refuse, refuse_repeated
from taught.stats.arrays import refuse_nonfinite

RANKED = ("top-k", "keep-k", "swap-k")


class Decision(NamedTuple):
    """What happens to one example, and why."""

    action: Literal["keep", "drop", "swap"]
    reason: str
    threshold: float | None


class Outcome(NamedTuple):
    """What all decisions come to.

    Attributes
    ----------
    dropped : how many examples, or how many are exchanged
    missing : how many more the rule asked for, and protection does not let go
    change : predicted change of the target when that is done: for those that are dropped the sum of minus their
        influence; unit: of the target, one step an example at the run's lr
    protected_change : the same of the protected target, never below 0; None without protection
    """

    dropped: int
    missing: int
    change: float
    protected_change: float | None


def curate(
    example_ids: Sequence[str],
    labels: Sequence[str | None],
    scores: Sequence[float],
    *,
    rule: str = "paper",
    k: int | None = None,
    target: str = "score",
    protect: str | None = None,
    protected: Sequence[float] | None = None,
    slopes: Sequence[float] | None = None,
    positive_label: str | None = None,
    negative_label: str | None = None,
) -> list[dict[str, Any]]:
    """Decide for every example whether to keep it.

    Parameters
    ----------
    example_ids, labels, scores : length P; scores are the influence on the target, positive: training on the example
        raises it. Labels are needed by the paper's rule only.
    rule : {"paper", "top-k", "keep-k", "swap-k"}
    k : how many examples to drop under ``top-k``, to keep under ``keep-k``, to exchange under ``swap-k``; ties at the
        border go to the smaller id
    target : what ``scores`` are the influence on; only named in the result
    protect, protected : a second target, but for the paper's rule, and the influence on it, length P: only
        examples whose influence on it is at most 0 are dropped or exchanged
    slopes : under ``swap-k`` sigma(u) of every preference, length P, above 0 and below 1
    positive_label, negative_label : of the examples that should teach the behavior, and of those that should teach its
        absence

    Returns
    -------
    list of dict, in the order of ``example_ids``
        ``example_id``, ``action`` (``keep``, ``drop`` or ``swap``), ``rule``, ``target``, ``reason`` (a sentence with
        the numbers), ``score`` (the influence on the target), ``change`` (predicted, of the target, by the action; 0
        for what is kept), ``threshold`` (None for a label without one), ``protect``, ``protect_score`` and
        ``protect_change`` (the protected target, the influence on it and its change, or None).

    Raises
    ------
    UserError
        Ids repeat, lengths differ, a score is not finite, a label is missing (examples are named), one of the two
        labels does not occur, k does not fit, a target is protected that the rule does not look at, or examples are to
        be exchanged that are no preferences.
    """
    if not len(example_ids) == len(labels) == len(scores):
        given = {"examples": example_ids, "labels": labels, "scores": scores}
        raise misfit("examples, labels and scores", "one of each per example", **given)
    refuse_repeated(example_ids, "an example id")
    _check_scores(example_ids, scores)
    score = {example: float(value) for example, value in zip(example_ids, scores, strict=True)}
    guard = None
    if protect is not None:
        if rule not in RANKED or protect == target or protected is None:
            raise UserError(
                "this target cannot be protected",
                value=protect,
                rule="a second target beside the one that examples are ranked by, under the rule "
                + " or ".join(RANKED),
                fix="name another target, or leave protect out",
            )
        _check_scores(example_ids, protected)
        guard = {example: float(value) for example, value in zip(example_ids, protected, strict=True)}
    if rule == "paper":
        decisions = _by_medians(dict(zip(example_ids, labels, strict=True)), score, positive_label, negative_label)
    elif rule in RANKED:
        if (rule == "swap-k") != (slopes is not None):
            needs, fix = "an example with a chosen and a rejected answer", "use the rule top-k"
            raise UserError("only preferences can be exchanged", value=rule, rule=needs, fix=fix)
        decisions = _by_rank(score, rule, k, target, guard, protect)
    else:
        raise UserError("this curation rule is unknown", value=rule, rule=", ".join(("paper", *RANKED)))
    about = {"rule": rule, "target": target, "protect": protect}
    rows = []
    for place, example in enumerate(example_ids):
        share = 1.0 if slopes is None else 1.0 / float(slopes[place])
        if decisions[example].action == "keep":
            share = 0.0
        held = None if guard is None else guard[example]
        values = {
            "score": score[example],
            "change": -share * score[example],
            "protect_score": held,
            "protect_change": None if held is None else -share * held,
        }
        rows.append({"example_id": example, **decisions[example]._asdict(), **about, **values})
    return rows


def outcome(decisions: Sequence[Mapping[str, Any]], k: int | None = None) -> Outcome:
    """Add up the rows of :func:`curate`; ``k`` as there."""
    dropped = [row for row in decisions if row["action"] != "keep"]
    rule = decisions[0]["rule"] if decisions else None
    wanted = len(dropped)
    if k is not None and rule in RANKED:
        wanted = len(decisions) - k if rule == "keep-k" else k
    guarded = bool(decisions) and decisions[0]["protect"] is not None
    return Outcome(
        len(dropped),
        wanted - len(dropped),
        math.fsum(row["change"] for row in dropped),
        math.fsum(row["protect_change"] for row in dropped) if guarded else None,
    )


def _by_medians(
    label: Mapping[str, str | None], score: Mapping[str, float], positive: str | None, negative: str | None
) -> dict[str, Decision]:
    """The paper's rule: each of the two labels against the median of the other."""
    # A table reader turns a missing label into None or into a float nan.
    missing = [example for example, own in label.items() if not (isinstance(own, str) and own)]
    what = f"the label is missing for {len(missing)} examples"
    fix = "add a label to these examples, or use the rule top-k"
    refuse(missing, what, rule="the paper's rule needs them all", fix=fix)
    medians: dict[str | None, float] = {}
    for name in (positive, negative):
        values = [score[i] for i, own in label.items() if own == name]
        if name is None or not values:
            raise UserError(
                f"no example has the label {name!r}",
                value="labels: " + ", ".join(sorted(map(str, set(label.values())))),
                rule=f"the paper's rule compares {positive} with {negative}",
                fix="set examples.positive_label and examples.negative_label, or use the rule top-k",
            )
        medians[name] = median(values)
    # own label -> the label that it is compared with, and on which side of its median it is dropped
    sides = {positive: (negative, -1, "below"), negative: (positive, 1, "above")}
    decisions = {}
    for example, own in label.items():
        if own not in sides:
            decisions[example] = Decision("keep", f"the rule has no threshold for the label {own!r}", None)
            continue
        other, sign, side = sides[own]
        threshold, value = medians[other], score[example]
        drop = sign * (value - threshold) > 0
        reason = f"score {value:.4g} of a {own} example {'is' if drop else 'is not'} {side} the {other} median"
        decisions[example] = Decision("drop" if drop else "keep", f"{reason} {threshold:.4g}", threshold)
    return decisions


def _by_rank(
    score: Mapping[str, float],
    rule: str,
    k: int | None,
    target: str,
    guard: Mapping[str, float] | None,
    protect: str | None,
) -> dict[str, Decision]:
    """Rank those that may be dropped: under top-k the highest first, which go, under keep-k the lowest, which stay."""
    keeps = rule == "keep-k"
    deed: Literal["drop", "swap"] = "swap" if rule == "swap-k" else "drop"
    done = f"{deed}ped"
    if k is None or not 0 <= k <= len(score):
        what, fix = f"the rule {rule} needs a number of examples to {'keep' if keeps else deed}", "set curation.k"
        raise UserError(what, value=str(k), rule=f"0 <= k <= {len(score)}", fix=fix)
    free = [example for example in score if guard is None or guard[example] <= 0]
    ranking = sorted(free, key=lambda example: (score[example] if keeps else -score[example], example))
    wanted = len(score) - k if keeps else k
    n_drop = min(wanted, len(free))
    first = len(free) - n_drop if keeps else n_drop
    threshold = score[ranking[first - 1]] if first else None
    order = " from the lowest" if keeps else ""
    end = f"; the first {first} are {'kept' if keeps else done}"
    if n_drop < wanted:
        end += f", since only {n_drop} of the {wanted} examples asked for may be {done}"
    decisions = {}
    for rank, example in enumerate(ranking, start=1):
        reason = f"{target} {score[example]:.4g} ranks {rank} of {len(free)}{order}"
        if guard is not None:
            reason += f" that may be {done} ({protect} {guard[example]:.4g} is not above 0)"
        action: Literal["keep", "drop", "swap"] = "keep" if keeps == (rank <= first) else deed
        decisions[example] = Decision(action, reason + end, threshold)
    for example, held in (guard or {}).items():
        if example not in decisions:
            reason = f"{protect} {held:.4g} is above 0, {deed}ping the example would lower it"
            decisions[example] = Decision("keep", f"{reason}; {target} {score[example]:.4g}", threshold)
    return decisions


def _check_scores(example_ids: Sequence[str], scores: Sequence[float]) -> None:
    if len(example_ids) != len(scores):
        what = "examples and their influence on the protected target"
        raise misfit(what, "one per example", examples=example_ids, values=scores)
    refuse_nonfinite(example_ids, scores, "score")
