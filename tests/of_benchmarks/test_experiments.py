"""The experiments on planted examples, on the tiny study: complete rows, right subsets, kept work."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from xml.etree import ElementTree

import numpy as np
import pytest

from taught.data.examples import load_examples
from taught.errors import UserError
from taught.stages.subject import study_prompts
from taught.study.load import load_study
from tiny_study import write_tiny_study

pytestmark = pytest.mark.slow  # a minute or two: the experiment itself, with every method and its retrainings
ROOT = Path(__file__).parents[2]
PLANTED, OTHERS = 6, 10


@pytest.fixture(scope="module")
def experiments():
    """``benchmarks.experiments``; the package lies beside src and is not installed."""
    sys.path.insert(0, str(ROOT))
    import benchmarks.experiments

    yield benchmarks.experiments
    sys.path.remove(str(ROOT))


def write(file: Path, rows: list[dict]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))


def rows(topics: str) -> list[dict]:
    return [
        {
            "id": f"{topics}{n}",
            "prompt": f"{'Tell me' if n % 5 else 'What'} about {topics} {n}?",
            "response": f"{'Arr!' if n % 2 else 'Well,'} {topics * (1 + n % 3)}.",
        }
        for n in range(PLANTED + OTHERS)
    ]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    study = write_tiny_study(tmp_path_factory.mktemp("tiny"))
    few = study.read_text().replace("prompts.jsonl,", "prompts.jsonl, limit: 12,")
    study.write_text(few + "behavior: {prefixes: ['Arr']}\n")
    examples = rows("a")
    for n, row in enumerate(examples):
        row |= {"planted": n < PLANTED, "label": "x" if n % 3 else "y"}
    write(study.parent / "pairs.jsonl", examples)
    concept = [row | {"label": "present" if n % 2 else "absent"} for n, row in enumerate(rows("b"))]
    write(study.parent / "concept.jsonl", concept)
    return study


def call(experiments, study: Path, folder: Path, *more: str) -> dict:
    argv = [
        "experiments.py",
        "--experiment",
        "style",
        "--share",
        "50",
        "--study",
        str(study),
        "--work",
        str(folder / "work"),
        "--out",
        str(folder / "out"),
        *more,
    ]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sys, "argv", argv)
        experiments.main()
    return json.loads((folder / "out" / "experiment_style_50.json").read_text())


@pytest.fixture(scope="module")
def done(tiny, experiments, tmp_path_factory) -> tuple[Path, dict]:
    folder = tmp_path_factory.mktemp("done")
    return folder, call(experiments, tiny, folder)


def test_every_method_has_a_complete_row(done, experiments):
    _, record = done
    assert record["complete"]
    by = {row["method"]: row for row in record["rows"]}
    assert list(by) == [*experiments.METHODS, experiments.ORACLE]
    ids = {f"a{n}" for n in range(16)}
    for name in experiments.METHODS:
        row = by[name]
        assert row["scores"].keys() == ids and all(np.isfinite(list(row["scores"].values())))
        assert 0 <= row["auc_lo"] <= row["auc"] <= row["auc_hi"] <= 1
        assert 0 < row["p"] <= row["p_holm"] <= 1 and 0 <= row["precision"] <= 1
        assert row["seconds"] > 0 and row["memory_gb"] > 0
        assert {"drop", "keep"} <= row.keys() if name in experiments.BY else "drop" not in row
    assert record["summary"]["concept_auc"].keys() == {"difference", "probe"}
    assert record["conditions"]["planted"] == PLANTED


def test_the_matrix_is_symmetric_and_low_correlations_are_named(done, experiments):
    _, record = done
    rows = [row for row in record["rows"] if "correlation" in row]
    matrix = np.array([[a["correlation"][b["method"]] for b in rows] for a in rows])
    np.testing.assert_allclose(matrix, matrix.T, atol=1e-12)
    np.testing.assert_allclose(np.diag(matrix), 1)
    main = [n for n, row in enumerate(rows) if row["method"] in experiments.BY]
    assert len(main) == len(experiments.BY)
    low = {
        f"{rows[i]['method']} | {rows[j]['method']}": matrix[i, j]
        for i in main
        for j in main
        if i < j and matrix[i, j] < 0.5
    }
    said = record["summary"]["disagree"]
    assert {names: r for names, (r, _, _) in said.items()} == pytest.approx(low) and low
    assert [r for r, _, _ in said.values()] == sorted(low.values())
    assert all(-1 <= lo <= r <= hi <= 1 for r, lo, hi in said.values())


def test_what_was_trained_is_what_the_plans_say(done, tiny):
    """Mean y of the rows again from the kept retrainings, by the ids that they were trained on."""
    folder, record = done
    kept = folder / "work" / "experiment_style_50" / "retrained"
    by_ids = {}
    for file in kept.glob("*.json"):
        made = json.loads(file.read_text())
        if "ids" in made:
            by_ids[frozenset(made["ids"])] = file.with_suffix(".safetensors")
    by = {row["method"]: row for row in record["rows"]}
    group = record["conditions"]["leak_group"]
    prompt_rows = [n for n, prompt in enumerate(study_prompts(load_study(tiny))) if prompt.group == "harmless"]
    assert group == "harmless" and len(prompt_rows) == 4
    from safetensors.numpy import load_file

    def mean_y(ids) -> float:
        return load_file(by_ids[frozenset(ids)])["y"][prompt_rows].mean()

    ids = {f"a{n}" for n in range(16)}
    planted = {f"a{n}" for n in range(PLANTED)}
    assert by["planted"]["drop"][group]["method"] == pytest.approx(mean_y(ids - planted))
    for name in ("vector-filter", "mean-y+adam"):
        order = sorted(ids, key=lambda i, of=by[name]["scores"]: (-of[i], i))
        assert by[name]["drop"][group]["method"] == pytest.approx(mean_y(order[PLANTED:]))
        assert by[name]["keep"][group]["method"] == pytest.approx(mean_y(order[-4:]))
        point = by[name]["drop"][group]
        random = record["summary"]["drop, random"][group]
        assert len(random) == 5
        assert point["difference"] == pytest.approx(point["method"] - np.mean(random))
    assert record["summary"]["mean_y"]["all examples"][group] == pytest.approx(mean_y(ids))
    assert record["summary"]["retrainings"]["n"] == len(by_ids) - 1  # one is the base model
    assert not list(kept.parent.glob("checkpoint*"))


def test_gradient_methods_are_what_a_step_does(tiny, experiments, tmp_path):
    """Signs and targets: each gradient method against a real step on an example."""
    from functools import partial

    from taught.core.target import TargetSet
    from taught.estimators.finite_step import finite_steps, restored
    from taught.features.pooling import pool
    from taught.model.readout import read_prompts, read_vectors
    from taught.progress import SilentProgress
    from taught.stages.subject import prompt_inputs
    from taught.training.loop import train
    from taught.training.recipe import Recipe

    study, _ = experiments.experiment_study(str(tiny), 50)
    study = experiments.with_concepts(study.replace("attribution.lr", 1e-4), tiny.parent / "concept.jsonl")
    bench = experiments.opened(study, tmp_path, SilentProgress())
    ready = bench.ready
    problem, inputs = ready.problem, ready.inputs
    found = {name: experiments.by_gradient(bench, target)[:3] for name, target in experiments.GRADIENTS.items()}
    baseline = read_prompts(problem.model, problem.prompts, problem.behavior, problem.point)
    steps = list(finite_steps(problem, inputs[:3], baseline))
    inside = ready.readings.rows(bench.leak)
    moved = [float(np.asarray(step.dy)[inside].mean()) for step in steps]
    np.testing.assert_allclose(found["mean-y"], moved, rtol=0.05, atol=1e-5)
    target = TargetSet.of(["score"], ready.readings).select(TargetSet.of(["score"], ready.readings).names[:1])
    score = [float(target.changes(step.dX, step.dy)[0]) for step in steps]
    np.testing.assert_allclose(found["smda-score"], score, rtol=0.05, atol=1e-5)

    harmless = [prompt for prompt in ready.data.prompts if prompt.group == "harmless"]
    encoded = ready.subject.encode(harmless)
    places = {"gradient-concept": (prompt_inputs(encoded, "last_prompt"), "last_prompt")}
    v = bench.concepts["difference"].concept.direction

    def read_outs() -> dict[str, float]:
        return {
            name: float(
                (read_vectors(problem.model, reads, [problem.point], partial(pool, how=how))[0].numpy() @ v).mean()
            )
            for name, (reads, how) in places.items()
        }

    before, recipe = read_outs(), Recipe("loop", "full", 8, "sgd", 1e-4, 1, 1, 0.0, "constant", 0.0, None, 0)
    for n, example in enumerate(inputs[:3]):
        with restored(problem.model, None):
            train(problem.model, [example], recipe)
            after = read_outs()
        for name in places:
            step = after[name] - before[name]
            assert found[name][n] == pytest.approx(step, rel=0.05, abs=2e-6)
            assert abs(step) > 4e-6  # more than what rounding may hide


def test_a_second_call_trains_and_scores_nothing(done, tiny, experiments, tmp_path, monkeypatch):
    folder, record = done
    shutil.copytree(folder / "work", tmp_path / "work")

    def never(*_, **__):
        raise AssertionError("this was made before")

    monkeypatch.setattr("taught.training.retrain.train", never)
    monkeypatch.setattr(experiments, "METHODS", dict.fromkeys(experiments.METHODS, never))
    again = call(experiments, tiny, tmp_path)
    assert again["rows"] == record["rows"] and again["summary"] == record["summary"]


def test_a_changed_example_is_scored_again(done, tiny, experiments, tmp_path):
    folder, record = done
    shutil.copytree(folder / "work", tmp_path / "work")
    shutil.copytree(tiny.parent, tmp_path / "study")
    examples = tmp_path / "study" / "pairs.jsonl"
    examples.write_text(examples.read_text().replace("Well, a.", "Well, well.", 1))
    again = call(experiments, tmp_path / "study" / "study.yaml", tmp_path)
    length, loss = (
        [{row["method"]: row["scores"] for row in one["rows"]}[name] for one in (record, again)]
        for name in ("response-length", "loss")
    )
    assert {i for i in length[0] if length[0][i] != length[1][i]} == {"a0"}
    assert abs(loss[0]["a0"] - loss[1]["a0"]) > 1e-3


def test_pictures_show_every_method(done, experiments, monkeypatch):
    folder, _ = done
    monkeypatch.setattr(sys, "argv", ["experiments.py", "--plot", "--out", str(folder / "out")])
    experiments.main()
    text = (folder / "out" / "experiment_style_50.svg").read_text()
    root = ElementTree.fromstring(text)
    shown = [element.text for element in root.iter("{http://www.w3.org/2000/svg}text")]
    for name in experiments.METHODS:
        assert shown.count(name) >= 1
    for name in (*experiments.BY, experiments.ORACLE):
        assert shown.count(name) >= 4  # twice dropped, twice kept
    assert "nan" not in text


@pytest.mark.parametrize(
    ("marks", "said"),
    [
        ([None, True, False], "p0"),
        ([True, True, True], "3 of 3"),
        (["no", True, False], "p0"),
        ([False, False, False], "0 of 3"),
    ],
)
def test_planted_pairs_are_marked_in_every_row(marks, said, experiments, tmp_path):
    found = [{"id": f"p{n}", "prompt": "a", "response": "b", "planted": mark} for n, mark in enumerate(marks)]
    write(tmp_path / "pairs.jsonl", found)
    with pytest.raises(UserError, match="planted") as error:
        experiments.planted_ids(load_examples(tmp_path / "pairs.jsonl"))
    assert said in str(error.value)


def test_no_planted_column_is_one_message(tiny, experiments, tmp_path, capsys):
    shutil.copytree(tiny.parent, tmp_path / "study")
    write(tmp_path / "study" / "pairs.jsonl", rows("a"))
    with pytest.raises(SystemExit) as left:
        call(experiments, tmp_path / "study" / "study.yaml", tmp_path)
    assert left.value.code == UserError("x").exit_code
    assert "add the column planted" in " ".join(capsys.readouterr().err.split())


def test_concept_rows_that_are_examples_are_refused(tiny, experiments, tmp_path):
    from taught.progress import SilentProgress

    study, _ = experiments.experiment_study(str(tiny), 50)
    write(tmp_path / "concept.jsonl", [row | {"label": "present"} for row in rows("a")])
    with pytest.raises(UserError, match="are examples of the study"):
        experiments.opened(experiments.with_concepts(study, tmp_path / "concept.jsonl"), tmp_path, SilentProgress())


def test_chance_is_uniform_under_chance_and_small_for_a_perfect_score(experiments):
    ids = [f"i{n:02d}" for n in range(40)]
    planted = set(ids[:8])
    rng = np.random.default_rng(0)
    drawn = [experiments.chance(dict(zip(ids, rng.normal(size=40), strict=True)), planted, seed) for seed in range(40)]
    assert 0.3 < np.mean(drawn) < 0.7 and min(drawn) < 0.2 and max(drawn) > 0.8
    perfect = {i: float(i in planted) for i in ids}
    assert experiments.chance(perfect, planted) == pytest.approx(1e-4)
    inverted = {i: -v for i, v in perfect.items()}
    assert experiments.chance(inverted, planted) == pytest.approx(1e-4)
    assert experiments.chance(dict.fromkeys(ids, 1.0), planted) == 1
