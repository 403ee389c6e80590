"""Through a training run in a few segments (SOURCE, Bae et al., arXiv 2405.12186).

    effect(F, z) = dF(theta_T) / dw_z,    theta_T = training(w),    w = 1

as in :mod:`taught.trajectories.steps`, and approximate: a run is cut into segments l = 1 .. L, and within one the
Hessian H of the training loss (sum over examples of p_z L_z) and the gradient of an example stay what they are on the
mean over some of its states. p_z is the share of z in the loss of a step, on the mean over the run: 1 / N where all are
seen alike; in the short last batch of an epoch an example's share is larger.

A step of gradient descent is theta' = theta - eta (grad + lambda theta): what came before it is multiplied by
1 - eta (H + lambda), and the weight of z adds -eta p_z grad L_z. Over K steps of a mean rate eta, with the product of
the factors as an exponential (appendix B of the paper; lambda is added to H, which it does not change),

    S_l = exp(-eta K (H + lambda)),    r_l = sum_k eta S^(k/K) grad L_z = (1 - S_l) (H + lambda)^-1 grad L_z
    dtheta_T / dw_z = - p_z sum over l of S_L ... S_(l+1) r_l

so the query goes from the end of training to its beginning, q = grad F(theta_T) at the end, and for l = L .. 1

    effect -= p_z < (1 - S_l)(H + lambda)^-1 q, mean of grad L_z >;    q <- S_l q

H is EK-FAC's (:mod:`taught.curvatures.ekfac`), with A and S summed over the segment's states and Lambda averaged in the
basis that they have in common. There both factors are diagonal, with eigenvalue s: exp(-x) and eta K (1 - exp(-x)) / x,
x = eta K (s + lambda). The second tends to eta K where x is small: nothing is divided by a small number, and nothing is
damped. A query is turned into the basis of a segment and back.

 - **Schedule**: eta K is the sum of the learning rates of the segment's steps.
 - **Momentum** mu: a gradient moves the weights by eta, mu eta, mu^2 eta, ...: in all eta / (1 - mu).
 - **Clipping**: a step's rate is eta c with c what its gradient was scaled by. That c depends on w is left out.
 - **AdamW** divides a step by sqrt(v) + eps =: 1 / P, v the second moments with bias correction, and its decay is not
   divided. A factor is 1 - eta (P H + lambda), so S = exp(-eta K (P H + lambda)) and
   r = (1 - S)(P H + lambda)^-1 P grad L_z. Here H is its diagonal, for all that moves, so that S and r are a number a
   weight, and r tends to eta K P grad L_z where x = eta K (P h + lambda) is small. The diagonal is h = B v, with B the
   examples of a step: the mean square of an example's gradient is at most that. (The paper has a diagonal in the
   exponential and EK-FAC's damped inverse outside. Where x is small these do not cancel: what should be eta K P is
   eta K P h (H + damping)^-1.)
   v is taken on the mean over the states of the *whole* run, for two reasons. v is a mean over all steps so far, so it
   says little of one segment. And while it is young its root is small and P large, but then what an example adds to v
   takes back most of what it adds to the step; that v depends on w is left out. Where v is 0 at every state no
   gradient has come, and P is 0.

With gradient descent only weights of linear layers inside the model's blocks have an H. Everything else moves in
training and has no part in the effects, as with the curvature ``ekfac``.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import cached_property, partial
from itertools import pairwise
from typing import ClassVar

import numpy as np
import torch
from torch import Tensor, nn

from taught.core import rules
from taught.core.curvature import Curvature, Identity, Metric
from taught.core.estimator import Work
from taught.core.example import Examples, example_losses, weighed
from taught.core.problem import GB, Problem
from taught.core.query import queries_at_once
from taught.core.registry import TRAJECTORIES, setting
from taught.core.scores import Scores
from taught.core.target import TargetSet
from taught.core.trajectory import Queries
from taught.curvatures.ekfac import Ekfac, Layers, curved_layers, fit_ekfac
from taught.errors import UserError
from taught.estimators.adjoint import contract_examples
from taught.estimators.cost import Asked, Passes
from taught.estimators.finite_step import restored
from taught.model.gradients import find_sites, frozen, refuse_detached
from taught.model.parameters import moving_parameters
from taught.run.pieces import kept, piece_key
from taught.training.loop import in_training
from taught.training.recorded import Recorded
from taught.training.steps import BETAS, EPS, State, States, Training, named
from taught.trajectories.trained import (
    enter,
    known_recipe,
    moving_bytes,
    planned_steps,
    read_trained,
    states_folder,
    trained_queries,
)


@dataclass(frozen=True)
class Segment:
    """A stretch of a run.

    Attributes
    ----------
    rate : eta K, the sum of the rates of its steps, momentum and clipping included
    states : steps made before each of the states that its means are over
    """

    rate: float
    states: tuple[int, ...]


@dataclass(frozen=True, eq=False)
class Run:
    """A training run that is over.

    Attributes
    ----------
    segments : in the order of training
    states : weights, and for Adam the second moments with bias correction, of every state of a segment and of the last
    model : what they are the weights of
    moving : names of the parameters that the run moved
    steps : how many there were; also the name of the last state
    decay : lambda of each parameter
    batch : B, examples of a step, on the mean
    eps : Adam's epsilon; None: the optimizer is gradient descent
    """

    segments: tuple[Segment, ...]
    states: States | Recorded
    model: nn.Module
    moving: tuple[str, ...]
    steps: int
    decay: Mapping[str, float]
    batch: float
    eps: float | None

    def enter(self, step: int) -> None:
        """Put the weights of a state into the model."""
        enter(self.model, self.states.load(step).parts["weights"])

    @cached_property
    def adam(self) -> tuple[dict[str, Tensor], Layers]:
        """P and the diagonal of H, from the second moments on the mean over all states."""
        total: dict[str, Tensor] = {}
        steps = [step for segment in self.segments for step in segment.states]
        for step in steps:
            for name, of in self.states.load(step).parts["second"].items():
                total[name] = total[name] + of if name in total else of
        v = {name: of / len(steps) for name, of in total.items()}
        assert self.eps is not None
        P = {name: torch.where(of > 0, 1 / (of.sqrt() + self.eps), 0.0) for name, of in v.items()}
        return P, Layers({}, {name: self.batch * of for name, of in v.items()})


@dataclass(frozen=True, eq=False)
class Response:
    """What a segment makes of a query.

    Attributes
    ----------
    moved : makes P (1 - S)(P H + lambda)^-1 q, P = 1 with gradient descent
    survives : makes S q
    """

    moved: Metric
    survives: Metric

    @classmethod
    def of(cls, layers: Layers, rate: float, decay: Mapping[str, float], scale: Mapping[str, Tensor]) -> Response:
        """At a rate eta K; ``scale`` is P of AdamW, whose curvature has the parameters' own basis."""
        basis, moved, survives = layers.basis or None, {}, {}
        for name, s in layers.eigenvalues.items():
            P = scale[name].to(s) if scale else torch.ones_like(s)
            x = rate * (P * s + decay[name])
            moved[name] = torch.where(x > 0, -torch.expm1(-x) / x, 1.0) * rate * P
            survives[name] = torch.exp(-x)
        return cls(Metric(moved, basis), Metric(survives, basis))


