"""Evaluation prompts: columns, checks, messages."""

from __future__ import annotations

import hashlib
from pathlib import Path

import pytest

from taught.data.prompts import Prompt, load_prompts
from taught.data.tables import write_jsonl
from taught.errors import UserError


@pytest.fixture
def save(tmp_path: Path):
    """Write rows and return the file."""

    def write(*rows: dict) -> Path:
        write_jsonl(tmp_path / "prompts.jsonl", rows)
        return tmp_path / "prompts.jsonl"

    return write


def row(id: str, text: str, group: str = "harmful", **more: str) -> dict:
    return {"id": id, "text": text, "group": group, **more}


def test_prompts_keep_their_order_and_fields(save) -> None:
    path = save(row("b", "Two", category="c", source="s", licence="MIT"), row("a", "One", "harmless"))
    prompts = load_prompts(path)
    assert prompts.ids == ("b", "a")
    assert prompts.groups == ("harmful", "harmless")
    assert prompts.prompts[0] == Prompt("b", "Two", "harmful", "c", "s", "MIT")
    assert prompts.sha256 == hashlib.sha256(path.read_bytes()).hexdigest()


def test_columns_are_found_by_their_usual_names_or_given(save) -> None:
    path = save({"goal": "Do it", "kind": "bad", "license": "MIT"})
    prompts = load_prompts(path, {"group": "kind"})
    assert prompts.prompts == (Prompt("sha1:9cab72d83726", "Do it", "bad", "", "", "MIT"),)
    assert prompts.columns == {"group": "kind", "text": "goal", "licence": "license"}


@pytest.mark.parametrize(
    ("rows", "message", "ids"),
    [
        ([row("a", "One"), row("a", "Two"), row("b", "Three")], "1 prompt ids are used more", "a"),
        ([row("a", "One?"), row("b", "  one ")], "1 prompt texts occur more than once", "a = b"),
        ([row("a", "One"), row("b", " ")], "1 prompts have an empty text", "b"),
        ([row("a", "One"), row("b", "Two", "")], "1 prompts have an empty group", "b"),
        ([row("a", "One"), {"id": "b", "group": "harmful"}], "1 prompts have an empty text", "b"),
    ],
)
def test_bad_prompts_are_named(save, rows: list[dict], message: str, ids: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load_prompts(save(*rows))
    assert caught.value.value == ids


def test_a_missing_text_column_says_what_there_is(save) -> None:
    with pytest.raises(UserError, match="no text column") as caught:
        load_prompts(save({"id": "a", "words": "One", "risk": "high"}))
    assert "columns: id, words, risk" in str(caught.value)
    assert "fix:" in str(caught.value)


def test_many_offending_ids_are_counted(save) -> None:
    with pytest.raises(UserError, match="20 prompts have an empty text") as caught:
        load_prompts(save(*(row(f"p{i}", "") for i in range(20))))
    assert "p7 and 12 more" in str(caught.value)


@pytest.mark.parametrize(
    ("columns", "message"), [({"text": "nope"}, "no column 'nope'"), ({"prompt": "text"}, "Unknown field")]
)
def test_given_columns_are_checked(save, columns: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_prompts(save(row("a", "One")), columns)


def test_no_rows_is_an_error(save) -> None:
    with pytest.raises(UserError, match="there are no prompts"):
        load_prompts(save())
