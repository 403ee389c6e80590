"""The command ``taught``: one verb per stage. It parses, loads the study and calls ``stages``.

Exit codes: 0 done, 1 a defect of ours (with traceback), 2 the user's mistake (without), 130 Ctrl-C.
Results go to standard output, everything else to standard error.
"""

from __future__ import annotations

import os
import shlex
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, Literal, NoReturn, cast

from cyclopts import App, CycloptsError, Parameter

import taught
from taught.environment import keep_freed_memory
from taught.errors import TaughtError, UserError

if TYPE_CHECKING:
    from rich.console import Console

    from taught.features.concept import Concept
    from taught.progress import Progress
    from taught.run.folder import RunFolder
    from taught.study.schema import Study

app = App(
    name="taught",
    help="Which training examples taught a model a behavior, and through which of its features.",
    version=taught.__version__,
    result_action="return_value",
    suppress_keyboard_interrupt=False,
)


Switch = Annotated[bool, Parameter(negative="", show_default=False)]
Quiet = Annotated[Switch, Parameter(name=["--quiet", "-q"], help="Show no progress.")]
Several = Parameter(consume_multiple=True, negative="")
StudyName = Annotated[str, Parameter(help="A study file, a folder that holds study.yaml, or the name of a preset.")]


@Parameter(name="*")
@dataclass(frozen=True)
class Overrides:
    """Flags that change the study for this command."""

    set: Annotated[tuple[str, ...], Parameter(name="--set", negative="", show_default=False)] = ()
    "Change one value of the study, e.g. --set policy.alpha=3. May be repeated."

    drop_overlap: Switch = False
    "Leave out examples whose prompt is also an evaluation prompt, and list them."

    drop_truncated: Switch = False
    "Leave out examples whose response is cut off at examples.max_tokens, and list them."

    chat_template: Path | None = None
    "A Jinja file, for a tokenizer that has no chat template."


@Parameter(name="*")
@dataclass(frozen=True)
class Output:
    """Where results go."""

    run: Path | None = None
    "Run folder; by default runs/NAME, with the name of the study (demo: runs/demo)."

    fresh: Switch = False
    "Delete this stage's earlier results in the run folder and make them anew."

    quiet: Quiet = False


_NO_OVERRIDES = Overrides()
_OUTPUT = Output()


@app.command(sort_key=1)
def demo(
    *, prompts: int = 200, examples: int = 48, features: int = 40, full: Switch = False, output: Output = _OUTPUT
) -> int:
    """Run the main job on the shipped preset: which examples teach a small chat model to refuse.

    Parameters
    ----------
    prompts
        Evaluation prompts to use, spread over groups and categories.
    examples
        Fine-tuning examples to score, spread over labels.
    features
        At most so many features in the policy, the strongest first.
    full
        Use the whole preset: every prompt, example and feature (about half an hour on two cores).
    """
    _quiet_libraries()
    from taught import stages
    from taught.run.folder import STAGES

    run = _run_folder(output.run or Path("runs/demo"), STAGES if output.fresh else ())
    with _progress(output.quiet) as progress:
        stages.demo(run, prompts=prompts, examples=examples, features=features, full=full, progress=progress)
    _show(run, None)
    _err().print(_cost(run), highlight=False)
    _out().print(f"\nReport: {run.path('report.html').resolve()}", soft_wrap=True, highlight=False)
    return 0


@app.command(sort_key=2)
def init(path: Path = Path("study.yaml"), /, *, force: Switch = False) -> int:
    """Write a study with every key, its default and a comment.

    Parameters
    ----------
    path
        The file to write.
    force
        Replace the file if it exists.
    """
    from taught.run.files import write_bytes
    from taught.study.schema import COMMENTED_TEMPLATE

    if path.is_dir():
        path = path / "study.yaml"
    if path.exists() and not force:
        raise UserError("the file exists already", value=str(path), fix="name another file, or pass --force")
    if not path.parent.is_dir():
        raise UserError("no such folder", value=str(path.parent), fix="make the folder first")
    write_bytes(path, COMMENTED_TEMPLATE.encode())
    _out().print(f"{path} written; edit it, then: taught check {path}", highlight=False)
    return 0


@app.command(sort_key=3)
def check(study: StudyName, /, *, overrides: Overrides = _NO_OVERRIDES) -> int:
    """Say what would run: model, SAE, counts, overlaps, truncations, cost. Changes nothing."""
    loaded = _load(study, overrides)
    from taught import stages

    report = stages.check(loaded)
    _out().print(report)
    return UserError.exit_code if report.problems else 0


