"""The stage ``validate``: the model trained again on chosen examples, and what that changed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass
from typing import Any

import numpy as np
import pyarrow as pa

from taught.analysis.curate import curate
from taught.core.names import TargetName
from taught.core.readings import Readings
from taught.core.target import TargetSet, kind_of
from taught.data.columns import name_ids
from taught.errors import UserError
from taught.progress import Progress, SilentProgress
from taught.run.files import schema
from taught.run.folder import RunFolder
from taught.stages.pairs import forgetting_rows, how_to_forget, plan_of, verdicts
from taught.stages.ready import Ready, prepare, read_data
from taught.stages.scored import default_target, read_scores, run_targets
from taught.stages.subject import Subject, open_subject
from taught.study.schema import PAIRED, Study
from taught.training.recipe import Recipe
from taught.training.retrain import Answering, Retrainer, Retraining
from taught.validation.arms import ArmRow, compare_arms
from taught.validation.curves import CurvePoint, Kind, Plan, compare_curves, plan_curve
from taught.validation.design import Chosen, Couples, Effect, choose, couple_effect, couples, estimate
from taught.validation.judge import Judge, judge_responses, load_judge
from taught.validation.lds import table_of
from taught.validation.outcomes import changes, soft_metrics
from taught.validation.pairs import Plan as PairPlan
from taught.validation.pairs import few_pairs
from taught.validation.subsets import Subsets, leave_one_out, leave_share_out, matched_subsets, random_subsets

OUTCOMES = schema("design:str subset:str repeat:int target:str value:float")
SUBSETS = schema("design:str subset:str example_id:str")
MODELS = schema(
    "design:str subset:str repeat:int n_examples:int seed:int loss_before:float loss_after:float precision:float "
    "recall:float f1:float correctness:float judged_positive:float judged_negative:float seconds:float key:str"
)
ANSWERS = schema("design:str subset:str repeat:int prompt_id:str answer:str refuses:float")
Designs = dict[str, Subsets]
Name = tuple[str, str, int]  # design, subset, repeat
BASE = ("base", "base", 0)


def validate(study: Study, run: RunFolder, progress: Progress | None = None) -> None:
    """Train on each subset of the study's designs, read the prompts again, and keep what changed.

    Finished retrainings are kept in the folder ``retrained`` and never made twice.

    Raises
    ------
    UserError
        The readings or the influence are missing or of another study; a subset cannot be drawn;
        training diverges (finished retrainings are kept).
    """
    progress = progress or SilentProgress()
    decide = load_judge(study.validation.judge)
    data = read_data(study, progress)
    progress.step("load the model")
    subject = open_subject(study)
    reads = ("curate",) if "curated" in study.validation.designs else ()
    with run.stage("validate", study, subject.identity, reads) as stage:
        if stage.done:
            return
        ready = prepare(study, run, subject, data, progress)
        designs, paired = _designs(study, run, ready), _paired(study, run, ready)
        designs |= {design: plan.subsets for design, plan in paired.items()}
        how = how_to_forget(study, ready) if "unlearn" in designs else None
        tokenizer, spec = subject.loaded.tokenizer, study.validation
        answers = None
        if spec.answer_tokens:  # the tokens that end the examples' responses end the model's own answers too
            ends = {example.ids[-1] for example in ready.inputs} | {tokenizer.eos_token_id}
            answers = Answering(spec.answer_tokens, tuple(sorted(ends - {None})))
        retrainer = Retrainer(
            ready.problem,
            ready.inputs,
            Recipe.of(spec),
            run.path("retrained"),
            weights=subject.loaded.weights,
            tokenizer=tokenizer,
            answers=answers,
            progress=progress,
        )
        todo = {  # repeat r has the seed of the study plus r; all are trained once before any is trained again
            (design, name, repeat): ids
            for repeat in range(max(spec.repeats, spec.pairs if paired else 1))
            for design, subsets in designs.items()
            for name, ids in zip(subsets.names, subsets.members, strict=True)
            if repeat in (paired[design].repeats(name) if design in paired else range(spec.times(design)))
        }
        for plan in [*paired.values()][:1]:  # both designs have the same sets
            for warning in filter(None, (few_pairs(spec.pairs), plan.few_sets())):
                progress.note(warning)
        progress.step("the base model")
        made = {BASE: retrainer.base()}
        seen = {  # examples that the progress counts
            name: spec.unlearn_steps * min(spec.batch, len(ids)) if name[0] == "unlearn" else spec.epochs * len(ids)
            for name, ids in todo.items()
        }
        progress.step(f"{len(todo)} retrainings", sum(seen.values()))
        for name, ids in todo.items():
            seed = spec.seed + name[2]
            made[name] = retrainer.unlearn(ids, how, seed) if how and name[0] == "unlearn" else retrainer.run(ids, seed)
        judged = _judged(run, subject, made, decide)
        _write(study, run, ready, designs, paired, made, judged)


def measured_targets(study: Study, readings: Readings) -> list[TargetName]:
    """What a retraining can be measured on: all that the run asks for, but pathways and concepts."""
    wanted = ["behavior:*", *(f"behavior:{name}" for name in readings.categories)]
    if readings.policy is not None:
        wanted = ["score", "coefficient:*", *wanted]
    names = [TargetName.parse(text) for text in (*wanted, *(study.attribution.targets or ()))]
    own = [n for n in names if all(kind_of(part).reads != "concepts" for part in n.parts)]
    return [name for name in TargetSet.of(own, readings).names if name.pathway is None]


def _judged(
    run: RunFolder, subject: Subject, made: Mapping[Name, Retraining], judge: Judge
) -> dict[Name, dict[str, float]]:
    """Model -> prompt id -> how much its answer refuses, written with the answers; {} without."""
    text = {row["prompt_id"]: row["text"] for row in run.read_table("prompts").to_pylist()}
    rows, found = [], {}
    for name, model in made.items():
        if model.answers is None:
            continue
        said = [subject.loaded.tokenizer.decode(ids, skip_special_tokens=True) for ids in model.answers]
        asked = [text[prompt_id] for prompt_id in model.prompt_ids]
        values = judge_responses(judge, model.prompt_ids, asked, said).tolist()
        found[name] = dict(zip(model.prompt_ids, values, strict=True))
        rows += [(*name, *row) for row in zip(model.prompt_ids, said, values, strict=True)]
    if rows:
        run.write_table("answers", _table(ANSWERS, rows))
    return found


def _designs(study: Study, run: RunFolder, ready: Ready) -> Designs:
    """The subsets of every design that the study names."""
    spec, ids = study.validation, [example.id for example in ready.inputs]
    size = spec.part_of(len(ids))

    def matched() -> Subsets:
        labels = {example.id: example.label for example in ready.examples}
        if missing := sorted(example_id for example_id, label in labels.items() if not label):
            raise UserError(
                "examples have no label",
                value=missing[:8],
                rule="matched subsets hold the counts of labels fixed",
                fix="leave matched out of validation.designs",
            )
        lengths = {example.id: float(example.n_scored) for example in ready.inputs}
        return matched_subsets(ids, labels, lengths, size, spec.subsets, seed=spec.seed)

    drawn: dict[str, Callable[[], Subsets]] = {
        "random": lambda: random_subsets(ids, size, spec.subsets, seed=spec.seed),
        "matched": matched,
        "leave-out": lambda: leave_share_out(ids, spec.leave_out, spec.subsets, seed=spec.seed),
        "leave-one-out": lambda: leave_one_out(ids, _strongest(study, run, spec.subsets)),
        "removal": lambda: _plan("removal", study, run, ids).subsets,
        "addition": lambda: _plan("addition", study, run, ids).subsets,
        "curation": lambda: _curation(study, run, ids),
        "curated": lambda: _curated(study, run, ids),
        "chosen": lambda: _chosen(study, run, ids).subsets,
        "couples": lambda: _couples(study, run, ids).subsets,
    }
    return {name: drawn[name]() for name in spec.designs if name not in PAIRED}


def _paired(study: Study, run: RunFolder, ready: Ready) -> dict[str, PairPlan]:
    """The sets of the designs ``unlearn`` and ``teach``, which are the same."""
    asked = [name for name in study.validation.designs if name in PAIRED]
    return dict.fromkeys(asked, plan_of(study, ready, _asked(study, run))) if asked else {}


CURVES: dict[str, Kind] = {"removal": "remove", "addition": "add"}


def _plan(design: str, study: Study, run: RunFolder, ids: Sequence[str], k: int | None = None) -> Plan:
    """Without the examples that raise the target most, or with them alone, and random ones as many.

    k examples, or the study's budgets.
    """
    spec = study.validation
    budgets = spec.named_of(len(ids)) if k is None else [k]
    return plan_curve(
        _asked(study, run), budgets, kind=CURVES[design], method="named", runs=spec.controls, seed=spec.seed
    )


def _curation(study: Study, run: RunFolder, ids: Sequence[str]) -> Subsets:
    """The published experiment: all examples, the published rule, as many by this run, at random."""
    run.require("attribute")
    summary = run.read_table("summary", ["example_id", "label", "score"])
    decisions = curate(
        *(summary[name].to_pylist() for name in summary.column_names),
        rule="paper",
        positive_label=study.examples.positive_label,
        negative_label=study.examples.negative_label,
    )
    kept = tuple(sorted(row["example_id"] for row in decisions if row["action"] == "keep"))
    if not 0 < len(kept) < len(ids):
        raise UserError(
            "the published rule keeps all examples or none",
            value=f"{len(kept)} kept",
            rule="some are dropped and some are kept",
            fix="leave curation out of validation.designs",
        )
    others = _plan("removal", study, run, ids, len(ids) - len(kept)).subsets
    return Subsets(
        ("all", "published-rule", *others.names), (tuple(sorted(ids)), kept, *others.members), others.inclusion
    )


def _curated(study: Study, run: RunFolder, ids: Sequence[str]) -> Subsets:
    """What ``taught curate`` decided in this run: all examples, those it kept, as many at random."""
    rows = run.read_table("curation", ["example_id", "action"]).to_pylist()
    if swapped := [row["example_id"] for row in rows if row["action"] == "swap"]:
        raise UserError(
            "the design curated trains on what is kept, and these examples are exchanged",
            value=name_ids(swapped),
            fix=f"taught curate {run.folder} --rule top-k, or train on keep.jsonl and swap.jsonl in a study of its own",
        )
    kept = tuple(sorted(row["example_id"] for row in rows if row["action"] == "keep"))
    if not 0 < len(kept) < len(ids) or {row["example_id"] for row in rows} != set(ids):
        raise UserError(
            "what taught curate kept cannot be compared with random examples",
            value=f"{len(kept)} of {len(rows)} examples kept, {len(ids)} to train on",
            rule="it decides on all examples of the run, keeps some and drops some",
            fix=f"taught curate {run.folder} with another --k or --rule",
        )
    spec = study.validation
    others = random_subsets(ids, len(kept), spec.controls, seed=spec.seed)
    return Subsets(("all", "kept", *others.names), (tuple(sorted(ids)), kept, *others.members), others.inclusion)


def _chosen(study: Study, run: RunFolder, ids: Sequence[str]) -> Chosen:
    """Subsets for the effect of the named examples, after those of the design ``random`` if asked."""
    spec = study.validation
    random = spec.subsets if "random" in spec.designs else 0
    return choose(
        ids,
        "named",
        _strongest(study, run, spec.named_of(len(ids))[0]),
        spec.part_of(len(ids)),
        spec.subsets,
        seed=spec.seed,
        random=random,
    )


def _couples(study: Study, run: RunFolder, ids: Sequence[str]) -> Couples:
    """Random subsets of the other examples, each without the named examples and with them."""
    spec = study.validation
    named = _strongest(study, run, spec.named_of(len(ids))[0])
    return couples(ids, "named", named, spec.part_of(len(ids)), spec.subsets, seed=spec.seed)


def _strongest(study: Study, run: RunFolder, k: int) -> list[str]:
    """Ids of the k examples that raise the study's target most, by the influence of this run."""
    rows = _asked(study, run)
    return sorted(rows, key=lambda i: (-rows[i], i))[:k]


