"""Which dimensions of a binary tensor are its channels: those that the product contracts with a weight.

A convolution contracts the second dimension of its input, a linear layer the last one. From there a dimension is
followed back, call by call, to the binary tensor. If the product has no weight, as in attention or with the matrix of a
graph, or contracts several dimensions at once, the latent is followed back to the trained layer that it comes from: its
channels are those of the layer. Lengths tell nothing: there may be as many tokens as features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate
from math import prod

import torch

from . import functions
from .history import Binarization, walk_back
from .trace import Event, Sighting

# Products of two matrices: the second is contracted along its last dimension but one.
_OF_MATRICES = ("matmul", "bmm", "mm", "addmm", "baddbmm", "addbmm", "grouped_mm", "linalg_matmul")


def spatial_dims(b: Binarization) -> tuple[int | None, str | None]:
    """(:attr:`Layout.spatial` of a_B, None), or (None, the reason why its channels cannot be read)."""
    consumer, operand, shape = b.consumer, b.operand, b.source.snapshot.shape
    last = len(shape) - 1
    if consumer.name == "tensordot":
        return None, "which dimensions a tensordot contracts is not known: use matmul, linear or einsum"
    contracted = _contracted(consumer, operand) if has_weight(consumer, operand) else set()
    found = _dims_at_end(operand, contracted, lambda s: s.snapshot is b.source.snapshot, since=b.source.seq)
    if contracted and found:
        dims = found[1] - {0} or found[1]  # 0 is among them if samples were folded into groups
        if len(dims) > 1 and last in dims:  # flattened for a linear layer
            dims = _dims_of_layer(b) or ({1} if 1 in dims else dims)
    else:  # no weight, or a call in between hides which dimensions it sums over
        dims = _dims_of_layer(b) or {1 if consumer.name in functions.CONVOLUTIONS else last}
    if last in dims:
        return None, None
    if dims == set(range(1, max(dims) + 1)):  # next to the batch
        return last - max(dims), None
    return None, f"its channels are dimension {min(dims)} of {tuple(shape)}: neither the last nor next to the batch"


def is_attention_like(consumer: Event, operand: Sighting) -> bool:
    """Whether a call is a product of the operand with another activation of the same batch."""
    rows = operand.snapshot.shape[:1]
    others = [a for a in consumer.arguments if a is not operand and a.in_graph and a.from_input]
    return consumer.name in functions.PRODUCTS and any(a.snapshot.shape[:1] == rows for a in others)


def has_weight(consumer: Event, operand: Sighting) -> bool:
    """Whether a parameter, or what was computed from parameters alone, takes part in a product."""
    others = [a for a in consumer.arguments if a is not operand]
    return consumer.parameters > 0 or any(a.requires_grad and not a.from_input for a in others)


def _dims_of_layer(b: Binarization) -> set[int]:
    """The dimensions of the latent that come from the output channels of a trained layer."""
    if b.latent is None or len(b.latent.snapshot.shape) != len(b.source.snapshot.shape):
        return set()
    latent, is_layer = b.latent, lambda s: _channel_dim(s) is not None
    ends = {dim: _dims_at_end(latent, {dim}, is_layer) for dim in range(1, len(latent.snapshot.shape))}
    return {dim for dim, found in ends.items() if found and _channel_dim(found[0]) in found[1]}


def _channel_dim(sighting: Sighting) -> int | None:
    """The channel dimension of the result of a trained layer, None for other results."""
    if sighting.made_by in functions.CONVOLUTIONS:
        return 1
    return len(sighting.snapshot.shape) - 1 if sighting.made_by in functions.LAYERS | {"embedding"} else None


def _contracted(consumer: Event, operand: Sighting) -> set[int]:
    """The dimensions of an operand that the product sums over."""
    shape, name, path = operand.snapshot.shape, consumer.name, operand.site.path
    last = len(shape) - 1
    if name in functions.CONVOLUTIONS:
        return {1}
    if name == "einsum" and consumer.equation:
        terms, _, result = consumer.equation.replace(" ", "").partition("->")
        # einsum(equation, a, b) or einsum(equation, [a, b])
        number = path[-1] - 1 if len(path) == 2 else path[-1]
        left, _, right = terms.split(",")[number].partition("...")
        letters = [*enumerate(left), *enumerate(right, len(shape) - len(right))]
        kept = result or [letter for letter in terms if terms.count(letter) == 1]
        return {dim for dim, letter in letters if letter not in kept} or {last}
    second = 2 if name in functions.WITH_ADDEND else 1
    is_second = path[1] in (second, "mat2", "other", "batch2")
    return {max(last - 1, 0)} if name in _OF_MATRICES and is_second else {last}


def _dims_at_end(
    sighting: Sighting, dims: set[int], is_end: Callable[[Sighting], bool], since: int = 0
) -> tuple[Sighting, set[int]] | None:
    """The nearest tensor back from a sighting that is an end, and its dimensions that became ``dims``; None if a call
    hides them."""
    dims_of = {sighting.snapshot: dims}

    def parents(s: Sighting) -> list[Sighting]:
        # A tensor older than the source was not made of it.
        found = [a for a in s.parents() if a.snapshot.sightings[0].seq >= since]
        for a in found:
            dims_of[a.snapshot] = dims_of.get(a.snapshot) or _dims_in_argument(s, a, dims_of[s.snapshot])
        return [a for a in found if dims_of[a.snapshot]]

    return next(((s, dims_of[s.snapshot]) for s in walk_back([sighting], parents) if is_end(s)), None)


def _dims_in_argument(result: Sighting, argument: Sighting, dims: set[int]) -> set[int]:
    """The dimensions of an argument that became ``dims`` of the result, empty if that is not known."""
    event, old, new = result.producer, argument.snapshot.shape, result.snapshot.shape
    if event is None or event.name in functions.PRODUCTS:
        return set()
    if event.name in functions.RESHAPES and old.numel() == new.numel():
        return _overlapping(old, _contiguous_strides(old), new, _contiguous_strides(new), dims)
    if event.name == "unfold":  # F.unfold: blocks of a map. Tensor.unfold: windows of one dimension, which come last
        return dims & ({1} if len(old) > len(new) else set(range(len(old))))
    if len(old) == len(new) and event.name not in functions.REORDERS:
        return dims
    # Views. Not rows picked by a tensor of indices, a second argument: they are copied, their strides tell nothing.
    if event.name in functions.REORDERS | functions.SELECTIONS and len(event.arguments) == 1:
        return _overlapping(old, argument.strides, new, result.strides, dims)
    # Some dimensions are gone. Those of a common start or end stay; in both, one is ambiguous: either may have gone.
    start, end = _common_prefix(old, new), _common_prefix(old[::-1], new[::-1])
    left, right = {i for i in dims if i < start}, {i for i in dims if i >= len(new) - end}
    return left | {i - len(new) + len(old) for i in right} if left ^ right == dims else set()


def _overlapping(
    old: torch.Size, strides: Sequence[int], new: torch.Size, new_strides: Sequence[int], dims: set[int]
) -> set[int]:
    """The dimensions of a tensor that hold the same elements as ``dims`` of a view of it.

    For ``(2, 16, 8, 8)``, flattened to ``(2, 1024)``, dimension 1 of the view gives 1, 2 and 3. Those that
    lie wholly within ``dims`` are returned. If none does, those that lie partly within: the view split them, as pixels
    or time steps that move into the channels.
    """

    def shared(d: int, dims: Iterable[int]) -> int:
        """How many indices of dimension ``d`` are told apart by these dimensions of the view."""
        ends = [(min(strides[d] * old[d], new_strides[i] * new[i]), max(strides[d], new_strides[i], 1)) for i in dims]
        return prod(max(1, end // stride) for end, stride in ends)

    in_part = {d: shared(d, dims) for d in range(len(old))}
    whole = {d for d in in_part if in_part[d] == shared(d, range(len(new))) > 1}
    return whole or {d for d in in_part if in_part[d] > 1}


def _contiguous_strides(shape: torch.Size) -> list[int]:
    return list(accumulate(reversed(shape[1:]), int.__mul__, initial=1))[::-1]


def _common_prefix(one: torch.Size, other: torch.Size) -> int:
    """How many lengths at the start of two shapes are equal."""
    return next((d for d, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
