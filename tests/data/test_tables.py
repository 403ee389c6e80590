"""Reading and writing tables of rows."""

from __future__ import annotations

import json
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from taught.data.tables import open_table, read_rows, table_sha256, write_jsonl
from taught.errors import UserError

ROWS = [{"id": "a", "text": "one, “two”\nthree"}, {"id": "b", "text": "vier"}]


@pytest.fixture
def rows_in(tmp_path: Path):
    """Write ROWS in one format and return the path."""

    def write(kind: str) -> Path:
        path = tmp_path / f"rows.{kind}"
        if kind == "jsonl":
            path.write_text("\n".join(json.dumps(row) for row in ROWS) + "\n\n")
        elif kind == "json":
            path.write_text(json.dumps(ROWS, indent=1))
        elif kind == "csv":
            path.write_text('id,text\na,"one, “two”\nthree"\nb,vier\n', encoding="utf-8-sig")
        else:
            pq.write_table(pa.Table.from_pylist(ROWS), path)
        return path

    return write


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet"])
def test_every_format_gives_the_same_rows(rows_in, kind: str) -> None:
    assert read_rows(rows_in(kind)) == ROWS


def test_a_folder_saved_by_datasets_is_read_in_the_order_of_its_state(tmp_path: Path) -> None:
    for name, row in (("z.arrow", ROWS[0]), ("a.arrow", ROWS[1])):
        table = pa.Table.from_pylist([row])
        with pa.OSFile(str(tmp_path / name), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as w:
            w.write_table(table)
    state = {"_data_files": [{"filename": "z.arrow"}, {"filename": "a.arrow"}]}
    (tmp_path / "state.json").write_text(json.dumps(state))
    assert read_rows(tmp_path) == ROWS


def test_a_dataset_dict_names_its_splits(tmp_path: Path) -> None:
    (tmp_path / "train").mkdir()
    (tmp_path / "train" / "state.json").write_text("{}")
    with pytest.raises(UserError, match="name one split: train"):
        read_rows(tmp_path)


@pytest.mark.parametrize(
    ("names", "chosen"),
    [
        (("train", "test"), "train"),
        (("train-00000-of-00002", "train-00001-of-00002", "validation-00000-of-00001"), "train"),
        (("my.dev", "my.test"), "dev"),
    ],
)
def test_splits_of_a_data_set_are_not_joined(tmp_path: Path, names: tuple[str, ...], chosen: str) -> None:
    for name in names:
        write_jsonl(tmp_path / f"{name}.jsonl", [{"x": name}])
    with pytest.raises(UserError, match="several splits") as caught:
        read_rows(tmp_path)
    rows = read_rows(Path(str(caught.value.fix).split(": ")[1]))
    assert [row["x"] for row in rows] == [name for name in names if chosen in name]


def test_shards_that_share_a_split_or_name_none_are_joined(tmp_path: Path) -> None:
    for name in ("trainers", "devices", "train-0", "train-1"):
        write_jsonl(tmp_path / f"{name}.jsonl", [{"x": name}])
    assert len(read_rows(tmp_path)) == 4


def test_a_table_below_a_folder_of_shards_is_not_passed_over(tmp_path: Path) -> None:
    (tmp_path / "more").mkdir()
    for name in ("a.jsonl", "more/b.jsonl"):
        write_jsonl(tmp_path / name, [{"x": name}])
    with pytest.raises(UserError, match="files that are not read") as caught:
        read_rows(tmp_path)
    assert caught.value.value == "more/b.jsonl"
    assert read_rows(Path(str(caught.value.fix).split(": ")[1])) == [{"x": "a.jsonl"}]


def test_what_python_cannot_hold_of_a_parquet_file_is_said(tmp_path: Path) -> None:
    twice = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], names=["x", "x"])
    pq.write_table(twice, tmp_path / "a.parquet")
    with pytest.raises(UserError, match="a.parquet: two columns have one name"):
        read_rows(tmp_path / "a.parquet")
    pq.write_table(pa.table({"x": pa.array([1001], pa.duration("ns"))}), tmp_path / "b.parquet")
    with pytest.raises(UserError, match="b.parquet: a value that cannot be read"):
        read_rows(tmp_path / "b.parquet")


