"""Scores of a run, read from its table by target and method."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from taught.core.names import TargetName
from taught.core.scores import Scores
from taught.data.columns import name_ids
from taught.data.corpus import open_corpus
from taught.data.examples import ExampleSet, load_examples
from taught.errors import UserError
from taught.run.fingerprint import content_digest
from taught.run.folder import RunFolder
from taught.study.schema import Study


def own_method(run: RunFolder) -> str:
    """The method of the run's influence, such as ``adjoint+ekfac``."""
    return str(run.read_json("attribution")["method"])


def run_targets(run: RunFolder, *, many: bool = False) -> list[str]:
    """Targets that the run has values of, by its own method; coefficients only if ``many``."""
    names: list[str] = run.read_json("attribution")["targets"]
    if many:
        return names
    columns = set(run.footer("summary").schema.to_arrow_schema().names)
    return [name for name in names if name in columns]


def default_target(run: RunFolder) -> str:
    """What examples are ranked by where nothing else is said: the score, or else the first target."""
    return str(run.read_json("attribution")["ranked_by"])


def read_scores(run: RunFolder, targets: Sequence[str], method: str | None = None) -> Scores:
    """Values of every example of the run, in the order of ``summary.parquet``.

    Parameters
    ----------
    targets : names; a contrast that the run has not is the difference of its two sides
    method : Whose; the run's own if None

    Raises
    ------
    UserError
        The run has no values of a target by this method.
    """
    own = own_method(run)
    method = method or own
    unit = run.read_json("attribution")["unit"] if method == own else "step"
    names = [TargetName.parse(text) for text in targets]
    wanted = {str(part) for name in names for part in (name, *name.parts)}
    ids = run.read_table("summary", ["example_id"])["example_id"].combine_chunks()
    values: dict[str, np.ndarray] = {}
    errors: dict[str, np.ndarray] = {}
    rows = pc.field("target").isin(list(wanted)) & (pc.field("method") == method)
    for part in run.read_parts("scores", ["example_id", "target", "value", "se"], rows):
        for name in part["target"].unique().to_pylist():
            some = part.filter(pc.equal(part["target"], name))
            place = pc.index_in(some["example_id"].combine_chunks(), ids)
            if place.null_count or len(some) != len(ids):
                missing = some["example_id"].filter(pc.is_null(place)).to_pylist()
                raise UserError("scores are of other examples than the run's", value=name_ids(missing))
            at = place.to_numpy()
            values[name], errors[name] = np.empty(len(ids)), np.full(len(ids), np.nan)
            values[name][at] = some["value"].to_numpy()
            errors[name][at] = some["se"].cast(pa.float64()).to_numpy(zero_copy_only=False)
    for name in (name for name in names if str(name) not in values):
        parts = [str(part) for part in name.parts]
        if unit == "rank" or len(parts) < 2 or not set(parts) <= set(values):
            known, methods = run_targets(run), [own, *run.study.attribution.concept_methods]
            policy = ", coefficient:ID" if "policy" in run.manifest["stages"] else ""
            raise UserError(
                "the run has no values of this target",
                value=f"{name}, by {method}",
                rule=f"one of {', '.join(known)}{policy}; methods: {', '.join(methods)}",
                fix=f"ask for it: taught run STUDY --set 'attribution.targets=[{known[0]}, {name}]'",
            )
        values[str(name)] = values[parts[0]] - values[parts[1]]
        errors[str(name)] = np.hypot(errors[parts[0]], errors[parts[1]])
    columns, se = (np.stack([of[str(name)] for name in names], 1) for of in (values, errors))
    error, influence = None if np.isnan(se).any() else se, method == own and unit != "rank"
    return Scores(method, tuple(ids.to_pylist()), tuple(names), columns, error, influence=influence, unit=unit)


def read_shifts(run: RunFolder, example_ids: Sequence[str]) -> Iterator[tuple[int, np.ndarray]]:
    """The change of each coefficient by each example, feature by feature, in the order of the ids."""
    ids = pa.array(example_ids, pa.string())
    rows = pc.starts_with(pc.field("target"), "coefficient:") & (pc.field("method") == own_method(run))
    for part in run.read_parts("scores", ["example_id", "target", "value"], rows):
        for text in part["target"].unique().to_pylist():
            name = TargetName.parse(text)
            if name.pathway is not None or name.minus is not None:
                continue
            some = part.filter(pc.equal(part["target"], text))
            shift = np.zeros(len(example_ids))
            shift[pc.index_in(some["example_id"].combine_chunks(), ids).to_numpy()] = some["value"].to_numpy()
            yield int(str(name.about)), shift


def scored_source(study: Study, run: RunFolder) -> Path:
    """The study's examples on the disk, of which some were scored.

    Raises
    ------
    UserError
        They are others than were scored.
    """
    path = Path(study.examples.path)
    if content_digest("examples.path", path) != run.manifest["inputs"]["attribute"].get("examples.path sha256"):
        raise UserError(
            "the example file has changed since it was scored",
            value=str(path),
            rule="results belong to the examples that were scored",
            fix=f"restore the file, or taught run STUDY --run {run.folder} --fresh",
        )
    return path


def scored_examples(study: Study, run: RunFolder, ids: Collection[str]) -> ExampleSet:
    """Those of the study's examples that were scored, by id; of a corpus no others are held."""
    path = scored_source(study, run)
    if study.examples.kind == "document":
        corpus, wanted = open_corpus(path), set(ids)
        kept = tuple(record for record in corpus if record.id in wanted)
        return ExampleSet(kept, corpus.columns, corpus.source.sha256, path)
    return load_examples(path, study.examples.kind, turns=study.examples.turns)
