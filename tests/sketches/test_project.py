"""Sketches against gradients that autograd gives whole and that are projected by the formula."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch

import taught.sketches.project as projection_module
from taught.core.estimator import Work
from taught.core.problem import Problem
from taught.core.query import build_queries
from taught.curvatures.adam import Adam
from taught.curvatures.ekfac import Ekfac
from taught.errors import UserError
from taught.estimators.adjoint import target_effects
from taught.model.gradients import find_sites, frozen
from taught.sketches.fill import example_sketches, prompt_sketches
from taught.sketches.project import Projection
from tiny_models import (
    MODELS,
    PROMPT_IDS,
    plain_gradient,
    plain_loss,
    plain_read,
    plain_y,
    same,
    snapshot,
    tiny_examples,
    tiny_features,
    tiny_model,
    tiny_problem,
)

DIM = 96


@pytest.fixture(autouse=True)
def narrow(monkeypatch: pytest.MonkeyPatch) -> None:
    """Four columns: the tiny models' layers are wider, so that inputs are projected as well."""
    monkeypatch.setattr(projection_module, "COLUMNS", 4)


def by_formula(projection: Projection, grads: dict[str, torch.Tensor]) -> torch.Tensor:
    """s_bj = sum over o of e_oj H_oj, entry by entry."""
    total = np.zeros((projection.rows, 4))
    for name, G in grads.items():
        drawn = projection._map(name)
        signs = drawn.signs.numpy().astype(float)
        if G.ndim == 1:
            flat = total.reshape(-1)
            for i, value in enumerate((G.numpy() * signs).tolist()):
                flat[(drawn.first * 4 + i) % flat.size] += value
        else:
            H = G.numpy() @ drawn.right.double().numpy().T * signs
            for o, row in enumerate(H):
                total[(drawn.first + o) % projection.rows] += row
    return torch.from_numpy(total.reshape(-1))


@pytest.mark.parametrize("name", MODELS)
def test_the_sketch_of_a_example_is_the_projection_of_its_whole_gradient(name: str) -> None:
    model = tiny_model(name)
    projection = Projection(model, DIM)
    examples = tiny_examples()
    seen = 0
    for part in example_sketches(tiny_problem(model), projection, examples):
        for i, found, loss in zip(part.index, part.values, part.losses, strict=True):
            value = plain_loss(model, examples[i])
            wanted = by_formula(projection, plain_gradient(model, value))
            torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-12)
            assert float(loss) == pytest.approx(float(value.detach()), rel=1e-9)
            seen += 1
    assert seen == len(examples)


@pytest.mark.parametrize("position", ["last_user", "mean_user", "max_user"])
@pytest.mark.parametrize("name", MODELS)
def test_the_sketches_of_a_prompt_are_those_of_y_and_of_each_active_feature(name: str, position: str) -> None:
    model = tiny_model(name)
    projection = Projection(model, DIM)
    problem = tiny_problem(model, position=position)
    found = prompt_sketches(problem, projection, problem.prompts)
    features = tiny_features(position=position)
    model.get_input_embeddings().padding_idx = None  # the target's side is the true derivative
    seen = set()
    for part in found:
        for i, column, sketch in zip(part.index, part.features, part.values, strict=True):
            if column < 0:
                value = plain_y(model, PROMPT_IDS[i])
            else:
                h = plain_read(model, PROMPT_IDS[i])[0][list(problem.prompts[i].read)]
                value = features(h, torch.tensor([0, len(h)]))[0, column]
            wanted = by_formula(projection, plain_gradient(model, value))
            torch.testing.assert_close(sketch, wanted, rtol=1e-8, atol=1e-11)
            seen.add((i, column))
    active = set()
    for i, prompt in enumerate(problem.prompts):
        h = plain_read(model, PROMPT_IDS[i])[0][list(prompt.read)]
        X = features(h, torch.tensor([0, len(h)]))[0]
        active |= {(i, -1), *((i, k) for k in X.nonzero().flatten().tolist())}
    assert seen == active


@pytest.mark.parametrize("name", MODELS)
def test_the_sketch_of_a_whole_gradient_is_that_of_its_factors(name: str) -> None:
    """Sums of the sketches of y and features over prompts, and the same sums of gradients projected."""
    model = tiny_model(name)
    problem, projection = tiny_problem(model), Projection(model, DIM)
    A, B = cotangents(problem)
    wanted = torch.zeros(len(A), DIM, dtype=torch.float64)
    for part in prompt_sketches(problem, projection, problem.prompts):
        for i, column, sketch in zip(part.index, part.features, part.values, strict=True):
            wanted += torch.outer(B[:, i] if column < 0 else A[:, i, column], sketch)
    sites = find_sites(model)
    with frozen(model):
        whole = projection.matrices(build_queries(problem, sites, A, B), len(A))
        torch.testing.assert_close(whole, wanted, rtol=1e-9, atol=1e-11)
        # Of X alone, look-ups are kept as some rows of the embedding.
        parts = [build_queries(problem, sites, *only) for only in ((A, None), (None, B))]
        summed = sum(projection.matrices(part, len(A)) for part in parts)
        torch.testing.assert_close(summed, wanted, rtol=1e-9, atol=1e-11)


