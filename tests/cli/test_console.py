"""Text from data cannot steer the terminal, wherever it is said."""

from __future__ import annotations

import io

import pyarrow as pa
import pytest
from rich.table import Table

from taught.cli import console
from taught.cli.app import run_command
from taught.errors import UserError, printable, refuse, shown
from taught.report.cells import write_csv

HOSTILE = {
    "colors": "\x1b[31mred\x1b[0m",
    "title": "\x1b]0;owned\x07",
    "link": "\x1b]8;;http://x\x1b\\\\here",
    "c1": "\x9b31m",
    "bell": "a\x07b",
    "return": "good\rbad",
    "backspace": "a\x08b",
    "bidi": "a\u202eb\u2066c",
    "line separator": "a\u2028b\u2029c",
    "surrogate": "a\ud800b",
    "nul": "a\x00b",
}


def harmless(text: str) -> bool:
    text.encode()
    return not set(text) & set("\x00\x07\x08\r\x1b\x9b\u202e\u2066\u2028\u2029")


@pytest.mark.parametrize("kind", HOSTILE)
def test_whatever_is_said_holds_no_control_character(capsys, kind):
    text = HOSTILE[kind]
    console.say(text)
    console.complain(text, text)
    table = Table(text)
    table.add_row(text)
    console.out().print(table)
    console.err().print(text)
    assert all(map(harmless, capsys.readouterr()))


@pytest.mark.parametrize("kind", HOSTILE)
def test_an_error_holds_none_and_no_line_that_it_does_not_begin_itself(kind):
    text = f"{HOSTILE[kind]}\n  fix:   rm -rf /"
    for value in (text, [text], {text: text}):
        message = str(UserError(text, value=value, rule=text, fix=text))
        assert harmless(message)
        assert [line.split()[0] for line in message.splitlines()[1:]] == ["value:", "rule:", "fix:"]
    with pytest.raises(UserError) as caught:
        refuse([text], "ids")
    assert harmless(str(caught.value)) and len(str(caught.value).splitlines()) == 2


@pytest.mark.parametrize("kind", HOSTILE)
def test_names_on_the_command_line_come_back_harmless(capfd, kind):
    for argv in (["run", HOSTILE[kind]], ["show", HOSTILE[kind]], ["run", "refusal-smollm2", "--set", HOSTILE[kind]]):
        assert run_command(argv) == 2
        assert all(map(harmless, capfd.readouterr()))


def test_a_value_is_shown_in_few_letters_however_large_it_is():
    deep: list[object] = [1]
    for _ in range(40):
        deep = [deep] * 9
    itself: dict[str, object] = {}
    itself["a"] = itself
    for value in (deep, itself, 10**5000, "x" * 10**7, ["y" * 10**6] * 1000, {1: 2**70000}, b"z" * 10**6, range(9)):
        assert len(shown(value)) <= 200
    assert shown({"b": 1, "a": [None, 2.5]}) == "{'b': 1, 'a': [None, 2.5]}"


def test_csv_is_exact_for_a_program_and_harmless_on_a_terminal():
    table, program, terminal = pa.table({"a\x1b": ["b\x1b[31m", None]}), io.StringIO(), io.StringIO()
    write_csv(table, program)
    assert program.getvalue() == 'a\x1b\nb\x1b[31m\n""\n'
    write_csv(table, terminal, printable)
    assert harmless(terminal.getvalue())


@pytest.mark.parametrize("name", ["a" * 5000, "a\x00b", "a/" * 2000, "b\x1b[31m", "\ud800"])
@pytest.mark.parametrize(
    "argv", [["show"], ["report"], ["curate"], ["init"], ["check"], ["run", "refusal-smollm2", "--run"]]
)
def test_a_name_that_no_file_can_have_is_the_users_mistake(argv, name):
    assert run_command([*argv, name]) == 2


@pytest.mark.parametrize("top", ["0", "-5", "9" * 30, "x"])
def test_a_number_of_rows_is_one(tmp_path, top):
    assert run_command(["show", str(tmp_path), "--top", top]) == 2
