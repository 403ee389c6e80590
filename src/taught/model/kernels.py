"""Matrix products in float32 on CPUs by oneDNN, which torch carries but uses for bf16 only.

torch's float32 products go to MKL, which runs at about half speed on CPUs of other makers
(measured: benchmarks/kernels.py). oneDNN computes the same sums in another order, so results agree
to float32 rounding. Where the operator is missing, fails or disagrees on a small trial, torch's own
product is taken; :func:`products_by` says which one it is, and a run's manifest records it.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import lru_cache
from time import perf_counter
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from taught.errors import UserError

# With fewer multiplications a matrix, torch's products of many at once are faster (measured).
_SMALL = 1 << 19


@lru_cache(maxsize=1)
def _onednn() -> Callable[[Tensor, Tensor, Tensor | None], Tensor] | None:
    """The operator x W' + b for float32 on the CPU, or None where it cannot be relied on."""
    try:
        operator: Any = torch.ops.mkldnn._linear_pointwise
        draw = torch.Generator().manual_seed(0)
        x, w, b, d = (torch.randn(*s, generator=draw) for s in ((2, 5, 7), (3, 7), (3,), (5, 3)))

        def product(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
            out: Tensor = operator(x, weight, bias, "none", [], "")
            return out

        agree = torch.allclose(product(x, w, b), nn.functional.linear(x, w, b), atol=1e-5)
        turned = torch.allclose(product(d.T, x[0].T, None), d.T @ x[0], atol=1e-5)
    except Exception:
        return None
    return product if agree and turned else None


def products_by() -> str:
    """What computes float32 products on the CPU: ``oneDNN`` or ``torch``."""
    return "oneDNN" if _onednn() else "torch"


def refuse_rounded_products(model: nn.Module) -> None:
    """Refuse float32 products that round their factors to bfloat16 or TF32, as scripts of training ask of torch.

    Raises
    ------
    UserError
        The model has float32 weights, and where the first lies 1 + 2^-20 times 1 is something else: by
        ``torch.autocast``, by torch's setting of float32 products, or by a default type of tensors that is shorter.

    Notes
    -----
    Tried on a product of 64 by 64, about 20 microseconds: torch has an old and a new way to set it, one refuses to be
    read where the other was used, and a backend may not follow either.
    """
    weights = (p for p in model.parameters() if p.dtype == torch.float32 and p.device.type != "meta")
    if (weight := next(weights, None)) is None:
        return
    one = torch.eye(64, dtype=torch.float32, device=weight.device)
    x = torch.full_like(one, 1 + 2.0**-20)
    exact = torch.equal((x @ one).float(), x)
    if not exact or torch.get_default_dtype().itemsize < x.dtype.itemsize:
        raise UserError(
            "products of float32 matrices are rounded here",
            rule="influence is a small difference: TF32 and bfloat16 keep 3 digits of each factor, float32 7",
            fix="leave torch.autocast; call torch.set_float32_matmul_precision('highest') and "
            "torch.set_default_dtype(torch.float32)",
        )


def _applies(x: Tensor, y: Tensor) -> bool:
    return (
        x.dtype == y.dtype == torch.float32
        and x.device.type == y.device.type == "cpu"
        and min(x.numel(), y.numel()) > 0
        and _onednn() is not None
    )


def _dense(x: Tensor) -> Tensor:
    """The same matrix; copied unless it or its transpose lies without gaps (oneDNN crawls then)."""
    dense = x.is_contiguous() or (x.ndim == 2 and x.T.is_contiguous())
    return x if dense else x.contiguous()


def product(x: Tensor, weight: Tensor, bias: Tensor | None = None) -> Tensor:
    """x W' + b, for x [..., k] and W [n, k]; not recorded by autograd when oneDNN computes it."""
    if _applies(x, weight):
        return _onednn()(_dense(x), _dense(weight), bias)  # type: ignore[misc]
    return nn.functional.linear(x, weight, bias)


def product_rate(like: Tensor, seconds: float = 0.1) -> float:
    """Floating point operations a second that one product of matrices runs at, here and now.

    Parameters
    ----------
    like : [n, k]
        A weight of the model: its device and precision, its size up to 1024.
    seconds : Least time that the last measurement takes; all together at most four times as long, unless a single
        product takes longer
    """
    n, k = (min(size, 1024) for size in like.shape)
    weight, x = like.detach().new_ones(n, k), like.detach().new_ones(512, k)
    _ = product(x, weight)[0, 0].item()  # the first one is slower; item() waits for the device
    repeats = 1
    while True:
        started = perf_counter()
        for _ in range(repeats):
            out = product(x, weight)
        _ = out[0, 0].item()
        if (passed := perf_counter() - started) >= seconds:
            return 2.0 * len(x) * n * k * repeats / passed
        repeats *= 2


def outer_products(d: Tensor, a: Tensor, out: Tensor) -> None:
    """out [B, m, n]: the outer products of d [B, T, m] and a [B, T, n], summed over tokens."""
    if d.shape[1] * d.shape[2] * a.shape[2] < _SMALL or not _applies(d, a):
        torch.bmm(d.mT, a, out=out)
        return
    for row, x, y in zip(out, d, a, strict=True):
        row.copy_(product(x.T, y.T))


class _Linear(torch.autograd.Function):
    """x W' + b with its derivatives in reverse and forward mode; higher orders by torch's own."""

    @staticmethod
    def forward(x: Tensor, weight: Tensor, bias: Tensor | None) -> Tensor:
        return product(x, weight, bias)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
        x, weight, _ = inputs
        needs_x = weight.requires_grad or x.requires_grad
        ctx.save_for_backward(x if weight.requires_grad else None, weight if needs_x else None)
        ctx.save_for_forward(x, weight)

    @staticmethod
    def backward(ctx: Any, d: Tensor) -> Any:
        x, weight = ctx.saved_tensors
        to_x, to_weight, to_bias = ctx.needs_input_grad
        times = nn.functional.linear if torch.is_grad_enabled() else product
        return (
            times(d, weight.T) if to_x else None,
            times(d.flatten(0, -2).T, x.flatten(0, -2).T) if to_weight else None,
            d.flatten(0, -2).sum(0) if to_bias else None,
        )

    @staticmethod
    def jvp(ctx: Any, dx: Tensor | None, dw: Tensor | None, db: Tensor | None) -> Any:
        x, weight = ctx.saved_tensors
        terms = [] if dx is None else [nn.functional.linear(dx, weight)]
        terms += [] if dw is None else [nn.functional.linear(x, dw)]
        total = sum(terms[1:], terms[0]) if terms else x.new_zeros(*x.shape[:-1], len(weight))
        return total if db is None else total + db


# torch binds the arguments by the signature at every call, and makes it each time where it is not there.
_Linear.forward.__signature__ = inspect.signature(_Linear.forward)  # type: ignore[attr-defined]


def _forward(module: nn.Linear, x: Tensor) -> Tensor:
    if not _applies(x, module.weight) or x.ndim < 2:
        return nn.functional.linear(x, module.weight, module.bias)
    out: Tensor = _Linear.apply(x, module.weight, module.bias)
    return out


def use_fast_products(model: nn.Module) -> None:
    """Let the model's plain linear layers compute by :func:`product`, from now on.

    Parameters, hooks, names and gradients stay as they are. Subclasses of ``nn.Linear`` (quantised,
    adapted) are left alone.
    """
    if _onednn() is None:
        return
    for module in model.modules():
        if type(module) is nn.Linear and not hasattr(module, "_hf_hook"):  # accelerate's own forward
            module.forward = MethodType(_forward, module)  # type: ignore[method-assign]
