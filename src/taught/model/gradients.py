"""Per-example gradients as factors, and inner products with them that never build the gradient.

For a linear layer with input a_t and output gradient d_t the gradient of one example is
``G = sum_t d_t a_t'`` (rank at most its number of tokens). An inner product needs no G:

    <G, Q>     = sum_t d_t' Q a_t                               against one given matrix Q
    <G_i, G_p> = sum_{s,t} (d_s . d_t)(a_s . a_t)               between two examples (Gram form)

For many Q, or many examples on both sides, building G for one layer at a time is cheaper; which way
is taken follows from counting multiplications, and both give the same number (tested). A tied
embedding has look-up and output uses; they meet in one parameter, and so do their factors here.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial, reduce
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn
from torch.func import functional_call

from taught.errors import UserError, refuse
from taught.model.kernels import outer_products, product
from taught.model.parameters import moving_parameters


@dataclass(frozen=True)
class Site:
    """One use of parameters in the model: a module and how its parameters enter.

    kind: "linear" (weight [out, in]), "linear_t" (weight [in, out]), "embedding" (weight [V, D]),
    "elementwise" (weight [D] times a normalised input).

    scale: factor on an embedding's rows (Gemma multiplies inside the module). padding: the row
    whose look-ups give no gradient in training (``torch.nn.Embedding``); it may be a real token, as
    the end of a turn is where it is also the padding token.
    """

    module: str
    kind: str
    weight: str | None
    bias: str | None
    scale: float = 1.0
    padding: int | None = None


@dataclass(frozen=True, eq=False)
class Factor:
    """What one parameter's gradient is made of, for a batch of examples.

    kind "linear": a [B, T, in], d [B, T, out]; "embedding": a int64 [B, T], d [B, T, D];
    "vector": a None, d [B, D], the per-example gradient itself.
    """

    param: str
    kind: str
    a: Tensor | None
    d: Tensor

    def examples(self, some: slice) -> Factor:
        """The same of some examples."""
        return replace(self, a=None if self.a is None else self.a[some], d=self.d[some])

    def double(self) -> Factor:
        """The same in float64; ids stay what they are."""
        a = self.a.double() if self.a is not None and self.a.is_floating_point() else self.a
        return replace(self, a=a, d=self.d.double())


def find_sites(model: nn.Module, parameters: Sequence[str] | None = None) -> list[Site]:
    """Every use of every parameter, or an error that names the parameters that are not understood.

    Parameters
    ----------
    parameters : Patterns of the parameters that move (``moving_parameters``); the others are left out, and need not be
        understood. None for all.

    Raises
    ------
    UserError
        A parameter belongs to a module of another kind (fused experts, convolutions, ...), or is used by another way
        than its module. Nothing is left out silently. A pattern matches nothing.

    Notes
    -----
    Runs a few tokens through a model of transformers, forward and backward, once for each choice of parameters.
    """
    names = {id(p): name for name, p in moving_parameters(model, parameters).items()}  # tied ones have one name
    sites, covered = [], set()
    for name, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        if not any(id(p) in names for p in own.values()):
            continue
        kind = _kind(module, own)
        if kind is None:
            continue
        weight = names.get(id(own["weight"])) if own.get("weight") is not None else None
        bias = names.get(id(own["bias"])) if own.get("bias") is not None else None
        scale, padding = embedding_options(module) if kind == "embedding" else (1.0, None)
        sites.append(Site(name, kind, weight, bias, scale, padding))
        covered |= {weight, bias}
    missing = sorted(set(names.values()) - covered)
    if missing:
        raise UserError(
            "some parameters are in modules whose gradients are not understood",
            value=missing[:5],
            rule="linear layers, embeddings and elementwise norms are covered",
            fix="use the finite-step estimator, or set attribution.parameters to leave them out",
        )
    if hasattr(model, "get_input_embeddings"):
        _refuse_other_uses(model, sites)
    return sites


# Sites of which it is known that they give the gradients of their model.
_SEEN: WeakKeyDictionary[nn.Module, set[tuple[Site, ...]]] = WeakKeyDictionary()
# What rounding may make of a gradient, relative to the largest one.
_ROUNDING = {torch.float64: 1e-6, torch.float32: 1e-3}


def _refuse_other_uses(model: Any, sites: Sequence[Site]) -> None:
    """Raise a UserError unless the sites give the gradients that autograd gives.

    A weight that is taken out of its module (LoRA on a parameter, a head that multiplies by the embedding) is seen in
    no call of it: its gradient would be zero, or a part of it. Memory: two gradients of one parameter at a time.
    """
    known = _SEEN.setdefault(model, set())
    if tuple(sites) in known:
        return
    every = dict(model.named_parameters())
    moving = {name: every[name] for site in sites for name in (site.weight, site.bias) if name is not None}
    kept = [(p, p.requires_grad, p.grad) for p in every.values()]
    rows = model.get_input_embeddings().weight.shape[0]
    ids = torch.linspace(0, rows - 1, min(8, rows)).long()[None].to(next(iter(every.values())).device)
    off: dict[str, float] = {}
    sizes: dict[str, float] = {}
    handles: list[Any] = []
    try:
        for name, p in every.items():
            p.requires_grad_(name in moving)
            p.grad = None
        with evaluating(model), torch.enable_grad(), tap(model, sites) as taps:
            logits = model(input_ids=ids).logits
            value = (logits * _random(*logits.shape, like=logits)).mean()
            factors = taps.factors_and(value, (), retain_graph=True, training=True)[0]

            def compare(name: str, p: nn.Parameter) -> None:
                own = torch.zeros_like(p)
                for factor in factors:
                    if factor.param == name:
                        accumulate(factor, own)
                assert p.grad is not None
                sizes[name], off[name] = float(p.grad.norm()), float((p.grad - own).norm())
                p.grad = None

            for name, p in moving.items():
                handles.append(p.register_post_accumulate_grad_hook(partial(compare, name)))
            value.backward()
    finally:
        for handle in handles:
            handle.remove()
        for p, flag, grad in kept:
            p.requires_grad_(flag)
            p.grad = grad
    allowed = max(sizes.values(), default=0.0) * _ROUNDING.get(logits.dtype, 0.1)
    unseen = {name for name in moving if name not in {factor.param for factor in factors}}
    refuse(
        sorted(n for n, by in off.items() if by > 0 and (n in unseen or not by <= max(allowed, 0.1 * sizes[n]))),
        "the gradients of some parameters are not seen where their modules are called",
        rule="a parameter is used by its own module and in no other way",
        fix="use the finite-step estimator, or set attribution.parameters to leave them out",
    )
    known.add(tuple(sites))


def _kind(module: nn.Module, own: Mapping[str, nn.Parameter]) -> str | None:
    if not set(own) <= {"weight", "bias"} or "weight" not in own:
        return None
    if isinstance(module, nn.Linear | nn.Embedding):
        kind = "linear" if isinstance(module, nn.Linear) else "embedding"
        return kind if type(module) in (nn.Linear, nn.Embedding) or _is_plain(module) else None
    if type(module).__name__ == "Conv1D" and own["weight"].ndim == 2:  # GPT-2's transposed linear
        return "linear_t"
    return "elementwise" if _is_elementwise(module, own) else None


def _random(*shape: int, like: Tensor) -> Tensor:
    """The same random numbers at every call; the caller's random state is left alone."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(like)


