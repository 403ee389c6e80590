"""Labels of examples: what kind each is, by a column of the data, in the names of a taxonomy where one is asked for."""

from __future__ import annotations

import math
import unicodedata
from collections.abc import Sequence
from typing import Any, NamedTuple

from taught.data.classify import load_classifier
from taught.data.columns import written
from taught.data.examples import ExampleSet
from taught.errors import UserError, refuse

MOST = 200  # labels of a column
_NONE = ("", "nan", "nat", "<na>", "none", "null", "unknown")
_FIELDS = ("label", "category", "source")

# WebOrganizer's names (arXiv 2502.10341): field -> labels.
_WEBORGANIZER = {
    "topic": (
        "adult content; art & design; crime & law; education & jobs; electronics & hardware; entertainment; "
        "fashion & beauty; finance & business; food & dining; games; health; history & geography; home & hobbies; "
        "industrial; literature; politics; religion; science, math & technology; social life; software; "
        "software development; sports & fitness; transportation; travel & tourism"
    ),
    "format": (
        "about (org.); about (personal); academic writing; audio transcript; comment section; content listing; "
        "creative writing; customer support; documentation; FAQ; knowledge article; legal notices; listicle; "
        "news article; news (org.); nonfiction writing; personal blog; product page; Q&A forum; spam/ads; "
        "structured data; truncated; tutorial; user review"
    ),
}
TAXONOMIES = {"weborganizer": {name: tuple(text.split("; ")) for name, text in _WEBORGANIZER.items()}}


class Labels(NamedTuple):
    """One label for each example.

    Attributes
    ----------
    labels : in the order of the examples; None where there is none
    unlabelled : ids of these
    empty : names of the taxonomy that no example has
    """

    labels: tuple[str | None, ...]
    unlabelled: tuple[str, ...]
    empty: tuple[str, ...] = ()


def read_labels(
    examples: ExampleSet, column: str, taxonomy: str | None = None, classifier: str | None = None
) -> Labels:
    """Labels by a column of the data, whether it was read as a label, category or source or not at all.

    What looks the same is one label: spaces in a row are one and those around a text none, letters are composed
    (Unicode NFC), true, false and whole numbers are written out. An empty cell, null, NaN and the words "unknown",
    "none", "null" and "nan" in any case are no label.

    Parameters
    ----------
    classifier : labels the examples where they do not have the column; see :func:`taught.data.classify.load_classifier`
    taxonomy : the labels are one field's names of it, in any spelling of case, separators and "and"

    Raises
    ------
    UserError
        No example has the column; a cell is neither text nor a number; more than ``MOST`` labels; a label that is not
        of the taxonomy.
    """
    cells = _cells(examples, column)
    if cells is None and classifier is not None:
        cells = classify(classifier, column, examples)
    if cells is None:
        known = [*_read_as(examples), *dict.fromkeys(name for example in examples for name in example.flags)]
        raise UserError(
            "the examples have no such column",
            value=column,
            rule="columns: " + (", ".join(known) or "none beside what is trained on"),
            fix="name one of these under bins.columns, or add the column to the file",
        )
    labels = [_label(cell) for cell in cells]
    bad = [example.id for example, label in zip(examples, labels, strict=True) if label is None]
    what = f"the {column} of {len(bad)} examples is neither text nor a number"
    refuse(bad, what, rule="a label is one word or number", fix=f"turn the column {column} into text")
    names = sorted({label for label in labels if label})
    if len(names) > MOST:
        raise UserError(
            f"the column {column} holds too many different values to be kinds of examples",
            value=f"{len(names):,}, such as {', '.join(names[:3])}",
            rule=f"at most {MOST} labels",
            fix="name another column, or make classes of its values: ranges of a number, groups of names",
        )
    named, empty = ({n: n for n in names}, ()) if taxonomy is None else _names_of(taxonomy, column, names)
    without = tuple(example.id for example, label in zip(examples, labels, strict=True) if not label)
    return Labels(tuple(named[label] if label else None for label in labels), without, empty)


def check_labels(examples: ExampleSet, column: str, taxonomy: str | None, classifier: str | None) -> None:
    """Raise a UserError where :func:`read_labels` would; a classifier is loaded and not called."""
    if classifier is None or _cells(examples, column) is not None:
        read_labels(examples, column, taxonomy)
    else:
        load_classifier(classifier)


def classify(name: str, column: str, examples: ExampleSet) -> list[Any]:
    """What ``function(column, texts)`` says of the examples: a label for each text, or None.

    Raises
    ------
    UserError
        It cannot be loaded, fails, or does not give one label for each text.
    """
    texts = ["\n".join(filter(None, (example.prompt, example.response))) for example in examples]
    function = load_classifier(name)
    try:
        labels = list(function(column, texts))
    except Exception as error:
        raise _classifier_error("the classifier failed", f"{name}: {error!r}") from error
    if len(labels) != len(texts):
        raise _classifier_error("the classifier has another number of labels", f"{len(labels)} of {len(texts)} texts")
    return labels


def _classifier_error(what: str, value: str) -> UserError:
    rule = "it takes a column's name and texts, and gives a label for each"
    return UserError(what, value=value, rule=rule, fix="correct bins.classifier")


def _read_as(examples: ExampleSet) -> dict[str, str]:
    """Column -> the field that it was read as, of those that hold labels."""
    return {name: field for field, name in examples.columns.items() if field in _FIELDS}


def _cells(examples: ExampleSet, column: str) -> list[Any] | None:
    """A column of the data; None where no example has it."""
    if (field := _read_as(examples).get(column)) is not None:
        return [getattr(example, field) for example in examples]
    if not any(column in example.flags for example in examples):
        return None
    return [example.flags.get(column) for example in examples]


def _label(cell: Any) -> str | None:
    """The label of a cell, "" where there is none; None where it is of another kind."""
    if isinstance(cell, bool):
        return str(cell).lower()
    known = cell is None or isinstance(cell, int | str) or (isinstance(cell, float) and not math.isinf(cell))
    label = " ".join(unicodedata.normalize("NFC", written(cell)).split())
    if label.casefold() in _NONE:
        return ""
    return label if known else None


def _names_of(taxonomy: str, column: str, labels: Sequence[str]) -> tuple[dict[str, str], tuple[str, ...]]:
    """Label -> its name in the field of the taxonomy that has most of the labels, and the names that are not used."""
    fields = {field: {_spelt(name): name for name in names} for field, names in TAXONOMIES[taxonomy].items()}
    field = max(fields, key=lambda name: sum(_spelt(label) in fields[name] for label in labels))
    known = fields[field]
    refuse(
        [label for label in labels if _spelt(label) not in known],
        f"the column {column} holds labels that are no {field} of {taxonomy}",
        rule="one of " + "; ".join(known.values()),
        fix="rename them in the data, or leave bins.taxonomy out",
    )
    named = {label: known[_spelt(label)] for label in labels}
    return named, tuple(name for name in known.values() if name not in set(named.values()))


def _spelt(label: str) -> str:
    """The words of a label, without case, separators and "and"."""
    words = "".join(char if char.isalnum() else " " for char in label.casefold()).split()
    return " ".join(word for word in words if word != "and")
