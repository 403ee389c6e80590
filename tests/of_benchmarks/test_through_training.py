"""Foreseen against measured, from the results of runs without some examples."""

from __future__ import annotations

from itertools import combinations
from pathlib import Path

import numpy as np
import pytest

from taught.core import driver
from taught.core.estimator import Work
from taught.core.target import TargetSet
from taught.progress import SilentProgress
from taught.stages.ready import make_ready, read_data, read_here
from taught.stages.subject import open_subject
from taught.study.load import load_study
from taught.training.loop import in_training
from taught.training.steps import Training
from tiny_study import with_values, write_tiny_study

ROOT = Path(__file__).parents[2]
IDS = [f"z{i:02}" for i in range(12)]
EFFECTS = {"first": dict(zip(IDS, np.random.default_rng(0).standard_normal(12).tolist(), strict=True))}
EFFECTS["second"] = {i: -effect for i, effect in EFFECTS["first"].items()}
CONTROLS = {"label": {i: float(k % 2) for k, i in enumerate(IDS)}}


@pytest.fixture
def tool(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    import benchmarks.through_training

    return benchmarks.through_training


@pytest.fixture
def truth():
    """Runs that lose exactly what the effects of their order say; order 1 has half of the sets, order 2 too few."""
    draw = np.random.default_rng(1)
    several = list(combinations(IDS, 4))
    sets = [list(several[k]) for k in draw.choice(len(several), 20, replace=False)] + [[i] for i in IDS[:4]]
    runs = []
    for order, (name, of) in enumerate([("first", sets), ("second", sets[:10]), ("second", sets[:2])]):
        runs += [
            {"order": order, "left_out": s, "values": [order + 5.0 - sum(EFFECTS[name][i] for i in s)]}
            for s in [[], *of]
        ]
    runs.append({"order": 0, "left_out": IDS[:3], "values": [1.0]})  # one that a method named
    return {"examples": IDS, "targets": ["behavior:a"], "sets": sets, "runs": runs}


def test_what_a_set_did_is_the_change_from_the_whole_run_of_its_order(tool, truth):
    changes = tool.changes
    assert len(changes(truth, "behavior:a")) == 24
    found = changes(truth, "behavior:a", 1)
    assert len(found) == 10
    assert all(change == pytest.approx(-sum(EFFECTS["second"][i] for i in s)) for s, change in found.items())


def test_effects_foresee_their_own_order_and_runs_of_another_stand_beside_them(tool, truth):
    found = {name: {"behavior:a": of} for name, of in EFFECTS.items()}
    rows = {(row["method"], row["order"]): row for row in tool.compared(truth, found, CONTROLS)}
    assert {order for _, order in rows} == {0, 1}
    for order, own in enumerate(EFFECTS):
        other = next(name for name in EFFECTS if name != own)
        assert rows[own, order]["LDS"] == pytest.approx(1) and rows[own, order]["Pearson"] == pytest.approx(1)
        assert rows[other, order]["LDS"] == pytest.approx(-1)
        assert rows[f"order {1 - order}", order]["LDS"] == pytest.approx(-1)
    assert rows["first", 0]["singles"] == pytest.approx(1) and "singles" not in rows["first", 1]


@pytest.mark.parametrize("order", [0, 1])
def test_named_examples_are_compared_with_the_random_sets_of_their_order(tool, truth, order):
    random = [change for s, change in tool.changes(truth, "behavior:a", order).items() if len(s) > 1]
    found = tool.against_random(truth, 1.0, "behavior:a", order)
    assert found["change"] == pytest.approx(1.0 - (5 + order))
    assert found["difference"] == pytest.approx(found["change"] - np.mean(random))
    assert found["lo"] < found["difference"] < found["hi"]
    assert found["random sets"] == len(random) == (20, 10)[order]


def test_errors_are_of_sets_and_of_single_examples_where_there_are_any(tool, truth):
    found = tool.foreseen(truth, "behavior:a", EFFECTS["first"])
    assert (found["sets"], found["singles"]) == (20, 4)
    assert found["sets, Spearman"] == pytest.approx(1) and found["singles, error"] == pytest.approx(0, abs=1e-12)
    truth["sets"] = [s for s in truth["sets"] if len(s) > 1]
    assert "singles" not in tool.foreseen(truth, "behavior:a", EFFECTS["first"])


def test_a_step_from_where_the_run_ends_is_one_from_the_trained_model(tool, tmp_path):
    study = with_values(load_study(write_tiny_study(tmp_path)), {"examples.limit": 6, "validation.batch": 2})
    subject, data = open_subject(study), read_data(study, SilentProgress())
    ready = make_ready(study, subject, data, read_here(study, subject, data.prompts, SilentProgress()))
    targets = TargetSet.of(["behavior:harmless"], ready.readings)
    found, *_ = tool.computed("adjoint@end", ready, targets, None)
    problem = ready.problem
    with in_training(problem.model, problem.recipe, None):
        training = Training(problem.model, ready.inputs, problem.recipe, None)
        with training.ready():
            training.train()
        there = problem.at(problem.model, problem.recipe.lr)
        expected = driver.scores(there, ready.inputs, targets, driver.Method(), Work()).by_example("behavior:harmless")
    assert found["behavior:harmless"] == pytest.approx(expected, rel=1e-5)
    legs = tool.passed(ready, problem.recipe.epochs)[1].values["checkpoints"]
    assert [leg["id"] for leg in legs] == [f"run/{3 * (k + 1)}" for k in range(problem.recipe.epochs)]
