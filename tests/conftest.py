"""Shared by all tests: few threads, no network unless a test says so, real command runs."""

from __future__ import annotations

import gc
import json
import os
import subprocess
import sys
from pathlib import Path

# Before numpy and torch are imported: they read these once.
_threads = os.environ.setdefault("OMP_NUM_THREADS", "2")
for _name in ("OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS", "RAYON_NUM_THREADS"):
    os.environ.setdefault(_name, _threads)
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")

os.fsync = lambda _handle: None  # no test needs its files after a power cut; syncing took a tenth of a run

import pytest
from hypothesis import settings

from taught.study.load import study_from_dict
from taught.study.schema import Study

settings.register_profile("taught", deadline=None, max_examples=50, derandomize=True)
settings.load_profile("taught")

ROOT = Path(__file__).parents[1]
SRC = ROOT / "src"

# Loaded by every Python that finds it on its path: any attempt to reach the network is an error.
NO_NETWORK = """
import socket
def _refused(*args, **kwargs):
    raise RuntimeError(f"network access attempted: {args!r}")
socket.socket.connect = socket.socket.connect_ex = _refused
socket.getaddrinfo = socket.create_connection = _refused
"""


def pytest_collection_finish() -> None:
    """Modules stay: what collects garbage by hand (a trainer does) need not go through them each time."""
    gc.freeze()


@pytest.fixture(autouse=True)
def threads():
    """A test that changes torch's threads does so for itself: with more than cores, the next ones take five times as long."""
    yield
    if (torch := sys.modules.get("torch")) is not None and torch.get_num_threads() != int(_threads):
        torch.set_num_threads(int(_threads))


@pytest.fixture
def study(tmp_path: Path) -> Study:
    """A study whose local files exist (as stubs: enough for whatever only hashes them)."""
    (tmp_path / "sae").mkdir()
    (tmp_path / "sae" / "cfg.json").write_text("{}")
    (tmp_path / "sae" / "sae_weights.safetensors").write_bytes(b"weights")
    (tmp_path / "prompts.jsonl").write_text('{"prompt": "a"}\n')
    (tmp_path / "pairs.jsonl").write_text('{"prompt": "b", "response": "c"}\n')
    (tmp_path / "labels.json").write_text("{}")
    given = {"sae": {"path": "./sae"}, "examples": {"path": "pairs.jsonl"}, "features": {"labels": "labels.json"}}
    groups = {"positive_group": "harmful", "negative_group": "harmless"}
    return study_from_dict({**given, "prompts": groups}, tmp_path)


@pytest.fixture
def python(tmp_path: Path):
    """Run Python in a subprocess with this checkout's package; returns the finished process."""

    def run(*args: str, network: bool = True, cwd: Path = tmp_path, **env: str):
        paths = [str(SRC)]
        if not network:
            (tmp_path / "no-network").mkdir(exist_ok=True)
            (tmp_path / "no-network" / "sitecustomize.py").write_text(NO_NETWORK)
            paths.insert(0, str(tmp_path / "no-network"))
        env = os.environ | {"PYTHONPATH": os.pathsep.join(paths), "COLUMNS": "100"} | env
        return subprocess.run([sys.executable, *args], cwd=cwd, env=env, capture_output=True, text=True, timeout=240)

    return run


@pytest.fixture
def taught(python):
    """Run the command line in a subprocess: ``taught("policy", "study.yaml")``."""

    def run(*args: str, **options):
        return python("-m", "taught", *args, **options)

    return run


@pytest.fixture
def taught_here(capsys):
    """The same in this process, which saves the seconds in which torch is imported."""
    from taught.cli.app import run_command

    def run(*args: str) -> subprocess.CompletedProcess[str]:
        capsys.readouterr()
        code = run_command(args)
        out, err = capsys.readouterr()
        return subprocess.CompletedProcess(args, code, out, err)

    return run


@pytest.fixture
def taught_with(python):
    """Run the command line with stand-ins for stages: ``taught_with(SOURCE, "run", ...)``; no model is loaded."""

    def run(source: str, *args: str, **options):
        program = (
            "import sys, types, json\n"
            "module = types.ModuleType('stand-ins')\n"
            f"exec({source!r}, module.__dict__)\n"
            "for name in ('readings', 'attribute'):\n"
            "    sys.modules[f'taught.stages.{name}'] = module\n"
            "import taught.cli.commands as commands\n"
            "commands._show = lambda run, item: None\n"
            "sys.argv[1:] = json.loads(sys.argv[1])\n"
            "from taught.cli.app import main\n"
            "main()\n"
        )
        return python("-c", program, json.dumps(args), **options)

    return run
