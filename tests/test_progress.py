"""Progress where the output is no terminal: plain lines, at least every ten seconds."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from taught.progress import EVERY, LineProgress


class Clock:
    """A clock that tests move."""

    now = 100.0

    def __call__(self) -> float:
        return self.now


@pytest.fixture
def lines():
    clock, out = Clock(), io.StringIO()
    progress = LineProgress(Console(file=out, width=200), clock)

    def said() -> list[str]:
        found = out.getvalue().splitlines()
        out.seek(0)
        out.truncate()
        return found

    return progress, clock, said


def test_a_step_is_a_line_and_then_one_every_ten_seconds_with_what_is_left(lines):
    progress, clock, said = lines
    progress.step("gradients", 40)
    assert said() == ["gradients (40)"]
    for _ in range(10):
        clock.now += 2
        progress.advance()
    assert said() == ["gradients: 12% of 40, about 70 s left", "gradients: 25% of 40, about 60 s left"]


def test_what_makes_no_progress_is_said_to_go_on(lines):
    progress, clock, said = lines
    progress.step("load the model")
    said()
    for _ in range(30):
        clock.now += 1
        progress.tell()  # as the thread beside the work does
    assert said() == [f"load the model: {10 * i} s so far" for i in (1, 2, 3)]
    progress.step("prompts", 3)
    clock.now += EVERY
    progress.tell()
    assert said() == ["prompts (3)", "prompts: 0% of 3, 10 s so far"]


def test_text_is_shown_as_it_is(lines):
    progress, _, said = lines
    progress.note("[bold]id[/bold] = {id}")
    assert said() == ["[bold]id[/bold] = {id}"]


def test_the_thread_ends_with_the_work():
    with LineProgress(Console(file=io.StringIO())) as progress:
        ticker = progress._ticker
        assert ticker.is_alive()
    assert not ticker.is_alive()
