"""Retraining: the base weights come back, finished ones are kept, and nothing is mixed up."""

from __future__ import annotations

import ast
import copy
from dataclasses import fields, replace
from pathlib import Path

import numpy as np
import pytest
import torch

import taught
import taught.training.retrain as module
from taught.core.example import sft
from taught.core.point import Point
from taught.errors import UserError
from taught.model.readout import read_prompts, read_prompts_plain
from taught.progress import SilentProgress
from taught.run.folder import RunFolder
from taught.stages.policy import policy
from taught.stages.readings import readings
from taught.stages.ready import prepare, read_data
from taught.stages.subject import open_checkpoint, open_subject
from taught.study.load import load_study
from taught.study.schema import ValidationSpec
from taught.training.loop import in_training, train
from taught.training.recipe import Recipe
from taught.training.retrain import Answering, Retrainer, Retraining, Unlearn
from taught.training.steps import Training
from taught.training.unlearn import loss_guard, unlearned
from tiny_models import POINT, plain_loss, same, snapshot, tiny_examples, tiny_model, tiny_problem
from tiny_study import write_tiny_study

WEIGHTS = {"source": "tiny", "sha256": "0"}


def recipe(**changes) -> Recipe:
    return replace(Recipe.of(ValidationSpec(lr=0.01, batch=2)), **changes)


def retrainer(folder: Path, **changes) -> Retrainer:
    model = tiny_model("tied")
    # Once, because transformers leaves hooks of its own at the first pass.
    plain_loss(model, tiny_examples()[0])
    given = {"problem": tiny_problem(model), "examples": tiny_examples(), "recipe": recipe(), "weights": WEIGHTS}
    return Retrainer(folder=folder, **{**given, **changes})


def equal(a: Retraining, b: Retraining, *, leave: tuple[str, ...] = ()) -> bool:
    examples = [(getattr(a, f.name), getattr(b, f.name)) for f in fields(a) if f.name not in leave]
    return all(np.array_equal(x, y) if isinstance(x, np.ndarray) else x == y for x, y in examples)


TIMES = ("seconds_training", "seconds_reading")


@pytest.fixture
def no_training(monkeypatch):
    """From here on, training anew is a failure of the test."""

    def start():
        def refuse(*_, **__):
            raise AssertionError("trained again")

        monkeypatch.setattr(module, "train", refuse)
        monkeypatch.setattr(module, "read_prompts", refuse)

    return start


# What a retraining is


@pytest.mark.parametrize("method", ["full", "lora"])
def test_a_retraining_is_training_and_the_read_outs_again(tmp_path, method: str) -> None:
    made = retrainer(tmp_path, recipe=recipe(method=method, lora_rank=2))
    before = snapshot(made.problem.model)
    found = made.run(["z2", "z0"], seed=7)
    assert same(before, snapshot(made.problem.model))

    trained = tiny_model("tied")
    examples = [tiny_examples()[0], tiny_examples()[2]]
    losses = [float(plain_loss(trained, example)) for example in examples]
    if method == "full":
        log = train(trained, examples, recipe(seed=7))
    else:
        from peft import LoraConfig, inject_adapter_in_model

        torch.manual_seed(7)
        config = LoraConfig(r=2, lora_alpha=4, target_modules="all-linear")
        trained = inject_adapter_in_model(config, trained)
        log = train(trained, examples, recipe(seed=7), parameters=("*lora_*",))
    problem = made.problem
    reads = read_prompts_plain(trained, problem.prompts, problem.behavior, POINT)
    X = problem.features(reads.h, reads.offsets).detach().numpy()
    np.testing.assert_allclose(found.y, reads.y.numpy(), rtol=1e-10)
    np.testing.assert_allclose(found.X, X, rtol=1e-9, atol=1e-11)
    np.testing.assert_allclose(found.losses_before, losses, rtol=1e-12)
    after = [float(plain_loss(trained, example)) for example in examples]
    np.testing.assert_allclose(found.losses_after, after, rtol=1e-9)
    assert (found.losses_after < found.losses_before).all()
    assert (found.ids, found.kept, found.seed) == (("z0", "z2"), ("z0", "z2"), 7)
    assert found.log == log
    assert found.prompt_ids == tuple(p.id for p in problem.prompts)
    assert found.feature_ids == tuple(problem.features.ids.tolist())
    assert not np.allclose(found.y, made.base().y, rtol=1e-3)


