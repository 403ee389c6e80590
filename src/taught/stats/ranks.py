"""Ranks, rank correlations (also partial ones), and their intervals."""

from __future__ import annotations

import math

import numpy as np
from numpy.typing import ArrayLike

from taught.stats.arrays import Floats
from taught.stats.intervals import DRAWS, MANY, Interval, Resampled, Z, resamples

_CHUNK = 250  # draws whose ranks are held at a time
_NOTHING = 1e-10  # a variance that is left of 1 after the controls, below which it is rounding


def ranks(values: ArrayLike) -> Floats:
    """Ranks from 0 along the last axis, ties averaged."""
    from scipy.stats import rankdata

    return np.asarray(rankdata(values, axis=-1), dtype=np.float64) - 1


def spearman(a: ArrayLike, b: ArrayLike) -> float:
    """Rank correlation; nan when one side is constant or there are fewer than 3 rows."""
    return float(_correlations(np.stack([a, b])[:, None])[0])


def _correlations(rows: Floats) -> Floats:
    """Rank correlations [B] of rows [2, B, n]."""
    a, b = ranks(rows) - (rows.shape[-1] - 1) / 2
    scale = np.sqrt((a * a).sum(-1) * (b * b).sum(-1))
    known = (scale > 0) & (rows.shape[-1] >= 3)
    return np.where(known, (a * b).sum(-1) / np.where(known, scale, 1), math.nan)


def spearman_interval(a: ArrayLike, b: ArrayLike, seed: int = 0) -> Interval | None:
    """Rank correlation with a 95% interval over rows, percentile bootstrap; None if undefined.

    Rows without two finite values are left out. From 5,000 rows on the interval is that of the
    standard error on Fisher's scale (Bonett and Wright 2000).
    """
    both = np.stack([np.asarray(a, dtype=np.float64), np.asarray(b, dtype=np.float64)])
    both = both[:, np.isfinite(both).all(0)]
    n, value = both.shape[1], spearman(*both) if both.size else math.nan
    if math.isnan(value):
        return None
    if n >= MANY:
        at, half = math.atanh(min(max(value, -1 + 1e-12), 1 - 1e-12)), Z / math.sqrt(n - 3)
        half *= math.sqrt(1 + value**2 / 2)
        return Interval(value, math.tanh(at - half), math.tanh(at + half))
    drawn = np.stack(list(resamples(n, DRAWS, seed)))
    return Interval.of(value, _correlations(both[:, drawn]))


def rank_correlations(
    predictions: ArrayLike, outcome: ArrayLike, covariates: ArrayLike | None = None, *, draws: int = 2000, seed: int = 0
) -> Resampled:
    """(Partial) Spearman correlations of predictions [K, M] with one outcome [M], resampled.

    The partial one is the correlation of the ranks after a linear fit on the ranks of the covariates;
    nan where nothing is left of one side, and with fewer than C + 3 rows. Rows are drawn with
    replacement, the same for all predictions. Cost: about draws * (K + C) * M^2 multiplications.

    Parameters
    ----------
    covariates : [C, M] or None
    """
    y = np.atleast_2d(np.asarray(outcome, dtype=np.float64))
    x = np.asarray(predictions, dtype=np.float64).reshape(-1, y.shape[1])
    given = np.zeros((0, y.shape[1])) if covariates is None else np.asarray(covariates, np.float64)
    rows = np.concatenate([given.reshape(-1, y.shape[1]), x, y])
    controls, M = len(rows) - len(x) - 1, y.shape[1]
    counts = np.random.default_rng(seed).multinomial(M, np.full(M, 1 / M), size=draws).astype(np.float64)
    found = (_weighted(rows, controls, weights) for weights in (np.ones((1, M)), counts, 1.0 - np.eye(M)))
    values, drawn, left_out = found
    return Resampled(values[0], drawn, left_out)


def _weighted(rows: Floats, controls: int, weights: Floats) -> Floats:
    """The last row's (partial) rank correlations [B, K] with the others behind the ``controls`` first ones.

    Columns count as often as ``weights`` [B, M] say.
    """
    if len(weights) > _CHUNK:
        parts = (weights[i : i + _CHUNK] for i in range(0, len(weights), _CHUNK))
        return np.concatenate([_weighted(rows, controls, part) for part in parts])
    total = weights.sum(1)[:, None]
    z = np.empty((len(weights), *rows.shape))
    for k, row in enumerate(rows):
        below = (row[:, None] < row) + 0.5 * (row[:, None] == row)  # [M (weighted), M]
        rank = weights @ below
        z[:, k] = rank - (weights * rank).sum(1, keepdims=True) / total
    gram = (z * weights[:, None]) @ z.transpose(0, 2, 1)
    size = np.sqrt(np.diagonal(gram, axis1=1, axis2=2))
    varies = size > 1e-9 * total
    scale = np.where(varies, 1 / np.where(varies, size, 1), 0)
    gram = gram * scale[:, :, None] * scale[:, None, :]
    left = gram[:, controls:, controls:]
    if controls:
        across = gram[:, controls:, :controls]
        inverse = np.linalg.pinv(gram[:, :controls, :controls], rcond=1e-9, hermitian=True)
        left = left - across @ inverse @ across.transpose(0, 2, 1)
    variance = np.diagonal(left, axis1=1, axis2=2)
    enough = (weights > 0).sum(1)[:, None] >= controls + 3
    known = enough & (variance[:, :-1] > _NOTHING) & (variance[:, -1:] > _NOTHING)
    spread = np.sqrt(np.where(known, variance[:, :-1] * variance[:, -1:], 1))
    return np.where(known, np.clip(left[:, :-1, -1] / spread, -1, 1), np.nan)
