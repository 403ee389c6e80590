"""Directions that tell two groups of residuals apart, and how well they do on rows not seen.

With rows x_i [D], s_i = 1 in the positive group and -1 in the negative one:

    difference   w = mean of the positive rows - mean of the negative rows
    logistic     w = argmin  sum_i log(1 + exp(-s_i (x_i' w + b))) + penalty / 2 |w|^2
    ridge        w = argmin  sum_i (s_i - x_i' w - b)^2 + penalty |w|^2

For logistic and ridge the rows are centred and divided by one number, the root mean square of their
entries, so that a penalty means the same at every block; w is given for the rows as they came. b is
not penalised. Source: linear probes, Alain and Bengio, arXiv 1610.01644.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import ArrayLike

from taught.errors import UserError
from taught.stats.arrays import Bools, Floats
from taught.stats.auc import auc_within
from taught.stats.intervals import Interval

METHODS = ("difference", "logistic", "ridge")


def fit_direction(X: ArrayLike, positive: ArrayLike, method: str, penalty: float = 1.0) -> Floats:
    """Direction w [D] that points from the negative group to the positive one; not normalised.

    Cost: one singular value decomposition of [N, D] where D > N (the solution lies in the span of
    the rows), and about ten solutions of min(N, D) equations.

    Parameters
    ----------
    X : float64 [N, D], one row a prompt or example
    positive : bool [N]
    method : one of :data:`METHODS`
    penalty : of logistic and ridge; larger draws w towards the difference of means

    Raises
    ------
    UserError
        A group is empty, rows are not finite or all alike, an unknown method, a penalty not above 0.
    """
    X, positive = _checked(X, positive)
    if method == "difference":
        w: Floats = X[positive].mean(0) - X[~positive].mean(0)
        return w
    if method not in METHODS or not penalty > 0:
        raise UserError(
            "a direction cannot be fitted like this",
            value=f"{method}, penalty {penalty}",
            rule=f"one of {', '.join(METHODS)}, with a penalty above 0",
            fix="set the concept's source to difference or probe",
        )
    centred = X - X.mean(0)
    scale = float(np.sqrt(np.mean(centred**2)))
    Z, basis = centred / scale, np.eye(X.shape[1])
    if X.shape[1] > len(X):  # the rows in an orthonormal basis of their span: at most N columns
        U, S, basis = np.linalg.svd(Z, full_matrices=False)
        Z = U * S
    if method == "ridge":
        Z = Z - Z.mean(0)
        v = np.linalg.solve(Z.T @ Z + penalty * np.eye(Z.shape[1]), Z.T @ np.where(positive, 1.0, -1.0))
    else:
        v = _logistic(Z, positive, penalty)
    return np.asarray(v @ basis / scale)


def held_out(
    X: ArrayLike,
    positive: ArrayLike,
    fit: Callable[[Floats, Bools], Floats],
    *,
    folds: int = 5,
    bootstrap: int = 500,
    seed: int = 0,
) -> tuple[Interval, list[Floats]]:
    """AUC of read-outs <w, x> of rows that w was not fitted on, and the w [D] of each fold.

    Folds hold both groups in equal shares. Rows are compared within their fold, since each fold has a w of its own.

    Parameters
    ----------
    fit : (X, positive) -> w, such as :func:`fit_direction`
    """
    X, positive = _checked(X, positive)
    smaller = int(min(positive.sum(), (~positive).sum()))
    if not 2 <= folds <= smaller:
        raise UserError(
            "a group is too small to be split into folds",
            value=f"{smaller} rows in the smaller group, {folds} folds",
            rule="every fold needs rows of both groups, and there are two at least",
            fix="use more prompts in both groups",
        )
    rng, fold = np.random.default_rng(seed), np.empty(len(positive), dtype=np.int64)
    for group in (positive, ~positive):
        members = rng.permutation(np.flatnonzero(group))
        fold[members] = np.arange(len(members)) % folds
    found = [fit(X[fold != k], positive[fold != k]) for k in range(folds)]
    score = np.einsum("nd,nd->n", X, np.stack(found)[fold])
    return auc_within(score, positive, fold, bootstrap=bootstrap, seed=seed), found


def _checked(X: ArrayLike, positive: ArrayLike) -> tuple[Floats, Bools]:
    rows, group = np.asarray(X, np.float64), np.asarray(positive, bool)
    if rows.ndim != 2 or group.shape != rows.shape[:1] or not 0 < group.sum() < len(group):
        raise UserError(
            "a direction is fitted to two groups of rows",
            value=f"rows {list(rows.shape)}, {int(group.sum())} of them positive",
            rule="both groups have rows",
            fix="set prompts.positive_group and prompts.negative_group",
        )
    if not np.isfinite(rows).all() or (rows == rows[0]).all():
        rule, fix = "finite numbers that differ between rows", "use model.dtype float32, or another block"
        raise UserError("the rows do not vary, or are not finite", value=list(rows.shape), rule=rule, fix=fix)
    return rows, group


def _logistic(Z: Floats, positive: Bools, penalty: float) -> Floats:
    """Newton's method (iteratively reweighted least squares) in a trust region."""
    from scipy.optimize import minimize

    A = np.column_stack([Z, np.ones(len(Z))])
    sides = np.where(positive, 1.0, -1.0)
    P = penalty * np.append(np.ones(Z.shape[1]), 0.0)

    def share(beta: Floats) -> Floats:
        return 0.5 * (1 + np.tanh(A @ beta / 2))

    found = minimize(
        lambda beta: np.logaddexp(0, -sides * (A @ beta)).sum() + (P * beta**2).sum() / 2,
        np.zeros(A.shape[1]),
        jac=lambda beta: A.T @ (share(beta) - positive) + P * beta,
        hess=lambda beta: (A.T * (share(beta) * (1 - share(beta)))) @ A + np.diag(P),
        method="trust-exact",
        options={"gtol": 1e-10, "maxiter": 100},
    )
    if not np.abs(found.jac).max() < 1e-6:
        rule, fix = "a few Newton steps are enough where the penalty is not tiny", "raise the concept's penalty"
        raise UserError("the probe did not converge", value=f"penalty {penalty}", rule=rule, fix=fix)
    return np.asarray(found.x[:-1])


def sweep(
    H: Any, positive: ArrayLike, method: str = "logistic", penalty: float = 1.0, **draws: Any
) -> list[dict[str, Any]]:
    """Held-out AUC of a direction fitted at each block.

    Parameters
    ----------
    H : [L, N, D], pooled residuals after each block
    draws : folds, bootstrap, seed (:func:`held_out`)

    Returns
    -------
    [{"block", "auc", "lo", "hi"}], block after block. The largest of many is favourable to itself.
    """
    rows = []
    for block, X in enumerate(H):
        found, _ = held_out(X, positive, lambda x, s: fit_direction(x, s, method, penalty), **draws)
        rows.append({"block": block, "auc": found.value, "lo": found.lo, "hi": found.hi})
    return rows
