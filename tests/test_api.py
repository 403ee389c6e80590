"""``taught.influence``: one call gives what a run gives, from a folder or a model in memory."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

import taught
from taught.errors import UserError
from taught.stages.subject import study_prompts
from taught.study.load import load_study
from taught.study.schema import Study
from tiny_study import SCORED, do, values_of, with_values, write_tiny_study

GROUPS = ("behavior:harmful", "behavior:harmless")


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> Study:
    """The tiny study on its first twelve prompts."""
    study = load_study(write_tiny_study(tmp_path_factory.mktemp("api")))
    path = Path(study.prompts.path)
    path.write_text("".join(path.read_text().splitlines(keepends=True)[:12]))
    return study


@pytest.fixture(scope="module")
def run(study, tmp_path_factory):
    return do(study, tmp_path_factory.mktemp("run") / "run", *SCORED)


@pytest.fixture(scope="module")
def loaded(study):
    """A model of transformers in memory, with its tokenizer."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    return AutoModelForCausalLM.from_pretrained(study.model.id), AutoTokenizer.from_pretrained(study.model.id)


def rows_of(path: str) -> list[dict]:
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


@pytest.fixture
def data(study) -> tuple[list[dict], list[dict]]:
    return rows_of(study.examples.path), rows_of(study.prompts.path)


def same_as_run(scores: taught.Scores, run, targets) -> None:
    for target in targets:
        expected = values_of(run, target)
        assert scores.by_example(target) == pytest.approx(expected, abs=1e-3 * max(map(abs, expected.values())))


def test_files_and_a_folder_give_the_runs_behaviors(study, run):
    scores = taught.influence(study.model.id, study.examples.path, study.prompts.path)
    assert [str(name) for name in scores.targets] == list(GROUPS) and scores.method == "adjoint"
    same_as_run(scores, run, GROUPS)
    values = values_of(run, GROUPS[0])
    assert scores.top(1)[0][0] == max(values, key=lambda i: values[i])
    table = scores.to_arrow()
    assert table.column_names == ["example_id", "method", "target", "value", "se"] and len(table) == 16


def test_dicts_and_a_model_in_memory_give_the_same(study, run, loaded, data):
    model, tokenizer = loaded
    model.train()
    weights = {name: p.detach().clone() for name, p in model.named_parameters()}
    scores = taught.influence(model, *data, tokenizer=tokenizer)
    same_as_run(scores, run, GROUPS)
    from_folder = taught.influence(study.model.id, *data)
    np.testing.assert_allclose(scores.values, from_folder.values, rtol=1e-5)
    assert all((weights[name] == p).all() for name, p in model.named_parameters())
    assert all(p.requires_grad and p.grad is None for p in model.parameters())
    assert model.training  # as it was given


@pytest.mark.parametrize("mode", [torch.no_grad, torch.inference_mode])
def test_a_caller_that_records_no_gradients_gets_the_same(mode, study, loaded, data):
    model, tokenizer = loaded
    expected = taught.influence(model, *data, tokenizer=tokenizer)
    with mode():
        found = taught.influence(model, *data, tokenizer=tokenizer)
    np.testing.assert_array_equal(found.values, expected.values)


def test_with_an_sae_it_has_the_policy_of_a_run(study, run, loaded, data):
    model, tokenizer = loaded
    scores = taught.influence(model, *data, tokenizer=tokenizer, sae=study.sae.path, study=study)
    names = [str(name) for name in scores.targets]
    assert names == run.read_json("attribution")["targets"]
    same_as_run(scores, run, names)
    dy, ids = run.read_tensors("prompt_effects")
    assert scores.details["dy"].shape == dy["dy"].shape == (8, len(ids["prompt_ids"]))


