"""The stage ``validate``: retraining tells whether what was predicted comes true."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from rich.console import Console

from taught.errors import UserError
from taught.progress import SilentProgress
from taught.report.sections.validation import curve_sentences
from taught.report.show import show_run
from taught.run.folder import RunFolder
from taught.stats.ranks import spearman
from taught.study.load import load_study
from taught.study.schema import Study
from taught.training.retrain import Retrainer
from tiny_study import READ, SCORED, SMALL_STEPS, do, with_values, write_tiny_study


class Counted(SilentProgress):
    """Counts the examples that training has gone through."""

    trained = 0

    def __init__(self) -> None:
        self.training = False

    def step(self, name: str, total: int | None = None) -> None:
        self.training = "retrainings" in name

    def advance(self, n: int = 1) -> None:
        self.trained += n * self.training


@pytest.fixture(scope="module")
def attributed(tmp_path_factory) -> tuple[Study, Path]:
    folder = tmp_path_factory.mktemp("validate")
    study = with_values(load_study(write_tiny_study(folder)), {**SMALL_STEPS, "prompts.limit": 12})
    return study, do(study, folder / "run", *SCORED).folder


@pytest.fixture(scope="module")
def validated(attributed) -> RunFolder:
    study, folder = attributed
    return do(study, folder, "validate")


def outcomes(run: RunFolder, design: str) -> dict[str, dict[str, float]]:
    found: dict[str, dict[str, float]] = {}
    for row in run.read_table("outcomes").to_pylist():
        if row["design"] == design:
            found.setdefault(row["target"], {})[row["subset"]] = row["value"]
    return found


def members(run: RunFolder, design: str) -> dict[str, list[str]]:
    found: dict[str, list[str]] = {}
    for row in run.read_table("subsets").to_pylist():
        if row["design"] == design:
            found.setdefault(row["subset"], []).append(row["example_id"])
    return found


def influence_of(run: RunFolder) -> dict[str, dict[str, float]]:
    """Target -> example id -> value."""
    found: dict[str, dict[str, float]] = {}
    for row in run.read_table("scores").to_pylist():
        found.setdefault(row["target"], {})[row["example_id"]] = row["value"]
    return {target: values for target, values in found.items() if not target.endswith((":x", ":y"))}


def printed(run: RunFolder) -> str:
    console = Console(width=240, file=io.StringIO())
    console.print(show_run(run.folder, "validation"))
    return console.file.getvalue()


def curated(run: RunFolder, **changes) -> RunFolder:
    return do(with_values(run.study, {f"curation.{key}": value for key, value in changes.items()}), run, "curate")


@pytest.mark.parametrize("design", ["random", "matched"])
def test_where_steps_are_small_retraining_does_what_was_predicted(validated, design):
    """One SGD step on a subset changes every target by the mean of its examples' influence."""
    influence, chosen = influence_of(validated), members(validated, design)
    found = outcomes(validated, design)
    assert len(chosen) == 12
    for target in ("score", "behavior:harmful", "behavior:harmless"):
        predicted = [np.mean([influence[target][i] for i in ids]) for ids in chosen.values()]
        true = [found[target][subset] for subset in chosen]
        assert spearman(predicted, true) >= 0.95
    coefficients = [t for t in influence if t.startswith("coefficient:")]
    agreement = [
        spearman(
            [np.mean([influence[t][i] for i in ids]) for ids in chosen.values()],
            [found[t][subset] for subset in chosen],
        )
        for t in coefficients
    ]
    assert len(coefficients) > 3 and np.median(agreement) >= 0.95


def test_matched_subsets_hold_counts_and_lengths_fixed(validated):
    label = {r["example_id"]: r for r in validated.read_table("examples").to_pylist()}
    counts, lengths = set(), []
    for ids in members(validated, "matched").values():
        counts.add(sum(label[i]["label"] == "harmful-refusal" for i in ids))
        lengths.append(sum(label[i]["n_scored"] for i in ids))
    assert len(counts) == 1
    assert max(lengths) <= 1.02 * min(lengths)


