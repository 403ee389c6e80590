"""Rules for single values of a study: each one says in words what it allows, and checks it.

A rule turns what YAML or a flag gave into the value that is stored, or raises ``ValueError``; the
caller adds the key and the fix (``study/schema.py``).
"""

from __future__ import annotations

import dataclasses
import datetime
import math
import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from typing import Any

# What is done with each path inside a value: (key, path, kind) -> path. The kinds: ``file``, ``folder`` and ``table``
# (it must be there; a table may be a pattern that names files), ``hub`` (a folder that is there, or a hub id), ``made``
# (a place for what is computed).
Visit = Callable[[str, str, str], str]


@dataclass(frozen=True)
class Rule:
    """What a value must be.

    Attributes
    ----------
    text : the rule in words, as it stands in error messages
    parse : value -> the stored value; ``ValueError`` when the rule is broken
    choices : the words that are allowed, when there are only a few (for "did you mean")
    walk : (key, value, visit) -> the value with every path in it visited; None where none can be in it
    """

    text: str
    parse: Callable[[Any], Any]
    choices: tuple[str, ...] = ()
    walk: Callable[[str, Any, Visit], Any] | None = None

    def visited(self, key: str, value: Any, visit: Visit) -> Any:
        """The value with every path in it visited."""
        return value if self.walk is None or value is None else self.walk(key, value, visit)


def _that(words: str, allows: Callable[[Any], bool], choices: tuple[str, ...] = ()) -> Rule:
    """The rule for what a test allows, stored as it is."""

    def parse(value: Any) -> Any:
        if not allows(value):
            raise ValueError
        return value

    return Rule(words, parse, choices)


def text() -> Rule:
    """Return the rule for non-empty text, of at most 100,000 letters and without lone surrogates."""

    def parse(value: Any) -> str:
        if not isinstance(value, str) or not value.strip() or len(value) > 100_000:
            raise ValueError
        value.encode()  # a lone surrogate is none that a file, a tokenizer or a terminal could take
        return value

    return Rule("text, in quotes where YAML would read it as a number or yes/no", parse)


def matching(pattern: str, words: str) -> Rule:
    """Return the rule for text that a regular expression fits as a whole, in the words of the rule."""
    return _that(words, lambda value: re.fullmatch(pattern, text().parse(value), re.ASCII) is not None)


def one_of(*choices: str) -> Rule:
    """Return the rule for one word of a few."""
    return _that("one of " + ", ".join(choices), lambda value: isinstance(value, str) and value in choices, choices)


def flag() -> Rule:
    """Return the rule for true or false."""
    return _that("true or false", lambda value: isinstance(value, bool))


def day() -> Rule:
    """Return the rule for a day; YAML reads one without quotes as a date."""

    def parse(value: Any) -> str:
        if isinstance(value, datetime.date) and not isinstance(value, datetime.datetime):
            return value.isoformat()
        if not isinstance(value, str):
            raise ValueError
        return datetime.date.fromisoformat(value).isoformat()

    return Rule("a day, as in 2024-07-26", parse)


def whole(minimum: int, maximum: int = 2**31 - 1) -> Rule:
    """Return the rule for a whole number of at least ``minimum`` and at most ``maximum``."""
    words = f"a whole number, at least {minimum}" + f" and at most {maximum}" * (maximum < 2**31 - 1)

    def allows(value: Any) -> bool:
        return isinstance(value, int) and not isinstance(value, bool) and minimum <= value <= maximum

    return _that(words, allows)


def number(*, above: float | None = None, minimum: float | None = None, maximum: float | None = None) -> Rule:
    """Return the rule for a finite number; ``1e-4`` is a text in YAML (its grammar wants a dot) and is accepted."""
    bound = f"above {above:g}" if above is not None else f"at least {minimum:g}"
    bound += "" if maximum is None else f" and at most {maximum:g}"

    def parse(value: Any) -> float:
        if isinstance(value, bool) or not isinstance(value, int | float | str):
            raise ValueError
        parsed = float(value)
        low = above is not None and parsed <= above
        low = low or (minimum is not None and parsed < minimum)
        high = maximum is not None and parsed > maximum
        if low or high or not math.isfinite(parsed):
            raise ValueError
        return parsed

    return Rule(f"a finite number, {bound}", parse)


def rate() -> Rule:
    """Return the rule for a learning rate: above 0, and a number that float32 weights can be multiplied by."""
    return number(above=0, maximum=1e9)


def either(word: str, rule: Rule) -> Rule:
    """Return the rule for one fixed word, or what ``rule`` allows."""

    def parse(value: Any) -> Any:
        return word if value == word else rule.parse(value)

    return Rule(f"{rule.text}, or {word}", parse, choices=(word,))


def optional(rule: Rule) -> Rule:
    """Return the rule for null, or what ``rule`` allows."""

    def parse(value: Any) -> Any:
        return None if value is None else rule.parse(value)

    return Rule(f"{rule.text}, or null", parse, choices=rule.choices, walk=rule.walk)


def list_of(rule: Rule, *, empty: bool = False) -> Rule:
    """Return the rule for a list without repetitions and, unless ``empty``, with at least one item."""

    def parse(value: Any) -> tuple[Any, ...]:
        if not isinstance(value, list | tuple) or not (value or empty):
            raise ValueError
        items = tuple(rule.parse(item) for item in value)
        if len(set(items)) != len(items):
            raise ValueError
        return items

    def walk(key: str, value: tuple[Any, ...], visit: Visit) -> tuple[Any, ...]:
        return tuple(rule.visited(key, item, visit) for item in value)

    words = f"a list without repetitions, each item {rule.text}"
    return Rule(words, parse, choices=rule.choices, walk=walk if rule.walk else None)


def record(made: type, **fields: Rule) -> Rule:
    """Return the rule for a mapping of these fields; null ones may be left out."""

    def parse(value: Any) -> Any:
        given = vars(value) if isinstance(value, made) else value
        if not isinstance(given, Mapping) or not set(given) <= set(fields):
            raise ValueError
        return made(**{name: rule.parse(given.get(name)) for name, rule in fields.items()})

    def walk(key: str, value: Any, visit: Visit) -> Any:
        found = parse(value)  # of a run folder's record, which is taken as it is, a mapping
        visited = {name: rule.visited(key, getattr(found, name), visit) for name, rule in fields.items()}
        return dataclasses.replace(found, **visited)

    words = "; ".join(f"{name}: {rule.text}" for name, rule in fields.items())
    return Rule(f"a mapping ({words})", parse, walk=walk)


def _visited_as(kind: str, words: str = "a path") -> Rule:
    """Text that can be a path: no control characters, at most 2,048 bytes, 255 between two slashes."""

    def parse(value: Any) -> str:
        path = text().parse(value).encode()
        if len(path) > 2048 or max(map(len, path.split(b"/"))) > 255 or min(path) < 32:
            raise ValueError
        return str(value)

    return Rule(words, parse, walk=lambda key, value, visit: visit(key, value, kind))


path = partial(_visited_as, "file")  # a file, or a folder of tables, that is there; relative to the file it stands in
table = partial(_visited_as, "table")  # a table that is there: a file, a folder, or a pattern that names files
folder = partial(_visited_as, "folder")  # a folder that is there, such as a saved concept
folder_or_hub_id = partial(_visited_as, "hub", "a folder or a hub id")  # relative as a file, or something on the hub
place = partial(_visited_as, "made")  # a folder that results are kept in; it need not exist
