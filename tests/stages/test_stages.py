"""The stages end to end on a tiny study: what they write, refuse, resume and leave out by name."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import taught.estimators.adjoint as adjoint
import taught.estimators.every_prompt as pe
from taught import stages
from taught.cli.app import run_command
from taught.errors import UserError
from taught.run.folder import RunFolder
from taught.study.load import load_study
from taught.study.schema import Study
from tiny_study import write_tiny_study


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study with its policy and attribution done, in ``run``."""
    folder = tmp_path_factory.mktemp("tiny")
    study = load_study(write_tiny_study(folder))
    run = RunFolder(folder / "run")
    stages.policy(study, run)
    stages.attribute(study, run)
    return folder


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    """The same to play with."""
    shutil.copytree(made, tmp_path / "study")
    return tmp_path / "study"


def study_of(folder: Path, **changes: Any) -> Study:
    study = load_study(folder / "study.yaml")
    for key, value in changes.items():
        study = study.replace(key.replace("__", "."), value)
    return study


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_rows(path: Path, content: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in content))


def summary(run: RunFolder) -> dict[str, dict[str, Any]]:
    return {row["example_id"]: row for row in run.read_table("summary").to_pylist()}


def attributed(folder: Path, name: str, **changes: Any) -> RunFolder:
    study = study_of(folder, **changes)
    run = RunFolder(folder / name)
    stages.policy(study, run)
    stages.attribute(study, run)
    return run


# What is written


def test_without_coefficients_score_and_group_means_are_the_same(copy: Path) -> None:
    run = attributed(copy, "few", attribution__targets=["score", "behavior:*"])
    full, few = summary(RunFolder.open(copy / "run")), summary(run)
    largest = max(abs(row["score"]) for row in full.values())
    for example_id, row in full.items():
        for key in ("score", "score_x", "score_y", "mean_y_harmful", "mean_y_harmless"):
            assert few[example_id][key] == pytest.approx(row[key], rel=1e-3, abs=1e-4 * largest)
    assert not run.path("comovement.safetensors").exists()
    assert {row["unintended"] for row in few.values()} == {None}


def test_finite_step_and_adjoint_write_the_same_tables(copy: Path) -> None:
    run = attributed(copy, "steps", attribution__estimator="finite-step", attribution__lr=1e-3)
    slow, fast = summary(run), summary(RunFolder.open(copy / "run"))
    largest = max(abs(row["score"]) for row in fast.values())
    for example_id, row in slow.items():  # the step was ten times as long
        assert row["score"] / 10 == pytest.approx(fast[example_id]["score"], rel=0.1, abs=0.02 * largest)
    columns = {name: run.read_table(name).column_names for name in ("summary", "influence")}
    for name, names in columns.items():
        assert RunFolder.open(copy / "run").read_table(name).column_names == names


def test_forward_mode_writes_the_same_tables_and_every_feature_on_every_prompt(copy: Path) -> None:
    run = attributed(copy, "jvp", attribution__estimator="forward")
    forward, adjoint_ = summary(run), summary(RunFolder.open(copy / "run"))
    largest = max(abs(row["score"]) for row in adjoint_.values())
    for example_id, row in forward.items():
        assert row["score"] == pytest.approx(adjoint_[example_id]["score"], abs=1e-3 * largest)
    arrays, ids = run.read_tensors("feature_prompt_effects")
    dX = arrays["dX"]
    assert dX.shape == (len(ids["example_ids"]), len(ids["prompt_ids"]), len(ids["feature_ids"]))
    X, _ = run.read_tensors("activations")
    assert not dX[:, X["X"] == 0].any() and np.abs(dX).max() > 0
    assert not RunFolder.open(copy / "run").path("feature_prompt_effects.safetensors").exists()


def test_the_strongest_examples_get_a_real_step_and_an_exact_refit(made: Path) -> None:
    table = sorted(summary(RunFolder.open(made / "run")).values(), key=lambda r: r["rank"])
    for row in table[:3]:
        assert row["step_score"] == pytest.approx(row["score"], rel=0.2)
        assert row["refit_score"] == pytest.approx(row["score"], rel=0.2)
    assert {row["step_score"] for row in table[3:]} == {None}


