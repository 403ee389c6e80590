"""Capability maps: what is found, what is not, and that neither one document nor one bin makes it."""

from __future__ import annotations

import math
from collections.abc import Callable
from itertools import product
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from scipy.stats import mannwhitneyu, rankdata, trim_mean

from taught.analysis.bins import Bin, BinMap, carries, leave_one_out, map_bins, standardised
from taught.analysis.partition import UNKNOWN, contrast_weights, pairs, spread, trimmed_mean
from taught.errors import UserError

TOPICS, FORMATS = ("art", "games", "health", "law"), ("essay", "forum", "news")
FAST = {"permutations": 199, "bootstrap": 20}


def corpus(rng: np.random.Generator, n: int = 240) -> tuple[list[str], dict[str, list[str]]]:
    """Documents of four topics in three formats, all twelve bins of the same size."""
    cells = list(product(TOPICS, FORMATS))
    place = rng.permutation(np.arange(n) % len(cells))
    labels = {name: [cells[k][at] for k in place] for at, name in enumerate(("topic", "format"))}
    return [f"d{i:03d}" for i in range(n)], labels


def heavy(rng: np.random.Generator, n: int, questions: int = 8) -> np.ndarray:
    """Values of documents on questions: heavy tails between documents, noise between questions."""
    return rng.standard_t(2, (n, 1)) + 0.5 * rng.normal(size=(n, questions))


def inside(labels: dict[str, list[str]], topic: str, format: str) -> np.ndarray:
    both = zip(labels["topic"], labels["format"], strict=True)
    return np.array([pair == (topic, format) for pair in both])


def mapped(ids: list[str], labels: Any, questions: dict[str, np.ndarray], **given: Any) -> BinMap:
    values = {name: own.mean(1) for name, own in questions.items()}
    return map_bins(ids, labels, values, questions, **(FAST | given))


def significant(rows: tuple[Bin, ...]) -> list[Bin]:
    return [row for row in rows if row.tested and row.p_holm <= 0.05]


def of(rows: tuple[Bin, ...], level: str, *names: str | None, benchmark: str = "quiz") -> Bin:
    (row,) = (r for r in rows if (r.level, r.row, r.column, r.benchmark) == (level, *names, benchmark))
    return row


# The measures


def test_a_planted_bin_is_first_and_significant_in_nine_of_ten_seeds():
    found = 0
    for seed in range(10):
        rng = np.random.default_rng(seed)
        ids, labels = corpus(rng)
        quiz = heavy(rng, len(ids)) + 3 * inside(labels, "health", "news")[:, None]
        row = of(mapped(ids, labels, {"quiz": quiz}).bins, "bin", "health", "news")
        found += row.rank == 1 and row.p_holm < 0.05 and row.effect_lo > 0
    assert found >= 9


def test_with_permuted_labels_hardly_any_map_calls_a_bin_significant():
    false = 0
    rng = np.random.default_rng(0)
    ids, labels = corpus(rng, 120)
    quiz = heavy(rng, len(ids), 2)
    for _ in range(100):
        order = rng.permutation(len(ids))
        shuffled = [f"{labels['topic'][i]}, {labels['format'][i]}" for i in order]
        found = mapped(ids, {"bin": shuffled}, {"quiz": quiz}, permutations=99, bootstrap=2)
        false += bool(significant(found.bins))
    assert false <= 5


@pytest.mark.parametrize("size", [1e3, 1e9, -1e9])
def test_a_single_outlier_document_makes_no_bin_significant_and_is_named(size: float):
    for seed in range(5):
        rng = np.random.default_rng(seed)
        ids, labels = corpus(rng)
        quiz = heavy(rng, len(ids))
        before = mapped(ids, labels, {"quiz": quiz}).bins
        assert not significant(before)
        place = int(inside(labels, "law", "forum").argmax())
        quiz[place] = size
        found = mapped(ids, labels, {"quiz": quiz}).bins
        assert not significant(found)
        row = of(found, "bin", "law", "forum")
        assert abs(row.z) > 2.5 and row.carried_by == ids[place]
        assert abs(row.trimmed) < 3
        assert of(found, "row", "law", None).carried_by == ids[place]
        assert of(found, "row", "law", None).over_bins_carried_by == "forum"
        assert of(found, "column", None, "forum").over_bins_carried_by == "law"
        assert of(found, "row", "art", None).over_bins_carried_by is None
        one, other = (of(rows, "bin", "art", "news") for rows in (before, found))  # what others do is as it was
        assert other.effect_hi - other.effect_lo == pytest.approx(one.effect_hi - one.effect_lo, rel=0.3)


