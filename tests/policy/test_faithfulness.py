"""The faithfulness card: every statistic against a naive route, planted virtues and planted faults."""

from __future__ import annotations

import itertools
import json

import numpy as np
import pytest
from numpy.testing import assert_allclose

from planted_policy import made, planted
from taught.errors import UserError
from taught.policy.evaluate import bootstrap_coefficients
from taught.policy.faithfulness import CONTROLS, Fit, faithfulness
from taught.policy.predictors import Known, word_counts
from taught.policy.ridge import fit_policy

both = pytest.mark.parametrize("fit_intercept", [False, True])
TOPICS = ["locks", "ships", "bread", "wires", "birds"]


def held_out(X, y, fold, columns=None, fit_intercept=True, alpha=1.0):
    """Predictions of plain fits without each fold, on some columns."""
    y_hat = np.empty(len(y))
    for k in np.unique(fold):
        train = fold != k
        cols = np.arange(X.shape[1]) if columns is None else columns[k]
        fitted = fit_policy(
            X[train][:, cols],
            y[train],
            prompt_ids=np.arange(train.sum()),
            feature_ids=np.arange(len(cols)),
            alpha=alpha,
            fit_intercept=fit_intercept,
        )
        y_hat[~train] = fitted.predict(X[~train][:, cols])
    return y_hat


def r2(y, y_hat, fold):
    y_bar = np.array([y[fold != k].mean() for k in fold])
    return 1 - ((y - y_hat) ** 2).sum() / ((y - y_bar) ** 2).sum()


# Fit with few features


@both
def test_curve_is_that_of_refits_with_the_heaviest_features(fit_intercept):
    X, y, groups, _ = planted(d=6)
    result, card = made(X, y, groups, fit_intercept=fit_intercept)
    order = {}
    for k in range(4):
        train = result.fold != k
        fitted = fit_policy(
            X[train],
            y[train],
            prompt_ids=np.arange(train.sum()),
            feature_ids=np.arange(6),
            alpha=1.0,
            fit_intercept=fit_intercept,
        )
        size = X[train].std(0) if fit_intercept else np.sqrt((X[train] ** 2).mean(0))
        order[k] = np.argsort(-np.abs(fitted.coef) * size)
    for m in range(1, 7):
        few = held_out(X, y, result.fold, {k: o[:m] for k, o in order.items()}, fit_intercept)
        assert_allclose(card.curve[m - 1], r2(y, few, result.fold), rtol=1e-9)
    assert_allclose(card.curve[-1], result.r2.value, rtol=1e-9)


def test_two_planted_features_are_needed_and_stand_first():
    X, y, groups, _ = planted(n=200, d=10, noise=0.1)
    _, card = made(X, y, groups)
    assert card.needed.value == card.needed.lo == card.needed.hi == 2
    assert set(card.order[:2]) == {0, 1}
    assert card.curve[0] < 0.9 * card.curve[1]


def test_without_a_fit_no_number_of_features_is_named():
    X, _, groups, _ = planted()
    _, card = made(X, np.random.default_rng(5).normal(size=len(X)), groups)
    assert card.curve[-1] < 0 and np.isnan(card.needed.value)


# Calibration


def test_calibration_is_the_regression_of_y_on_its_prediction():
    stats = pytest.importorskip("scipy.stats")
    X, y, groups, _ = planted()
    result, card = made(X, y, groups, alpha=60.0, bootstrap=400)
    line = stats.linregress(result.y_hat, y)
    assert_allclose(card.calibration.slope.value, line.slope)
    assert_allclose(card.calibration.intercept.value, line.intercept)
    width = card.calibration.slope.hi - card.calibration.slope.lo
    assert_allclose(width, 2 * 1.96 * line.stderr, rtol=0.35)
    assert card.calibration.slope.lo > 1  # a large penalty makes predictions timid


def test_calibration_error_is_the_mean_gap_over_tenths():
    X, y, groups, _ = planted(n=83)
    result, card = made(X, y, groups, alpha=60.0)
    gaps = []
    for chunk in np.array_split(np.argsort(result.y_hat), 10):
        gaps.append(len(chunk) / 83 * abs(y[chunk].mean() - result.y_hat[chunk].mean()))
    assert len(card.calibration.bins) == 10
    sizes = sorted(n for n, _, _ in card.calibration.bins)
    assert sizes == [8] * 7 + [9] * 3
    assert_allclose(card.calibration.error.value, sum(gaps), rtol=0.15)  # other cuts by one row
    by_bins = sum(n / 83 * abs(b - a) for n, a, b in card.calibration.bins)
    assert_allclose(card.calibration.error.value, by_bins)


