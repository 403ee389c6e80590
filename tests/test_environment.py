"""What a run records about the machine."""

from __future__ import annotations

import sys

import pytest

PARENT = """
import subprocess, sys
held = b"x" * 400_000_000
child = "from taught.environment import peak_memory_gb; print(peak_memory_gb())"
print(subprocess.run([sys.executable, "-c", child], capture_output=True, text=True).stdout)
"""


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="Linux says it per process")
def test_peak_memory_is_that_of_the_process_and_not_of_its_parent(python) -> None:
    done = python("-c", PARENT)
    assert 0.005 < float(done.stdout) < 0.3, done.stderr
