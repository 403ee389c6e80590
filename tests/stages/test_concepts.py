"""Concepts of a study in a run: their targets by every estimator, and the methods that take no gradient."""

from __future__ import annotations

import gc
import json
import shutil
import weakref
from pathlib import Path

import numpy as np
import pytest
import torch

from taught.core.point import Point
from taught.curvatures.adam import Adam
from taught.errors import UserError
from taught.features.concept import Concept, save_concept
from taught.run.folder import RunFolder
from taught.stages import ready
from taught.stages.subject import open_subject, study_examples, study_prompts
from taught.stats.ranks import spearman
from taught.study.load import load_study
from taught.study.schema import Study
from tiny_study import do, values_of, with_values, write_tiny_study

PROMPTS = 12  # of thirty: less than half the time
METHODS = ("vector-filter", "projection-difference-response", "projection-difference-training")
CONCEPTS = ({"name": "c1", "block": 1}, {"name": "c2", "block": 0})  # two places of the model


def of_difference(**more) -> list[dict]:
    return [{"source": "difference", "force": True, **own, **more} for own in CONCEPTS]


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    folder = tmp_path_factory.mktemp("concepts")
    study = load_study(write_tiny_study(folder))
    shutil.copytree(folder / "model", folder / "tuned")
    _move_weights(folder / "tuned")
    return with_values(
        study,
        {
            "prompts.limit": PROMPTS,
            "concepts": of_difference(),
            "attribution.targets": ["concept:*"],
            "attribution.checkpoint": str(folder / "tuned"),
            "attribution.max_new_tokens": 5,
            "attribution.exact_top": 0,
        },
    )


def _move_weights(folder: Path) -> None:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder)
    with torch.no_grad():
        for p in model.parameters():
            p.mul_(1.05)
    model.save_pretrained(folder)


@pytest.fixture(scope="module")
def read(study: Study, tmp_path_factory) -> Path:
    """A run with its readings and policy."""
    return do(study, tmp_path_factory.mktemp("read") / "run", "readings", "policy").folder


@pytest.fixture
def scored(study: Study, read: Path, tmp_path: Path):
    """Make concepts and scores in a copy of that run, with some of the study changed."""
    made = iter(range(100))

    def run(values: dict | None = None, **attribution) -> RunFolder:
        folder = shutil.copytree(read, tmp_path / str(next(made)))
        changed = {**(values or {}), **{f"attribution.{key}": value for key, value in attribution.items()}}
        return do(with_values(study, changed), folder, "concepts", "attribute")

    return run


def both(run: RunFolder, method: str = "adjoint") -> np.ndarray:
    """Values [P, 2] of both concepts."""
    return np.stack([list(values_of(run, f"concept:{own['name']}", method).values()) for own in CONCEPTS], 1)


def test_every_method_gives_every_example_a_value_for_every_concept(scored):
    run = scored(concept_methods=METHODS)
    table = run.read_table("scores")
    assert table["se"].null_count == table.num_rows == 8 * 2 * 4
    every = [both(run, method) for method in ("adjoint", *METHODS)]
    assert all(values.shape == (8, 2) and np.isfinite(values).all() for values in every)
    assert len({tuple(values.ravel()) for values in every}) == 4
    rows = {(r["target"], r["method"], r["other"]): r for r in run.read_table("agreement").to_pylist()}
    assert len(rows) == 2 * 6
    for column, own in enumerate(CONCEPTS):
        row = rows[f"concept:{own['name']}", "adjoint", "vector-filter"]
        assert row["rank_correlation"] == pytest.approx(spearman(every[0][:, column], every[1][:, column]), abs=1e-12)
        assert -1 <= row["lo"] <= row["rank_correlation"] <= row["hi"] <= 1


def test_shares_of_tokens_spell_the_strongest_examples_and_add_up_to_their_values(study, scored):
    run = scored(exact_top=3)
    examples = {example.id: example for example in study_examples(study, study_prompts(study))[0]}
    rows = run.read_table("token_shares").to_pylist()
    first = values_of(run, "concept:c1")
    for own in CONCEPTS:
        values = values_of(run, f"concept:{own['name']}")
        mine = [r for r in rows if r["target"] == f"concept:{own['name']}"]
        order = list(dict.fromkeys(row["example_id"] for row in mine))
        assert order == sorted(first, key=lambda i: -abs(first[i]))[:3]
        for example_id in order:
            of = [row for row in mine if row["example_id"] == example_id]
            assert [row["position"] for row in of] == list(range(len(of)))
            assert "".join(row["token"] for row in of) == examples[example_id].response + "<|im_end|>"
            assert sum(row["share"] for row in of) == pytest.approx(values[example_id], rel=1e-3)


