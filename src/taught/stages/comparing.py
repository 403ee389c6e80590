"""The stage ``compare``: every method's predictions beside what retraining did."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import combinations
from time import monotonic
from typing import Any

import numpy as np
import pyarrow as pa

from taught.attribution.ask import ask, policy_queries
from taught.attribution.autocorrelation import fit_autocorrelation
from taught.attribution.baselines import BASELINES, Texts, baseline_scores
from taught.attribution.estimate import Effects
from taught.attribution.fill import pair_row, prompt_key
from taught.attribution.sketched import fill
from taught.environment import mark_memory, peak_memory_gb
from taught.errors import UserError
from taught.policy.ridge import Shift
from taught.progress import Progress, SilentProgress
from taught.run import RunFolder
from taught.setup import Subject, open_subject
from taught.stages.estimating import Data, Ready, estimate, prepare, read_data, sketch_source
from taught.stages.retraining import influence_of
from taught.study import Study
from taught.validation.lds import (
    auc,
    differences,
    explained_by_trivial,
    lds_rows,
    precision_at_k,
    table_of,
)
from taught.validation.outcomes import TargetName
from taught.validation.subsets import Subsets

METHODS = ("adjoint", "adjoint+adam", "sketch", "sketch+adam", "sketch+autocorrelation")
COEFFICIENTS = 10  # so many of the largest are compared on
RANK_DESIGNS = ("random", "matched", "leave-out", "leave-one-out")
LEAST_SUBSETS = 8  # fewer have no rank correlation worth an interval

Scores = dict[str, dict[str, dict[str, float]]]  # method -> target -> pair id -> influence
SCORES = pa.schema(
    [
        ("method", pa.string()),
        ("target", pa.string()),
        ("pair_id", pa.string()),
        ("value", pa.float64()),
    ]
)


@dataclass(frozen=True)
class PlantedRow:
    """How well a method's influence on a target sets the planted pairs apart.

    Attributes
    ----------
    auc, lo, hi : area under the ROC curve with its 95% interval; .5 by chance
    precision : share of planted pairs among the k with the highest influence, k their number
    """

    method: str
    target: str
    auc: float
    lo: float
    hi: float
    precision: float
    planted: int
    others: int


@dataclass(frozen=True)
class CostRow:
    """What a method took: seconds, and the peak memory of the process meanwhile (10^9 bytes)."""

    method: str
    seconds: float
    memory_gb: float


@dataclass(frozen=True, eq=False)
class Truth:
    """What retraining did, for one design: subsets, and target -> subset -> change."""

    design: str
    subsets: Subsets
    outcomes: dict[str, dict[str, float]]


def compare(
    study: Study,
    run: RunFolder,
    methods: Sequence[str] = (),
    progress: Progress | None = None,
) -> None:
    """LDS of the run's own influence, of other methods and of baselines, on the same retrainings.

    Targets: the score, the mean y of each group, the ten largest coefficients. Of the baselines,
    those that are about a group stand for its mean y; for the others they take the positive group.

    Parameters
    ----------
    methods
        Further ones of METHODS, each computed for all pairs.

    Raises
    ------
    UserError
        The run has no retrainings; an unknown method.
    """
    progress = progress or SilentProgress()
    unknown = [name for name in methods if name not in METHODS]
    if unknown:
        raise UserError("no such method", value=unknown, rule="some of " + ", ".join(METHODS),
                        fix="set --method")  # fmt: skip
    data = read_data(study, progress)
    progress.step("load model and SAE")
    subject = open_subject(study)
    inputs = {**subject.identity, "methods": sorted(set(methods))}
    with run.stage("compare", study, inputs) as stage:
        if stage.done:
            return
        ready = prepare(study, run, subject, data)
        targets = _targets(ready)
        own = _own_name(study)
        scores: Scores = {own: _named(influence_of(run), targets)}
        costs = [CostRow(own, run.manifest["stages"]["attribute"]["seconds"],
                         run.manifest["stages"]["attribute"]["peak_memory_gb"])]  # fmt: skip
        for method in sorted(set(methods) - {own}):
            mark_memory()
            started = monotonic()
            effects = _effects(method, study, run, subject, ready, progress)
            scores[method] = _named(_by_target(effects, ready), targets)
            costs.append(CostRow(method, monotonic() - started, peak_memory_gb(recent=True) or 0.0))
        mark_memory()
        started = monotonic()
        baselines = _baselines(study, data, ready, targets, progress)
        costs.append(
            CostRow("all baselines", monotonic() - started, peak_memory_gb(recent=True) or 0.0)
        )
        found = truths(run.read_table("subsets"), run.read_table("outcomes"),
                       run.read_json("validation")["inclusion"], targets)  # fmt: skip
        progress.step("intervals")
        _write(run, ready, scores, baselines, costs, found)


@contextmanager
def _costed(method: str, costs: list[CostRow]) -> Iterator[None]:
    mark_memory()
    started = monotonic()
    yield
    costs.append(CostRow(method, monotonic() - started, peak_memory_gb(recent=True) or 0.0))


def _own_name(study: Study) -> str:
    spec = study.attribution
    return spec.estimator if spec.curvature == "identity" else f"{spec.estimator}+{spec.curvature}"


def _targets(ready: Ready) -> dict[TargetName, str]:
    """The targets that are compared on, and what they are called."""
    order = np.argsort(-np.abs(ready.fitted.coef), kind="stable")[:COEFFICIENTS]
    ids = ready.fitted.feature_ids[order].tolist()
    return {
        TargetName("score"): "score",
        **{TargetName("mean_y", group=group): f"mean_y:{group}" for group in ready.groups},
        **{TargetName("coefficient", feature_id=k): f"coefficient:{k}" for k in ids},
    }


def _named(
    found: Mapping[TargetName, dict[str, float]], targets: Mapping[TargetName, str]
) -> dict[str, dict[str, float]]:
    return {name: found[target] for target, name in targets.items() if target in found}


def _effects(
    method: str, study: Study, run: RunFolder, subject: Subject, ready: Ready, progress: Progress
) -> Effects:
    """Effects of all pairs by a method, without steps beside them."""
    estimator, _, curvature = method.partition("+")
    other = (
        study.replace("attribution.estimator", estimator)
        .replace("attribution.curvature", "adam" if curvature == "adam" else "identity")
        .replace("attribution.exact_top", 0)
    )
    progress.note(method)
    if curvature == "autocorrelation":
        return _autocorrelated(other, run, subject, ready, progress)
    pieces = _Apart(run.partial("compare"), method)
    return estimate(other, run, subject, ready, progress, pieces)[0]


@dataclass(frozen=True)
class _Apart:
    """Pieces of one method, apart from those of the others."""

    pieces: Any
    method: str

    def load(self, key: str) -> Any:
        return self.pieces.load(self._key(key))

    def save(self, key: str, arrays: Any) -> None:
        self.pieces.save(self._key(key), arrays)

    def _key(self, key: str) -> str:
        return f"{self.method.replace('+', '-')}-{key}"


def _autocorrelated(
    study: Study, run: RunFolder, subject: Subject, ready: Ready, progress: Progress
) -> Effects:
    """Effects from sketches in the metric of the pairs' autocorrelation (docs/methods.md)."""
    source, policy = sketch_source(study, run, subject), ready.fitted
    fill(source, ready.problem, ready.inputs, progress=progress)
    digests = dict(prompt_key(prompt) for prompt in ready.problem.prompts)
    queries, _ = policy_queries(source.store, policy, ready.groups, digests)
    rows = [pair_row(pair) for pair in ready.inputs]
    every = np.concatenate([queries.few, queries.x, queries.y], 1)
    answers = ask(source.store, rows, fit_autocorrelation(source.store, rows).solve(every))
    values = -study.attribution.lr * answers.values
    few, x, y = np.split(values, np.cumsum([queries.few.shape[1], policy.d]), 1)
    return Effects(
        tuple(pair.id for pair in ready.inputs), "sketch", answers.losses, few[:, :2].T.copy(),
        {group: few[:, 2 + n] for n, group in enumerate(ready.groups)}, Shift(x, y), None,
    )  # fmt: skip


