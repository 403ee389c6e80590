"""Which retraining next: subsets chosen so that the variance of an asked effect falls fastest.

A pool of Q subsets with a reference distribution (uniform: "a random subset") defines what is asked
without a model of training. With x the number of members of a group of n examples in a subset,

    effect = n Cov(x, outcome) / Var(x) = sum_q reference_q g_q outcome_q,
    g_q = n (x_q - mean x) / Var(x)

the slope of the outcome on x, for the whole group; n = 1 asks for one example. In a linear datamodel, outcome =
constant + sum of theta over the members (Ilyas et al., arXiv 2202.00622), it is the sum of the group's theta; in
subsets of one size, where whoever joins takes another's place, minus that of as many average others.

**Drawing.** Subsets are drawn with probabilities p and weighted by reference / p, which is unbiased
for any positive p. The variance of the next term falls with p nearest to

    p* ~ reference_q |g_q|      (several effects: the root of the sum of their g_q^2, each scaled)

the c-optimal (A-optimal) choice among weighted estimates with equal residuals. Earlier retrainings are part of the
sample: p of a new round is what brings the *mixture* of all rounds nearest to p*, as in MVAL (Tucker and Joachims,
arXiv 2202.01721), with a share of the reference mixed in. Since g follows from the memberships, p depends on no
outcome: all retrainings of a round can run at once, and reweighting earlier ones leaves the estimate unbiased.

**Control variate.** What a linear datamodel with the influence scores as its prior predicts is subtracted before
weighting, and its exact mean over the pool is added: the variance is that of the residual. Each fold of the draws is
predicted from the others, so this too leaves the estimate unbiased, whatever the model is worth.

**Couples.** In the linear datamodel the c-optimal design of one effect is the same subset with and
without the group: the rest cancels. :func:`couples` makes such, with random backgrounds, so that
their mean difference is unbiased for the group's effect averaged over backgrounds without any
model; it asks about adding the group, not about putting it in another's place.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from taught.errors import UserError, refuse
from taught.stats.arrays import Floats
from taught.stats.intervals import mean_by_t, student_t
from taught.validation.subsets import Subsets, finite_values, random_subsets, summed

MIX = 0.1
FOLDS = 5
POOL = 20  # subsets to choose from, for each that is drawn
# Variance of theta over that of the noise, times the mean size of a membership's kernel.
_RATIOS = np.array([0.0, *np.logspace(-3, 3, 13)])
# Fewest outcomes that a datamodel is fitted to; of fewer the mean is taken.
_FEWEST = 4


@dataclass(frozen=True, eq=False)
class Question:
    """Effects asked of a pool: effect_k = sum_q reference_q weights_kq outcome_q.

    Attributes
    ----------
    asked : K names
    pool : Q subsets
    reference : float64 [Q], sums to 1
    weights : float64 [K, Q], g of the module docstring
    """

    asked: tuple[str, ...]
    pool: Subsets
    reference: Floats
    weights: Floats


@dataclass(frozen=True, eq=False)
class Round:
    """Subsets that were drawn, with replacement.

    Attributes
    ----------
    probabilities : float64 [Q], of each subset of the pool at each draw
    drawn : names
    """

    probabilities: Floats
    drawn: tuple[str, ...]


@dataclass(frozen=True)
class Effect:
    """An estimated effect with its 95% interval.

    Attributes
    ----------
    asked : name of the group
    value, lo, hi : change of the outcome; positive: the group raises it
    retrainings : different subsets it rests on
    """

    asked: str
    value: float
    lo: float
    hi: float
    retrainings: int


def ask(pool: Subsets, groups: Mapping[str, Collection[str]], reference: Floats | None = None) -> Question:
    """Ask for the effects of groups of examples (of one id: of that example).

    Parameters
    ----------
    groups : name -> example ids
    reference : float64 [Q], or None for uniform

    Raises
    ------
    UserError
        A group's number of members is the same in every subset of the pool.
    """
    ids = sorted(pool.inclusion)
    held = pool.membership(ids)
    rho = np.full(len(pool), 1 / len(pool)) if reference is None else reference
    weights = []
    for name, group in groups.items():
        x = held[:, [example in group for example in ids]].sum(1)
        if np.ptp(x[rho > 0]) == 0:
            what, rule = "the pool says nothing about this group", "its number of members differs between subsets"
            raise UserError(what, value=name, rule=rule, fix="use another pool")
        off = x - rho @ x
        weights.append(len(group) * off / (rho @ off**2))
    return Question(tuple(groups), pool, rho, np.stack(weights))


def next_probabilities(question: Question, earlier: Sequence[Round], count: int, *, mix: float = MIX) -> Floats:
    """Probabilities [Q] of the next ``count`` draws: those that bring all rounds nearest to p*.

    Parameters
    ----------
    earlier : rounds that were drawn from the same pool; a random one has ``question.reference``
    mix : share of the reference, which keeps every subset possible
    """
    g = question.weights / np.sqrt((question.reference * question.weights**2).sum(1))[:, None]
    best = question.reference * np.sqrt((g**2).sum(0))
    best /= best.sum()
    before = sum((len(done.drawn) * done.probabilities for done in earlier), np.zeros(len(best)))
    missing = np.maximum(_level(best, before, count) * best - before, 0)
    return (1 - mix) * missing / missing.sum() + mix * question.reference


def draw(question: Question, probabilities: Floats, count: int, *, seed: int) -> Round:
    """Draw subsets from the pool, with replacement."""
    rng = np.random.default_rng(seed)
    picks = rng.choice(len(probabilities), size=count, p=probabilities)
    return Round(probabilities, tuple(question.pool.names[i] for i in picks))


def estimate(
    question: Question,
    rounds: Sequence[Round],
    outcomes: Mapping[str, float],
    scores: Mapping[str, float] | None = None,
    *,
    folds: int = FOLDS,
) -> list[Effect]:
    """Weighted estimates of the asked effects, unbiased (module docstring).

    A fold is weighted by the mixture of the probabilities that its draws came from (Owen and Zhou
    2000, "balance heuristic"). The interval is Student's t on the weighted residuals within folds.

    Parameters
    ----------
    rounds : all retrainings there are, random ones included; probabilities must not have been chosen by outcomes
    outcomes : subset name -> measured change
    scores : example id -> influence, the datamodel's prior; None: the mean outcome of the other folds
        is all that is subtracted

    Raises
    ------
    UserError
        A drawn subset has no finite outcome, or there are fewer than 2 draws a fold.
    """
    row = {name: q for q, name in enumerate(question.pool.names)}
    drawn = np.array([row[name] for done in rounds for name in done.drawn], dtype=np.int64)
    fold = np.arange(len(drawn)) % folds
    source = np.repeat(np.arange(len(rounds)), [len(done.drawn) for done in rounds])
    y = _known([question.pool.names[q] for q in drawn], outcomes)
    _refuse_few(len(drawn), folds)
    value, variance = np.zeros(len(question.asked)), np.zeros(len(question.asked))
    model = None if scores is None else _Datamodel(question.pool, scores)
    for k in range(folds):
        inside, rest = fold == k, fold != k
        q, n = drawn[inside], int(inside.sum())
        mixture = sum(rounds[r].probabilities[q] for r in source[inside]) / n
        mean = np.full(len(row), y[rest].mean())
        guess = mean if model is None else model.predict(drawn[rest], y[rest])
        terms = question.weights[:, q] * (question.reference[q] / mixture * (y[inside] - guess[q]))
        share = n / len(drawn)
        value += share * (question.weights @ (question.reference * guess) + terms.mean(1))
        variance += share**2 * terms.var(1, ddof=1) / n
    half = student_t(len(drawn) - folds) * np.sqrt(variance)
    count = len(set(drawn.tolist()))
    return [
        Effect(name, float(v), float(v - h), float(v + h), count)
        for name, v, h in zip(question.asked, value, half, strict=True)
    ]


@dataclass(frozen=True, eq=False)
class Chosen:
    """Subsets that were chosen for a question about one group, after random ones.

    Attributes
    ----------
    question : of the pool they come from
    rounds : the random ones if any, then the chosen ones
    subsets : all different ones of the rounds
    """

    question: Question
    rounds: tuple[Round, ...]
    subsets: Subsets


def choose(
    ids: Sequence[str], name: str, group: Collection[str], size: int, count: int, *, seed: int, random: int = 0
) -> Chosen:
    """``count`` subsets of ``size`` examples for the effect of a group, drawn as the module says.

    Parameters
    ----------
    random : so many subsets of ``random_subsets`` with this size and seed are trained on anyway;
        they are the first round

    Raises
    ------
    UserError
        As :func:`random_subsets` and :func:`ask`; or too few for an estimate.
    """
    _refuse_few(random + count, FOLDS)
    most = max(random, count, math.comb(len(ids), size) // 2)
    pool = random_subsets(ids, size, min(POOL * (random + count), most), seed=seed)
    question = ask(pool, {name: group})
    earlier = (Round(question.reference, pool.names[:random]),) if random else ()
    probabilities = next_probabilities(question, earlier, count)
    rounds = (*earlier, draw(question, probabilities, count, seed=seed))
    drawn = dict.fromkeys(name for done in rounds for name in done.drawn)
    members = dict(zip(pool.names, pool.members, strict=True))
    subsets = Subsets(tuple(drawn), tuple(members[name] for name in drawn), pool.inclusion)
    return Chosen(question, rounds, subsets)


@dataclass(frozen=True, eq=False)
class Couples:
    """Subsets in couples: a background of examples, and the same with a group added.

    Attributes
    ----------
    asked : name of the group
    subsets : all 2 B of them
    without, including : B names each, couple by couple
    """

    asked: str
    subsets: Subsets
    without: tuple[str, ...]
    including: tuple[str, ...]


def couples(ids: Sequence[str], name: str, group: Collection[str], size: int, count: int, *, seed: int) -> Couples:
    """``count`` random backgrounds of ``size`` examples outside the group, without and with it.

    Raises
    ------
    UserError
        The group holds ids that are not among the examples; fewer than 2 couples; or as :func:`random_subsets`.
    """
    if count < 2:
        fix = "raise validation.subsets"
        raise UserError("too few couples for an interval", value=count, rule="at least 2", fix=fix)
    refuse(sorted(set(group) - set(ids)), "the group holds unknown examples")
    others = [example for example in ids if example not in set(group)]
    backgrounds = random_subsets(others, size, count, seed=seed)
    without = tuple(f"without-{name}-{i:04d}" for i in range(count))
    including = tuple(f"with-{name}-{i:04d}" for i in range(count))
    joined = tuple(tuple(sorted({*members, *group})) for members in backgrounds.members)
    inclusion = {**backgrounds.inclusion, **dict.fromkeys(group, 0.5)}
    subsets = Subsets((*without, *including), (*backgrounds.members, *joined), inclusion)
    return Couples(name, subsets, without, including)


def couple_effect(made: Couples, outcomes: Mapping[str, float]) -> Effect:
    """Mean difference within couples, with Student's t interval over the backgrounds.

    Raises
    ------
    UserError
        A subset has no finite outcome.
    """
    mean = mean_by_t(_known(made.including, outcomes) - _known(made.without, outcomes))
    return Effect(made.asked, *mean, 2 * len(made.without))


class _Datamodel:
    """outcome = a + b (sum of scores) + (sum of theta) + noise; theta and noise normal around 0.

    a and b are fitted by generalised least squares; the ratio of the variances has the largest
    restricted likelihood (REML). Memory: one number a draw and subset of the pool.
    """

    def __init__(self, pool: Subsets, scores: Mapping[str, float]) -> None:
        self.features = pool.membership(sorted(pool.inclusion)).astype(np.float64)
        total = summed(pool, scores)
        spread = float(total.std())
        columns = [np.ones(len(pool)), (total - total.mean()) / (spread or 1.0)]
        self.fixed = np.stack(columns[: 2 if spread > 0 else 1], 1)

    def predict(self, rows: NDArray[np.int64], y: Floats) -> Floats:
        """Expected outcome of every subset of the pool, [Q], from the outcomes y of some rows."""
        if len(rows) < _FEWEST:
            return np.full(len(self.fixed), y.mean())
        H, kernel = self.fixed[rows], self.features @ self.features[rows].T
        u, s, _ = np.linalg.svd(H)
        basis = u[:, int((s > 1e-9 * s[0]).sum()) :]  # [n, n - rank], orthogonal to the columns of H
        values, vectors = np.linalg.eigh(basis.T @ kernel[rows] @ basis)
        values = np.maximum(values, 0)
        z = vectors.T @ (basis.T @ y)
        mean = float(values.mean())
        scales = _RATIOS / mean if mean > 0 else np.zeros(1)
        d = 1 + scales[:, None] * values
        noise = (z**2 / d).mean(1)
        with np.errstate(divide="ignore"):
            likelihood = -(len(z) * np.log(noise) + np.log(d).sum(1))
        scale = scales[int(np.where(noise > 0, likelihood, -np.inf).argmax())]
        alpha = basis @ (vectors @ (z / (1 + scale * values)))
        left = y - scale * kernel[rows] @ alpha - alpha
        return self.fixed @ (np.linalg.pinv(H) @ left) + scale * kernel @ alpha


def _level(best: Floats, before: Floats, count: int) -> float:
    """c with sum of max(c best - before, 0) = count."""
    before, best = before[best > 0], best[best > 0]
    order = np.argsort(before / best, kind="stable")
    levels = (count + before[order].cumsum()) / best[order].cumsum()
    return float(levels[np.flatnonzero(levels > (before / best)[order])[-1]])


def _refuse_few(drawn: int, folds: int) -> None:
    rule = f"at least 2 for each of {folds} folds"
    if drawn < 2 * folds:
        raise UserError("too few retrainings for an estimate", value=drawn, rule=rule, fix="raise validation.subsets")


def _known(names: Sequence[str], outcomes: Mapping[str, float]) -> Floats:
    rule, fix = "one number for each subset", "finish their retraining"
    return finite_values(names, outcomes, "subsets have no finite outcome", rule=rule, fix=fix)
