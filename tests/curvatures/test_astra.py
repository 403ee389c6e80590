"""ASTRA against the dense damped Gauss-Newton matrix, by plain autograd, float64."""

from __future__ import annotations

from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from reference import close
from taught.core import driver
from taught.core.driver import Method
from taught.core.estimator import Work
from taught.core.example import Example, sft
from taught.core.problem import Problem
from taught.core.query import build_queries
from taught.core.readings import Readings
from taught.core.registry import Choice
from taught.core.scores import Scores
from taught.core.target import TargetSet
from taught.curvatures.astra import Astra, Iteration
from taught.curvatures.ekfac import fit_ekfac
from taught.errors import UserError
from taught.estimators.adjoint import target_effects
from taught.estimators.cost import Asked, attribution_cost
from taught.model.gradients import find_sites, frozen
from taught.run.folder import RunFolder
from taught.stages.attribute import attribute
from taught.stages.readings import readings
from taught.study.load import load_study
from tiny_models import (
    VOCAB,
    plain_gradient,
    plain_loss,
    same,
    snapshot,
    tiny_examples,
    tiny_model,
    tiny_preferences,
    tiny_problem,
    tiny_prompts,
)
from tiny_study import write_tiny_study

FULL = 1000  # more than there are examples: no batch is drawn
CONVERGED = {"steps": 60, "batch": FULL, "momentum": 0.6, "damping": 2.0}


class TwoLayers(nn.Module):
    """A language model with two layers that have to do with one another, which reads every token apart."""

    def __init__(self) -> None:
        super().__init__()
        draw = torch.Generator().manual_seed(1)
        self.config = type("Config", (), {"num_hidden_layers": 2})()
        self.embed = nn.Embedding(VOCAB, 5).double()
        self.blocks = nn.ModuleList([nn.Linear(5, 4, bias=False).double(), nn.Linear(4, 4, bias=False).double()])
        self.head = nn.Linear(4, VOCAB, bias=False).double()
        with torch.no_grad():
            for p in self.parameters():
                p.copy_(0.7 * torch.randn(p.shape, generator=draw, dtype=p.dtype))

    def forward(self, input_ids: Tensor, **_: object):
        h = torch.tanh(self.blocks[0](self.embed(input_ids)))
        return type("Out", (), {"logits": self.head(h + self.blocks[1](h))})


@cache
def small() -> Problem:
    return replace(tiny_problem(tiny_model("tied")), model=TwoLayers(), features=None, point=None, batch_tokens=400)


@cache
def texts(count: int = 16) -> list[Example]:
    draw = np.random.default_rng(3)
    return [sft(f"e{i}", tuple(draw.integers(VOCAB, size=6).tolist()), 2 + i % 3) for i in range(count)]


class Notes:
    """What was said."""

    def __init__(self) -> None:
        self.said: list[str] = []

    def step(self, name: str, total: int | None = None) -> None: ...

    def advance(self, n: int = 1) -> None: ...

    def note(self, text: str) -> None:
        self.said.append(text)


def iteration(problem: Problem, examples: list[Example], **settings: Any) -> Iteration:
    made = Astra(**settings).fit(problem, examples, Work()).jointly
    assert isinstance(made, Iteration)
    return made


def dense(problem: Problem, examples: list[Example], damping: float) -> Tensor:
    """H + D by autograd, one output and one sequence at a time; D from EK-FAC's eigenvalues."""
    model, layers = problem.model, fit_ekfac(problem, examples)
    weights = [model.get_parameter(name) for name in layers.eigenvalues]

    def row(value: Tensor) -> Tensor:
        return torch.cat([g.flatten() for g in torch.autograd.grad(value, weights, retain_graph=True)])

    total: Any = 0.0
    for example in examples:
        logits = [model(input_ids=torch.tensor([ids])).logits[0] for ids in example.sequences]
        if example.link is not None:
            logp = [torch.log_softmax(of, -1) for of in logits]
            s = -sum(
                w * logp[k][t - 1, example.sequences[k][t]] for k, t in example.scored if (w := example.weights[k][t])
            )
            up = torch.sigmoid(example.link.beta * (s.detach() + example.link.reference))
            g = row(s)
            total = total + example.link.beta**2 * up * (1 - up) * torch.outer(g, g)
            continue
        for _, t in example.scored:
            at = logits[0][t - 1]
            p = torch.softmax(at.detach(), -1)
            J = torch.stack([row(v) for v in at])
            total = total + example.weights[0][t] * J.T @ (torch.diag(p) - torch.outer(p, p)) @ J
    added = [damping * v.mean() * torch.ones(v.numel(), dtype=v.dtype) for v in layers.eigenvalues.values()]
    return total / len(examples) + torch.diag(torch.cat(added))


