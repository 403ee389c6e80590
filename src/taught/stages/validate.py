"""The stage ``validate``: the model trained again on chosen examples, and what that changed."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, astuple, dataclass
from functools import cached_property
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
    progress, spec = progress or SilentProgress(), study.validation
    decide = load_judge(spec.judge)
    data = read_data(study, progress)
    progress.step("load the model")
    subject = open_subject(study)
    reads = ("curate",) if "curated" in spec.designs else ()
    with run.stage("validate", study, subject.identity, reads) as stage:
        if stage.done:
            return
        ready = prepare(study, run, subject, data, progress)
        named = _Named(study, run, [example.id for example in ready.inputs])
        designs, asked = _designs(named, ready), [name for name in spec.designs if name in PAIRED]
        # The sets of the designs unlearn and teach are the same.
        paired = dict.fromkeys(asked, plan_of(study, ready, named.influence)) if asked else {}
        designs |= {design: plan.subsets for design, plan in paired.items()}
        how = how_to_forget(study, ready) if "unlearn" in designs else None
        tokenizer, answers = subject.loaded.tokenizer, None
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
        for plan in [*paired.values()][:1]:
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
        _write(named, ready, designs, paired, made, judged)


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


CURVES: dict[str, Kind] = {"removal": "remove", "addition": "add"}


@dataclass(eq=False)
class _Named:
    """The examples that raise the study's target most by the influence of this run, and the designs that name them."""

    study: Study
    run: RunFolder
    ids: Sequence[str]

    @cached_property
    def target(self) -> TargetName:
        """The study's, that of the curation, or what the run ranks by."""
        spec = self.study.validation.remove_by or self.study.curation.target
        if spec is None:
            behaviors = [name for name in run_targets(self.run) if name.startswith("behavior")]
            negative = f"behavior:{self.study.prompts.negative_group}"
            spec = negative if negative in behaviors else next(iter(behaviors), default_target(self.run))
        return TargetName.parse(spec)

    @cached_property
    def influence(self) -> dict[str, float]:
        """Example id -> influence on the target."""
        self.run.require("attribute")
        return read_scores(self.run, [str(self.target)]).by_example(self.target)

    def strongest(self, k: int) -> list[str]:
        return sorted(self.influence, key=lambda i: (-self.influence[i], i))[:k]

    def curve(self, design: str, budgets: Sequence[int]) -> Plan:
        """Without the strongest examples, or with them alone, and random ones as many."""
        spec = self.study.validation
        how: dict[str, Any] = {"kind": CURVES[design], "method": "named", "runs": spec.controls, "seed": spec.seed}
        return plan_curve(self.influence, budgets, **how)

    def chosen(self) -> Chosen:
        """Subsets for the effect of the named examples, after those of the design ``random`` if asked."""
        spec, n = self.study.validation, len(self.ids)
        named, random = self.strongest(spec.named_of(n)[0]), spec.subsets if "random" in spec.designs else 0
        return choose(self.ids, "named", named, spec.part_of(n), spec.subsets, seed=spec.seed, random=random)

    def couples(self) -> Couples:
        """Random subsets of the other examples, each without the named examples and with them."""
        spec, n = self.study.validation, len(self.ids)
        named = self.strongest(spec.named_of(n)[0])
        return couples(self.ids, "named", named, spec.part_of(n), spec.subsets, seed=spec.seed)


def _designs(named: _Named, ready: Ready) -> Designs:
    """The subsets of every design that the study names."""
    spec, ids = named.study.validation, named.ids
    size, budgets = spec.part_of(len(ids)), spec.named_of(len(ids))

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
        "leave-one-out": lambda: leave_one_out(ids, named.strongest(spec.subsets)),
        "removal": lambda: named.curve("removal", budgets).subsets,
        "addition": lambda: named.curve("addition", budgets).subsets,
        "curation": lambda: _curation(named),
        "curated": lambda: _curated(named),
        "chosen": lambda: named.chosen().subsets,
        "couples": lambda: named.couples().subsets,
    }
    return {name: drawn[name]() for name in spec.designs if name not in PAIRED}


