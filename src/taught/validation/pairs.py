"""Named documents against random ones of the same topic and size: forgetting them, or training on them alone.

Influence names k documents: those that raise a target most, and those that raise it least. Beside the former stand
random ones that hold as many documents of each topic and about as many tokens; the latter are compared with the same
random ones, so they may be of other topics. Pair i trains (or unlearns) with both under
one seed, so that the order of batches and the first weights of a LoRA are the same on both sides; only the random
documents are drawn anew. For each target

    d_i = change by the named documents - change by the random ones of pair i

**Direction.** What influence foresees for d has a sign: that of the difference of the mean influences, turned round
where documents are forgotten. All tests are one-sided in this direction.

**Test.** The signed-rank test of Wilcoxon (1945) on d_1 .. d_n, exact: among the 2^n ways of turning the signs, the
share that is at least as far in the direction. So p is at least 2^-n, and with fewer than 5 pairs no result can be
called significant. It is corrected over the targets and budgets of a design and a kind of named documents, by
Benjamini and Hochberg, and by Holm. Effect sizes: the rank-biserial correlation (share of the rank sum in the
direction, minus the rest), and the mean of d with its interval by Student's t. A bootstrap of five or eight pairs
would be too short by a third.

**One set.** The named documents are the same in every pair. The test says whether *these* documents do more than random
ones. How often a set that means nothing would look as good is another question: ``p_draw`` is the place of the named
documents' mean change among the random sets', (1 + those at least as far) / (n + 1), which needs 19 pairs to fall to
.05. Where few other documents are alike, the same set is drawn for several pairs: it counts once in ``p_draw``, as the
mean over its pairs, while p then says of these few sets only what other seeds would give.

**Verdict.**

    supported       p (Benjamini-Hochberg) below .05, and the interval lies beyond 0 in the foreseen direction
    not supported   the interval lies on the other side of 0, or all of it is smaller than what influence foresees
    undecided       everything else

The size that influence foresees is known where training takes the steps that influence is about, plain ones from the
base model; elsewhere only its sign counts.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import ArrayLike

from taught.errors import UserError, refuse
from taught.stats.arrays import Floats
from taught.stats.intervals import Interval, mean_by_t
from taught.stats.multiplicity import benjamini_hochberg, holm
from taught.stats.ranks import ranks
from taught.validation.subsets import Subsets, alike_subsets

Verdict = Literal["supported", "not supported", "undecided"]

ARMS = ("highest", "lowest")
LEVEL = 0.05
LEAST_PAIRS = 5  # of fewer, 2^-n is above the level


@dataclass(frozen=True, eq=False)
class Plan:
    """What is to be forgotten, or trained on alone.

    Attributes
    ----------
    budgets : numbers of documents named
    subsets : examples by the name of their set
    """

    budgets: tuple[int, ...]
    pairs: int
    subsets: Subsets

    def repeats(self, name: str) -> Sequence[int]:
        """The pairs that a set belongs to: all, or of a random one its own."""
        arm, _, *pair = name.split("-")
        return range(self.pairs) if arm in ARMS else [int(pair[0])]

    def same(self, budget: int) -> tuple[int, ...]:
        """For each pair the first one that has the same random documents."""
        members = dict(zip(self.subsets.names, self.subsets.members, strict=True))
        sets = [members[set_name("random", budget, pair)] for pair in range(self.pairs)]
        return tuple(map(sets.index, sets))

    def few_sets(self) -> str | None:
        """A sentence, where pairs share their random documents; None else."""
        shared = {k: n for k in self.budgets if (n := len(set(self.same(k)))) < self.pairs}
        if not shared:
            return None
        said = ", ".join(f"{n} with {k} documents" for k, n in shared.items())
        return f"the {self.pairs} pairs share random documents: different sets are {said}, and p knows no others"


def set_name(arm: str, budget: int, pair: int | None = None) -> str:
    """``highest-12``, ``lowest-12``, ``random-12-0``: the random set of the first pair."""
    return f"{arm}-{budget}" + ("" if pair is None else f"-{pair}")


@dataclass(frozen=True)
class PairRow:
    """Named documents against random ones on one target.

    Attributes
    ----------
    design : "unlearn" or "teach"
    arm : "highest" or "lowest": which documents were named, by their influence on ``named_by``
    documents : k
    pairs : n
    foreseen : +1 or -1, the sign that influence gives the difference
    predicted : the difference that influence foresees, in the target's unit; nan where only its sign is known
    named, random : mean change of the target by each side
    difference, lo, hi : mean of d with its 95% interval
    rank_biserial : from -1 to 1; positive: in the foreseen direction
    p, p_bh, p_holm : one-sided, and corrected
    p_draw : place of the named documents among random sets (module docstring)
    least_p : 2^-n, below which p cannot be
    stopped : runs that the guard stopped, of both sides
    """

    design: str
    arm: str
    target: str
    named_by: str
    documents: int
    pairs: int
    foreseen: int
    predicted: float
    named: float
    random: float
    difference: float
    lo: float
    hi: float
    rank_biserial: float
    p: float
    p_bh: float
    p_holm: float
    p_draw: float
    least_p: float
    stopped: int
    verdict: str


@dataclass(frozen=True, eq=False)
class Measured:
    """What the pairs of one set did to one target.

    Attributes
    ----------
    named, random : float64 [n], change of the target in each pair
    foreseen : difference of the mean influences, highest or lowest minus random; turned round for ``unlearn``
    predicted : the difference of the changes that influence foresees, or nan
    stopped : runs of both sides that were stopped
    same : of each pair the first one with the same random documents (:meth:`Plan.same`); none: all are different
    """

    design: str
    arm: str
    target: str
    documents: int
    named: Floats
    random: Floats
    foreseen: float
    predicted: float = math.nan
    stopped: int = 0
    same: Sequence[int] = ()


def plan_pairs(
    scores: Mapping[str, float],
    documents: Mapping[str, str],
    topics: Mapping[str, str],
    tokens: Mapping[str, int],
    budgets: Sequence[int],
    pairs: int,
    *,
    seed: int,
) -> Plan:
    """The named documents, and random ones of the same topics and size for each pair.

    Parameters
    ----------
    scores : example id -> influence; that of a document is the sum over its windows, and the first to be named is the
        highest (lowest), ties to the smaller id
    documents : example id -> the document that it is a window of; an example that is whole is its own document
    topics : document -> topic; the same for all where nothing is to be held fixed
    tokens : example id -> scored tokens
    budgets : numbers of documents to name

    Raises
    ------
    UserError
        A score is not finite; a budget takes all documents or none; a topic has too few other documents, or none of
        them are of that size.
    """
    refuse(sorted(i for i, value in scores.items() if not math.isfinite(value)), "scores are not finite")
    windows: dict[str, list[str]] = {}
    for example in sorted(scores):
        windows.setdefault(documents[example], []).append(example)
    value = {name: math.fsum(scores[i] for i in own) for name, own in windows.items()}
    length = {name: float(sum(tokens[i] for i in own)) for name, own in windows.items()}
    steps = tuple(sorted(set(budgets)))
    if not steps or steps[0] < 1 or steps[-1] >= len(windows):
        given, rule = (
            f"{list(budgets)} of {len(windows)} documents",
            f"numbers of documents from 1 to {len(windows) - 1}",
        )
        what, fix = "the documents to forget leave none to retain", "lower validation.budgets"
        raise UserError(what, value=given, rule=rule, fix=fix)
    members: dict[str, tuple[str, ...]] = {}
    for k in steps:
        ranking = sorted(value, key=lambda name: (-value[name], name))
        lowest = sorted(value, key=lambda name: (value[name], name))[:k]
        random = alike_subsets(ranking[:k], ranking[k:], topics, length, pairs, seed=seed)
        sets: dict[str, Sequence[str]] = {set_name("highest", k): ranking[:k], set_name("lowest", k): lowest}
        sets |= {set_name("random", k, i): drawn for i, drawn in enumerate(random)}
        members |= {name: tuple(sorted(i for d in chosen for i in windows[d])) for name, chosen in sets.items()}
    held = [i for some in members.values() for i in some]
    inclusion = {i: held.count(i) / len(members) for i in sorted(scores)}
    return Plan(steps, pairs, Subsets(tuple(members), tuple(members.values()), inclusion))


def pair_rows(measured: Sequence[Measured], named_by: str) -> list[PairRow]:
    """Tests, effect sizes and verdicts; corrected within each design and arm."""
    rows = []
    for family in dict.fromkeys((it.design, it.arm) for it in measured):
        some = [it for it in measured if (it.design, it.arm) == family]
        signs = [-1 if it.foreseen < 0 else 1 for it in some]
        gaps = [it.named - it.random for it in some]
        p = [signed_rank(sign * d) for sign, d in zip(signs, gaps, strict=True)]
        for it, sign, d, p_one, bh, by_holm in zip(some, signs, gaps, p, benjamini_hochberg(p), holm(p), strict=True):
            mean = mean_by_t(d)
            same = {
                name: getattr(it, name) for name in ("design", "arm", "target", "documents", "predicted", "stopped")
            }
            rows.append(
                PairRow(
                    **same,
                    named_by=named_by,
                    pairs=len(d),
                    foreseen=sign,
                    named=float(it.named.mean()),
                    random=float(it.random.mean()),
                    difference=mean.value,
                    lo=mean.lo,
                    hi=mean.hi,
                    rank_biserial=rank_biserial(sign * d),
                    p=p_one,
                    p_bh=float(bh),
                    p_holm=float(by_holm),
                    p_draw=p_among(sign * it.named, sign * it.random, it.same),
                    least_p=least_p(len(d)),
                    verdict=verdict(float(bh), mean, sign, it.predicted),
                )
            )
    return rows


def least_p(pairs: int) -> float:
    """The smallest p that so many pairs can give, one-sided."""
    return 0.5**pairs


def few_pairs(pairs: int) -> str | None:
    """A sentence, where no p below .05 can be reached with so many pairs; None else."""
    if pairs >= LEAST_PAIRS:
        return None
    return f"with {pairs} pairs p cannot fall below {least_p(pairs):.3g}: nothing can be called supported, 5 can"


def signed_rank(d: ArrayLike) -> float:
    """p of Wilcoxon's signed-rank test of d [n] against d symmetric about 0; alternative: d is larger.

    Exact up to 13 pairs whatever the ties; above that too where there are none and no zeros.
    """
    from scipy.stats import PermutationMethod, wilcoxon

    x = _not_zero(d)
    if not x.size:
        return 1.0
    tied = len(np.unique(np.abs(x))) < x.size
    method = PermutationMethod(n_resamples=9999, rng=np.random.default_rng(0)) if tied else "exact"
    return float(wilcoxon(x, alternative="greater", method=method).pvalue)


def rank_biserial(d: ArrayLike) -> float:
    """(W+ - W-) / (W+ + W-) of the ranks of |d|, from -1 to 1; 0 where all are 0 (Kerby 2014)."""
    x = _not_zero(d)
    each = ranks(np.abs(x)) + 1
    return float((each * np.sign(x)).sum() / each.sum()) if x.size else 0.0


def _not_zero(d: ArrayLike) -> Floats:
    x = np.asarray(d, dtype=np.float64)
    return x[x != 0]


def p_among(named: Floats, random: Floats, same: Sequence[int] = ()) -> float:
    """Place of the named documents' mean change among those by n different random sets: 1 / (n + 1) at least.

    Parameters
    ----------
    same : of each random change the first one by the same set; none: all sets are different
    """
    sets = np.asarray(same or range(len(random)))
    means = np.array([random[sets == one].mean() for one in np.unique(sets)])
    return float((1 + (means >= named.mean()).sum()) / (1 + len(means)))


def verdict(p: float, difference: Interval, foreseen: int, predicted: float = math.nan) -> Verdict:
    """What the pairs say of what influence foresaw (module docstring)."""
    lo, hi = sorted((foreseen * difference.lo, foreseen * difference.hi))
    if p < LEVEL and lo > 0:
        return "supported"
    if hi < 0 or hi < foreseen * predicted:
        return "not supported"
    return "undecided"


def foreseen_change(steps: Sequence[Sequence[str]], rates: Sequence[float], influence: Mapping[str, float]) -> float:
    """What influence says that a run changes: the sum over its steps of rate times the mean over the batch.

    Parameters
    ----------
    steps : example ids of each step
    rates : of each step, over the rate that the influence is stated at; negative where the step goes up on the loss
    """
    each = (rate * math.fsum(influence[i] for i in ids) / len(ids) for ids, rate in zip(steps, rates, strict=True))
    return math.fsum(each)
