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

from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, field, replace
from functools import partial, reduce
from math import isfinite
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from taught.errors import UserError, out_of_memory, refuse
from taught.model.kernels import outer_products, product, refuse_rounded_products
from taught.model.layout import accepts, first_device, text_config
from taught.model.parameters import flags_kept, moving_parameters

# Relative, beside rounding: a use that is not seen leaves out much of a gradient.
_MISREAD = {torch.bfloat16: 0.1, torch.float16: 0.05}


@dataclass(frozen=True)
class Site:
    """One use of parameters in the model: a module and how its parameters enter.

    kind: "linear" (weight [out, in]), "linear_t" (weight [in, out]), "embedding" (weight [V, D]),
    "elementwise" (weight [D] times a normalised input), "whole" (any other use: fused experts, convolutions,
    recurrent blocks; autograd gives the parameter's gradient, which is that of one example at a time).

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
    "vector": a None, d [B, size of the parameter], the per-example gradient itself.
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
        DoRA; a parameter holds codes of quantised weights, or is an embedding of an unknown kind. A pattern matches
        nothing. Nothing is left out silently.
    """
    refuse_detached(model)
    names = {id(p): name for name, p in moving_parameters(model, parameters).items()}  # tied ones have one name
    sites = []
    for name, module in model.named_modules():
        own = dict(module.named_parameters(recurse=False))
        kind = _kind(module, own) if any(id(p) in names for p in own.values()) else None
        if kind is not None:
            weight, bias = (names.get(id(own.get(part))) for part in ("weight", "bias"))
            options = embedding_options(module) if kind == "embedding" else (1.0, None)
            sites.append(Site(name, kind, weight, bias, *options))
    misread = _misread(model, sites)
    sites = uses_of(set(names.values()) - misread, sites)
    covered = {name for site in sites for name in (site.weight, site.bias)}
    others = {id(p): name for name, p in model.named_parameters() if name in set(names.values()) - covered}
    missing = []
    for name, module in model.named_modules():
        for own, p in module.named_parameters(recurse=False):
            if (whole := others.pop(id(p), None)) is None:
                continue
            if isinstance(module, nn.Embedding) and module.padding_idx is not None:
                missing.append(f"{name}.{own}".removeprefix("."))  # which look-ups give no gradient is not known
            sites.append(Site(name, "whole", whole, None))
    if missing:
        raise UserError(
            "some parameters are in modules whose gradients are not understood",
            value=sorted(missing)[:5],
            rule="embeddings with a padding token look rows up and scale them",
            fix="use the finite-step estimator, or set attribution.parameters to leave them out",
        )
    return sites


def uses_of(parameters: Collection[str], sites: Sequence[Site]) -> list[Site]:
    """The uses of some parameters among all uses."""
    some = (
        replace(s, weight=s.weight if s.weight in parameters else None, bias=s.bias if s.bias in parameters else None)
        for s in sites
    )
    return [site for site in some if site.weight or site.bias]


def refuse_detached(model: Any) -> None:
    """Raise a UserError where a model's own derivative is not that of what it computes.

    DoRA divides by a norm of its weights that it holds constant in derivatives, and that a step changes.
    """
    refuse(
        [name for name, m in model.named_modules() if type(m).__module__ == "peft.tuners.lora.dora"],
        "DoRA hides a part of its change from derivatives",
        rule="every other estimator follows derivatives; a finite step takes the change itself",
        fix="use --set attribution.estimator=finite-step",
    )


_AT_ONCE = 1 << 28  # numbers of gradients that are held while they are compared
_CHECKED = "_taught_misread"  # on the model: what was checked, and what came out


