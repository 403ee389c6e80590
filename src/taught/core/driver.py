"""The one driver: scores of examples for targets, by an estimator, in a curvature, along a trajectory."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any

import numpy as np
import torch

from taught.core.curvature import Curvature
from taught.core.estimator import Estimator, Work
from taught.core.example import Examples, example_losses, refuse_nonfinite
from taught.core.problem import Problem
from taught.core.registry import CURVATURES, ESTIMATORS, TRAJECTORIES, Choice, Registry
from taught.core.scores import Scores
from taught.core.target import TargetSet
from taught.core.trajectory import Follows, Queries, Trajectory
from taught.errors import UserError
from taught.run.pieces import Prefixed


@dataclass(frozen=True)
class Method:
    """How scores are made: an estimator, a curvature, a trajectory.

    Attributes
    ----------
    estimator, curvature, trajectory : as a study names them
    """

    estimator: Choice = field(default_factory=lambda: Choice("adjoint"))
    curvature: Choice = field(default_factory=lambda: Choice("identity"))
    trajectory: Choice = field(default_factory=lambda: Choice("base"))

    @property
    def name(self) -> str:
        """ESTIMATOR, ESTIMATOR+CURVATURE, and @TRAJECTORY where it is not the base model alone."""
        curved = "" if self.curvature.kind == "identity" else f"+{self.curvature.kind}"
        along = "" if self.trajectory.kind == "base" else f"@{self.trajectory.kind}"
        return f"{self.estimator.kind}{curved}{along}"

    def named(self, name: str) -> Method:
        """Another method by its name; parts that are this method's keep its parameters.

        Raises
        ------
        UserError
            An unknown part.
        """
        rest, _, trajectory = name.partition("@")
        estimator, _, curvature = rest.partition("+")

        def part(own: Choice, registry: Registry[Any], kind: str) -> Choice:
            return own if own.kind == kind else Choice(registry.require(kind))

        return Method(
            part(self.estimator, ESTIMATORS, estimator),
            part(self.curvature, CURVATURES, curvature or "identity"),
            part(self.trajectory, TRAJECTORIES, trajectory or "base"),
        )

    def refuse(self) -> None:
        """Raise a UserError where the parts do not go together: in the estimator's own words."""
        estimator: Estimator = self.estimator.make(ESTIMATORS)
        curvature, trajectory = self.curvature.make(CURVATURES), self.trajectory.make(TRAJECTORIES)
        why = estimator.refuses(curvature, trajectory) or trajectory.refuses(curvature)
        if why is not None:
            fix = "use --set attribution.estimator=adjoint"
            raise UserError(f"{self.name} does not go together", value=self.name, rule=why, fix=fix)


def scores(problem: Problem, examples: Examples, targets: TargetSet, method: Method, work: Work) -> Scores:
    """Change of every target by training on each example.

    Parameters
    ----------
    problem : at the base weights; its metric is fitted here, at each leg, unless it has one already

    Raises
    ------
    UserError
        The method does not go together; a loss or gradient is not finite: the ids of the examples.
    """
    method.refuse()
    estimator: Estimator = method.estimator.make(ESTIMATORS)
    trajectory: Trajectory | Follows = method.trajectory.make(TRAJECTORIES)
    curvature: Curvature = method.curvature.make(CURVATURES)
    if (seen := getattr(trajectory, "seen", None)) is not None:
        examples = seen(problem, examples, work)
    if isinstance(trajectory, Follows):
        followed = trajectory.follow(problem, examples, targets, work)
        refuse_nonfinite(examples, range(len(examples)), torch.from_numpy(followed.values), "derivative")
        return replace(followed, method=method.name)
    found: Scores | None = None
    carried: Queries | None = None
    for leg in trajectory.legs(problem, work):
        there = replace(work, pieces=None if work.pieces is None else Prefixed(work.pieces, leg.name))
        curved = fitted(leg.problem, examples, curvature, there)
        carried = trajectory.carry(carried, leg, targets, there)
        part = estimator.estimate(curved, examples, targets, there, carried)
        refuse_nonfinite(examples, range(len(examples)), torch.from_numpy(part.values), "gradient")
        found = part if found is None else found.plus(part)
        del leg, curved  # the next leg's model is opened when this one's is gone
    if found is None:
        raise UserError("the training run has no legs", value=method.trajectory.kind, rule="one at least")
    if not trajectory.single:
        found = replace(found, losses=example_losses(problem.model, examples, problem.batch_tokens).numpy())
    return replace(found, method=method.name)


def fitted(problem: Problem, examples: Examples, curvature: Curvature, work: Work) -> Problem:
    """The problem in a curvature, fitted at its weights; left in the one that it has."""
    there = not problem.metric.plain or problem.metric.sketched is not None
    return problem if there else problem.within(curvature.fit(problem, examples, work))


def strongest(scores: Scores, top: int, target: str | None = None) -> list[int]:
    """Places of the ``top`` examples by absolute value of a target; of the first one if none is named."""
    values = scores[scores.targets[0] if target is None else target]
    return np.argsort(-np.abs(values), kind="stable")[:top].tolist()
