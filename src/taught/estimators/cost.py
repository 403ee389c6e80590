"""Floating point operations of a study's attribution and retraining, counted before they are run.

Counted are the products with the weights of the blocks (2 operations a weight and token), attention
(4 a width and example of tokens in a row, in every block), the logits that are asked for, and the
products of gradients (2 an example, query and weight). A backward pass is as much as a forward one:
weights are frozen, only activations have gradients; what is built of both, a gradient, is as much
once more. Everything else is left out. Where few parameters move, passes are counted as if all did:
they are cheaper than is said.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from taught.core.example import Example, batch_indices
from taught.estimators.adjoint import Problem, targets_per_chunk
from taught.estimators.every_prompt import prompt_chunks
from taught.model.blockwise import split_sites
from taught.model.forward import find_blocks
from taught.model.gradients import find_sites
from taught.model.parameters import moving_parameters
from taught.model.readout import pack, prompt_tree
from taught.model.tokens import Rows, TokenTree, batches_by_tokens, stack
from taught.sketches.project import COLUMNS

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


def attribution_cost(
    problem: Problem,
    examples: Sequence[Example],
    *,
    targets: int,
    groups: int,
    estimator: str,
    coefficients: bool,
    exact_top: int,
    curvature: str = "identity",
    estimated: bool = True,
) -> dict[str, float]:
    """Operations by part.

    Parameters
    ----------
    targets
        Features of the policy, and one more with an intercept (``raw_x_targets``).
    groups
        Groups of prompts (``mean_y_target``).
    estimator, coefficients, exact_top
        As in the study.
    curvature, estimated
        As in the study; whether Adam's moments are estimated from the examples.

    Raises
    ------
    UserError
        The model's gradients are not understood, or its blocks share parameters: the estimator
        would refuse it too.
    """
    sizes = _sizes(problem)
    slots = problem.behavior.slots
    packed = pack(problem.prompts, problem.behavior)
    trees = sizes.forward([p.rows for p in packed], len(problem.prompts) * slots)
    one = _over_examples(sizes, examples, batch_indices(examples, problem.batch_tokens))
    gradient = 3 * one / len(examples)  # weights have gradients here: a backward pass is two
    step = trees + gradient
    cost = {"read-outs": trees + one}
    if estimator == "finite-step":
        cost = {"read-outs": 2 * trees, "finite steps": len(examples) * step}
    elif estimator == "forward":  # x W moves with x and with W: three products in place of one
        cost["forward mode"] = len(examples) * (3 * trees + gradient)
    elif estimator == "sketch":
        cost |= _sketched(problem, sizes, targets, 2 * one, examples)
        cost["exact sample"] = (2 + 2 * 3) * trees
        cost["forward mode"] = min(exact_top, len(examples)) * (3 * trees + gradient)
    elif coefficients:
        cost["features"] = _features(problem, sizes, targets, len(examples), one)
        cost["prompts"] = _prompts(problem, sizes, examples)
        if curvature == "adam":  # the output's gradients meet built, slot by slot
            cost["prompts"] += 2.0 * len(examples) * len(problem.prompts) * slots * sizes.moving_head
    else:
        # The score along both pathways asks for all prompts, each group's mean for its own.
        queries = 2 + groups
        contracted = 2.0 * len(examples) * queries * sizes.moving
        cost["targets"] = (2 + 2 * 3) * trees + 3 * one + contracted
    if curvature == "adam" and estimated:
        cost["second moments"] = 3 * one
    if curvature == "ekfac":  # labels, squares of both sides of every layer, the basis, gradients
        cost["curvature"] = 6 * one + _ekfac(problem, examples)
    if exact_top and estimator != "finite-step":
        cost["finite steps"] = trees + min(exact_top, len(examples)) * step
    if exact_top and estimator in ("adjoint", "sketch"):  # two queries of all prompts, dual numbers
        along = (1 + groups) * 3 * one / len(examples)
        cost["token shares"] = 2 * 3 * trees + min(exact_top, len(examples)) * along
    return cost


def validation_cost(
    problem: Problem,
    examples: Sequence[Example],
    subsets: Sequence[int],
    *,
    epochs: int,
    batch: int,
    answer_tokens: int,
) -> dict[str, float]:
    """Operations of retraining, by part; of a subset only its size is known, not its examples.

    Parameters
    ----------
    subsets
        Number of examples of each subset that is trained on.
    epochs, batch, answer_tokens
        As in the study. A step's batch is cut by ``problem.batch_tokens``; answers are taken to
        have their full length.
    """
    sizes = _sizes(problem)
    trees = sizes.forward(
        [p.rows for p in pack(problem.prompts, problem.behavior)], len(problem.prompts) * problem.behavior.slots
    )
    steps = [range(at, min(at + batch, len(examples))) for at in range(0, len(examples), batch)]
    parts = [
        [step[i] for i in index]
        for step in steps
        for index in batch_indices([examples[i] for i in step], problem.batch_tokens)
    ]
    trained = _over_examples(sizes, examples, parts) / len(examples)
    read = _over_examples(sizes, examples, batch_indices(examples, problem.batch_tokens)) / len(examples)
    models = 1 + len(subsets)
    cost = {
        "training": 3 * epochs * sum(subsets) * trained,
        "read-outs after it": models * trees + (len(examples) + sum(subsets)) * read,
    }
    if answer_tokens:
        said = [(1, len(prompt.ids) + answer_tokens - 1) for prompt in problem.prompts]
        cost["answers"] = models * sizes.over(said, answer_tokens * len(said))
    return cost


def _ekfac(problem: Problem, examples: Sequence[Example]) -> float:
    """Products with [n, n], one for the sum and one for the basis, and eigenvectors (9 n^3)."""
    tokens = sum(len(example.ids) - 1 for example in examples)
    shapes = (p.shape for p in moving_parameters(problem.model, problem.parameters).values())
    return sum(4.0 * tokens * n**2 + 9.0 * n**3 for shape in shapes for n in shape)


def _sizes(problem: Problem) -> _Sizes:
    model: Any = problem.model
    each = [_matrices(block) for block in find_blocks(model)]
    ids = {id(p) for p in moving_parameters(model, problem.parameters).values()}
    moving = [_matrices(block, ids) for block in find_blocks(model)]
    head = model.get_output_embeddings()
    width = int(model.config.get_text_config().hidden_size)
    return _Sizes(
        blocks=sum(each),
        to_block=sum(each[: problem.block + 1]),
        moving=sum(moving),
        moving_to_block=sum(moving[: problem.block + 1]),
        sides=_sides(find_blocks(model)),
        sides_to_block=_sides(list(find_blocks(model))[: problem.block + 1]),
        moving_head=0 if head is None else _matrices(head, ids),
        head=0 if head is None else _matrices(head),
        attention=width * len(each),
    )


def _matrices(module: nn.Module, ids: set[int] | None = None) -> int:
    """Weights of a module's matrices, or of those among them that have one of the ids."""
    matrices = [p for p in module.parameters() if p.ndim > 1]
    return sum(p.numel() for p in matrices if ids is None or id(p) in ids)


