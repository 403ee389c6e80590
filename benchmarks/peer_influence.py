"""Worker of :mod:`benchmarks.peer_scores`: score examples for behaviors by a peer, in the peer's environment.

Called with a job file (``peer_scores.job`` says what it holds); writes ``scores.npy`` [K, P] and ``report.json`` into
the job's folder. Every method covers the linear layers of the blocks. Losses are means over response tokens, as
training has them; what is not named here is the peer's default.

Bergson's pipelines take a query index that is there already: the gradients of -F, collected by its ``TraceCollector``.

``bergson:gradient``     ``score_dataset`` without a projection
``bergson:trackstar``    ``trackstar``: 16 by 16 numbers a layer, unit norm, the examples' autocorrelation on both sides
``bergson:ekfac``        ``hessian_pipeline``: K-FAC with corrected eigenvalues, labels sampled from the model

dattri-llm is asked at the base model about every suffix of every prompt, with the derivative of F in its
log-probability as weight; columns are summed.

``dattri-llm:tracin``    ``TracInAttributor``
``dattri-llm:ekfac``     ``EKFACAttributor``, damping a tenth of each matrix's mean eigenvalue
``dattri-llm:adamw``     ``AdamWInfluenceAttributor``, every coordinate: it trains by itself, on the batches of the
                         job's run in their order, and carries the gradients of F at its final model back through
                         the recorded moments. Every step has to hold as many examples.
"""

from __future__ import annotations

import json
import re
import resource
import sys
import time
from collections.abc import Sequence
from importlib.metadata import version
from pathlib import Path
from typing import Any

Job = dict[str, Any]
LAYERS = r"layers\.\d+\..*_proj$"  # the linear layers of the blocks


def main() -> None:
    """Run the job that the command line names."""
    job = json.loads(Path(sys.argv[1]).read_text())
    out = Path(job["out"])

    import numpy as np
    import torch

    torch.set_num_threads(job["threads"])
    started = time.perf_counter()
    scores, said = {"bergson": bergson, "dattri-llm": dattri_llm}[job["tool"]](job, out)
    np.save(out / "scores.npy", np.asarray(scores, dtype=np.float64))
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    report = {**said, "seconds": time.perf_counter() - started, "peak_memory_gb": round(peak / 1e9, 3)}
    report["versions"] = {name: version(name) for name in (job["tool"], "torch", "transformers")}
    (out / "report.json").write_text(json.dumps(report))


def y_of(model: Any, prompt: Job) -> Any:
    """Log of the summed probability of a prompt's suffixes."""
    return of_suffixes(model, prompt).logsumexp(0)


def of_suffixes(model: Any, prompt: Job) -> Any:
    """Log-probability of each suffix of a prompt."""
    import torch

    rows = [prompt["ids"] + suffix for suffix in prompt["suffixes"]]
    start, width = len(prompt["ids"]), max(map(len, rows))
    ids = torch.tensor([row + [0] * (width - len(row)) for row in rows])
    return log_probabilities(model, ids, [start] * len(rows), [len(row) for row in rows])


def log_probabilities(model: Any, ids: Any, starts: Sequence[int], ends: Sequence[int]) -> Any:
    """Log-probability of what stands between two places of each row of tokens, padded on the right: [rows]."""
    import torch

    first = min(starts)
    logits = model(input_ids=ids, logits_to_keep=ids.shape[1] - first + 1, use_cache=False).logits[:, :-1]
    own = logits.log_softmax(-1).gather(2, ids[:, first:, None])[..., 0]
    at = torch.arange(first, ids.shape[1])
    scored = (at >= torch.as_tensor(starts)[:, None]) & (at < torch.as_tensor(ends)[:, None])
    return torch.where(scored, own, 0.0).sum(1)


# --- Bergson --------------------------------------------------------------------------------------


