"""Gradient Concept Influence against real steps and plain passes; its forward-only relatives."""

from __future__ import annotations

import gc
import itertools
import json
import shutil
import weakref
from dataclasses import replace
from functools import cache
from pathlib import Path

import numpy as np
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
import torch
from taught.estimators.concepts import concept_effects
from taught.stages.concept_influence import METHODS

from taught import stages
from taught.baselines.activations import project, response_reads
from taught.core.target import concept_targets
from taught.curvatures.adam import with_adam
from taught.errors import UserError
from taught.features.concept import Concept, concept_map, load_concept, save_concept
from taught.model.generate import greedy
from taught.run.folder import RunFolder
from taught.sketches.project import Projection
from taught.sketches.sketch import prompt_sketches
from taught.stages import ConceptQuestion, ConceptRequest, estimating
from taught.stages.subject import open_subject, study_examples, study_prompts
from taught.stats.ranks import spearman
from taught.study.load import load_study
from taught.study.schema import Study
from tiny_models import (
    BLOCK,
    MODELS,
    PROMPT_IDS,
    WIDTH,
    moved,
    plain_gradient,
    plain_loss,
    plain_read,
    same,
    snapshot,
    tiny_examples,
    tiny_model,
    tiny_problem,
    tiny_prompts,
)
from tiny_study import write_tiny_study

LR = 1e-7  # small: what is compared is the first order
INSIDE = np.array([True, False, True, True, False, True])


@cache
def model_of(name: str):
    return tiny_model(name)


def concepts(block: int = BLOCK, **fields) -> list[Concept]:
    rng = np.random.default_rng(5)
    return [Concept(name, rng.normal(size=WIDTH), block, **fields) for name in ("a", "b")]


def problem_of(model, position: str = "mean_user", prompts=None, **options):
    features = concept_map(concepts(), position, next(model.parameters()))
    fields = {"features": features, "prompts": prompts or tiny_prompts(position), "lr": LR}
    return tiny_problem(model, **{**fields, **options})


def targets_of(problem, inside=None):
    return concept_targets([p.id for p in problem.prompts], ["a", "b"], inside)


def plain_mean(model, position: str, inside=None) -> np.ndarray:
    """F of both concepts: the mean over prompts of <v, mean of h over the tokens>, plain passes."""
    reads = []
    with torch.no_grad():
        for ids, prompt in zip(PROMPT_IDS, tiny_prompts(position), strict=True):
            h = plain_read(model, ids)[0][list(prompt.read)].mean(0).numpy()
            reads.append([concept.direction @ h for concept in concepts()])
    rows = np.array(reads)
    return rows.mean(0) if inside is None else rows[inside].mean(0)


def close(ours, reference, relative: float = 1e-5) -> None:
    ours, reference = np.asarray(ours), np.asarray(reference)
    assert np.abs(reference).max() > 0
    np.testing.assert_allclose(ours, reference, rtol=relative, atol=relative * np.abs(reference).max())


# --- the gradient ------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("position", ["last_user", "mean_user"])
@pytest.mark.parametrize("inside", [None, INSIDE], ids=["all", "some"])
def test_it_is_the_finite_difference_of_the_concept_under_one_step_of_sgd(name, position, inside):
    model = tiny_model(name)
    problem = problem_of(model, position)
    effects = concept_effects(problem, tiny_examples(), targets_of(problem, inside))
    for example, ours in zip(tiny_examples(), effects, strict=True):
        step = plain_gradient(model, plain_loss(model, example))
        reads = []
        for sign in (1, -1):  # the step and its opposite: what is left is of third order
            with moved(model, step, -sign * LR):
                reads.append(plain_mean(model, position, inside))
        close(ours, (reads[0] - reads[1]) / 2)


@pytest.mark.parametrize("name", MODELS)
def test_every_estimator_gives_the_same_effects(name):
    problem = problem_of(model_of(name), lr=1e-6)
    targets = targets_of(problem, INSIDE)
    adjoint = concept_effects(problem, tiny_examples(), targets)
    close(concept_effects(problem, tiny_examples(), targets, "jvp"), adjoint, 1e-8)
    close(concept_effects(problem, tiny_examples(), targets, "finite-step"), adjoint, 1e-3)


