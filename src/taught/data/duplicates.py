"""Examples that repeat one another, word for word or nearly.

Two texts are near duplicates when the sets of their 5-word passages overlap (Jaccard: shared / all of both). Which
pairs to compare is found by MinHash (Broder 1997). The least hash of two texts' passages under a random function is the
same with a probability that is the overlap. Of 60 functions, two texts are compared where four in a row agree, at one
of 15 places: at an overlap of .8 in 99.9% of the cases. Every pair that is named has been compared passage by passage.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import lru_cache
from typing import TYPE_CHECKING

from taught.data.words import normalise, shingles, words

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

    from taught.data.examples import ExampleSet

WORDS = 5  # of a passage
_BANDS, _ROWS = 15, 4
_SEED = 0
_AT_ONCE = 4096  # passages of a document that are hashed at once


@dataclass(frozen=True)
class Duplicate:
    """An example that repeats another one.

    Attributes
    ----------
    id, of : the example, and the one that it repeats; of those that are alike it is the one whose id is first
    exact : the texts are the same but for case, spacing and final punctuation
    overlap : share of the 5-word passages of both that both have
    """

    id: str
    of: str
    exact: bool
    overlap: float


def find_duplicates(texts: Mapping[str, str], near: float = 0.8) -> list[Duplicate]:
    """Name every text that repeats another one, sorted by id.

    Without those that are named, none repeats another. The result does not depend on the order of ``texts``.
    Memory: 240 bytes a text beside the texts.

    Parameters
    ----------
    texts : id -> text
    near : overlap from which texts are near duplicates, above 0 and at most 1
    """
    first: dict[str, str] = {}
    exact = {id: of for id in sorted(texts) if (of := first.setdefault(normalise(texts[id]), id)) != id}
    similar = _near({id: texts[id] for id in first.values()}, near)
    found = [Duplicate(id, similar[of].of if of in similar else of, True, 1.0) for id, of in exact.items()]
    return sorted([*found, *similar.values()], key=lambda d: d.id)


def drop_duplicates(examples: ExampleSet, near: float) -> tuple[ExampleSet, list[Duplicate]]:
    """Return the examples of which none repeats another, and those that were left out."""
    found = duplicates_among(examples, near)
    return examples.without(duplicate.id for duplicate in found), found


def duplicates_among(examples: ExampleSet, near: float) -> list[Duplicate]:
    """The same as :func:`find_duplicates`, among examples: of a conversation all turns count."""
    return find_duplicates({example.id: example.whole for example in examples}, near)


def _near(texts: Mapping[str, str], near: float) -> dict[str, Duplicate]:
    """Near duplicates among texts that differ, by id; the ids ascend."""
    import numpy as np

    @lru_cache(_AT_ONCE)
    def passages(id: str) -> NDArray[np.uint64]:
        return np.unique(shingles(words(texts[id]), WORDS))

    def overlap(a: str, b: str) -> float:
        shared = len(np.intersect1d(passages(a), passages(b), assume_unique=True))
        return shared / (len(passages(a)) + len(passages(b)) - shared)

    ids = [id for id in texts if len(passages(id))]
    alike: dict[str, set[str]] = defaultdict(set)
    for group in _groups(np.array([_signature(passages(id)) for id in ids])):
        members = [ids[place] for place in group]
        while members:  # each is compared with the first of those that are unlike those before it
            head, *rest = members
            members = [id for id in rest if overlap(head, id) < near]
            for id in set(rest).difference(members):
                alike[id].add(head)
    found: dict[str, Duplicate] = {}
    for id in ids:
        # What repeats a document that is itself a repeat is compared with the one that stays.
        stay = sorted({found[of].of if of in found else of for of in alike[id]})
        best = next(((of, share) for of in stay if (share := overlap(of, id)) >= near), None)
        if best is not None:
            found[id] = Duplicate(id, best[0], False, best[1])
    return found


def _signature(passages: NDArray[np.uint64]) -> NDArray[np.uint32]:
    """Least hash of the passages under each random function, uint32 [60]."""
    import numpy as np

    draw = np.random.default_rng(_SEED).integers(0, 2**64, (2, _BANDS * _ROWS, 1), np.uint64)
    factor, shift = draw[0] | np.uint64(1), draw[1]
    least = np.full(_BANDS * _ROWS, 2**32 - 1, np.uint32)
    for start in range(0, len(passages), _AT_ONCE):
        hashes = (factor * passages[start : start + _AT_ONCE] + shift) >> np.uint64(32)
        least = np.minimum(least, hashes.min(1).astype(np.uint32))
    return least


def _groups(signatures: NDArray[np.uint32]) -> Iterator[list[int]]:
    """Places of signatures that agree in four rows, ascending; a group for each of the 15 places where they do."""
    import numpy as np

    for band in range(_BANDS if len(signatures) else 0):
        rows = signatures[:, band * _ROWS : (band + 1) * _ROWS]
        _, group, sizes = np.unique(rows, axis=0, return_inverse=True, return_counts=True)
        order = np.argsort(group.reshape(-1), kind="stable")
        ends = np.cumsum(sizes)
        for number in np.flatnonzero(sizes > 1):
            yield order[ends[number] - sizes[number] : ends[number]].tolist()
