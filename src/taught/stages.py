"""One function per stage: reads the files of the stages before it, computes, writes its own files.

The order of a run is ``policy``, ``attribute``, ``curate``, ``report``; ``check`` runs before and
changes nothing; ``demo`` runs all on the shipped preset. File formats: docs/formats.md.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from taught.analysis.curate import curate as decide
from taught.analysis.interference import comovement, interference
from taught.attribution.adjoint import Problem
from taught.attribution.estimate import Effects, adjoint_effects, finite_step_effects, step_checks
from taught.check import CheckReport, check_study
from taught.data.pairs import PairSet, load_pairs
from taught.data.prompts import PromptSet
from taught.data.tables import read_rows
from taught.errors import UserError
from taught.features.label import describe_features, load_labels
from taught.features.pooling import pool
from taught.features.sae import check_fit
from taught.features.select import Selection, select_features
from taught.model.readout import Readouts, ReadPrompt, check_trees, read_packed, read_prompts
from taught.model.readout import pack as pack_prompts
from taught.policy.audit import audit_categories
from taught.policy.evaluate import bootstrap_coefficients, evaluate_policy
from taught.policy.ridge import Policy, choose_alpha, fit_policy
from taught.progress import Progress, SilentProgress
from taught.run import RunFolder
from taught.setup import (
    Subject,
    open_subject,
    pair_inputs,
    prompt_inputs,
    study_pairs,
    study_prompts,
)
from taught.study import Study, load_study


def check(study: Study) -> CheckReport:
    """What would run, counted and estimated; changes nothing."""
    return check_study(study)


# --- policy -------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class _Read:
    """What the policy is made of: prompts, their tokens, read-outs, the chosen features' X."""

    prompts: PromptSet
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
    inputs = prompt_inputs(subject.chat.encode_prompts(prompts), study.readout.position)
    model, block = subject.loaded.model, subject.sae.block
    check_trees(model, inputs, subject.behavior, block)
    progress.step("read prompts", len(inputs))
    readouts = read_prompts(model, inputs, subject.behavior, block, progress=progress)
    fvu = check_fit(subject.sae, readouts.h, study.sae.max_fvu)
    with torch.no_grad():
        tokens = subject.sae.encode(readouts.h, encoder=study.sae.encoder)
        acts = pool(tokens, readouts.offsets, study.readout.position).double().cpu().numpy()
    selection = select_features(
        acts,
        [prompt.group for prompt in prompts],
        positive=study.prompts.positive_group,
        negative=study.prompts.negative_group,
        threshold=study.features.threshold,
        max_features=study.features.max_features,
        ids=study.features.ids,
    )
    return _Read(prompts, inputs, readouts, selection, acts[:, selection.feature_ids], fvu)


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
    columns = {
        "feature_id": every,
        "mean_positive": selection.means[study.prompts.positive_group],
        "mean_negative": selection.means[study.prompts.negative_group],
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
        position = study.readout.position
        mean_h = pool(read.readouts.h, offsets, "mean_user" if position == "max_user" else position)
    decode = subject.loaded.tokenizer.decode
    described = describe_features(
        ids,
        acts.double().cpu().numpy(),
        [decode([prompt.ids[t]]) for prompt in read.inputs for t in prompt.read],
        np.repeat(np.arange(len(read.inputs)), np.diff(offsets.numpy())),
        prompt_ids=read.ids,
        texts=[prompt.text for prompt in read.prompts],
        groups=read.groups,
        h=mean_h.double().cpu().numpy(),
        labels=load_labels(study.features.labels) if study.features.labels else None,
    )
    run.write_json("labels", {str(item.feature_id): item.to_dict() for item in described})
    return {item.feature_id: item.label for item in described}


def _write_policy(
    study: Study, run: RunFolder, subject: Subject, read: _Read, labels: dict[int, str]
) -> None:
    """Fit, judge out of fold, resample, audit; every random draw follows prompt ids."""
    spec, X, y, ids = study.policy, read.X, read.y, read.ids
    draws: dict[str, Any] = {"fit_intercept": spec.intercept, "seed": spec.seed, "prompt_ids": ids}
    positive, negative = study.prompts.positive_group, study.prompts.negative_group
    tried: list[dict[str, float]] = []
    if spec.alpha == "cv":
        alpha, tried = choose_alpha(X, y, folds=spec.folds, **draws)
    else:
        alpha = float(spec.alpha)
    fitted = fit_policy(X, y, prompt_ids=ids, feature_ids=read.selection.feature_ids, alpha=alpha,
                        fit_intercept=spec.intercept)  # fmt: skip
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
    categories = [prompt.category for prompt in read.prompts]
    audit = audit_categories(y, read.groups, categories, X, fitted, intervals.lo, intervals.hi,
                             positive=positive, negative=negative, seed=spec.seed)  # fmt: skip
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
    _write_prompts(run, read, judged.y_hat)


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
        "prefixes": [
            {"text": text, "tokens": [decode([i]) for i in ids]}
            for text, ids in zip(behavior.prefixes, behavior.tokens, strict=True)
        ],
        "dropped_prefixes": list(behavior.dropped),
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
        for prompt, tokens, value, predicted in zip(
            read.prompts, read.inputs, read.y, y_hat, strict=True
        )
    ]
    run.write_table("prompts", pa.Table.from_pylist(rows))


