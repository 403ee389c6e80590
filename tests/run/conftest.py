"""Runs that are killed: ``kill9.py`` as a fixture, and a study for it."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tiny_study import write_tiny_study

TESTS = Path(__file__).parents[1]


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
def few_prompts(tmp_path) -> Path:
    """Few prompts: an attempt takes half the time, and goes through as many files and pieces."""
    path = write_tiny_study(tmp_path / "study")
    path.write_text(path.read_text().replace("prompts.jsonl,", "prompts.jsonl, limit: 12,"))
    return path
