"""Over what width do the signs of AdamW's first step have to be averaged to foresee training without an example?

    python -m benchmarks.first_step [--truth benchmarks/results/through_training_64_truth.json]
        [--target behavior:harmless] [--hessian exact] [--states FOLDER] [--out FILE]

The run of a truth of ``benchmarks.through_training`` (all parameters, not clipped) is gone back over once
(``trajectory: steps``), and over its first step once for each value of ``sign_width``, 0 among them, and for

    held         signs are what they are: the derivative of a sign is 0
    without it   no derivative: the first step less the one without the example, weight by weight

Printed are the correlations with what leaving out the truth's sets and single examples did, and the root mean square of
foreseen less measured.
"""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from benchmarks import common
from benchmarks.through_training import foreseen, prepared_for
from taught.core.estimator import Work
from taught.core.example import make_batch
from taught.core.names import TargetName
from taught.core.target import TargetSet
from taught.training.loop import in_training
from taught.training.steps import BETAS, EPS, Back, State, Tensors, Training
from taught.trajectories.steps import Steps, _Pass
from taught.trajectories.trained import known_recipe

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
    with in_training(ready.problem.model, recipe, None):
        training = Watched(ready.problem.model, ready.inputs, recipe, None, ready.problem.batch_tokens)
        how = Steps(hessian=args.hessian, smoothness=0)
        with training.ready():
            tokens, _ = _Pass(training, ready.problem, targets, Work(folder=args.states), how).values()
    total = np.add.reduceat(targets.from_direct(tokens)[:, 0], training.starts[:-1])
    later, first = dict(zip(training.ids, total.tolist(), strict=True)), training.first
    for i, at_point in first["0.0"].items():
        later[i] -= at_point
    shares = ", ".join(f"{size}: {share:.3f}" for size, share in training.near.items())
    print(f"part of the weights with a gradient under {shares}")
    effects = {width: {i: later[i] + of.get(i, 0.0) for i in later} for width, of in first.items()}
    rows = [{"width": width, **foreseen(truth, args.target, of)} for width, of in effects.items()]
    for row in rows:
        print(", ".join(f"{key} {v:.4f}" if isinstance(v, float) else f"{key} {v}" for key, v in row.items()))
    if args.out:
        content = {"machine": common.machine(), "target": args.target, "near 0": training.near, "rows": rows}
        args.out.write_text(json.dumps({**content, "first": first, "later steps": later}, indent=1) + "\n")


@dataclass(eq=False)
class Watched(Training):
    """A run whose first step is gone back over in several ways.

    Attributes
    ----------
    first : what that step adds to the effect of each of its examples, by width and id
    near : part of the weights whose gradient is under a size there
    """

    first: dict[str, dict[str, float]] = field(init=False)
    near: dict[float, float] = field(init=False)

    def step_back(self, state: State, backs: Sequence[Back], *, hessian: str = "exact") -> list[Tensor]:
        """The same; before the first step's, all others."""
        if state.step == 0:
            (back,) = backs
            gradient = state.parts["gradient"]
            sizes = torch.cat([g.flatten() for g in gradient.values()]).abs()
            self.near = {size: float((sizes < size).double().mean()) for size in (1e-9, 1e-8, 1e-7)}
            del sizes
            ids = [self.ids[i] for i in self.plan[0]]
            self.first = {}
            for width in WIDTHS:
                self.sign_width = width
                again = Back({part: {n: t.clone() for n, t in of.items()} for part, of in back.parts.items()})
                own = super().step_back(state, [again], hessian="none")
                self.first[str(width)] = {i: float(shares.sum()) for i, shares in zip(ids, own, strict=True)}
            self.sign_width = 0.0
            self.first |= {"held": {}, "without it": {}}
            for i, name in zip(self.plan[0], ids, strict=True):
                batch = make_batch(self.inputs, [i])
                loss = batch.linked(batch.terms(self.model).sum(1)).sum() / len(ids)
                held, difference = self.parts(gradient, self._sum([self._slope(loss)]), back)
                self.first["held"][name], self.first["without it"][name] = held, difference
        return super().step_back(state, backs, hessian=hessian)

    @torch.no_grad()
    def parts(self, gradient: Tensors, own: Tensors, back: Back) -> tuple[float, float]:
        """Of an example whose part in the gradient is ``own``: with its signs held, and as a difference."""
        held, difference = [], []
        for name, g in gradient.items():
            L, Lm, Lv = (back.parts[part][name] for part in ("weights", "first", "second"))
            rest = g - own[name]
            through_m = (1 - BETAS[0]) * Lm * own[name]
            turned = g / (g.abs() + EPS) - rest / (rest.abs() + EPS)
            slope, whole = 2 * g * own[name], g.square() - rest.square()
            held.append(float((through_m + (1 - BETAS[1]) * Lv * slope).sum(dtype=torch.float64)))
            moved = -self.lrs[0] * L * turned + through_m + (1 - BETAS[1]) * Lv * whole
            difference.append(float(moved.sum(dtype=torch.float64)))
        return math.fsum(held), math.fsum(difference)


if __name__ == "__main__":
    main()
