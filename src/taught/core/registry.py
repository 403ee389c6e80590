"""What a study can name: behaviors, targets, curvatures, trajectories and estimators.

A method is one class in one file. The file registers it, and everything else follows from what is
registered: the keys of a study, the help, what ``taught check`` counts, the words of an error.

    @CURVATURES.register("ekfac")
    @dataclass(frozen=True)
    class Ekfac:
        '''What it is, in one line: the help shows it.'''

        damping: float = setting(0.1, rules.number(above=0), "share of the mean eigenvalue that is added")

A package of its own registers through the entry point ``taught.plugins``, whose value is the module that does so.
"""

from __future__ import annotations

import dataclasses
import importlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cache
from importlib.metadata import EntryPoints, entry_points
from typing import Any, Generic, TypeVar, cast

from taught.core.rules import Rule
from taught.errors import UserError, did_you_mean, shown

T = TypeVar("T")
GROUP = "taught.plugins"


class Registry(Generic[T]):
    """Names of one kind of method, and the classes that they stand for.

    Parameters
    ----------
    what : the kind in one word, as errors name it
    own : name -> module of the package that registers it; imported when the name is used first
    """

    def __init__(self, what: str, own: Mapping[str, str]) -> None:
        self.what = what
        self._own = dict(own)
        self._found: dict[str, T] = {}

    def register(self, name: str) -> Callable[[T], T]:
        """Make a class known under a name; one name, one class."""

        def add(found: T) -> T:
            if name in self._found and self._found[name] is not found:
                raise ValueError(f"{self.what} {name} is registered twice")
            self._found[name] = found
            return found

        return add

    def names(self) -> tuple[str, ...]:
        """All names, the package's own first. Loads plugins, imports no method of the package."""
        for point in _plugins():
            if point.value not in _LOADED:
                _LOADED.add(point.value)
                point.load()
        return tuple(dict.fromkeys((*self._own, *self._found)))

    def get(self, name: str) -> T:
        """What a name stands for.

        Raises
        ------
        UserError
            Nothing has this name: the known ones, and the closest.
        """
        if name not in self._found and self.require(name) in self._own:
            importlib.import_module(self._own[name])
        return self._found[name]

    def module(self, name: str) -> str:
        """The module that a method is defined in; nothing of the package is imported."""
        return self._own[name] if name in self._own else str(getattr(self.get(name), "__module__", ""))

    def require(self, name: str) -> str:
        """The name, if it is known; nothing of the package is imported."""
        if name in self._own or name in self._found or name in self.names():
            return name
        raise UserError(
            f"there is no {self.what} of this name",
            value=name,
            rule="one of " + ", ".join(self.names()),
            fix=did_you_mean(name, self.names()) or "`taught init` lists them with their keys",
        )


@cache
def _plugins() -> EntryPoints:
    """What other packages register; looked up once, since every package's files are read for it."""
    return entry_points(group=GROUP)


_LOADED: set[str] = set()


def setting(default: Any, rule: Rule, doc: str) -> Any:
    """A parameter of a method: its default, what it may be, and what it means in one line."""
    return field(default=default, metadata={"rule": rule, "doc": doc})


@dataclass(frozen=True)
class Choice:
    """A method as a study names it: which, and those of its parameters that the study gives.

    It is made into the method only where it is used (:meth:`make`), so that reading a study with
    nothing but names in it imports neither torch nor the method.
    """

    kind: str
    values: Mapping[str, Any] = field(default_factory=dict)

    def make(self, registry: Registry[Any], key: str | None = None) -> Any:
        """The method, with these parameters, each checked against its rule.

        Parameters
        ----------
        key : where it stands in a study, for errors; the registry's word if None

        Raises
        ------
        UserError
            An unknown name, a parameter that the method does not have, or one that breaks its rule.
        """
        method, key = registry.get(self.kind), key or registry.what
        known = parameters(method)
        for name, value in self.values.items():
            if name not in known:
                raise UserError(
                    f"{key}: {self.kind} has no parameter {name}",
                    value=shown(value),
                    rule="its parameters: " + (", ".join(known) or "none"),
                    fix=did_you_mean(name, known) or f"leave {name} out",
                )
        given = {}
        for name, value in self.values.items():
            rule: Rule = known[name].metadata["rule"]
            try:
                given[name] = rule.parse(value)
            except (ValueError, OverflowError):
                what, fix = f"{key}.{name} is not valid", f"correct it: --set {key}.{name}=VALUE"
                raise UserError(what, value=shown(value), rule=rule.text, fix=fix) from None
        return method(**given)

    def plain(self) -> Any:
        """As YAML has it: the name alone, or a mapping with ``kind``."""
        return self.kind if not self.values else {"kind": self.kind, **self.values}


def load_function(name: str, what: str, takes: str, key: str) -> Callable[..., Any]:
    """The user's own function ``module:function``. The module is imported, so its code runs.

    Parameters
    ----------
    what, takes : what it is and what it is given, in words
    key : where a study names it

    Raises
    ------
    UserError
        No such module or function.
    """
    module, _, function = name.partition(":")
    try:
        found: Any = getattr(importlib.import_module(module), function)
    except Exception as error:  # whatever the user's module raises
        raise UserError(
            f"the {what} cannot be loaded",
            value=f"{name}: {error}",
            rule=f"module:function, importable here; it takes {takes}",
            fix=f"correct {key}, or add its folder to PYTHONPATH",
        ) from error
    if not callable(found):
        raise UserError(f"the {what} is not a function", value=name, rule="module:function", fix=f"correct {key}")
    return cast(Callable[..., Any], found)


def parameters(method: Any) -> dict[str, dataclasses.Field[Any]]:
    """The parameters of a registered method: name -> field, with ``rule`` and ``doc`` in its metadata."""
    return {item.name: item for item in dataclasses.fields(cast(Any, method)) if "rule" in item.metadata}


def _in(package: str, *names: str) -> dict[str, str]:
    """Methods that stand in a module of their own name."""
    return {name: f"taught.{package}.{name}" for name in names}


BEHAVIORS: Registry[Any] = Registry("behavior", _in("behaviors", "prefixes", "answer", "choice", "loss"))
TARGETS: Registry[Any] = Registry(
    "target",
    {
        "behavior": "taught.targets.behavior",
        "prompt": "taught.targets.behavior",
        "score": "taught.targets.policy",
        "coefficient": "taught.targets.policy",
        "concept": "taught.targets.concept",
    },
)
CURVATURES: Registry[Any] = Registry(
    "curvature",
    {
        "identity": "taught.core.curvature",
        **_in("curvatures", "adam", "ekfac", "astra", "autocorrelation", "trackstar", "trak"),
    },
)
TRAJECTORIES: Registry[Any] = Registry(
    "trajectory", {"base": "taught.core.trajectory", **_in("trajectories", "checkpoints", "steps", "segments")}
)
ESTIMATORS: Registry[Any] = Registry(
    "estimator",
    {
        "adjoint": "taught.estimators.adjoint",
        "forward": "taught.estimators.forward",
        "finite-step": "taught.estimators.finite_step",
        "sketch": "taught.sketches.estimator",
    },
)
