"""ASTRA: the curvature of the loss across layers, solved for each target by iteration from EK-FAC's answer.

    (H + D) x = q,    H = mean over examples of J' B J,    D = EK-FAC's damping, one number a layer

J is the derivative of an example's outputs by the weights that EK-FAC moves. Of an example that is trained on as it
stands the outputs are the logits at its scored tokens t, and B = w_t (diag p - p p'), the Hessian of the loss by them;
of a preference it is the weighted sum s, and B = f''(s). So H is the Gauss-Newton Hessian that EK-FAC approximates:
EK-FAC leaves out what layers have to do with one another, and within a layer all but the diagonal in its own basis.
From EK-FAC's answer, with P = its inverse and H_k of a random batch of examples,

    x_0 = P q,    m_k+1 = momentum m_k + P ((H_k + D) x_k - q),    x_k+1 = x_k - rate_k m_k+1

which is momentum SGD on 1/2 x' (H + D) x - x' q, preconditioned. With all examples in every step it converges to the
solution for rates below 2 (1 + momentum) / lambda, lambda the largest eigenvalue of P (H + D). Batches differ, which
leaves noise in x: the rate falls to 0 over the second half of the steps. By default it begins at 1 / lambda, with
batches at a quarter of that; lambda is measured on the batches by power iteration.

One product J' B J x takes a forward pass in dual numbers along x, which gives J x, and a gradient of the logits'
product with B J x. Only whole queries are solved for: no example's gradient is divided by this curvature.

Source: Wang et al., arXiv 2507.14740.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from taught.core import rules
from taught.core.curvature import Metric
from taught.core.estimator import Work
from taught.core.example import ExampleBatch, Examples, batch_examples
from taught.core.gradient import example_gradients
from taught.core.problem import Problem
from taught.core.registry import CURVATURES, setting
from taught.curvatures.ekfac import Ekfac, ekfac_metric
from taught.errors import UserError
from taught.estimators.cost import Asked, Passes
from taught.model.directional import along, refused
from taught.model.gradients import Query, accumulate, find_sites, frozen
from taught.progress import Progress

Tensors = dict[str, Tensor]

POWER = 10  # products that the largest eigenvalue is measured by


@CURVATURES.register("astra")
@dataclass(frozen=True)
class Astra:
    """The curvature of the loss across layers, by iteration from EK-FAC's answer; solved for targets only."""

    steps: int = setting(100, rules.whole(1), "steps of the iteration, for each target")
    batch: int = setting(32, rules.whole(1), "examples a step, drawn at random")
    rate: float | None = setting(
        None, rules.optional(rules.number(above=0)), "size of a step; null: from the largest eigenvalue, measured"
    )
    momentum: float = setting(0.9, rules.number(minimum=0, maximum=0.999), "share of the last step that is kept")
    damping: float = setting(0.1, rules.number(above=0), "added to a layer's eigenvalues, as a share of their mean")
    seed: int = setting(0, rules.whole(0), "of the labels that EK-FAC draws, and of the batches")
    of_queries: ClassVar[bool] = True
    newton: ClassVar[bool] = True

    def fit(self, problem: Problem, examples: Examples, work: Work) -> Metric:
        """EK-FAC, and the iteration that begins with it.

        Raises
        ------
        UserError
            As of EK-FAC; forward mode does not go through the model. While targets are solved for: the iteration
            diverges.
        """
        layers = self._ekfac.layers(problem, examples, work)
        start = ekfac_metric(layers, self.damping)
        within = replace(problem, parameters=start.parameters)
        system = System(within, sorted(examples, key=lambda z: z.id), start, layers.damping(self.damping))
        rate = self.rate
        if rate is None:
            with frozen(problem.model):
                largest = system.largest_eigenvalue(self.batch, self.seed)
            rate = (1.0 if self.batch >= len(examples) else 0.25) / largest
            work.progress.note(f"ASTRA: largest eigenvalue {largest:.3g}, where EK-FAC has 1; rate {rate:.3g}")
        return Metric(parameters=start.parameters, jointly=Iteration(system, self, rate, work.progress))

    @property
    def _ekfac(self) -> Ekfac:
        return Ekfac(self.damping, self.seed)

    def curved(self, problem: Problem) -> tuple[str, ...]:
        """The parameters that have a curvature: the only ones that move."""
        return self._ekfac.curved(problem)

    def numbers(self, problem: Problem) -> int:
        """What EK-FAC holds; the answer, its last step and a product of one target."""
        moving = sum(problem.model.get_parameter(name).numel() for name in self.curved(problem))
        return self._ekfac.numbers(problem) + 3 * moving

    def cost(self, problem: Problem, examples: Examples, asked: Asked) -> dict[str, float]:
        """EK-FAC's; a product is about six passes, one a step and target on a batch, and two on all examples."""
        batch = min(self.batch, len(examples)) / len(examples)
        passes = POWER * batch * (self.rate is None) + asked.queries * (self.steps * batch + 2)
        found = self._ekfac.cost(problem, examples, asked)
        return found | {"iteration": 6 * passes * Passes(problem, examples).examples}


