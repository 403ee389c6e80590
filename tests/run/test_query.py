"""``taught query``: the right rows, one SELECT and nothing else, mistakes said with exit code 2."""

from __future__ import annotations

import csv
import io
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from taught.report.view import load_view

from synthetic_run import LABELS, Size, build_synthetic_run
from taught.cli.app import run_command
from taught.errors import UserError
from taught.run import query
from taught.run.folder import _WRITTEN_BY


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return build_synthetic_run(tmp_path_factory.mktemp("it's a query") / "run", Size(examples=30))


@pytest.fixture(scope="module")
def view(run):
    return load_view(run)


def strongest(example_ids, values, top: int) -> list[tuple[str, float]]:
    order = sorted(range(len(example_ids)), key=lambda i: (-abs(values[i]), example_ids[i]))
    return [(example_ids[i], values[i]) for i in order[:top]]


def asked(table) -> list[tuple[str, float]]:
    return list(zip(table["example_id"].to_pylist(), table["value"].to_pylist(), strict=True))


def same_ranking(found: list[tuple[str, float]], expected: list[tuple[str, float]]) -> None:
    """The same examples with the same values, up to the order of the sums that made these."""
    assert [example for example, _ in found] == [example for example, _ in expected]
    assert [v for _, v in found] == pytest.approx([v for _, v in expected], rel=1e-9)


# Ready-made


@pytest.mark.parametrize("pathway", [None, "x", "y", "total"])
def test_top_examples_by_score(run, view, pathway):
    table = query.top_examples(run, 7, pathway=pathway)
    assert table.column_names == ["example_id", "label", "value", "se"]
    column = "score" if pathway in (None, "total") else f"score_{pathway}"
    rows = {r["example_id"]: r for r in view.summary}
    expected = strongest(list(rows), [r[column] for r in view.summary], 7)
    same_ranking(asked(table), expected)
    assert table["label"].to_pylist() == [rows[p]["label"] for p in table["example_id"].to_pylist()]


@pytest.mark.parametrize("label", [None, LABELS[1]])
def test_top_examples_of_a_coefficient(run, view, label):
    feature = view.shifts.feature_ids[4]
    labels = {r["example_id"]: r["label"] for r in view.summary}
    places = [i for i, p in enumerate(view.shifts.example_ids) if label in (None, labels[p])]
    table = query.top_examples(run, 5, feature=feature, pathway="x", label=label)
    examples = [view.shifts.example_ids[i] for i in places]
    assert asked(table) == strongest(examples, [view.shifts.x[i, 4] for i in places], 5)
    assert query.top_examples(run, 100, feature=feature, label=label).num_rows == len(places)


def test_top_examples_by_the_mean_of_a_group(run, view):
    table = query.top_examples(run, 4, group="harmless")
    values = [r["mean_y_harmless"] for r in view.summary]
    same_ranking(asked(table), strongest([r["example_id"] for r in view.summary], values, 4))


def test_quantiles_by_label(run, view):
    rows = [r for r in query.quantiles(run).to_pylist() if r["target"] == "score"]
    assert {(r["pathway"], r["label"]) for r in rows} == {(p, label) for p in query.PATHWAYS for label in LABELS}
    for row in rows:
        column = "score" if row["pathway"] == "total" else f"score_{row['pathway']}"
        own = [r[column] for r in view.summary if r["label"] == row["label"]]
        assert row["n"] == len(own)
        found = [row[f"q{q:g}"] for q in query.QUANTILES]
        assert found == pytest.approx(np.quantile(own, query.QUANTILES).tolist())
    feature = view.shifts.feature_ids[0]
    (one, *_) = query.quantiles(run, feature=feature).to_pylist()
    assert (one["target"], one["feature_id"]) == ("coefficient", feature)


# SQL


def test_every_table_is_a_view_that_can_be_counted(run):
    listed = query.tables(run).to_pylist()
    on_disk = {path.stem for path in run.glob("*.parquet")}
    assert {row["view"] for row in listed} == on_disk
    assert all(row["about"] == query.ABOUT[row["view"]] for row in listed)
    for row in listed:
        counted = query.select(run, f"SELECT count(*) AS n FROM {row['view']}")
        assert counted.to_pydict() == {"n": [row["rows"]]}
    assert "se double" in {row["view"]: row["columns"] for row in listed}["influence"]


def test_every_table_that_a_stage_can_write_is_described_and_can_be_named(tmp_path):
    """A new table of a stage that nobody described, or whose name SQL keeps for itself, is seen."""
    written = {file for files in _WRITTEN_BY.values() for file in files}
    names = {file.removesuffix(".parquet") for file in written if file.endswith(".parquet")}
    assert set(query.ABOUT) == names
    assert len(set(query.ABOUT.values())) == len(names)
    path = tmp_path / "one.parquet"
    pq.write_table(pa.table({"a": [1]}), path)
    with query._connected(dict.fromkeys(names, path), 1.0) as connection:
        for name in names:
            assert connection.sql(f"SELECT a FROM {name}").fetchall() == [(1,)]


