"""Training examples as the report reads them: their targets, all of them as columns, some as rows.

A million rows as Python values would not fit into memory; their columns do.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from taught.report.tables import UNLABELLED, Floats, Row, Rows, Tables, once
from taught.report.text import clean

STRONGEST = 200
ENDS = 5  # examples named at either end of a ranking
OFFENDERS = 10
SE = " se"
PRIMARY = "score"
_FACTS = "loss rank n_scored outside_share outside_change dominant_share expected_by_chance n_intended"
_COEFFICIENT = re.compile(r"coefficient:(\d+)(?::([xy]))?")


def targets(tables: Tables) -> list[str]:
    """Targets with a column in the summary: the score, behaviors, others, then single prompts.

    The pathways of a target (``score:x``) and standard errors come with it and are not named.
    """
    if "summary.parquet" not in tables.files:
        return []
    return [clean(name) for name in targets_of(summary_schema(tables))]


def summary_schema(tables: Tables) -> pa.Schema:
    """Columns of the summary."""
    return tables.footer("summary").schema.to_arrow_schema()


def targets_of(schema: pa.Schema) -> list[str]:
    """The same from the columns of a summary."""
    names = [field.name for field in schema if pa.types.is_floating(field.type)]
    names = [n for n in names if n not in _FACTS.split() and not n.endswith((SE, "_score"))]
    own = [n for n in names if n[-2:] not in (":x", ":y") or n[:-2] not in names]
    return sorted(own, key=lambda n: (n != PRIMARY, not is_behavior(n), n.startswith("prompt:")))


def is_behavior(target: str) -> bool:
    """Whether a target is the behavior on some prompts."""
    return target == "behavior" or target.startswith("behavior:")


def primary(tables: Tables) -> str:
    """What examples are ranked by: the first target that was asked for, where the summary has it."""
    ranked, names = tables.json("attribution").get("ranked_by"), targets(tables)
    return ranked if ranked in names else (names or [PRIMARY])[0]


@dataclass(frozen=True, eq=False)
class Summary:
    """Columns of the summary over all examples.

    Attributes
    ----------
    targets : as :func:`targets_of`
    names, label : the labels in order of their first example, and for each example the place of its own
    columns : name -> float64 [P], nan where there is no value
    unintended : how many examples act mainly on an unintended feature
    """

    targets: list[str]
    names: list[str]
    label: NDArray[np.int64]
    columns: dict[str, Floats]
    unintended: int

    @classmethod
    def of(cls, table: pa.Table) -> Summary:
        """From a table with label and numbers."""
        table = table.rename_columns([clean(name) for name in table.column_names])
        encoded = table["label"].cast(pa.string()).fill_null("").combine_chunks().dictionary_encode()
        known = [clean(label) or UNLABELLED for label in encoded.dictionary.to_pylist()]
        names = list(dict.fromkeys(known))  # two labels may be shown alike
        label = np.array([names.index(name) for name in known], dtype=np.int64)[encoded.indices.to_numpy()]
        kinds = (pa.types.is_integer, pa.types.is_floating, pa.types.is_null)
        numbers = [field.name for field in table.schema if any(kind(field.type) for kind in kinds)]
        flagged = int((floats(table, "unintended") == 1).sum())
        return cls(targets_of(table.schema), names, label, {name: floats(table, name) for name in numbers}, flagged)

    @classmethod
    def read(cls, tables: Tables) -> Summary:
        """Of a run that has scores. Targets that are single prompts are left out."""
        names = summary_schema(tables).names
        wanted = [n for n in names if not n.startswith("prompt:") and n not in ("intended", "features", "note")]
        return tables.once("summary over all", lambda: cls.of(cast(pa.Table, tables.columns("summary", wanted))))

    def __len__(self) -> int:
        return len(self.label)

    @cached_property
    def finite(self) -> Summary:
        """Examples that have values; the others gave a loss that is not finite."""
        kept = np.isfinite(self.columns[self.targets[0]])
        present, label = np.unique(self.label[kept], return_inverse=True)
        columns = {name: values[kept] for name, values in self.columns.items()}
        return Summary(self.targets, [self.names[i] for i in present], label, columns, self.unintended)

    def own(self, name: str, column: str) -> Floats:
        """One column of the examples with this label."""
        return self.columns[column][self.label == self.names.index(name)]


@once
def shown(tables: Tables) -> Rows:
    """Listed examples, the largest values of the first target first: the order of the page."""
    first = primary(tables)
    return sorted(tables.rows("summary"), key=lambda r: -abs(r.get(first) or 0.0))


def scored(rows: Sequence[Row], target: str) -> Rows:
    """Rows with a value of the target."""
    return [r for r in rows if r.get(target) is not None and np.isfinite(r[target])]


def ends(rows: Sequence[Row], target: str, k: int) -> tuple[Rows, Rows]:
    """The k rows that raise a target most, and the k that lower it most, the strongest first."""
    order = sorted(scored(rows, target), key=lambda r: -r[target])
    up = [r for r in order[:k] if r[target] > 0]
    return up, [r for r in reversed(order[-k:]) if r[target] < 0]


@once
def texts(tables: Tables) -> dict[str, Row]:
    """Example id -> its row with prompt, response, category and source."""
    return {row["example_id"]: row for row in tables.rows("examples")}


# Which examples a large run lists


def listed_examples(tables: Tables) -> list[str]:
    """The strongest examples of a large run and those that the report names, in the summary's order."""
    names = targets_of(summary_schema(tables))
    wanted = ["example_id", "unintended", "outside_change", "step_score"]
    summary = tables.columns("summary", wanted + [n for n in names if not n.startswith("prompt:")])
    assert summary is not None
    also = {*tables.also, *_movers(tables)}
    named = pc.is_in(summary["example_id"], pa.array(sorted(also), pa.string())).to_numpy()
    # Those that stand at an end of one of the rankings.
    first = -np.abs(floats(summary, next(n for n in names if clean(n) == primary(tables))))
    rankings = [(first, STRONGEST)]
    for name in names:
        if name in summary.column_names:
            rankings += [(floats(summary, name), ENDS), (-floats(summary, name), ENDS)]
    flagged = floats(summary, "unintended") == 1
    rankings.append((np.where(flagged, -floats(summary, "outside_change"), np.nan), OFFENDERS))
    rankings.append((np.where(np.isfinite(floats(summary, "step_score")), first, np.nan), STRONGEST))
    for key, k in rankings:
        smallest = np.argsort(key, kind="stable")[:k]
        named[smallest[~np.isnan(key[smallest])]] = True
    chosen: list[str] = summary["example_id"].filter(pa.array(named)).to_pylist()
    return chosen


