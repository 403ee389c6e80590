"""A study of preferences: from a file of chosen and rejected answers to scores, strips, curation and training."""

from __future__ import annotations

import json
import math
from pathlib import Path

import pytest
import torch

from taught import influence
from taught.analysis.curate import curate
from taught.errors import UserError
from taught.model.load import load_model
from taught.report.sections.curation import curation_change
from taught.run.folder import RunFolder
from taught.stages.ready import prepare, read_data
from taught.stages.subject import open_subject
from taught.study.load import load_study
from taught.study.schema import Study
from tiny_study import SMALL_STEPS, do, values_of, with_values, write_tiny_study

BETA = 0.25


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> Study:
    """The tiny study with every pair as the chosen answer, against the answer of another row."""
    folder = tmp_path_factory.mktemp("preferences")
    path = write_tiny_study(folder)
    rows = [json.loads(line) for line in (folder / "pairs.jsonl").read_text().splitlines()]
    others = [row["response"] for row in rows]
    with (folder / "preferences.jsonl").open("w") as file:
        for row, other in zip(rows, reversed(others), strict=True):
            chosen = row.pop("response")
            rejected = other if other != chosen else other + " No."
            file.write(json.dumps({**row, "chosen": chosen, "rejected": rejected}) + "\n")
    values = {"examples.path": str(folder / "preferences.jsonl"), "examples.kind": "preference", "examples.beta": BETA}
    values |= {"attribution.exact_top": 2, "model.dtype": "float64", "prompts.limit": 12}
    return with_values(load_study(path), values)


@pytest.fixture(scope="module")
def run(study: Study, tmp_path_factory) -> RunFolder:
    return do(study, tmp_path_factory.mktemp("run") / "run", "readings", "policy", "attribute", "curate", "report")


def log_probability(loaded, prompt: str, answer: str) -> torch.Tensor:
    """Of the answer's tokens, the end of its turn included: plain transformers."""
    turns = [{"role": "user", "content": prompt}, {"role": "assistant", "content": answer}]
    head = loaded.tokenizer.apply_chat_template(turns[:1], tokenize=False, add_generation_prompt=True)
    whole = loaded.tokenizer.apply_chat_template(turns, tokenize=False).rstrip("\n")
    start = len(loaded.tokenizer(head)["input_ids"])
    ids = torch.tensor([loaded.tokenizer(whole)["input_ids"]])
    logp = torch.log_softmax(loaded.model(input_ids=ids).logits[0, :-1].double(), -1)
    return logp.gather(1, ids[0, 1:, None])[start - 1 :].sum()


def test_a_step_on_a_preference_is_one_of_dpo_from_the_base_model(study, run):
    # One SGD step on -log sigmoid(beta (margin - margin at the base model)), by plain transformers and autograd.
    loaded, lr = load_model(study.model.id, dtype="float64"), study.attribution.lr
    row = run.read_table("summary").to_pylist()[0]
    example = next(e for e in run.read_table("examples").to_pylist() if e["example_id"] == row["example_id"])
    prompts = run.read_table("prompts").to_pylist()
    prefixes = open_subject(study).behavior.prefixes

    def behavior() -> float:
        group = [p for p in prompts if p["group"] == "harmful"]
        total = 0.0
        for p in group:
            head = loaded.tokenizer.apply_chat_template(
                [{"role": "user", "content": p["text"]}], tokenize=False, add_generation_prompt=True
            )
            start = loaded.tokenizer(head)["input_ids"]
            logs = []
            for prefix in scored(prefixes):
                ids = torch.tensor([start + loaded.tokenizer(prefix)["input_ids"]])
                logp = torch.log_softmax(loaded.model(input_ids=ids).logits[0, :-1].double(), -1)
                logs.append(logp.gather(1, ids[0, 1:, None])[len(start) - 1 :].sum())
            total += float(torch.logsumexp(torch.stack(logs), 0).detach()) / len(group)
        return total

    def scored(texts: tuple[str, ...]) -> list[str]:
        return [t for t in texts if not any(t != other and t.startswith(other) for other in texts)]

    def margin() -> torch.Tensor:
        both = (log_probability(loaded, example["prompt"], example[side]) for side in ("response", "rejected"))
        return next(both) - next(both)

    reference = margin().detach()
    loss = -torch.nn.functional.logsigmoid(BETA * (margin() - reference))
    assert row["loss"] == pytest.approx(math.log(2), rel=1e-9)
    loss.backward()
    before, step = behavior(), 1e-2
    with torch.no_grad():
        for p in loaded.model.parameters():
            p.sub_(step * lr * p.grad)
    change = (behavior() - before) / step
    assert row["behavior:harmful"] == pytest.approx(change, rel=2e-3)


def test_both_answers_are_in_the_tables_and_in_the_report(run):
    shares = run.read_table("token_shares").to_pylist()
    assert {row["answer"] for row in shares} == {0, 1}
    first = shares[0]["example_id"]
    own = [r for r in shares if r["example_id"] == first and r["target"] == "score"]
    assert sum(r["share"] for r in own) == pytest.approx(values_of(run, "score")[first], rel=1e-5)
    texts = {row["example_id"]: row for row in run.read_table("examples").to_pylist()}
    assert texts[first]["rejected"] and texts[first]["rejected"] != texts[first]["response"]
    assert "[rejected]" in (run.folder / "report.html").read_text()


