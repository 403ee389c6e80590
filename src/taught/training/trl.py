"""The same training by the SFTTrainer of the package trl, or its DPOTrainer, for those whose models are made by them.

They are given tokens, labels and the log-probabilities of the reference, so the response mask is the influence's own;
nothing is tokenised, truncated or packed anew. Three things are their own and differ from the plain loop
(``taught.training.loop``):

 - the loss of a step is the mean over all response tokens of its examples, so that long responses weigh more; the loop
   takes the mean over examples of each one's mean (of preferences both take the mean over examples)
 - the order of the examples is their own shuffle by the seed: subsets share no order
 - dropout is on, where a model has any; weight decay leaves out norms and biases
"""

from __future__ import annotations

import copy
import importlib.util
import math
import tempfile
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from taught.core.example import Dpo, Examples
from taught.data.columns import name_ids
from taught.errors import UserError
from taught.model.layout import first_device
from taught.model.parameters import moving_parameters
from taught.model.quantised import quantised_layers
from taught.progress import Progress, SilentProgress
from taught.training.loop import TrainLog, check_inputs, learning_rates, only_moving
from taught.training.recipe import Recipe

_LOOP = "use --set validation.trainer=loop"


def train_by_trl(
    model: nn.Module,
    inputs: Examples,
    recipe: Recipe,
    *,
    tokenizer: Any,
    parameters: Sequence[str] | None = None,
    progress: Progress | None = None,
) -> TrainLog:
    """Train the model on the examples, in place, batches of one example with accumulated gradients.

    The trainer works on a copy of the model, since it changes more than weights; the trained weights are copied back.

    Parameters
    ----------
    tokenizer : the model's; it is saved nowhere and encodes nothing

    Raises
    ------
    UserError
        trl is missing; the model is quantised; the trainer dropped examples; pairs and preferences are mixed; as in
        ``taught.training.loop.train``.
    """
    value = "validation.trainer: trl"
    if quantised_layers(model):
        rule = "it would take the products of bitsandbytes, and its adapter in another wrapper"
        raise UserError("trl does not train on quantised weights here", value=value, rule=rule, fix=_LOOP)
    if importlib.util.find_spec("trl") is None:
        fix = f"pip install 'taught[trl]', or {_LOOP}"
        raise UserError("training by trl needs the package trl", value=value, fix=fix)
    if recipe.momentum or recipe.batches == "held":
        value = f"validation.momentum: {recipe.momentum}, validation.batches: {recipe.batches}"
        raise UserError("trl trains without momentum, and fills its batches itself", value=value, fix=_LOOP)
    inputs = sorted(inputs, key=lambda example: example.id)
    moving = moving_parameters(model, parameters)
    check_inputs(inputs, moving)
    trained = copy.deepcopy(model)
    betas = {p.link.beta if isinstance(p.link, Dpo) else None for p in inputs}
    if len(betas) > 1:
        raise UserError("one trainer takes examples of one kind", rule="all pairs, or all preferences with one beta")
    collator = (_Collator if betas == {None} else _PreferenceCollator)(progress)
    with only_moving(trained, moving), tempfile.TemporaryDirectory() as folder:
        if isinstance(collator, _PreferenceCollator):
            trainer = _dpo_trainer(trained, inputs, recipe, tokenizer, collator, folder, betas.pop())
        else:
            trainer = _sft_trainer(trained, inputs, recipe, tokenizer, collator, folder)
            _check_prepared(inputs, trainer.train_dataset)
        trainer.train()
    steps = [entry for entry in trainer.state.log_history if "loss" in entry]
    size = recipe.batch
    epochs = [collator.seen[at : at + len(inputs)] for at in range(0, len(collator.seen), len(inputs))]
    seen = tuple(tuple(ids[at : at + size]) for ids in epochs for at in range(0, len(ids), size))
    losses = tuple(float(entry["loss"]) for entry in steps)
    bad = [number for number, loss in enumerate(losses) if not math.isfinite(loss)]
    new = dict(trained.named_parameters())
    if bad or not all(bool(new[name].isfinite().all()) for name in moving):
        at = bad[0] if bad else len(seen) - 1
        raise UserError(
            "training diverged",
            value=f"step {at + 1}, examples {name_ids(seen[at])}",
            rule="losses and weights stay finite numbers",
            fix="lower validation.lr, or set validation.max_grad_norm",
        )
    with torch.no_grad():
        for name, p in moving.items():
            p.copy_(new[name])
    return TrainLog(seen, losses, tuple(float(entry["learning_rate"]) for entry in steps))


