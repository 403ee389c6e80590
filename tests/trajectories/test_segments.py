"""Through a run in segments: dense matrices and plain autograd, float64; the derivative of gradient descent itself."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from reference import GROUPS, close, policy_of, readings_of
from taught.core import driver
from taught.core.driver import Method
from taught.core.estimator import Work
from taught.core.readings import Readings
from taught.core.registry import Choice
from taught.core.target import TargetSet
from taught.curvatures.ekfac import Layers, curved_layers, fit_ekfac
from taught.errors import UserError
from taught.estimators.cost import Asked, Passes
from taught.run.pieces import PartialFolder
from taught.stages.check import check_study
from taught.study.load import load_study
from taught.study.schema import ValidationSpec
from taught.training.loop import plan
from taught.training.recipe import Recipe
from taught.training.steps import State, States
from taught.trajectories.segments import Response, Run, Segment, Segments, segment_states
from taught.trajectories.steps import Steps
from tiny_models import (
    PROMPT_IDS,
    plain_gradient,
    plain_loss,
    plain_y,
    same,
    snapshot,
    tiny_examples,
    tiny_model,
    tiny_preferences,
    tiny_problem,
    tiny_prompts,
)
from tiny_study import do, values_of, with_values, write_tiny_study

SGD = Recipe.of(ValidationSpec(optimizer="sgd", lr=0.05, epochs=3, batch=2))
RECIPES = {
    "sgd": SGD,
    "momentum, decay, warm-up": replace(SGD, momentum=0.5, weight_decay=0.3, schedule="linear", warmup=0.3),
    "sgd, clipped": replace(SGD, max_grad_norm=2.0),
    "adamw": replace(SGD, optimizer="adamw", lr=0.01, schedule="linear"),
    "adamw, decay": replace(SGD, optimizer="adamw", lr=0.01, weight_decay=0.5),
}
SEED = 3
FEW = ("model.layers.1.mlp.up_proj.weight", "model.layers.0.self_attn.v_proj.weight", "*norm*")


def behaviors() -> Readings:
    ids = tuple(p.id for p in tiny_prompts())
    groups = {g: [i for i, own in zip(ids, GROUPS, strict=True) if own == g] for g in "ab"}
    return Readings(ids, np.zeros(len(ids)), groups, {})


def scores(recipe: Recipe, wanted=("behavior:a",), readings=None, examples=None, work=None, problem=None, **how):
    if problem is None:
        problem = tiny_problem(tiny_model("untied"), recipe=recipe, parameters=FEW)
    if readings is None and problem.features is not None:
        problem = replace(problem, features=None, point=None)
    targets = TargetSet.of(list(wanted), readings or behaviors())
    method = Method(trajectory=Choice("segments", {"segments": 2, "checkpoints": 1, "seed": SEED, **how}))
    return driver.scores(problem, examples or tiny_examples(), targets, method, work or Work())


# The whole of it, written out


@cache
def run_of(name: str):
    """Weights before each step, v behind it, rates with momentum and clipping, and the model behind the last."""
    recipe, model, examples = RECIPES[name], tiny_model("untied"), tiny_examples()
    names = [n for n, _ in model.named_parameters() if n in trained()]
    params = [model.get_parameter(n) for n in names]
    steps = plan([z.id for z in examples], recipe)
    lrs = [float(lr) for lr in rates(recipe, len(steps))]
    kind = torch.optim.AdamW if recipe.optimizer == "adamw" else torch.optim.SGD
    options = {"momentum": recipe.momentum} if recipe.optimizer == "sgd" else {}
    optimizer = kind(params, lr=1.0, weight_decay=recipe.weight_decay, **options)
    before, second, etas = [], [], []
    for number, (index, lr) in enumerate(zip(steps, lrs, strict=True), 1):
        before.append({n: p.detach().clone() for n, p in zip(names, params, strict=True)})
        loss = sum(plain_loss(model, examples[i]) for i in index) / len(index)
        for p, g in zip(params, torch.autograd.grad(loss, params), strict=True):
            p.grad = g
        share = 1.0
        if recipe.max_grad_norm:
            norm = float(torch.nn.utils.clip_grad_norm_(params, recipe.max_grad_norm))
            share = min(1.0, recipe.max_grad_norm / norm)
        optimizer.param_groups[0]["lr"] = lr
        optimizer.step()
        etas.append(lr * share / (1 - recipe.momentum))
        if recipe.optimizer == "adamw":
            state = [optimizer.state[p]["exp_avg_sq"] / (1 - 0.999**number) for p in params]
            second.append(dict(zip(names, state, strict=True)))
    return model, before, second, etas


def trained() -> list[str]:
    from taught.model.parameters import moving_parameters

    return list(moving_parameters(tiny_model("untied"), FEW))


def rates(recipe: Recipe, steps: int) -> list[float]:
    warmup = int(np.ceil(recipe.warmup * steps))
    down = [(steps - k) / (steps - warmup) if recipe.schedule == "linear" else 1.0 for k in range(steps)]
    return [recipe.lr * (k / warmup if k < warmup else down[k]) for k in range(steps)]


@pytest.mark.parametrize("name", [name for name in RECIPES if "," in name])
def test_effects_are_those_of_dense_matrices(name: str) -> None:
    recipe, examples = RECIPES[name], tiny_examples()
    adam = recipe.optimizer == "adamw"
    model, before, second, etas = run_of(name)
    names = trained() if adam else curved_layers(model, FEW)
    assert len(names) > 2 if adam else len(names) == 2
    query = {n: g.flatten() for n, g in plain_gradient(model, mean_y(model, "a")).items() if n in names}
    expected = np.zeros(len(examples))
    for start in (3, 0):  # two segments of three of the six steps, the state in the middle of each
        here = tiny_model("untied")
        with torch.no_grad():
            for n, w in before[start + 1].items():
                here.get_parameter(n).copy_(w)
        problem = tiny_problem(here, parameters=FEW)
        fitted = None if adam else fit_ekfac(problem, examples, seed=SEED)
        gradients = [plain_gradient(here, plain_loss(here, z)) for z in examples]
        eta = sum(etas[start : start + 3])
        for n in names:
            decay = recipe.weight_decay
            if fitted is not None:
                H = dense(fitted, n)
                one = torch.eye(len(H)).double()
                S = torch.matrix_exp(-eta * (H + decay * one))
                inverse = torch.linalg.inv(H + decay * one) if decay else torch.linalg.pinv(H, rtol=1e-14)
                through = inverse @ (one - S) @ query[n]
            else:
                v = ((second[1][n] + second[4][n]) / 2).flatten()
                P, h = 1 / (v.sqrt() + 1e-8), 2 * v  # two examples a step
                S = torch.diag(torch.exp(-eta * (P * h + decay)))
                through = P * (1 - S.diagonal()) / (P * h + decay) * query[n]
            for i, gradient in enumerate(gradients):
                expected[i] -= float(through @ gradient[n].flatten()) / len(examples)
            query[n] = S.T @ query[n]
    # Where the curvature is zero to rounding, the dense inverse has no digits.
    close(scores(recipe)["behavior:a"], expected, 1e-6)


def dense(fitted: Layers, name: str) -> Tensor:
    basis = torch.kron(*fitted.basis[name])
    return basis @ torch.diag(fitted.eigenvalues[name].flatten()) @ basis.T


def mean_y(model, group: str) -> Tensor:
    values = [plain_y(model, ids) for ids, own in zip(PROMPT_IDS, GROUPS, strict=True) if own == group]
    return torch.stack(values).mean()


# What it stands for


def test_on_a_quadratic_it_is_the_derivative_of_gradient_descent() -> None:
    # l_i = 1/2 w'Hw - b_i'w: H is the same for all and exactly Kronecker, momentum and decay are on; K steps of a small
    # rate, differentiated by autograd through all of them.
    draw = torch.Generator().manual_seed(0)
    m, n, N, K, eta, decay, mu = 3, 4, 5, 4000, 1e-3, 0.2, 0.5
    rows, columns = (torch.linalg.qr(torch.randn(k, k, generator=draw).double()).Q for k in (m, n))
    s = torch.rand(m, n, generator=draw).double() * 2
    s[0, 0] = 0.0
    layers = Layers({"w": (rows, columns)}, {"w": s})
    H, b = dense(layers, "w"), torch.randn(N, m * n, generator=draw).double()
    q = torch.randn(m * n, generator=draw).double()
    weights = torch.ones(N, dtype=torch.float64, requires_grad=True)
    w, speed = torch.zeros(m * n).double(), torch.zeros(m * n).double()
    for _ in range(K):
        speed = mu * speed + H @ w - (weights @ b) / N + decay * w
        w = w - eta * speed
    (exact,) = torch.autograd.grad(q @ w, weights)
    found = in_four_segments(Response.of(layers, K / 4 * eta / (1 - mu), {"w": decay}, {}), q.view(1, m, n), b)
    torch.testing.assert_close(found, exact, rtol=2e-3, atol=2e-3 * float(exact.abs().max()))


def in_four_segments(response: Response, query: Tensor, b: Tensor) -> Tensor:
    """Effects by four equal segments of examples with gradients -b: H stays what it is. The query is changed."""
    found = torch.zeros(len(b)).double()
    for _ in range(4):
        through = query.clone()
        response.moved.solve_queries({"w": through})
        found -= torch.stack([(through.flatten() * -b_i).sum() for b_i in b]) / len(b)
        response.survives.solve_queries({"w": query})
    return found


def test_on_a_quadratic_it_is_the_derivative_of_steps_in_a_metric() -> None:
    # The same with a diagonal H, and the gradient of a step divided elementwise: AdamW whose v no longer changes.
    draw = torch.Generator().manual_seed(1)
    n, N, K, eta, decay = 6, 5, 4000, 1e-3, 0.2
    h, P = (torch.rand(1, n, generator=draw).double() * 3 for _ in range(2))
    h[0, 0] = 0.0
    b, q = torch.randn(N, n, generator=draw).double(), torch.randn(n, generator=draw).double()
    weights, w = torch.ones(N, dtype=torch.float64, requires_grad=True), torch.zeros(n).double()
    for _ in range(K):
        w = w - eta * (P[0] * (h[0] * w - (weights @ b) / N) + decay * w)
    (exact,) = torch.autograd.grad(q @ w, weights)
    response = Response.of(Layers({}, {"w": h}), K / 4 * eta, {"w": decay}, {"w": P})
    found = in_four_segments(response, q.view(1, 1, n), b)
    torch.testing.assert_close(found, exact, rtol=2e-3, atol=2e-3 * float(exact.abs().max()))


def test_adam_s_scale_is_that_of_the_whole_run_and_0_where_no_gradient_came() -> None:
    states = States(None)
    for step, v in ((0, [0.0, 1.0]), (3, [0.0, 7.0])):
        states.save(State(step, {"weights": {}, "second": {"w": torch.tensor(v)}}))
    parts = (Segment(1.0, (0,)), Segment(1.0, (3,)))
    scale, curvature = Run(parts, states, nn.Linear(1, 1), ("w",), 6, {"w": 0.0}, 3.0, 1e-8).adam
    assert scale["w"].tolist() == [0.0, 0.5] and curvature.eigenvalues["w"].tolist() == [0.0, 12.0]


def test_a_short_run_at_a_small_rate_is_so_many_steps_from_the_base_model() -> None:
    recipe, lr = replace(SGD, lr=1e-7, epochs=2), 1e-3
    found = scores(recipe, segments=1)
    layers = curved_layers(tiny_model("untied"), FEW)
    problem = tiny_problem(tiny_model("untied"), lr=lr, parameters=layers)
    base = driver.scores(problem, tiny_examples(), TargetSet.of(["behavior:a"], behaviors()), Method(), Work())
    steps = 4  # two epochs of two steps
    close(found["behavior:a"], base["behavior:a"] * (recipe.lr / lr) * steps / len(tiny_examples()), 1e-5)


def test_an_example_of_a_short_last_batch_counts_for_more() -> None:
    # In the limit of a small rate the exact derivative has no other part: a preference of two in the second batch too.
    recipe = replace(SGD, lr=1e-7, epochs=1, batch=3)
    examples = [*tiny_examples(), tiny_preferences()[0]]
    layers = curved_layers(tiny_model("untied"), FEW)
    problem = tiny_problem(tiny_model("untied"), recipe=recipe, parameters=layers, features=None, point=None)
    found = scores(recipe, examples=examples, problem=problem, segments=1)
    exact = Steps(smoothness=0).follow(problem, examples, TargetSet.of(["behavior:a"], behaviors()), Work())
    close(found["behavior:a"], exact["behavior:a"], 1e-5)


@pytest.mark.parametrize("optimizer", ["sgd", "adamw"])
def test_it_has_the_unit_and_the_sign_of_steps(optimizer: str) -> None:
    # A gentle run through the same layers, all examples at every step: what is left out is of second order in the rate.
    recipe = replace(SGD, optimizer=optimizer, lr={"sgd": 1e-3, "adamw": 1e-4}[optimizer], batch=4, epochs=6)
    layers = curved_layers(tiny_model("untied"), FEW)
    problem = tiny_problem(tiny_model("untied"), recipe=recipe, parameters=layers)
    found = scores(recipe, problem=problem, segments=3)
    targets = TargetSet.of(["behavior:a"], behaviors())
    plain = replace(problem, features=None, point=None)
    exact = driver.scores(
        plain, tiny_examples(), targets, Method(trajectory=Choice("steps", {"smoothness": 0})), Work()
    )
    a, b = found["behavior:a"], exact["behavior:a"]
    if optimizer == "sgd":
        np.testing.assert_allclose(a, b, atol=2e-2 * np.abs(b).max())
    else:  # every step has the same batch, so that v takes back most of what m adds: the size is overstated
        assert np.corrcoef(a, b)[0, 1] > 0.9


def test_states_are_in_the_middle_of_equal_parts() -> None:
    assert segment_states(6, 2, 1) == [(range(3), (1,)), (range(3, 6), (4,))]
    assert segment_states(12, 3, 2) == [(range(4), (1, 3)), (range(4, 8), (5, 7)), (range(8, 12), (9, 11))]
    assert segment_states(2, 2, 3) == [(range(1), (0,)), (range(1, 2), (1,))]  # of one step there is one state


# As everywhere


def test_pathways_add_up_and_every_kind_of_target_is_answered() -> None:
    recipe, wanted = RECIPES["adamw"], ["score", "coefficient:*", "behavior:*", "behavior:a - behavior:b"]
    problem = tiny_problem(tiny_model("untied"), "jumprelu", "mean_user", recipe=recipe, parameters=FEW)
    readings = readings_of(policy_of("untied", "jumprelu", "mean_user", True))
    found = scores(recipe, wanted, readings, problem=problem)
    for name in (n for n in found.targets if n.kind in ("score", "coefficient") and n.pathway is None):
        x, y = found[f"{name}:x"], found[f"{name}:y"]
        np.testing.assert_allclose(x + y, found[name], rtol=1e-9, atol=1e-12)
    assert np.abs(found["score:x"]).max() > 0 and np.abs(found["score:y"]).max() > 0
    close(found["behavior:a - behavior:b"], found["behavior:a"] - found["behavior:b"], 1e-9)
    # Targets are read of the final model: its score is not that of the model before training.
    close(found["behavior:a"], scores(recipe)["behavior:a"], 1e-9)


def test_order_batches_and_memory_change_nothing_and_weights_come_back(tmp_path) -> None:
    recipe = RECIPES["adamw"]
    problem = tiny_problem(tiny_model("untied"), recipe=recipe, parameters=FEW)
    before = snapshot(problem.model)
    found = scores(recipe, ("behavior:a", "behavior:b"), problem=problem, checkpoints=2)
    assert same(before, snapshot(problem.model))
    other = replace(problem, batch_tokens=9, memory_gb=1e-7, prompts=problem.prompts[::-1])
    readings = behaviors()
    readings = replace(readings, prompt_ids=readings.prompt_ids[::-1])
    again = scores(
        recipe,
        ("behavior:b", "behavior:a"),
        readings,
        tiny_examples()[::-1],
        Work(folder=tmp_path),
        replace(other, features=None, point=None),
        checkpoints=2,
    )
    for group in "ab":
        mine = found.by_example(f"behavior:{group}")
        assert again.by_example(f"behavior:{group}") == pytest.approx(mine, rel=1e-8, abs=1e-12)
    assert not list(tmp_path.iterdir())


def test_a_stopped_pass_goes_on_where_it_was(tmp_path, monkeypatch) -> None:
    from taught.trajectories import segments

    fits, fit = [], segments.fit_ekfac

    def dying(*args, **options):
        fits.append(1)
        if len(fits) == 2:
            raise KeyboardInterrupt
        return fit(*args, **options)

    monkeypatch.setattr(segments, "fit_ekfac", dying)
    work = Work(pieces=PartialFolder(tmp_path / "partial"))
    with pytest.raises(KeyboardInterrupt):
        scores(RECIPES["sgd"], work=work)
    again = scores(RECIPES["sgd"], work=work)
    assert len(fits) == 3  # the last segment's curvature was kept
    np.testing.assert_array_equal(again.values, scores(RECIPES["sgd"]).values)


def test_preferences_and_fresh_lora_layers_are_followed() -> None:
    # Against the exact derivative of the same run.
    recipe = replace(SGD, method="lora", lora_rank=2, lr=0.01, epochs=2)
    problem = tiny_problem(tiny_model("untied"), recipe=recipe, features=None, point=None)
    examples = [*tiny_examples(), tiny_preferences()[0]]
    found = scores(recipe, examples=examples, problem=problem, checkpoints=2)
    targets = TargetSet.of(["behavior:a"], behaviors())
    exact = Steps(smoothness=0).follow(problem, examples, targets, Work())
    assert np.corrcoef(found["behavior:a"], exact["behavior:a"])[0, 1] > 0.9
    assert not hasattr(problem.model, "peft_config")


# What is refused


@pytest.mark.parametrize("change", [{"estimator": "forward"}, {"estimator": "sketch"}, {"curvature": "ekfac"}])
def test_other_estimators_and_curvatures_are_refused(change) -> None:
    parts = {name: Choice(kind) for name, kind in change.items()}
    with pytest.raises(UserError, match="does not go together"):
        Method(**parts, trajectory=Choice("segments")).refuse()


def test_more_segments_than_steps_are_refused_and_the_fix_works() -> None:
    with pytest.raises(UserError, match=r"segments=6"):
        scores(SGD, segments=7)
    assert np.isfinite(scores(SGD, segments=6).values).all()


def test_a_run_by_trl_and_one_that_moves_no_linear_layer_are_refused() -> None:
    with pytest.raises(UserError, match="validation.trainer"):
        scores(replace(SGD, trainer="trl"))
    problem = tiny_problem(tiny_model("untied"), recipe=SGD, parameters=("*norm*",))
    with pytest.raises(UserError, match="no parameter has an EK-FAC curvature"):
        scores(SGD, problem=problem)


# Through the stages


def small_study(folder):
    values = {
        "attribution.trajectory": {"kind": "segments", "segments": 2, "checkpoints": 1},
        "attribution.targets": ["behavior:harmless"],
        "attribution.parameters": ["model.layers.1.mlp.*"],
        "sae.path": None,
        "examples.limit": 4,
        "prompts.limit": 6,
        "validation.batch": 2,
        "validation.epochs": 1,
    }
    return with_values(load_study(write_tiny_study(folder)), values)


def test_what_check_says_is_how_often_gradients_of_the_examples_are_made(monkeypatch) -> None:
    from taught.trajectories import segments

    passes, contract = [], segments.contract_examples

    def contract_examples(problem, sites, examples, queries, count, progress):
        passes.append(count)
        return contract(problem, sites, examples, queries, count, progress)

    monkeypatch.setattr(segments, "contract_examples", contract_examples)
    problem = tiny_problem(tiny_model("untied"), recipe=RECIPES["adamw"], parameters=FEW)
    problem = replace(problem, features=None, point=None)
    examples, how, asked = tiny_examples(), Segments(segments=2, checkpoints=1), Asked(0, queries=2, every=False)
    told = {}
    for memory_gb in (8.0, 1e-7):  # both targets at once; one at a time
        passes.clear()
        some = replace(problem, memory_gb=memory_gb)
        scores(RECIPES["adamw"], ("behavior:a", "behavior:b"), problem=some)
        told[len(passes)] = how.cost(some, examples, asked)
    assert sorted(told) == [2, 4]
    one = Passes(problem, examples)
    assert told[4]["gradients"] - told[2]["gradients"] == pytest.approx(3 * 2 * one.examples)
    assert told[4]["targets"] - told[2]["targets"] == pytest.approx(one.trees)


def test_a_run_through_the_command_s_stages_and_its_costs(tmp_path) -> None:
    study = small_study(tmp_path)
    report = dict(check_study(study).rows)
    assert "gradients" in report["cost"] and "training" in report["cost"]
    descent = dict(check_study(with_values(study, {"validation.optimizer": "sgd"})).rows)
    assert "curvature" in descent["cost"] and "curvature" not in report["cost"] and "MB of states" in descent["disk"]
    run = do(study, tmp_path / "run", "readings", "attribute")
    assert run.read_json("attribution")["method"] == "adjoint@segments"
    assert all(np.isfinite(list(values_of(run, "behavior:harmless").values())))
    with pytest.raises(UserError, match=r"validation\.lr"):  # the recipe is what they depend on
        do(with_values(study, {"validation.lr": 1e-3}), run, "attribute")


@pytest.mark.slow  # writes a whole report
def test_the_report_says_that_values_are_those_of_a_whole_run(tmp_path) -> None:
    do(small_study(tmp_path), tmp_path / "run", "readings", "attribute", "curate", "report")
    page = (tmp_path / "run" / "report.html").read_text()
    assert "weight of an example in the whole run" in page and "one step" not in page.lower()
