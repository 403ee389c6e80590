"""What ``attribute`` and ``sketch`` share: from a study and its policy to effects."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

<<<<<<< HEAD
from taught.core.behavior import behavior_record
=======
from taught.core import registry
>>>>>>> study
from taught.core.example import Example, example_losses
from taught.curvatures.adam import with_adam
from taught.curvatures.ekfac import with_ekfac
from taught.data.chat import EncodedExample
from taught.data.columns import columns_note
from taught.data.examples import ExampleSet
from taught.data.prompts import PromptSet
from taught.errors import UserError
from taught.estimators.adjoint import Problem
from taught.estimators.estimate import ESTIMATORS, Effects, exact_details, step_checks, strongest_shares
from taught.features.concept import ConceptMap
from taught.features.pooling import FeatureMap
from taught.model.parameters import moving_parameters
from taught.model.readout import ReadPrompt
from taught.policy.ridge import Policy, fit_policy
from taught.progress import Progress
from taught.run.folder import RunFolder
from taught.run.pieces import Pieces
from taught.sketches.answer import SketchError
from taught.sketches.estimator import SketchSource, sketch_effects
from taught.sketches.fill import example_row, prompt_key
from taught.sketches.project import Projection
from taught.sketches.store import SketchStore
from taught.stages.subject import Subject, example_inputs, open_checkpoint, prompt_inputs, study_examples, study_prompts
from taught.study.methods import made
from taught.study.schema import Study
from taught.trajectories.checkpoints import NumberedPieces, at_checkpoint, summed

Checks = dict[str, dict[str, float]]
Shares = list[tuple[Example, NDArray[np.float64]]]
T = TypeVar("T")
# The others also take models whose gradients they do not know.
_BY_GRADIENTS = ("adjoint", "sketch")


@dataclass(frozen=True, eq=False)
class Data:
    """Prompts and examples of a study, and the ids of examples that were left out for overlap."""

    prompts: PromptSet
    examples: ExampleSet
    overlapping: list[str]


@dataclass(frozen=True, eq=False)
class Ready:
    """What an estimator is given, and the examples that it is about, as they were read."""

    examples: ExampleSet
    encoded: list[EncodedExample]
    truncated: list[str]
    fitted: Policy
    groups: dict[str, list[str]]
    problem: Problem
    inputs: list[Example]


def read_data(study: Study, progress: Progress) -> Data:
    """Read the study's files."""
    prompts = study_prompts(study)
    examples, overlapping = study_examples(study, prompts)
    progress.note(columns_note(study.examples.path, examples.columns))
    return Data(prompts, examples, overlapping)


def prepare(study: Study, run: RunFolder, subject: Subject, data: Data) -> Ready:
    """Tokens of the examples, the policy of the run, and the problem that estimators work on.

    Raises
    ------
    UserError
        No example is left; examples are truncated; the run's files do not belong together.
    """
    encoded, truncated = encode_examples(study, subject, data)
    kept = {example.id for example in encoded}
    examples = replace(data.examples, examples=tuple(example for example in data.examples if example.id in kept))
    fitted, groups = read_policy(study, run)
    prompts = {e.id: e for e in subject.encode(data.prompts)}
    ordered = [prompts[prompt_id] for prompt_id in fitted.prompt_ids]
    features = subject.features(fitted.feature_ids.copy(), study)
    problem = make_problem(study, subject, prompt_inputs(ordered, study.readout.position), subject.sae.block, features)
    return Ready(examples, encoded, truncated, fitted, groups, problem, example_inputs(encoded))


def encode_examples(study: Study, subject: Subject, data: Data) -> tuple[list[EncodedExample], list[str]]:
    """Tokens of the examples that can be scored, and the ids of those that are truncated.

    Raises
    ------
    UserError
        No example is left; examples are truncated, and the study does not leave those out.
    """
    encoded, truncated = subject.chat.encode_examples(
        data.examples, study.examples.max_tokens, study.examples.drop_truncated
    )
    if not encoded:
        raise UserError(
            "no example is left to be scored",
            value=f"{len(data.overlapping)} overlap the prompts, {len(truncated)} are truncated",
            rule="at least one example is kept",
            fix="use other examples or prompts, or raise examples.max_tokens",
        )
    return encoded, truncated


