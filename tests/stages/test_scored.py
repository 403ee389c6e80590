"""Reading a run's scores by target and method: what curate, clusters and the report go by."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest

from taught.core.point import Point
from taught.errors import UserError
from taught.features.concept import Concept, save_concept
from taught.run.folder import RunFolder
from taught.stages.scored import default_target, read_scores, read_shifts, run_targets
from taught.study.load import load_study
from tiny_study import READ, do, values_of, with_values, write_tiny_study
from tiny_study import WIDTH as STUDY_WIDTH

OWN, FILTER = "adjoint", "vector-filter"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run with a concept whose name has a colon, by the run's own method and by one that is no influence."""
    folder = tmp_path_factory.mktemp("scored")
    v = np.random.default_rng(3).normal(size=STUDY_WIDTH)
    save_concept(Concept("other", v, Point(1)), folder / "c")
    study = with_values(
        load_study(write_tiny_study(folder)),
        {
            "prompts.limit": 12,
            "concepts": [{"name": "c:d", "path": str(folder / "c")}],
            "attribution.concept_methods": [FILTER],
        },
    )
    do(study, folder / "run", *READ, "concepts", "attribute")
    return folder / "run"


@pytest.fixture
def run(made: Path, tmp_path: Path) -> RunFolder:
    """A copy that a test may change; the study's files stay where they were."""
    return RunFolder.open(shutil.copytree(made, tmp_path / "run"))


def curated(run: RunFolder, **changes) -> list[dict]:
    study = with_values(run.study, {f"curation.{key}": value for key, value in changes.items()})
    return do(study, run, "curate").read_table("curation").to_pylist()


@pytest.mark.parametrize(("method", "by"), [(None, OWN), (OWN, OWN), (FILTER, FILTER)])
def test_values_are_joined_by_example_id(run: RunFolder, method: str | None, by: str) -> None:
    found = read_scores(run, ["concept:c:d"], method)
    ids = run.read_table("summary", ["example_id"])["example_id"].to_pylist()
    expected = values_of(run, "concept:c:d", by)
    assert found.example_ids == tuple(ids) and found.method == by and found.se is None
    assert found["concept:c:d"].tolist() == [expected[i] for i in ids]
    assert found.influence == (by == OWN)


def test_values_do_not_depend_on_the_order_of_the_table(run: RunFolder, monkeypatch) -> None:
    names = ["concept:c:d", "score", "behavior:harmful - behavior:harmless"]
    ids = run.read_table("summary", ["example_id"])["example_id"].to_pylist()
    before, shifts = read_scores(run, names), dict(read_shifts(run, ids))
    real = RunFolder.read_parts

    def reversed_parts(*given):
        for part in reversed(list(real(*given))):
            yield part.take(list(reversed(range(len(part)))))

    monkeypatch.setattr(RunFolder, "read_parts", reversed_parts)
    np.testing.assert_array_equal(read_scores(run, names).values, before.values)
    again = dict(read_shifts(run, ids))
    assert shifts.keys() == again.keys() and len(shifts) == len(run.read_table("coefficients"))
    for feature, shift in shifts.items():
        np.testing.assert_array_equal(again[feature], shift)
        expected = values_of(run, f"coefficient:{feature}")
        assert shift.tolist() == [expected[i] for i in ids]


def test_a_run_says_which_targets_it_has(run: RunFolder) -> None:
    few = ["score", "score:x", "score:y", "behavior:harmful", "behavior:harmless", "concept:c:d"]
    assert run_targets(run) == few and default_target(run) == "score"
    d = len(run.read_table("coefficients"))
    assert len(run_targets(run, many=True)) == len(few) + 3 * d


@pytest.mark.parametrize(("rule", "highest"), [("top-k", True), ("keep-k", False)])
@pytest.mark.parametrize("method", [None, FILTER])
def test_examples_are_dropped_by_a_concept(run: RunFolder, rule: str, highest: bool, method: str | None):
    rows = curated(run, rule=rule, k=3, target="concept:c:d", method=method)
    values = values_of(run, "concept:c:d", method or OWN)
    order = sorted(values, key=lambda i: (-values[i] if highest else values[i], i))
    kept = "drop" if highest else "keep"
    assert {row["example_id"] for row in rows if row["action"] == kept} == set(order[:3])
    assert all(row["score"] == values[row["example_id"]] for row in rows)
    record = run.read_json("curation")
    dropped = [row["example_id"] for row in rows if row["action"] == "drop"]
    expected = -sum(values[i] for i in dropped) if method is None else None
    assert record["method"] == (method or OWN)
    assert record["change"] == (None if expected is None else pytest.approx(expected))
    lines = run.read_text("drop.jsonl").splitlines()
    assert [json.loads(line)["id"] for line in lines] == dropped


def test_a_concept_can_be_protected_and_protect_others(run: RunFolder) -> None:
    influence = values_of(run, "concept:c:d", OWN)
    rows = curated(run, rule="top-k", k=8, target="behavior:harmless", protect="concept:c:d")
    dropped = {r["example_id"] for r in rows if r["action"] == "drop"}
    assert dropped == {i for i, value in influence.items() if value <= 0}
    curated(run, rule="keep-k", k=1, target="concept:c:d", protect="score")
    assert run.read_json("curation")["protected_change"] >= 0


def test_clusters_of_a_concept_and_of_all_targets(run: RunFolder) -> None:
    study = run.study.replace("clusters.target", "concept:c:d")
    do(study, run, "clusters")
    values = values_of(run, "concept:c:d", OWN)
    members = run.read_table("cluster_members").to_pylist()
    for row in run.read_table("cluster_influence").to_pylist():
        assert row["target"] == "concept:c:d"
        own = [values[m["example_id"]] for m in members if m["cluster"] == row["cluster"]]
        assert row["mean"] == pytest.approx(np.mean(own))
    do(study.replace("clusters.target", None), run, "clusters")
    asked = {row["target"] for row in run.read_table("cluster_influence").to_pylist()}
    assert asked == {"score", "behavior:harmful", "behavior:harmless", "concept:c:d"}


@pytest.mark.parametrize(
    ("target", "method"),
    [("concept:nobody", None), ("behavior:nobody", None), ("concept:c:d", "projection-difference-response")],
)
def test_other_names_are_refused_with_those_there_are(run: RunFolder, target: str, method: str | None):
    with pytest.raises(UserError, match="no values of this target") as error:
        curated(run, rule="top-k", k=2, target=target, method=method)
    for said in (target, "concept:c:d", "behavior:harmless", OWN, FILTER):
        assert said in str(error.value)


def test_the_command_says_that_a_projection_predicts_no_change(run: RunFolder, taught_here) -> None:
    flags = ["--rule", "top-k", "--k", "2", "--target", "concept:c:d", "--method", FILTER]
    done = taught_here("curate", str(run.folder), *flags)
    assert done.returncode == 0, done.stderr
    assert "predict no change" in done.stdout and "Predicted change" not in done.stdout
    do(RunFolder.open(run.folder).study, run, "report")
    assert "concept:c:d" in run.read_text("report.html")
