"""Every kind of behavior through a whole run: what is read, what a step does to it, what the report says."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from taught.errors import UserError
from taught.stages import asked
from taught.stages.subject import open_subject
from taught.study.load import load_study
from taught.study.schema import Study
from tiny_study import do, values_of, with_values, write_tiny_study

OPTIONS = ["In the town", "At sea, far away", "No"]
KINDS = {
    "answer": {"kind": "answer"},
    "answer, mean": {"kind": "answer", "reduce": "mean"},
    "choice by letter": {"kind": "choice"},
    "choice by text": {"kind": "choice", "style": "cloze", "normalise": True},
    "loss": {"kind": "loss"},
    "loss of text": {"kind": "loss", "of": "text"},
}


@pytest.fixture(scope="module")
def study(tmp_path_factory) -> Study:
    """The tiny study on prompts that bring options and the right one of them."""
    study = load_study(write_tiny_study(tmp_path_factory.mktemp("kinds")))
    rows = [json.loads(line) for line in Path(study.prompts.path).read_text().splitlines()]
    for number, row in enumerate(rows):
        row |= {"options": OPTIONS, "answer": OPTIONS[number % 3]}
    Path(study.prompts.path).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return study.replace("attribution.exact_top", 8)


@pytest.fixture(scope="module")
def loaded(study):
    subject = open_subject(study)
    return subject.loaded.model, subject.loaded.tokenizer


def log_probabilities(loaded, before: str, after: str) -> torch.Tensor:
    """Of each token of a text behind another, by a plain pass."""
    model, tokenizer = loaded
    ids, tail = tokenizer(before).input_ids, tokenizer(after).input_ids
    with torch.no_grad():
        logp = model(torch.tensor([[*ids, *tail]])).logits[0].double().log_softmax(-1)
    return torch.stack([logp[len(ids) - 1 + j, token] for j, token in enumerate(tail)])


def expected_y(loaded, name: str, row: dict) -> float:
    prompt = row["prompt"]
    if name == "choice by letter":
        prompt += "\n" + "\n".join(f"{letter}. {option}" for letter, option in zip("ABC", OPTIONS, strict=True))
    chat = f"<|im_start|>user\n{prompt}<|im_end|>\n<|im_start|>assistant\n"
    right = OPTIONS.index(row["answer"])
    if name == "loss of text":
        return -float(log_probabilities(loaded, prompt[0], prompt[1:]).mean())
    if name.startswith("choice"):
        texts = "ABC" if name == "choice by letter" else OPTIONS
        each = [log_probabilities(loaded, chat, text) for text in texts]
        value = torch.stack([logp.sum() if name == "choice by letter" else logp.mean() for logp in each])
        others = [value[i] for i in range(3) if i != right]
        return float(value[right] - torch.logsumexp(torch.stack(others), 0))
    logp = log_probabilities(loaded, chat, row["answer"])
    return {"answer": logp.sum(), "answer, mean": logp.mean(), "loss": -logp.mean()}[name].item()


@pytest.mark.parametrize("name", KINDS)
def test_a_whole_run_on_it(study: Study, loaded, tmp_path: Path, name: str) -> None:
    """Without an SAE where the text is read by itself: there is no user's turn to read features at."""
    study = study.replace("behavior", KINDS[name])
    if name == "loss of text":
        study = with_values(study, {"sae.path": None, "curation.rule": "top-k", "curation.k": 2})
    run = do(study, tmp_path / "run", *(stage.name for stage in asked(study)))
    rows = {row["id"]: row for row in map(json.loads, Path(study.prompts.path).read_text().splitlines())}
    read = {row["prompt_id"]: row["y"] for row in run.read_table("prompts").to_pylist()}
    few = ["q00", "q01", "q02", "q29"]
    assert {i: read[i] for i in few} == pytest.approx({i: expected_y(loaded, name, rows[i]) for i in few}, abs=1e-4)
    assert np.isfinite(list(read.values())).all()
    ranked = run.read_json("attribution")["ranked_by"]
    assert ranked == ("behavior:harmful" if name == "loss of text" else "score")
    values = values_of(run, ranked)
    largest = max(map(abs, values.values()))
    for row in run.read_table("summary").to_pylist():
        assert row["step_score"] == pytest.approx(values[row["example_id"]], rel=0.2, abs=0.05 * largest)
    assert values_of(run, "behavior:harmless").keys() == values.keys()
    about = run.read_json("readings")["behavior"]
    page = run.read_text("report.html")
    assert "z00" in page and f"{about['meaning']} ({about['unit']})".replace("'", "&#39;") in page
    run.verify()


@pytest.mark.parametrize(("kind", "column"), [("answer", "answer"), ("choice", "options"), ("loss", "answer")])
def test_prompts_that_lack_what_it_needs_are_named(study: Study, tmp_path: Path, kind: str, column: str) -> None:
    rows = [json.loads(line) for line in Path(study.prompts.path).read_text().splitlines()]
    del rows[4][column]
    (tmp_path / "prompts.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    study = with_values(study, {"behavior": kind, "prompts.path": str(tmp_path / "prompts.jsonl")})
    with pytest.raises(UserError, match="q04"):
        do(study, tmp_path / "run", "readings")


def test_another_behavior_is_another_result(study: Study, tmp_path: Path) -> None:
    run = do(study.replace("behavior", "answer"), tmp_path / "run", "readings")
    with pytest.raises(UserError, match=r"behavior: was 'answer', now 'loss'"):
        do(study.replace("behavior", "loss"), run, "readings")
    with pytest.raises(UserError, match=r"behavior\.reduce"):
        do(study.replace("behavior", KINDS["answer, mean"]), run, "readings")
