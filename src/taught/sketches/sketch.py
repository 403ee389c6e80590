"""Sketches of gradients: of each example's loss, and of each prompt's y and active features.

    example   s(grad L(z))             one an example
    y         s(grad y_i)              one a prompt
    feature   s(grad X_ik)             one a prompt and feature that is active on it

Every effect is a sum of inner products of the first kind with the other two, whatever the policy, so these sketches
answer questions that nobody had asked when they were made: another alpha, other features of those stored, other groups
of prompts, without the model. See :mod:`taught.sketches.project` for what a sketch is, :mod:`taught.sketches.fill` for
how a store is filled, :mod:`taught.sketches.answer` for how a policy becomes inner products.

Cost of a prompt: one forward pass, and for y and for each active feature a backward pass.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from torch import Tensor

from taught.core.example import Examples, batch_examples, refuse_nonfinite
from taught.core.gradient import example_gradients, refuse_unfit
from taught.core.problem import Problem
from taught.model.gradients import Site, find_sites, frozen, tap
from taught.model.layout import sequence_rows
from taught.model.readout import PackedPrompts, ReadPrompt, pack_rows, read_packed, read_y
from taught.progress import Progress, SilentProgress
from taught.sketches.project import Projection, SharedInputs


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
                y = read_y(problem.model, packed, problem.behavior)
                made = projection.sketch(
                    taps.factors(y.sum(), rows=sequence_rows(problem.model, packed.rows)), len(packed.index)
                )
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
