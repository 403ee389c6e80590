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
from taught.cli.app import run_command
from taught.errors import UserError
from taught.run.folder import RunFolder
from taught.stages.scored import read_scores
from taught.study.load import load_study
from taught.study.schema import Study
from tiny_study import SCORED, do, values_of, with_values, write_tiny_study


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study with its policy and attribution done, in ``run``."""
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny_study(folder)
    do(study_of(folder), folder / "run", *SCORED)
    return folder


@pytest.fixture
def copy(made: Path, tmp_path: Path) -> Path:
    """The same to play with."""
    shutil.copytree(made, tmp_path / "study")
    return tmp_path / "study"


def study_of(folder: Path, **changes: Any) -> Study:
    study = load_study(folder / "study.yaml").replace("prompts.limit", 12)
    return with_values(study, {key.replace("__", "."): value for key, value in changes.items()})


def curated(run: RunFolder, **changes: Any) -> list[dict[str, Any]]:
    """The decisions of the stage ``curate``, by the run's study with some of its section changed."""
    study = with_values(run.study, {f"curation.{key}": value for key, value in changes.items()})
    return do(study, run, "curate").read_table("curation").to_pylist()


def rows(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text().splitlines()]


def write_rows(path: Path, content: list[dict[str, Any]]) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in content))


def summary(run: RunFolder) -> dict[str, dict[str, Any]]:
    return {row["example_id"]: row for row in run.read_table("summary").to_pylist()}


def attributed(folder: Path, name: str, **changes: Any) -> RunFolder:
    """The examples scored anew, in a copy of the run with its policy."""
    run = RunFolder(shutil.copytree(folder / "run", folder / name), fresh=("attribute",))
    return do(study_of(folder, **changes), run, "attribute")


# What is written


def test_without_coefficients_score_and_group_means_are_the_same(copy: Path) -> None:
    run = attributed(copy, "few", attribution__targets=["score", "behavior:*"])
    full, few = summary(RunFolder.open(copy / "run")), summary(run)
    largest = max(abs(row["score"]) for row in full.values())
    for example_id, row in full.items():
        for key in ("score", "score:x", "score:y", "behavior:harmful", "behavior:harmless"):
            assert few[example_id][key] == pytest.approx(row[key], rel=1e-3, abs=1e-4 * largest)
    assert not run.path("comovement.safetensors").exists()
    assert {row["unintended"] for row in few.values()} == {None}


def test_finite_step_and_adjoint_write_the_same_tables(copy: Path) -> None:
    run = attributed(copy, "steps", attribution__estimator="finite-step", attribution__lr=1e-3)
    slow, fast = summary(run), summary(RunFolder.open(copy / "run"))
    largest = max(abs(row["score"]) for row in fast.values())
    for example_id, row in slow.items():  # the step was ten times as long
        assert row["score"] / 10 == pytest.approx(fast[example_id]["score"], rel=0.1, abs=0.02 * largest)
    columns = {name: run.read_table(name).column_names for name in ("summary", "scores")}
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
    for k, feature in enumerate(ids["feature_ids"]):
        found = values_of(run, f"coefficient:{feature}:y")
        ours = [found[example_id] for example_id in effect_ids["example_ids"]]
        np.testing.assert_allclose(ours, expected[:, k], rtol=1e-4, atol=1e-9)


def test_the_long_table_is_as_documented_with_a_row_group_per_target(made: Path) -> None:
    import pyarrow.parquet as pq

    run = RunFolder.open(made / "run")
    table = run.read_table("scores")
    assert table.column_names == ["example_id", "method", "target", "value", "se"]
    assert table["se"].null_count == table.num_rows  # the adjoint is exact
    assert set(table["method"].to_pylist()) == {"adjoint"}
    file = pq.ParquetFile(run.table_path("scores"))
    keys = []
    for i in range(file.num_row_groups):
        group = file.read_row_group(i)
        keys += set(group["target"].to_pylist())
        assert group.num_rows == 8
    d = len(run.read_table("coefficients"))
    assert keys == run.read_json("attribution")["targets"]
    assert len(keys) == len(set(keys)) == 3 + 2 + 3 * d


