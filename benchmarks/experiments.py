"""Planted examples among others: which method finds them, and what leaving them out does.

    python -m benchmarks.experiments --experiment style --share 50    # goes on where it was stopped
    python -m benchmarks.experiments --plot                           # pictures of all results

Concept methods, the policy's score, plain influence and baselines on one set of examples, a tenth or
half of which are planted. benchmarks/README.md says what the columns mean and how long it takes.
Scores: high means that training on the example raises the behavior.
"""

from __future__ import annotations

import argparse
import json
import shutil
import sys
from collections import Counter
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import cached_property, partial
from itertools import combinations
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from rich.console import Console
from rich.table import Table

from benchmarks.common import RESULTS, Clock, Results, Row, console, kept, run
from benchmarks.experiment_pictures import picture
from taught.data.columns import name_ids
from taught.data.examples import ExampleSet, load_examples
from taught.environment import mark_memory, peak_memory_gb, return_freed_memory
from taught.errors import UserError
from taught.presets import preset_path
from taught.progress import Progress, RichProgress
from taught.run import files
from taught.run.code import code_version
from taught.run.fingerprint import fingerprint
from taught.run.folder import RunFolder
from taught.stages import BY_NAME
from taught.stats.auc import auc, precision_at_k
from taught.stats.intervals import Interval
from taught.stats.multiplicity import holm
from taught.stats.ranks import ranks, spearman, spearman_interval
from taught.study.load import load_study
from taught.study.schema import Study
from taught.validation.curves import LEAST_RUNS, Plan, compare_curves, plan_curve

if TYPE_CHECKING:
    from taught.stages.concepts import Read
    from taught.stages.ready import Ready
    from taught.training.retrain import Retrainer, Retraining

EXPERIMENTS = ("over-refusal", "style", "brand")
SHARES = {10: "pairs-10.jsonl", 50: "pairs.jsonl"}
TRAINING = {
    "validation.trainer": "loop",
    "validation.method": "full",
    "validation.optimizer": "adamw",
    "validation.lr": 2e-5,
    "validation.epochs": 1,
    "validation.batch": 4,
}
OWN_TOKENS = 32
KEPT_SHARE = 0.25
DISAGREE = 0.5
DRAWS = 9999
BASELINES = ("random", "response-length", "label", "loss", "gradient-norm", "bm25", "similarity", "gradient-cosine")
# What examples are left out or kept by, fixed before anything was seen.
BY = (
    "gradient-concept+adam",
    "gradient-concept+ekfac",
    "vector-filter",
    "projection-difference-response",
    "projection-difference-training",
    "smda-score",
    "mean-y+adam",
)
ORACLE = "planted"
Scores = dict[str, float]


@dataclass(frozen=True, eq=False)
class Bench:
    """One experiment, opened.

    Attributes
    ----------
    run : its readings, policy and concepts
    ready : the examples as tokens, the policy, and the problem that estimators work on
    concepts : "difference" (of means) and "probe" (logistic), from rows that are neither examples
        nor prompts
    trainer : trains on subsets of the examples, and keeps what it has trained
    planted : ids of the planted examples
    folder : of everything that is kept between two calls
    """

    run: RunFolder
    ready: Ready
    concepts: Mapping[str, Read]
    trainer: Retrainer
    planted: frozenset[str]
    folder: Path
    progress: Progress

    @property
    def study(self) -> Study:
        """The study, with its concepts."""
        return self.ready.study

    @property
    def ids(self) -> list[str]:
        """Ids of the examples, in the order of every method's values."""
        return [example.id for example in self.ready.inputs]

    @property
    def groups(self) -> Mapping[str, Sequence[str]]:
        """Group -> ids of its prompts."""
        return self.ready.readings.groups

    @property
    def leak(self) -> str:
        """The group of prompts on which the behavior was not asked for."""
        return self.study.prompts.sides[1]

    @cached_property
    def key(self) -> str:
        """Digest of what the scores depend on."""
        from taught.sketches.store import example_digest

        examples = [[example.id, example_digest(example)] for example in self.ready.inputs]
        concepts = {name: read.concept.direction.tolist() for name, read in self.concepts.items()}
        return fingerprint(
            {
                **self.trainer.identity,
                "recipe": asdict(self.trainer.recipe),
                "examples": examples,
                "concepts": concepts,
                "all code": code_version(),
                "attribution": self.study.to_dict()["attribution"],
            }
        )


