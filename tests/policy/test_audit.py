"""The audit of categories: planted gaps, no false alarms, independent routes to every number."""

from __future__ import annotations

import numpy as np
import pytest
from numpy.testing import assert_allclose

from taught.errors import UserError
from taught.policy.audit import _gaps_and_t, audit_categories
from taught.policy.ridge import fit_policy
from taught.stats.multiplicity import benjamini_hochberg

HARMFUL = ["weapons", "fraud", "religion", "drugs"]
HARMLESS = ["cooking", "travel", "killing a process"]


def study(seed=0, per=30, gap=0.0):
    """Prompts with one feature per category; the gap is put on religion and killing a process."""
    rng = np.random.default_rng(seed)
    groups = ["harmful"] * (per * len(HARMFUL)) + ["harmless"] * (per * len(HARMLESS))
    categories = [c for c in HARMFUL + HARMLESS for _ in range(per)]
    names = np.array(categories)
    X = np.stack([(names == c) * rng.uniform(1, 2, names.size) for c in HARMFUL + HARMLESS], 1)
    y = np.where(np.array(groups) == "harmful", -1.0, -6.0) + rng.normal(size=names.size)
    y[names == "religion"] -= gap
    y[names == "killing a process"] += gap
    ids = [f"p{i:03d}" for i in range(names.size)]
    return y, groups, categories, X, ids


def run(y, groups, categories, X, ids, **options):
    policy = fit_policy(X, y, prompt_ids=ids, feature_ids=[9, 10, 101, 20, 3, 7, 55])
    options = {"positive": "harmful", "negative": "harmless", "seed": 0, "n_boot": 300} | options
    rows = audit_categories(y, groups, categories, X, policy, policy.coef - 1, policy.coef + 1, **options)
    return {(row["group"], row["category"]): row for row in rows}, policy


def test_planted_gaps_are_found_on_their_side_only():
    rows, policy = run(*study(gap=2.0))
    uncovered = {key for key, row in rows.items() if row["uncovered"]}
    assert uncovered == {("harmful", "religion"), ("harmless", "killing a process")}
    low = rows["harmful", "religion"]
    assert low["lo"] <= low["gap"] <= low["hi"] < 0
    assert low["p"] <= low["p_adjusted"] < 0.05
    assert low["features"] == [101]  # the only feature that is stronger there than elsewhere
    (detail,) = low["feature_details"]
    assert detail["coef"] == policy.coef[policy.column(101)]
    assert (detail["lo"], detail["hi"]) == (detail["coef"] - 1, detail["coef"] + 1)


def test_invariant_7_the_other_direction_is_no_gap():
    rows, _ = run(*study(gap=-2.0))  # refuses more where it should, less where it should not
    assert rows["harmful", "religion"]["p_adjusted"] < 0.05
    assert rows["harmful", "religion"]["gap"] > 0
    assert rows["harmful", "religion"]["uncovered"] is False
    assert rows["harmless", "killing a process"]["uncovered"] is False


def test_gap_is_to_the_other_categories_of_the_same_group():
    y, groups, categories, X, ids = study()
    rows, _ = run(y, groups, categories, X, ids)
    for (group, category), row in rows.items():
        inside = [a for a, g, c in zip(y, groups, categories, strict=True) if (g, c) == (group, category)]
        rest = [a for a, g, c in zip(y, groups, categories, strict=True) if g == group and c != category]
        assert_allclose(row["mean_y"], np.mean(inside))
        assert_allclose(row["gap"], np.mean(inside) - np.mean(rest))


def test_p_and_interval_agree_with_welch_on_normal_data():
    stats = pytest.importorskip("scipy.stats")
    y, groups, categories, X, ids = study(gap=0.4)
    rows, _ = run(y, groups, categories, X, ids, n_boot=4000)
    names = np.array(categories)
    inside = y[names == "religion"]
    rest = y[(names != "religion") & (np.array(groups) == "harmful")]
    welch = stats.ttest_ind(inside, rest, equal_var=False)
    row = rows["harmful", "religion"]
    assert_allclose(row["p"], welch.pvalue, rtol=0.25)
    assert_allclose([row["lo"], row["hi"]], welch.confidence_interval(0.95), atol=0.08)