def test_every_estimator_agrees_about_preferences(study, run, tmp_path):
    exact = values_of(run, "behavior:harmless")
    largest = max(map(abs, exact.values()))
    for estimator in ("forward", "finite-step", "sketch"):
        other = influence(
            study.model.id,
            study.examples.path,
            study.prompts.path,
            ["behavior:harmless"],
            estimator=estimator,
            study=study,
            sae=study.sae.path,
            lr=study.attribution.lr,
            folder=tmp_path,
        )
        if estimator == "sketch":
            sizes = other.error("behavior:harmless")
            error = [other.by_example("behavior:harmless")[i] - exact[i] for i in other.example_ids]
            assert all(abs(e) < 5 * size for e, size in zip(error, sizes, strict=True))
            continue
        room = 0.05 if estimator == "finite-step" else 1e-6
        assert other.by_example("behavior:harmless") == pytest.approx(exact, abs=room * largest)


def test_a_reference_of_the_data_goes_before_that_of_the_model(study, tmp_path):
    row = json.loads(Path(study.examples.path).read_text().splitlines()[0])
    row |= {"ref_chosen_logps": -3.0, "ref_rejected_logps": -5.0}
    path = tmp_path / "given.jsonl"
    path.write_text(json.dumps(row) + "\n")
    scores = influence(
        study.model.id, path, study.prompts.path, ["behavior:harmful"], study=with_values(study, {"sae.path": None})
    )
    loaded = load_model(study.model.id, dtype="float64")
    margin = log_probability(loaded, row["prompt"], row["chosen"]) - log_probability(
        loaded, row["prompt"], row["rejected"]
    )
    expected = -torch.nn.functional.logsigmoid(BETA * (margin - 2.0))
    assert scores.losses[0] == pytest.approx(expected.item(), rel=1e-9)


def test_a_reference_of_another_scale_is_refused_where_it_leaves_no_slope(study, tmp_path):
    row = json.loads(Path(study.examples.path).read_text().splitlines()[0])
    path = tmp_path / "given.jsonl"
    for chosen, rejected in ((-1e6, -1.0), (-1.0, -1e6)):
        path.write_text(json.dumps(row | {"ref_chosen_logps": chosen, "ref_rejected_logps": rejected}) + "\n")
        with pytest.raises(UserError, match="of another scale than the model's") as caught:
            influence(
                study.model.id, path, study.prompts.path, ["behavior:harmful"], study=study.replace("sae.path", None)
            )
        assert row["id"] in str(caught.value.value)


def test_projections_on_one_answer_are_refused(study):
    with pytest.raises(UserError, match="reads one answer(.|\n)*concept_methods"):
        with_values(study, {"attribution.concept_methods": ["vector-filter"]})


def test_training_again_lowers_the_loss_of_preferences(study, run, tmp_path):
    some = with_values(study, {**SMALL_STEPS, "validation.designs": ["random"], "validation.subsets": 2})
    trained = do(some, run.folder, "validate")
    models = [row for row in trained.read_table("models").to_pylist() if row["design"] == "random"]
    for row in models:
        assert row["loss_before"] == pytest.approx(math.log(2), rel=1e-9) and row["loss_after"] < row["loss_before"]


def test_what_is_given_to_estimators_knows_its_reference(study, run):
    from taught.progress import SilentProgress

    ready = prepare(study, run, open_subject(study), read_data(study, SilentProgress()))
    assert all(z.link is not None and z.link.beta == BETA and not z.link.given for z in ready.inputs)


def test_exchanged_answers_pull_the_other_way(study, run):
    # At the reference the slope of both is beta / 2: exchanged, an example's influence is minus its own.
    some = with_values(study, {"curation.rule": "swap-k", "curation.k": 3, "curation.target": "behavior:harmful"})
    done = do(some, run.folder, "curate")
    rows = {row["example_id"]: row for row in done.read_table("curation").to_pylist()}
    swapped = [i for i, row in rows.items() if row["action"] == "swap"]
    scores = values_of(done, "behavior:harmful")
    assert set(swapped) == set(sorted(scores, key=lambda i: -scores[i])[:3])
    lines = [json.loads(line) for line in (run.folder / "swap.jsonl").read_text().splitlines()]
    before = {row["id"]: row for row in map(json.loads, Path(study.examples.path).read_text().splitlines())}
    for line in lines:
        assert (line["chosen"], line["rejected"]) == tuple(before[line["id"]][k] for k in ("rejected", "chosen"))
    other = influence(
        study.model.id,
        lines,
        study.prompts.path,
        ["behavior:harmful"],
        study=with_values(study, {"sae.path": None}),
        lr=study.attribution.lr,
    ).by_example("behavior:harmful")
    for i in swapped:
        assert other[i] == pytest.approx(-scores[i], rel=1e-6)
        assert rows[i]["change"] == pytest.approx(other[i] - scores[i], rel=1e-6)
    total = sum(rows[i]["change"] for i in swapped)
    assert done.read_json("curation")["change"] == pytest.approx(total, rel=1e-9)
    assert "to swap" in curation_change(done.read_json("curation"))


def test_away_from_the_reference_the_change_has_both_slopes():
    rows = curate(["a", "b"], ["", ""], [3.0, -1.0], rule="swap-k", k=1, slopes=[0.8, 0.5])
    # sigma(u) = .8: its own pull is .8, exchanged .2 the other way.
    assert rows[0]["change"] == pytest.approx(-3.0 * (0.8 + 0.2) / 0.8) and rows[1]["change"] == 0.0
    with pytest.raises(UserError, match="only preferences"):
        curate(["a"], [""], [1.0], rule="swap-k", k=1)
