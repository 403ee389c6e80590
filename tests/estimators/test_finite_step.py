from __future__ import annotations

import itertools
from dataclasses import replace

import pytest
import torch

from reference import readings_of
from taught.core.names import TargetName
from taught.core.target import TargetSet
from taught.errors import UserError
from taught.estimators.adjoint import target_effects
from taught.estimators.every_prompt import prompt_effects
from taught.estimators.finite_step import example_gradient, finite_steps, restored
from taught.model.readout import read_prompts, read_prompts_plain
from taught.policy.ridge import fit_policy
from tiny_models import (
    ENCODERS,
    MODELS,
    POINT,
    moved,
    plain_gradient,
    plain_loss,
    plain_y,
    same,
    snapshot,
    tiny_examples,
    tiny_model,
    tiny_problem,
)


def steps_of(problem, examples, read=read_prompts):
    baseline = read(problem.model, problem.prompts, problem.behavior, problem.point)
    return baseline, list(finite_steps(problem, examples, baseline, read=read))


@pytest.mark.parametrize("name", MODELS)
def test_example_gradient_is_that_of_fine_tuning(name: str) -> None:
    model = tiny_model(name)
    for example in tiny_examples():
        loss, grads = example_gradient(model, example)
        assert loss == pytest.approx(float(plain_loss(model, example)), rel=1e-12)
        expected = plain_gradient(model, plain_loss(model, example))
        assert grads.keys() == expected.keys()
        for name_ in grads:
            torch.testing.assert_close(grads[name_], expected[name_], rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("name", MODELS)
def test_a_step_is_one_sgd_step_and_the_read_outs_again(name: str) -> None:
    problem = tiny_problem(tiny_model(name), lr=0.05)
    baseline, steps = steps_of(problem, tiny_examples())
    X = problem.features(baseline.h, baseline.offsets)
    for example, step in zip(tiny_examples(), steps, strict=True):
        trained = tiny_model(name)
        sgd = torch.optim.SGD(trained.parameters(), lr=0.05)
        plain_loss(trained, example).backward()
        sgd.step()
        after = read_prompts_plain(trained, problem.prompts, problem.behavior, POINT)
        torch.testing.assert_close(step.dy, after.y - baseline.y, rtol=1e-9, atol=1e-11)
        moved_X = problem.features(after.h, after.offsets)
        torch.testing.assert_close(step.dX_exact, moved_X - X, rtol=1e-9, atol=1e-11)
        gated = (after.h - baseline.h) @ problem.features.sae.W_enc[:, problem.features.ids]
        torch.testing.assert_close(step.dX, gated * (X > 0), rtol=1e-9, atol=1e-11)
        assert (step.example_id, step.dy.dtype) == (example.id, torch.float64)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", ENCODERS)
def test_the_error_of_the_adjoint_halves_with_the_step(name: str, kind: str) -> None:
    # y and h are smooth in theta: finite / lr - adjoint / lr = lr * constant + O(lr^2).
    problem = tiny_problem(tiny_model(name), kind, "mean_user")
    example = tiny_examples()[:1]
    read = read_prompts(problem.model, problem.prompts, problem.behavior, POINT)
    X = problem.features(read.h, read.offsets).numpy()
    policy = fit_policy(
        X, read.y.numpy(), prompt_ids=read.prompt_ids, feature_ids=problem.features.ids.tolist(), alpha=0.5
    )
    score = TargetSet.of(["score"], readings_of(policy)).select([TargetName("score")])
    A, B = score.cotangents()
    errors = []
    for lr in (2e-4, 1e-4, 5e-5):
        at = replace(problem, lr=lr)
        (step,) = finite_steps(at, example, read)
        exact = prompt_effects(at, example)[0]
        (S,) = score.changes(step.dX.numpy(), step.dy.numpy())
        linear = float(target_effects(at, example, A, B)[0])
        errors.append([float((step.dy - exact).norm()) / lr, abs(S - linear) / lr])
    for coarse, fine in itertools.pairwise(errors):
        for a, b in zip(coarse, fine, strict=True):
            assert a > 1e-9
            assert a / b == pytest.approx(2, rel=0.1)


@pytest.mark.parametrize("read", [read_prompts, read_prompts_plain])
def test_y_and_h_are_read_afresh_with_the_baseline_s_own_function(read) -> None:
    # With no step at all nothing may differ, to the last bit.
    calls = []

    def counted(*args):
        calls.append(args)
        return read(*args)

    problem = tiny_problem(tiny_model("tied"), lr=0.0)
    _, steps = steps_of(problem, tiny_examples(), counted)
    assert len(calls) == 1 + len(tiny_examples())
    for step in steps:
        assert not step.dy.any() and not step.dX.any() and not step.dX_exact.any()


def test_a_shift_of_the_read_function_cancels() -> None:
    def shifted(*args):
        reads = read_prompts(*args)
        return replace(reads, y=reads.y + 100, h=reads.h + 0.01)

    problem = tiny_problem(tiny_model("tied"))
    _, plain = steps_of(problem, tiny_examples())
    _, other = steps_of(problem, tiny_examples(), shifted)
    for a, b in zip(plain, other, strict=True):
        torch.testing.assert_close(a.dy, b.dy, rtol=0, atol=1e-11)


def test_steps_of_other_prompts_than_the_baseline_s_are_refused() -> None:
    problem = tiny_problem(tiny_model("tied"))
    baseline = read_prompts(problem.model, problem.prompts, problem.behavior, POINT)
    turned = replace(baseline, prompt_ids=baseline.prompt_ids[::-1])
    with pytest.raises(ValueError, match="different prompts"):
        next(finite_steps(problem, tiny_examples(), turned))


def test_each_example_starts_from_the_base_weights() -> None:
    problem = tiny_problem(tiny_model("tied"), lr=0.1)
    _, steps = steps_of(problem, tiny_examples())
    for number, example in enumerate(tiny_examples()):
        _, (alone,) = steps_of(problem, [example])
        assert torch.equal(alone.dy, steps[number].dy)


def test_dropout_is_off_during_the_steps_and_the_mode_comes_back() -> None:
    problem = tiny_problem(tiny_model("gpt2"))
    _, reference = steps_of(problem, tiny_examples())
    baseline = read_prompts(problem.model, problem.prompts, problem.behavior, POINT)
    problem.model.train()
    for a, b in zip(reference, finite_steps(problem, tiny_examples(), baseline), strict=True):
        torch.testing.assert_close(a.dy, b.dy, rtol=1e-12, atol=1e-14)
    assert all(m.training for m in problem.model.modules())


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_weights_come_back_to_the_bit_when_reading_fails(error) -> None:
    # Adding the gradient back would not give the same bits.
    problem = tiny_problem(tiny_model("tied"), lr=0.37)
    baseline = read_prompts(problem.model, problem.prompts, problem.behavior, POINT)
    before = snapshot(problem.model)

    def fails(*_):
        assert not same(before, snapshot(problem.model))  # in the middle: the step is made
        raise error

    with pytest.raises(error):
        list(finite_steps(problem, tiny_examples(), baseline, read=fails))
    assert same(before, snapshot(problem.model))


def test_weights_are_the_base_ones_between_and_after_steps() -> None:
    problem = tiny_problem(tiny_model("padded"), lr=0.37)
    baseline = read_prompts(problem.model, problem.prompts, problem.behavior, POINT)
    before = snapshot(problem.model)
    steps = finite_steps(problem, tiny_examples(), baseline)
    for _ in range(2):
        next(steps)
        assert all(torch.equal(w, before["weights"][n]) for n, w in problem.model.state_dict().items())
    steps.close()  # a caller that stops early
    assert same(before, snapshot(problem.model))


def test_the_weights_before_a_step_are_set_aside_and_not_copied() -> None:
    """A real step of a large model takes the memory of one gradient."""
    problem = tiny_problem(tiny_model("tied"), lr=0.37)
    own = {name: p.data_ptr() for name, p in problem.model.named_parameters()}
    inside = []

    def read(*given):
        inside.append({name: p.data_ptr() for name, p in problem.model.named_parameters()})
        return read_prompts(*given)

    baseline = read_prompts(problem.model, problem.prompts, problem.behavior, problem.point)
    list(finite_steps(problem, tiny_examples()[:2], baseline, read=read))
    assert all(pointers[name] != pointer for pointers in inside for name, pointer in own.items())
    assert {name: p.data_ptr() for name, p in problem.model.named_parameters()} == own


def test_restored_puts_back_whatever_was_done() -> None:
    model = tiny_model("tied")
    before = snapshot(model)
    with pytest.raises(KeyboardInterrupt), restored(model):
        with torch.no_grad():
            model.model.embed_tokens.weight.mul_(1.1)
        raise KeyboardInterrupt
    assert same(before, snapshot(model))


def test_a_loss_that_is_not_finite_names_the_example_and_changes_nothing() -> None:
    problem = tiny_problem(tiny_model("untied"))
    with torch.no_grad():
        problem.model.model.embed_tokens.weight[21] = torch.nan  # only example z0 has this token
    baseline = read_prompts(problem.model, problem.prompts, problem.behavior, POINT)
    nan_equal = [p.detach().clone() for p in problem.model.parameters()]
    flags = [p.requires_grad for p in problem.model.parameters()]
    with pytest.raises(UserError, match=r"not finite\n  value: z0"):
        list(finite_steps(problem, tiny_examples(), baseline))
    for p, old in zip(problem.model.parameters(), nan_equal, strict=True):
        assert torch.equal(p.view(torch.int64), old.view(torch.int64))
    assert [p.requires_grad for p in problem.model.parameters()] == flags


def test_the_reference_moves_as_its_name_says() -> None:
    # The tests' own helper: a step forward and back is exact.
    model = tiny_model("tied")
    y, example = plain_y(model, (0, 5, 3, 2)), tiny_examples()[0]
    before = snapshot(model)  # after a pass: transformers leaves its own hooks at the first one
    with moved(model, plain_gradient(model, plain_loss(model, example)), -0.1):
        assert abs(float(plain_y(model, (0, 5, 3, 2)) - y)) > 1e-3
    assert same(before, snapshot(model))
