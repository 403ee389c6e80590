"""Read-outs of the evaluation prompts: residuals h at the read-out tokens and the behavior y."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from taught.errors import UserError
from taught.model.behavior import PrefixBehavior
from taught.model.forward import first_device, forward, residuals
from taught.model.tokens import Rows, TokenTree, build_tree, stack

# Attention over a packed row is quadratic: this keeps it a small share of the work.
PACK_TOKENS = 512

_AT_ONCE = 512  # prompts that are laid out together where there may be many

# How far y may differ between trees and plain passes: rounding of logits of about 16.
_TREE_TOLERANCE = {torch.bfloat16: 0.5, torch.float16: 0.1}


@dataclass(frozen=True)
class ReadPrompt:
    """One evaluation prompt: token ids with the generation prompt, and where h is read."""

    id: str
    ids: tuple[int, ...]
    read: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class PackedPrompts:
    """Some prompts laid out as one token tree.

    Attributes
    ----------
    index : positions of these prompts in the caller's list
    rows : one row
    read : int64 [M], columns at which h is read, prompt by prompt
    offsets : int64 [n + 1], prompt i reads ``read[offsets[i]:offsets[i + 1]]``
    predict : int64 [n, slots], columns whose logits the behavior needs
    """

    index: tuple[int, ...]
    rows: Rows
    read: Tensor
    offsets: Tensor
    predict: Tensor


@dataclass(frozen=True, eq=False)
class Readouts:
    """h [M, D] at the read-out tokens, offsets int64 [N + 1], y float64 [N]; ids of the prompts."""

    prompt_ids: tuple[str, ...]
    h: Tensor
    offsets: Tensor
    y: Tensor


def prompt_tree(
    prompts: Sequence[ReadPrompt], behavior: PrefixBehavior | None
) -> tuple[TokenTree, list[list[int]], list[list[int]]]:
    """Tree of prompts, the behavior's inner nodes under each, with read and predict nodes."""
    paths = behavior.inner_paths() if behavior is not None else []
    sequences: list[tuple[int, ...]] = []
    for prompt in prompts:
        ids = prompt.ids if behavior is not None else prompt.ids[: max(prompt.read) + 1]
        sequences += [ids, *[(*ids, *path) for path in paths]]
    tree, nodes = build_tree(sequences)
    step = 1 + len(paths)
    read = [[nodes[i * step][t] for t in prompt.read] for i, prompt in enumerate(prompts)]
    predict = [[nodes[i * step + k][-1] for k in range(step)] for i in range(len(prompts))]
    return tree, read, predict


def pack(
    prompts: Sequence[ReadPrompt], behavior: PrefixBehavior | None, *, tokens: int = PACK_TOKENS
) -> Iterator[PackedPrompts]:
    """Lay prompts out as token trees of about ``tokens`` tokens, each made when its turn comes.

    Prompts that start alike are put side by side, so that they share their beginning. Without a
    behavior the trees end at the last token that is read.
    """
    order = sorted(range(len(prompts)), key=lambda i: (prompts[i].ids, prompts[i].id))
    groups: list[list[int]] = []
    size = 0
    for i in order:
        shared = _common(prompts[groups[-1][-1]].ids, prompts[i].ids) if groups else 0
        extra = len(prompts[i].ids) - shared + (len(behavior.inner) if behavior else 0)
        if groups and size + extra <= tokens:
            groups[-1].append(i)
            size += extra
        else:
            groups.append([i])
            size = len(prompts[i].ids)
    return (_pack_group(prompts, group, behavior) for group in groups)


def pack_apart(
    prompts: Sequence[ReadPrompt], behavior: PrefixBehavior, *, tokens: int = PACK_TOKENS
) -> Iterator[PackedPrompts]:
    """As :func:`pack`, for editing h at the read-out tokens: no edit reaches another prompt.

    Where a prompt's history holds a token at which another prompt of its tree is read and it
    is not itself, each prompt of that tree stands alone.
    """
    for packed in pack(prompts, behavior, tokens=tokens):
        if _reads_apart(packed):
            yield packed
        else:
            yield from (_pack_group(prompts, [i], behavior) for i in packed.index)


def _reads_apart(packed: PackedPrompts) -> bool:
    history = packed.rows.mask[0][packed.predict].any(1)  # [n, T]
    prompt = torch.arange(len(packed.index)).repeat_interleave(packed.offsets.diff())
    own = torch.zeros_like(history)
    own[prompt, packed.read] = True
    return bool(((history & own.any(0)) == own).all())


