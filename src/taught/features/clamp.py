"""Scaling one feature's part of the residual stream.

    h_t' = h_t + (s - 1) f_k(h_t) v

With v the feature's row of the decoder its contribution is scaled by s: 0 takes it out, 1 leaves it
exactly as it is, 3 triples it. With v a random direction of the same norm the same amount is
written elsewhere: the control. Where the feature is off nothing changes.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from taught.features.sae import Encoder, SparseAutoencoder


@dataclass(frozen=True, eq=False)
class Clamp:
    """The edit h [M, D] -> h' [M, D].

    Attributes
    ----------
    sae, feature, encoder : whose activation f_k, by which encoder
    scale : s
    direction : v [D], on the autoencoder's device and in its dtype
    """

    sae: SparseAutoencoder
    feature: int
    encoder: Encoder
    scale: float
    direction: Tensor

    def __call__(self, h: Tensor) -> Tensor:
        """Edit residuals; the result has the device and the dtype of ``h``."""
        act = self.sae.encode(h.to(self.direction), [self.feature], encoder=self.encoder)
        return h + ((self.scale - 1) * act * self.direction).to(h)


def decoder_direction(sae: SparseAutoencoder, feature: int) -> Tensor:
    """What one unit of the feature's activation writes into the residual stream, [D]."""
    acts = sae.W_dec.new_zeros(2, sae.n_features)
    acts[1, feature] = 1.0
    written: Tensor = sae.decode(acts).diff(dim=0)[0]
    return written


def random_directions(direction: Tensor, n: int, rng: np.random.Generator) -> list[Tensor]:
    """``n`` directions drawn uniformly, each of the norm of ``direction`` [D]."""
    drawn = torch.from_numpy(rng.standard_normal((n, len(direction)))).to(direction)
    return list(drawn * (direction.norm() / drawn.norm(dim=1, keepdim=True)))
