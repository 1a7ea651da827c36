"""What counts as one sample of the contrast: a whole image (pooled), or one position of it (a pixel, a token)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

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

    def places(self, shape: torch.Size) -> torch.Size:
        """The dimensions that are positions: of one row of the first dimension."""
        return shape[1:-1] if self.spatial is None else shape[len(shape) - self.spatial :]

    def positions(self, shape: torch.Size) -> int:
        """Positions in one row of the first dimension."""
        return self.places(shape).numel()

    def pooled(self, x: Tensor) -> Tensor:
        """The mean over the positions of each sample: ``(B, C)``."""
        if self.spatial is None:
            sums = x.reshape(x.shape[0], -1, x.shape[-1]).sum(1)
        else:
            sums = x.reshape(x.shape[0], self.channels(x.shape), -1).sum(2)
        if self.fold > 1:
            sums = sums.unflatten(0, (-1, self.fold)).sum(1)
        # Divided after the sum: the gradient of the sum alone is a view, that of a mean another map.
        return sums / (self.positions(x.shape) * self.fold)

    def coordinates(self, index: Tensor, shape: torch.Size) -> tuple[Tensor, ...]:
        """Row and place of each position of ``index``, counted over the batch: int64 tensors shaped like it."""
        found = []
        for size in reversed(self.places(shape)):
            found.append(index % size)
            index = index // size
        return index, *reversed(found)

    def sampled(self, x: Tensor, coordinates: tuple[Tensor, ...]) -> Tensor:
        """The channels at ``coordinates``, each ``(n,)``: ``(n, C)``."""
        row, *place = coordinates
        where: list[Any] = [row, *place]
        if self.spatial is not None:
            where[1:1] = [slice(None)] * (x.ndim - 1 - self.spatial)
        # What is compiled is fused with what is around it.
        if torch.compiler.is_compiling() or not (x.requires_grad and torch.is_grad_enabled()):
            return x[tuple(where)].flatten(1)
        scatter = _Scatter(tuple(where), x.shape, x.stride())
        x.register_hook(scatter)
        rows: Tensor = _Gather.apply(x, scatter)
        return rows.flatten(1)


class _Gather(torch.autograd.Function):
    """``x[where]`` at distinct positions.

    The gradient of a sample is zero nearly everywhere. As a whole map it would cost more than the rest of the plug-in,
    and the engine would hold the maps of all taps at once, since it comes to the loss before it comes to the network.
    So a single zero, expanded, goes to the activation, to keep the order, and :class:`_Scatter` adds the rows once the
    network's own gradient has arrived there.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scatter: _Scatter) -> Tensor:
        # Kept on ctx, not saved: activation checkpointing counts what is saved, and its recomputation captures nothing.
        ctx.scatter = scatter
        return x[scatter.where]

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        scatter = ctx.scatter
        if torch.is_grad_enabled():
            # A graph of the gradient is wanted (create_graph=True).
            full = scatter.zeros(grad.detach())
            full[scatter.where] = grad
            return full, None
        scatter.rows = grad
        return grad.new_zeros(()).expand(scatter.shape), None


class _Scatter:
    """A tensor hook on the activation: adds the gradient of the sampled rows to that of the activation, in place.

    The engine has just summed the latter with our expanded zero, into a tensor that nobody else holds.
    """

    def __init__(self, where: tuple[Any, ...], shape: torch.Size, strides: tuple[int, ...]) -> None:
        self.where = where
        self.shape = shape
        self.strides = strides
        self.rows: Tensor | None = None

    def __call__(self, grad: Tensor) -> Tensor | None:
        rows, self.rows = self.rows, None
        if rows is None:
            return None
        if not any(grad.stride()):
            grad = self.zeros(grad)  # no other gradient came
        grad[self.where] += rows
        return grad

    def zeros(self, like: Tensor) -> Tensor:
        """An activation full of them, laid out as it was."""
        if _dense(sorted(zip(self.strides, self.shape, strict=True))):
            return like.new_empty_strided(self.shape, self.strides).zero_()
        return like.new_zeros(self.shape)


def _dense(dimensions: list[tuple[int, int]]) -> bool:
    """Whether (stride, size) in rising order leave no gap and no overlap."""
    expected = 1
    for stride, size in dimensions:
        if size != 1:
            if stride != expected:
                return False
            expected *= size
    return True


def spread(draw: Tensor, total: int) -> Tensor:
    """Distinct random positions among ``total``, spread evenly: one in each of as many intervals of equal length.

    A plain permutation of all positions of a batch costs more than the rest of the plug-in; independent draws repeat
    themselves, and a repeated position would be its own negative. (Lengths differ by one where ``total`` is no
    multiple of their number.) Ranks that each spread their part of the draws over their part of the batch draw what
    one process would.

    Args:
        draw: ``(..., n)`` uniform numbers in [0, 1).
        total: positions in the batch.

    Returns:
        ``(..., min(n, total))`` int64 indices below ``total``, in rising order.
    """
    count = min(draw.shape[-1], total)
    edges = torch.arange(count + 1, device=draw.device) * total // count
    start, length = edges[:-1], edges.diff()
    within = (draw[..., :count] * length).long()
    # In float32 the largest draw times a great length is the length itself.
    return start + torch.minimum(within, length - 1)