def test_coefficients_in_the_table_are_the_shifts_of_the_prompts_effects(made: Path) -> None:
    """Pathway y of every coefficient, once more from dy and the policy's own arrays, by id."""
    run = RunFolder.open(made / "run")
    arrays, ids = run.read_tensors("activations")
    record = run.read_json("policy")
    Xc = arrays["X"] - arrays["X"].mean(0)
    U = Xc.T @ Xc + record["alpha"] * np.eye(Xc.shape[1])
    effects, effect_ids = run.read_tensors("prompt_effects")
    assert effect_ids["prompt_ids"] == ids["prompt_ids"]
    expected = np.linalg.solve(U, Xc.T @ effects["dy"].astype(np.float64).T).T
    table = {
        (row["example_id"], row["feature_id"]): row["value"]
        for row in run.read_table("influence").to_pylist()
        if row["target"] == "coefficient" and row["pathway"] == "y"
    }
    for i, example_id in enumerate(effect_ids["example_ids"]):
        for k, feature in enumerate(ids["feature_ids"]):
            assert table[example_id, feature] == pytest.approx(expected[i, k], rel=1e-4, abs=1e-9)


def test_the_long_table_is_as_documented_with_a_row_group_per_value(made: Path) -> None:
    import pyarrow.parquet as pq

    run = RunFolder.open(made / "run")
    table = run.read_table("influence")
    assert table.column_names == ["example_id", "target", "feature_id", "group", "pathway", "value", "se", "estimator"]
    assert table["se"].null_count == table.num_rows  # the adjoint is exact
    file = pq.ParquetFile(run.table_path("influence"))
    keys = []
    for i in range(file.num_row_groups):
        group = file.read_row_group(i).drop_columns(["example_id", "value"])
        keys += {tuple(row.values()) for row in group.to_pylist()}
        assert group.num_rows == 8
    d = len(run.read_table("coefficients"))
    assert len(keys) == len(set(keys)) == file.num_row_groups == 3 + 2 + 3 * d


def test_a_user_names_the_features_a_example_is_about(copy: Path) -> None:
    known = RunFolder.open(copy / "run").read_table("coefficients")["feature_id"].to_pylist()
    examples = rows(copy / "pairs.jsonl")
    examples[0]["intended"] = [known[1], known[0]]
    examples[1]["intended"] = f"{known[2]}, {known[3]}"
    write_rows(copy / "pairs.jsonl", examples)
    found = summary(attributed(copy, "named"))
    assert found["z00"]["intended"] == sorted(known[:2])
    assert found["z01"]["intended"] == sorted(known[2:4])
    examples[2]["intended"] = [999]
    write_rows(copy / "pairs.jsonl", examples)
    with pytest.raises(UserError, match=r"(?s)intended features.*z02"):
        attributed(copy, "unknown")


# What is left out, and said


def test_invariant_6_what_is_dropped_is_listed_and_nothing_else_is(copy: Path) -> None:
    examples, prompts = rows(copy / "pairs.jsonl"), rows(copy / "prompts.jsonl")
    examples[3]["prompt"] = prompts[5]["prompt"]
    examples[4]["response"] = "a very long answer " * 10
    write_rows(copy / "pairs.jsonl", examples)
    with pytest.raises(UserError, match="z03"):
        attributed(copy, "overlap")
    with pytest.raises(UserError, match="z04"):
        attributed(copy, "cut", examples__drop_overlap=True)
    run = attributed(copy, "both", examples__drop_overlap=True, examples__drop_truncated=True)
    assert run.read_json("dropped") == {"overlap": ["z03"], "truncated": ["z04"]}
    assert set(summary(run)) == {"z00", "z01", "z02", "z05", "z06", "z07"}
    stages.curate(run, rule="top-k", k=2)
    kept, dropped, rest = (rows(run.path(f"{n}.jsonl")) for n in ("keep", "drop", "unscored"))
    assert len(kept) == 4 and len(dropped) == 2
    assert {row["id"]: row["curation_reason"] for row in rest} == {
        "z03": "not scored: overlap",
        "z04": "not scored: truncated",
    }
    assert sorted(r["id"] for r in kept + dropped + rest) == [f"z0{i}" for i in range(8)]


