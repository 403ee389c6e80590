"""The adjoint estimator: exact first-order effects of one SGD step on each example, in reverse mode.

Training on example z for one plain SGD step moves the parameters by ``-lr grad L(z)`` and a functional
F of the read-outs, to first order, by

    influence(F, z) = -lr < C^-1 grad L(z), grad F >

with C = 1, the metric of Adam (``taught.curvatures.adam``) or EK-FAC (``ekfac``). With
F = sum A * X + sum B * y (``taught.core.target``) one backward pass over the prompts gives grad F, and
one gradient an example gives every inner product: N + P passes instead of N x P.

 - :func:`target_effects`: a few targets (score, group means), any pathway.
 - :func:`feature_effects`: one target a feature, over the prompts on which the feature is active.
 - ``taught.estimators.every_prompt``: dy of every prompt for every example, block by block.

Nothing here changes a weight. Memory: the queries (parameters x targets, in chunks of
``memory_gb``) and one batch of examples.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from taught.core.behavior import Behavior
from taught.core.example import Example, ExampleBatch, batch_examples, refuse_nonfinite
from taught.features.concept import ConceptMap
from taught.features.pooling import FeatureMap
from taught.model.blockwise import by_block, checkpointed, refuse_no_chain
from taught.model.forward import capture_output, first_device, forward, get_block
from taught.model.gradients import Factor, Query, RowSparse, Site, accumulate, contract, find_sites, frozen, tap
from taught.model.kernels import product
from taught.model.parameters import moving_parameters
from taught.model.readout import PackedPrompts, ReadPrompt, pack, read_packed
from taught.run.pieces import Pieces, kept

GB = 1024**3
# Shares of the memory budget; a batch of examples comes on top.
_QUERIES, _ABOVE = 0.7, 0.1


# Orthonormal columns, [m, m] and [n, n], for a parameter [m, n]: G becomes rows' G columns.
Basis = tuple[Tensor, Tensor]


@dataclass(frozen=True, eq=False)
class Problem:
    """Everything an effect depends on besides the examples and the targets.

    Attributes
    ----------
    model, prompts, behavior, block : as in :mod:`taught.model.readout`
    features : h -> X: activations of features, or read-outs of concepts
    lr : learning rate of the one SGD step
    batch_tokens : padded tokens a batch of examples may have
    memory_gb : working memory for gradients, in GiB
    parameters : patterns of the parameters that the step moves (``moving_parameters``); None: all
    scale : diagonal of C^-1 by parameter name, in the parameter's shape; None: C = 1
    basis : the basis by parameter name in which C is diagonal; None: the parameters' own
    X : float64 [N, d], activations at the model's weights; None: those of the policy
    checkpointing : run the blocks again for the examples' gradients instead of keeping activations
    """

    model: nn.Module
    prompts: Sequence[ReadPrompt]
    behavior: Behavior
    block: int
    features: FeatureMap | ConceptMap
    lr: float
    batch_tokens: int = 512
    memory_gb: float = 3.75
    parameters: tuple[str, ...] | None = None
    scale: Mapping[str, Tensor] | None = None
    basis: Mapping[str, Basis] | None = None
    X: Tensor | None = None
    checkpointing: bool = False

    def scale_of(self, name: str) -> Tensor | None:
        """One parameter's diagonal of C^-1, or None for 1."""
        return None if self.scale is None else self.scale[name]

    def divided(self, name: str, gradient: Tensor) -> Tensor:
        """C^-1 G of one parameter, in its shape and the precision of G."""
        if self.scale is None:
            return gradient
        if self.basis is None:
            return gradient * self.scale[name]
        rows, columns = self.basis[name]
        inside = product(product(rows.T, gradient.to(rows).T), columns.T) * self.scale[name]
        return product(product(rows, inside.T), columns).to(gradient)

    def rotated(self, factor: Factor) -> Factor:
        """The factor of a gradient in the basis in which C is diagonal."""
        if self.basis is None:
            return factor
        assert factor.a is not None
        rows, columns = self.basis[factor.param]
        return replace(factor, d=product(factor.d.to(rows), rows.T), a=product(factor.a.to(rows), columns.T))


Queries = dict[str, Query]


