"""Random projection of per-example gradients, taken from their factors.

For a linear layer with inputs a_t and output gradients d_t, G = sum_t d_t a_t' [out, in]. Its sketch is

    H    = sum_t d_t (R a_t)'                     [out, k]    R [k, in] with entries N(0, 1/k)
    s_bj = sum of e_oj H_oj over o = b (mod m)    [m, k]      e_oj = +1 or -1

so the two sides are projected one after the other: inputs by a dense matrix, outputs by random signs and a fold onto m
rows. The sketches of all parameters are added into one vector of K = m k numbers. R, e and where a parameter's rows
begin are drawn independently for each parameter, so

    E <s(G), s(Q)> = <G, Q>,    variance about (|G|^2 |Q|^2 + <G, Q>^2) / K

plus, from R, at most 2 / k of the squared sums of one layer, which many layers average away. The
signs differ for every o *and* j: projecting outputs by one matrix, as a plain two-sided projection
does, has m in place of K in the variance when the inputs of a layer point one way, and they do.

Embeddings (look-up and output use meet in one parameter), norms and biases are in the sketch: the last two have no
inputs, so they are signed and folded directly. R is the identity for a layer that is not wider than k.
"""

from __future__ import annotations

import hashlib
from collections.abc import Collection, Iterable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from taught.errors import UserError
from taught.model.gradients import Factor, Query, RowSparse
from taught.model.kernels import outer_products, product

# Columns of H: what R keeps of a layer's inputs.
COLUMNS = 64

# Numbers of H that are built at a time.
_ROOM = 1 << 24


@dataclass(frozen=True, eq=False)
class _Map:
    """One parameter's part: R [k, in] or None for a vector, signs int8 [out, k], first row."""

    right: Tensor | None
    signs: Tensor
    first: int


@dataclass(frozen=True, eq=False)
class Prescale:
    """What gradients are multiplied by, element by element, before they are projected.

    Attributes
    ----------
    by : by parameter name, in its shape
    key : what identifies it
    """

    by: Mapping[str, Tensor]
    key: str

    def factors(self, factor: Factor) -> Iterator[tuple[int, Factor]]:
        """The multiplied gradient of each example: a linear layer's is built, one at a time."""
        scale = self.by[factor.param]
        for n in range(len(factor.d)):
            one = factor.examples(slice(n, n + 1))
            if one.kind == "vector":
                yield n, replace(one, d=one.d * scale.flatten())
            elif one.kind == "embedding":
                yield n, replace(one, d=one.d * scale[one.a])
            else:
                assert one.a is not None
                built = one.d.new_empty(1, *scale.shape)
                outer_products(one.d, one.a, built)
                yield n, Factor(one.param, "vector", None, built.mul_(scale).flatten(1))

    def query(self, name: str, query: Query) -> Query:
        """The same of gradients that are given whole, [K, *shape]."""
        if isinstance(query, RowSparse):
            return replace(query, values=query.values * self.by[name][query.rows])
        return query * self.by[name]


@dataclass(eq=False)
class SharedInputs:
    """Projected inputs of one forward pass, for several backward passes through it.

    Attributes
    ----------
    alive : addresses of the inputs, which must outlive this; only they are kept, for what else a
        factor may hold is freed and its address used again
    """

    alive: Collection[int] = ()
    made: dict[tuple[str, int], Tensor] = field(default_factory=dict)

    def projected(self, param: str, a: Tensor, right: Tensor) -> Tensor:
        """R a of a layer's inputs, [B, T, k]."""
        key = (param, a.data_ptr())
        if key in self.made:
            return self.made[key]
        found = product(a, right.to(a.dtype))
        if a.data_ptr() in self.alive:
            self.made[key] = found
        return found


