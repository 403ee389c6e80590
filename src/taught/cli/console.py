"""What a command says, and where: results to standard output, the rest to standard error."""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING

from taught.errors import printable

if TYPE_CHECKING:
    from rich.console import Console

    from taught.progress import Progress
    from taught.run.folder import RunFolder


def out() -> Console:
    """Standard output."""
    return _console()


def err() -> Console:
    """Standard error."""
    return _console(stderr=True)


def _console(stderr: bool = False) -> Console:
    """A console that sends no control character but its own: ids, labels and file names come from data."""
    from rich.console import Console, ConsoleOptions, RenderableType
    from rich.segment import Segment

    class Plain(Console):
        def render(self, renderable: RenderableType, options: ConsoleOptions | None = None) -> Iterator[Segment]:
            for part in super().render(renderable, options):
                yield part if part.control else Segment(printable(part.text), part.style)

    return Plain(stderr=stderr)


def say(text: str, console: Console | None = None) -> None:
    """A line as it is: no markup, no colors, no breaks."""
    (console or out()).print(text, markup=False, highlight=False, soft_wrap=True)


def complain(message: str, fix: str | None = None) -> None:
    """An error."""
    say(f"error: {message.strip()}" + (f"\n  fix:   {fix}" if fix else ""), err())


def say_written(run: RunFolder, names: Sequence[str]) -> None:
    """The paths of those files that the run has."""
    for name in names:
        if name in run.manifest["files"]:
            say(str(run.path(name)))


def cost(run: RunFolder) -> str:
    """Time of the stages and the largest memory of the process that ran them."""
    used = {stage: record for stage, record in run.manifest["stages"].items() if "seconds" in record}
    parts = [f"{stage} {record['seconds']:.1f} s" for stage, record in used.items()]
    memory = max(record["peak_memory_gb"] or 0.0 for record in used.values())
    return ", ".join(parts) + f", peak memory {memory:.1f} GB"


@contextmanager
def progress_on(quiet: bool) -> Iterator[Progress]:
    """Bars on a terminal, plain lines elsewhere, nothing if quiet."""
    from taught.progress import LineProgress, RichProgress, SilentProgress

    console = err()
    if quiet:
        yield SilentProgress()
        return
    with RichProgress(console) if console.is_terminal else LineProgress(console) as shown:
        yield shown


def quiet_libraries() -> None:
    """Before transformers is imported: no bars and advice of its own, no telemetry."""
    os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
    os.environ.setdefault("HF_HUB_DISABLE_PROGRESS_BARS", "1")
    os.environ.setdefault("TQDM_DISABLE", "1")  # of the conversion of a GGUF file
    os.environ["HF_HUB_DISABLE_TELEMETRY"] = "1"
