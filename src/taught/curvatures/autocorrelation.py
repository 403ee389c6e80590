"""Gradient autocorrelation as curvature, in the space of sketches.

    C = R + damping I,    R = mean over examples of s s'          effect = - lr < s(example), C^-1 q >

Directions in which all examples' gradients lie anyway count for less: what sets an example apart counts
for more (TrackStar, arXiv 2410.17413, uses R^-1/2 on both sides; with one set of gradients this is
the same product). R is never built: with S [n, K] the examples' sketches,

    C^-1 q = (q - S' (S S' + n damping I)^-1 S q) / damping

The damping is the one under which gradients of examples that R was not made from are most likely, if
they are drawn from a normal distribution with covariance C.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
from numpy.typing import NDArray

from taught.core.curvature import Metric
from taught.core.estimator import Work
from taught.core.example import Examples
from taught.core.problem import Problem
from taught.core.registry import CURVATURES
from taught.errors import UserError
from taught.sketches.store import Row, SketchStore
from taught.stats.arrays import Floats

# More examples than these do not make a better R, but a larger one.
LARGEST = 4096


@CURVATURES.register("autocorrelation")
@dataclass(frozen=True)
class Autocorrelation:
    """What sets an example's gradient apart from the others counts for more; of sketches only."""

    of_sketches: ClassVar[bool] = True

    def fit(self, problem: Problem, examples: Examples, work: Work) -> Metric:
        """C is made of the examples' sketches, where they are."""
        return Metric(sketched=self.divided)

    def divided(
        self, store: SketchStore, examples: Sequence[Row], prompts: Mapping[str, str], queries: Floats
    ) -> tuple[Floats, None]:
        """C^-1 q of queries [K, Q]; values stay changes per step."""
        return fit_autocorrelation(store, examples).solve(queries), None


@dataclass(frozen=True, eq=False)
class Fitted:
    """C = S'S / n + damping I.

    Attributes
    ----------
    sketches : float32 [n, K]
    damping : in the unit of a squared sketch
    """

    sketches: NDArray[np.float32]
    damping: float

    def inner(self) -> tuple[Floats, Floats]:
        """S [n, K] and S S' + n damping I [n, n]."""
        S = self.sketches.astype(np.float64)
        return S, S @ S.T + len(S) * self.damping * np.eye(len(S))

    def solve(self, queries: Floats) -> Floats:
        """C^-1 q for queries [K, Q]. Cost: n^2 K + n K Q."""
        S, inner = self.inner()
        found: Floats = (queries - S.T @ np.linalg.solve(inner, S @ queries)) / self.damping
        return found


def fit_autocorrelation(store: SketchStore, examples: Sequence[Row]) -> Fitted:
    """R from the examples (at most 4,096, evenly chosen), the damping from every third of them.

    Raises
    ------
    UserError
        Fewer than six examples, or all gradients are zero.
    """
    S, _ = example_rows(store, examples)
    return Fitted(S, damping_of(S))


def inverse(x: Floats) -> Floats:
    """1 / x where x is above 0; else 0."""
    return np.divide(1, x, out=np.zeros_like(x), where=x > 0)


def evenly(count: int) -> NDArray[np.int64]:
    """Places in a list of so many, at most 4,096, evenly chosen."""
    return np.unique(np.linspace(0, count - 1, min(count, LARGEST)).astype(int))


def example_rows(store: SketchStore, examples: Sequence[Row]) -> tuple[NDArray[np.float32], Floats]:
    """Sketches [n, K] and losses [n] of the examples, of at most 4,096 evenly chosen ones."""
    wanted = {examples[i]: n for n, i in enumerate(evenly(len(examples)))}
    S, losses = np.zeros((len(wanted), store.dim), dtype=np.float32), np.zeros(len(wanted))
    for ours, rows, own in store.examples(wanted):
        S[ours], losses[ours] = rows, own
    return S, losses


def damping_of(S: NDArray[np.float32], share: float | None = None) -> float:
    """A share of the mean square of the sketches' numbers [n, K]; None: what makes every third of them most likely.

    Raises
    ------
    UserError
        The sketches are fewer than six, where they choose it; all are zero.
    """
    if share is not None and np.any(S):
        return share * float((S.astype(np.float64) ** 2).mean())
    if len(S) < 6:
        raise UserError(
            "too few examples for an autocorrelation",
            value=len(S),
            rule="at least 6: a third of them choose the damping",
            fix="use --set attribution.curvature=identity",
        )
    held_out = np.arange(len(S)) % 3 == 2
    return choose_damping(S[~held_out], S[held_out])


def choose_damping(fitted: NDArray[np.float32], held_out: NDArray[np.float32]) -> float:
    """The most likely of 41 values, from 1e-6 to 1e4 times the mean square of a sketch's numbers.

    With e_i, v_i the eigenvalues and vectors of S S' / n, the directions S' v_i / sqrt(n e_i) hold
    all of R, and for a held-out s with coordinates c_i

        - 2 log p = (|s|^2 - sum_i c_i^2 e_i / (e_i + damping)) / damping
                    + sum_i log(e_i + damping) + (K - n) log damping
    """
    S, T = fitted.astype(np.float64), held_out.astype(np.float64)
    n, K = S.shape
    mean_square = float((S**2).mean())
    if mean_square == 0:
        raise UserError(
            "all gradients of the examples are zero",
            rule="R must not vanish",
            fix="use --set attribution.curvature=identity",
        )
    e, V = np.linalg.eigh(S @ S.T / n)
    kept = e > 1e-10 * e[-1]
    e, V = e[kept], V[:, kept]
    c2 = ((T @ S.T) @ V) ** 2 / (n * e)
    dampings = mean_square * np.logspace(-6, 4, 41)
    cost = [
        ((T**2).sum(1) - c2 @ (e / (e + d))).mean() / d + np.log(e + d).sum() + (K - len(e)) * np.log(d)
        for d in dampings
    ]
    return float(dampings[int(np.argmin(cost))])
