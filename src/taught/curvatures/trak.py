"""TRAK: the effect of an example on a linear model of the sketches; values to rank by, of sketches only.

    value = phi(target)' (Phi' Phi + P damping I)^-1 phi_i (1 - p_i)

phi_i is the sketch of the gradient of example i's output, the log-odds f_i = log(p_i / (1 - p_i)), and Phi has these as
rows. p_i = exp(-L_i): for a loss that is a mean over tokens the geometric mean of their probabilities; for a preference
sigma(u), the probability that the model prefers the chosen answer. So the loss is -log p_i, and

    phi_i = - s(grad L_i) / (1 - p_i),    phi_i (1 - p_i) = - s(grad L_i)

Phi' Phi so gives much weight to examples that the model knows. phi(target) is the sketch of the target's own gradient:
the output of a prompt is y as it is.

The matrix is made of at most 4,096 examples, evenly chosen. With fewer examples than numbers of a sketch it has no
inverse: the damping is that of ``autocorrelation``. The source averages over models and projections; this is one of
each. Values are no changes per step.

Source: TRAK, Park et al., arXiv 2303.14186.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar

import numpy as np

from taught.core import rules
from taught.core.curvature import Metric
from taught.core.estimator import Work
from taught.core.example import Examples
from taught.core.problem import Problem
from taught.core.registry import CURVATURES, setting
from taught.curvatures.autocorrelation import Fitted, damping_of, example_rows, inverse
from taught.sketches.store import Row, SketchStore
from taught.stats.arrays import Floats


@CURVATURES.register("trak")
@dataclass(frozen=True)
class Trak:
    """The effect of an example on a linear model of the sketches: values to rank by; of sketches only."""

    damping: float | None = setting(
        None,
        rules.optional(rules.number(above=0)),
        "added to the mean of squares, as a share of its mean; null: what held-out examples make likely",
    )
    of_sketches: ClassVar[bool] = True

    def fit(self, problem: Problem, examples: Examples, work: Work) -> Metric:
        """C is made of the examples' sketches and losses, where they are."""
        return Metric(sketched=self.divided)

    def divided(
        self, store: SketchStore, examples: Sequence[Row], prompts: Mapping[str, str], queries: Floats
    ) -> tuple[Floats, Floats]:
        """(Phi' Phi + P damping I)^-1 q, and -1 for every example."""
        S, losses = example_rows(store, examples)
        odds = -np.expm1(-losses)  # 1 - p
        Phi = (S * inverse(odds)[:, None]).astype(np.float32)
        C = Fitted(Phi, damping_of(Phi, self.damping))
        return C.solve(queries) / len(examples), -np.ones(len(examples))