@app.command(sort_key=4)
def policy(study: StudyName, /, *, overrides: Overrides = _NO_OVERRIDES, output: Output = _OUTPUT) -> int:
    """Fit the policy: which features the behavior rests on, how well, and where the gaps are."""
    return _study_stage("policy", study, overrides, output)


@app.command(sort_key=5)
def attribute(study: StudyName, /, *, overrides: Overrides = _NO_OVERRIDES, output: Output = _OUTPUT) -> int:
    """Score the examples: how training on each one shifts the policy, and through what."""
    return _study_stage("attribute", study, overrides, output)


@app.command(sort_key=7)
def validate(
    study: StudyName, /, *, judge: str | None = None, overrides: Overrides = _NO_OVERRIDES, output: Output = _OUTPUT
) -> int:
    """Train the model again on chosen examples, and compare what that does with what was predicted.

    Which subsets, and how to train: the section validation of the study. Finished retrainings are
    kept in the run folder; the same command goes on where it was stopped.

    Parameters
    ----------
    judge
        With validation.answer_tokens: module:function that says of a prompt and an answer how much
        it refuses, 0 to 1. Its module is imported and run. By default rules that read the words.
    """
    _study_stage("validate", study, overrides, output, judge=judge)
    return compare(study, overrides=overrides, output=replace(output, fresh=True))


@app.command(sort_key=8)
def compare(
    source: str,
    /,
    *,
    method: Annotated[tuple[str, ...], Several] = (),
    scores: Annotated[tuple[Path, ...], Several] = (),
    overrides: Overrides = _NO_OVERRIDES,
    output: Output = _OUTPUT,
) -> int:
    """Set methods side by side on the retrainings of a run: which predicts what they did.

    Parameters
    ----------
    source
        A run folder with retrainings, or its study.
    method
        Methods beside the run's own influence and the baselines: adjoint, adjoint+adam,
        adjoint+ekfac, sketch, sketch+autocorrelation.
    scores
        Tables of scores made elsewhere (Parquet, CSV, JSONL): example_id, method, value (positive:
        raises the target) and, if it is about one, target: score, mean_y:GROUP or coefficient:ID.
        Tables of `taught concept-influence` too; their methods stand for every target.
    """
    output = _in_its_folder(source, output)
    loaded = _load(source, overrides)
    from taught import stages

    run = _run_folder(output.run or Path("runs") / loaded.name, ("compare",) if output.fresh else ())
    with _progress(output.quiet) as progress:
        stages.compare(loaded, run, method, progress, scores)
    from taught.report.show import show_run

    _out().print(show_run(run.folder, "validation"))
    _err().print(f"compare complete in {run.folder} ({_cost(run, 'compare')})", highlight=False)
    return 0


@app.command(sort_key=9)
def clamp(
    source: str,
    /,
    *,
    prompts: int = 24,
    controls: int = 8,
    overrides: Overrides = _NO_OVERRIDES,
    output: Output = _OUTPUT,
) -> int:
    """Check the policy by edits in the model: scale each feature and read the behavior again.

    Parameters
    ----------
    source
        A run folder with a policy, or its study.
    prompts
        At most so many prompts a feature, of those on which it is active.
    controls
        Random directions a feature, for comparison.
    """
    output = _in_its_folder(source, output)
    return _study_stage("clamp", source, overrides, output, prompts=prompts, controls=controls)


@app.command(sort_key=5)
def sketch(
    study: StudyName, /, *, overrides: Overrides = _NO_OVERRIDES, run: Path | None = None, quiet: Quiet = False
) -> int:
    """Fill a store of sketches for `attribute --set attribution.estimator=sketch`.

    May run as several processes: torchrun --nproc-per-node 2 -m -- taught sketch STUDY.

    Parameters
    ----------
    run
        Run folder with the policy; by default runs/NAME.
    """
    loaded = _load(study, overrides)
    from taught import stages

    folder = _open(run or Path("runs") / loaded.name)
    with _progress(quiet) as progress:
        stages.sketch(loaded, folder, progress)
    return 0


