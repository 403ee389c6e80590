"""The operations that ``taught check`` announces are those that a run then does."""

from __future__ import annotations

from collections import Counter
from dataclasses import replace

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

from taught.core.driver import Method
from taught.core.estimator import Work
from taught.core.example import example_losses
from taught.core.registry import Choice
from taught.curvatures.adam import Adam, estimate_moments
from taught.curvatures.ekfac import curved_layers, fit_ekfac
from taught.errors import UserError
from taught.estimators import cost
from taught.estimators.adjoint import feature_effects, target_effects
from taught.estimators.cost import Asked, attribution_cost, validation_cost
from taught.estimators.every_prompt import prompt_effects
from taught.estimators.finite_step import finite_steps
from taught.estimators.forward import tangents
from taught.estimators.token_shares import token_effects
from taught.model import kernels
from taught.model.forward import find_blocks
from taught.model.readout import read_prompts
from taught.sketches.fill import example_sketches, prompt_sketches
from taught.sketches.project import Projection
from taught.study.schema import ValidationSpec
from taught.training.recipe import Recipe
from taught.training.retrain import Answering, Retrainer
from tiny_models import tiny_examples, tiny_model, tiny_problem

TARGETS = 5


class Operations(TorchDispatchMode):
    """Counts the floating point operations of every product that torch is asked for."""

    def __init__(self) -> None:
        super().__init__()
        self.by_operator: Counter[str] = Counter()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        out = func(*args, **(kwargs or {}))
        operator = func._overloadpacket
        if operator in flop_registry:
            count = flop_registry[operator](*args, **(kwargs or {}), out_val=out)
            self.by_operator[str(operator)] += count
        return out


def done(work) -> float:
    with Operations() as counted:
        work()
    return float(counted.by_operator.total())


def announced(problem, estimator="adjoint", curvature="identity", examples=None, **changes) -> dict[str, float]:
    asked = Asked(**{"features": TARGETS, "queries": 4, "every": True, **changes})
    curved = Choice(curvature) if isinstance(curvature, str) else curvature
    return attribution_cost(problem, examples or tiny_examples(), asked, Method(Choice(estimator), curved))


@pytest.fixture(params=("untied", "gpt2"))  # an output of its own, and one that is the embedding
def problem(request, monkeypatch):
    """float64 and eager attention: every operation is one that torch's registry knows."""
    monkeypatch.setattr(cost, "ACTIVE", 1.0)
    return tiny_problem(tiny_model(request.param, attention="eager"))


def sparse_targets(prompts: int) -> list[torch.Tensor]:
    """One target a feature, no two of them over the same prompts."""
    draw = torch.Generator().manual_seed(0)
    A = torch.randn(TARGETS, prompts, TARGETS, dtype=torch.float64, generator=draw)
    for k in range(TARGETS):
        A[k, k % prompts] = 0
    return list(A)


def test_read_outs_are_announced_as_they_are_done(problem):
    def work():
        read_prompts(problem.model, problem.prompts, problem.behavior, problem.point)
        example_losses(problem.model, tiny_examples(), problem.batch_tokens)

    assert announced(problem)["read-outs"] == pytest.approx(done(work), rel=0.02)


@pytest.mark.parametrize("memory_gb", [1.0, 1e-6])
def test_features_and_prompts_are_announced_as_they_are_done(problem, memory_gb):
    problem = replace(problem, memory_gb=memory_gb)  # small: many chunks
    expected = announced(problem)
    X = torch.ones(len(problem.prompts), TARGETS)
    A = sparse_targets(len(problem.prompts))
    features = done(lambda: feature_effects(problem, tiny_examples(), A, X))
    prompts = done(lambda: prompt_effects(problem, tiny_examples()))
    assert expected["features"] == pytest.approx(features, rel=0.15)
    assert expected["prompts"] == pytest.approx(prompts, rel=0.15)


def test_every_example_meets_every_prompt_at_one_multiplication_a_weight(problem):
    """What is left of the cost when all that grows with examples or prompts alone is taken off."""

    def prompts(n: int, p: int) -> float:
        many = replace(problem, prompts=n * list(problem.prompts), batch_tokens=1)
        return announced(many, examples=p * tiny_examples())["prompts"]

    met = prompts(2, 2) - prompts(2, 1) - prompts(1, 2) + prompts(1, 1)
    weights = sum(p.numel() for p in find_blocks(problem.model).parameters() if p.ndim > 1)
    assert met == pytest.approx(2 * len(problem.prompts) * len(tiny_examples()) * weights)


