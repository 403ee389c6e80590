"""Which method foresaw what retraining did: estimators, concepts, baselines on one truth.

    python -m benchmarks.lds                           # goes on where it was stopped

Nothing is trained here: what training did stands in the data sets (``benchmarks.ground_truth``).
Scores depend on the base model only. So they are computed once, method by method, and kept in
``ground_truth/scores.parquet``; then they are compared on every regime that is there. Targets: the
score, the behavior on both groups, the ten largest coefficients. benchmarks/README.md says what the
columns mean.
"""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cached_property
from pathlib import Path
from statistics import median

import pyarrow as pa
import pyarrow.parquet as pq

from benchmarks.common import Results, Row, console, kept, machine, run
from benchmarks.ground_truth import DATA, REGIMES, ground_truth_study
from taught.baselines.baselines import BASELINES as NAMES
from taught.core import driver
from taught.core.driver import Method
from taught.core.estimator import Work
from taught.core.names import TargetName
from taught.core.scores import Scores, scores_schema
from taught.core.target import TargetSet
from taught.data.examples import load_examples
from taught.environment import versions
from taught.errors import UserError
from taught.progress import Progress, RichProgress
from taught.run import files
from taught.run.code import code_version
from taught.run.fingerprint import differences, stage_inputs
from taught.run.folder import RunFolder
from taught.stages import BY_NAME
from taught.stages.compare import CostRow, baselines_by_target, costed, in_words, largest
from taught.stages.concepts import Read, concept_method_scores, run_concepts
from taught.stages.ready import Ready, asks, prepare, read_data
from taught.stages.scored import own_method, read_scores
from taught.stages.subject import open_subject
from taught.study.schema import Study
from taught.validation.comparison import RANK_DESIGNS, Comparison, by_length, compared, is_planted, truths
from taught.validation.lds import Difference, TrivialCheck
from taught.validation.score_tables import ScoreRow, placed
from taught.validation.score_tables import read_scores as read_table

RANKED = [name for name, values in REGIMES.items() if set(values["validation.designs"]) & set(RANK_DESIGNS)]
OWN_TOKENS = 32  # of the model's own answers
BASELINES = "all baselines"
FIRST = "adjoint+adam"  # the others are compared with it
CONCEPT = "difference"  # of the groups' means at the SAE's block
EFFECTS = ("adjoint", "adjoint+adam", "sketch", "sketch+autocorrelation")
PROJECTIONS = ("vector-filter", "projection-difference-response")
METHODS = (BASELINES, *(f"{CONCEPT}:{name}" for name in (*PROJECTIONS, "adjoint", "adjoint+adam")), *EFFECTS)
OF_ALL = ("attribution.lr", "attribution.parameters")  # the other keys of the section are a method's own


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
        given = [row for file in args.scores for row in read_table(file)]
        for regime in regimes:
            progress.step(f"intervals, {regime}")
            _compare(regime, args.data / regime, study, table, given, args.out)


def _conditions(study: Study) -> Row:
    """What all scores depend on; where files lie, and the code, are not part of it."""
    inputs: Row = {}
    for name in ("readings", "policy", "attribute"):
        inputs |= stage_inputs(BY_NAME[name], study)
    return {k: v for k, v in inputs.items() if k in OF_ALL or not k.startswith(("code", "attribution."))}


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
        finished = {*table.methods, *(NAMES if BASELINES in table.methods else ())}
        rows = read_table(folder / "scores.parquet")
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
        content = files.table_bytes(pa.Table.from_pylist([row._asdict() for row in self.rows], schema=scores_schema()))
        files.write_bytes(self.folder / "scores.parquet", content)
        record = {
            "conditions": self.conditions,
            "targets": self.targets,
            "methods": self.methods,
            "sha256": files.sha256_bytes(content),
        }
        files.write_bytes(self.folder / "scores.json", files.json_bytes(record))


