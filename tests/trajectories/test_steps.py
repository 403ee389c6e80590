"""Through a whole training run, for every kind of target: central differences of whole trainings, float64."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode
from transformers import LlamaConfig, LlamaForCausalLM

from taught.core import driver
from taught.core.driver import Method
from taught.core.estimator import Work
from taught.core.example import make_batch, sft
from taught.core.names import TargetName
from taught.core.registry import Choice
from taught.core.target import TargetSet, value
from taught.errors import UserError
from taught.estimators.cost import Asked
from taught.model.readout import read_prompts
from taught.progress import SilentProgress
from taught.run.pieces import PartialFolder
from taught.stages.check import check_study
from taught.stages.ready import prepare, read_data
from taught.stages.subject import open_subject
from taught.study.load import load_study
from taught.study.schema import ValidationSpec
from taught.training.loop import in_training
from taught.training.recipe import Recipe
from taught.training.steps import Back, States, Training
from taught.trajectories.steps import PASSES, TRAINED, Steps
from taught.trajectories.trained import trained_queries
from tiny_models import Norm64
from tiny_study import do, with_values, write_tiny_study

ROOT = 1e-6
METHOD = Method(trajectory=Choice("steps", {"eps_root": ROOT}))
RECIPE = {
    "validation.lr": 3e-3,
    "validation.epochs": 2,
    "validation.batch": 4,
    "validation.max_grad_norm": 0.5,
    "validation.weight_decay": 0.01,
    "validation.schedule": "linear",
    "validation.warmup": 0.2,
}


@pytest.fixture(scope="module")
def study(tmp_path_factory):
    path = write_tiny_study(tmp_path_factory.mktemp("study"))
    small = {"model.dtype": "float64", "examples.limit": 8, "prompts.limit": 12, "features.max_features": 3}
    return with_values(load_study(path), {**small, **RECIPE})


@pytest.fixture(scope="module")
def ready(study, tmp_path_factory):
    run = do(study, tmp_path_factory.mktemp("run") / "run", "readings", "policy")
    subject = open_subject(study)
    for module in list(subject.loaded.model.modules()):  # transformers' own norm computes in float32
        for name, child in list(module.named_children()):
            if type(child).__name__ == "LlamaRMSNorm":
                norm = Norm64(len(child.weight), child.variance_epsilon).double()
                norm.weight = child.weight
                setattr(module, name, norm)
    return prepare(study, run, subject, read_data(study, SilentProgress()))


@pytest.fixture(scope="module")
def targets(ready) -> TargetSet:
    return TargetSet.of(["behavior:harmless", "behavior:harmful", "score", "coefficient:*"], ready.readings)


@pytest.fixture(scope="module")
def scores(ready, targets):
    return driver.scores(ready.problem, ready.inputs, targets, METHOD, Work())


def values_after(ready, weights, names) -> np.ndarray:
    """F of the model that a whole run with these weights ends in."""
    problem = ready.problem
    with in_training(problem.model, problem.recipe, problem.parameters) as patterns:
        training = Training(problem.model, ready.inputs, problem.recipe, patterns, eps_root=ROOT, weights=weights)
        with training.ready():
            training.train()
            with torch.no_grad():
                reads = read_prompts(problem.model, problem.prompts, problem.behavior, problem.point)
                X = problem.features(reads.h, reads.offsets).double().numpy()
    final = ready.readings.refitted(reads.y.numpy(), X)
    return np.array([value(name, final, ready.readings) for name in names])


def test_effects_are_derivatives_of_whole_trainings_for_every_target(ready, targets, scores):
    names = [name for name in targets.names if name.pathway is None]
    ids = sorted(scores.example_ids)
    step = 1e-4
    by_example = np.array([[scores.by_example(name)[i] for i in ids] for name in names])
    # One example by itself, and a drawn direction in which every one has another part.
    for v in (np.eye(len(ids))[1], np.random.default_rng(1).standard_normal(len(ids))):
        up, down = (values_after(ready, torch.from_numpy(1 + sign * step * v), names) for sign in (1, -1))
        numeric = (up - down) / (2 * step)
        np.testing.assert_allclose(by_example @ v, numeric, rtol=2e-6, atol=1e-7 * np.abs(numeric).max())


def test_the_width_of_signs_is_for_the_examples_of_the_first_step(ready, targets):
    some = targets.select([TargetName.parse("behavior:harmless")])
    recipe = replace(ready.problem.recipe, warmup=0.0)  # else the first step moves nothing
    problem = replace(ready.problem, recipe=recipe)
    wide, point = (
        driver.scores(problem, ready.inputs, some, Method(trajectory=Choice("steps", options)), Work())
        for options in ({"smoothness": 0}, {"smoothness": 0, "sign_width": 0})
    )
    training = Training(problem.model, ready.inputs, recipe)
    first = {training.ids[i] for i in training.plan[0]}
    one, other = (scores.by_example("behavior:harmless") for scores in (wide, point))
    assert 0 < len(first) < len(one)
    assert first == {i for i in one if one[i] != pytest.approx(other[i], rel=1e-9)}


def test_pathways_add_up_and_both_are_there(scores):
    for kind in ("score", *(str(n) for n in scores.targets if n.kind == "coefficient" and n.pathway is None)):
        x, y = (np.array(list(scores.by_example(f"{kind}:{side}").values())) for side in "xy")
        total = np.array(list(scores.by_example(kind).values()))
        np.testing.assert_allclose(x + y, total, rtol=1e-9, atol=1e-12)
        assert np.abs(x).max() > 0 and np.abs(y).max() > 0


def test_smoothness_is_that_of_trainings_with_other_weights(ready, targets, scores):
    (found,) = scores.details["smoothness"]
    assert 0.5 < found["score"] <= 1
    rows = {row["target"]: row for row in found["targets"]}
    v = np.random.default_rng([ready.problem.recipe.seed, 0]).standard_normal(len(scores))
    names = [TargetName.parse(name) for name in ("behavior:harmless", "score")]
    one, two, three = (values_after(ready, torch.from_numpy(1 + k * 0.1 * v), names) for k in range(3))
    by_id = np.array([[scores.by_example(n)[i] for n in names] for i in sorted(scores.example_ids)])
    for name, predicted, a, b, c in zip(names, 0.1 * v @ by_id, one, two, three, strict=True):
        row = rows[str(name)]
        assert [row["predicted"], row["measured"], row["measured_next"]] == pytest.approx([predicted, b - a, c - b])


def test_weights_are_as_before_and_states_on_disk_give_the_same(ready, targets, scores, tmp_path, monkeypatch):
    held = []

    def watched(problem, targets, ended, names):
        held.append(len(names))
        return trained_queries(problem, targets, ended, names)

    monkeypatch.setattr("taught.trajectories.steps.trained_queries", watched)
    before = {n: p.detach().clone() for n, p in ready.problem.model.named_parameters()}
    some = targets.select([TargetName.parse("behavior:harmless"), TargetName.parse("score:x")])
    little = replace(ready.problem, memory_gb=1e-6)  # nothing fits: states go to the disk, a target at a time
    other = driver.scores(little, ready.inputs, some, METHOD, Work(folder=tmp_path))
    for name in some.names:
        assert other.by_example(name) == pytest.approx(scores.by_example(name), rel=1e-9)
    assert all(torch.equal(before[n], p) for n, p in ready.problem.model.named_parameters())
    assert not list(tmp_path.iterdir())
    assert held == [1, 1]  # gradients of the size of the model are there for the target that goes back alone


@pytest.mark.parametrize("memory_gb", [1e-6, 8.0], ids=["one target at a time", "all at once"])
def test_what_check_says_of_a_run_is_how_often_its_steps_are_made(memory_gb, ready, targets, monkeypatch):
    forward, back = Training.advance, Training.step_back
    made, gone = [], []

    def advance(self, state, states=None):
        made.append(state.step)
        return forward(self, state, states)

    def step_back(self, state, backs, **options):
        gone.append(len(backs))
        return back(self, state, backs, **options)

    monkeypatch.setattr(Training, "advance", advance)
    monkeypatch.setattr(Training, "step_back", step_back)
    problem = replace(ready.problem, memory_gb=memory_gb)
    some = targets.select([TargetName.parse(f"behavior:{group}") for group in ("harmless", "harmful")])
    driver.scores(problem, ready.inputs, some, Method(trajectory=Choice("steps", {"smoothness": 0})), Work())
    cost = Steps(smoothness=0).cost(problem, ready.inputs, Asked(features=0, queries=len(some.direct), every=False))
    steps = len(set(made))
    once, each = PASSES["exact", "full"]
    told = cost["training"] + cost.get("replay", 0.0), cost["steps back"]
    assert told[0] / cost["training"] == len(made) / steps
    assert told[1] / cost["training"] == pytest.approx(sum(once + each * k for k in gone) / steps / TRAINED["full"])


def test_a_stopped_pass_goes_on_where_it_was(ready, targets, scores, tmp_path, monkeypatch):
    some = targets.select([TargetName.parse("behavior:harmless")])
    little = replace(ready.problem, memory_gb=1e-6)
    steps, made = Training.step_back, []

    def dying(self, *args, **options):
        made.append(1)
        if len(made) == 4:
            raise KeyboardInterrupt
        return steps(self, *args, **options)

    monkeypatch.setattr(Training, "step_back", dying)
    work = Work(pieces=PartialFolder(tmp_path / "partial"), folder=tmp_path)
    with pytest.raises(KeyboardInterrupt):
        driver.scores(little, ready.inputs, some, METHOD, work)
    made.clear()
    monkeypatch.setattr(Training, "step_back", lambda self, *a, **o: (made.append(1), steps(self, *a, **o))[1])
    again = driver.scores(little, ready.inputs, some, METHOD, work)
    assert len(made) < 4
    assert again.by_example("behavior:harmless") == pytest.approx(scores.by_example("behavior:harmless"), rel=1e-12)


def test_training_that_is_not_the_same_again_is_refused(ready, targets, monkeypatch):
    advance, calls = Training.advance, []

    def drifting(self, state, states=None):
        advance(self, state, states)
        calls.append(1)
        if len(calls) == 6:  # in the replay of the last segment
            next(iter(self.moving.values())).data.add_(1e-9)

    monkeypatch.setattr(Training, "advance", drifting)
    some = targets.select([TargetName.parse("behavior:harmless")])
    with pytest.raises(UserError, match="not the same when it is made again"):
        driver.scores(replace(ready.problem, memory_gb=1e-6), ready.inputs, some, METHOD, Work())


@pytest.mark.parametrize("estimator", ["forward", "finite-step", "sketch"])
def test_only_the_adjoint_follows_a_run(ready, targets, estimator):
    with pytest.raises(UserError, match="does not go together"):
        driver.scores(ready.problem, ready.inputs, targets, replace(METHOD, estimator=Choice(estimator)), Work())


def test_a_curvature_has_no_place_in_a_run(ready, targets):
    with pytest.raises(UserError, match="does not go together"):
        driver.scores(ready.problem, ready.inputs, targets, replace(METHOD, curvature=Choice("adam")), Work())


def test_a_run_through_the_command_s_stages(study, tmp_path):
    small = with_values(study, {"attribution.trajectory": "steps", "attribution.targets": ["behavior:harmless"]})
    run = do(small, tmp_path / "run", "readings", "policy", "attribute", "curate", "report")
    record = run.read_json("attribution")
    assert record["method"] == "adjoint@steps"
    values = run.read_table("summary")["behavior:harmless"].to_pylist()
    assert all(v is not None for v in values)
    assert record["unit"] == "run"
    effects = {row["example_id"]: row["behavior:harmless"] for row in run.read_table("summary").to_pylist()}
    shares = {}
    for row in run.read_table("token_shares").to_pylist():
        shares[row["example_id"]] = shares.get(row["example_id"], 0.0) + row["share"]
    assert len(shares) == small.attribution.exact_top
    assert shares == pytest.approx({i: effects[i] for i in shares}, rel=1e-9)
    page = (run.folder / "report.html").read_text()
    assert f"The run begins at the weights of {small.model.id};" in page
    assert "Metasmoothness" in page and "per step" not in page and "one plain SGD step" not in page
    with pytest.raises(UserError, match="validation.lr"):  # the recipe is what they depend on
        do(with_values(small, {"validation.lr": 1e-3}), tmp_path / "run", "attribute")


def test_check_says_what_it_costs(study):
    report = dict(check_study(with_values(study, {"attribution.trajectory": "steps"})).rows)
    assert "steps back" in report["cost"] and "states" not in report["disk"]
    small = with_values(study, {"attribution.trajectory": "steps", "attribution.memory_gb": 0.0001})
    assert "states of the training run" in dict(check_study(small).rows)["disk"]


@pytest.mark.parametrize(("hessian", "method"), PASSES)
def test_what_check_says_of_a_step_is_what_it_computes(hessian, method, monkeypatch):
    """Products that torch does not count are left to torch; narrow layers make LoRA's own share larger than it is."""
    monkeypatch.setattr("taught.training.loop.use_fast_products", lambda model: None)
    sizes = {"hidden_size": 128, "intermediate_size": 384, "num_hidden_layers": 2, "vocab_size": 600}
    model = LlamaForCausalLM(LlamaConfig(**sizes, num_attention_heads=4, tie_word_embeddings=True)).eval()
    examples = [sft(f"z{i}", tuple(range(i, i + 30)), 10) for i in range(4)]

    def counted(work) -> int:
        with FlopCounterMode(display=False) as counter:
            work()
        return counter.get_total_flops()

    recipe = Recipe.of(ValidationSpec(method=method, epochs=1, batch=4))
    with in_training(model, recipe, None) as patterns:
        training = Training(model, examples, recipe, patterns)
        with training.ready(), torch.no_grad():
            forward = counted(lambda: make_batch(examples, range(4)).terms(model))
        with training.ready():
            state = training.begin()
            states = States(None)
            step = counted(lambda: training.advance(state.copy(), states))
            before = states.load(0)
            one, three = (
                counted(lambda n=n: training.step_back(before, [Back(state.copy().parts)] * n, hessian=hessian))
                for n in (1, 3)
            )
    found = np.array([step, one - (three - one) / 2, (three - one) / 2]) / forward
    assert found == pytest.approx([TRAINED[method], *PASSES[hessian, method]], rel=0.1, abs=0.01)


