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
    if prompt.options:  # its letter or number says nothing by itself
        answer = prompt.options[right_option(prompt)].strip()
    return chat.encode_answers(prompt.content, [answer], prompt.id)


def right_option(prompt: Prompt) -> int:
    """Index of the option that the answer names by its text, its index or its letter.

    Raises
    ------
    Unscorable
        It names none.
    """
    from taught.data.choices import Options

    found = Options(prompt.options).place(prompt.answer)
    if found is None:
        raise Unscorable(
            "the answer is not among the options",
            "the right option is named by its text, its index (a number from 0) or its letter",
            "correct the column `answer`",
        )
    return found
