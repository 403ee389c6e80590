"""Effects on what is read at any point: every estimator against plain autograd and real steps, text by text."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from torch import Tensor, nn

import taught.estimators.adjoint as adjoint
from families import EXAMPLES, LR, PROMPTS, gradient, loss_alone, model_of, y_alone
from taught.behaviors.prefixes import Prefixes
from taught.core.passes import settle_passes
from taught.core.point import Point
from taught.core.problem import Problem
from taught.core.query import build_queries
from taught.estimators.adjoint import feature_effects, target_effects
from taught.estimators.finite_step import finite_steps
from taught.estimators.forward import tangents
from taught.estimators.token_shares import token_effects
from taught.features.pooling import FeatureMap
from taught.model.forward import find_blocks
from taught.model.gradients import RowSparse, find_sites, frozen, mixes_examples
from taught.model.readout import ReadPrompt, read_prompts
from taught.sketches.fill import prompt_sketches
from taught.sketches.project import Projection
from tiny_models import Norm64, moved, tiny_sae

IDS = [0, 2, 3, 5]
# A family, a point, the module of the block whose output it is, and modules of that block that do not move it.
CASES = {
    "llama, attention": ("llama", "attn_out", "self_attn", ["mlp", "post_attention_layernorm"]),
    "llama, MLP": ("llama", "mlp_out", "mlp", []),
    "Gemma-2, attention behind its norm": (
        "gemma2",
        "attn_out",
        "post_attention_layernorm",
        ["mlp", "pre_feedforward_layernorm", "post_feedforward_layernorm"],
    ),
    "Gemma-2, MLP behind its norm": ("gemma2", "mlp_out", "post_feedforward_layernorm", []),
    "Gemma-2, MLP before its norm": ("gemma2", "mlp", "mlp", ["post_feedforward_layernorm"]),
    "side by side, MLP": ("falcon", "mlp_out", "mlp", ["self_attention"]),  # attention is added to it in place
    "plain passes, attention": ("gpt-neo", "attn_out", "attn", ["mlp", "ln_2"]),
}


@cache
def made(case: str) -> tuple[Problem, Tensor, Tensor]:
    """A problem, and by plain autograd dX of each example [P, N, d] and the gradients of each X [N, d, parameters]."""
    family, part, name, _ = CASES[case]
    model = model_of(family, fresh=True)
    for module in list(model.modules()):  # in the precision of their input, for differences of steps
        for child, norm in list(module.named_children()):
            if type(norm).__name__.endswith("RMSNorm"):
                setattr(module, child, Norm64(len(norm.weight)).double())
    behavior = Prefixes(("any",))
    settle_passes(model, PROMPTS, behavior, EXAMPLES)
    features = FeatureMap(tiny_sae(width=16), torch.tensor(IDS), "sae", "last_user")
    alone = mixes_examples(model, find_sites(model))
    problem = Problem(model, PROMPTS, behavior, LR, Point(1, part), features, batch_tokens=1 if alone else 1000)
    rows = torch.stack(
        [torch.stack([gradient(model, plain_X(model, name, p)[0, k]) for k in range(len(IDS))]) for p in PROMPTS]
    )
    steps = torch.stack([gradient(model, loss_alone(model, z)) for z in EXAMPLES])
    return problem, -LR * torch.einsum("zw,pkw->zpk", steps, rows), rows


def plain_X(model: nn.Module, name: str, prompt: ReadPrompt) -> Tensor:
    """Activations [1, d] at the prompt's token, by the formula of the SAE."""
    seen: list[Tensor] = []

    def keep(module, args, output):
        seen.append((output[0] if isinstance(output, tuple) else output).clone())

    handle = find_blocks(model)[1].get_submodule(name).register_forward_hook(keep)
    model(input_ids=torch.tensor([prompt.ids]), use_cache=False)
    handle.remove()
    sae = tiny_sae(width=16)
    return torch.relu((seen[0][0, list(prompt.read)] - sae.b_dec) @ sae.W_enc[:, IDS] + sae.b_enc[IDS])


def close(found: Tensor, expected: Tensor, rel: float = 1e-5) -> None:  # some softmax are in float32
    assert found.shape == expected.shape
    assert float((found - expected).norm() / expected.norm()) < rel


