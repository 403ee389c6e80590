"""Ranks and rank correlation."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike, NDArray


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
