"""Removal and addition curves: what a method names against as many random examples.

*Removal*: train on all examples but the k with the highest score. *Addition*: train on these k alone.
Beside each stand sets of k random examples. At every budget k

    difference = outcome of the method's set - mean outcome of the random sets

and over the budgets the area between the two curves, in units of the outcome,

    area = 1 / b_K  integral from 0 to b_K of difference(b) db    (trapezoids, difference(0) = 0)

b the share of the examples. Removing what raises a target should lower it: a good method has a
negative difference there, and a positive one under addition.

Two things vary. *Prompts*: bootstrapped, the same draws for both sides. *Runs* (random sets, and seeds of training):
with S random runs and R of the method, the mean difference gets an error of Student's t with S - 1 degrees of freedom
and the covariance over budgets of the random runs, times 1/R + 1/S. A bootstrap of five runs would be too short by a
third. The method's runs differ by their seed alone, the random ones by their examples as well, so taking the covariance
from these is conservative, and possible with R = 1.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from taught.errors import UserError, refuse
from taught.stats.arrays import Floats
from taught.stats.intervals import Interval, two_sided
from taught.stats.multiplicity import holm
from taught.validation.lds import DRAWS
from taught.validation.subsets import Subsets

Kind = Literal["remove", "add"]

LEAST_RUNS = 5


@dataclass(frozen=True, eq=False)
class Plan:
    """What is to be trained for one curve.

    Attributes
    ----------
    kind : "remove" or "add"
    examples : P, number of examples
    budgets : K numbers of examples removed or added, ascending
    subsets : everything to train on, by name
    chosen : K names, the method's sets
    controls : S runs of K names each, the random sets; within a run they are nested
    """

    kind: Kind
    examples: int
    budgets: tuple[int, ...]
    subsets: Subsets
    chosen: tuple[str, ...]
    controls: tuple[tuple[str, ...], ...]


@dataclass(frozen=True)
class CurvePoint:
    """One budget of a curve.

    Attributes
    ----------
    budget, share : number of examples removed or added, and their share of all
    method, random : mean outcomes
    difference, lo, hi : method - random, with its 95% interval
    p, p_holm : two-sided, and corrected for all budgets of the curve
    """

    budget: int
    share: float
    method: float
    random: float
    difference: float
    lo: float
    hi: float
    p: float
    p_holm: float


@dataclass(frozen=True)
class Curve:
    """A method's curve against random controls.

    Attributes
    ----------
    kind : "remove" or "add"
    points : one a budget
    area, lo, hi, p : area between the curves (module docstring), with interval and two-sided p
    runs, random_runs, prompts : R, S, N
    """

    kind: Kind
    points: tuple[CurvePoint, ...]
    area: float
    lo: float
    hi: float
    p: float
    runs: int
    random_runs: int
    prompts: int


def plan_curve(
    scores: Mapping[str, float],
    budgets: Sequence[int],
    *,
    kind: Kind,
    method: str,
    runs: int = LEAST_RUNS,
    seed: int = 0,
) -> Plan:
    """Which subsets to train on for a curve.

    Parameters
    ----------
    scores : example id -> score; the highest go first, ties to the smaller id
    budgets : numbers of examples to remove or add
    method : goes into the names of the method's sets; those of random sets are the same for all
        methods, so they are trained once
    runs : random sets a budget; what is trained on are the first ones that ``random_subsets`` of
        that size and seed gives, so subsets of a design of this size are not trained again

    Raises
    ------
    UserError
        No budget, one that leaves no example or takes none, a score that is not finite, too few runs.
    """
    bad = sorted(example for example, value in scores.items() if not np.isfinite(value))
    refuse(bad, "scores are not finite", rule="every score is a number")
    steps = tuple(sorted(set(budgets)))
    if not steps or steps[0] < 1 or steps[-1] >= len(scores):
        rule = f"numbers of examples from 1 to {len(scores) - 1}"
        raise UserError("these budgets make no curve", value=list(budgets), rule=rule, fix="give other budgets")
    if runs < LEAST_RUNS:
        raise UserError("too few random sets", value=runs, rule=f"at least {LEAST_RUNS}")
    pool = sorted(scores)
    ranking = sorted(pool, key=lambda example: (-scores[example], example))
    members: dict[str, tuple[str, ...]] = {}

    def nested(order: Sequence[str], name: str) -> tuple[str, ...]:
        names = []
        for k in steps:
            names.append(f"{kind}-{k}-{name}")
            some = order[:k] if kind == "add" else order[k:]
            members[names[-1]] = tuple(sorted(some))
        return tuple(names)

    chosen = nested(ranking, method)
    rng = np.random.default_rng(seed)
    draws = ([pool[i] for i in rng.permutation(len(pool))] for _ in range(runs))
    orders = (order if kind == "add" else order[::-1] for order in draws)
    controls = tuple(nested(order, f"random-{i}") for i, order in enumerate(orders))
    held = Counter(example for subset in members.values() for example in subset)
    inclusion = {example: held[example] / len(members) for example in pool}
    subsets = Subsets(tuple(members), tuple(members.values()), inclusion)
    return Plan(kind, len(pool), steps, subsets, chosen, controls)


def compare_curves(plan: Plan, method: Floats, random: Floats, *, draws: int = DRAWS, seed: int = 0) -> Curve:
    """The curve of a plan from its outcomes.

    Parameters
    ----------
    method : float64 [R, K, N], outcome of each run of the method's sets, budget and prompt
    random : float64 [S, K, N], the same of the random sets, one run each
    """
    R, S, N = len(method), len(random), method.shape[2]
    gap = method.mean(0) - random.mean(0)  # [K, N]
    rng = np.random.default_rng(seed)
    counts = rng.multinomial(N, np.full(N, 1 / N), size=draws) / N
    runs = random.mean(2)  # [S, K]; their t vector has the covariance of the runs, S - 1 degrees
    noise = rng.standard_normal((draws, S)) @ (runs - runs.mean(0)) / np.sqrt(S - 1)
    noise *= np.sqrt((S - 1) / rng.chisquare(S - 1, size=(draws, 1))) * np.sqrt(1 / R + 1 / S)
    drawn = counts @ gap.T + noise  # [draws, K]
    shares = np.array(plan.budgets) / plan.examples
    steps = np.diff(shares, prepend=0.0)
    weights = (steps + np.append(steps[1:], 0.0)) / 2 / shares[-1]  # of the trapezoids, from (0, 0) on
    value = gap.mean(1)
    area = Interval.of(float(weights @ value), drawn @ weights)
    p = np.array([two_sided(drawn[:, k]) for k in range(len(value))])
    points = []
    for k, (budget, adjusted) in enumerate(zip(plan.budgets, holm(p), strict=True)):
        means = float(method[:, k].mean()), float(random[:, k].mean())
        ends = Interval.of(float(value[k]), drawn[:, k])
        points.append(CurvePoint(budget, float(shares[k]), *means, *ends, float(p[k]), float(adjusted)))
    return Curve(plan.kind, tuple(points), *area, two_sided(drawn @ weights), R, S, N)
