"""EK-FAC of taught against Bergson's, on a real model.

    PYTHONPATH=src python recipes/bergson/check_ekfac.py --bergson BERGSON_ENV/bin/python

Both get the same weights, tokens and drawn labels. Each fits its factors, and divides the gradient
of one functional (the behavior on the prompts) by them. Exits with an error where they differ.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import tempfile
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from taught.core.example import Example, make_batch
from taught.core.query import build_queries
from taught.curvatures.ekfac import curved_layers, draw_labels, ekfac_metric, fit_ekfac
from taught.environment import peak_memory_gb
from taught.estimators.adjoint import contract_examples
from taught.model.gradients import find_sites, frozen
from taught.stages.ready import make_problem
from taught.stages.subject import open_subject, prompt_inputs, study_examples, study_prompts
from taught.stats.ranks import spearman
from taught.study.load import load_study


def opened(args: argparse.Namespace) -> tuple[Any, list[Example]]:
    """The problem and the examples."""
    study = load_study(args.study).replace("prompts.limit", args.prompts)
    study = study.replace("examples.limit", args.examples)
    subject = open_subject(study)
    prompts = study_prompts(study)
    example_set, _ = study_examples(study, prompts)
    encoded, _ = subject.chat.encode_examples(
        example_set.examples, study.examples.max_tokens, study.examples.drop_truncated
    )
    reads = prompt_inputs(subject.encode(prompts), None)
    return make_problem(study, subject, reads, None, None), [e.example() for e in encoded]


def gradient(problem: Any) -> dict[str, Tensor]:
    """C^-1 grad F of the mean behavior, by layer; of a problem without a metric: grad F."""
    n = len(problem.prompts)
    sites = find_sites(problem.model, problem.parameters)
    with frozen(problem.model):
        queries = build_queries(problem, sites, None, torch.full((1, n), 1 / n).double())
    return {name: query[0] for name, query in queries.items() if isinstance(query, Tensor)}


def effects(problem: Any, examples: list[Example], query: dict[str, Tensor]) -> Tensor:
    sites = find_sites(problem.model, problem.parameters)
    queries = {name: q.unsqueeze(0) for name, q in query.items()}
    with frozen(problem.model):
        return contract_examples(problem, sites, examples, queries, 1, None)[0][:, 0]


def by_bergson(args: Any, problem: Any, examples: list[Example], query: Any) -> tuple[Any, Any]:
    """What Bergson makes of the query, and its report."""

    def labels(example: Example) -> list[int]:
        drawn = draw_labels(problem.model, make_batch([example], [0]), [example], 0)[0].tolist()
        return [-100] * example.start + drawn

    job = {
        "model": os.path.abspath(problem.model.name_or_path),
        "damping": args.damping,
        "tokens": problem.batch_tokens,
        "threads": torch.get_num_threads(),
        "examples": [{"ids": list(p.ids), "labels": labels(p)} for p in examples],
    }
    worker = Path(__file__).with_name("worker.py")
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryDirectory() as folder:
        (Path(folder) / "job.json").write_text(json.dumps(job))
        save_file(query, Path(folder) / "query.safetensors")
        log = Path(folder) / "log"
        with log.open("w") as out:
            done = subprocess.run(
                [os.path.abspath(args.bergson), str(worker), folder], env=env, stdout=out, stderr=out, check=False
            )
        if done.returncode:
            raise SystemExit(log.read_text()[-5000:])
        report = json.loads((Path(folder) / "report.json").read_text())
        return load_file(Path(folder) / "divided.safetensors"), report


def main() -> None:
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--bergson", required=True, help="interpreter of Bergson's environment")
    flags.add_argument("--study", default="refusal-smollm2")
    flags.add_argument("--prompts", type=int, default=16)
    flags.add_argument("--examples", type=int, default=24)
    flags.add_argument("--parameters", nargs="+", help="patterns of the layers (default: all)")
    flags.add_argument("--damping", type=float, default=0.1)
    args = flags.parse_args()
    problem, examples = opened(args)
    problem = replace(problem, parameters=curved_layers(problem.model, args.parameters))
    query = gradient(problem)
    started = time.perf_counter()
    fitted = fit_ekfac(problem, examples)
    print(
        f"taught: {len(fitted.basis)} layers, {len(examples)} examples: "
        f"{time.perf_counter() - started:.1f} s, {peak_memory_gb()} GB"
    )
    metric = ekfac_metric(fitted, args.damping)
    ours = {name: metric.solve(name, q) for name, q in query.items()}
    del fitted, metric  # Bergson holds as much
    theirs, report = by_bergson(args, problem, examples, query)
    print(
        f"Bergson {report['bergson']}: {report['layers']} layers: {report['seconds']:.1f} s, "
        f"{report['peak_memory_gb']:.2f} GB"
    )
    apart = {name: float((ours[name] - q).norm() / q.norm()) for name, q in theirs.items()}
    worst = max(apart, key=lambda name: apart[name])
    print(f"C^-1 q, |ours - theirs| / |theirs|: at most {apart[worst]:.2g} ({worst})")
    found, other, plain = (effects(problem, examples, q) for q in (ours, theirs, query))
    print(
        f"effects: relative difference {float((found - other).norm() / other.norm()):.2g}, "
        f"Spearman {spearman(found.numpy(), other.numpy()):.6f}; "
        f"with plain SGD's {spearman(found.numpy(), plain.numpy()):.3f}"
    )
    assert set(ours) == set(theirs)
    assert apart[worst] < 1e-2


if __name__ == "__main__":
    main()
