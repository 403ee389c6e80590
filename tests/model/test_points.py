"""Points that are read, against plain hooks of torch on plain transformers, one text at a time."""

from __future__ import annotations

from contextlib import ExitStack, contextmanager
from functools import partial

import pytest
import torch
from torch import Tensor, nn

from families import PROMPTS, model_of
from taught.behaviors.prefixes import Prefixes
from taught.core.point import ATTN_OUT, MLP_OUT, Point
from taught.errors import UserError
from taught.model.forward import edited_output, find_blocks, get_point
from taught.model.readout import ReadPrompt, pack_apart, read_packed, read_prompts, read_prompts_plain, read_vectors
from tiny_models import same, snapshot

BEHAVIOR = Prefixes(("any",))
# What attention and the MLP add to the residual stream, by the modules' names: as transformers' code of each family has
# it. One after the other, side by side (GPT-NeoX, Phi, Falcon: it adds in place), with a norm behind (Gemma-2, OLMo-2).
TERMS = {
    "llama": ("self_attn", "mlp"),
    "gpt2": ("attn", "mlp"),
    "gpt-neo": ("attn", "mlp"),
    "gpt-neox": ("attention", "mlp"),
    "phi": ("self_attn", "mlp"),
    "falcon": ("self_attention", "mlp"),
    "granite-moe": ("self_attn", "block_sparse_moe"),
    "gemma2": ("post_attention_layernorm", "post_feedforward_layernorm"),
    "olmo2": ("post_attention_layernorm", "post_feedforward_layernorm"),
}


@contextmanager
def watched(block: nn.Module, *names: str):
    """Outputs of modules of a block ("": its own, "<": its input) as they are when the modules return."""
    seen: dict[str, Tensor] = {}

    def keep(name):
        def hook(module, args, output):
            seen[name] = (output[0] if isinstance(output, tuple) else output).detach().clone()

        return hook

    with ExitStack() as handles:
        for name in names:
            handles.callback(block.get_submodule(name).register_forward_hook(keep(name)).remove)
        before = block.register_forward_pre_hook(lambda module, args: seen.update({"<": args[0].detach().clone()}))
        handles.callback(before.remove)
        yield seen


def alone(model: nn.Module, prompt: ReadPrompt, block: int, *names: str) -> dict[str, Tensor]:
    with torch.no_grad(), watched(find_blocks(model)[block], *names) as seen:
        model(input_ids=torch.tensor([prompt.ids]), use_cache=False)
    return {name: h[0] for name, h in seen.items()}


@pytest.mark.parametrize("family", TERMS)
def test_attention_and_mlp_are_read_where_they_are_added_to_the_residual_stream(family: str) -> None:
    model, block = model_of(family), 1
    plain = read_prompts(model, PROMPTS, BEHAVIOR, Point(block))
    for part, name in zip((ATTN_OUT, MLP_OUT), TERMS[family], strict=True):
        for read in (read_prompts, partial(read_prompts_plain, batch_size=1)):
            found = read(model, PROMPTS, BEHAVIOR, Point(block, part))
            torch.testing.assert_close(found.y, plain.y, rtol=0, atol=1e-5)
            for number, prompt in enumerate(PROMPTS):
                seen = alone(model, prompt, block, "", *TERMS[family])
                expected, own = seen[name][list(prompt.read)], slice(*found.offsets[number : number + 2])
                torch.testing.assert_close(found.h[own], expected, rtol=1e-5, atol=1e-6)
                torch.testing.assert_close(seen[""], sum(seen[n] for n in ("<", *TERMS[family])))
                assert (seen[""][list(prompt.read)] - expected).abs().max() > 0.01


def test_the_output_of_a_module_is_before_a_norm_behind_it() -> None:
    model = model_of("gemma2")
    for part, added in (("mlp", MLP_OUT), ("self_attn", ATTN_OUT), ("self_attn.o_proj", ATTN_OUT)):
        found, after = (read_prompts(model, PROMPTS, BEHAVIOR, Point(0, name)).h for name in (part, added))
        expected = torch.cat([alone(model, prompt, 0, part)[part][list(prompt.read)] for prompt in PROMPTS])
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)
        assert (found - after).abs().max() > 0.1


def test_several_points_are_read_in_one_pass_up_to_the_last_block() -> None:
    model = model_of("gemma2")
    points = [Point(1), Point(0, MLP_OUT), Point(1, "mlp"), Point(0)]
    for point in points:
        get_point(model, point)  # where it is, is found out once
    calls: list[int] = []
    handles = [block.register_forward_hook(lambda *_: calls.append(1)) for block in find_blocks(model)]
    found = read_vectors(model, PROMPTS, points, lambda h, _: h)
    for handle in handles:
        handle.remove()
    assert len(calls) == 2
    for row, point in zip(found, points, strict=True):
        name = {MLP_OUT: "post_feedforward_layernorm", "mlp": "mlp"}.get(point.part, "")
        expected = torch.cat([alone(model, p, point.block, name)[name][list(p.read)] for p in PROMPTS])
        torch.testing.assert_close(row, expected, rtol=1e-5, atol=1e-6)