def test_the_tables_say_what_was_trained_and_how(validated):
    base, *models = validated.read_table("models").to_pylist()
    assert base["design"] == "base" and base["n_examples"] == 0 and base["loss_after"] is None
    assert len(models) == 24 and all(row["judged_positive"] is None for row in models)
    assert all(0 <= row["f1"] <= 1 and row["n_examples"] == 4 for row in models)
    assert all(row["loss_after"] < row["loss_before"] for row in models)
    record = validated.read_json("validation")
    assert record["recipe"]["optimizer"] == "sgd" and 0 <= record["base"]["recall"] <= 1
    assert set(record["inclusion"]) == {"random", "matched"}
    assert set(record["inclusion"]["random"].values()) == {0.5}


def test_a_stopped_validation_keeps_what_was_trained(attributed, tmp_path):
    study, folder = attributed
    study = study.replace("validation.designs", ("leave-out",)).replace("validation.subsets", 4)
    run = RunFolder(folder)

    class Stopped(Counted):
        def advance(self, n: int = 1) -> None:
            super().advance(n)
            if self.trained > 15:
                raise KeyboardInterrupt

    first, second = Stopped(), Counted()
    with pytest.raises(KeyboardInterrupt):
        do(study, RunFolder(folder, fresh=("validate",)), "validate", progress=first)
    do(study, run, "validate", progress=second)
    assert len(members(run, "leave-out")) == 4
    assert second.trained == 4 * 7 - 14  # the two that were finished are not made again


def test_removal_leaves_out_what_raises_the_target_most(attributed, monkeypatch):
    study, folder = attributed
    monkeypatch.setattr(
        "taught.stages.validate.curate",
        lambda ids, *_, **__: [{"example_id": i, "action": "keep" if i > "z02" else "drop"} for i in ids],
    )
    study = with_values(
        study,
        {
            "validation.designs": ("removal", "addition", "curation", "leave-one-out"),
            "validation.budgets": (0.25,),
            "validation.subsets": 2,
            "validation.controls": 5,
        },
    )
    run = do(study, RunFolder(folder, fresh=("validate",)), "validate")
    rows = influence_of(run)["behavior:harmless"]
    top = sorted(rows, key=lambda i: -rows[i])[:2]
    removal = members(run, "removal")
    assert set(rows) - set(removal["remove-2-named"]) == set(top)
    assert [len(ids) for ids in removal.values()] == [6] * 6
    assert set(members(run, "addition")["add-2-named"]) == set(top)
    point, added = run.read_table("curves").to_pylist()
    assert (point["design"], added["design"]) == ("removal", "addition")
    assert point["budget"] == 2 and point["lo"] <= point["difference"] <= point["hi"]
    for row in (point, added):  # one budget: a triangle from no example to this one
        assert row["area"] == pytest.approx(row["difference"] / 2)
        assert row["area_lo"] == pytest.approx(row["lo"] / 2)
    change = outcomes(run, "removal")["behavior:harmless"]
    random = np.mean([change[f"remove-2-random-{i}"] for i in range(5)])
    np.testing.assert_allclose(point["difference"], change["remove-2-named"] - random)
    curation = members(run, "curation")
    arms = {(r["arm"], r["metric"]): r for r in run.read_table("arms").to_pylist()}
    assert {arm for arm, _ in arms} == {"base", "all", "published-rule", "named", "random"}
    assert arms["random", "f1"]["models"] == 5 and arms["named", "f1"]["examples"] == 5
    assert arms["all", "f1"]["examples"] == 8 and arms["base", "f1"]["examples"] == 0
    do(study, run, "report")
    assert "published-rule" in run.path("report.html").read_text()
    assert "published-rule" in printed(run)
    assert len(curation["all"]) == 8
    assert len(curation["published-rule"]) == len(curation["remove-3-named"]) == 5
    assert set(members(run, "leave-one-out")) == {f"without:{i}" for i in top}


