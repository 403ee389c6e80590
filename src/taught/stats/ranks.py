"""Ranks, rank correlation and its interval."""

from __future__ import annotations

import math
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

DRAWS = 500
MANY = 5000  # rows; from here on the normal interval, which the bootstrap then only repeats
NORMAL = 1.959963984540054  # 97.5% point


class Correlation(NamedTuple):
    """A rank correlation and the ends of its 95% interval over rows."""

    value: float
    lo: float
    hi: float


def ranks(values: ArrayLike) -> NDArray[np.float64]:
    """Ranks from 0 with ties averaged."""
    _, inverse, counts = np.unique(np.asarray(values), return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    averaged: NDArray[np.float64] = (last - (counts + 1) / 2)[inverse]
    return averaged


def spearman(a: ArrayLike, b: ArrayLike) -> float:
    """Rank correlation; nan when one side is constant or there are fewer than 3 rows."""
    ra, rb = ranks(a), ranks(b)
    ra, rb = ra - ra.mean(), rb - rb.mean()
    scale = math.sqrt(float(ra @ ra) * float(rb @ rb))
    return float(ra @ rb) / scale if scale > 0 and ra.size >= 3 else math.nan


def spearman_interval(a: ArrayLike, b: ArrayLike, seed: int = 0) -> Correlation | None:
    """Rank correlation with a 95% interval over rows, percentile bootstrap; None if undefined.

    Rows without two finite values are left out. From 5,000 rows on the interval is that of the
    standard error on Fisher's scale (Bonett and Wright 2000).
    """
    both = np.stack([np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)])
    both = both[:, np.isfinite(both).all(0)]
    value = spearman(*both) if both.size else math.nan
    if math.isnan(value):
        return None
    rng = np.random.default_rng(seed)
    n = both.shape[1]
    if n >= MANY:
        at, half = math.atanh(min(max(value, -1 + 1e-12), 1 - 1e-12)), NORMAL / math.sqrt(n - 3)
        half *= math.sqrt(1 + value**2 / 2)
        return Correlation(value, math.tanh(at - half), math.tanh(at + half))
    draws = [spearman(*both[:, rng.integers(0, n, n)]) for _ in range(DRAWS)]
    lo, hi = np.nanquantile(draws, [0.025, 0.975])
    return Correlation(value, float(lo), float(hi))
