"""What an operand of a product was made of: its binary tensors, the call that binarized each, and the latent.

A sighting is followed back from result to arguments, one function call at a time. For example, in
``conv(scale * pad(ste(bn(x))))`` the operand is a scaling of a move of codes. The first tensor in the graph that holds
these codes is the output of ``ste``: that is a_B, whose gradient is the user's own straight-through estimator
(``_sources``). Within ``ste``, ``sign`` made the codes out of something continuous (``_maker``), a detached tensor. Its
first sighting in the graph, the output of ``bn``, is a_F (``_latent``).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor

from . import functions
from .codes import is_constant, is_split_by_threshold
from .layout import Layout
from .trace import Event, Sighting, Site, Trace, kept_positions


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
        #: Code -> calls that made it out of something that is not two-valued.
        self._binarizing: dict[tuple[int, bytes] | None, list[Event]] = defaultdict(list)
        for event in trace.events:
            for result in (r for r in event.results if self.is_code(r)):
                given = [a for a in event.arguments if a.held.numel == result.held.numel and a.held is not result.held]
                # A step makes codes of a latent that has two values, too: that of two labels, or of two times.
                is_step = event.name in functions.STEPS
                if given and not any(self.is_code(a) and (not is_step or _keeps(result, a)) for a in given):
                    self._binarizing[result.held.code].append(event)

    def again(self, sighting: Sighting) -> list[tuple[Trace, Sighting]]:
        """What other traces show at its site."""
        return [(trace, trace.at[sighting.site]) for trace in self.others if sighting.site in trace.at]

    def is_code(self, sighting: Sighting) -> bool:
        """Whether it has two values in all passes, not by chance in this one. Codes may be constant in some."""
        return sighting.held.two_valued and all(s.held.two_valued or s.held.constant for _, s in self.again(sighting))

    def binarizations(self, consumer: Event, operand: Sighting) -> list[Binarization]:
        """What was binarized to make an operand."""
        made = [(source, self._maker(source)) for source in _sources(operand, self.is_code)]
        # A norm over two numbers gives -1 and 1, and is no binarization.
        made = [(source, event) for source, event in made if event is None or event.name not in functions.NORMS]
        if not made and operand.held.constant and operand.from_input and operand.requires_grad:
            constants = _sources(operand, lambda s: s.held.constant and s.held.numel > 1)
            made = [(source, _step(operand)) for source in constants[:1]]
        return [Binarization(source, event, self._latent(source, event), consumer, operand) for source, event in made]

    def _maker(self, source: Sighting) -> Event | None:
        """The last call before the source that made its codes."""
        events = [e for e in self._binarizing.get(source.held.code, ()) if e.results[0].seq <= source.seq]
        # Sums rebuild codes in the detach trick (`sign(x).detach() - f(x).detach() + f(x)`); they do not make them.
        made = [e for e in events if e.name not in functions.SUMS] or events[-1:]
        # `o[o >= 0] = 1; o[o < 0] = -1` compares twice, the second time what is overwritten in part.
        for event in reversed(made):
            written = [a for a in event.arguments if a.producer and a.producer.writes]
            before = {b.held for a in written for b in a.given()}
            if not any(a.held in before for e in made if e is not event for a in e.arguments):
                return event
        return None

    def _latent(self, source: Sighting, event: Event | None) -> Sighting | None:
        """The first sighting of a_F in the graph."""
        if event is None or event.name in functions.SUMS:
            return self._separable(source)
        codes = event.results[0]
        given = [a for a in event.arguments if a.held.numel == codes.held.numel and a.held.continuous]
        outside = followed(given, lambda s: [] if s.held.first_in_graph else s.given(same_size=True))
        found = [s.held.first_in_graph for s in outside if s.held.first_in_graph]
        # Not a threshold or a scale that was expanded to its size.
        found.sort(key=lambda latent: latent.distinct < latent.held.numel)
        signed = [latent for latent in found if is_sign_of(self.trace, codes, latent)]
        return self._before_rounding(codes, (signed or found)[0]) if found else self._separable(source)

    def _before_rounding(self, codes: Sighting, latent: Sighting) -> Sighting:
        """What was rounded to make a latent of few values, as in ``clamp(round(x), 0, 1)``; else the latent."""
        made_of = followed([latent], lambda s: s.given(same_size=True) if s.held.levels else [])
        firsts = [s.held.first_in_graph for s in made_of if s.held.continuous]
        finer = [f for f in firsts if f and not f.held.levels and not f.held.two_valued]
        return next((f for f in finer if is_sign_of(self.trace, codes, f)), latent)

    def _separable(self, source: Sighting) -> Sighting | None:
        """The last tensor before the source that a threshold splits into its codes.

        For codes that no call returned: they were assigned to a mask (BiBERT), or made outside torch.
        """
        pattern, numel = source.held.pattern, source.held.numel
        for s in reversed(self.trace.sightings[: source.seq]):
            fits = s.in_graph and s.held.continuous and not s.held.two_valued and s.held.numel == numel
            if pattern is None or not fits or not _splits(s, pattern):
                continue
            # Not `codes + x` of the estimator `codes + x - x.detach()`.
            values = [a.held.values for a in s.given(same_size=True) if a.held.continuous]
            levels = [(v[pattern > 0], v[pattern < 0]) for v in values]
            if not any(all(len(v) > 0 and is_constant(v) for v in pair) for pair in levels):
                return s.held.first_in_graph
        return None

    def pair_differs(self, codes: Sighting, latent: Sighting, layout: Layout) -> bool:
        """Whether, at the sites of a_B and a_F, another trace has other channels, or codes of another latent.

        Traces that call the modules and functions of the sites another number of times, or in another order, say
        nothing: in training, such a pass is left out.
        """
        is_sign = is_sign_of(self.trace, codes, latent)
        sites = self.trace.sites_of(codes, latent)
        for trace, other in self.again(codes):
            other_latent = trace.at.get(latent.site)
            if other_latent and (is_one_call(*sites) or trace.sites_of(other, other_latent) == sites):
                if layout.channels(other.held.shape) != layout.channels(codes.held.shape):
                    return True
                if is_sign and other.held.two_valued and not is_sign_of(trace, other, other_latent):
                    return True
        return False


def followed(line: list[Sighting], before: Callable[[Sighting], list[Sighting]]) -> Iterator[Sighting]:
    """Sightings, and what they were made of, each tensor once: the nearest first."""
    seen = {s.held for s in line}
    for sighting in line:
        yield sighting
        for argument in before(sighting):
            if argument.held not in seen:
                seen.add(argument.held)
                line.append(argument)


def _sources(operand: Sighting, is_code: Callable[[Sighting], bool]) -> list[Sighting]:
    """The first tensor in the graph that holds the codes of an operand; of several that it joins or adds up, one of
    each. None where something else is among these."""

    def before(s: Sighting) -> list[Sighting]:
        return _with_its_codes(s, is_code) if is_code(s) else _parts(s)

    ends = [s for s in followed([operand], before) if not before(s)]
    # A trained shift, or what is expanded, may be added.
    if any(not is_code(s) and s.from_input and s.distinct * 8 > operand.held.numel for s in ends):
        return []
    return [s.held.sightings[0] for s in ends if is_code(s)]


def _parts(sighting: Sighting) -> list[Sighting]:
    """What was moved, scaled, joined or added up."""
    name, given = sighting.producer.name if sighting.producer else "", sighting.given()
    if name in functions.MOVES:
        return given[:1]
    if name in functions.SCALINGS:
        full = [a for a in given if a.distinct == sighting.held.numel]
        return full if len(full) == 1 else []
    return given if name in functions.SUMS | functions.JOINS else []


def _with_its_codes(sighting: Sighting, is_code: Callable[[Sighting], bool]) -> list[Sighting]:
    """The arguments of the call that made a tensor which have its codes already."""
    event, given = sighting.producer, sighting.given()
    if event is None or (event.name in functions.DETACHES and any(a.in_graph for a in event.arguments)):
        return []  # cut off the graph: what it was made of gets no gradient from here
    outside = sighting.held.first_in_graph is None
    # `sign(x) + (x - x.detach())`: the zeros bring the gradient.
    differences = [
        a for a in given if a.in_graph and a.held.constant and a.producer and a.producer.name in functions.SUMS
    ]
    if event.name in functions.SUMS and any(not bool(a.held.values.any()) for a in differences):
        return []
    before = [a for a in given if is_code(a) and (outside or a.held.first_in_graph)]
    full = [a for a in given if a.from_input and a.distinct == sighting.held.numel]
    # Not a latent, a scale or a gate that has two values, too.
    if sighting.held.two_valued and event.name in functions.SUMS | functions.SCALINGS | functions.STEPS | {"where"}:
        # Codes that are the only ones may change sign: by bit errors, or by a scale of both signs.
        alone = event.name in functions.SCALINGS | {"where"} and len({a.held.code for a in full}) == 1
        before = [a for a in before if _keeps(sighting, a) or (alone and a in full)]
    gates = {a for a in full if a.held.two_valued}
    # `sign(x) * (|x| > t)` has three values.
    return [] if event.name in functions.SCALINGS and gates - set(before) else before


def _keeps(result: Sighting, codes: Sighting) -> bool:
    """Whether a tensor has the codes of another one, or zeros in their places."""
    after, before = result.held.pattern, codes.held.pattern
    if after is None or before is None or result.held.numel != codes.held.numel:
        return False
    return any(bool(((after == 0) | (after == side * before)).all()) for side in (1, -1))


def _splits(latent: Sighting, pattern: Tensor) -> bool:
    """Whether thresholds split a latent into the two codes of a pattern."""
    index = kept_positions(latent.held.numel, latent.held.values.device)
    return is_split_by_threshold(latent.held.values, pattern, index, latent.held.shape)


def _step(operand: Sighting) -> Event | None:
    """The call that made a constant operand out of something that is not constant."""

    def is_of_latent(s: Sighting) -> bool:
        return any(a.held.continuous for a in s.given(same_size=True))

    def before(s: Sighting) -> list[Sighting]:
        name = s.producer.name if s.producer else ""
        # `where(mask, x, 0)` and `x * (x > t)` hold more than two values where they are not all zero.
        if name in functions.SCALINGS | {"where"} and is_of_latent(s):
            return []
        through = name in functions.SUMS | functions.DETACHES
        return [a for a in s.given(same_size=True) if through or a.held.constant]

    made = (s.producer for s in followed([operand], before) if is_of_latent(s))
    return next((event for event in made if event and event.name in functions.STEPS), None)


def is_one_call(binary: Site, latent: Site) -> bool:
    """Whether both sides are picked up in one call of a module."""
    return (binary.module, binary.call) == (latent.module, latent.call)


def operands(trace: Trace, module: str = "") -> Iterator[tuple[Event, Sighting]]:
    """The products of a trace within a module, with each argument that may be an activation."""
    for event in trace.events:
        name = event.name
        if module and not f"{event.module}.".startswith(f"{module}."):
            continue
        if name in functions.CONVOLUTIONS or name in functions.LAYERS:
            # The input and the hidden state. The first tensor of each where it is a tuple: a value with its scale
            # (brevitas). A packed sequence has its lengths, which are integers, in second place.
            floats = [s for s in reversed(event.arguments) if s.held.values.is_floating_point()]
            first = {s.site.path[1]: s for s in floats}
            is_recurrent = name in functions.LAYERS and name != "linear"
            wanted = (0, "input", 1, 2, "hx") if is_recurrent else (0, "input")
            yield from ((event, first[key]) for key in wanted if key in first)
        elif name in functions.PRODUCTS:
            for s in event.arguments:
                slot = s.site.path[1]
                is_addend = name.startswith(("addm", "addb", "badd")) and slot in (0, "input")
                is_mask = "attention" in name and slot not in (0, 1, 2, "query", "key", "value")
                if not is_addend and not is_mask:
                    yield event, s


def _is_draw(event: Event) -> bool:
    """Whether a call makes codes at random, or by a comparison with random numbers."""
    made = {a.producer.name for a in event.arguments if a.producer}
    return event.name == "bernoulli" or (event.name in functions.STEPS and not made.isdisjoint(functions.RANDOM))


def is_sign_of(trace: Trace, codes: Sighting, latent: Sighting) -> bool:
    """Whether thresholds split the latent into the two codes; or, of codes that were drawn, tell more than nothing.

    Drawn codes are accepted where the latent's mean rank differs between the two by 5 % of all ranks. For 2,048 codes
    that have nothing to do with the latent, it differs by 1.3 % (standard deviation).
    """
    values, pattern, numel = latent.held.values, codes.held.pattern, latent.held.numel
    if pattern is None or codes.held.numel != numel:
        return False
    if _splits(latent, pattern):
        return True
    between = [e for e in trace.events if latent.seq <= e.seq <= codes.seq]
    drawn = any(r.held.numel == numel for e in between if e.name in functions.RANDOM for r in e.results)
    # Drawn from the latent itself, as by `rand_like(p) < p`: little may be seen of that in few codes.
    makers = [e for e in between if any(r.held.code == codes.held.code for r in e.results) and _is_draw(e)]
    if any(a.held.numel == numel and bool((a.held.values == values).all()) for e in makers for a in e.arguments):
        return True
    ranks = values.argsort().argsort() / len(values)
    # Of no ranks, the mean is NaN.
    apart = (ranks[pattern > 0].mean() - ranks[pattern < 0].mean()).abs()
    return drawn and bool(apart > 0.05)
