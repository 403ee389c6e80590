"""The stage ``concepts``: the directions that a study names, each with its card."""

from __future__ import annotations

import dataclasses
from pathlib import Path

from taught.features.concept import load_concept
from taught.progress import Progress
from taught.run.folder import RunFolder
from taught.stages.concept import ConceptRequest, concept
from taught.study.schema import ConceptSpec, Study


def concepts(study: Study, run: RunFolder, progress: Progress | None = None) -> None:
    """Make the concepts of a study in the folder ``concepts`` of the run, or read saved ones.

    Raises
    ------
    UserError
        As :func:`taught.stages.concept.concept`; a saved concept is of another model.
    """
    with run.stage("concepts", study) as stage:
        if stage.done:
            return
        made = {spec.name: _folder(study, run, spec, progress) for spec in study.concepts}
        records = [{"name": name, "folder": str(folder), **_card(folder)} for name, folder in made.items()]
        run.write_json("concepts", {"concepts": records})


def _folder(study: Study, run: RunFolder, spec: ConceptSpec, progress: Progress | None) -> Path:
    if spec.path is not None:
        return Path(spec.path)
    given = {item.name: getattr(spec, item.name) for item in dataclasses.fields(ConceptRequest)}
    given["examples"] = Path(spec.examples) if spec.examples is not None else None
    folder = run.path("concepts") / spec.name
    concept(study, folder, ConceptRequest(**given), progress)
    return folder


def _card(folder: Path) -> dict[str, object]:
    concept = load_concept(folder)
    return {name: getattr(concept, name) for name in ("block", "position", "tokens", "weights", "provenance", "card")}