def test_adam_s_metric_applies_to_concepts_as_to_features():
    problem = with_adam(problem_of(model_of("untied")), tiny_examples(), moments=None, eps=1e-3, progress=None)
    targets = targets_of(problem)
    adjoint = concept_effects(problem, tiny_examples(), targets)
    close(concept_effects(problem, tiny_examples(), targets, "jvp"), adjoint, 1e-8)
    plain = concept_effects(problem_of(model_of("untied")), tiny_examples(), targets)
    assert not torch.allclose(adjoint, plain, rtol=0.1)


def test_sketches_of_a_concept_s_read_out_meet_those_of_the_examples():
    """Inner products of sketches are unbiased; here they are only near."""
    from taught.sketches.sketch import example_sketches

    problem = problem_of(model_of("untied"), lr=1.0)
    projection = Projection(problem.model, 64 * 4096, 0)
    query = torch.zeros(2, 64 * 4096)
    for part in prompt_sketches(problem, projection, problem.prompts):
        for column, value in zip(part.features, part.values, strict=True):
            if column >= 0:
                query[column] += value / len(problem.prompts)
    examples = torch.zeros(len(tiny_examples()), 64 * 4096)
    for part in example_sketches(problem, projection, tiny_examples()):
        examples[list(part.index)] = part.values.to(examples)
    exact = concept_effects(problem, tiny_examples(), targets_of(problem))
    error = -(examples @ query.T).double() - exact
    size = examples.norm(dim=1, keepdim=True) * query.norm(dim=1)
    assert float((error.abs() / size).max()) < 0.05


def test_nothing_of_the_model_changes():
    model = tiny_model("tied")
    before = snapshot(model)
    concept_effects(problem_of(model), tiny_examples(), targets_of(problem_of(model)))
    assert same(before, snapshot(model))


def test_a_mean_over_no_prompts_is_refused():
    with pytest.raises(UserError, match="one prompt at least"):
        concept_targets(["q0", "q1"], ["a"], [False, False])


# --- projections -------------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("tokens", ["mean_response", "last_response"])
def test_the_vector_filter_is_the_projection_of_plain_passes(name: str, tokens: str):
    model = model_of(name)
    found = project(
        model, tiny_examples(), concept_map(concepts(), tokens, next(model.parameters())), BLOCK, batch_tokens=16
    )
    for example, row in zip(tiny_examples(), found, strict=True):
        with torch.no_grad():
            h = plain_read(model, example.ids)[0].numpy()
        read = h[example.start :].mean(0) if tokens == "mean_response" else h[-1]
        close(row, [concept.direction @ read for concept in concepts()], 1e-10)


def test_an_empty_response_is_refused_by_its_id():
    example = replace(tiny_examples()[0], start=len(tiny_examples()[0].ids))
    with pytest.raises(UserError, match=r"empty(.|\n)*z0"):
        response_reads([example], "mean_response")


def own_read_out(model, example, **options):
    """The problem whose only prompt is the example, read at its response."""
    return problem_of(model, "mean_response", response_reads([example], "mean_response"), **options)


def training_differences(model, step, lr: float) -> np.ndarray:
    """Projection Difference (training) of every example for a model moved along a step, [P, C]."""
    mapped = concept_map(concepts(), "mean_response", next(model.parameters()))
    before = project(model, tiny_examples(), mapped, BLOCK)
    with moved(model, step, -lr):
        return (project(model, tiny_examples(), mapped, BLOCK) - before).numpy()


@pytest.mark.parametrize("name", MODELS)
def test_the_difference_after_a_step_on_a_example_tends_to_the_gradient_of_its_own_read_out(name):
    model, example = tiny_model(name), tiny_examples()[1]
    problem = own_read_out(model, example, lr=1.0)
    exact = concept_effects(problem, [example], targets_of(problem))[0].numpy()
    step = plain_gradient(model, plain_loss(model, example))
    errors = []
    for lr in (1e-5, 1e-6):
        found = training_differences(model, step, lr)[1] / lr
        errors.append(np.abs(found - exact).max() / np.abs(exact).max())
    assert errors[1] < 1e-2
    assert errors[1] < 0.2 * errors[0]  # a tenth of the step leaves a tenth of the error


