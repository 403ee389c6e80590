"""From a study to the objects that the stages work on: data, model, SAE, behavior, token inputs."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any

from taught.core.behavior import Behavior, encode_prompts
from taught.core.example import Dpo, Example, example_losses
from taught.core.registry import BEHAVIORS
from taught.data.chat import ChatFormat, EncodedExample, EncodedPrompt
from taught.data.corpus import open_corpus, sample_documents
from taught.data.examples import ExampleSet, load_examples
from taught.data.overlap import drop_overlap
from taught.data.prompts import Prompt, PromptSet, load_prompts
from taught.data.subset import Spread, spread
from taught.errors import UserError, refuse
from taught.features.pooling import FeatureMap, read_tokens
from taught.features.sae import SparseAutoencoder, load_sae
from taught.features.select import Selection, select_features
from taught.model.adapter import without_adapter
from taught.model.forward import get_point
from taught.model.layout import takes_trees, text_config, use_plain_passes
from taught.model.load import AnAdapterError, LoadedModel, load_model
from taught.model.readout import ReadPrompt
from taught.study.schema import Study

if TYPE_CHECKING:
    import numpy as np
    from torch import nn

_FARTHEST = 50  # of beta times the margin: its loss has a slope of 2e-22 there, or none of another than 1
_REFERENCE_TOKENS = 512  # of a batch of the pass that reads the reference: no number depends on it but by rounding


@dataclass(frozen=True, eq=False)
class Subject:
    """The model under study with what is read from it.

    Attributes
    ----------
    loaded : the model, its tokenizer and which weights were used
    chat : its chat format
    sae : the sparse autoencoder, in the model's dtype and on its device; None: there is none
    behavior : what is measured on every prompt
    """

    loaded: LoadedModel
    chat: ChatFormat
    sae: SparseAutoencoder | None
    behavior: Behavior

    @cached_property
    def identity(self) -> dict[str, Any]:
        """What a result depends on beyond the study's text: the weights that were loaded, and what text becomes.

        A hub may serve other weights under the same name tomorrow, and another version of a library other tokens.
        """
        found: dict[str, Any] = {"model.weights": dict(self.loaded.weights), "tokens": self.chat.digest()}
        return found if self.sae is None else {**found, "sae.weights": self.sae.sha256()}

    @property
    def width(self) -> int:
        """Width of the residual stream."""
        return int(self.loaded.model.config.get_text_config().hidden_size)

    @property
    def required_sae(self) -> SparseAutoencoder:
        """The sparse autoencoder.

        Raises
        ------
        UserError
            The study has none.
        """
        if self.sae is None:
            rule, fix = "a policy is written in the features of an SAE", "set sae.path in the study"
            raise UserError("this needs a sparse autoencoder, and the study has none", rule=rule, fix=fix)
        return self.sae

    def moving(self, study: Study) -> tuple[str, ...] | None:
        """Patterns of the parameters that a step moves: those that an adapter trains where there is one."""
        patterns = study.attribution.parameters
        return self.loaded.moving if patterns is None else patterns

    def encode(self, prompts: Iterable[Prompt]) -> list[EncodedPrompt]:
        """Prompts as tokens, with what the behavior scores behind each."""
        return encode_prompts(self.behavior, prompts, self.chat)

    def inputs(self, encoded: Sequence[EncodedExample], beta: float) -> list[Example]:
        """Token inputs of examples, preferences with their loss.

        The reference of a preference is what the data give, else the model under study without its adapter: the
        model that training began at. Cost: one forward pass over the preferences.

        Raises
        ------
        UserError
            A reference of the data is so far from the model that a preference has no slope left.
        """
        inputs = [e.example() for e in encoded]
        margins = {e.id: e.reference[0] - e.reference[1] for e in encoded if e.reference is not None}
        given = set(margins)
        if asked := [z for z, e in zip(inputs, encoded, strict=True) if e.rejected is not None and e.id not in given]:
            with without_adapter(self.loaded.model):
                sums = example_losses(self.loaded.model, asked, _REFERENCE_TOKENS)
            margins |= {z.id: -value for z, value in zip(asked, sums.tolist(), strict=True)}
        if known := [z for z in inputs if z.id in given]:
            sums = example_losses(self.loaded.model, known, _REFERENCE_TOKENS)
            away = {z.id: value + margins[z.id] for z, value in zip(known, sums.tolist(), strict=True)}
            refuse(
                [f"{id}: {value:.4g} nats" for id, value in away.items() if abs(beta * value) > _FARTHEST],
                "the log-probabilities of the reference are of another scale than the model's",
                rule=f"chosen minus rejected, reference minus model: at most {_FARTHEST} / examples.beta",
                fix="give sums over the tokens of each answer, natural logarithm; or leave them out",
            )
        return [replace(z, link=Dpo(beta, margins[z.id], z.id in given)) if z.id in margins else z for z in inputs]

    def features(self, ids: Any, study: Study) -> FeatureMap:
        """h -> X for the given feature ids."""
        import torch

        sae = self.required_sae
        index = torch.as_tensor(ids, device=sae.W_enc.device)
        return FeatureMap(sae, index, study.sae.encoder, study.readout.position)


def open_subject(study: Study, loaded: LoadedModel | None = None) -> Subject:
    """Load the model (unless it is given), its chat format, the SAE (if the study has one) and the behavior.

    Raises
    ------
    UserError
        Something is missing or does not fit: the SAE's width, where it reads, the chat template.
    """
    loaded = loaded or _load(study, study.model.id)
    context = getattr(text_config(loaded.model), "max_position_embeddings", None)
    chat = ChatFormat(loaded.tokenizer, context=context, date=study.model.date)
    subject = Subject(loaded, chat, None, study.behavior.make(BEHAVIORS, "behavior"))
    if study.sae.path is None:
        return subject
    parameter = next(loaded.model.parameters())
    sae = load_sae(study.sae.path, block=study.sae.block, part=study.sae.point, ignore=study.sae.ignore)
    sae = sae.to(parameter.device, parameter.dtype)
    module = get_point(loaded.model, sae.point)
    if others := [other for other in sae.also if get_point(loaded.model, other) is not module]:
        raise UserError(
            "the SAE names two places of the model",
            value=f"{sae.hook}: {sae.point}, and {others[0]}",
            rule="hook_name and hf_hook_name are of one place",
            fix="correct the SAE's cfg.json, or use another SAE",
        )
    if sae.width != subject.width:
        raise UserError(
            "the SAE does not fit the model's width",
            value=f"SAE {sae.width}, model {subject.width}",
            rule="both have the width of the residual stream",
            fix="use an SAE that was trained on this model",
        )
    return replace(subject, sae=sae)


def _load(study: Study, id: str, **instead: Any) -> LoadedModel:
    """Load a model as the study loads its own, but for some arguments of ``load_model``."""
    keys = ("revision", "dtype", "device", "load_in", "chat_template", "adapter")
    return load_model(id, **{key: getattr(study.model, key) for key in keys} | instead)


def open_checkpoint(study: Study, subject: Subject, id: str, revision: str | None) -> nn.Module:
    """Load the model of a checkpoint of the same training run.

    It may be an adapter of the study's model; where the study has an adapter, it is one.

    Raises
    ------
    UserError
        It has another vocabulary or another width, or lacks the point that the SAE reads.
    """
    on_model = {"adapter": id, "adapter_revision": revision}
    if study.model.adapter is None:
        try:
            loaded = _load(study, id, revision=revision)
        except AnAdapterError:
            loaded = _load(study, study.model.id, **on_model)
    else:
        loaded = _load(study, study.model.id, **on_model)
    fix, width = "use checkpoints of one training run", loaded.model.config.get_text_config().hidden_size
    if loaded.tokenizer.get_vocab() != subject.loaded.tokenizer.get_vocab():
        rule = "examples and prompts are the same tokens at every checkpoint"
        raise UserError("a checkpoint has another tokenizer than the model", value=id, rule=rule, fix=fix)
    if width != subject.width:
        value, rule = f"{id}: {width}, model {subject.width}", "what is read is read alike at every checkpoint"
        raise UserError("a checkpoint has another width than the model", value=value, rule=rule, fix=fix)
    if study.model.adapter is not None and loaded.moving != subject.loaded.moving:
        what = "the adapter of a checkpoint trains other parameters than the model's"
        raise UserError(what, value=id, rule="the same parameters move at every checkpoint", fix=fix)
    if subject.sae is not None:
        get_point(loaded.model, subject.sae.point)
    use_plain_passes(loaded.model, not takes_trees(subject.loaded.model))
    return loaded.model


def study_prompts(study: Study, source: Any = None) -> PromptSet:
    """The evaluation prompts of the study, or of another source, at most ``prompts.limit``; both groups must occur."""
    prompts = load_prompts(study.prompts.path if source is None else source)
    chosen = spread(prompts.prompts, study.prompts.limit, lambda p: (p.group, p.category), lambda p: p.id)
    for group in (study.prompts.positive_group, study.prompts.negative_group):
        if group is not None and all(prompt.group != group for prompt in chosen):
            raise UserError(
                "a group has no prompts",
                value=group,
                rule=f"groups in the file: {', '.join(prompts.groups)}",
                fix="set prompts.positive_group and prompts.negative_group",
            )
    return replace(prompts, prompts=chosen)


def chosen_examples(study: Study, source: Any = None) -> ExampleSet:
    """The examples of the study, or of another source, at most ``examples.limit``; overlap is not looked at."""
    spec = study.examples
    source = spec.path if source is None else source
    how = Spread(spec.limit, spec.spread, spec.even, spec.seed)
    if spec.kind == "document":
        return sample_documents(open_corpus(source), how)
    return load_examples(source, spec.kind, turns=spec.turns).spread(how)


def study_examples(study: Study, prompts: PromptSet) -> tuple[ExampleSet, list[str]]:
    """The examples, at most ``examples.limit``, and the ids that were dropped for overlap."""
    kept, overlap = drop_overlap(chosen_examples(study), prompts, study.examples.drop_overlap)
    return kept, [example_id for example_id, _ in overlap]


def select(study: Study, prompts: Iterable[Prompt], X: np.ndarray) -> Selection:
    """The features that the study's rules choose, of the activations X [N, F] of all features."""
    positive, negative = study.prompts.sides
    spec, groups = study.features, [prompt.group for prompt in prompts]
    how: dict[str, Any] = {"threshold": spec.threshold, "max_features": spec.max_features, "ids": spec.ids}
    return select_features(X, groups, positive=positive, negative=negative, **how)


def prompt_inputs(encoded: Sequence[EncodedPrompt], position: str | None) -> list[ReadPrompt]:
    """Token inputs of evaluation prompts with the tokens at which h is read; none without a position."""
    return [
        ReadPrompt(e.id, tuple(e.input_ids), tuple(read_tokens(e, position) if position else ()), e.suffixes)
        for e in encoded
    ]
