"""A trainer's run as it is recorded, against the same run by hand; what follows it, and what is refused."""

from __future__ import annotations

import json
import shutil
from dataclasses import replace

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, BitsAndBytesConfig, Trainer, TrainerCallback, TrainingArguments

import taught
from reference import GROUPS, close
from taught.core import driver
from taught.core.driver import Method
from taught.core.estimator import Work
from taught.core.example import conversation, sft
from taught.core.readings import Readings
from taught.core.registry import Choice
from taught.core.target import TargetSet
from taught.errors import UserError
from taught.model.quantised import plain_weights
from taught.progress import SilentProgress
from taught.sketches.store import example_digest
from taught.stages.check import check_study
from taught.stages.subject import open_subject, study_examples, study_prompts
from taught.study.load import load_study
from taught.study.schema import ValidationSpec
from taught.training.recipe import Recipe
from taught.training.recorded import Recorded
from tiny_models import (
    PAIRS,
    PROMPT_IDS,
    plain_loss,
    plain_y,
    tiny_examples,
    tiny_model,
    tiny_preferences,
    tiny_problem,
    tiny_prompts,
)
from tiny_study import do, values_of, with_values, write_tiny_study

FEW = ("model.layers.1.mlp.up_proj.weight", "model.layers.0.self_attn.v_proj.weight")
LONG = [sft(f"n{i}", (5 + i, 6, 7, 8 + i, 9, 10), 3) for i in range(4)]  # equally many scored tokens


def model32(name: str = "untied"):
    return tiny_model(name).float()


def padded(rows):
    width = max(len(row["input_ids"]) for row in rows)
    fills = {"input_ids": 0, "labels": -100, "attention_mask": 0}
    rows = [{**row, "attention_mask": [1] * len(row["input_ids"])} for row in rows]
    return {k: torch.tensor([[*r[k], *[fill] * (width - len(r[k]))] for r in rows]) for k, fill in fills.items()}


def rows_of(examples):
    return [
        {"input_ids": list(z.ids), "labels": [i if w else -100 for i, w in zip(z.ids, z.weights[0], strict=True)]}
        for z in examples
    ]


def trainer_of(folder, model, examples, *callbacks, **arguments):
    options = {
        "output_dir": str(folder / "out"),
        "per_device_train_batch_size": 1,
        "gradient_accumulation_steps": 3,
        "num_train_epochs": 3,
        "learning_rate": 0.01,
        "weight_decay": 0.1,
        "max_grad_norm": 2.0,
        "lr_scheduler_type": "linear",
        "use_cpu": True,
        "remove_unused_columns": False,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        "logging_strategy": "no",
        **arguments,
    }
    made = Trainer(model, TrainingArguments(**options), data_collator=padded, train_dataset=rows_of(examples))
    for callback in callbacks:
        made.add_callback(callback)
    return made


def record(folder, model=None, examples=None, *, to="run", states=None, **arguments):
    """A run by the trainer, recorded; its folder."""
    callback = taught.Record(folder / to, **(states or {"checkpoints": 3}))
    trainer_of(folder, model or model32(), examples or tiny_examples(), callback, **arguments).train()
    return folder / to


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    return record(tmp_path_factory.mktemp("recorded"))


def problem32(**options):
    return tiny_problem(model32(), features=None, point=None, **options)


def behaviors() -> Readings:
    ids = tuple(p.id for p in tiny_prompts())
    groups = {g: [i for i, own in zip(ids, GROUPS, strict=True) if own == g] for g in "ab"}
    return Readings(ids, np.zeros(len(ids)), groups, {})


class Noted(SilentProgress):
    def __init__(self) -> None:
        self.notes: list[str] = []

    def note(self, text: str) -> None:
        self.notes.append(text)


def scores(folder, kind="segments", examples=None, problem=None, work=None, **how):
    method = Method(trajectory=Choice(kind, {"run": str(folder), **how}))
    targets = TargetSet.of(["behavior:a"], behaviors())
    problem = problem or problem32(parameters=FEW)
    return driver.scores(problem, examples or tiny_examples(), targets, method, work or Work())


# What is recorded