def _pack_group(prompts: Sequence[ReadPrompt], group: list[int], behavior: PrefixBehavior | None) -> PackedPrompts:
    tree, read, predict = prompt_tree([prompts[i] for i in group], behavior)
    flat = [node for nodes in read for node in nodes]
    offsets = torch.tensor([0, *[len(nodes) for nodes in read]]).cumsum(0)
    return PackedPrompts(tuple(group), stack([tree]), torch.tensor(flat), offsets, torch.tensor(predict))


def _common(a: Sequence[int], b: Sequence[int]) -> int:
    n = 0
    for x, y in zip(a, b, strict=False):
        if x != y:
            break
        n += 1
    return n


def read_packed(
    model: nn.Module, packed: PackedPrompts, behavior: PrefixBehavior | None, block: int
) -> tuple[Tensor, Tensor | None]:
    """h [M, D] at the read-out tokens and y [n] of one packed tree, as autograd sees them."""
    device = first_device(model)
    rows = packed.rows.to(device)
    keep = packed.predict.flatten().to(device)
    h, logits = forward(model, rows, block=block, keep=keep, stop_at_block=behavior is None)
    assert h is not None
    read = h[0, packed.read.to(h.device)]
    if behavior is None or logits is None:
        return read, None
    return read, behavior.log_probability(logits[0].unflatten(0, packed.predict.shape))


@torch.no_grad()
def read_prompts(
    model: nn.Module, prompts: Sequence[ReadPrompt], behavior: PrefixBehavior, block: int, *, progress: Any = None
) -> Readouts:
    """Read-outs of all prompts in one forward pass over their token trees.

    Cost: one forward pass over the distinct tokens (the shared chat-template prefix once a tree).

    Raises
    ------
    UserError
        A read-out is not finite: the ids of the prompts.
    """
    h: list[Tensor | None] = [None] * len(prompts)
    y = torch.zeros(len(prompts), dtype=torch.float64)
    waiting = list(pack(prompts, behavior))
    while waiting:
        packed = waiting.pop(0)
        hidden, value = read_packed(model, packed, behavior, block)
        assert value is not None
        if len(packed.index) > 1 and not (hidden.isfinite().all() and value.isfinite().all()):
            # 0 * nan is nan: one prompt spoils its tree. Alone, each shows whether it is the one.
            waiting += [_pack_group(prompts, [i], behavior) for i in packed.index]
            continue
        for row, i in enumerate(packed.index):
            h[i] = hidden[packed.offsets[row] : packed.offsets[row + 1]].cpu()
        y[list(packed.index)] = value.double().cpu()
        if progress is not None:
            progress.advance(len(packed.index))
    return _assemble(prompts, h, y)


@torch.no_grad()
def read_residuals(
    model: nn.Module,
    prompts: Sequence[ReadPrompt],
    blocks: Sequence[int],
    reduce: Callable[[Tensor, Tensor], Tensor],
    *,
    tokens: int = PACK_TOKENS,
    progress: Any = None,
) -> Tensor:
    """What is made of the residuals after some blocks: float64 [blocks, N, ...], on the CPU.

    Cost: one forward pass over the distinct tokens, up to the last of the blocks.

    Parameters
    ----------
    prompts
        Prompts, or examples as prompts: what counts is where h is read.
    reduce
        (h [M, D] at the read-out tokens of n prompts, offsets [n + 1]) -> [n, ...], such as a
        pooling or a feature map.
    tokens
        Size of a token tree.

    Raises
    ------
    UserError
        A value is not finite: the ids of the prompts.
    """

    def reduced(packed: PackedPrompts) -> Tensor:
        rows = packed.rows.to(first_device(model))
        return torch.stack(
            [
                reduce(h[0, packed.read.to(h.device)], packed.offsets.to(h.device)).double().cpu()
                for h in residuals(model, rows, blocks)
            ]
        )

    index: list[int] = []
    parts: list[Tensor] = []
    for packed in _packs(prompts, tokens):
        values = reduced(packed)
        if not values.isfinite().all():  # 0 * nan is nan: one prompt spoils its tree
            bad = [i for i in packed.index if not reduced(_pack_group(prompts, [i], None)).isfinite().all()]
            _refuse_nonfinite([prompts[i].id for i in bad or packed.index])
        index += packed.index
        parts.append(values)
        if progress is not None:
            progress.advance(len(packed.index))
    return torch.cat(parts, 1)[:, torch.tensor(index).argsort()]


def _packs(prompts: Sequence[ReadPrompt], tokens: int) -> Iterator[PackedPrompts]:
    """Token trees of some prompts at a time: masks are quadratic, and there may be many prompts."""
    for start in range(0, len(prompts), _AT_ONCE):
        for packed in pack(prompts[start : start + _AT_ONCE], None, tokens=tokens):
            yield replace(packed, index=tuple(start + i for i in packed.index))


