"""Unlearning: steps and rates by hand, a guard that stops, and weights that come back."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch

from taught.behaviors.choice import Choice
from taught.behaviors.loss import Loss
from taught.core.example import sft
from taught.errors import UserError
from taught.study.schema import ValidationSpec
from taught.training.recipe import Recipe
from taught.training.unlearn import EVERY, Guard, fitted_rate, prompt_guard, unlearned
from tiny_models import (
    plain_gradient,
    plain_loss,
    plain_read,
    plain_y,
    same,
    snapshot,
    tiny_behavior,
    tiny_examples,
    tiny_model,
    tiny_prompts,
)

ROWS = [
    sft("z4", (0, 9, 8, 3, 2, 20, 21, 3), 5),
    sft("z5", (0, 4, 17, 3, 2, 6, 6, 7, 3), 5),
    sft("z6", (14, 11, 3, 2, 22, 3), 4),
]
FORGET, RETAIN = tiny_examples()[:2], [*tiny_examples()[2:], *ROWS]


def recipe(**changes) -> Recipe:
    return replace(Recipe.of(ValidationSpec(lr=0.1, batch=2, seed=3, lora_rank=2)), **changes)


def mean_loss(model, examples) -> torch.Tensor:
    return torch.stack([plain_loss(model, example) for example in examples]).mean()


@torch.no_grad()
def retained(model) -> float:
    return float(mean_loss(model, RETAIN))


@torch.no_grad()
def forgotten(model) -> float:
    return float(mean_loss(model, FORGET))


LOOSE = Guard("loss of what is retained", retained, keep=-1e9, rises=False)


def run(model, *, guard=LOOSE, steps=6, forget=FORGET, retain=RETAIN, read=lambda model: None, made=None, **options):
    with unlearned(model, forget, retain, made or recipe(), steps, guard, **options) as log:
        return log, {n: p.detach().clone() for n, p in model.named_parameters()}, read(model)


def size(g) -> float:
    return float(torch.sqrt(sum(part.square().sum() for part in g.values())))


# The rate


@pytest.mark.parametrize("share", [0.2, 1.0, 5.0])  # of the minimiser
def test_on_a_quadratic_loss_the_fitted_rate_is_the_minimiser_along_the_step(share: float) -> None:
    gen = torch.Generator().manual_seed(0)
    root, b, theta, g = (torch.randn(*shape, generator=gen).double() for shape in ((6, 6), (6,), (6,), (6,)))
    H = root @ root.T + torch.eye(6)

    def loss(x):
        return float(x @ H @ x / 2 - b @ x + 5)

    if g @ (H @ theta - b) < 0:
        g = -g
    best = float(g @ (H @ theta - b) / (g @ H @ g))
    lr = share * best
    found = fitted_rate(lr, loss(theta), loss(theta + lr * g), loss(theta - lr * g))
    assert found == pytest.approx(best, rel=1e-9)
    assert loss(theta - found * g) < min(loss(theta - (found + d) * g) for d in (-1e-3, 1e-3))


@pytest.mark.parametrize(
    ("losses", "expected"),
    [
        ((1.0, 1.5, 0.5), 0.1),  # a straight line
        ((1.0, 1.2, 0.4), 0.1),  # bent downwards
        ((1.0, math.inf, 0.9), 0.1),
        ((1.0, math.nan, 0.9), 0.1),
        ((1.0, 1.5, 0.5001), 1.0),  # the minimum lies far off: ten times the rate
        ((1.0, 1.9, 1.9), 0.01),  # here is the minimum: a tenth
        ((1.0, 1.5, 1.7), 0.01),  # behind the step
    ],
)
def test_the_rate_is_kept_without_curvature_and_clipped_far_off(losses, expected) -> None:
    assert fitted_rate(0.1, *losses) == pytest.approx(expected)


def test_curvature_that_is_rounding_is_none() -> None:
    eps = torch.finfo(torch.float32).eps
    assert fitted_rate(0.1, 2.0, 2.0 + 3 * eps, 2.0 + eps, 8 * eps) == 0.1
    assert fitted_rate(0.1, 2.0, 2.2, 1.9, 8 * eps) == pytest.approx(0.1 * 0.3 / 0.2)


# The steps


def test_steps_and_rates_are_those_by_hand() -> None:
    """Descend on a retained batch and ascend on a forgotten one, each gradient of length one."""
    model, by_hand = tiny_model("untied"), tiny_model("untied")
    made, examples = recipe(), {z.id: z for z in (*FORGET, *RETAIN)}
    log, weights, _ = run(model, steps=11)
    assert len(log.lrs) == 11 and log.kept == 11 and log.stopped == ""
    lr = made.lr
    for step, (away, stay) in enumerate(zip(log.forget, log.retain, strict=True)):
        away, stay = ([examples[i] for i in ids] for ids in (away, stay))
        losses = [mean_loss(by_hand, some) for some in (away, stay)]
        g_F, g_R = (plain_gradient(by_hand, loss) for loss in losses)
        losses = [float(loss.detach()) for loss in losses]
        assert (log.forget_losses[step], log.retain_losses[step]) == pytest.approx(tuple(losses), rel=1e-9)
        assert log.forget_norms[step] == pytest.approx(size(g_F), rel=1e-9)
        assert log.retain_norms[step] == pytest.approx(size(g_R), rel=1e-9)
        g = {n: g_R[n] / size(g_R) - g_F[n] / size(g_F) for n in g_R}
        with torch.no_grad():
            if step % 10 == 0:
                here, shifted = {n: p.clone() for n, p in by_hand.named_parameters()}, []
                for sign in (1, -1):
                    for n, p in by_hand.named_parameters():
                        p.copy_(here[n] + sign * lr * g[n])
                    shifted.append(float(mean_loss(by_hand, stay)))
                up, down = shifted
                bend = up + down - 2 * losses[1]
                lr = lr * min(max((up - down) / (2 * bend), 0.1), 10.0) if bend > 0 else lr
                for n, p in by_hand.named_parameters():
                    p.copy_(here[n])
            assert log.lrs[step] == pytest.approx(lr, rel=1e-6)
            for n, p in by_hand.named_parameters():
                p.sub_(lr * g[n])
    assert len(set(log.lrs)) == 2  # fitted at the first step and at the eleventh
    for n, p in by_hand.named_parameters():
        torch.testing.assert_close(weights[n], p.detach(), rtol=1e-6, atol=1e-9)


def test_the_forgotten_become_unlikely_and_the_retained_do_not() -> None:
    model = tiny_model("untied")
    before = forgotten(model), retained(model)
    _, _, (away, stay) = run(model, steps=11, read=lambda m: (forgotten(m), retained(m)))
    assert away > before[0] + 1 and stay < before[1]
    assert (forgotten(model), retained(model)) == before


@pytest.mark.parametrize("method", ["full", "lora"])
def test_batches_order_and_repetition_do_not_matter(method: str) -> None:
    made = recipe(method=method, batch=3)
    model = tiny_model("gpt2" if method == "full" else "tied")
    first, weights, _ = run(model, made=made, steps=3)
    again, same_weights, _ = run(model, made=made, steps=3)
    assert first == again and all(torch.equal(weights[n], same_weights[n]) for n in weights)
    split, others, _ = run(model, made=made, steps=3, batch_tokens=1, forget=FORGET[::-1], retain=RETAIN[::-1])
    assert (split.forget, split.retain) == (first.forget, first.retain)
    for name, value in weights.items():
        torch.testing.assert_close(others[name], value, rtol=1e-7, atol=1e-10)
    reseeded, *_ = run(model, made=replace(made, seed=4), steps=2)
    assert reseeded.retain != first.retain[:2]


def test_every_example_comes_once_an_epoch() -> None:
    log, *_ = run(tiny_model("tied"), steps=6)
    seen = [i for ids in log.retain[:3] for i in ids]
    assert sorted(seen) == sorted(z.id for z in RETAIN) == sorted(i for ids in log.retain[3:] for i in ids)
    assert all(sorted(ids) == ["z0", "z1"] for ids in log.forget)


def test_only_what_is_named_moves() -> None:
    model = tiny_model("untied")
    before = snapshot(model)["weights"]
    _, weights, _ = run(model, parameters=("*mlp*",))
    moved = {n for n, p in weights.items() if not torch.equal(p, before[n])}
    assert moved and all("mlp" in name for name in moved)


# The guard


def test_a_run_that_diverges_is_stopped_and_the_last_good_weights_are_kept() -> None:
    model = tiny_model("tied")
    guard = Guard("loss of what is retained", retained, keep=0.9, rises=False)
    log, _, left = run(model, guard=guard, steps=20, made=recipe(lr=300.0), read=retained)
    assert "step 10: loss of what is retained went from" in log.stopped and "after 0 steps are kept" in log.stopped
    assert log.kept == 0 and len(log.lrs) == EVERY
    assert [step for step, _ in log.guard] == [0, 10] and log.guard[1][1] > 1.1 * log.guard[0][1]
    assert left == log.guard[0][1] == retained(model)


def test_the_weights_kept_are_those_of_the_last_look_that_held(monkeypatch) -> None:
    monkeypatch.setattr("taught.training.unlearn.EVERY", 2)
    values = iter([1.0, 0.95, 0.92, 0.89])
    log, weights, _ = run(tiny_model("tied"), guard=Guard("accuracy", lambda _: next(values)), steps=40)
    assert log.kept == 4 and log.guard == ((0, 1.0), (2, 0.95), (4, 0.92), (6, 0.89))
    assert "step 6: accuracy went from 1 to 0.89" in log.stopped
    straight, expected, _ = run(tiny_model("tied"), steps=4)
    assert log.lrs[:4] == straight.lrs
    assert all(torch.equal(weights[n], expected[n]) for n in weights)


def test_a_loss_that_is_no_number_stops_the_run() -> None:
    def break_later(model, looks=[]):  # noqa: B006
        looks.append(1)
        if len(looks) == 2:
            with torch.no_grad():
                next(model.parameters()).mul_(math.inf)
        return 1.0

    log, *_ = run(tiny_model("tied"), guard=Guard("accuracy", break_later), steps=30)
    assert "step 11" in log.stopped and "not finite" in log.stopped
    assert len(log.lrs) == 10


@pytest.mark.parametrize(("start", "chance"), [(0.0, 0.0), (0.25, 0.25), (math.nan, 0.0)])
def test_a_guard_that_guards_nothing_is_refused(start: float, chance: float) -> None:
    model = tiny_model("tied")
    before = snapshot(model)
    with pytest.raises(UserError, match="below its limit before"):
        run(model, guard=Guard("accuracy", lambda _: start, chance=chance))
    assert all(torch.equal(p, snapshot(model)["weights"][n]) for n, p in before["weights"].items())


# Everything as before


@pytest.mark.parametrize("method", ["full", "lora"])
@pytest.mark.parametrize("where", ["inside", "while it fits the rate", "in the guard"])
def test_weights_come_back_to_the_bit_when_it_fails(monkeypatch, method: str, where: str) -> None:
    model = tiny_model("tied")
    plain_loss(model, FORGET[0])  # transformers leaves hooks of its own at the first pass
    before = snapshot(model)

    def fail(*_):
        raise KeyboardInterrupt

    if where == "while it fits the rate":
        monkeypatch.setattr("taught.training.unlearn.fitted_rate", fail)
    values = iter([1.0, *([] if where == "in the guard" else [1.0] * 9)])
    guard = Guard("accuracy", lambda _: next(values, None) or fail())
    with pytest.raises(KeyboardInterrupt), unlearned(model, FORGET, RETAIN, recipe(method=method), 20, guard):
        raise KeyboardInterrupt
    assert same(before, snapshot(model))


@pytest.mark.parametrize(
    ("forget", "retain", "what"),
    [([], RETAIN, "nothing to forget"), (FORGET, [], "nothing is left to retain"), (FORGET, FORGET, "to be retained")],
)
def test_sets_that_are_none_are_refused(forget, retain, what: str) -> None:
    with pytest.raises(UserError, match=what):
        run(tiny_model("tied"), forget=forget, retain=retain)


def test_half_precision_is_refused() -> None:
    with pytest.raises(UserError, match="half precision"):
        run(tiny_model("tied").bfloat16())


# What may be guarded


def test_of_a_choice_the_accuracy_is_guarded() -> None:
    """The share of prompts whose right option, their first suffix, is the likeliest."""
    model = tiny_model("tied")
    prompts = [replace(p, suffixes=((15,), (19, 4), (7,))) for p in tiny_prompts()]
    right = []
    for prompt in prompts:
        scores = []
        for suffix in prompt.suffixes:
            with torch.no_grad():
                _, logp = plain_read(model, (*prompt.ids, *suffix))
            scores.append(sum(float(logp[len(prompt.ids) - 1 + j, t]) for j, t in enumerate(suffix)) / len(suffix))
        right.append(scores[0] > max(scores[1:]))
    guard = prompt_guard(prompts, Choice(style="cloze", normalise=True), 0.9)
    assert guard.measure(model) == pytest.approx(sum(right) / len(right)) and 0 < sum(right) < len(right)
    assert guard.rises and guard.chance == pytest.approx(1 / 3)


def test_of_a_loss_the_mean_is_guarded_from_above() -> None:
    model = tiny_model("tied")
    prompts = [replace(p, suffixes=((15, 16),)) for p in tiny_prompts()]
    guard = prompt_guard(prompts, Loss(), 0.9)
    expected = [-float(plain_y(model, prompt.ids, prompt.suffixes)) / 2 for prompt in prompts]
    assert guard.measure(model) == pytest.approx(sum(expected) / len(expected))
    assert guard.holds(2.0, 2.19) and not guard.holds(2.0, 2.21) and guard.chance == 0


def test_of_any_other_behavior_the_mean_degree_is_guarded() -> None:
    model = tiny_model("tied")
    guard = prompt_guard(tiny_prompts(), tiny_behavior(), 0.9)
    assert guard.measure(model) == pytest.approx(float(sum(plain_y(model, p.ids).exp() for p in tiny_prompts())) / 6)
    assert guard.holds(0.5, 0.46) and not guard.holds(0.5, 0.44) and not guard.holds(0.5, math.nan)
