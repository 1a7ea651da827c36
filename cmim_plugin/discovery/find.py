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
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from .layout import Layout
from .trace import Event, Sample, Sighting, Site, Trace, same, watch

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
# An operand of at most so many values among so many elements is listed as quantized to more than one bit.
_FEW, _FEW_AMONG = 16, 256


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
        binary, latent: where a_B and a_F are picked up.
        binary_layout, latent_layout, latent_channels: how they are read.
        aligned: whether both have the same number of positions.
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
    return _Analysis(*watch(model, example_input)).run()


def codes(value: Sample) -> Tensor | None:
    """The pattern of a two-valued tensor: -1 and +1, 0 for zeros between symmetric codes; None if it has more values.

    The two values may differ by sample, by channel (dimension 1 or the last) or by (sample, channel). Zeros between
    ``-a`` and ``a`` come from dropout, padding or ``sign(0)``.

    Returns:
        int8, ``(n,)`` for the ``n`` values of the sample; groups of one value count as its sign.
    """
    if value.dtype == torch.bool:
        both = bool(value.values.any()) and not bool(value.values.all())
        return value.values.to(torch.int8) * 2 - 1 if both else None
    last = len(value.shape) - 1
    for shared in ((), (0,), (1,), (last,), (0, 1)):
        if len(value.values) >= _SMALLEST_GROUP and all(0 <= d <= last for d in shared) and len(shared) <= last:
            pattern = _codes_by_group(value, shared)
            if pattern is not None:
                return pattern
    return None


def _codes_by_group(value: Sample, shared: tuple[int, ...]) -> Tensor | None:
    """:func:`codes` where elements with the same index in the dimensions ``shared`` have the same two values."""
    x = value.values if value.dtype == torch.float64 else value.values.float()
    tolerance = _TOLERANCE.get(value.dtype, _DEFAULT_TOLERANCE)
    group = torch.zeros_like(value.index)
    groups = 1
    for d in shared:
        group = group * value.shape[d] + value.index // value.shape[d + 1 :].numel() % value.shape[d]
        groups *= value.shape[d]
    # Most tensors are told by one group, without the work for all of them.
    one = x[group == group[0]] if shared else x
    low, high = one.aminmax()
    noise = tolerance * torch.maximum(low.abs(), high.abs())
    if bool((((one - low).abs() > noise) & ((one - high).abs() > noise) & (one.abs() > noise)).any()):
        return None
    counts = torch.bincount(group, minlength=groups)
    if counts[counts > 0].min() < _SMALLEST_GROUP:
        return None
    low = x.new_full((groups,), float("inf")).scatter_reduce(0, group, x, "amin")
    high = x.new_full((groups,), -float("inf")).scatter_reduce(0, group, x, "amax")
    noise = tolerance * torch.maximum(low.abs(), high.abs())
    two = (high - low > 10 * noise)[counts > 0].float().mean()
    low, high, noise = low[group], high[group], noise[group]
    is_low, is_high = (x - low).abs() <= noise, (x - high).abs() <= noise
    is_zero = ((low + high).abs() <= 2 * noise) & (x.abs() <= noise)
    # NaN compares false, and so is never a code.
    if two < 0.125 or not bool((is_low | is_high | is_zero).all()):
        return None
    pattern = torch.where(is_high, 1, -1).masked_fill(is_zero, 0)
    return torch.where(high - low > 10 * noise, pattern, x.sign()).to(torch.int8)


def _quickly_many_valued(value: Sample) -> bool:
    """More than a few distinct values among the first ones: true of almost every tensor, and cheap."""
    return value.values[:64].unique().numel() > 6


def _key(value: Sample, pattern: Tensor) -> tuple[int, int]:
    """Equal for equal patterns of any shape, also where the two codes changed places."""
    nonzero = pattern[pattern != 0]
    if len(nonzero) and nonzero[0] < 0:
        pattern = -pattern
    return value.numel, int((pattern.cpu() * _weights(len(pattern))).sum())


