"""Named documents against random ones: sets that are alike, exact tests, and verdicts by their rule."""

from __future__ import annotations

import itertools
import math
from collections import Counter
from dataclasses import replace

import numpy as np
import pytest
from scipy.stats import rankdata, ttest_1samp

from taught.errors import UserError
from taught.stats.intervals import Interval, mean_by_t
from taught.validation.pairs import (
    Measured,
    few_pairs,
    foreseen_change,
    least_p,
    p_among,
    pair_rows,
    plan_pairs,
    rank_biserial,
    signed_rank,
    verdict,
)

TOPICS = {f"d{i:02d}": "law" if i % 3 else "art" for i in range(30)}
DOCUMENTS = {f"{d}#{w}": d for i, d in enumerate(TOPICS) for w in range(1 + i % 2)}
TOKENS = {example: 90 + 7 * (i % 5) for i, example in enumerate(DOCUMENTS)}
SCORES = {example: math.sin(3.0 * i) for i, example in enumerate(DOCUMENTS)}


def planned(**changes):
    given = {"scores": SCORES, "documents": DOCUMENTS, "topics": TOPICS, "tokens": TOKENS, "budgets": [4], "pairs": 6}
    return plan_pairs(**{**given, "seed": 3, **changes})


def members(plan) -> dict[str, tuple[str, ...]]:
    return dict(zip(plan.subsets.names, plan.subsets.members, strict=True))


def docs(ids) -> set[str]:
    return {DOCUMENTS[i] for i in ids}


# What is forgotten


def test_the_highest_and_the_lowest_are_named_by_the_sum_over_their_windows() -> None:
    sets = members(planned())
    value = {d: sum(SCORES[i] for i in SCORES if DOCUMENTS[i] == d) for d in TOPICS}
    ranking = sorted(value, key=value.__getitem__)
    assert docs(sets["highest-4"]) == set(ranking[-4:]) and docs(sets["lowest-4"]) == set(ranking[:4])
    for ids in sets.values():  # a document goes with all its windows
        assert set(ids) == {i for i in DOCUMENTS if DOCUMENTS[i] in docs(ids)}


def test_random_sets_hold_the_topics_and_the_tokens_of_the_named_and_none_of_them() -> None:
    sets = members(planned(budgets=[4, 6]))
    for k in (4, 6):
        named = sets[f"highest-{k}"]
        for pair in range(6):
            random = sets[f"random-{k}-{pair}"]
            assert not docs(random) & docs(named)
            assert Counter(TOPICS[d] for d in docs(random)) == Counter(TOPICS[d] for d in docs(named))
            sizes = [sum(TOKENS[i] for i in ids) for ids in (random, named)]
            assert sizes[0] == pytest.approx(sizes[1], rel=0.05)
    assert len({sets[f"random-4-{pair}"] for pair in range(6)}) > 1


def test_sets_follow_from_the_seed_and_not_from_the_order_of_the_ids() -> None:
    turned = dict(reversed(list(SCORES.items())))
    assert members(planned()) == members(planned(scores=turned)) != members(planned(seed=4))


def test_named_sets_belong_to_every_pair_and_random_ones_to_their_own() -> None:
    plan = planned()
    assert list(plan.repeats("highest-4")) == list(plan.repeats("lowest-4")) == list(range(6))
    assert list(plan.repeats("random-4-2")) == [2]


def test_without_topics_only_the_size_is_held_fixed() -> None:
    sets = members(planned(topics=dict.fromkeys(TOPICS, "")))
    counts = {tuple(sorted(Counter(TOPICS[d] for d in docs(sets[f"random-4-{i}"])).items())) for i in range(6)}
    assert len(counts) > 1


@pytest.mark.parametrize("budgets", [[30], [31], [0], []])
def test_a_set_that_leaves_nothing_to_retain_is_refused(budgets) -> None:
    with pytest.raises(UserError, match="leave none to retain"):
        planned(budgets=budgets)


