from __future__ import annotations

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from taught.errors import UserError
from taught.features.pooling import POSITIONS, pool, read_tokens
from tiny_models import ENCODERS, WIDTH, tiny_features

OFFSETS = torch.tensor([0, 3, 4, 6])


def tokens(n: int = 6, width: int = WIDTH, seed: int = 0) -> torch.Tensor:
    gen = torch.Generator().manual_seed(seed)
    return torch.randn(n, width, generator=gen, dtype=torch.float64)


def test_positions_name_their_tokens() -> None:
    encoded = SimpleNamespace(input_ids=list(range(9)), end_of_turn=6, user_span=(2, 6))
    assert read_tokens(encoded, "last_user") == [6]
    assert read_tokens(encoded, "last_prompt") == [8]
    assert read_tokens(encoded, "mean_user") == read_tokens(encoded, "max_user") == [2, 3, 4, 5]
    with pytest.raises(UserError, match=r"value: middle\n .*last_user"):
        read_tokens(encoded, "middle")


def test_pooling_is_the_mean_or_the_maximum_of_each_prompt_s_own_tokens() -> None:
    acts = tokens() - 3  # all negative: a padding of zeros would win the maximum
    pieces = [acts[0:3], acts[3:4], acts[4:6]]
    mean = torch.stack([p.mean(0) for p in pieces])
    torch.testing.assert_close(pool(acts, OFFSETS, "mean_user"), mean, rtol=1e-14, atol=0)
    best = torch.stack([p.max(0).values for p in pieces])
    assert torch.equal(pool(acts, OFFSETS, "max_user"), best)
    assert pool(acts, OFFSETS, "last_user") is acts


@pytest.mark.parametrize("kind", ENCODERS)
@pytest.mark.parametrize("position", POSITIONS)
def test_response_is_the_central_difference_of_the_features(kind: str, position: str) -> None:
    offsets = torch.arange(7) if position.startswith("last") else OFFSETS
    features, h, dh = tiny_features(kind, position), tokens(), tokens(seed=1)
    eps = 1e-7
    expected = (features(h + eps * dh, offsets) - features(h - eps * dh, offsets)) / (2 * eps)
    got = features.response(h, dh, offsets)
    assert got.abs().max() > 0.1
    torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("kind", ENCODERS)
def test_a_feature_that_is_off_does_not_respond(kind: str) -> None:
    # Without the gate dX would be dh W_enc everywhere.
    features, h, dh = tiny_features(kind), tokens(), tokens(seed=1)
    X, dX = features(h, torch.arange(7)), features.response(h, dh, torch.arange(7))
    assert 0 < int((X == 0).sum()) < X.numel()
    assert not dX[X == 0].any()
    ungated = dh @ features.sae.W_enc[:, features.ids]
    if kind != "topk":  # whose pre-activations are rescaled
        torch.testing.assert_close(dX[X != 0], ungated[X != 0], rtol=1e-12, atol=1e-12)
    assert ungated[X == 0].abs().min() > 1e-4


def test_the_response_holds_the_baseline_s_gates_for_a_large_change() -> None:
    features, h, dh = tiny_features(), tokens(), 100 * tokens(seed=1)
    unit = features.response(h, dh / 100, torch.arange(7))
    torch.testing.assert_close(features.response(h, dh, torch.arange(7)), 100 * unit)


def test_the_proxy_and_the_true_encoder_are_different_functions() -> None:
    # Same weights, other gates, hence other X and other dX.
    h, dh, offsets = tokens(), tokens(seed=1), torch.arange(7)
    for kind in ("standard", "jumprelu", "topk"):
        true, proxy = tiny_features(kind), tiny_features("relu")
        assert not torch.allclose(true(h, offsets), proxy(h, offsets))
        assert not torch.allclose(true.response(h, dh, offsets), proxy.response(h, dh, offsets))


@pytest.mark.parametrize("position", ["last_user", "mean_user"])
def test_read_outs_kept_on_the_cpu_meet_an_sae_on_another_device(position: str) -> None:
    # "meta" stands in for an accelerator: it too refuses operands of two devices.
    features = tiny_features("standard", position)
    away = replace(features, sae=features.sae.to("meta"))
    offsets = torch.arange(7) if position == "last_user" else OFFSETS
    assert away(tokens(), offsets).device.type == "meta"
    assert away.response(tokens(), tokens(seed=1), offsets).device.type == "meta"


def test_columns_follow_the_ids() -> None:
    features, h = tiny_features(), tokens()
    every = features.sae.encode(h)
    assert torch.equal(features(h, torch.arange(7)), every[:, features.ids])
