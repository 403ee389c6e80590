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

    def ancestors(self) -> Tensor:
        """bool [T, T]: entry (s, t) is true where t is s itself or one of its ancestors."""
        enter, leave = self._spans()
        return (enter <= enter[:, None]) & (enter[:, None] < leave)

    def _spans(self) -> tuple[Tensor, Tensor]:
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


@dataclass(frozen=True, eq=False)
class Rows:
    """Trees stacked to a batch, padded on the left so that their last tokens stand in one column.

    Attributes
    ----------
    ids, positions : int64 [B, T]
    mask : bool [B, T, T]
        (s, t) is true where s attends to t; a padding slot attends to itself only, and nothing else attends to it.
    lengths : int64 [B]
        Number of real tokens of each row.
    """

    ids: Tensor
    positions: Tensor
    mask: Tensor
    lengths: Tensor

    def to(self, device: torch.device) -> Rows:
        """The same rows on another device."""
        return Rows(*(x.to(device) for x in (self.ids, self.positions, self.mask, self.lengths)))

    def additive_mask(self, dtype: torch.dtype) -> Tensor:
        """The mask as attention implementations take it: [B, 1, T, T], 0 or the lowest number."""
        lowest = torch.finfo(dtype).min
        zeros = torch.zeros(self.mask.shape, dtype=dtype, device=self.mask.device)
        return zeros.masked_fill(~self.mask, lowest).unsqueeze(1)


def stack(trees: Sequence[TokenTree]) -> Rows:
    """Pad trees on the left into one batch."""
    width = max(len(tree) for tree in trees)
    ids = torch.zeros(len(trees), width, dtype=torch.long)
    positions = torch.zeros_like(ids)
    mask = torch.eye(width, dtype=torch.bool).repeat(len(trees), 1, 1)
    for row, tree in enumerate(trees):
        start = width - len(tree)
        seen = tree.ancestors()
        ids[row, start:] = tree.ids
        positions[row, start:] = seen.sum(1) - 1
        mask[row, start:, start:] = seen
    lengths = torch.tensor([len(tree) for tree in trees])
    return Rows(ids, positions, mask, lengths)


def stack_sequences(sequences: Sequence[Sequence[int]]) -> Rows:
    """What :func:`stack` makes of trees of one sequence each, without building them."""
    lengths = torch.tensor([len(sequence) for sequence in sequences])
    width = int(lengths.max())
    starts = (width - lengths)[:, None]
    ids = torch.tensor([[0] * (width - len(s)) + list(s) for s in sequences])
    places = torch.arange(width)
    mask = torch.ones(width, width, dtype=torch.bool).tril() & (places >= starts)[:, None]
    mask |= torch.eye(width, dtype=torch.bool)
    return Rows(ids, (places - starts).clamp(min=0), mask, lengths)


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
