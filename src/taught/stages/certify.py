"""Certificates of a run: what its scores allow to be said about remainder and ranks."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from taught.core.scores import Scores
from taught.core.target import TargetSet, kind_of
from taught.policy.certificate import Ranking, RemainderBound, rank_statements, resample_counts
from taught.policy.ridge import Policy, exact_shift, score
from taught.run.files import schema
from taught.run.folder import RunFolder
from taught.stats.arrays import Floats
from taught.study.schema import Study

NO_DY = "resampled prompts need the change on every prompt (prompt:* among attribution.targets)"

REMAINDERS = schema(
    "example_id:str score:float refit:float refit_of:str remainder:float dX_norm:float dy_norm:float coef_bound:float "
    "score_bound:float"
)
STATEMENTS = schema(
    "target:str k:int example_ids:[str] gap:float share:float by_refit:str by_sketch:str verdict:str reason:str"
)


def write_certificates(
    study: Study,
    run: RunFolder,
    targets: TargetSet,
    scores: Scores,
    shift: Floats | None,
    checks: Mapping[str, Mapping[str, float]],
) -> None:
    """Write ``statements.parquet``, and with a policy ``certificates.parquet``.

    Parameters
    ----------
    shift : Change of every coefficient by every example, [P, d]; None where it was not asked for
    checks : Example id -> ``refit_score`` of a real step, and with sketches ``exact_score``, for the examples where one
        was made
    """
    allowed = np.zeros(len(scores))
    policy = targets.readings.policy
    if scores.unit == "rank":  # of values without a unit no error or remainder is known
        return
    if policy is not None and "score" in scores:
        table = _remainders(policy, scores, shift, checks)
        run.write_table("certificates", table)
        # How far the refit may be: the bound, or the measured distance; nan where neither is known.
        bound, measured = (np.asarray(table[name].to_numpy(), np.float64) for name in ("score_bound", "remainder"))
        allowed = np.where(np.isfinite(bound), bound, np.abs(measured))
    rows = []
    for name in scores.targets:
        if name not in targets.names or kind_of(name).many or name.minus is not None or name.pathway == "x":
            continue
        bound = allowed if name.kind == "score" and name.pathway is None else np.zeros(len(scores))
        values = _resampled(study, targets, scores, name)
        reason = values if isinstance(values, str) else None
        ranking = Ranking(str(name), scores[name], bound, scores.error(name), reason)
        rows += rank_statements(ranking, scores.example_ids, None if isinstance(values, str) else values)
    run.write_table("statements", pa.Table.from_pylist([row._asdict() for row in rows], STATEMENTS))


def _resampled(study: Study, targets: TargetSet, scores: Scores, name: Any) -> Iterator[Floats] | str:
    """Values of one target on resampled prompts, in chunks [resamples, P]; or why there are none."""
    if "dy" not in scores.details:
        return NO_DY
    dy, dX = scores.details["dy"], _whole_dX(scores)
    kind, spec = kind_of(name), study.policy
    none = np.zeros((0, targets.readings.n), dtype=np.int64)
    first = kind.resampled(name, targets.readings, dy, dX, none)
    if isinstance(first, str):
        return first
    counts = resample_counts(targets.readings.prompt_ids, n=spec.bootstrap, seed=spec.seed)
    return (np.asarray(kind.resampled(name, targets.readings, dy, dX, some)) for some in counts)


def _remainders(
    policy: Policy, scores: Scores, shift: Floats | None, checks: Mapping[str, Mapping[str, float]]
) -> pa.Table:
    """Linear value, refit and bound of every example; null where the run does not have them."""
    ids, dX, dy = scores.example_ids, _whole_dX(scores), scores.details.get("dy")
    columns = {field.name: np.full(len(ids), np.nan) for field in REMAINDERS}
    columns["score"], exact = scores["score"], scores["score"].copy()
    made_of: list[str | None] = [None] * len(ids)
    for i, name in enumerate(ids):
        if "refit_score" in (found := checks.get(name, {})):
            made_of[i], columns["refit"][i] = "step", found["refit_score"]
            exact[i] = found.get("exact_score", exact[i])  # S itself may be an estimate
    if dy is not None and scores.se is None:
        columns["dy_norm"] = np.linalg.norm(dy, axis=1)
    if dX is not None and dy is not None and shift is not None:
        made_of = ["tangent"] * len(ids)
        bound = RemainderBound(policy)
        for i, own in enumerate(dX.astype(np.float64)):
            norm = float(np.linalg.norm(own, 2))
            columns["dX_norm"][i] = norm
            columns["coef_bound"][i], columns["score_bound"][i] = bound(norm, dy[i], shift[i])
            columns["refit"][i] = float(score(policy, exact_shift(policy, own, dy[i])))
    columns["remainder"] = columns["refit"] - exact
    given = {"example_id": pa.array(ids, pa.string()), "refit_of": pa.array(made_of, pa.string())}
    cells = [given[f.name] if f.name in given else pa.array(columns[f.name], from_pandas=True) for f in REMAINDERS]
    return pa.Table.from_arrays(cells, schema=REMAINDERS)


def _whole_dX(scores: Scores) -> NDArray[Any] | None:
    """Exact dX [P, N, d] of every example; None where the run does not have it."""
    dX = scores.details.get("dX")
    return dX if scores.se is None else None
