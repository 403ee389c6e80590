"""Time of the published loop against the adjoint, on the same machine in the same run.

    python -m benchmarks.smda_loop [--prompts N] [--examples P] [--loop-examples 3] [--coefficients]

Four ways to the effect of every example on the policy:

 - the published loop (arXiv 2606.29171): for each example one SGD step, then over all prompts one pass
   for h and one per prefix, plain padded batches, float32;
 - our finite step: the same, with one pass over token trees in place of the 1 + prefixes passes;
 - the adjoint of the score (both pathways) and of the mean behavior of both groups, all examples;
 - with --coefficients the adjoint of every coefficient on both pathways and of every prompt's y:
   all that the loop gives, all examples.

The first two are timed on a few examples, evenly spaced in length, and extrapolated linearly to all
(each example costs the same passes over the prompts); the table says so. The adjoint is never
extrapolated. Every way includes its own read-outs before the step. Not included anywhere:
loading, tokenising, and the choice of the features, which all ways share.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file
    sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import common
from benchmarks.common import Clock, Results, Row, Setting
from taught.progress import RichProgress

LOOP, TREES = "published loop", "finite step, token trees"
SCORE, FULL = "adjoint: score, group means", "adjoint: every coefficient and prompt"


def main(argv: list[str] | None = None) -> None:
    parser = common.parser("Time of the published loop against the adjoint.")
    parser.add_argument("--loop-examples", type=int, default=3, help="examples the loop is timed on")
    parser.add_argument("--tree-examples", type=int, default=1, help="examples our finite step is timed on")
    parser.add_argument("--batch-size", type=int, default=16, help="prompts per batch of the loop")
    parser.add_argument("--coefficients", action="store_true", help="also time every coefficient on both pathways")
    common.run(measure, parser.parse_args(argv))


def measure(args: argparse.Namespace) -> None:
    with RichProgress(common.console) as progress:
        setting = common.open_setting(args, progress)
        facts = common.conditions(setting, args) | {
            "passes_per_example_of_the_loop": 1 + len(setting.problem.prompts[0].suffixes),
            "batch_size_of_the_loop": args.batch_size,
        }
        results = Results(common.result_name("smda_loop", args), facts, args.out)
        with common.kept(results, COLUMNS):
            scores = _time_score(setting, results, progress)
            for example, step in _steps(setting, args.tree_examples, TREES, results, progress):
                _compare(results, setting, example, step, scores)
            read = _plain_reader(args.batch_size, progress)
            for example, step in _steps(setting, args.loop_examples, LOOP, results, progress, read):
                _compare(results, setting, example, step, scores)
            if args.coefficients:
                _time_coefficients(setting, results, progress, scores)


# --- the adjoint ----------------------------------------------------------------------------------


def _time_score(setting: Setting, results: Results, progress: RichProgress) -> Any:
    """S of every example, [P], by the adjoint of the score and of the behavior on both groups."""
    progress.step(SCORE, 4 + len(setting.examples))
    with Clock() as clock:
        scores = setting.scores(["score", "behavior:*"], progress)
    _add_adjoint(results, SCORE, setting, clock.seconds)
    return scores["score"]


def _time_coefficients(setting: Setting, results: Results, progress: RichProgress, scores: Any) -> None:
    """Every coefficient on both pathways and dy of every prompt, for all examples."""
    import numpy as np

    with Clock() as clock:
        found = setting.scores(["score", "coefficient:*", "behavior:*", "prompt:*"], progress)
    _add_adjoint(results, FULL, setting, clock.seconds)
    largest = float(np.abs(scores).max())
    apart = float(np.abs(found["score"] - scores).max()) / largest if largest else 0.0
    results.summary["routes_apart"] = apart  # in S, over the largest |S|


def _add_adjoint(results: Results, method: str, setting: Setting, seconds: float) -> None:
    count = len(setting.examples)
    results.add(
        {
            "method": method,
            "examples_timed": count,
            "seconds_before": setting.seconds_baseline,
            "seconds_timed": seconds,
            "seconds_per_example": seconds / count,
            "seconds_all_examples": setting.seconds_baseline + seconds,
            "extrapolated": False,
        }
    )
    _ratios(results)


# --- the loop -------------------------------------------------------------------------------------


def _plain_reader(batch_size: int, progress: RichProgress) -> Callable[..., Any]:
    from taught.model.readout import read_prompts_plain

    return partial(read_prompts_plain, batch_size=batch_size, progress=progress)


def _steps(
    setting: Setting,
    count: int,
    method: str,
    results: Results,
    progress: RichProgress,
    read: Callable[..., Any] | None = None,
) -> Iterator[tuple[int, Any]]:
    """Time ``count`` examples; after each one the row of this method is brought up to date.

    ``read`` None: token trees, for which the read-outs before the step are known already.
    """
    from taught.estimators.finite_step import finite_steps
    from taught.model.readout import read_prompts

    problem, chosen = setting.problem, spaced(setting, count)
    if not chosen:
        return
    if read is None:
        read, baseline, before = read_prompts, setting.baseline, setting.seconds_baseline
    else:
        progress.step(f"{method}: read-outs before", len(problem.prompts))
        with Clock() as clock:
            baseline = read(problem.model, problem.prompts, problem.behavior, problem.point)
        before = clock.seconds
    seconds: list[float] = []
    for example in chosen:
        progress.step(f"{method}: example {len(seconds) + 1} of {len(chosen)}", len(problem.prompts))
        with Clock() as clock:
            (step,) = finite_steps(problem, [setting.examples[example]], baseline, read=read)
        seconds.append(clock.seconds)
        _update(results, _loop_row(setting, method, before, seconds))
        yield example, step


def _loop_row(setting: Setting, method: str, before: float, seconds: list[float]) -> Row:
    mean = sum(seconds) / len(seconds)
    return {
        "method": method,
        "examples_timed": len(seconds),
        "seconds_before": before,
        "seconds_timed": sum(seconds),
        "seconds_per_example": mean,
        "seconds_each_example": list(seconds),
        "seconds_all_examples": before + mean * len(setting.examples),
        "extrapolated": len(seconds) < len(setting.examples),
    }


def _update(results: Results, row: Row) -> None:
    """Add the row of a method, or put it in the place of the one with fewer examples."""
    before = [old for old in results.rows if old["method"] == row["method"]]
    results.rows = [old for old in results.rows if old["method"] != row["method"]]
    results.add(row | {"checked": before[0]["checked"] if before else []})
    _ratios(results)


def spaced(setting: Setting, count: int) -> list[int]:
    """Examples evenly spaced in length, from short to long: the middle one for a count of 1."""
    order = sorted(range(len(setting.examples)), key=lambda i: len(setting.examples[i].ids))
    count = min(count, len(order))
    return [order[int((k + 0.5) * len(order) / count)] for k in range(count)]


def _compare(results: Results, setting: Setting, example: int, step: Any, scores: Any) -> None:
    """Put S by the step beside S by the adjoint: the timed work is the real work."""
    from taught.policy.ridge import coefficient_shift, score

    shift = coefficient_shift(setting.policy, step.dX.numpy(), step.dy.numpy())
    results.rows[-1]["checked"].append(
        {
            "example_id": setting.examples[example].id,
            "S": float(score(setting.policy, shift.total)),
            "S_adjoint": float(scores[example]),
        }
    )


def _ratios(results: Results) -> None:
    """How many times as long as each way the published loop takes, for all examples."""
    total = {row["method"]: row["seconds_all_examples"] for row in results.rows}
    if LOOP not in total:
        return
    for row in results.rows:
        row["times_faster_than_loop"] = total[LOOP] / row["seconds_all_examples"]
    results.summary["times_faster_than_loop"] = {
        method: round(total[LOOP] / seconds, 1) for method, seconds in total.items() if method != LOOP
    }


def _duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.2f} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 6000 else f"{seconds / 3600:.1f} h"


def _all(row: Row) -> str:
    mark = " (extrapolated)" if row["extrapolated"] else " (measured)"
    return _duration(row["seconds_all_examples"]) + mark


def _ratio(row: Row) -> str:
    value = row.get("times_faster_than_loop")
    return "-" if value is None else f"{value:.1f}x"


COLUMNS: dict[str, Callable[[Row], str]] = {
    "method": lambda row: row["method"],
    "examples timed": lambda row: str(row["examples_timed"]),
    "read-outs before": lambda row: _duration(row["seconds_before"]),
    "per example": lambda row: _duration(row["seconds_per_example"]),
    "all examples": _all,
    "loop takes": _ratio,
}


if __name__ == "__main__":
    main()