def flat(x: dict[str, Tensor], names: Any) -> Tensor:
    return torch.cat([x[name].flatten() for name in names])


def drawn(made: Iteration, seed: int = 0) -> dict[str, Tensor]:
    draw = torch.Generator().manual_seed(seed)
    model = made.system.problem.model
    return {n: torch.randn(model.get_parameter(n).shape, generator=draw).double() for n in made.system.damping}


def solved(made: Iteration, q: dict[str, Tensor]) -> Tensor:
    with frozen(made.system.problem.model):
        return flat(made.solve(q)[0], made.system.damping)


# The matrix


@pytest.mark.parametrize("name", ["untied", "gpt2"])
def test_a_product_is_that_of_the_dense_gauss_newton_matrix(name: str) -> None:
    examples = [*tiny_examples()[1:3], *tiny_preferences()[1:]]
    layers = {
        "untied": ("*layers.1.mlp.up*", "*layers.2.self_attn.v*"),
        "gpt2": ("*h.1.mlp.c_fc*", "*h.2.attn.c_proj*"),
    }
    problem = tiny_problem(tiny_model(name), parameters=layers[name])
    before = snapshot(problem.model)
    made = iteration(problem, examples, batch=FULL, rate=1.0)
    x = drawn(made)
    with frozen(problem.model):
        found = made.system.product(x, range(len(examples)))
    names = list(made.system.damping)
    close(flat(found, names), dense(problem, examples, 0.1) @ flat(x, names), 1e-9)
    assert same(before, snapshot(problem.model))


# The solution


@pytest.mark.parametrize("kind", ["sft", "preference", "both"])
def test_full_convergence_is_the_damped_gauss_newton_solution(kind: str) -> None:
    pairs = tiny_preferences()
    examples = {"sft": texts(12), "preference": pairs, "both": [*texts(6), *pairs]}[kind]
    made = iteration(small(), examples, **CONVERGED)
    q = drawn(made)
    exact = torch.linalg.solve(dense(small(), examples, 2.0), flat(q, q))
    close(solved(made, q), exact, 1e-6)


def test_fewer_steps_are_nearer_than_ekfac_alone() -> None:
    """In the norm that the iteration makes small."""
    made = iteration(small(), texts(), batch=8, steps=60)
    q = drawn(made)
    A = dense(small(), texts(), made.settings.damping)
    exact = torch.linalg.solve(A, flat(q, q))

    def off(x: Tensor) -> float:
        return float(((x - exact) @ A @ (x - exact) / (exact @ A @ exact)) ** 0.5)

    some = solved(replace(made, settings=replace(made.settings, steps=15)), q)
    alone = off(flat(made.system.divided(q), q))
    assert off(solved(made, q)) < off(some) < alone and off(solved(made, q)) < alone / 2


def test_the_order_of_the_examples_and_their_batches_do_not_matter() -> None:
    one = iteration(small(), texts(), batch=8, steps=5)
    other = iteration(replace(small(), batch_tokens=12), texts()[::-1], batch=8, steps=5)
    assert one.rate == pytest.approx(other.rate, rel=1e-6)
    close(solved(other, drawn(one)), solved(one, drawn(one)), 1e-6)


def test_the_residual_is_measured_and_said() -> None:
    notes = Notes()
    made = Astra(**CONVERGED | {"steps": 20}).fit(small(), texts(12), Work(notes)).jointly
    queries = {name: torch.stack([of, 2 * of]) for name, of in drawn(made).items()}
    with frozen(small().model):
        _, before, after = made.solve(drawn(made))
        made(queries)
    assert before > 0.01 and after < 1e-2
    assert f"from {before:.2g}, EK-FAC's, to {after:.2g} in 20 steps, at most, of 2 targets" in notes.said[-1]


def test_a_query_that_is_zero_stays_zero_and_missing_layers_are_there_afterwards() -> None:
    made = iteration(small(), texts(12), **CONVERGED)
    first, second = made.system.damping
    q = drawn(made)
    queries = {first: torch.stack([q[first], torch.zeros_like(q[first])])}
    with frozen(small().model):
        made(queries)
    alone = solved(made, {first: q[first], second: torch.zeros_like(q[second])})
    close(torch.cat([queries[first][0].flatten(), queries[second][0].flatten()]), alone)
    assert not queries[first][1].any() and not queries[second][1].any() and queries[second][0].any()


@pytest.mark.parametrize("batch", [FULL, 8])
def test_a_rate_that_diverges_is_an_error_and_its_fix_works(batch: int) -> None:
    made = iteration(small(), texts(), batch=batch, rate=50.0, steps=30)
    with pytest.raises(UserError, match=r"diverges(.|\n)*attribution\.curvature\.rate=null"):
        solved(made, drawn(made))
    measured = iteration(small(), texts(), batch=batch, rate=None, steps=30)
    assert solved(measured, drawn(measured)).isfinite().all()


