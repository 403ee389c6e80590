"""Worker of :mod:`benchmarks.peers`: projected gradients by dattri, in dattri's environment.

Called with a job file (``peers.write_job`` says what it holds); writes ``report.json`` and, where
gradients were made, ``rows.npy`` into the job's folder. dattri has two ways, the job's ``way``:

``factored``
    ``LoGraAttributor.cache``, its way for language models: inputs and output gradients of each
    linear layer are projected. With ``offload="cpu"``, since ``"disk"`` pins memory and needs CUDA;
    writing the rows is added by numpy, and timed. Batches have a fixed number of examples.
``dense``
    ``BasicProjector``, which TRAK uses on CPUs: whole gradients times a dense random matrix that is
    drawn block by block. Some blocks are timed and the rest extrapolated.
"""

from __future__ import annotations

import json
import math
import os
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

    import torch
    from transformers import AutoModelForCausalLM

    torch.set_num_threads(job["threads"])
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32).eval()
    report = {"factored": factored, "dense": dense}[job["way"]](job, model, out)
    report["versions"] = {name: version(name) for name in ("dattri", "torch", "transformers")}
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    report["peak_memory_gb"] = round(peak / 1e9, 3)
    (out / "report.json").write_text(json.dumps(report))


def factored(job: dict[str, Any], model: Any, out: Path) -> dict[str, Any]:
    """Cache the projected gradients of all examples and write them."""
    import numpy as np
    import torch
    from dattri.algorithm.logra import LoGraAttributor
    from dattri.task import AttributionTask
    from torch.utils.data import DataLoader

    examples = job["examples"]
    order = sorted(range(len(examples)), key=lambda i: len(examples[i]["ids"]))
    batch = max(1, job["tokens"] * len(examples) // sum(len(example["ids"]) for example in examples))
    names = [name for name, module in model.base_model.named_modules() if isinstance(module, torch.nn.Linear)]
    names = [f"{model.base_model_prefix}.{name}" for name in names]
    p = max(1, round(math.sqrt(job["numbers"] / len(names))))
    model.requires_grad_(False)  # what is kept is the hooks' work; the graph begins at the inputs
    model.enable_input_require_grads()

    started, begun = time.perf_counter(), time.process_time()
    task = AttributionTask(
        loss_func=mean_loss, model=model, checkpoints=[{}], checkpoints_load_func=lambda model, _: model
    )
    attributor = LoGraAttributor(
        task, layer_names=names, hessian="Identity", proj_dim=p * p, offload="cpu", cache_dir=str(out / "cache")
    )
    attributor.cache(DataLoader([examples[i] for i in order], batch_size=batch, collate_fn=padded))
    kept = attributor.offload_manager.cached_gradients
    rows = torch.cat([kept[batch] for batch in sorted(kept)])
    back = torch.empty(len(order), dtype=torch.long)
    back[order] = torch.arange(len(order))
    np.save(out / "rows.npy", rows[back].numpy())
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - begun
    return {
        "seconds": seconds,
        "cpu_seconds": cpu_seconds,
        "examples": len(rows),
        "numbers_per_example": rows.shape[1],
        "bytes_per_example": rows.shape[1] * 4,
        "covers": ["linear layers of the blocks"],
        "how": f"LoGra: float32 on disk, {len(names)} layers of {p} by {p} numbers, {examples} "
        f"examples a batch, torch.compile {'off' if _compile_off() else 'on'}",
    }


def _compile_off() -> bool:
    return os.environ.get("TORCHDYNAMO_DISABLE") == "1"


def padded(examples: list[dict[str, Any]]) -> dict[str, Any]:
    """Examples as one batch, padded on the right; -100 where there is nothing to predict."""
    import torch

    width = max(len(example["ids"]) for example in examples)
    ids = torch.zeros(len(examples), width, dtype=torch.long)
    labels = torch.full((len(examples), width), -100)
    for row, example in enumerate(examples):
        tokens = torch.tensor(example["ids"])
        ids[row, : len(tokens)] = tokens
        labels[row, example["start"] : len(tokens)] = tokens[example["start"] :]
    return {"input_ids": ids, "labels": labels}


def mean_loss(model: Any, batch: dict[str, Any], device: str) -> Any:
    """Mean over the examples of the mean loss of their response tokens (the hooks undo the first).

    Logits are computed from the first response token on, as taught does.
    """
    import torch

    labels = batch["labels"]
    keep = int((labels != -100).any(0).flip(0).nonzero().max()) + 2
    logits = model(batch["input_ids"], logits_to_keep=keep, use_cache=False).logits[:, :-1]
    wanted = labels[:, labels.shape[1] - keep + 1 :]
    flat = logits.flatten(0, 1)
    losses = torch.nn.functional.cross_entropy(flat, wanted.flatten(), reduction="none")
    return (losses.view_as(wanted).sum(1) / (wanted != -100).sum(1)).mean()


def dense(job: dict[str, Any], model: Any, out: Path) -> dict[str, Any]:
    """Time some blocks of the random matrix on a gradient of one example, within the job's limit."""
    import torch
    from dattri.func.projection import BasicProjector, ProjectionType

    example, numbers = job["examples"][len(job["examples"]) // 2], job["numbers"]
    started = time.perf_counter()
    mean_loss(model, padded([example]), "cpu").backward()
    gradient = torch.cat([p.grad.flatten() for p in model.parameters()])[None]
    model.zero_grad(set_to_none=True)
    for_gradient = time.perf_counter() - started

    size = gradient.shape[1]
    columns = max(1, int(2e9 // (4 * size)))
    seconds: dict[str, float] = {}
    for kind in (ProjectionType.normal, ProjectionType.rademacher):
        projector = BasicProjector(size, columns, 0, kind, torch.device("cpu"))
        blocks, begun = 0, time.perf_counter()
        while blocks * columns < numbers:
            # What project() does for each block where there are several.
            projector._gen_randomness_dense(projector.generator_states[0])
            _ = gradient @ projector.proj_matrix
            blocks += 1
            if time.perf_counter() - begun > job["limit"] / 2:
                break
        seconds[kind.value] = (time.perf_counter() - begun) / (blocks * columns) * numbers
        projector.free_memory()
    fastest = min(seconds, key=seconds.__getitem__)
    return {
        # The matrix is drawn anew for every call; at best all gradients are in one call.
        "seconds": seconds[fastest] + len(job["examples"]) * for_gradient,
        "seconds_of_one_call": seconds,
        "seconds_of_one_gradient": for_gradient,
        "examples": len(job["examples"]),
        "numbers_per_example": numbers,
        "bytes_per_example": numbers * 4,
        "covers": ["all parameters"],
        "extrapolated": True,
        "how": f"BasicProjector, {fastest}; blocks of {columns} columns (its own 100 need "
        f"{400 * size / 1e9:.0f} GB), timed for {job['limit']:.0f} s and extrapolated, as if all "
        f"gradients were projected in one call ({4e-9 * size * len(job['examples']):.0f} GB)",
    }


if __name__ == "__main__":
    main()
