"""The adjoint estimator: exact first-order effects of one SGD step on each example, in reverse mode.

Training on example z for one plain SGD step moves the parameters by ``-lr grad L(z)`` and a functional
F of the read-outs, to first order, by

    influence(F, z) = -lr < C^-1 grad L(z), grad F >

with C = 1, the metric of Adam (``taught.curvatures.adam``) or EK-FAC (``ekfac``). With
F = sum A * X + sum B * y (``taught.core.target``) one backward pass over the prompts gives grad F, and
one gradient an example gives every inner product: N + P passes instead of N x P.
A few targets (score, group means) have a query each; dy of every prompt for every example is taken block by block
(``taught.estimators.every_prompt``).

Nothing here changes a weight. Memory: the queries (parameters x targets, in parts of
``memory_gb``) and one batch of examples.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor

from taught.core.curvature import Curvature
from taught.core.estimator import Work, needs_gradients
from taught.core.example import ExampleBatch, Examples, batch_examples, example_losses, refuse_nonfinite
from taught.core.gradient import example_gradients, refuse_unfit
from taught.core.point import Point
from taught.core.problem import GB, Problem
from taught.core.query import (
    build_queries,
    queries_at_once,
    query_parts,
    sites_before,
    some_of,
    token_rows,
    x_queries_at_once,
)
from taught.core.readings import Moves
from taught.core.registry import ESTIMATORS
from taught.core.scores import Scores
from taught.core.target import TargetSet, kind_of, words
from taught.core.trajectory import Queries, Trajectory
from taught.environment import return_freed_memory
from taught.estimators import cost
from taught.estimators.cost import Asked, Passes
from taught.estimators.every_prompt import prompt_effects, prompt_steps
from taught.model.blockwise import split_sites
from taught.model.forward import capture_output, forward, get_point
from taught.model.gradients import Factor, Site, contract, find_sites, frozen, tap
from taught.model.layout import first_device, sequence_rows
from taught.policy.ridge import pathway_sums
from taught.progress import Progress, SilentProgress
from taught.run.pieces import Pieces, kept
from taught.targets.policy import RawX, combine_raw_x

# Share of the memory budget that is kept of what lies above the block.
_ABOVE = 0.1


def target_effects(
    problem: Problem, examples: Examples, A: Tensor | None, B: Tensor | None, *, progress: Progress | None = None
) -> tuple[Tensor, Tensor]:
    """Effect of every example on a few targets.

    Parameters
    ----------
    A : float64 [K, N, d] or None
        dF/dX of each target; None for zeros.
    B : float64 [K, N] or None
        dF/dy of each target; None for zeros, and no pass beyond the point then.

    Returns
    -------
    effects : float64 [P, K]
        Change of each target per step; positive: training on the example raises it.
    losses : float64 [P]
    """
    sites = find_sites(problem.model, problem.parameters)
    count = next(len(part) for part in (A, B) if part is not None)
    effects, losses = torch.zeros(len(examples), count).double(), torch.zeros(len(examples)).double()
    with frozen(problem.model):
        for some, part in query_parts(problem, sites, count):
            queries = build_queries(problem, part, *some_of(some, A, B), progress)
            found, losses = contract_examples(problem, part, examples, queries, some.stop - some.start, progress)
            effects[:, some] += found
            del queries  # before the next ones are built
    return effects, losses


def feature_effects(
    problem: Problem,
    examples: Examples,
    A: Sequence[Any],
    X: Tensor,
    *,
    progress: Progress | None = None,
    pieces: Pieces | None = None,
) -> Tensor:
    """Effect of every example on many targets of X alone, each sparse over the prompts.

    Parameters
    ----------
    A : K arrays, float64 [N, d]
        dF/dX of each target.
    X : [N, d]
        The activations: dX is zero where X is (the gate is closed), so a target costs only the
        prompts on which A * (X != 0) is not zero. Concepts have no gate: :func:`target_effects`.

    Returns
    -------
    float64 [P, K]
    """
    sites = find_sites(problem.model, problem.parameters)
    chunk = x_queries_at_once(problem, sites)
    effects = []

    def compute(part: Tensor) -> Tensor:
        queries = build_queries(problem, sites, part, None, progress)
        return contract_examples(problem, sites, examples, queries, len(part), progress, below)[0]

    with frozen(problem.model):
        below = None if problem.checkpointing else _Below(problem, sites, examples)
        for start in range(0, len(A), chunk):
            part = torch.stack([torch.as_tensor(a) for a in A[start : start + chunk]]) * (X != 0)
            key = f"targets {start} {start + len(part)}"
            effects.append(kept(pieces, key, partial(compute, part)))
    return torch.cat(effects, 1)


def feature_steps(problem: Problem, examples: int, targets: int) -> int:
    """How often :func:`feature_effects` reports progress."""
    chunk = x_queries_at_once(problem, find_sites(problem.model, problem.parameters))
    return targets + -(-targets // chunk) * examples


def contract_examples(
    problem: Problem,
    sites: Sequence[Site],
    examples: Examples,
    queries: Queries,
    count: int,
    progress: Progress | None,
    gradients: Callable[[ExampleBatch], tuple[Tensor, Iterable[Factor]]] | None = None,
) -> tuple[Tensor, Tensor]:
    """- lr <grad L(z), q> of every example and each of ``count`` queries, float64 [P, K], and the losses [P].

    ``gradients`` gives the losses and factors of a batch; None: ``example_gradients``.
    """
    effects, losses = torch.zeros(len(examples), count).double(), torch.zeros(len(examples)).double()
    if gradients is None:
        needed = [s for s in sites if s.weight in queries or s.bias in queries]
        refuse_unfit(problem, needed, examples)
        gradients = partial(example_gradients, problem, needed, examples=examples)
    for batch in batch_examples(examples, problem.batch_tokens):
        index = list(batch.index)
        losses[index], factors = gradients(batch)
        for factor in factors:
            if factor.param in queries:
                effects[index] -= problem.lr * contract(factor, queries[factor.param]).double().cpu()
        (progress or SilentProgress()).advance(len(index))
    return effects, losses


class _Below:
    """Gradients of examples by the parameters up to the block that is read.

    What the model above the block does to a batch is the same for all X targets. Where there is room it is kept: the
    losses, their gradient at the block's output [B, T, D], and factors of parameters that are used below as well (a
    tied output), cut down to the rows that X queries have. Then the batch goes up to the block only.
    """

    def __init__(self, problem: Problem, sites: Sequence[Site], examples: Examples) -> None:
        assert problem.point is not None
        # Up to the block's output and no less: attention and MLP act on the loss beside what they add.
        self.problem, self.examples, self.cut = problem, examples, Point(problem.point.block)
        self.sites = sites_before(problem, sites, self.cut)
        names = {name for site in self.sites for name in (site.weight, site.bias)}
        self.tied = [s for s in sites if s not in self.sites and s.weight in names]
        self.room = int(problem.memory_gb * GB * _ABOVE)
        self.kept: dict[tuple[int, ...], tuple[Tensor, Tensor, list[Factor]]] = {}

    def __call__(self, batch: ExampleBatch) -> tuple[Tensor, list[Factor]]:
        model, rows = self.problem.model, sequence_rows(self.problem.model, batch.rows)
        with tap(model, self.sites) as low, capture_output(get_point(model, self.cut)) as seen:
            if batch.index in self.kept:
                forward(model, batch.rows.to(first_device(model)), point=self.cut, stop_at_point=True)
                losses, grad, others = self.kept[batch.index]
            else:
                losses, grad, others = self._above(batch, seen, rows)
            return losses, [*low.factors((seen[0] * grad).sum(), training=True, rows=rows), *others]

    def _above(
        self, batch: ExampleBatch, seen: list[Tensor], rows: Tensor | None
    ) -> tuple[Tensor, Tensor, list[Factor]]:
        model, others = self.problem.model, []
        with tap(model, self.tied) as high:
            value = batch.losses(model)
            losses = value.detach().double().cpu()
            refuse_nonfinite(self.examples, batch.index, losses)
            found, (grad,) = high.factors_and(value.sum(), seen, retain_graph=True, training=True, rows=rows)
        for factor in found:  # of a tied output only the rows that X queries have
            some = token_rows(self.problem, model.get_parameter(factor.param)) if factor.kind == "linear" else None
            others.append(factor if some is None else replace(factor, d=factor.d[..., some]))
        tensors = [grad, *(x for f in others for x in (f.a, f.d) if x is not None)]
        need = sum(x.numel() * x.element_size() for x in tensors)
        if need <= self.room:
            self.room -= need
            self.kept[batch.index] = losses, grad, others
        return losses, grad, others


@ESTIMATORS.register("adjoint")
@dataclass(frozen=True)
class Adjoint:
    """Exact first-order effects in reverse mode: one gradient a target, one an example."""

    exact: ClassVar[bool] = True

    def refuses(self, curvature: Curvature, trajectory: Trajectory) -> str | None:
        """Goes with everything that has gradients."""
        return needs_gradients(curvature)

    def estimate(
        self, problem: Problem, examples: Examples, targets: TargetSet, work: Work, queries: Queries | None = None
    ) -> Scores:
        """A query for each target; of many coefficients or prompts, sums of one basis."""
        many = sum(kind_of(name).many for name in targets.direct)
        based = queries is None and problem.metric.jointly is None
        if targets.every_prompt and not based:
            work.progress.note("the change on every prompt is left out: each would be a query of its own")
        whole = targets.every_prompt or many > max(FEW, problem.d)
        summed = targets.combinable if based and whole else ()
        losses = None if queries is not None else example_losses(problem.model, examples, problem.batch_tokens).numpy()
        parts = []
        if summed or (targets.every_prompt and based):
            parts.append(_from_basis(problem, examples, targets.select(summed), work))
        if len(summed) < len(targets.names):
            rest = targets.select([name for name in targets.names if name not in summed])
            parts.append(_by_queries(problem, examples, rest, work, queries))
        found = parts[0].joined(parts[1]) if len(parts) > 1 else parts[0]
        found = replace(found.select(targets.names), details=found.details)
        return found if losses is None else replace(found, losses=losses)

    def cost(self, problem: Problem, examples: Examples, asked: Asked) -> Mapping[str, float]:
        """A few targets, or every feature and every prompt."""
        it = Passes(problem, examples)
        found = {"read-outs": it.trees + it.examples}
        if asked.every:
            if asked.features:
                found["features"] = cost.features(problem, it, asked.features, len(examples))
            return found | {"prompts": cost.prompts(problem, it, examples)}
        contracted = 2.0 * len(examples) * asked.queries * it.moving
        parts = len(list(query_parts(problem, find_sites(problem.model, problem.parameters), 1)))
        return found | {"targets": parts * ((2 + 2 * 3) * it.trees + 3 * it.examples) + contracted}


# Up to so many coefficients or prompts have a query each, also where there are fewer features.
FEW = 16


def _by_queries(
    problem: Problem, examples: Examples, targets: TargetSet, work: Work, queries: Queries | None
) -> Scores:
    """One query a target, as many at a time as fit into memory."""
    ids, progress = tuple(z.id for z in examples), work.progress
    progress.step("gradients of the targets and of the examples", None)
    if queries is not None:
        sites = find_sites(problem.model, problem.parameters)
        with frozen(problem.model):
            values, losses = contract_examples(problem, sites, examples, queries, len(targets.direct), progress)
        return Scores("adjoint", ids, targets.names, targets.from_direct(values.numpy()), losses=losses.numpy())
    A, B = targets.cotangents()
    chunk, parts = queries_at_once(problem), []
    for start in range(0, len(targets.direct), chunk):
        some = slice(start, start + chunk)
        own = some_of(some, A, B)
        key = f"queries {[str(name) for name in targets.direct[some]]}"
        compute = partial(target_effects, problem, examples, *own, progress=progress)
        parts.append(kept(work.pieces, key, lambda run=compute: run()[0]))  # type: ignore[misc]
    return Scores("adjoint", ids, targets.names, targets.from_direct(torch.cat(parts, 1).numpy()))


def _from_basis(problem: Problem, examples: Examples, targets: TargetSet, work: Work) -> Scores:
    """Every coefficient on both pathways and every prompt, and what follows from them."""
    # What cannot be done block by block is said before the long part.
    split_sites(problem.model, problem.parameters)
    wanted = {kind_of(part).reads for name in targets.names for part in name.parts}
    policy = targets.readings.policy if "policy" in wanted else None
    x_raw, progress = None, work.progress
    progress.step("prompts: gradients of y", prompt_steps(problem, examples))
    dy = prompt_effects(problem, examples, progress=progress, pieces=work.pieces).numpy()
    for name in targets.names:
        if all(kind_of(part).reads == "behavior" and not kind_of(part).many for part in name.parts):
            moved = targets.combine(Moves(dy), [name])[:, 0]
            order = np.argsort(-moved, kind="stable")[:3]
            named = ", ".join(f"{examples[i].id} ({moved[i]:+.2g})" for i in order)
            progress.note(f"{words(name)}: raised most by {named}")
    if policy is not None:
        basis = RawX(policy)
        progress.step("features: gradients of X", feature_steps(problem, len(examples), len(basis)))
        X = torch.from_numpy(policy.X.copy()) if problem.X is None else problem.X
        F = feature_effects(problem, examples, basis, X, progress=progress, pieces=work.pieces)
        x_raw = combine_raw_x(policy, F.numpy())
        return_freed_memory()
    shift = None if policy is None or x_raw is None else pathway_sums(policy, x_raw, dy @ policy.Xc)
    values = targets.combine(Moves(dy, shift)) if targets.names else np.zeros((len(examples), 0))
    ids = tuple(z.id for z in examples)
    return Scores("adjoint", ids, targets.names, values, details={"dy": dy})
