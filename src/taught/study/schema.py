"""Study: the frozen description of one question, read from YAML, with flags overriding it.

The fields, their defaults and their meaning stand in docs/formats.md. Nothing here imports torch.
"""

from __future__ import annotations

import dataclasses
import difflib
import math
import os
from collections.abc import Hashable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

import yaml

from taught.core import rules
from taught.core.rules import Rule
from taught.errors import UserError
from taught.presets import list_presets, preset_path

__all__ = [
    "COMMENTED_TEMPLATE",
    "AttributionSpec",
    "BehaviorSpec",
    "Checkpoint",
    "CurationSpec",
    "ExamplesSpec",
    "FeaturesSpec",
    "ModelSpec",
    "PolicySpec",
    "PromptsSpec",
    "ReadoutSpec",
    "SaeSpec",
    "SketchSpec",
    "Study",
    "ValidationSpec",
    "dump_study",
    "list_presets",
    "load_study",
    "preset_path",
]


# What `taught init` writes: every key with its default and a comment.
COMMENTED_TEMPLATE = (Path(__file__).parent / "template.yaml").read_text("utf-8")


def _field(default: Any, rule: Rule) -> Any:
    return field(default=default, metadata={"rule": rule})


class _Section:
    """Checks each field against its rule when an instance is made, by whatever route."""

    section: ClassVar[str]

    def __post_init__(self) -> None:
        for item in dataclasses.fields(cast(Any, self)):
            value = _checked(f"{self.section}.{item.name}", _rule(item), getattr(self, item.name))
            object.__setattr__(self, item.name, value)


@dataclass(frozen=True)
class ModelSpec(_Section):
    """The model under study, in evaluation mode; its weights never change."""

    section: ClassVar[str] = "model"
    id: str = _field("HuggingFaceTB/SmolLM2-135M-Instruct", rules.text())
    revision: str | None = _field(None, rules.optional(rules.text()))
    dtype: str = _field("float32", rules.one_of("float32", "bfloat16", "float16", "float64"))
    device: str = _field("cpu", rules.text())
    chat_template: str | None = _field(None, rules.optional(rules.path()))
    adapter: str | None = _field(None, rules.optional(rules.text()))


@dataclass(frozen=True)
class SaeSpec(_Section):
    """The sparse autoencoder whose features describe the model."""

    section: ClassVar[str] = "sae"
    path: str = _field("sae", rules.text())
    block: int | None = _field(None, rules.optional(rules.whole(0)))
    encoder: Literal["sae", "relu"] = _field("sae", rules.one_of("sae", "relu"))
    max_fvu: float = _field(0.9, rules.number(above=0))


@dataclass(frozen=True)
class ReadoutSpec(_Section):
    """Where in a prompt the residual stream is read."""

    section: ClassVar[str] = "readout"
    position: Literal["last_user", "last_prompt", "mean_user", "max_user"] = _field(
        "mean_user", rules.one_of("last_user", "last_prompt", "mean_user", "max_user")
    )


@dataclass(frozen=True)
class BehaviorSpec(_Section):
    """The behavior: log of the summed probability of these beginnings of a response."""

    section: ClassVar[str] = "behavior"
    prefixes: tuple[str, ...] = _field(("I can't", "I cannot", "I'm sorry"), rules.list_of(rules.text()))


@dataclass(frozen=True)
class PromptsSpec(_Section):
    """The evaluation prompts."""

    section: ClassVar[str] = "prompts"
    path: str = _field("prompts.jsonl", rules.path())
    positive_group: str = _field("harmful", rules.text())
    negative_group: str = _field("harmless", rules.text())
    limit: int | None = _field(None, rules.optional(rules.whole(1)))


@dataclass(frozen=True)
class ExamplesSpec(_Section):
    """The fine-tuning examples whose effect is asked for."""

    section: ClassVar[str] = "examples"
    path: str = _field("pairs.jsonl", rules.path())
    max_tokens: int = _field(512, rules.whole(1))
    limit: int | None = _field(None, rules.optional(rules.whole(1)))
    drop_overlap: bool = _field(False, rules.flag())
    drop_truncated: bool = _field(False, rules.flag())


