"""Training examples and their losses: weighted log-probabilities of tokens, one value an example.

    L(z) = f( sum over scored tokens t of  - w_t log p(t | tokens before it) )

with f the identity for what is trained on as it stands. An SFT pair scores the tokens of its response, each with weight
1 / their number; a document scores all its tokens but the first; of a conversation those turns count that training
counts; a preference weighs the tokens of its chosen answer 1, those of its rejected one -1 (:class:`Dpo`). An example
with more than one sequence lies in one row as a token tree, each branch blind to the others, so that whatever takes
gradients of examples needs to know nothing of their kind.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor, nn

from taught.errors import UserError, refuse
from taught.model.forward import forward, log_probabilities
from taught.model.gradients import evaluating
from taught.model.layout import first_device
from taught.model.tokens import Rows, batches_by_tokens, build_tree, stack, stack_sequences


class Link(Protocol):
    """f: from the weighted sums of a batch of examples, [B], to their losses."""

    def __call__(self, sums: Tensor) -> Tensor:
        """Losses [B]; differentiable, each from its own sum alone."""


@dataclass(frozen=True)
class Dpo:
    """Link of a preference: the loss of direct preference optimisation (Rafailov et al., arXiv 2305.18290).

        L = -log sigma(beta [log p(c) - log p(r) - (log ref(c) - log ref(r))]) = softplus(beta (s + reference))

    with s = -(log p(c) - log p(r)) the weighted sum of the example, c the chosen and r the rejected answer, log p
    the sum (not the mean) over an answer's tokens. At the reference itself L = log 2, and its slope in s is beta / 2.

    Attributes
    ----------
    beta : how strongly training is held to the reference
    reference : log ref(c) - log ref(r), natural logarithm
    given : whether the data say it; else it is that of the base model, and follows from its weights
    """

    beta: float
    reference: float
    given: bool = False

    def __call__(self, sums: Tensor) -> Tensor:
        """Losses [B] of these sums [B]."""
        return nn.functional.softplus(self.beta * (sums + self.reference))


@dataclass(frozen=True)
class Example:
    """One training example as tokens.

    Attributes
    ----------
    id : what names it in every result
    sequences : token ids; one sequence, or several that are compared with one another
    weights : for each sequence the weight of every token in the loss, 0 where it is not scored; the
        first token of a sequence cannot be scored
    link : from the weighted sum to the loss; None: it is the loss
    """

    id: str
    sequences: tuple[tuple[int, ...], ...]
    weights: tuple[tuple[float, ...], ...]
    link: Link | None = None

    def __post_init__(self) -> None:
        shapes = [len(s) for s in self.sequences]
        if not shapes or shapes != [len(w) for w in self.weights] or any(w[0] for w in self.weights if w):
            raise ValueError(f"{self.id}: a weight for each token of each sequence, 0 for the first")

    @property
    def ids(self) -> tuple[int, ...]:
        """Tokens of the first sequence."""
        return self.sequences[0]

    @property
    def scored(self) -> list[tuple[int, int]]:
        """(sequence, place) of each token that has a weight, in order."""
        return [(s, t) for s, of in enumerate(self.weights) for t, w in enumerate(of) if w]

    @property
    def places(self) -> tuple[int, ...]:
        """Places of the scored tokens of the first sequence."""
        return tuple(t for t, w in enumerate(self.weights[0]) if w)

    @property
    def start(self) -> int:
        """The first of these places; the length of the sequence if there is none."""
        return next(iter(self.places), len(self.ids))

    @property
    def n_scored(self) -> int:
        """Number of tokens that have a weight."""
        return len(self.scored)

    @property
    def length(self) -> int:
        """Tokens that a pass over it has, at most: none is predicted after the last of a sequence."""
        return sum(len(s) - 1 for s in self.sequences)


def sft(id: str, ids: Sequence[int], start: int, masked: Sequence[int] = ()) -> Example:
    """A pair: the tokens from ``start`` on are the response, its end-of-turn token included.

    Parameters
    ----------
    masked : places of response tokens that the loss leaves out; later tokens still see them
    """
    out, response = set(masked), set(range(start, len(ids)))
    if not out <= response or (out and out == response):
        raise ValueError(f"{id}: masked are some, not all, of the response tokens")
    return conversation(id, ids, response - out)


@dataclass(frozen=True)
class Times:
    """A link whose losses count several times, or in part."""

    link: Link
    by: float

    def __call__(self, sums: Tensor) -> Tensor:
        """Losses [B] of these sums [B]."""
        return self.by * self.link(sums)


def weighed(example: Example, by: float) -> Example:
    """The example with ``by`` times its loss."""
    if example.link is not None:
        return replace(example, link=Times(example.link, by))
    return replace(example, weights=tuple(tuple(by * w for w in of) for of in example.weights))


def conversation(id: str, ids: Sequence[int], scored: Iterable[int]) -> Example:
    """A conversation: the tokens at these places are scored, all alike."""
    places = set(scored)
    each = 1.0 / max(len(places), 1)
    return Example(id, (tuple(ids),), (tuple(each if t in places else 0.0 for t in range(len(ids))),))


def document(id: str, ids: Sequence[int], seen: int = 1) -> Example:
    """A text: every token is scored behind the first ``seen``, which a window before it has scored."""
    return sft(id, ids, max(seen, 1))


def preference(
    id: str, chosen: Sequence[int], scored: Iterable[int], rejected: Sequence[int], against: Iterable[int]
) -> Example:
    """A chosen and a rejected answer; its sum is log p(rejected) - log p(chosen), and no link is set.

    Parameters
    ----------
    chosen, rejected : tokens of the conversation with either answer
    scored, against : places of the answers' tokens in them
    """
    up, down = set(scored), set(against)
    weights = tuple(float(t in up) for t in range(len(chosen))), tuple(-float(t in down) for t in range(len(rejected)))
    return Example(id, (tuple(chosen), tuple(rejected)), weights)


Examples = Sequence[Example]


def refuse_several(examples: Examples, what: str) -> None:
    """Raise an error with the ids of the examples that have more than one sequence."""
    refuse(
        [example.id for example in examples if len(example.sequences) > 1],
        f"{what} reads one answer of an example",
        rule="a preference has two: a chosen and a rejected one",
        fix="leave it out, or attribute to the chosen answers alone: rename the column chosen to response",
    )


@dataclass(frozen=True, eq=False)
class ExampleBatch:
    """Examples padded on the left, one a row.

    Attributes
    ----------
    index : places of the examples in the caller's list
    rows : tokens
    keep : logits are wanted at the last so many columns
    columns : int64 [B, K], of these the one that predicts each scored token
    targets : int64 [B, K], the scored tokens; K the largest number of them
    weights : float64 [B, K], their weights; 0 behind an example's last
    links : of each example
    """

    index: tuple[int, ...]
    rows: Rows
    keep: int
    columns: Tensor
    targets: Tensor
    weights: Tensor
    links: tuple[Link | None, ...]

    def losses(self, model: nn.Module) -> Tensor:
        """Loss of each example, [B], natural logarithm; float32, or float64 for a float64 model."""
        return self.linked(self.terms(model).sum(1))

    def linked(self, sums: Tensor) -> Tensor:
        """The losses [B] of examples whose weighted sums are these [B]."""
        if not any(self.links):
            return sums
        return torch.stack([s if f is None else f(s[None])[0] for s, f in zip(sums, self.links, strict=True)])

    def slopes(self, sums: Tensor) -> Tensor:
        """f'(sum) of each example, [B]: what a change of its sum changes in its loss."""
        with torch.enable_grad():
            at = sums.detach().requires_grad_()
            return torch.autograd.grad(self.linked(at).sum(), at)[0]

    def bends(self, sums: Tensor) -> Tensor:
        """f''(sum) of each example, [B]; 0 for one without a link."""
        with torch.enable_grad():
            at = sums.detach().requires_grad_()
            slopes = torch.autograd.grad(self.linked(at).sum(), at, create_graph=True)[0]
            return torch.autograd.grad(slopes.sum(), at)[0] if slopes.requires_grad else torch.zeros_like(slopes)

    def terms(self, model: nn.Module) -> Tensor:
        """What each scored token adds to its example's sum, [B, K]."""
        return self._terms(self._logits(model))

    def outputs(self, model: nn.Module) -> tuple[Tensor, Tensor]:
        """The terms, [B, K], and the logits that predict the scored tokens, [B, K, V]; float32, float64 of float64."""
        logits = self._logits(model)
        return self._terms(logits), self._scored(logits)

    def scored_logits(self, model: nn.Module) -> Tensor:
        """The logits that predict the scored tokens alone, [B, K, V]."""
        return self._scored(self._logits(model))

    def _logits(self, model: nn.Module) -> Tensor:
        _, logits = forward(model, self.rows.to(first_device(model)), keep=self.keep)
        assert logits is not None
        return logits

    def _places(self, logits: Tensor) -> tuple[Tensor, Tensor]:
        rows = torch.arange(len(self.index), device=logits.device)[:, None]
        return rows, self.columns.to(logits.device)

    def _terms(self, logits: Tensor) -> Tensor:
        found = log_probabilities(logits, self._places(logits), self.targets.to(logits.device))
        return -(found * self.weights.to(found))

    def _scored(self, logits: Tensor) -> Tensor:
        found = logits[self._places(logits)]
        return found.to(torch.promote_types(found.dtype, torch.float32))

    def bent(self, scored: Tensor, moved: Tensor) -> Tensor:
        """B times a change of the scored logits, both [B, K, V]: how the derivative of the losses by the outputs moves.

        Of an example that is trained on as it stands the outputs are its scored logits, and B = w_t (diag p - p p'),
        the Hessian of the loss by them; of one with a link f they are the weighted sum s, and B = f''(s) ds ds'.
        """
        p = torch.softmax(scored, -1)
        w = self.weights.to(p)[..., None]
        found = w.abs() * p * (moved - (p * moved).sum(-1, keepdim=True))
        if any(self.links):
            targets = self.targets.to(p.device)[..., None]
            slopes = w * (p - torch.zeros_like(p).scatter_(-1, targets, 1.0))  # of the weighted sum, by the logits
            sums = -(w * torch.log_softmax(scored, -1).gather(-1, targets)).sum((1, 2))
            linked = slopes * (self.bends(sums) * (slopes * moved).sum((1, 2)))[:, None, None]
            own = torch.tensor([link is not None for link in self.links], device=p.device)[:, None, None]
            found = torch.where(own, linked, found)
        return found


