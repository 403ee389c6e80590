"""Does the adjoint give what the finite step gives? Score S of single examples, both pathways.

    python -m benchmarks.adjoint_vs_step [--top 20] [--small 5] [--float64 2]

The adjoint gives S of every example. Then, for the examples with the largest |S| and for some drawn from
the half with the smallest, one real SGD step each:

    step        S of a step at the learning rate lr
    half        twice S of a step at lr / 2
    richardson  2 half - step: the second order in lr cancels
    refit       S of the exact refit of the ridge in place of its linearisation, at lr

A step differs from the adjoint by its second order, a lr^2 + ..., which halving halves, and by the
rounding of read-outs in float32, which halving doubles. --float64 repeats the step of some small
examples in double precision throughout (transformers' norms compute in float32 even in a float64
model; that is undone here): what is left there is not rounding. Relative differences are over the
step's absolute value.
"""

from __future__ import annotations

import argparse
import dataclasses
import statistics
import sys
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file
    sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import common
from benchmarks.common import Clock, Results, Row, Setting
from taught.progress import RichProgress

TOLERANCE, RANKS = 0.05, 0.99  # what the top examples must keep


def main(argv: list[str] | None = None) -> None:
    parser = common.parser("Adjoint against finite step, example by example.")
    parser.add_argument("--top", type=int, default=20, help="examples with the largest |S|")
    parser.add_argument("--small", type=int, default=5, help="examples from the smaller half of |S|")
    parser.add_argument("--float64", type=int, default=2, help="small examples repeated in float64")
    parser.add_argument("--seed", type=int, default=0, help="which small examples are drawn")
    common.run(measure, parser.parse_args(argv))


def measure(args: argparse.Namespace) -> None:
    with RichProgress(common.console) as progress:
        setting = common.open_setting(args, progress)
        facts = common.conditions(setting, args) | {"seed": args.seed}
        results = Results(common.result_name("adjoint_vs_step", args), facts, args.out)
        with common.kept(results, COLUMNS):
            effects = _adjoint(setting, progress, results)
            top, small = choose(effects.sum(1), args.top, args.small, args.seed)
            progress.step("examples, two steps each", len(top) + len(small))
            for kind, chosen in (("top", top), ("small", small)):
                for example in chosen:
                    results.add(_row(setting, effects, example, kind))
                    results.summary = summarise(results.rows)
                    progress.advance(1)
            _in_float64(setting, [*small, *top][: args.float64], results, progress)


def _adjoint(setting: Setting, progress: RichProgress, results: Results) -> Any:
    """S of every example on pathway x and y, [P, 2]."""
    progress.step("adjoint", 2 + len(setting.examples))
    with Clock() as clock:
        scores = setting.scores(["score"], progress)
    results.conditions["seconds_adjoint"] = clock.seconds
    results.conditions["adjoint_of_all_examples"] = scores.by_example("score")
    return scores.select(["score:x", "score:y"]).values


