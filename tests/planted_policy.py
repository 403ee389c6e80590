"""A planted policy with its evaluation and faithfulness card, for the tests of both."""

from __future__ import annotations

import numpy as np

from taught.policy.evaluate import bootstrap_coefficients, evaluate_policy
from taught.policy.faithfulness import Fit, faithfulness
from taught.policy.predictors import Known


def planted(n=60, d=4, seed=0, noise=0.3):
    """Behavior of two features, one of which follows the group; the others are noise."""
    rng = np.random.default_rng(seed)
    harmful = np.arange(n) % 2 == 0
    X = np.maximum(rng.normal(size=(n, d)), 0)
    X[:, 0] += harmful
    y = 2 * X[:, 0] - 1.5 * X[:, 1] + noise * rng.normal(size=n) - 4
    return X, y, ["harmful" if h else "harmless" for h in harmful], [f"p{i:03d}" for i in range(n)]


def made(X, y, groups, ids=None, *, alpha=1.0, fit_intercept=True, bootstrap=40, **known):
    fit = Fit(alpha, fit_intercept, 3)
    options = dict(fit_intercept=fit_intercept, seed=3, prompt_ids=ids)
    result = evaluate_policy(
        X,
        y,
        groups,
        alpha=alpha,
        folds=4,
        bootstrap=bootstrap,
        positive="harmful",
        negative="harmless",
        prompts_length=known.get("length"),
        **options,
    )
    used = 1.0 if alpha is None else alpha
    intervals = bootstrap_coefficients(X, y, alpha=used, n=bootstrap, **options)
    known = Known(groups, "harmful", "harmless", **known)
    card = faithfulness(X, y, known, result, intervals, fit=fit, alpha=used, bootstrap=bootstrap, prompt_ids=ids)
    return result, card
