from __future__ import annotations

import json
import math
import re
import sys
import types

import pytest
import torch
from safetensors.torch import load_file, save_file

import taught.presets
from taught.cli.given import parse_set
from taught.core.point import Point
from taught.errors import UserError
from taught.features.sae import SparseAutoencoder, check_fit, fraction_variance_unexplained, load_sae
from taught.run.fingerprint import stage_inputs
from taught.stages import BY_NAME
from taught.study.schema import Study

D, F = 6, 15


def weights(seed: int = 0, dtype: torch.dtype = torch.float32) -> dict[str, torch.Tensor]:
    gen = torch.Generator().manual_seed(seed)
    return {
        "W_enc": torch.randn(D, F, generator=gen, dtype=dtype),
        "b_enc": torch.randn(F, generator=gen, dtype=dtype) * 0.3,
        "W_dec": torch.randn(F, D, generator=gen, dtype=dtype),
        "b_dec": torch.randn(D, generator=gen, dtype=dtype),
    }


def make(dtype: torch.dtype = torch.float64, **changes) -> SparseAutoencoder:
    fields = {
        **weights(dtype=dtype),
        # A cut of its own for every feature, so that columns mixed up would show.
        "threshold": torch.linspace(0.1, 2.0, F, dtype=dtype),
        "k": None,
        "architecture": "jumprelu",
        "apply_b_dec_to_input": True,
        "rescale_by_decoder_norm": False,
        "point": Point(3),
        "hook": "blocks.3.hook_resid_post",
    }
    return SparseAutoencoder(**{**fields, **changes})


def tokens(n: int = 40, seed: int = 9, dtype: torch.dtype = torch.float64) -> torch.Tensor:
    return torch.randn(n, D, generator=torch.Generator().manual_seed(seed), dtype=dtype)


def saelens_folder(path, config=None, tensors=None):
    path.mkdir(parents=True, exist_ok=True)
    base = {
        "architecture": "jumprelu",
        "d_in": D,
        "d_sae": F,
        "apply_b_dec_to_input": True,
        "normalize_activations": "none",
        "reshape_activations": "none",
        "metadata": {"hook_name": "blocks.3.hook_resid_post", "model_name": "tiny"},
    }
    base.update(config or {})
    if tensors is None:
        tensors = weights()
        if base["architecture"] == "jumprelu":
            tensors["threshold"] = torch.full((F,), 0.5)
    save_file(tensors, path / "sae_weights.safetensors")
    (path / "cfg.json").write_text(json.dumps(base))
    return path


def sparsify_folder(path, config=None, extra=None):
    path.mkdir(parents=True, exist_ok=True)
    w = weights()
    save_file(
        {
            "encoder.weight": w["W_enc"].T.contiguous(),
            "encoder.bias": w["b_enc"],
            "W_dec": w["W_dec"],
            "b_dec": w["b_dec"],
            **(extra or {}),
        },
        path / "sae.safetensors",
    )
    base = {"expansion_factor": 32, "normalize_decoder": True, "num_latents": F, "k": 4, "d_in": D}
    (path / "cfg.json").write_text(json.dumps({**base, **(config or {})}))
    return path


# --- the encoders against their formulas, one token and one feature at a time -------------------


def naive(sae: SparseAutoencoder, h: torch.Tensor) -> torch.Tensor:
    """The SAE's encoder written out in loops over tokens and features."""
    out = torch.zeros(len(h), F, dtype=h.dtype)
    for t, token in enumerate(h):
        x = token - sae.b_dec if sae.apply_b_dec_to_input else token
        pre = [float(x @ sae.W_enc[:, k] + sae.b_enc[k]) for k in range(F)]
        if sae.rescale_by_decoder_norm:
            pre = [p * float(sae.W_dec[k].norm()) for k, p in enumerate(pre)]
        if sae.k is not None:
            kept = sorted(range(F), key=lambda k: -pre[k])[: sae.k]
        elif sae.threshold is not None:
            kept = [k for k in range(F) if pre[k] > sae.threshold[k]]
        else:
            kept = list(range(F))
        for k in kept:
            out[t, k] = max(pre[k], 0.0)
    return out


