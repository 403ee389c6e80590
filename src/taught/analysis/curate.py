"""Curation: which examples to drop, by a rule that is decided for each id alone.

*Paper's rule* (SMDA, arXiv 2606.29171): drop a harmful-refusal example whose score is below the
median score of the harmless-compliance examples, and a harmless-compliance example whose score is above
the median score of the harmful-refusal examples. Equal to the median: kept. Examples with another label
are kept, since the rule has no threshold for them.

*top-k*: drop the k examples that raise the chosen target most, such as the mean y of the harmless
group (over-refusal). *keep-k*: keep the k safest, those that raise it least; drop the others.

*Protection.* Removing an example takes its influence away: the target moves by minus the influence. So
under top-k and keep-k an example may be dropped only if its influence on the protected target is at
most 0, and what is dropped, one example or all of them, does not lower that target to first order.
Where fewer examples may be dropped than the rule asks for, these are dropped and no others.

No decision goes through a mask over rows: in a public reimplementation a wrong boolean mask
changed 101 of 200 decisions unnoticed.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any, Literal, NamedTuple

from taught.errors import UserError

RANKED = ("top-k", "keep-k")


class Decision(NamedTuple):
    """What happens to one example, and why."""

    action: Literal["keep", "drop"]
    reason: str
    threshold: float | None


class Outcome(NamedTuple):
    """What all decisions come to.

    Attributes
    ----------
    dropped : how many examples
    missing : how many more the rule asked for, and protection does not let go
    change : predicted change of the target when the dropped examples are not trained on: the sum over
        them of minus their influence; unit: of the target, one step an example at the run's lr
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
    refusal_label: str = "harmful-refusal",
    compliance_label: str = "harmless-compliance",
) -> list[dict[str, Any]]:
    """Decide for every example whether to keep it.

    Parameters
    ----------
    example_ids, labels, scores : length P
        ``scores`` are the influence on the target: positive means that training on the example raises
        it. Labels are needed by the paper's rule only.
    rule : {"paper", "top-k", "keep-k"}
    k
        How many examples to drop under ``top-k``, to keep under ``keep-k``; ties at the border go to
        the smaller example id.
    target
        What ``scores`` are the influence on; only named in the result.
    protect, protected
        A second target under ``top-k`` and ``keep-k``, and the influence on it, length P: only
        examples whose influence on it is at most 0 are dropped.

    Returns
    -------
    list of dict, in the order of ``example_ids``
        ``example_id``, ``action`` (``keep`` or ``drop``), ``rule``, ``target``, ``reason`` (a sentence
        with the numbers), ``score`` (the influence on the target), ``threshold`` (None for a label
        without one), ``protect`` and ``protect_score`` (the protected target and the influence on
        it, or None).

    Raises
    ------
    UserError
        Ids repeat, lengths differ, a score is not finite, a label is missing (examples are named),
        one of the two labels does not occur, k does not fit, or a target is protected that the rule
        does not look at.
    """
    _check(example_ids, labels, scores)
    score = {example: float(value) for example, value in zip(example_ids, scores, strict=True)}
    guard = _guard(example_ids, rule, target, protect, protected)
    if rule == "paper":
        label = _known_labels(example_ids, labels)
        medians = _medians(label, score, refusal_label, compliance_label)
        decisions = {
            example: paper_decision(
                label[example], score[example], medians, refusal_label=refusal_label, compliance_label=compliance_label
            )
            for example in score
        }
    elif rule in RANKED:
        decisions = _by_rank(score, rule, k, target, guard, protect)
    else:
        raise UserError("this curation rule is unknown", value=rule, rule="paper, top-k or keep-k")
    return [
        {
            "example_id": example,
            "action": decisions[example].action,
            "rule": rule,
            "target": target,
            "reason": decisions[example].reason,
            "score": score[example],
            "threshold": decisions[example].threshold,
            "protect": protect,
            "protect_score": None if guard is None else guard[example],
        }
        for example in example_ids
    ]


def outcome(decisions: Sequence[Mapping[str, Any]], k: int | None = None) -> Outcome:
    """Add up the rows of :func:`curate`; ``k`` as there."""
    dropped = [row for row in decisions if row["action"] == "drop"]
    rule = decisions[0]["rule"] if decisions else None
    wanted = len(dropped)
    if k is not None and rule in RANKED:
        wanted = k if rule == "top-k" else len(decisions) - k
    guarded = bool(decisions) and decisions[0]["protect"] is not None
    return Outcome(
        len(dropped),
        wanted - len(dropped),
        math.fsum(-row["score"] for row in dropped),
        math.fsum(-row["protect_score"] for row in dropped) if guarded else None,
    )


def paper_decision(
    label: str, score: float, medians: Mapping[str, float], *, refusal_label: str, compliance_label: str
) -> Decision:
    """Apply the rule to one example; ``medians`` maps the two labels to their median scores."""
    if label == refusal_label:
        other, threshold = compliance_label, medians[compliance_label]
        drop, side = score < threshold, "below"
    elif label == compliance_label:
        other, threshold = refusal_label, medians[refusal_label]
        drop, side = score > threshold, "above"
    else:
        return Decision("keep", f"the rule has no threshold for the label {label!r}", None)
    verb = "is" if drop else "is not"
    reason = f"score {score:.4g} of a {label} example {verb} {side} the {other} median {threshold:.4g}"
    return Decision("drop" if drop else "keep", reason, threshold)


