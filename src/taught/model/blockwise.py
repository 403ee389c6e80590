"""One transformer block at a time: every gradient factor of many examples in little memory.

Factors of all parameters take about 1 MB a token for a model of 135M parameters. What flows between the blocks takes an
eighth of that: the input of each block and the gradient at its output. From these two, one block's factors are had
again by running that block alone, forward and backward. So all examples can be held at once, and layer by layer each
one's gradient meets each other's. The price is a second forward and backward pass.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from taught.errors import UserError
from taught.model.forward import StopForward, find_blocks, with_first
from taught.model.gradients import Factor, Site, find_sites, tap
from taught.model.points import first

# Relative; the same block run twice differs by rounding only.
_TOLERANCE = 1e-2


@dataclass(frozen=True)
class BlockSites:
    """The model's sites, by block, and those outside all blocks (embeddings, last norm, head)."""

    blocks: tuple[tuple[Site, ...], ...]
    outside: tuple[Site, ...]

    @property
    def lowest(self) -> int:
        """The first block with a site, or else the last block: none below need be gone through."""
        numbers = (number for number, block in enumerate(self.blocks) if block)
        return next(numbers, len(self.blocks) - 1)

    @property
    def depth(self) -> int:
        """How many blocks are gone through."""
        return len(self.blocks) - self.lowest


def split_sites(model: nn.Module, parameters: Sequence[str] | None = None) -> BlockSites:
    """Sort the sites of a model by block; ``parameters`` as in ``find_sites``, errors as below."""
    return by_block(model, find_sites(model, parameters))


def by_block(model: nn.Module, sites: Iterable[Site]) -> BlockSites:
    """Sort sites by block.

    Raises
    ------
    UserError
        A parameter belongs to several blocks, or to one and to the outside: its gradient does not fall apart by block.
    """
    homes: dict[str, set[int]] = {}
    names = {id(p): name for name, p in model.named_parameters()}
    modules = list(find_blocks(model))
    for number, block in enumerate(modules):
        for p in block.parameters():
            homes.setdefault(names[id(p)], set()).add(number)
    place = {id(m): number for number, block in enumerate(modules) for m in block.modules()}
    by_name = dict(model.named_modules())
    blocks: list[list[Site]] = [[] for _ in modules]
    outside: list[Site] = []
    used: set[str] = set()
    for site in sites:
        number = place.get(id(by_name[site.module]), -1)
        (blocks[number] if number >= 0 else outside).append(site)
        for name in (site.weight, site.bias):
            if name is not None:
                homes.setdefault(name, set()).add(number)
                used.add(name)
    shared = sorted(name for name in used if len(homes[name]) > 1)
    if shared:
        raise UserError(
            "some parameters are shared between blocks",
            value=shared[:5],
            rule="effects on single prompts are taken block by block",
            fix="use --set attribution.targets=[score], or the finite-step estimator",
        )
    return BlockSites(tuple(map(tuple, blocks)), tuple(outside))


@dataclass(eq=False)
class Trace:
    """What is kept of one batch of examples while its blocks are gone through, last to first.

    Attributes
    ----------
    inputs : input of each block that has not been gone through, from the lowest on, [B, T, D]
    calls : other arguments of these blocks
    grad : gradient at the output of the last of them, [B, T, D]
    rows : the example that each element of the batch belongs to (``sequence_rows``); None: each is one
    first : gradient at the lowest block's output, [B, T, D]: what ``grad`` must come to
    """

    inputs: list[Tensor]
    calls: list[tuple[tuple[Any, ...], dict[str, Any]]]
    grad: Tensor
    first: Tensor
    rows: Tensor | None


def trace(
    model: nn.Module,
    sites: BlockSites,
    values: Callable[[], Tensor],
    *,
    training: bool = False,
    rows: Tensor | None = None,
) -> tuple[Tensor, list[Factor], Trace]:
    """Run a batch forward and backward; keep every block's input.

    ``values`` runs the model on the batch: one value an example, [B], of which the gradient is taken; ``training`` and
    ``rows`` as in ``Taps.factors_and``. Returns the values, detached; factors of the parameters outside the blocks; and
    what is kept.
    """
    watched = _watched(model, sites.lowest)
    with watched as (inputs, calls, outputs), tap(model, sites.outside) as taps:
        found = values()
        if len(outputs) != sites.depth:
            raise _no_chain(f"a pass has {len(outputs)} calls of {sites.depth} blocks")
        ends = [outputs[-1], outputs[0]]
        factors, (last, first) = taps.factors_and(found.sum(), ends, training=training, rows=rows)
    return found.detach(), factors, Trace(inputs, calls, last, first, rows)