def _by_target(effects: Effects, ready: Ready) -> dict[TargetName, dict[str, float]]:
    def by_pair(values: Iterable[float]) -> dict[str, float]:
        return dict(zip(effects.pair_ids, map(float, values), strict=True))

    found = {TargetName("score"): by_pair(effects.score.sum(0))}
    for group, values in effects.mean_y.items():
        found[TargetName("mean_y", group=group)] = by_pair(values)
    if effects.shift is not None:
        ids = ready.fitted.feature_ids.tolist()
        for feature_id, values in zip(ids, effects.shift.total.T, strict=True):
            found[TargetName("coefficient", feature_id=feature_id)] = by_pair(values)
    return found


def _baselines(
    study: Study,
    data: Data,
    ready: Ready,
    targets: Mapping[TargetName, str],
    progress: Progress,
) -> Scores:
    progress.step("baselines", len(ready.inputs))
    texts = Texts(
        {pair.id: f"{pair.prompt}\n{pair.response}" for pair in ready.pairs},
        {prompt.id: prompt.text for prompt in data.prompts},
        {pair.id: pair.label for pair in ready.pairs},
        _positive_label(ready),
    )
    names = [n for n in BASELINES if n != "label" or all(texts.labels.values())]
    made = baseline_scores(ready.problem, ready.inputs, ready.groups, texts, names=names,
                           progress=progress)  # fmt: skip
    found: Scores = {}
    for target, name in targets.items():
        group = target.group or study.prompts.positive_group
        for scores in made:
            if scores.group in (None, group):
                values = dict(zip(scores.pair_ids, scores.values.tolist(), strict=True))
                found.setdefault(scores.baseline, {})[name] = values
    return found