def estimate(
    study: Study, run: RunFolder, subject: Subject, ready: Ready, progress: Progress, pieces: Pieces
) -> tuple[Effects, Checks, Shares]:
    """Effects by the study's estimator; steps, refits and token shares of the strongest examples."""
    spec = study.attribution
    compute: Callable[..., Effects]
    name = spec.estimator.kind
    if name == "sketch":
        compute = partial(sketch_effects, source=sketch_source(study, run, subject))
    else:
        compute = partial(ESTIMATORS[name], coefficients=wants_coefficients(study))
    compute = partial(compute, examples=ready.inputs, policy=ready.fitted, groups=ready.groups, progress=progress)
    if spec.trajectory.kind == "checkpoints":
        return _over_checkpoints(study, subject, ready, compute, progress, pieces), {}, []
    problem = with_curvature(study, ready.problem, ready.inputs, progress)
    effects = compute(problem, pieces=pieces)
    checks = step_checks(problem, ready.inputs, ready.fitted, effects, spec.exact_top, progress=progress, pieces=pieces)
    if effects.error is not None:
        effects, exact = exact_details(
            problem, ready.inputs, ready.fitted, effects, spec.exact_top, progress=progress, pieces=pieces
        )
        checks = {i: {**found, **exact[i]} for i, found in checks.items()}
    top = spec.exact_top if spec.estimator.kind in _BY_GRADIENTS else 0
    shares = strongest_shares(problem, ready.inputs, ready.fitted, ready.groups, effects, top, progress=progress)
    return effects, checks, shares


def sketch_source(study: Study, run: RunFolder | None, subject: Subject) -> SketchSource:
    """The study's store of sketches and its projection; a store of other conditions is refused.

    Raises
    ------
    UserError
        There is neither ``attribution.estimator.store`` nor a run folder to keep it in; other conditions.
    """
    spec, model = made(study.attribution.estimator, registry.ESTIMATORS), subject.loaded.model
    folder = spec.store or (None if run is None else run.path("sketches"))
    if folder is None:
        raise UserError(
            "sketches have no place to be kept",
            rule="attribution.estimator.store, or a run folder",
            fix="pass --run RUN, or --set attribution.estimator.store=FOLDER",
        )
    projection = Projection(model, spec.size, spec.seed)
    identity = {
        **subject.identity,
        "model.dtype": study.model.dtype,
        "parameters": list(subject.moving(study) or ()),
        "sae.block": subject.sae.block,
        "sae.encoder": study.sae.encoder,
        "readout.position": study.readout.position,
        "behavior": behavior_record(subject.behavior),
        **projection.record(),
    }
    store = SketchStore(folder, identity)
    return SketchSource(store, projection, spec.sample)


def sketch_record(study: Study, run: RunFolder, ready: Ready, error: SketchError) -> dict[str, Any]:
    """What a later question to the store needs: which rows are this run's, and the error."""
    return {
        "store": str(study.attribution.estimator.values.get("store") or run.path("sketches").resolve()),
        "lr": study.attribution.lr,
        "error_factor": error.factor,
        "sample": list(error.sample),
        "prompts": dict(prompt_key(prompt) for prompt in ready.problem.prompts),
        "examples": {example.id: example_row(example).digest for example in ready.inputs},
    }


def wants_coefficients(study: Study) -> bool:
    """Whether the study asks for the coefficients of the policy."""
    targets = study.attribution.targets
    return targets is None or any(name.startswith("coefficient:") for name in targets)


def token_texts(subject: Subject, example: Example) -> list[str]:
    """Each response token as text."""
    decode = subject.loaded.tokenizer.decode
    return [str(decode([example.sequences[s][t]])) for s, t in example.scored]


