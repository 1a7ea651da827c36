"""Look-ups in one trace."""

from __future__ import annotations

from collections import defaultdict

from .functions import NORMS, RECURRENT
from .trace import Event, Sighting, Site, Trace

# How far equal samples are apart at most, in distances between different ones: exactly, and with signs that flip on a
# rounding error.
EQUAL, ALIKE = 0.02, 0.4
_NEVER = 1 << 62


class Index:
    """What one trace shows, and what the others show at the same sites."""

    def __init__(self, trace: Trace, others: list[Trace]) -> None:
        self.trace = trace
        self.again: dict[Site, list[Sighting]] = defaultdict(list)
        self._of_tensor: dict[int, list[Sighting]] = defaultdict(list)
        #: Code -> calls that made it out of something that is not two-valued.
        self.binarizing: dict[tuple[int, bytes] | None, list[Event]] = defaultdict(list)
        #: When each call of a module began.
        self.entered: dict[tuple[str, int], int] = {}
        for other in others:
            for s in other.sightings:
                self.again[s.site].append(s)
        for s in trace.sightings:
            self._of_tensor[s.tensor].append(s)
            self.entered.setdefault((s.site.module, s.site.call), s.seq)
        for event in trace.events:
            for result in event.results:
                if result.value.code is not None and event.name not in NORMS and _has_continuous(event, result):
                    self.binarizing[result.value.code].append(event)
        self._mixed = min((_first_mixing(other) for other in others), default=_NEVER)

    def of_tensor(self, sighting: Sighting) -> list[Sighting]:
        """All sightings of this tensor, whatever it holds."""
        return self._of_tensor[sighting.tensor]

    def of_value(self, sighting: Sighting) -> list[Sighting]:
        """All sightings of this tensor that hold the same."""
        return [s for s in self._of_tensor[sighting.tensor] if s.value is sighting.value]

    def in_graph(self, sighting: Sighting) -> bool:
        """Also of a tensor seen within the forward of a custom autograd function, where gradients are disabled."""
        return any(s.in_graph for s in self.of_value(sighting))

    def producer(self, sighting: Sighting) -> Event | None:
        """The function call that returned this tensor with this value."""
        for s in self.of_value(sighting):
            if s.event is not None and s.seq <= sighting.seq:
                return self.trace.events[s.event]
        return None

    def given(self, sighting: Sighting, same_size: bool = False) -> list[Sighting]:
        """What the call that returned this was given; not the tensor itself, as a function in place is given it."""
        event = self.producer(sighting)
        arguments = [a for a in (event.arguments if event else ()) if a.seq < sighting.seq]
        size = sighting.value.numel
        return [a for a in arguments if a.value is not sighting.value and (not same_size or a.value.numel == size)]

    # -- samples -------------------------------------------------------------------------------------------------

    @property
    def mixes(self) -> bool:
        """Whether a recurrent layer told equal samples apart: what it takes for time may be the batch."""
        return self._mixed < _NEVER

    def by_sample(self, sighting: Sighting) -> bool | None:
        """Whether equal samples have equal values at this site; None where that could not be seen."""
        seen = [(s.value.apart, s.seq) for s in (sighting, *self.again.get(sighting.site, ()))]
        known = [(apart, seq) for apart, seq in seen if apart is not None]
        if not known:
            return None
        apart, seq = min(known)
        return apart < (ALIKE if seq < self._mixed else EQUAL)


def _first_mixing(trace: Trace) -> int:
    """When a recurrent layer first got equal values for equal samples, and returned different ones."""
    for event in trace.events:
        if event.name in RECURRENT:
            given = [s.value.apart for s in event.arguments if s.value.apart is not None]
            returned = [s.value.apart for s in event.results if s.value.apart is not None]
            if given and max(given) < 1e-6 and max(returned, default=0.0) > EQUAL:
                return event.seq
    return _NEVER


def _has_continuous(event: Event, result: Sighting) -> bool:
    """Whether the call was given tensors of the result's size, none of them two-valued."""
    size = result.value.numel
    given = [a for a in event.arguments if a.value.numel == size and a.value is not result.value]
    return bool(given) and not any(a.value.pattern is not None for a in given)
