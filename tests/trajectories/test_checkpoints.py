"""Effects summed over checkpoints: against forward mode at each one's weights, float64."""

from __future__ import annotations

import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from taught.estimators.estimate import ESTIMATORS
from taught.study.methods import Checkpoint

from reference import LR, close, forward_mode, naive_X
from taught import stages
from taught.errors import UserError
from taught.estimators import estimate
from taught.policy.ridge import coefficient_shift, fit_policy
from taught.progress import SilentProgress
from taught.run.folder import RunFolder
from taught.stages import estimating
from taught.stages.check import check_study
from taught.study.load import dump_study, load_study
from taught.study.schema import Study
from taught.trajectories import checkpoints
from taught.trajectories.checkpoints import NumberedPieces, at_checkpoint, summed
from tiny_models import plain_loss, tiny_examples, tiny_model, tiny_problem, tiny_prompts
from tiny_study import write_tiny_study

# Three models of the same tokens and the same width; the first is the base, the second is far from it.
NAMES, RATES = ("untied", "gpt2", "tied"), (0.0, 2 * LR, 0.5 * LR)
GROUPS = {"a": ["q0", "q2", "q5"], "b": ["q1", "q3", "q4"]}


def base_policy(kind: str = "jumprelu"):
    h, y = forward_mode(NAMES[0], 0)[0]
    return fit_policy(
        naive_X(h, kind, "mean_user").numpy(),
        y.numpy(),
        prompt_ids=[p.id for p in tiny_prompts()],
        feature_ids=[0, 2, 3, 5, 9],
        alpha=0.5,
        fit_intercept=True,
    )


def changes(name: str, number: int, kind: str = "jumprelu"):
    """dX, dy at one checkpoint for a step of LR."""
    (h, _), (dh, dy) = forward_mode(name, number)
    return naive_X(h, kind, "mean_user", dh).numpy(), dy.numpy()


def effects_of(estimator: str, coefficients: bool = True, pieces: Any = None, names=NAMES[1:]):
    problem = tiny_problem(tiny_model(NAMES[0]), "jumprelu", "mean_user", lr=LR)
    parts = []
    for number, name in enumerate(names):
        there = at_checkpoint(problem, tiny_model(name), RATES[NAMES.index(name)])
        kept = None if pieces is None else NumberedPieces(pieces, number)
        parts.append(
            ESTIMATORS[estimator](
                there,
                tiny_examples(),
                base_policy(),
                GROUPS,
                coefficients=coefficients,
                progress=SilentProgress(),
                pieces=kept,
            )
        )
    return summed(parts)


@pytest.mark.parametrize("estimator, coefficients", [("adjoint", True), ("adjoint", False), ("jvp", True)])
def test_effects_are_the_sum_of_what_each_checkpoint_s_weights_give(estimator: str, coefficients: bool) -> None:
    found, policy = effects_of(estimator, coefficients), base_policy()
    for number in range(len(tiny_examples())):
        dX, dy = (
            sum(rate / LR * change for rate, change in zip(RATES[1:], some, strict=True))
            for some in zip(*(changes(n, number) for n in NAMES[1:]), strict=True)
        )
        exact = coefficient_shift(policy, dX, dy)
        close(found.score[:, number], [exact.x @ policy.coef, exact.y @ policy.coef])
        for group, ids in GROUPS.items():
            close(found.mean_y[group][number], dy[[policy.prompt_ids.index(i) for i in ids]].mean())
        if coefficients:
            close(found.shift.x[number], exact.x)
            close(found.shift.y[number], exact.y)
            close(found.dy[number], dy)
        if estimator == "jvp":
            np.testing.assert_allclose(found.dX[number], dX, rtol=1e-5, atol=1e-6 * np.abs(dX).max())


def test_gates_are_those_of_the_checkpoint() -> None:
    """Otherwise the test above could not tell: some open at a checkpoint and not at the base."""
    base, other = (naive_X(forward_mode(n, 0)[0][0], "jumprelu", "mean_user") for n in NAMES[:2])
    assert ((base == 0) & (other != 0)).any() and ((base != 0) & (other == 0)).any()
    there = at_checkpoint(tiny_problem(tiny_model(NAMES[0]), "jumprelu", "mean_user"), tiny_model(NAMES[1]), 1.0)
    torch.testing.assert_close(there.X, other, rtol=1e-9, atol=1e-11)


class Kept(dict):
    def load(self, key: str) -> Any:
        return self.get(key)

    def save(self, key: str, arrays: Any) -> None:
        assert key not in self
        self[key] = arrays


