"""Change of y of every prompt for every example, exactly: all inner products of two sets of gradients.

    dy_i = -lr <grad L(z), grad y_i>        for all examples z and prompts i: [P, N]

All gradients meet block by block of the model (``taught.model.blockwise``). Cost: two forward and
backward passes over examples and prompts, the building of their gradients, and one multiplication per
example, prompt and parameter. What does not fit into the memory budget is split into chunks of examples
and prompts; every chunk of examples then meets every chunk of prompts.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor

from taught.core.example import Examples, batch_indices, make_batch, refuse_nonfinite
from taught.core.gradient import by_parameter
from taught.core.problem import GB, Problem
from taught.model.blockwise import BlockSites, last_block, split_sites, trace
from taught.model.gradients import Factor, dot, dots, frozen, neighbours
from taught.model.layout import sequence_rows, text_config
from taught.model.readout import PackedPrompts, pack_rows, read_y
from taught.progress import Progress, SilentProgress
from taught.run.pieces import Pieces, kept

# Shares of the memory budget. No batch with all its activations comes on top while blocks are gone
# through, so together they may be a little more than one.
_TRACES, _BUILT = 0.92, 0.15


def prompt_effects(
    problem: Problem, examples: Examples, *, progress: Progress | None = None, pieces: Pieces | None = None
) -> Tensor:
    """Change of y of every prompt per step on every example: float64 [P, N].

    Raises
    ------
    UserError
        The loss of an example is not finite; the model's blocks do not form a chain, or share parameters.
    """
    sites = split_sites(problem.model, problem.parameters)
    effects = torch.zeros(len(examples), len(problem.prompts), dtype=torch.float64)
    with frozen(problem.model):
        for prompts, chunk in prompt_chunks(problem, sites, examples):
            rows = [i for index in chunk for i in index]
            columns = [i for packed in prompts for i in packed.index]
            compute = partial(_meet, problem, sites, examples, chunk, prompts, progress)
            block = kept(pieces, f"examples {rows} prompts {columns}", compute)
            effects[torch.tensor(rows)[:, None], torch.tensor(columns)] = block
    return effects.mul_(-problem.lr)


def prompt_steps(problem: Problem, examples: Examples) -> int:
    """How often :func:`prompt_effects` reports progress."""
    sites = split_sites(problem.model, problem.parameters)
    return len(prompt_chunks(problem, sites, examples)) * sites.depth


def prompt_chunks(
    problem: Problem, sites: BlockSites, examples: Examples
) -> list[tuple[list[PackedPrompts], list[list[int]]]]:
    """Chunks of prompts and of examples that fit into the budget together, in all combinations.

    Examples are named batch by batch.
    """
    prompts = pack_rows(problem.prompts, problem.behavior, tokens=problem.batch_tokens)
    batches = batch_indices(examples, problem.batch_tokens)
    per_token, per_logit, each = _bytes(problem, sites)
    example_need = [len(b) * (max(len(examples[i].ids) - 1 for i in b) * per_token + each) for b in batches]
    prompt_need = [p.rows.ids.numel() * per_token + len(p.index) * (len(p.keep) * per_logit + each) for p in prompts]
    budget = problem.memory_gb * GB * _TRACES
    for_examples = max(budget / 2, budget - sum(prompt_need))
    chunks = _split(batches, example_need, for_examples)
    largest = max(sum(need) for _, need in chunks)
    return [
        (some, chunk)
        for some, _ in _split(prompts, prompt_need, budget - min(largest, for_examples))
        for chunk, _ in chunks
    ]


def _split(items: Sequence[Any], needs: Sequence[float], budget: float) -> list[tuple[list, list]]:
    """Neighbours in as few chunks as fit the budget, the largest as small as it can be.

    At least one item in each, also where it alone takes more.
    """
    enough = max(budget, *needs)
    count, low, high = len(neighbours(needs, enough)), sum(needs) / len(needs), enough
    for _ in range(30):  # the least limit that needs no more chunks
        middle = (low + high) / 2
        low, high = (low, middle) if len(neighbours(needs, middle)) <= count else (middle, high)
    return [([items[i] for i in some], [needs[i] for i in some]) for some in neighbours(needs, high)]


def _bytes(problem: Problem, sites: BlockSites) -> tuple[float, float, float]:
    """Memory that a token's trace and one block's factors take; the head at one token; what is whole of one example."""
    shapes = {name: p.shape for name, p in problem.model.named_parameters()}
    itemsize = next(problem.model.parameters()).element_size()
    config = text_config(problem.model)
    factors = max(
        sum(sum(shapes[s.weight]) for s in block if s.weight and s.kind not in ("elementwise", "whole"))
        for block in sites.blocks
    )
    width = int(config.hidden_size)
    per_token = itemsize * ((sites.depth + 3) * width + factors)
    parts = (*sites.blocks, sites.outside)
    whole = [sum(shapes[s.weight].numel() for s in part if s.weight and s.kind == "whole") for part in parts]
    each = itemsize * (max(whole[:-1]) + whole[-1])
    return float(per_token), float(itemsize * int(config.vocab_size)), float(each)


def _meet(
    problem: Problem,
    sites: BlockSites,
    examples: Examples,
    chunk: Sequence[Sequence[int]],
    prompts: Sequence[PackedPrompts],
    progress: Progress | None,
) -> Tensor:
    """<grad L(z), grad y_i> of a chunk of examples and a chunk of prompts, float64."""
    model = problem.model
    left, right, outside, top = [], [], [], []
    for packed in prompts:
        value = partial(read_y, model, packed, problem.behavior)
        _, factors, traced = trace(model, sites, value, rows=sequence_rows(model, packed.rows))
        right.append(traced)
        outside.append(_by_param(problem, factors))
    for some in chunk:
        batch = make_batch(examples, some)
        run, rows = partial(batch.losses, model), sequence_rows(model, batch.rows)
        losses, factors, traced = trace(model, sites, run, training=True, rows=rows)
        refuse_nonfinite(examples, some, losses)
        left.append(traced)
        own = _by_param(problem, factors)
        parts = []
        for other, packed in zip(outside, prompts, strict=True):
            total = torch.zeros(len(some), len(packed.index), dtype=torch.float64)
            for name in sorted(own.keys() & other.keys()):  # what both depend on
                met = dot(own[name], other[name], scale=problem.metric.scale_of(name), room=_room(problem))
                total += met.double().cpu()
            parts.append(total)
        top.append(torch.cat(parts, 1))
    del outside
    effects = torch.cat(top)
    for _ in range(sites.depth):
        sides = [[_by_param(problem, last_block(model, sites, t)) for t in side] for side in (left, right)]
        inside = torch.zeros_like(effects)
        for name in sorted({name for side in sides for factors in side for name in factors}):
            both = ([factors.pop(name) for factors in side] for side in sides)  # let go of as soon as they have met
            inside += dots(*both, room=_room(problem), scale=problem.metric.scale_of(name)).double().cpu()
        effects += inside
        (progress or SilentProgress()).advance(1)
    return effects


def _room(problem: Problem) -> int:
    """Numbers that built gradients may take at a time."""
    itemsize = next(problem.model.parameters()).element_size()
    return int(problem.memory_gb * GB * _BUILT / itemsize)


def _by_param(problem: Problem, factors: Iterable[Factor]) -> dict[str, list[Factor]]:
    """The factors of each parameter, in the basis in which C is diagonal."""
    return by_parameter(map(problem.metric.rotated, factors))
