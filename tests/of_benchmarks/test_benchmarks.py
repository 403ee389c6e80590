"""The benchmarks on a tiny model: what they write can be read, adds up, and survives being stopped."""

from __future__ import annotations

import contextlib
import io
import json
import sys
from pathlib import Path

import numpy as np
import pytest

from tiny_study import write_tiny_study

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    study = write_tiny_study(tmp_path_factory.mktemp("tiny"))
    study.write_text(study.read_text().replace("prompts.jsonl,", "prompts.jsonl, limit: 12,"))
    return study


@pytest.fixture
def benchmarks(monkeypatch):
    """The package ``benchmarks``, which lies beside src and is not installed."""
    monkeypatch.syspath_prepend(str(ROOT))
    import benchmarks.adjoint_vs_step
    import benchmarks.big_tables
    import benchmarks.common
    import benchmarks.concepts
    import benchmarks.peer_dattri
    import benchmarks.peers
    import benchmarks.smda_loop

    return benchmarks


@pytest.fixture
def measured(benchmarks, monkeypatch, capsys):
    """Run a benchmark as its command does, but in this process; what it printed."""

    def run(name: str, *flags: str) -> str:
        monkeypatch.setattr(sys, "argv", [f"{name}.py", *flags])
        capsys.readouterr()
        getattr(benchmarks, name).main()
        return capsys.readouterr().out

    return run


def read(folder: Path, name: str) -> dict:
    return json.loads((folder / f"{name}.json").read_text())


def check_circumstances(record: dict, name: str) -> None:
    assert record["name"] == name
    assert record["command"].startswith(f"python -m benchmarks.{name} ")
    assert {"cpu", "cores", "threads", "memory_gb"} <= set(record["machine"])
    assert {"python", "torch", "transformers", "numpy", "taught"} <= set(record["versions"])
    assert record["date"].endswith("+00:00")
    assert record["peak_memory_gb"] > 0
    facts = record["conditions"]
    assert (facts["prompts"], facts["examples"]) == (12, 8)
    assert facts["tree_tokens"] < facts["prompt_tokens"]


def test_smda_loop_writes_every_way_and_says_what_is_extrapolated(tiny, tmp_path, measured):
    out = measured("smda_loop", "--study", str(tiny), "--out", str(tmp_path), "--loop-examples", "2", "--coefficients")
    record = read(tmp_path, "smda_loop")
    check_circumstances(record, "smda_loop")
    assert record["complete"]
    rows = {row["method"]: row for row in record["rows"]}
    loop, trees = rows["published loop"], rows["finite step, token trees"]
    assert (loop["examples_timed"], trees["examples_timed"]) == (2, 1)
    for row in record["rows"]:
        by_adjoint = row["method"].startswith("adjoint")
        assert row["extrapolated"] is not by_adjoint
        expected = row["seconds_before"] + 8 * row["seconds_per_example"]
        assert row["seconds_all_examples"] == pytest.approx(expected)
        ratio = loop["seconds_all_examples"] / row["seconds_all_examples"]
        assert row["times_faster_than_loop"] == pytest.approx(ratio)
    assert len(rows) == 4 and len(loop["checked"]) == 2
    assert out.count("(extrapolated)") == 2 and out.count("(measured)") == 2


def test_concepts_times_every_method_on_the_same_examples(tiny, tmp_path, measured):
    measured("concepts", "--study", str(tiny), "--out", str(tmp_path), "--few", "1", "--rounds", "2")
    record = read(tmp_path, "concepts")
    check_circumstances(record, "concepts")
    assert record["complete"]
    rows = {row["method"]: row for row in record["rows"]}
    gradients = [f"gradient, {how}" for how in ("adjoint", "adjoint, EK-FAC", "forward", "finite-step")]
    assert list(rows) == [
        *gradients,
        "vector filter",
        "projection difference, own response",
        "projection difference, training",
    ]
    for row in rows.values():
        assert row["ms_a_example"] == pytest.approx(1000 * row["seconds"] / row["examples"])
    half, every = rows["gradient, adjoint, EK-FAC"]["fits_seconds_cpu_tokens"]
    passes = (every[1] - half[1]) / (every[2] - half[2]) * every[2]
    fitting = rows["gradient, adjoint, EK-FAC"]["cpu_ms_a_example_of_fitting"]
    assert fitting == pytest.approx(1000 * passes / 8)
    ratio = record["summary"]["gradient, forward over vector filter"]
    costs = [rows[name]["cpu_ms_a_example"] for name in ("gradient, forward", "vector filter")]
    assert ratio == pytest.approx(costs[0] / costs[1])