def test_tables_of_stages_that_have_not_run_are_no_views(tmp_path):
    run = build_synthetic_run(tmp_path / "run", stages=("policy",))
    assert "summary" not in query.tables(run)["view"].to_pylist()
    with pytest.raises(UserError, match="attribute has not been run"):
        query.top_examples(run)


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


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"feature": -1}, "no such feature id"),
        ({"label": "x"}, "no such label"),
        ({"group": "x"}, "no such group"),
        ({"pathway": "z"}, "no such pathway"),
        ({"group": "harmful", "pathway": "x"}, "no such pathway"),
        ({"group": "harmful", "feature": 1}, "two questions"),
        ({"top": 0}, "at least one example"),
    ],
)
def test_what_is_not_there_is_named(run, arguments, message):
    with pytest.raises(UserError, match=message) as caught:
        query.top_examples(run, **arguments)
    assert caught.value.rule or caught.value.fix


def test_a_table_of_another_size_is_refused(tmp_path):
    run = build_synthetic_run(tmp_path / "run")
    with open(run / "summary.parquet", "ab") as file:
        file.write(b"x")
    with pytest.raises(UserError, match=r"summary\.parquet has changed"):
        query.select(run, "SELECT 1")


def test_a_folder_that_duckdb_takes_for_a_pattern_is_refused(tmp_path):
    run = build_synthetic_run(tmp_path / "run[1]")
    with pytest.raises(UserError, match="pattern"):
        query.top_examples(run)


def test_without_duckdb_the_extra_is_named(run, monkeypatch):
    monkeypatch.setitem(sys.modules, "duckdb", None)
    with pytest.raises(UserError, match=r"taught\[query\]"):
        query.top_examples(run)


# The command


def test_the_command_writes_csv_and_tables(run, view, capsys):
    feature = view.shifts.feature_ids[2]
    assert run_command(["query", str(run), "--feature", str(feature), "--csv"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    expected = strongest(view.shifts.example_ids, view.shifts.total[:, 2], query.TOP)
    assert [(r["example_id"], float(r["value"])) for r in rows] == expected
    assert rows[0]["se"] == ""
    for flags in ([], ["--top", "3"], ["--quantiles"], ["SELECT intended FROM summary"]):
        assert run_command(["query", str(run), *flags]) == 0
    words = capsys.readouterr().out
    assert (
        "influence" in words
        and strongest([r["example_id"] for r in view.summary], [r["score"] for r in view.summary], 1)[0][0] in words
    )


def test_a_slow_query_shows_no_progress_on_standard_output(run):
    shown = query.select(run, "SELECT current_setting('enable_progress_bar') AS shown")
    assert shown.to_pydict() == {"shown": [False]}


def test_a_long_answer_is_cut_on_the_terminal_only(run, capsys):
    sql = "SELECT range AS n FROM range(1000)"
    assert run_command(["query", str(run), sql]) == 0
    assert "800 more rows; --csv has all" in capsys.readouterr().out
    assert run_command(["query", str(run), sql, "--csv"]) == 0
    assert capsys.readouterr().out.splitlines() == ["n", *map(str, range(1000))]


def test_lists_are_json_in_csv(run, view, capsys):
    sql = "SELECT intended FROM summary ORDER BY example_id LIMIT 1"
    assert run_command(["query", str(run), sql, "--csv"]) == 0
    _, line = csv.reader(io.StringIO(capsys.readouterr().out))
    assert line == [str(view.summary[0]["intended"])]


@pytest.mark.parametrize(
    "flags",
    [
        ["SELECT 1", "--top", "3"],
        ["--quantiles", "--label", "x"],
        ["--quantiles", "--top", "3"],
        ["--pathway", "z"],
        ["--feature", "-1"],
        ["no sql"],
    ],
)
def test_mistakes_end_with_code_2_and_no_traceback(run, flags, capsys):
    assert run_command(["query", str(run), *flags]) == 2
    words = capsys.readouterr()
    assert "Traceback" not in words.err and not words.out


def test_text_from_data_cannot_steer_the_terminal(tmp_path, capsys):
    run = build_synthetic_run(tmp_path / "run", hostile=True)
    assert run_command(["query", str(run), "SELECT example_id FROM examples"]) == 0
    words = capsys.readouterr().out
    assert "\x1b[31m" not in words and "\ufffd[31mred" in words
