"""Token trees: many sequences in one forward pass, shared beginnings computed once.

A set of sequences that start alike (a chat template's system turn, then the prompts, then the
tokens of the behavior's prefixes) is a tree. Laid out in one row, with every token attending to its
ancestors only and its depth as its position, a causal transformer computes for each token exactly
what it computes in the token's own sequence. Gradients through shared tokens add up by themselves.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, eq=False)
class TokenTree:
    """A tree of tokens in topological order (a parent stands before its children).

    Attributes
    ----------
    ids : int64 [T]
    parents : int64 [T]
        Index of the parent, -1 for a root.
    """

    ids: Tensor
    parents: Tensor

    def __len__(self) -> int:
        return len(self.ids)

    def depths(self) -> Tensor:
        """int64 [T]: how many ancestors each node has."""
        depth: list[int] = []
        for parent in self.parents.tolist():
            depth.append(depth[parent] + 1 if parent >= 0 else 0)
        return torch.tensor(depth)

    def spans(self) -> tuple[Tensor, Tensor]:
        """Each node's place in depth-first order, and the place behind its last descendant."""
        parents = self.parents.tolist()
        size = [1] * len(parents)
        for node in range(len(parents) - 1, -1, -1):
            if parents[node] >= 0:
                size[parents[node]] += size[node]
        enter = [0] * len(parents)
        free, roots = [0] * len(parents), 0  # where the next child of a node, the next root begins
        for node, parent in enumerate(parents):
            if parent < 0:
                enter[node], roots = roots, roots + size[node]
            else:
                enter[node] = free[parent]
                free[parent] += size[node]
            free[node] = enter[node] + 1
        first = torch.tensor(enter)
        return first, first + torch.tensor(size)


def build_tree(sequences: Sequence[Sequence[int]]) -> tuple[TokenTree, list[list[int]]]:
    """Merge sequences into a tree.

    Returns
    -------
    tree : TokenTree
    nodes : list of lists
        ``nodes[i][t]`` is the tree index of token t of sequence i.
    """
    children: dict[tuple[int, int], int] = {}
    ids: list[int] = []
    parents: list[int] = []
    nodes: list[list[int]] = []
    for sequence in sequences:
        node, path = -1, []
        for token in sequence:
            key = (node, int(token))
            if key not in children:
                children[key] = len(ids)
                ids.append(int(token))
                parents.append(node)
            node = children[key]
            path.append(node)
        nodes.append(path)
    return TokenTree(torch.tensor(ids), torch.tensor(parents)), nodes


def ancestors(enter: Tensor, leave: Tensor, some: Tensor | None = None) -> Tensor:
    """bool [..., T, T], which tokens each token has above it or is, of their spans [..., T]; [S, T] of some."""
    own = (enter if some is None else enter[some])[..., None]
    return (enter[..., None, :] <= own) & (own < leave[..., None, :])


@dataclass(frozen=True, eq=False)
class Rows:
    """Trees stacked to a batch, padded on the left so that their last tokens stand in one column.

    Attributes
    ----------
    ids, positions : int64 [B, T]
    enter, leave : int64 [B, T]
        The span of each token (``TokenTree.spans``); a padding slot has one of its own, below zero.
    lengths : int64 [B]
        Number of real tokens of each row.
    """

    ids: Tensor
    positions: Tensor
    enter: Tensor
    leave: Tensor
    lengths: Tensor

    @property
    def mask(self) -> Tensor:
        """bool [B, T, T]: (s, t) is true where s attends to t.

        A padding slot attends to itself only, and nothing else attends to it.
        """
        return ancestors(self.enter, self.leave)

    def to(self, device: torch.device) -> Rows:
        """The same rows on another device."""
        return Rows(*(x.to(device) for x in (self.ids, self.positions, self.enter, self.leave, self.lengths)))

    def additive_mask(self, dtype: torch.dtype, sees: Tensor | None = None) -> Tensor:
        """The mask as attention implementations take it: [B, 1, T, T], 0 or the lowest number.

        Parameters
        ----------
        sees : bool [L, L], which positions the model lets each position of a plain sequence see; None: all before it
        """
        mask = self.mask
        if sees is not None:
            mask &= sees[self.positions[:, :, None], self.positions[:, None]]
        zeros = torch.zeros(mask.shape, dtype=dtype, device=mask.device)
        return zeros.masked_fill(~mask, torch.finfo(dtype).min).unsqueeze(1)


