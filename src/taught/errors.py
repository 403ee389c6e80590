"""What went wrong, with which value, the rule, and the fix.

Every error that a user can cause is a :class:`UserError` and ends a command with exit code 2 and no
traceback. Anything else is a defect of ours and ends with exit code 1.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence, Sized


class TaughtError(Exception):
    """Base class of all errors raised on purpose by this package."""

    exit_code = 1


class UserError(TaughtError):
    """A mistake in what the user gave: what, the value, the rule, the fix (at most four lines).

    Parameters
    ----------
    what
        What is wrong, in one sentence, without a trailing full stop.
    value
        The offending value, shown with ``repr`` and shortened to 200 characters.
    rule
        The rule that the value breaks.
    fix
        What to type or change.
    """

    exit_code = 2

    def __init__(self, what: str, *, value: object = None, rule: str | None = None, fix: str | None = None) -> None:
        self.what, self.value, self.rule, self.fix = what, value, rule, fix
        lines = [what]
        if value is not None:
            lines.append(f"  value: {_short(value)}")
        if rule is not None:
            lines.append(f"  rule:  {rule}")
        if fix is not None:
            lines.append(f"  fix:   {fix}")
        super().__init__("\n".join(lines))


def _short(value: object, limit: int = 200) -> str:
    text = value if isinstance(value, str) else repr(value)
    text = text.replace("\n", " ")
    return text if len(text) <= limit else text[: limit - 1] + "…"


def refuse(bad: Sequence[object], what: str, *, rule: str | None = None, fix: str | None = None) -> None:
    """Raise a UserError that names the first few of what is bad, if anything is."""
    if bad:
        shown = ", ".join(map(str, bad[:8]))
        more = f" and {len(bad) - 8} more" if len(bad) > 8 else ""
        raise UserError(what, value=shown + more, rule=rule, fix=fix)


def refuse_repeated(ids: Iterable[object], what: str) -> None:
    """Raise a UserError that names the ids that stand more than once, if any do."""
    counts = Counter(ids)
    refuse([name for name, count in counts.items() if count > 1], f"{what} repeats", rule="each stands once")


def misfit(what: str, rule: str, **given: object) -> UserError:
    """The error for things of which there are not as many as of others: arrays (by shape), lists, numbers."""

    def size(value: object) -> object:
        shape = getattr(value, "shape", None)
        return list(shape) if shape else len(value) if isinstance(value, Sized) else value

    parts = (f"{name} {size(value)}" for name, value in given.items())
    return UserError(f"{what} do not fit together", value=", ".join(parts), rule=rule)
