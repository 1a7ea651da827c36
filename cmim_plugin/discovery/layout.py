"""Which dimensions of an activation are the batch, the channels and the positions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """How an activation is read as channel vectors, one for each position.

    Attributes:
        spatial: number of trailing spatial dimensions after the channels (convolution), or None when the channels come
            last and every dimension between the first and the last is a position (linear layer, tokens).
        windowed: whether one sample of the batch takes several rows of the first dimension, as in window attention,
            ``(B * windows, tokens, C)``. How many is read off each batch.
    """

    spatial: int | None
    windowed: bool = False

    def channels(self, shape: torch.Size) -> int:
        """Channels of an activation of this shape."""
        return shape[-1] if self.spatial is None else shape[1 : len(shape) - self.spatial].numel()

    def spatial_shape(self, shape: torch.Size) -> torch.Size:
        """The dimensions over which the positions of one row of the first dimension are counted."""
        return shape[1:-1] if self.spatial is None else shape[len(shape) - self.spatial :]

    def positions(self, shape: torch.Size) -> int:
        """Positions of the whole batch."""
        return shape[0] * self.spatial_shape(shape).numel()

    def coordinates(self, index: Tensor, shape: torch.Size) -> tuple[Tensor, ...]:
        """Where positions, counted over the batch, lie: their row of the first dimension, then their spatial indices.

        Args:
            index: int64 of any shape, each below :meth:`positions`.
            shape: of the activation.

        Returns:
            ``1 + len(spatial_shape)`` int64 tensors shaped like ``index``.
        """
        found: list[Tensor] = []
        for size in reversed(self.spatial_shape(shape)):
            found.append(index % size)
            index = index // size
        return index, *reversed(found)

    def selection(self, coordinates: tuple[Tensor, ...], dimensions: int) -> tuple[Tensor | slice, ...]:
        """What selects those positions, all their channels, in an activation of so many dimensions."""
        row, *spatial = coordinates
        channels = 0 if self.spatial is None else dimensions - 1 - self.spatial
        return (row, *[slice(None)] * channels, *spatial)

    def pooled(self, x: Tensor, batch: int | None = None) -> Tensor:
        """The mean over the positions of each sample, ``(B, C)``; ``batch``: samples, needed where it is windowed."""
        if self.spatial is None:
            sums = x.reshape(x.shape[0], -1, x.shape[-1]).sum(1)
        else:
            sums = x.reshape(x.shape[0], self.channels(x.shape), -1).sum(2)
        if self.windowed:
            assert batch is not None
            sums = sums.unflatten(0, (batch, -1)).sum(1)
        # Divided after the sum: the gradient of a sum is a view, that of a mean is another tensor of x's size.
        return sums / (self.positions(x.shape) // len(sums))
