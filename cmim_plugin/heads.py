"""Embedding heads: linear, then unit length. One for each side of each tap, trained together with the network."""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn

# Where the projection is (almost) zero, dividing by its length would blow its gradient up.
_SHORTEST = 1e-6


class HeadPair(nn.Module):
    """The heads of one tap: ``binary`` for a_B and ``latent`` for a_F (or the teacher's activation)."""

    def __init__(self, channels_b: int, channels_f: int, embed_dim: int) -> None:
        super().__init__()
        self.binary = nn.Linear(channels_b, embed_dim)
        self.latent = nn.Linear(channels_f, embed_dim)


def embed(pieces: Sequence[tuple[Tensor, Tensor, Tensor]]) -> Tensor:
    """All rows under their heads: unit length, in float32 whatever autocast says (float64 where the heads are).

    Args:
        pieces: ``(n_k, C_k)`` rows of any floating dtype, ``(D, C_k)`` weight and ``(D,)`` bias of their head.

    Returns:
        ``(sum of n_k, D)``, in that order.
    """
    dtype = torch.float64 if pieces[0][1].dtype == torch.float64 else torch.float32
    with torch.autocast(pieces[0][0].device.type, enabled=False):
        projected = [F.linear(*(t.to(dtype) for t in piece)) for piece in pieces]
        return F.normalize(torch.cat(projected), dim=1, eps=_SHORTEST)
