"""Every estimator on models whose gradients are taken whole, or that are run in plain passes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from torch import Tensor, nn

from families import EXAMPLES, LR, PROMPTS, gradient, loss_alone, model_of, y_alone
from taught.behaviors.prefixes import Prefixes
from taught.core.passes import settle_passes
from taught.core.point import Point
from taught.core.problem import Problem
from taught.curvatures.adam import estimate_moments
from taught.errors import UserError
from taught.estimators.adjoint import feature_effects, target_effects
from taught.estimators.every_prompt import prompt_effects
from taught.estimators.finite_step import finite_steps
from taught.estimators.forward import tangents
from taught.estimators.token_shares import token_effects
from taught.features.pooling import FeatureMap
from taught.model.gradients import find_sites, mixes_examples
from taught.model.readout import read_prompts
from taught.sketches.fill import example_sketches, prompt_sketches
from taught.sketches.project import Projection
from tiny_models import Norm64, tiny_sae


class Experts(nn.Module):
    """A layer of experts with linear layers of their own, each called on the tokens that are sent to it."""

    def __init__(self, width: int, count: int = 3) -> None:
        super().__init__()
        self.router = nn.Linear(width, count, bias=False)
        self.experts = nn.ModuleList(
            nn.Sequential(nn.Linear(width, 12), nn.SiLU(), nn.Linear(12, width)) for _ in range(count)
        )

    def forward(self, x: Tensor) -> Tensor:
        flat = x.flatten(0, 1)
        share, chosen = self.router(flat).softmax(-1).topk(2)
        out = torch.zeros_like(flat)
        for number, expert in enumerate(self.experts):
            token, slot = (chosen == number).nonzero(as_tuple=True)
            out = out.index_add(0, token, expert(flat[token]) * share[token, slot, None])
        return out.view_as(x)


KINDS = ("mistral", "mixtral", "experts with layers of their own", "bloom", "mamba", "jamba")


def made(kind: str) -> Problem:
    model = model_of("llama" if kind.startswith("experts") else kind, fresh=True)
    if kind.startswith("experts"):
        torch.manual_seed(1)
        model.model.layers[1].mlp = Experts(16).double()
    for module in list(model.modules()):  # in the precision of their input, for differences of steps
        for name, child in list(module.named_children()):
            if type(child).__name__.endswith("RMSNorm") and hasattr(child, "weight"):
                setattr(module, name, Norm64(len(child.weight)).double())
    behavior = Prefixes(("any",))
    settle_passes(model, PROMPTS, behavior, EXAMPLES)
    features = FeatureMap(tiny_sae(width=16), torch.tensor([0, 2, 3, 5]), "sae", "last_user")
    alone = mixes_examples(model, find_sites(model))
    return Problem(model, PROMPTS, behavior, LR, Point(0), features, batch_tokens=1 if alone else 1000)


def close(found: Tensor, expected: Tensor, rel: float = 1e-6) -> None:
    assert found.shape == expected.shape
    assert float((found - expected).norm() / expected.norm()) < rel


@pytest.mark.parametrize("kind", KINDS)
def test_every_estimator_gives_the_products_of_plain_gradients(kind: str) -> None:
    problem = made(kind)
    model = problem.model
    steps = torch.stack([gradient(model, loss_alone(model, z)) for z in EXAMPLES])
    moves = torch.stack([gradient(model, y_alone(model, prompt)) for prompt in PROMPTS])
    expected = -LR * steps @ moves.T
    B = torch.ones(1, len(PROMPTS)).double()

    close(prompt_effects(problem, EXAMPLES), expected)
    close(target_effects(problem, EXAMPLES, None, B)[0][:, 0], expected.sum(1))
    close(target_effects(replace(problem, checkpointing=True), EXAMPLES, None, B)[0][:, 0], expected.sum(1))
    shares = token_effects(problem, EXAMPLES, None, B)
    close(torch.stack([share.sum() for share in shares]), expected.sum(1))
    small = replace(problem, lr=1e-4)
    before = read_prompts(model, PROMPTS, problem.behavior, problem.point)
    moved = torch.stack([step.dy for step in finite_steps(small, EXAMPLES, before)])
    close(moved / small.lr, expected / LR, 0.05)  # parts of some models are in float32, and it has a second order

    if kind == "bloom":  # its activation is written by hand
        with pytest.raises(UserError, match=r"forward mode does not go through(.|\n)*estimator=adjoint"):
            list(tangents(problem, EXAMPLES))
        return
    along = list(tangents(problem, EXAMPLES))
    close(torch.stack([one.dy for one in along]), expected)
    X = problem.features(before.h, before.offsets).detach().double()
    A = [torch.zeros(*X.shape).double().index_fill_(1, torch.tensor([k]), 1) for k in range(X.shape[1])]
    close(feature_effects(problem, EXAMPLES, A, X), torch.stack([one.dX.sum(0) for one in along]))


@pytest.mark.parametrize("kind", KINDS)
def test_squares_and_sketches_are_those_of_plain_gradients(kind: str) -> None:
    problem = made(kind)
    model = problem.model
    names = dict(model.named_parameters())
    steps = torch.stack([gradient(model, loss_alone(model, z)) for z in EXAMPLES])
    moments = estimate_moments(problem, EXAMPLES)
    close(torch.cat([moments[name].flatten() for name in names]), steps.pow(2).mean(0))

    projection = Projection(model, 128)
    sizes = [p.numel() for p in names.values()]

    def sketched(gradients: Tensor) -> Tensor:
        parts = gradients.split(sizes, 1)
        whole = {n: part.view(-1, *p.shape) for (n, p), part in zip(names.items(), parts, strict=True)}
        return projection.matrices(whole, len(gradients))

    of_examples = torch.zeros(len(EXAMPLES), 128).double()
    for part in example_sketches(problem, projection, EXAMPLES):
        of_examples[list(part.index)] = part.values
    close(of_examples, sketched(steps))
    moves = torch.stack([gradient(model, y_alone(model, prompt)) for prompt in PROMPTS])
    of_prompts = torch.zeros(len(PROMPTS), 128).double()
    for part in prompt_sketches(replace(problem, features=None, point=None), projection, PROMPTS):
        of_prompts[list(part.index)] = part.values
    close(of_prompts, sketched(moves))


def test_experts_that_are_left_out_need_not_be_taken_whole() -> None:
    model, patterns = made("mixtral").model, ("*self_attn*", "*norm*")
    moving = torch.cat(
        [torch.full((p.numel(),), "self_attn" in name or "norm" in name) for name, p in model.named_parameters()]
    )
    steps = torch.stack([gradient(model, loss_alone(model, z)) for z in EXAMPLES])[:, moving]
    moves = torch.stack([gradient(model, y_alone(model, prompt)) for prompt in PROMPTS])[:, moving]
    assert not mixes_examples(model, find_sites(model, patterns))
    problem = Problem(model, PROMPTS, Prefixes(("any",)), LR, batch_tokens=1000, parameters=patterns)
    close(prompt_effects(problem, EXAMPLES), -LR * steps @ moves.T)


def test_fused_experts_in_single_precision_take_products_in_groups() -> None:
    model = made("mixtral").model
    expected = prompt_effects(Problem(model, PROMPTS, Prefixes(("any",)), LR, batch_tokens=1), EXAMPLES)
    model.config._experts_implementation = "grouped_mm"
    found = prompt_effects(Problem(model.float(), PROMPTS, Prefixes(("any",)), LR, batch_tokens=1), EXAMPLES)
    close(found, expected, 1e-3)