@TRAJECTORIES.register("segments")
@dataclass(frozen=True)
class Segments:
    """The derivative of the trained model in every example's weight, a few segments of the run at a time."""

    segments: int = setting(3, rules.whole(1), "so many parts of the run have a curvature each")
    checkpoints: int = setting(2, rules.whole(1), "states of a segment that its gradients and curvature are means over")
    seed: int = setting(0, rules.whole(0), "of the labels that are drawn from the model, with SGD")
    run: str | None = setting(
        None, rules.optional(rules.folder()), "a run that taught.Record wrote, and all its states; null: it is made"
    )
    single: ClassVar[bool] = False
    carries: ClassVar[bool] = True
    asks: ClassVar[str] = (
        "what the training run did, roughly; good for naming what to drop. Exact, in several trainings, and only of a "
        "run by the study's recipe: --set attribution.trajectory=steps"
    )

    def refuses(self, curvature: Curvature) -> str | None:
        """A segment has a curvature of its own."""
        if not isinstance(curvature, Identity):
            return "a run that is followed in segments has the curvature of each segment, and its optimizer's metric"
        return None

    def follow(self, problem: Problem, examples: Examples, targets: TargetSet, work: Work) -> Scores:
        """Train, keep a few states, read the final model, go back a segment at a time.

        Cost: a training; for each kept state one pass of gradients over the examples, and with gradient descent a
        curvature by EK-FAC; one query a target.

        Raises
        ------
        UserError
            The recipe is not known or is trl's; there are more segments than steps; training diverges; the states do
            not fit on the disk; no linear layer of the blocks moves.
        """
        ids = tuple(z.id for z in examples)
        losses = example_losses(problem.model, examples, problem.batch_tokens).numpy()
        made = self._trained if self.run is None else self._recorded
        with made(problem, examples, work) as (run, moved, seen):
            values = _Pass(run, moved, seen, targets, work, self).values()
        return Scores("adjoint", ids, targets.names, targets.from_direct(values), losses=losses, unit="run")

    def seen(self, problem: Problem, examples: Examples, work: Work) -> Examples:
        """The examples as a recorded run saw them; refused is one of another model or data, or with too few states.

        Without one, refused is a run that could not be made or followed, or has fewer steps than segments.
        """
        if self.run is None:
            segment_states(planned_steps(problem, examples), self.segments, self.checkpoints)
            return examples
        run = Recorded.open(self.run)
        recorded_segments(run, self.segments)
        return run.seen(problem, examples, work.progress)

    @contextmanager
    def _recorded(self, problem: Problem, examples: Examples, work: Work) -> Iterator[tuple[Run, Problem, Examples]]:
        """A run, the problem with what moves in it, the examples as it weighs them; the weights come back."""
        run = Recorded.open(str(self.run))
        refuse_detached(problem.model)
        if run.record["precision"] != "float32":
            there, here = run.record["precision"], problem.model.dtype
            work.progress.note(f"the recorded run computed in {there}; gradients here are in {here}")
        scaled = int((run.arrays["scale"] < 1).sum())
        if scaled:
            work.progress.note(_clipped(scaled, run.steps))
        parts = recorded_segments(run, self.segments)
        with restored(problem.model, run.moving):
            batch = len(run.arrays["rows"]) / run.steps
            made = Run(parts, run, problem.model, run.moving, run.steps, run.decay, batch, run.eps)
            yield made, replace(problem, parameters=run.parameters(problem)), run.weighted(examples)

    @contextmanager
    def _trained(self, problem: Problem, examples: Examples, work: Work) -> Iterator[tuple[Run, Problem, Examples]]:
        """The same of the run that the study's recipe makes."""
        recipe = known_recipe(problem)
        refuse_detached(problem.model)
        with in_training(problem.model, recipe, problem.parameters) as patterns:
            training = Training(problem.model, examples, recipe, patterns, problem.batch_tokens)
            cut = segment_states(len(training), self.segments, self.checkpoints)
            size = training.moving_bytes * (2 if recipe.optimizer == "adamw" else 1)
            rule = f"the weights of {self.segments} times {self.checkpoints} states, for AdamW with second moments"
            with states_folder(work.folder, _on_disk(size, self, problem.memory_gb), rule) as folder:
                states = States(folder)
                shares = _train(training, {step for _, steps in cut for step in steps}, states, work)
                scaled = sum(share < 1 for share in shares)
                if scaled:
                    work.progress.note(_clipped(scaled, len(shares)))
                rates = [lr * share / (1 - recipe.momentum) for lr, share in zip(training.lrs, shares, strict=True)]
                run = Run(
                    tuple(Segment(sum(rates[i] for i in steps), kept) for steps, kept in cut),
                    states,
                    problem.model,
                    tuple(training.moving),
                    len(training),
                    dict.fromkeys(training.moving, recipe.weight_decay),
                    sum(map(len, training.plan)) / len(training),
                    EPS if recipe.optimizer == "adamw" else None,
                )
                p_z, N = training.shares(), len(examples)
                seen = [weighed(z, N * p_z[z.id]) for z in examples]
                yield run, replace(problem, parameters=None if patterns is None else tuple(patterns)), seen

    def cost(self, problem: Problem, examples: Examples, asked: Asked) -> dict[str, float]:
        """A training, for each state a pass of gradients, with SGD a curvature, and a query for each target.

        Targets that do not fit into memory together have gradients of their own.
        """
        passes, moving = Passes(problem, examples), self._moving(problem)
        one = passes.examples
        recorded = None if self.run is None else Recorded.open(self.run)
        there = self.segments * self.checkpoints if recorded is None else len(recorded.states)
        products = 2.0 * len(examples) * asked.queries * sum(p.numel() for p in moving.values())
        curvature = 0.0 if self._adam(problem) else Ekfac().cost(problem, examples, asked)["curvature"]
        groups = math.ceil(asked.queries / _at_once(replace(problem, parameters=tuple(moving))))
        return {
            **({"training": 3 * one * known_recipe(problem).epochs} if recorded is None else {}),
            **({"curvature": there * curvature} if curvature else {}),
            "gradients": there * (3 * one * groups + products),
            "targets": (1 + groups + 3 * asked.queries) * passes.trees,
        }

    def bytes(self, problem: Problem, examples: Examples, asked: Asked) -> tuple[int, int]:
        """Queries, a curvature with what it makes of them, and states; states, and the curvatures, on the disk."""
        curved = self._moving(problem)
        weights = sum(p.numel() for p in curved.values())
        numbers = weights if self._adam(problem) else Ekfac().numbers(problem)  # P and H; a curvature, twice
        if self.run is None:
            recipe = known_recipe(problem)
            size = moving_bytes(problem, recipe) * (2 if recipe.optimizer == "adamw" else 1)
            on_disk = _on_disk(size, self, problem.memory_gb)
            states = 0 if on_disk else (self.segments * self.checkpoints + 1) * size
        else:  # they are on the disk already, and the weights that the model has are kept beside one of them
            size, on_disk, states = 3 * sum(p.numel() * p.element_size() for p in problem.model.parameters()), 0, 0
        held = min(asked.queries, _at_once(replace(problem, parameters=tuple(curved))))
        memory = 4 * (2 * held * weights + 2 * numbers + 3 * weights) + size
        return memory + states, on_disk + (0 if self._adam(problem) else 4 * self.segments * numbers)

    def _adam(self, problem: Problem) -> bool:
        """Whether the run is one of AdamW."""
        return known_recipe(problem).optimizer == "adamw" if self.run is None else Recorded.open(self.run).adam

    def _moving(self, problem: Problem) -> dict[str, nn.Parameter]:
        """What the effects go through."""
        curved = problem.parameters if self._adam(problem) else curved_layers(problem.model, problem.parameters)
        return moving_parameters(problem.model, curved)