def test_targets_by_name_and_contrasts(study, run, data):
    name = "behavior:harmful - behavior:harmless"
    scores = taught.influence(study.model.id, *data, [name, "behavior", "prompt:q00", "behavior:break"])
    one, other = (np.array(list(values_of(run, group).values())) for group in GROUPS)
    np.testing.assert_allclose(scores[name], one - other, atol=1e-3 * np.abs(one - other).max())
    whole = (8 * one + 4 * other) / 12
    np.testing.assert_allclose(scores["behavior"], whole, atol=1e-3 * np.abs(whole).max())
    assert scores.values.shape == (8, 4) and np.isfinite(scores.values).all()
    again = taught.influence(study.model.id, *data, [taught.TargetName.parse(name)])
    np.testing.assert_allclose(again[name], scores[name], rtol=1e-5)


def test_methods_are_named_as_in_a_study(study, data, tmp_path):
    examples, prompts = data[0][:4], data[1]
    plain = taught.influence(study.model.id, examples, prompts)
    adam = taught.influence(study.model.id, examples, prompts, curvature={"kind": "adam", "eps": 1e-3})
    assert adam.method == "adjoint+adam" and not np.allclose(adam.values, plain.values, rtol=0.1)
    twice = taught.influence(study.model.id, examples, prompts, lr=2e-4)
    np.testing.assert_allclose(twice.values, 2 * plain.values, rtol=1e-5)
    along = {"kind": "checkpoints", "checkpoints": [{"id": study.model.id, "lr": 1e-4}]}
    summed = taught.influence(study.model.id, examples, prompts, trajectory=along)
    np.testing.assert_allclose(summed.values, plain.values, rtol=1e-4)
    sketch = {"kind": "sketch", "dim": 8192}
    with pytest.raises(UserError, match="place to be kept"):
        taught.influence(study.model.id, examples, prompts, estimator=sketch)
    found = taught.influence(study.model.id, examples, prompts, estimator=sketch, folder=tmp_path)
    assert found.se is not None and np.abs(found.values - plain.values).max() < 6 * found.se.max()
    loss = taught.influence(study.model.id, examples, [p | {"answer": "No."} for p in prompts], behavior="answer")
    assert not np.allclose(loss.values, plain.values, rtol=0.1)


def test_sketches_that_are_kept_belong_to_the_weights_they_are_of(loaded, data, tmp_path):
    """Of a model in memory too: another one of the same shape does not take its sketches."""
    from copy import deepcopy

    model, tokenizer = loaded
    given = {"tokenizer": tokenizer, "estimator": {"kind": "sketch", "dim": 1024}, "folder": tmp_path}
    one = taught.influence(model, *data, **given)
    np.testing.assert_array_equal(taught.influence(model, *data, **given).values, one.values)
    other = deepcopy(model)
    other.get_parameter("model.norm.weight").data[0] += 0.1
    with pytest.raises(UserError, match=r"model\.weights"):
        taught.influence(other, *data, **given)


def test_an_overlap_is_refused_by_id_or_left_out(study, data):
    examples, prompts = data
    examples[3]["prompt"] = prompts[5]["prompt"]
    with pytest.raises(UserError, match="z03"):
        taught.influence(study.model.id, examples, prompts)
    scores = taught.influence(study.model.id, examples, prompts, study=Study().replace("examples.drop_overlap", True))
    assert "z03" not in scores.example_ids and len(scores) == 7


def test_a_truncated_example_is_refused_by_id_or_left_out(study, data):
    examples, prompts = data
    examples[4]["response"] = "a very long answer " * 10
    short = Study().replace("examples.max_tokens", 128)
    with pytest.raises(UserError, match="z04"):
        taught.influence(study.model.id, examples, prompts, study=short)
    scores = taught.influence(study.model.id, examples, prompts, study=short.replace("examples.drop_truncated", True))
    assert "z04" not in scores.example_ids and len(scores) == 7


def test_what_does_not_fit_is_said(study, data):
    with pytest.raises(UserError, match=r"sae\.path"):
        taught.influence(study.model.id, *data, ["score"])
    with pytest.raises(UserError, match=r"prompts\.positive_group"):
        taught.influence(study.model.id, *data, sae=study.sae.path)
    with pytest.raises(UserError, match="behavior:nobody|nobody"):
        taught.influence(study.model.id, *data, ["behavior:nobody"])
    with pytest.raises(UserError, match=r"attribution\.estimator"):
        taught.influence(study.model.id, *data, estimator="adjiont")


