"""The call that binarizes, and the latent: what it was given, where that passes in the autograd graph."""

from __future__ import annotations

from .codes import is_split_by_threshold
from .functions import DETACHES, RANDOM, STEPS, SUMS
from .index import Index
from .trace import Event, Sighting

# Calls that are followed back at most, and those within the forward of a custom function.
_FAR, _NEAR = 48, 8


def maker(index: Index, source: Sighting) -> Event | None:
    """The last call before the source that made its codes."""
    calls = [e for e in index.binarizing.get(source.value.code, ()) if e.results[0].seq <= source.seq]
    # Sums rebuild codes in the detach trick (`sign(x).detach() - f(x).detach() + f(x)`); they do not make them.
    return next((e for e in reversed(calls) if e.name not in SUMS), calls[-1] if calls else None)


def step(index: Index, operand: Sighting) -> Event | None:
    """The call that made a constant operand out of something that is not constant."""
    line = [operand]
    for sighting in line:
        event, given = index.producer(sighting), index.given(sighting, same_size=True)
        if event is None:
            continue
        if event.name in STEPS and any(_is_continuous(a) for a in given):
            return event
        if len(line) < _FAR:
            line += [a for a in given if a.value.constant or event.name in SUMS | DETACHES]
    return None


def latents_of(index: Index, source: Sighting, call: Event | None) -> list[Sighting]:
    """Sightings of a_F in the graph, empty where there is none."""
    if call is None:
        return _separable(index, source)
    size = call.results[0].value.numel
    given = [a for a in call.arguments if a.value.numel == size and _is_continuous(a)]
    for argument in given:
        for ancestor in _ancestors(index, argument):
            if found := _in_graph(index, ancestor):
                return found
    return _separable(index, source)


def is_sign_of(index: Index, source: Sighting, call: Event | None, latent: Sighting) -> bool:
    """Whether the codes tell where the latent is large: by one threshold, or more often than not if they were drawn."""
    made = (call.results[0] if call is not None else source).value
    if made.pattern is None or made.numel != latent.value.numel:
        return False
    if is_split_by_threshold(latent.value.values, made.pattern, made.index, latent.value.shape):
        return True
    between = [e for e in index.trace.events if latent.seq <= e.seq <= source.seq and e.name in RANDOM and e.results]
    if not any(e.results[0].value.numel == made.numel for e in between):
        return False
    values = latent.value.values.float()
    high, low = values[made.pattern > 0], values[made.pattern < 0]
    return len(high) > 0 and len(low) > 0 and bool((high.mean() - low.mean()).abs() > 0.1 * values.std())


def _is_continuous(sighting: Sighting) -> bool:
    return sighting.value.dtype.is_floating_point and not sighting.value.constant


def _in_graph(index: Index, sighting: Sighting) -> list[Sighting]:
    """Where the tensor passes in the graph."""
    return [s for s in index.of_value(sighting) if s.in_graph]


def _ancestors(index: Index, sighting: Sighting) -> list[Sighting]:
    """The sighting and what it was computed from, element by element."""
    line = [sighting]
    while len(line) < _NEAR:
        given = [a for a in index.given(line[-1], same_size=True) if a.value.dtype.is_floating_point]
        if not given:
            break
        line.append(given[0])
    return line


def _separable(index: Index, source: Sighting) -> list[Sighting]:
    """The last tensor before the source that one threshold splits into its codes."""
    pattern, size = source.value.pattern, source.value.numel
    if pattern is None:
        return []
    for s in reversed(index.trace.sightings[: source.seq]):
        if s.in_graph and s.value.numel == size and s.value.pattern is None and _is_continuous(s):
            above, below = s.value.values[pattern > 0], s.value.values[pattern <= 0]
            if len(above) and len(below) and (above.min() > below.max() or below.min() > above.max()):
                return _in_graph(index, s)
    return []
