"""y = log-probability of an answer that each prompt brings with it.

    y_i = sum_j log P(a_j | prompt_i, a_1 ... a_j-1),    or its mean over the tokens of the answer

Such as what the model wrongly said: examples with a high influence taught it to say that.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar

from taught.core import rules
from taught.core.behavior import Unscorable
from taught.core.registry import BEHAVIORS, setting

if TYPE_CHECKING:
    from torch import Tensor

    from taught.data.chat import ChatFormat, EncodedPrompt
    from taught.data.prompts import Prompt


@BEHAVIORS.register("answer")
@dataclass(frozen=True)
class Answer:
    """Each prompt's own answer (column `answer`)."""

    reduce: str = setting("sum", rules.one_of("sum", "mean"), "sum over the tokens of the answer, or their mean")
    unit: ClassVar[str] = "nats"

    @property
    def meaning(self) -> str:
        """What y is."""
        per = "log-probability" if self.reduce == "sum" else "mean log-probability per token"
        return f"{per} of each prompt's own answer"

    def encode(self, prompt: Prompt, chat: ChatFormat) -> EncodedPrompt:
        """The prompt with its answer."""
        return encode_own_answer(prompt, chat)

    def value(self, logp: Tensor, lengths: Tensor, prompt: Tensor, n: int) -> Tensor:
        """Sum or mean over the tokens of each answer."""
        return logp if self.reduce == "sum" else logp / lengths

    def degree(self, y: Any) -> Any:
        """The probability of the answer, or of its tokens in the geometric mean."""
        import numpy as np

        return np.exp(y)


def encode_own_answer(prompt: Prompt, chat: ChatFormat) -> EncodedPrompt:
    """A prompt with the answer of its own column.

    Raises
    ------
    Unscorable
        It has none.
    """
    answer = str(prompt.answer)
    if not answer.strip():
        raise Unscorable(
            "there is no answer",
            "this behavior is about the answer that each prompt brings",
            "fill the column `answer`, or use another behavior.kind",
        )
    return chat.encode_answers(prompt.content, [answer], prompt.id)