@pytest.mark.parametrize("name", ["smda_loop", "adjoint_vs_step"])
def test_a_benchmark_also_runs_as_a_file_from_anywhere(name, python):
    done = python(str(ROOT / "benchmarks" / f"{name}.py"), "--help")
    assert done.returncode == 0 and "--random-sae" in done.stdout, done.stderr


def test_the_loop_and_the_token_trees_time_the_same_quantity(tiny, tmp_path, benchmarks):
    """A benchmark of something else than the method would be fast for the wrong reason."""
    benchmarks.smda_loop.main(
        [
            "--study",
            str(tiny),
            "--out",
            str(tmp_path),
            "--examples",
            "4",
            "--loop-examples",
            "4",
            "--tree-examples",
            "4",
        ]
    )
    rows = {row["method"]: row for row in read(tmp_path, "smda_loop")["rows"]}
    loop, trees = (
        {check["example_id"]: check["S"] for check in rows[name]["checked"]}
        for name in ("published loop", "finite step, token trees")
    )
    assert loop.keys() == trees.keys() and len(loop) == 4
    largest = max(map(abs, loop.values()))
    assert all(abs(loop[example] - trees[example]) < 0.02 * largest for example in loop)
    for check in rows["published loop"]["checked"]:
        assert abs(check["S"] - check["S_adjoint"]) < 0.02 * largest
    assert not rows["published loop"]["extrapolated"]


def test_adjoint_vs_step_writes_steps_halves_and_refits(tiny, tmp_path, benchmarks, monkeypatch):
    flags = ["--study", str(tiny), "--out", str(tmp_path), "--top", "3", "--small", "2"]
    monkeypatch.setattr(sys, "argv", ["adjoint_vs_step.py", *flags, "--float64", "1"])
    benchmarks.adjoint_vs_step.main()
    record = read(tmp_path, "adjoint_vs_step")
    check_circumstances(record, "adjoint_vs_step")
    assert record["complete"]
    rows = record["rows"]
    assert [row["set"] for row in rows] == ["top"] * 3 + ["small"] * 2
    assert len({row["example_id"] for row in rows}) == 5
    every = record["conditions"]["adjoint_of_all_examples"]
    assert len(every) == 8
    leading = sorted(every, key=lambda example: -abs(every[example]))[:3]
    assert [row["example_id"] for row in rows[:3]] == leading
    for row in rows:
        assert row["adjoint"] == pytest.approx(row["adjoint_x"] + row["adjoint_y"])
        assert row["step"] == pytest.approx(row["step_x"] + row["step_y"])
        assert row["richardson"] == pytest.approx(2 * row["half"] - row["step"])
        assert row["half"] == pytest.approx(row["step"], rel=0.1)
        assert row["refit"] == pytest.approx(row["step"], rel=0.1)
        assert row["relative_step"] < 0.05
    (double,) = [row for row in rows if "step_float64" in row]
    assert double["relative_float64"] < 0.005  # neither rounding nor second order: far below 5%
    assert record["summary"]["passed"] is True


