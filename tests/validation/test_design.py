"""Which retraining next: unbiased by enumeration, least variance, couples, and the simulation."""

from __future__ import annotations

import json
import math
from itertools import product
from pathlib import Path

import numpy as np
import pytest
from scipy import stats

from taught.errors import UserError
from taught.validation.design import Round, _Datamodel, ask, couple_effect, couples, draw, estimate, next_probabilities
from taught.validation.subsets import Subsets, random_subsets

IDS = [f"z{i:02d}" for i in range(24)]
ROOT = Path(__file__).parents[2]


def linear(seed: int = 0):
    rng = np.random.default_rng(seed)
    theta = dict(zip(IDS, rng.standard_normal(24).tolist(), strict=True))
    scores = {example: value + 0.3 * rng.standard_normal() for example, value in theta.items()}
    return theta, scores


def outcomes_of(pool: Subsets, theta, noise: float = 0.0, seed: int = 0) -> dict[str, float]:
    rng = np.random.default_rng(seed)
    held = pool.membership(IDS).astype(float) @ [theta[example] for example in IDS]
    values = 50 + held + noise * rng.standard_normal(len(pool))
    return dict(zip(pool.names, values.tolist(), strict=True))


# --- what is asked --------------------------------------------------------------------------------


def test_an_effect_is_the_groups_slope():
    pool = random_subsets(IDS, 12, 80, seed=0)
    theta, _ = linear()
    y = outcomes_of(pool, theta, noise=1.0)
    group = ["z03", "z11", "z20"]
    asked = ask(pool, {"group": group, "example": ["z05"]})
    for row, ids in zip(asked.weights, (group, ["z05"]), strict=True):
        x = pool.membership(IDS)[:, [i in ids for i in IDS]].sum(1)
        slope = np.polyfit(x, [y[name] for name in pool.names], 1)[0]
        value = asked.reference @ (row * [y[name] for name in pool.names])
        assert value == pytest.approx(len(ids) * slope)


def test_an_effect_of_all_subsets_is_the_groups_sum_against_others():
    ids = list("abcdef")
    pool = random_subsets(ids, 3, 20, seed=0)  # every subset of three
    theta = dict(zip(ids, (1.0, -2.0, 0.5, 4.0, 0.0, 0.1), strict=True))
    y = [7 + sum(theta[i] for i in some) for some in pool.members]
    asked = ask(pool, {"g": ["a", "d"]})
    others = np.mean([theta[i] for i in "bcef"])
    assert asked.reference @ (asked.weights[0] * y) == pytest.approx(5.0 - 2 * others)


def test_a_pool_that_says_nothing_about_a_group_is_refused():
    pool = random_subsets(IDS, 12, 5, seed=0)
    with pytest.raises(UserError, match="everything"):
        ask(pool, {"everything": IDS})


# --- probabilities --------------------------------------------------------------------------------


def variance(asked, earlier, p, count) -> float:
    """Sum over effects of the scaled variance, for equal residuals, of the mixture."""
    g = asked.weights / np.sqrt((asked.reference * asked.weights**2).sum(1))[:, None]
    mixture = sum((len(r.drawn) * r.probabilities for r in earlier), start=count * p)
    return float((asked.reference**2 * (g**2).sum(0) / mixture).sum())


@pytest.mark.parametrize("groups", [{"g": IDS[:6]}, {"g": IDS[:6], "h": ["z09"]}])
@pytest.mark.parametrize("before", [0, 4, 40])
def test_no_other_probabilities_have_less_variance(groups, before):
    pool = random_subsets(IDS, 12, 50, seed=0)
    asked = ask(pool, groups)
    earlier = [Round(asked.reference, pool.names[:before])] if before else []
    p = next_probabilities(asked, earlier, 20, mix=0.0)
    assert p.sum() == pytest.approx(1) and (p >= 0).all()
    least = variance(asked, earlier, p + 1e-300, 20)
    rng = np.random.default_rng(1)
    for _ in range(300):
        other = rng.dirichlet(np.full(50, 0.3))
        step = 0.97 * p + 0.03 * other
        assert variance(asked, earlier, step, 20) >= least * (1 - 1e-9)


def test_every_subset_stays_possible():
    pool = random_subsets(IDS, 12, 50, seed=0)
    asked = ask(pool, {"g": IDS[:6]})
    p = next_probabilities(asked, [Round(asked.reference, pool.names[:30])], 10)
    assert p.sum() == pytest.approx(1) and p.min() >= 0.1 / 50 * (1 - 1e-12)


def test_draws_follow_their_probabilities_and_the_seed():
    pool = random_subsets(IDS, 12, 4, seed=0)
    asked = ask(pool, {"g": ["z00"]})
    p = np.array([0.1, 0.2, 0.3, 0.4])
    some = draw(asked, p, 4000, seed=1)
    counts = [some.drawn.count(name) for name in pool.names]
    assert np.abs(np.array(counts) / 4000 - p).max() < 0.03
    assert draw(asked, p, 4000, seed=1).drawn == some.drawn