def _misread(model: nn.Module, sites: Sequence[Site]) -> frozenset[str]:
    """Parameters whose gradient is another one than their modules' inputs and outputs say.

    A weight may be used without its module, as state space layers use some, or be made of something else before.
    Compared with autograd on six tokens, once a model. Cost: a forward and backward pass, and the gradients of all
    moving parameters, a few at a time.
    """
    named = sorted({name for site in sites for name in (site.weight, site.bias) if name})
    state = hash((tuple(named), tuple((name, type(module)) for name, module in model.named_modules())))
    if getattr(model, _CHECKED, (None,))[0] == state or not named:
        return getattr(model, _CHECKED)[1] if named else frozenset()
    norms, off = {}, {}
    with torch.enable_grad(), frozen(model), tap(model, sites) as taps:
        parameters = {name: model.get_parameter(name).requires_grad_() for name in named}
        last = int(getattr(text_config(model), "vocab_size", 2)) - 1
        ids = torch.linspace(1, last, 6, device=first_device(model)).long()
        given = {"use_cache": False} if accepts(model, "use_cache") else {}
        logits = model(input_ids=ids[None], **given).logits
        value = (logits * _random(*logits.shape, like=logits)).mean()
        found: dict[str, list[Factor]] = {}
        for factor in taps.factors(value, retain_graph=True, training=True, summed=True):
            found.setdefault(factor.param, []).append(factor)
        for group in parameter_groups(parameters, _AT_ONCE):
            grads: list[Any] = list(
                torch.autograd.grad(value, [parameters[n] for n in group], retain_graph=True, allow_unused=True)
            )
            for name in group:  # of an output of many tokens each copy is large: only the difference is kept
                p, grad = parameters[name], grads.pop(0)
                precise = torch.promote_types(p.dtype, torch.float32)
                rest = torch.zeros_like(p, dtype=precise, requires_grad=False) if grad is None else -grad.to(precise)
                del grad
                norms[name] = float(rest.norm())
                for factor in found.pop(name, ()):
                    accumulate(factor, rest)
                off[name] = float(rest.norm())
    tolerance = _MISREAD.get(next(model.parameters()).dtype, 1e-3)
    largest = max(norms.values())
    if not all(map(isfinite, (*norms.values(), *off.values()))):  # weights that are not finite: said where a loss is
        return frozenset()
    misread = frozenset(name for name in named if not off[name] <= tolerance * (norms[name] + 0.1 * largest))
    setattr(model, _CHECKED, (state, misread))
    return misread


def neighbours(needs: Sequence[float], room: float) -> list[list[int]]:
    """Places of neighbours together, as many as there is room for; one that needs more is alone."""
    groups: list[list[int]] = []
    used = 0.0
    for place, need in enumerate(needs):
        if not groups or used + need > room:
            groups.append([])
            used = 0.0
        groups[-1].append(place)
        used += need
    return groups


def parameter_groups(parameters: Mapping[str, Tensor], room: int) -> list[list[str]]:
    """Names of neighbouring parameters together, as many as have so many numbers in all; a larger one is alone."""
    names = list(parameters)
    return [[names[i] for i in group] for group in neighbours([p.numel() for p in parameters.values()], room)]


@torch.no_grad()
def mixes_examples(model: nn.Module, sites: Sequence[Site]) -> bool:
    """Whether gradients are to be had of one example at a time only.

    So it is where a parameter's gradient is taken whole, and where modules are called on the tokens of several examples
    in one list, as routed experts are. Cost: a forward pass over six tokens.
    """
    if any(site.kind == "whole" for site in sites):
        return True
    ids = torch.zeros(2, 3, dtype=torch.long, device=first_device(model))
    positions = {"position_ids": torch.arange(3, device=ids.device).expand_as(ids)}
    with evaluating(model), tap(model, sites) as taps:
        model(input_ids=ids, **(positions if accepts(model, "position_ids") else {}))
        return any(taps.mixed(x, out) for *_, x, out in taps.seen)


@torch.no_grad()
def _kind(module: nn.Module, own: Mapping[str, nn.Parameter]) -> str | None:
    if not set(own) <= {"weight", "bias"} or "weight" not in own:
        return None
    try:
        if type(module) in (nn.Linear, nn.Embedding):
            return "linear" if isinstance(module, nn.Linear) else "embedding"
        # A subclass is tried: quantised or adapted layers compute something else, and an embedding may multiply rows.
        if isinstance(module, nn.Linear):
            x = _random(2, 3, module.in_features, like=module.weight)
            return "linear" if _agree(module(x), nn.functional.linear(x, module.weight, module.bias)) else None
        if isinstance(module, nn.Embedding):
            ids = torch.linspace(0, len(module.weight) - 1, 8, device=module.weight.device).long()[None]
            return "embedding" if _agree(module(ids), embedding_options(module)[0] * module.weight[ids]) else None
        if type(module).__name__ == "Conv1D" and own["weight"].ndim == 2:  # GPT-2's transposed linear
            return "linear_t"
        return "elementwise" if _is_elementwise(module, own) else None
    except Exception as error:  # a module that takes something else
        if out_of_memory(error):
            raise
        return None


def _random(*shape: int, like: Tensor) -> Tensor:
    """The same random numbers at every call; the caller's random state is left alone."""
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0)).to(like)


