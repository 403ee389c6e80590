"""Over what width do the signs of AdamW's first step have to be averaged to foresee training without an example?

    python -m benchmarks.first_step [--truth benchmarks/results/through_training_64_truth.json]
        [--target behavior:harmless] [--hessian exact] [--states FOLDER] [--out FILE]

The run of a truth of ``benchmarks.through_training`` (all parameters, not clipped) is gone back over once
(``trajectory: steps``), and over its first step once for each value of ``sign_width``, 0 among them, and for

    held         signs are what they are: the derivative of a sign is 0
    without it   no derivative: the first step less the one without the example, weight by weight

Printed are the correlations with what leaving out the truth's sets and single examples did, and for single examples
the root mean square of foreseen less measured.
"""

from __future__ import annotations

import argparse
import json
import math
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from scipy import stats

from benchmarks import common
from benchmarks.through_training import prepared_for
from taught.core.example import make_batch
from taught.core.names import TargetName
from taught.core.target import TargetSet
from taught.training.loop import in_training
from taught.training.steps import BETAS, EPS, Back, State, States, Tensors, Training
from taught.trajectories.trained import known_recipe, read_trained, trained_queries

TRUTH = Path(__file__).parent / "results" / "through_training_64_truth.json"
WIDTHS = (0.0, 0.01, 0.1, 1.0, 10.0)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--truth", type=Path, default=TRUTH)
    parser.add_argument("--target", default="behavior:harmless")
    parser.add_argument("--hessian", default="exact")
    parser.add_argument("--states", type=Path, help="a folder for the states of the run")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    truth = json.loads(args.truth.read_text())
    ready = prepared_for(truth, args.target)
    targets = TargetSet((TargetName.parse(args.target),), ready.readings)
    recipe = known_recipe(ready.problem)
    assert recipe.method == "full" and recipe.max_grad_norm is None
    with in_training(ready.problem.model, recipe, None), TemporaryDirectory(dir=args.states) as folder:
        training = Training(ready.problem.model, ready.inputs, recipe, None, ready.problem.batch_tokens)
        with training.ready():
            states, steps = States(Path(folder) / "states"), len(training)
            every = math.ceil(math.sqrt(steps))
            training.train(states, every)
            query = trained_queries(ready.problem, targets, read_trained(ready.problem, targets))
            back = Back({"weights": {n: query.pop(n)[0] for n in training.moving}})
            for part in ("first", "second"):
                back.parts[part] = {n: torch.zeros_like(w) for n, w in back.parts["weights"].items()}
            later = dict.fromkeys(training.ids, 0.0)
            for start in reversed(range(0, steps, every)):
                stop, state = min(start + every, steps), training.enter(states.load(start))
                while state.step < stop:
                    training.advance(state, states if state.step != start else None)
                for step in reversed(range(max(start, 1), stop)):
                    own = training.step_back(training.enter(states.load(step)), [back], hessian=args.hessian)
                    for i, shares in zip(training.plan[step], own, strict=True):
                        later[training.ids[i]] += float(shares.sum())
                    states.drop(step)
                    print(f"back over step {step + 1}", flush=True)
            first = first_step(training, training.enter(states.load(0)), back)
            sizes = torch.cat([g.flatten() for g in states.load(0).parts["gradient"].values()]).abs()
            near = {size: float((sizes < size).double().mean()) for size in (1e-9, 1e-8, 1e-7)}
    print(
        "part of the weights with a gradient under " + ", ".join(f"{size}: {part:.3f}" for size, part in near.items())
    )
    rows = [{"width": width, **compared(truth, args.target, later, of)} for width, of in first.items()]
    for row in rows:
        print(", ".join(f"{key} {v:.4f}" if isinstance(v, float) else f"{key} {v}" for key, v in row.items()))
    if args.out:
        content = {"machine": common.machine(), "target": args.target, "near 0": near, "rows": rows, "first": first}
        content["later steps"] = later
        args.out.write_text(json.dumps(content, indent=1) + "\n")


def first_step(training: Training, state: State, back: Back) -> dict[str, dict[str, float]]:
    """What the first step adds to the effect of each of its examples, by width and id."""
    ids, found = [training.ids[i] for i in training.plan[0]], {}
    for width in WIDTHS:
        training.sign_width = width
        again = Back({part: {n: t.clone() for n, t in of.items()} for part, of in back.parts.items()})
        own = training.step_back(state, [again], hessian="none")
        found[str(width)] = {i: float(shares.sum()) for i, shares in zip(ids, own, strict=True)}
    found["held"], found["without it"] = {}, {}
    for i, name in zip(training.plan[0], ids, strict=True):
        batch = make_batch(training.inputs, [i])
        loss = batch.linked(batch.terms(training.model).sum(1)).sum() / len(ids)
        held, difference = parts(training, state.parts["gradient"], training._sum([training._slope(loss)]), back)
        found["held"][name], found["without it"][name] = held, difference
    return found


@torch.no_grad()
def parts(training: Training, gradient: Tensors, own: Tensors, back: Back) -> tuple[float, float]:
    """Of an example whose part in the gradient is ``own``: with its signs held, and as a difference."""
    held, difference = [], []
    for name, g in gradient.items():
        L, Lm, Lv = (back.parts[part][name] for part in ("weights", "first", "second"))
        rest = g - own[name]
        through_m = (1 - BETAS[0]) * Lm * own[name]
        turned = g / (g.abs() + EPS) - rest / (rest.abs() + EPS)
        slope, whole = 2 * g * own[name], g.square() - rest.square()
        held.append(float((through_m + (1 - BETAS[1]) * Lv * slope).sum(dtype=torch.float64)))
        moved = -training.lrs[0] * L * turned + through_m + (1 - BETAS[1]) * Lv * whole
        difference.append(float(moved.sum(dtype=torch.float64)))
    return math.fsum(held), math.fsum(difference)


def compared(truth: dict[str, Any], target: str, later: dict[str, float], first: dict[str, float]) -> dict[str, Any]:
    """Effects against the truth's sets, and against its single examples."""
    column = truth["targets"].index(target)
    runs = {tuple(run["left_out"]): run["values"][column] for run in truth["runs"] if run["order"] == 0}
    found: dict[str, Any] = {}
    for kind, alone in (("sets", False), ("singles", True)):
        some = [s for s in truth["sets"] if (len(s) == 1) == alone and tuple(s) in runs]
        predicted = np.array([-sum(later[i] + first.get(i, 0.0) for i in s) for s in some])
        measured = np.array([runs[tuple(s)] - runs[()] for s in some])
        found |= {kind: len(some), f"{kind}, Spearman": float(stats.spearmanr(predicted, measured)[0])}
        found[f"{kind}, error"] = float(np.sqrt(np.mean((predicted - measured) ** 2)))
    return found


if __name__ == "__main__":
    main()
