"""Models of 4 and 8 bits: what bitsandbytes itself computes where that is right, and their dequantised copies."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM, BitsAndBytesConfig

from reference import LR
from taught import influence
from taught.core.example import example_losses
from taught.errors import UserError
from taught.estimators.every_prompt import prompt_effects
from taught.estimators.finite_step import finite_steps
from taught.estimators.forward import tangents
from taught.model.adapter import trainable
from taught.model.load import load_model
from taught.model.parameters import is_plain
from taught.model.quantised import KINDS, plain_weights, quantised_layers
from taught.model.readout import read_prompts
from taught.stages.check import check_study
from taught.stages.subject import open_subject
from taught.study.load import load_study
from taught.training.loop import in_training, train
from taught.training.recipe import Recipe
from taught.training.trl import train_by_trl
from tiny_models import (
    PROMPT_IDS,
    plain_loss,
    plain_y,
    tiny_examples,
    tiny_gpt2,
    tiny_llama,
    tiny_problem,
    tiny_prompts,
)
from tiny_study import write_tiny_study

bitsandbytes = pytest.importorskip("bitsandbytes", reason="the package bitsandbytes is not installed")
peft = pytest.importorskip("peft", reason="the package peft is not installed")


SOME = PROMPT_IDS[:3]


def settings(kind: str) -> BitsAndBytesConfig:
    """What a user of transformers writes for the same kind."""
    if kind == "int8":
        return BitsAndBytesConfig(load_in_8bit=True)
    return BitsAndBytesConfig(
        load_in_4bit=True,
        bnb_4bit_quant_type=kind[:3],
        bnb_4bit_use_double_quant=kind.endswith("double"),
        bnb_4bit_compute_dtype=torch.float32,
    )


def theirs(folder: Path, kind: str):
    """The model as transformers loads it, in training mode.

    There, and nowhere else, are the products of bitsandbytes plain ones on every CPU.
    """
    return AutoModelForCausalLM.from_pretrained(
        folder / "model", quantization_config=settings(kind), dtype=torch.float32
    ).train()


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    """A study with an adapter beside its model, and no SAE."""
    folder = tmp_path_factory.mktemp("quantised")
    study = write_tiny_study(folder)
    study.write_text(study.read_text().replace("sae: {path: ./sae}\n", ""))
    plain = load_model(str(folder / "model")).model
    config = peft.LoraConfig(r=2, lora_alpha=3, target_modules=["q_proj", "down_proj"])
    wrapped, draw = peft.get_peft_model(plain, config), torch.Generator().manual_seed(0)
    with torch.no_grad():
        for name, p in wrapped.named_parameters():
            if "lora_" in name:
                p.copy_(0.4 * torch.randn(p.shape, generator=draw))
    wrapped.save_pretrained(folder / "adapter")
    return folder


@pytest.fixture(scope="module")
def dequantised(folder) -> Path:
    """The study's model in nf4, saved as plain weights."""
    copy = theirs(folder, "nf4").dequantize()
    copy.save_pretrained(folder / "dequantised")
    load_model(str(folder / "model")).tokenizer.save_pretrained(folder / "dequantised")
    return folder / "dequantised"


def ours(folder: Path, kind: str | None, name: str = "model", **how):
    return load_model(str(folder / name), load_in=kind, adapter=str(folder / "adapter"), **how)


def problem_of(model, names, **options):
    few = tiny_prompts()[: len(SOME)]
    return tiny_problem(model, prompts=few, parameters=names, lr=LR, point=None, features=None, **options)


def near(found, expected, rtol: float) -> None:
    found, expected = torch.as_tensor(found).double(), torch.as_tensor(expected).double()
    size = float(expected.abs().max())
    assert size > 0
    torch.testing.assert_close(found, expected, rtol=0, atol=rtol * size)


# Against transformers, peft and autograd


@pytest.mark.parametrize("kind", KINDS)
def test_read_outs_losses_and_effects_are_those_of_transformers_and_peft(folder, kind) -> None:
    own = ours(folder, kind)
    problem, examples = problem_of(own.model, own.moving), tiny_examples()[:2]
    # Passes without gradients come first: on some CPUs bitsandbytes would cut the gradients of those after them.
    losses = example_losses(own.model, examples, 24)
    y = read_prompts(own.model, problem.prompts, problem.behavior, None).y
    dy = prompt_effects(problem, examples)
    model = peft.PeftModel.from_pretrained(theirs(folder, kind), folder / "adapter", is_trainable=True)
    model = model.get_base_model()
    assert trainable(model) == own.moving

    def gradient(value) -> torch.Tensor:
        found = torch.autograd.grad(value, [model.get_parameter(name) for name in own.moving])
        return torch.cat([g.flatten() for g in found])

    plain = [plain_loss(model, z) for z in examples]
    reads = [plain_y(model, ids) for ids in SOME]
    near(losses, torch.stack(plain).detach(), 1e-5)
    near(y, torch.stack(reads).detach(), 1e-5)
    left, right = (torch.stack([gradient(value) for value in values]) for values in (plain, reads))
    near(dy, -LR * left @ right.T, 1e-4)


