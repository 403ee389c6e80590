"""Shares of response tokens: each against autograd of its own loss term, their sum to rounding."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from taught.core.estimator import Work
from taught.core.example import Example
from taught.core.readings import Readings
from taught.core.target import TargetSet
from taught.curvatures.adam import Adam
from taught.estimators.adjoint import Adjoint, target_effects
from taught.estimators.token_shares import token_effects
from taught.features.concept import Concept, concept_map
from tiny_models import (
    MODELS,
    POINT,
    PROMPT_IDS,
    WIDTH,
    plain_gradient,
    plain_read,
    plain_y,
    tiny_examples,
    tiny_model,
    tiny_problem,
    tiny_prompts,
)


def close(ours, reference, relative: float) -> None:
    ours, reference = np.asarray(ours), np.asarray(reference)
    assert np.abs(reference).max() > 0
    np.testing.assert_allclose(ours, reference, rtol=relative, atol=relative * np.abs(reference).max())


def cotangents(problem, targets: int = 3):
    gen = torch.Generator().manual_seed(0)
    n, d = len(problem.prompts), len(problem.features.ids)
    A = torch.randn(targets, n, d, dtype=torch.float64, generator=gen)
    return A, torch.randn(targets, n, dtype=torch.float64, generator=gen)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("options", [{}, {"batch_tokens": 1000}, {"checkpointing": True}, {"memory_gb": 1e-5}])
def test_shares_add_up_to_the_example_s_effect(name: str, options) -> None:
    problem = tiny_problem(tiny_model(name), "jumprelu", "max_user", **options)
    A, B = cotangents(problem)
    effects, _ = target_effects(problem, tiny_examples(), A, B)
    shares = token_effects(problem, tiny_examples(), A, B)
    for example, ours, whole in zip(tiny_examples(), shares, effects, strict=True):
        assert ours.shape == (example.n_scored, 3)
        close(ours.sum(0), whole, 1e-10)


@pytest.mark.parametrize("name", MODELS)
def test_a_share_is_the_effect_of_its_own_term_of_the_loss(name: str) -> None:
    model = tiny_model(name)
    problem = tiny_problem(model, lr=1e-3)
    A = torch.zeros(1, len(problem.prompts), len(problem.features.ids), dtype=torch.float64)
    B = torch.linspace(-1, 2, len(problem.prompts), dtype=torch.float64)[None]
    shares = token_effects(problem, tiny_examples(), A, B)
    # The derivative of F has the look-ups of the padding row, the optimizer's gradient has not.
    table = model.get_input_embeddings()
    padding, table.padding_idx = table.padding_idx, None
    F = sum(b * plain_y(model, ids) for b, ids in zip(B[0], PROMPT_IDS, strict=True))
    query = plain_gradient(model, F)
    table.padding_idx = padding
    for example, ours in zip(tiny_examples(), shares, strict=True):
        expected = []
        for t in range(example.start, len(example.ids)):
            term = -plain_read(model, example.ids)[1][t - 1, example.ids[t]] / example.n_scored
            gradient = plain_gradient(model, term)
            expected.append(-1e-3 * sum((gradient[n] * query[n]).sum() for n in query))
        close(ours[:, 0], torch.stack(expected).detach(), 1e-8)


def test_shares_of_concepts_in_adam_s_metric_add_up_too() -> None:
    model = tiny_model("tied")
    concept = Concept("a", np.linspace(-1, 1, WIDTH), POINT)
    features = concept_map([concept], "mean_user", next(model.parameters()))
    problem = tiny_problem(model, features=features, prompts=tiny_prompts("mean_user"))
    problem = problem.within(Adam(eps=1e-3).fit(problem, tiny_examples(), Work()))
    n = len(problem.prompts)
    readings = Readings(tuple(p.id for p in problem.prompts), np.zeros(n), X=np.zeros((n, 1)), columns=("a",))
    targets = TargetSet.of(["concept:*"], readings)
    whole = Adjoint().estimate(problem, tiny_examples(), targets, Work()).values
    shares = token_effects(problem, tiny_examples(), *targets.cotangents())
    close(torch.stack([share.sum(0) for share in shares]), whole, 1e-10)


@pytest.mark.parametrize("name", MODELS)
def test_shares_of_a_linked_example_have_the_slope_of_its_link(name: str) -> None:
    problem = tiny_problem(tiny_model(name))
    pair = tiny_examples()[0]
    answers = (pair.ids, (*pair.ids[: pair.start], 15, 9, 3))
    weights = tuple(
        tuple(sign * (t >= pair.start) for t in range(len(a))) for a, sign in zip(answers, (1, -2), strict=True)
    )
    linked = Example("linked", answers, weights, lambda sums: -torch.nn.functional.logsigmoid(-0.4 * sums))
    examples = [linked, *tiny_examples()]
    A, B = cotangents(problem)
    effects, _ = target_effects(problem, examples, A, B)
    shares = token_effects(problem, examples, A, B)
    assert shares[0].shape == (len(answers[0]) + len(answers[1]) - 2 * pair.start, 3)
    for ours, whole in zip(shares, effects, strict=True):
        close(ours.sum(0), whole, 1e-10)
    # Tokens of the first answer go one way, those of the second the other way.
    first = tiny_problem(tiny_model(name))
    alone = token_effects(first, [Example("alone", answers[:1], weights[:1])], A, B)[0]
    ratio = shares[0][: len(alone)] / alone
    close(ratio, ratio[0, 0].expand_as(ratio), 1e-9)
