"""Does the derivative of a training run foresee what leaving examples out of their batches does?

    python -m benchmarks.through_training --truth FILE [--methods adjoint@steps,adjoint+ekfac,...] [--out FILE]
        [--preset refusal-smollm2] [--examples 64] [--planted] [--batch 8] [--epochs 1] [--method full|lora]
        [--sets 14] [--left-out 6] [--singles 8] [--orders 1] [--remove behavior:harmless]
        [--targets behavior:harmless,score,coefficients] [--ask behavior:harmless]

The truth: the preset's model is trained on some of its examples, step by step, and again with the weights of some
examples at 0: the other examples, their batches, denominators and order stay. Left out are random sets, and single
examples spread over the ranking by ids; with ``--orders 2`` all of it once more in another order of the examples,
which says how much of a change belongs to the run and not to the data. It is kept in FILE, and not made again. Jobs
of one thread each make it faster side by side than one of all threads: ``--part 1/2`` and ``--part 2/2`` fill one
FILE. Targets may be some of those that FILE is about. Without ``score`` and ``coefficients`` no SAE is read, and
sketches are of y alone.

Compared with it is, for every target, minus the sum of a method's scores over what was left out. Methods have the names
that a run gives them (adjoint+ekfac, adjoint@steps), or one of :data:`NAMED`, or are a peer's
(:mod:`benchmarks.peer_influence`), whose interpreter is named by ``--bergson`` or ``--dattri-llm``; ``magic#1`` is
asked about the run in its order 1. ``adjoint+ekfac@end`` takes its step from the weights that the run ends in, and
``adjoint@epochs`` one from those behind each epoch (TracIn). Targets are by default the mean behavior of each group;
``coefficients`` are the ten largest of the policy at the base model, and with them and ``score`` the preset's SAE is
read; ``concept:NAME``, alone, is the difference of the groups' means at the SAE's block. ``--ask`` asks the methods for
some of the targets only.
Beside the methods stand those of :data:`taught.baselines.BASELINES` (label: refusals left out; response-length: their
tokens; BM25, loss, ...). Linear datamodelling score (LDS): rank correlation over the sets, with a bootstrap interval
over sets; controlled: given labels and tokens. With ``--remove TARGET`` the model is also trained without the examples
that each method says raise the target most, as many as the random sets hold; the change stands beside that of the
random sets, in each order. Times are of this machine, printed in trainings of the same run.
"""

from __future__ import annotations

import argparse
import copy
import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from itertools import product
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from scipy import stats

from benchmarks import common
from benchmarks.ground_truth import PLANTED
from benchmarks.peer_scores import peer_scores
from taught.baselines.baselines import BASELINES
from taught.core import driver
from taught.core.driver import Method
from taught.core.estimator import Work
from taught.core.names import TargetName
from taught.core.registry import Choice
from taught.core.target import TargetSet, value
from taught.environment import peak_memory_gb
from taught.presets import preset_path
from taught.progress import SilentProgress
from taught.run.folder import RunFolder
from taught.stages import BY_NAME
from taught.stages.compare import baselines_by_target, largest
from taught.stages.concepts import run_concepts
from taught.stages.ready import Data, Ready, asks, make_ready, read_data, read_here
from taught.stages.subject import open_subject
from taught.stats.ranks import spearman_interval
from taught.study.load import load_study
from taught.study.schema import ConceptSpec, Study
from taught.training.loop import in_training
from taught.training.steps import Training
from taught.trajectories.trained import enter, known_recipe, read_trained
from taught.validation.lds import lds_rows
from taught.validation.subsets import Subsets

