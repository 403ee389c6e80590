"""A LoRA adapter of the package peft on a loaded model: safetensors only.

The adapter's layers take the places of those that they adapt, and stay what they are: the weights
of ``lora_A`` and ``lora_B`` are parameters of plain linear layers, and no weights are merged.
"""

from __future__ import annotations

import fnmatch
import importlib.util
import json
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from safetensors import safe_open

from taught.errors import UserError
from taught.run.files import sha256_file

_CONFIG, _WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
# What training an adapter moves: its own layers, and the layers that it keeps whole copies of.
_PATTERNS = ("*lora_*", "*.modules_to_save.*")


def add_adapter(model: Any, adapter: str, revision: str | None = None) -> tuple[Any, dict[str, Any]]:
    """Put a LoRA adapter on a model, in the model's own precision.

    Parameters
    ----------
    adapter : folder with ``adapter_config.json`` and ``adapter_model.safetensors``, or hub id
    revision : branch, tag or commit on the hub

    Returns
    -------
    model : the same model with the adapter's layers in it
    weights : what identifies the adapter

    Raises
    ------
    UserError
        peft is missing; there is no such adapter; it is not a LoRA, or of another model.
    """
    if importlib.util.find_spec("peft") is None:
        raise UserError(
            "reading an adapter needs the package peft",
            value=adapter,
            rule="only where model.adapter is set",
            fix="pip install 'taught[peft]'",
        )
    from peft import PeftModel

    folder = _find(adapter, revision)
    try:
        kind = json.loads((folder / _CONFIG).read_text(encoding="utf-8")).get("peft_type")
    except (OSError, ValueError, AttributeError) as error:
        raise UserError(
            "the adapter's configuration cannot be read", value=f"{folder}: {error}", fix="save it with save_pretrained"
        ) from None
    if kind != "LORA":
        raise UserError(
            "the adapter is of another kind",
            value=kind,
            rule="LORA",
            fix="merge it into the model, and give the merged model as model.id",
        )
    first = next(model.parameters())
    try:
        wrapped = PeftModel.from_pretrained(
            model, str(folder), autocast_adapter_dtype=False, torch_device=str(first.device)
        )
    except (ValueError, RuntimeError, KeyError, TypeError) as error:
        raise _misfit(f"{adapter}: {error}") from error
    adapted = wrapped.get_base_model().to(device=first.device, dtype=first.dtype).eval()
    # peft only warns of layers of the adapter that the model lacks, and of new ones.
    with safe_open(folder / _WEIGHTS, framework="pt") as file:
        stored = sum("lora_" in name for name in file.keys())  # noqa: SIM118
    there = sum("lora_" in name for name, _ in adapted.named_parameters())
    if stored != there:
        raise _misfit(f"{stored} tensors in {_WEIGHTS}, {there} in the model")
    return adapted, {"source": adapter, "sha256": sha256_file(folder / _WEIGHTS)}


def adapter_patterns(model: Any) -> tuple[str, ...]:
    """Patterns of the parameters that an adapter brings along (``moving_parameters``)."""
    names = [name for name, _ in model.named_parameters()]
    return tuple(p for p in _PATTERNS if fnmatch.filter(names, p))


@contextmanager
def without_adapter(model: Any) -> Iterator[None]:
    """The model as it is without its adapter, where it has one; as before on exit."""
    if not hasattr(model, "peft_config"):
        yield
        return
    flags = [(p, p.requires_grad) for p in model.parameters()]
    model.disable_adapters()
    try:
        yield
    finally:
        model.enable_adapters()
        for p, flag in flags:
            p.requires_grad_(flag)


def _find(adapter: str, revision: str | None) -> Path:
    """The adapter's folder, fetched from the hub where it is not a local one."""
    folder = Path(adapter).expanduser()
    if not folder.is_dir() and not folder.is_absolute():
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


def _misfit(value: str) -> UserError:
    return UserError(
        "the adapter does not fit the model",
        value=value,
        rule="an adapter is put on the model that it was trained on",
        fix="set model.id to its base_model_name_or_path",
    )
