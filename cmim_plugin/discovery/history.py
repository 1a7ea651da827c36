"""What an operand of a product was made of: its binary tensors, the call that binarized each, and the latent.

A sighting is followed back from result to arguments, one function call at a time. The source of an operand is the first
tensor in the autograd graph that holds its two values: that is a_B, whose gradient is the user's own straight-through
estimator. The call that made these values out of something continuous (``sign``, a comparison, ``round``) was given the
latent, or a tensor that was computed from it outside the graph.

For example ``conv(scale * pad(ste(bn(x))))``, with a scale for each channel: the operand is a scaling of a move of the
first tensor that has two values (``terms``), the output of ``ste``. On the way to it the first tensor in the graph that
has two values is that output itself (``_sources``). Within ``ste``, ``sign`` made its codes (``_maker``), of a detached
tensor; the first sighting of this tensor in the graph is the output of ``bn`` (``_latent``).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from . import functions
from .codes import is_constant, is_split_by_threshold
from .inputs import Path
from .layout import Layout
from .trace import Event, Sighting, Site, Snapshot, Trace, kept_positions

# Calls that are followed back at most: to the terms of a sum, from a constant operand, and within a custom function.
_DEPTH, _FAR, _NEAR = 96, 48, 8
# Paths of a function's first argument.
_FIRST: tuple[Path, ...] = ((0, 0), (1, "input"))
_SECOND: tuple[Path, ...] = ((0, 1), (1, "hx"))


@dataclass(frozen=True)
class Binarization:
    """A binary tensor that a product receives, as it is or moved, scaled, joined or added up."""

    source: Sighting  # its first
    event: Event | None  # the function call that made its two values out of something continuous, where it is known
    latent: Sighting | None  # the first of a_F in the graph
    consumer: Event  # the product
    operand: Sighting  # the argument of it


class History:
    """One trace to be followed back, and what the other traces show at the same sites."""

    def __init__(self, trace: Trace, others: list[Trace]) -> None:
        self.trace = trace
        self.others = others
        self._terms: dict[Sighting, list[Sighting]] = {}
        #: Code -> calls that made it out of something that is not two-valued.
        self._binarizing: dict[tuple[int, bytes] | None, list[Event]] = defaultdict(list)
        for event in trace.events:
            for result in (r for r in event.results if r.held.two_valued):
                size = result.held.numel
                given = [a for a in event.arguments if a.held.numel == size and a.held is not result.held]
                # A step makes codes of a latent that has two values, too: that of two labels, or of two times.
                codes = [a for a in given if self.is_two_valued(a)]
                if event.name in functions.STEPS:
                    codes = [a for a in codes if _are_kept(a, result)]
                if given and not codes:
                    self._binarizing[result.held.code].append(event)

    def again(self, sighting: Sighting) -> list[Sighting]:
        """What the other traces show at its site."""
        return [trace.at[sighting.site] for trace in self.others if sighting.site in trace.at]

    def shapes_again(self, sighting: Sighting) -> list[tuple[int, torch.Size]]:
        """The number of samples of each other trace that has its site, and the shape there."""
        return [(trace.batch, trace.at[sighting.site].held.shape) for trace in self.others if sighting.site in trace.at]

    def is_two_valued(self, sighting: Sighting) -> bool:
        """Whether it is in all passes, not by chance in this one. A sign may be constant in some of them."""
        return sighting.held.two_valued and all(s.held.two_valued or s.held.constant for s in self.again(sighting))

    def binarizations(self, consumer: Event, operand: Sighting) -> Iterator[Binarization]:
        """What was binarized to make an operand."""
        sources = [s for part in self.terms(operand) for s in _sources(part, lambda value: value.two_valued)]
        made = [(source, self._maker(source)) for source in sources]
        # A norm over two numbers gives -1 and 1, and is no binarization.
        made = [(source, event) for source, event in made if event is None or event.name not in functions.NORMS]
        if not made and operand.held.constant and operand.from_input and operand.requires_grad:
            source = _sources(operand, lambda value: value.constant and value.numel > 1)[0]
            made = [(source, _step(operand))]
        for source, event in made:
            yield Binarization(source, event, self._latent(source, event), consumer, operand)

    def terms(self, operand: Sighting, depth: int = 0) -> list[Sighting]:
        """The binary tensors that an operand is the sum of; itself if it is binary; none otherwise."""
        if operand not in self._terms:  # branches meet again
            self._terms[operand] = self._terms_of(operand, depth)
        return self._terms[operand]

    def _terms_of(self, operand: Sighting, depth: int) -> list[Sighting]:
        event = operand.producer
        if self.is_two_valued(operand):
            # Of two codes of one scale the sum has three values, evenly spaced.
            pattern = operand.held.pattern
            has_zeros = pattern is not None and bool((pattern == 0).any())
            is_sum = event is not None and event.name in functions.SUMS
            parts = operand.given(same_size=True) if is_sum and has_zeros else []
            terms = [self.terms(part, depth + 1) for part in parts]
            return [t for found in terms for t in found] if len(terms) > 1 and all(terms) else [operand]
        if event is None or depth > _DEPTH:
            return []
        size, arguments = operand.held.numel, operand.given()
        if event.name in functions.MOVES:
            arguments = arguments[:1]
        elif event.name in functions.SCALINGS:
            arguments = [a for a in arguments if a.distinct == size]
            if len(arguments) > 1:
                return []
        elif event.name not in functions.SUMS | functions.JOINS:
            return []
        inner = [(a, self.terms(a, depth + 1)) for a in arguments]
        if any(not found and a.from_input and a.distinct * 8 > size for a, found in inner):
            return []  # a sum with another activation; not with a trained shift
        return list(dict.fromkeys(term for _, found in inner for term in found))

    def _maker(self, source: Sighting) -> Event | None:
        """The last call before the source that made its codes."""
        events = [e for e in self._binarizing.get(source.held.code, ()) if e.results[0].seq <= source.seq]
        # Sums rebuild codes in the detach trick (`sign(x).detach() - f(x).detach() + f(x)`); they do not make them.
        made = [e for e in events if e.name not in functions.SUMS] or events[-1:]
        # `o[o >= 0] = 1; o[o < 0] = -1` compares twice, the second time what is overwritten in part.
        for event in reversed(made):
            before = {id(b.held) for a in event.arguments for b in _overwritten(a)}
            if not any(id(a.held) in before for e in made if e is not event for a in e.arguments):
                return event
        return None

    def _latent(self, source: Sighting, event: Event | None) -> Sighting | None:
        """The first sighting of a_F in the graph."""
        if event is None or event.name in functions.SUMS:
            return self._separable(source)
        codes, found = event.results[0], []
        line = [a for a in event.arguments if a.held.numel == codes.held.numel and a.held.continuous]
        for sighting in line:
            if sighting.held.first_in_graph:
                found.append(sighting.held.first_in_graph)
            elif len(line) < _NEAR:
                line += sighting.given(same_size=True)
        if not found:
            return self._separable(source)
        # Not a threshold or a scale that was expanded to its size.
        signed = (latent for latent in found if len(found) == 1 or is_sign_of(self.trace, codes, latent))
        return next(signed, found[0])

    def _separable(self, source: Sighting) -> Sighting | None:
        """The last tensor before the source that a threshold splits into its codes.

        For codes that no call returned: they were assigned to a mask (BiBERT), or made outside torch.
        """
        pattern = source.held.pattern
        if pattern is None:
            return None
        for s in reversed(self.trace.sightings[: source.seq]):
            fits = s.in_graph and s.held.continuous and not s.held.two_valued and s.held.numel == source.held.numel
            if not fits:
                continue
            index = kept_positions(s.held.numel, pattern.device)
            if not (_separated(s, pattern) or is_split_by_threshold(s.held.values, pattern, index, s.held.shape)):
                continue
            # Not `codes + x` of the estimator `codes + x - x.detach()`.
            if not any(_separated(a, pattern, levels=True) for a in s.given(same_size=True)):
                return s.held.first_in_graph
        return None

    def grows(self, sighting: Sighting, layout: Layout) -> bool:
        """Whether a trace of another number of samples has another number of positions at its site."""
        positions = layout.positions(sighting.held.shape)
        others = [shape for batch, shape in self.shapes_again(sighting) if batch != self.trace.batch]
        return any(layout.positions(shape) != positions for shape in others)

    def last_is_batch(self, sighting: Sighting) -> bool:
        """Whether the last dimension at its site is as long as the batch in all traces."""
        here = self.trace.batch, sighting.held.shape
        return all(shape[-1:] == (batch,) for batch, shape in [here, *self.shapes_again(sighting)])

    def pair_differs(self, codes: Sighting, latent: Sighting, layout: Layout) -> bool:
        """Whether, at the sites of a_B and a_F, another trace has other channels, or codes of another latent.

        Traces that call the modules and functions of the sites another number of times say nothing: in training, such
        a pass is left out.
        """
        is_sign = is_sign_of(self.trace, codes, latent)
        sites = codes.site, latent.site
        counted = [self.trace.counted(site) for site in sites]
        for trace in self.others:
            alike = is_one_call(*sites) or [trace.counted(site) for site in sites] == counted
            if alike and all(site in trace.at for site in sites):
                other, of_other = (trace.at[site] for site in sites)
                if layout.channels(other.held.shape) != layout.channels(codes.held.shape):
                    return True
                if is_sign and other.held.two_valued and not is_sign_of(trace, other, of_other):
                    return True
        return False


def origin(sighting: Sighting) -> Sighting:
    """The tensor that this one is computed from by functions of nothing else, parameters included."""
    while (event := sighting.producer) is not None:
        # A view of a parameter, as in `x + bias.view(1, -1, 1, 1)`, is an argument, and no parameter any more.
        given = [a for a in sighting.given() if a.from_input or a.requires_grad]
        if len(given) != 1 or event.parameters:
            break
        sighting = given[0]
    return sighting


def _sources(sighting: Sighting, like: Callable[[Snapshot], bool]) -> list[Sighting]:
    """The first tensor in the graph of which ``like`` is true on the way to this one; of several parts, one of each."""
    sources: list[Sighting] = []
    line = [sighting]
    seen: set[tuple[Snapshot, Event | None]] = set()
    while line:
        current = line.pop()
        key = current.held, current.producer
        if key in seen:
            continue  # branches that meet again
        seen.add(key)
        outside, event = current.held.first_in_graph is None, current.producer
        before = [a for a in current.given() if like(a.held) and (outside or a.held.first_in_graph)]
        if event is not None and event.name in functions.DETACHES and any(a.in_graph for a in event.arguments):
            before = []  # cut off the graph: what it was made of gets no gradient from here
        if event is not None and event.name in functions.SUMS:  # the detach trick: not its latent, which may have two
            before = [a for a in before if a.held.code == current.held.code]
        if event is not None and event.name in functions.STEPS:  # nor a latent of which a group has two values only
            before = [a for a in before if _are_kept(a, current)]
        # Not a factor that is expanded: one scale a sample has two values where there are two samples.
        before = [a for a in before if a.distinct * 4 > a.held.numel] or before
        if event is not None and event.name in functions.SCALINGS:  # nor is a gate a code
            full = [a for a in current.given() if a.distinct == current.held.numel]
            before = [a for a in before if a in full] or before
            if any(_zeroes(a, current) for a in full if a not in before and a.from_input):
                before = []  # `sign(x) * (|x| > t)` has three values
        line += reversed(before)
        sources += [] if before else current.held.sightings[:1]
    return sources


def _are_kept(codes: Sighting, result: Sighting) -> bool:
    """Whether a step function hands on the codes that it was given, and does not make its own of a latent."""
    if codes.held.code == result.held.code or not codes.held.continuous:
        return True
    is_where = result.producer is not None and result.producer.name == "where"
    before, after = codes.held.values, result.held.values  # some may be set to zero
    return is_where and codes.held.numel == result.held.numel and bool(((before == after) | (after == 0)).all())


def _separated(sighting: Sighting, pattern: Tensor, levels: bool = False) -> bool:
    """Whether a threshold splits a tensor into both codes of a pattern; ``levels``: into one value for each."""
    high, low = sighting.held.values[pattern > 0], sighting.held.values[pattern < 0]
    if not len(high) or not len(low):
        return False
    apart = bool(high.min() > low.max() or low.min() > high.max())
    return apart and (not levels or (is_constant(high) and is_constant(low)))


def _zeroes(gate: Sighting, product: Sighting) -> bool:
    """Whether a gate of two values is why a product holds zeros."""
    if gate.held.pattern is None or product.held.pattern is None:
        return False
    return bool((gate.held.values[product.held.pattern == 0] == 0).any())


def _overwritten(sighting: Sighting) -> list[Sighting]:
    """What a tensor held before the call that wrote into it."""
    event = sighting.producer
    return [a for a in sighting.given() if event is not None and event.writes]


def _step(operand: Sighting) -> Event | None:
    """The call that made a constant operand out of something that is not constant."""
    line = [operand]
    for sighting in line:
        event, given = sighting.producer, sighting.given(same_size=True)
        if event is None:
            continue
        continuous = [a for a in given if a.held.continuous]
        if continuous and event.name in functions.SCALINGS | {"where"}:
            continue  # `where(mask, x, 0)` and `x * (x > t)` hold more than two values where they are not all zero
        if continuous and event.name in functions.STEPS:
            return event
        if len(line) < _FAR:
            line += [a for a in given if a.held.constant or event.name in functions.SUMS | functions.DETACHES]
    return None


def is_one_call(binary: Site, latent: Site) -> bool:
    """Whether both sides are picked up in one call of a module."""
    return (binary.module, binary.call) == (latent.module, latent.call)


def operands(trace: Trace, module: str = "") -> Iterator[tuple[Event, Sighting]]:
    """The products of a trace within a module, with each argument that may be an activation."""
    inside = f"{module}."
    for event in trace.events:
        if module and event.module != module and not event.module.startswith(inside):
            continue
        if event.name in functions.CONVOLUTIONS or event.name in functions.LAYERS:
            # The first tensor of it where the input is a tuple: a value with its scale (brevitas).
            found = [s for s in event.arguments if s.site.path[:2] in _FIRST][:1]
            if event.name in functions.LAYERS and event.name != "linear":  # the hidden state, not lengths of sequences
                states = [s for s in event.arguments if s.site.path[:2] in _SECOND]
                found += [s for s in states if s.held.values.is_floating_point()][:1]
            yield from ((event, s) for s in found)
        elif event.name in functions.PRODUCTS:
            addend = _FIRST if event.name.startswith(("addm", "addb", "badd")) else ()
            mask = "attention" in event.name
            for s in event.arguments:
                is_mask = mask and s.site.path[1] not in (0, 1, 2, "query", "key", "value")
                if s.site.path[:2] not in addend and not is_mask:
                    yield event, s


def is_sign_of(trace: Trace, codes: Sighting, latent: Sighting) -> bool:
    """Whether thresholds split the latent into the two codes; or, of codes that were drawn, tell more than nothing.

    Drawn codes are accepted where the latent's mean rank differs between the two by 5 % of all ranks. For 2,048 codes
    that have nothing to do with the latent, it differs by 1.3 % (standard deviation).
    """
    values, pattern, numel = latent.held.values, codes.held.pattern, latent.held.numel
    if pattern is None or codes.held.numel != numel:
        return False
    if is_split_by_threshold(values, pattern, kept_positions(numel, values.device), latent.held.shape):
        return True
    drawn = [e for e in trace.events if latent.seq <= e.seq <= codes.seq and e.name in functions.RANDOM]
    # Drawn from the latent itself: little may be seen of that in few codes.
    makers = [e for e in drawn if e.name == "bernoulli" and any(r.held.code == codes.held.code for r in e.results)]
    given = [a.held.values for e in makers for a in e.arguments if a.held.numel == numel]
    if any(bool((held == values).all()) for held in given):
        return True
    if not any(result.held.numel == numel for event in drawn for result in event.results):
        return False
    ranks = values.argsort().argsort() / len(values)
    # Of no ranks, the mean is NaN.
    return bool((ranks[pattern > 0].mean() - ranks[pattern < 0].mean()).abs() > 0.05)
