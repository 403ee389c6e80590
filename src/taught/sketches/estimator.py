"""Effects of a run or on concepts from a store of sketches, which is filled where it lacks some."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from taught.core.example import Example
from taught.core.target import Target
from taught.estimators.adjoint import Problem
from taught.estimators.concepts import concept_effects
from taught.estimators.estimate import Effects, few_effects
from taught.policy.ridge import Floats, Policy, Shift
from taught.run.pieces import Pieces, kept
from taught.sketches.answer import Singles, ask, error_factor, measure_error, policy_queries, theory_error
from taught.sketches.fill import example_row, fill_examples, fill_prompts, prompt_key
from taught.sketches.project import Projection
from taught.sketches.sketch import target_sketches
from taught.sketches.store import SketchStore

# dy of so many examples and prompts is kept; for more, ask the store.
LARGEST_DY = 50_000_000


@dataclass(frozen=True, eq=False)
class SketchSource:
    """A store, the projection that fills it, and how many examples are computed exactly as well."""

    store: SketchStore
    projection: Projection
    sample: int


def fill(
    source: SketchSource,
    problem: Problem,
    examples: Sequence[Example],
    *,
    share: tuple[int, int] = (0, 1),
    progress: Any,
) -> None:
    """Compute what the store lacks; damaged shards are made anew. ``share``: ``fill_examples``."""
    if share[0] == 0:
        _drop_damaged(source, progress)
    source.store.prepare()
    fill_prompts(source.store, problem, source.projection, share=share, progress=progress)
    fill_examples(source.store, problem, source.projection, examples, share=share, progress=progress)


def _drop_damaged(source: SketchSource, progress: Any) -> None:
    damaged = source.store.drop_damaged()
    if damaged:
        progress.note(f"damaged shards are made anew: {', '.join(damaged)}")


def sketch_effects(
    problem: Problem,
    examples: Sequence[Example],
    policy: Policy,
    groups: Mapping[str, Sequence[str]],
    *,
    source: SketchSource,
    progress: Any,
    pieces: Pieces | None = None,
) -> Effects:
    """All effects from sketches, with their standard errors.

    The error is measured on ``source.sample`` examples, for which the exact adjoint gives the score
    and the groups' mean y as well: about the cost of those targets' query gradients.
    """
    fill(source, problem, examples, progress=progress)
    chosen = _sample(examples, source.sample)
    some = [examples[i] for i in chosen]
    progress.step("exact effects of a sample", None)
    exact = kept(
        pieces, f"exact {[example.id for example in some]}", lambda: few_effects(problem, some, policy, groups)
    ).numpy()
    progress.step("inner products of sketches", None)
    digests = dict(prompt_key(prompt) for prompt in problem.prompts)
    queries, y = policy_queries(source.store, policy, groups, digests)
    parts: list[Floats | Singles] = [queries.few, queries.x, queries.y]
    if len(examples) * policy.n <= LARGEST_DY:
        parts.append(y.T)
    every = np.concatenate([part.astype(np.float32) for part in parts], 1)
    answers = ask(source.store, [example_row(example) for example in examples], every)
    ends = np.cumsum([part.shape[1] for part in parts])[:-1]
    values = answers.values
    values *= -problem.lr  # in place: the largest array there is
    few, x, y_shift, *dy = np.split(values, ends, 1)
    sample = [example.id for example in some]
    error = measure_error(queries, answers.norms, problem.lr, sample, chosen, exact, few)
    return Effects(
        tuple(example.id for example in examples),
        "sketch",
        answers.losses,
        few[:, :2].T.copy(),
        {group: few[:, 2 + n] for n, group in enumerate(groups)},
        Shift(x, y_shift),
        dy[0] if dy else None,
        error=error,
    )


def sketched_concepts(
    problem: Problem, examples: Sequence[Example], targets: Sequence[Target], *, source: SketchSource, progress: Any
) -> tuple[Floats, Floats]:
    """Effect of every example on the mean read-out of every concept, and standard errors: [P, C].

    The store's sketches of the examples are those of any other question; a concept adds its own query,
    a forward and a backward pass over the prompts. The error is measured on ``source.sample`` examples
    against the exact adjoint.
    """
    _drop_damaged(source, progress)
    source.store.prepare()
    fill_examples(source.store, problem, source.projection, examples, progress=progress)
    A = torch.from_numpy(np.stack([target.A for target in targets if target.A is not None]))
    progress.step("sketches of the concepts", None)
    queries = target_sketches(problem, source.projection, A).numpy().T
    answers = ask(source.store, [example_row(example) for example in examples], queries)
    values = -problem.lr * answers.values
    size = theory_error(answers.norms, queries, problem.lr)
    chosen = _sample(examples, source.sample)
    progress.step("exact effects of a sample", None)
    exact = concept_effects(problem, [examples[i] for i in chosen], targets).numpy()
    return values, size * error_factor(values[chosen], exact, size[chosen])


def _sample(examples: Sequence[Example], size: int) -> list[int]:
    """Places of examples spread evenly over the numbers of tokens."""
    order = sorted(range(len(examples)), key=lambda i: (len(examples[i].ids), examples[i].id))
    places = np.linspace(0, len(order) - 1, min(size, len(order))).round().astype(int)
    return [order[place] for place in places]
