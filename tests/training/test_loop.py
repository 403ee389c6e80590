"""Training: the influence's own step, torch's own optimizers, and nothing left behind."""

from __future__ import annotations

import hashlib
import itertools
import math
import sys
from dataclasses import replace

import pytest
import torch
from safetensors.torch import load_file
from transformers import get_scheduler

from taught.core.estimator import Work
from taught.core.example import Example
from taught.curvatures.adam import Adam, moments_from_optimizer
from taught.errors import UserError
from taught.estimators.finite_step import example_gradient, finite_steps
from taught.model.readout import read_prompts
from taught.study.schema import ValidationSpec
from taught.training.loop import learning_rates, lora_layers, plan, train
from taught.training.recipe import Recipe
from taught.training.steps import Training
from tiny_models import MODELS, POINT, plain_loss, same, snapshot, tiny_examples, tiny_model, tiny_problem


def recipe(**changes) -> Recipe:
    return replace(Recipe.of(ValidationSpec()), **changes)


def weights(model) -> dict[str, torch.Tensor]:
    return {n: p.detach().clone() for n, p in model.named_parameters()}


def close(found, expected, tolerance: float = 1e-10) -> None:
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=tolerance, atol=tolerance)


def order(examples: list[Example], seed: int, epoch: int) -> list[Example]:
    return sorted(examples, key=lambda p: hashlib.sha256(f"{seed}\0{epoch}\0{p.id}".encode()).hexdigest())


def by_hand(model, examples, made: Recipe, *, named: bool = False):
    """Epochs of torch's optimizer, one sequence at a time, scheduled by transformers."""
    given = model.named_parameters() if named else model.parameters()
    kind = {"adamw": torch.optim.AdamW, "sgd": torch.optim.SGD}[made.optimizer]
    optimizer = kind(given, lr=made.lr, weight_decay=made.weight_decay, foreach=False)
    total = made.epochs * math.ceil(len(examples) / made.batch)
    name = {"linear": "linear", "constant": "constant_with_warmup"}[made.schedule]
    schedule = get_scheduler(name, optimizer, math.ceil(made.warmup * total), total)
    losses = []
    for epoch in range(made.epochs):
        ordered = order(examples, made.seed, epoch)
        for start in range(0, len(ordered), made.batch):
            batch = ordered[start : start + made.batch]
            optimizer.zero_grad()
            loss = torch.stack([plain_loss(model, example) for example in batch]).mean()
            loss.backward()
            if made.max_grad_norm is not None:
                torch.nn.utils.clip_grad_norm_(model.parameters(), made.max_grad_norm)
            optimizer.step()
            schedule.step()
            losses.append(float(loss))
    return optimizer, losses


# The step


@pytest.mark.parametrize("name", MODELS)
def test_one_sgd_step_on_one_example_is_the_finite_step(name: str) -> None:
    for example in tiny_examples():
        model = tiny_model(name)
        problem = tiny_problem(model, lr=0.05)
        base = read_prompts(model, problem.prompts, problem.behavior, POINT)
        (step,) = finite_steps(problem, [example], base)
        log = train(model, [example], recipe(optimizer="sgd", lr=0.05, epochs=1))
        after = read_prompts(model, problem.prompts, problem.behavior, POINT)
        torch.testing.assert_close(after.y - base.y, step.dy, rtol=1e-12, atol=1e-13)
        assert log.losses[0] == pytest.approx(step.loss, rel=1e-12)
        assert float(step.dy.abs().max()) > 1e-4


def test_one_step_at_a_batch_of_all_is_the_mean_of_the_examples_own_steps() -> None:
    model = tiny_model("tied")
    before, examples = weights(model), tiny_examples()
    grads = [example_gradient(model, example)[1] for example in examples]
    log = train(model, examples, recipe(optimizer="sgd", lr=0.05, epochs=1, batch=4))
    expected = {n: w - 0.05 * sum(g[n] for g in grads) / 4 for n, w in before.items()}
    close(weights(model), expected, 1e-12)
    mean = sum(float(plain_loss(tiny_model("tied"), example)) for example in examples) / 4
    assert log.losses == (pytest.approx(mean, rel=1e-12),)


