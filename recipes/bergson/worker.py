"""Worker of check_ekfac.py, in Bergson's environment: fit EK-FAC, divide a query by it.

    BERGSON_ENV/bin/python worker.py FOLDER

FOLDER has job.json (model, ids and labels of each example, damping, tokens of a batch, threads) and
query.safetensors (a matrix for each layer); divided.safetensors and report.json are written there.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from importlib.metadata import version
from pathlib import Path


def main() -> None:
    folder = Path(sys.argv[1])
    job = json.loads((folder / "job.json").read_text())

    import torch
    from bergson.config import HessianConfig, IndexConfig
    from bergson.config.config import InversionConfig
    from bergson.data import allocate_batches
    from bergson.hessians.hessian_approximations import fit_factored_hessians
    from bergson.hessians.preconditioner import load_preconditioner
    from bergson.utils.worker_utils import setup_model_and_peft
    from datasets import Dataset
    from safetensors.torch import load_file, save_file

    torch.set_num_threads(job["threads"])
    config = IndexConfig(
        str(folder / "bergson"),
        model=job["model"],
        precision="fp32",
        loss_reduction="mean",
        token_batch_size=job["tokens"],
        projection_dim=0,
    )
    # The labels are given: those that taught has drawn from the model.
    hessian = HessianConfig(method="kfac", ev_correction=True, use_dataset_labels=True)
    model, _ = setup_model_and_peft(config)
    prefix = model.base_model_prefix + "."
    query = load_file(folder / "query.safetensors")
    given = {name.removeprefix(prefix).removesuffix(".weight"): q.flatten()[None] for name, q in query.items()}
    data = Dataset.from_dict(
        {
            "input_ids": [example["ids"] for example in job["examples"]],
            "labels": [example["labels"] for example in job["examples"]],
            "length": [len(example["ids"]) for example in job["examples"]],
        }
    )
    config.partial_run_path.mkdir(parents=True)
    started = time.perf_counter()
    fit_factored_hessians(
        model,
        data,
        config,
        hessian,
        target_modules=set(given),
        attention_cfgs={},
        batches=allocate_batches(data["length"][:], config.token_batch_size),
        path=str(config.partial_run_path),
        do_eigendecomposition=True,
    )
    seconds = time.perf_counter() - started
    divide = load_preconditioner(
        config.partial_run_path, ev_correction=True, inversion_cfg=InversionConfig("damped_inverse", job["damping"])
    )
    found = divide.apply(given)
    back = {f"{prefix}{name}.weight": q for name, q in found.items()}
    save_file({name: back[name].view_as(q).contiguous() for name, q in query.items()}, folder / "divided.safetensors")
    report = {
        "seconds": seconds,
        "layers": len(found),
        "bergson": version("bergson"),
        "peak_memory_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6,
    }
    (folder / "report.json").write_text(json.dumps(report))


if __name__ == "__main__":
    main()
