"""Which pairs to train on: random, matched and leave-out subsets of the pairs.

A random half is the usual ground truth for predicted effects. In it the summed response length and
the counts of labels vary, and they alone explain much of what training does; *matched* subsets hold
both fixed, so that what is left to predict is which pairs, not how much of what.

Every draw depends on the ids and the seed, not on the order of the ids, and a longer list of
subsets begins with the shorter one: retrainings that are finished stay of use.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from taught.errors import UserError

Floats = NDArray[np.float64]
Bools = NDArray[np.bool_]

# Draws in a row that bring nothing new before a design is said to be exhausted.
_PATIENCE = 1000


@dataclass(frozen=True, eq=False)
class Subsets:
    """M subsets of P pairs.

    Attributes
    ----------
    names : M names, unique
    members : ids of each subset, ascending
    inclusion : pair id -> probability that a subset of this design, any of them, holds the pair;
        its keys are the P pairs that were drawn from
    """

    names: tuple[str, ...]
    members: tuple[tuple[str, ...], ...]
    inclusion: Mapping[str, float]

    def __len__(self) -> int:
        return len(self.names)

    def membership(self, ids: Sequence[str]) -> Bools:
        """bool [M, P]: which subset holds which pair, columns in the order of ``ids``.

        Raises
        ------
        UserError
            Ids repeat, or a subset holds a pair that is not among them.
        """
        column = {pair: j for j, pair in enumerate(ids)}
        if len(column) != len(ids):
            raise UserError("pair ids repeat", value=_repeated(ids), rule="ids are unique")
        strangers = sorted({pair for subset in self.members for pair in subset} - column.keys())
        if strangers:
            raise UserError("subsets hold pairs that are not asked about", value=strangers[:8],
                            rule="every member is one of the ids",
                            fix="use the pairs that the subsets were drawn from")  # fmt: skip
        table = np.zeros((len(self), len(ids)), dtype=np.bool_)
        for row, subset in zip(table, self.members, strict=True):
            row[[column[pair] for pair in subset]] = True
        return table

    def select(self, names: Collection[str]) -> Subsets:
        """The subsets of these names, in this object's order.

        Raises
        ------
        UserError
            A name is unknown.
        """
        unknown = sorted(set(names) - set(self.names))
        if unknown:
            raise UserError("there are no subsets of these names", value=unknown[:8],
                            rule="names of this design")  # fmt: skip
        kept = [i for i, name in enumerate(self.names) if name in set(names)]
        return Subsets(
            tuple(self.names[i] for i in kept), tuple(self.members[i] for i in kept), self.inclusion
        )


def random_subsets(ids: Sequence[str], size: int, count: int, *, seed: int) -> Subsets:
    """Distinct subsets of one size, each as likely as any other.

    Raises
    ------
    UserError
        The size is not between 1 and P - 1, or there are fewer than ``count`` such subsets.
    """
    pool = _checked(ids)
    _check_size(size, len(pool))
    rng = np.random.default_rng(seed)
    drawn = _distinct(lambda: _pick(rng, pool, size), count, math.comb(len(pool), size))
    return _named("random", drawn, dict.fromkeys(pool, size / len(pool)))


def leave_share_out(ids: Sequence[str], share: float, count: int, *, seed: int) -> Subsets:
    """All pairs but a random ``share`` of them (rounded to whole pairs), ``count`` times."""
    pool = _checked(ids)
    out = round(share * len(pool))
    _check_size(len(pool) - out, len(pool))
    drawn = random_subsets(ids, len(pool) - out, count, seed=seed)
    return _named(f"without-{out}", drawn.members, drawn.inclusion)


def leave_one_out(ids: Sequence[str], left_out: Sequence[str] | None = None) -> Subsets:
    """All pairs but one, for every pair or for those named; names: ``without:ID``."""
    pool = _checked(ids)
    _check_size(len(pool) - 1, len(pool))
    chosen = pool if left_out is None else _checked(left_out)
    unknown = sorted(set(chosen) - set(pool))
    if unknown:
        raise UserError("pairs to leave out are not among the pairs", value=unknown[:8])
    members = tuple(tuple(pair for pair in pool if pair != left) for left in chosen)
    missed = {pair: 1 / len(chosen) for pair in chosen}
    inclusion = {pair: 1 - missed.get(pair, 0.0) for pair in pool}
    return Subsets(tuple(f"without:{left}" for left in chosen), members, inclusion)


def matched_subsets(
    ids: Sequence[str],
    labels: Mapping[str, str],
    lengths: Mapping[str, float],
    size: int,
    count: int,
    *,
    seed: int,
    tolerance: float = 0.01,
) -> Subsets:
    """Distinct subsets with the same number of pairs of each label and the same summed length.

    Each starts as a random subset with the labels' shares of the whole; then a random one of the
    exchanges within a label that bring the sum of the lengths into the tolerance is made, or, while
    there is none, the exchange that brings it nearest.

    Parameters
    ----------
    labels, lengths : pair id -> its label, and its length (response tokens)
    tolerance
        How far a subset's summed length may be from that of an average subset, relative to it;
        :func:`spread` says how far they are.

    Returns
    -------
    Subsets
        ``inclusion`` is a label's count over its number of pairs: the mean over the label's pairs.
        The exchanges make pairs of extreme length somewhat rarer.

    Raises
    ------
    UserError
        A pair has no label or length, or the sums cannot be brought into the tolerance.
    """
    pool = _checked(ids)
    _check_size(size, len(pool))
    for what, values in (("label", labels), ("length", lengths)):
        missing = [pair for pair in pool if pair not in values]
        if missing:
            raise UserError(f"pairs have no {what}", value=missing[:8],
                            rule="matched subsets need both of every pair")  # fmt: skip
    groups = _by_label(pool, labels)
    counts = _shares({label: len(group) for label, group in groups.items()}, size)
    target = sum(counts[label] * _mean(lengths, group) for label, group in groups.items())
    rng = np.random.default_rng(seed)

    def one() -> tuple[str, ...]:
        chosen = {label: set(_pick(rng, group, counts[label])) for label, group in groups.items()}
        _exchange(chosen, groups, lengths, target, tolerance, rng)
        return tuple(sorted(pair for some in chosen.values() for pair in some))

    possible = math.prod(math.comb(len(groups[label]), n) for label, n in counts.items())
    inclusion = {pair: counts[labels[pair]] / len(groups[labels[pair]]) for pair in pool}
    return _named("matched", _distinct(one, count, possible), inclusion)


def summed(subsets: Subsets, values: Mapping[str, float]) -> Floats:
    """Sum of a value over the members of each subset, float64 [M].

    Raises
    ------
    UserError
        A member has no value, or one that is not finite.
    """
    pairs = sorted({pair for subset in subsets.members for pair in subset})
    missing = [pair for pair in pairs if not math.isfinite(values.get(pair, math.nan))]
    if missing:
        raise UserError("pairs of the subsets have no finite value", value=missing[:8],
                        rule="a sum needs the value of every member")  # fmt: skip
    held = subsets.membership(pairs).astype(np.float64)
    return held @ np.array([values[pair] for pair in pairs], dtype=np.float64)


def label_counts(subsets: Subsets, labels: Mapping[str, str]) -> dict[str, Floats]:
    """Label -> number of its pairs in each subset, float64 [M]."""
    return {
        label: summed(subsets, {pair: float(labels[pair] == label) for pair in labels})
        for label in sorted(set(labels.values()))
    }


def spread(sums: Floats) -> float:
    """Largest distance of a subset's sum from the mean sum, relative to the mean."""
    return float(np.abs(sums / sums.mean() - 1).max())


