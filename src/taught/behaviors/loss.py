"""y = mean negative log-likelihood of a text, per token.

    y_i = - 1/n sum_j log P(t_j | what stands before it)

The text is the prompt's own, read by itself as in pretraining, or the answer behind the prompt.
Sign: y is a loss. Training on an example with positive influence makes the text *less* likely.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from taught.behaviors.answer import encode_own_answer
from taught.core import rules
from taught.core.registry import BEHAVIORS, setting

if TYPE_CHECKING:
    from torch import Tensor

    from taught.data.chat import ChatFormat, EncodedPrompt
    from taught.data.prompts import Prompt


@BEHAVIORS.register("loss")
@dataclass(frozen=True)
class Loss:
    """How unlikely a text is: the prompt's text by itself, or the answer behind it."""

    of: str = setting(
        "answer",
        rules.one_of("answer", "text"),
        "the answer behind the prompt, or the prompt's text by itself, without a chat template",
    )
    unit: ClassVar[str] = "nats per token"
    worse_above: ClassVar[bool] = True

    @property
    def meaning(self) -> str:
        """What y is."""
        what = "text" if self.of == "text" else "prompt's own answer"
        return f"mean negative log-likelihood per token of each {what}: the larger, the less likely it is"

    def encode(self, prompt: Prompt, chat: ChatFormat) -> EncodedPrompt:
        """The text by itself, or the prompt with its answer."""
        return chat.encode_text(prompt.text, prompt.id) if self.of == "text" else encode_own_answer(prompt, chat)

    def value(self, logp: Tensor, lengths: Tensor, prompt: Tensor, n: int) -> Tensor:
        """Minus the mean over the tokens of each text."""
        return -logp / lengths

    def degree(self, y: Any) -> Any:
        """One minus the probability of a token, in the geometric mean."""
        import numpy as np

        return -np.expm1(-np.asarray(y))
