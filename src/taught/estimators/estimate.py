"""From a policy and examples to all effects of a run, by either estimator, in one form.

    shift     dW on both pathways, [P, d]          (docs/methods.md, coefficients)
    score     S = sum_j dW_j W_j per pathway, [2, P]
    mean_y    change of the mean of y per group, [P]
    dy        change of y of every prompt, [P, N]

All are changes per one SGD step at the study's learning rate; positive: training on the example raises
the quantity.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from taught.core.example import Example, example_losses, refuse_nonfinite
from taught.core.target import combine_raw_x, cotangents, mean_y_target, raw_x_targets, score_targets
from taught.environment import return_freed_memory
from taught.estimators.adjoint import Problem, feature_effects, feature_steps, target_effects
from taught.estimators.every_prompt import prompt_effects, prompt_steps
from taught.estimators.finite_step import Step, finite_steps
from taught.estimators.forward import tangents
from taught.estimators.token_shares import token_effects
from taught.model.blockwise import split_sites
from taught.model.readout import read_prompts
from taught.policy.ridge import Policy, Shift, coefficient_shift, exact_shift, pathway_sums, score
from taught.run.pieces import Pieces
from taught.sketches.answer import SketchError

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Effects:
    """Effects of one step on each example.

    Attributes
    ----------
    example_ids : P ids
    estimator : "adjoint", "finite-step", "forward" or "sketch"
    losses : float64 [P], before the step
    score : float64 [2, P], pathways x and y
    mean_y : group -> float64 [P]
    shift : Shift with x and y float64 [P, d], or None
    dy : float64 [P, N] in the policy's order of prompts, or None
    dX : float32 [len(detailed), N, d], or None: change of each feature on each prompt, by forward
    detailed : ids of the examples that dX is about
    error : standard errors of all of it (sketch), or None
    """

    example_ids: tuple[str, ...]
    estimator: str
    losses: Floats
    score: Floats
    mean_y: Mapping[str, Floats]
    shift: Shift | None
    dy: Floats | None
    dX: NDArray[np.float32] | None = None
    detailed: tuple[str, ...] = ()
    error: SketchError | None = None

    def values(self, target: str, column: int | None, group: str | None, pathway: str) -> Floats:
        """One target's effects, float64 [P]."""
        if target == "mean_y":
            assert group is not None
            return self.mean_y[group]
        if target == "score":
            parts = {"x": self.score[0], "y": self.score[1], "total": self.score.sum(0)}
            return parts[pathway]
        assert self.shift is not None and column is not None
        x, y = self.shift.x[:, column], self.shift.y[:, column]
        return x if pathway == "x" else y if pathway == "y" else x + y

    def errors(self, target: str, column: int | None, group: str | None, pathway: str) -> Floats | None:
        """Standard errors of one target's effects, float64 [P]; None where they are exact."""
        return None if self.error is None else self.error.of(target, column, group, pathway)


def adjoint_effects(
    problem: Problem,
    examples: Sequence[Example],
    policy: Policy,
    groups: Mapping[str, Sequence[str]],
    *,
    coefficients: bool,
    progress: Any,
    pieces: Pieces | None = None,
) -> Effects:
    """All effects in reverse mode. ``groups``: group -> ids of its prompts."""
    losses = example_losses(problem.model, examples, problem.batch_tokens)
    if not coefficients:
        return _few_targets(problem, examples, policy, groups, losses, progress)
    # What cannot be done block by block is said before the long part.
    split_sites(problem.model, problem.parameters)
    targets = raw_x_targets(policy)
    progress.step("features: gradients of X", feature_steps(problem, len(examples), len(targets)))
    X = torch.from_numpy(policy.X.copy()) if problem.X is None else problem.X
    F = feature_effects(problem, examples, [t.A for t in targets], X, progress=progress, pieces=pieces)
    return_freed_memory()
    progress.step("prompts: gradients of y", prompt_steps(problem, examples))
    dy = prompt_effects(problem, examples, progress=progress, pieces=pieces).numpy()
    shift = pathway_sums(policy, combine_raw_x(policy, F.numpy()), dy @ policy.Xc)
    return _effects("adjoint", examples, policy, groups, shift, dy, losses.numpy())


def _few_targets(
    problem: Problem,
    examples: Sequence[Example],
    policy: Policy,
    groups: Mapping[str, Sequence[str]],
    losses: torch.Tensor,
    progress: Any,
) -> Effects:
    """Score and group means only: one query gradient each."""
    progress.step("targets: gradients", None)
    values = few_effects(problem, examples, policy, groups, progress=progress).numpy()
    return Effects(
        tuple(p.id for p in examples),
        "adjoint",
        losses.numpy(),
        values[:, :2].T.copy(),
        {g: values[:, 2 + i] for i, g in enumerate(groups)},
        None,
        None,
    )


