"""Documents in bins, their values on benchmarks, and contrasts of benchmarks."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import combinations

import numpy as np
from numpy.typing import ArrayLike

from taught.errors import UserError, refuse
from taught.stats.arrays import Bools, Floats, Ints
from taught.stats.intervals import resample_counts

MINUS = " - "
UNKNOWN = "unknown"  # the bin of documents without a label
CHUNK = 4_000_000  # numbers held at a time while resampling
PAIRS = 4  # so many benchmarks are contrasted pair by pair where the study names no contrast


@dataclass(frozen=True, eq=False)
class Part:
    """A partition of documents, by labels.

    Attributes
    ----------
    names : B labels, or tuples of labels, ascending
    index : of each document the place of its bin, [P]
    """

    names: tuple[tuple[str, ...], ...]
    index: Ints

    @classmethod
    def by(cls, labels: Sequence[Sequence[str]]) -> Part:
        """By one or more sequences of labels, each of length P."""
        each = list(zip(*labels, strict=True))
        names = sorted(set(each))
        place = {name: number for number, name in enumerate(names)}
        return cls(tuple(names), np.array([place[name] for name in each], dtype=np.int64))

    @cached_property
    def order(self) -> Ints:
        """Documents, bin by bin."""
        return np.argsort(self.index, kind="stable")

    @cached_property
    def size(self) -> Ints:
        """Documents in each bin, [B]."""
        return np.bincount(self.index, minlength=len(self.names))

    @cached_property
    def starts(self) -> Ints:
        """Where each bin begins in ``order``."""
        return np.cumsum(self.size) - self.size

    @cached_property
    def members(self) -> list[Ints]:
        """The documents of each bin."""
        return np.split(self.order, self.starts[1:])

    def tested(self, minimum: int) -> Bools:
        """Bins that are tested, [B]."""
        known = np.array([UNKNOWN not in name for name in self.names])
        return known & (self.size >= minimum)


@dataclass(frozen=True, eq=False)
class Values:
    """Values of P documents on T benchmarks and C contrasts, K = T + C columns, and how they follow from questions.

    Attributes
    ----------
    table : [P, K], the benchmarks and after them the contrasts
    signs : [C, T], how often each benchmark stands in each contrast
    scale : [T], of the benchmarks in the contrasts
    questions : of each benchmark [P, N_t]; None where single questions are not known
    """

    table: Floats
    signs: Floats
    scale: Floats
    questions: tuple[Floats, ...] | None = None

    @property
    def benchmarks(self) -> int:
        """T."""
        return len(self.scale)

    def weights(self, count: int, seed: int) -> list[Floats]:
        """Weights [R, N_t] of the questions of each benchmark, drawn anew R times; none without questions."""
        sizes = [own.shape[1] for own in self.questions or ()]
        return [resample_counts(N, count, seed + 1000 * (t + 1)) / N for t, N in enumerate(sizes)]

    def on(self, documents: Ints, weights: Sequence[Floats]) -> Floats:
        """Values [K, R, n] of n documents under weights [R, N_t] of the questions; [K, 1, n] without questions."""
        if self.questions is None:
            return self.table[documents].T[:, None]
        own = zip(self.questions, weights, strict=True)
        found = np.stack([np.asarray(w @ some[documents].T, dtype=np.float64) for some, w in own])
        return np.concatenate([found, np.tensordot(self.signs / self.scale, found, 1)])


def make_values(
    values: Mapping[str, Floats], questions: Mapping[str, ArrayLike] | None, contrasts: Sequence[str]
) -> Values:
    """Values of documents with those of their contrasts.

    Raises
    ------
    UserError
        A contrast of something else than benchmarks, or of one that has the same value for every document.
    """
    table = np.stack(list(values.values()), 1)
    signs = np.array([contrast_weights(text, tuple(values)) for text in contrasts]).reshape(-1, len(values))
    scale = np.array([spread(column) for column in table.T])
    refuse(
        [name for name, s, used in zip(values, scale, (signs != 0).any(0), strict=True) if used and not s],
        "a benchmark has the same value for every document, so it has no scale to be contrasted in",
        fix="name other contrasts: bins.contrasts",
    )
    scale = np.where(scale > 0, scale, 1)
    own = None if questions is None else tuple(np.asarray(questions[name]) for name in values)
    return Values(np.concatenate([table, table @ (signs / scale).T], 1), signs, scale, own)


def contrast_weights(text: str, benchmarks: Sequence[str]) -> Floats:
    """How often each benchmark stands in a contrast, [T]: ``a - b``, ``(a - b) - (c - d)``.

    A name may hold the sign and parentheses itself; ``a - b - c`` is ``(a - b) - c``.

    Raises
    ------
    UserError
        It is no difference of benchmarks, nothing is left of it, or names that hold the sign give it several meanings.
    """
    known = dict(zip(benchmarks, np.eye(len(benchmarks)), strict=True))
    found = {tuple(one): one for one in ([] if text in known else _combinations(text.strip(), known))}
    if len(found) > 1:
        raise UserError(
            "this contrast of benchmarks can be read in several ways",
            value=text,
            rule="names of benchmarks hold the sign themselves: " + ", ".join(n for n in benchmarks if MINUS in n),
            fix="put parentheses around each name and each difference: bins.contrasts, such as (a - b) - (c - d)",
        )
    if not found or not any(next(iter(found))):
        raise UserError(
            "this is no contrast of benchmarks",
            value=text,
            rule="a - b, or (a - b) - (c - d), of " + ", ".join(benchmarks),
            fix="correct bins.contrasts; a benchmark is a group of prompts",
        )
    return next(iter(found.values()))


def _combinations(text: str, known: Mapping[str, Floats]) -> list[Floats]:
    """All that a text may mean: the name that it is, or every way to take one thing from what stands before it."""
    if text in known:
        return [known[text]]
    found, at = [], text.rfind(MINUS)
    while at >= 0:
        right = _things(text[at + len(MINUS) :].strip(), known)
        found += [a - b for b in right for a in _combinations(text[:at].strip(), known)]
        at = text.rfind(MINUS, 0, at)
    return found or _things(text, known)


def _things(text: str, known: Mapping[str, Floats]) -> list[Floats]:
    """All that a name, or something in parentheses, may mean."""
    if text in known:
        return [known[text]]
    return _combinations(text[1:-1].strip(), known) if text[:1] == "(" and text[-1:] == ")" else []


def pairs(benchmarks: Sequence[str]) -> list[str]:
    """All pairs of a few benchmarks; without those that are the name of a benchmark."""
    named = [f"({name})" if MINUS in name else name for name in benchmarks]
    found = [MINUS.join(pair) for pair in combinations(named, 2)] if len(benchmarks) <= PAIRS else []
    return [pair for pair in found if pair not in benchmarks]


def trimmed_mean(values: ArrayLike, trim: float) -> Floats:
    """Mean [...] of values [..., n] without the share ``trim`` at either end, and at least one where n > 2."""
    x = np.asarray(values, dtype=np.float64)
    n = x.shape[-1]
    cut = min((n - 1) // 2, max(1, math.ceil(trim * n - 1e-9))) if trim > 0 else 0
    if not cut:
        return np.asarray(x.mean(-1))
    return np.asarray(np.partition(x, (cut, n - cut - 1), axis=-1)[..., cut : n - cut].mean(-1))


def spread(values: ArrayLike) -> float:
    """Robust scale of values [n]: their median distance from the median times 1.4826, or else the standard deviation.

    The factor makes it the standard deviation where values are normal. 0 where all are the same.
    """
    x = np.asarray(values, dtype=np.float64)
    if x.min() == x.max():
        return 0.0
    return 1.4826 * float(np.median(np.abs(x - np.median(x)))) or float(x.std())


def chunks(count: int, size: int) -> Iterator[slice]:
    """``count`` draws of ``size`` numbers each, so many at a time as may be held."""
    step = max(1, CHUNK // size)
    return (slice(at, min(at + step, count)) for at in range(0, count, step))
