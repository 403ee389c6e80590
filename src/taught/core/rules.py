"""Rules for single values of a study: each one says in words what it allows, and checks it.

A rule turns what YAML or a flag gave into the value that is stored, or raises ``ValueError``; the
caller adds the key and the fix (``study.py``).
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Rule:
    """What a value must be.

    Attributes
    ----------
    text : the rule in words, as it stands in error messages
    parse : value -> the stored value; ``ValueError`` when the rule is broken
    choices : the words that are allowed, when there are only a few (for "did you mean")
    path : whether the value is a path that is resolved against the file it stands in
    """

    text: str
    parse: Callable[[Any], Any]
    choices: tuple[str, ...] = ()
    path: bool = False


def text() -> Rule:
    """Return the rule for non-empty text."""

    def parse(value: Any) -> str:
        if not isinstance(value, str) or not value.strip():
            raise ValueError
        return value

    return Rule("text, in quotes where YAML would read it as a number or yes/no", parse)


def one_of(*choices: str) -> Rule:
    """Return the rule for one word of a few."""

    def parse(value: Any) -> str:
        if not isinstance(value, str) or value not in choices:
            raise ValueError
        return value

    return Rule("one of " + ", ".join(choices), parse, choices=choices)


def flag() -> Rule:
    """Return the rule for true or false."""

    def parse(value: Any) -> bool:
        if not isinstance(value, bool):
            raise ValueError
        return value

    return Rule("true or false", parse)


def whole(minimum: int) -> Rule:
    """Return the rule for a whole number of at least ``minimum``."""

    def parse(value: Any) -> int:
        if isinstance(value, bool) or not isinstance(value, int) or value < minimum:
            raise ValueError
        return value

    return Rule(f"a whole number, at least {minimum}", parse)


def number(*, above: float | None = None, minimum: float | None = None, maximum: float | None = None) -> Rule:
    """Return the rule for a finite number.

    Numbers such as ``1e-4`` arrive from YAML as text (its grammar wants a dot) and are accepted.
    """
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


def either(word: str, rule: Rule) -> Rule:
    """Return the rule for one fixed word, or what ``rule`` allows."""

    def parse(value: Any) -> Any:
        return word if value == word else rule.parse(value)

    return Rule(f"{rule.text}, or {word}", parse, choices=(word,))


def optional(rule: Rule) -> Rule:
    """Return the rule for null, or what ``rule`` allows."""

    def parse(value: Any) -> Any:
        return None if value is None else rule.parse(value)

    return Rule(f"{rule.text}, or null", parse, choices=rule.choices, path=rule.path)


def list_of(rule: Rule) -> Rule:
    """Return the rule for a list without repetitions and with at least one item."""

    def parse(value: Any) -> tuple[Any, ...]:
        if not isinstance(value, list | tuple) or not value:
            raise ValueError
        items = tuple(rule.parse(item) for item in value)
        if len(set(items)) != len(items):
            raise ValueError
        return items

    return Rule(f"a list without repetitions, each item {rule.text}", parse)


def record(made: type, **fields: Rule) -> Rule:
    """Return the rule for a mapping of these fields; null ones may be left out."""

    def parse(value: Any) -> Any:
        given = vars(value) if isinstance(value, made) else value
        if not isinstance(given, Mapping) or not set(given) <= set(fields):
            raise ValueError
        return made(**{name: rule.parse(given.get(name)) for name, rule in fields.items()})

    words = "; ".join(f"{name}: {rule.text}" for name, rule in fields.items())
    return Rule(f"a mapping ({words})", parse)


def path() -> Rule:
    """Return the rule for a file or folder; relative ones are resolved against their file."""
    inner = text()
    return Rule("a path", inner.parse, path=True)
