"""Sums over checkpoints of a training run (TracIn, arXiv 2002.08484).

    effect(F, z) = sum over c of -lr_c < C_c^-1 grad L_c(z), grad F_c >

L_c and F_c are loss and functional at the weights of checkpoint c, with c's own gates of X; the functional's cotangents
A and B are those of the base model's readings, so that all checkpoints answer one question. Checkpoints are folders, or
the states of a run that ``taught.Record`` wrote, each with the rate of the step that was made from it. Where one is an
adapter, what training the adapter moves is moved.
"""

from __future__ import annotations

import copy
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import ClassVar

from taught.core import rules
from taught.core.curvature import Curvature
from taught.core.estimator import Work
from taught.core.example import Examples
from taught.core.problem import Problem
from taught.core.registry import TRAJECTORIES, setting
from taught.core.target import TargetSet
from taught.core.trajectory import Leg, Queries
from taught.errors import UserError
from taught.model.adapter import given_adapter
from taught.training.recorded import Recorded
from taught.trajectories.trained import enter


@dataclass(frozen=True)
class Checkpoint:
    """Weights that a training run passed through, and its learning rate there."""

    id: str
    lr: float
    revision: str | None = None


_CHECKPOINT = rules.record(
    Checkpoint, id=rules.folder_or_hub_id(), lr=rules.rate(), revision=rules.optional(rules.text())
)


@TRAJECTORIES.register("checkpoints")
@dataclass(frozen=True)
class Checkpoints:
    """One step at each checkpoint of a training run, added up."""

    checkpoints: tuple[Checkpoint, ...] = setting(
        (), rules.list_of(_CHECKPOINT), "[{id: folder or hub id, lr: 2.0e-5}, ...]"
    )
    run: str | None = setting(
        None, rules.optional(rules.folder()), "in their place: the states of a run that taught.Record wrote"
    )
    single: ClassVar[bool] = False
    carries: ClassVar[bool] = False
    asks: ClassVar[str] = (
        "what one step at each checkpoint does, added up; of the trained model alone, with --set "
        "attribution.curvature=ekfac, roughly what its run did. More of that: --set attribution.trajectory=segments"
    )

    def __post_init__(self) -> None:
        if self.run is not None and self.checkpoints:
            rule, fix = "a list of them, or a recorded run", "leave out attribution.trajectory.checkpoints or run"
            raise UserError("checkpoints are named twice", value=self.run, rule=rule, fix=fix)

    def __len__(self) -> int:
        return len(self.checkpoints) if self.run is None else len(_taken(Recorded.open(self.run)))

    def seen(self, problem: Problem, examples: Examples, work: Work) -> Examples:
        """The examples as a recorded run saw them; one of another model or of other data is refused."""
        return examples if self.run is None else Recorded.open(self.run).seen(problem, examples, work.progress)

    def refuses(self, curvature: Curvature) -> str | None:
        """What was measured at one set of weights does not hold at the others."""
        if getattr(curvature, "one_place", False):
            return "each checkpoint has second moments of its own; leave them out and they are estimated there"
        return None

    def legs(self, problem: Problem, work: Work) -> Iterator[Leg]:
        """The problem at each checkpoint, the last first; one model is held at a time, beside the base one."""
        if self.run is not None:
            run = Recorded.open(self.run)
            problem = replace(problem, parameters=run.parameters(problem))  # what moved in it
            for step in reversed(_taken(run)):
                work.progress.step(f"the recorded run before step {step + 1} of {run.steps}")
                model = copy.deepcopy(problem.model)
                enter(model, run.load(step).parts["weights"])
                yield Leg(problem.at(model, float(run.lrs[step])), f"step{step}")
                del model
            return
        if problem.opener is None:
            raise UserError("checkpoints cannot be opened here", rule="a study, or a problem with an opener")
        for number, checkpoint in reversed(list(enumerate(self.checkpoints))):
            work.progress.step(f"checkpoint {number + 1} of {len(self)}")
            model = problem.opener(checkpoint.id, checkpoint.revision)
            moving = problem.parameters or given_adapter(model)[1]  # of an adapter on the model what it trains
            yield Leg(replace(problem.at(model, checkpoint.lr), parameters=moving), f"checkpoint{number}")
            del model

    def carry(self, queries: Queries | None, leg: Leg, targets: TargetSet, work: Work) -> Queries | None:
        """Nothing is carried: each checkpoint takes the gradient of F at its own weights."""
        return None


def _taken(run: Recorded) -> list[int]:
    """The states of a run from which a step was made that moved something: warm-up begins with a rate of 0."""
    return [step for step in run.states if run.lrs[step] > 0]