@dataclass(frozen=True, eq=False)
class System:
    """H + D of some examples, and P, EK-FAC's inverse of it.

    Attributes
    ----------
    problem : its parameters are those that move
    examples : in an order that does not depend on the caller's
    start : P
    damping : D, by parameter name
    """

    problem: Problem
    examples: Examples
    start: Metric
    damping: Mapping[str, Tensor]

    def product(self, x: Tensors, some: Sequence[int]) -> Tensors:
        """(H + D) x, with H the mean over some of the examples. Cost: six forward passes over these."""
        found = {name: self.damping[name] * of for name, of in x.items()}
        model, sites = self.problem.model, find_sites(self.problem.model, self.problem.parameters)
        chosen = [self.examples[i] for i in some]
        step = {name: of.to(model.get_parameter(name).dtype) for name, of in x.items()}
        for batch in batch_examples(chosen, self.problem.batch_tokens):
            try:
                logits, moved = along(model, step, batch.scored_logits, model)
            except (RuntimeError, NotImplementedError) as error:
                raise refused(model, error, "use --set attribution.curvature=ekfac") from error
            pulled = _Pulled(**vars(batch), pull=batch.bent(logits, moved))
            for factor in example_gradients(self.problem, sites, pulled, chosen)[1]:
                accumulate(factor, found[factor.param], 1 / len(chosen))
        return found

    def divided(self, g: Tensors) -> Tensors:
        """P g."""
        return {name: self.start.solve(name, of) for name, of in g.items()}

    def batches(self, size: int, seed: int) -> Iterator[Sequence[int]]:
        """Random batches without end; all examples where there are no more."""
        draw, count = np.random.default_rng(seed), len(self.examples)
        while True:
            yield range(count) if size >= count else sorted(draw.choice(count, size, replace=False).tolist())

    def largest_eigenvalue(self, size: int, seed: int) -> float:
        """Of P (H + D), by power iteration on batches: v' (H + D) v / v' P^-1 v at its largest."""
        draw, largest = torch.Generator().manual_seed(seed), 0.0
        g = {}
        for name, scale in (self.start.scale or {}).items():
            g[name] = torch.randn(scale.shape, generator=draw, dtype=torch.float64).to(scale)
        for some, _ in zip(self.batches(size, seed), range(POWER), strict=False):
            v = self.divided(g)
            root = inner(v, g) ** 0.5  # v' P^-1 v = v' g
            v = {name: of / root for name, of in v.items()}
            g = self.product(v, some)
            largest = max(largest, inner(v, g))
        return largest


