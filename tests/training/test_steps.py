"""A training run step by step: the optimizers of torch, and derivatives of whole runs by central differences."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import nn
from transformers.models.llama.modeling_llama import LlamaMLP

from taught.errors import UserError
from taught.study.schema import ValidationSpec
from taught.training.loop import in_training, train
from taught.training.recipe import Recipe
from taught.training.steps import Back, State, States, Training
from tiny_models import plain_y, tiny_examples, tiny_model, tiny_preferences

BASE = Recipe.of(ValidationSpec(lr=0.01, epochs=2, batch=3))
RECIPES = {
    "adamw": replace(BASE, weight_decay=0.1, schedule="linear", warmup=0.3),
    "adamw, clipped": replace(BASE, max_grad_norm=0.05),
    "adamw, clipped sometimes": replace(BASE, max_grad_norm=4.0),
    "sgd": replace(BASE, optimizer="sgd", lr=0.05),
    "momentum": replace(BASE, optimizer="sgd", lr=0.02, momentum=0.9, weight_decay=0.1, max_grad_norm=3.0),
}
PROMPT = (0, 5, 6, 7, 8, 3, 2)


def functional(model) -> torch.Tensor:
    return plain_y(model, PROMPT)


def trained(recipe: Recipe, weights: torch.Tensor | None, *, name: str = "untied", eps_root: float = 0.0, inputs=None):
    """F after a whole run with these weights."""
    model = tiny_model(name)
    with in_training(model, recipe, None) as patterns:
        training = Training(model, inputs or examples(), recipe, patterns, 512, eps_root, weights=weights)
        with training.ready():
            training.train()
            return float(functional(model).detach())


def examples():
    return [*tiny_examples(), tiny_preferences()[0]]


def derivative(recipe: Recipe, **options):
    """Ids, and dF/dw of each example."""
    ids, shares = derivatives(recipe, **options)
    return ids, np.array([own.sum() for own in shares])


def derivatives(
    recipe: Recipe,
    *,
    name: str = "untied",
    eps_root: float = 0.0,
    hessian: str = "exact",
    budget: int = 512,
    inputs=None,
    parameters=None,
):
    """Ids, and for each example the parts of its tokens."""
    model = tiny_model(name)
    with in_training(model, recipe, parameters) as patterns:
        training, states = Training(model, inputs or examples(), recipe, patterns, budget, eps_root), States(None)
        with training.ready():
            state = training.train(states)
            table = model.get_input_embeddings()
            padding, table.padding_idx = table.padding_idx, None  # F depends on its look-ups of that row as well
            slopes = torch.autograd.grad(functional(model), list(training.moving.values()), allow_unused=True)
            table.padding_idx = padding
            zeros = {part: {n: torch.zeros_like(t) for n, t in of.items()} for part, of in state.parts.items()}
            weights = {
                n: torch.zeros_like(p) if g is None else g.clone()
                for (n, p), g in zip(training.moving.items(), slopes, strict=True)
            }
            back, total = Back({**zeros, "weights": weights}), [np.zeros(z.n_scored) for z in training.inputs]
            for step in reversed(range(len(training))):
                found = training.step_back(training.enter(states.load(step)), [back], hessian=hessian)
                for i, own in zip(training.plan[step], found, strict=True):
                    total[i] += own[:, 0].numpy()
    return training.ids, total


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
def test_a_run_is_that_of_torch_s_own_optimizers(recipe: Recipe) -> None:
    model, other = tiny_model("tied"), tiny_model("tied")
    train(model, examples(), recipe)
    training = Training(other, examples(), recipe)
    with training.ready():
        training.train()
    for p, q in zip(model.parameters(), other.parameters(), strict=True):
        torch.testing.assert_close(p, q, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("recipe", RECIPES.values(), ids=RECIPES)
@pytest.mark.parametrize("name", ["untied", "gpt2", "padded"])
def test_the_derivative_is_that_of_whole_trainings(recipe: Recipe, name: str) -> None:
    # Along one drawn direction, in which every example has another part: an error in any of them shows.
    is_that_of_whole_trainings(recipe, name, np.random.default_rng(1).standard_normal((1, 5)))


def is_that_of_whole_trainings(recipe: Recipe, name: str, directions: np.ndarray) -> None:
    """Central differences of retrainings in the weights; eps_root keeps AdamW smooth where gradients vanish."""
    _, found = derivative(recipe, name=name, eps_root=1e-6)
    step = 1e-5
    for v in directions:
        up, down = (
            trained(recipe, torch.from_numpy(1 + sign * step * v), name=name, eps_root=1e-6) for sign in (1, -1)
        )
        assert found @ v == pytest.approx((up - down) / (2 * step), rel=1e-6, abs=1e-9)


def test_the_part_of_a_token_is_the_derivative_in_its_weight() -> None:
    # Along a drawn direction for each of two examples, in which every token has another part.
    recipe, step = replace(RECIPES["adamw, clipped sometimes"], epochs=3), 1e-5
    ids, found = derivatives(recipe, eps_root=1e-6)
    inputs = sorted((z for z in examples() if z.link is None), key=lambda z: -z.n_scored)[:2]
    assert inputs[0].n_scored > 2
    for z in inputs:
        v, ends = np.random.default_rng(1).standard_normal(z.n_scored), []
        for sign in (1, -1):
            weights = [list(own) for own in z.weights]
            for (sequence, place), part in zip(z.scored, v, strict=True):
                weights[sequence][place] *= 1 + sign * step * part
            other = [replace(z, weights=tuple(map(tuple, weights))) if o.id == z.id else o for o in examples()]
            ends.append(trained(recipe, None, eps_root=1e-6, inputs=other))
        numeric = (ends[0] - ends[1]) / (2 * step)
        assert found[ids.index(z.id)] @ v == pytest.approx(numeric, rel=1e-6, abs=1e-9)


@pytest.mark.parametrize("hessian", ["gauss-newton", "empirical-fisher"])
@pytest.mark.parametrize("name", ["untied", "padded"])
def test_the_parts_of_tokens_are_the_same_where_there_is_no_later_step(hessian: str, name: str) -> None:
    # One step: there is no Hessian behind it, so that all are the same, preferences and their signs too.
    recipe = replace(BASE, epochs=1, batch=8)
    one, other = (derivatives(recipe, name=name, eps_root=1e-6, hessian=which)[1] for which in ("exact", hessian))
    for a, b in zip(one, other, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-9, atol=1e-14)


@pytest.mark.parametrize("name", ["adamw", "adamw, clipped", "momentum"])
def test_gauss_newton_is_exact_where_logits_are_linear_in_the_weights(name: str) -> None:
    responses = {"inputs": tiny_examples(), "parameters": ("lm_head.weight",)}
    one, other, fisher = (
        derivative(RECIPES[name], eps_root=1e-6, hessian=which, **responses)[1]
        for which in ("exact", "gauss-newton", "empirical-fisher")
    )
    np.testing.assert_allclose(other, one, rtol=1e-9, atol=1e-12)
    assert np.abs(fisher - one).max() > 1e-4 * np.abs(one).max()


@pytest.mark.parametrize("name", ["adamw", "adamw, clipped", "momentum"])
def test_without_a_hessian_it_is_the_derivative_of_the_optimizer_s_rule_alone(name: str) -> None:
    """Torch's own optimizer is given every gradient as it was in the run, but for the weights of the examples."""
    recipe, step, model = RECIPES[name], 1e-6, tiny_model("untied")
    ids, found = derivatives(recipe, hessian="none")
    given: list[tuple[list[int], list[torch.Tensor]]] = []  # by step: the batch, each example's gradient
    training = Training(model, examples(), recipe)
    with training.ready():
        state = training.begin()
        for batch in training.plan:
            each = [Training(model, [training.inputs[i]], recipe)._gradient(0) for i in batch]
            given.append((batch, [torch.cat([g.flatten() for g in own.values()]) / len(batch) for own in each]))
            training.advance(state)
        slopes = torch.autograd.grad(functional(model), list(training.moving.values()), allow_unused=True)
    q = torch.cat(
        [
            (torch.zeros_like(p) if g is None else g).flatten()
            for p, g in zip(training.moving.values(), slopes, strict=True)
        ]
    )
    start = torch.cat([p.detach().flatten() for p in tiny_model("untied").parameters()])

    def ended(weights: np.ndarray) -> float:
        theta = nn.Parameter(start.clone())
        if recipe.optimizer == "adamw":
            optimizer = torch.optim.AdamW([theta], weight_decay=recipe.weight_decay)
        else:
            optimizer = torch.optim.SGD([theta], momentum=recipe.momentum, weight_decay=recipe.weight_decay)
        for (batch, gradients), lr in zip(given, training.lrs, strict=True):
            theta.grad = sum(float(weights[i]) * g for i, g in zip(batch, gradients, strict=True))
            if recipe.max_grad_norm is not None:
                torch.nn.utils.clip_grad_norm_([theta], recipe.max_grad_norm)
            optimizer.param_groups[0]["lr"] = lr
            optimizer.step()
        return float(q @ theta.detach())

    v = np.random.default_rng(1).standard_normal(len(ids))
    numeric = (ended(1 + step * v) - ended(1 - step * v)) / (2 * step)
    assert v @ [own.sum() for own in found] == pytest.approx(numeric, rel=1e-5)


