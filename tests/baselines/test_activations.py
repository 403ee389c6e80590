"""Projections of activations on a direction, and what they have to do with the gradient."""

from __future__ import annotations

import itertools
from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch

from taught.baselines.activations import project, response_reads
from taught.core.estimator import Work
from taught.core.readings import Readings
from taught.core.target import TargetSet
from taught.errors import UserError
from taught.estimators.adjoint import Adjoint
from taught.features.concept import Concept, concept_map
from tiny_models import (
    MODELS,
    POINT,
    PROMPT_IDS,
    WIDTH,
    moved,
    plain_gradient,
    plain_loss,
    plain_read,
    tiny_examples,
    tiny_model,
    tiny_problem,
)


@cache
def model_of(name: str):
    return tiny_model(name)


def concepts() -> list[Concept]:
    rng = np.random.default_rng(5)
    return [Concept(name, rng.normal(size=WIDTH), POINT) for name in ("a", "b")]


def mapped(model, tokens: str = "mean_response"):
    return concept_map(concepts(), tokens, next(model.parameters()))


def close(ours, reference, relative: float) -> None:
    assert np.abs(np.asarray(reference)).max() > 0
    np.testing.assert_allclose(ours, reference, rtol=relative, atol=relative * np.abs(reference).max())


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("tokens", ["mean_response", "last_response"])
def test_the_vector_filter_is_the_projection_of_plain_passes(name: str, tokens: str):
    model = model_of(name)
    found = project(model, tiny_examples(), mapped(model, tokens), POINT, batch_tokens=16)
    for example, row in zip(tiny_examples(), found, strict=True):
        with torch.no_grad():
            h = plain_read(model, example.ids)[0].numpy()
        read = h[example.start :].mean(0) if tokens == "mean_response" else h[-1]
        close(row, np.array([concept.direction @ read for concept in concepts()]), 1e-10)


def test_an_empty_response_is_refused_by_its_id():
    example = replace(tiny_examples()[0], weights=(tuple([0.0] * len(tiny_examples()[0].ids)),))
    with pytest.raises(UserError, match=r"empty(.|\n)*z0"):
        response_reads([example], "mean_response")


def effects_on_own_read_out(model, read, examples, lr: float) -> np.ndarray:
    """Effects [P, C] of examples on the concepts at the response of one example."""
    problem = tiny_problem(model, features=mapped(model), prompts=response_reads([read], "mean_response"), lr=lr)
    readings = Readings((read.id,), np.zeros(1), X=np.zeros((1, 2)), columns=("a", "b"))
    return Adjoint().estimate(problem, examples, TargetSet.of(["concept:*"], readings), Work()).values


def training_differences(model, step, lr: float) -> np.ndarray:
    """Projection Difference (training) of every example for a model moved along a step, [P, C]."""
    before = project(model, tiny_examples(), mapped(model), POINT)
    with moved(model, step, -lr):
        return (project(model, tiny_examples(), mapped(model), POINT) - before).numpy()


@pytest.mark.parametrize("name", MODELS)
def test_the_difference_after_a_step_on_an_example_tends_to_the_gradient_of_its_own_read_out(name):
    model, example = tiny_model(name), tiny_examples()[1]
    exact = effects_on_own_read_out(model, example, [example], 1.0)[0]
    step = plain_gradient(model, plain_loss(model, example))
    errors = []
    for lr in (1e-5, 1e-6):
        found = training_differences(model, step, lr)[1] / lr
        errors.append(np.abs(found - exact).max() / np.abs(exact).max())
    assert errors[1] < 1e-2
    assert errors[1] < 0.2 * errors[0]  # a tenth of the step leaves a tenth of the error


def test_the_differences_of_a_batch_are_the_sum_of_those_of_its_examples():
    """Training on a batch: each example's difference is the influence of all examples on its read-out."""
    model = tiny_model("tied")
    steps = [plain_gradient(model, plain_loss(model, example)) for example in tiny_examples()]
    batch = {name: sum(step[name] for step in steps) for name in steps[0]}
    lr = 1e-8
    together = training_differences(model, batch, lr)
    close(together, sum(training_differences(model, step, lr) for step in steps), 1e-4)
    for column, example in enumerate(tiny_examples()):
        effects = effects_on_own_read_out(model, example, tiny_examples(), lr)
        close(together[column], effects.sum(0), 1e-4)


def test_the_difference_to_own_responses_is_the_gradient_of_a_tilted_model():
    """docs/methods.md: p(r) is tilted by exp(<b, h(r)>); all responses of two tokens, written out.

    - grad_b of the loss at b = 0 is h(r) minus its mean over the model's own responses, so that
    the mean of the projection differences over own responses is the effect on <v, b>, exactly.
    """
    model, prompt = model_of("untied"), PROMPT_IDS[4]
    v = torch.from_numpy(concepts()[0].direction)
    responses = list(itertools.product(range(6), repeat=2))
    h, logp = [], []
    with torch.no_grad():
        for response in responses:
            hidden, scores = plain_read(model, (*prompt, *response))
            h.append(hidden[len(prompt) :].mean(0))
            logp.append(sum(scores[len(prompt) - 1 + j, t] for j, t in enumerate(response)))
    h, logp = torch.stack(h), torch.stack(logp)
    logp = logp - logp.logsumexp(0)
    tilt = torch.zeros(WIDTH, dtype=torch.float64, requires_grad=True)
    chosen = responses.index((3, 5))
    loss = -torch.log_softmax(logp + h @ tilt, 0)[chosen]
    (gradient,) = torch.autograd.grad(loss, tilt)
    differences = (h[chosen] - h) @ v
    close(float(-(gradient @ v)), float((differences * logp.exp()).sum()), 1e-10)
