"""Steps by Adam: every estimator against autograd with the gradient divided explicitly, float64."""

from __future__ import annotations

from functools import cache
from itertools import combinations

import numpy as np
import pytest
import torch
from safetensors.torch import save_file

from reference import LR, Readouts, along, close, naive_X
from taught.core.estimator import Work
from taught.core.problem import Problem
from taught.curvatures.adam import Adam, adam_metric, estimate_moments, moments_from_optimizer
from taught.errors import UserError
from taught.estimators.adjoint import feature_effects, target_effects
from taught.estimators.every_prompt import prompt_effects
from taught.estimators.finite_step import finite_steps, step_direction
from taught.estimators.forward import tangents
from taught.model.parameters import moving_parameters
from taught.model.readout import read_prompts
from tiny_models import (
    MODELS,
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

EPS = 0.01
NO_NUMBERS = (torch.uint8, torch.int8, torch.int64, torch.bool, torch.float8_e4m3fn, torch.complex64)
models = pytest.mark.parametrize("name", MODELS)


@cache
def model_of(name: str):
    return tiny_model(name)


@cache
def moments_of(name: str) -> dict[str, torch.Tensor]:
    """Positive, over four orders of magnitude, another one for each element."""
    draw = torch.Generator().manual_seed(9)
    return {
        n: (2 * torch.randn(p.shape, generator=draw, dtype=p.dtype)).exp() for n, p in model_of(name).named_parameters()
    }


def divided(name: str, number: int) -> dict[str, torch.Tensor]:
    grads = plain_gradient(model_of(name), plain_loss(model_of(name), tiny_examples()[number]))
    return {n: g / (moments_of(name)[n].sqrt() + EPS) for n, g in grads.items()}


@cache
def forward_modes(name: str):
    """(h, y) and their tangents along the divided gradient of each example."""
    grads = [divided(name, number) for number in range(len(tiny_examples()))]
    return along(Readouts(model_of(name)), [{n: -LR * g for n, g in grad.items()} for grad in grads])


def problem_of(name: str, **options):
    return given(tiny_problem(model_of(name), lr=LR, **options), moments_of(name))


def given(problem: Problem, moments: dict[str, torch.Tensor], eps: float = EPS) -> Problem:
    """Steps in the metric of these second moments."""
    return problem.within(adam_metric(problem, moments, eps))


def references(name: str):
    """For each example (X, dX, dy)."""
    for (h, _), (dh, dy) in forward_modes(name):
        yield (naive_X(h, "standard", "last_user"), naive_X(h, "standard", "last_user", dh), dy)


def cotangents(count: int):
    draw = torch.Generator().manual_seed(5)
    A = torch.randn(count, 6, 5, generator=draw, dtype=torch.float64)
    return A, torch.randn(count, 6, generator=draw, dtype=torch.float64)


@models
def test_targets_are_those_of_the_divided_gradient(name: str) -> None:
    A, B = cotangents(4)
    B[3] = 0  # and one target of X alone
    effects, _ = target_effects(problem_of(name), tiny_examples(), A, B)
    for row, (_, dX, dy) in zip(effects, references(name), strict=True):
        close(row, torch.einsum("knd,nd->k", A, dX) + B @ dy)


@models
@pytest.mark.parametrize("options", [{}, {"memory_gb": 1e-6}, {"memory_gb": 2e-6, "batch_tokens": 9}])
def test_features_and_prompts_are_those_of_the_divided_gradient(name: str, options) -> None:
    A, _ = cotangents(3)
    X = next(references(name))[0]
    problem = problem_of(name, **options)
    F = feature_effects(problem, tiny_examples(), list(A), X)
    dy = prompt_effects(problem, tiny_examples())
    for number, (_, dX, dy_ref) in enumerate(references(name)):
        close(F[number], torch.einsum("knd,nd->k", A, dX))
        close(dy[number], dy_ref)


@models
def test_forward_mode_goes_along_the_divided_gradient(name: str) -> None:
    for found, (_, dX, dy) in zip(tangents(problem_of(name), tiny_examples()), references(name), strict=True):
        close(found.dX, dX)
        close(found.dy, dy)


@models
def test_the_finite_step_goes_along_the_divided_gradient(name: str) -> None:
    problem = problem_of(name)
    model = problem.model
    before = read_prompts(model, problem.prompts, problem.behavior, POINT)
    unmoved = snapshot(model)
    steps = list(finite_steps(problem, tiny_examples(), before))
    assert same(unmoved, snapshot(model))
    for number, step in enumerate(steps):
        with moved(model, divided(name, number), -LR), torch.no_grad():
            _, y = Readouts(model)()
        torch.testing.assert_close(step.dy, y - before.y, rtol=1e-9, atol=1e-11)


@models
def test_estimated_moments_are_the_mean_of_the_examples_squared_gradients(name: str) -> None:
    squares = [
        {n: g**2 for n, g in plain_gradient(model_of(name), plain_loss(model_of(name), z)).items()}
        for z in tiny_examples()
    ]
    for budget in (9, 24):
        found = estimate_moments(tiny_problem(model_of(name), batch_tokens=budget), tiny_examples())
        assert list(found) == [n for n, _ in model_of(name).named_parameters()]
        for n, v in found.items():
            mean = sum(square[n] for square in squares) / len(squares)
            torch.testing.assert_close(v, mean, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("batch", [2, 3, 99])
def test_moments_of_larger_batches_are_means_over_all_batches(batch: int) -> None:
    """Every batch of so many examples, its mean gradient squared, averaged."""
    model, examples = model_of("tied"), tiny_examples()
    each = [plain_gradient(model, plain_loss(model, z)) for z in examples]
    batches = list(combinations(range(len(examples)), min(batch, len(examples))))
    found = estimate_moments(tiny_problem(model), examples, batch=batch)
    for n, v in found.items():
        squares = [torch.stack([each[i][n] for i in some]).mean(0) ** 2 for some in batches]
        torch.testing.assert_close(v, sum(squares) / len(batches), rtol=1e-9, atol=1e-14)


def test_moments_are_estimated_where_none_are_given_and_only_of_what_moves() -> None:
    model, patterns = tiny_model("tied"), ("*mlp*", "model.embed_tokens.*")
    problem = tiny_problem(model, parameters=patterns)
    before = snapshot(model)
    made = problem.within(Adam(eps=EPS).fit(problem, tiny_examples(), Work()))
    assert same(before, snapshot(model))
    v = estimate_moments(tiny_problem(model), tiny_examples())
    assert set(made.metric.scale) == set(moving_parameters(model, patterns))
    for name, scale in made.metric.scale.items():
        torch.testing.assert_close(scale, 1 / (v[name].sqrt() + EPS), rtol=1e-12, atol=0)
    found = prompt_effects(made, tiny_examples())
    for row, tangent in zip(found, tangents(made, tiny_examples()), strict=True):
        close(row, tangent.dy)


def trained(model, *, named: bool, steps: int = 3):
    """An optimizer after a few steps, in two groups as the Trainer of transformers makes them."""
    decayed = [(n, p) for n, p in model.named_parameters() if p.ndim > 1]
    others = [(n, p) for n, p in model.named_parameters() if p.ndim == 1]
    groups = [{"params": some if named else [p for _, p in some]} for some in (decayed, others)]
    adam = torch.optim.AdamW(groups, lr=1e-3, betas=(0.9, 0.95))
    for example in tiny_examples()[:steps]:
        adam.zero_grad()
        plain_loss(model, example).backward()
        adam.step()
    return adam, [n for n, _ in (*decayed, *others)]


@pytest.mark.parametrize("named", [True, False])
def test_moments_are_those_that_the_optimizer_divides_by(named: bool) -> None:
    model = tiny_model("untied")
    adam, names = trained(model, named=named)
    found = moments_from_optimizer(adam.state_dict(), None if named else names)
    for name, p in model.named_parameters():
        corrected = adam.state[p]["exp_avg_sq"] / (1 - 0.95**3)
        torch.testing.assert_close(found[name], corrected, rtol=1e-12, atol=0)


def test_a_step_is_that_of_torch_s_adam_after_long_training() -> None:
    model = tiny_model("untied")
    problem = given(tiny_problem(model), moments_of("untied"))
    _, direction = step_direction(problem, tiny_examples()[0])
    before = {n: p.detach().clone() for n, p in model.named_parameters()}
    # No momentum; moments that one step does not change, and their bias correction over.
    adam = torch.optim.Adam(model.parameters(), lr=0.1, betas=(0.0, 1 - 1e-13), eps=EPS)
    for name, p in model.named_parameters():
        adam.state[p] = {
            "step": torch.tensor(1e16, dtype=torch.float64),
            "exp_avg": p.detach() * 0,
            "exp_avg_sq": moments_of("untied")[name].clone(),
        }
    plain_loss(model, tiny_examples()[0]).backward()
    adam.step()
    for name, p in model.named_parameters():
        torch.testing.assert_close(p.detach() - before[name], -0.1 * direction[name], rtol=1e-8, atol=1e-12)


@pytest.mark.parametrize("suffix", ["", ".exp_avg_sq"])
def test_a_file_of_moments_is_read_by_name(suffix: str, tmp_path) -> None:
    file = tmp_path / "moments.safetensors"
    tensors = {n + suffix: v for n, v in moments_of("tied").items()}
    if suffix:
        tensors |= {n + ".exp_avg": -v for n, v in moments_of("tied").items()}
    save_file(tensors, file)
    made = Adam(moments=str(file), eps=EPS).fit(tiny_problem(model_of("tied")), [], Work())
    for name, scale in problem_of("tied").metric.scale.items():
        assert torch.equal(made.scale[name], scale)


def test_a_pickle_is_never_opened(tmp_path) -> None:
    file = tmp_path / "optimizer.pt"
    torch.save({"model.norm.weight": torch.ones(8)}, file)
    with pytest.raises(UserError, match=r"not a safetensors file(.|\n)*pickle(.|\n)*exp_avg_sq"):
        moments_from_optimizer(file)
    with pytest.raises(UserError, match=r"cannot be read(.|\n)*nothing\.safetensors"):
        moments_from_optimizer(tmp_path / "nothing.safetensors")


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda v: None, r"no second moments\n  value: model\.norm\.weight"),
        (lambda v: v[:-1], r"another shape than their parameter\n  value: model\.norm\.weight"),
        (lambda v: -v, r"negative or not finite\n  value: model\.norm\.weight"),
        (lambda v: v * np.nan, r"negative or not finite\n  value: model\.norm\.weight"),
        (lambda v: v + np.inf, r"negative or not finite\n  value: model\.norm\.weight"),
        *((lambda v, t=t: v.to(t), rf"no floating point(.|\n)*model\.norm\.weight: {t}") for t in NO_NUMBERS),
    ],
)
def test_moments_that_do_not_fit_the_model_are_refused_by_name(change, message: str) -> None:
    moments = dict(moments_of("tied"))
    moments["model.norm.weight"] = change(moments["model.norm.weight"])
    moments = {n: v for n, v in moments.items() if v is not None}
    with pytest.raises(UserError, match=message):
        given(tiny_problem(model_of("tied")), moments)
    only = tiny_problem(model_of("tied"), parameters=("*mlp*",))  # what does not move is not asked
    assert given(only, moments).metric.scale