class _Collator:
    """Pads one batch on the right and remembers whose examples it was, in order."""

    def __init__(self, progress: Progress | None) -> None:
        self.seen: list[str] = []
        self._progress = progress or SilentProgress()

    def __call__(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        self.seen += [row["example_id"] for row in rows]
        self._progress.advance(len(rows))
        return self.stacked(rows)

    def stacked(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        """What the trainer's model and loss are given."""
        ids = [row["input_ids"] for row in rows]
        return {**_padded(ids), "labels": _right([row["labels"] for row in rows], -100)}


class _PreferenceCollator(_Collator):
    """The same for preferences: the chosen conversations, then the rejected ones."""

    def stacked(self, rows: Sequence[dict[str, Any]]) -> dict[str, Tensor]:
        ids, masks = ([row[name] for name in names for row in rows] for names in (_SIDES, _MASKS))
        return {
            **_padded(ids),
            "completion_mask": _right(masks, 0),
            "ref_chosen_logps": torch.tensor([row["reference"] for row in rows]),
            "ref_rejected_logps": torch.zeros(len(rows)),
        }


_SIDES, _MASKS = ("chosen", "rejected"), ("chosen_mask", "rejected_mask")


def _padded(ids: Sequence[Sequence[int]]) -> dict[str, Tensor]:
    return {"input_ids": _right(ids, 0), "attention_mask": _right([[1] * len(of) for of in ids], 0)}


def _right(rows: Sequence[Sequence[int]], fill: int) -> Tensor:
    width = max(map(len, rows))
    return torch.tensor([[*row, *[fill] * (width - len(row))] for row in rows])


def _arguments(model: nn.Module, inputs: Examples, recipe: Recipe, folder: str) -> dict[str, Any]:
    """Arguments of both trainers."""
    steps = recipe.epochs * math.ceil(len(inputs) / recipe.batch)
    learning_rates(recipe, steps)  # refuses a run that moves nothing
    return dict(
        output_dir=folder,
        num_train_epochs=recipe.epochs,
        per_device_train_batch_size=1,
        gradient_accumulation_steps=recipe.batch,
        learning_rate=recipe.lr,
        optim="adamw_torch" if recipe.optimizer == "adamw" else "sgd",
        weight_decay=recipe.weight_decay,
        lr_scheduler_type="linear" if recipe.schedule == "linear" else "constant_with_warmup",
        warmup_steps=math.ceil(recipe.warmup * steps),
        max_grad_norm=recipe.max_grad_norm or 0.0,  # 0: gradients are left as they are
        seed=recipe.seed,
        bf16=False,
        gradient_checkpointing=False,
        use_cpu=first_device(model).type == "cpu",
        max_length=None,
        remove_unused_columns=False,
        logging_steps=1,
        logging_nan_inf_filter=False,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


def _sft_trainer(
    model: nn.Module, inputs: Examples, recipe: Recipe, tokenizer: Any, collator: _Collator, folder: str
) -> Any:
    from trl import SFTConfig, SFTTrainer

    config = SFTConfig(packing=False, **_arguments(model, inputs, recipe, folder))
    rows = [
        {
            "example_id": p.id,
            "input_ids": list(p.ids),
            "labels": [i if w else -100 for i, w in zip(p.ids, p.weights[0], strict=True)],
        }
        for p in inputs
    ]
    return _silent(SFTTrainer, config, model, rows, collator, tokenizer)


def _dpo_trainer(
    model: nn.Module,
    inputs: Examples,
    recipe: Recipe,
    tokenizer: Any,
    collator: _PreferenceCollator,
    folder: str,
    beta: float | None,
) -> Any:
    from trl import DPOConfig, DPOTrainer

    class Prepared(DPOTrainer):
        """Takes rows of tokens, masks and the reference as they are."""

        def _prepare_dataset(self, dataset: Any, *_: Any) -> Any:
            return dataset

        def _precompute_ref_logps(self, dataset: Any, *_: Any) -> Any:
            return dataset

    config = DPOConfig(
        loss_type="sigmoid", beta=beta, precompute_ref_log_probs=True, **_arguments(model, inputs, recipe, folder)
    )
    rows = [
        {
            "example_id": p.id,
            "reference": p.link.reference,
            **{side: list(ids) for side, ids in zip(_SIDES, p.sequences, strict=True)},
            **{mask: [int(w != 0) for w in of] for mask, of in zip(_MASKS, p.weights, strict=True)},
        }
        for p in inputs
        if isinstance(p.link, Dpo)
    ]
    return _silent(Prepared, config, model, rows, collator, tokenizer)


def _silent(
    kind: Any, config: Any, model: nn.Module, rows: list[dict[str, Any]], collator: _Collator, tokenizer: Any
) -> Any:
    """A trainer on these rows that prints nothing."""
    from datasets import Dataset
    from transformers import PrinterCallback

    trainer = kind(
        model=model,
        args=config,
        train_dataset=Dataset.from_list(rows),
        data_collator=collator,
        processing_class=tokenizer,
    )
    trainer.remove_callback(PrinterCallback)
    return trainer


def _check_prepared(inputs: Examples, dataset: Any) -> None:
    """Refuse a data set that is not what was given: it drops rows whose labels are all masked."""
    wanted = {p.id: (list(p.ids), [i for i, w in zip(p.ids, p.weights[0], strict=True) if w]) for p in inputs}
    found = {
        row["example_id"]: (row["input_ids"], [label for label in row["labels"] if label != -100]) for row in dataset
    }
    if found != wanted:
        differing = sorted(i for i in wanted if found.get(i) != wanted[i])
        raise UserError(
            "trl dropped or changed examples when it prepared them",
            value=name_ids(differing),
            rule="every example is trained on as it is",
            fix=_LOOP,
        )
