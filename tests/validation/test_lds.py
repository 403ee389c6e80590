"""LDS and what goes beside it, against scipy, other formulas and simulations."""

from __future__ import annotations

import math
from itertools import pairwise, permutations

import numpy as np
import pytest
from scipy import stats
from sklearn.metrics import roc_auc_score

from taught.errors import UserError
from taught.validation.lds import (
    auc,
    bca,
    differences,
    explained_by_trivial,
    holm,
    lds_rows,
    noise_ceiling,
    p_values,
    partial_spearman,
    precision_at_k,
    predicted,
    rank_correlations,
    table_of,
)
from taught.validation.subsets import Subsets, random_subsets, summed


def confounded(rng, rows: int, other: float = 0.4, covariates: int = 3):
    """Two predictors a and b of y, and covariates that all of them share."""
    c = rng.standard_normal((covariates, rows))
    truth = rng.standard_normal(rows)
    y = truth + c[0] + 0.3 * c[1] + 0.2 * rng.standard_normal(rows)
    a = truth + 0.8 * c[0] + 0.4 * rng.standard_normal(rows)
    b = truth + 0.2 * c[0] + other * rng.standard_normal(rows)
    return a, b, y, c


# --- correlations ---------------------------------------------------------------------------------


def test_plain_correlations_are_scipys():
    a, b, y, _ = confounded(np.random.default_rng(0), 37)
    a = np.round(a)  # ties
    found = rank_correlations([a, b, -b], y, draws=3).values
    wanted = [stats.spearmanr(x, y).statistic for x in (a, b, -b)]
    np.testing.assert_allclose(found, wanted, rtol=1e-12)


def by_inverse(a, b, covariates) -> float:
    """Partial correlation of ranks by the inverse of their correlation matrix."""
    rows = np.array([stats.rankdata(x) for x in (a, b, *covariates)])
    P = np.linalg.inv(np.corrcoef(rows))
    return -P[0, 1] / math.sqrt(P[0, 0] * P[1, 1])


def by_residuals(a, b, covariates) -> float:
    """The same by residuals of least squares on the ranked covariates."""
    H = np.stack([np.ones(len(a)), *(stats.rankdata(x) for x in covariates)], 1)
    left = []
    for x in (a, b):
        r = stats.rankdata(x)
        left.append(r - H @ np.linalg.lstsq(H, r, rcond=None)[0])
    return float(np.corrcoef(left)[0, 1])


@pytest.mark.parametrize("rounded", [False, True])
def test_partial_correlations_by_two_other_formulas(rounded):
    a, _, y, c = confounded(np.random.default_rng(1), 41)
    if rounded:
        a, c = np.round(a), np.round(2 * c)
    found = partial_spearman(a, y, c)
    assert found == pytest.approx(by_inverse(a, y, c), rel=1e-10)
    assert found == pytest.approx(by_residuals(a, y, c), rel=1e-10)
    assert partial_spearman(a, y, np.zeros((0, 41))) == pytest.approx(stats.spearmanr(a, y).statistic)


def test_controls_that_say_nothing_new_change_nothing():
    a, _, y, c = confounded(np.random.default_rng(2), 30)
    wanted = partial_spearman(a, y, c)
    constant = np.full(30, 7.0)
    assert partial_spearman(a, y, [*c, constant, c[0], -2 * c[1]]) == pytest.approx(wanted)


def test_nothing_left_is_nan():
    a, _, y, c = confounded(np.random.default_rng(3), 30)
    assert math.isnan(partial_spearman(c[0], y, c))  # the predictor is one of the controls
    assert math.isnan(partial_spearman(np.ones(30), y, c))
    assert math.isnan(partial_spearman(a[:5], y[:5], c[:, :5]))  # as many unknowns as rows
    interval = bca(rank_correlations([c[0]], y, c, draws=50))[0]
    assert all(map(math.isnan, interval))


# --- resampling -----------------------------------------------------------------------------------


def test_draws_are_correlations_of_resampled_rows():
    a, b, y, c = confounded(np.random.default_rng(4), 25)
    made = rank_correlations([a, b], y, c, draws=300, seed=9)
    counts = np.random.default_rng(9).multinomial(25, np.full(25, 1 / 25), size=300)
    for draw in (0, 7, 260, 299):  # on both sides of a chunk's end
        rows = np.repeat(np.arange(25), counts[draw])
        for k, x in enumerate((a, b)):
            wanted = by_residuals(x[rows], y[rows], c[:, rows])
            assert made.draws[draw, k] == pytest.approx(wanted, rel=1e-9)
    for row in (0, 24):
        keep = np.delete(np.arange(25), row)
        wanted = by_residuals(a[keep], y[keep], c[:, keep])
        assert made.left_out[row, 0] == pytest.approx(wanted, rel=1e-9)


