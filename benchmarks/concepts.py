"""What an example costs by each concept method: gradients by estimator and curvature, forward passes.

One concept, the difference of the groups' means at the SAE's block. One-time work (the concept's
query gradient over the prompts, eigendecompositions, the model's own answers) stands in a column of
its own. Bergson's scoring of the same concept is a row where its interpreter is given.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from benchmarks.common import Clock, Results, Setting, conditions, console, kept, open_setting, result_name, run
from benchmarks.common import parser as common_parser
from benchmarks.peers import HERE, environment
from taught.progress import RichProgress

OWN_TOKENS = 32

Times = tuple[float, float]  # seconds, and of all threads together


def measure(args: argparse.Namespace) -> None:
    """Time every method on the same examples, write the result."""
    with RichProgress(console) as progress:
        setting = open_setting(args, progress)
        problem, features, direction = _problem(setting)
        facts = {**conditions(setting, args), "own_tokens": OWN_TOKENS, "rounds": args.rounds}
        results = Results(result_name("concepts", args), facts, args.out)
        examples, few = setting.examples, setting.examples[: args.few]
        with kept(results, _COLUMNS):
            every, once = _gradient(problem, examples, args.rounds)
            results.add(_row("gradient, adjoint", every, len(examples), once))
            results.add(_ekfac(problem, examples, args.rounds))
            for name in ("forward", "finite-step"):
                results.add(_row(f"gradient, {name}", _one_by_one(problem, few, name), len(few)))
            for name, every, once in _projections(setting, features, args.rounds):
                results.add(_row(name, every, len(examples), once))
            if args.bergson:
                results.add(_bergson(args, problem, examples, direction))
            results.summary = summarised(results.rows)


def summarised(rows: Sequence[dict[str, Any]]) -> dict[str, float]:
    """CPU time an example of each gradient method over that of the cheaper ones."""
    return {
        f"{base['method']} over {row['method']}": base["cpu_ms_a_example"] / row["cpu_ms_a_example"]
        for base in rows
        for row in rows
        if base["method"].startswith(("gradient", "Bergson")) and base["cpu_ms_a_example"] > row["cpu_ms_a_example"]
    }


def _row(method: str, every: list[Times], examples: int, once: float | None = None) -> dict[str, Any]:
    """One method; the medians of its rounds count."""
    seconds, cpu = (statistics.median(values) for values in zip(*every, strict=True))
    return {
        "method": method,
        "examples": examples,
        "seconds": seconds,
        "cpu_seconds": cpu,
        "ms_a_example": 1000 * seconds / examples,
        "cpu_ms_a_example": 1000 * cpu / examples,
        "seconds_and_cpu_seconds_of_all_runs": every,
        "seconds_once": once,
    }


def _timed(go: Callable[[], Any], rounds: int) -> list[Times]:
    every = []
    for _ in range(rounds):
        begun = time.process_time()
        with Clock() as clock:
            go()
        every.append((clock.seconds, time.process_time() - begun))
    return every


def _problem(setting: Setting) -> tuple[Any, Any, np.ndarray]:
    """The problem of one concept on the setting's prompts, its read-out of examples, its direction."""
    from taught.features.concept import Concept, concept_map
    from taught.features.pooling import pool

    study, problem = setting.study, setting.problem
    how = study.readout.position
    H = pool(setting.baseline.h, setting.baseline.offsets, how).double().numpy()
    positive = setting.inside(study.prompts.sides[0])
    v = H[positive].mean(0) - H[~positive].mean(0)
    v /= np.linalg.norm(v)
    concept = Concept("difference", v, problem.point, how, "mean_response", {}, {}, {})
    like = next(problem.model.parameters())
    of_prompts = concept_map([concept], how, like)
    return replace(problem, features=of_prompts), concept_map([concept], concept.tokens, like), v


def _gradient(problem: Any, examples: list[Any], rounds: int) -> tuple[list[Times], float]:
    """By the adjoint: seconds of the examples in each round, of the query gradient."""
    import torch

    from taught.core.query import build_queries
    from taught.estimators.adjoint import contract_examples
    from taught.model.gradients import find_sites, frozen

    n = len(problem.prompts)
    A = torch.full((1, n, 1), 1 / n, dtype=torch.float64)
    sites = find_sites(problem.model, problem.parameters)
    with frozen(problem.model):
        with Clock() as once:
            queries = build_queries(problem, sites, A, None, None)
        every = _timed(lambda: contract_examples(problem, sites, examples, queries, 1, None), rounds)
    return every, once.seconds


def _ekfac(problem: Any, examples: list[Any], rounds: int) -> dict[str, Any]:
    """By the adjoint with EK-FAC fitted to the examples, the published method (arXiv 2602.14869).

    A fit passes over the examples several times and then decomposes matrices whose number and size do
    not depend on them: fits to half of the examples and to all tell the two apart, token by token.
    """
    from taught.core.driver import fitted
    from taught.core.estimator import Work
    from taught.curvatures.ekfac import Ekfac

    fits = []
    for some in (examples[::2], examples):
        curved: Any = None  # that of the half is let go of
        begun = time.process_time()
        with Clock() as clock:
            curved = fitted(problem, some, Ekfac(damping=0.1), Work())
        cpu = time.process_time() - begun
        fits.append(np.array([clock.seconds, cpu, sum(len(example.ids) for example in some)]))
    *grown, tokens = fits[1] - fits[0]
    passes = np.array(grown) / tokens * fits[1][2]
    every, once = _gradient(curved, examples, rounds)
    total = [(wall + passes[0], cpu + passes[1]) for wall, cpu in every]
    row = _row("gradient, adjoint, EK-FAC", total, len(examples), once + fits[1][0] - passes[0])
    return {
        **row,
        "cpu_ms_a_example_of_fitting": 1000 * passes[1] / len(examples),
        "fits_seconds_cpu_tokens": [fit.tolist() for fit in fits],
    }


