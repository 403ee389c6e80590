"""``taught check``: what a study would run, counted and estimated before it is run."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from torch import Tensor

from taught.core.estimator import needs_steps
from taught.core.example import Examples
from taught.core.problem import Problem
from taught.core.registry import CURVATURES, ESTIMATORS, TRAJECTORIES
from taught.core.trajectory import Follows
from taught.data.chat import EncodedExample
from taught.data.columns import name_ids
from taught.data.duplicates import drop_duplicates
from taught.data.overlap import find_overlap
from taught.data.prompts import PromptSet
from taught.errors import UserError
from taught.estimators.cost import ACTIVE, Asked, attribution_cost, validation_cost
from taught.model.forward import get_block
from taught.model.kernels import product_rate
from taught.model.parameters import is_plain, moving_parameters, weight_shape
from taught.stages import asked
from taught.stages.ready import make_problem, method_of
from taught.stages.subject import Subject, chosen_examples, open_subject, prompt_inputs, study_prompts
from taught.stages.trial import try_study
from taught.study.schema import PAIRED, Study, ValidationSpec
from taught.validation.pairs import few_pairs, least_p

GB = 2**30
# Share of a product's pace that whole passes run at: .55 to .75 on SmolLM2's sizes on one core of
# an idle machine, less with several cores.
PACE = 0.5
# Python and torch with their libraries, one batch of activations, tables.
_REST_GB = 3


@dataclass
class CheckReport:
    """What was found.

    Attributes
    ----------
    rows : (what, value) examples in reading order
    problems : messages of what would stop the run
    """

    rows: list[tuple[str, str]] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)

    def add(self, what: str, value: object) -> None:
        """Add one row."""
        self.rows.append((what, str(value)))

    def add_set(self, what: str, kinds: Iterable[object], columns: Mapping[str, str]) -> None:
        """Add what a set of rows holds of each kind, and the columns that they come from."""
        counts = Counter(kinds)
        self.add(f"{what}s", f"{counts.total()} ({', '.join(f'{n} {name}' for name, n in counts.items())})")
        self.add(f"{what} columns", ", ".join(f"{key} = {name}" for key, name in columns.items()))

    def add_left_out(self, what: str, ids: Sequence[str], why: str, drop: bool) -> None:
        """Add the examples that are left out on request; without one they are a problem."""
        fate = "" if not ids else f", dropped on request: {name_ids(ids)}" if drop else ", an error"
        self.add(what, f"{len(ids)} examples {why}{fate}")
        if ids and not drop:
            key = f"examples.drop_{what}=true"
            self.problems.append(f"{len(ids)} examples {why}: {name_ids(ids)}; --set {key} leaves them out")

    def add_spread(self, what: str, lengths: Sequence[int]) -> None:
        """Add what numbers of tokens come to."""
        self.add(what, f"median {np.median(lengths):.0f}, longest {max(lengths)}, in all {sum(lengths)}")

    def __rich__(self) -> RenderableType:
        table = Table(box=None, show_header=False, pad_edge=False)
        table.add_column(style="bold")
        table.add_column()
        for what, value in self.rows:
            table.add_row(what, Text(value))
        if not self.problems:
            return Group(table, Text("nothing stands in the way", style="green"))
        return Group(table, *(Text(f"problem: {p}", style="red") for p in self.problems))


def check_study(study: Study) -> CheckReport:
    """Load everything that a run would load, count and estimate; nothing is written.

    Notes
    -----
    Estimating runs one prompt through the model, and products of matrices for under half a second.
    """
    report = CheckReport()
    subject = open_subject(study)
    _describe_subject(report, study, subject)
    prompts = study_prompts(study)
    encoded = subject.encode(prompts)
    decode, first = subject.loaded.tokenizer.decode, encoded[0]
    for ids in first.suffixes:
        report.add(f"scored after {first.id}", " | ".join(decode([i]) for i in ids))
    if first.left_out:
        report.add("left out", f"{first.left_out}: contained in a shorter one")
    report.add_set("prompt", (p.group for p in prompts), prompts.columns)
    report.add_spread("prompt tokens", [len(e.input_ids) for e in encoded])
    if subject.sae is not None:  # a policy is written in features that tell two groups apart
        try:
            report.add("groups", "{} against {}".format(*study.prompts.sides))
        except UserError as error:
            report.problems.append(str(error))
    examples, labels = _check_examples(report, study, subject, prompts)
    report.add("stages", ", ".join(stage.name for stage in asked(study)))
    if examples:
        position, point, features = None, None, None
        if subject.sae is not None:
            named = study.features.ids
            count = len(named) if named else min(study.features.max_features, subject.sae.n_features)
            features = subject.features(range(count), study)  # which ones they are costs nothing
            position, point = study.readout.position, subject.sae.point
        problem = make_problem(study, subject, prompt_inputs(encoded, position), point, features)
        inputs = [e.example() for e in examples]
        report.problems += map(str, try_study(study, subject, prompts, labels, problem, inputs))
        _estimate(report, study, subject, problem, inputs, len(prompts.groups))
    return report


def _describe_subject(report: CheckReport, study: Study, subject: Subject) -> None:
    sae, parameters = subject.sae, sum(weight_shape(p).numel() for p in subject.loaded.model.parameters()) / 1e6
    what = f"{parameters:.1f}M parameters, {study.model.dtype} on {study.model.device}"
    report.add("model", f"{subject.loaded.model_id}, {what}")
    report.add("weights", subject.loaded.weights.get("source", "local folder"))
    if codes := subject.loaded.weights.get("quantised"):
        report.add("quantised", f"{codes['kind']}, {codes['layers']} linear layers")
    if study.model.adapter is not None:
        report.add("adapter", study.model.adapter)
        if base := subject.loaded.weights["adapter"].get("trained_on"):
            report.add("adapter of", f"{base}, by its own record: another model")
    if sae is None:
        report.add("SAE", "none: with one (sae.path), a policy says through which features the examples act")
    else:
        report.add("SAE", f"{sae.n_features} features ({sae.architecture}), {sae.point}, encoder {study.sae.encoder}")
        report.add("read-out", study.readout.position)
    report.add("behavior", f"{subject.behavior.meaning} ({subject.behavior.unit})")


def _check_examples(
    report: CheckReport, study: Study, subject: Subject, prompts: PromptSet
) -> tuple[list[EncodedExample], list[str | None]]:
    """The examples that would be scored, as tokens, and their labels; none where one of them cannot be."""
    spec, examples = study.examples, chosen_examples(study)
    report.add_set("example", (p.label for p in examples), examples.columns)
    if examples.sample is not None:
        report.add("sample", examples.sample.note())
    ids = list(dict.fromkeys(example_id for example_id, _ in find_overlap(examples, prompts)))
    report.add_left_out("overlap", ids, "are evaluation prompts", spec.drop_overlap)
    if spec.drop_overlap:
        examples = examples.without(ids)
    if spec.kind == "document" or spec.drop_duplicates:
        single, repeating = drop_duplicates(examples, spec.near_duplicate)
        fate = "left out" if spec.drop_duplicates else "kept"
        named = f", {fate}: {name_ids([f'{d.id} = {d.of}' for d in repeating])}" if repeating else ""
        report.add("duplicates", f"{len(repeating)} examples repeat another one{named}")
        examples = single if spec.drop_duplicates else examples
    try:
        encoded = subject.chat.encode_each(examples, spec.max_tokens)
    except UserError as error:
        report.problems.append(str(error))
        return [], []
    cut = [example.id for example in encoded if example.truncated]
    report.add_left_out("truncated", cut, f"are longer than {spec.max_tokens} tokens", spec.drop_truncated)
    scored = [example for example in encoded if not example.empty and not (spec.drop_truncated and example.truncated)]
    if not scored:
        report.problems.append("no example is left to be scored")
        return [], []
    report.add_spread("example tokens", [len(e.input_ids) for e in scored])
    report.add_spread("response tokens", [e.n_scored for e in scored])
    return scored, [example.label for example in examples.encoded(scored)]


def _estimate(
    report: CheckReport, study: Study, subject: Subject, problem: Problem, inputs: Examples, groups: int
) -> None:
    """Operations, minutes, memory and disk of the attribution, and of training again."""
    method, examples, prompts = method_of(study), len(inputs), len(problem.prompts)
    # What the targets amount to; both pathways of a target are asked for apart.
    names = study.attribution.targets
    if names is None:
        names = ("score", "coefficient:*", "behavior:*", "prompt:*") if problem.d else ("behavior:*",)
    every = any(name.startswith(("coefficient:", "prompt:*")) for name in names)
    every = every or (study.bins is not None and study.bins.questions)
    queries = sum({"score": 2, "behavior:*": groups}.get(name, 1) for name in names)
    features = problem.d + int(study.policy.intercept) if problem.d else 0
    try:
        along = method.trajectory.make(TRAJECTORIES)
        wanted = Asked(features, queries, every, study.attribution.exact_top if along.single else 0)
        cost = attribution_cost(problem, inputs, wanted, method)
    except UserError as error:
        if str(error) not in report.problems:
            report.problems.append(str(error))
        return
    if hasattr(along, "asks"):
        report.add("question", along.asks)
    begins = (
        f"begins at the weights of {study.model.adapter or study.model.id}, which should not have seen the examples"
    )
    if isinstance(along, Follows) and getattr(along, "run", None) is None:
        report.add("training", begins)
    said, minutes = _operations(cost, "floating point operations", subject)
    report.add("cost", said)
    if "features" in cost:
        minutes += f", and {problem.d} features to be active on {ACTIVE:.0%} of the prompts"
    report.add("time", minutes)
    estimator, curvature = method.estimator.make(ESTIMATORS), method.curvature.make(CURVATURES)
    patterns = curvature.curved(problem) if hasattr(curvature, "curved") else problem.parameters
    if patterns is not None:
        moving = moving_parameters(subject.loaded.model, patterns).values()
        count = sum(p.numel() for p in moving)
        report.add("moving", f"{count / 1e6:.3g}M parameters in {len(moving)} tensors")
    held, states = along.bytes(problem, inputs, wanted) if isinstance(along, Follows) else (None, 0)
    gradients = held if held is not None else _gradients(study, problem, estimator, curvature, wanted)
    # The base model, and a checkpoint's; the weights that a training run begins with are put back.
    model = _size(problem.model.parameters()) * (1 if along.single else 2) / GB
    total = model + gradients / GB + _REST_GB
    parts = f"model {model:.1f}, gradients {gradients / GB:.1f}, everything else about {_REST_GB}"
    report.add("memory", f"about {total:.1f} GB ({parts})")
    # The tables of a run, what its estimator keeps, and the states of a training run that is followed.
    tables = 8 * examples * (1 + queries + 3 * features * every) + 4 * examples * prompts
    disk = f"about {max(tables, 10**6) / 1e6:.0f} MB of tables"
    if hasattr(estimator, "kept_bytes"):
        disk += f", {estimator.kept_bytes(examples, prompts, features) / 1e6:.0f} MB kept by the estimator"
    if states:
        disk += f", {states / 1e6:.0f} MB of states of the training run while it is followed"
    report.add("disk", disk)
    _estimate_validation(report, study, subject, problem, inputs, begins)


def _operations(cost: Mapping[str, float], what: str, subject: Subject) -> tuple[str, str]:
    """Operations with their parts, and minutes by the pace of a product with one of a block's matrices."""
    parts, total = ", ".join(f"{part} {value / 1e12:.3g}" for part, value in cost.items()), sum(cost.values())
    model = subject.loaded.model
    p = next(p for p in get_block(model, 0).parameters() if p.ndim == 2)
    like = next(model.parameters())  # of a quantised one the product is one with what it stands for
    rate = product_rate(p if is_plain(p) else torch.empty(weight_shape(p), dtype=like.dtype, device=p.device))
    minutes = total / (PACE * rate) / 60
    said = f"about {minutes:.0f} minutes" if minutes >= 1.5 else "about a minute or less"
    said += f": an estimate, taking passes to run at {PACE:.0%} of what a product of matrices "
    said += f"just did ({rate / 1e9:.0f} x 10^9 operations a second)"
    return f"about {total / 1e12:.3g} x 10^12 {what} ({parts})", said


