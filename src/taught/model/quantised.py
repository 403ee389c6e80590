"""Models whose linear layers hold codes of 4 or 8 bits (bitsandbytes): read as the plain matrices that codes stand for.

The products of bitsandbytes itself are not taken, since they are made for inference and for first derivatives:

- on CPUs with AVX512-BF16, a pass without gradients packs 4-bit weights anew, and passes after it cut the gradient off
  at every such layer without a word;
- 8-bit products round the inputs too. That has no derivative, and its limits depend on the other texts of a batch;
- none has second derivatives, or a forward mode.

So a layer computes x W' here, in the precision of x, and W is made of the codes anew at each use: no layer's plain
weights stay in memory. W is a constant: codes never move.
"""

from __future__ import annotations

import copy
import hashlib
import importlib
import importlib.util
import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from taught.errors import UserError, refuse
from taught.model.kernels import product

# As studies spell them; double: the scales are quantised too.
KINDS = ("nf4", "nf4-double", "fp4", "fp4-double", "int8")


def bitsandbytes_is_there() -> bool:
    """Whether the package is installed; then it is imported, without what it would fetch.

    On some CPUs it asks the package ``kernels`` for code from the hub when it is imported, as peft imports it.
    """
    if importlib.util.find_spec("bitsandbytes") is None:
        return False
    if "bitsandbytes" not in sys.modules:
        hub, said = sys.modules.get("kernels"), logging.getLogger("bitsandbytes.backends.cpu.ops")
        level = said.level
        sys.modules["kernels"] = None  # type: ignore[assignment]
        said.setLevel(logging.ERROR)  # it advises to install kernels
        try:
            importlib.import_module("bitsandbytes")
        finally:
            said.setLevel(level)
            del sys.modules["kernels"]
            if hub is not None:
                sys.modules["kernels"] = hub
    return True


def quantisation(config: Any, name: str, load_in: str | None) -> tuple[str | None, bool]:
    """How the linear layers of a model are held, one of :data:`KINDS` or None, and whether they were saved so.

    Parameters
    ----------
    config : the model's configuration, which says how its weights were saved
    load_in : what plain weights are to be quantised to

    Raises
    ------
    UserError
        The weights were quantised by something else than bitsandbytes, with settings that are not known, or otherwise
        than ``load_in`` says.
    """
    settings = []
    for part in (config, config.get_text_config()):
        given = getattr(part, "quantization_config", None) or getattr(part, "compression_config", None) or {}
        if not isinstance(given, dict):
            given = {"quant_method": type(given).__name__, **getattr(given, "to_dict", dict)()}
        settings.append(given)
    own, inner = settings
    found = own or inner
    if not found:
        return load_in, False
    method = found.get("quant_method")
    if method is None and any(found.get(key) for key in ("load_in_4bit", "load_in_8bit")):
        method = "bitsandbytes"  # as older versions saved it
    if method != "bitsandbytes" or not own:
        raise UserError(
            "the model's weights are quantised",
            value=f"{name}: {getattr(method, 'value', method)}",
            rule="plain weights, or those of bitsandbytes; adapters of quantised models fit the plain ones",
            fix="set model.id to the model that it was quantised from, or to a dequantised copy",
        )
    kind = _kind(found, name)
    if load_in not in (None, kind):
        raise UserError(
            "the model's weights are quantised otherwise",
            value=f"{name}: {kind}, model.load_in: {load_in}",
            rule="model.load_in quantises plain weights; what was saved quantised is read as it is",
            fix="leave out model.load_in, or set model.id to the model that it was quantised from",
        )
    return kind, True


def _kind(found: dict[str, Any], name: str) -> str:
    from transformers import BitsAndBytesConfig

    usual = BitsAndBytesConfig().to_dict()
    told = {**usual, **found}
    strange = {key: value for key, value in found.items() if key not in usual and value}
    kind = "int8" if told["load_in_8bit"] else told["bnb_4bit_quant_type"]
    if told["load_in_4bit"] and told["bnb_4bit_use_double_quant"]:
        kind = f"{kind}-double"
    if told["load_in_4bit"] == told["load_in_8bit"]:
        strange["load_in_4bit"] = told["load_in_4bit"]
    elif kind not in KINDS:
        strange["bnb_4bit_quant_type"] = kind
    if told["llm_int8_has_fp16_weight"]:
        strange["llm_int8_has_fp16_weight"] = True
    refuse(
        [f"{key}: {value}" for key, value in strange.items()],
        f"{name} is quantised in a way that is not understood",
        rule="weights are codes of " + ", ".join(KINDS),
        fix="set model.id to the model that it was quantised from, and model.load_in to one of these",
    )
    return str(kind)


