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

from taught.core import driver
from taught.core.estimator import Work
from taught.core.query import queries_at_once
from taught.errors import UserError
from taught.progress import SilentProgress
from taught.report.show import show_run
from taught.run.files import sha256_file
from taught.run.folder import RunFolder
from taught.run.pieces import PartialFolder
from taught.stages.compare import compared_targets
from taught.stages.ready import prepare, read_data
from taught.stages.subject import open_subject
from taught.stats.ranks import spearman
from taught.study.load import load_study
from taught.validation.comparison import is_planted, truths
from taught.validation.score_tables import placed, read_scores
from tiny_study import SCORED, SMALL_STEPS, do, values_of, with_values, write_tiny_study

ALL = ("adjoint+adam", "sketch", "sketch+autocorrelation", "sketch+trackstar", "sketch+trak")


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
        {
            **SMALL_STEPS,
            "prompts.limit": 12,
            "validation.subsets": 16,
            "validation.designs": ("random", "removal"),
            "validation.methods": ALL,
        },
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
    return do(study, folder / "run", *SCORED, "validate", "compare")


def lds(run: RunFolder) -> dict[tuple[str, str], dict[str, float]]:
    rows = run.read_table("lds").to_pylist()
    return {(row["method"], row["target"]): row for row in rows if row["subsets"] == "random"}


def test_the_lds_is_the_rank_correlation_of_sums_with_outcomes(compared):
    members: dict[str, list[str]] = {}
    for row in compared.read_table("subsets").to_pylist():
        if row["design"] == "random":
            members.setdefault(row["subset"], []).append(row["example_id"])
    value = values_of(compared, "score")
    found = {
        row["subset"]: row["value"]
        for row in compared.read_table("outcomes").to_pylist()
        if row["target"] == "score" and row["design"] == "random"
    }
    expected = spearman([sum(value[i] for i in ids) for ids in members.values()], [found[s] for s in members])
    row = lds(compared)["adjoint", "score"]
    assert row["raw"] == pytest.approx(expected, abs=1e-12)
    assert row["raw_lo"] <= row["raw"] <= row["raw_hi"] and row["n"] == 16


def test_every_retraining_stands_beside_what_was_foreseen(compared):
    rows = [r for r in compared.read_table("foreseen").to_pylist() if r["target"] == "behavior:harmless"]
    value = values_of(compared, "behavior:harmless")
    members: dict[tuple[str, str], set[str]] = {}
    for row in compared.read_table("subsets").to_pylist():
        members.setdefault((row["design"], row["subset"]), set()).add(row["example_id"])
    assert {(r["design"], r["subset"]) for r in rows} == set(members)
    for row in rows:
        left = set(value) - members[row["design"], row["subset"]]
        assert row["predicted"] == pytest.approx(-sum(value[i] for i in left)) and row["left_out"] == len(left)
    (named,) = [r for r in rows if r["named"]]
    assert named["design"] == "removal"
    assert named["predicted"] == min(r["predicted"] for r in rows if r["left_out"] == named["left_out"])


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
    assert queries_at_once(ready.problem) == 2
    targets = compared_targets(compared, ready)

    def found():
        return driver.scores(
            ready.problem, ready.inputs, targets, ready.method, Work(pieces=PartialFolder(tmp_path / "pieces"))
        )

    scores = found()
    assert len(targets.names) == 3 + 6
    for name in targets.names:
        own = values_of(compared, str(name))
        wanted = [own[i] for i in scores.example_ids]
        np.testing.assert_allclose(scores[name], wanted, atol=1e-4 * np.abs(wanted).max())

    def never(*_args, **_options):
        raise AssertionError("computed again")

    monkeypatch.setattr("taught.estimators.adjoint.target_effects", never)
    np.testing.assert_array_equal(found().values, scores.values)  # nothing is computed twice


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
                planted["behavior:harmless"] > other["behavior:harmless"]
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
    scores = compared.read_table("compared_scores").to_pylist()
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
        for row in compared.read_table("compared_scores").to_pylist()
    }
    plain = {key[1:]: value for key, value in scores.items() if key[0] == "adjoint+adam"}
    unit = {key[1:]: value for key, value in scores.items() if key[0] == "adjoint+adam/norm"}
    assert plain.keys() == unit.keys() and len(plain) > 30
    assert all(np.sign(plain[key]) == np.sign(unit[key]) for key in plain)


