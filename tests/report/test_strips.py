"""Shares of response tokens in a run and its report, and the section on concepts."""

from __future__ import annotations

import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from taught.report.build import render
from taught.report.view import load_view

from synthetic_run import HOSTILE, build_synthetic_run
from taught import stages
from taught.cli.app import run_command
from taught.errors import UserError
from taught.report.stats import Estimate
from taught.report.strips import LEVELS, strips
from taught.run.folder import RunFolder
from taught.stages import ConceptQuestion, ConceptRequest
from taught.study.load import load_study
from taught.study.schema import Study
from tiny_study import write_tiny_study

ALL = ("policy", "attribute", "concept-influence")
METHODS = ("gradient", "vector-filter")


class Spans(HTMLParser):
    """The strips of a page: for each a list of (class, title, text)."""

    def __init__(self, html: str) -> None:
        super().__init__()
        self.strips: list[list[tuple[str, str, str]]] = []
        self.inside = False
        self.feed(html)

    def handle_starttag(self, tag, attrs):
        given = dict(attrs)
        if tag == "p" and given.get("class") == "strip":
            self.strips.append([])
            self.inside = True
        elif tag == "span" and self.inside:
            self.strips[-1].append((given.get("class") or "", given["title"], ""))

    def handle_endtag(self, tag):
        self.inside = self.inside and tag != "p"

    def handle_data(self, data):
        if self.inside:
            shade, title, text = self.strips[-1][-1]
            self.strips[-1][-1] = (shade, title, text + data)


def section(html: str, name: str) -> str:
    return re.search(f'<section id="{name}".*?</section>', html, re.DOTALL)[0]


# One strip


def rows(*shares: float, target: str = "score", group: str | None = None) -> list[dict]:
    return [
        {"example_id": "z", "target": target, "group": group, "position": j, "token": f"t{j}", "share": share}
        for j, share in enumerate(shares)
    ]


def test_a_strip_has_every_token_in_order_shaded_by_its_share():
    (strip,) = strips(reversed(rows(2e-4, -4e-4, 0.0, 1e-6)))
    assert [t.text for t in strip.tokens] == ["t0", "t1", "t2", "t3"]
    assert [t.shade for t in strip.tokens] == ["up s4", f"down s{LEVELS}", "", ""]
    assert [t.number for t in strip.tokens] == ["+2.00", "−4.00", "0.00", "+0.01"]
    assert strip.total == "−1.99\u00a0×10⁻⁴"
    assert strip.largest == "“t1” −4.00, “t0” +2.00, “t3” +0.01"


def test_a_strip_without_any_share_is_plain():
    (strip,) = strips(rows(0.0, 0.0))
    assert [t.shade for t in strip.tokens] == ["", ""]


def test_examples_and_targets_have_strips_of_their_own():
    other = [{**row, "example_id": "y"} for row in rows(1.0)]
    named = [*rows(1.0), *rows(2.0, target="mean_y", group="harmless"), *other]
    assert [(s.example_id, s.target) for s in strips(named)] == [
        ("z", "score"),
        ("z", "mean_y:harmless"),
        ("y", "score"),
    ]


def test_a_line_feed_and_a_space_can_be_seen():
    (strip,) = strips([{**rows(1.0)[0], "token": "\n"}, {**rows(0, -2.0)[1], "token": " "}])
    assert [t.text for t in strip.tokens] == ["↵\n", " "]
    assert strip.largest == "“␣” −2.00, “↵” +1.00"


# The report


@pytest.fixture(scope="module")
def html(tmp_path_factory) -> str:
    return render(load_view(build_synthetic_run(tmp_path_factory.mktemp("run") / "r", stages=ALL)))


def test_the_strongest_examples_have_a_strip_for_each_target(html):
    found = Spans(section(html, "examples")).strips
    assert len(found) == 2 * 3
    for strip in found:
        assert [text for *_, text in strip] == [" I", " can't", "↵\n", " sorry"]
        up, down = ("up", "down") if strip[1][1][0] == "+" else ("down", "up")
        assert [shade for shade, *_ in strip] == [f"{up} s4", f"{up} s8", "", f"{down} s4"]
        assert all(title for _, title, _ in strip), "each share can be read as a number"


