"""Running a causal language model on rows of tokens, and reading what it computes at a point on the way."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from typing import Any

import torch
from torch import Tensor, nn

from taught.core.point import RESID_POST, Point
from taught.errors import UserError
from taught.model.gradients import evaluating
from taught.model.layout import accepts, counts_positions, first_device, text_config, tree_mask, written_out
from taught.model.points import find_part, first
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
        stacks: dict[str, nn.ModuleList] = {}  # of modules with parameters, but for those inside another one's entries
        for name, module in root.named_modules() if root is not None else ():
            whole = isinstance(module, nn.ModuleList) and len(module) == depth
            inside = any(name.startswith(f"{outer}.") for outer in stacks)
            if whole and not inside and next(module.parameters(), None) is not None:
                stacks[name] = module
        if len(stacks) == 1:
            return next(iter(stacks.values()))
    raise UserError(
        "the model's blocks were not found",
        value=f"{type(model).__name__}: {len(stacks)} lists of {depth} modules",
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


_PARTS = "_taught_parts"  # on the model, so that a copy of it is read alike


def get_point(model: nn.Module, point: Point) -> nn.Module:
    """The module whose output h is at a point.

    Cost: the first time, for anything but the residual stream, a forward pass over a few tokens up to the block.

    Raises
    ------
    UserError
        The model has no such block; the block has no such part, or one that is not read
        (:func:`taught.model.points.find_part`).
    """
    block = get_block(model, point.block)
    if point.part == RESID_POST:
        return block
    found = model.__dict__.setdefault(_PARTS, {})
    if point not in found:
        ids = torch.arange(1, 5, device=first_device(model))[None]
        places = torch.arange(ids.shape[1], device=ids.device)[None]

        def run() -> None:
            with capture_output(block, True), suppress(StopForward):
                _run(model, ids, places, None, 1)

        with evaluating(model), torch.no_grad():
            found[point] = find_part(block, point.part, run)
    return block.get_submodule(found[point])


class StopForward(Exception):
    """Raised in a hook to skip the part of a forward pass that nobody needs."""


@contextmanager
def capture_output(module: nn.Module, stop: bool = False) -> Iterator[list[Tensor]]:
    """Collect what ``module`` returns (its *output*, not its input). A copy goes on: some models add to it in place.

    Raises
    ------
    UserError
        The model calls the module again in one pass: h is not one vector for each token.
    """
    seen: list[Tensor] = []

    def hook(_module: nn.Module, _args: Any, output: Any) -> Any:
        if seen:
            raise UserError(
                "the model runs what is read more than once in a pass",
                value=type(module).__name__,
                rule="h at a point is one vector for each token",
                fix="read a block that is not in the loop, or leave sae.path and concepts empty",
            )
        seen.append(first(output))
        if stop:
            raise StopForward
        return with_first(output, seen[-1].clone())

    with module.register_forward_hook(hook):
        yield seen


def with_first(output: Any, value: Tensor) -> Any:
    """What a module returned, with another tensor in the place of its first."""
    return (value, *output[1:]) if isinstance(output, tuple) else value


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
        h = first(output)
        at, flat = places.to(h.device), h.flatten(0, 1)
        return with_first(output, flat.index_copy(0, at, edit(flat[at])).view_as(h))

    with module.register_forward_hook(hook):
        yield


def run_at(model: nn.Module, rows: Rows, places: Tensor) -> Tensor:
    """Where tokens of the rows, places in [B * T], stand in what the model is run on: each place where one does."""
    sequences = written_out(model, rows)
    if sequences is None:
        return places
    return torch.isin(sequences.token.flatten(), places).nonzero().flatten()


def forward(
    model: nn.Module, rows: Rows, *, point: Point | None = None, keep: int | Tensor = 0, stop_at_point: bool = False
) -> tuple[Tensor | None, Tensor | None]:
    """One forward pass over rows of token trees, written out where the model takes no trees.

    Parameters
    ----------
    model : a causal language model of the transformers library
    rows : the tokens
    point : Where h is read; None for nowhere
    keep : Logits at the last ``keep`` columns (0: all), or at the columns that a tensor names
    stop_at_point : Leave out everything after the point; no logits then

    Returns
    -------
    h : [B, T, D] or None
        What the model has at the point.
    logits : [B, K, V] or None
    """
    sequences = written_out(model, rows)
    if point is None:
        return None, _logits(model, rows, sequences, keep)
    with capture_output(get_point(model, point), stop_at_point) as seen:
        try:
            logits = _logits(model, rows, sequences, keep)
        except StopForward:
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
    positions = None
    if not counts_positions(model):
        positions = torch.arange(length, device=rows.ids.device).expand_as(sequences.ids)
    logits = _run(model, sequences.ids, positions, None, kept)
    return logits.flatten(0, 1)[wanted // length * len(kept) + column]


def _run(model: nn.Module, ids: Tensor, positions: Tensor | None, mask: Any, keep: int | Tensor) -> Tensor:
    """Logits of one call of the model, which is given what it takes."""
    inputs = {"position_ids": positions, "attention_mask": mask, "use_cache": False, "logits_to_keep": keep}
    logits: Tensor = model(input_ids=ids, **{name: x for name, x in inputs.items() if accepts(model, name)}).logits
    if accepts(model, "logits_to_keep"):
        return logits
    return logits[:, -keep:] if isinstance(keep, int) else logits[:, keep]


def _in_rows(h: Tensor, sequences: Sequences | None) -> Tensor:
    """What was computed for each token, as [B, T, D] of the rows."""
    return h if sequences is None else h.flatten(0, 1)[sequences.at.to(h.device)]


def vectors(model: nn.Module, rows: Rows, points: Sequence[Point]) -> list[Tensor]:
    """h [B, T, D] at each of some points, in one pass that ends with the last of their blocks."""
    last, sequences = get_block(model, max(point.block for point in points)), written_out(model, rows)
    modules = {point: get_point(model, point) for point in points}  # first: it may take passes of its own
    with ExitStack() as hooks:
        seen = {point: hooks.enter_context(capture_output(module)) for point, module in modules.items()}
        hooks.enter_context(capture_output(last, True))
        with suppress(StopForward):
            _logits(model, rows, sequences, 1)
    return [_in_rows(seen[point][0], sequences) for point in points]


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
