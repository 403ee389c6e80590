"""What the cfg.json of a sparse autoencoder says of its features.

Every key is used, known to change nothing about the features, or refused by name: one that is unknown here may change
them. ``sae.ignore`` names unknown keys that the user knows to change nothing.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from taught.core.point import ATTN_OUT, MLP_OUT, RESID_POST, Point
from taught.errors import UserError, refuse

ARCHITECTURES = ("standard", "jumprelu", "topk")


@dataclass(frozen=True)
class SaeConfig:
    """What a configuration fixes of an encoder.

    Attributes
    ----------
    architecture, k, apply_b_dec_to_input, rescale_by_decoder_norm, point, also, hook
        As in :class:`taught.features.sae.SparseAutoencoder`.
    width, features : sizes that the file names; None: it does not
    """

    architecture: str
    k: int | None
    apply_b_dec_to_input: bool
    rescale_by_decoder_norm: bool
    point: Point
    also: tuple[Point, ...]
    hook: str
    width: int | None
    features: int | None


@dataclass(frozen=True)
class _Allowed:
    """The values of a key that this reader computes with."""

    words: str
    fits: Callable[[Any], bool]
    fix: str = "use another SAE, or save this one in a form that folds it in"


def _only(*values: Any) -> _Allowed:
    # By type as well: 1 equals True in Python, and means something else in a configuration.
    words = " or ".join(dict.fromkeys(str(value).lower() for value in values))
    return _Allowed(words, lambda given: any(type(given) is type(value) and given == value for value in values))


def _is_whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


_FLAG = _only(True, False)
_OFF, _UNSET = _only(False, None), _only(None)
_NONE = _only("none", None, False)
_WHOLE = _Allowed("a whole number", lambda value: value is None or _is_whole(value))
_TEXT = _Allowed("text", lambda value: value is None or isinstance(value, str))

_SAELENS = {
    "architecture": _only(*ARCHITECTURES),
    "d_in": _WHOLE,
    "d_sae": _WHOLE,
    "apply_b_dec_to_input": _FLAG,
    "rescale_acts_by_decoder_norm": _FLAG,
    "activation_fn": _only("relu", "topk", None),
    "activation_fn_kwargs": _Allowed(
        "k, or nothing", lambda value: value is None or (isinstance(value, Mapping) and set(value) <= {"k"})
    ),
    "normalize_activations": _NONE,
    "activation_normalization": _NONE,
    "reshape_activations": _NONE,
    "finetuning_scaling_factor": _OFF,
    "hook_name": _TEXT,
    "hook_layer": _WHOLE,
    "hf_hook_name": _TEXT,
    "hook_head_index": _UNSET,
    "hook_name_out": _UNSET,
    "hf_hook_name_out": _UNSET,
    "hook_head_index_out": _UNSET,
    "seqpos_slice": _only(None, [None], [None, None], (None,), (None, None)),
    "model_class_name": _only("HookedTransformer", "AutoModelForCausalLM", None),
    "model_kwargs": _only({}, None),
    "center_writing_weights": replace(
        _OFF, fix='of a model with RMSNorm it changed nothing: --set "sae.ignore=[center_writing_weights]"'
    ),
}
_OLD_NAMES = {
    "hook_point": "hook_name",
    "hook_point_layer": "hook_layer",
    "hook_point_head_index": "hook_head_index",
    "activation_fn_str": "activation_fn",
}
# How it was trained, logged and stored, and on which tokens of which model; the layer norms and biases that
# TransformerLens folds leave what is read here as it is. `k` is read for topk alone.
_TRAINING = """
    act_store_device activation_store activations_mixing_fraction adam_beta1 adam_beta2 autocast autocast_lm
    aux_loss_coefficient b_dec_init_method batch_size begin_batch_token begin_sequence_token buffer_size_gb
    cached_activations_path center_unembed checkpoint_path compile_llm compile_sae context_size d_out dataset_name
    dataset_path dataset_trust_remote_code dead_feature_threshold dead_feature_window decoder_heuristic_init
    decoder_heuristic_init_norm decoder_init_norm decoder_orthogonal_init default_padding_side default_prepend_bos
    device disable_concat_sequences dtype eval_batch_size_prompts eval_every_n_wandb_logs exclude_special_tokens
    expansion_factor feature_sampling_window finetuning_method finetuning_tokens fold_ln fold_value_biases
    from_pretrained_path hook_eval hook_point_eval init_encoder_as_decoder_transpose is_dataset_tokenized
    jumprelu_bandwidth jumprelu_init_threshold jumprelu_sparsity_loss_mode jumprelu_ste_to_input jumprelu_tanh_scale
    k l0_coefficient l0_warm_up_steps l1_coefficient l1_warm_up_steps learning_rate llm_batch_size
    llm_compilation_mode llm_device log_activations_store_to_wandb log_optimizer_state_to_wandb log_to_wandb
    log_weights_to_wandb logger lp_norm lr lr_decay_steps lr_end lr_scheduler_name lr_warm_up_steps
    matryoshka_widths model_batch_size model_name mse_loss_normalization n_batches_for_norm_estimate
    n_batches_in_buffer n_checkpoints n_devices n_eval_batches n_restart_cycles neuronpedia_id
    new_cached_activations_path noise_scale normalize_sae_decoder output_path pre_act_loss_coefficient
    prefetch_llm_batches prepend_bos refactor_factored_attn_matrices resume resume_from_checkpoint revision run_name
    sae_compilation_mode sae_lens_training_version sae_lens_version save_final_checkpoint
    scale_sparsity_penalty_by_decoder_norm seed sequence_separator_token store_batch_size_prompts streaming
    target_l0 tokenizer_name tokens_per_buffer topk_threshold_lr torch_dtype total_training_samples
    total_training_tokens train_batch_size train_batch_size_samples train_batch_size_tokens trained_as
    training_architecture training_architecture_details training_tokens trust_remote_code use_cached_activations
    use_chat_formatting use_error_term use_ghost_grads use_matryoshka_aux_loss use_sparse_activations verbose
    wandb_entity wandb_id wandb_log_frequency wandb_project
