"""Clusters of examples by the features that are active on them, and what training on them does.

An example is the set of the policy's features that are active on it. As a vector z it has

    sqrt(log((n + 1) / n_j))        n examples have any active feature, n_j of them feature j

in the places of its features and 0 elsewhere, divided by its length. So z z' weighs what two examples share by how rare
it is, and a feature that is active everywhere says nothing. Examples are joined by Ward's linkage on these vectors (at
each step the two clusters whose union adds least to the sum of squared distances from their means), and the tree is cut
where the mean silhouette on the cosine distance 1 - z z' is largest. Examples with the same features are one point with
a weight, so the result depends on neither ids nor order. Beyond ``MOST`` different sets, that many are clustered and
each other one goes to the nearest mean.

What a cluster does stands beside as many examples, drawn at random without replacement: it may differ
from zero and still do what any examples do. Features go with labels, so it stands also beside random
examples with as many of each label.

Source: SAE clusters, Concept Influence, arXiv 2602.14869, which gives neither intervals nor
controls; Ward 1963; nearest-neighbour chains: Murtagh 1983; silhouette: Rousseeuw 1987.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from taught.errors import UserError, misfit, refuse, refuse_repeated
from taught.stats.arrays import Bools, Floats, Ints, refuse_nonfinite
from taught.stats.intervals import MANY, Z, middle, plain
from taught.stats.multiplicity import holm

WITHOUT = 0  # the cluster of examples on which no feature is active
MOST = 3000  # different sets of features that are clustered; their distances take MOST^2 numbers
LARGEST_K = 20
NAMED = 3  # features in a name
EXAMPLES = 5
FEWEST = 5  # examples for an interval
BOOTSTRAP = 2000
DRAWS = 9999
WORK = 200_000_000  # examples x draws


class ActiveFeature(NamedTuple):
    """A feature of a cluster: on which share of its examples it is active, and of the other examples."""

    feature_id: int
    label: str | None
    inside: float
    outside: float


class Cluster(NamedTuple):
    """One cluster of examples.

    Attributes
    ----------
    cluster : from 1, the largest first; 0: examples on which no feature is active
    name : labels of ``features``
    features : the up to three of the largest lift, inside minus outside
    examples : ids of the examples nearest to its mean
    outside_share : sum over its examples of |dW_j| of the features j that are not active on the example,
        over the sum of all |dW_j|; None without coefficients, and for cluster 0
    outside_random_lo, outside_random_hi : 95% of as many random examples
    outside_by_chance : expected if each example's features were as many random ones
    outside_p, outside_p_holm : two-sided, against random examples; corrected for all clusters
    """

    cluster: int
    name: str
    n_examples: int
    features: tuple[ActiveFeature, ...]
    examples: tuple[str, ...]
    outside_share: float | None
    outside_random_lo: float | None
    outside_random_hi: float | None
    outside_by_chance: float | None
    outside_p: float | None
    outside_p_holm: float | None


class Effect(NamedTuple):
    """Mean influence of a cluster's examples on a target, in the unit of the influence.

    ``lo`` and ``hi``: 95% bootstrap over its examples, None below 5; ``random_lo`` and ``random_hi``:
    95% of as many random examples; p against these, two-sided; matched_p against random examples with as
    many of each label, None without labels; the endings holm: corrected for all rows.
    """

    cluster: int
    target: str
    mean: float
    lo: float | None
    hi: float | None
    random_lo: float
    random_hi: float
    p: float
    p_holm: float
    matched_p: float | None
    matched_p_holm: float | None


class Clustering(NamedTuple):
    """All clusters.

    Attributes
    ----------
    example_ids : ascending
    cluster, similarity : of each example; cosine of its vector with its cluster's mean, nan in 0
    silhouettes : k -> mean silhouette, where k was chosen
    sets, clustered : different sets of features, and how many of them the tree was made of
    draws : how often as many random examples were drawn
    """

    example_ids: tuple[str, ...]
    cluster: Ints
    similarity: Floats
    clusters: tuple[Cluster, ...]
    effects: tuple[Effect, ...]
    silhouettes: dict[int, float]
    sets: int
    clustered: int
    draws: int


def cluster_examples(
    example_ids: Sequence[str],
    active: Sequence[Sequence[int]],
    labels: Mapping[int, str | None],
    values: Mapping[str, ArrayLike],
    shifts: Iterable[tuple[int, Floats]] = (),
    *,
    kinds: Sequence[str | None] | None = None,
    k: int | None = None,
    draws: int | None = None,
    seed: int = 0,
) -> Clustering:
    """Cluster examples by their active features and compare each cluster with as many random examples.

    Parameters
    ----------
    example_ids, active : length P, the features that are active on each example; may be empty
    labels : feature id -> label, all d features of the policy
    values : target -> influence [P] on it
    shifts : parts of the coefficient shifts: a feature id and dW_j [P], 0 where another part has it
    kinds : label of each example, length P
    k : number of clusters, those without features not counted; by the silhouette if None
    draws : how often random examples are drawn; by default 9,999 times, less often for many examples

    Raises
    ------
    UserError
        Ids repeat, lengths differ, a value is not finite, a feature is not of the policy, or there
        are fewer than k different sets of features.
    """
    kinds = [None] * len(example_ids) if kinds is None else kinds
    sizes = {len(example_ids), len(active), *(np.shape(v)[0] for v in values.values())}
    if len(sizes) != 1 or not len(example_ids) or not values:
        rule = "one of each per example, at least one example and one target"
        given = {"examples": example_ids, "active": active, **values}
        raise misfit("examples, their features and their influences", rule, **given)
    refuse_repeated(example_ids, "an example id")
    for name, of in values.items():
        refuse_nonfinite(example_ids, of, "influence", f" on {name}")
    order = sorted(range(len(example_ids)), key=example_ids.__getitem__)
    ids = tuple(example_ids[i] for i in order)
    features = sorted(labels)
    column = {feature: j for j, feature in enumerate(features)}
    matrix = np.zeros((len(ids), len(features)), dtype=bool)  # which feature is active on which example
    for row, place in enumerate(order):
        refuse(
            [feature for feature in active[place] if feature not in column],
            f"the example {ids[row]!r} has features that are not in the policy",
            rule="the features of an example are among those of coefficients.parquet",
        )
        matrix[row, [column[feature] for feature in active[place]]] = True
    grouped = _group(matrix, k, np.random.default_rng(seed))
    table = np.stack([np.asarray(v, dtype=np.float64)[order] for v in values.values()], axis=1)
    n_clusters = len(np.unique(grouped.cluster))
    if draws is None:
        draws = max(40 * n_clusters * table.shape[1], min(DRAWS, WORK // len(ids)))
    kind = np.unique([kinds[i] or "" for i in order], return_inverse=True)[1]
    effects = _effects(grouped.cluster, tuple(values), table, kind, draws, seed)
    spread = _spread(matrix, features, shifts, np.array(order), grouped.cluster, draws, seed)

    def described(c: int, own: Ints) -> Cluster:
        """By the features of the largest lift above 0 (ties to the smaller id) and the nearest examples."""
        near = own[np.argsort(-np.nan_to_num(grouped.similarity[own]), kind="stable")[:EXAMPLES]]
        examples, wide = tuple(ids[i] for i in near), spread.get(c, (None,) * 6)
        if c == WITHOUT:
            return Cluster(c, "no active feature", len(own), (), examples, *wide)
        inside, rest = matrix[own].mean(0), np.delete(matrix, own, axis=0)
        outside = rest.mean(0) if len(rest) else np.zeros(len(features))
        lift = inside - outside
        first = [j for j in np.argsort(-lift, kind="stable")[:NAMED] if lift[j] > 0]
        named = [(features[j], labels[features[j]], float(inside[j]), float(outside[j])) for j in first]
        words = " · ".join(label or f"feature {feature}" for feature, label, *_ in named)
        name = words or "no feature more often than elsewhere"
        return Cluster(c, name, len(own), tuple(map(ActiveFeature._make, named)), examples, *wide)

    clusters = tuple(described(c, own) for c, own in _members(grouped.cluster).items())
    return Clustering(ids, clusters=clusters, effects=effects, draws=draws, **grouped._asdict())


def check_k(k: int | None, most: int) -> None:
    """Raise a UserError where k clusters cannot be made of at most so many different sets of active features."""
    if k is not None and not 1 <= k <= most:
        raise UserError(
            "so many clusters cannot be made",
            value=k,
            rule=f"at least 1, and at most {most}: the different sets of active features",
            fix="another clusters.k, or null: then it is chosen",
        )


# Grouping


class _Grouped(NamedTuple):  # as in Clustering
    cluster: Ints
    similarity: Floats
    silhouettes: dict[int, float]
    sets: int
    clustered: int


def _group(matrix: Bools, k: int | None, rng: np.random.Generator) -> _Grouped:
    """Cluster the rows of ``matrix`` [P, d]; numbers by size, then by the first row."""
    told = matrix.any(1)
    sets, row, counts = np.unique(matrix[told], axis=0, return_inverse=True, return_counts=True)
    row = row.reshape(-1)
    check_k(k, len(sets))
    cluster = np.full(len(matrix), WITHOUT, dtype=np.int64)
    similarity = np.full(len(matrix), math.nan)
    if not len(sets):
        return _Grouped(cluster, similarity, {}, 0, 0)
    weight = np.sqrt(np.log((counts.sum() + 1) / np.maximum(counts @ sets, 1)))
    z = sets * weight
    z /= np.linalg.norm(z, axis=1, keepdims=True)
    some = np.arange(len(z)) if len(z) <= MOST else np.sort(rng.choice(len(z), MOST, replace=False))
    label, silhouettes = _cut_best(z[some], counts[some], k)
    means = _means(z[some], counts[some], label)
    nearest = ((means**2).sum(1) - 2 * z @ means.T).argmin(1)
    nearest[some] = label
    means = _means(z, counts, nearest)
    means /= np.maximum(np.linalg.norm(means, axis=1, keepdims=True), 1e-300)
    _, first, inverse, size = np.unique(nearest[row], return_index=True, return_inverse=True, return_counts=True)
    place = np.empty(len(size), dtype=np.int64)
    place[np.lexsort((first, -size))] = np.arange(1, len(size) + 1)
    cluster[told] = place[inverse]
    similarity[told] = (z * means[nearest]).sum(1)[row]
    return _Grouped(cluster, similarity, silhouettes, len(sets), len(some))


def _cut_best(z: Floats, counts: Ints, k: int | None) -> tuple[Ints, dict[int, float]]:
    """Labels from 0 at k, or at the k from 2 to 20 of the largest silhouette, the least of them."""
    merges = ward(z, counts)
    if k is not None or len(z) < 2:
        return cut(merges, len(z), k or 1), {}
    distance = np.maximum(1 - z @ z.T, 0.0)
    np.fill_diagonal(distance, 0.0)
    labels = {some: cut(merges, len(z), some) for some in range(2, min(LARGEST_K, len(z)) + 1)}
    found = {some: silhouette(distance, counts, label) for some, label in labels.items()}
    return labels[max(found, key=lambda some: (found[some], -some))], found


def ward(z: Floats, counts: Ints) -> list[tuple[float, int, int]]:
    """Ward's tree over points z [U, d] of weight ``counts``, by nearest-neighbour chains.

    Returns
    -------
    list of U - 1 joins, in any order: height (squared), and a point of either side
    """
    size = counts.astype(np.float64)
    square = (z**2).sum(1)
    d = np.maximum(square[:, None] + square - 2 * z @ z.T, 0.0)
    d = np.maximum(d, d.T)
    d *= 2 * np.outer(size, size) / np.add.outer(size, size)
    np.fill_diagonal(d, np.inf)
    merges: list[tuple[float, int, int]] = []
    chain: list[int] = []
    alive = np.ones(len(z), dtype=bool)
    while len(merges) < len(z) - 1:
        if not chain:
            chain.append(int(alive.argmax()))
        last = chain[-1]
        near = int(d[last].argmin())
        if len(chain) == 1 or d[last, near] < d[last, chain[-2]]:
            chain.append(near)
            continue
        near = chain[-2]
        del chain[-2:]
        merges.append((float(d[last, near]), last, near))
        joined = (size + size[last]) * d[last] + (size + size[near]) * d[near]
        joined = (joined - size * d[last, near]) / (size + size[last] + size[near])
        d[last], d[:, last] = joined, joined
        d[last, last], d[near], d[:, near] = np.inf, np.inf, np.inf
        size[last] += size[near]
        alive[near] = False
    return merges


def cut(merges: Sequence[tuple[float, int, int]], n: int, k: int) -> Ints:
    """Labels from 0 of n points when the lowest n - k joins of a tree are made."""
    from scipy.sparse import coo_array
    from scipy.sparse.csgraph import connected_components

    joins = [(a, b) for _, a, b in sorted(merges, key=lambda join: join[0])[: n - k]]
    a, b = zip(*joins, strict=True) if joins else ((), ())
    graph = coo_array((np.ones(len(joins)), (a, b)), shape=(n, n))
    return np.asarray(connected_components(graph, directed=False)[1], dtype=np.int64)


def silhouette(distance: Floats, counts: Ints, label: Ints) -> float:
    """Mean silhouette (b - a) / max(a, b) of points of weight ``counts``; 0 for one by itself."""
    at = np.arange(len(label))
    member = np.zeros((len(label), label.max() + 1))
    member[at, label] = counts
    size = member.sum(0)
    sums = distance @ member
    own = size[label]
    a = sums[at, label] / np.maximum(own - 1, 1)
    others = sums / size
    others[at, label] = np.inf
    b = others.min(1)
    width = np.maximum(a, b)
    s = np.where((own > 1) & (width > 0), (b - a) / np.where(width > 0, width, 1), 0.0)
    return float(counts @ s / counts.sum())


def _means(z: Floats, counts: Ints, label: Ints) -> Floats:
    sums = np.zeros((label.max() + 1, z.shape[1]))
    np.add.at(sums, label, counts[:, None] * z)
    return np.asarray(sums / np.bincount(label, weights=counts)[:, None])


# Describing


def _members(cluster: Ints) -> dict[int, Ints]:
    return {int(c): np.flatnonzero(cluster == c) for c in np.unique(cluster)}


# Comparing


def _effects(
    cluster: Ints, targets: Sequence[str], table: Floats, kind: Ints, draws: int, seed: int
) -> tuple[Effect, ...]:
    """Mean influence of every cluster on every target; table [P, T], kind [P]."""
    members = _members(cluster)
    size = np.array([len(own) for own in members.values()], dtype=np.float64)[:, None]
    observed, drawn = (sums / size for sums in _against_random(cluster, table, draws, seed))
    p = _p(observed, drawn, table.mean(0))
    columns = [observed, *_ends(members, table, seed), *middle(drawn), p, holm(p)]
    matched = np.full(p.shape, math.nan)
    if kind.any():
        of_kind = np.eye(kind.max() + 1)[kind]
        expected = of_kind @ ((of_kind.T @ table) / of_kind.sum(0)[:, None])
        centre = np.stack([expected[own].mean(0) for own in members.values()])
        matched = _p(observed, _against_random(cluster, table, draws, seed, kind)[1] / size, centre)
    rows = np.stack([*columns, matched, holm(matched) if kind.any() else matched], axis=2)
    return tuple(
        Effect._make((c, target, *map(plain, rows[i, t])))
        for i, c in enumerate(members)
        for t, target in enumerate(targets)
    )


def _ends(members: Mapping[int, Ints], table: Floats, seed: int) -> Floats:
    """95% intervals of the clusters' means [2, C, T], nan where they have few examples."""
    ends = np.full((2, len(members), table.shape[1]), math.nan)
    for i, (c, own) in enumerate(members.items()):
        values, n = table[own], len(own)
        if n > MANY:
            half = Z * values.std(0, ddof=1) / math.sqrt(n)
            ends[:, i] = values.mean(0) - half, values.mean(0) + half
        elif n >= FEWEST:
            times = np.random.default_rng([seed, c]).multinomial(n, np.full(n, 1 / n), size=BOOTSTRAP)
            ends[:, i] = middle(times @ values / n)
    return ends


