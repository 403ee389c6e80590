"""Certificates: how far the linear shift may be from the exact refit, and which ranks are safe.

**Remainder.** A step moves Xc by E (dX, centred with an intercept) and yc by f. With Z = Xc + E,
U1 = Z'Z + alpha I, rho = f - E W and the linear shift L = U^-1 (Xc' rho + E' r), exactly

    W(X + dX, y + dy) - W - L = R,    U1 R = E' (rho - Xc L) - Z' E L

because Z'(yc + f) - U1 W = Xc' rho + E' r + E' rho (normal equations of W) and
U1 - U = Xc'E + E'Xc + E'E = Z'E + E'Xc. Along v = U^-1 W, W = U v gives the remainder of the score,

    W'R = (Ev)'(rho - Xc L) - (Zv)'(E L) - (Ev)'(Z R) - (Xc v)'(E R)

All norms follow from e >= |E| (spectral) and from singular values s of Xc: those of Z are at least
s0 = max(s_min - e, 0), hence |U1^-1| <= a, |Z U1^-1| <= b and |Z U1^-1 Z'| <= 1 with

    a = 1 / (s0^2 + alpha),    b = max over s >= s0 of s / (s^2 + alpha)
    |R|   <= a e |rho - Xc L| + b e |L|
    |Z R| <= b e |rho - Xc L| + e |L|
    |W'R| <= e |v| (|rho - Xc L| + |Z R|) + (|Xc v| + e |v|) e |L| + |Xc v| e |R|,  also |W| |R|

|rho - Xc L| is at most |f - Xc L| + e |W| where L is known, and |f| + e |W| + e |r| |Xc U^-1| in
any case; |L| is known or at most |Xc U^-1| (|f| + e |W|) + |U^-1| e |r|.

**Ranks.** The k examples with the largest absolute values stay the same k examples under resampling of the prompts (the
policy is fitted again on every resample), whatever the remainder within its bound and whatever the sketches' error
within simultaneous limits. Source: remainder derived here; resampled sets: Efron, Halloran and Holmes 1996.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from taught.errors import misfit
from taught.policy.ridge import Policy, row_order
from taught.stats import intervals
from taught.stats.arrays import Floats, Ints

LEVEL = 0.05  # a statement is safe at 1 - LEVEL
SIZES = (1, 3, 5, 10, 20, 50)
_CHUNK = 64  # resamples at a time


class Remainder(NamedTuple):
    """Upper bounds of |R| (coefficient units) and of |W'R| (unit of the score)."""

    coef: float
    score: float


class RemainderBound:
    """The bound for the linear shifts of one policy. Cost: one decomposition of Xc, then O(N d) an example."""

    def __init__(self, policy: Policy) -> None:
        s = np.linalg.svd(policy.Xc, compute_uv=False)
        self._policy = policy
        self._s_min = float(s[-1]) if policy.n >= policy.d else 0.0
        v = policy.solve(policy.coef)
        self._W, self._r = _norm(policy.coef), _norm(policy.residual)
        self._v, self._Xv = _norm(v), _norm(policy.Xc @ v)
        self._inverse = 1 / (self._s_min**2 + policy.alpha)
        self._gain = float((s / (s**2 + policy.alpha)).max())

    def __call__(self, dX_norm: float, dy: ArrayLike, shift: ArrayLike | None = None) -> Remainder:
        """Bound the remainder of an example.

        Parameters
        ----------
        dX_norm : spectral norm of dX [N, d], or any number that it does not exceed
        dy : [N], change of the behavior
        shift : [d], optional, the linear shift, both pathways; with it the bound is closer
        """
        e, f, policy = dX_norm, np.asarray(dy, dtype=np.float64), self._policy
        if f.shape != (policy.n,):
            raise misfit("the change of the behavior and the policy", f"one for each of {policy.n} prompts", dy=f)
        f = f - f.mean() if policy.fit_intercept else f
        moved = _norm(f) + e * self._W  # |rho| is at most this
        apart = moved + self._gain * e * self._r
        L = self._gain * moved + self._inverse * e * self._r
        if shift is not None:
            shift = np.asarray(shift, dtype=np.float64)
            apart = min(apart, _norm(f - policy.Xc @ shift) + e * self._W)
            L = _norm(shift)
        s0, peak = max(self._s_min - e, 0.0), policy.alpha**0.5
        a = 1 / (s0**2 + policy.alpha)
        b = a * s0 if s0 > peak else 1 / (2 * peak)
        R = a * e * apart + b * e * L
        ZR = b * e * apart + e * L
        along = e * self._v * (apart + ZR) + (self._Xv + e * self._v) * e * L
        return Remainder(R, min(along + self._Xv * e * R, self._W * R))


