"""Through every step of a training run (MAGIC, Ilyas and Engstrom, arXiv 2504.16430).

    effect(F, z) = dF(theta_T) / dw_z,    theta_T = training(w),    w = 1

F is a functional of the *final* model: a mean behavior, a coefficient of the policy fitted to the final read-outs, the
score of that policy against the base model's (sum of W_j (W_j(theta_T) - W_j), W the base policy's), a concept. w_z is
the weight of example z in the loss of every batch that it is in, with the batch's denominator held. Positive: training
on z raised F. Leaving a set out changes F by about minus the sum of its effects.

The run is made from the model's weights by the study's recipe of retraining, its states are kept at every square root
of the steps (or all of them, where they fit into memory), and it is gone through backward
(:mod:`taught.training.steps`), with what lies between two kept states made again and compared bit by bit.

One step is not followed by its derivative: the first of AdamW goes by the signs of the gradients, and what an example
does there is averaged over ``sign_width``.

``hessian`` says what stands in the place of the batch's Hessian: ``gauss-newton`` leaves the second derivatives of the
model out of it, (1/n) sum J' B J with J the derivative of an example's logits and B the Hessian of its loss by them;
``empirical-fisher`` has (1/n) sum g g' (AdamW-influence, arXiv 2605.18814); ``none`` has 0: what is left is the
optimizer's rule.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any, ClassVar, Literal

import numpy as np
import torch
from torch import Tensor

from taught.core import rules
from taught.core.curvature import Curvature, Identity
from taught.core.estimator import Work
from taught.core.example import Examples, example_losses
from taught.core.names import TargetName
from taught.core.problem import GB, Problem
from taught.core.readings import Readings
from taught.core.registry import TRAJECTORIES, setting
from taught.core.scores import Scores
from taught.core.target import TargetSet, value
from taught.errors import UserError
from taught.estimators.cost import Asked, Passes
from taught.model.gradients import refuse_detached
from taught.run.pieces import piece_key
from taught.training.loop import in_training
from taught.training.recipe import Recipe
from taught.training.steps import Back, States, Training, named, same_bits
from taught.trajectories.trained import (
    known_recipe,
    moving_bytes,
    planned_steps,
    read_trained,
    states_folder,
    trained_queries,
)

# Forward passes over the examples, as counted: of a step of training, and of the way back over it, once and for each
# target. Fresh LoRA layers need no gradients of the weights that stay.
TRAINED = {"full": 3.0, "lora": 2.1}
PASSES = {
    ("exact", "full"): (3.0, 6.0),
    ("exact", "lora"): (2.1, 2.4),
    ("gauss-newton", "full"): (1.0, 5.0),
    ("gauss-newton", "lora"): (1.0, 3.6),
    ("empirical-fisher", "full"): (1.0, 5.0),
    ("empirical-fisher", "lora"): (1.0, 3.6),
    ("none", "full"): (0.0, 3.0),
    ("none", "lora"): (0.0, 2.8),
}
KEPT = "weights, gradient and the optimizer's state at every square root of the steps"

SMALL = 0.1  # h: by how much examples' weights are moved to see whether training is smooth


@TRAJECTORIES.register("steps")
@dataclass(frozen=True)
class Steps:
    """The derivative of the trained model in every example's weight, step by step through the run."""

    hessian: Literal["exact", "gauss-newton", "empirical-fisher", "none"] = setting(
        "exact",
        rules.one_of("exact", "gauss-newton", "empirical-fisher", "none"),
        "exact (MAGIC) | gauss-newton: no second derivatives of the model | empirical-fisher: squares of the examples' "
        "gradients (AdamW-influence) | none: later gradients stay as they were",
    )
    smoothness: int = setting(
        1,
        rules.whole(0),
        "so many random directions of weights, two trainings each, that show whether the derivative holds; 0: none",
    )
    eps_root: float = setting(0.0, rules.number(minimum=0), "under the root of AdamW; 1e-8 makes training smoother")
    sign_width: float = setting(
        0.1,
        rules.number(minimum=0),
        "AdamW's first step goes by the signs of gradients: their derivative is averaged over so many times what one "
        "example has in them; 0: it is that at the point",
    )
    single: ClassVar[bool] = False
    carries: ClassVar[bool] = True

    @property
    def asks(self) -> str:
        """What it answers, and when another is better."""
        if self.hessian != "exact":
            return "what the training run did, nearly. Exact: --set attribution.trajectory.hessian=exact"
        return (
            "what the training run did, exactly. Nearly, and a training cheaper: --set "
            "attribution.trajectory.hessian=gauss-newton. Roughly, at half: --set attribution.trajectory=segments"
        )

    def refuses(self, curvature: Curvature) -> str | None:
        """The run's own optimizer is followed: no other metric has a place in it."""
        if not isinstance(curvature, Identity):
            return "a run that is followed step by step has the metric of its optimizer"
        return None

    def seen(self, problem: Problem, examples: Examples, work: Work) -> Examples:
        """The examples; refused is a run that could not be made or followed."""
        planned_steps(problem, examples)
        return examples

    def follow(self, problem: Problem, examples: Examples, targets: TargetSet, work: Work) -> Scores:
        """Train, read the final model, go back.

        Cost: a training, its replay (where not all states are kept) and one more on the way back; two for each target,
        of LoRA layers 1.2; two for each direction of ``smoothness``. With ``gauss-newton`` the way back is a third, and
        1.7 for each target; without a Hessian it is one for each target and nothing more.

        Raises
        ------
        UserError
            The recipe is not known or is trl's; training diverges; the states do not fit on the disk; the run does
            not end in the same bits when it is made again.
        """
        recipe = known_recipe(problem)
        refuse_detached(problem.model)
        ids = tuple(z.id for z in examples)
        losses = example_losses(problem.model, examples, problem.batch_tokens).numpy()
        with in_training(problem.model, recipe, problem.parameters) as parameters:
            training = Training(
                problem.model, examples, recipe, parameters, problem.batch_tokens, self.eps_root, self.sign_width
            )
            with training.ready():
                moved = None if parameters is None else tuple(parameters)
                values, smooth = _Pass(training, replace(problem, parameters=moved), targets, work, self).values()
        tokens = targets.from_direct(values)  # [scored tokens of all examples, T]
        shares = dict(zip(training.ids, np.split(tokens, training.starts[1:-1]), strict=True))
        effects = np.stack([shares[i].sum(0) for i in ids])
        details: dict[str, Any] = {"token_shares": shares}
        if smooth:
            details["smoothness"] = smooth
        return Scores("adjoint", ids, targets.names, effects, losses=losses, unit="run", details=details)

    def cost(self, problem: Problem, examples: Examples, asked: Asked) -> dict[str, float]:
        """A training, its replay where states are made again, and the way back for each target.

        Of targets that do not fit into memory together, each group has a replay and a pass over the batches of its own.
        """
        recipe = known_recipe(problem)
        passes, (once, each) = Passes(problem, examples), PASSES[self.hessian, recipe.method]
        one = passes.examples * recipe.epochs
        training = TRAINED[recipe.method] * one
        size = _kept_bytes(moving_bytes(problem, recipe), recipe)
        groups = math.ceil(asked.queries / _at_once(size, problem.memory_gb))
        replayed = self.bytes(problem, examples, asked)[1] > 0
        return {
            "training": training,
            **({"replay": groups * training} if replayed else {}),
            "smoothness": 2 * self.smoothness * training,
            "steps back": (groups * once + each * asked.queries) * one,
            "targets": (1 + groups + 3 * asked.queries) * passes.trees,
        }

    def bytes(self, problem: Problem, examples: Examples, asked: Asked) -> tuple[int, int]:
        """States, a step's own tensors and the derivatives of targets; states on the disk."""
        recipe = known_recipe(problem)
        weights = moving_bytes(problem, recipe)
        size = _kept_bytes(weights, recipe)
        steps = recipe.epochs * math.ceil(len(examples) / recipe.batch)
        on_disk = spacing(steps, size, problem.memory_gb)[1]
        held = min(asked.queries, _at_once(size, problem.memory_gb))
        shares = 8 * asked.queries * sum(z.n_scored for z in examples)
        states = 0 if on_disk else (steps + 1) * size
        return size + 2 * weights + held * size + shares + states, on_disk