KINDS = {
    "jumprelu": {},
    "jumprelu-uncentred": {"apply_b_dec_to_input": False},
    # A negative threshold never lets a negative activation through.
    "jumprelu-negative": {"threshold": torch.full((F,), -0.4, dtype=torch.float64)},
    "standard": {"threshold": None, "architecture": "standard"},
    "topk": {"threshold": None, "k": 4, "architecture": "topk"},
    # With k close to F some of the largest are negative: those stay off.
    "topk-wide": {"threshold": None, "k": 13, "architecture": "topk"},
    "topk-rescaled": {"threshold": None, "k": 4, "architecture": "topk", "rescale_by_decoder_norm": True},
}


@pytest.mark.parametrize("kind", KINDS)
def test_encoder_is_its_formula(kind):
    sae, h = make(**KINDS[kind]), tokens()
    torch.testing.assert_close(sae.encode(h), naive(sae, h))


def test_relu_proxy_is_the_papers_formula_and_not_the_true_encoder():
    sae, h = make(), tokens()  # trap 7
    proxy = torch.stack([(token @ sae.W_enc + sae.b_enc).clamp(min=0) for token in h])
    torch.testing.assert_close(sae.encode(h, encoder="relu"), proxy)
    assert (sae.encode(h) - proxy).abs().max() > 0.1


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("encoder", ["sae", "relu"])
def test_subset_has_the_columns_of_the_ids_in_their_order(kind, encoder):
    sae, h = make(**KINDS[kind]), tokens().reshape(4, 10, D)
    ids = [9, 10, 2]  # as strings these would sort '10' < '2' < '9' (trap 4)
    some = sae.encode(h, ids, encoder=encoder)
    assert some.shape == (4, 10, 3)
    every = sae.encode(h, encoder=encoder)
    for column, k in enumerate(ids):
        torch.testing.assert_close(some[..., column], every[..., k])


@pytest.mark.parametrize("kind", KINDS)
def test_gradient_is_gate_times_encoder(kind):
    sae, h = make(**KINDS[kind]), tokens(5).requires_grad_()
    acts = sae.encode(h)
    scale = sae.W_dec.norm(dim=1) if sae.rescale_by_decoder_norm else torch.ones(F)
    for t, k in [(0, 1), (1, 7), (2, 10), (3, 3), (4, 14), (0, 9)]:
        (grad,) = torch.autograd.grad(acts[t, k], h, retain_graph=True)
        expected = torch.zeros(5, D, dtype=torch.float64)
        if acts[t, k] > 0:
            expected[t] = sae.W_enc[:, k] * scale[k]
        torch.testing.assert_close(grad, expected)
    assert 0 < (acts > 0).double().mean() < 1


def test_gradient_is_the_finite_difference_of_the_activation():
    sae, h = make(), tokens(8)
    dh = tokens(8, seed=3)
    step = 1e-7
    numeric = (sae.encode(h + step * dh) - sae.encode(h - step * dh)) / (2 * step)
    _, exact = torch.func.jvp(sae.encode, (h,), (dh,))
    torch.testing.assert_close(exact, numeric, rtol=1e-5, atol=1e-6)


def test_decode_is_linear_and_undoes_the_rescaling():
    sae, h = make(), tokens()
    acts = sae.encode(h)
    torch.testing.assert_close(sae.decode(acts), acts @ sae.W_dec + sae.b_dec)
    scaled = make(**KINDS["topk-rescaled"])
    acts = scaled.encode(h)
    unit = scaled.W_dec / scaled.W_dec.norm(dim=1, keepdim=True)
    torch.testing.assert_close(scaled.decode(acts), acts @ unit + scaled.b_dec)


def test_to_changes_every_tensor():
    moved = make().to(dtype=torch.float32)
    kinds = {getattr(moved, n).dtype for n in ("W_enc", "b_enc", "W_dec", "b_dec", "threshold")}
    assert kinds == {torch.float32}
    assert moved.point == Point(3) and moved.architecture == "jumprelu"