def test_calibration_error_by_chance_is_what_perfect_means_give():
    errors, expected = [], []
    for seed in range(60):
        rng = np.random.default_rng(seed)
        X = rng.normal(size=(100, 1))
        y = 3 * X[:, 0] + rng.normal(size=100)
        _, card = made(X, y, ["harmful", "harmless"] * 50, alpha=1e-9, bootstrap=20)
        errors.append(card.calibration.error.value)
        expected.append(card.calibration.error_by_chance)
    assert_allclose(np.mean(errors), np.mean(expected), rtol=0.08)


# Permutation


@both
def test_permutation_loss_is_the_mean_over_all_permutations(fit_intercept):
    X, y, groups, _ = planted(n=16, d=2)  # folds of four prompts: 24 permutations each
    result, card = made(X, y, groups, fit_intercept=fit_intercept)
    base, lost = result.r2.value, np.zeros(3)
    y_bar = np.array([y[result.fold != k].mean() for k in result.fold])
    squares = np.zeros((3, 16))
    for k in range(4):
        train, test = result.fold != k, np.flatnonzero(result.fold == k)
        fitted = fit_policy(
            X[train],
            y[train],
            prompt_ids=np.arange(train.sum()),
            feature_ids=[0, 1],
            alpha=1.0,
            fit_intercept=fit_intercept,
        )
        for case, columns in enumerate(([0], [1], [0, 1])):
            for order in itertools.permutations(range(len(test))):
                Z = X[test].copy()
                Z[:, columns] = Z[list(order)][:, columns]
                squares[case, test] += (y[test] - fitted.predict(Z)) ** 2 / 24
    lost = base - (1 - squares.sum(1) / ((y - y_bar) ** 2).sum())
    assert_allclose([e.value for e in card.permuted], lost[:2], rtol=1e-9)
    assert_allclose(card.all_permuted.value, lost[2], rtol=1e-9)


def test_permuting_a_planted_feature_costs_and_noise_does_not():
    X, y, groups, _ = planted(n=200, d=6)
    _, card = made(X, y, groups)
    assert [e.lo > 0 for e in card.permuted[:2]] == [True, True]
    assert max(e.value for e in card.permuted[2:]) < 0.01 < card.permuted[1].value
    assert card.all_permuted.lo > max(e.hi for e in card.permuted[2:])


# Sets of prompts


def test_sets_are_compared_as_by_refits_on_them():
    X, y, groups, ids = planted(n=60, d=5)
    groups = ["harmful" if i % 3 else "harmless" for i in range(60)]
    _, card = made(X, y, groups, ids)
    only = np.array(groups) == "harmful"

    def coef(at):
        return fit_policy(
            X[at], y[at], prompt_ids=np.arange(at.sum()), feature_ids=range(5), alpha=1.0, fit_intercept=True
        ).coef

    a, b = coef(only), coef(np.ones(60, bool))
    first = card.comparisons[0]
    assert first.sets == ("harmful only", "all") and first.n == (40, 60)
    assert_allclose(first.correlation, np.corrcoef(a, b)[0, 1])
    assert first.flips == (a * b < 0).sum()
    assert first.sure_flips == ((a * b < 0) & card.sure).sum() and first.sure == card.sure.sum()
    assert [c.sets for c in card.comparisons[1:]] == [("harmful only", "balanced"), ("balanced", "all")]
    assert card.comparisons[2].n == (40, 60)  # 20 of each group


def test_a_policy_that_turns_on_the_positive_group_is_told_from_one_that_does_not():
    rng = np.random.default_rng(0)
    groups = ["harmful" if i % 2 else "harmless" for i in range(300)]
    side = np.where(np.array(groups) == "harmful", -1.0, 3.0)
    X = rng.normal(size=(300, 8))
    noise = 0.2 * rng.normal(size=300)
    turning = made(X, (X * side[:, None])[:, :4].sum(1) + X[:, 4:].sum(1) + noise, groups)[1]
    steady = made(X, X.sum(1) + noise, groups)[1]
    assert turning.comparisons[0].sure_flips == 4 and steady.comparisons[0].sure_flips == 0
    assert turning.comparisons[0].control_sure_flips < 0.5  # fewer prompts alone turn nothing
    assert steady.comparisons[0].flips == 0
    assert CONTROLS >= 20


# Predictors


def test_trivial_predictors_have_the_values_of_the_evaluation():
    X, y, groups, ids = planted()
    length = np.random.default_rng(1).integers(4, 40, size=len(y)).astype(float)
    result, card = made(X, y, groups, ids, length=length)
    for name in ("group", "length"):
        theirs, (ours, gain) = result.baselines[name]["r2"], card.predictors[name]
        assert_allclose(ours, theirs, rtol=1e-9)
        assert_allclose(gain.value, result.r2.value - theirs.value, rtol=1e-9)


