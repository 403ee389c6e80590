"""Filling a store with the sketches that it lacks, shard by shard."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import torch

from taught.core.example import Example, Examples
from taught.core.problem import Problem
from taught.model.readout import ReadPrompt
from taught.progress import Progress
from taught.sketches.answer import covered_features
from taught.sketches.project import Projection
from taught.sketches.sketch import example_sketches, prompt_sketches
from taught.sketches.store import Row, SketchStore, digest, example_digest

# Small enough that a killed run loses little, large enough for full batches.
PAIRS_A_SHARD, PROMPTS_A_SHARD = 256, 16


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
    chunks = []
    for chunk in _share(examples, PAIRS_A_SHARD, share):
        lacking = [example for example in chunk if example_row(example) not in there]
        chunks += [lacking] if lacking else []
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
    todo = []
    for chunk in _share(problem.prompts, PROMPTS_A_SHARD, share):
        lacking = [p for p in chunk if not wanted | {-1} <= covered.get(prompt_key(p), set())]
        todo += [lacking] if lacking else []
    progress.step("sketches of prompts", sum(map(len, todo)))
    for chunk in todo:
        had = [covered.get(prompt_key(p), set()) for p in chunk]
        features = sorted(k for k in wanted if not all(k in known for known in had))
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


def _share(items: Sequence[Any], size: int, share: tuple[int, int]) -> list[Sequence[Any]]:
    rank, processes = share
    return [items[n : n + size] for n in range(0, len(items), size)][rank::processes]
