"""The stage ``compare``: every method's predictions beside what retraining did."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial, reduce
from itertools import combinations
from pathlib import Path
from time import monotonic

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch

from taught.baselines.baselines import BASELINES, Texts, baseline_scores
from taught.core.example import Example, refuse_nonfinite
from taught.core.target import Target, coefficient_targets, cotangents, mean_y_target, score_targets
from taught.curvatures.autocorrelation import fit_autocorrelation
from taught.environment import mark_memory, peak_memory_gb
from taught.errors import UserError
from taught.estimators.adjoint import Problem, target_effects, targets_at_once
from taught.policy.ridge import Floats, Policy
from taught.progress import Progress, SilentProgress
from taught.run.folder import RunFolder
from taught.run.pieces import Pieces, kept
from taught.sketches.answer import ask, policy_queries
from taught.sketches.estimator import fill
from taught.sketches.fill import example_row, prompt_key
from taught.stages.estimating import Data, Ready, over_checkpoints, prepare, read_data, sketch_source
from taught.stages.subject import Subject, open_subject, refuse_combinations
from taught.stages.validate import influence_of
from taught.study.schema import Study
from taught.validation.comparison import (
    LEAST_SUBSETS,
    RANK_DESIGNS,
    Comparison,
    Scores,
    by_length,
    compared,
    is_planted,
    truths,
    values_by_example,
)
from taught.validation.lds import table_of
from taught.validation.score_tables import placed, read_scores

METHODS = ("adjoint", "adjoint+adam", "adjoint+ekfac", "sketch", "sketch+autocorrelation")
COEFFICIENTS = 10  # so many of the largest are compared on

Targets = dict[str, list[Target]]  # label of the target -> its pathways
SCORES = pa.schema(
    [("method", pa.string()), ("target", pa.string()), ("example_id", pa.string()), ("value", pa.float64())]
)


@dataclass(frozen=True)
class CostRow:
    """What a method took: seconds, and the peak memory of the process meanwhile (10^9 bytes)."""

    method: str
    seconds: float
    memory_gb: float


def compare(study: Study, run: RunFolder, progress: Progress | None = None) -> None:
    """LDS of the run's own influence, of other methods and of baselines, on the same retrainings.

    Targets: the score, the mean y of each group, the ten largest coefficients. Of the baselines,
    those that are about a group stand for its mean y; for the others they take the positive group.
    Beside each method stands METHOD/norm, its values over the lengths of the examples' gradients.

    Raises
    ------
    UserError
        The run has no retrainings; an unknown method; a table that does not fit the run.
    """
    methods, tables = study.validation.methods, study.validation.scores
    progress = progress or SilentProgress()
    unknown = [name for name in methods if name not in METHODS]
    if unknown:
        raise UserError(
            "no such method", value=unknown, rule="some of " + ", ".join(METHODS), fix="set validation.methods"
        )
    given = [row for table in tables for row in read_scores(Path(table))]
    data = read_data(study, progress)
    progress.step("load model and SAE")
    subject = open_subject(study)
    with run.stage("compare", study, subject.identity) as stage:
        if stage.done:
            return
        ready = prepare(study, run, subject, data)
        targets = compared_targets(ready)
        own = method_name(study)
        further = sorted(set(methods) - {own})
        ids = [example.id for example in ready.inputs]
        names = {own, *further, *BASELINES}
        names |= {f"{method}/norm" for method in (own, *further)}
        elsewhere = placed(given, ids, list(targets), names)
        few = pc.field("feature_id").is_null() | pc.field("feature_id").isin(largest(ready.fitted))
        influence = {target.label: of for target, of in influence_of(run, few).items()}
        scores: Scores = {own: {name: influence[name] for name in targets if name in influence}}
        record = run.manifest["stages"]["attribute"]
        costs = [CostRow(own, record["seconds"], record["peak_memory_gb"])]
        for method in further:
            progress.note(method)
            with costed(method, costs):
                scores[method] = method_scores(method, study, run, subject, ready, targets, progress, stage.partial)
        with costed("all baselines", costs):
            baselines = baselines_by_target(study, data, ready, targets, progress)
        rivals = [*scores, *elsewhere]
        norms = next(iter(baselines["gradient-norm"].values()))
        scores |= by_length(scores, norms) | elsewhere
        known = truths(
            run.read_table("subsets"),
            run.read_table("outcomes"),
            run.read_json("validation")["inclusion"],
            list(targets),
        )
        for design in sorted({*RANK_DESIGNS} & {*study.validation.designs} - {t.design for t in known}):
            progress.note(f"{design}: fewer than {LEAST_SUBSETS} subsets, no rank correlation")
        progress.step("intervals")
        found = compared(
            Comparison(
                scores,
                baselines,
                known,
                {example.id: example.label for example in ready.examples},
                {example.id for example in ready.examples if is_planted(example.flags)},
                list(combinations(rivals, 2)),
            )
        )
        for name, rows in (*found._asdict().items(), ("costs", costs)):
            if rows:
                run.write_table(name, table_of(rows))
        run.write_table("compared_scores", _scores_table(scores))
        run.write_json("compare", {"methods": list(scores), "baselines": list(baselines), "given": list(elsewhere)})


@contextmanager
def costed(method: str, costs: list[CostRow]) -> Iterator[None]:
    """Add what the body took, by the clock and in memory."""
    mark_memory()
    started = monotonic()
    yield
    costs.append(CostRow(method, monotonic() - started, peak_memory_gb(recent=True) or 0.0))


def method_name(study: Study) -> str:
    """What the study's own way of attribution is called: estimator, or estimator+curvature."""
    spec = study.attribution
    metric = spec.curvature.kind
    return spec.estimator.kind if metric == "identity" else f"{spec.estimator.kind}+{metric}"


