"""The loss of fine-tuning pairs: mean cross-entropy of the response tokens, one value a pair."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from taught.model.forward import forward
from taught.model.tokens import Rows, batches_by_tokens, build_tree, stack


@dataclass(frozen=True)
class PairInput:
    """One pair as tokens: ``ids[start:]`` is the response, its end-of-turn token included."""

    id: str
    ids: tuple[int, ...]
    start: int

    @property
    def n_response(self) -> int:
        """Number of response tokens."""
        return len(self.ids) - self.start


@dataclass(frozen=True, eq=False)
class PairBatch:
    """Pairs padded on the left; the last ``n_response`` columns of a row predict its response."""

    index: tuple[int, ...]
    rows: Rows
    keep: int
    targets: Tensor  # int64 [B, keep]
    weights: Tensor  # float64 [B, keep]: 1 / n_response on response tokens, else 0

    def losses(self, model: nn.Module) -> Tensor:
        """Loss of each pair, [B], natural logarithm; float32, or float64 for a float64 model."""
        device = next(model.parameters()).device
        _, logits = forward(model, self.rows.to(device), keep=self.keep)
        assert logits is not None
        wide = logits if logits.dtype == torch.float64 else logits.float()
        targets = self.targets.to(device).unsqueeze(-1)
        logp = torch.log_softmax(wide, -1).gather(-1, targets).squeeze(-1)
        return -(logp * self.weights.to(logp)).sum(1)


def batch_pairs(pairs: Sequence[PairInput], budget: int) -> list[PairBatch]:
    """All pairs in batches of at most ``budget`` padded tokens; each pair in exactly one batch."""
    lengths = [len(p.ids) - 1 for p in pairs]
    return [_one_batch(pairs, index) for index in batches_by_tokens(lengths, budget)]


def _one_batch(pairs: Sequence[PairInput], index: Sequence[int]) -> PairBatch:
    chosen = [pairs[i] for i in index]
    trees = [build_tree([p.ids[:-1]])[0] for p in chosen]
    keep = max(p.n_response for p in chosen)
    targets = torch.zeros(len(chosen), keep, dtype=torch.long)
    weights = torch.zeros(len(chosen), keep, dtype=torch.float64)
    for row, pair in enumerate(chosen):
        targets[row, keep - pair.n_response :] = torch.tensor(pair.ids[pair.start :])
        weights[row, keep - pair.n_response :] = 1.0 / pair.n_response
    return PairBatch(tuple(index), stack(trees), keep, targets, weights)