def test_documents_are_trained_on_as_a_whole(study, data):
    texts = [{"id": f"d{n}", "text": row["response"] * 2} for n, row in enumerate(data[0])]
    documents = with_values(Study(), {"examples.kind": "document"})
    scores = taught.influence(study.model.id, texts, data[1], study=documents)
    assert [i.partition("#")[0] for i in scores.example_ids] == [f"d{n}" for n in range(8)] and np.isfinite(
        scores.values
    ).all()


def test_a_study_says_which_documents_of_a_stream_are_taken(study, data):
    texts = [{"id": f"d{n}", "text": row["response"] * 2, "topic": n % 2} for n, row in enumerate(data[0])]
    keys = {"kind": "document", "limit": 4, "spread": ("topic",), "even": True, "drop_duplicates": True}
    some = with_values(Study(), {f"examples.{key}": value for key, value in keys.items()})
    scores = taught.influence(study.model.id, iter(texts), data[1], study=some)
    taken = {i.partition("#")[0] for i in scores.example_ids}
    assert len(taken) == len({texts[int(i[1:])]["text"] for i in taken}) == 2  # the tiny data have two responses


def test_a_study_says_how_many_prompts_are_taken_and_which_groups_they_have(study, data):
    examples, prompts = data
    taken = {p.id for p in study_prompts(study.replace("prompts.limit", 6))}
    those = [row for row in prompts if row["id"] in taken]
    expected = taught.influence(study.model.id, examples, those)
    found = taught.influence(study.model.id, examples, prompts, study=Study().replace("prompts.limit", 6))
    assert len(those) == 6 and found.values == pytest.approx(expected.values, rel=1e-9)
    other = with_values(Study(), {"prompts.positive_group": "nobody", "prompts.negative_group": "harmless"})
    with pytest.raises(UserError, match="a group has no prompts(.|\n)*nobody"):
        taught.influence(study.model.id, examples, prompts, study=other)


@pytest.mark.parametrize("family", ["Mixtral", "Gemma2", "Bloom"])
def test_models_with_windows_experts_or_no_trees_give_what_forward_mode_or_real_steps_give(family, loaded, data):
    import transformers

    tokenizer = loaded[1]
    settings = {"num_hidden_layers": 2, "num_attention_heads": 2, "num_key_value_heads": 1, "head_dim": 8}
    if family != "Bloom":
        settings |= {"intermediate_size": 24, "sliding_window": 8, "max_position_embeddings": 256}
    if family == "Mixtral":
        settings |= {"num_local_experts": 4}
    config = getattr(transformers, f"{family}Config")(
        vocab_size=len(tokenizer), hidden_size=16, pad_token_id=None, initializer_range=0.4, **settings
    )
    model = getattr(transformers, f"{family}ForCausalLM")(config).eval()
    given = {"tokenizer": tokenizer, "lr": 3e-4}
    found = taught.influence(model, *data, **given)
    other = taught.influence(model, *data, estimator="forward" if family == "Gemma2" else "finite-step", **given)
    assert found.values == pytest.approx(other.values, abs=0.03 * np.abs(found.values).max())


def test_what_is_not_given_is_what_the_study_says(study, data):
    with_rate = Study().replace("attribution.lr", 3e-4).replace("behavior", {"kind": "prefixes", "prefixes": ["Sure"]})
    found = taught.influence(study.model.id, *data, study=with_rate)
    given = taught.influence(study.model.id, *data, lr=3e-4, behavior={"kind": "prefixes", "prefixes": ["Sure"]})
    plain = taught.influence(study.model.id, *data, study=with_rate, lr=1e-4)
    np.testing.assert_allclose(found.values, given.values, rtol=1e-6)
    np.testing.assert_allclose(found.values, 3 * plain.values, rtol=1e-4)
