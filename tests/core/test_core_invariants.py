"""What holds for every attribution: order, batches, memory, signs, units, untouched weights."""

from __future__ import annotations

from dataclasses import replace
from functools import cache

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

import taught.estimators.adjoint as adjoint
import taught.estimators.every_prompt as pe
from reference import readings_of
from taught.core.example import sft
from taught.core.point import Point
from taught.core.target import TargetSet
from taught.errors import UserError
from taught.estimators.adjoint import feature_effects, target_effects
from taught.estimators.every_prompt import prompt_effects
from taught.estimators.finite_step import finite_steps
from taught.model.readout import read_prompts
from taught.policy.ridge import exact_shift, fit_policy, score
from taught.targets.policy import RawX
from tiny_models import (
    MODELS,
    PAIRS,
    POINT,
    plain_gradient,
    plain_loss,
    plain_read,
    plain_y,
    same,
    snapshot,
    tiny_behavior,
    tiny_examples,
    tiny_features,
    tiny_model,
    tiny_problem,
    tiny_prompts,
)

EXACT = {"rtol": 1e-9, "atol": 1e-13}


def policy_of(problem):
    read = read_prompts(problem.model, problem.prompts, problem.behavior, problem.point)
    X = problem.features(read.h, read.offsets)
    return fit_policy(
        X.numpy(),
        read.y.numpy(),
        prompt_ids=read.prompt_ids,
        feature_ids=problem.features.ids.tolist(),
        alpha=0.5,
        fit_intercept=True,
    )


def score_arrays(policy):
    return TargetSet.of(["score:x", "score:y"], readings_of(policy)).cotangents()


def all_effects(problem, examples=None) -> dict[str, torch.Tensor]:
    examples = tiny_examples() if examples is None else examples
    policy = policy_of(problem)
    effects, losses = target_effects(problem, examples, *score_arrays(policy))
    F = feature_effects(problem, examples, RawX(policy), torch.tensor(policy.X))
    return {"score": effects, "losses": losses, "F": F, "dy": prompt_effects(problem, examples)}


@cache
def usual_effects(name: str) -> dict[str, torch.Tensor]:
    return all_effects(tiny_problem(tiny_model(name)))


ROUTES = {
    "target_effects": lambda p, z: target_effects(p, z, *score_arrays(policy_of(p))),
    "feature_effects": lambda p, z: feature_effects(p, z, RawX(policy_of(p)), torch.tensor(policy_of(p).X)),
    "prompt_effects": prompt_effects,
}


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "change", [{"batch_tokens": 1}, {"batch_tokens": 10_000}, {"memory_gb": 1e-9}, {"memory_gb": 2e-5}], ids=str
)
def test_batches_and_memory_do_not_change_results(name: str, change: dict) -> None:
    reference, other = usual_effects(name), all_effects(replace(tiny_problem(tiny_model(name)), **change))
    for key, value in reference.items():
        assert value.abs().max() > 1e-8
        torch.testing.assert_close(other[key], value, **EXACT)


def test_a_small_memory_budget_is_taken_in_pieces(monkeypatch) -> None:
    problem = tiny_problem(tiny_model("tied"))
    sweeps = []
    real = adjoint.contract_examples
    monkeypatch.setattr(adjoint, "contract_examples", lambda *a: sweeps.append(1) or real(*a))
    ROUTES["feature_effects"](problem, tiny_examples())
    ROUTES["feature_effects"](replace(problem, memory_gb=1e-9), tiny_examples())
    assert len(sweeps) == 1 + 6  # five features and the extra target of the intercept


@pytest.mark.parametrize("share", [0.7, 0.3, 1e-6])
def test_prompt_effects_hold_no_more_than_the_budget(share: float, monkeypatch) -> None:
    held: list[int] = []
    chunks: list[list] = []  # what was traced for each chunk of examples and prompts
    meet, trace, last_block = pe._meet, pe.trace, pe.last_block

    def traced(*args, **kwargs):
        found = trace(*args, **kwargs)
        chunks[-1].append(found[2])
        return found

    def watched(*args):
        tensors = [t for one in chunks[-1] for t in (*one.inputs, one.grad, one.first)]
        held.append(sum(t.numel() * 8 for t in tensors))
        return last_block(*args)

    monkeypatch.setattr(pe, "_meet", lambda *args: chunks.append([]) or meet(*args))
    monkeypatch.setattr(pe, "trace", traced)
    monkeypatch.setattr(pe, "last_block", watched)
    problem = tiny_problem(tiny_model("tied"), batch_tokens=12)  # a batch an example
    whole = prompt_effects(problem, tiny_examples())
    assert len(chunks) == 1
    everything, budget = max(held), share * max(held) / adjoint.GB
    held.clear()
    chunks.clear()
    parts = prompt_effects(replace(problem, memory_gb=budget / pe._TRACES), tiny_examples())
    torch.testing.assert_close(parts, whole, **EXACT)
    assert len(chunks) > 1
    assert max(held) <= share * everything or share < 1e-3  # at least one batch a side


