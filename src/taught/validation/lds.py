"""Do influences predict retraining? The linear datamodeling score (LDS) and what goes beside it.

Training for E epochs on a subset S in batches of b moves the parameters, to first order in the
learning rate, by the sum of the steps of its examples,

    theta_S - theta = -lr (E / b) sum_{z in S} C^-1 grad L(z)

so that a functional F of the read-outs changes by

    F(theta_S) - F(theta) = (E / b) sum_{z in S} influence(F, z)

Learning rate, epochs and batch size only scale it: a rank correlation does not see them. It holds
while steps are small enough for gradients and C to stay what they are at the base model. Where the
number of *steps* is fixed instead of the number of epochs, each example is seen steps * b / |S| times,
and the sum becomes a mean; for subsets of one size the two rank alike.

The LDS is the Spearman correlation over subsets of predicted and measured change (Ilyas et al.,
arXiv 2202.00622; Park et al., TRAK, arXiv 2303.14186). Beside the raw value stands a *controlled*
one, the partial rank correlation given trivial predictors such as summed response length, because a
long response trains more whatever it says. Intervals are BCa bootstraps over subsets: in
simulations of 42 and 60 subsets they held the true value in 92 to 97 of 100 cases, where plain
percentiles of the draws fell to 89 for partial correlations.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from statistics import NormalDist
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray

from taught.errors import UserError
from taught.stats.ranks import ranks, spearman
from taught.validation.subsets import Subsets, summed

if TYPE_CHECKING:
    import pyarrow as pa

__all__ = [
    "Auc",
    "Difference",
    "Interval",
    "LdsRow",
    "NoiseCeiling",
    "Resampled",
    "TrivialCheck",
    "auc",
    "bca",
    "differences",
    "explained_by_trivial",
    "holm",
    "lds_rows",
    "noise_ceiling",
    "p_values",
    "partial_spearman",
    "precision_at_k",
    "predicted",
    "rank_correlations",
    "spearman",
    "table_of",
]

Floats = NDArray[np.float64]
Values = Mapping[str, float]  # of examples or of subsets, by id
# method -> target -> example id -> influence on the target; positive: training on the example raises it.
Scores = Mapping[str, Mapping[str, Values]]

DRAWS = 2000
LEVEL = 0.95
_NORMAL = NormalDist()
# Draws whose ranks are held at a time.
_CHUNK = 250
# A variance that is left of 1 after the controls below which nothing is left but rounding.
_NOTHING = 1e-10
# Share of the draws that may have no value (a side is constant in them) for an interval.
_UNDEFINED = 0.01


class Interval(NamedTuple):
    """A value with its 95% interval; nan where it is not defined."""

    value: float
    lo: float
    hi: float


class Resampled(NamedTuple):
    """K statistics of M rows: values [K], bootstrap draws [B, K] and leave-one-out values [M, K].

    The draws are the same for all K, so a function of several statistics is paired by itself.
    """

    values: Floats
    draws: Floats
    left_out: Floats

    def map(self, function: Callable[[Floats], Floats]) -> Resampled:
        """The same of a function [..., K] -> [..., L] of the statistics."""
        return Resampled(*(function(part) for part in self))


def predicted(subsets: Subsets, scores: Values, *, how: str = "sum") -> Floats:
    """Predicted change of each subset, float64 [M], up to a factor common to all subsets.

    Parameters
    ----------
    scores : example id -> influence
    how : {"sum", "mean"}
        ``sum`` where the number of epochs is fixed, ``mean`` where the number of steps is (see the
        module); for subsets of one size they rank alike.

    Raises
    ------
    UserError
        A member has no finite score.
    """
    total = summed(subsets, scores)
    if how == "sum":
        return total
    if how == "mean":
        return total / np.array([len(members) for members in subsets.members])
    raise UserError("influences are added up in another way", value=how, rule="sum or mean")


def partial_spearman(a: ArrayLike, b: ArrayLike, covariates: ArrayLike) -> float:
    """Correlation of the ranks of a and b [M] after a linear fit on the ranks of covariates [C, M].

    nan where nothing is left of a or b, and with fewer than C + 3 rows.
    """
    return float(_point(np.asarray(a)[None], b, covariates)[0])


def rank_correlations(
    predictions: ArrayLike,
    outcome: ArrayLike,
    covariates: ArrayLike | None = None,
    *,
    draws: int = DRAWS,
    seed: int = 0,
) -> Resampled:
    """(Partial) Spearman correlations of predictions [K, M] with one outcome [M], resampled.

    Rows (subsets) are drawn with replacement, the same for all predictions. Cost: about
    draws * (K + C) * M^2 multiplications.

    Parameters
    ----------
    covariates : [C, M] or None
        As in :func:`partial_spearman`.
    """
    rows = np.asarray(outcome).shape[-1]
    counts = np.random.default_rng(seed).multinomial(rows, np.full(rows, 1 / rows), size=draws)
    return Resampled(
        _point(predictions, outcome, covariates),
        _weighted(predictions, outcome, covariates, counts.astype(np.float64)),
        _weighted(predictions, outcome, covariates, 1.0 - np.eye(rows)),
    )


def bca(resampled: Resampled) -> list[Interval]:
    """Bias-corrected and accelerated 95% intervals (Efron 1987), one a statistic."""
    return [_bca(*part) for part in _columns(resampled)]


def p_values(resampled: Resampled) -> Floats:
    """Two-sided p of each statistic being 0: 1 - the level at which the BCa interval ends at 0."""
    return np.array([_p_value(*part) for part in _columns(resampled)])


def holm(p: ArrayLike) -> Floats:
    """Holm's adjusted p-values [m]: valid for all m comparisons together (Holm 1979)."""
    p = np.asarray(p, dtype=np.float64)
    order = np.argsort(p, kind="stable")
    adjusted = np.empty_like(p)
    adjusted[order] = np.minimum(1, np.maximum.accumulate(p[order] * np.arange(p.size, 0, -1)))
    return adjusted


