"""Intervals against scipy's, and what they say where nothing is known."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from taught.stats.intervals import (
    UNKNOWN,
    Interval,
    mean_interval,
    middle,
    resample_counts,
    resamples,
    share_of,
    student_t,
    two_sided,
)


def test_an_interval_is_the_middle_of_its_draws():
    draws = np.random.default_rng(0).standard_normal(1000)
    assert Interval.of(0.1, draws) == pytest.approx((0.1, *np.percentile(draws, [2.5, 97.5])))
    assert Interval.of(0.1, [*draws, math.nan, math.inf]) == Interval.of(0.1, draws)
    assert all(map(math.isnan, Interval.of(0.1, [])[1:])) and all(map(math.isnan, Interval.of(0.1, [math.nan])[1:]))
    lo, hi = middle(np.stack([draws, 2 * draws], 1))
    np.testing.assert_allclose([lo[1], hi[1]], 2 * np.percentile(draws, [2.5, 97.5]))
    assert middle(np.empty((0, 3))).shape == (2, 3)


@pytest.mark.parametrize(("lo", "hi", "includes"), [(-1, 1, True), (0, 1, True), (0.1, 1, False), (-2, -1, False)])
def test_whether_zero_lies_in_an_interval(lo, hi, includes):
    assert Interval(0.5, lo, hi).includes_zero is includes
    assert not UNKNOWN.includes_zero  # there is none


def test_json_has_no_nan():
    assert Interval(np.float64(0.5)).to_dict() == {"value": 0.5, "lo": None, "hi": None}


def test_counts_are_those_of_the_resamples():
    rows = list(resamples(7, 4, 3))
    assert resample_counts(7, 4, 3).tolist() == [[list(r).count(i) for i in range(7)] for r in rows]
    assert resample_counts(7, 0, 3).shape == (0, 7)


def test_p_is_where_the_interval_ends_at_zero():
    draws = np.arange(-10, 190) / 10  # 5% at or below 0
    assert two_sided(draws) == pytest.approx(2 * 12 / 201)
    assert two_sided(-draws) == two_sided(draws) and two_sided(np.array([-1.0, 1.0])) == 1


def test_the_interval_of_a_mean_has_the_width_of_its_standard_error():
    for n in (400, 6000):  # resampled, and normal
        values = np.random.default_rng(1).exponential(size=n)
        found = mean_interval([*values, math.nan])
        assert found.value == pytest.approx(values.mean())
        assert found.hi - found.lo == pytest.approx(2 * 1.96 * values.std() / math.sqrt(n), rel=0.1)
    assert mean_interval([math.nan]) is None


@pytest.mark.parametrize(("k", "n"), [(0, 1), (1, 1), (0, 40), (27, 40), (40, 40), (700, 1200)])
def test_a_share_has_the_exact_binomial_interval(k, n):
    exact = stats.binomtest(k, n).proportion_ci()
    assert share_of(k, n) == pytest.approx((k / n, exact.low, exact.high), abs=1e-9)


@pytest.mark.parametrize("degrees", [1, 2, 3, 9, 200])
def test_students_quantile(degrees):
    assert student_t(degrees) == pytest.approx(stats.t.ppf(0.975, degrees), rel=1e-12)
