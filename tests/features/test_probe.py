"""Directions between two groups: closed forms, scikit-learn, planted signal and planted noise."""

from __future__ import annotations

import numpy as np
import pytest
from sklearn.linear_model import LogisticRegression, Ridge

from taught.errors import UserError
from taught.features.probe import METHODS, fit_direction, held_out, sweep


def rows(n: int = 60, d: int = 7, shift: float = 1.0, seed: int = 0):
    """Correlated rows far from the origin; the positive third is moved along one direction."""
    rng = np.random.default_rng(seed)
    positive = np.arange(n) % 3 == 0
    X = rng.normal(size=(n, d)) @ rng.normal(size=(d, d)) * 3 + 40
    return X + shift * np.outer(positive, rng.normal(size=d)), positive


def scaled(X):
    centred = X - X.mean(0)
    return centred / np.sqrt(np.mean(centred**2)), np.sqrt(np.mean(centred**2))


@pytest.mark.parametrize("d", [7, 90])  # fewer and more columns than rows
@pytest.mark.parametrize("penalty", [0.3, 20.0])
def test_logistic_is_the_penalised_maximum_likelihood_of_scikit_learn(d: int, penalty: float):
    X, positive = rows(d=d, shift=3)
    Z, scale = scaled(X)
    theirs = LogisticRegression(C=1 / penalty, tol=1e-10, max_iter=10_000).fit(Z, positive)
    ours = fit_direction(X, positive, "logistic", penalty)
    np.testing.assert_allclose(ours * scale, theirs.coef_[0], rtol=1e-4, atol=1e-6)
    # The gradient of the objective vanishes at ours, more closely than their solver goes.
    b = _intercept(Z @ (ours * scale), positive)
    p = 1 / (1 + np.exp(-(Z @ (ours * scale) + b)))
    assert np.abs(Z.T @ (p - positive) + penalty * ours * scale).max() < 1e-7


def _intercept(margin, positive):
    """Root of sum (p - t) in b, by bisection: the objective's own condition."""
    lo, hi = -100.0, 100.0
    for _ in range(200):
        mid = (lo + hi) / 2
        too_high = (1 / (1 + np.exp(-(margin + mid))) - positive).sum() > 0
        lo, hi = (lo, mid) if too_high else (mid, hi)
    return lo


@pytest.mark.parametrize("d", [7, 90])
def test_ridge_is_that_of_scikit_learn(d: int):
    X, positive = rows(d=d)
    Z, scale = scaled(X)
    theirs = Ridge(alpha=2.0).fit(Z, np.where(positive, 1.0, -1.0))
    ours = fit_direction(X, positive, "ridge", 2.0)
    np.testing.assert_allclose(ours * scale, theirs.coef_, rtol=1e-8, atol=1e-12)


def test_separable_groups_and_tiny_penalties_converge():
    X, positive = rows(shift=50)
    w = fit_direction(X, positive, "logistic", 1e-6)
    assert (X @ w)[positive].min() > (X @ w)[~positive].max()


@pytest.mark.parametrize("method", METHODS)
def test_the_direction_points_to_the_positive_group_and_follows_the_scale_of_the_rows(method):
    X, positive = rows(shift=4)
    w = fit_direction(X, positive, method)
    assert (X @ w)[positive].mean() > (X @ w)[~positive].mean()
    np.testing.assert_allclose(fit_direction(X, ~positive, method), -w, rtol=1e-6)
    again = fit_direction(100 * X + 3, positive, method)
    np.testing.assert_allclose(again / np.linalg.norm(again), w / np.linalg.norm(w), atol=1e-7)


def test_difference_is_the_difference_of_means():
    X, positive = rows()
    expected = X[positive].mean(0) - X[~positive].mean(0)
    np.testing.assert_allclose(fit_direction(X, positive, "difference"), expected, rtol=1e-14)


def test_a_row_never_takes_part_in_the_direction_that_it_is_judged_by():
    X, positive = rows(n=30)
    seen: list[np.ndarray] = []

    def fit(x, s):
        seen.append(x)
        return fit_direction(x, s, "difference")

    found, parts = held_out(X, positive, fit, folds=5, bootstrap=20)
    assert len(parts) == 5
    kept = [[tuple(row) in set(map(tuple, x)) for row in X] for x in seen]
    assert np.sum(kept, axis=0).tolist() == [4] * 30  # each row is left out once
    # Judged by hand: rows left out together are compared along the direction of the others.
    won = total = 0
    for inside, w in zip(kept, parts, strict=True):
        out = ~np.array(inside)
        for i in np.flatnonzero(out & positive):
            for j in np.flatnonzero(out & ~positive):
                won, total = won + (X[i] @ w > X[j] @ w), total + 1
    assert found.value == pytest.approx(won / total)


def test_noise_is_at_chance_and_signal_is_above_it():
    above = []
    for seed in range(40):
        X, positive = rows(n=60, d=30, shift=0, seed=seed)
        found, _ = held_out(X, positive, lambda x, s: fit_direction(x, s, "logistic"), bootstrap=200)
        above.append((found.value, found.lo > 0.5))
    assert abs(np.mean([value for value, _ in above]) - 0.5) < 0.04
    assert sum(flag for _, flag in above) <= 6  # 2.5% one-sided, and refitting is not in it
    X, positive = rows(n=60, shift=6)
    found, _ = held_out(X, positive, lambda x, s: fit_direction(x, s, "logistic"))
    assert found.lo > 0.8


def test_a_sweep_finds_the_block_where_the_signal_is():
    blocks = [rows(shift=0, seed=3)[0], rows(shift=8)[0], rows(shift=0, seed=4)[0]]
    table = sweep(np.stack(blocks), rows()[1], bootstrap=50)
    assert [row["block"] for row in table] == [0, 1, 2]
    assert max(table, key=lambda row: row["auc"])["block"] == 1
    assert all(row["lo"] <= row["auc"] <= row["hi"] for row in table)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"positive": np.ones(60, bool)}, "both groups have rows"),
        ({"X": np.ones((60, 7))}, "do not vary"),
        ({"X": np.full((60, 7), np.nan)}, "not finite"),
        ({"method": "forest"}, "difference, logistic, ridge"),
        ({"penalty": 0.0}, "penalty above 0"),
    ],
)
def test_what_cannot_be_fitted_is_said(change, message):
    X, positive = rows()
    how = {"X": X, "positive": positive, "method": "logistic", "penalty": 1.0, **change}
    with pytest.raises(UserError, match=message):
        fit_direction(**how)


def test_a_group_smaller_than_the_folds_is_refused():
    X, positive = rows(n=9)
    with pytest.raises(UserError, match="too small to be split"):
        held_out(X, positive, lambda x, s: fit_direction(x, s, "difference"), folds=5)
