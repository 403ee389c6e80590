"""Answers from a store of sketches.

    effect(target, example) = - lr < s(grad L(example)), q >,    q = sketch of the target's gradient

A target's gradient is a sum of gradients of y and of features over the prompts, and a sketch is
linear, so q is the same sum of sketches (:class:`QueryBuilder`), and no model is needed.

Error: each inner product of sketches has a standard deviation of about |s(G)| |q| / sqrt(K) around
the true one. The factor in front is measured: a sample of the examples is given to the exact adjoint
as well (:func:`error_factor`), and what comes out stands beside every value.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from taught.core.readings import Moves, Readings
from taught.core.target import TargetSet
from taught.errors import UserError
from taught.policy.ridge import pathway_sums
from taught.sketches.store import Row, SketchStore
from taught.stats.arrays import Floats
from taught.targets.policy import combine_raw_x

Singles = NDArray[np.float32]


class QueryBuilder:
    """Sums the sketches of prompts into queries, a few rows at a time.

    With Z_ik = s(grad X_ik), T_i = sum_k W_k Z_ik and r = y - X W, the sums of
    ``taught.targets.policy.RawX`` are F_k = sum_i r_i Z_ik - X_ik T_i (and sum_i T_i for the
    intercept); what follows from sums of dX and dy follows from sums of sketches likewise, being linear.

    Parameters
    ----------
    readings : of prompts and features that the sketches are of
    dim : K
    """

    def __init__(self, readings: Readings, dim: int) -> None:
        self._readings, policy = readings, readings.policy
        self._r = np.zeros((0 if policy is None else policy.d, dim))
        self._T = np.zeros((readings.n if policy is not None else 0, dim))
        self._y = np.zeros((readings.n, dim), dtype=np.float32)
        self._row = {prompt_id: i for i, prompt_id in enumerate(readings.prompt_ids)}
        ids = [] if policy is None else policy.feature_ids.tolist()
        self._column = {k: j for j, k in enumerate(ids)}

    def add(self, prompt_ids: Sequence[str], features: Sequence[int], values: Singles) -> None:
        """Take in rows: feature -1 is y; prompts and features that are not asked about are left out.

        A row must be handed in once.
        """
        kept = [
            (n, self._row[i], self._column.get(k, -1))
            for n, (i, k) in enumerate(zip(prompt_ids, features, strict=True))
            if i in self._row and (k < 0 or k in self._column)
        ]
        if not kept:
            return
        numbers, rows, columns = (np.array(part) for part in zip(*kept, strict=True))
        about_y = np.array([features[n] < 0 for n in numbers])
        self._y[rows[about_y]] = values[numbers[about_y]]
        policy = self._readings.policy
        if policy is not None and not about_y.all():
            n, i, j = numbers[~about_y], rows[~about_y], columns[~about_y]
            Z = values[n].astype(np.float64)
            np.add.at(self._r, j, policy.residual[i, None] * Z)
            np.add.at(self._T, i, policy.coef[j, None] * Z)

    def moves(self) -> Moves:
        """The sums as those of K examples, one for each number of a sketch."""
        policy, dy = self._readings.policy, self._y.T.astype(np.float64)
        if policy is None:
            return Moves(dy)
        F = self._r - policy.X.T @ self._T
        if policy.fit_intercept:
            F = np.concatenate([F, self._T.sum(0, keepdims=True)])
        return Moves(dy, pathway_sums(policy, combine_raw_x(policy, F.T), dy @ policy.Xc))


def stored_queries(store: SketchStore, targets: TargetSet, digests: Mapping[str, str]) -> tuple[Floats, Moves]:
    """Queries [K, T] of targets that follow from prompts and features, and the sums that they are made of.

    Parameters
    ----------
    digests : prompt id -> digest of its tokens (``fill.prompt_key``)

    Raises
    ------
    UserError
        The store lacks prompts or features of the targets.
    """
    covered, readings = covered_features(store), targets.readings
    wanted = {-1} if readings.policy is None else {-1, *readings.policy.feature_ids.tolist()}
    lacking = {i: wanted - covered.get((i, digests.get(i, "")), set()) for i in readings.prompt_ids}
    prompts = [i for i, missing in lacking.items() if missing]
    if prompts:
        features = sorted(set.union(*lacking.values()) - {-1})
        raise UserError(
            "the store lacks some sketches of these targets",
            value=f"{len(prompts)} prompts ({', '.join(prompts[:5])}), features {features[:10]}",
            rule="every prompt with y and every feature of the policy",
            fix="taught run STUDY --only attribute, with the same store, computes what is missing",
        )
    builder, seen = QueryBuilder(readings, store.dim), set[Row]()
    for shard, values in store.read("prompts"):
        new = [n for n, row in enumerate(shard.rows) if row not in seen and digests.get(row.id) == row.digest]
        seen.update(shard.rows[n] for n in new)
        rows = [shard.rows[n] for n in new]
        builder.add([row.id for row in rows], [row.feature for row in rows], values[new])
    moves = builder.moves()
    return targets.combine(moves), moves


def covered_features(store: SketchStore) -> dict[tuple[str, str], set[int]]:
    """For each prompt (id, digest) what was looked for on it; -1 is y."""
    covered: dict[tuple[str, str], set[int]] = {}
    for shard in store.shards("prompts"):
        for key in shard.prompts:
            covered.setdefault(key, set()).update(shard.features, (-1,))
    return covered


@dataclass(frozen=True, eq=False)
class Answers:
    """Inner products of examples with queries.

    Attributes
    ----------
    values : float64 [P, Q], <s(example), query>
    norms : float64 [P], |s(example)|
    losses : float64 [P]
    """

    values: Floats
    norms: Floats
    losses: Floats


def answer(store: SketchStore, examples: Sequence[Row], queries: Floats | Singles) -> Answers:
    """Meet examples with queries [K, Q]; one shard of examples is in memory at a time.

    Raises
    ------
    UserError
        The store lacks examples; a shard is damaged.
    """
    values = np.full((len(examples), queries.shape[1]), np.nan)
    norms, losses = np.full(len(examples), np.nan), np.full(len(examples), np.nan)
    q = queries.astype(np.float32)
    for ours, rows, own in store.examples({row: n for n, row in enumerate(examples)}):
        values[ours], norms[ours], losses[ours] = rows @ q, np.linalg.norm(rows, axis=1), own
    lacking = [row.id for row, norm in zip(examples, norms, strict=True) if np.isnan(norm)]
    if lacking:
        raise UserError(
            "the store lacks some examples",
            value=f"{len(lacking)}: {lacking[:5]}",
            rule="every example that is asked about",
            fix="taught run STUDY --only attribute, with the same store, computes what is missing",
        )
    return Answers(values, norms, losses)


def theory_error(example_norms: Floats, queries: Floats, lr: float) -> Floats:
    """lr |s(example)| |q| / sqrt(K) of examples [P] and queries [K, Q]: [P, Q]."""
    return lr / np.sqrt(len(queries)) * np.outer(example_norms, np.linalg.norm(queries, axis=0))


def error_factor(found: Floats, exact: Floats, scale: Floats) -> float:
    """Root mean square of found - exact in units of ``scale``, the error of the theory."""
    used = scale > 0
    return float(np.sqrt(np.mean(((found - exact)[used] / scale[used]) ** 2))) if used.any() else 0.0
