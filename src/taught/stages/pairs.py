"""The designs ``unlearn`` and ``teach`` of the stage ``validate``: named documents against random ones like them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from taught.core.names import TargetName
from taught.data.columns import name_ids, written
from taught.errors import UserError
from taught.run.folder import RunFolder
from taught.stages.ready import Ready
from taught.stages.scored import read_scores, run_targets
from taught.study.schema import Study
from taught.training.retrain import Retraining, Unlearn
from taught.validation.pairs import ARMS, Measured, PairRow, Plan, foreseen_change, pair_rows, plan_pairs, set_name


def plan_of(study: Study, ready: Ready, scores: Mapping[str, float]) -> Plan:
    """The sets of both designs, by the influence of each example on the target that documents are named by."""
    spec = study.validation
    documents = {example.id: example.document or example.id for example in ready.examples}
    return plan_pairs(
        scores,
        documents,
        topics_of(study, ready),
        {example.id: example.n_scored for example in ready.inputs},
        spec.named_of(len(set(documents.values()))),
        spec.pairs,
        seed=spec.seed,
    )


def topics_of(study: Study, ready: Ready) -> dict[str, str]:
    """Document -> its value in the column ``validation.alike``; the same for all without one.

    Raises
    ------
    UserError
        No example has this column, or some have no value in it.
    """
    column, records = study.validation.alike, list(ready.examples)
    cells = [""] * len(records) if column is None else ready.examples.column(column)
    texts = ["" if cell is None or cell != cell else written(cell) for cell in cells]  # NaN is a gap as well
    found = {record.document or record.id: text for record, text in zip(records, texts, strict=True)}
    if missing := sorted(document for document, text in found.items() if column and not text):
        raise UserError(
            f"{len(missing)} of {len(found)} documents have no value in the column {column!r}",
            value=name_ids(missing),
            rule="random documents hold as many of each value as the named ones",
            fix="set validation.alike to a column that all of them have, or to null: only as many tokens",
        )
    return found


def how_to_forget(study: Study, ready: Ready) -> Unlearn:
    """Steps, rate and guard of the design ``unlearn``.

    Raises
    ------
    UserError
        No group or category of the prompts has the name of the guard.
    """
    spec, readings = study.validation, ready.readings
    guard = None
    if spec.guard is not None:
        check_guard(spec.guard, [*readings.groups, *readings.categories])
        guard = tuple({**readings.categories, **readings.groups}[spec.guard])
    return Unlearn(spec.unlearn_steps, spec.unlearn_lr, guard, spec.guard_keep)


def check_guard(name: str, known: Sequence[str]) -> None:
    """Refuse a guard that is no group or category of the prompts."""
    if name not in known:
        raise UserError(
            "no prompts have the name of the guard",
            value=name,
            rule="groups and categories: " + ", ".join(known),
            fix="set validation.guard to one of them, or to null: the loss of the examples that are retained",
        )


def verdicts(
    study: Study,
    run: RunFolder,
    plans: Mapping[str, Plan],
    named_by: TargetName,
    made: Mapping[tuple[str, str, int], Retraining],
    outcomes: Sequence[tuple[Any, ...]],
) -> list[PairRow]:
    """What forgetting the named documents, or training on them alone, did to each target, against random ones.

    Parameters
    ----------
    plans : design -> its sets
    outcomes : design, set, pair, target, change
    """
    changed = {tuple(row[:4]): float(row[4]) for row in outcomes}
    scored = set(run_targets(run))
    names = [name for name in dict.fromkeys(str(row[3]) for row in outcomes) if name in scored]
    scores = read_scores(run, names)
    influence = {name: scores.by_example(name) for name in names}
    rows = []
    for design, plan in plans.items():
        turned = -1.0 if design == "unlearn" else 1.0
        members = dict(zip(plan.subsets.names, plan.subsets.members, strict=True))
        for k in plan.budgets:
            random = [set_name("random", k, pair) for pair in range(plan.pairs)]
            for arm in ARMS:
                named = set_name(arm, k)
                sides = [(named, pair) for pair in range(plan.pairs)], [(name, i) for i, name in enumerate(random)]
                runs = [[made[design, *key] for key in side] for side in sides]
                stopped = sum(bool(one.forgetting and one.forgetting.stopped) for side in runs for one in side)
                for target, values in influence.items():
                    means = [np.mean([values[i] for i in members[name]]) for name in (named, *random)]
                    foretold = [np.mean([_foretold(study, one, values) for one in side]) for side in runs]
                    a, b = (np.array([changed[design, *key, target] for key in side]) for side in sides)
                    foreseen = turned * float(means[0] - np.mean(means[1:]))
                    predicted = float(foretold[0] - foretold[1])
                    rows.append(Measured(design, arm, target, k, a, b, foreseen, predicted, stopped, plan.same(k)))
    return pair_rows(rows, str(named_by))


def _foretold(study: Study, made: Retraining, influence: Mapping[str, float]) -> float:
    """The change of a target by one run as influence has it; nan where the run's steps are not those of influence."""
    spec, lr = study.validation, study.attribution.lr
    kinds = study.attribution.curvature.kind, study.attribution.trajectory.kind
    if spec.method != "full" or kinds != ("identity", "base"):
        return float("nan")
    if (run := made.forgetting) is not None:
        sides = ((-1, run.forget, run.forget_norms), (1, run.retain, run.retain_norms))
        return sum(
            foreseen_change([ids], [sign * rate / (norm * lr)], influence)
            for sign, batches, norms in sides
            for ids, rate, norm in list(zip(batches, run.lrs, norms, strict=True))[: run.kept]
            if norm > 0
        )
    plain = spec.optimizer == "sgd" and not spec.momentum and not spec.weight_decay and spec.max_grad_norm is None
    if made.log is None or not plain:
        return float("nan")
    return foreseen_change(made.log.ids, [rate / lr for rate in made.log.lrs], influence)


@dataclass(frozen=True)
class ForgettingRow:
    """One run of unlearning.

    Attributes
    ----------
    subset, repeat : what was forgotten, and the pair
    steps, kept : steps that were made, and those that the kept weights have
    stopped : why it stopped before its end; "" where it did not
    rate_first, rate_last : eta
    guard_start, guard_last : the guard before the first step, and when it was looked at last
    forget_first, forget_last, retain_first, retain_last : loss of the batches of the first and the last step
    """

    subset: str
    repeat: int
    steps: int
    kept: int
    stopped: str
    rate_first: float
    rate_last: float
    guard_start: float
    guard_last: float
    forget_first: float
    forget_last: float
    retain_first: float
    retain_last: float


def forgetting_rows(made: Mapping[tuple[str, str, int], Retraining]) -> list[ForgettingRow]:
    """The runs of the design ``unlearn``."""
    rows = []
    for (_, subset, repeat), one in made.items():
        if (run := one.forgetting) is not None:
            series = (run.lrs, [value for _, value in run.guard], run.forget_losses, run.retain_losses)
            ends = [end for values in series for end in ((values[0], values[-1]) if values else (np.nan, np.nan))]
            rows.append(ForgettingRow(subset, repeat, len(run.lrs), run.kept, run.stopped, *ends))
    return rows
