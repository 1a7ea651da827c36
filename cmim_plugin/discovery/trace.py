"""What is seen of one forward pass: every tensor that passes a module boundary or a torch function.

Of each there is a :class:`Snapshot` of its values at that moment and the :class:`Site` where a hook can pick it up
again in training. From a :class:`Sighting` one can go back to what its tensor was made of. No tensor of the model is
kept.
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
from .state import note_changes, same

# Values kept of each tensor.
_VALUES = 2048
# A tensor of at most so many values is quantized.
FEW_LEVELS = 16


@dataclass(frozen=True)
class Site:
    """Where, within one forward pass of the model, a tensor can be picked up."""

    module: str  # qualified name of the module whose forward it is in ("" for the model itself)
    call: int  # which of its calls in this pass, from 0; one with other gradients than the pass counts from -1 down
    kind: str  # "input" or "output" of the module; "argument", "result" or "written" of a torch function in it
    path: Path  # keys that lead to the tensor within the (args, kwargs) pair or the output
    function: Callable[..., Any] | None = None  # of the last three kinds
    nth: int = 0  # which call of the function with gradients since the module was entered,
    nth_of_all: int = 0  # and which of all of them: the forward of an autograd.Function has none
    calls: int = 0  # how often the dry run called the module in a pass,
    times: int = 0  # and the function in this call of the module
    others: int = 0  # how many calls of the module of the other side had begun when the tensor was seen

    def __reduce__(self) -> tuple[Any, ...]:
        # A copy picks nothing up, and some functions cannot be pickled.
        return Site, tuple({**vars(self), "function": None}.values())


@dataclass(eq=False)
class Snapshot:
    """What a tensor held at one moment."""

    shape: torch.Size
    values: Tensor  # (n,), from the same positions for all tensors of as many elements
    pattern: Tensor | None = None  # (n,) its sign_pattern() there; None if it has more values, or is not of the input
    constant: bool = False  # all its elements are equal
    levels: int = 0  # how many values it has, if they are few; 0 where it is constant, two-valued, or has many
    one_hot: bool = False  # along some dimension it is zero but for a single element
    twin_distance: float | None = None  # of two samples of equal input, divided by that of two different ones
    sightings: list[Sighting] = field(default_factory=list)  # all of the tensor while it held this, in order

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
        """The first sighting in the graph; within the forward of a custom autograd function gradients are disabled."""
        return next((s for s in self.sightings if s.in_graph), None)

    @cached_property
    def code(self) -> tuple[int, bytes] | None:
        """Equal where the patterns are, whatever the shapes, also where the two codes changed places."""
        if self.pattern is None:
            return None
        first = next((sign for sign in self.pattern.tolist() if sign), 1)
        return self.numel, bytes((self.pattern * first + 1).tolist())


@dataclass(eq=False)
class Sighting:
    """One tensor at one moment."""

    seq: int  # its place in the trace
    site: Site
    held: Snapshot
    requires_grad: bool
    in_graph: bool  # it required a gradient, with gradients enabled
    from_input: bool  # it depends on the model's input
    strides: tuple[int, ...]
    event: Event | None = None  # the function call that returned it

    @property
    def distinct(self) -> int:
        """Elements that are not repeated by expansion."""
        return torch.Size(n for n, step in zip(self.held.shape, self.strides, strict=True) if step).numel()

    @property
    def producer(self) -> Event | None:
        """The function call that returned this tensor with this value."""
        return next((s.event for s in self.held.sightings if s.event and s.seq <= self.seq), None)

    def given(self, same_size: bool = False) -> list[Sighting]:
        """What that call was given; not the tensor itself, as a function in place is given it."""
        event = self.producer
        arguments = [a for a in (event.arguments if event else ()) if a.held is not self.held]
        return [a for a in arguments if a.held.numel == self.held.numel] if same_size else arguments


@dataclass(eq=False)
class Event:
    """One torch function call."""

    seq: int
    name: str
    module: str  # qualified name of the module whose forward called it
    parameters: int  # of the model, among its arguments
    weighted: bool  # a parameter, or what requires a gradient, is among them
    arguments: list[Sighting]  # without parameters
    equation: str = ""  # of torch.einsum
    results: list[Sighting] = field(default_factory=list)
    writes: bool = False  # into its first argument


@dataclass
class Trace:
    """Everything seen in one forward pass, in order."""

    batch: int
    sightings: list[Sighting] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    calls: Counter[str] = field(default_factory=Counter)  # of each module, with gradients as the pass has them
    #: When each of these calls began: the number of sightings before it.
    begun: dict[str, list[int]] = field(default_factory=lambda: defaultdict(list))
    #: (module, call of it) -> how often each (function, whether with gradients) was called there
    functions: dict[tuple[str, int], Counter[Any]] = field(default_factory=lambda: defaultdict(Counter))
    draws_scalars: bool = False  # single random numbers were drawn, as a model that skips layers at random does
    time_major: str = ""  # a recurrent layer or attention that takes for time what is as long as the batch

    @cached_property
    def at(self) -> dict[Site, Sighting]:
        return {s.site: s for s in self.sightings}

    def sites_of(self, binary: Sighting, latent: Sighting) -> tuple[Site, Site]:
        """Where both sides of a tap are picked up, with how often modules and functions are called here."""

        def counted(sighting: Sighting, other: str) -> Site:
            site = sighting.site
            times = self.functions[site.module, site.call][site.function, True]
            others = sum(seq <= sighting.seq for seq in self.begun[other])
            return replace(site, calls=self.calls[site.module], times=times, others=others)

        return counted(binary, latent.site.module), counted(latent, binary.site.module)


def record(model: nn.Module, inputs: Inputs, batch: int, twins: bool = False) -> Trace:
    """Run a model on a batch of so many samples, and write down what passes.

    ``twins``: whether the last two samples are equal. Dropout then rests, and both get the same random numbers.
    """
    recorder = _Recorder(model, batch, twins)
    before = _positions()
    with contextlib.ExitStack() as stack:
        for module in model.modules():
            if not isinstance(module, torch.jit.ScriptModule):  # that one takes no hooks
                stack.callback(module.register_forward_pre_hook(recorder.enter, with_kwargs=True).remove)
                stack.callback(module.register_forward_hook(recorder.leave, always_call=True).remove)
        note_changes(stack, [inputs])  # a forward may take things out of a dictionary
        stack.enter_context(recorder)
        model(*inputs[0], **inputs[1])
    recorder.trace.draws_scalars |= before != _positions()
    return recorder.trace


def _positions() -> tuple[Any, Any]:
    """Where the generators stand that draw single numbers: Python's and numpy's."""
    numpy = sys.modules.get("numpy")
    return random.getstate(), None if numpy is None else numpy.random.get_state()[2]


class _Recorder(TorchFunctionMode):
    """Writes down one pass."""

    def __init__(self, model: nn.Module, batch: int, twins: bool) -> None:
        super().__init__()
        self.trace = Trace(batch)
        self._twins = twins
        self._names = {module: name for name, module in model.named_modules()}
        self._parameters = {id(p) for p in model.parameters()}
        # Modules being run, and which call of each.
        self._scopes: list[tuple[str, int]] = []
        self._with_gradients = torch.is_grad_enabled()
        self._uncounted: Counter[str] = Counter()  # calls of each module with other gradients than the pass
        # Whether each tensor object depends on the model's input, and what it held last.
        self._from_input: MutableMapping[Tensor, bool] = WeakTensorKeyDictionary()
        self._last: MutableMapping[Tensor, Snapshot] = WeakTensorKeyDictionary()
        self._kept_positions = cache(kept_positions)

    def __deepcopy__(self, memo: Any) -> _Recorder:
        return self  # a forward may copy modules, with their hooks

    def enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if module not in self._names:
            return
        name = self._names[module]
        if torch.is_grad_enabled() == self._with_gradients:
            self._scopes.append((name, self.trace.calls[name]))
            self.trace.calls[name] += 1
            self.trace.begun[name].append(len(self.trace.sightings))
        else:
            self._uncounted[name] += 1
            self._scopes.append((name, -self._uncounted[name]))
        seen = self._see((args, kwargs), "input", from_input=True if len(self._scopes) == 1 else None)
        if not getattr(module, "batch_first", True):
            shape = next((s.held.shape for s in seen if len(s.held.shape) == 3), None)
            if shape is not None and shape[0] == self.trace.batch != shape[1]:
                self.trace.time_major = f"{type(module).__name__} {name}"

    def leave(self, module: nn.Module, args: Any, output: Any) -> None:
        if module in self._names:
            self._see(output, "output")
            self._scopes.pop()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = dict(kwargs or {})
        if not self._scopes or func is Tensor.__deepcopy__:  # its memo holds all that was copied so far
            return func(*args, **kwargs)
        name, calls = plain_name(func), self.trace.functions[self._scopes[-1]]
        call = func, calls[func, True], calls[func, True] + calls[func, False]
        for scope in self._scopes:
            self.trace.functions[scope][func, torch.is_grad_enabled()] += 1
        tensors = [tensor for _, tensor in tensors_in((args, kwargs))]
        activations = [t for t in tensors if id(t) not in self._parameters]
        event = Event(
            seq=len(self.trace.sightings),
            name=name,
            module=self._scopes[-1][0],
            parameters=len(tensors) - len(activations),
            weighted=len(tensors) > len(activations) or any(t.requires_grad for t in tensors),
            arguments=self._see((args, kwargs), "argument", *call),
            equation=args[0] if args and isinstance(args[0], str) else "",
        )
        from_input = name not in SHAPE_ONLY and any(self._from_input[t] for t in activations)
        if self._twins:
            rest = {"dropout_p": 0.0} | ({"training": False} if "drop" in name else {})
            kwargs |= {key: rest[key] for key in rest.keys() & kwargs}
        into = kwargs.get("out", activations[0]) if from_input and writes(func, kwargs) else None
        # A write into a view changes all of the tensor.
        written = [t for t in (into, _compat.base_of(into)) if t is not None] if isinstance(into, Tensor) else []
        before = [self._last.get(tensor) for tensor in written]
        result = func(*args, **kwargs)
        if name in RANDOM:
            self._drawn(result)
        self._from_input.update(dict.fromkeys(written, True))
        event.results = self._see(result, "result", *call, from_input=from_input)
        # `x[mask] = 1` returns nothing.
        changed = [s for s in self._see(written, "written", *call) if s.held not in before]
        event.writes = bool(changed)
        event.results += [s for s in changed if s.held not in [r.held for r in event.results]]
        for sighting in event.results:
            sighting.event = event
        self.trace.events.append(event)
        return result

    def _drawn(self, numbers: Tensor) -> None:
        """Single random numbers are noted; of many, the last two samples get the same where they are equal."""
        self.trace.draws_scalars |= numbers.numel() == 1
        if not self._twins:
            return
        rows, rest = divmod(len(numbers) if numbers.ndim else 0, self.trace.batch)
        if rows and not rest and numbers.is_floating_point():  # not a permutation
            with _compat.unseen():
                numbers.data[-rows:] = numbers.data[-2 * rows : -rows].clone()

    def _see(self, tree: Any, kind: str, *call: Any, from_input: bool | None = None) -> list[Sighting]:
        """Note the tensors of a tree. ``call``: the function, and which calls of it. ``from_input``: of new tensors,
        None where it has to be told by themselves."""
        seen, is_in_graph = [], torch.is_grad_enabled() and not _compat.is_transformed()
        with _compat.unseen():
            for path, tensor in tensors_in(tree):
                if id(tensor) in self._parameters:
                    continue
                # What comes out of code that torch functions do not show has a history all the same.
                new = tensor.grad_fn is not None if from_input is None else from_input
                depends = bool(from_input) or self._from_input.get(tensor, new)
                if (base := _compat.base_of(tensor)) is not None:
                    depends |= self._from_input.get(base, False)
                self._from_input[tensor] = depends
                if not is_strided(tensor) or tensor.is_complex() or tensor.numel() == 0:
                    continue
                try:
                    snapshot = self._snapshot(tensor)
                except (RuntimeError, NotImplementedError):
                    continue  # of a dtype or subclass that cannot be read: float8, quantized, within torch.func.vmap
                sighting = Sighting(
                    seq=len(self.trace.sightings),
                    site=Site(*self._scopes[-1], kind, path, *call),
                    held=snapshot,
                    requires_grad=tensor.requires_grad,
                    # What was written is never to be picked up there. Nor is what exists within torch.vmap only.
                    in_graph=tensor.requires_grad and is_in_graph and kind != "written",
                    from_input=depends,
                    strides=tensor.stride(),
                )
                snapshot.sightings.append(sighting)
                self.trace.sightings.append(sighting)
                seen.append(sighting)
        return seen

    def _snapshot(self, tensor: Tensor) -> Snapshot:
        """What the tensor holds now; the very same object as last time while that has not changed."""
        last, data = self._last.get(tensor), tensor.detach()
        index = self._kept_positions(data.numel(), data.device)
        values = data.take(index)
        # The version counter does not move for `x.data = ...`: only the values tell.
        if last is not None and last.shape == data.shape and same(last.values, values):
            return last
        snapshot = self._last[tensor] = Snapshot(data.shape, values)
        snapshot.constant = bool((values[:64] == values[0]).all()) and is_constant(data)
        if self._from_input[tensor] and not snapshot.constant:  # nothing asks for the codes of a weight
            snapshot.pattern = sign_pattern(data, index)
            snapshot.one_hot = snapshot.two_valued and _is_one_hot(data)
            if not snapshot.two_valued and values.unique().numel() <= FEW_LEVELS:
                snapshot.levels = data.unique().numel()
        if self._twins and data.is_floating_point():
            snapshot.twin_distance = self._twin_distance(data)
        return snapshot

    def _twin_distance(self, tensor: Tensor) -> float | None:
        size, rest = divmod(tensor.numel(), self.trace.batch)
        if rest:
            return None
        within = self._kept_positions(size, tensor.device)
        samples = self.trace.batch - 1, self.trace.batch - 2, 0
        one, twin, other = (tensor.take(within + size * sample).double() for sample in samples)
        otherwise = (one - other).abs().mean()
        return float((one - twin).abs().mean() / otherwise) if otherwise > 1e-6 * one.abs().mean() else None


def kept_positions(numel: int, device: torch.device) -> Tensor:
    """``(n,)`` int64: where the values that a snapshot keeps stand in a flattened tensor of so many elements."""
    if numel <= _VALUES:
        return torch.arange(numel, device=device)
    # Not evenly spaced: that would see the same column of every image.
    generator = torch.Generator().manual_seed(0)
    return torch.randint(numel, (_VALUES,), generator=generator, device="cpu").sort().values.to(device)


def _is_one_hot(x: Tensor) -> bool:
    """Zero but for a single element along some dimension (not looked for in tensors too large to be gates)."""
    if x.numel() > 1 << 16 or x.ndim < 2:
        return False
    nonzero = x.float().abs() >= 1e-4
    return any(x.shape[d] > 1 and bool((nonzero.sum(d) == 1).all()) for d in range(1, x.ndim))