def test_few_targets_are_announced_as_they_are_done(problem):
    """The score along both pathways over all prompts; two groups, each over its own."""
    n = len(problem.prompts)
    A, B = torch.ones(4, n, TARGETS).double(), torch.ones(4, n).double()
    A[1:], B[0], B[2, : n // 2], B[3, n // 2 :] = 0, 0, 0, 0
    work = done(lambda: target_effects(problem, tiny_examples(), A, B))
    assert announced(problem, every=False)["targets"] == pytest.approx(work, rel=0.15)


def test_steps_by_adam_are_announced_as_they_are_done(problem, tmp_path):
    adam = problem.within(Adam(eps=1e-3).fit(problem, tiny_examples(), Work()))
    moments = done(lambda: estimate_moments(problem, tiny_examples()))
    prompts = done(lambda: prompt_effects(adam, tiny_examples()))
    expected = announced(problem, curvature="adam")
    assert expected["second moments"] == pytest.approx(moments, rel=0.15)
    assert expected["prompts"] + expected["products of the output"] == pytest.approx(prompts, rel=0.3)
    file = tmp_path / "v.safetensors"
    file.touch()
    assert "second moments" not in announced(problem, curvature=Choice("adam", {"moments": str(file)}))


def test_ekfac_is_announced_as_it_is_done(problem):
    layers = replace(problem, parameters=curved_layers(problem.model))
    work = done(lambda: fit_ekfac(problem, tiny_examples()))  # eigenvectors are not counted there
    sides = [n for name in layers.parameters for n in problem.model.get_parameter(name).shape]
    expected = announced(layers, curvature="ekfac")["curvature"] - sum(9 * n**3 for n in sides)
    assert expected == pytest.approx(work, rel=0.3)


def test_finite_steps_are_announced_as_they_are_done(problem):
    before = read_prompts(problem.model, problem.prompts, problem.behavior, problem.point)
    work = done(lambda: list(finite_steps(problem, tiny_examples(), before)))
    for top in (0, 2):  # those of the strongest are among them
        steps = announced(problem, estimator="finite-step", top=top)["finite steps"]
        assert steps == pytest.approx(work, rel=0.15)


def test_sketches_are_announced_as_they_are_done(problem):
    projection = Projection(problem.model, 4096)
    prompts = done(lambda: prompt_sketches(problem, projection, problem.prompts))
    examples = done(lambda: example_sketches(problem, projection, tiny_examples()))
    expected = announced(problem, estimator="sketch")
    assert expected["sketches of prompts"] == pytest.approx(prompts, rel=0.3)
    assert expected["sketches of examples"] == pytest.approx(examples, rel=0.3)


def test_forward_mode_is_announced_as_it_is_done(problem):
    work = done(lambda: list(tangents(problem, tiny_examples())))
    assert announced(problem, estimator="forward")["forward mode"] == pytest.approx(work, rel=0.15)


@pytest.mark.parametrize("every", [True, False])
def test_exact_top_adds_as_many_finite_steps(problem, every):
    def steps(top: int) -> float:
        cost = announced(problem, every=every, top=top)
        return cost.get("finite steps", 0.0)

    one, two, all_examples = steps(1), steps(2), steps(len(tiny_examples()))
    assert steps(0) == 0
    assert two - one == pytest.approx((all_examples - one) / (len(tiny_examples()) - 1))
    assert steps(1000) == all_examples


@pytest.mark.parametrize("batch_tokens", [24, 1000])
def test_retraining_is_announced_as_it_is_done(problem, tmp_path, batch_tokens):
    problem = replace(problem, batch_tokens=batch_tokens)
    examples = tiny_examples()
    recipe = replace(Recipe.of(ValidationSpec()), epochs=2, batch=2, optimizer="sgd")
    answers = Answering(3, ())  # none ends an answer
    made = Retrainer(problem, examples, recipe, tmp_path, weights={}, answers=answers)
    subsets = [[p.id for p in examples], [p.id for p in examples[:2]], [p.id for p in examples[2:]]]

    def work():
        made.base()
        for ids in subsets:
            made.run(ids)

    cost = validation_cost(problem, examples, [4, 2, 2], epochs=2, batch=2, answer_tokens=3)
    assert cost.keys() == {"training", "read-outs after it", "answers"}
    assert sum(cost.values()) == pytest.approx(done(work), rel=0.15)


def test_shares_of_tokens_are_announced_as_they_are_done(problem):
    """The score over all prompts; two groups, each over its own."""
    n = len(problem.prompts)
    A, B = torch.ones(3, n, TARGETS).double(), torch.ones(3, n).double()
    A[1:], B[1, : n // 2], B[2, n // 2 :] = 0, 0, 0
    work = done(lambda: token_effects(problem, tiny_examples(), A, B))
    assert announced(problem, top=4, queries=3)["token shares"] == pytest.approx(work, rel=0.3)


def test_what_the_estimator_would_refuse_is_refused_here(problem):
    problem.model.codes = torch.nn.Parameter(torch.ones(2).char(), requires_grad=False)
    for estimator in ("adjoint", "finite-step"):
        with pytest.raises(UserError, match=r"do not move(.|\n)*codes"):
            announced(problem, estimator=estimator)


def test_the_rate_is_operations_over_time(monkeypatch):
    """Products that take 10 ms by a clock of ours."""
    clock = [0.0]

    def product(x, weight):
        assert x.dtype == weight.dtype == torch.bfloat16
        clock[0] += 0.01
        return torch.nn.functional.linear(x, weight)

    monkeypatch.setattr(kernels, "product", product)
    monkeypatch.setattr(kernels, "perf_counter", lambda: clock[0])
    rate = kernels.product_rate(torch.ones(6, 3000, dtype=torch.bfloat16))
    assert rate == pytest.approx(2 * 512 * 6 * 1024 / 0.01)
    assert clock[0] < 0.5
