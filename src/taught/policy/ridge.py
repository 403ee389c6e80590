"""The policy: a ridge regression of the behavior on the features, and how it moves.

    W  = U^-1 Xc' yc,    U = Xc' Xc + alpha I,    r = yc - Xc W

With an intercept Xc = HX and yc = Hy, where H = I - 11'/N takes the mean over prompts away, so
that the intercept is not penalised. Without one (the default) Xc = X and yc = y.

A training step moves the features by dX and the behavior by dy. To first order the coefficients move by

    dW_X = U^-1 (dX' r - Xc' dX W)        feature-activation pathway, ``x``
    dW_Y = U^-1 Xc' dy                    output-probability pathway, ``y``

*Derivation, with and without an intercept.* Differentiate the normal equations U W = Xc' yc:

    dU W + U dW = dXc' yc + Xc' dyc,    dU = dXc' Xc + Xc' dXc
    U dW = dXc' (yc - Xc W) - Xc' dXc W + Xc' dyc = dXc' r - Xc' dXc W + Xc' dyc

With an intercept dXc = H dX and dyc = H dy. H is symmetric and idempotent, H Xc = Xc and H r = r
(both are centred already), so dXc' r = dX' H r = dX' r, Xc' dXc = Xc' dX and Xc' dyc = Xc' dy. The
formula is the same in both cases; only Xc and r differ.

Source: SMDA, arXiv 2606.29171 (alpha = 5, no intercept, no scaling, float64).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike, NDArray

from taught.errors import UserError, misfit, refuse, refuse_repeated
from taught.stats.arrays import Floats, Ints


@dataclass(frozen=True, eq=False)
class Policy:
    """A fitted policy and the parts of its normal equations that attribution needs.

    Rows are prompts in the order of ``prompt_ids``, columns features in the order of
    ``feature_ids``. All arrays are read-only.

    Attributes
    ----------
    feature_ids : int64 [d]
    coef : float64 [d], W in units of the behavior (natural logarithm of a probability) per unit of activation
    intercept : float, 0 unless ``fit_intercept``
    alpha : float, the ridge penalty, in squared units of activation
    prompt_ids : tuple of str, length N
    X, y : float64 [N, d], [N], as given
    Xc : float64 [N, d], centred over prompts if ``fit_intercept``, else ``X``
    residual : float64 [N], r = yc - Xc W
    U : float64 [d, d], Xc' Xc + alpha I, symmetric and positive definite
    """

    feature_ids: Ints
    coef: Floats
    intercept: float
    alpha: float
    fit_intercept: bool
    prompt_ids: tuple[str, ...]
    X: Floats
    y: Floats
    Xc: Floats
    residual: Floats
    U: Floats

    def predict(self, X: ArrayLike) -> Floats:
        """Behavior predicted from activations: X [.., d] -> [..]."""
        return np.asarray(X, dtype=np.float64) @ self.coef + self.intercept

    def solve(self, B: ArrayLike) -> Floats:
        """U^-1 b for each vector along the last axis of B [.., d]. Cost O(d^3)."""
        B = np.asarray(B, dtype=np.float64)
        flat = np.linalg.solve(self.U, B.reshape(-1, self.d).T).T
        return flat.reshape(B.shape)

    def column(self, feature_id: int) -> int:
        """Position of a feature id in ``coef`` and in the columns of ``X``."""
        hits = np.flatnonzero(self.feature_ids == feature_id)
        rule = f"one of the {self.d} selected features"
        fix = "pick an id from coefficients.parquet, or add it to features.ids"
        refuse([] if hits.size else [feature_id], "this feature is not in the policy", rule=rule, fix=fix)
        return int(hits[0])

    @property
    def d(self) -> int:
        """Number of features."""
        return int(self.feature_ids.size)

    @property
    def n(self) -> int:
        """Number of prompts N."""
        return len(self.prompt_ids)


@dataclass(frozen=True, eq=False)
class Shift:
    """First-order change of the coefficients along the two pathways, float64 [.., d] each.

    Units: coefficient units per step. Positive: the coefficient rises when the model is trained.
    """

    x: Floats
    y: Floats

    @property
    def total(self) -> Floats:
        """The sum of both pathways, dW = dW_X + dW_Y."""
        return self.x + self.y


def fit_policy(
    X: ArrayLike,
    y: ArrayLike,
    *,
    prompt_ids: Sequence[str],
    feature_ids: Sequence[int] | Ints,
    alpha: float = 5.0,
    fit_intercept: bool = False,
) -> Policy:
    """Fit W = (Xc' Xc + alpha I)^-1 Xc' yc. Cost O(N d^2 + d^3).

    Parameters
    ----------
    X : [N, d], feature activations
    y : [N], behavior, natural logarithm of a probability
    prompt_ids, feature_ids : ids of the rows and of the columns; unique, feature ids integers
    alpha : ridge penalty, > 0
    fit_intercept : centre X and y, which leaves the intercept unpenalised. Off by default, as in the paper.

    Raises
    ------
    UserError
        Shapes and ids do not fit, ids repeat, X or y is not finite (the prompts are named), alpha
        <= 0, or there are no prompts or no features.
    """
    X, y = checked_data(X, y, prompt_ids)
    ids = np.asarray(feature_ids)
    if ids.shape != (X.shape[1],):
        raise misfit("X and feature_ids", "one id per column", columns=X.shape[1], feature_ids=ids)
    if not np.issubdtype(ids.dtype, np.integer):
        # Text sorts '10' before '9': columns then stand against the wrong rows of the encoder.
        rule = "the row of the SAE's decoder, as int64"
        raise UserError("feature ids must be integers", value=repr(ids.dtype), rule=rule)
    refuse_repeated(ids.tolist(), "a feature id")
    ids = ids.astype(np.int64)
    check_alpha(alpha)
    Xc, yc = (X - X.mean(0), y - y.mean()) if fit_intercept else (X, y)
    U = Xc.T @ Xc + alpha * np.eye(X.shape[1])
    W = np.linalg.solve(U, Xc.T @ yc)
    intercept = float(y.mean() - X.mean(0) @ W) if fit_intercept else 0.0
    residual = yc - Xc @ W
    for array in (ids, W, X, y, Xc, residual, U):
        array.setflags(write=False)
    ids_of_rows = tuple(map(str, prompt_ids))
    return Policy(ids, W, intercept, float(alpha), fit_intercept, ids_of_rows, X, y, Xc, residual, U)


def coefficient_shift(policy: Policy, dX: ArrayLike, dy: ArrayLike) -> Shift:
    """First-order change of the coefficients when X moves by dX [N, d] and y by dy [N].

    dW_X = U^-1 (dX' r - Xc' dX W) and dW_Y = U^-1 Xc' dy (derivation: module docstring).
    """
    dX, dy = _checked_change(policy, dX, dy)
    x_raw = dX.T @ policy.residual - policy.Xc.T @ (dX @ policy.coef)
    return Shift(x=policy.solve(x_raw), y=policy.solve(policy.Xc.T @ dy))


def exact_shift(policy: Policy, dX: ArrayLike, dy: ArrayLike) -> Floats:
    """Change of the coefficients by an exact refit: W(X + dX, y + dy) - W, float64 [d].

    The difference to ``coefficient_shift(...).total`` is the error of the linearisation.
    """
    dX, dy = _checked_change(policy, dX, dy)
    same = {key: getattr(policy, key) for key in ("prompt_ids", "feature_ids", "alpha", "fit_intercept")}
    return fit_policy(policy.X + dX, policy.y + dy, **same).coef - policy.coef


def pathway_sums(policy: Policy, x_raw: ArrayLike, y_raw: ArrayLike) -> Shift:
    """Coefficient shifts of P examples from the sums that the adjoint computes, without any dX.

    With s_i = sum_k W_k dX_ik,

        x_raw_k = sum_i r_i dX_ik - sum_i Xc_ik s_i
        y_raw_k = sum_i Xc_ik dy_i
        dW_X = U^-1 x_raw,    dW_Y = U^-1 y_raw

    Parameters
    ----------
    x_raw, y_raw : [P, d], one row per example. ``taught.targets.policy.combine_raw_x`` makes ``x_raw``.

    Returns
    -------
    Shift
        ``x`` and ``y`` float64 [P, d].
    """
    x_raw, y_raw = np.asarray(x_raw, dtype=np.float64), np.asarray(y_raw, dtype=np.float64)
    if x_raw.shape != y_raw.shape or x_raw.shape[-1:] != (policy.d,):
        raise misfit("the pathway sums and the policy", f"both [P, d] with d = {policy.d}", x_raw=x_raw, y_raw=y_raw)
    return Shift(x=policy.solve(x_raw), y=policy.solve(y_raw))


def score(policy: Policy, dW: ArrayLike) -> Floats:
    """S = sum_j dW_j W_j for dW [.., d] -> [..].

    Positive: the coefficient vector moves along itself. That alone does not mean more of the behavior.
    """
    return np.asarray(np.asarray(dW, dtype=np.float64) @ policy.coef)


def choose_alpha(
    X: ArrayLike,
    y: ArrayLike,
    *,
    fit_intercept: bool,
    folds: int,
    seed: int,
    grid: ArrayLike | None = None,
    prompt_ids: Sequence[str] | None = None,
) -> tuple[float, list[dict[str, float]]]:
    """Choose alpha by the smallest cross-validated squared error, ties to the larger alpha.

    Parameters
    ----------
    X, y : [N, d], [N]
    grid : penalties to try; by default 15 from 1e-5 to 1e2 times the mean squared norm of a column, so that the choice
        follows the scale of X
    prompt_ids : when given, folds are drawn over sorted ids, so the order of the rows does not matter

    Returns
    -------
    alpha : float
    table : list of dict
        ``alpha`` and ``mse`` (mean squared held-out error), in the order of the grid.
    """
    X, y = checked_data(X, y, prompt_ids)
    order = row_order(prompt_ids, len(y))
    X, y = X[order], y[order]
    check_folds(folds, len(y))
    if grid is None:
        scale = float(((X - X.mean(0) if fit_intercept else X) ** 2).sum(0).mean())
        grid = (scale if scale > 0 else 1.0) * np.logspace(-5, 2, 15)
    alphas = np.asarray(grid, dtype=np.float64)
    for alpha in alphas:
        check_alpha(float(alpha))
    fold = np.random.default_rng(seed).permutation(len(y)) % folds
    sse = sum(_held_out_sse(X, y, fold == k, alphas, fit_intercept) for k in range(folds))
    mse = np.asarray(sse) / len(y)
    best = float(alphas[mse == mse.min()].max())
    table = [{"alpha": float(a), "mse": float(e)} for a, e in zip(alphas, mse, strict=True)]
    return best, table


def ridge(X: Floats, y: Floats, alpha: float, fit_intercept: bool) -> tuple[Floats, float]:
    """Coefficients [d] and intercept only, unchecked: the inner step of resampling."""
    x0, y0 = (X.mean(0), y.mean()) if fit_intercept else (np.zeros(X.shape[1]), 0.0)
    Xc, yc = X - x0, y - y0
    W = np.linalg.solve(Xc.T @ Xc + alpha * np.eye(X.shape[1]), Xc.T @ yc)
    return W, float(y0 - x0 @ W)


def row_order(prompt_ids: Sequence[str] | None, n: int) -> Ints:
    """Rows in the order of their ids, so that random draws belong to ids, not to positions."""
    if prompt_ids is None:
        return np.arange(n, dtype=np.int64)
    return np.array(sorted(range(n), key=lambda i: prompt_ids[i]), dtype=np.int64)


def check_folds(folds: int, n: int) -> None:
    """Refuse fewer than two folds or more folds than prompts."""
    if not 2 <= folds <= n:
        what, fix = "cannot split the prompts into these folds", "set policy.folds, or give more prompts"
        raise UserError(what, value=f"{folds} folds, {n} prompts", rule="2 <= folds <= number of prompts", fix=fix)


def checked_data(X: ArrayLike, y: ArrayLike, prompt_ids: Sequence[str] | None) -> tuple[Floats, Floats]:
    """Copy X [N, d] and y [N] to float64 after checking shapes, ids and finiteness."""
    X, y = np.array(X, dtype=np.float64), np.array(y, dtype=np.float64)
    n_ids = y.size if prompt_ids is None else len(prompt_ids)
    if X.ndim != 2 or y.ndim != 1 or not X.shape[0] == len(y) == n_ids:
        raise misfit("X, y and prompt_ids", "X [N, d], y [N] and N ids", X=X, y=y, ids=n_ids)
    if X.shape[0] == 0 or X.shape[1] == 0:
        missing = "prompts" if X.shape[0] == 0 else "features"
        raise UserError(
            f"a policy needs {missing}, and there are none",
            value=f"X {list(X.shape)}",
            rule="at least one prompt and one feature",
            fix="lower features.threshold" if missing == "features" else "check prompts.path",
        )
    refuse_repeated(() if prompt_ids is None else prompt_ids, "a prompt id")
    for name, finite in (("X", np.isfinite(X).all(axis=1)), ("y", np.isfinite(y))):
        bad = [f"row {i}" if prompt_ids is None else prompt_ids[i] for i in np.flatnonzero(~finite).tolist()]
        what, fix = f"{name} is not finite for {len(bad)} prompt", "look at these prompts, or take them out of the file"
        refuse(bad, what + "s" * (len(bad) > 1), rule="every activation and every behavior is a finite number", fix=fix)
    return X, y


def check_alpha(alpha: float) -> None:
    """Refuse a penalty that is not a positive number."""
    if not (np.isfinite(alpha) and alpha > 0):
        rule, fix = "alpha > 0, so that X'X + alpha I can be inverted", "set policy.alpha (the paper uses 5)"
        raise UserError("the ridge penalty must be positive", value=alpha, rule=rule, fix=fix)


def _checked_change(policy: Policy, dX: ArrayLike, dy: ArrayLike) -> tuple[Floats, Floats]:
    dX, dy = np.asarray(dX, dtype=np.float64), np.asarray(dy, dtype=np.float64)
    if dX.shape != policy.X.shape or dy.shape != policy.y.shape:
        raise misfit("the changes and the policy", "the shapes of its X and y, in its row order", dX=dX, dy=dy)
    return dX, dy


def _held_out_sse(X: Floats, y: Floats, test: NDArray[np.bool_], alphas: Floats, fit_intercept: bool) -> Floats:
    """Squared error on the test rows for every alpha [A], from one eigendecomposition."""
    X_test, y_test, X, y = X[test], y[test], X[~test], y[~test]
    x0, y0 = (X.mean(0), y.mean()) if fit_intercept else (np.zeros(X.shape[1]), 0.0)
    Xc, yc = X - x0, y - y0
    e, V = np.linalg.eigh(Xc.T @ Xc)
    W = V @ ((V.T @ (Xc.T @ yc))[:, None] / (np.maximum(e, 0)[:, None] + alphas))
    errors = y_test[:, None] - y0 - (X_test - x0) @ W
    return np.asarray((errors**2).sum(0))
