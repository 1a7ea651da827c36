"""Find every binary activation of a model, the latent that it was made from, and where to capture both in training.

The dry run records a few forward passes. In each of these traces, every operand of a convolution or matrix product is
followed back to its binary tensors, a_B, and from a_B to a_F, the continuous tensor that was binarized
(``history.py``). The innermost module whose forward binarizes names the tap. Last, it is decided at which sites to
capture both, and which dimensions of them are the channels (``channels.py``).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import nn

from ..wrappers import unwrapped
from .channels import has_weight, is_attention_like, spatial_dims
from .dry_run import dry_run
from .functions import TRAINED
from .history import Binarization, History, is_sign_of, operands, walk_back
from .inputs import BatchSource
from .layout import Layout
from .trace import MAX_QUANTIZED_VALUES, Event, Sighting, Site, Snapshot, Trace

_MIN_QUANTIZED = 256  # operands with fewer elements are not listed as quantized: they have few values anyway
_FROZEN = "everything before it is frozen: no gradient reaches it"
_NO_GRADIENT = (
    "it is made without a gradient: under no_grad, detached, in an autograd.Function, or in a reentrant checkpoint"
)
_MAX_TWIN_DISTANCE = 0.4  # of equal samples (see Snapshot). Not zero: rounding errors flip some signs


@dataclass(frozen=True)
class BinaryActivation:
    """One distinct binary activation tensor of a model's forward pass; a *tap* if it can be contrasted.

    Attributes:
        name: qualified name of the innermost module in whose forward the binarization happens ("(model)" for the
            model itself). If several happen in one module, ": child" is appended, for the child module whose output
            is binarized. Names that are still equal, as of further calls of a shared module, get "#2", "#3", ...
        channels: number of channels of a_B, 0 if it was not read.
        reason: why it cannot be tapped, or None.
        module, call: qualified name of that module, "" for the model itself, and the index of the call of it.
        binary, latent: the sites at which a_B and a_F are captured. ``latent`` is None if a teacher takes its place.
        layouts, latent_channels: those of a_B and a_F; the number of channels of a_F or of the teacher's activation.
        aligned: whether both have the same number of positions.
        mixed: why its rows are not grouped by sample, or None. Its positions can be contrasted all the
            same; whole images cannot, and labels and masks do not apply.
        skipped: whether a pass of the dry run did not call its module, as if layers are skipped at random.
        product: index of a_B among the operands of the module's products, for a teacher; 0 if a_B is none of them.
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
        """Whether a_B and a_F are captured in the same module call: then they belong together in every pass."""
        return self.binary is None or self.latent is None or self.binary.in_same_call(self.latent)


#: A binary activation without a ``reason``: the same class, a name for signatures.
Tap = BinaryActivation