# The estimators


@cache
def problem_of(name: str = "untied") -> Problem:
    return tiny_problem(tiny_model(name), parameters=("*layers.0.mlp.up*", "*layers.2.mlp.up*"), batch_tokens=100)


def test_the_adjoint_contracts_gradients_with_the_solution() -> None:
    """Of a target of X alone, whose solution reaches layers that X does not."""
    settings = {**CONVERGED, "damping": 100.0, "steps": 24, "momentum": 0.3}
    problem = problem_of().within(Astra(**settings).fit(problem_of(), tiny_examples(), Work()))
    model, names = problem.model, list(problem.parameters)
    A = torch.zeros(1, 6, 5).double()
    A[0, :, 2] = 1.0
    with frozen(model):
        plain = build_queries(problem_of(), find_sites(model, names), A, None)
    zero = {name: torch.zeros(1, *model.get_parameter(name).shape).double() for name in names}
    queries = torch.cat([of.flatten(1) for of in (zero | plain).values()], 1)
    assert not (zero | plain)[next(name for name in names if ".2." in name)][0].any()
    exact = torch.linalg.solve(dense(problem_of(), tiny_examples(), 100.0), queries.T)
    gradients = [plain_gradient(model, plain_loss(model, example)) for example in tiny_examples()]
    effects, _ = target_effects(problem, tiny_examples(), A, None)
    close(effects, -problem.lr * torch.stack([flat(g, names) for g in gradients]) @ exact, 1e-5)


def scored(estimator: Choice, targets: list[str], folder: Path | None = None) -> Scores:
    read = Readings(tuple(p.id for p in tiny_prompts()), np.zeros(6), {"a": ("q0", "q1", "q2")})
    method = Method(estimator, Choice("astra", {"steps": 1, "batch": 2, "rate": 0.002}))
    return driver.scores(problem_of(), tiny_examples(), TargetSet.of(targets, read), method, Work(folder=folder))


def test_sketches_of_the_solution_are_the_adjoints_within_their_error(tmp_path: Path) -> None:
    exact = scored(Choice("adjoint"), ["behavior:a", "prompt:*"])
    found = scored(Choice("sketch", {"dim": 4096}), ["behavior:a"], tmp_path)
    assert (exact.method, found.method) == ("adjoint+astra", "sketch+astra")
    assert "dy" not in exact.details
    assert (np.abs(found.values - exact.values) < 4 * found.se).all()
    for one in found.details["sample"]:  # solved for again: the same numbers
        assert one["exact"] == pytest.approx(exact.by_example("behavior:a")[one["example_id"]], rel=1e-9)


@pytest.mark.parametrize("estimator", ["forward", "finite-step"])
def test_what_divides_every_examples_gradient_is_refused(estimator: str) -> None:
    with pytest.raises(UserError, match=r"solved for targets(.|\n)*estimator=adjoint"):
        scored(Choice(estimator), ["behavior:a"])


def test_steps_targets_and_batches_are_announced() -> None:
    problem = problem_of()

    def cost(queries: int, **settings: Any) -> float:
        method = Method(Choice("adjoint"), Choice("astra", settings))
        return attribution_cost(problem, tiny_examples(), Asked(0, queries, False, 2), method)["iteration"]

    base = cost(1, steps=10, batch=2)
    assert cost(3, steps=10, batch=2) > 2 * base
    assert cost(1, steps=10, batch=4) > 1.5 * base
    assert cost(1, steps=40, batch=2) > 2 * base


def test_a_run_has_no_real_step_in_it_and_shares_of_tokens(tmp_path: Path) -> None:
    study = load_study(write_tiny_study(tmp_path))
    changes = {"sae.path": None, "prompts.positive_group": None, "prompts.negative_group": None, "prompts.limit": 2}
    changes |= {"examples.limit": 2, "attribution.exact_top": 1, "attribution.parameters": ["*layers.2.mlp.up*"]}
    changes |= {"attribution.curvature": {"kind": "astra", "steps": 1, "batch": 1, "rate": 0.01}}
    for key, value in changes.items():
        study = study.replace(key, value)
    run = RunFolder(tmp_path / "run")
    for stage in (readings, attribute):
        stage(study, run)
    rows = run.read_table("summary").to_pylist()
    shares = run.read_table("token_shares").to_pylist()
    assert all(row["step_score"] is None for row in rows)
    top = {row["example_id"]: row["behavior:harmful"] for row in rows if row["rank"] == 1}
    for example_id, value in top.items():
        own = [r["share"] for r in shares if (r["example_id"], r["target"]) == (example_id, "behavior:harmful")]
        assert sum(own) == pytest.approx(value, rel=1e-3)
