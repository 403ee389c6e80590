"""Shares of response tokens, as the stage ``attribute`` writes them into a run."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest

from taught.run.folder import RunFolder
from taught.study.load import load_study
from taught.study.schema import Study
from tiny_study import SCORED, do, with_values, write_tiny_study


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> Study:
    study = load_study(write_tiny_study(tmp_path_factory.mktemp("tiny")))
    return with_values(study, {"prompts.limit": 12, "attribution.exact_top": 2})


@pytest.fixture(scope="module")
def run(study, tmp_path_factory) -> RunFolder:
    return do(study, tmp_path_factory.mktemp("run"), *SCORED)


def test_shares_of_the_strongest_examples_add_up_to_their_effects(run):
    summary = {row["example_id"]: row for row in run.read_table("summary").to_pylist()}
    table = run.read_table("token_shares").to_pylist()
    top = [example for example, row in summary.items() if row["rank"] <= 2]
    assert {row["example_id"] for row in table} == set(top)
    targets = ("score", "behavior:harmful", "behavior:harmless")
    assert {row["target"] for row in table} == set(targets)
    largest = max(abs(row["share"]) for row in table)
    for example in top:
        for target in targets:
            own = [row for row in table if (row["example_id"], row["target"]) == (example, target)]
            assert [row["position"] for row in own] == list(range(summary[example]["n_scored"]))
            whole = sum(row["share"] for row in own)
            assert whole == pytest.approx(summary[example][target], rel=1e-3, abs=1e-4 * largest)
            assert "".join(row["token"] for row in own).endswith("<|im_end|>")


@pytest.mark.parametrize(
    "changes",
    [
        {"exact_top": 0},
        {"trajectory": {"kind": "checkpoints", "checkpoints": [{"id": "MODEL", "lr": 1e-3}]}},
        {"estimator": {"kind": "sketch", "dim": 1024}, "curvature": "autocorrelation"},
    ],
    ids=["none asked", "several weights", "a curvature of sketches"],
)
def test_shares_are_left_out_where_no_gradient_is_split(study, run, tmp_path: Path, changes):
    shutil.copytree(run.folder, tmp_path / "run")
    for key, value in changes.items():
        if key == "trajectory":
            value = value | {"checkpoints": [{"id": study.model.id, "lr": 1e-3}]}
        study = study.replace(f"attribution.{key}", value)
    again = do(study, RunFolder(tmp_path / "run", fresh=("attribute",)), "attribute")
    assert "token_shares.parquet" not in again.manifest["files"]
    assert not again.path("token_shares.parquet").exists()


def test_finite_steps_have_shares_of_the_gradient(study, run, tmp_path: Path):
    """What is split is the exact first order, whatever estimated the whole."""
    shutil.copytree(run.folder, tmp_path / "run")
    study = study.replace("attribution.estimator", "finite-step")
    again = do(study, RunFolder(tmp_path / "run", fresh=("attribute",)), "attribute")
    key = ("example_id", "target", "position")
    one, two = (
        {tuple(r[k] for k in key): r["share"] for r in of.read_table("token_shares").to_pylist()} for of in (run, again)
    )
    shared = one.keys() & two.keys()
    assert shared
    assert {k: two[k] for k in shared} == pytest.approx({k: one[k] for k in shared}, rel=1e-4, abs=1e-9)
