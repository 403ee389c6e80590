"""Area under the ROC curve: the probability that a positive row is read higher than a negative one.

Equal rows count half. The interval of one ranking is Newcombe's (2006, method 5), which solves
|auc - a| = z sqrt(V(a)) with Hanley and McNeil's V, like Wilson's for a proportion. DeLong's, and a
bootstrap within the two groups, have no width where the groups are apart, and are too short near it: with 30 positive
rows of 230 and a true AUC of .99, DeLong's held it in 80 of 100 simulations, this one in 98. It does not say anything
of several rankings that are compared each by itself (the folds of a fit); there rows are resampled.
"""

from __future__ import annotations

import math
from collections.abc import Iterable

import numpy as np
from numpy.typing import ArrayLike

from taught.stats.arrays import Floats
from taught.stats.intervals import Interval, Z
from taught.stats.ranks import ranks


def auc(score: ArrayLike, positive: ArrayLike) -> Interval:
    """AUC of scores [N] with Newcombe's interval; ``positive`` bool [N], of both kinds at least one."""
    from scipy.optimize import brentq

    values, inside = np.asarray(score, np.float64), np.asarray(positive, bool)
    m, n = int(inside.sum()), int((~inside).sum())
    value = _share([(values[inside], values[~inside])])

    def beyond(a: float) -> float:
        """Above 0 where ``a`` is too far from the value."""
        extra = ((m + n) / 2 - 1) * ((1 - a) / (2 - a) + a / (1 + a))
        return float((a - value) ** 2 - Z**2 * a * (1 - a) * (1 + extra) / (m * n))

    near = min(max(value, 1e-12), 1 - 1e-12)  # at 0 and 1 themselves V is 0
    ends = (far if beyond(far) <= 0 else brentq(beyond, far, near, xtol=1e-15) for far in (0.0, 1.0))
    return Interval(value, *ends)


def auc_within(score: ArrayLike, positive: ArrayLike, part: ArrayLike, *, bootstrap: int, seed: int) -> Interval:
    """AUC over rows of the same part only, resampled within part and kind; percentile interval.

    Parameters
    ----------
    score, positive, part : float64, bool, int64 [N]
        Each part has rows of both kinds.
    """
    values, inside, parts = np.asarray(score, np.float64), np.asarray(positive, bool), np.asarray(part)
    cells = [(values[inside & (parts == k)], values[~inside & (parts == k)]) for k in np.unique(parts)]
    rng = np.random.default_rng(seed)
    draws = [_share((rng.choice(a, len(a)), rng.choice(b, len(b))) for a, b in cells) for _ in range(bootstrap)]
    return Interval.of(_share(cells), draws)


def precision_at_k(score: ArrayLike, positive: ArrayLike, k: int) -> float:
    """Share of positive rows among the k highest scores [N]; rows that tie at the border count in part."""
    values, inside = np.asarray(score, np.float64), np.asarray(positive, bool)
    border = np.sort(values)[-k]
    above, tied = values > border, values == border
    share = (k - above.sum()) / tied.sum()
    return float(inside[above].sum() + share * inside[tied].sum()) / k


def _share(cells: Iterable[tuple[Floats, Floats]]) -> float:
    """Share of the (positive, negative) couples within the cells that stand in order."""
    won = total = 0.0
    for a, b in cells:
        won += float(ranks(np.concatenate([a, b]))[: len(a)].sum()) - len(a) * (len(a) - 1) / 2
        total += len(a) * len(b)
    return won / total if total else math.nan