def bergson(job: Job, out: Path) -> tuple[Any, Job]:
    """Scores [K, P] by one of Bergson's pipelines, and nothing to report."""
    import numpy as np
    from bergson.cli.trackstar import trackstar
    from bergson.config.config import (
        DataConfig,
        HessianConfig,
        HessianPipelineConfig,
        IndexConfig,
        PreprocessConfig,
        QuerySetConfig,
        ScoreConfig,
        TrackstarConfig,
    )
    from bergson.data import load_scores
    from bergson.hessians.pipeline import hessian_pipeline
    from bergson.score.score import score_dataset

    method, examples = job["method"], out / "examples.jsonl"
    with examples.open("w") as file:
        for example in job["examples"]:
            ids, start = example["ids"], example["start"]
            file.write(json.dumps({"input_ids": ids, "labels": [-100] * start + ids[start:]}) + "\n")
    config = IndexConfig(
        str(out / "run"),
        model=job["model"],
        precision="fp32",
        loss_reduction="mean",
        token_batch_size=512,
        projection_dim=16 if method == "trackstar" else 0,
        data=DataConfig(dataset=str(examples)),
    )
    query = QuerySetConfig(path=str(out / "query"))
    write_queries(job, config, Path(query.path))
    if method == "gradient":
        score_dataset(config, ScoreConfig(query_path=query.path), PreprocessConfig())
    elif method == "trackstar":
        preprocess = PreprocessConfig(unit_normalize=True)
        trackstar(config, TrackstarConfig(query=query, mix_hessians=False, preprocess_cfg=preprocess))
    elif method == "ekfac":
        hessian = HessianConfig(method="kfac", ev_correction=True)
        hessian_pipeline(config, hessian, ScoreConfig(), PreprocessConfig(), HessianPipelineConfig(query=query))
    run = Path(config.run_path)
    table = load_scores(run if method == "gradient" else run / "scores")[:]
    return np.asarray(table).reshape(len(job["examples"]), len(job["weights"])).T, {}


def write_queries(job: Job, config: Any, path: Path) -> None:
    """An index of the gradients of -F, a row for each functional, as ``bergson build`` leaves one."""
    import numpy as np
    import torch
    from bergson.collector.gradient_collectors import TraceCollector
    from bergson.data import create_index
    from bergson.utils.worker_utils import processor_for, setup_model_and_peft

    model, modules = setup_model_and_peft(config)
    processor = processor_for(config, {})
    totals: list[dict[str, Any]] = [{} for _ in job["weights"]]
    for i, prompt in enumerate(job["prompts"]):
        for total, weights in zip(totals, job["weights"], strict=True):
            if not weights[i]:
                continue
            collector = TraceCollector(
                model=model.base_model, processor=processor, target_modules=modules, device="cpu", dtype=torch.float32
            )
            with collector:
                (-weights[i] * y_of(model, prompt)).backward()
            for name, (rows,) in collector.mod_grads.items():
                gradient = rows.sum(0).flatten()
                total[name] = total[name].add_(gradient) if name in total else gradient
            model.zero_grad()
    sizes = {name: gradient.numel() for name, gradient in totals[0].items()}
    index = create_index(path, len(totals), sizes, np.float32)
    for row, total in enumerate(totals):
        index[row] = np.concatenate([total[name].numpy() for name in sizes])
    index.flush()
    processor.save(path)


# --- dattri-llm -----------------------------------------------------------------------------------


def dattri_llm(job: Job, out: Path) -> tuple[Any, Job]:
    """Scores [K, P] by one of dattri-llm's attributors, and the values of F at its final model."""
    import torch
    from dattri_llm import AttributionArguments, AttributionTask, EKFACAttributor, HookManagerConfig, TracInAttributor
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32).eval()
    hooks = HookManagerConfig(linear_io=[LAYERS])
    task = AttributionTask(loss_func=mean_loss, model=model, target_func=weighted)
    if job["method"] == "adamw":
        return adamw_influence(job, out, task, hooks)
    args = AttributionArguments(output_dir=str(out / "dattri"), use_cpu=True)
    order = sorted(range(len(job["examples"])), key=lambda i: len(job["examples"][i]["ids"]))
    examples = rows_of([job["examples"][i] for i in order], args.per_device_train_batch_size)
    total = torch.zeros(len(job["weights"]), len(order))
    for k, weights in enumerate(job["weights"]):
        queries = rows_of(suffixes(model, job["prompts"], weights), args.per_device_eval_batch_size)
        if job["method"] == "tracin":
            found = TracInAttributor(args, task=task).attribute(examples, queries, hook_config=hooks)
        else:
            attributor = EKFACAttributor(args, task=task)
            found = attributor.attribute(examples, queries, hook_config=hooks, damping=0.1, relative_damping=True)
        ids, table = found.agnostic_matrix()
        assert len(ids) == len(order), "two examples are the same"
        total[k, order] = table.sum(1).cpu()
    return total, {}


