"""The report: what it says, that it is one safe file, and that its numbers and drawings are right."""

from __future__ import annotations

import base64
import hashlib
import json
import re
from html.parser import HTMLParser
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from synthetic_run import HOSTILE, Size, build_synthetic_run, rewritten, synthetic_study
from taught.errors import UserError
from taught.report import charts, examples, stats, text
from taught.report import tables as reading
from taught.report.blocks import Column, Table, Text, plain
from taught.report.charts import Point, Scale
from taught.report.detail import effects, split
from taught.report.examples import Summary, shifts, shown
from taught.report.html import embed, render
from taught.report.sections import SECTIONS, Section, blocks_of, sentences_of
from taught.report.sections.certainty import (
    label_sentence,
    rank_table,
    ranking_sentence,
    sketch_sentence,
    step_sentence,
    trivial_correlations,
    trivial_sentence,
)
from taught.report.sections.clamp import clamp_sentence
from taught.report.sections.coverage import audit_sentence
from taught.report.sections.curation import Curated, curation_sentence
from taught.report.sections.examples import moved_sentence
from taught.report.sections.interference import unintended_sentence
from taught.report.sections.method import derivative_sentence
from taught.report.sections.policy import fit_sentence
from taught.report.sections.trust import trust_sentence
from taught.report.sections.validation import arms_table, foreseen_sentence, retraining_sentence
from taught.report.stats import Control
from taught.report.tables import Tables
from taught.report.text import interval_text, read_interval
from taught.run.folder import RunFolder
from taught.stats.intervals import Interval

VOID = {"meta", "link", "br", "img", "input", "hr"}
IDS = list(SECTIONS.names())
OF_POLICY = ["pathways", "clusters", "policy", "trust", "clamp", "coverage", "features", "interference"]


class Page(HTMLParser):
    """Reads a page strictly: every tag closed in order, ids unique, scripts and text kept apart."""

    def __init__(self, html: str) -> None:
        super().__init__(convert_charrefs=True)
        self.open: list[str] = []
        self.tags: list[tuple[str, dict[str, str | None]]] = []
        self.words: list[str] = []
        self.scripts: list[tuple[dict[str, str | None], str]] = []
        self.feed(html)
        self.close()
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))
        if tag == "script":
            self.scripts.append((dict(attrs), ""))
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_endtag(self, tag):
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-3:]}"
        self.open.pop()

    def handle_data(self, data):
        if self.open and self.open[-1] == "script":
            attrs, body = self.scripts[-1]
            self.scripts[-1] = (attrs, body + data)
        elif self.open and self.open[-1] != "style":
            self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join("".join(self.words).split())

    def all(self, tag: str) -> list[dict[str, str | None]]:
        return [attrs for name, attrs in self.tags if name == tag]

    @property
    def data(self) -> dict:
        return json.loads(next(body for attrs, body in self.scripts if attrs.get("id") == "data"))


