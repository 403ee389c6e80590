"""Which method foresaw what retraining did: estimators, curvatures, baselines on one truth.

    python -m benchmarks.lds                           # on benchmarks/ground_truth/short

Nothing is trained here: what training did stands in the data set (``benchmarks.ground_truth``).
Targets: the score, the mean y of both groups, the ten largest coefficients. benchmarks/README.md
says what the columns mean.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path
from statistics import median
from time import monotonic
from typing import Any

import numpy as np
import pyarrow.parquet as pq

from benchmarks.common import Results, Row, Setting, _opened, console, cotangents, kept, run
from benchmarks.ground_truth import DATA, REGIMES, ground_truth_study
from taught.environment import mark_memory, peak_memory_gb
from taught.errors import UserError
from taught.progress import RichProgress, SilentProgress
from taught.stages.comparing import truths
from taught.target import Target, coefficient_targets, mean_y_target, score_targets
from taught.validation.lds import (
    auc,
    differences,
    explained_by_trivial,
    lds_rows,
    precision_at_k,
)
from taught.validation.outcomes import TargetName

COEFFICIENTS = 10
AT_ONCE = 4  # query gradients in memory
TRIVIAL = ("response-length", "loss", "label")
Scores = dict[str, dict[str, dict[str, float]]]


def measure(args: argparse.Namespace) -> None:
    """Compute every method's influence, compare it with the data set, write the result."""
    with RichProgress(console) as progress, tempfile.TemporaryDirectory() as temporary:
        folder = args.data / args.regime
        setting = _opened(ground_truth_study(Path(temporary), args.regime), progress)
        targets = _targets(setting)
        results = Results(f"lds_{args.regime}", {
            "study": setting.study.name, "prompts": len(setting.problem.prompts),
            "pairs": len(setting.pairs), "features": setting.policy.d, "targets": list(targets),
            "data": json.loads((folder / "made.json").read_text())["sha256"],
        }, args.out)  # fmt: skip
        scores: Scores = {}
        costs: dict[str, Row] = {}
        for name, compute in METHODS.items():
            if name in args.methods:
                progress.step(name)
                with _costed(name, costs):
                    scores[name] = compute(setting, targets, Path(temporary))
        if args.run is not None:
            own, found = _of_run(args.run, setting, targets)
            scores[own] = found
        progress.step("baselines")
        with _costed("all baselines", costs):
            baselines = _baselines(setting, targets)
        progress.step("intervals")
        with kept(results, _COLUMNS):
            _compare(setting, folder, targets, scores, baselines, results)
            results.summary |= {"costs": costs, **_medians(results.rows)}


@contextmanager
def _costed(name: str, costs: dict[str, Row]) -> Iterator[None]:
    mark_memory()
    started = monotonic()
    yield
    costs[name] = {"seconds": monotonic() - started, "memory_gb": peak_memory_gb(recent=True)}


def _targets(setting: Setting) -> dict[str, list[Target]]:
    """Name of the target -> its pathways."""
    policy, groups = setting.policy, setting.groups
    order = np.argsort(-np.abs(policy.coef), kind="stable")[:COEFFICIENTS]
    return {
        "score": score_targets(policy),
        **{f"mean_y:{group}": [mean_y_target(policy.prompt_ids, groups, group)]
           for group in dict.fromkeys(groups)},
        **{f"coefficient:{k}": coefficient_targets(policy, k)
           for k in policy.feature_ids[order].tolist()},
    }  # fmt: skip


# --- methods --------------------------------------------------------------------------------------

Targets = dict[str, list[Target]]


def _adjoint(setting: Setting, targets: Targets, _: Path, *, adam: bool = False) -> Any:
    """Total effect on every target: pathways are summed before the gradient is taken."""
    import torch

    from taught.attribution.adjoint import target_effects
    from taught.attribution.curvature import with_adam

    problem = setting.problem
    if adam:
        spec = setting.study.attribution
        problem = with_adam(problem, setting.pairs, moments=None, eps=spec.adam_eps)
    found = {}
    names = list(targets)
    for start in range(0, len(names), AT_ONCE):
        some = names[start : start + AT_ONCE]
        parts = [cotangents(targets[name], setting.policy) for name in some]
        A = np.stack([part[0].sum(0).numpy() for part in parts])
        B = np.stack([part[1].sum(0).numpy() for part in parts])
        effects, _losses = target_effects(
            problem, setting.pairs, torch.from_numpy(A), torch.from_numpy(B)
        )
        for name, values in zip(some, effects.T.tolist(), strict=True):
            found[name] = _by_pair(setting, values)
    return found


