"""The designs ``unlearn`` and ``teach``: named documents against random ones of the same topic and size."""

from __future__ import annotations

import io
import json
import shutil
from collections import Counter
from pathlib import Path
from tempfile import mkdtemp
from types import SimpleNamespace

import numpy as np
import pytest
from rich.console import Console

from taught.data.examples import load_examples
from taught.errors import UserError
from taught.report.show import show_run
from taught.run.folder import RunFolder
from taught.stages.pairs import topics_of
from taught.study.load import load_study
from taught.study.schema import Study
from taught.training.retrain import Retrainer
from tiny_study import do, values_of, with_values, write_tiny_study

TARGET = "behavior:facts"
WORDS = ["the tower fell", "a ship sank", "bread was warm", "no bird sang", "rain came down", "clay broke"]
SMALL = {
    "sae.path": None,
    "model.dtype": "float64",
    "behavior": {"kind": "choice", "style": "cloze", "normalise": True},
    "prompts.positive_group": None,
    "prompts.negative_group": None,
    "examples.kind": "document",
    "examples.positive_label": None,
    "examples.negative_label": None,
    "examples.max_tokens": 24,
    "attribution.exact_top": 0,
    "attribution.lr": 1e-3,
    "validation.designs": ("unlearn", "teach"),
    "validation.optimizer": "sgd",
    "validation.lr": 1e-3,
    "validation.epochs": 1,
    "validation.batch": 16,
    "validation.budgets": (0.2,),
    "validation.pairs": 5,
    "validation.alike": "topic",
    "validation.remove_by": TARGET,
    "validation.unlearn_steps": 1,
    "validation.unlearn_lr": 1e-3,
}


def write(path: Path, rows) -> None:
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))


@pytest.fixture(scope="module")
def attributed(tmp_path_factory) -> tuple[Study, Path]:
    """Ten documents of two topics, some in two windows, and six questions in two groups; influence is there."""
    folder = tmp_path_factory.mktemp("pairs")
    study = load_study(write_tiny_study(folder))
    documents = [
        {
            "id": f"d{n}",
            "topic": "law" if n % 2 else "art",
            "text": f"{WORDS[n % 6]} {n}" + " at sea again" * (n % 4 > 1),
        }
        for n in range(10)
    ]
    questions = [
        {"id": f"q{n}", "prompt": f"What of {word}?", "group": "facts" if n % 2 else "other", "options": ["yes", "no"]}
        | {"answer": "yes" if n % 6 in (0, 2, 3, 4) else "no"}
        for n, word in enumerate(WORDS)
    ]
    write(folder / "pairs.jsonl", documents)
    write(folder / "prompts.jsonl", questions)
    study = with_values(study, SMALL)
    return study, do(study, folder / "run", "readings", "attribute").folder


