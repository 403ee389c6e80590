"""What half precision costs: effects in bfloat16 (or float16) beside those in float32.

The policy, its targets and the features are those of float32 in every row, so that only the passes
through the model differ; sums of gradients stay in float32. benchmarks/README.md says what the rows
mean.
"""

from __future__ import annotations

import argparse
from dataclasses import replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.common import (
    Clock,
    Results,
    Row,
    Setting,
    conditions,
    console,
    kept,
    open_setting,
    result_name,
    run,
    scores_of,
)
from benchmarks.common import parser as common_parser
from taught.progress import RichProgress

Effects = dict[str, NDArray[np.float64]]


def measure(args: argparse.Namespace) -> None:
    """Compute all effects once a dtype, compare them with the first, write the result."""
    with RichProgress(console) as progress:
        setting = open_setting(args, progress)
        results = Results(result_name("precision", args), conditions(setting, args), args.out)
        exact: Effects | None = None
        with kept(results, _COLUMNS):
            for dtype in ("float32", *args.dtypes):
                with Clock() as clock:
                    effects = _effects(setting, dtype, progress)
                exact = effects if exact is None else exact
                results.add({"dtype": dtype, "seconds": clock.seconds, **_compare(effects, exact)})


def _effects(setting: Setting, dtype: str, progress: Any) -> Effects:
    """score [P], behavior [P, groups] and coefficients [P, d] by the adjoint."""
    import torch

    kind = getattr(torch, dtype)
    problem = setting.problem
    sae = problem.features.sae.to(torch.device("cpu"), kind)  # type: ignore[union-attr]
    problem.model.to(kind)  # float32 is the first: nothing is lost by going on from it
    half = replace(problem, features=replace(problem.features, sae=sae))  # type: ignore[arg-type]
    coefficients = [f"coefficient:{k}" for k in setting.policy.feature_ids]
    behaviors = [f"behavior:{group}" for group in setting.ready.readings.groups]
    targets = ["score", *behaviors, "coefficient:*", "prompt:*"]
    found = scores_of(replace(setting.ready, problem=half), targets, "adjoint", progress)
    return {
        "score": found["score"],
        "behavior": found.select(behaviors).values,
        "coefficients": found.select(coefficients).values,
    }


def _compare(found: Effects, exact: Effects) -> Row:
    from taught.stats.ranks import spearman

    def columns(name: str) -> list[float]:
        examples = zip(found[name].T, exact[name].T, strict=True)
        return [spearman(a, b) for a, b in examples]

    change = found["score"] - exact["score"]
    return {
        "spearman_score": spearman(found["score"], exact["score"]),
        "least_spearman_behavior": min(columns("behavior")),
        "median_spearman_coefficient": float(np.median(columns("coefficients"))),
        "least_spearman_coefficient": min(columns("coefficients")),
        "relative_error_score": float(np.linalg.norm(change) / np.linalg.norm(exact["score"])),
    }


_COLUMNS = {
    "dtype": lambda row: row["dtype"],
    "seconds": lambda row: f"{row['seconds']:.1f}",
    "Spearman S": lambda row: f"{row['spearman_score']:.4f}",
    "behavior, least": lambda row: f"{row['least_spearman_behavior']:.4f}",
    "coefficients, median": lambda row: f"{row['median_spearman_coefficient']:.4f}",
    "least": lambda row: f"{row['least_spearman_coefficient']:.4f}",
    "relative error of S": lambda row: f"{row['relative_error_score']:.2g}",
}


def main() -> None:
    """Parse the flags and measure."""
    flags = common_parser(__doc__ or "")
    flags.add_argument(
        "--dtypes",
        nargs="+",
        default=["bfloat16"],
        choices=["bfloat16", "float16"],
        help="beside float32; CPUs take long for float16",
    )
    run(measure, flags.parse_args())


if __name__ == "__main__":
    main()
