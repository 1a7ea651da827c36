"""Find every binary activation of a model, the latent that it was made from, and where to pick both up in training.

From some traces of the model, in this order:

1. *Operands*: convolutions and matrix products that receive a two-valued tensor, or a sum of such tensors. Each is
   followed back (``history.py``) through padding, reshaping, dropout and scaling to a_B, and from there to the function
   call that made its two values out of something continuous. What that was given is a_F; the module whose forward it is
   in names the tap.
2. *Sites*: where each of the two is picked up in training.
3. *Channels* (``channels.py``): which dimensions of it the product contracts.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from .channels import is_of_activations, spatial_dims, sums_with_weight
from .dry_run import dry_run
from .functions import CONVOLUTIONS, LAYERS, LOOKUPS, PRODUCTS
from .history import Binarization, History, is_one_call, is_sign_of, operands, origin
from .inputs import BatchSource
from .layout import Layout
from .trace import FEW_LEVELS, Event, Sighting, Site, Trace

# An operand of at most a few values among so many elements is listed as quantized to more than one bit.
_FEW_AMONG = 256
_INPUT = "it is the network's input that is binarized, not an activation"
_FROZEN = "everything before it is frozen: no gradient reaches it"
_NO_GRADIENT = "it is made without a gradient: under no_grad, detached, or in a reentrant checkpoint"
# Calls that are followed back at most.
_NEAR = 12
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
    found: list[_Found] = []
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


@dataclass
class _Found:
    """A binary activation without a name yet, what tells it from others in all traces, and the child for its name."""

    activation: BinaryActivation
    place: tuple[Any, ...]
    child: str = ""


def _found_in(trace: Trace, others: list[Trace]) -> list[_Found]:
    """What one trace shows, in forward order; behind it what is quantized to more than two values."""
    history = History(trace, others)
    found: dict[int, tuple[int, _Found]] = {}
    quantized: dict[int, _Found] = {}
    pairs = set()
    for event, operand in operands(trace):
        for b in history.binarizations(event, operand):
            codes = b.source.held
            if id(codes) in found or not (b.latent or operand).from_input:
                continue  # a weight, a mask or a learned token
            described = _described(history, b)
            if described.activation.tapped and b.latent is not None and codes.two_valued:
                # Two taps are one only if both latents come from one tensor: branches may be equal before training.
                pair = codes.code, tuple(b.latent.held.values.nan_to_num().tolist()), id(origin(b.latent).held)
                if pair in pairs:
                    continue  # query, key and value binarize one latent to the same codes
                pairs.add(pair)
            found[id(codes)] = b.source.seq, described
        few = 2 < operand.held.levels <= FEW_LEVELS and operand.held.numel >= _FEW_AMONG
        if few and operand.requires_grad and operand.from_input and not history.terms(operand):
            reason = f"a {event.name} receives {operand.held.levels} values, not two"
            activation = BinaryActivation("", 0, reason, operand.site.module)
            quantized[id(operand.held)] = _Found(activation, ("quantized", operand.site))
    return [f for _, f in sorted(found.values(), key=lambda entry: entry[0])] + list(quantized.values())


def _described(history: History, b: Binarization) -> _Found:
    module, call = _scope(history, b)
    place, reason = (module, b.source.site), _reason_against(history, b)
    if reason is None and b.latent is not None:
        binary, latent = _cheapest(b.source.held.sightings, b.latent.held.sightings, module)
        shape, latent_shape = binary.held.shape, latent.held.shape
        spatial, reason = spatial_dims(b)
        mixed = _mixed(history, binary, latent, spatial)
        summed = sums_with_weight(b) if mixed else set()
        # A weight that sums over the last dimension says where the channels are, if that is not the batch.
        vectors = summed == {len(shape) - 1} and shape[:-1].numel() > 1 and not history.last_is_batch(binary)
        if mixed and (summed == {0} or not (vectors or history.grows(binary, Layout(spatial)))):
            reason = mixed  # it may have no batch at all, or its channels first
        else:
            reason = _reason_against_shapes(history, binary, latent, spatial) or reason
    if reason is not None or b.latent is None:
        return _Found(BinaryActivation("", 0, reason, module, call), place)
    scores = is_of_activations(b.consumer, b.operand)
    batch = history.trace.batch
    layout = Layout(spatial, not mixed and shape[0] != batch, scores, bool(mixed))
    latent_layout = Layout(spatial, not mixed and latent_shape[0] != batch, scores, bool(mixed))
    within = [s for _, s in operands(history.trace, module) if s.from_input]
    activation = BinaryActivation(
        name="",
        channels=layout.channels(shape),
        reason=None,
        module=module,
        call=call,
        binary=history.trace.counted(binary.site),
        latent=history.trace.counted(latent.site),
        layouts=(layout, latent_layout),
        latent_channels=latent_layout.channels(latent_shape),
        aligned=layout.positions(shape) == latent_layout.positions(latent_shape),
        mixed=mixed,
        product=within.index(b.operand) if b.operand in within else 0,
    )
    return _Found(activation, place, _child(history, b.latent, module, call))


def _reason_against(history: History, b: Binarization) -> str | None:
    """Why this is nothing to tap, None where it is."""
    codes, made_of = b.source.held, _made_of(b.source)
    if any(_is_input(s) for s in made_of) and not any(s.producer and _is_layer(s.producer) for s in made_of):
        return _INPUT
    if not codes.first_in_graph and b.operand.requires_grad:
        return "one autograd.Function passes it straight to another: put a module between the two, as nn.Identity()"
    if not codes.first_in_graph and any(not r.in_graph and r.held.first_in_graph for r in b.consumer.results):
        return "its sign and its product are in one autograd.Function: take the sign in a Function of its own"
    if not codes.first_in_graph:
        return _NO_GRADIENT if any(s.requires_grad and s.from_input for s in made_of) else _FROZEN
    if all(s.held.one_hot for s in (b.source, *history.again(b.source))):
        return "it is one-hot: a choice, not a code"
    if b.latent is None:
        if codes.constant:
            return "it was constant in the dry run, and no call that binarizes was found: a dead sign or layer"
        return "no tensor in the graph was found that it is the sign of"
    latent = b.latent.held
    if codes.pattern is not None:
        if latent.numel == codes.numel and bool(latent.values[codes.pattern == 0].any()):
            return "it has three values: its zeros are not only signs of zero"
        if not is_sign_of(history.trace, b.source if b.event is None else b.event.results[0], b.latent):
            return "no threshold splits its latent into its two values"
    return None


def _made_of(sighting: Sighting) -> list[Sighting]:
    """A tensor and all that it was computed from, as far back as torch functions show it."""
    line, seen = [sighting], {id(sighting.held)}
    for current in line:
        before = [a for a in current.given() if id(a.held) not in seen]
        line += before
        seen |= {id(a.held) for a in before}
    return line


def _is_input(sighting: Sighting) -> bool:
    """Whether it is an input of the whole model."""
    first = sighting.held.sightings[0].site
    return first.module == "" and first.kind == "input"


def _is_layer(event: Event) -> bool:
    """Whether it is a trained product or lookup."""
    if event.name in ("getitem", "index_select"):  # a table that is looked up by the input
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
        at_site = [(others, shape[:1].numel()) for others, shape in history.shapes_again(side)]
        if not rows or rows % batch or any(n != batch and others * batch != rows * n for n, others in at_site):
            return f"the batch is not its first dimension, or is mixed with another: {shapes}"
        alike = [s for s in (binary, latent) if s.held.shape[:1].numel() == rows]  # one may be constant
        shown = [s.held.twin_distance for one in alike for s in (one, *history.again(one))]
        apart = [distance for distance in shown if distance is not None]
        if rows != batch and not apart:
            return f"which rows belong to one sample could not be seen: {shapes}; try an example of random values"
        if rows != batch and min(apart) >= _ALIKE:
            return f"the rows of one sample do not follow each other in its first dimension: {shapes}"
    return None


def _reason_against_shapes(history: History, binary: Sighting, latent: Sighting, spatial: int | None) -> str | None:
    """Why both sides, where they are picked up, cannot be read position by position, None where they can."""
    if spatial is not None and spatial >= len(latent.held.shape):
        return f"its latent has another rank: {tuple(latent.held.shape)} for {tuple(binary.held.shape)}"
    if history.pair_differs(binary, latent, Layout(spatial)):
        return "its latent or its number of channels changes from pass to pass, as where layers are skipped at random"
    return None


def _scope(history: History, b: Binarization) -> tuple[str, int]:
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


def _child(history: History, latent: Sighting, module: str, call: int) -> str:
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


def _cheapest(binaries: Sequence[Sighting], latents: Sequence[Sighting], module: str) -> tuple[Sighting, Sighting]:
    """Where to pick a_B and a_F up. In this order: both in one call of a module, or neither at a function call; fewer
    function calls; sites of the module that binarizes; earlier ones.

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