def test_the_differences_of_a_batch_are_the_sum_of_those_of_its_examples():
    """Training on a batch: each example's difference is the influence of all examples on its read-out."""
    model = tiny_model("tied")
    steps = [plain_gradient(model, plain_loss(model, example)) for example in tiny_examples()]
    batch = {name: sum(step[name] for step in steps) for name in steps[0]}
    lr = 1e-8
    together = training_differences(model, batch, lr)
    alone = sum(training_differences(model, step, lr) for step in steps)
    close(together, alone, 1e-4)
    for column, example in enumerate(tiny_examples()):
        problem = own_read_out(model, example, lr=lr)
        effects = concept_effects(problem, tiny_examples(), targets_of(problem))
        close(together[column], effects.sum(0), 1e-4)


def test_the_difference_to_own_responses_is_the_gradient_of_a_tilted_model():
    """docs/methods.md: p(r) is tilted by exp(<b, h(r)>); all responses of two tokens, written out.

    - grad_b of the loss at b = 0 is h(r) minus its mean over the model's own responses, so that
    the mean of the projection differences over own responses is the effect on <v, b>, exactly.
    """
    model, prompt = model_of("untied"), PROMPT_IDS[4]
    v = torch.from_numpy(concepts()[0].direction)
    responses = list(itertools.product(range(6), repeat=2))
    h, logp = [], []
    with torch.no_grad():
        for response in responses:
            hidden, scores = plain_read(model, (*prompt, *response))
            h.append(hidden[len(prompt) :].mean(0))
            logp.append(sum(scores[len(prompt) - 1 + j, t] for j, t in enumerate(response)))
    h, logp = torch.stack(h), torch.stack(logp)
    logp = logp - logp.logsumexp(0)
    tilt = torch.zeros(WIDTH, dtype=torch.float64, requires_grad=True)
    chosen = responses.index((3, 5))
    loss = -torch.log_softmax(logp + h @ tilt, 0)[chosen]
    (gradient,) = torch.autograd.grad(loss, tilt)
    differences = (h[chosen] - h) @ v
    close(-(gradient @ v), (differences * logp.exp()).sum(), 1e-10)


# --- own responses -----------------------------------------------------------------------------


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize("budget", [1, 30, 4096])
def test_own_responses_are_the_most_probable_tokens_one_by_one(name: str, budget: int):
    model, ends = model_of(name), {3, 7}
    found = greedy(model, PROMPT_IDS, ends, 6, batch_tokens=budget)
    for prompt, answer in zip(PROMPT_IDS, found, strict=True):
        expected: list[int] = []
        while len(expected) < 6 and not set(expected) & ends:
            with torch.no_grad():
                expected.append(int(plain_read(model, (*prompt, *expected))[1][-1].argmax()))
        assert answer == tuple(expected)


# --- the command -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    folder = tmp_path_factory.mktemp("influence")
    study = load_study(write_tiny_study(folder))
    for number, block in ((1, 1), (2, 0)):
        request = ConceptRequest("difference", block=block, force=True)
        stages.concept(study, folder / f"c{number}", request)
    shutil.copytree(folder / "model", folder / "tuned")
    _move_weights(folder / "tuned")
    return study


def _move_weights(folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.05)
    model.save_pretrained(folder)


def folder_of(study: Study) -> Path:
    return Path(study.model.id).parent


def question_of(study: Study, *methods: str, **options) -> ConceptQuestion:
    folder = folder_of(study)
    fields = {
        "concepts": (folder / "c1", folder / "c2"),
        "methods": methods,
        "checkpoint": str(folder / "tuned"),
        "responses": folder / "own.json",
        "max_new_tokens": 5,
    }
    return ConceptQuestion(**{**fields, **options})


def values_of(table, concept: str, method: str) -> list[float]:
    return [row["value"] for row in table.to_pylist() if (row["concept"], row["method"]) == (concept, method)]


