"""The stage ``compare``: methods beside each other on the same retrainings."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from taught.stages.estimating import prepare, read_data

from taught import stages
from taught.cli.app import run_command
from taught.errors import UserError
from taught.estimators.adjoint import targets_at_once
from taught.progress import SilentProgress
from taught.report.sections.validation import CEILING, lds_blocks
from taught.report.show import show_run
from taught.run.files import sha256_file
from taught.run.folder import RunFolder
from taught.run.pieces import PartialFolder
from taught.stages import compare as comparing
from taught.stages.subject import open_subject
from taught.stages.validate import influence_of
from taught.stats.ranks import spearman
from taught.study.load import load_study
from taught.validation.comparison import is_planted, truths
from tiny_study import SMALL_STEPS, with_values, write_tiny_study

ALL = ("adjoint+adam", "sketch", "sketch+autocorrelation")


class Notes(SilentProgress):
    """Keeps the notes of a stage."""

    def __init__(self, notes: list[str]) -> None:
        self.notes = notes

    def note(self, text: str) -> None:
        self.notes.append(text)


@pytest.fixture(scope="module")
def compared(tmp_path_factory) -> RunFolder:
    """Eight examples and six planted refusals of harmless prompts, retrained in small steps."""
    folder = tmp_path_factory.mktemp("compare")
    study = with_values(
        load_study(write_tiny_study(folder)),
        {**SMALL_STEPS, "validation.subsets": 16, "validation.designs": ("random", "removal"), "sketch.dim": 32768},
    )
    planted = [
        {
            "id": f"p{n}",
            "label": "planted",
            "planted": True,
            "prompt": f"Where to buy {topic}",
            "response": "I can't help with that.",
        }
        for n, topic in enumerate(["rain", "clay", "glass", "coins", "maps", "birds"])
    ]
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
            members.setdefault(row["subset"], []).append(row["example_id"])
    value = {
        row["example_id"]: row["value"]
        for row in compared.read_table("influence").to_pylist()
        if row["target"] == "score" and row["pathway"] == "total"
    }
    found = {
        row["subset"]: row["value"]
        for row in compared.read_table("outcomes").to_pylist()
        if row["target"] == "score" and row["design"] == "random"
    }
    expected = spearman([sum(value[i] for i in ids) for ids in members.values()], [found[s] for s in members])
    row = lds(compared)["adjoint", "score"]
    assert row["raw"] == pytest.approx(expected, abs=1e-12)
    assert row["raw_lo"] <= row["raw"] <= row["raw_hi"] and row["n"] == 16


def test_in_small_steps_the_influence_predicts_and_random_numbers_do_not(compared):
    rows = lds(compared)
    for target in ("score", "behavior:harmful", "behavior:harmless"):
        assert rows["adjoint", target]["raw"] > 0.95
        assert rows["sketch", target]["raw"] > 0.9
    row = rows["random", "behavior:harmless"]
    assert row["raw_lo"] < 0.5 and row["raw"] < rows["adjoint", "behavior:harmless"]["raw"]


def test_few_targets_at_a_time_give_what_the_run_has_for_all(compared, tmp_path, monkeypatch):
    """Effects on total targets, two in memory at a time, and kept: the run's own influence."""
    study = compared.study.replace("attribution.memory_gb", 1.5e-4)
    data, subject = read_data(study, SilentProgress()), open_subject(study)
    ready = prepare(study, compared, subject, data)
    assert targets_at_once(ready.problem) == 2
    targets = comparing.compared_targets(ready)

    def found() -> dict[str, dict[str, float]]:
        return comparing.method_scores(
            "adjoint", study, compared, subject, ready, targets, SilentProgress(), PartialFolder(tmp_path)
        )

    scores = found()
    own = {target.label: values for target, values in influence_of(compared).items()}
    for name in targets:
        wanted = [own[name][i] for i in scores[name]]
        size = np.abs(wanted).max()
        np.testing.assert_allclose(list(scores[name].values()), wanted, atol=1e-4 * size)
    monkeypatch.delattr(comparing, "target_effects")
    assert found() == scores  # nothing is computed twice


