"""Concepts: the mean read-out of a direction over the prompts (Concept Influence, arXiv 2602.14869).

F = (1/N) sum_i < v, h_i >,    A_ic = 1/N in the concept's column,    B = 0
"""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np

from taught.core.names import TargetName
from taught.core.readings import Readings
from taught.core.registry import TARGETS
from taught.core.target import Cotangents, TargetKind
from taught.errors import UserError


class ConceptMean(TargetKind):
    """Mean read-out of a concept."""

    reads: ClassVar[Literal["behavior", "policy", "concepts"]] = "concepts"
    spelling = "concept:NAME"
    instance = "concept:refusal"

    def every(self, readings: Readings) -> list[str | None]:
        """All concepts that are read."""
        return [str(name) for name in readings.columns]

    def value(self, name: TargetName, readings: Readings, base: Readings) -> float:
        """Mean of the concept's column."""
        assert readings.X is not None
        return float(readings.X[:, self._column(name, readings)].mean())

    def cotangents(self, name: TargetName, readings: Readings) -> Cotangents:
        """A = 1/N in one column."""
        A = np.zeros((readings.n, len(readings.columns)))
        A[:, self._column(name, readings)] = 1.0 / readings.n
        return A, None

    def words(self, name: TargetName) -> str:
        """In words."""
        return f"concept {name.about}"

    def _column(self, name: TargetName, readings: Readings) -> int:
        if name.about not in readings.columns:
            raise UserError(
                "there is no concept of this name",
                value=name.about,
                rule="one of " + ", ".join(map(str, readings.columns)),
                fix="add it under concepts in the study",
            )
        return readings.columns.index(str(name.about))


TARGETS.register("concept")(ConceptMean())