def test_the_metric_is_found_once_for_all_targets_and_their_shares(scored, monkeypatch):
    fits = []
    real = Adam.fit
    monkeypatch.setattr(Adam, "fit", lambda *given: fits.append(1) or real(*given))
    adam = {"kind": "adam", "eps": 1e-3}
    run = scored(targets=["concept:*", "behavior:harmless"], curvature=adam, exact_top=2)
    assert len(fits) == 1
    found = both(run, "adjoint+adam")
    assert not np.allclose(found, both(scored()), rtol=0.1)
    values = {target: values_of(run, target) for target in ("concept:c1", "concept:c2", "behavior:harmless")}
    sums: dict[tuple[str, str], float] = {}
    for row in run.read_table("token_shares").to_pylist():
        key = row["target"], row["example_id"]
        sums[key] = sums.get(key, 0.0) + row["share"]
    assert len(sums) == 6
    assert sums == pytest.approx({(t, i): values[t][i] for t, i in sums}, rel=1e-3)


def test_the_mean_over_responses_is_that_of_the_examples_one_by_one(scored):
    """Their influence on all responses is the mean of their influences on each label's."""

    def found(group: str | None) -> np.ndarray:
        return both(scored({"concepts": of_difference(read="responses", group=group)}))

    parts = [found(label) for label in ("harmful-refusal", "harmless-compliance")]  # four examples each
    whole = found(None)
    np.testing.assert_allclose(whole, sum(parts) / 2, atol=1e-4 * np.abs(parts).max())
    assert not np.allclose(*parts, rtol=0.1)
    assert not np.allclose(whole, both(scored()), rtol=0.1)


@pytest.mark.parametrize("estimator", ["forward", "finite-step"])
def test_the_study_s_estimator_is_used_and_each_place_has_read_outs_of_its_own(scored, estimator: str):
    """What is kept of an example at one place is not what is read at another, nor what the policy reads."""
    how = {"targets": ["score", "concept:*"], "lr": 1e-3}
    group = {"concepts": of_difference(group="harmful"), "examples.limit": 4}
    wanted, found = scored(group, **how), scored(group, **how, estimator=estimator)
    for target in ("score", "concept:c1", "concept:c2"):
        a, b = (np.array(list(values_of(run, target).values())) for run in (found, wanted))
        assert np.abs(a - b).max() < 0.05 * np.abs(b).max()
    effects, ids = found.read_tensors("prompt_effects")
    assert effects["dy"].shape == (4, PROMPTS) and len(ids["prompt_ids"]) == PROMPTS  # of all, not of the group
    if estimator == "forward":
        effects, ids = found.read_tensors("feature_prompt_effects")
        assert effects["dX"].shape == (4, PROMPTS, len(ids["feature_ids"]))


def test_a_concept_can_come_first(scored):
    """Examples are ranked by it; a real step is checked against it, and the policy is left alone."""
    run = scored(targets=["concept:c1"], exact_top=2)
    assert run.read_json("attribution")["ranked_by"] == "concept:c1"
    rows = sorted(run.read_table("summary").to_pylist(), key=lambda row: row["rank"])
    for row in rows[:2]:
        assert row["step_score"] == pytest.approx(row["concept:c1"], rel=0.2)
        assert row["refit_score"] is None
    assert not run.path("prompt_effects.safetensors").exists()


def test_sketches_answer_for_concepts_within_their_stated_error(scored, tmp_path, monkeypatch):
    sketch = {"kind": "sketch", "dim": 8192, "store": str(tmp_path / "store")}
    for options in ({}, {"group": "harmful"}, {"read": "responses"}):
        values = {"concepts": of_difference(**options)}
        exact = scored(values)
        run = scored(values, estimator=sketch, concept_methods=["vector-filter"])
        rows = run.read_table("scores").to_pylist()
        assert all((row["se"] is None) == (row["method"] == "vector-filter") for row in rows)
        se = np.array([row["se"] for row in rows if row["method"] == "sketch"]).reshape(2, 8).T
        found, wanted = both(run, "sketch"), both(exact)
        assert 0.5 < np.sqrt(np.mean(((found - wanted) / se) ** 2)) < 2
        assert min(spearman(found[:, c], wanted[:, c]) for c in range(2)) > 0.85

    def never(*_args, **_options):
        raise AssertionError("sketched again")

    monkeypatch.setattr("taught.sketches.fill.example_sketches", never)
    again = scored(values, estimator=sketch)
    np.testing.assert_array_equal(both(again, "sketch"), found)  # a later concept costs its own query alone


def test_checkpoints_add_up_and_one_is_held_at_a_time(study, scored, monkeypatch):
    opened: list[weakref.ref] = []
    real = ready.open_checkpoint

    def opens(*given):
        gc.collect()
        assert all(ref() is None for ref in opened)
        model = real(*given)
        opened.append(weakref.ref(model))
        return model

    monkeypatch.setattr(ready, "open_checkpoint", opens)
    folder = Path(study.model.id).parent
    base, tuned = ({"id": str(folder / name), "lr": 1e-3} for name in ("model", "tuned"))

    def found(*checkpoints) -> np.ndarray:
        trajectory = {"kind": "checkpoints", "checkpoints": list(checkpoints)}
        return both(scored(trajectory=trajectory), "adjoint@checkpoints")

    np.testing.assert_allclose(found(base, tuned), found(base) + found(tuned), rtol=1e-6, atol=1e-12)
    assert len(opened) == 8  # two places