@pytest.mark.parametrize("kind", ["steps", "segments"])
@pytest.mark.parametrize(
    ("changes", "words", "mended"),
    [
        ({"validation.epochs": 1, "validation.batch": 8}, "moves nothing", {"validation.warmup": 0.0}),
        ({"model.dtype": "bfloat16"}, "half precision", {"model.dtype": "float32"}),
        ({"validation.trainer": "trl"}, "in the plain loop", {"validation.trainer": "loop"}),
        (
            {"validation.method": "lora", "attribution.parameters": ("*.mlp.*",)},
            "moves these alone",
            {"attribution.parameters": None},
        ),
    ],
    ids=["rates of 0", "half precision", "trl", "parameters beside LoRA"],
)
def test_check_says_what_a_run_would_refuse_and_the_fix_works(study, kind, changes, words, mended):
    how = {"kind": kind, **({"segments": 1} if kind == "segments" else {})}
    bad = with_values(study, {"attribution.trajectory": how, **changes})
    assert any(words in problem for problem in check_study(bad).problems)
    assert check_study(with_values(bad, mended)).problems == []


def test_check_says_where_a_run_has_fewer_steps_than_segments(study):
    many = with_values(study, {"attribution.trajectory": {"kind": "segments", "segments": 5}})
    assert any("more segments than steps" in problem for problem in check_study(many).problems)
    few = with_values(study, {"attribution.trajectory": {"kind": "segments", "segments": 4}})
    assert check_study(few).problems == []


@pytest.mark.parametrize("kind", ["steps", "segments"])
def test_parameters_that_a_run_of_lora_does_not_move_are_refused(ready, targets, kind):
    problem = replace(
        ready.problem, parameters=("*.mlp.*",), recipe=replace(ready.problem.recipe, method="lora", lora_rank=1)
    )
    with pytest.raises(UserError, match="moves these alone"):
        driver.scores(problem, ready.inputs, targets, Method(trajectory=Choice(kind)), Work())
