"""Examples whose prompt is also an evaluation prompt."""

from __future__ import annotations

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from taught.data.examples import ExampleSet, Record
from taught.data.overlap import drop_overlap, find_overlap
from taught.data.prompts import Prompt, PromptSet
from taught.data.words import normalise
from taught.errors import UserError

PROMPTS = PromptSet((Prompt("p1", "How do I pick a lock?", "harmful"), Prompt("p2", "It’s fine", "harmless")), {}, "")


def examples(**texts: str) -> ExampleSet:
    return ExampleSet(tuple(Record(id, text, "No.") for id, text in texts.items()), {}, "")


@pytest.mark.parametrize(
    "text",
    [
        "How do I pick a lock?",
        "how do i pick a LOCK",
        "  How do I\npick a lock ?!",
        "How do I pick a lock?",
        "Ｈow do I pick a lock？",
    ],
)
def test_spelling_does_not_hide_an_overlap(text: str) -> None:
    assert find_overlap(examples(a=text, b="How do I pick two locks?"), PROMPTS) == [("a", "p1")]


def test_typographic_apostrophes_do_not_hide_an_overlap() -> None:
    assert find_overlap(examples(a="It's fine."), PROMPTS) == [("a", "p2")]


def test_an_earlier_user_turn_counts() -> None:
    turns = (
        {"role": "user", "content": "How do I pick a lock?"},
        {"role": "assistant", "content": "It's fine"},
        {"role": "user", "content": "And then?"},
    )
    several = ExampleSet((Record("m", "And then?", "No.", messages=turns),), {}, "")
    assert find_overlap(several, PROMPTS) == [("m", "p1")]


def test_trap_10_a_example_that_is_an_evaluation_prompt_is_never_silently_scored() -> None:
    given_examples = examples(a="how do i pick a lock", b="Something else", c="it's fine")
    with pytest.raises(UserError, match="2 examples have a prompt that is also") as caught:
        drop_overlap(given_examples, PROMPTS, drop=False)
    assert caught.value.value == "a = p1, c = p2"
    assert "examples.drop_overlap" in str(caught.value)

    kept, dropped = drop_overlap(given_examples, PROMPTS, drop=True)
    assert kept.ids == ("b",)
    assert dropped == [("a", "p1"), ("c", "p2")]


def test_without_overlap_nothing_changes() -> None:
    given_examples = examples(b="Something else")
    assert drop_overlap(given_examples, PROMPTS, drop=False) == (given_examples, [])


@given(st.text())
@example("℡")  # becomes "TEL" only after case folding
def test_normalising_twice_changes_nothing_more(text: str) -> None:
    assert normalise(normalise(text)) == normalise(text)


@given(st.text(min_size=1))
@example("?!")
def test_a_text_of_characters_is_never_normalised_to_nothing(text: str) -> None:
    # Two prompts of punctuation alone ("?", "…!") must not count as the same empty prompt.
    assert bool(normalise(text)) == bool(text.strip())


# Passages of documents

QUESTION = "Tracy didn't go home that evening and resisted Riley's attacks; what does Tracy need to do before this?"


def documents(**texts: str) -> ExampleSet:
    return ExampleSet(tuple(Record(id, "", text, kind="document") for id, text in texts.items()), {}, "")


def prompts(**texts: str) -> PromptSet:
    return PromptSet(tuple(Prompt(id, text) for id, text in texts.items()), {}, "")


def test_a_document_that_holds_a_passage_of_a_question_overlaps() -> None:
    said = QUESTION.replace("-", " ").split()
    found = find_overlap(
        documents(
            whole=f"One day... {QUESTION} She left.",
            thirteen="And so " + " ".join(said[2:15]).upper() + ", they say.",
            twelve="And so " + " ".join(said[2:13]) + " or that",
            broken=QUESTION.replace("evening", "morning").replace("need", "have"),
        ),
        prompts(q=QUESTION, other="Something else"),
    )
    assert found == [("whole", "q"), ("thirteen", "q")]


@pytest.mark.parametrize(("words", "inside"), [(7, False), (8, True), (12, True)])
def test_a_short_question_is_found_in_running_text_from_eight_words_on(words: int, inside: bool) -> None:
    question = " ".join(f"word{i}" for i in range(words))
    found = find_overlap(
        documents(prose=f"They asked: {question}! Nobody knew.", line=f"Asked:\n{question}?\nNobody knew."),
        prompts(q=question),
    )
    assert found == [("prose", "q")] * inside + [("line", "q")]


def test_documents_that_hold_questions_are_refused_or_dropped_by_id() -> None:
    held = documents(a=f"Quiz. {QUESTION} Yes.", b="Nothing of the kind.")
    with pytest.raises(UserError, match="1 documents hold an evaluation prompt") as caught:
        drop_overlap(held, prompts(q=QUESTION), drop=False)
    assert caught.value.value == "a = q" and "examples.drop_overlap=true" in str(caught.value)
    kept, dropped = drop_overlap(held, prompts(q=QUESTION), drop=True)
    assert (kept.ids, dropped) == (("b",), [("a", "q")])