def test_what_was_curated_is_trained_on_beside_random_examples(attributed, tmp_path):
    study, folder = attributed
    shutil.copytree(folder, tmp_path / "run")
    asked = {"validation.designs": ("curated",), "validation.controls": 5}
    run = RunFolder(tmp_path / "run", fresh=("validate",))
    with pytest.raises(UserError, match="curate has not been run"):
        do(with_values(study, asked), run, "validate")
    curated(run, rule="top-k", k=8, target="behavior:harmless")
    with pytest.raises(UserError, match="0 of 8 examples kept"):
        do(with_values(run.study, asked), run, "validate")
    curated(run, rule="keep-k", k=5, target="behavior:harmless", protect="score")
    study = with_values(run.study, asked)
    do(study, run, "validate")
    kept = [json.loads(line)["id"] for line in run.read_text("keep.jsonl").splitlines()]
    trained = members(run, "curated")
    assert set(trained["kept"]) == set(kept) and len(trained["all"]) == 8
    random = [ids for name, ids in trained.items() if name.startswith("random-")]
    assert [len(ids) for ids in random] == [len(kept)] * 5
    arms = {(r["arm"], r["metric"]): r for r in run.read_table("arms").to_pylist()}
    assert {arm for arm, _ in arms} == {"base", "all", "kept", "random"}
    change = outcomes(run, "curated")["behavior:harmless"]
    gap = change["kept"] - np.mean([change[name] for name in trained if "random" in name])
    assert arms["kept", "behavior:harmless"]["difference"] == pytest.approx(gap)
    assert "What taught curate kept" in printed(run)
    do(study, run, "report")
    run.verify()
    curated(run, rule="top-k", k=2, target="score", protect=None)
    run.verify()
    assert "validate" not in run.manifest["stages"]  # its subsets were of other decisions; models are kept
    assert any(run.path("retrained").iterdir())


def test_the_effect_of_the_named_examples_is_asked_with_random_subsets_first(attributed):
    """Where steps are small it is the sum of their influence, less that of as many average ones."""
    study, folder = attributed
    study = with_values(
        study,
        {
            "validation.designs": ("random", "chosen", "couples"),
            "validation.subsets": 10,
            "validation.budgets": (0.25,),
        },
    )
    run = do(study, RunFolder(folder, fresh=("validate",)), "validate")
    rows = influence_of(run)["behavior:harmless"]
    top = set(sorted(rows, key=lambda i: -rows[i])[:2])
    random, chosen = members(run, "random"), members(run, "chosen")
    assert {name: chosen[name] for name in random} == random  # trained once, read in both designs
    for name, ids in members(run, "couples").items():
        assert top <= set(ids) if name.startswith("with-") else not top & set(ids)
    effect, added = run.read_table("named_effects").to_pylist()
    assert (effect["design"], added["design"]) == ("chosen", "couples")
    assert effect["retrainings"] == len(chosen) > 10 and added["retrainings"] == 20
    assert effect["examples"] == added["examples"] == 2
    asked = sum(rows[i] for i in top) - 2 * np.mean([rows[i] for i in rows if i not in top])
    predicted = asked / 4  # one step on a subset of four moves by the mean of its influence
    assert 0.5 * predicted < effect["value"] < 1.5 * predicted
    assert effect["lo"] < effect["value"] < effect["hi"] and added["value"] > 0
    do(study, run, "report")
    for sentence in ("in the place of average ones, change it by +", "(20 retrainings)"):
        assert sentence in run.path("report.html").read_text() and sentence in printed(run)


def test_several_budgets_have_an_area():
    points = [
        {
            "design": "removal",
            "budget": n,
            "share": n / 10,
            "difference": -0.5,
            "lo": -0.8,
            "hi": -0.2,
            "area": -0.3,
            "area_lo": -0.6,
            "area_hi": -0.1,
        }
        for n in (1, 2)
    ]
    *each, area = curve_sentences(points, "behavior:harmless")
    assert len(each) == 2 and "2 budgets" in area and "−0.3 [−0.6, −0.1]" in area
    assert len(curve_sentences(points[:1], "behavior:harmless")) == 1