@pytest.mark.parametrize("estimator", ["adjoint", "jvp"])
def test_pieces_of_one_checkpoint_are_not_taken_for_those_of_another(estimator: str) -> None:
    pieces = Kept()
    first, again = effects_of(estimator, pieces=pieces), effects_of(estimator, pieces=pieces)
    assert len(pieces) % 2 == 0 and {key.split("-")[0] for key in pieces} == {"checkpoint0", "checkpoint1"}
    assert np.array_equal(first.shift.total, again.shift.total)
    close(first.shift.total, effects_of(estimator).shift.total)


# Through the stages


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A study with its policy, and two checkpoints of its model: ``early`` and ``late``."""
    study = load_study(write_tiny_study(tmp_path))
    for number, name in enumerate(("early", "late")):
        shutil.copytree(tmp_path / "model", tmp_path / name)
        weights = load_file(tmp_path / name / "model.safetensors")
        gen = torch.Generator().manual_seed(number)
        moved = {n: w + 0.05 * torch.randn(w.shape, generator=gen) for n, w in weights.items()}
        save_file(moved, tmp_path / name / "model.safetensors", {"format": "pt"})
    stages.policy(study, RunFolder(tmp_path / "base"))
    return tmp_path


def study_with(folder: Path, *some: dict[str, Any], **changes: Any) -> Study:
    study = load_study(folder / "study.yaml").replace("attribution.exact_top", 0)
    study = study.replace("attribution.checkpoints", list(some) or None, base=folder)
    for key, value in changes.items():
        study = study.replace(f"attribution.{key}", value)
    return study


def attributed(folder: Path, study: Study, name: str) -> RunFolder:
    if not (folder / name).exists():
        shutil.copytree(folder / "base", folder / name)
    run = RunFolder(folder / name)
    stages.attribute(study, run)
    return run


def table(run: RunFolder) -> dict[tuple, float]:
    keys = ("example_id", "target", "feature_id", "group", "pathway")
    rows = run.read_table("influence").to_pylist()
    return {tuple(row[k] for k in keys): row["value"] for row in rows}


EARLY, LATE = {"id": "./early", "lr": 1e-4}, {"id": "./late", "lr": 3e-4}


def test_the_base_model_as_its_own_checkpoint_gives_what_it_gives_alone(folder: Path) -> None:
    alone = attributed(folder, study_with(folder), "alone")
    some = [{"id": "./model", "lr": 1e-4}, {"id": "./model", "lr": 2e-4}]
    thrice = attributed(folder, study_with(folder, *some), "thrice")
    found, expected = table(thrice), table(alone)
    size = max(map(abs, expected.values()))
    for key, value in expected.items():
        assert found[key] == pytest.approx(3 * value, rel=1e-3, abs=1e-5 * size)
    losses = [[row["loss"] for row in run.read_table("examples").to_pylist()] for run in (alone, thrice)]
    assert losses[0] == losses[1]


@pytest.mark.parametrize("more", [{}, {"curvature": "adam", "adam_eps": 1e-2, "lr": 1.0}])
def test_checkpoints_add_up_and_the_order_of_work_is_theirs(folder: Path, more) -> None:
    both = table(attributed(folder, study_with(folder, EARLY, LATE, **more), "both"))
    forward = table(attributed(folder, study_with(folder, EARLY, LATE, estimator="jvp", **more), "jvp"))
    parts = [table(attributed(folder, study_with(folder, c, **more), c["id"][2:] + "1")) for c in (EARLY, LATE)]
    for target in ("score", "coefficient", "mean_y"):
        keys = [key for key in both if key[1] == target]
        size = max(abs(both[key]) for key in keys)
        for key in keys:
            assert both[key] == pytest.approx(parts[0][key] + parts[1][key], abs=1e-6 * size)
            assert both[key] == pytest.approx(forward[key], abs=1e-3 * size)
    assert any(abs(parts[1][key] - 3 * parts[0][key]) > 0.1 * abs(parts[1][key]) for key in both)


def test_a_run_that_was_stopped_goes_on_at_its_checkpoint(folder: Path, monkeypatch) -> None:
    study = study_with(folder, EARLY, LATE)
    whole = table(attributed(folder, study, "whole"))
    real = estimating.at_checkpoint

    def stops(problem, model, lr):
        if lr == LATE["lr"]:
            raise KeyboardInterrupt
        return real(problem, model, lr)

    monkeypatch.setattr(estimating, "at_checkpoint", stops)
    with pytest.raises(KeyboardInterrupt):
        attributed(folder, study, "stopped")
    monkeypatch.setattr(estimating, "at_checkpoint", real)
    computed = []
    counted = estimate.feature_effects
    monkeypatch.setattr(estimate, "feature_effects", lambda p, *a, **k: computed.append(p.lr) or counted(p, *a, **k))
    saved = {file.name for file in (folder / "stopped" / "partial").rglob("checkpoint0-*")}
    assert saved
    assert table(attributed(folder, study, "stopped")) == whole
    assert computed == [1e-4, 3e-4]


def test_invariant_8_checkpoints_are_an_input_by_their_content(folder: Path) -> None:
    shutil.copytree(folder / "early", folder / "same")
    made = {}
    for name, some in {
        "a": [EARLY],
        "b": [{**EARLY, "id": "./same"}],
        "c": [{**EARLY, "id": "./late"}],
        "d": [{**EARLY, "lr": 2e-4}],
    }.items():
        run = attributed(folder, study_with(folder, *some, coefficients=False), name)
        made[name] = run.manifest["stages"]["attribute"]["fingerprint"]
    assert made["a"] == made["b"] and len(set(made.values())) == 3


def test_checkpoints_in_yaml_are_resolved_and_come_back(folder: Path, tmp_path_factory) -> None:
    text = (folder / "study.yaml").read_text()
    text = text.replace(
        "attribution: {",
        "attribution: {checkpoints: [{id: ./early, lr: 1e-5}, {id: org/model, revision: step9, lr: 0.5}], ",
    )
    (folder / "study.yaml").write_text(text)
    study = load_study(folder / "study.yaml")
    assert study.attribution.checkpoints == (
        Checkpoint(str(folder / "early"), 1e-5),
        Checkpoint("org/model", 0.5, "step9"),
    )
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "study.yaml"
    elsewhere.write_text(dump_study(study))
    assert load_study(elsewhere) == study
    study.require_files()
    shutil.rmtree(folder / "early")
    with pytest.raises(UserError, match=r"attribution\.checkpoints does not exist(.|\n)*early"):
        study.require_files()


@pytest.mark.parametrize(
    "value",
    [
        [],
        [{"id": "a"}],
        [{"lr": 1}],
        [{"id": "a", "lr": 0}],
        [{"id": "a", "lr": 1, "x": 1}],
        ["a"],
        [{"id": "a", "lr": 1}] * 2,
        {"id": "a", "lr": 1},
    ],
)
def test_a_checkpoint_is_an_id_and_a_rate(value) -> None:
    with pytest.raises(UserError, match=r"attribution\.checkpoints is not valid(.|\n)*lr: a finite"):
        Study().replace("attribution.checkpoints", value)


def test_what_does_not_go_together_is_refused_with_its_reason(folder: Path) -> None:
    shutil.copy(folder / "model" / "model.safetensors", folder / "v.safetensors")
    for changes, message in (
        ({"estimator": "finite-step"}, r"finite step cannot(.|\n)*one set of weights"),
        ({"curvature": "adam", "moments": str(folder / "v.safetensors")}, "cannot hold for several"),
    ):
        study = study_with(folder, EARLY, **changes)
        with pytest.raises(UserError, match=message):
            attributed(folder, study, "refused")
        assert len(check_study(study).problems) == 1
    with pytest.raises(UserError, match=r"steps are not Adam's"):
        attributed(folder, study_with(folder, moments=str(folder / "v.safetensors")), "refused")


def test_a_checkpoint_of_another_model_is_refused(folder: Path) -> None:
    from transformers import LlamaConfig, LlamaForCausalLM

    config = LlamaConfig.from_pretrained(folder / "model")
    shutil.copytree(folder / "model", folder / "wide")
    config.hidden_size = 32
    LlamaForCausalLM(config).save_pretrained(folder / "wide")
    with pytest.raises(UserError, match=r"another width(.|\n)*wide: 32, model 16"):
        attributed(folder, study_with(folder, {**EARLY, "id": "./wide"}), "refused")
    tokens = folder / "early" / "tokenizer.json"
    tokens.write_text(tokens.read_text().replace('"a"', '"#a"').replace('"b"', '"a"').replace('"#a"', '"b"'))
    with pytest.raises(UserError, match=r"another tokenizer(.|\n)*early"):
        attributed(folder, study_with(folder, EARLY), "refused too")


def test_check_counts_every_checkpoint(folder: Path) -> None:
    def cost(*some) -> float:
        return float(dict(check_study(study_with(folder, *some)).rows)["cost"].split()[1])

    assert cost(EARLY, LATE) == pytest.approx(2 * cost(EARLY), rel=0.01)


def test_losses_are_those_of_the_first_part() -> None:
    found = effects_of("adjoint", names=NAMES[1:])
    for loss, example in zip(found.losses, tiny_examples(), strict=True):
        close(loss, plain_loss(tiny_model(NAMES[1]), example).detach(), 1e-9)
    assert checkpoints.summed([found]) is found
