"""A run folder as the report reads it: tables by id, None for what is not there yet.

Of a run with many examples only some are read as rows (``strongest.py``); what is said about all examples
comes from columns (``scores.py``).
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any, cast

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from taught.report.conceptual import ConceptFound, read_concepts
from taught.report.scores import COLUMNS, Clustered, Curated, Scores
from taught.report.stats import Control, cluster_order, unintended_control
from taught.report.strongest import listed_examples
from taught.report.text import clean, cleaned
from taught.run.folder import RunFolder

Row = dict[str, Any]
Rows = list[Row]
Floats = NDArray[np.float64]
LARGE = 2000  # more examples than these are not all listed


@dataclass(frozen=True, eq=False)
class Shifts:
    """Coefficient shifts of every example on both pathways, float64 [P, d], rows and columns by id."""

    example_ids: list[str]
    feature_ids: list[int]
    x: Floats
    y: Floats

    @cached_property
    def total(self) -> Floats:
        """Both pathways together."""
        return self.x + self.y


@dataclass(frozen=True, eq=False)
class Matrix:
    """A tensor with the ids of its rows and columns."""

    rows: list[Any]
    columns: list[Any]
    values: Floats


@dataclass(frozen=True, eq=False)
class View:
    """What the report shows of one run. Text has lost control characters and kept its markup.

    Attributes
    ----------
    examples, summary, certificates, shifts, effects
        Of the examples that are listed, all of them unless ``large``.
    clamp, clamping : of each feature; over all features
    curation, curating : of the examples; what dropping does in all
    counted : columns over all examples of a large run; None when all are listed
    """

    name: str
    manifest: Row
    study: Row
    policy: Row | None
    faithfulness: Row | None
    prompts: Rows | None
    features: Rows | None
    coefficients: Rows | None
    labels: dict[int, Row] | None
    audit: Rows | None
    lds: Rows | None
    trivial: Rows | None
    noise_ceiling: Rows | None
    planted: Rows | None
    curves: Rows | None
    named_effects: Rows | None
    arms: Rows | None
    models: Rows | None
    costs: Rows | None
    statements: Rows | None
    clamp: Rows | None
    clamping: Row | None
    examples: Rows | None
    summary: Rows | None
    certificates: Rows | None
    curation: Curated | None
    curating: Row | None
    clustered: Clustered | None
    concepts: list[ConceptFound] | None
    token_shares: Rows | None
    counted: Scores | None
    shifts: Shifts | None
    effects: Matrix | None
    comovement: Matrix | None

    def feature_label(self, feature_id: int | None) -> str:
        """The label of a feature, or an empty string."""
        for row in self.coefficients or []:
            if row["feature_id"] == feature_id:
                return str(row.get("label") or "")
        return ""

    @cached_property
    def control(self) -> Control | None:
        """Examples that act mainly on unintended features, against chance; None without all shifts."""
        if self.summary is None or self.shifts is None or self.large:
            return None
        intended = {r["example_id"]: r["intended"] or [] for r in self.summary}
        sets = [intended.get(example, []) for example in self.shifts.example_ids]
        return unintended_control(self.shifts.feature_ids, self.shifts.total, sets)

    @cached_property
    def comovement_order(self) -> list[int]:
        """Order of the co-movement matrix that puts features that move together side by side."""
        return [] if self.comovement is None else cluster_order(self.comovement.values)

    @cached_property
    def shown(self) -> Rows:
        """Examples of the example table, largest |S| first; an example's place is its index in the page."""
        return sorted(self.summary or [], key=lambda r: -abs(r["score"] or 0.0))

    @property
    def large(self) -> bool:
        """Whether there are more examples than those that are listed."""
        return self.counted is not None

    @cached_property
    def scores(self) -> Scores:
        """What is counted over all examples."""
        return self.counted or Scores.of(self.summary or [])

    @property
    def groups(self) -> list[str]:
        """Groups of the evaluation prompts, the positive one first."""
        names = list(dict.fromkeys(str(p["group"]) for p in self.prompts or []))
        first = (self.study.get("prompts") or {}).get("positive_group")
        return sorted(names, key=lambda name: name != first)


def load_view(run: RunFolder | Path | str, also: Collection[str] = ()) -> View:
    """Read a run folder.

    A file counts only when the stage that wrote it is complete; the files of other stages are None.

    Parameters
    ----------
    also
        Ids of examples to list in any case, where the run has too many to list them all.

    Raises
    ------
    UserError
        The folder is not a run folder, a file has changed since it was written, or a stage was made
        with an earlier result of the stage before it.
    """
    run = run if isinstance(run, RunFolder) else RunFolder.open(run)
    files = _complete_files(run)
    manifest = cast(Row, cleaned(run.manifest))
    study = manifest.get("study") or {}
    policy = run.read_json("policy") if "policy.json" in files else None
    card = run.read_json("faithfulness") if "faithfulness.json" in files else None
    clamping = run.read_json("clamp") if "clamp.json" in files else None
    labels = run.read_json("labels") if "labels.json" in files else None
    estimator = (study.get("attribution") or {}).get("estimator")
    curating = run.read_json("curation") if "curation.json" in files else None
    counted, listed = _large(run, files, estimator, also)
    return View(
        name=str(study.get("name") or run.folder.resolve().name),
        manifest=manifest,
        study=study,
        policy=cast("Row | None", cleaned(policy)),
        faithfulness=cast("Row | None", cleaned(card)),
        clamping=cast("Row | None", cleaned(clamping)),
        labels=labels and {int(key): _label(cast(Row, cleaned(row))) for key, row in labels.items()},
        counted=counted,
        curation=_curated(run, files),
        curating=cast("Row | None", cleaned(curating)),
        clustered=Clustered.read(run) if "clusters.json" in files else None,
        concepts=read_concepts(run) if "concept_influence.json" in files else None,
        shifts=_shifts(run, files, estimator, listed),
        effects=_matrix(run, files, "prompt_effects", "dy", ("example_ids", "prompt_ids"), listed),
        comovement=_matrix(run, files, "comovement", "r", ("feature_ids", "feature_ids")),
        **{name: _rows(run, files, name) for name in _TABLES},
        **{name: _rows(run, files, name, listed) for name in _PAIR_TABLES},
    )


