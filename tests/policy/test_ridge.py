"""The policy and its first-order change: closed forms, finite differences, sklearn."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose

from taught.errors import UserError
from taught.policy.ridge import Policy, choose_alpha, coefficient_shift, exact_shift, fit_policy, pathway_sums, score

both = pytest.mark.parametrize("fit_intercept", [False, True])


def problem(seed=0, n=40, d=6):
    """Sparse activations, a behavior with noise and an offset, and a change of both."""
    rng = np.random.default_rng(seed)
    X = np.maximum(rng.normal(size=(n, d)), 0)
    y = X @ rng.normal(size=d) + 0.3 * rng.normal(size=n) - 2.0
    return X, y, rng.normal(size=(n, d)) * (X > 0), rng.normal(size=n)


def fit(X, y, **options) -> Policy:
    options.setdefault("prompt_ids", [f"p{i}" for i in range(len(y))])
    options.setdefault("feature_ids", np.arange(X.shape[1]) + 3)
    return fit_policy(X, y, **options)


def test_one_feature_closed_form():
    policy = fit(np.array([[1.0], [2.0]]), np.array([3.0, 5.0]), alpha=5.0)
    assert_allclose(policy.coef, [13 / 10])
    assert policy.intercept == 0.0
    assert_allclose(policy.residual, [3 - 1.3, 5 - 2.6])


def test_trap_5_intercept_is_off_by_default_and_unpenalised():
    X, y = np.array([[1.0], [3.0]]), np.array([10.0, 14.0])
    assert fit(X, y).fit_intercept is False
    policy = fit(X, y, alpha=2.0, fit_intercept=True)  # centred: x = -1, 1 and y = -2, 2
    assert_allclose(policy.coef, [4 / 4])
    assert_allclose(policy.intercept, 12 - 2 * 1.0)
    far = fit(X, y + 1000.0, alpha=2.0, fit_intercept=True)
    assert_allclose(far.coef, policy.coef, rtol=1e-10)
    assert_allclose(far.intercept, policy.intercept + 1000.0)


@both
def test_agrees_with_sklearn(fit_intercept):
    linear_model = pytest.importorskip("sklearn.linear_model")
    X, y, *_ = problem()
    policy = fit(X, y, alpha=1.7, fit_intercept=fit_intercept)
    other = linear_model.Ridge(alpha=1.7, fit_intercept=fit_intercept, solver="svd").fit(X, y)
    assert_allclose(policy.coef, other.coef_, rtol=1e-10)
    assert_allclose(policy.predict(X), other.predict(X), rtol=1e-10)


@both
def test_invariant_1_pathways_sum_to_the_finite_difference_of_the_refit(fit_intercept):
    X, y, dX, dy = problem()
    policy = fit(X, y, fit_intercept=fit_intercept)
    shift = coefficient_shift(policy, dX, dy)
    step = 1e-5

    def central(dX, dy):
        forward = exact_shift(policy, step * dX, step * dy)
        backward = exact_shift(policy, -step * dX, -step * dy)
        return (forward - backward) / (2 * step)

    assert_allclose(shift.total, shift.x + shift.y, rtol=0, atol=0)
    scale = np.abs(shift.total).max()
    assert_allclose(shift.total, central(dX, dy), rtol=1e-6, atol=1e-6 * scale)
    assert_allclose(shift.x, central(dX, 0 * dy), rtol=1e-6, atol=1e-6 * scale)
    assert_allclose(shift.y, central(0 * dX, dy), rtol=1e-6, atol=1e-6 * scale)


@both
def test_exact_shift_is_linear_in_the_limit_with_second_order_error(fit_intercept):
    X, y, dX, dy = problem(1)
    policy = fit(X, y, fit_intercept=fit_intercept)
    linear = coefficient_shift(policy, dX, dy).total
    errors = [np.abs(exact_shift(policy, h * dX, h * dy) - h * linear).max() for h in (1e-2, 1e-3)]
    assert 50 < errors[0] / errors[1] < 200  # a tenth of the step: a hundredth of the error


@both
def test_pathway_sums_of_many_examples_equal_one_shift_each(fit_intercept):
    X, y, *_ = problem()
    policy = fit(X, y, fit_intercept=fit_intercept)
    changes = [problem(seed)[2:] for seed in range(1, 5)]
    x_raw, y_raw = [], []
    for dX, dy in changes:  # a naive sum over prompts, as the definition says
        s = [sum(policy.coef[k] * dX[i, k] for k in range(policy.d)) for i in range(policy.n)]
        x_raw.append(
            [
                sum(policy.residual[i] * dX[i, k] - policy.Xc[i, k] * s[i] for i in range(policy.n))
                for k in range(policy.d)
            ]
        )
        y_raw.append(policy.Xc.T @ dy)
    shift = pathway_sums(policy, x_raw, y_raw)
    assert shift.total.shape == (4, policy.d)
    for p, (dX, dy) in enumerate(changes):
        one = coefficient_shift(policy, dX, dy)
        assert_allclose(shift.x[p], one.x, rtol=1e-9, atol=1e-12)
        assert_allclose(shift.y[p], one.y, rtol=1e-9, atol=1e-12)


def test_score_is_the_sum_of_alignments_and_positive_when_W_grows():
    X, y, *_ = problem()
    policy = fit(X, y)
    dW = np.stack([0.1 * policy.coef, -0.1 * policy.coef])
    assert_allclose(score(policy, dW), (dW * policy.coef).sum(-1))
    assert score(policy, dW)[0] > 0 > score(policy, dW)[1]


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000), a=st.floats(-3, 3), b=st.floats(-3, 3))
def test_shift_is_linear_in_the_change(seed, a, b):
    X, y, dX, dy = problem(seed, n=12, d=3)
    _, _, eX, ey = problem(seed + 1, n=12, d=3)
    policy = fit(X, y, fit_intercept=bool(seed % 2))
    together = coefficient_shift(policy, a * dX + b * eX, a * dy + b * ey)
    one, other = coefficient_shift(policy, dX, dy), coefficient_shift(policy, eX, ey)
    for pathway in ("x", "y", "total"):
        expected = a * getattr(one, pathway) + b * getattr(other, pathway)
        assert_allclose(getattr(together, pathway), expected, rtol=1e-8, atol=1e-9)


@settings(max_examples=25, deadline=None)
@given(seed=st.integers(0, 10_000))
def test_invariant_3_order_of_prompts_does_not_matter(seed):
    X, y, dX, dy = problem(seed, n=12, d=3)
    order = np.random.default_rng(seed).permutation(12)
    for fit_intercept in (False, True):
        policy = fit(X, y, fit_intercept=fit_intercept)
        shuffled = fit(X[order], y[order], fit_intercept=fit_intercept)
        assert_allclose(shuffled.coef, policy.coef, rtol=1e-9, atol=1e-12)
        assert_allclose(
            coefficient_shift(shuffled, dX[order], dy[order]).total,
            coefficient_shift(policy, dX, dy).total,
            rtol=1e-9,
            atol=1e-11,
        )


def test_invariant_5_features_are_found_by_id_not_by_position_or_text_order():
    X, y, *_ = problem(d=4)
    ids = np.array([9, 10, 101, 20])
    policy = fit(X, y, feature_ids=ids)
    as_text = np.array(sorted(range(4), key=lambda k: str(ids[k])))  # 10, 101, 20, 9
    assert list(as_text) != [0, 1, 2, 3]
    shuffled = fit(X[:, as_text], y, feature_ids=ids[as_text])
    for feature in ids:
        here, there = policy.column(feature), shuffled.column(feature)
        assert_allclose(policy.coef[here], shuffled.coef[there], rtol=1e-10)


@both
def test_choose_alpha_finds_the_naive_minimum_and_ignores_order(fit_intercept):
    X, y, *_ = problem(3, n=30, d=5)
    grid = [0.01, 0.1, 1.0, 10.0, 100.0]
    ids = [f"p{i:02d}" for i in range(30)]
    alpha, table = choose_alpha(X, y, fit_intercept=fit_intercept, folds=5, seed=4, grid=grid, prompt_ids=ids)
    fold = np.random.default_rng(4).permutation(30) % 5
    for row in table:
        sse = 0.0
        for k in range(5):
            train, test = fold != k, fold == k
            policy = fit(X[train], y[train], alpha=row["alpha"], fit_intercept=fit_intercept)
            sse += ((y[test] - policy.predict(X[test])) ** 2).sum()
        assert_allclose(row["mse"], sse / 30, rtol=1e-9)
    assert alpha == min(table, key=lambda row: row["mse"])["alpha"]
    order = np.random.default_rng(0).permutation(30)
    again, same = choose_alpha(
        X[order], y[order], fit_intercept=fit_intercept, folds=5, seed=4, grid=grid, prompt_ids=[ids[i] for i in order]
    )
    assert again == alpha
    assert same == table


def test_default_grid_follows_the_scale_of_the_activations():
    X, y, *_ = problem(3)
    alpha, _ = choose_alpha(X, y, fit_intercept=True, folds=4, seed=0)
    scaled, _ = choose_alpha(10 * X, y, fit_intercept=True, folds=4, seed=0)
    assert_allclose(scaled, 100 * alpha)


def test_arrays_are_copies_and_read_only():
    X, y, *_ = problem()
    policy = fit(X, y)
    before = policy.X.copy()
    X[0, 0] = 99.0
    assert_allclose(policy.X, before)
    with pytest.raises(ValueError, match="read-only"):
        policy.coef[0] = 1.0


def test_messages_name_what_is_wrong():
    X, y, dX, dy = problem(n=4, d=2)
    bad = X.copy()
    bad[2, 1] = np.nan
    with pytest.raises(UserError, match=r"X is not finite for 1 prompt\n  value: p2"):
        fit(bad, y)
    with pytest.raises(UserError, match=r"y is not finite for 2 prompts\n  value: p0, p3"):
        fit(X, np.array([np.inf, 0, 0, np.nan]))
    with pytest.raises(UserError, match=r"X \[4, 2\], y \[3\], ids 3"):
        fit(X, y[:3])
    with pytest.raises(UserError, match="columns 2, feature_ids"):
        fit(X, y, feature_ids=[1])
    with pytest.raises(UserError, match=r"feature id repeats\n  value: 7"):
        fit(X, y, feature_ids=[7, 7])
    with pytest.raises(UserError, match=r"prompt id repeats\n  value: a"):
        fit(X, y, prompt_ids=["a", "a", "b", "c"])
    with pytest.raises(UserError, match="must be integers"):
        fit(X, y, feature_ids=["9", "10"])
    with pytest.raises(UserError, match="needs features"):
        fit(X[:, :0], y, feature_ids=np.array([], dtype=int))
    with pytest.raises(UserError, match="needs prompts"):
        fit(X[:0], y[:0])
    for alpha in (0, -1.0, np.nan):
        with pytest.raises(UserError, match="penalty must be positive"):
            fit(X, y, alpha=alpha)
    policy = fit(X, y)
    with pytest.raises(UserError, match=r"dX \[3, 2\], dy \[4\]"):
        coefficient_shift(policy, dX[:3], dy)
    with pytest.raises(UserError, match=r"x_raw \[1, 3\]"):
        pathway_sums(policy, np.zeros((1, 3)), np.zeros((1, 3)))
    with pytest.raises(UserError, match="not in the policy"):
        policy.column(99)
    with pytest.raises(UserError, match="5 folds, 4 prompts"):
        choose_alpha(X, y, fit_intercept=False, folds=5, seed=0)
