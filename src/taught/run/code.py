"""Which sources a result comes from: a module and everything of this package that it imports."""

from __future__ import annotations

import ast
import hashlib
import importlib.util
from collections.abc import Iterable, Iterator
from functools import cache
from pathlib import Path

import taught

ROOT = Path(taught.__file__).parent
# What shows results, keeps them or reads the study computes none of the numbers.
_APART = ("cli", "environment", "errors", "presets", "progress", "report", "run", "stages", "study")


def code_version(modules: Iterable[str] | None = None) -> str:
    """The version of the package and the digest of the sources of some modules, or of all."""
    return f"taught {taught.__version__}, sources {code_digest(modules)}"


def code_digest(modules: Iterable[str] | None = None) -> str:
    """First 16 hex digits of a digest over the sources that some modules lead to.

    Imports are followed within this package, also those inside functions. A module of another
    package (a plugin) stands for itself alone. None: the whole package, without what only shows.
    """
    if modules is None:
        found = {file for file in ROOT.rglob("*.py") if file.relative_to(ROOT).parts[0] not in ("cli", "report")}
    else:
        found = {file for name in _reached(frozenset(modules)) if (file := _file(name)) is not None}
    digest = hashlib.sha256()
    for file in sorted(found):
        name = file.relative_to(ROOT).as_posix() if file.is_relative_to(ROOT) else file.name
        digest.update(name.encode() + b"\0" + _content(file) + b"\0")
    return digest.hexdigest()[:16]


@cache
def _reached(modules: frozenset[str]) -> frozenset[str]:
    found, new = set(modules), set(modules)
    while new:
        new = {name for module in new for name in _imports(module)} - found
        found |= new
    return frozenset(found)


@cache
def _imports(module: str) -> frozenset[str]:
    """Modules of this package that a module imports and that compute: of the stages not their list."""
    file = _file(module)
    if file is None or not module.startswith("taught."):
        return frozenset()
    names = {name for name in _names(ast.parse(_content(file))) if _file(name) is not None}
    return frozenset(n for n in names if n.split(".")[1] not in _APART or n.startswith("taught.stages."))


def _names(node: ast.AST) -> Iterator[str]:
    for child in ast.iter_child_nodes(node):
        if isinstance(child, ast.If) and isinstance(child.test, ast.Name) and child.test.id == "TYPE_CHECKING":
            continue
        if isinstance(child, ast.Import):
            yield from (alias.name for alias in child.names if alias.name.startswith("taught."))
        elif isinstance(child, ast.ImportFrom) and (child.module or "").startswith("taught."):
            yield str(child.module)
            yield from (f"{child.module}.{alias.name}" for alias in child.names)
        yield from _names(child)


@cache
def _file(module: str) -> Path | None:
    if module.startswith("taught."):
        path = ROOT.joinpath(*module.split(".")[1:])
        return next((file for file in (path.with_suffix(".py"), path / "__init__.py") if file.is_file()), None)
    spec = importlib.util.find_spec(module)
    return Path(spec.origin) if spec is not None and spec.origin and Path(spec.origin).is_file() else None


@cache
def _content(file: Path) -> bytes:
    return file.read_bytes()
