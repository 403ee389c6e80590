"""The command line, run for real: messages, exit codes, what is written where."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from taught import __version__
from taught.study.load import dump_study, load_study
from taught.study.schema import Study

# Stand-ins for the stages: they write what they were told, so that the tests see it.
RECORD = """
from rich.text import Text
class Report:
    problems = ()
    def __init__(self, study): self.study = study
    def __rich__(self): return Text(f"{self.study.policy.alpha} {self.study.examples.path}")
def check(study):
    return Report(study)
def policy(study, run, progress):
    progress.step("reading", 2)
    progress.advance()
    with run.stage("policy", study) as stage:
        if not stage.done:
            run.write_json("policy", {"alpha": study.policy.alpha})
"""
INTERRUPT = "def policy(study, run, progress):\n    raise KeyboardInterrupt"
OURS = "def policy(study, run, progress):\n    raise ZeroDivisionError('ours')"
THEIRS = """
from taught.errors import UserError
def policy(study, run, progress):
    raise UserError("[bold]odd[/bold] thing", value="[x]", rule="even", fix="change it")
"""


@pytest.fixture
def file(tmp_path: Path, study: Study) -> Path:
    path = tmp_path / "mine.yaml"
    path.write_text(dump_study(study))
    return path


def test_version_and_help(taught):
    assert taught("--version").stdout.strip() == __version__
    done = taught("--help")
    assert done.returncode == 0
    verbs = ["demo", "init", "check", "policy", "attribute", "curate", "report", "show"]
    positions = [done.stdout.index(f"│ {verb} ") for verb in verbs]
    assert positions == sorted(positions)


def test_help_names_every_method_and_says_what_a_study_is(taught):
    from taught.stages.concept_influence import METHODS as CONCEPT_METHODS

    from taught.stages.compare import METHODS

    for verb, methods in (("compare", METHODS), ("concept-influence", CONCEPT_METHODS)):
        words = taught(verb, "--help").stdout.replace("│", " ").split()
        assert {*methods} <= {word.strip(",.") for word in words}
    for verb in ("check", "policy", "attribute", "validate", "sketch", "concept"):
        shown = " ".join(taught(verb, "--help").stdout.replace("│", " ").split())
        assert "A study file, a folder that holds study.yaml, or the name of a preset." in shown


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["polcy", "x"], 'Did you mean "policy"?'),
        (["policy"], "STUDY"),
        (["policy", "x", "--sett", "a=1"], "Did you mean --set?"),
        (["curate", "x", "--rule", "best"], "paper"),
        (["demo", "--prompts", "many"], "many"),
        (["policy", "nowhere.yaml"], "no such study"),
        (["policy", "refusal-smollm2", "--set", "policy.alpha"], "--set needs a key and a value"),
        (["policy", "refusal-smollm2", "--set", "policy.alpha=-1"], "policy.alpha is not valid"),
        (["policy", "refusal-smollm2", "--set", "polcy.alpha=1"], "did you mean policy.alpha?"),
        (["policy", "refusal-smollm2", "--set", "policy.alpha=["], "not valid YAML"),
        (["show", "nowhere"], "not a run folder"),
        (["curate", "nowhere"], "not a run folder"),
        (["report", "nowhere"], "not a run folder"),
    ],
)
def test_the_users_mistakes_exit_with_2_and_no_traceback(taught_with, arguments, message):
    done = taught_with(RECORD, *arguments)
    assert done.returncode == 2
    assert message in done.stderr
    assert "fix:" in done.stderr
    assert "Traceback" not in done.stderr
    assert done.stdout == ""


def test_a_user_error_of_a_stage_is_shown_as_it_is(taught_with, file):
    done = taught_with(THEIRS, "policy", file.name)
    assert done.returncode == 2
    assert done.stderr.splitlines()[-4:] == [
        "error: [bold]odd[/bold] thing",
        "  value: [x]",
        "  rule:  even",
        "  fix:   change it",
    ]


def test_our_mistake_shows_the_traceback_and_exits_with_1(taught_with, file):
    done = taught_with(OURS, "policy", file.name)
    assert done.returncode == 1
    assert "Traceback" in done.stderr
    assert "ZeroDivisionError: ours" in done.stderr


def test_ctrl_c_exits_with_130_and_says_what_is_kept(taught_with, file):
    done = taught_with(INTERRUPT, "policy", file.name)
    assert done.returncode == 130
    assert "stopped; finished work is kept; the same command resumes" in done.stderr
    assert "Traceback" not in done.stderr


def test_a_real_interrupt_while_a_stage_runs(taught_with, file, tmp_path):
    wait = (
        "import os, signal, time\n"
        "def policy(study, run, progress):\n"
        # a background job of a shell ignores Ctrl-C, and so do the tests that run in one
        "    signal.signal(signal.SIGINT, signal.default_int_handler)\n"
        "    with run.stage('policy', study):\n"
        "        os.kill(os.getpid(), signal.SIGINT)\n"
        "        time.sleep(30)\n"
    )
    stopped = taught_with(wait, "policy", file.name)
    assert stopped.returncode == 130
    assert "the same command resumes" in stopped.stderr
    done = taught_with(RECORD, "policy", file.name)
    assert done.returncode == 0, done.stderr
    assert "policy complete in runs/my-study" in done.stderr


def test_a_stage_runs_then_is_complete_already_then_is_refused(taught_with, file, tmp_path):
    first = taught_with(RECORD, "policy", file.name)
    assert first.returncode == 0, first.stderr
    assert "policy complete in runs/my-study" in first.stderr
    assert "peak memory" in first.stderr
    assert load_study(tmp_path / "runs" / "my-study") == load_study(file)
    assert "complete already" in taught_with(RECORD, "policy", file.name).stderr
    other = ("policy", file.name, "--set", "policy.alpha=3")
    refused = taught_with(RECORD, *other)
    assert refused.returncode == 2
    assert "policy.alpha: was 5.0, now 3.0" in refused.stderr
    assert taught_with(RECORD, *other, "--run", "runs/other").returncode == 0
    assert taught_with(RECORD, *other, "--fresh").returncode == 0
    command = (tmp_path / "runs" / "my-study" / "manifest.json").read_text()
    assert "taught policy mine.yaml --set policy.alpha=3 --fresh" in command


def test_flags_override_the_study(taught_with, file, tmp_path):
    (tmp_path / "t.jinja").write_text("x")
    done = taught_with(
        RECORD,
        "policy",
        "--set",
        "policy.alpha=3",
        "mine.yaml",
        "--set=policy.folds=4",
        "--drop-overlap",
        "--drop-truncated",
        "--chat-template",
        "t.jinja",
        "-q",
    )
    assert done.returncode == 0, done.stderr
    ran = load_study(tmp_path / "runs" / "my-study")
    assert (ran.policy.alpha, ran.policy.folds) == (3.0, 4)
    assert ran.examples.drop_overlap
    assert ran.examples.drop_truncated
    assert ran.model.chat_template == str(tmp_path / "t.jinja")


def test_quiet_shows_no_progress(taught_with, file):
    assert "reading (2)" in taught_with(RECORD, "policy", file.name).stderr
    assert "reading" not in taught_with(RECORD, "policy", file.name, "--fresh", "--quiet").stderr


def test_a_missing_data_file_is_named_before_anything_runs(taught_with, file, tmp_path):
    (tmp_path / "pairs.jsonl").unlink()
    done = taught_with(RECORD, "policy", file.name)
    assert done.returncode == 2
    assert "examples.path does not exist" in done.stderr
    assert not (tmp_path / "runs").exists()


def test_check_prints_its_report_and_fails_when_there_are_problems(taught_with, file):
    done = taught_with(RECORD, "check", file.name, "--set", "policy.alpha=7")
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("7.0 ")
    problems = RECORD.replace("problems = ()", "problems = ('one',)")
    assert taught_with(problems, "check", file.name).returncode == 2


def test_demo_tells_time_memory_and_where_the_report_is(taught_with, tmp_path, study):
    stages = (
        "from taught.study.load import study_from_dict\nfrom pathlib import Path\n"
        "def demo(run, *, prompts, examples, features, full, progress):\n"
        f"    study = study_from_dict({study.to_dict()!r}, Path('.'))\n"
        "    with run.stage('policy', study) as stage:\n"
        "        run.write_json('policy', [prompts, examples, features, full])\n"
        "    with run.stage('report', study) as stage:\n"
        "        run.write_text('report.html', 'x')\n"
        "import types, taught.report\n"
        "show = types.ModuleType('taught.report.show')\n"
        "show.show_run = lambda folder, item=None: f'{folder} shown'\n"
        "sys = __import__('sys'); sys.modules['taught.report.show'] = show\n"
    )
    done = taught_with(stages, "demo", "--prompts", "9", "--full", "--run", "here")
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[0] == "here shown"
    assert done.stdout.splitlines()[-1] == f"Report: {tmp_path / 'here' / 'report.html'}"
    assert re.search(r"policy \d\.\d s, report \d\.\d s, peak memory \d+\.\d GB", done.stderr)
    assert (tmp_path / "here" / "policy.json").read_text().split() == ["[", "9,", "48,", "40,", "true", "]"]


@pytest.mark.skipif(sys.platform == "win32", reason="POSIX pipes")
def test_a_reader_that_has_seen_enough_is_no_error(taught_with, file, tmp_path):
    long = RECORD.replace("problems = ()", "problems = ()\n    text = 'line\\n' * 200000").replace(
        "Text(f", "Text(self.text + f"
    )
    script = tmp_path / "run.py"
    script.write_text(
        f"import sys, types\nm = types.ModuleType('taught.stages')\nexec({long!r}, m.__dict__)\n"
        "sys.modules['taught.stages'] = m\nfrom taught.cli.app import main\nmain(['check', 'mine.yaml'])\n"
    )
    src = Path(__file__).parents[2] / "src"
    done = subprocess.run(
        ["bash", "-c", f"set -o pipefail; {sys.executable} run.py | head -1"],
        cwd=tmp_path,
        env=os.environ | {"PYTHONPATH": str(src)},
        capture_output=True,
        text=True,
    )
    assert done.stdout == "line\n"
    assert "Traceback" not in done.stderr
    assert "Exception ignored" not in done.stderr
    assert done.returncode == 0


def test_a_stopped_process_is_no_clean_exit(taught_with, file):
    """Exit codes come from real processes: one that is killed does not look finished."""
    kill = "import os\ndef policy(study, run, progress):\n    os.kill(os.getpid(), 9)"
    assert taught_with(kill, "policy", file.name).returncode == -signal.SIGKILL


# init


def test_init_writes_a_study_that_loads_to_the_defaults(taught, tmp_path):
    done = taught("init")
    assert done.returncode == 0
    assert "taught check study.yaml" in done.stdout
    assert load_study(tmp_path / "study.yaml") == Study().resolved(tmp_path)


def test_init_never_overwrites_without_force(taught, tmp_path):
    (tmp_path / "a.yaml").write_text("mine")
    done = taught("init", "a.yaml")
    assert done.returncode == 2
    assert "exists already" in done.stderr
    assert (tmp_path / "a.yaml").read_text() == "mine"
    assert taught("init", "a.yaml", "--force").returncode == 0
    assert load_study(tmp_path / "a.yaml").name == "my-study"


def test_init_into_a_folder(taught, tmp_path):
    (tmp_path / "new").mkdir()
    assert taught("init", "new").returncode == 0
    assert (tmp_path / "new" / "study.yaml").is_file()
    assert taught("init", "absent/a.yaml").returncode == 2


# show


def test_show_refuses_a_changed_file_and_says_what_is_unfinished(taught_with, taught, file, tmp_path):
    folder = tmp_path / "runs" / "my-study"
    assert taught_with(RECORD, "policy", file.name).returncode == 0
    manifest = (folder / "manifest.json").read_text()
    other = re.sub("sources [0-9a-f]{16}", "sources 0000000000000000", manifest)
    (folder / "manifest.json").write_text(other)
    assert "policy was made by another version of the code" in taught("show", folder).stderr
    (folder / "policy.json").write_text("{}")
    done = taught("show", "runs/my-study")
    assert done.returncode == 2
    assert "policy.json has changed since it was written" in done.stderr


# The stages for real, on a small model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    from tiny_study import write_tiny_study

    return write_tiny_study(tmp_path_factory.mktemp("tiny")).parent


def test_the_guard_against_the_network_bites(python):
    program = "import socket; socket.create_connection(('127.0.0.1', 9))"
    assert "network access attempted" in python("-c", program, network=False).stderr


def test_invariant_10_local_inputs_need_no_network_at_all(taught, tiny):
    """Every verb on local files, with sockets that raise: nothing is fetched, nothing phones home."""
    commands = [
        ["check", "study.yaml"],
        ["policy", "study.yaml", "-q"],
        ["attribute", "study.yaml", "-q"],
        ["curate", "runs/tiny"],
        ["clusters", "runs/tiny"],
        ["report", "runs/tiny"],
        ["show", "runs/tiny"],
        ["show", "runs/tiny", "z03"],
        ["query", "runs/tiny", "--top", "3"],
    ]
    for command in commands:
        done = taught(*command, cwd=tiny, network=False, HF_HUB_OFFLINE="0")
        assert done.returncode == 0, f"{command}: {done.stdout}{done.stderr}"
        assert "network access attempted" not in done.stdout + done.stderr
    assert (tiny / "runs" / "tiny" / "report.html").stat().st_size > 1000


def test_invariant_8_another_model_under_the_same_path_is_refused(taught, tmp_path):
    """The folder of the model keeps its name; its weights change."""
    from tiny_study import write_tiny_study

    write_tiny_study(tmp_path / "a")
    write_tiny_study(tmp_path / "b", seed=1)
    assert taught("policy", "a/study.yaml", "--run", "run", "-q").returncode == 0
    weights = "model/model.safetensors"
    (tmp_path / "a" / weights).write_bytes((tmp_path / "b" / weights).read_bytes())
    refused = taught("policy", "a/study.yaml", "--run", "run", "-q")
    assert refused.returncode == 2
    assert "model.id sha256" in refused.stderr


def test_invariant_10_no_pickle_and_no_remote_code_is_ever_asked_for():
    sources = {f: f.read_text() for f in (Path(__file__).parents[2] / "src").rglob("*.py")}
    for file, source in sources.items():
        for word in ("import pickle", "torch.load(", "trust_remote_code=True", "joblib", "yaml.load("):
            if word == "yaml.load(" and "_UniqueKeyLoader" in source:
                continue  # a SafeLoader, see test_yaml_that_would_run_code_is_refused
            assert word not in source, f"{file.name} says {word}"
