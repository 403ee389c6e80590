"""The command ``concept-influence``: what training on each example does to concepts, by method."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial, reduce
from itertools import combinations
from pathlib import Path
from typing import Any, Literal, NamedTuple, TypeVar

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from taught.baselines.activations import project, response_reads
from taught.core.example import Example
from taught.core.target import Target, concept_targets
from taught.errors import UserError
from taught.estimators.adjoint import Problem
from taught.estimators.concepts import concept_effects
from taught.estimators.token_shares import token_effects
from taught.features.concept import Concept, ConceptMap, concept_map, load_concept
from taught.model.forward import find_blocks
from taught.model.readout import ReadPrompt, check_trees
from taught.progress import Progress, SilentProgress
from taught.run.fingerprint import fingerprint
from taught.run.folder import RunFolder
from taught.sketches.estimator import sketched_concepts
from taught.stages.estimating import (
    Data,
    encode_examples,
    make_problem,
    over_checkpoints,
    read_data,
    sketch_source,
    token_texts,
    with_curvature,
)
from taught.stages.own_responses import own_examples
from taught.stages.subject import (
    Subject,
    example_inputs,
    open_checkpoint,
    open_subject,
    prompt_inputs,
    refuse_combinations,
)
from taught.stats.ranks import spearman_interval
from taught.study.methods import Checkpoint
from taught.study.schema import Study

T = TypeVar("T")
SCHEMA = pa.schema(
    [
        ("example_id", pa.string()),
        ("concept", pa.string()),
        ("method", pa.string()),
        ("value", pa.float64()),
        ("se", pa.float64()),
    ]
)
TOKENS = pa.schema(
    [
        ("example_id", pa.string()),
        ("concept", pa.string()),
        ("position", pa.int64()),
        ("token", pa.string()),
        ("share", pa.float64()),
    ]
)


@dataclass(frozen=True)
class ConceptQuestion:
    """What is asked of every example.

    Attributes
    ----------
    concepts : folders that ``taught concept`` wrote
    methods : some of METHODS
    group : the gradient's mean is over the prompts of this group; None: over all
    read : what the gradient's mean is over: the evaluation "prompts", or the "responses" of the
        examples themselves (group is a label then)
    checkpoint : fine-tuned model (or adapter) for projection-difference-training
    responses : file of the model's own answers for projection-difference-response
    max_new_tokens : length of an own answer
    tokens : so many examples with the largest absolute gradient value are split into their tokens
    """

    concepts: tuple[Path, ...]
    methods: tuple[str, ...] = ("gradient", "vector-filter")
    group: str | None = None
    checkpoint: str | None = None
    responses: Path = Path("own_responses.json")
    max_new_tokens: int = 128
    tokens: int = 0
    read: Literal["prompts", "responses"] = "prompts"


class ConceptAnswers(NamedTuple):
    """Tables in long form (docs/formats.md); ``tokens`` has no rows unless they were asked for."""

    table: pa.Table
    tokens: pa.Table


class Place(NamedTuple):
    """Where concepts are read: one pass serves all that are read at one place."""

    block: int
    where: str


@dataclass(frozen=True, eq=False)
class _Work:
    """The examples and prompts, and what methods leave.

    Attributes
    ----------
    base : read-outs of the base model, once a place
    shares : of the tokens of the strongest examples
    errors : target -> standard errors [P], where the gradient is estimated
    """

    study: Study
    subject: Subject
    data: Data
    inputs: list[Example]
    question: ConceptQuestion
    progress: Progress
    run: RunFolder | None = None
    base: dict[Place, Tensor] = field(default_factory=dict)
    shares: list[pa.Table] = field(default_factory=list)
    errors: dict[str, np.ndarray] = field(default_factory=dict)

    def map_of(self, concepts: Sequence[Concept], place: Place) -> ConceptMap:
        """The read-out of some concepts of one place."""
        like = next(self.subject.loaded.model.parameters())
        return concept_map(concepts, place.where, like)

    def read(self, model: Any, examples: Sequence[Example], concepts: Sequence[Concept], place: Place) -> Tensor:
        """Projections [P, C] of examples by one model."""
        return project(
            model,
            examples,
            self.map_of(concepts, place),
            place.block,
            batch_tokens=self.study.attribution.batch_tokens,
            progress=self.progress,
        )

    def over_checkpoints(self, problem: Problem, compute: Callable[[Problem, int], T]) -> Iterator[T]:
        """What is computed at each checkpoint, or at the model's weights."""
        return over_checkpoints(self.study, self.subject, problem, self.inputs, self.progress, compute)


