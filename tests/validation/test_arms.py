"""Arms: metrics by hand, and what the comparison with the random arm may claim."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from taught.errors import UserError
from taught.validation.arms import compare_arms
from taught.validation.outcomes import metrics

GROUPS, SIDES = {"yes": list(range(0, 30)), "no": list(range(30, 80))}, ("yes", "no")


def behavior(rng: np.random.Generator, models: int, lift: float = 0.0) -> np.ndarray:
    """Of ``models`` models that differ by a run's noise, on prompts that differ too."""
    prompts = np.random.default_rng(5).normal(-3, 1, 80)
    return prompts + lift + rng.normal(0, 0.3, (models, 1)) + rng.normal(0, 0.2, (models, 80))


def test_metrics_are_the_published_ones():
    yes, no = np.log([0.5, 0.25]), np.log([0.25, 0.125, 0.125])
    found = metrics(yes, no)
    assert found["precision"] == pytest.approx(0.75 / 1.25)
    assert found["recall"] == pytest.approx(0.375)
    assert found["f1"] == pytest.approx(2 * 0.6 * 0.375 / 0.975)
    assert found["correctness"] == pytest.approx((0.75 + 2.5) / 5)
    assert found["probability:negative"] == pytest.approx(0.5 / 3)


def test_a_weight_is_a_prompt_that_stands_several_times():
    rng = np.random.default_rng(0)
    yes, no = rng.normal(-2, 1, 4), rng.normal(-4, 1, 5)
    w, v = np.array([2, 0, 1, 1]), np.array([0, 3, 1, 1, 0])
    weighted = metrics(yes, no, w / 4, v / 5)
    for name, value in metrics(np.repeat(yes, w), np.repeat(no, v)).items():
        assert weighted[name] == pytest.approx(value)


def test_probabilities_too_small_for_a_number_still_have_a_precision():
    found = metrics(np.array([-900.0]), np.array([-901.0]))
    assert found["precision"] == pytest.approx(1 / (1 + math.exp(-1)))
    assert found["recall"] == found["f1"] == 0


def test_a_difference_has_the_error_of_runs_where_prompts_do_not_vary():
    runs = np.array([-2.0, -2.2, -1.9, -2.4, -2.1])
    arms = {"base": np.full((1, 80), -4.0), "named": np.full((1, 80), -3.0), "random": np.tile(runs[:, None], 80)}
    examples = {"base": 0, "named": 10, "random": 10}
    rows = {(r.arm, r.metric): r for r in compare_arms(arms, examples, GROUPS, SIDES, draws=20_000)}
    named, base = rows["named", "behavior:no"], rows["base", "behavior:no"]
    t, s = stats.t.ppf(0.975, 4), runs.std(ddof=1)
    assert named.difference == pytest.approx(-3 - runs.mean())
    assert named.difference_hi - named.difference == pytest.approx(t * s * math.sqrt(1.2), rel=0.05)
    assert base.difference_hi - base.difference == pytest.approx(t * s * math.sqrt(0.2), rel=0.05)
    assert named.lo == pytest.approx(-3) == pytest.approx(named.hi)
    assert (named.models, named.examples) == (1, 10) and named.p <= named.p_holm
    assert math.isnan(rows["random", "f1"].difference)


def test_arms_that_do_not_differ_are_seldom_told_apart():
    told = 0
    for seed in range(100):
        rng = np.random.default_rng(seed)
        arms = {"named": behavior(rng, 1), "random": behavior(rng, 5)}
        rows = compare_arms(arms, {"named": 9, "random": 9}, GROUPS, SIDES, draws=300)
        told += next(r.p < 0.05 for r in rows if r.arm == "named" and r.metric == "f1")
    assert told <= 10  # 5% of 100, and two and a half standard deviations


def test_a_lifted_arm_is_told_apart():
    rng = np.random.default_rng(1)
    arms = {"named": behavior(rng, 1, -2.5), "random": behavior(rng, 6)}
    rows = compare_arms(arms, {"named": 9, "random": 9}, GROUPS, SIDES)
    over = next(r for r in rows if r.arm == "named" and r.metric == "behavior:no")
    assert over.difference_hi < 0 and over.p_holm < 0.05


def test_one_random_model_is_not_enough():
    one = np.zeros((1, 80))
    with pytest.raises(UserError, match="too few random models"):
        compare_arms({"named": one, "random": one}, {"named": 1, "random": 1}, GROUPS, SIDES)


def test_without_sides_the_mean_of_every_group_is_compared():
    rng = np.random.default_rng(2)
    arms = {"named": behavior(rng, 1, -2.5), "random": behavior(rng, 6)}
    groups = {"all": range(80), "few": [3, 5]}
    rows = {(r.arm, r.metric): r for r in compare_arms(arms, {"named": 9, "random": 9}, groups)}
    assert {metric for _, metric in rows} == {"behavior:all", "behavior:few"}
    for name, columns in groups.items():
        gap = arms["named"][:, columns].mean() - arms["random"][:, columns].mean()
        assert rows["named", f"behavior:{name}"].difference == pytest.approx(gap)
    both = {(r.arm, r.metric): r for r in compare_arms(arms, {"named": 9, "random": 9}, GROUPS, SIDES)}
    assert {metric for _, metric in both} >= {"f1", "probability:yes", "probability:no", "behavior:yes", "behavior:no"}
    assert both["named", "behavior:no"].value == pytest.approx(arms["named"][0, 30:].mean())
    assert both["named", "probability:no"].value == pytest.approx(np.exp(arms["named"][0, 30:]).mean())
