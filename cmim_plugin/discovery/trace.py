"""Record one forward pass: every tensor at a module boundary or a torch function.

A :class:`Sighting` is one tensor at one moment: a :class:`Snapshot` of its values, and the :class:`Site` where a hook
can capture it in training. Its parents are the arguments of the call that made it. No tensor of the model is kept.
"""

from __future__ import annotations

import contextlib
import random
import sys
from collections import Counter, defaultdict
from collections.abc import Callable, MutableMapping
from dataclasses import dataclass, field, replace
from functools import cache, cached_property
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from .. import _compat
from .codes import is_constant, sign_pattern
from .functions import RANDOM, SHAPE_ONLY, plain_name, writes
from .inputs import Inputs, Path, is_strided, tensors_in
from .state import register_undo, same

_KEPT = 2048  # elements of a snapshot
MAX_QUANTIZED_VALUES = 16  # different values of a tensor that counts as quantized


@dataclass(frozen=True)
class Site:
    """The place of a tensor within a forward pass of the model."""

    module: str  # qualified name of the module whose forward it is in, "" for the model itself
    call: int  # index among its calls in this pass; those with gradients unlike the pass count from -1 down
    kind: str  # "input" or "output" of the module; "argument", "result" or "written" of a torch function in it
    path: Path  # keys that lead to the tensor within the (args, kwargs) pair or the output
    function: Callable[..., Any] | None = None  # of the last three kinds
    function_call: int = 0  # index among the calls of the function with gradients in this module call
    function_call_of_all: int = 0  # index among all its calls: for passes without gradients, as in a report
    module_calls: int = 0  # how often the module is called in a pass
    function_calls: int = 0  # how often the function is called with gradients in this module call
    other_calls: int = 0  # calls of the other side's module that begin before the tensor is seen

    def __reduce__(self) -> tuple[Any, ...]:
        # A copied plug-in captures nothing, and some functions cannot be pickled.
        return Site, tuple({**vars(self), "function": None}.values())

    def in_same_call(self, other: Site) -> bool:
        """Whether both sites are in the same module call."""
        return (self.module, self.call) == (other.module, other.call)


@dataclass(eq=False)
class Snapshot:
    """The values of a tensor while they stay the same."""

    shape: torch.Size
    values: Tensor  # (n,), at kept_indices(): comparable between tensors of one size
    pattern: Tensor | None = None  # (n,) sign_pattern() there; None if not two-valued or independent of the input
    constant: bool = False  # all elements are equal
    num_values: int = 0  # number of different values if they are few; 0 if constant, two-valued or many
    one_hot: bool = False  # along a dimension, a single element stands out
    twin_distance: float | None = None  # between two equal samples, divided by that between two different ones
    sightings: list[Sighting] = field(default_factory=list)  # of the tensor with these values, in order

    @property
    def numel(self) -> int:
        return self.shape.numel()

    @property
    def two_valued(self) -> bool:
        return self.pattern is not None

    @property
    def continuous(self) -> bool:
        return self.values.is_floating_point() and not self.constant

    @property
    def first_in_graph(self) -> Sighting | None:
        """The first sighting in the graph. The forward of an autograd.Function is not in it: it has no gradients."""
        return next((s for s in self.sightings if s.in_graph), None)

    @cached_property
    def pattern_key(self) -> tuple[int, bytes] | None:
        """A dict key: equal for equal patterns, also if the two codes are swapped or the shapes differ."""
        if self.pattern is None:
            return None
        first = next((sign for sign in self.pattern.tolist() if sign), 1)
        return self.numel, bytes((self.pattern * first + 1).tolist())


@dataclass(eq=False)
class Sighting:
    """One tensor at one moment."""

    seq: int  # index in Trace.sightings
    site: Site
    snapshot: Snapshot
    requires_grad: bool
    in_graph: bool  # it required a gradient, with gradients enabled
    from_input: bool  # it depends on the model's input
    strides: tuple[int, ...]
    event: Event | None = None  # the function call that returned it at this sighting

    @property
    def distinct(self) -> int:
        """Number of elements that are not repeated by expansion."""
        return torch.Size(n for n, step in zip(self.snapshot.shape, self.strides, strict=True) if step).numel()

    @property
    def producer(self) -> Event | None:
        """The function call that first returned the tensor with these values."""
        return next((s.event for s in self.snapshot.sightings if s.event and s.seq <= self.seq), None)

    @property
    def made_by(self) -> str:
        """The name of that call, "" if there is none."""
        return self.producer.name if self.producer else ""

    def parents(self, same_size: bool = False) -> list[Sighting]:
        """The producer's arguments, without the tensor itself, which an in-place function takes."""
        event = self.producer
        arguments = [a for a in (event.arguments if event else ()) if a.snapshot is not self.snapshot]
        return [a for a in arguments if a.snapshot.numel == self.snapshot.numel] if same_size else arguments


