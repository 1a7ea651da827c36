"""Run a model without a trace: everything that a forward pass can change is put back."""

from __future__ import annotations

import contextlib
import random
import sys
import types
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode

from .. import _compat

# How far containers and objects are followed into each other, and up to which length.
_DEPTH, _LENGTH = 4, 4096
_NOT_FOLLOWED = (nn.Module, Tensor, type, types.ModuleType, types.FunctionType, types.MethodType, torch.Generator)
# Functions that write into their arguments, though their names do not end in an underscore.
_WRITE = frozenset({"__setitem__", "batch_norm", "instance_norm", "numpy", "__array__", "__dlpack__"})
# What takes a parameter's storage, to write into it later.
_INPLACE = frozenset(
    f"__i{op}__" for op in ("add", "sub", "mul", "div", "truediv", "floordiv", "mod", "pow", "and", "or", "xor")
)


def same(a: Tensor, b: Tensor) -> bool:
    """Equal element by element, NaN equal to NaN."""
    return torch.equal(a, b) or (a.is_floating_point() and torch.equal(a.nan_to_num(), b.nan_to_num()))


def force_eager(model: nn.Module) -> contextlib.AbstractContextManager[Any]:
    """What is compiled of a model, or called by it, runs as plain Python, where every function call can be seen."""
    return _compat.eager_stance()


@contextlib.contextmanager
def preserve_state(model: nn.Module) -> Iterator[None]:
    """Put back, afterwards, everything that forward passes change in a model and around it.

    That is: parameters, buffers and other tensors, their gradients and attributes; modes, hooks and other attributes
    of the modules; lists, dicts, sets, deques, numpy arrays and plain objects in these attributes, four levels deep;
    the global random generators and those that the model holds (torch, numpy, Python).

    Buffers and tensors in attributes are copied. A parameter is copied only when a torch function is about to write
    into it.

    Not put back: global variables, class attributes, variables of closures, files, containers of more than 4,096
    elements inside others, state of C++ extensions, and parameters that such an extension overwrites.
    """
    parameters = {id(p): p for p in model.parameters()}
    held = _Held()
    for module in model.modules():
        held.follow(module)
    for parameter in parameters.values():
        # BinaryNet keeps the real weight in an attribute of the parameter.
        held.follow(parameter)
    tensors = [t for t in held.tensors.values() if id(t) not in parameters]
    copies = [(t, t.data, t.detach().clone()) for t in tensors]
    # An embedding with max_norm overwrites its weight where no function mode sees it.
    unseen = {id(m.weight) for m in model.modules() if getattr(m, "max_norm", None) is not None}
    copies += [(p, p.data, p.detach().clone()) for key, p in parameters.items() if key in unseen]
    pointers = [(p, p.data) for p in parameters.values()]
    flags = [(p, p.requires_grad, p.grad, None if p.grad is None else p.grad.clone()) for p in parameters.values()]
    guard = _CopyBeforeWrite([p for key, p in parameters.items() if key not in unseen])
    try:
        with preserve_generators([*parameters.values(), *tensors]), guard:
            yield
    finally:
        held.put_back()
        with torch.no_grad():
            for p, data in pointers:
                if p.data_ptr() != data.data_ptr() or p.shape != data.shape:
                    p.data = data
            for t, data, value in [*copies, *guard.copies]:
                if t.data_ptr() != data.data_ptr() or t.shape != data.shape:
                    t.data = data
                if not same(t.detach(), value):
                    t.data.copy_(value)
            for p, requires_grad, grad, its_value in flags:
                p.requires_grad_(requires_grad)
                p.grad = grad
                if grad is not None and its_value is not None and not same(grad, its_value):
                    grad.copy_(its_value)


