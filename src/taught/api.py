"""Influence in one call: a model, examples and prompts in, an array with ids out."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import nn

from taught.core import driver
from taught.core.estimator import Work
from taught.core.names import TargetName
from taught.core.scores import Scores
from taught.core.target import TargetSet
from taught.data.overlap import drop_overlap
from taught.errors import UserError
from taught.model.adapter import given_adapter
from taught.model.gradients import evaluating
from taught.model.load import LoadedModel
from taught.model.quantised import plain_weights, quantisation
from taught.progress import Progress, SilentProgress
from taught.stages.ready import Data, make_ready, read_here, wanted_targets, without_repeats
from taught.stages.subject import Subject, chosen_examples, open_subject, study_prompts
from taught.study.schema import Study


def influence(
    model: Any,
    examples: str | Path | Iterable[dict[str, Any]],
    prompts: str | Path | Iterable[Mapping[str, Any]],
    targets: Sequence[str | TargetName] | None = None,
    *,
    tokenizer: Any = None,
    behavior: str | Mapping[str, Any] | None = None,
    sae: str | Path | None = None,
    estimator: str | Mapping[str, Any] | None = None,
    curvature: str | Mapping[str, Any] | None = None,
    trajectory: str | Mapping[str, Any] | None = None,
    lr: float | None = None,
    study: Study | None = None,
    folder: str | Path | None = None,
    progress: Progress | None = None,
) -> Scores:
    """What one training step on each example does to each target.

    Parameters
    ----------
    model : a folder or hub id, or a model of ``transformers`` together with its ``tokenizer``
    examples : training examples: a file (JSONL, Parquet, CSV), dicts, or a ``datasets.Dataset``, with ``messages`` or
        ``prompt`` and ``response``, and ids if they have some; documents: ``study.examples.kind``
    prompts : evaluation prompts, likewise, with ``prompt`` and, if there are several, ``group``
    targets : names such as ``behavior:GROUP``, ``score``, ``coefficient:17``, ``behavior:a - behavior:b``; None: the
        behavior of every group, and with an SAE the policy's score and coefficients
    behavior : the number y that is measured on each prompt: a kind, or a mapping of ``kind`` and its parameters. This
        and what follows: None for what ``study`` says (``prefixes``, ``adjoint``, ``identity``, ``base``, 1e-4)
    sae : folder or release of a sparse autoencoder. Without one there is no policy, and none is needed for
        ``behavior:*`` and ``prompt:*``. With one, name the two groups: ``study``'s ``prompts.positive_group`` and
        ``prompts.negative_group``
    estimator, curvature, trajectory : how the effect is computed (docs/methods.md); a name, or a mapping of ``kind``
        and its parameters
    lr : learning rate of the step. Values are changes per step: positive, training on the example raises the target
    study : everything that is not given here, as a study says it; its model, examples and prompts are not read
    folder : where an estimator may keep what outlives this call (sketches)

    Returns
    -------
    Scores, float64 [examples, targets], with ids: ``scores["behavior:GROUP"]``, ``scores.top(10)``,
    ``scores.to_arrow()``.

    Raises
    ------
    UserError
        Data, model, targets and method do not fit together; an example overlaps a prompt, is truncated, or has
        no finite loss.

    Notes
    -----
    Cost: one forward and backward pass over the prompts for each target, and one over the examples. Source:
    Pruthi et al., arXiv 2002.08484 (one step), SMDA, arXiv 2606.29171 (policies).

    Examples
    --------
    >>> scores = influence("HuggingFaceTB/SmolLM2-135M-Instruct", "pairs.jsonl", "prompts.jsonl")  # doctest: +SKIP
    >>> scores.top(3, "behavior:harmless")  # doctest: +SKIP
    [('r-117', 0.0121), ('r-004', 0.0097), ('r-088', 0.0090)]
    """
    progress = progress or SilentProgress()
    study = study or Study()
    given = {
        "behavior": behavior,
        "attribution.estimator": estimator,
        "attribution.curvature": curvature,
        "attribution.trajectory": trajectory,
        "attribution.lr": lr,
        "sae.path": None if sae is None else str(sae),
    }
    for key, value in given.items():
        if value is not None:
            study = study.replace(key, value)
    subject = _subject(study, model, tokenizer, kept=folder is not None)
    records = chosen_examples(study, examples)
    read = study_prompts(study, prompts)
    records, overlap = drop_overlap(records, read, study.examples.drop_overlap)
    data = without_repeats(study, Data(read, records, [example_id for example_id, _ in overlap]))
    own = subject.loaded.model
    # A caller may be in a mode that records no gradients.
    with torch.inference_mode(False), torch.enable_grad(), evaluating(own), plain_weights(own):
        readings = read_here(study, subject, read, progress)
        ready = make_ready(study, subject, data, readings, progress)
        asked = TargetSet.of(wanted_targets(study, readings) if targets is None else targets, readings)
        work = Work(progress, None, None if folder is None else Path(folder))
        return driver.scores(ready.problem, ready.inputs, asked, ready.method, work)


def _subject(study: Study, model: Any, tokenizer: Any, *, kept: bool) -> Subject:
    """The model, loaded or as it was given; what is kept of a given one belongs to its weights alone."""
    if tokenizer is None:
        return open_subject(study.replace("model.id", str(model)))
    if study.model.adapter is not None:
        raise UserError(
            "a model that is given brings its adapter along",
            value=study.model.adapter,
            rule="model.adapter is put on a model that is loaded by its folder or hub id",
            fix="give the model's folder or id, or PeftModel.from_pretrained(model, adapter, is_trainable=True)",
        )
    if study.model.load_in is not None:
        raise UserError(
            "a model that is given is quantised or not",
            value=study.model.load_in,
            rule="model.load_in is of a model that is loaded by its folder or hub id",
            fix="give the model's folder or id, or load the model with a quantization_config",
        )
    quantisation(model.config, type(model).__name__, None)
    model, moving = given_adapter(model)
    weights = {"source": "a model that was given", **({"sha256": _digest(model)} if kept else {})}
    return open_subject(study, LoadedModel(model, tokenizer, type(model).__name__, None, weights, moving))


def _digest(model: nn.Module) -> str:
    """Hex digest of a model's weights as they are held, and of its settings. Reads a gigabyte in a second or two."""
    config: Any = model.config
    settings = [
        {key: value for key, value in config.to_dict().items() if key != "_name_or_path"},
        config._attn_implementation,
        {name: own.to_dict() for name, own in (getattr(model, "peft_config", None) or {}).items()},
    ]
    plain = json.dumps(settings, sort_keys=True, default=lambda v: sorted(v) if isinstance(v, set) else str(v))
    digest = hashlib.sha256(plain.encode())
    for name, tensor in model.state_dict().items():
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().reshape(-1).view(torch.uint8).numpy())
    return digest.hexdigest()
