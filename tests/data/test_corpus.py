"""Documents from shards and streams, sampled while they are read."""

from __future__ import annotations

import json
import tracemalloc
from collections import Counter
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from taught.data.corpus import open_corpus, sample_documents
from taught.data.examples import ExampleSet, load_examples
from taught.data.subset import Spread
from taught.data.tables import open_table, read_rows, table_sha256
from taught.errors import UserError

SIZES = {("art", "faq"): 60, ("art", "news"): 30, ("law", "faq"): 9, ("law", "news"): 1}
ROWS = [
    {
        "id": f"{topic}-{form}-{i}",
        "text": f"{topic} {form} number {i}",
        "topic": topic,
        "format": form,
        "quality": i / 7,
    }
    for (topic, form), n in SIZES.items()
    for i in range(n)
]


def write(path: Path, rows: list[dict]) -> Path:
    if path.suffix == ".jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif path.suffix == ".parquet":
        pq.write_table(pa.Table.from_pylist(rows), path, row_group_size=7)
    else:
        lines = [",".join(rows[0]), *(",".join(str(cell) for cell in row.values()) for row in rows)]
        path.write_text("\n".join(lines) + "\n")
    return path


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """The rows in shards of three kinds, which do not lie in the order of their names."""
    folder = tmp_path / "corpus"
    folder.mkdir()
    for start, name in ((0, "a.jsonl"), (40, "b.parquet"), (80, "c.csv")):
        write(folder / name, ROWS[start : start + 40])
    (folder / "README.md").write_text("about")
    return folder


def sampled(source: object, limit: int | None, *by: str, **how: object) -> ExampleSet:
    return sample_documents(open_corpus(source), Spread(limit, by or None, **how))


# Shards


def test_shards_of_a_folder_are_one_table_in_the_order_of_their_names(shards: Path) -> None:
    found = load_examples(shards, kind="document")
    assert [(e.id, e.response, e.category) for e in found] == [(r["id"], r["text"], r["topic"]) for r in ROWS]
    assert found.column("format") == [r["format"] for r in ROWS]  # further columns travel
    assert found.column("topic") == found.column("category") == [r["topic"] for r in ROWS]
    assert found.sha256 == table_sha256(shards) and found.path == shards


def test_a_pattern_names_shards_and_every_kind_of_rows_may_be_in_shards(shards: Path, tmp_path: Path) -> None:
    (shards / "deep").mkdir()
    write(shards / "deep" / "d.parquet", [{**ROWS[0], "id": "deep"}])
    assert [r["id"] for r in read_rows(shards / "*.parquet")] == [r["id"] for r in ROWS[40:80]]
    assert [r["id"] for r in read_rows(shards / "**" / "*.parquet")] == [*(r["id"] for r in ROWS[40:80]), "deep"]
    pairs = tmp_path / "pairs"
    pairs.mkdir()
    for i in range(3):
        write(pairs / f"{i}.jsonl", [{"id": f"p{i}", "prompt": f"q {i}", "response": "yes"}])
    assert load_examples(pairs).ids == ("p0", "p1", "p2")


def test_what_is_given_as_an_iterable_is_read_like_a_file() -> None:
    class Stream:
        """As a stream of the library datasets: it can be gone through again, and holds no list."""

        def __iter__(self):
            return iter(dict(row) for row in ROWS)

    datasets = [Stream(), (row for row in ROWS), ROWS]
    sets = [sampled(source, 20, "topic", "format") for source in datasets]
    assert sets[0].ids == sets[1].ids == sets[2].ids and len(sets[0]) == 20
    assert len({found.sha256 for found in sets}) == 1
    assert open_table(Stream()).rows == ROWS


def test_the_digest_of_a_pattern_sees_names_and_contents_and_not_the_place(shards: Path, tmp_path: Path) -> None:
    first = table_sha256(shards / "*.jsonl")
    (tmp_path / "moved").mkdir()
    (tmp_path / "moved" / "a.jsonl").write_bytes((shards / "a.jsonl").read_bytes())
    assert table_sha256(tmp_path / "moved" / "*.jsonl") == first
    (shards / "a.jsonl").rename(shards / "z.jsonl")
    assert table_sha256(shards / "*.jsonl") != first