# Single numbers


def test_rows_are_the_statistics_of_their_documents():
    rng = np.random.default_rng(1)
    ids, labels = corpus(rng)
    quiz = heavy(rng, len(ids))
    found = mapped(ids, labels, {"quiz": quiz})
    x = quiz.mean(1)
    means = {(t, f): x[inside(labels, t, f)].mean() for t, f in product(TOPICS, FORMATS)}
    for (topic, format), mean in means.items():
        own = x[inside(labels, topic, format)]
        row = of(found.bins, "bin", topic, format)
        assert (row.n_documents, row.tested) == (20, True)
        assert row.mean == pytest.approx(mean)
        assert row.median == pytest.approx(np.median(own))
        assert row.share_positive == pytest.approx((own > 0).mean())
        assert row.trimmed == pytest.approx(trim_mean(own, 0.1))
        assert row.effect == pytest.approx(trim_mean(own, 0.1) - trim_mean(x, 0.1))
        left = [np.delete(own, i).mean() for i in range(len(own))]
        assert (row.without_lo, row.without_hi) == pytest.approx((min(left), max(left)))
        every = np.array(list(means.values()))
        assert row.z == pytest.approx((mean - every.mean()) / every.std(ddof=1))
        rest = x[~inside(labels, topic, format)]
        assert row.above == pytest.approx(mannwhitneyu(own, rest).statistic / (len(own) * len(rest)))
        assert row.lo < row.mean < row.hi and row.trimmed_lo < row.trimmed < row.trimmed_hi
    law = of(found.bins, "row", "law", None)
    bins = [means["law", f] for f in FORMATS]
    left = [np.delete(bins, i).mean() for i in range(3)]
    assert law.over_bins == pytest.approx(np.mean(bins))
    assert (law.over_bins_lo, law.over_bins_hi) == pytest.approx((min(left), max(left)))


def test_p_is_that_of_the_rank_sum_test_of_scipy():
    rng = np.random.default_rng(2)
    ids, labels = corpus(rng)
    quiz = heavy(rng, len(ids)) + inside(labels, "art", "news")[:, None]
    found = mapped(ids, labels, {"quiz": quiz}, permutations=4999, bootstrap=2)
    x = quiz.mean(1)
    for row in found.bins:
        if row.level == "bin":
            own = inside(labels, row.row, row.column)
            expected = mannwhitneyu(x[own], x[~own], method="asymptotic", use_continuity=False).pvalue
            assert row.p == pytest.approx(expected, rel=0.1, abs=0.01)


def test_intervals_cover_what_other_documents_and_other_questions_would_give():
    """Documents and questions vary: the true mean of the bin is in the 95% interval about as often as that."""
    covered = with_questions = 0
    for seed in range(60):
        rng = np.random.default_rng(seed)
        labels = {"topic": ["a"] * 25 + ["b"] * 25}
        ids = [f"d{i:02d}" for i in range(50)]
        quiz = rng.normal(size=(50, 1)) + rng.normal(size=(1, 10)) + rng.normal(size=(50, 10))
        given = {"permutations": 1, "bootstrap": 200}
        row = of(mapped(ids, labels, {"quiz": quiz}, **given).bins, "bin", "a", None)
        covered += row.trimmed_lo <= 0 <= row.trimmed_hi
        row = of(map_bins(ids, labels, {"quiz": quiz.mean(1)}, **given).bins, "bin", "a", None)
        with_questions += row.trimmed_lo <= 0 <= row.trimmed_hi
    assert covered >= 52
    assert with_questions < covered  # without single questions only documents are drawn


