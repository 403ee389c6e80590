"""Study: the frozen description of one question. A key is a field: its default, its rule, its meaning.

Behavior, estimator, curvature and trajectory are methods: a name, or a mapping of ``kind`` and
parameters, which the registered method itself declares. Nothing here imports torch; a method is
imported only where a study gives it parameters.
"""

from __future__ import annotations

import dataclasses
import difflib
import glob
import os
from collections.abc import Iterator, Mapping
from dataclasses import MISSING, dataclass, field
from pathlib import Path
from typing import Any, ClassVar, Literal, cast

from taught.core import rules
from taught.core.names import TargetName
from taught.core.point import MODULE
from taught.core.registry import BEHAVIORS, CURVATURES, ESTIMATORS, TRAJECTORIES, Choice, Registry, parameters, setting
from taught.core.rules import Rule, Visit
from taught.errors import UserError, did_you_mean, shown
from taught.study import gone

_FROM_0, _FROM_1 = rules.whole(0), rules.whole(1)
_POSITIVE, _SHARE = rules.number(above=0), rules.number(above=0, maximum=1)
_TEXT, _FLAG, _FILE, _SOURCE = rules.text(), rules.flag(), rules.path(), rules.folder_or_hub_id()
_TEXTS = rules.list_of(_TEXT, empty=True)
_PART = rules.matching(MODULE, "resid_post, attn_out, mlp_out, or a module of the block such as mlp")
POSITIONS = ("last_user", "last_prompt", "mean_user", "max_user")


def _pace(default: Any, rule: Rule, doc: str) -> Any:
    """A key that changes how fast results come, and nothing about them."""
    return field(default=default, metadata={"rule": rule, "doc": doc, "pace": True})


def _null(rule: Rule, doc: str) -> Any:
    """A key that is null, if nothing is given."""
    return setting(None, rules.optional(rule), doc)


def _word(choices: str, doc: str = "") -> Any:
    """A key that is one of a few words, ``a | b``: by default the first one."""
    words = choices.split(" | ")
    return setting(words[0], rules.one_of(*words), doc or choices)


# Rules that know their key: a section, a method, a target


def _section(spec: type[Section], *, optional: bool = False) -> Any:
    """A field that is a section; an optional one is null by default."""

    def parse(value: Any) -> Section | None:
        if isinstance(value, spec) or (optional and value is None):
            return value
        return spec() if value is None or (optional and value is True) else _section_from(spec, value)

    def walk(key: str, value: Section, visit: Visit) -> Section:
        return _visited(value, f"{key}.", visit)

    metadata = {"rule": Rule("a section", parse, walk=walk), "doc": spec.__doc__, "section": spec}
    return field(default=None, metadata=metadata) if optional else field(default_factory=spec, metadata=metadata)


def _method(key: str, registry: Registry[Any], default: str, doc: str) -> Any:
    """A field that names a registered method, with or without parameters."""

    def parse(value: Any) -> Choice:
        if isinstance(value, Choice):  # checked before, or when it is made
            return value
        if not isinstance(value, str | Mapping):
            raise ValueError
        given = {"kind": value} if isinstance(value, str) else dict(value)
        kind = given.pop("kind", default)
        if not isinstance(kind, str):
            raise ValueError
        try:
            registry.require(kind)
        except UserError as error:
            fix = gone.value(key, kind) or error.fix
            raise UserError(f"{key}: {error.what}", value=kind, rule=error.rule, fix=fix) from None
        return Choice(kind, _checked_parameters(key, registry, kind, given) if given else {})

    def walk(key: str, value: Choice, visit: Visit) -> Choice:
        if not value.values:
            return value
        known = {name: item.metadata["rule"] for name, item in parameters(registry.get(value.kind)).items()}
        values = value.values.items()
        return Choice(value.kind, {name: known[name].visited(f"{key}.{name}", item, visit) for name, item in values})

    rule = Rule("the name of a method, or a mapping of kind and parameters", parse, walk=walk)
    return field(default=Choice(default), metadata={"rule": rule, "doc": doc, "registry": registry})


