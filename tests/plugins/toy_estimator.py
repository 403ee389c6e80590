"""An estimator of one's own: whole gradients by plain autograd, one example and target at a time."""

from __future__ import annotations

from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch

from taught.core.example import example_losses
from taught.core.registry import ESTIMATORS
from taught.core.scores import Scores
from taught.estimators.finite_step import step_direction
from taught.model.readout import pack, read_packed


@ESTIMATORS.register("whole")
@dataclass(frozen=True)
class Whole:
    """Whole gradients, and their inner products."""

    exact: ClassVar[bool] = True

    def refuses(self, curvature, trajectory):
        return None

    def estimate(self, problem, examples, targets, work, queries=None):
        _, B = targets.cotangents(targets.names)
        params = dict(problem.model.named_parameters())
        grads = [self._gradient(problem, params, b) for b in B]
        values = np.zeros((len(examples), len(grads)))
        for row, example in enumerate(examples):
            _, step = step_direction(problem, example)
            for column, grad in enumerate(grads):
                inner = sum((step[name] * grad[name]).sum() for name in step if grad[name] is not None)
                values[row, column] = -problem.lr * float(inner)
        losses = example_losses(problem.model, examples, problem.batch_tokens).numpy()
        return Scores("whole", tuple(z.id for z in examples), targets.names, values, losses=losses)

    def _gradient(self, problem, params, b):
        embedding, total = problem.model.get_input_embeddings(), 0.0
        padding, embedding.padding_idx = embedding.padding_idx, None  # the derivative knows no padding row
        for packed in pack(problem.prompts, problem.behavior):
            _, y = read_packed(problem.model, packed, problem.behavior, None)
            total = total + (b[list(packed.index)].to(y) * y).sum()
        found = torch.autograd.grad(total, list(params.values()), allow_unused=True)
        embedding.padding_idx = padding
        return dict(zip(params, found, strict=True))

    def cost(self, problem, examples, asked):
        return {"whole gradients": 1.0}
