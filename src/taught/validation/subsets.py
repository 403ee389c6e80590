"""Which examples to train on: random, matched and leave-out subsets of the examples.

A random half is the usual ground truth for predicted effects. In it the summed response length and
the counts of labels vary, and they alone explain much of what training does; *matched* subsets hold
both fixed, so that what is left to predict is which examples, not how much of what.

Every draw depends on the ids and the seed, not on the order of the ids, and a longer list of
subsets begins with the shorter one: retrainings that are finished stay of use.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from taught.errors import UserError, refuse, refuse_repeated
from taught.stats.arrays import Bools, Floats

# Draws in a row that bring nothing new before a design is said to be exhausted.
_PATIENCE = 1000


@dataclass(frozen=True, eq=False)
class Subsets:
    """M subsets of P examples.

    Attributes
    ----------
    names : M names, unique
    members : ids of each subset, ascending
    inclusion : example id -> probability that a subset of this design, any of them, holds the example;
        its keys are the P examples that were drawn from
    """

    names: tuple[str, ...]
    members: tuple[tuple[str, ...], ...]
    inclusion: Mapping[str, float]

    def __len__(self) -> int:
        return len(self.names)

    def membership(self, ids: Sequence[str]) -> Bools:
        """bool [M, P]: which subset holds which example, columns in the order of ``ids``.

        Raises
        ------
        UserError
            Ids repeat, or a subset holds an example that is not among them.
        """
        refuse_repeated(ids, "an example id")
        column = {example: j for j, example in enumerate(ids)}
        refuse(
            sorted({example for subset in self.members for example in subset} - column.keys()),
            "subsets hold examples that are not asked about",
            rule="every member is one of the ids",
            fix="use the examples that the subsets were drawn from",
        )
        table = np.zeros((len(self), len(ids)), dtype=np.bool_)
        for row, subset in zip(table, self.members, strict=True):
            row[[column[example] for example in subset]] = True
        return table


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
    """All examples but a random ``share`` of them (rounded to whole examples), ``count`` times."""
    pool = _checked(ids)
    out = round(share * len(pool))
    _check_size(len(pool) - out, len(pool))
    drawn = random_subsets(ids, len(pool) - out, count, seed=seed)
    return _named(f"without-{out}", drawn.members, drawn.inclusion)


def leave_one_out(ids: Sequence[str], left_out: Sequence[str] | None = None) -> Subsets:
    """All examples but one, for every example or for those named; names: ``without:ID``."""
    pool = _checked(ids)
    _check_size(len(pool) - 1, len(pool))
    chosen = pool if left_out is None else _checked(left_out)
    refuse(sorted(set(chosen) - set(pool)), "examples to leave out are not among the examples")
    members = tuple(tuple(example for example in pool if example != left) for left in chosen)
    missed = {example: 1 / len(chosen) for example in chosen}
    inclusion = {example: 1 - missed.get(example, 0.0) for example in pool}
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
    """Distinct subsets with the same number of examples of each label and the same summed length.

    Each starts as a random subset with the labels' shares of the whole; then a random one of the
    exchanges within a label that bring the sum of the lengths into the tolerance is made, or, while
    there is none, the exchange that brings it nearest.

    Parameters
    ----------
    labels, lengths : example id -> its label, and its length (response tokens)
    tolerance : how far a subset's summed length may be from that of an average subset, relative to it

    Returns
    -------
    ``inclusion`` is a label's count over its number of examples: the mean over the label's examples. The exchanges make
    examples of extreme length somewhat rarer.

    Raises
    ------
    UserError
        An example has no label or length, or the sums cannot be brought into the tolerance.
    """
    pool = _checked(ids)
    _check_size(size, len(pool))
    for what, values in (("label", labels), ("length", lengths)):
        missing = [example for example in pool if example not in values]
        refuse(missing, f"examples have no {what}", rule="matched subsets need both of every example")
    names = sorted({labels[example] for example in pool})
    groups = {label: [example for example in pool if labels[example] == label] for label in names}
    counts = _shares({label: len(group) for label, group in groups.items()}, size)
    sums = {label: sum(lengths[example] for example in group) for label, group in groups.items()}
    target = sum(counts[label] * (sums[label] / len(group)) for label, group in groups.items())
    rng = np.random.default_rng(seed)

    def one() -> tuple[str, ...]:
        chosen, off = _alike(groups, counts, lengths, target, tolerance, rng)
        if off:
            raise UserError(
                "subsets of matched length cannot be made",
                value=f"off by {off:.2%}, allowed are {tolerance:.2%}",
                rule="exchanges within a label bring the sum nearer",
                fix="allow a larger tolerance or take larger subsets",
            )
        return chosen

    possible = math.prod(math.comb(len(groups[label]), n) for label, n in counts.items())
    inclusion = {example: counts[labels[example]] / len(groups[labels[example]]) for example in pool}
    return _named("matched", _distinct(one, count, possible), inclusion)


def alike_subsets(
    named: Sequence[str],
    others: Sequence[str],
    labels: Mapping[str, str],
    lengths: Mapping[str, float],
    count: int,
    *,
    seed: int,
    tolerance: float = 0.05,
) -> tuple[tuple[str, ...], ...]:
    """Random sets of the others that are like those named: as many of each label, about the same summed length.

    Each is drawn within the labels; then members are exchanged within a label until the sum is in the tolerance. Sets
    may repeat where the others are few.

    Parameters
    ----------
    labels, lengths : of the named and of the others
    tolerance : how far the summed lengths may be apart, relative to that of the named

    Raises
    ------
    UserError
        A label has fewer others than are named of it, with both counts; no others of that length.
    """
    refuse(sorted(i for i in (*named, *others) if i not in labels), "examples have no label")
    wanted = Counter(labels[i] for i in named)
    groups = {label: sorted(i for i in others if labels[i] == label) for label in sorted(wanted)}
    few = {label: len(own) for label, own in groups.items() if len(own) < wanted[label]}
    refuse(
        [f"{label}: {wanted[label]} named, {n} others" for label, n in few.items()],
        "the named documents have no random counterpart of the same topic",
        rule="every topic has as many other documents as are named of it",
        fix="lower validation.budgets, or set validation.alike to a coarser column, or to null",
    )
    rng, target = np.random.default_rng(seed), sum(lengths[i] for i in named)
    found = []
    for _ in range(count):
        chosen, off = _alike(groups, wanted, lengths, target, tolerance, rng)
        if off:
            raise UserError(
                "the named documents have no random counterpart of the same size",
                value=f"{len(named)} named with {target:.0f} tokens; the nearest others are off by {off:.1%}",
                rule=f"others of the same topics come within {tolerance:.0%}",
                fix="set validation.budgets to another share, or validation.alike to a coarser column, or to null",
            )
        found.append(chosen)
    return tuple(found)


def summed(subsets: Subsets, values: Mapping[str, float]) -> Floats:
    """Sum of a value over the members of each subset, float64 [M].

    Raises
    ------
    UserError
        A member has no value, or one that is not finite.
    """
    examples = sorted({example for subset in subsets.members for example in subset})
    rule = "a sum needs the value of every member"
    each = finite_values(examples, values, "examples of the subsets have no finite value", rule=rule)
    return subsets.membership(examples).astype(np.float64) @ each


def finite_values(
    names: Sequence[str], values: Mapping[str, float], what: str, *, rule: str, fix: str | None = None
) -> Floats:
    """Values by name, float64 [n]; UserError where one is missing or not finite, which ``what`` says."""
    missing = sorted({name for name in names if not math.isfinite(values.get(name, math.nan))})
    refuse(missing, what, rule=rule, fix=fix)
    return np.array([values[name] for name in names], dtype=np.float64)


def _alike(
    groups: Mapping[str, Sequence[str]],
    counts: Mapping[str, int],
    lengths: Mapping[str, float],
    target: float,
    tolerance: float,
    rng: np.random.Generator,
) -> tuple[tuple[str, ...], float]:
    """So many members of each label at random, exchanged within it until the summed length is near ``target``.

    Beside them 0, or how far off they stay, relative to the target, where no exchange brings it nearer.
    """
    chosen = {label: set(_pick(rng, group, counts[label])) for label, group in groups.items()}
    error, allowed = sum(lengths[i] for some in chosen.values() for i in some) - target, tolerance * abs(target)
    while abs(error) > allowed and any(len(chosen[label]) < len(group) for label, group in groups.items()):
        label, left, other = _best_exchange(chosen, groups, lengths, error, allowed, rng)
        after = error + lengths[other] - lengths[left]
        if abs(after) >= abs(error):
            break
        chosen[label] = (chosen[label] - {left}) | {other}
        error = after
    members = tuple(sorted(i for some in chosen.values() for i in some))
    return members, abs(error / target) if abs(error) > allowed else 0.0


def _best_exchange(
    chosen: Mapping[str, set[str]],
    groups: Mapping[str, Sequence[str]],
    lengths: Mapping[str, float],
    error: float,
    allowed: float,
    rng: np.random.Generator,
) -> tuple[str, str, str]:
    """(label, member to leave, example to join): a random one of those allowed, else the nearest."""
    sides = [
        (label, sorted(chosen[label]), [example for example in group if example not in chosen[label]])
        for label, group in groups.items()
    ]
    distances = []
    for _, inside, outside in sides:
        loss, gain = (np.array([lengths[i] for i in some], dtype=np.float64) for some in (inside, outside))
        distances.append(np.abs(error + gain - loss[:, None]).ravel())
    distance = np.concatenate(distances)
    near = np.flatnonzero(distance <= allowed)
    place = int(rng.choice(near)) if near.size else int(distance.argmin())
    ends = np.cumsum([some.size for some in distances])
    side = int(np.searchsorted(ends, place, side="right"))
    label, inside, outside = sides[side]
    row, column = divmod(place - int(ends[side]) + distances[side].size, len(outside))
    return label, inside[row], outside[column]


def _shares(sizes: Mapping[str, int], total: int) -> dict[str, int]:
    """``total`` split in proportion to ``sizes``, by largest remainders (ties: first name)."""
    whole = sum(sizes.values())
    counts = {label: total * n // whole for label, n in sizes.items()}
    rest = sorted(sizes, key=lambda label: (-(total * sizes[label] % whole), label))
    for label in rest[: total - sum(counts.values())]:
        counts[label] += 1
    return counts


def _pick(rng: np.random.Generator, pool: Sequence[str], size: int) -> tuple[str, ...]:
    return tuple(sorted(pool[i] for i in rng.permutation(len(pool))[:size]))


def _distinct(draw: Callable[[], tuple[str, ...]], count: int, possible: int) -> tuple[tuple[str, ...], ...]:
    """``count`` different draws, in the order in which they came."""
    found: dict[tuple[str, ...], None] = {}
    misses = 0
    while len(found) < count:
        if count > possible or misses > _PATIENCE:
            rule, fix = f"at most {possible}, of which {len(found)} were found", "ask for fewer, or for another size"
            raise UserError("there are not so many different subsets", value=count, rule=rule, fix=fix)
        before = len(found)
        found[draw()] = None
        misses = 0 if len(found) > before else misses + 1
    return tuple(found)


def _named(kind: str, members: Sequence[tuple[str, ...]], inclusion: Mapping[str, float]) -> Subsets:
    return Subsets(tuple(f"{kind}-{i:04d}" for i in range(len(members))), tuple(members), inclusion)


def _checked(ids: Sequence[str]) -> list[str]:
    refuse_repeated(ids, "an example id")
    return sorted(ids)


def _check_size(size: int, examples: int) -> None:
    if not 0 < size < examples:
        rule = f"from 1 to {examples - 1} of {examples} examples"
        raise UserError("subsets of this size cannot be drawn", value=size, rule=rule, fix="choose another size")
