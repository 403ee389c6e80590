"""Supervised fine-tuning on chosen examples: a plain deterministic loop.

Loss of a step: the mean over the examples of its batch of each example's own mean cross-entropy over its
response tokens. That is L(z), with the mask, whose gradient every estimator uses
(``taught.core.example``), so with SGD one step on one example is the finite step.

Order: in every epoch the examples are sorted by a hash of (seed, epoch, example id). Two subsets see
their common examples in the same order whatever else they hold (common random numbers), so that their
difference holds less of the order's own noise than with a shuffle of each.
"""

from __future__ import annotations

import hashlib
import importlib.util
import math
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from taught.core.example import Examples, batch_indices, make_batch
from taught.curvatures.adam import moments_from_optimizer
from taught.data.columns import name_ids
from taught.errors import UserError, refuse
from taught.estimators.finite_step import restored
from taught.model.adapter import in_precision, trainable
from taught.model.gradients import evaluating
from taught.model.kernels import use_fast_products
from taught.model.parameters import moving_parameters
from taught.model.quantised import bitsandbytes_is_there, quantised_layers
from taught.progress import Progress, SilentProgress
from taught.run.files import json_bytes
from taught.training.recipe import Recipe


@dataclass(frozen=True)
class TrainLog:
    """What training did, step by step.

    Attributes
    ----------
    ids : ids of the examples of each step, in the order seen
    losses : loss of each step before it is made, natural logarithm
    lrs : learning rate of each step
    """

    ids: tuple[tuple[str, ...], ...]
    losses: tuple[float, ...]
    lrs: tuple[float, ...]


def plan(ids: Sequence[str], recipe: Recipe) -> list[list[int]]:
    """Which examples each step holds, all epochs in a row; each example once an epoch."""
    steps = []
    for epoch in range(recipe.epochs):
        texts = [f"{recipe.seed}\0{epoch}\0{example_id}" for example_id in ids]
        ranks = [hashlib.sha256(text.encode()).hexdigest() for text in texts]
        order = sorted(range(len(ids)), key=ranks.__getitem__)
        steps += [order[at : at + recipe.batch] for at in range(0, len(ids), recipe.batch)]
    return steps


def learning_rates(recipe: Recipe, steps: int) -> list[float]:
    """The learning rate of each step, as transformers' schedules of these names have it.

    Raises
    ------
    UserError
        All are 0: a run of one step with a warm-up.
    """
    warmup = math.ceil(recipe.warmup * steps)

    def factor(step: int) -> float:
        if step < warmup:
            return step / warmup
        return (steps - step) / (steps - warmup) if recipe.schedule == "linear" else 1.0

    lrs = [recipe.lr * factor(step) for step in range(steps)]
    if not any(lrs):
        raise UserError(
            "training moves nothing: the learning rate is 0 at every step",
            value=f"validation.warmup: {recipe.warmup}, {steps} step",
            rule="a warm-up begins at a rate of 0, and takes one step at least",
            fix="use --set validation.warmup=0, or a smaller validation.batch",
        )
    return lrs


