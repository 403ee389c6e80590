"""Interference: naive routes, exact chance level, nothing guessed."""

from __future__ import annotations

from itertools import combinations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from numpy.testing import assert_allclose

from taught.analysis.interference import comovement, interference, random_control, top_offenders
from taught.errors import UserError

IDS = [9, 10, 101, 20]
TOTAL = np.array([[3.0, -1.0, 0.0, 0.0], [1.0, -4.0, 2.0, 1.0], [0.0, 0.0, 0.0, 0.0]])


def test_worked_example():
    one, two, three = interference(["a", "b", "c"], IDS, TOTAL, [[9], [20, 101], [9]])
    assert one["outside_share"] == 0.25
    assert (one["dominant_feature"], one["dominant_share"], one["unintended"]) == (9, 0.75, False)
    assert one["expected_by_chance"] == 0.75
    assert two["intended"] == [20, 101]
    assert two["outside_share"] == 5 / 8
    assert two["outside_change"] == 5.0
    assert (two["dominant_feature"], two["unintended"]) == (10, True)
    assert (three["outside_share"], three["dominant_feature"], three["unintended"]) == (None,) * 3
    assert three["note"] == "the example moves no coefficient"


def test_an_empty_intended_set_is_said_and_not_guessed():
    (row,) = interference(["a"], IDS, TOTAL[:1], [[]])
    assert row["n_intended"] == 0
    assert [row[k] for k in ("outside_share", "outside_change", "unintended")] == [None] * 3
    assert row["expected_by_chance"] is None
    assert row["dominant_feature"] == 9  # a fact about the example, whatever was intended
    assert "no intended features" in row["note"]


def test_ties_go_to_the_smallest_id_by_number():
    (row,) = interference(["a"], [101, 20], [[1.0, -1.0]], [[20]])
    assert row["dominant_feature"] == 20  # as text '101' would come first


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 9999))
def test_invariant_5_order_of_features_and_examples_does_not_matter(seed):
    rng = np.random.default_rng(seed)
    ids, examples = rng.permutation(200)[:6], [f"z{i}" for i in range(5)]
    total = rng.normal(size=(5, 6))
    intended = [rng.choice(ids, rng.integers(0, 4), replace=False) for _ in examples]
    rows = interference(examples, ids, total, intended)
    cols, order = rng.permutation(6), rng.permutation(5)
    again = interference(
        [examples[i] for i in order], ids[cols], total[np.ix_(order, cols)], [intended[i] for i in order]
    )
    for row, i in zip(again, order, strict=True):
        assert row["example_id"] == rows[i]["example_id"]
        for name in ("intended", "dominant_feature", "unintended", "note"):
            assert row[name] == rows[i][name]
        if rows[i]["outside_share"] is not None:
            assert_allclose(row["outside_share"], rows[i]["outside_share"])
            naive = sum(abs(v) for f, v in zip(ids, total[i], strict=True) if f not in intended[i])
            assert_allclose(row["outside_change"], naive)


def test_chance_level_is_the_mean_over_all_sets_of_the_same_size():
    dW = [[5.0, -1.0, 2.0, 0.5, 0.0]]
    for m in (1, 2, 4):
        rows = [interference(["a"], range(5), dW, [c])[0] for c in combinations(range(5), m)]
        expected = rows[0]["expected_by_chance"]
        assert_allclose(np.mean([row["outside_share"] for row in rows]), expected)
        assert_allclose(np.mean([row["unintended"] for row in rows]), expected)


def test_control_matches_the_rows_and_the_exact_expectation():
    rng = np.random.default_rng(0)
    total = rng.normal(size=(40, 8))
    intended = [rng.choice(8, rng.integers(1, 4), replace=False) for _ in range(40)]
    rows = interference([str(i) for i in range(40)], range(8), total, intended)
    control = random_control(range(8), total, intended, seed=0)
    for name, key in (("outside_share", "outside_share"), ("unintended_rate", "unintended")):
        entry = control[name]
        assert_allclose(entry["observed"], np.mean([row[key] for row in rows]))
        assert_allclose(entry["expected"], np.mean([row["expected_by_chance"] for row in rows]))
        assert entry["lo"] <= entry["expected"] <= entry["hi"]
        assert entry["p_lower"] > 0.01  # random sets are not better than chance
    assert control["n_examples"] == 40


def test_control_sees_sets_that_hold_the_effect():
    rng = np.random.default_rng(0)
    intended = [[i % 8] for i in range(40)]
    total = 0.1 * rng.normal(size=(40, 8)) + 3 * np.eye(8)[[i[0] for i in intended]]
    control = random_control(range(8), total, intended, seed=0)
    assert control["n_sets"] == 8
    assert control["unintended_rate"]["observed"] == 0
    assert control["unintended_rate"]["p_lower"] < 0.01
    assert control["outside_share"]["observed"] < control["outside_share"]["lo"]


def test_one_shared_set_is_one_piece_of_evidence():
    total = np.tile([1.0, 0, 0, 0], (100, 1))
    control = random_control(range(4), total, [[0]] * 100, seed=0)
    rate = control["unintended_rate"]
    assert (control["n_sets"], rate["observed"]) == (1, 0.0)
    assert (rate["lo"], rate["hi"]) == (0.0, 1.0)
    assert 0.2 < rate["p_lower"] < 0.3  # one draw of one feature out of four


def test_control_without_anything_to_judge():
    control = random_control(IDS, TOTAL, [[], [], [9]], seed=0)  # the last example moves nothing
    assert control["unintended_rate"] is None
    assert "no example" in control["note"]


def test_comovement_is_the_correlation_and_nan_where_undefined():
    rng = np.random.default_rng(0)
    total = rng.normal(size=(30, 4)) * 1e-7
    total[:, 2] = 0.1  # constant, and 0.1 leaves round-off when centred
    r = comovement(total)
    others = [0, 1, 3]
    assert_allclose(r[np.ix_(others, others)], np.corrcoef(total[:, others].T), atol=1e-12)
    assert np.isnan(r[2]).all()
    assert np.isnan(r[:, 2]).all()
    assert np.isnan(comovement(total[:2])).all()
    assert np.isnan(comovement(np.zeros((5, 2)))).all()


def test_top_offenders_by_amount_among_the_unintended():
    total = [[0.0, 1.0], [0.0, 9.0], [5.0, 1.0], [0.0, 1.0]]
    rows = interference(["d", "b", "a", "c"], [1, 2], total, [[1]] * 4)
    assert [row["example_id"] for row in top_offenders(rows, 2)] == ["b", "c"]
    assert [row["example_id"] for row in top_offenders(rows, 9)] == ["b", "c", "d"]


def test_messages():
    with pytest.raises(UserError, match=r"total \[3, 4\], examples 2, features 4"):
        interference(["a", "b"], IDS, TOTAL, [[], []])
    with pytest.raises(UserError, match="lists 1, examples 3"):
        interference(["a", "b", "c"], IDS, TOTAL, [[]])
    with pytest.raises(UserError, match=r"the example 'b' intends .*\n  value: 7, 11"):
        interference(["a", "b", "c"], IDS, TOTAL, [[], [11, 9, 7], []])
    bad = TOTAL.copy()
    bad[1, 0] = np.nan
    with pytest.raises(UserError, match=r"not finite for 1 examples\n  value: b"):
        interference(["a", "b", "c"], IDS, bad, [[], [], []])
