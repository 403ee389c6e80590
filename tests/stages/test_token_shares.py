"""Shares of response tokens and values of concepts, as the stages write them into a run."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from taught import stages
from taught.cli.app import run_command
from taught.errors import UserError
from taught.run.folder import RunFolder
from taught.stages import ConceptQuestion, ConceptRequest
from taught.study.schema import Study, load_study
from tiny_study import write_tiny_study

METHODS = ("gradient", "vector-filter")


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_tiny_study(tmp_path_factory.mktemp("tiny")).parent


@pytest.fixture(scope="module")
def study(folder) -> Study:
    return load_study(folder / "study.yaml").replace("attribution.exact_top", 2)


@pytest.fixture(scope="module")
def run(folder, study) -> RunFolder:
    run = RunFolder(folder / "run")
    stages.policy(study, run)
    stages.attribute(study, run)
    request = ConceptRequest("difference", force=True)
    stages.concept(study, folder / "kind", request)
    return run


def question(folder: Path, **options) -> ConceptQuestion:
    return ConceptQuestion((folder / "kind",), METHODS, tokens=2, **options)


def test_shares_of_the_strongest_examples_add_up_to_their_effects(run):
    summary = {row["example_id"]: row for row in run.read_table("summary").to_pylist()}
    table = run.read_table("token_shares").to_pylist()
    top = [example for example, row in summary.items() if row["rank"] <= 2]
    assert {row["example_id"] for row in table} == set(top)
    largest = max(abs(row["share"]) for row in table)
    for example in top:
        for target, group in (("score", None), ("mean_y", "harmful"), ("mean_y", "harmless")):
            own = [row for row in table if (row["example_id"], row["target"], row["group"]) == (example, target, group)]
            assert [row["position"] for row in own] == list(range(summary[example]["n_response"]))
            column = "score" if group is None else f"mean_y_{group}"
            whole = sum(row["share"] for row in own)
            assert whole == pytest.approx(summary[example][column], rel=1e-3, abs=1e-4 * largest)
            assert "".join(row["token"] for row in own).endswith("<|im_end|>")


@pytest.mark.parametrize("changes", [{"exact_top": 0}, {"estimator": "finite-step"}])
def test_shares_are_left_out_where_no_gradient_is_split(folder, study, run, tmp_path, changes):
    import shutil

    shutil.copytree(run.folder, tmp_path / "run")
    for key, value in changes.items():
        study = study.replace(f"attribution.{key}", value)
    again = RunFolder(tmp_path / "run", fresh=("attribute",))
    stages.attribute(study, again)
    assert "token_shares.parquet" not in again.manifest["files"]
    assert not again.path("token_shares.parquet").exists()


def test_concepts_become_part_of_a_run_and_of_its_report(folder, study, run):
    before = run.study
    other = study.replace("validation.remove_by", "score")  # says what validate did, and not this
    answers = stages.concept_influence(other, question(folder), run=run)
    assert run.study == before != other
    assert run.read_table("concept_influence").equals(answers.table)
    assert run.read_table("concept_tokens").equals(answers.tokens)
    assert run.read_table("concept_agreement").equals(stages.agreement(answers.table))
    again = stages.concept_influence(study, question(folder, group="harmful"), run=run)
    assert not again.table.equals(answers.table)
    assert run.read_table("concept_influence").equals(again.table), "asked anew, made anew"
    assert run.read_json("concept_influence")["group"] == "harmful"
    values = {r["example_id"]: r["value"] for r in again.table.to_pylist() if r["method"] == "gradient"}
    first = again.tokens["example_id"][0].as_py()
    assert abs(values[first]) == max(map(abs, values.values()))


def test_concepts_of_another_study_do_not_enter_a_run(folder, study, run):
    before = run.manifest
    with pytest.raises(UserError, match="made under other inputs: attribution.lr"):
        stages.concept_influence(study.replace("attribution.lr", 1e-3), question(folder), run=run)
    assert run.manifest == before


def test_concepts_go_when_the_examples_are_scored_anew(folder, study, run, tmp_path):
    import shutil

    shutil.copytree(run.folder, tmp_path / "run")
    stages.concept_influence(study, question(folder), run=RunFolder(tmp_path / "run"))
    again = RunFolder(tmp_path / "run", fresh=("attribute",))
    stages.attribute(study, again)
    assert "concept-influence" not in again.manifest["stages"]


@pytest.mark.parametrize("flags", [[], ["--out", "a.parquet", "--run", "run"]])
def test_the_command_keeps_its_answers_in_one_place(folder, flags, capsys):
    argv = ["concept-influence", str(folder / "study.yaml"), "--concept", str(folder / "kind")]
    assert run_command([*argv, *flags]) == 2
    assert "either --out or --run" in capsys.readouterr().err


def test_the_command_writes_into_a_run(folder, run, capsys):
    argv = [
        "concept-influence",
        str(folder / "study.yaml"),
        "--concept",
        str(folder / "kind"),
        "--set",
        "attribution.exact_top=2",
        "-q",
    ]
    assert run_command([*argv, "--run", str(run.folder)]) == 0
    assert "concept_influence.parquet" in capsys.readouterr().out
    assert np.isfinite(RunFolder(run.folder).read_table("concept_influence")["value"].to_numpy()).all()
