"""Run a model without a trace: everything that a forward pass can change is put back."""

from __future__ import annotations

import contextlib
import functools
import gc
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

# How far containers and objects are followed into each other. Longer ones, as the items of a data set, are not.
_DEPTH, _LENGTH = 4, 4096
# A module in a list of a module is as far away; one that a trainer's callback holds is farther, and not ours to copy.
_MODULES_DEPTH = 2
_OF_THREADS = ("threading", "queue", "concurrent", "multiprocessing", "asyncio", "logging")
_HOLD_NOTHING = {str, int, float, bool, bytes, type(None), *weakref.ProxyTypes}


def same(a: Tensor, b: Tensor) -> bool:
    """Equal element by element, NaN equal to NaN."""
    return torch.equal(a, b) or (a.is_floating_point() and torch.equal(a.nan_to_num(), b.nan_to_num()))


@contextlib.contextmanager
def preserve_state(model: nn.Module, inputs: Any) -> Iterator[None]:
    """Put back, afterwards, everything that forward passes change in a model, in its inputs and around it.

    That is: parameters, buffers and other tensors, their gradients and attributes; modes, hooks and other attributes
    of the modules; lists (also of modules), dicts, sets, deques, numpy arrays and plain objects in these attributes, up
    to four levels deep; the global random generators and those that the model holds (torch, numpy, Python).

    Not put back: global variables, class attributes, variables of closures, ``__slots__``, iterators, files,
    elements of containers of more than 4,096 that are within others, and state of C++ extensions.
    """
    parameters = list(model.parameters())
    # BinaryNet keeps the real weight in an attribute of the parameter. TorchScript keeps its state in no attribute.
    holders = map(vars, [*model.modules(), *parameters])
    with contextlib.ExitStack() as undo:
        tensors = note_changes(undo, [*holders, *parameters, *model.buffers(), *(p.grad for p in parameters), inputs])
        for module in model.modules():
            undo.callback(setattr, module, "training", module.training)
        for t in tensors:
            plain = type(t.data) is Tensor  # others may not be comparable
            flags = (t.requires_grad, t.grad) if t.is_leaf else None
            undo.callback(_restore, t, t.data, t.detach().clone() if plain else None, flags)
        with preserve_generators(tensors):
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


def _restore(tensor: Tensor, data: Tensor, values: Tensor | None, flags: tuple[bool, Tensor | None] | None) -> None:
    """``flags``: of a leaf, whether it required a gradient, and its gradient."""
    if flags and not tensor.is_leaf and _compat.base_of(tensor) is None:
        tensor.detach_()  # the forward wrote something trained into its input
    if tensor.data_ptr() != data.data_ptr() or tensor.shape != data.shape:
        tensor.data = data
    if values is not None and not same(tensor.detach(), values):
        tensor.data.copy_(values)
    if flags and tensor.is_leaf:
        tensor.requires_grad_(flags[0])
        tensor.grad = flags[1]


def note_changes(undo: contextlib.ExitStack, values: Iterable[Any]) -> list[Tensor]:
    """Note how to undo each change of what containers and objects hold. The tensors among it are returned instead."""
    tensors: list[Tensor] = []
    seen: set[int] = set()
    line = [(value, 0) for value in values]
    for value, depth in line:
        if id(value) in seen:
            continue
        seen.add(id(value))
        if isinstance(value, Tensor):
            if is_strided(value) and not nn.parameter.is_lazy(value):
                tensors.append(value)
        elif isinstance(value, nn.Module):
            # One in a list or tuple is none of the model's modules.
            line += [(vars(module), 0) for module in value.modules()] if depth <= _MODULES_DEPTH else []
        elif depth <= _DEPTH:
            containers: list[Any] = [value] if isinstance(value, (dict, list, set, deque, bytearray)) else []
            containers += [vars(value)] if _has_state(value) else []
            fixed = isinstance(value, (tuple, types.MethodType, functools.partial))
            inner = gc.get_referents(value) if fixed else []
            for container in containers:
                before = _content(container)
                undo.callback(_refill, container, before)
                inner += before
            _keep_state(undo, value)
            if depth < 2 or len(inner) <= _LENGTH:
                line += [(item, depth + 1) for item in inner if type(item) not in _HOLD_NOTHING]
    return tensors


def _has_state(value: Any) -> bool:
    """Whether it has attributes that a forward may change. Torch's own functions keep what they have looked up in
    theirs, threads wait for what queues and locks hold."""
    package = type(value).__module__.partition(".")[0]
    passed_over = package in _OF_THREADS or (callable(value) and package == "torch")
    no_object = isinstance(value, (type, types.ModuleType, types.FunctionType, types.MethodType))
    return hasattr(value, "__dict__") and not passed_over and not no_object


def _keep_state(undo: contextlib.ExitStack, value: Any) -> None:
    """Of random generators and arrays."""
    numpy: Any = sys.modules.get("numpy")
    if isinstance(value, random.Random) and not isinstance(value, random.SystemRandom):  # that one has no state
        undo.callback(value.setstate, value.getstate())
    elif isinstance(value, torch.Generator) or (numpy and isinstance(value, numpy.random.RandomState)):
        undo.callback(value.set_state, value.get_state())
    elif numpy and isinstance(value, numpy.random.Generator):
        undo.callback(setattr, value.bit_generator, "state", value.bit_generator.state)
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
