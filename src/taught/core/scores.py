"""Scores: one value of every example for every target, with ids."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from taught.core.names import TargetName
from taught.errors import UserError
from taught.run.files import schema

if TYPE_CHECKING:
    import pandas as pd
    import pyarrow as pa

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Scores:
    """What training on each example does to each target.

    A positive value: training on the example raises the target. Its unit is in ``unit`` (for methods that are no
    influence, whatever they say; compare these by rank).

    Attributes
    ----------
    method : what made them, such as ``adjoint`` or ``adjoint+ekfac``
    example_ids : P ids, the rows
    targets : T names, the columns
    values : float64 [P, T]
    se : float64 [P, T], standard errors, or None where the values are exact or their error is not known (unit "rank")
    losses : float64 [P], of the examples before the step, natural logarithm; None where not taken
    influence : whether values are changes of the target by training
    details : further arrays by name, such as ``dy`` [P, N] and ``dX`` [n, N, d] (docs/formats.md)
    unit : "step": change of the target by one step at the learning rate; "run": its derivative in the example's weight
        in a whole training run; "rank": none, values rank examples and do not add up

    Examples
    --------
    >>> scores = Scores("adjoint", ("a", "b"), (TargetName.parse("behavior:x"),), np.array([[1.0], [-2.0]]))
    >>> scores["behavior:x"]
    array([ 1., -2.])
    >>> scores.top(1, "behavior:x")
    [('a', 1.0)]
    """

    method: str
    example_ids: tuple[str, ...]
    targets: tuple[TargetName, ...]
    values: Floats
    se: Floats | None = None
    losses: Floats | None = None
    influence: bool = True
    details: Mapping[str, Any] = field(default_factory=dict)
    unit: str = "step"

    def __post_init__(self) -> None:
        shape = (len(self.example_ids), len(self.targets))
        if self.values.shape != shape or (self.se is not None and self.se.shape != shape):
            raise ValueError(f"values {self.values.shape} do not fit {shape}: examples, targets")

    def __len__(self) -> int:
        return len(self.example_ids)

    def __contains__(self, target: TargetName | str) -> bool:
        return str(target) in map(str, self.targets)

    def __getitem__(self, target: TargetName | str) -> Floats:
        """One target's values, float64 [P]."""
        column: Floats = self.values[:, self.column(target)]
        return column

    def error(self, target: TargetName | str) -> Floats | None:
        """One target's standard errors, float64 [P]; None where values are exact."""
        return None if self.se is None else self.se[:, self.column(target)]

    def column(self, target: TargetName | str) -> int:
        """Where a target stands.

        Raises
        ------
        UserError
            These scores do not have it.
        """
        names = [str(name) for name in self.targets]
        if str(target) not in names:
            raise UserError(
                "these scores do not have this target",
                value=str(target),
                rule="one of " + ", ".join(names[:12]) + (", …" if len(names) > 12 else ""),
                fix="ask for it: targets=[...], or attribution.targets in the study",
            )
        return names.index(str(target))

    def by_example(self, target: TargetName | str) -> dict[str, float]:
        """Example id -> value, as plain numbers."""
        return dict(zip(self.example_ids, self[target].tolist(), strict=True))

    def top(self, k: int, target: TargetName | str | None = None) -> list[tuple[str, float]]:
        """The k examples that raise a target most (the first target if none is named), strongest first."""
        values = self[self.targets[0] if target is None else target]
        order = np.argsort(-values, kind="stable")[:k]
        return [(self.example_ids[i], float(values[i])) for i in order]

    def select(self, targets: Iterable[TargetName | str]) -> Scores:
        """These scores of some targets only."""
        columns = [self.column(target) for target in targets]
        se = None if self.se is None else self.se[:, columns]
        names = tuple(self.targets[c] for c in columns)
        return replace(self, targets=names, values=self.values[:, columns], se=se, details={})

    def joined(self, other: Scores) -> Scores:
        """These targets and those of other scores of the same examples by the same method; details stay these."""
        if other.example_ids != self.example_ids:
            raise ValueError("scores of other examples")
        se = None
        if self.se is not None or other.se is not None:
            parts = [np.full(s.values.shape, np.nan) if s.se is None else s.se for s in (self, other)]
            se = np.concatenate(parts, 1)
        values = np.concatenate([self.values, other.values], 1)
        return replace(self, targets=(*self.targets, *other.targets), values=values, se=se)

    def plus(self, other: Scores) -> Scores:
        """The sum with scores of the same examples and targets: two legs of a training run."""
        if (other.example_ids, other.targets) != (self.example_ids, self.targets):
            raise ValueError("scores of other examples or targets")
        se = None if self.se is None or other.se is None else np.hypot(self.se, other.se)
        both = self.details.keys() & other.details.keys() & {"dy", "dX"}
        summed = {name: self.details[name] + other.details[name] for name in both}
        return replace(self, values=self.values + other.values, se=se, details={**self.details, **summed})

    def to_arrow(self) -> pa.Table:
        """Long form: example_id, method, target, value, se; one row an example and target."""
        import pyarrow as pa

        return pa.concat_tables([scores_schema().empty_table(), *map(self.part, self.targets)])

    def part(self, target: TargetName) -> pa.Table:
        """The rows of one target, in long form."""
        import pyarrow as pa

        n, se = len(self), self.error(target)
        columns = [
            pa.array(self.example_ids, pa.string()),
            pa.repeat(pa.scalar(self.method, pa.string()), n),
            pa.repeat(pa.scalar(str(target), pa.string()), n),
            pa.array(self[target], pa.float64()),
            pa.nulls(n, pa.float64()) if se is None else pa.array(se, pa.float64(), from_pandas=True),
        ]
        return pa.Table.from_arrays(columns, schema=scores_schema())

    def to_pandas(self) -> pd.DataFrame:
        """Wide form: one row an example (its id is the index), one column a target. Needs pandas."""
        import pandas as pd

        ids = pd.Index(self.example_ids, name="example_id")
        return pd.DataFrame(self.values, index=ids, columns=[str(target) for target in self.targets])


def scores_schema() -> pa.Schema:
    """The columns of a table of scores in long form."""
    return schema("example_id:str method:str target:str value:float se:float")
