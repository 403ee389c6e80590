"""Areas under the ROC curve and precision, against scikit-learn, equations and simulations."""

from __future__ import annotations

import math
from itertools import pairwise, permutations

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score

from taught.stats.auc import auc, auc_within, precision_at_k


def planted_scores(rng, shift: float, planted: int = 30, others: int = 200):
    values = [*(shift + rng.standard_normal(planted)), *rng.standard_normal(others)]
    return np.array(values), np.arange(planted + others) < planted


@pytest.mark.parametrize("digits", [6, 0])
def test_auc_is_scikit_learns(digits):
    scores, planted = planted_scores(np.random.default_rng(0), 1.0)
    scores = np.round(scores, digits)
    found = auc(scores, planted)
    wanted = roc_auc_score(planted, scores)
    assert found.value == pytest.approx(wanted, rel=1e-12)
    assert found.lo < found.value < found.hi
    assert auc(scores[::-1], planted[::-1]) == found


def test_auc_intervals_solve_their_equation():
    scores, planted = planted_scores(np.random.default_rng(1), 1.0, 12, 25)
    found = auc(scores, planted)
    for edge in (found.lo, found.hi):
        middle = (12 + 25) / 2 - 1
        spread = 1 + middle * ((1 - edge) / (2 - edge) + edge / (1 + edge))
        variance = edge * (1 - edge) * spread / (12 * 25)
        assert (edge - found.value) ** 2 == pytest.approx(stats.norm.ppf(0.975) ** 2 * variance)


@pytest.mark.parametrize("shift", [0.0, 1.0, 3.3])
def test_auc_intervals_hold_the_truth(shift):
    """95% or more of 300, also near 1, where DeLong's do in 80% of the cases."""
    rng, truth = np.random.default_rng(2), stats.norm.cdf(shift / math.sqrt(2))
    found = [auc(*planted_scores(rng, shift)) for _ in range(300)]
    assert sum(some.lo <= truth <= some.hi for some in found) >= 272


def test_groups_that_are_apart_still_have_an_interval():
    scores = [3.0, 2.0, 1.0, 0.0]
    up, down = auc(scores, [1, 1, 0, 0]), auc(scores, [0, 0, 1, 1])
    assert (up.value, up.hi) == (1, 1) and 0.3 < up.lo < 0.9
    assert (down.value, down.lo) == (0, 0) and down.hi == pytest.approx(1 - up.lo)
    level = auc([1.0] * 4, [1, 0, 0, 0])
    assert level.value == 0.5 and level.lo < 0.5 < level.hi


def test_precision_counts_ties_as_every_order_of_them_would():
    scores = {"a": 5.0, "b": 4.0, "c": 4.0, "d": 4.0, "e": 1.0}
    planted = {"a", "c", "e"}
    for k in range(1, 6):
        orders = [order for order in permutations(scores) if all(scores[x] >= scores[y] for x, y in pairwise(order))]
        wanted = np.mean([len(planted & set(order[:k])) / k for order in orders])
        assert precision_at_k(list(scores.values()), [i in planted for i in scores], k) == pytest.approx(wanted)


def test_within_parts_only_their_own_rows_are_compared():
    rng = np.random.default_rng(0)
    score, positive, part = rng.integers(0, 5, 40) * 1.0, rng.random(40) < 0.4, np.arange(40) % 2
    won, total = 0.0, 0
    for i in np.flatnonzero(positive):
        for j in np.flatnonzero(~positive & (part == part[i])):
            won += (score[i] > score[j]) + 0.5 * (score[i] == score[j])
            total += 1
    found = auc_within(score, positive, part, bootstrap=200, seed=0)
    assert found.value == pytest.approx(won / total) and found.lo < found.value < found.hi
    assert auc_within(score, positive, np.zeros(40), bootstrap=9, seed=0).value == pytest.approx(
        roc_auc_score(positive, score)
    )