def _medians(label: Mapping[str, str], score: Mapping[str, float], *names: str) -> dict[str, float]:
    medians = {}
    for name in names:
        values = [score[example] for example in score if label[example] == name]
        if not values:
            raise UserError(
                f"no example has the label {name!r}",
                value="labels: " + ", ".join(sorted(set(label.values()))),
                rule="the paper's rule compares " + " with ".join(names),
                fix="name your labels, or use the rule top-k",
            )
        medians[name] = median(values)
    return medians


def _by_rank(
    score: Mapping[str, float],
    rule: str,
    k: int | None,
    target: str,
    guard: Mapping[str, float] | None,
    protect: str | None,
) -> dict[str, Decision]:
    """Rank the examples that may be dropped: under top-k the first of them go, under keep-k the last.

    Under top-k the highest stands first, under keep-k the lowest.
    """
    keeps = rule == "keep-k"
    if k is None or not 0 <= k <= len(score):
        raise UserError(
            f"the rule {rule} needs a number of examples to {'keep' if keeps else 'drop'}",
            value=str(k),
            rule=f"0 <= k <= {len(score)}",
            fix="set curation.k",
        )
    free = [example for example in score if guard is None or guard[example] <= 0]
    ranking = sorted(free, key=lambda example: (score[example] if keeps else -score[example], example))
    wanted = len(score) - k if keeps else k
    n_drop = min(wanted, len(free))
    first = len(free) - n_drop if keeps else n_drop
    threshold = score[ranking[first - 1]] if first else None
    order = " from the lowest" if keeps else ""
    end = f"; the first {first} are {'kept' if keeps else 'dropped'}"
    if n_drop < wanted:
        end += f", since only {n_drop} of the {wanted} examples asked for may be dropped"
    decisions = {}
    for rank, example in enumerate(ranking, start=1):
        reason = f"{target} {score[example]:.4g} ranks {rank} of {len(free)}{order}"
        if guard is not None:
            reason += f" that may be dropped ({protect} {guard[example]:.4g} is not above 0)"
        action: Literal["keep", "drop"] = "keep" if keeps == (rank <= first) else "drop"
        decisions[example] = Decision(action, reason + end, threshold)
    for example, held in (guard or {}).items():
        if example not in decisions:
            reason = f"{protect} {held:.4g} is above 0, dropping the example would lower it"
            decisions[example] = Decision("keep", f"{reason}; {target} {score[example]:.4g}", threshold)
    return decisions


def _guard(
    example_ids: Sequence[str], rule: str, target: str, protect: str | None, protected: Sequence[float] | None
) -> dict[str, float] | None:
    """Pair -> influence on the protected target; None without one."""
    if protect is None:
        return None
    if rule not in RANKED or protect == target or protected is None:
        raise UserError(
            "this target cannot be protected",
            value=protect,
            rule="a second target beside the one that examples are ranked by, under the rule " + " or ".join(RANKED),
            fix="name another target, or leave protect out",
        )
    _check_scores(example_ids, protected)
    return {example: float(value) for example, value in zip(example_ids, protected, strict=True)}


def _check(example_ids: Sequence[str], labels: Sequence[str | None], scores: Sequence[float]) -> None:
    if not len(example_ids) == len(labels) == len(scores):
        raise UserError(
            "every example needs a label and a score",
            value=f"{len(example_ids)} examples, {len(labels)} labels, {len(scores)} scores",
            rule="one of each per example",
        )
    repeated = sorted(example for example, count in Counter(example_ids).items() if count > 1)
    if repeated:
        raise UserError("an example id repeats", value=", ".join(repeated), rule="ids are unique")
    _check_scores(example_ids, scores)


def _check_scores(example_ids: Sequence[str], scores: Sequence[float]) -> None:
    if len(example_ids) != len(scores):
        raise UserError(
            "every example needs an influence on the protected target",
            value=f"{len(example_ids)} examples, {len(scores)} values",
            rule="one per example",
        )
    bad = [p for p, value in zip(example_ids, scores, strict=True) if not math.isfinite(value)]
    if bad:
        raise UserError(
            f"the score is not finite for {len(bad)} examples",
            value=", ".join(bad),
            rule="every score is a finite number",
            fix="look at these examples' loss in examples.parquet",
        )


def _known_labels(example_ids: Sequence[str], labels: Sequence[str | None]) -> dict[str, str]:
    # A table reader turns a missing label into None or into a float nan.
    known = {p: label for p, label in zip(example_ids, labels, strict=True) if isinstance(label, str) and label}
    missing = [example for example in example_ids if example not in known]
    if missing:
        raise UserError(
            f"the label is missing for {len(missing)} examples",
            value=", ".join(missing),
            rule="the paper's rule needs every example's label",
            fix="add a label to these examples, or use the rule top-k",
        )
    return known
