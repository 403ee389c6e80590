"""Scores of examples by Bergson and by dattri-llm, for what training did to a behavior.

Each works in an environment of its own, named by the path of its interpreter, from the same weights, tokens and
response masks, in float32, and is asked about the same functional, sum_i B_i y_i with y_i = log sum_s p(s | prompt_i).
What a peer does by itself is left to it (curvature, projection, damping, its own training loop):
:mod:`benchmarks.peer_influence`. Scores come back with the sign that taught has: positive, training on
the example raises the target.
"""

from __future__ import annotations

import json
import os
import subprocess
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from benchmarks.peers import HERE, environment
from taught.behaviors.prefixes import Prefixes
from taught.core.target import TargetSet
from taught.stages.ready import Ready
from taught.training.loop import plan


def peer_scores(
    name: str, python: str, ready: Ready, targets: TargetSet, folder: Path
) -> tuple[dict[str, dict[str, float]], float, dict[str, Any]]:
    """Scores by target and example of ``TOOL:METHOD``, the seconds behind loading, and what else the worker reports."""
    tool, _, method = name.partition(":")
    folder.mkdir(parents=True)
    asked = {**job(ready, targets), "tool": tool, "method": method, "out": str(folder.absolute())}
    (folder / "job.json").write_text(json.dumps(asked))
    worker = [os.path.abspath(python), str(HERE / "peer_influence.py"), str((folder / "job.json").absolute())]
    env = environment(torch.get_num_threads(), worker[0])
    done = subprocess.run(worker, env=env, cwd=folder, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{name} failed: {done.stderr[-2000:]}")
    report = json.loads((folder / "report.json").read_text())
    found = np.load(folder / "scores.npy").astype(np.float64)  # [targets, examples]
    ids = [z.id for z in ready.inputs]
    scores = {str(t): dict(zip(ids, map(float, row), strict=True)) for t, row in zip(targets.names, found, strict=True)}
    return scores, report["seconds"], report


def job(ready: Ready, targets: TargetSet) -> dict[str, Any]:
    """What a worker needs: tokens, the functionals, and the training run, step by step."""
    problem, recipe = ready.problem, ready.problem.recipe
    A, B = targets.cotangents()
    if A is not None or B is None or not isinstance(problem.behavior, Prefixes):
        raise SystemExit("peers are asked about behaviors of prefixes only")
    assert recipe is not None
    place, ids = {z.id: i for i, z in enumerate(ready.inputs)}, sorted(z.id for z in ready.inputs)
    return {
        "model": os.path.abspath(problem.model.name_or_path),
        "threads": torch.get_num_threads(),
        "examples": [{"id": z.id, "ids": list(z.ids), "start": z.start} for z in ready.inputs],
        "prompts": [{"ids": list(p.ids), "suffixes": [list(s) for s in p.suffixes]} for p in problem.prompts],
        "weights": B.tolist(),
        "plan": [[place[ids[i]] for i in step] for step in plan(ids, recipe)],
        "recipe": asdict(recipe),
    }