# --- estimates ------------------------------------------------------------------------------------


@pytest.mark.parametrize("with_scores", [True, False])
def test_the_estimate_is_unbiased_over_every_sequence_of_draws(with_scores):
    """Rounds of four and three draws from three subsets, every one of the 2187 sequences, and an
    outcome that the scores do not explain: the mean estimate is the effect."""
    ids = ["a", "b", "c"]
    pool = Subsets(("s", "t", "u"), (("a", "b"), ("b",), ("a", "c")), dict.fromkeys(ids, 0.5))
    outcome = {"s": 3.0, "t": -1.0, "u": 10.0}
    asked = ask(pool, {"g": ["a", "b"], "h": ["c"]}, np.array([0.5, 0.2, 0.3]))
    scores = {"a": 1.0, "b": -0.5, "c": 2.0} if with_scores else None
    first, second = np.array([0.2, 0.5, 0.3]), next_probabilities(asked, [], 3, mix=0.5)
    mean = np.zeros(2)
    for sequence in product(range(3), repeat=7):
        names = [pool.names[q] for q in sequence]
        rounds = [Round(first, tuple(names[:4])), Round(second, tuple(names[4:]))]
        chance = first[list(sequence[:4])].prod() * second[list(sequence[4:])].prod()
        found = estimate(asked, rounds, outcome, scores, folds=2)
        mean += chance * np.array([effect.value for effect in found])
    truth = asked.weights @ (asked.reference * [outcome[name] for name in pool.names])
    np.testing.assert_allclose(mean, truth, rtol=1e-9)


def test_earlier_rounds_count_with_their_own_probabilities():
    """Unbiased as well where one round is random and the other aimed: by 500 repetitions."""
    pool = random_subsets(IDS, 12, 60, seed=0)
    theta, scores = linear()
    y = outcomes_of(pool, theta, noise=1.0)
    asked = ask(pool, {"g": IDS[:6]})
    truth = float(asked.weights[0] @ (asked.reference * [y[name] for name in pool.names]))
    first = draw(asked, asked.reference, 10, seed=0)
    p = next_probabilities(asked, [first], 10)
    values = []
    for seed in range(500):
        rounds = [draw(asked, asked.reference, 10, seed=seed), draw(asked, p, 10, seed=9000 + seed)]
        values.append(estimate(asked, rounds, y, scores)[0].value)
    assert abs(np.mean(values) - truth) < 3.5 * np.std(values) / math.sqrt(len(values))


def test_scores_and_aimed_draws_shorten_the_interval_and_it_holds():
    theta, scores = linear()
    pool = random_subsets(IDS, 12, 300, seed=0)
    y = outcomes_of(pool, theta, noise=0.7)
    asked = ask(pool, {"g": IDS[:8]})
    truth = float(asked.weights[0] @ (asked.reference * [y[name] for name in pool.names]))
    p = next_probabilities(asked, [], 40)
    width, held = np.zeros(3), 0
    for seed in range(80):
        chance, aimed = draw(asked, asked.reference, 40, seed=seed), draw(asked, p, 40, seed=seed)
        ways = [estimate(asked, [chance], y), estimate(asked, [chance], y, scores), estimate(asked, [aimed], y, scores)]
        width += [effect.hi - effect.lo for (effect,) in ways]
        held += ways[2][0].lo <= truth <= ways[2][0].hi
    assert width[1] < 0.5 * width[0]
    # The best there is for equal residuals is E|g| / sqrt(E g^2) of the length.
    g = asked.weights[0]
    best = np.abs(g).mean() / math.sqrt((g**2).mean())
    assert best * 0.9 < width[2] / width[1] < 0.93
    assert held >= 68  # 95% of 80: at least 68 with probability .9997


def test_an_outcome_that_is_known_needs_no_interval():
    pool = random_subsets(IDS, 12, 40, seed=0)
    theta, _ = linear()
    asked = ask(pool, {"g": ["z01", "z02"]})
    y = outcomes_of(pool, theta)
    (effect,) = estimate(asked, [draw(asked, asked.reference, 20, seed=0)], y, theta)
    truth = asked.weights[0] @ (asked.reference * [y[name] for name in pool.names])
    assert effect.value == pytest.approx(truth) and effect.hi - effect.lo < 1e-6
    assert effect.retrainings <= 20


def test_too_few_draws_and_missing_outcomes_are_refused():
    pool = random_subsets(IDS, 12, 40, seed=0)
    asked = ask(pool, {"g": ["z01"]})
    y = outcomes_of(pool, linear()[0])
    with pytest.raises(UserError, match="too few"):
        estimate(asked, [draw(asked, asked.reference, 9, seed=0)], y)
    some = draw(asked, asked.reference, 20, seed=0)
    with pytest.raises(UserError, match=some.drawn[0]):
        estimate(asked, [some], {**y, some.drawn[0]: math.nan})