def test_every_method_gives_every_example_a_value_for_every_concept(study: Study):
    methods = tuple(METHODS)
    table, tokens = stages.concept_influence(study, question_of(study, *methods))
    assert tokens.num_rows == 0
    assert table.column_names == ["example_id", "concept", "method", "value", "se"]
    assert table["se"].null_count == table.num_rows
    assert table.num_rows == 8 * 2 * 4
    for concept in ("c1", "c2"):
        every = [values_of(table, concept, method) for method in methods]
        assert all(len(values) == 8 and np.isfinite(values).all() for values in every)
        assert len({tuple(values) for values in every}) == 4
    rows = stages.agreement(table).to_pylist()
    assert len(rows) == 2 * 6
    assert all(-1 <= row["rank_correlation"] <= 1 for row in rows)


def test_shares_of_tokens_spell_the_strongest_examples_and_add_up_to_their_values(study: Study):
    tuned = {"id": str(folder_of(study) / "tuned"), "lr": 1e-3}
    for changed in (study, study.replace("attribution.checkpoints", [tuned, {**tuned, "id": study.model.id}])):
        table, tokens = stages.concept_influence(changed, question_of(study, "gradient", tokens=3))
        examples = {example.id: example for example in study_examples(study, study_prompts(study))[0]}
        for concept in ("c1", "c2"):
            values = {r["example_id"]: r["value"] for r in table.to_pylist() if r["concept"] == concept}
            rows = [r for r in tokens.to_pylist() if r["concept"] == concept]
            order = list(dict.fromkeys(row["example_id"] for row in rows))
            assert order == sorted(values, key=lambda i: -abs(values[i]))[:3]
            for example_id in order:
                own = [row for row in rows if row["example_id"] == example_id]
                assert [row["position"] for row in own] == list(range(len(own)))
                text = "".join(row["token"] for row in own)
                assert text == examples[example_id].response + "<|im_end|>"
                assert sum(row["share"] for row in own) == pytest.approx(values[example_id], rel=1e-3)


def test_the_metric_is_found_once_for_all_concepts_and_their_shares(study: Study, monkeypatch):
    fits = []
    real = estimating.with_adam
    monkeypatch.setattr(estimating, "with_adam", lambda *a, **k: fits.append(1) or real(*a, **k))
    adam = study.replace("attribution.curvature", "adam").replace("attribution.adam_eps", 1e-3)
    table, tokens = stages.concept_influence(adam, question_of(study, "gradient", tokens=2))
    assert len(fits) == 1
    plain, _ = stages.concept_influence(study, question_of(study, "gradient"))
    assert not np.allclose(table["value"], plain["value"], rtol=0.1)
    values = {(row["concept"], row["example_id"]): row["value"] for row in table.to_pylist()}
    sums: dict[tuple[str, str], float] = {}
    for row in tokens.to_pylist():
        key = row["concept"], row["example_id"]
        sums[key] = sums.get(key, 0.0) + row["share"]
    assert len(sums) == 4
    assert sums == pytest.approx({key: values[key] for key in sums}, rel=1e-3)


def test_methods_agree_by_example_whatever_the_order_of_rows(study: Study):
    table, _ = stages.concept_influence(study, question_of(study, "gradient", "vector-filter"))
    by_value = table.sort_by([("concept", "ascending"), ("value", "ascending")])
    found, wanted = (
        {
            (r["concept"], frozenset((r["method"], r["other"]))): r["rank_correlation"]
            for r in stages.agreement(rows).to_pylist()
        }
        for rows in (by_value, table)
    )
    assert len(wanted) == 2 and found == pytest.approx(wanted, abs=1e-12)


def test_the_mean_over_responses_is_that_of_the_examples_one_by_one(study: Study):
    """Their influence on all responses is the mean of their influences on each label's."""

    def run(group: str | None):
        table, _ = stages.concept_influence(study, question_of(study, "gradient", read="responses", group=group))
        return np.array(table["value"].to_pylist())

    labels = ("harmful-refusal", "harmless-compliance")  # four examples each
    parts = [run(label) for label in labels]
    np.testing.assert_allclose(run(None), sum(parts) / 2, atol=1e-4 * np.abs(parts).max())
    assert not np.allclose(*parts, rtol=0.1)
    assert not np.allclose(
        run(None), stages.concept_influence(study, question_of(study, "gradient")).table["value"].to_pylist(), rtol=0.1
    )


