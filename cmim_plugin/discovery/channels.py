"""Which dimensions of a binary tensor are its channels: those that the product contracts with a weight.

A convolution contracts the second dimension of its input, a linear layer the last one. From there a dimension is
followed back, call by call, to the binary tensor. Where the product has no weight, as in attention or with the matrix
of a graph, or contracts all dimensions, the latent is followed on to the trained layer that it comes from: its channels
are those of the layer. Lengths tell nothing: there may be as many tokens as features.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from itertools import accumulate
from math import prod

import torch

from . import functions
from .history import Binarization, followed
from .trace import Event, Sighting

# Products of two matrices: the second is contracted along its rows.
_OF_MATRICES = ("matmul", "bmm", "mm", "addmm", "baddbmm", "addbmm", "grouped_mm", "linalg_matmul")


def spatial_dims(b: Binarization) -> tuple[int | None, str | None]:
    """:attr:`Layout.spatial` of a binary tensor, by how its consumer contracts it; or why it has none."""
    consumer, operand, shape = b.consumer, b.operand, b.source.held.shape
    last = len(shape) - 1
    if consumer.name in functions.CONVOLUTIONS and len(operand.held.shape) == 1 + functions.CONVOLUTIONS[consumer.name]:
        return None, "the convolution receives a single sample, without a batch dimension"
    if consumer.name == "tensordot":
        return None, "which dimensions a tensordot contracts is not known: use matmul, linear or einsum"
    contracted = _contracted(consumer, operand) if has_weight(consumer, operand) else set()
    found = _followed(operand, contracted, lambda s: s.held is b.source.held, since=b.source.seq)
    if contracted and found:
        dims = found[1] - {0} or found[1]  # samples folded into groups
        if len(dims) > 1 and last in dims:  # it was flattened for a linear layer
            dims = _of_layer(b) or ({1} if 1 in dims else dims)
    else:  # no weight, or a function in between hides what it sums over
        dims = _of_layer(b) or {1 if consumer.name in functions.CONVOLUTIONS else last}
    if last in dims:
        return None, None
    if dims == set(range(1, max(dims) + 1)):
        return last - max(dims), None
    return None, f"its channels are dimension {min(dims)} of {tuple(shape)}: neither the last nor next to the batch"


def is_of_activations(consumer: Event, operand: Sighting) -> bool:
    """Whether it is a product of two activations of the same batch, as attention is."""
    others = [a for a in consumer.arguments if a is not operand and a.in_graph and a.from_input]
    return consumer.name in functions.PRODUCTS and any(a.held.shape[:1] == operand.held.shape[:1] for a in others)


def has_weight(consumer: Event, operand: Sighting) -> bool:
    """Whether a parameter, or what was computed from parameters alone, takes part in a product."""
    others = [a for a in consumer.arguments if a is not operand]
    return consumer.parameters > 0 or any(a.requires_grad and not a.from_input for a in others)


def _of_layer(b: Binarization) -> set[int]:
    """The dimensions of a latent that come from the outputs of a trained layer."""
    found: set[int] = set()
    if b.latent is None or len(b.latent.held.shape) != len(b.source.held.shape):
        return found
    for dim in range(1, len(b.latent.held.shape)):
        end, dims = _followed(b.latent, {dim}, lambda s: _channels(s) is not None) or (b.latent, set())
        if _channels(end) in dims:
            found.add(dim)
    return found


def _channels(sighting: Sighting) -> int | None:
    """Which dimension of the result of a trained layer its channels are."""
    name, rank = sighting.producer.name if sighting.producer else "", len(sighting.held.shape)
    if name in functions.CONVOLUTIONS:
        return 1
    return rank - 1 if name in functions.LAYERS or name == "embedding" else None


def _contracted(consumer: Event, operand: Sighting) -> set[int]:
    """The dimensions of an operand that the product sums over."""
    shape, name, path = operand.held.shape, consumer.name, operand.site.path
    last = len(shape) - 1
    if name in functions.CONVOLUTIONS:
        return {1}
    if name == "einsum" and consumer.equation:
        terms, _, result = consumer.equation.replace(" ", "").partition("->")
        before, _, after = terms.split(",")[path[-1] - (len(path) == 2)].partition("...")
        letters = [*enumerate(before), *enumerate(after, len(shape) - len(after))]
        kept = result or [letter for letter in terms if terms.count(letter) == 1]
        return {dim for dim, letter in letters if letter not in kept} or {last}
    is_second = path[1] in ("mat2", "other", "batch2", 2 if name.startswith(("add", "badd")) else 1)
    return {max(last - 1, 0)} if name in _OF_MATRICES and is_second else {last}


def _followed(
    sighting: Sighting, dims: set[int], is_end: Callable[[Sighting], bool], since: int = 0
) -> tuple[Sighting, set[int]] | None:
    """Back to the nearest tensor that is an end, and which dimensions of it these are. None where a call hides it."""
    dims_of = {sighting.held: dims}

    def before(s: Sighting) -> list[Sighting]:
        given = [a for a in s.given() if a.held.sightings[0].seq >= since]  # an older tensor was not made of the source
        for a in given:
            dims_of[a.held] = dims_of.get(a.held) or _before(s, a, dims_of[s.held])
        return [a for a in given if dims_of[a.held]]

    return next(((s, dims_of[s.held]) for s in followed([sighting], before) if is_end(s)), None)


def _before(result: Sighting, argument: Sighting, dims: set[int]) -> set[int]:
    """Which dimensions of the argument of a call those of its result are, none where that is hidden."""
    event, old, new = result.producer, argument.held.shape, result.held.shape
    if event is None or event.name in functions.PRODUCTS:
        return set()
    if event.name in functions.RESHAPES and old.numel() == new.numel():
        return _overlapping(old, _steps(old), new, _steps(new), dims)
    if event.name == "unfold":  # blocks of a map, or windows of one dimension, which come last
        return dims & ({1} if len(old) > len(new) else set(range(len(old))))
    if len(old) == len(new) and event.name not in functions.REORDERS:
        return dims
    # Not rows that a tensor of places picks: they are copied.
    if event.name in functions.REORDERS | functions.SELECTIONS and len(event.arguments) == 1:
        return _overlapping(old, argument.strides, new, result.strides, dims)
    # Rows were picked, or summed over: dimensions before and behind stay. Of two of one length, either may have gone.
    first, behind = _alike(old, new), _alike(old[::-1], new[::-1])
    before, after = {i for i in dims if i < first}, {i for i in dims if i >= len(new) - behind}
    return before | {i - len(new) + len(old) for i in after} if before ^ after == dims else set()


def _overlapping(
    old: torch.Size, steps: Sequence[int], new: torch.Size, new_steps: Sequence[int], dims: set[int]
) -> set[int]:
    """The dimensions of a tensor that hold the same elements as ``dims`` of a view of it.

    A dimension counts if all its elements that the view has belong to those that are followed. If none does, one counts
    that belongs to them in part: it was split, as pixels or time steps that are put side by side.
    """

    def shared(d: int, dims: Iterable[int]) -> int:
        ends = [(min(steps[d] * old[d], new_steps[i] * new[i]), max(steps[d], new_steps[i], 1)) for i in dims]
        return prod(max(1, end // step) for end, step in ends)

    part = {d: shared(d, dims) for d in range(len(old))}
    whole = {d for d in part if part[d] == shared(d, range(len(new))) > 1}
    return whole or {d for d in part if part[d] > 1}


def _steps(shape: torch.Size) -> list[int]:
    """How many elements lie between neighbours of each dimension, in the order of the elements."""
    return list(accumulate(reversed(shape[1:]), int.__mul__, initial=1))[::-1]


def _alike(one: torch.Size, other: torch.Size) -> int:
    """How many lengths at the start of two shapes are equal."""
    return next((d for d, (a, b) in enumerate(zip(one, other, strict=False)) if a != b), min(len(one), len(other)))
