"""Filling a store of sketches and nothing else, by one process or several."""

from __future__ import annotations

import os

import torch

from taught.core.driver import fitted
from taught.core.estimator import Work
from taught.core.registry import CURVATURES, ESTIMATORS
from taught.environment import process_share
from taught.errors import UserError
from taught.progress import Progress, SilentProgress
from taught.run.folder import RunFolder
from taught.stages.ready import prepare, read_data
from taught.stages.subject import open_subject
from taught.study.schema import Study


def sketches(study: Study, run: RunFolder, progress: Progress | None = None) -> None:
    """Fill the store of the study's estimator; ``attribute`` then finds everything there.

    Several processes may do this at once (torchrun, ``accelerate launch``): each takes its share of
    the shards, and none waits for another.

    Raises
    ------
    UserError
        As ``attribute``; the estimator keeps nothing; the store was made under other conditions.
    """
    progress = progress or SilentProgress()
    estimator = study.attribution.estimator.make(ESTIMATORS, "attribution.estimator")
    if not hasattr(estimator, "fill"):
        kind, fix = study.attribution.estimator.kind, "use --set attribution.estimator=sketch"
        raise UserError("this estimator keeps no sketches", value=kind, fix=fix)
    data = read_data(study, progress)
    progress.step("load the model")
    if study.model.device == "cuda" and "LOCAL_RANK" in os.environ:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    subject = open_subject(study)
    run.require_before("attribute", study, subject.identity)
    ready = prepare(study, run, subject, data, progress)
    work, problem = Work(progress, None, run.folder), ready.problem
    curvature = study.attribution.curvature.make(CURVATURES)
    if getattr(curvature, "of_sketches", False):  # it may say what is sketched
        problem = fitted(problem, ready.inputs, curvature, work)
    estimator.fill(problem, ready.inputs, work, process_share())