@dataclass(frozen=True)
class LdsRow:
    """LDS of one method on one target over one design of subsets.

    Attributes
    ----------
    subsets : the design, such as "random" or "matched"
    n : number of subsets
    raw, controlled : Spearman, and partial Spearman given ``controls``; with 95% intervals
    controls : names, joined by ", "
    """

    method: str
    target: str
    subsets: str
    n: int
    raw: float
    raw_lo: float
    raw_hi: float
    controlled: float
    controlled_lo: float
    controlled_hi: float
    controls: str


@dataclass(frozen=True)
class Difference:
    """How much the LDS of ``method`` exceeds that of ``other``, over the same resamples.

    p_holm is corrected for all rows that were made in one call.
    """

    method: str
    other: str
    target: str
    subsets: str
    controlled: bool
    value: float
    lo: float
    hi: float
    p: float
    p_holm: float


@dataclass(frozen=True)
class TrivialCheck:
    """Whether a trivial predictor explains as much as a method does: |LDS| against |LDS|.

    Attributes
    ----------
    lds, trivial_lds : raw values, with their signs
    value, lo, hi : |lds| - |trivial_lds| and its paired 95% interval
    explained : the interval includes 0 or lies below it: the method is not shown to be better;
        never by a predictor that is the same for all subsets (its LDS is nan)
    """

    method: str
    trivial: str
    target: str
    subsets: str
    lds: float
    trivial_lds: float
    value: float
    lo: float
    hi: float
    explained: bool


def lds_rows(
    subsets: Subsets,
    outcomes: Mapping[str, Values],
    scores: Scores,
    controls: Mapping[str, Values],
    *,
    design: str,
    how: str = "sum",
    draws: int = DRAWS,
    seed: int = 0,
) -> list[LdsRow]:
    """LDS of every method on every target that it has scores for, raw and controlled side by side.

    Parameters
    ----------
    outcomes : target -> subset name -> measured change (mean over seeds)
    scores : method -> target -> example id -> influence
    controls : name -> example id -> value; what is controlled for is its sum over a subset's members,
        such as response tokens, or 1 for the examples of a label
    design : what the rows call these subsets

    Raises
    ------
    UserError
        A subset has no finite outcome, or an example no finite score or control.
    """
    covariates = [summed(_sorted(subsets), values) for values in controls.values()]
    rows = []
    for target, outcome, sums in _by_target(subsets, outcomes, scores, how):
        of = list(sums.values())
        raw = bca(rank_correlations(of, outcome, draws=draws, seed=seed))
        controlled = [Interval(math.nan, math.nan, math.nan)] * len(of)
        if covariates:
            controlled = bca(rank_correlations(of, outcome, covariates, draws=draws, seed=seed))
        rows += [
            LdsRow(method, target, design, len(subsets), *a, *b, ", ".join(controls))
            for method, a, b in zip(sums, raw, controlled, strict=True)
        ]
    return rows