def test_the_datamodel_is_the_textbooks():
    """Generalised least squares, BLUP and REML with matrices of full size, on the same grid."""
    pool = random_subsets(IDS, 12, 60, seed=0)
    theta, scores = linear()
    y_of = outcomes_of(pool, {p: theta[p] * 3 for p in IDS}, noise=1.0)
    y = np.array([y_of[name] for name in pool.names[:30]])
    made = _Datamodel(pool, scores)
    M = pool.membership(IDS).astype(float)
    total = M @ [scores[example] for example in IDS]
    H = np.stack([np.ones(60), total], 1)
    H_seen, K = H[:30], M @ M.T

    def solve(scale):
        V = scale * K[:30, :30] + np.eye(30)
        inverse = np.linalg.inv(V)
        beta = np.linalg.solve(H_seen.T @ inverse @ H_seen, H_seen.T @ inverse @ y)
        left = inverse @ (y - H_seen @ beta)
        noise = (y - H_seen @ beta) @ left / 28
        _, a = np.linalg.slogdet(V)
        _, b = np.linalg.slogdet(H_seen.T @ inverse @ H_seen)
        return 28 * math.log(noise) + a + b, H @ beta + scale * K[:, :30] @ left

    P = np.eye(30) - H_seen @ np.linalg.pinv(H_seen)
    mean = np.trace(P @ K[:30, :30] @ P) / 28  # of the eigenvalues that are not 0 by projection
    grid = [solve(ratio / mean) for ratio in [0.0, *np.logspace(-3, 3, 13)]]
    best = min(range(len(grid)), key=lambda i: grid[i][0])
    assert 0 < best < len(grid) - 1
    np.testing.assert_allclose(made.predict(np.arange(30), y), grid[best][1], rtol=1e-8)


def test_a_datamodel_of_few_outcomes_is_their_mean():
    pool = random_subsets(IDS, 12, 8, seed=0)
    made = _Datamodel(pool, linear()[1])
    np.testing.assert_allclose(made.predict(np.array([1, 4]), np.array([2.0, 5.0])), 3.5)


# --- couples --------------------------------------------------------------------------------------


def test_couples_share_their_background():
    made = couples(IDS[::-1], "planted", ["z04", "z07"], 9, 6, seed=2)
    sets = dict(zip(made.subsets.names, map(set, made.subsets.members), strict=True))
    assert len(made.subsets) == 12 and len(made.without) == 6
    for left, right in zip(made.without, made.including, strict=True):
        assert sets[right] - sets[left] == {"z04", "z07"} and sets[left] < sets[right]
        assert len(sets[left]) == 9
    assert made.subsets.membership(IDS).mean(0)[4] == made.subsets.inclusion["z04"] == 0.5
    assert couples(IDS, "planted", ["z07", "z04"], 9, 6, seed=2).subsets.members == (made.subsets.members)


def test_a_couples_effect_is_a_paired_t_interval():
    made = couples(IDS, "g", IDS[:3], 9, 8, seed=0)
    theta, _ = linear()
    y = outcomes_of(made.subsets, theta, noise=0.4)
    found = couple_effect(made, y)
    left, right = ([y[n] for n in names] for names in (made.without, made.including))
    wanted = stats.ttest_rel(right, left).confidence_interval()
    assert found.value == pytest.approx(np.mean(right) - np.mean(left))
    assert (found.lo, found.hi) == pytest.approx((wanted.low, wanted.high), rel=1e-9)
    assert found.retrainings == 16 and found.asked == "g"
    exact = couple_effect(made, outcomes_of(made.subsets, theta))
    assert exact.value == pytest.approx(sum(theta[example] for example in IDS[:3]))


def test_couples_that_cannot_be_made_or_read_are_refused():
    with pytest.raises(UserError, match="unknown"):
        couples(IDS, "g", ["z99"], 9, 3, seed=0)
    made = couples(IDS, "g", ["z00"], 9, 3, seed=0)
    y = outcomes_of(made.subsets, linear()[0])
    del y[made.without[1]]
    with pytest.raises(UserError, match=made.without[1]):
        couple_effect(made, y)
    with pytest.raises(UserError, match="too few couples"):
        couples(IDS, "g", ["z00"], 9, 1, seed=0)


# --- the simulation -------------------------------------------------------------------------------


def test_the_benchmark_runs_and_says_what_is_saved(tmp_path, python):
    done = python(
        "-m",
        "benchmarks.design",
        "--repetitions",
        "3",
        "--examples",
        "40",
        "--planted",
        "8",
        "--pool",
        "60",
        "--counts",
        "12",
        "24",
        "--accuracy",
        "0.9",
        "--noise",
        "0.1",
        "--out",
        str(tmp_path),
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    record = json.loads((tmp_path / "design.json").read_text())
    assert record["complete"] and len(record["rows"]) == 10
    rows = {(row["group"], row["way"]): row for row in record["rows"]}
    for group in (1, 8):
        assert rows[group, "random"]["share_of_random"] == 1
        assert rows[group, "couples"]["half_width"] < rows[group, "random"]["half_width"]
        assert [b["retrainings"] for b in rows[group, "couples"]["budgets"]] == [12, 24]