def test_ranks_and_correction_are_of_the_tested_bins_alone():
    rng = np.random.default_rng(3)
    ids, labels = corpus(rng)
    place = int(inside(labels, "law", "forum").argmax())
    labels["format"][place] = "rare"
    labels["topic"][0], labels["topic"][1] = UNKNOWN, UNKNOWN
    quiz = heavy(rng, len(ids))
    quiz[place] = 100
    found = mapped(ids, labels, {"quiz": quiz})
    rare = of(found.bins, "bin", "law", "rare")
    assert not rare.tested and rare.mean == pytest.approx(100)
    assert (rare.rank, rare.p, rare.p_holm, rare.lo, rare.without_lo) == (None,) * 5
    unknown = of(found.bins, "row", UNKNOWN, None)
    assert not unknown.tested and unknown.n_documents == 2
    many = mapped(ids, labels, {"quiz": quiz}, minimum=2)
    assert not of(many.bins, "row", UNKNOWN, None).tested
    tested = [row for row in found.bins if row.level == "bin" and row.tested]
    assert sorted(row.rank for row in tested) == list(range(1, 13))
    ordered = sorted(tested, key=lambda row: row.p)
    holm = np.minimum(1, np.maximum.accumulate([row.p * (12 - k) for k, row in enumerate(ordered)]))
    assert [row.p_holm for row in ordered] == pytest.approx(holm.tolist())
    assert all(row.p <= row.p_bh <= row.p_holm for row in ordered)


def test_the_order_of_documents_changes_nothing():
    rng = np.random.default_rng(4)
    ids, labels = corpus(rng)
    quiz = {"quiz": heavy(rng, len(ids)), "exam": heavy(rng, len(ids))}
    order = rng.permutation(len(ids))
    moved = {name: [own[i] for i in order] for name, own in labels.items()}
    one = mapped(ids, labels, quiz)
    other = mapped([ids[i] for i in order], moved, {name: own[order] for name, own in quiz.items()})
    assert one.bins == other.bins and one.contrasted == other.contrasted
    assert repr(one.agreements) == repr(other.agreements)


@given(seed=st.integers(0, 99), factor=st.floats(0.01, 100), shift=st.floats(-5, 5))
@settings(max_examples=8, deadline=None)
def test_another_unit_of_a_benchmark_scales_its_values_and_changes_no_test(seed: int, factor: float, shift: float):
    rng = np.random.default_rng(seed)
    ids, labels = corpus(rng, 120)
    quiz, exam = heavy(rng, len(ids), 3), heavy(rng, len(ids), 3)
    one = mapped(ids, labels, {"quiz": quiz, "exam": exam}, bootstrap=8)
    other = mapped(ids, labels, {"quiz": factor * quiz + shift, "exam": exam}, bootstrap=8)
    for a, b in zip(one.bins, other.bins, strict=True):
        assert (a.rank, a.p, a.carried_by) == (b.rank, b.p, b.carried_by)
        scale = factor if a.benchmark == "quiz" else 1
        assert b.effect == pytest.approx(scale * a.effect, abs=1e-9) and b.z == pytest.approx(a.z)
        if a.tested:
            assert b.effect_hi == pytest.approx(scale * a.effect_hi, abs=1e-9)
    for a, b in zip(one.contrasted, other.contrasted, strict=True):
        assert a.p == b.p and b.effect == pytest.approx(a.effect, abs=1e-9)


def test_many_ties_do_not_make_a_bin_significant():
    """Ranks of many tied values have heavier tails than the normal: the p is that of the draws."""
    rng = np.random.default_rng(5)
    ids, labels = corpus(rng)
    quiz = np.zeros((len(ids), 2))
    quiz[inside(labels, "art", "news").argmax()] = 1
    row = of(mapped(ids, labels, {"quiz": quiz}).bins, "bin", "art", "news")
    assert row.p > 0.05
    flat = mapped(ids, labels, {"quiz": np.zeros((len(ids), 2))}).bins
    assert {(row.p, row.above, row.z) for row in flat if row.level == "bin"} == {(1.0, 0.5, None)}


# Contrasts


