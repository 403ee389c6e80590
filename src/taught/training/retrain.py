"""Retraining: train on a subset of the examples from the base weights, read the prompts again.

Every retraining begins at the same weights and puts them back to the bit. Finished ones are kept in
a folder under a key that is a digest of all that they depend on, and are never made twice.
"""

from __future__ import annotations

import hashlib
import math
import os
import shutil
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, fields, replace
from pathlib import Path
from tempfile import mkdtemp
from typing import Any

import numpy as np
import torch

import taught
from taught.core.behavior import behavior_record
from taught.core.example import Examples, example_losses
from taught.core.problem import Problem
from taught.data.columns import name_ids
from taught.errors import UserError, refuse
from taught.features.pooling import FeatureMap
from taught.model.generate import greedy
from taught.model.gradients import evaluating
from taught.model.readout import read_prompts
from taught.progress import Progress
from taught.run import files
from taught.run.fingerprint import differences, fingerprint
from taught.sketches.store import example_digest
from taught.stats.arrays import Floats
from taught.training.loop import TrainLog, in_training, train
from taught.training.recipe import Recipe
from taught.training.trl import train_by_trl
from taught.training.unlearn import GUARDED, Forgetting, loss_guard, prompt_guard, unlearned

NAME, FORMAT = "retrained.json", 1

# The sources that a retraining's numbers come from. Others may change without its being made again:
# a retraining takes long, and reports, estimators and stages have no part in it.
_COMPUTING = (
    "estimators/finite_step.py",
    "behaviors/answer.py",
    "behaviors/choice.py",
    "behaviors/loss.py",
    "behaviors/prefixes.py",
    "core/behavior.py",
    "core/example.py",
    "core/point.py",
    "features/pooling.py",
    "features/sae.py",
    "features/sae_config.py",
    "model/adapter.py",
    "model/forward.py",
    "model/generate.py",
    "model/gradients.py",
    "model/kernels.py",
    "model/layout.py",
    "model/load.py",
    "model/parameters.py",
    "model/points.py",
    "model/quantised.py",
    "model/readout.py",
    "model/tokens.py",
    "training/trl.py",
    "training/retrain.py",
    "training/loop.py",
    "training/recipe.py",
    "training/unlearn.py",
)


@dataclass(frozen=True, eq=False, kw_only=True)
class Retraining:
    """What the model is after training on some of the examples.

    Attributes
    ----------
    key : what names it in its folder
    ids : ids of the examples that were asked for, sorted; none for the base model
    kept : ids of the examples that the trainer has seen, sorted; the same, or it is an error
    seed : of the order of the examples; None for the base model
    prompt_ids, feature_ids : of the rows of X and y, of the columns of X
    y : float64 [N], behavior, natural logarithm
    X : float64 [N, d], activations, encoded at the retrained weights
    losses_before, losses_after : float64, of ``ids``, natural logarithm
    answers : the model's own answers to the prompts, as tokens, in their order; or None
    log : the steps, or None for the base model and where examples were forgotten
    seconds_training, seconds_reading : of the wall clock; losses count as reading
    forgetting : what unlearning did, where ``ids`` were forgotten and not trained on; ``kept`` are those of its steps
    """

    key: str
    ids: tuple[str, ...] = ()
    kept: tuple[str, ...] = ()
    seed: int | None = None
    prompt_ids: tuple[str, ...]
    feature_ids: tuple[int, ...]
    y: Floats
    X: Floats
    losses_before: Floats = field(default_factory=lambda: np.zeros(0))
    losses_after: Floats = field(default_factory=lambda: np.zeros(0))
    answers: tuple[tuple[int, ...], ...] | None
    log: TrainLog | None = None
    seconds_training: float = 0.0
    seconds_reading: float
    forgetting: Forgetting | None = None


@dataclass(frozen=True)
class Answering:
    """How the model's own answers are taken: greedily, nothing is drawn.

    Attributes
    ----------
    limit : tokens an answer may have
    ends : tokens that end an answer
    """

    limit: int
    ends: tuple[int, ...]


