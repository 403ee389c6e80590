"""Which parameters of a model move in a step: all, or those that patterns name."""

from __future__ import annotations

import difflib
from collections.abc import Sequence
from fnmatch import fnmatchcase

from torch import nn

from taught.errors import UserError


def moving_parameters(model: nn.Module, patterns: Sequence[str] | None = None) -> dict[str, nn.Parameter]:
    """The parameters that a step moves, by name, in the model's order.

    Parameters
    ----------
    patterns : Shell-style patterns (``*``, ``?``, ``[12]``) for the names that ``named_parameters`` gives; None for all
        parameters. A tied parameter goes by its first name.

    Raises
    ------
    UserError
        A pattern matches no parameter.
    """
    every = dict(model.named_parameters())
    if patterns is None:
        return every
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
    return {n: p for n, p in every.items() if n in names or any(fnmatchcase(n, each) for each in wild)}