def test_a_contrast_is_a_difference_in_robust_scales_tested_like_a_benchmark():
    rng = np.random.default_rng(6)
    ids, labels = corpus(rng)
    shared = 5 * rng.standard_t(2, (len(ids), 1))
    planted = inside(labels, "games", "essay")[:, None]
    quiz = {
        "a": shared + 3 * planted + rng.normal(size=(len(ids), 6)),
        "b": 100 * (shared + rng.normal(size=(len(ids), 6))),
        "c": rng.normal(size=(len(ids), 6)),
        "d": rng.normal(size=(len(ids), 6)),
    }
    found = mapped(ids, labels, quiz, contrasts=["a - b", "(a - b) - (c - d)"])
    x = {name: own.mean(1) for name, own in quiz.items()}
    scaled = {name: own / spread(own) for name, own in x.items()}
    own = inside(labels, "games", "essay")
    row = of(found.contrasted, "bin", "games", "essay", benchmark="a - b")
    assert row.trimmed == pytest.approx(trim_mean((scaled["a"] - scaled["b"])[own], 0.1))
    assert row.rank == 1 and row.p_holm < 0.05 and row.effect_lo > 0
    z = {name: of(found.bins, "bin", "games", "essay", benchmark=name).z for name in quiz}
    assert row.z == pytest.approx(z["a"] - z["b"])
    both = of(found.contrasted, "bin", "games", "essay", benchmark="(a - b) - (c - d)")
    assert both.z == pytest.approx(z["a"] - z["b"] - z["c"] + z["d"])
    four = scaled["a"] - scaled["b"] - scaled["c"] + scaled["d"]
    assert both.mean == pytest.approx(four[own].mean())


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        ("a - b", (1, -1, 0, 0)),
        (" a - (x - y) ", (1, 0, -1, 0)),
        ("(a - b) - (x - y - a)", (2, -1, -1, 1)),
        ("a - b - (c)", (1, -1, 0, -1)),
        ("x - y - (c)", (0, 0, 1, -1)),
    ],
)
def test_a_contrast_is_read_by_the_names_of_benchmarks(text: str, expected: tuple[int, ...]):
    """A name may hold the sign and parentheses."""
    names = ("a", "b", "x - y", "(c)") if "y - a" not in text else ("a", "b", "x", "y")
    assert contrast_weights(text, names).tolist() == list(expected)


@pytest.mark.parametrize("text", ["a", "a - a", "a - nobody", "a-b", "", "(a - b", "a - b)"])
def test_what_is_no_contrast_names_the_benchmarks(text: str):
    with pytest.raises(UserError, match="contrast") as error:
        contrast_weights(text, ("a", "b"))
    assert "a, b" in error.value.rule and "bins.contrasts" in error.value.fix


@pytest.mark.parametrize(
    ("text", "names", "written", "expected"),
    [
        ("a - a - b", ("a", "b", "a - b"), "a - (a - b)", (1, 0, -1)),
        ("a - b - c", ("a", "b - c", "a - b", "c"), "(a - b) - c", (0, 0, 1, -1)),
        ("a - b - c", ("a", "b - c", "a - b", "c"), "a - (b - c)", (1, -1, 0, 0)),
    ],
)
def test_a_contrast_that_names_give_two_meanings_is_refused_and_parentheses_mend_it(text, names, written, expected):
    with pytest.raises(UserError, match="several ways") as error:
        contrast_weights(text, names)
    assert "parentheses" in error.value.fix
    assert contrast_weights(written, names).tolist() == list(expected)


def test_the_pairs_that_are_contrasted_by_default_mean_these_pairs_whatever_the_names():
    names = ("a", "b", "a - b", "(c)")
    found = {tuple(contrast_weights(text, names)) for text in pairs(names)}
    pair = {(1, -1, 0, 0), (1, 0, -1, 0), (1, 0, 0, -1), (0, 1, -1, 0), (0, 1, 0, -1), (0, 0, 1, -1)}
    assert found == pair - {(1, -1, 0, 0)}  # "a - b" is a benchmark itself


def test_pairs_of_a_few_benchmarks_are_contrasted_where_none_is_named():
    rng = np.random.default_rng(7)
    ids, labels = corpus(rng)
    four = {name: heavy(rng, len(ids), 1) for name in "abcd"}
    few = {"permutations": 1, "bootstrap": 1}
    assert len(mapped(ids, labels, four, **few).contrasts) == 6
    assert mapped(ids, labels, four, contrasts=[], **few).contrasted == ()
    assert mapped(ids, labels, four | {"e": four["a"]}, **few).contrasts == ()


# Profiles


