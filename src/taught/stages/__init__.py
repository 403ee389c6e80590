"""One function per stage: reads the files of the stages before it, computes, writes its own files.

The order of a run is ``policy``, ``attribute``, ``curate``, ``report``; ``check`` runs before and
changes nothing; ``demo`` runs these on the shipped preset, ``clamp`` checks a policy by edits in
the model, ``clusters`` groups the examples by their features, and ``sketch`` fills a store that
``attribute`` may read. File formats: docs/formats.md.
"""

from __future__ import annotations

from taught.progress import Progress
from taught.run.folder import RunFolder
from taught.stages.ask import Question, ask
from taught.stages.attribute import attribute
from taught.stages.check import CheckReport, check_study
from taught.stages.clamp import clamp
from taught.stages.clusters import clusters
from taught.stages.compare import compare
from taught.stages.concepts import concepts
from taught.stages.curate import curate
from taught.stages.policy import policy
from taught.stages.report import report
from taught.stages.sketches import sketches
from taught.stages.validate import validate
from taught.study.load import load_study
from taught.study.schema import Study

__all__ = [
    "Question",
    "ask",
    "attribute",
    "check",
    "clamp",
    "clusters",
    "compare",
    "concepts",
    "curate",
    "demo",
    "policy",
    "report",
    "sketches",
    "validate",
]


def check(study: Study) -> CheckReport:
    """What would run, counted and estimated; changes nothing."""
    return check_study(study)


def demo(
    run: RunFolder,
    prompts: int = 200,
    examples: int = 48,
    features: int = 40,
    full: bool = False,
    progress: Progress | None = None,
) -> None:
    """Run every stage on the shipped preset, on a part of it unless ``full``."""
    study = load_study("refusal-smollm2")
    if not full:
        limits = {"prompts.limit": prompts, "examples.limit": examples, "features.max_features": features}
        for key, value in limits.items():
            study = study.replace(key, value)
    policy(study, run, progress)
    attribute(study, run, progress)
    curate(run)
    report(run)