@dataclass(eq=False)
class Opened:
    """The study with its model, policy and concept, opened when the first method asks for it."""

    study: Study
    folder: Path
    progress: Progress

    @cached_property
    def parts(self) -> tuple[RunFolder, Ready, list[Read]]:
        """Run folder, what is scored, the concept."""
        concept = {"name": CONCEPT, "source": "difference"}
        values = {"concepts": [concept], "attribution.max_new_tokens": OWN_TOKENS}
        study = self.study
        for key, value in values.items():
            study = study.replace(key, value)
        run = RunFolder(self.folder / "run")
        for name in ("readings", "policy", "concepts"):
            BY_NAME[name](study, run, self.progress)
        data, subject = read_data(study, self.progress), open_subject(study)
        return run, prepare(study, run, subject, data), run_concepts(study, run, subject)

    @cached_property
    def targets(self) -> TargetSet:
        """The score, both groups, the ten largest coefficients."""
        readings = self.parts[1].readings
        assert readings.policy is not None
        names = ["score", *(f"behavior:{group}" for group in readings.groups)]
        names += [f"coefficient:{k}" for k in largest(readings.policy)]
        return TargetSet(tuple(map(TargetName.parse, names)), readings)

    def scores(self, method: str) -> list[ScoreRow]:
        """Values by a method; by one for concepts the same for every target."""
        run, ready, concepts = self.parts
        work = Work(self.progress, None, self.folder)
        if method == BASELINES:
            found = baselines_by_target(ready.study, ready.data, ready, self.targets, self.progress)
            return [row for name, of in found.items() for row in _rows(name, of)]
        head, colon, how = method.partition(":")
        if not colon:
            made = driver.scores(ready.problem, ready.inputs, self.targets, ready.method.named(method), work)
            return _rows(method, in_words(made))
        if how in PROJECTIONS:
            study = ready.study.replace("attribution.concept_methods", [how])
            (made,) = concept_method_scores(study, ready.subject, run, ready.inputs, concepts, self.progress)
        else:
            (ask,) = asks(ready, [f"concept:{head}"], concepts)
            made = driver.scores(ask.problem, ready.inputs, ask.targets, Method().named(how), work)
        return [ScoreRow(method, None, *one) for one in made.by_example(f"concept:{head}").items()]


def _compute(method: str, table: ScoreTable, opened: Opened) -> None:
    if method not in table.methods:
        targets = [str(name) for name in opened.targets.names]
        opened.progress.step(method)
        costs: list[CostRow] = []
        with costed(method, costs):
            rows = opened.scores(method)
        table.add(method, rows, costs[0], targets)


def _rows(method: str, scores: Mapping[str, Mapping[str, float]]) -> list[ScoreRow]:
    return [ScoreRow(method, target, i, value) for target, values in scores.items() for i, value in values.items()]


def _add_run(table: ScoreTable, folder: Path) -> None:
    """The influence of a finished run on the same study, under the name of its method."""
    opened = RunFolder.open(folder)
    method = own_method(opened)
    if method in table.methods:
        return
    found: Scores = read_scores(opened, table.targets)
    rows = _rows(method, in_words(found))
    placed(rows, {row.example_id for row in table.rows}, table.targets)
    record = opened.manifest["stages"]["attribute"]
    table.add(method, rows, CostRow(method, record["seconds"], record["peak_memory_gb"]), table.targets)


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
    baselines = {name: every.pop(name) for name in NAMES if name in every}
    norms = next(iter(baselines["gradient-norm"].values()))
    every |= by_length({name: every[name] for name in EFFECTS if name in every}, norms)
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


def _ends(row: Row, name: str) -> str:
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
        "--scores", type=Path, nargs="*", default=[], help="tables of further scores, as for validation.scores"
    )
    flags.add_argument("--fresh", action="store_true", help="forget the scores that are there")
    flags.add_argument("--memory-gb", type=float, help="for query gradients; 10: all at once")
    flags.add_argument("--data", type=Path, default=DATA, help="folder of the data sets")
    flags.add_argument("--out", type=Path, default=Path(__file__).parent / "results")
    run(measure, flags.parse_args(argv))


if __name__ == "__main__":
    main()
