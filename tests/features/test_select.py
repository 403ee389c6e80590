from __future__ import annotations

import numpy as np
import pytest

from taught.errors import UserError
from taught.features.select import select_features

GROUPS = ["harmful"] * 3 + ["harmless"] * 3 + ["other"]


def acts(features: int = 12) -> np.ndarray:
    """Feature k has difference of means 0.05 * k, sign alternating; 'other' prompts are all 100."""
    X = np.zeros((7, features))
    for k in range(features):
        X[0:3, k] = [0.0, 0.05 * k, 0.10 * k]
        if k % 2:
            X[:, k] = np.r_[X[3:6, k], X[0:3, k], 0]
    X[6] = 100
    return X


def choose(**how):
    how = {"positive": "harmful", "negative": "harmless", **how}
    return select_features(how.pop("acts", acts()), how.pop("groups", GROUPS), **how)


def test_selects_by_the_difference_of_means_in_ascending_numeric_order():
    chosen = choose(threshold=0.42)
    # As strings: '10' < '11' < '9'.
    assert chosen.feature_ids.tolist() == [9, 10, 11]
    assert chosen.feature_ids.dtype == np.int64
    expected = [0.05 * k * (-1) ** k for k in range(12)]
    np.testing.assert_allclose(chosen.difference, expected, atol=1e-12)


def test_threshold_is_exclusive_and_counts_both_signs():
    X = np.zeros((2, 3))
    X[0], X[1] = [0.5, 0.0, 0.75], [0.0, 0.75, 0.0]
    chosen = choose(acts=X, groups=["harmful", "harmless"], threshold=0.5)
    assert chosen.feature_ids.tolist() == [1, 2]


def test_largest_differences_are_kept_and_ties_go_to_the_smaller_id():
    assert choose(threshold=0.0, max_features=2).feature_ids.tolist() == [10, 11]
    X = np.tile([[1.0], [0.0]], (1, 5))
    chosen = choose(acts=X, groups=["harmful", "harmless"], max_features=2)
    assert chosen.feature_ids.tolist() == [0, 1]


def test_table_of_all_features():
    chosen = choose(threshold=0.42)
    X = acts()
    for k in range(12):
        assert chosen.means["harmful"][k] == pytest.approx(np.mean(X[:3, k]))
        assert chosen.means["harmless"][k] == pytest.approx(np.mean(X[3:6, k]))
        assert chosen.means["other"][k] == 100
        assert chosen.rate[k] == pytest.approx(sum(x > 0 for x in X[:, k]) / 7)
    assert chosen.feature_ids.tolist() == [9, 10, 11]
    assert chosen.difference[9] == pytest.approx(-0.45)


def test_always_on_is_active_on_99_percent():
    X = np.ones((200, 3))
    X[:2, 1] = 0  # 99.0%
    X[:3, 2] = 0  # 98.5%
    groups = ["harmful"] * 100 + ["harmless"] * 100
    chosen = choose(acts=X, groups=groups, ids=[0])
    assert chosen.always_on.tolist() == [True, True, False]


def test_result_does_not_depend_on_the_order_of_the_prompts():
    order = np.random.default_rng(0).permutation(7)
    a = choose(threshold=0.3)
    b = choose(threshold=0.3, acts=acts()[order], groups=[GROUPS[i] for i in order])
    assert a.feature_ids.tolist() == b.feature_ids.tolist()
    np.testing.assert_allclose(a.difference, b.difference, atol=1e-15)


def test_given_ids_are_taken_whatever_their_difference_and_sorted_as_numbers():
    assert choose(ids=[10, 9, 0], max_features=1).feature_ids.tolist() == [0, 9, 10]


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ({"threshold": 0.6}, r"(?s)no feature.*0\.55.*above 0\.6.*features\.threshold"),
        ({"ids": [3, 12]}, r"(?s)no such feature.*12\n.*0 to 11"),
        ({"ids": [-1]}, r"(?s)no such feature.*-1"),
        ({"ids": [3, 5, 3]}, r"(?s)features.ids repeats.*3"),
        ({"ids": []}, "no features given"),
        ({"negative": "harmful"}, "between two groups"),
        ({"negative": "benign"}, r"(?s)between two groups.*'benign'.*'harmless'"),
        ({"groups": ["harmful"] * 7}, r"(?s)between two groups.*\['harmful'\]"),
        ({"groups": GROUPS[:-1]}, r"(?s)do not fit.*groups \[6\]"),
    ],
)
def test_errors_name_the_value_and_the_fix(how, message):
    with pytest.raises(UserError, match=message):
        choose(**how)


def test_activations_that_are_not_finite_are_refused():
    X = acts()
    X[4, 2] = np.nan
    with pytest.raises(UserError, match=r"not finite\n  value: prompt 4"):
        choose(acts=X)
