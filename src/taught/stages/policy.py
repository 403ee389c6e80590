"""The stage ``policy``: fit and judge the policy on the readings, audit its categories. Needs no model."""

from __future__ import annotations

from typing import Any

import numpy as np
import pyarrow as pa

from taught.features.pooling import pooled_residuals
from taught.policy.audit import audit_categories
from taught.policy.checks import checks, measures
from taught.policy.evaluate import bootstrap_coefficients, evaluate_policy
from taught.policy.faithfulness import Fit, faithfulness
from taught.policy.predictors import Known
from taught.policy.ridge import choose_alpha, fit_policy
from taught.progress import Progress, SilentProgress
from taught.run.folder import RunFolder
from taught.study.schema import Study


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
        arrays, columns = run.read_tensors("activations")
        readouts, _ = run.read_tensors("readouts")
        prompts = run.read_table("prompts").to_pydict()
        spec, X, y, ids, groups = study.policy, arrays["X"], readouts["y"], prompts["prompt_id"], prompts["group"]
        draws: dict[str, Any] = {"fit_intercept": spec.intercept, "seed": spec.seed, "prompt_ids": ids}
        sides: dict[str, Any] = dict(zip(("positive", "negative"), study.prompts.sides, strict=True))
        tried: list[dict[str, float]] = []
        if spec.alpha == "cv":
            alpha, tried = choose_alpha(X, y, folds=spec.folds, **draws)
        else:
            alpha = float(spec.alpha)
        given = None if spec.alpha == "cv" else alpha
        feature_ids = columns["feature_ids"]
        fitted = fit_policy(X, y, prompt_ids=ids, feature_ids=feature_ids, alpha=alpha, fit_intercept=spec.intercept)
        length, resamples = prompts["n_tokens"], spec.bootstrap
        judged = evaluate_policy(
            X, y, groups, alpha=given, folds=spec.folds, bootstrap=resamples, prompts_length=length, **sides, **draws
        )
        intervals = bootstrap_coefficients(X, y, alpha=alpha, n=resamples, **draws)
        categories = [category or None for category in prompts["category"]]
        audit = audit_categories(y, groups, categories, X, fitted, intervals.lo, intervals.hi, seed=spec.seed, **sides)
        run.write_table("audit", pa.Table.from_pylist(audit))
        labels = {int(feature): item["label"] for feature, item in run.read_json("labels").items()}
        table = {
            "feature_id": fitted.feature_ids,
            "coef": fitted.coef,
            "lo": intervals.lo,
            "hi": intervals.hi,
            "sign_stability": intervals.sign_stability,
            "label": [labels[i] for i in fitted.feature_ids.tolist()],
        }
        run.write_table("coefficients", pa.table(table))
        facts = run.read_json("readings")
        fit = {"alpha": alpha, "alpha_table": tried, "intercept_value": fitted.intercept, "intercept": spec.intercept}
        run.write_json("policy", {**judged.to_dict(), **fit, **facts})
        known = Known(
            groups,
            *study.prompts.sides,
            categories=prompts["category"],
            length=np.array(length, dtype=np.float64),
            h=pooled_residuals(readouts["h"], readouts["offsets"], facts["readout"]),
            texts=prompts["text"],
        )
        how = Fit(given, spec.intercept, spec.seed)
        card = faithfulness(X, y, known, judged, intervals, fit=how, alpha=alpha, bootstrap=resamples, prompt_ids=ids)
        graded = [check.to_dict() for check in checks(measures(judged, card, y))]
        run.write_json("faithfulness", {"checks": graded, **card.to_dict(list(feature_ids))})
        run.write_table("predictions", pa.table({"prompt_id": ids, "y_hat": judged.y_hat}))
