"""The stage ``attribute``: from the policy and the pairs to the influence tables."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from taught.analysis.interference import comovement, interference
from taught.attribution.adjoint import Problem
from taught.attribution.estimate import ESTIMATORS, Effects, step_checks
from taught.data.columns import columns_note
from taught.data.pairs import Pair, PairSet
from taught.data.prompts import PromptSet
from taught.errors import UserError
from taught.model.readout import pack as pack_prompts
from taught.model.readout import read_packed
from taught.policy.ridge import Policy, fit_policy
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
    prompts = study_prompts(study)
    pairs, overlapping = study_pairs(study, prompts)
    progress.note(columns_note(study.pairs.path, pairs.columns))
    progress.step("load model and SAE")
    subject = open_subject(study)
    with run.stage("attribute", study, subject.identity) as stage:
        if stage.done:
            return
        encoded, truncated = subject.chat.encode_pairs(
            pairs, study.pairs.max_tokens, study.pairs.drop_truncated
        )
        if not encoded:
            raise UserError(
                "no pair is left to be scored",
                value=f"{len(overlapping)} overlap the prompts, {len(truncated)} are truncated",
                rule="at least one pair is kept",
                fix="use other pairs or prompts, or raise pairs.max_tokens",
            )
        kept = {pair.id for pair in encoded}
        pairs = replace(pairs, pairs=tuple(pair for pair in pairs if pair.id in kept))
        fitted, groups = _read_policy(study, run)
        problem = _problem(study, subject, prompts, fitted)
        inputs = pair_inputs(encoded)
        estimate = ESTIMATORS[study.attribution.estimator]
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
        _write_effects(run, fitted, effects)
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


def _write_effects(run: RunFolder, fitted: Policy, effects: Effects) -> None:
    write_influence(run, effects.pair_ids, effects.estimator, _parts(fitted, effects))
    if effects.shift is not None:
        r = comovement(effects.shift.total)
        run.write_tensors(
            "comovement",
            {"r": r},
            {"feature_ids": fitted.feature_ids.tolist()},
            axes={"r": ("feature_ids", "feature_ids")},
        )
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


INFLUENCE = pa.schema(
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


@dataclass(frozen=True, eq=False)
class Part:
    """One value of every pair: a row group of ``influence.parquet``.

    Attributes
    ----------
    key : target, feature id, group and pathway, as the columns of that name
    values : float64 [P]
    """

    key: tuple[str, int | None, str | None, str]
    values: np.ndarray


def write_influence(
    run: RunFolder, pair_ids: Sequence[str], estimator: str, parts: Iterable[Part]
) -> None:
    """Write the long table part by part, so that only one part is in memory."""
    ids = pa.array(pair_ids, pa.string())
    with run.table_writer("influence", INFLUENCE, unique=("pair_id",)) as write:
        for part in parts:
            write(_long(ids, estimator, part))


def _parts(fitted: Policy, effects: Effects) -> Iterator[Part]:
    x, y = effects.score
    yield from _pathways("score", None, x, y)
    for group, values in effects.mean_y.items():
        yield Part(("mean_y", None, group, "y"), values)
    if effects.shift is not None:
        for column, feature_id in enumerate(fitted.feature_ids.tolist()):
            x, y = effects.shift.x[:, column], effects.shift.y[:, column]
            yield from _pathways("coefficient", feature_id, x, y)


def _pathways(target: str, feature_id: int | None, x: np.ndarray, y: np.ndarray) -> Iterator[Part]:
    for pathway, values in (("x", x), ("y", y), ("total", x + y)):
        yield Part((target, feature_id, None, pathway), values)


def _long(ids: pa.Array, estimator: str, part: Part) -> pa.Table:
    """Rows of one part in long form. Exact estimators have no standard error: null."""
    target, feature_id, group, pathway = part.key
    cells = (target, feature_id, group, pathway, part.values, None, estimator)
    columns = [ids]
    for field, cell in zip(list(INFLUENCE)[1:], cells, strict=True):
        whole = isinstance(cell, np.ndarray)
        columns.append(
            pa.array(cell) if whole else pa.repeat(pa.scalar(cell, field.type), len(ids))
        )
    return pa.Table.from_arrays(columns, schema=INFLUENCE)


def _write_pairs(run: RunFolder, pairs: PairSet, encoded: Any, effects: Effects) -> None:
    tokens = {e.id: e for e in encoded}
    own = [tokens[pair.id] for pair in pairs]
    loss = dict(zip(effects.pair_ids, effects.losses, strict=True))
    columns = {
        "pair_id": [pair.id for pair in pairs],
        "prompt": [pair.prompt for pair in pairs],
        "response": [pair.response for pair in pairs],
        "label": [pair.label for pair in pairs],
        "category": [pair.category for pair in pairs],
        "source": [pair.source for pair in pairs],
        "n_tokens": [len(e.input_ids) for e in own],
        "n_response": [e.n_response for e in own],
        "truncated": [e.truncated for e in own],
        "loss": [float(loss[pair.id]) for pair in pairs],
    }
    run.write_table("pairs", pa.table(columns))


def _write_summary(
    run: RunFolder,
    pairs: PairSet,
    encoded: Any,
    fitted: Policy,
    effects: Effects,
    intended: dict[str, list[int]],
    checks: dict[str, dict[str, float]],
) -> None:
    ids = effects.pair_ids
    by_pair = {row["pair_id"]: row for row in _interference(fitted, effects, intended)}
    label = {pair.id: pair.label for pair in pairs}
    length = {e.id: e.n_response for e in encoded}
    x, y = effects.score
    rank = np.empty(len(ids), dtype=np.int64)
    rank[np.argsort(-np.abs(x + y), kind="stable")] = np.arange(1, len(ids) + 1)
    columns: dict[str, Any] = {
        "pair_id": list(ids),
        "label": [label[i] for i in ids],
        "score": x + y,
        "score_x": x,
        "score_y": y,
        **{f"mean_y_{group}": values for group, values in effects.mean_y.items()},
        "loss": effects.losses,
        "n_response": [length[i] for i in ids],
        "rank": rank,
    }
    said = [name for name in by_pair[ids[0]] if name != "pair_id"]
    columns |= {name: [by_pair[i][name] for i in ids] for name in said}
    for name in ("step_score", "refit_score"):
        columns[name] = [checks.get(i, {}).get(name) for i in ids]
    run.write_table("summary", pa.table(columns))


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