@pytest.mark.parametrize("items", [True, False], ids=["mean over a step", "mean over micro-batches"])
def test_the_record_makes_the_same_run_by_hand(tmp_path, items) -> None:
    # Accumulation over 3 micro-batches of 2, 5 examples an epoch: the last step of an epoch has one micro-batch.
    examples = [*tiny_examples(), LONG[0], LONG[1], LONG[2]]
    made = trainer_of(
        tmp_path,
        model32(),
        examples,
        taught.Record(tmp_path / "run", checkpoints=[0, 3, 5]),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=3,
    )
    made.model_accepts_loss_kwargs = items
    made.train()
    found = Recorded.open(tmp_path / "run")
    assert (found.steps, found.states) == (6, (0, 3, 5))
    seen = {name: k for k, name in enumerate(found.sequences)}
    rows = {seen[example_digest(z)]: z for z in examples}
    model = model32()
    names, params = zip(*model.named_parameters(), strict=True)
    optimizer = torch.optim.AdamW(params, lr=1.0, weight_decay=0.0)
    decays = found.decay
    for step in range(found.steps):
        if step in found.states:
            for name, w in found.load(step).parts["weights"].items():
                torch.testing.assert_close(model.get_parameter(name).detach(), w, rtol=1e-4, atol=1e-5)
        some = slice(*found.arrays["offsets"][step : step + 2])
        parts = zip(found.arrays["rows"][some], found.arrays["shares"][some], strict=True)
        loss = sum(share * plain_loss(model, rows[k]) for k, share in parts)
        assert found.arrays["shares"][some].sum() == pytest.approx(1)
        for p, g in zip(params, torch.autograd.grad(loss, params), strict=True):
            p.grad = g
        norm = float(torch.nn.utils.clip_grad_norm_(params, 2.0))
        assert found.arrays["scale"][step] == pytest.approx(min(1.0, 2.0 / norm), rel=1e-3)
        assert found.lrs[step] == pytest.approx(0.01 * (6 - step) / 6)
        optimizer.param_groups[0]["lr"] = found.lrs[step]
        with torch.no_grad():
            for name, p in zip(names, params, strict=True):
                p.mul_(1 - found.lrs[step] * decays[name])
        optimizer.step()
        if step in found.states:
            second = found.load(step).parts["second"]
            for name, p in zip(names, params, strict=True):
                v = optimizer.state[p]["exp_avg_sq"] / (1 - 0.999 ** (step + 1))
                torch.testing.assert_close(second[name], v, rtol=1e-3, atol=1e-6)
    for name, w in found.load(found.steps).parts["weights"].items():
        torch.testing.assert_close(model.get_parameter(name).detach(), w, rtol=1e-4, atol=1e-5)
    assert {0.1, 0.0} == set(decays.values()) and (found.arrays["scale"] < 1).any()


def test_training_is_not_changed_and_what_is_written_is_safetensors_and_json(tmp_path, run) -> None:
    plain = model32()
    trainer_of(tmp_path, plain, tiny_examples()).train()
    last = load_file(run / f"step-{Recorded.open(run).steps}.safetensors")
    assert all(torch.equal(last[name], p) for name, p in plain.named_parameters())
    assert {file.suffix for file in run.iterdir()} == {".json", ".safetensors"}
    assert not plain._forward_pre_hooks


def test_a_state_is_kept_every_so_many_steps_and_evaluation_is_not_seen(tmp_path) -> None:
    class Evaluating(TrainerCallback):
        def on_step_end(self, args, state, control, **given):
            made.evaluate(rows_of(LONG))

    callback = taught.Record(tmp_path / "run", every=2, moments=False)
    made = trainer_of(tmp_path, model32(), tiny_examples(), callback, Evaluating())
    made.train()
    found = Recorded.open(tmp_path / "run")
    assert found.states == (0, 2, 4) and found.load(2).parts["second"] == {}
    assert len(found.sequences) == len(PAIRS) and len(found.arrays["rows"]) == 3 * len(PAIRS)


# What follows it


def test_recorded_states_are_the_checkpoints_that_one_names_by_hand(run) -> None:
    found = Recorded.open(run)
    models = {}
    for step in found.states:
        models[str(step)] = model32()
        models[str(step)].load_state_dict(load_file(run / f"step-{step}.safetensors"), strict=False)
    by_hand = [{"id": str(step), "lr": float(found.lrs[step])} for step in found.states]
    method = Method(trajectory=Choice("checkpoints", {"checkpoints": by_hand}))
    targets = TargetSet.of(["behavior:a"], behaviors())
    problem = problem32(opener=lambda id, revision: models[id])
    expected = driver.scores(problem, tiny_examples(), targets, method, Work())
    np.testing.assert_array_equal(scores(run, "checkpoints", problem=problem32()).values, expected.values)


