"""What the benchmarks share: a study ready to be measured, and results with their circumstances.

A result is one JSON file: machine, versions, command, date, conditions, rows. It is written again
after every row, so that a measurement that is stopped leaves what it had (``complete`` is false).
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import shlex
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import TYPE_CHECKING, Any

from rich.console import Console
from rich.table import Table

from taught.environment import keep_freed_memory, peak_memory_gb, versions
from taught.errors import UserError
from taught.progress import Progress, RichProgress
from taught.run import files
from taught.run.code import code_version
from taught.study.load import load_study
from taught.study.schema import Study

if TYPE_CHECKING:
    from taught.core.example import Example
    from taught.core.problem import Problem
    from taught.core.scores import Scores
    from taught.model.readout import Readouts
    from taught.policy.ridge import Policy
    from taught.stages.ready import Ready

RESULTS = Path(__file__).parent / "results"
PRESET = "refusal-smollm2"
Row = dict[str, Any]
console = Console(stderr=True)


# --- results --------------------------------------------------------------------------------------


@dataclass
class Results:
    """One benchmark's rows, written to ``folder/NAME.json`` as they come.

    Attributes
    ----------
    name : file name without its ending
    conditions : what was measured under which settings
    summary : the few numbers that the rows come down to; filled in at the end
    """

    name: str
    conditions: Row
    folder: Path = RESULTS
    rows: list[Row] = field(default_factory=list)
    summary: Row = field(default_factory=dict)

    def add(self, row: Mapping[str, Any]) -> None:
        """Keep a row and write the file."""
        self.rows.append(dict(row))
        self.write(complete=False)

    def write(self, *, complete: bool) -> Path:
        """Write the file as a whole; a reader sees the old one or the new one."""
        record = {
            "name": self.name,
            "complete": complete,
            "date": datetime.now(UTC).isoformat(timespec="seconds"),
            "command": command(),
            "machine": machine(),
            "versions": {**versions(), "code": code_version()},
            "peak_memory_gb": peak_memory_gb(),
            "conditions": self.conditions,
            "summary": self.summary,
            "rows": self.rows,
        }
        self.folder.mkdir(parents=True, exist_ok=True)
        path = self.folder / f"{self.name}.json"
        files.write_bytes(path, files.json_bytes(_without_nan(record)))
        return path

    def show(self, columns: Mapping[str, Callable[[Row], str]], *, complete: bool = True) -> None:
        """Print the rows as a table and the summary below it, on standard output."""
        out = Console(width=None if sys.stdout.isatty() else 160)
        title = self.name if complete else f"{self.name} (stopped early)"
        table = Table(title=title, title_justify="left")
        for name in columns:
            table.add_column(name, justify="left" if name == next(iter(columns)) else "right")
        for row in self.rows:
            table.add_row(*(cell(row) for cell in columns.values()))
        out.print(table)
        for key, value in self.summary.items():
            out.print(f"{key}: {_text(value)}", highlight=False, markup=False)
        out.print(f"peak memory: {peak_memory_gb()} GB", highlight=False)


def record(name: str, rows: Sequence[Row], conditions: Row, *, folder: Path = RESULTS) -> Path:
    """Write finished rows to ``folder/NAME.json`` and print them as a table."""
    results = Results(name, conditions, folder, [dict(row) for row in rows])
    path = results.write(complete=True)
    names = list(dict.fromkeys(key for row in rows for key in row))
    results.show({key: lambda row, key=key: _text(row.get(key)) for key in names})
    return path


@contextmanager
def kept(results: Results, columns: Mapping[str, Callable[[Row], str]]) -> Iterator[None]:
    """Write and show what there is when the measurement inside ends, also when it is stopped."""
    complete = False
    try:
        yield
        complete = True
    finally:
        path = results.write(complete=complete)
        results.show(columns, complete=complete)
        console.print(f"written: {os.path.relpath(path)}", highlight=False)


def command() -> str:
    """What repeats the measurement, from the repository's root; of full paths the last name."""
    stem = Path(sys.argv[0]).stem
    given = [Path(word).name if Path(word).is_absolute() else word for word in sys.argv[1:]]
    return " ".join(["python", "-m", f"benchmarks.{stem}", *map(shlex.quote, given)])


def machine() -> Row:
    """Processor, cores, threads, memory and load of this machine."""
    import torch

    usable = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    load = os.getloadavg()[0] if hasattr(os, "getloadavg") else None
    return {
        "cpu": _cpu_model(),
        "cores": usable,
        "threads": torch.get_num_threads(),
        "memory_gb": _memory_gb(),
        "system": f"{platform.system()} {platform.machine()}",
        "load_1min": None if load is None else round(load, 2),
    }