def test_planted_over_refusals_stand_out_from_the_other_harmless_examples(compared):
    rows = {(r["method"], r["target"]): r for r in compared.read_table("planted").to_pylist()}
    found = rows["adjoint", "behavior:harmless"]
    assert (found["planted"], found["others"]) == (6, 8)
    harmless = [
        row for row in compared.read_table("summary").to_pylist() if row["label"] in ("planted", "harmless-compliance")
    ]
    for planted in harmless:
        if planted["label"] == "planted":  # AUC 1 among the harmless examples
            assert all(
                planted["mean_y_harmless"] > other["mean_y_harmless"]
                for other in harmless
                if other["label"] != "planted"
            )
    random = rows["random", "behavior:harmless"]
    assert random["lo"] < 0.5 < random["hi"]


def test_every_method_is_there_with_its_cost_and_its_trivial_rivals(compared):
    methods = {row["method"] for row in compared.read_table("lds").to_pylist()}
    assert {"adjoint", *ALL, "random", "response-length", "bm25", "gradient-cosine"} <= methods
    costs = {row["method"]: row for row in compared.read_table("costs").to_pylist()}
    assert all(row["seconds"] > 0 for row in costs.values())
    trivial = {row["trivial"] for row in compared.read_table("trivial").to_pylist()}
    assert {"response-length", "loss", "label planted"} <= trivial
    scores = compared.read_table("scores").to_pylist()
    assert len({row["example_id"] for row in scores}) == 14


def test_values_over_the_length_of_the_gradient_are_cosines(compared):
    """Of the adjoint on a mean y; the baseline computes norms and products by another route."""
    rows = {(row["method"], row["target"], row["subsets"]): row for row in compared.read_table("lds").to_pylist()}
    for group in ("harmful", "harmless"):
        by_norm, cosine = (
            rows[method, f"behavior:{group}", "random"] for method in ("adjoint/norm", "gradient-cosine")
        )
        assert by_norm["raw"] == cosine["raw"] and by_norm["controlled"] == cosine["controlled"]
    scores = {
        (row["method"], row["target"], row["example_id"]): row["value"]
        for row in compared.read_table("scores").to_pylist()
    }
    plain = {key[1:]: value for key, value in scores.items() if key[0] == "adjoint+adam"}
    unit = {key[1:]: value for key, value in scores.items() if key[0] == "adjoint+adam/norm"}
    assert plain.keys() == unit.keys() and len(plain) > 30
    assert all(np.sign(plain[key]) == np.sign(unit[key]) for key in plain)


def test_tables_for_the_terminal_show_every_method(compared):
    from rich.console import Console

    console = Console(width=200, record=True, file=io.StringIO())
    console.print(show_run(compared, "validation"))
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


@pytest.mark.parametrize("cell", [True, 1, 1.0, "true", "True", "TRUE", "1"])
def test_a_example_is_planted_however_its_file_says_so(cell):
    assert is_planted({"planted": cell})
    assert not any(is_planted({"planted": no}) for no in (False, 0, 0.0, "false", "", None))
    assert not is_planted({})


def test_a_design_of_few_subsets_is_named_and_has_no_lds(compared, tmp_path):
    study = with_values(compared.study, {"validation.subsets": 7})
    run = RunFolder(shutil.copytree(compared.folder, tmp_path / "run"), fresh=("compare",))
    stages.validate(study, run)
    notes = []
    stages.compare(study, run, progress=Notes(notes))
    assert "random: fewer than 8 subsets, no rank correlation" in notes
    assert "lds" not in run.finished_tables() and "planted" in run.finished_tables()


# --- repeats and noise ----------------------------------------------------------------------------


