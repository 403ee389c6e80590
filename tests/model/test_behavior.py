from __future__ import annotations

import itertools

import pytest
import torch

from taught.errors import UserError
from taught.model.behavior import build_behavior, tokenize_prefixes
from tiny_models import tiny_behavior

PREFIXES = ((4, 0, 1), (4, 0, 2), (3,), (4, 2))
VOCAB = 5


def conditional(history: tuple[int, ...]) -> torch.Tensor:
    """A made-up language model: next-token logits of any history, different for each."""
    seed = sum((t + 1) * 7**i for i, t in enumerate(history))
    return torch.randn(VOCAB, generator=torch.Generator().manual_seed(seed + 1), dtype=torch.float64)


def logits_of(behavior) -> torch.Tensor:
    return torch.stack([conditional(path) for path in [(), *behavior.inner_paths()]])[None]


def probability(sequence: tuple[int, ...]) -> float:
    """Probability that a response begins with these tokens."""
    value = 1.0
    for j, token in enumerate(sequence):
        value *= float(torch.softmax(conditional(sequence[:j]), -1)[token])
    return value


def test_log_probability_is_that_of_the_event_by_enumeration() -> None:
    behavior = tiny_behavior(PREFIXES)
    responses = itertools.product(range(VOCAB), repeat=3)
    begins = [r for r in responses if any(r[: len(p)] == p for p in PREFIXES)]
    expected = torch.tensor(sum(map(probability, begins)), dtype=torch.float64).log()
    got = behavior.log_probability(logits_of(behavior))
    torch.testing.assert_close(got, expected[None], rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("more", [((3, 1),), ((4, 0, 1, 2), (3,)), ((3,),), ((4, 0, 1),)])
def test_prefixes_contained_in_another_one_and_equal_ones_count_once(more) -> None:
    once, twice = tiny_behavior(PREFIXES), tiny_behavior((*PREFIXES, *more))
    assert twice.tokens == once.tokens
    assert twice.dropped == tuple(str(p) for p in more)
    a, b = (x.log_probability(logits_of(x)) for x in (once, twice))
    assert torch.equal(a, b)


def test_an_extension_given_first_is_dropped_for_the_shorter_prefix_given_later() -> None:
    behavior = build_behavior(["I can't do", "I can't"], [(1, 2, 3), (1, 2)])
    assert behavior.prefixes == ("I can't",)
    assert behavior.dropped == ("I can't do",)


def test_slots_are_the_distinct_histories_after_which_something_is_predicted() -> None:
    behavior = tiny_behavior(PREFIXES)
    assert behavior.inner_paths() == [(4,), (4, 0)]
    assert behavior.slots == 3
    assert behavior.steps == (((0, 4), (1, 0), (2, 1)), ((0, 4), (1, 0), (2, 2)), ((0, 3),), ((0, 4), (1, 2)))


def test_half_precision_logits_are_summed_in_single_precision() -> None:
    behavior = tiny_behavior(PREFIXES)
    logits = logits_of(behavior).to(torch.bfloat16)
    assert behavior.log_probability(logits).dtype == torch.float32
    assert torch.equal(behavior.log_probability(logits), behavior.log_probability(logits.float()))


def test_no_prefix_and_an_empty_prefix_are_refused() -> None:
    with pytest.raises(UserError, match="no prefixes given"):
        build_behavior([], [])
    with pytest.raises(UserError, match=r"no tokens\n  value: *  \n  fix: .*empty prefix"):
        build_behavior(["I", " "], [(1,), ()])


def test_prefixes_are_tokenized_without_special_tokens() -> None:
    asked = []

    def tokenizer(text, **options):
        asked.append(options)
        return {"input_ids": [len(text)]}

    assert tokenize_prefixes(tokenizer, ["abc"]) == [(3,)]
    assert asked == [{"add_special_tokens": False}]
