"""Effects summed over checkpoints: against forward mode at each one's weights, float64."""

from __future__ import annotations

import re
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from reference import GROUPS, LR, close, forward_mode, naive_X, policy_of, readings_of
from taught.core import driver
from taught.core.driver import Method
from taught.core.estimator import Work
from taught.core.registry import TRAJECTORIES, Choice
from taught.core.scores import Scores
from taught.core.target import TargetSet
from taught.errors import UserError
from taught.estimators import adjoint
from taught.model import load
from taught.policy.ridge import coefficient_shift
from taught.run.folder import RunFolder
from taught.stages.attribute import attribute
from taught.stages.check import check_study
from taught.stages.policy import policy
from taught.stages.readings import readings
from taught.study.load import dump_study, load_study
from taught.study.schema import Study
from taught.trajectories.checkpoints import Checkpoint, Checkpoints
from tiny_models import plain_loss, tiny_examples, tiny_model, tiny_problem
from tiny_study import write_tiny_study

# Three models of the same tokens and the same width; the first is the base, the second is far from it.
NAMES, RATES = ("untied", "gpt2", "tied"), (0.0, 2 * LR, 0.5 * LR)
FEW, EVERY = ["score", "behavior:*"], ["score", "coefficient:*", "behavior:*", "prompt:*"]


def base_policy(kind: str = "jumprelu"):
    return policy_of(NAMES[0], kind, "mean_user", True)


def changes(name: str, number: int, kind: str = "jumprelu"):
    """dX, dy at one checkpoint for a step of LR."""
    (h, _), (dh, dy) = forward_mode(name, number)
    return naive_X(h, kind, "mean_user", dh).numpy(), dy.numpy()


def problem_of(opener=lambda id, revision: tiny_model(id), **options):
    return tiny_problem(tiny_model(NAMES[0]), "jumprelu", "mean_user", lr=LR, opener=opener, **options)


def trajectory(names=NAMES[1:]) -> Choice:
    some = tuple(Checkpoint(name, RATES[NAMES.index(name)]) for name in names)
    return Choice("checkpoints", {"checkpoints": some})


def effects_of(estimator: str, wanted=EVERY, pieces: Any = None, names=NAMES[1:]) -> Scores:
    targets = TargetSet.of(wanted, readings_of(base_policy()))
    method = Method(Choice(estimator), trajectory=trajectory(names))
    return driver.scores(problem_of(), tiny_examples(), targets, method, Work(pieces=pieces))


@pytest.mark.parametrize("estimator, wanted", [("adjoint", EVERY), ("adjoint", FEW), ("forward", EVERY)])
def test_effects_are_the_sum_of_what_each_checkpoint_s_weights_give(estimator: str, wanted) -> None:
    found, policy = effects_of(estimator, wanted), base_policy()
    assert found.method == f"{estimator}@checkpoints"
    for number in range(len(tiny_examples())):
        dX, dy = (
            sum(rate / LR * change for rate, change in zip(RATES[1:], some, strict=True))
            for some in zip(*(changes(n, number) for n in NAMES[1:]), strict=True)
        )
        exact = coefficient_shift(policy, dX, dy)
        close([found[f"score:{p}"][number] for p in "xy"], [exact.x @ policy.coef, exact.y @ policy.coef])
        for group in "ab":
            close(found[f"behavior:{group}"][number], dy[[i for i, g in enumerate(GROUPS) if g == group]].mean())
        if wanted is EVERY:
            ids = policy.feature_ids.tolist()
            close([found[f"coefficient:{k}:x"][number] for k in ids], exact.x)
            close([found[f"coefficient:{k}:y"][number] for k in ids], exact.y)
            close(found.details["dy"][number], dy)
        if estimator == "forward":
            size = np.abs(dX).max()
            np.testing.assert_allclose(found.details["dX"][number], dX, rtol=1e-5, atol=1e-6 * size)


def test_gates_are_those_of_the_checkpoint() -> None:
    """Otherwise the test above could not tell: some open at a checkpoint and not at the base."""
    base, other = (naive_X(forward_mode(n, 0)[0][0], "jumprelu", "mean_user") for n in NAMES[:2])
    assert ((base == 0) & (other != 0)).any() and ((base != 0) & (other == 0)).any()
    there = problem_of().at(tiny_model(NAMES[1]), 1.0)
    torch.testing.assert_close(there.X, other, rtol=1e-9, atol=1e-11)


def test_a_curvature_is_fitted_at_each_checkpoint() -> None:
    targets = TargetSet.of(FEW, readings_of(base_policy()))
    curved = Choice("adam", {"eps": 1e-2})
    work, problem, total = Work(), problem_of(), 0.0
    found = driver.scores(problem, tiny_examples(), targets, Method(Choice("adjoint"), curved, trajectory()), work)
    for name in NAMES[1:]:
        there = problem.at(tiny_model(name), RATES[NAMES.index(name)])
        total = total + driver.scores(there, tiny_examples(), targets, Method(Choice("forward"), curved), work).values
    close(found.values, total)


