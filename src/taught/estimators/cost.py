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
from taught.core.query import x_queries_at_once
from taught.core.registry import CURVATURES, ESTIMATORS, TRAJECTORIES
from taught.core.trajectory import Follows
from taught.estimators.every_prompt import prompt_chunks
from taught.model.blockwise import split_sites
from taught.model.forward import find_blocks
from taught.model.gradients import find_sites
from taught.model.parameters import moving_parameters, weight_shape
from taught.model.readout import PackedPrompts, pack, pack_rows
from taught.sketches.project import COLUMNS

if TYPE_CHECKING:
    from taught.core.driver import Method

# Share of the prompts on which a selected feature is active; known only once X is.
ACTIVE = 0.4


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
    passes = Passes(problem, examples)
    if asked.top:
        if needs_steps(curvature) is None:
            found.setdefault("finite steps", passes.trees + min(asked.top, len(examples)) * passes.step)
        along = asked.queries * 3 * passes.examples / len(examples)
        found["token shares"] = 2 * 3 * passes.trees + min(asked.top, len(examples)) * along
    times = 1 if legs.single else len(legs)
    return {part: times * value for part, value in found.items()}


class Passes:
    """Sizes of a problem's model, and operations of one forward pass over its prompts and over examples.

    Attributes
    ----------
    blocks, to_block, head : weights of all blocks, of the blocks up to the SAE's, of the output
    moving, moving_to_block, moving_head : those of them that a step moves
    sides, sides_to_block : inputs and outputs of all matrices of the blocks, of those up to the SAE's
    attention : width times blocks
    trees, examples : operations over the prompts' token trees, over the examples
    gradient : operations of one example's gradient by a backward pass that weights have gradients in
    """

    def __init__(self, problem: Problem, examples: Examples) -> None:
        model: Any = problem.model
        blocks = list(find_blocks(model))
        last = 0 if problem.point is None else problem.point.block + 1
        ids = {id(p) for p in moving_parameters(model, problem.parameters).values()}
        each = [_matrices(block) for block in blocks]
        moving = [_matrices(block, ids) for block in blocks]
        head = model.get_output_embeddings()
        self.blocks, self.to_block = sum(each), sum(each[:last])
        self.moving, self.moving_to_block = sum(moving), sum(moving[:last])
        self.head, self.moving_head = (0, 0) if head is None else (_matrices(head), _matrices(head, ids))
        self.sides, self.sides_to_block = _sides(blocks), _sides(blocks[:last])
        self.attention = int(model.config.get_text_config().hidden_size) * len(blocks)
        self.trees = self.over_prompts(list(pack(problem.prompts, problem.behavior)))
        self.examples = self.over_examples(examples, batch_indices(examples, problem.batch_tokens))
        self.gradient = 3 * self.examples / len(examples)

    def over(self, shapes: Sequence[tuple[int, int]], logits: int) -> float:
        """Batches of so many rows and columns, padding included; logits at so many places."""
        tokens = sum(n * length for n, length in shapes)
        attended = sum(n * length**2 for n, length in shapes)
        weights = self.blocks * tokens + self.head * logits
        return 2.0 * weights + 4.0 * self.attention * attended

    def over_prompts(self, packs: Sequence[PackedPrompts]) -> float:
        """Prompts that are laid out."""
        shapes = [(len(p.rows.ids), p.rows.ids.shape[1]) for p in packs]
        return self.over(shapes, sum(len(p.rows.ids) * len(p.keep) for p in packs))

    def over_examples(self, examples: Examples, batches: Sequence[Sequence[int]]) -> float:
        """Some batches of the examples."""
        shapes = [(len(index), max(len(examples[i].ids) for i in index) - 1) for index in batches]
        keep = [len(index) * max(len(examples[i].ids) - examples[i].start for i in index) for index in batches]
        return self.over(shapes, sum(keep))

    @property
    def step(self) -> float:
        """One real step, and all read-outs after it."""
        return self.trees + self.gradient

    @property
    def share(self) -> float:
        """Share of the blocks that a read-out of X needs."""
        return self.to_block / self.blocks


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
    it = Passes(problem, examples)
    steps = [range(at, min(at + batch, len(examples))) for at in range(0, len(examples), batch)]
    parts = [
        [step[i] for i in index]
        for step in steps
        for index in batch_indices([examples[i] for i in step], problem.batch_tokens)
    ]
    trained = it.over_examples(examples, parts) / len(examples)
    models = 1 + len(subsets) + len(forgotten)
    cost = {
        "training": 3 * epochs * sum(subsets) * trained,
        "read-outs after it": models * it.trees
        + (len(examples) + sum(subsets) + sum(forgotten)) * (it.examples / len(examples)),
    }
    if forgotten:  # two batches a step, the last of an epoch taken as full; every 10 steps a fit, and a look at prompts
        cost["unlearning"] = unlearn_steps * (6.2 * batch * len(forgotten) * trained + 0.1 * it.trees * len(forgotten))
    if answer_tokens:
        said = [(1, len(prompt.ids) + answer_tokens - 1) for prompt in problem.prompts]
        cost["answers"] = models * it.over(said, answer_tokens * len(said))
    return cost


