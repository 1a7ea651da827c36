"""Which dimensions of a binary tensor are its channels: those that the product contracts with a weight.

A convolution contracts the second dimension of its input, a linear layer the last one. From there a dimension is
followed back, call by call, to the binary tensor. Lengths tell nothing: there may be as many tokens as features.
"""

from __future__ import annotations

from itertools import accumulate

import torch

from . import functions
from .trace import Event, Sighting


def spatial_dims(source: Sighting, consumer: Event, operand: Sighting) -> tuple[int | None, str | None]:
    """:attr:`Layout.spatial` of a binary tensor, by how its consumer contracts it; or why it has none."""
    shape = source.held.shape
    last = len(shape) - 1
    if is_of_activations(consumer, operand):
        # The features of a token are last. Of keys that were transposed before they were binarized, they come before.
        return (1 if source.held is operand.held and _is_transposed_key(consumer, operand) else None), None
    if consumer.name in functions.CONVOLUTIONS and len(operand.held.shape) == 1 + functions.CONVOLUTIONS[consumer.name]:
        return None, "the convolution receives a single sample, without a batch dimension"
    contracted = _contracted(consumer, operand)
    dims = _followed(operand, source, contracted, set())
    if dims is None:  # a function in between hides what it does
        dims = contracted if last == len(operand.held.shape) - 1 else {last}
    dims = dims - {0} or dims  # samples folded into groups
    if last > 1 and dims == set(range(1, last + 1)):
        return last - 1, None  # a map that was flattened for a linear layer
    if last in dims:
        return None, None
    if dims == set(range(1, max(dims) + 1)):
        return last - max(dims), None
    return None, f"its channels are dimension {min(dims)} of {tuple(shape)}: neither the last nor next to the batch"


def is_of_activations(consumer: Event, operand: Sighting) -> bool:
    """Whether it is a product of two activations of the same batch, as attention is."""
    others = [a for a in consumer.arguments if a is not operand and a.in_graph and a.from_input]
    return consumer.name in functions.PRODUCTS and any(a.held.shape[:1] == operand.held.shape[:1] for a in others)


def _is_second(consumer: Event, operand: Sighting) -> bool:
    """Whether it is the right one of two matrices."""
    return operand.site.path[1] in ("mat2", "other", "batch2", 2 if consumer.name.startswith(("add", "badd")) else 1)


def _is_transposed_key(consumer: Event, operand: Sighting) -> bool:
    query, key = consumer.arguments[0].held.shape, operand.held.shape
    mirrored = len(query) == len(key) > 2 and query[-2:] == key[-2:][::-1] and query[-1] != query[-2]
    return mirrored and _is_second(consumer, operand)


def _contracted(consumer: Event, operand: Sighting) -> set[int]:
    """The dimensions of an operand that the product sums over."""
    shape, name = operand.held.shape, consumer.name
    last = len(shape) - 1
    if name in functions.CONVOLUTIONS:
        return {1}
    if name == "einsum" and consumer.equation:
        terms, _, result = consumer.equation.replace(" ", "").partition("->")
        before, _, after = terms.split(",")[operand.site.path[-1] - 1].partition("...")
        letters = [*enumerate(before), *enumerate(after, len(shape) - len(after))]
        kept = result or [letter for letter in terms if terms.count(letter) == 1]
        return {dim for dim, letter in letters if letter not in kept} or {last}
    if name in ("matmul", "bmm", "mm", "addmm", "baddbmm", "addbmm", "linalg_matmul") and _is_second(consumer, operand):
        return {max(last - 1, 0)}
    if name == "tensordot":
        lengths = {n for other in consumer.shapes if other != shape for n in other}
        return {max((dim for dim, n in enumerate(shape) if dim and n in lengths), default=last)}
    return {last}


def _followed(sighting: Sighting, source: Sighting, dims: set[int], seen: set[int]) -> set[int] | None:
    """Which dimensions of the source those of a later tensor are, None where a call on the way hides it."""
    if sighting.held is source.held:
        return dims
    seen.add(id(sighting.held))
    for argument in sighting.given():
        before = _before(sighting, argument, dims) if id(argument.held) not in seen else None
        found = _followed(argument, source, before, seen) if before else None
        if found:
            return found
    return None


def _before(result: Sighting, argument: Sighting, dims: set[int]) -> set[int] | None:
    """Which dimensions of the argument of a call those of its result are."""
    name = result.producer.name if result.producer else ""
    old, new = argument.held.shape, result.held.shape
    if name in functions.RESHAPES and old.numel() == new.numel():
        # Those that count the same elements, in the order that both share.
        steps, new_steps = _steps(old), _steps(new)
        return {
            d
            for d, n in enumerate(old)
            if n > 1 and any(steps[d] < new_steps[i] * new[i] and new_steps[i] < steps[d] * n for i in dims)
        }
    if name in functions.REORDERS or (name in functions.SELECTIONS and len(old) != len(new)):
        # Views: a dimension keeps its length and its stride.
        kept = [*zip(old, argument.strides, strict=True)]
        moved = [(new[i], result.strides[i]) for i in dims]
        return {kept.index(dim) for dim in moved} if all(kept.count(dim) == 1 for dim in moved) else None
    if name == "unfold" and len(old) > len(new):  # blocks of a map
        return dims if dims == {1} else None
    return dims if len(old) == len(new) else None


def _steps(shape: torch.Size) -> list[int]:
    """How many elements lie between neighbours of each dimension, in the order of the elements."""
    return list(accumulate(reversed(shape[1:]), int.__mul__, initial=1))[::-1]
