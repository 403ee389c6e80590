"""Intervals: percentiles of a bootstrap, bias-corrected ones (BCa), Student's t, exact binomial; all of 95%.

A bootstrap draws rows with replacement. Its draws depend on the seed and on the number of rows alone, so statistics
that are drawn with one seed are paired: an interval of their difference is that of the differences of the draws.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Iterator
from statistics import NormalDist
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from taught.stats.arrays import Floats, Ints

TAILS = (0.025, 0.975)
NORMAL = NormalDist()
Z = NORMAL.inv_cdf(TAILS[1])
DRAWS = 500
MANY = 5000  # rows; from here on the normal interval, which a bootstrap of them would only repeat
UNDEFINED = 0.01  # share of the draws that may have no value for a BCa interval


class Interval(NamedTuple):
    """A value and the ends of its 95% interval; nan where they are not defined."""

    value: float
    lo: float = math.nan
    hi: float = math.nan

    @classmethod
    def of(cls, value: float, draws: ArrayLike) -> Interval:
        """A value with the middle 95% of its draws [B]."""
        lo, hi = middle(draws)
        return cls(float(value), float(lo), float(hi))

    @property
    def includes_zero(self) -> bool:
        """Whether 0 lies in the interval; False where there is none."""
        return bool(self.lo <= 0 <= self.hi)

    def to_dict(self) -> dict[str, float | None]:
        """``{"value", "lo", "hi"}`` for JSON, with None for nan."""
        return {name: plain(number) for name, number in self._asdict().items()}


UNKNOWN = Interval(math.nan)


def plain(value: float) -> float | None:
    """The number for JSON and tables: None where it is not finite."""
    return float(value) if math.isfinite(value) else None


def resamples(n: int, count: int, seed: int) -> Iterator[Ints]:
    """Rows int64 [n] drawn with replacement, ``count`` times."""
    rng = np.random.default_rng(seed)
    return (rng.integers(0, n, size=n) for _ in range(count))


def resample_counts(n: int, count: int, seed: int) -> Floats:
    """How often each of n rows is drawn in the same resamples, float64 [count, n]."""
    drawn = [np.bincount(rows, minlength=n) for rows in resamples(n, count, seed)]
    return np.array(drawn, dtype=np.float64).reshape(count, n)


def middle(draws: ArrayLike) -> Floats:
    """Both ends [2, ...] of the middle 95% of draws [B, ...]; what is not finite is left out, nan if all is."""
    draws = np.asarray(draws, dtype=np.float64)
    finite = np.isfinite(draws)
    if not draws.size:
        return np.full((2, *draws.shape[1:]), math.nan)
    if finite.all():
        return np.asarray(np.quantile(draws, TAILS, axis=0))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)  # all are nan: so is the result
        return np.asarray(np.nanquantile(np.where(finite, draws, math.nan), TAILS, axis=0))


def two_sided(draws: Floats) -> float:
    """p of the value being 0: at which level the percentile interval of the draws [B] ends there."""
    tail = min(int((draws <= 0).sum()), int((draws >= 0).sum()))
    return min(1.0, 2 * (1 + tail) / (1 + len(draws)))


def mean_interval(values: ArrayLike, seed: int = 0) -> Interval | None:
    """Mean over the finite rows [n]; bootstrap, from 5,000 rows on normal; None without rows."""
    known = np.asarray(values, dtype=np.float64)
    known = known[np.isfinite(known)]
    if known.size == 0:
        return None
    mean = float(known.mean())
    if known.size >= MANY:
        half = Z * float(known.std(ddof=1)) / math.sqrt(known.size)
        return Interval(mean, mean - half, mean + half)
    return Interval.of(mean, [known[rows].mean() for rows in resamples(known.size, DRAWS, seed)])


def mean_by_t(values: ArrayLike) -> Interval:
    """Mean of values [n] with Student's interval; without one where n is 1."""
    x = np.asarray(values, dtype=np.float64)
    mean, n = float(x.mean()), len(x)
    if n < 2:
        return Interval(mean)
    half = student_t(n - 1) * float(x.std(ddof=1)) / math.sqrt(n)
    return Interval(mean, mean - half, mean + half)


def student_t(degrees: int) -> float:
    """97.5% quantile of Student's t."""
    from scipy.special import stdtrit

    return float(stdtrit(degrees, TAILS[1]))


def share_of(k: int, n: int) -> Interval:
    """k / n with the exact binomial interval of Clopper and Pearson (1934), n >= 1."""
    from scipy.special import betaincinv

    lo = float(betaincinv(k, n - k + 1, TAILS[0])) if k else 0.0
    hi = float(betaincinv(k + 1, n - k, TAILS[1])) if k < n else 1.0
    return Interval(k / n, lo, hi)


# Bias-corrected intervals


class Resampled(NamedTuple):
    """K statistics of M rows: values [K], bootstrap draws [B, K] and leave-one-out values [M, K].

    The draws are the same for all K, so a function of several statistics is paired by itself.
    """

    values: Floats
    draws: Floats
    left_out: Floats

    def map(self, function: Callable[[Floats], Floats]) -> Resampled:
        """The same of a function [..., K] -> [..., L] of the statistics."""
        return Resampled(*(function(part) for part in self))


def bca(resampled: Resampled) -> list[Interval]:
    """Bias-corrected and accelerated intervals (Efron 1987), one a statistic."""

    def one(value: float, draws: Floats, z0: float, a: float) -> Interval:
        if not draws.size:
            return Interval(value)
        ends = [z0 + z / (1 - a * z) for z in (z0 - Z, z0 + Z)]
        lo, hi = np.quantile(draws, [NORMAL.cdf(z) for z in ends])
        return Interval(value, float(lo), float(hi))

    return [one(*part) for part in _corrections(resampled)]


def p_values(resampled: Resampled) -> Floats:
    """Two-sided p of each statistic being 0: 1 - the level at which the BCa interval ends at 0."""

    def one(value: float, draws: Floats, z0: float, a: float) -> float:
        if not draws.size:
            return math.nan
        z = _quantile(draws, 0.0) - z0
        tail = NORMAL.cdf(z / (1 + a * z) - z0)
        return min(1.0, 2 * min(tail, 1 - tail))

    return np.array([one(*part) for part in _corrections(resampled)])


def _corrections(resampled: Resampled) -> Iterator[tuple[float, Floats, float, float]]:
    """Of each statistic: value, its finite draws (sorted), bias z0 and acceleration a.

    No draws where the value is not defined, or the draws too often are not.
    """
    for value, draws, left in zip(resampled.values.tolist(), resampled.draws.T, resampled.left_out.T, strict=True):
        finite = np.sort(draws[np.isfinite(draws)])
        if not math.isfinite(value) or len(finite) < (1 - UNDEFINED) * len(draws):
            yield value, finite[:0], 0.0, 0.0
            continue
        off = left[np.isfinite(left)]
        off = off.mean() - off
        squares = float((off**2).sum())
        a = float((off**3).sum()) / (6 * squares**1.5) if squares > 0 else 0.0
        yield value, finite, _quantile(finite, value), a


def _quantile(draws: Floats, value: float) -> float:
    """Normal quantile of the share of draws below a value, kept from 0 and 1 by half a draw."""
    below = float((np.sum(draws < value) + 0.5 * np.sum(draws == value)) / len(draws))
    return NORMAL.inv_cdf(min(max(below, 0.5 / len(draws)), 1 - 0.5 / len(draws)))