def test_random_subsets_need_no_influence_and_named_ones_do(attributed, tmp_path):
    study = load_study(write_tiny_study(tmp_path))
    study = with_values(study, {**SMALL_STEPS, "validation.designs": ("random",), "validation.subsets": 2})
    run = do(study, tmp_path / "run", *READ, "validate")
    with pytest.raises(UserError, match="attribute has not been run"):
        do(study.replace("validation.designs", ("removal",)), run, "validate")


@pytest.mark.parametrize(
    ("changes", "what"),
    [
        ({"validation.remove_by": "behavior:nobody"}, "no values of this target"),
        ({"validation.remove_by": "coefficient:99999"}, "no values of this target"),
        ({"validation.designs": ("curation",)}, "keeps all examples or none"),
        ({"validation.designs": ("chosen",), "validation.subsets": 9}, "too few retrainings"),
        ({"validation.designs": ("couples",), "validation.subsets": 1}, "too few couples"),
    ],
)
def test_what_cannot_be_validated_is_refused_before_it_trains(attributed, changes, what, monkeypatch):
    monkeypatch.setattr(Retrainer, "run", None)
    study, folder = attributed
    study = with_values(study, {"validation.designs": ("removal",), **changes})
    with pytest.raises(UserError, match=what):
        do(study, RunFolder(folder, fresh=("validate",)), "validate")


def test_matched_subsets_need_labels(attributed, tmp_path):
    study = load_study(write_tiny_study(tmp_path))
    rows = [json.loads(line) for line in (tmp_path / "pairs.jsonl").read_text().splitlines()]
    for row in rows:
        row.pop("label")
    (tmp_path / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    study = with_values(study, {**SMALL_STEPS, "validation.designs": ("matched",)})
    run = do(study, tmp_path / "run", *READ)
    with pytest.raises(UserError, match="no label"):
        do(study, run, "validate")


def test_a_judge_reads_the_answers_of_the_models(attributed, tmp_path, monkeypatch):
    """The default rules, a hook of the user's, and one that answers nonsense."""
    study, folder = attributed
    study = with_values(
        study, {"validation.designs": ("leave-out",), "validation.subsets": 2, "validation.answer_tokens": 3}
    )
    (tmp_path / "judge_of_lengths.py").write_text(
        "def long(prompt, answer):\n    return min(1.0, len(answer) / 100)\n"
        "def nonsense(prompt, answer):\n    return 'yes'\n"
    )
    monkeypatch.syspath_prepend(tmp_path)
    long = study.replace("validation.judge", "judge_of_lengths:long")
    run = do(long, RunFolder(folder, fresh=("validate",)), "validate")
    answers = run.read_table("answers").to_pylist()
    assert len(answers) == 3 * 12 and {row["design"] for row in answers} == {"base", "leave-out"}
    for row in answers:
        assert row["refuses"] == pytest.approx(min(1.0, len(row["answer"]) / 100))
    group = {row["prompt_id"]: row["group"] for row in run.read_table("prompts").to_pylist()}
    for model in run.read_table("models").to_pylist():
        of = [row for row in answers if row["subset"] == model["subset"]]
        harmful = [row["refuses"] for row in of if group[row["prompt_id"]] == "harmful"]
        assert model["judged_positive"] == pytest.approx(np.mean(harmful))
    do(study, run, "validate")
    assert {row["refuses"] for row in run.read_table("answers").to_pylist()} <= {0.0, 1.0}
    with pytest.raises(UserError, match="gave no verdict"):
        do(study.replace("validation.judge", "judge_of_lengths:nonsense"), run, "validate")
    counted = Counted()
    do(study, run, "validate", progress=counted)
    assert counted.trained == 0  # finished retrainings are kept whatever the judge does
