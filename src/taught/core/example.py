"""The loss of fine-tuning examples: mean cross-entropy of the response tokens, one value an example."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from taught.errors import UserError
from taught.model.forward import first_device, forward
from taught.model.gradients import evaluating
from taught.model.tokens import Rows, batches_by_tokens, stack_sequences


@dataclass(frozen=True)
class Example:
    """One example as tokens: ``ids[start:]`` is the response, its end-of-turn token included.

    Attributes
    ----------
    masked : places in ``ids``, sorted, of response tokens that the loss leaves out; later tokens
        still see them
    """

    id: str
    ids: tuple[int, ...]
    start: int
    masked: tuple[int, ...] = ()

    def __post_init__(self) -> None:
        response = range(self.start, len(self.ids))
        known = sorted(set(self.masked) & set(response))
        if list(self.masked) != known or (known and len(known) == len(response)):
            raise ValueError(f"{self.id}: masked are some, not all, of the response tokens, sorted")

    @property
    def n_response(self) -> int:
        """Number of response tokens."""
        return len(self.ids) - self.start

    @property
    def weights(self) -> list[float]:
        """Weight of each response token in the loss: 1 / their number, and 0 where masked."""
        each = 1.0 / max(self.n_response - len(self.masked), 1)
        return [0.0 if t in self.masked else each for t in range(self.start, len(self.ids))]


@dataclass(frozen=True, eq=False)
class ExampleBatch:
    """Examples padded on the left; the last ``n_response`` columns of a row predict its response."""

    index: tuple[int, ...]
    rows: Rows
    keep: int
    targets: Tensor  # int64 [B, keep]
    weights: Tensor  # float64 [B, keep]: of response tokens in their example's loss, else 0

    def losses(self, model: nn.Module) -> Tensor:
        """Loss of each example, [B], natural logarithm; float32, or float64 for a float64 model."""
        return self.terms(model).sum(1)

    def terms(self, model: nn.Module) -> Tensor:
        """What each token adds to its example's loss, [B, keep]."""
        _, logits = forward(model, self.rows.to(first_device(model)), keep=self.keep)
        assert logits is not None
        wide = logits if logits.dtype == torch.float64 else logits.float()
        targets = self.targets.to(wide.device).unsqueeze(-1)
        logp = torch.log_softmax(wide, -1).gather(-1, targets).squeeze(-1)
        return -(logp * self.weights.to(logp))


def batch_examples(examples: Sequence[Example], budget: int) -> Iterator[ExampleBatch]:
    """All examples in batches of at most ``budget`` padded tokens; each example in exactly one batch.

    A batch is made when its turn comes: the masks of all of them are larger than the data.
    """
    return (make_batch(examples, index) for index in batch_indices(examples, budget))


def batch_indices(examples: Sequence[Example], budget: int) -> list[list[int]]:
    """Which examples each batch holds."""
    return batches_by_tokens([len(p.ids) - 1 for p in examples], budget)


def make_batch(examples: Sequence[Example], index: Sequence[int]) -> ExampleBatch:
    """Some of the examples as one batch."""
    chosen = [examples[i] for i in index]
    keep = max(p.n_response for p in chosen)
    targets = torch.zeros(len(chosen), keep, dtype=torch.long)
    weights = torch.zeros(len(chosen), keep, dtype=torch.float64)
    for row, example in enumerate(chosen):
        targets[row, keep - example.n_response :] = torch.tensor(example.ids[example.start :])
        weights[row, keep - example.n_response :] = torch.tensor(example.weights, dtype=torch.float64)
    rows = stack_sequences([p.ids[:-1] for p in chosen])
    return ExampleBatch(tuple(index), rows, keep, targets, weights)


@torch.no_grad()
def example_losses(model: nn.Module, examples: Sequence[Example], batch_tokens: int) -> Tensor:
    """Loss of every example, float64 [P]. Cost: one forward pass over the examples.

    Raises
    ------
    UserError
        Some losses are not finite: the ids of all these examples.
    """
    losses = torch.zeros(len(examples), dtype=torch.float64)
    with evaluating(model):
        for batch in batch_examples(examples, batch_tokens):
            losses[list(batch.index)] = batch.losses(model).double().cpu()
    refuse_nonfinite(examples, range(len(examples)), losses)
    return losses


def refuse_nonfinite(examples: Sequence[Example], index: Iterable[int], values: Tensor, what: str = "loss") -> None:
    """Raise an error with the ids of the examples of which a value [n] or [n, ...] is not finite."""
    good = values.isfinite().flatten(1).all(1) if values.ndim > 1 else values.isfinite()
    bad = [examples[i].id for i, fine in zip(index, good.tolist(), strict=True) if not fine]
    if bad:
        raise UserError(
            f"the {what} of some examples is not finite",
            value=bad,
            rule=f"a {what} must be a finite number",
            fix="use --set model.dtype=float32, or remove these examples",
        )
