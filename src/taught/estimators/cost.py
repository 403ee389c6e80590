"""Floating point operations of a study's attribution and retraining, counted before they are run.

Counted are the products with the weights of the blocks (2 operations a weight and token), attention (4 a width and pair
of tokens in a row, in every block), the logits that are asked for, and the products of gradients (2 an example, query
and weight). A backward pass is as much as a forward one: weights are frozen, only activations have gradients; what is
built of both, a gradient, is as much once more. Everything else is left out. Where few parameters move, passes are
counted as if all did: they are cheaper than is said.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

from torch import nn

from taught.core.estimator import needs_steps
from taught.core.example import Examples, batch_indices
from taught.core.problem import Problem
from taught.core.query import query_parts, x_queries_at_once
from taught.core.registry import CURVATURES, ESTIMATORS, TRAJECTORIES
from taught.core.trajectory import Follows
from taught.estimators.every_prompt import prompt_chunks
from taught.model.blockwise import split_sites
from taught.model.forward import find_blocks
from taught.model.gradients import find_sites
from taught.model.parameters import moving_parameters, weight_shape
from taught.model.readout import pack, pack_rows
from taught.model.tokens import Rows
from taught.sketches.project import COLUMNS

if TYPE_CHECKING:
    from taught.core.driver import Method

# Share of the prompts on which a selected feature is active; known only once X is.
ACTIVE = 0.4


@dataclass(frozen=True)
class _Sizes:
    """Weights of all blocks, of the blocks up to the SAE's, of the output; width times blocks.

    moving, moving_to_block, moving_head: those of the first three that a step moves. sides,
    sides_to_block: inputs and outputs of all matrices of the blocks, of those up to the SAE's.
    """

    blocks: int
    to_block: int
    moving: int
    moving_to_block: int
    moving_head: int
    head: int
    attention: int
    sides: tuple[int, int]
    sides_to_block: tuple[int, int]

    def forward(self, rows: Iterable[Rows], logits: int) -> float:
        """Operations of one forward pass, padding included; logits at so many places."""
        return self.over([(len(part.ids), part.ids.shape[1]) for part in rows], logits)

    def over(self, shapes: Sequence[tuple[int, int]], logits: int) -> float:
        """The same, for batches of so many rows and columns."""
        tokens = sum(n * length for n, length in shapes)
        attended = sum(n * length**2 for n, length in shapes)
        weights = self.blocks * tokens + self.head * logits
        return 2.0 * weights + 4.0 * self.attention * attended

    @property
    def share(self) -> float:
        """Share of the blocks that a read-out of X needs."""
        return self.to_block / self.blocks


@dataclass(frozen=True)
class Asked:
    """What is asked of every example.

    Attributes
    ----------
    features : features of the policy, and one more with an intercept; 0 without a policy
    queries : targets that would have a query each
    every : whether every coefficient or every prompt is asked for
    top : examples with the largest effects that get a real step and the shares of their tokens
    """

    features: int
    queries: int
    every: bool
    top: int = 0


def attribution_cost(problem: Problem, examples: Examples, asked: Asked, method: Method) -> dict[str, float]:
    """Operations by part: what the estimator and the curvature say, and the checks of the strongest.

    Raises
    ------
    UserError
        The model's gradients are not understood, or its blocks share parameters: the estimator would refuse it too.
    """
    method.refuse()
    legs = method.trajectory.make(TRAJECTORIES)
    if isinstance(legs, Follows):
        return legs.cost(problem, examples, asked)
    estimator = method.estimator.make(ESTIMATORS)
    curvature = method.curvature.make(CURVATURES)
    if getattr(curvature, "of_queries", False):  # every target is solved for: no basis is
        asked = replace(asked, queries=asked.queries + 2 * asked.features * asked.every, every=False)
    curved = getattr(curvature, "curved", None)
    if curved is not None:  # nothing else moves
        problem = replace(problem, parameters=curved(problem))
    found = dict(estimator.cost(problem, examples, asked))
    if (fitting := getattr(curvature, "cost", None)) is not None:
        found |= fitting(problem, examples, asked)
    passes = _Passes.of(problem, examples)
    if asked.top:
        if needs_steps(curvature) is None:
            found.setdefault("finite steps", passes.trees + min(asked.top, len(examples)) * passes.step)
        along = asked.queries * 3 * passes.examples / len(examples)
        found["token shares"] = 2 * 3 * passes.trees + min(asked.top, len(examples)) * along
    times = 1 if legs.single else len(legs)
    return {part: times * value for part, value in found.items()}


@dataclass(frozen=True)
class _Passes:
    """Operations of one pass over the prompts' trees, over the examples, and of one example's gradient."""

    sizes: _Sizes
    trees: float
    examples: float
    gradient: float

    @classmethod
    def of(cls, problem: Problem, examples: Examples) -> _Passes:
        sizes, trees = _sizes(problem), _trees(problem, _sizes(problem))
        one = _over_examples(sizes, examples, batch_indices(examples, problem.batch_tokens))
        # Weights have gradients in a step of its own: a backward pass is two then.
        return cls(sizes, trees, one, 3 * one / len(examples))

    @property
    def step(self) -> float:
        """One real step, and all read-outs after it."""
        return self.trees + self.gradient


def adjoint(problem: Problem, examples: Examples, asked: Asked) -> dict[str, float]:
    """Operations of ``taught.estimators.adjoint``."""
    it = _Passes.of(problem, examples)
    cost = {"read-outs": it.trees + it.examples}
    if asked.every:
        if asked.features:
            cost["features"] = _features(problem, it.sizes, asked.features, len(examples), it.examples)
        return cost | {"prompts": _prompts(problem, it.sizes, examples)}
    contracted = 2.0 * len(examples) * asked.queries * it.sizes.moving
    parts = len(list(query_parts(problem, find_sites(problem.model, problem.parameters), 1)))
    return cost | {"targets": parts * ((2 + 2 * 3) * it.trees + 3 * it.examples) + contracted}


def finite_step(problem: Problem, examples: Examples) -> dict[str, float]:
    """Operations of ``taught.estimators.finite_step``."""
    it = _Passes.of(problem, examples)
    return {"read-outs": 2 * it.trees, "finite steps": len(examples) * it.step}


def forward(problem: Problem, examples: Examples) -> dict[str, float]:
    """Operations of ``taught.estimators.forward``: x W moves with x and with W, three products for one."""
    it = _Passes.of(problem, examples)
    cost = {"read-outs": it.trees + it.examples}
    return cost | {"forward mode": len(examples) * (3 * it.trees + it.gradient)}


def sketch(problem: Problem, examples: Examples, asked: Asked) -> dict[str, float]:
    """Operations of ``taught.sketches``, with a store that is empty yet."""
    it = _Passes.of(problem, examples)
    cost = {"read-outs": it.trees + it.examples, "exact sample": (2 + 2 * 3) * it.trees}
    return cost | _sketched(problem, it.sizes, asked.features, 2 * it.examples, examples)


def trees(problem: Problem, examples: Examples) -> float:
    """One forward pass over the prompts."""
    return _Passes.of(problem, examples).trees


def one_pass(problem: Problem, examples: Examples) -> float:
    """One forward pass over the examples."""
    return _Passes.of(problem, examples).examples


def prompt_head(problem: Problem, examples: Examples) -> float:
    """Products of built gradients of the output with those of the prompts, token by token."""
    it = _Passes.of(problem, examples)
    logits = sum(1 + len(prompt.histories) for prompt in problem.prompts)
    return 2.0 * len(examples) * logits * it.sizes.moving_head


def validation_cost(
    problem: Problem,
    examples: Examples,
    subsets: Sequence[int],
    *,
    epochs: int,
    batch: int,
    answer_tokens: int,
    forgotten: Sequence[int] = (),
    unlearn_steps: int = 0,
) -> dict[str, float]:
    """Operations of retraining, by part; of a subset only its size is known, not its examples.

    Parameters
    ----------
    subsets : number of examples of each subset that is trained on
    epochs, batch, answer_tokens
        As in the study. A step's batch is cut by ``problem.batch_tokens``; answers are taken to have their full length.
    forgotten, unlearn_steps : number of examples of each set that is forgotten, in at most so many steps
    """
    sizes = _sizes(problem)
    trees = _trees(problem, sizes)
    steps = [range(at, min(at + batch, len(examples))) for at in range(0, len(examples), batch)]
    parts = [
        [step[i] for i in index]
        for step in steps
        for index in batch_indices([examples[i] for i in step], problem.batch_tokens)
    ]
    trained = _over_examples(sizes, examples, parts) / len(examples)
    read = _over_examples(sizes, examples, batch_indices(examples, problem.batch_tokens)) / len(examples)
    models = 1 + len(subsets) + len(forgotten)
    cost = {
        "training": 3 * epochs * sum(subsets) * trained,
        "read-outs after it": models * trees + (len(examples) + sum(subsets) + sum(forgotten)) * read,
    }
    if forgotten:  # two batches a step, the last of an epoch taken as full; every 10 steps a fit, and a look at prompts
        cost["unlearning"] = unlearn_steps * (6.2 * batch * len(forgotten) * trained + 0.1 * trees * len(forgotten))
    if answer_tokens:
        said = [(1, len(prompt.ids) + answer_tokens - 1) for prompt in problem.prompts]
        cost["answers"] = models * sizes.over(said, answer_tokens * len(said))
    return cost


def _sizes(problem: Problem) -> _Sizes:
    model: Any = problem.model
    each = [_matrices(block) for block in find_blocks(model)]
    ids = {id(p) for p in moving_parameters(model, problem.parameters).values()}
    moving = [_matrices(block, ids) for block in find_blocks(model)]
    head = model.get_output_embeddings()
    width = int(model.config.get_text_config().hidden_size)
    last = 0 if problem.point is None else problem.point.block + 1
    return _Sizes(
        blocks=sum(each),
        to_block=sum(each[:last]),
        moving=sum(moving),
        moving_to_block=sum(moving[:last]),
        sides=_sides(find_blocks(model)),
        sides_to_block=_sides(list(find_blocks(model))[:last]),
        moving_head=0 if head is None else _matrices(head, ids),
        head=0 if head is None else _matrices(head),
        attention=width * len(each),
    )


def _matrices(module: nn.Module, ids: set[int] | None = None) -> int:
    """Weights of a module's matrices, or of those among them that have one of the ids."""
    matrices = [p for p in module.parameters() if p.ndim > 1]
    return sum(weight_shape(p).numel() for p in matrices if ids is None or id(p) in ids)