def test_a_problem_that_opens_no_other_weights_says_so() -> None:
    targets = TargetSet.of(FEW, readings_of(base_policy()))
    method = Method(trajectory=trajectory())
    with pytest.raises(UserError, match="cannot be opened"):
        driver.scores(problem_of(opener=None), tiny_examples(), targets, method, Work())


class Kept(dict):
    def load(self, key: str) -> Any:
        return self.get(key)

    def save(self, key: str, arrays: Any) -> None:
        assert key not in self
        self[key] = arrays


@pytest.mark.parametrize("estimator", ["adjoint", "forward"])
def test_pieces_of_one_checkpoint_are_not_taken_for_those_of_another(estimator: str) -> None:
    pieces = Kept()
    first, again = effects_of(estimator, pieces=pieces), effects_of(estimator, pieces=pieces)
    assert len(pieces) % 2 == 0 and {key.split("-")[0] for key in pieces} == {"checkpoint0", "checkpoint1"}
    assert np.array_equal(first.values, again.values)
    close(first.values, effects_of(estimator).values)


def test_losses_are_those_of_the_base_model() -> None:
    for loss, example in zip(effects_of("adjoint", FEW).losses, tiny_examples(), strict=True):
        close(loss, plain_loss(tiny_model(NAMES[0]), example).detach(), 1e-9)


