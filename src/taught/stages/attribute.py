"""The stage ``attribute``: from the policy and the examples to the influence tables."""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from taught.analysis.interference import comovement, interference
from taught.data.examples import ExampleSet, Record
from taught.environment import process_share
from taught.errors import UserError
from taught.estimators.estimate import Effects
from taught.model.readout import pack as pack_prompts
from taught.model.readout import read_packed
from taught.policy.ridge import Policy
from taught.progress import Progress, SilentProgress
from taught.run.folder import RunFolder
from taught.sketches.estimator import fill
from taught.stages.certify import write_certificates
from taught.stages.estimating import Shares, estimate, prepare, read_data, sketch_record, sketch_source, token_texts
from taught.stages.subject import Subject, open_subject, prompt_inputs, refuse_combinations
from taught.study.schema import Study


def attribute(study: Study, run: RunFolder, progress: Progress | None = None) -> None:
    """Effect of one SGD step on each example: on the score, the coefficients and the groups' mean y.

    Raises
    ------
    UserError
        The policy is missing or of another study; examples overlap, are truncated or have no finite
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
        examples, encoded, fitted = ready.examples, ready.encoded, ready.fitted
        effects, checks, shares = estimate(study, run, subject, ready, progress, stage.partial)
        intended = _intended(study, subject, examples, fitted)
        _write_effects(run, fitted, effects)
        _write_examples(run, examples, encoded, effects)
        _write_summary(run, examples, encoded, fitted, effects, intended, checks)
        write_certificates(study, run, fitted, ready.groups, effects, checks)
        if shares:
            _write_shares(run, subject, ready.groups, shares)
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
    fill(sketch_source(study, run, subject), ready.problem, ready.inputs, share=process_share(), progress=progress)


@torch.no_grad()
def _intended(study: Study, subject: Subject, examples: ExampleSet, fitted: Policy) -> dict[str, list[int]]:
    """For each example the features it is about: its column ``intended``, or its prompt's active ones.

    Raises
    ------
    UserError
        A named feature is not one of the policy's.
    """
    named = {example.id: _named_features(example, fitted) for example in examples}
    others = (example for example in examples if not named[example.id])
    encoded = [subject.chat.encode_prompt(example.messages, example.id) for example in others]
    inputs = prompt_inputs(encoded, study.readout.position)
    features = subject.features(fitted.feature_ids.copy(), study)
    active: dict[str, list[int]] = {}
    for packed in pack_prompts(inputs, None):
        h, _ = read_packed(subject.loaded.model, packed, None, subject.sae.block)
        for i, row in zip(packed.index, features(h, packed.offsets), strict=True):
            active[inputs[i].id] = fitted.feature_ids[(row > 0).cpu().numpy()].tolist()
    return {example_id: features or active[example_id] for example_id, features in named.items()}


def _named_features(example: Record, fitted: Policy) -> list[int] | None:
    """Feature ids of the column ``intended``: a list, or text with commas; None when empty."""
    cell = example.flags.get("intended")
    parts = cell.split(",") if isinstance(cell, str) else [] if cell is None else list(cell)
    known = set(fitted.feature_ids.tolist())
    try:
        named = sorted({int(part) for part in parts if str(part).strip()})
    except (TypeError, ValueError):
        named = [-1]
    if not known.issuperset(named):
        raise UserError(
            "an example names intended features that the policy does not have",
            value=f"{example.id}: {cell}",
            rule="ids of features in coefficients.parquet, as a list or with commas",
            fix="correct the column intended, or set features.ids",
        )
    return named or None


def _write_effects(run: RunFolder, fitted: Policy, effects: Effects) -> None:
    write_influence(run, effects.example_ids, effects.estimator, _parts(fitted, effects))
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
            {"example_ids": list(effects.example_ids), "prompt_ids": list(fitted.prompt_ids)},
            axes={"dy": ("example_ids", "prompt_ids")},
        )
    if effects.dX is not None:
        run.write_tensors(
            "feature_prompt_effects",
            {"dX": effects.dX},
            {
                "example_ids": list(effects.detailed),
                "prompt_ids": list(fitted.prompt_ids),
                "feature_ids": fitted.feature_ids.tolist(),
            },
            axes={"dX": ("example_ids", "prompt_ids", "feature_ids")},
        )


INFLUENCE = pa.schema(
    [
        ("example_id", pa.string()),
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
    """One value of every example: a row group of ``influence.parquet``.

    Attributes
    ----------
    key : target, feature id, group and pathway, as the columns of that name
    values : float64 [P]
    errors : float64 [P], their standard errors; None where they are exact
    """

    key: tuple[str, int | None, str | None, str]
    values: np.ndarray
    errors: np.ndarray | None = None


def write_influence(run: RunFolder, example_ids: Sequence[str], estimator: str, parts: Iterable[Part]) -> None:
    """Write the long table part by part, so that only one part is in memory."""
    ids = pa.array(example_ids, pa.string())
    with run.table_writer("influence", INFLUENCE, unique=("example_id",)) as write:
        for part in parts:
            write(_long(ids, estimator, part))


def _parts(fitted: Policy, effects: Effects) -> Iterator[Part]:
    features = fitted.feature_ids.tolist() if effects.shift is not None else []
    for pathway in ("x", "y", "total"):
        yield _part(effects, "score", None, None, None, pathway)
    for group in effects.mean_y:
        yield _part(effects, "mean_y", None, None, group, "y")
    for column, feature_id in enumerate(features):
        for pathway in ("x", "y", "total"):
            yield _part(effects, "coefficient", column, feature_id, None, pathway)


def _part(
    effects: Effects, target: str, column: int | None, feature_id: int | None, group: str | None, pathway: str
) -> Part:
    name = (target, column, group, pathway)
    key = (target, feature_id, group, pathway)
    return Part(key, effects.values(*name), effects.errors(*name))


def _long(ids: pa.Array, estimator: str, part: Part) -> pa.Table:
    """Rows of one part in long form. Exact estimators have no standard error: null."""
    cells = (*part.key, part.values, part.errors, estimator)
    columns = [ids]
    for field, cell in zip(list(INFLUENCE)[1:], cells, strict=True):
        whole = isinstance(cell, np.ndarray)
        columns.append(pa.array(cell) if whole else pa.repeat(pa.scalar(cell, field.type), len(ids)))
    return pa.Table.from_arrays(columns, schema=INFLUENCE)


def _write_examples(run: RunFolder, examples: ExampleSet, encoded: Any, effects: Effects) -> None:
    tokens = {e.id: e for e in encoded}
    own = [tokens[example.id] for example in examples]
    loss = dict(zip(effects.example_ids, effects.losses, strict=True))
    columns = {
        "example_id": [example.id for example in examples],
        "prompt": [example.prompt for example in examples],
        "response": [example.response for example in examples],
        "label": [example.label for example in examples],
        "category": [example.category for example in examples],
        "source": [example.source for example in examples],
        "n_tokens": [len(e.input_ids) for e in own],
        "n_response": [e.n_scored for e in own],
        "truncated": [e.truncated for e in own],
        "loss": [float(loss[example.id]) for example in examples],
    }
    run.write_table("examples", pa.table(columns))


def _write_summary(
    run: RunFolder,
    examples: ExampleSet,
    encoded: Any,
    fitted: Policy,
    effects: Effects,
    intended: dict[str, list[int]],
    checks: dict[str, dict[str, float]],
) -> None:
    ids = effects.example_ids
    by_example = {row["example_id"]: row for row in _interference(fitted, effects, intended)}
    label = {example.id: example.label for example in examples}
    length = {e.id: e.n_scored for e in encoded}
    x, y = effects.score
    se = effects.errors("score", None, None, "total")
    rank = np.empty(len(ids), dtype=np.int64)
    rank[np.argsort(-np.abs(x + y), kind="stable")] = np.arange(1, len(ids) + 1)
    columns: dict[str, Any] = {
        "example_id": list(ids),
        "label": [label[i] for i in ids],
        "score": x + y,
        "score_x": x,
        "score_y": y,
        "score_se": pa.nulls(len(ids), pa.float64()) if se is None else se,
        **{f"mean_y_{group}": values for group, values in effects.mean_y.items()},
        "loss": effects.losses,
        "n_response": [length[i] for i in ids],
        "rank": rank,
    }
    said = [name for name in by_example[ids[0]] if name != "example_id"]
    columns |= {name: [by_example[i][name] for i in ids] for name in said}
    for name in ("exact_score", "step_score", "refit_score"):
        columns[name] = [checks.get(i, {}).get(name) for i in ids]
    run.write_table("summary", pa.table(columns))


TOKEN_SHARES = pa.schema(
    [
        ("example_id", pa.string()),
        ("target", pa.string()),
        ("group", pa.string()),
        ("position", pa.int64()),
        ("token", pa.string()),
        ("share", pa.float64()),
    ]
)


def _write_shares(run: RunFolder, subject: Subject, groups: Iterable[str], shares: Shares) -> None:
    """Shares of response tokens, target by target."""
    targets = [("score", None), *(("mean_y", group) for group in groups)]
    parts = []
    for example, values in shares:
        n, texts = example.n_scored, token_texts(subject, example)
        for column, (target, group) in enumerate(targets):
            columns = [[example.id] * n, [target] * n, [group] * n, range(n), texts, values[:, column]]
            parts.append(pa.table(dict(zip(TOKEN_SHARES.names, columns, strict=True)), schema=TOKEN_SHARES))
    run.write_table("token_shares", pa.concat_tables(parts))


def _interference(fitted: Policy, effects: Effects, intended: dict[str, list[int]]) -> list[dict[str, Any]]:
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
            {"example_id": i, "intended": intended[i], "n_intended": len(intended[i]), **unknown, "note": note}
            for i in effects.example_ids
        ]
    return interference(
        effects.example_ids,
        fitted.feature_ids,
        effects.shift.total,
        [intended[example_id] for example_id in effects.example_ids],
    )
