"""What the stages that score examples share: from a study and its readings to problems and targets."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import numpy as np

from taught.baselines.activations import response_reads
from taught.core.driver import Method
from taught.core.example import Example
from taught.core.names import TargetName
from taught.core.passes import settle_passes
from taught.core.point import Point
from taught.core.problem import Problem
from taught.core.readings import Readings
from taught.core.target import TargetSet, kind_of
from taught.data.chat import EncodedExample
from taught.data.columns import columns_note
from taught.data.duplicates import Duplicate, drop_duplicates
from taught.data.examples import ExampleSet
from taught.data.prompts import PromptSet
from taught.errors import UserError
from taught.features.concept import ConceptMap, concept_map
from taught.features.pooling import FeatureMap
from taught.features.sae import check_fit
from taught.model.gradients import find_sites, mixes_examples
from taught.model.readout import ReadPrompt, read_prompts, read_vectors
from taught.policy.ridge import choose_alpha, fit_policy
from taught.progress import Progress
from taught.run.folder import RunFolder
from taught.stages.concepts import Read, check_group
from taught.stages.subject import Subject, open_checkpoint, prompt_inputs, select, study_examples, study_prompts
from taught.study.schema import Study
from taught.training.recipe import Recipe


@dataclass(frozen=True, eq=False)
class Data:
    """Prompts and examples of a study.

    Attributes
    ----------
    overlapping : ids of examples that were left out for overlap with the prompts
    repeating : documents that were left out because they repeat others
    """

    prompts: PromptSet
    examples: ExampleSet
    overlapping: list[str]
    repeating: list[Duplicate] = field(default_factory=list)


@dataclass(frozen=True, eq=False)
class Ready:
    """What an estimator is given, and the examples that it is about, as they were read.

    Attributes
    ----------
    examples, encoded, inputs : the examples that are scored, as records, as tokens, as losses
    truncated : ids of examples that were left out
    readings : of the run, with its policy where it has one
    problem : at the base weights, reading what the policy reads, in the plain metric
    """

    study: Study
    subject: Subject
    data: Data
    examples: ExampleSet
    encoded: list[EncodedExample]
    inputs: list[Example]
    truncated: list[str]
    readings: Readings
    problem: Problem

    @property
    def method(self) -> Method:
        """The study's own."""
        return method_of(self.study)


@dataclass(frozen=True, eq=False)
class Ask:
    """Targets that are read at one place of the model, and the problem that reads there."""

    problem: Problem
    targets: TargetSet


def method_of(study: Study) -> Method:
    """The study's estimator, curvature and trajectory."""
    spec = study.attribution
    return Method(spec.estimator, spec.curvature, spec.trajectory)


def read_data(study: Study, progress: Progress) -> Data:
    """Read the study's files."""
    prompts = study_prompts(study)
    examples, overlapping = study_examples(study, prompts)
    progress.note(columns_note(study.examples.path, examples.columns))
    if examples.sample is not None:
        progress.note(examples.sample.note())
    return without_repeats(study, Data(prompts, examples, overlapping))


def without_repeats(study: Study, data: Data) -> Data:
    """The same data without documents that repeat others, if the study says so."""
    if not study.examples.drop_duplicates:
        return data
    examples, repeating = drop_duplicates(data.examples, study.examples.near_duplicate)
    return replace(data, examples=examples, repeating=repeating)


def prepare(study: Study, run: RunFolder, subject: Subject, data: Data, progress: Progress | None = None) -> Ready:
    """Tokens of the examples, the readings of the run, and the problem that estimators work on.

    Raises
    ------
    UserError
        No example is left; examples are truncated; the run's files do not belong together.
    """
    return make_ready(study, subject, data, run_readings(run), progress)


def make_ready(
    study: Study, subject: Subject, data: Data, readings: Readings, progress: Progress | None = None
) -> Ready:
    """Tokens of the examples, and the problem that estimators work on, for given readings."""
    encoded, truncated = encode_examples(study, subject, data)
    examples = data.examples.encoded(encoded)
    prompts = {e.id: e for e in subject.encode(data.prompts)}
    ordered = [prompts[prompt_id] for prompt_id in readings.prompt_ids]
    position, point, features = None, None, None
    if readings.policy is not None:
        position, point = study.readout.position, subject.required_sae.point
        features = subject.features(readings.policy.feature_ids.copy(), study)
    reads = prompt_inputs(ordered, position)
    settle_passes(subject.loaded.model, reads, subject.behavior, [e.example() for e in encoded], progress)
    inputs = subject.inputs(encoded, study.examples.beta)
    problem = make_problem(study, subject, reads, point, features)
    return Ready(study, subject, data, examples, encoded, inputs, truncated, readings, problem)