def _movers(tables: Tables) -> set[str]:
    """Examples that raise or lower a coefficient most."""
    best: dict[str, list[tuple[float, str]]] = {}
    for part in _coefficients(tables, pathways=False):
        target, value = part["target"].to_numpy(), part["value"].to_numpy()
        for one in part["target"].unique().to_pylist():
            at = np.flatnonzero(target == one)
            found = at[_ends(value[at])]
            examples = part["example_id"].take(pa.array(found)).to_pylist()
            held = best.get(one, []) + list(zip(value[found].tolist(), examples, strict=True))
            best[one] = [held[i] for i in _ends(np.array([v for v, _ in held]))]
    return {example for held in best.values() for _, example in held}


def _ends(values: Floats) -> NDArray[np.int64]:
    """Places of the largest and of the smallest values."""
    if len(values) <= 2 * ENDS:
        return np.arange(len(values))
    order = np.argpartition(values, [ENDS - 1, len(values) - ENDS])
    return np.concatenate([order[:ENDS], order[-ENDS:]])


# Coefficients


@dataclass(frozen=True, eq=False)
class Shifts:
    """Shifts of the coefficients by every listed example on both pathways, float64 [P, d], by id."""

    example_ids: list[str]
    feature_ids: list[int]
    x: Floats
    y: Floats

    @cached_property
    def total(self) -> Floats:
        """Both pathways together."""
        return self.x + self.y

    def of(self, example: str) -> tuple[Floats, Floats] | None:
        """Both pathways of one example; None where it has none."""
        row = self._row.get(example)
        return None if row is None else (self.x[row], self.y[row])

    @cached_property
    def _row(self) -> dict[str, int]:
        return {example: i for i, example in enumerate(self.example_ids)}