texts = st.text(st.characters(exclude_characters="\0", exclude_categories=["Cs"]))
json_values = st.none() | st.booleans() | st.integers() | texts


@settings(max_examples=60, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=st.lists(st.dictionaries(texts, json_values | st.lists(json_values), min_size=1)))
def test_jsonl_round_trip_of_any_text(tmp_path: Path, rows: list[dict]) -> None:
    write_jsonl(tmp_path / "any.jsonl", rows)
    assert read_rows(tmp_path / "any.jsonl") == rows


def test_unicode_line_separators_do_not_split_a_line(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text(json.dumps({"text": "a\u2028b\u0085c"}, ensure_ascii=False), encoding="utf-8")
    assert read_rows(path) == [{"text": "a\u2028b\u0085c"}]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'{"x": 1}\n{"x": \n', "a.jsonl, line 2: not JSON"),
        ("a.jsonl", b'{"x": 1}\n\n[1]\n', "a.jsonl, line 3: not a JSON object"),
        ("a.json", b'[{"x": 1},\n{"x": }]', "a.json, line 2: not JSON"),
        ("a.jsonl", b'{"x": 1}\n{"x": 1, "y": {"z": 1, "z": 2}}\n', "a.jsonl, line 2: (.)*the key 'z' stands twice"),
        ("a.json", b'[{"x": 1, "x": 2}]', "the key 'x' stands twice"),
        ("a.json", b'{"x": 1}', "a.json: not a list of objects"),
        ("a.csv", b"x,y\n1,2\n3\n", "a.csv, line 3: not as many cells as the header"),
        ("a.csv", b"x,y\n1,2,3\n", "a.csv, line 2: not as many cells as the header"),
        ("a.parquet", b"no parquet", "a.parquet: not a Parquet file"),
        ("a.jsonl", b'{"x": "\xff"}\n', "not UTF-8 text: byte 7"),
        ("a.jsonl", b'{"x": 1}\n' * 5000 + b'{"x": "\xff"}\n', "not UTF-8 text: byte 45007"),
        ("a.csv", b"x,y\n" + b"1,2\n" * 50_000 + b"3,\xff\n", "not UTF-8 text: byte 200006"),
        ("a.txt", b"", "unknown kind of table"),
    ],
)
def test_bad_files_are_named_with_the_line(tmp_path: Path, name: str, content: bytes, message: str) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=message) as caught:
        read_rows(tmp_path / name)
    assert len(str(caught.value).splitlines()) <= 4


def test_a_missing_file_is_a_user_error(tmp_path: Path) -> None:
    with pytest.raises(UserError, match="no such file"):
        read_rows(tmp_path / "none.jsonl")


def test_a_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    write_jsonl(path, ROWS)

    def broken():
        yield {"id": "new"}
        raise RuntimeError("stopped half way")

    with pytest.raises(RuntimeError):
        write_jsonl(path, broken())
    assert read_rows(path) == ROWS
    assert list(tmp_path.iterdir()) == [path]


def test_the_digest_sees_contents_and_names(tmp_path: Path) -> None:
    folder = tmp_path / "set"
    folder.mkdir()
    (folder / "a").write_text("1")
    first = table_sha256(folder)
    (folder / "a").rename(folder / "b")
    assert table_sha256(folder) != first
    (folder / "b").write_text("2")
    assert table_sha256(folder / "b") != table_sha256(folder)


# What is no text, and what is no table


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("a.jsonl", b'{"x": "fine"}\n{"x": ["\\ud83d"]}\n'),
        ("a.jsonl", b'{"x": "fine"}\n{"\\udc00": 1}\n'),
        ("a.jsonl", b'{"x": "fine"}\n{"x": {"y": "a\\u0000b"}}\n'),
        ("a.json", b'[{"x": "fine"}, {"x": "\\ud83d!"}]'),
        ("a.csv", b"x,y\n1,2\n3,a\0b\n"),
    ],
)
def test_half_characters_and_nul_bytes_are_named_with_the_row(tmp_path: Path, name: str, content: bytes) -> None:
    (tmp_path / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name}, row 2: a text holds a NUL byte or half of a character"):
        read_rows(tmp_path / name)


