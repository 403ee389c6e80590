"""Bins as a stage of a run of documents: what it reads, what it writes, what it refuses."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import numpy as np
import pytest
import torch

from taught.analysis.bins import Bin
from taught.cli.app import run_command
from taught.errors import UserError
from taught.run.folder import RunFolder
from taught.stages import BY_NAME, asked
from taught.stages.bins import Documents
from taught.stages.check import check_study
from taught.stages.ready import MOST_EFFECTS, wanted_targets
from taught.stages.subject import open_subject
from taught.study.load import load_study
from taught.study.schema import Study
from tiny_study import do, with_values, write_tiny_study

TOPICS, FORMATS = ("locks", "ships", "bread"), ("news", "essay")
FAST = {"permutations": 99, "bootstrap": 40, "minimum": 3}


def documents() -> list[dict[str, Any]]:
    """Five documents of each topic and format; some are two windows of 32 tokens, one has no label."""
    rows = [
        {"id": f"{topic[0]}{format[0]}{n}", "text": f"On {topic}, a {format} {n}. " + n * "So on. ", "topic": topic}
        | {"format": format, "year": 1900 + n, "score": n + 0.5, "same": "x", "nested": {"a": n}}
        for topic in TOPICS
        for format in FORMATS
        for n in range(5)
    ]
    rows[3]["topic"] = None
    return rows


def written(folder: Path, rows: list[dict[str, Any]]) -> Path:
    path = folder / "documents.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


@pytest.fixture(scope="module")
def study(tmp_path_factory: pytest.TempPathFactory) -> Study:
    """Documents, and how likely two groups of texts are after a step on each."""
    folder = tmp_path_factory.mktemp("documents")
    study = load_study(write_tiny_study(folder))
    return with_values(
        study,
        {
            "sae.path": None,
            "prompts.positive_group": None,
            "prompts.negative_group": None,
            "behavior": {"kind": "loss", "of": "text"},
            "prompts.limit": 12,
            "examples.path": str(written(folder, documents())),
            "examples.kind": "document",
            "examples.max_tokens": 32,
            "examples.positive_label": None,
            "examples.negative_label": None,
            "attribution.exact_top": 1,
            "bins": {"columns": ["topic", "format"], **FAST},
        },
    )


@pytest.fixture(scope="module")
def run(study: Study, tmp_path_factory: pytest.TempPathFactory) -> RunFolder:
    return do(study, tmp_path_factory.mktemp("run") / "run", "readings", "attribute", "bins")


@pytest.fixture
def again(study: Study, run: RunFolder, tmp_path: Path) -> Callable[..., RunFolder]:
    """The stage of the same run with other settings."""

    def made(**bins: Any) -> RunFolder:
        return do(study.replace("bins", FAST | bins), run.folder, "bins")

    return made


def rows_of(run: RunFolder, name: str = "bins", **wanted: Any) -> list[dict[str, Any]]:
    every = run.read_table(name).to_pylist()
    return [row for row in every if all(row[key] == value for key, value in wanted.items())]


def test_bins_run_where_they_are_asked_for():
    assert "bins" not in [stage.name for stage in asked(Study())]
    assert "bins" in [stage.name for stage in asked(Study().replace("bins", True))]
    with pytest.raises(UserError) as error:
        asked(Study(), only="bins")
    assert "bins=true" in error.value.fix


def test_the_value_of_a_document_is_a_step_on_its_mean_loss(study: Study, again):
    """By plain autograd: the loss is the mean over all scored tokens of all windows of the document."""
    run = again()
    subject = open_subject(study)
    model, tokenizer = subject.loaded.model.double(), subject.loaded.tokenizer
    prompts = [row for row in run.read_table("prompts").to_pylist() if row["group"] == "harmless"]
    row = documents()[-1]
    ids = tokenizer(row["text"]).input_ids
    windows = [ids[at : at + 32] for at in range(0, len(ids) - 1, 31)]
    assert len(windows) == 2

    def loss(tokens: list[int]) -> torch.Tensor:
        logp = model(torch.tensor([tokens])).logits[0, :-1].log_softmax(-1)
        return -logp[torch.arange(len(tokens) - 1), torch.tensor(tokens[1:])]

    def gradient(value: torch.Tensor) -> torch.Tensor:
        return torch.cat([g.flatten() for g in torch.autograd.grad(value, list(model.parameters()))])

    whole = gradient(torch.cat([loss(window) for window in windows]).mean())
    texts = [tokenizer(prompt["text"]).input_ids for prompt in prompts]
    query = gradient(torch.stack([loss(text).mean() for text in texts]).mean())
    expected = -study.attribution.lr * float(whole @ query)
    (found,) = rows_of(run, "bin_documents", document_id=row["id"], benchmark="harmless")
    assert found["n_examples"] == 2
    assert found["value"] == pytest.approx(expected, rel=1e-3)


def test_tables_hold_a_row_for_each_bin_and_benchmark(again):
    run = again()
    assert run.footer("bins").schema.to_arrow_schema().names == list(Bin._fields)
    record = run.read_json("bins")
    assert record["documents"] == 30 and record["examples"] > 30
    assert record["questions"] == {"harmful": 8, "harmless": 4}
    assert record["unlabelled"] == {"topic": ["ln3"], "format": []}
    found = rows_of(run, level="bin", benchmark="harmful")
    assert {(row["row"], row["column"]) for row in found} == {
        *((topic, format) for topic in TOPICS for format in FORMATS),
        ("unknown", "news"),
    }
    values = {row["document_id"]: row["value"] for row in rows_of(run, "bin_documents", benchmark="harmful")}
    for row in found:
        own = [values[i] for i in values if i.startswith(row["row"][0] + row["column"][0]) and i != "ln3"]
        if row["row"] == "unknown":
            assert not row["tested"] and row["p"] is None and row["mean"] == pytest.approx(values["ln3"])
            continue
        assert row["n_documents"] == len(own) and row["mean"] == pytest.approx(np.mean(own))
        assert row["trimmed_lo"] <= row["trimmed"] <= row["trimmed_hi"]
        assert set(row["examples"]) <= set(values)
    assert {row["level"] for row in rows_of(run)} == {"bin", "row", "column"}
    (contrast,) = rows_of(run, "contrasts", level="bin", row="bread", column="news")
    assert contrast["benchmark"] == "harmful - harmless"
    z = {row["benchmark"]: row["z"] for row in rows_of(run, level="bin", row="bread", column="news")}
    assert contrast["z"] == pytest.approx(z["harmful"] - z["harmless"])
    (profile,) = record["profiles"]
    assert (profile["a"], profile["b"], profile["bins"]) == ("harmful", "harmless", 6)
    assert profile["plain"].keys() == {"value", "lo", "hi"}


def test_single_questions_are_kept_for_bins_and_can_be_left_out(study: Study, run: RunFolder, again):
    assert "prompt_effects.safetensors" in run.manifest["files"]
    with_questions, without = rows_of(again()), rows_of(again(questions=False))
    assert run.open(run.folder).read_json("bins")["questions"] is None
    for a, b in zip(with_questions, without, strict=True):
        assert a["trimmed"] == pytest.approx(b["trimmed"])
        assert not a["tested"] or a["trimmed_lo"] != pytest.approx(b["trimmed_lo"])
    # It is in what attribute depends on, so other intervals are never taken for these.
    with pytest.raises(UserError, match="bins.questions"):
        do(study.replace("bins.questions", False), run.folder, "attribute")


def test_single_questions_are_kept_up_to_a_number_of_them(study: Study):
    readings = SimpleNamespace(policy=None, n=10)
    assert wanted_targets(study, readings, examples=10) == ["behavior:*", "prompt:*"]
    assert wanted_targets(study, readings, examples=MOST_EFFECTS) == ["behavior:*"]
    assert wanted_targets(study.replace("bins.questions", False), readings, examples=10) == ["behavior:*"]
    named = study.replace("attribution.targets", ["behavior:*", "prompt:*"])
    assert wanted_targets(named, readings, examples=MOST_EFFECTS) == ["behavior:*", "prompt:*"]


def test_another_column_takes_no_model_and_no_fresh(again, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr("taught.stages.subject.load_model", None)
    found = again(columns=["topic"], contrasts=[])
    assert {(row["level"], row["column"]) for row in rows_of(found)} == {("bin", None)}
    assert rows_of(found, "contrasts") == []
    assert {row["row"] for row in rows_of(again(columns=["year"]))} == {str(1900 + n) for n in range(5)}


def by_length(column: str, texts: list[str]) -> list[str]:
    """For ``test_bins:by_length``."""
    return ["long" if len(text) > 32 else "short" for text in texts]


def test_a_classifier_makes_the_bins_that_the_data_lack(again):
    found = again(columns=["size", "topic"], classifier=f"{__name__}:by_length")
    texts = {row["id"]: row["text"] for row in documents()}
    for row in rows_of(found, "bin_documents"):
        assert row["row"] == by_length("size", [texts[row["document_id"]]])[0]
    assert found.read_json("bins")["classifier"] == f"{__name__}:by_length"


def test_examples_that_are_no_documents_are_mapped_by_their_own_columns(study: Study, tmp_path: Path):
    """Pairs, by a column that every reader of examples knows."""
    tiny = load_study(write_tiny_study(tmp_path / "pairs")).replace("sae.path", None)
    tiny = with_values(tiny, {"prompts.limit": 6, "attribution.exact_top": 0, "bins": {"columns": ["label"], **FAST}})
    run = do(tiny, tmp_path / "run", "readings", "attribute", "bins")
    assert {row["row"] for row in rows_of(run)} == {"harmful-refusal", "harmless-compliance"}
    assert run.read_json("bins")["documents"] == 8


def test_windows_are_weighed_by_their_scored_tokens(run: RunFolder):
    found = Documents.read(run)
    scores = {row["example_id"]: row for row in run.read_table("summary").to_pylist()}
    values = np.array([scores[i]["behavior:harmful"] for i in found.example_ids])
    mean = dict(zip(found.ids, found.mean(values), strict=True))
    own = [row for name, row in scores.items() if name.startswith("bn4#")]
    expected = np.average([r["behavior:harmful"] for r in own], weights=[r["n_scored"] for r in own])
    assert len(own) == 2 and mean["bn4"] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("settings", "words", "named"),
    [
        ({"columns": ["topik"]}, "no such column", "topic, format"),
        ({"columns": ["nested"]}, "neither text nor a number", "ln0"),
        ({"columns": ["same"]}, "one bin", "bins.columns"),
        ({"minimum": 50}, "enough documents", "bins.minimum"),
        ({"contrasts": ["harmful - harmles"]}, "contrast", "harmful, harmless"),
        ({"taxonomy": "weborganizer"}, "weborganizer", "literature"),
    ],
)
def test_what_cannot_be_mapped_is_refused_by_name(again, settings: dict[str, Any], words: str, named: str):
    with pytest.raises(UserError, match=words) as error:
        again(**settings)
    assert named in str(error.value)


def test_a_file_that_has_changed_is_refused(study: Study, run: RunFolder, tmp_path: Path):
    other = study.replace("examples.path", str(written(tmp_path, documents()[1:])))
    with pytest.raises(UserError, match="changed since"):
        do(other, run.folder, "bins")


def test_bins_without_a_benchmark_are_refused_before_the_model_is_read(study: Study):
    with pytest.raises(UserError, match="benchmarks") as error:
        with_values(study, {"attribution.targets": ["prompt:q01"]})
    assert "behavior:*" in error.value.fix
    with_values(study, {"attribution.targets": ["prompt:q01", "behavior:*"]})
    with pytest.raises(UserError, match="one column or by two"):
        study.replace("bins.columns", ["a", "b", "c"])


def test_check_and_attribute_say_what_bins_would_refuse(study: Study, tmp_path: Path):
    assert check_study(study).problems == []
    study = with_values(study, {"bins.columns": ["topik"], "bins.contrasts": ["harmful - nobody"]})
    assert any("no such column" in problem for problem in check_study(study).problems)
    named = study.replace("bins.columns", ["topic"])
    assert any("harmful - nobody" in problem for problem in check_study(named).problems)
    with pytest.raises(UserError, match="no such column"):
        do(study, tmp_path / "run", "readings", "attribute")


def test_the_tables_can_be_shown(again, capsys: pytest.CaptureFixture[str]):
    folder = str(again().folder)
    question = "SELECT row, \"column\", rank FROM bins WHERE benchmark = 'harmful' AND level = 'bin' AND rank = 1"
    assert run_command(["show", folder, question]) == 0
    shown = capsys.readouterr().out
    assert any(topic in shown for topic in TOPICS)
    assert run_command(["show", folder, "contrasts"]) == 0


def test_the_stage_stands_between_attribute_and_report():
    stage = BY_NAME["bins"]
    assert stage.needs == ("attribute",) and stage.light and "bins" in BY_NAME["report"].uses


def test_a_map_drops_nothing_unless_it_is_asked_to():
    study = Study().replace("bins", {"columns": ["topic"]})
    assert "curate" not in [stage.name for stage in asked(study)]
    assert "curate" in [stage.name for stage in asked(study.replace("curation.k", 3))]
    assert "curate" in [stage.name for stage in asked(Study())]