@pytest.mark.parametrize("ids", [[0, F], [-1]])
def test_unknown_id_is_named(ids):
    with pytest.raises(UserError, match=r"no such feature\n.*(15|-1).*\n.*0 to 14"):
        make().encode(tokens(), ids)


def test_unknown_encoder_is_named():
    with pytest.raises(UserError, match=r"(?s)unknown encoder.*'?proxy.*sae, relu"):
        make().encode(tokens(), encoder="proxy")


# --- folders ---------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["standard", "jumprelu", "topk"])
@pytest.mark.parametrize("centred", [True, False])
def test_saelens_folder_round_trip(tmp_path, architecture, centred):
    config = {"architecture": architecture, "apply_b_dec_to_input": centred, "k": 4}
    sae = load_sae(saelens_folder(tmp_path / "sae", config))
    assert (sae.architecture, sae.point, sae.apply_b_dec_to_input) == (architecture, Point(3), centred)
    assert sae.provenance["metadata"]["model_name"] == "tiny"
    rule = {"k": 4 if architecture == "topk" else None, "architecture": architecture}
    cut = torch.full((F,), 0.5) if architecture == "jumprelu" else None
    same = make(torch.float32, threshold=cut, apply_b_dec_to_input=centred, **rule)
    h = tokens(dtype=torch.float32)
    torch.testing.assert_close(sae.encode(h), naive(same, h), rtol=1e-4, atol=1e-5)


def test_half_precision_weights_are_read_as_float32(tmp_path):
    tensors = {n: v.half() for n, v in {**weights(), "threshold": torch.ones(F)}.items()}
    sae = load_sae(saelens_folder(tmp_path / "sae", tensors=tensors))
    assert {sae.W_enc.dtype, sae.b_dec.dtype, sae.threshold.dtype} == {torch.float32}
    torch.testing.assert_close(sae.W_enc, weights()["W_enc"].half().float(), rtol=0, atol=0)


def test_sparsify_folder_round_trip(tmp_path):
    sae = load_sae(sparsify_folder(tmp_path / "layers.10"))
    assert (sae.point, sae.k, sae.architecture) == (Point(10), 4, "topk")
    h = tokens(dtype=torch.float32)
    same = make(torch.float32, threshold=None, k=4, architecture="topk")
    torch.testing.assert_close(sae.encode(h), naive(same, h), rtol=1e-4, atol=1e-5)
    assert (sae.encode(h) > 0).sum(-1).max() == 4


@pytest.mark.parametrize(
    ("hook", "block"),
    [
        ("blocks.12.hook_resid_post", 12),
        ("blocks.12.hook_resid_pre", 11),  # the input of block 12 is the output of block 11
        ("layers.7", 7),
        ("model.layers.7", 7),
        ("transformer.h.2", 2),
    ],
)
def test_block_is_read_from_the_hook(tmp_path, hook, block):
    folder = saelens_folder(tmp_path / "sae", {"metadata": {"hook_name": hook}})
    assert load_sae(folder).point == Point(block)
    assert load_sae(folder, block=block).point == Point(block)
    with pytest.raises(UserError, match=f"made for another block(?s:.*)set sae.block to {block}"):
        load_sae(folder, block=block + 1)


def test_block_that_the_file_does_not_say_must_be_given(tmp_path):
    folder = saelens_folder(tmp_path / "sae", {"metadata": {}})
    assert load_sae(folder, block=5).point == Point(5)
    with pytest.raises(UserError, match="does not say which block(?s:.*)set sae.block"):
        load_sae(folder)