def test_the_base_model_is_read_without_training(tmp_path) -> None:
    made = retrainer(tmp_path)
    base, problem = made.base(), made.problem
    reads = read_prompts_plain(problem.model, problem.prompts, problem.behavior, POINT)
    np.testing.assert_allclose(base.y, reads.y.numpy(), rtol=1e-12)
    X = problem.features(reads.h, reads.offsets).numpy()
    np.testing.assert_allclose(base.X, X, rtol=1e-12, atol=1e-13)
    assert (base.ids, base.seed, base.log, len(base.losses_after)) == ((), None, None, 0)


def test_answers_are_those_of_the_retrained_model(tmp_path) -> None:
    how = Answering(limit=5, ends=(3,))
    made = retrainer(tmp_path / "a", answers=how, recipe=recipe(lr=0.05))
    found, base = made.run(["z0", "z1"]), made.base()
    trained = tiny_model("tied")
    train(trained, tiny_examples()[:2], recipe(lr=0.05))
    for model, answers in ((trained, found.answers), (tiny_model("tied"), base.answers)):
        for prompt, answer in zip(made.problem.prompts, answers, strict=True):
            by_hand: list[int] = []
            while len(by_hand) < 5 and 3 not in by_hand:
                logits = model(input_ids=torch.tensor([[*prompt.ids, *by_hand]])).logits
                by_hand.append(int(logits[0, -1].argmax()))
            assert list(answer) == by_hand
    assert found.answers != base.answers
    assert equal(made.run(["z0", "z1"]), found)  # from the folder
    without = retrainer(tmp_path / "a", recipe=recipe(lr=0.05)).run(["z0", "z1"])
    assert without.answers is None
    assert equal(without, found, leave=(*TIMES, "key", "answers"))


def test_the_seed_is_the_recipe_s_unless_another_is_given(tmp_path) -> None:
    made = retrainer(tmp_path)
    usual, other = made.run(["z0", "z1", "z3"]), made.run(["z0", "z1", "z3"], seed=1)
    assert (usual.seed, other.seed) == (42, 1)
    assert usual.log.ids != other.log.ids
    assert equal(usual, made.run(["z0", "z1", "z3"], seed=42))


def test_the_order_of_the_ids_and_of_earlier_retrainings_does_not_matter(tmp_path) -> None:
    first, second = retrainer(tmp_path / "a"), retrainer(tmp_path / "b")
    first.run(["z3"])
    assert equal(first.run(["z0", "z1"]), second.run(["z1", "z0"]), leave=TIMES)


def test_dropout_and_the_model_s_mode_are_left_alone(tmp_path) -> None:
    model = tiny_model("gpt2")
    reference = retrainer(tmp_path / "a", problem=tiny_problem(tiny_model("gpt2"))).run(["z0"])
    made = retrainer(tmp_path / "b", problem=tiny_problem(model.train()))
    assert equal(made.run(["z0"]), reference, leave=TIMES)
    assert all(m.training for m in model.modules())


# Weights


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("where", ["train", "example_losses", "read_prompts"])
def test_weights_come_back_to_the_bit_when_it_fails(tmp_path, monkeypatch, method, error, where) -> None:
    made = retrainer(tmp_path, recipe=recipe(method=method))
    before, real = snapshot(made.problem.model), getattr(module, where)
    example = tiny_examples()[0]
    loss = float(plain_loss(made.problem.model, example))
    calls = []

    def fails(*args, **how):
        calls.append(where)
        if calls == ["example_losses"]:
            return real(*args, **how)  # of the base model
        if where == "train":
            real(*args, **how)
        assert float(plain_loss(made.problem.model, example)) < loss - 1e-3  # trained, not yet put back
        raise error

    monkeypatch.setattr(module, where, fails)
    with pytest.raises(error):
        made.run(["z0", "z1"])
    assert same(before, snapshot(made.problem.model))
    assert [f.name for f in tmp_path.iterdir()] == ["retrained.json"]


