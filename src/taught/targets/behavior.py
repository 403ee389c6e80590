"""The behavior itself: its mean over prompts, or on one prompt.

F = (1/n) sum over n prompts of y_i,    A = 0,    B_i = 1/n on these prompts, else 0
"""

from __future__ import annotations

from typing import ClassVar, Literal

import numpy as np
from numpy.typing import NDArray

from taught.core.names import TargetName
from taught.core.readings import Moves, Readings
from taught.core.registry import TARGETS
from taught.core.target import Cotangents, Floats, TargetKind
from taught.errors import UserError
from taught.policy.certificate import resampled_means


class MeanBehavior(TargetKind):
    """Mean behavior over all prompts, or over a group or category of them."""

    about: ClassVar[Literal["none", "needed", "optional"]] = "optional"
    spelling = "behavior, or behavior:GROUP for a group or category of prompts"
    instance = "behavior:harmless"

    def every(self, readings: Readings) -> list[str | None]:
        """The groups."""
        return list(readings.groups) or [None]

    def value(self, name: TargetName, readings: Readings, base: Readings) -> float:
        """Mean of y."""
        return float(readings.y[readings.rows(name.about)].mean())

    def cotangents(self, name: TargetName, readings: Readings) -> Cotangents:
        """B_i = 1/n on the prompts."""
        inside = np.zeros(readings.n)
        inside[readings.rows(name.about)] = 1.0
        return None, inside / inside.sum()

    def combine(self, name: TargetName, readings: Readings, moves: Moves) -> Floats:
        """Mean of dy."""
        mean: Floats = moves.dy[:, readings.rows(name.about)].mean(1)
        return mean

    def resampled(
        self, name: TargetName, readings: Readings, dy: Floats, dX: Floats | None, counts: NDArray[np.int64]
    ) -> Floats | str:
        """Mean over the prompts as often as they are drawn; nan if never."""
        return resampled_means(dy, readings.rows(name.about), counts)

    def words(self, name: TargetName) -> str:
        """In words."""
        return f"behavior on {'all prompts' if name.about in (None, 'all') else name.about}"


class PromptBehavior(TargetKind):
    """Behavior on one prompt."""

    many = True
    rows = False
    spelling = "prompt:ID"
    instance = "prompt:p1"

    def every(self, readings: Readings) -> list[str | None]:
        """All prompts."""
        return list(readings.prompt_ids)

    def value(self, name: TargetName, readings: Readings, base: Readings) -> float:
        """y of the prompt."""
        return float(readings.y[self._row(name, readings)])

    def cotangents(self, name: TargetName, readings: Readings) -> Cotangents:
        """B_i = 1 on the prompt."""
        return None, np.eye(1, readings.n, self._row(name, readings))[0]

    def combine(self, name: TargetName, readings: Readings, moves: Moves) -> Floats:
        """The column of dy."""
        return moves.dy[:, self._row(name, readings)]

    def words(self, name: TargetName) -> str:
        """In words."""
        return f"behavior on the prompt {name.about}"

    def _row(self, name: TargetName, readings: Readings) -> int:
        if name.about not in readings.prompt_ids:
            raise UserError(
                "there is no prompt with this id",
                value=name.about,
                rule="an id of the evaluation prompts",
                fix="taught show RUN prompts lists them",
            )
        return readings.prompt_ids.index(str(name.about))


TARGETS.register("behavior")(MeanBehavior())
TARGETS.register("prompt")(PromptBehavior())
