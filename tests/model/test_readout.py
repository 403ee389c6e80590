from __future__ import annotations

import pytest
import torch

import taught.model.readout as readout
from taught.core.point import Point
from taught.errors import UserError
from taught.features.pooling import POSITIONS
from taught.model.forward import find_blocks, forward, get_block, log_probabilities
from taught.model.readout import ReadPrompt, pack, read_prompts, read_prompts_plain
from taught.model.tokens import build_tree, stack
from tiny_models import (
    MODELS,
    POINT,
    PREFIXES,
    PROMPT_IDS,
    plain_read,
    plain_y,
    tiny_behavior,
    tiny_model,
    tiny_prompts,
)

EXACT = {"rtol": 1e-12, "atol": 1e-12}


def by_id(reads) -> dict[str, tuple[torch.Tensor, float]]:
    spans = zip(reads.offsets[:-1], reads.offsets[1:], strict=True)
    return {i: (reads.h[a:b], y) for i, (a, b), y in zip(reads.prompt_ids, spans, reads.y, strict=True)}


def assert_same(a, b) -> None:
    a, b = by_id(a), by_id(b)
    assert a.keys() == b.keys()
    for i in a:
        torch.testing.assert_close(a[i][0], b[i][0], **EXACT)
        torch.testing.assert_close(a[i][1], b[i][1], **EXACT)


@pytest.mark.parametrize("name", MODELS)
def test_trees_read_what_single_unpadded_passes_read(name: str) -> None:
    model, prompts = tiny_model(name), tiny_prompts("mean_user")
    reads = by_id(read_prompts(model, prompts, tiny_behavior(), POINT))
    for prompt in prompts:
        h, y = reads[prompt.id]
        expected = plain_read(model, prompt.ids)[0][list(prompt.read)]
        torch.testing.assert_close(h, expected.detach(), **EXACT)
        torch.testing.assert_close(y, plain_y(model, prompt.ids).detach(), **EXACT)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("position", POSITIONS)
def test_trees_and_padded_passes_agree(name: str, position: str) -> None:
    model, prompts = tiny_model(name), tiny_prompts(position)
    trees = read_prompts(model, prompts, tiny_behavior(), POINT)
    for batch_size in (1, 3, 16):  # 1: no padding at all
        assert_same(trees, read_prompts_plain(model, prompts, tiny_behavior(), POINT, batch_size=batch_size))


def test_the_plain_route_scores_prefixes_at_each_row_s_own_tokens() -> None:
    # The shortest prompt beside the longest one, its prefix must not be read in the padding.
    model = tiny_model("tied")
    short, long = tiny_prompts()[5], tiny_prompts()[1]
    assert len(long.ids) - len(short.ids) > max(map(len, PREFIXES))
    both = read_prompts_plain(model, [short, long], tiny_behavior(), POINT)
    torch.testing.assert_close(both.y[0], plain_y(model, short.ids).detach(), **EXACT)


@pytest.mark.parametrize("tokens", [1, 12, 30, 10_000])
def test_order_and_pack_size_do_not_matter(tokens: int, monkeypatch) -> None:
    model, prompts = tiny_model("tied"), tiny_prompts("max_user")
    reference = read_prompts(model, prompts, tiny_behavior(), POINT)
    packs = list(pack(prompts, tiny_behavior(), tokens=tokens))
    assert sorted(i for p in packs for i in p.index) == list(range(len(prompts)))
    assert (len(packs) == 1) == (tokens == 10_000)
    original = readout.pack
    monkeypatch.setattr(readout, "pack", lambda p, b: original(p, b, tokens=tokens))
    assert_same(reference, read_prompts(model, prompts[::-1], tiny_behavior(), POINT))


def test_a_prompt_reads_the_same_alone_and_beside_others() -> None:
    model, prompts = tiny_model("untied"), tiny_prompts()
    together = by_id(read_prompts(model, prompts, tiny_behavior(), POINT))
    for prompt in prompts:
        alone = read_prompts(model, [prompt], tiny_behavior(), POINT)
        torch.testing.assert_close(alone.h, together[prompt.id][0], **EXACT)
        torch.testing.assert_close(alone.y[0], together[prompt.id][1], **EXACT)