def _spread(
    matrix: Bools,
    features: list[int],
    shifts: Iterable[tuple[int, Floats]],
    order: Ints,
    cluster: Ints,
    draws: int,
    seed: int,
) -> dict[int, tuple[float, ...]]:
    """The columns from ``outside_share`` on, for each cluster; empty without shifts."""
    total, outside = np.zeros(len(matrix)), np.zeros(len(matrix))
    column = {feature: j for j, feature in enumerate(features)}
    for feature, shift in shifts:
        size = np.abs(shift[order])
        total += size
        outside += np.where(matrix[:, column[feature]], 0.0, size)
    told = cluster != WITHOUT
    if not total[told].any():
        return {}
    own = cluster[told]
    chance = total * (1 - matrix.mean(1))
    table = np.stack([outside, total, chance], axis=1)[told]
    observed, drawn = _against_random(own, table, draws, seed)
    share = _share(observed[..., 0], observed[..., 1])
    random = _share(drawn[..., 0], drawn[..., 1])
    p = _p(share, random, float(table[:, 0].sum() / table[:, 1].sum()))
    rows = np.stack([share, *middle(random), _share(observed[..., 2], observed[..., 1]), p, holm(p)], axis=1)
    return {c: tuple(map(float, row)) for c, row in zip(_members(own), rows, strict=True)}


