"""The stage ``concepts``: directions from two groups of rows, from features or from a file.

The groups are those of the evaluation prompts, read before an answer, or labelled examples of
answers, read at their response.
"""

from __future__ import annotations

from collections.abc import Collection, Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from taught.baselines.activations import project, response_reads
from taught.core.example import Examples
from taught.core.names import TargetName
from taught.core.passes import settle_passes
from taught.core.point import Point
from taught.core.scores import Scores
from taught.data.columns import name_ids
from taught.data.examples import ExampleSet, load_examples
from taught.data.overlap import drop_overlap, drop_shared
from taught.data.prompts import PromptSet
from taught.errors import UserError
from taught.features.concept import (
    Concept,
    concept_map,
    control_block,
    control_tensor,
    feature_direction,
    file_direction,
    fitted_direction,
    is_control_vector,
    load_concept,
    normalised,
    quality_card,
    require_place,
)
from taught.features.pooling import pool
from taught.features.probe import sweep
from taught.model.forward import find_blocks, get_point
from taught.model.readout import read_vectors
from taught.policy.ridge import check_folds
from taught.progress import Progress, SilentProgress
from taught.run.folder import RunFolder
from taught.stages.own_responses import own_examples
from taught.stages.subject import Subject, open_checkpoint, open_subject, prompt_inputs, study_prompts
from taught.stats.arrays import Bools, Floats
from taught.study.schema import ConceptSpec, Study


@dataclass(frozen=True, eq=False)
class Read:
    """A concept of a study, and what its mean is over: the prompts or the examples' responses, of a group."""

    concept: Concept
    over: str
    group: str | None

    @property
    def name(self) -> str:
        """Its name."""
        return self.concept.name


def concepts(study: Study, run: RunFolder, progress: Progress | None = None) -> None:
    """Make the concepts of the study, each with a card that says how well it separates two groups.

    Raises
    ------
    UserError
        An unknown source, block or place; a direction that does not fit the model; examples with other labels, or that
        are prompts or examples of the study; a probe that is no better than chance on rows it has not seen.
    """
    progress = progress or SilentProgress()
    prompts = study_prompts(study)
    progress.step("load the model")
    subject = open_subject(study)
    with run.stage("concepts", study, subject.identity) as stage:
        if stage.done:
            return
        if any(spec.path is None for spec in study.concepts):
            every = prompt_inputs(subject.encode(prompts), None)
            settle_passes(subject.loaded.model, every, subject.behavior, progress=progress)
        made = [_made(study, subject, spec, prompts, progress) for spec in study.concepts]
        if made:
            directions = {"directions": np.stack([concept.direction for concept in made])}
            names = {"names": [concept.name for concept in made]}
            run.write_tensors("concepts", directions, names, axes={"directions": ("names", None)})
        run.write_json("concepts", {"concepts": [concept.record() for concept in made]})


def run_concepts(study: Study, run: RunFolder, subject: Subject) -> list[Read]:
    """The concepts of a run, in the study's order.

    Raises
    ------
    UserError
        One does not fit the model.
    """
    if not study.concepts:
        return []
    run.require("concepts")
    stored, found = _stored(run), []
    for spec in study.concepts:
        _require_fit(stored[spec.name], subject)
        found.append(Read(stored[spec.name], spec.read, spec.group))
    return found


def _stored(run: RunFolder) -> dict[str, Concept]:
    arrays, ids = run.read_tensors("concepts")
    direction = dict(zip(ids["names"], arrays["directions"], strict=True))
    records = run.read_json("concepts")["concepts"]
    return {record["name"]: Concept.of(record, direction[record["name"]]) for record in records}


def _require_fit(concept: Concept, subject: Subject) -> None:
    blocks = len(find_blocks(subject.loaded.model))
    concept.require_fit(width=subject.width, blocks=blocks, weights=subject.loaded.weights)
    get_point(subject.loaded.model, concept.point)