def profiles(rng: np.random.Generator, n: int, rho: float, noise: float, shared: float = 0.0) -> Any:
    """Two benchmarks whose bins' true values correlate, on noisy documents; ``shared``: of the noise."""
    labels = {"bin": [f"b{i % 40:02d}" for i in range(n)]}
    place = np.arange(n) % 40
    true = rng.normal(size=(40, 2)) @ np.linalg.cholesky([[1, rho], [rho, 1]]).T
    common = rng.normal(size=(n, 1)) * math.sqrt(shared)
    own = rng.normal(size=(n, 2)) * math.sqrt(1 - shared)
    values = true[place] + noise * (common + own)
    quiz = {name: values[:, [k]] + 0.1 * rng.normal(size=(n, 8)) for k, name in enumerate("ab")}
    exact = np.corrcoef(true.T)[0, 1]
    return [f"d{i:04d}" for i in range(n)], labels, quiz, exact


@pytest.mark.parametrize(("rho", "shared"), [(0.9, 0.0), (0.0, 0.9)])
def test_correlations_are_corrected_for_noise_and_for_shared_documents(rho: float, shared: float):
    rng = np.random.default_rng(8)
    ids, labels, quiz, exact = profiles(rng, 400, rho, 2.0, shared)
    (found,) = mapped(ids, labels, quiz, permutations=1, bootstrap=100).agreements
    assert abs(found.corrected.value - exact) < abs(found.plain.value - exact)
    assert found.corrected.value == pytest.approx(exact, abs=0.15)
    assert found.corrected.lo < exact < found.corrected.hi
    assert 0.5 < found.reliability_a < 0.95 and found.bins == 40


def test_reliability_is_that_of_the_whole_profile():
    """Variance of the true bins over that of the measured ones, which Spearman and Brown's formula gives from halves."""
    rng = np.random.default_rng(9)
    ids, labels, quiz, _ = profiles(rng, 1200, 0.5, 3.0)
    (found,) = mapped(ids, labels, quiz, permutations=1, bootstrap=2, trim=0.0).agreements
    x = quiz["a"].mean(1)
    means = np.array([x[np.arange(1200) % 40 == b].mean() for b in range(40)])
    within = np.mean([x[np.arange(1200) % 40 == b].var(ddof=1) / 30 for b in range(40)])
    assert found.reliability_a == pytest.approx(1 - within / means.var(ddof=1), abs=0.05)


def test_profiles_that_are_noise_are_not_corrected():
    rng = np.random.default_rng(10)
    ids, labels, quiz, _ = profiles(rng, 400, 0.0, 30.0)
    (found,) = mapped(ids, labels, quiz, permutations=1, bootstrap=20).agreements
    assert min(found.reliability_a, found.reliability_b) < 0.5 and math.isnan(found.corrected.value)


def test_the_bin_that_makes_a_correlation_is_found():
    rng = np.random.default_rng(11)
    ids, labels, quiz, _ = profiles(rng, 400, 0.0, 0.1)
    inside = np.array([label == "b07" for label in labels["bin"]])
    quiz = {name: own + 20 * inside[:, None] for name, own in quiz.items()}
    (found,) = mapped(ids, labels, quiz, permutations=1, bootstrap=20).agreements
    assert found.plain.value > 0.85 and found.without_lo < 0.4 and found.without == ("b07",)


# The published table

PUBLISHED = {  # z of six of 576 bins, from the tables of arXiv 2606.19625 (CC BY 4.0)
    "SocialIQA": (16.0022, 1.9032, 0.4559, 0.0808, 6.5449, 0.4118),
    "MMLU social science": (-7.3116, -0.0594, 1.1362, 2.1685, 6.9507, 6.8559),
    "ARC-Challenge": (-1.9176, -0.7490, -0.3519, 2.9432, 8.1637, 5.5937),
    "MMLU STEM": (-5.7451, -0.4598, -0.5755, 3.0967, 8.4189, 5.5592),
}


