"""Clusters of examples by their features: what is found, what is not, and against what."""

from __future__ import annotations

import itertools
from collections.abc import Mapping

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from scipy.cluster.hierarchy import fcluster, linkage
from sklearn.metrics import silhouette_score

from taught.analysis import clusters as under_test
from taught.analysis.clusters import Clustering, cluster_examples, cut, silhouette, ward
from taught.errors import UserError
from taught.report.sections.clusters import Clustered, cluster_sentences

FEATURES = list(range(100, 118))
CORE = [FEATURES[5 * g : 5 * g + 5] for g in range(3)]
LABELS = {f: f"topic {(f - 100) // 5}" if f < 115 else None for f in FEATURES}


def planted(rng: np.random.Generator, n: int = 90, keep: float = 0.97, noise: float = 0.03):
    """Examples of three kinds: each has most of its kind's five features and few of the others."""
    kind = rng.permutation(np.arange(n) % 3)
    chance = np.array([[keep if f in CORE[g] else noise for f in FEATURES] for g in kind])
    matrix = rng.random((n, len(FEATURES))) < chance
    matrix[~matrix.any(1), 0] = True
    active = [[f for f, on in zip(FEATURES, row, strict=True) if on] for row in matrix]
    return [f"z{i:03d}" for i in range(n)], active, kind


def partition(groups: Mapping[str, int]) -> set[frozenset[str]]:
    return {frozenset(i for i in groups if groups[i] == c) for c in set(groups.values())}


def of_example(found: Clustering) -> dict[str, int]:
    return dict(zip(found.example_ids, found.cluster.tolist(), strict=True))


# The tree and where it is cut


@given(st.integers(2, 25), st.integers(0, 99))
def test_ward_is_scipys_with_repeated_points(n: int, seed: int):
    rng = np.random.default_rng(seed)
    points, counts = rng.normal(size=(n, 4)), rng.integers(1, 4, n)
    merges = ward(points, counts)
    tree = linkage(np.repeat(points, counts, axis=0), "ward")
    first = np.cumsum(counts) - counts
    heights = np.sort([height for height, _, _ in merges])
    np.testing.assert_allclose(np.sqrt(heights), tree[-(n - 1) :, 2], rtol=1e-7)
    for k in range(1, n + 1):
        own, theirs = cut(merges, n, k), fcluster(tree, k, "maxclust")[first]
        assert len(set(own)) == k
        assert len(set(zip(own, theirs, strict=True))) == k


@given(st.integers(4, 20), st.integers(0, 99))
def test_silhouette_is_scikit_learns_with_repeated_points(n: int, seed: int):
    rng = np.random.default_rng(seed)
    z = rng.normal(size=(n, 3))
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    counts, label = rng.integers(1, 4, n), rng.integers(0, 3, n)
    label[:3] = [0, 1, 2]
    distance = np.maximum(1 - z @ z.T, 0)
    np.fill_diagonal(distance, 0)
    whole = np.repeat(np.arange(n), counts)
    expected = silhouette_score(distance[np.ix_(whole, whole)], label[whole], metric="precomputed")
    assert silhouette(distance, counts, label) == pytest.approx(expected, abs=1e-12)


# What is found


def test_planted_clusters_and_their_influence_are_found():
    rng = np.random.default_rng(0)
    ids, active, kind = planted(rng)
    score = rng.normal(size=90) + 1.5 * (kind == 1)
    other = rng.normal(size=90)
    found = cluster_examples(ids, active, LABELS, {"score": score, "behavior:a": other})
    assert partition(of_example(found)) == partition(dict(zip(ids, kind.tolist(), strict=True)))
    assert max(found.silhouettes, key=lambda k: found.silhouettes[k]) == 3
    of_kind = {int(kind[ids.index(c.examples[0])]): c for c in found.clusters}
    for g, cluster in of_kind.items():
        assert cluster.name == " · ".join([f"topic {g}"] * 3)
        assert {f.feature_id for f in cluster.features} <= set(CORE[g])
        assert all(f.inside > 0.7 and f.outside < 0.3 for f in cluster.features)
        assert cluster.outside_share is None  # no coefficients were given
    effect = {(e.cluster, e.target): e for e in found.effects}
    raised = effect[of_kind[1].cluster, "score"]
    assert raised.p_holm < 0.01 and raised.lo <= raised.mean <= raised.hi
    assert raised.mean == pytest.approx(score[kind == 1].mean())
    assert raised.mean > raised.random_hi
    assert all(e.p_holm > 0.05 for e in found.effects if e.target == "behavior:a")
    assert min(c.n_examples for c in found.clusters) == 30


