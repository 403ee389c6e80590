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

The LDS is the Spearman correlation over subsets of predicted and measured change (Ilyas et al., arXiv 2202.00622; Park
et al., TRAK, arXiv 2303.14186). Beside the raw value stands a *controlled* one, the partial rank correlation given
trivial predictors such as summed response length, because a long response trains more whatever it says. Intervals are
BCa bootstraps over subsets: in simulations of 42 and 60 subsets they held the true value in 92 to 97 of 100 cases,
where plain percentiles of the draws fell to 89 for partial correlations.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from typing import TYPE_CHECKING, Any

import numpy as np

from taught.errors import UserError
from taught.stats.arrays import Floats
from taught.stats.intervals import UNKNOWN, Interval, Resampled, bca, p_values
from taught.stats.multiplicity import holm
from taught.stats.ranks import rank_correlations
from taught.validation.subsets import Subsets, finite_values, summed

if TYPE_CHECKING:
    import pyarrow as pa

Values = Mapping[str, float]  # of examples or of subsets, by id
# method -> target -> example id -> influence on the target; positive: training on the example raises it.
Scores = Mapping[str, Mapping[str, Values]]

DRAWS = 2000


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
    subsets: str  # the design, such as "random" or "matched"
    n: int  # number of subsets
    raw: float  # Spearman, with its 95% interval
    raw_lo: float
    raw_hi: float
    controlled: float  # partial Spearman given ``controls``, with its 95% interval
    controlled_lo: float
    controlled_hi: float
    controls: str  # names, joined by ", "


@dataclass(frozen=True)
class Difference:
    """How much the raw LDS of ``method`` exceeds that of ``other``, over the same resamples.

    p_holm is corrected for all rows that were made in one call.
    """

    method: str
    other: str
    target: str
    subsets: str
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
    for target, outcome, sums in _by_target(subsets, outcomes, scores):
        of = list(sums.values())
        raw = bca(rank_correlations(of, outcome, draws=draws, seed=seed))
        controlled = [UNKNOWN] * len(of)
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
    *,
    design: str,
    draws: int = DRAWS,
) -> list[Difference]:
    """Compare the LDS of two methods, for every comparison and target, with Holm's correction.

    Parameters
    ----------
    comparisons : (method, other) each
    outcomes, scores, design : as in :func:`lds_rows`
    """
    named = {method: scores[method] for both in comparisons for method in both}
    found: list[tuple[str, str, str, Interval, float]] = []
    for target, outcome, sums in _by_target(subsets, outcomes, named):
        asked = [(a, b) for a, b in comparisons if a in sums and b in sums]
        if not asked:
            continue
        column = {method: k for k, method in enumerate(sums)}
        made = rank_correlations(list(sums.values()), outcome, draws=draws)
        left, right = ([column[both[side]] for both in asked] for side in (0, 1))
        gap = made.map(lambda x, i=left, j=right: x[..., i] - x[..., j])  # type: ignore[misc]
        parts = zip(asked, bca(gap), p_values(gap), strict=True)
        found += [(a, b, target, interval, float(p)) for (a, b), interval, p in parts]
    adjusted = holm([row[-1] for row in found])
    return [
        Difference(a, b, target, design, *interval, p, float(q))
        for (a, b, target, interval, p), q in zip(found, adjusted, strict=True)
    ]


def explained_by_trivial(
    subsets: Subsets,
    outcomes: Mapping[str, Values],
    scores: Scores,
    trivial: Mapping[str, Values],
    *,
    design: str,
    draws: int = DRAWS,
) -> list[TrivialCheck]:
    """Check every method on every target against every trivial predictor, by raw |LDS|.

    Signs are left out of it: a trivial predictor knows which way it works only after the fact.

    Parameters
    ----------
    trivial : name -> example id -> value, such as response tokens, or 1 for the examples of a label
    outcomes, scores, design : as in :func:`lds_rows`
    """
    plain = [summed(_sorted(subsets), values) for values in trivial.values()]
    checks = []
    for target, outcome, sums in _by_target(subsets, outcomes, scores):
        for method, sum_of in sums.items():
            made = rank_correlations([sum_of, *plain], outcome, draws=draws)
            gaps = bca(made.map(lambda x: np.abs(x[..., :1]) - np.abs(x[..., 1:])))
            for name, other, gap in zip(trivial, made.values[1:], gaps, strict=True):
                explained = math.isfinite(other) and not gap.lo > 0
                both = float(made.values[0]), float(other)
                checks.append(TrivialCheck(method, name, target, design, *both, *gap, explained))
    return checks


def _by_target(
    subsets: Subsets, outcomes: Mapping[str, Values], scores: Scores
) -> Iterator[tuple[str, Floats, dict[str, Floats]]]:
    """Target, its outcome [M], and the predictions [M] of the methods that have scores for it.

    A prediction is the sum over a subset's members, up to a factor that all subsets have in common.
    Subsets by name; targets that no method has scores for are left out.
    """
    subsets = _sorted(subsets)
    for target, measured in outcomes.items():
        sums = {method: summed(subsets, of[target]) for method, of in scores.items() if target in of}
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
    missing = {key for key, kind in zip(schema.names, schema.types, strict=True) if kind == pa.float64()}
    records = (asdict(row).items() for row in rows)
    plain = [{key: None if key in missing and math.isnan(value) else value for key, value in row} for row in records]
    return pa.Table.from_pylist(plain, schema=schema)


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


def noise_ceiling(subsets: Subsets, outcomes: Mapping[str, Values], *, draws: int = DRAWS) -> NoiseCeiling:
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
        what, rule = "a noise ceiling needs the same subsets under several seeds", "at least 2"
        raise UserError(what, value=f"{len(outcomes)} seed", rule=rule, fix="repeat the retrainings under another seed")
    subsets = _sorted(subsets)
    rows = [_outcome(subsets, name, values) for name, values in outcomes.items()]
    R = len(rows)
    parts = [rank_correlations(rows[i + 1 :], rows[i], draws=draws) for i in range(R - 1)]
    joined = Resampled(*(np.concatenate(some, -1) for some in zip(*parts, strict=True)))
    mean = joined.map(lambda x: x.mean(-1, keepdims=True))
    ceiling = mean.map(lambda r: np.sqrt(np.maximum(_stepped_up(r, R), 0)))
    (interval,) = bca(ceiling)
    r = float(mean.values[0])
    return NoiseCeiling(R, r, float(_stepped_up(mean.values, R)[0]), *interval)


def _stepped_up(r: Floats, seeds: int) -> Floats:
    """Spearman-Brown; a negative r, which no reliability has, stays what it is."""
    return np.where(r > 0, seeds * r / (1 + (seeds - 1) * np.maximum(r, 0)), r)


def _sorted(subsets: Subsets) -> Subsets:
    """The subsets by name: the same draws whatever their order."""
    order = sorted(range(len(subsets)), key=lambda i: subsets.names[i])
    names = tuple(subsets.names[i] for i in order)
    return Subsets(names, tuple(subsets.members[i] for i in order), subsets.inclusion)


def _outcome(subsets: Subsets, target: str, measured: Values) -> Floats:
    rule, fix = "one number for each subset", "finish their retraining, or select the finished ones"
    return finite_values(subsets.names, measured, f"subsets have no finite outcome of {target}", rule=rule, fix=fix)