def _sketch(setting: Setting, targets: Targets, folder: Path, *, solved: bool = False) -> Any:
    """The same from sketches of the default size, in the plain metric or autocorrelation's."""
    from taught.attribution.ask import ask, policy_queries
    from taught.attribution.autocorrelation import fit_autocorrelation
    from taught.attribution.fill import fill_pairs, fill_prompts, pair_row, prompt_key
    from taught.model.projection import Projection
    from taught.store import SketchStore

    problem, policy = setting.problem, setting.policy
    projection = Projection(problem.model, setting.study.sketch.size, 0)
    store = SketchStore(folder / "sketches", projection.record())
    store.prepare()
    silent = SilentProgress()
    fill_prompts(store, problem, projection, progress=silent)
    fill_pairs(store, problem, projection, setting.pairs, progress=silent)
    digests = dict(prompt_key(prompt) for prompt in problem.prompts)
    groups: dict[str, list[str]] = {}
    for prompt, group in zip(problem.prompts, setting.groups, strict=True):
        groups.setdefault(group, []).append(prompt.id)
    made, _ = policy_queries(store, policy, groups, digests)
    columns = {"score": made.few[:, 0] + made.few[:, 1]}
    columns |= {f"mean_y:{g}": made.few[:, 2 + n] for n, g in enumerate(made.groups)}
    for j, k in enumerate(policy.feature_ids.tolist()):
        columns[f"coefficient:{k}"] = made.x[:, j] + made.y[:, j]
    queries = np.stack([columns[name] for name in targets], 1)
    rows = [pair_row(pair) for pair in setting.pairs]
    if solved:
        queries = fit_autocorrelation(store, rows).solve(queries)
    values = -problem.lr * ask(store, rows, queries).values
    return {name: _by_pair(setting, values[:, n]) for n, name in enumerate(targets)}


METHODS: dict[str, Callable[[Setting, Targets, Path], Any]] = {
    "adjoint": _adjoint,
    "adjoint+adam": lambda *all_: _adjoint(*all_, adam=True),
    "sketch": _sketch,
    "sketch+autocorrelation": lambda *all_: _sketch(*all_, solved=True),
}


def _of_run(folder: Path, setting: Setting, targets: Targets) -> tuple[str, Any]:
    """The influence of a finished run on the same study, and what its method is called."""
    from taught.run import RunFolder
    from taught.stages.retraining import influence_of

    opened = RunFolder.open(folder)
    spec, found = opened.manifest["study"]["attribution"], influence_of(opened)
    name = str(spec["estimator"])
    name += "" if spec["curvature"] == "identity" else f"+{spec['curvature']}"
    by_name = {
        target: found[TargetName(parts[0].kind, parts[0].feature_id, parts[0].group)]
        for target, parts in targets.items()
    }
    ids = {pair.id for pair in setting.pairs}
    if any(set(values) != ids for values in by_name.values()):
        raise UserError("the run is of other pairs", value=str(folder),
                        fix="name a run folder of the ground truth")  # fmt: skip
    return name, by_name


def _baselines(setting: Setting, targets: Targets) -> Scores:
    """Baselines about a group stand for its mean y; for other targets, the positive group's."""
    from taught.attribution.baselines import Texts, baseline_scores
    from taught.setup import study_prompts

    prompts = setting.problem.prompts
    groups: dict[str, list[str]] = {}
    for prompt, group in zip(prompts, setting.groups, strict=True):
        groups.setdefault(group, []).append(prompt.id)
    texts = Texts(
        {row.id: f"{row.prompt}\n{row.response}" for row in setting.pair_rows},
        {row.id: row.text for row in study_prompts(setting.study)},
        {row.id: row.label for row in setting.pair_rows},
        "harmful-refusal",
    )
    found: Scores = {}
    for made in baseline_scores(setting.problem, setting.pairs, groups, texts):
        for name, (target, *_) in targets.items():
            group = target.group or setting.study.prompts.positive_group
            if made.group in (None, group):
                values = dict(zip(made.pair_ids, made.values.tolist(), strict=True))
                found.setdefault(made.baseline, {})[name] = values
    return found


