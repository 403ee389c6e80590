"""Which parameters of a model move in a step: all, or those that patterns name; never codes of quantised weights."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from fnmatch import fnmatchcase

import torch
from torch import nn

from taught.errors import UserError, refuse


def is_plain(p: nn.Parameter) -> bool:
    """Whether a parameter holds floating point numbers, and not codes: those may be stored as if they were some."""
    return p.is_floating_point() and not hasattr(p, "quant_state")


def weight_shape(p: nn.Parameter) -> torch.Size:
    """The shape of a parameter; of 4-bit codes, which are packed in one column, that of what they stand for."""
    shape: torch.Size = getattr(getattr(p, "quant_state", None), "shape", p.shape)
    return shape


def moving_parameters(model: nn.Module, patterns: Sequence[str] | None = None) -> dict[str, nn.Parameter]:
    """The parameters that a step moves, by name, in the model's order.

    Parameters
    ----------
    patterns : Shell-style patterns (``*``, ``?``, ``[12]``) for the names that ``named_parameters`` gives; None for all
        parameters. A tied parameter goes by its first name.

    Raises
    ------
    UserError
        A pattern matches no parameter, or codes of quantised weights.
    """
    chosen = every = dict(model.named_parameters())
    if patterns is not None:
        names = every.keys() & set(patterns)  # of an adapter there are hundreds; patterns are slow
        wild = [pattern for pattern in patterns if pattern not in names]
        for pattern in wild:
            if not any(fnmatchcase(name, pattern) for name in every):
                close = difflib.get_close_matches(pattern, every, n=3, cutoff=0.3) or list(every)[:3]
                raise UserError(
                    "a pattern matches none of the model's parameters",
                    value=pattern,
                    rule="* stands for anything, ? for one character, [12] for one of these; "
                    "a tied parameter goes by its first name",
                    fix=f"names of the model are like {', '.join(close)}",
                )
        chosen = {n: p for n, p in every.items() if n in names or any(fnmatchcase(n, each) for each in wild)}
    refuse(
        [name for name, p in chosen.items() if not is_plain(p)],
        "quantised weights do not move",
        rule="what moves are floating point numbers; codes have no gradient",
        fix="set model.adapter to a LoRA adapter, or attribution.parameters to others, such as "
        + next((name for name, p in every.items() if is_plain(p)), "norms"),
    )
    return chosen


@contextmanager
def flags_kept(parameters: Iterable[nn.Parameter]) -> Iterator[None]:
    """Parameters ask for gradients on exit where they do now (also after an exception)."""
    flags = [(p, p.requires_grad) for p in parameters]
    try:
        yield
    finally:
        for p, flag in flags:
            p.requires_grad_(flag)