def test_a_contrast_is_the_difference_of_its_sides(copy: Path) -> None:
    """Asked for as a target it is scored as one; else it is read from the table of its sides."""
    name = "behavior:harmful - behavior:harmless"
    asked = attributed(copy, "contrast", attribution__targets=[name, "score"])
    full = RunFolder.open(copy / "run")
    sides = [values_of(full, part) for part in ("behavior:harmful", "behavior:harmless")]
    expected = np.array([sides[0][i] - sides[1][i] for i in sides[0]])
    read = read_scores(full, [name])
    np.testing.assert_allclose(read[name], expected, rtol=1e-12)
    found = values_of(asked, name)
    np.testing.assert_allclose([found[i] for i in sides[0]], expected, rtol=1e-3, atol=1e-4 * abs(expected).max())
    assert asked.read_json("attribution")["ranked_by"] == name


def test_a_user_names_the_features_a_example_is_about(copy: Path) -> None:
    known = RunFolder.open(copy / "run").read_table("coefficients")["feature_id"].to_pylist()
    examples = rows(copy / "pairs.jsonl")
    examples[0]["intended"] = [known[1], known[0]]
    examples[1]["intended"] = f"{known[2]}, {known[3]}"
    write_rows(copy / "pairs.jsonl", examples)
    found = summary(attributed(copy, "named"))
    assert found["z00"]["intended"] == sorted(known[:2])
    assert found["z01"]["intended"] == sorted(known[2:4])
    for name, cell in (("unknown", [999]), ("number", 999)):
        examples[2]["intended"] = cell
        write_rows(copy / "pairs.jsonl", examples)
        with pytest.raises(UserError, match=r"(?s)intended features.*z02"):
            attributed(copy, name)


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
    curated(run, rule="top-k", k=2)
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
    curated(run, rule="top-k", k=1)
    assert len(rows(run.path("unscored.jsonl"))) == 4
    reasons = {row["curation_reason"] for row in rows(run.path("unscored.jsonl"))}
    assert reasons == {"not scored: examples.limit"}


# Curation


def test_curation_by_a_groups_mean_names_its_target(copy: Path) -> None:
    run = RunFolder.open(copy / "run")
    decisions = curated(run, rule="top-k", k=3, target="behavior:harmless")
    assert {d["target"] for d in decisions} == {"behavior:harmless"}
    value = values_of(run, "behavior:harmless")
    top = sorted(value, key=lambda i: -value[i])[:3]
    assert {d["example_id"] for d in decisions if d["action"] == "drop"} == set(top)
    assert all(d["score"] == value[d["example_id"]] for d in decisions)
    do(run.study, run, "report")
    assert "behavior:harmless" in run.read_text("report.html")
    with pytest.raises(UserError, match=r"no values of this target\n  value: behavior:nobody"):
        curated(run, rule="top-k", k=3, target="behavior:nobody")
    with pytest.raises(UserError, match="with --rule paper: score"):
        curated(run, rule="paper", target="behavior:harmless")


@pytest.mark.parametrize("protect", ["score", "behavior:harmful"])
def test_a_curation_that_protects_a_second_target(copy: Path, capsys: pytest.CaptureFixture[str], protect: str) -> None:
    """In this study no example raises the score and every example the behavior of the harmful group."""
    flags = ["--rule", "keep-k", "--k", "2", "--target", "behavior:harmless", "--protect", protect]
    assert run_command(["curate", str(copy / "run"), *flags]) == 0
    said = " ".join(capsys.readouterr().out.split())
    run = RunFolder.open(copy / "run")
    record, values = run.read_json("curation"), summary(run)
    dropped = {row["id"] for row in rows(run.path("drop.jsonl"))}
    may = {i for i, row in values.items() if row[protect] <= 0}
    by_harm = sorted(may, key=lambda i: (values[i]["behavior:harmless"], i))
    assert len(may) == (8 if protect == "score" else 0) and dropped == set(by_harm[-6:])
    assert (record["dropped"], record["missing"]) == (len(dropped), 6 - len(dropped))
    for row in run.read_table("curation").to_pylist():
        assert row["score"] == values[row["example_id"]]["behavior:harmless"]
        assert row["protect_score"] == values[row["example_id"]][protect]
    for key, name in (("change", "behavior:harmless"), ("protected_change", protect)):
        assert record[key] == pytest.approx(-sum(values[i][name] for i in dropped), rel=1e-12)
    assert record["lr"] == run.study.attribution.lr and record["protected_change"] >= 0
    assert f"{len(dropped)} examples to drop" in said and "(protected)" in said
    assert ("6 examples fewer than asked for" in said) == (not may)
    do(run.study, run, "report")
    assert "(protected)" in run.read_text("report.html")


