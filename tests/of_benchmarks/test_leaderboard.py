"""Results as a table: of one target with its interval, of several their median."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.fixture
def tool(monkeypatch, tmp_path):
    monkeypatch.syspath_prepend(str(ROOT))
    import benchmarks.leaderboard

    def row(method, target, LDS, order=0):
        return {"method": method, "target": target, "order": order, "LDS": LDS, "lo": 0.1, "hi": 1.0, "controlled": 0.5}

    rows = [row("magic", f"coefficient:{j}", value) for j, value in enumerate((0.9, 0.2, 0.7))]
    rows += [row("magic", "score", 0.8), row("magic", "score", -0.3, order=1), row("label", "score", 0.4)]
    away = {"method": "magic", "order": 0, "difference": -1.234, "lo": -2.0, "hi": 0.5}
    (tmp_path / "first.json").write_text(json.dumps({"rows": rows, "removed": [away]}))
    (tmp_path / "second.json").write_text(json.dumps({"rows": [row("magic", "score", 0.1)]}))
    monkeypatch.setattr(benchmarks.leaderboard, "RESULTS", tmp_path)
    regimes = {"run": (("first", "second", "not made"), 0), "other": (("first",), 1), "empty": (("not made",), 0)}
    monkeypatch.setattr(benchmarks.leaderboard, "REGIMES", regimes)
    return benchmarks.leaderboard


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            ["--target", "score"],
            [
                "| method | run | other |",
                "|---|---|---|",
                "| steps (MAGIC) | .80 [.10, 1.00]; .50 | -.30 [.10, 1.00]; .50 |",  # of two files the first
                "| labels: refusals | .40 [.10, 1.00] |  |",  # not given itself
            ],
        ),
        (["--target", "coefficients"], ["| method | run |", "|---|---|", "| steps (MAGIC) | .70, .20 to .90; .50 |"]),
        (["--removed"], ["| method | run |", "|---|---|", "| steps (MAGIC) | -1.23 [-2.00, +0.50] |"]),
    ],
)
def test_a_row_for_each_method_and_a_column_for_each_regime_that_has_any(tool, monkeypatch, capsys, options, expected):
    monkeypatch.setattr("sys.argv", ["leaderboard", *options])
    tool.main()
    assert capsys.readouterr().out.splitlines() == expected
