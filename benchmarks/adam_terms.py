"""Which part of what an example does through AdamW foresees training without it?

    python -m benchmarks.adam_terms [--truth benchmarks/results/through_training_64_truth.json]
        [--target behavior:harmless]

The run of a truth of ``benchmarks.through_training`` (64 examples, 8 steps of 8, AdamW, 2e-5, all parameters) is gone
back over with every later gradient held, so that an example acts through the optimizer alone. Printed is the rank
correlation with what leaving out the truth's random sets did, for

    rule        the optimizer's derivative: through the first moments m, and through the second ones v
    without v   its part through m alone
    own step    grad l . q / sqrt(v) with v behind the example's own step; q the target's gradient at the final model
    whole run   the same with the mean of 1 / sqrt(v) over all steps
"""

from __future__ import annotations

import argparse
import json
from pathlib import Path
from tempfile import TemporaryDirectory

import torch

from benchmarks.through_training import foreseen, prepared_for
from taught.core.names import TargetName
from taught.core.target import TargetSet
from taught.training.loop import in_training
from taught.training.steps import BETAS, EPS, Back, State, States, Tensors, Training
from taught.trajectories.trained import known_recipe, read_trained, trained_queries

TRUTH = Path(__file__).parent / "results" / "through_training_64_truth.json"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--truth", type=Path, default=TRUTH)
    parser.add_argument("--target", default="behavior:harmless")
    args = parser.parse_args()
    truth = json.loads(args.truth.read_text())
    ready = prepared_for(truth, args.target)
    targets = TargetSet((TargetName.parse(args.target),), ready.readings)
    plain = known_recipe(ready.problem)
    assert plain.method == "full" and plain.max_grad_norm is None
    with in_training(ready.problem.model, plain, None), TemporaryDirectory() as folder:
        training = Training(ready.problem.model, ready.inputs, plain)
        with training.ready():
            states = States(Path(folder) / "states")
            training.train(states)
            query = trained_queries(ready.problem, targets, read_trained(ready.problem, targets))
            found = terms(training, states, {name: query.pop(name)[0] for name in training.moving})
    for term, of in found.items():
        row = foreseen(truth, args.target, of)
        print(f"{term:10} LDS {row['sets, Spearman']:.3f} over {row['sets']} sets")


def terms(training: Training, states: States, q: Tensors) -> dict[str, dict[str, float]]:
    """Each term for every example, by id; changes of the target but for a factor that all examples share."""
    steps = len(training)
    mean = zeros(q)
    for step in range(steps):
        for name, p in scale(states.load(step + 1)).items():
            mean[name] += p / steps
    back = Back({"weights": {n: w.clone() for n, w in q.items()}, "first": zeros(q), "second": zeros(q)})
    alone = Back({"weights": {n: w.clone() for n, w in q.items()}, "first": zeros(q), "second": zeros(q)})
    found: dict[str, dict[str, float]] = {term: {} for term in ("rule", "without v", "own step", "whole run")}
    for step in reversed(range(steps)):
        state, behind = training.enter(states.load(step)), scale(states.load(step + 1))
        gradient = training._gradient(step)
        ups = {"rule": training._through_rule(back, state, gradient)}
        training._through_rule(alone, state, gradient)
        ups["without v"] = {n: (1 - BETAS[0]) / BETAS[0] * m for n, m in alone.parts["first"].items()}
        alone.parts["second"] = zeros(q)
        ups["own step"] = {n: -p * q[n] for n, p in behind.items()}
        ups["whole run"] = {n: -p * q[n] for n, p in mean.items()}
        for i in training.plan[step]:
            own = Training(training.model, [training.inputs[i]], training.recipe)._gradient(0)
            for term, up in ups.items():
                value = sum(float(torch.dot(own[n].flatten(), up[n].flatten())) for n in own)
                found[term][training.ids[i]] = found[term].get(training.ids[i], 0.0) + value
    return found


def zeros(like: Tensors) -> Tensors:
    return {name: torch.zeros_like(tensor) for name, tensor in like.items()}


def scale(state: State) -> Tensors:
    """1 / (sqrt(v) + eps) with bias correction; 0 where no gradient has come."""
    correction = 1 - BETAS[1] ** state.step
    second = state.parts["second"].items()
    return {n: torch.where(v > 0, 1 / ((v / correction).sqrt() + EPS), 0.0) for n, v in second}


if __name__ == "__main__":
    main()
