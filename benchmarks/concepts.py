"""What a pair costs by each concept method: the gradient by three estimators, and forward passes.

One concept, the difference of the groups' means at the SAE's block. One-time work (the concept's
query gradient over the prompts, the model's own answers) stands in a column of its own.
"""

from __future__ import annotations

import argparse
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import numpy as np

from benchmarks.common import (
    Clock,
    Results,
    Setting,
    conditions,
    console,
    kept,
    open_setting,
    result_name,
    run,
)
from benchmarks.common import parser as common_parser
from taught.progress import RichProgress

OWN_TOKENS = 32


def measure(args: argparse.Namespace) -> None:
    """Time every method on the same pairs, write the result."""
    with RichProgress(console) as progress:
        setting = open_setting(args, progress)
        problem, features = _problem(setting)
        facts = {**conditions(setting, args), "own_tokens": OWN_TOKENS}
        results = Results(result_name("concepts", args), facts, args.out)
        few = setting.pairs[: args.few]
        with kept(results, _COLUMNS):
            gradient, once = _gradient(problem, setting.pairs)
            results.add(_row("gradient, adjoint", gradient, len(setting.pairs), once))
            for name in ("jvp", "finite-step"):
                seconds = _one_by_one(problem, few, name)
                results.add(_row(f"gradient, {name}", seconds, len(few), None))
            forward, once = _projections(setting, features)
            for name, seconds in forward.items():
                results.add(_row(name, seconds, len(setting.pairs), once.get(name)))
            base = results.rows[0]["ms_a_pair"]
            results.summary = {
                f"gradient over {row['method']}": base / row["ms_a_pair"]
                for row in results.rows if not row["method"].startswith("gradient")
            }  # fmt: skip


def _row(method: str, seconds: float, pairs: int, once: float | None) -> dict[str, Any]:
    return {"method": method, "pairs": pairs, "seconds": seconds,
            "ms_a_pair": 1000 * seconds / pairs, "seconds_once": once}  # fmt: skip


def _problem(setting: Setting) -> tuple[Any, Any]:
    """The problem of one concept on the setting's prompts, and the concept's read-out of pairs."""
    from taught.features.concept import Concept, concept_map
    from taught.features.pooling import pool

    study, problem = setting.study, setting.problem
    how = study.readout.position
    H = pool(setting.baseline.h, setting.baseline.offsets, how).double().numpy()
    positive = np.array([group == study.prompts.positive_group for group in setting.groups])
    v = H[positive].mean(0) - H[~positive].mean(0)
    concept = Concept("difference", v / np.linalg.norm(v), problem.block, how, "mean_response",
                      {}, {}, {})  # fmt: skip
    like = next(problem.model.parameters())
    of_prompts = concept_map([concept], how, like)
    return replace(problem, features=of_prompts), concept_map([concept], concept.tokens, like)


def _gradient(problem: Any, pairs: list[Any]) -> tuple[float, float]:
    """Seconds of the pairs, and of the query gradient, by the adjoint."""
    import torch

    from taught.attribution.adjoint import _contract_pairs, build_queries
    from taught.model.gradients import find_sites, frozen

    n = len(problem.prompts)
    A = torch.full((1, n, 1), 1 / n, dtype=torch.float64)
    sites = find_sites(problem.model)
    with frozen(problem.model):
        with Clock() as once:
            queries = build_queries(problem, sites, A, None, None)
        with Clock() as clock:
            _contract_pairs(problem, sites, pairs, queries, 1, None)
    return clock.seconds, once.seconds


def _one_by_one(problem: Any, pairs: list[Any], estimator: str) -> float:
    from taught.attribution.concepts import concept_effects
    from taught.target import concept_targets

    ids = [prompt.id for prompt in problem.prompts]
    targets = concept_targets(ids, ["difference"], np.ones(len(ids), dtype=bool))
    with Clock() as clock:
        concept_effects(problem, pairs, targets, estimator)
    return clock.seconds


def _projections(setting: Setting, features: Any) -> tuple[dict[str, float], dict[str, float]]:
    """Seconds of the forward-only methods, and of what they do once."""
    from taught.attribution.projections import project
    from taught.model.generate import greedy

    model, block, pairs = setting.problem.model, setting.problem.block, setting.pairs
    tokens = setting.study.attribution.batch_tokens

    def passes(*sets: list[Any]) -> Callable[[], None]:
        def go() -> None:
            for some in sets:
                project(model, some, features, block, batch_tokens=tokens)

        return go

    end = setting.pairs[0].ids[-1]
    with Clock() as answering:
        answers = greedy(model, [pair.ids[: pair.start] for pair in pairs], {end}, OWN_TOKENS)
    own = [replace(p, ids=(*p.ids[: p.start], *a)) for p, a in zip(pairs, answers, strict=True)]
    ways = {
        "vector filter": passes(pairs),
        "projection difference, own response": passes(pairs, own),
        "projection difference, training": passes(pairs, pairs),
    }
    seconds = {}
    for name, go in ways.items():
        with Clock() as clock:
            go()
        seconds[name] = clock.seconds
    return seconds, {"projection difference, own response": answering.seconds}


_COLUMNS = {
    "method": lambda row: row["method"],
    "pairs": lambda row: f"{row['pairs']:,}",
    "ms a pair": lambda row: f"{row['ms_a_pair']:.1f}",
    "once, s": lambda row: "" if row["seconds_once"] is None else f"{row['seconds_once']:.1f}",
}


def main() -> None:
    """Parse the flags and measure."""
    flags = common_parser(__doc__ or "")
    flags.add_argument("--few", type=int, default=3, help="pairs for jvp and finite-step")
    run(measure, flags.parse_args())


if __name__ == "__main__":
    main()
