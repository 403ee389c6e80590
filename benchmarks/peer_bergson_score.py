"""Worker of :mod:`benchmarks.concepts`: score examples against a concept by Bergson.

Called in Bergson's environment with a job file (``concepts.write_job`` says what it holds); writes
``report.json`` and ``scores.npy`` (of the last round) into the job's folder. Two things are timed:
the query gradient, one forward and backward pass a prompt under its ``TraceCollector``, and what
``bergson score`` does after model, data and query are loaded (``score_worker``): gradients of the
examples against the query, unprojected, as is its default. Only layers that the query has a gradient
for are collected.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any


def main() -> None:
    """Run the job that the command line names."""
    job = json.loads(Path(sys.argv[1]).read_text())
    out = Path(job["out"])

    import numpy as np
    import torch
    from bergson.collection import collect_gradients
    from bergson.config import IndexConfig, PreprocessConfig, ScoreConfig
    from bergson.data import allocate_batches, create_index
    from bergson.score.score import create_scorer
    from bergson.utils.worker_utils import create_processor, setup_model_and_peft
    from datasets import Dataset

    torch.set_num_threads(job["threads"])
    config = IndexConfig(
        str(out / "index"), model=job["model"], precision="fp32", loss_reduction="mean", token_batch_size=job["tokens"]
    )
    model, modules = setup_model_and_peft(config)
    config.partial_run_path.mkdir(parents=True)
    processor = create_processor(model, config, modules)
    examples = job["examples"]
    data = Dataset.from_dict(
        {
            "input_ids": [example["ids"] for example in examples],
            "labels": [[-100] * example["start"] + example["ids"][example["start"] :] for example in examples],
            "length": [len(example["ids"]) for example in examples],
        }
    )

    started = time.perf_counter()
    query = _query(model, processor, modules, job)
    seconds_once = time.perf_counter() - started
    sizes = {name: gradient.numel() for name, gradient in query.items()}
    rows = create_index(out / "query", 1, sizes, np.float32)
    rows[0] = np.concatenate([gradient.flatten().numpy() for gradient in query.values()])
    rows.flush()

    every = []
    for number in range(job["rounds"]):
        started, begun = time.perf_counter(), time.process_time()
        scorer = create_scorer(
            out / f"scores-{number}",
            data,
            ScoreConfig(query_path=str(out / "query")),
            PreprocessConfig(),
            torch.device("cpu"),
            torch.float32,
        )
        collect_gradients(
            model=model,
            data=data,
            processor=processor,
            cfg=config,
            target_modules=set(sizes),
            batches=allocate_batches(data["length"][:], config.token_batch_size),
            scorer=scorer,
        )
        scorer.writer.flush()
        every.append((time.perf_counter() - started, time.process_time() - begun))
    names = scorer.writer.scores.dtype.names
    np.save(out / "scores.npy", np.asarray(scorer.writer.scores[names[0]]).reshape(len(examples)))
    report = {
        "times": every,
        "seconds_once": seconds_once,
        "layers": len(sizes),
        "numbers_of_the_query": sum(sizes.values()),
        "peak_memory_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 3),
        "versions": {name: version(name) for name in ("bergson", "torch", "transformers")},
    }
    (out / "report.json").write_text(json.dumps(report))


def _query(model: Any, processor: Any, modules: Any, job: dict[str, Any]) -> dict[str, Any]:
    """Gradient of the mean over prompts of <v, h>, by layer: float32 [1, size]."""
    import torch
    from bergson.collector.gradient_collectors import TraceCollector

    v, total = torch.tensor(job["direction"]), {}
    seen: list[Any] = []
    block = model.base_model.layers[job["block"]]
    handle = block.register_forward_hook(
        lambda _module, _args, output: seen.append(output[0] if isinstance(output, tuple) else output)
    )
    collector = TraceCollector(
        model=model.base_model, processor=processor, target_modules=modules, device="cpu", dtype=torch.float32
    )
    for prompt in job["prompts"]:
        seen.clear()
        with collector:
            model.base_model(torch.tensor([prompt["ids"]]))
            h = seen[0][0, prompt["read"]]
            ((h @ v).mean() / len(job["prompts"])).backward()
        for name, (gradient,) in collector.mod_grads.items():
            total[name] = total[name].add_(gradient) if name in total else gradient
        collector.mod_grads.clear()
        model.zero_grad()
    handle.remove()
    return total


if __name__ == "__main__":
    main()
