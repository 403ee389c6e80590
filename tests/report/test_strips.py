"""Shares of response tokens in a run and its report, and the section on concepts."""

from __future__ import annotations

import re
from html.parser import HTMLParser

import pytest

from synthetic_run import HOSTILE, build_synthetic_run, rewritten
from taught.report.agreement import agreement_blocks
from taught.report.blocks import Items, Table, Word
from taught.report.html import render
from taught.report.strips import LEVELS, strips
from taught.report.tables import Tables
from taught.report.text import number
from taught.run.folder import RunFolder


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


def rows(*shares: float, target: str = "score") -> list[dict]:
    return [
        {"example_id": "z", "target": target, "position": j, "token": f"t{j}", "share": share}
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
    named = [*rows(1.0), *rows(2.0, target="behavior:harmless"), *other]
    assert [(s.example_id, s.target) for s in strips(named)] == [
        ("z", "score"),
        ("z", "behavior:harmless"),
        ("y", "score"),
    ]


def test_a_line_feed_and_a_space_can_be_seen():
    (strip,) = strips([{**rows(1.0)[0], "token": "\n"}, {**rows(0, -2.0)[1], "token": " "}])
    assert [t.text for t in strip.tokens] == ["↵\n", " "]
    assert strip.largest == "“␣” −2.00, “↵” +1.00"


# The report


@pytest.fixture(scope="module")
def html(tmp_path_factory) -> str:
    return render(Tables(build_synthetic_run(tmp_path_factory.mktemp("run") / "r", concepts=True)))


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
    path = build_synthetic_run(tmp_path / "r", concepts=True)
    run = RunFolder.open(path)
    page = section(render(Tables(run)), "concepts")
    table = [r for r in run.read_table("scores").to_pylist() if r["target"] == "concept:refusal"]
    for method in dict.fromkeys(r["method"] for r in table):
        own = sorted((r for r in table if r["method"] == method), key=lambda r: -abs(r["value"]))[:5]
        shown = re.findall(rf"<bdi>{method}</bdi></td><td[^>]*><span class=.example[^>]*>([^<]+)</span>", page)
        assert shown == [r["example_id"] for r in own]
    apart = [r for r in run.read_table("agreement").to_pylist() if r["rank_correlation"] < 0.5]
    assert page.count("Disagree: ") == len(apart) == 2
    assert page.count('class="badge warn"') == 2 * 2
    assert all(number(r["lo"]) in page for r in apart)
    assert "AUC 0.91 [0.84, 0.97] between the two groups" in page
    assert len(Spans(page).strips) == 2


def test_methods_that_may_still_agree_are_undecided_on_any_target(tmp_path):
    path = build_synthetic_run(tmp_path / "r", concepts=True)
    of = {"target": "score", "method": "adjoint", "other": "sketch"}
    rewritten(path, "agreement", [{**of, "rank_correlation": 0.3, "lo": -0.1, "hi": 0.6}])
    items, table = agreement_blocks(Tables(path), "score")
    assert isinstance(items, Items) and items.items[0].startswith("Undecided: adjoint and sketch")
    assert isinstance(table, Table) and table.rows[0][2] == Word("0.30 [−0.10, 0.60]", "badge")
    assert "Undecided" in section(render(Tables(path)), "examples")
    assert agreement_blocks(Tables(path), "behavior:harmful") == []


def test_without_the_stage_the_section_says_what_makes_it(tmp_path):
    run = build_synthetic_run(tmp_path / "r", stages=("policy",))
    page = section(render(Tables(run)), "concepts")
    assert "<code>taught run STUDY --to concepts</code> makes it, with <code>concepts:</code> in the study" in page


def test_tokens_and_names_of_concepts_are_text(tmp_path):
    html = render(Tables(build_synthetic_run(tmp_path / "r", concepts=True, hostile=True)))
    for name in ("examples", "concepts"):
        page = section(html, name)
        assert "<img" not in page and "<script" not in page and "\x1b" not in page
        assert HOSTILE in Spans(page).strips[0][0][2]