@pytest.mark.parametrize(("family", "bits"), [(tiny_llama, "int8"), (tiny_gpt2, "nf4")])
def test_biases_and_norms_beside_codes_move_by_their_true_gradients(tmp_path, family, bits) -> None:
    family().save_pretrained(tmp_path / "model")  # GPT-2 holds its weights turned
    load = AutoModelForCausalLM.from_pretrained
    model = load(tmp_path / "model", quantization_config=settings(bits), dtype=torch.float32).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    names = [name for name, p in model.named_parameters() if p.ndim == 1]
    assert any(name.endswith("proj.bias") for name in names)
    for name in names:
        model.get_parameter(name).requires_grad_()
    losses = [plain_loss(model, z) for z in tiny_examples()]
    reads = [plain_y(model, ids) for ids in SOME]
    parameters = [model.get_parameter(name) for name in names]

    def stacked(values) -> torch.Tensor:
        rows = [torch.autograd.grad(value, parameters, retain_graph=True) for value in values]
        return torch.stack([torch.cat([g.flatten() for g in row]) for row in rows])

    expected = -LR * stacked(losses) @ stacked(reads).T
    given = load(tmp_path / "model", quantization_config=settings(bits), dtype=torch.float32).eval()
    with plain_weights(given):
        found = prompt_effects(problem_of(given, tuple(names), batch_tokens=1), tiny_examples())
    near(found, expected, 1e-4)


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_numbers_of_a_text_do_not_depend_on_the_others_in_its_batch(folder, kind) -> None:
    """As 8-bit products of bitsandbytes do, by limits of a whole batch."""
    own = ours(folder, kind, dtype="float64")
    examples = tiny_examples()
    alone, together = (example_losses(own.model, examples, tokens) for tokens in (1, 10**4))
    near(together, alone, 1e-7)
    turned = example_losses(own.model, examples[::-1], 24)
    near(turned.flip(0), alone, 1e-7)
    found = [prompt_effects(problem_of(own.model, own.moving, batch_tokens=tokens), examples) for tokens in (1, 10**4)]
    near(found[1], found[0], 1e-6)


# Against the same model dequantised


def test_every_estimator_gives_what_the_dequantised_copy_gives(folder, dequantised) -> None:
    codes, plain = (ours(folder, *of, dtype="float64") for of in (("nf4",), (None, dequantised.name)))
    examples = tiny_examples()[:1]
    found = []
    for own in (codes, plain):
        problem = problem_of(own.model, own.moving)
        base = read_prompts(own.model, problem.prompts, problem.behavior, None)
        steps = [step.dy for step in finite_steps(problem, examples, base)]
        found.append((prompt_effects(problem, examples), [t.dy for t in tangents(problem, examples)], steps))
    for ours_, plain_ in zip(*found, strict=True):
        near(np.stack([np.asarray(v) for v in ours_]), np.stack([np.asarray(v) for v in plain_]), 1e-6)
    (adjoint, forward, real), _ = found
    near(np.stack(forward), adjoint, 1e-5)
    near(np.stack(real), adjoint, 0.05)


def test_second_derivatives_are_those_of_the_dequantised_copy(folder, dequantised) -> None:
    products = []
    for own in (ours(folder, "nf4", dtype="float64"), ours(folder, None, dequantised.name, dtype="float64")):
        p = own.model.get_parameter(own.moving[0])  # in the first block, behind layers of codes
        with torch.nn.attention.sdpa_kernel(torch.nn.attention.SDPBackend.MATH):
            (g,) = torch.autograd.grad(plain_loss(own.model, tiny_examples()[0]), p, create_graph=True)
            products.append(torch.autograd.grad((g * torch.ones_like(g)).sum(), p)[0])
    near(products[0], products[1], 1e-6)