@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_segments_of_a_recorded_run_are_those_of_the_same_run_by_the_recipe(tmp_path, optimizer) -> None:
    # All examples at every step, equally long: order and weights are those of the plain loop.
    lr = {"adamw": 0.01, "sgd": 0.1}[optimizer]
    spec = ValidationSpec(optimizer=optimizer, lr=lr, epochs=6, batch=4, max_grad_norm=1.0, schedule="linear")
    arguments = {"optim": "adamw_torch"} if optimizer == "adamw" else {"optim": "sgd", "optim_args": "momentum=0.5"}
    model = model32()
    for name, p in model.named_parameters():
        p.requires_grad_(name in FEW)
    folder = record(
        tmp_path,
        model,
        LONG,
        states={"checkpoints": 4},
        per_device_train_batch_size=4,
        gradient_accumulation_steps=1,
        num_train_epochs=6,
        learning_rate=lr,
        weight_decay=0.0,
        max_grad_norm=1.0,
        **arguments,
    )
    recipe = replace(Recipe.of(spec), momentum=0.5 if optimizer == "sgd" else 0.0)
    found = scores(folder, examples=LONG, segments=2)
    method = Method(trajectory=Choice("segments", {"segments": 2, "checkpoints": 2}))
    own = driver.scores(
        problem32(recipe=recipe, parameters=FEW), LONG, TargetSet.of(["behavior:a"], behaviors()), method, Work()
    )
    close(found.values, own.values, 2e-3)


def test_examples_count_as_the_run_weighed_them(tmp_path) -> None:
    # The trainer's loss is a mean over the tokens of a step, here of all examples: long responses count for more.
    folder = record(tmp_path, gradient_accumulation_steps=4)
    counts = np.array([z.n_scored for z in tiny_examples()])
    np.testing.assert_allclose(Recorded.open(folder).shares(tiny_examples()), counts / counts.sum())
    twice = [*tiny_examples(), replace(tiny_examples()[0], id="again")]
    both = Recorded.open(folder).shares(twice)
    assert both[0] == both[4] == pytest.approx(counts[0] / counts.sum() / 2)
    # In a short run at a small rate the effect of an example is its share of what it does at the base model.
    slow = record(tmp_path, to="slow", gradient_accumulation_steps=4, learning_rate=1e-6, optim="sgd")
    problem = problem32(parameters=FEW, lr=1.0)
    targets = TargetSet.of(["behavior:a"], behaviors())
    base = driver.scores(problem, tiny_examples(), targets, Method(), Work()).values[:, 0]
    total = Recorded.open(slow).rates.sum()
    close(scores(slow, segments=1).values[:, 0], base * counts / counts.sum() * total, 1e-3)


def test_tokens_that_a_template_writes_behind_a_turn_and_other_scored_ones_are_the_run_s(tmp_path) -> None:
    longer = [conversation(z.id, (*z.ids, 11, 12), range(1, len(z.ids) + 2)) for z in tiny_examples()]
    folder = record(tmp_path, examples=longer, states={"checkpoints": 1})
    noted = Noted()
    found = scores(folder, "checkpoints", work=Work(noted))
    np.testing.assert_array_equal(found.values, scores(folder, "checkpoints", longer).values)
    assert any("4 examples with other tokens" in text for text in noted.notes)
    far = [conversation(z.id, (*z.ids, 11, 12, 13, 14, 15), range(1, len(z.ids))) for z in tiny_examples()]
    with pytest.raises(UserError, match=r"not the study's examples(.|\n)*never seen: z0, z1, z2, z3"):
        scores(record(tmp_path, examples=far, to="far"), segments=1)


def test_a_row_of_which_nothing_is_scored_has_no_part_in_the_run(tmp_path) -> None:
    silent = {"input_ids": [5, 6, 7], "labels": [-100] * 3}
    made = trainer_of(tmp_path, model32(), tiny_examples(), taught.Record(tmp_path / "run"))
    made.train_dataset = [silent, *made.train_dataset]
    made.train()
    found = Recorded.open(tmp_path / "run")
    assert len(found.sequences) == 5 and found.shares(tiny_examples()).sum() == pytest.approx(1)
    assert [z.id for z in found.seen(problem32(), tiny_examples(), SilentProgress())] == ["z0", "z1", "z2", "z3"]


