"""Every estimator in every curvature along trajectories: one number for each example and target."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from reference import GROUPS, LR, close, policy_of, readings_of
from taught.core import driver
from taught.core.driver import Method
from taught.core.estimator import Work
from taught.core.problem import Problem
from taught.core.readings import Readings
from taught.core.registry import CURVATURES, TRAJECTORIES, Choice
from taught.core.scores import Scores
from taught.core.target import TargetSet
from taught.core.trajectory import Leg
from taught.errors import UserError
from taught.estimators import adjoint
from taught.features.concept import Concept, concept_map
from taught.trajectories.checkpoints import Checkpoint
from tiny_models import (
    POINT,
    WIDTH,
    plain_gradient,
    plain_loss,
    plain_y,
    same,
    snapshot,
    tiny_examples,
    tiny_model,
    tiny_problem,
    tiny_prompts,
)

CURVED = {"identity": Choice("identity"), "adam": Choice("adam", {"eps": 1e-2}), "ekfac": Choice("ekfac")}
ASKED = {
    "features": [
        "score",
        "coefficient:3",
        "coefficient:0:x - score:y",
        "behavior",
        "behavior:a",
        "behavior:a - behavior:b",
        "behavior:a - score",
        "prompt:q1",
    ],
    "concepts": ["concept:*", "concept:u - concept:v", "behavior:a - concept:u", "behavior:b"],
    "nothing": ["behavior", "behavior:a", "behavior:b", "prompt:q4 - behavior:a"],
}
curvatures = pytest.mark.parametrize("curvature", CURVED)
reads = pytest.mark.parametrize("what", ASKED)
IDS = [example.id for example in tiny_examples()]


@cache
def readings() -> Readings:
    return readings_of(policy_of("untied", "jumprelu", "mean_user", True))


@cache
def setting(what: str, *, lr: float = LR) -> tuple[Problem, Readings]:
    """A problem that reads features, concepts, or nothing but the behavior, and its readings."""
    model = tiny_model("untied")
    plain_loss(model, tiny_examples()[0])  # transformers leaves its own hooks at the first pass
    if what == "features":
        return tiny_problem(model, "jumprelu", "mean_user", lr=lr), readings()
    bare = replace(readings(), X=None, columns=(), policy=None)
    if what == "nothing":
        return tiny_problem(model, lr=lr, point=None, features=None), bare
    draw = np.random.default_rng(0)
    concepts = [Concept(name, draw.normal(size=WIDTH), POINT, "mean_user") for name in "uv"]
    features = concept_map(concepts, "mean_user", next(model.parameters()))
    problem = tiny_problem(model, features=features, prompts=tiny_prompts("mean_user"), lr=lr)
    return problem, replace(bare, X=np.zeros((bare.n, 2)), columns=("u", "v"))


def found(what: str, method: Method, work: Work | None = None, *, lr: float = LR, wanted: Any = None) -> Scores:
    problem, read = setting(what, lr=lr)
    targets = TargetSet.of(ASKED[what] if wanted is None else wanted, read)
    return driver.scores(problem, tiny_examples(), targets, method, work or Work())


@cache
def exact(what: str, curvature: str, lr: float = LR) -> Scores:
    return found(what, Method(Choice("adjoint"), CURVED[curvature]), lr=lr)


def alike(ours: Scores, other: Scores, relative: float = 1e-6) -> None:
    """Target by target, each in its own size."""
    assert ours.targets == other.targets and list(ours.example_ids) == list(other.example_ids) == IDS
    for name in ours.targets:
        close(ours[name], other[name], relative)


# The parts vary independently


@reads
@curvatures
def test_forward_mode_and_the_adjoint_are_the_same_derivative(what: str, curvature: str) -> None:
    forward = found(what, Method(Choice("forward"), CURVED[curvature]))
    alike(exact(what, curvature), forward)
    suffix = "" if curvature == "identity" else f"+{curvature}"
    assert (exact(what, curvature).method, forward.method) == (f"adjoint{suffix}", f"forward{suffix}")
    for scores in (forward, exact(what, curvature)):
        for loss, example in zip(scores.losses, tiny_examples(), strict=True):
            close(loss, plain_loss(tiny_model("untied"), example).detach(), 1e-12)


@curvatures
@pytest.mark.parametrize("what, wanted", [("features", ["coefficient:*", "behavior:*"]), ("nothing", ["behavior"])])
def test_every_coefficient_and_prompt_at_once_are_those_asked_for_alone(what: str, wanted, curvature: str) -> None:
    method = Method(Choice("adjoint"), CURVED[curvature])
    every = found(what, method, wanted=[*ASKED[what], *wanted, "prompt:*"])
    alike(every.select(exact(what, curvature).targets), exact(what, curvature))
    forward = found(what, replace(method, estimator=Choice("forward")), wanted=wanted)
    alike(every.select(forward.targets), forward)
    close(every.details["dy"], forward.details["dy"])
    for group in "ab":
        inside = [i for i, own in enumerate(GROUPS) if own == group]
        close(every.details["dy"][:, inside].mean(1), every[f"behavior:{group}"])


@reads
@curvatures
def test_a_finite_step_tends_to_the_derivative(what: str, curvature: str) -> None:
    errors, step = [], Method(Choice("finite-step"), CURVED[curvature])
    for lr in (2e-6, 1e-6):
        linear, real = exact(what, curvature, lr), found(what, step, lr=lr)
        alike(real, linear, 1e-2)
        errors.append(np.abs(real.values - linear.values).max(0) / lr)
    np.testing.assert_allclose(errors[0] / errors[1], 2, rtol=0.1)


@reads
@curvatures
def test_sketches_are_within_their_standard_errors(what: str, curvature: str, tmp_path_factory) -> None:
    folder = tmp_path_factory.getbasetemp() / f"sketches-{what}"  # one store: the examples' sketches are plain
    sketch = Choice("sketch", {"dim": 4096})
    ours, linear = found(what, Method(sketch, CURVED[curvature]), Work(folder=folder)), exact(what, curvature)
    assert ours.targets == linear.targets
    errors = (ours.values - linear.values) / ours.se
    assert np.abs(errors).max() < 5
    assert 0.3 < np.sqrt(np.mean(errors**2)) < 2  # and not much smaller
    np.testing.assert_allclose(ours.losses, linear.losses, rtol=1e-12)


@curvatures
@pytest.mark.parametrize("estimator", ["adjoint", "forward", "finite-step", "sketch"])
def test_order_and_batches_do_not_matter_and_the_model_is_left_as_it_was(
    estimator: str, curvature: str, tmp_path: Path
) -> None:
    problem, read = setting("features")
    targets = TargetSet.of(ASKED["features"], read)
    kind = Choice(estimator, {"dim": 64} if estimator == "sketch" else {})
    method, turn = Method(kind, Choice(curvature)), [2, 0, 3, 1]
    before = snapshot(problem.model)
    first = driver.scores(problem, tiny_examples(), targets, method, Work(folder=tmp_path / "a"))
    assert same(before, snapshot(problem.model))
    close(first["score"], first["score:x"] + first["score:y"], 1e-12)
    turned = [tiny_examples()[i] for i in turn]
    again = driver.scores(replace(problem, batch_tokens=1), turned, targets, method, Work(folder=tmp_path / "b"))
    assert list(again.example_ids) == [IDS[i] for i in turn]
    size = np.abs(first.values).max(0)
    # Differences of read-outs carry their rounding, and a store keeps float32.
    tolerance = {"finite-step": 1e-7, "sketch": 1e-5}.get(estimator, 1e-8)
    assert (np.abs(again.values - first.values[turn]) <= tolerance * size).all()


def test_a_metric_that_is_fitted_already_is_taken_as_it_is() -> None:
    problem, read = setting("features")
    targets = TargetSet.of(["score"], read)
    metric = CURVED["adam"].make(CURVATURES).fit(problem, tiny_examples(), Work())
    few = tiny_examples()[:2]  # their own moments would be others
    ours = driver.scores(problem.within(metric), few, targets, Method(curvature=CURVED["adam"]), Work())
    close(ours.values, exact("features", "adam").select(["score", "score:x", "score:y"]).values[:2], 1e-10)


# Trajectories


@curvatures
def test_a_sum_over_checkpoints_is_the_sum_of_its_legs(curvature: str) -> None:
    problem, read = setting("features")
    targets = TargetSet.of(ASKED["features"], read)
    opened = replace(problem, opener=lambda id, revision: tiny_model(id))
    along = Choice("checkpoints", {"checkpoints": (Checkpoint("gpt2", 2e-3), Checkpoint("tied", 5e-4))})
    ours = driver.scores(
        opened, tiny_examples(), targets, Method(curvature=CURVED[curvature], trajectory=along), Work()
    )
    legs = [problem.at(tiny_model(name), lr) for name, lr in (("gpt2", 2e-3), ("tied", 5e-4))]
    single = Method(curvature=CURVED[curvature])
    parts = [driver.scores(leg, tiny_examples(), targets, single, Work()).values for leg in legs]
    np.testing.assert_allclose(ours.values, parts[0] + parts[1], rtol=1e-10)
    np.testing.assert_allclose(ours.losses, exact("features", curvature).losses, rtol=1e-12)
    assert ours.method.endswith("@checkpoints")


@dataclass(frozen=True)
class TwoSteps:
    """Carries given queries: at the last leg q, at the one before it three times as much."""

    single = False
    carries = True

    def refuses(self, curvature: Any) -> None:
        return None

    def legs(self, problem: Problem, work: Work) -> Iterator[Leg]:
        yield Leg(problem, "last")
        yield Leg(problem.at(tiny_model("tied"), 0.5), "first")

    def carry(self, queries: Any, leg: Leg, targets: TargetSet, work: Work) -> Any:
        if queries is None:
            draw = torch.Generator().manual_seed(0)
            return {
                name: torch.randn(len(targets.direct), *leg.problem.model.get_parameter(name).shape, generator=draw)
                for name in CARRIED
            }
        return {name: 3 * q for name, q in queries.items()}


CARRIED = ("model.layers.0.mlp.up_proj.weight", "model.norm.weight", "model.embed_tokens.weight")


@pytest.fixture
def toy(monkeypatch) -> Choice:
    monkeypatch.setitem(TRAJECTORIES._found, "two-steps", TwoSteps)
    return Choice("two-steps")


def test_a_query_that_a_trajectory_carries_is_what_gradients_meet(toy: Choice) -> None:
    problem, read = setting("features", lr=0.25)
    targets = TargetSet.of(["score", "behavior:a", "prompt:*"], read)
    ours = driver.scores(problem, tiny_examples(), targets, Method(trajectory=toy), Work())
    q = TwoSteps().carry(None, Leg(problem), targets, Work())
    expected = np.zeros((len(IDS), len(targets.direct)))
    for lr, model, times in ((0.25, problem.model, 1), (0.5, tiny_model("tied"), 3)):
        for row, example in zip(expected, tiny_examples(), strict=True):
            grads = plain_gradient(model, plain_loss(model, example))
            for name in CARRIED:
                row -= (lr * times * torch.einsum("k...,...->k", q[name].double(), grads[name])).numpy()
    close(ours.values, targets.from_direct(expected))
    close(ours["score"], ours["score:x"] + ours["score:y"])


def test_an_estimator_that_takes_no_query_refuses_a_trajectory_that_carries_one(toy: Choice) -> None:
    for estimator in ("forward", "finite-step", "sketch"):
        with pytest.raises(UserError, match="does not go together"):
            found("features", Method(Choice(estimator), trajectory=toy))


def test_a_trajectory_without_legs_is_refused(toy: Choice, monkeypatch) -> None:
    monkeypatch.setattr(TwoSteps, "legs", lambda self, problem, work: iter(()))
    with pytest.raises(UserError, match="no legs"):
        found("features", Method(trajectory=toy))


# Refusals


@pytest.mark.parametrize(
    "estimator, curvature, trajectory, why",
    [
        ("finite-step", "identity", "checkpoints", "one set of weights"),
        ("sketch", "identity", "checkpoints", "one set of weights"),
        ("adjoint", "autocorrelation", "base", "sketches"),
        ("forward", "autocorrelation", "base", "sketches"),
        ("finite-step", "autocorrelation", "base", "sketches"),
        ("adjoint", "moments", "checkpoints", "moments of its own"),
    ],
)
def test_what_does_not_go_together_is_refused_in_a_sentence(
    estimator: str, curvature: str, trajectory: str, why: str, tmp_path: Path
) -> None:
    (tmp_path / "v.safetensors").touch()
    given = Choice("adam", {"moments": str(tmp_path / "v.safetensors")})
    curved = given if curvature == "moments" else Choice(curvature)
    some = {"checkpoints": {"checkpoints": (Checkpoint("gpt2", 1e-3),)}}.get(trajectory, {})
    method = Method(Choice(estimator), curved, Choice(trajectory, some))
    with pytest.raises(UserError, match="does not go together") as error:
        found("features", method)
    assert why in error.value.rule and error.value.value == method.name
    assert ". " not in error.value.rule and error.value.fix


def test_sketches_divide_by_the_autocorrelation(tmp_path: Path) -> None:
    problem, read = setting("nothing")
    many = [replace(z, id=f"{z.id}-{n}") for z in tiny_examples() for n in range(2)]
    method = Method(Choice("sketch", {"dim": 256}), Choice("autocorrelation"))
    targets = TargetSet.of(ASKED["nothing"], read)
    curved = driver.scores(problem, many, targets, method, Work(folder=tmp_path))
    plain = driver.scores(problem, many, targets, Method(method.estimator), Work(folder=tmp_path))
    assert curved.method == "sketch+autocorrelation"
    assert np.isfinite(curved.values).all() and not np.allclose(curved.values, plain.values, rtol=0.1)


@pytest.mark.parametrize(
    "name, known, close_to",
    [
        ("adjont", ("adjoint", "forward", "finite-step", "sketch"), "adjoint"),
        ("adjoint+ekfca", ("identity", "adam", "ekfac", "autocorrelation"), "ekfac"),
        ("adjoint@checkpoint", ("base", "checkpoints"), "checkpoints"),
    ],
)
def test_an_unknown_part_lists_the_known_ones_and_the_closest(name: str, known, close_to: str) -> None:
    parts = Method().named
    estimator, _, rest = name.replace("@", "+").partition("+")
    given = Method(
        Choice(estimator), Choice(rest if "+" in name else "identity"), Choice(rest if "@" in name else "base")
    )
    for attempt in (lambda: parts(name), lambda: found("nothing", given)):
        with pytest.raises(UserError) as error:
            attempt()
        assert all(one in error.value.rule for one in known)
        assert error.value.fix == f"did you mean {close_to}?"


def test_a_method_by_name_keeps_the_parameters_of_its_parts() -> None:
    own = Method(Choice("sketch", {"dim": 128}), CURVED["adam"])
    assert own.name == "sketch+adam"
    assert own.named("sketch+adam") == own
    assert own.named("adjoint+adam") == Method(Choice("adjoint"), CURVED["adam"])
    assert own.named("sketch") == Method(own.estimator, Choice("identity"))


@pytest.mark.parametrize("estimator", ["adjoint", "forward", "finite-step"])
def test_what_is_not_finite_names_its_examples(estimator: str) -> None:
    model = tiny_model("untied")
    with torch.no_grad():
        model.model.embed_tokens.weight[21] = torch.inf  # only example z0 has this token
    problem = replace(setting("nothing")[0], model=model)
    targets = TargetSet.of(["behavior"], setting("nothing")[1])
    with pytest.raises(UserError, match=r"not finite(.|\n)*z0"):
        driver.scores(problem, tiny_examples(), targets, Method(Choice(estimator)), Work())


# Without features


def test_a_behavior_alone_moves_as_a_step_of_torch_moves_it() -> None:
    lr = 1e-6
    ours = found("nothing", Method(), lr=lr)
    base = [float(plain_y(tiny_model("untied"), prompt.ids).detach()) for prompt in tiny_prompts()]
    for number, example in enumerate(tiny_examples()):
        trained = tiny_model("untied")
        plain_loss(trained, example).backward()
        torch.optim.SGD(trained.parameters(), lr=lr).step()
        dy = [float(plain_y(trained, prompt.ids).detach()) - y for prompt, y in zip(tiny_prompts(), base, strict=True)]
        assert ours["behavior"][number] == pytest.approx(np.mean(dy), rel=1e-2, abs=1e-4 * np.abs(dy).max())


@pytest.mark.parametrize("what, asked", [("features", ["behavior:a"]), ("concepts", ["concept:*", "behavior:a"])])
def test_every_prompt_is_kept_beside_any_targets_and_costs_no_features(what: str, asked, monkeypatch) -> None:
    def refuse(*_: Any, **__: Any) -> None:
        raise AssertionError("gradients of features")

    monkeypatch.setattr(adjoint, "feature_effects", refuse)
    ours, forward = (found(what, Method(Choice(e)), wanted=[*asked, "prompt:*"]) for e in ("adjoint", "forward"))
    alike(ours, forward)
    close(ours.details["dy"], forward.details["dy"])
    with pytest.raises(UserError, match=r"no target(.|\n)*prompt:\*(.|\n)*behavior"):
        found(what, Method(), wanted=["prompt:*"])


def test_targets_that_need_what_is_not_read_are_refused() -> None:
    for name, key in (("score", "sae.path"), ("coefficient:*", "sae.path"), ("concept:u", "concepts")):
        with pytest.raises(UserError, match=key):
            found("nothing", Method(), wanted=[name])
