"""Certificates of whole runs on a tiny study: what each estimator allows to be said."""

from __future__ import annotations

import shutil
from pathlib import Path

import numpy as np
import pytest

from taught.policy.ridge import coefficient_shift, exact_shift, fit_policy
from taught.run.folder import RunFolder
from taught.study.load import load_study
from tiny_study import READ, do, write_tiny_study


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study with its policy in ``policy``."""
    study = write_tiny_study(tmp_path_factory.mktemp("certify"))
    study.write_text(study.read_text().replace("prompts.jsonl,", "prompts.jsonl, limit: 12,"))
    do(load_study(study).replace("policy.bootstrap", 60), study.parent / "policy", *READ)
    return study


def attributed(study: Path, name: str, **changes) -> RunFolder:
    spec = load_study(study).replace("policy.bootstrap", 60)
    for key, value in changes.items():
        spec = spec.replace(f"attribution.{key}", value)
    if not (study.parent / name).exists():
        shutil.copytree(study.parent / "policy", study.parent / name)
    return do(spec, study.parent / name, "attribute")


def table(run: RunFolder, name: str) -> list[dict]:
    return run.read_table(name).to_pylist()


def test_forward_mode_bounds_every_example_and_decides_the_score(study: Path) -> None:
    run = attributed(study, "forward", estimator="forward", exact_top=0)
    policy = run.read_json("policy")
    arrays, ids = run.read_tensors("activations")
    fitted = fit_policy(
        arrays["X"],
        run.read_tensors("readouts")[0]["y"],
        alpha=policy["alpha"],
        prompt_ids=ids["prompt_ids"],
        feature_ids=ids["feature_ids"],
        fit_intercept=policy["intercept"],
    )
    dX, at = run.read_tensors("feature_prompt_effects")
    dy = run.read_tensors("prompt_effects")[0]["dy"]
    rows = {row["example_id"]: row for row in table(run, "certificates")}
    assert list(rows) == at["example_ids"]
    for i, row in enumerate(rows.values()):
        moved = dX["dX"][i].astype(float), dy[i].astype(float)
        apart = exact_shift(fitted, *moved) - coefficient_shift(fitted, *moved).total
        assert row["refit_of"] == "tangent"
        assert np.linalg.norm(apart) <= row["coef_bound"] * (1 + 1e-6)
        assert abs(row["remainder"]) <= row["score_bound"]
        assert row["remainder"] == pytest.approx(row["refit"] - row["score"])
        assert row["dX_norm"] == pytest.approx(np.linalg.norm(moved[0], 2), rel=1e-5)
    score = [row for row in table(run, "statements") if row["target"] == "score"]
    assert score and all(row["share"] is not None for row in score)
    assert all("needs" not in row["reason"] and "need dX" not in row["reason"] for row in score)


def test_the_adjoint_says_what_it_cannot_decide(study: Path) -> None:
    run = attributed(study, "adjoint")
    rows = table(run, "certificates")
    steps = {r["example_id"]: r["refit_score"] for r in table(run, "summary") if r["refit_score"]}
    assert len(steps) == 3
    for row in rows:
        assert row["refit"] == steps.get(row["example_id"]) and row["score_bound"] is None
        assert row["refit_of"] == ("step" if row["example_id"] in steps else None)
    statements = table(run, "statements")
    for row in statements:
        if row["target"] == "score":
            assert row["verdict"] == "undecided" and row["share"] is None
            assert "need dX of every feature" in row["reason"]
            assert "not bounded against the exact refit" in row["reason"]
        else:
            assert row["by_refit"] == "exact" and 0 <= row["share"] <= 1
    assert {row["target"] for row in statements} == {"score", "score:y", "behavior:harmful", "behavior:harmless"}


def test_both_estimators_agree_on_what_both_can_say(study: Path) -> None:
    one = attributed(study, "forward", estimator="forward", exact_top=0)
    other = attributed(study, "adjoint")
    known = [
        {
            (r["target"], r["k"]): (r["example_ids"], r["verdict"])
            for r in table(run, "statements")
            if r["target"] != "score"
        }
        for run in (one, other)
    ]
    assert known[0] == known[1]


def test_without_coefficients_all_is_undecided(study: Path) -> None:
    run = attributed(study, "few", targets=["score", "behavior:*"])
    statements = table(run, "statements")
    assert {row["verdict"] for row in statements} == {"undecided"}
    assert all("prompt:*" in row["reason"] for row in statements)
    assert {row["dy_norm"] for row in table(run, "certificates")} == {None}


def test_sketches_bound_what_was_made_exactly_and_say_so_of_the_rest(study: Path) -> None:
    run = attributed(study, "sketch", estimator={"kind": "sketch", "dim": 1024}, exact_top=2)
    checked = {r["example_id"]: r for r in table(run, "summary") if r["refit_score"] is not None}
    assert len(checked) == 2
    for row in table(run, "certificates"):
        own = checked.get(row["example_id"])
        assert row["refit_of"] == ("step" if own else None)
        if own:  # against the exact value, not against the estimate
            assert row["remainder"] == pytest.approx(own["refit_score"] - own["exact_score"])
            assert row["refit"] == own["refit_score"] and row["score"] == own["score"]
        assert row["score_bound"] is None and row["dy_norm"] is None
    statements = table(run, "statements")
    assert {row["by_sketch"] for row in statements} <= {"safe", "undecided"}
    score = [row for row in statements if row["target"] == "score"]
    assert all(row["verdict"] == "undecided" and row["share"] is None for row in score)
    others = [row for row in statements if row["target"] != "score"]
    assert others and all(row["share"] is not None for row in others)