def test_an_adapter_s_run_is_followed_from_the_adapter_before_training(tmp_path) -> None:
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    config = peft.LoraConfig(r=2, target_modules=["up_proj", "v_proj"], lora_dropout=0.0)
    adapted = peft.get_peft_model(model32(), config)
    start = {n: p.detach().clone() for n, p in adapted.named_parameters()}
    folder = record(tmp_path, adapted)
    with torch.no_grad():
        for name, p in adapted.named_parameters():
            p.copy_(start[name])
    moving = tuple(n.removeprefix("base_model.model.") for n, p in adapted.named_parameters() if p.requires_grad)
    assert Recorded.open(folder).moving == moving
    problem = replace(problem32(), model=adapted.get_base_model(), parameters=moving)
    assert np.abs(scores(folder, problem=problem, segments=1).values).max() > 0
    with pytest.raises(UserError, match=r"another model(.|\n)*only in the run(.|\n)*model\.adapter"):
        scores(folder)


def test_a_run_on_quantised_weights_is_followed_by_its_true_gradients(tmp_path) -> None:
    peft = pytest.importorskip("peft")
    pytest.importorskip("bitsandbytes", reason="the package bitsandbytes is not installed")
    model32("tied").save_pretrained(tmp_path / "model")
    codes = BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_quant_type="nf4")

    def fresh():
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "model", quantization_config=codes, dtype=torch.float32)
        torch.manual_seed(0)
        config = peft.LoraConfig(r=2, target_modules=["up_proj", "v_proj"], init_lora_weights="gaussian")
        return peft.get_peft_model(model, config)

    folder = record(tmp_path, fresh(), LONG, states={"checkpoints": 2}, num_train_epochs=2)
    run, plain, followed = Recorded.open(folder), fresh().get_base_model(), fresh().get_base_model()
    own = [plain.train().get_parameter(name) for name in run.moving]

    def gradient(value):
        return torch.cat([g.flatten() for g in torch.autograd.grad(value, own)])

    expected = np.zeros(len(LONG))
    for step in run.states:
        with torch.no_grad():
            for name, weight in run.load(step).parts["weights"].items():
                plain.get_parameter(name).copy_(weight)
        reads = [plain_y(plain, ids) for ids, group in zip(PROMPT_IDS, GROUPS, strict=True) if group == "a"]
        target = gradient(torch.stack(reads).mean())
        expected -= run.lrs[step] * np.array([float(gradient(plain_loss(plain, z)) @ target) for z in LONG])
    with plain_weights(followed):
        problem = replace(problem32(), model=followed.eval(), parameters=run.moving)
        found = scores(folder, "checkpoints", examples=LONG, problem=problem).values[:, 0]
    np.testing.assert_allclose(found, expected, rtol=1e-3, atol=1e-4 * np.abs(expected).max())


@pytest.fixture(scope="module")
def followed(tmp_path_factory):
    """A study, and a run of its model on its examples."""
    place = tmp_path_factory.mktemp("followed")
    values = {
        "sae.path": None,
        "examples.limit": 4,
        "prompts.limit": 6,
        "attribution.targets": ["behavior:harmless"],
        "attribution.parameters": ["model.layers.1.mlp.*"],
        "attribution.exact_top": 0,
    }
    study = with_values(load_study(write_tiny_study(place)), values)
    subject = open_subject(study)
    chosen, _ = study_examples(study, study_prompts(study))
    inputs = [z.example() for z in subject.chat.encode_examples(chosen, 128, False)[0]]
    return study, record(place, subject.loaded.model, inputs, states={"checkpoints": 2}, num_train_epochs=1)


@pytest.mark.parametrize("kind, more", [("segments", {"segments": 2}), ("checkpoints", {})])
def test_a_study_follows_its_user_s_run_and_check_says_what_it_takes(tmp_path, followed, kind, more) -> None:
    study, folder = followed
    own = study.replace("attribution.trajectory", {"kind": kind, "run": str(folder), **more})
    report = check_study(own)
    assert not report.problems and "operations" in dict(report.rows)["cost"]
    run = do(own, tmp_path / "run", "readings", "attribute")
    assert np.isfinite(list(values_of(run, "behavior:harmless").values())).all()