def test_big_tables_asks_what_it_wrote_and_leaves_no_run_behind(tmp_path, measured, monkeypatch):
    """The first question is asked in a process of its own, as all are by the command; the others here."""
    import subprocess

    real, asked = subprocess.run, []

    def run(command, **how):
        asked.append(command[0])
        if len(asked) == 1:
            return real(command, **how)
        program = command[command.index("-c") + 1]
        with contextlib.redirect_stdout(io.StringIO()) as out:
            exec(program, {})
        return subprocess.CompletedProcess(command, 0, out.getvalue(), "")

    monkeypatch.setattr(subprocess, "run", run)
    sizes = ["--examples", "60", "--features", "3"]
    measured("big_tables", *sizes, "--folder", str(tmp_path), "--out", str(tmp_path / "results"))
    assert set(asked) == {sys.executable} and len(asked) == 9
    record = read(tmp_path / "results", "big_tables")
    assert record["complete"] and record["conditions"] == {"examples": 60, "features": 3, "groups": 2}
    rows = {row["step"]: row["rows"] for row in record["rows"]}
    assert rows["write scores"] == 60 * (3 + 2 + 3 * 3)
    assert rows["top 20 of a coefficient"] == rows["top 20 by score"] == 20
    assert rows["quantiles of the score by label"] == rows["quantiles of a coefficient by label"] == 2
    assert rows["SQL: one example's coefficients, all row groups"] == 3
    assert rows["the report"] == 60
    assert [path.name for path in tmp_path.glob("tmp*")] == []


def test_corpus_scale_means_by_bin_are_those_of_exact_effects(tmp_path, monkeypatch, benchmarks):
    import benchmarks.corpus_scale as scale

    from taught.core.driver import Method, scores
    from taught.core.estimator import Work
    from taught.core.readings import Readings
    from taught.core.target import TargetSet
    from taught.data.corpus import open_corpus
    from taught.data.documents import encode_document

    monkeypatch.setattr(scale, "CHUNK", 16)
    monkeypatch.setattr(scale, "SHARD", 25)
    monkeypatch.setattr(scale, "DIM", 4096)
    scale.write_corpus(tmp_path / "corpus", 40)
    corpus, (tokenizer, problem) = open_corpus(tmp_path / "corpus"), scale.subject()
    means, counts = scale.ask(tmp_path / "store", problem, scale.fill(tmp_path / "store", problem, tokenizer, corpus))
    examples = [w.example() for record in corpus for w in encode_document(tokenizer, record, 64)]
    ids = [p.id for p in problem.prompts]
    readings = Readings(tuple(ids), np.zeros(40), {"0": ids[:20], "1": ids[20:]}, {})
    exact = scores(problem, examples, TargetSet.of(["behavior:0", "behavior:1"], readings), Method(), Work())
    bins = [int(r.category) * scale.FORMATS + int(r.flags["format"]) for r in corpus]
    assert counts.tolist() == np.bincount(bins, minlength=96).tolist()
    # Of the 40 documents some are of the second group's topic and none of the first one's.
    expected = np.bincount(bins, exact.values[:, 1], minlength=96)[counts > 0] / counts[counts > 0]
    assert np.corrcoef(means[1, counts > 0], expected)[0, 1] > 0.8


