"""Worker of :mod:`benchmarks.peers`: build an index by Bergson, in Bergson's environment.

Called with a job file (``peers.write_job`` says what it holds); writes ``report.json`` and
``rows.npy`` into the job's folder. It does what ``bergson build`` does after model and data are
loaded (``build_worker``); only that is timed: drawing the projections, gradients, writing.
"""

from __future__ import annotations

import json
import math
import resource
import sys
import time
from importlib.metadata import version
from pathlib import Path


def main() -> None:
    """Run the job that the command line names."""
    job = json.loads(Path(sys.argv[1]).read_text())
    out = Path(job["out"])

    import numpy as np
    import torch
    from bergson.collection import collect_gradients
    from bergson.collector.collector import HookCollectorBase
    from bergson.config import IndexConfig, PreprocessConfig
    from bergson.data import allocate_batches
    from bergson.utils.worker_utils import create_processor, setup_model_and_peft
    from datasets import Dataset

    torch.set_num_threads(job["threads"])
    config = IndexConfig(
        str(out / "index"), model=job["model"], precision="fp32", loss_reduction="mean", token_batch_size=job["tokens"]
    )
    model, modules = setup_model_and_peft(config)
    covered = HookCollectorBase.discover_targets(model.base_model, modules)
    # Each layer keeps p by p numbers: p so that all of them are nearest to the number asked for.
    config.projection_dim = max(1, round(math.sqrt(job["numbers"] / len(covered))))
    examples = job["examples"]
    data = Dataset.from_dict(
        {
            "input_ids": [example["ids"] for example in examples],
            "labels": [[-100] * example["start"] + example["ids"][example["start"] :] for example in examples],
            "length": [len(example["ids"]) for example in examples],
        }
    )

    started, begun = time.perf_counter(), time.process_time()
    config.partial_run_path.mkdir(parents=True)
    processor = create_processor(model, config, modules)
    batches = allocate_batches(data["length"][:], config.token_batch_size)
    collect_gradients(
        model, data, processor, config, batches=batches, target_modules=modules, preprocess_cfg=PreprocessConfig()
    )
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - begun

    folder = config.partial_run_path
    info = json.loads((folder / "info.json").read_text())
    rows = np.fromfile(folder / "gradients.bin", dtype=np.float32)
    rows = rows.reshape(info["num_items"], sum(info["grad_sizes"].values()))
    np.save(out / "rows.npy", rows)
    report = {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "examples": len(rows),
        "numbers_per_example": rows.shape[1],
        "bytes_per_example": rows.nbytes / len(rows),
        "covers": ["linear layers of the blocks"],
        "how": f"float32 on disk, {len(covered)} layers of {config.projection_dim} by "
        f"{config.projection_dim} numbers, {len(batches)} batches",
        "peak_memory_gb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9, 3),
        "versions": {name: version(name) for name in ("bergson", "torch", "transformers")},
    }
    (out / "report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main()