def _asked(study: Study, run: RunFolder) -> dict[str, float]:
    """Example id -> influence of this run on the target that examples are removed by."""
    run.require("attribute")
    target = _target(study, run)
    return read_scores(run, [str(target)]).by_example(target)


def _target(study: Study, run: RunFolder) -> TargetName:
    """The target that examples are named by: the study's, that of the curation, or what the run ranks by."""
    spec = study.validation.remove_by or study.curation.target
    if spec is None:
        behaviors = [name for name in run_targets(run) if name.startswith("behavior")]
        negative = f"behavior:{study.prompts.negative_group}"
        spec = negative if negative in behaviors else next(iter(behaviors), default_target(run))
    return TargetName.parse(spec)


def _write(
    study: Study,
    run: RunFolder,
    ready: Ready,
    designs: Designs,
    paired: Mapping[str, PairPlan],
    made: Mapping[Name, Retraining],
    judged: Mapping[Name, Mapping[str, float]],
) -> None:
    readings, base = ready.readings, made[BASE]
    sides = _sides(study, readings)
    measured = measured_targets(study, readings)
    degree = ready.subject.behavior.degree
    models = [_model_row(BASE, base, sides, judged, degree)]
    outcomes = []
    subsets = {name[:2]: after.ids for name, after in made.items() if name != BASE}
    for name, after in made.items():
        if name == BASE:
            continue
        outcomes += [(*name, target, value) for target, value in changes(readings, base, after, measured).items()]
        models.append(_model_row(name, after, sides, judged, degree))
    published = bool(sides) and np.allclose(np.log(degree(base.y)), base.y)  # the metrics take y for a log probability
    optional: dict[str, Sequence[Any]] = {
        "curves": [p for design in designs if design in CURVES for p in _points(design, study, run, ready, made)],
        "verdicts": verdicts(study, run, paired, _target(study, run), made, outcomes) if paired else [],
        "forgetting": forgetting_rows(made),
        "named_effects": _effects(study, run, designs, ready, outcomes),
        "arms": [
            row for design in ARMS if design in designs and published for row in _arms(design, ready, sides, made)
        ],
    }
    for table, rows in optional.items():
        if rows:
            run.write_table(table, table_of(rows))
    run.write_table("subsets", _table(SUBSETS, [(*name, i) for name, ids in subsets.items() for i in ids]))
    run.write_table("outcomes", _table(OUTCOMES, outcomes))
    run.write_table("models", _table(MODELS, models))
    run.write_json(
        "validation",
        {
            "recipe": asdict(Recipe.of(study.validation)),
            "base": asdict(soft_metrics(base, sides[0], sides[1], degree)) if sides else None,
            "inclusion": {design: dict(subsets.inclusion) for design, subsets in designs.items()},
        },
    )


