"""LoRA adapters: loaded as they were saved, moved alone, and refused by name."""

from __future__ import annotations

import json
import re
import shutil
import sys
import warnings
from functools import partial
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file

from reference import LR, Readouts, close, naive_X
from taught import influence
from taught.core.example import example_losses
from taught.core.scores import Scores
from taught.errors import UserError
from taught.estimators.adjoint import feature_effects, target_effects
from taught.estimators.every_prompt import prompt_effects
from taught.estimators.finite_step import finite_steps
from taught.estimators.forward import tangents
from taught.model.adapter import add_adapter, trainable, without_adapter
from taught.model.load import load_model
from taught.model.parameters import moving_parameters
from taught.model.readout import read_prompts
from taught.run.folder import RunFolder
from taught.stages.attribute import attribute
from taught.stages.check import check_study
from taught.stages.policy import policy
from taught.stages.readings import readings
from taught.stages.subject import open_checkpoint, open_subject
from taught.study.load import load_study
from tiny_models import POINT, moved, plain_gradient, plain_loss, tiny_examples, tiny_model, tiny_problem
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
    references = [differences(model, patterns, number) for number in range(len(examples))]
    F = feature_effects(problem, examples, list(A), naive_X(references[0][0][0], "standard", "last_user"))
    for number, ((h, _), (dh, dy_ref)) in enumerate(references):
        dX = naive_X(h, "standard", "last_user", dh)
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
    before = read_prompts(model, problem.prompts, problem.behavior, POINT)
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


def named(what: str):
    return pytest.raises(UserError, match=what)


# What an estimator says of the variants of LoRA that it does not go through; of the others all three are right.
REFUSED = {
    ("adjoint", "dora"): "DoRA hides",
    ("forward", "dora"): "DoRA hides",
    ("forward", "parameters"): "does not go through",
}
VARIANTS = {
    "all biases": {"bias": "all"},
    "their biases": {"bias": "lora_only"},
    "own biases": {"lora_bias": True},
    "rank stabilised": {"use_rslora": True},
    "some blocks": {"layers_to_transform": [1]},
    "ranks": {"rank_pattern": {"q_proj": 4}, "alpha_pattern": {"q_proj": 5}},
    "whole norms": {"modules_to_save": ["norm"]},
    "whole output": {"modules_to_save": ["lm_head"]},
    "output": {"target_modules": ["lm_head", "q_proj"]},
    "embeddings": {"target_modules": ["embed_tokens", "q_proj"]},
    "tokens": {"trainable_token_indices": [5, 12]},
    "parameters": {"target_modules": [], "target_parameters": ["q_proj.weight"], "lora_dropout": 0.0},
    "dora": {"use_dora": True},
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_what_peft_trains_moves_and_nothing_else_or_the_estimator_refuses(tmp_path, variant) -> None:
    folder = write_adapter(tiny_model("tied"), tmp_path / "adapter", **VARIANTS[variant])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        theirs = peft.PeftModel.from_pretrained(tiny_model("tied"), folder, is_trainable=True)
        model, names, _ = add_adapter(tiny_model("tied"), str(folder))
    trained = [n.removeprefix("base_model.model.") for n, p in theirs.named_parameters() if p.requires_grad]
    assert list(names) == trained
    assert list(moving_parameters(model, names)) == trained
    examples, problem = tiny_examples()[:2], tiny_problem(model, lr=LR, parameters=names, batch_tokens=1)
    before = read_prompts(model, problem.prompts, problem.behavior, POINT)
    weights = {n: p.detach().clone() for n, p in model.named_parameters()}
    found = {
        "adjoint": lambda: prompt_effects(problem, examples),
        "forward": lambda: [t.dy for t in tangents(problem, examples)],
        "finite-step": lambda: [s.dy for s in finite_steps(problem, examples, before)],
    }
    results = {}
    for estimator, run in found.items():
        if (estimator, variant) in REFUSED:
            with named(REFUSED[estimator, variant]):
                run()
        else:
            results[estimator] = run()
        now = dict(model.named_parameters())
        assert all(torch.equal(weights[n], now[n]) and isinstance(now[n], torch.nn.Parameter) for n in weights)
    for number in range(len(examples)):
        expected = differences(model, names, number)[1][1]
        for estimator, dy in results.items():
            rtol = {"finite-step": 0.05}.get(estimator, 1e-6)  # a step has a second order
            atol = rtol * float(expected.abs().max())
            torch.testing.assert_close(torch.as_tensor(dy[number]), expected, rtol=0, atol=atol)


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
    if not (folder / "read").exists():  # read-outs and policy are those of every estimator
        for stage in (readings, policy):
            stage(study, RunFolder(folder / "read"))
    run = RunFolder(shutil.copytree(folder / "read", folder / name))
    attribute(study, run)
    return {(row["example_id"], row["target"]): row["value"] for row in run.read_table("scores").to_pylist()}


def test_a_study_with_an_adapter_moves_the_adapter_and_every_estimator_agrees(folder: Path) -> None:
    study = adapted_study(folder).replace("prompts.limit", 12).replace("examples.limit", 4)
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


@pytest.mark.parametrize("curvature", ["identity", "ekfac"])
def test_what_a_plain_model_was_tuned_into_may_be_an_adapter_and_then_that_moves(folder: Path, curvature: str) -> None:
    on_it = adapted_study(folder).replace("prompts.limit", 12).replace("attribution.curvature", curvature)
    on_it = on_it.replace("sae.path", None)
    expected = influence_of(on_it)
    ended = {"kind": "checkpoints", "checkpoints": [{"id": "./adapter", "lr": 1e-4}]}
    found = influence_of(on_it.replace("model.adapter", None).replace("attribution.trajectory", ended, base=folder))
    assert found.targets == expected.targets and found.example_ids == expected.example_ids
    np.testing.assert_allclose(found.values, expected.values, rtol=1e-4, atol=1e-6 * abs(expected.values).max())
    assert not np.allclose(found.losses, expected.losses)  # those of the model before it was tuned


def influence_of(study) -> Scores:
    return influence(study.model.id, study.examples.path, study.prompts.path, ["behavior:*"], study=study)


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


def change_config(folder: Path, **changes) -> None:
    file = folder / "adapter_config.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), **changes}))


def test_an_adapter_s_configuration_is_in_its_identity(folder: Path) -> None:
    def weights(name: str):
        return load_model(str(folder / "model"), adapter=str(folder / name)).weights["adapter"]["sha256"]

    shutil.copytree(folder / "adapter", folder / "same")
    assert weights("same") == weights("adapter")
    change_config(folder / "same", use_rslora=True)
    assert weights("same") != weights("adapter")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"alora_invocation_tokens": [3]}, r"not understood(.|\n)*alora_invocation_tokens"),
        ({"layer_replication": [[0, 2], [1, 3]]}, r"not understood(.|\n)*layer_replication"),
        ({"of_a_later_version": "on"}, r"not understood(.|\n)*of_a_later_version"),
        ({"init_lora_weights": "pissa"}, r"changes the base model(.|\n)*pissa"),
        ({"peft_type": "LN_TUNING"}, r"another kind(.|\n)*LN_TUNING(.|\n)*merge_and_unload"),
        ({"peft_type": "PREFIX_TUNING"}, r"another kind(.|\n)*PREFIX_TUNING(.|\n)*cannot be merged"),
    ],
)
def test_a_setting_that_may_mean_another_model_is_refused_by_name(folder: Path, changes, message) -> None:
    change_config(folder / "adapter", **changes)
    with named(message):
        load_model(str(folder / "model"), adapter=str(folder / "adapter"))


