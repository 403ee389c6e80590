"""Which module of a block has the output that is read.

What attention and MLP add to the residual stream is found by what a block computes. In one pass over a few tokens its
modules are watched; the terms are the output of attention and that of the MLP, or what a norm behind one of them makes
of it, and

    output of the block = its input + term of attention + term of the MLP

must hold. Where it does not (a factor at a term, a residual added inside the MLP, a third term) nothing is guessed.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from itertools import product
from typing import Any

import torch
from torch import Tensor, nn

from taught.core.point import ATTN_OUT, MLP_OUT
from taught.errors import UserError

_ATTENTION = ("self_attn", "attn", "attention", "self_attention")
_MLP = ("mlp", "feed_forward", "ffn", "block_sparse_moe")


@dataclass(frozen=True, eq=False)
class _Call:
    """What a module was given and what it returned, and the latter's value then: a model may add to it in place."""

    given: Tensor
    output: Any
    value: Tensor


def first(output: Any) -> Any:
    """The tensor of what a module returns; others may stand behind it."""
    return output[0] if isinstance(output, tuple) else output


def find_part(block: nn.Module, part: str, run: Callable[[], object]) -> str:
    """Name of the module of a block whose output a part of it is (:class:`taught.core.point.Point`).

    Parameters
    ----------
    run : runs the model on a few tokens, up to this block

    Raises
    ------
    UserError
        The block has no such module; its output is not one vector for each token, as wide as the residual stream; what
        attention and MLP add to the residual stream is not found.
    """
    children = [name for name, _ in block.named_children()]
    if part in (ATTN_OUT, MLP_OUT):
        return _find_term(block, part, _watch(block, children, run))
    names = [name for name, _ in block.named_modules()][1:]
    if part not in names:
        raise UserError(
            "the model's block has no such part",
            value=part,
            rule=f"resid_post, {ATTN_OUT}, {MLP_OUT}, or a module of it: {', '.join(children)}",
            fix="use an SAE of this model; where its cfg.json says nothing, set sae.point",
        )
    calls = _watch(block, [part], run)
    if len(calls[part]) != 1 or _shape(calls[part][0].output) != _shape(calls[""][0].output):
        raise UserError(
            "a part of the model's block is not read",
            value=f"{part}: {[_shape(call.output) for call in calls[part]]}",
            rule=f"one output a pass, one vector a token, as the residual stream: {_shape(calls[''][0].output)}",
            fix="use an SAE of the residual stream, of attention or of the MLP",
        )
    return part


def _find_term(block: nn.Module, part: str, calls: dict[str, list[_Call]]) -> str:
    """The module whose output is the term that attention or MLP adds to the residual stream."""
    (whole,) = calls.pop("")
    x, out = whole.given.to(whole.value.device), whole.value
    terms = {name: own[0].value for name, own in calls.items() if len(own) == 1 and own[0].value.shape == x.shape}
    for attention, mlp in product(_candidates(calls, _ATTENTION), _candidates(calls, _MLP)):
        if attention in terms and mlp in terms:
            a, m = terms[attention], terms[mlp]
            # The MLP after attention, or both side by side: to the bit, in whichever order the model adds up.
            if any(torch.equal(out, made) for made in ((x + a) + m, x + (a + m), (x + m) + a)):
                return attention if part == ATTN_OUT else mlp
    raise UserError(
        f"what {'attention' if part == ATTN_OUT else 'the MLP'} adds to the residual stream is not found",
        value=f"{type(block).__name__}: {', '.join(calls)}",
        rule="a block's output is its input and one term each of its attention and its MLP",
        fix="use an SAE of the residual stream, or of the output of a module, such as layers.0.mlp",
    )


def _candidates(calls: dict[str, list[_Call]], names: Iterable[str]) -> list[str]:
    """The module that has one of these names, and behind it those that are given just what it returns."""
    found = [name for name in names if calls.get(name)]
    for name in found:  # grows on the way
        output = first(calls[name][0].output)
        found += [n for n, own in calls.items() if own and own[0].given is output and n not in found]
    return found


def _watch(block: nn.Module, names: Iterable[str], run: Callable[[], object]) -> dict[str, list[_Call]]:
    """The calls of a block ("") and of some modules of it while the model runs."""
    calls: dict[str, list[_Call]] = {name: [] for name in ("", *names)}

    def keep(name: str, _module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        given = next((x for x in (*args, *kwargs.values()) if isinstance(x, Tensor)), None)
        if given is not None and isinstance(first(output), Tensor):
            calls[name].append(_Call(given, output, first(output).clone()))

    with ExitStack() as hooks:
        for name in calls:
            module = block.get_submodule(name)
            hooks.enter_context(module.register_forward_hook(partial(keep, name), with_kwargs=True))
        run()
    return calls


def _shape(output: Any) -> list[int] | None:
    value = first(output)
    return list(value.shape) if isinstance(value, Tensor) else None
