"""Behaviors: one number y for each evaluation prompt, of the log-probabilities of what may follow it.

    y_i = f( log p(s | prompt_i) for each suffix s of prompt i )
    log p(s | prompt) = sum_j log P(s_j | prompt, s_1 ... s_j-1)

A behavior says which token sequences (suffixes) are scored behind a prompt, and what f is. Everything
else, such as which passes they share, which gradients are taken, is the same for all behaviors.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import asdict
from typing import TYPE_CHECKING, Any, Protocol

from taught.data.columns import repeated
from taught.errors import refuse

if TYPE_CHECKING:
    from torch import Tensor

    from taught.data.chat import ChatFormat, EncodedPrompt
    from taught.data.prompts import Prompt


class Behavior(Protocol):
    """What is measured on every evaluation prompt; a frozen dataclass of a study's parameters.

    One that is about a choice may also have ``margin``, with the parameters of ``value``: how far the right option is
    before the best other one, [n]. The accuracy of the model is made of it.
    """

    @property
    def meaning(self) -> str:
        """What y is, and what a larger y means, for a reader of the report."""

    @property
    def unit(self) -> str:
        """Unit of y."""

    def encode(self, prompt: Prompt, chat: ChatFormat) -> EncodedPrompt:
        """Tokens of the prompt, and of the suffixes to score behind it, at least one.

        Raises
        ------
        Unscorable
            The prompt lacks what the behavior needs.
        """

    def value(self, logp: Tensor, lengths: Tensor, prompt: Tensor, n: int) -> Tensor:
        """y [n] of some prompts, differentiable, each from its own suffixes alone.

        Parameters
        ----------
        logp : [S], log-probability of each suffix; a prompt's suffixes in the order of ``encode``
        lengths : int64 [S], number of tokens of each
        prompt : int64 [S], ascending: the prompt that each belongs to
        n : number of prompts
        """

    def degree(self, y: Any) -> Any:
        """How much of the behavior is shown, from 0 to 1 and rising with y: of an array like y."""


class Unscorable(ValueError):
    """One prompt lacks what a behavior needs (what, rule, fix); :func:`encode_prompts` says so of all at once."""


def encode_prompts(behavior: Behavior, prompts: Iterable[Prompt], chat: ChatFormat) -> list[EncodedPrompt]:
    """Prompts as tokens with what is scored behind each, in order.

    Raises
    ------
    UserError
        Prompts lack what the behavior needs, have nothing to score, or would count twice: their ids.
    """
    encoded: list[EncodedPrompt] = []
    faults: dict[tuple[str, str, str], list[str]] = {}
    for prompt in prompts:
        try:
            encoded.append(behavior.encode(prompt, chat))
        except Unscorable as fault:
            faults.setdefault(fault.args, []).append(prompt.id)
    for (what, rule, fix), ids in faults.items():
        refuse(ids, f"{what} of {len(ids)} prompts", rule=rule, fix=fix)
    empty = [e.id for e in encoded if not e.suffixes or not all(e.suffixes)]
    refuse(
        empty,
        f"what is scored of {len(empty)} prompts has no tokens",
        rule="y is made of the probabilities of tokens",
        fix="fill these cells, or remove the prompts",
    )
    same = repeated((str((e.input_ids, e.suffixes)), e.id) for e in encoded)
    refuse(
        [" = ".join(ids) for ids in same],
        f"{len(same)} prompts occur more than once with the same answers",
        rule="a repeated prompt would count twice",
        fix="remove the repeats",
    )
    return encoded


def behavior_record(behavior: Behavior) -> dict[str, Any]:
    """What y depends on besides the prompts' tokens, as plain values: the kind and its parameters."""
    values = asdict(behavior)  # type: ignore[call-overload]
    plain = {name: list(value) if isinstance(value, tuple) else value for name, value in values.items()}
    return {"kind": type(behavior).__name__, **plain}


def in_rows(values: Tensor, group: Tensor, n: int, fill: float) -> Tensor:
    """The values of each group in a row of their own, [n, most], ``fill`` behind them.

    Parameters
    ----------
    values : [S]
    group : int64 [S], ascending
    """
    counts = group.bincount(minlength=n)
    place = group.new_ones(len(group)).cumsum(0) - 1 - (counts.cumsum(0) - counts)[group]
    return values.new_full((n, int(counts.max())), fill).index_put((group, place), values)
