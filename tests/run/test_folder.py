"""The run folder: whole files or none, nothing of another study reused, nothing lost to kill -9."""

from __future__ import annotations

import errno
import json
import os
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from taught.errors import UserError
from taught.run import code, files, fingerprint
from taught.run.fingerprint import stage_inputs
from taught.run.folder import RunFolder
from taught.stages import BY_NAME
from taught.study.load import dump_study
from taught.study.schema import Study

WEIGHTS = {"model.weights": "w" * 64}
X = np.arange(6.0).reshape(3, 2)


def readings(folder: Path, study: Study, *, extra=WEIGHTS, **options) -> tuple[RunFolder, bool]:
    """A stage that writes one file of each kind; the folder, and whether it was done."""
    run = RunFolder(folder, **options)
    with run.stage("readings", study, extra) as stage:
        if not stage.done:
            run.write_table("prompts", pa.table({"prompt_id": ["a", "b", "c"]}))
            ids = {"prompt_ids": ["a", "b", "c"], "feature_ids": np.array([12, 7])}
            axes = {"X": ("prompt_ids", "feature_ids")}
            run.write_tensors("activations", {"X": X * (study.features.max_features - 75) + X}, ids, axes)
            run.write_json("readings", {"max_fvu": study.sae.max_fvu})
    return run, stage.done


def policy(folder: Path, study: Study, **options) -> None:
    """A policy, which attribution under an SAE needs."""
    run = RunFolder(folder, **options)
    with run.stage("policy", study) as stage:
        if not stage.done:
            run.write_json("policy", {"alpha": study.policy.alpha})


def attribute(folder: Path, study: Study, **options) -> tuple[RunFolder, bool]:
    if (folder / "manifest.json").is_file():
        policy(folder, study)
    run = RunFolder(folder, **options)
    with run.stage("attribute", study, WEIGHTS) as stage:
        if not stage.done:
            run.write_table("summary", pa.table({"example_id": ["z"]}))
    return run, stage.done


def contents(folder: Path) -> dict[str, bytes]:
    """Everything in a folder except the manifest, which holds times."""
    return {
        file.name: file.read_bytes()
        for file in folder.iterdir()
        if file.is_file() and file.name not in ("manifest.json", ".lock")
    }


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    return tmp_path / "runs" / "one"


# Writing and reading


def test_what_is_written_is_read_back_with_its_ids(folder, study):
    run, _ = readings(folder, study)
    again = RunFolder.open(folder)
    arrays, ids = again.read_tensors("activations")
    assert np.array_equal(arrays["X"], X)
    assert arrays["X"].dtype == np.float64
    assert ids == {"prompt_ids": ["a", "b", "c"], "feature_ids": [12, 7]}
    assert again.read_table("prompts").to_pydict() == {"prompt_id": ["a", "b", "c"]}
    assert again.read_json("readings") == {"max_fvu": 0.9}
    assert again.study == study
    assert run.path("readings.json") == folder / "readings.json"


def test_files_are_plain_and_readable_without_taught(folder, study):
    import pyarrow.parquet as pq
    from safetensors.numpy import load_file

    readings(folder, study)
    assert pq.read_table(folder / "prompts.parquet").num_rows == 3
    assert np.array_equal(load_file(folder / "activations.safetensors")["X"], X)
    ids = json.loads((folder / "activations.ids.json").read_text())
    assert ids["feature_ids"] == [12, 7]


def test_a_transposed_view_keeps_its_values(folder, study):
    run = RunFolder(folder)
    with run.stage("readings", study):
        run.write_tensors("t", {"X": X.T}, {"feature_ids": [1, 2]}, {"X": ("feature_ids", None)})
    assert np.array_equal(run.read_tensors("t")[0]["X"], X.T)


@pytest.mark.parametrize(
    ("ids", "axes", "message"),
    [
        ({"prompt_ids": ["a", "b"]}, {"X": ("prompt_ids", None)}, "shape"),
        ({"feature_ids": [1, 2]}, {"X": ("feature_ids", None)}, "shape"),
        ({"prompt_ids": ["a", "b", "c"]}, {"X": ("prompt_ids",)}, "shape"),
        ({"prompt_ids": ["a", "b", "c", "d"]}, None, "4 ids fit no axis"),
        ({"prompt_ids": ["a", "b", "a"]}, None, "stands twice"),
    ],
)
def test_invariant_5_ids_that_do_not_fit_the_axes_are_refused(folder, study, ids, axes, message):
    run = RunFolder(folder)
    with pytest.raises(ValueError, match=message), run.stage("readings", study):
        run.write_tensors("activations", {"X": X}, ids, axes)
    assert not (folder / "activations.safetensors").exists()


def test_nan_is_not_written_as_json(folder, study):
    run = RunFolder(folder)
    with pytest.raises(ValueError), run.stage("readings", study):
        run.write_json("readings", {"r2": float("nan")})
    assert not (folder / "readings.json").exists()


