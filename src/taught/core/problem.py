"""The problem: a model, what is read of it on the evaluation prompts, and the step that is taken."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from taught.core.behavior import Behavior
from taught.core.curvature import Metric
from taught.core.point import Point
from taught.features.concept import ConceptMap
from taught.features.pooling import FeatureMap
from taught.model.forward import get_point
from taught.model.readout import ReadPrompt, read_prompts

if TYPE_CHECKING:
    from taught.training.recipe import Recipe

GB = 1024**3


@dataclass(frozen=True, eq=False)
class Problem:
    """Everything an effect depends on besides the examples and the targets.

    Attributes
    ----------
    model, prompts, behavior : as in :mod:`taught.model.readout`
    lr : learning rate of the one step
    point, features : where X is read, and h -> X (activations of features, or read-outs of concepts);
        None where no target asks for X
    batch_tokens : padded tokens a batch of examples may have
    memory_gb : working memory for gradients, in GiB
    parameters : patterns of the parameters that the step moves (``moving_parameters``); None: all
    metric : C of the step, fitted (``taught.core.curvature``)
    X : float64 [N, d], activations at the model's weights; None: those of the policy
    checkpointing : run the blocks again for the examples' gradients instead of keeping activations
    opener : opens other weights of the same training run, by folder or hub id and revision; None: nothing does
    plain : the same problem with plain steps, where this one has a metric
    identity : what identifies the weights and the read-outs, as plain values, for what is kept
    recipe : how the examples are trained on, where a whole run is followed; None: that is not known
    """

    model: nn.Module
    prompts: Sequence[ReadPrompt]
    behavior: Behavior
    lr: float
    point: Point | None = None
    features: FeatureMap | ConceptMap | None = None
    batch_tokens: int = 512
    memory_gb: float = 3.75
    parameters: tuple[str, ...] | None = None
    metric: Metric = field(default_factory=Metric)
    X: Tensor | None = None
    checkpointing: bool = False
    opener: Callable[[str, str | None], nn.Module] | None = None
    plain: Problem | None = None
    identity: Mapping[str, Any] = field(default_factory=dict)
    recipe: Recipe | None = None

    def __post_init__(self) -> None:
        if self.point is not None:
            get_point(self.model, self.point)  # it may take a pass of its own, which no gradient is taken through

    @property
    def d(self) -> int:
        """Columns of X."""
        return 0 if self.features is None else len(self.features.ids)

    def within(self, metric: Metric) -> Problem:
        """The same problem with steps in this metric."""
        return replace(self, metric=metric, parameters=metric.parameters or self.parameters, plain=self)

    def at(self, model: nn.Module, lr: float) -> Problem:
        """The same problem at other weights. Cost: one forward pass over the prompts, for the gates of X."""
        if self.features is None:
            return replace(self, model=model, lr=lr)
        reads = read_prompts(model, self.prompts, self.behavior, self.point)
        with torch.no_grad():
            X = self.features(reads.h, reads.offsets)
        return replace(self, model=model, lr=lr, X=X.double().cpu())