# --- opening --------------------------------------------------------------------------------------


def measure(args: argparse.Namespace) -> None:
    """Score, compare, retrain; write the result."""
    study, folder = experiment_study(args.study or f"{args.experiment}-smollm2", args.share)
    name = f"experiment_{args.experiment}_{args.share}"
    for key, value in (("prompts.limit", args.prompts), ("examples.limit", args.examples)):
        if value is not None:
            study, name = study.replace(key, value), f"{name.removesuffix('-trial')}-trial"
    with RichProgress(console) as progress:
        bench = opened(with_concepts(study, folder / "concept.jsonl"), args.work / name, progress)
        results = Results(name, conditions(bench, args.share), args.out)
        with kept(results, _COLUMNS):
            score(bench, results)
            compare_scores(bench, results)
            retrain(bench, results)
    show(results, bench.leak)


def experiment_study(study: str, share: int) -> tuple[Study, Path]:
    """The study with the examples of this share and the recipe of the experiments; its folder."""
    file = Path(study)
    folder = file.parent if file.suffix == ".yaml" else preset_path(study)
    made = load_study(study).replace("examples.path", str((folder / SHARES[share]).resolve()))
    for key, value in TRAINING.items():
        made = made.replace(key, value)
    return made, folder


def with_concepts(study: Study, file: Path) -> Study:
    """The study with directions from rows without the behavior to rows with it, over mean response tokens.

    Their target is read before answers to the leak group. Both are used whatever their quality, which
    stands in their cards.
    """
    both = {"examples": str(file.resolve()), "position": "last_prompt", "group": study.prompts.sides[1], "force": True}
    concepts = [{"name": source, "source": source, **both} for source in ("difference", "probe")]
    return study.replace("concepts", concepts).replace("attribution.max_new_tokens", OWN_TOKENS)


def opened(study: Study, folder: Path, progress: Progress) -> Bench:
    """The policy, the concepts and what trains; everything but the scores.

    Raises
    ------
    UserError
        An example is not marked as planted or not, all are or none; rows of the concept are examples or
        prompts of the study, or have other labels; what the stages refuse.
    """
    from taught.stages.concepts import run_concepts
    from taught.stages.ready import prepare, read_data
    from taught.stages.subject import open_subject
    from taught.training.recipe import Recipe
    from taught.training.retrain import Retrainer

    planted = planted_ids(load_examples(study.examples.path))
    run_folder = RunFolder(folder / "policy", fresh=("readings",))
    for name in ("readings", "policy", "concepts"):
        BY_NAME[name](study, run_folder, progress)
    subject = open_subject(study)
    ready = prepare(study, run_folder, subject, read_data(study, progress))
    concepts = {read.name: read for read in run_concepts(study, run_folder, subject)}
    trainer = Retrainer(
        ready.problem,
        ready.inputs,
        Recipe.of(study.validation),
        folder / "retrained",
        weights=subject.loaded.weights,
        tokenizer=subject.loaded.tokenizer,
        progress=progress,
    )
    here = frozenset(planted & {example.id for example in ready.inputs})
    return Bench(run_folder, ready, concepts, trainer, here, folder, progress)