def test_statistic_is_welchs_also_far_from_zero():
    stats = pytest.importorskip("scipy.stats")
    rng = np.random.default_rng(0)
    y, category = rng.normal(size=40), np.repeat([0, 1, 2], [5, 10, 25])
    for offset, rtol in ((0.0, 1e-10), (1e7, 1e-6)):
        _, (t,) = _gaps_and_t(y[None] + offset, category, np.bincount(category))
        for c in range(3):
            inside, rest = y[category == c], y[category != c]
            expected = stats.ttest_ind(inside, rest, equal_var=False).statistic
            assert_allclose(t[c], expected, rtol=rtol)


def test_no_gap_no_alarm():
    alarms = 0
    for seed in range(20):
        rows, _ = run(*study(seed, per=10), n_boot=200)
        alarms += any(row["p_adjusted"] < 0.05 for row in rows.values())
    assert alarms <= 4  # expected 1 of 20; more than 4 has probability 0.003


def test_small_categories_are_listed_but_not_judged():
    y, groups, categories, X, ids = study(gap=2.0)
    keep = [i for i, c in enumerate(categories) if c != "religion" or i % 10 == 0]  # 3 prompts
    cut = [[v[i] for i in keep] for v in (y, groups, categories, X, ids)]
    rows, _ = run(np.array(cut[0]), cut[1], cut[2], np.array(cut[3]), cut[4])
    row = rows["harmful", "religion"]
    assert row["n"] == 3
    assert row["gap"] < 0
    assert [row[k] for k in ("lo", "hi", "p", "p_adjusted", "uncovered")] == [None] * 5


def test_a_group_with_one_category_has_no_gap_and_a_missing_category_a_name():
    y, groups, categories, X, ids = study()
    categories = [None if g == "harmless" else c for g, c in zip(groups, categories, strict=True)]
    rows, _ = run(y, groups, categories, X, ids)
    row = rows["harmless", "(none)"]
    assert (row["gap"], row["p"], row["uncovered"], row["features"]) == (None, None, None, [])


def test_constant_behavior_is_no_evidence():
    y, groups, categories, X, ids = study()
    rows, _ = run(np.full_like(y, -3.0), groups, categories, X, ids)
    assert {row["p"] for row in rows.values()} == {1.0}


def test_invariant_3_order_of_prompts_does_not_matter():
    y, groups, categories, X, ids = study(gap=1.0)
    order = np.random.default_rng(1).permutation(len(y))
    one, _ = run(y, groups, categories, X, ids)
    other, _ = run(
        y[order], [groups[i] for i in order], [categories[i] for i in order], X[order], [ids[i] for i in order]
    )
    assert list(one) == list(other)
    for key in one:
        for name in ("gap", "lo", "hi", "p", "p_adjusted", "uncovered", "features"):
            assert one[key][name] == other[key][name]


def test_benjamini_hochberg_agrees_with_scipy():
    stats = pytest.importorskip("scipy.stats")
    p = np.random.default_rng(0).uniform(size=17) ** 3
    assert_allclose(benjamini_hochberg(p), stats.false_discovery_control(p))
    assert_allclose(benjamini_hochberg([0.01, 0.04, 0.03]), [0.03, 0.04, 0.04])
    assert benjamini_hochberg([]).shape == (0,)


def test_messages():
    y, groups, categories, X, ids = study(per=6)
    with pytest.raises(UserError, match=r"no prompt in this group\n  value: odd\n.*harmful, harmless"):
        run(y, groups, categories, X, ids, negative="odd")
    with pytest.raises(UserError, match="categories 41"):
        run(y, groups, categories[1:], X, ids)
    policy = fit_policy(X, y, prompt_ids=ids, feature_ids=range(7))
    with pytest.raises(UserError, match=r"lo \[1\], hi \[7\]"):
        audit_categories(
            y, groups, categories, X, policy, [0.0], policy.coef, positive="harmful", negative="harmless", seed=0
        )