def test_check_names_what_does_not_fit(tmp_path, followed) -> None:
    study, folder = followed
    broken = tmp_path / "broken"
    shutil.copytree(folder, broken)
    (broken / "steps.safetensors").write_bytes(b"")
    for place, limit, words in ((folder, 6, "never seen"), (broken, 4, "damaged")):
        along = {"kind": "checkpoints", "run": str(place)}
        other = study.replace("attribution.trajectory", along).replace("examples.limit", limit)
        assert words in str(check_study(other).problems)


# What is refused before the first step


def with_dropout():
    model = model32("gpt2")
    model.transformer.drop.p = 0.1
    return model


@pytest.mark.parametrize(
    "model, arguments, words",
    [
        (with_dropout, {}, "dropout is on"),
        (lambda: model32().to(torch.bfloat16), {}, "half precision"),
        (model32, {"optim": "adafactor"}, "optimizer is not recorded"),
        (model32, {"label_smoothing_factor": 0.1}, "smoothed"),
        (model32, {"neftune_noise_alpha": 5.0}, "noise"),
    ],
    ids=["dropout", "half", "optimizer", "smoothing", "noise"],
)
def test_what_cannot_be_followed_is_refused_before_the_first_step(tmp_path, model, arguments, words) -> None:
    made = model()
    before = {n: p.detach().clone() for n, p in made.named_parameters()}
    with pytest.raises(UserError, match=words):
        record(tmp_path, made, **arguments)
    assert all(torch.equal(before[n], p) for n, p in made.named_parameters())


def test_a_model_whose_dropout_is_set_to_zero_is_recorded(tmp_path) -> None:
    model = model32("gpt2")
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    assert Recorded.open(record(tmp_path, model)).steps == 6


@pytest.mark.parametrize("name", ["packing", "padding_free"])
def test_packed_rows_are_refused_by_what_the_trainer_is_told(tmp_path, name) -> None:
    made = trainer_of(tmp_path, model32(), tiny_examples(), taught.Record(tmp_path / "run"))
    setattr(made.args, name, True)  # TRL's arguments have it
    with pytest.raises(UserError, match="packed"):
        made.train()


def test_packed_rows_are_refused_by_what_the_model_is_given(tmp_path) -> None:
    def packed(rows):
        ids = [i for row in rows for i in row["input_ids"]]
        places = [t for row in rows for t in range(len(row["input_ids"]))]
        return {
            name: torch.tensor([of]) for name, of in (("input_ids", ids), ("labels", ids), ("position_ids", places))
        }

    made = trainer_of(
        tmp_path, model32(), tiny_examples(), taught.Record(tmp_path / "run"), per_device_train_batch_size=2
    )
    made.data_collator = packed
    with pytest.raises(UserError, match="packed"):
        made.train()


def test_labels_that_are_not_the_inputs_are_refused(tmp_path) -> None:
    made = trainer_of(tmp_path, model32(), tiny_examples(), taught.Record(tmp_path / "run"))
    for row in made.train_dataset:
        row["labels"][-1] = 9
    with pytest.raises(UserError, match="labels are not the model's own inputs"):
        made.train()
    assert not made.model._forward_pre_hooks  # it is watched no longer


def test_a_model_that_is_called_without_labels_is_refused(tmp_path) -> None:
    made = trainer_of(tmp_path, model32(), tiny_examples(), taught.Record(tmp_path / "run"))
    made.compute_loss_func = lambda outputs, labels, num_items_in_batch: outputs.logits.sum()
    with pytest.raises(UserError, match="without labels"):
        made.train()


class Other(Trainer):
    def compute_loss(self, model, inputs, **given):
        outputs = model(**inputs)
        return outputs.loss + 0.1 * outputs.logits.square().mean()


def test_a_trainer_with_a_loss_of_its_own_is_refused_by_its_gradient(tmp_path) -> None:
    model = model32()
    plain = trainer_of(tmp_path, model, tiny_examples())
    made = Other(model, plain.args, data_collator=padded, train_dataset=rows_of(tiny_examples()))
    made.add_callback(taught.Record(tmp_path / "run"))
    with pytest.raises(UserError, match="gradient is not that of the sequences"):
        made.train()