def train(
    model: nn.Module,
    inputs: Examples,
    recipe: Recipe,
    *,
    parameters: Sequence[str] | None = None,
    batch_tokens: int = 512,
    progress: Progress | None = None,
    keep: Path | None = None,
    held: Collection[str] = (),
) -> TrainLog:
    """Train the model on the examples, in place. Same inputs, same bits, on a CPU.

    Dropout is off; flags, modes and gradients are put back, weights are not (``restored``). The
    order of ``inputs`` does not matter.

    Parameters
    ----------
    parameters : patterns of the parameters that move (``moving_parameters``); None for all
    batch_tokens : Padded tokens of a micro-batch; the gradients of a step's micro-batches are added up
    keep : a new folder for a checkpoint after every epoch (:func:`_keep`); None: none are kept
    held : ids of further examples, left out, that keep their places in batches with weight 0

    Raises
    ------
    UserError
        No examples, an id that stands twice; parameters in half precision; a loss or weights that are
        not finite, with the step and the ids of the examples.
    """
    inputs = sorted(inputs, key=lambda example: example.id)
    moving = moving_parameters(model, parameters)
    check_inputs(inputs, moving)
    known = {example.id: example for example in inputs}
    everyone = sorted({*known, *held})
    places = plan(everyone, recipe)
    steps = [[everyone[i] for i in index if everyone[i] in known] for index in places]
    lrs, losses = learning_rates(recipe, len(steps)), []
    with evaluating(model), only_moving(model, moving):
        fused = {p.device.type for p in moving.values()} <= {"cpu", "cuda"}  # one pass over memory
        kind: Any = {"adamw": torch.optim.AdamW, "sgd": partial(torch.optim.SGD, momentum=recipe.momentum)}
        optimizer: torch.optim.Optimizer = kind[recipe.optimizer](
            list(moving.items()), lr=recipe.lr, weight_decay=recipe.weight_decay, fused=fused
        )
        for number, (names, index, lr) in enumerate(zip(steps, places, lrs, strict=True), 1):
            batch = [known[name] for name in names]
            losses.append(_add_gradients(model, batch, len(index), batch_tokens, number))
            for p in moving.values():  # a batch whose examples are all left out has the gradient 0
                p.grad = torch.zeros_like(p) if p.grad is None else p.grad
            if recipe.max_grad_norm is not None:
                torch.nn.utils.clip_grad_norm_(moving.values(), recipe.max_grad_norm)
            for group in optimizer.param_groups:
                group["lr"] = lr
            optimizer.step()
            optimizer.zero_grad()
            (progress or SilentProgress()).advance(len(batch))
            if keep is not None and number * recipe.epochs % len(steps) == 0:
                _keep(keep, number * recipe.epochs // len(steps), model, optimizer, lrs[number - 1])
    seen = tuple(map(tuple, steps))
    if not all(bool(p.isfinite().all()) for p in moving.values()):
        raise diverged("weights are not finite", len(steps), seen[-1])
    return TrainLog(seen, tuple(losses), tuple(lrs))


def check_inputs(inputs: Examples, moving: Mapping[str, nn.Parameter]) -> None:
    """Refuse no examples, an id that stands twice, and moving parameters in half precision."""
    if not inputs:
        rule, fix = "at least one example", "choose other examples"
        raise UserError("there are no examples to train on", value="an empty subset", rule=rule, fix=fix)
    twice = sorted(i for i, times in Counter(example.id for example in inputs).items() if times > 1)
    what, rule = "an example stands twice in what is trained on", "each example once; epochs repeat them"
    refuse(twice, what, rule=rule, fix="name it once")
    half = [f"{name}: {p.dtype}" for name, p in moving.items() if p.element_size() < 4]
    what, rule = "steps of training round away in half precision", "parameters that move are float32 or float64"
    refuse(half[:1], what, rule=rule, fix="use --set model.dtype=float32")


@contextmanager
def only_moving(model: nn.Module, moving: Mapping[str, nn.Parameter]) -> Iterator[None]:
    """Gradients for the parameters that move and for no others; flags as before on exit."""
    flags = [(p, p.requires_grad) for p in model.parameters()]
    try:
        for name, p in model.named_parameters():
            p.requires_grad_(name in moving)
        yield
    finally:
        for p, flag in flags:
            p.requires_grad_(flag)
            p.grad = None


def _add_gradients(model: nn.Module, batch: Examples, count: int, batch_tokens: int, number: int) -> float:
    """Add the gradient of a step's loss, the sum over its examples by their count; the loss."""
    total = 0.0
    for index in batch_indices(batch, batch_tokens):
        losses = make_batch(batch, index).losses(model)
        bad = [batch[i].id for i, fine in zip(index, losses.isfinite().tolist(), strict=True) if not fine]
        if bad:
            raise diverged("a loss is not finite", number, bad)
        part = losses.sum() / count
        part.backward()
        total += float(part.detach())
    return total


def diverged(what: str, step: int, ids: Sequence[str]) -> UserError:
    """What went wrong at a step, and at the latest on which examples."""
    return UserError(
        f"training diverged: {what}",
        value=f"step {step}, examples {name_ids(ids)}",
        rule="losses and weights stay finite numbers",
        fix="lower validation.lr, or set validation.max_grad_norm",
    )


def _keep(folder: Path, epoch: int, model: nn.Module, optimizer: torch.optim.Optimizer, lr: float) -> None:
    """Write ``epoch-E/`` (the weights, or the adapter) and ``epoch-E.moments.safetensors``.

    The folder is what ``attribution.trajectory.checkpoints`` takes once the tokenizer is beside the weights,
    with the learning rate in ``epoch-E.json``; the moments, those of Adam with its bias correction,
    are what ``attribution.curvature.moments`` takes.
    """
    from safetensors.torch import save_file

    target = folder / f"epoch-{epoch}"
    target.mkdir(parents=True)
    if hasattr(model, "peft_config"):
        from peft import get_peft_model_state_dict

        adapted: Any = model
        (name, config), *_ = adapted.peft_config.items()
        weights = get_peft_model_state_dict(adapted, adapter_name=name)
        tensors = {f"base_model.model.{key}": v.contiguous() for key, v in weights.items()}
        save_file(tensors, target / "adapter_model.safetensors", metadata={"format": "pt"})
        config.save_pretrained(target)
    else:
        model.save_pretrained(target)  # type: ignore[operator]
    (folder / f"epoch-{epoch}.json").write_bytes(json_bytes({"id": target.name, "lr": lr}))
    if isinstance(optimizer, torch.optim.AdamW):
        moments = moments_from_optimizer(optimizer.state_dict())
        named: dict[str, Tensor] = {f"{name}.exp_avg_sq": v for name, v in moments.items()}
        save_file(named, folder / f"epoch-{epoch}.moments.safetensors")


@contextmanager
def lora_layers(model: Any, rank: int, seed: int) -> Iterator[tuple[str, ...]]:
    """Fresh LoRA layers on every linear layer but the output; yields the names of what moves.

    Scaling 2 (alpha = 2 rank). B starts as zeros, so the model computes what it did before. On exit
    the layers are gone and every flag is as it was, also after an exception.

    Raises
    ------
    UserError
        peft is missing, or the model has an adapter already.
    """
    if importlib.util.find_spec("peft") is None:
        fix = "pip install 'taught[peft]'"
        raise UserError("training a LoRA needs the package peft", value="validation.method: lora", fix=fix)
    if hasattr(model, "peft_config"):
        rule, fix = (
            "one adapter at a time; method full trains the one that is there",
            "use --set validation.method=full",
        )
        raise UserError("the model has an adapter already", value="validation.method: lora", rule=rule, fix=fix)
    bitsandbytes_is_there()
    from peft import LoraConfig
    from peft.tuners.lora import LoraModel

    flags = [(p, p.requires_grad) for p in model.parameters()]
    config = LoraConfig(r=rank, lora_alpha=2 * rank, target_modules="all-linear")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        layers = LoraModel(model, config, "default")
    try:
        if quantised_layers(model):
            in_precision(model, trainable(model))
        use_fast_products(model)
        yield trainable(model)
    finally:
        layers.unload()
        for p, flag in flags:
            p.requires_grad_(flag)


@contextmanager
def in_training(model: nn.Module, recipe: Recipe, parameters: Sequence[str] | None) -> Iterator[Sequence[str] | None]:
    """The model ready to be trained by a recipe, and the patterns of what moves; as it was on exit.

    Moving weights are put back to the bit; fresh LoRA layers are there inside only.
    """
    if recipe.method == "lora":
        with lora_layers(model, recipe.lora_rank, recipe.seed) as patterns:
            yield patterns
    else:
        with restored(model, parameters):
            yield parameters
