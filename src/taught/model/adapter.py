"""A LoRA adapter of the package peft on a loaded model: safetensors only.

The adapter's layers take the places of those that they adapt, and stay what they are: the weights
of ``lora_A`` and ``lora_B`` are parameters of plain linear layers, and no weights are merged. What moves is what peft
itself marks as trainable, never what names look like.
"""

from __future__ import annotations

import importlib.util
import logging
import os
import warnings
from collections.abc import Collection, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import MISSING, fields
from pathlib import Path
from typing import Any

from taught.errors import UserError, out_of_memory, reading, refuse
from taught.model.load import find_wrapper, refuse_revision
from taught.model.parameters import flags_kept, is_plain
from taught.model.quantised import bitsandbytes_is_there, quantised_layers
from taught.run.files import read_json_mapping, sha256_folder

log = logging.getLogger(__name__)

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# Settings of a LoRA that its layers carry out by themselves; any other one that is set may mean another model.
_KNOWN = """
    peft_type task_type base_model_name_or_path revision inference_mode peft_version auto_mapping r lora_alpha
    lora_dropout use_rslora use_dora rank_pattern alpha_pattern bias lora_bias target_modules exclude_modules
    target_parameters layers_to_transform layers_pattern modules_to_save trainable_token_indices fan_in_fan_out
    init_lora_weights eva_config
"""
# Kinds that put tokens in front of the input or beside its keys, and change no weight.
_PROMPTS = ("PROMPT_TUNING", "MULTITASK_PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "ADAPTION_PROMPT", "CPT")
# First weights that leave the base model as it is; the others (PiSSA, OLoRA, LoftQ, ...) change it.
_PLAIN_STARTS = (True, False, None, "gaussian", "orthogonal", "eva")


def add_adapter(
    model: Any, adapter: str, revision: str | None = None, *, of: Collection[str | None] = ()
) -> tuple[Any, tuple[str, ...], dict[str, Any]]:
    """Put a LoRA adapter on a model, in the model's own precision.

    Parameters
    ----------
    adapter : folder with ``adapter_config.json`` and ``adapter_model.safetensors``, or hub id
    revision : branch, tag or commit on the hub
    of : the names of the model's own revision: what was asked for, and the commit

    Returns
    -------
    model : the same model with the adapter's layers in it
    moving : names of the parameters that training the adapter moves
    weights : what identifies the adapter: its weights and its configuration

    Raises
    ------
    UserError
        peft is missing; there is no such adapter; it is not a LoRA, or one of which peft changes the base model;
        it is of another model.
    """
    if importlib.util.find_spec("peft") is None:
        raise UserError(
            "reading an adapter needs the package peft",
            value=adapter,
            rule="only where model.adapter is set",
            fix="pip install 'taught[peft]'",
        )
    bitsandbytes_is_there()
    from peft import PeftModel
    from peft.utils.save_and_load import load_peft_weights, set_peft_model_state_dict

    folder = _find(adapter, revision)
    config = _read_config(folder)
    device = str(next(model.parameters()).device)
    with warnings.catch_warnings(record=True) as said:
        warnings.simplefilter("always")
        try:
            wrapped = PeftModel.from_pretrained(
                model, str(folder), autocast_adapter_dtype=False, torch_device=device, is_trainable=True
            )
            found: Any = set_peft_model_state_dict(wrapped, load_peft_weights(str(folder), device=device))
        except Exception as error:  # peft raises what its own code stumbles over
            if out_of_memory(error):
                raise
            raise _misfit(f"{adapter}: {error}", ", or save the adapter again with save_pretrained") from error
    for warning in said:
        if not issubclass(warning.category, DeprecationWarning | FutureWarning | PendingDeprecationWarning):
            log.warning("peft says of %s: %s", adapter, warning.message)
    moving = trainable(wrapped)
    absent = [name for name in found.missing_keys if name in moving]
    plain = [{key.replace(".default", "") for key in keys} for keys in (absent, found.unexpected_keys)]
    wrapper = find_wrapper(*plain) if all(plain) else None
    if wrapper is not None:
        file = str(folder / _WEIGHTS)
        raise UserError(
            "the names of the adapter's weights are not the model's",
            value=f"{min(plain[1])}, {len(plain[1])} like it",
            rule=f"names without {wrapper!r}, which is of a wrapper that the adapter was saved in",
            fix='python -c "from safetensors.torch import load_file, save_file; '
            f"save_file({{k.replace({wrapper!r}, ''): v for k, v in load_file({file!r}).items()}}, {file!r}, "
            "metadata={'format': 'pt'})\"",
        )
    if absent or found.unexpected_keys:
        raise _misfit(
            f"{len(absent)} tensors are not in {_WEIGHTS}, {len(found.unexpected_keys)} there are not in the model: "
            + ", ".join([*absent, *found.unexpected_keys][:4])
        )
    own = str(model.config.name_or_path)
    weights = {"source": adapter, "sha256": sha256_folder(folder)}
    if (base := _other_base(config, own, of)) is not None:
        log.warning("the adapter %s was trained on %s; it is put on %s", adapter, base, own)
        weights["trained_on"] = base
    adapted = wrapped.get_base_model().eval()
    moving = trainable(adapted)
    if quantised_layers(adapted):
        in_precision(adapted, moving)
    elif getattr(adapted, "hf_device_map", None) is None:
        adapted.to(device)
    return adapted, moving, weights


def _other_base(config: dict[str, Any], own: str, of: Collection[str | None]) -> str | None:
    """What an adapter was trained on, where that is not the model of this name and these revisions."""
    base, revision = str(config.get("base_model_name_or_path") or ""), config.get("revision")
    if base and Path(base).name.lower() != Path(own).name.lower():
        return base
    if os.path.isabs(base) and os.path.isdir(base) and os.path.isdir(own) and not os.path.samefile(base, own):
        return base
    return f"{base or own} at revision {revision}" if revision not in (None, "main", *of) else None


def in_precision(model: Any, moving: Iterable[str]) -> None:
    """Hold some parameters in the precision of the model: peft makes those on layers of codes in float32."""
    dtype = next(p.dtype for p in model.parameters() if is_plain(p))
    for name in moving:
        p = model.get_parameter(name)
        p.data = p.data.to(dtype)


def trainable(model: Any) -> tuple[str, ...]:
    """Names of the parameters that ask for gradients: in a model with an adapter, those that peft trains."""
    return tuple(name for name, p in model.named_parameters() if p.requires_grad)


def given_adapter(model: Any) -> tuple[Any, tuple[str, ...] | None]:
    """A model that was given, without the wrapper of peft, and what training its adapter moves; None: it has none.

    Raises
    ------
    UserError
        The adapter is no LoRA, or it is frozen, so that what it trains is not known.
    """
    configs = getattr(model, "peft_config", None)
    if not configs:
        return model, None
    kinds = sorted({str(getattr(config.peft_type, "value", config.peft_type)) for config in configs.values()})
    if kinds != ["LORA"]:
        raise UserError("the adapter is of another kind", value=kinds, rule="LORA", fix="merge it into its model")
    plain = model.get_base_model() if hasattr(model, "get_base_model") else model
    moving = trainable(plain)
    if not moving:
        raise UserError(
            "the given model's adapter is frozen",
            value=type(model).__name__,
            rule="what moves is what asks for gradients",
            fix="load it by PeftModel.from_pretrained(..., is_trainable=True)",
        )
    return plain, moving


def _read_config(folder: Path) -> dict[str, Any]:
    """The adapter's configuration, if all of it is understood."""
    from peft import LoraConfig

    with reading("the adapter's configuration cannot be read", folder, fix="save it with save_pretrained"):
        config = read_json_mapping(folder / _CONFIG)
    merge = "merge it into its model (merge_and_unload of peft), and give the merged model as model.id"
    kind = config.get("peft_type")
    if kind != "LORA":
        fix = "train a LoRA instead: this kind cannot be merged into a model" if kind in _PROMPTS else merge
        raise UserError("the adapter is of another kind", value=kind, rule="LORA", fix=fix)
    usual = {f.name: f.default if f.default is not MISSING else None for f in fields(LoraConfig)}
    known = _KNOWN.split()
    refuse(
        sorted(k for k, v in config.items() if k not in known and v and v != usual.get(k)),
        "the adapter has settings that are not understood",
        rule="plain LoRA, or DoRA; each setting may mean another model",
        fix=merge,
    )
    start = config.get("init_lora_weights")
    if start not in _PLAIN_STARTS:
        raise UserError(
            "the adapter changes the base model before it is put on",
            value=f"init_lora_weights: {start}",
            rule="the base model stays as it was loaded",
            fix=merge,
        )
    return config


@contextmanager
def without_adapter(model: Any) -> Iterator[None]:
    """The model as it is without its adapter, where it has one; as before on exit.

    Raises
    ------
    UserError
        The adapter has biases of its own: they are in the places of the model's.
    """
    configs = getattr(model, "peft_config", {})
    if not configs:
        yield
        return
    from peft.tuners.tuners_utils import BaseTunerLayer
    from peft.utils.other import AuxiliaryTrainingWrapper

    if biased := [c.bias for c in configs.values() if getattr(c, "bias", "none") != "none"]:
        raise UserError(
            "the model without its adapter is not at hand",
            value=f"bias: {biased[0]}",
            rule="the adapter's biases are in the places of the model's",
            fix="give the reference with the data: ref_chosen_logps and ref_rejected_logps",
        )
    layers = [m for m in model.modules() if isinstance(m, BaseTunerLayer | AuxiliaryTrainingWrapper)]
    with flags_kept(model.parameters()):
        for layer in layers:
            layer.enable_adapters(False)
        try:
            yield
        finally:
            for layer in layers:
                layer.enable_adapters(True)


def _find(adapter: str, revision: str | None) -> Path:
    """The adapter's folder, fetched from the hub where it is not a local one."""
    folder = Path(adapter).expanduser()
    if folder.is_dir():
        refuse_revision(folder, revision)
    elif not folder.is_absolute():
        from huggingface_hub import snapshot_download

        try:
            folder = Path(snapshot_download(adapter, revision=revision, allow_patterns=[_CONFIG, _WEIGHTS]))
        except Exception as error:
            raise UserError(
                "the adapter cannot be fetched from the hub",
                value=f"{adapter}: {error}",
                rule="network access, or the adapter in the Hugging Face cache",
                fix="check the id, or give a local folder as model.adapter",
            ) from error
    for name in (_CONFIG, _WEIGHTS):
        if not (folder / name).is_file():
            raise UserError(
                "there is no such adapter",
                value=str(folder / name),
                rule=f"{_CONFIG} and {_WEIGHTS}; a pickle (*.bin) is never opened",
                fix="save it with save_pretrained(..., safe_serialization=True)",
            )
    return folder


def _misfit(value: str, otherwise: str = "") -> UserError:
    return UserError(
        "the adapter does not fit the model",
        value=value,
        rule="an adapter is put on the model that it was trained on",
        fix=f"set model.id to its base_model_name_or_path{otherwise}",
    )
