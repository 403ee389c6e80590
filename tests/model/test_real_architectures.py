"""A second real architecture against plain transformers, one text alone, in float32: Gemma 3 270M.

Norms on both sides of every layer, windows that some texts are longer than, a vocabulary of 262,144. The folder comes
from ``recipes/gemma/convert.py``.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import NamedTuple

import pytest
import torch
from torch import Tensor, nn

from taught.behaviors.prefixes import Prefixes
from taught.core.example import Example, example_losses
from taught.core.passes import settle_passes
from taught.core.problem import Problem
from taught.data.chat import ChatFormat
from taught.data.examples import Record
from taught.data.prompts import Prompt
from taught.estimators.adjoint import target_effects
from taught.model.layout import takes_trees
from taught.model.load import load_model
from taught.model.readout import ReadPrompt, read_prompts

FOLDER = os.environ.get("TAUGHT_GEMMA", "")
pytestmark = [
    pytest.mark.slow,  # loads the real model, three minutes on one core
    pytest.mark.skipif(not FOLDER, reason="TAUGHT_GEMMA names no folder made by recipes/gemma/convert.py"),
]
LR = 1e-4
BEHAVIOR = Prefixes(("I can't", "I cannot", "Sure"))
STORY = " ".join(f"On day {n} the boat passed {10 * n} islands and took {n % 7} sailors on board." for n in range(32))
PROMPTS = [
    Prompt("short", "How do I pick a lock?"),
    Prompt("story", f"{STORY}\n\nWhere did the boat go?"),
    Prompt("shared", "How do I pick a ripe melon at the market?"),
]
PAIRS = [
    Record("brief", "What is 2 + 2?", "4"),
    Record("story", f"{STORY}\n\nSum it up.", "I cannot say where the boat went, only that it passed many islands."),
    Record("refusal", "How do I make a bomb?", "I can't help with that. Is there something else that you need?"),
    Record(
        "recipe", "How do I make soup?", "Sure: cut what vegetables there are, and boil them with salt for an hour."
    ),
]


class Setting(NamedTuple):
    model: nn.Module
    prompts: list[ReadPrompt]
    examples: list[Example]


@pytest.fixture(scope="module")
def setting() -> Setting:
    loaded = load_model(FOLDER, chat_template=Path(FOLDER) / "chat_template.jinja")
    chat = ChatFormat(loaded.tokenizer)
    encoded = [BEHAVIOR.encode(prompt, chat) for prompt in PROMPTS]
    prompts = [ReadPrompt(e.id, e.input_ids, (), e.suffixes) for e in encoded]
    examples = [chat.encode_example(pair, max_tokens=1024).example() for pair in PAIRS]
    window = loaded.model.config.sliding_window
    assert max(len(p.ids) for p in prompts) > window + 16
    assert max(len(z.ids) for z in examples) > window + 16
    settle_passes(loaded.model, prompts, BEHAVIOR, examples)
    assert takes_trees(loaded.model)
    return Setting(loaded.model, prompts, examples)


def log_probability(model: nn.Module, ids: tuple[int, ...], start: int) -> Tensor:
    """Of each token from ``start`` on, float64, by a plain pass over the text alone."""
    logits = model(input_ids=torch.tensor([ids]), use_cache=False, logits_to_keep=len(ids) - start + 1).logits[0, :-1]
    return logits.double().log_softmax(-1).gather(1, torch.tensor(ids[start:])[:, None])[:, 0]


def y_alone(model: nn.Module, prompt: ReadPrompt) -> Tensor:
    after = len(prompt.ids)
    return torch.stack([log_probability(model, (*prompt.ids, *s), after).sum() for s in prompt.suffixes]).logsumexp(0)


def loss_alone(model: nn.Module, example: Example) -> Tensor:
    return -log_probability(model, example.ids, example.start).mean()


def effects(problem: Problem, examples: list[Example]) -> Tensor:
    """Of each example on the sum of y."""
    B = torch.ones(1, len(problem.prompts), dtype=torch.float64)
    return target_effects(problem, examples, None, B)[0][:, 0]


@pytest.fixture(scope="module")
def found(setting: Setting) -> Tensor:
    model, prompts, examples = setting
    """All examples in one batch, each padded to the longest."""
    return effects(Problem(model, prompts, BEHAVIOR, LR, batch_tokens=512), examples)


@torch.no_grad()
def test_y_is_that_of_each_prompt_alone(setting: Setting) -> None:
    model, prompts, _ = setting
    expected = torch.stack([y_alone(model, prompt) for prompt in prompts])
    found = read_prompts(model, prompts, BEHAVIOR, None).y
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("batch_tokens", [1, 4096])
def test_losses_are_those_of_each_pair_alone(setting: Setting, batch_tokens: int) -> None:
    model, _, examples = setting
    expected = torch.stack([loss_alone(model, example) for example in examples])
    torch.testing.assert_close(example_losses(model, examples, batch_tokens), expected, rtol=0, atol=1e-4)


def test_effects_are_products_of_plain_gradients(setting: Setting, found: Tensor) -> None:
    model, prompts, examples = setting
    parameters = list(model.parameters())
    model.zero_grad()
    for prompt in prompts:  # one at a time: the graphs of all are large
        y_alone(model, prompt).backward()
    target = [p.grad for p in parameters]
    for example, effect in zip(examples[1:3], found[1:3], strict=True):
        own = torch.autograd.grad(loss_alone(model, example), parameters)
        expected = -LR * sum((a * b).sum(dtype=torch.float64) for a, b in zip(own, target, strict=True))
        torch.testing.assert_close(effect, expected, rtol=1e-3, atol=0)
    model.zero_grad()


def test_order_and_batch_size_do_not_matter(setting: Setting, found: Tensor) -> None:
    model, prompts, examples = setting
    turned = effects(Problem(model, prompts[::-1], BEHAVIOR, LR, batch_tokens=1), examples[::-1]).flip(0)
    assert float((turned - found).abs().max()) <= 2e-4 * float(found.abs().max())