@dataclass(eq=False)
class Event:
    """One torch function call."""

    seq: int  # number of sightings before it
    name: str
    module: str  # qualified name of the module whose forward called it
    parameters: int  # number of the model's parameters among the arguments
    has_gradient: bool  # a parameter, or another tensor that requires a gradient, is an argument
    grad_enabled: bool  # not under no_grad, nor in the forward of an autograd.Function
    arguments: list[Sighting]  # without parameters
    equation: str = ""  # of torch.einsum
    results: list[Sighting] = field(default_factory=list)
    writes: bool = False  # into an argument, or what that is a view of


@dataclass
class Trace:
    """Everything seen in one forward pass, in order."""

    batch: int
    sightings: list[Sighting] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    #: For each module: the number of sightings before each of its calls with gradients as the pass has them.
    begun: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    #: (module, its call) -> number of calls of each (function, whether with gradients) there
    functions: dict[tuple[str, int], Counter[Any]] = field(default_factory=lambda: defaultdict(Counter))
    draws_scalars: bool = False  # single random numbers were drawn, as by a model that skips layers at random
    time_major: str = ""  # a module with batch_first=False whose input has a first dimension as long as the batch

    @property
    def calls(self) -> Counter[str]:
        """How often each module was called."""
        return Counter({name: len(seqs) for name, seqs in self.begun.items()})

    @cached_property
    def by_site(self) -> dict[Site, Sighting]:
        return {s.site: s for s in self.sightings}

    def sites_of(self, binary: Sighting, latent: Sighting) -> tuple[Site, Site]:
        """The sites of both sides of a tap, with the numbers of calls in this trace."""

        def counted(sighting: Sighting, other: str) -> Site:
            site = sighting.site
            functions = self.functions[site.module, site.call][site.function, True]
            others = sum(seq <= sighting.seq for seq in self.begun[other])
            return replace(
                site, module_calls=len(self.begun[site.module]), function_calls=functions, other_calls=others
            )

        return counted(binary, latent.site.module), counted(latent, binary.site.module)


def record(model: nn.Module, inputs: Inputs, batch: int, twins: bool = False) -> Trace:
    """Run a model on a batch of so many samples, and record every tensor. ``twins``: whether the last two samples are
    equal. Then dropout is off, and both get the same random numbers."""
    recorder = _Recorder(model, batch, twins)
    states = _generator_states()
    with contextlib.ExitStack() as stack:
        for module in model.modules():
            if not isinstance(module, torch.jit.ScriptModule):  # it takes no hooks
                stack.callback(module.register_forward_pre_hook(recorder.enter, with_kwargs=True).remove)
                stack.callback(module.register_forward_hook(recorder.leave, always_call=True).remove)
        register_undo(stack, [inputs])  # a forward may take things out of a dictionary
        stack.enter_context(recorder)
        model(*inputs[0], **inputs[1])
    recorder.trace.draws_scalars |= states != _generator_states()
    return recorder.trace


def _generator_states() -> tuple[Any, Any]:
    """The states of the generators of Python and numpy, which draw single numbers."""
    numpy = sys.modules.get("numpy")
    return random.getstate(), None if numpy is None else numpy.random.get_state()[2]


