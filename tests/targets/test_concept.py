"""Effects on concepts against real steps and plain passes, by every estimator."""

from __future__ import annotations

from functools import cache

import numpy as np
import pytest
import torch

from taught.core import driver
from taught.core.driver import Method
from taught.core.estimator import Work
from taught.core.readings import Readings
from taught.core.registry import Choice
from taught.core.target import TargetSet
from taught.errors import UserError
from taught.features.concept import Concept, concept_map
from tiny_models import (
    MODELS,
    POINT,
    WIDTH,
    moved,
    plain_gradient,
    plain_loss,
    plain_read,
    same,
    snapshot,
    tiny_examples,
    tiny_model,
    tiny_problem,
    tiny_prompts,
)

LR = 1e-7  # small: what is compared is the first order
SOME = ("q0", "q2", "q3", "q5")


@cache
def model_of(name: str):
    return tiny_model(name)


def concepts() -> list[Concept]:
    rng = np.random.default_rng(5)
    return [Concept(name, rng.normal(size=WIDTH), POINT) for name in ("a", "b")]


def problem_of(model, position: str = "mean_user", ids=None, **options):
    prompts = [prompt for prompt in tiny_prompts(position) if ids is None or prompt.id in ids]
    features = concept_map(concepts(), position, next(model.parameters()))
    return tiny_problem(model, **{"features": features, "prompts": prompts, "lr": LR, **options})


def effects_of(problem, examples=None, method: str = "adjoint", **settings) -> np.ndarray:
    """Effects [P, C] on both concepts; cotangents need the names and the number of prompts alone."""
    n = len(problem.prompts)
    readings = Readings(tuple(p.id for p in problem.prompts), np.zeros(n), X=np.zeros((n, 2)), columns=("a", "b"))
    how = Method().named(method)
    how = Method(how.estimator, Choice(how.curvature.kind, settings), how.trajectory)
    targets = TargetSet.of(["concept:*"], readings)
    return driver.scores(problem, examples or tiny_examples(), targets, how, Work()).values


def plain_mean(model, position: str, ids) -> np.ndarray:
    """F of both concepts: the mean over prompts of <v, mean of h over the tokens>, plain passes."""
    reads = []
    with torch.no_grad():
        for prompt in tiny_prompts(position):
            if ids is None or prompt.id in ids:
                h = plain_read(model, prompt.ids)[0][list(prompt.read)].mean(0).numpy()
                reads.append([concept.direction @ h for concept in concepts()])
    return np.array(reads).mean(0)


def close(ours, reference, relative: float = 1e-5) -> None:
    assert np.abs(reference).max() > 0
    np.testing.assert_allclose(ours, reference, rtol=relative, atol=relative * np.abs(reference).max())


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("position", ["last_user", "mean_user"])
@pytest.mark.parametrize("ids", [None, SOME], ids=["all", "some"])
def test_it_is_the_finite_difference_of_the_concept_under_one_step_of_sgd(name, position, ids):
    model = tiny_model(name)
    effects = effects_of(problem_of(model, position, ids))
    for example, ours in zip(tiny_examples(), effects, strict=True):
        step = plain_gradient(model, plain_loss(model, example))
        reads = []
        for sign in (1, -1):  # the step and its opposite: what is left is of third order
            with moved(model, step, -sign * LR):
                reads.append(plain_mean(model, position, ids))
        close(ours, (reads[0] - reads[1]) / 2)


@pytest.mark.parametrize("name", MODELS)
def test_every_estimator_gives_the_same_effects(name):
    problem = problem_of(model_of(name), ids=SOME, lr=1e-6)
    adjoint = effects_of(problem)
    close(effects_of(problem, method="forward"), adjoint, 1e-8)
    close(effects_of(problem, method="finite-step"), adjoint, 1e-3)


def test_adam_s_metric_applies_to_concepts_as_to_features():
    problem = problem_of(model_of("untied"))
    adjoint = effects_of(problem, method="adjoint+adam", eps=1e-3)
    close(effects_of(problem, method="forward+adam", eps=1e-3), adjoint, 1e-8)
    assert not np.allclose(adjoint, effects_of(problem), rtol=0.1)


def test_nothing_of_the_model_changes():
    model = tiny_model("tied")
    before = snapshot(model)
    effects_of(problem_of(model))
    assert same(before, snapshot(model))


@pytest.mark.parametrize("readings", [Readings(("q0",), np.zeros(1)), Readings(("q0",), np.zeros(1), columns=("a",))])
def test_without_a_concept_that_is_read_there_is_no_such_target(readings):
    with pytest.raises(UserError, match="concept:a"):
        TargetSet.of(["concept:a"], readings)


def test_an_unknown_concept_is_refused_with_those_that_are_read():
    readings = Readings(("q0",), np.zeros(1), X=np.zeros((1, 2)), columns=("a", "b"))
    with pytest.raises(UserError, match=r"nobody(.|\n)*a, b"):
        TargetSet.of(["concept:nobody"], readings)