def differences(
    subsets: Subsets,
    outcomes: Mapping[str, Values],
    scores: Scores,
    comparisons: Sequence[tuple[str, str]],
    controls: Mapping[str, Values] | None = None,
    *,
    design: str,
    how: str = "sum",
    draws: int = DRAWS,
    seed: int = 0,
) -> list[Difference]:
    """Compare the LDS of two methods, for every comparison and target, with Holm's correction.

    Parameters
    ----------
    comparisons : (method, other) each
    controls : compare controlled values; None: raw ones
    outcomes, scores, design : as in :func:`lds_rows`
    """
    covariates = [summed(_sorted(subsets), values) for values in (controls or {}).values()]
    named = {method: scores[method] for both in comparisons for method in both}
    found: list[tuple[str, str, str, Interval, float]] = []
    for target, outcome, sums in _by_target(subsets, outcomes, named, how):
        asked = [(a, b) for a, b in comparisons if a in sums and b in sums]
        if not asked:
            continue
        column = {method: k for k, method in enumerate(sums)}
        made = rank_correlations(list(sums.values()), outcome, covariates or None, draws=draws, seed=seed)
        left, right = ([column[both[side]] for both in asked] for side in (0, 1))
        gap = made.map(lambda x, i=left, j=right: x[..., i] - x[..., j])  # type: ignore[misc]
        parts = zip(asked, bca(gap), p_values(gap), strict=True)
        found += [(a, b, target, interval, float(p)) for (a, b), interval, p in parts]
    adjusted = holm([row[-1] for row in found])
    return [
        Difference(a, b, target, design, bool(covariates), *interval, p, float(q))
        for (a, b, target, interval, p), q in zip(found, adjusted, strict=True)
    ]


def explained_by_trivial(
    subsets: Subsets,
    outcomes: Mapping[str, Values],
    scores: Scores,
    trivial: Mapping[str, Values],
    *,
    design: str,
    how: str = "sum",
    draws: int = DRAWS,
    seed: int = 0,
) -> list[TrivialCheck]:
    """Check every method on every target against every trivial predictor, by raw |LDS|.

    Signs are left out of it: a trivial predictor knows which way it works only after the fact.

    Parameters
    ----------
    trivial : name -> example id -> value, such as response tokens, or 1 for the examples of a label
    outcomes, scores, design : as in :func:`lds_rows`
    """
    plain = [predicted(_sorted(subsets), values, how=how) for values in trivial.values()]
    checks = []
    for target, outcome, sums in _by_target(subsets, outcomes, scores, how):
        for method, sum_of in sums.items():
            made = rank_correlations([sum_of, *plain], outcome, draws=draws, seed=seed)
            gaps = bca(made.map(lambda x: np.abs(x[..., :1]) - np.abs(x[..., 1:])))
            for name, other, gap in zip(trivial, made.values[1:], gaps, strict=True):
                checks.append(
                    TrivialCheck(
                        method,
                        name,
                        target,
                        design,
                        float(made.values[0]),
                        float(other),
                        *gap,
                        explained=math.isfinite(other) and not gap.lo > 0,
                    )
                )
    return checks


def _by_target(
    subsets: Subsets, outcomes: Mapping[str, Values], scores: Scores, how: str
) -> Iterator[tuple[str, Floats, dict[str, Floats]]]:
    """Target, its outcome [M], and the predictions [M] of the methods that have scores for it.

    Subsets by name; targets that no method has scores for are left out.
    """
    subsets = _sorted(subsets)
    for target, measured in outcomes.items():
        sums = {method: predicted(subsets, of[target], how=how) for method, of in scores.items() if target in of}
        if sums:
            yield target, _outcome(subsets, target, measured), sums


