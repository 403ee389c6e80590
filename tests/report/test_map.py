"""The capability map of a run: what the page and the terminal say of bins, and what they do not claim."""

from __future__ import annotations

import io
import re
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from rich.console import Console

import synthetic_run
from synthetic_run import HOSTILE, Size, build_synthetic_run, rewritten
from taught.report.blocks import Column, Grid
from taught.report.charts import grid
from taught.report.html import render
from taught.report.sections import sentences_of
from taught.report.show import show_run
from taught.report.tables import Tables
from taught.report.terminal import render as to_terminal
from taught.run.folder import RunFolder
from taught.stages import BY_NAME

FAST = {"permutations": 199, "bootstrap": 40}


class Kinds(synthetic_run._Made):
    """Examples by topic and format; those of locks in chats raise both groups, one of medicine has an extreme value."""

    planted, outlier = True, True

    def _examples(self) -> None:
        super()._examples()
        size = np.abs(self.dy).mean()
        for i in range(self.p):
            if self.planted and (i % 3, i // 6 % 2) == (0, 0):
                self.dy[i] += 6 * size
        if self.outlier:
            self.dy[2] += 1000 * size


class Plain(Kinds):
    planted, outlier = False, False


def mapped(path: Path, made: type = Kinds, *, examples: int = 90, hostile: bool = False, **bins: Any) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(synthetic_run, "_Made", made)
        build_synthetic_run(path, Size(examples=examples), sae=False, stages=("attribute",), hostile=hostile)
    run = RunFolder.open(path)
    BY_NAME["bins"](run.study.replace("bins", FAST | bins), run)
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return mapped(tmp_path_factory.mktemp("map") / "run")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return mapped(tmp_path_factory.mktemp("plain") / "run", Plain, minimum=6)


def on_page(path: Path) -> str:
    return re.search('<section id="map".*?</section>', render(Tables(path)), re.DOTALL)[0]


def in_terminal(path: Path) -> str:
    out = io.StringIO()
    Console(file=out, width=220).print(show_run(path, "map"))
    return out.getvalue()


def words_of(page: str) -> str:
    return " ".join(re.sub("<[^>]*>", " ", page).split())


@pytest.mark.parametrize("shown", [lambda path: words_of(on_page(path)), in_terminal], ids=["page", "terminal"])
def test_what_stands_out_is_named_with_its_documents(run: Path, shown: Callable[[Path], str]):
    text = " ".join(shown(run).split())
    assert "1 of 6 bins stand apart from random documents: above the corpus locks × chat" in text
    assert "one document, example-0002 , carries the mean" in text or "example-0002, carries the mean" in text
    assert "carries the mean over its bins" in text
    assert "harmful - harmless" in text and "Reliability" in text
    row = next(r for r in Tables(run).rows("bins") if r["rank"] == 1 and r["level"] == "bin")
    assert (row["row"], row["column"]) == ("locks", "chat")


def test_the_page_marks_what_is_significant_and_shows_documents_with_their_tokens(run: Path):
    page = on_page(run)
    assert page.count('class="dot"') == 2  # one bin on each of two benchmarks
    assert "<title>locks × chat: +" in page and "corrected p" in page
    row = next(r for r in Tables(run).rows("bins") if r["rank"] == 1 and r["level"] == "bin")
    assert all(name in page for name in row["examples"])
    assert "Documents of locks × chat that move harmful most" in page


def test_tokens_of_example_documents_are_shown_where_the_run_has_them(run: Path):
    tables = Tables(run)
    row = next(r for r in tables.rows("bins") if r["rank"] == 1 and r["level"] == "bin")
    known = {r["example_id"] for r in tables.rows("token_shares")}
    assert (on_page(run).count('class="strip"') > 0) == bool(known & set(row["examples"]))


def test_the_verdict_says_it_too(run: Path):
    bins = [s for s in sentences_of(Tables(run)) if s.topic == "Bins"]
    assert [s.tone for s in bins] == ["found", "found"]


def test_where_nothing_stands_out_no_effect_is_claimed(plain: Path):
    page = on_page(plain)
    assert "No effect found: on harmful no bin" in words_of(page) and "smallest corrected p" in page
    assert 'class="dot"' not in page
    assert {s.tone for s in sentences_of(Tables(plain)) if s.topic == "Bins"} == {"none"}


def test_one_column_is_a_ranking_of_all_its_bins(tmp_path: Path):
    path = mapped(tmp_path / "run", columns=["topic"], contrasts=[])
    page = on_page(path)
    assert 'class="tiles"' not in page and "Between benchmarks" not in page
    assert page.count('class="forest axis"') == 2 and "locks" in page


def test_a_large_z_that_no_test_bears_out_is_warned_of(plain: Path, tmp_path: Path):
    path = Path(shutil.copytree(plain, tmp_path / "run"))
    rows = RunFolder.open(path).read_table("bins").to_pylist()
    place = next(i for i, row in enumerate(rows) if row["level"] == "bin")
    rows[place] |= {"z": 16.0, "p_holm": 0.4, "carried_by": None}
    rewritten(path, "bins", rows)
    assert re.search(r"z of 16.0 rests on \d+ documents", words_of(on_page(path)))


def test_unlabelled_small_and_empty_bins_are_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(synthetic_run, "TOPICS", ["unknown", "games", "health", *synthetic_run.TOPICS[3:]])
    path = mapped(tmp_path / "run", Plain, columns=["topic"], taxonomy="weborganizer", contrasts=[])
    page = words_of(on_page(path))
    assert "30 documents without a topic (shown as unknown, not tested): example-0000" in page
    assert "No document has the topic adult content" in page and "games" in page
    path = mapped(tmp_path / "small", Plain, examples=92, minimum=31, columns=["topic"])
    assert "1 of 3 bins hold fewer than 31 documents: shown, not tested" in words_of(on_page(path))


@pytest.mark.parametrize("even", [True, False])
def test_an_even_sample_is_said_to_be_another_corpus(plain: Path, monkeypatch: pytest.MonkeyPatch, even: bool):
    counts = {"limit": 90, "read": 9000, "sampled": 90, "strata": []}
    sample = {"by": ["topic", "format"], "even": even, "seed": 0, **counts}
    real = Tables.json
    monkeypatch.setattr(Tables, "json", lambda it, name: sample if name == "sample" else real(it, name))
    said = "as many documents of each topic and format, not what it was drawn from" in words_of(on_page(plain))
    assert said == even


def test_labels_that_differ_in_case_alone_are_said(plain: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    assert "in case alone" not in words_of(on_page(plain))
    monkeypatch.setattr(synthetic_run, "TOPICS", ["Games", "games", "health", *synthetic_run.TOPICS[3:]])
    page = words_of(on_page(mapped(tmp_path / "run", Plain, columns=["topic"], contrasts=[])))
    assert "Each topic that differs in case alone is a bin of its own: Games and games" in page


def test_markup_in_labels_stays_text(tmp_path: Path):
    path = mapped(tmp_path / "run", hostile=True)
    page = on_page(path)
    assert HOSTILE.replace("<", "&lt;").replace(">", "&gt;")[:20] in page
    assert "<script" not in page and "<img" not in page and "\x1b" not in page
    assert "\x1b[31m" not in in_terminal(path)


# The block


def test_a_grid_is_coloured_by_its_largest_value_that_counts():
    values = np.array([[1.0, -0.5], [100.0, np.nan]])
    faint = np.array([[False, False], [True, False]])
    marked = np.array([[True, False], [False, False]])
    svg = grid(values, ["a", "<b>"], ["x", "y"], marked, faint, [["one", "two"], ["three", ""]], "Title")
    assert re.findall(r'class="(pos|neg)" fill-opacity="([\d.]+)"', svg) == [
        ("pos", "1.00"),
        ("neg", "0.54"),
        ("pos", "1.00"),
    ]
    assert svg.count('class="dot"') == 1 and svg.count("<title>") == 3 and "&lt;b&gt;" in svg
    assert grid(np.full((1, 1), np.nan), ["a"], ["x"], [[False]], [[False]], [[""]], "T").count("<title>") == 0


@pytest.mark.parametrize(("columns", "said"), [(2, "(+100.00)"), (9, "2 x 9, on the page")])
def test_a_grid_in_the_terminal_is_its_numbers(columns: int, said: str):
    values = np.tile([[1.0], [100.0]], columns)
    faint, marked = values > 10, values < 10
    about = [[""] * columns] * 2
    names = [f"c{j}" for j in range(columns)]
    block = Grid(values, ["a", "b"], names, marked, faint, about, "Title", Column("", "signed"))
    out = io.StringIO()
    Console(file=out, width=200).print(to_terminal([block]))
    assert said in out.getvalue() and ("+1.00*" in out.getvalue()) == (columns == 2)
