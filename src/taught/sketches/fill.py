"""Sketches of gradients: of each example's loss, and of each prompt's y and active features.

    example   s(grad L(z))             one an example
    y         s(grad y_i)              one a prompt
    feature   s(grad X_ik)             one a prompt and feature that is active on it

Every effect is a sum of inner products of the first kind with the other two, whatever the policy, so these sketches
answer questions that nobody had asked when they were made: another alpha, other features of those stored, other groups
of prompts, without the model. What a sketch is: :mod:`taught.sketches.project`; how a policy becomes inner products:
:mod:`taught.sketches.answer`. A store is filled with the sketches that it lacks, shard by shard.

Cost of a prompt: one forward pass, and for y and for each active feature a backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from taught.core.example import Example, Examples, batch_examples, refuse_nonfinite
from taught.core.gradient import example_gradients, refuse_unfit
from taught.core.problem import Problem
from taught.model.gradients import Site, find_sites, frozen, tap
from taught.model.layout import sequence_rows
from taught.model.readout import PackedPrompts, ReadPrompt, pack_rows, read_packed, read_y
from taught.progress import Progress, SilentProgress
from taught.sketches.answer import covered_features
from taught.sketches.project import Projection, SharedInputs
from taught.sketches.store import Row, SketchStore, digest, example_digest

# Small enough that a killed run loses little, large enough for full batches.
PAIRS_A_SHARD, PROMPTS_A_SHARD = 256, 16


@dataclass(frozen=True, eq=False)
class Sketches:
    """Sketches of some examples.

    Attributes
    ----------
    index : positions in the caller's list
    features : columns of X that they are about; -1 for y and for examples
    values : [n, K]
    losses : float64 [n], of examples; else None
    """

    index: tuple[int, ...]
    features: tuple[int, ...]
    values: Tensor
    losses: Tensor | None = None


def example_sketches(
    problem: Problem, projection: Projection, examples: Examples, *, progress: Progress | None = None
) -> list[Sketches]:
    """Sketches of the gradients of the examples' losses, batch by batch.

    Raises
    ------
    UserError
        The loss or the gradient of an example is not finite.
    """
    sites, found = find_sites(problem.model, problem.parameters), []
    with frozen(problem.model):
        refuse_unfit(problem, sites, examples)
        for batch in batch_examples(examples, problem.batch_tokens):
            values, factors = example_gradients(problem, sites, batch, examples)
            made = projection.sketch(factors, len(batch.index)).cpu()
            refuse_nonfinite(examples, batch.index, made, "gradient")
            (progress or SilentProgress()).advance(len(batch.index))
            found.append(Sketches(batch.index, (-1,) * len(batch.index), made, values))
    return found


def prompt_sketches(problem: Problem, projection: Projection, prompts: Sequence[ReadPrompt]) -> list[Sketches]:
    """Sketches of the gradients of y and of every active feature, batch by batch of prompts.

    Prompts stand apart: what they share is computed for each, since its gradients differ. The k-th
    active features of a batch's prompts take one backward pass together.
    """
    sites, found = find_sites(problem.model, problem.parameters), []
    with frozen(problem.model):
        for packed in pack_rows(prompts, problem.behavior, tokens=problem.batch_tokens):
            with tap(problem.model, sites) as taps:
                y, of = read_y(problem.model, packed, problem.behavior), sequence_rows(problem.model, packed.rows)
                made = projection.sketch(taps.factors(y.sum(), rows=of), len(packed.index))
            found.append(Sketches(packed.index, (-1,) * len(packed.index), made.cpu()))
        if problem.features is None:
            return found
        for packed in pack_rows(prompts, None, tokens=problem.batch_tokens):
            found += _feature_sketches(problem, projection, sites, packed)
    return found


def _feature_sketches(
    problem: Problem, projection: Projection, sites: Sequence[Site], packed: PackedPrompts
) -> Iterator[Sketches]:
    """One :class:`Sketches` for each backward pass."""
    index, of = packed.index, sequence_rows(problem.model, packed.rows)
    with tap(problem.model, sites) as taps:
        h, _ = read_packed(problem.model, packed, None, problem.point)
        assert problem.features is not None and h is not None
        X = problem.features(h, packed.offsets.to(h.device))
        active = [row.nonzero().flatten().tolist() for row in X.detach()]
        inputs = SharedInputs({x.data_ptr() for _, _, x, _ in taps.seen})
        slots = max(map(len, active))
        for slot in range(slots):
            rows = [row for row, columns in enumerate(active) if slot < len(columns)]
            columns = [active[row][slot] for row in rows]
            value = X[rows, columns].sum()
            factors = taps.factors(value, retain_graph=slot + 1 < slots, rows=of)
            made = projection.sketch(factors, len(index), inputs)
            yield Sketches(tuple(index[row] for row in rows), tuple(columns), made[rows].cpu())


def fill_examples(
    store: SketchStore,
    problem: Problem,
    projection: Projection,
    examples: Examples,
    *,
    share: tuple[int, int] = (0, 1),
    progress: Progress,
) -> None:
    """Sketch the examples that the store lacks, shard by shard.

    Parameters
    ----------
    share : (r, n): process r of n takes every n-th shard. Shards do not depend on n.
    """
    there = store.rows("examples")
    chunks = _lacking(examples, PAIRS_A_SHARD, share, lambda example: example_row(example) in there)
    progress.step("sketches of examples", sum(map(len, chunks)))
    for chunk in chunks:
        found = example_sketches(problem, projection, chunk, progress=progress)
        order = [i for part in found for i in part.index]
        values = torch.cat([part.values for part in found]).float().numpy()
        losses = [float(x) for part in found if part.losses is not None for x in part.losses]
        store.save("examples", [example_row(chunk[i]) for i in order], values, losses=losses)


def fill_prompts(
    store: SketchStore, problem: Problem, projection: Projection, *, share: tuple[int, int] = (0, 1), progress: Progress
) -> None:
    """Sketch y and the features of the problem on the prompts, where the store lacks them.

    ``share`` as in :func:`fill_examples`.
    """
    covered = covered_features(store)
    wanted = set() if problem.features is None else set(problem.features.ids.tolist())
    every = wanted | {-1}
    chunks = _lacking(
        problem.prompts, PROMPTS_A_SHARD, share, lambda prompt: every <= covered.get(prompt_key(prompt), set())
    )
    progress.step("sketches of prompts", sum(map(len, chunks)))
    for chunk in chunks:
        had = [covered.get(prompt_key(p), set()) for p in chunk]
        features = sorted(k for k in wanted if not all(k in own for own in had))
        narrowed = problem
        if problem.features is not None:
            index = torch.tensor(features, dtype=torch.long, device=problem.features.ids.device)
            narrowed = replace(problem, features=replace(problem.features, ids=index))
        rows, values = [], []
        for part in prompt_sketches(narrowed, projection, chunk):
            ids = [-1 if column < 0 else features[column] for column in part.features]
            new = [n for n, (i, k) in enumerate(zip(part.index, ids, strict=True)) if k not in had[i]]
            rows += [Row(*prompt_key(chunk[part.index[n]]), ids[n]) for n in new]
            values.append(part.values[new])
        keys = [prompt_key(prompt) for prompt in chunk]
        store.save("prompts", rows, torch.cat(values).float().numpy(), prompts=keys, features=features)
        progress.advance(len(chunk))


def example_row(example: Example) -> Row:
    """The row of an example."""
    return Row(example.id, example_digest(example))


def prompt_key(prompt: ReadPrompt) -> tuple[str, str]:
    """Id and digest of a prompt's rows."""
    return prompt.id, digest(prompt.ids, *prompt.read, -1, *(t for s in prompt.suffixes for t in (-1, *s)))


def _lacking(items: Sequence[Any], size: int, share: tuple[int, int], there: Callable[[Any], bool]) -> list[list[Any]]:
    """What is not there of each chunk that this process takes."""
    rank, processes = share
    chunks = [items[n : n + size] for n in range(0, len(items), size)][rank::processes]
    left = [[item for item in chunk if not there(item)] for chunk in chunks]
    return [chunk for chunk in left if chunk]
