"""The command line, run for real: messages, exit codes, what is written where."""

from __future__ import annotations

import csv
import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from taught import __version__
from taught.cli.app import run_command, spelled_out
from taught.cli.given import Question, study_of
from taught.run.folder import RunFolder
from taught.study.load import dump_study, load_study
from taught.study.schema import Study

SRC = Path(__file__).parents[2] / "src"
# Stand-ins for the stages of a run without an SAE: they write what they were told, so that tests see it.
RECORD = """
def readings(study, run, progress):
    progress.step("reading", 2)
    progress.advance()
    with run.stage("readings", study) as stage:
        if not stage.done:
            run.write_json("readings", {"limit": study.prompts.limit})
"""
OURS = "def readings(study, run, progress):\n    raise ZeroDivisionError('ours')"
THEIRS = """
from taught.errors import UserError
def readings(study, run, progress):
    raise UserError("[bold]odd[/bold] thing", value="[x]", rule="even", fix="change it")
"""


@pytest.fixture
def file(tmp_path: Path, study: Study) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(dump_study(study.replace("sae.path", None)))
    return path


def readings(*arguments: str) -> tuple[str, ...]:
    return ("run", "mine.yaml", "--only", "readings", *arguments)


def test_version_and_help(taught):
    assert taught("--version").stdout.strip() == __version__
    done = taught("--help")
    assert done.returncode == 0
    verbs = ["demo", "init", "check", "run", "show", "curate", "validate", "report"]
    assert re.findall(r"│ (\w+) ", done.stdout) == verbs


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["rum", "x"], 'Did you mean "run"?'),
        (["check"], "STUDY"),
        (["run", "x", "--sett", "a=1"], "Did you mean --set?"),
        (["curate", "x", "--rule", "best"], "paper"),
        (["demo", "--prompts", "many"], "many"),
        (["run", "nowhere.yaml"], "no such study"),
        (["run", "mine.yaml", "--set", "policy.alpha"], "--set needs a key and a value"),
        (["run", "mine.yaml", "--set", "policy.alpha=-1"], "policy.alpha is not valid"),
        (["run", "mine.yaml", "--set", "polcy.alpha=1"], "did you mean policy.alpha?"),
        (["run", "mine.yaml", "--set", "policy.alpha=["], "not valid YAML"),
        (["run", "mine.yaml", "--behavior", "prefix"], "did you mean prefixes?"),
        (["run", "mine.yaml", "--to", "polcy"], "there is no stage of this name"),
        (["run", "mine.yaml", "--to", "policy"], "use --set sae.path=FOLDER"),
        (["run", "mine.yaml", "--fresh=polcy"], "there is no stage of this name"),
        (["run", "--model", "m", "--prompts", "p"], "missing: --pairs"),
        (["run", "mine.yaml", "--pairs", "a", "--documents", "b"], "pairs or documents"),
        (["run", "mine.yaml", "--tuned", "./m", "--set", "attribution.trajectory=steps"], "leave out --tuned"),
        (["show", "nowhere"], "not a run folder"),
        (["curate", "nowhere"], "not a run folder"),
        (["report", "nowhere"], "not a run folder"),
    ],
)
def test_the_users_mistakes_exit_with_2_and_no_traceback(taught_here, file, monkeypatch, arguments, message):
    monkeypatch.chdir(file.parent)
    done = taught_here(*arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "fix:" in done.stderr
    assert done.stdout == ""


def test_a_user_error_of_a_stage_is_shown_as_it_is(taught_with, file):
    done = taught_with(THEIRS, *readings())
    assert done.returncode == 2
    assert done.stderr.splitlines()[-4:] == [
        "error: [bold]odd[/bold] thing",
        "  value: [x]",
        "  rule:  even",
        "  fix:   change it",
    ]
    assert "Traceback" not in done.stderr


def test_our_mistake_shows_the_traceback_and_exits_with_1(taught_with, file):
    done = taught_with(OURS, *readings())
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "ZeroDivisionError: ours" in done.stderr


def test_a_real_interrupt_while_a_stage_runs(taught_with, file):
    wait = (
        "import os, signal, time\n"
        "def readings(study, run, progress):\n"
        # a background job of a shell ignores Ctrl-C, and so do the tests that run in one
        "    signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "    with run.stage('readings', study):\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "        time.sleep(30)\n"
    )
    stopped = taught_with(wait, *readings())
    assert stopped.returncode == 130
    assert "stopped; finished work is kept; the same command resumes" in stopped.stderr
    assert "Traceback" not in stopped.stderr
    done = taught_with(RECORD, *readings())
    assert done.returncode == 0, done.stderr
    assert re.search(r"runs/my-study: readings \d+\.\d s", done.stderr)


def test_a_stage_runs_then_is_complete_already_then_is_refused(taught_with, file, tmp_path):
    first = taught_with(RECORD, *readings())
    assert first.returncode == 0, first.stderr
    assert "peak memory" in first.stderr and "reading (2)" in first.stderr
    assert load_study(tmp_path / "runs" / "my-study") == load_study(file)
    assert "complete already: readings" in taught_with(RECORD, *readings()).stderr
    other = readings("--set", "prompts.limit=3", "--quiet")
    refused = taught_with(RECORD, *other)
    assert refused.returncode == 2
    assert "prompts.limit: was None, now 3" in refused.stderr
    (command,) = re.findall(r"make them anew: (taught .*)", refused.stderr)
    assert command == "taught run STUDY --run runs/my-study --to readings --fresh readings"
    done = taught_with(RECORD, *other, "--fresh", "readings")
    assert done.returncode == 0 and "reading (2)" not in done.stderr
    manifest = (tmp_path / "runs" / "my-study" / "manifest.json").read_text()
    assert "taught run mine.yaml --only readings --set prompts.limit=3 --quiet --fresh readings" in manifest


def test_a_missing_data_file_is_named_before_anything_runs(taught_here, file, monkeypatch):
    monkeypatch.chdir(file.parent)
    (file.parent / "pairs.jsonl").unlink()
    done = taught_here(*readings())
    assert done.returncode == 2
    assert "examples.path does not exist" in done.stderr
    assert not (file.parent / "runs").exists()


def test_a_stopped_process_is_no_clean_exit(taught_with, file):
    """Exit codes come from real processes: one that is killed does not look finished."""
    kill = "import os\ndef readings(study, run, progress):\n    os.kill(os.getpid(), 9)"
    assert taught_with(kill, *readings()).returncode == -signal.SIGKILL


@pytest.mark.parametrize(
    ("typed", "read"),
    [
        (["run", "s", "--fresh"], ["run", "s", "--fresh=all"]),
        (["run", "s", "--fresh", "policy"], ["run", "s", "--fresh", "policy"]),
        (["run", "--fresh", "s"], ["run", "--fresh=all", "s"]),
        (["run", "s", "--fresh", "--quiet"], ["run", "s", "--fresh=all", "--quiet"]),
    ],
)
def test_fresh_may_name_a_stage_or_none(typed, read):
    assert spelled_out(typed) == read


def test_the_order_of_values_on_the_command_line_does_not_count(file):
    sets = ("attribution.curvature.eps=0.25", "attribution.curvature=adam")
    found = [study_of(str(file), Question(set=given)) for given in (sets, sets[::-1])]
    assert found[0] == found[1]
    assert found[0].attribution.curvature.values == {"eps": 0.25}


# init


def test_init_writes_a_study_that_loads_to_the_defaults(taught_here, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    done = taught_here("init")
    assert done.returncode == 0
    assert "taught check study.yaml" in done.stdout
    assert load_study(tmp_path / "study.yaml") == Study().resolved(tmp_path)


def test_init_never_overwrites_without_force(taught_here, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.yaml").write_text("mine")
    done = taught_here("init", "a.yaml")
    assert done.returncode == 2
    assert "exists already" in done.stderr
    assert (tmp_path / "a.yaml").read_text() == "mine"
    assert taught_here("init", "a.yaml", "--force").returncode == 0
    assert load_study(tmp_path / "a.yaml").name == "my-study"


def test_init_into_a_folder(taught_here, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "new").mkdir()
    assert taught_here("init", "new").returncode == 0
    assert (tmp_path / "new" / "study.yaml").is_file()
    assert taught_here("init", "absent/a.yaml").returncode == 2


# The stages for real, on a small model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    """A study that was run to its report."""
    from tiny_study import write_tiny_study

    study = write_tiny_study(tmp_path_factory.mktemp("tiny"))
    study.write_text(study.read_text().replace("prompts.jsonl,", "prompts.jsonl, limit: 12,"))
    folder = study.parent
    assert run_command(["run", str(folder / "study.yaml"), "--run", str(folder / "run"), "-q"]) == 0
    return folder


@pytest.fixture
def copy(tiny, tmp_path) -> Path:
    """Its run folder, to play with."""
    return Path(shutil.copytree(tiny / "run", tmp_path / "run"))


def test_run_does_all_that_the_study_asks_for_and_trains_nothing(tiny):
    run = RunFolder.open(tiny / "run")
    assert list(run.manifest["stages"]) == ["readings", "policy", "attribute", "curate", "report"]
    run.verify()


def test_memory_that_runs_out_is_said_and_the_advice_goes_on(tiny, tmp_path, monkeypatch, capsys):
    import torch

    from taught.estimators import adjoint

    line = ["run", str(tiny / "study.yaml"), "--run", str(tmp_path / "run"), "-q"]
    with monkeypatch.context() as patch:
        patch.setattr(adjoint, "build_queries", lambda *_, **__: torch.empty(2**60))
        assert run_command(line) == 2
    said = capsys.readouterr().err
    assert "memory" in said and "attribution.memory_gb" in said and "Traceback" not in said
    before = RunFolder.open(tmp_path / "run").manifest["stages"]["policy"]
    assert run_command([*line, "--set", "attribution.memory_gb=0.1", "--set", "attribution.batch_tokens=64"]) == 0
    run = RunFolder.open(tmp_path / "run")
    run.verify()
    assert run.manifest["stages"]["policy"] == before


def test_what_a_run_wrote_is_described_by_its_stages(tiny):
    from taught.stages import BY_NAME

    for name, file in RunFolder.open(tiny / "run").manifest["files"].items():
        assert name in BY_NAME[file["stage"]].writes


def test_a_run_folder_is_gone_on_with_and_asked_for_more(taught_here, copy):
    done = taught_here("run", str(copy), "--set", "clamp.prompts=2", "--set", "clamp.controls=2", "-q")
    assert done.returncode == 0, done.stderr
    assert "complete already: readings, policy, attribute" in done.stderr
    run = RunFolder.open(copy)
    assert run.study.clamp.prompts == 2 and "clamp" in run.manifest["stages"]
    assert done.stdout.splitlines()[-1] == f"Report: {copy / 'report.html'}"


def test_without_a_study_the_flags_make_one_that_stands_in_the_run_folder(taught_here, tiny, tmp_path):
    done = taught_here(
        *("run", "--model", str(tiny / "model"), "--pairs", str(tiny / "pairs.jsonl")),
        *("--prompts", str(tiny / "prompts.jsonl"), "--set", "behavior.prefixes=[Not, Never]"),
        *("--target", "behavior", "--target", "behavior:harmful - behavior:harmless"),
        *("--set", "attribution.exact_top=0", "--run", str(tmp_path / "run"), "-q"),
    )
    assert done.returncode == 0, done.stderr
    run = RunFolder.open(tmp_path / "run")
    assert list(run.manifest["stages"]) == ["readings", "attribute", "curate", "report"]
    study = load_study(tmp_path / "run")
    assert study.name == "pairs" and study.sae.path is None
    assert study.behavior.values["prefixes"] == ("Not", "Never")
    names = set(run.read_table("scores")["target"].to_pylist())
    assert names == {"behavior", "behavior:harmful - behavior:harmless"}
    assert taught_here("run", str(tmp_path / "run"), "-q").returncode == 0  # and goes on with it


def test_influence_is_taken_at_what_the_model_was_tuned_into(taught_here, tiny, tmp_path):
    from taught import influence
    from tiny_study import write_tiny_study

    after = write_tiny_study(tmp_path / "after", seed=1).parent / "model"
    command = ("run", str(tiny / "study.yaml"), "--tuned", str(after), "--set", "attribution.lr=0.003", "-q")
    done = taught_here(*command, "--target", "behavior:harmless", "--run", str(tmp_path / "run"))
    assert done.returncode == 0, done.stderr
    run = RunFolder.open(tmp_path / "run")
    said = run.study.attribution
    assert said.curvature.kind == "ekfac" and said.trajectory.values["checkpoints"][0]["lr"] == 0.003
    rows = run.read_table("scores").to_pylist()
    found = {row["example_id"]: row["value"] for row in rows if row["target"] == "behavior:harmless"}
    study = load_study(tiny / "study.yaml").replace("attribution.curvature", "ekfac")
    study = study.replace("sae.path", None).replace("prompts.limit", 12)
    prompts, pairs = tiny / "prompts.jsonl", tiny / "pairs.jsonl"
    there = influence(after, pairs, prompts, ["behavior:harmless"], lr=0.003, study=study)
    for example_id, value in zip(there.example_ids, there["behavior:harmless"], strict=True):
        assert found[example_id] == pytest.approx(value, rel=1e-5)
    page = run.path("report.html").read_text()
    assert re.search(f"Influence at.{{,100}}{after}", page) and f"step in the metric of EK-FAC from {after}" in page
    assert run.read_json("curation")["change"] is None and "the order of the examples, not the size" in page
    assert "Change per Newton step" in page


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("model.adapter", "someone/adapter"),
        ("attribution.checkpoint", "someone/after"),
        ("attribution.trajectory", {"kind": "checkpoints", "checkpoints": [{"id": "someone/after", "lr": 1e-4}]}),
    ],
)
def test_the_hub_is_closed_only_where_nothing_comes_from_it(tiny, monkeypatch, key, value):
    monkeypatch.setenv("HF_HUB_OFFLINE", "0")  # put back at the end
    study_of(str(tiny / "study.yaml"), Question(set=(f"{key}={json.dumps(value)}",)))
    assert os.environ["HF_HUB_OFFLINE"] == "0"
    study_of(str(tiny / "study.yaml"), Question())
    assert os.environ["HF_HUB_OFFLINE"] == "1"


def test_the_tuned_model_keeps_the_metric_that_is_asked_for(taught_here, tiny, tmp_path, monkeypatch):
    monkeypatch.chdir(tiny)
    command = ("run", str(tiny / "study.yaml"), "--tuned", "./model", "--run", str(tmp_path / "run"), "-q")
    done = taught_here(*command, "--set", "attribution.curvature=identity")
    assert done.returncode == 0, done.stderr
    study = RunFolder.open(tmp_path / "run").study
    assert study.attribution.curvature.kind == "identity"
    (place,) = study.replace("curation.rule", "top-k").attribution.trajectory.values["checkpoints"]
    assert place.id == str(tiny / "model")
    done = taught_here("curate", str(tmp_path / "run"), "--rule", "top-k", "--k", "2")
    assert "Predicted change without them, one step an example at each checkpoint: " in done.stdout


@pytest.mark.slow  # over 20 s: every command in a process of its own
def test_invariant_10_local_inputs_need_no_network_at_all(taught, tiny, copy):
    """Every verb on local files, with sockets that raise: nothing is fetched, nothing phones home."""
    commands = [
        ["check", str(tiny / "study.yaml")],
        ["run", str(tiny / "study.yaml"), "--run", "again", "--to", "policy", "-q"],
        ["curate", str(copy)],
        ["report", str(copy)],
        ["show", str(copy), "z03"],
    ]
    for command in commands:
        done = taught(*command, network=False, HF_HUB_OFFLINE="0")
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        assert "network access attempted" not in done.stdout + done.stderr


def test_the_guard_against_the_network_bites(python):
    program = "import socket; socket.create_connection(('127.0.0.1', 9))"
    assert "network access attempted" in python("-c", program, network=False).stderr


def test_no_bars_of_other_libraries_and_plain_lines(taught, tiny, tmp_path):
    done = taught("run", str(tiny / "study.yaml"), "--run", "r", "--to", "readings")
    assert done.returncode == 0, done.stderr
    assert "%|" not in done.stderr and "\r" not in done.stderr
    assert "read prompts (12)" in done.stderr


def test_invariant_8_another_model_under_the_same_path_is_refused(taught_here, tmp_path, monkeypatch):
    """The folder of the model keeps its name; its weights change."""
    from tiny_study import write_tiny_study

    monkeypatch.chdir(tmp_path)
    write_tiny_study(tmp_path / "a")
    write_tiny_study(tmp_path / "b", seed=1)
    command = ("run", "a/study.yaml", "--run", "run", "--to", "readings", "-q")
    assert taught_here(*command).returncode == 0
    weights = "model/model.safetensors"
    (tmp_path / "a" / weights).write_bytes((tmp_path / "b" / weights).read_bytes())
    refused = taught_here(*command)
    assert refused.returncode == 2
    assert "model.id sha256" in refused.stderr


def test_the_strongest_come_first_and_csv_has_them_all(taught_here, tiny):
    run = RunFolder.open(tiny / "run")
    summary = {row["example_id"]: row for row in run.read_table("summary").to_pylist()}
    done = taught_here("show", str(tiny / "run"), "behavior:harmless", "--csv")
    rows = list(csv.DictReader(io.StringIO(done.stdout)))
    expected = sorted(summary, key=lambda i: (-abs(summary[i]["behavior:harmless"]), i))
    assert [row["example_id"] for row in rows] == expected
    assert [float(row["value"]) for row in rows] == [summary[i]["behavior:harmless"] for i in expected]
    one = taught_here("show", str(tiny / "run"), "score", "--label", "harmful-refusal", "--top", "1")
    (best,) = [i for i in expected if re.search(rf"\b{i}\b", one.stdout)]
    assert summary[best]["label"] == "harmful-refusal"


@pytest.mark.parametrize(
    ("arguments", "shown"),
    [
        ((), "Verdict"),
        (("z03",), "Where to buy ships"),
        (("tables",), "coefficients"),
        (("coefficients",), "sign_stability"),
        (("coverage",), "Audit by category"),
        (("SELECT count(*) AS n FROM prompts",), "12"),
        (("score", "--quantiles"), "q0.5"),
        (("coefficient:7:x",), "example_id"),
        (("behavior:harmful - behavior:harmless",), "example_id"),
    ],
)
def test_what_can_be_shown(taught_here, tiny, arguments, shown):
    done = taught_here("show", str(tiny / "run"), *arguments)
    assert done.returncode == 0, done.stderr
    assert shown in done.stdout


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (("z3",), "did you mean z03"),
        (("coefficient",), "an id of an example or a feature"),
        (("behavior:nobody",), "no values of this target"),
        (("score", "--method", "other"), "no values of this target"),
        (("score", "--label", "nobody"), "no example has this label"),
        (("score", "--set", "policy.alpha=2"), "this run has no sketches"),
        (("SELECT 1; SELECT 2",), "a query is one SELECT"),
    ],
)
def test_what_cannot_be_shown_is_said(taught_here, tiny, arguments, said):
    done = taught_here("show", str(tiny / "run"), *arguments)
    assert done.returncode == 2
    assert said in done.stderr and not done.stdout