def _size(parameters: Iterable[Tensor], least: int = 1) -> int:
    """Bytes; ``least`` of a number."""
    return sum(max(least, p.element_size()) * p.numel() for p in parameters)


def _gradients(study: Study, problem: Problem, estimator: Any, curvature: Any, wanted: Asked) -> float:
    """Bytes of the gradients that are held at a time."""
    moving = moving_parameters(problem.model, problem.parameters).values()
    held = getattr(estimator, "gradients", None)
    if held is not None:
        gradients = held * _size(moving)
    else:
        query, gradients = _size(moving, 4), study.attribution.memory_gb * GB
        if not wanted.every:
            gradients = min(wanted.queries * query, gradients)
        if getattr(curvature, "of_queries", False):  # queries are solved for whole
            gradients = max(query, gradients)
        if wanted.top and needs_steps(curvature) is None:  # a real step of the strongest
            gradients = max(_size(moving), gradients)
    return gradients + (4 * curvature.numbers(problem) if hasattr(curvature, "numbers") else 0)


def _estimate_validation(
    report: CheckReport, study: Study, subject: Subject, problem: Problem, examples: Examples, begins: str
) -> None:
    """Retrainings, operations, minutes and disk of ``taught validate``, and where they begin."""
    spec = study.validation
    subsets = subset_sizes(spec, len(examples))
    forgotten = 3 * spec.pairs * spec.named_of(len(examples)) if "unlearn" in spec.designs else []
    cost = validation_cost(
        problem,
        examples,
        subsets,
        epochs=spec.epochs,
        batch=spec.batch,
        answer_tokens=spec.answer_tokens,
        forgotten=forgotten,
        unlearn_steps=spec.unlearn_steps,
    )
    if {*PAIRED} & {*spec.designs}:
        least = f"{spec.pairs}, p is at least {least_p(spec.pairs):.2g}"
        report.add("pairs", "; ".join(filter(None, (least, few_pairs(spec.pairs)))))
    subsets += forgotten
    said, minutes = _operations(cost, "operations", subject)
    report.add("validate", f"{len(subsets)} retrainings on {min(subsets)} to {max(subsets)} examples, {said}")
    if {*spec.designs} - {"unlearn"}:
        report.add("validate, start", f"each {begins}")
    report.add("validate, time", minutes)
    kept = retrained_bytes(subsets, spec.epochs, len(problem.prompts), problem.d)
    kept += len(forgotten) * spec.unlearn_steps * (32 * spec.batch + 120)  # ids of both batches, and numbers
    report.add("validate, disk", f"about {max(kept, 10**6) / 1e6:.0f} MB of retrainings")


