"""Forward mode: for one example the exact change of every read-out, [N, d] and [N].

The read-outs as functions of the parameters, along the step on example z (C = 1 for SGD):

    dX = d/ds X(theta - s lr C^-1 grad L(z)) at s = 0,    dy likewise

by dual numbers through the same token trees. It says *which prompts* an example moves through which
features; the adjoint says the sums. Unlike a finite step it has no second order and no rounding
noise of a difference; gates are those of the baseline by themselves.

Cost: one gradient an example and about three forward passes over the prompts' token trees. Memory: the parameters,
their gradient, and one tree. Attention runs without fused kernels, which have no forward mode.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from taught.core.curvature import Curvature
from taught.core.estimator import Work, needs_steps
from taught.core.example import Examples, example_losses
from taught.core.problem import Problem
from taught.core.registry import ESTIMATORS
from taught.core.scores import Scores
from taught.core.target import TargetSet
from taught.core.trajectory import Queries, Trajectory
from taught.estimators.cost import Asked, Passes
from taught.estimators.finite_step import step_direction
from taught.model.directional import along, refused
from taught.model.gradients import frozen, lacks_forward_mode, refuse_detached
from taught.model.parameters import moving_parameters
from taught.model.readout import PackedPrompts, pack, read_packed
from taught.progress import Progress
from taught.run.pieces import piece_key


@dataclass(frozen=True, eq=False)
class Tangent:
    """First-order effect of one SGD step on one example, on every read-out.

    Attributes
    ----------
    loss : loss of the example before the step
    dX : float64 [N, d], positive: the example makes the feature more active on the prompt
    dy : float64 [N], natural logarithm
    """

    example_id: str
    loss: float
    dX: Tensor
    dy: Tensor


def tangents(problem: Problem, examples: Examples, *, progress: Progress | None = None) -> Iterator[Tangent]:
    """One :class:`Tangent` per example, in order. No weight is changed.

    Raises
    ------
    UserError
        The loss of an example is not finite; forward mode does not go through the model.
    """
    refuse_detached(problem.model)

    def read(packed: PackedPrompts) -> tuple[Tensor, Tensor]:
        h, y = read_packed(problem.model, packed, problem.behavior, problem.point)
        assert y is not None
        return (y[:0] if problem.features is None else problem.features(h, packed.offsets.to(h.device))), y

    packs = list(pack(problem.prompts, problem.behavior))
    moving = moving_parameters(problem.model, problem.parameters)
    for example in examples:
        with frozen(problem.model):
            loss, direction = step_direction(problem, example)
            step = {
                name: direction.pop(name).mul_(-problem.lr) if name in direction else torch.zeros_like(p)
                for name, p in moving.items()
            }
            dX = torch.zeros(len(problem.prompts), problem.d, dtype=torch.float64)
            dy = torch.zeros(len(problem.prompts), dtype=torch.float64)
            try:
                for packed in packs:
                    X_moves, y_moves = along(problem.model, step, read, packed)[1]
                    index = list(packed.index)
                    if problem.features is not None:
                        dX[index] = X_moves.detach().double().cpu()
                    dy[index] = y_moves.detach().double().cpu()
            except (RuntimeError, NotImplementedError) as error:
                other = "adjoint, which gives the same numbers" if lacks_forward_mode(error) else "finite-step"
                raise refused(problem.model, error, f"use --set attribution.estimator={other}") from error
        yield Tangent(example.id, loss, dX, dy)  # outside the block: the caller gets the model as it was
        if progress is not None:
            progress.advance(1)


@ESTIMATORS.register("forward")
@dataclass(frozen=True)
class Forward:
    """Exact first-order effects example by example, with every feature on every prompt (``dX``)."""

    exact: ClassVar[bool] = True
    gradients: ClassVar[int] = 1  # held at a time: it becomes what the weights move by

    def refuses(self, curvature: Curvature, trajectory: Trajectory) -> str | None:
        """Goes with everything that has gradients, and takes no queries."""
        if trajectory.carries:
            return "forward mode goes along an example's step and meets no query that a trajectory carries"
        return needs_steps(curvature)

    def estimate(
        self, problem: Problem, examples: Examples, targets: TargetSet, work: Work, queries: Queries | None = None
    ) -> Scores:
        """dX and dy of each example, one piece an example; targets are sums of these."""
        losses = example_losses(problem.model, examples, problem.batch_tokens)
        work.progress.step("forward mode", len(examples))
        moved = []
        for example in examples:
            key = piece_key(example.id, "tangent")
            one: dict[str, Any] | None = None if work.pieces is None else work.pieces.load(key)
            if one is not None:  # from an earlier attempt
                work.progress.advance(1)
            else:
                (tangent,) = tangents(problem, [example], progress=work.progress)
                one = {"dy": tangent.dy.numpy()} | ({} if problem.features is None else {"dX": tangent.dX.numpy()})
                if work.pieces is not None:
                    work.pieces.save(key, one)
            moved.append(one)
        values = np.stack([targets.changes(one.get("dX"), one["dy"]) for one in moved])
        details: dict[str, Any] = {"dy": np.stack([one["dy"] for one in moved])}
        ids = tuple(z.id for z in examples)
        if problem.features is not None:
            details |= {"dX": np.stack([one["dX"] for one in moved]).astype(np.float32), "detailed": ids}
        return Scores("forward", ids, targets.names, values, losses=losses.numpy(), details=details)

    def cost(self, problem: Problem, examples: Examples, asked: Asked) -> Mapping[str, float]:
        """x W moves with x and with W: about three forward passes over the prompts an example."""
        it = Passes(problem, examples)
        found = {"read-outs": it.trees + it.examples}
        return found | {"forward mode": len(examples) * (3 * it.trees + it.gradient)}