def test_a_target_that_cannot_be_protected_is_named(copy: Path) -> None:
    run = RunFolder.open(copy / "run")
    with pytest.raises(UserError, match="behavior:nobody"):
        curated(run, rule="top-k", k=1, protect="behavior:nobody")
    with pytest.raises(UserError, match=r"curation\.protect"):
        curated(run, rule="top-k", k=1, protect="loss")
    with pytest.raises(UserError, match="cannot be protected"):
        curated(run, rule="paper", protect="behavior:harmful")


def test_a_study_names_the_curation_and_flags_go_first(copy: Path) -> None:
    named = {"rule": "keep-k", "k": 3, "target": "behavior:harmful", "protect": "score"}
    study = study_of(copy, **{f"curation__{key}": value for key, value in named.items()})
    run = do(study, copy / "run", "curate")
    record = run.read_json("curation")
    assert {key: record[key] for key in named} == named
    flags = ["--rule", "top-k", "--target", "behavior:harmless"]
    assert run_command(["curate", str(run.folder), *flags]) == 0
    assert RunFolder.open(run.folder).read_json("curation")["target"] == "behavior:harmless"


def test_the_users_rows_come_back_with_a_reason_and_their_ids(copy: Path) -> None:
    run = RunFolder.open(copy / "run")
    curated(run)
    original = {row["id"]: row for row in rows(copy / "pairs.jsonl")}
    for row in rows(run.path("keep.jsonl")) + rows(run.path("drop.jsonl")):
        reason = row.pop("curation_reason")
        assert row == original[row["id"]]
        assert "median" in reason


def test_invariant_8_a_example_file_that_changed_since_is_not_curated(copy: Path) -> None:
    run = attributed(copy, "own")
    curated(run)
    examples = rows(copy / "pairs.jsonl")
    examples[0]["response"] = "Another answer."
    write_rows(copy / "pairs.jsonl", examples)
    with pytest.raises(UserError, match="changed since it was scored"):
        curated(RunFolder.open(copy / "own"))
    with pytest.raises(UserError, match=r"examples\.path sha256"):
        do(study_of(copy), copy / "own", "attribute")


# Interruption


def test_invariant_9_a_stopped_attribution_continues_and_gives_the_same(
    copy: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Stopped in the prompts' part, then after the first chunks of features; then to the end."""
    small = {"attribution__memory_gb": 3e-5, "attribution__batch_tokens": 128}
    study, run = study_of(copy, **small), do(study_of(copy, **small), copy / "again", "readings", "policy")
    calls: list[str] = []
    real_contract, real_meet = adjoint.contract_examples, pe._meet

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

    monkeypatch.setattr(adjoint, "contract_examples", contract)
    monkeypatch.setattr(pe, "_meet", meet)
    for _ in range(2):
        with pytest.raises(KeyboardInterrupt):
            do(study, run, "attribute")
    before = list(calls)
    do(study, copy / "again", "attribute")
    assert before.count("features") == 3 and before.count("prompts") > 2
    assert "prompts" not in calls[len(before) :]  # pieces of the first two attempts were used
    assert not (copy / "again" / "partial").exists()
    expected, found = (
        {(row["target"], row["example_id"]): row["value"] for row in table.to_pylist()}
        for table in (RunFolder.open(copy / name).read_table("scores") for name in ("run", "again"))
    )
    assert found.keys() == expected.keys()
    scale: dict[str, float] = {}
    for (target, _), value in expected.items():
        scale[target] = max(scale.get(target, 0.0), abs(value))
    for key, value in expected.items():
        assert found[key] == pytest.approx(value, abs=1e-3 * scale[key[0]])
