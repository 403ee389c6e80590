"""Capability maps: what the documents of each bin of a corpus do to each benchmark, and how sure that is.

A bin is the documents that share a label (a topic) or two (a topic and a format). x_d is the influence of document d on
a benchmark: its mean over the benchmark's questions. Of the n documents of bin b

    t_b  trimmed mean of x_d: without the share `trim` at either end, and without one document at least
    e_b  t_b less the trimmed mean of all documents: beside the corpus
    a_b  probability that a document of the bin has a larger x than one from elsewhere, ties by half

stand beside the plain mean, the median, the share of positive documents, and the published z: (mean of b - mean over
bins of their means) / sample standard deviation over bins. Values of documents have heavy tails, so one document can
make a bin's mean, and one bin a topic's. Hence the ranges with one document, and with one bin, left out, and the name
of what carries a mean (:func:`carries`).

Intervals are percentiles of a bootstrap that draws documents within each bin and questions within each benchmark, the
same questions for all bins; so they say what other documents of these kinds and other questions of these benchmarks
would give. Documents alone are drawn where no values of single questions are given.

The test permutes the labels of bins over documents, the questions being as they are: is the bin unlike as many random
documents? Its statistic is the mean rank of the bin's documents among all, which is a_b. A rank bounds what one
document can do, however extreme its value: it moves the mean rank of n documents by at most 1/n of the range. A test of
the plain mean would ask where the outlier lies. p is two-sided, the share of draws at least as far from the middle, the
data included. Where fewer than ``FEW`` draws are as far, p is that of the normal distribution with the variance that
permutation has: sums of ranks have lighter tails than it, so this p is rather too large (it is not taken where ties
give the ranks heavier tails). Corrected p: Holm's and Benjamini-Hochberg's, over all tested bins and benchmarks of one
level.

Bins below the minimum of documents, and those of documents without a label, are shown and not tested. With two columns
each column is mapped by itself too, as levels ``row`` and ``column``.

A contrast of benchmarks, "a - b" or "(a - b) - (c - d)", is one more value of each document: the same combination of
x / s, s a benchmark's robust scale (:func:`spread`), since benchmarks differ in unit and size. Everything above holds
for it. Its z is the published contrast, the combination of the benchmarks' z.

Source: the map is that of arXiv 2606.19625, which gives means, z and differences of z.
"""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike

from taught.analysis.partition import Part, Values, chunks, make_values, pairs, spread, trimmed_mean
from taught.analysis.profiles import Agreement, agreements
from taught.errors import UserError, misfit, refuse, refuse_repeated
from taught.stats.arrays import Floats
from taught.stats.intervals import middle, plain
from taught.stats.multiplicity import benjamini_hochberg, holm
from taught.stats.ranks import ranks

FEW = 10  # draws that reach a value, below which their share is too rough a p
EXAMPLES = 3
FAR = 5.0  # robust scales from the middle, beyond which one value is called an outlier
WORK = 2_000_000_000  # documents x draws x columns


class Bin(NamedTuple):
    """What the documents of one bin, of one row or of one column do to one benchmark, or to one contrast.

    Attributes
    ----------
    level : "bin"; with two columns also "row" (a label of the first) and "column" (a label of the second)
    row, column : the labels; None where the level has none
    benchmark : its name, or the contrast as it was written
    n_documents : documents in it
    tested : whether it has the minimum of documents, and labels
    rank : 1 for the largest trimmed mean of those tested at its level
    mean, lo, hi : over its documents; 95% interval over documents and questions, None where it is not tested
    median, share_positive : over its documents
    trimmed, trimmed_lo, trimmed_hi : trimmed mean, with its interval
    effect, effect_lo, effect_hi : trimmed mean beside the corpus's, with its interval
    without_lo, without_hi : range of the mean with one document left out
    carried_by : the document that carries the mean, see :func:`carries`; None where none does
    examples : its up to three documents that are furthest on the side of its effect
    z : of its mean over the means of its level, as published; of a contrast the combination of the z
    over_bins, over_bins_lo, over_bins_hi : of a row or column the mean over its bins of their means, and its range with
        one bin left out
    over_bins_carried_by : label, in the other column, of the bin that carries it
    above : probability that a document of it stands above one from elsewhere
    p, p_holm, p_bh : of the permutation test, and corrected; None where it is not tested
    """

    level: str
    row: str | None
    column: str | None
    benchmark: str
    n_documents: int
    tested: bool
    rank: int | None
    mean: float | None
    lo: float | None
    hi: float | None
    median: float | None
    share_positive: float | None
    trimmed: float | None
    trimmed_lo: float | None
    trimmed_hi: float | None
    effect: float | None
    effect_lo: float | None
    effect_hi: float | None
    without_lo: float | None
    without_hi: float | None
    carried_by: str | None
    examples: tuple[str, ...]
    z: float | None
    over_bins: float | None
    over_bins_lo: float | None
    over_bins_hi: float | None
    over_bins_carried_by: str | None
    above: float | None
    p: float | None
    p_holm: float | None
    p_bh: float | None


