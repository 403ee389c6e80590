"""``taught show``: the numbers are there, ids lead to details, text cannot steer the terminal."""

from __future__ import annotations

import io
from pathlib import Path

import pytest
from rich.console import Console

from synthetic_run import build_synthetic_run
from taught.errors import UserError
from taught.report import text
from taught.report.examples import shifts
from taught.report.show import show_run
from taught.report.tables import Tables
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
    words, tables = shown(run), Tables(run)
    assert "R²\u00a00.66 [0.61, 0.70]" in words and "chemical_biological" in words
    for target in ("behavior:harmful", "behavior:harmless", "score"):
        best = max(tables.rows("summary"), key=lambda r: r[target])
        own = words[words.index(f"{text.words(target)[1:]}: the examples that raise it most") :].splitlines()
        assert own[2].startswith(best["example_id"]) and best["label"] in own[2]
    top = max(tables.rows("coefficients"), key=lambda r: abs(r["coef"]))
    line = next(row for row in words.splitlines() if row.startswith(str(top["feature_id"])))
    assert number(top["coef"]) in line and top["label"] in line
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
    table = words[words.index("Ranked by") :].splitlines()
    assert table[0].split()[:5] == ["Ranked", "by", "k", "=", "1"]
    assert table[1].split()[:3] == ["|score", "S|", "undecided"]
    assert table[2].startswith("|behavior on harmful|  safe (100.0%)")


def test_an_example_shows_its_bound_only_where_there_is_one(run: Path):
    first, second = Tables(run).rows("certificates")[:2]
    assert "cannot be further off" not in shown(run, first["example_id"])
    power = common_power([r["score"] for r in Tables(run).rows("summary") if r["example_id"] == second["example_id"]])
    words = shown(run, second["example_id"])
    assert f"an exact refit moves S by {signed(second['refit'], power=power)}" in words
    assert f"further off than {number(second['score_bound'], power=power)}" in words


def test_overview_and_feature_show_what_scaling_does(run: Path):
    slopes = Tables(run).rows("clamp")
    row = max(slopes[:-1], key=lambda r: abs(r["coef"]))
    words = shown(run)
    table = words[words.index("Slope: change of y") :].splitlines()
    assert table[1].split() == ["Feature", "Coefficient", "Slope", "p", "Prompts", "0×", "0.5×", "2×", "3×"]
    assert table[2].split()[:2] == [str(row["feature_id"]), signed(row["coef"])]
    words = shown(run, str(row["feature_id"]))
    assert "Scaled in the model on 24 prompts: slope" in words
    table = words[words.index("Scaled in the model") :].splitlines()
    assert [line.split()[0] for line in table[2:6]] == ["0×", "0.5×", "2×", "3×"]
    assert table[5].split()[1] == number(row["doses"][3]["value"])
    off = slopes[-1]["feature_id"]
    assert "Scaled in the model" not in shown(run, str(off))


def test_overview_names_the_next_command(tmp_path: Path):
    words = shown(build_synthetic_run(tmp_path / "run", stages=("policy",)))
    assert "taught run STUDY --to attribute makes it" in words and "taught curate RUN makes it" in words
    assert "--to policy" not in words


def test_an_older_report_hides_nothing(tmp_path: Path):
    built = build_synthetic_run(tmp_path / "run")
    run = RunFolder.open(built)
    with run.stage("report", run.study):
        run.write_text("report.html", "")
    assert "whether that helps" in shown(built)
    with run.stage("curate", run.study):
        run.write_text("keep.jsonl", "")
    assert "loss" in shown(built, "example-0000") and "dropping them helps" not in shown(built)


def test_example_in_detail(run: Path):
    tables = Tables(run)
    row, example, moved = tables.rows("summary")[3], tables.rows("examples")[3], shifts(tables)
    words = shown(run, row["example_id"])
    assert example["prompt"] in words and example["response"].splitlines()[0] in words
    i = moved.example_ids.index(row["example_id"])
    strongest = moved.feature_ids[int(abs(moved.total[i]).argmax())]
    table = words[words.index("Coefficients that move most") :].splitlines()
    assert table[2].split()[0] == str(strongest) == str(row["dominant_feature"])
    assert "Prompts whose behavior moves most" in words


def test_feature_in_detail(run: Path):
    tables = Tables(run)
    row = tables.rows("coefficients")[2]
    words = shown(run, str(row["feature_id"]))
    assert row["label"] in words and "Prompts where it is strongest" in words
    assert tables.json("labels")[str(row["feature_id"])]["top_prompts"][0]["prompt_id"] in words
    assert "Examples that move this coefficient most" in words


def test_unknown_item_names_close_ids(run: Path):
    with pytest.raises(UserError) as caught:
        show_run(run, "example-003")
    assert "no example, feature or section has this id" in str(caught.value)
    assert "example-0003" in str(caught.value.fix) and caught.value.exit_code == 2


def test_text_from_data_cannot_style_or_steer_the_terminal(tmp_path: Path):
    run = build_synthetic_run(tmp_path / "run", hostile=True)
    example = Tables(run).rows("summary")[0]["example_id"]
    for words in (shown(run), shown(run, example)):
        assert "\x1b[31m" not in words and "\ufffd[31mred" in words
        rows = [row for row in words.splitlines() if row.startswith(("example-", "q-"))]
        assert rows and all("[bold]x[/bold]" in row for row in rows)  # not swallowed as markup


def test_a_section_can_be_asked_for_and_the_whole_is_shorter_than_all_sections(run: Path):
    words = shown(run, "interference")
    assert "Strongest co-movements" in words and "Top offenders" in words
    assert "Strongest co-movements" not in shown(run)


def test_without_an_sae_the_overview_is_about_examples(tmp_path: Path):
    stages = ("attribute", "curate")
    words = shown(build_synthetic_run(tmp_path / "run", sae=False, stages=stages))
    first = words.index("Behavior on harmful: the examples")
    assert words.index("To drop") < first < words.index("sorry") < words.index("9 examples to drop")
    assert "policy" not in words and "Features" not in words and "Validation: Not computed" in words
