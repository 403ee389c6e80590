"""How far effects from sketches are from the exact ones, for several sizes of a sketch.

One store of the largest size is filled; smaller sketches are its rows folded once more, which is
what a projection to fewer numbers does. The exact effects are the adjoint's, computed here or read
from a run folder of the same study (``--exact``). benchmarks/README.md says what the rows mean.
"""

from __future__ import annotations

import argparse
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.common import Clock, Results, Row, Setting, conditions, console, kept, open_setting, result_name, run
from benchmarks.common import parser as common_parser
from taught.errors import refuse
from taught.progress import RichProgress

SIZES = (2048, 4096, 8192, 16384, 32768)
Floats = NDArray[np.float64]


def measure(args: argparse.Namespace) -> None:
    """Fill a store, compare each size with the exact effects, write the result."""
    from taught.sketches.fill import fill_examples, fill_prompts
    from taught.sketches.project import COLUMNS, Projection
    from taught.sketches.store import SketchStore

    with RichProgress(console) as progress, tempfile.TemporaryDirectory() as temporary:
        setting = open_setting(args, progress)
        exact, seconds_exact = _exact(setting, args.exact, progress)
        projection = Projection(setting.problem.model, max(args.sizes), args.seed)
        store = SketchStore(args.store or temporary, projection.record())
        store.prepare()
        with Clock() as for_prompts:
            fill_prompts(store, setting.problem, projection, progress=progress)
        with Clock() as for_examples:
            fill_examples(store, setting.problem, projection, setting.examples, progress=progress)
        tokens = sum(len(example.ids) for example in setting.examples)
        results = Results(
            result_name("sketch_error", args),
            {
                **conditions(setting, args),
                "columns": COLUMNS,
                "seed": args.seed,
                "exact_from": str(args.exact or "computed here"),
            },
            args.out,
        )
        results.summary = {
            "seconds_exact": seconds_exact,
            "seconds_prompts": for_prompts.seconds,
            "seconds_examples": for_examples.seconds,
            "example_tokens_per_second": tokens / max(for_examples.seconds, 1e-9),
        }
        with kept(results, _COLUMNS):
            for size in sorted(args.sizes):
                results.add(_compare(setting, exact, _Folded(store, size), size))


class _Folded:
    """A store whose sketches have fewer numbers."""

    def __init__(self, store: Any, dim: int) -> None:
        self.store, self.dim = store, dim

    def shards(self, kind: str) -> Any:
        return self.store.shards(kind)

    def values(self, shard: Any) -> NDArray[np.float32]:
        from taught.sketches.project import COLUMNS

        full = self.store.values(shard)
        rows = full.reshape(len(full), -1, self.dim // COLUMNS, COLUMNS)
        return rows.sum(1).reshape(len(full), -1)

    def read(self, kind: str) -> Iterator[Any]:
        for shard in self.shards(kind):
            yield shard, self.values(shard)


Effects = dict[str, Floats]


def _exact(setting: Setting, folder: Path | None, progress: Any) -> tuple[Effects, float | None]:
    """Every coefficient along x and y, [P, d], by the adjoint, and how long it took."""
    if folder is not None:
        return _from_run(setting, folder), None
    with Clock() as clock:
        scores = setting.scores(["coefficient:*", "prompt:*"], progress)
    return {path: scores.select(_names(setting, path)).values for path in ("x", "y")}, clock.seconds


def _names(setting: Setting, path: str) -> list[str]:
    return [f"coefficient:{k}:{path}" for k in setting.policy.feature_ids]


def _from_run(setting: Setting, folder: Path) -> Effects:
    """The same from a run of the same study, which refuses what it does not have."""
    from taught.run.folder import RunFolder
    from taught.stages.scored import read_scores

    run, ids = RunFolder.open(folder), [example.id for example in setting.examples]
    found = {path: read_scores(run, _names(setting, path)) for path in ("x", "y")}
    place = {example_id: row for row, example_id in enumerate(found["x"].example_ids)}
    refuse([i for i in ids if i not in place], "the run lacks examples of this study", fix="name a run of this study")
    return {path: scores.values[[place[i] for i in ids]] for path, scores in found.items()}


def _compare(setting: Setting, exact: Effects, store: Any, size: int) -> Row:
    from taught.core.target import TargetSet
    from taught.sketches.answer import answer, stored_queries
    from taught.sketches.fill import example_row, prompt_key
    from taught.stats.ranks import spearman

    policy, paths = setting.policy, ("x", "y")
    digests = dict(prompt_key(prompt) for prompt in setting.problem.prompts)
    targets = TargetSet.of([name for path in paths for name in _names(setting, path)], setting.ready.readings)
    queries, _ = stored_queries(store, targets, digests)
    rows = [example_row(example) for example in setting.examples]
    d = policy.d
    answers = answer(store, rows, queries)
    values = -setting.problem.lr * answers.values
    found = {"x": values[:, :d], "y": values[:, d:]}
    found["total"], total = found["x"] + found["y"], exact["x"] + exact["y"]
    wanted = {**exact, "total": total}
    by_feature = {p: [spearman(found[p][:, j], wanted[p][:, j]) for j in range(d)] for p in found}
    scores = {p: (found[p] @ policy.coef, wanted[p] @ policy.coef) for p in found}
    unit = setting.problem.lr / np.sqrt(size)
    scale = unit * np.outer(answers.norms, np.linalg.norm(queries[:, :d] + queries[:, d:], axis=0))
    return {
        "K": size,
        "bytes_a_example": 2 * size + 4,
        **{f"spearman_score_{p}": spearman(*scores[p]) for p in scores},
        **{f"median_spearman_coefficient_{p}": float(np.median(v)) for p, v in by_feature.items()},
        "least_spearman_coefficient_total": float(np.min(by_feature["total"])),
        "error_factor": float(np.sqrt(np.mean(((found["total"] - total) / scale) ** 2))),
    }


_COLUMNS = {
    "K": lambda row: f"{row['K']:,}",
    "bytes an example": lambda row: f"{row['bytes_a_example']:,}",
    "Spearman S": lambda row: f"{row['spearman_score_total']:.3f}",
    "S, x": lambda row: f"{row['spearman_score_x']:.3f}",
    "S, y": lambda row: f"{row['spearman_score_y']:.3f}",
    "coefficients, median": lambda row: f"{row['median_spearman_coefficient_total']:.3f}",
    "least": lambda row: f"{row['least_spearman_coefficient_total']:.3f}",
    "x, median": lambda row: f"{row['median_spearman_coefficient_x']:.3f}",
    "y, median": lambda row: f"{row['median_spearman_coefficient_y']:.3f}",
    "error factor": lambda row: f"{row['error_factor']:.2f}",
}


def main() -> None:
    """Parse the flags and measure."""
    flags = common_parser(__doc__ or "")
    flags.add_argument("--sizes", type=int, nargs="+", default=list(SIZES))
    flags.add_argument("--exact", type=Path, help="run folder with the adjoint's results")
    flags.add_argument("--store", type=Path, help="folder of the store, kept (default: temporary)")
    flags.add_argument("--seed", type=int, default=0)
    run(measure, flags.parse_args())


if __name__ == "__main__":
    main()