@pytest.mark.parametrize(
    ("config", "named"),
    [
        ({"architecture": "gated"}, "architecture: gated"),
        ({"architecture": "temporal"}, "architecture: temporal"),
        ({"architecture": "transcoder"}, "architecture: transcoder"),
        ({"architecture": "skip_transcoder"}, "architecture: skip_transcoder"),
        ({"normalize_activations": "layer_norm"}, "normalize_activations: layer_norm"),
        ({"normalize_activations": "expected_average_only_in"}, "expected_average_only_in"),
        ({"reshape_activations": "hook_z"}, "reshape_activations: hook_z"),
        ({"activation_fn_str": "tanh-relu"}, "activation_fn: tanh-relu"),
        ({"metadata": {"hook_name": "blocks.3.attn.hook_z"}}, "hook_name: blocks.3.attn.hook_z"),
        ({"metadata": {"hook_name": "blocks.3.hook_mlp_in"}}, "hook_mlp_in"),
        ({"metadata": {"hook_name": "blocks.0.hook_resid_pre"}}, "hook_resid_pre"),
        ({"architecture": "topk"}, "k: None"),
    ],
)
def test_saelens_kinds_that_are_not_computed_are_refused_by_name(tmp_path, config, named):
    with pytest.raises(UserError) as caught:
        load_sae(saelens_folder(tmp_path / "sae", config))
    assert named in str(caught.value) and caught.value.exit_code == 2


def test_unknown_tensors_are_refused(tmp_path):
    gated = {**weights(), "threshold": torch.ones(F), "r_mag": torch.ones(F)}
    with pytest.raises(UserError, match="r_mag"):
        load_sae(saelens_folder(tmp_path / "sae", tensors=gated))


def test_jumprelu_without_threshold_is_refused(tmp_path):
    with pytest.raises(UserError, match="without: threshold"):
        load_sae(saelens_folder(tmp_path / "sae", tensors=weights()))


@pytest.mark.parametrize("config", [{"transcode": True}, {"skip_connection": True}, {"activation": "groupmax"}])
def test_sparsify_kinds_that_are_not_computed_are_refused_by_name(tmp_path, config):
    ((key, value),) = config.items()
    with pytest.raises(UserError, match=f"{key}: {value}"):
        load_sae(sparsify_folder(tmp_path / "layers.3", config))


def test_skip_weights_are_refused(tmp_path):
    with pytest.raises(UserError, match="W_skip"):
        load_sae(sparsify_folder(tmp_path / "layers.3", extra={"W_skip": torch.zeros(D, D)}))


def test_weights_that_do_not_fit_together_are_named(tmp_path):
    tensors = {**weights(), "threshold": torch.ones(F), "b_dec": torch.zeros(D + 1)}
    with pytest.raises(UserError, match=r"b_dec: \(7,\)"):
        load_sae(saelens_folder(tmp_path / "sae", tensors=tensors))


def test_missing_folder_and_broken_files_are_user_errors(tmp_path):
    with pytest.raises(UserError, match=r"no readable cfg.json"):
        load_sae(tmp_path / "nowhere")
    folder = saelens_folder(tmp_path / "sae")
    (folder / "sae_weights.safetensors").write_bytes(b"not safetensors")
    with pytest.raises(UserError, match="weights cannot be read"):
        load_sae(folder)
    (folder / "sae_weights.safetensors").unlink()
    with pytest.raises(UserError, match="holds no weights"):
        load_sae(folder)


# --- every key is used, known to be inert, or refused by name -----------------------------------------

# As SAELens wrote them before version 6, all at the top.
OLD = {
    "hook_point": "blocks.2.hook_resid_pre",
    "hook_point_layer": 2,
    "hook_point_head_index": None,
    "architecture": "standard",
    "activation_fn_str": "relu",
    "activation_fn_kwargs": {},
    "normalize_activations": False,
    "finetuning_scaling_factor": False,
    "prepend_bos": True,
    "context_size": 128,
    "l1_coefficient": 8e-5,
    "lr": 4e-4,
    "use_ghost_grads": False,
    "dataset_path": "Skylion007/openwebtext",
    "model_from_pretrained_kwargs": {"center_writing_weights": False, "fold_ln": True},
    "wandb_project": "x",
    "metadata": None,
}


