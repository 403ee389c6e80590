"""Targets: the questions asked of a training example, as functionals with their cotangents.

A target is linear in the changes that a training step makes to the read-outs,

    dF = sum_ik A_ik dX_ik + sum_i B_i dy_i,    A = dF/dX [N, d],  B = dF/dy [N]

with A and B constants of the policy. An estimator turns A and B into one query gradient; it need
not know which question it answers. With u_j = U^-1 e_j, dW_j = u_j' (dX' r - Xc' dX W) + u_j' Xc'
dy, so

    coefficient j:  u = U^-1 e_j,   score S = sum_j W_j dW_j:  u = U^-1 W
    pathway x:      A = r u' - (Xc u) W'
    pathway y:      B = Xc u

Sign: positive raises the target when the model is trained on the example. The formulas hold with and
without an intercept (see ``taught.policy.ridge``). Source: SMDA, arXiv 2606.29171, in adjoint
form.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal, overload

import numpy as np
from numpy.typing import ArrayLike, NDArray

from taught.errors import UserError
from taught.policy.ridge import Floats, Policy

Kind = Literal["score", "coefficient", "mean_y", "raw_x", "concept"]


@dataclass(frozen=True, eq=False)
class Target:
    """One functional of the read-outs. Rows of A and B are prompts in the order of ``prompt_ids``.

    Attributes
    ----------
    name : str
        Unique among the targets of a run, such as ``coefficient:17:x``.
    kind : {"score", "coefficient", "mean_y", "raw_x", "concept"}
        ``raw_x`` are intermediate sums (:func:`raw_x_targets`), not questions of their own. Of a
        ``concept`` X holds read-outs of concepts, not of features.
    feature_id, group
        What the target is about; None unless ``coefficient`` or ``raw_x``, and ``mean_y``.
    pathway : {"x", "y"}
        Whether it acts through the features or through the output probability.
    A : float64 [N, d] or None
        dF/dX. None stands for zero.
    B : float64 [N] or None
        dF/dy. None stands for zero.
    """

    name: str
    kind: Kind
    feature_id: int | None
    group: str | None
    pathway: Literal["x", "y"]
    A: Floats | None
    B: Floats | None
    prompt_ids: tuple[str, ...]

    def inner(self, dX: ArrayLike, dy: ArrayLike) -> float:
        """Return dF = <A, dX> + <B, dy> for dX [N, d] and dy [N]."""
        x = 0.0 if self.A is None else float(np.vdot(self.A, np.asarray(dX, dtype=np.float64)))
        y = 0.0 if self.B is None else float(np.vdot(self.B, np.asarray(dy, dtype=np.float64)))
        return x + y


def score_targets(policy: Policy) -> list[Target]:
    """Ask for the score S = sum_j dW_j W_j along pathway x and pathway y, in this order."""
    return _along(policy, policy.solve(policy.coef), "score", None)


def coefficient_targets(policy: Policy, feature_id: int) -> list[Target]:
    """Ask for the coefficient of one feature along pathway x and pathway y, in this order."""
    unit = np.zeros(policy.d)
    unit[policy.column(feature_id)] = 1.0
    return _along(policy, policy.solve(unit), "coefficient", int(feature_id))


def mean_y_target(prompt_ids: Sequence[str], groups: Sequence[str], group: str) -> Target:
    """Ask for the mean behavior of one group: B_i = 1 / n_g on its prompts, 0 elsewhere."""
    if len(prompt_ids) != len(groups):
        raise UserError(
            "Every prompt needs a group",
            value=f"{len(prompt_ids)} prompt ids, {len(groups)} groups",
            rule="as many groups as prompt ids",
        )
    inside = np.array([name == group for name in groups], dtype=np.float64)
    if not inside.any():
        raise UserError(
            "No prompt is in this group",
            value=group,
            rule="one of: " + ", ".join(sorted(set(groups))),
            fix="set prompts: positive_group and negative_group",
        )
    B = inside / inside.sum()
    return Target(f"mean_y:{group}:y", "mean_y", None, group, "y", None, B, tuple(prompt_ids))


def concept_targets(prompt_ids: Sequence[str], names: Sequence[str], inside: ArrayLike | None = None) -> list[Target]:
    """Ask for the mean read-out of each concept: A_ic = 1 / n on n prompts, 0 elsewhere.

    Parameters
    ----------
    names
        Names of the concepts, in the order of the columns of X.
    inside : bool [N]
        The prompts that the mean is over; None for all.
    """
    chosen = np.ones(len(prompt_ids), bool) if inside is None else np.asarray(inside, bool)
    if chosen.shape != (len(prompt_ids),) or not chosen.any():
        raise UserError(
            "A concept is read on some of the prompts",
            value=f"{int(chosen.sum())} of {len(prompt_ids)} prompts",
            rule="one prompt at least",
            fix="name a group that has prompts",
        )
    targets = []
    for column, name in enumerate(names):
        A = np.zeros((len(prompt_ids), len(names)))
        A[chosen, column] = 1.0 / chosen.sum()
        targets.append(Target(f"concept:{name}", "concept", None, None, "x", A, None, tuple(prompt_ids)))
    return targets


def cotangents(targets: Sequence[Target], policy: Policy) -> tuple[Floats, Floats]:
    """A [K, N, d] and B [K, N] of K targets, float64; zeros where a target has none."""
    A = np.stack([np.zeros_like(policy.X) if t.A is None else t.A for t in targets])
    B = np.stack([np.zeros(policy.n) if t.B is None else t.B for t in targets])
    return A, B


class RawXTargets(Sequence[Target]):
    """The targets of :func:`raw_x_targets`, made one at a time: all take N d^2 numbers."""

    def __init__(self, policy: Policy) -> None:
        self._policy = policy

    def __len__(self) -> int:
        return self._policy.d + int(self._policy.fit_intercept)

    @overload
    def __getitem__(self, index: int) -> Target: ...
    @overload
    def __getitem__(self, index: slice) -> list[Target]: ...
    def __getitem__(self, index: int | slice) -> Target | list[Target]:
        numbers = range(len(self))[index]
        return self._make(numbers) if isinstance(numbers, int) else [self._make(k) for k in numbers]

    def _make(self, k: int) -> Target:
        policy = self._policy
        if k == policy.d:
            A = np.outer(np.ones(policy.n), policy.coef)
            return Target("raw_x:sum", "raw_x", None, None, "x", A, None, policy.prompt_ids)
        A = -np.outer(policy.X[:, k], policy.coef)
        A[:, k] += policy.residual
        feature = int(policy.feature_ids[k])
        return Target(f"raw_x:{feature}", "raw_x", feature, None, "x", A, None, policy.prompt_ids)


def raw_x_targets(policy: Policy) -> RawXTargets:
    """Make a sparse basis from which every coefficient's x pathway follows.

    For feature k, A = r e_k' - X_k W' with X_k uncentred. Where feature k is inactive, X_ik = 0
    and the gate makes dX_ik = 0, so that prompt needs no backward pass for this target. Centring
    would fill those zeros; with an intercept one more target, A = 1 W' (its value: sum_i s_i),
    carries the mean instead.

    Returns
    -------
    Sequence of d targets, or d + 1 with an intercept, in the order of ``policy.feature_ids``.
    """
    return RawXTargets(policy)


def combine_raw_x(policy: Policy, F: ArrayLike) -> Floats:
    """Sum up x_raw [P, d] for ``pathway_sums`` from F [P, d (+ 1)], raw_x_targets' values.

    With an intercept x_raw_k = F_k + mean_i(X_ik) F_extra, because Xc_ik = X_ik - mean(X_k);
    without one x_raw = F.
    """
    F = np.asarray(F, dtype=np.float64)
    if F.ndim != 2 or F.shape[1] != policy.d + int(policy.fit_intercept):
        raise UserError(
            "The values do not fit raw_x_targets",
            value=f"F {list(F.shape)}",
            rule=f"[P, {policy.d + int(policy.fit_intercept)}]: one column per target",
        )
    if not policy.fit_intercept:
        return F
    sums: NDArray[np.float64] = F[:, :-1] + F[:, -1:] * policy.X.mean(0)
    return sums


def _along(policy: Policy, u: Floats, kind: Kind, feature_id: int | None) -> list[Target]:
    """Make both pathways of the functional sum_j c_j dW_j with u = U^-1 c."""
    Xu = policy.Xc @ u
    A = np.outer(policy.residual, u) - np.outer(Xu, policy.coef)
    stem = kind if feature_id is None else f"{kind}:{feature_id}"
    return [
        Target(f"{stem}:x", kind, feature_id, None, "x", A, None, policy.prompt_ids),
        Target(f"{stem}:y", kind, feature_id, None, "y", None, Xu, policy.prompt_ids),
    ]