@pytest.mark.parametrize("estimator", ["jvp", "finite-step"])
def test_the_study_s_estimator_is_used(study: Study, estimator: str):
    question = question_of(study, "gradient", group="harmful")
    study = study.replace("attribution.lr", 1e-3)
    wanted = stages.concept_influence(study, question)
    found = stages.concept_influence(study.replace("attribution.estimator", estimator), question)
    a, b = (np.array(answers.table["value"].to_pylist()) for answers in (found, wanted))
    assert np.abs(a - b).max() < 0.05 * np.abs(b).max()


def test_sketches_answer_for_concepts_within_their_stated_error(study: Study, tmp_path, monkeypatch):
    sketch = study.replace("attribution.estimator", "sketch").replace("sketch.dim", 8192)
    sketch = sketch.replace("sketch.store", str(tmp_path / "store"))
    for options in ({}, {"group": "harmful"}, {"read": "responses"}):
        exact = stages.concept_influence(study, question_of(study, "gradient", **options)).table
        found, tokens = stages.concept_influence(
            sketch, question_of(study, "gradient", "vector-filter", tokens=2, **options)
        )
        filtered = found.filter(pc.equal(found["method"], "vector-filter"))
        assert filtered["se"].null_count == len(filtered) and tokens.num_rows > 2 * 2
        found = found.filter(pc.equal(found["method"], "gradient"))
        assert found["example_id"].equals(exact["example_id"])
        gap = found["value"].to_numpy() - exact["value"].to_numpy()
        assert 0.5 < np.sqrt(np.mean((gap / found["se"].to_numpy()) ** 2)) < 2
        for concept in ("c1", "c2"):
            assert spearman(*(values_of(t, concept, "gradient") for t in (found, exact))) > 0.85

    def never(*_args, **_options):
        raise AssertionError("sketched again")

    monkeypatch.setattr("taught.sketches.fill.example_sketches", never)
    again = stages.concept_influence(sketch, question_of(sketch, "gradient", **options)).table
    assert again["value"].equals(found["value"]), "a later concept costs its own query alone"


def test_the_store_of_a_run_serves_its_concepts(study: Study, tmp_path: Path, monkeypatch):
    sketch = study.replace("attribution.estimator", "sketch").replace("sketch.dim", 2048)
    run = RunFolder(tmp_path / "run")
    stages.policy(sketch, run)
    stages.attribute(sketch, run)
    monkeypatch.setattr("taught.sketches.fill.example_sketches", None)
    stages.concept_influence(sketch, question_of(study, "gradient"), run=run)
    assert run.read_table("concept_influence")["se"].null_count == 0


def test_checkpoints_add_up_and_one_is_held_at_a_time(study: Study, monkeypatch):
    opened: list[weakref.ref] = []
    real = estimating.open_checkpoint

    def opens(*given):
        gc.collect()
        assert all(ref() is None for ref in opened)
        model = real(*given)
        opened.append(weakref.ref(model))
        return model

    monkeypatch.setattr(estimating, "open_checkpoint", opens)
    question = question_of(study, "gradient")
    base, tuned = ({"id": str(folder_of(study) / name), "lr": 1e-3} for name in ("model", "tuned"))

    def run(*checkpoints):
        changed = study.replace("attribution.checkpoints", list(checkpoints))
        table, _ = stages.concept_influence(changed, question)
        return np.array(table["value"].to_pylist())

    np.testing.assert_allclose(run(base, tuned), run(base) + run(tuned), rtol=1e-6, atol=1e-12)
    assert len(opened) == 8  # two places


def test_own_responses_are_generated_once_and_of_one_setting(study: Study, monkeypatch):
    file = folder_of(study) / "once.json"
    question = question_of(study, "projection-difference-response", responses=file)
    first, _ = stages.concept_influence(study, question)
    record = json.loads(file.read_text())
    assert record["settings"]["max_new_tokens"] == 5
    assert all(0 < len(r["tokens"]) <= 5 for r in record["responses"].values())
    assert len(record["responses"]) == 8

    def never(*_args, **_options):
        raise AssertionError("generated again")

    monkeypatch.setattr("taught.stages.own_responses.greedy", never)
    again, _ = stages.concept_influence(study, question)
    assert again.equals(first)
    with pytest.raises(UserError, match=r"max_new_tokens: was 5, now 6"):
        stages.concept_influence(study, replace(question, max_new_tokens=6))
    file.write_text("{}")
    with pytest.raises(UserError, match="cannot be read"):
        stages.concept_influence(study, question)