def test_an_old_file_is_read_at_the_block_before_the_one_whose_input_it_names(tmp_path):
    sae = load_sae(saelens_folder(tmp_path / "sae", OLD))
    assert (sae.point, sae.hook, sae.architecture) == (Point(1), "blocks.2.hook_resid_pre", "standard")


def test_an_old_file_whose_activation_is_topk_is_one(tmp_path):
    config = {**OLD, "activation_fn_str": "topk", "activation_fn_kwargs": {"k": 4}}
    sae, h = load_sae(saelens_folder(tmp_path / "sae", config)), tokens(dtype=torch.float32)
    same = make(torch.float32, threshold=None, k=4, architecture="topk")
    torch.testing.assert_close(sae.encode(h), naive(same, h), rtol=1e-4, atol=1e-5)


def test_a_scaling_factor_of_ones_is_none_and_another_is_refused(tmp_path):
    ones = {**weights(), "scaling_factor": torch.ones(F)}
    assert load_sae(saelens_folder(tmp_path / "a", OLD, ones)).n_features == F
    with pytest.raises(UserError, match="scaling_factor"):
        load_sae(saelens_folder(tmp_path / "b", OLD, ones | {"scaling_factor": torch.full((F,), 2.0)}))


CHANGES = {
    "center_writing_weights": True,
    "normalize_activations": "constant_norm_rescale",
    "hook_head_index": 3,
    "hook_name_out": "blocks.3.hook_mlp_out",
    "seqpos_slice": [1, None],
    "model_class_name": "HookedMamba",
    "model_kwargs": {"start_at_layer": 1},
    "finetuning_scaling_factor": True,
    "hook_layer": 7,
    "hf_hook_name": "model.layers.7",
    "rescale_acts_by_decoder_norm": True,
    "residuals_minus_mean": True,  # no key that anybody writes
    "centered": False,
}


@pytest.mark.parametrize("where", ["top", "metadata", "model_from_pretrained_kwargs"])
@pytest.mark.parametrize("key", CHANGES)
def test_a_key_that_changes_the_features_or_is_unknown_is_refused_by_name_wherever_it_stands(tmp_path, key, where):
    place = {"hook_name": "blocks.3.hook_resid_post"}
    given = {key: CHANGES[key]}
    config = {"top": {**given, "metadata": place}, "metadata": {"metadata": place | given}}.get(
        where, {"metadata": place | {"model_from_pretrained_kwargs": given}}
    )
    with pytest.raises(UserError) as caught:
        load_sae(saelens_folder(tmp_path / "sae", config))
    assert f"{key}: {CHANGES[key]}" in str(caught.value)


@pytest.mark.parametrize("key", ["residuals_minus_mean", "center_writing_weights"])
def test_the_advice_for_a_key_that_is_known_to_change_nothing_works(tmp_path, key):
    folder = saelens_folder(tmp_path / "sae", {key: True})
    with pytest.raises(UserError, match=f"ignore=.{key}") as caught:
        load_sae(folder)
    name, value = parse_set(re.search(r'--set "(.+)"', caught.value.fix)[1])
    ignore = Study().replace(name, value).sae.ignore
    torch.testing.assert_close(load_sae(folder, ignore=ignore).W_enc, weights()["W_enc"])
    with pytest.raises(UserError, match="sae.ignore(?s:.*)typo"):
        load_sae(folder, ignore=(*ignore, "typo"))
    with pytest.raises(UserError, match="sae.ignore(?s:.*)architecture"):
        load_sae(folder, ignore=(*ignore, "architecture"))


def test_what_is_ignored_is_in_the_fingerprint_of_the_readings():
    study = Study().replace("sae.ignore", ["seen"])
    assert stage_inputs(BY_NAME["readings"], study)["sae.ignore"] == ["seen"]


@pytest.mark.parametrize("config", [{"signed": True}, {"normalize_io": True}, {"centre": 1}, {"k": True}, {"k": 4.5}])
def test_sparsify_keys_are_used_or_refused(tmp_path, config):
    ((key, value),) = config.items()
    with pytest.raises(UserError, match=f"{key}: {value}"):
        load_sae(sparsify_folder(tmp_path / "layers.3", config))