def read_policy(study: Study, run: RunFolder) -> tuple[Policy, dict[str, list[str]]]:
    """The fitted policy from the run folder, and the prompt ids of each group."""
    arrays, ids = run.read_tensors("activations")
    readouts, reads = run.read_tensors("readouts")
    if reads["prompt_ids"] != ids["prompt_ids"]:
        raise UserError("activations and read-outs are of different prompts", fix="run policy again, --fresh")
    record = run.read_json("policy")
    fitted = fit_policy(
        arrays["X"],
        readouts["y"],
        prompt_ids=ids["prompt_ids"],
        feature_ids=ids["feature_ids"],
        alpha=record["alpha"],
        fit_intercept=record["intercept"],
    )
    groups: dict[str, list[str]] = {}
    for row in run.read_table("prompts").select(["prompt_id", "group"]).to_pylist():
        groups.setdefault(row["group"], []).append(row["prompt_id"])
    return fitted, groups


def make_problem(
    study: Study, subject: Subject, prompts: Sequence[ReadPrompt], block: int, features: FeatureMap | ConceptMap
) -> Problem:
    """The study's problem for these prompts, read after this block."""
    return Problem(
        subject.loaded.model,
        prompts,
        subject.behavior,
        block,
        features,
        study.attribution.lr,
        study.attribution.batch_tokens,
        study.attribution.memory_gb,
        subject.moving(study),
        checkpointing=study.attribution.checkpointing,
    )


def with_curvature(study: Study, problem: Problem, examples: Sequence[Example], progress: Progress) -> Problem:
    """The problem in the study's metric, of its optimizer or of the loss; left in one it has."""
    spec = study.attribution
    if spec.curvature.kind == "identity" or problem.scale is not None:
        return problem
    metric: Any = made(spec.curvature, registry.CURVATURES)
    if spec.curvature.kind == "ekfac":
        progress.step("curvature of the loss", 2 * len(examples))
        curved = with_ekfac(problem, examples, damping=metric.damping, progress=progress)
        moving = moving_parameters(problem.model, problem.parameters)
        layers = len(curved.parameters or ())
        progress.note(
            f"EK-FAC: {layers} linear layers of the blocks move, "
            f"{len(moving) - layers} other tensors have no curvature and do not"
        )
        return curved
    if metric.moments is None:
        progress.step("second moments of the gradients", len(examples))
    return with_adam(problem, examples, moments=metric.moments, eps=metric.eps, batch=metric.batch, progress=progress)


def over_checkpoints(
    study: Study,
    subject: Subject,
    problem: Problem,
    examples: Sequence[Example],
    progress: Progress,
    compute: Callable[[Problem, int], T],
) -> Iterator[T]:
    """What is computed at the model's weights, or at each checkpoint; effects add up over them.

    One checkpoint's model is held at a time, beside the base one: ``compute``, which is given the
    problem in the study's metric and the checkpoint's number, keeps nothing of it.
    """
    trajectory = study.attribution.trajectory
    checkpoints = trajectory.values["checkpoints"] if trajectory.kind == "checkpoints" else None
    if checkpoints is None:
        yield compute(with_curvature(study, problem, examples, progress), 0)
    for number, checkpoint in enumerate(checkpoints or ()):
        progress.step(f"checkpoint {number + 1} of {len(checkpoints or ())}")
        there = at_checkpoint(problem, open_checkpoint(study, checkpoint, subject), checkpoint.lr)
        there = with_curvature(study, there, examples, progress)
        found = compute(there, number)
        del there
        yield found


def _over_checkpoints(
    study: Study, subject: Subject, ready: Ready, compute: Callable[..., Effects], progress: Progress, pieces: Pieces
) -> Effects:
    """Effects summed over the checkpoints; losses are those of the base model."""
    effects = summed(
        over_checkpoints(
            study,
            subject,
            ready.problem,
            ready.inputs,
            progress,
            lambda there, number: compute(there, pieces=NumberedPieces(pieces, number)),
        )
    )
    problem = ready.problem
    losses = example_losses(problem.model, ready.inputs, problem.batch_tokens)
    return replace(effects, losses=losses.numpy())