def test_training_that_diverges_leaves_the_base_model_and_what_is_finished(tmp_path) -> None:
    good = retrainer(tmp_path)
    kept = good.run(["z0"])
    wild = retrainer(tmp_path, recipe=recipe(lr=1e200))
    before = snapshot(wild.problem.model)
    with pytest.raises(UserError, match=r"training diverged(.|\n)*step 2, examples z0"):
        wild.run(["z0"])
    assert same(before, snapshot(wild.problem.model))
    assert equal(retrainer(tmp_path).run(["z0"]), kept)


# What is kept


def test_a_finished_retraining_is_never_made_again(tmp_path, no_training) -> None:
    made = retrainer(tmp_path)
    first, base = made.run(["z0", "z1"]), made.base()
    no_training()
    assert equal(made.run(["z1", "z0"]), first)
    again = retrainer(tmp_path)  # another process
    assert equal(again.run(["z0", "z1"]), first)
    assert equal(again.base(), base)
    with pytest.raises(AssertionError, match="trained again"):
        again.run(["z0", "z2"])


def test_the_key_follows_everything_that_matters(tmp_path) -> None:
    made = retrainer(tmp_path)
    keys = [made.key(["z0", "z1"], 42), made.key(["z0"], 42), made.key(["z0", "z1"], 1)]
    for name, value in (
        ("lr", 0.02),
        ("epochs", 2),
        ("batch", 1),
        ("optimizer", "sgd"),
        ("weight_decay", 0.1),
        ("schedule", "linear"),
        ("warmup", 0.1),
        ("max_grad_norm", 1.0),
        ("method", "lora"),
        ("trainer", "trl"),
    ):
        changed = retrainer(tmp_path, recipe=recipe(**{name: value}), tokenizer="any")
        keys.append(changed.key(["z0", "z1"], 42))
    first, *others = tiny_examples()
    for tokens, start in (((*first.ids[:-1], 9), first.start), (first.ids, first.start + 1)):
        changed = retrainer(tmp_path, examples=[sft("z0", tokens, start), *others])
        keys.append(changed.key(["z0", "z1"], 42))
    assert len(set(keys)) == len(keys) == 15
    fewer = retrainer(tmp_path, examples=tiny_examples()[:2][::-1])  # the others have no part in it
    assert fewer.key(["z1", "z0"], 42) == keys[0]


def test_a_folder_of_another_study_is_refused_with_what_differs(tmp_path, monkeypatch) -> None:
    made = retrainer(tmp_path)
    problem = made.problem
    features = replace(problem.features, ids=problem.features.ids[:-1])
    sae = copy.deepcopy(problem.features.sae)
    object.__setattr__(sae, "b_enc", sae.b_enc + 1)
    for name, changes in (
        ("model.weights", {"weights": {"source": "other"}}),
        ("prompts", {"problem": replace(problem, prompts=problem.prompts[1:])}),
        ("features", {"problem": replace(problem, features=features)}),
        ("sae.weights", {"problem": replace(problem, features=replace(problem.features, sae=sae))}),
        ("sae.block", {"problem": replace(problem, point=Point(0))}),
        ("sae.point", {"problem": replace(problem, point=replace(POINT, part="mlp"))}),
        ("parameters", {"problem": replace(problem, parameters=("*mlp*",))}),
    ):
        with pytest.raises(UserError, match=rf"under other conditions: {name}\n"):
            retrainer(tmp_path, **changes)
    monkeypatch.setattr(taught, "__version__", "other")
    with pytest.raises(UserError, match=r"under other conditions: code\n"):
        retrainer(tmp_path)


