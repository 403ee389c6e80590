"""Effects along a training run: the sum over checkpoints of each one's effects (TracIn).

    effect(F, z) = sum over c of -lr_c < C_c^-1 grad L_c(z), grad F_c >

L_c and F_c are loss and functional at the weights of checkpoint c, with c's own gates of X; the
functional's cotangents A and B are those of the base model's policy, so that all checkpoints answer
one question.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from functools import reduce
from typing import Any

import torch
from torch import nn

from taught.estimators.adjoint import Problem
from taught.estimators.estimate import Effects
from taught.model.readout import read_prompts
from taught.policy.ridge import Shift
from taught.run.pieces import Pieces


@dataclass(frozen=True)
class NumberedPieces:
    """Pieces of one checkpoint, apart from those of the others."""

    pieces: Pieces
    number: int

    def load(self, key: str) -> Any:
        """Arrays of a piece, or None."""
        return self.pieces.load(f"checkpoint{self.number}-{key}")

    def save(self, key: str, arrays: Any) -> None:
        """Keep a piece."""
        self.pieces.save(f"checkpoint{self.number}-{key}", arrays)


def at_checkpoint(problem: Problem, model: nn.Module, lr: float) -> Problem:
    """The same problem at other weights. Cost: one forward pass over the prompts, for the gates."""
    reads = read_prompts(model, problem.prompts, problem.behavior, problem.block)
    with torch.no_grad():
        X = problem.features(reads.h, reads.offsets)
    return replace(problem, model=model, lr=lr, X=X.double().cpu())


def summed(parts: Iterable[Effects]) -> Effects:
    """The sum of effects of the same examples; the losses are those of the first part."""
    return reduce(_add, parts)


def _add(a: Effects, b: Effects) -> Effects:
    """All effects are linear in the step, so they add up field by field."""
    shift = None
    if a.shift is not None and b.shift is not None:
        shift = Shift(a.shift.x + b.shift.x, a.shift.y + b.shift.y)
    return replace(
        a,
        score=a.score + b.score,
        mean_y={group: values + b.mean_y[group] for group, values in a.mean_y.items()},
        shift=shift,
        dy=None if a.dy is None or b.dy is None else a.dy + b.dy,
        dX=None if a.dX is None or b.dX is None else a.dX + b.dX,
    )
