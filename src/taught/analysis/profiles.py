"""Do two benchmarks rest on the same bins? Correlations of their profiles, corrected for reliability.

The profile of a benchmark is its trimmed mean in every tested bin. Profiles are measured with noise, of few documents
and few questions, and noise hides a correlation. It also makes one: both profiles are over the same documents, so what
is peculiar to a document stands in both. Hence split halves. Documents of each bin, and questions of each benchmark,
are split at random into halves A and B. With c(t, u) the covariance over bins of t's profile on one half with u's on
the other (both ways, mean over splits), which no document and no question enters twice,

    corrected correlation   rho = c(t, u) / sqrt(c(t, t) c(u, u))
    reliability             R   = 2 r / (1 + r),  r the correlation of t's profiles on the two halves

R is that of the whole profile (Spearman 1910, Brown 1910). For halves without common noise rho is Spearman's (1904)
correction for attenuation, the correlation over the root of both reliabilities. Where R is below ``RELIABLE``, more
than half of what differs between bins is noise: nothing is corrected. Intervals of rho draw a split, and documents and
questions anew within its halves, so they are of half the data and rather too wide. Without values of single questions
only documents are split, and R says nothing of other questions.

The plain correlation beside it is the published one. Its interval draws bins, and its range leaves one bin out: one bin
of extreme value can make it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from itertools import combinations
from typing import NamedTuple

import numpy as np

from taught.analysis.partition import Part, Values, chunks, trimmed_mean
from taught.stats.arrays import Bools, Floats, Ints
from taught.stats.intervals import Interval, resamples
from taught.stats.ranks import spearman

RELIABLE = 0.5
SPLITS = 100
FEWEST = 4  # bins of a correlation


class Agreement(NamedTuple):
    """The profiles of two benchmarks.

    Attributes
    ----------
    a, b : benchmarks
    bins : tested bins that they are correlated over
    plain : correlation of the profiles, with a 95% interval over bins
    without_lo, without_hi : its range with one bin left out
    without : labels of the bin that moves it most
    rank : rank correlation
    reliability_a, reliability_b : from 0 to 1
    corrected : for reliability, held to [-1, 1]; nan where one of the two is not reliable
    """

    a: str
    b: str
    bins: int
    plain: Interval
    without_lo: float
    without_hi: float
    without: tuple[str, ...]
    rank: float
    reliability_a: float
    reliability_b: float
    corrected: Interval


def agreements(
    values: Values, part: Part, tested: Bools, benchmarks: Sequence[str], *, trim: float, bootstrap: int, seed: int
) -> list[Agreement]:
    """Correlations of every two profiles over the tested bins of a partition; none over fewer than ``FEWEST``."""
    places = np.flatnonzero(tested)
    if len(places) < FEWEST or values.benchmarks < 2:
        return []
    T = values.benchmarks
    members = [part.members[b] for b in places]
    whole = np.stack([trimmed_mean(values.table[own, :T].T, trim) for own in members])
    apart = half_covariances(values, members, trim, SPLITS, seed, anew=False)
    drawn = half_covariances(values, members, trim, bootstrap, seed + 1, anew=True)
    half = np.diagonal(apart.correlation.mean(0))
    reliability = np.maximum(2 * half / (1 + half), 0)
    corrected, draws = _corrected(apart.covariance.mean(0)), _corrected(drawn.covariance)
    found = []
    for t, u in combinations(range(T), 2):
        x, y = whole[:, t], whole[:, u]
        left = np.array([_correlation(np.delete(x, b), np.delete(y, b)) for b in range(len(x))])
        r = _correlation(x, y)
        over_bins = Interval.of(r, [_correlation(x[rows], y[rows]) for rows in resamples(len(x), bootstrap, seed)])
        known = min(reliability[t], reliability[u]) >= RELIABLE
        rho = Interval.of(corrected[t, u], draws[:, t, u]) if known else Interval(math.nan)
        ends, reliable = (float(left.min()), float(left.max())), (float(reliability[t]), float(reliability[u]))
        without = part.names[places[np.nan_to_num(np.abs(left - r)).argmax()]]
        names = benchmarks[t], benchmarks[u]
        found.append(Agreement(*names, len(x), over_bins, *ends, without, spearman(x, y), *reliable, rho))
    return found


class Halves(NamedTuple):
    """Between profiles on the two halves, [S, T, T], symmetric: covariances over bins, and correlations."""

    covariance: Floats
    correlation: Floats


def half_covariances(
    values: Values, members: Sequence[Ints], trim: float, splits: int, seed: int, *, anew: bool
) -> Halves:
    """Split documents and questions at random; ``anew``: draw those of each half with replacement.

    Parameters
    ----------
    members : documents of each of B bins; at least two
    """
    T = values.benchmarks
    rng = np.random.default_rng([seed, 0])
    weights = []
    for N in (asked.shape[1] for asked in values.questions or ()):
        weights.append([np.zeros((splits, N)) for _ in range(2)])  # of the questions in either half
        for one, pick in zip(weights[-1], _halves(N, splits, rng, anew), strict=True):
            np.add.at(one, (np.arange(splits)[:, None], pick), 1 / pick.shape[1])
    profiles = np.empty((2, splits, len(members), T))
    for b, own in enumerate(members):
        rng, n = np.random.default_rng([seed, 1 + b]), len(own)
        for some in chunks(splits, n * T):
            count = some.stop - some.start
            for side, pick in enumerate(_halves(n, count, rng, anew)):
                x = values.on(own, [w[side][some] for w in weights])[:T]
                drawn = np.take_along_axis(np.broadcast_to(x, (T, count, n)), pick[None], 2)
                profiles[side, some, b] = trimmed_mean(drawn, trim).T
    a, b_ = profiles - profiles.mean(2, keepdims=True)
    across = np.einsum("sbt,sbu->stu", a, b_)
    size = np.sqrt(np.einsum("sbt,sbt->st", a, a)[:, :, None] * np.einsum("sbt,sbt->st", b_, b_)[:, None])
    scaled = np.divide(across, size, out=np.zeros_like(across), where=size > 0)
    return Halves(*((m + m.transpose(0, 2, 1)) / (2 * n) for m, n in ((across, len(members) - 1), (scaled, 1))))


def _halves(n: int, splits: int, rng: np.random.Generator, anew: bool) -> list[Ints]:
    """Places in either half of n things [S, .], ``anew`` drawn within it; a single thing is in both."""
    order = rng.random((splits, n)).argsort(1)
    sides = [order[:, : n // 2], order[:, n // 2 :]] if n > 1 else [order, order]
    if not anew:
        return sides
    return [np.take_along_axis(side, rng.integers(0, side.shape[1], side.shape), 1) for side in sides]


def _corrected(covariance: Floats) -> Floats:
    """Covariances [..., T, T] as correlations held to [-1, 1]; nan where a variance is not positive."""
    own = np.diagonal(covariance, axis1=-2, axis2=-1)
    scale = np.sqrt(np.where(own > 0, own, math.nan))
    return np.asarray(np.clip(covariance / (scale[..., :, None] * scale[..., None, :]), -1, 1))


def _correlation(x: Floats, y: Floats) -> float:
    x, y = x - x.mean(), y - y.mean()
    size = math.sqrt(float(x @ x) * float(y @ y))
    return float(x @ y) / size if size > 0 else math.nan
