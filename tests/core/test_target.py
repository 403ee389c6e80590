"""Targets: their inner products with any change are the shifts of the policy."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose

from taught.core.target import coefficient_targets, combine_raw_x, mean_y_target, raw_x_targets, score_targets
from taught.errors import UserError
from taught.policy.ridge import coefficient_shift, exact_shift, fit_policy, pathway_sums, score

both = pytest.mark.parametrize("fit_intercept", [False, True])


def problem(seed, fit_intercept, n=25, d=5):
    rng = np.random.default_rng(seed)
    X = np.maximum(rng.normal(size=(n, d)), 0)
    y = X @ rng.normal(size=d) + rng.normal(size=n) - 2
    policy = fit_policy(
        X, y, prompt_ids=[f"p{i}" for i in range(n)], feature_ids=[9, 10, 101, 20, 3][:d], fit_intercept=fit_intercept
    )
    return policy, rng.normal(size=(n, d)) * (X > 0), rng.normal(size=n)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), fit_intercept=st.booleans())
def test_targets_reproduce_every_coefficient_and_the_score(seed, fit_intercept):
    policy, dX, dy = problem(seed, fit_intercept)
    shift = coefficient_shift(policy, dX, dy)
    for feature in policy.feature_ids:
        x, y = coefficient_targets(policy, feature)
        assert (x.pathway, y.pathway, x.feature_id) == ("x", "y", feature)
        k = policy.column(feature)
        assert_allclose(x.inner(dX, dy), shift.x[k], rtol=1e-12, atol=1e-12)
        assert_allclose(y.inner(dX, dy), shift.y[k], rtol=1e-12, atol=1e-12)
    x, y = score_targets(policy)
    assert_allclose(x.inner(dX, dy), score(policy, shift.x), rtol=1e-12, atol=1e-12)
    assert_allclose(y.inner(dX, dy), score(policy, shift.y), rtol=1e-12, atol=1e-12)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), fit_intercept=st.booleans())
def test_raw_basis_reproduces_the_x_pathway(seed, fit_intercept):
    policy, dX, dy = problem(seed, fit_intercept)
    targets = raw_x_targets(policy)
    assert len(targets) == policy.d + fit_intercept
    F = np.array([[t.inner(scale * dX, dy) for t in targets] for scale in (1.0, -2.0)])
    y_raw = np.stack([policy.Xc.T @ dy, policy.Xc.T @ dy])
    shift = pathway_sums(policy, combine_raw_x(policy, F), y_raw)
    one = coefficient_shift(policy, dX, dy)
    assert_allclose(shift.x[0], one.x, rtol=1e-12, atol=1e-12)
    assert_allclose(shift.x[1], -2 * one.x, rtol=1e-12, atol=1e-12)
    assert_allclose(shift.y[0], one.y, rtol=1e-12, atol=1e-12)


def test_raw_basis_is_silent_where_its_feature_is_inactive():
    policy, *_ = problem(0, True)
    for k, target in enumerate(raw_x_targets(policy)[: policy.d]):
        assert target.feature_id == policy.feature_ids[k]
        inactive = policy.X[:, k] == 0
        assert inactive.any()
        gated = target.A * (policy.X > 0)  # what is left once the baseline's gate is applied
        assert not gated[inactive].any()
        assert gated[~inactive].any()


def test_raw_basis_is_a_sequence():
    policy, *_ = problem(0, True)
    targets = raw_x_targets(policy)
    assert targets[-1].name == "raw_x:sum"
    assert [t.name for t in targets[1:3]] == ["raw_x:10", "raw_x:101"]
    with pytest.raises(IndexError):
        targets[len(targets)]


@both
def test_invariant_7_positive_means_the_target_rises_on_an_exact_refit(fit_intercept):
    policy, dX, dy = problem(2, fit_intercept)
    h = 1e-4
    for feature in policy.feature_ids:
        x, y = coefficient_targets(policy, feature)
        predicted = h * (x.inner(dX, dy) + y.inner(dX, dy))
        moved = exact_shift(policy, h * dX, h * dy)[policy.column(feature)]
        assert np.sign(predicted) == np.sign(moved)
        assert_allclose(predicted, moved, rtol=1e-2)


def test_invariant_7_mean_y_rises_with_y_on_its_group_only():
    target = mean_y_target(["a", "b", "c"], ["harmful", "harmless", "harmful"], "harmful")
    assert_allclose(target.B, [0.5, 0, 0.5])
    assert (target.A, target.pathway, target.group) == (None, "y", "harmful")
    assert target.inner(np.zeros((3, 2)), [1.0, 100.0, 3.0]) == 2.0


def test_invariant_5_targets_carry_their_prompt_ids():
    policy, *_ = problem(0, True)
    for target in [*score_targets(policy), *coefficient_targets(policy, 101), *raw_x_targets(policy)]:
        assert target.prompt_ids == policy.prompt_ids
    assert mean_y_target(["a"], ["g"], "g").prompt_ids == ("a",)


def test_messages():
    policy, *_ = problem(0, True)
    with pytest.raises(UserError, match=r"No prompt is in this group\n  value: x\n.*harmful, harmless"):
        mean_y_target(["a", "b"], ["harmful", "harmless"], "x")
    with pytest.raises(UserError, match="2 prompt ids, 1 groups"):
        mean_y_target(["a", "b"], ["harmful"], "harmful")
    with pytest.raises(UserError, match="value: 55"):
        coefficient_targets(policy, 55)
    with pytest.raises(UserError, match=r"F \[2, 5\]\n  rule:  \[P, 6\]"):
        combine_raw_x(policy, np.zeros((2, 5)))
