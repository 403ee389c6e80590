"""The stage ``curate``: which examples to keep and to drop, from the tables of a run."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import pyarrow as pa

from taught.analysis.curate import RANKED, outcome
from taught.analysis.curate import curate as by_rule
from taught.core.registry import CURVATURES, TRAJECTORIES
from taught.data.corpus import open_corpus
from taught.data.examples import load_examples
from taught.data.tables import read_rows
from taught.errors import UserError
from taught.progress import Progress
from taught.run.files import json_line, schema
from taught.run.folder import RunFolder
from taught.stages.scored import default_target, read_scores, run_targets, scored_source
from taught.stats.arrays import Floats
from taught.study.schema import Study


def curate(study: Study, run: RunFolder, progress: Progress | None = None) -> None:
    """Write which examples to keep and which to drop, with the reason of each.

    Raises
    ------
    UserError
        Not a target of this run, or one that cannot be protected; what the rule refuses.
    """
    chosen = study.curation
    rule, target = rule_and_target(study, run_targets(run), default_target(run))
    # Before the stage begins: what a refused command asked for is not remembered, and an earlier curation stays.
    ranked = read_scores(run, [target], chosen.method)
    guard = None if chosen.protect is None else read_scores(run, [chosen.protect])
    summary = run.read_table("summary", ["example_id", "label", "loss"]).to_pydict()
    ids, labels, losses = (summary[name] for name in ("example_id", "label", "loss"))
    protected = None if guard is None else guard[guard.targets[0]]
    k, decisions = decide(study, rule, target, ids, labels, losses, ranked[target], protected)
    found = outcome(decisions, k)._asdict()
    single = study.attribution.trajectory.make(TRAJECTORIES).single
    if not ranked.influence or (rule == "swap-k" and not single):
        # Values that are not of a step say nothing about a change; how much more an exchange
        # does than an omission is known where the loss is, at one step.
        found["change"] = None
    if getattr(study.attribution.curvature.make(CURVATURES), "newton", False):
        found |= {"change": None, "protected_change": None}
    record = {"rule": rule, "k": k, "target": target, "method": ranked.method, "protect": chosen.protect}
    record["unit"] = ranked.unit
    with run.stage("curate", study):
        run.write_table("curation", pa.Table.from_pylist(decisions, _CURATION))
        run.write_json("curation", record | {"lr": study.attribution.lr if single else None} | found)
        _write_choice(run, study, decisions)


_CURATION = schema(
    "example_id:str action:str rule:str target:str reason:str score:float change:float threshold:float protect:str "
    "protect_score:float protect_change:float"
)


def rule_and_target(study: Study, targets: Sequence[str], default: str) -> tuple[str, str]:
    """The rule of the study, and the target that it looks at.

    Parameters
    ----------
    targets, default : those that the run answers, and the one that ranks its examples

    Raises
    ------
    UserError
        The published rule with another target than the score, or without its two labels.
    """
    chosen, labels = study.curation, (study.examples.positive_label, study.examples.negative_label)
    published = None not in labels and not (chosen.k or chosen.target or chosen.protect) and "score" in targets
    rule = chosen.rule or ("paper" if published else "top-k")
    target = chosen.target or (default if rule in RANKED else "score")
    if rule in RANKED:
        return rule, target
    if target != "score":
        raise UserError(
            "the published rule compares scores of a policy",
            value=target,
            rule="with --rule paper: score",
            fix="for example: taught curate RUN --rule top-k --target behavior:GROUP",
        )
    if None in labels:
        raise UserError(
            "the published rule compares examples of two labels",
            rule="examples.positive_label and examples.negative_label name them",
            fix="set them in the study, or: taught curate RUN --rule top-k",
        )
    return rule, target


def decide(
    study: Study,
    rule: str,
    target: str,
    example_ids: Sequence[str],
    labels: Sequence[str | None],
    losses: Sequence[float],
    values: Floats,
    protected: Floats | None,
) -> tuple[int | None, list[dict[str, Any]]]:
    """k and the decisions of :func:`taught.analysis.curate.curate`, which refuses what does not fit, by the study.

    Parameters
    ----------
    losses : of preferences softplus(u), so that their slope sigma(u) is 1 - exp(-loss)
    """
    chosen = study.curation
    k = (chosen.k or max(1, len(example_ids) // 10)) if rule in RANKED else None
    exchanged = rule == "swap-k" and study.examples.kind == "preference"
    return k, by_rule(
        example_ids,
        labels,
        values.tolist(),
        rule=rule,
        k=k,
        target=target,
        protect=chosen.protect,
        protected=None if protected is None else protected.tolist(),
        slopes=[-math.expm1(-loss) for loss in losses] if exchanged else None,
        positive_label=study.examples.positive_label,
        negative_label=study.examples.negative_label,
    )


def _write_choice(run: RunFolder, study: Study, decisions: list[dict[str, Any]]) -> None:
    """The rows of the example file, split by decision; a row is in exactly one of the files."""
    path = scored_source(study, run)
    scored = run.read_table("examples", ["example_id", "document", "response"]).to_pylist()
    dropped = run.read_json("dropped")
    pairs: list[tuple[str, str]] = []  # of preferences the columns that an exchange exchanges
    if study.examples.kind == "document":  # a corpus may be too large to hold, and what was not drawn is left to it
        corpus = open_corpus(path)
        known = {row["document"] for row in scored}.union(*dropped.values())
        rows = {record.id: row for row, record in corpus.rows() if record.id in known}
    else:
        examples = load_examples(path, study.examples.kind)
        rows, columns = dict(zip(examples.ids, read_rows(path), strict=True)), examples.columns
        named = (("chosen", "rejected"), ("reference_chosen", "reference_rejected"))
        pairs = [(columns[a], columns[b]) for a, b in named if a in columns and b in columns]
    kinds = ("keep", "drop", "unscored", *(("swap",) if study.examples.kind == "preference" else ()))
    files: dict[str, list[str]] = {kind: [] for kind in kinds}
    windows = {row["example_id"]: row for row in scored if row["document"]}
    for decision in decisions:
        example_id = decision["example_id"]
        row = rows.get(windows[example_id]["document"] if example_id in windows else example_id, {})
        if example_id in windows:
            row = {**row, "text": windows[example_id]["response"]}
        if decision["action"] == "swap":
            row = {**row, **{a: row.get(b) for a, b in pairs}, **{b: row.get(a) for a, b in pairs}}
        files[decision["action"]].append(_line(example_id, row, decision["reason"]))
    for row in scored:
        rows.pop(row["document"] or row["example_id"], None)
    why = {example_id: f"not scored: {kind}" for kind, ids in dropped.items() for example_id in ids}
    for example_id, row in rows.items():
        files["unscored"].append(_line(example_id, row, why.get(example_id, "not scored: examples.limit")))
    for name, lines in files.items():
        run.write_text(f"{name}.jsonl", "".join(lines))


def _line(example_id: str, row: dict[str, Any], reason: str) -> str:
    try:
        return json_line({**row, "id": example_id, "curation_reason": reason})
    except (TypeError, ValueError) as error:
        raise UserError(
            "a row of the example file cannot be written as JSON",
            value=f"{example_id}: {error}",
            rule="keep.jsonl and drop.jsonl hold the rows of your file",
            fix="turn the column into text or numbers, or leave it out",
        ) from None
