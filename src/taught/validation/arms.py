"""Ways of choosing the examples, each trained on and read: which model is better, and by how much.

An *arm* is a way of choosing (all examples, a rule's, at random); it has a model, or several. For each
metric m of a model (the mean y of each group of prompts; where the study says in which group the behavior is wanted,
:func:`taught.validation.outcomes.metrics`) and the S models of the random arm

    value = mean m over the arm's models,    difference = value - value of the random arm

Two things vary. *Prompts*: bootstrapped within their group, the same draws for all arms. *Runs*:
the random arm's models differ by their examples; an arm's own R models would differ by their seed
alone, so the random ones' variance s^2 is conservative for them, and possible with R = 1. A
difference gets Student's t with S - 1 degrees of freedom, times s sqrt(1/R + 1/S); the base model
was not trained, and has no 1/R. The interval of a value is that of the prompts alone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from taught.errors import UserError
from taught.stats.arrays import Floats
from taught.stats.intervals import UNKNOWN, Interval, two_sided
from taught.stats.multiplicity import holm
from taught.validation.lds import DRAWS
from taught.validation.outcomes import metrics

BASE, RANDOM = "base", "random"
LEAST_MODELS = 2


@dataclass(frozen=True)
class ArmRow:
    """One metric of one arm.

    Attributes
    ----------
    arm, metric, models, examples : the arm's number of models, and of examples that each is trained on
    value, lo, hi : mean over its models, 95% interval over prompts
    difference, difference_lo, difference_hi : to the random arm; nan for the random arm itself
    p, p_holm : of the difference being 0, two-sided; corrected over the arms within the metric
    """

    arm: str
    metric: str
    models: int
    examples: int
    value: float
    lo: float
    hi: float
    difference: float
    difference_lo: float
    difference_hi: float
    p: float
    p_holm: float


def compare_arms(
    arms: Mapping[str, Floats],
    examples: Mapping[str, int],
    groups: Mapping[str, Sequence[int]],
    sides: Sequence[str] = (),
    *,
    draws: int = DRAWS,
    seed: int = 0,
) -> list[ArmRow]:
    """Every metric of every arm, beside the arm ``random``.

    Parameters
    ----------
    arms : arm -> behavior of its models, float64 [R, N]
    examples : arm -> number of examples
    groups : group -> columns of its prompts
    sides : the group that should show the behavior and the one that should not, of a behavior that is a log
        probability; none: the mean y of the groups is all

    Raises
    ------
    UserError
        There is no random arm of two models or more.
    """
    S = len(arms.get(RANDOM, ()))
    if S < LEAST_MODELS:
        raise UserError("too few random models to compare with", value=S, rule=f"at least {LEAST_MODELS}")
    rng = np.random.default_rng(seed)
    weights: dict[str, Floats] = {}
    for group in dict.fromkeys((*sides, *groups)):
        n = len(groups[group])
        weights[group] = rng.multinomial(n, np.full(n, 1 / n), size=draws) / n
    t = rng.standard_normal(draws) * np.sqrt((S - 1) / rng.chisquare(S - 1, size=draws))
    points, drawn = {}, {}
    for arm, y in arms.items():
        points[arm] = _metrics(y, groups, sides)
        each = [_metrics(one, groups, sides, weights) for one in y]
        drawn[arm] = {name: np.mean([one[name] for one in each], 0) for name in points[arm]}
    rows = []
    for name, of_random in points[RANDOM].items():
        spread, p = float(of_random.std(ddof=1)), dict.fromkeys(arms, math.nan)
        gaps = dict.fromkeys(arms, UNKNOWN)
        others = [arm for arm in arms if arm != RANDOM]
        for arm in others:
            error = spread * math.sqrt(1 / S + (0 if arm == BASE else 1 / len(arms[arm])))
            gap = drawn[arm][name] - drawn[RANDOM][name] + error * t
            gaps[arm] = Interval.of(float(points[arm][name].mean() - of_random.mean()), gap)
            p[arm] = two_sided(gap)
        corrected = {RANDOM: math.nan, **dict(zip(others, holm([p[arm] for arm in others]).tolist(), strict=True))}
        for arm, y in arms.items():
            value = Interval.of(float(points[arm][name].mean()), drawn[arm][name])
            rows.append(ArmRow(arm, name, len(y), examples[arm], *value, *gaps[arm], p[arm], corrected[arm]))
    return rows


def _metrics(
    y: Floats, groups: Mapping[str, Sequence[int]], sides: Sequence[str], weights: Mapping[str, Floats] | None = None
) -> dict[str, Floats]:
    """Metrics of the behavior y [..., N], over prompts alike or with weights [draws, n] of each group's prompts."""
    found: dict[str, Floats] = {}
    if sides:
        of = metrics(
            *(y[..., groups[side]] for side in sides), *([] if weights is None else [weights[s] for s in sides])
        )
        named = {"positive": sides[0], "negative": sides[1]}
        for name, value in of.items():
            kind, colon, side = name.partition(":")
            found[f"{kind}{colon}{named.get(side, '')}"] = value
    for group, columns in groups.items():
        w = 1 / len(columns) if weights is None else weights[group]
        found[f"behavior:{group}"] = (w * y[..., columns]).sum(-1)
    return found
