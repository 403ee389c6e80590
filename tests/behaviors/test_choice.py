"""Log-odds of the right option against the others."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from behavior_checks import check_derivatives, check_values, scored_prompts
from taught.behaviors.choice import Choice
from taught.core.behavior import encode_prompts
from taught.data.prompts import load_prompts
from taught.errors import UserError
from tiny_chat import byte_level, chat

# Two to four options of one to five tokens, the right one first.
OPTIONS = (
    ((15, 16, 17), (15, 16, 18), (19,), (15, 20)),
    ((4,), (5,)),
    ((4, 4, 4, 4, 4), (4, 4)),
    ((3,), (13, 3, 5), (2,)),
    ((13, 3), (2, 2, 2)),
    ((5, 6), (6, 5), (7,)),
)


def plain(normalise: bool):
    def log_odds(options: list[torch.Tensor]) -> torch.Tensor:
        right, *others = [tokens.mean() if normalise else tokens.sum() for tokens in options]
        return right - torch.stack(others).exp().sum().log()

    return log_odds


@pytest.mark.parametrize("normalise", [False, True])
def test_y_is_that_of_plain_passes(normalise: bool, monkeypatch) -> None:
    check_values(Choice("cloze", normalise), scored_prompts(OPTIONS), plain(normalise), monkeypatch)


@pytest.mark.parametrize("normalise", [False, True])
def test_invariant_2_adjoint_forward_and_differences_agree(normalise: bool) -> None:
    check_derivatives(Choice("cloze", normalise), scored_prompts(OPTIONS), plain(normalise))


def encoded(style: str, **row):
    (found,) = encode_prompts(Choice(style), load_prompts([{"id": "a", "prompt": "Where?", **row}]), chat())
    decode = byte_level().decode
    return decode(found.input_ids), [decode(suffix) for suffix in found.suffixes]


@pytest.mark.parametrize("answer", ["London", 1, "B", " London "])
def test_the_right_option_is_named_by_text_index_or_letter(answer) -> None:
    options = ["Paris", "London", "No"]
    asked, letters = encoded("letter", options=options, answer=answer)
    assert "Where?\nA. Paris\nB. London\nC. No<|im_end|>" in asked
    assert letters == ["B", "A", "C"]
    asked, texts = encoded("cloze", choices=options, answer=answer)
    assert "Where?<|im_end|>" in asked
    assert texts == ["London", "Paris", "No"]


def test_a_text_is_taken_for_an_option_before_it_is_taken_for_a_letter() -> None:
    assert encoded("letter", options=["B", "A"], answer="A")[1] == ["B", "A"]


def test_options_may_be_json_in_a_table_of_texts_and_stand_in_the_last_turn() -> None:
    turns = [
        {"role": "user", "content": "How?"},
        {"role": "assistant", "content": "No."},
        {"role": "user", "content": "Yes?"},
    ]
    row = {"messages": turns, "options": '["Yes", "No"]', "answer": "No"}
    (found,) = encode_prompts(Choice(), load_prompts([row]), chat())
    assert byte_level().decode(found.input_ids).endswith("user\nYes?\nA. Yes\nB. No<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"answer": "Paris"}, "options are missing or empty"),
        ({"options": ["Paris"], "answer": "Paris"}, "options are missing or empty"),
        ({"options": ["Paris", " "], "answer": "Paris"}, "options are missing or empty"),
        ({"options": ["Paris", "No", " No"], "answer": "Paris"}, "some options are equal"),
        ({"options": ["Paris", "No"], "answer": "London"}, "the answer is not among the options"),
        ({"options": ["Paris", "No"], "answer": "C"}, "the answer is not among the options"),
        ({"options": ["Paris", "No"], "answer": 2}, "the answer is not among the options"),
        ({"options": ["Paris", "No"], "answer": -1}, "the answer is not among the options"),
        ({"options": ["Paris", "No"]}, "the answer is not among the options"),
    ],
)
def test_what_a_choice_lacks_is_said_of_all_prompts_at_once(row, message: str) -> None:
    good = {"options": ["Yes", "No"], "answer": "Yes"}
    rows = [
        {"id": "a", "prompt": "One?", **row},
        {"id": "b", "prompt": "Two?", **good},
        {"id": "c", "prompt": "3?", **row},
    ]
    for style in ("letter", "cloze"):
        with pytest.raises(UserError, match=f"{message} of 2 prompts") as caught:
            encode_prompts(Choice(style), load_prompts(rows), chat())
        assert caught.value.value == "a, c"


NOT_AMONG, EMPTY, EQUAL = "the answer is not among the options", "options are missing or empty", "options are equal"


@pytest.mark.parametrize(
    ("good", "wrong", "message"),
    [
        ({"options": "A. Paris\nB. No", "answer": "B. No"}, {"answer": "C. Rome"}, NOT_AMONG),
        ({"choices": {"text": ["a", "b"], "label": ["1", "2"]}, "answerKey": "2"}, {"answerKey": "3"}, NOT_AMONG),
        ({"choices": {"text": ["a", "b"], "label": ["2", "3"]}, "answerKey": "2"}, {"answerKey": "1"}, NOT_AMONG),
        ({"answerA": "Paris", "answerB": "No", "label": "2"}, {"label": "3"}, NOT_AMONG),
        ({"answerA": "Paris", "answerB": "No", "label": "2"}, {"label": "0"}, NOT_AMONG),
        ({"answerA": "Paris", "answerB": "No", "label": 2}, {"label": 0}, NOT_AMONG),
        ({"sol1": "Paris", "sol2": "No", "label": 0}, {"label": -1}, NOT_AMONG),
        ({"endings": ["Paris", "No"], "label": "0"}, {"label": ""}, NOT_AMONG),
        ({"A": "Paris", "B": "No", "answer": "A"}, {"B": ""}, EMPTY),
        ({"A": "Paris", "B": "No", "answer": "A"}, {"B": "Paris"}, EQUAL),
    ],
)
def test_what_a_choice_of_a_public_form_lacks_is_named_by_id(good: dict, wrong: dict, message: str) -> None:
    rows = [{"id": id, "question": f"{id}?", **good, **(wrong if id == "c" else {})} for id in "abcd"]
    with pytest.raises(UserError, match=f"{message} of 1 prompts") as caught:
        encode_prompts(Choice(), load_prompts(rows), chat())
    assert caught.value.value == "c"
    assert len(encode_prompts(Choice(), load_prompts([rows[0], rows[1]]), chat())) == 2


def test_options_that_the_tokenizer_does_not_keep_apart_are_refused_and_letters_work() -> None:
    tokenizer = Tokenizer(models.WordPiece(unk_token="<unk>"))
    tokenizer.normalizer = normalizers.BertNormalizer(lowercase=True)
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()
    trainer = trainers.WordPieceTrainer(special_tokens=["<unk>", "<|im_start|>", "<|im_end|>"], show_progress=False)
    tokenizer.train_from_iterator(["user assistant: Where? A. Paris B. London"] * 3, trainer)
    form = chat(tokenizer=PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="<unk>"))
    for options in (["Paris", "PARIS"], ["👍", "👎"]):  # one case, and signs that it does not know
        rows = [{"id": "a", "prompt": "Where?", "options": options, "answer": 1}]
        with pytest.raises(UserError, match="some options are the same tokens of 1 prompts") as caught:
            encode_prompts(Choice("cloze"), load_prompts(rows), form)
        assert "behavior.style=letter" in caught.value.fix
        (found,) = encode_prompts(Choice("letter"), load_prompts(rows), form)
        assert [tokenizer.decode(ids) for ids in found.suffixes] == ["b", "a"]


def test_the_degree_is_the_share_of_the_right_option() -> None:
    p = np.array([0.2, 0.5, 0.9])
    np.testing.assert_allclose(Choice().degree(np.log(p / (1 - p))), p)