def test_random_values_are_significant_no_more_often_than_alpha():
    """Influence that has nothing to do with the features: false alarms over 240 runs."""
    rng = np.random.default_rng(1)
    any_found, raw = np.zeros(2), []
    for _ in range(240):
        ids, active, _ = planted(rng, n=36, keep=0.6, noise=0.3)
        values = {name: rng.standard_t(3, size=36) for name in ("score", "behavior:a")}
        labels = rng.choice(["a", "b"], 36).tolist()
        found = cluster_examples(ids, active, LABELS, values, k=3, kinds=labels, draws=299)
        any_found += np.array(
            [any(e.p_holm <= 0.05 for e in found.effects), any(e.matched_p_holm <= 0.05 for e in found.effects)]
        )
        raw += [(e.p, e.matched_p) for e in found.effects]
    assert (any_found <= 24).all()  # 12 expected, at most 24 with probability .9995
    share = (np.array(raw) <= 0.05).mean(0)
    assert ((share > 0.03) & (share < 0.07)).all()
    np.testing.assert_allclose(np.mean(raw, 0), 0.5, atol=0.05)


def test_the_sentence_says_what_is_beyond_the_labels():
    row = {"target": "score", "mean": 2.0, "random_lo": -1.0, "random_hi": 1.0, "p_holm": 0.01}
    rows = [
        row | {"cluster": 1, "matched_p_holm": 0.3},
        row | {"cluster": 2, "mean": -2.0, "matched_p_holm": 0.01},
        row | {"cluster": 3, "p_holm": 0.4, "matched_p_holm": 0.01},
    ]
    made = {"examples": 9, "without": 0, "k": 3, "silhouette": 0.2, "sets": 5, "clustered": 5}
    clusters = [{"cluster": c, "name": "n", "outside_share": None} for c in (1, 2, 3)]

    def said(some: list[dict]) -> tuple[str, str]:
        sentences = cluster_sentences(Clustered(clusters, some, made, []))
        assert "hardly apart" in sentences[0].text and len(sentences) == 2
        return sentences[1].tone, sentences[1].text

    assert said(rows) == (
        "found",
        (
            "Mean influence unlike that of as many random examples: score S: cluster 1 (higher), 2 (lower). "
            "Also unlike random examples of the same labels: score S: cluster 2 (lower)."
        ),
    )
    tone, text = said([rows[0]])
    assert tone == "caution" and text.endswith("the labels may be all there is to it.")
    assert said([rows[0] | {"matched_p_holm": None}])[0] == "found"
    assert said([rows[2]])[1].startswith("No effect found")


def test_p_is_that_of_all_groups_of_the_size():
    ids = [f"p{i}" for i in range(9)]
    active = [[100, 101]] * 3 + [[105, 106]] * 6
    score = np.array([2.0, 1.5, 0.2, 0.1, -1.0, 0.4, -0.3, 0.9, 0.0])
    found = cluster_examples(ids, active, LABELS, {"score": score}, draws=20_000)
    sizes = {e.cluster: c.n_examples for e, c in zip(found.effects, found.clusters, strict=True)}
    assert sizes == {1: 6, 2: 3}
    far = abs(score[:3].mean() - score.mean())
    groups = [np.mean(some) for some in itertools.combinations(score, 3)]
    expected = np.mean(np.abs(np.array(groups) - score.mean()) >= far - 1e-12)
    small = found.effects[1]
    assert small.p == pytest.approx(expected, abs=4 * np.sqrt(expected / 20_000))
    assert small.random_lo == pytest.approx(np.quantile(groups, 0.025), abs=0.1)
    assert found.effects[0].p == small.p  # the rest of one cluster is the other
    assert found.effects[0].p_holm == min(1.0, 2 * small.p)
    assert small.lo is None and found.effects[0].lo is not None  # too few examples for an interval


def test_what_labels_explain_is_said():
    """One label raises the target, and its examples have features of their own."""
    rng = np.random.default_rng(11)
    ids, active, kind = planted(rng)
    labels = ["b" if g == 1 else "a" for g in kind]
    score = rng.normal(size=90) + 2 * (kind == 1)
    other = rng.normal(size=90) + 2 * (kind == 2)  # within the label a
    values = {"score": score, "behavior:g": other}
    found = cluster_examples(ids, active, LABELS, values, kinds=labels)
    groups = of_example(found)
    effect = {(e.cluster, e.target): e for e in found.effects}
    first, second = (groups[ids[list(kind).index(g)]] for g in (1, 2))
    assert effect[first, "score"].p_holm < 0.01 and effect[first, "score"].matched_p_holm == 1
    assert effect[second, "behavior:g"].p_holm < 0.01
    assert effect[second, "behavior:g"].matched_p_holm < 0.01
    plain = cluster_examples(ids, active, LABELS, values, kinds=["a"] * 90)
    assert {e.matched_p for e in plain.effects} == {None}
    assert [e.p for e in plain.effects] == [e.p for e in found.effects]


