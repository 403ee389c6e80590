"""Texts of a run in trees and batches against each alone, and what follows where they differ."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM, RobertaConfig, RobertaForCausalLM

from taught.core.example import ExampleBatch, example_losses, sft
from taught.core.passes import settle_passes
from taught.errors import UserError
from taught.model.layout import takes_trees
from taught.model.readout import ReadPrompt, read_prompts
from tiny_models import VOCAB, plain_loss, plain_y, tiny_behavior, tiny_examples, tiny_model, tiny_prompts

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


class Place(IgnoresTheTree):
    """A model that scales its tokens by their place in a row beyond some, or in a whole batch."""

    def __init__(self, model, beyond: int, batch: bool) -> None:
        super().__init__(model)
        self.beyond, self.batch = beyond, batch

    def forward(self, **inputs):
        b, t = inputs["input_ids"].shape
        place = torch.arange(b * t).view(b, t) if self.batch else torch.arange(t)
        scale = torch.where(place >= self.beyond, 1.5, 1.0).double()[..., None]
        vectors = self.model.get_input_embeddings()(inputs.pop("input_ids")) * scale
        return self.model(inputs_embeds=vectors, **inputs)


def test_a_full_row_shows_what_a_few_prompts_do_not() -> None:
    # As Llama-4 scales attention by a token's place in what it is given: no text is so long, but a row of them is.
    model = Place(tiny_model("tied"), 40, batch=False)
    prompts = [ReadPrompt(f"p{i:02}", (0, 4 + i, 5, 6, 3, 2), (5,), ((7, 8), (9,))) for i in range(18)]
    assert settle_passes(model, [*prompts[:2], prompts[-1]], tiny_behavior()) < 1e-12 and takes_trees(model)
    settle_passes(model, prompts[::-1], tiny_behavior())
    assert not takes_trees(model)
    y = torch.stack([plain_y(model.model, p.ids, p.suffixes).detach() for p in prompts])
    torch.testing.assert_close(read_prompts(model, prompts, tiny_behavior(), None).y, y, **EXACT)


def test_a_full_batch_of_examples_shows_what_two_do_not() -> None:
    examples = [sft(f"z{i}", (0, 4 + i, 5, 6, 7, 8), 2) for i in range(12)]
    prompts = tiny_prompts()[-1:]
    model = Place(tiny_model("tied"), 30, batch=True)  # as experts of which each takes so many tokens
    assert settle_passes(model, prompts, tiny_behavior(), examples[:3]) < 1e-12
    with pytest.raises(UserError, match="something else for a text in a batch"):
        settle_passes(model, prompts, tiny_behavior(), examples)


def test_positions_from_the_second_on_are_the_model_s_own() -> None:
    # As RoBERTa's, which begin behind the padding token's and which explicit positions would replace.
    torch.manual_seed(0)
    config = RobertaConfig(
        vocab_size=VOCAB,
        hidden_size=16,
        num_hidden_layers=2,
        num_attention_heads=2,
        intermediate_size=24,
        max_position_embeddings=40,
        pad_token_id=3,
        is_decoder=True,
    )
    model = RobertaForCausalLM(config).double().eval()
    assert settle_passes(model, tiny_prompts(), tiny_behavior(), tiny_examples()) < 1e-12
    y = torch.stack([plain_y(model, prompt.ids).detach() for prompt in tiny_prompts()])
    torch.testing.assert_close(read_prompts(model, tiny_prompts(), tiny_behavior(), None).y, y, **EXACT)


def turned(kind: str) -> torch.nn.Module:
    """A model that turns positions otherwise in texts of more than 8 tokens."""
    model = tiny_model("tied")
    rope = {"rope_theta": 100.0, "rope_type": kind, "factor": 4.0}
    if kind == "longrope":
        rope |= {"original_max_position_embeddings": 8, "short_factor": [1.0, 1.0], "long_factor": [3.0, 3.0]}
    config = LlamaConfig(
        **{k: v for k, v in model.config.to_dict().items() if k not in ("rope_parameters", "max_position_embeddings")},
        rope_parameters=rope,
        max_position_embeddings=8 if kind == "dynamic" else 64,
        attn_implementation="sdpa",
    )
    return LlamaForCausalLM(config).double().eval()


@pytest.mark.parametrize("kind", ["longrope", "dynamic"])
def test_texts_on_both_sides_of_a_switch_of_positions_are_refused_and_what_is_advised_works(kind: str) -> None:
    model, short = turned(kind), [p for p in tiny_prompts() if len(p.ids) < 6]
    with pytest.raises(UserError, match="positions otherwise in longer texts") as caught:
        settle_passes(model, tiny_prompts(), tiny_behavior())
    assert "q0, q1, q2, q3" in caught.value.value
    with pytest.raises(UserError, match="positions otherwise in longer texts") as caught:
        settle_passes(model, short, tiny_behavior(), tiny_examples())
    assert "examples.max_tokens=8" in caught.value.fix
    assert settle_passes(model, short, tiny_behavior(), [sft("z", z.ids[:8], z.start) for z in tiny_examples()]) < 1e-12


def test_texts_that_are_all_long_are_computed_as_long_ones() -> None:
    model = turned("longrope")
    long = [replace(p, ids=(*range(4, 12), *p.ids)) for p in tiny_prompts()]
    assert settle_passes(model, long, tiny_behavior()) < 1e-12
    y = torch.stack([plain_y(model, prompt.ids).detach() for prompt in long])
    torch.testing.assert_close(read_prompts(model, long, tiny_behavior(), None).y, y, **EXACT)
