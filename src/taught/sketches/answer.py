"""Answers from a store of sketches, without the model.

    effect(target, example) = - lr < s(grad L(example)), q >,    q = sketch of the target's gradient

A target's gradient is a sum of gradients of y and of features over the prompts, and a sketch is
linear, so q is the same sum of sketches (:class:`QueryBuilder`).

Error: each inner product of sketches has a standard deviation of about |s(G)| |q| / sqrt(K) around
the true one. The factor in front is measured: a sample of the examples is given to the exact adjoint
as well (:func:`measure_error`), and what comes out stands beside every value.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from taught.core.target import combine_raw_x
from taught.errors import UserError
from taught.policy.ridge import Floats, Policy, pathway_sums
from taught.sketches.store import Row, SketchStore

Singles = NDArray[np.float32]
# Target, column of the feature, group, pathway.
Name = tuple[str, int | None, str | None, str]


@dataclass(frozen=True, eq=False)
class Queries:
    """What a policy asks of an example's sketch: effect = - lr <s(example), query>.

    Attributes
    ----------
    few : float64 [K, 2 + G], the score along pathways x and y, then each group's mean y
    x, y : float64 [K, d], every coefficient along both pathways
    groups : names of the G groups
    """

    few: Floats
    x: Floats
    y: Floats
    groups: tuple[str, ...]

    def norms(self) -> dict[Name, float]:
        """|q| of every target, by its name."""
        columns: dict[Name, Floats] = {}
        for name, column, x, y in (
            ("score", None, *self.few[:, :2].T),
            *(("coefficient", j, self.x[:, j], self.y[:, j]) for j in range(self.x.shape[1])),
        ):
            for pathway, query in (("x", x), ("y", y), ("total", x + y)):
                columns[name, column, None, pathway] = query
        for n, group in enumerate(self.groups):
            columns["mean_y", None, group, "y"] = self.few[:, 2 + n]
        return {name: float(np.linalg.norm(query)) for name, query in columns.items()}


class QueryBuilder:
    """Sums the sketches of prompts into the queries of one policy, a few rows at a time.

    With Z_ik = s(grad X_ik), T_i = sum_k W_k Z_ik and r = y - X W, the sums of ``raw_x_targets``
    are F_k = sum_i r_i Z_ik - X_ik T_i (and sum_i T_i for the intercept); what follows from sums
    of dX and dy follows from sums of sketches likewise, being linear (``taught.core.target``).

    Parameters
    ----------
    policy : the policy, over prompts and features that the sketches are of
    dim : K
    """

    def __init__(self, policy: Policy, dim: int) -> None:
        self.policy = policy
        self._r = np.zeros((policy.d, dim))
        self._T = np.zeros((policy.n, dim))
        self.y = np.zeros((policy.n, dim), dtype=np.float32)
        self._row = {prompt_id: i for i, prompt_id in enumerate(policy.prompt_ids)}
        self._column = {int(k): j for j, k in enumerate(policy.feature_ids)}

    def add(self, prompt_ids: Sequence[str], features: Sequence[int], values: Singles) -> None:
        """Take in rows: feature -1 is y; prompts and features that the policy lacks are left out.

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
        self.y[rows[about_y]] = values[numbers[about_y]]
        n, i, j = numbers[~about_y], rows[~about_y], columns[~about_y]
        Z = values[n].astype(np.float64)
        np.add.at(self._r, j, self.policy.residual[i, None] * Z)
        np.add.at(self._T, i, self.policy.coef[j, None] * Z)

    def queries(self, groups: Mapping[str, Sequence[str]]) -> Queries:
        """The policy's queries; ``groups``: group -> ids of its prompts."""
        policy = self.policy
        F = self._r - policy.X.T @ self._T
        if policy.fit_intercept:
            F = np.concatenate([F, self._T.sum(0, keepdims=True)])
        y = self.y.astype(np.float64)
        shift = pathway_sums(policy, combine_raw_x(policy, F.T), y.T @ policy.Xc)
        means = [y[[self._row[i] for i in ids]].mean(0) for ids in groups.values()]
        few = np.stack([shift.x @ policy.coef, shift.y @ policy.coef, *means], 1)
        return Queries(few, shift.x, shift.y, tuple(groups))


def policy_queries(
    store: SketchStore, policy: Policy, groups: Mapping[str, Sequence[str]], digests: Mapping[str, str]
) -> tuple[Queries, Singles]:
    """Queries of a policy, and the sketches of y [N, K] in its order of prompts.

    Parameters
    ----------
    groups
        Group -> ids of its prompts.
    digests
        Prompt id -> digest of its tokens (``fill.prompt_key``).

    Raises
    ------
    UserError
        The store lacks prompts or features of the policy.
    """
    _refuse_missing(store, policy, digests)
    builder, seen = QueryBuilder(policy, store.dim), set[Row]()
    for shard, values in store.read("prompts"):
        new = [n for n, row in enumerate(shard.rows) if row not in seen and digests.get(row.id) == row.digest]
        seen.update(shard.rows[n] for n in new)
        rows = [shard.rows[n] for n in new]
        builder.add([row.id for row in rows], [row.feature for row in rows], values[new])
    return builder.queries(groups), builder.y


