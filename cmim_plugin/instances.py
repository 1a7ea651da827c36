"""What counts as one sample of the contrast: a whole image (pooled), or one position of it (a pixel, a token)."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """Which dimensions of an activation are the batch, the channels and the positions.

    Attributes:
        spatial: number of trailing spatial dimensions after the channels (convolution), or None when the channels
            come last and every dimension between the first and the last is a position (linear layer, tokens).
        fold: rows of the first dimension that one sample of the batch takes: 1, or the windows of windowed attention.
    """

    spatial: int | None
    fold: int = 1

    def channels(self, shape: torch.Size) -> int:
        """Channels of an activation of this shape."""
        return shape[-1] if self.spatial is None else shape[1 : len(shape) - self.spatial].numel()

    def positions(self, shape: torch.Size) -> int:
        """Positions in one row of the first dimension."""
        return shape[1:-1].numel() if self.spatial is None else shape[len(shape) - self.spatial :].numel()

    def _flat(self, x: Tensor) -> Tensor:
        """``(rows, positions, channels)``, a view where the memory format allows."""
        if self.spatial is None:
            return x.reshape(x.shape[0], -1, x.shape[-1])
        return x.reshape(x.shape[0], self.channels(x.shape), -1).transpose(1, 2)

    def pooled(self, x: Tensor) -> Tensor:
        """The mean over the positions of each sample: ``(B, C)``."""
        means = self._flat(x).mean(1)
        return means if self.fold == 1 else means.unflatten(0, (-1, self.fold)).mean(1)

    def sampled(self, x: Tensor, index: Tensor) -> Tensor:
        """The channels at ``index`` ``(n,)``, counted over all positions of the batch: ``(n, C)``."""
        positions = self.positions(x.shape)
        return self._flat(x)[index // positions, index % positions]

    def sample_of(self, index: Tensor, shape: torch.Size) -> Tensor:
        """Which sample of the batch each position of ``index`` belongs to: ``(n,)``."""
        return index // (self.positions(shape) * self.fold)


def spread(draw: Tensor, total: int) -> Tensor:
    """Distinct random positions among ``total``, spread evenly: one in each of equal intervals, all shifted at random.

    A plain permutation of all positions of a batch costs more than the rest of the plug-in; independent draws repeat
    themselves, and a repeated position would be its own negative. Every position is drawn with the same probability.

    Args:
        draw: ``(n + 1,)`` uniform numbers in [0, 1), the first for the shift.
        total: positions in the batch.

    Returns:
        ``(min(n, total),)`` distinct int64 indices below ``total``.
    """
    count = min(len(draw) - 1, total)
    interval = total // count
    shift = (draw[0] * total).long()
    within = (draw[1 : count + 1] * interval).long().clamp_(max=interval - 1)
    return (shift + torch.arange(count, device=draw.device) * interval + within) % total
