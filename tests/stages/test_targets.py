"""Ranking a run's examples by concepts: curate and clusters, and what stands in the way."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from taught.stages.concept_influence import ConceptQuestion
from taught.stages.targets import read_targets

from taught import stages
from taught.errors import UserError
from taught.features.concept import Concept, save_concept
from taught.run.folder import RunFolder
from taught.study.load import load_study
from taught.study.schema import Study
from tiny_study import BLOCK, write_tiny_study
from tiny_study import WIDTH as STUDY_WIDTH

METHODS = ("gradient", "vector-filter")


def ask(study: Study, run: RunFolder, folder: Path, methods: tuple[str, ...] = METHODS) -> None:
    question = ConceptQuestion((folder / "c",), methods, responses=folder / "own.json")
    stages.concept_influence(study, question, run=run)


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("targets")
    study = load_study(write_tiny_study(folder))
    run = RunFolder(folder / "run")
    stages.policy(study, run)
    stages.attribute(study, run)
    v = np.random.default_rng(3).normal(size=STUDY_WIDTH)
    save_concept(Concept("c:d", v, BLOCK), folder / "c")  # a name with a colon
    ask(study, run, folder)
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A copy that a test may change; the study's files stay where they were."""
    shutil.copytree(made / "run", tmp_path / "run")
    shutil.copytree(made / "c", tmp_path / "c")
    return tmp_path


@pytest.fixture
def run(folder: Path) -> RunFolder:
    return RunFolder.open(folder / "run")


def values_of(run: RunFolder, method: str) -> dict[str, float]:
    return {
        row["example_id"]: row["value"]
        for row in run.read_table("concept_influence").to_pylist()
        if row["method"] == method
    }


@pytest.mark.parametrize(
    ("target", "method"),
    [("concept:c:d", "gradient"), ("concept:c:d:gradient", "gradient"), ("concept:c:d:vector-filter", "vector-filter")],
)
def test_values_are_joined_by_example_id(run: RunFolder, target: str, method: str) -> None:
    (found,) = read_targets(run, target)
    ids = run.read_table("summary", ["example_id"])["example_id"].to_pylist()
    expected = values_of(run, method)
    assert found.values.tolist() == [expected[i] for i in ids]
    assert found.influence == (method == "gradient")


def test_values_do_not_depend_on_the_order_of_the_table(run: RunFolder) -> None:
    (before,) = read_targets(run, "concept:c:d")
    table, record = run.read_table("concept_influence"), run.read_json("concept_influence")
    with run.stage("concept-influence", run.study):
        run.write_table("concept_influence", table.take(list(reversed(range(len(table))))))
        run.write_json("concept_influence", record)
    (after,) = read_targets(run, "concept:c:d")
    np.testing.assert_array_equal(after.values, before.values)


@pytest.mark.parametrize(("rule", "highest"), [("top-k", True), ("keep-k", False)])
@pytest.mark.parametrize("method", METHODS)
def test_examples_are_dropped_by_a_concept(run: RunFolder, rule: str, highest: bool, method: str):
    stages.curate(run, rule=rule, k=3, target=f"concept:c:d:{method}")
    values = values_of(run, method)
    order = sorted(values, key=lambda i: (-values[i] if highest else values[i], i))
    rows = run.read_table("curation").to_pylist()
    kept = "drop" if highest else "keep"
    assert {row["example_id"] for row in rows if row["action"] == kept} == set(order[:3])
    assert all(row["score"] == values[row["example_id"]] for row in rows)
    record = run.read_json("curation")
    dropped = [row["example_id"] for row in rows if row["action"] == "drop"]
    expected = -sum(values[i] for i in dropped) if method == "gradient" else None
    assert record["change"] == (None if expected is None else pytest.approx(expected))
    lines = run.read_text("drop.jsonl").splitlines()
    assert [json.loads(line)["id"] for line in lines] == dropped


def test_a_concept_can_be_protected_and_protect_others(run: RunFolder) -> None:
    influence = values_of(run, "gradient")
    stages.curate(run, rule="top-k", k=8, target="mean_y:harmless", protect="concept:c:d")
    rows = run.read_table("curation").to_pylist()
    assert {r["example_id"] for r in rows if r["action"] == "drop"} == {
        i for i, value in influence.items() if value <= 0
    }
    stages.curate(run, rule="keep-k", k=1, target="concept:c:d", protect="score")
    assert run.read_json("curation")["protected_change"] >= 0


def test_only_an_influence_can_be_protected(run: RunFolder) -> None:
    with pytest.raises(UserError, match="cannot be protected"):
        stages.curate(run, rule="top-k", k=2, protect="concept:c:d:vector-filter")


def test_clusters_of_a_concept(run: RunFolder) -> None:
    stages.clusters(run, k=1, target="concept:c:d")
    values = values_of(run, "gradient")
    members = run.read_table("cluster_members").to_pylist()
    for row in run.read_table("cluster_influence").to_pylist():
        assert row["target"] == "concept:c:d"
        own = [values[m["example_id"]] for m in members if m["cluster"] == row["cluster"]]
        assert row["mean"] == pytest.approx(np.mean(own))


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("concept:nobody", "concept:c:d:vector-filter"),
        ("concept:c:d:projection-difference-response", "concept:c:d:gradient"),
        ("mean_y:nobody", "mean_y:harmless, concept:c:d"),
    ],
)
def test_other_names_are_refused_with_those_there_are(run: RunFolder, target: str, said: str):
    with pytest.raises(UserError, match="not a target of this run") as error:
        stages.curate(run, rule="top-k", k=2, target=target)
    assert said in str(error.value)


def test_without_concepts_it_is_said_how_to_get_them(made: Path, tmp_path: Path, taught_here) -> None:
    shutil.copytree(made / "run", tmp_path / "run")
    run = RunFolder.open(tmp_path / "run")
    with run.locked():
        run._forget("concept-influence")
    done = taught_here("curate", str(tmp_path / "run"), "--rule", "top-k", "--k", "2", "--target", "concept:c:d")
    assert done.returncode == 2
    said = " ".join(done.stderr.split())
    assert "concept-influence has not been run" in said
    assert "taught concept-influence STUDY --concept FOLDER --run" in said


def test_what_a_concept_decided_belongs_to_its_values(run: RunFolder, made: Path) -> None:
    """Asked for other concepts, the run refuses the old decisions; those by score stay."""
    study = load_study(made)
    stages.curate(run, rule="top-k", k=2, target="concept:c:d")
    run.verify()
    ask(study, run, made, ("vector-filter",))
    with pytest.raises(UserError, match="curate was made with an earlier result"):
        run.verify()
    stages.curate(run, rule="top-k", k=2, target="score")
    ask(study, run, made)
    run.verify()
    stages.curate(run, rule="top-k", k=2, target="concept:c:d")
    stages.report(run)
    assert "concept:c:d" in run.read_text("report.html")


def test_the_command_says_that_a_projection_predicts_no_change(folder: Path, taught_here) -> None:
    done = taught_here(
        "curate", str(folder / "run"), "--rule", "top-k", "--k", "2", "--target", "concept:c:d:vector-filter"
    )
    assert done.returncode == 0, done.stderr
    assert "predicts no change" in done.stdout and "Predicted change" not in done.stdout