@pytest.mark.parametrize("name", ["z.jsonl", "z.parquet", "z.csv"])
def test_shards_that_disagree_in_columns_are_named_with_the_column(shards: Path, name: str) -> None:
    write(shards / name, [{key: cell for key, cell in ROWS[0].items() if key != "format"}])
    for read in (read_rows, lambda path: sampled(path, 5, "topic")):
        with pytest.raises(UserError, match="disagree in their columns") as caught:
            read(shards)
        assert f"{name} lacks the column format" in str(caught.value)
    write(shards / name, [{**ROWS[0], "id": "new", "extra": 1}])
    with pytest.raises(UserError, match=f"{name} has the column extra"):
        read_rows(shards)


def test_a_shard_without_rows_disagrees_with_none(shards: Path) -> None:
    (shards / "0.jsonl").write_text("\n")
    assert len(read_rows(shards)) == len(ROWS)


@pytest.mark.parametrize("limit", [None, 5, 99])
def test_ids_are_unique_across_shards_and_texts_are_there(shards: Path, limit: int | None) -> None:
    write(shards / "d.jsonl", [{**ROWS[3], "text": "another"}, {**ROWS[70], "text": "another"}])
    with pytest.raises(UserError, match="ids are used more than once") as caught:
        sampled(shards, limit)
    assert caught.value.value == f"{ROWS[3]['id']}, {ROWS[70]['id']}"
    write(shards / "d.jsonl", [{**ROWS[3], "id": "blank", "text": " "}, {**ROWS[3], "id": "none", "text": ""}])
    with pytest.raises(UserError, match="2 examples have an empty text") as caught:
        sampled(shards, limit)
    assert caught.value.value == "blank, none"


def test_what_lies_among_shards_and_is_none_is_refused(shards: Path, tmp_path: Path) -> None:
    (shards / "d.jsonl.gz").write_bytes(b"")
    with pytest.raises(UserError, match="not read") as caught:
        read_rows(shards)
    assert caught.value.value == "d.jsonl.gz"
    pattern = Path(str(caught.value.fix).split(": ")[1])
    assert len(read_rows(pattern)) == 40
    with pytest.raises(UserError, match="no file matches"):
        read_rows(shards / "*.txtx")
    with pytest.raises(UserError, match="a folder without tables") as caught:
        read_rows(tmp_path)
    assert len(read_rows(Path(str(caught.value.fix).split(": ")[1]))) == 40


# Sampling


def test_a_sample_is_in_proportion_or_even_and_its_manifest_says_so(shards: Path) -> None:
    found = sampled(shards, 20, "topic", "format")
    counts = Counter(zip(found.column("topic"), found.column("format"), strict=True))
    assert counts == {("art", "faq"): 12, ("art", "news"): 6, ("law", "faq"): 2}
    record = found.sample.record()
    assert (record["by"], record["seed"], record["read"], record["sampled"]) == (["topic", "format"], 0, 100, 20)
    weights = {tuple(row["stratum"].values()): row["weight"] for row in record["strata"]}
    assert weights == {("art", "faq"): 5.0, ("art", "news"): 5.0, ("law", "faq"): 4.5, ("law", "news"): None}
    assert "1 strata have none" in found.sample.note()

    even = sampled(shards, 20, "topic", "format", even=True)
    counts = Counter(zip(even.column("topic"), even.column("format"), strict=True))
    assert counts.pop(("law", "news")) == 1
    assert sorted(counts.values()) == [6, 6, 7]
    rows = even.sample.record()["strata"]
    assert sum(row["weight"] * row["sampled"] for row in rows) == len(ROWS)


