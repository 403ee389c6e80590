"""The estimator sketch on a tiny study: close to the adjoint as stated, resumed, grown, shared."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

import taught.sketches.estimator as sketched
import taught.sketches.fill as fill_module
from reference import close
from taught.core import driver
from taught.core.driver import Method
from taught.core.estimator import Work
from taught.core.readings import Readings
from taught.core.registry import Choice
from taught.core.scores import Scores
from taught.core.target import TargetSet
from taught.errors import UserError
from taught.progress import SilentProgress
from taught.run.folder import RunFolder
from taught.sketches.estimator import Sketch
from taught.sketches.store import SketchStore
from taught.stages.attribute import attribute
from taught.stages.policy import policy
from taught.stages.readings import readings
from taught.stages.sketches import sketches
from taught.study.load import dump_study, load_study
from taught.study.schema import Study
from tiny_models import tiny_examples, tiny_prompts
from tiny_sketches import WEIGHT, problem
from tiny_study import write_tiny_study

DIM = 8192


def study_of(folder: Path, **changes: Any) -> Study:
    study = load_study(folder / "study.yaml")
    small = {"prompts.limit": 12, "attribution.exact_top": 2}
    small["attribution.estimator"] = {"kind": "sketch", "dim": DIM, "store": "store"}
    for key, value in {**small, **changes}.items():
        key = key.replace("__", ".").replace("sketch.", "attribution.estimator.")
        study = study.replace(key, value, base=folder)
    return study


def read(study: Study, run: RunFolder) -> None:
    readings(study, run)
    policy(study, run)


def attributed(folder: Path, name: str, **changes: Any) -> RunFolder:
    study, run = study_of(folder, **changes), RunFolder(folder / name)
    read(study, run)
    attribute(study, run)
    return run


def influence(run: RunFolder) -> dict[tuple[str, str], dict[str, Any]]:
    return {(r["example_id"], r["target"]): r for r in run.read_table("scores").to_pylist()}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sketch")
    write_tiny_study(folder)
    with pytest.MonkeyPatch.context() as patched:
        small_shards(patched)
        attributed(folder, "run")
    return folder


def small_shards(patched: pytest.MonkeyPatch) -> None:
    patched.setattr(fill_module, "PAIRS_A_SHARD", 3)
    patched.setattr(fill_module, "PROMPTS_A_SHARD", 7)


@pytest.fixture
def copy(made: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    small_shards(monkeypatch)
    shutil.copytree(made, tmp_path / "study")
    return tmp_path / "study"


@pytest.fixture
def counted(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Ids of examples and prompts that gradients were taken of."""
    seen: list[str] = []
    for name in ("example_sketches", "prompt_sketches"):
        original = getattr(fill_module, name)

        def count(problem, projection, items, original=original, **options):
            seen.extend(item.id for item in items)
            return original(problem, projection, items, **options)

        monkeypatch.setattr(fill_module, name, count)
    return seen


def test_sketches_agree_with_the_adjoint_within_their_stated_error(copy: Path) -> None:
    exact = influence(attributed(copy, "exact", attribution__estimator="adjoint"))
    run = RunFolder.open(copy / "run")
    found, record = influence(run), run.read_json("attribution")["sketches"]
    assert found.keys() == exact.keys()
    scores = np.array(
        [(found[k]["value"] - exact[k]["value"]) / found[k]["se"] for k in exact if not k[1].startswith("behavior")]
    )
    assert 0.5 < np.sqrt(np.mean(scores**2)) < 2
    assert 0.5 < record["error_factor"] < 2
    assert all(row["se"] is None for row in exact.values())


def test_the_strongest_examples_are_computed_exactly_too(copy: Path) -> None:
    exact = attributed(copy, "exact", attribution__estimator="adjoint")
    run = RunFolder.open(copy / "run")
    true = {r["example_id"]: r["score"] for r in exact.read_table("summary").to_pylist()}
    rows = run.read_table("summary").to_pylist()
    strongest = sorted(rows, key=lambda r: -abs(r["score"]))[:2]
    assert [r["example_id"] for r in rows if r["exact_score"] is not None] == sorted(
        (r["example_id"] for r in strongest), key=[r["example_id"] for r in rows].index
    )
    for row in strongest:
        assert row["exact_score"] == pytest.approx(true[row["example_id"]], rel=1e-3)