@dataclass(frozen=True, eq=False)
class Sequences:
    """Rows written out: every sequence of their trees for itself, padded on the right.

    What they share is there as often as they are.

    Attributes
    ----------
    ids : int64 [P, L]
    row : int64 [P], ascending: the row that each belongs to
    token : int64 [P, L], the place in [B * T] of each token; -1 for padding
    at : int64 [B, T], a place in [P * L] of each token of the rows; 0 for padding
    """

    ids: Tensor
    row: Tensor
    token: Tensor
    at: Tensor


def ends(rows: Rows) -> Tensor:
    """bool [B, T], the tokens at which sequences end."""
    return (rows.leave == rows.enter + 1) & (rows.enter >= 0)


def write_out(rows: Rows) -> Sequences:
    """The sequences from the roots of the trees to their ends."""
    row, last = ends(rows).nonzero(as_tuple=True)
    enter, leave = rows.enter[row], rows.leave[row]  # [P, T]
    end = enter.gather(1, last[:, None])
    sequence, place = ((enter <= end) & (end < leave)).nonzero(as_tuple=True)
    depth = rows.positions[row[sequence], place]
    token = torch.full((len(row), int(depth.max()) + 1), -1, device=rows.ids.device)
    token[sequence, depth] = row[sequence] * rows.ids.shape[1] + place
    at = torch.zeros_like(rows.ids)
    at.view(-1)[token[sequence, depth]] = sequence * token.shape[1] + depth
    # Padding is a token of the sequence itself: no other row of an embedding is looked up.
    ids = rows.ids.flatten()[torch.where(token < 0, token[:, :1], token)]
    return Sequences(ids, row, token, at)


def stack(trees: Sequence[TokenTree]) -> Rows:
    """Pad trees on the left into one batch."""
    width = max(len(tree) for tree in trees)
    ids = torch.zeros(len(trees), width, dtype=torch.long)
    positions, enter = torch.zeros_like(ids), torch.arange(-width, 0).repeat(len(trees), 1)
    leave = enter + 1
    for row, tree in enumerate(trees):
        start = width - len(tree)
        ids[row, start:] = tree.ids
        positions[row, start:] = tree.depths()
        enter[row, start:], leave[row, start:] = tree.spans()
    lengths = torch.tensor([len(tree) for tree in trees])
    return Rows(ids, positions, enter, leave, lengths)


def stack_sequences(sequences: Sequence[Sequence[int]]) -> Rows:
    """What :func:`stack` makes of trees of one sequence each, without building them."""
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    width = int(lengths.max())
    starts = (width - lengths)[:, None]
    ids = torch.tensor([[0] * (width - len(s)) + list(s) for s in sequences])
    places = torch.arange(width)
    real = places >= starts
    enter = torch.where(real, places - starts, places - width)
    leave = torch.where(real, lengths[:, None], enter + 1)
    return Rows(ids, (places - starts).clamp(min=0), enter, leave, lengths)


def batches_by_tokens(lengths: Sequence[int], budget: int) -> list[list[int]]:
    """Split items, longest first, into batches whose padded size stays within ``budget`` tokens.

    Every item is in exactly one batch; an item longer than the budget is a batch of its own.
    """
    order = sorted(range(len(lengths)), key=lambda i: (-lengths[i], i))
    batches: list[list[int]] = []
    for item in order:
        if batches and lengths[batches[-1][0]] * (len(batches[-1]) + 1) <= budget:
            batches[-1].append(item)
        else:
            batches.append([item])
    return batches
