"""``taught show``: the numbers are there, ids lead to details, text cannot steer the terminal."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console
from taught.report.view import load_view

from synthetic_run import build_synthetic_run
from taught.errors import UserError
from taught.report.show import show_run
from taught.report.text import common_power, number, signed
from taught.run.folder import RunFolder


def shown(run: Path, item: str | None = None) -> str:
    out = io.StringIO()
    Console(file=out, width=400, force_terminal=True, color_system=None).print(show_run(run, item))
    return out.getvalue()


@pytest.fixture(scope="module")
def run(tmp_path_factory) -> Path:
    return build_synthetic_run(tmp_path_factory.mktemp("show") / "run")


def test_overview_has_verdict_examples_features_and_audit(run: Path):
    words, view = shown(run), load_view(run)
    assert "R²\u00a00.66 [0.61, 0.70]" in words and "chemical_biological" in words
    best = max(view.summary, key=lambda r: r["score"])
    line = next(row for row in words.splitlines() if row.startswith(best["example_id"]))
    assert best["label"] in line and str(best["dominant_feature"]) in line
    top = max(view.coefficients, key=lambda r: abs(r["coef"]))
    line = next(row for row in words.splitlines() if row.startswith(str(top["feature_id"])))
    assert signed(top["coef"]) in line and top["label"] in line
    assert "uncovered" in words


def test_overview_grades_the_policy_and_says_what_to_do(run: Path):
    words = shown(run)
    line = next(row for row in words.splitlines() if row.startswith("F08"))
    assert "0.59" in line and "correlation at least 0.8" in line and "warn" in line
    assert "name the evaluation set" in line
    line = next(row for row in words.splitlines() if row.startswith("F01"))
    assert "0.66 [0.61, 0.70]" in line and "pass" in line and "do not read" not in line


def test_overview_says_which_ranks_are_safe(run: Path):
    words = shown(run)
    table = words[words.index("Do the k strongest examples") :].splitlines()
    assert table[1].split()[:4] == ["by", "k", "=", "1"]
    assert table[2].split()[:2] == ["|S|", "undecided"]
    assert table[3].startswith("|mean y| on harmful  safe (100.0%)")


def test_a_example_shows_its_bound_only_where_there_is_one(run: Path):
    first, second = load_view(run).certificates[:2]
    assert "cannot be further off" not in shown(run, first["example_id"])
    power = common_power([r["score"] for r in load_view(run).summary if r["example_id"] == second["example_id"]])
    words = shown(run, second["example_id"])
    assert f"an exact refit moves S by {signed(second['refit'], power=power)}" in words
    assert f"further off than {number(second['score_bound'], power=power)}" in words


def test_overview_and_feature_show_what_scaling_does(run: Path):
    row = max(load_view(run).clamp[:-1], key=lambda r: abs(r["coef"]))
    words = shown(run)
    table = words[words.index("What the strongest features do when scaled") :].splitlines()
    assert table[1].split() == ["feature", "coefficient", "slope", "0x", "0.5x", "2x", "3x", "adjusted", "p"]
    assert table[2].split()[:2] == [str(row["feature_id"]), signed(row["coef"])]
    words = shown(run, str(row["feature_id"]))
    assert "Scaled in the model on 24 prompts: slope" in words
    table = words[words.index("Scaled in the model") :].splitlines()
    assert [line.split()[0] for line in table[2:6]] == ["0x", "0.5x", "2x", "3x"]
    assert table[5].split()[1] == signed(row["doses"][3]["value"])
    off = load_view(run).clamp[-1]["feature_id"]
    assert "Scaled in the model" not in shown(run, str(off))


def test_overview_names_the_next_command(tmp_path: Path):
    words = shown(build_synthetic_run(tmp_path / "run", stages=("policy",)))
    assert "taught attribute STUDY makes it" in words and "taught curate RUN makes it" in words
    assert "taught policy" not in words


def test_an_older_report_hides_nothing(tmp_path: Path):
    built = build_synthetic_run(tmp_path / "run")
    run = RunFolder.open(built)
    with run.stage("report", run.study):
        run.write_text("report.html", "")
    assert "dropping them helps" in shown(built)
    with run.stage("curate", run.study):
        run.write_text("keep.jsonl", "")
    assert "S " in shown(built, "example-0000") and "dropping them helps" not in shown(built)


def test_example_in_detail(run: Path):
    view = load_view(run)
    row, example = view.summary[3], view.examples[3]
    words = shown(run, row["example_id"])
    assert example["prompt"] in words and example["response"].splitlines()[0] in words
    i = view.shifts.example_ids.index(row["example_id"])
    strongest = view.shifts.feature_ids[int(abs(view.shifts.total[i]).argmax())]
    table = words[words.index("Coefficients that move most") :].splitlines()
    assert table[2].split()[0] == str(strongest) == str(row["dominant_feature"])
    assert "Prompts whose y moves most" in words


def test_feature_in_detail(run: Path):
    view = load_view(run)
    row = view.coefficients[2]
    words = shown(run, str(row["feature_id"]))
    assert row["label"] in words and "Prompts where it is strongest" in words
    assert view.labels[row["feature_id"]]["top_prompts"][0]["prompt_id"] in words
    assert "Examples that move it most" in words


def test_unknown_item_names_close_ids(run: Path):
    with pytest.raises(UserError) as caught:
        show_run(run, "example-003")
    assert "No example or feature has this id" in str(caught.value)
    assert "example-0003" in str(caught.value.fix) and caught.value.exit_code == 2


def test_text_from_data_cannot_style_or_steer_the_terminal(tmp_path: Path):
    run = build_synthetic_run(tmp_path / "run", hostile=True)
    example = load_view(run).summary[0]["example_id"]
    for words in (shown(run), shown(run, example)):
        assert "\x1b[31m" not in words and "\ufffd[31mred" in words
        rows = [row for row in words.splitlines() if row.startswith(("example-", "q-"))]
        assert rows and all("[bold]x[/bold]" in row for row in rows)  # not swallowed as markup
