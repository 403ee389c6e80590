"""LDS and what goes beside it, against scipy, other formulas and simulations."""

from __future__ import annotations

import math

import numpy as np
import pytest
from scipy import stats

from taught.errors import UserError
from taught.stats.multiplicity import holm
from taught.validation.lds import differences, explained_by_trivial, lds_rows, noise_ceiling, table_of
from taught.validation.subsets import Subsets, random_subsets, summed


def by_residuals(a, b, covariates) -> float:
    """The same by residuals of least squares on the ranked covariates."""
    H = np.stack([np.ones(len(a)), *(stats.rankdata(x) for x in covariates)], 1)
    left = []
    for x in (a, b):
        r = stats.rankdata(x)
        left.append(r - H @ np.linalg.lstsq(H, r, rcond=None)[0])
    return float(np.corrcoef(left)[0, 1])


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
