"""Every family of causal language models against plain transformers: y, losses, effects, in float64."""

from __future__ import annotations

import pytest
import torch

from families import EXAMPLES, FAMILIES, LR, PROMPTS, gradient, loss_alone, model_of, y_alone
from taught.behaviors.prefixes import Prefixes
from taught.core.example import example_losses
from taught.core.passes import settle_passes
from taught.core.problem import Problem
from taught.estimators.adjoint import target_effects
from taught.estimators.every_prompt import prompt_effects
from taught.model.gradients import find_sites, mixes_examples
from taught.model.layout import takes_trees
from taught.model.readout import read_prompts


@pytest.mark.parametrize("family", FAMILIES)
def test_a_family_gives_what_plain_transformers_gives(family: str) -> None:
    model, behavior = model_of(family), Prefixes(("any",))
    settle_passes(model, PROMPTS, behavior, EXAMPLES)

    y = torch.stack([y_alone(model, prompt) for prompt in PROMPTS])
    read = read_prompts(model, PROMPTS, behavior, None).y
    torch.testing.assert_close(read, y.detach(), rtol=0, atol=1e-5)

    losses = torch.stack([loss_alone(model, example) for example in EXAMPLES])
    torch.testing.assert_close(example_losses(model, EXAMPLES, 1000), losses.detach(), rtol=0, atol=2e-6)

    target = gradient(model, y.sum())
    expected = torch.stack([-LR * gradient(model, loss_alone(model, z)) @ target for z in EXAMPLES]).detach()
    alone = mixes_examples(model, find_sites(model))
    assert FAMILIES[family][2] == f"{'trees' if takes_trees(model) else 'plain'}{', alone' if alone else ''}"
    problem = Problem(model, PROMPTS, behavior, LR, batch_tokens=1 if alone else 1000)
    effects = target_effects(problem, EXAMPLES, None, torch.ones(1, len(PROMPTS)).double())[0][:, 0]
    assert float((effects - expected).norm() / expected.norm()) < 1e-5
    every = prompt_effects(problem, EXAMPLES).sum(1)
    assert float((every - expected).norm() / expected.norm()) < 1e-5
