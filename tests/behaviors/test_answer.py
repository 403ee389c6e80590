"""Log-probability of each prompt's own answer."""

from __future__ import annotations

import numpy as np
import pytest

from behavior_checks import check_derivatives, check_values, scored_prompts
from taught.behaviors.answer import Answer
from taught.core.behavior import encode_prompts
from taught.data.prompts import load_prompts
from taught.errors import UserError
from tiny_chat import PLAIN, THINKING, byte_level, chat

ANSWERS = (((15, 16, 17),), ((4,),), ((4, 4, 4, 4, 4, 9, 21),), ((3,),), ((13, 3, 2, 13),), ((5, 6),))
REDUCED = {"sum": lambda found: found[0].sum(), "mean": lambda found: found[0].mean()}


@pytest.mark.parametrize("reduce", REDUCED)
def test_y_is_that_of_plain_passes(reduce: str, monkeypatch) -> None:
    check_values(Answer(reduce), scored_prompts(ANSWERS), REDUCED[reduce], monkeypatch)


@pytest.mark.parametrize("reduce", REDUCED)
def test_invariant_2_adjoint_forward_and_differences_agree(reduce: str) -> None:
    check_derivatives(Answer(reduce), scored_prompts(ANSWERS), REDUCED[reduce])


def test_each_prompt_has_its_own_answer_up_to_the_end_of_its_text() -> None:
    rows = [
        {"prompt": "Where is Paris?", "answer": "Paris is in France."},
        {"prompt": "Six times seven?", "answer": 42},
    ]
    for template in (None, PLAIN):
        form = chat() if template is None else chat(template)
        encoded = encode_prompts(Answer(), load_prompts(rows), form)
        assert [byte_level().decode(e.suffixes[0]) for e in encoded] == ["Paris is in France.", "42"]
        for row, e in zip(rows, encoded, strict=True):
            assert e.input_ids == form.encode_prompt(row["prompt"]).input_ids


def test_what_the_template_writes_before_an_answer_belongs_to_the_prompt() -> None:
    (encoded,) = encode_prompts(Answer(), load_prompts([{"prompt": "How?", "answer": "No."}]), chat(THINKING))
    bare = chat(THINKING).encode_prompt("How?")
    assert byte_level().decode(encoded.input_ids).endswith("assistant\n<think>\n\n</think>\n\n")
    assert byte_level().decode(encoded.suffixes[0]) == "No."
    assert (encoded.user_span, encoded.end_of_turn) == (bare.user_span, bare.end_of_turn)


def test_a_conversation_is_continued() -> None:
    turns = [
        {"role": "user", "content": "How?"},
        {"role": "assistant", "content": "No."},
        {"role": "user", "content": "Yes?"},
    ]
    (encoded,) = encode_prompts(Answer(), load_prompts([{"messages": turns, "answer": "Paris"}]), chat())
    assert (
        byte_level()
        .decode(encoded.input_ids)
        .endswith("No.<|im_end|>\n<|im_start|>user\nYes?<|im_end|>\n<|im_start|>assistant\n")
    )
    assert byte_level().decode(encoded.suffixes[0]) == "Paris"


def test_missing_and_empty_answers_are_named() -> None:
    rows = [
        {"id": "a", "prompt": "One?", "answer": "Yes"},
        {"id": "b", "prompt": "Two?", "answer": " "},
        {"id": "c", "prompt": "Three?", "answer": None},
    ]
    with pytest.raises(UserError, match="there is no answer of 2 prompts") as caught:
        encode_prompts(Answer(), load_prompts(rows), chat())
    assert caught.value.value == "b, c"


def test_an_answer_that_the_tokenizer_joins_to_the_prompt_is_refused_by_id() -> None:
    rows = [{"id": "a", "prompt": "One?", "answer": "text"}]  # ": " and "text" are other tokens than ": text"
    with pytest.raises(UserError, match="merges the end of the prompt of a with its response"):
        encode_prompts(Answer(), load_prompts(rows), chat(PLAIN))


def test_prompts_that_would_count_twice_are_named() -> None:
    prompts = load_prompts([{"id": "a", "prompt": "One?", "answer": "1"}, {"id": "b", "prompt": "One?", "answer": 1}])
    with pytest.raises(UserError, match="occur more than once with the same answers") as caught:
        encode_prompts(Answer(), prompts, chat())
    assert caught.value.value == "a = b"


def test_the_degree_is_a_probability_that_rises_with_y() -> None:
    degree = Answer().degree(np.array([-3.0, -1.0, 0.0]))
    np.testing.assert_allclose(degree, [0.04978706836786395, 0.36787944117144233, 1.0])
