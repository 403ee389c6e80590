"""How fast a run with very many examples is written and asked, and in how much memory.

    python -m benchmarks.big_tables     # a million examples, 75 features: 5 GB of disk
    python -m benchmarks.big_tables --examples 50000

A run folder of made-up numbers is written by the writer that the stage ``attribute`` uses, then asked
as ``taught show`` asks. Each question is a process of its own, so that its time includes opening
the run and its peak memory is its own. The folder is removed at the end.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import pyarrow as pa

if __package__ in (None, ""):  # run as a file
    sys.path.insert(0, str(Path(__file__).parents[1]))

from benchmarks import common
from benchmarks.common import Clock, Results, Row
from taught.core.names import TargetName
from taught.core.scores import Scores
from taught.environment import peak_memory_gb
from taught.run.folder import RunFolder
from taught.stages.attribute import write_scores
from taught.study.schema import Study

LABELS = ("harmful-refusal", "harmless-compliance")
GROUPS = ("harmful", "harmless")
ASK = """
import json, time
from taught.environment import peak_memory_gb
RUN = {run}
start = time.perf_counter()
from taught.cli.answer import Asked, answer
from taught.report.html import render
from taught.report.tables import Tables
from taught.run.folder import RunFolder


def ask(what, label=None, quantiles=False):
    return answer(RunFolder.open(RUN), what, Asked(20, label, None, quantiles, (), {{}}, False))