def test_a_later_question_is_answered_from_the_sketches_of_the_run(taught_here, tiny, tmp_path):
    done = taught_here(
        *("run", str(tiny / "study.yaml"), "--run", str(tmp_path / "run"), "--to", "attribute", "-q"),
        *("--set", "attribution.estimator={kind: sketch, dim: 256, sample: 2}", "--target", "score"),
    )
    assert done.returncode == 0, done.stderr
    show = ("show", str(tmp_path / "run"), "--csv")
    later = taught_here(*show, "behavior:harmless")
    assert later.returncode == 0, later.stderr
    assert len(list(csv.DictReader(io.StringIO(later.stdout)))) == 8
    same, other = (taught_here(*show, "score", *more).stdout for more in ((), ("--set", "policy.alpha=50")))
    assert other and same != other
    refused = taught_here(*show, "score", "--set", "policy.folds=2")
    assert refused.returncode == 2 and "some of policy.alpha" in refused.stderr


def test_curate_writes_what_its_flags_say_and_the_run_remembers_it(taught_here, copy):
    done = taught_here("curate", str(copy), "--rule", "top-k", "--k", "3", "--target", "behavior:harmless")
    assert done.returncode == 0, done.stderr
    assert "3 examples to drop" in done.stdout and str(copy / "drop.jsonl") in done.stdout.replace("\n", "")
    assert len((copy / "drop.jsonl").read_text().splitlines()) == 3
    curation = RunFolder.open(copy).study.curation
    assert (curation.rule, curation.k, curation.target) == ("top-k", 3, "behavior:harmless")
    assert taught_here("curate", str(copy), "--k", "2").returncode == 0
    assert len((copy / "drop.jsonl").read_text().splitlines()) == 2


