"""What the report says about all examples, also about those that it does not list: columns, no rows.

A million rows as Python values would not fit into memory; their columns do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from taught.report.text import clean, cleaned
from taught.run.folder import RunFolder

Row = dict[str, Any]
COLUMNS = ("score", "score_x", "score_y", "score_se", "loss", "n_response")
MAX_DROPS = 1000
FARTHEST = 3


@dataclass(frozen=True, eq=False)
class Scores:
    """Columns of the summary, all examples.

    Attributes
    ----------
    names, label : the labels in order of their first example, and for each example the place of its own
    columns : score, score_x, score_y, score_se, loss and n_response, float64 [P], nan where there
        is none
    unintended : how many examples act mainly on an unintended feature
    """

    names: list[str]
    label: NDArray[np.int64]
    columns: dict[str, NDArray[np.float64]]
    unintended: int

    @classmethod
    def of(cls, summary: pa.Table | Sequence[Row]) -> Scores:
        """From a table with these columns, or from rows; a column that is absent is nan."""
        if not isinstance(summary, pa.Table):
            keys = ("label", "unintended", *COLUMNS)
            summary = pa.table({key: [row.get(key) for row in summary] for key in keys})
        names, label = _labels(summary["label"])
        columns = {name: floats(summary, name) for name in COLUMNS}
        flagged = pc.sum(summary["unintended"].cast(pa.bool_()), min_count=0).as_py()
        return cls(names, label, columns, int(flagged))

    def __len__(self) -> int:
        return len(self.label)

    @cached_property
    def finite(self) -> Scores:
        """Examples that have a score; the others gave a loss that is not finite."""
        kept = np.isfinite(self.columns["score"])
        present, label = np.unique(self.label[kept], return_inverse=True)
        columns = {name: values[kept] for name, values in self.columns.items()}
        return Scores([self.names[i] for i in present], label, columns, self.unintended)

    def own(self, name: str, column: str) -> NDArray[np.float64]:
        """One column of the examples with this label."""
        return self.columns[column][self.label == self.names.index(name)]


def _labels(column: pa.ChunkedArray) -> tuple[list[str], NDArray[np.int64]]:
    """Labels as they are shown, each once, and the place of each row's own."""
    encoded = column.cast(pa.string()).fill_null("").combine_chunks().dictionary_encode()
    shown = [clean(label) or "unlabelled" for label in encoded.dictionary.to_pylist()]
    names = list(dict.fromkeys(shown))
    places = np.array([names.index(label) for label in shown], dtype=np.int64)
    return names, places[encoded.indices.to_numpy()]


def floats(table: pa.Table, name: str) -> NDArray[np.float64]:
    """A column as float64, nan where it has no value or is absent."""
    if name not in table.column_names:
        return np.full(table.num_rows, np.nan)
    values: NDArray[np.float64] = table[name].cast(pa.float64()).to_numpy()
    return values


@dataclass(frozen=True, eq=False)
class Curated:
    """What to keep and what to drop, counted over all examples.

    Attributes
    ----------
    rule, target, protect : what was decided by; the protected target is empty where there is none
    counts : label -> how many to keep and to drop
    drops : examples to drop with their labels, lowest score first, at most ``MAX_DROPS``
    farthest : ids of the dropped examples that lie farthest past their threshold
    largest : largest absolute score or threshold
    """

    rule: str
    target: str
    protect: str
    counts: dict[str, dict[str, int]]
    drops: list[Row]
    farthest: list[str]
    largest: float

    @classmethod
    def of(cls, table: pa.Table, labels: pa.Table) -> Curated:
        """From curation.parquet and a table of example_id and label."""
        first = table.slice(0, 1).to_pylist()[0]
        drops = table.filter(pc.equal(table["action"], "drop"))
        past = np.abs(floats(drops, "score") - np.nan_to_num(floats(drops, "threshold")))
        far = np.argsort(-past, kind="stable")[:FARTHEST]
        low = np.argsort(floats(drops, "score"), kind="stable")[:MAX_DROPS]
        sizes = np.abs([floats(table, name) for name in ("score", "threshold")])
        return cls(
            clean(first["rule"]),
            clean(first.get("target", "score")),
            clean(first.get("protect") or ""),
            _counts(table, labels),
            _labelled(drops.take(low), labels),
            [clean(example) for example in drops["example_id"].take(far).to_pylist()],
            float(np.nanmax(sizes)),
        )

    @property
    def n(self) -> int:
        """How many examples were decided on."""
        return self.n_drops + sum(own["keep"] for own in self.counts.values())

    @property
    def n_drops(self) -> int:
        """How many of them to drop."""
        return sum(own["drop"] for own in self.counts.values())


@dataclass(frozen=True, eq=False)
class Clustered:
    """What the stage ``clusters`` wrote; text has lost control characters.

    Attributes
    ----------
    clusters, influence : rows of the tables clusters and cluster_influence
    made : clusters.json
    featureless : ids of the examples on which no feature is active
    """

    clusters: list[Row]
    influence: list[Row]
    made: Row
    featureless: list[str]

    @classmethod
    def read(cls, run: RunFolder) -> Clustered:
        """From a run folder in which the stage is complete."""
        none = run.read_table("cluster_members", ["example_id"], rows=pc.field("cluster") == 0)
        return cls(
            cast("list[Row]", cleaned(run.read_table("clusters").to_pylist())),
            cast("list[Row]", cleaned(run.read_table("cluster_influence").to_pylist())),
            cast(Row, cleaned(run.read_json("clusters"))),
            [clean(example) for example in none["example_id"].to_pylist()],
        )

    @property
    def targets(self) -> dict[str, list[tuple[Row, Row]]]:
        """Target -> for each cluster its row and its influence on the target."""
        own = {row["cluster"]: row for row in self.clusters}
        found: dict[str, list[tuple[Row, Row]]] = {}
        for row in self.influence:
            found.setdefault(row["target"], []).append((own[row["cluster"]], row))
        return found


def _counts(table: pa.Table, labels: pa.Table) -> dict[str, dict[str, int]]:
    joined = table.select(["example_id", "action"]).join(labels, "example_id")
    counts: dict[str, dict[str, int]] = {}
    for row in joined.group_by(["label", "action"]).aggregate([([], "count_all")]).to_pylist():
        own = counts.setdefault(clean(row["label"] or "unlabelled"), {"keep": 0, "drop": 0})
        own[row["action"]] += row["count_all"]
    return dict(sorted(counts.items()))


def _labelled(drops: pa.Table, labels: pa.Table) -> list[Row]:
    known = labels.filter(pc.is_in(labels["example_id"], drops["example_id"].combine_chunks()))
    label = dict(zip(known["example_id"].to_pylist(), known["label"].to_pylist(), strict=True))
    rows = [row | {"label": label.get(row["example_id"]) or "unlabelled"} for row in drops.to_pylist()]
    return cast("list[Row]", cleaned(rows))
