"""Later questions to a run's sketches: the same answers as a whole run, and no model."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest

import taught.model.load as load
from taught import stages
from taught.cli.app import run_command
from taught.curvatures.autocorrelation import Autocorrelation, choose_damping
from taught.errors import UserError
from taught.run.folder import RunFolder
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
    fixed = {"attribution.estimator": "sketch", "sketch.dim": 4096, "sketch.store": "store"}
    for key, value in {**fixed, **changes}.items():
        study = study.replace(key.replace("__", "."), value, base=folder)
    run = RunFolder(folder / name)
    stages.policy(study, run)
    stages.attribute(study, run)
    return run


@pytest.fixture
def run(folder: Path, monkeypatch: pytest.MonkeyPatch) -> RunFolder:
    def no_model(*_: object, **__: object) -> None:
        raise AssertionError("a model was loaded")

    monkeypatch.setattr(load, "load_model", no_model)
    return RunFolder.open(folder / "run")


def by_example(table: pa.Table, column: str = "total") -> dict[str, float]:
    return dict(zip(table["example_id"].to_pylist(), table[column].to_pylist(), strict=True))


def in_table(run: RunFolder, **wanted: Any) -> dict[str, float]:
    rows = run.read_table("influence").to_pylist()
    return {r["example_id"]: r["value"] for r in rows if all(r[k] == v for k, v in wanted.items())}


def close(found: dict[str, float], wanted: dict[str, float]) -> None:
    assert found.keys() == wanted.keys()
    scale = max(map(abs, wanted.values()))
    assert found == pytest.approx(wanted, abs=1e-5 * scale)


def test_the_runs_own_questions_have_the_runs_own_answers(run: RunFolder) -> None:
    feature = run.read_table("coefficients")["feature_id"][2].as_py()
    for target, wanted in (
        ("score", {"target": "score"}),
        (f"coefficient:{feature}", {"target": "coefficient", "feature_id": feature}),
    ):
        found = stages.ask(run, stages.Question(target))
        for column in ("x", "y", "total"):
            close(by_example(found, column), in_table(run, pathway=column, **wanted))
    group = stages.ask(run, stages.Question("mean_y:harmful"))
    close(by_example(group), in_table(run, target="mean_y", group="harmful"))


def test_another_penalty_and_fewer_features_are_a_run_of_their_own(folder: Path, run: RunFolder) -> None:
    ids = run.read_table("coefficients")["feature_id"].to_pylist()[:3]
    found = stages.ask(run, stages.Question(alpha=7.0, intercept=False, features=tuple(ids)))
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
                by_example(
                    stages.ask(
                        run, stages.Question(f"coefficient:{k}", alpha=7.0, intercept=False, features=tuple(ids))
                    )
                )[p]
                for p in sorted(by_example(found))
            ]
        )
        for w, k in zip(coef, sorted(ids), strict=True)
    )
    np.testing.assert_allclose([by_example(found)[p] for p in sorted(by_example(found))], sums, rtol=1e-4)


def test_a_prompts_own_effect_and_a_categorys_mean(run: RunFolder) -> None:
    arrays, ids = run.read_tensors("prompt_effects")
    one = stages.ask(run, stages.Question("y:q04"))
    wanted = dict(zip(ids["example_ids"], arrays["dy"][:, ids["prompt_ids"].index("q04")], strict=True))
    close(by_example(one), {k: float(v) for k, v in wanted.items()})
    rows = run.read_table("prompts").to_pylist()
    steal = [ids["prompt_ids"].index(r["prompt_id"]) for r in rows if r["category"] == "steal"]
    mean = stages.ask(run, stages.Question("mean_y:steal"))
    close(by_example(mean), dict(zip(ids["example_ids"], arrays["dy"][:, steal].mean(1).astype(float), strict=True)))


def test_a_policy_of_some_groups_only(run: RunFolder) -> None:
    everything = by_example(stages.ask(run, stages.Question()))
    harmful = by_example(stages.ask(run, stages.Question(groups=("harmful",))))
    assert everything.keys() == harmful.keys() and everything != harmful


@pytest.mark.parametrize(
    ("question", "message"),
    [
        ({"target": "coefficient:999"}, "no such target"),
        ({"target": "mean_y:nobody"}, "no such target"),
        ({"target": "y:nobody"}, "no such target"),
        ({"features": (999,)}, "does not have these features"),
        ({"groups": ("nobody",)}, "does not have these groups"),
        ({"alpha": -1.0}, "policy.alpha"),
    ],
)
def test_what_the_run_does_not_have_is_an_error(run: RunFolder, question: dict[str, Any], message: str) -> None:
    with pytest.raises(UserError, match=message):
        stages.ask(run, stages.Question(**question))


def test_a_run_without_sketches_says_how_to_make_them(folder: Path) -> None:
    exact = attributed(folder, "exact", attribution__estimator="adjoint")
    with pytest.raises(UserError, match="estimator=sketch"):
        stages.ask(exact, stages.Question())


def test_the_command_shows_the_strongest_and_writes_all(
    folder: Path, run: RunFolder, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    import pyarrow.parquet as pq

    out = tmp_path / "answers.parquet"
    command = ["ask", str(folder / "run"), "--alpha", "3", "--top", "2", "--out", str(out)]
    assert run_command(command) == 0
    shown = capsys.readouterr().out
    table = pq.read_table(out)
    first, third = table["example_id"][0].as_py(), table["example_id"][2].as_py()
    assert len(table) == 8 and first in shown and third not in shown
    assert run_command(["ask", str(folder / "run"), "--alpha", "many"]) == 2


# Curvature


def test_the_solution_is_that_of_the_matrix_itself() -> None:
    rng = np.random.default_rng(0)
    S, q = rng.normal(size=(7, 20)).astype(np.float32), rng.normal(size=(20, 3))
    wide = S.astype(np.float64)
    C = wide.T @ wide / 7 + 0.3 * np.eye(20)
    np.testing.assert_allclose(Autocorrelation(S, 0.3).solve(q), np.linalg.solve(C, q), rtol=1e-9)


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
    plain = by_example(stages.ask(run, stages.Question()))
    curved = by_example(stages.ask(run, stages.Question(curvature="autocorrelation")))
    assert curved.keys() == plain.keys() and curved != pytest.approx(plain)