def test_dora_takes_the_steps_that_it_takes_in_the_dequantised_copy(folder, dequantised, tmp_path) -> None:
    config = peft.LoraConfig(r=2, target_modules=["v_proj"], use_dora=True, init_lora_weights=False)
    torch.manual_seed(0)
    peft.get_peft_model(load_model(str(folder / "model")).model, config).save_pretrained(tmp_path / "dora")
    found = []
    for name, kind in (("model", "nf4"), (dequantised.name, None)):
        own = load_model(str(folder / name), dtype="float64", load_in=kind, adapter=str(tmp_path / "dora"))
        problem = problem_of(own.model, own.moving)
        base = read_prompts(own.model, problem.prompts, problem.behavior, None)
        found.append(next(step.dy for step in finite_steps(problem, tiny_examples()[:1], base)))
    near(*found, 1e-5)


def test_no_plain_weights_are_kept_for_the_way_back(folder) -> None:
    model, kept = ours(folder, "nf4").model, []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t.shape) or t, lambda t: t):
        plain_loss(model, tiny_examples()[0]).backward()
    assert kept and not {tuple(shape) for shape in kept} & {(16, 32), (32, 16)}  # of the MLP; no text is so long


def test_layers_that_accelerate_moves_inputs_for_compute_alike(folder) -> None:
    """As it does where a model lies on several GPUs."""
    hooks = pytest.importorskip("accelerate.hooks")
    model = theirs(folder, "nf4").eval()
    ids = torch.tensor([[5, 7, 9]])
    loaded = load_model(str(folder / "model"), load_in="nf4").model(ids).logits
    with plain_weights(model), torch.no_grad():
        expected = model(ids).logits
    for layer in quantised_layers(model).values():
        hooks.add_hook_to_module(layer, hooks.AlignDevicesHook(execution_device="cpu"))
    with plain_weights(model), torch.no_grad():
        assert torch.equal(model(ids).logits, expected)
    torch.testing.assert_close(expected, loaded)  # by other products, which may round otherwise
    assert not any("packing_format_for_cpu" in vars(m.weight.quant_state) for m in quantised_layers(model).values())


WAYS = {
    "sketch": {"attribution.estimator": {"kind": "sketch"}},
    "ekfac": {"attribution.curvature": {"kind": "ekfac"}},
    "steps": {"attribution.trajectory": "steps"},
    "checkpoints": {
        "attribution.trajectory": {"kind": "checkpoints", "checkpoints": [{"id": "./adapter", "lr": 1e-4}]}
    },
}
SMALL = {
    "validation.epochs": 1,
    "validation.batch": 4,
    "attribution.exact_top": 0,
    "prompts.limit": 2,
    "examples.limit": 2,
    "attribution.targets": ["behavior:harmless", "behavior:harmful"],
}


def study_of(folder: Path, values: dict, model: str = "model", load_in: str | None = "nf4"):
    study = load_study(folder / "study.yaml")
    given = {"model.id": f"./{model}", "model.load_in": load_in, "model.adapter": "./adapter", **SMALL, **values}
    for key, value in given.items():
        study = study.replace(key, value, base=folder)
    return study


def values_of(study, folder: Path | None = None) -> np.ndarray:
    data = (study.examples.path, study.prompts.path, study.attribution.targets)
    return influence(study.model.id, *data, study=study, folder=folder).values


@pytest.mark.parametrize("way", WAYS)
def test_a_study_of_any_method_gives_what_the_dequantised_copy_gives(folder, dequantised, tmp_path, way) -> None:
    expected = values_of(study_of(folder, WAYS[way], dequantised.name, None), tmp_path / "plain")
    near(values_of(study_of(folder, WAYS[way]), tmp_path / "codes"), expected, 1e-3)


@pytest.mark.parametrize("method", ["full", "lora"])
def test_training_moves_what_it_moves_in_the_dequantised_copy(folder, dequantised, method) -> None:
    recipe = Recipe.of(study_of(folder, {"validation.method": method, "validation.lr": 1e-3}).validation)
    adapter = str(folder / "adapter") if method == "full" else None
    found, asked = [], problem_of(None, None)
    for name, kind in (("model", "nf4"), (dequantised.name, None)):
        own = load_model(str(folder / name), load_in=kind, adapter=adapter)
        before = {n: p.detach().clone() for n, p in own.model.named_parameters()}
        with in_training(own.model, recipe, own.moving) as patterns:
            log = train(own.model, tiny_examples(), recipe, parameters=patterns)
            y = read_prompts(own.model, asked.prompts, asked.behavior, None).y
        found.append((log.losses, y))
        now = dict(own.model.named_parameters())
        assert now.keys() == before.keys()
        assert all(torch.equal(before[n], now[n]) for n in now)
    near(found[0][0], found[1][0], 1e-4)
    near(found[0][1], found[1][1], 1e-4)