RECIPES = [
    {},
    {"batch": 3, "weight_decay": 0.1},
    {"batch": 1, "schedule": "linear", "warmup": 0.3},
    {"batch": 2, "warmup": 0.25, "max_grad_norm": 0.05},
    {"optimizer": "sgd", "batch": 2, "weight_decay": 0.1, "schedule": "linear"},
]


@pytest.mark.parametrize("changes", RECIPES)
@pytest.mark.parametrize("name", ["untied", "gpt2"])
def test_training_is_that_of_torch_s_optimizers(name: str, changes) -> None:
    made = recipe(lr=0.01, epochs=3, seed=5, **changes)
    expected = tiny_model(name)
    _, losses = by_hand(expected, tiny_examples(), made)
    model = tiny_model(name)
    log = train(model, tiny_examples(), made)
    close(weights(model), weights(expected), 1e-9)
    assert log.losses == pytest.approx(losses, rel=1e-9)
    assert max(float((w - weights(tiny_model(name))[n]).abs().max()) for n, w in weights(model).items()) > 1e-3


@pytest.mark.parametrize("changes", [{}, {"max_grad_norm": 0.05, "optimizer": "sgd"}])
def test_micro_batches_do_not_change_the_result(changes) -> None:
    found = []
    for budget in (1, 20, 10_000):
        model = tiny_model("tied")
        log = train(model, tiny_examples(), recipe(lr=0.01, batch=3, **changes), batch_tokens=budget)
        found.append((weights(model), log))
    for trained, log in found[1:]:
        close(trained, found[0][0])
        assert log.losses == pytest.approx(found[0][1].losses, rel=1e-12)


def test_the_same_again_gives_the_same_bits_in_any_order_of_the_examples() -> None:
    found = []
    for examples in itertools.islice(itertools.permutations(tiny_examples()), 0, 24, 7):
        model = tiny_model("padded")
        log = train(model, list(examples), recipe(lr=0.01, batch=3))
        found.append((weights(model), log))
    assert len(found) == 4
    for trained, log in found:
        assert log == found[0][1]
        assert all(torch.equal(w, found[0][0][n]) for n, w in trained.items())


# The order


def test_each_epoch_has_every_example_once_and_an_order_of_its_own() -> None:
    ids = [f"z{i}" for i in range(20)]
    made = recipe(epochs=3, batch=8)
    steps = plan(ids, made)
    assert [len(step) for step in steps] == [8, 8, 4] * 3
    epochs = [[ids[i] for step in steps[at : at + 3] for i in step] for at in (0, 3, 6)]
    assert all(sorted(epoch) == sorted(ids) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2] != epochs[0]
    assert plan(ids, replace(made, seed=1)) != steps


def test_subsets_share_the_order_of_their_common_examples() -> None:
    ids = [f"z{i}" for i in range(20)]
    some = ids[3:15]
    made = recipe(epochs=2, batch=20)
    for every, part in zip(plan(ids, made), plan(some, made), strict=True):
        assert [ids[i] for i in every if ids[i] in some] == [some[i] for i in part]


def test_the_log_says_which_examples_each_step_saw() -> None:
    model, made = tiny_model("tied"), recipe(epochs=2, batch=3, seed=9)
    log = train(model, tiny_examples(), made)
    hand = [[p.id for p in order(tiny_examples(), 9, epoch)] for epoch in (0, 1)]
    assert [list(step) for step in log.ids] == [hand[0][:3], hand[0][3:], hand[1][:3], hand[1][3:]]
    assert log.lrs == (made.lr,) * 4


