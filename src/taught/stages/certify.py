"""Certificates of a run: what its effects allow to be said about remainder and ranks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from taught.estimators.estimate import Effects
from taught.policy.certificate import (
    Ranking,
    RemainderBound,
    Statement,
    rank_statements,
    resampled_means,
    resampled_scores,
)
from taught.policy.ridge import Floats, Policy, exact_shift, score
from taught.run.folder import RunFolder
from taught.study.schema import Study

NO_DY = "resampled prompts need dy of every prompt (no coefficient:* among attribution.targets)"
NO_DX = "resampled prompts need dX of every feature (--set attribution.estimator=forward)"

REMAINDERS = pa.schema(
    [
        ("example_id", pa.string()),
        ("score", pa.float64()),
        ("refit", pa.float64()),
        ("refit_of", pa.string()),
        ("remainder", pa.float64()),
        ("dX_norm", pa.float64()),
        ("dy_norm", pa.float64()),
        ("coef_bound", pa.float64()),
        ("score_bound", pa.float64()),
    ]
)
STATEMENTS = pa.schema(
    [
        ("target", pa.string()),
        ("k", pa.int64()),
        ("example_ids", pa.list_(pa.string())),
        ("gap", pa.float64()),
        ("share", pa.float64()),
        ("by_refit", pa.string()),
        ("by_sketch", pa.string()),
        ("verdict", pa.string()),
        ("reason", pa.string()),
    ]
)


def write_certificates(
    study: Study,
    run: RunFolder,
    fitted: Policy,
    groups: Mapping[str, Sequence[str]],
    effects: Effects,
    checks: Mapping[str, Mapping[str, float]],
) -> None:
    """Write ``certificates.parquet`` and ``statements.parquet``.

    Parameters
    ----------
    checks
        Example id -> ``refit_score`` of a real step, and with sketches ``exact_score``, for the examples
        where one was made.
    """
    table = _remainders(fitted, effects, checks)
    run.write_table("certificates", table)
    statements = _statements(study, fitted, groups, effects, table)
    rows = [statement._asdict() for statement in statements]
    run.write_table("statements", pa.Table.from_pylist(rows, STATEMENTS))


def _remainders(fitted: Policy, effects: Effects, checks: Mapping[str, Mapping[str, float]]) -> pa.Table:
    """Linear value, refit and bound of every example; null where the run does not have them."""
    ids, dX = effects.example_ids, _whole_dX(effects)
    columns = {field.name: np.full(len(ids), np.nan) for field in REMAINDERS}
    columns["score"] = effects.score.sum(0)
    exact = columns["score"].copy()
    made_of: list[str | None] = [None] * len(ids)
    for i, found in ((i, checks[name]) for i, name in enumerate(ids) if name in checks):
        made_of[i], columns["refit"][i] = "step", found["refit_score"]
        exact[i] = found.get("exact_score", exact[i])  # S itself may be an estimate
    if effects.dy is not None and effects.error is None:
        columns["dy_norm"] = np.linalg.norm(effects.dy, axis=1)
    if dX is not None:
        made_of = ["tangent"] * len(ids)
        bound = RemainderBound(fitted)
        for i, own in enumerate(dX):
            for name, value in _certified(fitted, effects, bound, i, own).items():
                columns[name][i] = value
    columns["remainder"] = columns["refit"] - exact
    given = {"example_id": pa.array(ids, pa.string()), "refit_of": pa.array(made_of, pa.string())}
    cells = [given[f.name] if f.name in given else pa.array(columns[f.name], from_pandas=True) for f in REMAINDERS]
    return pa.Table.from_arrays(cells, schema=REMAINDERS)


def _whole_dX(effects: Effects) -> NDArray[np.float32] | None:
    """Exact dX [P, N, d] of every example; None where the run does not have it (all but jvp)."""
    return effects.dX if effects.error is None else None


def _certified(
    fitted: Policy, effects: Effects, bound: RemainderBound, i: int, own: NDArray[np.float32]
) -> dict[str, float]:
    """Exact refit on the tangent's dX and dy, and the bound of its distance."""
    assert effects.dy is not None and effects.shift is not None
    dX, dy = own.astype(np.float64), effects.dy[i]
    norm = float(np.linalg.norm(dX, 2))
    coef, along = bound(norm, dy, effects.shift.total[i])
    refit = float(score(fitted, exact_shift(fitted, dX, dy)))
    return {"refit": refit, "dX_norm": norm, "coef_bound": coef, "score_bound": along}


def _statements(
    study: Study, fitted: Policy, groups: Mapping[str, Sequence[str]], effects: Effects, remainders: pa.Table
) -> list[Statement]:
    found = []
    for ranking in _rankings(effects, remainders):
        draws = None if ranking.reason else _draws(study, fitted, groups, effects, ranking.target)
        found += rank_statements(ranking, effects.example_ids, draws)
    return found


def _rankings(effects: Effects, remainders: pa.Table) -> Iterator[Ranking]:
    """What examples are ranked by: the score, its pathway y, the mean y of each group."""
    exact = np.zeros(len(effects.example_ids))
    no_dy = NO_DY if effects.dy is None else None
    no_dX = NO_DX if _whole_dX(effects) is None else None
    yield Ranking(
        "score",
        effects.score.sum(0),
        _allowed(remainders),
        effects.errors("score", None, None, "total"),
        no_dy or no_dX,
    )
    yield Ranking("score_y", effects.score[1], exact, effects.errors("score", None, None, "y"), no_dy)
    for group, values in effects.mean_y.items():
        errors = effects.errors("mean_y", None, group, "y")
        yield Ranking(f"mean_y:{group}", values, exact, errors, no_dy)


def _allowed(remainders: pa.Table) -> Floats:
    """How far the refit may be: the bound, or the measured distance; nan where neither is known."""
    columns = [remainders[name].to_numpy() for name in ("score_bound", "remainder")]
    bound, measured = (np.asarray(column, dtype=np.float64) for column in columns)
    return np.where(np.isfinite(bound), bound, np.abs(measured))


def _draws(
    study: Study, fitted: Policy, groups: Mapping[str, Sequence[str]], effects: Effects, target: str
) -> Iterator[Floats]:
    """Values of one target on resampled prompts, in chunks [resamples, P]."""
    assert effects.dy is not None
    row = {prompt_id: i for i, prompt_id in enumerate(fitted.prompt_ids)}
    dX = _whole_dX(effects) if target == "score" else None
    spec = study.policy
    for draws in resampled_scores(fitted, effects.dy, dX, n=spec.bootstrap, seed=spec.seed):
        if target.startswith("mean_y:"):
            members = [row[i] for i in groups[target.removeprefix("mean_y:")]]
            yield resampled_means(effects.dy, members, draws.counts)
        else:
            yield draws.y if draws.x is None else draws.x + draws.y