def test_dropping_every_example_is_an_error_not_an_empty_table(copy: Path) -> None:
    with pytest.raises(UserError, match="no example is left"):
        attributed(copy, "none", examples__max_tokens=2, examples__drop_truncated=True)


def test_a_limit_leaves_examples_unscored_by_name(copy: Path) -> None:
    run = attributed(copy, "some", examples__limit=4)
    stages.curate(run, rule="top-k", k=1)
    assert len(rows(run.path("unscored.jsonl"))) == 4
    reasons = {row["curation_reason"] for row in rows(run.path("unscored.jsonl"))}
    assert reasons == {"not scored: examples.limit"}


# Curation


def test_curation_by_a_groups_mean_names_its_target(copy: Path) -> None:
    run = RunFolder.open(copy / "run")
    stages.curate(run, rule="top-k", k=3, target="behavior:harmless")
    decisions = run.read_table("curation").to_pylist()
    assert {d["target"] for d in decisions} == {"mean_y:harmless"}
    value = {i: row["mean_y_harmless"] for i, row in summary(run).items()}
    top = sorted(value, key=lambda i: -value[i])[:3]
    assert {d["example_id"] for d in decisions if d["action"] == "drop"} == set(top)
    assert all(d["score"] == value[d["example_id"]] for d in decisions)
    stages.report(run)
    assert "mean_y:harmless" in run.read_text("report.html")
    with pytest.raises(UserError, match=r"not a target of this run\n  value: behavior:nobody"):
        stages.curate(run, rule="top-k", k=3, target="behavior:nobody")
    with pytest.raises(UserError, match="with --rule paper: score"):
        stages.curate(run, rule="paper", target="behavior:harmless")


@pytest.mark.parametrize(("protect", "column"), [("score", "score"), ("mean_y:harmful",) * 2])
def test_a_curation_that_protects_a_second_target(
    copy: Path, capsys: pytest.CaptureFixture[str], protect: str, column: str
) -> None:
    """In this study no example raises the score and every example the mean y of the harmful group."""
    command = [
        "curate",
        str(copy / "run"),
        "--rule",
        "keep-k",
        "--k",
        "2",
        "--target",
        "mean_y:harmless",
        "--protect",
        protect,
    ]
    assert run_command(command) == 0
    said = " ".join(capsys.readouterr().out.split())
    run, column = RunFolder.open(copy / "run"), column.replace(":", "_")
    record, values = run.read_json("curation"), summary(run)
    dropped = {row["id"] for row in rows(run.path("drop.jsonl"))}
    may = {i for i, row in values.items() if row[column] <= 0}
    by_harm = sorted(may, key=lambda i: (values[i]["mean_y_harmless"], i))
    assert len(may) == (8 if protect == "score" else 0) and dropped == set(by_harm[-6:])
    assert (record["dropped"], record["missing"]) == (len(dropped), 6 - len(dropped))
    for row in run.read_table("curation").to_pylist():
        assert row["score"] == values[row["example_id"]]["mean_y_harmless"]
        assert row["protect_score"] == values[row["example_id"]][column]
    for key, name in (("change", "mean_y_harmless"), ("protected_change", column)):
        assert record[key] == pytest.approx(-sum(values[i][name] for i in dropped), rel=1e-12)
    assert record["lr"] == run.study.attribution.lr and record["protected_change"] >= 0
    assert f"{len(dropped)} examples to drop" in said and f"{protect} (protected)" in said
    assert ("6 examples fewer than asked for" in said) == (not may)
    stages.report(run)
    page = run.read_text("report.html")
    assert f"{protect} (protected)" in page
    assert f"by mean_y:harmless, {protect} protected" in page


