"""What pyproject.toml asks for, what docs/threats.md says of it, and what the code imports."""

from __future__ import annotations

import ast
import importlib.metadata as metadata
import re
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
PAGE = runpy.run_path(str(ROOT / "docs/dependencies.py"))
DECLARED, FACTS = PAGE["declared"](), PAGE["DEPENDENCIES"]
# Read by one method each, where they are installed: their errors say so.
OPTIONAL = {"pandas"}
MODULES = {"huggingface_hub": "huggingface-hub", "sae_lens": "sae-lens", "yaml": "pyyaml"}


def test_every_dependency_is_described_and_no_other() -> None:
    assert FACTS.keys() == DECLARED.keys()


def test_the_table_of_the_documentation_is_that_of_pyproject() -> None:  # by docs/tables.py
    page = (ROOT / "docs/threats.md").read_text(encoding="utf-8")
    found = re.search(r"<!-- dependencies:[^\n]*\n(.*?)\n<!-- /dependencies -->", page, re.DOTALL)
    assert found is not None and found[1] == PAGE["dependency_table"]()


@pytest.mark.parametrize("name", sorted(FACTS))
def test_the_licence_is_that_of_the_installed_package(name: str) -> None:
    try:
        known = metadata.metadata(name)
    except metadata.PackageNotFoundError:
        pytest.skip(f"{name} is not installed")
    said = [*(known.get_all(key) or [] for key in ("License-Expression", "License", "Classifier"))]
    text = " ".join(line for lines in said for line in lines)
    assert FACTS[name].licence.split("-")[0] in text


def imported() -> Iterator[str]:
    """Top-level modules that the package imports, lazily or not, or for types alone."""
    for file in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text(encoding="utf-8"))):
            if isinstance(node, ast.Import):
                yield from (name.name.split(".")[0] for name in node.names)
            elif isinstance(node, ast.ImportFrom) and node.module and not node.level:
                yield node.module.split(".")[0]


def test_whatever_is_imported_is_asked_for() -> None:
    others = set(imported()) - sys.stdlib_module_names - {"taught"} - OPTIONAL
    assert {MODULES.get(name, name) for name in others} <= DECLARED.keys()


def test_every_installation_gets_only_what_is_imported() -> None:
    core = {name for name, (extra, _) in DECLARED.items() if not extra}
    assert core <= {MODULES.get(name, name) for name in imported()}