def encode_examples(study: Study, subject: Subject, data: Data) -> tuple[list[EncodedExample], list[str]]:
    """Tokens of the examples that can be scored, and the ids of those that are truncated.

    Raises
    ------
    UserError
        No example is left; examples are truncated, and the study does not leave those out.
    """
    spec = study.examples
    encoded, truncated = subject.chat.encode_examples(data.examples, spec.max_tokens, spec.drop_truncated)
    if not encoded:
        raise UserError(
            "no example is left to be scored",
            value=f"{len(data.overlapping)} overlap the prompts, {len(truncated)} are truncated",
            rule="at least one example is kept",
            fix="use other examples or prompts, or raise examples.max_tokens",
        )
    return encoded, truncated


def run_readings(run: RunFolder) -> Readings:
    """The readings of a run: behavior, groups, and the policy where there is one."""
    readouts, ids = run.read_tensors("readouts")
    prompts = run.read_table("prompts", ["prompt_id", "group", "category"]).to_pylist()
    base = readings_of(ids["prompt_ids"], readouts["y"], (tuple(row.values()) for row in prompts))
    if "policy.json" not in run.manifest["files"]:
        return base
    arrays, columns = run.read_tensors("activations")
    if columns["prompt_ids"] != ids["prompt_ids"]:
        raise UserError("activations and readings are of different prompts", fix="taught run STUDY --fresh")
    record = run.read_json("policy")
    fit = {"prompt_ids": ids["prompt_ids"], "alpha": record["alpha"], "fit_intercept": record["intercept"]}
    policy = fit_policy(arrays["X"], readouts["y"], feature_ids=columns["feature_ids"], **fit)
    return replace(base, X=policy.X, columns=tuple(columns["feature_ids"]), policy=policy)


def read_here(study: Study, subject: Subject, prompts: PromptSet, progress: Progress) -> Readings:
    """The same without a run: read the prompts now, and with an SAE fit the policy on its features."""
    position, point = (None, None) if subject.sae is None else (study.readout.position, subject.sae.point)
    inputs, model = prompt_inputs(subject.encode(prompts), position), subject.loaded.model
    settle_passes(model, inputs, subject.behavior, progress=progress)
    progress.step("read prompts", len(inputs))
    read = read_prompts(model, inputs, subject.behavior, point)
    base = readings_of(read.prompt_ids, read.y.numpy(), ((p.id, p.group, p.category) for p in prompts))
    if subject.sae is None:
        return base
    check_fit(subject.sae, read.h, study.sae.max_fvu)
    X = subject.features(np.arange(subject.sae.n_features), study)(read.h, read.offsets).double().cpu().numpy()
    chosen = select(study, prompts, X).feature_ids
    return with_policy(study, base, X[:, chosen], chosen, study.policy.alpha)


def with_policy(study: Study, base: Readings, X: np.ndarray, feature_ids: Any, alpha: Any) -> Readings:
    """Readings with the policy fitted on X [N, d]; ``alpha`` "cv" is chosen by the study's folds."""
    spec = study.policy
    fit: dict[str, Any] = {"prompt_ids": base.prompt_ids, "fit_intercept": spec.intercept}
    if alpha == "cv":
        alpha, _ = choose_alpha(X, base.y, folds=spec.folds, seed=spec.seed, **fit)
    policy = fit_policy(X, base.y, feature_ids=feature_ids, alpha=float(alpha), **fit)
    return replace(base, X=policy.X, columns=tuple(policy.feature_ids.tolist()), policy=policy)


def readings_of(prompt_ids: Sequence[str], y: np.ndarray, prompts: Iterable[tuple[str, str, str | None]]) -> Readings:
    """Behavior with groups and categories, of (id, group, category) of each prompt; no policy."""
    groups: dict[str, list[str]] = {}
    categories: dict[str, list[str]] = {}
    for prompt_id, group, category in prompts:
        groups.setdefault(group, []).append(prompt_id)
        if category:
            categories.setdefault(category, []).append(prompt_id)
    categories = {name: own for name, own in categories.items() if name not in groups}
    return Readings(tuple(prompt_ids), y, groups, categories)


def make_problem(
    study: Study,
    subject: Subject,
    prompts: Sequence[ReadPrompt],
    point: Point | None,
    features: FeatureMap | ConceptMap | None,
) -> Problem:
    """The study's problem for these prompts, read at this point.

    Batches are of one example where the model's gradients are to be had one at a time only.
    """
    spec, model, moving = study.attribution, subject.loaded.model, subject.moving(study)
    try:
        alone = mixes_examples(model, find_sites(model, moving))
    except UserError:  # said by the estimators that take gradients
        alone = False
    identity = {
        **subject.identity,
        "model.dtype": study.model.dtype,
        "parameters": list(moving or ()),
        "block": None if subject.sae is None else subject.sae.point.block,
        "sae.encoder": study.sae.encoder,
        "readout.position": study.readout.position,
        "behavior": study.behavior.plain(),
    }
    return Problem(
        model=model,
        prompts=prompts,
        behavior=subject.behavior,
        lr=spec.lr,
        point=point,
        features=features,
        batch_tokens=1 if alone else spec.batch_tokens,
        memory_gb=spec.memory_gb,
        parameters=moving,
        checkpointing=spec.checkpointing,
        opener=partial(open_checkpoint, study, subject),
        identity=identity,
        recipe=Recipe.of(study.validation),
    )