def test_equal_results_give_equal_bytes(tmp_path, study):
    readings(tmp_path / "a", study)
    readings(tmp_path / "b", study)
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


def test_a_missing_file_names_the_command_that_makes_it(folder, study):
    run, _ = readings(folder, study)
    with pytest.raises(UserError, match=r"scores\.parquet is not in the run folder") as caught:
        run.read_table("scores")
    assert f"taught run STUDY --run {folder} --to attribute" in str(caught.value)


@pytest.mark.parametrize("name", ["prompts.parquet", "activations.ids.json", "readings.json"])
def test_a_changed_file_is_refused_by_name(folder, study, name):
    run, _ = readings(folder, study)
    content = bytearray((folder / name).read_bytes())
    content[len(content) // 2] ^= 1
    (folder / name).write_bytes(content)
    with pytest.raises(UserError, match=f"{name} has changed since it was written") as caught:
        run.verify()
    assert "--fresh" in str(caught.value)
    with pytest.raises(UserError, match=name):
        readings(folder, study)
    with pytest.raises(UserError, match=name):
        {"p": run.read_table, "a": run.read_tensors, "r": run.read_json}["r" if name == "readings.json" else name[0]](
            name.split(".")[0]
        )


def test_a_file_that_no_stage_wrote_is_not_trusted(folder, study):
    run, _ = readings(folder, study)
    (folder / "summary.parquet").write_bytes((folder / "prompts.parquet").read_bytes())
    with pytest.raises(UserError, match="not written by a stage"):
        run.read_table("summary")


def test_writing_outside_a_stage_is_our_mistake(folder):
    with pytest.raises(RuntimeError, match="outside a stage"):
        RunFolder(folder).write_json("readings", {})


# Whole files or none


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(errno.EIO, "broken disk")])
def test_a_crash_before_the_replacement_leaves_the_old_file(tmp_path, monkeypatch, error):
    file = tmp_path / "table"
    files.write_bytes(file, b"old")

    def crash(*_args):
        assert list(tmp_path.glob(".table.*.tmp")), "nothing was written beside the target"
        raise error

    monkeypatch.setattr(os, "replace", crash)
    with pytest.raises((KeyboardInterrupt, UserError)):
        files.write_bytes(file, b"new" * 1000)
    assert file.read_bytes() == b"old"
    assert [f.name for f in tmp_path.iterdir()] == ["table"]


def test_content_is_on_disk_before_it_gets_its_name(tmp_path, monkeypatch):
    order = []
    fsync, replace = os.fsync, os.replace
    monkeypatch.setattr(os, "fsync", lambda handle: (order.append("fsync"), fsync(handle)))
    monkeypatch.setattr(os, "replace", lambda *a: (order.append("replace"), replace(*a)))
    files.write_bytes(tmp_path / "table", b"new")
    assert order == ["fsync", "replace", "fsync"]


def test_no_space_left_is_said_with_both_sizes_and_leaves_nothing(folder, study, monkeypatch):
    run = RunFolder(folder)
    fsync = os.fsync

    def full(handle):
        if os.fstat(handle).st_size > 50_000:
            raise OSError(errno.ENOSPC, "No space left on device")
        fsync(handle)

    monkeypatch.setattr(os, "fsync", full)
    monkeypatch.setattr(files, "free_bytes", lambda _folder: 1234)
    noise = np.random.default_rng(0).normal(size=10_000)
    with pytest.raises(UserError, match="no space left") as caught, run.stage("readings", study, WEIGHTS):
        run.write_tensors("readouts", {"y": noise}, {})
    needed = len(files.tensors_bytes({"y": noise}))
    assert f"{needed:,} bytes needed, 1,234 bytes free" in str(caught.value)
    assert not [f.name for f in folder.iterdir() if "readouts" in f.name]
    monkeypatch.undo()
    assert not readings(folder, study)[1], "an unfinished stage was taken for a finished one"


PART = pa.schema([("example_id", pa.string()), ("target", pa.string()), ("value", pa.float64())])


def part(target: str, n: int = 3) -> pa.Table:
    ids = [f"example-{i}" for i in range(n)]
    return pa.table([ids, [target] * n, np.arange(n) + len(target) / 2], schema=PART)


def write_parts(folder: Path, study: Study, parts) -> RunFolder:
    run = RunFolder(folder)
    with run.stage("readings", study, WEIGHTS), run.table_writer("scores", PART, ("example_id",)) as write:
        for each in parts:
            write(each)
    return run


