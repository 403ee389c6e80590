"""How many retrainings a chosen design saves against random subsets, in simulations.

Outcomes of training on a subset are made up: a sum of effects of its examples, products of examples (a
tenth of its variance), and noise of the training seed. Influence scores are these effects with
errors. Asked is the effect of one example, or of the group of planted examples. Every way of choosing and
estimating is unbiased (taught.validation.design); compared is how long its 95% interval is.
"""

from __future__ import annotations

import argparse
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.common import RESULTS, Results, console, kept, run
from taught.progress import RichProgress
from taught.validation.design import Effect, Question, ask, couple_effect, couples, draw, estimate, next_probabilities
from taught.validation.subsets import Subsets, random_subsets

Floats = NDArray[np.float64]
RANDOM, MODEL, CHOSEN, LATER, COUPLES = (
    "random",
    "random, datamodel",
    "chosen, datamodel",
    "chosen after a random third, datamodel",
    "couples",
)
INTERACTIONS = 0.1


def from_pool(
    question: Question, outcomes: Mapping[str, float], scores: Mapping[str, float], count: int, seed: int
) -> dict[str, Effect]:
    """The effect by ``count`` draws from a pool whose outcomes are known, one way after another."""
    by_chance = draw(question, question.reference, count, seed=seed)
    aimed = draw(question, next_probabilities(question, [], count), count, seed=seed)
    first = draw(question, question.reference, count // 3, seed=seed)
    rest = count - count // 3
    then = draw(question, next_probabilities(question, [first], rest), rest, seed=seed + 1)
    return {
        RANDOM: estimate(question, [by_chance], outcomes)[0],
        MODEL: estimate(question, [by_chance], outcomes, scores)[0],
        CHOSEN: estimate(question, [aimed], outcomes, scores)[0],
        LATER: estimate(question, [first, then], outcomes, scores)[0],
    }


class World:
    """Effects of P examples, and what training on subsets of them gives."""

    def __init__(self, examples: int, accuracy: float, noise: float, seed: int) -> None:
        self.rng = np.random.default_rng(seed)
        self.ids = [f"z{i:03d}" for i in range(examples)]
        self.theta = self.rng.standard_normal(examples)
        error = self.rng.standard_normal(examples)
        found = accuracy * self.theta + math.sqrt(1 - accuracy**2) * error
        self.scores = dict(zip(self.ids, found.tolist(), strict=True))
        self.spread = math.sqrt(examples / 4)  # of a random half's sum
        self.noise = noise * self.spread
        # sum_ij (m_i - 1/2) b_ij (m_j - 1/2), b ~ N(0, 1): variance P^2 / 16 over random halves
        size = math.sqrt(INTERACTIONS) * self.spread / (examples / 4)
        self.b = size * self.rng.standard_normal((examples, examples))

    def train(self, subsets: Subsets) -> dict[str, float]:
        """Outcome of each subset, under one seed each."""
        m = subsets.membership(self.ids).astype(np.float64)
        products = np.einsum("qi,ij,qj->q", m - 0.5, self.b, m - 0.5, optimize=True)
        noise = self.noise * self.rng.standard_normal(len(m))
        return dict(zip(subsets.names, (m @ self.theta + products + noise).tolist(), strict=True))

    def added(self, group: Sequence[str], backgrounds: Subsets) -> float:
        """What adding the group to these backgrounds gives on average, without noise."""
        inside = np.array([example in set(group) for example in self.ids], dtype=np.float64)
        m = backgrounds.membership(self.ids).astype(np.float64)
        cross = (m - 0.5) @ (self.b + self.b.T) @ inside
        return float(inside @ self.theta + inside @ self.b @ inside + cross.mean())


def once(args: argparse.Namespace, accuracy: float, noise: float, planted: int, seed: int) -> list[dict[str, Any]]:
    """One made-up world: intervals and errors of every way at every budget."""
    world = World(args.examples, accuracy, noise, seed)
    group = world.ids[:planted]
    pool = random_subsets(world.ids, args.examples // 2, args.pool, seed=seed)
    question = ask(pool, {"group": group})
    outcomes = world.train(pool)
    row = [outcomes[name] for name in pool.names]
    truth = float(question.weights[0] @ (question.reference * row))
    others = [example for example in world.ids if example not in set(group)]
    size = (args.examples - planted) // 2
    background = random_subsets(others, size, args.pool, seed=seed + 1)
    added = world.added(group, background)
    found = []
    for count in args.counts:
        ways = from_pool(question, outcomes, world.scores, count, seed)
        made = couples(world.ids, "group", group, size, count // 2, seed=seed)
        ways[COUPLES] = couple_effect(made, world.train(made.subsets))
        for way, effect in ways.items():
            right = added if way == COUPLES else truth
            found.append(
                {
                    "way": way,
                    "count": count,
                    "retrainings": effect.retrainings,
                    "half_width": (effect.hi - effect.lo) / 2,
                    "error": effect.value - right,
                    "covered": effect.lo <= right <= effect.hi,
                }
            )
    return found


def needed(rows: Sequence[Mapping[str, float]], width: float) -> float:
    """Retrainings at which the mean width falls to ``width``: log-linear between the budgets.

    Not below the smallest budget; beyond the largest, widths are taken to fall with the root of it.
    """
    n = np.array([row["retrainings"] for row in rows])
    w = np.array([row["half_width"] for row in rows])
    if width <= w[-1]:
        return float(n[-1] * (w[-1] / width) ** 2)
    return float(np.exp(np.interp(-np.log(width), -np.log(w), np.log(n))))


def measure(args: argparse.Namespace) -> None:
    """All settings, one after another."""
    results = Results(
        "design",
        {
            "examples": args.examples,
            "pool": args.pool,
            "planted": args.planted,
            "repetitions": args.repetitions,
            "budgets": args.counts,
            "interactions": INTERACTIONS,
            "subsets": "random halves",
        },
        args.out,
    )
    settings = [(a, n, g) for a in args.accuracy for n in args.noise for g in (1, args.planted)]
    with RichProgress(console) as progress, kept(results, _COLUMNS):
        for accuracy, noise, planted in settings:
            progress.step(f"accuracy {accuracy:g}, noise {noise:g}, group of {planted}", args.repetitions)
            worlds = []
            for seed in range(args.repetitions):
                worlds += once(args, accuracy, noise, planted, seed)
                progress.advance(1)
            for row in summarised(worlds):
                results.add({"accuracy": accuracy, "noise": noise, "group": planted, **row})
        results.summary.update(_summary(results.rows))


def summarised(worlds: Sequence[Mapping[str, Any]]) -> list[dict[str, Any]]:
    """One row for each way: means over the worlds."""
    rows = []
    ways = list(dict.fromkeys(row["way"] for row in worlds))
    for way in ways:
        budgets = []
        for count in sorted({row["count"] for row in worlds}):
            some = [row for row in worlds if (row["way"], row["count"]) == (way, count)]
            budgets.append(
                {
                    "retrainings": float(np.mean([row["retrainings"] for row in some])),
                    "half_width": float(np.mean([row["half_width"] for row in some])),
                    "rmse": float(np.sqrt(np.mean([row["error"] ** 2 for row in some]))),
                    "coverage": float(np.mean([row["covered"] for row in some])),
                }
            )
        rows.append({"way": way, **budgets[-1], "budgets": budgets})
    reach = {row["way"]: row["half_width"] for row in rows}
    for row in rows:
        for name, way in (("random", RANDOM), ("random_datamodel", MODEL)):
            full = next(r["retrainings"] for r in rows if r["way"] == way)
            row[f"share_of_{name}"] = needed(row["budgets"], reach[way]) / full
    return rows


def _summary(rows: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """Share of the retrainings of random subsets, least and most over the settings."""
    found: dict[str, Any] = {}
    for way in (MODEL, CHOSEN, LATER, COUPLES):
        for name in ("share_of_random", "share_of_random_datamodel"):
            shares = [row[name] for row in rows if row["way"] == way]
            found[f"{way}: {name}"] = [min(shares), max(shares)]
    return found


_COLUMNS: dict[str, Callable[[dict[str, Any]], str]] = {
    "way": lambda row: row["way"],
    "scores' accuracy": lambda row: f"{row['accuracy']:g}",
    "noise": lambda row: f"{row['noise']:g}",
    "group": lambda row: str(row["group"]),
    "half width": lambda row: f"{row['half_width']:.3g}",
    "rmse": lambda row: f"{row['rmse']:.3g}",
    "coverage": lambda row: f"{row['coverage']:.2f}",
    "of random": lambda row: f"{row['share_of_random']:.3f}",
    "of random, datamodel": lambda row: f"{row['share_of_random_datamodel']:.3f}",
}


def main() -> None:
    """Parse the flags and measure."""
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--examples", type=int, default=230)
    flags.add_argument("--planted", type=int, default=30)
    flags.add_argument("--pool", type=int, default=800, help="random subsets to choose from")
    flags.add_argument("--counts", type=int, nargs="+", default=[12, 20, 30, 42, 60])
    flags.add_argument(
        "--accuracy", type=float, nargs="+", default=[0.5, 0.9], help="correlation of the scores with the effects"
    )
    flags.add_argument(
        "--noise", type=float, nargs="+", default=[0.1, 0.4], help="sd of the seeds over that of the outcomes"
    )
    flags.add_argument("--repetitions", type=int, default=100)
    flags.add_argument("--out", default=RESULTS, type=type(RESULTS))
    run(measure, flags.parse_args())


if __name__ == "__main__":
    main()
