"""Every method on every regime of training, from the committed results, as a table in Markdown.

    python -m benchmarks.leaderboard [--target harmless|harmful|score]

A cell: the linear datamodelling score, the rank correlation of what a method foresees with what training on other
examples did; [95% over subsets]; behind the semicolon, the same given labels and response tokens.
"""

from __future__ import annotations

import argparse
import json

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
        ),
        0,
    ),
    "64, another order": (("through_training_64_orders",), 1),
    "run": (("through_training_run", "through_training_run_others"), 0),
    "run, LoRA": (("through_training_lora",), 0),
}
METHODS = {  # and what results call them
    "steps (MAGIC)": ("adjoint@steps", "magic"),
    "steps, Gauss-Newton": ("gauss-newton",),
    "steps, empirical Fisher (AdamW-influence)": ("empirical-fisher",),
    "steps, no Hessian": ("no-hessian",),
    "segments (SOURCE)": ("adjoint@segments",),
    "EK-FAC": ("adjoint+ekfac",),
    "ASTRA": ("astra",),
    "Adam's metric": ("adjoint+adam",),
    "sketch, TrackStar": ("sketch+trackstar",),
    "sketch, TRAK": ("sketch+trak",),
    "sketch": ("sketch",),
    "gradient (TracIn, one checkpoint)": ("adjoint",),
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
TARGETS = {
    "harmless": ("behavior:harmless", "mean_y:harmless"),
    "harmful": ("behavior:harmful", "mean_y:harmful"),
    "score": ("score",),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--target", choices=TARGETS, default="harmless")
    target = parser.parse_args().target
    columns = {regime: cells(files, order, TARGETS[target]) for regime, (files, order) in REGIMES.items()}
    print("| method | " + " | ".join(columns) + " |\n" + "|---" * (len(columns) + 1) + "|")
    for method, names in METHODS.items():
        row = [next((column[name] for name in names if name in column), "") for column in columns.values()]
        if any(row):
            print(f"| {method} | " + " | ".join(row) + " |")


def cells(files: tuple[str, ...], order: int, targets: tuple[str, ...]) -> dict[str, str]:
    """What a regime's results say of a target, by method."""
    found: dict[str, str] = {}
    for path in (RESULTS / f"{file}.json" for file in files):
        for row in json.loads(path.read_text())["rows"] if path.is_file() else ():
            if row["target"] in targets and row.get("subsets", "random") == "random" and row.get("order", 0) == order:
                value, lo, hi = (
                    row.get(key, row.get(old)) for key, old in (("LDS", "raw"), ("lo", "raw_lo"), ("hi", "raw_hi"))
                )
                bare = row["method"] in ("label", "response-length")  # what is controlled for
                given = "" if bare or row["controlled"] is None else f"; {number(row['controlled'])}"
                found.setdefault(row["method"], f"{number(value)} [{number(lo)}, {number(hi)}]{given}")
    return found


def number(value: float) -> str:
    """Two digits, without the zero before the point."""
    return f"{value:.2f}".replace("0.", ".", 1) if abs(value) < 1 else f"{value:.2f}"


if __name__ == "__main__":
    main()
