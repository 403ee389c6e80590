"""What ``taught init`` writes: every key with its default and its meaning, methods' parameters too.

Made of the schema and of the registered methods, so that a new method stands there by itself.
"""

from __future__ import annotations

import dataclasses
import textwrap
from collections.abc import Iterator
from dataclasses import MISSING
from typing import Any, cast

import yaml

from taught.core.registry import Choice, Registry, parameters
from taught.study.schema import Study, plain

HEAD = """\
# A study: one question about one model. Every value below is the default; delete what you keep.
# A relative path is relative to this file. `taught check study.yaml` says what would run.
"""
COLUMN, WIDTH = 40, 118
Field = dataclasses.Field[Any]


def template() -> str:
    """The commented study, as YAML. Imports every registered method."""
    parts = ["\n".join(_top(item)) for item in dataclasses.fields(Study)]
    return HEAD + "\n\n".join(parts) + "\n"


def _top(item: Field) -> Iterator[str]:
    meta = item.metadata
    if "registry" in meta:
        yield from _method(item, "")
    elif "each" in meta:
        yield from _line(f"{item.name}: []", meta["doc"])
        yield "#   - name: my-concept"
        yield from (f"# {line}" for part in dataclasses.fields(meta["each"])[1:] for line in _value(part, "    "))
    elif "section" not in meta:
        yield from _value(item, "")
    elif item.default is None:
        yield from _line(f"{item.name}: null", meta["doc"])
        yield f"# {item.name}:"
        yield from (f"# {line}" for part in dataclasses.fields(meta["section"]) for line in _value(part, "  "))
    else:
        yield from _line(f"{item.name}:", meta["doc"])
        for part in dataclasses.fields(meta["section"]):
            yield from _method(part, "  ") if "registry" in part.metadata else _value(part, "  ")


def _method(item: Field, indent: str) -> Iterator[str]:
    """The default method and its parameters; the others' as comments."""
    registry: Registry[Any] = item.metadata["registry"]
    default, names = cast(Choice, item.default).kind, registry.names()
    yield from _line(f"{indent}{item.name}:", item.metadata["doc"])
    yield from _line(f"{indent}  kind: {default}", " | ".join(names))
    for part in parameters(registry.get(default)).values():
        yield from _value(part, f"{indent}  ")
    for name in names:
        known = parameters(registry.get(name))
        if known and name != default:
            yield f"{indent}  # kind: {name}"
            yield from (f"{indent}  # {line}" for part in known.values() for line in _value(part, ""))


def _value(item: Field, indent: str) -> Iterator[str]:
    value = "..."
    if item.default is not MISSING:
        text = yaml.safe_dump(plain(item.default), default_flow_style=True, allow_unicode=True, width=10**6)
        value = text.removesuffix("...\n").strip()
    yield from _line(f"{indent}{item.name}: {value}", item.metadata["doc"])


def _line(text: str, doc: str) -> Iterator[str]:
    """A line and its comment, which goes on below itself where it is long."""
    first, *rest = textwrap.wrap(" ".join(doc.split()), WIDTH - max(COLUMN, len(text) + 2) - 2) or [""]
    yield f"{text.ljust(COLUMN - 1)} # {first}" if first else text
    yield from (f"{'':{COLUMN - 1}} # {line}" for line in rest)