def _made(study: Study, subject: Subject, spec: ConceptSpec, prompts: PromptSet, progress: Progress) -> Concept:
    """One concept, made or loaded."""
    if spec.path is not None:
        return _saved(Path(spec.path), spec.name, subject)
    kind, detail = _source(spec)
    position = spec.position or study.readout.position
    require_place(position, spec.tokens)
    point, detail = _point(spec, kind, detail, subject)
    blocks = range(len(find_blocks(subject.loaded.model)))
    points = [Point(block, point.part) for block in blocks] if spec.sweep else [point]
    if spec.examples is None:
        H, positive = _read(study, subject, prompts, position, points, progress)
        data = {"prompts sha256": prompts.sha256, "groups": list(study.prompts.sides), "limit": study.prompts.limit}
    else:
        rows = load_answers(Path(spec.examples), study, prompts, progress)
        sides = (spec.positive, spec.negative)
        H, positive = read_examples(study, subject, rows, sides, spec.tokens, points, progress)
        data = {"examples sha256": rows.sha256, "labels": list(sides)}
    X = H[points.index(point)]
    progress.step("fit and judge the direction")
    direction, card, origin = _direction(study, subject, spec, (kind, detail), X, positive)
    if spec.sweep:
        card["sweep"] = sweep(H, positive, _method(spec, kind), spec.penalty, **_draws(study))
    weights, provenance = dict(subject.loaded.weights), {"source": spec.source, "norm": spec.norm, **origin, **data}
    direction = normalised(direction, spec.norm)
    return Concept(spec.name, direction, point, position, spec.tokens, weights, provenance, card)


def _saved(folder: Path, name: str, subject: Subject) -> Concept:
    """A concept that was saved, or one of another run by its name."""
    if not (folder / "concepts.json").is_file():
        concept = load_concept(folder)
    else:
        stored = _stored(RunFolder.open(folder))
        if name not in stored:
            raise UserError(
                "the run has no concept of this name",
                value=name,
                rule="one of " + ", ".join(stored),
                fix=f"correct the name under concepts, or its path {folder}",
            )
        concept = stored[name]
    concept = replace(concept, name=name)
    _require_fit(concept, subject)
    return concept


# Methods that read activations and take no gradient


def concept_method_scores(
    study: Study, subject: Subject, run: RunFolder, inputs: Examples, concepts: Sequence[Read], progress: Progress
) -> list[Scores]:
    """Values of every example for every concept by the study's ``attribution.concept_methods``."""
    projector = _Projector(study, subject, run, inputs, [read.concept for read in concepts], progress)
    ids, names = tuple(z.id for z in inputs), tuple(TargetName("concept", read.name) for read in concepts)
    found = []
    for method in study.attribution.concept_methods:
        values = getattr(projector, method.replace("-", "_"))()
        columns = [values[read.name] for read in concepts]
        found.append(Scores(method, ids, names, np.stack(columns, 1), influence=False))
    return found


def check_concept_methods(study: Study) -> None:
    """Raise a UserError where a method for concepts lacks a fine-tuned model, or a concept."""
    spec = study.attribution
    if "projection-difference-training" in spec.concept_methods and spec.checkpoint is None:
        raise UserError(
            "the difference that training made needs a fine-tuned model",
            rule="activations of the fine-tuned model minus those of the base model",
            fix="set attribution.checkpoint to its folder or hub id",
        )
    if spec.concept_methods and not study.concepts:
        raise UserError(
            "methods for concepts are asked for, and there are no concepts",
            value=", ".join(spec.concept_methods),
            rule="they project activations on a concept's direction",
            fix="add one: concepts: [{name: NAME, source: difference}]",
        )


@dataclass(eq=False)
class _Projector:
    """Projections of examples on concepts; one pass a place serves all methods."""

    study: Study
    subject: Subject
    run: RunFolder
    inputs: Examples
    concepts: Sequence[Concept]
    progress: Progress
    base: dict[str, Floats] = field(default_factory=dict)

    def _read(self, model: Any, examples: Examples, what: str) -> dict[str, Floats]:
        """Concept -> projection of each example, [P]."""
        places: dict[tuple[Point, str], list[Concept]] = {}
        for concept in self.concepts:
            places.setdefault((concept.point, concept.tokens), []).append(concept)
        like = next(self.subject.loaded.model.parameters())
        found: dict[str, Floats] = {}
        for (point, tokens), some in places.items():
            self.progress.step(f"activations of {what}", len(examples))
            onto, batch = concept_map(some, tokens, like), self.study.attribution.batch_tokens
            values = project(model, examples, onto, point, batch_tokens=batch, progress=self.progress)
            found |= {concept.name: values[:, c].numpy() for c, concept in enumerate(some)}
        return found

    def vector_filter(self) -> dict[str, Floats]:
        """Projection of the base model's activations on each example."""
        if not self.base:
            self.base = self._read(self.subject.loaded.model, self.inputs, "the examples")
        return self.base

    def projection_difference_response(self) -> dict[str, Floats]:
        """The same minus the projection of the model's own answer to the example's prompt."""
        file, limit = self.run.path("own_responses.json"), self.study.attribution.max_new_tokens
        own = own_examples(self.study, self.subject, self.inputs, file, limit, self.progress)
        theirs = self._read(self.subject.loaded.model, own, "the model's own responses")
        return {name: values - theirs[name] for name, values in self.vector_filter().items()}

    def projection_difference_training(self) -> dict[str, Floats]:
        """The fine-tuned model's projection minus the base model's."""
        model = open_checkpoint(self.study, self.subject, str(self.study.attribution.checkpoint), None)
        after = self._read(model, self.inputs, "the examples by the fine-tuned model")
        return {name: after[name] - values for name, values in self.vector_filter().items()}