def test_every_shade_is_in_the_style_sheet_and_sides_differ_without_color(html):
    style = re.search("<style>(.*?)</style>", html, re.DOTALL)[1]
    assert all(f".strip .s{level} " in style for level in range(1, LEVELS + 1))
    assert re.search(r"\.strip \.up {[^}]*2px solid", style)
    assert re.search(r"\.strip \.down {[^}]*2px dotted", style)
    assert "style=" not in section(html, "examples"), "the page's own policy would block it"


def test_concepts_have_their_strongest_examples_and_disagreement_is_flagged(tmp_path):
    run = RunFolder.open(build_synthetic_run(tmp_path / "r", stages=ALL))
    view = load_view(run)
    (concept,) = view.concepts
    table = run.read_table("concept_influence").to_pylist()
    for ranking in concept.rankings:
        own = sorted((r for r in table if r["method"] == ranking.method), key=lambda r: -abs(r["value"]))[:5]
        assert ranking.rows == [(r["example_id"], r["value"]) for r in own]
    agreed = {(r["method"], r["other"]): r["rank_correlation"] for r in run.read_table("concept_agreement").to_pylist()}
    assert {(a, b) for a, b, _ in concept.apart} == {k for k, r in agreed.items() if r < 0.5}
    assert len(concept.apart) == 2
    page = section(render(view), "concepts")
    assert page.count("<strong>Disagree</strong>") == 2
    assert page.count('class="badge warn"') == 2 * 2
    assert all(f"{r.lo:.2f}".replace("-", "−") in page for _, _, r in concept.apart)
    assert "AUC 0.91 [0.84, 0.97] between the two groups" in page
    assert len(Spans(page).strips) == 1
    few = replace(
        concept,
        apart=[(a, b, Estimate(0.3, -0.1, 0.6)) for a, b, _ in concept.apart],
        facts={**concept.facts, "provenance": {"examples sha256": "x"}},
    )
    page = section(render(replace(view, concepts=[few])), "concepts")
    assert page.count("<strong>Undecided</strong>") == 2 and "<strong>Disagree" not in page
    assert "between examples with and without the behavior" in page


def test_without_the_stage_the_section_says_what_makes_it(tmp_path):
    run = build_synthetic_run(tmp_path / "r", stages=("policy",))
    page = section(render(load_view(run)), "concepts")
    assert "taught concept-influence STUDY --concept FOLDER --run RUN" in page


def test_tokens_and_names_of_concepts_are_text(tmp_path):
    html = render(load_view(build_synthetic_run(tmp_path / "r", stages=ALL, hostile=True)))
    for name in ("examples", "concepts"):
        page = section(html, name)
        assert "<img" not in page and "<script" not in page and "\x1b" not in page
        assert HOSTILE in Spans(page).strips[0][0][2]


# The stages


@pytest.fixture(scope="module")
def folder(tmp_path_factory) -> Path:
    return write_tiny_study(tmp_path_factory.mktemp("tiny")).parent


@pytest.fixture(scope="module")
def study(folder) -> Study:
    return load_study(folder / "study.yaml").replace("attribution.exact_top", 2)


@pytest.fixture(scope="module")
def run(folder, study) -> RunFolder:
    run = RunFolder(folder / "run")
    stages.policy(study, run)
    stages.attribute(study, run)
    request = ConceptRequest("difference", force=True)
    stages.concept(study, folder / "kind", request)
    return run


def question(folder: Path, **options) -> ConceptQuestion:
    return ConceptQuestion((folder / "kind",), METHODS, tokens=2, **options)


