"""Does the model have a skill? Its accuracy on questions with options, beside what guessing would reach."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict, dataclass
from typing import Any

from taught.stats.intervals import share_of

FEW = 5  # questions; from here on it is said that all right options stand at one place


@dataclass(frozen=True)
class Skill:
    """Accuracy on the questions of a group.

    Attributes
    ----------
    n, right : questions, and those whose right option is the likeliest of all; a tie is not right
    accuracy, lo, hi : their share with its exact 95% interval
    chance : the share that guessing is right on, the mean of 1 / number of options
    same_place : every right option stands at the same place
    """

    group: str
    n: int
    right: int
    accuracy: float
    lo: float
    hi: float
    chance: float
    same_place: bool

    @property
    def warning(self) -> str | None:
        """What a reader should know before believing what is said of this group."""
        beside = f"accuracy {self.accuracy:.2f} [{self.lo:.2f}, {self.hi:.2f}] against {self.chance:.2f} by chance"
        if self.hi < self.chance:
            return f"{self.group}: the model is wrong more often than by chance, {beside}: its map means little"
        if self.lo <= self.chance:
            return f"{self.group}: the model is not shown to have this skill, {beside}: its map means little"
        if self.same_place:
            return f"{self.group}: every right option stands at one place, so a liking for that place looks like skill"
        return None

    def to_dict(self) -> dict[str, Any]:
        """Plain values for a file; ``Skill(**record)`` gives it back."""
        return asdict(self)


def skills(questions: Iterable[tuple[str, float, int, int]]) -> list[Skill]:
    """The skill on each group of questions, in order of first appearance.

    Parameters
    ----------
    questions : (group, margin of the right option over the best other one, number of options, place of the right one)
    """
    groups: dict[str, list[tuple[float, int, int]]] = {}
    for group, margin, options, place in questions:
        groups.setdefault(group, []).append((margin, options, place))
    found = []
    for group, own in groups.items():
        n, right = len(own), sum(margin > 0 for margin, _, _ in own)
        chance = sum(1 / options for _, options, _ in own) / n
        same = n >= FEW and len({place for _, _, place in own}) == 1
        found.append(Skill(group, n, right, *share_of(right, n), chance, same))
    return found