def test_settings_of_a_later_version_that_are_off_are_accepted(folder: Path) -> None:
    change_config(folder / "adapter", of_a_later_version=None, another=False)
    assert len(load_model(str(folder / "model"), adapter=str(folder / "adapter")).moving) == 12


def test_an_adapter_that_changes_its_base_can_be_merged_as_advised(folder: Path) -> None:
    base = load_model(str(folder / "model"))
    wrapped = peft.get_peft_model(
        base.model, peft.LoraConfig(r=2, target_modules=["q_proj"], init_lora_weights="pissa")
    )
    wrapped.save_pretrained(folder / "pissa")
    with named("merge_and_unload of peft"):
        load_model(str(folder / "model"), adapter=str(folder / "pissa"))
    ids = torch.tensor([[5, 7, 9]])
    expected = wrapped(ids).logits
    wrapped.merge_and_unload().save_pretrained(folder / "merged")
    base.tokenizer.save_pretrained(folder / "merged")
    torch.testing.assert_close(load_model(str(folder / "merged")).model(ids).logits, expected, rtol=1e-4, atol=1e-5)


def test_an_adapter_without_some_of_its_tensors_is_refused(folder: Path) -> None:
    file = folder / "adapter" / "adapter_model.safetensors"
    save_file({k: v for k, v in load_file(file).items() if "layers.1.mlp.down_proj.lora_B" not in k}, file)
    with named(r"does not fit the model(.|\n)*1 tensors are not in(.|\n)*layers\.1\.mlp\.down_proj\.lora_B"):
        load_model(str(folder / "model"), adapter=str(folder / "adapter"))


def test_names_in_a_wrapper_are_refused_and_the_advice_takes_it_off(folder: Path) -> None:
    file = folder / "adapter" / "adapter_model.safetensors"
    saved = load_file(file)
    save_file({k.replace("base_model.model.", "base_model.model._orig_mod."): v for k, v in saved.items()}, file)
    with named(r"names of the adapter's weights(.|\n)*'_orig_mod\.'") as error:
        load_model(str(folder / "model"), adapter=str(folder / "adapter"))
    (command,) = re.findall(r'python -c "(.*)"$', error.value.fix)
    exec(command)
    ours = dict(load_model(str(folder / "model"), adapter=str(folder / "adapter")).model.named_parameters())
    for name, value in saved.items():
        name = name.removeprefix("base_model.model.").replace(".weight", ".default.weight")
        assert torch.equal(ours[name], value)