def test_a_folder_is_recorded_once_and_states_are_named_once(tmp_path, run) -> None:
    with pytest.raises(UserError, match="holds a recorded run"):
        record(run.parent, to=run.name)
    with pytest.raises(UserError, match="named twice"):
        taught.Record(tmp_path / "x", checkpoints=2, every=2)
    with pytest.raises(UserError, match="0 to 5"):
        record(tmp_path, states={"checkpoints": [6]})


def optimised(folder, kind, groups, model=None, factors=(1.0,), **given):
    """A recorded run by an optimizer of one's own, over groups of parameters; its record."""
    model, states = model or model32(), given.pop("states", {"checkpoints": 3})
    optimizer = kind([{**one, "params": some} for one, some in groups(list(model.parameters()))], lr=0.01, **given)
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, [lambda step, by=by: by**step for by in factors])
    made = trainer_of(folder, model, tiny_examples(), taught.Record(folder / "run", **states))
    made.optimizer, made.lr_scheduler = optimizer, schedule
    made.train()
    return Recorded.open(folder / "run")


def halves(**one):
    return lambda params: [(one, params[:3]), ({}, params[3:])]


@pytest.mark.parametrize(
    "kind, one, factors, words",
    [
        (torch.optim.AdamW, {"eps": 1e-2}, (1, 1), "differ in the optimizer's eps"),
        (torch.optim.AdamW, {"betas": (0.5, 0.9)}, (1, 1), "differ in the optimizer's betas"),
        (torch.optim.SGD, {"momentum": 0.9}, (1, 1), "differ in the optimizer's momentum"),
        (torch.optim.AdamW, {"lr": 0.02}, (1, 1), "different learning rates"),
        (torch.optim.AdamW, {}, (1, 0.5), "different learning rates"),
    ],
    ids=["eps", "betas", "momentum", "rates", "rates by schedule"],
)
def test_groups_of_parameters_that_are_moved_otherwise_are_refused(tmp_path, kind, one, factors, words) -> None:
    with pytest.raises(UserError, match=words):
        optimised(tmp_path, kind, halves(**one), factors=factors)


def test_groups_that_differ_in_decay_alone_are_one_record(tmp_path) -> None:
    found = optimised(tmp_path, torch.optim.AdamW, halves(weight_decay=0.5), factors=(0.9, 0.9))
    assert set(found.decay.values()) == {0.5, 0.01}
    np.testing.assert_allclose(found.lrs, 0.01 * 0.9 ** np.arange(6))


def test_an_optimizer_that_holds_frozen_parameters_too_is_that_of_what_moves(tmp_path) -> None:
    # torch makes no step on what has no gradient; the frozen group's own rate and epsilon say nothing of the run.
    found = {}
    for name, groups in (
        ("all", lambda params: [({"eps": 0.5, "lr": 1.0}, params[:3]), ({}, params[3:])]),
        ("moving", lambda params: [({}, params[3:])]),
    ):
        model = model32()
        for p in list(model.parameters())[:3]:
            p.requires_grad_(False)
        found[name] = optimised(tmp_path / name, torch.optim.AdamW, groups, model, (1,) * len(groups([])))
    one, other = found["all"], found["moving"]
    assert one.moving == other.moving and one.record["optimizer"] == other.record["optimizer"]
    np.testing.assert_array_equal(one.rates, other.rates)
    for part in ("weights", "second"):
        a, b = (run.load(run.states[-1]).parts[part] for run in (one, other))
        assert a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


def test_a_momentum_that_never_fades_is_refused(tmp_path) -> None:
    with pytest.raises(UserError, match="never fades"):
        optimised(tmp_path, torch.optim.SGD, lambda params: [({}, params)], momentum=1.0)


@pytest.mark.parametrize("begins", [True, False], ids=["thawed", "frozen"])
def test_a_run_in_which_other_parameters_come_to_move_is_refused(tmp_path, begins) -> None:
    class Changing(TrainerCallback):
        def on_step_begin(self, args, state, control, **given):
            if state.global_step == 2:
                first.requires_grad_(begins)

    model = model32()
    first = next(model.parameters()).requires_grad_(not begins)
    made = trainer_of(tmp_path, model, tiny_examples(), taught.Record(tmp_path / "run"), Changing())
    with pytest.raises(UserError, match="other parameters move"):
        made.train()