def test_intervals_are_scipys_bca():
    a, _, y, _ = confounded(np.random.default_rng(5), 40)
    (ours,) = bca(rank_correlations([a], y, draws=9000))
    theirs = stats.bootstrap(
        (a, y),
        lambda u, v: stats.spearmanr(u, v).statistic,
        paired=True,
        vectorized=False,
        n_resamples=2000,
        method="BCa",
        rng=np.random.default_rng(0),
    ).confidence_interval
    assert ours.value == pytest.approx(stats.spearmanr(a, y).statistic)
    assert ours.lo == pytest.approx(theirs.low, abs=0.02)
    assert ours.hi == pytest.approx(theirs.high, abs=0.01)
    assert ours.hi - ours.value < ours.value - ours.lo  # skewed: the correlation cannot exceed 1


def test_intervals_hold_the_truth_as_often_as_they_say():
    """95% of 200: between 181 and 199 with probability .999; raw, partial, difference."""
    many = np.random.default_rng(6)
    a, b, y, c = confounded(many, 20000, other=1.0)
    sample = slice(0, 4000)
    raw = [stats.spearmanr(x, y).statistic for x in (a, b)]
    controlled = by_inverse(a[sample], y[sample], c[:, sample])
    rng, hits = np.random.default_rng(7), np.zeros(3)
    for seed in range(200):
        a, b, y, c = confounded(rng, 42, other=1.0)
        plain = rank_correlations([a, b], y, draws=400, seed=seed)
        gap = plain.map(lambda x: x[..., :1] - x[..., 1:])
        given = rank_correlations([a], y, c, draws=400, seed=seed)
        for k, (made, truth) in enumerate(((plain, raw[0]), (gap, raw[0] - raw[1]), (given, controlled))):
            interval = bca(made)[0]
            hits[k] += interval.lo <= truth <= interval.hi
    assert (hits >= 181).all() and (hits <= 199).all()


def test_p_says_what_the_interval_says():
    rng = np.random.default_rng(8)
    below = 0
    for seed in range(60):
        y = rng.standard_normal(30)
        made = rank_correlations([rng.standard_normal(30) + 0.35 * y], y, draws=500, seed=seed)
        (interval,), p = bca(made), float(p_values(made)[0])
        if abs(p - 0.05) > 0.01:  # quantiles of 500 draws are that coarse
            assert (p < 0.05) == (not interval.lo <= 0 <= interval.hi)
        below += p < 0.05
    assert 10 < below < 50


def test_p_is_right_under_the_null():
    rng = np.random.default_rng(10)
    small = sum(
        float(p_values(rank_correlations([rng.standard_normal(40)], rng.standard_normal(40), draws=300, seed=seed))[0])
        < 0.05
        for seed in range(300)
    )
    assert 4 <= small <= 30  # 15 expected


def test_holm_by_hand():
    np.testing.assert_allclose(holm([0.01, 0.04, 0.03, 0.005]), [0.03, 0.06, 0.06, 0.02])
    np.testing.assert_allclose(holm([0.5, 0.9]), [1.0, 1.0])
    assert holm([]).size == 0


# --- tables ---------------------------------------------------------------------------------------

IDS = [f"z{i:02d}" for i in range(40)]


def world(seed: int = 0, subsets: int = 60, noise: float = 0.3):
    """Examples whose effect is mostly their length, and partly their own; subsets and outcomes."""
    rng = np.random.default_rng(seed)
    length = rng.integers(5, 80, 40).astype(float)
    own = rng.standard_normal(40)
    effect = -length / 20 + own
    made = random_subsets(IDS, 20, subsets, seed=seed)
    of = {
        "length": dict(zip(IDS, length, strict=True)),
        "good": dict(zip(IDS, effect + 0.3 * rng.standard_normal(40), strict=True)),
        "other": dict(zip(IDS, effect + 1.5 * rng.standard_normal(40), strict=True)),
        "chance": dict(zip(IDS, rng.standard_normal(40), strict=True)),
    }
    truth = summed(made, dict(zip(IDS, effect, strict=True)))
    values = truth + noise * rng.standard_normal(subsets)
    return made, dict(zip(made.names, values.tolist(), strict=True)), of


