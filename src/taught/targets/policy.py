"""The policy: its score and its coefficients, along both pathways (SMDA, arXiv 2606.29171, in adjoint form).

With u_j = U^-1 e_j, dW_j = u_j' (dX' r - Xc' dX W) + u_j' Xc' dy, so

    coefficient j:  u = U^-1 e_j,   score S = sum_j W_j dW_j:  u = U^-1 W
    pathway x:      A = r u' - (Xc u) W'
    pathway y:      B = Xc u

The formulas hold with and without an intercept (``taught.policy.ridge``).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from taught.core.names import TargetName
from taught.core.readings import Moves, Readings
from taught.core.registry import TARGETS
from taught.core.target import Cotangents, Floats, TargetKind
from taught.errors import UserError
from taught.policy.certificate import resampled_score
from taught.policy.ridge import Policy, Shift


class _OfPolicy(TargetKind):
    """A functional sum_j c_j dW_j of the coefficients' shift."""

    pathways = True
    reads: ClassVar[Literal["behavior", "policy", "concepts"]] = "policy"

    def weights(self, name: TargetName, policy: Policy) -> Floats:
        """C [d]."""
        raise NotImplementedError

    def value(self, name: TargetName, readings: Readings, base: Readings) -> float:
        """Sum of c_j (W_j - W_j of the base); c of the base."""
        if name.pathway is not None:
            what = "a pathway is a part of a derivative, and no value of a model"
            raise UserError(what, value=str(name), fix=f"use {name.along(None)}")
        policy, before = policy_of(readings), policy_of(base)
        return float((policy.coef - before.coef) @ self.weights(name, before))

    def cotangents(self, name: TargetName, readings: Readings) -> Cotangents:
        """The module's formulas; both pathways together where none is named."""
        return self.cotangents_at(name, readings, readings)

    def cotangents_at(self, name: TargetName, readings: Readings, base: Readings) -> Cotangents:
        """The same at other readings, with the c of the base."""
        policy = policy_of(readings)
        u = policy.solve(self.weights(name, policy_of(base)))
        Xu = policy.Xc @ u
        A = None if name.pathway == "y" else np.outer(policy.residual, u) - np.outer(Xu, policy.coef)
        return A, None if name.pathway == "x" else Xu

    def combine(self, name: TargetName, readings: Readings, moves: Moves) -> Floats | None:
        """Sum of c_j times the shift of each coefficient."""
        if moves.shift is None:
            return None
        found: Floats = _shift(name, moves.shift) @ self.weights(name, policy_of(readings))
        return found


class Score(_OfPolicy):
    """S = sum_j dW_j W_j: how far the coefficient vector moves along itself."""

    about: ClassVar[Literal["none", "needed", "optional"]] = "none"
    spelling = "score, score:x or score:y"
    instance = "score"

    def every(self, readings: Readings) -> list[str | None]:
        """The one score."""
        return [None]

    def weights(self, name: TargetName, policy: Policy) -> Floats:
        """W."""
        return policy.coef

    def resampled(
        self, name: TargetName, readings: Readings, dy: Floats, dX: Floats | None, counts: NDArray[np.int64]
    ) -> Floats | str:
        """Each resample has its own policy; pathway x needs dX of every feature."""
        if name.pathway != "y" and dX is None:
            return "resampled prompts need dX of every feature (--set attribution.estimator=forward)"
        x, y = resampled_score(policy_of(readings), counts, dy, None if name.pathway == "y" else dX)
        return y if x is None else x if name.pathway == "x" else x + y

    def words(self, name: TargetName) -> str:
        """In words."""
        return "score S" + _along(name)


class Coefficient(_OfPolicy):
    """One coefficient of the policy, by the id of its feature."""

    many = True
    spelling = "coefficient:ID, with :x or :y for one pathway"
    instance = "coefficient:17"

    def every(self, readings: Readings) -> list[str | None]:
        """All features of the policy."""
        return list(map(str, policy_of(readings).feature_ids.tolist()))

    def weights(self, name: TargetName, policy: Policy) -> Floats:
        """The unit vector of the feature."""
        text = str(name.about)
        if not text.isdecimal():
            fix = f"for example {self.instance}"
            raise UserError("a feature is named by its id", value=str(name), rule=self.spelling, fix=fix)
        unit = np.zeros(policy.d)
        unit[policy.column(int(text))] = 1.0
        return unit

    def combine(self, name: TargetName, readings: Readings, moves: Moves) -> Floats | None:
        """The feature's column of the shift."""
        if moves.shift is None:
            return None
        return _shift(name, moves.shift)[:, int(np.flatnonzero(self.weights(name, policy_of(readings)))[0])]

    def words(self, name: TargetName) -> str:
        """In words."""
        return f"coefficient of feature {name.about}" + _along(name)


def policy_of(readings: Readings) -> Policy:
    """The policy of some readings.

    Raises
    ------
    UserError
        There is none.
    """
    if readings.policy is None:
        rule = "a policy is written in the features of an SAE"
        raise UserError("this run has no policy", rule=rule, fix="set sae.path in the study")
    return readings.policy


def _shift(name: TargetName, shift: Shift) -> Floats:
    """The shift of the coefficients along the target's pathway, or both."""
    return {"x": shift.x, "y": shift.y}.get(name.pathway or "", shift.total)


def _along(name: TargetName) -> str:
    return {"x": ", through the features", "y": ", through the output"}.get(name.pathway or "", "")


class RawX(Sequence[NDArray[np.float64]]):
    """A sparse basis from which every coefficient's x pathway follows: A of d (+ 1) functionals of X.

    For feature k, A = r e_k' - X_k W' with X_k uncentred. Where feature k is inactive, X_ik = 0 and the gate makes
    dX_ik = 0, so that prompt needs no backward pass for this one. Centring would fill those zeros; with an intercept
    one more, A = 1 W' (its value: sum_i s_i), carries the mean instead. Made one at a time: all take N d^2 numbers.
    """

    def __init__(self, policy: Policy) -> None:
        self._policy = policy

    def __len__(self) -> int:
        return self._policy.d + int(self._policy.fit_intercept)

    def __getitem__(self, index):  # type: ignore[no-untyped-def]
        """One A [N, d], or a list of some."""
        numbers = range(len(self))[index]
        return self._make(numbers) if isinstance(numbers, int) else [self._make(k) for k in numbers]

    def _make(self, k: int) -> Floats:
        policy = self._policy
        if k == policy.d:
            return np.outer(np.ones(policy.n), policy.coef)
        A = -np.outer(policy.X[:, k], policy.coef)
        A[:, k] += policy.residual
        return A


def combine_raw_x(policy: Policy, F: ArrayLike) -> Floats:
    """Sum up x_raw [P, d] for ``pathway_sums`` from F [P, d (+ 1)], values of :class:`RawX`.

    With an intercept x_raw_k = F_k + mean_i(X_ik) F_extra, because Xc_ik = X_ik - mean(X_k); without one x_raw = F.
    """
    F = np.asarray(F, dtype=np.float64)
    if F.ndim != 2 or F.shape[1] != policy.d + int(policy.fit_intercept):
        raise ValueError(f"F {list(F.shape)} is not [P, {policy.d + int(policy.fit_intercept)}]")
    if not policy.fit_intercept:
        return F
    sums: Floats = F[:, :-1] + F[:, -1:] * policy.X.mean(0)
    return sums


TARGETS.register("score")(Score())
TARGETS.register("coefficient")(Coefficient())
