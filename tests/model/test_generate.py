"""Greedy answers against plain passes."""

from __future__ import annotations

import pytest
import torch

from families import PROMPTS, log_probabilities, model_of
from taught.model.generate import greedy
from tiny_models import MODELS, PROMPT_IDS, plain_read, stretched_llama, tiny_model


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("budget", [1, 30, 4096])
def test_own_responses_are_the_most_probable_tokens_one_by_one(name: str, budget: int):
    model, ends = tiny_model(name), {3, 7}
    found = greedy(model, PROMPT_IDS, ends, 6, batch_tokens=budget)
    for prompt, answer in zip(PROMPT_IDS, found, strict=True):
        expected: list[int] = []
        while len(expected) < 6 and not set(expected) & ends:
            with torch.no_grad():
                expected.append(int(plain_read(model, (*prompt, *expected))[1][-1].argmax()))
        assert answer == tuple(expected)


@torch.no_grad()
@pytest.mark.parametrize("family", ["mistral", "gemma3", "gpt-neo", "bloom", "mamba", "jamba", "mixtral"])
def test_prompts_of_different_lengths_are_answered_as_alone(family: str) -> None:
    model, prompts = model_of(family), [prompt.ids for prompt in PROMPTS]
    for prompt, answer in zip(prompts, greedy(model, prompts, {3}, 5), strict=True):
        for place, token in enumerate(answer):
            assert token == int(log_probabilities(model, (*prompt, *answer[:place]))[-1].argmax())


@torch.no_grad()
def test_answers_that_reach_a_stretch_of_positions_are_those_of_each_prompt_alone() -> None:
    model, prompts = stretched_llama(limit=8), [(0, 5, 6, 7, 2), tuple(range(4, 18))]
    for prompt, answer in zip(prompts, greedy(model, prompts, {3}, 6), strict=True):
        for place, token in enumerate(answer):
            assert token == int(plain_read(model, (*prompt, *answer[:place]))[1][-1].argmax())