def test_contrasts_of_the_published_z_and_what_one_bin_does_to_a_topic():
    """What follows from the published values alone.

    The z themselves need the means of all 576 bins and the documents behind them, which are not at hand. Their
    contrasts are differences: literature x customer support carries every contrast with SocialIQA. Literature's
    published mean of .58 over its 24 formats is -.09 without that one bin.
    """
    names = tuple(PUBLISHED)
    z = np.array(list(PUBLISHED.values()))
    reasoning = contrast_weights("SocialIQA - ARC-Challenge", names) @ z
    assert reasoning.tolist() == pytest.approx([17.9198, 2.6522, 0.8078, -2.8624, -1.6188, -5.1819])
    knowledge = contrast_weights("MMLU social science - MMLU STEM", names) @ z
    assert knowledge.tolist() == pytest.approx([-1.5665, 0.4004, 1.7117, -0.9282, -1.4682, 1.2967])
    both = contrast_weights("(SocialIQA - ARC-Challenge) - (MMLU social science - MMLU STEM)", names) @ z
    assert both.tolist() == pytest.approx((reasoning - knowledge).tolist())
    others = (0.58 * 24 - 16.0022) / 23
    literature = np.append(others + np.linspace(-1, 1, 23), 16.0022)
    assert literature.mean() == pytest.approx(0.58)
    assert leave_one_out(literature)[0] == pytest.approx(-0.09, abs=0.005)
    assert carries(literature, 0.0, 1.0) == 23
    social, science = z[0], z[2]
    assert np.corrcoef(social, science)[0, 1] < 0 < np.corrcoef(social[1:], science[1:])[0, 1]


def test_z_is_over_bins_with_the_sample_standard_deviation():
    means = np.array([[1.0], [2.0], [6.0]])
    assert standardised(means)[:, 0].tolist() == pytest.approx((np.array([-2, -1, 3]) / np.sqrt(7)).tolist())
    assert np.isnan(standardised(np.ones((3, 1)))).all() and np.isnan(standardised(np.ones((1, 1)))).all()


@pytest.mark.parametrize("n", [1, 2, 3, 4, 10, 37])
def test_a_trimmed_mean_leaves_out_one_document_at_either_end_at_least(n: int):
    x = np.random.default_rng(n).normal(size=n)
    cut = 0 if n < 3 else max(1, math.ceil(0.1 * n))
    assert trimmed_mean(x, 0.1) == pytest.approx(np.sort(x)[cut : n - cut].mean())
    assert trimmed_mean(x, 0.0) == pytest.approx(x.mean())
    assert trimmed_mean(x, 0.49) == pytest.approx(np.median(x))


# What is refused


def broken(**changes: Any) -> Callable[[], BinMap]:
    given: dict[str, Any] = {
        "document_ids": [f"d{i}" for i in range(12)],
        "labels": {"topic": ["a"] * 6 + ["b"] * 6},
        "values": {"quiz": np.arange(12.0)},
    } | changes
    return lambda: map_bins(**given, **FAST)


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"document_ids": ["d0"] * 12}, "repeats"),
        ({"values": {"quiz": np.arange(11.0)}}, "fit together"),
        ({"labels": {"topic": ["a"] * 11}}, "fit together"),
        ({"values": {}}, "fit together"),
        ({"values": {"quiz": np.array([math.nan, *range(11)])}}, "not finite"),
        ({"labels": {"topic": ["a"] * 12}}, "one bin"),
        ({"minimum": 7}, "bins.minimum"),
        ({"labels": {"topic": ["a"] * 4 + [UNKNOWN] * 8}}, "bins.minimum"),
        ({"questions": {"quiz": np.ones((12, 2))}}, "mean of those on its questions"),
        ({"questions": {"quiz": np.full((12, 2), math.nan)}}, "not finite"),
        ({"questions": {"quiz": np.ones((12, 0))}}, "fit"),
        ({"values": {"quiz": np.arange(12.0), "flat": np.ones(12)}, "contrasts": ["quiz - flat"]}, "same value"),
    ],
)
def test_what_cannot_be_mapped_is_refused_in_words(changes: dict[str, Any], words: str):
    with pytest.raises(UserError, match=words):
        broken(**changes)()


def test_the_advice_of_a_smaller_minimum_works():
    found = broken(minimum=6)()
    assert all(row.tested for row in found.bins)
    assert found.bins[0].p == pytest.approx(2 / 924, abs=0.01)
    assert rankdata([row.trimmed for row in found.bins]).tolist() == [1, 2]
