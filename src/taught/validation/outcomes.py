"""What a retraining did: the change of every target that attribution predicts, and soft metrics.

    behavior:GROUP    mean over its prompts of y(retrained) - y(base)
    coefficient:j     dW_j = W_j(X', y') - W_j(X, y), both fitted anew with the policy's alpha
    score             S = sum_j dW_j W_j, W of the base

The soft metrics are the published ones
(SMDA, arXiv 2606.29171) with p = exp(y), the probability of the behavior, as its degree:

    precision = sum of p over positive / sum of p over all,   recall = mean p over positive,
    f1 = 2 precision recall / (precision + recall),
    correctness = mean of p (positive) and 1 - p (negative) over all prompts

where "all" are the prompts of the positive and the negative group.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np

from taught.core.names import TargetName
from taught.core.readings import Readings
from taught.core.target import value
from taught.errors import UserError
from taught.stats.arrays import Floats

if TYPE_CHECKING:
    from taught.training.retrain import Retraining


@dataclass(frozen=True)
class SoftMetrics:
    """The published soft metrics of one model, each between 0 and 1 (module docstring)."""

    precision: float
    recall: float
    f1: float
    correctness: float


def changes(readings: Readings, base: Retraining, after: Retraining, names: Sequence[TargetName]) -> dict[str, float]:
    """Change of every target from the base model to a retrained one: F(after) - F(base).

    Parameters
    ----------
    readings : of the run: prompts, groups and the policy. The policy is fitted to ``base`` anew, so that what is
        subtracted was read the same way as what it is subtracted from.

    Returns
    -------
    name -> change. Positive: training raised the target. Cost: two ridge regressions.

    Raises
    ------
    UserError
        Read-outs of other prompts or features than the run's; a group without prompts.
    """
    for reads in (base, after):
        same = reads.prompt_ids == readings.prompt_ids
        if not same or list(reads.feature_ids) != [int(k) for k in readings.columns]:
            what, other = "read-outs are of other prompts or features than the run", "features" if same else "prompts"
            rule, fix = "the same ids in the same order", "taught validate RUN makes them anew"
            raise UserError(what, value=other, rule=rule, fix=fix)
    before, moved = (readings.refitted(reads.y, reads.X if readings.columns else None) for reads in (base, after))
    return {str(name): value(name, moved, before) - value(name, before, before) for name in names}


def soft_metrics(
    reads: Retraining, positive: Sequence[str], negative: Sequence[str], degree: Callable[[Any], Any] = np.exp
) -> SoftMetrics:
    """Soft precision, recall, F1 and correctness of one model.

    Parameters
    ----------
    positive, negative : ids of the prompts that should show the behavior, and of those that should not
    degree : from y to how much of the behavior is shown, 0 to 1

    Raises
    ------
    UserError
        A group without prompts, or a prompt that was not read.
    """
    place, sides = {prompt_id: row for row, prompt_id in enumerate(reads.prompt_ids)}, []
    y, p = reads.y, np.asarray(degree(reads.y), dtype=np.float64)
    log_p = np.where(p > 0, np.log(np.where(p > 0, p, 1)), y)  # so small that it rounds to 0: y is its logarithm
    for group, ids in (("positive", positive), ("negative", negative)):
        missing = [i for i in ids if i not in place]
        if missing or not ids:
            rule, fix = "a group has prompts, and all of them are read", "use the groups of the run's prompts"
            raise UserError(f"the prompts of {group} were not read", value=missing[:8], rule=rule, fix=fix)
        sides.append(log_p[[place[i] for i in ids]])
    found = metrics(*sides)
    return SoftMetrics(**{item.name: float(found[item.name]) for item in fields(SoftMetrics)})


def metrics(
    yes: Floats, no: Floats, yes_weights: Floats | None = None, no_weights: Floats | None = None
) -> dict[str, Floats]:
    """The soft metrics, and the mean p of both groups of prompts.

    Parameters
    ----------
    yes, no : behavior on the positive prompts [..., n] and on the negative ones [..., m]
    yes_weights, no_weights : of the prompts within their group, [..., n] and [..., m], each summing to 1; None: all
        alike. Groups keep their sizes n and m.
    """
    n, m = yes.shape[-1], no.shape[-1]
    w, v = ((1 / n if yes_weights is None else yes_weights), (1 / m if no_weights is None else no_weights))
    recall, wrong = (w * np.exp(yes)).sum(-1), (v * np.exp(no)).sum(-1)
    top = np.maximum(yes.max(-1), no.max(-1))[..., None]  # relative to it not all p can be 0
    harm, rest = n * (w * np.exp(yes - top)).sum(-1), m * (v * np.exp(no - top)).sum(-1)
    precision = harm / (harm + rest)
    both = precision + recall
    return {
        "precision": precision,
        "recall": recall,
        "f1": np.where(recall > 0, 2 * precision * recall / np.where(both > 0, both, 1), 0.0),
        "correctness": (n * recall + m * (1 - wrong)) / (n + m),
        "probability:positive": recall,
        "probability:negative": wrong,
    }
