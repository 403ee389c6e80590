"""The stage ``attribute``: from readings and examples to the scores of every example."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from functools import reduce
from itertools import combinations
from typing import Any

import numpy as np
import pyarrow as pa
import torch

from taught.analysis.interference import comovement, interference
from taught.core import driver
from taught.core.driver import fitted, strongest
from taught.core.estimator import Work
from taught.core.registry import CURVATURES, ESTIMATORS, TRAJECTORIES
from taught.core.scores import Scores, scores_schema
from taught.core.target import kind_of
from taught.core.trajectory import Follows
from taught.data.documents import windows_note
from taught.data.duplicates import duplicates_among
from taught.data.examples import ExampleSet
from taught.data.labels import check_labels
from taught.errors import UserError
from taught.estimators.finite_step import kept_steps
from taught.estimators.token_shares import token_effects
from taught.model.load import hub_commit
from taught.model.readout import pack as pack_prompts
from taught.model.readout import read_packed
from taught.policy.ridge import Policy, exact_shift
from taught.progress import Progress, SilentProgress
from taught.run.files import schema
from taught.run.folder import RunFolder
from taught.run.pieces import Prefixed
from taught.stages.certify import write_certificates
from taught.stages.concepts import check_concept_methods, concept_method_scores, run_concepts
from taught.stages.ready import Ask, Data, Ready, asks, method_of, prepare, read_data, token_texts, wanted_targets
from taught.stages.subject import open_subject, prompt_inputs
from taught.stats.ranks import spearman_interval
from taught.study.schema import Study
from taught.training.recipe import Recipe

Checks = dict[str, dict[str, float]]


def attribute(study: Study, run: RunFolder, progress: Progress | None = None) -> None:
    """Effect of one step on each example on every target that the study asks for.

    Raises
    ------
    UserError
        The readings are missing or of another study; examples overlap, are truncated or have no finite
        loss; a target that the run cannot answer; a method that does not go together.
    """
    progress = progress or SilentProgress()
    method_of(study).refuse()
    check_concept_methods(study)
    data = read_data(study, progress)
    if study.bins is not None:  # what bins would refuse is said before the long part
        for column in study.bins.columns:
            check_labels(data.examples, column, study.bins.taxonomy, study.bins.classifier)
    progress.step("load the model")
    subject = open_subject(study)
    trained = {}
    along = method_of(study).trajectory.make(TRAJECTORIES)
    if isinstance(along, Follows) and getattr(along, "run", None) is None:  # it makes a run by the study's recipe
        trained = {f"validation.{name}": value for name, value in asdict(Recipe.of(study.validation)).items()}
    with run.stage("attribute", study, {**subject.identity, **trained, **_commits(study, along)}) as stage:
        if stage.done:
            return
        ready = prepare(study, run, subject, data, progress)
        if (windows := windows_note(ready.encoded)) is not None:
            progress.note(windows)
        work = Work(progress, stage.partial, run.folder)
        concepts = run_concepts(study, run, subject)
        wanted = wanted_targets(study, ready.readings, [c.name for c in concepts], len(ready.inputs))
        if study.bins is not None and study.bins.questions and "prompt:*" not in wanted:
            kept = "too many examples and prompts to keep the change on each"
            progress.note(f"{kept}: intervals are over documents alone")
        asked = in_one_metric(ready, asks(ready, wanted, concepts, progress), work)
        works = [replace(work, pieces=Prefixed(stage.partial, f"place{n}")) for n in range(len(asked))]
        parts = [
            driver.scores(ask.problem, ready.inputs, ask.targets, ready.method, own)
            for ask, own in zip(asked, works, strict=True)
        ]
        scores = reduce(Scores.joined, parts)
        ranked = scores.targets[0]
        top = strongest(scores, study.attribution.exact_top)
        checks = _checks(ready, asked[0], scores, top, works[0])
        shares = _shares(ready, asked, parts, top, work)
        others = concept_method_scores(study, subject, run, ready.inputs, concepts, progress)
        write_scores(run, [scores, *others])
        if others:
            run.write_table("agreement", agreement([scores, *others]))
        policy = ready.readings.policy
        shift = None if policy is None else shift_of(scores, policy.feature_ids.tolist())
        if asked[0].targets.readings is ready.readings:  # else they are of a concept's place and prompts
            _write_details(run, ready, scores, shift)
        _write_examples(run, ready, scores, checks)
        write_certificates(study, run, asked[0].targets, scores, shift, checks)
        rescored = [row for part in parts for row in part.details.get("rescored", ())]
        if rescored:
            run.write_table("rescored", pa.Table.from_pylist(rescored, RESCORED))
        if shares:
            run.write_table("token_shares", pa.concat_tables(shares))
        run.write_json(
            "attribution",
            {
                "method": scores.method,
                "ranked_by": str(ranked),
                "unit": scores.unit,
                "lr": study.attribution.lr,
                "targets": [str(name) for name in scores.targets],
                **({"smoothness": scores.details["smoothness"]} if "smoothness" in scores.details else {}),
                **({"sketches": {key: scores.details[key] for key in STORE}} if "store" in scores.details else {}),
            },
        )
        _write_source(study, run, data, progress)
        gone = {"duplicate": [duplicate.id for duplicate in data.repeating]} if data.repeating else {}
        run.write_json("dropped", {"overlap": data.overlapping, **gone, "truncated": ready.truncated})


DUPLICATES = schema("example_id:str of:str exact:bool overlap:float")


def _write_source(study: Study, run: RunFolder, data: Data, progress: Progress) -> None:
    """How examples were drawn from more, and which of them repeat others."""
    if data.examples.sample is not None:
        run.write_json("sample", data.examples.sample.record())
    found = data.repeating
    if study.examples.kind == "document" and not study.examples.drop_duplicates:
        found = duplicates_among(data.examples, study.examples.near_duplicate)
    if found:
        exact = sum(duplicate.exact for duplicate in found)
        fate = "are left out" if data.repeating else "stay: --set examples.drop_duplicates=true leaves them out"
        progress.note(f"{exact} exact and {len(found) - exact} near duplicates of other examples {fate}")
        rows = [{"example_id": d.id, "of": d.of, "exact": d.exact, "overlap": d.overlap} for d in found]
        run.write_table("duplicates", pa.Table.from_pylist(rows, DUPLICATES))


def in_one_metric(ready: Ready, asked: Sequence[Ask], work: Work) -> list[Ask]:
    """The same targets in one metric: a curvature depends on the examples, not on what is read."""
    method = ready.method
    if not method.trajectory.make(TRAJECTORIES).single:
        return list(asked)
    curved = fitted(asked[0].problem, ready.inputs, method.curvature.make(CURVATURES), work)
    own: dict[str, Any] = {"metric": curved.metric, "parameters": curved.parameters}
    return [replace(ask, problem=replace(ask.problem, **own, plain=ask.problem)) for ask in asked]


def _commits(study: Study, along: object) -> dict[str, str]:
    """Commits of the checkpoints that are on the hub, where a branch may move; folders are inputs by their content."""
    own = getattr(along, "checkpoints", ())
    named = {f"attribution.trajectory.checkpoints.{n}": c for n, c in enumerate(own if isinstance(own, tuple) else ())}
    places = {key: (checkpoint.id, checkpoint.revision) for key, checkpoint in named.items()}
    if study.attribution.checkpoint is not None:
        places["attribution.checkpoint"] = (study.attribution.checkpoint, None)
    commits = {f"{key} commit": hub_commit(*place) for key, place in places.items()}
    return {key: commit for key, commit in commits.items() if commit is not None}


def _checks(ready: Ready, ask: Ask, scores: Scores, top: Sequence[int], work: Work) -> Checks:
    """A real step of the strongest examples beside the linear value; with a policy an exact refit too.

    Where values are estimates, the exact derivative as well. None in a curvature that divides no example's gradient.
    """
    method, name = ready.method, scores.targets[0]
    if not method.trajectory.make(TRAJECTORIES).single or not top or not ask.problem.metric.of_examples:
        return {}
    estimator = method.estimator.make(ESTIMATORS)
    real = getattr(estimator, "real", False)
    chosen = list(ready.inputs) if real else [ready.inputs[i] for i in top]
    rows, policy = kept_steps(ask.problem, chosen, work), ask.targets.readings.policy
    targets = ask.targets.select([name])
    found: Checks = {}
    for example in chosen:
        row = rows[example.id]
        found[example.id] = {"step_score": float(targets.changes(row.get("dX"), row["dy"])[0])}
        if policy is not None:
            moved = exact_shift(policy, row["dX_exact"], row["dy"])
            found[example.id]["refit_score"] = float(moved @ policy.coef)
    if not estimator.exact:
        exact = ESTIMATORS.get("adjoint")().estimate(ask.problem, chosen, targets, Work())
        for example_id, value in exact.by_example(name).items():
            found[example_id]["exact_score"] = value
    return found


def _shares(
    ready: Ready, asked: Sequence[Ask], parts: Sequence[Scores], top: Sequence[int], work: Work
) -> list[pa.Table]:
    """Shares of the scored tokens of the strongest examples in every target that is no coefficient."""
    chosen, tables = [ready.inputs[i] for i in top], []
    single = ready.method.trajectory.make(TRAJECTORIES).single
    if single and chosen:
        work.progress.step("shares of tokens", None)
    for ask, scores in zip(asked, parts, strict=True):
        few = [n for n in ask.targets.names if not kind_of(n).many and n.pathway is None]
        if not few or not chosen or ask.problem.metric.sketched is not None:
            continue
        if (known := scores.details.get("token_shares")) is not None:
            columns = [scores.column(name) for name in few]
            shares = [known[example.id][:, columns] for example in chosen]
        elif single:
            A, B = ask.targets.cotangents(few)
            shares = [own.numpy() for own in token_effects(ask.problem, chosen, A, B, progress=work.progress)]
        else:
            continue
        for example, own in zip(chosen, shares, strict=True):
            n, texts = example.n_scored, token_texts(ready.subject, example)
            answers = [sequence for sequence, _ in example.scored]
            for column, name in enumerate(few):
                cells = [[example.id] * n, [str(name)] * n, range(n), answers, texts, own[:, column]]
                tables.append(pa.table(dict(zip(TOKEN_SHARES.names, cells, strict=True)), schema=TOKEN_SHARES))
    return tables


TOKEN_SHARES = schema("example_id:str target:str position:int answer:int token:str share:float")


def write_scores(run: RunFolder, every: Iterable[Scores]) -> None:
    """Write the long table target by target, so that only one is in memory."""
    with run.table_writer("scores", scores_schema(), unique=("example_id",)) as write:
        for scores in every:
            for target in scores.targets:
                write(scores.part(target))


RESCORED = schema("example_id:str target:str first:float exact:float")
AGREEMENT = schema("target:str method:str other:str rank_correlation:float lo:float hi:float")
STORE = ("store", "error_factor", "sample", "prompts", "rows")  # what a later question to a store of sketches needs


def agreement(every: Sequence[Scores]) -> pa.Table:
    """Rank correlation over examples of every two methods on a target that several have, with its interval."""
    rows: list[dict[str, Any]] = []
    for target in dict.fromkeys(str(name) for scores in every[1:] for name in scores.targets):
        for a, b in combinations([scores for scores in every if target in scores], 2):
            r = spearman_interval(a[target], b[target])
            found = {} if r is None else {"rank_correlation": r.value, "lo": r.lo, "hi": r.hi}
            rows.append({"target": target, "method": a.method, "other": b.method, **found})
    return pa.Table.from_pylist(rows, AGREEMENT)


def shift_of(scores: Scores, feature_ids: Sequence[int]) -> np.ndarray | None:
    """Change of every coefficient by every example, float64 [P, d]; None unless all were asked for, with a unit."""
    if scores.unit == "rank":
        return None
    names = [f"coefficient:{k}" for k in feature_ids]
    known = {str(name): column for column, name in enumerate(scores.targets)}
    if not all(name in known for name in names):
        return None
    return scores.values[:, [known[name] for name in names]]


def _write_details(run: RunFolder, ready: Ready, scores: Scores, shift: np.ndarray | None) -> None:
    policy, details = ready.readings.policy, scores.details
    ids = {"prompt_ids": list(ready.readings.prompt_ids)}
    ids["feature_ids"] = policy.feature_ids.tolist() if policy is not None else []

    def write(file: str, name: str, values: np.ndarray, axes: tuple[str, ...]) -> None:
        run.write_tensors(file, {name: values}, {axis: ids[axis] for axis in axes}, axes={name: axes})

    if shift is not None and ids["feature_ids"]:
        write("comovement", "r", comovement(shift), ("feature_ids", "feature_ids"))
    if "dy" in details:
        ids["example_ids"] = list(scores.example_ids)
        write("prompt_effects", "dy", details["dy"].astype(np.float32), ("example_ids", "prompt_ids"))
    if "dX" in details and policy is not None:
        ids["example_ids"] = list(details["detailed"])
        write("feature_prompt_effects", "dX", details["dX"], ("example_ids", "prompt_ids", "feature_ids"))


COPIED = ("prompt", "response", "rejected", "label", "category", "source")


def _write_examples(run: RunFolder, ready: Ready, scores: Scores, checks: Mapping[str, Mapping[str, float]]) -> None:
    """The examples as they were scored, and of each its values on targets that are no coefficient and no prompt."""
    tokens = {e.id: e for e in ready.encoded}
    scored = {z.id: z.n_scored for z in ready.inputs}
    loss = {} if scores.losses is None else dict(zip(scores.example_ids, scores.losses, strict=True))
    own = list(ready.examples)
    columns: dict[str, Any] = {
        "example_id": [example.id for example in own],
        **{name: [getattr(example, name) for example in own] for name in COPIED},
        "document": pa.array([example.document or None for example in own], pa.string()),
        "n_tokens": [len(tokens[example.id].input_ids) for example in own],
        "n_scored": [scored[example.id] for example in own],
        "truncated": [tokens[example.id].truncated for example in own],
        "loss": [float(loss[example.id]) for example in own],
    }
    run.write_table("examples", pa.table(columns))
    ids, label = list(scores.example_ids), {example.id: example.label for example in own}
    rank = np.empty(len(ids), dtype=np.int64)
    rank[np.argsort(-np.abs(scores[scores.targets[0]]), kind="stable")] = np.arange(1, len(ids) + 1)
    columns = {"example_id": ids, "label": pa.array([label[i] for i in ids], pa.string())}
    for name in (name for name in scores.targets if not kind_of(name).many):
        columns[str(name)] = scores[name]
        if (se := scores.error(name)) is not None:
            columns[f"{name} se"] = se
    columns |= {"loss": scores.losses, "n_scored": [scored[i] for i in ids], "rank": rank}
    if (policy := ready.readings.policy) is not None:
        rows = _interference(ready, policy, scores)
        columns |= {name: [row[name] for row in rows] for name in rows[0] if name != "example_id"}
    for check in ("exact_score", "step_score", "refit_score"):
        columns[check] = pa.array([checks.get(i, {}).get(check) for i in ids], pa.float64())
    run.write_table("summary", pa.table(columns))


# What interference says of an example, where coefficients are known.
INTERFERENCE = "outside_share outside_change dominant_feature dominant_share unintended expected_by_chance"


@torch.no_grad()
def _interference(ready: Ready, policy: Policy, scores: Scores) -> list[dict[str, Any]]:
    """What each example does outside the features it is about: its column ``intended``, or its prompt's active ones."""
    named = _named_features(ready.examples, policy)
    others = [example for example in ready.examples if not named[example.id]]
    encoded = [ready.subject.chat.encode_prompt(example.messages, example.id) for example in others]
    inputs = prompt_inputs(encoded, ready.study.readout.position)
    features = ready.subject.features(policy.feature_ids.copy(), ready.study)
    active: dict[str, list[int]] = {}
    for packed in pack_prompts(inputs, None):
        h, _ = read_packed(ready.subject.loaded.model, packed, None, ready.subject.required_sae.point)
        for i, row in zip(packed.index, features(h, packed.offsets), strict=True):
            active[inputs[i].id] = policy.feature_ids[(row > 0).cpu().numpy()].tolist()
    intended = [named[i] or active[i] for i in scores.example_ids]
    shift = shift_of(scores, policy.feature_ids.tolist())
    if shift is not None:
        return interference(scores.example_ids, policy.feature_ids, shift, intended)
    # Without coefficients nothing can be said.
    why = "values only rank examples" if scores.unit == "rank" else "coefficients were not asked for"
    unknown = dict.fromkeys(INTERFERENCE.split()) | {"note": why}
    return [{"intended": own, "n_intended": len(own), **unknown} for own in intended]


def _named_features(examples: ExampleSet, policy: Policy) -> dict[str, list[int] | None]:
    """Feature ids of the column ``intended``: a list, or text with commas; None when empty."""
    known, found = set(policy.feature_ids.tolist()), {}
    for example in examples:
        cell = example.flags.get("intended")
        try:
            parts = cell.split(",") if isinstance(cell, str) else [] if cell is None else list(cell)
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
        found[example.id] = named or None
    return found
