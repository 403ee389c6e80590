"""A curvature of one's own: every parameter moves a share of what plain SGD moves it."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from taught.core import rules
from taught.core.curvature import Metric
from taught.core.registry import CURVATURES, setting
from taught.model.parameters import moving_parameters


@CURVATURES.register("shrunk")
@dataclass(frozen=True)
class Shrunk:
    """Steps of a share of plain SGD's."""

    share: float = setting(0.5, rules.number(above=0), "of plain SGD's step")

    def fit(self, problem, examples, work):
        moving = moving_parameters(problem.model, problem.parameters)
        return Metric({name: torch.full_like(p, self.share) for name, p in moving.items()})
