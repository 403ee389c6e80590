"""Tables of scores from elsewhere: what a row counts for, and what does not fit."""

from __future__ import annotations

import json

import pytest

from taught.errors import UserError
from taught.validation.score_tables import placed, read_scores

IDS = ["a", "b"]
TARGETS = ["score", "behavior:harmless"]


def read(tmp_path, rows: str, taken=()):
    file = tmp_path / "scores.csv"
    file.write_text(rows)
    return placed(read_scores(file), IDS, TARGETS, taken)


def test_rows_count_for_their_target_or_for_every_one(tmp_path):
    found = read(
        tmp_path,
        "example_id,method,target,value\na,m,score,1\nb,m,score,2\n"
        "a,n,,3\nb,n,,4\na,vf,concept:refusal,5\nb,vf,concept:refusal,6\n",
    )
    assert found["m"] == {"score": {"a": 1.0, "b": 2.0}}
    assert found["n"] == {key: {"a": 3.0, "b": 4.0} for key in TARGETS}
    assert found["refusal:vf"] == {key: {"a": 5.0, "b": 6.0} for key in TARGETS}


@pytest.mark.parametrize(
    ("rows", "what"),
    [
        ("example_id,value\na,1\nb,2\n", "without method"),
        ("example_id,method,value\n", "no rows"),
        ("example_id,method,value\na,m,1\nb,m,nan\n", "not a finite number"),
        ("example_id,method,value\na,m,1\nb,m,high\n", "not a finite number"),
        ("example_id,method,value\na,m,1\nb,m,1\nc,m,1\n", "unknown examples(.|\n)*value: c"),
        ("example_id,method,value\na,m,1\n", "missing(.|\n)*value: b"),
        ("example_id,method,target,value\na,m,score,1\nb,m,,1\n", "missing"),
        ("example_id,method,value\na,m,1\nb,m,1\na,m,2\n", "two scores"),
        ("example_id,method,value\na,loss,1\nb,loss,1\n", "of this name already"),
        ("example_id,method,target,value\na,m,scores,1\nb,m,scores,1\n", "not compared"),
    ],
)
def test_tables_that_do_not_fit_are_refused_by_name(tmp_path, rows, what):
    with pytest.raises(UserError, match=what):
        read(tmp_path, rows, {"loss"})


@pytest.mark.parametrize(
    ("change", "what"),
    [
        ({"value": True}, "not a finite number"),
        ({"value": 10**400}, "not a finite number"),
        ({"value": [1.0]}, "not a finite number"),
        ({"value": {"x": 1}}, "not a finite number"),
        ({"value": None}, "not a finite number"),
        ({"value": "\x1b[31m"}, "not a finite number"),
        ({"example_id": None}, "of what its score is"),
        ({"example_id": ["a"]}, "of what its score is"),
        ({"example_id": True}, "of what its score is"),
        ({"method": 3}, "of what its score is"),
        ({"method": " "}, "of what its score is"),
        ({"target": ["score"]}, "of what its score is"),
        ({"target": {"concept": "a"}}, "of what its score is"),
    ],
    ids=str,
)
def test_rows_of_other_types_are_refused_and_shown_in_plain_words(tmp_path, change, what):
    file = tmp_path / "scores.jsonl"
    file.write_text(json.dumps({"example_id": "a", "method": "m", "value": 1.0, **change}))
    with pytest.raises(UserError, match=what) as caught:
        read_scores(file)
    assert "\x1b" not in str(caught.value)


def test_ids_that_are_whole_numbers_are_those_of_the_run(tmp_path):
    (tmp_path / "scores.jsonl").write_text('{"example_id": 7, "method": "m", "value": 1}')
    assert read_scores(tmp_path / "scores.jsonl") == [("m", None, "7", 1.0)]