def few_effects(
    problem: Problem,
    examples: Sequence[Example],
    policy: Policy,
    groups: Mapping[str, Sequence[str]],
    *,
    progress: Any = None,
) -> torch.Tensor:
    """Exact effects on the score along pathways x and y and on each group's mean y: [P, 2 + G]."""
    A, B = _few_cotangents(policy, groups)
    effects, _ = target_effects(problem, examples, A, B, progress=progress)
    refuse_nonfinite(examples, range(len(examples)), effects, "gradient")
    return effects


def _few_cotangents(policy: Policy, groups: Mapping[str, Sequence[str]]) -> tuple[torch.Tensor, torch.Tensor]:
    """A and B of the score along pathways x and y and of each group's mean y."""
    group_of = {i: name for name, ids in groups.items() for i in ids}
    names = [group_of[i] for i in policy.prompt_ids]
    targets = [*score_targets(policy), *(mean_y_target(policy.prompt_ids, names, g) for g in groups)]
    A, B = cotangents(targets, policy)
    return torch.from_numpy(A), torch.from_numpy(B)


def strongest_shares(
    problem: Problem,
    examples: Sequence[Example],
    policy: Policy,
    groups: Mapping[str, Sequence[str]],
    effects: Effects,
    top: int,
    *,
    progress: Any,
) -> list[tuple[Example, Floats]]:
    """Shares of the response tokens of the ``top`` examples by absolute score.

    Returns
    -------
    For each of these examples float64 [n_response, 1 + G]: in the score, both pathways together, and
    in each group's mean y. Exact: for a sketch their sum is not its estimate.
    """
    chosen = _strongest(examples, effects, top)
    if not chosen:
        return []
    progress.step("shares of response tokens", None)
    A, B = (torch.cat([part[:2].sum(0, keepdim=True), part[2:]]) for part in _few_cotangents(policy, groups))
    shares = token_effects(problem, chosen, A, B)
    return [(example, share.numpy()) for example, share in zip(chosen, shares, strict=True)]


def finite_step_effects(
    problem: Problem,
    examples: Sequence[Example],
    policy: Policy,
    groups: Mapping[str, Sequence[str]],
    *,
    coefficients: bool,
    progress: Any,
    pieces: Pieces | None = None,
) -> Effects:
    """All effects by the published loop; one piece per example, so that it can be resumed."""
    del coefficients  # every coefficient falls out of each step
    rows = _steps(problem, examples, policy, progress, pieces)
    shift = Shift(np.stack([rows[p.id]["x"] for p in examples]), np.stack([rows[p.id]["y"] for p in examples]))
    dy = np.stack([rows[p.id]["dy"] for p in examples])
    losses = np.array([float(rows[p.id]["loss"][0]) for p in examples])
    return _effects("finite-step", examples, policy, groups, shift, dy, losses)


def jvp_effects(
    problem: Problem,
    examples: Sequence[Example],
    policy: Policy,
    groups: Mapping[str, Sequence[str]],
    *,
    coefficients: bool,
    progress: Any,
    pieces: Pieces | None = None,
) -> Effects:
    """All effects in forward mode, with every feature on every prompt; one piece per example."""
    del coefficients  # every coefficient falls out of dX and dy
    losses = example_losses(problem.model, examples, problem.batch_tokens)
    progress.step("forward mode", len(examples))
    dX = np.zeros((len(examples), policy.n, policy.d), dtype=np.float32)
    dy = np.zeros((len(examples), policy.n))
    x, y = (np.zeros((len(examples), policy.d)) for _ in range(2))
    for i, example in enumerate(examples):
        moved = _tangent(problem, example, progress, pieces)
        shift = coefficient_shift(policy, moved["dX"], moved["dy"])
        dX[i], dy[i], x[i], y[i] = moved["dX"], moved["dy"], shift.x, shift.y
    made = _effects("forward", examples, policy, groups, Shift(x, y), dy, losses.numpy())
    return replace(made, dX=dX, detailed=made.example_ids)


def _tangent(problem: Problem, example: Example, progress: Any, pieces: Pieces | None) -> dict[str, Floats]:
    key = _key(example.id, "tangent")
    found: dict[str, Floats] | None = pieces.load(key) if pieces is not None else None
    if found is not None:
        progress.advance(1)
        return found
    (tangent,) = tangents(problem, [example], progress=progress)
    arrays = {"dX": tangent.dX.numpy(), "dy": tangent.dy.numpy()}
    if pieces is not None:
        pieces.save(key, arrays)
    return arrays


