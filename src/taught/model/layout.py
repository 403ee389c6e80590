"""How a model is given rows of tokens: as token trees with a mask, or written out in plain passes.

A tree needs a model that takes a 4-dimensional mask and explicit positions and is told by them alone which tokens a
token sees and where it stands. Which of a token's ancestors it sees is then the model's own rule (a sliding window,
chunks, another one in every layer), asked of ``transformers`` for a plain sequence. For every other model, and for
sequences whose mask would be too large, each sequence of a tree is a plain sequence of a batch that is padded on the
right, with no mask: what stands behind a token changes nothing for a causal model.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from functools import cache
from typing import Any

import torch
from torch import Tensor, nn

from taught.errors import UserError
from taught.model.tokens import Rows, Sequences, ends, write_out

# A mask of so many tokens takes 0.2 GB while it is made; longer rows are written out.
MASK_TOKENS = 4096
# What the masks that a model makes for itself may take, in bytes.
_OWN_MASKS = 16 * 2**30

_ATTENTION = {"full_attention", "sliding_attention", "chunked_attention"}
_PLAIN = "_taught_plain_passes"  # on the model, so that a copy of it is read alike


def text_config(model: nn.Module) -> Any:
    """The configuration of the model's language model."""
    config: Any = model.config
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def first_device(model: nn.Module) -> torch.device:
    """Where token ids go: the device of the first parameters (a model may lie on several)."""
    return next(model.parameters()).device


def use_plain_passes(model: nn.Module, plain: bool = True) -> None:
    """Read this model in plain passes from now on, whatever its kind."""
    setattr(model, _PLAIN, plain)


def takes_trees(model: nn.Module) -> bool:
    """Whether rows go to the model as trees: said by ``use_plain_passes``, or else by the model's kind.

    Recurrent layers, convolutions over tokens, positions by distance (ALiBi) and masks that attention makes for
    itself do not follow a tree.
    """
    plain = getattr(model, _PLAIN, None)
    if plain is not None:
        return not plain
    config = text_config(model)
    local = "local" in (getattr(config, "attention_layers", None) or ())
    types = set(getattr(config, "layer_types", None) or ())
    mixing = (nn.Conv1d, nn.RNNBase)
    return (
        accepts(model, "position_ids")
        and not counts_positions(model)
        and not (local or getattr(config, "alibi", False))
        and types <= _ATTENTION
        and not any(isinstance(module, mixing) for module in model.modules())
    )


def accepts(model: nn.Module, name: str) -> bool:
    """Whether the model's forward pass has an argument of this name (or takes whatever it is given)."""
    forward = getattr(model.forward, "__func__", None)  # of a class: looked at once
    names = _arguments(model.forward) if forward is None else _arguments_once(forward)
    return name in names if "input_ids" in names else True


def _arguments(forward: Callable[..., Any]) -> frozenset[str]:
    return frozenset(inspect.signature(forward).parameters)


_arguments_once = cache(_arguments)


def counts_positions(model: nn.Module) -> bool:
    """Whether the model counts positions by what the tokens are, as RoBERTa does: none may be given to it."""
    return any(
        isinstance(module, nn.Embedding) and module.padding_idx is not None and name.endswith("position_embeddings")
        for name, module in model.named_modules()
    )


def written_out(model: nn.Module, rows: Rows) -> Sequences | None:
    """The plain sequences that the model is given for these rows; None: it is given the rows as trees.

    Raises
    ------
    UserError
        The model would make a mask for itself that is too large, or give texts other positions beside a longer one.
    """
    # The longest text of a pass decides for all: a shorter one would not be read as it is alone. A pass leaves out the
    # last token of what is scored, so that of ``limit`` tokens it is not known which side they are.
    if (limit := stretched_from(model).get("longrope")) is not None:
        lengths = rows.positions[ends(rows)] + 1
        if lengths.min() <= limit <= lengths.max():
            raise UserError(
                "a text is too long beside shorter ones",
                value=f"a pass over texts of {int(lengths.min())} to {int(lengths.max())} tokens",
                rule=f"longrope: beyond {limit} tokens this model scales the positions of all texts of a pass",
                fix=f"set examples.max_tokens={limit} and examples.drop_truncated=true, and remove longer prompts",
            )
    if rows.ids.shape[1] <= MASK_TOKENS and takes_trees(model):
        return None
    sequences = write_out(rows)
    refuse_large_masks(model, *sequences.ids.shape)
    return sequences


