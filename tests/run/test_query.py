"""Questions in SQL to a run: the right rows, one SELECT and nothing else, mistakes said with exit code 2."""

from __future__ import annotations

import csv
import io
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from synthetic_run import Size, build_synthetic_run
from taught.cli.app import run_command
from taught.errors import UserError
from taught.run import query
from taught.stages import STAGES


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return build_synthetic_run(tmp_path_factory.mktemp("it's a query") / "run", Size(examples=30))


# SQL


def test_every_table_is_a_view_that_can_be_counted(run):
    listed = query.tables(run).to_pylist()
    on_disk = {path.stem for path in run.glob("*.parquet")}
    assert {row["view"] for row in listed} == on_disk
    assert all(row["about"] for row in listed)
    for row in listed:
        counted = query.select(run, f"SELECT count(*) AS n FROM {row['view']}")
        assert counted.to_pydict() == {"n": [row["rows"]]}
    assert "se double" in {row["view"]: row["columns"] for row in listed}["scores"]


def test_every_table_that_a_stage_can_write_is_described_and_can_be_named(tmp_path):
    """A new table of a stage that nobody described, or whose name SQL keeps for itself, is seen."""
    about = {file.removesuffix(".parquet"): what for stage in STAGES for file, what in stage.writes.items()}
    names = {name for name in about if "." not in name}
    assert len({about[name] for name in names}) == len(names)
    path = tmp_path / "one.parquet"
    pq.write_table(pa.table({"a": [1]}), path)
    with query._connected(dict.fromkeys(names, path), 1.0) as connection:
        for name in names:
            assert connection.sql(f"SELECT a FROM {name}").fetchall() == [(1,)]


def test_tables_of_stages_that_have_not_run_are_no_views(tmp_path):
    run = build_synthetic_run(tmp_path / "run", stages=("policy",))
    assert "summary" not in query.tables(run)["view"].to_pylist()
    with pytest.raises(UserError, match="summary"):
        query.select(run, "SELECT * FROM summary")


@pytest.mark.parametrize(
    "sql",
    [
        "selec 1",
        "",
        "SELECT 1; SELECT 2",
        "SELECT nothing FROM summary",
        "SELECT * FROM readouts",
        "COPY summary TO '{run}/summary.parquet'",
        "CREATE TABLE mine AS SELECT 1",
        "DROP VIEW summary",
        "SET memory_limit = '100GB'",
        "PRAGMA database_list",
        "ATTACH '{run}/mine.db'",
        "INSTALL httpfs",
        "LOAD httpfs",
        "EXPLAIN ANALYZE COPY summary TO '{run}/mine.csv'",
        "SELECT * FROM read_csv('/etc/hosts')",
        "SELECT * FROM read_text('{run}/manifest.json')",
        "SELECT * FROM '{run}/readouts.safetensors'",
        "SELECT * FROM glob('{run}/*')",
        "SELECT * FROM 'https://example.org/a.parquet'",
        "SELECT * FROM table_of_the_caller",
    ],
)
def test_invariant_10_a_query_is_one_select_over_the_runs_tables(run, sql):
    table_of_the_caller = query.tables(run)
    assert table_of_the_caller.num_rows
    before = {file.name: file.read_bytes() for file in run.iterdir()}
    with pytest.raises(UserError) as caught:
        query.select(run, sql.format(run=str(run).replace("'", "''")))
    assert caught.value.exit_code == 2
    assert {file.name: file.read_bytes() for file in run.iterdir()} == before


def test_a_query_that_does_not_fit_into_memory_says_so(run):
    sql = "SELECT a.range + b.range AS n FROM range(5000) a, range(5000) b ORDER BY hash(n)"
    with pytest.raises(UserError, match=r"needs more memory(.|\n)*0\.05 GB"):
        query.select(run, sql, memory_gb=0.05)


# Mistakes


def test_a_table_of_another_size_is_refused(tmp_path):
    run = build_synthetic_run(tmp_path / "run")
    with open(run / "summary.parquet", "ab") as file:
        file.write(b"x")
    with pytest.raises(UserError, match=r"summary\.parquet has changed"):
        query.select(run, "SELECT 1")


def test_a_folder_that_duckdb_takes_for_a_pattern_is_refused(tmp_path):
    run = build_synthetic_run(tmp_path / "run[1]")
    with pytest.raises(UserError, match="pattern"):
        query.select(run, "SELECT 1")


def test_without_duckdb_the_extra_is_named(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "duckdb", None)
    with pytest.raises(UserError, match=r"taught\[query\]"):
        query.select(run, "SELECT 1")


# The command


def test_a_slow_query_shows_no_progress_on_standard_output(run):
    shown = query.select(run, "SELECT current_setting('enable_progress_bar') AS shown")
    assert shown.to_pydict() == {"shown": [False]}


def test_a_long_answer_is_cut_on_the_terminal_only(run, capsys):
    sql = "SELECT range AS n FROM range(1000)"
    assert run_command(["show", str(run), sql]) == 0
    assert "800 more rows; --csv has all" in capsys.readouterr().out
    assert run_command(["show", str(run), sql, "--csv"]) == 0
    assert capsys.readouterr().out.splitlines() == ["n", *map(str, range(1000))]


def test_lists_are_json_in_csv(run, capsys):
    sql = "SELECT intended FROM summary ORDER BY example_id LIMIT 1"
    assert run_command(["show", str(run), sql, "--csv"]) == 0
    _, line = csv.reader(io.StringIO(capsys.readouterr().out))
    assert line == [str(pq.read_table(run / "summary.parquet")["intended"][0].as_py())]


def test_text_from_data_cannot_steer_the_terminal(tmp_path, capsys):
    run = build_synthetic_run(tmp_path / "run", hostile=True)
    assert run_command(["show", str(run), "SELECT example_id FROM examples"]) == 0
    words = capsys.readouterr().out
    assert "\x1b[31m" not in words and "\ufffd[31mred" in words