def loading(kind: str, saved: bool, device: str) -> dict[str, Any]:
    """What ``from_pretrained`` is told to load a model of a kind, quantised now unless it was saved so.

    Raises
    ------
    UserError
        A package that this needs is missing.
    """
    missing = [] if bitsandbytes_is_there() else ["bitsandbytes"]
    missing += [] if importlib.util.find_spec("accelerate") else ["accelerate"]
    refuse(
        missing,
        "quantised weights need packages that are missing",
        rule="only where the model's weights are quantised",
        fix="pip install 'taught[quantised]'",
    )
    how: dict[str, Any] = {"device_map": "auto" if device == "auto" else {"": device}}
    if not saved:
        from transformers import BitsAndBytesConfig

        code, _, double = kind.partition("-")
        bits4 = {"load_in_4bit": True, "bnb_4bit_quant_type": code, "bnb_4bit_use_double_quant": bool(double)}
        how["quantization_config"] = BitsAndBytesConfig(**({"load_in_8bit": True} if kind == "int8" else bits4))
    return how


def quantised_layers(model: nn.Module) -> dict[str, Any]:
    """Linear layers that hold codes, by name."""
    package = sys.modules.get("bitsandbytes")
    if package is None:
        return {}
    kinds = (package.nn.Linear4bit, package.nn.Linear8bitLt)
    return {name: module for name, module in model.named_modules() if isinstance(module, kinds)}


def codes_record(model: nn.Module) -> dict[str, Any]:
    """What identifies a model's codes and scales: how many layers hold them, and a digest.

    Another device may quantise the same weights otherwise. Cost: reads all of them once.

    Raises
    ------
    UserError
        No layer holds any.
    """
    layers, digest = quantised_layers(model), hashlib.sha256()
    if not layers:
        raise UserError(
            "no layer of the model was quantised",
            value=type(model).__name__,
            rule="linear layers are, but the output; not experts that lie together in one tensor",
            fix="leave out model.load_in",
        )
    for name, layer in layers.items():
        for key, tensor in layer.state_dict().items():
            digest.update(f"{name}.{key} {tensor.dtype} {list(tensor.shape)}\n".encode())
            digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return {"layers": len(layers), "sha256": digest.hexdigest()}


# --- products with what the codes stand for ---------------------------------------------------------


def plain_weight(layer: Any, dtype: torch.dtype) -> Tensor:
    """The matrix [out, in] that a layer's codes stand for; in float64 the numbers of float32."""
    codes = layer.weight
    if codes.dtype == torch.int8:
        scale = layer.state.SCB if codes.SCB is None else codes.SCB
        return (codes.data * (scale.unsqueeze(1) / 127.0)).to(dtype)
    state = copy.copy(codes.quant_state)
    state.dtype = torch.float32 if dtype == torch.float64 else dtype
    plain: Tensor = sys.modules["bitsandbytes"].functional.dequantize_4bit(codes.data, state)
    return plain.to(dtype)


class _Product(torch.autograd.Function):
    """x W', or x W where it is turned, for the W of a layer; linear in x, so its derivatives are such products too."""

    @staticmethod
    def forward(x: Tensor, layer: Any, turned: bool) -> Tensor:
        weight = plain_weight(layer, x.dtype)
        return product(x, weight.T if turned else weight)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        _, ctx.layer, ctx.turned = inputs

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> Any:
        return _Product.apply(d, ctx.layer, not ctx.turned), None, None

    @staticmethod
    def jvp(ctx: Any, dx: Tensor, *_: None) -> Any:
        return _Product.apply(dx, ctx.layer, ctx.turned)


def _forward(layer: Any, x: Tensor) -> Tensor:
    out: Tensor = _Product.apply(x, layer, False)
    return out if layer.bias is None else out + layer.bias


def use_plain_weights(model: nn.Module) -> None:
    """Let layers that hold codes compute with what these stand for, from now on.

    Raises
    ------
    UserError
        Weights were packed anew for inference, which rounds their scales.
    """
    layers = quantised_layers(model)
    states = {name: getattr(layer.weight, "quant_state", None) for name, layer in layers.items()}
    packed = [name for name, state in states.items() if getattr(state, "packing_format_for_cpu", False)]
    refuse(
        packed,
        "the model's weights were packed anew for inference",
        rule="on this CPU bitsandbytes does so in the first pass without gradients, and rounds their scales",
        fix="load the model again, and give it before it has computed anything",
    )
    for layer in layers.values():
        setattr(layer, _place(layer), MethodType(_forward, layer))


@contextmanager
def plain_weights(model: nn.Module) -> Iterator[None]:
    """The same inside the block only: for a model that was given."""
    before = [(layer, _place(layer), vars(layer).get(_place(layer))) for layer in quantised_layers(model).values()]
    use_plain_weights(model)
    try:
        yield
    finally:
        for layer, place, own in before:
            delattr(layer, place)
            if own is not None:
                setattr(layer, place, own)


def _place(layer: Any) -> str:
    return "_old_forward" if hasattr(layer, "_hf_hook") else "forward"  # what accelerate's own forward calls