def _norm(values: NDArray[Any]) -> float:
    return float(np.linalg.norm(values))


# Scores on resampled prompts


def resample_counts(prompt_ids: Sequence[str], *, n: int, seed: int) -> Iterator[Ints]:
    """How often each prompt is drawn in ``n`` resamples, int64 [R, N], some resamples at a time.

    Resamples are drawn over sorted prompt ids, so that they do not depend on the order of the prompts.
    """
    counts = intervals.resample_counts(len(prompt_ids), n, seed).astype(np.int64)
    counts = counts[:, np.argsort(row_order(prompt_ids, len(prompt_ids)))]
    yield from (counts[start : start + _CHUNK] for start in range(0, n, _CHUNK))


def resampled_score(policy: Policy, counts: Ints, dy: Floats, dX: NDArray[Any] | None) -> tuple[Floats | None, Floats]:
    """Scores of every example by the policies of R resamples of the prompts, along pathways x and y, [R, P].

    Each resample has its own W, U and r. Pathway y needs dy of every prompt only; pathway x needs dX of every feature
    on every prompt, and is None without. Cost: a ridge and O(P N), with dX O(P N d), a resample.

    Parameters
    ----------
    counts : [R, N], how often each prompt is drawn
    dy : [P, N]
    dX : [P, N, d] or None, both in the policy's order of prompts
    """
    made = [_cotangents(policy, c) for c in counts]
    y = np.stack([B for _, B in made]) @ dy.T if made else np.zeros((0, len(dy)))
    if dX is None:
        return None, y
    A = np.stack([A.ravel() for A, _ in made]) if made else np.zeros((0, policy.n * policy.d))
    return np.stack([A @ np.asarray(own, dtype=np.float64).ravel() for own in dX], 1), y


def _cotangents(policy: Policy, counts: Ints) -> tuple[Floats, Floats]:
    """A [N, d] and B [N] of the score (``taught.core.target``), each prompt ``counts`` times."""
    c, X, y = counts.astype(np.float64), policy.X, policy.y
    if policy.fit_intercept:
        X, y = X - c @ X / c.sum(), y - c @ y / c.sum()
    weighted = X * c[:, None]
    U = X.T @ weighted + policy.alpha * np.eye(policy.d)
    W = np.linalg.solve(U, weighted.T @ y)
    u = np.linalg.solve(U, W)
    Xu = X @ u
    A = c[:, None] * (np.outer(y - X @ W, u) - np.outer(Xu, W))
    return A, c * Xu


def resampled_means(dy: Floats, rows: Sequence[int], counts: Ints) -> Floats:
    """Mean of dy [P, N] over the rows as often as they are drawn: [resamples, P]; nan if never."""
    own = counts[:, list(rows)].astype(np.float64)
    with np.errstate(invalid="ignore"):
        return np.asarray(own @ dy[:, list(rows)].T / own.sum(1, keepdims=True))


# Which ranks are safe


class Ranking(NamedTuple):
    """What is known of a ranking by absolute value.

    Attributes
    ----------
    target : its name, such as score:y or behavior:GROUP
    values : float64 [P]
    bound : float64 [P], how far the exact refit may be from the value, nan where that is not known
    errors : standard errors float64 [P]; None where the values are exact
    reason : why there are no resamples, where there are none
    """

    target: str
    values: Floats
    bound: Floats
    errors: Floats | None
    reason: str | None = None


