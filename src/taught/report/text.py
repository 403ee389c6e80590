"""Numbers and text as a reader sees them; text from data made safe to show."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from typing import Any

from taught.core.names import TargetName
from taught.core.target import words as of_target
from taught.errors import UserError, printable
from taught.stats.intervals import Interval

MINUS = "\u2212"
_SUPERSCRIPT = str.maketrans("-0123456789", "⁻⁰¹²³⁴⁵⁶⁷⁸⁹")


def clean(text: object) -> str:
    """Anything as :func:`taught.errors.printable` text. Markup stays: escaping is the renderer's job."""
    return printable(str(text))


def cleaned(value: object) -> object:
    """``clean`` applied to every string, also the keys, of a nested record."""
    if isinstance(value, str):
        return clean(value)
    if isinstance(value, dict):
        return {clean(k) if isinstance(k, str) else k: cleaned(v) for k, v in value.items()}
    if isinstance(value, list | tuple):
        return [cleaned(v) for v in value]
    return value


def shorten(text: str, limit: int) -> str:
    """At most ``limit`` characters; what is left out is counted."""
    if len(text) <= limit:
        return text
    return f"{text[:limit].rstrip()} … ({len(text) - limit:,} more characters)"


def number(value: float | None, digits: int = 2, *, power: int = 0) -> str:
    """``value / 10**power`` with a true minus sign; a dash when there is no number."""
    return _fixed(value, digits, power, sign="")


def signed(value: float | None, digits: int = 2, *, power: int = 0) -> str:
    """Like ``number`` with a sign on positive values too."""
    return _fixed(value, digits, power, sign="+")


def _fixed(value: float | None, digits: int, power: int, sign: str) -> str:
    if value is None or not math.isfinite(value):
        return "–"
    text = f"{value / 10**power:{sign},.{digits}f}"
    if float(text.replace(",", "")) == 0:
        text = text.lstrip("+-")
    return text.replace("-", MINUS)


def amount(value: float | None, power: int | None = None) -> str:
    """A signed value with its power of ten, by default its own: ``+3.10 ×10⁻⁴``."""
    power = common_power([value]) if power is None else power
    return signed(value, power=power) + tens(power)


def percent(value: float | None, digits: int = 0) -> str:
    """A share as a percentage."""
    return "–" if value is None or not math.isfinite(value) else f"{100 * value:.{digits}f}%".replace("-", MINUS)


def tens(power: int) -> str:
    """`` ×10⁻⁴`` for a power of ten, empty for 0."""
    return f"\u00a0×10{str(power).translate(_SUPERSCRIPT)}" if power else ""


def common_power(values: Iterable[float | None]) -> int:
    """The power of ten that brings the largest size into [1, 10); 0 if that is in [0.1, 1000); at least -300."""
    finite = [abs(v) for v in values if v is not None and math.isfinite(v)]
    largest = max(finite, default=0.0)
    if largest == 0 or 0.1 <= largest < 1000:
        return 0
    return max(math.floor(math.log10(largest)), -300)


def count(n: int, noun: str, plural: str | None = None) -> str:
    """``1 example``, ``2 examples``."""
    return f"{n:,} {noun if n == 1 else plural or noun + 's'}"


def words(target: str) -> str:
    """A target in words: ``behavior:harmless`` is read as ``behavior on harmless``."""
    try:
        return of_target(TargetName.parse(target))
    except UserError:  # of a method that is not installed here
        return target


def listed(items: list[str], limit: int = 3) -> str:
    """``a, b and c``; beyond ``limit`` the rest is counted."""
    if len(items) > limit:
        items = [*items[:limit], f"{len(items) - limit} more"]
    if len(items) < 2:
        return "".join(items)
    return f"{', '.join(items[:-1])} and {items[-1]}"


def read_interval(record: object) -> Interval | None:
    """A number, ``[value, lo, hi]`` or ``{value, lo, hi}``; None if it is not finite."""
    if isinstance(record, Mapping):
        return interval_of(record)
    parts = list(record) if isinstance(record, list | tuple) else [record]
    known = [float(p) if isinstance(p, int | float) and math.isfinite(p) else math.nan for p in parts]
    return Interval(*known) if known and math.isfinite(known[0]) else None


def interval_of(row: Mapping[str, Any], value: str = "value", lo: str = "lo", hi: str = "hi") -> Interval | None:
    """The interval of three columns of a row; None if it is not finite."""
    return read_interval([row.get(value), row.get(lo), row.get(hi)])


def interval_text(interval: Interval | None, digits: int = 2, *, power: int = 0) -> str:
    """``0.66 [0.61, 0.70]``; the number alone where no interval is known, a dash where there is no number."""
    if interval is None:
        return number(None)
    value, lo, hi = (number(part, digits, power=power) for part in interval)
    unknown = any(part is None or math.isnan(part) for part in (interval.lo, interval.hi))
    return value if unknown else f"{value} [{lo}, {hi}]"
