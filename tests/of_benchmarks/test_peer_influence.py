"""What peers are given is what taught works on: functional, losses, steps. The peers themselves are not installed."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest
import torch

from taught.core.example import example_losses
from taught.core.target import TargetSet
from taught.model.readout import pack, read_y
from taught.progress import SilentProgress
from taught.stages.ready import Ready, make_ready, read_data, read_here
from taught.stages.subject import open_subject
from taught.study.load import load_study
from taught.training.loop import plan
from tiny_study import write_tiny_study

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def ready(tmp_path_factory) -> Ready:
    study = load_study(write_tiny_study(tmp_path_factory.mktemp("tiny"))).replace("sae.path", None)
    subject, data = open_subject(study), read_data(study, SilentProgress())
    return make_ready(study, subject, data, read_here(study, subject, data.prompts, SilentProgress()))


@pytest.fixture
def worker(monkeypatch):
    monkeypatch.syspath_prepend(str(ROOT))
    import benchmarks.peer_influence

    return benchmarks.peer_influence


@pytest.fixture
def job(ready, worker):
    from benchmarks.peer_scores import job

    return job(ready, TargetSet.of(["behavior:*"], ready.readings))


def test_y_is_taughts(ready, worker, job):
    problem = ready.problem
    with torch.no_grad():
        found = torch.stack([worker.y_of(problem.model, prompt) for prompt in job["prompts"]])
    torch.testing.assert_close(found.double(), torch.from_numpy(ready.readings.y), rtol=1e-5, atol=1e-6)


def test_weighted_suffixes_have_the_gradient_of_the_functional(ready, worker, job):
    model, problem = ready.problem.model, ready.problem
    parameters = list(model.parameters())
    weights = torch.tensor(job["weights"][0])
    exact = [torch.zeros_like(p) for p in parameters]
    for packed in pack(problem.prompts, problem.behavior):
        value = (weights[list(packed.index)] * read_y(model, packed, problem.behavior)).sum()
        for total, gradient in zip(exact, torch.autograd.grad(value, parameters), strict=True):
            total += gradient
    rows = worker.rows_of(worker.suffixes(model, job["prompts"], job["weights"][0]), 4)
    found = [torch.zeros_like(p) for p in parameters]
    for start in range(0, len(rows), 4):
        some = rows[start : start + 4]
        batch = {key: torch.stack([row[key] for row in some]) for key in some[0]}
        for total, gradient in zip(found, torch.autograd.grad(worker.weighted(model, batch), parameters), strict=True):
            total -= gradient
    largest = max(float(g.abs().max()) for g in exact)
    for one, other in zip(found, exact, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-5 * largest)


def test_the_loss_of_a_batch_is_that_of_training(ready, worker, job):
    rows = worker.rows_of(job["examples"][:5], 5)
    batch = {key: torch.stack([row[key] for row in rows]) for key in rows[0]}
    with torch.no_grad():
        found = worker.mean_loss(ready.problem.model, batch)
    wanted = example_losses(ready.problem.model, ready.inputs[:5], 512).mean()
    assert float(found) == pytest.approx(float(wanted), rel=1e-5)


def test_the_plan_is_that_of_the_run_whatever_the_order_of_the_examples(ready, worker, job):
    from benchmarks.peer_scores import job as job_of

    ids = [example["id"] for example in job["examples"]]
    steps = plan(sorted(ids), ready.problem.recipe)
    turned = job_of(replace(ready, inputs=ready.inputs[::-1]), TargetSet.of(["behavior:*"], ready.readings))
    for one in (job, turned):
        named = [[one["examples"][i]["id"] for i in step] for step in one["plan"]]
        assert named == [[sorted(ids)[i] for i in step] for step in steps]
    assert job["recipe"]["lr"] == ready.problem.recipe.lr
