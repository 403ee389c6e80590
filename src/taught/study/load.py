"""A study as a file: YAML in, YAML out, and the commented file that ``taught init`` writes."""

from __future__ import annotations

import difflib
from collections.abc import Hashable
from pathlib import Path
from typing import Any

import yaml

from taught.errors import UserError
from taught.presets import list_presets, preset_path
from taught.study.schema import Study

__all__ = ["dump_study", "load_study", "study_from_dict"]


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
    file = _find_study(source)
    try:
        content = yaml.load(file.read_text(encoding="utf-8"), Loader=_UniqueKeyLoader)
    except yaml.YAMLError as error:
        raise UserError(f"{file} is not valid YAML", value=str(error), fix="correct the line that is named") from None
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{file} cannot be read", value=str(error)) from None
    return study_from_dict({} if content is None else content, file.resolve().parent)


def study_from_dict(content: object, base: Path) -> Study:
    """Build a study from nested mappings; relative paths are resolved against ``base``."""
    return Study.from_dict(content).resolved(base)


def dump_study(study: Study) -> str:
    """Return the study as YAML, every key but the defaults of methods' parameters; ``load_study`` gives it back."""
    return yaml.safe_dump(study.to_dict(), sort_keys=False, allow_unicode=True, width=100)


def _find_study(source: str | Path) -> Path:
    path = Path(source).expanduser()
    for candidate in (path, path / "study.yaml"):
        if candidate.is_file():
            return candidate
    if str(source) in list_presets():
        return preset_path(str(source)) / "study.yaml"
    close = difflib.get_close_matches(str(source), list_presets(), n=1)
    raise UserError(
        "no such study",
        value=str(source),
        rule="a YAML file, a folder with study.yaml, or a preset: " + ", ".join(list_presets()),
        fix=f"did you mean {close[0]}?" if close else "`taught init` writes a study to start from",
    )


class _UniqueKeyLoader(yaml.SafeLoader):
    """SafeLoader that refuses a key that stands twice (YAML itself would keep the last one)."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Hashable, Any]:
        keys = [self.construct_object(key) for key, _ in node.value]
        twice = {key for key in keys if isinstance(key, Hashable) and keys.count(key) > 1}
        if twice:
            raise yaml.constructor.ConstructorError(
                None, None, f"the key {twice.pop()!r} stands twice", node.start_mark
            )
        return super().construct_mapping(node, deep)
