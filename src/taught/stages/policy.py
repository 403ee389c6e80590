"""The stage ``policy``: read the prompts, choose features, fit and judge the policy, audit it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from taught.data.chat import EncodedPrompt
from taught.data.columns import columns_note
from taught.data.prompts import PromptSet
from taught.features.label import describe_features, load_labels
from taught.features.pooling import pool
from taught.features.sae import check_fit
from taught.features.select import Selection, select_features
from taught.model.readout import Readouts, ReadPrompt, check_trees, read_prompts
from taught.policy.audit import audit_categories
from taught.policy.checks import checks, measures
from taught.policy.evaluate import CoefficientIntervals, Evaluation, bootstrap_coefficients, evaluate_policy
from taught.policy.faithfulness import Fit, faithfulness
from taught.policy.predictors import Known
from taught.policy.ridge import choose_alpha, fit_policy
from taught.progress import Progress, SilentProgress
from taught.run.folder import RunFolder
from taught.stages.subject import Subject, open_subject, prompt_inputs, study_prompts
from taught.study.schema import Study


@dataclass(frozen=True, eq=False)
class _Read:
    """What the policy is made of: prompts, their tokens, read-outs, the chosen features' X."""

    prompts: PromptSet
    encoded: list[EncodedPrompt]
    inputs: list[ReadPrompt]
    readouts: Readouts
    selection: Selection
    X: np.ndarray
    fvu: float

    @property
    def y(self) -> np.ndarray:
        y: np.ndarray = self.readouts.y.numpy()
        return y

    @property
    def ids(self) -> list[str]:
        return list(self.readouts.prompt_ids)

    @property
    def groups(self) -> list[str]:
        return [prompt.group for prompt in self.prompts]


