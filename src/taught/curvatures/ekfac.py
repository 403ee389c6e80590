"""EK-FAC: the curvature of the loss, layer by layer, in the eigenbasis of two small covariances.

C is the Gauss-Newton Hessian of the mean of L over the examples, which for a cross-entropy is the
Fisher matrix. With labels drawn from the model's own distribution at every response token of example z
and n of these, it is the mean of G G' with

    G(z) = n^-1/2 sum over response tokens t of the gradient of -log p(label t)

(the root: of independent labels only squares are left, and L is their mean, not their sum). For one
linear layer with input a [in] and gradient d [out] at its output, G = sum over tokens d a', and

    A = sum over tokens a a',   S = sum over tokens d d',   Q_A, Q_S: their eigenvectors
    Lambda = mean over examples of (Q_S' G Q_A)^2                                [out, in]
    C^-1 G = Q_S ((Q_S' G Q_A) / (Lambda + damping * mean(Lambda))) Q_A'

A preference (an example with a link f of a sum s, :class:`taught.core.example.Dpo`) has one output, s: its part of the
Gauss-Newton matrix is f''(s) grad s grad s', so its G is the square root of f''(s) times the gradient of s.

Every layer has a block of its own. Only the weights of linear layers inside the model's blocks have
one: everything else (norms, biases, embeddings, the output layer) does not move in a step.

Source: George et al., arXiv 1806.03884 (EK-FAC); Grosse et al., arXiv 2308.03296 (for language
models, damping 0.1); Kunstner et al., arXiv 1905.12558 (why labels are drawn).
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from operator import mul
from typing import Any, ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from taught.core import rules
from taught.core.curvature import Basis, Metric
from taught.core.estimator import Work
from taught.core.example import ExampleBatch, Examples, batch_examples
from taught.core.gradient import by_parameter, example_gradients
from taught.core.problem import Problem
from taught.core.registry import CURVATURES, setting
from taught.curvatures.adam import add_squares
from taught.errors import UserError
from taught.estimators.cost import Asked, Passes
from taught.model.forward import find_blocks, forward
from taught.model.gradients import Factor, find_sites, frozen
from taught.model.kernels import product
from taught.model.layout import first_device, real_tokens
from taught.model.parameters import moving_parameters
from taught.progress import Progress, SilentProgress

Factors = dict[str, list[Factor]]


@dataclass(frozen=True, eq=False)
class Layers:
    """Eigenbasis and eigenvalues of every layer, by parameter name.

    Attributes
    ----------
    basis : orthonormal columns (rows of the weight [m, m], its columns [n, n])
    eigenvalues : [m, n], at least 0
    """

    basis: Mapping[str, Basis]
    eigenvalues: Mapping[str, Tensor]

    def damping(self, share: float) -> dict[str, Tensor]:
        """What is added to the eigenvalues of each layer: a share of their mean."""
        return {name: share * v.mean() for name, v in self.eigenvalues.items()}


@CURVATURES.register("ekfac")
@dataclass(frozen=True)
class Ekfac:
    """The curvature of the loss by EK-FAC; only linear layers of the blocks move."""

    damping: float = setting(0.1, rules.number(above=0), "added to a layer's eigenvalues, as a share of their mean")
    seed: int = setting(0, rules.whole(0), "of the labels that are drawn from the model")
    newton: ClassVar[bool] = True

    def fit(self, problem: Problem, examples: Examples, work: Work) -> Metric:
        """The Gauss-Newton matrix of the examples' mean loss, layer by layer.

        Raises
        ------
        UserError
            No linear layer of the blocks moves; a curvature is zero or not finite: the layers' names.
        """
        return ekfac_metric(self.layers(problem, examples, work), self.damping)

    def layers(self, problem: Problem, examples: Examples, work: Work) -> Layers:
        """Eigenbasis and eigenvalues of every layer that moves; errors as of :meth:`fit`."""
        found = fit_ekfac(problem, examples, seed=self.seed, progress=work.progress)
        refuse_flat(found)
        moving = moving_parameters(problem.model, problem.parameters)
        work.progress.note(
            f"EK-FAC: {len(found.eigenvalues)} linear layers of the blocks move, "
            f"{len(moving) - len(found.eigenvalues)} other tensors have no curvature and do not"
        )
        return found

    def curved(self, problem: Problem) -> tuple[str, ...]:
        """The parameters that have a curvature: the only ones that move."""
        return curved_layers(problem.model, problem.parameters)

    def numbers(self, problem: Problem) -> int:
        """Eigenvalues, and the eigenvectors of both sides of every layer."""
        shapes = [p.shape for p in moving_parameters(problem.model, self.curved(problem)).values()]
        return sum(m * n + m * m + n * n for m, n in shapes)

    def cost(self, problem: Problem, examples: Examples, asked: Asked) -> dict[str, float]:
        """Labels, squares of both sides of every layer, gradients in the basis, and eigenvectors (9 n^3)."""
        tokens = sum(example.length for example in examples)
        shapes = [p.shape for p in moving_parameters(problem.model, self.curved(problem)).values()]
        layers = sum(4.0 * tokens * n**2 + 9.0 * n**3 for shape in shapes for n in shape)
        return {"curvature": 6 * Passes(problem, examples).examples + layers}


def ekfac_metric(found: Layers, damping: float) -> Metric:
    """The metric of fitted layers; they alone move."""
    added = found.damping(damping)
    scale = {name: (v + added[name]).reciprocal() for name, v in found.eigenvalues.items()}
    return Metric(scale, found.basis, tuple(scale))


def curved_layers(model: nn.Module, parameters: Sequence[str] | None = None) -> tuple[str, ...]:
    """Names of the moving weights of linear layers inside the model's blocks.

    Raises
    ------
    UserError
        There is none; a pattern matches nothing; a module is not understood (``find_sites``).
    """
    inside = {id(module) for block in find_blocks(model) for module in block.modules()}
    names = dict.fromkeys(
        site.weight
        for site in find_sites(model, parameters)
        if site.kind in ("linear", "linear_t") and id(model.get_submodule(site.module)) in inside
    )
    found = tuple(name for name in names if name is not None)
    if not found:
        raise UserError(
            "no parameter has an EK-FAC curvature",
            value=list(parameters or ()),
            rule="the weights of linear layers inside the blocks have one",
            fix="let some of them move: attribution.parameters",
        )
    return found


def fit_ekfac(
    problem: Problem,
    examples: Examples,
    *,
    seed: int = 0,
    progress: Progress | None = None,
    places: Sequence[Callable[[], object]] = (),
    where: str = "",
) -> Layers:
    """The curvature at the model's weights, from the tokens of the examples.

    Parameters
    ----------
    places : each puts some weights into the model, and the curvature is the mean over these weights: A and S are
        summed over all of them, Lambda is averaged in the basis that they have in common. None: the weights as they are
    where : what progress says before each of its steps

    Notes
    -----
    Cost of a place: three forward passes over the examples and two backward ones, every example's gradient built once;
    two eigendecompositions a layer. Memory: the squares of both sides of every layer, one number a weight, and one
    batch. A layer that no example's gradient reaches has eigenvalues of zero (:func:`refuse_flat`).
    """
    names = curved_layers(problem.model, problem.parameters)
    problem = replace(problem, parameters=names)
    places, draws, progress = places or (lambda: None,), [], progress or SilentProgress()
    count = len(examples) * len(places)
    with frozen(problem.model):
        squares: Squares = {}  # promoted: sums of half precision in float32
        for name, p in moving_parameters(problem.model, names).items():
            dtype = torch.promote_types(p.dtype, torch.float32)
            rows, columns = (torch.zeros(n, n, dtype=dtype, device=p.device) for n in p.shape)
            squares[name] = rows, columns
        progress.step(f"{where}curvature of the loss, in and out of layers", count)
        for enter in places:
            enter()
            draws.append(
                [draw(problem.model, batch, examples, seed) for batch in batch_examples(examples, problem.batch_tokens)]
            )
            _add_sides(problem, examples, draws[-1], squares, progress)
        progress.step(f"{where}curvature of the loss, eigenvectors of layers", len(squares))
        basis: dict[str, Basis] = {}
        while squares:  # those of a layer are let go of as its eigenvectors come
            name, sides = squares.popitem()
            basis[name] = (_eigenvectors(sides[0]), _eigenvectors(sides[1]))
            del sides
            progress.advance()
        totals = {name: rows.new_zeros(len(rows), len(columns)) for name, (rows, columns) in basis.items()}
        metric = Metric(basis=basis)
        progress.step(f"{where}curvature of the loss, along eigenvectors", count)
        for enter, drawn in zip(places, draws, strict=True):
            enter()
            for _, factors in _gradients(problem, examples, drawn, progress):
                for name, uses in factors.items():
                    add_squares([metric.rotated(use) for use in uses], totals[name])
    return Layers(basis, {name: total.div_(count) for name, total in totals.items()})


def refuse_flat(found: Layers) -> None:
    """Raise a UserError with the layers whose curvature is zero: there is nothing to divide by."""
    flat = [name for name, values in found.eigenvalues.items() if not values.sum() > 0]
    if flat:
        raise UserError(
            "the curvature of some layers is zero",
            value=flat[:5],
            rule="the examples' gradients reach every layer that moves",
            fix="leave these out: attribution.parameters",
        )


@torch.no_grad()
def draw(model: nn.Module, batch: ExampleBatch, examples: Examples, seed: int) -> dict[str, Any]:
    """What makes the gradients G of a batch: its targets, weights and links.

    Labels drawn from the model; of examples with a link their own tokens, scaled.
    """
    labels, weights, links = draw_labels(model, batch, examples, seed), batch.weights.abs().sqrt(), batch.links
    if any(links):
        own = torch.tensor([link is not None for link in links])[:, None]
        labels, weights = torch.where(own, batch.targets, labels), torch.where(own, batch.weights, weights)
        roots = batch.bends(batch.terms(model).sum(1)).sqrt().tolist()
        links = tuple(None if link is None else partial(mul, root) for link, root in zip(links, roots, strict=True))
    return {"targets": labels, "weights": weights, "links": links}


@torch.no_grad()
def draw_labels(model: nn.Module, batch: ExampleBatch, examples: Examples, seed: int) -> Tensor:
    """A label for every scored token, from the model's distribution there: int64 [B, K].

    What is drawn depends on the seed, the example's id and the model, not on the batch.
    """
    _, logits = forward(model, batch.rows.to(first_device(model)), keep=batch.keep)
    assert logits is not None
    labels = torch.zeros_like(batch.targets)
    for row, number in enumerate(batch.index):
        example = examples[number]
        n = example.n_scored
        ends = torch.softmax(logits[row, batch.columns[row, :n].to(logits.device)].double(), -1).cumsum(-1)
        digest = hashlib.sha256(f"{seed} {example.id}".encode()).digest()
        level = np.random.default_rng(list(digest)).random((n, 1))
        drawn = torch.searchsorted(ends, ends[:, -1:] * torch.from_numpy(level).to(ends))
        labels[row, :n] = drawn.squeeze(1).clamp(max=ends.shape[1] - 1).cpu()
    return labels


def _gradients(
    problem: Problem, examples: Examples, drawn: Sequence[dict[str, Any]], progress: Progress
) -> Iterator[tuple[ExampleBatch, Factors]]:
    """Each batch with the factors of G by parameter."""
    sites = find_sites(problem.model, problem.parameters)
    batches = batch_examples(examples, problem.batch_tokens)
    for batch, own in zip(batches, drawn, strict=True):
        yield batch, by_parameter(example_gradients(problem, sites, replace(batch, **own), examples)[1])
        progress.advance(len(batch.index))


Squares = dict[str, tuple[Tensor, Tensor]]  # S and A (of a transposed layer: A and S) by parameter


def _add_sides(
    problem: Problem, examples: Examples, drawn: Sequence[dict[str, Any]], sums: Squares, progress: Progress
) -> None:
    """Add the squares of both sides of every layer."""
    for batch, factors in _gradients(problem, examples, drawn, progress):
        real = real_tokens(problem.model, batch.rows)
        for name, uses in factors.items():
            for use in uses:
                assert use.a is not None
                for side, total in zip((use.d, use.a), sums[name], strict=True):
                    x = side[real.to(side.device)].to(total.dtype)
                    total.add_(product(x.T, x.T))
    bad = [name for name, both in sums.items() if not all(x.isfinite().all() for x in both)]
    if bad:
        raise UserError(
            "the curvature of some layers is not finite",
            value=bad[:5],
            rule="inputs and gradients of every layer are finite",
            fix="use --set model.dtype=float32",
        )


def _eigenvectors(square: Tensor) -> Tensor:
    """One row behind another, as they come back from a file: the last digits of products depend on the layout."""
    return torch.linalg.eigh(square.double()).eigenvectors.to(square.dtype).contiguous()
