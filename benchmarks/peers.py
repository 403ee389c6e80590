"""Building a store of projected per-example gradients: taught beside Bergson and dattri.

Each builds one from the same weights, the same tokens and the same response masks, in float32, with
the same threads and (as nearly as its layout allows) the same number of stored numbers an example,
in a process of its own that is timed after everything is loaded. They take turns. A peer lives in
an environment of its own, named by the path of its interpreter; one that is not given is left out,
and said to be. benchmarks/README.md says what the rows mean.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from benchmarks.common import PRESET, RESULTS, Results, Row, console, kept, run
from taught.progress import RichProgress

if TYPE_CHECKING:
    from taught.core.example import Example

Floats = NDArray[np.float64]
HERE = Path(__file__).parent
TIMEOUT = 1800.0


@dataclass
class Contestant:
    """One way of building, with what its runs reported.

    Attributes
    ----------
    name, tool : as rows name it
    python, worker : interpreter and script
    job : what its job file holds beyond what all share
    env : variables that it needs
    """

    name: str
    tool: str
    python: str
    worker: str
    job: Row
    env: dict[str, str] = field(default_factory=dict)
    reports: list[Row] = field(default_factory=list)
    rows: Floats | None = None
    error: str | None = None

    def run(self, shared: Row, folder: Path) -> None:
        """Build once, in a fresh process; keep the report, and the rows of the first run."""
        if self.error is not None:
            return
        folder.mkdir(parents=True)
        path = write_job(folder, {**shared, **self.job})
        try:
            done = subprocess.run(
                [self.python, str(HERE / self.worker), str(path)],
                env=environment(shared["threads"], self.python) | self.env,
                cwd=folder,
                capture_output=True,
                text=True,
                timeout=TIMEOUT,
                check=False,
            )
        except subprocess.TimeoutExpired:
            self.error = f"more than {TIMEOUT:.0f} s"
            return
        if done.returncode:
            lines = done.stderr.strip().splitlines()
            self.error = lines[-1] if lines else f"exit status {done.returncode}"
            console.print(f"{self.name}: {done.stderr[-2000:]}", markup=False, highlight=False)
            return
        self.reports.append(json.loads((folder / "report.json").read_text()))
        if self.rows is None and (folder / "rows.npy").is_file():
            self.rows = np.load(folder / "rows.npy").astype(np.float64)


def write_job(folder: Path, job: Row) -> Path:
    """Write what a worker is to do.

    model (folder or hub id), examples (id, ids, start: ``ids[start:]`` is the response), numbers (an
    example), tokens (padded, a batch), threads, out (the job's folder).
    """
    path = folder / "job.json"
    path.write_text(json.dumps({**job, "out": str(folder)}))
    return path


def environment(threads: int, python: str) -> dict[str, str]:
    """Variables of a worker: its threads; no network; a peer does not see this checkout."""
    env = {
        **os.environ,
        "OMP_NUM_THREADS": str(threads),
        "MKL_NUM_THREADS": str(threads),
        "HF_HUB_OFFLINE": "1",
        "TOKENIZERS_PARALLELISM": "false",
    }
    env["PYTHONSAFEPATH"] = "1"  # kernels.py beside the workers is not the package of that name
    paths = env.pop("PYTHONPATH", "")
    if python == sys.executable and paths:
        env["PYTHONPATH"] = os.pathsep.join(map(os.path.abspath, paths.split(os.pathsep)))
    return env


def contestants(args: argparse.Namespace) -> tuple[list[Contestant], list[str]]:
    """Who takes part, in the order of their turns, and who is left out and why."""
    from taught.errors import UserError

    for flag, python in (("--bergson", args.bergson), ("--dattri", args.dattri)):
        if python and not os.access(python, os.X_OK):
            raise UserError(
                "there is no such interpreter", value=python, fix=f"give {flag} the path of an environment's bin/python"
            )
    first, left_out = args.tokens[0], []
    found = [
        Contestant(f"taught, {first} tokens a batch", "taught", sys.executable, "peer_taught.py", {"tokens": first}),
        Contestant(
            f"taught, {first} tokens, torch's products",
            "taught",
            sys.executable,
            "peer_taught.py",
            {"tokens": first, "products": "torch"},
        ),
    ]
    if args.bergson:
        python = os.path.abspath(args.bergson)  # workers run elsewhere
        found += [
            Contestant(f"Bergson, {tokens} tokens a batch", "Bergson", python, "peer_bergson.py", {"tokens": tokens})
            for tokens in args.tokens
        ]
    else:
        left_out.append("Bergson: --bergson was not given")
    if args.dattri:
        job = {"tokens": first, "way": "factored"}
        env = {} if args.dattri_compile else {"TORCHDYNAMO_DISABLE": "1"}
        python = os.path.abspath(args.dattri)
        found.append(
            Contestant(f"dattri (LoGra), {first} tokens a batch", "dattri", python, "peer_dattri.py", job, env)
        )
    else:
        left_out.append("dattri: --dattri was not given")
    return found, left_out


def singles(args: argparse.Namespace) -> list[Contestant]:
    """What is run once, since it can only be extrapolated."""
    if not args.dattri or args.limit <= 0:
        return []
    job = {"tokens": args.tokens[0], "way": "dense", "limit": args.limit}
    python = os.path.abspath(args.dattri)
    return [Contestant("dattri (dense, TRAK's)", "dattri", python, "peer_dattri.py", job)]


def measure(args: argparse.Namespace) -> None:
    """Let everyone build in turns, compare what they stored, write the result."""
    import torch

    torch.set_num_threads(args.threads)
    with RichProgress(console) as progress, tempfile.TemporaryDirectory() as temporary:
        progress.step("loading the model")
        subject, examples = _opened(args)
        shared = {
            "model": _absolute(subject.loaded.model.name_or_path),
            "examples": [{"id": p.id, "ids": list(p.ids), "start": p.start} for p in examples],
            "numbers": args.numbers,
            "threads": args.threads,
        }
        turns, left_out = contestants(args)
        others = singles(args)
        results = Results(
            "peers",
            {
                "study": args.study,
                "weights": subject.loaded.weights.get("source"),
                "dtype": "float32",
                "threads": args.threads,
                "rounds": args.rounds,
                "examples": len(examples),
                "example_tokens": sum(len(p.ids) - 1 for p in examples),
                "lengths": _quantiles([len(p.ids) for p in examples]),
                "numbers_asked_for": args.numbers,
                "checked": args.checked,
                "left_out": left_out,
            },
            args.out,
        )
        with kept(results, _COLUMNS):
            progress.step("exact inner products")
            checked = spread_over(examples, args.checked)
            exact = exact_products(subject.loaded.model, checked)
            places = [examples.index(example) for example in checked]
            progress.step("building", args.rounds * len(turns) + len(others))
            for number in range(args.rounds):
                for place, contestant in enumerate(turns):
                    contestant.run(shared, Path(temporary) / f"{number}-{place}")
                    progress.advance()
                results.rows = [described(c, turns[0], exact, places, shared) for c in turns]
                results.write(complete=False)
            for place, contestant in enumerate(others):
                contestant.run(shared, Path(temporary) / f"once-{place}")
                results.add(described(contestant, turns[0], exact, places, shared))
                progress.advance()
            results.summary = summarised(results.rows)
            for text in left_out:
                console.print(f"left out: {text}", highlight=False)


def _absolute(name: str) -> str:
    """A folder's path from anywhere; the id of a hub as it is."""
    return os.path.abspath(name) if os.path.isdir(name) else name


def _opened(args: argparse.Namespace) -> tuple[Any, list[Example]]:
    """The model and the chosen examples, none longer than a batch may be."""
    from taught.stages.subject import open_subject, study_examples, study_prompts
    from taught.study.load import load_study

    study = load_study(args.study)
    subject = open_subject(study)
    example_set, _ = study_examples(study, study_prompts(study))
    encoded, _ = subject.chat.encode_examples(
        example_set.examples, study.examples.max_tokens, study.examples.drop_truncated
    )
    fitting = [p for p in (e.example() for e in encoded) if len(p.ids) <= min(args.tokens)]
    return subject, spread_over(fitting, args.examples)


def spread_over(examples: Sequence[Example], count: int) -> list[Example]:
    """Choose so many examples spread evenly over the lengths, shortest to longest."""
    ordered = sorted(examples, key=lambda example: (len(example.ids), example.id))
    if count >= len(ordered):
        return ordered
    places = np.linspace(0, len(ordered) - 1, count).round().astype(int)
    return [ordered[i] for i in places]


def exact_products(model: Any, examples: Sequence[Example]) -> dict[str, Floats]:
    """Inner products of whole gradients, [n, n]: over all parameters, and over the blocks' layers.

    They are computed from factors without a projection (``taught.model.gradients``).
    """
    from taught.core.example import batch_examples
    from taught.model.gradients import Factor, dots, find_sites, frozen, tap

    head = id(model.get_output_embeddings().weight)
    by_name: dict[str, list[list[Factor]]] = {}
    order: list[int] = []
    sites = find_sites(model)
    with frozen(model):
        for batch in batch_examples(examples, 512):
            order += batch.index
            with tap(model, sites) as taps:
                uses: dict[str, list[Factor]] = {}
                for factor in taps.factors(batch.losses(model).sum(), training=True):
                    uses.setdefault(factor.param, []).append(factor)
            for name, factors in uses.items():
                by_name.setdefault(name, []).append(factors)
    found = {"all parameters": np.zeros((len(examples),) * 2)}
    found["linear layers of the blocks"] = np.zeros((len(examples),) * 2)
    back = np.argsort(order)
    for name, batches in by_name.items():
        met = dots(batches, batches, room=1 << 27).double().cpu().numpy()[np.ix_(back, back)]
        found["all parameters"] += met
        linear = all(factor.kind == "linear" for factor in batches[0])
        if linear and id(model.get_parameter(name)) != head:
            found["linear layers of the blocks"] += met
    return found


def error(found: Floats, exact: Floats) -> float:
    """Mean squared error of inner products between different examples, relative to |g| |h|."""
    norms = np.sqrt(np.diag(exact))
    off = np.triu_indices(len(exact), 1)
    return float(np.mean(((found - exact) / np.outer(norms, norms))[off] ** 2))


def described(
    contestant: Contestant, ours: Contestant, exact: Mapping[str, Floats], places: Sequence[int], shared: Row
) -> Row:
    """The row of one contestant: times, what it stores, how good its inner products are."""
    row: Row = {"method": contestant.name, "tool": contestant.tool, **contestant.job}
    if not contestant.reports:
        return {**row, "error": contestant.error}
    report = contestant.reports[0]
    every = [one["seconds"] for one in contestant.reports]
    seconds = statistics.median(every)
    of_cpu = [one["cpu_seconds"] for one in contestant.reports if "cpu_seconds" in one]
    tokens = sum(len(example["ids"]) - 1 for example in shared["examples"])
    row |= {
        **report,
        "seconds": seconds,
        "seconds_of_all_runs": every,
        "cpu_seconds": statistics.median(of_cpu) if of_cpu else None,
        "ms_per_example": 1000 * seconds / report["examples"],
        "example_tokens_per_second": tokens / seconds,
    }
    if contestant.rows is None:
        return row
    gram, covers = contestant.rows @ contestant.rows.T, report["covers"][0]
    some = gram[np.ix_(places, places)]
    row |= {
        "squared_error_of_covered": error(some, exact[covers]),
        "squared_error_of_all": error(some, exact["all parameters"]),
        "exact_covered_against_all": error(exact[covers], exact["all parameters"]),
    }
    if ours.rows is not None:
        row |= agreement(gram, ours.rows @ ours.rows.T)
    return row


def agreement(gram: Floats, ours: Floats) -> Row:
    """Correlation of the inner products of different examples with those from taught's rows."""
    from taught.stats.ranks import spearman

    off = np.triu_indices(len(gram), 1)
    return {
        "pearson_with_taught": float(np.corrcoef(gram[off], ours[off])[0, 1]),
        "spearman_with_taught": spearman(gram[off], ours[off]),
    }


def summarised(rows: Sequence[Row]) -> Row:
    """The few numbers that the rows come down to."""
    timed = [row for row in rows if "seconds" in row]
    ours = next((row for row in timed if row["tool"] == "taught"), None)
    if ours is None:
        return {}
    found: Row = {"seconds_taught": ours["seconds"]}
    plain = next((row for row in timed if row.get("products") == "torch"), None)
    if plain is not None:
        found["seconds_taught_with_torchs_products"] = plain["seconds"]
    for tool in ("Bergson", "dattri"):
        best = min(
            (row for row in timed if row["tool"] == tool and not row.get("extrapolated")),
            key=lambda row: row["seconds"],
            default=None,
        )
        if best is not None:
            found |= {
                f"fastest_{tool}": best["method"],
                f"seconds_{tool}": best["seconds"],
                f"{tool}_over_taught": best["seconds"] / ours["seconds"],
            }
            if plain is not None:
                ratio = best["seconds"] / plain["seconds"]
                found[f"{tool}_over_taught_with_torchs_products"] = ratio
    return found


def _quantiles(lengths: Sequence[int]) -> list[int]:
    """Least, quartiles, most."""
    return [int(x) for x in np.quantile(lengths, [0, 0.25, 0.5, 0.75, 1])]


def _number(row: Row, key: str, form: str) -> str:
    return form.format(row[key]) if row.get(key) is not None else "-"


def _seconds(row: Row) -> str:
    if "seconds" not in row:
        return "failed"
    return f"{row['seconds']:,.2f}" + (" (extrapolated)" if row.get("extrapolated") else "")


_COLUMNS = {
    "method": lambda row: row["method"],
    "seconds": _seconds,
    "CPU seconds": lambda row: _number(row, "cpu_seconds", "{:,.1f}"),
    "ms an example": lambda row: _number(row, "ms_per_example", "{:,.0f}"),
    "numbers": lambda row: _number(row, "numbers_per_example", "{:,}"),
    "covers": lambda row: ", ".join(row.get("covers", ["-"])),
    "error²": lambda row: _number(row, "squared_error_of_covered", "{:.1e}"),
    "error² of all": lambda row: _number(row, "squared_error_of_all", "{:.1e}"),
    "Spearman": lambda row: _number(row, "spearman_with_taught", "{:.3f}"),
}


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the flags and measure."""
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--study", default=PRESET, help="a study file or the name of a preset")
    flags.add_argument("--bergson", metavar="PYTHON", help="interpreter of Bergson's environment")
    flags.add_argument("--dattri", metavar="PYTHON", help="interpreter of dattri's environment")
    flags.add_argument("--examples", type=int, default=64)
    flags.add_argument("--numbers", type=int, default=13440, help="stored numbers an example")
    flags.add_argument(
        "--tokens",
        type=int,
        nargs="+",
        default=[512, 256],
        help="padded tokens a batch: the first for all, the others for Bergson too",
    )
    flags.add_argument("--rounds", type=int, default=3, help="runs of each, in turns")
    flags.add_argument("--checked", type=int, default=16, help="examples with exact inner products")
    flags.add_argument(
        "--limit", type=float, default=40.0, help="seconds for blocks of dattri's dense matrix; 0: not at all"
    )
    flags.add_argument("--dattri-compile", action="store_true", help="leave torch.compile on in dattri")
    flags.add_argument("--threads", type=int, default=2)
    flags.add_argument("--out", type=Path, default=RESULTS, help="folder of the result")
    run(measure, flags.parse_args(argv))


if __name__ == "__main__":
    main()
