"""The dry run: watch a few forward passes of a model, and leave the model as it was.

The result is some :class:`Trace`: every tensor that passed a module boundary or a torch function, with a
:class:`Snapshot` of its values at that moment and the :class:`Site` where a hook can pick it up again in training. What
the tensors mean is decided in :mod:`cmim_plugin.discovery.find`. No tensor of the model is kept.
"""

from __future__ import annotations

import contextlib
import itertools
import random
import sys
from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.weak import WeakTensorKeyDictionary

from .. import _compat
from ..errors import CMIMError
from .codes import is_constant, sign_pattern
from .inputs import (
    BatchSource,
    Inputs,
    Path,
    as_inputs,
    batch_sources,
    is_offsets,
    resampled,
    stated_source,
    tensors_in,
    varied,
)
from .state import force_eager, preserve_generators, preserve_state, same, storage, writes

__all__ = [
    "BatchSource",
    "Event",
    "Sighting",
    "Site",
    "Snapshot",
    "Trace",
    "as_inputs",
    "dry_run",
    "force_eager",
    "preserve_generators",
    "preserve_state",
    "same",
    "tensors_in",
]

# Values kept of each tensor.
_VALUES = 2048
# Values compared between two samples that got the same input.
_TWIN_VALUES = 512
# Passes at most where layers are skipped at random.
_PASSES = 10
# A tensor of at most so many values is quantized.
FEW_LEVELS = 16
# Results of these functions have the shape of an input, not its values.
_SHAPE_ONLY = frozenset(f"{kind}_like" for kind in ("zeros", "ones", "full", "empty", "rand", "randn", "randint")) | {
    f"new_{kind}" for kind in ("zeros", "ones", "full", "empty", "tensor")
}
RANDOM = frozenset({"rand", "randn", "randint", "rand_like", "randn_like", "bernoulli", "bernoulli_", "uniform_"}) | {
    "normal",
    "normal_",
    "multinomial",
    "randint_like",
    "random_",
    "randperm",
    "rsample",
    "sample",
}


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
    path: Path
    function: Callable[..., Any] | None = None
    nth: int = 0


