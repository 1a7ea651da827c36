"""Find every binary activation of a model, the latent that it was made from, and where to pick both up in training.

From some traces of the model (:mod:`cmim_plugin.discovery.trace`), in the order of the code below:

1. *Operands*: convolutions and matrix products that receive a two-valued tensor, or a sum of such tensors.
2. *Source*: follow an operand back through padding, reshaping, dropout and scaling to the first tensor in the
   autograd graph that holds its two values. That is a_B: its gradient is the user's own straight-through estimator.
3. *The call that binarizes*: the function call that made these values out of something continuous (``sign``, a
   comparison, ``round``). What it was given is a_F; the module whose forward it is in names the tap. One threshold
   must split a_F into a_B.
4. *Sites*: the cheapest place where each of the two passes in training: a module's input or output if there is one.
"""

from __future__ import annotations

from collections import defaultdict
from dataclasses import dataclass, replace
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from .codes import SMALLEST_GROUP, is_split_by_threshold
from .inputs import BatchSource
from .layout import Layout
from .trace import FEW_LEVELS, RANDOM, Event, Sighting, Site, Snapshot, Trace, dry_run

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
_SUMS = frozenset(f"{op}{end}" for op in ("add", "sub", "rsub") for end in ("", "_")) | {
    f"__{side}{op}__" for op in ("add", "sub") for side in ("", "r", "i")
}
_REDUCTIONS = frozenset({"sum", "mean"})
_SCALINGS = frozenset(
    {"mul", "mul_", "multiply", "div", "div_", "divide", "true_divide", "__mul__", "__rmul__", "__imul__"}
) | {"__truediv__", "__itruediv__", "__div__"}
_JOINS = frozenset({"cat", "concat", "concatenate", "stack", "hstack", "vstack"})
# The values of the first argument, in another order, type or shape, repeated or with zeros among them.
_MOVES = (
    frozenset(
        {
            "view",
            "view_as",
            "reshape",
            "reshape_as",
            "flatten",
            "unflatten",
            "squeeze",
            "unsqueeze",
            "permute",
            "transpose",
        }
    )
    | frozenset(
        {
            "contiguous",
            "clone",
            "to",
            "type_as",
            "type",
            "float",
            "half",
            "bfloat16",
            "double",
            "dropout",
            "pad",
            "unfold",
        }
    )
    | {"__getitem__", "chunk", "split", "unbind", "t", "T", "mT", "swapaxes", "movedim", "expand", "expand_as", "roll"}
)
_DETACHES = frozenset({"detach", "data"})
# Calls that make few values of many, whatever they are given.
_STEPS = frozenset({"sign", "sign_", "sgn", "heaviside", "round", "round_", "floor", "ceil", "trunc", "where"}) | {
    name for op in ("gt", "ge", "lt", "le") for name in (op, f"__{op}__", f"{op}_")
}
_STEPS |= {"greater", "greater_equal", "less", "less_equal", "signbit", "bernoulli", "bool"}
# Smooth functions of all values of a group: with two values in a group, their result is two-valued, too.
_NORMS = frozenset({"batch_norm", "instance_norm", "layer_norm", "group_norm", "normalize", "softmax"})
# An operand of at most a few values among so many elements is listed as quantized to more than one bit.
_FEW_AMONG = 256
_RECURRENT = frozenset({"gru", "lstm", "rnn_tanh", "rnn_relu", "multi_head_attention_forward"})
# How far equal samples are apart at most, in distances between different ones.
_EQUAL, _ALIKE = 0.02, 0.85
# Calls that are followed back at most.
_DEPTH = 12


