"""The dry run: watch a few forward passes of a model on random inputs, and leave the model as it was.

The result is a :class:`Trace`: every tensor that passed a module boundary or a torch function, with a :class:`Sample`
of its values at that moment and the :class:`Site` where a hook can pick it up again in training. What the tensors mean
is decided in :mod:`cmim_plugin.discovery`. No tensor of the model is kept: a dry run takes about the memory of a
training step with a small batch.
"""

from __future__ import annotations

import contextlib
import itertools
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from ..errors import CMIMError

Inputs = tuple[tuple[Any, ...], dict[str, Any]]

# Large enough that batch statistics of 1 x 1 maps are not two-valued by themselves; two sizes, so that the dimension
# that grows with the batch shows itself.
_PROBE_BATCHES = (8, 7)
# Values looked at in each sample of the batch.
_VALUES = 2048


@dataclass(frozen=True)
class Site:
    """Where, within one forward pass of the model, a tensor can be picked up.

    Attributes:
        module: qualified name of the module whose forward it is in ("" for the model itself).
        call: which call of that module in this pass, from 0.
        kind: "input" or "output" of the module, or "argument" or "result" of a torch function called within it.
        path: keys that lead to the tensor within the (args, kwargs) pair or the output.
        function, nth: for the last two kinds, the function and which call of it since the module was entered.
    """

    module: str
    call: int
    kind: str
    path: tuple[Any, ...]
    function: Callable[..., Any] | None = None
    nth: int = 0


@dataclass(eq=False)
class Sample:
    """Some values of a tensor: the same ones for any view of it, and the same ones of each sample of the batch.

    Attributes:
        shape, dtype: of the tensor.
        values: ``(n,)``, all of them where the tensor is small.
        index: ``(n,)`` where they stand in the flattened tensor.
    """

    shape: torch.Size
    dtype: torch.dtype
    values: Tensor
    index: Tensor

    @property
    def numel(self) -> int:
        """Elements of the tensor."""
        return self.shape.numel()

    def same(self, other: Sample) -> bool:
        """Equal values, up to a view."""
        return self.numel == other.numel and self.dtype == other.dtype and same(self.values, other.values)


@dataclass(eq=False)
class Sighting:
    """One tensor at one moment.

    Attributes:
        seq: its place in the trace.
        site: where it was seen.
        tensor: a number that stands for the tensor object.
        value: what it held.
        in_graph: whether it required a gradient, with gradients enabled.
        event: for the result of a function call, its place among the trace's events.
    """

    seq: int
    site: Site
    tensor: int
    value: Sample
    in_graph: bool
    event: int | None = None


@dataclass(eq=False)
class Event:
    """One torch function call: its tensor arguments before the call, its tensor results after.

    ``shapes`` are those of all tensor arguments; parameters are not among the sightings.
    """

    seq: int
    name: str
    module: str
    call: int
    shapes: list[torch.Size]
    arguments: list[Sighting] = field(default_factory=list)
    results: list[Sighting] = field(default_factory=list)


@dataclass
class Trace:
    """Everything seen in one forward pass, in order."""

    batch: int
    sightings: list[Sighting] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)


def tensors_in(tree: Any, path: tuple[Any, ...] = ()) -> Iterator[tuple[tuple[Any, ...], Tensor]]:
    """Every tensor in nested tuples, lists and mappings, with the keys that lead to it."""
    if isinstance(tree, Tensor):
        yield path, tree
    elif isinstance(tree, Mapping):
        for key, value in tree.items():
            yield from tensors_in(value, (*path, key))
    elif isinstance(tree, (tuple, list)):
        for index, value in enumerate(tree):
            yield from tensors_in(value, (*path, index))


def as_inputs(example: Any) -> Inputs:
    """A tensor, a tuple of positional inputs or a dict of keyword inputs, as (args, kwargs)."""
    if isinstance(example, Mapping):
        return (), dict(example)
    if isinstance(example, (tuple, list)):
        return tuple(example), {}
    if isinstance(example, Tensor):
        return (example,), {}
    raise CMIMError(
        "example_input must be a tensor, a tuple of positional inputs or a dict of keyword inputs of the model; "
        f"found {type(example).__name__}."
    )


def watch(model: nn.Module, example: Any) -> tuple[Trace, Trace]:
    """Two traces of the model in training mode on random inputs like the example, after one warm-up pass.

    The first pass is for models that initialise scales lazily. Parameters, buffers, attributes, modes, gradients and
    random generators are put back afterwards.

    Raises:
        CMIMError: the model's forward fails on the example input.
    """
    example = as_inputs(example)
    with _left_as_found(model):
        if not model.training:
            model.train()
        _awaken(model)
        failure: Exception | None = None
        for sizes in (_PROBE_BATCHES, None):
            probes = _probes(example, sizes)
            try:
                with torch.enable_grad(), uncompiled(model):
                    model(*probes[0][1][0], **probes[0][1][1])
                    first, second = (_trace(model, batch, inputs) for batch, inputs in probes)
                return first, second
            except Exception as error:
                # Some models take one batch size only: the second attempt keeps the example's.
                failure = error
        raise CMIMError(
            "The dry run failed: the model's forward raised "
            f"{type(failure).__name__}: {failure}. Pass an example_input that model(example_input) accepts in "
            "training mode, on the model's device."
        ) from failure


