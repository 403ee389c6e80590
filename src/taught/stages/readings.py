"""The stage ``readings``: run the model on the prompts, read the behavior and the SAE's features."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from taught.data.columns import columns_note
from taught.data.prompts import PromptSet
from taught.features.label import describe_features, load_labels
from taught.features.pooling import pool, pooled_residuals
from taught.features.sae import check_fit
from taught.features.select import Selection, select_features
from taught.model.readout import Readouts, ReadPrompt, check_trees, read_prompts
from taught.progress import Progress, SilentProgress
from taught.run.folder import RunFolder
from taught.stages.subject import Subject, open_subject, prompt_inputs, study_prompts
from taught.study.schema import Study


@dataclass(frozen=True, eq=False)
class _Read:
    """Prompts, their tokens, read-outs, the chosen features' X."""

    prompts: PromptSet
    inputs: list[ReadPrompt]
    readouts: Readouts
    selection: Selection
    X: np.ndarray
    fvu: float

    @property
    def ids(self) -> list[str]:
        return list(self.readouts.prompt_ids)

    @property
    def groups(self) -> list[str]:
        return [prompt.group for prompt in self.prompts]


def readings(study: Study, run: RunFolder, progress: Progress | None = None) -> None:
    """Read the prompts and choose features.

    Raises
    ------
    UserError
        Data, model and SAE do not fit together; see docs/formats.md for what is written.
    """
    progress = progress or SilentProgress()
    prompts = study_prompts(study)
    progress.note(columns_note(study.prompts.path, prompts.columns))
    progress.step("load model and SAE")
    subject = open_subject(study)
    with run.stage("readings", study, subject.identity) as stage:
        if stage.done:
            return
        read = _read(study, subject, prompts, progress)
        _write_readouts(run, study, read)
        _write_labels(study, run, subject, read)
        _write_prompts(run, read)
        run.write_json("readings", _facts(study, subject, read))


def _read(study: Study, subject: Subject, prompts: PromptSet, progress: Progress) -> _Read:
    """One forward pass over the prompts; features chosen on all of them."""
    inputs = prompt_inputs(subject.chat.encode_prompts(prompts), study.readout.position)
    model, block = subject.loaded.model, subject.sae.block
    check_trees(model, inputs, subject.behavior)
    progress.step("read prompts", len(inputs))
    readouts = read_prompts(model, inputs, subject.behavior, block, progress=progress)
    fvu = check_fit(subject.sae, readouts.h, study.sae.max_fvu)
    with torch.no_grad():
        tokens = subject.sae.encode(readouts.h, encoder=study.sae.encoder)
        acts = pool(tokens, readouts.offsets, study.readout.position).double().cpu().numpy()
    positive, negative = study.prompts.sides
    selection = select_features(
        acts,
        [prompt.group for prompt in prompts],
        positive=positive,
        negative=negative,
        threshold=study.features.threshold,
        max_features=study.features.max_features,
        ids=study.features.ids,
    )
    return _Read(prompts, inputs, readouts, selection, acts[:, selection.feature_ids], fvu)


def _write_readouts(run: RunFolder, study: Study, read: _Read) -> None:
    readouts, selection = read.readouts, read.selection
    run.write_tensors(
        "readouts",
        {"h": readouts.h.float().numpy(), "offsets": readouts.offsets.numpy(), "y": readouts.y.numpy()},
        {"prompt_ids": read.ids},
        axes={"y": ("prompt_ids",), "h": (None, None), "offsets": (None,)},
    )
    run.write_tensors(
        "activations",
        {"X": read.X},
        {"prompt_ids": read.ids, "feature_ids": selection.feature_ids.tolist()},
        axes={"X": ("prompt_ids", "feature_ids")},
    )
    every = np.arange(len(selection.rate))
    positive, negative = study.prompts.sides
    columns = {
        "feature_id": every,
        "mean_positive": selection.means[positive],
        "mean_negative": selection.means[negative],
        "difference": selection.difference,
        "rate": selection.rate,
        "always_on": selection.always_on,
        "selected": np.isin(every, selection.feature_ids),
    }
    run.write_table("features", pa.table(columns))


def _write_labels(study: Study, run: RunFolder, subject: Subject, read: _Read) -> None:
    """Describe the chosen features by the prompts and tokens on which they are active."""
    ids, offsets = read.selection.feature_ids, read.readouts.offsets
    with torch.no_grad():
        index = torch.as_tensor(ids.copy())
        acts = subject.sae.encode(read.readouts.h, index, encoder=study.sae.encoder)
    decode = subject.loaded.tokenizer.decode
    described = describe_features(
        ids,
        acts.double().cpu().numpy(),
        [decode([prompt.ids[t]]) for prompt in read.inputs for t in prompt.read],
        np.repeat(np.arange(len(read.inputs)), np.diff(offsets.numpy())),
        prompt_ids=read.ids,
        texts=[prompt.text for prompt in read.prompts],
        groups=read.groups,
        h=pooled_residuals(read.readouts.h, offsets, study.readout.position),
        labels=load_labels(study.features.labels) if study.features.labels else None,
    )
    run.write_json("labels", {str(item.feature_id): item.to_dict() for item in described})


def _facts(study: Study, subject: Subject, read: _Read) -> dict[str, Any]:
    """What was read with."""
    behavior, decode = subject.behavior, subject.loaded.tokenizer.decode
    chosen = read.selection.feature_ids
    return {
        "readout": study.readout.position,
        "encoder": study.sae.encoder,
        "block": subject.sae.block,
        "unexplained_variance": read.fvu,
        "always_on_features": int(read.selection.always_on[chosen].sum()),
        "prefixes": [
            {"text": text, "tokens": [decode([i]) for i in ids]}
            for text, ids in zip(behavior.prefixes, behavior.tokens, strict=True)
        ],
        "dropped_prefixes": list(behavior.dropped),
    }


def _write_prompts(run: RunFolder, read: _Read) -> None:
    rows = [
        {
            "prompt_id": prompt.id,
            "text": prompt.text,
            "group": prompt.group,
            "category": prompt.category,
            "source": prompt.source,
            "licence": prompt.licence,
            "n_tokens": len(tokens.ids),
            "y": value,
        }
        for prompt, tokens, value in zip(read.prompts, read.inputs, read.readouts.y.tolist(), strict=True)
    ]
    run.write_table("prompts", pa.Table.from_pylist(rows))