@pytest.mark.slow
def test_load_runs_every_command_and_says_what_a_example_costs(tmp_path, python):
    done = python(
        "-m",
        "benchmarks.load",
        "--examples",
        "6",
        "12",
        "--estimators",
        "adjoint",
        "--folder",
        str(tmp_path),
        "--out",
        str(tmp_path / "results"),
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    record = read(tmp_path / "results", "load")
    assert record["complete"]
    stages = ["readings", "policy", "attribute", "curate", "report"]
    assert [row["command"] for row in record["rows"]] == 2 * stages
    assert [row["examples"] for row in record["rows"]] == [6] * 5 + [12] * 5
    for row in record["rows"]:
        assert row["examples_per_second"] == pytest.approx(row["examples"] / row["seconds"])
        assert row["seconds"] > row["stage_seconds"] and row["peak_memory_gb"] > 0.05
    assert list(record["summary"]["adjoint"]) == stages
    assert [path.name for path in tmp_path.glob("tmp*")] == []


def test_richardson_removes_the_second_order(benchmarks):
    def step(lr: float) -> dict:
        values = {"x": 3 * lr + 5 * lr**2, "y": -lr + 2 * lr**2}
        total = sum(values.values())
        return {**values, "total": total, "refit": total, "refit_encoded_anew": total}

    adjoint = {"x": 0.3, "y": -0.1, "total": 0.2}
    row = benchmarks.adjoint_vs_step.compare(adjoint, step(0.1), step(0.05))
    for suffix in ("", "_x", "_y"):
        assert row[f"richardson{suffix}"] == pytest.approx(row[f"adjoint{suffix}"], rel=1e-12)
    off = [abs(row[name] - row["adjoint"]) for name in ("step", "half")]
    assert off[0] == pytest.approx(2 * off[1])
    assert row["relative_step"] == pytest.approx(0.07 / 0.27)


def test_chosen_examples_are_the_largest_and_some_of_the_smaller_half(benchmarks):
    scores = np.array([1.0, -9.0, 0.1, 5.0, -0.2, 0.3, -4.0, 2.0])
    top, small = benchmarks.adjoint_vs_step.choose(scores, 3, 2, seed=0)
    assert top == [1, 3, 6]
    assert len(set(small)) == 2 and set(small) <= {0, 2, 4, 5}
    assert benchmarks.adjoint_vs_step.choose(scores, 3, 2, seed=0) == (top, small)
    top, small = benchmarks.adjoint_vs_step.choose(scores, 20, 5, seed=0)
    assert sorted(top) == list(range(8)) and small == []


def test_the_verdict_needs_both_closeness_and_ranks(benchmarks):
    def rows(*steps: float) -> list[dict]:
        fixed = {"half": 1.0, "richardson": 1.0, "refit": 1.0, "set": "top"}
        made = [fixed | {"adjoint": 1.0 + i / 100, "step": s} for i, s in enumerate(steps)]
        for row in made:
            for name in ("step", "half", "richardson"):
                row[f"relative_{name}"] = benchmarks.adjoint_vs_step.relative(row["adjoint"], row[name])
        return made

    summarise = benchmarks.adjoint_vs_step.summarise
    assert summarise(rows(1.0, 1.01, 1.02))["passed"] is True
    assert summarise(rows(1.02, 1.01, 1.0))["passed"] is False  # close, in the wrong order
    assert summarise(rows(1.0, 1.01, 1.2))["passed"] is False  # in order, too far


def test_a_stopped_measurement_keeps_its_rows(tiny, tmp_path, benchmarks, monkeypatch):
    real, calls = benchmarks.adjoint_vs_step.step_scores, []

    def stopped(*args):
        calls.append(args)
        if len(calls) > 4:  # two steps an example: during the third example
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(benchmarks.adjoint_vs_step, "step_scores", stopped)
    with pytest.raises(SystemExit) as stop:
        benchmarks.adjoint_vs_step.main(["--study", str(tiny), "--out", str(tmp_path)])
    assert stop.value.code == 130
    record = read(tmp_path, "adjoint_vs_step")
    assert not record["complete"] and len(record["rows"]) == 2


def test_a_random_sae_is_marked_and_never_takes_the_place_of_a_measurement(tiny, tmp_path, benchmarks):
    benchmarks.smda_loop.main(
        ["--study", str(tiny), "--out", str(tmp_path), "--random-sae", "24", "--loop-examples", "1"]
    )
    assert [path.name for path in tmp_path.iterdir()] == ["smda_loop-trial.json"]
    assert read(tmp_path, "smda_loop-trial")["conditions"]["sae"] == "random, 24 features"


def test_a_users_mistake_is_one_message_and_code_2(tmp_path, benchmarks, capsys):
    with pytest.raises(SystemExit) as stop:
        benchmarks.smda_loop.main(["--study", "no-such-study", "--out", str(tmp_path)])
    assert stop.value.code == 2
    assert not any(tmp_path.iterdir())


def test_record_writes_null_for_what_is_not_defined(tmp_path, benchmarks, monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["benchmarks/some.py", "--flag", "two words"])
    rows = [{"a": 1.5, "b": float("nan")}, {"a": 2.5, "c": "text"}]
    benchmarks.common.record("some", rows, {"x": float("inf")}, folder=tmp_path)
    record = read(tmp_path, "some")
    assert record["rows"] == [{"a": 1.5, "b": None}, {"a": 2.5, "c": "text"}]
    assert record["conditions"] == {"x": None}
    assert record["command"] == "python -m benchmarks.some --flag 'two words'"
    assert "text" in capsys.readouterr().out


@pytest.mark.slow
def test_peers_builds_a_store_and_names_who_is_left_out(tiny, tmp_path, python):
    done = python(
        "-m",
        "benchmarks.peers",
        "--study",
        str(tiny),
        "--out",
        str(tmp_path),
        "--examples",
        "6",
        "--checked",
        "5",
        "--numbers",
        "6400",
        "--rounds",
        "1",
        "--threads",
        "1",
        "--bergson",
        sys.executable,
        cwd=ROOT,
    )
    assert done.returncode == 0, done.stderr
    record = read(tmp_path, "peers")
    assert record["complete"] and record["conditions"]["examples"] == 6
    assert record["conditions"]["left_out"] == ["dattri: --dattri was not given"]
    ours, plain, *peers = record["rows"]
    for row in (ours, plain):
        assert (row["examples"], row["numbers_per_example"]) == (6, 6400)
        assert row["seconds"] == row["seconds_of_all_runs"][0] > 0
        assert 0 < row["squared_error_of_all"] < 10 / 6400
    assert plain["spearman_with_taught"] > 0.99 and "by torch" in plain["how"]
    for row in peers:  # there is no Bergson in this environment, and that stops nobody else
        assert "bergson" in row["error"] and "seconds" not in row
    assert record["summary"]["seconds_taught"] == ours["seconds"]


def test_peers_refuses_an_interpreter_that_is_not_there(tiny, tmp_path, benchmarks):
    with pytest.raises(SystemExit) as stop:
        benchmarks.peers.main(["--study", str(tiny), "--out", str(tmp_path), "--dattri", str(tmp_path / "python")])
    assert stop.value.code == 2
    assert not any(tmp_path.iterdir())


def test_exact_products_are_those_of_autograd(tiny, benchmarks):
    import torch

    args = benchmarks.peers.argparse.Namespace(study=str(tiny), examples=4, tokens=[512])
    subject, examples = benchmarks.peers._opened(args)
    model = subject.loaded.model
    exact = benchmarks.peers.exact_products(model, examples)
    from taught.core.example import batch_examples

    whole, blocks = [], []
    for example in examples:
        (batch,) = batch_examples([example], 512)
        grads = torch.autograd.grad(batch.losses(model).sum(), list(model.parameters()))
        named = dict(zip(dict(model.named_parameters()), grads, strict=True))
        whole.append(torch.cat([g.flatten() for g in named.values()]))
        blocks.append(torch.cat([g.flatten() for n, g in named.items() if "_proj" in n]))
    for name, rows in (("all parameters", whole), ("linear layers of the blocks", blocks)):
        gram = (torch.stack(rows) @ torch.stack(rows).T).numpy()
        np.testing.assert_allclose(exact[name], gram, rtol=1e-3, atol=1e-4 * gram.max())
    assert benchmarks.peers.error(exact["all parameters"], exact["all parameters"]) == 0


def test_the_loss_that_dattri_is_given_is_taughts(tiny, benchmarks):
    import torch

    from taught.core.example import example_losses

    args = benchmarks.peers.argparse.Namespace(study=str(tiny), examples=5, tokens=[512])
    subject, examples = benchmarks.peers._opened(args)
    batch = benchmarks.peer_dattri.padded([{"ids": list(example.ids), "start": example.start} for example in examples])
    with torch.no_grad():
        found = benchmarks.peer_dattri.mean_loss(subject.loaded.model, batch, "cpu")
    wanted = example_losses(subject.loaded.model, examples, 512).mean()
    assert float(found) == pytest.approx(float(wanted), rel=1e-5)


def test_peers_chooses_examples_over_all_lengths(tiny, benchmarks):

    from taught.core.example import sft

    examples = [sft(str(n), tuple(range(n)), 1) for n in (9, 3, 30, 5, 12)]
    chosen = benchmarks.peers.spread_over(examples, 3)
    assert [len(example.ids) for example in chosen] == [3, 9, 30]
    assert len(benchmarks.peers.spread_over(examples, 9)) == 5
