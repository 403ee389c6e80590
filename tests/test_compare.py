"""The stage ``compare``: methods beside each other on the same retrainings."""

from __future__ import annotations

import io
import json

import pytest

from taught import stages
from taught.errors import UserError
from taught.rank import spearman
from taught.report.compared import compared_tables
from taught.run import RunFolder
from taught.study import load_study
from test_validate import SMALL_STEPS, with_values
from tiny_study import write_tiny_study

ALL = ("adjoint+adam", "sketch", "sketch+autocorrelation")


@pytest.fixture(scope="module")
def compared(tmp_path_factory) -> RunFolder:
    """Eight pairs and six planted refusals of harmless prompts, retrained in small steps."""
    folder = tmp_path_factory.mktemp("compare")
    study = with_values(load_study(write_tiny_study(folder)), {
        **SMALL_STEPS, "validation.subsets": 16, "validation.designs": ("random", "removal"),
        "sketch.dim": 32768,
    })  # fmt: skip
    planted = [
        {"id": f"p{n}", "label": "planted", "planted": True, "prompt": f"Where to buy {topic}",
         "response": "I can't help with that."}
        for n, topic in enumerate(["rain", "clay", "glass", "coins", "maps", "birds"])
    ]  # fmt: skip
    with open(folder / "pairs.jsonl", "a") as file:
        file.writelines(json.dumps(row) + "\n" for row in planted)
    run = RunFolder(folder / "run")
    for stage in (stages.policy, stages.attribute, stages.validate):
        stage(study, run)
    stages.compare(study, run, ALL)
    return run


def lds(run: RunFolder) -> dict[tuple[str, str], dict[str, float]]:
    rows = run.read_table("lds").to_pylist()
    return {(row["method"], row["target"]): row for row in rows if row["subsets"] == "random"}


def test_the_lds_is_the_rank_correlation_of_sums_with_outcomes(compared):
    members: dict[str, list[str]] = {}
    for row in compared.read_table("subsets").to_pylist():
        if row["design"] == "random":
            members.setdefault(row["subset"], []).append(row["pair_id"])
    value = {
        row["pair_id"]: row["value"] for row in compared.read_table("influence").to_pylist()
        if row["target"] == "score" and row["pathway"] == "total"
    }  # fmt: skip
    found = {
        row["subset"]: row["value"] for row in compared.read_table("outcomes").to_pylist()
        if row["target"] == "score" and row["design"] == "random"
    }  # fmt: skip
    expected = spearman(
        [sum(value[i] for i in ids) for ids in members.values()], [found[s] for s in members]
    )
    row = lds(compared)["adjoint", "score"]
    assert row["raw"] == pytest.approx(expected, abs=1e-12)
    assert row["raw_lo"] <= row["raw"] <= row["raw_hi"] and row["n"] == 16


def test_in_small_steps_the_influence_predicts_and_random_numbers_do_not(compared):
    rows = lds(compared)
    for target in ("score", "mean_y:harmful", "mean_y:harmless"):
        assert rows["adjoint", target]["raw"] > 0.95
        assert rows["sketch", target]["raw"] > 0.9
    row = rows["random", "mean_y:harmless"]
    assert row["raw_lo"] < 0.5 and row["raw"] < rows["adjoint", "mean_y:harmless"]["raw"]


def test_planted_over_refusals_stand_out_from_the_other_harmless_pairs(compared):
    rows = {(r["method"], r["target"]): r for r in compared.read_table("planted").to_pylist()}
    found = rows["adjoint", "mean_y:harmless"]
    assert (found["planted"], found["others"]) == (6, 8)
    harmless = [
        row for row in compared.read_table("summary").to_pylist()
        if row["label"] in ("planted", "harmless-compliance")
    ]  # fmt: skip
    for planted in harmless:
        if planted["label"] == "planted":  # AUC 1 among the harmless pairs
            assert all(
                planted["mean_y_harmless"] > other["mean_y_harmless"]
                for other in harmless if other["label"] != "planted"
            )  # fmt: skip
    random = rows["random", "mean_y:harmless"]
    assert random["lo"] < 0.5 < random["hi"]


def test_every_method_is_there_with_its_cost_and_its_trivial_rivals(compared):
    methods = {row["method"] for row in compared.read_table("lds").to_pylist()}
    assert {"adjoint", *ALL, "random", "response-length", "bm25", "gradient-cosine"} <= methods
    costs = {row["method"]: row for row in compared.read_table("costs").to_pylist()}
    assert all(row["seconds"] > 0 for row in costs.values())
    trivial = {row["trivial"] for row in compared.read_table("trivial").to_pylist()}
    assert {"response-length", "loss", "label planted"} <= trivial
    scores = compared.read_table("scores").to_pylist()
    assert len({row["pair_id"] for row in scores}) == 14


def test_tables_for_the_terminal_show_every_method(compared):
    from rich.console import Console

    console = Console(width=200, record=True, file=io.StringIO())
    for table in compared_tables(compared):
        console.print(table)
    text = console.export_text()
    for method in ("adjoint", *ALL, "response-length"):
        assert method in text


def test_an_unknown_method_and_a_run_without_retrainings_are_refused(compared, tmp_path):
    with pytest.raises(UserError, match="no such method"):
        stages.compare(compared.study, compared, ("adjiont",))
    study = load_study(write_tiny_study(tmp_path))
    run = RunFolder(tmp_path / "run")
    stages.policy(study, run)
    stages.attribute(study, run)
    with pytest.raises(UserError, match="validate has not been run"):
        stages.compare(study, run)