def test_a_table_written_in_parts_has_a_row_group_of_one_target_each(folder, study):
    import pyarrow.compute as pc
    import pyarrow.parquet as pq

    run = write_parts(folder, study, [part("a"), part("bb"), part("ccc")])
    assert run.read_table("scores") == pa.concat_tables([part("a"), part("bb"), part("ccc")])
    only = run.read_table("scores", ["value"], pc.field("target") == "bb")
    assert only.to_pydict() == {"value": [1.0, 2.0, 3.0]}
    groups = pq.ParquetFile(run.table_path("scores")).metadata
    ends = [groups.row_group(i).column(1).statistics for i in range(groups.num_row_groups)]
    assert [(end.min, end.max) for end in ends] == [("a", "a"), ("bb", "bb"), ("ccc", "ccc")]
    listed = run.manifest["files"]["scores.parquet"]
    assert listed["sha256"] == files.sha256_file(folder / "scores.parquet")
    assert listed["bytes"] == (folder / "scores.parquet").stat().st_size


def test_equal_parts_give_equal_bytes(tmp_path, study):
    for name in ("a", "b"):
        write_parts(tmp_path / name, study, [part("a", 1000), part("b", 1000)])
    assert contents(tmp_path / "a") == contents(tmp_path / "b")


@pytest.mark.parametrize("error", [ZeroDivisionError, KeyboardInterrupt])
def test_a_table_that_is_not_written_to_its_end_is_not_there(folder, study, error):
    def parts():
        yield part("a")
        raise error

    with pytest.raises(error):
        write_parts(folder, study, parts())
    assert sorted(f.name for f in folder.iterdir()) == [".lock", "manifest.json", "study.yaml"]
    assert RunFolder(folder).manifest["files"] == {}


@pytest.mark.parametrize("call", ["write", "fsync"])
def test_no_space_left_within_a_table_is_said_and_leaves_nothing(folder, study, monkeypatch, call):
    full = OSError(errno.ENOSPC, "No space left on device")

    def parts():
        yield part("a")
        if call == "write":
            raise full  # as pyarrow passes on what the file's own write raises
        monkeypatch.setattr(os, "fsync", lambda _handle: (_ for _ in ()).throw(full))

    with pytest.raises(UserError, match="no space left") as caught:
        write_parts(folder, study, parts())
    assert caught.value.exit_code == 2
    assert not list(folder.glob("*scores*")) + list(folder.glob(".scores*"))


@pytest.mark.skipif(not Path("/dev/full").exists(), reason="a disk that is always full")
def test_a_full_disk_within_a_row_group_is_an_error_of_the_system():
    with (
        pytest.raises(OSError, match="No space left"),
        open("/dev/full", "wb") as file,
        files.row_groups(file, PART) as write,
    ):
        write(part("a", 100_000))


def test_a_folder_that_cannot_be_made_is_the_users_to_change(tmp_path, study):
    (tmp_path / "file").write_text("x")
    for path in (tmp_path / "file", tmp_path / "file" / "below"):
        with pytest.raises(UserError, match="run folder"):
            readings(path, study)


def test_a_folder_with_other_files_is_left_alone(tmp_path, study):
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.tex").write_text("x")
    with pytest.raises(UserError, match="holds other files"):
        readings(tmp_path / "home", study)
    assert [f.name for f in (tmp_path / "home").iterdir()] == ["thesis.tex"]


# When results may be reused


def test_the_same_inputs_are_done_and_not_touched(folder, study):
    readings(folder, study, command="first")
    before = (folder / "manifest.json").read_bytes(), contents(folder)
    assert readings(folder, study, command="second")[1]
    assert before == ((folder / "manifest.json").read_bytes(), contents(folder))


def _other_prompts(study, _monkeypatch):
    Path(study.prompts.path).write_text('{"prompt": "other"}\n')


def _other_sae(study, _monkeypatch):
    (Path(study.sae.path) / "sae_weights.safetensors").write_bytes(b"other")


def _other_labels(study, _monkeypatch):
    Path(study.features.labels).write_text('{"1": "x"}')


def _other_code(_study, monkeypatch):
    monkeypatch.setattr(code, "code_digest", lambda modules: "0123456789abcdef")


def _other_version(_study, monkeypatch):
    monkeypatch.setattr("taught.__version__", "9.9.9")


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("prompts.path sha256", _other_prompts),
        ("sae.path sha256", _other_sae),
        ("features.labels sha256", _other_labels),
        ("code", _other_code),
        ("code", _other_version),
    ],
)
def test_invariant_8_other_data_or_code_is_refused_by_name(folder, study, name, change, monkeypatch):
    readings(folder, study)
    before = contents(folder)
    change(study, monkeypatch)
    with pytest.raises(UserError, match=f"made under other inputs: {name}\n") as caught:
        readings(folder, study)
    assert "was" in str(caught.value)
    assert "--fresh" in str(caught.value)
    assert contents(folder) == before


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model.id", "org/other"),
        ("model.revision", "abc123"),
        ("model.dtype", "float64"),
        ("sae.encoder", "relu"),
        ("readout.position", "last_user"),
        ("behavior.prefixes", ["No"]),
        ("prompts.limit", 10),
        ("features.max_features", 3),
        ("features.threshold", 0.5),
        ("features.max_features", 76),
    ],
)
def test_invariant_8_another_study_is_refused_with_old_and_new_value(folder, study, key, value):
    readings(folder, study)
    old = study.flat().get(key)
    with pytest.raises(UserError, match=f"made under other inputs: {key}\n") as caught:
        readings(folder, study.replace(key, value))
    assert f"{key}: was {old!r}, now {value!r}" in str(caught.value)


