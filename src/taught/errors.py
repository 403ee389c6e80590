"""What went wrong, with which value, the rule, and the fix.

Every error that a user can cause is a :class:`UserError` and ends a command with exit code 2 and no
traceback. Anything else is a defect of ours and ends with exit code 1.
"""

from __future__ import annotations

import difflib
import errno
import reprlib
import unicodedata
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager


class TaughtError(Exception):
    """Base class of all errors raised on purpose by this package."""

    exit_code = 1


class UserError(TaughtError):
    """A mistake in what the user gave: what, the value, the rule, the fix (at most four lines).

    Names and values come from data: in the message line feeds of a part become spaces, and what could steer a
    terminal U+FFFD.

    Parameters
    ----------
    what : what is wrong, in one sentence, without a trailing full stop
    value : the offending value, shown with ``repr`` and shortened to 200 characters
    rule : the rule that the value breaks
    fix : what to type or change
    """

    exit_code = 2

    def __init__(self, what: str, *, value: object = None, rule: str | None = None, fix: str | None = None) -> None:
        self.what, self.value, self.rule, self.fix = what, value, rule, fix
        parts = {"  value: ": value if value is None else shown(value), "  rule:  ": rule, "  fix:   ": fix}
        lines = [head + _line(text, _LONGEST) for head, text in parts.items() if text is not None]
        super().__init__("\n".join([_line(what, _LONGEST), *lines]))


_LONGEST = 4000  # of a part of a message; names in it may come from a file


def out_of_memory(error: BaseException) -> bool:
    """Whether an error says that memory ran out: Python's, the system's, CUDA's, torch's allocator's, oneDNN's."""
    if isinstance(error, OSError):
        return error.errno == errno.ENOMEM
    said = ("out of memory", "allocate memory", "could not create a primitive", "can't start new thread")
    known = isinstance(error, RuntimeError) and any(text in str(error) for text in said)
    return known or isinstance(error, MemoryError)


def printable(text: str) -> str:
    """The text without control characters, lone surrogates, further line ends and overrides of direction.

    They become U+FFFD: a terminal obeys what it is sent, and text from data is sent there. Tab and line feed stay.
    """
    if text.isascii() and text.isprintable():
        return text
    steering = (char for char in set(text) if unicodedata.category(char) in ("Cc", "Cs", "Zl", "Zp"))
    bad = {*steering, *_DIRECTIONS} - {"\n", "\t"}
    return text.translate(dict.fromkeys(map(ord, bad), "\N{REPLACEMENT CHARACTER}"))


_DIRECTIONS = "\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"


def shown(value: object, limit: int = 200) -> str:
    """A value in one line of at most so many characters, whatever it is: text as it is, others with ``repr``."""
    return _line(value if isinstance(value, str) else _Brief(limit).repr(value), limit)


def _line(text: str, limit: int) -> str:
    text = printable(text[: limit + 1]).replace("\n", " ")
    return text if len(text) <= limit else text[: limit - 1] + "…"


class _Brief(reprlib.Repr):
    """``repr`` of a part: a value that refers to itself many times has no end that is worth waiting for."""

    def __init__(self, limit: int) -> None:
        super().__init__()
        self.maxlevel, self.maxlist, self.maxtuple, self.maxdict, self.maxset = 4, limit, limit, limit, limit
        self.maxstring = self.maxother = 10 * limit
        self._left = 4 * limit

    def repr1(self, x: object, level: int) -> str:
        """Of one item, while there is room."""
        self._left -= 1
        return "…" if self._left < 0 else super().repr1(x, level)

    def repr_int(self, x: int, level: int) -> str:
        """Of a number that Python may be too careful to write out."""
        return repr(x) if x.bit_length() < 1000 else f"a number of {x.bit_length()} bits"

    def repr_dict(self, x: Mapping[object, object], level: int) -> str:
        """In the order of the keys, as they were given."""
        if level <= 0:
            return "{…}"
        parts = [f"{self.repr1(k, level - 1)}: {self.repr1(v, level - 1)}" for k, v in [*x.items()][: self.maxdict]]
        return "{" + ", ".join(parts) + ", …" * (len(x) > self.maxdict) + "}"


def did_you_mean(name: object, known: Iterable[str], cutoff: float = 0.5) -> str | None:
    """The known name that is closest, as a fix; None where none is close."""
    close = difflib.get_close_matches(shown(name), list(known), n=1, cutoff=cutoff)
    return f"did you mean {close[0]}?" if close else None


def refuse(bad: Sequence[object], what: str, *, rule: str | None = None, fix: str | None = None) -> None:
    """Raise a UserError that names the first few of what is bad, if anything is."""
    if bad:
        more = f" and {len(bad) - 8} more" if len(bad) > 8 else ""
        raise UserError(what, value=", ".join(map(str, bad[:8])) + more, rule=rule, fix=fix)


def refuse_repeated(ids: Iterable[object], what: str) -> None:
    """Raise a UserError that names the ids that stand more than once, if any do."""
    counts = Counter(ids)
    refuse([name for name, count in counts.items() if count > 1], f"{what} repeats", rule="each stands once")


@contextmanager
def reading(
    what: str,
    source: object,
    errors: tuple[type[Exception], ...] = (OSError, ValueError),
    *,
    rule: str | None = None,
    fix: str | None = None,
) -> Iterator[None]:
    """What goes wrong inside while a source is read, as a UserError that names it."""
    try:
        yield
    except errors as error:
        raise UserError(what, value=f"{source}: {error}", rule=rule, fix=fix) from error


def misfit(what: str, rule: str, **given: object) -> UserError:
    """The error for things of which there are not as many as of others: arrays (by shape), lists, numbers."""

    def size(value: object) -> object:
        shape = getattr(value, "shape", None)
        return list(shape) if shape else len(value) if isinstance(value, Sized) else value

    parts = (f"{name} {size(value)}" for name, value in given.items())
    return UserError(f"{what} do not fit together", value=", ".join(parts), rule=rule)