def _curation(named: _Named) -> Subsets:
    """The published experiment: all examples, the published rule, as many by this run, at random."""
    named.run.require("attribute")
    summary = named.run.read_table("summary", ["example_id", "label", "score"])
    labels, columns = named.study.examples, (summary[name].to_pylist() for name in summary.column_names)
    sides: dict[str, Any] = {"positive_label": labels.positive_label, "negative_label": labels.negative_label}
    decisions = curate(*columns, rule="paper", **sides)
    kept = tuple(sorted(row["example_id"] for row in decisions if row["action"] == "keep"))
    if not 0 < len(kept) < len(named.ids):
        raise UserError(
            "the published rule keeps all examples or none",
            value=f"{len(kept)} kept",
            rule="some are dropped and some are kept",
            fix="leave curation out of validation.designs",
        )
    return _beside("published-rule", kept, named.ids, named.curve("removal", [len(named.ids) - len(kept)]).subsets)


def _curated(named: _Named) -> Subsets:
    """What ``taught curate`` decided in this run: all examples, those it kept, as many at random."""
    ids, spec, again = named.ids, named.study.validation, f"taught curate {named.run.folder}"
    rows = named.run.read_table("curation", ["example_id", "action"]).to_pylist()
    if swapped := [row["example_id"] for row in rows if row["action"] == "swap"]:
        raise UserError(
            "the design curated trains on what is kept, and these examples are exchanged",
            value=name_ids(swapped),
            fix=f"{again} --rule top-k, or train on keep.jsonl and swap.jsonl in a study of its own",
        )
    kept = tuple(sorted(row["example_id"] for row in rows if row["action"] == "keep"))
    if not 0 < len(kept) < len(ids) or {row["example_id"] for row in rows} != set(ids):
        raise UserError(
            "what taught curate kept cannot be compared with random examples",
            value=f"{len(kept)} of {len(rows)} examples kept, {len(ids)} to train on",
            rule="it decides on all examples of the run, keeps some and drops some",
            fix=f"{again} with another --k or --rule",
        )
    return _beside("kept", kept, ids, random_subsets(ids, len(kept), spec.controls, seed=spec.seed))


def _beside(name: str, kept: tuple[str, ...], ids: Sequence[str], others: Subsets) -> Subsets:
    """All examples and those that were kept, before other subsets."""
    names, members = ("all", name, *others.names), (tuple(sorted(ids)), kept, *others.members)
    return Subsets(names, members, others.inclusion)


def _write(
    named: _Named,
    ready: Ready,
    designs: Designs,
    paired: Mapping[str, PairPlan],
    made: Mapping[Name, Retraining],
    judged: Mapping[Name, Mapping[str, float]],
) -> None:
    study, run, readings, base = named.study, named.run, ready.readings, made[BASE]
    # Prompts that should show the behavior and those that should not; none where the study does not say.
    said = study.prompts.positive_group is not None and study.prompts.negative_group is not None
    sides = [readings.groups[group] for group in study.prompts.sides] if said else []
    measured, degree = measured_targets(study, readings), ready.subject.behavior.degree
    models: list[tuple[Any, ...]] = []  # metrics are null where the study does not say what is wanted
    for name, model in made.items():
        metrics = astuple(soft_metrics(model, sides[0], sides[1], degree)) if sides else (None,) * 4
        losses = [float(values.mean()) if values.size else None for values in (model.losses_before, model.losses_after)]
        own, seconds = judged.get(name), model.seconds_training + model.seconds_reading
        shares = [float(np.mean([own[i] for i in side])) for side in sides] if own is not None and sides else [None] * 2
        models.append((*name, len(model.ids), model.seed, *losses, *metrics, *shares, seconds, model.key))
    trained = {name: after for name, after in made.items() if name != BASE}
    subsets = {name[:2]: after.ids for name, after in trained.items()}
    outcomes = [
        (*name, target, value)
        for name, after in trained.items()
        for target, value in changes(readings, base, after, measured).items()
    ]
    published = bool(sides) and np.allclose(np.log(degree(base.y)), base.y)  # the metrics take y for a log probability
    wanted = study.prompts.sides if published else ()
    optional: dict[str, Sequence[Any]] = {
        "curves": [p for design in designs if design in CURVES for p in _points(design, named, readings, made)],
        "verdicts": verdicts(study, run, paired, named.target, made, outcomes) if paired else [],
        "forgetting": forgetting_rows(made),
        "named_effects": _effects(named, designs, outcomes),
        "arms": [row for design in ARMS if design in designs for row in _arms(design, ready, wanted, made)],
    }
    for table, rows in optional.items():
        if rows:
            run.write_table(table, table_of(rows))
    run.write_table("subsets", _table(SUBSETS, [(*name, i) for name, ids in subsets.items() for i in ids]))
    run.write_table("outcomes", _table(OUTCOMES, outcomes))
    run.write_table("models", _table(MODELS, models))
    record = {
        "recipe": asdict(Recipe.of(study.validation)),
        "base": asdict(soft_metrics(base, sides[0], sides[1], degree)) if sides else None,
        "inclusion": {design: dict(own.inclusion) for design, own in designs.items()},
    }
    run.write_json("validation", record)


