"""Which dimensions of an activation are the batch, the channels and the positions."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Layout:
    """How an activation is read as channel vectors, one for each position."""

    #: Number of spatial dimensions behind the channels (convolution). None: the channels are last, all dimensions
    #: between the first and the last are positions (linear layer, tokens).
    spatial: int | None
    windowed: bool = False  # a sample takes several rows, as in window attention: ``(B * windows, tokens, C)``
    scores: bool = False  # attention scores: as many channels as tokens, a number that may change from batch to batch
    mixed: bool = False  # its rows are not grouped by sample

    def channels(self, shape: torch.Size) -> int:
        """Channels of an activation of this shape."""
        return shape[-1] if self.spatial is None else shape[1 : len(shape) - self.spatial].numel()

    def spatial_shape(self, shape: torch.Size) -> torch.Size:
        """The shape of the positions of one row, an entry of the first dimension."""
        return shape[1:-1] if self.spatial is None else shape[len(shape) - self.spatial :]

    def tokens(self, shape: torch.Size) -> int:
        """Tokens of a sample, if its positions are a sequence; otherwise 0."""
        spatial = self.spatial_shape(shape)
        is_sequence = self.spatial in (None, 1) and not self.windowed and not self.mixed
        return spatial[-1] if spatial and is_sequence else 0

    def positions(self, shape: torch.Size) -> int:
        """Positions of the whole batch."""
        return shape[0] * self.spatial_shape(shape).numel()

    def elements(self, index: Tensor, shape: torch.Size, numbers: Tensor) -> Tensor:
        """``(..., n, C)`` int64, for ``activation.take``: all channels at positions ``index``, ``(..., n)``, which are
        counted over the batch. ``numbers``: ``arange`` of the number of channels, or longer, on the device."""
        channels = self.channels(shape)
        if self.spatial is None:
            first, step = index * channels, 1
        else:
            step = self.spatial_shape(shape).numel()
            # Each row of the first dimension holds all its channels before the next row starts.
            first = torch.add(index, index // step, alpha=(channels - 1) * step)
        return torch.add(first.unsqueeze(-1), numbers[:channels], alpha=step)

    def channel_vectors(self, x: Tensor) -> Tensor:
        """``(rows, positions, C)``: the channels at each position of each row of the first dimension."""
        channels, positions = self.channels(x.shape), self.spatial_shape(x.shape).numel()
        if self.spatial is None:
            return x.reshape(len(x), positions, channels)
        return x.reshape(len(x), channels, positions).mT

    def rows(self, x: Tensor) -> Tensor:
        """``(all positions, C)``: a view if the channels are last in memory, as with channels_last."""
        return self.channel_vectors(x).flatten(0, 1)

    def pooled(self, x: Tensor, batch: int | None = None) -> Tensor:
        """The mean over the positions of each sample, ``(B, C)``; ``batch``: samples, needed if windowed."""
        sums = self.channel_vectors(x).sum(1)
        if self.windowed:
            assert batch is not None
            sums = sums.unflatten(0, (batch, len(x) // max(batch, 1))).sum(1)
        # Not mean(): its gradient takes a tensor of x's size, that of a sum is a view.
        return sums / (self.positions(x.shape) // max(len(sums), 1))