def adamw_influence(job: Job, out: Path, task: Any, hooks: Any) -> tuple[Any, Job]:
    """The run made again by dattri-llm's loop, and its sweep of queries at the model that it ends in."""
    import torch
    from dattri_llm import AdamWInfluenceAttributor, AttributionArguments
    from torch.utils.data import DataLoader

    plan, recipe = job["plan"], job["recipe"]
    batch, *others = {len(step) for step in plan}
    if others or recipe["optimizer"] != "adamw" or recipe["method"] != "full":
        raise SystemExit("steps of one size, with AdamW, of all parameters")
    args = AttributionArguments(
        output_dir=str(out / "dattri"),
        use_cpu=True,
        per_device_train_batch_size=batch,
        learning_rate=recipe["lr"],
        lr_scheduler_type=recipe["schedule"],
        weight_decay=recipe["weight_decay"],
        max_grad_norm=recipe["max_grad_norm"],
        recompute_gradients=True,
    )
    # Its loop shuffles: what it draws at place j is put where it draws it from.
    seed = torch.Generator().manual_seed(args.data_seed)
    count = sum(map(len, plan))
    drawn = torch.cat(list(DataLoader(range(count), batch_size=batch, shuffle=True, generator=seed))).tolist()
    planned = rows_of([job["examples"][i] for step in plan for i in step], batch)
    examples: list[Any] = [None] * count
    for place, row in zip(drawn, planned, strict=True):
        examples[place] = row
    attributor = AdamWInfluenceAttributor(args, task=task)
    one = rows_of(suffixes(task.model, job["prompts"][:1], [1.0]), 1)[:1]  # its final gradients, which are not used
    ((train, _),) = attributor.cache(examples, one, hook_config=hooks)
    model = task.model  # at its final weights, until the source below loads those of a step
    layers = sorted(name for name, _ in model.named_modules() if re.search(LAYERS, name))
    parameters = [model.get_parameter(f"{name}.weight") for name in layers]
    queries, values = [], []
    for weights in job["weights"]:
        total, value = [torch.zeros_like(p) for p in parameters], 0.0
        for w, prompt in zip(weights, job["prompts"], strict=True):
            if w:
                own = w * y_of(model, prompt)
                value += float(own.detach())
                for sum_of, gradient in zip(total, torch.autograd.grad(own, parameters), strict=True):
                    sum_of += gradient
        queries.append(torch.cat([gradient.flatten() for gradient in total]))
        values.append(value)
    source = attributor.open_train_source(train, hook_config=hooks)
    steps = sorted(attributor.available_steps(source))
    found, _, of_step = attributor.sweep_queries(
        source,
        attributor.load_dynamics(source, None),
        torch.stack(queries),
        layers=layers,
        prop_steps=steps[::-1],
        output_steps=set(steps),
    )
    scores = torch.zeros(len(job["weights"]), len(job["examples"]))
    at = iter(found)
    for step in dict.fromkeys(of_step):
        for i in plan[steps.index(step)]:
            scores[:, i] += next(at)
    return scores, {"values": values}


def rows_of(sequences: Sequence[Job], batch: int) -> list[Job]:
    """Sequences as a dataset, in order, those of a batch padded to the same length; -100 where nothing is scored."""
    import torch

    rows = []
    for start in range(0, len(sequences), batch):
        some = sequences[start : start + batch]
        width = max(len(one["ids"]) for one in some)
        for one in some:
            ids = torch.tensor(one["ids"] + [0] * (width - len(one["ids"])))
            labels = torch.full((width,), -100)
            labels[one["start"] : len(one["ids"])] = ids[one["start"] : len(one["ids"])]
            rows.append({"input_ids": ids, "labels": labels, "weight": torch.tensor(one.get("weight", 1.0))})
    return rows


def suffixes(model: Any, prompts: Sequence[Job], weights: Sequence[float]) -> list[Job]:
    """Each suffix as a sequence, with the derivative of sum_i B_i y_i in its log-probability."""
    import torch

    found = []
    for w, prompt in zip(weights, prompts, strict=True):
        if w:
            with torch.no_grad():
                shares = of_suffixes(model, prompt).softmax(0)
            for suffix, share in zip(prompt["suffixes"], shares, strict=True):
                weight, ids = w * float(share), prompt["ids"] + suffix
                found.append({"ids": ids, "start": len(prompt["ids"]), "weight": weight})
    return found


def scored(model: Any, batch: Job) -> tuple[Any, Any]:
    """Summed log-probability of what each row of a batch has to predict, and how many tokens that are."""
    wanted = batch["labels"] != -100
    starts, ends = wanted.int().argmax(1), wanted.shape[1] - wanted.flip(1).int().argmax(1)
    return log_probabilities(model, batch["input_ids"], starts.tolist(), ends.tolist()), wanted.sum(1)


def mean_loss(model: Any, batch: Job) -> Any:
    """Mean over the examples of the mean loss of their response tokens."""
    logp, count = scored(model, batch)
    return -(logp / count).mean()


def weighted(model: Any, batch: Job) -> Any:
    """Minus the weighted log-probabilities of suffixes: a loss, as the examples have."""
    logp, _ = scored(model, batch)
    return -(batch["weight"] * logp).sum()


if __name__ == "__main__":
    main()