# Where directions come from


def _source(spec: ConceptSpec) -> tuple[str, str]:
    kind, _, detail = str(spec.source).partition(":")
    plain = kind in ("difference", "probe")
    if not (plain if not detail else kind in ("feature", "file")):
        raise UserError(
            "unknown source of a concept",
            value=spec.source,
            rule="difference, probe, feature:ID (or feature:ID=SHARE,ID=SHARE) or file:PATH[:TENSOR]",
            fix=f"correct the source of {spec.name} under concepts",
        )
    if spec.sweep and not plain:
        what, rule = "a sweep over blocks is of directions that are fitted", "sweep goes with difference and probe"
        raise UserError(what, value=spec.source, rule=rule, fix="leave out sweep")
    return kind, detail


def _point(spec: ConceptSpec, kind: str, detail: str, subject: Subject) -> tuple[Point, str]:
    """Where the concept is read, and the source's detail with the tensor of that block."""
    sae = subject.sae
    default = Point(len(find_blocks(subject.loaded.model)) // 2) if sae is None else sae.point
    point = Point(default.block if spec.block is None else spec.block, spec.point or default.part)
    if kind == "feature" and point != subject.required_sae.point:
        rule, fix = str(subject.required_sae.point), "leave out block and point"
        raise UserError("a feature is a direction where its SAE reads", value=point, rule=rule, fix=fix)
    path, tensor = _file_parts(detail) if kind == "file" else ("", None)
    if is_control_vector(path):
        tensor = tensor or control_tensor(point.block)
        own, rule = Point(control_block(tensor)), "direction.N is added to the output of block N"
        if spec.block not in (None, own.block):
            value, fix = f"{tensor}, block {spec.block}", f"leave out block, or name {control_tensor(point.block)}"
            raise UserError("the direction is of another block", value=value, rule=rule, fix=fix)
        if spec.point not in (None, own.part):
            value, fix = f"{tensor}, {spec.point}", "leave out point"
            raise UserError("the direction is of the residual stream", value=value, rule=rule, fix=fix)
        point, detail = own, f"{path}:{tensor}"
    get_point(subject.loaded.model, point)
    return point, detail


def _read(
    study: Study, subject: Subject, prompts: PromptSet, position: str, points: Sequence[Point], progress: Progress
) -> tuple[Floats, Any]:
    """Pooled h [points, N, D] of the prompts of both groups, and which are positive."""
    positive, negative = study.prompts.sides
    chosen = [prompt for prompt in prompts if prompt.group in (positive, negative)]
    inputs = prompt_inputs(subject.encode(chosen), position)
    progress.step("read prompts", len(inputs))
    H = read_vectors(subject.loaded.model, inputs, points, partial(pool, how=position), progress=progress)
    return H.numpy(), np.array([prompt.group == positive for prompt in chosen])


def check_concept(
    study: Study, subject: Subject, spec: ConceptSpec, prompts: PromptSet, labels: Collection[str | None]
) -> None:
    """Raise a UserError where one concept cannot be made, as far as that shows without the model's activations.

    Parameters
    ----------
    labels : of the study's examples
    """
    check_group(spec.group, [prompt.group for prompt in prompts] if spec.read == "prompts" else labels)
    if spec.path is not None:
        _saved(Path(spec.path), spec.name, subject)
        return
    kind, detail = _source(spec)
    require_place(spec.position or study.readout.position, spec.tokens)
    _, detail = _point(spec, kind, detail, subject)
    if kind == "feature":
        feature_direction(subject.required_sae, _shares(detail))
    elif kind == "file":
        _file_direction(detail, subject)
    if spec.examples is None:
        counts = [sum(prompt.group == side for prompt in prompts) for side in study.prompts.sides]
        if kind in ("difference", "probe"):
            check_folds(study.policy.folds, min(counts))


def check_group(group: str | None, known: Iterable[str | None]) -> None:
    """Raise a UserError where a concept's mean is over a group that no prompt or example is of."""
    known = set(known)
    if group is not None and group not in known:
        rule, fix = "one of " + ", ".join(sorted(map(str, known))), "set its concept's group"
        raise UserError("nothing is in this group", value=group, rule=rule, fix=fix)


def load_answers(file: Path, study: Study, prompts: PromptSet, progress: Progress) -> ExampleSet:
    """Read examples that are neither examples nor prompts of the study.

    Raises
    ------
    UserError
        Some are, and ``examples.drop_overlap`` does not leave them out.
    """
    drop = study.examples.drop_overlap
    rows = load_examples(file)
    scored = load_examples(study.examples.path, study.examples.kind, turns=study.examples.turns)
    rows, of_examples = drop_shared(rows, scored, drop)
    rows, of_prompts = drop_overlap(rows, prompts, drop)
    if gone := [*of_examples, *(example for example, _ in of_prompts)]:
        progress.note(f"examples left out, overlap: {len(gone)}: {', '.join(gone)}")
    return rows


def read_examples(
    study: Study,
    subject: Subject,
    rows: ExampleSet,
    sides: tuple[str, str],
    tokens: str,
    points: Sequence[Point],
    progress: Progress,
) -> tuple[Floats, Bools]:
    """Pooled h [points, N, D] of labelled examples at their responses, which are positive.

    Parameters
    ----------
    sides : labels of the examples with the behavior and without
    tokens : one of :data:`taught.features.concept.PAIR_POSITIONS`

    Raises
    ------
    UserError
        A row has another label, or all have one; a response is empty, or cut off at ``examples.max_tokens``.
    """
    others = [row.id for row in rows if row.label not in sides]
    if others or {row.label for row in rows} != set(sides):
        raise UserError(
            "the examples are not labelled in two",
            value=name_ids(others) or f"{len(rows)} rows",
            rule=f"every row is labelled {sides[0]} or {sides[1]}, and both occur",
            fix="set positive and negative of the concept, or correct the column label",
        )
    encoded, _ = subject.chat.encode_examples(rows.examples, study.examples.max_tokens, False)
    reads = response_reads([e.example() for e in encoded], tokens)
    progress.step("read examples", len(reads))
    H = read_vectors(subject.loaded.model, reads, points, partial(pool, how=tokens), progress=progress)
    label = {row.id: row.label for row in rows}
    return H.numpy(), np.array([label[read.id] == sides[0] for read in reads])


def _direction(
    study: Study, subject: Subject, spec: ConceptSpec, source: tuple[str, str], X: Floats, positive: Any
) -> tuple[Floats, dict[str, Any], dict[str, Any]]:
    """Direction [D], quality card, and what it was made from."""
    kind, detail = source
    if kind in ("difference", "probe"):
        method = _method(spec, kind)
        how = {"method": method, **({"penalty": spec.penalty} if kind == "probe" else {})}
        fitted = fitted_direction(X, positive, method, penalty=spec.penalty, force=spec.force, **_draws(study))
        return *fitted, {**how, **_draws(study)}
    if kind == "feature":
        shares = _shares(detail)
        v, named = feature_direction(subject.required_sae, shares), {str(k): share for k, share in shares.items()}
        origin: dict[str, Any] = {"features": named, "sae": subject.required_sae.sha256()}
    else:
        v, origin = _file_direction(detail, subject)
    card = quality_card(v, X, positive, bootstrap=study.policy.bootstrap, seed=study.policy.seed)
    return v, card, origin


def _file_direction(detail: str, subject: Subject) -> tuple[Floats, dict[str, Any]]:
    v, origin = file_direction(*_file_parts(detail))
    if len(v) != subject.width:
        raise UserError(
            "the direction does not fit the model",
            value=f"width {len(v)}",
            rule=f"width {subject.width}",
            fix="use a direction that was made on this model",
        )
    return v, origin


def _method(spec: ConceptSpec, kind: str) -> str:
    return spec.method if kind == "probe" else "difference"


def _draws(study: Study) -> dict[str, int]:
    return {"folds": study.policy.folds, "bootstrap": study.policy.bootstrap, "seed": study.policy.seed}


def _shares(detail: str) -> dict[int, float]:
    """Shares of features from ``ID`` or ``ID=SHARE,ID=SHARE``."""
    try:
        parts = [part.partition("=") for part in detail.split(",")]
        shares = {int(k): float(share) if sign else 1.0 for k, sign, share in parts}
        if len(shares) != len(parts):
            raise ValueError
        return shares
    except ValueError:
        raise UserError(
            "the features of the concept are not readable",
            value=detail,
            rule="feature:ID or feature:ID=SHARE,ID=SHARE, each id once",
            fix="for example source: feature:12=0.5,40=-1",
        ) from None


def _file_parts(detail: str) -> tuple[str, str | None]:
    """Path and tensor of ``PATH`` or ``PATH:TENSOR``; a path may hold a colon itself."""
    path, _, tensor = detail.rpartition(":")
    if path and not Path(detail).expanduser().exists():
        return path, tensor
    return detail, None