@app.command(sort_key=9)
def ask(
    run: Path,
    /,
    *,
    target: str = "score",
    alpha: str | None = None,
    intercept: bool | None = None,
    features: Annotated[tuple[int, ...] | None, Parameter(consume_multiple=True)] = None,
    groups: Annotated[tuple[str, ...] | None, Parameter(consume_multiple=True)] = None,
    curvature: Literal["identity", "autocorrelation"] = "identity",
    top: int = 20,
    out: Path | None = None,
) -> int:
    """Ask a run's sketches a later question: another policy, another target. Needs no model.

    Parameters
    ----------
    run
        A run folder, attributed with the estimator sketch.
    target
        score, coefficient:FEATURE, mean_y:GROUP, mean_y:CATEGORY or y:PROMPT.
    alpha
        Another ridge penalty, or cv.
    intercept
        Fit the policy with or without an intercept.
    features
        Only these of the policy's features.
    groups
        Fit the policy on the prompts of these groups or categories only.
    curvature
        autocorrelation: what sets an example's gradient apart from the others counts for more.
    top
        How many examples to show.
    out
        Write all examples as Parquet to this file.
    """
    from taught import stages
    from taught.report.show import show_answers
    from taught.run.files import table_bytes, write_bytes

    folder = _open(run)
    penalty: Any = alpha if alpha in (None, "cv") else _parse_set(f"alpha={alpha}")[1]
    question = stages.Question(target, penalty, intercept, features, groups, curvature)
    answers = stages.ask(folder, question)
    _out().print(show_answers(answers, target, top))
    if out is not None:
        write_bytes(out, table_bytes(answers))
        _out().print(str(out), soft_wrap=True, highlight=False)
    return 0


@app.command(sort_key=10)
def concept(
    study: StudyName,
    /,
    *,
    source: str,
    out: Path,
    block: int | None = None,
    position: str | None = None,
    tokens: str = "mean_response",
    examples: Path | None = None,
    positive: str = "present",
    negative: str = "absent",
    method: Literal["logistic", "ridge"] = "logistic",
    penalty: float = 1.0,
    norm: Literal["unit", "none"] = "unit",
    name: str | None = None,
    sweep: Switch = False,
    force: Switch = False,
    overrides: Overrides = _NO_OVERRIDES,
    quiet: Quiet = False,
) -> int:
    """Make a concept: a direction in the residual stream, with a card that says how good it is.

    Parameters
    ----------
    source
        difference (of two groups' means), probe (trained on the groups), feature:ID or
        feature:ID=SHARE,ID=SHARE (of the SAE), file:PATH or file:PATH:TENSOR (safetensors, or a
        control vector as GGUF: direction.N belongs to block N).
    out
        Folder for concept.safetensors and concept.json.
    block
        Block whose output is read; the SAE's by default.
    position
        Tokens of a prompt that are read: last_user, last_prompt or mean_user. The study's by
        default.
    tokens
        Tokens of an example that are read: mean_response or last_response.
    examples
        Examples with labels (JSONL, Parquet, CSV): the groups are these, read at their responses, in
        place of the study's prompts. Best where you have answers with the behavior and without.
    positive
        Label of the examples with the behavior.
    negative
        Label of the examples without it.
    method
        Of a probe.
    penalty
        Of a probe, on rows of unit mean square.
    norm
        unit: the direction has length 1. none: it stays as it is.
    name
        Name of the concept in tables; the folder's by default.
    sweep
        Show how well a direction of every block separates the groups.
    force
        Accept a direction that is no better than chance on rows it has not seen.
    """
    loaded = _load(study, overrides)
    from taught import stages

    request = stages.ConceptRequest(
        source, block, position, tokens, examples, positive, negative, method, penalty, norm, name, force, sweep
    )
    with _progress(quiet) as progress:
        made = stages.concept(loaded, out, request, progress)
    _show_card(made)
    _out().print(str(out), soft_wrap=True, highlight=False)
    return 0


