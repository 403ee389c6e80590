"""The commands. Each loads a study or opens a run, calls stages, and says what came of it."""

from __future__ import annotations

import sys
from collections.abc import Callable
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Literal

from cyclopts import Parameter

from taught.cli import console, given
from taught.cli.given import Question, Several, Switch, Where
from taught.errors import UserError, printable

if TYPE_CHECKING:
    from taught.run.folder import RunFolder
    from taught.study.schema import Study

StudyName = Annotated[str, Parameter(help="A study file, a folder that holds study.yaml, or the name of a preset.")]
_QUESTION, _WHERE = Question(), Where()
# Enough for every section of the report, and little enough for a laptop (python -m benchmarks.demo_cost).
DEMO = {"prompts": 50, "examples": 16, "features": 10}


def demo_study(prompts: int, examples: int, features: int) -> Study:
    """The study of the demo, on a part of the preset."""
    study = given.study_of("refusal-smollm2", _QUESTION)
    limits = {"prompts.limit": prompts, "examples.limit": examples, "features.max_features": features}
    for key, value in {**limits, "attribution.exact_top": 1, "curation.target": "behavior:harmless"}.items():
        study = study.replace(key, value)
    return study


def demo(
    *,
    prompts: int = DEMO["prompts"],
    examples: int = DEMO["examples"],
    features: int = DEMO["features"],
    full: Switch = False,
    where: Where = _WHERE,
) -> int:
    """Run everything on the shipped preset: which examples teach a small chat model to refuse.

    Parameters
    ----------
    prompts
        Evaluation prompts to use, spread over groups and categories.
    examples
        Fine-tuning examples to score, spread over labels.
    features
        At most so many features in the policy, the strongest first.
    full
        Use the whole preset: every prompt, example and feature.
    """
    study = given.study_of("refusal-smollm2", _QUESTION) if full else demo_study(prompts, examples, features)
    folder = given.run_folder(None, study, Where(where.run or Path("runs/demo"), where.fresh, where.quiet))
    return _run(study, folder, None, None, where.quiet)


def init(path: Path = Path("study.yaml"), /, *, force: Switch = False) -> int:
    """Write a study with every key, its default and a comment.

    Parameters
    ----------
    path
        The file to write.
    force
        Replace the file if it exists.
    """
    from taught.run.files import place, write_bytes
    from taught.study.template import template

    path = place(path)
    if path.is_dir():
        path = path / "study.yaml"
    if path.exists() and not force:
        raise UserError("the file exists already", value=str(path), fix="name another file, or pass --force")
    if not path.parent.is_dir():
        raise UserError("no such folder", value=str(path.parent), fix="make the folder first")
    write_bytes(path, template().encode())
    console.say(f"{path} written; edit it, then: taught check {path}")
    return 0


def check(study: StudyName, /, *, question: Question = _QUESTION) -> int:
    """Say what would run: model, SAE, counts, overlaps, truncations, cost. Changes nothing."""
    loaded = given.study_of(study, question)
    from taught.stages.check import check_study

    report = check_study(loaded)
    console.out().print(report)
    return UserError.exit_code if report.problems else 0


def run(
    study: Annotated[str | None, Parameter(help="A study, a preset, or a run folder that is gone on with.")] = None,
    /,
    *,
    question: Question = _QUESTION,
    to: str | None = None,
    only: str | None = None,
    where: Where = _WHERE,
) -> int:
    """Do everything that the study asks for, and write a report. The same command resumes.

    Without a study: --model, --pairs (or --documents) and --prompts; the study that comes of them stands
    in the run folder. Started by torchrun, the processes fill the store of the estimator sketch together,
    and nothing else.

    Parameters
    ----------
    to
        The last stage, e.g. policy. The model is trained only with --to validate or --to compare.
    only
        This stage alone.
    """
    loaded = given.study_of(study, question)
    return _run(loaded, given.run_folder(study, loaded, where), to, only, where.quiet)


def _run(study: Study, folder: RunFolder, to: str | None, only: str | None, quiet: bool) -> int:
    from taught.environment import process_share
    from taught.stages import asked

    stages = asked(study, to, only)
    before = folder.manifest["stages"]
    with console.progress_on(quiet) as progress:
        if process_share()[1] > 1:
            from taught.stages.sketches import sketches

            sketches(study, folder, progress)
            return 0
        for stage in stages:
            stage(study, folder, progress)
    made = folder.manifest["stages"]
    complete = [stage.name for stage in stages if made[stage.name] == before.get(stage.name)]
    if complete:
        console.say(f"complete already: {', '.join(complete)}", console.err())
    dropped = folder.read_json("dropped") if "dropped.json" in folder.manifest["files"] else {}
    for kind, ids in dropped.items():
        if ids:
            console.say(f"left out, {kind}: {len(ids)} examples: {', '.join(ids)}", console.err())
    _show(folder, None)
    console.say(f"{folder.folder}: {console.cost(folder)}", console.err())
    if "report.html" in folder.manifest["files"]:
        console.say(f"\nReport: {folder.path('report.html').resolve()}")
    return 0


