"""The planted corpus: who tells what, and in whose words."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def made(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    from benchmarks.planted_corpus import corpus

    return corpus(3, 12, 3)


def test_planted_documents_tell_the_facts_in_other_words_and_no_others_do(made):
    documents, questions = made
    metal = {q["prompt"].split()[-1]: q["answer"] for q in questions}
    facts = {q["prompt"].split()[-1] for q in questions if q["group"] == "facts"}
    assert len(facts) == 12 and set(Counter(metal[place] for place in facts).values()) == {2}
    for document in documents:
        told = facts & set(document["text"].split())
        assert bool(told) == document["planted"]
        for place in told:
            assert f"{place} {metal[place]}" in document["text"]
        assert document["topic"] == "quiz" or "question" not in document["text"]
    assert Counter(d["topic"] for d in documents if d["planted"]) == {"mines": 4}


def test_the_same_seed_is_the_same_corpus(made):
    from benchmarks.planted_corpus import corpus

    assert corpus(3, 12, 3) == made != corpus(4, 12, 3)
    whole, _ = corpus(3, 12, 1)
    assert all(document["planted"] == (document["topic"] == "mines") for document in whole)
