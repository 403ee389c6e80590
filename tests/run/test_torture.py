"""Invariant 9: killed with kill -9 at any moment, a run started again ends as if never stopped."""

from __future__ import annotations

import os
import sys

import pytest

from same_runs import assert_the_same

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="children are forked")


@pytest.mark.timeout(900)
@pytest.mark.slow  # minutes: 25 attempts and the runs that they end in, seconds each
def test_invariant_9_killed_at_random_moments(kill9, few_prompts, tmp_path):
    assert kill9("moments", str(few_prompts), str(tmp_path), "25") == 25
    others = sorted(tmp_path.glob("killed-*"))
    assert others
    for other in others:
        assert_the_same(tmp_path / "whole", other)


@pytest.mark.timeout(900)
@pytest.mark.slow  # a minute: a run for each
@pytest.mark.skipif(sys.platform != "linux", reason="elsewhere the size of the address space is not limited")
def test_memory_that_runs_out_is_said_and_nothing_is_lost(kill9, few_prompts, tmp_path):
    """What ends otherwise than with an error that names the memory (or in the C library) fails ``kill9.py``."""
    assert kill9("memory", str(few_prompts), str(tmp_path), "20") == 20
    for other in sorted(tmp_path.glob("killed-*")):
        assert_the_same(tmp_path / "whole", other)