def test_own_responses_are_generated_once_and_of_one_setting(study, scored, monkeypatch):
    run = scored(concept_methods=["projection-difference-response"])
    file = run.path("own_responses.json")
    record = json.loads(file.read_text())
    assert record["settings"]["max_new_tokens"] == 5
    assert all(0 < len(r["tokens"]) <= 5 for r in record["responses"].values())
    assert len(record["responses"]) == 8
    first = both(run, "projection-difference-response")

    def never(*_args, **_options):
        raise AssertionError("generated again")

    monkeypatch.setattr("taught.stages.own_responses.greedy", never)
    again = do(run.study, RunFolder(run.folder, fresh=("attribute",)), "attribute")
    np.testing.assert_array_equal(both(again, "projection-difference-response"), first)
    other = run.study.replace("attribution.max_new_tokens", 6)
    with pytest.raises(UserError, match=r"max_new_tokens: was 5, now 6"):
        do(other, RunFolder(run.folder, fresh=("attribute",)), "attribute")
    file.write_text("{}")
    with pytest.raises(UserError, match="cannot be read"):
        do(run.study, RunFolder(run.folder, fresh=("attribute",)), "attribute")


def test_what_is_asked_in_vain_is_said(study: Study, scored, tmp_path: Path):
    save_concept(Concept("w", np.ones(5), Point(1)), tmp_path / "w")
    save_concept(Concept("far", np.ones(16), Point(9)), tmp_path / "far")
    save_concept(Concept("x", np.ones(16), Point(1), weights={"sha256": "y"}), tmp_path / "x")

    def saved(name: str) -> dict:
        return {"concepts": [{"name": name, "path": str(tmp_path / name)}]}

    own = ["projection-difference-response"]
    across = {"targets": ["concept:c1 - concept:c2"]}
    for values, attribution, message in (
        ({"concepts": []}, {"concept_methods": ["vector-filter"], "targets": None}, "there are no concepts"),
        ({}, {"targets": ["concept:nobody"]}, r"concept:nobody(.|\n)*c1, c2"),
        ({"concepts": of_difference(group="nobody")}, {}, "harmful, harmless"),
        ({"concepts": of_difference(group="nobody", read="responses")}, {}, "harmful-refusal, harmless-compliance"),
        (saved("w"), {}, "width 5"),
        (saved("far"), {}, "block 9"),
        (saved("x"), {}, "other weights"),
        ({}, {"concept_methods": ["projection-difference-training"], "checkpoint": None}, r"attribution\.checkpoint"),
        ({}, {"concept_methods": own, "max_new_tokens": 500}, r"attribution\.max_new_tokens"),
        ({}, across, "concept:c1 - concept:c2"),  # read at different places
    ):
        with pytest.raises(UserError, match=message):
            scored(values, **attribution)
    with pytest.raises(UserError, match="told apart"):
        study.replace("concepts", [{**own, "name": "c"} for own in of_difference()])
    with pytest.raises(UserError, match="vector-filter"):
        study.replace("attribution.concept_methods", ["gradients"])


def test_the_pooled_tokens_of_an_example_are_its_response_with_the_end_of_the_turn(study: Study, scored):
    subject = open_subject(study)
    run = scored(concept_methods=["vector-filter"])
    arrays, ids = run.read_tensors("concepts")
    direction = arrays["directions"][ids["names"].index("c1")]
    examples, _ = study_examples(study, study_prompts(study))
    values = values_of(run, "concept:c1", "vector-filter")
    for example in examples:
        text = f"<|im_start|>user\n{example.prompt}<|im_end|>\n<|im_start|>assistant\n"
        start = len(subject.loaded.tokenizer(text).input_ids)
        tokens = subject.loaded.tokenizer(f"{text}{example.response}<|im_end|>").input_ids
        with torch.no_grad():
            out = subject.loaded.model(torch.tensor([tokens]), output_hidden_states=True)
        h = out.hidden_states[2][0, start:].double().mean(0).numpy()
        assert values[example.id] == pytest.approx(float(direction @ h), rel=1e-3, abs=1e-4)


def test_concepts_go_when_their_study_changes_and_what_rests_on_them_does(study: Study, scored):
    run = scored()
    other = study.replace("concepts", of_difference(norm="none"))
    with pytest.raises(UserError, match="concepts"):
        do(other, run.folder, "concepts")
    again = do(other, RunFolder(run.folder, fresh=("concepts",)), "concepts")
    assert "attribute" not in again.manifest["stages"]
    wanted = do(other, again, "attribute")
    assert not np.allclose(both(wanted), both(scored()), rtol=0.1)
