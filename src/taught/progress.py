"""How far a long computation is: a small protocol, shown by rich or not at all."""

from __future__ import annotations

from types import TracebackType
from typing import TYPE_CHECKING, Protocol, Self

if TYPE_CHECKING:
    from rich.console import Console


class Progress(Protocol):
    """What library functions report to; they never print."""

    def step(self, name: str, total: int | None = None) -> None:
        """Begin the step ``name`` of ``total`` units; the step before it has ended."""

    def note(self, text: str) -> None:
        """Say something that stays."""

    def advance(self, n: int = 1) -> None:
        """Report that ``n`` more units of the current step are done."""


class SilentProgress:
    """Shows nothing."""

    def step(self, name: str, total: int | None = None) -> None:
        """Begin a step."""

    def note(self, text: str) -> None:
        """Say something."""

    def advance(self, n: int = 1) -> None:
        """Go on."""


class RichProgress:
    """One bar per step with elapsed and remaining time; a context manager.

    Parameters
    ----------
    console
        Where to draw; the command-line tool gives the one on standard error. On a console that
        is no terminal each step is one line instead.
    """

    def __init__(self, console: Console) -> None:
        from rich import progress

        self._console = console
        self._task: progress.TaskID | None = None
        self._total: int | None = None
        self._bars = progress.Progress(
            progress.SpinnerColumn(finished_text="[green]✓[/green]"),
            progress.TextColumn("{task.description}"),
            progress.BarColumn(bar_width=24),
            progress.MofNCompleteColumn(),
            progress.TimeElapsedColumn(),
            progress.TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        )

    def step(self, name: str, total: int | None = None) -> None:
        """Begin a step; the one before it is shown as finished."""
        self._finish()
        self._total = total
        self._task = self._bars.add_task(name, total=total)
        if not self._console.is_terminal:
            self._console.print(name if total is None else f"{name} ({total})", highlight=False)

    def note(self, text: str) -> None:
        """Say something that stays."""
        self._console.print(text, markup=False, highlight=False, soft_wrap=True)

    def advance(self, n: int = 1) -> None:
        """Move the bar of the current step."""
        if self._task is not None:
            self._bars.advance(self._task, n)

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        if error is None:
            self._finish()
        self._bars.stop()

    def _finish(self) -> None:
        if self._task is not None:
            total = 1 if self._total is None else self._total
            self._bars.update(self._task, total=total, completed=total)
            self._task = None
