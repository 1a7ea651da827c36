"""Which dimensions of a binary tensor are its channels: those that the product contracts with a weight.

A convolution contracts the second dimension of its input, a linear layer the last one. From there a dimension is
followed back, call by call, to the binary tensor. Where the product has no weight, as in attention or with the matrix
of a graph, or contracts all dimensions, the latent is followed on to the trained layer that it comes from: its channels
are those of the layer. Lengths tell nothing: there may be as many tokens as features.
"""

from __future__ import annotations

from collections.abc import Callable
from itertools import accumulate
from math import prod

import torch

from . import functions
from .history import Binarization
from .trace import Event, Sighting

# Products of two matrices: the second is contracted along its rows.
_OF_MATRICES = ("matmul", "bmm", "mm", "addmm", "baddbmm", "addbmm", "grouped_mm", "linalg_matmul")


def spatial_dims(b: Binarization) -> tuple[int | None, str | None]:
    """:attr:`Layout.spatial` of a binary tensor, by how its consumer contracts it; or why it has none."""
    source, consumer, operand = b.source, b.consumer, b.operand
    shape = source.held.shape
    last = len(shape) - 1
    if consumer.name in functions.CONVOLUTIONS and len(operand.held.shape) == 1 + functions.CONVOLUTIONS[consumer.name]:
        return None, "the convolution receives a single sample, without a batch dimension"
    if _has_weight(consumer, operand):
        dims = _summed(b)
        dims = dims - {0} or dims  # samples folded into groups
        if len(dims) > 1 and last in dims:  # it was flattened for a linear layer
            dims = _of_layer(b) or ({1} if 1 in dims else dims)
    else:
        dims = _of_layer(b) or {last}
    if last in dims or dims == {0}:  # of a matrix that joins samples, as a graph's, the features are last
        return None, None
    if dims == set(range(1, max(dims) + 1)):
        return last - max(dims), None
    return None, f"its channels are dimension {min(dims)} of {tuple(shape)}: neither the last nor next to the batch"


def sums_with_weight(b: Binarization) -> set[int]:
    """The dimensions of a binary tensor that a product with a weight sums over, none where it has no weight."""
    return _summed(b) if _has_weight(b.consumer, b.operand) else set()


def _summed(b: Binarization) -> set[int]:
    """The dimensions of a binary tensor that its product with a weight sums over."""
    contracted, last = _contracted(b.consumer, b.operand), len(b.source.held.shape) - 1
    found = _followed(b.operand, contracted, lambda s: s.held is b.source.held, since=b.source.seq)
    if found:
        return found[1]
    # A function in between may hide what it does: a guess.
    return contracted if last == len(b.operand.held.shape) - 1 else _of_layer(b) or {last}


def is_of_activations(consumer: Event, operand: Sighting) -> bool:
    """Whether it is a product of two activations of the same batch, as attention is."""
    others = [a for a in consumer.arguments if a is not operand and a.in_graph and a.from_input]
    return consumer.name in functions.PRODUCTS and any(a.held.shape[:1] == operand.held.shape[:1] for a in others)


def _has_weight(consumer: Event, operand: Sighting) -> bool:
    """Whether a parameter, or what was computed from parameters alone, takes part in a product."""
    return consumer.parameters > 0 or any(
        a.requires_grad and not a.from_input for a in consumer.arguments if a is not operand
    )


def _is_second(consumer: Event, operand: Sighting) -> bool:
    """Whether it is the right one of two matrices."""
    return operand.site.path[1] in ("mat2", "other", "batch2", 2 if consumer.name.startswith(("add", "badd")) else 1)