def _matrices(module: nn.Module, ids: set[int] | None = None) -> int:
    """Weights of a module's matrices, or of those among them that have one of the ids."""
    matrices = [p for p in module.parameters() if p.ndim > 1]
    return sum(weight_shape(p).numel() for p in matrices if ids is None or id(p) in ids)


def _sides(blocks: Iterable[nn.Module]) -> tuple[int, int]:
    """Inputs and outputs of all matrices of some blocks."""
    shapes = [weight_shape(p) for block in blocks for p in block.parameters() if p.ndim == 2]
    return sum(shape[1] for shape in shapes), sum(shape[0] for shape in shapes)


def features(problem: Problem, it: Passes, targets: int, examples: int) -> float:
    """``feature_effects``: per target its active prompts up to the block, per chunk the examples."""
    to_block = it.share * it.over_prompts(list(pack(problem.prompts, None)))
    chunks = -(-targets // x_queries_at_once(problem, find_sites(problem.model, problem.parameters)))
    contracted = 2.0 * examples * targets * it.moving_to_block
    return targets * ACTIVE * 3 * to_block + chunks * (2 + it.share) * it.examples + contracted


def sketches(problem: Problem, it: Passes, targets: int, examples: Examples) -> dict[str, float]:
    """A store that is empty yet: prompts stand apart; each active feature has a backward pass.

    A sketch is projected inputs, once a forward pass, and what they make with output gradients.
    """
    whole, read = (pack_rows(problem.prompts, of, tokens=problem.batch_tokens) for of in (problem.behavior, None))
    tokens, y_tokens = (sum(p.rows.ids.numel() for p in packs) for packs in (read, whole))
    to_block = it.share * it.over_prompts(read)
    inner, out = (2.0 * COLUMNS * side for side in it.sides_to_block)
    active = to_block + tokens * inner + targets * ACTIVE * (to_block + tokens * out)
    both = 2.0 * COLUMNS * sum(it.sides)
    return {
        "sketches of prompts": active + 2 * it.over_prompts(whole) + y_tokens * both,
        "sketches of examples": 2 * it.examples + both * sum(len(example.ids) for example in examples),
    }


def prompts(problem: Problem, it: Passes, examples: Examples) -> float:
    """``prompt_effects``: two passes a chunk over what meets in it, then every example and prompt."""
    passes = 0.0
    sites = split_sites(problem.model, problem.parameters)
    for some, batches in prompt_chunks(problem, sites, examples):
        both = it.over_prompts(some) + it.over_examples(examples, batches)
        passes += 5 * both  # forward and backward twice, and the gradients built once
    return passes + 2.0 * len(examples) * len(problem.prompts) * it.moving
