"""The estimator ``sketch``: effects from projected gradients that are kept, with standard errors."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import ceil
from pathlib import Path
from typing import Any, ClassVar

import numpy as np

from taught.core import rules
from taught.core.curvature import Curvature
from taught.core.estimator import Work
from taught.core.example import Examples
from taught.core.problem import Problem
from taught.core.query import build_queries, query_parts, some_of
from taught.core.registry import ESTIMATORS, setting
from taught.core.scores import Scores
from taught.core.target import TargetSet, kind_of
from taught.core.trajectory import Queries, Trajectory
from taught.errors import UserError
from taught.estimators.adjoint import Adjoint
from taught.estimators.cost import ACTIVE, Asked, Passes, sketches
from taught.features.concept import ConceptMap
from taught.model.gradients import find_sites, frozen
from taught.run.pieces import Prefixed
from taught.sketches.answer import answer, error_factor, stored_queries, theory_error
from taught.sketches.fill import example_row, fill_examples, fill_prompts, prompt_key
from taught.sketches.project import Projection
from taught.sketches.store import SketchStore
from taught.stats.arrays import Floats

# dy of so many examples and prompts is kept; for more, ask the store.
LARGEST_DY = 50_000_000


@ESTIMATORS.register("sketch")
@dataclass(frozen=True)
class Sketch:
    """An approximation of known error, from projected gradients that answer later questions too."""

    store: str | None = setting(
        None, rules.optional(rules.place()), "folder of sketches, kept and grown; null: sketches in the run folder"
    )
    dim: int = setting(16384, rules.whole(64), "numbers a sketch has; the error falls as 1 / sqrt(dim)")
    error: float | None = setting(
        None,
        rules.optional(rules.number(above=0)),
        "instead of dim: a standard error over |gradient| |query|, e.g. 0.01",
    )
    seed: int = setting(0, rules.whole(0), "another seed is another projection")
    sample: int = setting(8, rules.whole(1), "so many examples are computed exactly too, to measure the error")
    rescore: int = setting(
        0, rules.whole(0), "so many of the strongest examples of each target are scored again, exactly, in a table"
    )
    exact: ClassVar[bool] = False

    @property
    def size(self) -> int:
        """K: ``dim``, or the least multiple of 64 with 1 / sqrt(K) at most ``error``."""
        return self.dim if self.error is None else 64 * max(1, ceil(1 / self.error**2 / 64))

    def refuses(self, curvature: Curvature, trajectory: Trajectory) -> str | None:
        """The store's sketches are of gradients at one set of weights."""
        if not trajectory.single:
            return "sketches are of gradients at one set of weights"
        return None

    def open(self, problem: Problem, work: Work) -> tuple[SketchStore, Projection]:
        """The store and the projection that fills it.

        Gradients that are multiplied by something first have a store of their own, inside the plain one.

        Raises
        ------
        UserError
            There is neither ``store`` nor a folder to keep it in; it was made under other conditions.
        """
        folder = self.store or (None if work.folder is None else work.folder / "sketches")
        if folder is None:
            raise UserError(
                "sketches have no place to be kept",
                rule="a folder, or a run folder",
                fix="pass --run RUN, or --set attribution.estimator.store=FOLDER",
            )
        before = problem.metric.before
        projection = Projection(problem.model, self.size, self.seed, before)
        if before is not None:
            folder = Path(folder) / f"multiplied-{before.key[:16]}"
        return SketchStore(folder, {**problem.identity, **projection.record()}), projection

    def fill(self, problem: Problem, examples: Examples, work: Work, share: tuple[int, int] = (0, 1)) -> None:
        """Compute what the store lacks; damaged shards are made anew. ``share``: ``fill_examples``."""
        store, projection = self.open(problem, work)
        problem = problem.plain or problem
        if share[0] == 0 and (damaged := store.drop_damaged()):
            work.progress.note(f"damaged shards are made anew: {', '.join(damaged)}")
        store.prepare()
        if not isinstance(problem.features, ConceptMap):
            fill_prompts(store, problem, projection, share=share, progress=work.progress)
        fill_examples(store, problem, projection, examples, share=share, progress=work.progress)

    def estimate(
        self, problem: Problem, examples: Examples, targets: TargetSet, work: Work, queries: Queries | None = None
    ) -> Scores:
        """Inner products of sketches; with ``rescore`` the exact values of the strongest in ``details["rescored"]``."""
        found = self._estimated(problem, examples, targets, work)
        if not self.rescore:
            return found
        again = self._rescored(problem, examples, targets, work, found)
        return replace(found, details={**found.details, "rescored": again})

    def _estimated(self, problem: Problem, examples: Examples, targets: TargetSet, work: Work) -> Scores:
        """Inner products of the examples' sketches with each target's.

        In the plain metric the queries of coefficients and prompts are sums of stored sketches; other
        targets, and every target in a curvature, have the gradient C^-1 grad F taken and projected. The
        error is measured on ``sample`` examples, for which the exact adjoint gives some targets as well.
        """
        plain = problem.metric.plain
        self.fill(problem, examples, work)
        store, projection = self.open(problem, work)
        rows, ids = [example_row(example) for example in examples], tuple(example.id for example in examples)
        stored = targets.combinable if plain and not isinstance(problem.features, ConceptMap) else ()
        digests = dict(prompt_key(prompt) for prompt in problem.prompts)
        parts: dict[Any, Floats] = {}
        dy = None
        if stored:
            made, moves = stored_queries(store, targets.select(stored), digests)
            parts |= dict(zip(stored, made.T, strict=True))
            dy = moves.dy
        rest = targets.select([name for name in targets.names if name not in parts])
        if rest.names:
            parts |= dict(zip(rest.names, _projected(problem, projection, rest, work).T, strict=True))
        q = np.stack([parts[name] for name in targets.names], 1)
        if problem.metric.sketched is not None:
            q, factors = problem.metric.sketched(store, rows, digests, q)
            if factors is not None:  # each target by its own query: such values do not add up, nor is their error known
                found = answer(store, rows, q.astype(np.float32))
                values = found.values * factors[:, None]
                return Scores("sketch", ids, targets.names, values, None, found.losses, True, {}, "rank")
        details: dict[str, Any] = {}
        direct = [targets.names.index(name) for name in targets.direct]  # totals are sums of their pathways
        every = q[:, direct]
        if dy is not None and len(rows) * dy.shape[1] <= LARGEST_DY and problem.metric.sketched is None:
            every = np.concatenate([every, dy], 1)
        work.progress.step("inner products of sketches", None)
        answers = answer(store, rows, every.astype(np.float32))
        answers.values[...] *= -problem.lr  # in place: the largest array there is
        if every.shape[1] > len(direct):
            details["dy"] = answers.values[:, len(direct) :]
        values = targets.from_direct(answers.values[:, : len(direct)])
        scale = theory_error(answers.norms, q, problem.lr)
        factor, sample = self._measured(problem, examples, targets, work, values, scale)
        details |= {"error_factor": factor, "sample": sample, "store": str(store.folder), "prompts": digests}
        details["rows"] = {row.id: row.digest for row in rows}
        return Scores("sketch", ids, targets.names, values, factor * scale, answers.losses, True, details)

    def kept_bytes(self, examples: int, prompts: int, features: int) -> float:
        """Size of the store; each active feature of a prompt has a sketch of its own."""
        return (examples + prompts * (1 + ACTIVE * features)) * (2 * self.size + 4)

    def cost(self, problem: Problem, examples: Examples, asked: Asked) -> Mapping[str, float]:
        """Filling a store that is empty yet, the exact sample, and the exact values of the strongest."""
        it = Passes(problem, examples)
        found = {"read-outs": it.trees + it.examples, "exact sample": (2 + 2 * 3) * it.trees}
        found |= sketches(problem, it, asked.features, examples)
        if not self.rescore:
            return found
        share = min(1.0, self.rescore * asked.queries / len(examples))
        return found | {"exact values of the strongest": 8 * it.trees + 4 * share * it.examples}

    def _measured(
        self, problem: Problem, examples: Examples, targets: TargetSet, work: Work, values: Floats, scale: Floats
    ) -> tuple[float, list[dict[str, Any]]]:
        """The factor of the error, and the sample that it was measured on.

        In a curvature of sketches nothing is exact to compare with: the plain metric's factor is taken.
        """
        if problem.metric.sketched is not None:
            return 1.0, []
        order = sorted(range(len(examples)), key=lambda i: (len(examples[i].ids), examples[i].id))
        places = np.linspace(0, len(order) - 1, min(self.sample, len(order))).round().astype(int)
        chosen = [order[place] for place in places]
        few = [name for name in targets.direct if not kind_of(name).many] or list(targets.direct[:4])
        work.progress.step("exact effects of a sample", None)
        some = Work(pieces=None if work.pieces is None else Prefixed(work.pieces, "sample"))
        exact = Adjoint().estimate(problem, [examples[i] for i in chosen], targets.select(few), some)
        columns = [targets.names.index(name) for name in few]
        found, theory = values[np.ix_(chosen, columns)], scale[np.ix_(chosen, columns)]
        factor = error_factor(found, exact.values, theory)
        sample = [
            {
                "example_id": examples[i].id,
                "target": str(name),
                "exact": float(exact.values[n, t]),
                "sketch": float(found[n, t]),
                "se": float(factor * theory[n, t]),
            }
            for n, i in enumerate(chosen)
            for t, name in enumerate(few)
        ]
        return factor, sample

    def _rescored(
        self, problem: Problem, examples: Examples, targets: TargetSet, work: Work, found: Scores
    ) -> list[dict[str, Any]]:
        """The strongest examples of each target that is not of many, with their exact change per step.

        In the problem's metric, where that divides whole gradients; else plain, so in another unit than the first
        value.
        """
        if problem.metric.sketched is not None:
            problem = problem.plain or problem
        few = [name for name in targets.names if not kind_of(name).many]
        top = {name: np.argsort(-np.abs(found[name]), kind="stable")[: self.rescore].tolist() for name in few}
        places = sorted({i for own in top.values() for i in own})
        if not places:
            return []
        work.progress.step("exact values of the strongest", None)
        some = Work(pieces=None if work.pieces is None else Prefixed(work.pieces, "rescored"))
        exact = Adjoint().estimate(problem, [examples[i] for i in places], targets.select(few), some)
        return [
            {
                "example_id": examples[i].id,
                "target": str(name),
                "first": float(found[name][i]),
                "exact": exact.by_example(name)[examples[i].id],
            }
            for name, own in top.items()
            for i in own
        ]


def _projected(problem: Problem, projection: Projection, targets: TargetSet, work: Work) -> Floats:
    """Sketches of C^-1 grad F of every target, float64 [K, T]."""
    work.progress.step("sketches of the targets", None)
    sites = find_sites(problem.model, problem.parameters)
    A, B = targets.cotangents()
    found = np.zeros((len(targets.direct), projection.dim))
    with frozen(problem.model):
        for some, part in query_parts(problem, sites, len(targets.direct)):
            queries = build_queries(problem, part, *some_of(some, A, B), work.progress)
            found[some] += projection.matrices(queries, some.stop - some.start).numpy()
            del queries  # before the next ones are built
    return targets.from_direct(found.T)
