"""Worker of :mod:`benchmarks.peers`: build a store by taught, in a process of its own.

Called with a job file (``peers.write_job`` says what it holds); writes ``report.json`` and
``rows.npy`` into the job's folder. Only the building is timed: drawing the projection, gradients,
writing.
"""

from __future__ import annotations

import json
import sys
import time
from pathlib import Path
from typing import Any


def main() -> None:
    """Run the job that the command line names."""
    job = json.loads(Path(sys.argv[1]).read_text())
    out = Path(job["out"])

    import numpy as np
    import torch

    from taught.core.example import sft
    from taught.core.problem import Problem
    from taught.environment import keep_freed_memory, peak_memory_gb, versions
    from taught.model import kernels
    from taught.model.load import load_model
    from taught.progress import SilentProgress
    from taught.sketches.fill import fill_examples
    from taught.sketches.project import Projection
    from taught.sketches.store import SketchStore

    keep_freed_memory()  # as the command line does
    torch.set_num_threads(job["threads"])
    if job.get("products") == "torch":
        kernels._onednn = lambda: None  # type: ignore[assignment]
    model = load_model(job["model"]).model
    examples = [sft(example["id"], tuple(example["ids"]), example["start"]) for example in job["examples"]]
    unused: Any = None
    problem = Problem(model, [], unused, lr=1.0, batch_tokens=job["tokens"])

    started, begun = time.perf_counter(), time.process_time()
    projection = Projection(model, job["numbers"])
    store = SketchStore(out / "store", projection.record())
    store.prepare()
    fill_examples(store, problem, projection, examples, progress=SilentProgress())
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - begun

    found = {
        row.id: sketch
        for shard, values in store.read("examples")
        for row, sketch in zip(shard.rows, values, strict=True)
    }
    np.save(out / "rows.npy", np.stack([found[example.id] for example in examples]))
    report = {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "examples": len(found),
        "numbers_per_example": store.dim,
        "bytes_per_example": store.size() / len(found),
        "covers": ["all parameters"],
        "how": f"float16 on disk, products by {kernels.products_by()}",
        "peak_memory_gb": peak_memory_gb(),
        "versions": {name: versions()[name] for name in ("taught", "torch", "transformers")},
    }
    (out / "report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main()