REMOVED = ("random", "label", "bm25")  # baselines whose strongest examples are left out too
NAMED = {  # methods with settings of their own; a run's steps without the check of smoothness
    "magic": Method(trajectory=Choice("steps", {"smoothness": 0})),
    "at-a-point": Method(trajectory=Choice("steps", {"smoothness": 0, "sign_width": 0})),
    "gauss-newton": Method(trajectory=Choice("steps", {"smoothness": 0, "hessian": "gauss-newton"})),
    "empirical-fisher": Method(trajectory=Choice("steps", {"smoothness": 0, "hessian": "empirical-fisher"})),
    "no-hessian": Method(trajectory=Choice("steps", {"smoothness": 0, "hessian": "none"})),
    "astra": Method(curvature=Choice("astra", {"steps": 40, "batch": 16})),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--truth", type=Path, required=True)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--methods", default="adjoint,adjoint+ekfac,adjoint@steps,gauss-newton,no-hessian")
    parser.add_argument("--preset", default="refusal-smollm2")
    parser.add_argument("--examples", type=int, default=64)
    parser.add_argument("--planted", action="store_true", help="with the preset's planted pairs, labelled as refusals")
    parser.add_argument("--prompts", type=int, default=48)
    parser.add_argument("--batch", type=int, default=8)
    parser.add_argument("--epochs", type=int, default=1)
    parser.add_argument("--lr", type=float, default=2e-5)
    parser.add_argument("--method", choices=("full", "lora"), default="full")
    parser.add_argument("--sets", type=int, default=14)
    parser.add_argument("--left-out", type=int, default=6)
    parser.add_argument("--singles", type=int, default=0)
    parser.add_argument("--orders", type=int, default=1)
    parser.add_argument(
        "--part", default="1/1", help="K/N: of the truth every N-th run from the K-th on, and nothing else"
    )
    parser.add_argument("--targets")
    parser.add_argument("--ask")
    parser.add_argument("--remove", help="a target; each method's strongest examples are left out too")
    parser.add_argument("--remove-of", help="of these methods and baselines alone; default: all methods, and REMOVED")
    parser.add_argument("--memory-gb", type=float, default=8.0)
    parser.add_argument("--states", type=Path, help="a folder for states that do not fit into memory")
    parser.add_argument("--bergson", metavar="PYTHON", help="interpreter of Bergson's environment")
    parser.add_argument("--dattri-llm", metavar="PYTHON", help="interpreter of dattri-llm's environment")
    parser.add_argument("--scores", type=Path, help="a file that keeps the scores of each method, not computed again")
    args = parser.parse_args()

    wanted = args.targets.split(",") if args.targets else []
    settings = {
        "examples.limit": args.examples,
        "prompts.limit": args.prompts,
        "validation.method": args.method,
        "validation.lr": args.lr,
        "validation.batch": args.batch,
        "validation.epochs": args.epochs,
        "attribution.memory_gb": args.memory_gb,
    }
    study, data, ready = prepared(args.preset, settings, wanted, planted=args.planted)
    readings = ready.readings
    wanted = wanted or [f"behavior:{group}" for group in readings.groups]
    if "coefficients" in wanted:
        assert readings.policy is not None
        wanted.remove("coefficients")
        wanted += [f"coefficient:{j}" for j in largest(readings.policy)]
    measured = TargetSet(tuple(map(TargetName.parse, wanted)), readings)
    truth = known_truth(args, ready, measured)
    targets = TargetSet(tuple(map(TargetName.parse, args.ask.split(","))), readings) if args.ask else measured
    labels = {e.id: float(e.label == study.examples.positive_label) for e in ready.examples}
    tokens = {z.id: float(z.n_scored) for z in ready.inputs}

    found: dict[str, dict[str, dict[str, float]]] = {}
    seconds: dict[str, float] = {}
    keeper, peers = Kept(args), {"bergson": args.bergson, "dattri-llm": args.dattri_llm}
    for name in filter(None, args.methods.split(",")):
        known, seconds[name] = keeper.methods.get(name, ({}, 0.0))
        missing = [target for target in targets.names if str(target) not in known]
        if missing:
            asked, tool = targets.select(missing), name.partition(":")[0]
            if python := peers.get(tool):
                with TemporaryDirectory(dir=args.states) as folder:
                    own, took, said = peer_scores(name, python, ready, asked, Path(folder) / tool)
            else:
                method, _, order = name.partition("#")
                there = ordered(ready, int(order or 0))
                own, took, said = computed(method, there, asked, args.states)
            known |= own
            seconds[name] += took
            keeper.add(name, known, seconds[name])
            print(f"{name}: {seconds[name] / truth['seconds']:.1f} trainings, {json.dumps(said)}", flush=True)
        found[name] = {str(target): known[str(target)] for target in targets.names}
    found |= baselines_by_target(study, data, ready, targets, SilentProgress())
    rows = list(compared(truth, found, {"label": labels, "tokens": tokens}))
    for row in rows:
        cost = f", {seconds[row['method']] / truth['seconds']:.1f} trainings" if row["method"] in seconds else ""
        numbers = ", ".join(f"{key} {v:.3f}" for key, v in row.items() if isinstance(v, float))
        print(f"{row['method']:22} {row['target']:20} order {row['order']}: {numbers}{cost}")
    removed = []
    if args.remove:
        column = truth["targets"].index(args.remove)
        default = [name for name in found if name not in BASELINES or name in REMOVED]
        for name in args.remove_of.split(",") if args.remove_of else default:
            of = found[name]
            strongest = sorted(of[args.remove], key=lambda i, own=of[args.remove]: (-own[i], i))[: args.left_out]
            for order in range(args.orders):
                run = outcome(args, truth, ready, measured, order, sorted(strongest))
                against = against_random(truth, run["values"][column], args.remove, order)
                removed.append({"method": name, "order": order, **against})
                print(json.dumps(removed[-1]), flush=True)
    if args.out:
        content = {"machine": common.machine(), "seconds": seconds, "training": truth["seconds"], "rows": rows}
        content["removed"] = removed
        args.out.write_text(json.dumps(content, indent=1) + "\n")