def segment_states(steps: int, segments: int, checkpoints: int) -> list[tuple[range, tuple[int, ...]]]:
    """The steps of each segment, and the states that its means are over: in the middle of equal parts of it.

    A state is named by the steps made before it. A segment of fewer steps than ``checkpoints`` has each of its states.

    Raises
    ------
    UserError
        There are more segments than steps.
    """
    if segments > steps:
        value, fix = f"{segments} segments, {steps} steps", f"use --set attribution.trajectory.segments={steps}"
        rule = "a segment is at least one step"
        raise UserError("a run has more segments than steps", value=value, rule=rule, fix=fix)
    found = []
    for part in _cut(steps, segments):
        middles = {part.start + (2 * k + 1) * len(part) // (2 * checkpoints) for k in range(checkpoints)}
        found.append((part, tuple(sorted(middles))))
    return found


def _cut(steps: int, segments: int) -> list[range]:
    """The steps of a run in segments of equal length."""
    ends = [number * steps // segments for number in range(segments + 1)]
    return [range(start, stop) for start, stop in pairwise(ends)]


def recorded_segments(run: Recorded, segments: int) -> tuple[Segment, ...]:
    """A recorded run in segments of equal length, each with those of its states that lie in it.

    Raises
    ------
    UserError
        No state lies in some segment; second moments are missing where Adam trained.
    """
    if run.adam and not run.record["moments"]:
        rule, fix = "a step of Adam is divided by their root", "record it with taught.Record(FOLDER, moments=True)"
        raise UserError("the recorded run has no second moments", value=str(run.folder), rule=rule, fix=fix)
    rates, found = run.rates, []
    for steps in _cut(run.steps, segments):
        states = tuple(step for step in run.states if step in steps)
        if not states:
            cuts = {k: _cut(run.steps, k) for k in range(1, segments)}
            most = max(k for k, cut in cuts.items() if all(any(step in part for step in run.states) for part in cut))
            raise UserError(
                "a segment of the recorded run has no state",
                value=f"{segments} segments of {run.steps} steps, states before {', '.join(map(str, run.states))}",
                rule="each segment holds one at least",
                fix=f"use --set attribution.trajectory.segments={most}",
            )
        found.append(Segment(float(rates[list(steps)].sum()), states))
    return tuple(found)


def _clipped(scaled: int, steps: int) -> str:
    return f"gradients were clipped at {scaled} of {steps} steps: their rates are scaled alike"


def _train(training: Training, wanted: set[int], states: States, work: Work) -> list[float]:
    """Train, keeping some states and the last: what each step's gradient was scaled by.

    The second moments of a state are those that its own step divides by: behind it, with bias correction.
    """
    shares = []
    work.progress.step(f"train, {len(training)} steps", len(training))
    with training.ready():
        state = training.begin()
        for step in range(len(training)):
            before = {name: w.clone() for name, w in state.parts["weights"].items()} if step in wanted else {}
            shares.append(training.advance(state))
            if before:
                correction = 1 - BETAS[1] ** state.step
                second = {name: v / correction for name, v in state.parts["second"].items()}
                states.save(State(step, {"weights": before, "second": second}))
            work.progress.advance(1)
        training.check_finite()
        states.save(State(len(training), {"weights": state.parts["weights"]}))
    return shares


def _on_disk(size: int, how: Segments, memory_gb: float) -> int:
    """What the states take on the disk: nothing where half of the memory is enough for them."""
    whole = (how.segments * how.checkpoints + 1) * size
    return 0 if whole <= memory_gb * GB / 2 else whole


def _at_once(problem: Problem) -> int:
    """How many targets go back through a run together, each with its query and what a segment makes of it."""
    return max(1, queries_at_once(problem) // 2)


@dataclass(eq=False)
class _Pass:
    """The way back through a run."""

    run: Run
    problem: Problem
    examples: Examples
    targets: TargetSet
    work: Work
    how: Segments
    fitted: dict[int, Layers] = field(default_factory=dict)

    def values(self) -> np.ndarray:
        """dF/dw of every example and every direct target: float64 [P, K]."""
        run, work = self.run, self.work
        if run.eps is None:
            curved = curved_layers(self.problem.model, self.problem.parameters)
            work.progress.note(
                f"EK-FAC: the effects are those through {len(curved)} linear layers of the blocks; "
                f"{len(run.moving) - len(curved)} other tensors that move have no curvature and no part in them"
            )
            self.problem = replace(self.problem, parameters=curved)
        run.enter(run.steps)
        ended = read_trained(self.problem, self.targets)
        names, room, parts = self.targets.direct, _at_once(self.problem), []
        for start in range(0, len(names), room):
            some = slice(start, min(start + room, len(names)))
            run.enter(run.steps)
            work.progress.step("gradients of the targets of the trained model", None)
            queries = trained_queries(self.problem, self.targets, ended, names[some])
            parts.append(self._back(queries, some))
        return torch.cat(parts, 1).numpy()

    def _back(self, queries: dict[str, Tensor], some: slice) -> Tensor:
        """Effects of all segments, from the last to the first: float64 [P, K]."""
        count = some.stop - some.start
        values = torch.zeros(len(self.examples), count, dtype=torch.float64)
        for number, segment in reversed(list(enumerate(self.run.segments))):
            scale, layers = ({}, self._layers(number)) if self.run.eps is None else self.run.adam
            response = Response.of(layers, segment.rate, self.run.decay, scale)
            moved: Queries = {name: q.clone() for name, q in queries.items()}
            response.moved.solve_queries(moved)
            key = f"segment {number} targets {some.start} {some.stop}"
            values += kept(self.work.pieces, key, partial(self._contract, number, segment, moved, count))
            survived: Queries = {**queries}  # the same tensors: they are divided in place
            response.survives.solve_queries(survived)
        return values

    def _contract(self, number: int, segment: Segment, queries: Queries, count: int) -> Tensor:
        """The mean over a segment's states of - <query, grad L> / N: float64 [P, K]."""
        model, progress, states = self.problem.model, self.work.progress, segment.states
        progress.step(f"segment {number + 1} of {len(self.run.segments)}: gradients", len(states) * len(self.examples))
        problem = replace(self.problem, lr=1 / (len(states) * len(self.examples)))
        total = torch.zeros(len(self.examples), count, dtype=torch.float64)
        for step in states:
            self.run.enter(step)
            with frozen(model):
                sites = find_sites(model, problem.parameters)
                total += contract_examples(problem, sites, self.examples, queries, count, progress)[0]
        return total

    def _layers(self, number: int) -> Layers:
        """The curvature of a segment of gradient descent: fitted once, and kept as a piece or in memory."""
        pieces, key = self.work.pieces, piece_key("segment curvature", str(number))
        found = None if pieces is None else pieces.load(key)
        if found is not None:
            parts = defaultdict[str, dict[str, Tensor]](dict)
            for label, array in found.items():
                part, _, name = label.partition(" ")
                parts[part][name] = torch.from_numpy(array).to(self.problem.model.get_parameter(name).device)
            rows, columns = parts["rows"], parts["columns"]
            return Layers({name: (rows[name], columns[name]) for name in rows}, parts["eigenvalues"])
        if number in self.fitted:
            return self.fitted[number]
        places = [partial(self.run.enter, step) for step in self.run.segments[number].states]
        where, seed = f"segment {number + 1} of {len(self.run.segments)}: ", self.how.seed
        layers = fit_ekfac(
            self.problem, self.examples, seed=seed, progress=self.work.progress, places=places, where=where
        )
        if pieces is None:
            self.fitted[number] = layers
        else:
            basis = layers.basis.items()
            sides = {"rows": {n: rows for n, (rows, _) in basis}, "columns": {n: columns for n, (_, columns) in basis}}
            arrays = named({**sides, "eigenvalues": dict(layers.eigenvalues)})
            pieces.save(key, {name: tensor.cpu().numpy() for name, tensor in arrays.items()})
        return layers
