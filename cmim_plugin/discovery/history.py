"""What an operand of a product was made of: its binary tensors, the call that binarized each, and the latent.

A sighting is followed back from result to arguments, one function call at a time. For example, in
``conv(scale * pad(ste(bn(x))))`` the operand is a scaling of a move of codes (here ``scale *`` and ``pad``). The first
tensor in the graph with these codes is the output of ``ste``: that is a_B, whose gradient is the user's own
straight-through estimator (``_sources``). Within ``ste``, ``sign`` made the codes (``_binarizing_call``). Its argument
is a detached tensor, whose first sighting in the graph, the output of ``bn``, is a_F (``_latent``).
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Callable, Iterator
from dataclasses import dataclass

from torch import Tensor

from . import functions
from .codes import is_constant, is_split_by_threshold
from .layout import Layout
from .trace import Event, Sighting, Snapshot, Trace, kept_indices


@dataclass(frozen=True)
class Binarization:
    """A binary tensor that a product receives, as it is or moved, scaled, joined or added up."""

    source: Sighting  # the first sighting of a_B
    event: Event | None  # the call that binarizes: it made the two values; None if it is not known
    latent: Sighting | None  # the first sighting of a_F in the graph
    consumer: Event  # the product
    operand: Sighting  # the argument of the product that is made of a_B

    @property
    def binarized(self) -> Sighting:
        """The result of the call that binarizes; a_B if that call is not known."""
        return self.event.results[0] if self.event else self.source


class History:
    """One trace to be followed back, and what the other traces show at the same sites."""

    def __init__(self, trace: Trace, others: list[Trace]) -> None:
        self.trace = trace
        self.others = others
        #: Pattern key -> the calls that made such codes out of something that is not binary.
        self._binarizing_calls: dict[tuple[int, bytes] | None, list[Event]] = defaultdict(list)
        for event in trace.events:
            is_step = event.name in functions.STEPS
            for result in (r for r in event.results if self.is_binary(r)):
                arguments = [a for a in event.arguments if a.snapshot is not result.snapshot]
                latents = [a for a in arguments if a.snapshot.numel == result.snapshot.numel]
                # A latent may have two values, too, as labels or the times 0 and 1: a step makes new codes of them.
                has_codes = any(self.is_binary(a) and (not is_step or _keeps_codes(result, a)) for a in latents)
                if latents and not has_codes:
                    self._binarizing_calls[result.snapshot.pattern_key].append(event)

    def in_all_traces(self, sighting: Sighting) -> list[tuple[Trace, Sighting]]:
        """This trace and the sighting; then each other trace that has its site, and the sighting there."""
        others = [(trace, trace.by_site[sighting.site]) for trace in self.others if sighting.site in trace.by_site]
        return [(self.trace, sighting), *others]

    def is_binary(self, sighting: Sighting) -> bool:
        """Whether a tensor has two values in this trace, and two or one in each other trace."""
        if not sighting.snapshot.two_valued:
            return False
        return all(s.snapshot.two_valued or s.snapshot.constant for _, s in self.in_all_traces(sighting))

    def binarizations(self, consumer: Event, operand: Sighting) -> list[Binarization]:
        """The binary tensors that an operand is made of, each with the call that binarized it and its latent."""
        made = [(source, self._binarizing_call(source)) for source in _sources(operand, self.is_binary)]
        # Not a norm: over two elements it gives -1 and 1.
        made = [(source, event) for source, event in made if event is None or event.name not in functions.NORMS]
        # A dead sign is constant: no pattern shows that it is binary. It is listed.
        if not made and operand.snapshot.constant and operand.from_input and operand.requires_grad:
            constants = _sources(operand, lambda s: s.snapshot.constant and s.snapshot.numel > 1)
            return [Binarization(source, None, None, consumer, operand) for source in constants[:1]]
        return [Binarization(source, event, self._latent(source, event), consumer, operand) for source, event in made]

    def _binarizing_call(self, source: Sighting) -> Event | None:
        """The last call before the source that made its codes."""
        key = source.snapshot.pattern_key
        calls = [call for call in self._binarizing_calls.get(key, ()) if call.results[0].seq <= source.seq]
        # A sum rebuilds codes, as in the detach trick `sign(x).detach() - f(x).detach() + f(x)`: the last resort.
        calls = [call for call in calls if call.name not in functions.SUMS] or calls[-1:]
        # `o[o >= 0] = 1; o[o < 0] = -1` compares twice, the second time what is half overwritten: the first one counts.
        for call in reversed(calls):
            written = [a for a in call.arguments if a.producer and a.producer.writes]
            overwritten = {parent.snapshot for a in written for parent in a.parents()}
            if not any(a.snapshot in overwritten for other in calls if other is not call for a in other.arguments):
                return call
        return None

    def _latent(self, source: Sighting, event: Event | None) -> Sighting | None:
        """The first sighting of a_F in the graph."""
        if event is None or event.name in functions.SUMS:
            return self._latent_by_values(source)
        binarized = event.results[0]
        continuous = [a for a in event.arguments if a.snapshot.continuous]
        arguments = [a for a in continuous if a.snapshot.numel == binarized.snapshot.numel]
        walk = walk_back(arguments, lambda s: [] if s.snapshot.first_in_graph else s.parents(same_size=True))
        found = [s.snapshot.first_in_graph for s in walk if s.snapshot.first_in_graph]
        # Thresholds and scales that are expanded to this size come last.
        found.sort(key=lambda latent: latent.distinct < latent.snapshot.numel)
        signed = [latent for latent in found if is_sign_of(self.trace, binarized, latent)]
        return self._before_rounding(binarized, (signed or found)[0]) if found else None

    def _before_rounding(self, binarized: Sighting, latent: Sighting) -> Sighting:
        """What was rounded to make a latent of few values, as in ``clamp(round(x), 0, 1)``; else the latent."""
        walk = walk_back([latent], lambda s: s.parents(same_size=True) if s.snapshot.num_values else [])
        firsts = [s.snapshot.first_in_graph for s in walk if s.snapshot.continuous]
        finer = [f for f in firsts if f and not f.snapshot.num_values and not f.snapshot.two_valued]
        return next((f for f in finer if is_sign_of(self.trace, binarized, f)), latent)

    def _latent_by_values(self, source: Sighting) -> Sighting | None:
        """The last tensor before the source that a threshold splits into its codes.

        For codes that no call, or a sum, returned: they were assigned to a mask (BiBERT), or made outside torch.
        """
        pattern, numel = source.snapshot.pattern, source.snapshot.numel
        assert pattern is not None
        for s in reversed(self.trace.sightings[: source.seq]):
            latent = s.snapshot
            fits = s.in_graph and latent.continuous and not latent.two_valued and latent.numel == numel
            if not fits or not _is_split(latent, pattern):
                continue
            # Not `codes + x` of the estimator `codes + x - x.detach()`: an addend of it is constant for each code.
            addends = [a.snapshot.values for a in s.parents(same_size=True) if a.snapshot.continuous]
            by_code = [(values[pattern > 0], values[pattern < 0]) for values in addends]
            if not any(all(len(v) > 0 and is_constant(v) for v in pair) for pair in by_code):
                return latent.first_in_graph
        return None

    def pair_differs(self, binary: Sighting, latent: Sighting, layout: Layout) -> bool:
        """Whether another trace has, at the sites of a_B and a_F, other channels, or an a_B that is not a_F's sign.

        Traces that call the modules and functions of the sites another number of times, or in another order, say
        nothing: in training, such a pass is left out.
        """
        is_sign = is_sign_of(self.trace, binary, latent)
        sites = self.trace.sites_of(binary, latent)
        same_call = binary.site.in_same_call(latent.site)
        for trace, other in self.in_all_traces(binary)[1:]:
            other_latent = trace.by_site.get(latent.site)
            if other_latent and (same_call or trace.sites_of(other, other_latent) == sites):
                if layout.channels(other.snapshot.shape) != layout.channels(binary.snapshot.shape):
                    return True
                if is_sign and other.snapshot.two_valued and not is_sign_of(trace, other, other_latent):
                    return True
        return False


def walk_back(start: list[Sighting], parents: Callable[[Sighting], list[Sighting]]) -> Iterator[Sighting]:
    """Sightings, their parents, the parents of these, and so on: each tensor once, the nearest first."""
    queue, visited = list(start), {s.snapshot for s in start}
    for sighting in queue:
        yield sighting
        for parent in parents(sighting):
            if parent.snapshot not in visited:
                visited.add(parent.snapshot)
                queue.append(parent)


def _sources(operand: Sighting, is_binary: Callable[[Sighting], bool]) -> list[Sighting]:
    """The first sighting of each a_B that an operand is made of; none if it also holds something else."""

    def parents(s: Sighting) -> list[Sighting]:
        return _binary_parents(s, is_binary) if is_binary(s) else _parts(s)

    ends = [s for s in walk_back([operand], parents) if not parents(s)]
    # A trained shift may be added, or something of at most an eighth of the size that is expanded.
    if any(not is_binary(s) and s.from_input and s.distinct * 8 > operand.snapshot.numel for s in ends):
        return []
    return [s.snapshot.sightings[0] for s in ends if is_binary(s)]


def _parts(sighting: Sighting) -> list[Sighting]:
    """The parents whose values a move, a scaling, a sum or a join passes on."""
    name, parents = sighting.made_by, sighting.parents()
    if name in functions.MOVES:
        return parents[:1]
    if name in functions.SCALINGS:
        full_size = [a for a in parents if a.distinct == sighting.snapshot.numel]
        return full_size if len(full_size) == 1 else []
    return parents if name in functions.SUMS | functions.JOINS else []


def _binary_parents(sighting: Sighting, is_binary: Callable[[Sighting], bool]) -> list[Sighting]:
    """The parents that have the codes of a binary tensor already: the search for a_B goes on to them."""
    event, parents = sighting.producer, sighting.parents()
    if event is None or (event.name in functions.DETACHES and any(a.in_graph for a in event.arguments)):
        return []  # detached: no gradient goes on to the parents
    if event.name in functions.SUMS:
        # `sign(x) + (x - x.detach())`: the zeros bring the gradient.
        zeros = [a for a in parents if a.in_graph and a.snapshot.constant and not bool(a.snapshot.values.any())]
        if any(a.made_by in functions.SUMS for a in zeros):
            return []
    in_graph = sighting.snapshot.first_in_graph is not None
    had_codes = [a for a in parents if is_binary(a) and (a.snapshot.first_in_graph or not in_graph)]
    full_size = [a for a in parents if a.from_input and a.distinct == sighting.snapshot.numel]
    # A latent, a scale or a gate may have two values, too. Only a parent whose codes the result keeps counts.
    if sighting.snapshot.two_valued and event.name in functions.SUMS | functions.STEPS | functions.GATES:
        # Single codes may flip if all full arguments carry the same: by bit errors, or by a scale of both signs.
        only_codes = event.name in functions.GATES and len({a.snapshot.pattern_key for a in full_size}) == 1
        had_codes = [a for a in had_codes if _keeps_codes(sighting, a) or (only_codes and a in full_size)]
    # `sign(x) * (|x| > t)` has three values: the product itself is a_B.
    gates = {a for a in full_size if a.snapshot.two_valued} - set(had_codes)
    return [] if event.name in functions.SCALINGS and gates else had_codes


def _keeps_codes(result: Sighting, argument: Sighting) -> bool:
    """Whether a result has the codes of an argument, up to their common sign and to zeros."""
    new, old = result.snapshot.pattern, argument.snapshot.pattern
    if new is None or old is None or result.snapshot.numel != argument.snapshot.numel:
        return False
    return any(bool(((new == 0) | (new == sign * old)).all()) for sign in (1, -1))


def _is_split(latent: Snapshot, pattern: Tensor) -> bool:
    """Whether thresholds split a latent into the two codes of a pattern."""
    index = kept_indices(latent.numel, latent.values.device)
    return is_split_by_threshold(latent.values, pattern, index, latent.shape)


def operands(trace: Trace, module: str = "") -> Iterator[tuple[Event, Sighting]]:
    """(product, argument): the products of a trace within a module, with each argument that may be an activation."""
    for event in trace.events:
        name = event.name
        if module and not f"{event.module}.".startswith(f"{module}."):
            continue
        if name in functions.CONVOLUTIONS or name in functions.LAYERS:
            # The input and the hidden state. The first tensor of each if it is a tuple: a value with its scale
            # (brevitas). A packed sequence has its lengths, which are integers, in second place.
            floats = [s for s in reversed(event.arguments) if s.snapshot.values.is_floating_point()]
            first = {s.site.path[1]: s for s in floats}
            wanted = (0, "input", 1, 2, "hx") if name in functions.RECURRENT else (0, "input")
            yield from ((event, first[key]) for key in wanted if key in first)
        elif name in functions.PRODUCTS:
            for s in event.arguments:
                slot = s.site.path[1]
                is_addend = name in functions.WITH_ADDEND and slot in (0, "input")
                is_mask = "attention" in name and slot not in (0, 1, 2, "query", "key", "value")
                if not is_addend and not is_mask:
                    yield event, s


def _is_draw(event: Event) -> bool:
    """Whether a call makes codes at random, or by a comparison with random numbers."""
    compared = event.name in functions.STEPS and any(a.made_by in functions.RANDOM for a in event.arguments)
    return compared or event.name == "bernoulli"


def is_sign_of(trace: Trace, binary: Sighting, latent: Sighting) -> bool:
    """Whether thresholds split the latent into the two codes; or, for drawn codes, whether they depend on the latent.

    Drawn codes are accepted if the latent's mean rank differs between the two by 5 % of all ranks. For 2,048 codes
    that have nothing to do with the latent, it differs by 1.3 % (standard deviation).
    """
    values, pattern, numel = latent.snapshot.values, binary.snapshot.pattern, latent.snapshot.numel
    if pattern is None or binary.snapshot.numel != numel:
        return False
    if _is_split(latent.snapshot, pattern):
        return True
    between = [e for e in trace.events if latent.seq <= e.seq <= binary.seq]
    # Drawn from the latent itself, as by `rand_like(p) < p`: accepted, for the ranks of few codes show little.
    key = binary.snapshot.pattern_key
    draws = [e for e in between if any(r.snapshot.pattern_key == key for r in e.results) and _is_draw(e)]
    if any(a.snapshot.numel == numel and bool((a.snapshot.values == values).all()) for e in draws for a in e.arguments):
        return True
    ranks = values.argsort().argsort() / len(values)
    # NaN if one of the codes does not occur: that compares false.
    difference = (ranks[pattern > 0].mean() - ranks[pattern < 0].mean()).abs()
    is_drawn = any(r.snapshot.numel == numel for e in between if e.name in functions.RANDOM for r in e.results)
    return is_drawn and bool(difference > 0.05)