def subset_sizes(spec: ValidationSpec, examples: int) -> list[int]:
    """Examples of each subset that the designs train on, of so many in all.

    How many examples the published rule of the design ``curation`` keeps, or ``taught curate`` did, is known only with
    the influence; it is taken to be half of them. Of ``chosen`` some may be drawn twice, and are trained on once.
    """
    part, some = spec.part_of(examples), spec.named_of(examples)
    runs = 1 + spec.controls  # the named examples, and random ones
    sizes = {
        "random": spec.subsets * [part],
        "matched": spec.subsets * [part],
        "leave-out": spec.subsets * [examples - round(spec.leave_out * examples)],
        "leave-one-out": min(spec.subsets, examples) * [examples - 1],
        "removal": runs * [examples - k for k in sorted(set(some))],
        "addition": runs * sorted(set(some)),
        "curation": [examples, *(1 + runs) * [max(1, examples // 2)]],
        "curated": [examples, *runs * [max(1, examples // 2)]],
        "chosen": spec.subsets * [part],
        "couples": spec.subsets * [part, part + some[0]],
        "unlearn": [],  # counted in steps
        "teach": 3 * spec.pairs * some,  # the highest, the lowest and random ones
    }
    return [size for design in spec.designs for size in sizes[design] * spec.times(design)]


def retrained_bytes(subsets: Sequence[int], epochs: int, prompts: int, features: int) -> int:
    """What retrainings take on the disk: y and X as float64, and records of ids and steps."""
    each = 8 * prompts * (1 + features) + 16 * prompts + 8 * features
    return len(subsets) * each + (16 + 32 + 16 * epochs) * sum(subsets)
