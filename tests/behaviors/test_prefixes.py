"""Log of the summed probability of some beginnings of the answer."""

from __future__ import annotations

import itertools

import pytest
import torch

from behavior_checks import check_derivatives, check_values, scored_prompts
from taught.behaviors.prefixes import Prefixes, without_extensions
from taught.core.behavior import encode_prompts
from taught.core.registry import BEHAVIORS
from taught.data.prompts import load_prompts
from taught.errors import UserError
from tiny_chat import LLAMA2, ZEPHYR, chat, sentencepiece

# One prefix, prefixes that begin alike, of one token and of several; each prompt its own.
SUFFIXES = (
    ((15, 16, 17), (15, 16, 18), (19,), (15, 20)),
    ((4,),),
    ((4, 4, 4, 4, 4),),
    ((3,), (13, 3, 5)),
    ((13, 3), (2, 2, 2)),
    ((5, 6), (6, 5), (7,)),
)


def plain(suffixes: list[torch.Tensor]) -> torch.Tensor:
    return torch.stack([tokens.sum() for tokens in suffixes]).exp().sum().log()


def test_y_is_that_of_plain_passes(monkeypatch) -> None:
    check_values(Prefixes(("any",)), scored_prompts(SUFFIXES), plain, monkeypatch)


def test_invariant_2_adjoint_forward_and_differences_agree() -> None:
    check_derivatives(Prefixes(("any",)), scored_prompts(SUFFIXES), plain)


VOCAB, EVENTS = 5, ((4, 0, 1), (4, 0, 2), (3,), (4, 2))


def conditional(history: tuple[int, ...]) -> torch.Tensor:
    """A made-up language model: log-probabilities of the next token, different for each history."""
    seed = sum((t + 1) * 7**i for i, t in enumerate(history))
    logits = torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)
    return torch.log_softmax(logits, -1)


def test_the_value_is_that_of_the_event_by_enumeration() -> None:
    def logp(tokens: tuple[int, ...]) -> torch.Tensor:
        return sum(conditional(tokens[:j])[token] for j, token in enumerate(tokens))

    answers = itertools.product(range(VOCAB), repeat=3)
    begins = [logp(a) for a in answers if any(a[: len(p)] == p for p in EVENTS)]
    expected = torch.stack(begins).exp().sum().log()
    lengths, one = torch.tensor([len(p) for p in EVENTS]), torch.zeros(len(EVENTS), dtype=torch.long)
    got = Prefixes(("any",)).value(torch.stack([logp(p) for p in EVENTS]), lengths, one, 1)
    torch.testing.assert_close(got, expected[None], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize(
    ("tokens", "counted"),
    [
        ([(1, 2), (1, 3)], [0, 1]),
        ([(1, 2, 3), (1, 2)], [1]),
        ([(1, 2), (3,), (1, 2, 3), (3,)], [0, 1]),
        ([(1,), (1,), (1,)], [0]),
    ],
)
def test_prefixes_contained_in_another_one_and_equal_ones_count_once(tokens, counted) -> None:
    assert without_extensions(tokens) == counted


def test_a_prefix_that_another_one_begins_is_left_out_and_said() -> None:
    behavior = Prefixes(("I can't do", "I can't", "No"))
    (encoded,) = encode_prompts(behavior, load_prompts([{"prompt": "How?"}]), chat(LLAMA2, sentencepiece()))
    assert encoded.left_out == ("I can't do",)
    assert [sentencepiece().decode(ids) for ids in encoded.suffixes] == ["I can't", "No"]


def test_prefixes_are_tokenised_in_their_place() -> None:
    texts = ("I can't", "No")
    for template, begins in ((LLAMA2, "▁I"), (ZEPHYR, "I")):
        encoded = encode_prompts(Prefixes(texts), load_prompts([{"prompt": "How?"}]), chat(template, sentencepiece()))[
            0
        ]
        pieces = sentencepiece().convert_ids_to_tokens(encoded.suffixes[0])
        assert "".join(pieces).removeprefix("▁") == "I▁can't"
        assert "".join(pieces).startswith(begins)
    alone = tuple(sentencepiece()("I can't", add_special_tokens=False)["input_ids"])
    assert encoded.suffixes[0] != alone  # alone it begins with a space, which the line does not have


def test_the_registry_makes_it_and_no_prefix_is_refused() -> None:
    made = BEHAVIORS.get("prefixes")(prefixes=("No", "Never"))
    assert made == Prefixes(("No", "Never"))
    assert made.meaning.endswith("begins with “No” or “Never”")
    with pytest.raises(UserError, match="prompts has no tokens") as caught:
        encode_prompts(Prefixes(()), load_prompts([{"id": "a", "prompt": "How?"}]), chat())
    assert caught.value.value == "a"