def _cpu_model() -> str:
    try:
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith("model name"):
                return line.partition(":")[2].strip()
    except OSError:
        pass
    return platform.processor() or platform.machine()


def _memory_gb() -> float | None:
    try:
        return round(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 1e9, 1)
    except (AttributeError, OSError, ValueError):
        return None


def _without_nan(value: Any) -> Any:
    """JSON has no nan: what is not defined is null."""
    if isinstance(value, Mapping):
        return {str(key): _without_nan(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [_without_nan(item) for item in value]
    if isinstance(value, float) and not -float("inf") < value < float("inf"):
        return None
    return value


def _text(value: object) -> str:
    if value is None:
        return "-"
    if isinstance(value, float):
        return f"{value:,.4g}" if abs(value) < 1e5 else f"{value:,.0f}"
    if isinstance(value, Mapping):
        return "(" + ", ".join(f"{key} {_text(item)}" for key, item in value.items()) + ")"
    return str(value)


class Clock:
    """Wall time of a block: ``with Clock() as clock: ...; clock.seconds``."""

    seconds = 0.0

    def __enter__(self) -> Clock:
        self._start = time.perf_counter()
        return self

    def __exit__(self, *_: object) -> None:
        self.seconds = time.perf_counter() - self._start


# --- what is measured -----------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Setting:
    """A study opened and its policy fitted: everything that the estimators under test share.

    Attributes
    ----------
    ready : what an estimator is given, and the examples as records and as tokens
    baseline : read-outs at the base parameters, from token trees
    seconds_baseline : how long reading and fitting took (the choice of features not included)
    """

    ready: Ready
    baseline: Readouts
    seconds_baseline: float

    @property
    def study(self) -> Study:
        """The study."""
        return self.ready.study

    @property
    def problem(self) -> Problem:
        """Model, prompts, behavior, features, learning rate."""
        return self.ready.problem

    @property
    def examples(self) -> list[Example]:
        """The examples as tokens."""
        return self.ready.inputs

    @property
    def policy(self) -> Policy:
        """The ridge on the read-outs."""
        assert self.ready.readings.policy is not None
        return self.ready.readings.policy

    def inside(self, group: str) -> Any:
        """Which prompts are of a group, [N]."""
        import numpy as np

        return np.isin(np.arange(self.ready.readings.n), self.ready.readings.rows(group))

    def scores(self, targets: Sequence[str], progress: Progress, method: str = "adjoint") -> Scores:
        """Scores of all examples by the one driver."""
        return scores_of(self.ready, targets, method, progress)


def scores_of(ready: Ready, targets: Sequence[str], method: str, progress: Progress) -> Scores:
    """Scores by a method's name; parts that are the study's own keep its parameters."""
    from taught.core import driver
    from taught.core.estimator import Work
    from taught.core.target import TargetSet

    asked = TargetSet.of(targets, ready.readings)
    return driver.scores(ready.problem, ready.inputs, asked, ready.method.named(method), Work(progress))


def parser(description: str) -> argparse.ArgumentParser:
    """Flags that every benchmark has."""
    made = argparse.ArgumentParser(description=description)
    made.add_argument("--study", default=PRESET, help="a study file or the name of a preset")
    made.add_argument("--prompts", type=int, help="at most so many prompts (default: all)")
    made.add_argument("--examples", type=int, help="at most so many examples (default: all)")
    made.add_argument("--threads", type=int, help="threads of torch (default: as torch chooses)")
    made.add_argument(
        "--random-sae", type=int, metavar="FEATURES", help="a random SAE in place of the study's, for a trial"
    )
    made.add_argument("--out", type=Path, default=RESULTS, help="folder of the result")
    return made


def run(measure: Callable[[argparse.Namespace], None], args: argparse.Namespace) -> None:
    """Run a benchmark as a command: a user's mistake is one message, Ctrl-C keeps the rows."""
    keep_freed_memory()  # as the command line does
    try:
        measure(args)
    except UserError as error:
        console.print(str(error), style="red", markup=False, highlight=False)
        sys.exit(error.exit_code)
    except KeyboardInterrupt:
        console.print("stopped; the rows so far are kept")
        sys.exit(130)


def open_setting(args: argparse.Namespace, progress: RichProgress) -> Setting:
    """Load the study that the flags name, read its prompts and fit its policy."""
    import torch

    if args.threads:
        torch.set_num_threads(args.threads)
    study = load_study(args.study)
    for key, value in (("prompts.limit", args.prompts), ("examples.limit", args.examples)):
        study = study if value is None else study.replace(key, value)
    if not args.random_sae:
        return opened(study, progress)
    with tempfile.TemporaryDirectory() as folder:
        _write_random_sae(Path(folder), study, args.random_sae)
        for key, value in {"sae.path": folder, "sae.max_fvu": 1e9, "features.threshold": 0.0}.items():
            study = study.replace(key, value)
        return opened(study, progress)


def opened(study: Study, progress: Progress) -> Setting:
    """The study's setting, read and fitted now."""
    from taught.model.readout import read_prompts
    from taught.policy.ridge import fit_policy
    from taught.stages.ready import make_ready, read_data, read_here
    from taught.stages.subject import open_subject

    data = read_data(study, progress)
    progress.step("loading the model")
    subject = open_subject(study)
    ready = make_ready(study, subject, data, read_here(study, subject, data.prompts, progress))
    problem, policy = ready.problem, ready.readings.policy
    assert policy is not None and problem.features is not None
    progress.step("read-outs", len(problem.prompts))
    with Clock() as clock:
        baseline = read_prompts(problem.model, problem.prompts, problem.behavior, problem.point, progress=progress)
        X = problem.features(baseline.h, baseline.offsets).double().cpu().numpy()
        kept = {"feature_ids": policy.feature_ids, "alpha": policy.alpha, "fit_intercept": policy.fit_intercept}
        fit_policy(X, baseline.y.numpy(), prompt_ids=baseline.prompt_ids, **kept)
    return Setting(ready, baseline, clock.seconds)


def _write_random_sae(folder: Path, study: Study, features: int, k: int = 32) -> None:
    """A random top-k SAE halfway up the model, in SAELens' format."""
    import torch
    from safetensors.torch import save_file

    from taught.model.load import load_model

    spec = study.model
    loaded = load_model(spec.id, revision=spec.revision, chat_template=spec.chat_template)
    config = loaded.model.config.get_text_config()
    width, block = config.hidden_size, config.num_hidden_layers // 2
    W = torch.randn(width, features, generator=torch.Generator().manual_seed(0))
    W /= W.norm(dim=0)
    weights = {"W_enc": W, "b_enc": torch.zeros(features), "W_dec": W.T.contiguous(), "b_dec": torch.zeros(width)}
    save_file(weights, folder / "sae_weights.safetensors")
    hook = f"blocks.{block}.hook_resid_post"
    content = {
        "architecture": "topk",
        "k": min(k, features),
        "d_in": width,
        "d_sae": features,
        "metadata": {"hook_name": hook},
    }
    (folder / "cfg.json").write_text(json.dumps(content))


def conditions(setting: Setting, args: argparse.Namespace) -> Row:
    """What a reader must know to repeat or to doubt the numbers."""
    study, problem = setting.study, setting.problem
    plain = sum(len(prompt.ids) for prompt in problem.prompts)
    return {
        "study": study.name,
        "weights": setting.ready.subject.loaded.weights.get("source"),
        "sae": f"random, {args.random_sae} features" if args.random_sae else "the study's",
        "dtype": study.model.dtype,
        "device": study.model.device,
        "prompts": len(problem.prompts),
        "prompt_tokens": plain,
        "tree_tokens": tree_tokens(problem),
        "examples": len(setting.examples),
        "example_tokens": sum(len(example.ids) - 1 for example in setting.examples),
        "features": setting.policy.d,
        "block": problem.point.block,
        "position": study.readout.position,
        **asdict(problem.behavior),
        "alpha": setting.policy.alpha,
        "intercept": setting.policy.fit_intercept,
        "lr": problem.lr,
        "batch_tokens": problem.batch_tokens,
        "memory_gb": problem.memory_gb,
    }


def tree_tokens(problem: Problem) -> int:
    """Tokens that one forward pass over the token trees computes."""
    from taught.model.readout import pack

    return sum(p.rows.ids.numel() for p in pack(problem.prompts, problem.behavior))


def result_name(name: str, args: argparse.Namespace) -> str:
    """A trial with a random SAE never takes the place of a measurement."""
    return f"{name}-trial" if args.random_sae else name


@contextmanager
def double_throughout() -> Iterator[None]:
    """Keep float64 tensors float64: transformers' norms otherwise compute in float32."""
    import torch
    from torch.overrides import TorchFunctionMode

    class Double(TorchFunctionMode):
        def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None):
            kwargs = dict(kwargs or {})
            if args and isinstance(args[0], torch.Tensor) and args[0].dtype == torch.float64:
                if func is torch.Tensor.float:
                    return args[0]
                if func is torch.Tensor.to:
                    args = [torch.float64 if a is torch.float32 else a for a in args]
                if kwargs.get("dtype") is torch.float32:
                    kwargs["dtype"] = torch.float64
            return func(*args, **kwargs)

    with Double():
        yield
