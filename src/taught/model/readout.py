"""Read-outs of the evaluation prompts: h at the read-out tokens and the behavior y."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence

from taught.core.behavior import Behavior, in_rows
from taught.core.point import RESID_POST, Point
from taught.errors import UserError
from taught.model.forward import capture_output, forward, get_point, log_probabilities, vectors
from taught.model.layout import accepts, first_device
from taught.model.tokens import Rows, TokenTree, ancestors, batches_by_tokens, build_tree, stack
from taught.progress import Progress, SilentProgress

# Attention over a packed row is quadratic: this keeps it a small share of the work.
PACK_TOKENS = 512

_AT_ONCE = 512  # prompts that are laid out together where there may be many


@dataclass(frozen=True)
class ReadPrompt:
    """One evaluation prompt as tokens.

    Attributes
    ----------
    ids : tokens, with the generation prompt
    read : places of the tokens at which h is read; none where nothing asks for h
    suffixes : token sequences behind the prompt whose log-probabilities make y
    """

    id: str
    ids: tuple[int, ...]
    read: tuple[int, ...] = ()
    suffixes: tuple[tuple[int, ...], ...] = ()

    @property
    def histories(self) -> set[tuple[int, ...]]:
        """What may stand behind the prompt where a token of a suffix is predicted, itself left out."""
        return {suffix[:cut] for suffix in self.suffixes for cut in range(1, len(suffix))}


@dataclass(frozen=True, eq=False)
class Scored:
    """Where the suffixes of some prompts are read, token by token.

    Attributes
    ----------
    at : int64 [t], place in the logits [B * K] that predicts a token
    tokens : int64 [t], the tokens
    suffix : int64 [t], ascending: the suffix that each belongs to
    lengths : int64 [S], tokens of each suffix
    prompt : int64 [S], ascending: the prompt of each
    """

    at: Tensor
    tokens: Tensor
    suffix: Tensor
    lengths: Tensor
    prompt: Tensor

    def to(self, device: torch.device) -> Scored:
        """The same on another device."""
        return Scored(*(x.to(device) for x in (self.at, self.tokens, self.suffix, self.lengths, self.prompt)))


@dataclass(frozen=True, eq=False)
class PackedPrompts:
    """Some prompts laid out as token trees: all in one row, or each in a row of its own.

    Attributes
    ----------
    index : positions of these prompts in the caller's list
    rows : B rows of T tokens
    read : int64 [M], places in [B * T] at which h is read, prompt by prompt
    offsets : int64 [n + 1], prompt i reads ``read[offsets[i]:offsets[i + 1]]``
    keep : int64 [K], ascending: the columns whose logits the suffixes need
    scored : the suffixes; of no token where no behavior is asked for
    """

    index: tuple[int, ...]
    rows: Rows
    read: Tensor
    offsets: Tensor
    keep: Tensor
    scored: Scored


@dataclass(frozen=True, eq=False)
class Readouts:
    """h [M, D] at the read-out tokens, offsets int64 [N + 1], y float64 [N]; ids of the prompts.

    ``margin`` [N] of a choice: of the right option over the best other one.
    """

    prompt_ids: tuple[str, ...]
    h: Tensor
    offsets: Tensor
    y: Tensor
    margin: Tensor | None = None


def prompt_tree(
    prompts: Sequence[ReadPrompt], behavior: Behavior | None
) -> tuple[TokenTree, list[list[int]], list[list[list[int]]]]:
    """Tree of prompts with their suffixes, whose last tokens predict nothing and are left out.

    Returns
    -------
    tree : TokenTree
    read : nodes at which each prompt's h is read
    predict : for each prompt and suffix the nodes that predict its tokens; without a behavior none
    """
    sequences: list[tuple[int, ...]] = []
    for prompt in prompts:
        end = max(prompt.read, default=len(prompt.ids) - 1) + 1 if behavior is None else len(prompt.ids)
        suffixes = () if behavior is None else prompt.suffixes
        sequences += [prompt.ids[:end], *((*prompt.ids, *suffix[:-1]) for suffix in suffixes)]
    tree, nodes = build_tree(sequences)
    each = iter(nodes)
    read, predict = [], []
    for prompt in prompts:
        own = next(each)
        read.append([own[t] for t in prompt.read])
        predict.append([next(each)[len(prompt.ids) - 1 :] for _ in (() if behavior is None else prompt.suffixes)])
    return tree, read, predict


def pack(
    prompts: Sequence[ReadPrompt], behavior: Behavior | None, *, tokens: int = PACK_TOKENS
) -> Iterator[PackedPrompts]:
    """Lay prompts out as token trees of about ``tokens`` tokens, each made when its turn comes.

    Prompts that start alike are put side by side, so that they share their beginning. Without a
    behavior the trees end at the last token that is read.
    """
    order = sorted(range(len(prompts)), key=lambda i: (prompts[i].ids, prompts[i].id))
    groups: list[list[int]] = []
    size = 0
    for i in order:
        before = prompts[groups[-1][-1]].ids if groups else ()
        pairs = enumerate(zip(before, prompts[i].ids, strict=False))
        shared = next((n for n, (a, b) in pairs if a != b), min(len(before), len(prompts[i].ids)))
        extra = len(prompts[i].ids) - shared + (len(prompts[i].histories) if behavior else 0)
        if groups and size + extra <= tokens:
            groups[-1].append(i)
            size += extra
        else:
            groups.append([i])
            size = extra + shared
    return (_pack_group(prompts, group, behavior) for group in groups)


def pack_rows(prompts: Sequence[ReadPrompt], behavior: Behavior | None, *, tokens: int) -> list[PackedPrompts]:
    """Lay prompts out one a row, at most ``tokens`` padded tokens at a time: nothing is shared.

    For what is asked of every prompt's own gradient.
    """
    trees = [prompt_tree([prompt], behavior) for prompt in prompts]
    batches = batches_by_tokens([len(tree) for tree, _, _ in trees], tokens)
    return [_laid_out(prompts, index, [trees[i] for i in index]) for index in batches]


def pack_apart(
    prompts: Sequence[ReadPrompt], behavior: Behavior, *, tokens: int = PACK_TOKENS
) -> Iterator[PackedPrompts]:
    """As :func:`pack`, for editing h at the read-out tokens: no edit reaches another prompt.

    Where a prompt's history holds a token at which another prompt of its tree is read and it
    is not itself, each prompt of that tree stands alone.
    """
    for packed in pack(prompts, behavior, tokens=tokens):
        scored, rows = packed.scored, packed.rows
        seen = ancestors(rows.enter[0], rows.leave[0], packed.keep[scored.at])
        history = torch.zeros(len(packed.index), rows.ids.shape[1], dtype=torch.long)  # [n, T]
        history = history.index_add(0, scored.prompt[scored.suffix], seen.long()) > 0
        prompt = torch.arange(len(packed.index)).repeat_interleave(packed.offsets.diff())
        own = torch.zeros_like(history)
        own[prompt, packed.read] = True
        if ((history & own.any(0)) == own).all():
            yield packed
        else:
            yield from (_pack_group(prompts, [i], behavior) for i in packed.index)


def _pack_group(prompts: Sequence[ReadPrompt], group: Sequence[int], behavior: Behavior | None) -> PackedPrompts:
    return _laid_out(prompts, group, [prompt_tree([prompts[i] for i in group], behavior)])


def _laid_out(
    prompts: Sequence[ReadPrompt],
    index: Sequence[int],
    trees: Sequence[tuple[TokenTree, list[list[int]], list[list[list[int]]]]],
) -> PackedPrompts:
    """Trees as rows that are padded on the left."""
    rows = stack([tree for tree, _, _ in trees])
    width = rows.ids.shape[1]
    read, predict = [], []
    for row, (tree, read_nodes, predict_nodes) in enumerate(trees):
        start = row * width + width - len(tree)
        read += [[start + node for node in nodes] for nodes in read_nodes]
        predict += [[[start + node for node in nodes] for nodes in own] for own in predict_nodes]
    places = _longs(place for own in predict for nodes in own for place in nodes)
    keep, kept = (places % width).unique(return_inverse=True)
    lengths = _longs(len(nodes) for own in predict for nodes in own)
    scored = Scored(
        at=places // width * len(keep) + kept,
        tokens=_longs(t for i, own in zip(index, predict, strict=True) if own for s in prompts[i].suffixes for t in s),
        suffix=torch.arange(len(lengths)).repeat_interleave(lengths),
        lengths=lengths,
        prompt=_longs(k for k, own in enumerate(predict) for _ in own),
    )
    offsets = torch.tensor([0, *map(len, read)]).cumsum(0)
    return PackedPrompts(tuple(index), rows, _longs(place for own in read for place in own), offsets, keep, scored)


def _longs(values: Iterable[int]) -> Tensor:
    return torch.tensor(list(values), dtype=torch.long)


def read_y(model: nn.Module, packed: PackedPrompts, behavior: Behavior) -> Tensor:
    """y of some prompts alone, [n]: see :func:`read_packed`."""
    _, y = read_packed(model, packed, behavior, None)
    assert y is not None
    return y


def read_packed(
    model: nn.Module, packed: PackedPrompts, behavior: Behavior | None, point: Point | None
) -> tuple[Tensor, Tensor | None]:
    """h [M, D] at the read-out tokens and y [n] of some packed prompts, as autograd sees them.

    Without a point h is empty, [0, 0].
    """
    device = first_device(model)
    rows = packed.rows.to(device)
    h, logits = forward(model, rows, point=point, keep=packed.keep.to(device), stop_at_point=behavior is None)
    read = rows.ids.new_zeros(0, 0, dtype=torch.float32) if h is None else h.flatten(0, 1)[packed.read.to(h.device)]
    if behavior is None or logits is None:
        return read, None
    scored = packed.scored.to(logits.device)
    tokens = log_probabilities(logits.flatten(0, 1), (scored.at,), scored.tokens)
    suffixes = in_rows(tokens, scored.suffix, len(scored.lengths), 0.0).sum(1)
    return read, behavior.value(suffixes, scored.lengths, scored.prompt, len(packed.index))


@torch.no_grad()
def read_prompts(
    model: nn.Module,
    prompts: Sequence[ReadPrompt],
    behavior: Behavior,
    point: Point | None,
    *,
    progress: Progress | None = None,
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
    chosen = hasattr(behavior, "margin")
    margin = torch.zeros(len(prompts), dtype=torch.float64)
    wanted: Any = _WithMargin(behavior) if chosen else behavior
    waiting = list(pack(prompts, wanted))
    while waiting:
        packed = waiting.pop(0)
        hidden, value = read_packed(model, packed, wanted, point)
        assert value is not None
        if len(packed.index) > 1 and not (hidden.isfinite().all() and value.isfinite().all()):
            # 0 * nan is nan: one prompt spoils its tree. Alone, each shows whether it is the one.
            waiting += [_pack_group(prompts, [i], wanted) for i in packed.index]
            continue
        for row, i in enumerate(packed.index):
            h[i] = hidden[packed.offsets[row] : packed.offsets[row + 1]].cpu()
        if chosen:
            margin[list(packed.index)] = value[:, 1].double().cpu()
            value = value[:, 0]
        y[list(packed.index)] = value.double().cpu()
        (progress or SilentProgress()).advance(len(packed.index))
    found = _assemble(prompts, h, y)
    return replace(found, margin=margin) if chosen else found


@dataclass(frozen=True)
class _WithMargin:
    """A behavior about a choice: its y and its margin side by side, [n, 2]."""

    behavior: Any

    def value(self, logp: Tensor, lengths: Tensor, prompt: Tensor, n: int) -> Tensor:
        read = logp, lengths, prompt, n
        return torch.stack([self.behavior.value(*read), self.behavior.margin(*read)], 1)


@torch.no_grad()
def read_vectors(
    model: nn.Module,
    prompts: Sequence[ReadPrompt],
    points: Sequence[Point],
    reduce: Callable[[Tensor, Tensor], Tensor],
    *,
    tokens: int = PACK_TOKENS,
    progress: Progress | None = None,
) -> Tensor:
    """What is made of h at some points: float64 [points, N, ...], on the CPU.

    Cost: one forward pass over the distinct tokens, up to the last of their blocks.

    Parameters
    ----------
    prompts : prompts, or examples as prompts: what counts is where h is read
    reduce
        (h [M, D] at the read-out tokens of n prompts, offsets [n + 1]) -> [n, ...], such as a pooling or a feature map.
    tokens : size of a token tree

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
                for h in vectors(model, rows, points)
            ]
        )

    index: list[int] = []
    parts: list[Tensor] = []
    for start in range(0, len(prompts), _AT_ONCE):  # masks are quadratic, and there may be many prompts
        some = prompts[start : start + _AT_ONCE]
        for packed in pack(some, None, tokens=tokens):
            values = reduced(packed)
            if not values.isfinite().all():  # 0 * nan is nan: one prompt spoils its tree
                bad = [i for i in packed.index if not reduced(_pack_group(some, [i], None)).isfinite().all()]
                _refuse_nonfinite([some[i].id for i in bad or packed.index])
            index += [start + i for i in packed.index]
            parts.append(values)
            (progress or SilentProgress()).advance(len(packed.index))
    return torch.cat(parts, 1)[:, torch.tensor(index).argsort()]


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
    behavior: Behavior,
    point: Point | None,
    *,
    batch_size: int = 16,
    progress: Progress | None = None,
) -> Readouts:
    """The same read-outs as the published loop takes them: one pass for h, one per suffix.

    Plain padded batches, nothing shared: the reference that :func:`read_prompts` is checked against, and the baseline
    of benchmarks/smda_loop.py. Each suffix is appended before padding and indexed row by row.
    """
    h: list[Tensor] = [torch.zeros(0, 0)] * len(prompts)
    y = torch.zeros(len(prompts), dtype=torch.float64)
    for start in range(0, len(prompts), batch_size):
        chunk = prompts[start : start + batch_size]
        if point is not None:
            hidden = _plain_hidden(model, *_pad_right([prompt.ids for prompt in chunk]), point)
            h[start : start + len(chunk)] = [hidden[row, list(p.read)].cpu() for row, p in enumerate(chunk)]
        logp = [[torch.empty(0)] * len(prompt.suffixes) for prompt in chunk]
        for number in range(max(len(prompt.suffixes) for prompt in chunk)):
            rows = [row for row, prompt in enumerate(chunk) if number < len(prompt.suffixes)]
            found = _plain_suffixes(model, [(chunk[row].ids, chunk[row].suffixes[number]) for row in rows])
            for row, value in zip(rows, found, strict=True):
                logp[row][number] = value
        flat = torch.stack([value for own in logp for value in own])
        lengths = _longs(len(s) for prompt in chunk for s in prompt.suffixes).to(flat.device)
        of = _longs(row for row, prompt in enumerate(chunk) for _ in prompt.suffixes).to(flat.device)
        y[start : start + len(chunk)] = behavior.value(flat, lengths, of, len(chunk)).double().cpu()
        (progress or SilentProgress()).advance(len(chunk))
    return _assemble(prompts, h, y)


