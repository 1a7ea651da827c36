"""Find every binary activation of a model, the latent that it was made from, and where to pick both up in training.

From some traces of the model, in this order:

1. *Operands*: convolutions and matrix products that receive a two-valued tensor, or a sum of such tensors. Each is
   followed back (``history.py``) through padding, reshaping, dropout and scaling to a_B, and from there to the function
   call that made its two values out of something continuous. What that was given is a_F; the module whose forward it is
   in names the tap.
2. *Sites* (``sites.py``): where each of the two is picked up in training.
3. *Channels* (``channels.py``): which dimensions of it the product contracts.
"""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, replace
from typing import Any

from torch import nn

from . import sites
from .channels import is_of_activations, spatial_dims
from .dry_run import dry_run
from .history import Binarization, History, operands, origin
from .inputs import BatchSource
from .layout import Layout
from .trace import FEW_LEVELS, Site, Trace

# An operand of at most a few values among so many elements is listed as quantized to more than one bit.
_FEW_AMONG = 256


@dataclass(frozen=True)
class BinaryActivation:
    """One distinct binary activation tensor of a model's forward pass.

    Attributes:
        name: qualified name of the innermost module in whose forward the binarization happens ("(model)" for the
            model itself). Where several happen in one module, ": child" is appended, for the child module whose output
            is binarized. "#2", "#3", ... tell apart what this does not: further calls of a shared module.
        channels: channels of the binary tensor (0 where unknown).
        reason: why it cannot be tapped, None where it can.
        module, call: qualified name of that module ("" for the model itself), and which call of it, from 0.
        binary, latent: where a_B and a_F are picked up.
        binary_layout, latent_layout, latent_channels: how they are read.
        aligned: whether both have the same number of positions.
        product: which of the operands of products within the module a_B is, 0 where none of them is.
    """

    name: str
    channels: int
    reason: str | None
    module: str
    call: int = 0
    binary: Site | None = None
    latent: Site | None = None
    binary_layout: Layout | None = None
    latent_layout: Layout | None = None
    latent_channels: int = 0
    aligned: bool = True
    product: int = 0

    @property
    def tapped(self) -> bool:
        """Whether the plug-in can tap it."""
        return self.reason is None


def discover(
    model: nn.Module, example_input: Any, batch_size: int | None = None
) -> tuple[tuple[BinaryActivation, ...], BatchSource | None]:
    """Every binary activation of ``model``, in forward order, and where the number of samples is read off its inputs.

    The latter is None where the user stated it and no input has that size. Nothing is attached.

    Args:
        model: any module. It is run a few times in training mode, first on the example, then on inputs like it, and
            left exactly as it was (see :func:`~cmim_plugin.discovery.state.preserve_state` for what that covers).
        example_input: a tensor, a tuple of positional inputs or a dict of keyword inputs.
        batch_size: the number of samples in the example, where its inputs do not tell.

    Raises:
        CMIMError: the example is of another type, the forward fails on it, the number of samples is not clear, or no
            parameter of the model requires a gradient.
    """
    traces, source = dry_run(model, example_input, batch_size)
    found: list[_Found] = []
    order = {name: i for i, (name, _) in enumerate(model.named_modules())}
    for trace in traces[:1] + [t for t in traces[1:] if t.calls != traces[0].calls]:
        _merge(order, found, _found_in(trace, [other for other in traces if other is not trace]))
    return tuple(_named(found)), source


def find_binary_activations(
    model: nn.Module, example_input: Any, *, batch_size: int | None = None
) -> list[BinaryActivation]:
    """Every binary activation of ``model``, in forward order, tappable or not: see :func:`discover`."""
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
                # Of one tensor, for branches may be alike only as they are initialised.
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
    module, call = sites.scope(history, b)
    place, reason = (module, b.source.site), sites.reason_against(history, b)
    if reason is None and b.latent is not None:
        binary, latent = sites.cheapest(b.source.held.sightings, b.latent.held.sightings, module)
        shape, latent_shape = binary.held.shape, latent.held.shape
        spatial, reason = spatial_dims(b)
        reason = sites.reason_against_shapes(history, binary, latent, spatial) or reason
    if reason is not None or b.latent is None:
        return _Found(BinaryActivation("", 0, reason, module, call), place)
    scores = is_of_activations(b.consumer, b.operand)
    layout = Layout(spatial, shape[0] != history.trace.batch, scores)
    latent_layout = Layout(spatial, latent_shape[0] != history.trace.batch, scores)
    within = [s for _, s in operands(history.trace, module) if s.from_input]
    activation = BinaryActivation(
        name="",
        channels=layout.channels(shape),
        reason=None,
        module=module,
        call=call,
        binary=history.trace.counted(binary.site),
        latent=history.trace.counted(latent.site),
        binary_layout=layout,
        latent_layout=latent_layout,
        latent_channels=latent_layout.channels(latent_shape),
        aligned=layout.positions(shape) == latent_layout.positions(latent_shape),
        product=within.index(b.operand) if b.operand in within else 0,
    )
    return _Found(activation, place, sites.child(history, b.latent, module, call))


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
    missed = sites.FROZEN, sites.NO_GRADIENT
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