def _exchange(
    chosen: dict[str, set[str]],
    groups: Mapping[str, Sequence[str]],
    lengths: Mapping[str, float],
    target: float,
    tolerance: float,
    rng: np.random.Generator,
) -> None:
    """Exchange members within their label until the summed length is near ``target``; in place."""
    error = sum(lengths[pair] for some in chosen.values() for pair in some) - target
    while abs(error) > tolerance * abs(target):
        allowed = tolerance * abs(target)
        label, left, other = _best_exchange(chosen, groups, lengths, error, allowed, rng)
        after = error + lengths[other] - lengths[left]
        if abs(after) >= abs(error):
            raise UserError("subsets of matched length cannot be made",
                            value=f"off by {abs(error / target):.2%}, allowed are {tolerance:.2%}",
                            rule="exchanges within a label bring the sum nearer",
                            fix="allow a larger tolerance or take larger subsets")  # fmt: skip
        chosen[label] = (chosen[label] - {left}) | {other}
        error = after


def _best_exchange(
    chosen: Mapping[str, set[str]],
    groups: Mapping[str, Sequence[str]],
    lengths: Mapping[str, float],
    error: float,
    allowed: float,
    rng: np.random.Generator,
) -> tuple[str, str, str]:
    """(label, member to leave, pair to join): a random one of those allowed, else the nearest."""
    sides = [
        (label, sorted(chosen[label]), [pair for pair in group if pair not in chosen[label]])
        for label, group in groups.items()
    ]
    distances = []
    for _, inside, outside in sides:
        gain = np.array([lengths[pair] for pair in outside], dtype=np.float64)
        loss = np.array([lengths[pair] for pair in inside], dtype=np.float64)
        distances.append(np.abs(error + gain - loss[:, None]).ravel())
    distance = np.concatenate(distances)
    near = np.flatnonzero(distance <= allowed)
    place = int(rng.choice(near)) if near.size else int(distance.argmin())
    ends = np.cumsum([some.size for some in distances])
    side = int(np.searchsorted(ends, place, side="right"))
    label, inside, outside = sides[side]
    row, column = divmod(place - int(ends[side]) + distances[side].size, len(outside))
    return label, inside[row], outside[column]