def test_tables_for_the_terminal_show_every_method(compared):
    from rich.console import Console

    console = Console(width=200, record=True, file=io.StringIO())
    console.print(show_run(compared.folder, "validation"))
    text = console.export_text()
    for method in ("adjoint", *ALL, "response-length"):
        assert method in text


def test_an_unknown_method_and_a_run_without_retrainings_are_refused(compared, tmp_path):
    with pytest.raises(UserError, match="adjiont"):
        do(compared.study.replace("validation.methods", ["adjiont"]), compared, "compare")
    with pytest.raises(UserError, match=r"finite-step\+autocorrelation"):
        do(compared.study.replace("validation.methods", ["finite-step+autocorrelation"]), compared, "compare")
    with pytest.raises(UserError, match="validate has not been run"):
        do(compared.study, tmp_path / "run", *SCORED, "compare")


@pytest.mark.parametrize("cell", [True, 1, 1.0, "true", "True", "TRUE", "1"])
def test_a_example_is_planted_however_its_file_says_so(cell):
    assert is_planted({"planted": cell})
    assert not any(is_planted({"planted": no}) for no in (False, 0, 0.0, "false", "", None))
    assert not is_planted({})


def test_a_design_of_few_subsets_is_named_and_has_no_lds(compared, tmp_path):
    study = with_values(compared.study, {"validation.subsets": 7})
    run = RunFolder(shutil.copytree(compared.folder, tmp_path / "run"), fresh=("compare",))
    notes = []
    do(study, run, "validate", "compare", progress=Notes(notes))
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
            "validation.methods": (),
        },
    )
    run = do(study, compared.folder.with_name("repeats"), *SCORED, "validate", "compare")
    models = [r for r in run.read_table("models").to_pylist() if r["design"] == "random"]
    assert {(r["repeat"], r["seed"]) for r in models} == {(0, 42), (1, 43)} and len(models) == 16
    members = run.read_table("subsets").to_pylist()
    assert len(members) == 8 * 7 == len({(r["subset"], r["example_id"]) for r in members})
    of: dict[int, dict[str, float]] = {0: {}, 1: {}}
    for row in run.read_table("outcomes").to_pylist():
        if row["target"] == "score":
            of[row["repeat"]][row["subset"]] = row["value"]
    assert all(of[0][name] != of[1][name] for name in of[0])  # another order of the examples
    influence = values_of(run, "score")
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
    do(study, run, "report")
    assert ">noise ceiling<" in run.path("report.html").read_text()


def test_outcomes_without_repeats_are_read_as_one(compared):
    plain = compared.read_table("outcomes").drop_columns("repeat")
    subsets, inclusion = compared.read_table("subsets"), compared.read_json("validation")
    (truth,) = truths(subsets, plain, inclusion["inclusion"], ["score"])
    assert set(truth.measured["score"]) == {0} and len(truth.outcomes()["score"]) == 16
    with pytest.raises(UserError, match="no outcomes of these targets"):
        truths(subsets, plain, inclusion["inclusion"], ["score", "coefficient:999"])


# --- scores made elsewhere ------------------------------------------------------------------------


def test_scores_made_elsewhere_stand_beside_the_others(compared, tmp_path):
    """The run's own influence on the score as CSV, and a concept's values as a run's table has them."""
    own = values_of(compared, "score")
    lines = [f"{i},theirs,score,{value!r}\n" for i, value in own.items()]
    (tmp_path / "theirs.csv").write_text("example_id,method,target,value\n" + "".join(lines))
    columns = {"example_id": list(own), "method": ["vector-filter"] * 14, "target": ["concept:refusal"] * 14}
    pq.write_table(pa.table({**columns, "value": list(own.values())}), tmp_path / "concept.parquet")
    run = RunFolder(shutil.copytree(compared.folder, tmp_path / "run"), fresh=("validate",))
    files = [str(tmp_path / name) for name in ("theirs.csv", "concept.parquet")]
    study = compared.study.replace("validation.scores", files)
    do(study, run, "validate", "compare")
    rows = lds(run)
    keys = ("raw", "raw_lo", "raw_hi", "controlled")
    for name in ("theirs", "refusal:vector-filter"):
        assert [rows[name, "score"][k] for k in keys] == [rows["adjoint", "score"][k] for k in keys]
    assert {t for m, t in rows if m == "theirs"} == {"score"}
    assert {t for m, t in rows if m == "refusal:vector-filter"} == {t for m, t in rows if m == "adjoint"}
    assert run.read_json("compare")["given"] == ["theirs", "refusal:vector-filter"]
    made = run.manifest["stages"]["compare"]
    do(study, run, "compare")  # nothing has changed
    assert run.manifest["stages"]["compare"] == made
    (tmp_path / "theirs.csv").write_text("example_id,method,target,value\n" + "".join(lines[::-1]))
    with pytest.raises(UserError, match=r"validation\.scores"):
        do(study, run, "compare")