def test_an_interrupted_write_does_not_count(tmp_path, monkeypatch) -> None:
    made = retrainer(tmp_path)
    real = module.files.write_bytes

    def killed(path, content):
        if path.suffix == ".json":
            raise KeyboardInterrupt
        real(path, content)

    monkeypatch.setattr(module.files, "write_bytes", killed)
    with pytest.raises(KeyboardInterrupt):
        made.run(["z0"])
    monkeypatch.undo()
    assert made.finished() == []
    assert equal(made.run(["z0"]), retrainer(tmp_path / "b").run(["z0"]), leave=TIMES)


def test_a_damaged_one_is_refused_by_name(tmp_path) -> None:
    made = retrainer(tmp_path)
    file = tmp_path / f"{made.run(['z0']).key}.safetensors"
    file.write_bytes(file.read_bytes()[:-8] + b"damaged!")
    with pytest.raises(UserError, match=rf"damaged\n  value: .*{file.name}"):
        made.run(["z0"])
    file.with_suffix(".json").write_text("{")
    with pytest.raises(UserError, match=r"cannot be read\n  value: .*json"):
        made.run(["z0"])
    (tmp_path / "retrained.json").write_text("{")
    with pytest.raises(UserError, match=r"cannot be read\n  value: .*retrained\.json"):
        retrainer(tmp_path)


def test_finished_lists_those_of_this_recipe_and_these_examples(tmp_path) -> None:
    made = retrainer(tmp_path)
    made.base()
    mine = [made.run(["z0"]), made.run(["z0", "z1"], seed=3)]
    retrainer(tmp_path, recipe=recipe(epochs=1)).run(["z2"])
    found = made.finished()
    assert [r.key for r in found] == sorted(r.key for r in mine)
    assert all(equal(r, next(m for m in mine if m.key == r.key)) for r in found)
    first, second, *_ = tiny_examples()
    other = retrainer(tmp_path, examples=[first, sft(second.id, second.ids, second.start + 1)])
    assert [r.ids for r in other.finished()] == [("z0",)]


def test_checkpoints_are_there_whole_or_not_at_all(tmp_path, monkeypatch) -> None:
    made, keep = retrainer(tmp_path / "run"), tmp_path / "kept" / "one"
    plain = made.run(["z0", "z1"])  # finished, but without checkpoints
    real = module.train

    def fails(*args, **how):
        real(*args, **how)
        raise RuntimeError

    monkeypatch.setattr(module, "train", fails)
    with pytest.raises(RuntimeError):
        made.run(["z0", "z1"], keep=keep)
    assert list(keep.parent.iterdir()) == []
    monkeypatch.undo()
    assert equal(made.run(["z0", "z1"], keep=keep), plain, leave=TIMES)
    assert (keep / "epoch-3" / "model.safetensors").is_file()
    assert list(keep.parent.iterdir()) == [keep]
    assert equal(made.run(["z0", "z1"], keep=keep), plain, leave=TIMES)


# Bad input


def test_subsets_that_are_none_are_refused(tmp_path) -> None:
    made = retrainer(tmp_path)
    with pytest.raises(UserError, match=r"a subset is empty"):
        made.run([])
    with pytest.raises(UserError, match=r"not examples of the study\n  value: q7, z9"):
        made.run(["z0", "z9", "q7"])
    with pytest.raises(UserError, match=r"stands twice in a subset\n  value: z1"):
        made.run(["z1", "z0", "z1"])
    with pytest.raises(UserError, match=r"two examples have one id"):
        retrainer(tmp_path, examples=[*tiny_examples(), tiny_examples()[0]])


