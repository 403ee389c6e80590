"""The stage ``attribute``: from the policy and the pairs to the influence tables."""

from __future__ import annotations

import os
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from taught.analysis.interference import comovement, interference
from taught.attribution.estimate import Effects
from taught.attribution.sketched import fill
from taught.data.pairs import Pair, PairSet
from taught.environment import process_share
from taught.errors import UserError
from taught.model.readout import pack as pack_prompts
from taught.model.readout import read_packed
from taught.policy.ridge import Policy
from taught.progress import Progress, SilentProgress
from taught.run import RunFolder
from taught.setup import Subject, open_subject, prompt_inputs, refuse_combinations
from taught.stages.estimating import estimate, prepare, read_data, sketch_record, sketch_source
from taught.study import Study


def attribute(study: Study, run: RunFolder, progress: Progress | None = None) -> None:
    """Effect of one SGD step on each pair: on the score, the coefficients and the groups' mean y.

    Raises
    ------
    UserError
        The policy is missing or of another study; pairs overlap, are truncated or have no finite
        loss.
    """
    progress = progress or SilentProgress()
    refuse_combinations(study)
    data = read_data(study, progress)
    progress.step("load model and SAE")
    subject = open_subject(study)
    with run.stage("attribute", study, subject.identity) as stage:
        if stage.done:
            return
        ready = prepare(study, run, subject, data)
        pairs, encoded, fitted = ready.pairs, ready.encoded, ready.fitted
        effects, checks = estimate(study, run, subject, ready, progress, stage.partial)
        intended = _intended(study, subject, pairs, fitted)
        _write_effects(run, study, fitted, effects)
        _write_pairs(run, pairs, encoded, effects)
        _write_summary(run, pairs, encoded, fitted, effects, intended, checks)
        if effects.error is not None:
            run.write_json("sketch", sketch_record(study, run, ready, effects.error))
        run.write_json("dropped", {"overlap": data.overlapping, "truncated": ready.truncated})


def sketch(study: Study, run: RunFolder, progress: Progress | None = None) -> None:
    """Fill the store of sketches and nothing else; the estimator ``sketch`` reads it.

    Several processes may do this at once (torchrun, ``accelerate launch``): each takes its share of
    the shards, and none waits for another.

    Raises
    ------
    UserError
        As :func:`attribute`; the store was made under other conditions.
    """
    progress = progress or SilentProgress()
    data = read_data(study, progress)
    progress.step("load model and SAE")
    if study.model.device == "cuda" and "LOCAL_RANK" in os.environ:
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    subject = open_subject(study)
    run.require_before("attribute", study, subject.identity)
    ready = prepare(study, run, subject, data)
    fill(sketch_source(study, run, subject), ready.problem, ready.inputs, share=process_share(),
         progress=progress)  # fmt: skip


@torch.no_grad()
def _intended(
    study: Study, subject: Subject, pairs: PairSet, fitted: Policy
) -> dict[str, list[int]]:
    """For each pair the features it is about: its column ``intended``, or its prompt's active ones.

    Raises
    ------
    UserError
        A named feature is not one of the policy's.
    """
    encoded = [subject.chat.encode_prompt(pair.messages, pair.id) for pair in pairs]
    inputs = prompt_inputs(encoded, study.readout.position)
    features = subject.features(fitted.feature_ids.copy(), study)
    active: dict[str, list[int]] = {}
    for packed in pack_prompts(inputs, None):
        h, _ = read_packed(subject.loaded.model, packed, None, subject.sae.block)
        for i, row in zip(packed.index, features(h, packed.offsets), strict=True):
            active[inputs[i].id] = fitted.feature_ids[(row > 0).cpu().numpy()].tolist()
    return {pair.id: _named_features(pair, fitted) or active[pair.id] for pair in pairs}


def _named_features(pair: Pair, fitted: Policy) -> list[int] | None:
    """Feature ids of the column ``intended``: a list, or text with commas; None when empty."""
    cell = pair.flags.get("intended")
    parts = cell.split(",") if isinstance(cell, str) else [] if cell is None else list(cell)
    known = set(fitted.feature_ids.tolist())
    try:
        named = sorted({int(part) for part in parts if str(part).strip()})
    except (TypeError, ValueError):
        named = [-1]
    if not known.issuperset(named):
        raise UserError(
            "a pair names intended features that the policy does not have",
            value=f"{pair.id}: {cell}",
            rule="ids of features in coefficients.parquet, as a list or with commas",
            fix="correct the column intended, or set features.ids",
        )
    return named or None


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
    if effects.dX is not None:
        run.write_tensors(
            "feature_prompt_effects",
            {"dX": effects.dX},
            {
                "pair_ids": list(effects.pair_ids),
                "prompt_ids": list(fitted.prompt_ids),
                "feature_ids": fitted.feature_ids.tolist(),
            },
            axes={"dX": ("pair_ids", "prompt_ids", "feature_ids")},
        )


_LONG = pa.schema(
    [
        ("pair_id", pa.string()),
        ("target", pa.string()),
        ("feature_id", pa.int64()),
        ("group", pa.string()),
        ("pathway", pa.string()),
        ("value", pa.float64()),
        ("se", pa.float64()),
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
        effects.errors(target, feature[0] if feature else None, group, pathway),
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