def table_of(rows: Sequence[Any]) -> pa.Table:
    """Rows of one dataclass of this package as an Arrow table; nan becomes null.

    Raises
    ------
    ValueError
        There are no rows.
    """
    import pyarrow as pa

    if not rows:
        raise ValueError("a table needs at least one row, which says what its columns are")
    kinds = {"str": pa.string(), "int": pa.int64(), "float": pa.float64(), "bool": pa.bool_()}
    schema = pa.schema([(field.name, kinds[str(field.type)]) for field in fields(rows[0])])
    return pa.Table.from_pylist([_without_nan(asdict(row)) for row in rows], schema=schema)


@dataclass(frozen=True)
class NoiseCeiling:
    """How well the outcome itself is known, from trainings that differ in their seed only.

    Attributes
    ----------
    seeds : R
    between_seeds : mean Spearman correlation over subsets between the outcomes of two seeds
    reliability : that of the mean over R seeds, R r / (1 + (R - 1) r)  (Spearman-Brown)
    ceiling : its square root, the rank correlation with the measured mean that a method would reach
        that knows the outcome without noise; lo, hi: 95% bootstrap over subsets
    """

    seeds: int
    between_seeds: float
    reliability: float
    ceiling: float
    lo: float
    hi: float


def noise_ceiling(
    subsets: Subsets, outcomes: Mapping[str, Values], *, draws: int = DRAWS, seed: int = 0
) -> NoiseCeiling:
    """The best LDS that the noise of training allows.

    With two seeds this is the split-half reliability stepped up by Spearman-Brown; with more it is
    the mean over all examples of seeds (Spearman 1910, Brown 1910; the root: Spearman 1904). Exact for
    Pearson correlations, near for ranks.

    Parameters
    ----------
    outcomes : seed -> subset name -> measured change

    Raises
    ------
    UserError
        Fewer than two seeds, or a subset without a finite outcome.
    """
    if len(outcomes) < 2:
        raise UserError(
            "a noise ceiling needs the same subsets under several seeds",
            value=f"{len(outcomes)} seed",
            rule="at least 2",
            fix="repeat the retrainings under another seed",
        )
    subsets = _sorted(subsets)
    rows = [_outcome(subsets, name, values) for name, values in outcomes.items()]
    R = len(rows)
    parts = [rank_correlations(rows[i + 1 :], rows[i], draws=draws, seed=seed) for i in range(R - 1)]
    joined = Resampled(*(np.concatenate(some, -1) for some in zip(*parts, strict=True)))
    mean = joined.map(lambda x: x.mean(-1, keepdims=True))
    ceiling = mean.map(lambda r: np.sqrt(np.maximum(_stepped_up(r, R), 0)))
    (interval,) = bca(ceiling)
    r = float(mean.values[0])
    return NoiseCeiling(R, r, float(_stepped_up(mean.values, R)[0]), *interval)


def _stepped_up(r: Floats, seeds: int) -> Floats:
    """Spearman-Brown; a negative r, which no reliability has, stays what it is."""
    return np.where(r > 0, seeds * r / (1 + (seeds - 1) * np.maximum(r, 0)), r)


@dataclass(frozen=True)
class Auc:
    """Area under the ROC curve of ``planted`` rows among ``others``, with its 95% interval.

    The probability that a planted row scores above another one, ties counted half.
    """

    value: float
    lo: float
    hi: float
    planted: int
    others: int