@app.command(sort_key=10)
def concept_influence(
    study: StudyName,
    /,
    *,
    concept: Annotated[tuple[Path, ...], Several],
    out: Path | None = None,
    run: Path | None = None,
    method: Annotated[tuple[str, ...], Several] = ("gradient", "vector-filter"),
    group: str | None = None,
    read: Literal["prompts", "responses"] = "prompts",
    checkpoint: str | None = None,
    responses: Path | None = None,
    max_new_tokens: int = 128,
    tokens: int = 0,
    overrides: Overrides = _NO_OVERRIDES,
    quiet: Quiet = False,
) -> int:
    """Score the examples by concepts: what training on each one does to the read-out of a direction.

    Parameters
    ----------
    concept
        Folders that `taught concept` wrote.
    out
        Parquet file: example_id, concept, method, value.
    run
        In its place a run folder with scored examples: the tables become part of it, and `taught
        report` shows them.
    method
        Some of gradient, vector-filter, projection-difference-response and
        projection-difference-training.
    group
        gradient: the read-out's mean is over the prompts of this group; over all by default.
    read
        gradient: read the evaluation prompts, or the responses of the examples themselves (--group is
        a label of examples then).
    checkpoint
        projection-difference-training: the fine-tuned model, a folder or hub id.
    responses
        projection-difference-response: file that keeps the model's own responses; by default
        own_responses.json beside the table, or in the run folder.
    max_new_tokens
        Tokens that an own response may have.
    tokens
        gradient: split so many of the strongest examples into shares of their response tokens, as
        OUT.tokens.parquet.
    """
    if (out is None) == (run is None):
        raise UserError(
            "the answers are kept in one place", rule="either --out or --run", fix="for example: --out refusal.parquet"
        )
    loaded = _load(study, overrides)
    from taught import stages
    from taught.report.cells import rich_table
    from taught.run.files import table_bytes, write_bytes

    folder = None if run is None else _open(run)
    beside = run if out is None else out.parent
    assert beside is not None
    file = responses or beside / "own_responses.json"
    question = stages.ConceptQuestion(concept, method, group, checkpoint, file, max_new_tokens, tokens, read)
    with _progress(quiet) as progress:
        answers = stages.concept_influence(loaded, question, progress, folder)
    if len(method) > 1:
        _out().print(rich_table(stages.agreement(answers.table)))
    if folder is not None:
        _say_written(folder, ("concept_influence.parquet", "concept_tokens.parquet"))
    files = {} if out is None else {out: answers.table}
    if tokens and out is not None:
        files[out.with_suffix(".tokens.parquet")] = answers.tokens
    for path, table in files.items():
        write_bytes(path, table_bytes(table))
        _out().print(str(path), soft_wrap=True, highlight=False)
    return 0


@app.command(sort_key=6)
def curate(
    run: Path,
    /,
    *,
    rule: Literal["paper", "top-k", "keep-k"] | None = None,
    k: int | None = None,
    target: str | None = None,
    protect: str | None = None,
) -> int:
    """Say which examples to drop, with the rule and the evidence, as keep.jsonl and drop.jsonl.

    Parameters
    ----------
    run
        A run folder with scored examples.
    rule
        paper: compare with the median of the other label. top-k: drop the k examples that raise the
        target most. keep-k: keep the k that raise it least. The study's rule by default.
    k
        How many examples top-k drops, or keep-k keeps.
    target
        What top-k and keep-k rank by: score, mean_y:GROUP, or after `concept-influence --run`
        concept:NAME (its gradient) or concept:NAME:METHOD.
    protect
        A second target, score, mean_y:GROUP or concept:NAME: only examples are dropped without which
        it would not be lower.
    """
    from taught import stages
    from taught.report.sections.curation import curation_change
    from taught.report.text import clean

    folder = _open(run)
    stages.curate(folder, rule=rule, k=k, target=target, protect=protect)
    text = curation_change(folder.read_json("curation"))
    _out().print(clean(text), markup=False, highlight=False, soft_wrap=True)
    _say_written(folder, ("curation.parquet", "keep.jsonl", "drop.jsonl", "unscored.jsonl"))
    return 0


@app.command(sort_key=6)
def clusters(run: Path, /, *, k: int | None = None, target: str | None = None, csv: Switch = False) -> int:
    """Cluster the examples by the features active on them; what each does, beside random examples.

    Parameters
    ----------
    run
        A run folder with scored examples.
    k
        Number of clusters; by default the one that sets them apart best.
    target
        Only this target: score, mean_y:GROUP, concept:NAME or concept:NAME:METHOD. By default the
        score and every group's mean y.
    csv
        Write CSV, one row for each cluster and target.
    """
    from taught import stages
    from taught.report.cells import write_csv
    from taught.report.sections.clusters import Clustered
    from taught.report.show import show_run
    from taught.report.tables import Tables

    folder = _open(run)
    stages.clusters(folder, k=k, target=target)
    if csv:
        write_csv(Clustered.read(Tables(folder)).flat(), sys.stdout)
        return 0
    _out().print(show_run(folder, "clusters"))
    _say_written(folder, ("clusters.parquet", "cluster_influence.parquet", "cluster_members.parquet", "clusters.json"))
    return 0


