"""Names of targets: the one spelling, parsed and printed here.

    score                       the policy's score S, both pathways together
    score:x                     along the pathway of feature activation
    coefficient:17              one coefficient of the policy; coefficient:17:y along one pathway
    behavior                    mean behavior over all prompts
    behavior:harmless           over a group, or a category, of prompts
    prompt:p12                  behavior on one prompt
    concept:refusal             mean read-out of a concept
    behavior:a - behavior:b     a contrast of two targets

What stands behind the kind is a name and may hold colons; only kinds with pathways end in ``:x`` or
``:y``. ``*`` in its place stands for every one that a run has (``behavior:*``).
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Any

from taught.core.registry import TARGETS
from taught.errors import UserError

PATHWAYS = ("x", "y")
MINUS = " - "
EVERY = "*"


@dataclass(frozen=True)
class TargetName:
    """What a value is about.

    Attributes
    ----------
    kind : a registered kind of target, such as ``score`` or ``behavior``
    about : which one: a feature id, a group, a prompt, a concept; None where the kind says it all
    pathway : "x" (feature activation), "y" (output probability), or None for both together
    minus : the target that is taken off, in a contrast
    """

    kind: str
    about: str | None = None
    pathway: str | None = None
    minus: TargetName | None = None

    @classmethod
    def parse(cls, text: str) -> TargetName:
        """Read a name.

        Raises
        ------
        UserError
            An unknown kind; something is missing behind it, or stands where nothing belongs.
        """
        for sign in re.finditer(f"(?={MINUS})", text):
            right = text[sign.start() + len(MINUS) :]
            if right.partition(":")[0] in TARGETS.names():  # else the sign is a part of a name
                left = _single(text[: sign.start()], text)
                return cls(left.kind, left.about, left.pathway, _single(right, text))
        return _single(text, text)

    def __str__(self) -> str:
        parts = [part for part in (self.kind, self.about, self.pathway) if part is not None]
        return ":".join(parts) + ("" if self.minus is None else f"{MINUS}{self.minus}")

    @property
    def parts(self) -> tuple[TargetName, ...]:
        """The target itself, or both sides of a contrast."""
        if self.minus is None:
            return (self,)
        return (TargetName(self.kind, self.about, self.pathway), self.minus)

    def along(self, pathway: str | None) -> TargetName:
        """The same target along one pathway, or both."""
        return TargetName(self.kind, self.about, pathway, self.minus)


def _single(text: str, whole: str) -> TargetName:
    head, colon, about = text.strip().partition(":")
    kind: Any = TARGETS.get(head)
    pathway = None
    if kind.pathways:
        rest, cut, last = about.rpartition(":")
        if last in PATHWAYS:
            about, pathway = rest if cut else "", last
    missing = kind.about == "needed" and not about
    if missing or (kind.about == "none" and about) or (colon and not about and pathway is None):
        what, fix = f"{head} does not name a target like this", f"for example: {kind.instance}"
        raise UserError(what, value=whole, rule=kind.spelling, fix=fix)
    return TargetName(head, about or None, pathway)
