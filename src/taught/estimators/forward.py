"""Forward mode: for one example the exact change of every read-out, [N, d] and [N].

The read-outs as functions of the parameters, along the step on example z (C = 1 for SGD):

    dX = d/ds X(theta - s lr C^-1 grad L(z)) at s = 0,    dy likewise

by dual numbers through the same token trees. It says *which prompts* an example moves through which
features; the adjoint says the sums. Unlike a finite step it has no second order and no rounding
noise of a difference; gates are those of the baseline by themselves.

Cost: one gradient an example and about three forward passes over the prompts' token trees. Memory: the
parameters, their gradient, and one tree. Attention runs without fused kernels, which have no
forward mode.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

from taught.core.example import Example
from taught.estimators.adjoint import Problem
from taught.estimators.finite_step import step_direction
from taught.model.gradients import frozen
from taught.model.parameters import moving_parameters
from taught.model.readout import PackedPrompts, pack, read_packed


@dataclass(frozen=True, eq=False)
class Tangent:
    """First-order effect of one SGD step on one example, on every read-out.

    Attributes
    ----------
    example_id : str
    loss : loss of the example before the step
    dX : float64 [N, d], positive: the example makes the feature more active on the prompt
    dy : float64 [N], natural logarithm
    """

    example_id: str
    loss: float
    dX: Tensor
    dy: Tensor


class _Reader(nn.Module):
    """Parameters -> (X, y) of one packed tree."""

    def __init__(self, problem: Problem) -> None:
        super().__init__()
        self.model = problem.model
        self._problem = problem

    def forward(self, packed: PackedPrompts) -> tuple[Tensor, Tensor]:
        problem = self._problem
        h, y = read_packed(self.model, packed, problem.behavior, problem.block)
        assert y is not None
        return problem.features(h, packed.offsets.to(h.device)), y


def tangents(problem: Problem, examples: Sequence[Example], *, progress: Any = None) -> Iterator[Tangent]:
    """One :class:`Tangent` per example, in order. No weight is changed.

    Raises
    ------
    UserError
        The loss of an example is not finite.
    """
    reader = _Reader(problem)
    packs = list(pack(problem.prompts, problem.behavior))
    moving = moving_parameters(problem.model, problem.parameters)
    base = {f"model.{name}": p.detach() for name, p in moving.items()}
    for example in examples:
        with frozen(problem.model):
            loss, direction = step_direction(problem, example)
            step = {
                f"model.{name}": -problem.lr * direction.get(name, torch.zeros_like(p)) for name, p in moving.items()
            }
            del direction
            moved = _along(problem, reader, packs, base, step, example.id, loss)
        yield moved  # outside the block: the caller gets the model as it was
        if progress is not None:
            progress.advance(1)


def _along(
    problem: Problem,
    reader: _Reader,
    packs: Sequence[PackedPrompts],
    base: dict[str, Tensor],
    step: dict[str, Tensor],
    example_id: str,
    loss: float,
) -> Tangent:
    count = len(problem.prompts)
    dX = torch.zeros(count, len(problem.features.ids), dtype=torch.float64)
    dy = torch.zeros(count, dtype=torch.float64)
    for packed in packs:
        with sdpa_kernel(SDPBackend.MATH):
            moved = jvp(lambda p, packed=packed: functional_call(reader, p, (packed,)), (base,), (step,))
        X_moves, y_moves = moved[1]
        index = list(packed.index)
        dX[index] = X_moves.detach().double().cpu()
        dy[index] = y_moves.detach().double().cpu()
    return Tangent(example_id, loss, dX, dy)
