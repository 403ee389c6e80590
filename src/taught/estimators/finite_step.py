"""The finite step: the published loop, literally (arXiv 2606.29171). The reference estimator.

For each example: one plain SGD step from the base parameters, all read-outs again, the difference. The
activation change is taken with the gates of the baseline, dX = gate * (dh W_enc); the exact refit
of the ridge on (X + dX, y + dy) and on the true new activations stands beside the linear value.

Cost: one gradient and one pass over all prompts an example. In float32 a difference of read-outs
carries rounding noise of about 1e-6 in h and 1e-5 in y, so small effects are noisy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from taught.core.example import Example, make_batch
from taught.errors import UserError
from taught.estimators.adjoint import Problem
from taught.model.gradients import evaluating
from taught.model.parameters import moving_parameters
from taught.model.readout import Readouts, read_prompts


@dataclass(frozen=True, eq=False)
class Step:
    """Effect of one SGD step on one example.

    Attributes
    ----------
    example_id : str
    loss : loss of the example before the step
    dX : float64 [N, d], change of X with the baseline's gates
    dX_exact : float64 [N, d], change of X as encoded anew (gates may open and close)
    dy : float64 [N], change of y
    """

    example_id: str
    loss: float
    dX: Tensor
    dX_exact: Tensor
    dy: Tensor


@contextmanager
def restored(model: nn.Module, parameters: Sequence[str] | None = None) -> Iterator[dict[str, Tensor]]:
    """Yield exact copies of the moving parameters and put them back on exit, always (trap 6)."""
    moving = moving_parameters(model, parameters)
    copies = {name: p.detach().clone() for name, p in moving.items()}
    try:
        yield copies
    finally:
        with torch.no_grad():
            for name, p in moving.items():
                p.copy_(copies[name])


def example_gradient(
    model: nn.Module, example: Example, parameters: Sequence[str] | None = None
) -> tuple[float, dict[str, Tensor]]:
    """Loss of one example and its gradient by plain autograd, parameter by parameter.

    Parameters
    ----------
    parameters
        Patterns of the parameters that move (``moving_parameters``); None for all.

    Raises
    ------
    UserError
        The loss is not finite; a pattern matches nothing.
    """
    moving = moving_parameters(model, parameters)
    batch = make_batch([example], [0])
    flags = {name: p.requires_grad for name, p in model.named_parameters()}
    try:
        for name, p in model.named_parameters():
            p.requires_grad_(name in moving)
        loss = batch.losses(model).sum()
        if not loss.isfinite():
            raise UserError(
                "the loss of an example is not finite",
                value=example.id,
                rule="a loss must be a finite number",
                fix="use --set model.dtype=float32, or remove this example",
            )
        grads = _gradients(loss, moving)
    finally:
        for name, p in model.named_parameters():
            p.requires_grad_(flags[name])
    return float(loss.detach()), grads


def step_direction(problem: Problem, example: Example) -> tuple[float, dict[str, Tensor]]:
    """Loss of one example and C^-1 grad L: a step is -lr times it."""
    loss, grads = example_gradient(problem.model, example, problem.parameters)
    return loss, {name: problem.divided(name, g) for name, g in grads.items()}


def _gradients(loss: Tensor, moving: dict[str, nn.Parameter]) -> dict[str, Tensor]:
    """Of the parameters that the loss depends on: none where another expert was asked."""
    if not loss.requires_grad:
        return {}
    grads = torch.autograd.grad(loss, list(moving.values()), allow_unused=True)
    return {name: g for name, g in zip(moving, grads, strict=True) if g is not None}


def finite_steps(
    problem: Problem,
    examples: Sequence[Example],
    baseline: Readouts,
    *,
    read: Callable[..., Readouts] = read_prompts,
    progress: Any = None,
) -> Iterator[Step]:
    """One :class:`Step` per example, in order.

    Parameters
    ----------
    baseline
        Read-outs of the same prompts at the base parameters, taken with the same ``read`` (never a
        cached y with a fresh h: trap 12).
    read
        How read-outs are taken: token trees, or the published one-pass-per-prefix loop.
    """
    X = problem.features(baseline.h, baseline.offsets)
    moving = moving_parameters(problem.model, problem.parameters)
    with evaluating(problem.model), restored(problem.model, problem.parameters) as base:
        for example in examples:
            loss, direction = step_direction(problem, example)
            with torch.no_grad():
                for name, p in moving.items():
                    p.copy_(base[name])
                    if name in direction:
                        p.sub_(direction[name], alpha=problem.lr)
            del direction
            after = read(problem.model, problem.prompts, problem.behavior, problem.block)
            with torch.no_grad():
                for name, p in moving.items():
                    p.copy_(base[name])
            yield _difference(problem, example.id, loss, X, baseline, after)
            if progress is not None:
                progress.advance(1)


def _difference(problem: Problem, example_id: str, loss: float, X: Tensor, before: Readouts, after: Readouts) -> Step:
    if before.prompt_ids != after.prompt_ids:
        raise ValueError("read-outs before and after a step are of different prompts")
    dX = problem.features.response(before.h, after.h - before.h, before.offsets)
    exact = problem.features(after.h, after.offsets) - X
    return Step(example_id, loss, dX.double().cpu(), exact.double().cpu(), after.y - before.y)
