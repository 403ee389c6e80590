"""How a model is trained: what training depends on besides the model and the examples."""

from __future__ import annotations

from dataclasses import dataclass, fields

from taught.study.schema import ValidationSpec


@dataclass(frozen=True)
class Recipe:
    """What training depends on besides the model and the examples.

    Attributes
    ----------
    trainer : "loop" or "trl"
    method : "full" (every parameter that moves) or "lora" (fresh layers of rank ``lora_rank``)
    optimizer : "adamw" (betas .9 and .999, eps 1e-8, decoupled decay) or "sgd"
    lr : the largest learning rate
    epochs : how often each example is seen
    batch : examples of one step; the last step of an epoch may have fewer
    weight_decay : of every parameter that moves
    schedule : "constant", or "linear" down to 0 behind the last step
    warmup : share of the steps, rounded up, over which the learning rate rises from 0
    max_grad_norm : longer gradients are scaled down to this norm; None: they are not
    seed : of the order of the examples and of a LoRA's first weights
    momentum : of sgd
    batches : what becomes of the batches that a left-out example was in: "refilled" (the others move up), or "held"
        (it keeps its place with weight 0: order, batches and denominators stay)
    """

    trainer: str
    method: str
    lora_rank: int
    optimizer: str
    lr: float
    epochs: int
    batch: int
    weight_decay: float
    schedule: str
    warmup: float
    max_grad_norm: float | None
    seed: int
    momentum: float = 0.0
    batches: str = "refilled"

    @classmethod
    def of(cls, spec: ValidationSpec) -> Recipe:
        """The recipe of a study's section ``validation``."""
        return cls(**{item.name: getattr(spec, item.name) for item in fields(cls)})