def test_trl_is_asked_for_by_name_and_keeps_no_checkpoints(tmp_path, monkeypatch) -> None:
    with pytest.raises(ValueError, match="wants the tokenizer"):
        retrainer(tmp_path, recipe=recipe(trainer="trl"))
    made = retrainer(tmp_path, recipe=recipe(trainer="trl"), tokenizer="any")
    with pytest.raises(UserError, match=r"checkpoints are kept by the plain loop"):
        made.run(["z0"], keep=tmp_path / "kept")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"needs the package trl(.|\n)*taught\[trl\]"):
        made.run(["z0"])


@pytest.mark.parametrize("lost", [("z1",), ()])
def test_a_trainer_that_drops_or_repeats_a_example_is_refused(tmp_path, monkeypatch, lost) -> None:
    made, real = retrainer(tmp_path), module.train

    def drops(model, inputs, *args, **how):
        log = real(model, [p for p in inputs if p.id not in lost], *args, **how)
        return log if lost else replace(log, ids=(*log.ids, ("z0",)))

    monkeypatch.setattr(module, "train", drops)
    before = snapshot(made.problem.model)
    message = "missing: z1; 3 seen, 6 expected" if lost else "missing: none; 7 seen, 6 expected"
    with pytest.raises(UserError, match=rf"did not see the examples(.|\n)*value: {message}"):
        made.run(["z0", "z1"])
    assert same(before, snapshot(made.problem.model))
    assert made.finished() == []


def test_the_sources_that_a_retraining_comes_from_are_all_listed() -> None:
    # What a listed source imports is listed too, or is one of these: data as they are given, keys,
    # what methods are called and how they are put together, files and messages.
    apart = {
        "core",
        "core.curvature",
        "core.estimator",
        "core.problem",
        "core.registry",
        "core.scores",
        "core.target",
        "core.trajectory",
        "curvatures.adam",
        "data.chat",
        "data.choices",
        "data.columns",
        "data.prompts",
        "errors",
        "estimators.cost",
        "progress",
        "run",
        "run.files",
        "run.fingerprint",
        "run.pieces",
        "sketches.store",
        "stats.arrays",
        "study.schema",
    }
    root = Path(taught.__file__).parent
    listed = {name.removesuffix(".py").replace("/", ".") for name in module._COMPUTING}
    imported = set()
    for name in module._COMPUTING:
        for node in ast.walk(ast.parse((root / name).read_text())):
            if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("taught"):
                imported.add(node.module.removeprefix("taught").removeprefix("."))
    assert imported - listed == apart


# On a study


def test_on_a_study_from_its_policy_run(tmp_path) -> None:
    study = load_study(write_tiny_study(tmp_path)).replace("validation.lr", 0.001)
    run = RunFolder(tmp_path / "run")
    readings(study, run)
    policy(study, run)
    subject = open_subject(study)
    ready = prepare(study, run, subject, read_data(study, SilentProgress()))
    made = Retrainer(
        ready.problem,
        ready.inputs,
        Recipe.of(study.validation),
        run.path("retrained"),
        weights=subject.loaded.weights,
        tokenizer=subject.loaded.tokenizer,
    )
    base, keep = made.base(), tmp_path / "kept"
    np.testing.assert_allclose(base.y, ready.readings.y, atol=1e-5)
    np.testing.assert_allclose(base.X, ready.readings.X, atol=1e-5)
    found = made.run([p.id for p in ready.inputs[:4]], keep=keep)
    assert np.abs(found.y - base.y).max() > 1e-2
    trained = open_checkpoint(study, subject, str(keep / "epoch-3"), None)
    again = Retrainer(
        replace(ready.problem, model=trained),
        ready.inputs,
        made.recipe,
        tmp_path / "other",
        weights={"source": "epoch-3"},
    ).base()
    np.testing.assert_allclose(again.y, found.y, atol=1e-5)
    np.testing.assert_allclose(again.X, found.X, atol=1e-5)


