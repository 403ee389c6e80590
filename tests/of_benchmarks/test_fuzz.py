"""Damaged and hostile files end in a UserError: a few hundred of each kind; ``benchmarks.fuzz`` runs more."""

from __future__ import annotations

import os
from itertools import count

import pytest
from benchmarks import fuzz

from taught.errors import UserError

# Loading a model or an adapter takes longer: `benchmarks.fuzz` alone runs it.
QUICK = [name for name, reader in fuzz.READERS.items() if reader.share == 1]


@pytest.mark.parametrize("name", QUICK)
def test_a_reader_takes_a_file_or_refuses_it_and_does_nothing_else(name):
    (found,) = fuzz.fuzz([name], 150, seed=1)
    assert found.failures == []
    assert found.executions == 150
    assert found.counts["accepted"] and found.counts["refused"]


def broken(read) -> list[str]:
    """What is said of a reader that does this with a file."""
    fuzz.READERS["broken"] = fuzz.Reader(fuzz.make_labels, read)
    try:
        (found,) = fuzz.fuzz(["broken"], 1)
    finally:
        del fuzz.READERS["broken"]
    return found.failures


def test_what_a_reader_must_not_do_is_seen(tmp_path, monkeypatch):
    monkeypatch.setattr(fuzz, "SECONDS", 1)

    def defect(*_):
        raise ValueError("a defect")

    def steer(*_):
        error = UserError("x")
        error.args = ("\x1b[2J",)
        raise error

    def spin(*_):
        while True:
            pass

    assert "ValueError: a defect" in broken(defect)[0]
    assert "not plain" in broken(steer)[0]
    assert "more than 1 s" in broken(spin)[0]
    assert "outside of the working folder" in broken(lambda *_: (tmp_path / "x").write_text("a"))[0]
    assert "os.system" in broken(lambda *_: os.system("true"))[0]
    assert broken(lambda folder, name: (folder / "y").write_text("a")) == []
    monkeypatch.setattr(fuzz, "peak_bytes", count(0, 2**31).__next__)  # two more each time
    assert "GB" in broken(lambda *_: None)[0]