def _agree(a: Tensor, b: Tensor) -> bool:
    return bool(torch.allclose(a.float(), b.float(), rtol=1e-2, atol=1e-2))


@torch.no_grad()
def _is_plain(module: nn.Linear | nn.Embedding) -> bool:
    """Check a subclass on input: quantised or adapted layers compute something else.

    An embedding may multiply the rows that it looks up by one factor.
    """
    try:
        if isinstance(module, nn.Linear):
            x = _random(2, 3, module.in_features, like=module.weight)
            return _agree(module(x), nn.functional.linear(x, module.weight, module.bias))
        ids = torch.linspace(0, len(module.weight) - 1, 8, device=module.weight.device).long()[None]
        return _agree(module(ids), embedding_options(module)[0] * module.weight[ids])
    except Exception:
        return False


@torch.no_grad()
def embedding_options(module: nn.Module) -> tuple[float, int | None]:
    """Factor on the rows (what the module makes of rows of ones), and its padding row."""
    assert isinstance(module, nn.Embedding)
    if type(module) is nn.Embedding:
        return 1.0, module.padding_idx
    ones = module.weight.new_ones(()).expand_as(module.weight)
    first = torch.zeros(1, 1, dtype=torch.long, device=module.weight.device)
    return float(functional_call(module, {"weight": ones}, (first,))[0, 0, 0]), module.padding_idx