answer_ = {call}
seconds = time.perf_counter() - start
print(json.dumps([seconds, peak_memory_gb(), len(answer_)]))
"""
COLUMNS = {
    "step": lambda row: row["step"],
    "seconds": lambda row: f"{row['seconds']:.2f}",
    "rows": lambda row: f"{row['rows']:,}",
    "peak memory, GB": lambda row: f"{row['peak_memory_gb']:.2f}",
    "file, GB": lambda row: f"{row['file_gb']:.3f}" if "file_gb" in row else "",
}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="A run with very many examples.")
    parser.add_argument("--examples", type=int, default=1_000_000)
    parser.add_argument("--features", type=int, default=75)
    parser.add_argument("--folder", type=Path, help="where to make the run (default: temporary)")
    parser.add_argument("--out", type=Path, default=common.RESULTS, help="folder of the result")
    common.run(measure, parser.parse_args(argv))


def measure(args: argparse.Namespace) -> None:
    size = {"examples": args.examples, "features": args.features, "groups": len(GROUPS)}
    results = Results("big_tables", size, args.out)
    with common.kept(results, COLUMNS), tempfile.TemporaryDirectory(dir=args.folder) as folder:
        run = Path(folder) / "run"
        _write(run, args.examples, args.features, results)
        for name, call in _questions(args.features).items():
            results.add(_asked(run, name, call))


def _questions(features: int) -> dict[str, str]:
    feature, label = features // 2, LABELS[0]
    return {
        "list the tables": "ask('tables')",
        "top 20 by score": "ask('score')",
        "top 20 of a coefficient": f"ask('coefficient:{feature}')",
        "top 20 of a coefficient, pathway x, one label": f"ask('coefficient:{feature}:x', {label!r})",
        "top 20 by the behavior on a group": f"ask('behavior:{GROUPS[0]}')",
        "quantiles of the score by label": "ask('score', quantiles=True)",
        "quantiles of a coefficient by label": f"ask('coefficient:{feature}', quantiles=True)",
        "SQL: one example's coefficients, all row groups": 'ask("SELECT target, value FROM scores '
        "WHERE regexp_matches(target, '^coefficient:[0-9]+$') "
        'AND example_id = (SELECT max(example_id) FROM examples)")',
        "the report": "(tables := Tables(RunFolder.open(RUN)), render(tables))[0].rows('summary')",
    }


def _asked(run: Path, name: str, call: str) -> Row:
    done = subprocess.run(
        [sys.executable, "-c", ASK.format(run=repr(str(run)), call=call)], capture_output=True, text=True, check=True
    )
    seconds, memory, rows = json.loads(done.stdout)
    return {"step": name, "seconds": seconds, "rows": rows, "peak_memory_gb": memory}


def _write(path: Path, examples: int, features: int, results: Results) -> None:
    study = _study(path)
    run, made = RunFolder(path), _Made(examples, features)
    with run.stage("readings", study):
        made.write_prompts(run)
    with run.stage("policy", study):
        made.write_policy(run)
    with run.stage("attribute", study):
        with Clock() as clock:
            write_scores(run, made.scores())
        results.add(_written("write scores", clock.seconds, run, "scores"))
        with Clock() as clock:
            made.write_summary(run)
        results.add(_written("write summary and examples", clock.seconds, run, "summary"))


def _written(name: str, seconds: float, run: RunFolder, table: str) -> Row:
    path = run.path(f"{table}.parquet")
    return {
        "step": name,
        "seconds": seconds,
        "rows": run.footer(table).num_rows,
        "peak_memory_gb": peak_memory_gb(),
        "file_gb": path.stat().st_size / 1e9,
    }


def _study(path: Path) -> Study:
    """A study whose files are stubs, which is all that a run folder looks at."""
    folder = path.with_name("inputs")
    (folder / "sae").mkdir(parents=True)
    for name in ("sae/cfg.json", "prompts.jsonl", "examples.jsonl"):
        (folder / name).write_text("{}\n")
    return Study().resolved(folder)


class _Made:
    """Made-up numbers, drawn when they are written: no two row groups are in memory at once."""

    def __init__(self, examples: int, features: int) -> None:
        self.rng = np.random.default_rng(0)
        self.ids = [hashlib.sha256(str(i).encode()).hexdigest()[:16] for i in range(examples)]
        self.label = [LABELS[i % 2] for i in range(examples)]
        self.features = features
        self.score = self._draw(), self._draw()
        self.means = {group: self._draw() for group in GROUPS}

    def _draw(self) -> np.ndarray:
        return self.rng.normal(size=len(self.ids)) * 1e-4

    def scores(self) -> Iterator[Scores]:
        """Target by target."""
        for name, values in self._values():
            yield Scores("adjoint", tuple(self.ids), (TargetName.parse(name),), values[:, None])

    def _values(self) -> Iterator[tuple[str, np.ndarray]]:
        yield from self._pathways("score", *self.score)
        yield from ((f"behavior:{group}", values) for group, values in self.means.items())
        for feature in range(self.features):
            yield from self._pathways(f"coefficient:{feature}", self._draw(), self._draw())

    def _targets(self) -> list[str]:
        """Their names, in that order."""
        paths = ("", ":x", ":y")
        every = ["score", *(f"coefficient:{k}" for k in range(self.features))]
        first, *rest = [[f"{name}{path}" for path in paths] for name in every]
        return [*first, *(f"behavior:{group}" for group in GROUPS), *(name for names in rest for name in names)]

    @staticmethod
    def _pathways(target: str, x: np.ndarray, y: np.ndarray) -> Iterator[tuple[str, np.ndarray]]:
        yield from ((target, x + y), (f"{target}:x", x), (f"{target}:y", y))

    def write_prompts(self, run: RunFolder) -> None:
        prompts = {"prompt_id": list(GROUPS), "text": list(GROUPS), "group": list(GROUPS)}
        run.write_table("prompts", pa.table(prompts))

    def write_policy(self, run: RunFolder) -> None:
        ids, coef = np.arange(self.features), self.rng.normal(size=self.features)
        columns = {
            "feature_id": ids,
            "coef": coef,
            "lo": coef - 1,
            "hi": coef + 1,
            "sign_stability": np.full(len(ids), 0.9),
            "label": ["made up"] * len(ids),
        }
        run.write_table("coefficients", pa.table(columns))

    def write_summary(self, run: RunFolder) -> None:
        n, (x, y) = len(self.ids), self.score
        loss, length = self.rng.gamma(4, 0.3, n), self.rng.integers(8, 300, n)
        dominant = self.rng.integers(0, self.features, n)
        run.write_table(
            "summary",
            pa.table(
                {
                    "example_id": self.ids,
                    "label": self.label,
                    "score": x + y,
                    "score:x": x,
                    "score:y": y,
                    **{f"behavior:{group}": values for group, values in self.means.items()},
                    "loss": loss,
                    "n_scored": length,
                    "intended": [[0, 1]] * n,
                    "outside_share": np.full(n, 0.5),
                    "outside_change": np.abs(x),
                    "dominant_feature": dominant,
                    "dominant_share": np.full(n, 0.1),
                    "unintended": dominant > 1,
                    "step_score": pa.nulls(n, pa.float64()),
                }
            ),
        )
        record = {"method": "adjoint", "ranked_by": "score", "lr": 1e-4, "unit": "step", "targets": self._targets()}
        run.write_json("attribution", record)
        text = {"prompt": [f"Question {i}" for i in self.ids], "response": ["An answer."] * n}
        rest = {"label": self.label, "category": ["x"] * n, "source": ["made up"] * n}
        run.write_table("examples", pa.table({"example_id": self.ids, **text, **rest}))


if __name__ == "__main__":
    main()
