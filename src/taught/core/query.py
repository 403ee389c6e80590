"""Queries: C^-1 grad F of targets, from one backward pass over the prompts for each target."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from taught.core.point import Point
from taught.core.problem import GB, Problem
from taught.core.trajectory import Queries
from taught.model.gradients import Factor, Query, RowSparse, Site, accumulate, parameter_groups, tap, uses_of
from taught.model.parameters import moving_parameters
from taught.model.readout import pack, read_packed
from taught.progress import Progress, SilentProgress

# Share of the memory budget that queries take; a batch of examples comes on top.
_SHARE = 0.7


def queries_at_once(problem: Problem) -> int:
    """How many queries of any targets fit into the memory budget (all moving parameters)."""
    moving = moving_parameters(problem.model, problem.parameters)
    return fitting(problem, sum(p.numel() for p in moving.values()))


def x_queries_at_once(problem: Problem, sites: Sequence[Site]) -> int:
    """How many queries of X fit into the memory budget (moving parameters up to the point)."""
    shapes = dict(problem.model.named_parameters())
    seen = sites_before(problem, sites, problem.point)
    names = [name for site in seen if site.kind != "embedding" for name in (site.weight, site.bias) if name]
    return fitting(problem, sum(shapes[name].numel() for name in names))


def sites_before(problem: Problem, sites: Sequence[Site], point: Point | None) -> list[Site]:
    """The uses of parameters that h at a point depends on, or may: all that run before it is reached."""
    packed = next(pack(problem.prompts[:1], None))
    with tap(problem.model, sites) as taps, torch.no_grad():
        read_packed(problem.model, packed, None, point)
        return [site for site, *_ in taps.seen] + [site for site in sites if site.kind == "whole"]


def fitting(problem: Problem, size: int) -> int:
    """How many queries of so many numbers fit into the memory budget; at least one."""
    return max(1, _room(problem) // max(size, 1))


def _room(problem: Problem) -> int:
    """Numbers that queries may have together."""
    itemsize = max(4, next(problem.model.parameters()).element_size())
    return int(problem.memory_gb * GB * _SHARE / itemsize)


def query_parts(problem: Problem, sites: Sequence[Site], count: int) -> Iterator[tuple[slice, list[Site]]]:
    """Parts of ``count`` queries that each fit into the memory budget: some of them, or some parameters of one.

    Inner products are sums over parameters, so a query that does not fit as a whole is built and met part by part, each
    with passes of its own. Where C is solved for whole queries (``Metric.jointly``), a query has no parts.
    """
    at_once = queries_at_once(problem)
    parameters = {name: problem.model.get_parameter(name) for s in sites for name in (s.weight, s.bias) if name}
    whole = problem.metric.jointly is not None
    room = _room(problem) // min(at_once, max(count, 1))
    groups = [list(parameters)] if whole else parameter_groups(parameters, room)
    for start in range(0, count, at_once):
        for group in groups:
            yield slice(start, min(start + at_once, count)), uses_of(group, sites)


def some_of(some: slice, A: Tensor | None, B: Tensor | None) -> tuple[Tensor | None, Tensor | None]:
    """The cotangents of some of the targets."""
    return None if A is None else A[some], None if B is None else B[some]


def build_queries(
    problem: Problem, sites: Sequence[Site], A: Tensor | None, B: Tensor | None, progress: Progress | None = None
) -> Queries:
    """C^-1 grad F of each target: parameter name -> [K, *shape].

    Targets that ask for the same prompts share one forward pass; a target whose cotangents vanish
    on a prompt does not visit it.

    Parameters
    ----------
    A : float64 [K, N, d], dF/dX of each target; None for zeros
    B : float64 [K, N], dF/dy of each target; None for zeros, and no pass beyond the point then
    """
    progress = progress or SilentProgress()
    queries: Queries = {}
    count = next(len(part) for part in (A, B) if part is not None)
    active = torch.zeros(count, len(problem.prompts), dtype=torch.bool)
    for part in (A, B):
        if part is not None:
            active |= part.reshape(count, len(problem.prompts), -1).abs().sum(2) != 0
    supports: dict[tuple[int, ...], list[int]] = defaultdict(list)
    for k in range(count):
        supports[tuple(active[k].nonzero().flatten().tolist())].append(k)
    for support, targets in supports.items():
        needs_y = B is not None and bool((B[targets] != 0).any())
        chosen = [problem.prompts[i] for i in support]
        for packed in pack(chosen, problem.behavior if needs_y else None) if chosen else []:
            index = torch.tensor(support)[list(packed.index)]
            with tap(problem.model, sites) as taps:
                h, y = read_packed(problem.model, packed, problem.behavior if needs_y else None, problem.point)
                X = None
                if problem.features is not None and A is not None and h is not None:
                    X = problem.features(h, packed.offsets.to(h.device))
                values = []
                for k in targets:
                    parts = []
                    if X is not None and A is not None:
                        parts.append((A[k, index].to(X) * X).sum())
                    if y is not None and B is not None:
                        parts.append((B[k, index].to(y) * y).sum())
                    values.append(sum(parts[1:], parts[0]))
                for k, value in zip(targets, values, strict=True):
                    for factor in taps.factors(value, retain_graph=k != targets[-1], summed=True):
                        if factor.param not in queries:
                            queries[factor.param] = _zeros(problem, factor, count, B is None)
                        accumulate(factor, query_at(queries[factor.param], k))
        progress.advance(len(targets))
    problem.metric.solve_queries(queries)
    return queries


def query_at(queries: Query, k: int) -> Query:
    """The k-th of some queries of a parameter."""
    if isinstance(queries, RowSparse):
        return RowSparse(queries.rows, queries.slot, queries.values[k])
    return queries[k]


def _zeros(problem: Problem, factor: Factor, count: int, only_x: bool) -> Query:
    """Zeros for ``count`` queries; X queries touch only the prompts' rows of the embedding."""
    weight = problem.model.get_parameter(factor.param)
    dtype = torch.promote_types(factor.d.dtype, torch.float32)  # sums of half precision in float32
    rows = token_rows(problem, weight) if factor.kind == "embedding" and only_x else None
    if rows is not None:
        slot = torch.full((len(weight),), -1, device=weight.device)
        slot[rows] = torch.arange(len(rows), device=weight.device)
        values = torch.zeros(count, len(rows), weight.shape[1], dtype=dtype, device=weight.device)
        return RowSparse(rows, slot, values)
    return torch.zeros(count, *weight.shape, dtype=dtype, device=weight.device)


def token_rows(problem: Problem, weight: Tensor) -> Tensor | None:
    """Rows of the token embedding that the prompts look up; None for all, or another parameter."""
    tokens = problem.model.get_input_embeddings()  # type: ignore[operator]
    used = {token for prompt in problem.prompts for token in prompt.ids}
    if weight is not tokens.weight or len(used) == len(weight):
        return None
    return torch.tensor(sorted(used), device=weight.device)
