"""Find every binary activation of a model, the latent that it was made from, and where to pick both up in training.

From two traces of the model (:mod:`cmim_plugin.probe`), in the order of the code below:

1. *Operands*: convolutions and matrix products that receive a tensor of two values (:func:`codes`).
2. *Source*: follow an operand back through padding, reshaping, dropout and scaling to the first tensor in the
   autograd graph that holds its codes. That is a_B: its gradient is the user's own straight-through estimator.
3. *Birth*: the function call that made these codes out of something continuous (``sign``, a comparison, ``round``).
   What it was given is a_F; the module whose forward it is in names the tap.
4. *Sites*: the cheapest place where each of the two passes in training: a module's input or output if there is one.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from .instances import Layout
from .probe import Event, Sighting, Site, Trace, same, watch

# What consumes an activation, by the name of the torch function, and how many of its leading arguments are activations.
_CONVOLUTIONS = {f"conv{t}{d}d": d for t in ("", "_transpose") for d in (1, 2, 3)}
_PRODUCTS = frozenset({"matmul", "__matmul__", "__rmatmul__", "bmm", "mm", "mv", "dot", "addmm", "addbmm", "baddbmm"})
_PRODUCTS |= {
    "einsum",
    "inner",
    "tensordot",
    "bilinear",
    "scaled_dot_product_attention",
    "multi_head_attention_forward",
}
_LOOKUPS = frozenset({"embedding", "embedding_bag"})
# Sums rebuild codes in the detach trick (`sign(x).detach() - f(x).detach() + f(x)`); they do not make them.
_SUMS = frozenset(f"{op}{end}" for op in ("add", "sub", "rsub") for end in ("", "_")) | frozenset(
    ("__add__", "__radd__", "__iadd__", "__sub__", "__rsub__", "__isub__")
)
_JOINS = frozenset({"cat", "concat", "concatenate", "stack", "hstack", "vstack"})

# Float noise of a detach trick stays under 2e-7 of the codes' size.
_TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 2e-2}
_DEFAULT_TOLERANCE = 1e-5
# Fewer elements than this in a group that shares its scale can hold two values by chance.
_SMALLEST_GROUP = 6


@dataclass(frozen=True)
class BinaryActivation:
    """One distinct binary activation tensor of a model's forward pass.

    Attributes:
        name: qualified name of the innermost module in whose forward the binarization happens ("(model)" for the
            model itself); "#2", "#3", ... for further ones of the same module that can be tapped, by a second call or
            by a second sign in one forward.
        channels: channels of the binary tensor (0 where unknown).
        reason: why it cannot be tapped, None where it can.
        module: qualified name of that module ("" for the model itself).
    """

    name: str
    channels: int
    reason: str | None
    module: str
    binary: Site | None = None
    latent: Site | None = None
    binary_layout: Layout | None = None
    latent_layout: Layout | None = None
    latent_channels: int = 0
    aligned: bool = True

    @property
    def tapped(self) -> bool:
        """Whether the plug-in can tap it."""
        return self.reason is None


def find_binary_activations(model: nn.Module, example_input: Any) -> list[BinaryActivation]:
    """Every binary activation of ``model``, in forward order, tappable or not, without attaching anything.

    Args:
        model: any module. It is run three times in training mode on random inputs like the example and left exactly
            as it was: parameters, buffers, modes, gradients and the random generators.
        example_input: a tensor, a tuple of positional inputs or a dict of keyword inputs. Only shapes, dtypes and the
            range of the values matter.

    Raises:
        CMIMError: the example is of another type, or the forward fails on it.
    """
    first, second = watch(model, example_input)
    try:
        return _Analysis(first, second).run()
    finally:
        # Sightings and events refer to each other: without this the activations would wait for the garbage collector.
        first.forget()
        second.forget()


def codes(value: Tensor) -> Tensor | None:
    """The pattern of a two-valued tensor: -1 and +1, 0 for zeros between symmetric codes; None if it has more values.

    The two values may differ by sample, by channel (dimension 1 or the last) or by (sample, channel). Zeros between
    ``-a`` and ``a`` come from dropout, padding or ``sign(0)``.

    Args:
        value: any strided tensor.

    Returns:
        int8, the shape of ``value``; constant groups count as their sign.
    """
    if value.dtype == torch.bool:
        both = bool(value.any()) and not bool(value.all())
        return value.to(torch.int8) * 2 - 1 if both else None
    if value.numel() < _SMALLEST_GROUP:
        return None
    tolerance = _TOLERANCE.get(value.dtype, _DEFAULT_TOLERANCE)
    value = value.double() if value.dtype == torch.float64 else value.float()
    dims = range(value.ndim)
    for shared in ((), (0,), (1,), (value.ndim - 1,), (0, 1)):
        if all(d in dims for d in shared) and len(shared) < value.ndim:
            pattern = _codes_by_group(value, shared, tolerance)
            if pattern is not None:
                return pattern
    return None


def _codes_by_group(value: Tensor, shared: tuple[int, ...], tolerance: float) -> Tensor | None:
    """:func:`codes` where elements with the same index in the dimensions ``shared`` have the same two values."""
    within = [d for d in range(value.ndim) if d not in shared]
    if torch.Size([value.shape[d] for d in within]).numel() < _SMALLEST_GROUP:
        return None
    low, high = value.amin(within, keepdim=True), value.amax(within, keepdim=True)
    noise = tolerance * torch.maximum(low.abs(), high.abs())
    is_low, is_high = (value - low).abs() <= noise, (value - high).abs() <= noise
    symmetric = (low + high).abs() <= 2 * noise
    is_zero = symmetric & (value.abs() <= noise)
    two = (high - low) > 10 * noise
    # NaN compares false, and so is never a code.
    if not bool((is_low | is_high | is_zero).all()) or two.float().mean() < 0.125:
        return None
    pattern = torch.where(is_high, 1, -1).masked_fill(is_zero, 0)
    return torch.where(two, pattern, value.sign()).to(torch.int8)


def _quickly_many_valued(value: Tensor) -> bool:
    """More than three distinct values in a small sample: true of almost every tensor, and cheap."""
    if value.dtype == torch.bool or value.numel() == 0:
        return False
    flat = value.flatten()
    sample = flat[:: max(1, flat.numel() // 64)][:64].float()
    return sample.unique().numel() > 6


def _key(pattern: Tensor) -> tuple[int, int]:
    """Equal for equal patterns of any shape, also where the two codes changed places."""
    flat = pattern.flatten()
    nonzero = flat[flat != 0]
    if len(nonzero) and nonzero[0] < 0:
        flat = -flat
    weights = torch.randint(2**62, (len(flat),), generator=torch.Generator().manual_seed(len(flat)))
    return len(flat), int((flat.cpu() * weights).sum())


class _Analysis:
    def __init__(self, first: Trace, second: Trace) -> None:
        self.first = first
        self.second = second
        self.again = {s.site: s for s in second.sightings}
        self.by_tensor: dict[int, list[Sighting]] = defaultdict(list)
        self.by_value: dict[tuple[int, tuple[float, ...]], list[Sighting]] = defaultdict(list)
        self._codes: dict[int, Tensor | None] = {}
        for sighting in first.sightings:
            self.by_tensor[id(sighting.tensor)].append(sighting)
            self.by_value[self._fingerprint(sighting.value)].append(sighting)
        self.births: dict[tuple[int, int], list[tuple[Event, Sighting]]] = defaultdict(list)
        for event in first.events:
            for result in event.results:
                self._note_birth(event, result)

    # -- 1. operands ---------------------------------------------------------------------------------------------

    def run(self) -> list[BinaryActivation]:
        found: dict[int, tuple[Sighting, Event, Sighting]] = {}
        for event in self.first.events:
            for operand in self._operands(event):
                if self._is_code_of_the_input(operand):
                    for source in self._sources(operand):
                        found.setdefault(id(source.value), (source, event, operand))
        inner = self._first_product()
        ordered = sorted(found.values(), key=lambda entry: entry[0].seq)
        used: dict[str, int] = defaultdict(int)
        return [self._describe(*entry, inner, used) for entry in ordered]

    def _operands(self, event: Event) -> list[Sighting]:
        if event.name in _CONVOLUTIONS or event.name == "linear":
            return [s for s in event.arguments if s.site.path in ((0, 0), (1, "input"))]
        return event.arguments if event.name in _PRODUCTS else []

    def _is_code_of_the_input(self, sighting: Sighting) -> bool:
        """Two-valued on both random inputs, and different on them: not a weight, not a coincidence."""
        again = self.again.get(sighting.site)
        if again is None or self._pattern(sighting) is None or codes(again.value) is None:
            return False
        if self.first.batch != self.second.batch:
            return sighting.value.shape != again.value.shape
        return not same(sighting.value, again.value)

    def _first_product(self) -> int:
        """When the first trained product or lookup happened: what is binarized before is the network's input."""
        for event in self.first.events:
            mixes = event.name in _CONVOLUTIONS or event.name in _PRODUCTS | _LOOKUPS | {"linear"}
            if mixes and any(result.tensor.requires_grad for result in event.results):
                return event.seq
        return len(self.first.sightings)

    # -- 2. source -----------------------------------------------------------------------------------------------

    def _sources(self, operand: Sighting) -> list[Sighting]:
        """The source of the operand, or those of its parts where it joins what several modules binarized."""
        source = self._source(operand)
        parts = self._parts(source)
        births = [self._birth(part) for part in parts]
        if len({(b.module, b.call) for b in births if b}) > 1:
            return [s for part in parts for s in self._sources(part)]
        return [source]

    def _parts(self, source: Sighting) -> list[Sighting]:
        """The binary tensors that a join put together, none for any other tensor."""
        event = self._producer(source)
        if event is None or event.name not in _JOINS:
            return []
        return [self._source(a) for a in event.arguments if self._pattern(a) is not None]

    def _source(self, operand: Sighting) -> Sighting:
        """The earliest tensor with the operand's codes that is in the graph on the way to the operand."""
        current = operand
        while True:
            event = self._producer(current)
            if event is None or (event.name in _JOINS and len(event.arguments) > 1):
                break
            before = [a for a in event.arguments if a.in_graph or not current.in_graph]
            before = [a for a in before if self._pattern(a) is not None]
            # An in-place function's argument is the tensor that it returns: the codes before it are another value.
            before = [a for a in before if a.seq < current.seq and a.value is not current.value]
            if not before:
                break
            current = before[0]
        sightings = [s for s in self.by_tensor[id(current.tensor)] if s.value is current.value]
        return sightings[0]

    def _producer(self, sighting: Sighting) -> Event | None:
        """The function call that returned this tensor with this value."""
        results = [
            s
            for s in self.by_tensor[id(sighting.tensor)]
            if s.site.kind == "result" and s.value is sighting.value and s.seq <= sighting.seq
        ]
        return results[0].event if results else None

    # -- 3. birth and latent -------------------------------------------------------------------------------------

    def _note_birth(self, event: Event, result: Sighting) -> None:
        if _quickly_many_valued(result.value) or result.value.numel() < _SMALLEST_GROUP:
            return
        size = result.value.numel()
        candidates = [a for a in event.arguments if a.value.numel() == size and a.value is not result.value]
        if not candidates or any(self._pattern(a) is not None for a in candidates):
            return
        pattern = self._pattern(result)
        if pattern is not None:
            self.births[_key(pattern)].append((event, result))

    def _birth(self, source: Sighting) -> Event | None:
        """The call that made the source's codes: the first one in the scope of the last one before the source."""
        pattern = self._pattern(source)
        assert pattern is not None
        events = [event for event, result in self.births.get(_key(pattern), ()) if result.seq <= source.seq]
        events = [e for e in events if e.name not in _SUMS] or events
        if not events:
            parts = self._parts(source)
            return self._birth(parts[0]) if parts else None
        last = events[-1]
        return next(e for e in events if (e.module, e.call) == (last.module, last.call))

    def _latent(self, source: Sighting, birth: Event | None) -> list[Sighting]:
        """Sightings of a_F in the graph, empty where there is none."""
        if birth is not None:
            size = birth.results[0].value.numel()
            given = [a for a in birth.arguments if a.value.numel() == size and a.value.is_floating_point()]
            for sighting in sorted(given, key=lambda s: not self._in_graph(s, source)):
                for ancestor in self._ancestors(sighting):
                    if found := self._in_graph(ancestor, source):
                        return found
        return self._separable(source)

    def _in_graph(self, sighting: Sighting, source: Sighting) -> list[Sighting]:
        """Where the same values pass in the graph, the same tensor first."""
        found = [s for s in self.by_tensor[id(sighting.tensor)] if s.value is sighting.value and s.in_graph]
        if not found:
            twins = self.by_value[self._fingerprint(sighting.value)]
            twins = [s for s in twins if s.in_graph and s.value.numel() == sighting.value.numel()]
            found = [s for s in twins if same(s.value.flatten(), sighting.value.flatten())]
            found = [s for s in found if s.tensor is found[-1].tensor]
        return [s for s in found if s.seq <= source.seq or s.tensor is sighting.tensor]

    def _ancestors(self, sighting: Sighting) -> list[Sighting]:
        """The sighting and what it was computed from, element by element, within a custom function's forward."""
        line = [sighting]
        while len(line) < 8:
            event = self._producer(line[-1])
            size = line[-1].value.numel()
            parents = [a for a in event.arguments if a.value.numel() == size] if event else []
            parents = [a for a in parents if a.value is not line[-1].value and a.value.is_floating_point()]
            if not parents:
                break
            line.append(parents[0])
        return line

    def _separable(self, source: Sighting) -> list[Sighting]:
        """The last tensor before the source that one threshold splits into its codes."""
        pattern = self._pattern(source)
        assert pattern is not None
        positive = pattern.flatten() > 0
        for s in reversed(self.first.sightings[: source.seq]):
            if not s.in_graph or s.value.numel() != positive.numel() or not s.value.is_floating_point():
                continue
            above, below = s.value.flatten()[positive], s.value.flatten()[~positive]
            if not len(above) or not len(below) or self._pattern(s) is not None:
                continue
            if above.min() > below.max() or below.min() > above.max():
                return self._in_graph(s, source)
        return []

    # -- 4. sites ------------------------------------------------------------------------------------------------

    def _describe(
        self, source: Sighting, consumer: Event, operand: Sighting, inner: int, used: dict[str, int]
    ) -> BinaryActivation:
        birth = self._birth(source)
        module = birth.module if birth else source.site.module
        label = module or "(model)"

        def untapped(reason: str) -> BinaryActivation:
            return BinaryActivation(label, 0, reason, module)

        if source.seq < inner:
            return untapped("it is the network's input that is binarized, not an activation")
        sites = [s for s in self.by_tensor[id(source.tensor)] if s.value is source.value and s.in_graph]
        if not sites:
            return untapped("it is made without a gradient (under no_grad or detached)")
        pattern = self._pattern(source)
        assert pattern is not None
        if _one_hot(source.value):
            return untapped("it is one-hot: a choice, not a code")
        latents = self._latent(source, birth)
        if not latents:
            return untapped("no tensor in the graph was found that it is the sign of")
        binary = min(sites, key=lambda s: self._cost(s, module))
        latent = min(latents, key=lambda s: self._cost(s, module))
        layouts = self._layouts(binary, latent, consumer, operand)
        if isinstance(layouts, str):
            return untapped(layouts)
        b, f = layouts
        used[module] += 1
        return BinaryActivation(
            label if used[module] == 1 else f"{label}#{used[module]}",
            b.channels(binary.value.shape),
            None,
            module,
            binary.site,
            latent.site,
            b,
            f,
            f.channels(latent.value.shape),
            binary.value.shape[0] * b.positions(binary.value.shape)
            == latent.value.shape[0] * f.positions(latent.value.shape),
        )

    @staticmethod
    def _cost(sighting: Sighting, module: str) -> tuple[bool, bool, int]:
        """A plain hook before a function call within a forward, the module that binarizes before others."""
        site = sighting.site
        return site.kind in ("argument", "result"), site.module != module, sighting.seq

    def _layouts(
        self, binary: Sighting, latent: Sighting, consumer: Event, operand: Sighting
    ) -> tuple[Layout, Layout] | str:
        folds = []
        for side in (binary, latent):
            again = self.again.get(side.site)
            if again is None:
                return "its forward took another way on a second random input"
            rows, rows_again = side.value.shape[0], again.value.shape[0]
            fold, rest = divmod(rows, self.first.batch)
            if rest or fold * self.second.batch != rows_again:
                shapes = f"{tuple(side.value.shape)} at batch {self.first.batch}"
                return f"the batch is not its first dimension, or is mixed with another: {shapes}"
            folds.append(fold)
        spatial = _spatial_dims(binary.value.shape, consumer, operand.value.shape)
        b = Layout(spatial, folds[0])
        same_rank = binary.value.ndim == latent.value.ndim
        f = Layout(spatial if same_rank or spatial is not None else None, folds[1])
        if f.spatial is not None and f.spatial >= latent.value.ndim:
            return f"its latent has another rank: {tuple(latent.value.shape)} for {tuple(binary.value.shape)}"
        return b, f

    # -- values --------------------------------------------------------------------------------------------------

    def _pattern(self, sighting: Sighting) -> Tensor | None:
        key = id(sighting.value)
        if key not in self._codes:
            self._codes[key] = codes(sighting.value)
        return self._codes[key]

    @staticmethod
    def _fingerprint(value: Tensor) -> tuple[int, tuple[float, ...]]:
        flat = value.flatten()
        return len(flat), tuple(flat[:: max(1, len(flat) // 32)][:32].tolist())


def _spatial_dims(shape: torch.Size, consumer: Event, operand: torch.Size) -> int | None:
    """:attr:`Layout.spatial` of the binary tensor, from what consumes it."""
    if consumer.name in _CONVOLUTIONS:
        spatial = _CONVOLUTIONS[consumer.name]
        # Tokens (B, N, C) that a permutation turns into a map: the channels are still last here.
        if len(shape) < 2 + spatial or (
            operand[1] == shape[-1] and operand[1] != shape[1] and len(shape) <= len(operand)
        ):
            return None
        return spatial
    if len(shape) >= 3 and operand[-1] == shape[1:].numel() and len(operand) == 2:
        return len(shape) - 2
    return None


def _one_hot(value: Tensor) -> bool:
    """Zero but for a single one along some dimension."""
    if not bool(((value.abs() < 1e-4) | ((value - 1).abs() < 1e-4)).all()):
        return False
    return any(value.shape[d] > 1 and bool((value.sum(d) - 1).abs().lt(1e-3).all()) for d in range(1, value.ndim))