def test_a_callback_that_is_added_while_training_goes_on_is_refused(tmp_path) -> None:
    class Adding(TrainerCallback):
        def on_step_end(self, args, state, control, **given):
            made.add_callback(taught.Record(tmp_path / "run"))

    made = trainer_of(tmp_path, model32(), tiny_examples(), Adding())
    with pytest.raises(UserError, match="began before the callback was added"):
        made.train()


# What is refused when it is followed


def test_a_run_that_was_not_finished_is_refused(tmp_path) -> None:
    class Dying(TrainerCallback):
        def on_step_end(self, args, state, control, **given):
            if state.global_step == 3:
                raise KeyboardInterrupt

    made = trainer_of(tmp_path, model32(), tiny_examples(), taught.Record(tmp_path / "run"), Dying())
    with pytest.raises(KeyboardInterrupt):
        made.train()
    with pytest.raises(UserError, match="not finished"):
        scores(tmp_path / "run")
    with pytest.raises(UserError, match="no recorded run"):
        scores(tmp_path)


@pytest.mark.parametrize("kind", ["segments", "checkpoints"])
def test_a_run_that_moved_nothing_is_refused(tmp_path, kind) -> None:
    one = record(tmp_path, max_steps=1, warmup_steps=1, states={"checkpoints": 1})
    with pytest.raises(UserError, match="moved nothing"):
        scores(one, kind, **({"segments": 1} if kind == "segments" else {}))


@pytest.mark.parametrize("kind", ["segments", "checkpoints"])
def test_a_run_of_other_data_is_refused_by_name(run, kind) -> None:
    with pytest.raises(UserError, match=r"not the study's examples(.|\n)*1 of 4 sequences, 3 of 12 times"):
        scores(run, kind, tiny_examples()[:3])
    with pytest.raises(UserError, match=r"never seen(.|\n)*1 of 5: n0"):
        scores(run, kind, [*tiny_examples(), LONG[0]])
    with pytest.raises(UserError, match=r"preferences(.|\n)*steps"):
        scores(run, kind, [*tiny_examples(), tiny_preferences()[0]])


@pytest.mark.parametrize("kind", ["segments", "checkpoints"])
def test_a_run_of_another_model_is_refused_by_name(run, kind) -> None:
    def other(change):
        problem = problem32(parameters=FEW)
        with torch.no_grad():
            change(problem.model)
        return problem

    with pytest.raises(UserError, match=r"other weights(.|\n)*1 of \d+ tensors, such as model\.norm\.weight"):
        scores(run, kind, problem=other(lambda m: m.model.norm.weight[0].add_(1e-6)))
    with pytest.raises(UserError, match="other weights"):  # bfloat16 holds too few digits to tell
        scores(run, kind, problem=other(lambda m: m.to(torch.bfloat16)))
    with pytest.raises(UserError, match="another model"):
        scores(run, kind, problem=replace(problem32(), model=model32("gpt2")))
    with pytest.raises(UserError, match="did not move"):
        moved = dict.fromkeys(("moves",), False)
        found = Recorded.open(run)
        found.record["parameters"][FEW[0]].update(moved)
        found.parameters(problem32(parameters=FEW[:1]))
    # A finer precision is the same model.
    finer = other(lambda m: m.double())
    assert np.isfinite(scores(run, kind, problem=finer).values).all()


def test_missing_moments_and_segments_without_a_state_are_refused_and_the_fix_works(tmp_path, run) -> None:
    bare = record(tmp_path, states={"every": 1, "moments": False})
    with pytest.raises(UserError, match=r"no second moments(.|\n)*moments=True"):
        scores(bare)
    assert np.isfinite(scores(bare, "checkpoints").values).all()
    with pytest.raises(UserError, match=r"segments=3"):
        scores(run, segments=5)
    assert np.isfinite(scores(run, segments=3).values).all()


def test_checkpoints_are_named_once(run) -> None:
    with pytest.raises(UserError, match="named twice"):
        scores(run, "checkpoints", checkpoints=[{"id": "x", "lr": 1.0}])


def edited(folder, change):
    record = json.loads((folder / "record.json").read_text())
    change(record)
    (folder / "record.json").write_text(json.dumps(record))


def changed(folder, name, change):
    tensors = load_file(folder / name)
    change(tensors)
    save_file(tensors, folder / name)