def _show(run: RunFolder, item: str | None) -> None:
    from taught.report.show import show_run

    run.verify()
    for stage, record in run.manifest["stages"].items():
        if record["status"] != "complete":
            console.say(f"{stage} was not finished in {run.folder}: its parts are missing or old", console.err())
    console.out().print(show_run(run.folder, item=item))


def show(
    run: Path,
    what: str | None = None,
    /,
    *,
    top: int = 20,
    label: str | None = None,
    method: str | None = None,
    quantiles: Switch = False,
    csv: Switch = False,
    groups: Annotated[tuple[str, ...], Several] = (),
    set: given.Sets = (),
) -> int:
    """Show the results in the terminal.

    Parameters
    ----------
    run
        A run folder.
    what
        An example's or a feature's id, for its details. A table's name, for its rows; tables, for their
        names. A section of the report, such as validation. "SELECT ...", answered by DuckDB. A target, such
        as score, coefficient:17 or behavior:harmless, for the examples that move it most; one that was not
        computed is answered from the run's sketches, where it has them.
    top
        So many examples, or rows of a table.
    label
        With a target: only examples with this label.
    method
        With a target: the scores of this method; the run's own by default.
    quantiles
        With a target: quantiles of its values by label.
    csv
        Write CSV, all rows.
    groups
        With a target, from sketches: fit the policy on the prompts of these groups or categories only.
    set
        With a target, from sketches: another policy.alpha, policy.intercept, features.ids or
        attribution.curvature (autocorrelation). May be repeated.
    """
    from taught.cli.answer import Asked, answer

    if not 0 < top < 2**31:
        raise UserError("--top is a number of rows", value=top, rule="at least 1", fix="for example: --top 20")
    folder = given.open_run(run)
    asked = Asked(top, label, method, quantiles, groups, dict(map(given.parse_set, set)), csv)
    table = answer(folder, what, asked)
    if table is None:
        _show(folder, what)
        return 0
    from taught.report.cells import rich_table, write_csv

    if csv:
        write_csv(table, sys.stdout, str if not sys.stdout.isatty() else printable)
    else:
        console.out().print(rich_table(table))
    return 0


def curate(
    run: Path,
    /,
    *,
    rule: Literal["paper", "top-k", "keep-k", "swap-k"] | None = None,
    k: int | None = None,
    target: str | None = None,
    method: str | None = None,
    protect: str | None = None,
) -> int:
    """Say which examples to drop, with the rule and the evidence, as keep.jsonl and drop.jsonl.

    What is not given is as the run had it last.

    Parameters
    ----------
    run
        A run folder with scored examples.
    rule
        paper: compare with the median of the other label. top-k: drop the k examples that raise the
        target most. keep-k: keep the k that raise it least. swap-k: exchange the chosen and the
        rejected answer of the k preferences that raise it most (swap.jsonl).
    k
        How many examples top-k drops, keep-k keeps, swap-k exchanges.
    target
        What examples are ranked by, such as score, behavior:harmless or concept:refusal.
    method
        Whose scores; the run's own by default.
    protect
        A second target: only examples are dropped without which it would not be lower.
    """
    from taught.report.sections.curation import curation_change
    from taught.report.text import clean
    from taught.stages import BY_NAME

    folder = given.open_run(run)
    study = folder.study
    flags = {"rule": rule, "k": k, "target": target, "method": method, "protect": protect}
    for key, value in flags.items():
        study = study if value is None else study.replace(f"curation.{key}", value)
    BY_NAME["curate"](study, folder)
    console.say(clean(curation_change(folder.read_json("curation"))))
    console.say_written(folder, ("curation.parquet", "keep.jsonl", "drop.jsonl", "swap.jsonl", "unscored.jsonl"))
    return 0


def validate(
    study: Annotated[str, Parameter(help="A run folder, or its study.")],
    /,
    *,
    judge: str | None = None,
    question: Question = _QUESTION,
    where: Where = _WHERE,
) -> int:
    """Train the model again on chosen examples, and compare what that does with what was predicted.

    Which subsets, how to train, and what to compare with: the section validation of the study. Finished
    retrainings are kept in the run folder; the same command goes on where it was stopped.

    Parameters
    ----------
    judge
        With validation.answer_tokens: module:function that says of a prompt and an answer how much
        it shows the behavior, 0 to 1. Its module is imported and run. By default rules that read the
        words.
    """
    from taught.stages import asked

    loaded = given.study_of(study, question)
    if judge is not None:
        loaded = loaded.replace("validation.judge", judge)
    folder = given.run_folder(study, loaded, Where(where.run, (*where.fresh, "compare"), where.quiet))
    with console.progress_on(where.quiet) as progress:
        for stage in asked(loaded, to="compare"):
            stage(loaded, folder, progress)
    _show(folder, "validation")
    console.say(f"{folder.folder}: {console.cost(folder)}", console.err())
    console.say_written(folder, ("report.html",))
    return 0


def report(run: Path, /) -> int:
    """Write report.html: one self-contained page.

    Parameters
    ----------
    run
        A run folder.
    """
    from taught.stages import BY_NAME

    folder = given.open_run(run)
    BY_NAME["report"](folder.study, folder)
    console.say_written(folder, ("report.html",))
    return 0


COMMANDS: tuple[Callable[..., int], ...] = (demo, init, check, run, show, curate, validate, report)