def _sides(blocks: Iterable[nn.Module]) -> tuple[int, int]:
    """Inputs and outputs of all matrices of some blocks."""
    shapes = [p.shape for block in blocks for p in block.parameters() if p.ndim == 2]
    return sum(shape[1] for shape in shapes), sum(shape[0] for shape in shapes)


def _over_examples(sizes: _Sizes, examples: Sequence[Example], batches: Sequence[Sequence[int]]) -> float:
    """One forward pass over some batches of the examples."""
    shapes = [(len(index), max(len(examples[i].ids) for i in index) - 1) for index in batches]
    keep = [len(index) * max(len(examples[i].ids) - examples[i].start for i in index) for index in batches]
    return sizes.over(shapes, sum(keep))


def _features(problem: Problem, sizes: _Sizes, targets: int, examples: int, one: float) -> float:
    """``feature_effects``: per target its active prompts up to the block, per chunk the examples."""
    to_block = sizes.share * sizes.forward([p.rows for p in pack(problem.prompts, None)], 0)
    sites = find_sites(problem.model, problem.parameters)
    chunks = -(-targets // targets_per_chunk(problem, sites))
    contracted = 2.0 * examples * targets * sizes.moving_to_block
    return targets * ACTIVE * 3 * to_block + chunks * (2 + sizes.share) * one + contracted


def _sketched(
    problem: Problem, sizes: _Sizes, targets: int, passes: float, examples: Sequence[Example]
) -> dict[str, float]:
    """``sketched.fill``: prompts stand apart; each active feature has a backward pass.

    A sketch is projected inputs, once a forward pass, and what they make with output gradients.
    """
    whole = [prompt_tree([p], problem.behavior)[0] for p in problem.prompts]
    read = [prompt_tree([p], None)[0] for p in problem.prompts]
    y, x = (_stacked(trees, problem.batch_tokens) for trees in (whole, read))
    slots = problem.behavior.slots * len(problem.prompts)
    to_block = sizes.share * sizes.forward(x, 0)
    inner, out = (2.0 * COLUMNS * side for side in sizes.sides_to_block)
    tokens = sum(rows.ids.numel() for rows in x)
    features = to_block + tokens * inner + targets * ACTIVE * (to_block + tokens * out)
    both = 2.0 * COLUMNS * sum(sizes.sides)
    y_tokens = sum(rows.ids.numel() for rows in y)
    return {
        "sketches of prompts": features + 2 * sizes.forward(y, slots) + y_tokens * both,
        "sketches of examples": passes + both * sum(len(example.ids) for example in examples),
    }


def _stacked(trees: Sequence[TokenTree], budget: int) -> list[Rows]:
    return [stack([trees[i] for i in index]) for index in batches_by_tokens([len(tree) for tree in trees], budget)]


def _prompts(problem: Problem, sizes: _Sizes, examples: Sequence[Example]) -> float:
    """``prompt_effects``: two passes a chunk over what meets in it, then every example and prompt."""
    slots = problem.behavior.slots
    passes = 0.0
    sites = split_sites(problem.model, problem.parameters)
    for prompts, batches in prompt_chunks(problem, sites, examples):
        logits = slots * sum(len(index) for index, _ in prompts)
        both = sizes.forward([rows for _, rows in prompts], logits) + _over_examples(sizes, examples, batches)
        passes += 5 * both  # forward and backward twice, and the gradients built once
    return passes + 2.0 * len(examples) * len(problem.prompts) * sizes.moving