# --- attribute ----------------------------------------------------------------------------------


def attribute(study: Study, run: RunFolder, progress: Progress | None = None) -> None:
    """Effect of one SGD step on each pair: on the score, the coefficients and the groups' mean y.

    Raises
    ------
    UserError
        The policy is missing or of another study; pairs overlap, are truncated or have no finite
        loss.
    """
    progress = progress or SilentProgress()
    prompts = study_prompts(study)
    pairs, overlapping = study_pairs(study, prompts)
    progress.step("load model and SAE")
    subject = open_subject(study)
    with run.stage("attribute", study, subject.identity) as stage:
        if stage.done:
            return
        encoded, truncated = subject.chat.encode_pairs(
            pairs, study.pairs.max_tokens, study.pairs.drop_truncated
        )
        kept = {pair.id for pair in encoded}
        pairs = replace(pairs, pairs=tuple(pair for pair in pairs if pair.id in kept))
        fitted, groups = _read_policy(study, run)
        problem = _problem(study, subject, prompts, fitted)
        inputs = pair_inputs(encoded)
        estimate = (
            finite_step_effects if study.attribution.estimator == "finite-step" else adjoint_effects
        )
        effects = estimate(
            problem,
            inputs,
            fitted,
            groups,
            coefficients=study.attribution.coefficients,
            progress=progress,
            pieces=stage.partial,
        )
        checks = step_checks(problem, inputs, fitted, effects, study.attribution.exact_top,
                             progress=progress, pieces=stage.partial)  # fmt: skip
        intended = _intended(study, subject, pairs, fitted)
        _write_effects(run, study, fitted, effects)
        _write_pairs(run, pairs, encoded, effects)
        _write_summary(run, pairs, encoded, fitted, effects, intended, checks)
        run.write_json("dropped", {"overlap": overlapping, "truncated": truncated})


def _read_policy(study: Study, run: RunFolder) -> tuple[Policy, dict[str, list[str]]]:
    """The fitted policy from the run folder, and the prompt ids of each group."""
    arrays, ids = run.read_tensors("activations")
    readouts, reads = run.read_tensors("readouts")
    if reads["prompt_ids"] != ids["prompt_ids"]:
        raise UserError(
            "activations and read-outs are of different prompts", fix="run policy again, --fresh"
        )
    record = run.read_json("policy")
    fitted = fit_policy(
        arrays["X"],
        readouts["y"],
        prompt_ids=ids["prompt_ids"],
        feature_ids=ids["feature_ids"],
        alpha=record["alpha"],
        fit_intercept=record["intercept"],
    )
    groups: dict[str, list[str]] = {}
    for row in run.read_table("prompts").select(["prompt_id", "group"]).to_pylist():
        groups.setdefault(row["group"], []).append(row["prompt_id"])
    return fitted, groups


def _problem(study: Study, subject: Subject, prompts: PromptSet, fitted: Policy) -> Problem:
    encoded = {e.id: e for e in subject.chat.encode_prompts(prompts)}
    ordered = [encoded[prompt_id] for prompt_id in fitted.prompt_ids]
    return Problem(
        subject.loaded.model,
        prompt_inputs(ordered, study.readout.position),
        subject.behavior,
        subject.sae.block,
        subject.features(fitted.feature_ids.copy(), study),
        study.attribution.lr,
        study.attribution.batch_tokens,
        study.attribution.memory_gb,
    )