def _of_layer(b: Binarization) -> set[int]:
    """The dimensions of a latent that come from the outputs of a trained layer."""
    channels = {**dict.fromkeys(functions.CONVOLUTIONS, 1), **dict.fromkeys(functions.LAYERS, -1), "embedding": -1}
    found = set()
    if b.latent is not None and len(b.latent.held.shape) == len(b.source.held.shape):
        for dim in range(1, len(b.latent.held.shape)):
            end = _followed(b.latent, {dim}, lambda s: s.producer is not None and s.producer.name in channels)
            if end is not None and end[0].producer is not None:
                found |= {dim} if channels[end[0].producer.name] % len(end[0].held.shape) in end[1] else set()
    return found


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
    if name in _OF_MATRICES and _is_second(consumer, operand):
        return {max(last - 1, 0)}
    if name == "tensordot":
        first, dims = path[1] in (0, "a"), consumer.equation
        dims = dims.tolist() if isinstance(dims, torch.Tensor) else dims
        if isinstance(dims, int):
            return set(range(last + 1 - dims, last + 1) if first else range(dims))
        return {dim % (last + 1) for dim in dims[0 if first else 1]}
    return {last}


def _followed(
    sighting: Sighting, dims: set[int], is_end: Callable[[Sighting], bool], since: int = 0
) -> tuple[Sighting, set[int]] | None:
    """Back to the first tensor that is an end, and which dimensions of it these are. None where a call hides it."""
    line, seen = [(sighting, dims)], {id(sighting.held)}
    while line:
        current, dims = line.pop()
        if is_end(current):
            return current, dims
        for argument in reversed(current.given()):
            # What was there before the source was not made of it.
            if argument.held.sightings[0].seq < since or id(argument.held) in seen:
                continue
            before = _before(current, argument, dims)
            if before:
                seen.add(id(argument.held))
                line.append((argument, before))
    return None


def _before(result: Sighting, argument: Sighting, dims: set[int]) -> set[int] | None:
    """Which dimensions of the argument of a call those of its result are, None where that is hidden."""
    name = result.producer.name if result.producer else ""
    old, new = argument.held.shape, result.held.shape
    if name in functions.PRODUCTS:
        return None
    if name in functions.RESHAPES and old.numel() == new.numel():
        # A dimension counts if all its elements belong to those that are followed. If none does, one counts that
        # belongs to them in part: it was split, as pixels or time steps that are put side by side.
        steps, new_steps = _steps(old), _steps(new)
        shared = {
            d: prod(max(1, min(steps[d] * n, new_steps[i] * new[i]) // max(steps[d], new_steps[i])) for i in dims)
            for d, n in enumerate(old)
        }
        whole = {d for d, n in enumerate(old) if shared[d] == n > 1}
        return whole or {d for d in shared if shared[d] > 1}
    picked = result.producer is not None and len(result.producer.arguments) > 1  # by a tensor of places
    if name in functions.REORDERS or (name in functions.SELECTIONS and len(old) != len(new) and not picked):
        # Views: a dimension keeps its length and its stride.
        kept = [*zip(old, argument.strides, strict=True)]
        moved = [(new[i], result.strides[i]) for i in dims]
        if all(kept.count(dim) == 1 for dim in moved):
            return {kept.index(dim) for dim in moved}
    if name == "unfold" and len(old) > len(new):  # blocks of a map
        return dims if dims == {1} else None
    if name == "unfold" and len(old) < len(new):  # windows of one dimension, last
        return {i for i in dims if i < len(old)}
    if len(old) == len(new):
        return dims
    # Rows were picked, as by `x[samples, neighbours]`: dimensions before and behind stay.
    alike = min(len(old), len(new))
    first = next((d for d, (a, b) in enumerate(zip(old, new, strict=False)) if a != b), alike)
    behind = next((d for d, (a, b) in enumerate(zip(old[::-1], new[::-1], strict=False)) if a != b), alike)
    if any(len(new) - behind <= i < first for i in dims):
        return None  # of two dimensions of one length, either may have gone
    if all(i < first or i >= len(new) - behind for i in dims):
        return {i if i < first else i - len(new) + len(old) for i in dims}
    return None


def _steps(shape: torch.Size) -> list[int]:
    """How many elements lie between neighbours of each dimension, in the order of the elements."""
    return list(accumulate(reversed(shape[1:]), int.__mul__, initial=1))[::-1]