def test_what_is_asked_in_vain_is_said(study: Study, tmp_path: Path):
    save_concept(Concept("w", np.ones(5), 1), tmp_path / "w")
    save_concept(Concept("far", np.ones(16), 9), tmp_path / "far")
    save_concept(Concept("x", np.ones(16), 1, weights={"sha256": "y"}), tmp_path / "x")
    c1 = folder_of(study) / "c1"
    sketch = study.replace("attribution.estimator", "sketch")
    for changed, question, message in (
        (study, question_of(study, "gradients"), "gradient, vector-filter"),
        (study, question_of(study), "no such method"),
        (study, question_of(study, "gradient", group="nobody"), "harmful, harmless"),
        (study, question_of(study, "gradient", concepts=(c1, c1)), "told apart"),
        (study, question_of(study, "gradient", concepts=(tmp_path / "w",)), "width 5"),
        (study, question_of(study, "gradient", concepts=(tmp_path / "far",)), "block 9"),
        (study, question_of(study, "gradient", concepts=(tmp_path / "x",)), "other weights"),
        (study, question_of(study, "projection-difference-training", checkpoint=None), "--checkpoint"),
        (study, question_of(study, "projection-difference-response", max_new_tokens=500), "lower --max-new-tokens"),
        (sketch, question_of(study, "gradient"), "sketch.store=FOLDER"),
        (sketch.replace("attribution.curvature", "adam"), question_of(study, "gradient"), "plain gradients"),
        (study, question_of(study, "vector-filter", tokens=2), "add --method gradient"),
        (study, question_of(study, "gradient", tokens=-1), "set --tokens"),
    ):
        with pytest.raises(UserError, match=message):
            stages.concept_influence(changed, question)


def test_the_command_line_writes_the_table_and_shows_where_methods_agree(taught_here, study, tmp_path):
    folder = folder_of(study)
    done = taught_here(
        "concept-influence",
        str(folder),
        "--concept",
        str(folder / "c1"),
        str(folder / "c2"),
        "--method",
        "gradient",
        "vector-filter",
        "--tokens",
        "2",
        "--out",
        str(tmp_path / "t.parquet"),
        "-q",
    )
    assert done.returncode == 0, done.stderr
    assert "rank_correlation" in done.stdout
    assert pq.read_table(tmp_path / "t.parquet").num_rows == 8 * 2 * 2
    assert pq.read_table(tmp_path / "t.tokens.parquet").num_rows > 2 * 2
    none = taught_here(
        "concept-influence", str(folder), "--concept", str(folder / "c1"), "--run", str(tmp_path / "none")
    )
    assert none.returncode == 2 and "not a run folder" in none.stderr
    assert not (tmp_path / "none").exists()


def test_the_pooled_tokens_of_a_example_are_its_response_with_the_end_of_the_turn(study: Study):
    subject = open_subject(study)
    table, _ = stages.concept_influence(study, question_of(study, "vector-filter"))
    concept = load_concept(folder_of(study) / "c1")
    examples, _ = study_examples(study, study_prompts(study))
    for example, value in zip(examples, values_of(table, "c1", "vector-filter"), strict=True):
        text = f"<|im_start|>user\n{example.prompt}<|im_end|>\n<|im_start|>assistant\n"
        start = len(subject.loaded.tokenizer(text).input_ids)
        ids = subject.loaded.tokenizer(f"{text}{example.response}<|im_end|>").input_ids
        with torch.no_grad():
            out = subject.loaded.model(torch.tensor([ids]), output_hidden_states=True)
        h = out.hidden_states[2][0, start:].double().mean(0).numpy()
        assert value == pytest.approx(float(concept.direction @ h), rel=1e-3, abs=1e-4)