@pytest.mark.parametrize("clip", [None, 0.05])
@pytest.mark.parametrize("number", [0, 1])
def test_signs_that_an_example_turns_are_seen_in_a_derivative_over_some_width(number: int, clip: float | None) -> None:
    """AdamW from m = v = 0, and F the sum of weights by the sign of an example's part: turned signs count alike."""
    recipe, model = replace(BASE, epochs=2, batch=8, max_grad_norm=clip), tiny_model("untied")
    begun = {name: p.detach().clone() for name, p in model.named_parameters()}
    inputs = examples()
    own = Training(model, inputs[:1], recipe)._gradient(0)
    place = sorted(z.id for z in inputs).index(inputs[0].id)

    def stepped(weight: float = 1.0, width: float = 0.0, states: States | None = None) -> tuple[Training, State]:
        weights = torch.ones(len(inputs), dtype=torch.float64)
        weights[place] = weight
        training = Training(model, inputs, recipe, sign_width=width, weights=weights)
        with training.ready():
            state = training.begin()
            state = training.enter(State(number, {**state.parts, "weights": begun}))
            training.advance(state, states)
        return training, state.copy()

    def effect(width: float) -> float:
        training, state = stepped(1.0, width, states := States(None))
        zeros = {part: {n: torch.zeros_like(t) for n, t in of.items()} for part, of in state.parts.items()}
        back = Back({**zeros, "weights": {name: g.sign() for name, g in own.items()}})
        with training.ready():
            found = training.step_back(training.enter(states.load(number)), [back])
        return float(found[training.plan[number].index(place)].sum())

    with_it, half = (stepped(weight)[1].parts["weights"] for weight in (1.0, 0.5))
    change = sum(float(((with_it[name] - half[name]) * g.sign()).sum()) for name, g in own.items())
    assert change < -50 * recipe.lr  # signs were turned
    assert effect(0.5) / 2 == pytest.approx(change, rel=0.25)
    assert abs(effect(0.0)) / 2 < 0.1 * abs(change)


