"""What is asked of a trained model: the targets at its own read-outs, and their gradients at its weights."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import replace
from pathlib import Path
from shutil import rmtree
from tempfile import mkdtemp

import torch
from torch import Tensor, nn

from taught.core.example import Examples
from taught.core.names import TargetName
from taught.core.problem import Problem
from taught.core.query import build_queries
from taught.core.readings import Readings
from taught.core.target import TargetSet
from taught.errors import UserError
from taught.model.gradients import RowSparse, find_sites, frozen, refuse_detached
from taught.model.parameters import moving_parameters
from taught.model.readout import read_prompts
from taught.training.loop import check_inputs, learning_rates
from taught.training.recipe import Recipe
from taught.training.steps import refuse_other_trainers, room_on_disk


@torch.no_grad()
def enter(model: nn.Module, weights: Mapping[str, Tensor]) -> None:
    """Put weights into a model, by the parameters' names."""
    for name, tensor in weights.items():
        model.get_parameter(name).copy_(tensor)


@torch.no_grad()
def read_trained(problem: Problem, targets: TargetSet) -> Readings:
    """What the model reads on the prompts as it is now; a policy is fitted to it."""
    reads = read_prompts(problem.model, problem.prompts, problem.behavior, problem.point)
    X = None if problem.features is None else problem.features(reads.h, reads.offsets).double().cpu().numpy()
    return targets.readings.refitted(reads.y.numpy(), X)


def trained_queries(
    problem: Problem, targets: TargetSet, ended: Readings, names: Sequence[TargetName] | None = None
) -> dict[str, Tensor]:
    """grad F of some targets (the direct ones) at the weights that the model has now, [K, *shape] by parameter.

    Constants of a target (a policy that another is compared with) stay those of the base model.

    Parameters
    ----------
    ended : what the model reads with these weights
    """
    problem = replace(problem, X=None if ended.X is None else torch.from_numpy(ended.X))
    with frozen(problem.model):
        sites = find_sites(problem.model, problem.parameters)
        found = build_queries(problem, sites, *targets.at(ended).cotangents(names))
    whole = {}
    for name, query in found.items():
        if isinstance(query, RowSparse):
            tokens = problem.model.get_input_embeddings().weight  # type: ignore[operator]
            dense = query.values.new_zeros(len(query.values), *tokens.shape)
            dense[:, query.rows] = query.values
            query = dense
        whole[name] = query
    return whole


def known_recipe(problem: Problem) -> Recipe:
    """The recipe of the run that is followed; UserError where there is none."""
    if problem.recipe is None:
        raise UserError("there is no training to follow", rule="a study names its recipe under validation")
    return problem.recipe


def planned_steps(problem: Problem, examples: Examples) -> int:
    """How many steps the run has that the recipe makes of the model.

    Raises
    ------
    UserError
        It could not be made or followed: what is known of that before it begins.
    """
    recipe = known_recipe(problem)
    refuse_other_trainers(recipe)
    refuse_detached(problem.model)
    if recipe.method == "lora" and problem.parameters is not None:
        raise UserError(
            "a run of fresh LoRA layers moves these alone",
            value="attribution.parameters: " + ", ".join(problem.parameters),
            rule="effects are through what the run moves",
            fix="use --set attribution.parameters=null, or --set validation.method=full",
        )
    check_inputs(examples, {} if recipe.method == "lora" else moving_parameters(problem.model, problem.parameters))
    steps = recipe.epochs * math.ceil(len(examples) / recipe.batch)
    learning_rates(recipe, steps)
    return steps


def moving_bytes(problem: Problem, recipe: Recipe) -> int:
    """Bytes of the weights that a recipe moves."""
    if recipe.method == "lora":  # of every linear layer, two factors
        linear = [m for m in problem.model.modules() if isinstance(m, nn.Linear)]
        return 4 * recipe.lora_rank * sum(m.in_features + m.out_features for m in linear)
    moving = moving_parameters(problem.model, problem.parameters).values()
    return sum(p.numel() * p.element_size() for p in moving)


@contextmanager
def states_folder(folder: Path | None, needed: int, rule: str) -> Iterator[Path | None]:
    """Where states are written, if so many bytes have to be; what a killed run left there goes first.

    Parameters
    ----------
    rule : what is kept, for the error where it does not fit
    """
    if not needed:
        yield None
        return
    place = Path(mkdtemp(prefix="steps-")) if folder is None else folder / "steps"
    rmtree(place, ignore_errors=True)
    room_on_disk(place, needed, rule)
    try:
        yield place
    finally:
        rmtree(place, ignore_errors=True)