def test_matched_p_is_that_of_all_groups_with_these_labels():
    ids = [f"p{i}" for i in range(9)]
    active = [[100, 101]] * 3 + [[105, 106]] * 6
    labels = list("aababbabb")
    score = np.array([2.0, 1.5, 0.2, 0.1, -1.0, 0.4, -0.3, 0.9, 0.0])
    values = {"score": score}
    found = cluster_examples(ids, active, LABELS, values, kinds=labels, draws=20_000)
    ones = [i for i in range(9) if labels[i] == "a"]
    rest = [i for i in range(9) if labels[i] == "b"]
    groups = np.array([score[[*two, one]].mean() for two in itertools.combinations(ones, 2) for one in rest])
    centre = (2 * score[ones].mean() + score[rest].mean()) / 3
    assert groups.mean() == pytest.approx(centre)
    expected = np.mean(np.abs(groups - centre) >= abs(score[:3].mean() - centre) - 1e-12)
    assert found.effects[1].matched_p == pytest.approx(expected, abs=4 * np.sqrt(expected / 20_000))


def test_constant_values_are_like_any_others():
    ids, active, _ = planted(np.random.default_rng(2), n=30)
    found = cluster_examples(ids, active, LABELS, {"score": np.full(30, 0.1)}, k=3, draws=99)
    assert {e.p for e in found.effects} == {1.0}


def test_intervals_are_those_of_a_mean():
    values = np.random.default_rng(3).normal(size=400)
    for times, near in ((1, 0.01), (20, 1e-4)):  # resampled, and normal
        some = np.tile(values, times)
        ids = [f"e{i:04d}" for i in range(len(some))]
        (found,) = cluster_examples(ids, [[100]] * len(ids), LABELS, {"score": some}, k=1, draws=9).effects
        half = 1.96 * some.std(ddof=1) / np.sqrt(len(some))
        np.testing.assert_allclose([found.lo, found.hi], [values.mean() - half, values.mean() + half], atol=near)


def test_interference_against_loops():
    rng = np.random.default_rng(4)
    ids, active, kind = planted(rng, n=60)
    shifts = rng.normal(size=(60, len(FEATURES)))
    own = np.array([[f in some for f in FEATURES] for some in active])
    shifts[(kind == 2)[:, None] & ~own] *= 6  # these examples move what they are not about
    parts = [(f, shifts[:, j]) for j, f in enumerate(FEATURES)]
    found = cluster_examples(ids, active, LABELS, {"score": rng.normal(size=60)}, iter(parts), k=3)
    groups = of_example(found)
    for cluster in found.clusters:
        outside = whole = chance = 0.0
        for i, example in enumerate(ids):
            if groups[example] == cluster.cluster:
                size = np.abs(shifts[i])
                outside += sum(s for s, f in zip(size, FEATURES, strict=True) if f not in active[i])
                whole += size.sum()
                chance += size.sum() * (1 - len(active[i]) / len(FEATURES))
        assert cluster.outside_share == pytest.approx(outside / whole)
        assert cluster.outside_by_chance == pytest.approx(chance / whole)
        loud = kind[ids.index(cluster.examples[0])] == 2
        assert (cluster.outside_share > cluster.outside_random_hi) == loud
        assert cluster.outside_p_holm < 0.05 or not loud


# Examples and their order


def test_the_order_of_examples_and_parts_is_irrelevant():
    rng = np.random.default_rng(5)
    ids, active, _ = planted(rng, n=40, keep=0.6, noise=0.3)
    active[7] = []
    score, shifts = rng.normal(size=40), rng.normal(size=(40, len(FEATURES)))

    def result(order, columns):
        return cluster_examples(
            [ids[i] for i in order],
            [active[i][::-1] for i in order],
            dict(reversed(LABELS.items())),
            {"score": score[order]},
            [(FEATURES[j], shifts[order, j]) for j in columns],
            draws=99,
        )

    first = result(np.arange(40), np.arange(18))
    again = result(rng.permutation(40), np.arange(18))
    assert again.example_ids == first.example_ids and again.effects == first.effects
    assert (again.cluster == first.cluster).all() and again.clusters == first.clusters
    np.testing.assert_array_equal(again.similarity, first.similarity)
    parts = result(rng.permutation(40), rng.permutation(18))
    assert [c.outside_p for c in parts.clusters] == [c.outside_p for c in first.clusters]


def test_other_ids_give_the_same_groups():
    ids, active, _ = planted(np.random.default_rng(6), n=40, keep=0.5, noise=0.4)
    score = {"score": np.zeros(40)}
    first = of_example(cluster_examples(ids, active, LABELS, score, draws=9))
    renamed = {i: f"x{(7 * n) % 40}" for n, i in enumerate(ids)}
    other = of_example(cluster_examples(list(renamed.values()), active, LABELS, score, draws=9))
    assert partition({renamed[i]: c for i, c in first.items()}) == partition(other)


