"""Certificates: the bound always holds, resampled scores are refits, safe statements keep their level."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose

from taught.errors import UserError
from taught.policy.certificate import (
    SIZES,
    Ranking,
    RemainderBound,
    rank_statements,
    resample_counts,
    resampled_means,
    resampled_score,
)
from taught.policy.ridge import coefficient_shift, exact_shift, fit_policy, score
from taught.stats.intervals import resamples

both = pytest.mark.parametrize("fit_intercept", [False, True])


def problem(seed=0, n=30, d=5, alpha=2.0, fit_intercept=False):
    rng = np.random.default_rng(seed)
    X = np.maximum(rng.normal(size=(n, d)), 0) * rng.uniform(0.1, 3, d)
    y = X @ rng.normal(size=d) + 0.5 * rng.normal(size=n) - 3
    ids = [f"p{i:03d}" for i in rng.permutation(n)]
    return fit_policy(X, y, prompt_ids=ids, feature_ids=range(d), alpha=alpha, fit_intercept=fit_intercept), rng


def remainder(policy, dX, dy):
    """Norm of exact refit - linear shift, the same along W, and the linear shift."""
    linear = coefficient_shift(policy, dX, dy).total
    apart = exact_shift(policy, dX, dy) - linear
    return np.linalg.norm(apart), abs(apart @ policy.coef), linear


def holds(policy, dX, dy):
    coef, along, linear = remainder(policy, dX, dy)
    slack = 1e-9 * (np.linalg.norm(policy.coef) + np.linalg.norm(linear))
    bound, e = RemainderBound(policy), np.linalg.norm(dX, 2)
    for found in (bound(e, dy), bound(e, dy, linear), bound(2 * e, dy, linear)):
        assert coef <= found.coef + slack
        assert along <= found.score + slack * np.linalg.norm(policy.coef)
    assert bound(e, dy, linear).coef <= bound(e, dy).coef * (1 + 1e-9)


# The remainder


@settings(max_examples=150, deadline=None)
@given(
    seed=st.integers(0, 10**6),
    n=st.integers(2, 25),
    d=st.integers(1, 12),  # also more features than prompts
    logs=st.tuples(st.floats(-4, 1.5), st.floats(-4, 1.5), st.floats(-3, 3)),
    intercept=st.booleans(),
)
def test_the_bound_holds_for_any_change_small_or_large(seed, n, d, logs, intercept):
    policy, rng = problem(seed, n, d, 10 ** logs[2], intercept)
    dX = 10 ** logs[0] * rng.normal(size=(n, d))
    holds(policy, dX, 10 ** logs[1] * rng.normal(size=n))


@settings(max_examples=60, deadline=None)
@given(seed=st.integers(0, 10**6), size=st.floats(0.01, 3), intercept=st.booleans())
def test_the_bound_holds_for_changes_made_to_break_it(seed, size, intercept):
    policy, rng = problem(seed, fit_intercept=intercept)
    _, s, vt = np.linalg.svd(policy.Xc, full_matrices=False)
    for right in (vt[-1], policy.coef / np.linalg.norm(policy.coef), vt[0]):
        for left in (policy.residual, policy.Xc @ right, rng.normal(size=policy.n)):
            dX = -size * s[-1] * np.outer(left / (np.linalg.norm(left) + 1e-12), right)
            holds(policy, dX, 10 * size * left)  # takes the least direction of Xc away


@both
def test_the_bound_is_within_two_orders_and_of_second_order(fit_intercept):
    policy, rng = problem(4, n=200, d=8, fit_intercept=fit_intercept)
    bound, ratios = RemainderBound(policy), []
    for _ in range(30):
        dX, dy = 1e-2 * rng.normal(size=(200, 8)), 1e-2 * rng.normal(size=200)
        coef, along, linear = remainder(policy, dX, dy)
        found = bound(np.linalg.norm(dX, 2), dy, linear)
        ratios.append((found.coef / coef, found.score / along))
    typical = np.median(ratios, axis=0)
    assert (typical < (20, 100)).all(), typical
    tenth = bound(np.linalg.norm(dX, 2) / 10, dy / 10, linear / 10)
    assert 80 < found.coef / tenth.coef < 120 and 80 < found.score / tenth.score < 120


def test_one_feature_closed_form():
    # x = 1, y = 3, alpha = 1: W = x y / (x^2 + 1) = 3/2, and moved by e: 3 (1 + e) / ((1 + e)^2 + 1)
    policy = fit_policy([[1.0]], [3.0], prompt_ids=["a"], feature_ids=[0], alpha=1.0)
    for e in (-0.5, -0.01, 0.01, 0.5):
        exact = 3 * (1 + e) / ((1 + e) ** 2 + 1) - 1.5  # the derivative of W at e = 0 is 0
        found = RemainderBound(policy)(abs(e), [0.0], [0.0])
        assert abs(exact) <= found.coef and abs(1.5 * exact) <= found.score
        if abs(e) < 0.1:
            assert found.coef < 4 * abs(exact)


def test_a_change_of_the_behavior_alone_has_no_remainder():
    policy, rng = problem()
    assert RemainderBound(policy)(0.0, rng.normal(size=30)) == (0.0, 0.0)


# Resampled prompts


@both
def test_scores_on_resamples_are_those_of_policies_with_repeated_prompts(fit_intercept):
    policy, rng = problem(1, fit_intercept=fit_intercept)
    dX, dy = rng.normal(size=(3, 30, 5)), rng.normal(size=(3, 30))
    chunks = list(resample_counts(policy.prompt_ids, n=70, seed=5))
    assert [len(counts) for counts in chunks] == [64, 6]
    x, y = resampled_score(policy, np.concatenate(chunks), dy, dX)
    order = np.argsort(policy.prompt_ids)
    for b, drawn in enumerate(resamples(30, 70, 5)):
        i = order[drawn]
        own = fit_policy(
            policy.X[i],
            policy.y[i],
            prompt_ids=np.arange(30),
            feature_ids=range(5),
            alpha=2.0,
            fit_intercept=fit_intercept,
        )
        for p in range(3):
            shift = coefficient_shift(own, dX[p][i], dy[p][i])
            assert_allclose(x[b, p], score(own, shift.x), rtol=1e-8, atol=1e-10)
            assert_allclose(y[b, p], score(own, shift.y), rtol=1e-8, atol=1e-10)
    assert resampled_score(policy, chunks[1], dy, None)[0] is None


def test_resamples_belong_to_ids_not_to_positions():
    policy, rng = problem(2)
    dX, dy = rng.normal(size=(2, 30, 5)), rng.normal(size=(2, 30))
    order = rng.permutation(30)
    moved = fit_policy(
        policy.X[order],
        policy.y[order],
        alpha=2.0,
        feature_ids=range(5),
        prompt_ids=[policy.prompt_ids[i] for i in order],
    )
    (one,) = resample_counts(policy.prompt_ids, n=20, seed=0)
    (other,) = resample_counts(moved.prompt_ids, n=20, seed=0)
    assert (one[:, order] == other).all()
    scores = sum(resampled_score(policy, one, dy, dX))
    assert_allclose(scores, sum(resampled_score(moved, other, dy[:, order], dX[:, order])), rtol=1e-9)


def test_group_means_on_resamples():
    rng = np.random.default_rng(0)
    dy, rows = rng.normal(size=(4, 10)), [1, 4, 7]
    counts = rng.integers(0, 3, size=(6, 10))
    counts[0, rows] = 0
    found = resampled_means(dy, rows, counts)
    assert np.isnan(found[0]).all()
    for b in range(1, 6):
        drawn = [i for i in rows for _ in range(counts[b, i])]
        assert_allclose(found[b], dy[:, drawn].mean(1))


# Ranks


def by_k(statements):
    return {s.k: s for s in statements}


def ranking(values, bound=0.0, errors=None, reason=None):
    values = np.asarray(values, dtype=float)
    errors = None if errors is None else np.full(len(values), float(errors))
    return Ranking("score", values, np.full(len(values), bound), errors, reason)


def test_clear_ranks_are_safe_and_near_ties_are_not():
    rng = np.random.default_rng(0)
    values = np.array([10.0, -6.0, 5.99, 3.0, 0.5, 0.4])
    ids = list("abcdef")
    draws = values + 0.1 * rng.normal(size=(400, 6))
    found = by_k(rank_statements(ranking(values), ids, [draws[:100], draws[100:]]))
    assert list(found) == [1, 3, 5]
    assert found[1].verdict == "safe" and found[1].example_ids == ["a"] and found[1].reason == ""
    assert found[3].verdict == "safe" and found[3].example_ids == ["a", "b", "c"]
    assert_allclose([found[1].gap, found[3].gap], [4.0, 2.99])
    assert found[5].verdict == "undecided" and 0.6 < found[5].share < 0.9
    assert "the prompts decide: they stay in" in found[5].reason
    swapped = by_k(rank_statements(ranking(values[[0, 1, 2]]), ids[:3], [draws[:, :3]]))
    assert swapped[1].verdict == "safe" and list(swapped) == [1]


def test_margins_of_refit_and_sketches_count():
    values, ids = [10.0, 6.0, 1.0, 0.5], list("abcd")
    still = [np.tile(values, (200, 1))]
    exact = by_k(rank_statements(ranking(values), ids, still))[1]
    assert (exact.by_refit, exact.by_sketch, exact.verdict, exact.share) == ("exact", "exact", "safe", 1.0)
    wide = by_k(rank_statements(ranking(values, bound=2.1), ids, still))[1]
    assert (wide.by_refit, wide.verdict) == ("undecided", "undecided")
    assert wide.reason == "the bound on the remainder is wider than the gap"
    assert by_k(rank_statements(ranking(values, bound=1.9), ids, still))[1].verdict == "safe"
    # 4 examples: both sides of all within z se, z at .05 / 16: 2.73
    assert by_k(rank_statements(ranking(values, errors=0.73), ids, still))[1].verdict == "safe"
    assert by_k(rank_statements(ranking(values, errors=0.74), ids, still))[1].verdict == "undecided"
    together = by_k(rank_statements(ranking(values, bound=1.5, errors=0.5), ids, still))[1]
    assert (together.by_refit, together.by_sketch, together.verdict) == ("safe", "safe", "undecided")
    assert together.reason.startswith("prompts, remainder and sketches together")


def test_half_of_the_level_goes_to_sketches_where_there_are_any():
    values = np.array([10.0, 6.0, 1.0])
    draws = np.tile(values, (100, 1))
    draws[:3] = values[[1, 0, 2]]  # (1 + 3) / 101 is between .025 and .05
    (exact,) = rank_statements(ranking(values), list("abc"), [draws])[:1]
    (sketched,) = rank_statements(ranking(values, errors=1e-6), list("abc"), [draws])[:1]
    assert (exact.verdict, sketched.verdict) == ("safe", "undecided")
    assert "the prompts decide: they stay in 97.0% of the resamples" in sketched.reason


def test_what_is_not_known_is_undecided_and_says_so():
    values, ids = [10.0, 1.0, 0.5], list("abc")
    still = [np.tile(values, (200, 1))]
    bound = ranking(values)._replace(bound=np.array([0.0, np.nan, 0.0]))
    (found,) = rank_statements(bound, ids, still)
    assert (found.verdict, found.by_refit, found.share) == ("undecided", "undecided", 1.0)
    assert "not bounded against the exact refit" in found.reason
    (found,) = rank_statements(ranking(values, reason="needs dX"), ids, None)
    assert (found.verdict, found.share, found.reason) == ("undecided", None, "needs dX")
    (few,) = rank_statements(ranking(values), ids, [still[0][:18]])  # 1 of 19 is more than 5%
    assert few.verdict == "undecided"


def test_safe_statements_are_true_at_their_level():
    """The true top k by the mean over a population, named safe from a sample: wrong in few of them."""
    wrong = named = 0
    for seed in range(150):
        rng = np.random.default_rng(seed)
        truth = np.abs(rng.normal(2, 0.4, size=12))
        sample = truth + rng.normal(0, 1.0, size=(150, 12))  # rows: prompts
        draws = np.stack([sample[i].mean(0) for i in resamples(150, 300, seed)])
        for s in rank_statements(ranking(sample.mean(0)), [str(i) for i in range(12)], [draws]):
            if s.verdict == "safe":
                named += 1
                best = {str(i) for i in np.argsort(-truth)[: s.k]}
                wrong += set(s.example_ids) != best
    assert named > 20 and wrong <= 0.1 * named


def test_sizes_stop_before_all_examples_and_messages():
    values = np.arange(1.0, 61.0)
    found = rank_statements(ranking(values), [str(i) for i in range(60)], None)
    assert [s.k for s in found] == list(SIZES)
    assert rank_statements(ranking([1.0]), ["a"], None) == []
    policy, _ = problem()
    with pytest.raises(UserError, match="one for each of 30 prompts"):
        RemainderBound(policy)(0.1, np.zeros(29))