def test_sparsify_weights_of_before_that_say_signed_false_are_read(tmp_path):
    sae = load_sae(sparsify_folder(tmp_path / "layers.3", {"signed": False, "multi_topk": True}))
    assert sae.k == 4


OTHER_PLACES = ["embed_tokens", "wte", "layers.3.mlp.down_proj.input", "h.2.mlp_old.", "blocks.3.attn.hook_z"]
HOOKS = ["blocks.3.hook_resid_mid", "blocks.3.hook_mlp_in", "blocks.3.mlp.hook_post", "blocks.0.hook_resid_pre"]


@pytest.mark.parametrize("block", [None, 3])
@pytest.mark.parametrize("hook", [*OTHER_PLACES, *HOOKS, "somewhere", "layers.٣", "layers.3.mlp.ä"])
def test_a_place_that_is_not_read_is_refused_whatever_block_is_set(tmp_path, hook, block):
    with pytest.raises(UserError, match=re.escape(f"hook_name: {hook}")):
        load_sae(saelens_folder(tmp_path / "a", {"metadata": {"hook_name": hook}}), block=block)
    with pytest.raises(UserError, match=re.escape(f"hook_name: {hook}")):
        load_sae(sparsify_folder(tmp_path / "b", {"hookpoint": hook}), block=block)


# What TransformerLens calls hook_mlp_out is behind a norm of the MLP's own (Gemma-2); the module's output is before it.
POINTS = {
    "blocks.3.hook_attn_out": Point(3, "attn_out"),
    "blocks.3.hook_mlp_out": Point(3, "mlp_out"),
    "layers.3.mlp": Point(3, "mlp"),
    "model.layers.3.self_attn": Point(3, "self_attn"),
    "transformer.h.3.attn": Point(3, "attn"),
    "gpt_neox.layers.3.attention.dense": Point(3, "attention.dense"),
    "model.layers.3.output": Point(3),
    "model.layers.3.post_feedforward_layernorm.output": Point(3, "post_feedforward_layernorm"),
}


@pytest.mark.parametrize("hook", POINTS)
def test_the_point_is_the_one_that_its_name_is_of_and_no_other_may_be_set(tmp_path, hook):
    saelens = saelens_folder(tmp_path / "sae", {"metadata": {"hook_name": hook}})
    for folder in (saelens, sparsify_folder(tmp_path / hook), sparsify_folder(tmp_path / "b", {"hookpoint": hook})):
        point = load_sae(folder).point
        assert point == POINTS[hook]
        assert load_sae(folder, block=3, part=point.part).point == point
        with pytest.raises(UserError, match="made for another part(?s:.*)set sae.point to") as caught:
            load_sae(folder, part="hook_z")
        told = parse_set(caught.value.fix.removeprefix("set ").replace(" to ", "="))
        assert load_sae(folder, part=Study().replace(*told).sae.point).point == point


def test_where_the_file_says_nothing_the_point_is_the_one_that_is_set(tmp_path):
    for folder in (saelens_folder(tmp_path / "a", {"metadata": {}}), sparsify_folder(tmp_path / "b")):
        assert load_sae(folder, block=5).point == Point(5)
        assert load_sae(folder, block=5, part="mlp_out").point == Point(5, "mlp_out")
        with pytest.raises(UserError, match="set sae.block"):
            load_sae(folder, part="mlp_out")


def test_a_layer_without_a_hook_is_the_block_that_is_set(tmp_path):
    folder = saelens_folder(tmp_path / "a", {"metadata": {"hook_layer": 5}})
    assert load_sae(folder, block=5).point == Point(5)
    with pytest.raises(UserError, match="hook_layer: 5"):
        load_sae(folder, block=4)


