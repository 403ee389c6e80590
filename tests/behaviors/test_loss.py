"""Mean negative log-likelihood of a text, or of the answer behind a prompt."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from behavior_checks import check_derivatives, check_values, scored_prompts
from taught.behaviors.answer import Answer
from taught.behaviors.loss import Loss
from taught.core.behavior import encode_prompts
from taught.data.prompts import load_prompts
from taught.errors import UserError
from taught.features.pooling import read_tokens
from taught.model.readout import ReadPrompt, read_prompts
from tiny_chat import byte_level, chat
from tiny_models import tiny_model

ANSWERS = (((15, 16, 17),), ((4,),), ((4, 4, 4, 4, 4, 9, 21),), ((3,),), ((13, 3, 2, 13),), ((5, 6),))


def plain(suffixes: list[torch.Tensor]) -> torch.Tensor:
    return -suffixes[0].mean()


def test_y_is_that_of_plain_passes(monkeypatch) -> None:
    check_values(Loss(), scored_prompts(ANSWERS), plain, monkeypatch)


def test_invariant_2_adjoint_forward_and_differences_agree() -> None:
    check_derivatives(Loss(), scored_prompts(ANSWERS), plain)


def test_a_text_by_itself_has_the_loss_that_pretraining_gives_it() -> None:
    model, texts = tiny_model("tied"), ((0, 5, 6, 7, 8, 3, 2), (0, 12, 3), (14, 3, 2, 9, 9))
    prompts = [ReadPrompt(f"t{i}", ids[:1], suffixes=(ids[1:],)) for i, ids in enumerate(texts)]
    found = read_prompts(model, prompts, Loss("text"), None).y
    for value, ids in zip(found, texts, strict=True):
        row = torch.tensor([ids])
        logits = model(input_ids=row, use_cache=False).logits
        expected = torch.nn.functional.cross_entropy(logits[0, :-1], row[0, 1:])
        torch.testing.assert_close(value, expected.detach(), rtol=1e-12, atol=1e-12)


def test_a_text_is_read_without_a_template() -> None:
    text = "Paris is in France. London is not."
    (encoded,) = encode_prompts(Loss("text"), load_prompts([{"text": text}]), chat())
    ids = tuple(byte_level()(text)["input_ids"])
    assert (*encoded.input_ids, *encoded.suffixes[0]) == ids
    assert len(encoded.input_ids) == 1
    with pytest.raises(UserError, match="no user's turn"):
        read_tokens(encoded, "last_user")


def test_the_answer_is_that_of_the_behavior_answer() -> None:
    prompts = load_prompts([{"prompt": "Where?", "answer": "Paris is in France."}])
    assert encode_prompts(Loss(), prompts, chat()) == encode_prompts(Answer(), prompts, chat())


@pytest.mark.parametrize("answer", ["Paris is in France.", "B", 1, "1"])
def test_of_a_question_with_options_the_answer_is_the_text_of_the_right_one(answer) -> None:
    prompts = load_prompts([{"prompt": "Where?", "options": ["No.", "Paris is in France."], "answer": answer}])
    plain_prompts = load_prompts([{"prompt": "Where?", "answer": "Paris is in France."}])
    for behavior in (Loss(), Answer()):
        (found,), (expected,) = (encode_prompts(behavior, each, chat()) for each in (prompts, plain_prompts))
        assert (found.input_ids, found.suffixes) == (expected.input_ids, expected.suffixes)
    none = load_prompts([{"id": "a", "prompt": "Where?", "options": ["No.", "Yes."], "answer": "Paris"}])
    with pytest.raises(UserError, match="the answer is not among the options"):
        encode_prompts(Loss(), none, chat())


def test_a_text_of_one_token_has_nothing_to_score() -> None:
    rows = [{"id": "a", "text": "P"}, {"id": "b", "text": "Paris is in France."}]
    with pytest.raises(UserError, match="has no tokens") as caught:
        encode_prompts(Loss("text"), load_prompts(rows), chat())
    assert caught.value.value == "a"
    with pytest.raises(UserError, match="there is no answer of 2 prompts"):
        encode_prompts(Loss(), load_prompts(rows), chat())


def test_sign_and_degree_rise_as_the_text_becomes_less_likely() -> None:
    logp, lengths = torch.tensor([-2.0, -8.0]), torch.tensor([2, 2])
    y = Loss().value(logp, lengths, torch.tensor([0, 1]), 2)
    assert y.tolist() == [1.0, 4.0]
    np.testing.assert_allclose(Loss().degree(y.numpy()), 1 - np.exp([-1.0, -4.0]), rtol=1e-6)
    assert "less likely" in Loss().meaning
