"""Forward mode: what a model computes, and how it changes along a step of its parameters, by dual numbers.

Attention runs without fused kernels, which have no forward mode.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any, Protocol

from torch import Tensor, nn
from torch.func import functional_call, jvp
from torch.nn.attention import SDPBackend, sdpa_kernel

from taught.errors import UserError, out_of_memory


class Reader(Protocol):
    """A module that holds a model as ``model`` and computes something with it."""

    model: nn.Module

    def __call__(self, *inputs: Any) -> Any:
        """A tensor, or a tuple of tensors."""


def along(reader: Reader, step: Mapping[str, Tensor], *inputs: Any) -> tuple[Any, Any]:
    """What a reader computes, and its derivative along a step of the model's parameters, by name."""
    base = {f"model.{name}": reader.model.get_parameter(name).detach() for name in step}
    direction = {f"model.{name}": of for name, of in step.items()}
    assert isinstance(reader, nn.Module)
    with sdpa_kernel(SDPBackend.MATH), _parameters_kept(reader):
        values, moved = jvp(lambda p: functional_call(reader, p, inputs), (base,), (direction,))[:2]
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


@contextmanager
def _parameters_kept(model: nn.Module) -> Iterator[None]:
    """Every module's own parameters again on exit: ``functional_call`` leaves its own in a module of two names."""
    kept = [(module, dict(module._parameters)) for module in model.modules()]
    try:
        yield
    finally:
        for module, own in kept:
            module._parameters.update(own)