def test_padding_on_the_right_gives_what_padding_on_the_left_gives() -> None:
    model, ids = tiny_model("tied"), PROMPT_IDS[5]
    tree = build_tree([ids])[0]
    left = stack([tree, build_tree([PROMPT_IDS[1]])[0]])
    h_left, _ = forward(model, left, point=POINT)
    _, mask = readout._pad_right([ids, PROMPT_IDS[1]])
    right, _ = readout._pad_right([ids, PROMPT_IDS[1]])
    h_right = readout._plain_hidden(model, right, mask, POINT)
    torch.testing.assert_close(h_left[0, -len(ids) :], h_right[0, : len(ids)], **EXACT)


@pytest.mark.parametrize("block", [0, 1])
def test_h_is_the_output_of_the_block_and_not_its_input(block: int) -> None:
    # Hidden_states[l] is what goes into block l.
    model, ids = tiny_model("tied"), PROMPT_IDS[0]
    h, _ = forward(model, stack([build_tree([ids])[0]]), point=Point(block))
    states = model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states
    torch.testing.assert_close(h, states[block + 1], **EXACT)
    assert (h - states[block]).abs().max() > 0.1


def test_h_of_the_last_block_is_taken_before_the_final_norm() -> None:
    model, ids = tiny_model("tied"), PROMPT_IDS[0]
    h, _ = forward(model, stack([build_tree([ids])[0]]), point=Point(2))
    normed = model(input_ids=torch.tensor([ids]), output_hidden_states=True).hidden_states[-1]
    torch.testing.assert_close(model.model.norm(h), normed, **EXACT)
    with pytest.raises(UserError, match="cannot read the last block"):
        read_prompts_plain(model, tiny_prompts(), tiny_behavior(), Point(2))


def test_stopping_at_the_block_leaves_h_as_it_is_and_runs_nothing_after_it() -> None:
    model, rows = tiny_model("tied"), stack([build_tree([PROMPT_IDS[0]])[0]])
    ran = []
    get_block(model, 2).register_forward_hook(lambda *_: ran.append(True))
    full, logits = forward(model, rows, point=POINT)
    assert logits is not None and ran == [True]
    stopped, none = forward(model, rows, point=POINT, stop_at_point=True)
    assert none is None and ran == [True]
    assert torch.equal(full, stopped)


def test_blocks_are_found_and_a_missing_one_is_refused() -> None:
    model = tiny_model("gpt2")
    assert find_blocks(model) is model.transformer.h
    for block in (-1, 3):
        with pytest.raises(UserError, match="blocks are counted from 0 to 2"):
            get_block(model, block)
    model.transformer.h = torch.nn.ModuleList(list(model.transformer.h)[:2])
    with pytest.raises(UserError, match="a ModuleList of 3 blocks"):
        get_block(model, 0)


@pytest.mark.parametrize("read", [read_prompts, read_prompts_plain])
def test_read_outs_that_are_not_finite_name_their_prompts(read) -> None:
    model = tiny_model("untied")
    with torch.no_grad():
        model.model.embed_tokens.weight[14] = torch.nan  # only prompt q5 has this token
    with pytest.raises(UserError, match=r"read-outs are not finite\n  value: \['q5'\]"):
        read(model, tiny_prompts(), tiny_behavior(), POINT)


def test_ids_and_offsets_follow_the_caller_s_order() -> None:
    prompts = [ReadPrompt("b", PROMPT_IDS[3], (1, 2), PREFIXES), ReadPrompt("a", PROMPT_IDS[0], (4,), PREFIXES)]
    reads = read_prompts(tiny_model("tied"), prompts, tiny_behavior(), POINT)
    assert reads.prompt_ids == ("b", "a")
    assert reads.offsets.tolist() == [0, 2, 3]
    assert reads.y.dtype == torch.float64


def test_a_large_vocabulary_costs_no_digits() -> None:
    logits = 3 * torch.randn(8, 262_144, generator=torch.Generator().manual_seed(0))
    at, tokens = (torch.arange(8),), torch.arange(8)
    expected = logits.double().log_softmax(-1)[:, :8].diagonal()
    found = log_probabilities(logits, at, tokens)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found.double(), expected, rtol=0, atol=4e-6)
