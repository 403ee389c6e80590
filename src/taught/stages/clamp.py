"""The stage ``clamp``: scale each feature of the policy in the model, read the behavior again."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from contextlib import ExitStack
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from taught.core.passes import settle_passes
from taught.errors import UserError
from taught.features.clamp import Clamp, decoder_direction, random_directions
from taught.model.forward import edited_output, get_point, run_at
from taught.model.layout import first_device
from taught.model.readout import PackedPrompts, ReadPrompt, pack_apart, read_packed
from taught.policy.dose import LEVEL, agreement, control_p, response, slope
from taught.policy.ridge import Policy
from taught.progress import Progress, SilentProgress
from taught.run.files import schema
from taught.run.folder import RunFolder
from taught.stages.ready import run_readings
from taught.stages.subject import Subject, open_subject, prompt_inputs, study_prompts
from taught.stats.arrays import Floats
from taught.stats.multiplicity import benjamini_hochberg
from taught.study.schema import ClampSpec, Study

SCALES = (0.0, 0.5, 2.0, 3.0)
CONTROL_SCALE = 2.0

TABLE = schema(
    "feature_id:int coef:float n:int rms_x:float slope:float lo:float hi:float predicted:float at_control:float "
    "controls:[float] p:float p_adjusted:float"
).append(pa.field("doses", pa.list_(pa.struct(schema("scale:float value:float lo:float hi:float")))))


def clamp(study: Study, run: RunFolder, progress: Progress | None = None) -> None:
    """Write ``clamp.parquet`` and ``clamp.json``: what each feature does to y, beside W.

    Cost: for every feature 1 + ``len(SCALES)`` + ``clamp.controls`` forward passes over up to
    ``clamp.prompts`` prompts. Killed, it continues behind the last feature.

    Raises
    ------
    UserError
        The policy is missing or of another study.
    """
    spec = study.clamp or ClampSpec()
    progress = progress or SilentProgress()
    progress.step("load model and SAE")
    subject = open_subject(study)
    with run.stage("clamp", study, subject.identity) as stage:
        if stage.done:
            return
        fitted = run_readings(run).policy
        if fitted is None:
            raise UserError("there is no policy to check", rule="it needs an SAE", fix="pass --set sae.path=FOLDER")
        encoded = {e.id: e for e in subject.encode(study_prompts(study))}
        inputs = prompt_inputs([encoded[i] for i in fitted.prompt_ids], study.readout.position)
        settle_passes(subject.loaded.model, inputs, subject.behavior)
        progress.step("clamp features", fitted.d)
        measured = []
        for column in range(fitted.d):
            key = f"feature-{fitted.feature_ids[column]}"
            found = stage.partial.load(key)
            if found is None:  # read on prompts where the feature is active; of more, those drawn over sorted ids
                active = np.flatnonzero(fitted.X[:, column] > 0).tolist()
                active.sort(key=lambda i: fitted.prompt_ids[i])
                rng = np.random.default_rng([study.policy.seed, int(fitted.feature_ids[column])])
                chosen = sorted(active[i] for i in rng.permutation(len(active))[: spec.prompts])
                changes = _measured(study, subject, fitted, [inputs[i] for i in chosen], column, spec.controls)
                found = {"x": fitted.X[chosen, column], **changes}
                stage.partial.save(key, found)
            measured.append(found)
            progress.advance(1)
        _write(run, study, fitted, measured, spec)


@torch.no_grad()
def _measured(
    study: Study, subject: Subject, fitted: Policy, given: Sequence[ReadPrompt], column: int, controls: int
) -> dict[str, Floats]:
    """Changes of y: ``dy`` [S, n] and ``control`` [R, n]; ``predicted`` [S, n] by the policy."""
    feature, sae = int(fitted.feature_ids[column]), subject.required_sae
    own = decoder_direction(sae, feature)
    rng = np.random.default_rng([study.policy.seed, feature, 1])
    drawn = random_directions(own, controls, rng)
    edits = [Clamp(sae, feature, study.sae.encoder, scale, own) for scale in SCALES]
    edits += [Clamp(sae, feature, study.sae.encoder, CONTROL_SCALE, direction) for direction in drawn]
    features = subject.features(fitted.feature_ids.copy(), study)
    dy, predicted = np.empty((len(edits), len(given))), np.empty((len(SCALES), len(given)))
    for packed in pack_apart(given, subject.behavior):
        at = list(packed.index)
        h, y = _read(subject, packed, None)
        before = features(h, packed.offsets)
        for row, edit in enumerate(edits):
            dy[row, at] = (_read(subject, packed, edit)[1] - y).numpy()
        for row, edit in enumerate(edits[: len(SCALES)]):
            moved = (features(edit(h), packed.offsets) - before).double().cpu().numpy()
            predicted[row, at] = moved @ fitted.coef
    return {"dy": dy[: len(SCALES)], "control": dy[len(SCALES) :], "predicted": predicted}


def _read(subject: Subject, packed: PackedPrompts, edit: Callable[[Tensor], Tensor] | None) -> tuple[Tensor, Tensor]:
    """h [M, D] at the read-out tokens and y float64 [n], with h edited there."""
    model, point = subject.loaded.model, subject.required_sae.point
    with ExitStack() as edits:
        if edit is not None:
            device = first_device(model)
            places = run_at(model, packed.rows.to(device), packed.read.unique().to(device))
            edits.enter_context(edited_output(get_point(model, point), places, edit))
        h, y = read_packed(model, packed, subject.behavior, point)
    assert y is not None
    return h, y.double().cpu()


def _write(
    run: RunFolder, study: Study, fitted: Policy, measured: Sequence[dict[str, Floats]], spec: ClampSpec
) -> None:
    rows = [_row(study, fitted, column, found) for column, found in enumerate(measured)]
    active = [row for row in rows if row["n"]]
    controls = np.array([row["controls"] for row in active]).reshape(-1, spec.controls)
    p = control_p([row["at_control"] for row in active], controls)
    for row, own, adjusted in zip(active, p, benjamini_hochberg(p), strict=True):
        row["p"], row["p_adjusted"] = float(own), float(adjusted)
    run.write_table("clamp", pa.Table.from_pylist(rows, TABLE))
    clear = [row for row in active if row["p_adjusted"] <= LEVEL]
    rows_of = run.read_table("coefficients", ["feature_id", "lo", "hi"]).to_pylist()
    sure = {row["feature_id"] for row in rows_of if row["lo"] > 0 or row["hi"] < 0}  # the interval excludes 0
    over = {
        "all": active,
        "sure": [row for row in active if row["feature_id"] in sure],
        "clear": clear,
        "predicted": [{**row, "coef": row["predicted"]} for row in active],
        "control": [{**row, "slope": row["controls"][0]} for row in active],
    }
    draws, compared = {"bootstrap": study.policy.bootstrap, "seed": study.policy.seed}, {}
    for name, some in over.items():
        columns = [[row[key] for row in some] for key in ("coef", "slope", "rms_x")]
        compared[name] = agreement(*columns, **draws).to_dict()
    record = {
        "prompts": spec.prompts,
        "controls": spec.controls,
        "scales": list(SCALES),
        "control_scale": CONTROL_SCALE,
        "features": len(rows),
        "active": len(active),
        "clear": len(clear),
        "agreement": compared,
    }
    run.write_json("clamp", record)


def _row(study: Study, fitted: Policy, column: int, found: dict[str, Floats]) -> dict[str, Any]:
    """One feature of the table, as far as it is known without the others."""
    x = found["x"]
    row: dict[str, Any] = {"feature_id": int(fitted.feature_ids[column]), "coef": float(fitted.coef[column])}
    row["n"] = len(x)
    if not len(x):
        return row
    spec, twice = study.policy, [CONTROL_SCALE]
    seen = response(x, SCALES, found["dy"], bootstrap=spec.bootstrap, seed=spec.seed)
    line = seen.slope.to_dict()
    return {
        **row,
        "rms_x": float(np.sqrt((x**2).mean())),
        "slope": line["value"],
        "lo": line["lo"],
        "hi": line["hi"],
        "predicted": slope(x, SCALES, found["predicted"]),
        "at_control": slope(x, twice, found["dy"][[SCALES.index(CONTROL_SCALE)]]),
        "controls": [slope(x, twice, dy[None]) for dy in found["control"]],
        "doses": [{"scale": scale, **mean.to_dict()} for scale, mean in zip(SCALES, seen.means, strict=True)],
    }