def compared_targets(ready: Ready) -> Targets:
    """The score, the mean y of each group, the ten largest coefficients: label -> pathways."""
    policy, group_of = ready.fitted, {i: g for g, ids in ready.groups.items() for i in ids}
    names = [group_of[i] for i in policy.prompt_ids]
    return {
        "score": score_targets(policy),
        **{f"behavior:{group}": [mean_y_target(policy.prompt_ids, names, group)] for group in ready.groups},
        **{f"coefficient:{k}": coefficient_targets(policy, k) for k in largest(policy)},
    }


def largest(policy: Policy) -> list[int]:
    """Feature ids of the ten largest coefficients."""
    order = np.argsort(-np.abs(policy.coef), kind="stable")[:COEFFICIENTS]
    ids: list[int] = policy.feature_ids[order].tolist()
    return ids


def method_scores(
    method: str,
    study: Study,
    run: RunFolder,
    subject: Subject,
    ready: Ready,
    targets: Targets,
    progress: Progress,
    pieces: Pieces | None = None,
) -> dict[str, dict[str, float]]:
    """Total effect of every example on every target by one of METHODS: target -> example id -> value.

    Raises
    ------
    UserError
        The study's checkpoints do not go with the method; a gradient is not finite.
    """
    estimator, _, curvature = method.partition("+")
    metric = curvature if curvature in ("adam", "ekfac") else "identity"
    if study.attribution.estimator.kind != estimator:
        study = study.replace("attribution.estimator", estimator)
    if study.attribution.curvature.kind != metric:
        study = study.replace("attribution.curvature", metric)
    refuse_combinations(study)
    if estimator == "sketch":
        values = _sketched(study, run, subject, ready, targets, progress, solved=bool(curvature))
    else:
        values = _adjoint(study, subject, ready, targets, progress, pieces)
    ids = [example.id for example in ready.inputs]
    return {name: values_by_example(ids, of) for name, of in zip(targets, values.T, strict=True)}