def test_with_amsgrad_the_moments_are_the_largest_that_adam_divides_by(tmp_path) -> None:
    model = tiny_model("untied")
    adam = torch.optim.Adam(model.named_parameters(), amsgrad=True)
    for example in tiny_examples()[:2]:
        adam.zero_grad()
        plain_loss(model, example).backward()
        adam.step()
    for p in model.parameters():
        adam.state[p]["max_exp_avg_sq"] *= 2  # as after larger gradients long ago
    found = moments_from_optimizer(adam.state_dict())
    name, p = next(iter(model.named_parameters()))
    largest = adam.state[p]["max_exp_avg_sq"]
    torch.testing.assert_close(found[name], largest / (1 - 0.999**2), rtol=1e-12, atol=0)
    save_file(
        {f"{name}.{of}": adam.state[p][of] for of in ("exp_avg_sq", "max_exp_avg_sq")}, tmp_path / "m.safetensors"
    )
    assert torch.equal(moments_from_optimizer(tmp_path / "m.safetensors")[name], largest)


@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.Adagrad, torch.optim.RMSprop])
def test_the_state_of_another_optimizer_is_refused(optimizer) -> None:
    model = tiny_model("untied")
    other = optimizer(model.named_parameters(), lr=0.1)
    plain_loss(model, tiny_examples()[0]).backward()
    other.step()
    for state in (other.state_dict(), {}, {"state": [], "param_groups": [3]}):
        with pytest.raises(UserError, match="no state of torch's Adam"):
            moments_from_optimizer(state)


def test_quantised_moments_of_a_state_are_refused() -> None:
    adam, names = trained(tiny_model("tied"), named=False)
    state = adam.state_dict()
    state["state"][0]["exp_avg_sq"] = torch.zeros(4, dtype=torch.uint8)
    with pytest.raises(UserError, match="no floating point(.|\n)*uint8"):
        moments_from_optimizer(state, names)


def test_names_that_do_not_fit_the_optimizer_are_refused() -> None:
    adam, names = trained(tiny_model("tied"), named=False)
    for wrong in (None, names[:-1]):
        with pytest.raises(UserError, match=r"names do not fit(.|\n)*named_parameters"):
            moments_from_optimizer(adam.state_dict(), wrong)


def test_a_step_that_is_not_finite_is_refused() -> None:
    with pytest.raises(UserError, match=r"not finite(.|\n)*raise attribution\.curvature\.eps"):
        moments = {n: v * 0 for n, v in moments_of("tied").items()}
        given(tiny_problem(model_of("tied")), moments, 1e-320)
