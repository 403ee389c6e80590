"""Every section of a whole run: on the page and in the terminal, from the same blocks."""

from __future__ import annotations

import io
import re
from pathlib import Path

import pytest
from rich.console import Console

from synthetic_run import HOSTILE, Size, build_synthetic_run
from taught.report.html import render
from taught.report.sections import SECTIONS, blocks_of, in_report, sentences_of
from taught.report.show import show_run
from taught.report.tables import Tables
from taught.run.folder import RunFolder
from taught.stages import BY_NAME

STAGES = ("policy", "clamp", "attribute", "curate", "validate", "compare")


def whole(path: Path, *, hostile: bool = False) -> Path:
    build_synthetic_run(path, Size(examples=40), stages=STAGES, concepts=True, hostile=hostile)
    run = RunFolder.open(path)
    BY_NAME["clusters"](run.study.replace("clusters", True), run)
    BY_NAME["bins"](run.study.replace("bins", {"permutations": 99, "bootstrap": 50}), run)
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return whole(tmp_path_factory.mktemp("whole") / "run")


@pytest.fixture(scope="module")
def page(run: Path) -> str:
    return render(Tables(run))


def section(page: str, name: str) -> str:
    return re.search(f'<section id="{name}".*?</section>', page, re.DOTALL)[0]


def shown(run: Path, item: str | None) -> str:
    out = io.StringIO()
    Console(file=out, width=300).print(show_run(run, item))
    return out.getvalue()


@pytest.mark.parametrize("name", SECTIONS.names())
def test_every_section_of_a_whole_run_is_there_on_the_page_and_in_the_terminal(run: Path, page: str, name: str):
    assert "Not computed" not in section(page, name)
    words = shown(run, name)
    assert (SECTIONS.get(name).heading or SECTIONS.get(name).title) in words
    assert len(words.splitlines()) > 4


def test_retrainings_stand_with_their_intervals_and_controls(run: Path, page: str):
    found = re.sub("<[^>]*>", " ", section(page, "validation"))
    words = shown(run, "validation")
    assert "Points that rise to the right were foreseen" in found
    for text in (" ".join(found.split()), " ".join(words.split())):
        assert "0.60 [0.40, 0.80]" in text and "noise ceiling 0.90 [0.85, 0.95]" in text
        assert "the loss of its examples from 2.50 to 0.65 on the mean" in text
        assert "20 random subsets, controlled for size" in text and "coefficients, median" in text
        assert "behavior on harmless, random subsets: length alone predicts about as well as adjoint" in text
        assert "Training without the 4 examples (15%) that raise behavior on harmless most moves it by" in text
        assert "Over these 2 budgets" in text and "adjoint 12 s, 1.5 GB" in text
        assert "What taught curate kept" in text and "+0.200* [0.100, 0.300]" in text
        assert "6 planted examples among 24" in text and "0.90 [0.80, 0.97]" in text


def test_the_verdict_says_what_retraining_did_and_how_well_it_was_foreseen(run: Path):
    topics = {s.topic: s for s in sentences_of(Tables(run))}
    assert list(topics)[:5] == ["Behavior", "Policy", "To drop", "Retraining", "Checked"]
    assert topics["Retraining"].tone == "found" and "0.60 [0.40, 0.80]" in topics["Checked"].text


def test_what_sketches_named_stands_with_its_exact_value(run: Path, page: str):
    found = re.sub("<[^>]*>", " ", section(page, "certainty"))
    assert re.search(r"0\.75.*3\.25", " ".join(found.split()))
    assert re.search(r"0\.75.*3\.25", " ".join(shown(run, "certainty").split()))


def test_clusters_stand_beside_random_examples(run: Path, page: str):
    tables = Tables(run)
    found = section(page, "clusters")
    assert "Mean influence of an example on behavior on harmless" in found
    for row in tables.rows("clusters"):
        assert all(f'href="#feature-{f["feature_id"]}"' in found for f in row["features"])


def test_markup_in_the_data_of_any_section_stays_text(tmp_path: Path):
    path = whole(tmp_path / "run", hostile=True)
    html = render(Tables(path))
    assert "<script>alert" not in html and "<img" not in html and "\x1b" not in html
    for section_ in in_report(Tables(path)):
        words = shown(path, section_.id)
        assert "\x1b[31m" not in words and blocks_of(section_, Tables(path))
    assert "[bold]x[/bold]" in shown(path, "validation") and HOSTILE in shown(path, "validation")