def test_shares_of_the_strongest_examples_add_up_to_their_effects(run):
    summary = {row["example_id"]: row for row in run.read_table("summary").to_pylist()}
    table = run.read_table("token_shares").to_pylist()
    top = [example for example, row in summary.items() if row["rank"] <= 2]
    assert {row["example_id"] for row in table} == set(top)
    largest = max(abs(row["share"]) for row in table)
    for example in top:
        for target, group in (("score", None), ("mean_y", "harmful"), ("mean_y", "harmless")):
            own = [row for row in table if (row["example_id"], row["target"], row["group"]) == (example, target, group)]
            assert [row["position"] for row in own] == list(range(summary[example]["n_response"]))
            column = "score" if group is None else f"mean_y_{group}"
            whole = sum(row["share"] for row in own)
            assert whole == pytest.approx(summary[example][column], rel=1e-3, abs=1e-4 * largest)
            assert "".join(row["token"] for row in own).endswith("<|im_end|>")


@pytest.mark.parametrize("changes", [{"exact_top": 0}, {"estimator": "finite-step"}])
def test_shares_are_left_out_where_no_gradient_is_split(folder, study, run, tmp_path, changes):
    import shutil

    shutil.copytree(run.folder, tmp_path / "run")
    for key, value in changes.items():
        study = study.replace(f"attribution.{key}", value)
    again = RunFolder(tmp_path / "run", fresh=("attribute",))
    stages.attribute(study, again)
    assert "token_shares.parquet" not in again.manifest["files"]
    assert not again.path("token_shares.parquet").exists()


def test_concepts_become_part_of_a_run_and_of_its_report(folder, study, run):
    before = run.study
    other = study.replace("validation.remove_by", "score")  # says what validate did, and not this
    answers = stages.concept_influence(other, question(folder), run=run)
    assert run.study == before != other
    assert run.read_table("concept_influence").equals(answers.table)
    assert run.read_table("concept_tokens").equals(answers.tokens)
    assert run.read_table("concept_agreement").equals(stages.agreement(answers.table))
    again = stages.concept_influence(study, question(folder, group="harmful"), run=run)
    assert not again.table.equals(answers.table)
    assert run.read_table("concept_influence").equals(again.table), "asked anew, made anew"
    assert run.read_json("concept_influence")["group"] == "harmful"
    (concept,) = load_view(run).concepts
    assert [ranking.method for ranking in concept.rankings] == list(METHODS)
    values = {r["example_id"]: r["value"] for r in again.table.to_pylist() if r["method"] == "gradient"}
    strip = concept.strips[0]
    assert abs(values[strip.example_id]) == max(map(abs, values.values()))
    stages.report(run)
    assert "Which response tokens carry the gradient" in run.read_text("report.html")


def test_concepts_of_another_study_do_not_enter_a_run(folder, study, run):
    before = run.manifest
    with pytest.raises(UserError, match="made under other inputs: attribution.lr"):
        stages.concept_influence(study.replace("attribution.lr", 1e-3), question(folder), run=run)
    assert run.manifest == before


def test_concepts_go_when_the_examples_are_scored_anew(folder, study, run, tmp_path):
    import shutil

    shutil.copytree(run.folder, tmp_path / "run")
    stages.concept_influence(study, question(folder), run=RunFolder(tmp_path / "run"))
    again = RunFolder(tmp_path / "run", fresh=("attribute",))
    stages.attribute(study, again)
    assert "concept-influence" not in again.manifest["stages"]
    stages.report(again)
    assert "Which response tokens carry the gradient" not in again.read_text("report.html")


@pytest.mark.parametrize("flags", [[], ["--out", "a.parquet", "--run", "run"]])
def test_the_command_keeps_its_answers_in_one_place(folder, flags, capsys):
    argv = ["concept-influence", str(folder / "study.yaml"), "--concept", str(folder / "kind")]
    assert run_command([*argv, *flags]) == 2
    assert "either --out or --run" in capsys.readouterr().err


def test_the_command_writes_into_a_run(folder, run, capsys):
    argv = [
        "concept-influence",
        str(folder / "study.yaml"),
        "--concept",
        str(folder / "kind"),
        "--set",
        "attribution.exact_top=2",
        "-q",
    ]
    assert run_command([*argv, "--run", str(run.folder)]) == 0
    assert "concept_influence.parquet" in capsys.readouterr().out
    assert np.isfinite(RunFolder(run.folder).read_table("concept_influence")["value"].to_numpy()).all()