@dataclass(eq=False)
class Snapshot:
    """What a tensor held at one moment.

    Attributes:
        shape, dtype: of the tensor.
        values: ``(n,)`` at random positions, the same ones for all tensors of as many elements.
        index: ``(n,)`` these positions in the flattened tensor.
        pattern: ``(n,)`` its sign pattern there (:func:`sign_pattern`), None if it is not two-valued.
        constant: whether all its elements are equal.
        levels: how many values it has in all, 0 for more than a few.
        one_hot: whether along some dimension it is zero but for a single element.
        apart: how far the last two samples of the batch, which got the same input, are from each other, in distances
            between different samples; None where that could not be seen.
    """

    shape: torch.Size
    dtype: torch.dtype
    values: Tensor
    index: Tensor
    pattern: Tensor | None = None
    constant: bool = False
    levels: int = 0
    one_hot: bool = False
    apart: float | None = None

    @property
    def numel(self) -> int:
        """Elements of the tensor."""
        return self.shape.numel()

    def same(self, other: Snapshot) -> bool:
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
        requires_grad: whether it required a gradient.
        in_graph: whether it required a gradient, with gradients enabled.
        from_input: whether it depends on the model's input.
        distinct: elements that are not repeated by expansion.
        event: for the result of a function call, its place among the trace's events.
    """

    seq: int
    site: Site
    tensor: int
    value: Snapshot
    requires_grad: bool
    in_graph: bool
    from_input: bool
    distinct: int
    event: int | None = None


@dataclass(eq=False)
class Event:
    """One torch function call: its tensor arguments before the call, its tensor results after.

    ``shapes`` are those of all tensor arguments; parameters are not among the sightings. ``weighted``: a parameter, or
    what requires a gradient, is among the arguments. ``gradients``: they were enabled.
    """

    seq: int
    name: str
    module: str
    call: int
    shapes: list[torch.Size]
    weighted: bool
    gradients: bool
    arguments: list[Sighting] = field(default_factory=list)
    results: list[Sighting] = field(default_factory=list)


@dataclass
class Trace:
    """Everything seen in one forward pass, in order.

    ``calls`` counts the calls of each module. ``draws``: it drew random numbers; ``decides``: single ones, as random
    structure does.
    """

    batch: int
    sightings: list[Sighting] = field(default_factory=list)
    events: list[Event] = field(default_factory=list)
    calls: Counter[str] = field(default_factory=Counter)
    draws: bool = False
    decides: bool = False


def dry_run(model: nn.Module, example: Any, batch_size: int | None) -> tuple[list[Trace], BatchSource | None]:
    """Traces of the model in training mode, after one pass of the example as it is.

    Two traces are made on inputs that are varied; where the model does not take these, on the example. In the second
    trace the last two samples are equal. Where the passes differ in the modules that they call, more passes follow
    until nothing new appears.

    Raises:
        CMIMError: the model is frozen or not initialised, its forward fails on the example, or the number of samples
            is not clear.
    """
    inputs = as_inputs(example)
    _check(model)
    with preserve_state(model), torch.enable_grad(), force_eager(model):
        # The result is to depend on the model alone.
        _seed(0)
        model.train()
        _awaken(model)
        sources = batch_sources(model, inputs)
        first = None
        try:
            if batch_size is None and len(sources) > 1:
                first = _trace(model, inputs, 1, twins=False)
            else:
                model(*inputs[0], **inputs[1])
        except Exception as error:
            # Batch normalization of single values needs two samples.
            if not (len(sources) == 1 and set(sources) == {1}):
                raise CMIMError(
                    f"The dry run failed: the model's forward raised {type(error).__name__}: {error}. Pass an "
                    "example_input that model(*example_input) accepts in training mode, on the model's device."
                ) from error
        batch, source = _number_of_samples(model, inputs, sources, first, batch_size)
        del first
        attempts = _attempts(inputs, batch, source)
        failure: Exception | None = None
        for make, size, twins in attempts:
            try:
                traces = [_trace(model, make(0), size)]
                while len(traces) < 2 or (_more(model, traces) and len(traces) < _PASSES):
                    traces.append(_trace(model, make(len(traces)), twins or size, twins=twins > 0))
                return traces, source
            except Exception as error:
                failure = error
        raise CMIMError(
            f"The dry run failed: the model's forward raised {type(failure).__name__}: {failure} in its second pass on "
            "the example_input. Pass an example_input that the model accepts again and again in training mode."
        ) from failure


def _check(model: nn.Module) -> None:
    parameters = list(model.parameters())
    if any(nn.parameter.is_lazy(p) for p in parameters):
        raise CMIMError("The model has lazy parameters without a shape yet. Run it once: model(example_input).")
    if parameters and not any(p.requires_grad for p in parameters):
        raise CMIMError(
            "The model is frozen: none of its parameters requires a gradient. Attach to a model in training, after "
            "model.requires_grad_(True) for the parts that are trained."
        )


def _seed(seed: int) -> None:
    torch.default_generator.manual_seed(seed)
    random.seed(seed)
    if (numpy := sys.modules.get("numpy")) is not None:
        numpy.random.seed(seed)


@torch.no_grad()
def _awaken(model: nn.Module) -> None:
    """Noise for weights of products and norms that are all zero: a branch that starts as zero hides its signs.

    Not for thresholds and shifts, which are no matrices and belong to no norm.
    """
    generator = torch.Generator().manual_seed(0)
    for module in model.modules():
        for name, p in module.named_parameters(recurse=False):
            matrix = sum(n > 1 for n in p.shape) > 1
            weight = (matrix or hasattr(module, "eps")) and name.endswith("weight") and p.is_floating_point()
            if weight and type(p.data) is Tensor and not p.any():
                p.data.copy_(torch.randn(p.shape, generator=generator, device="cpu"))


def _number_of_samples(
    model: nn.Module, inputs: Inputs, sources: dict[int, BatchSource], first: Trace | None, stated: int | None
) -> tuple[int, BatchSource | None]:
    """The number of samples in the example, and where it is read."""
    if stated is not None:
        return stated, stated_source(model, inputs, stated)
    if len(sources) == 1:
        return next(iter(sources.items()))
    # What convolutions and matrix products receive tells which of the sizes is the number of samples.
    rows = Counter(
        e.arguments[0].value.shape[0]
        for e in (first.events if first else ())
        if e.weighted and e.arguments and len(e.arguments[0].value.shape) > 1 and e.arguments[0].from_input
    )
    likely = [size for size in sources if rows[size] and 2 * rows[size] > sum(rows[other] for other in sources)]
    if len(likely) != 1:
        sizes = f"{sorted(sources)} are lengths of its inputs" if sources else "no input has a length"
        raise CMIMError(
            f"The number of samples in example_input is not clear: {sizes}. Say how many samples it has: batch_size=..."
        )
    return likely[0], sources[likely[0]]


def _attempts(inputs: Inputs, batch: int, source: BatchSource | None) -> list[tuple[Callable[[int], Inputs], int, int]]:
    """What to run, the best first.

    Each is a function from the number of a pass to its inputs, the samples in the first pass, and those in the others
    if the last two of them are equal, 0 if not.
    """
    as_it_is: tuple[Callable[[int], Inputs], int, int] = (lambda n: inputs, batch, 0)
    as_many: tuple[Callable[[int], Inputs], int, int] = (lambda n: varied(inputs, n), batch, 0)
    if source is None or is_offsets(inputs, source):
        return [as_many, as_it_is]
    # One sample is two for the sake of batch normalization; two are three, that two of them can be equal.
    filled = inputs if batch > 1 else resampled(inputs, source, [0, 0])
    size = max(batch, 2)
    twin = [*range(size), size - 1] if size == 2 else [*range(size - 1), size - 2]

    def make(n: int) -> Inputs:
        other = varied(filled, n)
        return other if n == 0 else resampled(other, source, twin)

    return [(make, size, len(twin)), as_many, as_it_is]


def _more(model: nn.Module, traces: list[Trace]) -> bool:
    """Whether another pass may show modules that these did not call. Drops a last trace that shows nothing new."""
    called = [set(t.calls) for t in traces]
    missing = {
        name for name, m in model.named_modules() if any(True for _ in m.parameters(recurse=False))
    } - set().union(*called)
    if all(t.calls == traces[0].calls for t in traces):
        return bool(missing) and any(t.decides for t in traces)
    recent = called[-1] | called[-2] if len(traces) > 3 else set().union(*called)
    return bool(missing) or not recent <= set().union(*called[:-2])


def _trace(model: nn.Module, inputs: Inputs, batch: int, twins: bool = False) -> Trace:
    recorder = _Recorder(model, batch, twins)
    states, drawn = (random.getstate(), _numpy_position()), torch.get_rng_state()
    # Dropout would make equal samples different.
    drops = [m for m in model.modules() if twins and type(m).__name__.startswith("Drop") and m.training]
    for module in drops:
        module.training = False
    try:
        with recorder.attached(), recorder:
            model(*inputs[0], **inputs[1])
    finally:
        for module in drops:
            module.training = True
    recorder.trace.decides |= states != (random.getstate(), _numpy_position())
    recorder.trace.draws |= recorder.trace.decides or not torch.equal(drawn, torch.get_rng_state())
    return recorder.trace


def _numpy_position() -> Any:
    numpy = sys.modules.get("numpy")
    return None if numpy is None else numpy.random.get_state()[2]


class _Recorder(TorchFunctionMode):
    """Writes down one pass.

    Args:
        model: the model.
        batch: samples in this pass.
        twins: whether the last two samples are equal.
    """

    def __init__(self, model: nn.Module, batch: int, twins: bool) -> None:
        super().__init__()
        self.trace = Trace(batch)
        self._twins = twins
        self._names = {module: name for name, module in model.named_modules()}
        self._functions: Counter[Any] = Counter()
        # Modules being run: name, call, and how often each function had been called when the module was entered.
        self._scopes: list[tuple[str, int, Counter[Any]]] = []
        self._parameters = {id(p) for p in model.parameters()}
        self._numbers: WeakTensorKeyDictionary = WeakTensorKeyDictionary()
        self._fresh = itertools.count()
        # By a tensor's number: its last snapshot, and whether it depends on the model's input.
        self._last: dict[int, Snapshot] = {}
        self._from_input: dict[int, bool] = {}
        # By a view's number: what it is a view of, where that does not depend on the input.
        self._viewed: dict[int, int] = {}
        self._indices: dict[tuple[int, torch.device], Tensor] = {}
        self._muted = False

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
        self._scopes.append((name, self.trace.calls[name], self._functions.copy()))
        self.trace.calls[name] += 1
        self._see((args, kwargs), "input", True if len(self._scopes) == 1 else None)

    def _leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        self._see(output, "output")
        self._scopes.pop()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._muted or not self._scopes:
            return func(*args, **kwargs)
        name, call, before = self._scopes[-1]
        nth = self._functions[func] - before[func]
        self._functions[func] += 1
        tensors = [tensor for _, tensor in tensors_in((args, kwargs))]
        weighted = any(t.requires_grad or id(t) in self._parameters for t in tensors)
        function = getattr(func, "__name__", str(func))
        if function == "__get__" or function == "__set__":
            function = getattr(getattr(func, "__self__", None), "__name__", function)
        shapes = [t.shape for t in tensors if not t.is_nested]
        gradients = torch.is_grad_enabled()
        event = Event(len(self.trace.sightings), function, name, call, shapes, weighted, gradients)
        event.arguments = self._see((args, kwargs), "argument", None, func, nth)
        from_input = function not in _SHAPE_ONLY and any(
            self._from_input.get(self._number(t)) for t in tensors if id(t) not in self._parameters
        )
        result = func(*args, **kwargs)
        if from_input and writes(func, kwargs) and tensors:
            # Written into a view: what it is a view of holds the values, too.
            number: int | None = self._number(tensors[0])
            while number is not None:
                self._from_input[number] = True
                number = self._viewed.get(number)
        event.results = self._see(result, "result", from_input, func, nth)
        for sighting in event.results:
            sighting.event = len(self.trace.events)
        if tensors and event.results and not from_input:
            for _, tensor in tensors_in(result):
                if tensor is not tensors[0] and storage(tensor) == storage(tensors[0]):
                    self._viewed[self._number(tensor)] = self._number(tensors[0])
        if function in RANDOM:
            self.trace.draws = True
            self.trace.decides |= all(t.numel() == 1 for _, t in tensors_in(result))
        self.trace.events.append(event)
        return result

    def _see(
        self, tree: Any, kind: str, from_input: bool | None = None, function: Any = None, nth: int = 0
    ) -> list[Sighting]:
        """Note the tensors of a tree. ``from_input``: of new ones, None where it has to be told by themselves."""
        name, call, _ = self._scopes[-1]
        seen = []
        self._muted = True
        with _compat.unseen():
            for path, tensor in tensors_in(tree):
                if id(tensor) in self._parameters:
                    continue
                number = self._number(tensor)
                if number not in self._from_input or (from_input and kind != "argument"):
                    # What comes out of code that torch functions do not show has a history all the same.
                    self._from_input[number] = tensor.grad_fn is not None if from_input is None else from_input
                odd = tensor.layout != torch.strided or tensor.is_complex() or tensor.is_nested or tensor.is_meta
                if odd or tensor.numel() == 0:
                    continue
                seen.append(
                    Sighting(
                        len(self.trace.sightings),
                        Site(name, call, kind, path, function, nth),
                        number,
                        self._snapshot(number, tensor.detach()),
                        tensor.requires_grad,
                        tensor.requires_grad and torch.is_grad_enabled(),
                        self._from_input[number],
                        torch.Size(n for n, step in zip(tensor.shape, tensor.stride(), strict=True) if step).numel(),
                    )
                )
                self.trace.sightings.append(seen[-1])
        self._muted = False
        return seen

    def _number(self, tensor: Tensor) -> int:
        number: int = self._numbers.setdefault(tensor, next(self._fresh))
        return number

    def _snapshot(self, number: int, tensor: Tensor) -> Snapshot:
        """What the tensor holds now; the very same object as last time while that has not changed."""
        index = self._index(tensor.numel(), tensor.device)
        values = tensor.take(index)
        last = self._last.get(number)
        # The version counter does not move for `x.data = ...`: only the values tell.
        if last is not None and last.shape == tensor.shape and same(last.values, values):
            return last
        snapshot = Snapshot(tensor.shape, tensor.dtype, values, index)
        self._last[number] = snapshot
        some = set(values[:64].tolist())
        if len(some) == 1 and is_constant(tensor):
            snapshot.constant, snapshot.levels = True, 1
        elif (pattern := sign_pattern(tensor, index)) is not None:
            snapshot.pattern, snapshot.one_hot = pattern, _is_one_hot(tensor)
        elif len(some) <= FEW_LEVELS and values.unique().numel() <= FEW_LEVELS:
            snapshot.levels = tensor.unique().numel()
        if self._twins and tensor.is_floating_point():
            snapshot.apart = self._apart(tensor)
        return snapshot

    def _apart(self, tensor: Tensor) -> float | None:
        size, rest = divmod(tensor.numel(), self.trace.batch)
        if rest:
            return None
        within = self._index(size, tensor.device)
        within = within[:: max(1, len(within) // _TWIN_VALUES)]
        last = self.trace.batch - 1
        one, twin, other = (tensor.take(within + size * i).double() for i in (last, last - 1, 0))
        otherwise = (one - other).abs().mean()
        known = bool(otherwise > 1e-6 * one.abs().mean())
        return float((one - twin).abs().mean() / otherwise) if known else None

    def _index(self, numel: int, device: torch.device) -> Tensor:
        key = (numel, device)
        if key not in self._indices:
            if numel <= _VALUES:
                index = torch.arange(numel, device="cpu")
            else:
                # Not evenly spaced: that would see the same column of every image.
                generator = torch.Generator().manual_seed(0)
                index = torch.randint(numel, (_VALUES,), generator=generator, device="cpu").sort().values
            self._indices[key] = index.to(device)
        return self._indices[key]


def _is_one_hot(x: Tensor) -> bool:
    """Zero but for a single element along some dimension (not looked for in tensors too large to be gates)."""
    if x.numel() > 1 << 16 or x.ndim < 2:
        return False
    nonzero = (x.abs() >= 1e-4) if x.dtype != torch.bool else x
    return any(x.shape[d] > 1 and bool((nonzero.sum(d) == 1).all()) for d in range(1, x.ndim))