class BinMap(NamedTuple):
    """All bins.

    Attributes
    ----------
    columns : the one or two columns of labels
    benchmarks, contrasts : names, in order
    bins : rows of the benchmarks, level by level
    contrasted : rows of the contrasts
    agreements : correlations of the benchmarks' profiles over the bins
    permutations, bootstrap : draws that were made
    """

    columns: tuple[str, ...]
    benchmarks: tuple[str, ...]
    contrasts: tuple[str, ...]
    bins: tuple[Bin, ...]
    contrasted: tuple[Bin, ...]
    agreements: tuple[Agreement, ...]
    permutations: int
    bootstrap: int


def map_bins(
    document_ids: Sequence[str],
    labels: Mapping[str, Sequence[str]],
    values: Mapping[str, ArrayLike],
    questions: Mapping[str, ArrayLike] | None = None,
    *,
    contrasts: Sequence[str] | None = None,
    minimum: int = 5,
    trim: float = 0.1,
    permutations: int = 9999,
    bootstrap: int = 1000,
    seed: int = 0,
) -> BinMap:
    """Map bins of documents on benchmarks. The result does not depend on the order of the documents.

    Parameters
    ----------
    document_ids : P ids
    labels : column -> the label of each document, one or two columns; ``UNKNOWN`` for a document without one
    values : benchmark -> influence of each document on it [P]
    questions : benchmark -> influence on each of its questions [P, N_t], of which ``values`` is the mean
    contrasts : as :func:`contrast_weights` reads them; None: all pairs of at most ``PAIRS`` benchmarks
    minimum : documents of a bin that is tested
    trim : share of the documents that is left out at either end of a trimmed mean; 0: none, the plain mean
    permutations, bootstrap : draws; fewer where there are millions of documents (``WORK``), at least 200

    Raises
    ------
    UserError
        Ids repeat, lengths differ, a value is not finite, values are not the means of the questions, all documents are
        in one bin, no bin has the minimum of documents, a contrast names something else than benchmarks.
    """
    _check(document_ids, labels, values, questions)
    order = np.array(sorted(range(len(document_ids)), key=document_ids.__getitem__), dtype=np.int64)
    ids = [document_ids[i] for i in order]
    sorted_labels = [[own[i] for i in order] for own in labels.values()]
    benchmarks = tuple(values)
    if contrasts is None:
        contrasts = pairs(benchmarks)
    every = make_values(
        {name: np.asarray(own, dtype=np.float64)[order] for name, own in values.items()},
        None if questions is None else {name: np.asarray(own)[order] for name, own in questions.items()},
        contrasts,
    )
    cells = Part.by(sorted_labels)
    by = " x ".join(labels)
    if len(cells.names) < 2:
        what, fix = "all documents are in one bin, so there is nothing to compare", "name another column: bins.columns"
        raise UserError(what, value=" x ".join(cells.names[0]), rule=f"bins by {by}", fix=fix)
    if not cells.tested(minimum).any():
        largest = int(cells.size.argmax())
        raise UserError(
            "no bin with a label has enough documents to be tested",
            value=f"{cells.size[largest]} in the largest, {' x '.join(cells.names[largest])}",
            rule=f"bins.minimum: {minimum} documents",
            fix="use one column in place of two, more documents, or a smaller bins.minimum",
        )
    levels = {"bin": cells}
    if len(labels) == 2:
        levels |= {"row": Part.by(sorted_labels[:1]), "column": Part.by(sorted_labels[1:])}
    documents, columns = every.table.shape
    permutations = min(permutations, max(200, WORK // (documents * columns)))
    bootstrap = min(bootstrap, max(200, WORK // (4 * documents * columns)))
    names, parts = (*benchmarks, *contrasts), list(levels.values())
    tests = label_tests(every.table, parts, permutations, seed)
    drawn = draw_bins(every, parts, trim, bootstrap, seed)
    rows = [
        row
        for (level, part), test, draws in zip(levels.items(), tests, drawn, strict=True)
        for row in rows_of(level, part, test, draws, every, names, ids, cells, minimum=minimum, trim=trim)
    ]
    bins = tuple(row for row in rows if row.benchmark in benchmarks)
    contrasted = tuple(row for row in rows if row.benchmark not in benchmarks)
    tested = cells.tested(minimum)
    agreed = tuple(agreements(every, cells, tested, benchmarks, trim=trim, bootstrap=bootstrap, seed=seed))
    return BinMap(tuple(labels), benchmarks, tuple(contrasts), bins, contrasted, agreed, permutations, bootstrap)


# What a bin does


def leave_one_out(values: ArrayLike) -> tuple[float, float]:
    """Range of the mean of values [n] with one left out; nan where n is 1."""
    x = np.asarray(values, dtype=np.float64)
    left = (x.sum() - x) / (len(x) - 1) if len(x) > 1 else np.full(1, math.nan)
    return float(left.min()), float(left.max())


def carries(values: ArrayLike, centre: float, scale: float) -> int | None:
    """Which of the values [n] carries their mean, if one does.

    It does where it lies more than ``FAR`` scales from the centre and the mean without it is on the other side of the
    centre, or less than half as far from it.
    """
    x = np.asarray(values, dtype=np.float64)
    if len(x) < 2:
        return None
    place = int(np.abs(x - x.mean()).argmax())
    whole, rest = float(x.mean()) - centre, float(np.delete(x, place).mean()) - centre
    carried = rest * whole <= 0 or abs(rest) < abs(whole) / 2
    return place if carried and abs(float(x[place]) - centre) > FAR * scale else None


def standardised(means: ArrayLike) -> Floats:
    """z of bin means [B, ...] over the bins, with the sample standard deviation; nan where they do not differ."""
    x = np.asarray(means, dtype=np.float64)
    if len(x) < 2:
        return np.full(x.shape, math.nan)
    sd = x.std(0, ddof=1)
    known = sd > 1e-12 * np.abs(x).max(0)
    return np.asarray(np.where(known, (x - x.mean(0)) / np.where(known, sd, 1), math.nan))


def rows_of(
    level: str,
    part: Part,
    test: Tested,
    drawn: Drawn,
    values: Values,
    names: Sequence[str],
    ids: Sequence[str],
    cells: Part,
    *,
    minimum: int,
    trim: float,
) -> Iterator[Bin]:
    """Rows of one level: a partition of the documents ``ids``, of which ``cells`` is the finest."""
    x, T, tested = values.table, values.benchmarks, part.tested(minimum)
    mean = bin_means(x, part)
    trimmed = np.stack([trimmed_mean(x[own].T, trim) for own in part.members])
    z = standardised(mean[:, :T])
    dz = np.where(values.signs != 0, values.signs * z[:, None], 0).sum(2)
    ends = {"": drawn.mean, "trimmed_": drawn.trimmed, "effect_": drawn.trimmed - drawn.corpus[:, None]}
    intervals = {of: dict(zip(("lo", "hi"), middle(own), strict=True)) for of, own in ends.items()}
    untested = np.where(tested, 0, math.nan)[:, None]
    found: dict[str, Any] = {
        "mean": mean,
        "median": np.stack([np.median(x[own], axis=0) for own in part.members]),
        "share_positive": np.stack([(x[own] > 0).mean(0) for own in part.members]),
        "trimmed": trimmed,
        "effect": trimmed - trimmed_mean(x.T, trim),
        "z": np.concatenate([z, dz], 1),
        "above": test.above,
        "p": test.p + untested,
        **{f"{of}{end}": side + untested for of, own in intervals.items() for end, side in own.items()},
    }
    for name, correct in (("p_holm", holm), ("p_bh", benjamini_hochberg)):
        found[name] = np.full(test.p.shape, math.nan)
        for family in (slice(0, T), slice(T, None)):
            together = test.p[tested, family]
            found[name][tested, family] = correct(together.ravel()).reshape(together.shape)
    rank = ranks(np.where(tested[:, None], -trimmed, np.inf).T).T + 1
    cell_means = bin_means(x, cells)
    for k, name in enumerate(names):
        centre, scale = float(np.median(x[:, k])), spread(x[:, k])
        for b, own in enumerate(part.members):
            row, column = (None, *part.names[b]) if level == "column" else (*part.names[b], None)[:2]
            carrier = carries(x[own, k], centre, scale)
            lo, hi = leave_one_out(x[own, k])
            first = np.argsort(-x[own, k] if found["effect"][b, k] >= 0 else x[own, k], kind="stable")
            numbers: dict[str, Any] = {field: plain(of_all[b, k]) for field, of_all in found.items()}
            yield Bin(
                level=level,
                row=row,
                column=column,
                benchmark=name,
                n_documents=len(own),
                tested=bool(tested[b]),
                rank=int(rank[b, k]) if tested[b] else None,
                without_lo=plain(lo),
                without_hi=plain(hi),
                carried_by=None if carrier is None else ids[own[carrier]],
                examples=tuple(ids[own[i]] for i in first[:EXAMPLES]),
                **_over_bins(level, part.names[b], cells, cell_means[:, k]),
                **numbers,
            )


def bin_means(table: Floats, part: Part) -> Floats:
    """Mean [B, K] of values [P, K] over each bin."""
    return np.asarray(np.add.reduceat(table[part.order], part.starts, axis=0) / part.size[:, None])


class Drawn(NamedTuple):
    """Statistics of documents and questions drawn anew: of each bin [R, B, K], and of all documents [R, K]."""

    mean: Floats
    trimmed: Floats
    corpus: Floats


def draw_bins(values: Values, parts: Sequence[Part], trim: float, count: int, seed: int) -> list[Drawn]:
    """Means and trimmed means of the bins of each partition, each bin drawn from its own documents.

    The trimmed mean of all documents is that of the first partition's draws.
    """
    (P, K), weights = values.table.shape, values.weights(count, seed)
    corpus = np.empty((count, K))
    empty = [np.empty((count, len(part.names), K)) for part in parts]
    found = [Drawn(own, own.copy(), corpus) for own in empty]
    random = [[np.random.default_rng([seed, number, b]) for b in range(len(p.names))] for number, p in enumerate(parts)]
    for some in chunks(count, P * K):
        every = np.empty((K, some.stop - some.start, P))
        for part, drawn, rngs in zip(parts, found, random, strict=True):
            for b, (own, rng) in enumerate(zip(part.members, rngs, strict=True)):
                pick = rng.integers(0, len(own), (some.stop - some.start, len(own)))
                x = values.on(own, [w[some] for w in weights])
                x = np.take_along_axis(np.broadcast_to(x, (K, *pick.shape)), pick[None], 2)
                drawn.mean[some, b], drawn.trimmed[some, b] = x.mean(-1).T, trimmed_mean(x, trim).T
                if part is parts[0]:
                    every[..., own] = x
        corpus[some] = trimmed_mean(every, trim).T
    return found


def _over_bins(level: str, name: tuple[str, ...], cells: Part, means: Floats) -> dict[str, Any]:
    """Of a row or column: the mean over its bins of their means, its range with one left out, and what carries it."""
    if level == "bin":
        return dict.fromkeys(("over_bins", "over_bins_lo", "over_bins_hi", "over_bins_carried_by"))
    at = ("row", "column").index(level)
    inside = [place for place, cell in enumerate(cells.names) if cell[at] == name[0]]
    lo, hi = leave_one_out(means[inside])
    carrier = carries(means[inside], float(np.median(means)), spread(means))
    return {
        "over_bins": float(means[inside].mean()),
        "over_bins_lo": plain(lo),
        "over_bins_hi": plain(hi),
        "over_bins_carried_by": None if carrier is None else cells.names[inside[carrier]][1 - at],
    }


class Tested(NamedTuple):
    """Bins of one partition beside as many random documents.

    Attributes
    ----------
    above : probability [B, K] that a document of the bin stands above one from elsewhere; nan where there is none
    p : two-sided [B, K], of the permutation of labels
    """

    above: Floats
    p: Floats


def label_tests(table: Floats, parts: Sequence[Part], permutations: int, seed: int) -> list[Tested]:
    """Whether bins are unlike as many random documents, by ranks of their values [P, K], for each partition."""
    from scipy.special import ndtr

    P = len(table)
    r = ranks(table.T).T - (P - 1) / 2
    total = [np.add.reduceat(r[part.order], part.starts, axis=0) for part in parts]
    reach = [np.abs(sums) - 1e-9 * P for sums in total]
    reached = [np.zeros(sums.shape, dtype=np.int64) for sums in total]
    rng = np.random.default_rng(seed)
    for _ in range(permutations):
        drawn = r[rng.permutation(P)]
        for part, own, count in zip(parts, reach, reached, strict=True):
            count += np.abs(np.add.reduceat(drawn, part.starts, axis=0)) >= own
    variance = (r**2).mean(0)
    light = (r**4).mean(0) <= 3 * variance**2
    found = []
    for part, sums, count in zip(parts, total, reached, strict=True):
        size = part.size[:, None]
        p = (1 + count) / (1 + permutations)
        sd = np.sqrt(variance * size * (P - size) / (P - 1))
        known = (sd > 1e-9 * P) & light & (count < FEW)
        tail = 2 * ndtr(-np.abs(sums) / np.where(known, sd, 1))
        elsewhere = np.where(size < P, P - size, math.nan)
        found.append(Tested(0.5 + sums / size / elsewhere, np.where(known, np.minimum(p, tail), p)))
    return found


# Checking


def _check(
    ids: Sequence[str],
    labels: Mapping[str, Sequence[str]],
    values: Mapping[str, ArrayLike],
    questions: Mapping[str, ArrayLike] | None,
) -> None:
    lengths = {len(ids), *map(len, labels.values()), *(np.shape(own)[0] for own in values.values())}
    if len(lengths) != 1 or not len(ids) or not values or not 1 <= len(labels) <= 2:
        rule = "one label a column and one value a benchmark for each document; one or two columns, a benchmark"
        raise misfit("documents, their labels and their values", rule, documents=ids, **labels, **values)
    refuse_repeated(ids, "a document id")
    for name, own in values.items():
        x = np.asarray(own, dtype=np.float64)
        refuse(
            [i for i, good in zip(ids, np.isfinite(x), strict=True) if not good],
            f"the influence on {name} is not finite for some documents",
            rule="every influence is a finite number",
            fix="look at these documents' loss in examples.parquet",
        )
        if questions is None:
            continue
        some = np.asarray(questions[name])
        if some.ndim != 2 or len(some) != len(ids) or not some.shape[1]:
            raise misfit(f"documents and the questions of {name}", "a row a document", documents=ids, questions=some)
        refuse(
            [i for i, good in zip(ids, np.isfinite(some).all(1), strict=True) if not good],
            f"the influence on single questions of {name} is not finite for some documents",
            rule="every influence is a finite number",
        )
        off = np.abs(some.mean(1, dtype=np.float64) - x)
        refuse(
            [i for i, bad in zip(ids, off > 1e-3 * (np.abs(some).mean(1) + np.abs(x)) + 1e-30, strict=True) if bad],
            f"the influence on {name} is not the mean of those on its questions",
            rule="a document's value on a benchmark is the mean over its questions",
        )
