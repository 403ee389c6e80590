"""Running a causal language model on rows of tokens, and reading one block's residual stream."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from taught.errors import UserError
from taught.model.layout import accepts, text_config, tree_mask, written_out
from taught.model.tokens import Rows, Sequences


def find_blocks(model: nn.Module) -> nn.ModuleList:
    """The stack of transformer blocks of the model's language model.

    Of several lists as long as the configuration says, as where a vision tower is as deep, the one inside the text
    decoder that the model names.

    Raises
    ------
    UserError
        No list of modules has as many entries as the configuration has layers, or several have.
    """
    depth = int(text_config(model).num_hidden_layers)
    decoder: Any = model.get_decoder() if hasattr(model, "get_decoder") else None  # type: ignore[operator]
    for root in (decoder, model):
        stacks = [] if root is None else _stacks(root, depth)
        if len(stacks) == 1:
            return stacks[0]
    raise UserError(
        "the model's blocks were not found",
        value=f"{type(model).__name__}: {len(stacks)} lists of {depth} modules",
        rule=f"a ModuleList of {depth} blocks (config.num_hidden_layers) is expected",
        fix="use a decoder-only model of the transformers library",
    )


def _stacks(root: nn.Module, depth: int) -> list[nn.ModuleList]:
    """Lists of so many modules that hold parameters, but for those inside another one's entries."""
    found: dict[str, nn.ModuleList] = {}
    for name, module in root.named_modules():
        inside = any(name.startswith(f"{outer}.") for outer in found)
        holds = isinstance(module, nn.ModuleList) and next(module.parameters(), None) is not None
        if isinstance(module, nn.ModuleList) and len(module) == depth and holds and not inside:
            found[name] = module
    return list(found.values())


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
def edited_output(module: nn.Module, places: Tensor, edit: Callable[[Tensor], Tensor]) -> Iterator[None]:
    """While in the body, the output [B, T, D] of ``module`` is edited before it is passed on.

    Parameters
    ----------
    places : int64 [M], each once
        Places in [B * T] that are edited (``run_at``); the others pass unchanged.
    edit : [M, D] -> [M, D], row by row
    """

    def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
        h = output[0] if isinstance(output, tuple) else output
        at, flat = places.to(h.device), h.flatten(0, 1)
        changed = flat.index_copy(0, at, edit(flat[at])).view_as(h)
        return (changed, *output[1:]) if isinstance(output, tuple) else changed

    handle = module.register_forward_hook(hook)
    try:
        yield
    finally:
        handle.remove()


def run_at(model: nn.Module, rows: Rows, places: Tensor) -> Tensor:
    """Where tokens of the rows, places in [B * T], stand in what the model is run on: each place where one does."""
    sequences = written_out(model, rows)
    if sequences is None:
        return places
    return torch.isin(sequences.token.flatten(), places).nonzero().flatten()


def forward(
    model: nn.Module, rows: Rows, *, block: int | None = None, keep: int | Tensor = 0, stop_at_block: bool = False
) -> tuple[Tensor | None, Tensor | None]:
    """One forward pass over rows of token trees, written out where the model takes no trees.

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
    sequences = written_out(model, rows)
    if block is None:
        return None, _logits(model, rows, sequences, keep)
    with capture_output(get_block(model, block), stop_at_block) as seen:
        try:
            logits = _logits(model, rows, sequences, keep)
        except _StopForward:
            logits = None
    return _in_rows(seen[0], sequences), logits


def _logits(model: nn.Module, rows: Rows, sequences: Sequences | None, keep: int | Tensor) -> Tensor:
    """Logits [B, K, V] at some columns of the rows."""
    if sequences is None:
        return _run(model, rows.ids, rows.positions, tree_mask(model, rows), keep)
    columns = torch.arange(rows.ids.shape[1], device=rows.ids.device)
    wanted = sequences.at[:, columns[-keep:] if isinstance(keep, int) else keep]  # [B, K], places in [P * L]
    length = sequences.ids.shape[1]
    kept, column = (wanted % length).unique(return_inverse=True)
    positions = torch.arange(length, device=rows.ids.device).expand_as(sequences.ids)
    logits = _run(model, sequences.ids, positions, None, kept)
    return logits.flatten(0, 1)[wanted // length * len(kept) + column]


def _run(model: nn.Module, ids: Tensor, positions: Tensor, mask: Any, keep: int | Tensor) -> Tensor:
    """Logits of one call of the model, which is given what it takes."""
    inputs = {"position_ids": positions, "attention_mask": mask, "use_cache": False, "logits_to_keep": keep}
    logits: Tensor = model(input_ids=ids, **{name: x for name, x in inputs.items() if accepts(model, name)}).logits
    if accepts(model, "logits_to_keep"):
        return logits
    return logits[:, -keep:] if isinstance(keep, int) else logits[:, keep]


def _in_rows(h: Tensor, sequences: Sequences | None) -> Tensor:
    """What was computed for each token, as [B, T, D] of the rows."""
    return h if sequences is None else h.flatten(0, 1)[sequences.at.to(h.device)]


def residuals(model: nn.Module, rows: Rows, blocks: Sequence[int]) -> list[Tensor]:
    """Residual stream [B, T, D] after each of some blocks, in one pass that ends with the last."""
    last, sequences = max(blocks), written_out(model, rows)
    with ExitStack() as hooks:
        seen = {
            block: hooks.enter_context(capture_output(get_block(model, block), block == last)) for block in set(blocks)
        }
        with suppress(_StopForward):
            _logits(model, rows, sequences, 1)
    return [_in_rows(seen[block][0], sequences) for block in blocks]


def log_probabilities(logits: Tensor, at: tuple[Tensor, ...], tokens: Tensor) -> Tensor:
    """log p of tokens, of the shape of ``tokens``; float32, or float64 for float64 logits.

    torch's float32 ``log_softmax`` adds up the vocabulary with rounding that grows with it: with 262,144
    entries each token is off by 1e-5, all to one side, and sums over answers by more. ``logsumexp`` keeps to 1e-6.

    Parameters
    ----------
    logits : [..., V]
    at : places in all but the last dimension, as an index
    tokens : int64, the token of each place
    """
    wide = logits if logits.dtype == torch.float64 else logits.float()
    return wide[(*at, tokens)] - wide.logsumexp(-1)[at]