@once
def shifts(tables: Tables) -> Shifts | None:
    """Shifts of the coefficients; None where the run has none."""
    parts = [part for part in _coefficients(tables, pathways=True) if part.num_rows]
    if not parts:
        return None
    table = pa.concat_tables(parts)
    example = table["example_id"].combine_chunks().dictionary_encode()
    target = table["target"].combine_chunks().dictionary_encode()
    named = [_COEFFICIENT.fullmatch(name) for name in target.dictionary.to_pylist()]
    features = list(dict.fromkeys(int(found[1]) for found in named if found))
    place = np.array([features.index(int(found[1])) for found in named if found])[target.indices.to_numpy()]
    on_x = np.array([found[2] == "x" for found in named if found])[target.indices.to_numpy()]
    row, value = example.indices.to_numpy(), table["value"].to_numpy()
    x, y = (np.zeros((len(example.dictionary), len(features))) for _ in "xy")
    x[row[on_x], place[on_x]], y[row[~on_x], place[~on_x]] = value[on_x], value[~on_x]
    return Shifts([clean(e) for e in example.dictionary.to_pylist()], features, x, y)


def _coefficients(tables: Tables, pathways: bool) -> Iterator[pa.Table]:
    """Rows of the coefficients by the run's own method: one pathway each, or both together."""
    method = own_method(tables)
    own = (_COEFFICIENT.fullmatch(target) for of, target in score_index(tables) if of == method)
    names = [found[0] for found in own if found and (found[2] is not None) == pathways]
    rows = (pc.field("method") == method) & pc.field("target").isin(names)
    if pathways and tables.listed is not None:
        rows &= pc.field("example_id").isin(tables.listed)
    if names:
        yield from tables.run.read_parts("scores", ["example_id", "target", "value"], rows)


@once
def score_index(tables: Tables) -> list[tuple[str, str]]:
    """Each method and target in scores.parquet; empty where there are none.

    By the statistics of the row groups where each holds one, else by reading both columns.
    """
    if "scores.parquet" not in tables.files:
        return []
    footer, keys = tables.footer("scores"), ("method", "target")
    place = {footer.schema.column(i).name: i for i in range(footer.num_columns)}
    found: dict[tuple[str, str], None] = {}
    for group in range(footer.num_row_groups):
        stats = [footer.row_group(group).column(place[key]).statistics for key in keys]
        if any(s is None or not s.has_min_max or s.min != s.max for s in stats):
            table = tables.columns("scores", keys)
            assert table is not None
            pairs = table.group_by(list(keys), use_threads=False).aggregate([])
            return list(zip(*(pairs[key].to_pylist() for key in keys), strict=True))
        found[stats[0].min, stats[1].min] = None
    return list(found)


def own_method(tables: Tables) -> str:
    """The method of the run itself, not of one that it is compared with."""
    return str(tables.json("attribution").get("method"))


# Columns


def floats(table: pa.Table, name: str) -> Floats:
    """A column as float64, nan where it has no value or is absent."""
    if name not in table.column_names:
        return np.full(table.num_rows, np.nan)
    values: Floats = table[name].cast(pa.float64()).to_numpy()
    return values
