"""What the demo costs: floating point operations by step, counted by torch while it runs.

    python -m benchmarks.demo_cost            # the sizes of `taught demo`
    python -m benchmarks.demo_cost --prompts 60 --examples 12 --features 20

Counted are matrix products and attention, by the formulas of ``torch.utils.flop_counter``, oneDNN's linear layers
included. Counting makes the run slower: times are of `taught demo` itself, not of this.
"""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.flop_counter import flop_registry

if __name__ == "__main__":
    sys.path.insert(0, str(Path(__file__).parents[1]))


class FlopCounter(TorchDispatchMode):
    """Adds up the operations of every product that runs, by torch's own formulas."""

    def __init__(self) -> None:
        super().__init__()
        self.total = 0
        self._formulas = {**flop_registry, torch.ops.mkldnn._linear_pointwise: linear_flops}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        formula = self._formulas.get(func._overloadpacket)
        if formula is not None:
            self.total += formula(*args, **(kwargs or {}), out_val=out)
        return out


class Counting:
    """A progress that remembers how much had been counted when each step began."""

    def __init__(self, counter: FlopCounter) -> None:
        self.counter, self.steps = counter, []

    def step(self, name: str, total: int | None = None) -> None:
        """A step begins."""
        self.steps.append((name, self.counter.total))

    def note(self, text: str) -> None:
        """Nothing is shown."""

    def advance(self, n: int = 1) -> None:
        """Nothing is shown."""

    def table(self) -> list[dict[str, Any]]:
        """Operations of each step, in 10^12."""
        ends = [at for _, at in self.steps[1:]] + [self.counter.total]
        found: dict[str, float] = {}
        for (name, begin), end in zip(self.steps, ends, strict=True):
            found[name] = found.get(name, 0.0) + (end - begin) / 1e12
        return [{"step": name, "tflop": round(value, 3)} for name, value in found.items()]


def linear_flops(x: torch.Tensor, weight: torch.Tensor, *rest: Any, out_val: Any = None) -> int:
    """Operations of oneDNN's linear layer: x [..., in], weight [out, in]."""
    return 2 * x.numel() * weight.shape[0]


def main(argv: list[str] | None = None) -> None:
    """Run the demo under the counter and print its table."""
    from taught.cli import commands
    from taught.run.folder import RunFolder
    from taught.stages import asked

    flags = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, value in commands.DEMO.items():
        flags.add_argument(f"--{name}", type=int, default=value)
    flags.add_argument("--out", type=Path, default=None, help="also write the table as JSON")
    args = flags.parse_args(argv)
    study = commands.demo_study(args.prompts, args.examples, args.features)
    with tempfile.TemporaryDirectory() as folder, FlopCounter() as counter:
        progress, run = Counting(counter), RunFolder(Path(folder) / "run")
        for stage in asked(study, None, None):
            progress.step(f"[{stage.name}]")
            stage(study, run, progress)
        rows = progress.table()
    total = sum(row["tflop"] for row in rows)
    for row in rows:
        print(f"{row['tflop']:>9.3f}  {row['step']}")
    print(f"{total:>9.3f}  TFLOP in all; {total / 0.03 / 60:.1f} minutes at 30 GFLOP/s")
    if args.out is not None:
        args.out.write_text(json.dumps({"sizes": vars(args) | {"out": None}, "steps": rows, "tflop": total}, indent=1))


if __name__ == "__main__":
    main()