def auc(scores: Values, planted: Collection[str]) -> Auc:
    """How well the scores (id -> value, high means planted) set the planted ids apart.

    The interval is Newcombe's (2006, method 5), which solves |auc - a| = z sqrt(V(a)) with Hanley
    and McNeil's V, like Wilson's for a proportion. DeLong's, and a bootstrap within the two groups,
    have no width where the groups are apart, and are too short near it: with 30 planted rows of 230
    and a true AUC of .99, DeLong's held it in 80 of 100 simulations, this one in 98.

    Raises
    ------
    UserError
        A planted id has no score, a score is not finite, or one of the two groups is empty.
    """
    ids = _ranked(scores, planted)
    inside = np.array([i in planted for i in ids])
    m, n = int(inside.sum()), int((~inside).sum())
    rank = ranks([scores[i] for i in ids])
    value = float((rank[inside].sum() - m * (m - 1) / 2) / (m * n))
    z = _NORMAL.inv_cdf((1 + LEVEL) / 2)

    def outside(a: float) -> bool:
        """Whether ``a`` is too far from the value."""
        extra = ((m + n) / 2 - 1) * ((1 - a) / (2 - a) + a / (1 + a))
        return (a - value) ** 2 > z**2 * a * (1 - a) * (1 + extra) / (m * n)

    return Auc(value, _edge(outside, 0.0, value), _edge(outside, 1.0, value), m, n)


def precision_at_k(scores: Values, planted: Collection[str], k: int) -> float:
    """Share of planted ids among the k highest scores; ids that tie at the border count in part.

    Raises
    ------
    UserError
        As in :func:`auc`; or k is not between 1 and the number of ids.
    """
    ids = _ranked(scores, planted)
    if not 1 <= k <= len(ids):
        raise UserError("precision at k needs a number of ids", value=k, rule=f"from 1 to {len(ids)}")
    border = sorted(scores.values(), reverse=True)[k - 1]
    above = [i for i in ids if scores[i] > border]
    tied = [i for i in ids if scores[i] == border]
    share = (k - len(above)) / len(tied)
    return float(sum(i in planted for i in above) + share * sum(i in planted for i in tied)) / k


def _ranked(scores: Values, planted: Collection[str]) -> list[str]:
    """Ids of the scores, checked."""
    unknown = sorted(set(planted) - scores.keys())
    if unknown:
        raise UserError("planted ids have no score", value=unknown[:8])
    bad = sorted(i for i, value in scores.items() if not math.isfinite(value))
    if bad:
        raise UserError("scores are not finite", value=bad[:8], rule="every score is a number")
    if not 0 < len(set(planted)) < len(scores):
        raise UserError(
            "planted rows cannot be told from the others",
            value=f"{len(set(planted))} planted of {len(scores)}",
            rule="at least one of each",
        )
    return sorted(scores)


def _edge(outside: Callable[[float], bool], far: float, near: float) -> float:
    """Where between ``far`` and ``near`` the values cease to be outside."""
    if not outside(far):
        return far
    for _ in range(60):
        middle = (far + near) / 2
        far, near = (middle, near) if outside(middle) else (far, middle)
    return near


def _sorted(subsets: Subsets) -> Subsets:
    """The subsets by name: the same draws whatever their order."""
    order = sorted(range(len(subsets)), key=lambda i: subsets.names[i])
    names = tuple(subsets.names[i] for i in order)
    return Subsets(names, tuple(subsets.members[i] for i in order), subsets.inclusion)


def _outcome(subsets: Subsets, target: str, measured: Values) -> Floats:
    missing = [name for name in subsets.names if not math.isfinite(measured.get(name, math.nan))]
    if missing:
        raise UserError(
            f"subsets have no finite outcome of {target}",
            value=missing[:8],
            rule="one number for each subset",
            fix="finish their retraining, or select the finished ones",
        )
    return np.array([measured[name] for name in subsets.names], dtype=np.float64)


def _point(predictions: ArrayLike, outcome: ArrayLike, covariates: ArrayLike | None) -> Floats:
    ones = np.ones((1, np.asarray(outcome).shape[-1]))
    return _weighted(predictions, outcome, covariates, ones)[0]


def _weighted(predictions: ArrayLike, outcome: ArrayLike, covariates: ArrayLike | None, weights: Floats) -> Floats:
    """(Partial) rank correlations [B, K] of rows that count as often as ``weights`` [B, M] say."""
    y = np.atleast_2d(np.asarray(outcome, dtype=np.float64))
    x = np.asarray(predictions, dtype=np.float64).reshape(-1, y.shape[1])
    given = np.zeros((0, y.shape[1])) if covariates is None else np.asarray(covariates, np.float64)
    rows = np.concatenate([given.reshape(-1, y.shape[1]), x, y])
    chunks = range(0, len(weights), _CHUNK)
    return np.concatenate([_chunk(rows, len(rows) - len(x) - 1, weights[i : i + _CHUNK]) for i in chunks])