def _pad_right(sequences: Sequence[Sequence[int]]) -> tuple[Tensor, Tensor]:
    rows = [torch.tensor(sequence, dtype=torch.long) for sequence in sequences]
    return pad_sequence(rows, batch_first=True), pad_sequence([torch.ones_like(row) for row in rows], batch_first=True)


def _plain_hidden(model: nn.Module, ids: Tensor, mask: Tensor, point: Point) -> Tensor:
    device = first_device(model)
    inputs = {"input_ids": ids.to(device), "attention_mask": mask.to(device), "use_cache": False}
    if point.part != RESID_POST:
        with capture_output(get_point(model, point)) as seen:
            model(**inputs)
        return seen[0]
    states = model(**inputs, output_hidden_states=True).hidden_states
    # hidden_states[l] is the input of block l. The last entry is normed, so block L-1 needs a hook.
    if point.block + 2 == len(states):
        raise UserError(
            "the plain read-out cannot read the last block",
            value=point.block,
            rule="its hidden state is normed",
            fix="use an earlier block",
        )
    hidden: Tensor = states[point.block + 1]
    return hidden


def _plain_suffixes(model: nn.Module, rows: Sequence[tuple[tuple[int, ...], tuple[int, ...]]]) -> Tensor:
    """Log-probability of one suffix behind each of some prompts, [n]."""
    device = first_device(model)
    ids, mask = _pad_right([(*prompt, *suffix) for prompt, suffix in rows])
    first = min(len(prompt) for prompt, _ in rows) - 1
    keep = {"logits_to_keep": ids.shape[1] - first} if accepts(model, "logits_to_keep") else {}
    logits = model(input_ids=ids.to(device), attention_mask=mask.to(device), use_cache=False, **keep).logits
    first = first if keep else 0
    found = []
    for row, (prompt, suffix) in zip(logits, rows, strict=True):
        at = torch.arange(len(suffix), device=row.device) + len(prompt) - 1 - first
        found.append(log_probabilities(row, (at,), torch.tensor(suffix, dtype=torch.long, device=row.device)).sum())
    return torch.stack(found)
