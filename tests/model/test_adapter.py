"""LoRA adapters: loaded as they were saved, moved alone, and refused by name."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from reference import LR, Readouts, close, naive_X
from taught.errors import UserError
from taught.estimators.adjoint import feature_effects, target_effects
from taught.estimators.every_prompt import prompt_effects
from taught.estimators.finite_step import finite_steps
from taught.estimators.forward import tangents
from taught.model.adapter import add_adapter, trainable
from taught.model.load import load_model
from taught.model.parameters import moving_parameters
from taught.model.readout import read_prompts
from taught.run.folder import RunFolder
from taught.stages.attribute import attribute
from taught.stages.check import check_study
from taught.stages.policy import policy
from taught.stages.readings import readings
from taught.stages.subject import open_subject
from taught.study.load import load_study
from tiny_models import BLOCK, moved, plain_gradient, plain_loss, tiny_examples, tiny_model, tiny_problem
from tiny_study import write_tiny_study

peft = pytest.importorskip("peft", reason="the package peft is not installed")


def write_adapter(model, folder: Path, *, zero: bool = False, seed: int = 0, **changes) -> Path:
    """A random adapter of this model, saved as peft saves it."""
    how = {"r": 2, "lora_alpha": 3, "target_modules": ["q_proj", "down_proj"], "lora_dropout": 0.5}
    wrapped = peft.get_peft_model(model, peft.LoraConfig(**{**how, **changes}))
    gen = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for name, p in wrapped.named_parameters():
            if "lora_" in name and not (zero and "lora_B" in name):
                p.copy_(0.4 * torch.randn(p.shape, generator=gen))
    wrapped.save_pretrained(folder)
    return folder


@pytest.fixture
def adapted(tmp_path):
    """The tiny model in float64 with an adapter on it."""

    def make(**how):
        folder = write_adapter(tiny_model("tied"), tmp_path / "adapter", **how)
        return add_adapter(tiny_model("tied"), str(folder))[0]

    return make


def differences(model, patterns, number: int):
    """(h, y), and their central differences along the step of the parameters that match."""
    names = set(moving_parameters(model, patterns))
    model.requires_grad_(True)  # peft loads adapters frozen
    grads = plain_gradient(model, plain_loss(model, tiny_examples()[number]))
    grads = {n: g * (n in names) for n, g in grads.items()}
    eps = 1e-5 / float(torch.sqrt(sum(g.pow(2).sum() for g in grads.values())))
    out = []
    with torch.no_grad():
        for sign in (1, -1):
            with moved(model, grads, sign * eps):
                out.append(Readouts(model)())
        base = Readouts(model)()
    (h1, y1), (h0, y0) = out
    return base, (-LR * (h1 - h0) / (2 * eps), -LR * (y1 - y0) / (2 * eps))


@pytest.mark.parametrize("zero", [False, True])
@pytest.mark.parametrize("alpha", [3, 0.5])  # the adapter's scaling is alpha / r
def test_effects_are_those_of_moving_the_adapter_s_weights_alone(adapted, zero, alpha) -> None:
    model = adapted(zero=zero, lora_alpha=alpha)
    patterns = trainable(model)
    problem = tiny_problem(model, lr=LR, parameters=patterns)
    draw = torch.Generator().manual_seed(5)
    A = torch.randn(3, 6, 5, generator=draw, dtype=torch.float64)
    B = torch.randn(3, 6, generator=draw, dtype=torch.float64)
    examples = tiny_examples()
    effects, _ = target_effects(problem, examples, A, B)
    dy = prompt_effects(problem, examples)
    forward = list(tangents(problem, examples))
    for number in range(len(examples)):
        (h, _), (dh, dy_ref) = differences(model, patterns, number)
        X, dX = (naive_X(h, "standard", "last_user", by) for by in (None, dh))
        F = feature_effects(problem, examples, list(A), X)
        close(F[number], torch.einsum("knd,nd->k", A, dX))
        close(effects[number], torch.einsum("knd,nd->k", A, dX) + B @ dy_ref)
        close(dy[number], dy_ref)
        close(forward[number].dX, dX)
        close(forward[number].dy, dy_ref)


def test_only_the_adapter_s_parameters_move(adapted) -> None:
    model = adapted()
    names = set(moving_parameters(model, trainable(model)))
    assert len(names) == 3 * 2 * 2
    assert all(".lora_A." in name or ".lora_B." in name for name in names)
    problem = tiny_problem(model, lr=LR, parameters=trainable(model))
    before = read_prompts(model, problem.prompts, problem.behavior, BLOCK)
    for step, forward in zip(
        finite_steps(problem, tiny_examples(), before), tangents(problem, tiny_examples()), strict=True
    ):
        np.testing.assert_allclose(step.dy, forward.dy, rtol=0.05, atol=1e-6)


def test_layers_of_which_whole_copies_are_kept_move_too(adapted) -> None:
    model = adapted(modules_to_save=["up_proj"])
    patterns = trainable(model)
    names = set(moving_parameters(model, patterns))
    assert sum(".modules_to_save." in name for name in names) == 3 * 2  # weight and bias
    assert not any("original_module" in name for name in names)
    problem = tiny_problem(model, lr=LR, parameters=patterns)
    close(prompt_effects(problem, tiny_examples())[1], differences(model, patterns, 1)[1][1])


def test_an_untrained_adapter_changes_no_read_out_and_moves_by_its_second_factor(adapted) -> None:
    model = adapted(zero=True)
    with torch.no_grad():
        for ours, plain in zip(Readouts(model)(), Readouts(tiny_model("tied"))(), strict=True):
            torch.testing.assert_close(ours, plain, rtol=1e-12, atol=1e-12)
    first = tiny_problem(model, parameters=("*lora_A*",))
    assert not prompt_effects(first, tiny_examples()).any()
    assert prompt_effects(tiny_problem(model, parameters=("*lora_B*",)), tiny_examples()).any()


# What is loaded


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    """A study whose model has an adapter beside it."""
    study = load_study(write_tiny_study(tmp_path))
    for number, name in enumerate(("adapter", "other")):
        write_adapter(load_model(study.model.id).model, tmp_path / name, seed=number)
    return tmp_path


def test_the_adapter_is_loaded_as_it_was_saved(folder: Path) -> None:
    plain = load_model(str(folder / "model"), dtype="float64")
    loaded = load_model(str(folder / "model"), dtype="float64", adapter=str(folder / "adapter"))
    stored = load_file(folder / "adapter" / "adapter_model.safetensors")
    ours = {n: p for n, p in loaded.model.named_parameters() if "lora_" in n}
    assert len(ours) == len(stored) == 12
    for name, weight in stored.items():
        name = name.removeprefix("base_model.model.").replace(".weight", ".default.weight")
        assert torch.equal(ours[name], weight.double())
    own = plain.model.state_dict()
    # The product by hand: W + scaling B A.
    name = "model.layers.1.self_attn.q_proj"
    A, B = (ours[f"{name}.lora_{x}.default.weight"] for x in "AB")
    x = torch.randn(1, 2, 16, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    by_hand = x @ (own[f"{name}.weight"] + 1.5 * B @ A).T
    torch.testing.assert_close(loaded.model.get_submodule(name)(x), by_hand, rtol=1e-9, atol=1e-12)
    assert loaded.weights["sha256"] == plain.weights["sha256"]
    assert loaded.weights["adapter"]["source"] == str(folder / "adapter")


def adapted_study(folder: Path, name: str = "adapter"):
    study = load_study(folder / "study.yaml").replace("attribution.exact_top", 0)
    return study.replace("model.adapter", f"./{name}", base=folder)


def table(folder: Path, study, name: str) -> dict[tuple[str, str], float]:
    run = RunFolder(folder / name)
    for stage in (readings, policy, attribute):
        stage(study, run)
    return {(row["example_id"], row["target"]): row["value"] for row in run.read_table("scores").to_pylist()}


def test_a_study_with_an_adapter_moves_the_adapter_and_every_estimator_agrees(folder: Path) -> None:
    study = adapted_study(folder)
    found = table(folder, study, "adjoint")
    named = study.replace("attribution.parameters", ["*.lora_?.*"])
    for name, other in {
        "named": named,
        "forward": study.replace("attribution.estimator", "forward"),
        "as its own checkpoint": study.replace(
            "attribution.trajectory",
            {"kind": "checkpoints", "checkpoints": [{"id": "./adapter", "lr": 1e-4}]},
            base=folder,
        ),
    }.items():
        expected = table(folder, other, name)
        for kind in ("score", "coefficient", "behavior"):
            keys = [key for key in found if key[1].startswith(kind)]
            size = max(abs(found[key]) for key in keys)
            assert size > 0
            for key in keys:
                assert found[key] == pytest.approx(expected[key], abs=1e-3 * size)
    report = check_study(study)
    assert not report.problems
    assert dict(report.rows)["adapter"] == str(folder / "adapter")
    assert dict(report.rows)["moving"].endswith("in 12 tensors")


def test_an_adapter_is_an_input_by_its_content(folder: Path) -> None:
    shutil.copytree(folder / "adapter", folder / "same")
    prints = {}
    for name in ("adapter", "same", "other"):
        run = RunFolder(folder / f"run-{name}")
        readings(adapted_study(folder, name), run)
        prints[name] = run.manifest["inputs"]["readings"]["model.adapter sha256"]
    assert prints["adapter"] == prints["same"] != prints["other"]
    weights = [
        open_subject(adapted_study(folder, n)).identity["model.weights"]["adapter"]["sha256"]
        for n in ("adapter", "same", "other")
    ]
    assert weights[0] == weights[1] != weights[2]
    with pytest.raises(UserError, match=r"model\.adapter does not exist"):
        adapted_study(folder, "absent").require_files()


def test_an_adapter_that_cannot_be_used_is_refused_with_the_reason(folder: Path, monkeypatch) -> None:
    def refused(message: str, name: str = "adapter") -> None:
        with pytest.raises(UserError, match=message):
            load_model(str(folder / "model"), adapter=str(folder / name))

    refused(r"no such adapter(.|\n)*pickle", "sae")
    config = folder / "other" / "adapter_config.json"
    before = json.loads(config.read_text())
    config.write_text(json.dumps({**before, "peft_type": "IA3"}))
    refused(r"another kind\n  value: IA3", "other")
    config.write_text("[")
    refused("configuration cannot be read", "other")
    config.write_text(json.dumps({**before, "target_modules": ["query"]}))
    refused(r"does not fit the model(.|\n)*query", "other")
    config.write_text(json.dumps({**before, "target_modules": ["q_proj"]}))
    refused(r"6 there are not in the model: .*down_proj\.lora_A", "other")
    config.write_text(json.dumps({**before, "r": 5}))
    refused("does not fit the model", "other")
    weights = folder / "other" / "adapter_model.safetensors"
    save_file(load_file(weights), folder / "other" / "x.safetensors")
    weights.rename(folder / "other" / "adapter_model.bin")
    refused(r"no such adapter(.|\n)*pickle", "other")
    monkeypatch.setitem(sys.modules, "peft", None)
    refused(r"needs the package peft(.|\n)*taught\[peft\]")


def test_patterns_of_the_study_go_before_those_of_the_adapter(folder: Path) -> None:
    study = adapted_study(folder)
    subject = open_subject(study)
    moving = subject.moving(study)
    assert len(moving) == 12 and all("lora_" in name for name in moving)
    assert subject.moving(study.replace("attribution.parameters", ["*mlp*"])) == ("*mlp*",)
    plain = load_study(folder / "study.yaml")
    assert open_subject(plain).moving(plain) is None
