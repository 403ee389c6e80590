"""The adjoint against forward mode and central differences, both over plain, unpadded passes."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from reference import GROUPS, LR, close, differences, forward_mode, model_of, naive_X, policy_of, readings_of
from taught.core import query
from taught.core.estimator import Work
from taught.core.example import batch_indices
from taught.core.query import build_queries
from taught.core.target import TargetSet
from taught.errors import UserError
from taught.estimators.adjoint import Adjoint, feature_effects, target_effects
from taught.estimators.forward import tangents
from taught.features.pooling import POSITIONS
from taught.model.forward import find_blocks
from taught.model.gradients import RowSparse
from taught.policy.ridge import coefficient_shift, score
from tiny_models import ENCODERS, MODELS, plain_loss, same, snapshot, tiny_examples, tiny_model, tiny_problem

ASKED = ["score:x", "score:y", "coefficient:3:x", "coefficient:3:y", "behavior:a", "behavior:b"]


def check(name: str, kind: str, position: str, intercept: bool, reference, **options) -> None:
    """Every number the adjoint gives for every example against one reference route."""
    policy = policy_of(name, kind, position, intercept)
    readings = readings_of(policy)
    problem = tiny_problem(model_of(name), kind, position, lr=LR, **options)
    examples = tiny_examples()
    few = TargetSet.of(ASKED, readings)
    every = TargetSet.of([*ASKED, "coefficient:*", "prompt:*"], readings)
    by_queries = Adjoint().estimate(problem, examples, few, Work())
    from_basis = Adjoint().estimate(problem, examples, every, Work())
    dy = from_basis.details["dy"]
    for number in range(len(examples)):
        (h, _), (dh, dy_ref) = reference(name, number)
        dX_ref = naive_X(h, kind, position, dh).numpy()
        exact = coefficient_shift(policy, dX_ref, dy_ref.numpy())
        close(dy[number], dy_ref)
        ids = policy.feature_ids.tolist()
        for suffix, shift in ((":x", exact.x), (":y", exact.y), ("", exact.total)):
            close([from_basis[f"coefficient:{k}{suffix}"][number] for k in ids], shift)
        close(by_queries.values[number], few.changes(dX_ref, dy_ref.numpy()))
        close(by_queries.values[number, :2].sum(), score(policy, exact.total))
    # The same question asked in two ways gives one answer.
    close(from_basis.select(ASKED).values, by_queries.values)
    for group in ("a", "b"):
        inside = [i for i, g in enumerate(GROUPS) if g == group]
        close(dy[:, inside].mean(1), by_queries[f"behavior:{group}"])


@pytest.mark.parametrize("kind", ENCODERS)
@pytest.mark.parametrize("position", POSITIONS)
def test_adjoint_is_the_forward_mode_derivative(kind: str, position: str) -> None:
    check("tied", kind, position, POSITIONS.index(position) % 2 == 0, forward_mode)


@pytest.mark.parametrize("kind", ENCODERS)
def test_both_intercept_settings_agree_with_forward_mode(kind: str) -> None:
    check("tied", kind, "mean_user", True, forward_mode)
    check("tied", kind, "last_user", False, forward_mode)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("intercept", [False, True])
def test_adjoint_is_the_forward_mode_derivative_in_every_model(name: str, intercept: bool) -> None:
    check(name, "jumprelu", "max_user", intercept, forward_mode)


@pytest.mark.parametrize("name", MODELS)
def test_adjoint_is_the_central_difference(name: str) -> None:
    check(name, "standard", "last_user", True, differences)
    # In pieces of one parameter, on one model of each architecture: test_core_invariants does it on every one.
    pieces = {"memory_gb": 1e-6} if name in ("padded", "gpt2") else {}
    check(name, "relu", "mean_user", False, differences, **pieces)


@pytest.mark.parametrize("name", MODELS)
def test_a_query_beyond_the_memory_is_built_and_met_part_by_part(name: str, monkeypatch) -> None:
    import taught.estimators.adjoint as adjoint

    def watched(*given):
        queries = build_queries(*given)
        dense = (q.values if isinstance(q, RowSparse) else q for q in queries.values())
        held.append({name: q.numel() for name, q in zip(queries, dense, strict=True)})
        return queries

    held: list[dict[str, int]] = []
    monkeypatch.setattr(adjoint, "build_queries", watched)
    problem = tiny_problem(tiny_model(name), lr=LR)
    gen = torch.Generator().manual_seed(0)
    A, B = torch.randn(2, 6, 5, generator=gen).double(), torch.randn(2, 6, generator=gen).double()
    whole, losses = target_effects(problem, tiny_examples(), A, B)
    (everything,) = held
    held.clear()
    room = sum(everything.values()) // 6  # a third of one of the two
    parts = replace(problem, memory_gb=room * 8 / query._SHARE / query.GB)
    again, same_losses = target_effects(parts, tiny_examples(), A, B)
    torch.testing.assert_close(again, whole, rtol=1e-10, atol=1e-14)
    torch.testing.assert_close(same_losses, losses, rtol=0, atol=0)
    assert len(held) >= 6
    assert all(len(part) == 1 or sum(part.values()) <= room for part in held)
    assert sum(len(part) for part in held) == 2 * len(everything)  # each parameter of each target once


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("kind", ENCODERS)
def test_forward_mode_gives_every_feature_on_every_prompt(name: str, kind: str) -> None:
    position = POSITIONS[ENCODERS.index(kind)]
    problem = tiny_problem(model_of(name), kind, position, lr=LR)
    for number, found in enumerate(tangents(problem, tiny_examples())):
        (h, _), (dh, dy) = forward_mode(name, number)
        close(found.dX, naive_X(h, kind, position, dh))
        close(found.dy, dy)
        assert found.example_id == tiny_examples()[number].id
        close(found.loss, plain_loss(model_of(name), tiny_examples()[number]).detach())


def test_forward_mode_leaves_the_model_as_it_was() -> None:
    model = tiny_model("tied")
    before = snapshot(model)
    list(tangents(tiny_problem(model), tiny_examples()))
    assert same(before, snapshot(model))


@pytest.mark.parametrize("name", MODELS)
def test_checkpointing_changes_nothing_but_the_memory(name: str) -> None:
    from taught.sketches.fill import example_sketches
    from taught.sketches.project import Projection

    model = tiny_model(name)
    problem = tiny_problem(model)
    before = snapshot(model)
    n, d = len(problem.prompts), 5
    gen = torch.Generator().manual_seed(0)
    A = torch.randn(2, n, d, dtype=torch.float64, generator=gen)
    B = torch.randn(2, n, dtype=torch.float64, generator=gen)
    again = replace(problem, checkpointing=True)
    for found, wanted in (
        (target_effects(again, tiny_examples(), A, B), target_effects(problem, tiny_examples(), A, B)),
        (
            [part.values for part in example_sketches(again, Projection(model, 4096), tiny_examples())],
            [part.values for part in example_sketches(problem, Projection(model, 4096), tiny_examples())],
        ),
    ):
        for a, b in zip(found, wanted, strict=True):
            torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-14)
    assert same(before, snapshot(model))


def test_checkpointing_of_a_subset_runs_only_what_moves() -> None:
    model = tiny_model("tied")
    parts = ("model.layers.2.*", "model.norm.*")
    problem = tiny_problem(model, parameters=parts)
    n = len(problem.prompts)
    A, B = torch.zeros(1, n, 5, dtype=torch.float64), torch.ones(1, n, dtype=torch.float64)
    wanted, _ = target_effects(problem, tiny_examples(), A, B)
    calls = []
    handle = model.model.layers[0].register_forward_hook(lambda *_: calls.append(1))
    found, _ = target_effects(replace(problem, checkpointing=True), tiny_examples(), A, B)
    handle.remove()
    torch.testing.assert_close(found, wanted, rtol=1e-10, atol=1e-14)
    assert calls


def test_checkpointing_refuses_blocks_that_are_not_a_chain() -> None:
    model = tiny_model("untied")
    kept = []
    model.model.layers[0].register_forward_hook(lambda _m, _a, out: kept.append(out))

    def also(_module, _args, out):  # the last block takes the first one's output by another way
        return out + kept[-1]

    model.model.layers[2].register_forward_hook(also)
    problem = tiny_problem(model, checkpointing=True)
    n = len(problem.prompts)
    A, B = torch.zeros(1, n, 5, dtype=torch.float64), torch.ones(1, n, dtype=torch.float64)
    with pytest.raises(UserError, match="not a chain"):
        target_effects(problem, tiny_examples(), A, B)


@pytest.mark.parametrize("room", [1.0, 0.0])
@pytest.mark.parametrize("name", MODELS)
def test_what_is_above_the_block_is_gone_through_once(name: str, room: float, monkeypatch) -> None:
    import taught.estimators.adjoint as adjoint

    model = tiny_model(name)
    problem = tiny_problem(model)
    n, d = len(problem.prompts), 5
    A = list(torch.randn(5, n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(0)))
    X = torch.ones(n, d)
    wanted, _ = target_effects(problem, tiny_examples(), torch.stack(A), torch.zeros(5, n).double())
    monkeypatch.setattr(adjoint, "_ABOVE", room)
    monkeypatch.setattr(adjoint, "x_queries_at_once", lambda *_: 2)  # three chunks
    blocks = find_blocks(model)
    calls: list[int] = []
    blocks[-1].register_forward_hook(lambda *_: calls.append(1))
    found = feature_effects(problem, tiny_examples(), A, X)
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-14)
    batches = len(batch_indices(tiny_examples(), problem.batch_tokens))
    assert len(calls) == batches * (1 if room else 3)
