"""What is said of a binarization: why it cannot be tapped, or where it is picked up in training and how it is read."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .functions import CONVOLUTIONS, LAYERS, LOOKUPS, PRODUCTS
from .history import Binarization, History, is_one_call, is_sign_of
from .layout import Layout
from .trace import Event, Sighting

FROZEN = "everything before it is frozen: no gradient reaches it"
NO_GRADIENT = "it is made without a gradient: under no_grad, detached, or in a reentrant checkpoint"
# Calls that are followed back at most.
_NEAR = 12
# How far equal samples are apart at most, in distances between different ones: a rounding error flips some signs.
_ALIKE = 0.4


def reason_against(history: History, b: Binarization) -> str | None:
    """Why this is nothing to tap, None where it is."""
    codes = b.source.held
    if not any(_is_layer(event) for event in history.trace.events if event.seq <= b.source.seq):
        return "it is the network's input that is binarized, not an activation"
    if not codes.first_in_graph and b.operand.requires_grad:
        return "it goes straight from one autograd.Function into another: pass it through a module between the two"
    if not codes.first_in_graph:
        before = history.trace.sightings[: b.source.seq]
        return NO_GRADIENT if any(s.requires_grad and s.from_input for s in before) else FROZEN
    if codes.one_hot:
        return "it is one-hot: a choice, not a code"
    if b.latent is None:
        if codes.constant:
            return "it held one value only in the dry run, and the call that binarizes is not known: a dead sign"
        return "no tensor in the graph was found that it is the sign of"
    latent = b.latent.held
    if codes.pattern is not None:
        if latent.numel == codes.numel and bool(latent.values[codes.pattern == 0].any()):
            return "it has three values: its zeros are not only signs of zero"
        if not is_sign_of(history.trace, b.source if b.event is None else b.event.results[0], b.latent):
            return "no threshold splits its latent into its two values"
    return None


def _is_layer(event: Event) -> bool:
    """Whether it is a trained product or lookup."""
    if event.name in ("getitem", "index_select"):  # a table that is looked up by the input
        return event.weighted and any(a.from_input and not a.held.values.is_floating_point() for a in event.arguments)
    return event.weighted and (event.name in CONVOLUTIONS or event.name in PRODUCTS | LAYERS | LOOKUPS)


def reason_against_shapes(history: History, binary: Sighting, latent: Sighting, spatial: int | None) -> str | None:
    """Why both sides, where they are picked up, cannot be read sample by sample, None where they can."""
    batch = history.trace.batch
    time_major = next((t.time_major for t in (history.trace, *history.others) if t.time_major), None)
    if time_major and spatial is None:
        return f"its first dimension is time, not the batch: {time_major}, without batch_first, takes it so"
    for side in (binary, latent):
        rows = side.held.shape[0] if side.held.shape else 0
        shapes = f"{tuple(side.held.shape)} for {batch} samples"
        at_site = [(t.batch, t.at[side.site].held.shape[:1].numel()) for t in history.others if side.site in t.at]
        if not rows or rows % batch or any(n != batch and others * batch != rows * n for n, others in at_site):
            return f"the batch is not its first dimension, or is mixed with another: {shapes}"
        apart = [s.held.twin_distance for s in (side, *history.again(side)) if s.held.twin_distance is not None]
        if rows != batch and not apart:
            return f"which rows belong to one sample could not be seen: {shapes}; try an example of random values"
        if rows != batch and min(apart) >= _ALIKE:
            return f"the rows of one sample do not follow each other in its first dimension: {shapes}"
    if spatial is not None and spatial >= len(latent.held.shape):
        return f"its latent has another rank: {tuple(latent.held.shape)} for {tuple(binary.held.shape)}"
    if history.pair_differs(binary, latent, Layout(spatial)):
        return "its latent, or its number of channels, is another one from pass to pass: layers are skipped at random"
    return None


def scope(history: History, b: Binarization) -> tuple[str, int]:
    """The module in whose forward it happens, and which call of it."""
    site = b.source.site if b.event is None else b.event.results[0].site
    name = site.module
    if b.event is not None or site.kind != "input" or not name:
        return name, site.call
    # What comes in was made by the module around: BiBERT's attention assigns to a mask, and a dropout gets the codes.
    before = history.trace.sightings[: b.source.seq]
    calls: list[int] = []
    while name and not calls:
        name = name.rpartition(".")[0]
        calls = [s.site.call for s in before if s.site.module == name]
    return name, max(calls, default=0)


def child(history: History, latent: Sighting, module: str, call: int) -> str:
    """The child of the module whose output in this call the latent is, up to elementwise functions and views."""
    since = next(s.seq for s in history.trace.sightings if (s.site.module, s.site.call) == (module, call))
    prefix = f"{module}." if module else ""
    current = latent
    for _ in range(_NEAR):
        outputs = [s.site.module for s in current.held.sightings if s.site.kind == "output" and s.seq > since]
        names = [name for name in outputs if name.startswith(prefix) and name != module]
        if names:
            return min(names, key=len).removeprefix(prefix)
        event, size = current.producer, current.held.numel
        given = [a for a in current.given() if a.held.numel >= size and a.requires_grad]
        if event is None or event.name in PRODUCTS or not given:
            break
        current = given[0]
    return ""


def cheapest(binaries: Sequence[Sighting], latents: Sequence[Sighting], module: str) -> tuple[Sighting, Sighting]:
    """Where to pick a_B and a_F up. Best are two sites in one call of a module, or two inputs and outputs of modules;
    among those, as few function calls as can be; then sites of the module that binarizes.

    Two sides that are picked up in two calls may not belong together: a layer that is skipped shifts the count of
    function calls on one side only.
    """

    def cost(pair: tuple[Sighting, Sighting]) -> tuple[Any, ...]:
        sites = [s.site for s in pair]
        functions = sum(site.function is not None for site in sites)
        return (
            functions > 0 and not is_one_call(*sites),
            functions,
            sum(site.module != module for site in sites),
            [s.seq for s in pair],
        )

    return min(((b, f) for b in binaries for f in latents if b.in_graph and f.in_graph), key=cost)