def test_blocks_that_are_not_a_chain_are_refused() -> None:
    problem = tiny_problem(tiny_model("tied"))
    first, _, last = problem.model.model.layers
    seen: list[torch.Tensor] = []
    first.register_forward_hook(lambda _m, _a, out: seen.append(out))
    real = last.forward

    def leaking(*args, leak, **kwargs):
        return real(*args, **kwargs) + 0.5 * leak.tanh()

    def hand_over(_module, args, kwargs):
        return args, {"leak": seen[-1], **kwargs}

    last.forward = leaking
    last.register_forward_pre_hook(hand_over, with_kwargs=True)
    with pytest.raises(UserError, match="not a chain"):
        prompt_effects(problem, tiny_examples())


def looped() -> torch.nn.Module:
    """A model that goes through its middle block twice."""
    model = tiny_model("tied")
    _, middle, last = model.model.layers

    def again(args, kwargs):
        return (middle(*args, **kwargs),), kwargs

    last.register_forward_pre_hook(lambda _m, args, kwargs: again(args, kwargs), with_kwargs=True)
    return model


def test_a_block_that_is_run_twice_is_refused_where_one_is_read_and_what_is_advised_works() -> None:
    model, examples = looped(), tiny_examples()
    prompts = tiny_prompts()
    with pytest.raises(UserError, match="more than once") as caught:
        read_prompts(model, prompts, tiny_behavior(), POINT)
    assert "a block that is not in the loop" in caught.value.fix
    outside = read_prompts(model, prompts, tiny_behavior(), Point(0))
    expected = torch.cat([plain_read(model, p.ids, 0)[0][list(p.read)] for p in prompts]).detach()
    torch.testing.assert_close(outside.h, expected)

    problem = tiny_problem(model, point=None, features=None)
    with pytest.raises(UserError, match="not a chain") as caught:
        prompt_effects(problem, examples)
    assert "attribution.targets=[score]" in caught.value.fix
    n = len(prompts)
    got = target_effects(problem, examples, None, torch.ones(1, n, dtype=torch.float64))[0][:, 0]
    y = plain_gradient(model, torch.stack([plain_y(model, p.ids) for p in prompts]).sum())
    losses = [plain_gradient(model, plain_loss(model, z)) for z in examples]
    expected = torch.stack([-1e-3 * sum((y[k] * g[k]).sum() for k in y) for g in losses])
    torch.testing.assert_close(got, expected, rtol=1e-9, atol=0)


def test_parameters_shared_between_blocks_are_refused() -> None:
    model = tiny_model("untied")
    model.model.layers[2].mlp = model.model.layers[0].mlp
    with pytest.raises(UserError, match="shared between blocks") as error:
        prompt_effects(tiny_problem(model), tiny_examples())
    assert "model.layers.0.mlp.down_proj.bias" in str(error.value)


@pytest.mark.parametrize("name", ["tied", "gpt2"])
def test_order_of_examples_and_of_prompts_does_not_matter(name: str) -> None:
    problem = tiny_problem(tiny_model(name), "jumprelu", "mean_user")
    reference = all_effects(problem)
    turn = [2, 0, 3, 1]
    turned = all_effects(problem, [tiny_examples()[i] for i in turn])
    for key in reference:
        torch.testing.assert_close(turned[key], reference[key][turn], **EXACT)
    shuffle = [4, 1, 5, 0, 2, 3]
    prompts = [problem.prompts[i] for i in shuffle]
    moved = all_effects(replace(problem, prompts=prompts))
    for key in ("score", "losses", "F"):
        torch.testing.assert_close(moved[key], reference[key], **EXACT)
    torch.testing.assert_close(moved["dy"], reference["dy"][:, shuffle], **EXACT)