@dataclass(frozen=True)
class Unlearn:
    """How examples are forgotten, besides what the recipe says (``taught.training.unlearn``).

    Attributes
    ----------
    steps, lr : at most so many, and the first rate
    guard : ids of prompts on which the model must stay what it is; None: the loss of what is retained
    keep : the share of the guard that must be left
    """

    steps: int
    lr: float
    guard: tuple[str, ...] | None = None
    keep: float = 0.9


class Retrainer:
    """Retrains one model on subsets of its examples, by one recipe.

    Parameters
    ----------
    problem : the model, prompts, behavior, point, features and parameters that move; the policy's
    examples : all examples that subsets are of, as tokens
    recipe : how to train
    folder : where finished retrainings are kept; made when missing
    weights : what identifies the model's weights (``LoadedModel.weights``)
    tokenizer : Is saved beside checkpoints (``run(keep=...)``) and wanted by the trainer "trl"
    answers : how the model's own answers to the prompts are taken too; None: they are not
    progress : ``advance`` is called with the number of examples of each step

    Raises
    ------
    UserError
        The folder holds retrainings of another model, other prompts, features or code (what differs
        is named), or cannot be read or written; two examples have one id.
    """

    def __init__(
        self,
        problem: Problem,
        examples: Examples,
        recipe: Recipe,
        folder: Path,
        *,
        weights: Mapping[str, Any],
        tokenizer: Any = None,
        answers: Answering | None = None,
        progress: Progress | None = None,
    ) -> None:
        if recipe.trainer == "trl" and tokenizer is None:
            raise ValueError("the trainer trl wants the tokenizer")
        self.problem, self.recipe, self.folder = problem, recipe, folder
        self.answers = answers
        self.examples = {example.id: example for example in examples}
        if len(self.examples) != len(examples):
            raise UserError("two examples have one id", rule="ids are unique")
        self._tokenizer, self._progress = tokenizer, progress
        self._before: dict[str, float] = {}
        self.identity = _identity(problem, weights)
        _claim(folder, self.identity)

    def base(self) -> Retraining:
        """The model as it is: no training. Cost: one forward pass over the prompts, once."""
        return self._made((), None, None)

    def run(self, ids: Sequence[str], seed: int | None = None, *, keep: Path | None = None) -> Retraining:
        """Train on the examples of these ids, in any order, and read the prompts; or what is there.

        Parameters
        ----------
        seed : of the order of the examples; None: the recipe's
        keep : a folder for a checkpoint and Adam's second moments after every epoch (``train``). Where it is missing,
            training is made again for it. By the trainer "loop" only.

        Raises
        ------
        UserError
            No ids, unknown ones or one twice; training diverges; what is there is damaged.
        """
        if keep is not None and self.recipe.trainer != "loop":
            rule, fix = "validation.trainer: loop", "use --set validation.trainer=loop"
            raise UserError("checkpoints are kept by the plain loop", value=self.recipe.trainer, rule=rule, fix=fix)
        self._check(ids)
        return self._made(tuple(sorted(ids)), self.recipe.seed if seed is None else seed, keep)

    def unlearn(self, ids: Sequence[str], how: Unlearn, seed: int | None = None) -> Retraining:
        """Forget the examples of these ids, retain all others, and read the prompts; or what is there.

        Parameters
        ----------
        seed : of the order of the examples; None: the recipe's

        Raises
        ------
        UserError
            As :meth:`run` and :func:`taught.training.unlearn.unlearned`.
        """
        self._check(ids)
        return self._made(tuple(sorted(ids)), self.recipe.seed if seed is None else seed, None, how)

    def _check(self, ids: Sequence[str]) -> None:
        if not ids:
            raise UserError("a subset is empty", rule="at least one example to train on", fix="choose other subsets")
        unknown, fix = sorted(set(ids) - set(self.examples)), "use ids of the example file that are not left out"
        refuse(unknown, "these are not examples of the study", fix=fix)
        twice, rule = sorted({i for i in ids if list(ids).count(i) > 1}), "each example once; epochs repeat them"
        refuse(twice, "an example stands twice in a subset", rule=rule)

    def finished(self) -> list[Retraining]:
        """The retrainings in the folder by this recipe, at any seed, on examples as they are now.

        The base model is not among them. Sorted by key.
        """
        found = []
        for file in sorted(self.folder.glob("*.json")):
            if file.name == NAME:
                continue
            record = _read_record(file)
            ids = tuple(record["ids"])
            if ids and set(ids) <= set(self.examples) and self.key(ids, record["seed"]) == file.stem:
                found.append(_load(self.folder, file.stem))
        return found

    def key(self, ids: Sequence[str], seed: int | None, how: Unlearn | None = None) -> str:
        """Digest of all that a retraining depends on; the order of the ids is not part of it."""
        chosen = [self.examples[i] for i in sorted(ids)]
        depends = {
            **self.identity,
            "recipe": {**asdict(self.recipe), "seed": seed} if ids else None,
            **({"places": sorted(self.examples)} if ids and self.recipe.batches == "held" else {}),
            "examples": [[example.id, example_digest(example)] for example in chosen],
            "answers": None if self.answers is None else asdict(self.answers),
        }
        if how is not None:
            others = [self.examples[i] for i in sorted(set(self.examples) - set(ids))]
            depends["unlearn"] = asdict(how)
            depends["retain"] = [[example.id, example_digest(example)] for example in others]
        return fingerprint(depends)[:32]

    def _made(
        self, ids: tuple[str, ...], seed: int | None, keep: Path | None, how: Unlearn | None = None
    ) -> Retraining:
        key = self.key(ids, seed, how)
        if (self.folder / f"{key}.json").is_file() and (keep is None or keep.exists()):
            return _load(self.folder, key)
        made = self._read(key) if seed is None else self._fit(key, ids, seed, keep, how)
        _save(self.folder, made)
        return made

    def _read(self, key: str) -> Retraining:
        """The model as it stands, with no examples."""
        started, problem, answers = time.monotonic(), self.problem, None
        with evaluating(problem.model), torch.no_grad():
            reads = read_prompts(problem.model, problem.prompts, problem.behavior, problem.point)
            X = np.zeros((len(problem.prompts), 0))
            if problem.features is not None:
                X = problem.features(reads.h, reads.offsets).double().cpu().numpy()
            if self.answers is not None:
                tokens = [prompt.ids for prompt in problem.prompts]
                answers = tuple(greedy(problem.model, tokens, self.answers.ends, self.answers.limit))
        return Retraining(
            key=key,
            prompt_ids=reads.prompt_ids,
            feature_ids=_features(problem),
            y=reads.y.numpy(),
            X=X,
            answers=answers,
            seconds_reading=time.monotonic() - started,
        )

    def _fit(self, key: str, ids: tuple[str, ...], seed: int, keep: Path | None, how: Unlearn | None) -> Retraining:
        """The model trained on the examples, or with these forgotten."""
        started, problem = time.monotonic(), self.problem
        inputs = [self.examples[i] for i in ids]
        new = [example for example in inputs if example.id not in self._before]
        if new:
            losses = example_losses(problem.model, new, problem.batch_tokens).tolist()
            self._before |= {example.id: loss for example, loss in zip(new, losses, strict=True)}
        before = np.array([self._before[i] for i in ids])
        begun = time.monotonic()
        with self._trained(inputs, seed, keep) if how is None else self._forgotten(inputs, seed, how) as done:
            seconds = time.monotonic() - begun
            after = example_losses(problem.model, inputs, problem.batch_tokens).numpy()
            read = replace(self._read(key), **done)
        return replace(
            read,
            ids=ids,
            seed=seed,
            losses_before=before,
            losses_after=after,
            seconds_training=seconds,
            seconds_reading=time.monotonic() - started - seconds,
        )

    @contextmanager
    def _trained(self, inputs: Examples, seed: int, keep: Path | None) -> Iterator[dict[str, Any]]:
        """Inside, the model is trained on the examples; refused is a trainer that dropped, added or repeated some."""
        model, recipe = self.problem.model, replace(self.recipe, seed=seed)
        with in_training(model, recipe, self.problem.parameters) as parameters:
            both: dict[str, Any] = {"parameters": parameters, "progress": self._progress}
            if recipe.trainer == "trl":
                log = train_by_trl(model, inputs, recipe, tokenizer=self._tokenizer, **both)
            else:
                held = [i for i in self.examples if recipe.batches == "held"]
                with _whole_folder(keep) as place:
                    tokens = self.problem.batch_tokens
                    log = train(model, inputs, recipe, batch_tokens=tokens, keep=place, held=held, **both)
                    for folder in place.glob("epoch-*/") if place is not None and self._tokenizer else ():
                        self._tokenizer.save_pretrained(folder)
            ids = [example.id for example in inputs]
            seen = sorted(i for step in log.ids for i in step)
            if seen != sorted(ids * recipe.epochs):
                missing = name_ids(sorted(set(ids) - set(seen))) or "none"
                raise UserError(
                    "training did not see the examples that it was given",
                    value=f"missing: {missing}; {len(seen)} seen, {len(ids) * recipe.epochs} expected",
                    rule="each example once an epoch",
                    fix="use --set validation.trainer=loop",
                )
            yield {"kept": tuple(sorted(set(seen))), "log": log}

    @contextmanager
    def _forgotten(self, inputs: Examples, seed: int, how: Unlearn) -> Iterator[dict[str, Any]]:
        """Inside, the examples are forgotten, and what must hold does.

        That is the accuracy on the guard's prompts, where they have a right option, else the behavior; without
        prompts the loss of others.
        """
        problem, ids = self.problem, {example.id for example in inputs}
        others = [example for i, example in self.examples.items() if i not in ids]
        if how.guard is None:
            ordered = sorted(others, key=lambda example: hashlib.sha256(example.id.encode()).hexdigest())
            guard = loss_guard(ordered[:GUARDED], problem.batch_tokens, how.keep)
        else:
            chosen = [prompt for prompt in problem.prompts if prompt.id in how.guard]
            guard = prompt_guard(chosen, problem.behavior, how.keep)
        with unlearned(
            problem.model,
            inputs,
            others,
            replace(self.recipe, seed=seed, lr=how.lr),
            how.steps,
            guard,
            parameters=problem.parameters,
            batch_tokens=problem.batch_tokens,
            progress=self._progress,
        ) as log:
            yield {"kept": tuple(sorted({i for step in log.forget[: log.kept] for i in step})), "forgetting": log}


