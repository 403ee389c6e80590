"""Which examples the report of a large run lists: the strongest, and those that it names elsewhere."""

from __future__ import annotations

from collections.abc import Collection

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from taught.report.scores import floats
from taught.run.folder import RunFolder

STRONGEST = 200
ENDS = 5  # examples named at either end of a ranking
OFFENDERS = 10


def listed_examples(run: RunFolder, summary: pa.Table, estimator: str | None, also: Collection[str]) -> list[str]:
    """Ids of the examples to list, in the order of the summary.

    Parameters
    ----------
    summary
        All examples: example_id, score, the groups' mean_y, unintended, outside_change, step_score.
    estimator
        Of the coefficient shifts whose strongest examples are named.
    also
        Ids that were asked for.
    """
    wanted = {*also, *_movers(run, estimator)}
    named = pc.is_in(summary["example_id"], pa.array(sorted(wanted), pa.string())).to_numpy()
    named[_extremes(summary)] = True
    chosen: list[str] = summary["example_id"].filter(pa.array(named)).to_pylist()
    return chosen


def _extremes(summary: pa.Table) -> NDArray[np.int64]:
    """Places of the examples that stand at an end of one of the rankings."""
    score = floats(summary, "score")
    rankings = [(-np.abs(score), STRONGEST), (score, ENDS), (-score, ENDS)]
    means = [name for name in summary.column_names if name.startswith("mean_y_")]
    rankings += [(-np.abs(floats(summary, name)), ENDS) for name in means]
    flagged = floats(summary, "unintended") == 1
    rankings.append((np.where(flagged, -floats(summary, "outside_change"), np.nan), OFFENDERS))
    stepped = np.isfinite(floats(summary, "step_score"))
    rankings.append((np.where(stepped, -np.abs(score), np.nan), STRONGEST))
    found = [_first(key, k) for key, k in rankings]
    return np.concatenate(found)


def _first(key: NDArray[np.float64], k: int) -> NDArray[np.int64]:
    """Places of the k smallest keys, nan left out."""
    order = np.argsort(key, kind="stable")[:k]
    return order[~np.isnan(key[order])]


def _movers(run: RunFolder, estimator: str | None) -> set[str]:
    """Examples that raise or lower a coefficient most."""
    of = pc.field
    rows = (of("target") == "coefficient") & (of("pathway") == "total")
    rows &= of("estimator") == estimator
    best: dict[int, list[tuple[float, str]]] = {}
    for part in run.read_parts("influence", ["feature_id", "example_id", "value"], rows):
        feature, value = (part[name].to_numpy() for name in ("feature_id", "value"))
        for one in part["feature_id"].unique().to_pylist():
            at = np.flatnonzero(feature == one)
            ends = at[_ends(value[at])]
            examples = part["example_id"].take(pa.array(ends)).to_pylist()
            held = best.get(one, []) + list(zip(value[ends].tolist(), examples, strict=True))
            best[one] = [held[i] for i in _ends(np.array([v for v, _ in held]))]
    return {example for held in best.values() for _, example in held}


def _ends(values: NDArray[np.float64]) -> NDArray[np.int64]:
    """Places of the largest and of the smallest values."""
    if len(values) <= 2 * ENDS:
        return np.arange(len(values))
    order = np.argpartition(values, [ENDS - 1, len(values) - ENDS])
    return np.concatenate([order[:ENDS], order[-ENDS:]])