def test_totals_are_the_sums_of_the_pathways(copy: Path) -> None:
    found = influence(RunFolder.open(copy / "run"))
    totals = [key for key in found if (key[0], f"{key[1]}:x") in found]
    assert {target.partition(":")[0] for _, target in totals} == {"score", "coefficient"}
    for example, target in totals:
        parts = [found[example, f"{target}:{p}"]["value"] for p in "xy"]
        assert found[example, target]["value"] == pytest.approx(sum(parts), rel=1e-9, abs=1e-18)


def test_a_second_run_takes_no_gradient_for_the_store(copy: Path, counted: list[str]) -> None:
    attributed(copy, "again", policy__alpha=3.0)  # another policy on the same prompts and features
    assert counted == []


def test_new_examples_and_features_cost_only_themselves(copy: Path, counted: list[str]) -> None:
    lines = (copy / "pairs.jsonl").read_text().splitlines()
    new = {**json.loads(lines[0]), "id": "new", "prompt": "Where to find clay"}
    (copy / "more.jsonl").write_text("\n".join([*lines, json.dumps(new)]) + "\n")
    attributed(copy, "more", examples__path="more.jsonl")
    assert counted == ["new"]
    counted.clear()
    wider = attributed(copy, "wider", features__max_features=8)
    assert {i[0] for i in counted} == {"q"}  # prompts, for the features that are new
    fresh = attributed(copy, "fresh", features__max_features=8, sketch__store="another")
    old, anew = influence(wider), influence(fresh)
    for key, row in anew.items():
        assert old[key]["value"] == pytest.approx(row["value"], rel=1e-3, abs=3e-3 * row["se"])


