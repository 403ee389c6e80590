"""What a result rests on beyond the study's text: the weights that a name stood for."""

from __future__ import annotations

import dataclasses
import sys
import types

import pytest
import torch
from safetensors.torch import load_file

from taught.core.point import Point
from taught.errors import UserError
from taught.model.load import load_model
from taught.stages.subject import open_subject, study_prompts
from taught.study.load import load_study
from tiny_models import tiny_sae
from tiny_study import BLOCK, do, write_tiny_study


@pytest.fixture
def release(tmp_path, monkeypatch):
    """The tiny study with its SAE as a release of SAELens; the dict of weights that it serves."""
    study = load_study(write_tiny_study(tmp_path)).replace("sae.path", "some-release:block-1")
    served = load_file(tmp_path / "sae" / "sae_weights.safetensors")
    config = {
        "architecture": "standard",
        "apply_b_dec_to_input": False,
        "metadata": {"hook_name": f"blocks.{BLOCK}.hook_resid_post"},
    }
    sae = types.SimpleNamespace(cfg=types.SimpleNamespace(to_dict=lambda: config), state_dict=lambda: dict(served))
    hub = types.SimpleNamespace(from_pretrained=lambda release, sae_id, device: sae)
    monkeypatch.setitem(sys.modules, "sae_lens", types.SimpleNamespace(SAE=hub))
    return types.SimpleNamespace(study=study, served=served, config=config)


def test_identity_holds_the_weights_of_model_and_sae(release):
    identity = open_subject(release.study).identity
    assert set(identity) == {"model.weights", "sae.weights", "tokens"}
    assert identity == open_subject(release.study).identity
    assert len(identity["sae.weights"]) == 64


def test_invariant_8_another_sae_under_the_same_release_name_is_refused(release, tmp_path):
    run = do(release.study, tmp_path / "run", "readings", "policy")
    do(release.study, run, "readings")  # the same weights: complete already
    assert run.manifest["stages"]["readings"]["attempts"] == 1
    assert run.manifest["weights"]["sae.weights"] == run.manifest["inputs"]["readings"]["sae.weights"]
    release.served["W_dec"] = release.served["W_dec"] * 2
    for stage in ("readings", "attribute"):
        with pytest.raises(UserError, match=r"other inputs: sae\.weights"):
            do(release.study, run, stage)


@pytest.mark.parametrize("module", ["mlp", "mlp.down_proj", "self_attn", "post_attention_layernorm"])
def test_two_names_of_a_point_are_of_one_module_of_the_model_or_the_sae_is_refused(release, module):
    names = {"hook_name": "blocks.1.hook_mlp_out", "hf_hook_name": f"model.layers.1.{module}.output"}
    release.config["metadata"] = names
    if module == "mlp":
        assert open_subject(release.study).sae.point == Point(1, "mlp_out")
    else:
        with pytest.raises(UserError, match=f"names two places(?s:.*){module} of block 1"):
            open_subject(release.study)


@pytest.mark.parametrize("hook", ["blocks.1.hook_mlp_in", "model.layers.1.feed_forward", "model.layers.3.mlp"])
def test_an_sae_of_a_place_that_the_model_has_not_is_refused_when_it_is_opened(release, hook):
    release.config["metadata"] = {"hook_name": hook}
    with pytest.raises(UserError, match="hook_mlp_in|no such part(?s:.*)self_attn, mlp|no such block"):
        open_subject(release.study)


def test_the_point_that_is_set_is_read_and_is_in_the_fingerprint(release, tmp_path):
    release.config["metadata"] = {}
    study = release.study.replace("sae.block", 1).replace("prompts.limit", 6)
    subject = open_subject(study.replace("sae.point", "mlp_out"))
    assert subject.sae.point == Point(1, "mlp_out")
    assert subject.identity["sae.weights"] != open_subject(study).identity["sae.weights"]
    run = do(study.replace("sae.point", "mlp_out"), tmp_path / "run", "readings")
    with pytest.raises(UserError, match=r"other inputs: .*sae\.point"):
        do(study, run, "readings")
    assert {key: run.read_json("readings")[key] for key in ("block", "point")} == {"block": 1, "point": "mlp_out"}
    arrays, ids = run.read_tensors("readouts")
    seen: list[torch.Tensor] = []
    model = subject.loaded.model
    model.model.layers[1].mlp.register_forward_hook(lambda module, args, output: seen.append(output[0]))
    encoded = {e.id: e for e in subject.encode(study_prompts(study))}
    for row, prompt_id in enumerate(ids["prompt_ids"]):
        with torch.no_grad():
            model(input_ids=torch.tensor([encoded[prompt_id].input_ids]))
        expected = seen[-1][slice(*encoded[prompt_id].user_span)]
        found = torch.from_numpy(arrays["h"][slice(*arrays["offsets"][row : row + 2])])
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


def test_without_an_sae_the_model_alone_is_opened(release):
    subject = open_subject(release.study.replace("sae.path", None))
    assert subject.sae is None and set(subject.identity) == {"model.weights", "tokens"}
    with pytest.raises(UserError, match=r"sae\.path"):
        _ = subject.required_sae


def changed(sae, name):
    value = getattr(sae, name).clone()
    value.flatten()[-1] += 1e-6
    return dataclasses.replace(sae, **{name: value})


@pytest.mark.parametrize("name", ["W_enc", "b_enc", "W_dec", "b_dec", "threshold"])
def test_one_number_of_any_tensor_changes_the_saes_digest(name):
    sae = tiny_sae("jumprelu")
    assert changed(sae, name).sha256() != sae.sha256()


@pytest.mark.parametrize(
    "change",
    [
        {"apply_b_dec_to_input": False},
        {"k": 2},
        {"rescale_by_decoder_norm": False},
        {"point": Point(0)},
        {"point": Point(1, "mlp_out")},
    ],
)
def test_another_use_of_the_same_tensors_changes_the_saes_digest(change):
    sae = tiny_sae("topk")
    assert all(getattr(sae, name) != value for name, value in change.items())
    assert dataclasses.replace(sae, **change).sha256() != sae.sha256()


def test_the_same_bytes_in_another_place_change_the_saes_digest():
    sae = tiny_sae("standard", width=6, n=6)
    swapped = dataclasses.replace(sae, b_enc=sae.b_dec, b_dec=sae.b_enc)
    assert not torch.equal(sae.b_enc, sae.b_dec)
    assert swapped.sha256() != sae.sha256()


def test_the_saes_digest_is_of_values_and_not_of_how_they_lie_in_memory():
    sae = tiny_sae("standard")
    strided = dataclasses.replace(sae, W_enc=sae.W_enc.T.contiguous().T)
    assert not strided.W_enc.is_contiguous()
    assert strided.sha256() == sae.sha256()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
def test_the_saes_digest_takes_every_precision(dtype):
    sae = tiny_sae("jumprelu").to(dtype=dtype)
    assert sae.sha256() == sae.to("cpu").sha256()
    assert sae.sha256() != sae.to(dtype=torch.float64).sha256()


def test_the_longest_input_is_that_of_the_text_model_inside_another(tmp_path):
    # As Gemma 3 with its vision tower: the configuration of the whole says nothing of positions.
    study = load_study(write_tiny_study(tmp_path)).replace("sae.path", None)
    loaded = load_model(str(tmp_path / "model"))
    text = types.SimpleNamespace(max_position_embeddings=77)
    whole = types.SimpleNamespace(config=types.SimpleNamespace(get_text_config=lambda: text))
    assert open_subject(study, dataclasses.replace(loaded, model=whole)).chat.context == 77
