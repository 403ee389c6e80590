"""A run folder as the report reads it: tables by name, without rows or None where they are not there.

A file counts only when the stage that wrote it is complete. Text has lost control characters and
kept its markup. Of a run with many examples only some are read as rows (``examples.py`` chooses);
what is said about all examples comes from columns.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from functools import cached_property, wraps
from pathlib import Path
from typing import Any, TypeVar, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from numpy.typing import NDArray

from taught.report.makes import made_by
from taught.report.text import clean, cleaned
from taught.run.folder import RunFolder

Row = dict[str, Any]
Rows = list[Row]
Floats = NDArray[np.float64]
T = TypeVar("T")
LARGE = 2000  # more examples than these are not all listed
UNLABELLED = "unlabelled"
_OF_EXAMPLES = ("examples", "summary", "certificates")


@dataclass(frozen=True, eq=False)
class Matrix:
    """A tensor with the ids of its rows and columns."""

    rows: list[Any]
    columns: list[Any]
    values: Floats


class Tables:
    """Everything that the stages of a run wrote, read when it is asked for.

    Parameters
    ----------
    also : ids of examples to list in any case, where the run has too many to list them all

    Raises
    ------
    UserError
        The folder is not a run folder, or a stage was made with an earlier result of the stage
        before it. When a file is read: it has changed since it was written.
    """

    def __init__(self, run: RunFolder | Path | str, also: Collection[str] = ()) -> None:
        self.run = run if isinstance(run, RunFolder) else RunFolder.open(run)
        self.also = also
        self.manifest = cast(Row, cleaned(self.run.manifest))
        self.study: Row = self.manifest.get("study") or {}
        self.name = clean(self.study.get("name") or self.run.folder.resolve().name)
        done = set(self.run.together())
        self.files = {name for name, record in self.run.manifest["files"].items() if record["stage"] in done}
        self._read: dict[Any, Any] = {}

    def __contains__(self, name: str) -> bool:
        return any(f"{name}.{kind}" in self.files for kind in ("parquet", "json", "safetensors"))

    def setting(self, key: str) -> Any:
        """A key of the study, such as ``attribution.curvature``; of a method with parameters its kind."""
        found: Any = self.study
        for part in key.split("."):
            found = found.get(part) if isinstance(found, dict) else None
        return found.get("kind", found) if isinstance(found, dict) else found

    @property
    def start(self) -> str:
        """The model, or the adapter, at whose weights training begins."""
        return str(self.setting("model.adapter") or self.setting("model.id") or "the model")

    @cached_property
    def checkpoints(self) -> list[str]:
        """Models at which influence was taken, where that is not the model of the study."""
        along = (self.study.get("attribution") or {}).get("trajectory")
        if not isinstance(along, dict) or along.get("kind") != "checkpoints":  # segments have a number of them
            return []
        return [str(at["id"]) for at in along.get("checkpoints") or ()]

    @cached_property
    def with_policy(self) -> bool:
        """Whether the run has a policy, or its study asks for one."""
        return "coefficients" in self or bool(self.setting("sae.path"))

    @cached_property
    def through_training(self) -> bool:
        """Whether values are derivatives of a whole training run in an example's weight, and not changes per step."""
        return self.unit == "run"

    @property
    def per(self) -> str:
        """The unit of values in words."""
        step = "per Newton step" if self.newton else "per step"
        return {"run": "by the whole training run", "rank": "to rank by"}.get(self.unit, step)

    @property
    def newton(self) -> bool:
        """Whether a step is one in a curvature of the loss, whose size is not that of a step of training."""
        return self.unit == "step" and self.setting("attribution.curvature") in ("ekfac", "astra")

    @property
    def smoothness(self) -> Rows:
        """How smooth the training run is that values are derivatives of, one row a random direction."""
        return self.json("attribution").get("smoothness", [])

    @property
    def unit(self) -> str:
        """The unit of values (``Scores.unit``)."""
        return str(self.json("attribution").get("unit", "step"))

    @cached_property
    def listed(self) -> list[str] | None:
        """Ids of the examples that are listed; None where all are."""
        from taught.report.examples import listed_examples

        few = "summary.parquet" not in self.files or self.footer("summary").num_rows <= LARGE
        return None if few else listed_examples(self)

    def rows(self, name: str) -> Rows:
        """A table as records; of the tables with a row an example those that are listed; none where it is absent."""

        def read() -> Rows:
            chosen = self.listed if name in _OF_EXAMPLES else None
            condition = None if chosen is None else pc.field("example_id").isin(chosen)
            rows = cast(Rows, cleaned(self.run.read_table(name, rows=condition).to_pylist()))
            for row in rows if name in _OF_EXAMPLES else ():
                row["label"] = str(row.get("label") or UNLABELLED)
            return rows

        return self._once(("rows", name), f"{name}.parquet", read) or []

    def columns(
        self, name: str, names: Sequence[str] | None = None, rows: pc.Expression | None = None
    ) -> pa.Table | None:
        """Columns over all rows, or over those of a condition; names that are absent are left out."""
        if f"{name}.parquet" not in self.files:
            return None
        if names is not None:
            there = self.footer(name).schema.to_arrow_schema().names
            names = [column for column in names if column in there]
        return self.run.read_table(name, names, rows)

    def footer(self, name: str) -> pq.FileMetaData:
        """What a table holds, without reading it."""
        found = self._once(("footer", name), f"{name}.parquet", lambda: self.run.footer(name))
        return cast("pq.FileMetaData", found)

    def json(self, name: str) -> Row:
        """A record; empty where it is absent."""
        return self._once(("json", name), f"{name}.json", lambda: cast(Row, cleaned(self.run.read_json(name)))) or {}

    def matrix(self, name: str, tensor: str, axes: tuple[str, str]) -> Matrix | None:
        """One array of a file of tensors; axes name the ids. Of examples the rows that are listed."""

        def read() -> Matrix:
            if self.listed is None or axes[0] != "example_ids":
                arrays, ids = self.run.read_tensors(name)
                row_ids, values = ids[axes[0]], arrays[tensor]
            else:
                row_ids, values, ids = self.run.read_tensor_rows(name, tensor, axes[0], set(self.listed))
            row_ids, column_ids = (cast("list[Any]", cleaned(names)) for names in (row_ids, ids[axes[1]]))
            return Matrix(row_ids, column_ids, values.astype(np.float64))

        return self._once(("matrix", name), f"{name}.safetensors", read)

    def once(self, key: object, make: Callable[[], T]) -> T:
        """What was made of the tables, made once."""
        if key not in self._read:
            self._read[key] = make()
        return cast(T, self._read[key])

    def _once(self, key: tuple[str, str], file: str, read: Callable[[], T]) -> T | None:
        return self.once(key, read) if file in self.files else None


def once(make: Callable[[Tables], T]) -> Callable[[Tables], T]:
    """A function of the tables whose result is kept with them."""
    return wraps(make)(lambda tables: tables.once(make, lambda: make(tables)))


def of_policy(needs: Sequence[str]) -> bool:
    """Whether something that needs these tables needs a policy, and so an SAE."""
    return any(made_by(name) == "policy" for name in needs)
