"""A stage in one place: what it needs, what of the study it reads, what it writes.

The order of a run, what a result depends on, which command makes a file, the table of files in
docs/formats.md and what ``taught run`` does follow from these (:data:`taught.stages.STAGES`).
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from taught.progress import Progress
    from taught.run.folder import RunFolder
    from taught.study.schema import Study


@dataclass(frozen=True)
class Stage:
    """One stage; its function is ``taught.stages.NAME.NAME(study, run, progress)``.

    Attributes
    ----------
    name : as commands and the manifest have it
    what : what it does, in one line
    writes : file -> what it holds, in one line
    needs : stages before it, of which those count that the study asks for
    uses : stages that it reads where they are there
    reads : sections and keys of the study that its result depends on
    code : further modules that its numbers come from, beside those that its own module imports and
        those of the methods that the study names
    asked : whether a study asks for it
    light : it reads nothing but the run folder and takes seconds, so it is always made again
    remade : always made again
    trains : trains models: it runs only where it is named
    """

    name: str
    what: str
    writes: Mapping[str, str]
    needs: tuple[str, ...] = ()
    uses: tuple[str, ...] = ()
    reads: tuple[str, ...] = ()
    code: tuple[str, ...] = ()
    asked: Callable[[Study], bool] = field(default=lambda study: True)
    light: bool = False
    remade: bool = False
    trains: bool = False

    @property
    def module(self) -> str:
        """The module of its function."""
        return f"taught.stages.{self.name}"

    def __call__(self, study: Study, run: RunFolder, progress: Progress | None = None) -> Any:
        """Run the stage."""
        return getattr(importlib.import_module(self.module), self.name)(study, run, progress)

    def depends_on(self, key: str) -> bool:
        """Whether the result depends on this key of the study."""
        return any(key == read or key.startswith(f"{read}.") for read in self.reads)


def file_table(stages: tuple[Stage, ...]) -> str:
    """The files of a run folder as a Markdown table, as it stands in docs/formats.md."""
    rows = [f"| `{name}` | {stage.name} | {what} |" for stage in stages for name, what in stage.writes.items()]
    return "\n".join(["| file | stage | content |", "|---|---|---|", *rows])
