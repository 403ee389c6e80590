"""Options of the study's section ``attribution``, through the stages: what a run then rests on."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from taught.errors import UserError
from taught.run.folder import RunFolder
from taught.stages.attribute import attribute
from taught.stages.policy import policy
from taught.stages.readings import readings
from taught.study.load import load_study
from tiny_study import write_tiny_study


@pytest.fixture(scope="module")
def with_policy(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny")
    study, run = load_study(write_tiny_study(folder)).replace("prompts.limit", 12), RunFolder(folder / "run")
    readings(study, run)
    policy(study, run)
    return folder


@pytest.fixture(scope="module")
def attributed(with_policy: Path, tmp_path_factory: pytest.TempPathFactory):
    """Runs the stage ``attribute`` with other values below ``attribution``, on so many examples; its run folder."""

    def run(limit: int | None = None, **changes: Any) -> RunFolder:
        folder = shutil.copytree(with_policy / "run", tmp_path_factory.mktemp("runs") / "run")
        study = load_study(with_policy / "study.yaml").replace("attribution.exact_top", 0).replace("prompts.limit", 12)
        study = study.replace("examples.limit", limit)
        for key, value in changes.items():
            study = study.replace(f"attribution.{key}", value)
        made = RunFolder(folder)
        attribute(study, made)
        return made

    return run


@pytest.fixture(scope="module")
def plain(attributed) -> dict[tuple[str, str], float]:
    """Effects of the usual step at lr 1e-4."""
    return effects(attributed(lr=1e-4))


def effects(run: RunFolder) -> dict[tuple[str, str], float]:
    return {(row["example_id"], row["target"]): row["value"] for row in run.read_table("scores").to_pylist()}


def assert_alike(run: RunFolder, other: RunFolder, relative: float = 1e-3) -> None:
    found, expected = effects(run), effects(other)
    assert set(found) <= set(expected)
    for kind in ("score", "coefficient", "behavior"):
        size = max(abs(v) for k, v in expected.items() if k[1].startswith(kind))
        for key in (k for k in found if k[1].startswith(kind)):
            assert found[key] == pytest.approx(expected[key], rel=relative, abs=relative * size)


SUBSET = ["*.1.mlp.*", "*norm.weight"]
SOME = {"parameters": SUBSET, "lr": 5e-4}  # few parameters: a step of theirs is long enough not to be rounding
# Short: Adam's step is long in every direction, and its second order large at the default lr.
ADAM = {"curvature": {"kind": "adam", "eps": 1e-3}, "lr": 5e-6}
FEW = ["score", "behavior:*"]


EKFAC = {"curvature": "ekfac", "lr": 1e-5}


# Plain steps are longer, and only the largest of all examples is large beside their second order.
@pytest.mark.parametrize("changes, limit", [(SOME, None), (ADAM, 4), ({**ADAM, "parameters": SUBSET}, 4), (EKFAC, 4)])
def test_every_estimator_makes_the_same_step(attributed, plain, changes, limit) -> None:
    adjoint = attributed(limit, **changes)
    assert_alike(attributed(limit, **changes, estimator="forward"), adjoint)
    assert_alike(attributed(limit, **changes, targets=FEW), adjoint)
    step = attributed(limit, **changes, estimator="finite-step", exact_top=2)
    assert_alike(step, adjoint, 0.1)
    usual = {key: value * changes.get("lr", 1e-4) / 1e-4 for key, value in plain.items()}
    assert any(abs(value - usual[key]) > 0.1 * abs(usual[key]) for key, value in effects(adjoint).items())


def test_real_steps_beside_the_linear_value_are_by_adam_too(attributed) -> None:
    rows = attributed(**ADAM, exact_top=2).read_table("summary")
    for row in sorted(rows.to_pylist(), key=lambda r: r["rank"])[:2]:
        assert row["step_score"] == pytest.approx(row["score"], rel=0.2)


def test_moments_are_an_input_by_their_content(attributed, with_policy, tmp_path) -> None:
    weights = load_file(with_policy / "model" / "model.safetensors")
    v = {name: torch.rand(w.shape) for name, w in weights.items()}
    for name in ("a", "same", "other"):
        save_file({n: t * (2 if name == "other" else 1) for n, t in v.items()}, tmp_path / f"{name}.safetensors")
    prints = {}
    for name in ("a", "same", "other"):
        run = attributed(**by_file(tmp_path / f"{name}.safetensors"), targets=FEW)
        prints[name] = run.manifest["stages"]["attribute"]["fingerprint"]
    assert prints["a"] == prints["same"] != prints["other"]
    with pytest.raises(UserError, match=r"attribution\.curvature\.moments does not exist"):
        attributed(**by_file(tmp_path / "none.safetensors"))


def by_file(moments: Path) -> dict[str, Any]:
    return {"curvature": {"kind": "adam", "eps": 1e-3, "moments": str(moments)}, "lr": 5e-6}