@pytest.mark.parametrize("case", CASES)
def test_the_adjoint_and_forward_mode_give_the_products_of_plain_gradients(case: str) -> None:
    problem, dX, _ = made(case)
    assert dX.abs().amax((0, 1)).gt(0).sum() > 1
    close(torch.stack([one.dX for one in tangents(problem, EXAMPLES)]), dX)

    gen = torch.Generator().manual_seed(3)
    A = torch.randn(2, len(PROMPTS), len(IDS), generator=gen, dtype=torch.float64)
    B = torch.randn(2, len(PROMPTS), generator=gen, dtype=torch.float64)
    moves = torch.stack([gradient(problem.model, y_alone(problem.model, prompt)) for prompt in PROMPTS])
    steps = torch.stack([gradient(problem.model, loss_alone(problem.model, z)) for z in EXAMPLES])
    of_x, of_y = torch.einsum("pnd,knd->pk", dX, A), -LR * steps @ moves.T @ B.T
    close(target_effects(problem, EXAMPLES, A, None)[0], of_x)
    for checkpointing in (False, True):
        asked = replace(problem, checkpointing=checkpointing)
        close(target_effects(asked, EXAMPLES, A, B)[0], of_x + of_y)
    shares = token_effects(problem, EXAMPLES, A[:1], B[:1])
    close(torch.stack([share.sum() for share in shares]), (of_x + of_y)[:, 0])


@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("room", [1.0, 0.0])
def test_effects_on_features_go_through_all_of_the_block_that_is_read(case: str, room: float, monkeypatch) -> None:
    problem, dX, _ = made(case)
    X = problem.features(*reads(problem)).detach()
    A = [torch.zeros(len(PROMPTS), len(IDS)).double().index_fill_(1, torch.tensor([k]), 1) for k in range(len(IDS))]
    monkeypatch.setattr(adjoint, "_ABOVE", room)
    monkeypatch.setattr(adjoint, "x_queries_at_once", lambda *_: 3)  # two chunks
    close(feature_effects(problem, EXAMPLES, A, X), dX.sum(1))


def reads(problem: Problem) -> tuple[Tensor, Tensor]:
    found = read_prompts(problem.model, PROMPTS, problem.behavior, problem.point)
    return found.h, found.offsets


@pytest.mark.parametrize("case", CASES)
def test_only_parameters_before_the_point_move_it(case: str) -> None:
    problem, _, rows = made(case)
    sites = find_sites(problem.model)
    with frozen(problem.model):
        queries = build_queries(problem, sites, torch.ones(1, len(PROMPTS), len(IDS)).double(), None)
    names = [name for name, _ in problem.model.named_parameters()]
    parts = rows.sum((0, 1)).split([p.numel() for p in problem.model.parameters()])
    moving = {name for name, part in zip(names, parts, strict=True) if part.any()}
    asked = {n: query.values if isinstance(query, RowSparse) else query for n, query in queries.items()}
    assert {name for name, query in asked.items() if query.any()} == moving
    block = find_blocks(problem.model)[1]
    still = {id(p) for name in CASES[case][3] for p in block.get_submodule(name).parameters()}
    own = {name: p for name, p in problem.model.named_parameters() if id(p) in {id(q) for q in block.parameters()}}
    assert {name for name, p in own.items() if id(p) in still} == own.keys() - moving


@pytest.mark.parametrize("case", CASES)
def test_real_steps_tend_to_the_derivative(case: str) -> None:
    problem, dX, _ = made(case)
    small = replace(problem, lr=1e-5)
    before = read_prompts(problem.model, PROMPTS, problem.behavior, problem.point)
    steps = list(finite_steps(small, EXAMPLES, before))
    close(torch.stack([step.dX for step in steps]) / small.lr, dX / LR, 1e-2)
    close(torch.stack([step.dX_exact for step in steps]) / small.lr, dX / LR, 1e-2)

    # The reference itself: central differences of plain passes along one example's step.
    model, name = problem.model, CASES[case][2]
    parts = gradient(model, loss_alone(model, EXAMPLES[0])).split([p.numel() for p in model.parameters()])
    step = {n: part.view_as(p) for (n, p), part in zip(model.named_parameters(), parts, strict=True)}
    sides = []
    for sign in (1, -1):
        with torch.no_grad(), moved(model, step, sign * 3e-5):
            sides.append(torch.cat([plain_X(model, name, prompt) for prompt in PROMPTS]))
    close((sides[1] - sides[0]) / 6e-5, dX[0] / LR, 2e-3)


@pytest.mark.parametrize("case", CASES)
def test_sketches_of_features_are_those_of_plain_gradients(case: str) -> None:
    problem, _, rows = made(case)
    model = problem.model
    projection = Projection(model, 128)
    sizes = [p.numel() for p in model.parameters()]
    for part in prompt_sketches(problem, projection, PROMPTS):
        for row, (prompt, feature) in enumerate(zip(part.index, part.features, strict=True)):
            if feature < 0:
                continue
            parts = rows[prompt, feature].split(sizes)
            whole = {n: g.view(1, *p.shape) for (n, p), g in zip(model.named_parameters(), parts, strict=True)}
            close(part.values[row], projection.matrices(whole, 1)[0])
