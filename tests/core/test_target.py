"""Targets: what they are called, and that their inner products with any change are the shifts of the policy."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose

from taught.core.names import TargetName
from taught.core.readings import Moves, Readings
from taught.core.target import TargetSet, value
from taught.errors import UserError
from taught.policy.ridge import coefficient_shift, exact_shift, fit_policy, pathway_sums, score
from taught.targets.policy import RawX, combine_raw_x

both = pytest.mark.parametrize("fit_intercept", [False, True])
FEATURES = [9, 10, 101, 20, 3]


def problem(seed, fit_intercept, n=25, d=5):
    rng = np.random.default_rng(seed)
    X = np.maximum(rng.normal(size=(n, d)), 0)
    y = X @ rng.normal(size=d) + rng.normal(size=n) - 2
    ids = [f"p{i}" for i in range(n)]
    policy = fit_policy(X, y, prompt_ids=ids, feature_ids=FEATURES[:d], fit_intercept=fit_intercept)
    groups = {"harmful": ids[::2], "harmless": ids[1::2]}
    readings = Readings(tuple(ids), y, groups, {"locks": ids[:4]}, X, tuple(FEATURES[:d]), policy)
    return readings, rng.normal(size=(n, d)) * (X > 0), rng.normal(size=n)


NAMES = [
    "score",
    "score:x",
    "coefficient:17",
    "coefficient:17:y",
    "behavior",
    "behavior:a:b",
    "prompt:p 1:x",
    "concept:refusal:x",
    "behavior:a - behavior:b",
    "behavior:a - b",
    "coefficient:3:x - score:y",
    "behavior:*",
]


@pytest.mark.parametrize("text", NAMES)
def test_a_name_prints_as_it_is_read(text):
    name = TargetName.parse(text)
    assert str(name) == text and TargetName.parse(str(name)) == name


def test_what_a_name_says():
    assert TargetName.parse("coefficient:17:y") == TargetName("coefficient", "17", "y")
    assert TargetName.parse("prompt:p:x") == TargetName("prompt", "p:x")  # a prompt has no pathways
    assert TargetName.parse("behavior:a - b").minus is None  # b is no target: a group may be called so
    assert TargetName.parse("behavior:a - behavior:b").minus == TargetName("behavior", "b")


@given(st.text(min_size=1).filter(lambda t: t.strip() == t and " - " not in t))
def test_any_id_survives_a_name(about):
    assert TargetName.parse(str(TargetName("prompt", about))) == TargetName("prompt", about)


@pytest.mark.parametrize("text, fix", [("scores", "score"), ("behaviour:a", "behavior"), ("mean_y:a", None)])
def test_an_unknown_kind_lists_the_known_ones(text, fix):
    with pytest.raises(UserError) as error:
        TargetName.parse(text)
    assert "coefficient" in error.value.rule and (fix is None or fix in error.value.fix)


@pytest.mark.parametrize("text", ["coefficient", "coefficient:", "score:17", "prompt", "concept:", "behavior:"])
def test_a_name_that_says_too_little_or_too_much(text):
    with pytest.raises(UserError):
        TargetName.parse(text)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), fit_intercept=st.booleans())
def test_targets_reproduce_every_coefficient_and_the_score(seed, fit_intercept):
    readings, dX, dy = problem(seed, fit_intercept)
    policy = readings.policy
    shift = coefficient_shift(policy, dX, dy)
    targets = TargetSet.of(["score", "coefficient:*", "behavior:*", "behavior:locks", "prompt:p3"], readings)
    expected = {
        "score": score(policy, shift.total),
        "score:x": score(policy, shift.x),
        "score:y": score(policy, shift.y),
        "behavior:harmful": dy[::2].mean(),
        "behavior:harmless": dy[1::2].mean(),
        "behavior:locks": dy[:4].mean(),
        "prompt:p3": dy[3],
    }
    for k, feature in enumerate(policy.feature_ids):
        expected |= {
            f"coefficient:{feature}": shift.total[k],
            f"coefficient:{feature}:x": shift.x[k],
            f"coefficient:{feature}:y": shift.y[k],
        }
    assert sorted(map(str, targets.names)) == sorted(expected)
    # from the cotangents, one direct target each, and summed over pathways
    A, B = targets.cotangents()
    direct = np.tensordot(A.numpy(), dX, axes=2) + B.numpy() @ dy
    from_queries = targets.from_direct(direct[None])[0]
    # from the shift and the changes of y
    from_sums = targets.combine(Moves(dy[None], type(shift)(shift.x[None], shift.y[None])))[0]
    for found in (from_queries, from_sums, targets.changes(dX, dy)):
        assert_allclose(found, [expected[str(name)] for name in targets.names], rtol=1e-11, atol=1e-11)


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10_000), fit_intercept=st.booleans())
def test_raw_basis_reproduces_the_x_pathway(seed, fit_intercept):
    readings, dX, dy = problem(seed, fit_intercept)
    policy = readings.policy
    basis = RawX(policy)
    assert len(basis) == policy.d + fit_intercept
    F = np.array([[np.vdot(A, scale * dX) for A in basis] for scale in (1.0, -2.0)])
    y_raw = np.stack([policy.Xc.T @ dy, policy.Xc.T @ dy])
    shift = pathway_sums(policy, combine_raw_x(policy, F), y_raw)
    one = coefficient_shift(policy, dX, dy)
    assert_allclose(shift.x[0], one.x, rtol=1e-12, atol=1e-12)
    assert_allclose(shift.x[1], -2 * one.x, rtol=1e-12, atol=1e-12)
    assert_allclose(shift.y[0], one.y, rtol=1e-12, atol=1e-12)


def test_raw_basis_is_silent_where_its_feature_is_inactive():
    readings, *_ = problem(0, True)
    policy = readings.policy
    for k, A in enumerate(RawX(policy)[: policy.d]):
        inactive = policy.X[:, k] == 0
        assert inactive.any()
        gated = A * (policy.X > 0)  # what is left once the baseline's gate is applied
        assert not gated[inactive].any()
        assert gated[~inactive].any()


@both
def test_positive_means_that_the_target_rises_on_an_exact_refit(fit_intercept):
    readings, dX, dy = problem(2, fit_intercept)
    policy, h = readings.policy, 1e-4
    targets = TargetSet.of([f"coefficient:{k}" for k in policy.feature_ids], readings)
    after = readings.refitted(readings.y + h * dy, readings.X + h * dX)
    for name, predicted in zip(targets.names, h * targets.changes(dX, dy), strict=True):
        if name.pathway is None:
            moved = exact_shift(policy, h * dX, h * dy)[policy.column(int(name.about))]
            assert_allclose(predicted, moved, rtol=1e-2)
            assert_allclose(value(name, after, readings) - value(name, readings, readings), moved, rtol=1e-9)


def test_a_contrast_is_the_difference_of_its_sides():
    readings, dX, dy = problem(1, False)
    targets = TargetSet.of(["behavior:harmful - behavior:harmless", "score:x - behavior:locks"], readings)
    parts = TargetSet.of(["behavior:harmful", "behavior:harmless", "score:x", "behavior:locks"], readings)
    a, b, c, d = parts.changes(dX, dy)
    assert_allclose(targets.changes(dX, dy), [a - b, c - d], rtol=1e-12)
    A, B = targets.cotangents()
    assert_allclose(np.tensordot(A.numpy(), dX, axes=2) + B.numpy() @ dy, [a - b, c - d], rtol=1e-11)


def test_the_behavior_rises_with_y_on_its_group_only():
    readings = Readings(("a", "b", "c"), np.zeros(3), {"harmful": ["a", "c"], "harmless": ["b"]})
    A, B = TargetSet.of(["behavior:harmful", "behavior"], readings).cotangents()
    assert A is None
    assert_allclose(B, [[0.5, 0, 0.5], [1 / 3, 1 / 3, 1 / 3]])


def test_every_prompt_is_a_matrix_and_no_row_of_the_table():
    readings, *_ = problem(0, True)
    targets = TargetSet.of(["behavior:*", "prompt:*"], readings)
    assert targets.every_prompt and len(targets.names) == 2


@pytest.mark.parametrize(
    "text, key",
    [("behavior:x", "harmful"), ("coefficient:55", "feature"), ("coefficient:a", "id"), ("prompt:zz", "prompt")],
)
def test_what_the_readings_do_not_have_is_refused(text, key):
    readings, *_ = problem(0, True)
    with pytest.raises(UserError) as error:
        TargetSet.of([text], readings)
    assert key in str(error.value)


@pytest.mark.parametrize("group", ["*", "a ", "a - behavior:b"])
def test_a_group_whose_name_reads_as_another_target_is_refused(group):
    readings = Readings(("p", "q", "r"), np.zeros(3), {"a": ["p"], "b": ["q"], group: ["r"]})
    with pytest.raises(UserError, match="reads as another target") as error:
        TargetSet.of(["behavior:*"], readings)
    assert f"behavior:{group}" in str(error.value)


def test_a_target_that_needs_features_or_concepts_says_what_to_add():
    readings = Readings(("a",), np.zeros(1), {"g": ["a"]})
    for text, key in (("score", "sae.path"), ("coefficient:*", "sae.path"), ("concept:refusal", "concepts")):
        with pytest.raises(UserError) as error:
            TargetSet.of([text], readings)
        assert key in str(error.value)


def test_cotangents_are_tensors_in_the_order_of_the_direct_targets():
    readings, *_ = problem(0, False)
    targets = TargetSet.of(["score"], readings)
    assert [str(n) for n in targets.names] == ["score", "score:x", "score:y"]
    assert [str(n) for n in targets.direct] == ["score:x", "score:y"]
    A, B = targets.cotangents()
    assert A.dtype == torch.float64 and A.shape == (2, readings.n, 5) and B.shape == (2, readings.n)
    assert not A[1].any() and not B[0].any()