def test_learning_rates_rise_and_fall() -> None:
    made = recipe(lr=1.0, schedule="linear", warmup=0.4)
    assert learning_rates(made, 5) == pytest.approx([0, 0.5, 1, 2 / 3, 1 / 3])
    assert learning_rates(replace(made, warmup=0), 4) == pytest.approx([1, 0.75, 0.5, 0.25])
    assert learning_rates(replace(made, schedule="constant"), 5) == pytest.approx([0, 0.5, 1, 1, 1])
    assert learning_rates(replace(made, warmup=1.0), 2) == pytest.approx([0, 0.5])


@pytest.mark.parametrize("trained", [train, lambda *given: Training(*given)], ids=["loop", "step by step"])
def test_a_run_whose_every_step_has_a_rate_of_0_is_refused_and_both_fixes_work(trained) -> None:
    short = recipe(warmup=0.1, batch=64, epochs=1)
    with pytest.raises(UserError, match="moves nothing") as error:
        trained(tiny_model("tied"), tiny_examples(), short)
    assert "validation.warmup=0" in error.value.fix and "validation.batch" in error.value.fix
    trained(tiny_model("tied"), tiny_examples(), replace(short, warmup=0.0))
    trained(tiny_model("tied"), tiny_examples(), replace(short, batch=1))


def test_a_warm_up_is_a_share_of_the_steps() -> None:
    with pytest.raises(UserError, match=r"validation\.warmup(.|\n)*at least 0 and at most 1"):
        ValidationSpec(warmup=1.5)


# What is left alone


def test_only_what_moves_moves_and_flags_and_modes_come_back() -> None:
    model = tiny_model("untied")
    model.train()
    model.lm_head.weight.requires_grad_(False)
    before = snapshot(model)
    train(model, tiny_examples(), recipe(lr=0.01), parameters=("*mlp*", "lm_head.*"))
    after = snapshot(model)
    for name, w in before["weights"].items():
        moves = "mlp" in name or name.startswith("lm_head")
        assert torch.equal(w, after["weights"][name]) != moves
    assert all(before[k] == after[k] for k in ("flags", "grads", "modes", "hooks"))


def test_dropout_is_off() -> None:
    model, other = tiny_model("gpt2"), tiny_model("gpt2")
    assert model.config.resid_pdrop > 0
    model.train()
    train(model, tiny_examples(), recipe(lr=0.01))
    train(other, tiny_examples(), recipe(lr=0.01))
    assert all(torch.equal(w, weights(other)[n]) for n, w in weights(model).items())


# Bad input


def test_an_empty_subset_and_a_example_that_stands_twice_are_refused() -> None:
    model = tiny_model("tied")
    before = snapshot(model)
    with pytest.raises(UserError, match=r"no examples to train on"):
        train(model, [], recipe())
    with pytest.raises(UserError, match=r"twice(.|\n)*value: z1"):
        train(model, [*tiny_examples(), tiny_examples()[1]], recipe())
    assert same(before, snapshot(model))


def test_a_loss_that_is_not_finite_names_the_step_and_the_example() -> None:
    model = tiny_model("untied")
    with torch.no_grad():
        model.model.embed_tokens.weight[21] = torch.nan  # only example z0 has this token
    at = [p.id for p in order(tiny_examples(), 42, 0)].index("z0") + 1
    with pytest.raises(UserError, match=rf"a loss is not finite\n  value: step {at}, examples z0\n"):
        train(model, tiny_examples(), recipe(batch=1))
    assert all(p.grad is None for p in model.parameters())


def test_training_that_diverges_says_when_and_what_to_do() -> None:
    with pytest.raises(UserError, match=r"value: step 2, examples z(.|\n)*lower validation\.lr"):
        train(tiny_model("tied"), tiny_examples(), recipe(lr=1e200, batch=4))
    wild = recipe(lr=1e10, weight_decay=1e300, optimizer="sgd", epochs=1, batch=4)
    with pytest.raises(UserError, match=r"weights are not finite\n  value: step 1, examples z"):
        train(tiny_model("tied"), tiny_examples(), wild)


