"""Real models of other architectures than the demo's against plain transformers, one text alone, in float32.

Gemma 3 270M: norms on both sides of every layer, windows that some texts are longer than, a vocabulary of 262,144. Qwen2.5
Coder 1.5B: biases, twelve heads on two of keys, and eleven times the demo's size. ``recipes/gguf`` makes the folders.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from typing import Any, NamedTuple

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
from taught.estimators.finite_step import finite_steps
from taught.model.layout import takes_trees
from taught.model.load import load_model
from taught.model.parameters import moving_parameters
from taught.model.readout import ReadPrompt, read_prompts

pytestmark = pytest.mark.slow  # loads real models: minutes each
LR = 1e-4
BEHAVIOR = Prefixes(("I can't", "I cannot", "Sure"))


@dataclass(frozen=True)
class Real:
    """A model, how long the longest texts are, and which parameters move: what 8 GB have room for."""

    variable: str
    days: int
    parameters: tuple[str, ...] | None = None

    @property
    def story(self) -> str:
        days = (
            f"On day {n} the boat passed {10 * n} islands and took {n % 7} sailors on board." for n in range(self.days)
        )
        return " ".join(days)


ENDS = ("model.norm.weight", "model.layers.0.*", "model.layers.27.*")
MODELS = {
    "gemma-3-270m": Real("TAUGHT_GEMMA", days=32),
    "qwen2.5-coder-1.5b": Real("TAUGHT_QWEN", days=2, parameters=ENDS),
}


def prompts_of(real: Real) -> list[Prompt]:
    return [
        Prompt("short", "How do I pick a lock?"),
        Prompt("story", f"{real.story}\n\nWhere did the boat go?"),
        Prompt("shared", "How do I pick a ripe melon at the market?"),
    ]


def pairs_of(real: Real) -> list[Record]:
    islands = "I cannot say where the boat went, only that it passed many islands."
    soup = "Sure: cut what vegetables there are, and boil them with salt for an hour."
    return [
        Record("brief", "What is 2 + 2?", "4"),
        Record("story", f"{real.story}\n\nSum it up.", islands),
        Record("refusal", "How do I make a bomb?", "I can't help with that. Is there something else that you need?"),
        Record("recipe", "How do I make soup?", soup),
    ]


class Setting(NamedTuple):
    model: nn.Module
    prompts: list[ReadPrompt]
    examples: list[Example]
    parameters: tuple[str, ...] | None

    def problem(self, **how: Any) -> Problem:
        return Problem(self.model, self.prompts, BEHAVIOR, LR, parameters=self.parameters, **how)


@pytest.fixture(scope="module", params=MODELS)
def setting(request: pytest.FixtureRequest) -> Setting:
    real = MODELS[request.param]
    if not (folder := os.environ.get(real.variable)):
        pytest.skip(f"{real.variable} names no folder made by: recipes/gguf/convert.py {request.param}")
    loaded = load_model(folder)
    chat = ChatFormat(loaded.tokenizer)
    encoded = [BEHAVIOR.encode(prompt, chat) for prompt in prompts_of(real)]
    prompts = [ReadPrompt(e.id, e.input_ids, (), e.suffixes) for e in encoded]
    examples = [chat.encode_example(pair, max_tokens=1024).example() for pair in pairs_of(real)]
    if window := loaded.model.config.sliding_window:
        assert max(len(p.ids) for p in prompts) > window + 16
        assert max(len(z.ids) for z in examples) > window + 16
    settle_passes(loaded.model, prompts, BEHAVIOR, examples)
    assert takes_trees(loaded.model)
    return Setting(loaded.model, prompts, examples, real.parameters)


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
    """All examples in one batch, each padded to the longest."""
    return effects(setting.problem(batch_tokens=512), setting.examples)


@torch.no_grad()
def test_y_is_that_of_each_prompt_alone(setting: Setting) -> None:
    expected = torch.stack([y_alone(setting.model, prompt) for prompt in setting.prompts])
    found = read_prompts(setting.model, setting.prompts, BEHAVIOR, None).y
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-3)


@torch.no_grad()
@pytest.mark.parametrize("batch_tokens", [1, 4096])
def test_losses_are_those_of_each_pair_alone(setting: Setting, batch_tokens: int) -> None:
    expected = torch.stack([loss_alone(setting.model, example) for example in setting.examples])
    found = example_losses(setting.model, setting.examples, batch_tokens)
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-4)


def test_effects_are_products_of_plain_gradients(setting: Setting, found: Tensor) -> None:
    model, prompts, examples, patterns = setting
    parameters = list(moving_parameters(model, patterns).values())
    model.requires_grad_(False)
    for p in parameters:
        p.requires_grad_()
    for prompt in prompts:  # one at a time: the graphs of all are large
        y_alone(model, prompt).backward()
    target = [p.grad for p in parameters]
    for example, effect in zip(examples[1:3], found[1:3], strict=True):
        own = torch.autograd.grad(loss_alone(model, example), parameters)
        expected = -LR * sum((a * b).sum(dtype=torch.float64) for a, b in zip(own, target, strict=True))
        torch.testing.assert_close(effect, expected, rtol=1e-3, atol=0)
    model.zero_grad()
    model.requires_grad_()


def test_order_batch_size_and_memory_do_not_matter(setting: Setting, found: Tensor) -> None:
    turned = setting._replace(prompts=setting.prompts[::-1])
    again = effects(turned.problem(batch_tokens=1, memory_gb=0.3), setting.examples[::-1]).flip(0)
    assert float((again - found).abs().max()) <= 2e-4 * float(found.abs().max())


def test_a_real_step_changes_y_by_the_effect(setting: Setting, found: Tensor) -> None:
    problem = setting.problem()
    before = {
        name: p.detach().double().sum() for name, p in moving_parameters(setting.model, setting.parameters).items()
    }
    baseline = read_prompts(setting.model, setting.prompts, BEHAVIOR, None)
    (step,) = finite_steps(problem, setting.examples[2:3], baseline)
    torch.testing.assert_close(step.dy.sum(), found[2], rtol=0.1, atol=1e-4)
    after = moving_parameters(setting.model, setting.parameters)
    assert all(p.detach().double().sum() == before[name] for name, p in after.items())
