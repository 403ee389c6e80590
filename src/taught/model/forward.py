"""Running a causal language model on rows of tokens, and reading one block's residual stream."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from taught.errors import UserError
from taught.model.tokens import Rows


def find_blocks(model: nn.Module) -> nn.ModuleList:
    """The model's stack of transformer blocks.

    Raises
    ------
    UserError
        No list of modules has as many entries as the configuration has layers.
    """
    config: Any = model.config
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
    depth = int(text_config.num_hidden_layers)
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == depth:
            return module
    raise UserError(
        "the model's blocks were not found",
        value=type(model).__name__,
        rule=f"a ModuleList of {depth} blocks (config.num_hidden_layers) is expected",
        fix="use a decoder-only model of the transformers library",
    )


def get_block(model: nn.Module, block: int) -> nn.Module:
    """Block number ``block``, counted from zero.

    Raises
    ------
    UserError
        The model has no such block.
    """
    blocks = find_blocks(model)
    if not 0 <= block < len(blocks):
        raise UserError(
            "the model has no such block",
            value=block,
            rule=f"blocks are counted from 0 to {len(blocks) - 1}",
            fix="set sae.block to the block that the SAE was trained on",
        )
    return blocks[block]


def first_device(model: nn.Module) -> torch.device:
    """Where token ids go: the device of the first parameters (a model may lie on several)."""
    return next(model.parameters()).device


class _StopForward(Exception):
    """Raised in a hook to skip the part of a forward pass that nobody needs."""


@contextmanager
def capture_output(module: nn.Module, stop: bool = False) -> Iterator[list[Tensor]]:
    """Collect the residual stream after ``module`` (its *output*, not its input)."""
    seen: list[Tensor] = []

    def hook(_module: nn.Module, _args: Any, output: Any) -> None:
        seen.append(output[0] if isinstance(output, tuple) else output)
        if stop:
            raise _StopForward

    handle = module.register_forward_hook(hook)
    try:
        yield seen
    finally:
        handle.remove()


@contextmanager
def edited_output(module: nn.Module, columns: Tensor, edit: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """While in the body, the output [1, T, D] of ``module`` is edited before it is passed on.

    Parameters
    ----------
    columns : int64 [M], each once
        Tokens that are edited; the others pass unchanged.
    edit : [M, D] -> [M, D], row by row
    """

    def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
        h = output[0] if isinstance(output, tuple) else output
        at = columns.to(h.device)
        changed = h.index_copy(1, at, edit(h[0, at]).unsqueeze(0))
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def forward(
    model: nn.Module, rows: Rows, *, block: int | None = None, keep: int | Tensor = 0, stop_at_block: bool = False
) -> tuple[Tensor | None, Tensor | None]:
    """One forward pass.

    Parameters
    ----------
    model : a causal language model of the transformers library
    rows : the tokens
    block : Block whose residual stream is returned; None for none
    keep : Logits at the last ``keep`` columns (0: all), or at the columns that a tensor names
    stop_at_block : Leave out everything after the block; no logits then

    Returns
    -------
    h : [B, T, D] or None
        Residual stream after the block.
    logits : [B, K, V] or None
    """
    inputs = _inputs(model, rows, keep)
    if block is None:
        return None, model(**inputs).logits
    with capture_output(get_block(model, block), stop_at_block) as seen:
        try:
            logits = model(**inputs).logits
        except _StopForward:
            logits = None
    return seen[0], logits


def _inputs(model: nn.Module, rows: Rows, keep: int | Tensor) -> dict[str, Any]:
    return {
        "input_ids": rows.ids,
        "position_ids": rows.positions,
        "attention_mask": rows.additive_mask(next(model.parameters()).dtype),
        "use_cache": False,
        "logits_to_keep": keep,
    }


def residuals(model: nn.Module, rows: Rows, blocks: Sequence[int]) -> list[Tensor]:
    """Residual stream [B, T, D] after each of some blocks, in one pass that ends with the last."""
    last = max(blocks)
    with ExitStack() as hooks:
        seen = {
            block: hooks.enter_context(capture_output(get_block(model, block), block == last)) for block in set(blocks)
        }
        with suppress(_StopForward):
            model(**_inputs(model, rows, 1))
    return [seen[block][0] for block in blocks]
