"""Concepts as a stage: every source, from prompts and from examples, and what is refused."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.numpy import save_file

from taught import stages
from taught.errors import UserError
from taught.features.concept import load_concept
from taught.stages import ConceptRequest
from taught.stages.subject import open_subject, study_prompts
from taught.study.load import load_study
from taught.study.schema import Study
from tiny_study import BLOCK, TOPICS, write_tiny_study
from tiny_study import WIDTH as STUDY_WIDTH

# --- the command -------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    folder = tmp_path_factory.mktemp("concept")
    study = load_study(write_tiny_study(folder))
    return study.replace("readout.position", "mean_user")


def plain_pooled(study: Study, block: int):
    """Pooled h [N, D] of each prompt by its own plain pass, and which are positive."""
    subject, rows, positive = open_subject(study), [], []
    for prompt in study_prompts(study):
        encoded = subject.chat.encode_prompt(prompt.text, prompt.id)
        ids = torch.tensor([encoded.input_ids])
        with torch.no_grad():
            out = subject.loaded.model(input_ids=ids, output_hidden_states=True)
        rows.append(out.hidden_states[block + 1][0, slice(*encoded.user_span)].mean(0))
        positive.append(prompt.group == "harmful")
    return torch.stack(rows).double().numpy(), np.array(positive)


def test_the_command_makes_the_difference_of_means_of_plain_passes(study: Study, tmp_path: Path):
    made = stages.concept(study, tmp_path / "c", ConceptRequest("difference", block=0))
    X, positive = plain_pooled(study, 0)
    v = X[positive].mean(0) - X[~positive].mean(0)
    np.testing.assert_allclose(made.direction, v / np.linalg.norm(v), atol=1e-5)
    assert made.card["norm"] == pytest.approx(np.linalg.norm(v), rel=1e-4)
    assert (made.name, made.block, made.position) == ("c", 0, "mean_user")
    assert made.provenance["groups"] == ["harmful", "harmless"]
    assert made.weights["sha256"]
    assert np.array_equal(load_concept(tmp_path / "c").direction, made.direction)


def test_every_source_gives_a_concept_and_a_sweep_a_row_for_every_block(study, tmp_path: Path):
    save_file({"v": np.ones(STUDY_WIDTH, np.float32)}, tmp_path / "v.safetensors")
    for number, (source, options) in enumerate(
        [
            ("probe", {"sweep": True}),
            ("probe", {"method": "ridge"}),
            ("feature:3", {}),
            ("feature:3=0.5,20=-2", {"norm": "none"}),
            (f"file:{tmp_path}/v.safetensors:v", {}),
        ]
    ):
        made = stages.concept(study, tmp_path / str(number), ConceptRequest(source, **options))
        assert made.block == BLOCK and made.width == STUDY_WIDTH
        if options.get("norm") != "none":
            assert np.linalg.norm(made.direction) == pytest.approx(1)
        if "sweep" in options:
            assert [row["block"] for row in made.card["sweep"]] == [0, 1, 2]
            assert made.card["sweep"][BLOCK]["auc"] == made.card["auc"]["value"]
    four = load_concept(tmp_path / "3").direction  # features 3 and 20 are e_3 and -e_4
    expected = np.zeros(STUDY_WIDTH)
    expected[3], expected[4] = 0.5, 2.0
    np.testing.assert_allclose(four, expected)


def write_examples(file: Path, rows: int = 24, **changes) -> Path:
    """Answers of three lengths, half of them with an exclamation."""
    lines = [
        {
            "id": f"e{n}",
            "prompt": f"Say {TOPICS[n % 10]} {n}?",
            "response": f"{'Arr! ' if n % 2 else ''}{TOPICS[(n * 3) % 10]}{' and so on' * (n % 3)}.",
            "label": "with" if n % 2 else "without",
            **changes,
        }
        for n in range(rows)
    ]
    file.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return file


WITH = {"positive": "with", "negative": "without"}


@pytest.mark.parametrize("tokens", ["mean_response", "last_response"])
def test_a_concept_from_examples_is_the_difference_of_plain_passes_at_their_responses(
    study: Study, tmp_path: Path, tokens: str
):
    file = write_examples(tmp_path / "e.jsonl")
    request = ConceptRequest("difference", block=0, tokens=tokens, examples=file, force=True, **WITH)
    made = stages.concept(study, tmp_path / "c", request)
    subject, found, positive = open_subject(study), [], []
    for row in map(json.loads, file.read_text().splitlines()):
        text = f"<|im_start|>user\n{row['prompt']}<|im_end|>\n<|im_start|>assistant\n"
        start = len(subject.loaded.tokenizer(text).input_ids)
        ids = subject.loaded.tokenizer(f"{text}{row['response']}<|im_end|>").input_ids
        with torch.no_grad():
            out = subject.loaded.model(torch.tensor([ids]), output_hidden_states=True)
        h = out.hidden_states[1][0, start:].double()
        found.append((h.mean(0) if tokens == "mean_response" else h[-1]).numpy())
        positive.append(row["label"] == "with")
    X, s = np.stack(found), np.array(positive)
    v = X[s].mean(0) - X[~s].mean(0)
    np.testing.assert_allclose(made.direction, v / np.linalg.norm(v), atol=1e-5)
    assert (made.card["n_positive"], made.card["n_negative"]) == (12, 12)
    assert made.provenance["labels"] == ["with", "without"]
    assert made.provenance["examples sha256"] and "groups" not in made.provenance


def test_examples_judge_directions_that_come_from_elsewhere(study: Study, tmp_path: Path):
    file = write_examples(tmp_path / "e.jsonl")
    made = stages.concept(study, tmp_path / "c", ConceptRequest("feature:3", examples=file, **WITH))
    assert made.card["n_positive"] == 12 and not made.card["held_out"]
    swept = stages.concept(
        study, tmp_path / "s", ConceptRequest("probe", examples=file, sweep=True, force=True, **WITH)
    )
    assert [row["block"] for row in swept.card["sweep"]] == [0, 1, 2]


@pytest.mark.parametrize(
    ("changes", "sides", "said"),
    [
        ({}, {}, r"present or absent(.|\n)*--positive"),
        ({"label": "with"}, WITH, "24 rows"),
        ({"response": ""}, WITH, "empty"),
    ],
)
def test_examples_that_say_nothing_are_refused(study, tmp_path: Path, changes, sides, said):
    file = write_examples(tmp_path / "e.jsonl", **changes)
    with pytest.raises(UserError, match=said):
        stages.concept(study, tmp_path / "c", ConceptRequest("probe", examples=file, **sides))
    assert not (tmp_path / "c").exists()


def test_examples_that_are_examples_or_prompts_of_the_study_are_refused(study, tmp_path: Path):
    example = json.loads(Path(study.examples.path).read_text().splitlines()[0])
    prompt = json.loads(Path(study.prompts.path).read_text().splitlines()[0])
    for text, said in ((example["prompt"], "are examples of the study"), (prompt["prompt"], "evaluation")):
        file = write_examples(tmp_path / "e.jsonl", prompt=text)
        with pytest.raises(UserError, match=said):
            stages.concept(study, tmp_path / "c", ConceptRequest("probe", examples=file, **WITH))
        rows = [json.loads(line) for line in file.read_text().splitlines()]
        others = json.loads(write_examples(file).read_text().splitlines()[0])["prompt"]
        rows[4:] = [row | {"prompt": others} for row in rows[4:]]
        file.write_text("".join(json.dumps(row) + "\n" for row in rows))
        made = stages.concept(
            study.replace("examples.drop_overlap", True),
            tmp_path / "d",
            ConceptRequest("difference", examples=file, force=True, **WITH),
        )
        assert made.card["n_positive"] + made.card["n_negative"] == 20


def test_the_command_line_reads_examples(taught_here, study, tmp_path: Path):
    file = write_examples(tmp_path / "e.jsonl")
    done = taught_here(
        "concept",
        str(Path(study.model.id).parent),
        "--source",
        "probe",
        "--examples",
        str(file),
        "--positive",
        "with",
        "--negative",
        "without",
        "--force",
        "--out",
        str(tmp_path / "c"),
        "--quiet",
    )
    assert done.returncode == 0, done.stderr
    assert "24 examples" in done.stdout


def write_control_vector(file: Path, tensors: dict[str, np.ndarray]) -> str:
    """As repeng writes it."""
    from gguf import GGUFWriter

    writer = GGUFWriter(file, "controlvector")
    writer.add_string("controlvector.model_hint", "llama")
    for name, value in tensors.items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return str(file)


def test_a_control_vector_is_read_after_the_block_it_is_added_to(study: Study, tmp_path: Path):
    rows = np.random.default_rng(0).normal(size=(3, STUDY_WIDTH)).astype(np.float32)
    stored = {f"direction.{n}": row for n, row in enumerate(rows)}
    stored["direction.2"] = rows[2].astype(np.float16)
    file = write_control_vector(tmp_path / "v.gguf", stored)
    for source, options, block in (
        (f"file:{file}", {}, BLOCK),
        (f"file:{file}", {"block": 0}, 0),
        (f"file:{file}:direction.2", {}, 2),
        (f"file:{file}:direction.2", {"block": 2}, 2),
    ):
        made = stages.concept(study, tmp_path / "c", ConceptRequest(source, **options))
        assert made.block == block
        expected = rows[block] / np.linalg.norm(rows[block])
        np.testing.assert_allclose(made.direction, expected, atol=1e-3 if block == 2 else 1e-7)
        assert made.provenance["tensor"] == f"direction.{block}"


@pytest.mark.parametrize(
    ("tensor", "options", "message"),
    [
        (":direction.0", {"block": 1}, "of another block"),
        (":direction.x", {}, "no direction of a control vector"),
        (":direction.1", {}, "which tensor of the file"),
        (":direction.9", {}, "no such block"),
        ("", {}, "which tensor of the file"),  # the SAE's block is not in it
    ],
)
def test_a_control_vector_that_does_not_fit_is_refused(study: Study, tmp_path: Path, tensor, options, message):
    file = write_control_vector(
        tmp_path / "v.gguf", {f"direction.{n}": np.ones(STUDY_WIDTH, np.float32) for n in (0, 2)}
    )
    with pytest.raises(UserError, match=message):
        stages.concept(study, tmp_path / "c", ConceptRequest(f"file:{file}{tensor}", **options))
    assert not (tmp_path / "c").exists()


def test_a_file_that_is_no_control_vector_is_refused(study: Study, tmp_path: Path):
    (tmp_path / "v.gguf").write_bytes(b"GGUF, but not really")
    with pytest.raises(UserError, match="cannot be read"):
        stages.concept(study, tmp_path / "c", ConceptRequest(f"file:{tmp_path}/v.gguf"))
    with pytest.raises(UserError, match="cannot be read"):
        stages.concept(study, tmp_path / "c", ConceptRequest(f"file:{tmp_path}/none.gguf"))


@pytest.mark.parametrize(
    ("request_", "message"),
    [
        (ConceptRequest("guess"), "unknown source"),
        (ConceptRequest("feature:"), "unknown source"),
        (ConceptRequest("probe:1"), "unknown source"),
        (ConceptRequest("feature:x"), "not readable"),
        (ConceptRequest("feature:1,1"), "not readable"),
        (ConceptRequest("feature:3", block=0), "block of its SAE"),
        (ConceptRequest("feature:3", sweep=True), "goes with difference and probe"),
        (ConceptRequest("probe", block=7), "no such block"),
        (ConceptRequest("probe", position="max_user"), "mean_user"),
    ],
)
def test_what_cannot_be_made_is_said(study: Study, tmp_path: Path, request_, message):
    with pytest.raises(UserError, match=message):
        stages.concept(study, tmp_path / "c", request_)
    assert not (tmp_path / "c").exists()


def test_the_command_line_shows_the_card_and_the_sweep(taught_here, study, tmp_path: Path):
    folder = Path(study.model.id).parent
    done = taught_here(
        "concept",
        str(folder),
        "--source",
        "difference",
        "--position",
        "mean_user",
        "--sweep",
        "--out",
        str(tmp_path / "c"),
        "--quiet",
    )
    assert done.returncode == 0, done.stderr
    assert "c: block 1, AUC" in done.stdout and "30 prompts" in done.stdout
    assert json.loads((tmp_path / "c" / "concept.json").read_text())["format"]
