"""Values by sketches of one weight of a tiny model, where projections are exact, and its gradients by autograd."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import numpy as np

from taught.core import driver
from taught.core.driver import Method
from taught.core.estimator import Work
from taught.core.example import Example
from taught.core.problem import Problem
from taught.core.readings import Readings
from taught.core.registry import Choice
from taught.core.scores import Scores
from taught.core.target import TargetSet
from tiny_models import (
    PROMPT_IDS,
    plain_gradient,
    plain_loss,
    plain_y,
    tiny_examples,
    tiny_model,
    tiny_problem,
    tiny_prompts,
)

# One weight of 12 rows and 8 columns: with 16 rows to fold onto nothing meets, and inner products are exact.
WEIGHT, DIM = "model.layers.1.mlp.up_proj.weight", 1024


@cache
def problem(*parameters: str) -> Problem:
    return tiny_problem(tiny_model("untied"), parameters=parameters or None, point=None, features=None)


def scored(
    folder: Path,
    curvature: Choice,
    examples: list[Example] | None = None,
    parameters: tuple[str, ...] = (WEIGHT,),
    dim: int = DIM,
    wanted: tuple[str, ...] = ("behavior:a", "prompt:q4"),
) -> Scores:
    read = Readings(tuple(p.id for p in tiny_prompts()), np.zeros(6), {"a": ("q0", "q1", "q2")})
    method = Method(Choice("sketch", {"dim": dim, "store": str(folder)}), curvature)
    examples = tiny_examples() if examples is None else examples
    return driver.scores(problem(*parameters), examples, TargetSet.of(wanted, read), method, Work())


@cache
def gradients() -> tuple[np.ndarray, np.ndarray]:
    """Of the losses [P, n] and of y of every prompt [N, n], by plain passes."""
    model = problem(WEIGHT).model
    of = [plain_loss(model, example) for example in tiny_examples()]
    y = [plain_y(model, ids) for ids in PROMPT_IDS]
    return tuple(np.stack([plain_gradient(model, v)[WEIGHT].flatten().numpy() for v in part]) for part in (of, y))
