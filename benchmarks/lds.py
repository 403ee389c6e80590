"""Which method foresaw what retraining did: estimators, concepts, baselines on one truth.

    python -m benchmarks.lds                           # goes on where it was stopped

Nothing is trained here: what training did stands in the data sets (``benchmarks.ground_truth``).
Scores depend on the base model only. So they are computed once, method by method, and kept in
``ground_truth/scores.parquet``; then they are compared on every regime that is there. Targets: the
score, the mean y of both groups, the ten largest coefficients. benchmarks/README.md says what the
columns mean.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.common import Results, Row, console, kept, machine, run
from benchmarks.ground_truth import DATA, REGIMES, ground_truth_study
from taught import stages
from taught.data.examples import load_examples
from taught.environment import versions
from taught.errors import UserError
from taught.progress import Progress, RichProgress
from taught.run import files
from taught.run.fingerprint import code_version, differences, stage_inputs
from taught.run.folder import RunFolder
from taught.stages import compare as comparing
from taught.stages.compare import SCORES, CostRow, costed
from taught.stages.estimating import prepare, read_data
from taught.stages.validate import influence_of
from taught.study.schema import Study
from taught.validation.comparison import RANK_DESIGNS, Comparison, Scores, by_length, compared, is_planted, truths
from taught.validation.lds import Difference, TrivialCheck
from taught.validation.score_tables import ScoreRow, placed, read_scores

RANKED = [name for name, values in REGIMES.items() if set(values["validation.designs"]) & set(RANK_DESIGNS)]
OWN_TOKENS = 32  # of the model's own answers
BASELINES = "all baselines"
FIRST = "adjoint+adam"  # the others are compared with it
_OF_METHODS = (
    "code",
    "attribution.estimator",
    "attribution.curvature",
    "attribution.exact_top",
    "attribution.coefficients",
)


def measure(args: argparse.Namespace) -> None:
    """Compute the scores that are missing, compare all of them on every regime."""
    regimes = args.regime or [name for name in RANKED if (args.data / name).is_dir()]
    with RichProgress(console) as progress, tempfile.TemporaryDirectory() as temporary:
        study = ground_truth_study(Path(temporary) / "study", "short")
        if args.memory_gb is not None:
            study = study.replace("attribution.memory_gb", args.memory_gb)
        table = ScoreTable.open(args.data, _conditions(study), fresh=args.fresh)
        opened = Opened(study, Path(temporary), progress)
        _compute(BASELINES, table, opened)
        if args.run is not None:
            _add_run(table, args.run)
        for method in args.methods:
            _compute(method, table, opened)
        given = [row for file in args.scores for row in read_scores(file)]
        for regime in regimes:
            progress.step(f"intervals, {regime}")
            _compare(regime, args.data / regime, study, table, given, args.out)


def _conditions(study: Study) -> Row:
    """What all scores depend on; where files lie, and the code, are not part of it."""
    inputs = stage_inputs("attribute", study)
    return {key: value for key, value in inputs.items() if key not in _OF_METHODS}


# --- scores, computed once ------------------------------------------------------------------------


@dataclass
class ScoreTable:
    """``scores.parquet`` (method, target, example_id, value) and ``scores.json``.

    Attributes
    ----------
    conditions : what the scores depend on
    targets : names of the targets that a row without one stands for
    methods : method -> seconds, memory_gb, machine, versions, code; all baselines are one
    rows : of the methods that are finished
    """

    folder: Path
    conditions: Row
    targets: list[str] = field(default_factory=list)
    methods: dict[str, Row] = field(default_factory=dict)
    rows: list[ScoreRow] = field(default_factory=list)

    @classmethod
    def open(cls, folder: Path, conditions: Row, *, fresh: bool) -> ScoreTable:
        """What is there, or nothing if ``fresh``; UserError if it is of other conditions."""
        table = cls(folder, conditions)
        if fresh or not (folder / "scores.json").exists():
            return table
        record = json.loads((folder / "scores.json").read_text())
        changed = differences(record["conditions"], conditions)
        if changed:
            raise UserError(
                "the scores were computed under other conditions",
                value="; ".join(f"{key}: was {was}, now {now}" for key, (was, now) in changed.items()),
                rule="all methods of the table score the same examples on the same model",
                fix="--fresh computes them again",
            )
        table.targets, table.methods = record["targets"], record["methods"]
        finished = {*table.methods, *(_names() if BASELINES in table.methods else ())}
        rows = read_scores(folder / "scores.parquet")
        table.rows = [row for row in rows if row.method in finished]
        return table

    def add(self, method: str, rows: Iterable[ScoreRow], cost: CostRow, targets: Sequence[str]) -> None:
        """Keep a finished method; the record is written last, without it nothing counts."""
        if self.targets not in ([], list(targets)):
            raise UserError(
                "the targets are no longer the same",
                value=", ".join(targets),
                rule=", ".join(self.targets),
                fix="--fresh computes all scores again",
            )
        self.targets = list(targets)
        self.rows += rows
        self.methods[method] = {**asdict(cost), "machine": machine(), "versions": versions(), "code": code_version()}
        self.folder.mkdir(parents=True, exist_ok=True)
        content = files.table_bytes(pa.Table.from_pylist([row._asdict() for row in self.rows], schema=SCORES))
        files.write_bytes(self.folder / "scores.parquet", content)
        record = {
            "conditions": self.conditions,
            "targets": self.targets,
            "methods": self.methods,
            "sha256": files.sha256_bytes(content),
        }
        files.write_bytes(self.folder / "scores.json", files.json_bytes(record))


class Opened:
    """The study with its model and policy, opened when the first method asks for it."""

    def __init__(self, study: Study, folder: Path, progress: Progress) -> None:
        self.study, self.folder, self.progress = study, folder, progress
        self._parts: tuple[Any, ...] | None = None

    def parts(self) -> tuple[Any, ...]:
        """Run folder, subject, data, ready, targets."""
        from taught.stages.subject import open_subject

        if self._parts is None:
            run = RunFolder(self.folder / "run")
            stages.policy(self.study, run, self.progress)
            data, subject = read_data(self.study, self.progress), open_subject(self.study)
            ready = prepare(self.study, run, subject, data)
            self._parts = run, subject, data, ready, comparing.compared_targets(ready)
        return self._parts

    def targets(self) -> list[str]:
        """Their labels."""
        return list(self.parts()[-1])


def _compute(method: str, table: ScoreTable, opened: Opened) -> None:
    if method not in table.methods:
        targets = opened.targets()
        opened.progress.step(method)
        costs: list[CostRow] = []
        with costed(method, costs):
            rows = METHODS[method](opened, method)
        table.add(method, rows, costs[0], targets)


def _effects(opened: Opened, method: str) -> list[ScoreRow]:
    run, subject, _, ready, targets = opened.parts()
    return _rows({method: comparing.method_scores(method, opened.study, run, subject, ready, targets, opened.progress)})


def _baselines(opened: Opened, _: str) -> list[ScoreRow]:
    _, _, data, ready, targets = opened.parts()
    return _rows(comparing.baselines_by_target(opened.study, data, ready, targets, opened.progress))


def _concept(opened: Opened, method: str, curvature: str = "identity") -> list[ScoreRow]:
    """By the difference of the groups' means at the SAE's block; one value for every target."""
    study, concept = opened.study, opened.folder / "difference"
    if not concept.exists():
        stages.concept(study, concept, stages.ConceptRequest("difference"), opened.progress)
    question = stages.ConceptQuestion(
        (concept,),
        (method.partition(":")[2].partition("+")[0],),
        responses=opened.folder / "own_responses.json",
        max_new_tokens=OWN_TOKENS,
    )
    study = study.replace("attribution.curvature", curvature)
    found = stages.concept_influence(study, question, opened.progress).table.to_pylist()
    return [ScoreRow(method, None, row["example_id"], row["value"]) for row in found]


def _rows(scores: Scores) -> list[ScoreRow]:
    return [
        ScoreRow(method, target, example_id, value)
        for method, of in scores.items()
        for target, values in of.items()
        for example_id, value in values.items()
    ]


def _names() -> tuple[str, ...]:
    from taught.baselines.baselines import BASELINES as NAMES

    return NAMES


METHODS: dict[str, Callable[[Opened, str], list[ScoreRow]]] = {
    BASELINES: _baselines,
    "difference:vector-filter": _concept,
    "difference:projection-difference-response": _concept,
    "difference:gradient": _concept,
    "difference:gradient+adam": partial(_concept, curvature="adam"),
    **dict.fromkeys(comparing.METHODS, _effects),
}


def _add_run(table: ScoreTable, folder: Path) -> None:
    """The influence of a finished run on the same study, under the name of its method."""
    opened = RunFolder.open(folder)
    spec, record = opened.manifest["study"]["attribution"], opened.manifest["stages"]["attribute"]
    curved = "" if spec["curvature"] == "identity" else f"+{spec['curvature']}"
    method = f"{spec['estimator']}{curved}"
    if method in table.methods:
        return
    found = {target.label: values for target, values in influence_of(opened).items()}
    missing = [name for name in table.targets if name not in found]
    if missing:
        raise UserError(
            "the run has no influence on these targets",
            value=", ".join(missing),
            fix="name a run folder of the ground truth",
        )
    rows = _rows({method: {name: found[name] for name in table.targets}})
    placed(rows, {row.example_id for row in table.rows}, table.targets)
    cost = CostRow(method, record["seconds"], record["peak_memory_gb"])
    table.add(method, rows, cost, table.targets)


# --- against the ground truth ---------------------------------------------------------------------


def _compare(regime: str, folder: Path, study: Study, table: ScoreTable, given: Sequence[ScoreRow], out: Path) -> None:
    if not (folder / "validation.json").exists():
        raise UserError(
            "there is no such data set",
            value=str(folder),
            fix=f"make it: python -m benchmarks.ground_truth --regime {regime}",
        )
    made = json.loads((folder / "made.json").read_text())
    examples = load_examples(study.examples.path).examples
    if made["examples sha256"] != table.conditions["examples.path sha256"]:
        raise UserError(
            "the data set is of other examples than the scores",
            value=str(folder),
            fix="make it again: python -m benchmarks.ground_truth",
        )
    ids = {example.id for example in examples}
    every = placed(table.rows, ids, table.targets)
    every |= placed(given, ids, table.targets, every)
    baselines = {name: every.pop(name) for name in _names() if name in every}
    norms = next(iter(baselines["gradient-norm"].values()))
    every |= by_length({name: every[name] for name in comparing.METHODS if name in every}, norms)
    scores = {name: every[name] for name in sorted(every, key=lambda name: name != FIRST)}
    tables = [pq.read_table(folder / f"{name}.parquet") for name in ("subsets", "outcomes")]
    inclusion = json.loads((folder / "validation.json").read_text())["inclusion"]
    results = Results(
        f"lds_{regime}",
        {
            "study": f"ground-truth-{regime}",
            "prompts": study.prompts.limit,
            "examples": len(examples),
            "features": study.features.max_features,
            "targets": table.targets,
            "data": made["sha256"],
        },
        out,
    )
    with kept(results, _COLUMNS):
        found = compared(
            Comparison(
                scores,
                baselines,
                truths(*tables, inclusion, table.targets),
                {example.id: example.label for example in examples},
                {example.id for example in examples if is_planted(example.flags)},
                [(FIRST, other) for other in scores if other != FIRST and FIRST in scores],
            )
        )
        ceilings = {(row.target, row.subsets): row for row in found.noise_ceiling}
        results.rows = [
            {**asdict(row), "noise_ceiling": None if ceiling is None else ceiling.ceiling}
            for row in found.lds
            for ceiling in [ceilings.get((row.target, row.subsets))]
        ]
        target = f"behavior:{study.prompts.negative_group}"
        results.summary = {
            "planted": {row.method: asdict(row) for row in found.planted if row.target == target},
            "differences": [asdict(row) for row in found.lds_differences if plain(row)],
            "explained_by_trivial": [asdict(row) for row in found.trivial if row.explained and plain(row)],
            "noise_ceiling": [asdict(row) for row in found.noise_ceiling],
            "costs": {
                name: {key: cost[key] for key in ("seconds", "memory_gb")} for name, cost in table.methods.items()
            },
            **_medians(results.rows),
        }


def plain(row: Difference | TrivialCheck) -> bool:
    """Whether a row is about the score or a group: there are ten coefficients."""
    return not row.target.startswith("coefficient")


def _medians(rows: Sequence[Row]) -> Row:
    """Design and method -> median over the ten coefficients of the LDS, raw and controlled."""
    found: dict[str, Row] = {}
    for row in rows:
        if row["target"].startswith("coefficient"):
            name = f"{row['subsets']}, {row['method']}"
            of = found.setdefault(name, {"raw": [], "controlled": []})
            for kind, values in of.items():
                values.append(row[kind])
    return {
        "coefficients, median": {
            key: {name: median(values) for name, values in of.items()} for key, of in found.items()
        }
    }


def _ends(row: Mapping[str, Any], name: str) -> str:
    return f"{row[name]:.2f} [{row[f'{name}_lo']:.2f}, {row[f'{name}_hi']:.2f}]"


_COLUMNS = {
    "method": lambda row: row["method"],
    "target": lambda row: row["target"],
    "subsets": lambda row: f"{row['n']} {row['subsets']}",
    "raw": lambda row: _ends(row, "raw"),
    "controlled": lambda row: _ends(row, "controlled"),
    "ceiling": lambda row: "" if row["noise_ceiling"] is None else f"{row['noise_ceiling']:.2f}",
}


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the flags and measure."""
    flags = argparse.ArgumentParser(description=__doc__)
    flags.add_argument(
        "--methods", nargs="*", choices=METHODS, default=list(METHODS), help="baselines are always computed"
    )
    flags.add_argument(
        "--regime", nargs="*", choices=RANKED, help="regimes to compare on (default: all that are there)"
    )
    flags.add_argument("--run", type=Path, help="a run of the ground truth: its influence is taken, not computed")
    flags.add_argument(
        "--scores", type=Path, nargs="*", default=[], help="tables of further scores, as for taught compare"
    )
    flags.add_argument("--fresh", action="store_true", help="forget the scores that are there")
    flags.add_argument("--memory-gb", type=float, help="for query gradients; 10: all at once")
    flags.add_argument("--data", type=Path, default=DATA, help="folder of the data sets")
    flags.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    run(measure, flags.parse_args(argv))


if __name__ == "__main__":
    main()
