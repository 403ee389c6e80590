"""A trajectory of one's own: so many steps at the same weights."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

from taught.core import rules
from taught.core.registry import TRAJECTORIES, setting
from taught.core.trajectory import Leg


@TRAJECTORIES.register("again")
@dataclass(frozen=True)
class Again:
    """Several steps from the model as it is."""

    times: int = setting(2, rules.whole(1), "how many")
    single: ClassVar[bool] = False

    def __len__(self):
        return self.times

    def refuses(self, curvature):
        return None

    def legs(self, problem, work):
        for number in range(self.times):
            yield Leg(problem, f"again{number}")

    def carry(self, queries, leg, targets, work):
        return None