def table(made, outcome, of, **options):
    scores = {name: {"mean_y": values} for name, values in of.items()}
    controls = {"response tokens": of["length"]}
    rows = lds_rows(made, {"mean_y": outcome}, scores, controls, design="random", draws=400, **options)
    return {row.method: row for row in rows}


def test_raw_and_controlled_stand_side_by_side():
    made, outcome, of = world()
    rows = table(made, outcome, of)
    y = [outcome[name] for name in made.names]
    for name, row in rows.items():
        x = summed(made, of[name])
        assert (row.target, row.subsets, row.n) == ("mean_y", "random", 60)
        assert row.controls == "response tokens"
        assert row.raw == pytest.approx(stats.spearmanr(x, y).statistic)
        assert row.raw_lo < row.raw < row.raw_hi
        if name != "length":
            controlled = by_residuals(x, y, [summed(made, of["length"])])
            assert row.controlled == pytest.approx(controlled)
            assert row.controlled_lo < row.controlled < row.controlled_hi
    assert rows["length"].raw < -0.5 and math.isnan(rows["length"].controlled)
    assert rows["good"].raw > 0.9 and rows["good"].controlled_lo > 0.5
    assert rows["chance"].controlled_lo < 0 < rows["chance"].controlled_hi


def test_no_order_of_ids_or_subsets_matters():
    made, outcome, of = world()
    turned = Subsets(made.names[::-1], tuple(m[::-1] for m in made.members[::-1]), made.inclusion)
    mixed = {name: dict(reversed(values.items())) for name, values in of.items()}
    wanted, found = table(made, outcome, of), table(turned, outcome, mixed)
    for name, row in wanted.items():
        for field in ("raw", "raw_lo", "raw_hi", "controlled", "controlled_lo"):
            ours, theirs = getattr(row, field), getattr(found[name], field)
            assert ours == pytest.approx(theirs, rel=1e-9, nan_ok=True)


def test_without_controls_the_controlled_value_is_missing():
    made, outcome, of = world()
    (row,) = lds_rows(made, {"t": outcome}, {"m": {"t": of["good"]}}, {}, design="d", draws=50)
    assert math.isnan(row.controlled) and row.controls == ""


def test_a_method_has_rows_for_its_targets_only():
    made, outcome, of = world()
    scores = {"m": {"t": of["good"]}, "n": {"t": of["other"], "u": of["other"]}}
    rows = lds_rows(made, {"t": outcome, "u": outcome, "v": outcome}, scores, {}, design="d", draws=20)
    assert [(row.method, row.target) for row in rows] == [("m", "t"), ("n", "t"), ("n", "u")]


def test_differences_are_paired_and_corrected_together():
    made, outcome, of = world()
    scores = {name: {"mean_y": values, "same": values} for name, values in of.items()}
    comparisons = [("good", "other"), ("other", "good"), ("good", "good")]
    outcomes = {"mean_y": outcome, "same": outcome}
    rows = differences(made, outcomes, scores, comparisons, design="random", draws=500)
    assert len(rows) == 6
    up, down, none = rows[:3]
    wanted = table(made, outcome, of)
    assert up.value == pytest.approx(wanted["good"].raw - wanted["other"].raw)
    assert down.value == pytest.approx(-up.value) and up.lo > 0 > down.hi
    assert down.lo == pytest.approx(-up.hi, rel=0.05)
    assert (none.value, none.lo, none.hi, none.p_holm) == (0, 0, 0, 1)
    assert [row.p_holm for row in rows] == holm([row.p for row in rows]).tolist()
    assert up.p < 0.01
    (row,) = differences(
        made, {"mean_y": outcome}, scores, comparisons[:1], {"tokens": of["length"]}, design="random", draws=100
    )
    assert row.controlled
    assert row.value == pytest.approx(wanted["good"].controlled - wanted["other"].controlled)


def test_a_difference_of_two_like_methods_is_known_better_than_either():
    made, outcome, of = world()
    near = {example: value + 0.05 * (-1) ** i for i, (example, value) in enumerate(of["other"].items())}
    scores = {"other": {"t": of["other"]}, "near": {"t": near}}
    (row,) = differences(made, {"t": outcome}, scores, [("other", "near")], design="d", draws=400)
    (own, _) = lds_rows(made, {"t": outcome}, scores, {}, design="d", draws=400)
    assert 0 < row.hi - row.lo < 0.3 * (own.raw_hi - own.raw_lo)


