"""Held-out quality: naive routes, planted signal and planted noise, order of prompts."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose, assert_array_equal

from taught.errors import UserError
from taught.policy.evaluate import bootstrap_coefficients, class_threshold, evaluate_policy, stratified_folds
from taught.policy.ridge import fit_policy
from taught.stats.ranks import spearman

OPTIONS = dict(alpha=1.0, fit_intercept=True, folds=4, seed=0, bootstrap=60, positive="harmful", negative="harmless")


def planted(n=120, signal=3.0, seed=0):
    """A feature that follows the group and one that follows y within it."""
    rng = np.random.default_rng(seed)
    harmful = np.arange(n) % 2 == 0
    X = np.maximum(rng.normal(size=(n, 4)), 0)
    X[:, 0] += signal * harmful
    y = X[:, 0] + X[:, 1] + 0.2 * rng.normal(size=n) - 5
    groups = ["harmful" if h else "harmless" for h in harmful]
    ids = [f"p{i:03d}" for i in range(n)]
    return X, y, groups, rng.integers(5, 50, size=n), ids


def codes(evaluation):
    return {finding.code for finding in evaluation.warnings}


def test_planted_signal_is_found_and_beats_the_trivial_predictors():
    X, y, groups, length, ids = planted()
    result = evaluate_policy(X, y, groups, prompts_length=length, prompt_ids=ids, **OPTIONS)
    assert result.r2.value > 0.9
    assert result.r2.lo <= result.r2.value <= result.r2.hi
    assert result.spearman.value > 0.9
    assert result.accuracy.value > 0.9
    assert result.majority.value == 0.5
    assert result.accuracy_gain.lo > 0
    assert result.baselines["group"]["r2"].value < result.r2.value
    assert result.baselines["length"]["r2"].value < 0.1
    assert "accuracy" not in result.baselines["group"]
    assert codes(result) == set()


def test_noise_is_called_noise():
    X, y, groups, length, _ = planted()
    y = np.random.default_rng(1).normal(size=len(y)) - 5
    noise = np.random.default_rng(2).normal(size=X.shape)
    result = evaluate_policy(noise, y, groups, prompts_length=length, **OPTIONS)
    assert result.r2.lo < 0
    assert {"r2-interval-includes-0", "accuracy-not-above-majority"} <= codes(result)


def test_a_policy_that_only_knows_the_group_is_told_so():
    X, _, groups, _, _ = planted()
    harmful = np.array([g == "harmful" for g in groups], dtype=float)
    y = 4 * harmful + np.random.default_rng(1).normal(size=len(harmful))
    noisy = harmful[:, None] + 0.05 * np.random.default_rng(3).normal(size=X.shape)
    result = evaluate_policy(noisy, y, groups, **OPTIONS)
    assert result.r2.lo > 0
    assert codes(result) == {"not-better-than-group"}


def test_fewer_prompts_than_features_and_constant_behavior_are_told():
    X, _, groups, _, _ = planted(n=12)
    wide = np.hstack([X, X + 1, X + 2, X + 3])
    result = evaluate_policy(wide, np.ones(12), groups, **OPTIONS)
    assert {"fewer-prompts-than-features", "constant-behavior"} <= codes(result)
    text = json.dumps(result.to_dict(), allow_nan=False)
    assert json.loads(text)["r2"] == {"value": None, "lo": None, "hi": None}


def test_predictions_are_those_of_a_fit_without_the_fold():
    X, y, groups, _, ids = planted(n=40)
    result = evaluate_policy(X, y, groups, prompt_ids=ids, **OPTIONS)
    y_bar, right = np.empty(40), []
    for k in range(4):
        train, test = result.fold != k, result.fold == k
        policy = fit_policy(
            X[train], y[train], prompt_ids=np.array(ids)[train], feature_ids=range(4), alpha=1.0, fit_intercept=True
        )
        assert_allclose(result.y_hat[test], policy.predict(X[test]), rtol=1e-10)
        y_bar[test] = y[train].mean()
        harmful = np.array(groups) == "harmful"
        cut = class_threshold(policy.predict(X[train]), harmful[train])
        right += list((policy.predict(X[test]) > cut) == harmful[test])
    assert_allclose(result.accuracy.value, np.mean(right))
    r2 = 1 - ((y - result.y_hat) ** 2).sum() / ((y - y_bar) ** 2).sum()
    assert_allclose(result.r2.value, r2)


def test_a_prompt_cannot_improve_its_own_prediction():
    X, y, groups, _, ids = planted(n=40)
    before = evaluate_policy(X, y, groups, prompt_ids=ids, **OPTIONS)
    moved = y.copy()
    moved[7] += 100
    after = evaluate_policy(X, moved, groups, prompt_ids=ids, **OPTIONS)
    own = before.fold == before.fold[7]
    assert_array_equal(after.y_hat[own], before.y_hat[own])
    assert np.abs(after.y_hat[~own] - before.y_hat[~own]).max() > 0.1


@pytest.mark.parametrize("alpha", [1.0, None])
def test_invariant_3_order_of_prompts_does_not_matter(alpha):
    X, y, groups, length, ids = planted(n=40)
    options = {**OPTIONS, "alpha": alpha, "bootstrap": 20}
    one = evaluate_policy(X, y, groups, prompts_length=length, prompt_ids=ids, **options)
    order = np.random.default_rng(5).permutation(40)
    other = evaluate_policy(
        X[order],
        y[order],
        [groups[i] for i in order],
        prompts_length=length[order],
        prompt_ids=[ids[i] for i in order],
        **options,
    )
    assert one.to_dict() == other.to_dict()
    assert_array_equal(one.y_hat[order], other.y_hat)


def test_other_groups_count_for_the_fit_but_not_for_the_accuracy():
    X, y, groups, _, _ = planted(n=40)
    alike = np.array(groups) == "harmful"  # as negatives they would move the cut
    more = [*groups, *["odd"] * 60]
    X, y = np.vstack([X, *[X[alike]] * 3]), np.concatenate([y, *[y[alike]] * 3])
    result = evaluate_policy(X, y, more, **OPTIONS)
    assert result.majority.value == 0.5  # 20 of 40, not 20 of 100
    assert result.accuracy.value > 0.9
    assert result.n == 100


@settings(max_examples=60, deadline=None)
@given(y_hat=st.lists(st.integers(-4, 4), min_size=1, max_size=12), bits=st.integers(0, 2**12 - 1))
def test_threshold_is_as_good_as_the_best_of_all_cuts(y_hat, bits):
    y_hat = np.array(y_hat, dtype=float)
    positive = np.array([bool(bits >> i & 1) for i in range(len(y_hat))])
    cut = class_threshold(y_hat, positive)
    best = max(((y_hat > c) == positive).sum() for c in np.arange(-5.5, 6))
    assert ((y_hat > cut) == positive).sum() == best


def test_spearman_agrees_with_scipy_also_with_ties():
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 5, 50), rng.normal(size=50)
    assert_allclose(spearman(a, b), stats.spearmanr(a, b).statistic)
    assert np.isnan(spearman(np.ones(4), np.arange(4)))


@settings(max_examples=20, deadline=None)
@given(seed=st.integers(0, 999), folds=st.integers(2, 6), n=st.integers(6, 40))
def test_folds_spread_every_group_evenly(seed, folds, n):
    groups = ["a" if i % 3 else "b" for i in range(n)]
    fold = stratified_folds(groups, folds, seed)
    for member in (np.array(groups) == "a", np.array(groups) == "b", np.ones(n, bool)):
        counts = np.bincount(fold[member], minlength=folds)
        assert counts.max() - counts.min() <= 1


def test_bootstrap_knows_a_stable_sign_from_an_unstable_one():
    rng = np.random.default_rng(0)
    X = np.column_stack([rng.normal(size=(200, 2)), np.zeros(200)])
    y = 2 * X[:, 0] + rng.normal(size=200)
    result = bootstrap_coefficients(X, y, alpha=1.0, fit_intercept=True, n=200, seed=0)
    assert result.lo[0] > 0
    assert result.sign_stability[0] == 1.0
    assert result.lo[1] < 0 < result.hi[1]
    assert result.sign_stability[1] < 1.0
    assert np.isnan(result.sign_stability[2])  # never active: there is no sign


def test_bootstrap_interval_has_the_width_of_the_closed_form():
    rng = np.random.default_rng(1)
    X, noise = rng.normal(size=(400, 1)), rng.normal(size=400)
    result = bootstrap_coefficients(X, X[:, 0] + noise, alpha=1e-6, fit_intercept=True, n=800, seed=0)
    expected = 2 * 1.96 * noise.std() / np.sqrt((X[:, 0] ** 2).sum())
    assert_allclose(result.hi - result.lo, expected, rtol=0.2)


def test_bootstrap_ignores_the_order_of_prompts():
    X, y, _, _, ids = planted(n=30)
    order = np.random.default_rng(5).permutation(30)
    options = dict(alpha=1.0, fit_intercept=False, n=20, seed=0)
    one = bootstrap_coefficients(X, y, prompt_ids=ids, **options)
    other = bootstrap_coefficients(X[order], y[order], prompt_ids=[ids[i] for i in order], **options)
    for a, b in zip(one, other, strict=True):
        assert_array_equal(a, b)


def test_messages():
    X, y, groups, _, ids = planted(n=12)
    one_group = ["harmful"] * 12
    with pytest.raises(UserError, match=r"'harmless' has 0 prompts\n  value: groups: harmful"):
        evaluate_policy(X, y, one_group, **OPTIONS)
    with pytest.raises(UserError, match="prompts 12, given 11"):
        evaluate_policy(X, y, groups[1:], **OPTIONS)
    with pytest.raises(UserError, match="13 folds, 12 prompts"):
        evaluate_policy(X, y, groups, **{**OPTIONS, "folds": 13})
    with pytest.raises(UserError, match="penalty must be positive"):
        evaluate_policy(X, y, groups, **{**OPTIONS, "alpha": 0.0})
    with pytest.raises(UserError, match=r"prompts 12, given \[5\]"):
        evaluate_policy(X, y, groups, prompts_length=np.ones(5), **OPTIONS)
    y[3] = np.nan
    with pytest.raises(UserError, match="value: p003"):
        evaluate_policy(X, y, groups, prompt_ids=ids, **OPTIONS)
    with pytest.raises(UserError, match="needs resamples"):
        bootstrap_coefficients(X, np.ones(12), alpha=1.0, fit_intercept=False, n=0, seed=0)
