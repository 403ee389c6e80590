"""Documents that repeat one another."""

from __future__ import annotations

import random

import pytest

from taught.data.duplicates import find_duplicates
from taught.data.words import shingles, words

WORDS = [f"w{i}" for i in range(4000)]


def text(seed: int, n: int = 120) -> list[str]:
    return random.Random(seed).choices(WORDS, k=n)


def jaccard(a: list[str], b: list[str], n: int = 5) -> float:
    sets = [{tuple(t[i : i + n]) for i in range(len(t) - n + 1)} for t in (a, b)]
    return len(sets[0] & sets[1]) / len(sets[0] | sets[1])


def test_exact_repeats_are_named_whatever_their_spelling() -> None:
    found = find_duplicates({"b": "The  sky is Blue.", "a": "the sky is blue", "c": "The sea is blue."})
    assert [(d.id, d.of, d.exact, d.overlap) for d in found] == [("b", "a", True, 1.0)]


def test_pairs_at_or_above_the_overlap_are_found_and_others_are_not() -> None:
    # One word changed in k places breaks about 5 k of 116 passages.
    texts, pairs = {}, {}
    for k in range(12):
        for copy in range(10):
            base = text(100 * k + copy)
            changed = list(base)
            for place in range(k):
                changed[9 * place + 5] = "other"
            texts |= {f"{k}-{copy}-a": " ".join(base), f"{k}-{copy}-b": " ".join(changed)}
            pairs[f"{k}-{copy}-b"] = jaccard(base, changed)
    found = {d.id: d for d in find_duplicates(texts, 0.6)}
    expected = {id for id, overlap in pairs.items() if overlap >= 0.6}
    assert 0 < len(expected) < len(pairs) and set(found) == expected
    assert all(d.of == id.replace("b", "a") for id, d in found.items())
    assert all(d.exact or d.overlap == pytest.approx(pairs[id], abs=1e-12) for id, d in found.items())


def test_what_stays_repeats_nothing_whatever_the_order() -> None:
    # A chain: each is like the one before it, the ends are not alike.
    chain = [text(7)]
    for step in range(1, 6):
        chain.append([*chain[-1][6:], *text(1000 + step, 6)])
    texts = {f"d{i}": " ".join(t) for i, t in enumerate(chain)} | {"x0": " ".join(chain[3]).upper()}
    found = find_duplicates(texts, 0.8)
    assert found == find_duplicates(dict(reversed(texts.items())), 0.8)
    stay = [i for i in range(len(chain)) if f"d{i}" not in {d.id for d in found}]
    assert 1 < len(stay) < len(chain)
    assert all(jaccard(chain[i], chain[j]) < 0.8 for i in stay for j in stay if i < j)
    kept = {f"d{i}" for i in stay}
    assert all(d.of in kept for d in found) and "x0" in {d.id for d in found}


def test_texts_without_words_and_without_spaces() -> None:
    assert find_duplicates({"a": "?!", "b": "...", "c": ""}) == []
    long = "今日は天気がいいから散歩しましょうと彼女は言いましたが彼は家にいたいと答えた"
    found = find_duplicates({"a": long, "b": long[:-1] + "の", "c": long[::-1]})
    assert [(d.id, d.of, d.exact) for d in found] == [("b", "a", False)]


def test_a_short_text_is_one_passage() -> None:
    assert len(shingles(words("Two words"), 5)) == 1
    assert len(shingles([], 5)) == 0
    assert len(shingles(words("a b c d e f"), 5)) == 2
    assert shingles(["a", "b"], 2)[0] != shingles(["b", "a"], 2)[0]
