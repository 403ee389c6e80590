"""Every command that a message recommends is one that the command line takes."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

from taught.cli.app import app, spelled_out

SRC = Path(__file__).parents[2] / "src" / "taught"
# Words that stand for what the reader puts there.
VALUES = {"RULE": "paper", "KEY=VALUE": "policy.alpha=1", "STAGE": "policy", "COMMAND": "run", "...": ""}
ENDS = re.compile(r"`|\n|; |, | \(| makes| lists| writes| computes| with another| cannot|\.$|\. |: |\u201d|\"")
# What is said about a command without telling anyone to type it.
NOT_TYPED = {"taught demo --run", "taught concept 1", "taught curate kept"}  # a format, and a sentence


def texts(tree: ast.AST) -> Iterator[str]:
    """Strings of a module, with what is filled in at run time as a word; no docstrings."""
    docs = {id(node.body[0].value) for node in ast.walk(tree) if _documented(node)}
    inside = {id(part) for node in ast.walk(tree) if isinstance(node, ast.JoinedStr) for part in node.values}
    for node in ast.walk(tree):
        if isinstance(node, ast.JoinedStr):
            parts = [part.value if isinstance(part, ast.Constant) else _filled(part) for part in node.values]
            yield "".join(map(str, parts))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str) and id(node) not in docs | inside:
            yield node.value


def _documented(node: ast.AST) -> bool:
    body = getattr(node, "body", None)
    first = body[0] if isinstance(body, list) and body else None
    return isinstance(first, ast.Expr) and isinstance(first.value, ast.Constant) and isinstance(first.value.value, str)


def _filled(part: ast.AST) -> str:
    """A stage where a stage is filled in, else a word."""
    source = ast.unparse(part)
    return "curate" if source.strip("{}f'") == "stage" else "WORD"


def texts_with(part: str) -> Iterator[tuple[Path, str]]:
    """Strings of the modules in which something stands: parsing all of them was a tenth of collecting the tests."""
    for file in sorted(SRC.rglob("*.py")):
        content = file.read_text(encoding="utf-8")
        if part in content:
            yield from ((file, text) for text in texts(ast.parse(content)))


def commands() -> list[tuple[str, str]]:
    found = {}
    for file, text in texts_with("taught "):
        for match in re.finditer(r"(?<![\w/.@:'-])taught (?=[a-z-])[^\n]*", text):
            command = ENDS.split(match[0])[0].strip().rstrip(".,;:")
            if command.split()[1] in {*app, *FORMER} and command not in NOT_TYPED:
                found.setdefault(command, file.relative_to(SRC).as_posix())
    return sorted((file, command) for command, file in found.items())


FORMER = (
    "policy",
    "attribute",
    "compare",
    "clamp",
    "clusters",
    "sketch",
    "ask",
    "concept",
    "concept-influence",
    "query",
)


RECOMMENDED = commands()


def test_there_are_some():
    assert len(RECOMMENDED) > 10


@pytest.mark.parametrize(("file", "command"), RECOMMENDED, ids=lambda value: value.replace(" ", "_"))
def test_a_recommended_command_is_taken_by_the_command_line(file, command):
    words = [VALUES.get(word, word) for word in re.findall(r"'[^']*'|\S+", command)[1:]]
    app.parse_args(spelled_out([word.strip("'") for word in words if word]), exit_on_error=False, print_error=False)


def test_a_flag_that_is_named_is_one_of_the_command_line_or_of_pip():
    flags = {"--help", "--version"}
    for name in app:
        if not name.startswith("-"):
            flags.update(*(argument.names for argument in app[name].assemble_argument_collection()))
    named = {(file, flag) for file, text in texts_with("--") for flag in re.findall(r"(?<![\w-])--[a-z][a-z-]*", text)}
    others = {"--upgrade", "--no-deps", "--force-reinstall"}
    assert {"--set", "--tuned"} <= flags & {flag for _, flag in named}
    assert [(file.name, flag) for file, flag in sorted(named) if flag not in flags | others] == []
