"""Whether a model computes in the passes of this package what it computes for one text alone.

The reference is the model called on one text: no padding, no mask, no batch. Token trees and batches are compared with
it on texts of the run itself, the longest among them: a window or a limit of positions that no text reaches shows in
none of them.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial

import torch
from torch import Tensor, nn

from taught.core.behavior import Behavior
from taught.core.example import Example, make_batch
from taught.data.columns import name_ids
from taught.errors import UserError
from taught.model.forward import log_probabilities
from taught.model.gradients import evaluating
from taught.model.layout import accepts, first_device, stretched_from, takes_trees, use_plain_passes
from taught.model.readout import PACK_TOKENS, ReadPrompt, pack, read_prompts, read_prompts_plain
from taught.model.tokens import write_out
from taught.progress import Progress, SilentProgress

# How far y and losses may differ from those of a text alone: rounding of logits of about 16.
_TOLERANCE = {torch.bfloat16: 0.5, torch.float16: 0.1, torch.float64: 1e-6}
# What models raise that do not know what to do with a mask of trees.
_FAILURES = (RuntimeError, ValueError, TypeError, AttributeError, IndexError, KeyError, NotImplementedError)


@torch.no_grad()
def settle_passes(
    model: nn.Module,
    prompts: Sequence[ReadPrompt],
    behavior: Behavior,
    examples: Sequence[Example] = (),
    progress: Progress | None = None,
) -> float:
    """Compare passes over token trees with texts alone; where they differ, use plain passes from now on.

    On the first two prompts, the shortest and the longest, and the shortest and the longest example, among as many
    others as they have beside them elsewhere. Cost: two or three forward passes over these.

    Returns
    -------
    The largest difference in y and loss of the passes that are used.

    Raises
    ------
    UserError
        Plain passes over a batch differ as well, or would: what the model computes for a text depends on the others.
    """
    if not prompts:
        return 0.0
    size = {p.id: len(p.ids) + max(map(len, p.suffixes), default=0) for p in prompts}
    by_size = sorted(prompts, key=lambda p: size[p.id])
    some = list({p.id: p for p in (*prompts[:2], by_size[0], by_size[-1])}.values())
    ordered = sorted((z for z in examples if z.n_scored), key=lambda z: z.length)
    pairs = [ordered[0], ordered[-1]] if len(ordered) > 1 else ordered
    _refuse_mixed_positions(model, {p.id: (len(p.ids), size[p.id]) for p in prompts})
    _refuse_mixed_positions(model, {z.id: (min(n := [*map(len, z.sequences)]), max(n)) for z in ordered})
    # What depends on a row's or a batch's size, or on the place of a text in it, shows in full ones.
    named = {p.id for p in some}
    groups = [[prompts[i] for i in packed.index] for packed in pack(prompts, behavior)]
    company = [prompt for group in groups if named & {p.id for p in group} for prompt in group]
    between = ordered[1:-1][: max(0, PACK_TOKENS // ordered[-1].length - 2)] if ordered else []
    batch = [*pairs[:1], *between, *pairs[1:]]
    tolerance = _TOLERANCE.get(next(model.parameters()).dtype, 2e-3)
    with evaluating(model):
        y = read_prompts_plain(model, some, behavior, None, batch_size=1).y
        alone = torch.cat([y, torch.tensor([_loss_alone(model, z) for z in pairs], dtype=torch.float64)])
        read = partial(_together, model, company, behavior, batch, [p.id for p in some])
        off, why = float("nan"), ""
        if takes_trees(model):
            try:
                off = _worst(read(), alone)
                why = f"y or a loss is off by {off:.3g}"
            except _FAILURES as error:
                why = f"it raises {type(error).__name__}"
            if off <= tolerance:
                return off
        use_plain_passes(model)
        off = _worst(read(), alone)
    if not off <= tolerance:
        raise UserError(
            "the model computes something else for a text in a batch than alone",
            value=f"off by {off:.3g} on prompts {[p.id for p in some]}, examples {[z.id for z in pairs]}",
            rule=f"at most {tolerance:g}: no effect of one example may depend on the others beside it",
            fix="use a causal model whose layers do not look at the batch (no capacity of experts)",
        )
    packs = [packed.rows for packed in pack(prompts, behavior)]
    trees = sum(int(rows.lengths.sum()) for rows in packs)
    plain = sum(int((write_out(rows).token >= 0).sum()) for rows in packs)
    (progress or SilentProgress()).note(
        f"{type(model).__name__} is not run on token trees{f' ({why})' if why else ''}: "
        f"what the prompts share is computed for each, {plain:,} tokens for {trees:,}"
    )
    return off


def _refuse_mixed_positions(model: nn.Module, sizes: Mapping[str, tuple[int, int]]) -> None:
    """Stop where the model turns positions otherwise in longer texts, and the texts are of both kinds.

    Such rotary positions look at the longest text of a batch: a short one would be computed otherwise beside it.
    ``sizes`` are the tokens of the shortest and the longest pass over each text, by its id.
    """
    for kind, most in stretched_from(model).items():
        long = [name for name, (_, longest) in sizes.items() if longest > most]
        if long and (kind == "dynamic" or any(shortest <= most for shortest, _ in sizes.values())):
            raise UserError(
                "the model computes positions otherwise in longer texts",
                value=f"{len(long)} of {len(sizes)} texts have more than {most} tokens: {name_ids(long)}",
                rule=f"rope_type {kind}: a text is computed alike alone and beside a longer one",
                fix=f"use --set examples.max_tokens={most}, and remove longer prompts",
            )


def _together(
    model: nn.Module,
    prompts: Sequence[ReadPrompt],
    behavior: Behavior,
    examples: Sequence[Example],
    some: Sequence[str],
) -> Tensor:
    """y of some of the prompts, losses of the first and last example, as computed elsewhere: many texts in one pass."""
    place = {p.id: i for i, p in enumerate(prompts)}
    y = read_prompts(model, prompts, behavior, None).y[[place[id] for id in some]]
    if not examples:
        return y
    losses = make_batch(examples, range(len(examples))).losses(model).double().cpu()
    return torch.cat([y, losses[[0, -1][: len(losses)]]])


def _loss_alone(model: nn.Module, example: Example) -> float:
    """The loss with each sequence in a pass of its own."""
    total = torch.zeros((), dtype=torch.float64)
    for ids, weights in zip(example.sequences, example.weights, strict=True):
        places = [t for t, w in enumerate(weights) if w]
        if not places:
            continue
        first = places[0] - 1
        keep = {"logits_to_keep": len(ids) - 1 - first} if accepts(model, "logits_to_keep") else {}
        given = torch.tensor([ids[:-1]], device=first_device(model))
        logits = model(input_ids=given, use_cache=False, **keep).logits[0]
        at = torch.tensor(places, device=logits.device) - 1 - (first if keep else 0)
        logp = log_probabilities(logits, (at,), torch.tensor([ids[t] for t in places], device=logits.device))
        total -= logp.double().cpu() @ torch.tensor([weights[t] for t in places], dtype=torch.float64)
    return float(total if example.link is None else example.link(total[None])[0])


def _worst(found: Tensor, alone: Tensor) -> float:
    """The largest difference; a loss that is not finite alone is left to those that name its example."""
    return float((found - alone)[alone.isfinite()].abs().max())