def test_a_topic_without_others_is_refused_with_its_counts() -> None:
    few = {d: "rare" if d in docs(members(planned())["highest-4"]) else topic for d, topic in TOPICS.items()}
    with pytest.raises(UserError, match=r"rare: 4 named, 0 others"):
        planned(topics=few)


def test_a_size_without_others_is_refused() -> None:
    named = docs(members(planned())["highest-4"])
    long = {i: 1000 if d in named else 90 for i, d in DOCUMENTS.items()}
    with pytest.raises(UserError, match="counterpart of the same size"):
        planned(tokens=long)
    topics = dict.fromkeys(TOPICS, "")  # no exchange is left where all others are taken
    with pytest.raises(UserError, match="counterpart of the same size"):
        planned(tokens=long, topics=topics, budgets=[15])


def test_scores_that_are_no_numbers_are_refused() -> None:
    with pytest.raises(UserError, match="d01#0"):
        planned(scores={**SCORES, "d01#0": math.nan})


# Tests and effect sizes


def by_all_signs(d) -> float:
    """p of the signed-rank test by turning every sign."""
    rank = rankdata(np.abs(d))
    found = float(rank @ (np.asarray(d) > 0))
    return float(np.mean([rank @ np.array(s) >= found - 1e-9 for s in itertools.product((0, 1), repeat=len(d))]))


@pytest.mark.parametrize(
    "d",
    [
        [0.3, 1.2, -0.1, 0.8, 2.0, 0.05],
        [1.0, 1.0, -1.0, 2.0, 2.0],
        [-0.3, -1.2, -0.4, -2.0, -0.7],
        [0.1, 0.2, 0.3, 0.4, 0.5, 0.6, 0.7, 0.8],
    ],
)
def test_the_signed_rank_test_is_exact(d) -> None:
    assert signed_rank(d) == pytest.approx(by_all_signs(d), abs=1e-12)


def test_pairs_that_do_not_differ_show_nothing() -> None:
    assert signed_rank([0.0, 0.0, 0.0]) == 1.0 and rank_biserial([0.0, 0.0]) == 0.0
    assert signed_rank([0.0, 1.0, 2.0]) == 0.25  # zeros are left out


def test_effect_sizes() -> None:
    assert rank_biserial([1, 2, 3]) == 1.0 and rank_biserial([-1, -2]) == -1.0
    assert rank_biserial([3.0, -1.0, -2.0]) == 0.0
    d = [0.3, 1.2, -0.1, 0.8, 2.0]
    expected = ttest_1samp(d, 0).confidence_interval(0.95)
    assert mean_by_t(d) == pytest.approx((np.mean(d), *expected))
    assert math.isnan(mean_by_t([1.0]).lo)


def test_the_smallest_p_is_said_before_anything_runs() -> None:
    assert least_p(5) == 1 / 32 and few_pairs(5) is None
    assert "0.0625" in few_pairs(4)
    assert signed_rank([1.0, 2.0, 3.0, 4.0, 5.0]) == least_p(5)


def test_one_set_among_random_ones() -> None:
    assert p_among(np.array([5.0, 5.5]), np.array([1.0, 2.0, 3.0])) == 1 / 4
    assert p_among(np.array([2.5]), np.array([1.0, 2.0, 3.0])) == 2 / 4


def test_a_random_set_of_several_pairs_is_one_set() -> None:
    # 19 pairs with one set would else make 1 / 20 of a single comparison; its changes vary by the seed.
    assert p_among(np.full(19, 5.0), np.arange(19.0) / 19, same=(0,) * 19) == 1 / 2
    assert p_among(np.array([2.5]), np.array([1.0, 3.5, 3.0]), same=(0, 0, 2)) == 2 / 3
    ten = {f"d{i}": float(i) for i in range(10)}
    given = {"scores": ten, "documents": {name: name for name in ten}, "topics": dict.fromkeys(ten, "")}
    plan = planned(**given, tokens=dict.fromkeys(ten, 5), budgets=[5], pairs=8)
    assert plan.same(5) == (0,) * 8 and "1 with 5 documents" in plan.few_sets()
    row = pairs_of(-0.5, target="behavior:facts")
    (found,) = pair_rows([replace(row, same=plan.same(5))], "behavior:facts")
    assert found.p_draw == 1 / 2
    assert planned(**given, tokens=dict.fromkeys(ten, 5), budgets=[2], pairs=3).few_sets() is None


