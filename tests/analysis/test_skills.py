"""Accuracy on questions with options beside chance, and what is said of it."""

from __future__ import annotations

import numpy as np
import pytest
from scipy.stats import binomtest

from taught.analysis.skills import Skill, skills


def questions(group: str, right: int, n: int, options: int = 4) -> list[tuple[str, float, int, int]]:
    return [(group, 1.0 if i < right else -1.0, options, i % options) for i in range(n)]


def test_accuracy_has_its_exact_interval_and_the_mean_chance() -> None:
    (found,) = skills([*questions("a", 30, 40), *questions("a", 0, 40, options=2)])
    exact = binomtest(30, 80).proportion_ci(method="exact")
    assert (found.n, found.right, found.accuracy, found.chance) == (80, 30, 0.375, 0.375)
    assert (found.lo, found.hi) == pytest.approx((exact.low, exact.high), rel=1e-9)


@pytest.mark.parametrize(
    ("right", "said"),
    [
        (40, None),
        (10, "not shown to have this skill"),
        (13, "not shown to have this skill"),
        (1, "more often than by chance"),
    ],
)
def test_a_group_at_chance_or_below_is_warned_of(right: int, said: str | None) -> None:
    (found,) = skills(questions("a", right, 50))
    assert (found.warning is None) if said is None else (said in found.warning and "0.25 by chance" in found.warning)


def test_a_tie_is_not_right_and_groups_keep_their_order() -> None:
    found = skills([("b", 0.0, 2, 0), ("a", 1e-9, 2, 1), ("b", 2.0, 2, 1)])
    assert [(s.group, s.right, s.n) for s in found] == [("b", 1, 2), ("a", 1, 1)]
    assert found == [Skill(**s.to_dict()) for s in found]


def test_right_options_at_one_place_are_said() -> None:
    same = [("a", 1.0, 4, 2)] * 30
    assert "at one place" in skills(same)[0].warning
    assert skills([*same, ("a", 1.0, 4, 0)])[0].warning is None


def test_guessing_is_warned_of_in_nearly_all_draws() -> None:
    rng = np.random.default_rng(0)
    said = [skills(questions("a", int(rng.binomial(100, 0.25)), 100))[0].warning is not None for _ in range(300)]
    assert np.mean(said) > 0.95