# The change of each prompt by each example, for bins: beyond so many numbers (0.8 GB) only where the study asks for it.
MOST_EFFECTS = 10**8


def wanted_targets(study: Study, readings: Readings, concepts: Iterable[str] = (), examples: int = 0) -> list[str]:
    """Names of the targets that the study asks for, or else of all that the run can answer.

    Bins take the change on every prompt too, where that of so many examples can be kept.
    """
    named = study.attribution.targets
    if named is None:
        own = ["behavior:*"] if readings.policy is None else ["score", "coefficient:*", "behavior:*", "prompt:*"]
        named = (*own, *(["concept:*"] if list(concepts) else []))
    wanted = study.bins is not None and study.bins.questions and "prompt:*" not in named
    return [*named, *(["prompt:*"] if wanted and examples * readings.n <= MOST_EFFECTS else [])]


def asks(
    ready: Ready, wanted: Iterable[str], concepts: Sequence[Read] = (), progress: Progress | None = None
) -> list[Ask]:
    """The targets, gathered by the place at which they are read.

    Raises
    ------
    UserError
        A target that nothing here can answer; a contrast of targets that are read at different places.
    """
    names = [TargetName.parse(name) if isinstance(name, str) else name for name in wanted]
    left = [n for n in names if any(kind_of(p).reads == "concepts" for p in n.parts)]
    others = [name for name in names if name not in left]
    found = [Ask(ready.problem, TargetSet.of(others, ready.readings))] if others else []
    places: dict[tuple[Point, str, str, str | None], list[Read]] = {}
    for read in concepts:
        where = read.concept.tokens if read.over == "responses" else read.concept.position
        places.setdefault((read.concept.point, where, read.over, read.group), []).append(read)
    for (point, where, over, group), some in places.items():
        here = [c.name for c in some]
        own = [n for n in left if all(p.about in (*here, "*") or kind_of(p).reads != "concepts" for p in n.parts)]
        if not own:
            continue
        prompts = _read_at(ready, where, over, group)
        like = next(ready.subject.loaded.model.parameters())
        features = concept_map([read.concept for read in some], where, like)
        problem = make_problem(ready.study, ready.subject, prompts, point, features)
        X = read_vectors(problem.model, prompts, [point], features, progress=progress)[0].numpy()
        of = ready.readings
        known = dict(zip(of.prompt_ids, of.y, strict=True)) if over == "prompts" else {}
        y = np.array([known.get(p.id, np.nan) for p in prompts])
        readings = Readings(tuple(p.id for p in prompts), y, of.groups, of.categories, X, tuple(here))
        found.append(Ask(problem, TargetSet.of(own, readings)))
        left = [n for n in left if n not in own or n.about == "*"]
    left = [n for n in left if n.about != "*"]
    check_answered(left, [c.name for c in concepts])
    return found


def check_answered(left: Sequence[TargetName], concepts: Iterable[str]) -> None:
    """Raise a UserError where targets are left that none of the concepts answers."""
    if left:
        raise UserError(
            "no concept of the study answers this",
            value=", ".join(map(str, left)),
            rule="concepts: " + (", ".join(concepts) or "none"),
            fix="add it under concepts; a contrast is of concepts that are read at one place",
        )


def _read_at(ready: Ready, where: str, over: str, group: str | None) -> list[ReadPrompt]:
    """The prompts, or the examples' responses, that a concept's mean is over."""
    if over == "responses":
        label = {example.id: example.label for example in ready.examples}
        check_group(group, label.values())
        return response_reads([z for z in ready.inputs if group in (None, label[z.id])], where)
    check_group(group, ready.readings.groups)
    inside = {prompt.id for prompt in ready.data.prompts if group in (None, prompt.group)}
    encoded = [e for e in ready.subject.encode(ready.data.prompts) if e.id in inside]
    by_id = {p.id: p for p in prompt_inputs(encoded, where)}
    return [by_id[i] for i in ready.readings.prompt_ids if i in by_id]


def token_texts(subject: Subject, example: Example) -> list[str]:
    """Each scored token as text."""
    decode = subject.loaded.tokenizer.decode
    return [str(decode([example.sequences[s][t]])) for s, t in example.scored]
