"""From the arguments of a command to a study and a run folder."""

from __future__ import annotations

import os
import shlex
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter

from taught.cli.console import err, quiet_libraries, say
from taught.errors import UserError

if TYPE_CHECKING:
    from taught.run.folder import RunFolder
    from taught.study.schema import Study

Switch = Annotated[bool, Parameter(negative="", show_default=False)]
Several = Parameter(consume_multiple=True, negative="")
Repeated = Parameter(negative="", show_default=False)
Sets = Annotated[tuple[str, ...], Parameter(name="--set", negative="", show_default=False)]


@Parameter(name="*")
@dataclass(frozen=True)
class Question:
    """Keys of the study that have a flag of their own; each goes before what the study says."""

    model: str | None = None
    "The model: a hub id or a folder. All that trains begins at its weights."

    tuned: str | None = None
    "What it was tuned into, a model or a LoRA adapter: influence is then taken there, in the metric of EK-FAC."

    pairs: Path | None = None
    "Training examples whose responses are trained on: messages, or prompt and response."

    documents: Path | None = None
    "Training examples that are trained on as a whole: text. In place of --pairs."

    prompts: Path | None = None
    "Evaluation prompts on which the behavior is read."

    behavior: str | None = None
    "What is read on them: prefixes, answer, choice, loss."

    sae: str | None = None
    "A sparse autoencoder: a folder, or release:sae_id. With it there is a policy."

    target: Annotated[tuple[str, ...], Repeated] = ()
    "What the influence is on, e.g. behavior:harmless or score. May be repeated; by default everything."

    set: Sets = ()
    "Change one value of the study, e.g. --set policy.alpha=3. May be repeated."

    def values(self) -> dict[str, Any]:
        """Key of the study -> value."""
        if self.pairs is not None and self.documents is not None:
            raise UserError("examples are pairs or documents", value="--pairs and --documents", fix="give one of them")
        examples = self.pairs or self.documents
        given: dict[str, Any] = {
            "model.id": self.model,
            "examples.path": examples and str(examples),
            "examples.kind": examples and ("pair" if self.pairs else "document"),
            "prompts.path": self.prompts and str(self.prompts),
            "behavior": self.behavior,
            "sae.path": self.sae,
            "attribution.targets": list(self.target) or None,
        }
        return {key: value for key, value in given.items() if value is not None}


@Parameter(name="*")
@dataclass(frozen=True)
class Where:
    """Where results go."""

    run: Path | None = None
    "Run folder; by default runs/NAME, with the name of the study."

    fresh: Annotated[tuple[str, ...], Repeated] = ()
    "Delete the earlier results of a stage and make them anew; without a stage, of all."

    quiet: Annotated[Switch, Parameter(name=["--quiet", "-q"])] = False
    "Show no progress."


def study_of(source: str | None, question: Question) -> Study:
    """The study that a command is about.

    Raises
    ------
    UserError
        There is neither a study nor the flags that make one; a value breaks its rule; a file is missing.
    """
    from taught.study.load import load_study
    from taught.study.schema import Study

    given = question.values()
    if source is not None:
        study = load_study(source)
    else:
        missing = {"model.id": "--model", "examples.path": "--pairs", "prompts.path": "--prompts"}
        lacking = [flag for key, flag in missing.items() if key not in given]
        if lacking:
            raise UserError(
                "nothing says what to run on",
                value="missing: " + ", ".join(lacking),
                rule="a study, or --model, --pairs (or --documents) and --prompts",
                fix="for example: taught run --model MODEL --pairs PAIRS --prompts PROMPTS",
            )
        study = Study(name=Path(given["examples.path"]).stem)
    given |= dict(map(parse_set, question.set))
    for key in sorted(given, key=lambda key: key.count(".")):  # a method before its parameters: it begins without any
        study = study.replace(key, given[key])
    if question.tuned is not None:
        study = _where_it_ended(study, question.tuned, given)
    study.require_files()
    quiet_libraries()
    if not study.on_the_hub():
        os.environ["HF_HUB_OFFLINE"] = "1"  # everything is local: nothing may go out
    return study


def _where_it_ended(study: Study, tuned: str, given: dict[str, Any]) -> Study:
    """The study with its influence at the tuned model."""
    key = "attribution.trajectory"
    said = sorted(name for name in given if name == key or name.startswith(f"{key}."))
    if said:
        what, rule = "--tuned says where influence is taken, and --set does too", "one of them"
        raise UserError(what, value=", ".join(said), rule=rule, fix="leave out --tuned, or the --set")
    checkpoint = {"id": tuned, "lr": study.attribution.lr}
    study = study.replace(key, {"kind": "checkpoints", "checkpoints": [checkpoint]})
    if "attribution.curvature" in given or study.attribution.curvature.kind != "identity":
        return study
    return study.replace("attribution.curvature", "ekfac")


def parse_set(text: str) -> tuple[str, Any]:
    """Key and value of a ``--set``."""
    from taught.study.load import parse_yaml

    key, separator, value = text.partition("=")
    if not separator:
        raise UserError("--set needs a key and a value", value=text, fix="for example: --set policy.alpha=3")
    try:
        return key.strip(), parse_yaml(value)
    except ValueError as error:
        what = "the value of --set is not valid YAML"
        raise UserError(what, value=f"{text[:100]}: {error}", fix="put it in quotes") from None


def run_folder(source: str | None, study: Study, where: Where) -> RunFolder:
    """The run folder of a command; a study that is named by its run folder is worked on there."""
    from taught.run.folder import RunFolder
    from taught.run.manifest import NAME
    from taught.stages import BY_NAME, require_stage

    inside = source is not None and os.path.isfile(os.path.join(source, NAME))
    default = Path(source) if inside and source is not None else Path("runs") / study.name
    fresh = tuple(BY_NAME) if "all" in where.fresh else tuple(map(require_stage, where.fresh))
    return RunFolder(where.run or default, fresh=fresh, command=_typed())


def open_run(path: Path) -> RunFolder:
    """A run folder that is there; says which stages another version of the code made."""
    from taught.run.folder import RunFolder

    run = RunFolder.open(path)
    run.command = _typed()
    for stage, code in run.made_by_other_code().items():
        say(f"note: {stage} was made by another version of the code: {code}", err())
    return run


def _typed() -> str:
    return shlex.join(["taught", *sys.argv[1:]])