def stretched_from(model: nn.Module) -> dict[str, int]:
    """Kind of rotary positions -> the most tokens of a pass up to which they are plain, where longer ones differ.

    The longest text of a pass decides for all of it (``longrope``, ``dynamic``).
    """
    config = text_config(model)
    found = getattr(config, "rope_parameters", None) or {}
    limits: dict[str, int] = {}
    for own in (found, *(part for part in found.values() if isinstance(part, Mapping))):
        if (kind := own.get("rope_type")) in ("longrope", "dynamic"):
            most = int(own.get("original_max_position_embeddings") or config.max_position_embeddings)
            limits[kind] = min(most, limits.get(kind, most))
    return limits


def sequence_rows(model: nn.Module, rows: Rows) -> Tensor | None:
    """The row that each sequence belongs to, int64 [P], where the model is run on more sequences than rows."""
    if rows.ids.shape[1] <= MASK_TOKENS and takes_trees(model):
        return None
    row, _ = ends(rows).nonzero(as_tuple=True)
    return row if len(row) > len(rows.ids) else None


def real_tokens(model: nn.Module, rows: Rows) -> Tensor:
    """Which inputs of a layer are tokens and not padding: bool [rows, T], in the layout of an example's factors."""
    sequences = written_out(model, rows)
    if sequences is None:
        width = rows.ids.shape[1]
        return torch.arange(width, device=rows.ids.device) >= width - rows.lengths[:, None].to(rows.ids.device)
    real, row = sequences.token >= 0, sequences.row
    slot = torch.arange(len(row), device=row.device) - torch.searchsorted(row, row)
    found = real.new_zeros(len(rows.ids), int(slot.max()) + 1, real.shape[1])
    found[row, slot] = real
    return found.flatten(1)


def refuse_large_masks(model: nn.Module, count: int, length: int) -> None:
    """Raise a UserError where a pass over sequences of this length would allocate masks beyond all measure."""
    config = text_config(model)
    heads = int(getattr(config, "num_attention_heads", 1) or 1)
    eager = getattr(config, "_attn_implementation", "sdpa") == "eager"
    windows = any(getattr(config, name, None) for name in ("sliding_window", "attention_chunk_size"))
    need = count * length**2 * (4 * heads if eager else 1 if windows else 0)
    if need > _OWN_MASKS:
        raise UserError(
            "a text is too long for this model's attention",
            value=f"{length} tokens: {need / 2**30:.0f} GB for masks and attention weights of one layer",
            rule=f"at most {_OWN_MASKS / 2**30:.0f} GB",
            fix="set examples.max_tokens, and remove the longest prompts",
        )


def visible(model: nn.Module, length: int) -> Tensor | dict[str, Tensor | None] | None:
    """Which positions each position of a plain sequence sees, where that is not all before it.

    Returns
    -------
    bool [length, length]; where layers differ one for each type of layer, None for those that see all;
    None where all layers do
    """
    config = text_config(model)
    if not any(getattr(config, name, None) for name in ("layer_types", "sliding_window", "attention_chunk_size")):
        return None
    from transformers.masking_utils import create_masks_for_generate

    device = next(model.parameters()).device
    embeddings = torch.empty(1, length, 1, device=device)
    given = {  # versions of transformers differ in their names
        "config": config,
        "inputs_embeds": embeddings,
        "input_embeds": embeddings,
        "cache_position": torch.arange(length, device=device),
    }
    names = inspect.signature(create_masks_for_generate).parameters
    needed = [name for name, of in names.items() if of.default is of.empty and of.kind is not of.VAR_KEYWORD]
    made = create_masks_for_generate(**{name: given.get(name) for name in needed})
    causal = torch.ones(length, length, dtype=torch.bool, device=device).tril()
    found: dict[str, Tensor | None] = {}
    for kind, mask in (made if isinstance(made, dict) else {"": made}).items():
        sees = None if mask is None else mask[0, 0] if mask.dtype == torch.bool else mask[0, 0] == 0
        found[kind] = None if sees is None or torch.equal(sees, causal) else sees
    if all(sees is None for sees in found.values()):
        return None
    return found if len(found) > 1 else next(iter(found.values()))


def tree_mask(model: nn.Module, rows: Rows) -> Tensor | dict[str, Tensor]:
    """The mask of trees as the model takes it: one, or one for each type of layer."""
    dtype = next(model.parameters()).dtype
    sees = visible(model, int(rows.positions.max()) + 1)
    if not isinstance(sees, dict):
        return rows.additive_mask(dtype, sees)
    return {kind: rows.additive_mask(dtype, own) for kind, own in sees.items()}
