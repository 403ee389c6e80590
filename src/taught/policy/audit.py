"""The audit: in which categories does the behavior fall short, and which features go along.

Each category is compared with the *other* categories of its own group:

    gap_c = mean of y in c - mean of y in the rest of the group

A category of the positive group that lies significantly below the rest is a gap in coverage (the model shows the
behavior less than it does elsewhere); one of the negative group that lies significantly above is where the behavior
shows up uncalled for (over-refusal). SMDA (arXiv 2606.29171) reads such gaps off single coefficients; here they come
with a test and an interval, and are corrected for the number of categories looked at.

The p-value is from a permutation of y within the group, two-sided, on Welch's statistic

    t_c = gap_c / sqrt(v_in / n_in + v_out / n_out),    v: sample variances

because category sizes and spreads differ, y is skewed, and a permutation of the studentised gap stays valid for unequal
variances where one of the raw gap does not. Benjamini-Hochberg runs over all tested categories of both groups.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from taught.errors import UserError, misfit
from taught.policy.ridge import Policy, checked_data, row_order
from taught.stats.arrays import Floats, Ints
from taught.stats.intervals import middle, plain
from taught.stats.multiplicity import benjamini_hochberg

LEVEL = 0.05  # false discovery rate at which a category is called uncovered
TOP_FEATURES = 5
_AT_ONCE = 100  # permutations in memory


class _Group(NamedTuple):
    """The rows of one group, sorted by prompt id."""

    name: str
    y: Floats
    X: Floats
    category: Ints  # index into names
    names: list[str]


def audit_categories(
    y: ArrayLike,
    groups: Sequence[str],
    categories: Sequence[str | None],
    X: ArrayLike,
    policy: Policy,
    coef_lo: ArrayLike,
    coef_hi: ArrayLike,
    *,
    positive: str,
    negative: str,
    seed: int,
    n_boot: int = 2000,
    min_n: int = 5,
) -> list[dict[str, Any]]:
    """Compare each category with the rest of its group. Cost: about ``n_boot`` passes over y.

    Parameters
    ----------
    y : [N], behavior, natural logarithm of a probability
    groups, categories : length N, rows as in ``policy.prompt_ids``. A missing category is called ``(none)``.
    X : [N, d], activations, columns as in ``policy.feature_ids``
    coef_lo, coef_hi : [d], interval of the coefficients
    positive, negative : the two groups that are audited; other groups are left out
    n_boot : bootstrap resamples. Permutations: as many, or 100 per category if that is more, so that the correction for
        many categories cannot outrun the smallest possible p.
    min_n : smaller categories are listed with their mean and gap, but without interval, p or verdict

    Returns
    -------
    list of dict
        One per group and category, the positive group first, by category name: ``group``, ``category``, ``n``,
        ``mean_y``, ``gap`` (None if the group has one category), ``lo``, ``hi`` (95% bootstrap of the gap, resampled
        within categories), ``p``, ``p_adjusted``, ``uncovered`` (None if not tested), ``features`` (ids of the up to 5
        features whose mean activation in the category exceeds that in the rest of the group most) and
        ``feature_details`` (``feature_id``, ``difference``, ``coef``, ``lo``, ``hi`` of each).
    """
    X, y = checked_data(X, y, policy.prompt_ids)
    lo, hi = np.asarray(coef_lo, dtype=np.float64), np.asarray(coef_hi, dtype=np.float64)
    if not len(groups) == len(categories) == len(y) or X.shape[1] != policy.d:
        given = {"X": X, "groups": groups, "categories": categories}
        raise misfit("the audit's inputs", f"{policy.n} prompts and {policy.d} features", **given)
    if not lo.shape == hi.shape == (policy.d,):
        raise misfit("the intervals and the policy", f"one for each of {policy.d} features", lo=lo, hi=hi)
    rng = np.random.default_rng(seed)
    rows: list[dict[str, Any]] = []
    for name in (positive, negative):
        at = [i for i in row_order(policy.prompt_ids, len(y)) if groups[i] == name]
        if not at:
            rule = "one of: " + ", ".join(sorted(set(groups)))
            fix = "set prompts.positive_group and prompts.negative_group"
            raise UserError("the audit found no prompt in this group", value=name, rule=rule, fix=fix)
        labels = ["(none)" if categories[i] is None else str(categories[i]) for i in at]
        names, category = np.unique(labels, return_inverse=True)
        group = _Group(name, y[at], X[at], category.astype(np.int64), names.tolist())
        rows += _rows(group, policy, lo, hi, rng, n_boot, min_n)
    tested = [row for row in rows if row["p"] is not None]
    for row, p in zip(tested, benjamini_hochberg([row["p"] for row in tested]), strict=True):
        wrong_way = row["gap"] < 0 if row["group"] == positive else row["gap"] > 0
        row["p_adjusted"] = float(p)
        row["uncovered"] = bool(p < LEVEL and wrong_way)
    return rows


def _rows(
    group: _Group, policy: Policy, coef_lo: Floats, coef_hi: Floats, rng: np.random.Generator, n_boot: int, min_n: int
) -> list[dict[str, Any]]:
    counts = np.bincount(group.category, minlength=len(group.names))
    means = np.bincount(group.category, group.y) / counts
    gaps, t = (values[0] for values in _gaps_and_t(group.y[None], group.category, counts))
    n = max(n_boot, 100 * len(group.names))
    at_least = np.zeros(len(counts))
    near = np.abs(t) * (1 - 1e-9)  # the same sum in another order is a tie, not a smaller value
    for start in range(0, n, _AT_ONCE):  # the same permutations for all categories
        some = np.stack([rng.permutation(group.y) for _ in range(min(_AT_ONCE, n - start))])
        at_least += (np.abs(_gaps_and_t(some, group.category, counts)[1]) >= near).sum(0)
    sums = np.empty((n_boot, len(counts)))  # of each category's prompts drawn anew
    for c in range(len(counts)):
        y = group.y[group.category == c]
        sums[:, c] = y[rng.integers(0, y.size, size=(n_boot, y.size))].sum(1)
    with np.errstate(divide="ignore", invalid="ignore"):
        rest = (sums.sum(1, keepdims=True) - sums) / (len(group.y) - counts)
    lo, hi = middle(sums / counts - rest)
    rows = []
    for c, name in enumerate(group.names):
        tested = counts[c] >= max(min_n, 2) and len(group.y) - counts[c] >= 2
        details = _tied_features(group, c, policy, coef_lo, coef_hi)
        row = {"group": group.name, "category": name, "n": int(counts[c]), "mean_y": float(means[c])}
        row |= {"gap": plain(gaps[c]), "lo": None, "hi": None, "p": None, "p_adjusted": None, "uncovered": None}
        if tested:
            row |= {"lo": plain(lo[c]), "hi": plain(hi[c]), "p": float((1 + at_least[c]) / (1 + n))}
        rows.append(row | {"features": [one["feature_id"] for one in details], "feature_details": details})
    return rows


def _gaps_and_t(y: Floats, category: Ints, counts: Ints) -> tuple[Floats, Floats]:
    """Gap and Welch's t [B, C] of every category against the rest, for each row of y [B, N], from sums only."""
    y = y - y.mean(1, keepdims=True)  # sums of squares cancel badly far from 0
    m, (rows, n) = counts, y.shape
    place = (category + len(m) * np.arange(rows)[:, None]).ravel()
    sums, squares = (np.bincount(place, v.ravel(), rows * len(m)).reshape(rows, -1) for v in (y, y**2))
    with np.errstate(divide="ignore", invalid="ignore"):
        inside, outside = sums / m, (sums.sum(1, keepdims=True) - sums) / (n - m)
        v_in = (squares - m * inside**2) / (m - 1)
        v_out = (squares.sum(1, keepdims=True) - squares - (n - m) * outside**2) / (n - m - 1)
        gap = inside - outside
        t = gap / np.sqrt(np.maximum(v_in, 0) / m + np.maximum(v_out, 0) / (n - m))
    # No spread on either side: any gap is infinitely many standard errors, no gap is none.
    return gap, np.where(np.isnan(t), 0.0, t)


def _tied_features(group: _Group, c: int, policy: Policy, lo: Floats, hi: Floats) -> list[dict[str, Any]]:
    inside = group.category == c
    if inside.all():
        return []
    difference = group.X[inside].mean(0) - group.X[~inside].mean(0)
    top = sorted(range(policy.d), key=lambda k: (-difference[k], policy.feature_ids[k]))
    numbers = {"difference": difference, "coef": policy.coef, "lo": lo, "hi": hi}
    return [
        {"feature_id": int(policy.feature_ids[k]), **{name: float(values[k]) for name, values in numbers.items()}}
        for k in top[:TOP_FEATURES]
        if difference[k] > 0
    ]
