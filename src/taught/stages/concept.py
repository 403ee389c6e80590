"""The command ``concept``: a direction from two groups of rows, from features or from a file.

The groups are those of the evaluation prompts, read before an answer, or labelled examples of
answers, read at their response.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any, Literal

import numpy as np

from taught.baselines.activations import response_reads
from taught.data.columns import name_ids
from taught.data.examples import ExampleSet, load_examples
from taught.data.overlap import drop_overlap, drop_shared
from taught.data.prompts import PromptSet
from taught.errors import UserError
from taught.features.concept import (
    Concept,
    control_block,
    control_tensor,
    feature_direction,
    file_direction,
    fitted_direction,
    is_control_vector,
    normalised,
    quality_card,
    require_place,
    save_concept,
)
from taught.features.pooling import pool
from taught.features.probe import Bools, Floats, sweep
from taught.model.forward import find_blocks, get_block
from taught.model.readout import check_trees, read_residuals
from taught.progress import Progress, SilentProgress
from taught.stages.subject import Subject, example_inputs, open_subject, prompt_inputs, study_prompts
from taught.study.schema import Study

_SOURCES = "difference, probe, feature:ID (or feature:ID=SHARE,ID=SHARE) or file:PATH[:TENSOR]"


@dataclass(frozen=True)
class ConceptRequest:
    """What concept is to be made.

    Attributes
    ----------
    source : difference, probe, feature:ID or file:PATH[:TENSOR]
    block : block whose output is read; None: that of a control vector's tensor, else the SAE's
    position, tokens : where prompts and examples are read; position None: the study's
    examples : file of examples, labelled: the two groups are these in place of the prompts
    positive, negative : labels of the examples with the behavior and without
    method, penalty : of a probe
    norm : "unit" or "none"
    name : None for the name of the folder
    force : accept a direction that is no better than chance
    sweep : fit at every block too, and put the table into the card
    """

    source: str
    block: int | None = None
    position: str | None = None
    tokens: str = "mean_response"
    examples: Path | None = None
    positive: str = "present"
    negative: str = "absent"
    method: Literal["logistic", "ridge"] = "logistic"
    penalty: float = 1.0
    norm: Literal["unit", "none"] = "unit"
    name: str | None = None
    force: bool = False
    sweep: bool = False


def concept(study: Study, out: Path, request: ConceptRequest, progress: Progress | None = None) -> Concept:
    """Make a concept and its quality card on two groups of prompts or examples, in folder ``out``.

    Raises
    ------
    UserError
        An unknown source, block or place; a direction that does not fit the model; examples with
        other labels, or that are prompts or examples of the study; a probe that is no better than
        chance on rows it has not seen.
    """
    progress = progress or SilentProgress()
    kind, detail = _source(request)
    position = request.position or study.readout.position
    require_place(position, request.tokens)
    prompts = study_prompts(study)
    progress.step("load model and SAE")
    subject = open_subject(study)
    block, detail = _block(request, kind, detail, subject)
    blocks = list(range(len(find_blocks(subject.loaded.model)))) if request.sweep else [block]
    some = prompt_inputs(subject.encode(prompts), position)
    check_trees(subject.loaded.model, some, subject.behavior)
    if request.examples is None:
        H, positive = _read(study, subject, prompts, position, blocks, progress)
        data = _data(study, prompts)
    else:
        rows = load_answers(request.examples, study, prompts, progress)
        sides = (request.positive, request.negative)
        H, positive = read_examples(study, subject, rows, sides, request.tokens, blocks, progress)
        data = {"examples sha256": rows.sha256, "labels": list(sides)}
    X = H[blocks.index(block)]
    progress.step("fit and judge the direction")
    direction, card, origin = _direction(study, subject, request, (kind, detail), X, positive)
    if request.sweep:
        card["sweep"] = sweep(H, positive, _method(request, kind), request.penalty, **_draws(study))
    made = Concept(
        request.name or out.name,
        normalised(direction, request.norm),
        block,
        position,
        request.tokens,
        dict(subject.loaded.weights),
        {"source": request.source, "norm": request.norm, **origin, **data},
        card,
    )
    save_concept(made, out)
    return made


def _source(request: ConceptRequest) -> tuple[str, str]:
    kind, _, detail = request.source.partition(":")
    plain = kind in ("difference", "probe")
    if not (plain if not detail else kind in ("feature", "file")):
        raise UserError("unknown source of a concept", value=request.source, rule=_SOURCES, fix="pass --source")
    if request.sweep and not plain:
        raise UserError(
            "a sweep over blocks is of directions that are fitted",
            value=request.source,
            rule="--sweep goes with difference and probe",
            fix="leave out --sweep",
        )
    return kind, detail


def _block(request: ConceptRequest, kind: str, detail: str, subject: Subject) -> tuple[int, str]:
    """The block that is read, and the source's detail with the tensor of that block."""
    block = subject.sae.block if request.block is None else request.block
    if kind == "feature" and block != subject.sae.block:
        raise UserError(
            "a feature is a direction at the block of its SAE",
            value=block,
            rule=f"block {subject.sae.block}",
            fix="leave out --block",
        )
    path, tensor = _file_parts(detail) if kind == "file" else ("", None)
    if is_control_vector(path):
        tensor = tensor or control_tensor(block)
        own = control_block(tensor)
        if request.block not in (None, own):
            raise UserError(
                "the direction is of another block",
                value=f"{tensor}, --block {block}",
                rule="direction.N is added to the output of block N",
                fix=f"leave out --block, or name {control_tensor(block)}",
            )
        block, detail = own, f"{path}:{tensor}"
    get_block(subject.loaded.model, block)
    return block, detail