def policy(study: Study, run: RunFolder, progress: Progress | None = None) -> None:
    """Read the prompts, choose features, fit and judge the policy, audit its categories.

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
    with run.stage("policy", study, subject.identity) as stage:
        if stage.done:
            return
        read = _read(study, subject, prompts, progress)
        _write_readouts(run, study, read)
        progress.step("fit and judge the policy")
        labels = _write_labels(study, run, subject, read)
        _write_policy(study, run, subject, read, labels)


def _read(study: Study, subject: Subject, prompts: PromptSet, progress: Progress) -> _Read:
    """One forward pass over the prompts; features chosen on all of them."""
    encoded = subject.encode(prompts)
    inputs = prompt_inputs(encoded, study.readout.position)
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
    return _Read(prompts, encoded, inputs, readouts, selection, acts[:, selection.feature_ids], fvu)


def _write_readouts(run: RunFolder, study: Study, read: _Read) -> None:
    readouts, selection = read.readouts, read.selection
    run.write_tensors(
        "readouts",
        {"h": readouts.h.float().numpy(), "offsets": readouts.offsets.numpy(), "y": read.y},
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


def _write_labels(study: Study, run: RunFolder, subject: Subject, read: _Read) -> dict[int, str]:
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
        h=_pooled_h(study, read),
        labels=load_labels(study.features.labels) if study.features.labels else None,
    )
    run.write_json("labels", {str(item.feature_id): item.to_dict() for item in described})
    return {item.feature_id: item.label for item in described}


def _pooled_h(study: Study, read: _Read) -> np.ndarray:
    """The residual of each prompt, float64 [N, D], pooled as X is; means in place of maxima."""
    position = study.readout.position
    position = "mean_user" if position == "max_user" else position
    pooled = pool(read.readouts.h, read.readouts.offsets, position)
    h: np.ndarray = pooled.double().cpu().numpy()
    return h


def _write_policy(study: Study, run: RunFolder, subject: Subject, read: _Read, labels: dict[int, str]) -> None:
    """Fit, judge out of fold, resample, audit; every random draw follows prompt ids."""
    spec, X, y, ids = study.policy, read.X, read.y, read.ids
    draws: dict[str, Any] = {"fit_intercept": spec.intercept, "seed": spec.seed, "prompt_ids": ids}
    positive, negative = study.prompts.sides
    tried: list[dict[str, float]] = []
    if spec.alpha == "cv":
        alpha, tried = choose_alpha(X, y, folds=spec.folds, **draws)
    else:
        alpha = float(spec.alpha)
    fitted = fit_policy(
        X, y, prompt_ids=ids, feature_ids=read.selection.feature_ids, alpha=alpha, fit_intercept=spec.intercept
    )
    judged = evaluate_policy(
        X,
        y,
        read.groups,
        alpha=None if spec.alpha == "cv" else alpha,
        folds=spec.folds,
        bootstrap=spec.bootstrap,
        prompts_length=[len(prompt.ids) for prompt in read.inputs],
        positive=positive,
        negative=negative,
        **draws,
    )
    intervals = bootstrap_coefficients(X, y, alpha=alpha, n=spec.bootstrap, **draws)
    categories = [prompt.category or None for prompt in read.prompts]
    audit = audit_categories(
        y,
        read.groups,
        categories,
        X,
        fitted,
        intervals.lo,
        intervals.hi,
        positive=positive,
        negative=negative,
        seed=spec.seed,
    )
    run.write_table("audit", pa.Table.from_pylist(audit))
    columns = {
        "feature_id": fitted.feature_ids,
        "coef": fitted.coef,
        "lo": intervals.lo,
        "hi": intervals.hi,
        "sign_stability": intervals.sign_stability,
        "label": [labels[i] for i in fitted.feature_ids.tolist()],
    }
    run.write_table("coefficients", pa.table(columns))
    fit = {"alpha": alpha, "alpha_table": tried, "intercept_value": fitted.intercept}
    run.write_json("policy", {**judged.to_dict(), **fit, **_policy_facts(study, subject, read)})
    _write_faithfulness(run, study, read, judged, intervals, alpha)
    _write_prompts(run, read, judged.y_hat)


def _write_faithfulness(
    run: RunFolder, study: Study, read: _Read, judged: Evaluation, intervals: CoefficientIntervals, alpha: float
) -> None:
    """The faithfulness card and its numbered checks."""
    spec = study.policy
    known = Known(
        read.groups,
        *study.prompts.sides,
        categories=[prompt.category for prompt in read.prompts],
        length=np.array([len(prompt.ids) for prompt in read.inputs], dtype=np.float64),
        h=_pooled_h(study, read),
        texts=[prompt.text for prompt in read.prompts],
    )
    fit = Fit(None if spec.alpha == "cv" else alpha, spec.intercept, spec.seed)
    card = faithfulness(
        read.X, read.y, known, judged, intervals, fit=fit, alpha=alpha, bootstrap=spec.bootstrap, prompt_ids=read.ids
    )
    graded = [check.to_dict() for check in checks(measures(judged, card, read.y))]
    record = card.to_dict(read.selection.feature_ids.tolist())
    run.write_json("faithfulness", {"checks": graded, **record})


def _policy_facts(study: Study, subject: Subject, read: _Read) -> dict[str, Any]:
    """Choices and checks that belong beside the policy's statistics."""
    behavior, decode = subject.behavior, subject.loaded.tokenizer.decode
    chosen = read.selection.feature_ids
    return {
        "intercept": study.policy.intercept,
        "readout": study.readout.position,
        "encoder": study.sae.encoder,
        "block": subject.sae.block,
        "unexplained_variance": read.fvu,
        "always_on_features": int(read.selection.always_on[chosen].sum()),
        "behavior": {"meaning": behavior.meaning, "unit": behavior.unit},
        "scored": [[decode([i]) for i in ids] for ids in read.encoded[0].suffixes],
        "left_out": list(read.encoded[0].left_out),
    }


def _write_prompts(run: RunFolder, read: _Read, y_hat: np.ndarray) -> None:
    rows = [
        {
            "prompt_id": prompt.id,
            "text": prompt.text,
            "group": prompt.group,
            "category": prompt.category,
            "source": prompt.source,
            "licence": prompt.licence,
            "n_tokens": len(tokens.ids),
            "y": float(value),
            "y_hat": float(predicted),
        }
        for prompt, tokens, value, predicted in zip(read.prompts, read.inputs, read.y, y_hat, strict=True)
    ]
    run.write_table("prompts", pa.Table.from_pylist(rows))