def _agree(a: Tensor, b: Tensor) -> bool:
    return bool(torch.allclose(a.float(), b.float(), rtol=1e-2, atol=1e-2))


@torch.no_grad()
def embedding_options(module: nn.Module) -> tuple[float, int | None]:
    """Factor on the rows (what the module makes of rows of ones), and its padding row."""
    assert isinstance(module, nn.Embedding)
    if type(module) is nn.Embedding:
        return 1.0, module.padding_idx
    ones = module.weight.new_ones(()).expand_as(module.weight)
    first = torch.zeros(1, 1, dtype=torch.long, device=module.weight.device)
    return float(functional_call(module, {"weight": ones}, (first,))[0, 0, 0]), module.padding_idx


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
    base = run(zero, zero)
    rebuilt = base + (run(one, zero) - base) * w[0] + (b[0] if "bias" in own else 0)
    return _agree(run(w[0], b[0]), rebuilt)


def normalised(module: nn.Module, x: Tensor) -> Tensor:
    """d output / d weight of an elementwise module, shape of x: f(x; w = 1) - f(x; w = 0)."""
    weight = module.get_parameter("weight")
    one = functional_call(module, {"weight": torch.ones_like(weight)}, (x,))
    zero = functional_call(module, {"weight": torch.zeros_like(weight)}, (x,))
    return one - zero


@contextmanager
def evaluating(model: nn.Module) -> Iterator[None]:
    """No dropout, no rounded products; every module's own mode is restored on exit (also after an exception)."""
    refuse_rounded_products(model)
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
    with flags_kept(model.parameters()), evaluating(model):
        model.requires_grad_(False)
        yield


def lacks_forward_mode(error: Exception) -> bool:
    """Whether an operation of the model has no derivative in forward mode, as one that is written by hand."""
    return any(words in str(error) for words in ("setup_context", "forward AD", "forward-mode", "jvp"))


@dataclass
class Taps:
    """Inputs and outputs of the tapped modules during one forward pass."""

    seen: list[tuple[Site, nn.Module, Tensor, Tensor]] = field(default_factory=list)
    whole: dict[str, nn.Parameter] = field(default_factory=dict)
    batch: int = 0
    recording: bool = True

    def mixed(self, x: Tensor, out: Tensor) -> bool:
        """Whether a module was called on something else than [batch, tokens, ...]."""
        return out.ndim < 3 or x.shape[0] != self.batch

    def factors(self, value: Tensor, **how: Any) -> list[Factor]:
        """Factors of the gradient of ``value``: :meth:`factors_and` alone."""
        return self.factors_and(value, (), **how)[0]

    def factors_and(
        self,
        value: Tensor,
        others: Sequence[Tensor],
        *,
        retain_graph: bool = False,
        training: bool = False,
        rows: Tensor | None = None,
        summed: bool = False,
    ) -> tuple[list[Factor], list[Tensor]]:
        """Factors of the gradient of ``value`` (a scalar: the sum over independent examples), and that by ``others``.

        With ``training`` the gradient is the one that an optimizer is given: look-ups of an
        embedding's padding row have none. Without it, it is the derivative.

        Only the part of the graph above the lowest tapped module is walked. Module uses that
        ``value`` does not depend on give nothing.

        Parameters
        ----------
        others : tensors of the graph, such as the input of a block
        rows : int64 [batch]
            The example that each element of the batch belongs to (``sequence_rows``); None: each is one.
        summed : Only the sum over the batch is wanted: then modules may mix examples

        Raises
        ------
        UserError
            A module mixes examples, and there are several.
        """
        self.recording = False  # norms are called again below
        seen = [use for use in self.seen if use[3].requires_grad]  # the others lie before the graph
        outputs, whole = [out for *_, out in seen], list(self.whole.values())
        if not outputs and not whole and not others:
            return [], []
        examples = self.batch if rows is None else int(rows[-1]) + 1
        if not summed and examples > 1:
            mixed = [f"{s.module}: input {list(x.shape)}" for s, _, x, out in seen if self.mixed(x, out)]
            if mixed or whole:
                raise UserError(
                    "a module mixes the examples of a batch",
                    value=[*mixed, *self.whole][:3],
                    rule=f"[batch, tokens, ...] with a batch of {self.batch}, or one example at a time",
                    fix="use --set attribution.batch_tokens=1",
                )
        tensors = [*outputs, *whole, *others]
        grads: Sequence[Any] = torch.autograd.grad(value, tensors, retain_graph=retain_graph, allow_unused=True)
        factors: list[Factor] = []
        for (site, module, x, out), d in zip(seen, grads, strict=False):
            if d is None:
                continue
            if self.mixed(x, out):  # all of it is of one example, or a part of one sum
                d = d.reshape(1, -1, d.shape[-1])
                x = x.reshape(1, -1) if site.kind == "embedding" else x.reshape(1, -1, x.shape[-1])
            if training and site.padding is not None:
                d = d * (x != site.padding).unsqueeze(-1)
            factors += _site_factors(site, module, x, d)
        if rows is not None and not summed:
            factors = [_by_row(factor, rows) for factor in factors]
        for name, d in zip(self.whole, grads[len(outputs) :], strict=False):
            if d is not None:
                factors.append(Factor(name, "vector", None, d.reshape(1, -1)))
        return factors, list(grads[len(outputs) + len(whole) :])