def _sides(study: Study, readings: Readings) -> list[Sequence[str]]:
    """Prompts that should show the behavior and those that should not; empty where the study does not say."""
    spec = study.prompts
    if spec.positive_group is None or spec.negative_group is None:
        return []
    return [readings.groups[group] for group in spec.sides]


def _model_row(
    name: Name,
    model: Retraining,
    sides: Sequence[Sequence[str]],
    judged: Mapping[Name, Mapping[str, float]],
    degree: Callable[[Any], Any],
) -> tuple[Any, ...]:
    """A row of the table ``models``; metrics are null where the study does not say what is wanted."""
    metrics = astuple(soft_metrics(model, sides[0], sides[1], degree)) if sides else (None,) * 4
    losses = [float(values.mean()) if values.size else None for values in (model.losses_before, model.losses_after)]
    shares = (
        [None, None]
        if name not in judged or not sides
        else [float(np.mean([judged[name][i] for i in side])) for side in sides]
    )
    return (
        *name,
        len(model.ids),
        model.seed,
        *losses,
        *metrics,
        *shares,
        model.seconds_training + model.seconds_reading,
        model.key,
    )


ARMS = ("curation", "curated")


@dataclass(frozen=True)
class DesignArm(ArmRow):
    """A metric of an arm of one design."""

    design: str = ""