class _Recorder(TorchFunctionMode):
    """Records one pass."""

    def __init__(self, model: nn.Module, batch: int, twins: bool) -> None:
        super().__init__()
        self.trace = Trace(batch)
        self._twins = twins
        self._names = {module: name for name, module in model.named_modules()}
        self._parameters = {id(p) for p in model.parameters()}
        self._scopes: list[tuple[str, int]] = []  # modules being run, and the index of the call of each
        self._with_gradients = torch.is_grad_enabled()
        self._uncounted: Counter[str] = Counter()  # calls of each module with gradients unlike the pass
        # For each tensor object: whether it depends on the model's input, and its last snapshot.
        self._from_input: MutableMapping[Tensor, bool] = WeakTensorKeyDictionary()
        self._last: MutableMapping[Tensor, Snapshot] = WeakTensorKeyDictionary()
        self._kept_indices = cache(kept_indices)

    def __deepcopy__(self, memo: Any) -> _Recorder:
        return self  # a forward may copy modules, with their hooks

    def enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if module not in self._names:
            return
        name = self._names[module]
        if torch.is_grad_enabled() == self._with_gradients:
            self._scopes.append((name, len(self.trace.begun[name])))
            self.trace.begun[name].append(len(self.trace.sightings))
        else:
            self._uncounted[name] += 1
            self._scopes.append((name, -self._uncounted[name]))
        inputs = self._record((args, kwargs), "input", from_input=True if len(self._scopes) == 1 else None)
        if not getattr(module, "batch_first", True):
            shape = next((s.snapshot.shape for s in inputs if len(s.snapshot.shape) == 3), None)
            if shape is not None and shape[0] == self.trace.batch != shape[1]:
                self.trace.time_major = f"{type(module).__name__} {name}"

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if module in self._names:
            self._record(output, "output")
            self._scopes.pop()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if not self._scopes or func is Tensor.__deepcopy__:  # its memo holds all that was copied so far
            return func(*args, **kwargs)
        name, counts = plain_name(func), self.trace.functions[self._scopes[-1]]
        function_call = func, counts[func, True], counts[func, True] + counts[func, False]
        for scope in self._scopes:
            self.trace.functions[scope][func, torch.is_grad_enabled()] += 1
        tensors = [tensor for _, tensor in tensors_in((args, kwargs))]
        activations = [t for t in tensors if id(t) not in self._parameters]
        event = Event(
            seq=len(self.trace.sightings),
            name=name,
            module=self._scopes[-1][0],
            parameters=len(tensors) - len(activations),
            has_gradient=len(tensors) > len(activations) or any(t.requires_grad for t in tensors),
            grad_enabled=torch.is_grad_enabled(),
            arguments=self._record((args, kwargs), "argument", *function_call),
            equation=args[0] if args and isinstance(args[0], str) else "",
        )
        from_input = name not in SHAPE_ONLY and any(self._from_input[t] for t in activations)
        if self._twins:
            off = {"dropout_p": 0.0} | ({"training": False} if "drop" in name else {})
            kwargs |= {key: off[key] for key in off.keys() & kwargs}
        target = kwargs.get("out", activations[0]) if from_input and writes(func, kwargs) else None
        # A write into a view changes all of the tensor.
        written = [t for t in (target, _compat.base_of(target)) if t is not None] if isinstance(target, Tensor) else []
        overwritten = [self._last.get(tensor) for tensor in written]
        result = func(*args, **kwargs)
        if name in RANDOM:
            self._note_draw(result)
        self._from_input.update(dict.fromkeys(written, True))
        event.results = self._record(result, "result", *function_call, from_input=from_input)
        # `x[mask] = 1` returns nothing: look at what it wrote into.
        changed = [s for s in self._record(written, "written", *function_call) if s.snapshot not in overwritten]
        event.writes = bool(changed)
        event.results += [s for s in changed if s.snapshot not in [r.snapshot for r in event.results]]
        for sighting in event.results:
            sighting.event = event
        self.trace.events.append(event)
        return result

    def _note_draw(self, numbers: Tensor) -> None:
        """Note the draw of a single random number. Copy many from one of two equal samples to the other."""
        self.trace.draws_scalars |= numbers.numel() == 1
        if not self._twins:
            return
        rows, rest = divmod(len(numbers) if numbers.ndim else 0, self.trace.batch)
        if rows and not rest and numbers.is_floating_point():  # not a permutation
            with _compat.unseen():
                numbers.data[-rows:] = numbers.data[-2 * rows : -rows].clone()

    def _record(self, tree: Any, kind: str, *function_call: Any, from_input: bool | None = None) -> list[Sighting]:
        """Record the tensors of a tree. ``function_call``: the function and both indices of its call. ``from_input``:
        whether new tensors depend on the input, None if that is not known."""
        sightings, is_in_graph = [], torch.is_grad_enabled() and not _compat.is_transformed()
        with _compat.unseen():
            for path, tensor in tensors_in(tree):
                if id(tensor) in self._parameters:
                    continue
                # A tensor of unknown origin, as from C++ code, is taken to depend on the input if it has a grad_fn.
                new = tensor.grad_fn is not None if from_input is None else from_input
                depends = bool(from_input) or self._from_input.get(tensor, new)
                if (base := _compat.base_of(tensor)) is not None:
                    depends |= self._from_input.get(base, False)
                self._from_input[tensor] = depends
                if not is_strided(tensor) or tensor.is_complex() or tensor.numel() == 0:
                    continue
                try:
                    snapshot = self._snapshot_of(tensor)
                except (RuntimeError, NotImplementedError):
                    continue  # of a dtype or subclass that cannot be read: float8, quantized, within torch.func.vmap
                sighting = Sighting(
                    seq=len(self.trace.sightings),
                    site=Site(*self._scopes[-1], kind, path, *function_call),
                    snapshot=snapshot,
                    requires_grad=tensor.requires_grad,
                    # No hook can capture what was written, nor what exists within torch.vmap only.
                    in_graph=tensor.requires_grad and is_in_graph and kind != "written",
                    from_input=depends,
                    strides=tensor.stride(),
                )
                snapshot.sightings.append(sighting)
                self.trace.sightings.append(sighting)
                sightings.append(sighting)
        return sightings

    def _snapshot_of(self, tensor: Tensor) -> Snapshot:
        """A snapshot of the tensor; the last one again if its values are still the same."""
        last, data = self._last.get(tensor), tensor.detach()
        index = self._kept_indices(data.numel(), data.device)
        values = data.take(index)
        # The version counter does not move for `x.data = ...`: only the values tell.
        if last is not None and last.shape == data.shape and same(last.values, values):
            return last
        snapshot = self._last[tensor] = Snapshot(data.shape, values)
        snapshot.constant = is_constant(data)
        if self._from_input[tensor] and not snapshot.constant:  # nothing asks for the codes of a weight
            snapshot.pattern = sign_pattern(data, index)
            snapshot.one_hot = snapshot.two_valued and _is_one_hot(data)
            if not snapshot.two_valued and values.unique().numel() <= MAX_QUANTIZED_VALUES:
                snapshot.num_values = data.unique().numel()
        if self._twins and data.is_floating_point():
            snapshot.twin_distance = self._twin_distance(data)
        return snapshot

    def _twin_distance(self, tensor: Tensor) -> float | None:
        size, rest = divmod(tensor.numel(), self.trace.batch)
        if rest:
            return None
        index = self._kept_indices(size, tensor.device)
        samples = self.trace.batch - 1, self.trace.batch - 2, 0
        last, twin, first = (tensor.take(index + size * sample).double() for sample in samples)
        different = (last - first).abs().mean()  # zero, up to rounding, if all samples give the same
        return float((last - twin).abs().mean() / different) if different > 1e-6 * last.abs().mean() else None


def kept_indices(numel: int, device: torch.device) -> Tensor:
    """``(n,)`` int64: which elements of a flattened tensor of this size a snapshot keeps."""
    if numel <= _KEPT:
        return torch.arange(numel, device=device)
    # Not evenly spaced: that would see the same column of every image.
    generator = torch.Generator().manual_seed(0)
    return torch.randint(numel, (_KEPT,), generator=generator, device="cpu").sort().values.to(device)


def _is_one_hot(x: Tensor) -> bool:
    """Whether, along a dimension but the first, a single element is not zero; or, along two of them, above the mean, as
    in ``7 I - A`` with an attention map A. Tensors too large to be gates are not searched."""
    if x.numel() > 1 << 16 or x.ndim < 2:
        return False
    x = x.float()
    nonzero, larger = x.abs() >= 1e-4, x > x.mean()
    single = [d for d in range(1, x.ndim) if x.shape[d] > 1 and bool((nonzero.sum(d) == 1).all())]
    above = [d for d in range(1, x.ndim) if x.shape[d] > 2 and bool((larger.sum(d) == 1).all())]
    return len(single) > 0 or len(above) > 1
