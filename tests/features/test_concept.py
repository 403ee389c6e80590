"""Concepts: what they are made of, how they are read, what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file
from safetensors.torch import save_file as save_torch

from taught.errors import UserError
from taught.features.concept import (
    Concept,
    concept_map,
    feature_direction,
    file_direction,
    fitted_direction,
    load_concept,
    quality_card,
    save_concept,
)
from taught.features.pooling import pool
from taught.model.readout import read_residuals
from tiny_models import ENCODERS, MODELS, PROMPT_IDS, WIDTH, plain_read, tiny_model, tiny_prompts, tiny_sae


def some(name: str = "c", seed: int = 0, **fields) -> Concept:
    v = np.random.default_rng(seed).normal(size=WIDTH)
    return Concept(**{"name": name, "direction": v, "block": 1, "position": "mean_user", **fields})


# --- directions --------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", ENCODERS)
def test_a_feature_s_direction_is_what_its_activation_adds_to_the_reconstruction(kind: str):
    sae = tiny_sae(kind)
    acts = torch.zeros(sae.n_features, dtype=torch.float64)
    acts[2], acts[7] = 0.5, -3.0
    expected = sae.decode(acts) - sae.decode(torch.zeros_like(acts))
    np.testing.assert_allclose(feature_direction(sae, {7: -3.0, 2: 0.5}), expected, rtol=1e-12)
    with pytest.raises(UserError, match="no such feature"):
        feature_direction(sae, {10: 1.0})


def test_directions_from_files(tmp_path: Path):
    v = np.arange(4.0)
    save_file({"a": v[None], "b": np.eye(4)}, tmp_path / "two.safetensors")
    save_torch({"v": torch.tensor([1.0, 2.0], dtype=torch.bfloat16)}, tmp_path / "one.safetensors")
    found, origin = file_direction(tmp_path / "two.safetensors", "a")
    assert found.tolist() == v.tolist()
    assert origin["tensor"] == "a" and len(origin["sha256"]) == 64
    assert file_direction(tmp_path / "one.safetensors")[0].tolist() == [1.0, 2.0]
    for tensor, message in ((None, "one of a, b"), ("c", "one of a, b"), ("b", "no vector")):
        with pytest.raises(UserError, match=message):
            file_direction(tmp_path / "two.safetensors", tensor)
    (tmp_path / "bad.safetensors").write_bytes(b"nothing")
    for name in ("bad.safetensors", "missing.safetensors"):
        with pytest.raises(UserError, match="cannot be read"):
            file_direction(tmp_path / name)


def groups(shift: float):
    rng = np.random.default_rng(1)
    positive = np.arange(60) % 2 == 0
    return rng.normal(size=(60, WIDTH)) + shift * np.outer(positive, np.ones(WIDTH)), positive


@pytest.mark.parametrize("method", ["difference", "logistic", "ridge"])
def test_a_direction_that_is_no_better_than_chance_is_refused_unless_forced(method: str):
    X, positive = groups(0.0)
    with pytest.raises(UserError, match=r"no better than chance(.|\n)*force to true"):
        fitted_direction(X, positive, method)
    v, card = fitted_direction(X, positive, method, force=True)
    assert v.shape == (WIDTH,)
    assert card["auc"]["lo"] <= 0.5 and card["held_out"]
    _, good = fitted_direction(*groups(1.0), method)
    assert good["auc"]["lo"] > 0.5
    assert 0.5 < good["fold_cosine"] <= 1 and good["difference_cosine"] > 0.5


def test_the_card_describes_the_read_out_along_the_unit_direction():
    X, positive = groups(1.0)
    w = 3 * np.eye(WIDTH)[0]
    card = quality_card(w, X, positive)
    assert card["norm"] == pytest.approx(3)
    assert card["mean_positive"] == pytest.approx(X[positive, 0].mean())
    assert card["mean_negative"] == pytest.approx(X[~positive, 0].mean())
    parts = X[:, 0] - np.where(positive, X[positive, 0].mean(), X[~positive, 0].mean())
    assert card["spread"] == pytest.approx(np.sqrt(np.mean(parts**2)))
    assert not card["held_out"]


# --- reading -----------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("position", ["last_user", "last_prompt", "mean_user"])
def test_read_outs_of_all_blocks_are_those_of_plain_passes(name: str, position: str):
    model, prompts = tiny_model(name), tiny_prompts(position)
    concepts = [some("a", 0), some("b", 1)]
    features = concept_map(concepts, position, next(model.parameters()))
    found = read_residuals(model, prompts, [0, 1], features, tokens=12)
    assert found.shape == (2, len(prompts), 2)
    for block in (0, 1):
        for i, (ids, prompt) in enumerate(zip(PROMPT_IDS, prompts, strict=True)):
            h = plain_read(model, ids, block)[0][list(prompt.read)].mean(0).detach().numpy()
            expected = [concept.direction @ h for concept in concepts]
            np.testing.assert_allclose(found[block, i], expected, rtol=1e-10)


def test_the_last_block_is_read_before_the_final_norm():
    model, prompts = tiny_model("tied"), tiny_prompts("last_prompt")
    kept = []
    handle = model.model.layers[2].register_forward_hook(lambda _m, _a, out: kept.append(out))
    model(input_ids=torch.tensor([PROMPT_IDS[0]]))
    handle.remove()
    (h,) = read_residuals(model, prompts[:1], [2], lambda h, offsets: pool(h, offsets, "last_"))
    torch.testing.assert_close(h[0], kept[0][0, -1].detach(), rtol=1e-10, atol=1e-12)


def test_a_concept_map_responds_linearly_and_can_be_narrowed():
    features = concept_map([some("a", 0), some("b", 1)], "mean_user", torch.zeros(1).double())
    gen = torch.Generator().manual_seed(0)
    h, dh = (torch.randn(6, WIDTH, generator=gen, dtype=torch.float64) for _ in range(2))
    offsets = torch.tensor([0, 3, 4, 6])
    torch.testing.assert_close(features.response(h, dh, offsets), features(h + dh, offsets) - features(h, offsets))
    narrowed = replace(features, ids=torch.tensor([1]))
    torch.testing.assert_close(narrowed(h, offsets), features(h, offsets)[:, 1:])


def test_read_outs_that_are_not_finite_name_their_prompts_only():
    model, prompts = tiny_model("untied"), tiny_prompts("last_prompt")
    with torch.no_grad():
        model.model.embed_tokens.weight[14] = torch.nan  # a token of the last prompt alone
    with pytest.raises(UserError, match=r"\['q5'\]"):
        read_residuals(model, prompts, [0], lambda h, offsets: h)


# --- files -------------------------------------------------------------------------------------


def test_a_concept_survives_its_files_and_damage_is_noticed(tmp_path: Path):
    made = some(weights={"sha256": "x"}, provenance={"source": "probe"}, card={"norm": 1.0})
    save_concept(made, tmp_path / "c")
    read = load_concept(tmp_path / "c")
    assert np.array_equal(read.direction, made.direction)
    fields = ("name", "block", "position", "tokens", "weights", "provenance", "card")
    assert [getattr(read, f) for f in fields] == [getattr(made, f) for f in fields]
    save_concept(replace(made, direction=-made.direction), tmp_path / "d")
    (tmp_path / "d" / "concept.json").write_bytes((tmp_path / "c" / "concept.json").read_bytes())
    for folder in ("d", "nowhere"):
        with pytest.raises(UserError, match="the concept cannot be read"):
            load_concept(tmp_path / folder)


@pytest.mark.parametrize(
    ("fit", "message"),
    [
        ({"width": WIDTH + 1, "blocks": 3, "weights": {"sha256": "x"}}, "width 9"),
        ({"width": WIDTH, "blocks": 1, "weights": {"sha256": "x"}}, "blocks 0 to 0"),
        ({"width": WIDTH, "blocks": 3, "weights": {"sha256": "y"}}, "other weights"),
    ],
)
def test_a_concept_of_another_width_block_or_model_is_refused(fit, message):
    made = some(weights={"sha256": "x"})
    made.require_fit(width=WIDTH, blocks=3, weights={"sha256": "x"})
    with pytest.raises(UserError, match=message):
        made.require_fit(**fit)


@pytest.mark.parametrize(
    "fields",
    [
        {"direction": np.zeros(4)},
        {"direction": np.ones((2, 2))},
        {"direction": [np.nan, 1]},
        {"position": "max_user"},
        {"tokens": "all"},
    ],
)
def test_what_is_no_direction_or_no_place_is_refused(fields):
    with pytest.raises(UserError):
        some(**fields)
