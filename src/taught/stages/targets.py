"""What a run's examples can be ranked by, by name.

score, behavior:GROUP
    Influence on the policy's score, on the mean y of a group of prompts.
concept:NAME
    Influence on a concept's read-out: the method ``gradient`` of ``taught concept-influence``.
concept:NAME:METHOD
    An example's value by any of its methods.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from taught.data.columns import name_ids
from taught.errors import UserError
from taught.run.folder import RunFolder

CONCEPT = "concept:"
STAGE = "concept-influence"
GRADIENT = "gradient"


@dataclass(frozen=True, eq=False)
class TargetValues:
    """One value for each example of a run.

    Attributes
    ----------
    name : as it was asked for
    values : float64 [P], in the order of ``summary.parquet``
    influence : whether they are changes of the target by one step; the forward-only methods of
        concepts are not
    """

    name: str
    values: NDArray[np.float64]
    influence: bool


def stages_read(*targets: str | None) -> tuple[str, ...]:
    """Stages beside ``attribute`` that these targets are read from."""
    return (STAGE,) if any(t is not None and t.startswith(CONCEPT) for t in targets) else ()


def read_targets(run: RunFolder, *targets: str) -> list[TargetValues]:
    """Values of every example for some targets; the summary is read once.

    Raises
    ------
    UserError
        Not a target of this run; the concept's examples are not those of the run.
    """
    columns = summary_targets(run)
    for target in targets:
        if not target.startswith(CONCEPT) and target not in columns:
            raise _unknown(run, target)
    asked = dict.fromkeys(columns[target] for target in targets if target in columns)
    summary = run.read_table("summary", ["example_id", *asked])
    return [
        TargetValues(target, _floats(summary[columns[target]]), True)
        if target in columns
        else _of_concept(run, target, summary["example_id"])
        for target in targets
    ]


def summary_targets(run: RunFolder) -> dict[str, str]:
    """Targets whose influence stands in ``summary.parquet``, and their columns."""
    names = run.footer("summary").schema.to_arrow_schema().names
    groups = [name.removeprefix("mean_y_") for name in names if name.startswith("mean_y_")]
    return {"score": "score"} | {f"behavior:{group}": f"mean_y_{group}" for group in groups}


def _of_concept(run: RunFolder, target: str, example_ids: pa.ChunkedArray) -> TargetValues:
    run.require(STAGE)
    known = _concept_targets(run)
    if target not in known:
        raise _unknown(run, target)
    name, method = known[target]
    rows = (pc.field("concept") == name) & (pc.field("method") == method)
    found = run.read_table("concept_influence", ["example_id", "value"], rows)
    place = pc.index_in(example_ids, found["example_id"].combine_chunks())
    if place.null_count or len(found) != len(example_ids):
        missing = example_ids.filter(pc.is_null(place)).to_pylist()
        raise UserError(
            "the concept was read on other examples than the run's",
            value=name_ids(missing) or f"{len(found)} and {len(example_ids)} examples",
            rule="every example of the run has one value",
            fix="run taught concept-influence again, with --run",
        )
    return TargetValues(target, _floats(found["value"].take(place)), method == GRADIENT)


def _concept_targets(run: RunFolder) -> dict[str, tuple[str, str]]:
    """Targets by concepts -> name and method. A name may hold colons: none is taken apart."""
    record = run.read_json("concept_influence")
    names = [concept["name"] for concept in record["concepts"]]
    found = {f"{CONCEPT}{n}:{m}": (n, m) for n in names for m in record["methods"]}
    short = {f"{CONCEPT}{n}": (n, GRADIENT) for n in names if GRADIENT in record["methods"]}
    return {**found, **short}


def _unknown(run: RunFolder, target: str) -> UserError:
    known = [*summary_targets(run)]
    if "concept_influence.json" in run.manifest["files"]:
        known += _concept_targets(run)
    return UserError(
        "not a target of this run",
        value=target,
        rule=f"one of {', '.join(known)}",
        fix="for example --target behavior:GROUP; concepts come from "
        "taught concept-influence STUDY --concept FOLDER --run RUN",
    )


def _floats(column: pa.ChunkedArray) -> NDArray[np.float64]:
    return np.asarray(column.cast(pa.float64()).to_numpy())