@app.command(sort_key=7)
def report(run: Path, /) -> int:
    """Write report.html: one self-contained page.

    Parameters
    ----------
    run
        A run folder with scored examples.
    """
    from taught import stages

    folder = _open(run)
    stages.report(folder)
    _say_written(folder, ("report.html",))
    return 0


@app.command(sort_key=8)
def show(run: Path, item: str | None = None, /) -> int:
    """Show the results in the terminal.

    Parameters
    ----------
    run
        A run folder.
    item
        An example id or a feature id, for its details.
    """
    _show(_open(run), item)
    return 0


@app.command(sort_key=9)
def query(
    run: Path,
    sql: str | None = None,
    /,
    *,
    top: int | None = None,
    feature: int | None = None,
    group: str | None = None,
    pathway: Literal["x", "y", "total"] | None = None,
    label: str | None = None,
    quantiles: Switch = False,
    csv: Switch = False,
) -> int:
    """Ask the tables of a run: ready-made questions, or SQL. Without either, list the tables.

    Parameters
    ----------
    run
        A run folder.
    sql
        One SELECT over the tables, for DuckDB.
    top
        So many examples with the largest absolute effect (20 if only one of the next four is given).
    feature
        The effect on the coefficient of this feature, instead of the score.
    group
        The effect on the mean y of this group, instead of the score.
    pathway
        The part of the effect along this pathway; total by default.
    label
        Only examples with this label.
    quantiles
        Quantiles by label of the score and the groups' mean y, or with --feature of a coefficient.
    csv
        Write CSV.
    """
    from taught.report.cells import rich_table, write_csv
    from taught.run import query as ask

    folder = _open(run)
    ranking = any(given is not None for given in (top, group, pathway, label))
    ranking |= feature is not None and not quantiles
    if sum((sql is not None, ranking, quantiles)) > 1:
        raise UserError(
            "these are two questions",
            rule="SQL, or --quantiles (--feature), or --top (--feature, --group, --pathway, --label)",
            fix="ask for one of them",
        )
    if sql is not None:
        answer = ask.select(folder, sql)
    elif quantiles:
        answer = ask.quantiles(folder, feature=feature)
    elif ranking:
        top = ask.TOP if top is None else top
        answer = ask.top_examples(folder, top, feature=feature, group=group, pathway=pathway, label=label)
    else:
        answer = ask.tables(folder)
    if csv:
        write_csv(answer, sys.stdout)
    else:
        _out().print(rich_table(answer))
    return 0


def main(argv: Sequence[str] | None = None) -> NoReturn:
    """Run the command line and exit with its code."""
    keep_freed_memory()
    sys.exit(run_command(sys.argv[1:] if argv is None else argv))


def run_command(argv: Sequence[str]) -> int:
    """Run one command; the exit code."""
    try:
        return cast(int, app(list(argv), exit_on_error=False, print_error=False) or 0)
    except CycloptsError as error:
        _complain(str(error), "`taught --help` and `taught COMMAND --help` list what there is")
        return UserError.exit_code
    except TaughtError as error:
        _complain(str(error))
        return error.exit_code
    except KeyboardInterrupt:
        _err().print("stopped; finished work is kept; the same command resumes")
        return 130
    except BrokenPipeError:  # `taught show RUN | head`: the reader has seen enough
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0


def _in_its_folder(source: str, output: Output) -> Output:
    """A study that is named by its run folder is worked on there."""
    from taught.run.manifest import NAME

    named = output.run is None and (Path(source) / NAME).is_file()
    return replace(output, run=Path(source)) if named else output


def _study_stage(stage: str, source: str, overrides: Overrides, output: Output, **options: Any) -> int:
    study = _load(source, overrides)
    from taught import stages

    folder = output.run or Path("runs") / study.name
    run = _run_folder(folder, (stage,) if output.fresh else ())
    before = run.manifest["stages"].get(stage)
    with _progress(output.quiet) as progress:
        getattr(stages, stage)(study, run, progress, **options)
    state = "was complete already" if run.manifest["stages"][stage] == before else "complete"
    if stage == "attribute":
        _say_dropped(run)
    _err().print(f"{stage} {state} in {run.folder} ({_cost(run, stage)})", highlight=False)
    return 0


def _say_dropped(run: RunFolder) -> None:
    """Name the examples that were left out on request."""
    dropped = run.read_json("dropped") if "dropped.json" in run.manifest["files"] else {}
    for kind, ids in dropped.items():
        if ids:
            text = f"left out, {kind}: {len(ids)} examples: {', '.join(ids)}"
            _err().print(text, markup=False, highlight=False, soft_wrap=True)


