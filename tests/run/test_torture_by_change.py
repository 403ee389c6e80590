"""Invariant 9 once more: killed at every change of the disk. A file of its own, so that another process runs it."""

from __future__ import annotations

import os

import pytest

from same_runs import assert_the_same

pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="children are forked")


@pytest.mark.slow  # a minute alone, at the end of all others: a file of few tests comes last
def test_invariant_9_killed_at_every_change_of_the_disk(kill9, tmp_path):
    """The run folder's part: the stages write made-up numbers, so that every call has its turn."""
    kills = kill9("made-up", str(tmp_path))
    assert kills > 150
    assert_the_same(tmp_path / "whole", tmp_path / "killed-0")


@pytest.mark.timeout(900)
@pytest.mark.slow  # a minute or two: what an attempt does not find finished is computed anew in each
def test_invariant_9_killed_at_every_eleventh_change_of_the_disk_for_real(kill9, few_prompts, tmp_path):
    """A file and the manifest take six changes: 11 gives each of the six its turn. Every change is tried above."""
    assert kill9("real", str(few_prompts), str(tmp_path), "11") > 14
    assert_the_same(tmp_path / "whole", tmp_path / "killed-0")