def gradients(model: torch.nn.Module) -> dict[str, torch.Tensor]:
    """Whole gradients of the examples, whose projections their sketches are: by the first test, to the last digits."""
    each = [plain_gradient(model, plain_loss(model, example)) for example in tiny_examples()]
    return {name: torch.stack([grads[name] for grads in each]) for name in each[0]}


def cotangents(problem: Problem, count: int = 3) -> tuple[torch.Tensor, torch.Tensor]:
    draw = torch.Generator().manual_seed(0)
    n, d = len(problem.prompts), len(problem.features.ids)
    A = torch.randn(count, n, d, dtype=torch.float64, generator=draw)
    return A, torch.randn(count, n, dtype=torch.float64, generator=draw)


@pytest.mark.parametrize("metric", [Adam(eps=1e-2), Ekfac()], ids=["adam", "ekfac"])
def test_a_query_in_a_curvature_is_projected_after_it_is_divided(metric: Adam | Ekfac) -> None:
    model = tiny_model("untied")
    plain = tiny_problem(model, lr=1.0)
    problem = plain.within(metric.fit(plain, tiny_examples(), Work()))
    A, B = cotangents(problem)
    sites = find_sites(model, problem.parameters)
    with frozen(model):
        queries = build_queries(problem, sites, A, B)
        undivided = build_queries(replace(plain, parameters=problem.parameters), sites, A, B)
    for name, query in queries.items():
        divided = [problem.metric.solve(name, one) for one in undivided[name]]
        torch.testing.assert_close(query, torch.stack(divided), rtol=1e-9, atol=1e-12)
    exact, _ = target_effects(problem, tiny_examples(), A, B)
    grads, draws = gradients(model), []
    for seed in range(60):
        projection = Projection(model, DIM, seed)
        examples = projection.matrices(grads, len(tiny_examples()))
        draws.append(-examples @ projection.matrices(queries, len(A)).T)
    values = torch.stack(draws)
    error = values.std(0) / len(draws) ** 0.5
    assert ((values.mean(0) - exact).abs() < 4 * error).all()


def test_inner_products_of_sketches_are_unbiased_and_as_noisy_as_stated() -> None:
    model = tiny_model("tied")
    examples, grads = tiny_examples(), gradients(model)
    flat = torch.cat([g.flatten(1) for g in grads.values()], 1)
    exact = flat @ flat.T
    stated = ((exact.diag()[:, None] * exact.diag() + exact**2) / DIM).sqrt()
    a, b = torch.triu_indices(len(examples), len(examples), offset=1)
    found = []
    for seed in range(100):
        sketched = Projection(model, DIM, seed).matrices(grads, len(examples))
        found.append(((sketched @ sketched.T - exact) / stated)[a, b])
    off = torch.stack(found)  # [draws, pairs of examples]
    mean = off.mean(1)
    assert abs(mean.mean()) < 3.5 * mean.std() / len(found) ** 0.5
    assert 0.8 < off.pow(2).mean().sqrt() < 2.0  # R adds to it on a model of three layers


def test_weights_and_hooks_are_as_before() -> None:
    model = tiny_model("tied")
    before = snapshot(model)
    problem = tiny_problem(model)
    example_sketches(problem, Projection(model, DIM), tiny_examples())
    prompt_sketches(problem, Projection(model, DIM), problem.prompts)
    assert same(before, snapshot(model))


def test_sketches_do_not_depend_on_batches() -> None:
    model = tiny_model("padded")
    projection = Projection(model, DIM)
    rows = []
    for tokens in (1, 24, 1000):
        found = {}
        problem = tiny_problem(model, batch_tokens=tokens)
        for part in prompt_sketches(problem, projection, problem.prompts):
            found.update(zip(zip(part.index, part.features, strict=True), part.values, strict=True))
        rows.append(found)
    for other in rows[1:]:
        assert other.keys() == rows[0].keys()
        for key, value in other.items():
            torch.testing.assert_close(value, rows[0][key], rtol=1e-9, atol=1e-11)


def test_another_seed_is_another_projection_and_the_same_seed_the_same() -> None:
    model = tiny_model("tied")
    assert Projection(model, DIM, 1).digest() == Projection(model, DIM, 1).digest()
    assert Projection(model, DIM, 1).digest() != Projection(model, DIM, 2).digest()


def test_a_size_that_does_not_fit_is_refused() -> None:
    with pytest.raises(UserError, match="multiple of 4"):
        Projection(tiny_model("tied"), 30)
