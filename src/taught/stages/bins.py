"""The stage ``bins``: what kinds of documents do to the benchmarks, from the tables of a run."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa

from taught.analysis.bins import BinMap, map_bins
from taught.analysis.partition import UNKNOWN, contrast_weights
from taught.core.names import TargetName
from taught.data.examples import ExampleSet
from taught.data.labels import Labels, check_labels, read_labels
from taught.errors import UserError
from taught.progress import Progress, SilentProgress
from taught.run.files import schema
from taught.run.folder import RunFolder
from taught.stages.scored import own_method, read_scores, run_targets, scored_examples
from taught.stats.arrays import Floats, Ints
from taught.stats.intervals import Interval, plain
from taught.study.schema import BinsSpec, Study


def bins(study: Study, run: RunFolder, progress: Progress | None = None) -> None:
    """Map the documents of a run, by one or two of their columns, on the groups of its prompts.

    A document's value is the mean over its windows, weighed by their scored tokens: to first order the effect of one
    step on the document whole, whose loss is the mean over its tokens, however it was cut up. Examples that are no
    documents stand for themselves.

    Raises
    ------
    UserError
        The run has no target ``behavior:GROUP``; what :func:`read_labels` and :func:`map_bins` refuse.
    """
    spec, progress = study.bins or BinsSpec(), progress or SilentProgress()
    with run.stage("bins", study):
        documents = Documents.read(run)
        asked = [TargetName.parse(text) for text in run_targets(run)]
        names = {str(n.about or "all"): str(n) for n in asked if n.kind == "behavior" and n.minus is None}
        if not names:
            raise UserError(
                "the run has no benchmark to map documents on",
                value=", ".join(map(str, asked)),
                rule="a benchmark is a group of prompts: the target behavior:GROUP",
                fix="ask for it: taught run STUDY --set 'attribution.targets=[behavior:*]' --fresh",
            )
        scores = read_scores(run, list(names.values()))
        examples = scored_examples(study, run, documents.ids)
        by_id = {example.id: example for example in examples}
        labels = labels_of(spec, replace(examples, examples=tuple(by_id[name] for name in documents.ids)))
        values = {name: documents.mean(scores[target]) for name, target in names.items()}
        questions = _questions(run, documents, names) if spec.questions else None
        progress.step(f"bins by {' and '.join(spec.columns)}", None)
        found = map_bins(
            documents.ids,
            {column: [label or UNKNOWN for label in own.labels] for column, own in labels.items()},
            values,
            questions,
            contrasts=spec.contrasts,
            minimum=spec.minimum,
            trim=spec.trim,
            permutations=spec.permutations,
            bootstrap=spec.bootstrap,
            seed=spec.seed,
        )
        for name, rows in (("bins", found.bins), ("contrasts", found.contrasted)):
            run.write_table(name, pa.Table.from_pylist([row._asdict() for row in rows], _BINS))
        row, *column = ([label or UNKNOWN for label in own.labels] for own in labels.values())
        given = [documents.ids, row, column[0] if column else [None] * len(row)]
        with run.table_writer("bin_documents", _DOCUMENTS) as write:
            for name, own in values.items():
                columns = [*given, [name] * len(row), own, documents.n_examples]
                write(pa.table(dict(zip(_DOCUMENTS.names, columns, strict=True)), schema=_DOCUMENTS))
        _write_record(run, spec, found, documents, labels, questions)


def labels_of(spec: BinsSpec, examples: ExampleSet) -> dict[str, Labels]:
    """Column -> the labels of these examples."""
    return {column: read_labels(examples, column, spec.taxonomy, spec.classifier) for column in spec.columns}


def check_bins(spec: BinsSpec, examples: ExampleSet, groups: Sequence[str]) -> None:
    """Raise a UserError where the stage would: on columns, labels and contrasts."""
    for column in spec.columns:
        check_labels(examples, column, spec.taxonomy, spec.classifier)
    for contrast in spec.contrasts or ():
        contrast_weights(contrast, groups)


@dataclass(frozen=True, eq=False)
class Documents:
    """Documents and the scored examples that they are cut up into.

    Attributes
    ----------
    ids : D ids, in order of first appearance
    example_ids : P ids
    place : of each example the place of its document, [P]
    weight : of each example its share of its document's scored tokens, [P]
    """

    ids: tuple[str, ...]
    example_ids: tuple[str, ...]
    place: Ints
    weight: Floats

    @classmethod
    def read(cls, run: RunFolder) -> Documents:
        """The documents of a run; an example that is no window of one is one."""
        table = run.read_table("examples", ["example_id", "document", "n_scored"])
        examples, named, scored = (column.to_pylist() for column in table.columns)
        whose = [document or example for example, document in zip(examples, named, strict=True)]
        ids = tuple(dict.fromkeys(whose))
        number = {name: place for place, name in enumerate(ids)}
        place = np.array([number[name] for name in whose], dtype=np.int64)
        tokens = np.array(scored, dtype=np.float64)
        return cls(ids, tuple(examples), place, tokens / np.bincount(place, tokens)[place])

    @property
    def n_examples(self) -> Ints:
        """How many examples each document is cut up into, [D]."""
        return np.bincount(self.place)

    def mean(self, values: Any) -> Floats:
        """Values [D, ...] of the documents from those of the examples [P, ...], in the type of the latter."""
        if len(self.ids) == len(self.example_ids):
            return np.asarray(values)
        order = np.argsort(self.place, kind="stable")
        weight = self.weight[order].astype(values.dtype).reshape(-1, *(1,) * (values.ndim - 1))
        starts = np.cumsum(self.n_examples) - self.n_examples
        return np.asarray(np.add.reduceat(weight * values[order], starts, axis=0))


def _questions(run: RunFolder, documents: Documents, names: Mapping[str, str]) -> dict[str, Any] | None:
    """Benchmark -> influence of each document on each of its prompts, float32; None where the run has not kept it."""
    if "prompt_effects.safetensors" not in run.manifest["files"]:
        return None
    tensors, ids = run.read_tensors("prompt_effects")
    if tuple(ids["example_ids"]) != documents.example_ids:
        raise UserError("changes of prompts are of other examples than the run's", fix="taught run STUDY --fresh")
    dy = documents.mean(tensors["dy"])
    prompts = run.read_table("prompts", ["prompt_id", "group", "category"]).to_pylist()
    groups = {row["group"] for row in prompts}
    of = {row["prompt_id"]: row for row in prompts}
    found = {}
    for name, target in names.items():
        key = "group" if name in groups else "category"
        every = TargetName.parse(target).about is None
        found[name] = dy[:, [k for k, i in enumerate(ids["prompt_ids"]) if every or of[i][key] == name]]
    return found


_BINS = schema(
    "level:str row:str column:str benchmark:str n_documents:int tested:bool rank:int mean:float lo:float hi:float "
    "median:float share_positive:float trimmed:float trimmed_lo:float trimmed_hi:float effect:float effect_lo:float "
    "effect_hi:float without_lo:float without_hi:float carried_by:str examples:[str] z:float over_bins:float "
    "over_bins_lo:float over_bins_hi:float over_bins_carried_by:str above:float p:float p_holm:float p_bh:float"
)
_DOCUMENTS = schema("document_id:str row:str column:str benchmark:str value:float n_examples:int")


def _write_record(
    run: RunFolder,
    spec: BinsSpec,
    found: BinMap,
    documents: Documents,
    labels: Mapping[str, Labels],
    questions: Mapping[str, Any] | None,
) -> None:
    def said(value: Any) -> Any:
        if isinstance(value, Interval):
            return value.to_dict()
        return plain(value) if isinstance(value, float) else value

    record = {
        "columns": list(found.columns),
        "taxonomy": spec.taxonomy,
        "classifier": spec.classifier,
        "method": own_method(run),
        "benchmarks": list(found.benchmarks),
        "contrasts": list(found.contrasts),
        "documents": len(documents.ids),
        "examples": len(documents.example_ids),
        "questions": None if questions is None else {name: own.shape[1] for name, own in questions.items()},
        "minimum": spec.minimum,
        "trim": spec.trim,
        "permutations": found.permutations,
        "bootstrap": found.bootstrap,
        "unlabelled": {column: list(own.unlabelled) for column, own in labels.items()},
        "empty": {column: list(own.empty) for column, own in labels.items()},
        "profiles": [{name: said(value) for name, value in row._asdict().items()} for row in found.agreements],
    }
    run.write_json("bins", record)