def _read(
    study: Study, subject: Subject, prompts: PromptSet, position: str, blocks: Sequence[int], progress: Progress
) -> tuple[Floats, Any]:
    """Pooled residuals [blocks, N, D] of the prompts of both groups, and which are positive."""
    sides = (study.prompts.negative_group, study.prompts.positive_group)
    chosen = [prompt for prompt in prompts if prompt.group in sides]
    inputs = prompt_inputs(subject.encode(chosen), position)
    progress.step("read prompts", len(inputs))
    H = read_residuals(subject.loaded.model, inputs, blocks, partial(pool, how=position), progress=progress)
    return H.numpy(), np.array([prompt.group == sides[1] for prompt in chosen])


def load_answers(file: Path, study: Study, prompts: PromptSet, progress: Progress) -> ExampleSet:
    """Read examples that are neither examples nor prompts of the study.

    Raises
    ------
    UserError
        Some are, and ``examples.drop_overlap`` does not leave them out.
    """
    drop = study.examples.drop_overlap
    rows, of_examples = drop_shared(load_examples(file), load_examples(study.examples.path), drop)
    rows, of_prompts = drop_overlap(rows, prompts, drop)
    if gone := [*of_examples, *(example for example, _ in of_prompts)]:
        progress.note(f"examples left out, overlap: {len(gone)}: {', '.join(gone)}")
    return rows


def read_examples(
    study: Study,
    subject: Subject,
    rows: ExampleSet,
    sides: tuple[str, str],
    tokens: str,
    blocks: Sequence[int],
    progress: Progress,
) -> tuple[Floats, Bools]:
    """Pooled residuals [blocks, N, D] of labelled examples at their responses, which are positive.

    Parameters
    ----------
    sides : labels of the examples with the behavior and without
    tokens : one of :data:`taught.features.concept.PAIR_POSITIONS`

    Raises
    ------
    UserError
        A row has another label, or all have one; a response is empty, or cut off at
        ``examples.max_tokens``.
    """
    others = [row.id for row in rows if row.label not in sides]
    if others or {row.label for row in rows} != set(sides):
        raise UserError(
            "the examples are not labelled in two",
            value=name_ids(others) or f"{len(rows)} rows",
            rule=f"every row is labelled {sides[0]} or {sides[1]}, and both occur",
            fix="pass --positive and --negative, or correct the column label",
        )
    encoded, _ = subject.chat.encode_examples(rows.examples, study.examples.max_tokens, False)
    reads = response_reads(example_inputs(encoded), tokens)
    progress.step("read examples", len(reads))
    H = read_residuals(subject.loaded.model, reads, blocks, partial(pool, how=tokens), progress=progress)
    label = {row.id: row.label for row in rows}
    return H.numpy(), np.array([label[read.id] == sides[0] for read in reads])


def _direction(
    study: Study, subject: Subject, request: ConceptRequest, source: tuple[str, str], X: Floats, positive: Any
) -> tuple[Floats, dict[str, Any], dict[str, Any]]:
    """Direction [D], quality card, and what it was made from."""
    kind, detail = source
    if kind in ("difference", "probe"):
        method = _method(request, kind)
        how = {"method": method, **({"penalty": request.penalty} if kind == "probe" else {})}
        fitted = fitted_direction(X, positive, method, penalty=request.penalty, force=request.force, **_draws(study))
        return *fitted, {**how, **_draws(study)}
    if kind == "feature":
        shares = _shares(detail)
        v = feature_direction(subject.sae, shares)
        origin: dict[str, Any] = {
            "features": {str(k): share for k, share in shares.items()},
            "sae": subject.sae.sha256(),
        }
    else:
        v, origin = file_direction(*_file_parts(detail))
    if len(v) != X.shape[1]:
        raise UserError(
            "the direction does not fit the model",
            value=f"width {len(v)}",
            rule=f"width {X.shape[1]}",
            fix="use a direction that was made on this model",
        )
    spec = study.policy
    return v, quality_card(v, X, positive, bootstrap=spec.bootstrap, seed=spec.seed), origin


def _method(request: ConceptRequest, kind: str) -> str:
    return request.method if kind == "probe" else "difference"


def _draws(study: Study) -> dict[str, int]:
    spec = study.policy
    return {"folds": spec.folds, "bootstrap": spec.bootstrap, "seed": spec.seed}


def _data(study: Study, prompts: PromptSet) -> dict[str, Any]:
    groups = [study.prompts.positive_group, study.prompts.negative_group]
    return {"prompts sha256": prompts.sha256, "groups": groups, "limit": study.prompts.limit}


def _shares(detail: str) -> dict[int, float]:
    """Shares of features from ``ID`` or ``ID=SHARE,ID=SHARE``."""
    try:
        parts = [part.partition("=") for part in detail.split(",")]
        shares = {int(k): float(share) if sign else 1.0 for k, sign, share in parts}
        if len(shares) != len(parts):
            raise ValueError
        return shares
    except ValueError:
        raise UserError(
            "the features of the concept are not readable",
            value=detail,
            rule="feature:ID or feature:ID=SHARE,ID=SHARE, each id once",
            fix="for example --source feature:12=0.5,40=-1",
        ) from None


def _file_parts(detail: str) -> tuple[str, str | None]:
    """Path and tensor of ``PATH`` or ``PATH:TENSOR``; a path may hold a colon itself."""
    path, _, tensor = detail.rpartition(":")
    if path and not Path(detail).expanduser().exists():
        return path, tensor
    return detail, None
