"""Which scored tokens carry an example's effect: shares that add up to it exactly.

The loss of an example is L = f(sum_j l_j) with l_j = -w_j log p(token j) under all tokens before it
(w_j = 1 / n and f the identity for a response), and effects are linear in the gradient of the loss:

    effect = sum_j share_j,    share_j = -lr < C^-1 f' grad l_j, grad F > = -lr f' < grad l_j, q >

with the query q = C^-1 grad F and f' at the example's sum. The product is the derivative of l_j along q, so one forward
pass in dual numbers along -lr q gives the shares of all tokens at once. Source: the decomposition follows from the
loss; it is not an ablation of the token as *input*, which later tokens see too.
"""

from __future__ import annotations

import torch
from torch import Tensor

from taught.core.example import Examples, batch_examples, refuse_nonfinite
from taught.core.gradient import token_derivatives
from taught.core.problem import Problem
from taught.core.query import build_queries, query_at, query_parts, some_of
from taught.model.gradients import RowSparse, find_sites, frozen
from taught.progress import Progress


def token_effects(
    problem: Problem, examples: Examples, A: Tensor | None, B: Tensor | None, *, progress: Progress | None = None
) -> list[Tensor]:
    """Share of every scored token in its example's effect on a few targets.

    Parameters
    ----------
    A, B : Cotangents of K targets, as in :func:`taught.estimators.adjoint.target_effects`

    Returns
    -------
    For each example float64 [n scored tokens, K], in the order of ``Example.scored``. Sums
    over tokens are the example's effects.

    Raises
    ------
    UserError
        Shares of some examples are not finite.

    Notes
    -----
    Cost: the queries once, and for each target about three forward passes over the examples; as often as there are
    parts of a query (``query_parts``). Memory: the queries, and one of them once more. Attention runs without fused
    kernels. Where an operation of the model has no forward mode, a backward pass for each scored token.
    """
    model, sites = problem.model, find_sites(problem.model, problem.parameters)
    count = next(len(part) for part in (A, B) if part is not None)
    shares = [torch.zeros(p.n_scored, count).double() for p in examples]
    with frozen(model):
        for some, part in query_parts(problem, sites, count):
            queries = build_queries(problem, part, *some_of(some, A, B), progress)
            for n, k in enumerate(range(count)[some]):
                step = {}
                for name, query in queries.items():
                    weight, own = model.get_parameter(name), query_at(query, n)
                    if isinstance(own, RowSparse):
                        own = torch.zeros_like(weight).index_copy(0, own.rows, own.values.to(weight))
                    step[name] = -problem.lr * own.to(weight)
                for batch in batch_examples(examples, problem.batch_tokens) if step else ():
                    moved = token_derivatives(model, batch, step)
                    for row, i in zip(moved.double().cpu(), batch.index, strict=True):
                        shares[i][:, k] += row[: examples[i].n_scored]
            del queries  # before the next ones are built
    sums = torch.stack([share.sum(0) for share in shares]) if shares else torch.zeros(0, 1)
    refuse_nonfinite(examples, range(len(examples)), sums, "gradient")
    return shares