@torch.no_grad()
def _awaken(model: nn.Module) -> None:
    """Noise for weights that are all zero: a branch that starts as zero hides the signs behind it."""
    generator = torch.Generator().manual_seed(0)
    for name, parameter in model.named_parameters():
        plain = not nn.parameter.is_lazy(parameter) and type(parameter.data) is Tensor
        if plain and parameter.is_floating_point() and not name.endswith("bias") and not parameter.any():
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator, device="cpu"))


def uncompiled(model: nn.Module) -> contextlib.AbstractContextManager[Any]:
    """What is compiled runs as plain Python, where every function call can be seen."""
    for module in model.modules():
        if getattr(module, "_compiled_call_impl", None) is not None or hasattr(module, "_orig_mod"):
            return torch.compiler.set_stance("force_eager")
    return contextlib.nullcontext()


def _probes(example: Inputs, sizes: tuple[int, int] | None) -> list[tuple[int, Inputs]]:
    tensors = [t for _, t in tensors_in(example) if t.ndim > 0]
    if not tensors or not all(t.numel() for t in tensors):
        found = [tuple(t.shape) for t in tensors] or "no tensor with a batch dimension"
        raise CMIMError(f"example_input must be an input that the model accepts, a batch of it; found {found}.")
    batch = tensors[0].shape[0]
    generator = torch.Generator().manual_seed(0)
    return [(size, _like(example, batch, size, generator)) for size in sizes or (batch, batch)]


def _like(tree: Any, batch: int, size: int, generator: torch.Generator) -> Any:
    """The same structure with ``size`` samples: the example's values in random order, noise where it is constant."""
    if isinstance(tree, Tensor):
        return _random_like(tree.detach(), batch, size, generator)
    if isinstance(tree, Mapping):
        return {key: _like(value, batch, size, generator) for key, value in tree.items()}
    if isinstance(tree, (tuple, list)):
        items = [_like(value, batch, size, generator) for value in tree]
        return type(tree)(*items) if hasattr(tree, "_fields") else type(tree)(items)
    return tree


def _random_like(x: Tensor, batch: int, size: int, generator: torch.Generator) -> Tensor:
    if x.ndim > 0 and x.shape[0] == batch and batch > 0:
        x = x[torch.arange(size, device=x.device) % batch]
    distinct = x[..., :64].unique().numel() if x.ndim else 1
    if x.is_floating_point() and (distinct <= 2 or not bool(x.isfinite().all())):
        return torch.randn(x.shape, generator=generator, device="cpu").to(x)
    if distinct <= 2:
        # A mask, or an example of one repeated token: random order could make it invalid.
        return x.clone()
    order = torch.randperm(x.numel(), generator=generator, device="cpu").to(x.device)
    return x.flatten()[order].view(x.shape)


def _trace(model: nn.Module, batch: int, inputs: Inputs) -> Trace:
    recorder = _Recorder(model, batch)
    with recorder.attached(), recorder:
        model(*inputs[0], **inputs[1])
    return recorder.trace


