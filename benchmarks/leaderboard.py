"""Every method on every regime of training, from the committed results, as a table in Markdown.

    python -m benchmarks.leaderboard [--target harmless|harmful|score|coefficients|concept] [--removed]

A cell: the linear datamodelling score, the rank correlation of what a method foresees with what training on other
examples did; [95% over subsets]; behind the semicolon, the same given labels and response tokens. Of the coefficients
it is the median, and the least to the largest. With ``--removed``: how far the harmless mean ends from where it ends
without as many random examples, when those are left out that a method says raise it most; [95%].
"""

from __future__ import annotations

import argparse
import json
from collections.abc import Iterator, Mapping, Sequence
from statistics import median
from typing import Any

from benchmarks.common import RESULTS

REGIMES = {  # results, and the order of the examples in the run that is foreseen; methods are asked about order 0
    "gentle": (("lds_gentle",), 0),
    "short": (("lds_short",), 0),
    "64 examples": (
        (
            "through_training_64_steps",
            "through_training_64_others",
            "through_training_64_gauss_newton",
            "through_training_64_sketches",
            "through_training_64_peers",
            "through_training_64_orders",
            "through_training_64_coefficients",
            "through_training_64_concept",
        ),
        0,
    ),
    "64, another order": (("through_training_64_orders",), 1),
    "run": (
        (
            "through_training_run",
            "through_training_run_others",
            "through_training_run_coefficients",
            "through_training_run_orders",
        ),
        0,
    ),
    "run, another order": (("through_training_run_orders",), 1),
    "run, LoRA": (("through_training_lora",), 0),
}
METHODS = {  # and what results call them
    "steps (MAGIC)": ("adjoint@steps", "magic"),
    "steps, Gauss-Newton": ("gauss-newton",),
    "steps, empirical Fisher (AdamW-influence)": ("empirical-fisher",),
    "steps, no Hessian": ("no-hessian",),
    "segments (SOURCE)": ("adjoint@segments",),
    "EK-FAC": ("adjoint+ekfac",),
    "EK-FAC, trained model": ("adjoint+ekfac@end",),
    "ASTRA": ("astra",),
    "Adam's metric": ("adjoint+adam",),
    "sketch, TrackStar": ("sketch+trackstar",),
    "sketch, TRAK": ("sketch+trak",),
    "sketch": ("sketch",),
    "gradient (TracIn, one checkpoint)": ("adjoint",),
    "gradient, trained model": ("adjoint@end",),
    "gradient, cosine": ("gradient-cosine",),
    "Bergson, EK-FAC": ("bergson:ekfac",),
    "Bergson, TrackStar": ("bergson:trackstar",),
    "Bergson, gradient": ("bergson:gradient",),
    "dattri-llm, AdamW-influence": ("dattri-llm:adamw",),
    "dattri-llm, EK-FAC": ("dattri-llm:ekfac",),
    "dattri-llm, gradient": ("dattri-llm:tracin",),
    "Concept Influence": ("difference:gradient",),
    "Vector Filter": ("difference:vector-filter",),
    "Projection Difference": ("difference:projection-difference-response",),
    "similarity of hidden states": ("similarity",),
    "labels: refusals": ("label",),
    "BM25": ("bm25",),
    "loss": ("loss",),
    "response tokens": ("response-length",),
    "norm of the gradient": ("gradient-norm",),
    "random numbers": ("random",),
    "what the same sets did in the other order": ("order 0", "order 1"),
}
TARGETS = {  # how a target's name begins
    "harmless": ("behavior:harmless", "mean_y:harmless"),
    "harmful": ("behavior:harmful", "mean_y:harmful"),
    "score": ("score",),
    "coefficients": ("coefficient:",),
    "concept": ("concept:",),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", choices=TARGETS, default="harmless")
    parser.add_argument("--removed", action="store_true")
    args = parser.parse_args()
    columns = {
        regime: removed(files, order) if args.removed else cells(files, order, TARGETS[args.target])
        for regime, (files, order) in REGIMES.items()
    }
    columns = {regime: column for regime, column in columns.items() if column}
    print("| method | " + " | ".join(columns) + " |\n" + "|---" * (len(columns) + 1) + "|")
    for method, names in METHODS.items():
        row = [next((column[name] for name in names if name in column), "") for column in columns.values()]
        if any(row):
            print(f"| {method} | " + " | ".join(row) + " |")


def cells(files: tuple[str, ...], order: int, targets: tuple[str, ...]) -> dict[str, str]:
    """What a regime's results say of a target, by method."""
    found: dict[str, dict[str, dict[str, Any]]] = {}
    for row in rows_of(files, "rows", order):
        if row["target"].startswith(targets) and row.get("subsets", "random") == "random":
            found.setdefault(row["method"], {}).setdefault(row["target"], row)
    return {method: cell(method, list(of.values())) for method, of in found.items()}


def cell(method: str, rows: Sequence[Mapping[str, Any]]) -> str:
    """Of one target with its interval, of several the median."""
    values = [row.get("LDS", row.get("raw")) for row in rows]
    given = [row["controlled"] for row in rows]
    bare = method in ("label", "response-length")  # what is controlled for
    behind = "" if bare or None in given else f"; {number(median(given))}"
    if len(rows) > 1:
        return f"{number(median(values))}, {number(min(values))} to {number(max(values))}{behind}"
    lo, hi = (rows[0].get(key, rows[0].get(f"raw_{key}")) for key in ("lo", "hi"))
    return f"{number(values[0])} [{number(lo)}, {number(hi)}]{behind}"


def removed(files: tuple[str, ...], order: int) -> dict[str, str]:
    """What leaving out the examples that a method names did, less what random ones did, by method."""
    found: dict[str, str] = {}
    for row in rows_of(files, "removed", order):
        found.setdefault(row["method"], f"{row['difference']:+.2f} [{row['lo']:+.2f}, {row['hi']:+.2f}]")
    return found


def rows_of(files: tuple[str, ...], part: str, order: int) -> Iterator[dict[str, Any]]:
    """Rows of some results, of one order of the examples."""
    for path in (RESULTS / f"{file}.json" for file in files):
        for row in json.loads(path.read_text()).get(part, ()) if path.is_file() else ():
            if row.get("order", 0) == order:
                yield row


def number(value: float) -> str:
    """Two digits, without the zero before the point."""
    return f"{value:.2f}".replace("0.", ".", 1) if abs(value) < 1 else f"{value:.2f}"


if __name__ == "__main__":
    main()