def test_the_derivative_goes_through_fresh_lora_layers() -> None:
    is_that_of_whole_trainings(replace(BASE, method="lora", lora_rank=2, epochs=3), "untied", np.eye(5))


def test_micro_batches_change_nothing() -> None:
    one, many = (derivative(RECIPES["adamw, clipped"], eps_root=1e-6, budget=budget)[1] for budget in (512, 1))
    np.testing.assert_allclose(one, many, rtol=1e-9)


def test_an_example_with_weight_zero_is_as_if_it_had_no_loss() -> None:
    recipe = replace(BASE, optimizer="sgd", lr=0.05, batch=5, epochs=1)
    weights = torch.ones(5, dtype=torch.float64)
    weights[1] = 0.0
    model = tiny_model("untied")
    rest = [z for i, z in enumerate(sorted(examples(), key=lambda z: z.id)) if i != 1]
    with in_training(model, replace(recipe, lr=0.04), None) as patterns:  # four of five: the denominator is held
        training = Training(model, rest, replace(recipe, lr=0.04), patterns)
        with training.ready():
            training.train()
            expected = float(functional(model).detach())
    assert trained(recipe, weights) == pytest.approx(expected, rel=1e-9)


def slopes(model, values: torch.Tensor) -> torch.Tensor:
    """Derivatives of some values in all parameters, a row each."""
    each = [torch.autograd.grad(v, list(model.parameters()), retain_graph=True) for v in values.flatten()]
    return torch.stack([torch.cat([g.flatten() for g in own]) for own in each])


def outputs_of(model, z) -> torch.Tensor:
    """The logits that predict an example's scored tokens, [K, V]; of a preference its weighted sum, [1]."""
    logits = [model(input_ids=torch.tensor([ids])).logits[0] for ids in z.sequences]
    if z.link is None:
        return torch.stack([logits[s][t - 1] for s, t in z.scored])
    logp = [own.log_softmax(-1) for own in logits]
    return -sum(z.weights[s][t] * logp[s][t - 1, z.sequences[s][t]] for s, t in z.scored)[None]