def planted_ids(examples: ExampleSet) -> set[str]:
    """Ids of the examples that the column ``planted`` marks.

    Raises
    ------
    UserError
        An example has no mark, or the marks are all the same.
    """
    marks = {example.id: example.flags.get(ORACLE) for example in examples}
    unmarked = [i for i, mark in marks.items() if not isinstance(mark, bool)]
    found = {i for i, mark in marks.items() if mark is True}
    if unmarked or not 0 < len(found) < len(marks):
        raise UserError(
            "the planted examples are not known",
            value=name_ids(unmarked) or f"{len(found)} of {len(marks)} are planted",
            rule=f"the column {ORACLE} is true or false for every example, and both occur",
            fix=f"add the column {ORACLE} to the examples",
        )
    return found


def conditions(bench: Bench, share: int) -> Row:
    """What a reader must know to repeat or to doubt the numbers."""
    study, problem, policy = bench.study, bench.ready.problem, bench.run.read_json("policy")
    return {
        "study": study.name,
        "share": share,
        "examples": len(bench.ids),
        "planted": len(bench.planted),
        "prompts": {group: len(ids) for group, ids in bench.groups.items()},
        "leak_group": bench.leak,
        **asdict(problem.behavior),
        "block": problem.point.block,
        "features": problem.d,
        "policy_r2": policy["r2"],
        "dtype": study.model.dtype,
        "device": study.model.device,
        "weights": bench.ready.subject.loaded.weights.get("source"),
        "recipe": asdict(bench.trainer.recipe),
        "own_tokens": OWN_TOKENS,
        "random_subsets": LEAST_RUNS,
        "truncated": bench.ready.truncated,
        "data": {Path(file).name: files.sha256_file(Path(file)) for file in (study.examples.path, study.prompts.path)}
        | {"concept": bench.concepts["difference"].concept.provenance["examples sha256"]},
    }


# --- methods --------------------------------------------------------------------------------------

# The gradient methods' targets, and what their names say of the metric that inner products are in.
GRADIENTS = {"gradient-concept": "concept:difference", "smda-score": "score", "mean-y": "behavior:{leak}"}
CURVATURES = ("", "+adam", "+ekfac")


def by_gradient(bench: Bench, target: str, curvature: str = "") -> Any:
    """Effect of each example on a target."""
    from taught.core import driver
    from taught.core.estimator import Work
    from taught.stages.ready import asks

    target = target.format(leak=bench.leak)
    (ask,) = asks(bench.ready, [target], [bench.concepts["difference"]])
    method = bench.ready.method.named(f"adjoint{curvature}")
    return driver.scores(ask.problem, bench.ready.inputs, ask.targets, method, Work(bench.progress))[target]


def _projected(bench: Bench, method: str, concept: str = "difference", study: Study | None = None) -> Any:
    from taught.stages.concepts import concept_method_scores

    study = (study or bench.study).replace("attribution.concept_methods", [method])
    subject, inputs, read = bench.ready.subject, bench.ready.inputs, bench.concepts[concept]
    (made,) = concept_method_scores(study, subject, bench.run, inputs, [read], bench.progress)
    return made[f"concept:{concept}"]


def _training(bench: Bench) -> Any:
    """Trains on all examples for a checkpoint, which is deleted at the end: its training counts."""
    folder = bench.folder / f"checkpoint-{bench.key[:12]}"
    bench.trainer.run(bench.ids, keep=folder)
    study = bench.study.replace("attribution.checkpoint", str((folder / "epoch-1").resolve()))
    values = _projected(bench, "projection-difference-training", study=study)
    shutil.rmtree(folder)
    return values


def _baseline(bench: Bench, name: str) -> Any:
    from taught.baselines.baselines import Texts, baseline_scores

    ready = bench.ready
    marked = Counter(example.label for example in ready.examples if example.id in bench.planted)
    texts = Texts(
        {example.id: f"{example.prompt}\n{example.response}" for example in ready.examples},
        {prompt.id: prompt.text for prompt in ready.data.prompts},
        {example.id: example.label for example in ready.examples},
        marked.most_common(1)[0][0],  # a label is the topic of an example, not whether it is planted
    )
    groups = {bench.leak: bench.groups[bench.leak]}
    (made,) = baseline_scores(ready.problem, ready.inputs, groups, texts, names=[name])
    return made.values


