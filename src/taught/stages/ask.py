"""The command ``ask``: a later question to the sketches of a run, without the model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
import pyarrow as pa

from taught.curvatures.autocorrelation import fit_autocorrelation
from taught.errors import UserError
from taught.policy.ridge import Floats, Policy, choose_alpha, fit_policy
from taught.run.folder import RunFolder
from taught.sketches.answer import ask as meet
from taught.sketches.answer import policy_queries
from taught.sketches.store import Row, SketchStore
from taught.study.schema import Study

_TARGETS = "score, coefficient:FEATURE, mean_y:GROUP, mean_y:CATEGORY or y:PROMPT"


@dataclass(frozen=True)
class Question:
    """What is asked of every example.

    Attributes
    ----------
    target : score, coefficient:FEATURE, mean_y:GROUP, mean_y:CATEGORY or y:PROMPT
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


def ask(run: RunFolder, question: Question) -> pa.Table:
    """Effect of one step on each example of the run on the target, from its store of sketches.

    Returns
    -------
    Table with one row an example, strongest first: example_id, label, x, y, total (change of the target
    per step along both pathways and in all), se (standard error of the total).

    Raises
    ------
    UserError
        The run was not attributed with the estimator sketch; the store lacks something or is
        damaged; the question names what the run does not have.
    """
    run.require("attribute")
    if not run.path("sketch.json").is_file():
        raise UserError(
            "this run has no sketches",
            value=run.study.attribution.estimator,
            rule="questions are answered by the estimator sketch",
            fix="taught attribute STUDY --set attribution.estimator=sketch",
        )
    record = run.read_json("sketch")
    store = SketchStore(record["store"])
    table = run.read_table("prompts").select(["prompt_id", "group", "category"]).to_pylist()
    policy = _policy(run, question, {row["prompt_id"]: row for row in table})
    sets = _named_sets(policy, table)
    x, y = _queries(store, policy, question.target, sets, record["prompts"])
    examples = [Row(example_id, digest) for example_id, digest in record["examples"].items()]
    queries = np.stack([x, y], 1)
    if question.curvature == "autocorrelation":
        queries = fit_autocorrelation(store, examples).solve(queries)
    answers = meet(store, examples, queries)
    values = -record["lr"] * answers.values
    unit = record["lr"] * record["error_factor"] / np.sqrt(store.dim)
    return _table(run, examples, values, unit * np.linalg.norm(queries.sum(1)) * answers.norms)


def _policy(run: RunFolder, question: Question, prompts: dict[str, dict[str, Any]]) -> Policy:
    """The run's policy, fitted again as the question says: milliseconds."""
    study = _with(run.study, question)
    arrays, ids = run.read_tensors("activations")
    y = run.read_tensors("readouts")[0]["y"]
    rows = _rows(ids["prompt_ids"], prompts, question.groups)
    columns = _columns(ids["feature_ids"], question.features)
    X, y = arrays["X"][rows][:, columns], y[rows]
    kept = [ids["prompt_ids"][i] for i in rows]
    alpha = study.policy.alpha
    if question.alpha is None:
        alpha = run.read_json("policy")["alpha"]
    elif alpha == "cv":
        alpha, _ = choose_alpha(
            X,
            y,
            fit_intercept=study.policy.intercept,
            prompt_ids=kept,
            folds=study.policy.folds,
            seed=study.policy.seed,
        )
    return fit_policy(
        X,
        y,
        prompt_ids=kept,
        alpha=float(alpha),
        feature_ids=[ids["feature_ids"][j] for j in columns],
        fit_intercept=study.policy.intercept,
    )


def _with(study: Study, question: Question) -> Study:
    """The study with the question's values, checked by the study's own rules."""
    for key, value in (("policy.alpha", question.alpha), ("policy.intercept", question.intercept)):
        study = study if value is None else study.replace(key, value)
    return study


def _rows(ids: Sequence[str], prompts: dict[str, dict[str, Any]], groups: Sequence[str] | None) -> list[int]:
    if groups is None:
        return list(range(len(ids)))
    known = {row[key] for row in prompts.values() for key in ("group", "category")}
    _refuse_unknown("groups or categories", [g for g in groups if g not in known], known)
    wanted = set(groups)
    return [
        i for i, prompt_id in enumerate(ids) if wanted & {prompts[prompt_id]["group"], prompts[prompt_id]["category"]}
    ]


def _columns(ids: Sequence[int], features: Sequence[int] | None) -> list[int]:
    if features is None:
        return list(range(len(ids)))
    _refuse_unknown("features", [k for k in features if k not in ids], ids)
    return [j for j, k in enumerate(ids) if k in features]


def _refuse_unknown(what: str, unknown: Sequence[Any], known: Any) -> None:
    if unknown:
        listed = ", ".join(map(str, sorted(known, key=str)))
        raise UserError(f"the run does not have these {what}", value=unknown, rule=listed, fix="name some of these")


def _named_sets(policy: Policy, table: Sequence[dict[str, Any]]) -> dict[str, list[str]]:
    """Groups and categories -> ids of their prompts, of those in the policy."""
    sets: dict[str, list[str]] = {}
    there = set(policy.prompt_ids)
    for row in table:
        for name in {row["group"], row["category"]} - {None}:
            if row["prompt_id"] in there:
                sets.setdefault(name, []).append(row["prompt_id"])
    return sets


def _queries(
    store: SketchStore, policy: Policy, target: str, sets: dict[str, list[str]], digests: dict[str, str]
) -> tuple[Floats, Floats]:
    """The target's query along both pathways, [K] each."""
    kind, _, name = target.partition(":")
    if kind == "mean_y" and name in sets:
        chosen = {name: sets[name]}
    elif kind == "y" and name in policy.prompt_ids:
        chosen = {name: [name]}
    else:
        chosen = {}
    column = _feature(policy, kind, name)
    if not (chosen or column is not None or target == "score"):
        raise UserError(
            "no such target", value=target, rule=_TARGETS, fix="taught show RUN lists features, groups and categories"
        )
    found, _ = policy_queries(store, policy, chosen, digests)
    if chosen:
        return np.zeros(store.dim), found.few[:, 2]
    if column is not None:
        return found.x[:, column], found.y[:, column]
    return found.few[:, 0], found.few[:, 1]


def _feature(policy: Policy, kind: str, name: str) -> int | None:
    ids = policy.feature_ids.tolist()
    known = kind == "coefficient" and name.isdigit() and int(name) in ids
    return ids.index(int(name)) if known else None


def _table(run: RunFolder, examples: Sequence[Row], values: Floats, se: Floats) -> pa.Table:
    summary = run.read_table("summary").select(["example_id", "label"]).to_pydict()
    label = dict(zip(summary["example_id"], summary["label"], strict=True))
    total = values.sum(1)
    order = np.argsort(-np.abs(total), kind="stable")
    columns = {
        "example_id": [examples[i].id for i in order],
        "label": [label[examples[i].id] for i in order],
        "x": values[order, 0],
        "y": values[order, 1],
        "total": total[order],
        "se": se[order],
    }
    return pa.table(columns)