"""


_SPARSIFY = {
    "activation": _only("topk"),
    "k": _WHOLE,
    "d_in": _WHOLE,
    "num_latents": _WHOLE,
    "expansion_factor": _WHOLE,
    "transcode": _OFF,
    "skip_connection": _OFF,
    "normalize_io": _OFF,
    "signed": _OFF,
    "hook_name": _TEXT,
}
_SPARSIFY_INERT = frozenset({"normalize_decoder", "multi_topk"})  # how it was trained


def saelens_config(
    config: Mapping[str, Any],
    *,
    block: int | None = None,
    part: str | None = None,
    folder: Path | None = None,
    ignore: Collection[str] = (),
) -> SaeConfig:
    """What SAELens wrote, in its format of today or before version 6.

    Parameters
    ----------
    block, part : where h is read (:class:`taught.core.point.Point`), as far as the file does not say
    folder : where the file lies: its name may be that of a place in the model
    ignore : unknown keys that change nothing about the features

    Raises
    ------
    UserError
        A key that is unknown, or whose value is not computed here; the message names both.
    """
    # Old files hold everything at the top; the metadata and the arguments of the model's loader came later.
    nested = ("metadata", "model_from_pretrained_kwargs")
    parts = [config, _inner(config, nested[0])]
    parts += [_inner(part, nested[1]) for part in parts]
    items = [item for part in parts for item in part.items() if item[0] not in nested]
    # What is read was centred in training, but for models whose norms do not centre: the one key that depends on them.
    allowed = {key: of for key, of in _SAELENS.items() if key != "center_writing_weights" or key not in ignore}
    known = _known(items, allowed, _OLD_NAMES, _TRAINING.split(), ignore)
    architecture, k = known.get("architecture", "standard"), config.get("k")
    if known.get("activation_fn") == "topk":  # before version 6 it stood apart from the architecture
        if architecture == "jumprelu":
            raise _refused("activation_fn", "topk", "relu")
        architecture, old = "topk", (known.get("activation_fn_kwargs") or {}).get("k")
        if k is not None and old not in (None, k):
            raise _refused("activation_fn_kwargs", {"k": old}, f"k: {k}, as it stands beside it")
        k = old if k is None else k
    top_k, rescaled = architecture == "topk", known.get("rescale_acts_by_decoder_norm", False)
    if rescaled and not top_k:
        raise _refused("rescale_acts_by_decoder_norm", rescaled, f"false, of {architecture}")
    names = [name for key in ("hook_name", "hf_hook_name") if (name := known.get(key))]
    hook = names[0] if names else _folder_hook(folder)
    found = _point(hook, block, part)
    also = tuple(_point(name, None, None, "hf_hook_name") for name in names[1:])
    if any(other.block != found.block for other in also):
        raise _refused("hf_hook_name", names[1], f"the place of {hook}")
    number = re.search(r"\d+", hook, re.ASCII)  # not the point's block: that of resid_pre is the one before
    named = found.block if number is None else int(number[0])
    if known.get("hook_layer", named) != named:
        raise _refused("hook_layer", known["hook_layer"], f"the block of {hook or 'sae.block'}: {named}")
    return SaeConfig(
        architecture,
        _top_k(k) if top_k else None,
        known.get("apply_b_dec_to_input", True),
        rescaled,
        found,
        also,
        hook,
        known.get("d_in"),
        known.get("d_sae"),
    )


def sparsify_config(
    config: Mapping[str, Any],
    *,
    block: int | None = None,
    part: str | None = None,
    folder: Path | None = None,
    ignore: Collection[str] = (),
) -> SaeConfig:
    """What sparsify wrote; parameters and errors as in :func:`saelens_config`."""
    known = _known(config.items(), _SPARSIFY, {"hookpoint": "hook_name"}, _SPARSIFY_INERT, ignore)
    hook = known.get("hook_name") or _folder_hook(folder)
    width, features, times = (known.get(name) for name in ("d_in", "num_latents", "expansion_factor"))
    if not features:  # sparsify's own rule
        features = width * times if width and times else None
    point = _point(hook, block, part)
    return SaeConfig("topk", _top_k(known.get("k")), True, False, point, (), hook, width, features)


def _known(
    items: Collection[tuple[str, Any]],
    allowed: Mapping[str, _Allowed],
    old_names: Mapping[str, str],
    inert: Collection[str],
    ignore: Collection[str],
) -> dict[str, Any]:
    """The values of the keys that are computed with."""
    found: dict[str, Any] = {}
    unknown = {}
    for key, value in items:
        name = old_names.get(key, key)
        if name in allowed:
            if not allowed[name].fits(value):
                raise _refused(name, value, allowed[name].words, allowed[name].fix)
            if value is not None and found.setdefault(name, value) != value:
                raise _refused(name, f"{found[name]}, and {value}", "one value")
        elif name not in inert:
            unknown[key] = value
    if further := sorted(set(unknown) - set(ignore)):
        key = further[0]
        raise UserError(
            "the SAE's cfg.json has a key that is not known here",
            value=f"{key}: {unknown[key]}",
            rule="a key that could change the features is used or refused; supported: " + ", ".join(allowed),
            fix=f'if it changes nothing about the features: --set "sae.ignore=[{", ".join(further)}]"',
        )
    if stray := sorted(set(ignore) - set(unknown)):
        rule = "keys of the SAE's cfg.json that are not known here: " + (", ".join(unknown) or "there are none")
        fix = "leave it out of sae.ignore"
        raise UserError("sae.ignore names a key that is not to be ignored", value=", ".join(stray), rule=rule, fix=fix)
    return found


def _inner(config: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = config.get(key)
    if value is not None and not isinstance(value, Mapping):
        raise _refused(key, value, "a mapping of keys to values")
    return value or {}


def _top_k(k: Any) -> int:
    if not _is_whole(k) or k == 0:
        raise _refused("k", k, "the number of active features of topk: a whole number, at least 1")
    return int(k)


def _refused(key: str, value: object, rule: str, fix: str = _Allowed.fix) -> UserError:
    return UserError("this kind of SAE is not supported", value=f"{key}: {value}", rule=rule, fix=fix)


def refuse_unknown(ids: Sequence[int], features: int) -> None:
    """Raise a UserError that names the ids that an autoencoder of so many features does not have."""
    bad = [k for k in ids if not 0 <= k < features]
    refuse(bad, "the SAE has no such feature", rule=f"ids from 0 to {features - 1}", fix="check features.ids")


# --- which point ---------------------------------------------------------------------------------

# Names of a point in TransformerLens, and as a module of a transformers model: its output, as sparsify reads it
# (nnsight writes .output behind it). The two differ where a norm stands behind the module, as in Gemma-2.
_HOOK = rf"blocks\.(\d{{1,4}})\.hook_({RESID_POST}|{ATTN_OUT}|{MLP_OUT})"
_INPUT = r"blocks\.(\d{1,4})\.hook_resid_pre"  # the same tensor as the output of the block before
_MODULE = (
    r"(?:(?:base_model|model|transformer|gpt_neox|decoder|language_model|backbone)\.)*(?:layers|h)\.(\d{1,4})"
    r"((?:\.\w+)*)"
)
# A folder that is called so is a place in the model, and not the output of a block.
_PLACES = r"embed|wte|wpe|mlp|attn|attention|ffn|norm|lm_head|hook|transcoder|resid_(?:pre|mid)|(?:layer|layers|h)\.\d"


def _named(hook: str) -> Point | None:
    """The point that a hook names; None: it names something that is not read."""
    if named := re.fullmatch(_HOOK, hook, re.ASCII):
        return Point(int(named[1]), named[2])
    if before := re.fullmatch(_INPUT, hook, re.ASCII):
        return Point(int(before[1]) - 1) if int(before[1]) > 0 else None
    if module := re.fullmatch(_MODULE, hook, re.ASCII):
        part = module[2].removesuffix(".output").removeprefix(".")
        return None if re.search(r"(?:^|\.)inputs?$", part) else Point(int(module[1]), part or RESID_POST)
    return None


def _point(hook: str, block: int | None, part: str | None, key: str = "hook_name") -> Point:
    """The point that the hook names; where it names none, the one that was asked for."""
    found = _named(hook)
    if found is None and hook:
        rule = "blocks.N.hook_resid_post, hook_resid_pre (N > 0), hook_attn_out, hook_mlp_out; or a module's output: "
        raise _refused(key, hook, rule + "layers.N, layers.N.mlp", "use an SAE of one of these")
    if found is None:
        if block is None:
            rule, fix = "blocks.N.hook_resid_post or layers.N", "set sae.block"
            raise UserError("the SAE does not say which block it reads", rule=rule, fix=fix)
        return Point(block, part or RESID_POST)
    if block not in (None, found.block):
        rule, fix = "sae.block is the block that the SAE names, or is left out", f"set sae.block to {found.block}"
        raise UserError("the SAE was made for another block", value=f"{hook}, not block {block}", rule=rule, fix=fix)
    if part not in (None, found.part):
        rule, fix = "sae.point is the part that the SAE names, or is left out", f"set sae.point to {found.part}"
        raise UserError("the SAE was made for another part", value=f"{hook}, not {part}", rule=rule, fix=fix)
    return found


def _folder_hook(folder: Path | None) -> str:
    """The place in the model that a folder is named after, as sparsify does; empty where it is not."""
    if folder is None:
        return ""
    whole = folder.absolute()
    name = whole.parent.name if re.fullmatch(r"seed\d+", whole.name) else whole.name
    return name if _named(name) is not None or re.search(_PLACES, name, re.ASCII | re.IGNORECASE) else ""
