"""The faithfulness card: in how many ways a policy is an account of the behavior.

Beside the held-out fit of ``evaluate.py``, on its folds and its resamples of the prompts:

    calibration    y = a + b y_hat over held-out predictions; b = 1, a = 0 if they can be taken at
                   their word. Error: sum over deciles of y_hat of n_b / N |mean y - mean y_hat|
    features       held-out R^2 of the k features that weigh most, k = 1 .. d
    signs          over resamples, and between policies of different sets of prompts
    permutation    held-out R^2 lost when one feature, or all, are dealt anew over a fold's prompts
    predictors     held-out R^2 beside that of predictors without features (``predictors.py``)

Source: the list is that of "explanatory virtues" (arXiv 2505.01372); permutation importance:
Breiman 2001, here as its exact expectation over all permutations.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from taught.errors import misfit
from taught.policy.evaluate import CoefficientIntervals, Evaluation, each_fold, training_alpha, training_ridge
from taught.policy.predictors import Known, trivial_predictions
from taught.policy.ridge import checked_data, ridge, row_order
from taught.stats.arrays import Bools, Floats, Ints
from taught.stats.intervals import Interval, plain, resample_counts

SHARE = 0.95  # of the held-out fit, for the number of features that carry it
STABLE = 0.95  # share of resamples that keep a sign
CONTROLS = 50  # random sets of prompts, for the comparison of sets
BINS = 10


class Fit(NamedTuple):
    """How a policy is fitted, in every part of the card alike; alpha None: chosen inside folds."""

    alpha: float | None
    fit_intercept: bool
    seed: int


class Calibration(NamedTuple):
    """Behavior against held-out prediction.

    Attributes
    ----------
    slope, intercept : of the least-squares line y = intercept + slope y_hat. A slope above 1: predictions are too
        timid, below 1: too bold
    error : sum_b n_b / N |mean y - mean y_hat| over bins b of equal size by y_hat, natural log
    error_by_chance : what the error would be with perfect means, from the spread within the bins:
        sum_b n_b / N sqrt(2 / pi) s_b / sqrt(n_b)
    bins : list of (n, mean y_hat, mean y)
    """

    slope: Interval
    intercept: Interval
    error: Interval
    error_by_chance: float
    bins: list[tuple[int, float, float]]


class Comparison(NamedTuple):
    """Policies fitted on two sets of prompts, and on random sets of the smaller one's size.

    Attributes
    ----------
    sets, n : names and sizes of the two sets
    correlation : of the coefficients of both; nan where one does not vary
    flips : coefficients whose signs differ
    sure_flips, sure : the same among coefficients whose interval excludes 0, and how many these are
    control_correlation, control_flips, control_sure_flips
        Means over random sets of all prompts, of the smaller set's size, against all prompts: what
        the smaller number of prompts does by itself.
    """

    sets: tuple[str, str]
    n: tuple[int, int]
    correlation: float
    flips: int
    sure_flips: int
    sure: int
    control_correlation: float
    control_flips: float
    control_sure_flips: float

    def to_dict(self) -> dict[str, Any]:
        """Ready for ``faithfulness.json``."""
        known = {name: plain(getattr(self, name)) for name in ("correlation", "control_correlation")}
        return {**self._asdict(), **known, "sets": list(self.sets), "n": list(self.n)}


@dataclass(frozen=True, eq=False)
class Card:
    """What the faithfulness card holds; R^2 is held out everywhere.

    Attributes
    ----------
    order : int64 [d], columns of X by |W_k| times the root mean square of Xc_k, largest first, fit on all prompts
    curve : float64 [d], R^2 with the first 1 .. d features; each fold takes the order of its own training rows
    needed : smallest number of features with 95% of the R^2 of all; nan where that is not positive
    sign_stability : float64 [d]
    sure : bool [d], the interval of the coefficient excludes 0
    permuted : length d, R^2 lost when the feature is permuted
    all_permuted : the same when the prompts' activations are permuted as rows, all features together
    predictors : name -> (R^2 of the predictor, R^2 of the policy - it, paired)
    """

    calibration: Calibration
    order: Ints
    curve: Floats
    needed: Interval
    sign_stability: Floats
    sure: Bools
    comparisons: tuple[Comparison, ...]
    permuted: list[Interval]
    all_permuted: Interval
    predictors: dict[str, tuple[Interval, Interval]]

    def to_dict(self, feature_ids: Sequence[int]) -> dict[str, Any]:
        """Ready for ``faithfulness.json``; ``feature_ids`` name the columns of X."""
        at = self.calibration
        curve = zip(self.order, self.curve, strict=True)
        lost = zip(feature_ids, self.permuted, strict=True)
        known = self.sign_stability[np.isfinite(self.sign_stability)]
        return {
            "calibration": {
                **{name: getattr(at, name).to_dict() for name in ("slope", "intercept", "error")},
                "error_by_chance": plain(at.error_by_chance),
                "bins": [dict(zip(("n", "y_hat", "y"), one, strict=True)) for one in at.bins],
            },
            "features": {
                "share": SHARE,
                "needed": self.needed.to_dict(),
                "curve": [{"feature_id": int(feature_ids[k]), "r2": plain(v)} for k, v in curve],
            },
            "signs": {
                "n": len(self.sure),
                "sure": int(self.sure.sum()),
                "stable": int((self.sign_stability >= STABLE).sum()),
                "median_stability": plain(np.median(known)) if known.size else None,
            },
            "sets": [comparison.to_dict() for comparison in self.comparisons],
            "permutation": {
                "all": self.all_permuted.to_dict(),
                "features": [{"feature_id": int(k), **e.to_dict()} for k, e in lost],
            },
            "predictors": {
                n: {"r2": r2.to_dict(), "gain": gain.to_dict()} for n, (r2, gain) in self.predictors.items()
            },
        }


class _Rows(NamedTuple):
    """The prompts sorted by id, so that random draws do not depend on the order given."""

    X: Floats
    y: Floats
    y_hat: Floats
    y_bar: Floats  # mean of the training rows of the prompt's fold
    fold: Ints
    counts: Floats  # [resamples, N]: how often each prompt is drawn
    fit: Fit


def faithfulness(
    X: ArrayLike,
    y: ArrayLike,
    known: Known,
    evaluation: Evaluation,
    intervals: CoefficientIntervals,
    *,
    fit: Fit,
    alpha: float,
    bootstrap: int,
    prompt_ids: Sequence[str] | None = None,
) -> Card:
    """Make the card of a policy. No model is needed.

    Cost: per fold one Cholesky decomposition of [d, d] and one ridge on up to 512 words, and
    ``CONTROLS`` policies. Statistics of resamples are products of counts with squared errors.

    Parameters
    ----------
    X, y : [N, d], [N], activations and behavior
    known : what trivial predictors may use, one entry a prompt in the order of X
    evaluation, intervals : of the same data by :func:`taught.policy.evaluate.evaluate_policy` and
        ``bootstrap_coefficients``, made with the same ``fit`` and the same resamples
    fit : as ``evaluation`` was made
    alpha : penalty of the policy on all prompts; the sets of prompts are compared at it

    Raises
    ------
    UserError
        The evaluation or the intervals are of other data; ``known`` has another number of prompts.
    """
    X, y = checked_data(X, y, prompt_ids)
    n, d = X.shape
    if (evaluation.n, evaluation.d) != (n, d) or intervals.lo.shape != (d,):
        found = {"prompts": evaluation.n, "features": evaluation.d, "intervals": intervals.lo}
        raise misfit("the evaluation and the policy", f"{n} prompts and {d} features", **found)
    for name in ("groups", "categories", "length", "h", "texts"):
        given = getattr(known, name)
        if given is not None and len(given) != n:
            raise misfit(f"X and the {name} of the prompts", f"one for each of {n} prompts", given=given)
    order = row_order(prompt_ids, len(y))
    X, y, fold = X[order], y[order], evaluation.fold[order]
    y_bar = np.array([y[train].mean() for train, _ in each_fold(fold)])[fold]
    rows = _Rows(X, y, evaluation.y_hat[order], y_bar, fold, resample_counts(len(y), bootstrap, fit.seed), fit)
    known = known.taken(order)
    curve, curve_draws = _r2(rows, _nested_predictions(rows))
    r2, r2_draws = curve[-1], curve_draws[:, -1]
    lost, lost_draws = _r2_of_squares(rows, _permuted_squares(rows))
    permuted = [Interval.of(float(r2 - v), r2_draws - b) for v, b in zip(lost, lost_draws.T, strict=True)]
    trivial = trivial_predictions(known, rows.y, fold, fit.seed)
    beside, draws = _r2(rows, np.stack([rows.y_hat, *trivial.values()], 1))
    gain, gains = beside[0] - beside, draws[:, :1] - draws
    predictors = {
        name: (Interval.of(beside[j], draws[:, j]), Interval.of(gain[j], gains[:, j]))
        for j, name in enumerate(trivial, 1)
    }
    sure = np.asarray((intervals.lo > 0) | (intervals.hi < 0))
    return Card(
        calibration=_calibration(rows),
        order=_by_weight(rows.X, ridge(rows.X, rows.y, alpha, fit.fit_intercept)[0], fit),
        curve=curve,
        needed=Interval.of(_first_above(curve), [_first_above(row) for row in curve_draws]),
        sign_stability=intervals.sign_stability,
        sure=sure,
        comparisons=tuple(_comparisons(rows, known, alpha, sure)),
        permuted=permuted[:-1],
        all_permuted=permuted[-1],
        predictors=predictors,
    )


def _r2(rows: _Rows, y_hat: Floats) -> tuple[Floats, Floats]:
    """R^2 [m] of m predictions [N, m], and on every resample [resamples, m]."""
    return _r2_of_squares(rows, (rows.y[:, None] - y_hat) ** 2)


def _r2_of_squares(rows: _Rows, squares: Floats) -> tuple[Floats, Floats]:
    total = (rows.y - rows.y_bar) ** 2
    with np.errstate(divide="ignore", invalid="ignore"):
        value = 1 - squares.sum(0) / total.sum()
        draws = 1 - rows.counts @ squares / (rows.counts @ total)[:, None]
    defined = total.any()
    return np.where(defined, value, np.nan), np.where(np.isfinite(draws) & defined, draws, np.nan)


def _calibration(rows: _Rows) -> Calibration:
    """Line and bins, on all prompts and on every resample of them."""
    y, y_hat, n = rows.y, rows.y_hat, len(rows.y)
    counts = np.vstack([np.ones(n), rows.counts])  # first all prompts, then the resamples
    size = counts.sum(1)
    x0, y0 = y_hat.mean(), y.mean()  # sums of squares cancel badly far from 0
    x, wrong = y_hat - x0, y - y_hat
    mx, my, xx, xy = (counts @ np.stack([x, y - y0, x**2, x * (y - y0)], 1) / size[:, None]).T
    with np.errstate(divide="ignore", invalid="ignore"):
        slope = (xy - mx * my) / (xx - mx**2)
    intercept = y0 + my - slope * (x0 + mx)
    bins = np.empty(n, dtype=np.int64)  # by the rank of the prediction, of at least five rows each
    bins[np.argsort(y_hat, kind="stable")] = np.arange(n) * max(min(BINS, n // 5), 1) // n
    inside = bins[:, None] == np.arange(bins.max() + 1)
    error = np.abs(counts @ (inside * wrong[:, None])).sum(1) / size
    spread = np.array([wrong[own].std(ddof=1) for own in inside.T])
    return Calibration(
        slope=Interval.of(slope[0], slope[1:]),
        intercept=Interval.of(intercept[0], intercept[1:]),
        error=Interval.of(error[0], error[1:]),
        error_by_chance=float((np.sqrt(2 / np.pi * inside.sum(0)) * spread).sum() / n),
        bins=[(int(own.sum()), float(y_hat[own].mean()), float(y[own].mean())) for own in inside.T],
    )


def _by_weight(X: Floats, W: Floats, fit: Fit) -> Ints:
    """Columns by |W_k| times the root mean square of Xc_k, largest first, ties as they stand."""
    Xc = X - X.mean(0) if fit.fit_intercept else X
    return np.argsort(-np.abs(W) * np.sqrt((Xc**2).mean(0)), kind="stable")


def _nested_predictions(rows: _Rows) -> Floats:
    """Held-out predictions [N, d] of the policies with the first 1 .. d features of the order.

    With the columns in order, U = L L' and L z = Xc' yc. The leading block of L belongs to the
    leading block of U, so the prediction with k features is the sum of the first k columns of
    (Xc L^-T) z: one decomposition gives all d policies.
    """
    out = np.empty(rows.X.shape)
    for train, test in each_fold(rows.fold):
        X, y, fit = rows.X[train], rows.y[train], rows.fit
        alpha = training_alpha(rows.X, rows.y, train, fit.alpha, fit.fit_intercept, fit.seed)
        order = _by_weight(X, ridge(X, y, alpha, fit.fit_intercept)[0], fit)
        x0, y0 = (X.mean(0), y.mean()) if fit.fit_intercept else (np.zeros(X.shape[1]), 0.0)
        Xc = (X - x0)[:, order]
        L = np.linalg.cholesky(Xc.T @ Xc + alpha * np.eye(len(order)))
        z = np.linalg.solve(L, Xc.T @ (y - y0))
        out[test] = y0 + np.cumsum(np.linalg.solve(L, (rows.X[test] - x0)[:, order].T).T * z, 1)
    return out


def _first_above(curve: Floats) -> float:
    """Smallest number of features whose R^2 reaches the share of that of all."""
    reached = np.flatnonzero(curve >= SHARE * curve[-1])
    return float(reached[0] + 1) if curve[-1] > 0 else np.nan


def _permuted_squares(rows: _Rows) -> Floats:
    """Expected squared errors [N, d + 1] when column k, in the end all, are permuted in each fold.

    With e the error, m and v mean and variance of X_k over the fold's prompts, every permutation
    equally likely: E (e_i + W_k (X_ik - X_pk))^2 = (e_i + W_k (X_ik - m))^2 + W_k^2 v.
    """
    out = np.empty((len(rows.y), rows.X.shape[1] + 1))
    for train, test in each_fold(rows.fold):
        W, intercept = training_ridge(rows.X, rows.y, train, *rows.fit)
        parts = rows.X[test] * W
        parts = np.column_stack([parts, parts.sum(1)])
        error = rows.y[test] - intercept - parts[:, -1]
        out[test] = (error[:, None] + parts - parts.mean(0)) ** 2 + parts.var(0)
    return out


def _comparisons(rows: _Rows, known: Known, alpha: float, sure: Bools) -> Iterator[Comparison]:
    """The positive group, as many of the negative beside it, and all prompts, two by two."""
    names, n = np.asarray(known.groups), len(rows.y)

    def coef(at: Bools | Ints) -> Floats:
        return ridge(rows.X[at], rows.y[at], alpha, rows.fit.fit_intercept)[0]

    sides = [np.flatnonzero(names == group) for group in (known.positive, known.negative)]
    smaller = min(map(len, sides))
    rng = np.random.default_rng(rows.fit.seed)
    balanced = np.sort(np.concatenate([rng.permutation(side)[:smaller] for side in sides]))
    sets = {f"{known.positive} only": sides[0], "balanced": balanced, "all": np.arange(n)}
    fitted = {name: coef(at) for name, at in sets.items()}
    first, second, everything = sets
    for a, b in ((first, everything), (first, second), (second, everything)):
        sizes = len(sets[a]), len(sets[b])
        rng = np.random.default_rng(rows.fit.seed)
        drawn = (np.sort(rng.permutation(n)[: min(sizes)]) for _ in range(CONTROLS))
        control = np.array([_agreement(coef(at), fitted[everything], sure) for at in drawn], dtype=np.float64).mean(0)
        r, flips, sure_flips = _agreement(fitted[a], fitted[b], sure)
        yield Comparison((a, b), sizes, r, flips, sure_flips, int(sure.sum()), *control.tolist())


def _agreement(a: Floats, b: Floats, sure: Bools) -> tuple[float, int, int]:
    """Correlation of two policies' coefficients, sign flips, and flips among the sure ones."""
    spread = a.std() * b.std()
    r = float(((a - a.mean()) * (b - b.mean())).mean() / spread) if spread > 0 else np.nan
    flipped = np.sign(a) * np.sign(b) < 0
    return r, int(flipped.sum()), int((flipped & sure).sum())