def test_invariant_8_other_weights_under_the_same_name_are_refused(folder, study):
    readings(folder, study)
    with pytest.raises(UserError, match=r"other inputs: model\.weights"):
        readings(folder, study, extra={"model.weights": "v" * 64})


def test_invariant_8_other_rows_in_a_dataset_folder_are_refused(folder, study, tmp_path):
    rows = tmp_path / "dataset" / "data-00000.arrow"
    rows.parent.mkdir()
    rows.write_bytes(b"one")
    study = study.replace("prompts.path", str(rows.parent))
    readings(folder, study)
    assert readings(folder, study)[1]
    rows.write_bytes(b"two")
    with pytest.raises(UserError, match=r"other inputs: prompts\.path sha256\n"):
        readings(folder, study)


def test_all_that_differs_is_named_at_once(folder, study):
    readings(folder, study)
    other = study.replace("sae.max_fvu", 1).replace("features.threshold", 3)
    with pytest.raises(UserError, match=r"features\.threshold, sae\.max_fvu"):
        readings(folder, other)


def test_what_the_result_does_not_depend_on_is_not_asked_for(folder, study, tmp_path):
    readings(folder, study)
    attribute(folder, study)
    moved = shutil.copy(study.prompts.path, tmp_path / "moved.jsonl")
    other = study.replace("name", "renamed").replace("prompts.path", str(moved))
    other = other.replace("attribution.memory_gb", 9).replace("attribution.batch_tokens", 7)
    assert readings(folder, other)[1]
    assert attribute(folder, other)[1]


OTHER = {
    "name": "x",
    "model.dtype": "bfloat16",
    "model.adapter": "a/b",
    "sae.block": 3,
    "readout.position": "max_user",
    "behavior": "answer",
    "behavior.prefixes": ["Never"],
    "prompts.positive_group": "p",
    "prompts.limit": 5,
    "examples.max_tokens": 99,
    "examples.positive_label": "bad",
    "features.threshold": 0.2,
    "features.labels": None,
    "policy.alpha": 2.0,
    "policy.bootstrap": 70,
    "policy.folds": 3,
    "concepts": [{"name": "a", "source": "difference"}],
    "attribution.targets": ["score"],
    "attribution.estimator": "finite-step",
    "attribution.estimator.store": "s",
    "attribution.lr": 0.5,
    "attribution.memory_gb": 8.0,
    "attribution.batch_tokens": 4,
    "attribution.checkpointing": True,
    "attribution.curvature": {"kind": "ekfac", "damping": 0.2},
    "attribution.parameters": ["*mlp*"],
    "clamp.prompts": 3,
    "clusters.k": 4,
    "bins.questions": False,
    "curation.rule": "top-k",
    "validation.lr": 1.0,
    "validation.methods": ["adjoint+ekfac"],
}
READ = ("model", "sae", "readout", "behavior", "prompts")
EXAMPLES = "examples.max_tokens"
RELEVANT = {
    "readings": (*READ, "features"),
    "policy": ("policy", "prompts"),
    "clamp": (*READ, "clamp", "policy.bootstrap"),
    "concepts": (*READ, "concepts"),
    "attribute": (*READ, EXAMPLES, "attribution", "bins.questions"),
    "clusters": ("clusters",),
    "bins": ("bins",),
    "curate": ("curation", "examples.positive_label"),
    "validate": (*READ, EXAMPLES, "validation", "attribution.parameters"),
    "compare": (*READ, EXAMPLES, "attribution", "validation"),
    "report": (),
}
PACE = ("attribution.memory_gb", "attribution.batch_tokens", "attribution.checkpointing", "attribution.estimator.store")


@settings(suppress_health_check=[HealthCheck.function_scoped_fixture], max_examples=120)
@given(key=st.sampled_from(sorted(OTHER)), stage=st.sampled_from(sorted(RELEVANT)))
def test_each_key_of_a_stage_changes_what_it_depends_on_and_no_other_does(study, key, stage):
    if key == "attribution.estimator.store":
        study = study.replace("attribution.estimator", "sketch")
    other = study.replace(key, OTHER[key])
    before, after = ({**stage_inputs(BY_NAME[stage], some), "code": ""} for some in (study, other))
    expected = key not in PACE and any(key == r or key.startswith(f"{r}.") for r in RELEVANT[stage])
    assert (before != after) == expected


def test_every_section_of_a_study_is_tried_above():
    assert {key.split(".")[0] for key in OTHER} == {key.split(".")[0] for key in Study().flat()}