def discover(
    model: nn.Module, example_input: Any, batch_size: int | None = None
) -> tuple[tuple[BinaryActivation, ...], BatchSource | None]:
    """The binary activations, and where the number of samples is read off the inputs, if they tell it."""
    traces, source = dry_run(model, example_input, batch_size)
    found: list[_Keyed] = []
    order = {name: i for i, (name, _) in enumerate(model.named_modules())}
    # A trace that called the same modules as the first one shows the same activations.
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
        batch_size: the number of samples in the example, if its inputs do not tell.

    Raises:
        CMIMError: the example is of another type, the forward fails on it, the number of samples is not clear, or no
            parameter of the model requires a gradient.
    """
    return list(discover(unwrapped(model), example_input, batch_size)[0])


# The site of the first sighting, the same in all traces, and the activation, without its final name.
_Keyed = tuple[Site, BinaryActivation]


def _found_in(trace: Trace, others: list[Trace]) -> list[_Keyed]:
    """The binary activations of one trace, in forward order."""
    history = History(trace, others)
    found: dict[Snapshot, BinaryActivation] = {}
    pairs: set[Any] = set()
    for event, operand in operands(trace):
        binarizations = history.binarizations(event, operand)
        for b in binarizations:
            snapshot = b.source.snapshot
            earlier = found.get(snapshot)
            if earlier and earlier.tapped:
                continue
            if not b.source.from_input:
                continue  # a constant: a weight, a mask or a learned token
            activation = _described(history, b)
            # One that was refused may be tapped here: this product may show channels that the first one did not.
            if earlier and not activation.tapped:
                continue
            pair = snapshot.pattern_key, b.latent and b.latent.snapshot
            if activation.tapped:
                if pair in pairs:
                    continue  # query, key and value binarize one latent to the same codes: one tap
                pairs.add(pair)
            found[snapshot] = activation
        values = operand.snapshot.num_values
        is_quantized = 2 < values <= MAX_QUANTIZED_VALUES and operand.snapshot.numel >= _MIN_QUANTIZED
        if is_quantized and operand.requires_grad and operand.from_input and not binarizations:
            reason = f"a {event.name} receives {values} values, not two"
            found[operand.snapshot] = BinaryActivation("", 0, reason, operand.site.module)
    firsts = sorted(((snapshot.sightings[0], f) for snapshot, f in found.items()), key=lambda entry: entry[0].seq)
    return [(first.site, f) for first, f in firsts]


def _described(history: History, b: Binarization) -> BinaryActivation:
    """The activation as a tap, or with the reason why it is none. Its name is that of the child for now."""
    site, batch = _site_of_binarization(history, b), history.trace.batch
    refused = partial(BinaryActivation, "", 0, module=site.module, call=site.call)
    reason = _reason_against(history, b)
    if reason is not None or b.latent is None:
        return refused(reason=reason)
    binary, latent = _cheapest(b.source.snapshot.sightings, b.latent.snapshot.sightings, site.module)
    shape, latent_shape = binary.snapshot.shape, latent.snapshot.shape
    spatial, reason = spatial_dims(b)
    mixed = _why_mixed(history, binary, latent, spatial)
    if mixed and (reason or not _has_positions(history, b, binary, Layout(spatial))):
        return refused(reason=mixed)
    if reason is not None:
        return refused(reason=reason)
    if spatial is not None and spatial >= len(latent_shape):
        return refused(reason=f"its latent has another rank: {tuple(latent_shape)} for {tuple(shape)}")
    if history.pair_differs(binary, latent, Layout(spatial)):
        changes = (
            "its latent or its number of channels changes from pass to pass, as where layers are skipped at random"
        )
        return refused(reason=changes)
    common = Layout(spatial, scores=is_attention_like(b.consumer, b.operand), mixed=bool(mixed))
    layout = replace(common, windowed=not mixed and shape[0] != batch)
    latent_layout = replace(common, windowed=not mixed and latent_shape[0] != batch)
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
    """The reason why a binarization cannot be tapped, whatever its layout, or None."""
    snapshot, ancestors = b.source.snapshot, list(walk_back([b.source], Sighting.parents))
    first_sites = [s.snapshot.sightings[0].site for s in ancestors]
    behind_layer = any(s.producer and _is_layer(s.producer) for s in ancestors)
    if not behind_layer and any(site.module == "" and site.kind == "input" for site in first_sites):
        return "it is the network's input that is binarized, not an activation"
    if not snapshot.first_in_graph:  # seen within an autograd.Function only, or without gradients
        if b.operand.requires_grad:
            return "one autograd.Function passes it straight to another: put a module between the two, as nn.Identity()"
        is_counted = b.source.site.call >= 0  # not in a reentrant checkpoint or under no_grad
        # The product's result enters the graph as that of the Function.
        if is_counted and any(not r.in_graph and r.snapshot.first_in_graph for r in b.consumer.results):
            return "its sign and its product are in one autograd.Function: take the sign in a Function of its own"
        return _NO_GRADIENT if any(s.requires_grad for s in ancestors) else _FROZEN
    if all(s.snapshot.one_hot for _, s in history.in_all_traces(b.source)):
        return "it is one-hot: a choice, not a code"
    if snapshot.pattern is None:
        return "it was constant in the dry run: a dead sign (behind a ReLU?) or layer, or too few samples to tell"
    if b.latent is None:
        return "no tensor in the graph was found that it is the sign of"
    if bool(b.latent.snapshot.values[snapshot.pattern == 0].any()):
        return "it has three values: its zeros are not only signs of zero"
    if not is_sign_of(history.trace, b.binarized, b.latent):
        return "no threshold splits its latent into its two values"
    return None


def _is_layer(event: Event) -> bool:
    """Whether a call is a trained product, or looks the input up in a table."""
    if event.name in ("getitem", "index_select"):  # by integers that depend on the input: not a slice
        indices = [a for a in event.arguments if a.from_input and not a.snapshot.values.is_floating_point()]
        return event.has_gradient and bool(indices)
    return event.name in TRAINED and (event.has_gradient or not event.grad_enabled)


def _why_mixed(history: History, binary: Sighting, latent: Sighting, spatial: int | None) -> str | None:
    """Why the rows of a_B or a_F, as they are captured, are not grouped by sample, or None."""
    batch = history.trace.batch
    time_major = next((t.time_major for t in (history.trace, *history.others) if t.time_major), None)
    if time_major and spatial is None:
        return f"its first dimension is time, not the batch: {time_major}, without batch_first, takes it so"
    for side in (binary, latent):
        rows = side.snapshot.shape[0] if side.snapshot.shape else 0
        shapes = f"{tuple(side.snapshot.shape)} for {batch} samples"
        counts = [(trace.batch, s.snapshot.shape[:1].numel()) for trace, s in history.in_all_traces(side)]
        # The number of rows has to grow with the batch.
        if not rows or rows % batch or any(n * batch != rows * samples for samples, n in counts if samples != batch):
            return f"the batch is not its first dimension, or is mixed with another: {shapes}"
        if rows == batch:
            continue
        snapshots = [s.snapshot for _, s in history.in_all_traces(side)]
        distances = [s.twin_distance for s in snapshots if s.twin_distance is not None]
        if not distances:
            return f"which rows belong to one sample could not be seen: {shapes}; try an example of random values"
        if min(distances) >= _MAX_TWIN_DISTANCE:
            return f"the rows of one sample do not follow each other in its first dimension: {shapes}"
    return None


def _has_positions(history: History, b: Binarization, binary: Sighting, layout: Layout) -> bool:
    """Whether a_B has positions to contrast although its samples are mixed: not without a batch, or channels first."""
    shapes = [(trace.batch, s.snapshot.shape) for trace, s in history.in_all_traces(binary)]
    if len({layout.positions(shape) for _, shape in shapes}) > 1:
        return True  # the batch is among the positions
    # A weight that contracts the last dimension shows that it is the channels, unless it is the batch.
    last_is_channels = layout.spatial is None and has_weight(b.consumer, b.operand)
    last_is_batch = all(shape[-1:] == (batch,) for batch, shape in shapes)
    return last_is_channels and not last_is_batch and binary.snapshot.shape[:-1].numel() > 1


def _site_of_binarization(history: History, b: Binarization) -> Site:
    """A site in the module whose forward binarizes."""
    site = b.binarized.site
    if site.kind == "input":
        # No call returned the codes, so the enclosing module made them: BiBERT writes them into a mask, for a dropout.
        earlier = (s.site for s in reversed(history.trace.sightings[: b.source.seq]))
        return next((s for s in earlier if not s.module or site.module.startswith(f"{s.module}.")), site)
    return site


def _child(history: History, latent: Sighting, site: Site) -> str:
    """The child module whose output in this call is the latent, up to elementwise functions and views; "" if none."""
    prefix = f"{site.module}." if site.module else ""
    start_of_call = next(s.seq for s in history.trace.sightings if s.site.in_same_call(site))

    def parents(s: Sighting) -> list[Sighting]:
        found = [a for a in s.parents() if a.snapshot.numel >= s.snapshot.numel and a.requires_grad]
        return found[:1] if s.made_by not in TRAINED else []

    for current in walk_back([latent], parents):
        outputs = [s.site for s in current.snapshot.sightings if s.site.kind == "output" and s.seq > start_of_call]
        names = [s.module for s in outputs if s.module.startswith(prefix) and s.module != site.module]
        if names:
            return min(names, key=len).removeprefix(prefix)
    return ""


def _cheapest(binaries: Sequence[Sighting], latents: Sequence[Sighting], module: str) -> tuple[Sighting, Sighting]:
    """The sightings at whose sites both are captured: few watched function calls, in the binarizing module, early.

    Before all that: no function call unless both are in one module call. Otherwise they may not belong together: a
    layer that is skipped shifts the count of function calls on one side only.
    """

    def cost(pair: tuple[Sighting, Sighting]) -> tuple[Any, ...]:
        sites = [s.site for s in pair]
        watched = sum(site.function is not None for site in sites)
        elsewhere = sum(site.module != module for site in sites)
        return watched > 0 and not sites[0].in_same_call(sites[1]), watched, elsewhere

    # Of equals, min() takes the first.
    return min(((b, f) for b in binaries for f in latents if b.in_graph and f.in_graph), key=cost)


def _merge(order: dict[str, int], found: list[_Keyed], more: list[_Keyed]) -> None:
    """Add the activations of another trace, each behind its predecessor there, then by the order of the modules."""
    i = 0
    for key, activation in more:
        keys = [key for key, _ in found]
        if key in keys:
            i = keys.index(key)
            if activation.tapped:
                found[i] = key, activation
        else:
            while i < len(found) and order.get(found[i][1].module, 0) < order.get(activation.module, 0):
                i += 1
            found.insert(i, (key, activation))
        i += 1


def _named(found: list[_Keyed]) -> list[BinaryActivation]:
    """The activations with their final names: taps first, they get those without a number."""
    taps = Counter(f.module for _, f in found if f.tapped)
    # A module call without a gradient is not listed if another call of the module is tapped.
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