def test_weights_beside_codes_that_training_keeps_are_read_as_a_checkpoint(folder, tmp_path) -> None:
    own = load_model(str(folder / "model"), load_in="nf4")
    recipe = Recipe.of(study_of(folder, {"validation.lr": 0.1}).validation)
    train(own.model, tiny_examples(), recipe, parameters=["*norm*"], keep=tmp_path)
    own.tokenizer.save_pretrained(tmp_path / "epoch-1")
    kept, ids = load_model(str(tmp_path / "epoch-1"), load_in="nf4"), torch.tensor([[5, 7, 9]])
    assert torch.equal(kept.model(ids).logits, own.model(ids).logits)
    assert not torch.equal(load_model(str(folder / "model"), load_in="nf4").model(ids).logits, own.model(ids).logits)


def test_costs_and_sizes_are_counted_as_of_plain_weights(folder, dequantised) -> None:
    rows = [dict(check_study(study_of(folder, {}, *of)).rows) for of in (("model", "nf4"), (dequantised.name, None))]
    assert rows[0]["quantised"] == "nf4, 21 linear layers"
    for key in ("cost", "moving"):
        assert rows[0][key] == rows[1][key]
    count = [row["model"].split(", ")[1] for row in rows]
    assert count[0] == count[1]


# What is read


@pytest.mark.parametrize("kind", KINDS)
def test_a_checkpoint_that_was_saved_quantised_is_read_as_it_was_saved(folder, tmp_path, kind) -> None:
    theirs(folder, kind).save_pretrained(tmp_path / "saved")
    load_model(str(folder / "model")).tokenizer.save_pretrained(tmp_path / "saved")
    now, saved = load_model(str(folder / "model"), load_in=kind), load_model(str(tmp_path / "saved"))
    assert saved.weights["quantised"] == now.weights["quantised"]
    assert load_model(str(tmp_path / "saved"), load_in=kind).weights["quantised"]["kind"] == kind
    ids = torch.tensor([[5, 7, 9]])
    assert torch.equal(saved.model(ids).logits, now.model(ids).logits)
    other = "fp4" if kind == "nf4" else "nf4"
    with pytest.raises(UserError, match=rf"quantised otherwise(.|\n)*: {kind}, model\.load_in: {other}"):
        load_model(str(tmp_path / "saved"), load_in=other)


def test_how_weights_are_held_is_a_part_of_what_results_depend_on(folder) -> None:
    identities = [open_subject(study_of(folder, {}, load_in=kind)).identity for kind in ("nf4", "nf4-double", None)]
    weights = [identity["model.weights"] for identity in identities]
    assert weights[0]["sha256"] == weights[2]["sha256"]
    assert weights[0]["quantised"]["sha256"] != weights[1]["quantised"]["sha256"]
    assert "quantised" not in weights[2]


def test_an_adapter_on_codes_is_held_in_the_precision_of_the_model(folder) -> None:
    for dtype in ("bfloat16", "float64"):
        model = ours(folder, "nf4", dtype=dtype).model
        assert {p.dtype for p in model.parameters() if is_plain(p)} == {getattr(torch, dtype)}


def test_codes_that_are_stored_as_floating_point_are_codes(folder, tmp_path) -> None:
    """As for training on several GPUs, which shards floating point numbers only."""
    how = settings("nf4")
    how.bnb_4bit_quant_storage = torch.bfloat16
    AutoModelForCausalLM.from_pretrained(
        folder / "model", quantization_config=how, dtype=torch.float32
    ).save_pretrained(tmp_path / "saved")
    load_model(str(folder / "model")).tokenizer.save_pretrained(tmp_path / "saved")
    stored = load_model(str(tmp_path / "saved")).model
    ids = torch.tensor([[5, 7, 9]])
    expected = load_model(str(folder / "model"), load_in="nf4").model(ids).logits
    assert torch.equal(stored(ids).logits, expected)
    with pytest.raises(UserError, match="quantised weights do not move"):
        prompt_effects(problem_of(stored, None), tiny_examples()[:1])