@dataclass(frozen=True)
class FeaturesSpec(_Section):
    """Which features of the SAE the policy is written in."""

    section: ClassVar[str] = "features"
    ids: tuple[int, ...] | None = _field(None, rules.optional(rules.list_of(rules.whole(0))))
    threshold: float = _field(0.1, rules.number(minimum=0))
    max_features: int = _field(75, rules.whole(1))
    labels: str | None = _field(None, rules.optional(rules.path()))


@dataclass(frozen=True)
class PolicySpec(_Section):
    """The ridge regression of the behavior on the features."""

    section: ClassVar[str] = "policy"
    alpha: float | Literal["cv"] = _field(5.0, rules.either("cv", rules.number(above=0)))
    intercept: bool = _field(False, rules.flag())
    folds: int = _field(5, rules.whole(2))
    bootstrap: int = _field(500, rules.whole(20))
    seed: int = _field(0, rules.whole(0))


@dataclass(frozen=True)
class Checkpoint:
    """Weights that a training run passed through, and its learning rate there."""

    id: str
    lr: float
    revision: str | None = None


_CHECKPOINT = rules.record(Checkpoint, id=rules.text(), lr=rules.number(above=0), revision=rules.optional(rules.text()))


@dataclass(frozen=True)
class AttributionSpec(_Section):
    """How the effect of an example is computed."""

    section: ClassVar[str] = "attribution"
    estimator: Literal["adjoint", "finite-step", "jvp", "sketch"] = _field(
        "adjoint", rules.one_of("adjoint", "finite-step", "jvp", "sketch")
    )
    lr: float = _field(1e-4, rules.number(above=0))
    coefficients: bool = _field(True, rules.flag())
    exact_top: int = _field(3, rules.whole(0))
    memory_gb: float = _field(3.75, rules.number(above=0))
    batch_tokens: int = _field(512, rules.whole(1))
    checkpointing: bool = _field(False, rules.flag())
    parameters: tuple[str, ...] | None = _field(None, rules.optional(rules.list_of(rules.text())))
    curvature: Literal["identity", "adam", "ekfac"] = _field("identity", rules.one_of("identity", "adam", "ekfac"))
    moments: str | None = _field(None, rules.optional(rules.path()))
    adam_eps: float = _field(1e-8, rules.number(above=0))
    adam_batch: int = _field(1, rules.whole(1))
    damping: float = _field(0.1, rules.number(above=0))
    checkpoints: tuple[Checkpoint, ...] | None = _field(None, rules.optional(rules.list_of(_CHECKPOINT)))


@dataclass(frozen=True)
class SketchSpec(_Section):
    """The store of sketches that the estimator ``sketch`` fills and reads."""

    section: ClassVar[str] = "sketch"
    store: str | None = _field(None, rules.optional(rules.path()))
    dim: int = _field(16384, rules.whole(64))
    error: float | None = _field(None, rules.optional(rules.number(above=0)))
    seed: int = _field(0, rules.whole(0))
    sample: int = _field(8, rules.whole(1))

    @property
    def size(self) -> int:
        """K: ``dim``, or the least multiple of 64 with 1 / sqrt(K) at most ``error``."""
        return self.dim if self.error is None else 64 * max(1, math.ceil(1 / self.error**2 / 64))


@dataclass(frozen=True)
class CurationSpec(_Section):
    """Which examples are dropped."""

    section: ClassVar[str] = "curation"
    rule: Literal["paper", "top-k", "keep-k"] = _field("paper", rules.one_of("paper", "top-k", "keep-k"))
    k: int = _field(20, rules.whole(1))
    target: str = _field("score", rules.text())
    protect: str | None = _field(None, rules.optional(rules.text()))