def test_a_nul_byte_in_parquet_is_named_with_the_row(tmp_path: Path) -> None:
    pq.write_table(pa.Table.from_pylist([*ROWS, {"id": "c", "text": "\0"}]), tmp_path / "a.parquet")
    with pytest.raises(UserError, match=r"a.parquet, row 3: a text holds"):
        read_rows(tmp_path / "a.parquet")


def test_both_halves_of_a_character_are_a_text(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"x": "\\ud83d\\ude00"}')
    assert read_rows(tmp_path / "a.jsonl") == [{"x": "😀"}]


@pytest.mark.parametrize("name", ["a.jsonl", "a.json"])
@pytest.mark.parametrize("content", ["[" * 100_000, '{"x": ' * 100_000, '{"x": ' + "9" * 5000 + "}"])
def test_json_beyond_all_limits_is_a_user_error(tmp_path: Path, name: str, content: str) -> None:
    (tmp_path / name).write_text(content)
    with pytest.raises(UserError, match=f"{name}, line 1: not JSON"):
        read_rows(tmp_path / name)


def test_a_row_may_be_nested_as_deeply_as_json_can_be_read(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"x": ' + "[" * 900 + "]" * 900 + "}")
    assert len(read_rows(tmp_path / "a.jsonl")) == 1


def test_two_columns_of_one_name_are_refused(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("x,y,x\n1,2,3\n")
    with pytest.raises(UserError, match="two columns have one name") as caught:
        read_rows(tmp_path / "a.csv")
    assert caught.value.value == "x"


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ({"train": [], "test": []}, "no rows can be read(.|\n)*dict of train, test(.|\n)*one split"),
        (7, "no rows can be read(.|\n)*int"),
        ([{"x": 1}, "prompt"], "the data, row 2: not a mapping(.|\n)*to_dict"),
        ([{"x": "\ud800"}], "the data, row 1: a text holds"),
    ],
)
def test_what_is_no_table_in_memory_is_refused(source, message: str) -> None:
    with pytest.raises(UserError, match=message):
        open_table(source)


class Hub:
    """The library ``datasets`` as far as it is asked."""

    def __init__(self, found: object) -> None:
        self.found, self.asked = found, None

    def load_dataset(self, name: str, split: str | None) -> object:
        self.asked = (name, split)
        if isinstance(self.found, Exception):
            raise self.found
        return self.found


@pytest.mark.parametrize(
    ("source", "found", "asked"),
    [("hf:o/n:train[:10]", ROWS, ("o/n", "train[:10]")), ("hf:o/n", {"train": ROWS}, ("o/n", None))],
)
def test_a_data_set_of_the_hub_is_read_when_it_is_asked_for(monkeypatch, source: str, found, asked) -> None:
    hub = Hub(found)
    monkeypatch.setitem(sys.modules, "datasets", hub)
    table = open_table(source)
    assert (table.rows, table.name, table.path, hub.asked) == (ROWS, source, None, asked)
    assert table.sha256 == open_table(ROWS).sha256


@pytest.mark.parametrize(
    ("hub", "message"),
    [
        (None, r"needs the library datasets(.|\n)*pip install 'taught\[datasets\]'"),
        (Hub({"train": ROWS, "test": ROWS}), "several splits(.|\n)*train, test(.|\n)*hf:o/n:train"),
        (Hub(ConnectionError("no network")), "cannot load the data set o/n .ConnectionError: no network"),
    ],
)
def test_a_data_set_that_cannot_be_had_says_why(monkeypatch, hub, message: str) -> None:
    monkeypatch.setitem(sys.modules, "datasets", hub)
    with pytest.raises(UserError, match=message):
        open_table("hf:o/n")
