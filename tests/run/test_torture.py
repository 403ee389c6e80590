"""Invariant 9: killed with kill -9 at any moment, a run started again ends as if never stopped."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from taught.run.folder import RunFolder
from tiny_study import write_tiny_study

TESTS = Path(__file__).parents[1]

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="children are forked")


@pytest.fixture
def kill9(tmp_path):
    """Run ``kill9.py``; how often it killed."""

    def run(*args: str) -> int:
        paths = os.pathsep.join([str(TESTS.parent / "src"), str(TESTS)])
        env = os.environ | {"PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
        done = subprocess.run(
            [sys.executable, str(TESTS / "kill9.py"), *args], cwd=tmp_path, env=env, capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return json.loads(done.stdout.splitlines()[-1])["kills"]

    return run


@pytest.fixture
def study(tmp_path) -> Path:
    """Few prompts: an attempt takes half the time, and goes through as many files and pieces."""
    path = write_tiny_study(tmp_path / "study")
    path.write_text(path.read_text().replace("prompts.jsonl,", "prompts.jsonl, limit: 12,"))
    return path


def contents(folder: Path) -> dict[str, bytes]:
    """Every file of a run, without the times that are written down in two of them."""
    found = {file.name: file.read_bytes() for file in folder.iterdir() if file.is_file()}
    page = found["report.html"].decode()
    provenance = r'<section id="provenance".*?</section>'
    found["report.html"] = re.sub(provenance, "", page, flags=re.DOTALL).encode()
    del found["manifest.json"], found[".lock"]
    return found


def assert_the_same(whole: Path, other: Path) -> None:
    """Bit for bit, with nothing left over and a manifest that says so."""
    expected, found = contents(whole), contents(other)
    assert sorted(found) == sorted(expected)
    assert [name for name in found if found[name] != expected[name]] == []
    assert not (other / "partial").exists()
    ended, never_stopped = RunFolder.open(other).manifest, RunFolder.open(whole).manifest
    assert ended["stages"].keys() == never_stopped["stages"].keys()
    assert {record["status"] for record in ended["stages"].values()} == {"complete"}
    assert ended["inputs"] == never_stopped["inputs"]
    for name, listed in never_stopped["files"].items():
        assert name == "report.html" or ended["files"][name] == listed
    RunFolder.open(other).verify()


@pytest.mark.timeout(900)
@pytest.mark.slow  # minutes: fifty attempts and the runs that they end in, seconds each
def test_invariant_9_killed_at_random_moments(kill9, study, tmp_path):
    assert kill9("moments", str(study), str(tmp_path), "50") == 50
    others = sorted(tmp_path.glob("killed-*"))
    assert others
    for other in others:
        assert_the_same(tmp_path / "whole", other)


@pytest.mark.timeout(900)
@pytest.mark.slow  # a minute: a run for each
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the size of the address space is not limited")
def test_memory_that_runs_out_is_said_and_nothing_is_lost(kill9, study, tmp_path):
    """What ends otherwise than with an error that names the memory (or in the C library) fails ``kill9.py``."""
    assert kill9("memory", str(study), str(tmp_path), "20") == 20
    for other in sorted(tmp_path.glob("killed-*")):
        assert_the_same(tmp_path / "whole", other)


@pytest.mark.slow  # a minute alone, at the end of all others: a file of few tests comes last
def test_invariant_9_killed_at_every_change_of_the_disk(kill9, tmp_path):
    """The run folder's part: the stages write made-up numbers, so that every call has its turn."""
    kills = kill9("made-up", str(tmp_path))
    assert kills > 150
    assert_the_same(tmp_path / "whole", tmp_path / "killed-0")


@pytest.mark.timeout(900)
@pytest.mark.slow  # a minute or two: what an attempt does not find finished is computed anew in each
def test_invariant_9_killed_at_every_fifth_change_of_the_disk_for_real(kill9, study, tmp_path):
    """A file and the manifest take six changes, so that each of the six has its turn."""
    assert kill9("real", str(study), str(tmp_path), "5") > 30
    assert_the_same(tmp_path / "whole", tmp_path / "killed-0")
