"""Removal and addition curves: what is trained, and what the comparison with chance may claim."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from taught.errors import UserError
from taught.validation.curves import compare_curves, plan_curve
from taught.validation.subsets import random_subsets

IDS = [f"z{i:02d}" for i in range(40)]
SCORES = {example: float((i * 17) % 40) for i, example in enumerate(IDS)}
BY_SCORE = sorted(IDS, key=lambda example: -SCORES[example])


def members(plan) -> dict[str, set[str]]:
    return {n: set(m) for n, m in zip(plan.subsets.names, plan.subsets.members, strict=True)}


@pytest.mark.parametrize("kind", ["remove", "add"])
def test_the_highest_scores_go_first_and_random_sets_are_as_large(kind):
    plan = plan_curve(SCORES, [6, 2, 12], kind=kind, method="smda", runs=7, seed=3)
    sets = members(plan)
    assert plan.budgets == (2, 6, 12) and plan.examples == 40 and len(plan.controls) == 7
    for k, name in zip(plan.budgets, plan.chosen, strict=True):
        top = set(BY_SCORE[:k])
        assert sets[name] == (top if kind == "add" else set(IDS) - top)
    for names in plan.controls:
        taken = [sets[n] if kind == "add" else set(IDS) - sets[n] for n in names]
        assert [len(some) for some in taken] == [2, 6, 12]
        assert taken[0] < taken[1] < taken[2]  # nested: more of the same run
    assert len({frozenset(sets[names[1]]) for names in plan.controls}) == 7


def test_random_sets_do_not_depend_on_the_method_nor_on_order():
    one = plan_curve(SCORES, [4, 8], kind="remove", method="a", seed=1)
    other = plan_curve({example: -SCORES[example] for example in IDS[::-1]}, [4, 8], kind="remove", method="b", seed=1)
    assert one.controls == other.controls
    for names in one.controls:
        for name in names:
            assert members(one)[name] == members(other)[name]
    assert not set(one.chosen) & set(other.chosen)


@pytest.mark.parametrize(("kind", "size"), [("remove", 32), ("add", 8)])
def test_random_sets_are_those_of_the_design_random(kind, size):
    plan = plan_curve(SCORES, [4, 8], kind=kind, method="a", runs=6, seed=1)
    drawn = random_subsets(IDS, size, 6, seed=1)
    assert [members(plan)[names[1]] for names in plan.controls] == [set(s) for s in drawn.members]


def test_ties_go_to_the_smaller_id():
    plan = plan_curve(dict.fromkeys("dcba", 1.0), [2], kind="add", method="m")
    assert members(plan)[plan.chosen[0]] == {"a", "b"}


@pytest.mark.parametrize(
    ("scores", "budgets", "runs", "named"),
    [
        (SCORES, [], 5, "budgets"),
        (SCORES, [0, 3], 5, "budgets"),
        (SCORES, [40], 5, "budgets"),
        (SCORES, [3], 4, "random sets"),
        ({**SCORES, "z05": math.nan}, [3], 5, "z05"),
    ],
)
def test_plans_that_make_no_curve_are_refused(scores, budgets, runs, named):
    with pytest.raises(UserError, match=named):
        plan_curve(scores, budgets, kind="remove", method="m", runs=runs)


def outcomes(plan, effects, noise: float, runs: int, prompts: int = 30):
    """Made-up retrainings of a plan: every example adds its effect, to each prompt in a measure of its own."""
    share = np.random.default_rng(0).uniform(0.5, 1.5, prompts)
    members = dict(zip(plan.subsets.names, plan.subsets.members, strict=True))

    def retrained(name, seed):
        rng = np.random.default_rng([seed, len(members[name]), *(int(i[1:]) for i in members[name])])
        return (sum(effects[i] for i in members[name]) + noise * rng.standard_normal()) * share

    method = [[retrained(name, seed) for name in plan.chosen] for seed in range(runs)]
    return np.array(method), np.array([[retrained(name, 0) for name in names] for names in plan.controls])


def test_a_method_that_knows_lowers_the_outcome_and_raises_it_by_addition():
    effects = {example: score / 40 for example, score in SCORES.items()}
    for kind, sign in (("remove", -1), ("add", 1)):
        plan = plan_curve(SCORES, [4, 8, 16], kind=kind, method="m")
        curve = compare_curves(plan, *outcomes(plan, effects, 0.05, 2), draws=500)
        assert (curve.runs, curve.random_runs, curve.prompts) == (2, 5, 30)
        assert sign * curve.area > 0 and curve.p < 0.01
        assert sign * (curve.lo if sign > 0 else curve.hi) > 0
        for point in curve.points:
            assert sign * point.difference > 0 and point.p_holm >= point.p
            assert point.lo < point.difference < point.hi
            assert point.difference == pytest.approx(point.method - point.random)
        worse = plan_curve({p: -s for p, s in SCORES.items()}, [4, 8, 16], kind=kind, method="m")
        assert sign * compare_curves(worse, *outcomes(worse, effects, 0.05, 1), draws=500).area < 0


def test_values_areas_and_correction_by_hand():
    rng = np.random.default_rng(1)
    plan = plan_curve(SCORES, [4, 8, 20], kind="remove", method="m", runs=6)
    method, random = rng.standard_normal((2, 3, 9)), rng.standard_normal((6, 3, 9))
    curve = compare_curves(plan, method, random, draws=200)
    gap = method.mean((0, 2)) - random.mean((0, 2))
    np.testing.assert_allclose([p.difference for p in curve.points], gap)
    np.testing.assert_allclose([p.share for p in curve.points], [0.1, 0.2, 0.5])
    area = np.trapezoid([0, *gap], [0, 0.1, 0.2, 0.5]) / 0.5
    assert curve.area == pytest.approx(area)
    p = sorted(point.p for point in curve.points)
    adjusted = sorted(point.p_holm for point in curve.points)
    assert adjusted[0] == pytest.approx(min(1, 3 * p[0]))


def test_run_noise_is_students_t():
    """With one prompt the interval is that of a t test with the random runs' variance."""
    rng = np.random.default_rng(2)
    random, method = rng.standard_normal((5, 2, 1)), rng.standard_normal((2, 2, 1))
    plan = plan_curve(SCORES, [4, 8], kind="remove", method="m", runs=5)
    curve = compare_curves(plan, method, random, draws=40000)
    for k, point in enumerate(curve.points):
        se = random[:, k, 0].std(ddof=1) * math.sqrt(1 / 2 + 1 / 5)
        half = stats.t.ppf(0.975, 4) * se
        assert point.hi - point.difference == pytest.approx(half, rel=0.05)
        assert point.difference - point.lo == pytest.approx(half, rel=0.05)
        wanted = 2 * stats.t.sf(abs(point.difference) / se, 4)
        assert point.p == pytest.approx(wanted, abs=0.02)


def test_a_method_by_chance_is_no_better_than_chance():
    """Intervals of the area hold 0 in 95% of 200 cases: 181 to 199 with probability .999.

    Few prompts and few runs, so that neither source of noise can be left out unnoticed.
    """
    rng, held = np.random.default_rng(3), 0
    plan = plan_curve(SCORES, [4, 8], kind="remove", method="m", runs=5)
    for seed in range(200):
        runs = rng.standard_normal((6, 2, 1)) + 0.5 * rng.standard_normal((6, 1, 1))
        prompts = 8 * rng.standard_normal((1, 1, 25))  # of the difference between the two sides
        table = runs + rng.standard_normal((6, 2, 25)) * 0.1
        curve = compare_curves(plan, table[:1] + prompts, table[1:], draws=300, seed=seed)
        held += curve.lo <= 0 <= curve.hi
    assert 181 <= held <= 199