def _cost(run: RunFolder, *stages: str) -> str:
    """Time of the stages (all by default) and the largest memory of the process that ran them."""
    records = run.manifest["stages"]
    used = {stage: records[stage] for stage in stages or records}
    parts = [f"{stage} {record['seconds']:.1f} s" for stage, record in used.items()]
    memory = max(record["peak_memory_gb"] or 0.0 for record in used.values())
    return ", ".join(parts) + f", peak memory {memory:.1f} GB"


def _load(source: str, overrides: Overrides) -> Study:
    from taught.study.schema import load_study

    study = load_study(source)
    for text in overrides.set:
        key, value = _parse_set(text)
        study = study.replace(key, value)
    if overrides.drop_overlap:
        study = study.replace("examples.drop_overlap", True)
    if overrides.drop_truncated:
        study = study.replace("examples.drop_truncated", True)
    if overrides.chat_template is not None:
        study = study.replace("model.chat_template", str(overrides.chat_template))
    study.require_files()
    _quiet_libraries()
    if Path(study.model.id).is_absolute() and Path(study.sae.path).is_absolute():
        os.environ["HF_HUB_OFFLINE"] = "1"  # everything is local: nothing may go out
    return study


def _parse_set(text: str) -> tuple[str, Any]:
    import yaml

    key, separator, value = text.partition("=")
    if not separator:
        raise UserError("--set needs a key and a value", value=text, fix="for example: --set policy.alpha=3")
    try:
        return key.strip(), yaml.safe_load(value)
    except yaml.YAMLError:
        raise UserError("the value of --set is not valid YAML", value=text, fix="put it in quotes") from None


def _run_folder(path: Path, fresh: Sequence[str]) -> RunFolder:
    from taught.run.folder import RunFolder

    return RunFolder(path, fresh=fresh, command=shlex.join(["taught", *sys.argv[1:]]))


def _open(path: Path) -> RunFolder:
    from taught.run.folder import RunFolder

    run = RunFolder.open(path)
    run.command = shlex.join(["taught", *sys.argv[1:]])
    for stage, code in run.made_by_other_code().items():
        _err().print(f"note: {stage} was made by another version of the code: {code}")
    return run


def _show(run: RunFolder, item: str | None) -> None:
    from taught.report.show import show_run

    run.verify()
    for stage, record in run.manifest["stages"].items():
        if record["status"] != "complete":
            _err().print(f"{stage} was not finished in {run.folder}: its parts are missing or old")
    _out().print(show_run(run.folder, item=item))


def _show_card(made: Concept) -> None:
    """The quality card of a concept, and the sweep over blocks where there is one."""
    card = made.card
    auc, rows = card["auc"], card["n_positive"] + card["n_negative"]
    how = "held out" if card["held_out"] else "nothing fitted"
    what = "examples" if "examples sha256" in made.provenance else "prompts"
    _out().print(
        f"{made.name}: block {made.block}, AUC {auc['value']:.3f} ({auc['lo']:.3f} to "
        f"{auc['hi']:.3f}, {how}, {rows} {what}), cosine with the difference of means "
        f"{card['difference_cosine']:.2f}",
        markup=False,
        highlight=False,
        soft_wrap=True,
    )
    if "sweep" in card:
        import pyarrow as pa

        from taught.report.cells import rich_table

        _out().print(rich_table(pa.Table.from_pylist(card["sweep"])))


def _say_written(run: RunFolder, names: Sequence[str]) -> None:
    for name in names:
        if name in run.manifest["files"]:
            _out().print(str(run.path(name)), soft_wrap=True, highlight=False)


@contextmanager
def _progress(quiet: bool) -> Iterator[Progress]:
    from taught.progress import RichProgress, SilentProgress

    if quiet:
        yield SilentProgress()
    else:
        with RichProgress(_err()) as progress:
            yield progress


def _quiet_libraries() -> None:
    """Before transformers is imported: no bars and advice of its own, no telemetry."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"


def _out() -> Console:
    from rich.console import Console

    return Console()


def _err() -> Console:
    from rich.console import Console

    return Console(stderr=True)


def _complain(message: str, fix: str | None = None) -> None:
    lines = [message.strip()] + ([f"  fix:   {fix}"] if fix else [])
    _err().print("error: " + "\n".join(lines), markup=False, highlight=False, soft_wrap=True)