def test_examples_without_active_features_are_a_cluster_of_their_own():
    rng = np.random.default_rng(7)
    ids, active, _ = planted(rng, n=60)
    for i in (3, 20, 50):
        active[i] = []
    score = rng.normal(size=60)
    score[[3, 20, 50]] += 9
    shifts = [(f, np.ones(60)) for f in FEATURES]
    found = cluster_examples(ids, active, LABELS, {"score": score}, shifts)
    own = found.clusters[0]
    assert (own.cluster, own.n_examples, own.features) == (0, 3, ())
    assert own.examples == ("z003", "z020", "z050") and own.name == "no active feature"
    assert {i for i, c in of_example(found).items() if c == 0} == set(own.examples)
    assert found.effects[0].p_holm < 0.05
    # With no feature of its own, all an example does is outside: nothing is claimed.
    assert own.outside_share is None and found.clusters[1].outside_share is not None
    assert np.isnan(found.similarity[found.cluster == 0]).all()


@pytest.mark.parametrize(
    ("active", "clusters"),
    [([[]] * 4, [0]), ([[100]] * 4, [1]), ([[100], [101], [101], [100]], [1, 2]), ([[100]], [1])],
    ids=["none", "all alike", "two sets", "one example"],
)
def test_small_cases(active, clusters):
    ids = [f"p{i}" for i in range(len(active))]
    values = {"score": np.arange(len(active), dtype=float)}
    found = cluster_examples(ids, active, LABELS, values, draws=9)
    assert [c.cluster for c in found.clusters] == clusters
    if len(clusters) == 1:
        assert {e.p for e in found.effects} == {1.0}


def test_a_number_of_clusters_can_be_given():
    ids, active, _ = planted(np.random.default_rng(8), n=40)
    sets = len({tuple(some) for some in active})
    values = {"score": np.zeros(40)}
    for k in (1, 2, 7, sets):
        found = cluster_examples(ids, active, LABELS, values, k=k, draws=9)
        assert [c.cluster for c in found.clusters] == list(range(1, k + 1))
        sizes = [c.n_examples for c in found.clusters]
        assert sizes == sorted(sizes, reverse=True) and sum(sizes) == 40
        assert found.silhouettes == {}
    for k in (0, sets + 1):
        with pytest.raises(UserError, match=f"so many clusters.*\n  value: {k}\n.*most {sets}"):
            cluster_examples(ids, active, LABELS, values, k=k)


def test_beyond_a_few_thousand_sets_some_are_clustered_and_the_rest_assigned(monkeypatch):
    monkeypatch.setattr(under_test, "MOST", 30)
    ids, active, kind = planted(np.random.default_rng(9), n=120)
    found = cluster_examples(ids, active, LABELS, {"score": np.zeros(120)}, draws=9)
    assert found.clustered == 30 < found.sets
    assert partition(of_example(found)) == partition(dict(zip(ids, kind.tolist(), strict=True)))
    said = cluster_sentences(
        Clustered(
            [row._asdict() for row in found.clusters],
            [e._asdict() for e in found.effects],
            {"examples": 120, "without": 0, "k": 3, "silhouette": 0.6, "sets": found.sets, "clustered": 30},
            [],
        )
    )
    assert f"the tree is of 30 of {found.sets} different sets" in said[0].text
    assert said[1].tone == "none" and said[1].text.startswith("No effect found")


def test_draws_are_enough_for_all_comparisons_and_bounded_in_work(monkeypatch):
    ids, active, _ = planted(np.random.default_rng(10), n=40)
    values = {"score": np.zeros(40)}
    monkeypatch.setattr(under_test, "WORK", 4000)
    assert cluster_examples(ids, active, LABELS, values, k=2).draws == 100
    assert cluster_examples(ids, active, LABELS, values, k=5).draws == 200


def test_messages():
    good = (["a", "b"], [[100], [101]], LABELS)
    with pytest.raises(UserError, match="not finite for 1 examples\n  value: b"):
        cluster_examples(*good, {"score": [0.0, float("nan")]})
    with pytest.raises(UserError, match="examples 2, active 2, score 1"):
        cluster_examples(*good, {"score": [0.0]})
    with pytest.raises(UserError, match="at least one example and one target"):
        cluster_examples(*good, {})
    with pytest.raises(UserError, match="id repeats\n  value: a"):
        cluster_examples(["a", "a"], [[100]] * 2, LABELS, {"score": [0.0, 1.0]})
    with pytest.raises(UserError, match="the example 'b' has features.*\n  value: 7"):
        cluster_examples(["a", "b"], [[100], [7, 101]], LABELS, {"score": [0.0, 1.0]})
