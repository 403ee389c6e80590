"""Float32 products by oneDNN: the same numbers and derivatives as torch's own."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

from taught.errors import UserError
from taught.model import kernels
from taught.model.gradients import evaluating
from taught.model.kernels import product, use_fast_products
from tiny_models import tiny_llama

needs_onednn = pytest.mark.skipif(
    kernels.products_by() != "oneDNN", reason="this build of torch has no oneDNN operator"
)


def draw(*shape: int, dtype: torch.dtype = torch.float32) -> torch.Tensor:
    generator = torch.Generator().manual_seed(len(shape))
    return torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype)


def layer(bias: bool, *, fast: bool) -> nn.Linear:
    module = nn.Linear(7, 5, bias=bias)
    with torch.no_grad():
        module.weight.copy_(draw(5, 7))
        if bias:
            module.bias.copy_(draw(5))
    if fast:
        use_fast_products(module)
    return module


@pytest.mark.parametrize("turned", [False, True])
def test_product_equals_the_sum_of_products_in_float64(turned: bool) -> None:
    x, w = draw(3, 4, 7), draw(5, 7)
    if turned:
        x, w = draw(7, 4, 3).mT.contiguous().mT.transpose(0, 2), draw(7, 5).T
    expected = torch.einsum("...k,nk->...n", x.double(), w.double())
    assert torch.allclose(product(x, w).double(), expected, atol=1e-5)


@pytest.mark.parametrize("small", [0, 1 << 19])
def test_outer_products_are_summed_over_tokens(small: int, monkeypatch) -> None:
    monkeypatch.setattr(kernels, "_SMALL", small)
    d, a, out = draw(3, 4, 7), draw(3, 4, 5) + 1, draw(3, 7, 5)
    kernels.outer_products(d, a, out)
    expected = torch.einsum("btm,btn->bmn", d.double(), a.double())
    assert torch.allclose(out.double(), expected, atol=1e-5)


@needs_onednn
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("frozen", [False, True])
def test_gradients_equal_those_of_torchs_linear_layer(bias: bool, frozen: bool) -> None:
    found = []
    for fast in (False, True):
        module, x = layer(bias, fast=fast), draw(2, 3, 7).requires_grad_()
        module.weight.requires_grad_(not frozen)
        inputs = [x, *(p for p in module.parameters() if p.requires_grad)]
        found.append(torch.autograd.grad(module(x).pow(2).sum(), inputs))
    for plain, fast in zip(*found, strict=True):
        assert torch.allclose(plain, fast, atol=1e-4)


@needs_onednn
def test_forward_mode_and_second_derivatives_pass_through() -> None:
    module, x = layer(True, fast=True), draw(2, 3, 7)

    def function(x: torch.Tensor) -> torch.Tensor:
        return module(x).tanh().sum()

    direction = draw(2, 3, 7)
    _, tangent = torch.func.jvp(function, (x,), (direction,))
    leaf = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(function(leaf), leaf, create_graph=True)
    assert torch.allclose(tangent, (grad * direction).sum(), atol=1e-4)
    (second,) = torch.autograd.grad((grad * direction).sum(), leaf)
    plain = layer(True, fast=False)
    other = x.clone().requires_grad_()
    (grad,) = torch.autograd.grad(plain(other).tanh().sum(), other, create_graph=True)
    (expected,) = torch.autograd.grad((grad * direction).sum(), other)
    assert torch.allclose(second, expected, atol=1e-4)


@needs_onednn
def test_a_whole_model_gives_the_same_logits_and_keeps_its_parameters() -> None:
    model = tiny_llama().float()
    fast = copy.deepcopy(model)
    use_fast_products(fast)
    ids = torch.arange(12).view(2, 6)
    assert torch.allclose(model(ids).logits, fast(ids).logits, atol=1e-5)
    assert list(model.state_dict()) == list(fast.state_dict())


@needs_onednn
def test_other_dtypes_and_subclasses_take_torchs_own_way(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = []
    real = kernels._onednn()
    monkeypatch.setattr(kernels, "_onednn", lambda: lambda *a: (calls.append(1), real(*a))[1])
    module = layer(True, fast=True)
    module(draw(2, 7))
    assert len(calls) == 1
    module.double()(draw(2, 7, dtype=torch.float64))

    class Scaled(nn.Linear):
        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return 2 * super().forward(x)

    scaled = Scaled(7, 5)
    before = scaled(draw(2, 7))
    use_fast_products(scaled)
    assert torch.equal(scaled(draw(2, 7)), before)
    assert len(calls) == 1


def test_without_the_operator_torchs_own_product_is_taken(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(kernels, "_onednn", lambda: None)
    module = layer(False, fast=True)
    assert "forward" not in vars(module)
    assert kernels.products_by() == "torch"
    assert torch.equal(product(draw(2, 7), module.weight), module(draw(2, 7)))


def test_products_that_are_rounded_are_refused() -> None:
    module = nn.Linear(3, 3)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        for other in (module.double(), module.bfloat16(), nn.Linear(3, 3, device="meta"), nn.ReLU()):
            kernels.refuse_rounded_products(other)  # float32 alone is rounded
        module.float()
        with pytest.raises(UserError, match="float32"), evaluating(module):
            pass
    torch.set_default_dtype(torch.bfloat16)
    try:
        with pytest.raises(UserError, match="set_default_dtype"):
            kernels.refuse_rounded_products(module)
    finally:
        torch.set_default_dtype(torch.float32)
    with evaluating(module):
        assert not module.training


def test_rounding_is_seen_whichever_way_it_was_asked_for() -> None:
    before = torch.get_float32_matmul_precision()
    try:
        torch.set_float32_matmul_precision("medium")
        x = torch.full((256, 256), 1 + 2.0**-20)
        rounded = not torch.equal(product(x, torch.eye(256)), x)  # not every CPU has such products
        if rounded:
            with pytest.raises(UserError, match="set_float32_matmul_precision"):
                kernels.refuse_rounded_products(nn.Linear(3, 3))
        else:
            kernels.refuse_rounded_products(nn.Linear(3, 3))
    finally:
        torch.set_float32_matmul_precision(before)