def _one_by_one(problem: Any, examples: list[Any], estimator: str) -> list[Times]:
    return _timed(lambda: _effects(problem, examples, estimator), 1)


def _effects(problem: Any, examples: list[Any], method: str = "adjoint") -> np.ndarray:
    """Effect of each example on the concept, whose cotangents need the number of prompts alone."""
    from taught.core import driver
    from taught.core.driver import Method
    from taught.core.estimator import Work
    from taught.core.readings import Readings
    from taught.core.target import TargetSet

    ids, n = tuple(prompt.id for prompt in problem.prompts), len(problem.prompts)
    readings = Readings(ids, np.zeros(n), X=np.zeros((n, 1)), columns=("difference",))
    targets = TargetSet.of(["concept:difference"], readings)
    return driver.scores(problem, examples, targets, Method().named(method), Work()).values[:, 0]


def _projections(setting: Setting, features: Any, rounds: int) -> list[tuple[str, list[Times], float | None]]:
    """Each forward-only method: seconds of every round, and of what is done once."""
    from taught.baselines.activations import project
    from taught.core.example import sft
    from taught.model.generate import greedy

    model, point, examples = setting.problem.model, setting.problem.point, setting.examples
    end = setting.examples[0].ids[-1]
    with Clock() as answering:
        answers = greedy(model, [example.ids[: example.start] for example in examples], {end}, OWN_TOKENS)
    own = [sft(p.id, (*p.ids[: p.start], *a), p.start) for p, a in zip(examples, answers, strict=True)]

    def passes(*sets: list[Any]) -> Callable[[], None]:
        def go() -> None:
            for some in sets:
                project(model, some, features, point)

        return go

    ways = [
        ("vector filter", passes(examples), None),
        # As the command does: an example and the own response share the tokens of their prompt.
        ("projection difference, own response", passes([*examples, *own]), answering.seconds),
        # The tuned model is one of the same size: here the same one.
        ("projection difference, training", passes(examples, examples), None),
    ]
    return [(name, _timed(go, rounds), once) for name, go, once in ways]


def _bergson(args: argparse.Namespace, problem: Any, examples: list[Any], direction: Any) -> dict[str, Any]:
    """Bergson's row: the same concept, prompts and examples, in a process of its own."""
    import torch

    from taught.curvatures.ekfac import curved_layers
    from taught.stats.ranks import spearman

    threads = torch.get_num_threads()
    job = {
        "model": os.path.abspath(problem.model.name_or_path),
        "threads": threads,
        "tokens": problem.batch_tokens,
        "rounds": args.rounds,
        "block": problem.point.block,
        "direction": direction.tolist(),
        "prompts": [{"ids": list(p.ids), "read": list(p.read)} for p in problem.prompts],
        "examples": [{"ids": list(p.ids), "start": p.start} for p in examples],
    }
    python = os.path.abspath(args.bergson)
    with tempfile.TemporaryDirectory() as folder:
        path = write_job(Path(folder), job)
        done = subprocess.run(
            [python, str(HERE / "peer_bergson_score.py"), str(path)],
            cwd=folder,
            env=environment(threads, python),
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode:
            raise SystemExit(done.stderr[-3000:])
        report = json.loads((Path(folder) / "report.json").read_text())
        scores = np.load(Path(folder) / "scores.npy")
    row = _row("Bergson, score", report["times"], len(examples), report["seconds_once"])
    # Its scores are products of gradients of losses: larger means that training lowers F.
    layers = curved_layers(problem.model)  # what Bergson covers
    same = _effects(replace(problem, parameters=layers), examples)
    found = -problem.lr * scores
    return {
        **report,
        **row,
        "spearman_with_adjoint": spearman(found, _effects(problem, examples)),
        "spearman_with_adjoint_of_its_layers": spearman(found, same),
        "relative_difference_of_its_layers": float(np.linalg.norm(found - same) / np.linalg.norm(same)),
    }


def write_job(folder: Path, job: dict[str, Any]) -> Path:
    """Write what the worker is to do.

    model (folder), direction [D], block, prompts (ids, read: where h is read, its mean counts),
    examples (ids, start: ``ids[start:]`` is the response), tokens (padded, a batch), rounds, threads,
    out (the job's folder).
    """
    path = folder / "job.json"
    path.write_text(json.dumps({**job, "out": str(folder)}))
    return path


_COLUMNS = {
    "method": lambda row: row["method"],
    "examples": lambda row: f"{row['examples']:,}",
    "ms an example": lambda row: f"{row['ms_a_example']:.1f}",
    "CPU ms an example": lambda row: f"{row['cpu_ms_a_example']:.1f}",
    "once, s": lambda row: "" if row["seconds_once"] is None else f"{row['seconds_once']:.1f}",
}


def main() -> None:
    """Parse the flags and measure."""
    flags = common_parser(__doc__ or "")
    flags.add_argument("--few", type=int, default=3, help="examples for forward and finite-step")
    flags.add_argument("--rounds", type=int, default=3, help="runs of the others; the median counts")
    flags.add_argument("--bergson", metavar="PYTHON", help="interpreter of Bergson's environment")
    run(measure, flags.parse_args())


if __name__ == "__main__":
    main()
