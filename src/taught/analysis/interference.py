"""Interference: how much of an example's effect lands on features that it was not about.

For the shift dW of one example and its intended features I,

    outside_share = sum_{j not in I} |dW_j| / sum_j |dW_j|
    unintended:     the feature with the largest |dW_j| is not in I

A small set I makes both likely by chance: for m features drawn at random out of d, the expected
outside share and the probability of ``unintended`` are both 1 - m / d. So every example carries that
number, and :func:`random_control` says whether the run as a whole differs from it.

Source: SMDA, arXiv 2606.29171 (cross-feature interference), which gives no control.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from numpy.typing import ArrayLike, NDArray

from taught.errors import UserError, misfit, refuse
from taught.stats.arrays import Floats, Ints, refuse_nonfinite
from taught.stats.intervals import middle


def interference(
    example_ids: Sequence[str],
    feature_ids: Sequence[int] | Ints,
    total: ArrayLike,
    intended: Sequence[Sequence[int] | Ints],
) -> list[dict[str, Any]]:
    """Share of every example's coefficient shift outside its intended features.

    Parameters
    ----------
    example_ids, feature_ids : length P and d, of the rows and columns of ``total``
    total : [P, d], coefficient shifts dW of each example, both pathways together
    intended : length P, ids of the features that each example is about, all among ``feature_ids``. May be empty: then
        nothing is claimed about the example, and ``note`` says so.

    Returns
    -------
    list of dict, in the order of ``example_ids``
        ``example_id``; ``intended`` (sorted ids); ``n_intended``; ``outside_share`` in [0, 1];
        ``outside_change``, sum of |dW_j| outside, in coefficient units; ``dominant_feature`` (ties
        to the smallest id) and ``dominant_share``, its part of sum |dW_j|; ``unintended``;
        ``expected_by_chance`` = 1 - m / d; ``note``. A value that cannot be said is None.
    """
    total, ids = np.asarray(total, dtype=np.float64), np.asarray(feature_ids, dtype=np.int64)
    if total.shape != (len(example_ids), ids.size) or ids.size == 0:
        rule = "total [P, d] with P example ids and d >= 1 feature ids"
        raise misfit("the shifts and their ids", rule, total=total, examples=example_ids, features=ids.size)
    refuse_nonfinite(example_ids, total, "shift")
    if len(intended) != len(example_ids):
        rule = "one list per example, empty if there are none"
        raise misfit("examples and their intended features", rule, lists=intended, examples=example_ids)
    by_id = np.argsort(ids)
    parts = zip(example_ids, np.abs(total[:, by_id]), intended, strict=True)
    return [_row(example, ids[by_id], size, sorted({int(f) for f in features})) for example, size, features in parts]


def random_control(
    feature_ids: Sequence[int] | Ints,
    total: ArrayLike,
    intended: Sequence[Sequence[int] | Ints],
    *,
    seed: int,
    draws: int = 1000,
) -> dict[str, Any]:
    """Compare the run's interference with intended sets of the same sizes drawn at random.

    Examples that share an intended set share its random stand-in, so that the interval counts sets
    and not examples: 100 examples about one feature are one piece of evidence. Examples with an empty set
    or without any effect are left out. Cost: ``draws`` permutations of d for every distinct set.

    Returns
    -------
    dict
        ``n_examples``, ``n_sets``, and for ``outside_share`` and ``unintended_rate`` each a dict:
        ``observed`` mean over examples, ``expected`` by chance (exact, mean of 1 - m / d), ``lo`` and
        ``hi`` (95% of the draws) and ``p_lower``, the probability of a value as low as observed by
        chance. None, with a ``note``, if no example can be judged.
    """
    ids = np.asarray(feature_ids, dtype=np.int64)
    size = np.abs(np.asarray(total, dtype=np.float64))
    judged = [p for p, f in enumerate(intended) if len(f) and size[p].any()]
    if not judged:
        note = "no example has both intended features and an effect"
        return {"n_examples": 0, "n_sets": 0, "outside_share": None, "unintended_rate": None} | {"note": note}
    share = size[judged] / size[judged].sum(1, keepdims=True)
    dominant = np.eye(ids.size)[[np.lexsort((ids, -row))[0] for row in share]]  # ties to the smallest id
    sets = [frozenset(int(f) for f in intended[p]) for p in judged]
    distinct = sorted(set(sets), key=sorted)
    row_of = {features: u for u, features in enumerate(distinct)}
    belongs = np.array([row_of[features] for features in sets])
    inside = np.array([[int(f) in u for f in ids] for u in distinct])
    result: dict[str, Any] = {"n_examples": len(judged), "n_sets": len(distinct)}
    for name, per_example in (("outside_share", share), ("unintended_rate", dominant)):
        weight = np.zeros((len(distinct), ids.size))  # sums to n_examples over sets and features
        np.add.at(weight, belongs, per_example)
        result[name] = _against_chance(weight, inside, np.random.default_rng(seed), draws)
    return result | {"note": None}


def comovement(total: ArrayLike) -> Floats:
    """Correlation over examples of the shifts of every two features: total [P, d] -> r [d, d].

    nan where a feature does not vary over examples, and everywhere with fewer than 3 examples.
    """
    total = np.asarray(total, dtype=np.float64)
    if total.ndim != 2:
        raise UserError("shifts must be a table", value=list(total.shape), rule="[P, d]")
    if total.shape[0] < 3:
        return np.full((total.shape[1], total.shape[1]), np.nan)
    centred = total - total.mean(0)
    norm = np.sqrt((centred**2).sum(0))
    # A constant column leaves round-off behind; normalised, that would look like a correlation.
    norm[norm <= 1e-12 * np.abs(total).max(0) * np.sqrt(total.shape[0])] = np.nan
    with np.errstate(divide="ignore", invalid="ignore"):
        unit = centred / norm
        return np.asarray(np.clip(unit.T @ unit, -1.0, 1.0))


def top_offenders(rows: Sequence[dict[str, Any]], n: int) -> list[dict[str, Any]]:
    """Return the ``n`` unintended examples that move other features most (``outside_change``).

    Sorted by amount and not by share: an example that moves nothing much, all of it outside, harms
    little. Ties by example id.
    """
    offenders = [row for row in rows if row["unintended"]]
    return sorted(offenders, key=lambda row: (-row["outside_change"], row["example_id"]))[:n]


def _row(example: str, ids: Ints, size: Floats, features: list[int]) -> dict[str, Any]:
    """One example; ``ids`` ascending and ``size`` = |dW| in the same order."""
    refuse(
        [f for f in features if f not in ids],
        f"the example {example!r} intends features that are not in the policy",
        rule="intended features are among the selected ones",
        fix="drop them from the list, or select them under features.ids",
    )
    effect = float(size.sum())
    k = int(np.argmax(size))
    inside = np.isin(ids, features)
    moved, told = effect > 0, bool(features)
    outside = float(size[~inside].sum())
    unsaid = "the example moves no coefficient" if told else "no intended features: nothing can be called outside"
    return {
        "example_id": example,
        "intended": features,
        "n_intended": len(features),
        "outside_share": outside / effect if told and moved else None,
        "outside_change": outside if told else None,
        "dominant_feature": int(ids[k]) if moved else None,
        "dominant_share": float(size[k]) / effect if moved else None,
        "unintended": bool(not inside[k]) if told and moved else None,
        "expected_by_chance": 1 - len(features) / ids.size if told else None,
        "note": None if told and moved else unsaid,
    }


def _against_chance(
    weight: Floats, inside: NDArray[np.bool_], rng: np.random.Generator, draws: int
) -> dict[str, float]:
    """Weight outside the sets [U, d], observed and with every set redrawn at its size."""
    sizes = inside.sum(1, keepdims=True)
    columns = np.tile(np.arange(inside.shape[1]), (len(inside), 1))
    examples = weight.sum()
    observed = float(weight[~inside].sum() / examples)
    drawn = np.array([weight[rng.permuted(columns, axis=1) >= sizes].sum() / examples for _ in range(draws)])
    lo, hi = middle(drawn).tolist()
    expected = float((weight.sum(1) * (1 - sizes[:, 0] / inside.shape[1])).sum() / examples)
    as_low = int((drawn <= observed + 1e-12).sum())
    return {"observed": observed, "expected": expected, "lo": lo, "hi": hi, "p_lower": (1 + as_low) / (1 + draws)}