def granite() -> nn.Module:
    model = model_of("granite", fresh=True)
    for block in find_blocks(model):
        block.residual_multiplier = 0.22
    return model


@pytest.mark.parametrize("family", ["bloom", "mpt", "opt", "mamba", "granite"])
def test_where_a_block_is_no_sum_of_its_input_attention_and_mlp_nothing_is_guessed(family: str) -> None:
    model = granite() if family == "granite" else model_of(family)
    for part in (ATTN_OUT, MLP_OUT):
        with pytest.raises(UserError, match="is not found(?s:.*)its input and one term") as caught:
            get_point(model, Point(1, part))
        assert "layers.0.mlp" in caught.value.fix
    if family == "granite":  # what is advised
        found = read_prompts(model, PROMPTS, BEHAVIOR, Point(0, "mlp")).h
        expected = torch.cat([alone(model, prompt, 0, "mlp")["mlp"][list(prompt.read)] for prompt in PROMPTS])
        torch.testing.assert_close(found, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize(
    ("family", "part", "said"),
    [
        ("llama", "feed_forward", "no such part(?s:.*)resid_post, attn_out, mlp_out(?s:.*)self_attn, mlp"),
        ("llama", "mlp.act_fn", "is not read(?s:.*)4, 24"),  # of another width
        ("llama", "mlp.up_proj.weight", "no such part"),
        ("opt", "fc2", "is not read"),  # tokens of all texts in one row
        ("phi", "resid_dropout", "is not read"),  # called twice
        ("qwen3-moe", "mlp.experts", "is not read"),
        ("llama4", "feed_forward", "is not read"),
    ],
)
def test_a_part_that_is_no_vector_of_every_token_is_refused(family: str, part: str, said: str) -> None:
    with pytest.raises(UserError, match=said) as caught:
        get_point(model_of(family), Point(1, part))
    assert part in str(caught.value) and caught.value.exit_code == 2


def test_a_block_that_is_not_there_is_refused_whatever_the_part() -> None:
    with pytest.raises(UserError, match="no such block"):
        get_point(model_of("llama"), Point(2, MLP_OUT))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_the_same_modules_are_found_in_every_precision_and_in_training(dtype: torch.dtype) -> None:
    model = model_of("gemma2", fresh=True).to(dtype).train()
    before = snapshot(model)
    block = find_blocks(model)[1]
    assert get_point(model, Point(1, ATTN_OUT)) is block.post_attention_layernorm
    assert get_point(model, Point(1, MLP_OUT)) is block.post_feedforward_layernorm
    assert same(before, snapshot(model))


@pytest.mark.parametrize("family", ["gemma2", "gpt-neo", "falcon"])
@pytest.mark.parametrize("part", [ATTN_OUT, MLP_OUT, "mlp"])
def test_an_edit_at_a_point_is_that_of_a_plain_hook(family: str, part: str) -> None:
    model = model_of(family)
    name = dict(zip((ATTN_OUT, MLP_OUT), TERMS[family], strict=True)).get(part, part)
    found = torch.zeros(len(PROMPTS), dtype=torch.float64)
    with torch.no_grad():
        for packed in pack_apart(PROMPTS, BEHAVIOR, tokens=1):  # a prompt at a time
            with edited_output(get_point(model, Point(0, part)), packed.read, lambda h: 3 * h + 1):
                h, y = read_packed(model, packed, BEHAVIOR, Point(0, part))
            (row,) = packed.index
            found[row] = y[0]
            own = alone(model, PROMPTS[row], 0, name)[name][list(PROMPTS[row].read)]
            torch.testing.assert_close(h, 3 * own + 1, rtol=1e-5, atol=1e-5)  # read behind the edit
    for row, prompt in enumerate(PROMPTS):

        def edit(module, args, output, places=prompt.read):
            h = (output[0] if isinstance(output, tuple) else output).clone()
            h[:, list(places)] = 3 * h[:, list(places)] + 1
            return (h, *output[1:]) if isinstance(output, tuple) else h

        handle = find_blocks(model)[0].get_submodule(name).register_forward_hook(edit)
        expected = read_prompts_plain(model, [prompt], BEHAVIOR, None).y
        handle.remove()
        torch.testing.assert_close(found[row : row + 1], expected, rtol=0, atol=1e-5)