def test_paths_inside_methods_and_lists_count_by_their_content(study, tmp_path):
    (tmp_path / "early").mkdir()
    weights = tmp_path / "early" / "model.safetensors"
    weights.write_bytes(b"one")
    study = study.replace("attribution.trajectory", "checkpoints")
    study = study.replace("attribution.trajectory.checkpoints", [{"id": str(tmp_path / "early"), "lr": 1e-5}])
    stage, key = BY_NAME["attribute"], "attribution.trajectory.checkpoints"
    first = stage_inputs(stage, study)
    assert str(tmp_path) not in str(first[key])
    moved = shutil.move(tmp_path / "early", tmp_path / "moved")
    other = study.replace(key, [{"id": str(moved), "lr": 1e-5}])
    assert stage_inputs(stage, other) == first
    (tmp_path / "moved" / "model.safetensors").write_bytes(b"two")
    assert stage_inputs(stage, other)[key] != first[key]


# What code a result comes from


@pytest.fixture
def sources(tmp_path, monkeypatch):
    """A copy of the package whose files can be edited, and the digests of all stages there."""
    package = tmp_path / "copy" / "taught"
    shutil.copytree(code.ROOT, package, ignore=shutil.ignore_patterns("presets", "__pycache__"))
    monkeypatch.setattr(code, "ROOT", package)
    caches = (code._reached, code._imports, code._file, code._content)

    def digests(study: Study) -> dict[str, str]:
        for cache in caches:
            cache.cache_clear()
        return {name: fingerprint.stage_code(stage, study) for name, stage in BY_NAME.items()}

    yield package, digests
    monkeypatch.undo()
    for cache in caches:
        cache.cache_clear()


EDITED = {
    "analysis/clusters.py": {"clusters"},
    "analysis/profiles.py": {"bins"},
    "policy/audit.py": {"policy"},
    "report/text.py": set(),
    "cli/commands.py": set(),
    "study/schema.py": set(),
    "run/folder.py": set(),
    "training/loop.py": {"validate"},
}


def test_an_edited_file_changes_the_stages_whose_numbers_come_from_it(sources, study):
    package, digests = sources
    before = digests(study)
    for file, stages in EDITED.items():
        path = package / file
        path.write_text(path.read_text() + "\n# a comment\n")
        after = digests(study)
        changed = {name for name in after if after[name] != before[name]}
        assert stages <= changed and changed - stages <= ({"compare"} if stages else set()), file
        before = after


def test_a_method_counts_only_where_the_study_names_it(sources):
    package, digests = sources
    curved = Study().replace("attribution.curvature", "ekfac")
    before, was_curved = digests(Study())["attribute"], digests(curved)["attribute"]
    path = package / "curvatures" / "ekfac.py"
    path.write_text(path.read_text() + "\n# a comment\n")
    assert digests(Study())["attribute"] == before
    assert digests(curved)["attribute"] != was_curved


# Stages that build on each other


def test_a_stage_without_the_one_before_it_names_the_command(folder, study):
    with pytest.raises(UserError, match="readings has not been run") as caught:
        attribute(folder, study)
    assert f"taught run STUDY --run {folder} --to readings" in str(caught.value)


def test_attribution_under_another_policy_study_is_refused(folder, study):
    readings(folder, study)
    with pytest.raises(UserError, match=r"holds readings results .* sae\.max_fvu\n"):
        attribute(folder, study.replace("sae.max_fvu", 2))


def test_what_was_made_from_an_earlier_result_goes_when_that_is_made_anew_under_other_inputs(folder, study):
    readings(folder, study)
    attribute(folder, study)
    same, _ = readings(folder, study, fresh=["readings"])
    same.require("attribute")  # the same inputs: the same result
    other = study.replace("features.threshold", 0.3)
    run, _ = readings(folder, other, fresh=["readings"])
    assert sorted(run.manifest["stages"]) == ["readings"]
    assert not run.path("summary.parquet").exists() and not run.path("policy.json").exists()


def test_a_stage_is_refused_after_one_before_it_was_made_under_other_inputs(folder, study, tmp_path):
    readings(folder, study)
    run, _ = attribute(folder, study)
    other = study.replace("features.threshold", 0.3)
    readings(tmp_path / "other", other)
    manifest = run.manifest
    made = RunFolder(tmp_path / "other").manifest
    for part in ("stages", "inputs"):
        manifest[part]["readings"] = made[part]["readings"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="made with an earlier result of readings"):
        RunFolder(folder).require("attribute")
    with pytest.raises(UserError, match="made with an earlier result of readings|stage readings"):
        attribute(folder, other)