def _adjoint(
    study: Study, subject: Subject, ready: Ready, targets: Targets, progress: Progress, pieces: Pieces | None
) -> Floats:
    """Effects [P, K]: pathways are summed before a gradient is taken, which is one a target then.

    Targets that fit into memory together share the passes over prompts and examples.
    """
    policy, inputs = ready.fitted, ready.inputs
    pathways = [cotangents(parts, policy) for parts in targets.values()]
    A = torch.from_numpy(np.stack([of_x.sum(0) for of_x, _ in pathways]))
    B = torch.from_numpy(np.stack([of_y.sum(0) for _, of_y in pathways]))

    def effects(there: Problem, number: int) -> torch.Tensor:
        chunk, parts = targets_at_once(there), []
        progress.step("gradients of the targets and of the examples", None)
        for start in range(0, len(targets), chunk):
            some = slice(start, start + chunk)
            key = f"{method_name(study)} {number} {start} {chunk}"
            compute = partial(_only_effects, there, inputs, A[some], B[some])
            parts.append(kept(pieces, key, compute))
        return torch.cat(parts, 1)

    total = reduce(torch.add, over_checkpoints(study, subject, ready.problem, inputs, progress, effects))
    refuse_nonfinite(inputs, range(len(inputs)), total, "gradient")
    return total.numpy()


def _only_effects(problem: Problem, examples: Sequence[Example], A: torch.Tensor, B: torch.Tensor) -> torch.Tensor:
    return target_effects(problem, examples, A, B)[0]


def _sketched(
    study: Study, run: RunFolder, subject: Subject, ready: Ready, targets: Targets, progress: Progress, *, solved: bool
) -> Floats:
    """Effects [P, K] from sketches, in the plain metric or that of the examples' autocorrelation."""
    source, policy = sketch_source(study, run, subject), ready.fitted
    fill(source, ready.problem, ready.inputs, progress=progress)
    digests = dict(prompt_key(prompt) for prompt in ready.problem.prompts)
    made, _ = policy_queries(source.store, policy, ready.groups, digests)
    columns = {"score": made.few[:, 0] + made.few[:, 1]}
    columns |= {f"behavior:{group}": made.few[:, 2 + n] for n, group in enumerate(made.groups)}
    for j, k in enumerate(policy.feature_ids.tolist()):
        columns[f"coefficient:{k}"] = made.x[:, j] + made.y[:, j]
    queries = np.stack([columns[name] for name in targets], 1)
    rows = [example_row(example) for example in ready.inputs]
    if solved:
        queries = fit_autocorrelation(source.store, rows).solve(queries)
    return -study.attribution.lr * ask(source.store, rows, queries).values


def baselines_by_target(study: Study, data: Data, ready: Ready, targets: Targets, progress: Progress) -> Scores:
    """Every baseline: one about a group stands for its mean y, the positive group's for others."""
    progress.step("baselines", len(ready.inputs))
    texts = Texts(
        {example.id: f"{example.prompt}\n{example.response}" for example in ready.examples},
        {prompt.id: prompt.text for prompt in data.prompts},
        {example.id: example.label for example in ready.examples},
        _positive_label(ready),
    )
    names = [n for n in BASELINES if n != "label" or all(texts.labels.values())]
    made = baseline_scores(ready.problem, ready.inputs, ready.groups, texts, names=names, progress=progress)
    found: Scores = {}
    for name, (target, *_) in targets.items():
        group = target.group or study.prompts.positive_group
        for scores in made:
            if scores.group in (None, group):
                values = values_by_example(scores.example_ids, scores.values)
                found.setdefault(scores.baseline, {})[name] = values
    return found


def _positive_label(ready: Ready) -> str:
    """The label that names refusal, or else the first one."""
    labels = sorted({example.label for example in ready.examples})
    return next((label for label in labels if "refusal" in label), labels[0])


def _scores_table(scores: Scores) -> pa.Table:
    """Scores in long form."""
    long = [(m, t, i, v) for m, of in scores.items() for t, by in of.items() for i, v in by.items()]
    return pa.table([list(column) for column in zip(*long, strict=True)], schema=SCORES)
