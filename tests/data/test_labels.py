"""Labels of examples, by a column of their data and in the names of a taxonomy."""

from __future__ import annotations

from typing import Any

import pytest

from taught.data.examples import ExampleSet, load_examples
from taught.data.labels import TAXONOMIES, check_labels, read_labels
from taught.errors import UserError


def records(cells: list[Any], column: str = "kind") -> ExampleSet:
    rows = [{"id": f"d{i}", "text": f"Text {i}", column: cell} for i, cell in enumerate(cells)]
    return load_examples(rows, "document")


def test_labels_are_text_and_what_is_empty_is_none():
    cells = ["a b ", 3, 3.0, True, 0.5, "", None, float("nan"), "unknown", " "]
    found = read_labels(records(cells), "kind")
    assert found.labels == ("a b", "3", "3", "true", "0.5", None, None, None, None, None)
    assert found.unlabelled == ("d5", "d6", "d7", "d8", "d9")


@pytest.mark.parametrize(
    "cells",
    [["a b", " a  b\n", "a\u00a0b"], ["caf\u00e9", "cafe\u0301"], [3, 3.0, "3"]],
    ids=["spaces", "accents", "numbers"],
)
def test_what_looks_the_same_is_one_label(cells: list[Any]):
    assert len(set(read_labels(records(cells), "kind").labels)) == 1


@pytest.mark.parametrize("cell", ["Unknown", "UNKNOWN", "None", "NULL", "NAN", "\u00a0"])
def test_words_for_a_gap_are_no_label_in_any_case(cell: str):
    assert read_labels(records([cell, "x"]), "kind").unlabelled == ("d0",)


@pytest.mark.parametrize("column", ["kind", "topic"])
def test_shards_that_hold_a_number_in_different_types_agree_in_its_label(column: str):
    # A column of whole numbers with a gap is one of fractions in Parquet and in pandas.
    assert read_labels(records([2, 2.0, None], column), column).labels == ("2", "2", None)


@pytest.mark.parametrize("column", ["topic", "category", "label", "source"])
def test_columns_that_are_read_as_label_category_or_source_go_by_their_own_names(column: str):
    found = read_labels(records(["x", None], column), column)
    assert found.labels == ("x", None) and found.unlabelled == ("d1",)


def test_a_column_that_only_some_rows_have_is_one():
    rows = [{"id": "a", "text": "A."}, {"id": "b", "text": "B.", "kind": "x"}]
    assert read_labels(load_examples(rows, "document"), "kind").labels == (None, "x")


def test_control_characters_stay_in_a_label_and_not_in_an_error():
    label = "x\x1b[31m<b>"
    assert read_labels(records([label, "y"]), "kind").labels == (label, "y")
    with pytest.raises(UserError) as error:
        read_labels(records([label, "y"]), "kind", "weborganizer")
    assert "\x1b" not in str(error.value)


def test_a_taxonomy_has_24_topics_and_24_formats_in_any_spelling():
    fields = TAXONOMIES["weborganizer"]
    assert [len(names) for names in fields.values()] == [24, 24]
    cells = ["Art and Design", "science_math_technology", "SOFTWARE", None]
    found = read_labels(records(cells), "kind", "weborganizer")
    assert found.labels == ("art & design", "science, math & technology", "software", None)
    assert len(found.empty) == 21 and "literature" in found.empty
    found = read_labels(records(["q&a forum", "News (Org.)"], "kind"), "kind", "weborganizer")
    assert found.labels == ("Q&A forum", "news (org.)")


@pytest.mark.parametrize(
    ("cells", "column", "taxonomy", "words", "named"),
    [
        (["x"], "kinds", None, "no such column", "columns: kind"),
        ([["x"], "y"], "kind", None, "neither text nor a number", "d0"),
        ([i + 0.25 for i in range(300)], "kind", None, "too many different values", "0.25"),
        (["literature", "listicle"], "kind", "weborganizer", "no topic of weborganizer", "listicle"),
        (["poems", "listicle"], "kind", "weborganizer", "no format of weborganizer", "poems"),
    ],
)
def test_what_is_no_label_is_refused(cells: list[Any], column: str, taxonomy: str | None, words: str, named: str):
    with pytest.raises(UserError, match=words) as error:
        read_labels(records(cells), column, taxonomy)
    assert named in str(error.value)


# A classifier


def lengths(column: str, texts: list[str]) -> list[Any]:
    """For ``test_labels:lengths``."""
    assert column == "size"
    return [None if text.endswith("0") else f"{len(text)} letters" for text in texts]


def fails(column: str, texts: list[str]) -> list[Any]:
    """For ``test_labels:fails``."""
    raise ValueError("no labels today")


def one(column: str, texts: list[str]) -> list[Any]:
    """For ``test_labels:one``."""
    return ["only one"]


def test_a_classifier_labels_what_has_no_such_column():
    found = read_labels(records(["x", "y", "x"]), "size", classifier=f"{__name__}:lengths")
    assert found.labels == (None, "6 letters", "6 letters") and found.unlabelled == ("d0",)
    assert read_labels(records(["x", "y"]), "kind", classifier="nowhere:nothing").labels == ("x", "y")


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("nowhere:function", "cannot be loaded"),
        (f"{__name__}:nothing", "cannot be loaded"),
        (f"{__name__}:__name__", "not a function"),
        (f"{__name__}:fails", "failed"),
        (f"{__name__}:one", "another number of labels"),
    ],
)
def test_a_classifier_that_gives_no_labels_is_refused(name: str, words: str):
    with pytest.raises(UserError, match=words) as error:
        read_labels(records(["x", "y"]), "size", classifier=name)
    assert "bins.classifier" in error.value.fix
    if words in ("cannot be loaded", "not a function"):
        with pytest.raises(UserError, match=words):
            check_labels(records(["x", "y"]), "size", None, name)
    else:  # it is not called before it is its turn
        check_labels(records(["x", "y"]), "size", None, name)