@lru_cache(maxsize=64)
def _weights(count: int) -> Tensor:
    return torch.randint(2**62, (count,), generator=torch.Generator().manual_seed(0), device="cpu")


class _Analysis:
    def __init__(self, first: Trace, second: Trace) -> None:
        self.first = first
        self.second = second
        self.again = {s.site: s for s in second.sightings}
        self.by_tensor: dict[int, list[Sighting]] = defaultdict(list)
        self.by_value: dict[tuple[int, tuple[float, ...]], list[Sighting]] = defaultdict(list)
        self._codes: dict[int, Tensor | None] = {}
        for sighting in first.sightings:
            self.by_tensor[sighting.tensor].append(sighting)
            self.by_value[self._fingerprint(sighting.value)].append(sighting)
        self.births: dict[tuple[int, int], list[tuple[Event, Sighting]]] = defaultdict(list)
        for event in first.events:
            for result in event.results:
                self._note_birth(event, result)

    # -- 1. operands ---------------------------------------------------------------------------------------------

    def run(self) -> list[BinaryActivation]:
        found: dict[int, tuple[Sighting, list[Sighting], Event, Sighting]] = {}
        for event in self.first.events:
            for operand in self._operands(event):
                if self._is_code(operand):
                    for source in self._sources(operand):
                        if id(source.value) in found:
                            continue
                        latents = self._latent(source, self._birth(source))
                        # The latent decides: codes may be the same on both inputs by chance, and a dropped or
                        # stochastically binarized constant is another one each time.
                        if any(self._varies(s) for s in latents or [operand]):
                            found[id(source.value)] = source, latents, event, operand
        inner = self._first_product()
        ordered = sorted(found.values(), key=lambda entry: entry[0].seq)
        used: dict[str, int] = defaultdict(int)
        return [self._describe(*entry, inner, used) for entry in ordered] + self._nearly()

    def _nearly(self) -> list[BinaryActivation]:
        """Operands of a few values, more than two: what a quantizer of more bits, or a mean of codes, leaves."""
        nearly = {}
        for event in self.first.events:
            for operand in self._operands(event):
                values = operand.value.values[:_FEW_AMONG].unique().numel()
                few = 2 < values <= _FEW and len(operand.value.values) >= _FEW_AMONG
                if few and operand.in_graph and self._pattern(operand) is None and self._varies(operand):
                    reason = f"a {event.name} receives {values} values, not two"
                    nearly[id(operand.value)] = BinaryActivation(event.module or "(model)", 0, reason, event.module)
        return list(nearly.values())

    def _operands(self, event: Event) -> list[Sighting]:
        if event.name in _CONVOLUTIONS or event.name == "linear":
            # The first tensor of it where the input is a tuple: a value with its scale (brevitas).
            return [s for s in event.arguments if s.site.path[:2] in ((0, 0), (1, "input"))][:1]
        return event.arguments if event.name in _PRODUCTS else []

    def _is_code(self, sighting: Sighting) -> bool:
        """Two-valued on both random inputs: not a coincidence."""
        again = self.again.get(sighting.site)
        return again is not None and self._pattern(sighting) is not None and codes(again.value) is not None

    def _varies(self, sighting: Sighting) -> bool:
        """Different on the two random inputs: not a weight, a mask or a learned token."""
        again = self.again.get(sighting.site)
        if again is None or again.value.shape[1:] != sighting.value.shape[1:]:
            return True
        # The two batches may differ in size: the samples that both have.
        one, other = sighting.value, again.value
        shared = torch.isin(one.index, other.index), torch.isin(other.index, one.index)
        return not same(one.values[shared[0]], other.values[shared[1]])

    def _first_product(self) -> int:
        """When the first trained product or lookup happened: what is binarized before is the network's input."""
        for event in self.first.events:
            mixes = event.name in _CONVOLUTIONS or event.name in _PRODUCTS | _LOOKUPS | {"linear"}
            if mixes and any(result.in_graph for result in event.results):
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
        sightings = [s for s in self.by_tensor[current.tensor] if s.value is current.value]
        return sightings[0]

    def _producer(self, sighting: Sighting) -> Event | None:
        """The function call that returned this tensor with this value."""
        results = [
            s
            for s in self.by_tensor[sighting.tensor]
            if s.site.kind == "result" and s.value is sighting.value and s.seq <= sighting.seq
        ]
        return self.first.events[results[0].event] if results and results[0].event is not None else None

    # -- 3. birth and latent -------------------------------------------------------------------------------------

    def _note_birth(self, event: Event, result: Sighting) -> None:
        if _quickly_many_valued(result.value) or result.value.numel < _SMALLEST_GROUP:
            return
        size = result.value.numel
        candidates = [a for a in event.arguments if a.value.numel == size and a.value is not result.value]
        if not candidates or any(self._pattern(a) is not None for a in candidates):
            return
        pattern = self._pattern(result)
        if pattern is not None:
            self.births[_key(result.value, pattern)].append((event, result))

    def _birth(self, source: Sighting) -> Event | None:
        """The call that made the source's codes: the first one in the scope of the last one before the source."""
        pattern = self._pattern(source)
        assert pattern is not None
        events = [
            event for event, result in self.births.get(_key(source.value, pattern), ()) if result.seq <= source.seq
        ]
        events = [e for e in events if e.name not in _SUMS] or events
        if not events:
            parts = self._parts(source)
            return self._birth(parts[0]) if parts else None
        last = events[-1]
        return next(e for e in events if (e.module, e.call) == (last.module, last.call))

    def _latent(self, source: Sighting, birth: Event | None) -> list[Sighting]:
        """Sightings of a_F in the graph, empty where there is none."""
        if birth is not None:
            size = birth.results[0].value.numel
            given = [a for a in birth.arguments if a.value.numel == size and a.value.dtype.is_floating_point]
            for sighting in sorted(given, key=lambda s: not self._in_graph(s, source)):
                for ancestor in self._ancestors(sighting):
                    if found := self._in_graph(ancestor, source):
                        return found
        return self._separable(source)

    def _in_graph(self, sighting: Sighting, source: Sighting) -> list[Sighting]:
        """Where the same values pass in the graph, the same tensor first."""
        found = [s for s in self.by_tensor[sighting.tensor] if s.value is sighting.value and s.in_graph]
        if not found:
            twins = self.by_value[self._fingerprint(sighting.value)]
            found = [s for s in twins if s.in_graph and s.value.same(sighting.value)]
            found = [s for s in found if s.tensor == found[-1].tensor]
        return [s for s in found if s.seq <= source.seq or s.tensor == sighting.tensor]

    def _ancestors(self, sighting: Sighting) -> list[Sighting]:
        """The sighting and what it was computed from, element by element, within a custom function's forward."""
        line = [sighting]
        while len(line) < 8:
            event = self._producer(line[-1])
            size = line[-1].value.numel
            parents = [a for a in event.arguments if a.value.numel == size] if event else []
            parents = [a for a in parents if a.value is not line[-1].value and a.value.dtype.is_floating_point]
            if not parents:
                break
            line.append(parents[0])
        return line

    def _separable(self, source: Sighting) -> list[Sighting]:
        """The last tensor before the source that one threshold splits into its codes."""
        pattern = self._pattern(source)
        assert pattern is not None
        positive = pattern > 0
        for s in reversed(self.first.sightings[: source.seq]):
            if not s.in_graph or s.value.numel != source.value.numel or not s.value.dtype.is_floating_point:
                continue
            above, below = s.value.values[positive], s.value.values[~positive]
            if not len(above) or not len(below) or self._pattern(s) is not None:
                continue
            if above.min() > below.max() or below.min() > above.max():
                return self._in_graph(s, source)
        return []

    # -- 4. sites ------------------------------------------------------------------------------------------------

    def _describe(
        self,
        source: Sighting,
        latents: list[Sighting],
        consumer: Event,
        operand: Sighting,
        inner: int,
        used: dict[str, int],
    ) -> BinaryActivation:
        birth = self._birth(source)
        module = birth.module if birth else source.site.module
        label = module or "(model)"

        def untapped(reason: str) -> BinaryActivation:
            return BinaryActivation(label, 0, reason, module)

        if source.seq < inner:
            return untapped("it is the network's input that is binarized, not an activation")
        sites = [s for s in self.by_tensor[source.tensor] if s.value is source.value and s.in_graph]
        if not sites:
            return untapped("it is made without a gradient (under no_grad or detached)")
        pattern = self._pattern(source)
        assert pattern is not None
        if _one_hot(source.value):
            return untapped("it is one-hot: a choice, not a code")
        if not latents:
            return untapped("no tensor in the graph was found that it is the sign of")
        zero = pattern == 0
        if latents[0].value.numel == source.value.numel and bool(latents[0].value.values[zero].any()):
            return untapped("it has three values: its zeros are not only signs of zero")
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
            b.positions(binary.value.shape) == f.positions(latent.value.shape),
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
        spatial = _spatial_dims(binary.value.shape, consumer, operand)
        b = Layout(spatial, folds[0] > 1)
        same_rank = len(binary.value.shape) == len(latent.value.shape)
        f = Layout(spatial if same_rank or spatial is not None else None, folds[1] > 1)
        if f.spatial is not None and f.spatial >= len(latent.value.shape):
            return f"its latent has another rank: {tuple(latent.value.shape)} for {tuple(binary.value.shape)}"
        return b, f

    # -- values --------------------------------------------------------------------------------------------------

    def _pattern(self, sighting: Sighting) -> Tensor | None:
        key = id(sighting.value)
        if key not in self._codes:
            self._codes[key] = codes(sighting.value)
        return self._codes[key]

    @staticmethod
    def _fingerprint(value: Sample) -> tuple[int, tuple[float, ...]]:
        values = value.values
        return value.numel, tuple(values[:: max(1, len(values) // 32)][:32].tolist())


def _spatial_dims(shape: torch.Size, consumer: Event, operand: Sighting) -> int | None:
    """:attr:`Layout.spatial` of a binary tensor of this shape, from how its consumer contracts it.

    The channels are the dimension that is contracted with a weight: the last, or the first after the batch.
    """
    received = operand.value.shape
    if consumer.name in _CONVOLUTIONS:
        # Tokens (B, N, C) that a permutation turns into a map have their channels last before it.
        tokens = received[1] == shape[-1] != shape[1] and len(shape) <= len(received)
        return None if tokens or len(shape) < 2 + _CONVOLUTIONS[consumer.name] else _CONVOLUTIONS[consumer.name]
    if len(shape) < 3:
        return None
    if consumer.name == "linear":
        contracted = {received[-1]}
    elif any(a is not operand and a.in_graph and a.value.shape[0] == received[0] for a in consumer.arguments):
        # Two activations, as in attention: the features of a token are last.
        return None
    elif consumer.name in ("matmul", "__matmul__", "bmm", "mm", "__rmatmul__"):
        contracted = {received[-1] if operand.site.path == (0, 0) else received[-2]}
    else:
        contracted = {n for other in consumer.shapes if other != received for n in other}
    if shape[-1] in contracted:
        return None
    # The channels themselves, with the kernel's places (unfold), or with all positions (flatten).
    first = shape[1] in contracted or any(n % shape[1] == 0 for n in contracted)
    return len(shape) - 2 if first else None


def _one_hot(value: Sample) -> bool:
    """Zero but for a single one along some dimension (not looked for in tensors too large to be gates)."""
    if len(value.values) < value.numel:
        return False
    x = value.values.view(value.shape)
    if not bool(((x.abs() < 1e-4) | ((x - 1).abs() < 1e-4)).all()):
        return False
    return any(x.shape[d] > 1 and bool((x.sum(d) - 1).abs().lt(1e-3).all()) for d in range(1, x.ndim))
