"""Clusters as a stage of a run: what it writes, its command and its part of the report."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from taught.report.build import render
from taught.report.view import load_view

import synthetic_run
from synthetic_run import HOSTILE, Size, build_synthetic_run, synthetic_study
from taught import stages
from taught.cli.app import run_command
from taught.errors import UserError
from taught.report.sections.clusters import Clustered, cluster_sentences
from taught.run.folder import RunFolder

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


@pytest.fixture(scope="module")
def planted_run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(synthetic_run, "_Made", Kinds)
        path = build_synthetic_run(tmp_path_factory.mktemp("kinds") / "run", Size(examples=60))
    stages.clusters(RunFolder.open(path))
    return path


def table(run: RunFolder, name: str) -> list[dict]:
    return run.read_table(name).to_pylist()


def test_the_stage_finds_what_was_planted_and_writes_numbers_of_the_run(planted_run: Path):
    run = RunFolder.open(planted_run)
    members = {row["example_id"]: row["cluster"] for row in table(run, "cluster_members")}
    kinds = {f"example-{i:04d}": i % 3 for i in range(60)} | {"example-0004": 9}
    assert partition(members) == partition(kinds)
    assert members["example-0004"] == 0
    summary = {row["example_id"]: row for row in table(run, "summary")}
    effects = table(run, "cluster_influence")
    assert {e["target"] for e in effects} == {"score", "mean_y:harmful", "mean_y:harmless"}
    for row in effects:
        own = [summary[i] for i, c in members.items() if c == row["cluster"]]
        column = row["target"].replace(":", "_")
        assert row["mean"] == pytest.approx(np.mean([r[column] for r in own]))
        raised = row["cluster"] == members["example-0002"] and row["target"] == "mean_y:harmless"
        assert row["p_holm"] < 0.05 or not raised
    shift: dict[str, dict[int, float]] = {}
    for row in table(run, "influence"):
        if (row["target"], row["pathway"], row["estimator"]) == ("coefficient", "total", "adjoint"):
            shift.setdefault(row["example_id"], {})[row["feature_id"]] = abs(row["value"])
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
    run = RunFolder.open(path)
    stages.clusters(run, k=3, target="score")
    assert {row["target"] for row in table(run, "cluster_influence")} == {"score"}
    said = " ".join(s.text for s in cluster_sentences(Clustered.read(run)))
    assert said.count("No effect found") == 2
    assert "40 examples in 3 clusters by their active features." in said
    with pytest.raises(UserError, match=r"not a target of this run\n  value: mean_y:nobody"):
        stages.clusters(run, target="mean_y:nobody")


def test_the_command_prints_a_table_or_csv(planted_run: Path, capsys: pytest.CaptureFixture[str]):
    assert run_command(["clusters", str(planted_run), "--csv"]) == 0
    rows = list(csv.DictReader(io.StringIO(capsys.readouterr().out)))
    run = RunFolder.open(planted_run)
    effects = table(run, "cluster_influence")
    assert [(int(r["cluster"]), r["target"]) for r in rows] == [
        (e["cluster"], e["target"])
        for t in ("score", "mean_y:harmful", "mean_y:harmless")
        for e in effects
        if e["target"] == t
    ]
    assert {"name", "n_examples", "mean", "lo", "hi", "random_lo", "p_holm", "outside_share"} <= set(rows[0])
    assert run_command(["clusters", str(planted_run)]) == 0
    said = " ".join(capsys.readouterr().out.split())
    assert "1 example without an active feature (cluster 0): example-0004." in said
    assert "mean_y:harmless: cluster" in said and "clusters.parquet" in said
    assert run_command(["clusters", str(planted_run), "--k", "999"]) == 2
    assert "so many clusters" in capsys.readouterr().err


def test_the_report_shows_them_and_asks_for_them(planted_run: Path, tmp_path: Path):
    stages.clusters(RunFolder.open(planted_run))
    page = render(load_view(planted_run))
    for row in table(RunFolder.open(planted_run), "clusters"):
        assert row["name"].split(" · ")[0] in page
    assert "Influence of the clusters on mean_y:harmless" in page
    assert "1 example without an active feature (cluster 0)" in page and "example-0004" in page
    assert "taught clusters RUN" not in page
    bare = build_synthetic_run(tmp_path / "bare")
    assert "taught clusters RUN" in render(load_view(bare))


def test_without_coefficients_nothing_is_said_of_interference(
    tmp_path: Path, planted_run: Path, monkeypatch: pytest.MonkeyPatch
):
    path = build_synthetic_run(tmp_path / "run")
    with monkeypatch.context() as patch:
        patch.setattr("taught.stages.clusters._shifts", lambda *_: iter(()))
        stages.clusters(RunFolder.open(path))
    rows = table(RunFolder.open(path), "clusters")
    assert {row["outside_share"] for row in rows} == {None}
    page = render(load_view(path))
    assert "on features that are not active on the example.</caption>" not in page
    stages.clusters(RunFolder.open(planted_run))
    page = render(load_view(planted_run))
    assert "on features that are not active on the example.</caption>" in page


def test_markup_in_labels_and_ids_stays_text(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
):
    monkeypatch.setenv("COLUMNS", "300")
    path = build_synthetic_run(tmp_path / "run", hostile=True)
    assert run_command(["clusters", str(path)]) == 0
    said = capsys.readouterr().out
    assert "\x1b" not in said and "asking to misuse </script>" in said
    page = render(load_view(path))
    assert HOSTILE.replace("<", "&lt;").replace(">", "&gt;")[:20] in page
    start = page.index('id="clusters"')
    section = page[start : page.index("</section>", start)]
    assert "&lt;/script&gt;&lt;script&gt;alert(1)" in section
    assert "<script" not in section and "<img" not in section and "\x1b" not in section


def test_clusters_go_when_the_examples_are_scored_anew(tmp_path: Path):
    path = build_synthetic_run(tmp_path / "run")
    stages.clusters(RunFolder.open(path))
    run, study = RunFolder(path, fresh=("attribute",)), synthetic_study(path)
    made = synthetic_run._Made(Size(), False, np.random.default_rng(1))
    with run.stage("attribute", study, {"model.weights": "5af571cb"}):
        synthetic_run._write_attribute(run, made)
    assert "clusters" not in run.manifest["stages"] and not run.path("clusters.parquet").exists()


def test_a_table_of_many_row_groups_gives_the_same(tmp_path: Path):
    whole = build_synthetic_run(tmp_path / "whole")
    stages.clusters(RunFolder.open(whole))

    class InParts(RunFolder):
        def write_table(self, name: str, content: pa.Table) -> None:
            if name != "influence":
                super().write_table(name, content)
                return
            with self.table_writer(name, content.schema) as write:
                for start in range(0, content.num_rows, 37):
                    write(content.slice(start, 37))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(synthetic_run, "RunFolder", InParts)
        parts = build_synthetic_run(tmp_path / "parts")
    stages.clusters(RunFolder.open(parts))
    one, other = (table(RunFolder.open(path), "clusters") for path in (whole, parts))
    assert [row["n_examples"] for row in one] == [row["n_examples"] for row in other]
    assert [row["outside_share"] for row in one] == pytest.approx([row["outside_share"] for row in other])