def test_half_precision_is_refused_by_name() -> None:
    model = tiny_model("gpt2").bfloat16()
    with pytest.raises(UserError, match=r"wte\.weight: torch\.bfloat16(.|\n)*dtype=float32"):
        train(model, tiny_examples(), recipe())


# What is kept


def test_checkpoints_and_moments_are_read_by_the_curvatures(tmp_path) -> None:
    made = recipe(lr=0.01, epochs=2, batch=3, schedule="linear")
    train(tiny_model("untied"), tiny_examples(), made, keep=tmp_path / "kept")
    expected = tiny_model("untied")
    optimizer, _ = by_hand(expected, tiny_examples(), made, named=True)
    stored = load_file(tmp_path / "kept" / "epoch-2" / "model.safetensors")
    close(stored, weights(expected), 1e-9)
    file = tmp_path / "kept" / "epoch-2.moments.safetensors"
    close(moments_from_optimizer(file), moments_from_optimizer(optimizer.state_dict()), 1e-9)
    metric = Adam(moments=str(file), eps=1e-3).fit(tiny_problem(tiny_model("untied")), [], Work())
    for p, name in ((p, n) for n, p in expected.named_parameters()):
        state = optimizer.state[p]
        v = state["exp_avg_sq"] / (1 - 0.999 ** float(state["step"]))
        torch.testing.assert_close(metric.scale[name], 1 / (v.sqrt() + 1e-3), rtol=1e-6, atol=0)


def test_sgd_keeps_no_moments(tmp_path) -> None:
    made = recipe(optimizer="sgd", lr=0.01, epochs=2)
    train(tiny_model("tied"), tiny_examples(), made, keep=tmp_path)
    assert sorted(f.name for f in tmp_path.iterdir()) == ["epoch-1", "epoch-1.json", "epoch-2", "epoch-2.json"]


# LoRA


@pytest.mark.parametrize("name", ["tied", "gpt2"])
@pytest.mark.parametrize("error", [None, KeyboardInterrupt])
def test_lora_layers_start_as_nothing_move_alone_and_go_away(name: str, error) -> None:
    model, example = tiny_model(name), tiny_examples()[0]
    next(model.parameters()).requires_grad_(False)
    loss = float(plain_loss(model, example))
    before = snapshot(model)
    try:
        with lora_layers(model, 2, seed=3) as patterns:
            assert float(plain_loss(model, example)) == loss
            start = weights(model)
            train(model, tiny_examples(), recipe(lr=0.01), parameters=patterns)
            for key, w in weights(model).items():
                assert torch.equal(w, start[key]) != ("lora_" in key)
            assert float(plain_loss(model, example)) < loss
            if error:
                raise error
    except KeyboardInterrupt:
        assert error
    assert same(before, snapshot(model))
    assert not hasattr(model, "peft_config")


def test_a_lora_s_first_weights_follow_the_seed_and_nothing_else() -> None:
    model, found = tiny_model("tied"), []
    state = torch.get_rng_state()
    for seed in (3, 3, 4):
        with lora_layers(model, 2, seed=seed):
            found.append(weights(model))
    assert torch.equal(state, torch.get_rng_state())
    keys = [key for key in found[0] if "lora_A" in key]
    assert keys
    assert all(torch.equal(found[0][key], found[1][key]) for key in keys)
    assert not any(torch.equal(found[0][key], found[2][key]) for key in keys)


def test_a_second_adapter_is_refused_and_peft_is_asked_for_by_name(monkeypatch) -> None:
    model = tiny_model("tied")
    with lora_layers(model, 2, seed=0), pytest.raises(UserError, match="an adapter already"):
        lora_layers(model, 2, seed=0).__enter__()
    monkeypatch.setitem(sys.modules, "peft", None)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(UserError, match=r"pip install 'taught\[peft\]'"):
        lora_layers(model, 2, seed=0).__enter__()