def _by_label(pool: Sequence[str], labels: Mapping[str, str]) -> dict[str, list[str]]:
    groups: dict[str, list[str]] = {label: [] for label in sorted({labels[p] for p in pool})}
    for pair in pool:
        groups[labels[pair]].append(pair)
    return groups


def _shares(sizes: Mapping[str, int], total: int) -> dict[str, int]:
    """``total`` split in proportion to ``sizes``, by largest remainders (ties: first name)."""
    whole = sum(sizes.values())
    counts = {label: total * n // whole for label, n in sizes.items()}
    rest = sorted(sizes, key=lambda label: (-(total * sizes[label] % whole), label))
    for label in rest[: total - sum(counts.values())]:
        counts[label] += 1
    return counts


def _mean(values: Mapping[str, float], pairs: Sequence[str]) -> float:
    return sum(values[pair] for pair in pairs) / len(pairs)


def _pick(rng: np.random.Generator, pool: Sequence[str], size: int) -> tuple[str, ...]:
    return tuple(sorted(pool[i] for i in rng.permutation(len(pool))[:size]))


def _distinct(
    draw: Callable[[], tuple[str, ...]], count: int, possible: int
) -> tuple[tuple[str, ...], ...]:
    """``count`` different draws, in the order in which they came."""
    found: dict[tuple[str, ...], None] = {}
    misses = 0
    while len(found) < count:
        if count > possible or misses > _PATIENCE:
            raise UserError("there are not so many different subsets", value=count,
                            rule=f"at most {possible}, of which {len(found)} were found",
                            fix="ask for fewer, or for another size")  # fmt: skip
        before = len(found)
        found[draw()] = None
        misses = 0 if len(found) > before else misses + 1
    return tuple(found)


def _named(
    kind: str, members: Sequence[tuple[str, ...]], inclusion: Mapping[str, float]
) -> Subsets:
    return Subsets(tuple(f"{kind}-{i:04d}" for i in range(len(members))), tuple(members), inclusion)


def _checked(ids: Sequence[str]) -> list[str]:
    if len(set(ids)) != len(ids):
        raise UserError("pair ids repeat", value=_repeated(ids), rule="ids are unique")
    return sorted(ids)


def _repeated(ids: Sequence[str]) -> list[str]:
    return sorted(pair for pair, count in Counter(ids).items() if count > 1)[:8]


def _check_size(size: int, pairs: int) -> None:
    if not 0 < size < pairs:
        raise UserError("subsets of this size cannot be drawn", value=size,
                        rule=f"from 1 to {pairs - 1} of {pairs} pairs",
                        fix="choose another size")  # fmt: skip