def test_direction_and_words_are_fitted_on_training_rows_only():
    linear_model = pytest.importorskip("sklearn.linear_model")
    X, y, groups, ids = planted(n=80)
    rng = np.random.default_rng(2)
    h = rng.normal(size=(80, 12))
    h[:, 0] += y
    texts = [f"{TOPICS[i % 5]} and {TOPICS[int(v) % 5]}" for i, v in enumerate(y)]
    result, card = made(X, y, groups, ids, h=h, texts=texts)
    names, counts = np.array(groups), word_counts(texts)
    y_hat = np.empty(80)
    for k in range(4):
        train, test = result.fold != k, result.fold == k
        v = h[train & (names == "harmful")].mean(0) - h[train & (names == "harmless")].mean(0)
        line = linear_model.LinearRegression().fit(h[train] @ v[:, None], y[train])
        y_hat[test] = line.predict(h[test] @ v[:, None])
    assert_allclose(card.predictors["direction"][0].value, r2(y, y_hat, result.fold), rtol=1e-8)
    assert counts.shape[1] == 6 and -0.5 < card.predictors["words"][0].value < 1


def test_behavior_that_stands_in_the_words_is_found_there_and_shuffled_texts_know_nothing():
    X, _, groups, ids = planted(n=120)
    rng = np.random.default_rng(0)
    topic = rng.integers(0, 5, size=120)
    y = topic + 0.1 * rng.normal(size=120)
    texts = [f"Tell me about {TOPICS[t]}, {rng.integers(99)}" for t in topic]
    _, card = made(X, y, groups, ids, texts=texts)
    assert card.predictors["words"][0].value > 0.9 and card.predictors["words"][1].hi < 0
    shuffled = [texts[i] for i in rng.permutation(120)]
    _, card = made(X, y, groups, ids, texts=shuffled)
    assert card.predictors["words"][0].value < 0.1


def test_word_counts_are_those_of_the_words_in_most_texts():
    texts = ["The cat, the CAT", "a cat once", "the dog"]
    counts = word_counts(texts)
    assert_allclose(counts, np.log1p([[2, 2], [1, 0], [0, 1]]))  # cat (2 texts), the (2 texts)
    assert word_counts(texts, limit=1).shape == (3, 1)
    assert word_counts(["one", "two"]).shape == (2, 0)


def test_category_means_are_means_of_the_own_group_and_missing_ones_are_a_kind():
    X, _, groups, ids = planted(n=80)
    kinds = [("a", None)[i // 2 % 2] for i in range(80)]
    cells = [(g == "harmful") * 2 + (k is None) for g, k in zip(groups, kinds, strict=True)]
    y = np.array(cells, dtype=float) + 0.01 * np.random.default_rng(0).normal(size=80)
    _, card = made(X, y, groups, ids, categories=kinds)
    assert card.predictors["category"][0].value > 0.99 > card.predictors["group"][0].value
    assert "category" not in made(X, y, groups, ids, categories=[None] * 80)[1].predictors


# The whole


@pytest.mark.parametrize("alpha", [1.0, None])
def test_invariant_3_order_of_prompts_does_not_matter(alpha):
    X, y, groups, ids = planted(n=40)
    rng = np.random.default_rng(7)
    known = dict(length=rng.integers(3, 30, size=40).astype(float), h=rng.normal(size=(40, 3)))
    lists = dict(categories=[TOPICS[i % 3] for i in range(40)], texts=[TOPICS[i % 5] for i in range(40)])
    _, one = made(X, y, groups, ids, alpha=alpha, **known, **lists)
    order = rng.permutation(40)
    moved = {key: value[order] for key, value in known.items()}
    moved |= {key: [value[i] for i in order] for key, value in lists.items()}
    _, other = made(X[order], y[order], [groups[i] for i in order], [ids[i] for i in order], alpha=alpha, **moved)
    assert one.to_dict(range(4)) == other.to_dict(range(4))


def test_constant_behavior_is_plain_json_without_numbers_that_are_not_defined():
    X, _, groups, _ = planted(n=20)
    _, card = made(X, np.ones(20), groups, bootstrap=20)
    record = json.loads(json.dumps(card.to_dict(range(4)), allow_nan=False))
    assert record["features"]["needed"] == {"value": None, "lo": None, "hi": None}
    assert record["predictors"]["group"]["r2"]["value"] is None
    assert record["permutation"]["all"]["value"] is None


def test_messages():
    X, y, groups, _ = planted(n=20)
    result, _ = made(X, y, groups)
    intervals = bootstrap_coefficients(X, y, alpha=1.0, fit_intercept=True, n=5, seed=0)
    options = dict(fit=Fit(1.0, True, 0), alpha=1.0, bootstrap=5)
    known = Known(groups, "harmful", "harmless")
    with pytest.raises(UserError, match="the evaluation and the policy do not fit"):
        faithfulness(X[:, :2], y, known, result, intervals, **options)
    with pytest.raises(UserError, match="value: given 19\n  rule: +one for each of 20 prompts"):
        faithfulness(X, y, known._replace(texts=["x"] * 19), result, intervals, **options)
