"""What a run would refuse behind its first hour, found before it: the study's names and numbers against its data.

The readings are stood in for by random numbers of the same prompts, groups and features, so that the stages' own words
say what does not fit.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from taught.analysis.clusters import check_k
from taught.core.estimator import Work
from taught.core.example import Examples
from taught.core.names import TargetName
from taught.core.problem import Problem
from taught.core.readings import Readings
from taught.core.registry import CURVATURES, TRAJECTORIES
from taught.core.target import TargetSet, kind_of
from taught.data.prompts import PromptSet
from taught.errors import UserError
from taught.features.label import load_labels
from taught.policy.evaluate import check_sides
from taught.policy.ridge import check_folds, fit_policy
from taught.stages.bins import check_bins
from taught.stages.concepts import check_concept, check_concept_methods
from taught.stages.curate import decide, rule_and_target
from taught.stages.pairs import check_guard
from taught.stages.ready import check_answered, method_of, readings_of, wanted_targets
from taught.stages.subject import Subject, chosen_examples
from taught.study.schema import Study
from taught.validation.score_tables import read_scores


class Refused(list[UserError]):
    """What the run would say."""

    @contextmanager
    def part(self) -> Iterator[None]:
        """One part of the run: what it refuses is kept, and the others are tried all the same."""
        try:
            yield
        except UserError as error:
            self.append(error)

    def attempt(self, do: Callable[..., Any], *given: Any) -> None:
        """Call one check of a stage."""
        with self.part():
            do(*given)


def try_study(
    study: Study, subject: Subject, prompts: PromptSet, labels: Sequence[str | None], problem: Problem, inputs: Examples
) -> list[UserError]:
    """What the stages of a run would refuse of this study.

    Parameters
    ----------
    labels, inputs : of the examples that would be scored, in their order
    """
    refused, own, sae = Refused(), method_of(study), subject.sae
    refused.attempt(own.refuse)
    for name in study.validation.methods:
        refused.attempt(lambda name=name: own.named(name).refuse())
    along = own.trajectory.make(TRAJECTORIES)
    if (seen := getattr(along, "seen", None)) is not None:
        refused.attempt(seen, problem, inputs, Work())
    if hasattr(along, "__len__") and getattr(along, "run", None) is None and not len(along):
        fix = "attribution.trajectory: {kind: checkpoints, checkpoints: [{id: FOLDER, lr: 2.0e-5}]}"
        refused.append(UserError("attribution.trajectory names no checkpoint", fix=fix))
    curvature = own.curvature.make(CURVATURES)
    if getattr(curvature, "moments", None) is not None:  # a file: reading it costs nothing beside a run
        refused.attempt(curvature.fit, problem, inputs, Work())
    refused.attempt(check_concept_methods, study)
    if sae is not None:
        refused.attempt(check_folds, study.policy.folds, len(prompts))
        if study.features.ids is not None:
            refused.attempt(sae.decoder_rows, study.features.ids)
        if study.features.labels is not None:
            refused.attempt(load_labels, study.features.labels)
        with suppress(UserError):  # that no group is named is said elsewhere
            refused.attempt(check_sides, [prompt.group for prompt in prompts], *study.prompts.sides)
    for spec in study.concepts:
        refused.attempt(check_concept, study, subject, spec, prompts, labels)
    with refused.part():
        _targets(refused, study, subject, prompts, labels, [z.id for z in inputs])
    if study.bins is not None:
        with refused.part():
            check_bins(study.bins, chosen_examples(study), prompts.groups)
    for path in study.validation.scores:
        refused.attempt(read_scores, Path(path))
    if study.validation.guard is not None and "unlearn" in study.validation.designs:
        known = dict.fromkeys(name for prompt in prompts for name in (prompt.group, prompt.category) if name)
        refused.attempt(check_guard, study.validation.guard, list(known))
    return refused


def _readings(study: Study, subject: Subject, prompts: PromptSet, asked: Iterable[TargetName]) -> Readings:
    """Random readings of the study's prompts, with a policy on the features that it names."""
    random, ids, sae = np.random.default_rng(0), [prompt.id for prompt in prompts], subject.sae
    base = readings_of(ids, random.normal(size=len(ids)), ((p.id, p.group, p.category) for p in prompts))
    if sae is None:
        return base
    # Which ones the contrast chooses is not known: those that are asked for may be among them.
    named = study.features.ids
    own = {part.about for name in asked for part in name.parts}
    features = [k for k in range(sae.n_features) if (k in named if named is not None else str(k) in own)] or [0]
    X = random.normal(size=(len(ids), len(features)))
    policy = fit_policy(X, base.y, prompt_ids=ids, feature_ids=features, alpha=1.0, fit_intercept=False)
    return replace(base, X=policy.X, columns=tuple(features), policy=policy)


def _targets(
    refused: Refused,
    study: Study,
    subject: Subject,
    prompts: PromptSet,
    labels: Sequence[str | None],
    ids: Sequence[str],
) -> None:
    """The targets of the attribution, and those that later stages take from it."""
    concepts = [concept.name for concept in study.concepts]
    readings = _readings(study, subject, prompts, map(TargetName.parse, study.attribution.targets or ()))
    names = [TargetName.parse(name) for name in wanted_targets(study, readings, concepts, len(labels))]
    of_concepts = [name for name in names if any(kind_of(part).reads == "concepts" for part in name.parts)]
    known = [f"concept:{name}" for name in concepts]
    for name in of_concepts:
        parts = [part for part in name.parts if kind_of(part).reads == "concepts"]
        check_answered([part for part in parts if part.about != "*" and str(part) not in known], concepts)
    others = [name for name in names if name not in of_concepts]
    computed = [str(name) for name in (TargetSet.of(others, readings).names if others else ())]
    computed += [*known, *map(str, of_concepts)]
    free = study.features.ids is None and any(name.kind == "coefficient" and name.about == "*" for name in names)
    later = {
        "curation.target": study.curation.target,
        "curation.protect": study.curation.protect,
        "clusters.target": None if study.clusters is None else study.clusters.target,
        "validation.remove_by": study.validation.remove_by,
    }
    for key, wanted in later.items():
        if wanted is None or wanted in computed or (free and wanted.startswith("coefficient:")):
            continue
        if not {str(part) for part in TargetName.parse(wanted).parts} <= set(computed):
            rule = "one of those that the study asks for: " + ", ".join(sorted(computed)[:20])
            fix = f"correct {key}, or add it to attribution.targets"
            refused.append(UserError(f"{key} is a target that is not computed", value=wanted, rule=rule, fix=fix))
    if study.clusters is not None:
        refused.attempt(check_k, study.clusters.k, len(ids))
    with refused.part():
        rule, target = rule_and_target(study, computed, computed[0])
        values = np.random.default_rng(0).uniform(size=len(ids))
        protected = None if study.curation.protect is None else values
        decide(study, rule, target, ids, labels, values.tolist(), values, protected)