DESIGNS = (
    "random",
    "matched",
    "leave-out",
    "leave-one-out",
    "removal",
    "addition",
    "curation",
    "curated",
    "chosen",
    "couples",
)
REPEATED = ("random", "matched", "leave-out")  # trained under several seeds, if asked


@dataclass(frozen=True)
class ValidationSpec(_Section):
    """How the model is trained again on some of the examples, to see what that does."""

    section: ClassVar[str] = "validation"
    trainer: Literal["loop", "trl"] = _field("loop", rules.one_of("loop", "trl"))
    method: Literal["full", "lora"] = _field("full", rules.one_of("full", "lora"))
    lora_rank: int = _field(8, rules.whole(1))
    optimizer: Literal["adamw", "sgd"] = _field("adamw", rules.one_of("adamw", "sgd"))
    lr: float = _field(2e-5, rules.number(above=0))
    epochs: int = _field(3, rules.whole(1))
    batch: int = _field(16, rules.whole(1))
    weight_decay: float = _field(0.0, rules.number(minimum=0))
    schedule: Literal["constant", "linear"] = _field("constant", rules.one_of("constant", "linear"))
    warmup: float = _field(0.0, rules.number(minimum=0, maximum=1))
    max_grad_norm: float | None = _field(None, rules.optional(rules.number(above=0)))
    seed: int = _field(42, rules.whole(0))
    designs: tuple[str, ...] = _field(("random", "matched"), rules.list_of(rules.one_of(*DESIGNS)))
    subsets: int = _field(60, rules.whole(1))
    repeats: int = _field(1, rules.whole(1))
    size: float = _field(0.5, rules.number(above=0, maximum=1))
    leave_out: float = _field(0.1, rules.number(above=0, maximum=1))
    budgets: tuple[float, ...] = _field((0.15,), rules.list_of(rules.number(above=0, maximum=1)))
    remove_by: str = _field("behavior:harmless", rules.text())
    controls: int = _field(5, rules.whole(5))
    answer_tokens: int = _field(0, rules.whole(0))

    def part_of(self, examples: int) -> int:
        """Examples of a random subset, of so many in all."""
        return max(1, round(self.size * examples))

    def named_of(self, examples: int) -> list[int]:
        """Examples that each budget is, of so many in all."""
        return [max(1, round(share * examples)) for share in self.budgets]

    def times(self, design: str) -> int:
        """How often each subset of a design is trained on."""
        return self.repeats if design in REPEATED else 1


_SECTIONS: dict[str, type[_Section]] = {
    "model": ModelSpec,
    "sae": SaeSpec,
    "readout": ReadoutSpec,
    "behavior": BehaviorSpec,
    "prompts": PromptsSpec,
    "examples": ExamplesSpec,
    "features": FeaturesSpec,
    "policy": PolicySpec,
    "attribution": AttributionSpec,
    "sketch": SketchSpec,
    "curation": CurationSpec,
    "validation": ValidationSpec,
}
_NAME_RULE = rules.text()
# A model or an SAE is a folder or a hub id; which one is decided by _folder_or_hub_id.
_HUB_KEYS = ("model.id", "model.adapter", "sae.path", "attribution.checkpoints")


