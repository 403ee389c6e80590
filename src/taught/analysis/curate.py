"""Curation: which pairs to drop, by a rule that is decided for each id alone.

*Paper's rule* (SMDA, arXiv 2606.29171): drop a harmful-refusal pair whose score is below the
median score of the harmless-compliance pairs, and a harmless-compliance pair whose score is above
the median score of the harmful-refusal pairs. Equal to the median: kept. Pairs with another label
are kept, since the rule has no threshold for them.

*top-k*: drop the k pairs that raise the chosen target most, such as the mean y of the harmless
group (over-refusal).

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


class Decision(NamedTuple):
    """What happens to one pair, and why."""

    action: Literal["keep", "drop"]
    reason: str
    threshold: float | None


def curate(
    pair_ids: Sequence[str],
    labels: Sequence[str | None],
    scores: Sequence[float],
    *,
    rule: str = "paper",
    k: int | None = None,
    target: str = "score",
    refusal_label: str = "harmful-refusal",
    compliance_label: str = "harmless-compliance",
) -> list[dict[str, Any]]:
    """Decide for every pair whether to keep it.

    Parameters
    ----------
    pair_ids, labels, scores : length P
        ``scores`` are the influence on the target: positive means that training on the pair raises
        it. Labels are needed by the paper's rule only.
    rule : {"paper", "top-k"}
    k
        How many pairs to drop under ``top-k``; ties at the border go to the smaller pair id.
    target
        What ``scores`` are the influence on; only named in the result.

    Returns
    -------
    list of dict, in the order of ``pair_ids``
        ``pair_id``, ``action`` (``keep`` or ``drop``), ``rule``, ``target``, ``reason`` (a sentence
        with the numbers), ``score`` (the influence on the target), ``threshold`` (None for a label
        without one).

    Raises
    ------
    UserError
        Ids repeat, lengths differ, a score is not finite, a label is missing (pairs are named),
        one of the two labels does not occur, or k does not fit.
    """
    _check(pair_ids, labels, scores)
    score = {pair: float(value) for pair, value in zip(pair_ids, scores, strict=True)}
    if rule == "paper":
        label = _known_labels(pair_ids, labels)
        medians = _medians(label, score, refusal_label, compliance_label)
        decisions = {
            pair: paper_decision(
                label[pair],
                score[pair],
                medians,
                refusal_label=refusal_label,
                compliance_label=compliance_label,
            )
            for pair in score
        }
    elif rule == "top-k":
        decisions = _top_k(score, k, target)
    else:
        raise UserError("This curation rule is unknown", value=rule, rule="paper or top-k")
    return [
        {
            "pair_id": pair,
            "action": decisions[pair].action,
            "rule": rule,
            "target": target,
            "reason": decisions[pair].reason,
            "score": score[pair],
            "threshold": decisions[pair].threshold,
        }
        for pair in pair_ids
    ]


def paper_decision(
    label: str,
    score: float,
    medians: Mapping[str, float],
    *,
    refusal_label: str,
    compliance_label: str,
) -> Decision:
    """Apply the rule to one pair; ``medians`` maps the two labels to their median scores."""
    if label == refusal_label:
        other, threshold = compliance_label, medians[compliance_label]
        drop, side = score < threshold, "below"
    elif label == compliance_label:
        other, threshold = refusal_label, medians[refusal_label]
        drop, side = score > threshold, "above"
    else:
        return Decision("keep", f"the rule has no threshold for the label {label!r}", None)
    verb = "is" if drop else "is not"
    reason = f"score {score:.4g} of a {label} pair {verb} {side} the {other} median {threshold:.4g}"
    return Decision("drop" if drop else "keep", reason, threshold)


def _medians(label: Mapping[str, str], score: Mapping[str, float], *names: str) -> dict[str, float]:
    medians = {}
    for name in names:
        values = [score[pair] for pair in score if label[pair] == name]
        if not values:
            raise UserError(
                f"No pair has the label {name!r}",
                value="labels: " + ", ".join(sorted(set(label.values()))),
                rule="the paper's rule compares " + " with ".join(names),
                fix="name your labels, or use the rule top-k",
            )
        medians[name] = median(values)
    return medians


def _top_k(score: Mapping[str, float], k: int | None, target: str) -> dict[str, Decision]:
    if k is None or not 0 <= k <= len(score):
        raise UserError(
            "The rule top-k needs a number of pairs to drop",
            value=str(k),
            rule=f"0 <= k <= {len(score)}",
            fix="set curation: k",
        )
    ranking = sorted(score, key=lambda pair: (-score[pair], pair))
    threshold = score[ranking[k - 1]] if k else None
    return {
        pair: Decision(
            "drop" if rank <= k else "keep",
            f"{target} {score[pair]:.4g} ranks {rank} of {len(ranking)}; the first {k} are dropped",
            threshold,
        )
        for rank, pair in enumerate(ranking, start=1)
    }


def _check(pair_ids: Sequence[str], labels: Sequence[str | None], scores: Sequence[float]) -> None:
    if not len(pair_ids) == len(labels) == len(scores):
        raise UserError(
            "Every pair needs a label and a score",
            value=f"{len(pair_ids)} pairs, {len(labels)} labels, {len(scores)} scores",
            rule="one of each per pair",
        )
    repeated = sorted(pair for pair, count in Counter(pair_ids).items() if count > 1)
    if repeated:
        raise UserError("A pair id repeats", value=", ".join(repeated), rule="ids are unique")
    bad = [p for p, value in zip(pair_ids, scores, strict=True) if not math.isfinite(value)]
    if bad:
        raise UserError(
            f"The score is not finite for {len(bad)} pairs",
            value=", ".join(bad),
            rule="every score is a finite number",
            fix="look at these pairs' loss in pairs.parquet",
        )


def _known_labels(pair_ids: Sequence[str], labels: Sequence[str | None]) -> dict[str, str]:
    # A table reader turns a missing label into None or into a float nan.
    known = {
        p: label
        for p, label in zip(pair_ids, labels, strict=True)
        if isinstance(label, str) and label
    }
    missing = [pair for pair in pair_ids if pair not in known]
    if missing:
        raise UserError(
            f"The label is missing for {len(missing)} pairs",
            value=", ".join(missing),
            rule="the paper's rule needs every pair's label",
            fix="add a label to these pairs, or use the rule top-k",
        )
    return known
