"""Only some parameters move: every estimator against autograd over plain passes, float64."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch
from torch import nn

from reference import LR, Readouts, along, close, naive_X
from taught.core.driver import Method
from taught.errors import UserError
from taught.estimators.adjoint import feature_effects, target_effects
from taught.estimators.cost import Asked, attribution_cost
from taught.estimators.every_prompt import prompt_effects, prompt_steps
from taught.estimators.finite_step import example_gradient, finite_steps
from taught.estimators.forward import tangents
from taught.model.blockwise import split_sites
from taught.model.gradients import find_sites
from taught.model.parameters import moving_parameters
from taught.model.readout import read_prompts
from tiny_models import (
    POINT,
    moved,
    plain_gradient,
    plain_loss,
    same,
    snapshot,
    tiny_examples,
    tiny_model,
    tiny_problem,
)

SUBSETS = {
    "one matrix of two blocks": ("tied", ("model.layers.[01].mlp.up_proj.weight",)),
    "weights without their bias": ("untied", ("*_proj.weight",)),
    "a bias without its weight": ("tied", ("*q_proj.bias", "*down_proj.bias")),
    "norms": ("untied", ("*layernorm.weight", "model.norm.weight")),
    "the tied embedding": ("tied", ("model.embed_tokens.weight",)),
    "the output layer": ("untied", ("lm_head.weight", "model.layers.1.*")),
    "padded embedding": ("padded", ("model.embed_tokens.*", "model.layers.0.self_attn.*")),
    "after the features": ("tied", ("model.layers.2.*",)),
    "the features' block": ("padded", ("model.layers.1.*",)),
    "transposed layers": ("gpt2", ("*c_fc*", "*ln_1.bias")),
}
subsets = pytest.mark.parametrize("subset", SUBSETS)


@cache
def model_of(name: str):
    return tiny_model(name)


@cache
def forward_modes(subset: str):
    """(h, y) and their tangents along the step on each example that leaves all else in its place."""
    name, patterns = SUBSETS[subset]
    model = model_of(name)
    moving = moving_parameters(model, patterns)
    grads = [plain_gradient(model, plain_loss(model, example)) for example in tiny_examples()]
    return along(Readouts(model), [{n: -LR * g * (n in moving) for n, g in grad.items()} for grad in grads])


def problem_of(subset: str, **options):
    name, patterns = SUBSETS[subset]
    return tiny_problem(model_of(name), lr=LR, parameters=patterns, **options)


def references(subset: str):
    """For each example (X, dX, dy)."""
    for (h, _), (dh, dy) in forward_modes(subset):
        yield (naive_X(h, "standard", "last_user"), naive_X(h, "standard", "last_user", dh), dy)


def cotangents(count: int):
    draw = torch.Generator().manual_seed(5)
    A = torch.randn(count, 6, 5, generator=draw, dtype=torch.float64)
    return A, torch.randn(count, 6, generator=draw, dtype=torch.float64)


@subsets
def test_targets_move_by_the_parameters_that_match_alone(subset: str) -> None:
    A, B = cotangents(4)
    effects, _ = target_effects(problem_of(subset), tiny_examples(), A, B)
    for row, (_, dX, dy) in zip(effects, references(subset), strict=True):
        close(row, torch.einsum("knd,nd->k", A, dX) + B @ dy)


@subsets
@pytest.mark.parametrize("memory_gb", [1.0, 1e-6])
def test_features_and_prompts_move_by_the_parameters_that_match_alone(subset: str, memory_gb: float) -> None:
    A, _ = cotangents(3)
    X = next(references(subset))[0]
    problem = problem_of(subset, memory_gb=memory_gb)
    F = feature_effects(problem, tiny_examples(), list(A), X)
    dy = prompt_effects(problem, tiny_examples())
    for number, (_, dX, dy_ref) in enumerate(references(subset)):
        expected = torch.einsum("knd,nd->k", A, dX)
        if subset == "after the features":
            assert not F[number].any() and not expected.any()
        else:
            close(F[number], expected)
        close(dy[number], dy_ref)


@subsets
def test_forward_mode_moves_the_parameters_that_match_alone(subset: str) -> None:
    for found, (_, dX, dy) in zip(tangents(problem_of(subset), tiny_examples()), references(subset), strict=True):
        np.testing.assert_allclose(found.dX, dX, rtol=1e-6, atol=1e-12)
        close(found.dy, dy)


@subsets
def test_the_finite_step_moves_the_parameters_that_match_alone(subset: str) -> None:
    problem = problem_of(subset)
    model = problem.model
    before = read_prompts(model, problem.prompts, problem.behavior, POINT)
    unmoved = snapshot(model)
    steps = list(finite_steps(problem, tiny_examples(), before))
    assert same(unmoved, snapshot(model))
    moving = moving_parameters(model, problem.parameters)
    for example, step in zip(tiny_examples(), steps, strict=True):
        grads = plain_gradient(model, plain_loss(model, example))
        only = {n: g * (n in moving) for n, g in grads.items()}
        with moved(model, only, -LR), torch.no_grad():
            _, y = Readouts(model)()
        torch.testing.assert_close(step.dy, y - before.y, rtol=1e-9, atol=1e-11)


def test_only_the_gradients_that_are_asked_for_are_taken() -> None:
    model = model_of("tied")
    example, patterns = tiny_examples()[0], ("*.q_proj.*",)
    loss, grads = example_gradient(model, example, patterns)
    everything = plain_gradient(model, plain_loss(model, example))
    assert set(grads) == {n for n in everything if ".q_proj." in n} and len(grads) == 6
    for name, grad in grads.items():
        torch.testing.assert_close(grad, everything[name], rtol=1e-10, atol=1e-12)
    close(loss, plain_loss(model, example).detach(), 1e-12)


def test_a_example_that_moves_nothing_has_no_effect() -> None:
    model = tiny_model("tied")
    model.expert = nn.Linear(3, 3).double()  # not asked by any example
    problem = tiny_problem(model, parameters=("expert.*",))
    before = read_prompts(model, problem.prompts, problem.behavior, POINT)
    assert not prompt_effects(problem, tiny_examples()).any()
    assert not target_effects(problem, tiny_examples(), *cotangents(2))[0].any()
    assert not any(found.dy.any() or found.dX.any() for found in tangents(problem, tiny_examples()))
    assert not any(step.dy.any() for step in finite_steps(problem, tiny_examples(), before))


def test_blocks_below_the_lowest_that_moves_are_not_gone_through() -> None:
    model = model_of("tied")
    assert [split_sites(model, p).lowest for p in (None, ("*.1.*", "*.2.*"), ("model.norm*",))] == [0, 1, 2]
    all_of_it, part = (prompt_steps(tiny_problem(model, parameters=p), tiny_examples()) for p in (None, ("*.2.*",)))
    assert all_of_it == 3 * part


class Coded(nn.Module):
    """A module with a parameter that has no gradient, between two that are understood."""

    def __init__(self, inner: nn.Module) -> None:
        super().__init__()
        self.inner, self.gain = inner, nn.Parameter(torch.ones(2, 2).char(), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.inner(x) * self.gain.double().pow(2).mean()


def test_what_is_left_out_need_not_be_understood() -> None:
    model = tiny_model("tied")
    model.model.layers[1].mlp = Coded(model.model.layers[1].mlp)
    with pytest.raises(UserError, match=r"do not move(.|\n)*attribution\.parameters"):
        find_sites(model)
    patterns = ("*_proj.*",)
    problem = tiny_problem(model, lr=LR, parameters=patterns)
    plain = tiny_problem(model_of("tied"), lr=LR, parameters=patterns)
    close(prompt_effects(problem, tiny_examples()), prompt_effects(plain, tiny_examples()))
    with pytest.raises(UserError, match="gain"):
        find_sites(model, ("*.1.mlp.*",))


def test_parameters_shared_between_blocks_are_refused_only_where_they_move() -> None:
    model = tiny_model("tied")
    model.model.layers[2].mlp = model.model.layers[1].mlp
    with pytest.raises(UserError, match="shared between blocks"):
        split_sites(model, ("*mlp*",))
    assert split_sites(model, ("*self_attn*",)).lowest == 0


@pytest.mark.parametrize("pattern", ["model.layers.*.mpl.*", "lm_head.weight"])
def test_a_pattern_that_matches_nothing_is_refused_with_close_names(pattern: str) -> None:
    problem = tiny_problem(model_of("tied"), parameters=("*_proj.*", pattern))
    with pytest.raises(UserError, match=r"matches none(.|\n)*value: (.*)\n(.|\n)*fix:.*\.(weight|bias)"):
        target_effects(problem, tiny_examples(), *cotangents(1))
    with pytest.raises(UserError, match="matches none"):
        next(tangents(problem, tiny_examples()))


def test_patterns_mind_case_and_match_whole_names() -> None:
    model = model_of("tied")
    for pattern in ("*.Q_PROJ.*", "q_proj", "model.layers.0"):
        with pytest.raises(UserError, match="matches none"):
            moving_parameters(model, (pattern,))
    names = list(moving_parameters(model, ("*.[02].mlp.*", "model.norm.*")))
    assert names == [
        n for n, _ in model.named_parameters() if n == "model.norm.weight" or (".mlp." in n and ".1." not in n)
    ]


def test_products_are_counted_for_what_moves() -> None:
    def cost(patterns):
        problem, asked = tiny_problem(model_of("tied"), parameters=patterns), Asked(5, 4, False)
        return attribution_cost(problem, tiny_examples(), asked, Method())["targets"]

    down = sum(p.numel() for n, p in model_of("tied").named_parameters() if "down_proj.w" in n)
    both, one = cost(("*q_proj.weight", "*down_proj.weight")), cost(("*q_proj.weight",))
    assert both - one == pytest.approx(2 * len(tiny_examples()) * 4 * down)
    assert cost(("model.embed_tokens.weight",)) < one