def _positive_label(ready: Ready) -> str:
    """The label that names refusal, or else the first one."""
    labels = sorted({pair.label for pair in ready.pairs})
    return next((label for label in labels if "refusal" in label), labels[0])


def truths(
    subsets: pa.Table,
    outcomes: pa.Table,
    inclusion: Mapping[str, Mapping[str, float]],
    targets: Mapping[TargetName, str],
) -> list[Truth]:
    """Designs of which a rank correlation can be taken: those with eight subsets or more.

    Parameters
    ----------
    subsets, outcomes, inclusion
        As the stage ``validate`` writes them.
    """
    members: dict[str, dict[str, list[str]]] = {}
    for row in subsets.to_pylist():
        members.setdefault(row["design"], {}).setdefault(row["subset"], []).append(row["pair_id"])
    changed: dict[str, dict[str, dict[str, float]]] = {}
    for row in outcomes.to_pylist():
        name = targets.get(TargetName(row["target"], row["feature_id"], row["group"]))
        if name is not None:
            found = changed.setdefault(row["design"], {}).setdefault(name, {})
            found[row["subset"]] = row["value"]
    return [
        Truth(
            design,
            Subsets(tuple(some), tuple(map(tuple, some.values())), inclusion[design]),
            changed[design],
        )
        for design, some in members.items()
        if len(some) >= LEAST_SUBSETS and design in RANK_DESIGNS
    ]


def _write(
    run: RunFolder,
    ready: Ready,
    scores: Scores,
    baselines: Scores,
    costs: Sequence[CostRow],
    found: Sequence[Truth],
) -> None:
    every = {**scores, **baselines}
    length = {pair.id: float(pair.n_response) for pair in ready.inputs}
    loss = baselines["loss"]["score"]
    labels = _label_indicators(ready)
    controls = {"response-length": length, **labels}
    trivial = {"response-length": length, "loss": loss, **labels}
    lds, gaps, checks = [], [], []
    for truth in found:
        kept = controls if truth.design != "matched" else {"response-length": length}
        lds += lds_rows(truth.subsets, truth.outcomes, every, kept, design=truth.design)
        gaps += differences(truth.subsets, truth.outcomes, every,
                            list(combinations(scores, 2)), design=truth.design)  # fmt: skip
        checks += explained_by_trivial(truth.subsets, truth.outcomes, scores, trivial,
                                       design=truth.design)  # fmt: skip
    for name, rows in (("lds", lds), ("lds_differences", gaps), ("trivial", checks),
                       ("planted", _planted(ready, every)), ("costs", costs)):  # fmt: skip
        if rows:
            run.write_table(name, table_of(rows))
    long = [(m, t, i, v) for m, of in scores.items() for t, by in of.items() for i, v in by.items()]
    columns = [list(column) for column in zip(*long, strict=True)]
    run.write_table("scores", pa.table(columns, schema=SCORES))
    run.write_json("compare", {"methods": list(scores), "baselines": list(baselines)})


def _label_indicators(ready: Ready) -> dict[str, dict[str, float]]:
    """For every label: 1 for its pairs, 0 for the others. Their sums are the counts of labels."""
    labels = sorted({pair.label for pair in ready.pairs})
    return {
        f"label {label}": {pair.id: float(pair.label == label) for pair in ready.pairs}
        for label in labels if len(labels) > 1
    }  # fmt: skip


def _planted(ready: Ready, scores: Scores) -> list[PlantedRow]:
    """AUC of the pairs that the column ``planted`` marks; none where there is no such column."""
    planted = {pair.id for pair in ready.pairs if pair.flags.get("planted") in (True, "true", 1)}
    if not planted or len(planted) == len(ready.pairs.pairs):
        return []
    rows = []
    for method, of in scores.items():
        for target, values in of.items():
            found = auc(values, planted)
            rows.append(PlantedRow(
                method, target, found.value, found.lo, found.hi,
                precision_at_k(values, planted, len(planted)), found.planted, found.others,
            ))  # fmt: skip
    return rows