def concept_influence(
    study: Study, question: ConceptQuestion, progress: Progress | None = None, run: RunFolder | None = None
) -> ConceptAnswers:
    """Value of every example for every concept by every method; positive: towards the concept.

    Parameters
    ----------
    run
        A run folder of the study with scored examples, to keep the answers in.

    Raises
    ------
    UserError
        A concept does not fit the model, two have one name; a method lacks what it needs; examples
        overlap the prompts, are truncated or have no finite value; the run folder is of another
        study.
    """
    progress = progress or SilentProgress()
    concepts = _load(question)
    _refuse(study, question)
    data = read_data(study, progress)
    progress.step("load model and SAE")
    subject = open_subject(study)
    if run is None:
        return _answers(study, question, concepts, subject, data, progress, run)
    asked = {"concept-influence": fingerprint(_asked(question, concepts))}
    with run.stage("concept-influence", study, {**subject.identity, **asked}):
        answers = _answers(study, question, concepts, subject, data, progress, run)
        run.write_table("concept_influence", answers.table)
        run.write_table("concept_agreement", agreement(answers.table))
        run.write_table("concept_tokens", answers.tokens)
        run.write_json("concept_influence", _record(study, question, concepts))
    return answers


def _answers(
    study: Study,
    question: ConceptQuestion,
    concepts: Sequence[Concept],
    subject: Subject,
    data: Data,
    progress: Progress,
    run: RunFolder | None,
) -> ConceptAnswers:
    model = subject.loaded.model
    for concept in concepts:
        concept.require_fit(width=subject.sae.width, blocks=len(find_blocks(model)), weights=subject.loaded.weights)
    encoded, truncated = encode_examples(study, subject, data)
    for kind, ids in (("overlap", data.overlapping), ("truncated", truncated)):
        if ids:
            progress.note(f"left out, {kind}: {len(ids)} examples: {', '.join(ids)}")
    check_trees(model, _prompts(subject, data, study.readout.position), subject.behavior)
    work = _Work(study, subject, data, example_inputs(encoded), question, progress, run)
    parts = [
        _long(work, concept.name, method, values[:, column].numpy())
        for method in question.methods
        for some, values in METHODS[method](work, concepts)
        for column, concept in enumerate(some)
    ]
    return ConceptAnswers(pa.concat_tables(parts), pa.concat_tables([TOKENS.empty_table(), *work.shares]))


def _asked(question: ConceptQuestion, concepts: Sequence[Concept]) -> dict[str, Any]:
    """What the answers depend on beside the study: by content, wherever it lies."""
    options = {k: v for k, v in asdict(question).items() if k not in ("concepts", "responses")}
    return options | {f"concept {c.name}": [c.direction.tolist(), c.block, c.position, c.tokens] for c in concepts}


def _record(study: Study, question: ConceptQuestion, concepts: Sequence[Concept]) -> dict[str, Any]:
    """What was asked, and of which concepts."""
    fields = ("name", "block", "position", "tokens", "weights", "provenance", "card")
    return {
        "methods": list(question.methods),
        "group": question.group,
        "read": question.read,
        "checkpoint": question.checkpoint,
        "lr": study.attribution.lr,
        "concepts": [{field: getattr(concept, field) for field in fields} for concept in concepts],
    }


def agreement(table: pa.Table) -> pa.Table:
    """Rank correlation over examples between each two methods, for each concept.

    With its 95% interval; null where a method gives all examples one value. Methods that rank the
    examples of a run differently measure different things (docs/methods.md).
    """
    values: dict[str, dict[str, dict[str, float]]] = {}
    for row in table.to_pylist():
        of_method = values.setdefault(row["concept"], {}).setdefault(row["method"], {})
        of_method[row["example_id"]] = row["value"]
    rows = [
        {"concept": concept, "method": a, "other": b, **_correlation(x, y)}
        for concept, methods in values.items()
        for (a, x), (b, y) in combinations(methods.items(), 2)
    ]
    return pa.Table.from_pylist(rows, schema=_AGREEMENT)


