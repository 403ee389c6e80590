"""Which rows a model is given: trees with its own windows, or plain sequences; and what is too long for either."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

from families import LONG, PROMPTS, SIZE, WINDOW, model_of, y_alone
from taught.behaviors.prefixes import Prefixes
from taught.core.example import example_losses, sft
from taught.core.point import Point
from taught.errors import UserError
from taught.model import layout
from taught.model.forward import find_blocks, forward, vectors
from taught.model.layout import refuse_large_masks, stretched_from, use_plain_passes, visible
from taught.model.readout import read_prompts
from taught.model.tokens import Rows, build_tree, stack, stack_sequences
from tiny_models import plain_loss, stretched_llama, tiny_llama


@pytest.mark.parametrize("family", ["mistral", "gemma3", "llama4"])
def test_a_window_is_the_model_s_own_and_only_where_a_text_reaches_it(family: str) -> None:
    model = model_of(family)
    assert visible(model, WINDOW) is None
    sees = visible(model, 2 * WINDOW + 1)
    if family == "mistral":
        sees = {"sliding_attention": sees}
    (narrow,) = (mask for mask in sees.values() if mask is not None)
    s, t = torch.meshgrid(*2 * [torch.arange(2 * WINDOW + 1)], indexing="ij")
    near = s // WINDOW == t // WINDOW if family == "llama4" else s - t < WINDOW
    assert torch.equal(narrow, (t <= s) & near)
    assert sees.get("full_attention") is None


def test_a_model_without_windows_has_the_mask_of_the_tree_alone() -> None:
    model = tiny_llama()
    rows = stack([build_tree([(0, 5, 6, 7), (0, 5, 8)])[0]])
    assert visible(model, 1000) is None
    assert torch.equal(layout.tree_mask(model, rows), rows.additive_mask(torch.float64))


def test_long_rows_make_no_mask_of_their_own_and_read_the_same(monkeypatch: pytest.MonkeyPatch) -> None:
    model, behavior = model_of("llama"), Prefixes(("any",))
    trees = read_prompts(model, PROMPTS, behavior, Point(0))
    rows = stack_sequences([LONG])
    (expected,) = vectors(model, rows, [Point(1)])
    monkeypatch.setattr(layout, "MASK_TOKENS", 4)
    monkeypatch.setattr(Rows, "mask", property(lambda _: pytest.fail("a mask was made")))
    plain = read_prompts(model, PROMPTS, behavior, Point(0))
    torch.testing.assert_close(plain.y, trees.y, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(plain.h, trees.h, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(vectors(model, rows, [Point(1)])[0], expected, rtol=1e-5, atol=1e-5)


def test_a_mask_beyond_all_measure_is_refused_before_it_is_made() -> None:
    eager = tiny_llama(attention="eager")
    with torch.no_grad(), pytest.raises(UserError, match=r"too long for this model(.|\n)*50000 tokens: 19 GB"):
        forward(eager, stack_sequences([[5] * 50_000]))
    refuse_large_masks(tiny_llama(), 1, 50_000)  # its attention needs none
    with pytest.raises(UserError, match="200000 tokens: 37 GB"):
        refuse_large_masks(model_of("mistral"), 1, 200_000)


@pytest.mark.parametrize("keep", [0, 3, torch.tensor([2, 5])])
def test_written_out_rows_give_logits_and_h_at_the_tokens_of_the_rows(keep) -> None:
    model = tiny_llama()
    rows = stack([build_tree([(0, 5, 6, 7), (0, 5, 8), (0, 9)])[0], build_tree([(4, 3)])[0]])
    with torch.no_grad():
        h, logits = forward(model, rows, point=Point(1), keep=keep)
        use_plain_passes(model)
        h_plain, logits_plain = forward(model, rows, point=Point(1), keep=keep)
    real = torch.arange(rows.ids.shape[1]) >= rows.ids.shape[1] - rows.lengths[:, None]
    torch.testing.assert_close(h_plain[real], h[real], rtol=1e-12, atol=1e-12)
    columns = real[:, keep] if isinstance(keep, torch.Tensor) else real[:, -keep:]
    torch.testing.assert_close(logits_plain[columns], logits[columns], rtol=1e-12, atol=1e-12)


def test_texts_on_both_sides_of_a_stretch_of_positions_are_refused_in_one_pass_and_right_apart() -> None:
    model = stretched_llama(limit=8)
    short, also, long = sft("a", (0, 5, 21, 3, 2, 15), 5), sft("b", (0, 5, 7, 3), 2), sft("c", (0, *range(4, 20)), 4)
    assert stretched_from(model) == {"longrope": 8}
    assert stretched_from(tiny_llama()) == {}
    with torch.no_grad():
        for some in ([short, also], [long]):
            expected = torch.stack([plain_loss(model, z) for z in some])
            torch.testing.assert_close(example_losses(model, some, 512), expected)
    border = sft("d", (0, 5, 21, 3, 2, 15, 6, 7, 8), 5)
    for mixed in ([short, long], [border]):
        with pytest.raises(UserError, match=r"too long(.|\n)*longrope(.|\n)*examples\.max_tokens=8 "):
            example_losses(model, mixed, 512)


def test_the_blocks_are_those_of_the_text_decoder_where_a_vision_tower_is_as_deep() -> None:
    vision = CLIPVisionConfig(
        hidden_size=8, intermediate_size=8, num_hidden_layers=2, num_attention_heads=2, image_size=8, patch_size=4
    )
    config = LlavaConfig(vision_config=vision, text_config=LlamaConfig(**SIZE), image_token_index=28)
    model = LlavaForConditionalGeneration(config).double().eval()
    stacks = [m for m in model.modules() if isinstance(m, nn.ModuleList) and len(m) == 2]
    assert len(stacks) == 2 and stacks[0] is not find_blocks(model)
    assert find_blocks(model) is model.model.language_model.layers
    y = torch.stack([y_alone(model, prompt) for prompt in PROMPTS]).detach()
    torch.testing.assert_close(read_prompts(model, PROMPTS, Prefixes(("any",)), Point(0)).y, y, rtol=0, atol=1e-5)


def test_several_stacks_without_a_decoder_are_refused() -> None:
    class Two(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.config = LlamaConfig(**SIZE)
            self.a, self.b = (nn.ModuleList(nn.Linear(2, 2) for _ in range(2)) for _ in range(2))

    with pytest.raises(UserError, match="2 lists of 2 modules"):
        find_blocks(Two())