class _Recorder(TorchFunctionMode):
    def __init__(self, model: nn.Module, batch: int) -> None:
        super().__init__()
        self.trace = Trace(batch)
        self._names = {module: name for name, module in model.named_modules()}
        self._calls: Counter[str] = Counter()
        self._functions: Counter[Any] = Counter()
        # Modules being run: name, call, and how often each function had been called when the module was entered.
        self._scopes: list[tuple[str, int, Counter[Any]]] = []
        self._parameters = {id(p) for p in model.parameters()}
        self._numbers: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self._fresh = itertools.count()
        self._last: dict[int, Sample] = {}
        self._indices: dict[tuple[int, torch.device], Tensor] = {}

    @contextlib.contextmanager
    def attached(self) -> Iterator[None]:
        handles = []
        try:
            for module in self._names:
                handles.append(module.register_forward_pre_hook(self._enter, with_kwargs=True))
                handles.append(module.register_forward_hook(self._leave, with_kwargs=True))
            yield
        finally:
            for handle in handles:
                handle.remove()

    def _enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        name = self._names[module]
        self._scopes.append((name, self._calls[name], self._functions.copy()))
        self._calls[name] += 1
        with torch._C.DisableTorchFunction():
            self._see((args, kwargs), "input")

    def _leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        with torch._C.DisableTorchFunction():
            self._see(output, "output")
        self._scopes.pop()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if not self._scopes:
            return func(*args, **kwargs)
        name, call, before = self._scopes[-1]
        nth = self._functions[func] - before[func]
        self._functions[func] += 1
        shapes = [tensor.shape for _, tensor in tensors_in((args, kwargs))]
        event = Event(len(self.trace.sightings), getattr(func, "__name__", str(func)), name, call, shapes)
        event.arguments = self._see((args, kwargs), "argument", func, nth)
        result = func(*args, **kwargs)
        event.results = self._see(result, "result", func, nth)
        for sighting in event.results:
            sighting.event = len(self.trace.events)
        self.trace.events.append(event)
        return result

    def _see(self, tree: Any, kind: str, function: Any = None, nth: int = 0) -> list[Sighting]:
        name, call, _ = self._scopes[-1]
        seen = []
        for path, tensor in tensors_in(tree):
            if id(tensor) in self._parameters or tensor.layout != torch.strided or tensor.is_complex():
                continue
            site = Site(name, call, kind, path, function, nth)
            in_graph = tensor.requires_grad and torch.is_grad_enabled()
            number = self._numbers.setdefault(tensor, next(self._fresh))
            value = self._sample(number, tensor.detach())
            seen.append(Sighting(len(self.trace.sightings), site, number, value, in_graph))
            self.trace.sightings.append(seen[-1])
        return seen

    def _sample(self, number: int, tensor: Tensor) -> Sample:
        """A sample of what the tensor holds now; the very same as last time while that has not changed."""
        index = self._index(tensor.numel(), tensor.device)
        sample = Sample(tensor.shape, tensor.dtype, tensor.take(index), index)
        last = self._last.get(number)
        # The version counter does not move for `x.data = ...`: only the values tell.
        if last is None or last.shape != sample.shape or not last.same(sample):
            self._last[number] = last = sample
        return last

    def _index(self, numel: int, device: torch.device) -> Tensor:
        key = (numel, device)
        if key not in self._indices:
            samples = self.trace.batch if numel % self.trace.batch == 0 else 1
            size = numel // samples
            within = torch.arange(size, device="cpu")
            if size > _VALUES:
                # Not evenly spaced: that would see the same column of every image.
                generator = torch.Generator().manual_seed(0)
                order = torch.rand(size, generator=generator, device="cpu").topk(_VALUES).indices
                within = order.sort().values
            index = (torch.arange(samples, device="cpu")[:, None] * size + within).flatten()
            self._indices[key] = index.to(device)
        return self._indices[key]


def same(a: Tensor, b: Tensor) -> bool:
    """Equal element by element, NaN equal to NaN."""
    return torch.equal(a, b) or (a.is_floating_point() and torch.equal(a.nan_to_num(), b.nan_to_num()))


@contextlib.contextmanager
def _left_as_found(model: nn.Module) -> Iterator[None]:
    """Everything that a forward pass can change in a model and around it is put back."""
    tensors = {
        id(t): (t, t.data, t.detach().clone())
        for module in model.modules()
        for t in _own_tensors(vars(module))
        if not nn.parameter.is_lazy(t)
    }
    # Tensors too: BinaryNet keeps the real weight in an attribute of the parameter.
    owners = [*model.modules(), *(t for t, _, _ in tensors.values())]
    attributes = [(owner, dict(vars(owner))) for owner in owners]
    # Containers are put back in place, not replaced: handles of the user's hooks point at the very dictionaries.
    containers = [(c, c.copy()) for _, a in attributes for c in a.values() if isinstance(c, (dict, list, set))]
    try:
        with generators_kept(t for t, _, _ in tensors.values()):
            yield
    finally:
        for owner, before in attributes:
            vars(owner).clear()
            vars(owner).update(before)
        for container, contents in containers:
            container.clear()
            (container.extend if isinstance(container, list) else container.update)(contents)
        with torch.no_grad():
            for t, storage, value in tensors.values():
                if t.data_ptr() != storage.data_ptr() or t.shape != storage.shape:
                    t.data = storage
                if not same(t.detach(), value):
                    t.data.copy_(value)


@contextlib.contextmanager
def generators_kept(tensors: Iterable[Tensor]) -> Iterator[None]:
    """The random generators of Python, numpy and torch are put back, on the devices of the tensors too."""
    numpy = sys.modules.get("numpy")
    numpy_state = numpy.random.get_state() if numpy is not None else None  # type: ignore[attr-defined]
    python_state = random.getstate()
    devices = sorted({t.device.index for t in tensors if t.device.type == "cuda"})
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python_state)
        if numpy is not None:
            numpy.random.set_state(numpy_state)  # type: ignore[attr-defined]


def _own_tensors(attributes: dict[str, Any]) -> Iterator[Tensor]:
    for value in attributes.values():
        if isinstance(value, Tensor):
            yield value
        elif isinstance(value, (dict, list)):
            yield from (v for v in (value.values() if isinstance(value, dict) else value) if isinstance(v, Tensor))