def test_two_names_of_a_place_are_kept_for_the_model_to_compare_unless_their_blocks_differ(tmp_path):
    names = {"hook_name": "blocks.3.hook_mlp_out", "hf_hook_name": "model.layers.3.post_feedforward_layernorm.output"}
    sae = load_sae(saelens_folder(tmp_path / "a", {"metadata": names}))
    assert (sae.point, sae.also) == (Point(3, "mlp_out"), (Point(3, "post_feedforward_layernorm"),))
    for other in ("model.layers.4.mlp", "model.layers.3.self_attn.o_proj.input"):
        with pytest.raises(UserError, match=re.escape(f"hf_hook_name: {other}")):
            load_sae(saelens_folder(tmp_path / "b", {"metadata": names | {"hf_hook_name": other}}))


@pytest.mark.parametrize("block", [None, 3])
@pytest.mark.parametrize("name", OTHER_PLACES)
def test_a_folder_that_is_named_after_another_place_is_refused(tmp_path, name, block):
    for folder in (tmp_path / name, tmp_path / "more" / name / "seed0"):
        with pytest.raises(UserError, match=re.escape(f"hook_name: {name}")):
            load_sae(sparsify_folder(folder), block=block)


def test_a_folder_of_one_seed_is_of_the_place_above_it(tmp_path):
    assert load_sae(sparsify_folder(tmp_path / "layers.4" / "seed1")).point == Point(4)


@pytest.mark.parametrize(
    "config",
    [
        {"metadata": [1]},
        {"architecture": ["jumprelu"]},
        {"architecture": None},
        {"d_in": "6"},
        {"d_in": 1e999},
        {"apply_b_dec_to_input": "yes"},
        {"apply_b_dec_to_input": 1},
        {"architecture": "topk", "k": "4"},
        {"architecture": "topk", "k": True},
        {"architecture": "topk", "k": -1},
        {"architecture": "topk", "k": 10**30},
        {"architecture": "topk", "k": F + 1},
        {"metadata": {"hook_name": {"a": 1}}},
        {"metadata": {"hook_name": 3}},
        {"metadata": {"model_from_pretrained_kwargs": "fold_ln"}},
        {"activation_fn_kwargs": [4]},
        {"d_in": D + 1},
        {"d_sae": F + 1},
    ],
    ids=str,
)
def test_a_value_of_another_type_or_size_is_a_user_error(tmp_path, config):
    with pytest.raises(UserError):
        load_sae(saelens_folder(tmp_path / "sae", config), block=3)


@pytest.mark.parametrize(
    "content",
    [b"[" * 100_000, b'{"k": ' + b"9" * 5000 + b"}", b'{"k": 1, "k": 2}', b"[]", b"\xff\xfe", b"\x00", b""],
    ids=["deep", "digits", "twice", "list", "bytes", "nul", "empty"],
)
def test_a_configuration_that_is_no_sound_json_is_a_user_error(tmp_path, content):
    folder = saelens_folder(tmp_path / "sae")
    (folder / "cfg.json").write_bytes(content)
    with pytest.raises(UserError, match="no readable cfg.json"):
        load_sae(folder)


@pytest.mark.parametrize(
    "change",
    [
        {"W_enc": torch.zeros(D, F, dtype=torch.uint8)},
        {"b_enc": torch.zeros(F, dtype=torch.int64)},
        {"threshold": torch.ones(F, dtype=torch.bool)},
        {"b_dec": torch.full((D,), torch.nan)},
        {"W_dec": torch.full((F, D), torch.inf)},
        {"W_enc": torch.zeros(0, F)},
        {"W_enc": torch.zeros(())},
    ],
)
def test_weights_that_are_no_finite_floating_point_numbers_are_named(tmp_path, change):
    tensors = {**weights(), "threshold": torch.ones(F), **change}
    with pytest.raises(UserError, match=next(iter(change))):
        load_sae(saelens_folder(tmp_path / "sae", tensors=tensors))


# --- releases, through the optional sae-lens ---------------------------------------------------------


def test_release_without_sae_lens_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "sae_lens", None)
    with pytest.raises(UserError, match=r"taught\[saelens\]"):
        load_sae("some-release:blocks.3.hook_resid_post")