@pytest.mark.parametrize("kind", ["nf4", "int8"])
def test_a_quantised_model_that_is_given_is_computed_alike_and_left_as_it_was(folder, kind) -> None:
    data = [str(folder / name) for name in ("pairs.jsonl", "prompts.jsonl")]
    tokenizer = load_model(str(folder / "model")).tokenizer
    study = study_of(folder, {}, load_in=kind)
    expected = influence(study.model.id, *data, ["behavior:harmless"], study=study)
    given = peft.PeftModel.from_pretrained(theirs(folder, kind), folder / "adapter", is_trainable=True)
    with torch.no_grad():
        given(torch.tensor([[5, 7, 9]]))
    plain = study.replace("model.load_in", None).replace("model.adapter", None)
    found = influence(given, *data, ["behavior:harmless"], tokenizer=tokenizer, study=plain)
    near(found.values, expected.values, 1e-4)
    layers = quantised_layers(given).values()
    assert len(layers) == 21
    assert not any("forward" in vars(layer) for layer in layers)
    with pytest.raises(UserError, match=r"is quantised or not(.|\n)*quantization_config"):
        influence(given, *data, tokenizer=tokenizer, study=study.replace("model.adapter", None))
    if kind == "nf4":
        for layer in layers:  # as the first pass of a model in evaluation leaves them on some CPUs
            layer.weight.quant_state.packing_format_for_cpu = True
        with pytest.raises(UserError, match="packed anew for inference"):
            influence(given, *data, tokenizer=tokenizer, study=plain)
    given.config.quantization_config = {"quant_method": "hqq"}
    with pytest.raises(UserError, match="weights are quantised\n(.|\n)*: hqq"):
        influence(given, *data, tokenizer=tokenizer, study=plain)


# What is refused


@pytest.mark.parametrize("estimator", ["adjoint", "finite-step"])
def test_quantised_weights_do_not_move_and_each_advice_works(folder, estimator) -> None:
    alone = study_of(folder, {"model.adapter": None, "attribution.estimator": estimator})
    with pytest.raises(UserError, match="quantised weights do not move") as error:
        values_of(alone)
    assert "model.adapter" in error.value.fix
    name = error.value.fix.rsplit(" ", 1)[1]
    assert values_of(alone.replace("attribution.parameters", [name])).any()


def test_check_says_that_quantised_weights_do_not_move(folder) -> None:
    (problem,) = check_study(study_of(folder, {"model.adapter": None})).problems
    assert "quantised weights do not move" in problem


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"llm_int8_has_fp16_weight": True, "load_in_8bit": True, "load_in_4bit": False}, "has_fp16_weight: True"),
        ({"bnb_4bit_quant_type": "nf3"}, "quant_type: nf3"),
        ({"load_in_4bit": False}, "load_in_4bit: False"),
        ({"bnb_4bit_of_a_later_version": 7}, "later_version: 7"),
    ],
)
def test_settings_of_bitsandbytes_that_are_not_known_are_refused(folder, tmp_path, change, message) -> None:
    theirs(folder, "nf4").save_pretrained(tmp_path / "saved")
    load_model(str(folder / "model")).tokenizer.save_pretrained(tmp_path / "saved")
    file = tmp_path / "saved" / "config.json"
    config = json.loads(file.read_text())
    config["quantization_config"] |= change
    file.write_text(json.dumps(config))
    with pytest.raises(UserError, match=rf"not understood(.|\n)*{message}"):
        load_model(str(tmp_path / "saved"))


@pytest.mark.slow  # imports torch and bitsandbytes in a process of its own: 6 s of processor time
def test_no_code_is_fetched_from_the_hub_when_bitsandbytes_is_imported(python, tmp_path) -> None:
    (tmp_path / "kernels.py").write_text("def get_kernel(*args, **how):\n    print('ASKED FOR CODE')\n")
    lines = (
        f"import sys; sys.path[:0] = {[str(tmp_path), *sys.path]}",
        "from taught.model.quantised import bitsandbytes_is_there as there",
        "print('DONE' if there() else '')",
        "import peft.tuners.lora",
    )
    done = python("-c", "\n".join(lines))
    assert "DONE" in done.stdout and "ASKED" not in done.stdout, done.stderr


def test_trl_is_refused_and_the_loop_takes_its_place(folder) -> None:
    own = ours(folder, "nf4")
    recipe = Recipe.of(study_of(folder, {"validation.trainer": "trl"}).validation)
    with pytest.raises(UserError, match=r"trl does not train(.|\n)*trainer=loop"):
        train_by_trl(own.model, tiny_examples(), recipe, tokenizer=own.tokenizer, parameters=own.moving)
