"""Readings: what is read of the evaluation prompts at one set of weights, with ids."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import numpy as np
from numpy.typing import ArrayLike, NDArray

from taught.errors import UserError
from taught.policy.ridge import Policy, Shift, fit_policy

Floats = NDArray[np.float64]


@dataclass(frozen=True, eq=False)
class Readings:
    """Behavior y of N prompts and, where they are read, d columns X.

    Attributes
    ----------
    prompt_ids : N ids, the rows
    y : float64 [N], behavior
    groups : group -> ids of its prompts
    categories : category -> ids of its prompts; none that is also the name of a group
    X : float64 [N, d], activations of features or read-outs of concepts; None where nothing is read
    columns : what the columns of X are: feature ids, or names of concepts
    policy : the ridge regression of y on X, where X are features
    """

    prompt_ids: tuple[str, ...]
    y: Floats
    groups: Mapping[str, Sequence[str]] = field(default_factory=dict)
    categories: Mapping[str, Sequence[str]] = field(default_factory=dict)
    X: Floats | None = None
    columns: tuple[int | str, ...] = ()
    policy: Policy | None = None

    @property
    def n(self) -> int:
        """Number of prompts N."""
        return len(self.prompt_ids)

    def rows(self, name: str | None) -> list[int]:
        """Rows of a group or category of prompts; all rows for None.

        Raises
        ------
        UserError
            There is neither a group nor a category of this name.
        """
        if name is None:
            return list(range(self.n))
        known = {**self.categories, **self.groups}
        if name not in known or not known[name]:
            raise UserError(
                "no prompt is in this group or category",
                value=name,
                rule="one of " + ", ".join(map(str, known)),
                fix="for example behavior:" + next(iter(known), "GROUP"),
            )
        place = {prompt_id: row for row, prompt_id in enumerate(self.prompt_ids)}
        return [place[prompt_id] for prompt_id in known[name] if prompt_id in place]

    def refitted(self, y: ArrayLike, X: ArrayLike | None) -> Readings:
        """The same prompts read at other weights; a policy is fitted to them anew."""
        y = np.asarray(y, dtype=np.float64)
        X = None if X is None else np.asarray(X, dtype=np.float64)
        policy = None
        if self.policy is not None:
            assert X is not None
            old = self.policy
            policy = fit_policy(
                X,
                y,
                prompt_ids=self.prompt_ids,
                feature_ids=old.feature_ids,
                alpha=old.alpha,
                fit_intercept=old.fit_intercept,
            )
        return replace(self, y=y, X=X, policy=policy)


@dataclass(frozen=True, eq=False)
class Moves:
    """What P examples do to the read-outs of N prompts, as sums from which many targets follow.

    Attributes
    ----------
    dy : float64 [P, N], change of the behavior of every prompt
    shift : change of every coefficient along both pathways, [P, d] each; None without a policy
    """

    dy: Floats
    shift: Shift | None = None
