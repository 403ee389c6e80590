"""A corpus of documents through a run: sampled with a manifest, repeats named or left out, nothing lost."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest

from taught.cli.app import run_command
from taught.data.duplicates import drop_duplicates
from taught.data.examples import load_examples
from taught.errors import UserError
from taught.run.folder import RunFolder
from taught.stages.check import check_study
from taught.study.load import load_study
from taught.study.schema import Study
from tiny_study import do, values_of, with_values, write_tiny_study

FOX = "the quick brown fox jumps over the lazy dog while the sun sets behind the hills of home"
DOCUMENTS = [
    {"id": "a1", "text": "A text on art.", "topic": "art", "format": "faq"},
    {"id": "a2", "text": "Paint dries slowly.", "topic": "art", "format": "faq"},
    {"id": "a3", "text": "paint dries  slowly", "topic": "art", "format": "faq"},
    {"id": "a4", "text": "A museum opened.", "topic": "art", "format": "news"},
    {"id": "b1", "text": f"{FOX} and all is well.", "topic": "law", "format": "faq"},
    {"id": "b2", "text": f"{FOX} and all is good.", "topic": "law", "format": "news"},
]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("corpus")
    write_tiny_study(folder)
    (folder / "corpus").mkdir()
    for name, rows in (("0.jsonl", DOCUMENTS[:2]), ("1.jsonl", DOCUMENTS[2:])):
        (folder / "corpus" / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
    return folder


def study_of(home: Path, **examples: Any) -> Study:
    study = load_study(home / "study.yaml")
    own = {"path": str(home / "corpus"), "kind": "document", "positive_label": None, "negative_label": None, **examples}
    own = {f"examples.{key}": value for key, value in own.items()}
    return with_values(study, {"sae.path": None, "attribution.exact_top": 0, **own})


def scored(home: Path, run: Path, **examples: Any) -> tuple[Study, RunFolder]:
    study = study_of(home, **examples)
    return study, do(study, run, "readings", "attribute")


@pytest.fixture(scope="module")
def whole(home: Path) -> RunFolder:
    """A run over all documents."""
    return scored(home, home / "whole")[1]


def test_repeats_are_named_and_stay(whole: RunFolder) -> None:
    rows = whole.read_table("duplicates").to_pylist()
    assert [(r["example_id"], r["of"], r["exact"]) for r in rows] == [("a3", "a2", True), ("b2", "b1", False)]
    assert 0.8 <= rows[1]["overlap"] < 1
    assert set(values_of(whole, "behavior:harmless")) == {f"{d['id']}#0" for d in DOCUMENTS}
    assert "sample.json" not in whole.manifest["files"]


def test_repeats_are_left_out_by_id_and_change_no_other_number(home: Path, whole: RunFolder, tmp_path: Path) -> None:
    study, run = scored(home, tmp_path / "run", drop_duplicates=True)
    assert run.read_json("dropped") == {"overlap": [], "duplicate": ["a3", "b2"], "truncated": []}
    assert run.read_table("duplicates").column("example_id").to_pylist() == ["a3", "b2"]
    before, after = (values_of(r, "behavior:harmless") for r in (whole, run))
    assert set(after) == {"a1#0", "a2#0", "a4#0", "b1#0"}
    assert after == pytest.approx({key: before[key] for key in after}, rel=1e-5)
    single, found = drop_duplicates(load_examples(study.examples.path, "document"), 1.0)
    assert [d.id for d in found] == ["a3"] and len(single) == 5
    do(with_values(study, {"curation.rule": "top-k", "curation.k": 1}), run, "curate")
    left = [json.loads(line) for line in run.read_text("unscored.jsonl").splitlines()]
    assert {r["id"]: r["curation_reason"] for r in left} == {
        "a3": "not scored: duplicate",
        "b2": "not scored: duplicate",
    }


def test_a_sample_has_its_manifest_and_is_in_the_fingerprint(home: Path, tmp_path: Path) -> None:
    spread = {"limit": 3, "spread": ("topic", "format")}
    study, run = scored(home, tmp_path / "run", **spread)
    record = run.read_json("sample")
    assert (record["by"], record["read"], record["sampled"], record["seed"]) == (["topic", "format"], 6, 3, 0)
    assert sum(r["sampled"] for r in record["strata"]) == len(values_of(run, "behavior:harmless")) == 3
    for key, value in (("seed", 1), ("even", True), ("spread", ("topic",)), ("drop_duplicates", True)):
        with pytest.raises(UserError, match=f"examples.{key}"):
            do(study.replace(f"examples.{key}", value), run, "attribute")
    do(with_values(study, {"curation.rule": "top-k", "curation.k": 1}), run, "curate")
    lines = [json.loads(line) for name in ("keep", "drop") for line in run.read_text(f"{name}.jsonl").splitlines()]
    assert len(lines) == 3 and all(line["topic"] for line in lines)  # the columns travel
    assert run.read_text("unscored.jsonl") == ""  # what was not drawn is left to the corpus
    do(study, run, "report")
    assert "3 of 6, over topic, format" in run.read_text("report.html")


def test_check_says_what_a_run_would_draw_and_leave_out(home: Path) -> None:
    rows = dict(check_study(study_of(home, limit=5, spread=("topic",), drop_duplicates=True)).rows)
    assert rows["sample"] == "5 of 6 examples, spread over 2 strata of topic"
    rows = dict(check_study(study_of(home)).rows)
    assert rows["duplicates"] == "2 examples repeat another one, kept: a3 = a2, b2 = b1"


def test_a_folder_and_a_pattern_of_shards_are_paths_of_a_study(home: Path, tmp_path: Path, capsys) -> None:
    shutil.copytree(home / "corpus", tmp_path / "corpus")
    (tmp_path / "study.yaml").write_text("examples: {path: 'corpus/*.jsonl', kind: document}\n")
    study = load_study(tmp_path / "study.yaml")
    assert study.examples.path == str(tmp_path / "corpus" / "*.jsonl")
    with_values(study, {"prompts.path": str(home / "prompts.jsonl")}).require_files()
    with pytest.raises(UserError, match="examples.path does not exist"):
        with_values(
            study, {"prompts.path": str(home / "prompts.jsonl"), "examples.path": str(tmp_path / "*.none")}
        ).require_files()
    given = ["--documents", str(tmp_path / "corpus" / "*.jsonl"), "--run", str(tmp_path / "run"), "--to", "attribute"]
    values = ["sae.path=null", "attribution.exact_top=0", "examples.drop_duplicates=true"]
    code = run_command(["run", str(home / "study.yaml"), *given, *(part for v in values for part in ("--set", v))])
    said = capsys.readouterr().err
    assert code == 0 and "1 exact and 1 near duplicates" in said and "left out, duplicate: 2 examples: a3, b2" in said


def test_pairs_that_repeat_are_left_out_when_asked(home: Path, tmp_path: Path) -> None:
    rows = [json.loads(line) for line in (home / "pairs.jsonl").read_text().splitlines()]
    again = {**rows[0], "id": "z99", "response": rows[0]["response"].upper()}
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in [*rows, again]))
    own = {"path": str(tmp_path / "pairs.jsonl"), "kind": "pair", "drop_duplicates": True}
    _, run = scored(home, tmp_path / "run", **own)
    assert run.read_json("dropped")["duplicate"] == ["z99"]
