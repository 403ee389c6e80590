"""Gradients of examples' losses, as factors."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence
from functools import partial

from torch import Tensor

from taught.core.example import ExampleBatch, Examples, batch_examples, refuse_nonfinite
from taught.core.problem import Problem
from taught.model.blockwise import by_block, checkpointed, refuse_no_chain
from taught.model.gradients import Factor, Site, tap
from taught.model.layout import sequence_rows


def refuse_unfit(problem: Problem, sites: Sequence[Site], examples: Examples) -> None:
    """Raise a UserError where checkpointing is asked for and the model's blocks are not a chain."""
    if problem.checkpointing:
        (batch,) = batch_examples(examples[:1], problem.batch_tokens)
        run, rows = partial(batch.losses, problem.model), sequence_rows(problem.model, batch.rows)
        refuse_no_chain(problem.model, by_block(problem.model, sites), run, rows)


def by_parameter(factors: Iterable[Factor]) -> dict[str, list[Factor]]:
    """The factors of each parameter: one that is used twice has several."""
    found: dict[str, list[Factor]] = defaultdict(list)
    for factor in factors:
        found[factor.param].append(factor)
    return found


def example_gradients(
    problem: Problem, sites: Sequence[Site], batch: ExampleBatch, examples: Examples
) -> tuple[Tensor, Iterator[Factor]]:
    """Losses of a batch of examples (float64 [B]) and the factors of their gradients, to be used once.

    Raises
    ------
    UserError
        A loss is not finite: the ids of the examples.
    """
    model, rows = problem.model, sequence_rows(problem.model, batch.rows)
    if problem.checkpointing:
        run = partial(batch.losses, model)
        losses, parts = checkpointed(model, by_block(model, sites), run, training=True, rows=rows)
        values = losses.double().cpu()
        refuse_nonfinite(examples, batch.index, values)
        return values, parts
    with tap(model, sites) as taps:
        losses = batch.losses(model)
        values = losses.detach().double().cpu()
        refuse_nonfinite(examples, batch.index, values)
        return values, iter(taps.factors_and(losses.sum(), (), training=True, rows=rows)[0])
