"""How the inner product of examples with targets is obtained, and what an estimator is given."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Protocol

from taught.core.curvature import Curvature
from taught.core.example import Examples
from taught.core.problem import Problem
from taught.core.scores import Scores
from taught.core.target import TargetSet
from taught.core.trajectory import Queries, Trajectory
from taught.progress import Progress, SilentProgress
from taught.run.pieces import Pieces

if TYPE_CHECKING:
    from taught.estimators.cost import Asked


@dataclass(frozen=True, eq=False)
class Work:
    """What long work reports to, and where it keeps what it has finished.

    Attributes
    ----------
    progress : steps, notes, and how far they are
    pieces : finished parts of this computation, for the case that it is stopped; None: none are kept
    folder : where an estimator may keep what outlives this computation; None: nowhere
    """

    progress: Progress = field(default_factory=SilentProgress)
    pieces: Pieces | None = None
    folder: Path | None = None


class Estimator(Protocol):
    """A way to obtain - lr < C^-1 grad L(z), grad F >; a frozen dataclass, registered in ``ESTIMATORS``.

    Attributes
    ----------
    exact : whether values are the derivative itself, and not an estimate of it
    """

    exact: bool

    def refuses(self, curvature: Curvature, trajectory: Trajectory) -> str | None:
        """Why this estimator does not go with a curvature or trajectory, in a sentence; None: it does."""

    def estimate(
        self, problem: Problem, examples: Examples, targets: TargetSet, work: Work, queries: Queries | None = None
    ) -> Scores:
        """Change of every target by a step on each example: values [P, T], with their losses.

        ``queries`` are those that a trajectory carried here, one for each of ``targets.direct``.
        """

    def cost(self, problem: Problem, examples: Examples, asked: Asked) -> Mapping[str, float]:
        """Floating point operations by part, before anything is computed (``taught.estimators.cost``)."""


def needs_steps(curvature: Curvature) -> str | None:
    """The refusal of an estimator that makes a step on each example; None where the curvature divides one."""
    if getattr(curvature, "of_queries", False):
        return "this curvature is solved for targets, and divides no gradient of an example"
    return needs_gradients(curvature)


def needs_gradients(curvature: Curvature) -> str | None:
    """The refusal of an estimator that works with whole gradients; None where the curvature has them."""
    if getattr(curvature, "of_sketches", False):
        return "this curvature is made of sketches, and divides nothing but sketches"
    return None