def test_a_example_s_effect_does_not_depend_on_the_other_examples() -> None:
    problem = tiny_problem(tiny_model("padded"), batch_tokens=10_000)
    reference = all_effects(problem)
    for number, example in enumerate(tiny_examples()):
        alone = all_effects(problem, [example])
        for key in reference:
            torch.testing.assert_close(alone[key], reference[key][number : number + 1], **EXACT)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("route", ROUTES)
def test_attribution_leaves_the_model_as_it_was(name: str, route: str) -> None:
    problem = tiny_problem(tiny_model(name))
    problem.model.train()
    next(iter(problem.model.parameters())).requires_grad_(False)
    before = snapshot(problem.model)
    ROUTES[route](problem, tiny_examples())
    assert same(before, snapshot(problem.model))


@pytest.mark.parametrize("route", ROUTES)
@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_attribution_leaves_the_model_as_it_was_after_a_failure(route: str, error) -> None:
    class Fails:
        def advance(self, _count: int) -> None:
            raise error

    problem = tiny_problem(tiny_model("tied"))
    before = snapshot(problem.model)
    policy = policy_of(problem)
    run = {
        "target_effects": lambda: target_effects(problem, tiny_examples(), *score_arrays(policy), progress=Fails()),
        "feature_effects": lambda: feature_effects(
            problem, tiny_examples(), RawX(policy), torch.tensor(policy.X), progress=Fails()
        ),
        "prompt_effects": lambda: prompt_effects(problem, tiny_examples(), progress=Fails()),
    }
    with pytest.raises(error):
        run[route]()
    assert same(before, snapshot(problem.model))


@pytest.mark.parametrize("route", ROUTES)
def test_a_loss_that_is_not_finite_names_the_example_and_changes_nothing(route: str) -> None:
    problem = tiny_problem(tiny_model("untied"))
    with torch.no_grad():
        problem.model.model.embed_tokens.weight[21] = torch.inf  # only example z0 has this token
    before = snapshot(problem.model)
    with pytest.raises(UserError, match=r"not finite\n  value: \['z0'\]"):
        ROUTES[route](problem, tiny_examples())
    assert same(before, snapshot(problem.model))


@pytest.mark.parametrize("name", MODELS)
def test_training_on_a_example_moves_the_target_by_its_influence(name: str) -> None:
    # Sign and unit: one step of torch's own SGD, read by plain passes.
    lr = 1e-5
    problem = tiny_problem(tiny_model(name), lr=lr)
    policy = policy_of(problem)
    effects, _ = target_effects(problem, tiny_examples(), *score_arrays(policy))
    dy = prompt_effects(problem, tiny_examples())
    raised = []
    for number, example in enumerate(tiny_examples()):
        trained = tiny_model(name)
        plain_loss(trained, example).backward()
        torch.optim.SGD(trained.parameters(), lr=lr).step()
        with torch.no_grad():
            for i, prompt in enumerate(tiny_prompts()):
                change = float(plain_y(trained, prompt.ids) - plain_y(problem.model, prompt.ids))
                expected = float(dy[number, i])
                assert change == pytest.approx(expected, rel=0.02, abs=2e-3 * float(dy.abs().max()))
        read = read_prompts(trained, problem.prompts, problem.behavior, POINT)
        dX = problem.features(read.h, read.offsets).numpy() - policy.X
        S = float(score(policy, exact_shift(policy, dX, read.y.numpy() - policy.y)))
        assert pytest.approx(float(effects[number].sum()), rel=0.05) == S
        raised.append(S > 0)
    assert len(set(raised)) == 2 or name != "tied"  # both signs occur, so the sign is tested


def test_influence_is_linear_in_the_learning_rate() -> None:
    problem = tiny_problem(tiny_model("tied"))
    one, three = all_effects(problem), all_effects(replace(problem, lr=3 * problem.lr))
    for key in ("score", "F", "dy"):
        torch.testing.assert_close(three[key], 3 * one[key], **EXACT)
    assert torch.equal(one["losses"], three["losses"])


def test_training_on_a_prefix_raises_it_for_the_same_prompt() -> None:
    # The plainest sign there is: an example that answers prompt q0 with a prefix of the behavior.
    prompt = tiny_prompts()[0]
    example = sft("z", (*prompt.ids, 15, 16, 17), len(prompt.ids))
    dy = prompt_effects(tiny_problem(tiny_model("tied")), [example])
    assert dy[0, 0] > 0