def _correlation(x: Mapping[str, float], y: Mapping[str, float]) -> dict[str, float]:
    found = spearman_interval(list(x.values()), [y[example_id] for example_id in x])
    if found is None:
        return {}
    return {"rank_correlation": found.value, "lo": found.lo, "hi": found.hi}


_AGREEMENT = pa.schema(
    [
        ("concept", pa.string()),
        ("method", pa.string()),
        ("other", pa.string()),
        ("rank_correlation", pa.float64()),
        ("lo", pa.float64()),
        ("hi", pa.float64()),
    ]
)


def _load(question: ConceptQuestion) -> list[Concept]:
    concepts = [load_concept(folder) for folder in question.concepts]
    names = [concept.name for concept in concepts]
    if not names or len(set(names)) < len(names):
        raise UserError(
            "concepts are told apart by their names",
            value=names,
            rule="one concept at least, each name once",
            fix="taught concept ... --name gives another one",
        )
    return concepts


def _refuse(study: Study, question: ConceptQuestion) -> None:
    """Say what cannot be done before the model is loaded."""
    unknown = [method for method in question.methods if method not in METHODS]
    if unknown or len(set(question.methods)) < len(question.methods) or not question.methods:
        raise UserError(
            "no such method, or one twice",
            value=list(question.methods),
            rule="some of " + ", ".join(METHODS),
            fix="set --method",
        )
    if "projection-difference-training" in question.methods and question.checkpoint is None:
        raise UserError(
            "the difference that training made needs a fine-tuned model",
            rule="activations of the fine-tuned model minus those of the base model",
            fix="pass --checkpoint FOLDER",
        )
    if question.tokens < 0:
        raise UserError(
            "how many examples are split into tokens",
            value=question.tokens,
            rule="a whole number, at least 0",
            fix="set --tokens",
        )
    if question.tokens and ("gradient" not in question.methods or study.attribution.estimator.kind == "finite-step"):
        raise UserError(
            "shares of tokens are parts of a gradient",
            value=f"{', '.join(question.methods)}; {study.attribution.estimator.kind}",
            rule="the method gradient, by adjoint, forward or sketch",
            fix="leave out --tokens, or add --method gradient",
        )
    if "gradient" in question.methods:
        refuse_combinations(study)


Values = Iterator[tuple[list[Concept], Tensor]]


def _places(concepts: Sequence[Concept], where: str) -> dict[Place, list[Concept]]:
    """Concepts that can be read together; ``where``: position (of prompts) or tokens (of examples)."""
    places: dict[Place, list[Concept]] = {}
    for concept in concepts:
        places.setdefault(Place(concept.block, getattr(concept, where)), []).append(concept)
    return places


def _gradient(work: _Work, concepts: Sequence[Concept]) -> Values:
    study, inside = work.study, _inside(work)
    responses = work.question.read == "responses"
    metric: Problem | None = None
    for place, some in _places(concepts, "tokens" if responses else "position").items():
        prompts = (
            response_reads(work.inputs, place.where) if responses else _prompts(work.subject, work.data, place.where)
        )
        problem = make_problem(study, work.subject, prompts, place.block, work.map_of(some, place))
        targets = concept_targets([p.id for p in prompts], [c.name for c in some], inside)
        if study.attribution.trajectory.kind == "base":  # one metric for all places, and for the shares
            metric = metric or with_curvature(study, problem, work.inputs, work.progress)
            problem = replace(metric, prompts=prompts, block=place.block, features=problem.features)
        work.progress.step("gradients of the concepts and of the examples")
        compute = partial(_sketched if study.attribution.estimator.kind == "sketch" else _effects, work, targets)
        values = reduce(torch.add, work.over_checkpoints(problem, compute))
        if work.question.tokens:
            work.shares.extend(_shares(work, problem, targets, some, values))
        yield some, values


def _effects(work: _Work, targets: Sequence[Target], problem: Problem, _: int) -> Tensor:
    return concept_effects(problem, work.inputs, targets, work.study.attribution.estimator.kind, progress=work.progress)


def _sketched(work: _Work, targets: Sequence[Target], problem: Problem, _: int) -> Tensor:
    source = sketch_source(work.study, work.run, work.subject)
    values, errors = sketched_concepts(problem, work.inputs, targets, source=source, progress=work.progress)
    work.errors.update(zip((target.name for target in targets), errors.T, strict=True))
    return torch.from_numpy(values)


