"""A behavior of one's own: log-probability that the answer begins with one word."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

import numpy as np
from torch import Tensor

from taught.core import rules
from taught.core.registry import BEHAVIORS, setting


@BEHAVIORS.register("shout")
@dataclass(frozen=True)
class Shout:
    """Log-probability that the answer begins with a word."""

    word: str = setting("No", rules.text(), "the word")
    unit: ClassVar[str] = "nats"

    @property
    def meaning(self) -> str:
        return f"log-probability that the answer begins with {self.word}"

    def encode(self, prompt: Any, chat: Any) -> Any:
        return chat.encode_answers(prompt.content, [self.word], prompt.id)

    def value(self, logp: Tensor, lengths: Tensor, prompt: Tensor, n: int) -> Tensor:
        return logp  # one suffix a prompt

    def degree(self, y: Any) -> Any:
        return np.exp(y)