METHODS: dict[str, Callable[[Bench], Any]] = {
    **{
        f"{name}{curvature}": partial(by_gradient, target=target, curvature=curvature)
        for name, target in GRADIENTS.items()
        for curvature in CURVATURES
    },
    "vector-filter": partial(_projected, method="vector-filter"),
    "vector-filter-probe": partial(_projected, method="vector-filter", concept="probe"),
    "projection-difference-response": partial(_projected, method="projection-difference-response"),
    "projection-difference-training": _training,
    **{name: partial(_baseline, name=name) for name in BASELINES},
}


def score(bench: Bench, results: Results) -> None:
    """A row for each method with the score of every example; what was scored before is read."""
    for name, method in METHODS.items():
        file = bench.folder / "scores" / f"{name}.json"
        found = json.loads(file.read_bytes()) if file.exists() else {}
        if found.get("key") != bench.key:
            bench.progress.step(name)
            return_freed_memory()  # of the method before
            mark_memory()
            with Clock() as clock:
                values = np.asarray(method(bench), dtype=np.float64)
            found = {
                "key": bench.key,
                "seconds": clock.seconds,
                "memory_gb": peak_memory_gb(recent=True),
                "scores": dict(zip(bench.ids, values.tolist(), strict=True)),
            }
            file.parent.mkdir(parents=True, exist_ok=True)
            files.write_bytes(file, files.json_bytes(found))
        results.add({"method": name, **{k: v for k, v in found.items() if k != "key"}})


# --- against the planted examples --------------------------------------------------------------------


def compare_scores(bench: Bench, results: Results) -> None:
    """Into the rows: AUC and precision on the planted examples, and rank correlations."""
    of = {row["method"]: row["scores"] for row in results.rows}
    p = [chance(scores, bench.planted) for scores in of.values()]
    for row, one, adjusted in zip(results.rows, p, holm(p), strict=True):
        score, planted = list(row["scores"].values()), [i in bench.planted for i in row["scores"]]
        found = auc(score, planted)
        row |= {
            "auc": found.value,
            "auc_lo": found.lo,
            "auc_hi": found.hi,
            "p": one,
            "p_holm": float(adjusted),
            "precision": precision_at_k(score, planted, len(bench.planted)),
            "correlation": {name: _correlation(row["scores"], scores) for name, scores in of.items()},
        }
    cards = {name: read.concept.card for name, read in bench.concepts.items()}
    results.summary |= {
        "concept_auc": {name: card["auc"]["value"] for name, card in cards.items()},
        "disagree": disagreements(results.rows),
    }
    results.conditions["concepts"] = cards
    results.write(complete=False)


def chance(scores: Scores, planted: Collection[str], seed: int = 0) -> float:
    """Two-sided p of an AUC of .5: the rank sum of the planted ids among random ids as many."""
    ids = sorted(scores)
    rank = ranks([scores[i] for i in ids])
    inside = np.array([i in planted for i in ids])
    m = int(inside.sum())
    drawn = np.random.default_rng(seed).permuted(np.tile(rank, (DRAWS, 1)), axis=1)[:, :m].sum(1)
    middle = m * (len(ids) - 1) / 2
    as_far = np.abs(drawn - middle) >= abs(rank[inside].sum() - middle) - 1e-9
    return (1 + int(as_far.sum())) / (1 + DRAWS)


def _correlation(a: Scores, b: Scores) -> float:
    return spearman(list(a.values()), [b[i] for i in a])