def _by_pair(setting: Setting, values: Sequence[float]) -> dict[str, float]:
    return {p.id: float(v) for p, v in zip(setting.pairs, values, strict=True)}


# --- against the ground truth ---------------------------------------------------------------------


def _compare(
    setting: Setting,
    folder: Path,
    targets: Targets,
    scores: Scores,
    baselines: Scores,
    results: Results,
) -> None:
    every = {**scores, **baselines}
    length = {pair.id: float(pair.n_response) for pair in setting.pairs}
    label = {row.id: row.label for row in setting.pair_rows}
    indicators = {
        f"label {name}": {i: float(of == name) for i, of in label.items()}
        for name in sorted(set(label.values()))
    }
    planted = {row.id for row in setting.pair_rows if row.flags.get("planted")}
    gaps: list[Any] = []
    trivial: list[Any] = []
    inclusion = json.loads((folder / "validation.json").read_text())["inclusion"]
    tables = [pq.read_table(folder / f"{name}.parquet") for name in ("subsets", "outcomes")]
    names = {TargetName(p.kind, p.feature_id, p.group): name for name, (p, *_) in targets.items()}
    for truth in truths(*tables, inclusion, names):
        design, subsets = truth.design, truth.subsets
        wanted = {name: truth.outcomes[name] for name in targets}
        controls = {"response-length": length, **({} if design == "matched" else indicators)}
        for row in lds_rows(subsets, wanted, every, controls, design=design):
            results.add(asdict(row))
        others = [name for name in scores if name != "adjoint+adam"]
        if "adjoint+adam" in scores:
            gaps += differences(subsets, wanted, scores, [("adjoint+adam", o) for o in others],
                                design=design)  # fmt: skip
        plain = {name: baselines[name]["score"] for name in TRIVIAL}
        trivial += explained_by_trivial(subsets, wanted, scores, plain, design=design)
    target = f"mean_y:{setting.study.prompts.negative_group}"
    results.summary["planted"] = {
        method: {**asdict(auc(of[target], planted)),
                 "precision": precision_at_k(of[target], planted, len(planted))}
        for method, of in every.items() if target in of
    }  # fmt: skip
    results.summary["differences"] = [asdict(gap) for gap in gaps]
    results.summary["explained_by_trivial"] = [asdict(row) for row in trivial if row.explained]


def _medians(rows: Sequence[Row]) -> Row:
    """Design and method -> median over the ten coefficients of the LDS, raw and controlled."""
    found: dict[str, Row] = {}
    for row in rows:
        if row["target"].startswith("coefficient"):
            name = f"{row['subsets']}, {row['method']}"
            of = found.setdefault(name, {"raw": [], "controlled": []})
            for kind, values in of.items():
                values.append(row[kind])
    return {"coefficients, median": {
        key: {name: median(values) for name, values in of.items()} for key, of in found.items()
    }}  # fmt: skip


def _ends(row: Row, name: str) -> str:
    return f"{row[name]:.2f} [{row[f'{name}_lo']:.2f}, {row[f'{name}_hi']:.2f}]"


_COLUMNS = {
    "method": lambda row: row["method"],
    "target": lambda row: row["target"],
    "subsets": lambda row: f"{row['n']} {row['subsets']}",
    "raw": lambda row: _ends(row, "raw"),
    "controlled": lambda row: _ends(row, "controlled"),
}


def main() -> None:
    """Parse the flags and measure."""
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument("--regime", choices=REGIMES, default="short")
    flags.add_argument("--methods", nargs="*", choices=METHODS, default=list(METHODS))
    flags.add_argument("--run", type=Path, help="a run of the ground truth: its own influence too")
    flags.add_argument("--data", type=Path, default=DATA, help="folder of the data set")
    flags.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    run(measure, flags.parse_args())


if __name__ == "__main__":
    main()
