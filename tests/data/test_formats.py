"""Every format of training data: what is read, and which tokens the loss is on."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from transformers import AutoTokenizer

from taught.data.chat import ChatFormat
from taught.data.examples import ExampleSet, load_examples
from taught.data.formats import PAIR_COLUMNS, PREFERENCE_COLUMNS
from taught.data.overlap import find_overlap
from taught.data.prompts import Prompt, PromptSet
from taught.errors import UserError
from tiny_study import CHATML, write_tiny_study

SYSTEM = {"role": "system", "content": "Be kind."}
END = "<|im_end|>"
FOUR = [
    ("user", "One"),
    ("assistant", "Two"),
    ("user", "Three"),
    ("assistant", "Four"),
    ("user", "F"),
    ("assistant", "S"),
]
# As Qwen3's: the answer to the last question is preceded by its thoughts, empty or not; tools are described.
THINKING = (
    "{% if tools %}<|im_start|>system\n{% for t in tools %}{{ t | tojson }}{% endfor %}<|im_end|>\n{% endif %}"
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n"
    "{% if m['role'] == 'assistant' and loop.last %}<think>\n{{ m.reasoning_content or '' }}\n</think>\n\n{% endif %}"
    "{{ m['content'] }}{% for c in m.tool_calls or [] %}<call>{{ c | tojson }}</call>{% endfor %}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
# As Llama-2's: the answer follows a space, and its end of turn is followed by the next beginning.
INST = (
    "{% for m in messages %}{% if m['role'] == 'user' %}<|im_start|>[INST] {{ m['content'] }} [/INST]"
    "{% else %} {{ m['content'] }} <|im_end|>{% endif %}{% endfor %}"
)


def user(text: str) -> dict:
    return {"role": "user", "content": text}


def assistant(text: str, **more: object) -> dict:
    return {"role": "assistant", "content": text, **more}


def turns(**marks: dict[int, object]) -> list[dict]:
    """Six turns, with marks by key and place."""
    messages = [{"role": role, "content": content} for role, content in FOUR]
    for key, values in marks.items():
        for place, value in values.items():
            messages[place][key] = value
    return messages


@pytest.fixture(scope="module")
def tokenizer(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tiny")
    write_tiny_study(folder)
    return AutoTokenizer.from_pretrained(folder / "model")


@pytest.fixture
def scored(tokenizer):
    """The whole rendering of a row that is an example, and the texts that the loss is on."""

    def read(row: dict, template: str = CHATML, **options) -> tuple[str, list[str]]:
        (record,) = load_examples([row], **options)
        encoded = ChatFormat(tokenizer, template).encode_example(record, 1000)
        assert not encoded.truncated
        runs: list[list[int]] = []
        for place in encoded.scored:
            if not runs or place != runs[-1][-1] + 1:
                runs.append([])
            runs[-1].append(place)
        parts = [tokenizer.decode([encoded.input_ids[place] for place in run]) for run in runs]
        return tokenizer.decode(encoded.input_ids), parts

    return read


def rendered(*messages: dict) -> str:
    text = "".join(f"<|im_start|>{m['role']}\n{m['content']}<|im_end|>\n" for m in messages)
    return text.removesuffix("\n")


@pytest.mark.parametrize(
    ("row", "before"),
    [
        ({"prompt": "Hi?", "response": "Ho."}, [user("Hi?")]),
        ({"prompt": "Hi?", "completion": "Ho."}, [user("Hi?")]),
        ({"question": "Hi?", "answer": "Ho."}, [user("Hi?")]),
        ({"input": "Hi?", "output": "Ho."}, [user("Hi?")]),
        ({"prompt": [SYSTEM, user("Hi?")], "completion": [assistant("Ho.")]}, [SYSTEM, user("Hi?")]),
        ({"messages": [SYSTEM, user("Hi?"), assistant("Ho.")]}, [SYSTEM, user("Hi?")]),
        ({"conversations": [{"from": "human", "value": "Hi?"}, {"from": "gpt", "value": "Ho."}]}, [user("Hi?")]),
        (
            {
                "system": "Be kind.",
                "conversations": [{"from": "human", "value": "Hi?"}, {"from": "gpt", "value": "Ho."}],
            },
            [SYSTEM, user("Hi?")],
        ),
        ({"instruction": "Add", "input": "", "output": "Ho."}, [user("Add")]),
        ({"instruction": "Add", "input": "1 1", "output": "Ho."}, [user("Add\n1 1")]),
        ({"instruction": "A 1", "input": "A", "output": "Ho."}, [user("A 1\nA")]),
        ({"instruction": "Say", "context": "Text.", "response": "Ho.", "category": "qa"}, [user("Say\nText.")]),
        (
            {"system": "Be kind.", "history": [["a", "b"]], "instruction": "Add", "input": "1", "output": "Ho."},
            [SYSTEM, user("a"), assistant("b"), user("Add\n1")],
        ),
        ({"messages": [user("Hi?"), assistant("Ho.")], "prompt": "Hi?", "prompt_id": "7"}, [user("Hi?")]),
        ({"messages": [SYSTEM, user("Hi?"), assistant("Ho.")], "system": "Be kind."}, [SYSTEM, user("Hi?")]),
        ({"messages": [{**user("Hi?"), "weight": None, "id": "u1"}, assistant("Ho.", tool_calls=[])]}, [user("Hi?")]),
        (
            {"prompt": "Hi?", "response": "Ho.", "tools": "[]", "history": [], "weight": 1.0, "train": True},
            [user("Hi?")],
        ),
    ],
)
def test_a_format_is_read_as_its_conversation_and_scored_at_the_response(scored, row, before) -> None:
    (record,) = load_examples([row])
    assert record.messages == tuple(before) and record.response == "Ho."
    assert scored(row) == (rendered(*before, assistant("Ho.")), ["Ho." + END])


@pytest.mark.parametrize("kind", ["jsonl", "parquet", "csv", "folder", "memory"])
def test_a_source_of_any_kind_holds_the_same_examples(tmp_path: Path, kind: str) -> None:
    rows = [
        {"id": "a", "instruction": "Add", "input": "1 1", "output": "2", "label": "x"},
        {"id": "b", "instruction": "Say", "input": "", "output": "No.", "label": "y"},
    ]
    path = tmp_path / f"rows.{kind}"
    if kind == "jsonl":
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    elif kind == "csv":
        path.write_text("id,instruction,input,output,label\na,Add,1 1,2,x\nb,Say,,No.,y\n")
    elif kind == "parquet":
        pq.write_table(pa.Table.from_pylist(rows), path)
    elif kind == "folder":
        path.mkdir()
        table = pa.Table.from_pylist(rows)
        with pa.OSFile(str(path / "data.arrow"), "wb") as sink, pa.ipc.new_stream(sink, table.schema) as writer:
            writer.write_table(table)
        (path / "state.json").write_text(json.dumps({"_data_files": [{"filename": "data.arrow"}]}))
    found = load_examples(rows if kind == "memory" else path)
    assert found.examples == load_examples(iter(rows)).examples
    assert [r.prompt for r in found] == ["Add\n1 1", "Say"] and [r.label for r in found] == ["x", "y"]
    assert found.path == (None if kind == "memory" else path)
    assert found.columns["context"] == "input"


def test_rows_in_memory_have_a_digest_of_their_content() -> None:
    row = {"prompt": "a", "response": "b", "features": [1]}
    one = load_examples([row]).sha256
    assert one == load_examples([dict(reversed(row.items()))]).sha256
    others = [{**row, "response": "c"}, {**row, "features": [2]}, {**row, "label": "x"}]
    assert len({one, *(load_examples([other]).sha256 for other in others)}) == 4


def test_a_parquet_file_of_messages_keeps_the_weights_that_are_there(tmp_path: Path) -> None:
    marked = turns(weight={1: 0})
    pq.write_table(
        pa.Table.from_pylist([{"messages": marked}, {"messages": marked[:2] + turns()[2:4]}]), tmp_path / "a.parquet"
    )
    (first, second) = load_examples(tmp_path / "a.parquet")
    assert first.counted == (3,) and first.response == "S"
    assert second.counted == () and second.response == "Four"


# Which answers count


@pytest.mark.parametrize(
    ("marks", "which", "expected"),
    [
        ({}, "last", ["S"]),
        ({}, "all", ["Two", "Four", "S"]),
        ({"weight": {1: 0}}, "last", ["Four", "S"]),
        ({"weight": {1: 1, 3: 0, 5: 0}}, "last", ["Two"]),
        ({"weight": {1: 1, 3: 0}}, "all", ["Two", "S"]),
        ({"train": {1: False, 3: True, 5: False}}, "last", ["Four"]),
        ({"train": {0: False, 2: False}}, "last", ["S"]),
        ({"training": {1: True, 5: False}}, "all", ["Two", "Four"]),
    ],
)
def test_answers_that_count_are_scored_with_the_end_of_their_turn(scored, marks, which, expected) -> None:
    whole, parts = scored({"messages": turns(**marks)}, turns=which)
    assert parts == [text + END for text in expected]
    # What follows the last answer that counts has no part in the loss.
    assert whole == rendered(*turns()).split(expected[-1] + END)[0] + expected[-1] + END


def test_each_answer_is_found_in_its_place_in_the_rendering(scored) -> None:
    same = [user("a"), assistant("a"), user("a"), assistant("a")]
    assert scored({"messages": same}, turns="all") == (rendered(*same), ["a" + END] * 2)


@pytest.mark.parametrize(
    ("marks", "message"),
    [
        ({"weight": {1: 0, 3: 0, 5: 0}}, "no answer of m counts"),
        ({"weight": {1: 0.5}}, "a weight that is neither 0 nor 1"),
        ({"weight": {1: float("nan")}}, "a weight that is neither 0 nor 1"),
        ({"train": {1: "yes"}}, "a weight that is neither 0 nor 1"),
        ({"train": {1: True}, "weight": {1: 0}}, "a weight that is neither 0 nor 1"),
        ({"weight": {0: 1}}, "a turn of m that is no answer is marked to count"),
        ({"content": {1: " "}, "weight": {1: 1}}, "an answer of m that counts is empty"),
    ],
)
def test_marks_that_say_nothing_clear_are_refused(marks, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_examples([{"id": "m", "messages": turns(**marks)}])


def test_a_limit_cuts_the_answers_behind_it(tokenizer) -> None:
    (record,) = load_examples([{"messages": turns()}], turns="all")
    chat = ChatFormat(tokenizer)
    whole = chat.encode_example(record, 1000)
    first = [place for place in whole.scored if place < whole.scored[4]]
    assert tokenizer.decode([whole.input_ids[place] for place in first]) == "Two" + END
    cut = chat.encode_example(record, whole.scored[4])
    assert cut.truncated and list(cut.scored) == first


def test_the_loss_is_the_mean_over_the_tokens_that_count(tokenizer) -> None:
    (record,) = load_examples([{"messages": turns()}], turns="all")
    encoded = ChatFormat(tokenizer).encode_example(record, 1000)
    example = encoded.example()
    assert [place for _, place in example.scored] == list(encoded.scored)
    assert {w for w in example.weights[0] if w} == {1 / encoded.n_scored}


# What templates write around an answer


def test_an_empty_block_of_thoughts_leads_to_the_answer_and_is_not_scored(scored) -> None:
    whole, parts = scored({"prompt": "Hi?", "response": "Ho."}, THINKING)
    assert whole.endswith("<think>\n\n</think>\n\nHo." + END) and parts == ["Ho." + END]


def test_thoughts_of_the_answer_are_scored_with_it(scored) -> None:
    row = {"messages": [user("Hi?"), assistant("Ho.", reasoning_content="A greeting")]}
    assert scored(row, THINKING)[1] == ["A greeting\n</think>\n\nHo." + END]


def test_a_space_that_the_template_writes_before_an_answer_is_not_scored_alone(scored) -> None:
    assert scored({"messages": turns()}, INST, turns="all")[1] == [f"{text} {END}" for text in ("Two", "Four", "S")]


def test_tools_and_their_calls_go_through_the_template(scored) -> None:
    call = {"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}
    messages = [user("Hi?"), assistant(None, tool_calls=[call]), {"role": "tool", "content": "1"}, assistant("Ho.")]
    row = {"messages": messages, "tools": json.dumps([{"name": "f"}])}
    whole, parts = scored(row, THINKING)
    assert '{"name": "f"}' in whole and f"<call>{json.dumps(call)}</call>" in whole and parts == ["Ho." + END]


@pytest.mark.parametrize(
    ("row", "key"),
    [
        ({"prompt": "Hi?", "response": "Ho.", "tools": [{"name": "f"}]}, "tools"),
        ({"messages": [user("Hi?"), assistant("Ho.", reasoning_content="So")]}, "reasoning_content"),
        ({"messages": [user("Hi?"), assistant("Ho.", thinking="So")]}, "thinking"),
        ({"messages": [{**user("Hi?"), "name": "Ann"}, assistant("Ho.")]}, "name"),
        (
            {
                "messages": [
                    user("a"),
                    assistant("", tool_calls=[{"f": 1}]),
                    {"role": "tool", "content": "1"},
                    assistant("b"),
                ]
            },
            "tool_calls",
        ),
    ],
)
def test_what_a_template_leaves_out_is_refused(scored, row: dict, key: str) -> None:
    with pytest.raises(UserError, match=f"the chat template leaves out the {key} of z"):
        scored({"id": "z", **row})


def test_an_earlier_thought_that_the_template_drops_is_refused(scored) -> None:
    messages = [user("a"), assistant("b", reasoning_content="So"), user("c"), assistant("d", reasoning_content="Then")]
    with pytest.raises(UserError, match="leaves out the reasoning_content of z"):
        scored({"id": "z", "messages": messages}, THINKING)


def test_a_special_token_in_a_call_of_a_tool_is_refused(scored) -> None:
    messages = [user("a"), assistant("", tool_calls=[{"f": END}]), {"role": "tool", "content": "1"}, assistant("b")]
    with pytest.raises(UserError, match="contains a special token"):
        scored({"messages": messages}, THINKING)


# What is refused


@pytest.mark.parametrize(
    ("row", "message", "value"),
    [
        ({"prompt": "a", "response": "b", "input": "c"}, "z has a input beside its prompt", "c"),
        ({"prompt": [user("a")], "response": "b", "context": "c"}, "z has a context beside its prompt", "c"),
        ({"messages": [user("a"), assistant("b")], "response": "c"}, "a response that is not among them", "c"),
        ({"messages": turns(), "response": "Two"}, "a response that is not among them", "Two"),
        (
            {"messages": [user("a"), assistant("b")], "history": [["c", "d"]]},
            "a history that is not among them",
            [["c", "d"]],
        ),
        ({"messages": [SYSTEM, user("a"), assistant("b")], "system": "c"}, "z has two system texts", None),
        ({"prompt": "a", "response": "b", "history": "c"}, "the history of z is no list", "c"),
        ({"prompt": "a", "response": "b", "history": [["c"]]}, "the history of z is no list", ["c"]),
        ({"prompt": "a", "response": "b", "tools": "f(x)"}, "the tools of z are no list", "f(x)"),
        ({"prompt": "a", "response": "b", "weight": 0.5}, "the column weight would change 1 examples", "z"),
        ({"prompt": "a", "response": "b", "train": False}, "the column train would change 1 examples", "z"),
        ({"prompt": "a", "response": "b", "images": ["x"]}, "the column images would change 1 examples", "z"),
        ({"prompt": "a", "response": "b", "thinking": "x"}, "the column thinking would change 1 examples", "z"),
        ({"messages": [user("a"), assistant("b", function_call={"f": 1})]}, "have a function_call, which is not", "z"),
        ({"messages": [user("a"), assistant("b", prefix=True)]}, "have a prefix, which is not used", "z"),
        (
            {"messages": [user("a"), assistant("b", tool_calls=[{"f": 1}])]},
            "an answer of z that counts calls a tool",
            None,
        ),
        ({"messages": "[{'role': 'user'}]"}, "written as messages and is no JSON", "[{'role': 'user'}]"),
        ({"messages": [user("a"), {"role": "critic", "content": "b"}]}, "a role that is not known", "critic"),
        ({"prompt": float("nan"), "response": "b"}, "the prompt of z is not a text", None),
        ({"prompt": "a", "response": ["b"]}, "the response of z is not a text", ["b"]),
        ({"prompt": "a", "response": b"b"}, "the response of z is not a text", b"b"),
        ({"prompt": "a", "response": "b", "label": ["x"]}, "the label of z is not a text", ["x"]),
        ({"prompt": "a", "response": "b", "label": float("nan")}, "the label of z is not a text", None),
        (
            {"prompt": "a", "chosen": "b", "rejected": "c"},
            "holds preference pairs(.|\n)*examples.kind=preference",
            None,
        ),
        ({"text": "a"}, "neither messages nor a prompt(.|\n)*examples.kind=document", None),
    ],
)
def test_what_would_change_an_example_is_used_or_refused(row: dict, message: str, value: object) -> None:
    with pytest.raises(UserError, match=message) as caught:
        load_examples([{"id": "z", **row}])
    if value is not None:
        assert caught.value.value == value


@pytest.mark.parametrize(
    ("row", "column"),
    [
        ({"prompt": "a", "response": "b", "output": "c"}, "output"),
        ({"prompt": "a", "response": "b", "question": "c"}, "question"),
        ({"instruction": "a", "prompt": "c", "output": "b"}, "instruction"),
        ({"messages": [user("a"), assistant("b")], "conversations": [user("c"), assistant("d")]}, "conversations"),
        ({"prompt": "a", "response": "b", "system_message": "c"}, "system_message"),
        ({"question": "a", "answer": "b", "passage": "c"}, "passage"),
        ({"question": "a", "answer": 1, "choices": ["c", "d"]}, "choices"),
        ({"prompt": "a", "response": "b", "rationale": "c"}, "rationale"),
        ({"prompt": "a", "response": "b", "Sample Weight": 0.5}, "Sample Weight"),
        ({"prompt": "a", "response": "b", "mask_history": True}, "mask_history"),
        ({"prompt": "a", "response": "b", "labels": [-100, 2]}, "labels"),
        ({"prompt": "a", "response": "b", "segments": [{"label": True, "text": "b"}]}, "segments"),
    ],
)
def test_a_column_that_could_change_an_example_is_refused_and_taken_under_another_name(row: dict, column: str) -> None:
    with pytest.raises(UserError, match=f"the column {column} would change 1 examples") as caught:
        load_examples([{"id": "z", **row}])
    assert caught.value.value == "z"
    renamed = {"note" if key == column else key: value for key, value in row.items()}
    (record,) = load_examples([{"id": "z", **renamed}])
    assert record.flags == {"note": row[column]}


def test_columns_that_repeat_what_is_said_or_say_the_usual_are_notes() -> None:
    said = {"prompt": "Text: a. Why?", "response": "So it is: b"}
    copies = {"question": "Why?", "answer": "b", "passage": ["a."], "Rationale": ""}
    usual = {"weight": "1.0", "sample_weight": 1, "train_on_inputs": "false"}
    (record,) = load_examples([{**said, **copies, **usual}])
    assert record.flags == {**copies, **usual} and record.prompt == said["prompt"]


@pytest.mark.parametrize("names", [("Instruction", " Input", "OUTPUT"), ("instruction ", "input", "Output")])
def test_a_column_is_the_same_however_its_name_is_written(names) -> None:
    (record,) = load_examples([dict(zip(names, ("Add", "1 1", "2"), strict=True))])
    assert (record.prompt, record.response, record.flags) == ("Add\n1 1", "2", {})
    with pytest.raises(UserError, match="two columns of the data have one name"):
        load_examples([{"prompt": "a", "Prompt": "b", "response": "c"}])


@pytest.mark.parametrize("nothing", ["nan", "None", "NULL", "<noinput>"])
def test_a_word_for_nothing_is_not_said_to_the_model(nothing: str) -> None:
    for column in ("input", "system"):
        with pytest.raises(UserError, match="of z is a word for nothing"):
            load_examples([{"id": "z", "instruction": "a", column: nothing, "output": "b"}])
    assert load_examples([{"instruction": "a", "output": nothing}]).examples[0].response == nothing


def test_messages_that_a_cell_writes_as_json_are_messages(scored) -> None:
    before, after = [SYSTEM, user("Hi?")], [assistant("Ho.")]
    for row in (
        {"messages": json.dumps([*before, *after])},
        {"prompt": json.dumps(before), "completion": json.dumps(after)},
        {"prompt": "Hi?", "response": "Ho.", "history": "[]", "system": "Be kind."},
    ):
        assert scored(row) == (rendered(*before, *after), ["Ho." + END])
    (record,) = load_examples([{"instruction": "a", "output": "b", "history": '[["c", "d"]]'}])
    assert record.messages == (user("c"), assistant("d"), user("a"))
    for column in ("prompt", "response"):
        with pytest.raises(UserError, match="written as messages and is no JSON"):
            load_examples([{"prompt": "a", "response": "b", column: str(before)}])


@pytest.mark.parametrize("turn", [{"role": "user", "from": "gpt"}, {"content": "a", "value": "b"}])
def test_a_message_says_one_thing_under_two_keys(turn: dict) -> None:
    with pytest.raises(UserError, match="a message of z has a (role|content) and another (from|value)"):
        load_examples([{"id": "z", "messages": [{**user("a"), **turn}, assistant("b")]}])


def test_roles_are_known_in_any_case_and_no_other_ones() -> None:
    turns = [{"from": "Human", "value": "a"}, {"from": "GPT", "value": "b"}]
    assert load_examples([{"conversations": turns}]).examples[0].messages == (user("a"),)
    for role in ("function_call", "observation", "bard"):
        with pytest.raises(UserError, match="has a role that is not known") as caught:
            load_examples([{"conversations": [turns[0], {"from": role, "value": "x"}, turns[1]]}])
        assert caught.value.value == role


def test_completions_that_training_moves_away_from_are_no_pairs() -> None:
    rows = [{"id": i, "prompt": "a", "completion": i, "label": i == "b"} for i in "bc"]
    with pytest.raises(UserError, match="1 completions have the label false") as caught:
        load_examples(rows)
    assert caught.value.value == "c"
    assert load_examples(rows[:1]).examples[0].label == "True"


def test_a_document_with_a_weight_is_refused() -> None:
    rows = [{"id": "z", "text": "a b", "weight": weight} for weight in (1.0, 0.5)]
    assert load_examples(rows[:1], kind="document").ids == ("z",)
    with pytest.raises(UserError, match="the column weight would change"):
        load_examples(rows[1:], kind="document")


def test_all_examples_with_an_unused_key_are_named() -> None:
    rows = [
        {"id": f"z{i}", "messages": [user("a"), assistant(f"{i}", **({"mood": "sad"} if i % 2 else {"mood": None}))]}
        for i in range(4)
    ]
    with pytest.raises(UserError, match="messages of 2 examples have a mood") as caught:
        load_examples(rows)
    assert caught.value.value == "z1, z3"


def test_a_chosen_answer_alone_is_an_example_when_its_column_is_named() -> None:
    row = {"prompt": "a", "chosen": "b", "rejected": "c"}
    (record,) = load_examples([row], columns={"response": "chosen"})
    assert record.response == "b" and record.flags == {"rejected": "c"}


def test_numbers_become_text() -> None:
    (record,) = load_examples([{"id": 7, "prompt": "1 + 1", "response": 2, "label": 1.5}])
    assert (record.id, record.response, record.label) == ("7", "2", "1.5")


@pytest.mark.parametrize("options", [{"kind": "pairs"}, {"turns": "first"}])
def test_an_unknown_option_names_the_known_ones(options) -> None:
    with pytest.raises(UserError, match="unknown (kind|turns) of examples(.|\n)*one of (pair, document|last, all)"):
        load_examples([{"prompt": "a", "response": "b"}], **options)


# Documents


def documents(*texts: str) -> ExampleSet:
    rows = [{"id": f"d{i}", "text": text, "source": "web", "url": "u"} for i, text in enumerate(texts)]
    return load_examples(rows, kind="document")


TEXT = "The quick brown fox,\njumps over — “the” lazy 🐶."


@pytest.mark.parametrize("size", [2, 3, 7, 16, 100])
def test_windows_score_each_token_but_the_first_exactly_once(tokenizer, size: int) -> None:
    examples = documents("One short.", TEXT)
    chat = ChatFormat(tokenizer)
    encoded, dropped = chat.encode_examples(examples, size)
    assert dropped == [] and not any(e.truncated for e in encoded)
    for record in examples:
        windows = [e for e in encoded if e.document == record.id]
        assert [e.id for e in windows] == [f"{record.id}#{k}" for k in range(len(windows))]
        whole = tokenizer(record.response)["input_ids"]
        scored = [e.input_ids[place] for e in windows for place in e.scored]
        assert [windows[0].input_ids[0], *scored] == whole
        assert all(len(e.input_ids) <= size and e.scored == tuple(range(1, len(e.input_ids))) for e in windows)
        # A window begins with the last token of the one before it.
        assert all(b.input_ids[0] == a.input_ids[-1] for a, b in pairwise(windows))


def test_a_window_is_a_record_that_knows_its_document(tokenizer) -> None:
    examples = documents("One short.", TEXT)
    encoded, _ = ChatFormat(tokenizer).encode_examples(examples, 16)
    windows = examples.encoded(encoded[1:])
    assert windows.ids == tuple(e.id for e in encoded[1:])
    assert {w.document for w in windows} == {"d1"} and {w.source for w in windows} == {"web"}
    assert windows.examples[0].flags == {"url": "u"} and windows.examples[0].prompt == ""
    ascii_only = documents(TEXT.encode("ascii", "ignore").decode())
    encoded, _ = ChatFormat(tokenizer).encode_examples(ascii_only, 16)
    assert "".join(w.response for w in ascii_only.encoded(encoded)) == ascii_only.examples[0].response


def test_pairs_that_are_left_keep_their_order_and_records(tokenizer) -> None:
    examples = load_examples(
        [{"id": i, "prompt": i, "response": "No." * n} for i, n in (("a", 1), ("b", 99), ("c", 2))]
    )
    encoded, dropped = ChatFormat(tokenizer).encode_examples(examples, 100, drop_truncated=True)
    assert dropped == ["b"] and examples.encoded(encoded).examples == (examples.examples[0], examples.examples[2])


def test_a_document_begins_with_the_token_that_the_tokenizer_puts_before_text(tokenizer) -> None:
    from tokenizers import processors

    backend = tokenizer.backend_tokenizer
    before = backend.post_processor
    backend.post_processor = processors.TemplateProcessing(
        single="<|im_start|> $A", special_tokens=[("<|im_start|>", 0)]
    )
    try:
        (encoded,), _ = ChatFormat(tokenizer).encode_examples(documents("ab"), 16)
    finally:
        backend.post_processor = before
    assert tokenizer.decode(encoded.input_ids) == "<|im_start|>ab" and encoded.scored == (1, 2)
    assert encoded.text == "ab"


def test_documents_in_windows_are_counted(tokenizer) -> None:
    from taught.data.documents import windows_note

    encoded, _ = ChatFormat(tokenizer).encode_examples(documents("a" * 31, "b" * 10), 11)
    assert windows_note(encoded) == "2 documents in 4 windows, at most 3 of one (d0)"
    assert windows_note([]) is None


@pytest.mark.parametrize(
    ("text", "size", "message"), [("a", 9, "no token to score(.|\n)*d1"), ("ab", 1, "max_tokens: 1")]
)
def test_documents_without_a_token_to_score_are_named(tokenizer, text: str, size: int, message: str) -> None:
    with pytest.raises(UserError, match=message):
        ChatFormat(tokenizer).encode_examples(documents("fine text", text), size)


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"text": " \n"}, "1 examples have an empty text(.|\n)*value: z"),
        ({"text": None}, "1 examples have an empty text(.|\n)*value: z"),
        ({"text": ["a"]}, "the text of z is not a text"),
        ({"prompt": "a", "response": "b"}, "has no text(.|\n)*examples.kind=pair"),
    ],
)
def test_bad_documents_are_named(row: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        load_examples([{"id": "z", **row}], kind="document")


def test_a_document_with_an_evaluation_prompt_as_a_line_overlaps() -> None:
    prompts = PromptSet((Prompt("p", "How do I pick a lock?", "harmful"),), {}, "")
    examples = documents("FAQ\nHow do I pick a lock\nAsk a smith.", "How do I pick a lock is a question")
    assert find_overlap(examples, prompts) == [("d0", "p")]


# Preferences


def preferences(*rows: dict, **columns: str) -> ExampleSet:
    return load_examples([{"id": "z", **row} for row in rows], kind="preference", columns=columns or None)


@pytest.mark.parametrize(
    "row",
    [
        {"prompt": "How?", "chosen": "So.", "rejected": "No."},
        {"instruction": "How?", "chosen": "So.", "rejected": "No."},
        {"prompt": [user("How?")], "chosen": [assistant("So.")], "rejected": [assistant("No.")]},
        {"chosen": [user("How?"), assistant("So.")], "rejected": [user("How?"), assistant("No.")]},
        # UltraFeedback: whole conversations beside the prompt that they hold.
        {
            "prompt": "How?",
            "chosen": [user("How?"), assistant("So.")],
            "rejected": [user("How?"), assistant("No.")],
            "score_chosen": 4.0,
        },
        {
            "chosen": [{"from": "human", "value": "How?"}, {"from": "gpt", "value": "So."}],
            "rejected": [{"from": "human", "value": "How?"}, {"from": "gpt", "value": "No."}],
        },
    ],
)
def test_a_preference_is_two_answers_to_one_conversation(row: dict) -> None:
    (record,) = preferences(row)
    assert (record.kind, record.prompt, record.response, record.rejected) == ("preference", "How?", "So.", "No.")
    assert record.messages == (user("How?"),) and record.reference is None


def test_answers_that_a_template_makes_equal_are_no_preference(tokenizer) -> None:
    (record,) = preferences({"prompt": "a", "chosen": "Yes.", "rejected": "Yes. "})
    assert ChatFormat(tokenizer).encode_example(record).rejected is not None
    trimmed = ChatFormat(tokenizer, CHATML.replace("m['content']", "m['content'] | trim"))
    with pytest.raises(UserError, match="answer of z are the same tokens"):
        trimmed.encode_example(record)


def test_a_preference_has_what_stands_before_its_prompt() -> None:
    row = {"prompt": "How?", "chosen": "So.", "rejected": "No.", "system": "Be kind.", "history": [["a", "b"]]}
    assert preferences(row).examples[0].messages == (SYSTEM, user("a"), assistant("b"), user("How?"))
    row = {"instruction": "Sum up.", "input": "A text.", "chosen": "So.", "rejected": "No."}
    assert preferences(row).examples[0].prompt == "Sum up.\nA text."


def test_answers_that_begin_with_the_prompts_words_are_given_as_messages() -> None:
    said = {"chosen": "Who are you? I am.", "rejected": "Who are you? Who?"}
    row = {"prompt": "Who are you?", **{side: [assistant(text)] for side, text in said.items()}}
    (record,) = preferences(row)
    assert (record.response, record.rejected) == tuple(said.values())


def test_ids_of_preferences_without_one_hold_both_answers() -> None:
    rows = [{"prompt": "a", "chosen": "b", "rejected": name} for name in "cd"]
    first, second = load_examples(rows, kind="preference").ids
    pair = load_examples([{"prompt": "a", "response": "b"}]).ids[0]
    assert len({first, second, pair}) == 3


@pytest.mark.parametrize("short", ["ref", "reference"])
def test_a_reference_of_the_data_is_read(short: str) -> None:
    row = {"prompt": "a", "chosen": "b", "rejected": "c"}
    given = {f"{short}_chosen_logps": -3.5, f"{short}_rejected_logps": -1.25}
    assert preferences({**row, **given}).examples[0].reference == (-3.5, -1.25)
    assert preferences({**row, **dict.fromkeys(given)}).examples[0].reference is None


@pytest.mark.parametrize(
    ("row", "message"),
    [
        ({"prompt": "a", "chosen": "b", "rejected": "b"}, "are the same"),
        ({"prompt": "a", "chosen": "b", "rejected": " "}, "empty rejected"),
        ({"prompt": "a", "response": "b"}, "no chosen and rejected(.|\n)*examples.kind=pair"),
        ({"chosen": "Human: a Assistant: b", "rejected": "Human: a Assistant: c"}, "has no prompt"),
        (
            {"chosen": [user("a"), assistant("b")], "rejected": [user("c"), assistant("d")]},
            "differ before their last answer",
        ),
        (
            {"chosen": [user("a"), assistant("b")], "rejected": [user("a"), assistant("c"), user("d"), assistant("e")]},
            "differ before their last answer",
        ),
        ({"prompt": "x", "chosen": [user("a"), assistant("b")], "rejected": "c"}, "not among them"),
        (
            {"chosen": [user("a"), assistant("b", weight=0)], "rejected": [user("a"), assistant("c")]},
            "marked with a weight",
        ),
        ({"prompt": "a", "chosen": [assistant("b", reasoning_content="x")], "rejected": "c"}, "more than its text"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "ref_chosen_logps": -1.0}, "log-probabilities"),
        (
            {"prompt": "a", "chosen": "b", "rejected": "c", "ref_chosen_logps": -1.0, "ref_rejected_logps": 2.0},
            "log-probabilities",
        ),
        (
            {"prompt": "a", "chosen": "b", "rejected": "c", "ref_chosen_logps": "nan", "ref_rejected_logps": "-1"},
            "log-probabilities",
        ),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "weight": 0.5}, "the column weight would change"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "question": "d"}, "the column question would change"),
        ({"prompt": "a", "chosen": "b", "rejected": "c", "messages": [user("d")]}, "the column messages would change"),
        (
            {"prompt": "a", "chosen": "b", "rejected": "c", "ref_logp_chosen": -1.0, "ref_logp_rejected": -1.0},
            "the column ref_logp_chosen would change",
        ),
        (
            {"prompt": "Human: a Assistant:", "chosen": "Human: a Assistant: b", "rejected": "Human: a Assistant: c"},
            "both answers of z begin with their prompt",
        ),
    ],
)
def test_a_preference_that_is_none_is_refused(row: dict, message: str) -> None:
    with pytest.raises(UserError, match=message):
        preferences(row)


# Anything


plain_values = st.sampled_from([None, True, 0, 1, 0.5, float("nan"), "", "a", "b c", "[]", "[1]", "{", b"x"])
values = (
    plain_values | st.lists(plain_values, max_size=2) | st.dictionaries(st.sampled_from("ab"), plain_values, max_size=2)
)
words = st.sampled_from(["a", "b c", "", " ", "naïve", "<|im_end|>", "\ue000"])
message = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant"]), "content": words},
    optional={name: values for name in ("weight", "train", "tool_calls", "thinking", "name", "mood")},
)
exchange = st.tuples(message, message).map(lambda two: [{**two[0], "role": "user"}, {**two[1], "role": "assistant"}])
conversation = st.lists(exchange, min_size=1, max_size=3).map(lambda pairs: [turn for pair in pairs for turn in pair])
cells = words | conversation | st.lists(message | values, max_size=4) | values
USED = (*PAIR_COLUMNS.values(), *PREFERENCE_COLUMNS.values(), ("text", "weight"))
COLUMN_NAMES = sorted({name for names in USED for name in names})
usual = st.one_of(
    st.fixed_dictionaries({"messages": conversation}),
    st.fixed_dictionaries({"instruction": words, "input": words, "output": words}),
    st.fixed_dictionaries({"text": words}),
    st.fixed_dictionaries({"prompt": words, "chosen": words | conversation, "rejected": words | conversation}),
)
further = st.dictionaries(st.sampled_from(COLUMN_NAMES), cells, max_size=2)
rows = st.lists(st.builds(lambda row, more: {**row, **more}, usual, further), min_size=1, max_size=2)


@settings(max_examples=300, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(rows=rows, turns=st.sampled_from(["last", "all"]), kind=st.sampled_from(["pair", "document", "preference"]))
def test_any_row_is_an_example_or_a_mistake_that_is_explained(tokenizer, rows, turns, kind) -> None:
    try:
        examples = load_examples(rows, kind=kind, turns=turns)
        encoded, _ = ChatFormat(tokenizer, THINKING).encode_examples(examples, 400)
    except UserError as error:
        assert len(str(error).splitlines()) <= 4
        return
    assert len(examples) == len(rows)
    assert {e.document or e.id for e in encoded} == set(examples.ids)
    assert all(e.n_scored > 0 and e.scored[0] > 0 and e.scored[-1] < len(e.input_ids) for e in encoded)
