"""A study as a file: YAML in, YAML out, and the commented file that ``taught init`` writes."""

from __future__ import annotations

import os
from collections import Counter
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from taught.core.yaml_text import DEPTH, ShallowLoader
from taught.errors import UserError, did_you_mean, shown
from taught.presets import list_presets, preset_path
from taught.study.schema import Study


def load_study(source: str | Path) -> Study:
    """Read a study.

    Parameters
    ----------
    source : a YAML file, a folder that holds ``study.yaml`` (such as a run folder), or the name of a preset

    Raises
    ------
    UserError
        No such file or preset, not YAML, an unknown key, a value that breaks its rule.
    """
    path, presets = Path(os.path.expanduser(source)), list_presets()
    file = next((file for file in (path, path / "study.yaml") if os.path.isfile(file)), None)  # False of no name
    if file is None and str(source) not in presets:
        raise UserError(
            "no such study",
            value=str(source),
            rule="a YAML file, a folder with study.yaml, or a preset: " + ", ".join(presets),
            fix=did_you_mean(str(source), presets, 0.6) or "`taught init` writes a study to start from",
        )
    file = file or preset_path(str(source)) / "study.yaml"
    try:
        with open(file, "rb") as opened:
            text = opened.read(_LONGEST + 1).decode()
        content = parse_yaml(text)
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read", value=str(error)) from None
    except ValueError as error:
        fix = "correct the line that is named" if "line" in str(error) else None
        raise UserError(f"{file} is not valid YAML", value=str(error), fix=fix) from None
    return study_from_dict({} if content is None else content, file.resolve().parent)


def parse_yaml(text: str) -> Any:
    """Plain values of a YAML text.

    Raises
    ------
    ValueError
        It is no YAML, names a type of Python, says a key twice, or is larger, deeper or (with what its aliases
        repeat) longer than any study.
    """
    if len(text) > _LONGEST:
        raise ValueError(f"longer than {_LONGEST:,} bytes")
    try:
        loader = _UniqueKeyLoader(text)
        node = loader.get_single_node()
        if node is None:
            return None
        _count(node, {})
        return loader.construct_document(node)
    except yaml.YAMLError as error:
        raise ValueError(str(error)) from None
    except RecursionError:
        raise ValueError("nested too deeply") from None
    except (LookupError, AttributeError, TypeError, ArithmeticError) as error:  # of a value that is not of its tag
        raise ValueError(f"a value is not of its type: {error}") from None


_LONGEST = 2**18  # bytes of a study
_VALUES = 100_000


def _count(node: yaml.Node, sizes: dict[int, int], depth: int = 0) -> int:
    """Values below a node, each as often as aliases repeat it; ValueError where there are too many."""
    if sizes.setdefault(id(node), -1) >= 0:
        return sizes[id(node)]
    children = node.value if isinstance(node, yaml.SequenceNode) else []
    if isinstance(node, yaml.MappingNode):
        children = [part for pair in node.value for part in pair]
    if depth > DEPTH:
        raise ValueError("a value holds itself")
    sizes[id(node)] = 1 + sum(_count(child, sizes, depth + 1) for child in children)
    if sizes[id(node)] > _VALUES:
        raise ValueError(f"more than {_VALUES:,} values, with those that aliases repeat")
    return sizes[id(node)]


def study_from_dict(content: object, base: Path) -> Study:
    """Build a study from nested mappings; relative paths are resolved against ``base``."""
    return Study.from_dict(content).resolved(base)


def dump_study(study: Study) -> str:
    """Return the study as YAML, every key but the defaults of methods' parameters; ``load_study`` gives it back."""
    return yaml.safe_dump(study.to_dict(), sort_keys=False, allow_unicode=True, width=100)


class _UniqueKeyLoader(ShallowLoader):
    """Loader that refuses a key that stands twice (YAML itself would keep the last one)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        said = [self.construct_object(of) for of, _ in node.value if of.tag != "tag:yaml.org,2002:merge"]
        keys = Counter(key for key in said if isinstance(key, Hashable))
        if twice := [key for key, count in keys.items() if count > 1]:
            raise yaml.constructor.ConstructorError(
                None, None, f"the key {shown(twice[0])!r} stands twice", node.start_mark
            )
        return super().construct_mapping(node, deep)