def _checked_parameters(key: str, registry: Registry[Any], kind: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """The parameters, in the method's order, without those that are at their defaults."""
    known = parameters(registry.get(kind))
    for name in given:
        if name not in known:
            close = difflib.get_close_matches(shown(name), known, n=1, cutoff=0.5)
            raise UserError(
                f"unknown key {key}.{shown(name)}",
                value=given[name],
                rule=f"parameters of {kind}: {', '.join(known)}" if known else f"{kind} has no parameters",
                fix=f"did you mean {key}.{close[0]}?" if close else "remove it",
            )
    asked = {name: item for name, item in known.items() if name in given}
    checked = {name: _checked(f"{key}.{name}", item.metadata["rule"], given[name]) for name, item in asked.items()}
    return {name: value for name, value in checked.items() if value != known[name].default}


def _target() -> Rule:
    """The rule for the name of a target, kept as it prints."""

    def parse(value: Any) -> str:
        if not isinstance(value, str):
            raise ValueError
        if value.startswith("mean_y:"):
            fix = f"write behavior:{value.removeprefix('mean_y:')}"
            raise UserError("no target has this name any more", value=value, fix=fix)
        return str(TargetName.parse(value))

    return Rule("the name of a target, such as behavior:GROUP", parse)


_TARGET = _target()


def _source() -> Rule:
    """The rule for what a concept is made of; the file in it is a path."""

    def parse(value: Any) -> str:
        if not isinstance(value, str) or value.partition(":")[0] not in ("difference", "probe", "feature", "file"):
            raise ValueError
        return value

    def walk(key: str, value: str, visit: Visit) -> str:
        if not value.startswith("file:"):
            return value
        path, colon, tensor = value.removeprefix("file:").partition(":")
        return f"file:{visit(key, path, 'file')}{colon}{tensor}"

    return Rule("one of difference, probe, feature:ID, file:PATH", parse, walk=walk)


# Sections


class Section:
    """Checks each field against its rule when an instance is made, by whatever route."""

    section: ClassVar[str]

    def __init_subclass__(cls, name: str) -> None:
        cls.section = name

    def __post_init__(self) -> None:
        for item in dataclasses.fields(cast(Any, self)):
            value = getattr(self, item.name)
            if value is not item.default:  # the default is right, and checking it may import a method
                checked = _checked(f"{self.section}.{item.name}", item.metadata["rule"], value)
                object.__setattr__(self, item.name, checked)


@dataclass(frozen=True)
class ModelSpec(Section, name="model"):
    """The model under study, in evaluation mode; its weights never change."""

    id: str = setting("HuggingFaceTB/SmolLM2-135M-Instruct", rules.folder_or_hub_id(), "hub id, or a folder (./mine)")
    revision: str | None = _null(_TEXT, "a branch, tag or commit of the hub")
    dtype: str = _word("float32 | bfloat16 | float16 | float64")
    load_in: str | None = _null(
        rules.one_of("nf4", "nf4-double", "fp4", "fp4-double", "int8"),
        "nf4 | nf4-double | fp4 | fp4-double | int8: quantise by bitsandbytes; null: as saved",
    )
    device: str = setting("cpu", _TEXT, "cpu | cuda | cuda:1 | mps | auto (spread over GPUs)")
    chat_template: str | None = _null(_FILE, "a Jinja file, for a tokenizer that has no chat template")
    date: str = setting(
        "2024-07-26", rules.day(), "the day that a chat template is told; some write it into every chat"
    )
    adapter: str | None = _null(_SOURCE, "a LoRA adapter of peft, folder or hub id; then only its parameters move")


@dataclass(frozen=True)
class SaeSpec(Section, name="sae"):
    """The sparse autoencoder whose features describe the model; without one there is no policy."""

    path: str | None = _null(
        _SOURCE, "folder in the format of SAELens or sparsify, or release:sae_id; null: no SAE, no policy"
    )
    block: int | None = _null(_FROM_0, "block that the SAE reads; null: what its cfg.json says")
    point: str | None = _null(
        _PART,
        "what of it: resid_post | attn_out | mlp_out | a module of the block, e.g. mlp; null: what its cfg.json says",
    )
    encoder: Literal["sae", "relu"] = _word("sae | relu", "sae: its true encoder | relu: the dense proxy of the paper")
    max_fvu: float = setting(0.9, _POSITIVE, "refuse an SAE that leaves more unexplained; set it near your SAE's own")
    ignore: tuple[str, ...] = setting(
        (), _TEXTS, "keys of its cfg.json that are not known here and that change nothing about the features"
    )


@dataclass(frozen=True)
class ReadoutSpec(Section, name="readout"):
    """Where in a prompt features are read."""

    position: Literal["last_user", "last_prompt", "mean_user", "max_user"] = setting(
        "mean_user", rules.one_of(*POSITIONS), " | ".join(POSITIONS)
    )


@dataclass(frozen=True)
class PromptsSpec(Section, name="prompts"):
    """The evaluation prompts."""

    path: str = setting("prompts.jsonl", rules.table(), "JSONL, Parquet or CSV")
    positive_group: str | None = _null(
        _TEXT, "the group that should show the behavior, such as harmful; a policy needs both"
    )
    negative_group: str | None = _null(_TEXT, "the group that should not, such as harmless")
    limit: int | None = _null(_FROM_1, "at most so many prompts, spread over groups and categories")

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.positive_group is not None and self.positive_group == self.negative_group:
            raise UserError(
                "prompts.positive_group and prompts.negative_group are the same",
                value=self.positive_group,
                rule="the features are chosen by the difference between two groups",
                fix="name two groups of the prompt file",
            )

    @property
    def sides(self) -> tuple[str, str]:
        """The positive and the negative group; UserError where the study does not name both."""
        if self.positive_group is None or self.negative_group is None:
            raise UserError(
                "the study does not say which prompts should show the behavior",
                rule="prompts.positive_group and prompts.negative_group name two groups of the prompts",
                fix="for example: --set prompts.positive_group=harmful --set prompts.negative_group=harmless",
            )
        return self.positive_group, self.negative_group


@dataclass(frozen=True)
class ExamplesSpec(Section, name="examples"):
    """The training examples whose effect is asked for."""

    path: str = setting(
        "examples.jsonl",
        rules.table(),
        "JSONL, Parquet or CSV: messages, prompt + response, or text; a file, a folder of shards, or a pattern",
    )
    kind: Literal["pair", "document", "preference"] = _word(
        "pair | document | preference",
        "pair: a response's tokens are trained on | document: all tokens of a text | preference: chosen over rejected",
    )
    beta: float = setting(0.1, _POSITIVE, "of a preference's loss (DPO): how strongly it holds to the reference")
    max_tokens: int = setting(
        512, _FROM_1, "a longer example is an error, or left out with drop_truncated; a document is cut up"
    )
    turns: Literal["last", "all"] = _word(
        "last | all", "answers of a conversation that are trained on; marks in the data go before"
    )
    limit: int | None = _null(_FROM_1, "at most so many examples, spread over labels, or as `spread` says")
    spread: tuple[str, ...] | None = _null(
        _TEXTS, "columns whose values the limit is spread over, e.g. [topic, format]; null: the label"
    )
    even: bool = setting(False, _FLAG, "true: as many of each such value, as far as there are; false: in proportion")
    seed: int = setting(0, _FROM_0, "another one chooses other examples within the limit")
    near_duplicate: float = setting(
        0.8,
        _SHARE,
        "share of 5-word passages that two examples have in common, from which they count as near duplicates",
    )
    drop_duplicates: bool = setting(
        False, _FLAG, "true: leave out examples that repeat another one, exactly or nearly, and list them"
    )
    drop_overlap: bool = setting(
        False, _FLAG, "true: leave out examples whose prompt is an evaluation prompt, and list them"
    )
    drop_truncated: bool = setting(False, _FLAG, "true: leave out examples whose response is cut off, and list them")
    positive_label: str | None = _null(_TEXT, "the label of examples that should teach the behavior; null: not known")
    negative_label: str | None = _null(_TEXT, "the label of those that should teach its absence")


@dataclass(frozen=True)
class FeaturesSpec(Section, name="features"):
    """Which features of the SAE the policy is written in."""

    ids: tuple[int, ...] | None = _null(
        rules.list_of(_FROM_0), "feature ids, e.g. [12, 407]; null: chosen by the contrast"
    )
    threshold: float = setting(0.1, rules.number(minimum=0), "difference of the group means that a feature must exceed")
    max_features: int = setting(75, _FROM_1, "at most so many, the strongest first")
    labels: str | None = _null(_FILE, "a file with your own labels")


@dataclass(frozen=True)
class PolicySpec(Section, name="policy"):
    """The ridge regression of the behavior on the features."""

    alpha: float | Literal["cv"] = setting(
        5.0, rules.either("cv", _POSITIVE), "ridge penalty: a number, or cv (cross-validation)"
    )
    intercept: bool = setting(False, _FLAG, "false is the paper's")
    folds: int = setting(5, rules.whole(2), "of the cross-validation")
    bootstrap: int = setting(500, rules.whole(20, 10**6), "resamples for the intervals")
    seed: int = setting(0, _FROM_0, "of every draw")


@dataclass(frozen=True)
class ConceptSpec(Section, name="concepts"):
    """A direction in the residual stream (or at another point), made of two groups, features or a file, or saved."""

    name: str = setting("concept", _TEXT, "the target is concept:NAME")
    path: str | None = _null(rules.folder(), "a folder of a saved concept; then nothing else")
    source: str | None = _null(
        _source(),
        "difference (of two groups' means) | probe | feature:ID or feature:ID=SHARE,ID=SHARE | file:PATH[:TENSOR]",
    )
    block: int | None = _null(_FROM_0, "that is read; null: the SAE's")
    point: str | None = _null(_PART, "what of it, as sae.point; null: the SAE's, or resid_post")
    position: str | None = _null(rules.one_of(*POSITIONS), "tokens of a prompt that are read; null: readout.position")
    tokens: str = setting("mean_response", _TEXT, "tokens of an example: mean_response | last_response")
    examples: str | None = _null(_FILE, "labelled examples: the groups are these, in place of the prompts")
    positive: str = setting("present", _TEXT, "label of the examples with the behavior")
    negative: str = setting("absent", _TEXT, "label of the examples without it")
    method: Literal["logistic", "ridge"] = _word("logistic | ridge", "of a probe")
    penalty: float = setting(1.0, _POSITIVE, "of a probe, on rows of unit mean square")
    norm: Literal["unit", "none"] = _word("unit | none", "unit | none: as it is")
    read: Literal["prompts", "responses"] = _word(
        "prompts | responses", "what the target's mean is over: prompts | responses of the examples"
    )
    group: str | None = _null(_TEXT, "of these prompts only, or of examples with this label; null: all")
    force: bool = setting(False, _FLAG, "true: also a direction that is no better than chance")
    sweep: bool = setting(False, _FLAG, "true: the card shows every block")

    def __post_init__(self) -> None:
        super().__post_init__()
        if (self.path is None) == (self.source is None):
            raise UserError(
                "a concept is made, or saved already",
                value=self.name,
                rule="either source or path",
                fix="for example: {name: refusal, source: difference}",
            )


@dataclass(frozen=True)
class AttributionSpec(Section, name="attribution"):
    """How the effect of an example is computed, and on what."""

    targets: tuple[str, ...] | None = _null(
        rules.list_of(_TARGET),
        "score, coefficient:*, behavior:*, behavior:GROUP, prompt:*, concept:*, A - B ...; null: all that there are",
    )
    estimator: Choice = _method("attribution.estimator", ESTIMATORS, "adjoint", "how the inner product is obtained")
    curvature: Choice = _method(
        "attribution.curvature", CURVATURES, "identity", "identity: plain SGD; else steps in another metric"
    )
    trajectory: Choice = _method(
        "attribution.trajectory", TRAJECTORIES, "base", "base: at the model's weights; else along a training run"
    )
    lr: float = setting(1e-4, rules.rate(), "learning rate of the one SGD step")
    exact_top: int = setting(
        3, _FROM_0, "so many top examples get a real step, an exact refit and shares of their tokens too"
    )
    memory_gb: float = _pace(3.75, rules.number(above=0, maximum=1e6), "working memory for gradients")
    batch_tokens: int = _pace(512, _FROM_1, "tokens that go through the model at once")
    checkpointing: bool = _pace(False, _FLAG, "true: long examples in about half the memory, and more time")
    parameters: tuple[str, ...] | None = _null(
        rules.list_of(_TEXT), 'only what matches moves, e.g. ["model.layers.1?.mlp.*"]; null: all'
    )
    concept_methods: tuple[str, ...] = setting(
        (),
        rules.list_of(
            rules.one_of("vector-filter", "projection-difference-response", "projection-difference-training"),
            empty=True,
        ),
        "beside the influence: vector-filter, projection-difference-response, projection-difference-training",
    )
    checkpoint: str | None = _null(_SOURCE, "the fine-tuned model, for projection-difference-training")
    max_new_tokens: int = setting(128, _FROM_1, "of an own answer, for projection-difference-response")


@dataclass(frozen=True)
class ClampSpec(Section, name="clamp"):
    """A check of the policy by edits in the model: each feature is scaled, the behavior read again."""

    prompts: int = setting(24, rules.whole(2), "at most so many prompts a feature, of those on which it is active")
    controls: int = setting(8, rules.whole(2, 10**4), "random directions a feature, for comparison")


@dataclass(frozen=True)
class ClustersSpec(Section, name="clusters"):
    """Groups of examples by their active features."""

    k: int | None = _null(rules.whole(2), "number of clusters; null: by the silhouette")
    target: str | None = _null(_TARGET, "one target; null: the score and every behavior:*")


@dataclass(frozen=True)
class BinsSpec(Section, name="bins"):
    """A capability map: which kinds of examples, by one or two of their columns, raise which benchmark."""

    columns: tuple[str, ...] = setting(
        ("topic", "format"), rules.list_of(_TEXT), "one or two columns of the examples, which name their kinds"
    )
    taxonomy: Literal["weborganizer"] | None = _null(
        rules.one_of("weborganizer"),
        "weborganizer: its 24 topics and 24 formats are the known names; null: whatever the columns hold",
    )
    classifier: str | None = _null(
        _TEXT, "module:function(column, texts) that labels the examples where they do not have a column"
    )
    minimum: int = setting(5, rules.whole(3), "bins of fewer documents are shown and not tested")
    trim: float = setting(
        0.1, rules.number(minimum=0, maximum=0.49), "share of a bin's documents left out at either end of its mean"
    )
    permutations: int = setting(9999, rules.whole(99, 10**6), "of the labels of bins, for the test")
    bootstrap: int = setting(1000, rules.whole(20, 10**5), "resamples of documents and questions, for the intervals")
    contrasts: tuple[str, ...] | None = _null(
        _TEXTS, '["a - b", "(a - b) - (c - d)"] of groups of prompts; null: all pairs of at most four'
    )
    questions: bool = setting(
        True, _FLAG, "keep what each example does to each prompt; false: intervals over documents alone"
    )
    seed: int = setting(0, _FROM_0, "of every draw")

    def __post_init__(self) -> None:
        super().__post_init__()
        if len(self.columns) > 2:
            raise UserError(
                "bins are by one column or by two",
                value=", ".join(self.columns),
                rule="bins.columns: one label, or two such as a topic and a format",
                fix="leave out a column",
            )


@dataclass(frozen=True)
class CurationSpec(Section, name="curation"):
    """Which examples are dropped."""

    rule: Literal["paper", "top-k", "keep-k", "swap-k"] | None = _null(
        rules.one_of("paper", "top-k", "keep-k", "swap-k"),
        "paper | top-k (drops the k highest) | keep-k (keeps the k lowest) | swap-k (exchanges chosen and rejected of "
        "the k highest preferences); null: paper, where a policy and both labels are there and neither k nor a target "
        "is named, else top-k",
    )
    k: int | None = _null(_FROM_1, "how many; null: one in ten examples, at least one; paper has none")
    target: str | None = _null(_TARGET, "what examples are ranked by; null: score, or the first behavior target")
    method: str | None = _null(_TEXT, "whose scores; null: the run's own")
    protect: str | None = _null(_TARGET, "a second target that dropping examples must not lower")


REPEATED = ("random", "matched", "leave-out")  # trained under several seeds, if asked
PAIRED = ("unlearn", "teach")  # named documents against random ones like them, pair by pair
_NAMED = ("leave-one-out", "removal", "addition", "curation", "curated", "chosen", "couples")
DESIGNS = (*REPEATED, *_NAMED, *PAIRED)


@dataclass(frozen=True)
class ValidationSpec(Section, name="validation"):
    """How the model is trained again on some of the examples, to see what that does."""

    trainer: Literal["loop", "trl"] = _word(
        "loop | trl", "loop: plain and deterministic, the influence's own loss | trl"
    )
    method: Literal["full", "lora"] = _word("full | lora")
    lora_rank: int = setting(8, _FROM_1, "of lora")
    optimizer: Literal["adamw", "sgd"] = _word("adamw | sgd")
    lr: float = setting(2e-5, rules.rate(), "learning rate")
    epochs: int = setting(3, _FROM_1, "passes over the examples")
    batch: int = setting(16, _FROM_1, "examples a step")
    momentum: float = setting(0.0, rules.number(minimum=0, maximum=0.999), "of sgd")
    weight_decay: float = setting(0.0, rules.number(minimum=0), "decoupled in adamw, added to the gradient in sgd")
    batches: Literal["refilled", "held"] = _word(
        "refilled | held",
        "where an example is left out: refilled (the others move up) | held (its place stays, with weight 0)",
    )
    schedule: Literal["constant", "linear"] = _word("constant | linear")
    warmup: float = setting(0.0, rules.number(minimum=0, maximum=1), "share of the steps")
    max_grad_norm: float | None = _null(_POSITIVE, "a number: longer gradients are scaled down to it")
    seed: int = setting(42, _FROM_0, "order of the examples, first weights of a LoRA, draws of subsets")
    designs: tuple[str, ...] = setting(
        ("random", "matched"), rules.list_of(rules.one_of(*DESIGNS)), "which subsets: " + " | ".join(DESIGNS)
    )
    subsets: int = setting(60, rules.whole(1, 10**5), "so many of each design that draws them")
    repeats: int = setting(
        1, rules.whole(1, 10**4), "each of these trained so many times, with other seeds: the noise of training"
    )
    size: float = setting(0.5, _SHARE, "share of the examples in a random or matched subset")
    leave_out: float = setting(0.1, _SHARE, "share of the examples that leave-out leaves out")
    budgets: tuple[float, ...] = setting(
        (0.15,),
        rules.list_of(_SHARE),
        "removal: without, addition: only with these shares of the examples that the run names; unlearn, teach: of the "
        "documents",
    )
    remove_by: str | None = _null(
        _TARGET,
        "the examples named raise this target most; null: curation.target, or the behavior where it is not wanted",
    )
    controls: int = setting(
        5, rules.whole(5, 10**4), "random subsets beside those of removal, addition, curation, curated, as large"
    )
    pairs: int = setting(
        8,
        rules.whole(2, 10**4),
        "unlearn, teach: so many pairs of the named documents and random ones, each with a seed of its own; of fewer "
        "than 5 nothing is significant",
    )
    alike: str | None = setting(
        "label",
        rules.optional(_TEXT),
        "unlearn, teach: a column of the examples, such as the topic; random documents hold as many of each value as "
        "the named ones; null: only as many tokens",
    )
    unlearn_steps: int = setting(100, _FROM_1, "unlearn: steps of forgetting, at most")
    unlearn_lr: float = setting(
        0.01, rules.rate(), "unlearn: the first rate, the distance of a step; fitted anew every 10 steps"
    )
    guard: str | None = _null(
        _TEXT,
        "unlearn: a group or category of prompts whose accuracy (of a choice), mean (of a loss) or mean degree must "
        "hold, or the run stops; null: the loss of the examples that are retained",
    )
    guard_keep: float = setting(0.9, _SHARE, "unlearn: 0.9: at least 90% of the guard's start, of a loss at most 110%")
    answer_tokens: int = setting(0, _FROM_0, "30: the retrained models answer the prompts too, and a judge reads it")
    judge: str | None = _null(_TEXT, "module:function that reads the answers; null: rules that read the words")
    methods: tuple[str, ...] = setting((), _TEXTS, "further methods to compare, such as adjoint+ekfac")
    scores: tuple[str, ...] = setting(
        (), rules.list_of(rules.path(), empty=True), "files of scores that were made elsewhere, to compare"
    )

    def part_of(self, examples: int) -> int:
        """Examples of a random subset, of so many in all."""
        return max(1, round(self.size * examples))

    def named_of(self, examples: int) -> list[int]:
        """Examples that each budget is, of so many in all."""
        return [max(1, round(share * examples)) for share in self.budgets]

    def times(self, design: str) -> int:
        """How often each subset of a design is trained on."""
        return self.repeats if design in REPEATED else 1


def _concepts() -> Any:
    one = Rule(
        "a mapping of the keys of a concept",
        lambda value: value if isinstance(value, ConceptSpec) else _section_from(ConceptSpec, value),
        walk=lambda key, value, visit: _visited(value, f"{key}.", visit),
    )
    metadata = {"rule": rules.list_of(one, empty=True), "doc": ConceptSpec.__doc__, "each": ConceptSpec}
    return field(default=(), metadata=metadata)


@dataclass(frozen=True)
class Study:
    """One question: a model, a behavior, prompts, examples, and how to compute.

    Raises
    ------
    UserError
        A value breaks its rule; the message names the key, the value, the rule and the fix.
    """

    name: str = setting("my-study", _TEXT, "also the name of the run folder: runs/my-study")
    model: ModelSpec = _section(ModelSpec)
    sae: SaeSpec = _section(SaeSpec)
    readout: ReadoutSpec = _section(ReadoutSpec)
    behavior: Choice = _method("behavior", BEHAVIORS, "prefixes", "The behavior: a number for each prompt.")
    prompts: PromptsSpec = _section(PromptsSpec)
    examples: ExamplesSpec = _section(ExamplesSpec)
    features: FeaturesSpec = _section(FeaturesSpec)
    policy: PolicySpec = _section(PolicySpec)
    concepts: tuple[ConceptSpec, ...] = _concepts()
    attribution: AttributionSpec = _section(AttributionSpec)
    clamp: ClampSpec | None = _section(ClampSpec, optional=True)
    clusters: ClustersSpec | None = _section(ClustersSpec, optional=True)
    bins: BinsSpec | None = _section(BinsSpec, optional=True)
    curation: CurationSpec = _section(CurationSpec)
    validation: ValidationSpec = _section(ValidationSpec)

    def __post_init__(self) -> None:
        for item in dataclasses.fields(self):
            value = getattr(self, item.name)
            if value is not item.default:
                object.__setattr__(self, item.name, _checked(item.name, item.metadata["rule"], value))
        plain_name = Path(self.name).name == self.name and self.name not in (".", "..") and self.name.isprintable()
        if not plain_name or len(self.name.encode()) > 200:
            raise UserError(
                "name is not a plain name",
                value=self.name,
                rule="a study's name is also the name of its run folder: at most 200 bytes, no /, no .., no line ends",
                fix="choose another name",
            )
        if self.attribution.concept_methods and self.examples.kind == "preference":
            raise UserError(
                "a projection on a concept reads one answer of an example",
                value="attribution.concept_methods",
                rule="a preference has two: a chosen and a rejected one",
                fix="leave attribution.concept_methods out; the target concept:NAME has gradients of both",
            )
        asked = self.attribution.targets if self.bins is not None else None
        if asked is not None and not any(t.kind == "behavior" and not t.minus for t in map(TargetName.parse, asked)):
            raise UserError(
                "bins are mapped on benchmarks, and the study asks for none",
                value=list(asked),
                rule="a benchmark is a group of prompts: the target behavior:GROUP",
                fix="add behavior:* to attribution.targets",
            )
        names = [concept.name for concept in self.concepts]
        if len(set(names)) < len(names):
            what, fix = "concepts are told apart by their names", "correct concepts in the study"
            raise UserError(what, value=names, rule="each name once", fix=fix)

    @classmethod
    def from_dict(cls, content: object) -> Study:
        """Build a study from nested mappings; see :func:`taught.study.load.study_from_dict`."""
        if not isinstance(content, Mapping):
            fix = "start from the file that `taught init` writes"
            raise UserError("a study is a mapping of keys to values", value=content, fix=fix)
        for key, value in content.items():
            if key not in _keys(cls):
                raise unknown_key(shown(key), value)
        return cls(**content)

    @classmethod
    def recorded(cls, content: Mapping[str, Any]) -> Study:
        """The study that :meth:`to_dict` gave: no method is imported, and its parameters are taken as they are."""
        content = dict(content)
        content["attribution"] = dict(content["attribution"])
        methods = ((content["attribution"], key) for key in ("estimator", "curvature", "trajectory"))
        for owner, key in [(content, "behavior"), *methods]:
            kind, values = owner[key]["kind"], {name: v for name, v in owner[key].items() if name != "kind"}
            owner[key] = Choice(kind, {name: tuple(v) if isinstance(v, list) else v for name, v in values.items()})
        return cls(**content)

    def to_dict(self) -> dict[str, Any]:
        """Plain dicts, lists, strings and numbers, in the order of the keys; a method has its ``kind``."""
        return cast(dict[str, Any], plain(self))

    def flat(self) -> dict[str, Any]:
        """Each value under its dotted key, ``policy.alpha``; a method's kind under its own, parameters below it."""
        return dict(_leaves(self, ""))

    def get(self, key: str) -> Any:
        """Return the value under a dotted key; UserError for a key that does not exist."""
        owner: Any = self
        registry: Registry[Any] | None = None
        for part in key.split("."):
            if isinstance(owner, Choice) and registry is not None:
                known = parameters(registry.get(owner.kind))
                if part not in known:
                    raise unknown_key(key, None)
                return owner.values.get(part, known[part].default)
            if (item := _keys(type(owner)).get(part)) is None:
                raise unknown_key(key, None)
            owner, registry = getattr(owner, part), item.metadata.get("registry")
        return owner

    def replace(self, key: str, value: object, *, base: Path | None = None) -> Study:
        """Return a copy with one value changed.

        Parameters
        ----------
        key : Dotted key, e.g. ``policy.alpha`` or ``attribution.curvature.damping``. Another method
            (``attribution.curvature``) drops the parameters of the one before.
        value : the new value, as YAML would give it
        base : folder that a relative path is resolved against; the current one by default
        """
        return cast(Study, _replaced(self, key.split("."), value, key)).resolved(base or Path.cwd(), key)

    def resolved(self, base: Path, below: str | None = None) -> Study:
        """Return a copy whose relative paths (those of one key, if given) are made absolute against ``base``."""

        def resolve(key: str, path: str, kind: str) -> str:
            if below is not None and key != below and not key.startswith(f"{below}."):
                return path
            # Not Path.resolve: a linked file keeps the name that the user gave it.
            candidate = Path(os.path.abspath(base / os.path.expanduser(path)))
            # What looks like a path or is a folder beside the file is a folder; else it is a hub id.
            local = path.startswith(("./", "../", "/", "~")) or path in (".", "..") or os.path.isdir(candidate)
            return path if kind == "hub" and not local else str(candidate)

        return self.visited(resolve)

    def visited(self, visit: Visit) -> Study:
        """Return a copy with ``visit(key, path, kind)`` in place of each path (:data:`taught.core.rules.Visit`)."""
        return _visited(self, "", visit)

    def require_files(self) -> None:
        """Raise a UserError that names the key when a local file of the study is missing."""

        def require(key: str, path: str, kind: str) -> str:
            there = Path(path).exists() or (kind == "table" and glob.glob(path, recursive=True))
            if kind != "made" and Path(path).is_absolute() and not there:
                raise UserError(
                    f"{key} does not exist",
                    value=path,
                    rule="a relative path is relative to the file it stands in",
                    fix=f"correct {key} in the study, or pass --set {key}=PATH",
                )
            return path

        self.visited(require)

    def on_the_hub(self) -> list[str]:
        """What the study takes from the hub, where its relative paths are resolved."""
        found: list[str] = []

        def note(key: str, path: str, kind: str) -> str:
            if kind == "hub" and not Path(path).is_absolute():
                found.append(path)
            return path

        self.visited(note)
        return found

    @staticmethod
    def pace_keys() -> frozenset[str]:
        """Keys that change how fast results come, and nothing about them."""
        sections = [item.metadata["section"] for item in dataclasses.fields(Study) if "section" in item.metadata]
        paced = ((spec, part) for spec in sections for part in dataclasses.fields(spec) if part.metadata.get("pace"))
        return frozenset(f"{spec.section}.{part.name}" for spec, part in paced)


def methods_of(study: Study) -> Iterator[tuple[str, Registry[Any], Choice]]:
    """The methods that a study names: key, registry, choice."""
    for prefix, owner in (("", study), ("attribution.", study.attribution)):
        for item in dataclasses.fields(owner):
            if "registry" in item.metadata:
                yield f"{prefix}{item.name}", item.metadata["registry"], getattr(owner, item.name)


def plain(value: Any) -> Any:
    """A value of a study as YAML has it."""
    if isinstance(value, Choice):
        return {"kind": value.kind, **{name: plain(item) for name, item in value.values.items()}}
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {item.name: plain(getattr(value, item.name)) for item in dataclasses.fields(value)}
    return [plain(item) for item in value] if isinstance(value, tuple) else value


def _leaves(owner: Any, prefix: str) -> Iterator[tuple[str, Any]]:
    for item in dataclasses.fields(owner):
        key, value = f"{prefix}{item.name}", getattr(owner, item.name)
        if isinstance(value, Section):
            yield from _leaves(value, f"{key}.")
        elif isinstance(value, Choice):
            yield key, value.kind
            yield from ((f"{key}.{name}", plain(item)) for name, item in value.values.items())
        else:
            yield key, plain(value)


def _visited(owner: Any, prefix: str, visit: Visit) -> Any:
    """A copy of a section, or of a study, with every path in it visited."""
    changed = {}
    for item in dataclasses.fields(owner):
        value = getattr(owner, item.name)
        new = item.metadata["rule"].visited(f"{prefix}{item.name}", value, visit)
        if new != value:
            changed[item.name] = new
    return dataclasses.replace(owner, **changed) if changed else owner


def _replaced(owner: Any, parts: list[str], value: object, key: str) -> Any:
    """A copy of a section, or of a study, with one value changed."""
    name, *rest = parts
    if (item := _keys(type(owner)).get(name)) is None:
        raise unknown_key(key, value)
    current, section = getattr(owner, name), item.metadata.get("section")
    if not rest and section is not None and item.default is MISSING:
        raise _not_a_value(section, value)
    if rest and section is not None:
        value = _replaced(section() if current is None else current, rest, value, key)
    elif rest and isinstance(current, Choice) and len(rest) == 1:
        value = value if rest == ["kind"] else {"kind": current.kind, **current.values, rest[0]: value}
    elif rest:
        raise unknown_key(key, value)
    return dataclasses.replace(owner, **{name: value})


def _section_from(spec: type[Section], value: object) -> Section:
    if not isinstance(value, Mapping):
        raise _not_a_value(spec, value)
    for key, item in value.items():
        if key not in _keys(spec):
            raise unknown_key(f"{spec.section}.{shown(key)}", item)
    return spec(**value)


def _not_a_value(spec: type[Section], value: object) -> UserError:
    return UserError(
        f"{spec.section} is a section, not a value",
        value=value,
        rule="its keys: " + ", ".join(_keys(spec)),
        fix=f"write `{spec.section}:` and its keys below it, indented",
    )


def _keys(spec: Any) -> dict[str, dataclasses.Field[Any]]:
    """The keys of a section, or of a study; a value has none."""
    return {item.name: item for item in dataclasses.fields(spec)} if dataclasses.is_dataclass(spec) else {}


def unknown_key(key: str, value: object) -> UserError:
    """Say what became of an old key; else suggest the closest, also one of the same name elsewhere."""
    key = shown(key)  # however long it is
    section, dot, _ = key.partition(".")
    items = _keys(Study).items()
    below = {name: list(_keys(item.metadata.get("section") or item.metadata.get("each"))) for name, item in items}
    every = [f"{name}.{part}" if part else name for name, parts in below.items() for part in parts or [""]]
    same = [f"did you mean {known}?" for known in every if known.rsplit(".", 1)[-1] == key.rsplit(".", 1)[-1]]
    guess = same[0] if same else did_you_mean(key, [*every, *below], 0.6)
    return UserError(
        f"unknown key {key}",
        value=value,
        rule="known keys here: " + ", ".join((dot and below.get(section)) or below),
        fix=gone.key(key) or guess or "remove it, or see docs/formats.md",
    )


def _checked(key: str, rule: Rule, value: object) -> Any:
    try:
        return rule.parse(value)
    except (ValueError, OverflowError):
        fix = did_you_mean(value, rule.choices) or f"correct {key} in the study"
        quoted = repr(value[:200]) if isinstance(value, str) else "null" if value is None else value
        raise UserError(f"{key} is not valid", value=quoted, rule=rule.text, fix=fix) from None
    except UserError as error:
        if key.split(".")[0] in error.what:
            raise
        raise UserError(f"{key}: {error.what}", value=error.value, rule=error.rule, fix=error.fix) from None