def test_a_trivial_predictor_that_explains_as_much_is_called_out():
    made, outcome, of = world()
    scores = {name: {"mean_y": of[name]} for name in ("good", "chance", "length")}
    trivial = {"length": of["length"], "chance": of["chance"]}
    checks = explained_by_trivial(made, {"mean_y": outcome}, scores, trivial, design="random", draws=400)
    found = {(check.method, check.trivial): check for check in checks}
    assert len(found) == 6
    assert not found["good", "length"].explained and found["good", "length"].lo > 0
    assert found["good", "length"].trivial_lds < 0 < found["good", "length"].value
    assert not found["good", "chance"].explained
    assert found["chance", "length"].explained and found["chance", "length"].hi < 0
    assert found["length", "length"].explained and found["length", "length"].value == 0
    noisy = world(noise=20.0)
    checks = explained_by_trivial(noisy[0], {"mean_y": noisy[1]}, scores, trivial, design="random", draws=400)
    assert checks[0].method == "good" and checks[0].trivial == "length"
    assert checks[0].explained and checks[0].lo < 0 < checks[0].hi  # not shown to be better


def test_sum_and_mean_differ_where_sizes_do():
    made = Subsets(("s", "t"), (("a",), ("a", "b", "c")), {})
    scores = {"a": 2.0, "b": 1.0, "c": 0.0}
    assert predicted(made, scores).tolist() == [2.0, 3.0]
    assert predicted(made, scores, how="mean").tolist() == [2.0, 1.0]
    with pytest.raises(UserError):
        predicted(made, scores, how="median")


def test_missing_outcomes_and_scores_are_named():
    made, outcome, of = world()
    gone = {name: value for name, value in outcome.items() if name != made.names[3]}
    with pytest.raises(UserError, match=made.names[3]):
        table(made, gone, of)
    with pytest.raises(UserError, match=made.names[0]):
        table(made, {**outcome, made.names[0]: math.nan}, of)
    del of["good"]["z07"]
    with pytest.raises(UserError, match="z07"):
        table(made, outcome, of)


def test_rows_become_a_table():
    made, outcome, of = world()
    rows = list(table(made, outcome, of).values())
    arrow = table_of(rows)
    assert arrow.column_names[:5] == ["method", "target", "subsets", "n", "raw"]
    assert [str(kind) for kind in arrow.schema.types[:5]] == [*["string"] * 3, "int64", "double"]
    records = arrow.to_pylist()
    assert records[0]["method"] == "length" and records[0]["controlled"] is None
    assert records[1]["raw"] == rows[1].raw
    with pytest.raises(ValueError, match="at least one row"):
        table_of([])


# --- noise ceiling --------------------------------------------------------------------------------


def test_two_seeds_are_split_halves():
    made, outcome, _ = world()
    rng = np.random.default_rng(1)
    seeds = [{n: v + rng.standard_normal() for n, v in outcome.items()} for _ in range(2)]
    found = noise_ceiling(made, {"0": seeds[0], "1": seeds[1]}, draws=200)
    r = stats.spearmanr(*([s[n] for n in made.names] for s in seeds)).statistic
    assert found.between_seeds == pytest.approx(r)
    assert found.reliability == pytest.approx(2 * r / (1 + r))
    assert found.ceiling == pytest.approx(math.sqrt(2 * r / (1 + r)))
    assert found.lo < found.ceiling < found.hi <= 1


@pytest.mark.parametrize("seeds", [2, 4])
def test_the_ceiling_is_what_the_noiseless_outcome_reaches(seeds):
    rng = np.random.default_rng(2)
    ids = [f"s{i:04d}" for i in range(700)]
    made = Subsets(tuple(ids), tuple(("a",) for _ in ids), {"a": 1.0})
    truth = rng.standard_normal(700)
    runs = truth + 1.2 * rng.standard_normal((seeds, 700))
    outcomes = {str(i): dict(zip(ids, run.tolist(), strict=True)) for i, run in enumerate(runs)}
    found = noise_ceiling(made, outcomes, draws=20)
    assert found.seeds == seeds
    assert found.ceiling == pytest.approx(stats.spearmanr(truth, runs.mean(0)).statistic, abs=0.04)