def target_effects(
    problem: Problem, examples: Sequence[Example], A: Tensor, B: Tensor | None, *, progress: Any = None
) -> tuple[Tensor, Tensor]:
    """Effect of every example on a few targets.

    Parameters
    ----------
    A : float64 [K, N, d]
        dF/dX of each target (zeros for a pure y target).
    B : float64 [K, N] or None
        dF/dy of each target; None for zeros, and no pass beyond the block then.

    Returns
    -------
    effects : float64 [P, K]
        Change of each target per step; positive: training on the example raises it.
    losses : float64 [P]
    """
    sites = find_sites(problem.model, problem.parameters)
    with frozen(problem.model):
        queries = build_queries(problem, sites, A, B, progress)
        return _contract_examples(problem, sites, examples, queries, len(A), progress)


def feature_effects(
    problem: Problem,
    examples: Sequence[Example],
    A: Sequence[Any],
    X: Tensor,
    *,
    progress: Any = None,
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
    chunk = targets_per_chunk(problem, sites)
    effects = []

    above = _Above(int(problem.memory_gb * GB * _ABOVE))

    def compute(part: Tensor) -> Tensor:
        queries = build_queries(problem, sites, part, None, progress)
        if problem.checkpointing:
            return _contract_examples(problem, sites, examples, queries, len(part), progress)[0]
        return _contract_below(problem, sites, examples, queries, len(part), above, progress)

    with frozen(problem.model):
        for start in range(0, len(A), chunk):
            part = torch.stack([torch.as_tensor(a) for a in A[start : start + chunk]]) * (X != 0)
            key = f"targets {start} {start + len(part)}"
            effects.append(kept(pieces, key, partial(compute, part)))
    return torch.cat(effects, 1)


def feature_steps(problem: Problem, examples: int, targets: int) -> int:
    """How often :func:`feature_effects` reports progress."""
    chunk = targets_per_chunk(problem, find_sites(problem.model, problem.parameters))
    return targets + -(-targets // chunk) * examples


def targets_per_chunk(problem: Problem, sites: Sequence[Site]) -> int:
    """How many X queries fit into the memory budget (moving parameters up to the block)."""
    shapes = dict(problem.model.named_parameters())
    seen = _sites_up_to_block(problem, sites)
    return _fitting(
        problem, sum(shapes[n].numel() for s in seen if s.kind != "embedding" for n in (s.weight, s.bias) if n)
    )


def targets_at_once(problem: Problem) -> int:
    """How many queries of any targets fit into the memory budget (all moving parameters)."""
    moving = moving_parameters(problem.model, problem.parameters)
    return _fitting(problem, sum(p.numel() for p in moving.values()))


def _fitting(problem: Problem, size: int) -> int:
    """How many queries of so many numbers fit into the memory budget."""
    itemsize = max(4, next(problem.model.parameters()).element_size())
    return max(1, int(problem.memory_gb * GB * _QUERIES / (itemsize * max(size, 1))))


def _sites_up_to_block(problem: Problem, sites: Sequence[Site]) -> list[Site]:
    packed = next(pack(problem.prompts[:1], None))
    with tap(problem.model, sites) as taps, torch.no_grad():
        read_packed(problem.model, packed, None, problem.block)
        return [site for site, *_ in taps.seen]


def build_queries(problem: Problem, sites: Sequence[Site], A: Tensor, B: Tensor | None, progress: Any) -> Queries:
    """C^-1 grad F of each target: parameter name -> [K, *shape].

    Targets that ask for the same prompts share one forward pass; a target whose cotangents vanish
    on a prompt does not visit it.
    """
    queries: Queries = {}
    supports: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for k in range(len(A)):
        active = A[k].abs().sum(1) != 0
        if B is not None:
            active = active | (B[k] != 0)
        supports[tuple(active.nonzero().flatten().tolist())].append(k)
    for support, targets in supports.items():
        needs_y = B is not None and bool((B[targets] != 0).any())
        chosen = [problem.prompts[i] for i in support]
        for packed in pack(chosen, problem.behavior if needs_y else None) if chosen else []:
            index = torch.tensor(support)[list(packed.index)]
            _add_batch(
                problem,
                sites,
                packed,
                targets,
                A[:, index],
                None if B is None else B[:, index],
                queries,
                len(A),
                needs_y,
            )
        if progress is not None:
            progress.advance(len(targets))
    for name, query in queries.items():
        _divide(problem, name, query)
    return queries


def _divide(problem: Problem, name: str, query: Query) -> None:
    """C^-1 Q of every target, in place."""
    if problem.scale is None:
        return
    if isinstance(query, RowSparse):  # a look-up, which is in its own basis
        query.values.mul_(problem.scale[name][query.rows])
        return
    for one in query:
        one.copy_(problem.divided(name, one))


def _add_batch(
    problem: Problem,
    sites: Sequence[Site],
    packed: PackedPrompts,
    targets: list[int],
    A: Tensor,
    B: Tensor | None,
    queries: Queries,
    count: int,
    needs_y: bool,
) -> None:
    behavior = problem.behavior if needs_y else None
    with tap(problem.model, sites) as taps:
        h, y = read_packed(problem.model, packed, behavior, problem.block)
        X = problem.features(h, packed.offsets.to(h.device))
        values = []
        for k in targets:
            value = (A[k].to(X) * X).sum()
            if B is not None and y is not None:
                value = value + (B[k].to(y) * y).sum()
            values.append((k, value))
        for k, value in values:
            for factor in taps.factors(value, retain_graph=k != targets[-1]):
                accumulate(factor, _slot(problem, queries, factor, count, B is None, k))


def _slot(problem: Problem, queries: Queries, factor: Factor, count: int, only_x: bool, k: int) -> Query:
    """The k-th query of the factor's parameter, allocated as zeros when first asked for."""
    if factor.param not in queries:
        queries[factor.param] = _zeros(problem, factor, count, only_x)
    total = queries[factor.param]
    if isinstance(total, RowSparse):
        return RowSparse(total.rows, total.slot, total.values[k])
    return total[k]


def _zeros(problem: Problem, factor: Factor, count: int, only_x: bool) -> Query:
    """Zeros for ``count`` queries; X queries touch only the prompts' rows of the embedding."""
    weight = problem.model.get_parameter(factor.param)
    dtype = torch.promote_types(factor.d.dtype, torch.float32)  # sums of half precision in float32
    rows = _token_rows(problem, weight) if factor.kind == "embedding" and only_x else None
    if rows is not None:
        slot = torch.full((len(weight),), -1, device=weight.device)
        slot[rows] = torch.arange(len(rows), device=weight.device)
        values = torch.zeros(count, len(rows), weight.shape[1], dtype=dtype, device=weight.device)
        return RowSparse(rows, slot, values)
    return torch.zeros(count, *weight.shape, dtype=dtype, device=weight.device)


def _token_rows(problem: Problem, weight: Tensor) -> Tensor | None:
    """Rows of the token embedding that the prompts look up; None for all, or another parameter."""
    tokens = problem.model.get_input_embeddings()  # type: ignore[operator]
    used = {token for prompt in problem.prompts for token in prompt.ids}
    if weight is not tokens.weight or len(used) == len(weight):
        return None
    return torch.tensor(sorted(used), device=weight.device)


def _contract_examples(
    problem: Problem, sites: Sequence[Site], examples: Sequence[Example], queries: Queries, count: int, progress: Any
) -> tuple[Tensor, Tensor]:
    effects = torch.zeros(len(examples), count, dtype=torch.float64)
    losses = torch.zeros(len(examples), dtype=torch.float64)
    needed = [s for s in sites if s.weight in queries or s.bias in queries]
    refuse_unfit(problem, needed, examples)
    for batch in batch_examples(examples, problem.batch_tokens):
        index = list(batch.index)
        losses[index], factors = example_gradients(problem, needed, batch, examples)
        for factor in factors:
            if factor.param in queries:
                effects[index] -= problem.lr * contract(factor, queries[factor.param]).double().cpu()
        if progress is not None:
            progress.advance(len(index))
    return effects, losses


@dataclass(eq=False)
class _Above:
    """What the model above the SAE's block does to a batch of examples: the same for all X targets.

    Attributes
    ----------
    room : bytes that may be kept; of batches beyond it nothing is
    grads : batch -> gradient of the losses at the block's output, [B, T, D]
    factors : batch -> factors there of parameters that are used below as well (a tied output),
        cut down to the rows that X queries have
    """

    room: int
    grads: dict[tuple[int, ...], Tensor] = field(default_factory=dict)
    factors: dict[tuple[int, ...], list[Factor]] = field(default_factory=dict)

    def keep(self, batch: tuple[int, ...], grad: Tensor, factors: list[Factor]) -> None:
        """Keep what is known of a batch if there is room for it."""
        tensors = [grad, *(x for f in factors for x in (f.a, f.d) if x is not None)]
        need = sum(x.numel() * x.element_size() for x in tensors)
        if need <= self.room:
            self.room -= need
            self.grads[batch], self.factors[batch] = grad, factors


def _contract_below(
    problem: Problem,
    sites: Sequence[Site],
    examples: Sequence[Example],
    queries: Queries,
    count: int,
    above: _Above,
    progress: Any,
) -> Tensor:
    """``_contract_examples`` for queries of X: the second time, batches go up to the block only."""
    effects = torch.zeros(len(examples), count, dtype=torch.float64)
    below = _sites_up_to_block(problem, sites)
    names = {name for site in below for name in (site.weight, site.bias)}
    tied = [s for s in sites if s not in below and s.weight in names]
    for batch in batch_examples(examples, problem.batch_tokens):
        for factor in _factors_below(problem, below, tied, batch, examples, above):
            if factor.param in queries:
                found = contract(factor, queries[factor.param]).double().cpu()
                effects[list(batch.index)] -= problem.lr * found
        if progress is not None:
            progress.advance(len(batch.index))
    return effects


def _factors_below(
    problem: Problem,
    below: Sequence[Site],
    tied: Sequence[Site],
    batch: ExampleBatch,
    examples: Sequence[Example],
    above: _Above,
) -> list[Factor]:
    model = problem.model
    with tap(model, below) as low:
        if batch.index in above.grads:
            rows = batch.rows.to(first_device(model))
            h, _ = forward(model, rows, block=problem.block, stop_at_block=True)
            grad, others = above.grads[batch.index], above.factors[batch.index]
            assert h is not None
        else:
            h, grad, others = _go_above(problem, tied, batch, examples)
            above.keep(batch.index, grad, others)
        return [*low.factors_and((h * grad).sum(), (), training=True)[0], *others]


def _go_above(
    problem: Problem, tied: Sequence[Site], batch: ExampleBatch, examples: Sequence[Example]
) -> tuple[Tensor, Tensor, list[Factor]]:
    """The block's output, the gradient of the losses there, and the factors of ``tied``."""
    model = problem.model
    with capture_output(get_block(model, problem.block)) as seen, tap(model, tied) as high:
        losses = batch.losses(model)
        refuse_nonfinite(examples, batch.index, losses.detach().double().cpu())
        factors, (grad,) = high.factors_and(losses.sum(), seen, retain_graph=True, training=True)
    return seen[0], grad, [_cut(problem, factor) for factor in factors]


def _cut(problem: Problem, factor: Factor) -> Factor:
    """A tied output's factor with the rows that X queries have."""
    rows = _token_rows(problem, problem.model.get_parameter(factor.param))
    if rows is None or factor.kind != "linear":
        return factor
    return replace(factor, d=factor.d[..., rows])


def refuse_unfit(problem: Problem, sites: Sequence[Site], examples: Sequence[Example]) -> None:
    """Raise a UserError where checkpointing is asked for and the model's blocks are not a chain."""
    if problem.checkpointing:
        (batch,) = batch_examples(examples[:1], problem.batch_tokens)
        run = partial(batch.losses, problem.model)
        refuse_no_chain(problem.model, by_block(problem.model, sites), run)


def by_parameter(factors: Iterable[Factor]) -> dict[str, list[Factor]]:
    """The factors of each parameter: one that is used twice has several."""
    found: dict[str, list[Factor]] = defaultdict(list)
    for factor in factors:
        found[factor.param].append(factor)
    return found


def example_gradients(
    problem: Problem, sites: Sequence[Site], batch: ExampleBatch, examples: Sequence[Example]
) -> tuple[Tensor, Iterator[Factor]]:
    """Losses of a batch of examples (float64 [B]) and the factors of their gradients, to be used once.

    Raises
    ------
    UserError
        A loss is not finite: the ids of the examples.
    """
    model = problem.model
    if problem.checkpointing:
        run = partial(batch.losses, model)
        losses, parts = checkpointed(model, by_block(model, sites), run, training=True)
        values = losses.double().cpu()
        refuse_nonfinite(examples, batch.index, values)
        return values, parts
    with tap(model, sites) as taps:
        losses = batch.losses(model)
        values = losses.detach().double().cpu()
        refuse_nonfinite(examples, batch.index, values)
        return values, iter(taps.factors_and(losses.sum(), (), training=True)[0])