IDS = ["a", "b"]


@pytest.mark.parametrize(
    ("rows", "what"),
    [
        ("example_id,value\na,1\nb,2\n", "without method"),
        ("example_id,method,value\n", "no rows"),
        ("example_id,method,value\na,m,1\nb,m,nan\n", "not a finite number"),
        ("example_id,method,value\na,m,1\nb,m,high\n", "not a finite number"),
        ("example_id,method,value\na,m,1\nb,m,1\nc,m,1\n", "unknown examples"),
        ("example_id,method,value\na,m,1\n", "missing"),
        ("example_id,method,target,value\na,m,score,1\nb,m,,1\n", "missing"),
        ("example_id,method,value\na,m,1\nb,m,1\na,m,2\n", "two scores"),
        ("example_id,method,value\na,loss,1\nb,loss,1\n", "of this name already"),
        ("example_id,method,target,value\na,m,scores,1\nb,m,scores,1\n", "not compared"),
    ],
)
def test_tables_that_do_not_fit_are_refused_by_name(tmp_path, rows, what):
    file = tmp_path / "scores.csv"
    file.write_text(rows)
    with pytest.raises(UserError, match=what):
        placed(read_scores(file), IDS, ["score", "behavior:harmless"], {"loss"})


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
    some = ("adjoint+adam", "difference:vector-filter", "difference:adjoint")
    first = call("--run", str(compared.folder), "--methods", *some)
    assert first["complete"]
    rows = {(r["method"], r["target"]): r for r in first["rows"] if r["subsets"] == "random"}
    for key, row in lds(compared).items():
        if key[0] in ("adjoint", "adjoint+adam", "random", "loss", "gradient-cosine"):
            assert rows[key]["raw"] == pytest.approx(row["raw"], abs=1e-9)
            assert rows[key]["controlled"] == pytest.approx(row["controlled"], abs=1e-9)
    assert {"adjoint", *some, "bm25"} <= {method for method, _ in rows}
    kept = pq.read_table(tmp_path / "data/scores.parquet").to_pylist()
    once = [r for r in kept if r["method"] == "difference:adjoint"]
    assert len(once) == 14 and all(row["target"] is None for row in once)  # for every target
    assert {t for m, t in rows if m == "difference:adjoint"} == {t for _, t in rows}
    others = {row["other"] for row in first["summary"]["differences"]}
    assert others == {"adjoint", "difference:vector-filter", "difference:adjoint", "adjoint/norm", "adjoint+adam/norm"}
    assert {"all baselines", *some} <= set(first["summary"]["costs"])
    assert first["summary"]["planted"]["adjoint+adam"]["planted"] == 6
    monkeypatch.setattr(module, "Opened", lambda *_: None)  # nothing can be computed
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


def test_the_committed_data_are_of_this_benchmark(benchmark, tmp_path):
    """Its tables are read as they stand: every regime is compared from them, and nothing is computed."""
    module, _ = benchmark
    kept = json.loads((module.DATA / "scores.json").read_text())
    assert set(kept["methods"]) == set(module.METHODS)
    table = module.ScoreTable.open(module.DATA, kept["conditions"], fresh=False)
    every = placed(table.rows, {row.example_id for row in table.rows}, table.targets)
    assert {*module.NAMES, *module.METHODS} - {module.BASELINES} == set(every)
    for regime in module.RANKED:
        folder = module.DATA / regime
        made = json.loads((folder / "made.json").read_text())
        for name, digest in made["sha256"].items():
            assert sha256_file(folder / name) == digest
        assert made["examples sha256"] == kept["conditions"]["examples.path sha256"]
        tables = [pq.read_table(folder / f"{name}.parquet") for name in ("subsets", "outcomes")]
        inclusion = json.loads((folder / "validation.json").read_text())["inclusion"]
        found = truths(*tables, inclusion, table.targets)
        assert found and all(set(truth.measured) == set(table.targets) for truth in found)