ESTIMATORS = {"adjoint": adjoint_effects, "finite-step": finite_step_effects, "forward": jvp_effects}


def _effects(
    estimator: str,
    examples: Sequence[Example],
    policy: Policy,
    groups: Mapping[str, Sequence[str]],
    shift: Shift,
    dy: Floats,
    losses: Floats,
) -> Effects:
    for part in (shift.x, shift.y, dy):
        refuse_nonfinite(examples, range(len(examples)), torch.from_numpy(part), "gradient")
    row = {prompt_id: i for i, prompt_id in enumerate(policy.prompt_ids)}
    mean_y = {g: dy[:, [row[i] for i in ids]].mean(1) for g, ids in groups.items()}
    S = np.stack([shift.x @ policy.coef, shift.y @ policy.coef])
    return Effects(tuple(p.id for p in examples), estimator, losses, S, mean_y, shift, dy)


def _steps(
    problem: Problem, examples: Sequence[Example], policy: Policy, progress: Any, pieces: Pieces | None
) -> dict[str, dict[str, Floats]]:
    """For each example: x, y [d] linear shifts, exact [d] refit shift, dy [N], loss [1]."""
    rows: dict[str, dict[str, Floats]] = {}
    for example in examples:
        found = pieces.load(_key(example.id)) if pieces is not None else None
        if found is not None:
            rows[example.id] = found
    todo = [example for example in examples if example.id not in rows]
    progress.step("finite steps", len(todo))
    if not todo:
        return rows
    baseline = read_prompts(problem.model, problem.prompts, problem.behavior, problem.block)
    for step in finite_steps(problem, todo, baseline, progress=progress):
        rows[step.example_id] = _step_row(policy, step)
        if pieces is not None:
            pieces.save(_key(step.example_id), rows[step.example_id])
    return rows


def _key(example_id: str, kind: str = "step") -> str:
    return f"{kind}-" + hashlib.sha256(example_id.encode()).hexdigest()[:24]


def _step_row(policy: Policy, step: Step) -> dict[str, Floats]:
    dX, dy = step.dX.numpy(), step.dy.numpy()
    shift = coefficient_shift(policy, dX, dy)
    exact = exact_shift(policy, step.dX_exact.numpy(), dy)
    return {"x": shift.x, "y": shift.y, "exact": exact, "dy": dy, "loss": np.array([step.loss])}


def step_checks(
    problem: Problem,
    examples: Sequence[Example],
    policy: Policy,
    effects: Effects,
    top: int,
    *,
    progress: Any,
    pieces: Pieces | None = None,
) -> dict[str, dict[str, float]]:
    """Finite step and exact refit for the ``top`` examples by absolute score, beside the linear value.

    Returns
    -------
    example id -> {"step_score", "refit_score"}; the refit re-encodes X and solves the ridge again.
    """
    everything = effects.estimator == "finite-step"
    chosen = _strongest(examples, effects, len(examples) if everything else top)
    if not chosen:
        return {}
    rows = _steps(problem, chosen, policy, progress, pieces)
    return {
        example.id: {
            "step_score": float(score(policy, rows[example.id]["x"] + rows[example.id]["y"])),
            "refit_score": float(score(policy, rows[example.id]["exact"])),
        }
        for example in chosen
    }


def exact_details(
    problem: Problem,
    examples: Sequence[Example],
    policy: Policy,
    effects: Effects,
    top: int,
    *,
    progress: Any,
    pieces: Pieces | None = None,
) -> tuple[Effects, dict[str, dict[str, float]]]:
    """Forward mode for the ``top`` examples of a ranking that is estimated.

    Returns
    -------
    effects : with dX of these examples
    example id -> {"exact_score"}
    """
    chosen = _strongest(examples, effects, top)
    progress.step("forward mode", len(chosen))
    found = {example.id: _tangent(problem, example, progress, pieces) for example in chosen}
    shifts = {i: coefficient_shift(policy, arrays["dX"], arrays["dy"]) for i, arrays in found.items()}
    if not found:
        return effects, {}
    dX = np.stack([arrays["dX"] for arrays in found.values()]).astype(np.float32)
    scores = {i: {"exact_score": float(score(policy, shift.total))} for i, shift in shifts.items()}
    return replace(effects, dX=dX, detailed=tuple(found)), scores


def _strongest(examples: Sequence[Example], effects: Effects, top: int) -> list[Example]:
    order = np.argsort(-np.abs(effects.score.sum(0)), kind="stable")
    return [examples[i] for i in order[:top]]
