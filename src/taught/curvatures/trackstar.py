"""TrackStar: cosines of gradients in which what all have in common counts less; values to rank by, of sketches only.

    phi(z) = unit((R + damping I)^-1/2 P V^-1/2 grad l(z)),    value = - <phi(example), phi(target)>

P is the projection of the sketches; V are Adam's second moments, so a gradient is first divided by their roots, element
by element. That is done before sketching, so that such sketches have a store of their own. An element whose moment is
0 is moved by no example and counts nothing. R mixes what examples have in common with what prompts have:

    R = a R_prompts + (1 - a) R_examples,    R_. = mean of s s',    a = e_k / (f_k + e_k)

with e_k and f_k the k-th largest eigenvalues of R_examples and R_prompts: the two spectra cross there. k is
``component``, or as many as the smaller side has rows. s of a prompt is the sketch of its y's gradient.

phi(target) is made of the whole gradient of the target, so of ``behavior:GROUP`` of the mean of y over the group; for
a mean of cosines ask for each ``prompt:ID``. The sign is that of all methods: positive, training on the example raises
the target. With unit lengths there is no change per step any more. The error of a sketched cosine in this metric is
not known, so none is given.

Both sides have the same root, so phi'phi is an inner product in the inverse of R + damping I, in which both are of
length 1: no root is taken. The damping is that of ``autocorrelation``; the source has more examples than K and none.

Source: TrackStar, Chang et al., arXiv 2410.17413.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar

import numpy as np
import torch
from numpy.typing import NDArray
from scipy.linalg import cho_factor, cho_solve

from taught.core import rules
from taught.core.curvature import Metric
from taught.core.estimator import Work
from taught.core.example import Examples
from taught.core.problem import Problem
from taught.core.registry import CURVATURES, setting
from taught.curvatures.adam import adam_metric, estimate_moments, moments_from_optimizer
from taught.curvatures.autocorrelation import Fitted, damping_of, evenly, example_rows, inverse
from taught.errors import UserError
from taught.estimators.cost import Asked, Passes
from taught.model.parameters import moving_parameters
from taught.sketches.project import Prescale
from taught.sketches.store import Row, SketchStore, example_digest
from taught.stats.arrays import Floats


@CURVATURES.register("trackstar")
@dataclass(frozen=True)
class TrackStar:
    """Cosines of gradients in which what all have in common counts less: values to rank by; of sketches only."""

    component: int = setting(1000, rules.whole(1), "where the spectra of examples and prompts cross")
    moments: bool = setting(True, rules.flag(), "divide gradients by the roots of Adam's second moments first")
    file: str | None = setting(
        None, rules.optional(rules.path()), "safetensors of the moments by parameter name; null: from the examples"
    )
    eps: float = setting(1e-8, rules.number(above=0), "Adam's epsilon, added to the roots")
    damping: float | None = setting(
        None,
        rules.optional(rules.number(above=0)),
        "added to R, as a share of the mean square of a sketch's numbers; null: what held-out examples make likely",
    )
    of_sketches: ClassVar[bool] = True

    def fit(self, problem: Problem, examples: Examples, work: Work) -> Metric:
        """The moments; R is made of the sketches, where they are."""
        if not self.moments:
            return Metric(sketched=self.cosines)
        if self.file is not None:
            found, made = moments_from_optimizer(self.file), Path(self.file).read_bytes()
        else:
            work.progress.step("second moments of the gradients", len(examples))
            found = estimate_moments(problem, examples, progress=work.progress)
            made = " ".join(sorted(map(example_digest, examples))).encode()
        scale = adam_metric(problem, found, self.eps).scale or {}
        key = hashlib.sha256(f"{self.eps!r} {hashlib.sha256(made).hexdigest()}".encode()).hexdigest()
        by = {name: torch.where(found[name].to(of.device) > 0, of, 0.0) for name, of in scale.items()}
        return Metric(sketched=self.cosines, before=Prescale(by, key))

    def cosines(
        self, store: SketchStore, examples: Sequence[Row], prompts: Mapping[str, str], queries: Floats
    ) -> tuple[Floats, Floats]:
        """Queries over their lengths in the metric, and minus one over those of the examples."""
        S = example_rows(store, examples)[0]
        T = prompt_rows(store, prompts)
        mixed = mix(S, T if len(T) else queries.T.astype(np.float32), self.component)
        metric = Fitted(mixed, damping_of(S, self.damping))
        divided = metric.solve(queries)
        factors = -inverse(lengths(metric, store, examples))
        return divided * inverse(np.sqrt((queries * divided).sum(0).clip(0))), factors

    def numbers(self, problem: Problem) -> int:
        """One a moving parameter, where there are moments."""
        moving = moving_parameters(problem.model, problem.parameters) if self.moments else {}
        return sum(p.numel() for p in moving.values())

    def cost(self, problem: Problem, examples: Examples, asked: Asked) -> dict[str, float]:
        """Moments: every gradient built once; and once more for sketches of divided gradients."""
        passes = self.moments * (3.0 * (self.file is None) + 1.0)
        return {"moments": passes * Passes(problem, examples).examples} if passes else {}


def prompt_rows(store: SketchStore, prompts: Mapping[str, str]) -> NDArray[np.float32]:
    """Sketches of the gradients of y of prompts (id -> digest), at most 4,096, evenly chosen: [m, K]."""
    found: dict[str, NDArray[np.float32]] = {}
    ids = sorted(prompts)
    wanted = {ids[i] for i in evenly(len(ids))}
    for shard, values in store.read("prompts"):
        for n, row in enumerate(shard.rows):
            if row.feature < 0 and row.id in wanted and prompts[row.id] == row.digest:
                found[row.id] = values[n]
    return np.stack([found[i] for i in sorted(found)]) if found else np.zeros((0, store.dim), np.float32)


def mix(S: NDArray[np.float32], T: NDArray[np.float32], component: int) -> NDArray[np.float32]:
    """Rows [n + m, K] of which the mean square is R, from those of examples [n, K] and of prompts [m, K].

    Raises
    ------
    UserError
        All gradients of the examples, or of the prompts, are zero.
    """
    k = min(component, len(S), len(T))
    wide = (rows.astype(np.float64) for rows in (S, T))
    e, f = (np.linalg.eigvalsh(x @ x.T / len(x))[-k] if k else 0.0 for x in wide)
    if not (np.any(S) and np.any(T)):
        raise UserError(
            "all gradients of the examples or of the prompts are zero",
            rule="R must not vanish",
            fix="use --set attribution.curvature=identity",
        )
    a = max(e, 0.0) / (max(e, 0.0) + max(f, 0.0)) if e > 0 or f > 0 else 0.5
    count = len(S) + len(T)
    weights = np.r_[np.full(len(S), (1 - a) * count / len(S)), np.full(len(T), a * count / len(T))]
    mixed: NDArray[np.float32] = (np.concatenate([S, T]) * np.sqrt(weights)[:, None]).astype(np.float32)
    return mixed


def lengths(metric: Fitted, store: SketchStore, examples: Sequence[Row]) -> Floats:
    """sqrt(s' C^-1 s) of every example, [P]; one shard is in memory at a time. Cost: P n (n + K)."""
    S, inner = metric.inner()
    factor, found = cho_factor(inner), np.zeros(len(examples))
    for ours, rows, _ in store.examples({row: n for n, row in enumerate(examples)}):
        s = rows.astype(np.float64)
        inside = S @ s.T
        found[ours] = ((s**2).sum(1) - (inside * cho_solve(factor, inside)).sum(0)) / metric.damping
    return np.sqrt(found.clip(0))