@dataclass(frozen=True)
class BinaryActivation:
    """One distinct binary activation tensor of a model's forward pass.

    Attributes:
        name: qualified name of the innermost module in whose forward the binarization happens ("(model)" for the
            model itself). Where several happen in one module, ": child" is appended, for the child module whose output
            is binarized. "#2", "#3", ... tell apart what this does not: further calls of a shared module.
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


@dataclass(frozen=True)
class Discovery:
    """What a dry run found.

    Attributes:
        found: the binary activations, in forward order.
        batch: where the number of samples is read off the model's inputs in training; None where the user stated it
            and no input has that size.
    """

    found: tuple[BinaryActivation, ...]
    batch: BatchSource | None


def discover(model: nn.Module, example_input: Any, batch_size: int | None = None) -> Discovery:
    """Every binary activation of ``model``, and where the number of samples is read, without attaching anything.

    Args:
        model: any module. It is run a few times in training mode, first on the example, then on inputs like it, and
            left exactly as it was (see :func:`~cmim_plugin.discovery.trace.preserve_state` for what that covers).
        example_input: a tensor, a tuple of positional inputs or a dict of keyword inputs. Dense floating-point tensors
            of it are varied; all else is given to the model as it is.
        batch_size: the number of samples in the example, where its inputs do not tell.

    Raises:
        CMIMError: the example is of another type, the forward fails on it, the number of samples is not clear, or no
            parameter of the model requires a gradient.
    """
    traces, source = dry_run(model, example_input, batch_size)
    found: list[_Found] = []
    order = {name: i for i, (name, _) in enumerate(model.named_modules())}
    for trace in traces[:1] + [t for t in traces[1:] if t.calls != traces[0].calls]:
        _merge(order, found, _Analysis(trace, [other for other in traces if other is not trace]).run())
    return Discovery(tuple(_named(found)), source)


def find_binary_activations(
    model: nn.Module, example_input: Any, *, batch_size: int | None = None
) -> list[BinaryActivation]:
    """Every binary activation of ``model``, in forward order, tappable or not: see :func:`discover`."""
    return list(discover(model, example_input, batch_size).found)


@dataclass
class _Found:
    """A binary activation before it gets its final name.

    Attributes:
        activation: named after its module alone.
        place: what tells it from the others in all traces.
        hint: the child module whose output is binarized, "" where there is none.
    """

    activation: BinaryActivation
    place: tuple[Any, ...]
    hint: str = ""


def _merge(order: dict[str, int], found: list[_Found], more: list[_Found]) -> None:
    """Insert what another pass showed between its neighbours there, in the order of the modules."""
    at = 0
    for i, f in enumerate(more):
        places = [g.place for g in found]
        if f.place in places:
            at = places.index(f.place) + 1
            if f.activation.tapped and not found[at - 1].activation.tapped:
                found[at - 1] = f
            continue
        end = next((places.index(g.place) for g in more[i:] if g.place in places[at:]), len(found))
        while at < end and order.get(found[at].activation.module, 0) < order.get(f.activation.module, 0):
            at += 1
        found.insert(at, f)
        at += 1


def _named(found: list[_Found]) -> list[BinaryActivation]:
    tapped = [f for f in found if f.activation.tapped]
    modules = {f.activation.module for f in tapped}
    # Without a gradient in one call of a module, with one in another: nothing is missed.
    rest = [f for f in found if not f.activation.tapped]
    rest = [f for f in rest if not (f.activation.module in modules and f.activation.reason == _NO_GRADIENT)]
    used: dict[str, int] = defaultdict(int)
    names = {}
    for f in [*tapped, *rest]:
        several = sum(g.activation.module == f.activation.module for g in tapped) > 1
        name = f.activation.module or "(model)"
        if several and f.hint:
            name = f"{name}: {f.hint}"
        used[name] += 1
        names[id(f)] = name if used[name] == 1 else f"{name}#{used[name]}"
    return [replace(f.activation, name=names[id(f)]) for f in found if id(f) in names]


_NO_GRADIENT = "it is made without a gradient (under no_grad or detached)"
_FROZEN = "everything before it is frozen: no gradient reaches it"
_NO_LATENT = "no tensor in the graph was found that it is the sign of"
_ONE_VALUE = "it held one value only in the dry run, and the call that binarizes is not known: a dead sign"


class _Analysis:
    """What one trace shows, checked against the others."""

    def __init__(self, trace: Trace, others: list[Trace]) -> None:
        self.trace = trace
        self.again: dict[Site, list[Sighting]] = defaultdict(list)
        for other in others:
            for s in other.sightings:
                self.again[s.site].append(s)
        self.by_tensor: dict[int, list[Sighting]] = defaultdict(list)
        self.by_value: dict[tuple[int, tuple[float, ...]], list[Sighting]] = defaultdict(list)
        self.by_size: dict[int, list[Sighting]] = defaultdict(list)
        self._fingerprints: dict[int, tuple[int, tuple[float, ...]]] = {}
        # Codes that came down through a scale of their own for each token or pixel, by the snapshot's identity.
        self._patterns: dict[int, Tensor] = {}
        self.binarizing: dict[tuple[int, int], list[tuple[Event, Sighting]]] = defaultdict(list)
        self.outputs: dict[int, list[Sighting]] = defaultdict(list)
        self.entered: dict[tuple[str, int], int] = {}
        for sighting in trace.sightings:
            self.by_tensor[sighting.tensor].append(sighting)
            self.by_value[self._fingerprint(sighting.value)].append(sighting)
            if sighting.in_graph and sighting.value.dtype.is_floating_point:
                self.by_size[sighting.value.numel].append(sighting)
            if sighting.site.kind == "output":
                self.outputs[sighting.tensor].append(sighting)
            self.entered.setdefault((sighting.site.module, sighting.site.call), sighting.seq)
        for event in trace.events:
            self._inherit(event)
            for result in event.results:
                self._note_binarizing(event, result)
        self.inner = self._first_product()
        self.mixed = min((_first_mixing(other) for other in others), default=len(trace.sightings))

    # -- 1. operands ---------------------------------------------------------------------------------------------

    def run(self) -> list[_Found]:
        found: dict[int, tuple[int, _Found]] = {}
        taken: list[tuple[Sighting, tuple[int, int]]] = []
        for event in self.trace.events:
            for operand in self._operands(event):
                for source, call, latents in self._binarizations(operand):
                    if id(source.value) in found:
                        continue
                    if not any(s.from_input for s in latents or [operand]):
                        continue  # a weight, a mask or a learned token
                    described = self._describe(source, call, latents, event, operand)
                    pattern = self._pattern(source)
                    if described.activation.tapped and pattern is not None:
                        key = _key(source.value, pattern)
                        if any(key == other and latents[0].value.same(s.value) for s, other in taken):
                            continue  # query, key and value binarize one latent to the same codes
                        taken.append((latents[0], key))
                    found[id(source.value)] = source.seq, described
        ordered = [f for _, f in sorted(found.values(), key=lambda entry: entry[0])]
        return ordered + self._quantized({f.activation.module for f in ordered})

    def _binarizations(self, operand: Sighting) -> list[tuple[Sighting, Event | None, list[Sighting]]]:
        """The binary tensors that an operand is made of: each with the call that binarizes and its latents."""
        found = []
        for part in self._terms(operand):
            for source in self._sources(part):
                call, producer = self._call(source), self._producer(source)
                if call is None and producer is not None and producer.name in _NORMS:
                    continue  # two samples normalized: exactly -1 and 1
                found.append((source, call, self._latents(source, call)))
        if not found and operand.value.constant and operand.from_input and operand.requires_grad:
            call, given = self._step(operand)
            source = self._earliest(operand, lambda s: s.value.constant)
            latents = [s for g in given for a in self._ancestors(g) for s in self._in_graph(a, source)]
            found.append((source, call, latents))
        return found

    def _quantized(self, known: set[str]) -> list[_Found]:
        """Operands of a few values, more than two: what a quantizer of more bits, or a mean of codes, leaves."""
        found: dict[int, _Found] = {}
        for event in self.trace.events:
            for operand in self._operands(event):
                levels = operand.value.levels
                few = 2 < levels <= FEW_LEVELS and operand.value.numel >= _FEW_AMONG
                if few and operand.requires_grad and operand.from_input and not self._terms(operand):
                    reason = f"a {event.name} receives {levels} values, not two"
                    activation = BinaryActivation("", 0, reason, event.module)
                    found[id(operand.value)] = _Found(activation, ("quantized", operand.site))
        return list(found.values())

    def _operands(self, event: Event) -> list[Sighting]:
        if event.name in _CONVOLUTIONS or event.name == "linear":
            # The first tensor of it where the input is a tuple: a value with its scale (brevitas).
            return [s for s in event.arguments if s.site.path[:2] in ((0, 0), (1, "input"))][:1]
        return event.arguments if event.name in _PRODUCTS else []

    def _is_code(self, sighting: Sighting) -> bool:
        """Two-valued in all passes: not a coincidence. A sign may be constant in some of them."""
        again = self.again.get(sighting.site, ())
        return self._pattern(sighting) is not None and all(
            s.value.pattern is not None or s.value.constant or id(sighting.value) in self._patterns for s in again
        )

    def _terms(self, operand: Sighting, depth: int = 0) -> list[Sighting]:
        """The binary tensors that an operand is the sum of; itself if it is binary; none otherwise."""
        if self._is_code(operand):
            return [operand]
        event = self._producer(operand)
        if event is None or depth > _DEPTH or operand.value.constant:
            return []
        arguments = [a for a in event.arguments if a.seq < operand.seq and a.value is not operand.value]
        if event.name in _MOVES | _REDUCTIONS:
            return self._terms(arguments[0], depth + 1) if arguments else []
        if event.name in _SCALINGS:
            large = [a for a in arguments if a.distinct == operand.value.numel]
            small = all(8 * a.distinct <= operand.value.numel for a in arguments if a not in large)
            return self._terms(large[0], depth + 1) if len(large) == 1 and small else []
        if event.name not in _SUMS | _JOINS:
            return []
        terms = []
        for a in arguments:
            inner = self._terms(a, depth + 1)
            if not inner and a.requires_grad and a.distinct * 8 > operand.value.numel:
                return []  # a sum with something continuous
            terms += inner
        return terms

    def _first_product(self) -> int:
        """When the first trained product or lookup happened: what is binarized before is the network's input."""
        for event in self.trace.events:
            if event.weighted and (event.name in _CONVOLUTIONS or event.name in _PRODUCTS | _LOOKUPS | {"linear"}):
                return event.seq
        return len(self.trace.sightings)

    # -- 2. source -----------------------------------------------------------------------------------------------

    def _sources(self, operand: Sighting) -> list[Sighting]:
        """The source of a binary operand, or those of the parts where it joins or multiplies several."""
        current = operand
        for _ in range(8 * _DEPTH):
            event = self._producer(current)
            before = self._before(current)
            if event is not None and event.name in _JOINS and len(event.arguments) > 1:
                return [s for part in before if self._is_code(part) for s in self._sources(part)] or [current]
            if len({id(b.value) for b in before}) > 1 and event is not None and event.name in _SCALINGS:
                return [s for part in before for s in self._sources(part)]
            if not before:
                break
            current = before[0]
        return [self._same_value(current)[0]]

    def _before(self, current: Sighting) -> list[Sighting]:
        """The binary tensors in the graph that the call which returned this one was given."""
        event = self._producer(current)
        if event is None:
            return []
        before = [a for a in self._given(event, current) if self._pattern(a) is not None]
        # A scale of each sample has two values where there are two samples.
        return [a for a in before if a.distinct * 4 > a.value.numel] or before

    def _earliest(self, current: Sighting, like: Any) -> Sighting:
        """The earliest tensor in the graph on the way to this one of which ``like`` is true."""
        for _ in range(8 * _DEPTH):
            event = self._producer(current)
            given = self._given(event, current) if event else []
            before = [a for a in given if like(a) and a.value.numel > 1]
            if not before:
                break
            current = before[0]
        return self._same_value(current)[0]

    def _given(self, event: Event, result: Sighting) -> list[Sighting]:
        """The arguments of the call, those in the graph alone where its result is in the graph."""
        graph = self._is_in_graph(result)
        given = [a for a in event.arguments if not graph or self._is_in_graph(a)]
        # An in-place function's argument is the tensor that it returns: the codes before it are another value.
        return [a for a in given if a.seq < result.seq and a.value is not result.value]

    def _is_in_graph(self, sighting: Sighting) -> bool:
        """Also of a tensor seen within the forward of a custom autograd function, where gradients are disabled."""
        return any(s.in_graph for s in self._same_value(sighting))

    def _same_value(self, sighting: Sighting) -> list[Sighting]:
        return [s for s in self.by_tensor[sighting.tensor] if s.value is sighting.value]

    def _producer(self, sighting: Sighting) -> Event | None:
        """The function call that returned this tensor with this value."""
        for s in self.by_tensor[sighting.tensor]:
            if s.event is not None and s.value is sighting.value and s.seq <= sighting.seq:
                return self.trace.events[s.event]
        return None

    # -- 3. the call that binarizes, and the latent --------------------------------------------------------------

    def _inherit(self, event: Event) -> None:
        """Codes times a scale that many of them share are codes, however the scale is distributed over them."""
        if event.name not in _SCALINGS or len(event.arguments) != 2 or len(event.results) != 1:
            return
        (result,) = event.results
        for codes, scale in (event.arguments, event.arguments[::-1]):
            pattern = self._pattern(codes)
            shared = codes.value.shape == result.value.shape and 4 * scale.distinct <= codes.distinct
            if shared and pattern is not None and self._pattern(result) is None:
                self._patterns[id(result.value)] = pattern

    def _note_binarizing(self, event: Event, result: Sighting) -> None:
        pattern = self._pattern(result)
        if pattern is None or result.value.numel < SMALLEST_GROUP or event.name in _NORMS:
            return
        size = result.value.numel
        candidates = [a for a in event.arguments if a.value.numel == size and a.value is not result.value]
        if candidates and not any(self._pattern(a) is not None for a in candidates):
            self.binarizing[_key(result.value, pattern)].append((event, result))

    def _call(self, source: Sighting) -> Event | None:
        """The call that made the source's codes: the first one in the scope of the last one before the source."""
        pattern = self._pattern(source)
        if pattern is None:
            return None
        known = self.binarizing.get(_key(source.value, pattern), ())
        events = [event for event, result in known if result.seq <= source.seq]
        # Sums rebuild codes in the detach trick (`sign(x).detach() - f(x).detach() + f(x)`); they do not make them.
        events = [e for e in events if e.name not in _SUMS] or events
        if not events:
            return None
        last = events[-1]
        return next(e for e in events if (e.module, e.call) == (last.module, last.call))

    def _step(self, operand: Sighting) -> tuple[Event | None, list[Sighting]]:
        """The call that made a constant operand out of something that is not constant, and what it was given."""
        line = [operand]
        for at in range(4 * _DEPTH):
            if at == len(line):
                break
            sighting = line[at]
            event = self._producer(sighting)
            if event is None:
                continue
            size = sighting.value.numel
            inputs = [a for a in event.arguments if a.value.numel == size and a.value is not sighting.value]
            given = [a for a in inputs if a.value.dtype.is_floating_point and not a.value.constant]
            if event.name in _STEPS and given:
                return event, given
            line += [a for a in inputs if a.value.constant or event.name in _SUMS | _DETACHES]
        return None, []

    def _latents(self, source: Sighting, call: Event | None) -> list[Sighting]:
        """Sightings of a_F in the graph, empty where there is none."""
        if call is not None:
            size = call.results[0].value.numel
            given = [a for a in call.arguments if a.value.numel == size and a.value.dtype.is_floating_point]
            for sighting in sorted(given, key=lambda s: not self._in_graph(s, source)):
                for ancestor in self._ancestors(sighting):
                    if found := self._in_graph(ancestor, source):
                        return found
        return self._separable(source)

    def _in_graph(self, sighting: Sighting, source: Sighting) -> list[Sighting]:
        """Where the same values pass in the graph, the same tensor first."""
        found = [s for s in self._same_value(sighting) if s.in_graph]
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
        if pattern is None:
            return []
        positive = pattern > 0
        for s in reversed(self.by_size[source.value.numel]):
            if s.seq >= source.seq or self._pattern(s) is not None:
                continue
            above, below = s.value.values[positive], s.value.values[~positive]
            if len(above) and len(below) and (above.min() > below.max() or below.min() > above.max()):
                return self._in_graph(s, source)
        return []

    def _is_sign_of(self, source: Sighting, call: Event | None, latent: Sighting) -> bool:
        """Whether the codes tell where the latent is large, by one threshold; by chance, for a stochastic sign."""
        made = call.results[0] if call is not None else source
        for codes in (made, source):
            pattern = self._pattern(codes)
            if pattern is not None and codes.value.numel == latent.value.numel:
                if is_split_by_threshold(latent.value.values, pattern, latent.value.index, latent.value.shape):
                    return True
                drawn = any(
                    e.name in RANDOM and e.results and e.results[0].value.numel == latent.value.numel
                    for e in self.trace.events
                    if latent.seq <= e.seq <= source.seq
                )
                values = latent.value.values.float()
                high, low = values[pattern > 0], values[pattern < 0]
                if drawn and len(high) and len(low):
                    return bool((high.mean() - low.mean()).abs() > 0.1 * values.std())
        return False

    # -- 4. sites ------------------------------------------------------------------------------------------------

    def _describe(
        self, source: Sighting, call: Event | None, latents: list[Sighting], consumer: Event, operand: Sighting
    ) -> _Found:
        module, number = (call.module, call.call) if call else self._scope(source)
        place: tuple[Any, ...] = (module, source.site)

        def untapped(reason: str) -> _Found:
            return _Found(BinaryActivation("", 0, reason, module), place)

        if source.seq < self.inner:
            return untapped("it is the network's input that is binarized, not an activation")
        sites = [s for s in self._same_value(source) if s.in_graph]
        if not sites:
            given = [s for a in (call.arguments if call else ()) for s in self.by_tensor[a.tensor]]
            frozen = (
                given
                and consumer.gradients
                and not any(s.requires_grad for s in given)
                and not self._has_trained_history(given[0])
            )
            return untapped(_FROZEN if frozen else _NO_GRADIENT)
        if source.value.one_hot:
            return untapped("it is one-hot: a choice, not a code")
        if not latents:
            return untapped(_ONE_VALUE if source.value.constant else _NO_LATENT)
        pattern = self._pattern(source)
        if pattern is not None:
            zero = pattern == 0
            same_size = latents[0].value.numel == source.value.numel
            if same_size and bool(latents[0].value.values[zero].any()):
                return untapped("it has three values: its zeros are not only signs of zero")
            if not self._is_sign_of(source, call, latents[0]):
                return untapped("no threshold splits its latent into its two values")
        binary = min(sites, key=lambda s: self._cost(s, module))
        latent = min(latents, key=lambda s: self._cost(s, module))
        layouts = self._layouts(binary, latent, consumer, operand)
        if isinstance(layouts, str):
            return untapped(layouts)
        b, f = layouts
        activation = BinaryActivation(
            "",
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
        return _Found(activation, place, self._child(latents[0], module, number))

    def _scope(self, source: Sighting) -> tuple[str, int]:
        """The module in whose forward a tensor was made, and which call of it, where no function call tells."""
        name = source.site.module
        if source.site.kind != "input" or not name:
            return name, source.site.call
        # What comes in was made by the module around.
        while True:
            name = name.rpartition(".")[0]
            calls = [call for (n, call), seq in self.entered.items() if n == name and seq < source.seq]
            if calls or not name:
                return name, max(calls, default=0)

    def _has_trained_history(self, sighting: Sighting) -> bool:
        """Whether anything that this was computed from required a gradient."""
        line, seen = [sighting], {sighting.tensor}
        for s in line:
            event = self._producer(s)
            for a in event.arguments if event else ():
                if a.requires_grad:
                    return True
                if a.tensor not in seen and len(seen) < 1000:
                    seen.add(a.tensor)
                    line.append(a)
        return False

    def _child(self, latent: Sighting, module: str, call: int) -> str:
        """The child of the module whose output in this call the latent is, up to elementwise functions and views."""
        since = self.entered[module, call]
        prefix = f"{module}." if module else ""
        current: Sighting | None = latent
        for _ in range(_DEPTH):
            if current is None:
                break
            outputs = [s.site.module for s in self.outputs[current.tensor] if s.seq > since]
            names = [name for name in outputs if name.startswith(prefix) and name != module]
            if names:
                return min(names, key=len).removeprefix(prefix)
            event = self._producer(current)
            size = current.value.numel
            given = [a for a in (event.arguments if event else ()) if a.value.numel >= size and a.requires_grad]
            current = given[0] if given and event and event.name not in _PRODUCTS else None
        return ""

    @staticmethod
    def _cost(sighting: Sighting, module: str) -> tuple[bool, bool, int]:
        """A plain hook before a function call within a forward, the module that binarizes before others."""
        site = sighting.site
        return site.kind in ("argument", "result"), site.module != module, sighting.seq

    def _layouts(
        self, binary: Sighting, latent: Sighting, consumer: Event, operand: Sighting
    ) -> tuple[Layout, Layout] | str:
        windowed = []
        for side in (latent, binary):
            rows, batch = side.value.shape[0] if side.value.shape else 0, self.trace.batch
            shapes = f"{tuple(side.value.shape)} for {batch} samples"
            if not rows or rows % batch:
                return f"the batch is not its first dimension, or is mixed with another: {shapes}"
            by_sample = self._is_by_sample(side)
            # Codes drawn at random differ between equal samples: the latent tells.
            if side is binary and side.value.shape == latent.value.shape:
                by_sample = True
            # What dropout or a rounding error changes grows through the layers: as many rows as samples tell more.
            if by_sample is False and (rows != batch or self.mixed < 1 << 62):
                return f"the rows of one sample do not follow each other in its first dimension: {shapes}"
            if by_sample is None and rows != batch:
                return f"which rows belong to one sample could not be seen: {shapes}; try an example of random values"
            windowed.append(rows != batch)
        if consumer.name in _CONVOLUTIONS and len(operand.value.shape) == 1 + _CONVOLUTIONS[consumer.name]:
            return "the convolution receives a single sample, without a batch dimension"
        spatial = _spatial_dims(binary.value.shape, consumer, operand)
        b = Layout(spatial, windowed[1])
        same_rank = len(binary.value.shape) == len(latent.value.shape)
        f = Layout(spatial if same_rank or spatial is not None else None, windowed[0])
        if f.spatial is not None and f.spatial >= len(latent.value.shape):
            return f"its latent has another rank: {tuple(latent.value.shape)} for {tuple(binary.value.shape)}"
        return b, f

    def _is_by_sample(self, side: Sighting) -> bool | None:
        """Whether equal samples have equal values; None where that could not be seen."""
        seen = [s for s in (side, *self.again.get(side.site, ())) if s.value.apart is not None]
        if not seen:
            return None
        nearest = min(seen, key=lambda s: s.value.apart or 0.0)
        # After dropout and stochastic binarization, or by signs that flip on a rounding error, they are only alike.
        # Not exactly equal behind a call that told equal ones apart: a recurrent layer, say, and these are time steps.
        apart = nearest.value.apart or 0.0
        return apart < (_ALIKE if nearest.seq < self.mixed else _EQUAL)

    # -- values --------------------------------------------------------------------------------------------------

    def _pattern(self, sighting: Sighting) -> Tensor | None:
        return self._patterns.get(id(sighting.value), sighting.value.pattern)

    def _fingerprint(self, value: Snapshot) -> tuple[int, tuple[float, ...]]:
        key = id(value)
        if key not in self._fingerprints:
            step = max(1, len(value.values) // 32)
            self._fingerprints[key] = value.numel, tuple(value.values[::step][:32].tolist())
        return self._fingerprints[key]


def _first_mixing(trace: Trace) -> int:
    """When the first call got equal values for equal samples, and returned different ones."""
    for event in trace.events if not trace.draws else ():
        if event.name not in _RECURRENT:
            continue
        given = [s.value.apart for s in event.arguments if s.value.apart is not None]
        results = [s.value.apart or 0.0 for s in event.results]
        equal = bool(given) and all(apart < 1e-6 for apart in given)
        if equal and any(_EQUAL < apart < _ALIKE for apart in results):
            return event.seq
    return 1 << 62


def _key(value: Snapshot, pattern: Tensor) -> tuple[int, int]:
    """Equal for equal patterns of any shape, also where the two codes changed places."""
    nonzero = pattern[pattern != 0]
    if len(nonzero) and nonzero[0] < 0:
        pattern = -pattern
    return value.numel, int((pattern.cpu() * _weights(len(pattern))).sum())


@lru_cache(maxsize=64)
def _weights(count: int) -> Tensor:
    return torch.randint(2**62, (count,), generator=torch.Generator().manual_seed(0), device="cpu")


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