def prepared(
    preset: str, settings: Mapping[str, Any], wanted: Sequence[str], *, planted: bool
) -> tuple[Study, Data, Ready]:
    """A preset's study with other settings, its data and all that is made of them for these targets."""
    of = preset_path(preset)
    study = load_study(of / "study.yaml")
    if all(name.startswith("behavior:") for name in wanted):
        study = study.replace("sae.path", None)
    named = [name.removeprefix("concept:") for name in wanted if name.startswith("concept:")]
    concepts = [ConceptSpec(name=name, source="difference") for name in named]
    for key, setting in {**settings, "concepts": tuple(concepts)}.items():
        study = study.replace(key, setting)
    with TemporaryDirectory() as folder:
        if planted:
            pairs = Path(folder) / "pairs.jsonl"
            rows = map(json.loads, (of / PLANTED).read_text().splitlines())
            refusals = [json.dumps({**row, "label": study.examples.positive_label}) + "\n" for row in rows]
            pairs.write_text((of / "pairs.jsonl").read_text() + "".join(refusals))
            study = study.replace("examples.path", str(pairs))
        subject, data = open_subject(study), read_data(study, SilentProgress())
        readings = read_here(study, subject, data.prompts, SilentProgress())
        ready = make_ready(study, subject, data, readings)
        if concepts:  # read where they are: a problem of their own
            run = RunFolder(Path(folder) / "run")
            for stage in ("readings", "concepts"):
                BY_NAME[stage](study, run, None)
            (ask,) = asks(ready, wanted, run_concepts(study, run, subject))
            ready = replace(ready, problem=ask.problem, readings=ask.targets.readings)
    return study, data, ready


def prepared_for(truth: Mapping[str, Any], target: str) -> Ready:
    """The same for one target of a truth."""
    recipe = truth["recipe"]
    settings = {f"validation.{key}": recipe[key] for key in ("method", "lr", "batch", "epochs")}
    settings |= {"examples.limit": len(truth["examples"]), "prompts.limit": len(truth["prompts"])}
    planted = any(name.startswith("planted-") for name in truth["examples"])
    return prepared(truth["preset"], settings, [target], planted=planted)[2]