def test_a_changed_example_is_sketched_again(copy: Path, counted: list[str]) -> None:
    lines = [json.loads(line) for line in (copy / "pairs.jsonl").read_text().splitlines()]
    lines[2]["response"] += " No."
    (copy / "changed.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    attributed(copy, "changed", examples__path="changed.jsonl")
    assert counted == [lines[2]["id"]]


@pytest.mark.parametrize("processes", [2, 3])
def test_processes_that_share_the_work_make_the_same_store(
    copy: Path, processes: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    study = study_of(copy, sketch__store="shared")
    run = RunFolder.open(copy / "run")
    for rank in reversed(range(processes)):
        monkeypatch.setenv("RANK", str(rank))
        monkeypatch.setenv("WORLD_SIZE", str(processes))
        sketches(study, run)
    files = {p.name: p.read_bytes() for p in (copy / "shared").iterdir()}
    assert files == {p.name: p.read_bytes() for p in (copy / "store").iterdir()}


ALONE = """
import sys
from taught.run.folder import RunFolder
from taught.stages.sketches import sketches
from taught.study.load import load_study
sketches(load_study(sys.argv[1]), RunFolder(sys.argv[3]))
"""


@pytest.mark.slow  # over 20 s: three processes that import torch
def test_torchrun_fills_the_store_that_one_process_fills(copy: Path) -> None:
    rows = [json.loads(line) for line in (copy / "pairs.jsonl").read_text().splitlines()]
    many = [{**row, "id": f"{row['id']}-{n}", "prompt": f"{row['prompt']} {n}"} for row in rows for n in range(2)]
    (copy / "pairs.jsonl").write_text("".join(json.dumps(row) + "\n" for row in many))
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": os.pathsep.join(sys.path)}
    torchrun = ["-m", "torch.distributed.run", "--nproc-per-node", "2", "-m", "--"]
    for name, start in (("one", ["-c", ALONE]), ("two", [*torchrun, "taught", "run"])):  # in processes of their own
        (copy / "study.yaml").write_text(dump_study(study_of(copy, sketch__store=str(copy / name))))
        command = [*start, str(copy / "study.yaml"), "--run", str(copy / "run"), "--quiet"]
        subprocess.run([sys.executable, *command], check=True, env=environment, timeout=240)
    one, two = (sorted(p.name for p in (copy / n).iterdir()) for n in ("one", "two"))
    assert one == two
    for name in one:
        assert (copy / "one" / name).read_bytes() == (copy / "two" / name).read_bytes()


def test_a_stopped_store_keeps_its_shards_and_comes_out_the_same(
    copy: Path, counted: list[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    study, run = study_of(copy, sketch__store="stopped"), RunFolder.open(copy / "run")
    original, saved = SketchStore.save, []

    def save(self: SketchStore, *args: Any, **options: Any) -> None:
        if len(saved) == 3:
            raise KeyboardInterrupt
        saved.append(original(self, *args, **options))

    with monkeypatch.context() as patched:
        patched.setattr(SketchStore, "save", save)
        with pytest.raises(KeyboardInterrupt):
            sketches(study, run)
    before = len(counted)
    sketches(study, run)
    assert before > 0 and len(counted) < 2 * before + 20  # what was kept is not taken again
    files = {p.name: p.read_bytes() for p in (copy / "stopped").iterdir()}
    assert files == {p.name: p.read_bytes() for p in (copy / "store").iterdir()}


def test_a_damaged_shard_is_made_anew_and_named(copy: Path, counted: list[str]) -> None:
    shard = SketchStore(copy / "store").shards("examples")[0]
    before = shard.path.read_bytes()
    shard.path.write_bytes(before[:100])

    said: list[str] = []

    class Notes(SilentProgress):
        def note(self, text: str) -> None:
            said.append(text)

    sketches(study_of(copy), RunFolder.open(copy / "run"), Notes())
    assert any(shard.path.stem in text for text in said)
    assert sorted(counted) == sorted(row.id for row in shard.rows)
    assert shard.path.read_bytes() == before


def test_a_store_of_another_projection_or_behavior_is_refused(copy: Path) -> None:
    run = RunFolder.open(copy / "run")
    with pytest.raises(UserError, match=r"projection\.dim: was 8192, now 4096"):
        sketches(study_of(copy, sketch__dim=4096), run)
    other = study_of(copy, behavior__prefixes=["No"], sketch__dim=DIM)
    fresh = RunFolder(copy / "other")
    read(other, fresh)
    with pytest.raises(UserError, match="other conditions: behavior"):
        sketches(other, fresh)


def test_many_examples_leave_out_what_would_not_fit(copy: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sketched, "LARGEST_DY", 10)
    run = attributed(copy, "large")
    assert not run.path("prompt_effects.safetensors").exists()
    assert influence(run).keys() == influence(RunFolder.open(copy / "run")).keys()


@pytest.mark.parametrize(("error", "size"), [(0.125, 64), (0.1, 128), (0.01, 10048), (1.0, 64)])
def test_the_size_can_come_from_an_error(error: float, size: int) -> None:
    spec = Sketch(error=error)
    assert spec.size == size and spec.size**-0.5 <= error
    assert error == 1.0 or (spec.size - 64) < 1 / error**2


@pytest.mark.parametrize("kind", ["trackstar", "trak", "autocorrelation", "ekfac", "identity"])
def test_the_strongest_of_a_first_stage_have_exact_values_of_their_own(tmp_path: Path, kind: str) -> None:
    examples = [replace(z, id=f"{z.id}{n}") for n in range(2) for z in tiny_examples()]
    estimator = {"dim": 128, "store": str(tmp_path), "rescore": 3, "sample": 1}
    there = Readings(tuple(p.id for p in tiny_prompts()), np.zeros(6), {"a": ("q0", "q1", "q2")})
    targets = TargetSet.of(("behavior:a", "behavior:a - prompt:q4", "prompt:q4"), there)

    def made(method: Method) -> Scores:
        return driver.scores(problem(WEIGHT), examples, targets, method, Work())

    found = made(Method(Choice("sketch", estimator), Choice(kind)))
    plain = kind in ("trackstar", "trak", "autocorrelation")
    exact = made(Method(Choice("adjoint"), Choice("identity" if plain else kind)))
    rows = found.details["rescored"]
    assert [row["target"] for row in rows] == ["behavior:a"] * 3 + ["behavior:a - prompt:q4"] * 3
    for row in rows:
        close(row["exact"], exact.by_example(row["target"])[row["example_id"]], 1e-9)
        assert row["first"] == found.by_example(row["target"])[row["example_id"]]
    others = {abs(v) for i, v in found.by_example("behavior:a").items() if i not in {r["example_id"] for r in rows[:3]}}
    assert min(abs(row["first"]) for row in rows[:3]) >= max(others)