def _assemble(prompts: Sequence[ReadPrompt], h: Iterable[Any], y: Tensor) -> Readouts:
    pieces = list(h)
    bad = [
        p.id
        for p, piece, v in zip(prompts, pieces, y, strict=True)
        if not (torch.isfinite(v) and torch.isfinite(piece).all())
    ]
    _refuse_nonfinite(bad)
    offsets = torch.tensor([0, *[len(piece) for piece in pieces]]).cumsum(0)
    return Readouts(tuple(p.id for p in prompts), torch.cat(pieces), offsets, y)


def _refuse_nonfinite(ids: Sequence[str]) -> None:
    if ids:
        raise UserError(
            "read-outs are not finite",
            value=list(ids[:10]),
            rule="h and y must be finite numbers",
            fix="use --set model.dtype=float32, or remove these prompts",
        )


@torch.no_grad()
def read_prompts_plain(
    model: nn.Module,
    prompts: Sequence[ReadPrompt],
    behavior: PrefixBehavior,
    block: int,
    *,
    batch_size: int = 16,
    progress: Any = None,
) -> Readouts:
    """The same read-outs as the published loop takes them: one pass for h, one per prefix.

    Plain padded batches, nothing shared: the reference that :func:`read_prompts` is checked
    against, and the baseline of benchmarks/smda_loop.py. Each prefix is appended before padding and
    indexed row by row (trap 3).
    """
    h: list[Tensor | None] = [None] * len(prompts)
    y = torch.zeros(len(prompts), dtype=torch.float64)
    for start in range(0, len(prompts), batch_size):
        chunk = list(range(start, min(start + batch_size, len(prompts))))
        ids, mask = _pad_right([prompts[i].ids for i in chunk])
        hidden = _plain_hidden(model, ids, mask, block)
        for row, i in enumerate(chunk):
            h[i] = hidden[row, list(prompts[i].read)].cpu()
        terms = [_plain_prefix(model, [prompts[i].ids for i in chunk], p) for p in behavior.tokens]
        y[chunk] = torch.logsumexp(torch.stack(terms), 0).double().cpu()
        if progress is not None:
            progress.advance(len(chunk))
    return _assemble(prompts, h, y)


def _pad_right(sequences: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    width = max(map(len, sequences))
    ids = torch.zeros(len(sequences), width, dtype=torch.long)
    mask = torch.zeros_like(ids)
    for row, sequence in enumerate(sequences):
        ids[row, : len(sequence)] = torch.tensor(sequence)
        mask[row, : len(sequence)] = 1
    return ids, mask


def _plain_hidden(model: nn.Module, ids: Tensor, mask: Tensor, block: int) -> Tensor:
    device = first_device(model)
    out = model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False, output_hidden_states=True)
    # hidden_states[l] is the input of block l. The last entry is normed, so block L-1 needs a hook.
    if block + 2 == len(out.hidden_states):
        raise UserError(
            "the plain read-out cannot read the last block",
            value=block,
            rule="its hidden state is normed",
            fix="use an earlier block",
        )
    return out.hidden_states[block + 1]


def _plain_prefix(model: nn.Module, prompts: Sequence[Sequence[int]], prefix: Sequence[int]) -> Tensor:
    device = first_device(model)
    ids, mask = _pad_right([(*p, *prefix) for p in prompts])
    logits = model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False).logits
    logp = torch.log_softmax(logits if logits.dtype == torch.float64 else logits.float(), -1)
    rows = torch.arange(len(prompts), device=logp.device)
    first = torch.tensor([len(p) - 1 for p in prompts], device=logp.device)
    return sum(logp[rows, first + j, token] for j, token in enumerate(prefix))  # type: ignore[return-value]


def check_trees(model: nn.Module, prompts: Sequence[ReadPrompt], behavior: PrefixBehavior, *, count: int = 2) -> float:
    """Largest difference in y between token trees and plain passes on the first prompts.

    Raises
    ------
    UserError
        The model does not compute the same in a tree (a recurrent state, positions that ignore
        ``position_ids``, a mask of its own): token trees must not be used with it.
    """
    some = list(prompts[:count])
    plain = read_prompts_plain(model, some, behavior, block=0).y  # only y is compared
    tolerance = _TREE_TOLERANCE.get(next(model.parameters()).dtype, 1e-2)
    worst = float((read_prompts(model, some, behavior, 0).y - plain).abs().max())
    if not worst <= tolerance:
        raise UserError(
            "the model does not give the same read-outs in a token tree as in plain passes",
            value=f"largest difference in y {worst:.3g} on prompts {[p.id for p in some]}",
            rule=f"at most {tolerance:g}",
            fix="use a causal transformer that takes a 4-dimensional attention mask",
        )
    return worst
