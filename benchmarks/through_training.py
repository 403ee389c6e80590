"""Does the derivative of a training run foresee what leaving examples out of their batches does?

    python -m benchmarks.through_training [--preset refusal-smollm2] [--examples 64] [--batch 8] [--epochs 1]
        [--sets 14] [--left-out 6] [--method full|lora] [--out FILE]

Trains the preset's model on some of its examples, step by step, and again for each of some random sets with the weights
of the set's examples at 0: the other examples, their batches, denominators and order stay. Compared are, for the mean
behavior of both groups, the sum over the left-out set of minus each example's effect with the change that was measured:

    steps           derivative through the run (MAGIC)          gauss-newton   the same without second derivatives
    base            one step from the base model                labels         refusals that were left out
    tokens          response tokens that were left out

Linear datamodelling score (LDS): rank correlation over the sets, with a bootstrap interval over sets. Times are of this
machine, printed in trainings of the same run.
"""

from __future__ import annotations

import argparse
import json
import time
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import torch

from benchmarks import common
from taught.core import driver
from taught.core.driver import Method
from taught.core.estimator import Work
from taught.core.registry import Choice
from taught.core.target import TargetSet, value
from taught.model.readout import read_prompts
from taught.presets import preset_path
from taught.progress import SilentProgress
from taught.stages.ready import make_ready, read_data, read_here
from taught.stages.subject import open_subject
from taught.stats.ranks import spearman_interval
from taught.study.load import load_study
from taught.training.loop import in_training
from taught.training.steps import Training


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--preset", default="refusal-smollm2")
    parser.add_argument("--examples", type=int, default=64)
    parser.add_argument("--prompts", type=int, default=48)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--lr", type=float, default=2e-5)
    parser.add_argument("--eps-root", type=float, default=0.0)
    parser.add_argument("--method", choices=("full", "lora"), default="full")
    parser.add_argument("--sets", type=int, default=14)
    parser.add_argument("--left-out", type=int, default=6)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--memory-gb", type=float, default=8.0)
    parser.add_argument("--states", type=Path, help="a folder for states that do not fit into memory")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()

    study = load_study(preset_path(args.preset) / "study.yaml")
    for key, setting in {
        "sae.path": None,
        "examples.limit": args.examples,
        "prompts.limit": args.prompts,
        "validation.method": args.method,
        "validation.lr": args.lr,
        "validation.batch": args.batch,
        "validation.epochs": args.epochs,
        "attribution.memory_gb": args.memory_gb,
    }.items():
        study = study.replace(key, setting)
    subject, data = open_subject(study), read_data(study, SilentProgress())
    readings = read_here(study, subject, data.prompts, SilentProgress())
    ready = make_ready(study, subject, data, readings)
    targets = TargetSet.of([f"behavior:{group}" for group in readings.groups], readings)
    names = list(map(str, targets.names))
    print(
        json.dumps({"machine": common.machine(), "examples": len(ready.inputs), "recipe": asdict(ready.problem.recipe)})
    )

    found, seconds = {}, {}
    methods = {
        "base": Method(),
        "steps": Method(trajectory=Choice("steps", {"eps_root": args.eps_root})),
        "gauss-newton": Method(trajectory=Choice("steps", {"eps_root": args.eps_root, "hessian": "gauss-newton"})),
    }
    for name, method in methods.items():
        started = time.monotonic()
        scores = driver.scores(ready.problem, ready.inputs, targets, method, Work(folder=args.states))
        seconds[name] = time.monotonic() - started
        found[name] = {str(target): scores.by_example(target) for target in targets.names}
        print(f"{name}: {seconds[name]:.0f} s", flush=True)
    refusal = {e.id: float(e.label == study.examples.positive_label) for e in ready.examples}
    tokens = {z.id: float(z.n_scored) for z in ready.inputs}
    found |= {"labels": dict.fromkeys(names, refusal), "tokens": dict.fromkeys(names, tokens)}

    ids = sorted(z.id for z in ready.inputs)
    draw = np.random.default_rng(args.seed)
    sets = [sorted(draw.choice(len(ids), args.left_out, replace=False).tolist()) for _ in range(args.sets)]
    ends = []
    for number, left_out in enumerate([[], *sets]):
        weights = torch.ones(len(ids), dtype=torch.float64)
        weights[left_out] = 0.0
        started = time.monotonic()
        ends.append(trained(ready, targets, weights, args.eps_root))
        seconds.setdefault("training", time.monotonic() - started)
        moved = ends[-1] - (np.array([value(n, readings, readings) for n in targets.names]) if not number else ends[0])
        print(f"{number or 'all'}: {moved.round(4).tolist()}", flush=True)
    measured = np.array(ends[1:]) - ends[0]

    rows = []
    for method, by_target in found.items():
        for column, target in enumerate(names):
            predicted = [-sum(by_target[target][ids[i]] for i in left_out) for left_out in sets]
            lds = spearman_interval(np.array(predicted), measured[:, column])
            pearson = float(np.corrcoef(predicted, measured[:, column])[0, 1])
            known = {} if lds is None else {"lds": lds.value, "lo": lds.lo, "hi": lds.hi}
            cost = seconds[method] / seconds["training"] if method in seconds else 0.0
            rows.append({"method": method, "target": target, **known, "pearson": pearson, "trainings": cost})
            said = "no LDS" if lds is None else f"LDS {lds.value:.3f} [{lds.lo:.2f}, {lds.hi:.2f}]"
            print(f"{method:13} {target:22} {said}, Pearson {pearson:.3f}, {cost:.1f} trainings")
    if args.out:
        content = {"arguments": {k: str(v) for k, v in vars(args).items()}, "machine": common.machine(), "rows": rows}
        args.out.write_text(json.dumps(content | {"seconds": seconds}, indent=1) + "\n")


def trained(ready, targets: TargetSet, weights: torch.Tensor, eps_root: float) -> np.ndarray:
    """Values of the targets after a run with these weights."""
    problem = ready.problem
    with in_training(problem.model, problem.recipe, problem.parameters) as patterns:
        training = Training(
            problem.model, ready.inputs, problem.recipe, patterns, problem.batch_tokens, eps_root, weights
        )
        with training.ready():
            training.train()
        with torch.no_grad():
            y = read_prompts(problem.model, problem.prompts, problem.behavior, problem.block).y.numpy()
    final = replace(ready.readings, y=y)
    return np.array([value(name, final, ready.readings) for name in targets.names])


if __name__ == "__main__":
    main()
