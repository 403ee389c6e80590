"""The stage ``readings``: run the model on the prompts, read the behavior and the SAE's features."""

from __future__ import annotations

from dataclasses import asdict
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from taught.analysis.skills import skills
from taught.behaviors.answer import right_option
from taught.core.passes import settle_passes
from taught.data.columns import columns_note
from taught.data.prompts import PromptSet
from taught.features.label import describe_features, load_labels
from taught.features.pooling import pool, pooled_residuals
from taught.features.sae import SparseAutoencoder, check_fit
from taught.features.select import Selection
from taught.model.readout import Readouts, ReadPrompt, read_prompts
from taught.progress import Progress, SilentProgress
from taught.run.folder import RunFolder
from taught.stages.subject import Subject, open_subject, prompt_inputs, select, study_prompts
from taught.study.schema import Study

COPIED = ("text", "group", "category", "source", "licence")  # of the prompts into their table


def readings(study: Study, run: RunFolder, progress: Progress | None = None) -> None:
    """Read the prompts: the behavior, and with an SAE its features, of which some are chosen.

    Cost: one forward pass over the prompts.

    Raises
    ------
    UserError
        Data, model and SAE do not fit together; see docs/formats.md for what is written.
    """
    progress = progress or SilentProgress()
    prompts = study_prompts(study)
    progress.note(columns_note(study.prompts.path, prompts.columns))
    progress.step("load the model")
    subject = open_subject(study)
    with run.stage("readings", study, subject.identity) as stage:
        if stage.done:
            return
        encoded = subject.encode(prompts)
        inputs = prompt_inputs(encoded, study.readout.position if subject.sae is not None else None)
        model, point = subject.loaded.model, None if subject.sae is None else subject.sae.point
        settle_passes(model, inputs, subject.behavior, progress=progress)
        progress.step("read prompts", len(inputs))
        read = read_prompts(model, inputs, subject.behavior, point, progress=progress)
        arrays: dict[str, Any] = {"y": read.y.numpy()}
        decode, behavior, first = subject.loaded.tokenizer.decode, subject.behavior, encoded[0]
        facts: dict[str, Any] = {
            "behavior": {"meaning": behavior.meaning, "unit": behavior.unit},
            "scored": [[decode([i]) for i in ids] for ids in first.suffixes],
            "left_out": list(first.left_out),
        }
        if subject.sae is not None:
            arrays |= {"h": read.h.float().numpy(), "offsets": read.offsets.numpy()}
            fvu = check_fit(subject.sae, read.h, study.sae.max_fvu)
            selection = _write_features(study, run, subject.sae, prompts, read)
            _write_labels(study, run, subject, selection.feature_ids, prompts, inputs, read)
            facts |= {
                "readout": study.readout.position,
                "encoder": study.sae.encoder,
                "block": subject.sae.point.block,
                "point": subject.sae.point.part,
                "unexplained_variance": fvu,
                "always_on_features": int(selection.always_on[selection.feature_ids].sum()),
            }
        axes = {"y": ("prompt_ids",), "h": (None, None), "offsets": (None,)}
        ids = {"prompt_ids": list(read.prompt_ids)}
        run.write_tensors("readouts", arrays, ids, axes={name: axes[name] for name in arrays})
        if read.margin is not None:
            own = zip(prompts, read.margin.tolist(), strict=True)
            found = skills((prompt.group, value, len(prompt.options), right_option(prompt)) for prompt, value in own)
            facts["skills"] = [skill.to_dict() for skill in found]
            for warning in filter(None, (skill.warning for skill in found)):
                progress.note(warning)
        columns: dict[str, list[Any]] = {
            "prompt_id": [prompt.id for prompt in prompts],
            **{name: [getattr(prompt, name) for prompt in prompts] for name in COPIED},
            "n_tokens": [len(tokens.ids) for tokens in inputs],
            "y": read.y.tolist(),
            **({} if read.margin is None else {"margin": read.margin.tolist()}),
        }
        run.write_table("prompts", pa.table(columns))
        run.write_json("readings", facts)


@torch.no_grad()
def _write_features(
    study: Study, run: RunFolder, sae: SparseAutoencoder, prompts: PromptSet, read: Readouts
) -> Selection:
    """Choose features on all prompts."""
    tokens = sae.encode(read.h, encoder=study.sae.encoder)
    acts = pool(tokens, read.offsets, study.readout.position).double().cpu().numpy()
    selection = select(study, prompts, acts)
    ids = {"prompt_ids": list(read.prompt_ids), "feature_ids": selection.feature_ids.tolist()}
    X = acts[:, selection.feature_ids]
    run.write_tensors("activations", {"X": X}, ids, axes={"X": ("prompt_ids", "feature_ids")})
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
    return selection


@torch.no_grad()
def _write_labels(
    study: Study,
    run: RunFolder,
    subject: Subject,
    ids: np.ndarray,
    prompts: PromptSet,
    inputs: list[ReadPrompt],
    read: Readouts,
) -> None:
    """Describe the chosen features by the prompts and tokens on which they are active."""
    decode = subject.loaded.tokenizer.decode
    acts = subject.required_sae.encode(read.h, torch.as_tensor(ids.copy()), encoder=study.sae.encoder)
    described = describe_features(
        ids,
        acts.double().cpu().numpy(),
        [decode([prompt.ids[t]]) for prompt in inputs for t in prompt.read],
        np.repeat(np.arange(len(inputs)), np.diff(read.offsets.numpy())),
        prompt_ids=list(read.prompt_ids),
        texts=[prompt.text for prompt in prompts],
        groups=[prompt.group for prompt in prompts],
        h=pooled_residuals(read.h, read.offsets, study.readout.position),
        labels=load_labels(study.features.labels) if study.features.labels else None,
    )
    run.write_json("labels", {str(item.feature_id): asdict(item) for item in described})
