"""Parameters of methods that do not declare them themselves yet."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

from taught.core import rules
from taught.core.registry import BEHAVIORS, CURVATURES, ESTIMATORS, TARGETS, TRAJECTORIES, Choice, Registry, setting


@dataclass(frozen=True)
class Plain:
    """Without parameters."""


@dataclass(frozen=True)
class Prefixes:
    """Log of the summed probability of these beginnings of a response."""

    prefixes: tuple[str, ...] = setting(
        ("I can't", "I cannot", "I'm sorry"), rules.list_of(rules.text()), "beginnings of a response that show it"
    )


@dataclass(frozen=True)
class Adam:
    """Each step divided by sqrt(v) + eps."""

    moments: str | None = setting(None, rules.optional(rules.path()), "safetensors of v by parameter name")
    eps: float = setting(1e-8, rules.number(above=0), "beside sqrt(v)")
    batch: int = setting(1, rules.whole(1), "examples a step of the training that v is estimated for")


@dataclass(frozen=True)
class Damped:
    """The curvature of the loss."""

    damping: float = setting(0.1, rules.number(above=0), "share of the mean eigenvalue that is added")


@dataclass(frozen=True)
class Checkpoint:
    """Weights that a training run passed through, and its learning rate there."""

    id: str
    lr: float
    revision: str | None = None


_CHECKPOINT = rules.record(
    Checkpoint, id=rules.folder_or_hub_id(), lr=rules.number(above=0), revision=rules.optional(rules.text())
)


@dataclass(frozen=True)
class Checkpoints:
    """Effects summed over the checkpoints of a training run."""

    checkpoints: tuple[Checkpoint, ...] = setting(
        (), rules.list_of(_CHECKPOINT), "[{id: folder or hub id, lr: 2.0e-5}, ...]"
    )


@dataclass(frozen=True)
class Sketch:
    """Inner products of random projections that are kept."""

    store: str | None = setting(None, rules.optional(rules.place()), "folder, kept and grown; null: in the run folder")
    dim: int = setting(16384, rules.whole(64), "numbers a sketch has; the error falls as 1 / sqrt(dim)")
    error: float | None = setting(
        None, rules.optional(rules.number(above=0)), "instead of dim: a standard error over |gradient| |query|"
    )
    seed: int = setting(0, rules.whole(0), "of the projection")
    sample: int = setting(8, rules.whole(1), "so many examples are computed exactly too, to measure the error")

    @property
    def size(self) -> int:
        """K: ``dim``, or the least multiple of 64 with 1 / sqrt(K) at most ``error``."""
        return self.dim if self.error is None else 64 * max(1, math.ceil(1 / self.error**2 / 64))


class _Kind:
    def __init__(self, spelling: str, instance: str, pathways: bool, about: str) -> None:
        self.spelling, self.instance, self.pathways, self.about = spelling, instance, pathways, about


_KNOWN: list[tuple[Registry[Any], dict[str, Any]]] = [
    (BEHAVIORS, {"prefixes": Prefixes, "answer": Plain, "choice": Plain, "loss": Plain}),
    (CURVATURES, {"identity": Plain, "adam": Adam, "ekfac": Damped, "autocorrelation": Damped}),
    (TRAJECTORIES, {"base": Plain, "checkpoints": Checkpoints}),
    (ESTIMATORS, {"adjoint": Plain, "forward": Plain, "finite-step": Plain, "sketch": Sketch}),
    (
        TARGETS,
        {
            "behavior": _Kind("behavior or behavior:GROUP", "behavior:harmless", False, "optional"),
            "prompt": _Kind("prompt:ID", "prompt:p12", False, "needed"),
            "score": _Kind("score, score:x or score:y", "score", True, "none"),
            "coefficient": _Kind("coefficient:FEATURE", "coefficient:17", True, "needed"),
            "concept": _Kind("concept:NAME", "concept:refusal", False, "needed"),
        },
    ),
]


def known(registry: Registry[Any], name: str) -> Any:
    """The registered method; one that registers nothing itself yet stands here."""
    try:
        return registry.get(name)
    except (ModuleNotFoundError, KeyError):
        method = next(own for some, own in _KNOWN if some is registry)[name]
        return registry.register(name)(method)


def made(choice: Choice, registry: Registry[Any]) -> Any:
    """The method with its parameters."""
    return known(registry, choice.kind)(**choice.values)
