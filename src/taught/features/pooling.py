"""From token activations to one row of X per prompt.

The paper reads the last user end-of-turn token. The other choices read the prompt's last token, or
pool the features (not the residuals) over the tokens of the user's message:

    last_user, last_prompt:  X_ik = f_k(h_it)          t: that token
    mean_user:               X_ik = mean_t f_k(h_it)   t over the user's tokens
    max_user:                X_ik = max_t f_k(h_it)

Examples are read at their response: ``last_response`` (its last token) and ``mean_response``.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from taught.errors import UserError

POSITIONS = ("last_user", "last_prompt", "mean_user", "max_user")


def read_tokens(encoded: Any, position: str) -> list[int]:
    """Token indices of a :class:`taught.data.chat.EncodedPrompt` at which the residual stream is read."""
    if encoded.user_span[0] == encoded.user_span[1]:
        raise UserError(
            f"there is no user's turn in {encoded.id} at which features could be read",
            value="a text by itself",
            rule="X is read at a prompt of a chat",
            fix="leave sae.path and concepts empty, or use --set behavior.of=answer",
        )
    if position == "last_user":
        return [encoded.end_of_turn]
    if position == "last_prompt":
        return [len(encoded.input_ids) - 1]
    if position in ("mean_user", "max_user"):
        return list(range(*encoded.user_span))
    raise UserError("unknown read-out position", value=position, rule=f"one of {POSITIONS}", fix="set readout.position")


def pool(acts: Tensor, offsets: Tensor, how: str) -> Tensor:
    """Pool tokens [M, d] to prompts [N, d]; tokens offsets[i]:offsets[i+1] are prompt i's."""
    counts = offsets.diff()
    if how.startswith("last_"):
        return acts
    prompts = torch.arange(len(counts), device=acts.device)
    segment = prompts.repeat_interleave(counts, output_size=len(acts))
    if how.startswith("mean_"):
        total = acts.new_zeros(len(counts), acts.shape[1]).index_add(0, segment, acts)
        return total / counts.to(acts.dtype).unsqueeze(1)
    slot = torch.arange(len(acts), device=acts.device) - offsets[:-1].repeat_interleave(counts)
    padded = acts.new_full((len(counts), int(counts.max()), acts.shape[1]), -torch.inf)
    return padded.index_put((segment, slot), acts).max(dim=1).values


def pooled_residuals(h: Any, offsets: Any, how: str) -> NDArray[np.float64]:
    """The residual of each prompt, float64 [N, D], pooled as X is by :func:`pool`; means in place of maxima."""
    how = "mean_user" if how == "max_user" else how
    pooled: NDArray[np.float64] = pool(torch.as_tensor(h), torch.as_tensor(offsets), how).double().cpu().numpy()
    return pooled


@dataclass(frozen=True, eq=False)
class FeatureMap:
    """h -> X for a fixed choice of SAE, features, encoder and pooling; differentiable.

    Attributes
    ----------
    sae : taught.features.sae.SparseAutoencoder
    ids : int64 [d], ascending
    encoder : "sae" (the SAE's true encoder) or "relu" (the paper's dense proxy)
    position : one of POSITIONS
    """

    sae: Any
    ids: Tensor
    encoder: str
    position: str

    def __call__(self, h: Tensor, offsets: Tensor) -> Tensor:
        """X [N, d] from residuals h [M, D] at the read-out tokens, on the SAE's device."""
        device = self.sae.W_enc.device  # read-outs are kept on the CPU
        acts = self.sae.encode(h.to(device), self.ids, encoder=self.encoder)
        return pool(acts, offsets.to(device), self.position)

    def response(self, h: Tensor, dh: Tensor, offsets: Tensor) -> Tensor:
        """dX = gate(h) * (dh W_enc), pooled: the change of X for a change dh, gates held.

        The encoder is piecewise linear, so this is its exact derivative at h in direction dh.
        Forward mode; independent of the reverse-mode route that ``adjoint`` takes.
        """
        tangent: Tensor = torch.func.jvp(lambda x: self(x, offsets), (h,), (dh,))[1]
        return tangent
