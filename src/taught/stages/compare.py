"""The stage ``compare``: every method's predictions beside what retraining did."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path
from time import monotonic

import numpy as np
import pyarrow as pa

from taught.baselines.baselines import BASELINES, Texts, baseline_scores
from taught.core import driver
from taught.core.estimator import Work
from taught.core.names import TargetName
from taught.core.scores import Scores, scores_schema
from taught.core.target import TargetSet, kind_of
from taught.environment import mark_memory, peak_memory_gb
from taught.policy.ridge import Policy
from taught.progress import Progress, SilentProgress
from taught.run.folder import RunFolder
from taught.run.pieces import Prefixed
from taught.stages.ready import Data, Ready, method_of, prepare, read_data
from taught.stages.scored import read_scores, run_targets
from taught.stages.subject import open_subject
from taught.study.schema import Study
from taught.validation.comparison import (
    LEAST_SUBSETS,
    RANK_DESIGNS,
    Comparison,
    by_length,
    compared,
    foreseen,
    is_planted,
    truths,
)
from taught.validation.lds import table_of
from taught.validation.score_tables import placed
from taught.validation.score_tables import read_scores as read_table

COEFFICIENTS = 10  # so many of the largest are compared on
ByTarget = dict[str, dict[str, float]]


@dataclass(frozen=True)
class CostRow:
    """What a method took: seconds, and the peak memory of the process meanwhile (10^9 bytes)."""

    method: str
    seconds: float
    memory_gb: float


def compare(study: Study, run: RunFolder, progress: Progress | None = None) -> None:
    """LDS of the run's own influence, of other methods and of baselines, on the same retrainings.

    Targets: those of the run that are no coefficient, and the ten largest coefficients. Of the baselines, those that
    are about a group stand for the behavior on it; for the other targets they take the positive group. Beside each
    method stands METHOD/norm, its values over the lengths of the examples' gradients.

    Raises
    ------
    UserError
        The run has no retrainings; an unknown method; a table that does not fit the run.
    """
    progress = progress or SilentProgress()
    own = method_of(study)
    further = {name: own.named(name) for name in study.validation.methods}
    for method in further.values():
        method.refuse()
    given = [row for table in study.validation.scores for row in read_table(Path(table))]
    data = read_data(study, progress)
    progress.step("load the model")
    subject = open_subject(study)
    with run.stage("compare", study, subject.identity) as stage:
        if stage.done:
            return
        ready = prepare(study, run, subject, data, progress)
        targets = compared_targets(run, ready)
        names = [str(name) for name in targets.names]
        there = set(run_targets(run, many=True))
        scores = {own.name: in_words(read_scores(run, [name for name in names if name in there]))}
        record = run.manifest["stages"]["attribute"]
        costs = [CostRow(own.name, record["seconds"], record["peak_memory_gb"])]
        for name, method in further.items():
            if method.name == own.name:
                continue
            progress.note(name)
            work = Work(progress, Prefixed(stage.partial, str(len(scores))), run.folder)
            with costed(method.name, costs):
                made = driver.scores(ready.problem, ready.inputs, targets, method, work)
            scores[method.name] = in_words(made)
        taken = {*scores, *BASELINES, *(f"{method}/norm" for method in scores)}
        elsewhere = placed(given, [z.id for z in ready.inputs], names, taken)
        with costed("all baselines", costs):
            baselines = baselines_by_target(study, data, ready, targets, progress)
        rivals = [*scores, *elsewhere]
        norms = next(iter(baselines["gradient-norm"].values()))
        scores |= by_length(scores, norms) | elsewhere
        subsets, outcomes = run.read_table("subsets"), run.read_table("outcomes")
        known = truths(subsets, outcomes, run.read_json("validation")["inclusion"], names)
        for design in sorted({*RANK_DESIGNS} & {*study.validation.designs} - {t.design for t in known}):
            progress.note(f"{design}: fewer than {LEAST_SUBSETS} subsets, no rank correlation")
        progress.step("intervals")
        labels = {example.id: example.label for example in ready.examples}
        planted = {example.id for example in ready.examples if is_planted(example.flags)}
        found = compared(Comparison(scores, baselines, known, labels, planted, list(combinations(rivals, 2))))
        for name, rows in (*found._asdict().items(), ("costs", costs)):
            if rows:
                run.write_table(name, table_of(rows))
        few = {name: of for name, of in scores[own.name].items() if not kind_of(TargetName.parse(name)).many}
        run.write_table("foreseen", table_of(foreseen(subsets, outcomes, few)))
        long = [(i, m, t, v, None) for m, of in scores.items() for t, by in of.items() for i, v in by.items()]
        columns = [list(column) for column in zip(*long, strict=True)]
        run.write_table("compared_scores", pa.table(columns, schema=scores_schema()))
        run.write_json("compare", {"methods": list(scores), "baselines": list(baselines), "given": list(elsewhere)})


@contextmanager
def costed(method: str, costs: list[CostRow]) -> Iterator[None]:
    """Add what the body took, by the clock and in memory."""
    mark_memory()
    started = monotonic()
    yield
    costs.append(CostRow(method, monotonic() - started, peak_memory_gb(recent=True) or 0.0))


def compared_targets(run: RunFolder, ready: Ready) -> TargetSet:
    """The run's targets that a retraining measures, without pathways; the ten largest coefficients."""
    names = [TargetName.parse(name) for name in run_targets(run)]
    names = [n for n in names if n.pathway is None and all(kind_of(p).reads != "concepts" for p in n.parts)]
    if (policy := ready.readings.policy) is not None:
        names += [TargetName("coefficient", str(k)) for k in largest(policy)]
    return TargetSet(tuple(names), ready.readings)


def largest(policy: Policy) -> list[int]:
    """Feature ids of the ten largest coefficients."""
    order = np.argsort(-np.abs(policy.coef), kind="stable")[:COEFFICIENTS]
    ids: list[int] = policy.feature_ids[order].tolist()
    return ids


def in_words(scores: Scores) -> ByTarget:
    """Target -> example id -> value."""
    return {str(name): scores.by_example(name) for name in scores.targets}


def baselines_by_target(
    study: Study, data: Data, ready: Ready, targets: TargetSet, progress: Progress
) -> dict[str, ByTarget]:
    """Every baseline: one about a group stands for the behavior on it, the positive group's for others."""
    progress.step("baselines", len(ready.inputs))
    positive, labels = study.examples.positive_label, {example.id: example.label or "" for example in ready.examples}
    responses = {example.id: f"{example.prompt}\n{example.response}" for example in ready.examples}
    texts = Texts(responses, {prompt.id: prompt.text for prompt in data.prompts}, labels, positive or "")
    names = [n for n in BASELINES if n != "label" or positive is not None]
    groups = ready.readings.groups
    made = baseline_scores(ready.problem, ready.inputs, groups, texts, names=names, progress=progress)
    other = study.prompts.positive_group or next(iter(groups))
    found: dict[str, ByTarget] = {}
    for name in targets.names:
        group = name.about if name.about in groups else other
        for scores in made:
            if scores.group in (None, group):
                values = dict(zip(scores.example_ids, map(float, scores.values), strict=True))
                found.setdefault(scores.baseline, {})[str(name)] = values
    return found
