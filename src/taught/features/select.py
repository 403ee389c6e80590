"""Choose the features a policy is written in: those whose mean differs between two groups.

    selected:  |mean_positive(X_k) - mean_negative(X_k)| > threshold,  the largest first

(SMDA, arXiv 2606.29171, section 3: threshold 0.1 on harmful against harmless prompts gave 75.) Features that are active
on nearly every prompt are selected like others and marked ``always_on``: their coefficient reads size, not presence.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import ArrayLike

from taught.errors import UserError, misfit, refuse, refuse_repeated
from taught.features.sae_config import refuse_unknown
from taught.stats.arrays import Bools, Floats, Ints

ALWAYS_ON = 0.99


@dataclass(frozen=True, eq=False)
class Selection:
    """Which features were chosen, and what was known of all of them.

    Attributes
    ----------
    feature_ids : int64 [d], ascending: the one order of columns and coefficients everywhere
    means : group -> float64 [F], mean activation over its prompts
    difference : float64 [F], mean of the positive group minus mean of the negative group
    rate : float64 [F], share of all prompts on which the feature is active (activation > 0)
    always_on : bool [F], ``rate`` is at least 0.99
    """

    feature_ids: Ints
    means: Mapping[str, Floats]
    difference: Floats
    rate: Floats
    always_on: Bools


def select_features(
    acts: ArrayLike,
    groups: Sequence[str],
    *,
    positive: str,
    negative: str,
    threshold: float = 0.1,
    max_features: int = 75,
    ids: Sequence[int] | None = None,
) -> Selection:
    """Select features by the difference of their group means, or take the ids given.

    Parameters
    ----------
    acts : [N, F], pooled activations of all features, one row per prompt
    groups : N group names
    positive, negative : the two groups that are compared; others count for ``rate`` and ``means`` only
    threshold : smallest absolute difference (exclusive), in units of the activations
    max_features : at most so many: those with the largest absolute difference; of equals the smaller id
    ids : take exactly these; threshold and ``max_features`` are not applied

    Raises
    ------
    UserError
        A group without prompts, no feature above the threshold, an id out of range or twice,
        activations that are not finite.
    """
    X = np.asarray(acts, dtype=np.float64)
    names = np.asarray(groups, dtype=object)
    if X.ndim != 2 or len(X) != len(names):
        raise misfit("activations and groups", "one row and one group per prompt", activations=X, groups=names)
    bad = np.flatnonzero(~np.isfinite(X).all(axis=1)).tolist()
    refuse([f"prompt {i}" for i in bad], "activations are not finite", rule="finite numbers", fix="use dtype float32")
    means = {str(g): X[names == g].mean(axis=0) for g in sorted(set(names.tolist()))}
    if not {positive, negative} <= means.keys() or positive == negative:
        raise UserError(
            "features are selected between two groups of prompts",
            value=f"{positive!r} against {negative!r}; groups: {sorted(means)}",
            rule="both groups have prompts, and they differ",
            fix="set prompts.positive_group and prompts.negative_group, or name features.ids",
        )
    difference = means[positive] - means[negative]
    rate = (X > 0).mean(axis=0)
    if ids is None:
        size = np.abs(difference)
        order = np.argsort(-size, kind="stable")[:max_features]
        chosen = np.sort(order[size[order] > threshold]).astype(np.int64)
        if not len(chosen):
            raise UserError(
                "no feature tells the groups apart",
                value=f"largest difference of means {size.max(initial=0.0):.3g}",
                rule=f"above {threshold:g} (features.threshold)",
                fix="lower features.threshold, or name features.ids",
            )
    else:
        if not len(ids):
            rule, fix = "features.ids names at least one", "leave features.ids out to have them selected"
            raise UserError("no features given", value=[], rule=rule, fix=fix)
        refuse_unknown(ids, X.shape[1])
        refuse_repeated(ids, "a feature in features.ids")
        chosen = np.sort(np.asarray(ids, dtype=np.int64))
    return Selection(chosen, means, difference, rate, rate >= ALWAYS_ON)
