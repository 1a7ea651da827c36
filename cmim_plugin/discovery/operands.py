"""Which operands of products are binary, and the binary tensors in the autograd graph that they are made of."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass

from .functions import CONVOLUTIONS, JOINS, LOOKUPS, MOVES, NORMS, PRODUCTS, SCALINGS, SUMS
from .index import Index
from .latents import latents_of, maker, step
from .trace import Event, Sighting, Trace

# Calls that are followed back at most.
_DEPTH = 96


@dataclass(frozen=True)
class Binarization:
    """A binary tensor that a product receives, as it is or moved, scaled, joined or added up.

    Attributes:
        source: its first sighting; its gradient is the user's own straight-through estimator.
        call: the function call that made its two values out of something continuous, where that is known.
        latents: where the latent passes in the graph, empty where there is none.
        consumer, operand: the product, and the argument of it.
    """

    source: Sighting
    call: Event | None
    latents: list[Sighting]
    consumer: Event
    operand: Sighting


def operands(trace: Trace) -> Iterator[tuple[Event, Sighting]]:
    """The products of a trace, with each argument that may be an activation."""
    for event in trace.events:
        if event.name in CONVOLUTIONS or event.name == "linear":
            # The first tensor of it where the input is a tuple: a value with its scale (brevitas).
            first = [s for s in event.arguments if s.site.path[:2] in ((0, 0), (1, "input"))][:1]
            yield from ((event, s) for s in first)
        elif event.name in PRODUCTS:
            yield from ((event, s) for s in event.arguments)


def first_product(trace: Trace) -> int:
    """When the first trained product or lookup happened: what is binarized before is the network's input."""
    names = {*CONVOLUTIONS, *PRODUCTS, *LOOKUPS, "linear"}
    return next((e.seq for e in trace.events if e.weighted and e.name in names), len(trace.sightings))


def binarizations(index: Index, consumer: Event, operand: Sighting) -> Iterator[Binarization]:
    """What was binarized to make an operand."""
    found = False
    for part in terms(index, operand):
        for source in _sources(index, part, _is_two_valued):
            call, producer = maker(index, source), index.producer(source)
            if call is None and producer is not None and producer.name in NORMS:
                continue  # two samples normalized: exactly -1 and 1
            found = True
            yield Binarization(source, call, latents_of(index, source, call), consumer, operand)
    if not found and operand.value.constant and operand.from_input and operand.requires_grad:
        call = step(index, operand)
        source = _sources(index, operand, lambda s: s.value.constant and s.value.numel > 1)[0]
        yield Binarization(source, call, latents_of(index, source, call), consumer, operand)


def terms(index: Index, operand: Sighting, depth: int = 0) -> list[Sighting]:
    """The binary tensors that an operand is the sum of; itself if it is binary; none otherwise."""
    if _is_code(index, operand):
        return [operand]
    event = index.producer(operand)
    if event is None or depth > _DEPTH or operand.value.constant:
        return []
    size, arguments = operand.value.numel, index.given(operand)
    if event.name in MOVES:
        arguments = arguments[:1]
    elif event.name in SCALINGS:
        arguments = [a for a in arguments if a.distinct == size]
        if len(arguments) > 1:
            return []
    elif event.name not in SUMS | JOINS:
        return []
    inner = [(a, terms(index, a, depth + 1)) for a in arguments]
    if any(not found and a.requires_grad and a.distinct * 8 > size for a, found in inner):
        return []  # a sum with something continuous
    return [term for _, found in inner for term in found]


def _is_two_valued(sighting: Sighting) -> bool:
    return sighting.value.pattern is not None


def _is_code(index: Index, sighting: Sighting) -> bool:
    """Two-valued in all passes: not a coincidence. A sign may be constant in some of them."""
    again = index.again.get(sighting.site, ())
    return _is_two_valued(sighting) and all(_is_two_valued(s) or s.value.constant for s in again)


def _sources(index: Index, current: Sighting, like: Callable[[Sighting], bool], depth: int = 0) -> list[Sighting]:
    """The first tensor in the graph of which ``like`` is true on the way to this one.

    Where this one is made of several, those of each part.
    """
    event, graph = index.producer(current), index.in_graph(current)
    before = [a for a in index.given(current) if like(a) and (not graph or index.in_graph(a))]
    # A scale of each sample has two values where there are two samples.
    before = [a for a in before if a.distinct * 4 > a.value.numel] or before
    if event is None or not before or depth > _DEPTH:
        return index.of_value(current)[:1]
    if event.name in JOINS and len(event.arguments) > 1:
        parts = [a for a in before if _is_code(index, a)]
        return [s for part in parts for s in _sources(index, part, like, depth + 1)] or [current]
    return [s for part in before for s in _sources(index, part, like, depth + 1)]