def _sides(blocks: Iterable[nn.Module]) -> tuple[int, int]:
    """Inputs and outputs of all matrices of some blocks."""
    shapes = [weight_shape(p) for block in blocks for p in block.parameters() if p.ndim == 2]
    return sum(shape[1] for shape in shapes), sum(shape[0] for shape in shapes)


def _over_examples(sizes: _Sizes, examples: Examples, batches: Sequence[Sequence[int]]) -> float:
    """One forward pass over some batches of the examples."""
    shapes = [(len(index), max(len(examples[i].ids) for i in index) - 1) for index in batches]
    keep = [len(index) * max(len(examples[i].ids) - examples[i].start for i in index) for index in batches]
    return sizes.over(shapes, sum(keep))


def _features(problem: Problem, sizes: _Sizes, targets: int, examples: int, one: float) -> float:
    """``feature_effects``: per target its active prompts up to the block, per chunk the examples."""
    to_block = sizes.share * sizes.forward([p.rows for p in pack(problem.prompts, None)], 0)
    sites = find_sites(problem.model, problem.parameters)
    chunks = -(-targets // x_queries_at_once(problem, sites))
    contracted = 2.0 * examples * targets * sizes.moving_to_block
    return targets * ACTIVE * 3 * to_block + chunks * (2 + sizes.share) * one + contracted


def _sketched(problem: Problem, sizes: _Sizes, targets: int, passes: float, examples: Examples) -> dict[str, float]:
    """``sketched.fill``: prompts stand apart; each active feature has a backward pass.

    A sketch is projected inputs, once a forward pass, and what they make with output gradients.
    """
    whole, read = (
        pack_rows(problem.prompts, behavior, tokens=problem.batch_tokens) for behavior in (problem.behavior, None)
    )
    y, x = ([p.rows for p in packs] for packs in (whole, read))
    logits = sum(len(p.index) * len(p.keep) for p in whole)
    to_block = sizes.share * sizes.forward(x, 0)
    inner, out = (2.0 * COLUMNS * side for side in sizes.sides_to_block)
    tokens = sum(rows.ids.numel() for rows in x)
    features = to_block + tokens * inner + targets * ACTIVE * (to_block + tokens * out)
    both = 2.0 * COLUMNS * sum(sizes.sides)
    y_tokens = sum(rows.ids.numel() for rows in y)
    return {
        "sketches of prompts": features + 2 * sizes.forward(y, logits) + y_tokens * both,
        "sketches of examples": passes + both * sum(len(example.ids) for example in examples),
    }


def _trees(problem: Problem, sizes: _Sizes) -> float:
    """One forward pass over the prompts' token trees."""
    packs = list(pack(problem.prompts, problem.behavior))
    return sizes.forward([p.rows for p in packs], sum(len(p.keep) for p in packs))


def _prompts(problem: Problem, sizes: _Sizes, examples: Examples) -> float:
    """``prompt_effects``: two passes a chunk over what meets in it, then every example and prompt."""
    passes = 0.0
    sites = split_sites(problem.model, problem.parameters)
    for prompts, batches in prompt_chunks(problem, sites, examples):
        logits = sum(len(p.index) * len(p.keep) for p in prompts)
        both = sizes.forward([p.rows for p in prompts], logits) + _over_examples(sizes, examples, batches)
        passes += 5 * both  # forward and backward twice, and the gradients built once
    return passes + 2.0 * len(examples) * len(problem.prompts) * sizes.moving