def build_report(run: RunFolder | Path) -> Path:
    path = (run.folder if isinstance(run, RunFolder) else run) / "report.html"
    path.write_text(render(Tables(run)), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return build_synthetic_run(tmp_path_factory.mktemp("report") / "run")


@pytest.fixture(scope="module")
def html(run: Path) -> str:
    return build_report(run).read_text(encoding="utf-8")


@pytest.fixture(scope="module")
def page(html: str) -> Page:
    return Page(html)


@pytest.fixture(scope="module")
def hostile(tmp_path_factory) -> str:
    run = build_synthetic_run(tmp_path_factory.mktemp("hostile") / "run", hostile=True)
    return build_report(run).read_text(encoding="utf-8")


# The file


def test_every_section_and_nav_target_is_there_once(page: Page):
    ids = [attrs["id"] for _, attrs in page.tags if "id" in attrs]
    assert len(ids) == len(set(ids))
    assert [a["id"] for a in page.all("section")] == IDS
    assert [a["href"] for a in page.all("a") if a["href"] and a["href"][1:] in IDS] == [f"#{name}" for name in IDS]


def test_every_link_leads_to_something_inside_the_page(page: Page):
    ids = {attrs["id"] for _, attrs in page.tags if "id" in attrs}
    targets = {str(a["href"]) for a in page.all("a")}
    assert targets and all(t.startswith("#") and t[1:] in ids for t in targets)


def test_page_loads_nothing(html: str, page: Page):
    for tag, attrs in page.tags:
        assert tag not in {"img", "iframe", "link", "object", "embed", "base", "video", "audio"}
        assert not {"src", "srcset", "action", "formaction", "xlink:href"} & attrs.keys()
        assert not any(name.startswith("on") for name in attrs)
        assert "style" not in attrs  # the policy would refuse it
    style = re.search(r"<style>(.*?)</style>", html, re.S).group(1)
    assert "url(" not in style and "@import" not in style and "//" not in style


def test_only_our_script_and_style_are_allowed_by_hash(html: str, page: Page):
    policy = next(a["content"] for a in page.all("meta") if "http-equiv" in a)
    style = re.search(r"<style>(.*?)</style>", html, re.S).group(1)
    script = next(body for attrs, body in page.scripts if "type" not in attrs)
    for body, kind in ((script, "script-src"), (style, "style-src")):
        digest = base64.b64encode(hashlib.sha256(body.encode()).digest()).decode()
        assert f"{kind} 'sha256-{digest}'" in policy
    assert policy.startswith("default-src 'none';") and "unsafe" not in policy


def test_script_never_parses_markup():
    script = (Path(charts.__file__).parent / "script.js").read_text(encoding="utf-8")
    for way in ("innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "fetch("):
        assert way not in script
    assert "</" not in script and "<!--" not in script


def test_markup_in_the_data_stays_text(hostile: str):
    page = Page(hostile)
    assert len(page.scripts) == 2  # the data block and ours
    assert "<script>alert" not in hostile and "<img" not in hostile
    assert hostile.count("</script>") == 2 and "<!--" not in hostile
    assert HOSTILE in page.text  # shown as it is, in the tables
    assert HOSTILE in page.data["examples"][0]["prompt"]
    assert HOSTILE in page.data["examples"][0]["id"] and HOSTILE in page.data["prompts"][0][2]
    assert any(HOSTILE in label for label in page.data["features"].values())


def test_control_characters_do_not_reach_the_page(hostile: str):
    assert "\x1b" not in hostile and "\\u001b" not in hostile
    assert "\ufffd[31m" in hostile


def test_page_opens_without_the_stages_after_policy(tmp_path: Path):
    run = build_synthetic_run(tmp_path / "run", stages=("policy",))
    page = Page(build_report(run).read_text(encoding="utf-8"))
    assert [a["id"] for a in page.all("section")] == IDS
    assert page.text.count("taught run STUDY --to attribute makes it") == 4
    assert page.text.count("taught curate RUN makes it") == 1
    assert "taught run STUDY --to clusters --set clusters=true makes it" in page.text
    assert "--to policy" not in page.text
    assert page.data == {"examples": []}
    assert "chemical_biological" in page.text


def test_page_opens_for_a_run_with_nothing_in_it(tmp_path: Path):
    run = RunFolder(tmp_path / "run")
    with run.stage("readings", synthetic_study(tmp_path / "run")):
        pass
    assert "taught run STUDY --to policy makes it" in Page(build_report(run).read_text("utf-8")).text


def test_files_of_an_unfinished_stage_are_not_shown(tmp_path: Path):
    path = build_synthetic_run(tmp_path / "run")
    run, study = RunFolder(path), synthetic_study(path).replace("curation.rule", "top-k")
    extra = {"model.weights": "5af571cb"}
    with pytest.raises(RuntimeError), run.stage("curate", study, extra):
        run.write_table("curation", pa.table({"example_id": ["half"]}))
        raise RuntimeError("killed")
    assert (path / "curation.parquet").is_file()
    tables = Tables(path)
    assert tables.columns("curation") is None and "curation" not in tables and tables.rows("summary")


def test_a_changed_file_is_refused_by_name(tmp_path: Path):
    run = build_synthetic_run(tmp_path / "run")
    (run / "summary.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"summary\.parquet has changed"):
        build_report(run)
    assert not (run / "report.html").exists()


def test_a_folder_that_is_no_run_is_refused(tmp_path: Path):
    with pytest.raises(UserError, match="not a run folder"):
        build_report(tmp_path)


def test_report_is_the_same_twice(run: Path, html: str):
    assert render(Tables(run)) == html


def test_full_size_stays_small(tmp_path: Path):
    run = build_synthetic_run(tmp_path / "run", Size(prompts=600, features=75, examples=200))
    assert build_report(run).stat().st_size < 2_000_000


# What stands in it


def test_every_id_is_in_the_page(run: Path, page: Page):
    tables = Tables(run)
    for row in tables.rows("summary"):
        assert row["example_id"] in page.text
    cards = {a.get("id") for a in page.all("details")}
    assert {f"feature-{r['feature_id']}" for r in tables.rows("coefficients")} <= cards
    for row in tables.rows("audit"):
        assert row["category"] in page.text


def test_example_table_has_exact_values_for_sorting(run: Path, html: str):
    summary = Tables(run).rows("summary")
    body = re.search(r'id="example-table".*?<tbody>(.*?)</tbody>', html, re.S).group(1)
    rows = re.findall(r'<tr data-index="(\d+)">(.*?)</tr>', body, re.S)
    assert [int(i) for i, _ in rows] == list(range(len(summary)))
    by_id = {r["example_id"]: r for r in summary}
    for _, cells in rows:
        example = re.search(r'data-example="\d+">([^<]+)<', cells).group(1)
        values = [float(v) for v in re.findall(r'class="num[^"]*" data-v="([^"]+)"', cells)]
        row = by_id[example]
        names = ("score", "score:x", "score:y", "behavior:harmful", "behavior:harmless")
        assert values[:5] == [row[name] for name in names]
        assert values[-2:] == [row["n_scored"], row["loss"]]
    scores = [abs(by_id[re.search(r">([^<]+)<", c).group(1)]["score"]) for _, c in rows]
    assert scores == sorted(scores, reverse=True)


NAMED = ("score", "score:x", "score:y", "behavior:harmful", "behavior:harmless")


def test_data_block_belongs_to_its_example(run: Path, page: Page):
    tables = Tables(run)
    moved, changes = shifts(tables), effects(tables)
    for i, example in enumerate(page.data["examples"]):
        assert example["id"] == shown(tables)[i]["example_id"]
        row = moved.example_ids.index(example["id"])
        for feature, x, y in example["top"]:
            column = moved.feature_ids.index(feature)
            assert x == pytest.approx(moved.x[row, column], rel=1e-5)
            assert y == pytest.approx(moved.y[row, column], rel=1e-5)
        assert len(example["top"]) == 10
        values = changes.values[changes.rows.index(example["id"])]
        extreme = values.argmax() if values.max() > 0 else values.argmin()
        at, dy = example["moves"][0 if values.max() > 0 else -1]
        assert dy == pytest.approx(values[extreme], rel=1e-5)
        assert page.data["prompts"][at][0] == changes.columns[int(extreme)]
        assert example["values"] == pytest.approx([shown(tables)[i][name] for name in NAMED], rel=1e-5)
    assert [name for name, _ in page.data["targets"]] == list(map(text.words, NAMED))


def test_shifts_are_joined_by_id_and_take_one_estimator(run: Path):
    tables = Tables(run)
    coef = {r["feature_id"]: r["coef"] for r in tables.rows("coefficients")}
    moved = shifts(tables)
    score = {r["example_id"]: r["score"] for r in tables.rows("summary")}
    expected = [score[p] for p in moved.example_ids]
    np.testing.assert_allclose(moved.total @ np.array([coef[f] for f in moved.feature_ids]), expected, rtol=1e-9)


def test_coefficients_stand_strongest_first(run: Path, html: str):
    coef = {r["feature_id"]: abs(r["coef"]) for r in Tables(run).rows("coefficients")}
    cards = [int(i) for i in re.findall(r'id="feature-(\d+)"', html)]
    table = re.search(r'<section id="policy".*?</section>', html, re.S)[0]
    rows = [int(i) for i in re.findall(r'<tr><td class="ids" data-v="(\d+)"><a class="id"', table)]
    assert cards == rows == sorted(coef, key=lambda f: -coef[f])


def test_examples_without_a_score_are_counted_and_left_out(tmp_path: Path):
    path = build_synthetic_run(tmp_path / "run")
    table = pq.read_table(path / "summary.parquet").to_pylist()
    for row in (table[0], table[5]):
        row.update(dict.fromkeys(("score", "score:x", "score:y", "dominant_feature", "unintended", "outside_share")))
        row.update(label=None, loss=float("nan"))
    rewritten(path, "summary", table)
    page = Page(build_report(path).read_text(encoding="utf-8"))
    assert "2 examples without a score" in page.text
    assert "unlabelled examples move" not in page.text
    marks = [a for tag, a in page.tags if tag in {"circle", "path"} and "data-example" in a]
    assert len(marks) == len(table) - 2
    assert table[0]["example_id"] in page.text


# Without an SAE, and with targets of other packages


@pytest.fixture(scope="module")
def without_sae(tmp_path_factory) -> Path:
    stages = ("attribute", "curate")
    return build_synthetic_run(tmp_path_factory.mktemp("plain") / "run", sae=False, stages=stages)


def test_without_an_sae_sections_of_a_policy_are_left_out_and_one_line_says_what_it_would_add(without_sae: Path):
    page = Page(build_report(without_sae).read_text(encoding="utf-8"))
    assert [a["id"] for a in page.all("section")] == [name for name in IDS if name not in OF_POLICY]
    assert page.text.count("This run has no SAE.") == 1
    assert "S is the policy" not in page.text and "Outside" not in page.text


def test_without_an_sae_the_verdict_begins_with_who_moves_the_behavior_on_each_group(without_sae: Path):
    tables = Tables(without_sae)
    first, second = sentences_of(tables)[:2]
    rows = tables.rows("summary")
    assert (first.topic, second.topic) == ("Behavior", "To drop")
    for group in ("harmful", "harmless"):
        for end in (max, min):
            assert end(rows, key=lambda r: r[f"behavior:{group}"])["example_id"] in first.text
        assert f"ehavior on {group}" in first.text
    assert "paper by behavior on harmful" in second.text
    titles = [plain(block.caption) for block in blocks_of(SECTIONS.get("examples"), tables) if isinstance(block, Table)]
    assert titles[0].startswith("Behavior on harmful: the examples that raise it most")
    order = sorted(rows, key=lambda r: -abs(r["behavior:harmful"]))
    assert [e["id"] for e in Page(render(tables)).data["examples"]] == [r["example_id"] for r in order]


def test_a_target_that_nobody_registered_is_shown_everywhere(tmp_path: Path):
    tables = Tables(build_synthetic_run(tmp_path / "run", extra=("spread:all",)))
    rows = tables.rows("summary")
    (sentence,) = (s for s in sentences_of(tables) if s.topic == "Other targets")
    most, least = (end(rows, key=lambda r: r["spread:all"])["example_id"] for end in (max, min))
    assert re.match(rf"spread:all: {most} .* raises it most, .*{least} .* lowers it most", sentence.text)
    page = Page(render(tables))
    assert "spread:all" in [name for name, _ in page.data["targets"]]
    assert page.text.count("spread:all") >= 3  # the verdict, its strongest examples, a column of the table


def test_a_section_of_another_package_stands_in_the_page_and_its_navigation(run: Path, monkeypatch):
    monkeypatch.setattr(SECTIONS, "_found", dict(SECTIONS._found))
    tables = Tables(run)
    shape = Table([Column("n", "number", 0)], [(len(tables.rows("summary")),)], "How many")
    SECTIONS.register("spread")(Section("spread", "Spread", ("summary",), lambda _: [Text("Ours <b>"), shape]))
    SECTIONS.register("absent")(Section("absent", "Absent", ("nowhere",), lambda _: []))
    page = Page(render(tables))
    assert {"#spread", "#absent"} <= {a["href"] for a in page.all("a")}
    assert "Ours <b>" in page.text and "No stage of this version writes nowhere" in page.text


@pytest.mark.parametrize(
    ("target", "said"),
    [
        ("behavior:harmless", "behavior on harmless"),
        ("behavior", "behavior on all prompts"),
        ("behavior:a - behavior:b", "behavior on a minus behavior on b"),
        ("score:y", "score S, through the output"),
        ("prompt:q-1", "behavior on the prompt q-1"),
        ("spread:all", "spread:all"),
        ("concept:a - b", "concept a - b"),
    ],
)
def test_targets_in_words(target: str, said: str):
    assert text.words(target) == said


# Runs with more examples than a page can list


@pytest.fixture
def many(tmp_path: Path, monkeypatch) -> Path:
    """A run of 80 examples, of which a page lists the 6 strongest."""
    run = build_synthetic_run(tmp_path / "run", Size(examples=80))
    monkeypatch.setattr(reading, "LARGE", 20)
    monkeypatch.setattr(examples, "STRONGEST", 6)
    monkeypatch.setattr(examples, "ENDS", 1)
    monkeypatch.setattr("taught.report.sections.examples.ENDS", 1)
    return run


@pytest.fixture
def whole(many: Path, monkeypatch) -> Tables:
    """The same run with all its examples listed."""
    with monkeypatch.context() as patch:
        patch.setattr(reading, "LARGE", 10**6)
        tables = Tables(many)
        assert tables.listed is None
        return tables


def test_a_large_run_lists_the_strongest_examples_and_those_it_names(many: Path, whole: Tables):
    tables = Tables(many)
    listed = set(tables.listed)
    assert {r["example_id"] for r in tables.rows("summary")} == listed
    assert {r["example_id"] for r in shown(whole)[:6]} <= listed and len(listed) < 80
    moved, all_ = shifts(tables), shifts(whole)
    for j in range(len(all_.feature_ids)):
        for end in (all_.total[:, j].argmax(), all_.total[:, j].argmin()):
            assert all_.example_ids[end] in listed
    assert {p["example_id"] for p in tables.rows("examples")} == listed == set(moved.example_ids)
    assert set(effects(tables).rows) == listed
    rows = {r["example_id"]: r for r in whole.rows("summary")}
    assert all(rows[r["example_id"]] == r for r in tables.rows("summary"))
    for i, example in enumerate(moved.example_ids):
        at = all_.example_ids.index(example)
        assert np.array_equal(moved.x[i], all_.x[at]) and np.array_equal(moved.y[i], all_.y[at])
        row = effects(tables).values[effects(tables).rows.index(example)]
        assert np.array_equal(row, effects(whole).values[effects(whole).rows.index(example)])


def test_a_large_run_says_the_same_about_all_its_examples(many: Path, whole: Tables):
    found, expected = ({s.topic: s for s in sentences_of(tables)} for tables in (Tables(many), whole))
    del expected["Interference"]  # it would take the shifts of all examples
    assert found == expected


def test_the_page_of_a_large_run_says_what_it_leaves_out_and_where_it_is(many: Path):
    page = build_report(many).read_text(encoding="utf-8")
    n = len(Tables(many).rows("summary"))
    assert f"80 examples, showing {n} of 80" in Page(page).text
    assert '<a href="summary.parquet">summary.parquet</a>' in page
    assert f"{n} of {n}</output>" in page  # the filters count what is in the page
    assert len(Page(page).data["examples"]) == n


def test_an_example_that_a_large_run_does_not_list_can_be_shown(many: Path):
    listed = {r["example_id"] for r in Tables(many).rows("summary")}
    other = next(f"example-{i:04d}" for i in range(80) if f"example-{i:04d}" not in listed)
    assert other in {r["example_id"] for r in Tables(many, also=[other]).rows("summary")}


def test_methods_and_targets_of_scores_are_found_in_one_row_group_as_in_many(many: Path):
    tables = Tables(many)
    index = examples.score_index(tables)
    table = pq.read_table(many / "scores.parquet")
    assert set(index) == set(zip(table["method"].to_pylist(), table["target"].to_pylist(), strict=True))
    rewritten(many, "scores", table.to_pylist())
    assert set(examples.score_index(Tables(many))) == set(index)


@pytest.mark.parametrize("size", [Size(9, 1, 2), Size(12, 2, 4), Size(18, 5, 3)])
def test_tiny_runs_have_a_page(tmp_path: Path, size: Size):
    Page(build_report(build_synthetic_run(tmp_path / "run", size)).read_text(encoding="utf-8"))


def test_offenders_are_flagged_examples(page: Page, run: Path):
    flagged = {r["example_id"] for r in Tables(run).rows("summary") if r["unintended"]}
    assert flagged and sum(example["unintended"] for example in page.data["examples"]) == len(flagged)


def test_embed_cannot_end_its_script():
    record = {"a": "</script><!-- & >\u2028", "b": float("nan"), "c": [1.23456789, float("inf")]}
    body = embed(record)
    assert not set("<>&\u2028") & set(body)
    assert json.loads(body) == {"a": record["a"], "b": None, "c": [1.23457, None]}


@given(st.text())
def test_embed_and_clean_keep_what_is_harmless(words: str):
    kept = text.clean(words)
    assert json.loads(embed(kept)) == kept
    kept.encode("utf-8")
    assert len(kept) == len(words) and text.clean(kept) == kept


@pytest.mark.parametrize(
    ("token", "context", "expected"),
    [
        ("lock", "a lock here", {"before": "a ", "token": "lock", "after": " here"}),
        ("a", "a b a c a", {"before": "a b ", "token": "a", "after": " c a"}),
        ("x", "no such token", {"before": "no such token", "token": "", "after": ""}),
        ("x", "", {"before": "", "token": "x", "after": ""}),
    ],
)
def test_token_is_marked_nearest_to_the_middle(token, context, expected):
    assert split(token, context) == expected


def test_tokens_are_marked_in_their_context(html: str):
    assert re.search(r"how a person would misuse<mark> \w+</mark>", html)


# Verdict

GOOD = {
    "d": 75,
    "r2": {"value": 0.66, "lo": 0.61, "hi": 0.70},
    "accuracy": {"value": 0.79, "lo": 0.76, "hi": 0.82},
    "majority": {"value": 0.667, "lo": 0.63, "hi": 0.70},
    "accuracy_gain": {"value": 0.123, "lo": 0.08, "hi": 0.17},
    "baselines": {
        "group": {"r2": {"value": 0.22, "lo": 0.16, "hi": 0.28}},
        "length": {"r2": {"value": 0.03, "lo": 0.01, "hi": 0.07}},
    },
}


def test_good_policy_is_stated_with_intervals_and_baselines():
    sentence = fit_sentence(GOOD)
    assert sentence.tone == "found"
    for part in (
        "66%",
        "0.66 [0.61, 0.70]",
        "0.22 [0.16, 0.28] from the group label alone",
        "0.03 [0.01, 0.07] from prompt length alone",
        "79.0%",
        "12.3 [8.0, 17.0] points",
    ):
        assert part in sentence.text
    assert "No effect" not in sentence.text and "Caution" not in sentence.text


def test_policy_whose_interval_includes_zero_explains_nothing():
    sentence = fit_sentence(GOOD | {"r2": {"value": 0.02, "lo": -0.05, "hi": 0.08}})
    assert sentence.tone == "none" and sentence.text.startswith("No effect found")
    assert "0.02 [−0.05, 0.08]" in sentence.text and "explains 2%" not in sentence.text


def test_trivial_predictor_that_does_as_well_is_warned_of():
    rival = {"group": {"r2": {"value": 0.60, "lo": 0.55, "hi": 0.65}}}
    sentence = fit_sentence(GOOD | {"baselines": rival})
    assert sentence.tone == "caution" and "the group label alone does about as well" in sentence.text


def test_accuracy_without_gain_is_warned_of():
    sentence = fit_sentence(GOOD | {"accuracy_gain": {"value": 0.01, "lo": -0.02, "hi": 0.04}})
    assert sentence.tone == "caution" and "no gain that can be told from zero" in sentence.text


def audit_row(category: str, group: str, gap: float, uncovered: bool | None) -> dict:
    return {
        "category": category,
        "group": group,
        "gap": gap,
        "lo": gap - 0.5,
        "hi": gap + 0.5,
        "p_adjusted": 0.0004,
        "uncovered": uncovered,
        "n": 20,
        "mean_y": -10.0,
        "features": [],
    }


def test_checks_that_do_not_pass_are_named_and_told_where_they_are_explained():
    given = [
        {"code": f"F0{i}", "name": n, "status": s}
        for i, (n, s) in enumerate([("fit", "pass"), ("signs", "warn"), ("words", "fail")])
    ]
    sentence = trust_sentence(given)
    assert sentence.tone == "caution"
    assert sentence.text == (
        "1 of 3 checks of the policy pass. Fails: F02 words. Warns: F01 signs. What they mean: docs/checks.md."
    )
    assert trust_sentence(given[:1]).tone == "found"
    assert trust_sentence(given[:1]).text == "1 of 1 check of the policy pass."


def test_every_check_stands_in_the_page_with_value_and_status(run: Path, page: Page):
    for check in Tables(run).json("faithfulness")["checks"]:
        assert f"{check['code']}{check['name']}: {check['meaning']}" in page.text
        assert (f"To do: {check['action']}" in page.text) == (check["status"] != "pass")
    assert "0.66 [0.61, 0.70]R² at least 0.3" in page.text
    assert "0.59correlation at least 0.8" in page.text  # a bare number has no interval
    assert "3 of 12 (1.2)" in page.text and "7 [5, 9] of 12 features give 95%" in page.text


def test_slopes_stand_in_the_page_beside_coefficients(run: Path, page: Page):
    slopes = Tables(run).rows("clamp")
    strongest, off = max(slopes, key=lambda r: abs(r["coef"])), slopes[-1]
    line = interval_text(Interval(strongest["slope"], strongest["lo"], strongest["hi"]))
    assert f"{text.signed(strongest['coef'])}{line}" in page.text
    assert page.text.count("not active on any prompt") == 1 and off["n"] == 0
    assert "all features110.90 [0.60, 0.99]0.45 [0.10, 0.70]0.50 [0.40, 0.60]" in page.text
    assert "one random direction a feature (control)0–––" in page.text
    assert "10 of 11 active features move the behavior more than 2 random directions" in page.text


def clamping(lo: float, clear: int = 4) -> dict:
    same, size = {"value": 0.7, "lo": lo, "hi": 0.8}, {"value": 0.5, "lo": 0.1, "hi": 0.9}
    rank = {"value": None, "lo": None, "hi": None}
    found = {"n": 10, "same_sign": same, "spearman": rank, "size": size}
    return {"scales": [0.0, 3.0], "clear": clear, "active": 10, "agreement": {"all": found}}


def test_the_verdict_calls_coefficients_causes_only_where_signs_agree():
    found = clamp_sentence(clamping(0.55))
    assert found.tone == "found" and found.text == (
        "Scaling a feature's part of the residual by 0 to 3 moves the behavior to the side of the "
        "coefficient for 70% of 10 features (95% 55% to 80%), by 0.50 [0.10, 0.90] of what the "
        "coefficients say. 4 of them move it more than random directions of the same size do "
        "(corrected for their number)."
    )
    for unsure in (clamping(0.45), clamping(0.55, clear=0)):
        sentence = clamp_sentence(unsure)
        assert sentence.tone == "caution" and "not shown to be causes" in sentence.text
    nothing = clamping(0.0)
    nothing["agreement"]["all"]["same_sign"]["value"] = None
    assert clamp_sentence(nothing) is None


def test_safe_ranks_stand_in_the_page(page: Page):
    assert "|score S|undecidedundecided" in page.text
    assert "|behavior on harmful|safe (100.0%)safe (100.0%)" in page.text


def test_a_ranking_without_a_size_has_a_dash():
    rows = [
        {"target": "score", "k": 1, "verdict": "undecided", "share": 0.934},
        {"target": "score:y", "k": 3, "verdict": "safe", "share": 1.0},
    ]
    sizes, cells = rank_table(rows)
    assert sizes == [1, 3]
    assert cells == [
        ("|score S|", ["undecided (93.4%)", "–"]),
        ("|score S, through the output|", ["–", "safe (100.0%)"]),
    ]


def test_audit_names_gaps_and_spill_and_counts_only_what_was_tested():
    rows = [
        audit_row("chemical", "harmful", -2.1, True),
        audit_row("fraud", "harmful", 0.1, False),
        audit_row("tiny", "harmful", -3.0, None),
        audit_row("over", "harmless", 1.7, True),
    ]
    sentence = audit_sentence(rows, "harmful")
    assert "1 of 3 tested categories not covered: the behavior falls short in chemical" in sentence.text
    assert "−2.10 [−2.60, −1.60]" in sentence.text and "p < 0.001" in sentence.text
    assert "uncalled for: over" in sentence.text and "tiny" not in sentence.text
    nothing = audit_sentence(rows[1:2], "harmful")
    assert nothing.tone == "none" and nothing.text.startswith("No effect found")


def example_rows(scores: list[float], labels: list[str] | None = None) -> list[dict]:
    labels = labels or ["refusal"] * len(scores)
    return [
        {
            "example_id": f"p{i}",
            "label": label,
            "score": s,
            "score:x": 0.2 * s,
            "score:y": 0.8 * s,
            "n_scored": 10 + (7 * i) % 11,
            "loss": 1.0 + ((5 * i) % 7) / 7,
        }
        for i, (s, label) in enumerate(zip(scores, labels, strict=True))
    ]


def moved(rows: list[dict], *names: str):
    return moved_sentence("", rows, names or ("score",))


def test_strongest_examples_are_named_with_pathway_and_no_overclaim():
    sentence = moved(example_rows([2e-4, 5e-4, -1e-4]))
    assert "S: p1 (refusal) raises it most, +5.00\u00a0×10⁻⁴" in sentence.text.replace("S: ", "S: ")
    assert "p2 (refusal) lowers it most, −1.00" in sentence.text
    assert "mainly through output probability (x +1.00, y +4.00)" in sentence.text
    assert "does not by itself mean more of the behavior" in sentence.text
    both = moved([example_rows([1.0])[0] | {"score:x": 0.5, "score:y": 0.5}])
    assert "through both pathways" in both.text
    assert "no example lowers it by more than 2% of the largest change" in both.text
    down = moved(example_rows([1e-3, -1.0])).text
    assert down.startswith("Score S: no example raises it by more than 2%")
    assert "p1 (refusal) lowers it most" in down


def test_behavior_is_told_apart_by_group_and_with_its_error():
    rows = example_rows([5e-4, 1e-4])
    for row, harmful, harmless in zip(rows, (1e-5, -4e-3), (2e-5, 1e-3), strict=True):
        row.update({"behavior:harmful": harmful, "behavior:harmless": harmless, "behavior:harmless se": 1e-4})
    words = moved(rows, "behavior:harmful", "behavior:harmless").text.replace("\u00a0", " ")
    assert "Behavior on harmful: no example raises it by more than 2%" in words
    assert "p1 (refusal) lowers it most, −4.00 ×10⁻³; Behavior on harmless: p1 (refusal) raises it most, " in words
    assert "1.00 [0.80, 1.20] ×10⁻³" in words
    for row in rows:
        row.update({"behavior:harmless se": 1e-2})
    assert moved(rows, "behavior:harmless").tone == "none"
    assert "every interval includes zero" in moved(rows, "behavior:harmless").text
    assert moved(rows, "behavior:harmful", "behavior:harmless").tone == "found"


def test_values_of_zero_are_no_effect():
    assert moved(example_rows([0.0, 0.0])).tone == "none" and moved([], "behavior:x").tone == "none"
    assert moved_sentence("", example_rows([1.0]), []) is None


def summary(rows: list[dict]) -> Summary:
    return Summary.of(pa.Table.from_pylist(rows))


def test_label_whose_interval_includes_zero_has_no_effect():
    rng = np.random.default_rng(0)
    scores = [*(1 + 0.1 * rng.normal(size=40)), *rng.normal(size=40)]
    sentence = label_sentence(summary(example_rows(scores, ["a"] * 40 + ["b"] * 40)), "score")
    a, b = sentence.text.split(";")
    assert "no effect found" not in a and "no effect found: the interval includes zero" in b
    assert "80% of the absolute effect runs through output probability, 20%" in sentence.text


@pytest.mark.parametrize(
    ("flagged", "tone", "part"),
    [(20, "found", "fewer than chance"), (70, "none", "No effect found"), (95, "found", "more than chance")],
)
def test_unintended_effects_are_judged_against_chance(flagged, tone, part):
    sentence = unintended_sentence(Control(100, flagged, Interval(70, 61, 79), 66.0))
    assert sentence.tone == tone and part in sentence.text
    assert f"{flagged} of 100 examples ({flagged}%)" in sentence.text and "70 [61, 79]" in sentence.text


def test_label_that_ranks_like_the_score_is_warned_of():
    scores = [*np.linspace(1, 2, 30), *np.linspace(-2, -1, 30)]
    rows = example_rows([float(s) for s in scores], ["refusal"] * 30 + ["answer"] * 30)
    sentence = trivial_sentence(summary(rows), "score")
    assert sentence.tone == "caution" and "label alone gives much of the same ranking" in sentence.text
    for row, length in zip(rows, np.argsort(np.argsort(scores)), strict=True):
        row["label"], row["n_scored"] = "refusal", int(length)
    found = dict(trivial_correlations(summary(rows), "score"))
    assert found["response length"].value == pytest.approx(1.0) and "label" not in str(found)


def test_no_trivial_predictor_is_said_so():
    rng = np.random.default_rng(2)
    sentence = trivial_sentence(summary(example_rows(rng.normal(size=60).tolist())), "score")
    assert sentence.tone == "none" and sentence.text.startswith("No effect found")


def test_the_linear_value_is_said_to_be_as_good_as_its_steps() -> None:
    rows = example_rows([2.0, -1.0, 0.5])
    assert step_sentence(rows, "score") is None
    rows[0] |= {"step_score": 2.04, "refit_score": 1.98}
    rows[1] |= {"step_score": -0.99, "refit_score": -1.0}
    sentence = step_sentence(rows, "score")
    assert sentence.tone == "found"
    assert "2 examples" in sentence.text
    assert "2.0% (a real step) and 1.0% (an exact refit)" in sentence.text
    rows[1]["step_score"] = -0.9
    assert step_sentence(rows, "score").tone == "caution"
    rows[1]["refit_score"] = -3.1
    assert "2.1 times their size (an exact refit)" in step_sentence(rows, "score").text
    other = [{"behavior:x": 1.0, "step_score": 1.1, "score": 2.0, "refit_score": 2.02}]
    assert "10.0% (a real step) and 1.0% (an exact refit)" in step_sentence(other, "behavior:x").text


def test_a_derivative_that_did_not_foresee_other_weights_is_cautioned_of() -> None:
    def check(score: float, predicted: float, measured: float, target: str = "behavior:odd") -> list[dict]:
        return [
            {"score": score, "h": 0.1, "targets": [{"target": target, "predicted": predicted, "measured": measured}]}
        ]

    assert derivative_sentence([]) is None
    assert derivative_sentence(check(0.83, 0.015, 0.014)) is None
    assert derivative_sentence(check(0.83, 0.5, 0.1, "coefficient:3")) is None  # there are too many of them
    for bad, said in ((check(0.5, 0.015, 0.014), "0.50"), (check(0.99, 0.065, -0.004), "behavior on odd")):
        sentence = derivative_sentence([*check(0.99, 1.0, 1.0), *bad])
        assert sentence.tone == "caution" and said in sentence.text


def curated(rows: list[dict], examples: list[dict]) -> Curated:
    labels = {key: pa.array([p[key] for p in examples], pa.string()) for key in ("example_id", "label")}
    return Curated.of(pa.Table.from_pylist(rows), pa.table(labels))


def test_the_verdict_says_how_far_a_ranking_by_sketches_can_be_trusted():
    draw = np.random.default_rng(0)
    exact = draw.normal(size=4000)
    for se in (0.1, 1.0):
        score = exact + se * draw.normal(size=4000)
        rows = [{"label": "a", "score": s, "score se": se, "unintended": False} for s in score]
        sentence = sketch_sentence(summary(rows), "score")
        expected = np.corrcoef(score, exact)[0, 1]
        (said,) = re.findall(r"about (\d\.\d{3}) with", sentence.text)
        assert float(said) == pytest.approx(expected, abs=0.01)
        assert sentence.tone == ("found" if se == 0.1 else "caution")
        assert f"{(np.abs(score) > 2 * se).sum():,} of 4,000 examples" in sentence.text
    rows = [{"label": "a", "score": 1.0, "score se": None, "unintended": False}]
    assert sketch_sentence(summary(rows), "score") is None


def test_rankings_are_said_to_be_safe_or_why_they_are_not():
    def row(target: str, k: int, verdict: str, reason: str = "") -> dict:
        return {"target": target, "k": k, "verdict": verdict, "reason": reason}

    some = [
        row("score", 1, "undecided", "needs dX"),
        row("score", 3, "undecided", "needs dX"),
        row("behavior:odd", 1, "safe"),
        row("behavior:odd", 3, "safe"),
        row("behavior:odd", 5, "undecided", "too near"),
    ]
    sentence = ranking_sentence(some)
    assert sentence.tone == "caution"
    assert "by |score S| none (top 1 undecided: needs dX); by |behavior on odd| the top 1 and 3 safe " in (
        sentence.text
    )
    assert sentence.text.endswith("(top 5 undecided: too near).")
    assert ranking_sentence(some[2:]).tone == "found"


def test_curation_by_another_target_says_so() -> None:
    rows = [
        {
            "example_id": "p",
            "action": "drop",
            "rule": "top-k",
            "target": "behavior:harmless",
            "score": 1.0,
            "threshold": 1.0,
        }
    ]
    assert "“top-k by behavior on harmless”" in curation_sentence(curated(rows, [])).text


def test_curation_counts_by_label():
    rows = [
        {
            "example_id": f"p{i}",
            "action": "drop" if i < 3 else "keep",
            "rule": "paper",
            "score": -0.1 * i,
            "threshold": 0.0,
        }
        for i in range(8)
    ]
    examples = example_rows([0.0] * 8, ["a", "b", "a", "a", "a", "b", "b", "b"])
    assert "first of all p2, p1 and p0" in curation_sentence(curated(rows, examples)).text
    assert "drop 3 of 8 examples (2 a and 1 b)" in curation_sentence(curated(rows, examples)).text
    assert "nothing to drop" in curation_sentence(curated(rows[3:], examples)).text


@pytest.mark.parametrize(
    ("lo", "tone", "begins"),
    [
        (-0.9, "found", "Training without the 8 examples (15%) that raise behavior on harmless most moves it"),
        (-1.4, "none", "No effect found: training without the 8 examples (15%)"),
    ],
)
def test_what_retraining_did_stands_in_the_verdict(lo: float, tone: str, begins: str):
    point = {
        "design": "removal",
        "budget": 8,
        "share": 0.15,
        "difference": -0.5,
        "lo": lo,
        "hi": 0.3 if tone == "none" else -0.1,
    }
    assert retraining_sentence([], "") is None
    sentence = retraining_sentence([{**point, "design": "addition"}, point], "behavior:harmless")
    assert (sentence.topic, sentence.tone) == ("Retraining", tone)
    assert sentence.text.startswith(begins) and "by \u22120.5 [" in sentence.text


def test_the_verdict_says_how_well_retraining_was_foreseen():
    row = {"method": "adjoint", "target": "behavior:x", "subsets": "random", "raw": 0.6, "raw_lo": 0.4, "raw_hi": 0.7}
    rows = [row, {**row, "target": "coefficient:1", "raw": 0.9}, {**row, "method": "length", "raw": 0.1}]
    sentence = foreseen_sentence(rows)
    assert sentence.tone == "found" and "behavior on x 0.60 [0.40, 0.70] (random)" in sentence.text
    assert "0.90" not in sentence.text and "0.10" not in sentence.text
    assert foreseen_sentence([{**row, "raw_lo": -0.1}]).tone == "caution" and foreseen_sentence([]) is None


def test_arms_stand_side_by_side_with_differences_to_random():
    def row(arm: str, metric: str, value: float, gap: float | None, p: float | None) -> dict:
        return {
            "arm": arm,
            "metric": metric,
            "models": 1,
            "examples": {"all": 9}.get(arm, 4),
            "value": value,
            "lo": value / 2,
            "hi": 2 * value,
            "difference": gap,
            "difference_lo": gap and gap - 1e-4,
            "difference_hi": gap and gap + 1e-4,
            "p": p,
            "p_holm": p,
        }

    rows = [
        row("all", "recall", 4e-4, 3e-4, 0.01),
        row("all", "f1", 0.5, 0.2, 0.3),
        row("random", "recall", 1e-4, None, None),
        row("random", "f1", 0.3, None, None),
    ]
    table = arms_table("Ways", rows)
    assert [c.title for c in table.columns] == ["Metric", "all, 9 examples", "random, 4 examples"]
    (recall, own, random), (f1, one, _) = ([plain(cell) for cell in row] for row in table.rows)
    assert (recall, f1) == ("recall\u00a0×10⁻⁴", "f1")
    assert own.splitlines() == ["4.000 [2.000, 8.000]", "+3.000* [2.000, 4.000]"]
    assert random == "1.000 [0.500, 2.000]" and "+0.200 [" in one


@pytest.mark.parametrize(
    ("changes", "inverse", "says"),
    [
        ({}, False, "one plain SGD step"),
        ({"curvature": "adam"}, True, "one step of Adam"),
        (
            {
                "curvature": {"kind": "ekfac", "damping": 0.1},
                "trajectory": {"kind": "checkpoints", "checkpoints": [{"id": "a"}, {"id": "b"}]},
            },
            True,
            "in the metric of EK-FAC from each of 2 checkpoints, added up,",
        ),
        (
            {"trajectory": {"kind": "checkpoints", "checkpoints": [{"id": "tuned"}]}},
            False,
            "one plain SGD step from tuned at the learning rate",
        ),
        ({"curvature": "hessian"}, True, "in the metric of hessian"),
        ({"trajectory": {"kind": "segments", "checkpoints": 3}}, False, "one plain SGD step"),
    ],
)
def test_the_method_says_which_step_is_meant(run: Path, changes: dict, inverse: bool, says: str):
    tables = Tables(run)
    tables.study = {**tables.study, "attribution": {**tables.study["attribution"], **changes}}
    page = Page(render(tables)).text
    assert says in page and ("−lr C⁻¹ ∇L" in page) == inverse
    places = changes.get("trajectory", {}).get("kind") == "checkpoints"
    assert ("lr that of each checkpoint" in page) == places == ("Influence at" in page)


def test_verdict_of_a_run_has_at_most_twelve_sentences(run: Path):
    sentences = sentences_of(Tables(run))
    assert 4 <= len(sentences) <= 12 and len({s.topic for s in sentences}) == len(sentences)
    assert [s.topic for s in sentences][:3] == ["Behavior", "Policy", "To drop"]


# Numbers


@pytest.mark.parametrize(
    ("value", "power", "expected"),
    [
        (0.00123, -3, "+1.23"),
        (-2.5, 0, "−2.50"),
        (0.0, 0, "0.00"),
        (-0.001, 0, "0.00"),
        (None, 0, "–"),
        (float("nan"), 0, "–"),
        (1234.5, 0, "+1,234.50"),
    ],
)
def test_signed_numbers(value, power, expected):
    assert text.signed(value, power=power) == expected


def test_common_power_and_its_name():
    assert text.common_power([1e-4, -3.2e-3, None]) == -3 and text.tens(-3) == "\u00a0×10⁻³"
    assert text.number(2e-320, power=text.common_power([2e-320])) == "0.00"
    assert text.common_power([0.5, 20.0]) == 0 and text.tens(0) == "" and text.common_power([]) == 0


def test_intervals_are_read_as_the_stages_write_them():
    assert read_interval({"value": 1, "lo": 0.5, "hi": 2}) == Interval(1.0, 0.5, 2.0)
    assert interval_text(read_interval({"value": 1, "lo": None, "hi": None})) == "1.00"
    assert interval_text(read_interval([1e-3, 5e-4, 2e-3]), power=-3) == "1.00 [0.50, 2.00]"
    assert read_interval({"value": None, "lo": None, "hi": None}) is None and read_interval(None) is None


def test_unintended_control_on_a_run_worked_by_hand():
    # Examples 0 and 1 act on their own feature, example 2 on that of example 0; example 3 intends nothing.
    total = np.array([[3.0, 1, 0, 0], [1, 3, 0, 0], [3, 0, 1, 0], [1, 0, 0, 0]])
    control = stats.unintended_control([10, 11, 12, 13], total, [[10], [11], [12], []])
    assert (control.n, control.flagged) == (3, 1)
    assert control.random.value == pytest.approx(3 * 0.75)
    # Another example's set: example 0 misses both, example 1 misses both, example 2 hits that of example 0 only.
    assert control.swapped == pytest.approx(1 + 1 + 0.5)
    assert stats.unintended_control([10], np.zeros((1, 1)), [[10]]) is None


def test_cluster_order_puts_blocks_together():
    block = np.kron(np.eye(3), np.ones((4, 4))) * 0.8 + 0.1
    shuffle = np.random.default_rng(0).permutation(12)
    order = stats.cluster_order(block[np.ix_(shuffle, shuffle)])
    groups = [int(shuffle[i]) // 4 for i in order]
    assert sorted(order) == list(range(12))
    assert sum(a != b for a, b in pairwise(groups)) == 2
    assert stats.cluster_order(np.full((3, 3), np.nan)) and stats.cluster_order(np.zeros((0, 0))) == []


# Drawings


def numbers(pattern: str, svg: str) -> list[float]:
    return [float(v) for v in re.findall(pattern, svg)]


def test_forest_row_coordinates():
    scale = Scale(-1.0, 1.0, 0.0, 200.0)
    svg = charts.forest_row(Interval(0.5, 0.25, 0.75), scale)
    assert numbers(r'cx="([\d.]+)"', svg) == [150.0]
    assert numbers(r'class="ci pos sure" x1="([\d.]+)"', svg) == [125.0]
    assert numbers(r'x2="([\d.]+)"', svg) == [100.0, 175.0]  # zero line, end of the interval
    unsure = charts.forest_row(Interval(-0.5, -1.0, 0.25), scale)
    assert 'class="dot neg hollow"' in unsure and 'class="ci neg"' in unsure


def test_scatter_coordinates_and_one_scale():
    points = [Point(1.0, 2.0, 0, 0, "a <b>"), Point(-1.0, -2.0, 1, 1, "c")]
    svg = charts.scatter(points, ("x", "y"), "title")
    assert charts.one_scale(points) and not charts.one_scale([Point(0.1, 2.0, 0, 0, "")])
    reach = 2 + 0.04 * 4
    share = (1 + reach) / (2 * reach)
    width = charts.SIZE - charts.EDGE - charts.LEFT
    height = charts.SIZE - charts.BOTTOM - charts.EDGE
    (cx,), (cy,) = (numbers(r'<circle cx="([\d.]+)"', svg), numbers(r'<circle cx="[\d.]+" cy="([\d.]+)"', svg))
    assert cx == pytest.approx(charts.LEFT + share * width, abs=0.01)
    assert cy == pytest.approx(charts.EDGE + (reach - 2) / (2 * reach) * height, abs=0.01)
    assert "a &lt;b&gt;" in svg and 'data-example="1"' in svg


def test_line_of_zero_score_passes_the_origin():
    svg = charts.scatter([Point(3.0, 1.0, 0, 0, ""), Point(-1.0, -0.5, 0, 1, "")], ("x", "y"), "t")
    x1, y1, x2, y2 = (numbers(rf'class="even".*?{k}="([\d.]+)"', svg)[0] for k in ("x1", "y1", "x2", "y2"))
    zero_x = numbers(r'class="zero" x1="([\d.]+)" y1="12"', svg)[0]
    zero_y = numbers(r'class="zero" x1="56" y1="([\d.]+)"', svg)[0]
    on_line = y1 + (zero_x - x1) / (x2 - x1) * (y2 - y1)
    assert on_line == pytest.approx(zero_y, abs=0.05)


def test_heatmap_draws_each_cell_once_with_its_sign():
    r = np.array([[1.0, -0.5, 0.0], [-0.5, 1.0, np.nan], [0.0, np.nan, 1.0]])
    svg = charts.heatmap(r, ["7", "8", "9"], "t")
    assert re.findall(r'class="pos" fill-opacity="1" d="([^"]+)"', svg) == ["M0 0h1v1h-1zM1 1h1v1h-1zM2 2h1v1h-1z"]
    assert re.findall(r'class="neg" fill-opacity="0.5" d="([^"]+)"', svg) == ["M1 0h1v1h-1zM0 1h1v1h-1z"]
    assert svg.count(">8</text>") == 2


def test_bar_points_to_its_sign():
    right, left = charts.bar(1.0, 2.0, width=60), charts.bar(-2.0, 2.0, width=60)
    assert numbers(r'<rect class="pos" x="([\d.]+)"', right) == [30.0]
    assert numbers(r'width="([\d.]+)" height="8"', right) == [15.0]
    assert numbers(r'<rect class="neg" x="([\d.]+)"', left) == [0.0]


@pytest.mark.parametrize(("lo", "hi", "expected"), [(0, 1, [0, 0.2, 0.4, 0.6, 0.8, 1.0]), (-7, 8, [-5, 0, 5])])
def test_ticks_are_round_and_inside(lo, hi, expected):
    assert charts.ticks(lo, hi) == pytest.approx(expected)


@given(st.floats(-1e6, 1e6), st.floats(1e-6, 1e6))
def test_ticks_never_leave_the_range(lo: float, width: float):
    values = charts.ticks(lo, lo + width)
    slack = 1e-6 * (abs(lo) + width)
    assert all(lo - slack <= v <= lo + width + slack for v in values)