@dataclass(eq=False)
class Projection:
    """A fixed random projection of a model's gradients to ``dim`` numbers.

    Attributes
    ----------
    model : the model; names and shapes of its parameters define the maps
    dim : K, numbers a sketch has; a multiple of 64
    seed : another seed is another projection
    before : what gradients are multiplied by first; None: nothing

    Raises
    ------
    UserError
        ``dim`` is not a multiple of 64.
    """

    model: nn.Module
    dim: int
    seed: int = 0
    before: Prescale | None = None
    _maps: dict[str, _Map] = field(default_factory=dict)

    def __post_init__(self) -> None:
        if self.dim < COLUMNS or self.dim % COLUMNS:
            raise UserError(
                "the size of a sketch does not fit",
                value=self.dim,
                rule=f"a multiple of {COLUMNS}",
                fix="set attribution.estimator.dim",
            )

    @property
    def rows(self) -> int:
        """m, rows onto which outputs are folded."""
        return self.dim // COLUMNS

    def sketch(self, factors: Iterable[Factor], batch: int, inputs: SharedInputs | None = None) -> Tensor:
        """Sketches of the gradients of a batch of examples, [batch, K]; float32 at least.

        Parameters
        ----------
        factors : of all parameters, in any order; what is missing counts as zero
        inputs : the same one for every backward pass through one forward pass

        Notes
        -----
        Cost: T (in + out) k multiplications a layer and example, beside T in out of a forward pass.
        """
        total: Tensor | None = None
        for factor in factors:
            if total is None:
                dtype = torch.promote_types(factor.d.dtype, torch.float32)
                total = factor.d.new_zeros(batch, self.rows, COLUMNS, dtype=dtype)
            if self.before is None:
                self._add(factor, total, inputs or SharedInputs())
                continue
            for n, one in self.before.factors(factor):
                self._add(one, total[n : n + 1], SharedInputs())
        if total is None:
            return torch.zeros(batch, self.dim)
        return total.flatten(1)

    def matrices(self, gradients: Mapping[str, Query], count: int) -> Tensor:
        """Sketches of ``count`` gradients that are given whole, by parameter name: float64 [count, K].

        The same numbers that :meth:`sketch` makes of their factors.
        """
        total = torch.zeros(count, self.rows, COLUMNS, dtype=torch.float64)
        for name, given in gradients.items():
            drawn = self._map(name)
            given = given if self.before is None else self.before.query(name, given)
            for k in range(count):
                one = total[k : k + 1]
                if isinstance(given, RowSparse):
                    right = None if drawn.right is None else drawn.right.cpu()
                    here = _Map(right, drawn.signs.cpu(), drawn.first)
                    self._add_lookups(given.rows[None], given.values[k][None].cpu(), here, one)
                    continue
                whole = given[k].cpu()
                if drawn.right is None:
                    flat = (whole.double().flatten() * drawn.signs.cpu())[None, :, None]
                    _fold(flat, drawn.first * COLUMNS, one.flatten(1).unsqueeze(-1))
                else:
                    H = product(whole, drawn.right.cpu().to(whole.dtype)).double() * drawn.signs.cpu()
                    _fold(H[None], drawn.first, one)
        return total.flatten(1)

    def record(self) -> dict[str, Any]:
        """What defines it, as plain values."""
        return {
            "projection.dim": self.dim,
            "projection.columns": COLUMNS,
            "projection.seed": self.seed,
            "projection.drawn sha256": self.digest(),
            **({} if self.before is None else {"projection.multiplied by": self.before.key}),
        }

    def digest(self) -> str:
        """SHA-256 of the drawn numbers of one parameter: another generator would differ."""
        name = next(name for name, p in self.model.named_parameters() if p.ndim == 2)
        drawn = self._map(name)
        assert drawn.right is not None
        content = drawn.right.float().cpu().numpy().tobytes() + drawn.signs.cpu().numpy().tobytes()
        return hashlib.sha256(content).hexdigest()

    def _add(self, factor: Factor, total: Tensor, inputs: SharedInputs) -> None:
        drawn, d = self._map(factor.param), factor.d
        if factor.kind == "vector" and drawn.right is not None:  # the gradient of a matrix, taken whole
            whole = d.view(len(d), -1, drawn.right.shape[1]).to(drawn.right)
            H = product(whole.flatten(0, 1), drawn.right).view(*whole.shape[:2], COLUMNS)
            _fold(H.to(total.dtype) * drawn.signs, drawn.first, total)
            return
        if factor.kind == "vector":
            flat = (d.to(total.dtype) * drawn.signs).unsqueeze(-1)
            _fold(flat, drawn.first * COLUMNS, total.flatten(1).unsqueeze(-1))
            return
        assert factor.a is not None and drawn.right is not None
        if factor.kind == "embedding":
            self._add_lookups(factor.a, d, drawn, total)
            return
        a = inputs.projected(factor.param, factor.a, drawn.right)
        step = max(self.rows, _ROOM // (len(d) * COLUMNS))  # rows of H for which there is room
        for start in range(0, d.shape[-1], step):
            part = d[..., start : start + step]
            H = d.new_empty(len(d), part.shape[-1], COLUMNS)
            outer_products(part, a, H)
            signed = H.to(total.dtype).mul_(drawn.signs[start : start + step])
            _fold(signed, drawn.first + start, total)

    def _add_lookups(self, ids: Tensor, d: Tensor, drawn: _Map, total: Tensor) -> None:
        """Look-ups: the input of the [V, D] parameter's row ``id`` is that row's gradient."""
        assert drawn.right is not None
        values = product(d, drawn.right.to(d.dtype)).to(total.dtype) * drawn.signs[ids]
        rows = (ids + drawn.first) % self.rows
        example = torch.arange(len(ids), device=ids.device).unsqueeze(1) * self.rows
        total.view(-1, COLUMNS).index_add_(0, (rows + example).flatten(), values.flatten(0, 1))

    def _map(self, name: str) -> _Map:
        if name in self._maps:
            return self._maps[name]
        weight = self.model.get_parameter(name)
        digest = hashlib.sha256(f"{self.seed} {name}".encode()).digest()
        draw = torch.Generator().manual_seed(int.from_bytes(digest[:7], "big"))
        first = int(torch.randint(self.rows, (), generator=draw))
        shape = (len(weight), COLUMNS) if weight.ndim == 2 else (weight.numel(),)
        signs = torch.randint(2, shape, generator=draw, dtype=torch.int8).mul_(2).sub_(1)
        right = None
        if weight.ndim == 2:
            width = weight.shape[1]
            right = torch.eye(COLUMNS, width)
            if width > COLUMNS:
                right = torch.randn(COLUMNS, width, generator=draw) / COLUMNS**0.5
            right = right.to(weight.device, torch.promote_types(weight.dtype, torch.float32))
        return self._maps.setdefault(name, _Map(right, signs.to(weight.device), first))


def _fold(x: Tensor, first: int, total: Tensor) -> None:
    """total [B, m, k] += x [B, n, k] with row o of x going to row (first + o) mod m."""
    rows, done = total.shape[1], 0
    while done < x.shape[1]:
        place = (first + done) % rows
        count = min(rows - place, x.shape[1] - done)
        total[:, place : place + count] += x[:, done : done + count]
        done += count
