"""Later questions to the sketches of a run, without the model."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

import numpy as np

from taught.core.readings import Readings
from taught.core.scores import Scores
from taught.core.target import TargetSet
from taught.curvatures.autocorrelation import fit_autocorrelation
from taught.errors import UserError
from taught.run.folder import RunFolder
from taught.sketches.answer import answer, stored_queries, theory_error
from taught.sketches.store import Row, SketchStore
from taught.stages.ready import run_readings, with_policy


@dataclass(frozen=True)
class Question:
    """What is asked of every example.

    Attributes
    ----------
    target : its name
    alpha : ridge penalty, "cv", or None for the run's
    intercept : None for the run's
    features : ids of the policy's features, or None for the run's
    groups : fit the policy on the prompts of these groups or categories only, or None
    curvature : identity, or autocorrelation of the run's examples
    """

    target: str = "score"
    alpha: float | Literal["cv"] | None = None
    intercept: bool | None = None
    features: tuple[int, ...] | None = None
    groups: tuple[str, ...] | None = None
    curvature: Literal["identity", "autocorrelation"] = "identity"


def ask(run: RunFolder, question: Question) -> Scores:
    """Effect of one step on each example of the run on a target, from its store of sketches.

    Returns
    -------
    Scores of the target (of one with pathways, along each too), with standard errors.

    Raises
    ------
    UserError
        The run has no sketches; the store lacks something or is damaged; the question names what the run does not have.
    """
    run.require("attribute")
    made = run.read_json("attribution")
    record = made.get("sketches")
    if record is None and made["unit"] == "rank":
        raise UserError(
            "the run's values only rank examples, and answer no later question",
            value=str(run.study.attribution.curvature.kind),
            rule="later questions are answered by plain sketches, or in the curvature autocorrelation",
            fix="taught run STUDY --set attribution.curvature=identity",
        )
    if record is None:
        raise UserError(
            "this run has no sketches",
            value=run.study.attribution.estimator.kind,
            rule="later questions are answered by the estimator sketch",
            fix="taught run STUDY --set attribution.estimator=sketch",
        )
    store = SketchStore(record["store"])
    targets = TargetSet.of([question.target], _readings(run, question))
    queries, _ = stored_queries(store, targets, record["prompts"])
    rows = [Row(example_id, digest) for example_id, digest in record["rows"].items()]
    if question.curvature == "autocorrelation":
        queries = fit_autocorrelation(store, rows).solve(queries)
    direct = [targets.names.index(name) for name in targets.direct]  # totals are sums of their pathways
    found, lr = answer(store, rows, queries[:, direct]), made["lr"]
    se = record["error_factor"] * theory_error(found.norms, queries, lr)
    method = "sketch" if question.curvature == "identity" else f"sketch+{question.curvature}"
    ids = tuple(row.id for row in rows)
    return Scores(method, ids, targets.names, -lr * targets.from_direct(found.values), se, found.losses)


def _readings(run: RunFolder, question: Question) -> Readings:
    """The run's readings with the policy fitted again as the question says: milliseconds."""
    readings, study = run_readings(run), run.study
    for key, value in (("policy.alpha", question.alpha), ("policy.intercept", question.intercept)):
        study = study if value is None else study.replace(key, value)
    policy = readings.policy
    if policy is None:
        return readings
    rows = list(range(readings.n))
    if question.groups is not None:
        rows = sorted({row for name in question.groups for row in readings.rows(name)})
    known = policy.feature_ids.tolist()
    wanted = known if question.features is None else list(question.features)
    if unknown := [k for k in wanted if k not in known]:
        rule = "one of " + ", ".join(map(str, sorted(known)))
        raise UserError("the run does not have these features", value=unknown, rule=rule, fix="name some of these")
    columns = [j for j, k in enumerate(known) if k in set(wanted)]
    ids = tuple(readings.prompt_ids[i] for i in rows)
    alpha = policy.alpha if question.alpha is None else study.policy.alpha
    some = replace(readings, prompt_ids=ids, y=np.array(policy.y[rows]))
    return with_policy(study, some, policy.X[rows][:, columns], [known[j] for j in columns], alpha)
