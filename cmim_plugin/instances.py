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

    def side_by_side(self, x: Tensor) -> Tensor | None:
        """``(positions of the batch, C)``, a view, where the channels of a position lie side by side; else None."""
        moved = x if self.spatial is None else x.movedim(1, -1)
        simple = self.spatial in (None, x.ndim - 2) and moved.is_contiguous()
        return moved.reshape(-1, moved.shape[-1]) if simple else None

    def where(self, index: Tensor, shape: torch.Size) -> tuple[Any, ...]:
        """What selects those positions, counted over the batch, in any activation of this shape."""
        at: list[Any] = []
        for size in reversed(self.places(shape)):
            at.append(index % size)
            index = index // size
        channels = 0 if self.spatial is None else len(shape) - 1 - self.spatial
        return (index, *[slice(None)] * channels, *reversed(at))

    def rows(self, x: Tensor, index: Tensor) -> Tensor:
        """The channels at those positions, ``(n,)``, counted over the batch: ``(n, C)``."""
        flat = self.side_by_side(x)
        return x[self.where(index, x.shape)].flatten(1) if flat is None else flat.index_select(0, index)

    def sampled(self, x: Tensor, index: Tensor) -> Tensor:
        """:meth:`rows`, with a gradient that costs what they do."""
        # What is compiled is fused with what is around it.
        if torch.compiler.is_compiling() or not (x.requires_grad and torch.is_grad_enabled()):
            return self.rows(x, index)
        scatter = _Scatter(self, index, x)
        x.register_hook(scatter)
        rows: Tensor = _Gather.apply(x, scatter)
        return rows


class _Gather(torch.autograd.Function):
    """The channels at distinct positions.

    The gradient of a sample is zero nearly everywhere. A whole map of it, filled and added to the network's own
    gradient, would cost more than the rest of the plug-in. So a single zero, expanded, goes to the activation. The
    engine waits for it, and :class:`_Scatter` adds the rows once the sum of both is there.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scatter: _Scatter) -> Tensor:
        # Kept on ctx, not saved: activation checkpointing counts what is saved, and its recomputation captures nothing.
        ctx.scatter = scatter
        return scatter.layout.rows(x, scatter.index)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        scatter = ctx.scatter
        if torch.is_grad_enabled():
            # A graph of the gradient is wanted (create_graph=True).
            full = scatter.zeros(grad.detach())
            full[scatter.where] = grad.view_as(full[scatter.where])
            return full, None
        scatter.rows = grad
        return grad.new_zeros(()).expand(scatter.shape), None


class _Scatter:
    """A tensor hook on the activation: adds the gradient of the sampled rows to that of the activation, in place.

    The engine has just added our expanded zero to the latter: in place if nobody else held it, else into a new tensor.
    """

    def __init__(self, layout: Layout, index: Tensor, x: Tensor) -> None:
        self.layout = layout
        self.index = index
        self.shape = x.shape
        self.strides = x.stride()
        self.rows: Tensor | None = None

    @property
    def where(self) -> tuple[Any, ...]:
        """What selects the rows in an activation that lies in memory in any way."""
        return self.layout.where(self.index, self.shape)

    def __call__(self, grad: Tensor) -> Tensor | None:
        rows, self.rows = self.rows, None
        if rows is None:
            return None
        if not any(grad.stride()):
            grad = self.zeros(grad)  # no other gradient came
        flat = self.layout.side_by_side(grad)
        if flat is None:
            where = self.where
            there = grad[where]
            grad[where] = there + rows.view_as(there)
        else:
            flat[self.index] += rows
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