def _by_row(factor: Factor, rows: Tensor) -> Factor:
    """The same with the elements of the batch that belong to one row side by side: [rows, ...]."""
    if len(factor.d) != len(rows):
        return factor
    count, rows = int(rows[-1]) + 1, rows.to(factor.d.device)
    if factor.a is None:
        return replace(factor, d=factor.d.new_zeros(count, factor.d.shape[1]).index_add_(0, rows, factor.d))
    slot = torch.arange(len(rows), device=rows.device)
    slot -= torch.searchsorted(rows, rows)
    shape = (count, int(slot.max()) + 1)

    def beside(x: Tensor) -> Tensor:
        out = x.new_zeros(*shape, *x.shape[1:])
        out[rows, slot] = x
        return out.flatten(1, 2)

    return replace(factor, a=beside(factor.a), d=beside(factor.d))


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
    if x.ndim > 3:  # heads, experts: each use of a token is one
        x, d = x.flatten(1, -2), d.flatten(1, -2)
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
    taps = Taps(whole={s.weight: model.get_parameter(s.weight) for s in sites if s.kind == "whole" and s.weight})

    def watch(site: Site, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        if taps.recording:
            taps.seen.append((site, module, args[0], output))

    def leaf(_module: nn.Module, _args: Any, output: Tensor) -> None:
        taps.batch = taps.batch or output.shape[0]
        if output.is_leaf:
            output.requires_grad_()

    with flags_kept(taps.whole.values()), ExitStack() as hooks:
        hooks.callback(taps.seen.clear)
        for module in model.modules():
            if isinstance(module, nn.Embedding):
                hooks.enter_context(module.register_forward_hook(leaf))
        for site in sites:
            if site.kind != "whole":
                module = model.get_submodule(site.module)
                hooks.enter_context(module.register_forward_hook(partial(watch, site)))
        for p in taps.whole.values():
            p.requires_grad_()
        yield taps


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
        return d @ query.reshape(len(query), -1).T
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
    some = ((d[start : start + step], a[start : start + step]) for start in range(0, len(d), step))
    return torch.cat([product(_gradients(*own).flatten(1), flat) for own in some])


def _gradients(d: Tensor, a: Tensor) -> Tensor:
    """Per-example gradients of one linear layer: [B, out, in]."""
    out = d.new_empty(len(d), d.shape[-1], a.shape[-1])
    outer_products(d, a, out)
    return out


def accumulate(factor: Factor, total: Query, weight: float = 1.0) -> None:
    """total += weight * (sum over the batch of the gradients); total has the parameter's shape."""
    if factor.kind == "vector":
        assert isinstance(total, Tensor)
        total.add_(factor.d.sum(0).view_as(total), alpha=weight)
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
        return product(built if scale is None else built * scale.flatten(), _built([right]))
    return reduce(torch.add, [_scaled_dot(f, g, scale, room) for f in left for g in right])


def _scaled_dot(f: Factor, g: Factor, scale: Tensor | None, room: int) -> Tensor:
    """<scale * gradient, gradient> of two uses."""
    if scale is None:
        return _gram(f, g)
    if f.kind == "embedding":  # a look-up of token v is row v of its gradient, and takes row v of the scale
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
        rows.append(contract(g, _gradients(some.d, some.a).mul_(scale)).T)
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
    first = [batch[0] for batch in batches]
    needs = [len(f.d) * f.d.shape[-1] * (1 if f.a is None else f.a.shape[-1]) for f in first]
    return [[batches[i] for i in group] for group in neighbours(needs, room)]


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
