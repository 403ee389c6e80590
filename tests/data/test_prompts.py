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
    ("columns", "message"), [({"text": "nope"}, "no column 'nope'"), ({"prompt": "text"}, "unknown field")]
)
def test_given_columns_are_checked(save, columns: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_prompts(save(row("a", "One")), columns)


def test_no_rows_is_an_error(save) -> None:
    with pytest.raises(UserError, match="there are no prompts"):
        load_prompts(save())


def test_without_a_group_column_there_is_one_group() -> None:
    prompts = load_prompts([{"prompt": "One"}, {"prompt": "Two"}])
    assert prompts.groups == ("all",)
    assert prompts.ids[0] == load_prompts([{"text": "One"}]).ids[0]


def turns(*contents: str, last: str = "user") -> list[dict]:
    roles = ["user" if (len(contents) - i) % 2 else "assistant" for i in range(len(contents))]
    return [{"role": role, "content": content} for role, content in zip([*roles[:-1], last], contents, strict=True)]


@pytest.mark.parametrize("column", ["messages", "prompt", "conversations"])
def test_a_prompt_may_be_a_conversation_that_ends_with_the_user(column: str) -> None:
    (prompt,) = load_prompts([{"id": "a", column: turns("One", "Two", "Three")}])
    assert prompt.text == "Three"
    assert [m["role"] for m in prompt.messages] == ["user", "assistant", "user"]
    assert prompt.content == prompt.messages
    assert prompt.extended("!")[-1] == {"role": "user", "content": "Three!"}


def test_one_message_is_the_same_prompt_as_its_text() -> None:
    shared = [{"from": "human", "value": "One"}]
    assert load_prompts([{"messages": shared}]).prompts == load_prompts([{"prompt": "One"}]).prompts


def test_conversations_that_differ_before_the_last_turn_are_two_prompts() -> None:
    prompts = load_prompts([{"messages": turns("One", "Two", "Why?")}, {"messages": turns("Four", "Five", "Why?")}])
    assert len(set(prompts.ids)) == 2
    with pytest.raises(UserError, match="1 prompt texts occur more than once"):
        load_prompts([{"id": i, "messages": turns("One", "Two", "Why?")} for i in "ab"])


@pytest.mark.parametrize(
    ("given", "message"),
    [
        (turns("One", "Two", last="assistant"), "the last message of a is not the user's"),
        ([], "the last message of a is not the user's"),
        (["One"], "a message of a has no role or no text"),
        ([{"role": "user", "content": [{"type": "image"}]}], "a message of a has no role or no text"),
        ({"role": "user", "content": "One"}, "the text of a is not a text"),
    ],
)
def test_what_is_no_conversation_is_refused_by_id(given, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_prompts([{"id": "a", "prompt": given}])


def test_answers_and_options_are_read_as_they_are() -> None:
    rows = [{"prompt": "One?", "response": "Yes"}, {"prompt": "Two?", "response": 0}]
    assert [p.answer for p in load_prompts(rows)] == ["Yes", 0]
    rows = [{"prompt": "One?", "options": ["a", 2], "answer": 1}, {"prompt": "Two?", "options": '["a", "b"]'}]
    prompts = load_prompts(rows)
    assert [p.options for p in prompts] == [("a", "2"), ("a", "b")]
    assert [p.answer for p in prompts] == [1, ""]


def test_one_prompt_may_bring_several_answers_in_rows_of_their_own() -> None:
    prompts = load_prompts([{"prompt": "One?", "answer": "Yes"}, {"prompt": "One?", "answer": "No"}])
    assert len(set(prompts.ids)) == 2


@pytest.mark.parametrize("options", ["yes", {"text": ["a"]}, [["a"], "b"], "[a"])
def test_options_that_are_no_list_of_texts_are_refused_by_id(options) -> None:
    with pytest.raises(UserError, match="the options of a are not a list of texts"):
        load_prompts([{"id": "a", "prompt": "One?", "options": options}])


def test_rows_may_be_anything_that_yields_mappings() -> None:
    rows = [row("a", "One"), row("b", "Two")]
    prompts = load_prompts(rows)
    assert load_prompts(iter(rows)) == prompts
    assert prompts.sha256 != load_prompts(rows[:1]).sha256
    for other in ({"train": rows}, ["One", "Two"], 3):
        with pytest.raises(UserError, match="no rows can be read|not a mapping"):
            load_prompts(other)


@pytest.mark.parametrize(
    ("row", "roles", "last"),
    [
        ({"prompt": "a", "system": "s"}, ["system", "user"], "a"),
        ({"prompt": "a", "system_prompt": "s", "history": [["b", "c"]]}, ["system", "user", "assistant", "user"], "a"),
        ({"instruction": "a", "input": "b"}, ["user"], "a\nb"),
        ({"instruction": "a", "context": "b", "system": "s"}, ["system", "user"], "a\nb"),
        ({"messages": [{"role": "user", "content": "a"}], "system": "s"}, ["system", "user"], "a"),
        ({"prompt": "a", "system": None, "history": [], "tools": None, "weight": 1}, ["user"], "a"),
    ],
)
def test_what_stands_beside_a_prompt_is_part_of_it(row: dict, roles: list[str], last: str) -> None:
    (prompt,) = load_prompts([row])
    content = prompt.content
    turns = [{"role": "user", "content": content}] if isinstance(content, str) else list(content)
    assert [turn["role"] for turn in turns] == roles and turns[-1]["content"] == last == prompt.text


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "tools": [{"name": "f"}]}, "the column tools would change 1 prompts"),
        ({"prompt": "a", "image": "x.png"}, "the column image would change 1 prompts"),
        ({"question": "a", "context": "b"}, "has a context beside its question"),
        (
            {"messages": [{"role": "system", "content": "t"}, {"role": "user", "content": "a"}], "system": "s"},
            "two system",
        ),
    ],
)
def test_what_would_change_a_prompt_and_has_no_use_is_refused(row: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_prompts([row])


@pytest.mark.parametrize(
    ("messages", "message"),
    [
        ([], "the last message of"),
        ([{"role": "user", "content": "a"}, {"role": "user", "content": "b"}], "no order"),
        ([{"role": "critic", "content": "a"}, {"role": "user", "content": "b"}], "no order"),
        ([{"role": "user", "content": "a", "mood": "sad"}], "messages of 1 prompts have a mood"),
    ],
)
def test_messages_of_a_prompt_that_are_no_conversation_are_refused(messages: list, message: str) -> None:
    for beside in ({}, {"system": "s"}):
        with pytest.raises(UserError, match=message):
            load_prompts([{"messages": messages, **beside}])
