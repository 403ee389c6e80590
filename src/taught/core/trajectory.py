"""The legs of a training run that effects are summed over.

    influence(F, z) = sum over legs c of - lr_c < C_c^-1 grad L_c(z), q_c >,    q at the end of training = grad F

At the base model alone there is one leg. A trajectory either lets each leg ask for the gradient of F at
its own weights (sums over checkpoints), or carries the query from the end of training back to its
beginning (:meth:`Trajectory.carry`). One that follows a run step by step answers as a whole (:class:`Follows`).
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING, Protocol, runtime_checkable

from taught.core.registry import TRAJECTORIES
from taught.model.gradients import Query

if TYPE_CHECKING:
    from taught.core.curvature import Curvature
    from taught.core.estimator import Work
    from taught.core.example import Examples
    from taught.core.problem import Problem
    from taught.core.scores import Scores
    from taught.core.target import TargetSet
    from taught.estimators.cost import Asked

Queries = dict[str, Query]


@dataclass(frozen=True, eq=False)
class Leg:
    """One part of a training run.

    Attributes
    ----------
    problem : at the weights and the learning rate of this leg
    name : what progress and pieces call it
    """

    problem: Problem
    name: str = ""


class Trajectory(Protocol):
    """The legs of a run, from its end to its beginning; a frozen dataclass, registered in ``TRAJECTORIES``.

    Attributes
    ----------
    single : whether there is one leg alone, at the base weights
    carries : whether legs are given queries (:meth:`carry`), which only some estimators take

    Notes
    -----
    It may have ``asks``: what it answers and when another is better, in a sentence that ``taught check`` shows.

    One that rests on a run of its own may have ``seen(problem, examples, work)``: the examples as that run saw them. It
    raises a UserError where the run is of another model or of other examples. It is called before anything is
    computed, and by ``taught check``.
    """

    single: bool
    carries: bool

    def refuses(self, curvature: Curvature) -> str | None:
        """Why this trajectory does not go with a curvature, in a sentence; None: it does."""

    def legs(self, problem: Problem, work: Work) -> Iterator[Leg]:
        """Each leg when its turn comes; its model may be freed when the next is asked for."""

    def carry(self, queries: Queries | None, leg: Leg, targets: TargetSet, work: Work) -> Queries | None:
        """Queries for a leg from those of the leg after it (None at the end); None: it takes grad F at its weights."""


@runtime_checkable
class Follows(Protocol):
    """A trajectory that goes through a whole training run by itself: it has no legs to be asked for one by one."""

    single: bool
    carries: bool

    def refuses(self, curvature: Curvature) -> str | None:
        """As of :class:`Trajectory`."""

    def follow(self, problem: Problem, examples: Examples, targets: TargetSet, work: Work) -> Scores:
        """Effect of every example's weight in training on every target of the trained model."""

    def cost(self, problem: Problem, examples: Examples, asked: Asked) -> dict[str, float]:
        """Floating point operations by part, before anything is computed."""

    def bytes(self, problem: Problem, examples: Examples, asked: Asked) -> tuple[int, int]:
        """Memory beside the model, and disk."""


@TRAJECTORIES.register("base")
@dataclass(frozen=True)
class Base:
    """One step from the model as it is."""

    single = True
    carries = False
    asks = (
        "what one step on an example does. From what training made of the model: --tuned MODEL. What a whole training "
        "run did: --set attribution.trajectory=segments, or =steps, which is exact and takes several trainings"
    )

    def refuses(self, curvature: Curvature) -> str | None:
        """Goes with everything."""
        return None

    def legs(self, problem: Problem, work: Work) -> Iterator[Leg]:
        """The problem itself."""
        yield Leg(problem)

    def carry(self, queries: Queries | None, leg: Leg, targets: TargetSet, work: Work) -> Queries | None:
        """Nothing is carried."""
        return None