def _arms(
    design: str, ready: Ready, sides: Sequence[Sequence[str]], made: Mapping[Name, Retraining]
) -> list[DesignArm]:
    """Each way of choosing the examples against as many random ones."""
    models = {"base": [made[BASE]]}
    for (of, name, _), model in made.items():
        if of == design:
            models.setdefault(_arm(name), []).append(model)
    column = {prompt_id: n for n, prompt_id in enumerate(ready.readings.prompt_ids)}
    rows = compare_arms(
        {arm: np.array([model.y for model in some]) for arm, some in models.items()},
        {arm: len(some[0].ids) for arm, some in models.items()},
        *([column[prompt_id] for prompt_id in side] for side in sides),
    )
    return [DesignArm(**asdict(row), design=design) for row in rows]


def _arm(subset: str) -> str:
    """all, published-rule, kept, named or random, of the name of a subset."""
    if subset.startswith("remove-"):
        return subset.split("-")[2]
    return "random" if subset.startswith("random-") else subset


@dataclass(frozen=True)
class NamedEffect(Effect):
    """What training on the examples that the influence names does to a target, by a design."""

    design: str = ""
    target: str = ""
    examples: int = 0


def _effects(
    study: Study, run: RunFolder, designs: Designs, ready: Ready, outcomes: Sequence[tuple[Any, ...]]
) -> list[NamedEffect]:
    """Effects by the designs ``chosen`` and ``couples``."""
    asked = [name for name in ("chosen", "couples") if name in designs]
    if not asked:
        return []
    ids = [example.id for example in ready.inputs]
    target, scores = _target(study, run), _asked(study, run)
    found = []
    for design in asked:
        changed = {row[1]: row[-1] for row in outcomes if row[0] == design and row[3] == str(target)}
        if design == "chosen":
            plan = _chosen(study, run, ids)
            effect = estimate(plan.question, plan.rounds, changed, scores)[0]
        else:
            effect = couple_effect(_couples(study, run, ids), changed)
        found.append(
            NamedEffect(
                **asdict(effect), design=design, target=str(target), examples=study.validation.named_of(len(ids))[0]
            )
        )
    return found