def test_fresh_deletes_this_stages_files_and_no_others(folder, study):
    readings(folder, study)
    attribute(folder, study)
    (folder / "notes.txt").write_text("mine")
    kept = {name: c for name, c in contents(folder).items() if name != "summary.parquet"}
    run = RunFolder(folder, fresh=["attribute"])
    with pytest.raises(ZeroDivisionError), run.stage("attribute", study, WEIGHTS):
        raise ZeroDivisionError
    assert contents(folder) == kept


def test_a_curation_of_earlier_scores_goes_with_them(folder, study):
    readings(folder, study)
    attribute(folder, study)
    run = RunFolder.open(folder)
    with run.stage("curate", run.study):
        run.write_text("keep.jsonl", "")
    with run.stage("report", run.study) as stage:
        run.write_text("report.html", "one")
    attribute(folder, study.replace("attribution.lr", 0.5), fresh=["attribute"])
    run = RunFolder.open(folder)
    assert "curate" not in run.manifest["stages"] and not run.path("keep.jsonl").exists()
    with run.stage("report", run.study) as stage:
        assert not stage.done
    run.verify()


def test_an_old_report_does_not_hide_later_results(folder, study):
    readings(folder, study)
    attribute(folder, study)
    run = RunFolder.open(folder)
    with run.stage("report", run.study):
        run.write_text("report.html", "one")
    attribute(folder, study.replace("attribution.lr", 0.5), fresh=["attribute"])
    run = RunFolder.open(folder)
    run.verify()
    assert "summary" in run.finished_tables()
    (folder / "report.html").write_text("two")
    with pytest.raises(UserError, match=r"report\.html"):
        run.verify()


def test_a_report_needs_neither_scores_nor_the_data_files(folder, study):
    readings(folder, study)
    Path(study.prompts.path).unlink()
    run = RunFolder.open(folder)
    with run.stage("report", run.study) as stage:
        assert not stage.done
        run.write_text("report.html", "one")
    assert run.read_text("report.html") == "one"


def test_results_of_other_code_are_said_where_they_are_only_shown(folder, study, monkeypatch):
    run, _ = readings(folder, study)
    assert run.made_by_other_code() == {}
    old = fingerprint.stage_code(BY_NAME["readings"], study)
    monkeypatch.setattr(code, "code_digest", lambda modules: "0123456789abcdef")
    assert RunFolder.open(folder).made_by_other_code() == {"readings": old}


def test_curation_under_another_rule_is_simply_made_again(folder, study):
    readings(folder, study)
    attribute(folder, study)
    for rule in ("paper", "top-k"):
        run = RunFolder.open(folder)
        with run.stage("curate", run.study.replace("curation.rule", rule)) as stage:
            assert not stage.done
            run.write_text("keep.jsonl", rule)
    assert run.read_text("keep.jsonl") == "top-k"
    assert run.study.curation.rule == "top-k"  # what was asked for last
    assert run.study.replace("curation.rule", None) == study


def test_a_deleted_file_makes_the_stage_undone(folder, study):
    readings(folder, study)
    (folder / "readings.json").unlink()
    assert not readings(folder, study)[1]
    assert readings(folder, study)[1]


# Interruptions


def test_an_exception_leaves_the_stage_unfinished_and_its_pieces_kept(folder, study):
    run = RunFolder(folder)
    with pytest.raises(KeyboardInterrupt), run.stage("readings", study) as stage:
        stage.partial.save("batch-0", {"x": X})
        run.write_json("readings", {})
        raise KeyboardInterrupt
    with pytest.raises(UserError, match="readings was not finished"):
        run.require("readings")
    again = RunFolder(folder)
    with again.stage("readings", study) as stage:
        assert not stage.done
        assert [file.stem for file in stage.partial.path.iterdir()] == ["batch-0"]
        assert np.array_equal(stage.partial.load("batch-0")["x"], X)
    assert not (folder / "partial").exists()
    assert again.manifest["stages"]["readings"]["attempts"] == 2


def test_pieces_of_another_fingerprint_are_not_seen(folder, study):
    run = RunFolder(folder)
    with pytest.raises(KeyboardInterrupt), run.stage("readings", study) as stage:
        stage.partial.save("batch-0", {"x": X})
        raise KeyboardInterrupt
    other = study.replace("features.max_features", 76)
    with pytest.raises(UserError, match=r"features\.max_features"):
        readings(folder, other)
    with RunFolder(folder, fresh=["readings"]).stage("readings", other) as stage:
        assert stage.partial.load("batch-0") is None


def test_a_damaged_piece_counts_as_missing(folder, study):
    run = RunFolder(folder)
    with run.stage("readings", study) as stage:
        stage.partial.save("batch-0", {"x": X})
        (file,) = stage.partial.path.iterdir()
        file.write_bytes(file.read_bytes()[:-5])
        assert stage.partial.load("batch-0") is None
        with pytest.raises(ValueError, match="key"):
            stage.partial.save("../batch", {"x": X})