def disagreements(rows: Sequence[Row]) -> dict[str, Interval]:
    """Two methods that examples are left out by -> their rank correlation where low, lowest first.

    With a 95% interval over examples: only one that ends below ``DISAGREE`` says that they disagree.
    """
    shown = [row for row in rows if row["method"] in BY]
    found = {
        f"{a['method']} | {b['method']}": spearman_interval(
            list(a["scores"].values()), [b["scores"][i] for i in a["scores"]]
        )
        for a, b in combinations(shown, 2)
    }
    low = [(names, r) for names, r in found.items() if r is not None and r.value < DISAGREE]
    return dict(sorted(low, key=lambda item: item[1].value))


# --- retraining -----------------------------------------------------------------------------------


def plans(bench: Bench, scores: Mapping[str, Scores]) -> dict[str, dict[str, Plan]]:
    """Way (drop, keep) -> method -> what is to be trained.

    drop: all examples but the k with the highest scores, k the number of planted ones. keep: the
    quarter with the lowest scores alone. The random sets are the same for every method.
    """
    quarter = max(1, round(KEPT_SHARE * len(bench.ids)))
    lowest = {name: {i: -v for i, v in of.items()} for name, of in scores.items()}
    return {
        "drop": {name: plan_curve(of, [len(bench.planted)], kind="remove", method=name) for name, of in scores.items()},
        "keep": {name: plan_curve(of, [quarter], kind="add", method=name) for name, of in lowest.items()},
    }


def retrain(bench: Bench, results: Results) -> None:
    """Into the rows: what training without a method's highest, and on its lowest, does.

    A row for the planted column itself, the oracle, comes last. Mean y of both groups by each set
    against the random sets; p is corrected over the methods, for each group and way.
    """
    results.add({"method": ORACLE, "scores": {i: float(i in bench.planted) for i in bench.ids}})
    by = {row["method"]: row for row in results.rows if row["method"] in (*BY, ORACLE)}
    todo = plans(bench, {name: row["scores"] for name, row in by.items()})
    before, after = bench.trainer.base(), bench.trainer.run(bench.ids)
    of_all = {"base": before, "all examples": after}
    results.summary["mean_y"] = {name: _means(bench, made) for name, made in of_all.items()}
    models: dict[str, Retraining] = {before.key: before, after.key: after}
    for way, by_method in todo.items():
        bench.progress.step(f"{way}: {len(by_method) + LEAST_RUNS} retrainings")
        for name, plan in by_method.items():
            made = {
                subset: bench.trainer.run(ids)
                for subset, ids in zip(plan.subsets.names, plan.subsets.members, strict=True)
            }
            models |= {model.key: model for model in made.values()}
            by[name][way] = _outcomes(bench, plan, made)
            results.write(complete=False)
        for group in bench.groups:
            rows = [by[name][way][group] for name in by_method]
            for row, p in zip(rows, holm([row["p"] for row in rows]), strict=True):
                row["p_holm"] = float(p)
        controls = [_means(bench, made[names[0]]) for names in plan.controls]
        results.summary[f"{way}, random"] = {group: [means[group] for means in controls] for group in bench.groups}
    trained = [model.seconds_training + model.seconds_reading for model in models.values()]
    results.summary["retrainings"] = {"n": len(models) - 1, "seconds": sum(trained)}


def _values(bench: Bench, model: Retraining, group: str) -> np.ndarray:
    """y of the prompts of a group."""
    y = dict(zip(model.prompt_ids, model.y.tolist(), strict=True))
    return np.array([y[i] for i in bench.groups[group]])


def _means(bench: Bench, model: Retraining) -> dict[str, float]:
    return {group: float(_values(bench, model, group).mean()) for group in bench.groups}


def _outcomes(bench: Bench, plan: Plan, made: Mapping[str, Retraining]) -> dict[str, Row]:
    """Group -> mean y by the method's set and the random ones, their difference and interval."""
    found = {}
    for group in bench.groups:
        chosen = _values(bench, made[plan.chosen[0]], group)[None, None]
        controls = np.stack([_values(bench, made[n[0]], group)[None] for n in plan.controls])
        (point,) = compare_curves(plan, chosen, controls).points
        found[group] = asdict(point)
    return found