def test_release_is_read_through_sae_lens(monkeypatch):
    config = {"architecture": "standard", "metadata": {"hook_name": "blocks.3.hook_resid_post"}}

    class SAE:
        cfg = types.SimpleNamespace(to_dict=lambda: config)

        @staticmethod
        def from_pretrained(release, sae_id, device):
            assert (release, sae_id) == ("some-release", "layer_3/width_16k")
            return SAE()

        @staticmethod
        def state_dict():
            return weights()

    monkeypatch.setitem(sys.modules, "sae_lens", types.SimpleNamespace(SAE=SAE))
    sae = load_sae("some-release:layer_3/width_16k")
    assert sae.provenance["release"] == "some-release:layer_3/width_16k"
    torch.testing.assert_close(sae.W_enc, weights()["W_enc"])


def test_reading_a_folder_does_not_import_sae_lens(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "sae_lens", None)  # importing it now raises
    assert load_sae(saelens_folder(tmp_path / "sae")).n_features == F


# --- does it fit ---------------------------------------------------------------------------------------


def test_unexplained_variance_is_its_formula():
    sae, h = make(), tokens()
    error = sum(float((t - sae.decode(sae.encode(t))).pow(2).sum()) for t in h)
    total = sum(float((t - h.mean(0)).pow(2).sum()) for t in h)
    assert fraction_variance_unexplained(sae, h) == pytest.approx(error / total, rel=1e-12)


def perfect() -> SparseAutoencoder:
    """Features are +- the axes around b_dec: reconstructs every token."""
    eye = torch.eye(D, dtype=torch.float64)
    both = torch.cat([eye, -eye])
    return make(
        W_enc=both.T.contiguous(), W_dec=both, b_enc=torch.zeros(2 * D).double(), threshold=torch.zeros(2 * D).double()
    )


def test_unexplained_variance_of_a_perfect_and_of_an_empty_dictionary():
    h = tokens()
    assert fraction_variance_unexplained(perfect(), h) == pytest.approx(0, abs=1e-24)
    silent = make(threshold=torch.full((F,), 1e9).double(), b_dec=h.mean(0))
    assert fraction_variance_unexplained(silent, h) == pytest.approx(1)


def test_wrong_layer_shows_in_the_fit():
    sae = perfect()
    narrow = make(W_enc=sae.W_enc, W_dec=sae.W_dec, b_enc=sae.b_enc, threshold=torch.full((2 * D,), 0.3).double())
    own = narrow.b_dec + tokens() * 3
    assert check_fit(narrow, own, limit=0.1) < 0.1
    # A later block has another mean and scale: nothing passes the thresholds any more.
    other = narrow.b_dec + tokens() * 0.1
    with pytest.raises(UserError, match=r"(?s)unexplained (0\.9|1).*block 3.*at most 0\.9"):
        check_fit(narrow, other)


def test_wrong_width_shows_in_the_fit():
    with pytest.raises(UserError, match="SAE 6, model 7"):
        check_fit(make(), torch.randn(4, 7, dtype=torch.float64))


def test_fit_that_is_not_a_number_is_an_error():
    h = tokens(1)
    assert math.isnan(fraction_variance_unexplained(make(), h))
    with pytest.raises(UserError, match="nan"):
        check_fit(make(), h)


# --- the SAE that ships ------------------------------------------------------------------------------


def shipped():
    folder = taught.presets._HERE / "refusal-smollm2" / "sae"
    if not folder.is_dir():
        pytest.skip("the preset's SAE is not in this tree")
    return folder


def test_shipped_sae_has_its_size_and_shapes():
    folder = shipped()
    sae = load_sae(folder)
    assert sae.width == 576 and 4096 <= sae.n_features <= 8192
    assert sae.architecture == "jumprelu" and sae.threshold is not None
    assert 0 < sae.point.block < 29
    assert (folder / "sae_weights.safetensors").stat().st_size < 25e6
    stored = load_file(folder / "sae_weights.safetensors")
    assert all(torch.isfinite(value).all() for value in stored.values())
    assert (sae.threshold > 0).all()
