"""Which response tokens carry a pair's effect: shares that add up to it exactly.

The loss of a pair is a sum over its n response tokens, L = sum_j l_j with l_j = -log p(token j) / n
under all tokens before it, and effects are linear in the gradient of the loss:

    effect = sum_j share_j,    share_j = -lr < C^-1 grad l_j, grad F >

l_j does not depend on what comes after token j, so it is 1 / n of the loss of a shorter pair: the
tokens up to j, with token j as its whole response. Each share is the effect of such a pair.
Source: the decomposition follows from the loss; it is not an ablation of the token as *input*,
which later tokens see too.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from taught.attribution.adjoint import Problem, target_effects
from taught.attribution.pairs import PairInput


def token_effects(
    problem: Problem,
    pairs: Sequence[PairInput],
    A: Tensor,
    B: Tensor | None,
    *,
    progress: Any = None,
) -> list[Tensor]:
    """Share of every response token in its pair's effect on a few targets.

    Parameters
    ----------
    A, B
        Cotangents of K targets, as in :func:`taught.attribution.adjoint.target_effects`.

    Returns
    -------
    For each pair float64 [n_response, K]; the end of the turn is the last token. Sums over tokens
    are the pair's effects.

    Notes
    -----
    Cost: the queries once, and for each pair one forward and backward pass for every response
    token, over the tokens up to it: for few pairs.
    """
    terms = [term for pair in pairs for term in loss_terms(pair)]
    effects, _ = target_effects(problem, terms, A, B, progress=progress)
    counts = [pair.n_response for pair in pairs]
    return [part / n for part, n in zip(torch.split(effects, counts), counts, strict=True)]


def loss_terms(pair: PairInput) -> list[PairInput]:
    """One pair for each response token: what stands before it, and it as the response."""
    return [PairInput(pair.id, pair.ids[: t + 1], t) for t in range(pair.start, len(pair.ids))]
