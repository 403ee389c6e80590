"""Rank correlations, resampled, and their BCa intervals: against scipy, other formulas and simulations."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from taught.stats.intervals import bca, p_values
from taught.stats.ranks import rank_correlations, ranks, spearman, spearman_interval


def partial(a, b, covariates) -> float:
    return float(rank_correlations([a], b, covariates, draws=2).values[0])


def confounded(rng, rows: int, other: float = 0.4, covariates: int = 3):
    """Two predictors a and b of y, and covariates that all of them share."""
    c = rng.standard_normal((covariates, rows))
    truth = rng.standard_normal(rows)
    y = truth + c[0] + 0.3 * c[1] + 0.2 * rng.standard_normal(rows)
    a = truth + 0.8 * c[0] + 0.4 * rng.standard_normal(rows)
    b = truth + 0.2 * c[0] + other * rng.standard_normal(rows)
    return a, b, y, c


def test_plain_correlations_are_scipys():
    a, b, y, _ = confounded(np.random.default_rng(0), 37)
    a = np.round(a)  # ties
    found = rank_correlations([a, b, -b], y, draws=3).values
    wanted = [stats.spearmanr(x, y).statistic for x in (a, b, -b)]
    np.testing.assert_allclose(found, wanted, rtol=1e-12)


def by_inverse(a, b, covariates) -> float:
    """Partial correlation of ranks by the inverse of their correlation matrix."""
    rows = np.array([stats.rankdata(x) for x in (a, b, *covariates)])
    P = np.linalg.inv(np.corrcoef(rows))
    return -P[0, 1] / math.sqrt(P[0, 0] * P[1, 1])


def by_residuals(a, b, covariates) -> float:
    """The same by residuals of least squares on the ranked covariates."""
    H = np.stack([np.ones(len(a)), *(stats.rankdata(x) for x in covariates)], 1)
    left = []
    for x in (a, b):
        r = stats.rankdata(x)
        left.append(r - H @ np.linalg.lstsq(H, r, rcond=None)[0])
    return float(np.corrcoef(left)[0, 1])


@pytest.mark.parametrize("rounded", [False, True])
def test_partial_correlations_by_two_other_formulas(rounded):
    a, _, y, c = confounded(np.random.default_rng(1), 41)
    if rounded:
        a, c = np.round(a), np.round(2 * c)
    found = partial(a, y, c)
    assert found == pytest.approx(by_inverse(a, y, c), rel=1e-10)
    assert found == pytest.approx(by_residuals(a, y, c), rel=1e-10)
    assert partial(a, y, np.zeros((0, 41))) == pytest.approx(stats.spearmanr(a, y).statistic)


def test_controls_that_say_nothing_new_change_nothing():
    a, _, y, c = confounded(np.random.default_rng(2), 30)
    wanted = partial(a, y, c)
    constant = np.full(30, 7.0)
    assert partial(a, y, [*c, constant, c[0], -2 * c[1]]) == pytest.approx(wanted)


def test_nothing_left_is_nan():
    a, _, y, c = confounded(np.random.default_rng(3), 30)
    assert math.isnan(partial(c[0], y, c))  # the predictor is one of the controls
    assert math.isnan(partial(np.ones(30), y, c))
    assert math.isnan(partial(a[:5], y[:5], c[:, :5]))  # as many unknowns as rows
    interval = bca(rank_correlations([c[0]], y, c, draws=50))[0]
    assert all(map(math.isnan, interval))


def test_draws_are_correlations_of_resampled_rows():
    a, b, y, c = confounded(np.random.default_rng(4), 25)
    made = rank_correlations([a, b], y, c, draws=300, seed=9)
    counts = np.random.default_rng(9).multinomial(25, np.full(25, 1 / 25), size=300)
    for draw in (0, 7, 260, 299):  # on both sides of a chunk's end
        rows = np.repeat(np.arange(25), counts[draw])
        for k, x in enumerate((a, b)):
            wanted = by_residuals(x[rows], y[rows], c[:, rows])
            assert made.draws[draw, k] == pytest.approx(wanted, rel=1e-9)
    for row in (0, 24):
        keep = np.delete(np.arange(25), row)
        wanted = by_residuals(a[keep], y[keep], c[:, keep])
        assert made.left_out[row, 0] == pytest.approx(wanted, rel=1e-9)


def test_intervals_are_scipys_bca():
    a, _, y, _ = confounded(np.random.default_rng(5), 40)
    (ours,) = bca(rank_correlations([a], y, draws=9000))
    theirs = stats.bootstrap(
        (a, y),
        lambda u, v: stats.spearmanr(u, v).statistic,
        paired=True,
        vectorized=False,
        n_resamples=2000,
        method="BCa",
        rng=np.random.default_rng(0),
    ).confidence_interval
    assert ours.value == pytest.approx(stats.spearmanr(a, y).statistic)
    assert ours.lo == pytest.approx(theirs.low, abs=0.02)
    assert ours.hi == pytest.approx(theirs.high, abs=0.01)
    assert ours.hi - ours.value < ours.value - ours.lo  # skewed: the correlation cannot exceed 1


def test_intervals_hold_the_truth_as_often_as_they_say():
    """95% of 200: between 181 and 199 with probability .999; raw, partial, difference."""
    many = np.random.default_rng(6)
    a, b, y, c = confounded(many, 20000, other=1.0)
    sample = slice(0, 4000)
    raw = [stats.spearmanr(x, y).statistic for x in (a, b)]
    controlled = by_inverse(a[sample], y[sample], c[:, sample])
    rng, hits = np.random.default_rng(7), np.zeros(3)
    for seed in range(200):
        a, b, y, c = confounded(rng, 42, other=1.0)
        plain = rank_correlations([a, b], y, draws=400, seed=seed)
        gap = plain.map(lambda x: x[..., :1] - x[..., 1:])
        given = rank_correlations([a], y, c, draws=400, seed=seed)
        for k, (made, truth) in enumerate(((plain, raw[0]), (gap, raw[0] - raw[1]), (given, controlled))):
            interval = bca(made)[0]
            hits[k] += interval.lo <= truth <= interval.hi
    assert (hits >= 181).all() and (hits <= 199).all()


def test_p_says_what_the_interval_says():
    rng = np.random.default_rng(8)
    below = 0
    for seed in range(60):
        y = rng.standard_normal(30)
        made = rank_correlations([rng.standard_normal(30) + 0.35 * y], y, draws=500, seed=seed)
        (interval,), p = bca(made), float(p_values(made)[0])
        if abs(p - 0.05) > 0.01:  # quantiles of 500 draws are that coarse
            assert (p < 0.05) == (not interval.lo <= 0 <= interval.hi)
        below += p < 0.05
    assert 10 < below < 50


def test_p_is_right_under_the_null():
    rng = np.random.default_rng(10)
    small = sum(
        float(p_values(rank_correlations([rng.standard_normal(40)], rng.standard_normal(40), draws=300, seed=seed))[0])
        < 0.05
        for seed in range(300)
    )
    assert 4 <= small <= 30  # 15 expected


def test_ranks_begin_at_0_and_ties_are_averaged():
    assert ranks([3.0, 1.0, 3.0, 7.0]).tolist() == [1.5, 0.0, 1.5, 3.0]
    assert ranks([[2, 1], [5, 5]]).tolist() == [[1, 0], [0.5, 0.5]]


def test_spearman_is_scipys_also_with_ties():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 6, 50), rng.integers(0, 6, 50)
    assert spearman(a, b) == pytest.approx(stats.spearmanr(a, b).statistic)
    assert math.isnan(spearman(np.ones(4), np.arange(4))) and math.isnan(spearman([1, 2], [2, 1]))


def test_a_correlations_interval_is_that_of_resampled_rows():
    rng = np.random.default_rng(1)
    a = rng.standard_normal(30)
    b = a + rng.standard_normal(30)
    b[4] = math.nan  # left out with its partner
    found = spearman_interval(a, b, seed=5)
    a, b = np.delete(a, 4), np.delete(b, 4)
    rng = np.random.default_rng(5)
    drawn = [stats.spearmanr(a[i], b[i]).statistic for i in (rng.integers(0, 29, 29) for _ in range(500))]
    assert found == pytest.approx((stats.spearmanr(a, b).statistic, *np.quantile(drawn, [0.025, 0.975])))
    assert spearman_interval([1.0, math.nan], [2.0, 1.0]) is None and spearman_interval([1] * 9, range(9)) is None


def test_of_many_rows_the_interval_is_the_normal_one():
    rng = np.random.default_rng(2)
    a = rng.standard_normal(5000)
    found = spearman_interval(a, a + rng.standard_normal(5000))
    assert found.hi - found.lo == pytest.approx(2 * 1.96 * (1 - found.value**2) / math.sqrt(5000), rel=0.2)