@contextmanager
def _watched(model: nn.Module, lowest: int) -> Iterator[tuple[list[Tensor], list[Any], list[Tensor]]]:
    """Inputs, other arguments and outputs of the blocks from the lowest on, in forward passes."""
    from transformers.cache_utils import Cache

    inputs: list[Tensor] = []
    calls: list[Any] = []
    outputs: list[Tensor] = []

    def before(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        hidden, *rest = args if args else (kwargs["hidden_states"],)
        # A cache would be filled a second time.
        named = {
            key: None if isinstance(value, Cache) else value for key, value in kwargs.items() if key != "hidden_states"
        }
        inputs.append(hidden.detach())
        calls.append((tuple(rest), named))

    def after(_module: nn.Module, _args: Any, output: Any) -> None:
        outputs.append(first(output))

    with ExitStack() as hooks:
        for block in find_blocks(model)[lowest:]:
            hooks.enter_context(block.register_forward_pre_hook(before, with_kwargs=True))
            hooks.enter_context(block.register_forward_hook(after))
        yield inputs, calls, outputs


def last_block(model: nn.Module, sites: BlockSites, kept: Trace) -> list[Factor]:
    """Factors of the last block that is left, by running it again; the trace moves one block down.

    Raises
    ------
    UserError
        The gradient that arrives at the lowest block's output is not the one that the whole model's
        backward pass gave: some block passes something on by another way than its output.
    """
    number = sites.lowest + len(kept.inputs) - 1
    factors = _run_again(model, sites, kept, number)
    off = kept.grad - kept.first
    if number == sites.lowest + 1 and not off.float().norm() <= _TOLERANCE * kept.first.float().norm():
        raise _no_chain("the gradient at the lowest block's output, taken block by block, is another one")
    return factors


def _no_chain(value: str) -> UserError:
    return UserError(
        "the model's blocks are not a chain",
        value=value,
        rule="each block takes the output of the one before, once and nothing else of it",
        fix="use --set attribution.targets=[score], or the finite-step estimator",
    )


def _run_again(model: nn.Module, sites: BlockSites, kept: Trace, number: int) -> list[Factor]:
    """Factors of the last block that is left; its gradient goes on to the block below."""
    x = kept.inputs.pop().requires_grad_()
    args, kwargs = kept.calls.pop()
    with tap(model, sites.blocks[number]) as taps:
        taps.batch = len(x)
        out = first(find_blocks(model)[number](x, *args, **kwargs))
        factors, (kept.grad,) = taps.factors_and((out * kept.grad).sum(), [x], rows=kept.rows)
    return factors


def checkpointed(
    model: nn.Module,
    sites: BlockSites,
    values: Callable[[], Tensor],
    *,
    training: bool = False,
    rows: Tensor | None = None,
) -> tuple[Tensor, Iterator[Factor]]:
    """Factors of a batch, last to first, with the activations of one part of the model at a time.

    Gradient checkpointing: the first pass keeps the blocks' inputs only, and a graph from the last
    block's output on; each block and what is before them then run again when their factors are
    asked for. Cost: a second forward pass. Use :func:`refuse_no_chain` before, once a model.

    Parameters
    ----------
    values, training, rows : as in :func:`trace`

    Returns
    -------
    values : [B], detached
    factors : to be used one after the other
    """
    ends: list[Tensor] = []

    def record(_module: nn.Module, _args: Any, output: Any) -> Any:
        ends[:] = [first(output).detach().requires_grad_()]
        torch.set_grad_enabled(True)  # from here on there is a graph, until torch.no_grad ends
        return with_first(output, ends[0])

    last = find_blocks(model)[-1]
    with (
        _watched(model, 0) as (inputs, calls, _),
        last.register_forward_hook(record),
        torch.no_grad(),
        tap(model, sites.outside) as taps,
    ):
        found = values()
        # Whether parameters move that may be used before the blocks.
        front = any(site.kind in ("embedding", "whole") for site in sites.outside)
        front = front or any(not out.requires_grad for *_, out in taps.seen)
        factors, (grad,) = taps.factors_and(found.sum(), ends, training=training, rows=rows)
    below = 0 if front else sites.lowest
    kept = Trace(inputs[below:], calls[below:], grad, grad, rows)
    reached: list[Tensor] = []

    def stop(_module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        reached.append(args[0] if args else kwargs["hidden_states"])
        raise StopForward

    def parts() -> Iterator[Factor]:
        yield from factors
        factors.clear()
        while kept.inputs:
            yield from _run_again(model, sites, kept, below + len(kept.inputs) - 1)
        if front:
            first_block = find_blocks(model)[0].register_forward_pre_hook(stop, with_kwargs=True)
            with first_block, tap(model, sites.outside) as taps:
                with suppress(StopForward):
                    values()
                yield from taps.factors((reached[0] * kept.grad).sum(), training=training, rows=kept.rows)

    return found.detach(), parts()


def refuse_no_chain(
    model: nn.Module, sites: BlockSites, values: Callable[[], Tensor], rows: Tensor | None = None
) -> None:
    """Raise a UserError unless gradients taken block by block are those of the whole model.

    ``values`` and ``rows`` as in :func:`trace`, of a small batch.
    """
    _, _, traced = trace(model, sites, values, rows=rows)
    while traced.inputs:
        last_block(model, sites, traced)