@torch.no_grad()
def _is_elementwise(module: nn.Module, own: Mapping[str, nn.Parameter]) -> bool:
    """Check that the module is affine in weight and bias, element by element.

    On random input and parameters: at the initial ones, a squared weight would go unnoticed.
    """
    weight = own["weight"]
    if weight.ndim != 1 or any(p.shape != weight.shape for p in own.values()):
        return False
    x, w, b = _random(5, len(weight), like=weight).split([3, 1, 1])

    def run(w: Tensor, b: Tensor) -> Tensor:
        return functional_call(module, {n: {"weight": w, "bias": b}[n] for n in own}, (x[None],))

    zero, one = torch.zeros_like(weight), torch.ones_like(weight)
    try:
        base = run(zero, zero)
        rebuilt = base + (run(one, zero) - base) * w[0] + (b[0] if "bias" in own else 0)
        return _agree(run(w[0], b[0]), rebuilt)
    except Exception:
        return False


def normalised(module: nn.Module, x: Tensor) -> Tensor:
    """d output / d weight of an elementwise module, shape of x: f(x; w = 1) - f(x; w = 0)."""
    weight = module.get_parameter("weight")
    one = functional_call(module, {"weight": torch.ones_like(weight)}, (x,))
    zero = functional_call(module, {"weight": torch.zeros_like(weight)}, (x,))
    return one - zero


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """No dropout; every module's own mode is restored on exit (also after an exception)."""
    modes = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, mode in modes:
            module.training = mode


@contextmanager
def frozen(model: nn.Module) -> Iterator[None]:
    """No gradients for weights and no dropout, restored on exit (also after an exception)."""
    flags = [(p, p.requires_grad) for p in model.parameters()]
    for p, _ in flags:
        p.requires_grad_(False)
    try:
        with evaluating(model):
            yield
    finally:
        for p, flag in flags:
            p.requires_grad_(flag)


@dataclass
class Taps:
    """Inputs and outputs of the tapped modules during one forward pass."""

    seen: list[tuple[Site, nn.Module, Tensor, Tensor]] = field(default_factory=list)
    recording: bool = True

    def factors(self, value: Tensor, *, retain_graph: bool = False, training: bool = False) -> Iterator[Factor]:
        """Factors of the gradient of ``value`` (a scalar: the sum over independent examples).

        With ``training`` the gradient is the one that an optimizer is given: look-ups of an
        embedding's padding row have none. Without it, it is the derivative.

        Only the part of the graph above the lowest tapped module is walked. Module uses that
        ``value`` does not depend on give nothing.
        """
        yield from self.factors_and(value, (), retain_graph=retain_graph, training=training)[0]

    def factors_and(
        self, value: Tensor, others: Sequence[Tensor], *, retain_graph: bool = False, training: bool = False
    ) -> tuple[list[Factor], list[Tensor]]:
        """The same, and the gradients of ``value`` by some other tensors of the graph."""
        self.recording = False  # norms are called again below
        outputs = [out for *_, out in self.seen]
        if not outputs and not others:
            return [], []
        batch = self.seen[0][2].shape[0] if self.seen else 0
        for site, _, x, out in self.seen:
            if out.ndim < 3 or x.shape[0] != batch:  # which example it is of would be unknown
                raise UserError(
                    "a module mixes the examples of a batch",
                    value=f"{site.module}: input {list(x.shape)}, output {list(out.shape)}",
                    rule=f"[batch, tokens, ...] with a batch of {batch}",
                    fix="use the finite-step estimator for this model",
                )
        grads = torch.autograd.grad(value, [*outputs, *others], retain_graph=retain_graph, allow_unused=True)
        factors: list[Factor] = []
        for (site, module, x, _), d in zip(self.seen, grads, strict=False):
            if d is not None:
                if training and site.padding is not None:
                    d = d * (x != site.padding).unsqueeze(-1)
                factors += _site_factors(site, module, x, d)
        return factors, list(grads[len(outputs) :])


