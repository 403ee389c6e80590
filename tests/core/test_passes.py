"""Texts of a run in trees and batches against each alone, and what follows where they differ."""

from __future__ import annotations

import pytest
import torch

from taught.core.example import ExampleBatch, example_losses, sft
from taught.core.passes import settle_passes
from taught.errors import UserError
from taught.model.layout import takes_trees
from taught.model.readout import read_prompts
from tiny_models import plain_loss, plain_y, tiny_behavior, tiny_examples, tiny_model, tiny_prompts

EXACT = {"rtol": 1e-12, "atol": 1e-12}


class Notes:
    def __init__(self) -> None:
        self.said: list[str] = []

    def step(self, name: str, total: int | None = None) -> None: ...

    def note(self, text: str) -> None:
        self.said.append(text)

    def advance(self, n: int = 1) -> None: ...


class IgnoresTheTree(torch.nn.Module):
    """A model that attends to all earlier tokens of the row, or counts all of them, whatever it is told."""

    def __init__(self, model, drop: str = "") -> None:
        super().__init__()
        self.model, self.config, self.drop = model, model.config, drop

    def forward(self, **inputs):
        if inputs.get("attention_mask") is not None and inputs["attention_mask"].ndim == 4:
            inputs = self.in_a_tree(inputs)
        return self.model(**inputs)

    def in_a_tree(self, inputs):
        return inputs | {self.drop: None}


class Window(IgnoresTheTree):
    """A model that sees its last tokens only where it is given a mask: its configuration says nothing of it."""

    def __init__(self, model, width: int) -> None:
        super().__init__(model)
        self.width = width

    def in_a_tree(self, inputs):
        at = inputs["position_ids"]
        far = (at[:, :, None] - at[:, None, :] >= self.width)[:, None]
        return inputs | {"attention_mask": inputs["attention_mask"].masked_fill(far, torch.finfo(torch.float64).min)}


class Raises(IgnoresTheTree):
    def in_a_tree(self, inputs):
        raise ValueError("no masks of four dimensions")


def assert_plain(model) -> None:
    """The model is read in plain passes, and rightly."""
    assert not takes_trees(model)
    prompts, examples = tiny_prompts(), tiny_examples()
    y = torch.stack([plain_y(model.model, prompt.ids).detach() for prompt in prompts])
    torch.testing.assert_close(read_prompts(model, prompts, tiny_behavior(), None).y, y, **EXACT)
    losses = torch.stack([plain_loss(model.model, example).detach() for example in examples])
    torch.testing.assert_close(example_losses(model, examples, 100), losses.double(), **EXACT)


def test_a_model_that_holds_in_trees_stays_in_trees() -> None:
    model, notes = tiny_model("tied"), Notes()
    assert settle_passes(model, tiny_prompts(), tiny_behavior(), tiny_examples(), notes) < 1e-12
    assert takes_trees(model) and not notes.said


@pytest.mark.parametrize("case", ["attention_mask", "position_ids", "raises"])
def test_a_model_that_computes_something_else_in_a_tree_is_run_in_plain_passes(case: str) -> None:
    model, notes = tiny_model("tied"), Notes()
    wrong = Raises(model) if case == "raises" else IgnoresTheTree(model, case)
    assert settle_passes(wrong, tiny_prompts(), tiny_behavior(), progress=notes) < 1e-12
    assert "not run on token trees" in notes.said[0]
    # 6 prompts of 35 tokens in all. Behind each only two tokens are read, in one sequence.
    assert f"{35 + 6 * 2} tokens for 35" in notes.said[0]
    assert_plain(wrong)


@pytest.mark.parametrize("longest", ["prompt", "pair"])
def test_the_longest_text_shows_what_the_first_ones_do_not(longest: str) -> None:
    prompts, pairs = tiny_prompts()[::-1], tiny_examples()
    if longest == "prompt":  # 8 tokens and a suffix of 3; the first two are q5 and q4
        pairs, width = [], 6
    else:  # the longest prompt's passes have 10 tokens
        pairs, width = [sft("brief", (0, 4, 5), 1), sft("long", (*range(4, 20), 3), 9)], 12
    model = Window(tiny_model("tied"), width)
    short = [p for p in prompts if len(p.ids) < 5]
    assert settle_passes(model, short, tiny_behavior()) < 1e-12 and takes_trees(model)
    assert settle_passes(model, prompts, tiny_behavior(), pairs) < 1e-12
    assert_plain(model)


def test_a_loss_that_is_not_a_number_in_a_batch_is_refused(monkeypatch) -> None:
    model = tiny_model("tied")
    monkeypatch.setattr(ExampleBatch, "losses", lambda self, _: torch.full((len(self.index),), torch.nan))
    with pytest.raises(UserError, match="something else for a text in a batch"):
        settle_passes(model, tiny_prompts(), tiny_behavior(), tiny_examples())


def test_an_example_without_a_finite_loss_is_left_to_those_that_name_it() -> None:
    model = tiny_model("untied")
    with torch.no_grad():
        model.model.embed_tokens.weight[14] = torch.nan  # only prompt q5 and example z2, the shortest, have this token
    pairs = [*tiny_examples(), sft("no response", (4,), 1)]
    assert settle_passes(model, tiny_prompts()[:5], tiny_behavior(), pairs) < 1e-12
    with pytest.raises(UserError, match="z2"):
        example_losses(model, tiny_examples(), 100)


class Capacity(torch.nn.Module):
    """Experts that take half of the tokens of a batch and drop the others."""

    def __init__(self, inner: torch.nn.Module) -> None:
        super().__init__()
        self.inner = inner

    def forward(self, x):
        kept = torch.zeros(x.shape[:2], dtype=x.dtype).flatten()
        kept[: max(7, kept.numel() // 2)] = 1
        return self.inner(x) * kept.view(*x.shape[:2], 1)


def test_a_model_whose_texts_depend_on_their_batch_is_refused() -> None:
    model = tiny_model("tied")
    model.model.layers[1].mlp = Capacity(model.model.layers[1].mlp)
    with pytest.raises(UserError, match="something else for a text in a batch") as error:
        settle_passes(model, tiny_prompts(), tiny_behavior(), tiny_examples())
    assert "q0" in str(error.value) and "z3" in str(error.value)