@dataclass(frozen=True)
class Study:
    """One question: a model, its features, a behavior, prompts, examples, and how to compute.

    Raises
    ------
    UserError
        A value breaks its rule; the message names the key, the value, the rule and the fix.
    """

    name: str = "my-study"
    model: ModelSpec = field(default_factory=ModelSpec)
    sae: SaeSpec = field(default_factory=SaeSpec)
    readout: ReadoutSpec = field(default_factory=ReadoutSpec)
    behavior: BehaviorSpec = field(default_factory=BehaviorSpec)
    prompts: PromptsSpec = field(default_factory=PromptsSpec)
    examples: ExamplesSpec = field(default_factory=ExamplesSpec)
    features: FeaturesSpec = field(default_factory=FeaturesSpec)
    policy: PolicySpec = field(default_factory=PolicySpec)
    attribution: AttributionSpec = field(default_factory=AttributionSpec)
    sketch: SketchSpec = field(default_factory=SketchSpec)
    curation: CurationSpec = field(default_factory=CurationSpec)
    validation: ValidationSpec = field(default_factory=ValidationSpec)

    def __post_init__(self) -> None:
        _checked("name", _NAME_RULE, self.name)
        if Path(self.name).name != self.name or self.name in (".", ".."):
            raise UserError(
                "name is not a plain name",
                value=self.name,
                rule="a study's name is also the name of its run folder: no / and no ..",
                fix="choose another name",
            )
        if self.prompts.positive_group == self.prompts.negative_group:
            raise UserError(
                "prompts.positive_group and prompts.negative_group are the same",
                value=self.prompts.positive_group,
                rule="the features are chosen by the difference between two groups",
                fix="name two groups of the prompt file",
            )

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and numbers, in the order of docs/formats.md."""
        return cast(dict[str, Any], _plain(dataclasses.asdict(self)))

    def flat(self) -> dict[str, Any]:
        """Each value under its dotted key, e.g. ``policy.alpha``."""
        flat: dict[str, Any] = {}
        for key, value in self.to_dict().items():
            if isinstance(value, dict):
                flat.update({f"{key}.{name}": item for name, item in value.items()})
            else:
                flat[key] = value
        return flat

    def get(self, key: str) -> Any:
        """Return the value under a dotted key; UserError for a key that does not exist."""
        _known_key(key)
        owner: Any = self
        for part in key.split("."):
            owner = getattr(owner, part)
        return owner

    def replace(self, key: str, value: object, *, base: Path | None = None) -> Study:
        """Return a copy with one value changed.

        Parameters
        ----------
        key
            Dotted key, e.g. ``policy.alpha``.
        value
            The new value, as YAML would give it.
        base
            Folder that a relative path is resolved against; the current one by default.
        """
        _known_key(key)
        if key == "name":
            return dataclasses.replace(self, name=cast(str, value))
        section, name = key.split(".")
        spec = dataclasses.replace(getattr(self, section), **{name: value})
        changed = dataclasses.replace(self, **{section: spec})
        return _resolve_key(changed, key, base or Path.cwd()) if key in _path_keys() else changed

    def resolved(self, base: Path) -> Study:
        """Return a copy whose relative paths are made absolute against the folder ``base``."""
        study = self
        for key in _path_keys():
            study = _resolve_key(study, key, base)
        return study

    def require_files(self) -> None:
        """Raise a UserError that names the key when a local file of the study is missing."""
        for key in _path_keys():
            for value in () if key == "sketch.store" else _paths(self.get(key)):
                if not Path(value).is_absolute() or Path(value).exists():
                    continue
                raise UserError(
                    f"{key} does not exist",
                    value=value,
                    rule="a relative path is relative to the file it stands in",
                    fix=f"correct {key} in the study, or pass --set {key}=PATH",
                )


def load_study(source: str | Path) -> Study:
    """Read a study.

    Parameters
    ----------
    source
        A YAML file, a folder that holds ``study.yaml`` (such as a run folder), or the name of a
        preset.

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
    if not isinstance(content, Mapping):
        raise UserError(
            "a study is a mapping of keys to values", value=content, fix="start from the file that `taught init` writes"
        )
    values: dict[str, Any] = {}
    for key, value in content.items():
        if key == "name":
            values["name"] = value
        elif key in _SECTIONS:
            values[key] = _section_from(key, value)
        else:
            raise _unknown_key(str(key), value)
    return Study(**values).resolved(base)


def dump_study(study: Study) -> str:
    """Return the study as YAML with every default filled in; ``load_study`` gives it back."""
    return yaml.safe_dump(study.to_dict(), sort_keys=False, allow_unicode=True, width=100)


