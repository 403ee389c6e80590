"""Effects of a run or on concepts from a store of sketches, which is filled where it lacks some."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from taught.attribution.adjoint import Problem
from taught.attribution.ask import (
    Singles,
    ask,
    error_factor,
    measure_error,
    policy_queries,
    theory_error,
)
from taught.attribution.concepts import concept_effects
from taught.attribution.estimate import Effects, few_effects
from taught.attribution.fill import fill_pairs, fill_prompts, pair_row, prompt_key
from taught.attribution.pairs import PairInput
from taught.attribution.sketch import target_sketches
from taught.model.projection import Projection
from taught.partial import Pieces, kept
from taught.policy.ridge import Floats, Policy, Shift
from taught.store import SketchStore
from taught.target import Target

# dy of so many pairs and prompts is kept; for more, ask the store.
LARGEST_DY = 50_000_000


@dataclass(frozen=True, eq=False)
class SketchSource:
    """A store, the projection that fills it, and how many pairs are computed exactly as well."""

    store: SketchStore
    projection: Projection
    sample: int


def fill(
    source: SketchSource,
    problem: Problem,
    pairs: Sequence[PairInput],
    *,
    share: tuple[int, int] = (0, 1),
    progress: Any,
) -> None:
    """Compute what the store lacks; damaged shards are made anew. ``share``: ``fill_pairs``."""
    if share[0] == 0:
        _drop_damaged(source, progress)
    source.store.prepare()
    fill_prompts(source.store, problem, source.projection, share=share, progress=progress)
    fill_pairs(source.store, problem, source.projection, pairs, share=share, progress=progress)


def _drop_damaged(source: SketchSource, progress: Any) -> None:
    damaged = source.store.drop_damaged()
    if damaged:
        progress.note(f"damaged shards are made anew: {', '.join(damaged)}")


def sketch_effects(
    problem: Problem,
    pairs: Sequence[PairInput],
    policy: Policy,
    groups: Mapping[str, Sequence[str]],
    *,
    source: SketchSource,
    progress: Any,
    pieces: Pieces | None = None,
) -> Effects:
    """All effects from sketches, with their standard errors.

    The error is measured on ``source.sample`` pairs, for which the exact adjoint gives the score
    and the groups' mean y as well: about the cost of those targets' query gradients.
    """
    fill(source, problem, pairs, progress=progress)
    chosen = _sample(pairs, source.sample)
    some = [pairs[i] for i in chosen]
    progress.step("exact effects of a sample", None)
    exact = kept(pieces, f"exact {[pair.id for pair in some]}",
                 lambda: few_effects(problem, some, policy, groups)).numpy()  # fmt: skip
    progress.step("inner products of sketches", None)
    digests = dict(prompt_key(prompt) for prompt in problem.prompts)
    queries, y = policy_queries(source.store, policy, groups, digests)
    parts: list[Floats | Singles] = [queries.few, queries.x, queries.y]
    if len(pairs) * policy.n <= LARGEST_DY:
        parts.append(y.T)
    every = np.concatenate([part.astype(np.float32) for part in parts], 1)
    answers = ask(source.store, [pair_row(pair) for pair in pairs], every)
    ends = np.cumsum([part.shape[1] for part in parts])[:-1]
    values = answers.values
    values *= -problem.lr  # in place: the largest array there is
    few, x, y_shift, *dy = np.split(values, ends, 1)
    sample = [pair.id for pair in some]
    error = measure_error(queries, answers.norms, problem.lr, sample, chosen, exact, few)
    return Effects(
        tuple(pair.id for pair in pairs),
        "sketch",
        answers.losses,
        few[:, :2].T.copy(),
        {group: few[:, 2 + n] for n, group in enumerate(groups)},
        Shift(x, y_shift),
        dy[0] if dy else None,
        error=error,
    )


def sketched_concepts(
    problem: Problem,
    pairs: Sequence[PairInput],
    targets: Sequence[Target],
    *,
    source: SketchSource,
    progress: Any,
) -> tuple[Floats, Floats]:
    """Effect of every pair on the mean read-out of every concept, and standard errors: [P, C].

    The store's sketches of the pairs are those of any other question; a concept adds its own query,
    a forward and a backward pass over the prompts. The error is measured on ``source.sample`` pairs
    against the exact adjoint.
    """
    _drop_damaged(source, progress)
    source.store.prepare()
    fill_pairs(source.store, problem, source.projection, pairs, progress=progress)
    A = torch.from_numpy(np.stack([target.A for target in targets if target.A is not None]))
    progress.step("sketches of the concepts", None)
    queries = target_sketches(problem, source.projection, A).numpy().T
    answers = ask(source.store, [pair_row(pair) for pair in pairs], queries)
    values = -problem.lr * answers.values
    size = theory_error(answers.norms, queries, problem.lr)
    chosen = _sample(pairs, source.sample)
    progress.step("exact effects of a sample", None)
    exact = concept_effects(problem, [pairs[i] for i in chosen], targets).numpy()
    return values, size * error_factor(values[chosen], exact, size[chosen])


def _sample(pairs: Sequence[PairInput], size: int) -> list[int]:
    """Places of pairs spread evenly over the numbers of tokens."""
    order = sorted(range(len(pairs)), key=lambda i: (len(pairs[i].ids), pairs[i].id))
    places = np.linspace(0, len(order) - 1, min(size, len(order))).round().astype(int)
    return [order[place] for place in places]