def test_repeats_train_the_same_subsets_with_other_seeds(compared):
    """A second repeat leaves the first as it was; the LDS is of the mean, below its ceiling."""
    study = with_values(
        compared.study,
        {
            "validation.designs": ("random",),
            "validation.lr": 3e-3,
            "validation.batch": 2,
            "validation.subsets": 8,
            "validation.repeats": 2,
        },
    )
    run = RunFolder(compared.folder.with_name("repeats"))
    for stage in (stages.policy, stages.attribute, stages.validate, stages.compare):
        stage(study, run)
    models = [r for r in run.read_table("models").to_pylist() if r["design"] == "random"]
    assert {(r["repeat"], r["seed"]) for r in models} == {(0, 42), (1, 43)} and len(models) == 16
    members = run.read_table("subsets").to_pylist()
    assert len(members) == 8 * 7 == len({(r["subset"], r["example_id"]) for r in members})
    of: dict[int, dict[str, float]] = {0: {}, 1: {}}
    for row in run.read_table("outcomes").to_pylist():
        if row["target"] == "score":
            of[row["repeat"]][row["subset"]] = row["value"]
    assert all(of[0][name] != of[1][name] for name in of[0])  # another order of the examples
    influence = {
        row["example_id"]: row["value"]
        for row in run.read_table("influence").to_pylist()
        if row["target"] == "score" and row["pathway"] == "total"
    }
    sums = {name: 0.0 for name in of[0]}
    for row in members:
        sums[row["subset"]] += influence[row["example_id"]]
    wanted = spearman(list(sums.values()), [(of[0][n] + of[1][n]) / 2 for n in sums])
    assert lds(run)["adjoint", "score"]["raw"] == pytest.approx(wanted, abs=1e-12)
    ceilings = {row["target"]: row for row in run.read_table("noise_ceiling").to_pylist()}
    row = ceilings["score"]
    between = spearman([of[0][n] for n in sums], [of[1][n] for n in sums])
    assert row["between_seeds"] == pytest.approx(between, abs=1e-12) and row["seeds"] == 2
    assert row["ceiling"] == pytest.approx(np.sqrt(2 * between / (1 + between)))
    assert len(ceilings) == 3 + 6  # the score, two groups, six coefficients
    stages.report(run)
    assert ">noise ceiling<" in run.path("report.html").read_text()
    _, table, *_ = lds_blocks(run.read_table("lds").to_pylist(), list(ceilings.values()))
    name, raw, controlled = table.rows[-1]
    assert table.caption.startswith("S,") and name == CEILING and raw.value == row["ceiling"] and controlled is None


def test_outcomes_without_repeats_are_read_as_one(compared):
    plain = compared.read_table("outcomes").drop_columns("repeat")
    subsets, inclusion = compared.read_table("subsets"), compared.read_json("validation")
    (truth,) = truths(subsets, plain, inclusion["inclusion"], ["score"])
    assert set(truth.measured["score"]) == {0} and len(truth.outcomes()["score"]) == 16
    with pytest.raises(UserError, match="no outcomes of these targets"):
        truths(subsets, plain, inclusion["inclusion"], ["score", "coefficient:999"])


# --- scores made elsewhere ------------------------------------------------------------------------


def test_scores_made_elsewhere_stand_beside_the_others(compared, tmp_path, monkeypatch):
    """The run's own influence on the score as CSV, and a concept's values as Parquet."""
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")  # the command sets it; here it is undone
    own = [r for r in compared.read_table("scores").to_pylist() if (r["method"], r["target"]) == ("adjoint", "score")]
    lines = [f"{r['example_id']},theirs,score,{r['value']!r}\n" for r in own]
    (tmp_path / "theirs.csv").write_text("example_id,method,target,value\n" + "".join(lines))
    table = pa.table(
        {
            "example_id": [r["example_id"] for r in own],
            "target": ["concept:refusal"] * 14,
            "method": ["vector-filter"] * 14,
            "value": [r["value"] for r in own],
        }
    )
    pq.write_table(table, tmp_path / "concept.parquet")
    folder = shutil.copytree(compared.folder, tmp_path / "run")
    files = (tmp_path / "theirs.csv", tmp_path / "concept.parquet")
    flags = ["--method", *ALL, "--scores", *map(str, files), "--fresh", "--quiet"]
    assert run_command(["compare", str(folder), *flags]) == 0
    run = RunFolder.open(folder)
    rows = lds(run)
    keys = ("raw", "raw_lo", "raw_hi", "controlled")
    for name in ("theirs", "refusal:vector-filter"):
        assert [rows[name, "score"][k] for k in keys] == [rows["adjoint", "score"][k] for k in keys]
    assert {t for m, t in rows if m == "theirs"} == {"score"}
    assert {t for m, t in rows if m == "refusal:vector-filter"} == {t for m, t in rows if m == "adjoint"}
    assert run.read_json("compare")["given"] == ["theirs", "refusal:vector-filter"]
    made = run.manifest["stages"]["compare"]
    stages.compare(run.study, run, ALL, None, files)  # nothing has changed
    assert run.manifest["stages"]["compare"] == made
    (tmp_path / "theirs.csv").write_text("example_id,method,target,value\n" + "".join(lines[::-1]))
    with pytest.raises(UserError, match="scores sha256"):
        stages.compare(run.study, run, ALL, None, files)


