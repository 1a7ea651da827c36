"""Run a model without a trace: everything that a forward pass can change is put back."""

from __future__ import annotations

import contextlib
import functools
import random
import sys
import types
import weakref
from collections import deque
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from .. import _compat
from .inputs import is_strided

# How far containers and objects are followed into each other, and up to which length.
_DEPTH, _LENGTH = 4, 4096
_NOT_FOLLOWED = (nn.Module, type, types.ModuleType, types.FunctionType, types.MethodType, torch.Generator)
_OF_THREADS = ("threading", "queue", "concurrent", "multiprocessing", "asyncio", "logging")
_PLAIN = (str, int, float, bool, bytes, type(None))


def same(a: Tensor, b: Tensor) -> bool:
    """Equal element by element, NaN equal to NaN."""
    return torch.equal(a, b) or (a.is_floating_point() and torch.equal(a.nan_to_num(), b.nan_to_num()))


@contextlib.contextmanager
def preserve_state(model: nn.Module, inputs: Iterable[Tensor] = ()) -> Iterator[None]:
    """Put back, afterwards, everything that forward passes change in a model, in its inputs and around it.

    That is: parameters, buffers and other tensors, their gradients and attributes; modes, hooks and other attributes
    of the modules; lists, dicts, sets, deques, numpy arrays and plain objects in these attributes, four levels deep;
    the global random generators and those that the model holds (torch, numpy, Python).

    Not put back: global variables, class attributes, variables of closures, ``__slots__``, iterators, files,
    containers of more than 4,096 elements inside others, and state of C++ extensions.
    """
    parameters = list(model.parameters())
    with contextlib.ExitStack() as undo:
        # BinaryNet keeps the real weight in an attribute of the parameter.
        held = _held(undo, map(vars, [*model.modules(), *parameters]))
        for module in model.modules():
            if isinstance(module, torch.jit.ScriptModule):  # whose state is in no attribute
                undo.callback(setattr, module, "training", module.training)
                held += [*module.buffers(recurse=False), *module.parameters(recurse=False)]
        inputs = list(filter(is_strided, inputs))
        grads = [p.grad for p in parameters if p.grad is not None]
        for tensor in (*held, *grads, *inputs):
            if type(tensor.data) is Tensor:  # others may not be comparable
                undo.callback(_put_back_values, tensor, tensor.data, tensor.detach().clone())
        for p in parameters + inputs:  # the last is undone first: a gradient needs the shape of its parameter
            if p.is_leaf:
                undo.callback(setattr, p, "grad", p.grad)
                undo.callback(_put_back_flag, p, p.requires_grad)
            undo.callback(_point_at, p, p.data)
        with preserve_generators(held):
            yield


@contextlib.contextmanager
def preserve_generators(tensors: Iterable[Tensor]) -> Iterator[None]:
    """Put back the global generators of Python, numpy and torch, those of the tensors' devices too."""
    devices = sorted({t.device.index for t in tensors if t.device.type == "cuda"})
    with contextlib.ExitStack() as undo:
        undo.callback(random.setstate, random.getstate())
        if (numpy := sys.modules.get("numpy")) is not None:
            undo.callback(numpy.random.set_state, numpy.random.get_state())
        undo.enter_context(torch.random.fork_rng(devices=devices))
        yield


def _point_at(tensor: Tensor, data: Tensor) -> None:
    if tensor.data_ptr() != data.data_ptr() or tensor.shape != data.shape:
        tensor.data = data


def _put_back_flag(tensor: Tensor, requires_grad: bool) -> None:
    if not tensor.is_leaf and _compat.base_of(tensor) is None:  # the forward wrote a trained tensor into its input
        tensor.detach_()
    if tensor.is_leaf:
        tensor.requires_grad_(requires_grad)


def _put_back_values(tensor: Tensor, data: Tensor, values: Tensor) -> None:
    _point_at(tensor, data)
    if not same(tensor.detach(), values):
        tensor.data.copy_(values)


@contextlib.contextmanager
def preserve_containers(inputs: Any) -> Iterator[None]:
    """Put back what a forward takes out of the lists and dictionaries of its inputs, or puts into them."""
    with contextlib.ExitStack() as undo:
        _held(undo, [inputs])
        yield


def _held(undo: contextlib.ExitStack, values: Iterable[Any]) -> list[Tensor]:
    """The tensors that containers and objects hold; of all else that they hold, how to undo a change is noted."""
    tensors: list[Tensor] = []
    seen: set[int] = set()
    line: list[tuple[Any, int]] = [(value, 0) for value in values]
    for value, depth in line:
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            if not nn.parameter.is_lazy(value) and not value.is_meta and is_strided(value):
                tensors.append(value)
            continue
        if depth > _DEPTH:
            continue
        containers = [value] if isinstance(value, (dict, list, set, deque, bytearray)) else []
        inner: list[Any] = list(value) if isinstance(value, tuple) else []
        if isinstance(value, types.MethodType):
            inner.append(value.__self__)
        elif isinstance(value, functools.partial):
            inner += [value.func, *value.args, *value.keywords.values()]
        elif hasattr(value, "__dict__") and not isinstance(value, _NOT_FOLLOWED) and _is_state(value):
            containers.append(vars(value))
        for container in containers:
            before = _content(container)
            undo.callback(_refill, container, before)
            inner += before
        _keep_state(undo, value)
        if depth < 2 or len(inner) <= _LENGTH:
            followed = (i for i in inner if type(i) not in weakref.ProxyTypes and not isinstance(i, _PLAIN))
            line += [(item, depth + 1) for item in followed]
    return tensors


def _is_state(value: Any) -> bool:
    """Not one of torch's own functions, which keep what they have looked up, and nothing that threads wait for."""
    package = type(value).__module__.partition(".")[0]
    return package not in _OF_THREADS and not (callable(value) and package == "torch")


def _keep_state(undo: contextlib.ExitStack, value: Any) -> None:
    """Of random generators and arrays."""
    numpy: Any = sys.modules.get("numpy")
    if isinstance(value, random.Random) and not isinstance(value, random.SystemRandom):  # that one has no state
        undo.callback(value.setstate, value.getstate())
    elif isinstance(value, torch.Generator) or (numpy and isinstance(value, numpy.random.RandomState)):
        undo.callback(value.set_state, value.get_state())
    elif numpy and isinstance(value, numpy.random.Generator):
        bits = value.bit_generator
        undo.callback(setattr, bits, "state", bits.state)
    elif numpy and isinstance(value, numpy.ndarray) and value.flags.writeable:
        undo.callback(value.__setitem__, ..., value.copy())


def _content(container: Any) -> list[Any]:
    """The elements of a container; keys and values in turn of a dictionary."""
    return [x for item in container.items() for x in item] if isinstance(container, dict) else list(container)


def _refill(container: Any, before: list[Any]) -> None:
    """In place: handles of the user's hooks point at the very dictionaries."""
    if list(map(id, _content(container))) == list(map(id, before)):
        return
    container.clear()
    if isinstance(container, dict):
        for key, value in zip(before[::2], before[1::2], strict=True):  # not update(): a Counter would add
            container[key] = value
    elif isinstance(container, set):
        container.update(before)
    else:
        container.extend(before)