def choose(scores: Any, top: int, small: int, seed: int) -> tuple[list[int], list[int]]:
    """Examples with the largest |S|, largest first, and some drawn from the half with the smallest."""
    import numpy as np

    order = np.argsort(-np.abs(scores), kind="stable")
    leading, rest = order[:top], order[max(top, len(order) // 2) :]
    drawn = np.random.default_rng(seed).permutation(rest)[:small]
    return [int(i) for i in leading], [int(i) for i in drawn]


def _row(setting: Setting, effects: Any, example: int, kind: str) -> Row:
    with Clock() as clock:
        full = step_scores(setting, example, 1.0)
        half = step_scores(setting, example, 0.5)
    adjoint = {"x": float(effects[example, 0]), "y": float(effects[example, 1])}
    adjoint["total"] = adjoint["x"] + adjoint["y"]
    return {
        "example_id": setting.examples[example].id,
        "label": setting.ready.examples.examples[example].label,
        "set": kind,
        **compare(adjoint, full, half),
        "seconds": clock.seconds,
    }


def compare(adjoint: Row, full: Row, half: Row) -> Row:
    """Put the numbers of one example side by side: S and its pathways, with relative differences."""
    row: Row = {}
    for path, suffix in (("total", ""), ("x", "_x"), ("y", "_y")):
        step, twice = full[path], 2 * half[path]
        row |= {
            f"adjoint{suffix}": adjoint[path],
            f"step{suffix}": step,
            f"half{suffix}": twice,
            f"richardson{suffix}": 2 * twice - step,
        }
    for name in ("step", "half", "richardson"):
        row[f"relative_{name}"] = relative(row["adjoint"], row[name])
    row |= {
        "refit": full["refit"],
        "refit_encoded_anew": full["refit_encoded_anew"],
        "relative_refit": relative(row["adjoint"], full["refit"]),
    }
    return row


def relative(value: float, reference: float) -> float:
    """|value - reference| / |reference|; nan for a reference of 0."""
    return abs(value - reference) / abs(reference) if reference else float("nan")


def step_scores(setting: Setting, example: int, share: float) -> Row:
    """S of one SGD step at ``share`` of the learning rate: linear by pathway, and refitted.

    ``refit`` holds the gates of the baseline in dX, ``refit_encoded_anew`` lets them switch.
    """
    from taught.estimators.finite_step import finite_steps
    from taught.policy.ridge import coefficient_shift, exact_shift, score

    policy, problem = setting.policy, setting.problem
    problem = dataclasses.replace(problem, lr=share * problem.lr)
    (step,) = finite_steps(problem, [setting.examples[example]], setting.baseline)
    dX, anew, dy = step.dX.numpy(), step.dX_exact.numpy(), step.dy.numpy()
    shift = coefficient_shift(policy, dX, dy)
    return {
        "x": float(score(policy, shift.x)),
        "y": float(score(policy, shift.y)),
        "total": float(score(policy, shift.total)),
        "refit": float(score(policy, exact_shift(policy, dX, dy))),
        "refit_encoded_anew": float(score(policy, exact_shift(policy, anew, dy))),
    }


def _in_float64(setting: Setting, examples: Sequence[int], results: Results, progress: RichProgress) -> None:
    """Repeat the steps in double precision; the policy stays, so only rounding changes."""
    from taught.model.readout import read_prompts

    if not examples:
        return
    import torch

    problem = setting.problem
    progress.step("float64: read-outs before, then two steps an example", 1 + len(examples))
    model = problem.model.double()
    features = dataclasses.replace(problem.features, sae=problem.features.sae.to(None, torch.float64))
    problem = dataclasses.replace(problem, model=model, features=features)
    with common.double_throughout():
        baseline = read_prompts(model, problem.prompts, problem.behavior, problem.point)
    double = dataclasses.replace(setting, ready=dataclasses.replace(setting.ready, problem=problem), baseline=baseline)
    progress.advance(1)
    by_id = {row["example_id"]: row for row in results.rows}
    for example in examples:
        row = by_id[setting.examples[example].id]
        with common.double_throughout():
            step, half = (step_scores(double, example, share)["total"] for share in (1.0, 0.5))
        row["step_float64"], row["richardson_float64"] = step, 4 * half - step
        row["relative_float64"] = relative(row["adjoint"], row["richardson_float64"])
        results.summary = summarise(results.rows)
        results.write(complete=False)
        progress.advance(1)


def summarise(rows: Sequence[Row]) -> Row:
    """Largest and median relative differences and rank correlations, over what was compared.

    ``passed``: the top examples are at most 5% apart with a Spearman correlation of at least .99.
    """
    top, small = ([row for row in rows if row["set"] == kind] for kind in ("top", "small"))
    out = {"top": _group(top), "small": _group(small), "all": {"n": len(rows), **_ranks(rows)}}
    double = [row for row in rows if "step_float64" in row]
    if double:
        noise = [abs(row["step"] - row["step_float64"]) for row in double]
        out["float64"] = {
            "n": len(double),
            "relative": _spread([row["relative_float64"] for row in double]),
            "float32_noise": _spread(noise),
        }
    if len(top) > 1:
        worst, ranks = out["top"]["relative_step"]["largest"], out["top"]["spearman"]
        out["passed"] = worst <= TOLERANCE and ranks >= RANKS
    return out


def _group(rows: Sequence[Row]) -> Row:
    names = ("relative_step", "relative_half", "relative_richardson") if rows else ()
    spreads = {name: _spread([row[name] for row in rows]) for name in names}
    return {"n": len(rows), **spreads, **_ranks(rows)}


def _ranks(rows: Sequence[Row]) -> Row:
    from taught.stats.ranks import spearman

    if len(rows) < 2:
        return {"spearman": None}
    return {"spearman": spearman([row["adjoint"] for row in rows], [row["step"] for row in rows])}


def _spread(values: Sequence[float]) -> Row:
    return {"largest": max(values), "median": statistics.median(values)}


def _number(key: str) -> Callable[[Row], str]:
    return lambda row: f"{row[key]:+.3e}" if key in row else "-"


def _percent(key: str) -> Callable[[Row], str]:
    return lambda row: f"{row[key]:.2%}" if key in row else "-"


COLUMNS: dict[str, Callable[[Row], str]] = {
    "example": lambda row: row["example_id"],
    "set": lambda row: row["set"],
    "adjoint": _number("adjoint"),
    "step": _number("step"),
    "half": _number("half"),
    "richardson": _number("richardson"),
    "refit": _number("refit"),
    "vs step": _percent("relative_step"),
    "vs half": _percent("relative_half"),
    "vs rich.": _percent("relative_richardson"),
    "vs float64": _percent("relative_float64"),
}


if __name__ == "__main__":
    main()