# --- shown ----------------------------------------------------------------------------------------


def show(results: Results, leak: str) -> None:
    """Print correlations and retrainings, on standard output."""
    out = Console(width=None if sys.stdout.isatty() else 160)
    rows = [row for row in results.rows if row["method"] not in (*BASELINES, ORACLE)]
    table = Table(title="rank correlation between methods", title_justify="left")
    table.add_column("")
    for number in range(len(rows)):
        table.add_column(str(number + 1), justify="right")
    for number, row in enumerate(rows, 1):
        cells = (f"{row['correlation'][other['method']]:.2f}" for other in rows)
        table.add_row(f"{number} {row['method']}", *cells)
    out.print(table)
    for way in ("drop", "keep"):
        table = Table(title=f"{way}: mean y, and its difference to random examples", title_justify="left")
        table.add_column("by")
        shown = [row for row in results.rows if way in row]
        groups = sorted(shown[0][way], key=lambda group: group != leak)
        for group in groups:
            table.add_column(group, justify="right")
        for row in shown:
            table.add_row(row["method"], *(_point(row[way][group]) for group in groups))
        out.print(table)


def _point(of: Row) -> str:
    ends = f"[{of['lo']:+.2f}, {of['hi']:+.2f}]"
    return f"{of['method']:.2f}; {of['difference']:+.2f} {ends} p {of['p_holm']:.3f}"


def _text(row: Row, key: str, digits: int) -> str:
    return "" if row.get(key) is None else f"{row[key]:.{digits}f}"


_COLUMNS = {
    "method": lambda row: row["method"],
    "AUC": lambda row: "" if "auc" not in row else f"{row['auc']:.2f} [{row['auc_lo']:.2f}, {row['auc_hi']:.2f}]",
    "p (Holm)": lambda row: _text(row, "p_holm", 4),
    "precision": lambda row: _text(row, "precision", 2),
    "s": lambda row: _text(row, "seconds", 1),
    "GB": lambda row: _text(row, "memory_gb", 2),
}


def plot(args: argparse.Namespace) -> None:
    """A picture beside each result; which methods disagree is printed."""
    for file in sorted(args.out.glob("experiment_*.json")):
        record = json.loads(file.read_text())
        if not record["complete"]:
            console.print(f"left out, not complete: {file.name}")
            continue
        files.write_bytes(file.with_suffix(".svg"), picture(record, BASELINES).encode())
        console.print(f"written: {file.with_suffix('.svg')}", highlight=False)
        for names, (r, lo, hi) in disagreements(record["rows"]).items():
            said = "disagree" if hi < DISAGREE else "may disagree"
            console.print(f"  {said}: {names} {r:.2f} [{lo:.2f}, {hi:.2f}]", highlight=False)


def main() -> None:
    """Parse the flags; measure or plot."""
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--experiment", choices=EXPERIMENTS)
    flags.add_argument("--share", type=int, choices=SHARES, help="percent of planted examples")
    flags.add_argument("--plot", action="store_true", help="draw the results that are there")
    flags.add_argument("--study", help="a study file in place of the preset")
    flags.add_argument("--prompts", type=int, help="at most so many prompts, as a trial")
    flags.add_argument("--examples", type=int, help="at most so many examples, as a trial")
    flags.add_argument("--work", type=Path, default=Path("runs/experiments"), help="folder of scores and retrainings")
    flags.add_argument("--out", type=Path, default=RESULTS, help="folder of the result")
    args = flags.parse_args()
    if not args.plot and None in (args.experiment, args.share):
        flags.error("--experiment and --share say what is to be run")
    run(plot if args.plot else measure, args)


if __name__ == "__main__":
    main()
