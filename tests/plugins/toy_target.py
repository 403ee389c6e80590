"""A target of one's own: how far apart the behavior is on the prompts of a group, max y - min y."""

from __future__ import annotations

import numpy as np

from taught.core.registry import TARGETS
from taught.core.target import TargetKind


class Spread(TargetKind):
    spelling = "spread:GROUP"
    instance = "spread:harmful"

    def every(self, readings):
        return list(readings.groups)

    def value(self, name, readings, base):
        y = readings.y[readings.rows(name.about)]
        return float(y.max() - y.min())

    def cotangents(self, name, readings):
        rows = readings.rows(name.about)
        y, B = readings.y[rows], np.zeros(readings.n)
        B[rows[int(y.argmax())]] += 1.0
        B[rows[int(y.argmin())]] -= 1.0
        return None, B

    def words(self, name):
        return f"spread of the behavior on {name.about}"


TARGETS.register("spread")(Spread())