def test_pieces_of_a_stage_killed_right_after_its_completion_are_deleted(folder, study, monkeypatch):
    run = RunFolder(folder)
    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt), run.stage("readings", study) as stage:
        stage.partial.save("batch-0", {"x": X})
        patch.setattr(shutil, "rmtree", lambda *_, **__: (_ for _ in ()).throw(KeyboardInterrupt))
    assert (folder / "partial").exists()
    with RunFolder(folder).stage("readings", study) as stage:
        assert stage.done
    assert not (folder / "partial").exists()


def test_half_written_pieces_are_deleted_by_the_next_command(folder, study):
    run = RunFolder(folder)
    with pytest.raises(KeyboardInterrupt), run.stage("readings", study) as stage:
        stage.partial.save("batch-0", {"x": X})
        (stage.partial.path / ".batch-1.safetensors.123.tmp").write_bytes(b"half")
        raise KeyboardInterrupt
    with RunFolder(folder).stage("readings", study) as stage:
        assert [file.name for file in stage.partial.path.iterdir()] == ["batch-0.safetensors"]


def test_a_result_that_cannot_be_deleted_is_said(folder, study, monkeypatch):
    readings(folder, study)

    def refused(_path, **_options):
        raise OSError(errno.EROFS, "Read-only file system")

    with monkeypatch.context() as patch:
        patch.setattr(Path, "unlink", refused)
        with pytest.raises(UserError, match=r"cannot be written(.|\n)*Read-only file system"):
            readings(folder, study, fresh=["readings"])
    assert not readings(folder, study)[1]


SLOW_STAGE = """
    import os, sys, time
    import numpy as np
    from taught.run.folder import RunFolder
    from taught.study.load import load_study
    run = RunFolder(sys.argv[1])
    with run.stage("readings", load_study(sys.argv[2])) as stage:
        for i in range(4):
            piece = stage.partial.load(f"batch-{i}")
            if piece is None:
                print("computed", i, flush=True)
                stage.partial.save(f"batch-{i}", {"x": np.full(3, float(i))})
            if os.environ.get("KILL_AT") == str(i):
                os.kill(os.getpid(), 9)
        if os.environ.get("KILL_AT") == "replace":
            os.replace = lambda *a: os.kill(os.getpid(), 9)
        if os.environ.get("KILL_AT") == "wait":
            print("waiting", flush=True)
            time.sleep(60)
        parts = [stage.partial.load(f"batch-{i}")["x"] for i in range(4)]
        run.write_tensors("readouts", {"y": np.concatenate(parts)}, {})
        run.write_json("readings", {"n": 12})
"""


@pytest.fixture
def slow_stage(python, study, tmp_path):

    (tmp_path / "study.yaml").write_text(dump_study(study))

    def run(folder: Path, kill_at: str = "never"):
        args = ("-c", textwrap.dedent(SLOW_STAGE), str(folder), str(tmp_path / "study.yaml"))
        return python(*args, KILL_AT=kill_at)

    return run


def test_kill_9_and_the_same_command_give_the_same_result(slow_stage, tmp_path):
    assert slow_stage(tmp_path / "whole").returncode == 0
    for moment, finished in (("0", 1), ("2", 3), ("3", 4), ("replace", 4)):
        folder = tmp_path / f"killed-{moment}"
        killed = slow_stage(folder, kill_at=moment)
        assert killed.returncode == -signal.SIGKILL
        assert not RunFolder(folder).is_done("readings", "anything")
        resumed = slow_stage(folder)
        assert resumed.returncode == 0, resumed.stderr
        assert contents(folder) == contents(tmp_path / "whole")
        assert resumed.stdout.split("\n")[:-1] == [f"computed {i}" for i in range(finished, 4)]


def test_killed_before_anything_was_written_the_folder_is_still_ours(tmp_path, study, monkeypatch):
    run = RunFolder(tmp_path / "run")
    monkeypatch.setattr(files, "write_bytes", lambda *_: pytest.fail("killed here"))
    with pytest.raises(pytest.fail.Exception), run.stage("readings", study):
        pass
    monkeypatch.undo()
    assert not readings(tmp_path / "run", study)[1]


def test_one_command_at_a_time_and_a_dead_one_does_not_count(folder, study, tmp_path):

    (tmp_path / "study.yaml").write_text(dump_study(study))
    args = [sys.executable, "-c", textwrap.dedent(SLOW_STAGE), folder, tmp_path / "study.yaml"]
    environment = os.environ | {"KILL_AT": "wait", "PYTHONPATH": str(Path(files.__file__).parents[2])}
    other = subprocess.Popen(args, env=environment, stdout=subprocess.PIPE, text=True)
    try:
        while "waiting" not in (line := other.stdout.readline()):
            assert line, "the other command ended early"
        with pytest.raises(UserError, match="another command is writing"):
            readings(folder, study, extra={})
    finally:
        other.kill()
        other.wait()
        other.stdout.close()
    readings(folder, study, fresh=["readings"])


# The manifest