@contextlib.contextmanager
def preserve_generators(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Put back the global generators of Python, numpy and torch, those of the tensors' devices too."""
    numpy = sys.modules.get("numpy")
    numpy_state = numpy.random.get_state() if numpy is not None else None
    python_state = random.getstate()
    devices = sorted({t.device.index for t in tensors if t.device.type == "cuda"})
    try:
        with torch.random.fork_rng(devices=devices):
            yield
    finally:
        random.setstate(python_state)
        if numpy is not None:
            numpy.random.set_state(numpy_state)


class _CopyBeforeWrite(TorchFunctionMode):
    """Copies a parameter before the first torch function that writes into its memory."""

    def __init__(self, parameters: list[Tensor]) -> None:
        super().__init__()
        self.copies: list[tuple[Tensor, Tensor, Tensor]] = []
        self._pending: dict[int, list[Tensor]] = {}
        for p in parameters:
            self._pending.setdefault(storage(p), []).append(p)

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._pending and writes(func, kwargs):
            flat = [a for arg in (*args, *kwargs.values()) for a in (arg if isinstance(arg, (list, tuple)) else (arg,))]
            for tensor in flat:
                if isinstance(tensor, Tensor):
                    for p in self._pending.pop(storage(tensor), ()):
                        self.copies.append((p, p.data, p.detach().clone()))
        return func(*args, **kwargs)


def writes(func: Any, kwargs: dict[str, Any]) -> bool:
    """Whether a torch function writes into one of its arguments."""
    name = getattr(func, "__name__", "")
    if name.endswith("__"):
        return name in _WRITE or name in _INPLACE
    return name.endswith("_") or name in _WRITE or kwargs.get("out") is not None


def storage(tensor: Tensor) -> int:
    """A number that tensors share that share their memory."""
    try:
        return tensor.untyped_storage().data_ptr()
    except (RuntimeError, NotImplementedError):  # sparse, nested and other tensors without one
        return id(tensor)


class _Held:
    """What modules hold in their attributes: tensors, and for all else the actions that put it back."""

    def __init__(self) -> None:
        self.tensors: dict[int, Tensor] = {}
        self._actions: list[Callable[[], None]] = []
        # The objects themselves: an id is only unique while its object lives.
        self._seen: dict[int, Any] = {}

    def follow(self, value: Any, depth: int = 0) -> None:
        """Note everything that can be reached from here."""
        if depth and isinstance(value, Tensor):
            if not nn.parameter.is_lazy(value) and value.layout == torch.strided:
                self.tensors[id(value)] = value
            return
        if id(value) in self._seen or depth > _DEPTH or (depth and isinstance(value, nn.Module)):
            return
        self._seen[id(value)] = value
        inner: Iterable[Any] = ()
        if depth == 0 or _is_plain_object(value):
            attributes = vars(value)
            self._actions.append(_mapping_again(attributes))
            inner = list(attributes.values())
        if isinstance(value, dict):
            self._actions.append(_mapping_again(value))
            inner = list(value.values())
        elif isinstance(value, (list, set, deque, bytearray)):
            self._actions.append(_collection_again(value))
            inner = () if isinstance(value, bytearray) else list(value)
        elif isinstance(value, tuple):
            inner = value
        elif depth:
            self._generator(value)
        if depth < 2 or not isinstance(inner, list) or len(inner) <= _LENGTH:
            for item in inner:
                if not isinstance(item, (str, int, float, bool, bytes, type(None))):
                    self.follow(item, depth + 1)

    def put_back(self) -> None:
        """Undo what was changed since."""
        for action in self._actions:
            action()

    def _generator(self, value: Any) -> None:
        if isinstance(value, torch.Generator):
            state = value.get_state()
            self._actions.append(lambda: void(value.set_state(state)))
        elif isinstance(value, random.Random):
            python_state = value.getstate()
            self._actions.append(lambda: value.setstate(python_state))
        numpy = sys.modules.get("numpy")
        if numpy is None:
            return
        if isinstance(value, numpy.random.Generator):
            bits, bit_state = value.bit_generator, value.bit_generator.state
            self._actions.append(lambda: setattr(bits, "state", bit_state))
        elif isinstance(value, numpy.random.RandomState):
            numpy_state = value.get_state()
            self._actions.append(lambda: value.set_state(numpy_state))
        elif isinstance(value, numpy.ndarray) and value.flags.writeable:
            copy = value.copy()
            self._actions.append(lambda: value.__setitem__(..., copy))


def void(value: Any) -> None:
    """Drop a value."""


def _is_plain_object(value: Any) -> bool:
    return hasattr(value, "__dict__") and not isinstance(value, _NOT_FOLLOWED) and not callable(value)


def _mapping_again(mapping: dict[Any, Any]) -> Callable[[], None]:
    """The action that fills a dict again, in place: handles of the user's hooks point at the very dictionaries."""
    before = list(mapping.items())

    def again() -> None:
        now = list(mapping.items())
        if len(now) != len(before) or any(
            a[0] is not b[0] or a[1] is not b[1] for a, b in zip(now, before, strict=True)
        ):
            mapping.clear()
            # Not update(): a Counter would add.
            for key, value in before:
                mapping[key] = value

    return again


def _collection_again(collection: Any) -> Callable[[], None]:
    before = list(collection)

    def again() -> None:
        now = list(collection)
        if len(now) != len(before) or any(a is not b for a, b in zip(now, before, strict=True)):
            collection.clear()
            (collection.update if isinstance(collection, set) else collection.extend)(before)

    return again