def _chunk(rows: Floats, controls: int, weights: Floats) -> Floats:
    """The last row's partial correlations with the others behind the ``controls`` first ones."""
    total = weights.sum(1)[:, None]
    z = np.empty((len(weights), *rows.shape))
    for k, row in enumerate(rows):
        below = (row[:, None] < row) + 0.5 * (row[:, None] == row)  # [M (weighted), M]
        rank = weights @ below
        z[:, k] = rank - (weights * rank).sum(1, keepdims=True) / total
    gram = (z * weights[:, None]) @ z.transpose(0, 2, 1)
    size = np.sqrt(np.diagonal(gram, axis1=1, axis2=2))
    varies = size > 1e-9 * total
    scale = np.where(varies, 1 / np.where(varies, size, 1), 0)
    gram = gram * scale[:, :, None] * scale[:, None, :]
    left = gram[:, controls:, controls:]
    if controls:
        across = gram[:, controls:, :controls]
        inverse = np.linalg.pinv(gram[:, :controls, :controls], rcond=1e-9, hermitian=True)
        left = left - across @ inverse @ across.transpose(0, 2, 1)
    variance = np.diagonal(left, axis1=1, axis2=2)
    enough = (weights > 0).sum(1)[:, None] >= controls + 3
    known = enough & (variance[:, :-1] > _NOTHING) & (variance[:, -1:] > _NOTHING)
    spread = np.sqrt(np.where(known, variance[:, :-1] * variance[:, -1:], 1))
    return np.where(known, np.clip(left[:, :-1, -1] / spread, -1, 1), np.nan)


def _columns(resampled: Resampled) -> list[tuple[float, Floats, float, float]]:
    """Of each statistic: value, its finite draws (sorted), bias z0 and acceleration a.

    No draws where the value is not defined, or the draws too often are not.
    """
    parts = []
    for k, value in enumerate(resampled.values.tolist()):
        draws, left = resampled.draws[:, k], resampled.left_out[:, k]
        finite = np.sort(draws[np.isfinite(draws)])
        if not math.isfinite(value) or len(finite) < (1 - _UNDEFINED) * len(draws):
            parts.append((value, finite[:0], 0.0, 0.0))
            continue
        below = (np.sum(finite < value) + 0.5 * np.sum(finite == value)) / len(finite)
        off = left[np.isfinite(left)]
        off = off.mean() - off
        squares = float((off**2).sum())
        a = float((off**3).sum()) / (6 * squares**1.5) if squares > 0 else 0.0
        parts.append((value, finite, _quantile(float(below), len(finite)), a))
    return parts


def _quantile(share: float, draws: int) -> float:
    """Normal quantile of a share of draws, kept from 0 and 1 by half a draw."""
    return _NORMAL.inv_cdf(min(max(share, 0.5 / draws), 1 - 0.5 / draws))


def _bca(value: float, draws: Floats, z0: float, a: float) -> Interval:
    if not draws.size:
        return Interval(value, math.nan, math.nan)
    edges = []
    for tail in ((1 - LEVEL) / 2, (1 + LEVEL) / 2):
        z = z0 + _NORMAL.inv_cdf(tail)
        edges.append(_NORMAL.cdf(z0 + z / (1 - a * z)))
    lo, hi = np.quantile(draws, edges)
    return Interval(value, float(lo), float(hi))


def _p_value(value: float, draws: Floats, z0: float, a: float) -> float:
    if not draws.size:
        return math.nan
    below = (np.sum(draws < 0) + 0.5 * np.sum(draws == 0)) / len(draws)
    z = _quantile(float(below), len(draws)) - z0
    tail = _NORMAL.cdf(z / (1 + a * z) - z0)
    return min(1.0, 2 * min(tail, 1 - tail))


def _without_nan(row: dict[str, Any]) -> dict[str, Any]:
    return {key: None if isinstance(value, float) and math.isnan(value) else value for key, value in row.items()}
