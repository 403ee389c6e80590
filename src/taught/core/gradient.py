"""Gradients of examples' losses: as factors, and along one direction for every token."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from taught.core.example import ExampleBatch, Examples, batch_examples, refuse_nonfinite
from taught.core.problem import Problem
from taught.model.blockwise import by_block, checkpointed, refuse_no_chain
from taught.model.directional import along, computed
from taught.model.gradients import Factor, Site, lacks_forward_mode, tap
from taught.model.layout import sequence_rows


def refuse_unfit(problem: Problem, sites: Sequence[Site], examples: Examples) -> None:
    """Raise a UserError where checkpointing is asked for and the model's blocks are not a chain."""
    if problem.checkpointing:
        (batch,) = batch_examples(examples[:1], problem.batch_tokens)
        run, rows = partial(batch.losses, problem.model), sequence_rows(problem.model, batch.rows)
        refuse_no_chain(problem.model, by_block(problem.model, sites), run, rows)


def by_parameter(factors: Iterable[Factor]) -> dict[str, list[Factor]]:
    """The factors of each parameter: one that is used twice has several."""
    found: dict[str, list[Factor]] = defaultdict(list)
    for factor in factors:
        found[factor.param].append(factor)
    return found


def example_gradients(
    problem: Problem, sites: Sequence[Site], batch: ExampleBatch, examples: Examples
) -> tuple[Tensor, Iterator[Factor]]:
    """Losses of a batch of examples (float64 [B]) and the factors of their gradients, to be used once.

    Raises
    ------
    UserError
        A loss is not finite: the ids of the examples.
    """
    model, rows = problem.model, sequence_rows(problem.model, batch.rows)
    if problem.checkpointing:
        run = partial(batch.losses, model)
        losses, parts = checkpointed(model, by_block(model, sites), run, training=True, rows=rows)
        values = losses.double().cpu()
        refuse_nonfinite(examples, batch.index, values)
        return values, parts
    with tap(model, sites) as taps:
        losses = batch.losses(model)
        values = losses.detach().double().cpu()
        refuse_nonfinite(examples, batch.index, values)
        return values, iter(taps.factors_and(losses.sum(), (), training=True, rows=rows)[0])


def token_derivatives(model: nn.Module, batch: ExampleBatch, step: Mapping[str, Tensor]) -> Tensor:
    """f' of every example times the derivative of each of its scored tokens' l_j along a step of parameters, [B, K].

    The sum over an example's tokens is <grad L, step>, of the gradient that training is given: look-ups of the padding
    row have none. Cost: about three forward passes; where an operation has no forward mode, a backward pass a token.

    Parameters
    ----------
    step : by parameter name
    """
    with padding_rows_held(model, step):
        try:
            values, moved = along(model, step, batch.terms, model)
        except (RuntimeError, NotImplementedError) as error:
            if not lacks_forward_mode(error):
                raise
            values, moved = _by_token(model, batch, step)
    return (moved * batch.slopes(values.sum(1))[:, None]).detach()


def _by_token(model: nn.Module, batch: ExampleBatch, step: Mapping[str, Tensor]) -> tuple[Tensor, Tensor]:
    """The same with a backward pass for each token."""
    leaves = {name: model.get_parameter(name).detach().clone().requires_grad_() for name in step}
    values = computed(model, leaves, batch.terms, model)
    moved = torch.zeros_like(values)
    for b, k in (batch.weights != 0).nonzero().tolist():
        grads = torch.autograd.grad(values[b, k], list(leaves.values()), retain_graph=True, allow_unused=True)
        for name, grad in zip(leaves, grads, strict=True):
            if grad is not None:
                moved[b, k] += (grad * step[name]).sum().detach()
    return values.detach(), moved.detach()


@contextmanager
def padding_rows_held(model: nn.Module, moving: Iterable[str]) -> Iterator[None]:
    """Look-ups of an embedding's padding row do not move, as an optimizer does not move them."""

    def hook(row: Tensor, module: nn.Embedding, args: Any, out: Tensor) -> Tensor:
        return torch.where((args[0] == module.padding_idx).unsqueeze(-1), row, out)

    weights = {id(model.get_parameter(name)) for name in moving}
    with ExitStack() as hooks:
        for module in model.modules():
            if isinstance(module, nn.Embedding) and module.padding_idx is not None and id(module.weight) in weights:
                row = module(torch.tensor([[module.padding_idx]], device=module.weight.device)).detach()[0, 0]
                hooks.enter_context(module.register_forward_hook(partial(hook, row)))
        yield
