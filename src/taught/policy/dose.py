"""Dose and response: whether the behavior moves with a feature as its coefficient says.

The feature's part of the residual is scaled by s at the tokens at which X_i is read, and y_i is read again. X pools
activations by last, mean or max, all homogeneous, so the edit is worth the dose (s - 1) X_ik in the unit of X_ik,
whatever the pooling. The response per unit of dose is the line through the origin over prompts i and scales s,

    slope_k = sum_is (s - 1) X_ik dy_is / sum_is ((s - 1) X_ik)^2

in the unit of the coefficient W_k (natural log per activation); positive: more of the feature, more
of the behavior. slope_k = W_k if coefficients were causes. They need not be: W_k is what the
feature predicts beside the other features, over prompts, while slope_k is what the feature's
direction does to one prompt, through all blocks behind it, the other features' parts held.

*Controls.* R random directions of the norm of the feature's own, the same amounts at one scale.
With c_kr the slopes at that scale along random directions and o_k the feature's own,

    z_k = |o_k| / rms of c_kr, r > 1         z_kr = |c_kr| / rms of the other c_kr'
    p_k = (1 + #{z_k'r >= z_k, all k', r}) / (1 + number of z_k'r)

If a feature's direction does what random ones do, z_k is drawn as z_k1 is; that the z of different features have one
distribution is assumed. Features are corrected for their number by Benjamini-Hochberg.

Source: direct edits of the Sokoban agent's channels (arXiv 2506.10138); slope and test are ours.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from taught.stats.arrays import Floats
from taught.stats.intervals import UNKNOWN, Interval, resample_counts, resamples, share_of
from taught.stats.ranks import spearman

LEVEL = 0.05
FEWEST = 5  # prompts from which on there is an interval


class Response(NamedTuple):
    """Slope (natural log per activation) and mean dy at each scale of one feature, 95% bootstrap over prompts."""

    slope: Interval
    means: list[Interval]


class Agreement(NamedTuple):
    """Slopes against coefficients.

    Attributes
    ----------
    n : features
    same_sign : share of them whose slope has the coefficient's sign, with the exact binomial (Clopper-Pearson) interval
    spearman : rank correlation, 95% bootstrap over features
    size : Interval
        sum_k D_k W_k slope_k / sum_k D_k W_k^2, D_k the mean of X_k^2: what is seen per unit of what the coefficients
        predict, over all edits. 1 if coefficients are effects. 95% bootstrap over features.
    """

    n: int
    same_sign: Interval
    spearman: Interval
    size: Interval

    def to_dict(self) -> dict[str, Any]:
        """Ready for JSON."""
        return {name: value if name == "n" else value.to_dict() for name, value in self._asdict().items()}


def slope(x: ArrayLike, scales: ArrayLike, dy: ArrayLike) -> float:
    """Slope through the origin for x [n], scales [S] and dy [S, n]; nan without a dose."""
    dose, dy = _dose(x, scales), np.asarray(dy, dtype=np.float64)
    total = float((dose**2).sum())
    return float((dose * dy).sum()) / total if total > 0 else np.nan


def response(x: ArrayLike, scales: ArrayLike, dy: ArrayLike, *, bootstrap: int, seed: int) -> Response:
    """Slope and mean changes of one feature.

    Parameters
    ----------
    x : [n], X of the feature on each prompt, n >= 1
    scales : [S]
    dy : [S, n], change of y at each scale. With fewer than ``FEWEST`` prompts there are no intervals.
    """
    dose, dy = _dose(x, scales), np.asarray(dy, dtype=np.float64)
    n = dy.shape[1]
    counts = resample_counts(n, bootstrap if n >= FEWEST else 0, seed)
    up, down = (dose * dy).sum(0), (dose**2).sum(0)
    slopes = counts @ up / (counts @ down)
    means = [Interval.of(float(row.mean()), counts @ row / n) for row in dy]
    return Response(Interval.of(slope(x, scales, dy), slopes), means)


def _dose(x: ArrayLike, scales: ArrayLike) -> Floats:
    """(s - 1) x for every scale and prompt, [S, n]."""
    x, scales = np.asarray(x, dtype=np.float64), np.asarray(scales, dtype=np.float64)
    return np.asarray((scales[:, None] - 1) * x)


def control_p(own: ArrayLike, controls: ArrayLike) -> Floats:
    """p of each feature against random directions (module docstring), before correction.

    Parameters
    ----------
    own : [d], slopes along the features' own directions
    controls : [d, R], slopes along random directions, R >= 2
    """
    own = np.abs(np.asarray(own, dtype=np.float64))
    squares = np.asarray(controls, dtype=np.float64) ** 2
    others = np.sqrt((squares.sum(1, keepdims=True) - squares) / (squares.shape[1] - 1))
    with np.errstate(divide="ignore", invalid="ignore"):
        drawn = np.sort((np.sqrt(squares) / others).ravel())
        z = own / others[:, 0]
    at_least = drawn.size - np.searchsorted(drawn, z, side="left")
    return np.asarray((1 + at_least) / (1 + drawn.size))


def agreement(coef: ArrayLike, slopes: ArrayLike, rms_x: ArrayLike, *, bootstrap: int, seed: int) -> Agreement:
    """Compare slopes [d] with coefficients [d]; ``rms_x`` [d]: root mean square of X_k."""
    table = np.stack([np.asarray(values, dtype=np.float64) for values in (coef, slopes, rms_x)], 1)
    n = len(table)
    if n == 0:
        return Agreement(0, UNKNOWN, UNKNOWN, UNKNOWN)
    draws = np.array([_rank_and_size(table[i]) for i in resamples(n, bootstrap, seed)])
    rank, size = (Interval.of(value, draws[:, j]) for j, value in enumerate(_rank_and_size(table)))
    same = table[:, 0] * table[:, 1] > 0
    return Agreement(n, share_of(int(same.sum()), n), rank, size)


def _rank_and_size(table: Floats) -> tuple[float, float]:
    coef, slopes, rms_x = table.T
    total = float(rms_x**2 @ coef**2)
    size = float(rms_x**2 @ (coef * slopes)) / total if total > 0 else np.nan
    return spearman(coef, slopes), size