class Statement(NamedTuple):
    """That the k examples with the largest absolute values stay the k largest.

    Attributes
    ----------
    target, k
    example_ids : the k examples, largest first
    gap : least absolute value among them minus the largest of the others
    share : share of the resamples of the prompts in which they stay the k largest; None if unknown
    by_refit, by_sketch : safe, undecided or exact (nothing to be feared), each by itself
    verdict : safe or undecided, all three together
    reason : why it is undecided; empty where it is safe
    """

    target: str
    k: int
    example_ids: list[str]
    gap: float
    share: float | None
    by_refit: str
    by_sketch: str
    verdict: str
    reason: str


def rank_statements(ranking: Ranking, example_ids: Sequence[str], draws: Iterable[Floats] | None) -> list[Statement]:
    """Judge "the top k stay the top k" for several k.

    In every resample the least of the k, less its bound and sketch limit, must exceed the largest of the others, plus
    theirs. The statement is safe if (1 + resamples in which it fails) / (1 + resamples) is at most ``LEVEL``. Where
    there are sketches, half of ``LEVEL`` is theirs: their errors stay within the normal quantile of LEVEL / 4P on
    either side for all examples at once, however they depend on one another (Bonferroni). All examples are judged in
    one event, so each statement is simultaneous over examples; statements of different k are not counted together.

    Parameters
    ----------
    draws : chunks float64 [resamples, P] of the values on resampled prompts, or None
    """
    P = len(example_ids)
    order = np.argsort(-np.abs(ranking.values), kind="stable")
    sizes = [k for k in SIZES if k < P]
    quantile = intervals.NORMAL.inv_cdf(1 - LEVEL / 4 / P)
    limit = np.zeros(P) if ranking.errors is None else quantile * ranking.errors
    margins = {"alone": np.zeros(P), "all": np.nan_to_num(ranking.bound) + limit}
    failed, n = {name: np.zeros(len(sizes), dtype=np.int64) for name in margins}, 0  # in which the top k do not stay
    for chunk in draws or ():
        n += len(chunk)
        for name, margin in margins.items():
            failed[name] += [int((~(_gaps(chunk, order, k, margin) > 0)).sum()) for k in sizes]
    known = bool(np.isfinite(ranking.bound).all())
    statements = []
    for place, k in enumerate(sizes):
        at = ranking.values[None, :]
        gap = float(_gaps(at, order, k, np.zeros(P))[0])
        refit = _source(ranking.bound, known, at, order, k)
        sketch = "exact" if ranking.errors is None else _source(limit, True, at, order, k)
        share = None if n == 0 else float((n - failed["alone"][place]) / n)
        level = LEVEL if ranking.errors is None else LEVEL / 2
        alone, p = ((1 + failed[name][place]) / (1 + n) for name in ("alone", "all"))
        safe = n > 0 and known and p <= level
        stays = share if alone > level else None
        reason = "" if safe else _reason(ranking, known, stays, refit, sketch)
        ids = [example_ids[i] for i in order[:k]]
        verdict = "safe" if safe else "undecided"
        statements.append(Statement(ranking.target, k, ids, gap, share, refit, sketch, verdict, reason))
    return statements


def _gaps(values: Floats, order: Ints, k: int, margin: Floats) -> Floats:
    """For each row of values [B, P]: least of the top k less margin, minus most of the rest."""
    size = np.abs(values)
    inside = (size - margin)[:, order[:k]].min(1)
    return np.asarray(inside - (size + margin)[:, order[k:]].max(1))


def _source(margin: Floats, known: bool, values: Floats, order: Ints, k: int) -> str:
    if not known:
        return "undecided"
    if not margin.any():
        return "exact"
    return "safe" if _gaps(values, order, k, margin)[0] > 0 else "undecided"


def _reason(ranking: Ranking, known: bool, stays: float | None, refit: str, sketch: str) -> str:
    parts = []
    if ranking.reason is not None:
        parts.append(ranking.reason)
    elif stays is not None:
        parts.append(f"the prompts decide: they stay in {stays:.1%} of the resamples")
    if not known:
        parts.append("the linear value is not bounded against the exact refit for every example")
    elif refit == "undecided":
        parts.append("the bound on the remainder is wider than the gap")
    if sketch == "undecided":
        parts.append("the sketches' error is wider than the gap")
    return "; ".join(parts) or "prompts, remainder and sketches together are wider than the gap"
