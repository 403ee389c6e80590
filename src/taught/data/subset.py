"""At most so many items, spread evenly over their strata, the same ones every time."""

from __future__ import annotations

import hashlib
from collections import defaultdict
from collections.abc import Callable, Hashable, Sequence
from typing import TypeVar

T = TypeVar("T")


def spread(
    items: Sequence[T], limit: int | None, stratum: Callable[[T], Hashable], id: Callable[[T], str]
) -> tuple[T, ...]:
    """Choose at most ``limit`` items, each stratum in proportion to its size.

    Within a stratum the order of choice is a hash of the id, so the choice depends neither on the
    order of the file nor on a random state. The result keeps the order of ``items``.
    """
    if limit is None or limit >= len(items):
        return tuple(items)
    strata: dict[Hashable, list[T]] = defaultdict(list)
    for item in sorted(items, key=lambda item: hashlib.sha256(id(item).encode()).digest()):
        strata[stratum(item)].append(item)
    # The j-th of m items of a stratum stands at (j + 1/2) / m of the way: take the first ones.
    place = {
        id(item): ((j + 0.5) / len(members), id(item)) for members in strata.values() for j, item in enumerate(members)
    }
    chosen = {id(item) for item in sorted(items, key=lambda item: place[id(item)])[:limit]}
    return tuple(item for item in items if id(item) in chosen)
