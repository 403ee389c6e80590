"""Where in a model h is read: a block and a part of it."""

from __future__ import annotations

from dataclasses import dataclass

RESID_POST, ATTN_OUT, MLP_OUT = "resid_post", "attn_out", "mlp_out"
# Names of modules below a block, joined by dots.
MODULE = r"[A-Za-z_]\w*(?:\.\w+)*"


@dataclass(frozen=True)
class Point:
    """A place in a model at which every token has a vector h.

    Attributes
    ----------
    block : a block of the model, counted from 0
    part : what of it
        ``resid_post``: the residual stream after the block, its output. ``attn_out``, ``mlp_out``: what its attention
        and its MLP add to the residual stream, behind a norm of their own where they have one (as in Gemma-2). Any
        other name: the output of the block's module of that name, such as ``mlp`` or ``self_attn.o_proj``.
    """

    block: int
    part: str = RESID_POST

    def __str__(self) -> str:
        return f"block {self.block}" if self.part == RESID_POST else f"{self.part} of block {self.block}"