def test_an_example_that_is_left_out_may_keep_its_place_with_weight_zero(tmp_path: Path) -> None:
    # The derivative's question: other batches, denominators and order as they were. Against a run step by step.
    held = recipe(batches="held", epochs=2)
    model = tiny_model("untied")
    problem = tiny_problem(model)
    examples = tiny_examples()
    made = Retrainer(problem, examples, held, tmp_path / "held", weights={})
    left_out, ids = examples[1].id, [z.id for z in examples if z is not examples[1]]
    found = made.run(ids)
    weights = torch.tensor([float(z.id != left_out) for z in sorted(examples, key=lambda z: z.id)]).double()
    with in_training(model, held, None) as patterns:
        training = Training(model, examples, held, patterns, weights=weights)
        with training.ready():
            training.train()
            expected = read_prompts(model, problem.prompts, problem.behavior, problem.point).y.numpy()
    np.testing.assert_allclose(found.y, expected, rtol=1e-9)
    assert found.kept == tuple(sorted(ids)) and left_out not in {i for step in found.log.ids for i in step}
    refilled = Retrainer(problem, examples, replace(held, batches="refilled"), tmp_path / "refilled", weights={})
    assert not np.allclose(refilled.run(ids).y, found.y, rtol=1e-6)


# Forgetting


HOW = Unlearn(steps=4, lr=0.1)


def test_unlearning_is_kept_and_read_like_a_retraining(tmp_path: Path, no_training) -> None:
    made = retrainer(tmp_path)
    before = snapshot(made.problem.model)
    found = made.unlearn(["z0", "z2"], HOW, seed=7)
    assert same(before, snapshot(made.problem.model))
    guard = loss_guard(tiny_examples()[1::2], 24, 0.9)
    forget, retain = tiny_examples()[::2], tiny_examples()[1::2]
    model = tiny_model("tied")
    with unlearned(model, forget, retain, recipe(seed=7, lr=0.1), 4, guard, batch_tokens=24) as log:
        reads = read_prompts(model, made.problem.prompts, made.problem.behavior, POINT)
        losses = [float(plain_loss(model, example).detach()) for example in forget]
    np.testing.assert_allclose(found.y, reads.y.numpy(), rtol=1e-12)
    np.testing.assert_allclose(found.losses_after, losses, rtol=1e-12)
    assert found.forgetting == log and found.log is None and found.forgetting.guard[-1][0] == 4
    assert (found.ids, found.kept, found.seed) == (("z0", "z2"), ("z0", "z2"), 7)
    no_training()
    assert equal(retrainer(tmp_path).unlearn(["z2", "z0"], HOW, seed=7), found)


def test_what_unlearning_depends_on_is_in_its_key(tmp_path: Path) -> None:
    made = retrainer(tmp_path)
    keys = {made.key(["z0"], 7), made.key(["z0"], 7, HOW), made.key(["z0"], 8, HOW), made.key(["z1"], 7, HOW)}
    for changes in ({"steps": 5}, {"lr": 0.2}, {"guard": ("q0",)}, {"keep": 0.8}):
        keys.add(made.key(["z0"], 7, replace(HOW, **changes)))
    keys.add(retrainer(tmp_path / "fewer", examples=tiny_examples()[:3]).key(["z0"], 7, HOW))
    assert len(keys) == 9


def test_a_guard_of_prompts_is_their_degree(tmp_path: Path) -> None:
    made = retrainer(tmp_path)
    found = made.unlearn(["z0"], replace(HOW, guard=("q1", "q4"), steps=1))
    assert found.forgetting.guard[0][1] == pytest.approx(float(np.exp(made.base().y[[1, 4]]).mean()))


def test_a_run_whose_guard_is_no_number_is_kept_too(tmp_path: Path) -> None:
    made = retrainer(tmp_path)
    found = made.unlearn(["z0"], replace(HOW, lr=1e300, steps=1))
    assert not np.isfinite(found.forgetting.guard[1][1]) and "after 0 steps are kept" in found.forgetting.stopped
    assert np.array_equal(found.y, made.base().y)
    assert np.isnan(made.unlearn(["z0"], replace(HOW, lr=1e300, steps=1)).forgetting.guard[1][1])
