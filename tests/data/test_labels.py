"""Labels of examples, by a column of their data and in the names of a taxonomy."""

from __future__ import annotations

from typing import Any

import pytest

from taught.data.examples import ExampleSet, load_examples
from taught.data.labels import TAXONOMIES, read_labels
from taught.errors import UserError


def records(cells: list[Any], column: str = "kind") -> ExampleSet:
    rows = [{"id": f"d{i}", "text": f"Text {i}", column: cell} for i, cell in enumerate(cells)]
    return load_examples(rows, "document")


def test_labels_are_text_and_what_is_empty_is_none():
    cells = ["a b ", 3, 3.0, True, 0.5, "", None, float("nan"), "unknown", " "]
    found = read_labels(records(cells), "kind")
    assert found.labels == ("a b", "3", "3", "true", "0.5", None, None, None, None, None)
    assert found.unlabelled == ("d5", "d6", "d7", "d8", "d9")


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