def _features(problem: Problem) -> tuple[int, ...]:
    return tuple(problem.features.ids.tolist()) if isinstance(problem.features, FeatureMap) else ()


def _identity(problem: Problem, weights: Mapping[str, Any]) -> dict[str, Any]:
    """What every retraining depends on besides examples and recipe, as plain values."""
    features = problem.features
    read = {}
    if isinstance(features, FeatureMap):
        read = {
            "sae.weights": features.sae.sha256(),
            "sae.block": None if problem.point is None else problem.point.block,
            "sae.point": None if problem.point is None else problem.point.part,
            "sae.encoder": features.encoder,
            "readout.position": features.position,
        }
    prompts = [[p.id, list(p.ids), list(p.read), list(map(list, p.suffixes))] for p in problem.prompts]
    sources = {name: files.sha256_file(Path(taught.__file__).parent / name) for name in _COMPUTING}
    return {
        "model.weights": dict(weights),
        "model.dtype": str(next(problem.model.parameters()).dtype),
        "parameters": list(problem.parameters or ()),
        "prompts": fingerprint({"prompts": prompts}),
        "behavior": behavior_record(problem.behavior),
        **read,
        "features": list(_features(problem)),
        "code": f"taught {taught.__version__}, sources {fingerprint(sources)[:16]}",
    }