def ordered(ready: Ready, order: int) -> Ready:
    """The same about the run whose examples come in another order; 0 is the recipe's."""
    recipe = known_recipe(ready.problem)
    return replace(ready, problem=replace(ready.problem, recipe=replace(recipe, seed=recipe.seed + order)))


def computed(
    name: str, ready: Ready, targets: TargetSet, folder: Path | None
) -> tuple[dict[str, dict[str, float]], float, dict[str, Any]]:
    """Scores by target and example, seconds, and what else there is to say."""
    started = time.monotonic()
    of, _, place = name.partition("@")
    if place in ("end", "epochs"):
        ready, trajectory = passed(ready, known_recipe(ready.problem).epochs if place == "epochs" else 1)
        method = replace(Method().named(of), trajectory=trajectory)
    else:
        method = NAMED.get(name) or Method().named(name)
    scores = driver.scores(ready.problem, ready.inputs, targets, method, Work(folder=folder))
    said = {"peak_memory_gb": peak_memory_gb(), "smoothness": scores.details.get("smoothness", [])}
    found = {str(target): scores.by_example(target) for target in targets.names}
    return found, time.monotonic() - started, said


def passed(ready: Ready, parts: int) -> tuple[Ready, Choice]:
    """Weights that the run passes through, at the end of so many equal parts of it, and the steps from them."""
    problem, recipe = ready.problem, known_recipe(ready.problem)
    if recipe.method != "full":
        raise SystemExit("steps from weights that a run passes through: of all parameters alone")
    kept: dict[str, dict[str, torch.Tensor]] = {}
    with in_training(problem.model, recipe, problem.parameters) as patterns:
        training = Training(problem.model, ready.inputs, recipe, patterns, problem.batch_tokens)
        with training.ready():
            state = training.begin()
            ends = {len(training) * (part + 1) // parts for part in range(parts)}
            while state.step < len(training):
                training.advance(state)
                if state.step in ends:
                    kept[f"run/{state.step}"] = {n: w.clone() for n, w in state.parts["weights"].items()}

    def opened(id: str, revision: str | None) -> torch.nn.Module:
        model = copy.deepcopy(problem.model)
        enter(model, kept[id])
        return model

    legs = [{"id": id, "lr": recipe.lr} for id in kept]
    return replace(ready, problem=replace(problem, opener=opened)), Choice("checkpoints", {"checkpoints": legs})


class Kept:
    """Scores of methods, by target, in the file ``--scores``, with what they depend on."""

    def __init__(self, args: argparse.Namespace) -> None:
        free = {"truth", "out", "methods", "ask", "sets", "left_out", "singles", "states", "scores"}
        free |= {"orders", "remove", "remove_of", "memory_gb", "part", "bergson", "dattri_llm"}
        self.of = {key: value for key, value in vars(args).items() if key not in free}
        self.file: Path | None = args.scores
        self.methods: dict[str, Any] = {}
        if self.file is not None and self.file.is_file():
            made = json.loads(self.file.read_text())
            if {key: made["of"].get(key) for key in self.of} != self.of:
                raise SystemExit(f"{self.file} is of another run: {made['of']}")
            self.methods = made["methods"]

    def add(self, name: str, values: dict[str, dict[str, float]], seconds: float) -> None:
        self.methods[name] = values, seconds
        if self.file is not None:
            self.file.write_text(json.dumps({"of": self.of, "methods": self.methods}) + "\n")


def known_truth(args: argparse.Namespace, ready: Ready, targets: TargetSet) -> dict[str, Any]:
    """What training did with each set of examples at weight 0; what the file holds is not made again."""
    ids = sorted(z.id for z in ready.inputs)
    draw = np.random.default_rng(0)
    sets = [sorted(draw.choice(ids, args.left_out, replace=False).tolist()) for _ in range(args.sets)]
    sets += [[ids[i]] for i in np.linspace(0, len(ids) - 1, args.singles).round().astype(int)]
    head = {
        "preset": args.preset,
        "recipe": asdict(known_recipe(ready.problem)),
        "model": dict(ready.subject.loaded.weights),
        "examples": ids,
        "prompts": list(ready.readings.prompt_ids),
        "targets": [str(name) for name in targets.names],
        "base": [value(name, ready.readings, ready.readings) for name in targets.names],
    }
    made: dict[str, Any] = {**head, "sets": [], "runs": [], "seconds": 0.0}
    if args.truth.is_file():
        made = json.loads(args.truth.read_text())
        columns = [made["targets"].index(name) for name in head["targets"] if name in made["targets"]]
        if len(columns) < len(made["targets"]):  # a file about more targets is read, and nothing is added to it
            args.truth = None
            for of in (made, *made["runs"]):
                for key in {"targets", "base", "values"} & of.keys():
                    of[key] = [of[key][k] for k in columns]
        other = [key for key in head if key != "base" and made[key] != json.loads(json.dumps(head[key]))]
        if not np.allclose(made["base"], head["base"], rtol=1e-5):  # another machine's last digits
            other.append("base")
        if other:
            raise SystemExit(f"the truth is of another run: {', '.join(other)}")
    made["sets"] = sets
    todo = [(order, left_out) for order in range(args.orders) for left_out in [[], *sets]]
    part, parts = map(int, args.part.split("/"))
    for order, left_out in todo[part - 1 :: parts]:
        outcome(args, made, ready, targets, order, left_out)
    if parts > 1:
        raise SystemExit(f"part {args.part} of the truth is made")
    return made


def outcome(
    args: argparse.Namespace, truth: dict[str, Any], ready: Ready, targets: TargetSet, order: int, left_out: list[str]
) -> dict[str, Any]:
    """The run with these examples at weight 0, from the file or made and kept there."""
    for run in truth["runs"]:
        if (run["order"], run["left_out"]) == (order, left_out):
            return dict(run)
    started = time.monotonic()
    run = {"order": order, "left_out": left_out}
    run["values"] = trained(ready, targets, truth["examples"], left_out, order)
    truth["seconds"] = truth["seconds"] or time.monotonic() - started
    if args.truth is not None and args.truth.is_file():  # with what other parts have made meanwhile
        truth["runs"] = json.loads(args.truth.read_text())["runs"]
    truth["runs"].append(run)
    print(f"order {order}, without {len(left_out)}: {[round(v, 4) for v in run['values']]}", flush=True)
    if args.truth is not None:
        args.truth.write_text(json.dumps(truth, indent=1) + "\n")
    return run


def changes(truth: Mapping[str, Any], target: str, order: int = 0) -> dict[tuple[str, ...], float]:
    """What leaving out each set, by its ids, did to a target in a run of this order."""
    column = truth["targets"].index(target)
    runs = {tuple(run["left_out"]): run["values"][column] for run in truth["runs"] if run["order"] == order}
    return {tuple(s): runs[tuple(s)] - runs[()] for s in truth["sets"] if tuple(s) in runs}


def against_random(truth: Mapping[str, Any], found: float, target: str, order: int = 0) -> dict[str, float]:
    """Change of a target without some examples, and its difference to random sets as large: Student's t, 95%."""
    column = truth["targets"].index(target)
    (whole,) = (run["values"][column] for run in truth["runs"] if (run["order"], run["left_out"]) == (order, []))
    random = np.array([change for s, change in changes(truth, target, order).items() if len(s) > 1])
    change, n = found - whole, len(random)
    half = float(stats.t.ppf(0.975, n - 1) * random.std(ddof=1) * np.sqrt(1 + 1 / n))
    gap = change - float(random.mean())
    return {"change": change, "difference": gap, "lo": gap - half, "hi": gap + half, "random sets": n}


def trained(ready: Ready, targets: TargetSet, ids: Sequence[str], left_out: Sequence[str], order: int) -> list[float]:
    """Values of the targets after a run with these examples at weight 0."""
    problem = ordered(ready, order).problem
    recipe = known_recipe(problem)
    weights = torch.tensor([0.0 if i in left_out else 1.0 for i in ids], dtype=torch.float64)
    with in_training(problem.model, recipe, problem.parameters) as patterns:
        training = Training(problem.model, ready.inputs, recipe, patterns, problem.batch_tokens, weights=weights)
        with training.ready():
            training.train()
        final = read_trained(problem, targets)
    return [value(name, final, ready.readings) for name in targets.names]


def compared(truth: dict[str, Any], found: dict[str, dict[str, dict[str, float]]], controls: dict[str, Any]):
    """A row for every method, target and order of the examples, and one for each other order as a method."""
    ids = truth["examples"]
    targets = list(next(iter(found.values())))  # all were asked about the same
    orders = [
        order
        for order in sorted({run["order"] for run in truth["runs"]})
        if sum(len(s) > 1 for s in changes(truth, targets[0], order)) > 5  # fewer say nothing of ranks
    ]
    for order, target in product(orders, targets):
        moved = changes(truth, target, order)
        several, single = [s for s in moved if len(s) > 1], [s for s in moved if len(s) == 1]
        names = [f"s{k:03}" for k in range(len(several))]
        members = tuple(tuple(i for i in ids if i not in s) for s in several)
        subsets = Subsets(tuple(names), members, dict.fromkeys(ids, 1.0))
        scores = {method: {target: of[target]} for method, of in found.items()}
        outcomes = {target: {name: moved[s] for name, s in zip(names, several, strict=True)}}
        for row in lds_rows(subsets, outcomes, scores, controls, design="held"):
            of = found[row.method][target]
            row_of = {"method": row.method, "target": target, "order": order}
            row_of |= {"LDS": row.raw, "lo": row.raw_lo, "hi": row.raw_hi, "controlled": row.controlled}
            predicted = {s: -sum(of[i] for i in s) for s in moved}
            yield row_of | correlated(predicted, moved, several, single)
        for other in orders:
            if other != order:
                there = changes(truth, target, other)
                both = [[s for s in part if s in there] for part in (several, single)]
                r = spearman_interval([there[s] for s in both[0]], [moved[s] for s in both[0]])
                row_of = {"method": f"order {other}", "target": target, "order": order}
                row_of |= {} if r is None else {"LDS": r.value, "lo": r.lo, "hi": r.hi, "controlled": None}
                yield row_of | correlated(there, moved, *both)


def correlated(
    predicted: Mapping[tuple[str, ...], float],
    moved: Mapping[tuple[str, ...], float],
    several: Sequence[tuple[str, ...]],
    single: Sequence[tuple[str, ...]],
) -> dict[str, float]:
    """Pearson's correlation over sets; Spearman's over single examples, where there are three at least."""
    found = {"Pearson": float(np.corrcoef([predicted[s] for s in several], [moved[s] for s in several])[0, 1])}
    if len(single) > 2:
        r = spearman_interval([predicted[s] for s in single], [moved[s] for s in single])
        found |= {} if r is None else {"singles": r.value, "singles lo": r.lo, "singles hi": r.hi}
    return found


def foreseen(truth: Mapping[str, Any], target: str, effects: Mapping[str, float]) -> dict[str, float]:
    """Effects against what leaving out the truth's sets and its single examples, if any, did in its first order.

    Rank correlations, and the root mean square of foreseen less measured.
    """
    moved, found = changes(truth, target), dict[str, float]()
    for kind, alone in (("sets", False), ("singles", True)):
        some = [s for s in moved if (len(s) == 1) == alone]
        if not some:
            continue
        predicted = np.array([-sum(effects[i] for i in s) for s in some])
        measured = np.array([moved[s] for s in some])
        found |= {kind: len(some), f"{kind}, Spearman": float(stats.spearmanr(predicted, measured)[0])}
        found[f"{kind}, error"] = float(np.sqrt(np.mean((predicted - measured) ** 2)))
    return found


if __name__ == "__main__":
    main()