ARMS = ("curation", "curated")


@dataclass(frozen=True)
class DesignArm(ArmRow):
    """A metric of an arm of one design."""

    design: str = ""


def _arms(design: str, ready: Ready, sides: Sequence[str], made: Mapping[Name, Retraining]) -> list[DesignArm]:
    """Each way of choosing the examples against as many random ones."""
    models = {"base": [made[BASE]]}
    for (of, name, _), model in made.items():
        if of == design:
            # all, published-rule, kept, named or random
            named = name.split("-")[2] if name.startswith("remove-") else name
            models.setdefault("random" if named.startswith("random-") else named, []).append(model)
    column = {prompt_id: n for n, prompt_id in enumerate(ready.readings.prompt_ids)}
    rows = compare_arms(
        {arm: np.array([model.y for model in some]) for arm, some in models.items()},
        {arm: len(some[0].ids) for arm, some in models.items()},
        {group: [column[prompt_id] for prompt_id in ids] for group, ids in ready.readings.groups.items()},
        sides,
    )
    return [DesignArm(**asdict(row), design=design) for row in rows]


@dataclass(frozen=True)
class NamedEffect(Effect):
    """What training on the examples that the influence names does to a target, by a design."""

    design: str = ""
    target: str = ""
    examples: int = 0


def _effects(named: _Named, designs: Designs, outcomes: Sequence[tuple[Any, ...]]) -> list[NamedEffect]:
    """Effects by the designs ``chosen`` and ``couples``."""
    found, examples = [], named.study.validation.named_of(len(named.ids))[0]
    for design in (name for name in ("chosen", "couples") if name in designs):
        target = str(named.target)
        changed = {row[1]: row[-1] for row in outcomes if row[0] == design and row[3] == target}
        if design == "chosen":
            plan = named.chosen()
            effect = estimate(plan.question, plan.rounds, changed, named.influence)[0]
        else:
            effect = couple_effect(named.couples(), changed)
        found.append(NamedEffect(**asdict(effect), design=design, target=target, examples=examples))
    return found


@dataclass(frozen=True)
class Point(CurvePoint):
    """A point of the curve of a design, and the area of the whole curve (``validation.curves``)."""

    design: str = ""
    area: float = 0.0
    area_lo: float = 0.0
    area_hi: float = 0.0


def _points(design: str, named: _Named, readings: Readings, made: Mapping[Name, Retraining]) -> list[Point]:
    """Behavior on the target's prompts by the examples that were named, against random ones."""
    target = named.target
    _, B = kind_of(target).cotangents(target, readings)
    if kind_of(target).reads != "behavior" or target.minus is not None or B is None:
        return []
    plan = named.curve(design, named.study.validation.named_of(len(named.ids)))
    rows = np.flatnonzero(B)

    def outcomes(names: Sequence[str]) -> list[np.ndarray]:
        return [made[design, name, 0].y[rows] for name in names]

    controls = np.array([outcomes(names) for names in plan.controls])
    curve = compare_curves(plan, np.array([outcomes(plan.chosen)]), controls)
    whole: dict[str, Any] = {"design": design, "area": curve.area, "area_lo": curve.lo, "area_hi": curve.hi}
    return [Point(**asdict(point), **whole) for point in curve.points]


def _table(schema: pa.Schema, rows: Sequence[tuple[Any, ...]]) -> pa.Table:
    columns = zip(*rows, strict=True) if rows else [()] * len(schema)
    return pa.table([pa.array(column, kind) for column, kind in zip(columns, schema.types, strict=True)], schema=schema)