# Through the stages


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A study of few prompts and examples with its policy, and two checkpoints of its model: ``early`` and ``late``."""
    file = write_tiny_study(tmp_path_factory.mktemp("made") / "study")
    text = file.read_text().replace("prompts.jsonl,", "prompts.jsonl, limit: 12,")
    file.write_text(text.replace("pairs.jsonl,", "pairs.jsonl, limit: 4,"))
    folder, study = file.parent, load_study(file)
    for number, name in enumerate(("early", "late")):
        shutil.copytree(folder / "model", folder / name)
        weights = load_file(folder / name / "model.safetensors")
        gen = torch.Generator().manual_seed(number)
        moved = {n: w + 0.05 * torch.randn(w.shape, generator=gen) for n, w in weights.items()}
        save_file(moved, folder / name / "model.safetensors", {"format": "pt"})
    for stage in (readings, policy):
        stage(study, RunFolder(folder / "base"))
    return folder


@pytest.fixture
def folder(made: Path, tmp_path: Path) -> Path:
    """A copy of it."""
    return shutil.copytree(made, tmp_path / "study")


def study_with(folder: Path, *some: dict[str, Any], **changes: Any) -> Study:
    study = load_study(folder / "study.yaml").replace("attribution.exact_top", 0)
    if some:
        along = {"kind": "checkpoints", "checkpoints": list(some)}
        study = study.replace("attribution.trajectory", along, base=folder)
    for key, value in changes.items():
        study = study.replace(f"attribution.{key}", value)
    return study


def attributed(folder: Path, study: Study, name: str) -> RunFolder:
    if not (folder / name).exists():
        shutil.copytree(folder / "base", folder / name)
    run = RunFolder(folder / name)
    attribute(study, run)
    return run


def table(run: RunFolder) -> dict[tuple[str, str], float]:
    return {(row["example_id"], row["target"]): row["value"] for row in run.read_table("scores").to_pylist()}


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


@pytest.mark.parametrize("more", [{}, {"curvature": {"kind": "adam", "eps": 1e-2}, "lr": 1.0}])
def test_checkpoints_add_up_and_the_order_of_work_is_theirs(folder: Path, more) -> None:
    both = table(attributed(folder, study_with(folder, EARLY, LATE, **more), "both"))
    forward = table(attributed(folder, study_with(folder, EARLY, LATE, estimator="forward", **more), "forward"))
    parts = [table(attributed(folder, study_with(folder, c, **more), c["id"][2:] + "1")) for c in (EARLY, LATE)]
    for kind in ("score", "coefficient", "behavior"):
        keys = [key for key in both if key[1].partition(":")[0] == kind]
        size = max(abs(both[key]) for key in keys)
        for key in keys:
            assert both[key] == pytest.approx(parts[0][key] + parts[1][key], abs=1e-6 * size)
            assert both[key] == pytest.approx(forward[key], abs=1e-3 * size)
    assert any(abs(parts[1][key] - 3 * parts[0][key]) > 0.1 * abs(parts[1][key]) for key in both)


def test_a_run_that_was_stopped_goes_on_at_its_checkpoint(folder: Path, monkeypatch) -> None:
    study = study_with(folder, EARLY, LATE)
    whole = table(attributed(folder, study, "whole"))
    real = adjoint.feature_effects
    computed: list[float] = []

    def stops(problem, *args, **options):
        if problem.lr == EARLY["lr"]:
            raise KeyboardInterrupt
        return real(problem, *args, **options)

    monkeypatch.setattr(adjoint, "feature_effects", stops)
    with pytest.raises(KeyboardInterrupt):
        attributed(folder, study, "stopped")
    partial = folder / "stopped" / "partial"
    assert any("checkpoint1-" in file.name for file in partial.rglob("*.safetensors"))
    kept = adjoint.kept

    def counted(pieces, key, compute):
        return kept(pieces, key, lambda: computed.append(1) or compute())

    monkeypatch.setattr(adjoint, "feature_effects", real)
    monkeypatch.setattr(adjoint, "kept", counted)
    assert table(attributed(folder, study, "stopped")) == whole
    assert len(computed) == 1  # the features of the checkpoint that was not reached


def test_checkpoints_are_an_input_by_their_content(folder: Path) -> None:
    shutil.copytree(folder / "early", folder / "same")
    made = {}
    for name, some in {
        "a": [EARLY],
        "b": [{**EARLY, "id": "./same"}],
        "c": [{**EARLY, "id": "./late"}],
        "d": [{**EARLY, "lr": 2e-4}],
    }.items():
        run = attributed(folder, study_with(folder, *some, targets=["score"]), name)
        made[name] = run.manifest["stages"]["attribute"]["fingerprint"]
    assert made["a"] == made["b"] and len(set(made.values())) == 3


def test_a_branch_of_the_hub_that_moves_is_another_input(folder: Path, monkeypatch) -> None:
    """Its commit counts, not its name: a run of the commit before is neither reused nor added to."""
    commit, real = ["c0ffee"], load.load_model
    given = {"c0ffee": str(folder / "early"), "decade": str(folder / "late")}

    def opened(id: str, **how: Any) -> Any:
        return real(given[commit[0]], **{**how, "revision": None}) if id == "org/model" else real(id, **how)

    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda name, file, revision: f"/{commit[0]}/{file}")
    monkeypatch.setattr("taught.stages.subject.load_model", opened)
    study = study_with(folder, {"id": "org/model", "revision": "main", "lr": 1e-4}, targets=["score"])
    run = attributed(folder, study, "hub")
    assert table(run) == table(attributed(folder, study_with(folder, EARLY, targets=["score"]), "here"))
    commit[0] = "decade"
    with pytest.raises(UserError, match=r"attribution\.trajectory\.checkpoints\.0 commit"):
        attribute(study, RunFolder(run.folder))


def test_checkpoints_in_yaml_are_resolved_and_come_back(folder: Path, tmp_path_factory) -> None:
    text = (folder / "study.yaml").read_text()
    text = text.replace(
        "attribution: {",
        "attribution: {trajectory: {kind: checkpoints, checkpoints: "
        "[{id: ./early, lr: 1e-5}, {id: org/model, revision: step9, lr: 0.5}]}, ",
    )
    (folder / "study.yaml").write_text(text)
    study = load_study(folder / "study.yaml")
    some = (Checkpoint(str(folder / "early"), 1e-5), Checkpoint("org/model", 0.5, "step9"))
    assert study.attribution.trajectory.make(TRAJECTORIES) == Checkpoints(some)
    elsewhere = tmp_path_factory.mktemp("elsewhere") / "study.yaml"
    elsewhere.write_text(dump_study(study))
    assert load_study(elsewhere) == study
    study.require_files()
    shutil.rmtree(folder / "early")
    with pytest.raises(UserError, match=r"attribution\.trajectory\.checkpoints(.|\n)* does not exist(.|\n)*early"):
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
    with pytest.raises(UserError, match=r"attribution\.trajectory\.checkpoints(.|\n)*lr: a finite"):
        Study().replace("attribution.trajectory", {"kind": "checkpoints", "checkpoints": value})


def test_what_does_not_go_together_is_refused_with_its_reason(folder: Path) -> None:
    shutil.copy(folder / "model" / "model.safetensors", folder / "v.safetensors")
    for changes, message in (
        ({"estimator": "finite-step"}, "one set of weights"),
        ({"estimator": "sketch"}, "one set of weights"),
        ({"curvature": {"kind": "adam", "moments": str(folder / "v.safetensors")}}, "moments of its own"),
    ):
        study = study_with(folder, EARLY, **changes)
        with pytest.raises(UserError, match=message):
            attributed(folder, study, "refused")
        assert any(re.search(message, problem) for problem in check_study(study).problems)
    attributed(folder, study_with(folder, EARLY, targets=["score"]), "refused")  # nothing was begun there


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