def test_another_base_model_is_said(folder: Path, caplog) -> None:
    change_config(folder / "adapter", base_model_name_or_path="org/another")
    report = check_study(adapted_study(folder))
    assert "was trained on org/another" in caplog.text
    assert dict(report.rows)["adapter of"].startswith("org/another, ")


def test_another_base_of_the_same_name_or_another_revision_of_it_is_said(folder: Path, caplog) -> None:
    shutil.copytree(folder / "model", folder / "other" / "model")
    bases = [
        ({"base_model_name_or_path": str(folder / "model")}, None),
        ({"base_model_name_or_path": "/gone/model"}, None),
        ({"base_model_name_or_path": str(folder / "other" / "model")}, str(folder / "other" / "model")),
        ({"base_model_name_or_path": "org/model", "revision": "step1000"}, "org/model at revision step1000"),
    ]
    for changes, other in bases:
        change_config(folder / "adapter", **changes)
        weights = load_model(str(folder / "model"), adapter=str(folder / "adapter")).weights["adapter"]
        assert weights.get("trained_on") == other
        assert other is None or f"was trained on {other}; " in caplog.text
    model = load_model(str(folder / "model")).model
    assert "trained_on" not in add_adapter(model, str(folder / "adapter"), of=("step1000", None))[2]


def test_a_checkpoint_whose_adapter_trains_other_parameters_is_refused(folder: Path) -> None:
    write_adapter(load_model(str(folder / "model")).model, folder / "few", layers_to_transform=[0])
    study = adapted_study(folder)
    with named(r"trains other parameters(.|\n)*few"):
        open_checkpoint(study, open_subject(study), str(folder / "few"), None)


def test_of_a_model_that_is_given_with_an_adapter_the_adapter_moves(folder: Path) -> None:
    data = [str(folder / name) for name in ("pairs.jsonl", "prompts.jsonl")]
    study = adapted_study(folder)
    base = load_model(study.model.id)
    wrap = partial(peft.PeftModel.from_pretrained, model_id=study.model.adapter)
    expected = influence(study.model.id, *data, ["behavior:harmless"], study=study)
    given = influence(wrap(base.model, is_trainable=True), *data, ["behavior:harmless"], tokenizer=base.tokenizer)
    np.testing.assert_allclose(given.values, expected.values, rtol=1e-4, atol=1e-8)
    frozen = wrap(load_model(study.model.id).model)
    with named(r"adapter is frozen(.|\n)*is_trainable=True"):
        influence(frozen, *data, tokenizer=base.tokenizer)
    with named("brings its adapter along"):
        influence(base.model, *data, tokenizer=base.tokenizer, study=study)


def test_patterns_of_the_study_go_before_those_of_the_adapter(folder: Path) -> None:
    study = adapted_study(folder)
    subject = open_subject(study)
    moving = subject.moving(study)
    assert len(moving) == 12 and all("lora_" in name for name in moving)
    assert subject.moving(study.replace("attribution.parameters", ["*mlp*"])) == ("*mlp*",)
    plain = load_study(folder / "study.yaml")
    assert open_subject(plain).moving(plain) is None


@pytest.mark.parametrize(
    "how",
    [
        {},
        {"modules_to_save": ["lm_head"]},
        {"use_dora": True},
        {"trainable_token_indices": [1, 5]},
        {"target_modules": ["embed_tokens", "q_proj"]},
    ],
)
def test_without_its_adapter_the_model_is_what_it_was(tmp_path, how) -> None:
    name = "untied"
    plain, examples = tiny_model(name), tiny_examples()
    expected = torch.stack([plain_loss(plain, z) for z in examples]).detach()
    write_adapter(tiny_model(name), tmp_path / "adapter", **how)
    model = add_adapter(tiny_model(name), str(tmp_path / "adapter"))[0]
    flags = [p.requires_grad for p in model.parameters()]
    adapted = example_losses(model, examples, 100)
    assert not torch.allclose(adapted, expected)
    with without_adapter(model):
        torch.testing.assert_close(example_losses(model, examples, 100), expected, rtol=1e-12, atol=1e-12)
    assert torch.equal(example_losses(model, examples, 100), adapted)
    assert [p.requires_grad for p in model.parameters()] == flags


def test_biases_of_an_adapter_hide_the_model_s(tmp_path) -> None:
    write_adapter(tiny_model("tied"), tmp_path / "adapter", bias="all")
    model = add_adapter(tiny_model("tied"), str(tmp_path / "adapter"))[0]
    with pytest.raises(UserError, match="without its adapter(.|\n)*ref_chosen_logps"), without_adapter(model):
        pass