# Verdicts


@pytest.mark.parametrize(
    ("p", "interval", "foreseen", "predicted", "expected"),
    [
        (0.01, (1.0, 0.5, 1.5), 1, math.nan, "supported"),
        (0.01, (-1.0, -1.5, -0.5), -1, math.nan, "supported"),
        (0.06, (1.0, 0.5, 1.5), 1, math.nan, "undecided"),  # corrected p is not below .05
        (0.01, (1.0, -0.1, 2.1), 1, math.nan, "undecided"),  # the interval holds 0
        (0.99, (1.0, 0.5, 1.5), -1, math.nan, "not supported"),  # on the other side
        (0.4, (0.0, -0.2, 0.2), 1, 0.3, "not supported"),  # smaller than foreseen
        (0.4, (0.0, -0.2, 0.2), -1, -0.3, "not supported"),
        (0.4, (0.0, -0.2, 0.2), 1, 0.1, "undecided"),
        (0.4, (0.0, -0.2, 0.2), 1, math.nan, "undecided"),
        (0.5, (1.0, math.nan, math.nan), 1, math.nan, "undecided"),
    ],
)
def test_the_verdict_follows_its_rule(p, interval, foreseen, predicted, expected) -> None:
    assert verdict(p, Interval(*interval), foreseen, predicted) == expected


def pairs_of(mean: float, *, target: str, arm: str = "highest", n: int = 8, foreseen: float = -2.0) -> Measured:
    rng = np.random.default_rng(len(target))
    random = rng.normal(0, 0.1, n)
    return Measured("unlearn", arm, target, 4, random + mean + rng.normal(0, 0.05, n), random, foreseen)


def test_rows_test_in_the_foreseen_direction_and_correct_within_an_arm() -> None:
    found = pair_rows(
        [
            pairs_of(-0.5, target="behavior:facts"),
            pairs_of(0.0, target="behavior:other"),
            pairs_of(0.5, target="behavior:third"),
            pairs_of(0.5, target="behavior:facts", arm="lowest", foreseen=1.0),
        ],
        "behavior:facts",
    )
    facts, other, third, lowest = found
    assert [row.verdict for row in found] == ["supported", "undecided", "not supported", "supported"]
    assert facts.p == 1 / 256 and facts.p_bh == facts.p_holm == pytest.approx(3 / 256)
    assert facts.rank_biserial == 1.0 and third.rank_biserial == -1.0
    assert facts.difference == pytest.approx(facts.named - facts.random) and facts.hi < 0
    assert lowest.p_bh == lowest.p and lowest.foreseen == 1  # a family of its own
    assert other.least_p == 1 / 256 and facts.p_draw == 1 / 9


def test_four_pairs_are_never_supported() -> None:
    (row,) = pair_rows([pairs_of(-5.0, target="behavior:facts", n=4)], "behavior:facts")
    assert row.p == 1 / 16 and row.verdict == "undecided"


def test_chance_is_seldom_called_supported() -> None:
    """Of 300 targets without an effect, at most .05 in the mean, one by one."""
    rng = np.random.default_rng(0)
    called = [
        pair_rows([Measured("teach", "highest", "t", 4, rng.normal(size=7), rng.normal(size=7), 1.0)], "t")[0].verdict
        for _ in range(300)
    ]
    assert called.count("supported") <= 0.05 * 300 + 3 * math.sqrt(300 * 0.05 * 0.95)


def test_what_influence_foresees_of_a_run() -> None:
    influence = {"a": 1.0, "b": 3.0, "c": -2.0}
    assert foreseen_change([("a", "b"), ("c",)], [10.0, 100.0], influence) == 10 * 2 + 100 * -2
