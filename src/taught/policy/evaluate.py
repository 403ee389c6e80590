"""How far a policy can be trusted: held-out fit, what trivial predictors reach, stable signs.

Everything is out of fold: the row of a prompt never takes part in the prediction, the threshold or the mean that it is
judged against. Intervals are 95% percentile bootstrap over prompts, with the folds held fixed. Source of the accuracy:
SMDA, arXiv 2606.29171 (class threshold chosen on training rows only, judged against the class of the prompt), whose
majority class came close to it: hence the trivial predictors beside it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from taught.errors import UserError, misfit
from taught.policy.ridge import check_alpha, check_folds, checked_data, choose_alpha, ridge, row_order
from taught.stats.arrays import Bools, Floats, Ints
from taught.stats.intervals import Interval, middle, resamples
from taught.stats.ranks import spearman


class Finding(NamedTuple):
    """Something the reader of a policy must know: a stable code and a sentence with the numbers."""

    code: str
    message: str


class CoefficientIntervals(NamedTuple):
    """Bootstrap of the coefficients, float64 [d] each: 95% interval and sign stability."""

    lo: Floats
    hi: Floats
    sign_stability: Floats


@dataclass(frozen=True, eq=False)
class Evaluation:
    """Held-out quality of a policy.

    Attributes
    ----------
    y_hat : float64 [N], prediction for each prompt by the policy fitted without its fold, in the order given
    fold : int64 [N], the fold of each prompt
    r2 : 1 - sum (y - y_hat)^2 / sum (y - mean of the training rows)^2. Negative: worse than a constant
    spearman : rank correlation of y and y_hat over all prompts
    accuracy : share of the prompts of the two classes whose class the thresholded y_hat gives
    majority : accuracy of always naming the larger class
    accuracy_gain : accuracy - majority, paired over the same resamples
    baselines : predictors of y without the features, on the same folds: ``group`` (training mean of the prompt's group)
        and ``length`` (straight line in the prompt's length). Each a dict with ``r2``, ``spearman`` and, for length,
        ``accuracy``.
    """

    y_hat: Floats
    fold: Ints
    n: int
    d: int
    r2: Interval
    spearman: Interval
    accuracy: Interval
    majority: Interval
    accuracy_gain: Interval
    baselines: dict[str, dict[str, Interval]]
    warnings: tuple[Finding, ...]

    def to_dict(self) -> dict[str, Any]:
        """Everything but the arrays, ready for ``policy.json``."""
        names = ("r2", "spearman", "accuracy", "majority", "accuracy_gain")
        return {
            "n": self.n,
            "d": self.d,
            **{name: getattr(self, name).to_dict() for name in names},
            "baselines": {n: {key: e.to_dict() for key, e in row.items()} for n, row in self.baselines.items()},
            "warnings": [finding._asdict() for finding in self.warnings],
        }


class _Rows(NamedTuple):
    """The prompts, sorted by id so that random draws do not depend on the order given."""

    X: Floats
    y: Floats
    positive: Bools  # the class: in the positive group
    classed: Bools  # in the positive or the negative group
    fold: Ints


_Predicted = tuple[Floats, Bools]  # y_hat, and whether the thresholded y_hat says that the prompt is positive


def evaluate_policy(
    X: ArrayLike,
    y: ArrayLike,
    groups: Sequence[str],
    *,
    alpha: float | None,
    fit_intercept: bool,
    folds: int,
    seed: int,
    bootstrap: int,
    positive: str,
    negative: str,
    prompts_length: ArrayLike | None = None,
    prompt_ids: Sequence[str] | None = None,
) -> Evaluation:
    """Judge the policy out of fold, beside the majority class and trivial predictors.

    Folds are stratified by group. Cost: ``folds`` ridge fits and ``bootstrap`` resamples of N.

    Parameters
    ----------
    X, y : [N, d], [N], activations and behavior
    groups : length N, group of each prompt. Groups other than the two classes count for R^2 and Spearman only.
    alpha : ridge penalty. None: chosen by cross-validation inside the training rows of each fold.
    bootstrap : number of resamples; 0 leaves the intervals nan
    positive, negative : the classes. A prompt is called positive if its prediction lies above the threshold.
    prompts_length : length N, optional, for the length baseline, in any unit
    prompt_ids : length N, optional; given, folds and resamples are drawn over sorted ids: order of rows cannot matter
    """
    X, y = checked_data(X, y, prompt_ids)
    for what, given in (("group", groups), ("length", prompts_length)):
        if given is not None and np.shape(given) != y.shape:
            raise misfit(f"prompts and their {what}s", "one for each prompt", prompts=len(y), given=given)
    check_sides(groups, positive, negative)
    check_folds(folds, len(y))
    if alpha is not None:
        check_alpha(alpha)
    order = row_order(prompt_ids, len(y))
    length = None if prompts_length is None else np.asarray(prompts_length, dtype=np.float64)[order]
    names = np.asarray(groups, dtype=object)[order]
    classed = (names == positive) | (names == negative)
    fold = stratified_folds(names.tolist(), folds, seed)
    rows = _Rows(X[order], y[order], names == positive, classed, fold)

    def policy(train: Bools) -> Floats:
        W, intercept = training_ridge(rows.X, rows.y, train, alpha, fit_intercept, seed)
        return rows.X @ W + intercept

    y_bar, _ = _out_of_fold(rows, lambda train: np.full(len(y), rows.y[train].mean()))
    predicted = {
        "policy": _out_of_fold(rows, policy),
        "group": _out_of_fold(rows, lambda train: group_means(names.tolist(), rows.y, train)),
    }
    if length is not None:
        predicted["length"] = _out_of_fold(rows, lambda train: straight_line(length, rows.y, train))
    table = _estimates(rows, predicted, y_bar, bootstrap, seed)
    quality = {name: {key: table[f"{name} {key}"] for key in ("r2", "spearman", "accuracy")} for name in predicted}
    del quality["group"]["accuracy"]  # the group names the class: it would be 1 by construction and say nothing
    back = np.argsort(order)
    return Evaluation(
        y_hat=predicted["policy"][0][back],
        fold=rows.fold[back],
        n=len(y),
        d=X.shape[1],
        **quality.pop("policy"),
        majority=table["majority"],
        accuracy_gain=table["accuracy gain"],
        baselines=quality,
        warnings=tuple(_findings(table, len(y), X.shape[1])),
    )


def bootstrap_coefficients(
    X: ArrayLike,
    y: ArrayLike,
    *,
    alpha: float,
    fit_intercept: bool,
    n: int,
    seed: int,
    prompt_ids: Sequence[str] | None = None,
) -> CoefficientIntervals:
    """Refit on ``n`` resamples of the prompts. Cost O(n (N d^2 + d^3)).

    The intervals describe sampling of prompts around the penalised coefficients; they do not
    correct the shrinkage towards 0.

    Returns
    -------
    ``lo``, ``hi`` (2.5% and 97.5%) and ``sign_stability``, the share of resamples whose coefficient has the sign of
    the fit on all prompts; nan where that coefficient is 0.
    """
    X, y = checked_data(X, y, prompt_ids)
    check_alpha(alpha)
    if n < 1:
        raise UserError("the bootstrap needs resamples", value=n, rule="n >= 1", fix="set policy.bootstrap")
    order = row_order(prompt_ids, len(y))
    X, y = X[order], y[order]
    full, _ = ridge(X, y, alpha, fit_intercept)
    draws = np.stack([ridge(X[i], y[i], alpha, fit_intercept)[0] for i in resamples(len(y), n, seed)])
    lo, hi = middle(draws)
    same = (np.sign(draws) == np.sign(full)).mean(0)
    return CoefficientIntervals(lo, hi, np.where(full == 0, np.nan, same))


def class_threshold(y_hat: ArrayLike, positive: ArrayLike) -> float:
    """Find the cut with the most correct classes, calling ``y_hat > cut`` positive.

    Cuts lie halfway between neighbouring predictions, or at -inf or +inf (one class only). Among
    equally good cuts the lowest.
    """
    y_hat, positive = np.asarray(y_hat, dtype=np.float64), np.asarray(positive, dtype=bool)
    values, where = np.unique(y_hat, return_inverse=True)
    cuts = np.concatenate([[-np.inf], (values[:-1] + values[1:]) / 2, [np.inf]])
    # Raising the cut past a value makes its negatives right and its positives wrong.
    gains = np.bincount(where, np.where(positive, -1.0, 1.0), minlength=len(values))
    correct = positive.sum() + np.concatenate([[0.0], np.cumsum(gains)])
    return float(cuts[int(np.argmax(correct))])


def check_sides(groups: Sequence[str], positive: str, negative: str) -> None:
    """Refuse fewer than two prompts in one of the two groups that a policy is judged between."""
    for name in (positive, negative):
        count = sum(group == name for group in groups)
        if count < 2:
            raise UserError(
                f"the policy is judged between two groups, and {name!r} has {count} prompts",
                value="groups: " + ", ".join(sorted(set(groups))),
                rule=f"at least 2 prompts in {positive!r} and in {negative!r}",
                fix="set prompts.positive_group and prompts.negative_group, or add prompts",
            )


def stratified_folds(groups: Sequence[str], folds: int, seed: int) -> Ints:
    """Assign folds int64 [N]; every group is dealt over the folds as evenly as can be."""
    rng = np.random.default_rng(seed)
    names = np.asarray(groups)
    fold = np.empty(len(names), dtype=np.int64)
    dealt = 0
    for name in sorted(set(groups)):
        members = rng.permutation(np.flatnonzero(names == name))
        fold[members] = (dealt + np.arange(members.size)) % folds
        dealt += members.size
    return fold


def each_fold(fold: Ints) -> Iterator[tuple[Bools, Bools]]:
    """Training and test rows of each fold."""
    return ((fold != k, fold == k) for k in range(int(fold.max()) + 1))


def _out_of_fold(rows: _Rows, predict: Callable[[Bools], Floats]) -> _Predicted:
    """Predictions of every row, and its class, by what was fitted without the row's fold."""
    y_hat, says_positive = np.empty(len(rows.y)), np.zeros(len(rows.y), dtype=bool)
    for train, test in each_fold(rows.fold):
        fitted = predict(train)
        learned = train & rows.classed
        cut = class_threshold(fitted[learned], rows.positive[learned])
        y_hat[test], says_positive[test] = fitted[test], fitted[test] > cut
    return y_hat, says_positive


def training_ridge(
    X: Floats, y: Floats, train: Bools, alpha: float | None, fit_intercept: bool, seed: int
) -> tuple[Floats, float]:
    """Coefficients [d] and intercept of the policy fitted on the rows ``train`` only."""
    return ridge(X[train], y[train], training_alpha(X, y, train, alpha, fit_intercept, seed), fit_intercept)


def training_alpha(X: Floats, y: Floats, train: Bools, alpha: float | None, fit_intercept: bool, seed: int) -> float:
    """Return the penalty; where it is None, the one chosen by cross-validation inside ``train``."""
    if alpha is not None:
        return alpha
    inner = min(5, int(train.sum()))
    return choose_alpha(X[train], y[train], fit_intercept=fit_intercept, folds=inner, seed=seed)[0]


def group_means(groups: Sequence[str], y: Floats, train: Bools) -> Floats:
    """For every row the mean y [N] of its group's training rows; of all, where it has none."""
    names = np.asarray(groups)
    y_hat = np.full(len(y), y[train].mean())
    for name in set(groups):
        inside = names == name
        if (inside & train).any():
            y_hat[inside] = y[inside & train].mean()
    return y_hat


def straight_line(x: Floats, y: Floats, train: Bools) -> Floats:
    """For every row the value [N] of the least-squares line of y in x over the training rows."""
    x0, y0 = x[train].mean(), y[train].mean()
    own, yc = x[train] - x0, y[train] - y0
    slope = float(own @ yc) / float(own @ own) if own.any() else 0.0
    return np.asarray(y0 + slope * (x - x0))


def _estimates(
    rows: _Rows, predicted: dict[str, _Predicted], y_bar: Floats, bootstrap: int, seed: int
) -> dict[str, Interval]:
    """Every statistic on all rows and on the same resamples, so that differences are paired."""
    majority_right = rows.positive == (rows.positive[rows.classed].mean() > 0.5)

    def statistics(i: Ints) -> dict[str, float]:
        classed = i[rows.classed[i]]
        out = {"majority": _mean(majority_right[classed])}
        for name, (y_hat, says_positive) in predicted.items():
            total = float(((rows.y[i] - y_bar[i]) ** 2).sum())
            off = float(((rows.y[i] - y_hat[i]) ** 2).sum())
            out[f"{name} r2"] = 1 - off / total if total > 0 else float("nan")
            out[f"{name} spearman"] = spearman(rows.y[i], y_hat[i])
            out[f"{name} accuracy"] = _mean((says_positive == rows.positive)[classed])
        out["accuracy gain"] = out["policy accuracy"] - out["majority"]
        for name in predicted:
            out[f"r2 gain over {name}"] = out["policy r2"] - out[f"{name} r2"]
        return out

    values = statistics(np.arange(len(rows.y)))
    draws = [statistics(i) for i in resamples(len(rows.y), bootstrap, seed)]
    return {name: Interval.of(value, [draw[name] for draw in draws]) for name, value in values.items()}


def _mean(values: Bools) -> float:
    return float(values.mean()) if values.size else float("nan")


def _findings(table: dict[str, Interval], n: int, d: int) -> Iterator[Finding]:
    r2, accuracy, gain = table["policy r2"], table["policy accuracy"], table["accuracy gain"]
    if n < d:
        yield Finding("fewer-prompts-than-features", f"{n} prompts for {d} features")
    if not np.isfinite(r2.value):
        yield Finding("constant-behavior", "y is the same for every prompt; R^2 is not defined")
    elif not r2.lo > 0:
        text = f"held-out R^2 {r2.value:.3f} [{r2.lo:.3f}, {r2.hi:.3f}]: the features may predict the behavior"
        yield Finding("r2-interval-includes-0", f"{text} no better than a constant")
    if not gain.lo > 0:
        text = f"accuracy {accuracy.value:.3f} against {table['majority'].value:.3f} for the larger class"
        yield Finding("accuracy-not-above-majority", f"{text}, difference [{gain.lo:.3f}, {gain.hi:.3f}]")
    for name in ("group", "length"):
        over = table.get(f"r2 gain over {name}")
        if over is not None and np.isfinite(over.value) and not over.lo > 0:
            text = f"held-out R^2 {r2.value:.3f} against {table[f'{name} r2'].value:.3f} for the prompt's {name} alone"
            yield Finding(f"not-better-than-{name}", f"{text}, difference [{over.lo:.3f}, {over.hi:.3f}]")
