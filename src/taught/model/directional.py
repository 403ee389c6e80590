"""Forward mode: what a model computes, and how it changes along a step of its parameters, by dual numbers.

Attention runs without fused kernels, which have no forward mode.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

from taught.errors import UserError, out_of_memory


class _Held(nn.Module):
    """A model inside a module that calls something: ``functional_call`` gives the model other parameters meanwhile."""

    def __init__(self, model: nn.Module, compute: Callable[..., Any]) -> None:
        super().__init__()
        self.model, self._compute = model, compute

    def forward(self, *inputs: Any) -> Any:
        return self._compute(*inputs)


def computed(model: nn.Module, parameters: Mapping[str, Tensor], compute: Callable[..., Any], *inputs: Any) -> Any:
    """What ``compute`` makes of its inputs while the model has these parameters, by name."""
    named = {f"model.{name}": p for name, p in parameters.items()}
    with sdpa_kernel(SDPBackend.MATH):
        return functional_call(_Held(model, compute), named, inputs)


def along(model: nn.Module, step: Mapping[str, Tensor], compute: Callable[..., Any], *inputs: Any) -> tuple[Any, Any]:
    """What ``compute`` makes of its inputs with the model, and its derivative along a step of parameters, by name.

    Neither has a graph behind it: parameters that hooks add are not followed.
    """
    base = {name: model.get_parameter(name).detach() for name in step}
    # Every module's own parameters again: ``functional_call`` leaves its own in a module of two names.
    kept = [(module, dict(module._parameters)) for module in model.modules()]
    try:
        with torch.no_grad():
            values, moved = jvp(lambda p: computed(model, p, compute, *inputs), (base,), (dict(step),))[:2]
    finally:
        for module, own in kept:
            module._parameters.update(own)
    return values, moved


def refused(model: nn.Module, error: Exception, fix: str) -> UserError:
    """The error to raise where :func:`along` failed; memory that ran out is raised as it is."""
    if out_of_memory(error):
        raise error
    return UserError(
        "forward mode does not go through this model",
        value=f"{type(model).__name__}: {error}"[:200],
        rule="every step of the model has a derivative in forward mode",
        fix=fix,
    )
