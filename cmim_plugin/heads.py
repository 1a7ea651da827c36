"""Embedding heads: linear, then unit length. One for each side of each tap, trained together with the network."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Where the projection is (almost) zero, dividing by its length would blow its gradient up.
_SHORTEST = 1e-6


class Head(nn.Linear):
    """``(n, C)`` rows of any floating dtype to ``(n, D)`` rows of unit length, in float32 whatever autocast says.

    (In float64 once ``.double()`` was called on it.)
    """

    def forward(self, rows: Tensor) -> Tensor:
        dtype = torch.float64 if self.weight.dtype == torch.float64 else torch.float32
        with torch.autocast(rows.device.type, enabled=False):
            projected = F.linear(rows.to(dtype), self.weight.to(dtype), self.bias.to(dtype))
            return F.normalize(projected, dim=1, eps=_SHORTEST)


class HeadPair(nn.Module):
    """The heads of one tap: ``binary`` for a_B and ``latent`` for a_F (or the teacher's activation)."""

    def __init__(self, channels_b: int, channels_f: int, embed_dim: int) -> None:
        super().__init__()
        self.binary = Head(channels_b, embed_dim)
        self.latent = Head(channels_f, embed_dim)