def _section_from(section: str, value: object) -> _Section:
    if value is None:
        return _SECTIONS[section]()
    if not isinstance(value, Mapping):
        raise UserError(
            f"{section} is a section, not a value",
            value=value,
            rule="its keys: " + ", ".join(_names(section)),
            fix=f"write `{section}:` and its keys below it, indented",
        )
    for key, item in value.items():
        if key not in _names(section):
            raise _unknown_key(f"{section}.{key}", item)
    return _SECTIONS[section](**value)


def _names(section: str) -> list[str]:
    return [item.name for item in dataclasses.fields(cast(Any, _SECTIONS[section]))]


def _all_keys() -> list[str]:
    return ["name"] + [f"{section}.{name}" for section in _SECTIONS for name in _names(section)]


def _rule(item: dataclasses.Field[Any]) -> Rule:
    return cast(Rule, item.metadata["rule"])


def _path_keys() -> list[str]:
    keys = list(_HUB_KEYS)
    for section, spec in _SECTIONS.items():
        fields = dataclasses.fields(cast(Any, spec))
        keys += [f"{section}.{item.name}" for item in fields if _rule(item).path]
    return keys


def _known_key(key: str) -> None:
    if key not in _all_keys():
        raise _unknown_key(key, None)


def _unknown_key(key: str, value: object) -> UserError:
    """Suggest the closest key, also one of the same name in another section."""
    name = key.rsplit(".", 1)[-1]
    same_name = [known for known in _all_keys() if known.rsplit(".", 1)[-1] == name]
    close = difflib.get_close_matches(key, [*_all_keys(), *_SECTIONS], n=1, cutoff=0.6)
    guess = next(iter([*same_name, *close]), None)
    section = key.split(".")[0]
    known = _names(section) if "." in key and section in _SECTIONS else ["name", *_SECTIONS]
    return UserError(
        f"unknown key {key}",
        value=value,
        rule="known keys here: " + ", ".join(known),
        fix=f"did you mean {guess}?" if guess else "remove it, or see docs/formats.md",
    )


def _checked(key: str, rule: Rule, value: object) -> Any:
    try:
        return rule.parse(value)
    except (ValueError, OverflowError):
        close = difflib.get_close_matches(str(value), rule.choices, n=1, cutoff=0.5)
        fix = f"did you mean {close[0]}?" if close else f"correct {key} in the study"
        raise UserError(f"{key} is not valid", value=repr(value), rule=rule.text, fix=fix) from None


def _resolve_key(study: Study, key: str, base: Path) -> Study:
    value = study.get(key)
    if value is None:
        return study
    resolved: Any
    if isinstance(value, tuple):
        resolved = tuple(dataclasses.replace(item, id=_folder_or_hub_id(item.id, base)) for item in value)
    elif key in _HUB_KEYS:
        resolved = _folder_or_hub_id(value, base)
    else:
        resolved = str(_absolute(value, base))
    section, name = key.split(".")
    spec = dataclasses.replace(getattr(study, section), **{name: resolved})
    return dataclasses.replace(study, **{section: spec})


def _paths(value: str | tuple[Checkpoint, ...] | None) -> list[str]:
    if isinstance(value, tuple):
        return [item.id for item in value]
    return [] if value is None else [value]


def _absolute(value: str, base: Path) -> Path:
    # Not Path.resolve: a linked file keeps the name that the user gave it.
    return Path(os.path.abspath(base / Path(value).expanduser()))


def _folder_or_hub_id(value: str, base: Path) -> str:
    """Say which one is meant: what looks like a path or is a folder beside the file is a folder."""
    candidate = _absolute(value, base)
    looks_local = value.startswith(("./", "../", "/", "~")) or value in (".", "..")
    return str(candidate) if looks_local or candidate.is_dir() else value


def _plain(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _plain(item) for key, item in value.items()}
    if isinstance(value, tuple):
        return [_plain(item) for item in value]
    return value


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
