"""A control and an order that the report adds to what the stages wrote. numpy only, seeded."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from taught.analysis.interference import random_control
from taught.stats.intervals import Interval

MAX_WORK = 20_000_000


@dataclass(frozen=True)
class Control:
    """How many examples act mainly on unintended features, against chance.

    Attributes
    ----------
    n : examples that have intended features and an effect
    flagged : of these, examples whose dominant feature is not among the intended ones
    random : expected ``flagged`` if each intended set were a random set of the same size; 95% of draws
    swapped : expected ``flagged`` if each example had the intended set of another example. Near ``flagged``: what an
        example is about makes no difference to what it moves.
    """

    n: int
    flagged: int
    random: Interval
    swapped: float


def unintended_control(
    feature_ids: Sequence[int], total: ArrayLike, intended: Sequence[Sequence[int]], seed: int = 0
) -> Control | None:
    """Compare dominant effects outside the intended features with two controls.

    Coefficient shifts ``total`` [P, d], columns ``feature_ids``, and ids of each example's intended features. Examples
    without any, or without effect, are left out.
    """
    total = np.asarray(total, dtype=np.float64)
    work = max(len({frozenset(i) for i in intended}) * len(feature_ids), 1)
    draws = int(np.clip(MAX_WORK // work, 100, 1000))
    result = random_control(feature_ids, total, intended, seed=seed, draws=draws)
    rate, n = result["unintended_rate"], result["n_examples"]
    if rate is None:
        return None
    ends = (n * rate[key] for key in ("expected", "lo", "hi"))
    rows = [(frozenset(i), size) for i, size in zip(intended, np.abs(total), strict=True) if i and size.any()]
    dominant = [(chosen, int(feature_ids[int(size.argmax())])) for chosen, size in rows]
    holders, others = Counter(feature for chosen, _ in dominant for feature in chosen), max(len(dominant) - 1, 1)
    swapped = sum(1 - (holders[d] - (d in chosen)) / others for chosen, d in dominant)
    return Control(n, round(n * rate["observed"]), Interval(*ends), swapped)


def cluster_order(r: ArrayLike) -> list[int]:
    """Order of rows by average-linkage clustering of a similarity matrix r [d, d], O(d^3).

    The two clusters that are most similar on average are joined until one is left, each turned so
    that the more similar ends meet.
    """
    r = np.nan_to_num(np.asarray(r, dtype=np.float64))
    groups = [[i] for i in range(len(r))]
    link = r.copy()
    np.fill_diagonal(link, -np.inf)
    while len(groups) > 1:
        a, b = sorted(divmod(int(link.argmax()), len(groups)))
        na, nb = len(groups[a]), len(groups[b])
        merged = (na * link[a] + nb * link[b]) / (na + nb)
        turns = [(x, y) for x in (groups[a], groups[a][::-1]) for y in (groups[b], groups[b][::-1])]
        left, right = max(turns, key=lambda turn: r[turn[0][-1], turn[1][0]])
        groups[a] = left + right
        del groups[b]
        link[a], link[:, a] = merged, merged
        link[a, a] = -np.inf
        link = np.delete(np.delete(link, b, 0), b, 1)
    return groups[0] if groups else []
