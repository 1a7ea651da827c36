"""Find every binary activation of a model, the latent that it was made from, and where to pick both up in training.

Convolutions and matrix products receive operands. In some traces of the model, each is followed back (``history.py``)
to two-valued tensors, a_B, and from these to the call that binarized something continuous, a_F. The module whose
forward it is in names the tap. Then it is decided where to pick both up, and which dimensions of them are the channels
(``channels.py``).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from .channels import has_weight, is_of_activations, spatial_dims
from .dry_run import dry_run
from .functions import CONVOLUTIONS, LAYERS, LOOKUPS, PRODUCTS
from .history import Binarization, History, followed, is_one_call, is_sign_of, operands
from .inputs import BatchSource
from .layout import Layout
from .trace import FEW_LEVELS, Event, Sighting, Site, Snapshot, Trace

# An operand of at most a few values among so many elements is listed as quantized to more than one bit.
_FEW_AMONG = 256
_FROZEN = "everything before it is frozen: no gradient reaches it"
_NO_GRADIENT = (
    "it is made without a gradient: under no_grad, detached, in an autograd.Function, or in a reentrant checkpoint"
)
# How far equal samples are apart at most, in distances between different ones: a rounding error flips some signs.
_ALIKE = 0.4


@dataclass(frozen=True)
class BinaryActivation:
    """One distinct binary activation tensor of a model's forward pass; a *tap*, where it is contrasted.

    Attributes:
        name: qualified name of the innermost module in whose forward the binarization happens ("(model)" for the
            model itself). Where several happen in one module, ": child" is appended, for the child module whose output
            is binarized. "#2", "#3", ... tell apart what this does not: further calls of a shared module.
        channels: of the binary tensor, 0 where unknown.
        reason: why it cannot be tapped, None where it can.
        module, call: qualified name of that module, "" for the model itself, and which call of it, from 0.
        binary, latent: where a_B and a_F are picked up; no latent where a teacher stands in for it.
        layouts, latent_channels: how both are read, and the channels of a_F or of the teacher's activation.
        aligned: whether both have the same number of positions.
        mixed: why its rows are not those of one sample after another, None where they are. Its positions can be
            contrasted all the same; whole images cannot, and labels and masks do not apply.
        skipped: whether a pass of the dry run did not call its module, as where layers are skipped at random.
        product: which of the operands of products within the module a_B is, 0 where none of them is.
    """

    name: str
    channels: int
    reason: str | None
    module: str
    call: int = 0
    binary: Site | None = None
    latent: Site | None = None
    layouts: tuple[Layout, ...] = ()
    latent_channels: int = 0
    aligned: bool = True
    mixed: str | None = None
    skipped: bool = False
    product: int = 0

    @property
    def tapped(self) -> bool:
        """Whether the plug-in can tap it."""
        return self.reason is None

    @property
    def in_one_call(self) -> bool:
        """Whether both sides are picked up in one call of a module: then they belong together in every pass."""
        return self.binary is None or self.latent is None or is_one_call(self.binary, self.latent)


#: One that is contrasted: everything about it was decided in the dry run.
Tap = BinaryActivation


def discover(
    model: nn.Module, example_input: Any, batch_size: int | None = None
) -> tuple[tuple[BinaryActivation, ...], BatchSource | None]:
    """:func:`find_binary_activations`, and where the number of samples is read off the inputs: None where the user
    stated it and no input has that size."""
    traces, source = dry_run(model, example_input, batch_size)
    found: list[_Placed] = []
    order = {name: i for i, (name, _) in enumerate(model.named_modules())}
    for trace in traces[:1] + [t for t in traces[1:] if t.calls != traces[0].calls]:
        _merge(order, found, _found_in(trace, [other for other in traces if other is not trace]))
    return tuple(replace(f, skipped=not all(t.calls[f.module] for t in traces)) for f in _named(found)), source


def find_binary_activations(
    model: nn.Module, example_input: Any, *, batch_size: int | None = None
) -> list[BinaryActivation]:
    """Every binary activation of ``model``, in forward order, tappable or not. Nothing is attached.

    Args:
        model: any module. It is run a few times in training mode, first on the example, then on inputs like it, and
            left exactly as it was (``preserve_state`` in discovery/state.py says what that covers).
        example_input: a tensor, a tuple of positional inputs or a dict of keyword inputs.
        batch_size: the number of samples in the example, where its inputs do not tell.

    Raises:
        CMIMError: the example is of another type, the forward fails on it, the number of samples is not clear, or no
            parameter of the model requires a gradient.
    """
    return list(discover(model, example_input, batch_size)[0])


# A binary activation without its final name, behind what tells it from others in all traces.
_Placed = tuple[tuple[str, Site], BinaryActivation]


def _found_in(trace: Trace, others: list[Trace]) -> list[_Placed]:
    """What one trace shows, in forward order."""
    history = History(trace, others)
    found: dict[Snapshot, BinaryActivation] = {}
    pairs: set[Any] = set()
    for event, operand in operands(trace):
        binarizations = history.binarizations(event, operand)
        for b in binarizations:
            codes = b.source.held
            seen = found.get(codes)
            if (seen and seen.tapped) or not (b.latent or operand).from_input:
                continue  # a weight, a mask or a learned token
            activation = _described(history, b)
            if seen and not activation.tapped:
                continue  # another product may read channels where the first one does not
            pair = codes.code, b.latent and b.latent.held
            if activation.tapped and codes.two_valued:
                if pair in pairs:
                    continue  # query, key and value binarize one latent to the same codes
                pairs.add(pair)
            found[codes] = activation
        few = 2 < operand.held.levels <= FEW_LEVELS and operand.held.numel >= _FEW_AMONG
        if few and operand.requires_grad and operand.from_input and not binarizations:
            reason = f"a {event.name} receives {operand.held.levels} values, not two"
            found[operand.held] = BinaryActivation("", 0, reason, operand.site.module)
    firsts = sorted(((held.sightings[0], f) for held, f in found.items()), key=lambda entry: entry[0].seq)
    return [((f.module, first.site), f) for first, f in firsts]


def _described(history: History, b: Binarization) -> BinaryActivation:
    """What is to be known of it for a tap, or why it is none; the child for its name in the place of the name."""
    site, batch = _binarized_at(history, b), history.trace.batch
    refused = BinaryActivation("", 0, _reason_against(history, b), site.module, site.call)
    if refused.reason is not None or b.latent is None:
        return refused
    binary, latent = _cheapest(b.source.held.sightings, b.latent.held.sightings, site.module)
    shape, latent_shape = binary.held.shape, latent.held.shape
    spatial, reason = spatial_dims(b)
    mixed = _mixed(history, binary, latent, spatial)
    if mixed and (reason or not _has_positions(history, b, binary, Layout(spatial))):
        reason = mixed
    elif spatial is not None and spatial >= len(latent_shape):
        reason = f"its latent has another rank: {tuple(latent_shape)} for {tuple(shape)}"
    elif history.pair_differs(binary, latent, Layout(spatial)):
        reason = "its latent or its number of channels changes from pass to pass, as where layers are skipped at random"
    if reason is not None:
        return replace(refused, reason=reason)
    scores = is_of_activations(b.consumer, b.operand)
    layout, latent_layout = (
        Layout(spatial, not mixed and rows != batch, scores, bool(mixed)) for rows in (shape[0], latent_shape[0])
    )
    binary_site, latent_site = history.trace.sites_of(binary, latent)
    within = [s for _, s in operands(history.trace, site.module) if s.from_input]
    return BinaryActivation(
        name=_child(history, b.latent, site),
        channels=layout.channels(shape),
        reason=None,
        module=site.module,
        call=site.call,
        binary=binary_site,
        latent=latent_site,
        layouts=(layout, latent_layout),
        latent_channels=latent_layout.channels(latent_shape),
        aligned=layout.positions(shape) == latent_layout.positions(latent_shape),
        mixed=mixed,
        product=within.index(b.operand) if b.operand in within else 0,
    )


def _reason_against(history: History, b: Binarization) -> str | None:
    """Why this is nothing to tap, None where it is."""
    codes, made_of = b.source.held, list(followed([b.source], Sighting.given))
    sites = [s.held.sightings[0].site for s in made_of]
    behind_layer = any(s.producer and _is_layer(s.producer) for s in made_of)
    if not behind_layer and any(site.module == "" and site.kind == "input" for site in sites):
        return "it is the network's input that is binarized, not an activation"
    if not codes.first_in_graph and b.operand.requires_grad:
        return "one autograd.Function passes it straight to another: put a module between the two, as nn.Identity()"
    called = b.source.site.call >= 0  # with gradients, not in a reentrant checkpoint
    if (
        not codes.first_in_graph
        and called
        and any(not r.in_graph and r.held.first_in_graph for r in b.consumer.results)
    ):
        return "its sign and its product are in one autograd.Function: take the sign in a Function of its own"
    if not codes.first_in_graph:
        return _NO_GRADIENT if any(s.requires_grad and s.from_input for s in made_of) else _FROZEN
    if codes.one_hot and all(s.held.one_hot for _, s in history.again(b.source)):
        return "it is one-hot: a choice, not a code"
    if b.latent is None and codes.constant:
        return "it was constant in the dry run, and no call that binarizes was found: a dead sign or layer"
    if b.latent is None:
        return "no tensor in the graph was found that it is the sign of"
    latent = b.latent.held
    if latent.numel == codes.numel and codes.pattern is not None and bool(latent.values[codes.pattern == 0].any()):
        return "it has three values: its zeros are not only signs of zero"
    if codes.two_valued and not is_sign_of(history.trace, b.event.results[0] if b.event else b.source, b.latent):
        return "no threshold splits its latent into its two values"
    return None


def _is_layer(event: Event) -> bool:
    """Whether it is a trained product, or a table that the input is looked up in."""
    if event.name in ("getitem", "index_select"):  # not a slice
        return event.weighted and any(a.from_input and not a.held.values.is_floating_point() for a in event.arguments)
    return event.weighted and (event.name in CONVOLUTIONS or event.name in PRODUCTS | LAYERS | LOOKUPS)


def _mixed(history: History, binary: Sighting, latent: Sighting, spatial: int | None) -> str | None:
    """Why both sides, where they are picked up, cannot be read sample by sample, None where they can."""
    batch = history.trace.batch
    time_major = next((t.time_major for t in (history.trace, *history.others) if t.time_major), None)
    if time_major and spatial is None:
        return f"its first dimension is time, not the batch: {time_major}, without batch_first, takes it so"
    for side in (binary, latent):
        rows = side.held.shape[0] if side.held.shape else 0
        shapes = f"{tuple(side.held.shape)} for {batch} samples"
        again = [(t.batch, s.held.shape[:1].numel()) for t, s in history.again(side) if t.batch != batch]
        if not rows or rows % batch or any(n * batch != rows * samples for samples, n in again):
            return f"the batch is not its first dimension, or is mixed with another: {shapes}"
        if rows == batch:
            continue
        alike = [s for s in (binary, latent) if s.held.shape[:1].numel() == rows]  # one may be constant
        shown = [s.held for one in alike for _, s in [(None, one), *history.again(one)]]
        apart = [held.twin_distance for held in shown if held.twin_distance is not None]
        if not apart:
            return f"which rows belong to one sample could not be seen: {shapes}; try an example of random values"
        if min(apart) >= _ALIKE:
            return f"the rows of one sample do not follow each other in its first dimension: {shapes}"
    return None


def _has_positions(history: History, b: Binarization, binary: Sighting, layout: Layout) -> bool:
    """Whether what mixes the samples can be read by position. It may have no batch at all, or its channels first."""
    shapes = [(trace.batch, s.held.shape) for trace, s in [(history.trace, binary), *history.again(binary)]]
    if len({layout.positions(shape) for _, shape in shapes}) > 1:
        return True
    # A weight that sums over the last dimension says that its channels are there, if that is not the batch.
    last_is_channels = layout.spatial is None and has_weight(b.consumer, b.operand)
    last_is_batch = all(shape[-1:] == (batch,) for batch, shape in shapes)
    return last_is_channels and not last_is_batch and binary.held.shape[:-1].numel() > 1


def _binarized_at(history: History, b: Binarization) -> Site:
    """A site in the module in whose forward it happens."""
    site = b.source.site if b.event is None else b.event.results[0].site
    if b.event is None and site.kind == "input":
        # What comes in was made by the module around: BiBERT's attention assigns to a mask, and a dropout gets it.
        before = (s.site for s in reversed(history.trace.sightings[: b.source.seq]))
        around = (s for s in before if not s.module or site.module.startswith(f"{s.module}."))
        return next(around, site)
    return site


def _child(history: History, latent: Sighting, at: Site) -> str:
    """The child of a module whose output in this call the latent is, up to elementwise functions and views."""
    prefix = f"{at.module}." if at.module else ""
    since = next(s.seq for s in history.trace.sightings if (s.site.module, s.site.call) == (at.module, at.call))

    def before(s: Sighting) -> list[Sighting]:
        given = [a for a in s.given() if a.held.numel >= s.held.numel and a.requires_grad]
        return given[:1] if s.producer and s.producer.name not in PRODUCTS else []

    for current in followed([latent], before):
        outputs = [s.site.module for s in current.held.sightings if s.site.kind == "output" and s.seq > since]
        names = [name for name in outputs if name.startswith(prefix) and name != at.module]
        if names:
            return min(names, key=len).removeprefix(prefix)
    return ""


def _cheapest(binaries: Sequence[Sighting], latents: Sequence[Sighting], module: str) -> tuple[Sighting, Sighting]:
    """Where to pick a_B and a_F up: at the fewest function calls, in the module that binarizes, early.

    Rather not in two calls of modules where one is a function call. Then they may not belong together: a layer that is
    skipped shifts the count of function calls on one side only.
    """

    def cost(pair: tuple[Sighting, Sighting]) -> tuple[Any, ...]:
        sites = [s.site for s in pair]
        calls = sum(site.function is not None for site in sites)
        elsewhere = sum(site.module != module for site in sites)
        return calls > 0 and not is_one_call(*sites), calls, elsewhere, [s.seq for s in pair]

    return min(((b, f) for b in binaries for f in latents if b.in_graph and f.in_graph), key=cost)


def _merge(order: dict[str, int], found: list[_Placed], more: list[_Placed]) -> None:
    """Insert what another pass showed behind its predecessor there, in the order of the modules."""
    at = 0
    for place, activation in more:
        places = [place for place, _ in found]
        if place in places:
            at = places.index(place)
            if activation.tapped:
                found[at] = place, activation
        else:
            while at < len(found) and order.get(found[at][1].module, 0) < order.get(activation.module, 0):
                at += 1
            found.insert(at, (place, activation))
        at += 1


def _named(found: list[_Placed]) -> list[BinaryActivation]:
    """The activations with their names: those that are tapped get the plain ones."""
    taps = Counter(f.module for _, f in found if f.tapped)
    # Without a gradient in one call of a module, with one in another: nothing is missed.
    listed = [f for _, f in found if f.reason not in (_FROZEN, _NO_GRADIENT) or f.module not in taps]
    used: Counter[str] = Counter()
    for i in sorted(range(len(listed)), key=lambda i: not listed[i].tapped):
        f = listed[i]
        name = f.module or "(model)"
        if taps[f.module] > 1 and f.name:
            name = f"{name}: {f.name}"
        used[name] += 1
        listed[i] = replace(f, name=name if used[name] == 1 else f"{name}#{used[name]}")
    return listed
