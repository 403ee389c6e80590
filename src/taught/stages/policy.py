"""The stage ``policy``: fit and judge the policy on the readings, audit its categories. Needs no model."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from taught.features.pooling import pooled_residuals
from taught.policy.audit import audit_categories
from taught.policy.checks import checks, measures
from taught.policy.evaluate import CoefficientIntervals, Evaluation, bootstrap_coefficients, evaluate_policy
from taught.policy.faithfulness import Fit, faithfulness
from taught.policy.predictors import Known
from taught.policy.ridge import choose_alpha, fit_policy
from taught.progress import Progress, SilentProgress
from taught.run.folder import RunFolder
from taught.study.schema import Study


@dataclass(frozen=True, eq=False)
class _Readings:
    """What the policy is made of, as the stage ``readings`` wrote it."""

    X: np.ndarray
    y: np.ndarray
    h: np.ndarray
    feature_ids: np.ndarray
    prompts: dict[str, list[Any]]
    labels: dict[int, str]
    facts: dict[str, Any]


def policy(study: Study, run: RunFolder, progress: Progress | None = None) -> None:
    """Fit and judge the policy, audit its categories; every random draw follows prompt ids.

    Raises
    ------
    UserError
        The readings are missing or of another study; too few prompts.
    """
    progress = progress or SilentProgress()
    with run.stage("policy", study) as stage:
        if stage.done:
            return
        progress.step("fit and judge the policy")
        _write_policy(study, run, _readings(run))


def _readings(run: RunFolder) -> _Readings:
    arrays, ids = run.read_tensors("activations")
    readouts, _ = run.read_tensors("readouts")
    facts = run.read_json("readings")
    return _Readings(
        arrays["X"],
        readouts["y"],
        pooled_residuals(readouts["h"], readouts["offsets"], facts["readout"]),
        np.array(ids["feature_ids"]),
        run.read_table("prompts").to_pydict(),
        {int(feature): item["label"] for feature, item in run.read_json("labels").items()},
        facts,
    )


def _write_policy(study: Study, run: RunFolder, read: _Readings) -> None:
    """Fit, judge out of fold, resample, audit."""
    spec, X, y, ids = study.policy, read.X, read.y, read.prompts["prompt_id"]
    groups = read.prompts["group"]
    draws: dict[str, Any] = {"fit_intercept": spec.intercept, "seed": spec.seed, "prompt_ids": ids}
    positive, negative = study.prompts.sides
    tried: list[dict[str, float]] = []
    if spec.alpha == "cv":
        alpha, tried = choose_alpha(X, y, folds=spec.folds, **draws)
    else:
        alpha = float(spec.alpha)
    fitted = fit_policy(X, y, prompt_ids=ids, feature_ids=read.feature_ids, alpha=alpha, fit_intercept=spec.intercept)
    judged = evaluate_policy(
        X,
        y,
        groups,
        alpha=None if spec.alpha == "cv" else alpha,
        folds=spec.folds,
        bootstrap=spec.bootstrap,
        prompts_length=read.prompts["n_tokens"],
        positive=positive,
        negative=negative,
        **draws,
    )
    intervals = bootstrap_coefficients(X, y, alpha=alpha, n=spec.bootstrap, **draws)
    categories = [category or None for category in read.prompts["category"]]
    audit = audit_categories(
        y,
        groups,
        categories,
        X,
        fitted,
        intervals.lo,
        intervals.hi,
        positive=positive,
        negative=negative,
        seed=spec.seed,
    )
    run.write_table("audit", pa.Table.from_pylist(audit))
    columns = {
        "feature_id": fitted.feature_ids,
        "coef": fitted.coef,
        "lo": intervals.lo,
        "hi": intervals.hi,
        "sign_stability": intervals.sign_stability,
        "label": [read.labels[i] for i in fitted.feature_ids.tolist()],
    }
    run.write_table("coefficients", pa.table(columns))
    fit = {"alpha": alpha, "alpha_table": tried, "intercept_value": fitted.intercept, "intercept": spec.intercept}
    run.write_json("policy", {**judged.to_dict(), **fit, **read.facts})
    _write_faithfulness(run, study, read, judged, intervals, alpha)
    run.write_table("predictions", pa.table({"prompt_id": ids, "y_hat": judged.y_hat}))


def _write_faithfulness(
    run: RunFolder, study: Study, read: _Readings, judged: Evaluation, intervals: CoefficientIntervals, alpha: float
) -> None:
    """The faithfulness card and its numbered checks."""
    spec, ids = study.policy, read.prompts["prompt_id"]
    known = Known(
        read.prompts["group"],
        *study.prompts.sides,
        categories=read.prompts["category"],
        length=np.array(read.prompts["n_tokens"], dtype=np.float64),
        h=read.h,
        texts=read.prompts["text"],
    )
    fit = Fit(None if spec.alpha == "cv" else alpha, spec.intercept, spec.seed)
    card = faithfulness(
        read.X, read.y, known, judged, intervals, fit=fit, alpha=alpha, bootstrap=spec.bootstrap, prompt_ids=ids
    )
    graded = [check.to_dict() for check in checks(measures(judged, card, read.y))]
    record = card.to_dict(read.feature_ids.tolist())
    run.write_json("faithfulness", {"checks": graded, **record})
