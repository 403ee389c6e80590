"""Fine-tuning examples: formats, ids, checks, messages."""

from __future__ import annotations

import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from taught.data.examples import Record, content_id, load_examples
from taught.data.tables import write_jsonl
from taught.errors import UserError

SYSTEM = {"role": "system", "content": "Be kind."}


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str) -> dict:
    return {"role": "assistant", "content": text}


@pytest.fixture
def load(tmp_path: Path):
    """Write rows, then load them as examples."""

    def write_and_load(*rows: dict, columns: dict | None = None, **options):
        write_jsonl(tmp_path / "pairs.jsonl", rows)
        return load_examples(tmp_path / "pairs.jsonl", columns=columns, **options)

    return write_and_load


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "Hi?", "response": "Ho."},
        {"instruction": "Hi?", "completion": "Ho."},
        {"prompt": [user("Hi?")], "completion": [assistant("Ho.")]},
        {"messages": [user("Hi?"), assistant("Ho.")]},
        {"conversations": [{"from": "human", "value": "Hi?"}, {"from": "gpt", "value": "Ho."}]},
    ],
)
def test_every_spelling_of_an_example_is_the_same_example(load, row: dict) -> None:
    (example,) = load(row)
    assert (example.prompt, example.response) == ("Hi?", "Ho.")
    assert example.messages == (user("Hi?"),)
    assert example.id == content_id([user("Hi?")], "Ho.")


def test_several_turns_stay_messages(load) -> None:
    turns = [SYSTEM, user("One"), assistant("Two"), user("Three"), assistant("Four")]
    (example,) = load({"id": "m", "messages": turns})
    assert example.messages == tuple(turns[:-1])
    assert (example.prompt, example.response) == ("Three", "Four")
    assert example.user_texts == ("One", "Three")


def test_a_file_may_mix_messages_and_texts(load) -> None:
    examples = load({"messages": [user("a"), assistant("b")]}, {"prompt": "c", "response": "d"})
    assert [(p.prompt, p.response) for p in examples] == [("a", "b"), ("c", "d")]


def test_further_columns_become_flags(load) -> None:
    (example,) = load({"id": 7, "prompt": "a", "response": "b", "label": "x", "planted": True})
    assert example == Record("7", "a", "b", "x", flags={"planted": True})
    assert example.flags == {"planted": True}


def test_ids_follow_the_content() -> None:
    one = content_id([user("a")], "b")
    assert re.fullmatch(r"sha1:[0-9a-f]{12}", one)
    others = [content_id([user("ab")], ""), content_id([user("b")], "a"), content_id([SYSTEM, user("a")], "b")]
    assert len({one, *others}) == 4


@given(a=st.text(), b=st.text(), c=st.text(), d=st.text())
def test_different_examples_have_different_ids(a: str, b: str, c: str, d: str) -> None:
    assert (content_id([user(a)], b) == content_id([user(c)], d)) == ((a, b) == (c, d))


@pytest.mark.parametrize(
    ("rows", "message", "ids"),
    [
        ([{"id": "a", "prompt": " ", "response": "b"}], "1 examples have an empty prompt", "a"),
        ([{"id": "a", "prompt": "a", "response": ""}], "1 examples have an empty response", "a"),
        ([{"id": "a", "prompt": "a", "response": None}], "1 examples have an empty response", "a"),
        ([{"id": "a", "prompt": "a", "response": "b"}] * 2, "1 example ids are used more", "a"),
        ([{"prompt": "a", "response": "b"}] * 2, "1 example ids are used more", content_id([user("a")], "b")),
    ],
)
def test_bad_examples_are_named(load, rows: list[dict], message: str, ids: str) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load(*rows)
    assert caught.value.value == ids


@pytest.mark.parametrize(
    "turns",
    [
        [user("a")],
        [user("a"), assistant("b"), user("c")],
        [assistant("b")],
        [SYSTEM, assistant("b")],
        [user("a"), user("b"), assistant("c")],
        [user("a"), SYSTEM, assistant("c")],
        [],
    ],
)
def test_messages_must_end_in_one_answer(load, turns: list[dict]) -> None:
    with pytest.raises(UserError, match="the messages of m do not end in one answer"):
        load({"id": "m", "messages": turns})


def test_a_message_without_text_is_shown(load) -> None:
    parts = {"role": "user", "content": [{"type": "image"}]}
    with pytest.raises(UserError, match="a message of row 1 has no role or no text"):
        load({"messages": [parts, assistant("b")]})


def test_missing_columns_are_explained(load) -> None:
    with pytest.raises(UserError, match="neither messages nor a prompt and a response") as caught:
        load({"prompt": "a", "text": "b"})
    assert "columns: prompt, text" in str(caught.value)
    assert [p.response for p in load({"prompt": "a", "text": "b"}, columns={"response": "text"})] == ["b"]


def test_a_label_has_one_spelling() -> None:
    rows = [{"prompt": i, "response": "b", "label": label} for i, label in (("a", "harmful"), ("c", "Harmful"))]
    with pytest.raises(UserError, match="a label is written in several ways"):
        load_examples(rows)