@pytest.mark.parametrize("flags", [("--target", "behavior:nobody"), ("--k", "99"), ("--method", "nope")])
def test_a_refused_curation_is_not_remembered_and_leaves_the_earlier_one(copy, flags):
    curated = ("curate", str(copy), "--rule", "top-k", "--target", "behavior:harmless")
    assert run_command([*curated, "--k", "2"]) == 0
    before, study = (copy / "curation.parquet").read_bytes(), RunFolder.open(copy).study
    assert run_command(["curate", str(copy), *flags]) == 2
    assert RunFolder.open(copy).study == study
    assert (copy / "curation.parquet").read_bytes() == before
    assert run_command(["curate", str(copy), "--k", "1"]) == 0


def test_show_refuses_a_changed_file_and_says_whose_code_it_was(taught_here, copy):
    manifest = (copy / "manifest.json").read_text()
    other = re.sub("sources [0-9a-f]{16}", "sources 0000000000000000", manifest, count=1)
    (copy / "manifest.json").write_text(other)
    assert "readings was made by another version of the code" in taught_here("show", str(copy)).stderr
    (copy / "policy.json").write_text("{}")
    done = taught_here("show", str(copy))
    assert done.returncode == 2
    assert "policy.json has changed since it was written" in done.stderr


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX pipes")
def test_a_reader_that_has_seen_enough_is_no_error(tiny):
    command = f"set -o pipefail; {sys.executable} -m taught show {tiny / 'run'} 'SELECT range FROM range(200000)' --csv"
    done = subprocess.run(
        ["bash", "-c", f"{command} | head -1"],
        env=os.environ | {"PYTHONPATH": str(SRC)},
        capture_output=True,
        text=True,
    )
    assert done.stdout == "range\n"
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    assert done.returncode == 0


def test_invariant_10_no_pickle_and_no_remote_code_is_ever_asked_for():
    sources = {f: f.read_text() for f in SRC.rglob("*.py")}
    for file, source in sources.items():
        for word in ("import pickle", "torch.load(", "trust_remote_code=True", "joblib", "yaml.load("):
            if word == "yaml.load(" and "_UniqueKeyLoader" in source:
                continue  # a SafeLoader, see test_yaml_that_would_run_code_is_refused
            assert word not in source, f"{file.name} says {word}"