@torch.no_grad()
def _intended(
    study: Study, subject: Subject, pairs: PairSet, fitted: Policy
) -> dict[str, list[int]]:
    """For each pair the policy's features that are active on its own prompt."""
    encoded = [subject.chat.encode_prompt(pair.messages, pair.id) for pair in pairs]
    inputs = prompt_inputs(encoded, study.readout.position)
    features = subject.features(fitted.feature_ids.copy(), study)
    active: dict[str, list[int]] = {}
    for packed in pack_prompts(inputs, None):
        h, _ = read_packed(subject.loaded.model, packed, None, subject.sae.block)
        for i, row in zip(packed.index, features(h, packed.offsets), strict=True):
            active[inputs[i].id] = fitted.feature_ids[(row > 0).cpu().numpy()].tolist()
    return active


def _write_effects(run: RunFolder, study: Study, fitted: Policy, effects: Effects) -> None:
    parts = [_long(effects, "score", None, None, path) for path in ("x", "y", "total")]
    parts += [_long(effects, "mean_y", None, group, "y") for group in effects.mean_y]
    if effects.shift is not None:
        for column, feature_id in enumerate(fitted.feature_ids.tolist()):
            parts += [_long(effects, "coefficient", (column, feature_id), None, path)
                      for path in ("x", "y", "total")]  # fmt: skip
        r = comovement(effects.shift.total)
        run.write_tensors(
            "comovement",
            {"r": r},
            {"feature_ids": fitted.feature_ids.tolist()},
            axes={"r": ("feature_ids", "feature_ids")},
        )
    run.write_table("influence", pa.concat_tables(parts))
    if effects.dy is not None:
        run.write_tensors(
            "prompt_effects",
            {"dy": effects.dy.astype(np.float32)},
            {"pair_ids": list(effects.pair_ids), "prompt_ids": list(fitted.prompt_ids)},
            axes={"dy": ("pair_ids", "prompt_ids")},
        )


_LONG = pa.schema(
    [
        ("pair_id", pa.string()),
        ("target", pa.string()),
        ("feature_id", pa.int64()),
        ("group", pa.string()),
        ("pathway", pa.string()),
        ("value", pa.float64()),
        ("estimator", pa.string()),
    ]
)


def _long(
    effects: Effects, target: str, feature: tuple[int, int] | None, group: str | None, pathway: str
) -> pa.Table:
    """Rows of one target and pathway, all pairs, in long form."""
    values = effects.values(target, feature[0] if feature else None, group, pathway)
    n = len(effects.pair_ids)
    columns = [
        list(effects.pair_ids),
        [target] * n,
        [feature[1] if feature else None] * n,
        [group] * n,
        [pathway] * n,
        values,
        [effects.estimator] * n,
    ]
    return pa.table(dict(zip(_LONG.names, columns, strict=True)), schema=_LONG)


def _write_pairs(run: RunFolder, pairs: PairSet, encoded: Any, effects: Effects) -> None:
    tokens = {e.id: e for e in encoded}
    loss = dict(zip(effects.pair_ids, effects.losses, strict=True))
    rows = [
        {
            "pair_id": pair.id,
            "prompt": pair.prompt,
            "response": pair.response,
            "label": pair.label,
            "category": pair.category,
            "source": pair.source,
            "n_tokens": len(tokens[pair.id].input_ids),
            "n_response": tokens[pair.id].n_response,
            "truncated": tokens[pair.id].truncated,
            "loss": float(loss[pair.id]),
        }
        for pair in pairs
    ]
    run.write_table("pairs", pa.Table.from_pylist(rows))


def _write_summary(
    run: RunFolder,
    pairs: PairSet,
    encoded: Any,
    fitted: Policy,
    effects: Effects,
    intended: dict[str, list[int]],
    checks: dict[str, dict[str, float]],
) -> None:
    by_pair = {row["pair_id"]: row for row in _interference(fitted, effects, intended)}
    label = {pair.id: pair.label for pair in pairs}
    length = {e.id: e.n_response for e in encoded}
    order = np.argsort(-np.abs(effects.score.sum(0)), kind="stable")
    rank = {effects.pair_ids[i]: place + 1 for place, i in enumerate(order)}
    rows = []
    for i, pair_id in enumerate(effects.pair_ids):
        x, y = effects.score[:, i]
        rows.append(
            {
                "pair_id": pair_id,
                "label": label[pair_id],
                "score": float(x + y),
                "score_x": float(x),
                "score_y": float(y),
                **{f"mean_y_{g}": float(v[i]) for g, v in effects.mean_y.items()},
                "loss": float(effects.losses[i]),
                "n_response": length[pair_id],
                "rank": rank[pair_id],
                **by_pair[pair_id],
                "step_score": None,
                "refit_score": None,
                **checks.get(pair_id, {}),
            }
        )
    run.write_table("summary", pa.Table.from_pylist(rows))