# --- the benchmark --------------------------------------------------------------------------------


@pytest.fixture
def benchmark(compared, tmp_path, monkeypatch):
    """``benchmarks.lds`` on the tiny study, and a call of it."""
    monkeypatch.syspath_prepend(str(Path(__file__).parents[2]))
    import benchmarks.lds as module

    study = compared.study
    monkeypatch.setattr(module, "ground_truth_study", lambda *_: study)
    (tmp_path / "data/short").mkdir(parents=True)
    for name in ("subsets.parquet", "outcomes.parquet", "validation.json"):
        (tmp_path / "data/short" / name).write_bytes(compared.path(name).read_bytes())
    made = {"examples sha256": sha256_file(Path(study.examples.path)), "sha256": {}}
    (tmp_path / "data/short/made.json").write_text(json.dumps(made))

    def call(*flags: str) -> dict:
        monkeypatch.setattr("sys.argv", ["benchmarks/lds.py", *flags])
        module.main([*flags, "--data", str(tmp_path / "data"), "--out", str(tmp_path)])
        return json.loads((tmp_path / "lds_short.json").read_text())

    return module, call


def test_the_benchmark_agrees_with_the_stage_and_computes_nothing_twice(compared, benchmark, tmp_path, monkeypatch):
    module, call = benchmark
    some = ("adjoint+adam", "difference:vector-filter", "difference:gradient")
    first = call("--run", str(compared.folder), "--methods", *some)
    assert first["complete"]
    rows = {(r["method"], r["target"]): r for r in first["rows"] if r["subsets"] == "random"}
    for key, row in lds(compared).items():
        if key[0] in ("adjoint", "adjoint+adam", "random", "loss", "gradient-cosine"):
            assert rows[key]["raw"] == pytest.approx(row["raw"], abs=1e-9)
            assert rows[key]["controlled"] == pytest.approx(row["controlled"], abs=1e-9)
    assert {"adjoint", *some, "bm25"} <= {method for method, _ in rows}
    once = [
        r for r in pq.read_table(tmp_path / "data/scores.parquet").to_pylist() if r["method"] == "difference:gradient"
    ]
    assert len(once) == 14 and all(row["target"] is None for row in once)  # for every target
    assert {t for m, t in rows if m == "difference:gradient"} == {t for _, t in rows}
    others = {row["other"] for row in first["summary"]["differences"]}
    assert others == {"adjoint", "difference:vector-filter", "difference:gradient", "adjoint/norm", "adjoint+adam/norm"}
    assert {"all baselines", *some} <= set(first["summary"]["costs"])
    assert first["summary"]["planted"]["adjoint+adam"]["planted"] == 6
    monkeypatch.setattr(module, "METHODS", dict.fromkeys(module.METHODS))  # none can be called
    second = call("--methods", *some)
    assert second["rows"] == first["rows"]


def test_the_benchmark_refuses_scores_of_another_model(compared, benchmark, monkeypatch, capsys):
    module, call = benchmark
    call("--methods")
    study = compared.study.replace("readout.position", "last_user")
    monkeypatch.setattr(module, "ground_truth_study", lambda *_: study)
    with pytest.raises(SystemExit):
        call("--methods")
    assert "readout.position" in " ".join(capsys.readouterr().err.split())