def _share(part: Floats, whole: Floats) -> Floats:
    return np.asarray(np.divide(part, whole, out=np.zeros_like(part), where=whole > 0))


def _against_random(
    cluster: Ints, table: Floats, draws: int, seed: int, kind: Ints | None = None
) -> tuple[Floats, Floats]:
    """Sums of the columns [P, V] over each cluster [C, V], and over as many random examples.

    One permutation of the examples gives random ones for every cluster: [draws, C, V]. With ``kind``
    examples change places with examples of their kind only.
    """
    rng = np.random.default_rng(seed)
    order = np.argsort(cluster, kind="stable")
    starts = np.flatnonzero(np.diff(cluster[order], prepend=-1))
    observed = np.add.reduceat(table[order], starts, axis=0)
    drawn = np.empty((draws, *observed.shape))
    alike = [order] if kind is None else [order[kind[order] == one] for one in np.unique(kind)]
    place = np.argsort(order)
    taken = np.empty_like(order)
    for draw in range(draws):
        for some in alike:
            taken[place[some]] = rng.permutation(some)
        drawn[draw] = np.add.reduceat(table[taken], starts, axis=0)
    return observed, drawn


def _p(observed: Floats, drawn: Floats, centre: Floats | float) -> Floats:
    """Two-sided p: share of draws at least as far from the centre, the observed one included."""
    far = np.abs(observed - centre)
    slack = 1e-9 * far + 1e-12 * np.abs(drawn).max(0)
    reached = np.abs(drawn - centre) >= far - slack
    return np.asarray((1 + reached.sum(0)) / (1 + len(drawn)))


# Checking
