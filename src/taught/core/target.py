"""Targets: the questions asked of an example, as functionals of the read-outs with their cotangents.

A training step changes a target F by, to first order,

    dF = sum_ik A_ik dX_ik + sum_i B_i dy_i,    A = dF/dX [N, d],  B = dF/dy [N]

with A and B constants of the readings at the base weights. An estimator turns A and B into one query
gradient; it need not know which question it answers. Sign: positive, the step raises the target.

A kind of target is one class (:class:`TargetKind`), registered in ``TARGETS``. A :class:`TargetSet`
is the targets of one run on readings of one place of the model.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, ClassVar, Literal

import numpy as np
from numpy.typing import ArrayLike, NDArray

from taught.core.names import EVERY, TargetName
from taught.core.readings import Moves, Readings
from taught.core.registry import TARGETS
from taught.errors import UserError, refuse
from taught.policy.ridge import Shift, coefficient_shift

if TYPE_CHECKING:
    from torch import Tensor

Floats = NDArray[np.float64]
Cotangents = tuple[Floats | None, Floats | None]


class TargetKind:
    """One kind of target: what its names look like, its value, and its cotangents.

    Attributes
    ----------
    about : whether a name is needed behind the kind
    pathways : whether it acts along pathway x (features) and y (output), each of which can be asked for
    reads : what it is a functional of
    rows : whether ``kind:*`` gives rows of the table of scores; else it asks for the change on every prompt
        (``TargetSet.every_prompt``), which is kept as a matrix
    many : whether a run has one for each feature or prompt, too many for a column each
    spelling, instance : how it is written, and an example, for errors and help
    """

    about: ClassVar[Literal["none", "needed", "optional"]] = "needed"
    pathways: ClassVar[bool] = False
    reads: ClassVar[Literal["behavior", "policy", "concepts"]] = "behavior"
    many: ClassVar[bool] = False
    rows: ClassVar[bool] = True
    spelling: ClassVar[str] = ""
    instance: ClassVar[str] = ""

    def every(self, readings: Readings) -> list[str | None]:
        """What ``kind:*`` stands for, in order."""
        raise NotImplementedError

    def value(self, name: TargetName, readings: Readings, base: Readings) -> float:
        """F at some readings; ``base`` are those of the base weights, which constants come from."""
        raise NotImplementedError

    def cotangents(self, name: TargetName, readings: Readings) -> Cotangents:
        """A [N, d] and B [N] at the base readings; None stands for zero."""
        raise NotImplementedError

    def cotangents_at(self, name: TargetName, readings: Readings, base: Readings) -> Cotangents:
        """A and B of :meth:`value` at readings that are not those of the base weights."""
        return self.cotangents(name, readings)

    def combine(self, name: TargetName, readings: Readings, moves: Moves) -> Floats | None:
        """The change by each example, [P], from the sums of ``moves``; None: from the cotangents only."""
        return None

    def resampled(
        self, name: TargetName, readings: Readings, dy: Floats, dX: Floats | None, counts: NDArray[np.int64]
    ) -> Floats | str:
        """Values [R, P] on R resamples of the prompts, from the change of every prompt (and of every feature).

        Parameters
        ----------
        dy : [P, N]
        dX : [P, N, d] or None where it is not known
        counts : [R, N], how often each prompt is drawn

        Returns
        -------
        The values, or in a sentence why there are none.
        """
        return "what this target is on other prompts is not known"

    def words(self, name: TargetName) -> str:
        """The target in words, for the report."""
        return str(name)


def kind_of(name: TargetName) -> TargetKind:
    """The kind of a target."""
    found: TargetKind = TARGETS.get(name.kind)
    return found


def words(name: TargetName) -> str:
    """A target in words, a contrast too."""
    return " minus ".join(kind_of(part).words(part) for part in name.parts)


def value(name: TargetName | str, readings: Readings, base: Readings) -> float:
    """F of a target, or of a contrast, at some readings."""
    name = TargetName.parse(name) if isinstance(name, str) else name
    signs = (1.0, -1.0)
    return sum(sign * kind_of(part).value(part, readings, base) for sign, part in zip(signs, name.parts, strict=False))


@dataclass(frozen=True, eq=False)
class TargetSet:
    """Targets on readings of one place of the model.

    Attributes
    ----------
    names : T targets
    readings : at the weights that the question is asked at
    base : at the base weights, which constants of a target come from; None: the same
    every_prompt : whether the change on every prompt is wanted too (``Scores.details["dy"]``)
    """

    names: tuple[TargetName, ...]
    readings: Readings
    every_prompt: bool = False
    base: Readings | None = None

    @classmethod
    def of(cls, wanted: Iterable[TargetName | str], readings: Readings) -> TargetSet:
        """Targets by name; ``kind:*`` stands for all, and a kind with pathways is asked along each too.

        Raises
        ------
        UserError
            An unknown target; one that needs features or concepts where none are read; none at all.
        """
        found: dict[str, TargetName] = {}
        every_prompt = False
        for name in wanted:
            name = TargetName.parse(name) if isinstance(name, str) else name
            if name.about == EVERY and not kind_of(name).rows:
                every_prompt = True
                continue
            for one in expand(name, readings):
                found[str(one)] = one
        if not found:
            raise UserError(
                "no target gives each example a value",
                value="prompt:*" if every_prompt else "none",
                rule="prompt:* is the change on every prompt, which is kept beside other targets",
                fix="ask for a behavior too: --set attribution.targets=[behavior:*]",
            )
        return cls(tuple(found.values()), readings, every_prompt)

    def select(self, names: Sequence[TargetName]) -> TargetSet:
        """Some of these targets."""
        return replace(self, names=tuple(names), every_prompt=self.every_prompt and len(names) == len(self.names))

    def at(self, readings: Readings) -> TargetSet:
        """The same targets of a model that was trained further: readings of the same prompts and columns."""
        return replace(self, readings=readings, base=self.base or self.readings)

    @cached_property
    def direct(self) -> tuple[TargetName, ...]:
        """Targets that a query is needed for: not those whose two pathways are asked for as well."""
        asked = set(map(str, self.names))
        whole = [n for n in self.names if n.pathway is None and n.minus is None and kind_of(n).pathways]
        summed = {n for n in whole if {str(n.along("x")), str(n.along("y"))} <= asked}
        return tuple(n for n in self.names if n not in summed)

    def from_direct(self, values: ArrayLike) -> Floats:
        """Values [P, T] of all targets from those of the direct ones."""
        values = np.asarray(values, dtype=np.float64)
        column = {str(name): k for k, name in enumerate(self.direct)}
        parts = []
        for name in self.names:
            if str(name) in column:
                parts.append(values[:, column[str(name)]])
            else:
                parts.append(values[:, column[str(name.along("x"))]] + values[:, column[str(name.along("y"))]])
        return np.stack(parts, 1) if parts else np.zeros((len(values), 0))

    def cotangents(self, names: Sequence[TargetName] | None = None) -> tuple[Tensor | None, Tensor | None]:
        """A [K, N, d] and B [K, N] of some targets (the direct ones), float64; None where all are zero."""
        import torch

        found = [self._cotangents(name) for name in (self.direct if names is None else names)]
        A = B = None
        if self.readings.X is not None and any(a is not None for a, _ in found):
            zero = np.zeros_like(self.readings.X)
            A = torch.from_numpy(np.stack([zero if a is None else a for a, _ in found]))
        if any(b is not None for _, b in found):
            zeros = np.zeros(self.readings.n)
            B = torch.from_numpy(np.stack([zeros if b is None else b for _, b in found]))
        return A, B

    def _cotangents(self, name: TargetName) -> Cotangents:
        total: list[Floats | None] = [None, None]
        for sign, part in zip((1.0, -1.0), name.parts, strict=False):
            kind = kind_of(part)
            at = self.readings
            found = kind.cotangents(part, at) if self.base is None else kind.cotangents_at(part, at, self.base)
            for k, one in enumerate(found):
                if one is not None:
                    before = total[k]
                    total[k] = sign * one if before is None else before + sign * one
        return total[0], total[1]

    def changes(self, dX: ArrayLike | None, dy: ArrayLike) -> Floats:
        """Change of every target [T] when X moves by dX [N, d] and y by dy [N]."""
        policy, dy = self.readings.policy, np.asarray(dy, dtype=np.float64)
        shift = None
        if policy is not None and dX is not None:
            one = coefficient_shift(policy, dX, dy)
            shift = Shift(one.x[None], one.y[None])
        summed = self.combinable
        values = dict(zip(summed, self.combine(Moves(dy[None], shift), summed)[0], strict=True)) if summed else {}
        rest = [name for name in self.names if name not in values]
        if rest:
            A, B = self.cotangents(rest)
            total = np.zeros(len(rest))
            if A is not None and dX is not None:
                total += np.tensordot(A.numpy(), np.asarray(dX, dtype=np.float64), axes=2)
            if B is not None:
                total += B.numpy() @ dy
            values |= dict(zip(rest, total, strict=True))
        return np.array([values[name] for name in self.names])

    @cached_property
    def combinable(self) -> tuple[TargetName, ...]:
        """Targets that follow from the changes of every prompt and coefficient (:class:`Moves`)."""
        policy = self.readings.policy
        empty = None if policy is None else np.zeros((0, policy.d))
        none = Moves(np.zeros((0, self.readings.n)), None if empty is None else Shift(empty, empty))
        return tuple(n for n in self.names if self._combined(n, none) is not None)

    def combine(self, moves: Moves, names: Sequence[TargetName] | None = None) -> Floats:
        """Changes [P, T] of the targets (those that follow from it) from sums over prompts."""
        parts = [self._combined(name, moves) for name in (self.names if names is None else names)]
        return np.stack([part for part in parts if part is not None], 1)

    def _combined(self, name: TargetName, moves: Moves) -> Floats | None:
        parts = [kind_of(part).combine(part, self.readings, moves) for part in name.parts]
        if any(part is None for part in parts):
            return None
        first, *rest = [part for part in parts if part is not None]
        return first - rest[0] if rest else first


def expand(name: TargetName, readings: Readings) -> list[TargetName]:
    """The targets that a name stands for.

    Raises
    ------
    UserError
        The target needs features or concepts, and none are read; the name of a group, feature or concept means another.
    """
    for part in name.parts:
        reads = kind_of(part).reads
        if reads == "policy" and readings.policy is None:
            raise UserError(
                f"{part.kind} is about a policy, and this run has none",
                value=str(part),
                rule="a policy is written in the features of an SAE",
                fix="set sae.path, or ask for a behavior: --set attribution.targets=[behavior:*]",
            )
        if reads == "concepts" and (readings.X is None or readings.policy is not None):
            raise UserError(
                "no concept is read here",
                value=str(part),
                rule="a concept is a direction that the study names under concepts",
                fix="add it: concepts: [{name: NAME, source: difference}]",
            )
    if name.minus is not None:
        return [name]
    kind = kind_of(name)
    if name.about == EVERY:
        singles = [TargetName(name.kind, about, name.pathway) for about in kind.every(readings)]
        refuse(
            [str(one) for one in singles if one.about == EVERY or TargetName.parse(str(one)) != one],
            "a name in the data reads as another target",
            rule="a group is not *, ends in no blank, and holds no contrast such as a - behavior:b",
            fix="rename it",
        )
    else:
        kind.cotangents(name, readings)  # an unknown group, feature or concept says so here
        singles = [name]
    if not kind.pathways or name.pathway is not None:
        return singles
    return [one.along(pathway) for one in singles for pathway in (None, "x", "y")]
