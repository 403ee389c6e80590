"""At most so many items, spread over their strata, the same ones every time."""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Generic, TypeVar

from taught.data.columns import written
from taught.errors import UserError

T = TypeVar("T")
S = TypeVar("S", bound=Hashable)


@dataclass(frozen=True)
class Spread:
    """How items are drawn.

    Attributes
    ----------
    limit : at most so many; None: all
    by : columns whose values make a stratum; None: the label
    even : False: each stratum in proportion to its size; True: as many of each, as far as it has them
    seed : another one draws other items
    """

    limit: int | None = None
    by: tuple[str, ...] | None = None
    even: bool = False
    seed: int = 0

    def columns(self, found: Mapping[str, str]) -> tuple[str, ...]:
        """The columns of ``by``, of a table whose fields were ``found`` in these columns."""
        own = (found["label"],) if "label" in found else ()
        return own if self.by is None else self.by


def stratum_of(cells: Iterable[object]) -> tuple[str, ...]:
    """Name of a stratum: its cells as text."""
    return tuple("" if cell is None else written(cell) for cell in cells)


@dataclass(frozen=True)
class Sample:
    """What was drawn: of each stratum how many items there are, and how many were taken."""

    spread: Spread
    columns: tuple[str, ...]
    strata: Mapping[tuple[str, ...], tuple[int, int]]

    def record(self) -> dict[str, Any]:
        """Plain values for a file. A stratum's weight is how many items each of those taken stands for."""
        rows = []
        for stratum, (size, taken) in sorted(self.strata.items()):
            counts = {"read": size, "sampled": taken, "weight": size / taken if taken else None}
            rows.append({"stratum": dict(zip(self.columns, stratum, strict=True)), **counts})
        read, sampled = (sum(counts) for counts in zip(*self.strata.values(), strict=True))
        drawn = {"by": list(self.columns), "even": self.spread.even, "seed": self.spread.seed}
        return {**drawn, "limit": self.spread.limit, "read": read, "sampled": sampled, "strata": rows}

    def note(self) -> str:
        """One line that says how much of what there is was taken."""
        sizes, taken = (sum(counts) for counts in zip(*self.strata.values(), strict=True))
        none = sum(own == 0 for _, own in self.strata.values())
        by = f"over {len(self.strata)} strata of {', '.join(self.columns)}"
        return f"{taken} of {sizes} examples, spread {by}" + f"; {none} strata have none" * bool(none)


class Strata(Generic[S]):
    """Items that are gone through twice: each is noted, then some are taken.

    Within a stratum the order of choice is a hash of the id, so the choice depends neither on the order of the items
    nor on a random state. Memory: 12 bytes an item until :meth:`take`, about 40 then.

    Parameters
    ----------
    even, seed : as in :class:`Spread`. The seed 0 leaves the ids as they are.
    """

    def __init__(self, even: bool = False, seed: int = 0) -> None:
        self._even, self._salt = even, f"{seed}:" if seed else ""
        self._keys, self._of = array("Q"), array("I")
        self._number: dict[S, int] = {}

    def note(self, id: str, stratum: S) -> None:
        """Note the next item."""
        self._keys.append(int.from_bytes(hashlib.sha256((self._salt + id).encode()).digest()[:8]))
        self._of.append(self._number.setdefault(stratum, len(self._number)))

    def take(
        self, items: Iterable[T], limit: int, id: Callable[[T], str]
    ) -> tuple[tuple[T, ...], dict[S, tuple[int, int]]]:
        """Go through the same items again and choose ``limit`` of them, at least one and not all.

        Returns
        -------
        what was chosen, in the order of the items; stratum -> how many items it has, how many were chosen

        Raises
        ------
        UserError
            There are not as many items as were noted.
        """
        import numpy as np

        keys, of = np.frombuffer(self._keys, np.uint64), np.frombuffer(self._of, np.uint32)
        sizes = np.bincount(of)
        order = np.lexsort((keys, of))
        rank = np.empty(len(of))
        rank[order] = np.arange(len(of)) - (np.cumsum(sizes) - sizes)[of[order]]
        # The j-th of m items of a stratum stands at (j + 1/2) / m of the way: take the first ones.
        place = rank if self._even else (rank + 0.5) / sizes[of]
        last = np.partition(place, limit - 1)[limit - 1]
        chosen: dict[int, T] = {}
        tied: dict[int, T] = {}  # for what is left, at most one of a stratum
        number = -1
        for number, item in enumerate(items):
            if number < len(place) and place[number] <= last:
                (chosen if place[number] < last else tied)[number] = item
        if number + 1 != len(place):
            raise UserError(
                "the examples changed while they were read",
                value=f"{len(place)} at first, then {number + 1}",
                fix="run again when nothing writes to them",
            )
        for at in sorted(tied, key=lambda at: id(tied[at]))[: limit - len(chosen)]:
            chosen[at] = tied[at]
        places = sorted(chosen)
        taken = np.bincount(of[places], minlength=len(sizes)).tolist()
        counts = dict(zip(self._number, zip(sizes.tolist(), taken, strict=True), strict=True))
        return tuple(chosen[at] for at in places), counts

    def repeated(self) -> set[int]:
        """Places of the items whose id may be that of another one: hashes that stand twice."""
        import numpy as np

        _, group, times = np.unique(np.frombuffer(self._keys, np.uint64), return_inverse=True, return_counts=True)
        return set(np.flatnonzero(times[group] > 1).tolist())


def spread(
    items: Sequence[T], limit: int | None, stratum: Callable[[T], Hashable], id: Callable[[T], str]
) -> tuple[T, ...]:
    """Choose at most ``limit`` items, each stratum in proportion to its size; the order stays."""
    if limit is None or limit >= len(items):
        return tuple(items)
    strata: Strata[Hashable] = Strata()
    for item in items:
        strata.note(id(item), stratum(item))
    return strata.take(items, limit, id)[0]
