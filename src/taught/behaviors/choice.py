"""y = log-odds of the right option against the others.

    y_i = log p(right | prompt_i) - log sum_{o other} p(o | prompt_i)

By letter the options stand in the question, "A. ..." line by line, and p is that of the letter. As
cloze they do not, and p is that of the option's text; per token (`normalise`) p is the geometric mean
over its tokens, so that a long option is not less likely for its length.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import inf
from string import ascii_uppercase
from typing import TYPE_CHECKING, Any, ClassVar

from taught.behaviors.answer import right_option
from taught.core import rules
from taught.core.behavior import Unscorable, in_rows
from taught.core.registry import BEHAVIORS, setting

if TYPE_CHECKING:
    from torch import Tensor

    from taught.data.chat import ChatFormat, EncodedPrompt
    from taught.data.prompts import Prompt


@BEHAVIORS.register("choice")
@dataclass(frozen=True)
class Choice:
    """The right one of the options that each prompt brings (columns `options`, `answer`)."""

    style: str = setting("letter", rules.one_of("letter", "cloze"), "score the option's letter, or its text")
    normalise: bool = setting(False, rules.flag(), "per token of the option; for cloze")
    unit: ClassVar[str] = "nats"

    @property
    def meaning(self) -> str:
        """What y is."""
        by = "letter" if self.style == "letter" else "text, per token" if self.normalise else "text"
        return f"log-odds of the right option against the others, by its {by}"

    def encode(self, prompt: Prompt, chat: ChatFormat) -> EncodedPrompt:
        """The prompt with its options, the right one first."""
        options = [option.strip() for option in prompt.options]
        if not all(options) or not 2 <= len(options) <= len(ascii_uppercase):
            raise Unscorable(
                "options are missing or empty",
                f"a choice is among 2 to {len(ascii_uppercase)} options, each a text",
                "fill the column `options`: a list of texts",
            )
        if len({" ".join(option.split()) for option in options}) < len(options):
            rule = "each option is another text (white space is ignored)"
            raise Unscorable("some options are equal", rule, "correct the column `options`")
        right = right_option(prompt)
        order = [right, *(i for i in range(len(options)) if i != right)]
        if self.style == "cloze":
            found = chat.encode_answers(prompt.content, [options[i] for i in order], prompt.id)
        else:
            lines = [f"{letter}. {option}" for letter, option in zip(ascii_uppercase, options, strict=False)]
            asked = prompt.extended("\n" + "\n".join(lines))
            found = chat.encode_answers(asked, [ascii_uppercase[i] for i in order], prompt.id)
        if len(set(found.suffixes)) < len(order):  # in one case or form only, or of letters that it does not know
            raise Unscorable(
                "some options are the same tokens",
                "the model can tell the options apart",
                "write them so that the tokenizer keeps them apart, or use --set behavior.style=letter",
            )
        return found

    def value(self, logp: Tensor, lengths: Tensor, prompt: Tensor, n: int) -> Tensor:
        """Log-odds of each prompt's first suffix."""
        rows = in_rows(logp / lengths if self.normalise else logp, prompt, n, -inf)
        return rows[:, 0] - rows[:, 1:].logsumexp(1)

    def margin(self, logp: Tensor, lengths: Tensor, prompt: Tensor, n: int) -> Tensor:
        """How much likelier each prompt's first suffix is than the likeliest other one, [n]."""
        rows = in_rows(logp / lengths if self.normalise else logp, prompt, n, -inf)
        return rows[:, 0] - rows[:, 1:].amax(1)

    def degree(self, y: Any) -> Any:
        """Probability of the right option among the options."""
        import numpy as np

        return 1 / (1 + np.exp(-np.asarray(y)))
