"""Adjusted p-values, for many comparisons at once."""

from __future__ import annotations

import numpy as np
from numpy.typing import ArrayLike

from taught.stats.arrays import Floats


def holm(p: ArrayLike) -> Floats:
    """Holm's adjusted p-values, of any shape: valid for all comparisons together (Holm 1979)."""
    p = np.asarray(p, dtype=np.float64)
    flat = p.ravel()
    order = np.argsort(flat, kind="stable")
    adjusted = np.empty_like(flat)
    adjusted[order] = np.minimum(1, np.maximum.accumulate(flat[order] * np.arange(flat.size, 0, -1)))
    return adjusted.reshape(p.shape)


def benjamini_hochberg(p: ArrayLike) -> Floats:
    """Adjusted p-values [m] that hold the rate of false discoveries (Benjamini and Hochberg 1995)."""
    from scipy.stats import false_discovery_control

    p = np.asarray(p, dtype=np.float64)
    return np.asarray(false_discovery_control(p)) if p.size else p
