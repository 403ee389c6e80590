"""How far a long computation is: a small protocol, shown as bars, as lines, or not at all."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import TYPE_CHECKING, Protocol, Self

from taught.errors import printable

if TYPE_CHECKING:
    from rich.console import Console

EVERY = 10.0  # seconds between two lines


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


class LineProgress:
    """Plain lines, where the output is no terminal; a context manager.

    A step is a line when it begins; while it goes on there is a line at least every ten seconds, with
    the share that is done and the time that is left.
    """

    def __init__(self, console: Console, clock: Callable[[], float] = time.monotonic) -> None:
        from threading import Event, Thread

        self._console, self._clock = console, clock
        self._name, self._done = "", 0
        self._total: int | None = None
        self._began = self._said = clock()
        self._ended = Event()
        self._ticker = Thread(target=self._tick, daemon=True)

    def step(self, name: str, total: int | None = None) -> None:
        """Begin a step."""
        self._name, self._total, self._done, self._began = name, total, 0, self._clock()
        self.note(name if total is None else f"{name} ({total})")

    def note(self, text: str) -> None:
        """Say something."""
        self._said = self._clock()
        self._console.print(printable(text), markup=False, highlight=False, soft_wrap=True)

    def advance(self, n: int = 1) -> None:
        """Go on; the line is said when its time has come."""
        self._done += n
        self.tell()

    def tell(self) -> None:
        """Say how far the step is, unless something was said in the last seconds."""
        now = self._clock()
        if not self._name or now - self._said < EVERY:
            return
        spent = now - self._began
        if not self._total:
            said = f"{_duration(spent)} so far"
        elif not self._done:
            said = f"0% of {self._total}, {_duration(spent)} so far"
        else:
            left = spent * max(self._total - self._done, 0) / self._done
            said = f"{self._done / self._total:.0%} of {self._total}, about {_duration(left)} left"
        self.note(f"{self._name}: {said}")

    def _tick(self) -> None:
        while not self._ended.wait(1.0):
            self.tell()

    def __enter__(self) -> Self:
        self._ticker.start()
        return self

    def __exit__(self, *error: object) -> None:
        self._ended.set()
        self._ticker.join()


def _duration(seconds: float) -> str:
    return f"{seconds:.0f} s" if seconds < 99.5 else f"{seconds / 60:.0f} min"


class RichProgress:
    """One bar per step with elapsed and remaining time, on a terminal; a context manager.

    Parameters
    ----------
    console
        Where to draw; the command-line tool gives the one on standard error.
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
        )

    def step(self, name: str, total: int | None = None) -> None:
        """Begin a step; the one before it is shown as finished."""
        self._finish()
        self._total = total
        self._task = self._bars.add_task(name, total=total)

    def note(self, text: str) -> None:
        """Say something that stays."""
        self._console.print(printable(text), markup=False, highlight=False, soft_wrap=True)

    def advance(self, n: int = 1) -> None:
        """Move the bar of the current step."""
        if self._task is not None:
            self._bars.advance(self._task, n)

    def __enter__(self) -> Self:
        self._bars.start()
        return self

    def __exit__(self, kind: object, error: object, traceback: object) -> None:
        if error is None:
            self._finish()
        self._bars.stop()

    def _finish(self) -> None:
        if self._task is not None:
            total = 1 if self._total is None else self._total
            self._bars.update(self._task, total=total, completed=total)
            self._task = None
