"""What counts as one sample of the contrast: a whole image (pooled), or one position of it (a pixel, a token)."""

from __future__ import annotations

from collections.abc import Sequence
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

    def where(self, index: Tensor, shape: torch.Size) -> tuple[Any, ...]:
        """What selects those positions, counted over the batch, in any activation of this shape."""
        at: list[Any] = []
        for size in reversed(self.places(shape)):
            at.append(index % size)
            index = index // size
        channels = 0 if self.spatial is None else len(shape) - 1 - self.spatial
        return (index, *[slice(None)] * channels, *reversed(at))

    def rows(self, x: Tensor, index: Tensor, offsets: Tensor | None = None) -> Tensor:
        """The channels at those positions, ``(n,)``, counted over the batch: ``(n, C)``.

        ``offsets``: where they lie in memory (:meth:`Grid.offsets`), if that is known.
        """
        if offsets is None:
            return x[self.where(index, x.shape)].flatten(1)
        return _in_memory(x).index_select(0, offsets).view(len(index), -1)

    def sampled(self, x: Tensor, index: Tensor, offsets: Tensor | None = None) -> Tensor:
        """:meth:`rows`, with a gradient that costs what they do."""
        # What is compiled is fused with what is around it.
        if torch.compiler.is_compiling() or not (x.requires_grad and torch.is_grad_enabled()):
            return self.rows(x, index, offsets)
        scatter = Scatter(self, index, offsets, x)
        x.register_hook(scatter)
        rows: Tensor = _Gather.apply(x, scatter)
        return rows


class Grid:
    """Activations of one shape that lie in memory in one way: what sampling them needs in each batch again.

    Args:
        layout, shape, stride, device: theirs.
    """

    def __init__(self, layout: Layout, shape: torch.Size, stride: Sequence[int], device: torch.device) -> None:
        #: The taps that were found on it.
        self.taps: set[int] = set()
        self._total = shape[0] * layout.positions(shape)
        self._device = device
        self._intervals: tuple[Tensor, Tensor] | None = None
        # Sizes and steps of the positions, from the inside out; dimensions that follow each other in memory are one.
        self._steps: list[list[int]] = []
        # (C,) how far the channels of a position lie from its first one; None if there are gaps or overlaps.
        self._channels: Tensor | None = None
        if _dense(shape, stride):
            last = len(shape) - 1
            places = range(1, last) if layout.spatial is None else range(len(shape) - layout.spatial, len(shape))
            channels = range(last, last + 1) if layout.spatial is None else range(1, places.start)
            for dim in (*reversed(places), 0):
                if self._steps and stride[dim] == self._steps[-1][0] * self._steps[-1][1]:
                    self._steps[-1][0] *= shape[dim]
                else:
                    self._steps.append([shape[dim], stride[dim]])
            self._channels = torch.zeros(1, dtype=torch.long, device=device)
            for dim in channels:
                steps = torch.arange(shape[dim], device=device) * stride[dim]
                self._channels = (self._channels[:, None] + steps).flatten()

    def spread(self, draws: Tensor) -> Tensor:
        """:func:`spread` over the positions of the batch."""
        count = min(draws.shape[-1], self._total)
        if self._intervals is None or len(self._intervals[0]) != count:
            self._intervals = _intervals(count, self._total, self._device)
        # Without waiting for the device: the draws are in pageable memory, which is copied at once.
        return _within(draws.to(self._device, non_blocking=True), *self._intervals)

    def offsets(self, index: Tensor) -> Tensor | None:
        """Where the channels at positions ``(..., n)`` lie in memory, from the first element on: ``(..., n * C)``.

        None where there are gaps or overlaps.
        """
        if self._channels is None:
            return None
        *inner, (_, outer) = self._steps
        at: Tensor | int = 0
        for size, step in inner:
            at = at + index % size * step
            index = index // size
        at = at + index * outer
        return (at.unsqueeze(-1) + self._channels).flatten(-2)


class _Gather(torch.autograd.Function):
    """The channels at distinct positions.

    The gradient of a sample is zero nearly everywhere. A whole map of it, filled and added to the network's own
    gradient, would cost more than the rest of the plug-in. So a single zero, expanded, goes to the activation. The
    engine waits for it, and :class:`Scatter` adds the rows once the sum of both is there.
    """

    @staticmethod
    def forward(ctx: Any, x: Tensor, scatter: Scatter) -> Tensor:
        # Kept on ctx, not saved: activation checkpointing counts what is saved, and its recomputation captures nothing.
        ctx.scatter = scatter
        return scatter.layout.rows(x, scatter.index, scatter.offsets)

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


class Scatter:
    """A tensor hook on the activation: adds the gradient of the sampled rows to that of the activation, in place.

    The engine has just added our expanded zero to the latter: in place if nobody else held it, else into a new tensor.
    """

    def __init__(self, layout: Layout, index: Tensor, offsets: Tensor | None, x: Tensor) -> None:
        self.layout = layout
        self.index = index
        self.offsets = offsets
        self.shape = x.shape
        self.stride = x.stride()
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
        if self.offsets is not None and grad.stride() == self.stride:
            # One small operation: between two large ones each takes ten times as long as elsewhere.
            _in_memory(grad).index_add_(0, self.offsets, rows.reshape(-1))
        else:
            where = self.where
            there = grad[where]
            grad[where] = there + rows.view_as(there)
        return grad

    def zeros(self, like: Tensor) -> Tensor:
        """An activation full of them, laid out as it was."""
        if _dense(self.shape, self.stride):
            return like.new_empty_strided(self.shape, self.stride).zero_()
        return like.new_zeros(self.shape)


def _in_memory(x: Tensor) -> Tensor:
    """The elements of a tensor without gaps or overlaps in the order in which they lie there, a view."""
    return x.as_strided((x.numel(),), (1,))


def _dense(shape: torch.Size, strides: Sequence[int]) -> bool:
    """Whether there are no gaps and no overlaps."""
    expected = 1
    for stride, size in sorted(zip(strides, shape, strict=True)):
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
    return _within(draw, *_intervals(min(draw.shape[-1], total), total, draw.device))


def _intervals(count: int, total: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """The first position of each of ``count`` intervals of ``total`` positions, and how many more it has."""
    edges = torch.arange(count + 1, device=device) * total // max(count, 1)
    return edges[:-1], edges.diff() - 1


def _within(draw: Tensor, first: Tensor, more: Tensor) -> Tensor:
    # In float32 the largest draw times a great length is the length itself.
    return first + torch.minimum((draw[..., : len(first)] * (more + 1)).long(), more)
