"""Which dimensions of a binary tensor are its channels: those that the product contracts with a weight.

A convolution contracts the second dimension of its input, a linear layer the last one. From there a dimension is
followed back, call by call, to the binary tensor. Lengths tell nothing: there may be as many tokens as features.
"""

from __future__ import annotations

from itertools import accumulate
from math import prod

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
    dims = _followed(operand, source, contracted)
    if dims is None:  # a function in between hides what it does: a guess
        dims = contracted if last == len(operand.held.shape) - 1 else {last}
    dims = dims - {0} or dims  # samples folded into groups
    if last > 1 and dims == set(range(1, last + 1)):
        return last - 1, None  # a map that was flattened for a linear layer
    if last in dims or dims == {0}:  # of a matrix that joins samples, as a graph's, the features are last
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
    if name in ("matmul", "bmm", "mm", "addmm", "baddbmm", "addbmm", "linalg_matmul") and _is_second(consumer, operand):
        return {max(last - 1, 0)}
    if name == "tensordot":
        lengths = {n for other in consumer.shapes if other != shape for n in other}
        return {max((dim for dim, n in enumerate(shape) if dim and n in lengths), default=last)}
    return {last}


def _followed(operand: Sighting, source: Sighting, dims: set[int]) -> set[int] | None:
    """Which dimensions of the source those of a later tensor are, None where a call on the way hides it."""
    line, seen = [(operand, dims)], {id(operand.held)}
    while line:
        current, dims = line.pop()
        if current.held is source.held:
            return dims
        for argument in reversed(current.given()):
            # What was there before the source was not made of it.
            if argument.held.sightings[0].seq < source.seq or id(argument.held) in seen:
                continue
            before = _before(current, argument, dims)
            if before:
                seen.add(id(argument.held))
                line.append((argument, before))
    return None


def _before(result: Sighting, argument: Sighting, dims: set[int]) -> set[int] | None:
    """Which dimensions of the argument of a call those of its result are."""
    name = result.producer.name if result.producer else ""
    old, new = argument.held.shape, result.held.shape
    if name in functions.RESHAPES and old.numel() == new.numel():
        # Those that count the same elements, in the order that both share. One of which only a factor is among them
        # was split: pixels or time steps that were put side by side. It counts where no other does.
        steps, new_steps = _steps(old), _steps(new)
        shared = {
            d: prod(max(1, min(steps[d] * n, new_steps[i] * new[i]) // max(steps[d], new_steps[i])) for i in dims)
            for d, n in enumerate(old)
        }
        whole = {d for d, n in enumerate(old) if shared[d] == n > 1}
        return whole or {d for d in shared if shared[d] > 1}
    if name in functions.REORDERS or (name in functions.SELECTIONS and len(old) != len(new)):
        # Views: a dimension keeps its length and its stride.
        kept = [*zip(old, argument.strides, strict=True)]
        moved = [(new[i], result.strides[i]) for i in dims]
        return {kept.index(dim) for dim in moved} if all(kept.count(dim) == 1 for dim in moved) else None
    if name == "unfold" and len(old) > len(new):  # blocks of a map
        return dims if dims == {1} else None
    if name == "unfold" and len(old) < len(new):  # windows of one dimension, last
        return {i for i in dims if i < len(old)}
    if name == "stack":
        places = [d for d in range(len(new)) if (*new[:d], *new[d + 1 :]) == (*old,)]
        found = {frozenset(i - (i > d) for i in dims if i != d) for d in places}
        return set(found.pop()) if len(found) == 1 else None
    return dims if len(old) == len(new) else None


def _steps(shape: torch.Size) -> list[int]:
    """How many elements lie between neighbours of each dimension, in the order of the elements."""
    return list(accumulate(reversed(shape[1:]), int.__mul__, initial=1))[::-1]