def test_a_target_that_cannot_be_protected_is_named(copy: Path) -> None:
    run = RunFolder.open(copy / "run")
    for wrong in ("behavior:nobody", "loss"):
        with pytest.raises(UserError, match=f"not a target of this run\n  value: {wrong}"):
            stages.curate(run, rule="top-k", k=1, protect=wrong)
    with pytest.raises(UserError, match="cannot be protected"):
        stages.curate(run, rule="paper", protect="mean_y:harmful")


def test_a_study_names_the_curation_and_flags_go_first(copy: Path) -> None:
    run = attributed(
        copy,
        "named",
        curation__rule="keep-k",
        curation__k=3,
        curation__target="mean_y:harmful",
        curation__protect="score",
    )
    stages.curate(run)
    record = run.read_json("curation")
    assert [record[key] for key in ("rule", "k", "target", "protect")] == ["keep-k", 3, "mean_y:harmful", "score"]
    stages.curate(run, rule="top-k", target="behavior:harmless")
    assert run.read_json("curation")["target"] == "mean_y:harmless"


def test_the_users_rows_come_back_with_a_reason_and_their_ids(copy: Path) -> None:
    run = RunFolder.open(copy / "run")
    stages.curate(run)
    original = {row["id"]: row for row in rows(copy / "pairs.jsonl")}
    for row in rows(run.path("keep.jsonl")) + rows(run.path("drop.jsonl")):
        reason = row.pop("curation_reason")
        assert row == original[row["id"]]
        assert "median" in reason


def test_invariant_8_a_example_file_that_changed_since_is_not_curated(copy: Path) -> None:
    run = attributed(copy, "own")
    stages.curate(run)
    examples = rows(copy / "pairs.jsonl")
    examples[0]["response"] = "Another answer."
    write_rows(copy / "pairs.jsonl", examples)
    with pytest.raises(UserError, match="changed since it was scored"):
        stages.curate(RunFolder.open(copy / "own"))
    with pytest.raises(UserError, match=r"examples\.path sha256"):
        stages.attribute(study_of(copy), RunFolder(copy / "own"))


# Interruption


def test_invariant_9_a_stopped_attribution_continues_and_gives_the_same(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped after the first chunk of features, then in the prompts' part; then to the end."""
    small = {"attribution__memory_gb": 3e-5, "attribution__batch_tokens": 128}
    study, run = study_of(copy, **small), RunFolder(copy / "again")
    stages.policy(study, run)
    calls: list[str] = []
    real_contract, real_meet = adjoint._contract_below, pe._meet

    def contract(*args: Any) -> Any:
        calls.append("features")
        if calls.count("features") == 3:
            raise KeyboardInterrupt
        return real_contract(*args)

    def meet(*args: Any) -> Any:
        calls.append("prompts")
        if calls.count("prompts") == 2:
            raise KeyboardInterrupt
        return real_meet(*args)

    monkeypatch.setattr(adjoint, "_contract_below", contract)
    monkeypatch.setattr(pe, "_meet", meet)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            stages.attribute(study, run)
    before = list(calls)
    stages.attribute(study, RunFolder(copy / "again"))
    assert before.count("prompts") == 2 and before.count("features") > 3
    assert "features" not in calls[len(before) :]  # pieces of the first two attempts were used
    assert not (copy / "again" / "partial").exists()
    expected, found = (
        {
            tuple(row[k] for k in ("example_id", "target", "feature_id", "group", "pathway")): row["value"]
            for row in RunFolder.open(copy / name).read_table("influence").to_pylist()
        }
        for name in ("run", "again")
    )
    assert found.keys() == expected.keys()
    for key, value in expected.items():
        scale = max(abs(v) for k, v in expected.items() if k[1:] == key[1:])
        assert found[key] == pytest.approx(value, abs=1e-3 * scale)