def _refuse_missing(store: SketchStore, policy: Policy, digests: Mapping[str, str]) -> None:
    covered = covered_features(store)
    wanted = set(policy.feature_ids.tolist()) | {-1}
    lacking = {i: wanted - covered.get((i, digests.get(i, "")), set()) for i in policy.prompt_ids}
    prompts = [i for i, missing in lacking.items() if missing]
    if prompts:
        features = sorted(set.union(*lacking.values()) - {-1})
        raise UserError(
            "the store lacks some sketches of this policy",
            value=f"{len(prompts)} prompts ({', '.join(prompts[:5])}), features {features[:10]}",
            rule="every prompt with y and every feature of the policy",
            fix="taught sketch STUDY, with the same store, computes what is missing",
        )


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


def ask(store: SketchStore, examples: Sequence[Row], queries: Floats | Singles) -> Answers:
    """Meet examples with queries [K, Q]; one shard of examples is in memory at a time.

    Raises
    ------
    UserError
        The store lacks examples; a shard is damaged.
    """
    place = {row: n for n, row in enumerate(examples)}
    values = np.full((len(examples), queries.shape[1]), np.nan)
    norms, losses = np.full(len(examples), np.nan), np.full(len(examples), np.nan)
    q = queries.astype(np.float32)
    for shard in store.shards("examples"):
        found = [(n, place[row]) for n, row in enumerate(shard.rows) if row in place]
        if found:
            theirs, ours = map(list, zip(*found, strict=True))
            rows = store.values(shard)[theirs]
            values[ours], norms[ours] = rows @ q, np.linalg.norm(rows, axis=1)
            losses[ours] = np.array(shard.losses)[theirs]
    lacking = [row.id for row, norm in zip(examples, norms, strict=True) if np.isnan(norm)]
    if lacking:
        raise UserError(
            "the store lacks some examples",
            value=f"{len(lacking)}: {lacking[:5]}",
            rule="every example that is asked about",
            fix="taught sketch STUDY, with the same store",
        )
    return Answers(values, norms, losses)


@dataclass(frozen=True, eq=False)
class SketchError:
    """Standard error of every effect: unit * |s(example)| * |q|, in the unit of the effect.

    Attributes
    ----------
    factor : measured against the exact adjoint; about 1 when the errors are those of the theory
    unit : lr * factor / sqrt(K)
    example_norms : float64 [P]
    query_norms : |q| of every target
    sample : what the factor was measured on, one row an example and target
    """

    factor: float
    unit: float
    example_norms: Floats
    query_norms: Mapping[Name, float]
    sample: tuple[dict[str, Any], ...]

    def of(self, target: str, column: int | None, group: str | None, pathway: str) -> Floats:
        """Standard errors of one target's effects, float64 [P]."""
        return self.unit * self.query_norms[target, column, group, pathway] * self.example_norms


def theory_error(example_norms: Floats, queries: Floats, lr: float) -> Floats:
    """lr |s(example)| |q| / sqrt(K) of examples [P] and queries [K, Q]: [P, Q]."""
    return lr / np.sqrt(len(queries)) * np.outer(example_norms, np.linalg.norm(queries, axis=0))


def error_factor(found: Floats, exact: Floats, scale: Floats) -> float:
    """Root mean square of found - exact in units of ``scale``, the error of the theory."""
    used = scale > 0
    return float(np.sqrt(np.mean(((found - exact)[used] / scale[used]) ** 2)))


def measure_error(
    queries: Queries,
    example_norms: Floats,
    lr: float,
    ids: Sequence[str],
    chosen: Sequence[int],
    exact: Floats,
    few: Floats,
) -> SketchError:
    """Compare effects by sketches with exact ones on a sample.

    The factor is the root mean square of (sketch - exact) sqrt(K) / (lr |s(example)| |q|).

    Parameters
    ----------
    example_norms : [P]
    ids, chosen : the sample's n examples, and their places among the P
    exact : [n, 2 + G], by the adjoint
    few : [P, 2 + G], by sketches
    """
    scale = theory_error(example_norms[chosen], queries.few, lr)
    found = few[chosen]
    factor = error_factor(found, exact, scale)
    names = ["score:x", "score:y", *(f"mean_y:{group}" for group in queries.groups)]
    sample = tuple(
        {
            "example_id": example_id,
            "target": name,
            "exact": exact[n, t],
            "sketch": found[n, t],
            "se": factor * scale[n, t],
        }
        for n, example_id in enumerate(ids)
        for t, name in enumerate(names)
    )
    unit = lr * factor / np.sqrt(len(queries.few))
    return SketchError(factor, unit, example_norms, queries.norms(), sample)