@pytest.mark.parametrize(
    "damage, words",
    [
        (lambda run: edited(run, lambda r: r.pop("optimizer")), "damaged"),
        (lambda run: edited(run, lambda r: r["parameters"][FEW[0]].update(dtype="floaty")), "damaged"),
        (lambda run: edited(run, lambda r: r.update(states=[99])), "damaged"),
        (lambda run: edited(run, lambda r: r.update(states=[])), "no state"),
        (lambda run: changed(run, "step-1.safetensors", lambda t: t.pop(FEW[0])), "damaged"),
        (lambda run: changed(run, "step-1.safetensors", lambda t: t.update({FEW[0]: t[FEW[0]][:1]})), "damaged"),
        (lambda run: changed(run, "step-6.safetensors", lambda t: t[FEW[0]].fill_(float("nan"))), "diverged"),
        (lambda run: changed(run, "steps.safetensors", lambda t: t["rows"].add_(99)), "damaged"),
        (lambda run: changed(run, "steps.safetensors", lambda t: t.pop("tokens")), "damaged"),
        (lambda run: (run / "step-1.moments.safetensors").unlink(), "damaged"),
    ],
)
def test_a_damaged_record_is_refused(tmp_path, run, damage, words) -> None:
    shutil.copytree(run, tmp_path / "run")
    damage(tmp_path / "run")
    with pytest.raises(UserError, match=words):
        scores(tmp_path / "run", segments=1)


def test_a_newer_format_is_refused(tmp_path, run) -> None:
    (tmp_path / "record.json").write_text(json.dumps({**Recorded.open(run).record, "format": 99}))
    with pytest.raises(UserError, match="newer format"):
        Recorded.open(tmp_path)


def trl_trainer(folder, model, rows, **arguments):
    trl = pytest.importorskip("trl")
    from datasets import Dataset
    from transformers import AutoTokenizer

    config = trl.SFTConfig(
        output_dir=str(folder / "out"),
        per_device_train_batch_size=2,
        gradient_accumulation_steps=2,
        num_train_epochs=2,
        learning_rate=0.01,
        use_cpu=True,
        bf16=False,
        gradient_checkpointing=False,
        max_length=None,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
        **arguments,
    )
    tokenizer = AutoTokenizer.from_pretrained(folder / "model")
    made = trl.SFTTrainer(model, args=config, train_dataset=Dataset.from_list(rows), processing_class=tokenizer)
    made.add_callback(taught.Record(folder / "run", checkpoints=2))
    return made


@pytest.mark.slow  # imports trl, which most machines do not have
def test_a_run_by_trl_is_recorded_and_followed(tmp_path) -> None:
    write_tiny_study(tmp_path)
    trl_trainer(tmp_path, model32(), rows_of(tiny_examples())).train()
    counts = np.array([z.n_scored for z in tiny_examples()])
    found = Recorded.open(tmp_path / "run")
    np.testing.assert_allclose(found.shares(tiny_examples()), counts / counts.sum())
    assert np.abs(scores(tmp_path / "run", segments=2).values).max() > 0


@pytest.mark.slow  # imports trl, which most machines do not have
@pytest.mark.parametrize("form", ["prompt and completion", "messages"])
def test_trl_s_own_template_of_a_conversation_is_the_study_s_example(tmp_path, form) -> None:
    study = with_values(load_study(write_tiny_study(tmp_path)), {"sae.path": None})
    subject = open_subject(study)
    chosen, _ = study_examples(study, study_prompts(study))
    inputs = [z.example() for z in subject.chat.encode_examples(chosen, 128, False)[0]]
    rows = []
    for z in chosen:
        user, answer = {"role": "user", "content": z.prompt}, {"role": "assistant", "content": z.response}
        split = {"prompt": [user], "completion": [answer]}
        rows.append(split if form == "prompt and completion" else {"messages": [user, answer]})
    trl_trainer(tmp_path, subject.loaded.model, rows).train()
    fresh = open_subject(study).loaded.model
    problem = replace(problem32(), model=fresh)
    found = Recorded.open(tmp_path / "run").seen(problem, inputs, SilentProgress())
    assert [z.id for z in found] == [z.id for z in inputs]
    if form == "messages":  # all tokens are trained on there
        assert all(z.n_scored > own.n_scored + 4 for z, own in zip(found, inputs, strict=True))