def _merge(order: dict[str, int], found: list[_Found], more: list[_Found]) -> None:
    """Insert what another pass showed behind its predecessor there, in the order of the modules."""
    at = 0
    for f in more:
        places = [g.place for g in found]
        if f.place in places:
            at = places.index(f.place)
            if f.activation.tapped:
                found[at] = f
        else:
            while at < len(found) and order.get(found[at].activation.module, 0) < order.get(f.activation.module, 0):
                at += 1
            found.insert(at, f)
        at += 1


def _named(found: list[_Found]) -> list[BinaryActivation]:
    """The activations with their names: those that are tapped get the plain ones."""
    taps = Counter(f.activation.module for f in found if f.activation.tapped)
    # Without a gradient in one call of a module, with one in another: nothing is missed.
    missed = _FROZEN, _NO_GRADIENT
    listed = [f for f in found if f.activation.reason not in missed or f.activation.module not in taps]
    used: Counter[str] = Counter()
    names = {}
    for f in sorted(listed, key=lambda f: not f.activation.tapped):
        name = f.activation.module or "(model)"
        if taps[f.activation.module] > 1 and f.child:
            name = f"{name}: {f.child}"
        used[name] += 1
        names[id(f)] = name if used[name] == 1 else f"{name}#{used[name]}"
    return [replace(f.activation, name=names[id(f)]) for f in listed]