def _site_factors(site: Site, module: nn.Module, x: Tensor, d: Tensor) -> Iterator[Factor]:
    if site.kind == "embedding":
        assert site.weight is not None
        yield Factor(site.weight, "embedding", x, d if site.scale == 1 else d * site.scale)
        return
    if site.kind == "elementwise":
        d = d.detach()
        if site.weight is not None:
            with torch.no_grad():
                yield Factor(site.weight, "vector", None, _sum_inner(d * normalised(module, x)))
        if site.bias is not None:
            yield Factor(site.bias, "vector", None, _sum_inner(d))
        return
    if site.weight is not None:
        a, out = (x.detach(), d) if site.kind == "linear" else (d, x.detach())
        yield Factor(site.weight, "linear", a, out)
    if site.bias is not None:
        yield Factor(site.bias, "vector", None, _sum_inner(d))


def _sum_inner(x: Tensor) -> Tensor:
    """Sum over all axes but the first and the last: [B, ..., D] -> [B, D]."""
    return x.flatten(1, -2).sum(1)


@contextmanager
def tap(model: nn.Module, sites: Sequence[Site]) -> Iterator[Taps]:
    """Record the tapped modules in the forward passes inside the block.

    The embedding's output is made the graph's leaf, so weights need no gradient (see ``frozen``).
    """
    taps = Taps()
    by_name = dict(model.named_modules())
    handles = []

    def watch(site: Site) -> Callable[[nn.Module, tuple[Any, ...], Tensor], None]:
        def hook(module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
            if taps.recording:
                taps.seen.append((site, module, args[0], output))

        return hook

    def leaf(_module: nn.Module, _args: Any, output: Tensor) -> None:
        if output.is_leaf:
            output.requires_grad_()

    try:
        for module in by_name.values():
            if isinstance(module, nn.Embedding):
                handles.append(module.register_forward_hook(leaf))
        for site in sites:
            handles.append(by_name[site.module].register_forward_hook(watch(site)))
        yield taps
    finally:
        for handle in handles:
            handle.remove()
        taps.seen.clear()


@dataclass(frozen=True, eq=False)
class RowSparse:
    """A [V, D] matrix of which only ``rows`` (int64 [R], ascending) may differ from zero.

    values [..., R, D]; ``slot`` int64 [V] gives the row's place in ``rows``, or -1.
    """

    rows: Tensor
    slot: Tensor
    values: Tensor


Query = Tensor | RowSparse

MEMORY_BOUND = 2.0
# Numbers that the gradients of a few examples at a time come to, and how few these may be.
_FEW, _FEWEST = 1 << 20, 4


def contract(factor: Factor, query: Query) -> Tensor:
    """<gradient of each example, each query>: [B, Q] for queries [Q, *param.shape].

    Cost for a linear factor: the smaller of Q B T out in (no gradient is built) and
    B (T + Q) out in (one layer's gradients are built, a few examples at a time).
    """
    d = factor.d.to((query.values if isinstance(query, RowSparse) else query).dtype)
    if factor.kind == "vector":
        assert isinstance(query, Tensor)
        return d @ query.T
    assert factor.a is not None
    if factor.kind == "embedding":
        if isinstance(query, Tensor):
            return torch.stack([(q[factor.a] * d).sum((1, 2)) for q in query], 1)
        slot = query.slot[factor.a]
        present = (slot >= 0).unsqueeze(-1)
        return torch.stack([(q[slot.clamp(min=0)] * d * present).sum((1, 2)) for q in query.values], 1)
    a = factor.a.to(d.dtype)
    if isinstance(query, RowSparse):
        whole = d.shape[-1] != len(query.rows)
        d, query = d[..., query.rows] if whole else d, query.values
    tokens, n = d.shape[1], len(query)
    if n * tokens <= 2 * (tokens + n):
        per_query = [((d @ q) * a).sum((1, 2)) for q in query]
        return torch.stack(per_query, 1)
    flat = query.flatten(1)
    step = max(_FEWEST, _FEW // flat.shape[1])
    return torch.cat([product(_gradient(d[b : b + step], a[b : b + step]), flat) for b in range(0, len(d), step)])


def _gradient(d: Tensor, a: Tensor) -> Tensor:
    """Per-example gradients of one linear layer, flattened: [B, out * in]."""
    out = d.new_empty(len(d), d.shape[-1], a.shape[-1])
    outer_products(d, a, out)
    return out.flatten(1)


def accumulate(factor: Factor, total: Query, weight: float = 1.0) -> None:
    """total += weight * (sum over the batch of the gradients); total has the parameter's shape."""
    if factor.kind == "vector":
        assert isinstance(total, Tensor)
        total.add_(factor.d.sum(0), alpha=weight)
        return
    assert factor.a is not None
    if factor.kind == "embedding":
        into = total.values if isinstance(total, RowSparse) else total
        ids, d = factor.a.flatten(), factor.d.flatten(0, 1).to(into.dtype)
        if isinstance(total, RowSparse):
            ids = total.slot[ids]
            if bool((ids < 0).any()):
                raise ValueError("a token is missing from the rows of a row-sparse gradient")
        into.index_add_(0, ids, d, alpha=weight)
        return
    a, d = factor.a.flatten(0, 1), factor.d.flatten(0, 1)
    if isinstance(total, RowSparse):
        raise TypeError("a linear use of a parameter needs a dense total")
    total.add_(product(d.T, a.T), alpha=weight)


Batches = Sequence[Sequence[Factor]]


def dot(left: Sequence[Factor], right: Sequence[Factor], *, scale: Tensor | None = None, room: int = 0) -> Tensor:
    """Inner products between all examples of two batches over one parameter: [B_left, B_right].

    ``left`` and ``right`` are the factors of the same parameter (several where it is used several
    times, as a tied embedding is). Gram form, but for vectors.

    Parameters
    ----------
    scale : one factor for each element of the gradients, in the parameter's shape; None for 1. Two linear uses have no
        Gram form with it: their gradients are built.
    room : Numbers that built gradients may take at a time; one example is always built
    """
    if all(f.kind == "vector" for f in (*left, *right)):
        built = _built([left])
        return product(built if scale is None else built * scale, _built([right]))
    if scale is None:
        return reduce(torch.add, [_gram(f, g) for f in left for g in right])
    return reduce(torch.add, [_scaled_dot(f, g, scale, room) for f in left for g in right])


def _scaled_dot(f: Factor, g: Factor, scale: Tensor, room: int) -> Tensor:
    """<scale * gradient, gradient> of two uses.

    A look-up of token v is row v of its gradient, and takes row v of the scale.
    """
    if f.kind == "embedding":
        assert f.a is not None
        return _gram(replace(f, d=f.d * scale[f.a].to(f.d)), g)
    if g.kind == "embedding":
        return _scaled_dot(g, f, scale, room).T
    assert f.a is not None
    step = max(1, room // scale.numel())
    rows = []
    for start in range(0, len(f.d), step):
        some = f.examples(slice(start, start + step))
        assert some.a is not None
        built = some.d.new_empty(len(some.d), *scale.shape)
        outer_products(some.d, some.a, built)
        rows.append(contract(g, built.mul_(scale)).T)
    return torch.cat(rows)


def dots(left: Batches, right: Batches, *, room: int, scale: Tensor | None = None) -> Tensor:
    """Inner products between all examples of many batches over one parameter.

    Either in Gram form or with the gradients built, whichever takes fewer multiplications; both are exact.

    Parameters
    ----------
    left, right : For each batch the parameter's factors
    room : Numbers that the built gradients may take at a time; one batch a side is always built
    scale : as in :func:`dot`; with it, linear gradients are always built

    Returns
    -------
    [examples on the left, examples on the right], batch after batch
    """
    kinds = {f.kind for batch in (*left, *right) for f in batch}
    building = kinds == {"vector"} or (kinds == {"linear"} and (scale is not None or _building_is_cheaper(left, right)))
    if not building:
        met = [[dot(a, b, scale=scale, room=room) for b in right] for a in left]
        return torch.cat([torch.cat(row, 1) for row in met])
    rows = []
    for some in _slices(left, room // 2):
        built = _built(some)
        if scale is not None:
            built.mul_(scale.flatten())
        rows.append(torch.cat([product(built, _built(s)) for s in _slices(right, room // 2)], 1))
    return torch.cat(rows)


def _examples(batch: Sequence[Factor]) -> int:
    return len(batch[0].d)


def _slices(batches: Batches, room: int) -> list[Batches]:
    """Neighbouring batches together, as many as fit."""
    out: list[list[Sequence[Factor]]] = []
    free = 0
    for batch in batches:
        f = batch[0]
        need = _examples(batch) * f.d.shape[-1] * (1 if f.a is None else f.a.shape[-1])
        if not out or need > free:
            out.append([])
            free = room
        out[-1].append(batch)
        free -= need
    return list(out)


def _built(batches: Batches) -> Tensor:
    """Per-example gradients of some batches, flattened: [examples, size of the parameter]."""
    f = batches[0][0]
    if f.a is None:
        return torch.cat([reduce(torch.add, [f.d for f in batch]) for batch in batches])
    out = f.d.new_empty(sum(map(_examples, batches)), f.d.shape[-1], f.a.shape[-1])
    start = 0
    for batch in batches:
        rows = out[start : (start := start + _examples(batch))]
        for number, factor in enumerate(batch):
            assert factor.a is not None
            if number == 0:
                outer_products(factor.d, factor.a, rows)
            else:
                rows += torch.bmm(factor.d.mT, factor.a)
    return out.flatten(1)


def _building_is_cheaper(left: Batches, right: Batches) -> bool:
    """Cost of the two exact forms in multiplications.

    Building and the thin product after it move as much memory as they compute, so one of their
    multiplications counts as ``MEMORY_BOUND`` of the Gram form's (measured on two CPU cores).
    """
    f = left[0][0]
    assert f.a is not None
    out, inp = f.d.shape[-1], f.a.shape[-1]
    n, m = (sum(map(_examples, side)) for side in (left, right))
    s, t = (sum(f.d.shape[0] * f.d.shape[1] for b in side for f in b) for side in (left, right))
    return bool(MEMORY_BOUND * out * inp * (n * m + s + t) < s * t * (out + inp))


def _gram(f: Factor, g: Factor) -> Tensor:
    """Gram form of the inner products of two uses: all tokens of all examples in two products.

    The entry for tokens s and t is (d_s . d_t)(a_s . a_t) for two output uses, (d_s . d_t) where
    the looked-up tokens agree for two look-ups, and d_s[token_t] (a_s . d_t) for one of each.
    """
    assert f.a is not None and g.a is not None
    if f.kind == "embedding" and g.kind == "linear":
        return _gram(g, f).T
    f_a, f_d, g_a, g_d = (x.flatten(0, 1) for x in (f.a, f.d, g.a, g.d))
    if f.kind == "embedding":
        table = (f_a[:, None] == g_a[None, :]) * product(f_d, g_d)
    elif g.kind == "embedding":
        table = f_d[:, g_a] * product(f_a, g_d)
    else:
        table = product(f_a, g_a).mul_(product(f_d, g_d))
    shape = (f.d.shape[0], f.d.shape[1], g.d.shape[0], g.d.shape[1])
    return table.view(shape).sum((1, 3))