_TABLES = (
    "prompts",
    "features",
    "coefficients",
    "audit",
    "statements",
    "clamp",
    "lds",
    "trivial",
    "noise_ceiling",
    "planted",
    "curves",
    "named_effects",
    "arms",
    "models",
    "costs",
    "token_shares",
)
_PAIR_TABLES = ("examples", "summary", "certificates")


def _large(
    run: RunFolder, files: set[str], estimator: str | None, also: Collection[str]
) -> tuple[Scores | None, list[str] | None]:
    """Columns over all examples and the ids of those to list; None where all are listed."""
    if "summary.parquet" not in files or (footer := run.footer("summary")).num_rows <= LARGE:
        return None, None
    names = footer.schema.to_arrow_schema().names
    means = [name for name in names if name.startswith("mean_y_")]
    wanted = ["example_id", "label", *COLUMNS, "unintended", "outside_change", "step_score", *means]
    summary = run.read_table("summary", [name for name in wanted if name in names])
    return Scores.of(summary), listed_examples(run, summary, estimator, also)


def _curated(run: RunFolder, files: set[str]) -> Curated | None:
    if "curation.parquet" not in files:
        return None
    return Curated.of(run.read_table("curation"), run.read_table("summary", ["example_id", "label"]))


def _label(row: Row) -> Row:
    """Bring contrast prompts and tokens with their surroundings into one form."""
    tokens = [
        t if "before" in t else {**t, **_split(str(t["token"]), str(t.get("context") or ""))}
        for t in row.get("top_tokens") or []
    ]
    contrast = row.get("contrast_prompts") or row.get("contrastive_prompts") or []
    return {**row, "top_tokens": tokens, "contrast_prompts": contrast}


def _split(token: str, context: str) -> Row:
    """Split a context at the token's occurrence nearest to its middle."""
    if not token or token not in context:
        return {"before": context, "token": "" if context else token, "after": ""}
    places = [i for i in range(len(context)) if context.startswith(token, i)]
    middle = (len(context) - len(token)) / 2
    at = min(places, key=lambda place: abs(place - middle))
    return {"before": context[:at], "after": context[at + len(token) :]}


def _complete_files(run: RunFolder) -> set[str]:
    done = set(run.together())
    return {name for name, record in run.manifest["files"].items() if record["stage"] in done}


def _rows(run: RunFolder, files: set[str], name: str, listed: list[str] | None = None) -> Rows | None:
    if f"{name}.parquet" not in files:
        return None
    rows = cast(Rows, cleaned(run.read_table(name, rows=_of_examples(listed)).to_pylist()))
    for row in rows:
        if "label" in row and name in _PAIR_TABLES:
            row["label"] = str(row["label"] or "unlabelled")
    return rows


def _of_examples(listed: list[str] | None) -> pc.Expression | None:
    return None if listed is None else pc.field("example_id").isin(listed)


def _matrix(
    run: RunFolder, files: set[str], name: str, tensor: str, axes: tuple[str, str], listed: list[str] | None = None
) -> Matrix | None:
    if f"{name}.safetensors" not in files:
        return None
    if listed is None:
        arrays, ids = run.read_tensors(name)
        row_ids, values = ids[axes[0]], arrays[tensor]
    else:
        row_ids, values, ids = run.read_tensor_rows(name, tensor, axes[0], set(listed))
    row_ids, column_ids = (cast("list[Any]", cleaned(names)) for names in (row_ids, ids[axes[1]]))
    return Matrix(row_ids, column_ids, values.astype(np.float64))


def _shifts(run: RunFolder, files: set[str], estimator: str | None, listed: list[str] | None) -> Shifts | None:
    if "influence.parquet" not in files:
        return None
    rows = (pc.field("target") == "coefficient") & pc.field("pathway").isin(["x", "y"])
    chosen = _of_examples(listed)
    rows = rows if chosen is None else rows & chosen
    columns = ["example_id", "feature_id", "pathway", "value", "estimator"]
    parts = [part for part in run.read_parts("influence", columns, rows) if part.num_rows]
    if not parts:
        return None
    table = pa.concat_tables(parts)
    table = _one_estimator(table, estimator)
    example = table["example_id"].combine_chunks().dictionary_encode()
    feature = table["feature_id"].combine_chunks().dictionary_encode()
    row, column = example.indices.to_numpy(), feature.indices.to_numpy()
    value = table["value"].to_numpy()
    out = {}
    for pathway in ("x", "y"):
        at = pc.equal(table["pathway"], pathway).to_numpy()
        out[pathway] = np.zeros((len(example.dictionary), len(feature.dictionary)))
        out[pathway][row[at], column[at]] = value[at]
    example_ids = [clean(p) for p in example.dictionary.to_pylist()]
    return Shifts(example_ids, feature.dictionary.to_pylist(), out["x"], out["y"])


def _one_estimator(table: pa.Table, estimator: str | None) -> pa.Table:
    """Rows of the study's estimator, else of the one with most rows: two never mix in a sum."""
    found = {row["values"]: row["counts"] for row in table["estimator"].value_counts().to_pylist()}
    if estimator not in found:
        estimator = max(found, key=lambda name: found[name])
    return table.filter(pc.equal(table["estimator"], estimator))
