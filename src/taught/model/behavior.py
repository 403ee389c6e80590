"""The behavior: y = log of the summed probability of a set of response prefixes.

    y_i = log sum_p prod_j P(p_j | prompt_i, p_1 ... p_{j-1})

(arXiv 2606.29171, section 3: the refusal score.) Each prefix is scored under its own history,
directly after the generation prompt; prefixes that share tokens share the computation.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from taught.errors import UserError


@dataclass(frozen=True)
class PrefixBehavior:
    """A set of prefixes laid out as a tree under the last token of a prompt.

    Attributes
    ----------
    prefixes : texts that are scored
    tokens : the token ids of each prefix
    dropped : prefixes left out because another one is their beginning (their event is contained in
        the shorter one's, so counting both would count it twice)
    inner : token ids of the tree's inner nodes (every token after which another one is predicted)
    inner_parents : parent of each inner node; 0 is the prompt's last token, node k is slot k + 1
    steps : for each prefix its (slot, token) examples: ``token`` is predicted at ``slot``
    """

    prefixes: tuple[str, ...]
    tokens: tuple[tuple[int, ...], ...]
    dropped: tuple[str, ...]
    inner: tuple[int, ...]
    inner_parents: tuple[int, ...]
    steps: tuple[tuple[tuple[int, int], ...], ...]

    @property
    def slots(self) -> int:
        """Number of tokens at which logits are needed, the prompt's last token included."""
        return 1 + len(self.inner)

    def inner_paths(self) -> list[tuple[int, ...]]:
        """Token paths from the prompt to each inner node, in slot order."""
        paths: list[tuple[int, ...]] = [()]
        for token, parent in zip(self.inner, self.inner_parents, strict=True):
            paths.append((*paths[parent], token))
        return paths[1:]

    def log_probability(self, logits: Tensor) -> Tensor:
        """y of each prompt.

        Parameters
        ----------
        logits : [N, slots, V]
            Next-token logits at the prompt's last token (slot 0) and at every inner node.

        Returns
        -------
        [N], natural logarithm; float32, or float64 if the logits are.
        """
        wide = logits if logits.dtype == torch.float64 else logits.float()
        logp = torch.log_softmax(wide, dim=-1)
        terms = [torch.stack([logp[:, s, t] for s, t in steps]).sum(0) for steps in self.steps]
        return torch.logsumexp(torch.stack(terms), dim=0)


def build_behavior(prefixes: Sequence[str], tokens: Sequence[Sequence[int]]) -> PrefixBehavior:
    """Lay prefixes out as a tree.

    Raises
    ------
    UserError
        No prefix, or a prefix without tokens.
    """
    if not prefixes:
        raise UserError(
            "no prefixes given",
            rule="a behavior is at least one response prefix",
            fix="set behavior.prefixes in the study",
        )
    for text, ids in zip(prefixes, tokens, strict=True):
        if not ids:
            raise UserError("a prefix has no tokens", value=text, fix="remove the empty prefix")
    kept, dropped = _without_extensions(prefixes, [tuple(ids) for ids in tokens])
    slot_of: dict[tuple[int, ...], int] = {(): 0}
    inner: list[int] = []
    parents: list[int] = []
    steps = []
    for _, ids in kept:
        for cut in range(1, len(ids)):
            if ids[:cut] not in slot_of:
                slot_of[ids[:cut]] = len(inner) + 1
                parents.append(slot_of[ids[: cut - 1]])
                inner.append(ids[cut - 1])
        steps.append(tuple((slot_of[ids[:j]], token) for j, token in enumerate(ids)))
    return PrefixBehavior(
        prefixes=tuple(text for text, _ in kept),
        tokens=tuple(ids for _, ids in kept),
        dropped=tuple(dropped),
        inner=tuple(inner),
        inner_parents=tuple(parents),
        steps=tuple(steps),
    )


def _without_extensions(
    prefixes: Sequence[str], tokens: Sequence[tuple[int, ...]]
) -> tuple[list[tuple[str, tuple[int, ...]]], list[str]]:
    """Keep a prefix only if no other one is its beginning (of equal ones the first is kept)."""
    kept, dropped = [], []
    for i, (text, ids) in enumerate(zip(prefixes, tokens, strict=True)):
        covered = any(
            ids[: len(other)] == other and (len(other) < len(ids) or j < i) for j, other in enumerate(tokens) if j != i
        )
        if covered:
            dropped.append(text)
        else:
            kept.append((text, ids))
    return kept, dropped


def tokenize_prefixes(tokenizer: Any, prefixes: Sequence[str]) -> list[tuple[int, ...]]:
    """Token ids of each prefix as the model would write it right after the generation prompt."""
    return [tuple(tokenizer(text, add_special_tokens=False)["input_ids"]) for text in prefixes]
