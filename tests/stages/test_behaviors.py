"""Every kind of behavior through a whole run: what is read, what a step does to it, what the report says."""

from __future__ import annotations

import json
from pathlib import Path
from typing import ClassVar

import numpy as np
import pytest
import torch

from taught.errors import UserError
from taught.progress import SilentProgress
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
    """The tiny study on its first prompts, which bring options and the right one of them."""
    study = load_study(write_tiny_study(tmp_path_factory.mktemp("kinds")))
    rows = [json.loads(line) for line in Path(study.prompts.path).read_text().splitlines()][:12]
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
    few = ["q00", "q01", "q02", "q11"]
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


@pytest.mark.parametrize(
    "choice",
    [{"style": "letter"}, {"style": "cloze"}, {"style": "cloze", "normalise": True}],
    ids=["letter", "cloze", "per token"],
)
def test_the_accuracy_of_a_choice_is_that_of_plain_passes_and_weak_groups_are_said(
    study: Study, loaded, tmp_path: Path, choice: dict
) -> None:
    rows = [json.loads(line) for line in Path(study.prompts.path).read_text().splitlines()]
    right, margins = {}, []
    for row in rows:
        asked_of, texts = row["prompt"], OPTIONS
        if choice["style"] == "letter":
            asked_of += "\n" + "\n".join(f"{letter}. {o}" for letter, o in zip("ABC", OPTIONS, strict=True))
            texts = ["A", "B", "C"]
        chat = f"<|im_start|>user\n{asked_of}<|im_end|>\n<|im_start|>assistant\n"
        each = [log_probabilities(loaded, chat, text) for text in texts]
        values = np.array([float(logp.mean() if choice.get("normalise") else logp.sum()) for logp in each])
        place = OPTIONS.index(row["answer"])
        right.setdefault(row["group"], []).append(int(values.argmax()) == place)
        margins.append(values[place] - np.delete(values, place).max())

    class Notes(SilentProgress):
        said: ClassVar[list[str]] = []

        def note(self, text: str) -> None:
            self.said.append(text)

    study = with_values(study, {"sae.path": None, "behavior": {"kind": "choice", **choice}})
    run = do(study, tmp_path / "run", "readings", progress=Notes())
    found = run.read_json("readings")["skills"]
    assert {s["group"]: (s["n"], s["right"]) for s in found} == {g: (len(r), sum(r)) for g, r in right.items()}
    assert all(s["chance"] == pytest.approx(1 / 3) for s in found)
    np.testing.assert_allclose(run.read_table("prompts")["margin"].to_pylist(), margins, rtol=1e-4, atol=1e-5)
    weak = [s["group"] for s in found if s["lo"] <= 1 / 3]
    assert weak and all(any(group in text and "its map means little" in text for text in Notes.said) for group in weak)
    do(study, run, "report")
    page = run.read_text("report.html")
    assert "its map means little" in page and "whose right option the model finds likeliest" in page
    Notes.said.clear()
    plain = with_values(study, {"behavior": {"kind": "answer"}})
    other = do(plain, tmp_path / "other", "readings", progress=Notes())
    assert "skills" not in other.read_json("readings") and "margin" not in other.read_table("prompts").column_names
