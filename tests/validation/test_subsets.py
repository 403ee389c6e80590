"""Subsets to train on: sizes, matching, probabilities, and independence of the order of ids."""

from __future__ import annotations

import math
from itertools import combinations

import numpy as np
import pytest

from taught.errors import UserError
from taught.validation.subsets import Subsets, leave_one_out, leave_share_out, matched_subsets, random_subsets, summed

IDS = [f"z{i:02d}" for i in range(20)]
LABELS = {example: "refusal" if i % 4 == 0 else "compliance" for i, example in enumerate(IDS)}
LENGTHS = {example: float(5 + (i * 37) % 83) for i, example in enumerate(IDS)}


def test_random_subsets_are_distinct_sorted_and_of_one_size():
    made = random_subsets(IDS, 8, 50, seed=3)
    assert len(made) == 50 == len(set(made.members)) == len(set(made.names))
    assert all(len(set(some)) == 8 and list(some) == sorted(some) for some in made.members)
    assert made.inclusion == dict.fromkeys(IDS, 0.4)


def test_every_subset_is_as_likely_as_any_other():
    ids = ["a", "b", "c", "d", "e"]
    counts = dict.fromkeys(combinations(ids, 2), 0)
    for seed in range(2000):
        counts[random_subsets(ids, 2, 1, seed=seed).members[0]] += 1
    # 10 cells with 200 expected: chi squared with 9 degrees stays below its 99.9% quantile.
    assert sum((n - 200) ** 2 / 200 for n in counts.values()) < 27.9


def test_all_subsets_of_a_size_can_be_had_and_no_more():
    made = random_subsets(list("abcd"), 2, 6, seed=0)
    assert set(made.members) == set(combinations("abcd", 2))
    with pytest.raises(UserError, match="not so many"):
        random_subsets(list("abcd"), 2, 7, seed=0)


@pytest.mark.parametrize(
    "make",
    [
        lambda ids, n: random_subsets(ids, 8, n, seed=5),
        lambda ids, n: leave_share_out(ids, 0.1, n, seed=5),
        lambda ids, n: matched_subsets(ids, LABELS, LENGTHS, 10, n, seed=5, tolerance=0.02),
    ],
)
def test_neither_the_order_of_ids_nor_a_longer_list_changes_a_subset(make):
    some, more = make(IDS, 5), make(IDS[::-1], 9)
    assert more.members[:5] == some.members and more.names[:5] == some.names
    assert make(IDS, 5).members == some.members


def test_matched_subsets_hold_counts_and_lengths():
    rough = random_subsets(IDS, 10, 40, seed=1)
    made = matched_subsets(IDS, LABELS, LENGTHS, 10, 40, seed=1, tolerance=0.02)
    assert len(set(made.members)) == 40
    counts = {label: summed(made, {i: float(LABELS[i] == label) for i in IDS}) for label in set(LABELS.values())}
    assert set(counts["compliance"]) <= {7.0, 8.0} and len(set(counts["compliance"])) == 1
    assert (counts["compliance"] + counts["refusal"] == 10).all()
    share = {label: counts[label][0] for label in counts}
    mean = {label: np.mean([LENGTHS[p] for p in IDS if LABELS[p] == label]) for label in share}
    target = sum(share[label] * mean[label] for label in share)
    sums = summed(made, LENGTHS)
    assert np.abs(sums / target - 1).max() <= 0.02
    apart = [np.abs(x / x.mean() - 1).max() for x in (sums, summed(rough, LENGTHS))]
    assert apart[0] < 0.04 < 0.1 < apart[1]
    observed = dict(zip(IDS, made.membership(IDS).mean(0), strict=True))
    for label in share:  # the inclusion is exact as the mean over a label's examples
        examples = [p for p in IDS if LABELS[p] == label]
        expected = np.mean([made.inclusion[p] for p in examples])
        assert np.mean([observed[p] for p in examples]) == pytest.approx(expected)


def test_matching_needs_no_exchange_where_the_draw_already_fits():
    equal = dict.fromkeys(IDS, 7.0)
    made = matched_subsets(IDS, dict.fromkeys(IDS, "one"), equal, 6, 10, seed=2)
    assert (summed(made, equal) == 42).all()


def test_lengths_that_cannot_be_matched_are_an_error():
    lengths = {example: 3.0**i for i, example in enumerate(IDS)}
    with pytest.raises(UserError, match="matched length"):
        matched_subsets(IDS, LABELS, lengths, 10, 5, seed=0)


def test_matched_subsets_name_examples_without_label_or_length():
    with pytest.raises(UserError, match="no label") as error:
        matched_subsets([*IDS, "other"], LABELS, LENGTHS, 5, 1, seed=0)
    assert "other" in str(error.value)
    with pytest.raises(UserError, match="no length"):
        matched_subsets(IDS, LABELS, {}, 5, 1, seed=0)


def test_a_share_is_left_out():
    made = leave_share_out(IDS, 0.1, 30, seed=0)
    assert {len(some) for some in made.members} == {18}
    assert made.inclusion["z00"] == 0.9 and made.names[0] == "without-2-0000"
    with pytest.raises(UserError):
        leave_share_out(IDS, 0.01, 1, seed=0)  # rounds to no example


def test_one_example_is_left_out():
    made = leave_one_out(IDS[::-1])
    assert len(made) == 20
    for name, some in zip(made.names, made.members, strict=True):
        assert set(IDS) - set(some) == {name.removeprefix("without:")}
    some = leave_one_out(IDS, ["z03", "z01"])
    assert some.names == ("without:z01", "without:z03")
    frequency = dict(zip(IDS, some.membership(IDS).mean(0), strict=True))
    assert frequency == pytest.approx(some.inclusion)
    with pytest.raises(UserError, match="not among"):
        leave_one_out(IDS, ["else"])


def test_membership_goes_by_id():
    made = Subsets(("s", "t"), (("a", "c"), ("b",)), {"a": 0.5, "b": 0.5, "c": 0.5})
    assert made.membership(["c", "b", "a"]).tolist() == [[True, False, True], [False, True, False]]
    with pytest.raises(UserError, match="not asked about"):
        made.membership(["a", "b"])
    with pytest.raises(UserError, match="repeat"):
        made.membership(["a", "b", "c", "a"])


def test_sums_need_every_members_value():
    made = Subsets(("s", "t"), (("a", "c"), ("b",)), {})
    assert summed(made, {"c": 1.5, "b": -2.0, "a": 0.25, "d": 9}).tolist() == [1.75, -2.0]
    for bad in ({"a": 1.0, "b": 1.0}, {"a": 1.0, "b": 1.0, "c": math.nan}):
        with pytest.raises(UserError, match="c"):
            summed(made, bad)


@pytest.mark.parametrize("size", [0, 20, 21, -1])
def test_sizes_that_make_no_subset_are_refused(size):
    with pytest.raises(UserError, match="size"):
        random_subsets(IDS, size, 1, seed=0)


def test_ids_that_repeat_are_refused():
    with pytest.raises(UserError, match="repeat"):
        random_subsets([*IDS, "z00"], 3, 1, seed=0)
