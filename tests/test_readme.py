"""The README's own lines: the Python runs as it stands, and says what the README says."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

README = (Path(__file__).parents[1] / "README.md").read_text(encoding="utf-8")


def test_it_is_short_enough_for_three_minutes():
    assert len(README.splitlines()) <= 150


@pytest.mark.slow  # the real model
def test_the_lines_of_python_run_and_say_what_stands_beside_them():
    (block,) = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    assert len([line for line in block.splitlines() if line.strip()]) <= 15
    names: dict = {}
    exec(compile(block.replace("scores.to_pandas()", "scores.to_arrow()"), "README.md", "exec"), names)
    scores = names["scores"]
    said = re.search(r"scores\.top\(1\)\s*# \[\('(\w+)', ([\d.]+)\.\.\.\)\]", block)
    assert said is not None
    ((example_id, value),) = scores.top(1)
    assert example_id == said[1] and f"{value:.4f}".startswith(said[2])
    assert scores["behavior:harmless"].shape == (2,)