def _shares(
    work: _Work, problem: Problem, targets: Sequence[Target], concepts: Sequence[Concept], values: Tensor
) -> Iterator[pa.Table]:
    """Shares of the response tokens of each concept's examples with the largest absolute values."""
    order = values.abs().argsort(dim=0, descending=True, stable=True)[: work.question.tokens]
    chosen = [[work.inputs[i] for i in column] for column in order.T.tolist()]
    A = [torch.from_numpy(target.A)[None] for target in targets if target.A is not None]

    def shares(there: Problem, _: int) -> list[list[Tensor]]:
        return [token_effects(there, examples, a, None) for examples, a in zip(chosen, A, strict=True)]

    by_concept = zip(*work.over_checkpoints(problem, shares), strict=True)
    for concept, examples, parts in zip(concepts, chosen, by_concept, strict=True):
        for example, *own in zip(examples, *parts, strict=True):
            n = example.n_scored
            columns = [
                [example.id] * n,
                [concept.name] * n,
                range(n),
                token_texts(work.subject, example),
                torch.stack(own).sum(0)[:, 0].numpy(),
            ]
            yield pa.table(dict(zip(TOKENS.names, columns, strict=True)), schema=TOKENS)


def _prompts(subject: Subject, data: Data, position: str) -> list[ReadPrompt]:
    return prompt_inputs(subject.encode(data.prompts), position)


def _inside(work: _Work) -> np.ndarray:
    """bool [N]: the prompts, or the examples, that the mean is over."""
    group = work.question.group
    groups = [prompt.group for prompt in work.data.prompts]
    if work.question.read == "responses":
        label = {example.id: example.label for example in work.data.examples}
        groups = [label[example.id] for example in work.inputs]
    if group is not None and group not in groups:
        raise UserError(
            "nothing is in this group", value=group, rule="one of " + ", ".join(sorted(set(groups))), fix="set --group"
        )
    return np.array([group in (None, name) for name in groups])


def _base(work: _Work, some: Sequence[Concept], place: Place) -> Tensor:
    if place not in work.base:
        work.progress.step("activations of the examples", len(work.inputs))
        work.base[place] = work.read(work.subject.loaded.model, work.inputs, some, place)
    return work.base[place]


def _vector_filter(work: _Work, concepts: Sequence[Concept]) -> Values:
    for place, some in _places(concepts, "tokens").items():
        yield some, _base(work, some, place)


def _difference_response(work: _Work, concepts: Sequence[Concept]) -> Values:
    own = own_examples(
        work.study, work.subject, work.inputs, work.question.responses, work.question.max_new_tokens, work.progress
    )
    for place, some in _places(concepts, "tokens").items():
        # Read together, an example and the model's own response share the tokens of their prompt.
        both = own if place in work.base else [*work.inputs, *own]
        work.progress.step("activations of the model's own responses", len(both))
        read = work.read(work.subject.loaded.model, both, some, place)
        work.base.setdefault(place, read[: -len(own)])
        yield some, work.base[place] - read[-len(own) :]


def _difference_training(work: _Work, concepts: Sequence[Concept]) -> Values:
    assert work.question.checkpoint is not None
    tuned = Checkpoint(work.question.checkpoint, work.study.attribution.lr)
    model = open_checkpoint(work.study, tuned, work.subject)
    for place, some in _places(concepts, "tokens").items():
        work.progress.step("activations of the fine-tuned model", len(work.inputs))
        after = work.read(model, work.inputs, some, place)
        yield some, after - _base(work, some, place)


METHODS: dict[str, Callable[[_Work, Sequence[Concept]], Values]] = {
    "gradient": _gradient,
    "vector-filter": _vector_filter,
    "projection-difference-response": _difference_response,
    "projection-difference-training": _difference_training,
}


def _long(work: _Work, concept: str, method: str, values: np.ndarray) -> pa.Table:
    ids = [example.id for example in work.inputs]
    n = len(ids)
    errors = work.errors.get(f"concept:{concept}") if method == "gradient" else None
    columns = [ids, [concept] * n, [method] * n, values, [None] * n if errors is None else errors]
    return pa.table(dict(zip(SCHEMA.names, columns, strict=True)), schema=SCHEMA)
