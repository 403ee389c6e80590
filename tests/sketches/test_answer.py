"""Later questions to a run's sketches: the same answers as a whole run, and no model."""

from __future__ import annotations

import csv
import io
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import taught.model.load as load
from taught.cli.app import run_command
from taught.core.scores import Scores
from taught.curvatures.autocorrelation import Fitted, choose_damping
from taught.errors import UserError
from taught.run.folder import RunFolder
from taught.stages.ask import Question, ask
from taught.stages.attribute import attribute
from taught.stages.policy import policy
from taught.stages.readings import readings
from taught.study.load import load_study
from tiny_study import write_tiny_study


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    made = tmp_path_factory.mktemp("ask")
    write_tiny_study(made)
    attributed(made, "run")
    return made


def attributed(folder: Path, name: str, **changes: Any) -> RunFolder:
    study = load_study(folder / "study.yaml")
    fixed = {"prompts.limit": 12, "attribution.estimator": {"kind": "sketch", "dim": 4096, "store": "store"}}
    for key, value in {**fixed, **changes}.items():
        study = study.replace(key.replace("__", "."), value, base=folder)
    run = RunFolder(folder / name)
    for stage in (readings, policy, attribute):
        stage(study, run)
    return run


@pytest.fixture
def run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    def no_model(*_: object, **__: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(load, "load_model", no_model)
    return RunFolder.open(folder / "run")


def by_example(scores: Scores) -> dict[str, float]:
    return scores.by_example(scores.targets[0])


def in_table(run: RunFolder, target: str) -> dict[str, float]:
    rows = run.read_table("scores").to_pylist()
    return {row["example_id"]: row["value"] for row in rows if row["target"] == target}


def close(found: dict[str, float], wanted: dict[str, float]) -> None:
    assert found.keys() == wanted.keys()
    scale = max(map(abs, wanted.values()))
    assert found == pytest.approx(wanted, abs=1e-5 * scale)


def test_the_runs_own_questions_have_the_runs_own_answers(run: RunFolder) -> None:
    feature = run.read_table("coefficients")["feature_id"][2].as_py()
    for target in ("score", f"coefficient:{feature}"):
        found = ask(run, Question(target))
        assert [str(name) for name in found.targets] == [target, f"{target}:x", f"{target}:y"]
        for name in found.targets:
            close(found.by_example(name), in_table(run, str(name)))
    close(by_example(ask(run, Question("behavior:harmful"))), in_table(run, "behavior:harmful"))


def test_another_penalty_and_fewer_features_are_a_run_of_their_own(folder: Path, run: RunFolder) -> None:
    ids = run.read_table("coefficients")["feature_id"].to_pylist()[:3]
    found = ask(run, Question(alpha=7.0, intercept=False, features=tuple(ids)))
    arrays, names = run.read_tensors("activations")
    assert len(found) == 8 and set(ids) <= set(names["feature_ids"])
    y = run.read_tensors("readouts")[0]["y"]
    keep = [names["feature_ids"].index(k) for k in sorted(ids)]
    X = arrays["X"][:, keep].astype(np.float64)
    coef = np.linalg.solve(X.T @ X + 7.0 * np.eye(3), X.T @ y)
    sums = sum(
        w
        * np.array(
            [
                by_example(ask(run, Question(f"coefficient:{k}", alpha=7.0, intercept=False, features=tuple(ids))))[p]
                for p in sorted(by_example(found))
            ]
        )
        for w, k in zip(coef, sorted(ids), strict=True)
    )
    np.testing.assert_allclose([by_example(found)[p] for p in sorted(by_example(found))], sums, rtol=1e-4)


def test_a_prompts_own_effect_and_a_categorys_mean(run: RunFolder) -> None:
    arrays, ids = run.read_tensors("prompt_effects")
    one = ask(run, Question("prompt:q04"))
    wanted = dict(zip(ids["example_ids"], arrays["dy"][:, ids["prompt_ids"].index("q04")], strict=True))
    close(by_example(one), {k: float(v) for k, v in wanted.items()})
    rows = run.read_table("prompts").to_pylist()
    steal = [ids["prompt_ids"].index(r["prompt_id"]) for r in rows if r["category"] == "steal"]
    mean = ask(run, Question("behavior:steal"))
    close(by_example(mean), dict(zip(ids["example_ids"], arrays["dy"][:, steal].mean(1).astype(float), strict=True)))


def test_a_policy_of_some_groups_only(run: RunFolder) -> None:
    everything = by_example(ask(run, Question()))
    harmful = by_example(ask(run, Question(groups=("harmful",))))
    assert everything.keys() == harmful.keys() and everything != harmful


@pytest.mark.parametrize(
    ("question", "message"),
    [
        ({"target": "coefficient:999"}, "feature"),
        ({"target": "behavior:nobody"}, "group or category"),
        ({"target": "prompt:nobody"}, "no prompt"),
        ({"target": "concept:nothing"}, "no concept"),
        ({"features": (999,)}, "does not have these features"),
        ({"groups": ("nobody",)}, "group or category"),
        ({"alpha": -1.0}, "policy.alpha"),
    ],
)
def test_what_the_run_does_not_have_is_an_error(run: RunFolder, question: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        ask(run, Question(**question))


def test_a_run_without_sketches_says_how_to_make_them(folder: Path) -> None:
    exact = attributed(folder, "exact", attribution__estimator="adjoint")
    with pytest.raises(UserError, match="estimator=sketch"):
        ask(exact, Question())


def test_the_command_shows_the_strongest_and_writes_all(
    folder: Path, run: RunFolder, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["show", str(folder / "run"), "score", "--set", "policy.alpha=3"]
    assert run_command([*command, "--csv"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    wanted = ask(run, Question(alpha=3.0))
    assert [row["example_id"] for row in rows] == [i for i, _ in ranked(wanted)]
    np.testing.assert_allclose([float(row["value"]) for row in rows], [v for _, v in ranked(wanted)], rtol=1e-5)
    assert run_command([*command, "--top", "2"]) == 0
    shown = capsys.readouterr().out
    assert rows[0]["example_id"] in shown and rows[2]["example_id"] not in shown
    assert run_command(["show", str(folder / "run"), "score", "--set", "policy.alpha=many"]) == 2


def ranked(scores: Scores) -> list[tuple[str, float]]:
    return sorted(by_example(scores).items(), key=lambda item: -abs(item[1]))


# Curvature


def test_the_solution_is_that_of_the_matrix_itself() -> None:
    rng = np.random.default_rng(0)
    S, q = rng.normal(size=(7, 20)).astype(np.float32), rng.normal(size=(20, 3))
    wide = S.astype(np.float64)
    C = wide.T @ wide / 7 + 0.3 * np.eye(20)
    np.testing.assert_allclose(Fitted(S, 0.3).solve(q), np.linalg.solve(C, q), rtol=1e-9)


def test_the_damping_is_the_most_likely_one_by_the_density_itself() -> None:
    from scipy.stats import multivariate_normal

    rng = np.random.default_rng(1)
    scales = np.r_[5.0, 3.0, np.full(18, 0.5)]
    S, T = (rng.normal(size=(n, 20)) * scales for n in (12, 30))
    found = choose_damping(S.astype(np.float32), T.astype(np.float32))
    tried = float((S**2).mean()) * np.logspace(-6, 4, 41)
    density = [multivariate_normal(np.zeros(20), S.T @ S / 12 + d * np.eye(20)).logpdf(T).mean() for d in tried]
    assert found == pytest.approx(tried[int(np.argmax(density))], rel=1e-4)


def test_autocorrelation_changes_the_answers_and_large_damping_gives_them_back(run: RunFolder) -> None:
    plain = by_example(ask(run, Question()))
    curved = by_example(ask(run, Question(curvature="autocorrelation")))
    assert curved.keys() == plain.keys() and curved != pytest.approx(plain)