def _claim(folder: Path, identity: Mapping[str, Any]) -> None:
    """Make the folder, or refuse one that was made under another identity."""
    found = _read_record(folder / NAME) if (folder / NAME).exists() else None
    if found is None:
        files.make_folder(folder)
        record = {"format": FORMAT, "identity": dict(identity)}
        files.write_bytes(folder / NAME, files.json_bytes(record))
        return
    if found["format"] != FORMAT:
        what, rule, fix = "the retrainings are of another format", f"format {FORMAT}", "use another run folder"
        raise UserError(what, value=found["format"], rule=rule, fix=fix)
    changed = differences(found["identity"], identity)
    if changed:
        raise UserError(
            f"{folder} holds retrainings made under other conditions: " + ", ".join(changed),
            value="; ".join(f"{k}: was {was}, now {now}" for k, (was, now) in changed.items()),
            rule="results are never reused under another study, model, data or code",
            fix="use another run folder",
        )


@contextmanager
def _whole_folder(target: Path | None) -> Iterator[Path | None]:
    """A folder beside ``target`` that takes its place when the body ends without an exception."""
    if target is None:
        yield None
        return
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        work = Path(mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    except OSError as error:
        raise files.write_error(target, error) from error
    try:
        yield work
        os.replace(work, target)
    except OSError as error:
        raise files.write_error(target, error) from error
    finally:
        shutil.rmtree(work, ignore_errors=True)


_ARRAYS = ("y", "X", "losses_before", "losses_after")


def _save(folder: Path, made: Retraining) -> None:
    """Arrays first, the record last: without it a retraining does not count."""
    content = files.tensors_bytes({name: getattr(made, name) for name in _ARRAYS})
    record = {item.name: getattr(made, item.name) for item in fields(made) if item.name not in ("key", *_ARRAYS)}
    record |= {"log": None if made.log is None else asdict(made.log), "sha256": files.sha256_bytes(content)}
    if made.forgetting is not None:
        looks = [(step, value if math.isfinite(value) else None) for step, value in made.forgetting.guard]
        record["forgetting"] = {**asdict(made.forgetting), "guard": looks}
    files.write_bytes(folder / f"{made.key}.safetensors", content)
    files.write_bytes(folder / f"{made.key}.json", files.json_bytes(record))


def _load(folder: Path, key: str) -> Retraining:
    record = _read_record(folder / f"{key}.json")
    file = folder / f"{key}.safetensors"
    content = file.read_bytes() if file.is_file() else b""
    if files.sha256_bytes(content) != record.pop("sha256"):
        raise UserError(
            "a finished retraining is damaged",
            value=str(file),
            rule="its checksum is the one that was recorded when it was written",
            fix=f"delete {file.with_suffix('.json').name}: it is made again",
        )
    log, run = record.pop("log"), record.pop("forgetting")
    if run is not None:
        run["guard"] = [[step, math.nan if value is None else value] for step, value in run["guard"]]
    return Retraining(
        key=key,
        log=None if log is None else TrainLog(**_tuples(log)),
        forgetting=None if run is None else Forgetting(**_tuples(run)),
        **_tuples(record),
        **dict[str, Any](files.tensors_from_bytes(content)),
    )


def _tuples(value: Any) -> Any:
    """JSON with tuples in the place of lists."""
    if isinstance(value, dict):
        return {name: _tuples(of) for name, of in value.items()}
    return tuple(map(_tuples, value)) if isinstance(value, list) else value


def _read_record(file: Path) -> dict[str, Any]:
    try:
        record: dict[str, Any] = files.parse_json(file.read_bytes())
        return record
    except (OSError, ValueError) as error:
        raise UserError(
            "a record of retrainings cannot be read",
            value=f"{file}: {error}",
            fix="delete this file: what it names is made again",
        ) from None