@dataclass(frozen=True)
class Point(CurvePoint):
    """A point of the curve of a design, and the area of the whole curve (``validation.curves``)."""

    design: str = ""
    area: float = 0.0
    area_lo: float = 0.0
    area_hi: float = 0.0


def _points(design: str, study: Study, run: RunFolder, ready: Ready, made: Mapping[Name, Retraining]) -> list[Point]:
    """Behavior on the target's prompts by the examples that were named, against random ones."""
    target = _target(study, run)
    _, B = kind_of(target).cotangents(target, ready.readings)
    if kind_of(target).reads != "behavior" or target.minus is not None or B is None:
        return []
    plan = _plan(design, study, run, [example.id for example in ready.inputs])
    rows = np.flatnonzero(B)

    def outcomes(names: Sequence[str]) -> list[np.ndarray]:
        return [made[design, name, 0].y[rows] for name in names]

    named = np.array([outcomes(plan.chosen)])
    curve = compare_curves(plan, named, np.array([outcomes(names) for names in plan.controls]))
    return [
        Point(**asdict(point), design=design, area=curve.area, area_lo=curve.lo, area_hi=curve.hi)
        for point in curve.points
    ]


def _table(schema: pa.Schema, rows: Sequence[tuple[Any, ...]]) -> pa.Table:
    columns = zip(*rows, strict=True) if rows else [()] * len(schema)
    return pa.Table.from_arrays(
        [pa.array(column, field.type) for column, field in zip(columns, schema, strict=True)], schema=schema
    )