@pytest.fixture(scope="module")
def run(attributed) -> RunFolder:
    """Every run of unlearning moves by the rate that the study names, so that effects are in proportion."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("taught.training.unlearn.fitted_rate", lambda lr, *_: lr)
        return fresh(attributed)


def fresh(attributed, **changes) -> RunFolder:
    """A copy of the run, validated with other keys."""
    study, folder = attributed
    copy = Path(mkdtemp(dir=folder.parent)) / "run"
    shutil.copytree(folder, copy)
    return do(with_values(study, {f"validation.{key}": value for key, value in changes.items()}), copy, "validate")


def members(run: RunFolder, design: str) -> dict[str, set[str]]:
    found: dict[str, set[str]] = {}
    for row in run.read_table("subsets").to_pylist():
        if row["design"] == design:
            found.setdefault(row["subset"], set()).add(row["example_id"])
    return found


def changes(run: RunFolder, design: str, target: str = TARGET) -> dict[tuple[str, int], float]:
    rows = run.read_table("outcomes").to_pylist()
    return {(r["subset"], r["repeat"]): r["value"] for r in rows if (r["design"], r["target"]) == (design, target)}


def rows_of(run: RunFolder, **wanted) -> list[dict]:
    rows = run.read_table("verdicts").to_pylist()
    return [row for row in rows if all(row[key] == value for key, value in wanted.items())]


def documents(ids) -> set[str]:
    return {i.partition("#")[0] for i in ids}


@pytest.mark.parametrize("design", ["unlearn", "teach"])
def test_the_named_and_their_like_are_forgotten_or_taught_pair_by_pair(run: RunFolder, design: str) -> None:
    sets, topic = members(run, design), {f"d{n}": "law" if n % 2 else "art" for n in range(10)}
    value: Counter[str] = Counter()
    for example, one in values_of(run, TARGET).items():
        value[example.partition("#")[0]] += one
    assert documents(sets["highest-2"]) == {name for name, _ in value.most_common(2)}
    assert documents(sets["lowest-2"]) == {name for name, _ in value.most_common()[-2:]}
    named = Counter(topic[d] for d in documents(sets["highest-2"]))
    random = [sets[f"random-2-{pair}"] for pair in range(5)]
    assert all(Counter(topic[d] for d in documents(some)) == named for some in random)
    assert not any(documents(some) & documents(sets["highest-2"]) for some in random)
    found = changes(run, design)
    assert len(found) == 3 * 5 and {("highest-2", 4), ("lowest-2", 0), ("random-2-3", 3)} < set(found)


@pytest.mark.parametrize("design", ["unlearn", "teach"])
def test_differences_are_those_of_the_pairs(run: RunFolder, design: str) -> None:
    for target in (TARGET, "behavior:other"):
        (row,) = rows_of(run, design=design, arm="highest", target=target)
        found = changes(run, design, target)
        gaps = [found["highest-2", pair] - found[f"random-2-{pair}", pair] for pair in range(5)]
        assert row["difference"] == pytest.approx(np.mean(gaps)) and row["pairs"] == 5
        assert row["lo"] <= row["difference"] <= row["hi"] and row["least_p"] == 1 / 32
    assert {(r["design"], r["arm"]) for r in rows_of(run)} == {
        (d, arm) for d in ("unlearn", "teach") for arm in ("highest", "lowest")
    }


@pytest.mark.parametrize(("design", "sign"), [("unlearn", -1), ("teach", 1)])
def test_in_small_steps_influence_foresees_sign_and_size(run: RunFolder, design: str, sign: int) -> None:
    """One plain step changes a target by the mean influence of its batch; forgetting turns it round."""
    highest, lowest = (rows_of(run, design=design, arm=arm, target=TARGET)[0] for arm in ("highest", "lowest"))
    assert (highest["foreseen"], lowest["foreseen"]) == (sign, -sign)
    for row in (highest, lowest):
        assert row["difference"] == pytest.approx(row["predicted"], rel=0.05)
        assert row["p"] == 1 / 32 and row["rank_biserial"] == 1
    assert lowest["verdict"] == "supported"


def test_where_steps_are_not_those_of_influence_only_the_sign_is_foreseen(attributed) -> None:
    run = fresh(attributed, method="lora", pairs=2, designs=("teach",))
    rows = rows_of(run)
    assert all(row["predicted"] is None and row["foreseen"] in (-1, 1) for row in rows)
    assert all(row["least_p"] == 1 / 4 and row["verdict"] != "supported" for row in rows)


def test_runs_of_unlearning_are_listed(run: RunFolder) -> None:
    rows = run.read_table("forgetting").to_pylist()
    assert len(rows) == 15 and all(row["steps"] == row["kept"] == 1 and row["stopped"] == "" for row in rows)
    assert all(row["guard_last"] <= 1.1 * row["guard_start"] for row in rows)
    models = [row for row in run.read_table("models").to_pylist() if row["design"] == "unlearn"]
    assert all(row["loss_after"] > row["loss_before"] for row in models)


def test_the_report_says_what_the_pairs_say(run: RunFolder) -> None:
    do(run.study, run, "report")
    page = run.path("report.html").read_text()
    console = Console(width=240, file=io.StringIO())
    console.print(show_run(run.folder, "validation"))
    for text in (page, console.file.getvalue()):
        assert "Forgetting the 2 documents" in text and "supported" in text
    run.verify()


def test_a_run_that_the_guard_stops_is_said(attributed) -> None:
    run = fresh(attributed, designs=("unlearn",), pairs=2, unlearn_lr=1e3)
    rows = run.read_table("forgetting").to_pylist()
    assert all(row["kept"] == 0 and "the loss of" in row["stopped"] for row in rows)
    assert all(row["stopped"] == 4 and row["difference"] == 0 for row in rows_of(run))
    do(run.study, run, "report")
    assert "stopped" in run.path("report.html").read_text()


def test_a_group_of_prompts_may_be_the_guard(attributed) -> None:
    run = fresh(attributed, designs=("unlearn",), pairs=2, guard="other")
    questions = [row for row in run.read_table("prompts").to_pylist() if row["group"] == "other"]
    right = np.mean([row["y"] > 0 for row in questions])  # of two options the likelier one
    assert right > 0.5
    assert {row["guard_start"] for row in run.read_table("forgetting").to_pylist()} == {right}


def test_a_guard_of_questions_that_the_model_cannot_answer_is_refused(attributed) -> None:
    with pytest.raises(UserError, match="better than guessing, 0.5"):
        fresh(attributed, designs=("unlearn",), guard="facts")


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"budgets": (1.0,)}, "leave none to retain"),
        ({"alike": "nowhere"}, "no such column"),
        ({"alike": "label"}, "no value in the column 'label'"),
        ({"alike": "topic", "budgets": (0.6,)}, "no random counterpart of the same topic"),
        ({"guard": "nobody"}, "groups and categories: other, facts"),
    ],
)
def test_what_cannot_be_paired_is_refused_before_it_trains(attributed, changes, what, monkeypatch) -> None:
    monkeypatch.setattr(Retrainer, "run", None)
    monkeypatch.setattr(Retrainer, "unlearn", None)
    with pytest.raises(UserError, match=what):
        fresh(attributed, **changes)


@pytest.mark.parametrize("gap", [None, "", float("nan")])
def test_a_gap_in_the_column_of_what_is_alike_is_no_topic_of_its_own(gap) -> None:
    rows = [{"id": f"d{n}", "text": f"Text {n}", "year": year} for n, year in enumerate((1.0, 1, gap))]
    study = SimpleNamespace(validation=SimpleNamespace(alike="year"))
    with pytest.raises(UserError, match="1 of 3 documents have no value in the column 'year'"):
        topics_of(study, SimpleNamespace(examples=load_examples(rows, "document")))
    found = topics_of(study, SimpleNamespace(examples=load_examples(rows[:2], "document")))
    assert found == {"d0": "1", "d1": "1"}


def test_without_a_column_only_the_size_is_alike(attributed) -> None:
    run = fresh(attributed, alike=None, designs=("teach",), pairs=2)
    assert len(members(run, "teach")) == 4