def test_manifest_holds_what_repeats_the_run(folder, study):
    readings(folder, study, command="taught run study.yaml")
    manifest = json.loads((folder / "manifest.json").read_text())
    assert manifest["format"] == 1
    assert manifest["study"] == study.to_dict()
    assert manifest["command"] == "taught run study.yaml"
    assert manifest["weights"] == WEIGHTS
    assert set(manifest["versions"]) >= {"python", "taught", "torch", "transformers", "numpy", "pyarrow"}
    assert manifest["data"]["prompts.path"]["path"] == study.prompts.path
    assert manifest["data"]["prompts.path"]["sha256"] == files.sha256_file(Path(study.prompts.path))
    stage = manifest["stages"]["readings"]
    assert stage["status"] == "complete"
    assert stage["seconds"] >= 0
    assert 0.01 < stage["peak_memory_gb"] < 100
    assert manifest["files"]["readings.json"]["sha256"] == files.sha256_file(folder / "readings.json")


def test_seconds_measure_the_stage(folder, study):
    run = RunFolder(folder)
    with run.stage("readings", study):
        time.sleep(0.05)
    assert 0.05 <= run.manifest["stages"]["readings"]["seconds"] < 5


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format": 1}', "null"])
def test_a_damaged_manifest_is_named(folder, content):
    folder.mkdir(parents=True)
    (folder / "manifest.json").write_text(content)
    with pytest.raises(UserError, match="manifest of the run folder is damaged"):
        RunFolder(folder)


def at(record: dict, path: str, value: object) -> dict:
    """A copy of nested mappings with one value changed; ``...`` takes it out."""
    key, _, rest = path.partition("/")
    changed = record | {key: at(record.get(key, {}), rest, value) if rest else value}
    return {name: of for name, of in changed.items() if of is not ...}


PARTS = """
    stages inputs files study inputs/readings inputs/readings/code stages/readings stages/readings/status
    stages/readings/seconds files/readings.json files/readings.json/stage files/readings.json/bytes study/policy
    study/behavior study/attribution study/name command stages/nothing files/outside
"""


@pytest.mark.parametrize("value", [..., None, 3, "a", [], {"a": []}, "\x1b[2J"], ids=repr)
@pytest.mark.parametrize("path", PARTS.split())
def test_a_manifest_whose_parts_are_of_another_type_is_named_or_means_nothing(folder, study, path, value):
    run, _ = readings(folder, study)
    (folder / "manifest.json").write_text(json.dumps(at(run.manifest, path, value)))
    try:
        again = RunFolder.open(folder)
        assert again.study.model == study.model
        again.verify()
        again.made_by_other_code()
        again.read_json("readings")
    except UserError as error:
        assert "\x1b" not in str(error)


@pytest.mark.parametrize("name", ["../outside", "/etc/passwd", "a/b", ".lock", "manifest.json", "..", "a" * 300])
def test_a_manifest_names_no_file_outside_of_its_folder_and_none_of_ours(folder, study, name):
    run, _ = readings(folder, study)
    manifest = run.manifest
    manifest["files"][name] = manifest["files"]["readings.json"]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UserError, match="manifest of the run folder is damaged"):
        RunFolder(folder, fresh=["readings"])


@pytest.mark.parametrize("content", [b"", b"[" * 10**5, b"[]", b"\xff", b'{"a": 1, "a": 2}', b"PAR1", b"\0" * 64])
@pytest.mark.parametrize(
    "name", ["prompts.parquet", "activations.safetensors", "activations.ids.json", "readings.json"]
)
def test_a_file_with_the_right_checksum_and_wrong_content_is_named(folder, study, name, content):
    run, _ = readings(folder, study)
    (folder / name).write_bytes(content)
    manifest = run.manifest
    manifest["files"][name] |= {"sha256": files.sha256_bytes(content), "bytes": len(content)}
    (folder / "manifest.json").write_text(json.dumps(manifest))
    run = RunFolder.open(folder)
    stem, _, kind = name.partition(".")
    readers = {"parquet": [run.read_table, run.footer], "json": [run.read_json]}
    for read in readers.get(kind, [run.read_tensors, lambda of: run.read_tensor_rows(of, "X", "prompt_ids", ["a"])]):
        with pytest.raises(UserError, match=stem):
            read(stem)


def test_another_format_is_refused(folder, study):
    run, _ = readings(folder, study)
    (folder / "manifest.json").write_text(json.dumps(run.manifest | {"format": 2}))
    with pytest.raises(UserError, match="another format"):
        RunFolder.open(folder)


def test_open_wants_a_run_folder(tmp_path):
    with pytest.raises(UserError, match="not a run folder"):
        RunFolder.open(tmp_path)


def test_the_manifest_cannot_be_changed_from_outside(folder, study):
    run, _ = readings(folder, study)
    run.manifest["stages"].clear()
    assert "readings" in run.manifest["stages"]