def _interference(
    fitted: Policy, effects: Effects, intended: dict[str, list[int]]
) -> list[dict[str, Any]]:
    if effects.shift is None:  # without coefficients nothing can be said
        unknown = dict.fromkeys(
            (
                "outside_share",
                "outside_change",
                "dominant_feature",
                "dominant_share",
                "unintended",
                "expected_by_chance",
            )
        )
        note = "coefficients were not computed"
        return [
            {
                "pair_id": i,
                "intended": intended[i],
                "n_intended": len(intended[i]),
                **unknown,
                "note": note,
            }
            for i in effects.pair_ids
        ]
    return interference(
        effects.pair_ids,
        fitted.feature_ids,
        effects.shift.total,
        [intended[pair_id] for pair_id in effects.pair_ids],
    )


# --- curate, report, demo -----------------------------------------------------------------------


def curate(
    run: RunFolder, rule: str | None = None, k: int | None = None, target: str | None = None
) -> None:
    """Write which pairs to keep and which to drop, with the reason of each.

    Parameters
    ----------
    rule, k
        Instead of the study's.
    target
        What ``top-k`` sorts by: ``score`` or ``mean_y:GROUP``.
    """
    study = run.study
    study = study if rule is None else study.replace("curation.rule", rule)
    study = study if k is None else study.replace("curation.k", k)
    with run.stage("curate", study):
        summary = run.read_table("summary").to_pylist()
        column = _score_column(summary, study.curation.rule, target)
        decisions = decide(
            [row["pair_id"] for row in summary],
            [row["label"] for row in summary],
            [row[column] for row in summary],
            rule=study.curation.rule,
            k=study.curation.k if study.curation.rule == "top-k" else None,
        )
        run.write_table("curation", pa.Table.from_pylist(decisions))
        _write_choice(run, study, decisions)


def _score_column(summary: list[dict[str, Any]], rule: str, target: str | None) -> str:
    if target in (None, "score"):
        return "score"
    column = target.replace(":", "_") if target else ""
    if rule != "top-k" or column not in summary[0] or not column.startswith("mean_y_"):
        known = [name.replace("mean_y_", "mean_y:") for name in summary[0] if "mean_y_" in name]
        raise UserError(
            "this target cannot be curated by",
            value=target,
            rule=f"score, or with --rule top-k one of {', '.join(known)}",
            fix="taught curate RUN --rule top-k --target mean_y:GROUP",
        )
    return column


def _write_choice(run: RunFolder, study: Study, decisions: list[dict[str, Any]]) -> None:
    """The rows of the pair file, split by decision."""
    from taught.files import json_line

    path = study.pairs.path
    loaded = load_pairs(path)
    row = dict(zip(loaded.ids, read_rows(path), strict=True))
    for action in ("keep", "drop"):
        chosen = [d["pair_id"] for d in decisions if d["action"] == action]
        lines = [json_line({"id": pair_id, **row[pair_id]}) for pair_id in chosen]
        run.write_text(f"{action}.jsonl", "".join(lines))


def report(run: RunFolder) -> None:
    """Write ``report.html``."""
    from taught.report.build import render
    from taught.report.view import load_view

    with run.stage("report", run.study):
        run.verify()
        run.write_text("report.html", render(load_view(run.folder)))


def demo(
    run: RunFolder,
    prompts: int = 160,
    pairs: int = 36,
    features: int = 30,
    full: bool = False,
    progress: Progress | None = None,
) -> None:
    """Run every stage on the shipped preset, on a part of it unless ``full``."""
    study = load_study("refusal-smollm2")
    if not full:
        limits = {"prompts.limit": prompts, "pairs.limit": pairs, "features.max_features": features}
        for key, value in limits.items():
            study = study.replace(key, value)
    policy(study, run, progress)
    attribute(study, run, progress)
    curate(run)
    report(run)
