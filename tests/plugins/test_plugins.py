"""A method is one file: toys of each kind, registered by a package of its own, through run, compare and report.

Nothing in src knows them. They are found by the entry point ``taught.plugins`` alone.
"""

from __future__ import annotations

import os
from pathlib import Path

import numpy as np
import pytest
import yaml

from taught.run.folder import RunFolder
from tiny_study import write_tiny_study

TOYS = ("behavior", "target", "curvature", "trajectory", "estimator")
TARGETS = ["spread:*", "behavior:*", "spread:harmful - behavior:harmless"]


@pytest.fixture(scope="module")
def packaged(tmp_path_factory) -> Path:
    """A folder that looks like an installed package whose entry points are the toys."""
    site = tmp_path_factory.mktemp("site")
    for name in TOYS:
        (site / f"toy_{name}.py").write_text((Path(__file__).parent / f"toy_{name}.py").read_text())
    info = site / "toys-0.1.dist-info"
    info.mkdir()
    (info / "METADATA").write_text("Metadata-Version: 2.1\nName: toys\nVersion: 0.1\n")
    lines = "".join(f"{name} = toy_{name}\n" for name in TOYS)
    (info / "entry_points.txt").write_text(f"[taught.plugins]\n{lines}")
    return site


@pytest.fixture
def toys(packaged, taught, tmp_path):
    """Run a command with the toys installed, on the tiny study as changed; the finished process."""
    study = write_tiny_study(tmp_path)
    study.write_text(study.read_text().replace("prompts.jsonl,", "prompts.jsonl, limit: 12,"))

    def run(command: str, *args: str, **values):
        content = yaml.safe_load(study.read_text())
        for key, value in values.items():
            section, _, name = key.partition("__")
            content.setdefault(section, {})
            content[section] = {**content[section], name: value} if name else value
        study.write_text(yaml.safe_dump(content))
        paths = os.pathsep.join([str(packaged), str(Path(__file__).parents[2] / "src")])
        return taught(command, *args, cwd=tmp_path, PYTHONPATH=paths)

    run.folder = tmp_path
    return run


def scores_of(folder: Path, method: str) -> dict[tuple[str, str], float]:
    """(Example, target) -> value; this process does not know the toys, so no name is read as a target."""
    rows = RunFolder.open(folder).read_table("scores").to_pylist()
    assert {row["method"] for row in rows} == {method}
    return {(row["example_id"], row["target"]): row["value"] for row in rows}


@pytest.mark.slow  # over 20 s: five commands in processes of their own
def test_toys_go_through_run_compare_and_report(toys):
    plain = {"behavior": {"kind": "shout", "word": "No"}, "attribution__targets": TARGETS, "attribution__exact_top": 1}
    done = toys("run", "study.yaml", "--run", "plain", "--quiet", **plain, sae={"path": None})
    assert done.returncode == 0, done.stderr
    done = toys(
        "run",
        "study.yaml",
        "--run",
        "toys",
        "--quiet",
        attribution__estimator="whole",
        attribution__curvature={"kind": "shrunk", "share": 0.25},
        attribution__trajectory={"kind": "again", "times": 3},
    )
    assert done.returncode == 0, done.stderr
    run = RunFolder.open(toys.folder / "toys")
    names = run.read_json("attribution")["targets"]
    assert "spread:harmful" in names and TARGETS[-1] in names
    before, after = scores_of(toys.folder / "plain", "adjoint"), scores_of(toys.folder / "toys", "whole+shrunk@again")
    assert before.keys() == after.keys() and len(before) == len(names) * len(run.read_table("examples"))
    plain, changed = (np.array([of[key] for key in before]) for of in (before, after))
    np.testing.assert_allclose(changed, 3 * 0.25 * plain, rtol=1e-3, atol=1e-3 * np.abs(plain).max())
    page = (toys.folder / "toys" / "report.html").read_text()
    assert "spread of the behavior on harmful" in page
    assert "whole+shrunk@again" in page

    validation = {
        "designs": ["random"],
        "subsets": 8,
        "epochs": 1,
        "batch": 64,
        "optimizer": "sgd",
        "lr": 1e-4,
        "methods": ["whole", "adjoint+shrunk"],
        "remove_by": "spread:harmful",
    }
    done = toys("validate", "study.yaml", "--run", "toys", "--quiet", validation=validation)
    assert done.returncode == 0, done.stderr
    run = RunFolder.open(toys.folder / "toys")
    measured = set(run.read_table("outcomes")["target"].to_pylist())
    assert {"spread:harmful", "spread:harmless", TARGETS[-1]} <= measured
    compared = run.read_table("lds").to_pylist()
    assert {"whole+shrunk@again", "whole", "adjoint+shrunk"} <= {row["method"] for row in compared}
    assert "spread:harmful" in {row["target"] for row in compared}
    done = toys("report", "toys")
    assert done.returncode == 0, done.stderr
    assert "adjoint+shrunk" in (toys.folder / "toys" / "report.html").read_text()


def test_their_parameters_are_study_keys_with_help_and_errors(toys):
    done = toys("init", "new.yaml")
    text = (toys.folder / "new.yaml").read_text()
    assert done.returncode == 0 and "shrunk" in text and "of plain SGD's step" in text
    done = toys("check", "study.yaml", attribution__curvature={"kind": "shrunk", "sahre": 1})
    assert done.returncode == 2 and "share" in done.stderr
    done = toys("check", "study.yaml", attribution__curvature={"kind": "shrunk", "share": -1})
    assert done.returncode == 2 and "attribution.curvature.share" in done.stderr


def test_without_the_package_they_are_unknown(taught_here, tmp_path):
    study = write_tiny_study(tmp_path)
    done = taught_here("check", str(study), "--set", "attribution.curvature=shrunk")
    assert done.returncode == 2 and "ekfac" in done.stderr and "Traceback" not in done.stderr