def loss_of(z, outputs: torch.Tensor) -> torch.Tensor:
    """The loss of an example with these outputs."""
    if z.link is not None:
        return z.link(outputs)[0]
    each = zip(outputs, z.scored, strict=True)
    return -sum(z.weights[s][t] * own.log_softmax(-1)[z.sequences[s][t]] for own, (s, t) in each)


def curved(model, z, up: torch.Tensor) -> torch.Tensor:
    """H up of one example by dense matrices: J' B J, J of the gradient that training is given, J' of all look-ups."""
    outputs = outputs_of(model, z).detach().requires_grad_()
    slope = torch.autograd.grad(loss_of(z, outputs), outputs, create_graph=True)[0].flatten()
    B = torch.stack([torch.autograd.grad(v, outputs, retain_graph=True)[0].flatten() for v in slope])
    J = slopes(model, outputs_of(model, z))
    table = model.get_input_embeddings()
    padding, table.padding_idx = table.padding_idx, None
    whole = slopes(model, outputs_of(model, z))
    table.padding_idx = padding
    return whole.T @ (B @ (J @ up))


def squared(model, z, up: torch.Tensor) -> torch.Tensor:
    """g g' up of one example."""
    g = slopes(model, loss_of(z, outputs_of(model, z)))[0]
    return g * (g @ up)


@pytest.mark.parametrize(("hessian", "dense"), [("gauss-newton", curved), ("empirical-fisher", squared)])
@pytest.mark.parametrize(("name", "budget"), [("untied", 512), ("padded", 1)])
def test_products_with_a_curvature_are_those_of_dense_matrices(hessian, dense, name, budget) -> None:
    # A step of SGD: Lg is -lr L, and L behind it has H Lg more.
    recipe = replace(BASE, optimizer="sgd", lr=0.05, batch=5, epochs=1)
    model = tiny_model(name)
    with in_training(model, recipe, None) as patterns:
        training = Training(model, examples(), recipe, patterns, budget)
        with training.ready():
            state, states = training.begin(), States(None)
            draw = torch.Generator().manual_seed(0)
            ups = [
                {n: torch.randn(p.shape, generator=draw, dtype=p.dtype) for n, p in training.moving.items()}
                for _ in range(2)
            ]
            backs = [Back({**state.copy().parts, "weights": {n: t.clone() for n, t in up.items()}}) for up in ups]
            training.advance(state.copy(), states)
            found = training.step_back(training.enter(states.load(0)), backs, hessian=hessian)
            for k, (up, back) in enumerate(zip(ups, backs, strict=True)):
                L, at = (torch.cat([own[n].flatten() for n in up]) for own in (back.parts["weights"], up))
                batch = [training.inputs[z] for z in training.plan[0]]
                expected = sum(dense(model, z, -0.05 * at) for z in batch) / 5
                torch.testing.assert_close(L - at, expected, rtol=1e-9, atol=1e-12)
                for z, shares in zip(batch, found, strict=True):
                    g = slopes(model, loss_of(z, outputs_of(model, z)))[0]
                    assert float(shares[:, k].sum()) == pytest.approx(float(g @ (-0.05 * at)) / 5, rel=1e-9)


class Doubled(torch.autograd.Function):
    """An operation that is written by hand, without forward mode."""

    @staticmethod
    def forward(ctx, x):
        return 2 * x

    @staticmethod
    def backward(ctx, up):
        return 2 * up


def test_a_model_without_forward_mode_is_refused_with_a_way_out(monkeypatch) -> None:
    monkeypatch.setattr(LlamaMLP, "forward", lambda self, x: Doubled.apply(self.up_proj(x)) @ self.up_proj.weight)
    with pytest.raises(UserError, match="attribution.trajectory.hessian=exact"):
        derivative(BASE, eps_root=1e-6, hessian="gauss-newton")
    assert np.isfinite(derivative(BASE, eps_root=1e-6, hessian="exact")[1]).all()


def test_states_come_back_from_a_folder_as_they_were(tmp_path) -> None:
    training = Training(tiny_model("tied"), examples(), BASE)
    kept, states = States(None), States(tmp_path / "states")
    with training.ready():
        state = training.begin()
        training.advance(state)
        kept.save(state)
        states.save(state)
    one, other = kept.load(1), states.load(1)
    assert one.tensors().keys() == other.tensors().keys() and isinstance(one, State)
    assert all(torch.equal(one.tensors()[name], t) for name, t in other.tensors().items())
    states.drop(1)
    assert 1 not in states and 1 in kept
