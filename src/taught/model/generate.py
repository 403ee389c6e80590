"""A model's own answers: greedy decoding, batched, with nothing but the logits deciding.

Generation settings that models carry along (penalties, temperatures) are not applied.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Collection, Sequence

import torch
from torch import nn
from torch.nn.utils.rnn import pad_sequence

from taught.model.gradients import evaluating
from taught.model.layout import first_device, stretched_from, takes_trees
from taught.model.tokens import batches_by_tokens


@torch.no_grad()
def greedy(
    model: nn.Module, prompts: Sequence[Sequence[int]], ends: Collection[int], limit: int, *, batch_tokens: int = 4096
) -> list[tuple[int, ...]]:
    """Most probable next token after token, for each prompt, until one of ``ends`` or the limit.

    Parameters
    ----------
    prompts : token ids, with the generation prompt
    ends : tokens that end an answer; the one that does is part of it
    limit : tokens an answer may have
    batch_tokens : Padded tokens of a batch, answers at their limit included

    Returns
    -------
    One answer a prompt, of at least one token. Cost: ``limit`` steps with a cache of keys and
    values for each batch; where padding or the length of others would change what a model computes, ``limit`` passes
    over each prompt alone.
    """
    answers: list[tuple[int, ...]] = [()] * len(prompts)
    plain = min(stretched_from(model).values(), default=math.inf)
    with evaluating(model):
        if not takes_trees(model) or any(len(prompt) + limit > plain for prompt in prompts):
            return [_decode_alone(model, prompt, frozenset(ends), limit) for prompt in prompts]
        for batch in batches_by_tokens([len(p) + limit for p in prompts], batch_tokens):
            rows = _decode(model, [prompts[i] for i in batch], frozenset(ends), limit)
            for i, row in zip(batch, rows, strict=True):
                answers[i] = row
    return answers


def _decode_alone(model: nn.Module, prompt: Sequence[int], ends: frozenset[int], limit: int) -> tuple[int, ...]:
    """One prompt with no padding, positions or cache of its own: right for recurrent models too."""
    answer: list[int] = []
    while len(answer) < limit and (not answer or answer[-1] not in ends):
        ids = torch.tensor([[*prompt, *answer]], device=first_device(model))
        answer.append(int(model(input_ids=ids, use_cache=False).logits[0, -1].argmax()))
    return tuple(answer)


def _decode(
    model: nn.Module, prompts: Sequence[Sequence[int]], ends: frozenset[int], limit: int
) -> list[tuple[int, ...]]:
    tokens = [torch.tensor(prompt, dtype=torch.long, device=first_device(model)) for prompt in prompts]
    ids = pad_sequence(tokens, batch_first=True, padding_side="left")
    mask = pad_sequence([torch.ones_like(own) for own in tokens], batch_first=True, padding_side="left")
    rows: list[list[int]] = [[] for _ in prompts]
    # What this version of transformers calls the keys and values of earlier tokens.
    name = "cache" if "cache" in inspect.signature(model.forward).parameters else "past_key_values"
    cache = None
    for _ in range(limit):
        positions = (mask.cumsum(1) - 1).clamp(min=0)[:, -ids.shape[1] :]
        out = model(
            input_ids=ids,
            attention_mask=mask,
            position_ids=positions,
            use_cache=True,
            logits_to_keep=1,
            **{name: cache},
        )
        cache, chosen = getattr(out, name), out.logits[:, -1].argmax(-1)
        for row, token in zip(rows, chosen.tolist(), strict=True):
            if not row or row[-1] not in ends:
                row.append(token)
        if all(row[-1] in ends for row in rows):
            break
        ids = chosen.unsqueeze(1)
        mask = torch.cat([mask, mask.new_ones(len(rows), 1)], 1)
    return [tuple(row) for row in rows]
