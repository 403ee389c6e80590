"""The finite step: the published loop, literally (arXiv 2606.29171). The reference estimator.

For each example: one plain SGD step from the base parameters, all read-outs again, the difference. The
activation change is taken with the gates of the baseline, dX = gate * (dh W_enc); the exact refit
of the ridge on (X + dX, y + dy) and on the true new activations stands beside the linear value.

Cost: one gradient and one pass over all prompts an example. In float32 a difference of read-outs
carries rounding noise of about 1e-6 in h and 1e-5 in y, so small effects are noisy.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from taught.core.curvature import Curvature
from taught.core.estimator import Work, needs_steps
from taught.core.example import Example, Examples, make_batch
from taught.core.problem import Problem
from taught.core.registry import ESTIMATORS
from taught.core.scores import Scores
from taught.core.target import TargetSet
from taught.core.trajectory import Queries, Trajectory
from taught.errors import UserError
from taught.estimators.cost import Asked, Passes
from taught.model.gradients import evaluating
from taught.model.parameters import flags_kept, moving_parameters
from taught.model.readout import Readouts, read_prompts
from taught.progress import Progress, SilentProgress
from taught.run.pieces import piece_key
from taught.stats.arrays import Floats


@dataclass(frozen=True, eq=False)
class Step:
    """Effect of one SGD step on one example.

    Attributes
    ----------
    loss : loss of the example before the step
    dX : float64 [N, d], change of X with the baseline's gates; None where no X is read
    dX_exact : float64 [N, d], change of X as encoded anew (gates may open and close)
    dy : float64 [N], change of y
    """

    example_id: str
    loss: float
    dX: Tensor | None
    dX_exact: Tensor | None
    dy: Tensor


@contextmanager
def restored(model: nn.Module, parameters: Sequence[str] | None = None) -> Iterator[dict[str, Tensor]]:
    """Yield exact copies of the moving parameters and put them back on exit, always."""
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
    parameters : patterns of the parameters that move (``moving_parameters``); None for all

    Raises
    ------
    UserError
        The loss is not finite; a pattern matches nothing.
    """
    moving = moving_parameters(model, parameters)
    batch = make_batch([example], [0])
    with flags_kept(model.parameters()):
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
        if not loss.requires_grad:  # it depends on none of these parameters: another expert was asked
            return float(loss), {}
        grads = torch.autograd.grad(loss, list(moving.values()), allow_unused=True)
    return float(loss.detach()), {name: g for name, g in zip(moving, grads, strict=True) if g is not None}


def step_direction(problem: Problem, example: Example) -> tuple[float, dict[str, Tensor]]:
    """Loss of one example and C^-1 grad L: a step is -lr times it."""
    loss, grads = example_gradient(problem.model, example, problem.parameters)
    return loss, {name: problem.metric.solve(name, g) for name, g in grads.items()}


def finite_steps(
    problem: Problem,
    examples: Examples,
    baseline: Readouts,
    *,
    read: Callable[..., Readouts] = read_prompts,
    progress: Progress | None = None,
) -> Iterator[Step]:
    """One :class:`Step` per example, in order.

    Parameters
    ----------
    baseline : Read-outs of the same prompts at the base parameters, taken with the same ``read``: a y that was read
        otherwise differs by rounding, which is as large as small effects are
    read : how read-outs are taken: token trees, or the published one-pass-per-prefix loop
    """
    moving = moving_parameters(problem.model, problem.parameters)
    with evaluating(problem.model):
        for example in examples:
            loss, direction = step_direction(problem, example)
            before = {name: p.data for name, p in moving.items()}  # set aside: a step takes the memory of one gradient
            try:
                with torch.no_grad():
                    for name in list(direction):
                        p = moving[name]
                        p.data = p.sub(direction.pop(name), alpha=problem.lr).to(p.dtype)
                after = read(problem.model, problem.prompts, problem.behavior, problem.point)
            finally:
                for name, p in moving.items():
                    p.data = before[name]
            if baseline.prompt_ids != after.prompt_ids:
                raise ValueError("read-outs before and after a step are of different prompts")
            dX = exact = None
            if problem.features is not None:
                X = problem.features(baseline.h, baseline.offsets)
                dX = problem.features.response(baseline.h, after.h - baseline.h, baseline.offsets).double().cpu()
                exact = (problem.features(after.h, after.offsets) - X).double().cpu()
            yield Step(example.id, loss, dX, exact, after.y - baseline.y)
            (progress or SilentProgress()).advance(1)


def kept_steps(problem: Problem, examples: Examples, work: Work) -> dict[str, dict[str, Floats]]:
    """Example id -> dX, dX_exact [N, d] (where X is read), dy [N], loss [1]; one piece an example."""
    rows: dict[str, dict[str, Floats]] = {}
    for example in examples if work.pieces is not None else ():
        assert work.pieces is not None
        found = work.pieces.load(piece_key("step", example.id))
        if found is not None:
            rows[example.id] = found
    todo = [example for example in examples if example.id not in rows]
    work.progress.step("finite steps", len(todo))
    if not todo:
        return rows
    baseline = read_prompts(problem.model, problem.prompts, problem.behavior, problem.point)
    for step in finite_steps(problem, todo, baseline, progress=work.progress):
        row = {"dy": step.dy.numpy(), "loss": np.array([step.loss])}
        if step.dX is not None and step.dX_exact is not None:
            row |= {"dX": step.dX.numpy(), "dX_exact": step.dX_exact.numpy()}
        rows[step.example_id] = row
        if work.pieces is not None:
            work.pieces.save(piece_key("step", step.example_id), row)
    return rows


@ESTIMATORS.register("finite-step")
@dataclass(frozen=True)
class FiniteStep:
    """The published loop: a real step on each example, all read-outs again, the difference."""

    exact: ClassVar[bool] = True
    gradients: ClassVar[int] = 1  # held at a time: it becomes the weights after the step
    real: ClassVar[bool] = True

    def refuses(self, curvature: Curvature, trajectory: Trajectory) -> str | None:
        """A real step is one step from one set of weights."""
        if not trajectory.single:
            return "a real step is one step from one set of weights; a sum of them at several is none"
        return needs_steps(curvature)

    def estimate(
        self, problem: Problem, examples: Examples, targets: TargetSet, work: Work, queries: Queries | None = None
    ) -> Scores:
        """dX (with the baseline's gates) and dy of each step; targets are sums of these."""
        found = kept_steps(problem, examples, work)
        rows = [found[example.id] for example in examples]
        values = np.stack([targets.changes(row.get("dX"), row["dy"]) for row in rows])
        losses = np.array([float(row["loss"][0]) for row in rows])
        details = {"dy": np.stack([row["dy"] for row in rows])}
        return Scores("finite-step", tuple(z.id for z in examples), targets.names, values, None, losses, True, details)

    def cost(self, problem: Problem, examples: Examples, asked: Asked) -> Mapping[str, float]:
        """A step and a pass over all prompts an example."""
        it = Passes(problem, examples)
        return {"read-outs": 2 * it.trees, "finite steps": len(examples) * it.step}
