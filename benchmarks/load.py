"""Very many short examples through the whole pipeline, on a tiny model: how do time and memory grow?

    python -m benchmarks.load                    # 1,000, 10,000 and 100,000 examples, two estimators
    python -m benchmarks.load --examples 1000 --estimators adjoint

The model is so small (three blocks, width 16, byte tokens) that what is measured is everything
around it: reading, checking, encoding, batching, tables, files. The commands are the real ones,
each a process of its own, timed from outside; its peak memory is the one that the manifest states.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

if __package__ in (None, ""):  # run as a file
    sys.path.insert(0, str(Path(__file__).parents[1]))
sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))  # the tiny study

from benchmarks import common
from benchmarks.common import Clock, Results, Row
from taught.errors import UserError

PAIRS = (1_000, 10_000, 100_000)
SETTINGS = {
    "adjoint": (),
    "adjoint, few targets": ("attribution.targets=[score, 'behavior:*']",),
    "sketch": ("attribution.estimator=sketch", "attribution.estimator.dim=1024"),
}
COMMANDS = ("readings", "policy", "attribute", "curate", "report")
LABELS = ("harmful-refusal", "harmless-compliance")
PLACES = ("harbour", "market", "bridge", "garden", "station", "school", "forest", "castle")
THINGS = ("lamps", "ropes", "doors", "wheels", "boats", "fences", "clocks", "pumps", "tents")
COLUMNS = {
    "examples": lambda row: f"{row['examples']:,}",
    "estimator": lambda row: row["estimator"],
    "command": lambda row: row["command"],
    "seconds": lambda row: f"{row['seconds']:.1f}",
    "examples a second": lambda row: f"{row['examples_per_second']:,.0f}",
    "peak memory, GB": lambda row: f"{row['peak_memory_gb']:.3f}",
    "folder, MB": lambda row: f"{row['folder_mb']:.1f}",
}


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description="Very many short examples.")
    parser.add_argument("--examples", type=int, nargs="+", default=PAIRS)
    parser.add_argument("--estimators", nargs="+", default=["adjoint", "sketch"], choices=SETTINGS)
    parser.add_argument(
        "--batch-tokens", type=int, default=4096, help="attribution.batch_tokens: a small model wants many"
    )
    parser.add_argument("--folder", type=Path, help="where to work (default: temporary)")
    parser.add_argument("--out", type=Path, default=common.RESULTS, help="folder of the result")
    common.run(measure, parser.parse_args(argv))


def measure(args: argparse.Namespace) -> None:
    conditions = {
        "model": "random Llama, 3 blocks, width 16, bytes",
        "prompts": 30,
        "features": 6,
        "memory_gb": 0.5,
        "batch_tokens": args.batch_tokens,
    }
    results = Results("load", conditions, args.out)
    with common.kept(results, COLUMNS):
        for estimator in args.estimators:
            for examples in args.examples:
                with tempfile.TemporaryDirectory(dir=args.folder) as folder:
                    for row in _rows(Path(folder), examples, estimator, args.batch_tokens):
                        results.add(row)
            results.summary[estimator] = _growth(results.rows, estimator)


def write_study(folder: Path, examples: int, batch_tokens: int = 4096) -> Path:
    """The tests' tiny study with so many examples; the study's path."""
    from tiny_study import write_tiny_study

    study = write_tiny_study(folder)
    study.write_text(study.read_text().replace("batch_tokens: 512", f"batch_tokens: {batch_tokens}"))
    with open(folder / "pairs.jsonl", "w", encoding="utf-8") as file:
        file.writelines(json.dumps(_example(number)) + "\n" for number in range(examples))
    return study


def _example(number: int) -> dict[str, str]:
    """An example of 40 to 60 tokens; no two are alike."""
    thing, place = THINGS[number % len(THINGS)], PLACES[number % len(PLACES)]
    refusal = number % 2 == 0
    prompt = f"Break {thing} {number}" if refusal else f"Buy {thing} {number}"
    response = "I can't help." if refusal else f"At the {place}."
    return {
        "id": f"z{number:07d}",
        "label": LABELS[number % 2],
        "category": place,
        "prompt": prompt,
        "response": response,
    }


def _rows(folder: Path, examples: int, estimator: str, batch_tokens: int) -> Iterator[Row]:
    """One row for each command."""
    study, run = write_study(folder, examples, batch_tokens), folder / "run"
    flags = [flag for value in SETTINGS[estimator] for flag in ("--set", value)]
    for command in COMMANDS:
        of_study = command in ("readings", "policy", "attribute")
        told = ["run", str(study), "--run", str(run), "--only", command, "--quiet", *flags]
        with Clock() as clock:
            _taught(*(told if of_study else [command, str(run)]))
        yield {
            "examples": examples,
            "estimator": estimator,
            "command": command,
            "seconds": clock.seconds,
            "examples_per_second": examples / clock.seconds,
            **_stated(run, command),
            "folder_mb": sum(f.stat().st_size for f in run.rglob("*") if f.is_file()) / 1e6,
        }


def _taught(*words: str) -> None:
    done = subprocess.run(
        [sys.executable, "-m", "taught", *words],
        capture_output=True,
        text=True,
        env=os.environ | {"TOKENIZERS_PARALLELISM": "false"},
    )
    if done.returncode:
        raise UserError(f"taught {words[0]} failed", value=done.stderr[-2000:])


def _stated(run: Path, command: str) -> dict[str, Any]:
    """Peak memory of the command, and the seconds of its stage: without the start of Python."""
    record = json.loads((run / "manifest.json").read_text())["stages"][command]
    return {"peak_memory_gb": record["peak_memory_gb"], "stage_seconds": record["seconds"]}


def _growth(rows: Sequence[Row], estimator: str) -> Row:
    """What one more example costs, between the two largest runs."""
    growth: Row = {}
    for command in COMMANDS:
        own = [r for r in rows if (r["estimator"], r["command"]) == (estimator, command)]
        if len(own) > 1 and own[-1]["examples"] > own[-2]["examples"]:
            more = own[-1]["examples"] - own[-2]["examples"]
            growth[command] = {
                "ms_a_example": 1e3 * (own[-1]["seconds"] - own[-2]["seconds"]) / more,
                "kb_a_example": 1e6 * (own[-1]["peak_memory_gb"] - own[-2]["peak_memory_gb"]) / more,
            }
    return growth


if __name__ == "__main__":
    main()