def batch_examples(examples: Examples, budget: int) -> Iterator[ExampleBatch]:
    """All examples in batches of at most ``budget`` padded tokens; each example in exactly one batch.

    A batch is made when its turn comes: the masks of all of them are larger than the data.
    """
    return (make_batch(examples, index) for index in batch_indices(examples, budget))


def batch_indices(examples: Examples, budget: int) -> list[list[int]]:
    """Which examples each batch holds."""
    return batches_by_tokens([p.length for p in examples], budget)


def make_batch(examples: Examples, index: Sequence[int]) -> ExampleBatch:
    """Some of the examples as one batch."""
    chosen = [examples[i] for i in index]
    if all(len(p.sequences) == 1 for p in chosen):
        rows = stack_sequences([p.ids[:-1] for p in chosen])
        nodes = [[list(range(len(p.ids) - 1))] for p in chosen]
    else:
        trees = [build_tree([s[:-1] for s in p.sequences]) for p in chosen]
        rows = stack([tree for tree, _ in trees])
        nodes = [paths for _, paths in trees]
    width, lengths = rows.ids.shape[1], rows.lengths.tolist()
    each = zip(chosen, nodes, lengths, strict=True)
    places = [[width - n + paths[s][t - 1] for s, t in p.scored] for p, paths, n in each]
    keep = width - min((c for own in places for c in own), default=width - 1)
    most = max((len(own) for own in places), default=0)
    shape = (len(chosen), most)
    columns, targets = torch.zeros(shape, dtype=torch.long), torch.zeros(shape, dtype=torch.long)
    weights = torch.zeros(shape, dtype=torch.float64)
    for row, (p, own) in enumerate(zip(chosen, places, strict=True)):
        n = len(own)
        columns[row, :n] = torch.tensor(own, dtype=torch.long) - (width - keep)
        targets[row, :n] = torch.tensor([p.sequences[s][t] for s, t in p.scored], dtype=torch.long)
        weights[row, :n] = torch.tensor([p.weights[s][t] for s, t in p.scored], dtype=torch.float64)
    return ExampleBatch(tuple(index), rows, keep, columns, targets, weights, tuple(p.link for p in chosen))


@torch.no_grad()
def example_losses(model: nn.Module, examples: Examples, batch_tokens: int) -> Tensor:
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


def refuse_nonfinite(examples: Examples, index: Iterable[int], values: Tensor, what: str = "loss") -> None:
    """Raise an error with the ids of the examples of which a value [n] or [n, ...] is not finite."""
    good = values.isfinite().flatten(1).all(1) if values.ndim > 1 else values.isfinite()
    if bad := [examples[i].id for i, fine in zip(index, good.tolist(), strict=True) if not fine]:
        raise UserError(
            f"the {what} of some examples is not finite",
            value=bad,
            rule=f"a {what} must be a finite number",
            fix="use --set model.dtype=float32, or remove these examples",
        )