def test_a_number_is_one_stratum_and_one_id_in_whatever_type_a_shard_holds_it(tmp_path: Path) -> None:
    # A gap makes a column of whole numbers one of fractions.
    for name, cells in (("a.parquet", [1, 2]), ("b.parquet", [1.0, 3.0, None])):
        ids = range(len(cells)) if name == "a.parquet" else [10.0, 11.0, 12.0]
        write(
            tmp_path / name,
            [{"id": i, "text": f"{name} {i}", "year": cell} for i, cell in zip(ids, cells, strict=True)],
        )
    found = sampled(tmp_path / "*.parquet", 3, "year")
    sizes = {row["stratum"]["year"]: row["read"] for row in found.sample.record()["strata"]}
    assert sizes == {"": 1, "1": 2, "2": 1, "3": 1}
    assert [z.id for z in sampled(tmp_path / "*.parquet", None)] == ["0", "1", "10", "11", "12"]


def test_weights_make_a_sample_stand_for_the_corpus() -> None:
    rng = np.random.default_rng(0)
    rows = [
        {"id": str(i), "text": f"t{i}", "topic": topic, "value": topic * 2.0 + rng.normal()}
        for i, topic in enumerate(rng.choice(4, 3000, p=[0.7, 0.2, 0.08, 0.02]).tolist())
    ]
    found = sampled(rows, 400, "topic", even=True)
    weight = {row["stratum"]["topic"]: row["weight"] for row in found.sample.record()["strata"]}
    weights = [weight[str(topic)] for topic in found.column("topic")]
    truth = np.mean([row["value"] for row in rows])
    assert abs(np.mean(found.column("value")) - truth) > 1
    assert np.average(found.column("value"), weights=weights) == pytest.approx(truth, abs=0.15)


def test_a_sample_does_not_depend_on_the_order_of_shards_and_rows(shards: Path, tmp_path: Path) -> None:
    other = tmp_path / "other"
    other.mkdir()
    for start, name in ((60, "a.parquet"), (0, "b.jsonl")):
        write(other / name, ROWS[start : start + 60][::-1])
    for how in ({}, {"even": True}, {"seed": 3}):
        a, b = (sampled(source, 23, "topic", "format", **how) for source in (shards, other))
        assert set(a.ids) == set(b.ids) and a.sample == b.sample
    assert set(sampled(shards, 23, "topic").ids) != set(sampled(shards, 23, "topic", seed=1).ids)


def test_records_in_memory_are_spread_as_those_of_a_stream(shards: Path) -> None:
    whole = load_examples(shards, kind="document")
    for how in (Spread(17, ("topic", "format")), Spread(17), Spread(17, (), True, 5)):
        found = whole.spread(how)
        assert found.ids == sample_documents(open_corpus(shards), how).ids
        assert found.sample == sample_documents(open_corpus(shards), how).sample
    assert whole.spread(Spread(len(whole))) is whole


def test_a_column_that_is_not_there_is_refused_by_name(shards: Path) -> None:
    for draw in (lambda: sampled(shards, 5, "theme"), lambda: load_examples(shards, kind="document").column("theme")):
        with pytest.raises(UserError, match="no such column(.|\n)*theme(.|\n)*topic, format"):
            draw()


def test_rows_that_change_between_the_two_readings_are_refused() -> None:
    class Growing(list):
        reads = 0

        def __iter__(self):
            self.reads += 1
            return iter(ROWS[: 50 + 10 * self.reads])

    with pytest.raises(UserError, match="changed while they were read"):
        sampled(Growing(), 5)


@pytest.mark.parametrize("suffix", [".jsonl", ".parquet", ".csv"])
def test_memory_does_not_grow_with_the_shards(tmp_path: Path, suffix: str) -> None:
    def peak(files: int) -> int:
        folder = tmp_path / f"{files}{suffix}"
        folder.mkdir()
        for file in range(files):
            write(
                folder / f"{file:02}{suffix}",
                [{"id": f"{file}-{i}", "text": f"{file} {i} " + "word " * 900} for i in range(90)],
            )
        tracemalloc.start()
        assert len(sampled(folder, 10)) == 10
        found = tracemalloc.get_traced_memory()[1]
        tracemalloc.stop()
        return found

    peak(1)  # what is imported or cached once is not counted
    assert peak(8) < 1.2 * peak(2) + 2e5  # 3.2 megabytes of text against 0.8