def test_influence_sees_response_tokens_only() -> None:
    # With the loss on all tokens another number comes out.
    problem = tiny_problem(tiny_model("untied"), lr=1.0)
    ids, start = PAIRS[0]
    masked, whole = sft("a", ids, start), sft("b", ids, 1)
    dy = prompt_effects(problem, [masked, whole])
    y = [plain_y(problem.model, p.ids) for p in problem.prompts]
    for row, example in enumerate((masked, whole)):
        step = plain_gradient(problem.model, plain_loss(problem.model, example))
        for i, value in enumerate(y):
            grad = plain_gradient(problem.model, plain_y(problem.model, problem.prompts[i].ids))
            expected = -sum((step[n] * grad[n]).sum() for n in step)
            torch.testing.assert_close(dy[row, i], expected, rtol=1e-9, atol=1e-11)
            assert value.isfinite()
    assert (dy[0] - dy[1]).abs().max() > 0.1 * dy[0].abs().max()


def test_a_closed_gate_carries_no_effect() -> None:
    # With every gate closed only y can move, and X and its effects are exactly zero.
    features = tiny_features()
    closed = replace(features.sae, b_enc=features.sae.b_enc - 1e3)
    problem = tiny_problem(tiny_model("tied"), features=replace(features, sae=closed))
    A = torch.ones(1, 6, 5, dtype=torch.float64)
    effects, _ = target_effects(problem, tiny_examples(), A, torch.zeros(1, 6).double())
    assert not effects.any()
    read = read_prompts(problem.model, problem.prompts, problem.behavior, POINT)
    (step,) = finite_steps(problem, tiny_examples()[:1], read)
    assert not step.dX.any() and step.dy.any()


def test_the_proxy_and_the_true_encoder_give_different_effects() -> None:
    A, B = torch.ones(1, 6, 5, dtype=torch.float64), torch.zeros(1, 6, dtype=torch.float64)
    model = tiny_model("tied")
    found = [
        target_effects(tiny_problem(model, kind), tiny_examples(), A, B)[0]
        for kind in ("standard", "jumprelu", "topk", "relu")
    ]
    for other in found[:-1]:
        assert (other - found[-1]).abs().max() > 1e-3 * found[-1].abs().max()


def test_a_target_that_asks_for_nothing_is_zero() -> None:
    problem = tiny_problem(tiny_model("tied"))
    effects, losses = target_effects(
        problem, tiny_examples(), torch.zeros(2, 6, 5).double(), torch.zeros(2, 6).double()
    )
    assert effects.shape == (4, 2) and not effects.any() and losses.min() > 0


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_ranks_examples_as_double_precision_does(dtype: torch.dtype) -> None:
    """Sums are kept in float32; what remains is the rounding of the passes themselves."""
    problem = tiny_problem(tiny_model("tied"))
    sae = problem.features.sae.to(torch.device("cpu"), dtype)
    half = replace(problem, model=tiny_model("tied").to(dtype), features=replace(problem.features, sae=sae))
    policy = policy_of(problem)
    examples, score = tiny_examples(), score_arrays(policy)
    F, X = RawX(policy), torch.tensor(policy.X)
    for route in (
        lambda p: target_effects(p, examples, *score)[0],
        lambda p: feature_effects(p, examples, F, X),
        lambda p: prompt_effects(p, examples),
    ):
        exact, rough = route(problem).flatten(), route(half).flatten()
        assert torch.nn.functional.cosine_similarity(exact, rough, dim=0) > 0.99
        assert rough.dtype == torch.float64


@settings(max_examples=200)
@given(st.lists(st.floats(0.1, 9.0), min_size=1, max_size=30), st.floats(0.05, 60.0))
def test_chunks_are_as_few_as_the_budget_allows_and_even(needs: list[float], budget: float) -> None:
    chunks = pe._split(list(range(len(needs))), needs, budget)
    assert [i for items, _ in chunks for i in items] == list(range(len(needs)))
    loads, limit = [sum(part) for _, part in chunks], max(budget, *needs)
    assert all(load <= limit * (1 + 1e-9) for load in loads)
    greedy, used = 1, 0.0  # what no split into neighbours can undercut
    for need in needs:
        greedy, used = (greedy, used + need) if used + need <= limit else (greedy + 1, need)
    assert len(chunks) == greedy
    ends = [sum(needs[a:b]) for a in range(len(needs)) for b in range(a + 1, len(needs) + 1)]
    for smaller in ends:  # no lower limit does with as few
        if smaller < max(loads) * (1 - 1e-6) and smaller >= max(needs):
            count, used = 1, 0.0
            for need in needs:
                count, used = (count, used + need) if used + need <= smaller else (count + 1, need)
            assert count > len(chunks)