def test_seeds_that_disagree_leave_no_ceiling():
    made, outcome, _ = world()
    against = {name: -value for name, value in outcome.items()}
    found = noise_ceiling(made, {"0": outcome, "1": against}, draws=50)
    assert found.between_seeds == pytest.approx(-1) and found.ceiling == 0
    with pytest.raises(UserError, match="several seeds"):
        noise_ceiling(made, {"0": outcome})


# --- planted rows ---------------------------------------------------------------------------------


def planted_scores(rng, shift: float, planted: int = 30, others: int = 200):
    values = [*(shift + rng.standard_normal(planted)), *rng.standard_normal(others)]
    scores = {f"z{i:03d}": float(v) for i, v in enumerate(values)}
    return scores, {f"z{i:03d}" for i in range(planted)}


@pytest.mark.parametrize("digits", [6, 0])
def test_auc_is_scikit_learns(digits):
    scores, planted = planted_scores(np.random.default_rng(0), 1.0)
    scores = {i: round(v, digits) for i, v in scores.items()}
    found = auc(scores, planted)
    wanted = roc_auc_score([i in planted for i in scores], list(scores.values()))
    assert found.value == pytest.approx(wanted, rel=1e-12)
    assert found.lo < found.value < found.hi
    assert (found.planted, found.others) == (30, 200)
    assert auc(dict(reversed(scores.items())), planted) == found


def test_auc_intervals_solve_their_equation():
    scores, planted = planted_scores(np.random.default_rng(1), 1.0, 12, 25)
    found = auc(scores, planted)
    for edge in (found.lo, found.hi):
        middle = (12 + 25) / 2 - 1
        spread = 1 + middle * ((1 - edge) / (2 - edge) + edge / (1 + edge))
        variance = edge * (1 - edge) * spread / (12 * 25)
        assert (edge - found.value) ** 2 == pytest.approx(stats.norm.ppf(0.975) ** 2 * variance)


@pytest.mark.parametrize("shift", [0.0, 1.0, 3.3])
def test_auc_intervals_hold_the_truth(shift):
    """95% or more of 300, also near 1, where DeLong's do in 80% of the cases."""
    rng, truth = np.random.default_rng(2), stats.norm.cdf(shift / math.sqrt(2))
    found = [auc(*planted_scores(rng, shift)) for _ in range(300)]
    assert sum(some.lo <= truth <= some.hi for some in found) >= 272


def test_groups_that_are_apart_still_have_an_interval():
    scores = {"a": 3.0, "b": 2.0, "c": 1.0, "d": 0.0}
    up, down = auc(scores, {"a", "b"}), auc(scores, {"c", "d"})
    assert (up.value, up.hi) == (1, 1) and 0.3 < up.lo < 0.9
    assert (down.value, down.lo) == (0, 0) and down.hi == pytest.approx(1 - up.lo)
    level = auc(dict.fromkeys("abcd", 1.0), {"a"})
    assert level.value == 0.5 and level.lo < 0.5 < level.hi


def test_precision_counts_ties_as_every_order_of_them_would():
    scores = {"a": 5.0, "b": 4.0, "c": 4.0, "d": 4.0, "e": 1.0}
    planted = {"a", "c", "e"}
    for k in range(1, 6):
        orders = [order for order in permutations(scores) if all(scores[x] >= scores[y] for x, y in pairwise(order))]
        wanted = np.mean([len(planted & set(order[:k])) / k for order in orders])
        assert precision_at_k(scores, planted, k) == pytest.approx(wanted)


@pytest.mark.parametrize(
    ("scores", "planted", "named"),
    [
        ({"a": 1.0, "b": 2.0}, {"c"}, "c"),
        ({"a": 1.0, "b": math.nan}, {"a"}, "b"),
        ({"a": 1.0, "b": 2.0}, set(), "0 planted"),
        ({"a": 1.0, "b": 2.0}, {"a", "b"}, "2 planted"),
    ],
)
def test_planted_rows_that_cannot_be_judged_are_named(scores, planted, named):
    for ask in (auc, lambda s, p: precision_at_k(s, p, 1)):
        with pytest.raises(UserError, match=named):
            ask(scores, planted)


def test_k_must_be_a_number_of_ids():
    for k in (0, 3):
        with pytest.raises(UserError, match="number of ids"):
            precision_at_k({"a": 1.0, "b": 2.0}, {"a"}, k)