def _kept_bytes(weights: int, recipe: Recipe) -> int:
    """Of a state, and of a target's derivatives on the way back: weights, gradient, the optimizer's state."""
    return weights * (4 if recipe.optimizer == "adamw" else 3)


def spacing(steps: int, size: int, memory_gb: float) -> tuple[int, int]:
    """Every how many steps a state of ``size`` bytes is kept, and what that takes on the disk.

    All of them in memory, where half of it is enough for that; else every square root of the steps on the disk, and
    those of one such segment. The one behind the last step is kept beside them.
    """
    if (steps + 1) * size <= memory_gb * GB / 2:
        return 1, 0
    every = math.ceil(math.sqrt(steps))
    return every, (every + math.ceil(steps / every) + 1) * size


def _at_once(size: int, memory_gb: float) -> int:
    """How many targets go back through a run together."""
    return max(1, int(memory_gb * GB // (1.5 * size)))


@dataclass(eq=False)
class _Pass:
    """One run there and back."""

    training: Training
    problem: Problem
    targets: TargetSet
    work: Work
    how: Steps

    def values(self) -> tuple[np.ndarray, list[dict[str, Any]]]:
        """What every scored token adds to its example's dF/dw, for every direct target: float64 [tokens, K].

        Beside it, direction by direction, how smooth training is (:meth:`_smooth`).
        """
        training, steps = self.training, len(self.training)
        size = _kept_bytes(training.moving_bytes, training.recipe)
        every, on_disk = spacing(steps, size, self.problem.memory_gb)
        with states_folder(self.work.folder, on_disk, KEPT) as folder:
            states = States(folder)
            self.work.progress.step(f"train, {steps} steps", steps)
            training.train(states, every, self.work.progress)
            ended = read_trained(self.problem, self.targets)
            names, room, parts = self.targets.direct, _at_once(size, self.problem.memory_gb), []
            for start in range(0, len(names), room):
                some = names[start : start + room]
                training.enter(states.load(steps))
                self.work.progress.step("gradients of the targets of the trained model", None)
                queries = trained_queries(self.problem, self.targets, ended, some)
                backs = [_back(training, queries, k) for k in range(len(some))]
                parts.append(self._back(states, every, backs, f"{start}"))
                del queries, backs  # before those of the next targets
            found = torch.cat(parts, 1).numpy()
            return found, [self._smooth(states, ended, found, k) for k in range(self.how.smoothness)]

    def _back(self, states: States, every: int, backs: Sequence[Back], name: str) -> Tensor:
        """Contributions of all steps, float64 [tokens, K], from the last segment to the first."""
        training, work = self.training, self.work
        starts = training.starts
        values = torch.zeros(starts[-1], len(backs), dtype=torch.float64)
        work.progress.step(f"back through {len(training)} steps", len(training))
        key, done = piece_key("steps back", name), len(training)
        if work.pieces is not None and (found := work.pieces.load(key)) is not None:
            done, values = int(found["done"][0]), torch.from_numpy(found["values"].copy())
            for label, tensor in _labelled(backs):
                tensor.copy_(torch.from_numpy(found[label]))
            work.progress.advance(len(training) - done)
        for start in reversed(range(0, done, every)):
            stop = min(start + every, len(training))
            self._replay(states, start, stop)
            for step in reversed(range(start, stop)):
                state = training.enter(states.load(step))
                own = training.step_back(state, backs, hessian=self.how.hessian)
                for i, added in zip(training.plan[step], own, strict=True):
                    values[starts[i] : starts[i + 1]] += added
                if step != start:
                    states.drop(step)
                work.progress.advance(1)
            often = start and start % math.ceil(math.sqrt(len(training))) == 0
            if work.pieces is not None and often:  # one piece, replaced: the newest holds all before it
                arrays = {label: tensor.cpu().numpy() for label, tensor in _labelled(backs)}
                work.pieces.save(key, {**arrays, "values": values.numpy(), "done": np.array([start])})
        return values

    def _smooth(self, states: States, ended: Readings, found: np.ndarray, number: int) -> dict[str, Any]:
        """Train with weights 1 + h v and 1 + 2 h v, v normal: is the run smooth, and the derivative right.

        ``score``: metasmoothness, -1 to 1 (Engstrom et al., arXiv 2503.13751, definition 2). With d1 and d2 the changes
        of the final weights from each run to the next, the sum of |d1| sign(d1) sign(d2) over that of |d1|.
        ``targets``: what is predicted for the first change, h sum_i v_i dF/dw_i, and both measured ones.
        """
        training = self.training
        v = np.random.default_rng([training.recipe.seed, number]).standard_normal(len(training.ids))
        columns = [k for k, name in enumerate(self.targets.names) if name.pathway is None]  # what has a value
        predicted = SMALL * v @ self.targets.from_direct(np.add.reduceat(found, training.starts[:-1]))[:, columns]
        names = [self.targets.names[k] for k in columns]
        before = states.load(len(training)).parts["weights"]
        values, changes = [self._values(names, ended)], []
        self.work.progress.step("two trainings with other weights: is training smooth?", 2 * len(training))
        for times in (1, 2):
            training.weights = torch.from_numpy(1 + times * SMALL * v)
            training.enter(states.load(0))
            state = training.train(progress=self.work.progress)
            after = {name: weight.clone() for name, weight in state.parts["weights"].items()}
            changes.append({name: after[name] - before[name] for name in after})
            values.append(self._values(names, read_trained(self.problem, self.targets)))
            before = after
        training.weights = None
        one, two = changes
        size = sum(float(d.abs().sum(dtype=torch.float64)) for d in one.values())
        agree = sum(float((d * two[n].sign()).sum(dtype=torch.float64)) for n, d in one.items())
        rows = [
            {"target": str(name), "predicted": float(p), "measured": float(b - a), "measured_next": float(c - b)}
            for name, p, a, b, c in zip(names, predicted, *values, strict=True)
        ]
        return {"score": agree / size if size else 1.0, "h": SMALL, "targets": rows}

    def _values(self, names: Sequence[TargetName], readings: Readings) -> list[float]:
        return [value(name, readings, self.targets.readings) for name in names]

    def _replay(self, states: States, start: int, stop: int) -> None:
        """Make the states between two kept ones again, and see that the run ends where it did."""
        training = self.training
        if all(step in states for step in range(start, stop)):
            return
        state = training.enter(states.load(start))
        while state.step < stop:
            training.advance(state, states if state.step != start else None)
        differs = same_bits(state.parts["weights"], states.load(stop).parts["weights"])
        if differs is not None:
            raise UserError(
                "training is not the same when it is made again",
                value=f"{differs} after step {stop}",
                rule="the same weights, examples and kernels give the same bits",
                fix="set torch to deterministic kernels, or use --set model.device=cpu",
            )


def _labelled(backs: Sequence[Back]) -> list[tuple[str, Tensor]]:
    """Every tensor of some derivatives under a name of its own."""
    return [(f"{k} {name}", tensor) for k, back in enumerate(backs) for name, tensor in named(back.parts).items()]


def _back(training: Training, queries: dict[str, Tensor], k: int) -> Back:
    """The derivative of a target in the final state: in its weights (the query's memory), and in nothing else."""
    parts = training.begin().parts
    for name, weight in parts["weights"].items():
        parts["weights"][name] = queries[name][k].to(weight) if name in queries else torch.zeros_like(weight)
    return Back(parts)