@dataclass(frozen=True, eq=False)
class Iteration:
    """Solves (H + D) x = q for queries, in place; ``rate`` is the first step's."""

    system: System
    settings: Astra
    rate: float
    progress: Progress

    def __call__(self, queries: dict[str, Query]) -> None:
        """The queries of all targets, one after the other."""
        model = self.system.problem.model
        count = len(next(iter(queries.values()))) if queries else 0  # type: ignore[arg-type]
        for name in self.system.damping:  # what q does not touch, x does
            weight = model.get_parameter(name)
            if name not in queries:
                dtype = torch.promote_types(weight.dtype, torch.float32)
                queries[name] = torch.zeros(count, *weight.shape, dtype=dtype, device=weight.device)
        residuals = []
        for k in range(count):
            q: Tensors = {name: queries[name][k] for name in self.system.damping}  # type: ignore[index]
            if not any(of.any() for of in q.values()):
                continue
            x, before, after = self.solve(q)
            residuals.append((after, before))
            for name, of in x.items():
                q[name].copy_(of)
        if residuals:
            after, before = max(residuals)
            self.progress.note(
                f"ASTRA: |(H + D) x - q| / |q| from {before:.2g}, EK-FAC's, to {after:.2g} in {self.settings.steps} "
                f"steps{f', at most, of {len(residuals)} targets' if len(residuals) > 1 else ''}"
            )

    def solve(self, q: Tensors) -> tuple[Tensors, float, float]:
        """x, and |(H + D) x - q| / |q| over all examples at the beginning and at the end.

        Raises
        ------
        UserError
            The iteration diverges: it ends, by 1/2 x' (H + D) x - x' q, above where it began.
        """
        system, settings = self.system, self.settings
        x = system.divided(q)
        last = {name: torch.zeros_like(of) for name, of in x.items()}
        before, begun = self._state(x, q)
        whole = settings.batch >= len(system.examples)
        for step, some in zip(range(settings.steps), system.batches(settings.batch, settings.seed), strict=False):
            rate = self.rate * (1.0 if whole else min(1.0, 2 * (1 - step / settings.steps)))
            g = system.product(x, some)
            for name, of in g.items():
                last[name].mul_(settings.momentum).add_(system.start.solve(name, of.sub_(q[name])))
                x[name].sub_(last[name], alpha=rate)
            if not all(of.isfinite().all() for of in x.values()):
                raise self._diverged(f"not finite after {step + 1} steps")
        after, ended = self._state(x, q)
        if not ended <= begun + 1e-6 * abs(begun):
            raise self._diverged(f"residual {before:.3g} at the beginning, {after:.3g} after {settings.steps} steps")
        return x, before, after

    def _state(self, x: Tensors, q: Tensors) -> tuple[float, float]:
        """|(H + D) x - q| / |q|, and 1/2 x' (H + D) x - x' q."""
        g = self.system.product(x, range(len(self.system.examples)))
        value = inner(x, g) / 2 - inner(x, q)
        off = {name: of.sub_(q[name]) for name, of in g.items()}
        return (inner(off, off) / inner(q, q)) ** 0.5, value

    def _diverged(self, value: str) -> UserError:
        key = "momentum=0, or a larger batch" if self.settings.rate is None else "rate=null: then it is measured"
        return UserError(
            "the iteration of ASTRA diverges",
            value=value,
            rule=f"rate {self.rate:.3g}: at most about 2 / the largest eigenvalue of a batch",
            fix=f"use --set attribution.curvature.{key}",
        )


def inner(a: Tensors, b: Tensors) -> float:
    """The inner product over all parameters, in float64."""
    return sum(float((of.double() * b[name].double()).sum()) for name, of in a.items())


@dataclass(frozen=True, eq=False)
class _Pulled(ExampleBatch):
    """A batch of which the loss is the product of its logits with given numbers: its gradient is J' pull."""

    pull: Tensor

    def losses(self, model: nn.Module) -> Tensor:
        """The products, [B]."""
        return (self.scored_logits(model) * self.pull).sum((1, 2))
