"""Gradient Concept Influence: what one SGD step on an example does to the read-out of a concept.

    F_c = mean over prompts of <v_c, h>         h pooled over the tokens that the concept names
    effect(c, z) = -lr < C^-1 grad L(z), grad F_c >

The target is a linear read-out of h like any other (``taught.core.target.concept_targets``), so every
estimator and every curvature of the project applies. Source: Concept Influence, arXiv 2602.14869,
where C is the EK-FAC approximation of the Hessian (``ekfac``) and the sign is that of the loss.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from taught.core.example import Example, refuse_nonfinite
from taught.core.target import Target
from taught.estimators.adjoint import Problem, target_effects
from taught.estimators.finite_step import Step, finite_steps
from taught.estimators.forward import Tangent, tangents
from taught.model.readout import read_prompts


def concept_effects(
    problem: Problem,
    examples: Sequence[Example],
    targets: Sequence[Target],
    estimator: str = "adjoint",
    *,
    progress: Any = None,
) -> Tensor:
    """Effect of every example on the mean read-out of every concept, float64 [P, C].

    Parameters
    ----------
    problem
        With a :class:`taught.features.concept.ConceptMap` in the place of features.
    targets
        :func:`taught.core.target.concept_targets`.
    estimator
        One of ``adjoint``, ``forward`` and ``finite-step``.

    Raises
    ------
    UserError
        The gradients of some examples are not finite.
    """
    if estimator == "adjoint":
        A = torch.from_numpy(np.stack([target.A for target in targets if target.A is not None]))
        effects, _ = target_effects(problem, examples, A, None, progress=progress)
    else:
        moves = _ONE_BY_ONE[estimator](problem, examples, progress)
        effects = torch.tensor([[t.inner(move.dX, move.dy) for t in targets] for move in moves], dtype=torch.float64)
    refuse_nonfinite(examples, range(len(examples)), effects, "gradient")
    return effects


def _tangents(problem: Problem, examples: Sequence[Example], progress: Any) -> Iterator[Tangent]:
    return tangents(problem, examples, progress=progress)


def _steps(problem: Problem, examples: Sequence[Example], progress: Any) -> Iterator[Step]:
    baseline = read_prompts(problem.model, problem.prompts, problem.behavior, problem.block)
    return finite_steps(problem, examples, baseline, progress=progress)


_ONE_BY_ONE: dict[str, Callable[..., Iterator[Tangent | Step]]] = {"forward": _tangents, "finite-step": _steps}
