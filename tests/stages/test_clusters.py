"""Clusters as a stage of a run: what it writes, its command and its part of the report."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest

import synthetic_run
from synthetic_run import HOSTILE, Size, build_synthetic_run
from taught.errors import UserError
from taught.report.html import render
from taught.report.tables import Tables
from taught.run.folder import RunFolder
from taught.stages import BY_NAME

# The stage, on a whole run


def partition(groups: Mapping[str, int]) -> set[frozenset[str]]:
    return {frozenset(i for i in groups if groups[i] == c) for c in set(groups.values())}


class Kinds(synthetic_run._Made):
    """Examples of three kinds by their features; one kind raises the mean y of the harmless group."""

    def _examples(self) -> None:
        super()._examples()
        blocks = np.array_split(self.feature_ids, 3)
        self.kind = [i % 3 for i in range(self.p)]
        self.intended = [
            [int(f) for f in blocks[kind] if self.rng.random() < 0.9] or [int(blocks[kind][0])] for kind in self.kind
        ]
        self.intended[4] = []
        harmless = np.array([g == "harmless" for g in self.groups])
        chosen = np.array(self.kind) == 2
        self.dy[np.ix_(chosen, harmless)] += 6 * np.abs(self.dy).mean()


def clustered(path: Path, **values) -> RunFolder:
    """The run with its examples clustered, as its study says after these changes."""
    run = RunFolder.open(path)
    study = run.study.replace("clusters", {key: value for key, value in values.items() if value is not None} or True)
    BY_NAME["clusters"](study, run)
    return RunFolder.open(path)


def page_of(path: Path) -> str:
    return render(Tables(RunFolder.open(path)))


@pytest.fixture(scope="module")
def planted_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(synthetic_run, "_Made", Kinds)
        path = build_synthetic_run(tmp_path_factory.mktemp("kinds") / "run", Size(examples=60))
    clustered(path)
    return path


def table(run: RunFolder, name: str) -> list[dict]:
    return run.read_table(name).to_pylist()


TARGETS = {"score", "behavior:harmful", "behavior:harmless"}


def test_the_stage_finds_what_was_planted_and_writes_numbers_of_the_run(planted_run: Path):
    run = RunFolder.open(planted_run)
    members = {row["example_id"]: row["cluster"] for row in table(run, "cluster_members")}
    kinds = {f"example-{i:04d}": i % 3 for i in range(60)} | {"example-0004": 9}
    assert partition(members) == partition(kinds)
    assert members["example-0004"] == 0
    summary = {row["example_id"]: row for row in table(run, "summary")}
    effects = table(run, "cluster_influence")
    assert {e["target"] for e in effects} == TARGETS
    for row in effects:
        own = [summary[i] for i, c in members.items() if c == row["cluster"]]
        assert row["mean"] == pytest.approx(np.mean([r[row["target"]] for r in own]))
        raised = row["cluster"] == members["example-0002"] and row["target"] == "behavior:harmless"
        assert row["p_holm"] < 0.05 or not raised
    shift: dict[str, dict[int, float]] = {}
    for row in table(run, "scores"):
        kind, _, about = row["target"].partition(":")
        if kind == "coefficient" and about.isdecimal() and row["method"] == "adjoint":
            shift.setdefault(row["example_id"], {})[int(about)] = abs(row["value"])
    for row in table(run, "clusters"):
        own = [i for i, c in members.items() if c == row["cluster"]]
        assert row["n_examples"] == len(own)
        if row["cluster"]:
            outside = sum(v for i in own for f, v in shift[i].items() if f not in summary[i]["intended"])
            whole = sum(sum(shift[i].values()) for i in own)
            assert row["outside_share"] == pytest.approx(outside / whole)
    made = run.read_json("clusters")
    assert (made["k"], made["without"], made["examples"], made["given"]) == (3, 1, 60, False)
    assert max(made["silhouettes"], key=lambda s: s["silhouette"])["k"] == 3


def test_a_run_whose_examples_do_what_any_do_says_so(tmp_path: Path):
    path = build_synthetic_run(tmp_path / "run", Size(examples=40))
    run = clustered(path, k=3, target="score")
    assert {row["target"] for row in table(run, "cluster_influence")} == {"score"}
    page = page_of(path)
    assert "No effect found" in page and "40 examples in 3 clusters by their active features" in page
    with pytest.raises(UserError) as error:
        clustered(path, target="behavior:nobody")
    assert "behavior:nobody" in str(error.value) and "behavior:harmless" in error.value.rule
    with pytest.raises(UserError, match="clusters"):
        clustered(path, k=999)


def test_the_report_shows_them_and_asks_for_them(planted_run: Path, tmp_path: Path):
    page = page_of(planted_run)
    for row in table(RunFolder.open(planted_run), "clusters"):
        assert row["name"].split(" · ")[0] in page
    assert "example-0004" in page and "behavior on harmless" in page
    assert "--to clusters" not in page
    assert "clusters" in page_of(build_synthetic_run(tmp_path / "bare")).lower()


def test_without_coefficients_nothing_is_said_of_interference(tmp_path: Path, monkeypatch: pytest.MonkeyPatch):
    path = build_synthetic_run(tmp_path / "run")
    monkeypatch.setattr("taught.stages.clusters.read_shifts", lambda *_: iter(()))
    run = clustered(path)
    assert {row["outside_share"] for row in table(run, "clusters")} == {None}


def test_markup_in_labels_and_ids_stays_text(tmp_path: Path):
    path = build_synthetic_run(tmp_path / "run", hostile=True)
    clustered(path)
    page = page_of(path)
    assert HOSTILE.replace("<", "&lt;").replace(">", "&gt;")[:20] in page
    start = page.index('id="clusters"')
    section = page[start : page.index("</section>", start)]
    assert "<script" not in section and "<img" not in section and "\x1b" not in section


def test_a_table_of_many_row_groups_gives_the_same(tmp_path: Path):
    whole = build_synthetic_run(tmp_path / "whole")
    clustered(whole)

    class InParts(RunFolder):
        def write_table(self, name: str, content: pa.Table) -> None:
            if name != "scores":
                super().write_table(name, content)
                return
            targets = content["target"].to_pylist()
            starts = [i for i, t in enumerate(targets) if i == 0 or t != targets[i - 1]]
            with self.table_writer(name, content.schema) as write:
                for start, end in zip(starts, [*starts[1:], len(targets)], strict=True):
                    write(content.slice(start, end - start))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(synthetic_run, "RunFolder", InParts)
        parts = build_synthetic_run(tmp_path / "parts")
    clustered(parts)
    one, other = (table(RunFolder.open(path), "clusters") for path in (whole, parts))
    assert [row["n_examples"] for row in one] == [row["n_examples"] for row in other]
    assert [row["outside_share"] for row in one] == pytest.approx([row["outside_share"] for row in other])
