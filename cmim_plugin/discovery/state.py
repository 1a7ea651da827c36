"""Undo everything that a forward pass changes."""

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

_MAX_DEPTH, _MAX_LENGTH = 4, 4096  # of nested containers and objects; the items of a data set are more
_MAX_MODULE_DEPTH = 2  # that of a module in a list attribute; a trainer's callback has deeper ones, which are not ours
_THREADING_PACKAGES = ("threading", "queue", "concurrent", "multiprocessing", "asyncio", "logging")
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
    # BinaryNet keeps the real weight in an attribute of the parameter. TorchScript has no state in attributes.
    holders = map(vars, [*model.modules(), *parameters])
    with contextlib.ExitStack() as undo:
        tensors = register_undo(undo, [*holders, *parameters, *model.buffers(), *(p.grad for p in parameters), inputs])
        for module in model.modules():
            undo.callback(setattr, module, "training", module.training)
        for t in tensors:
            plain = type(t.data) is Tensor  # subclasses may not support comparisons
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
    """``flags``: (requires_grad, grad) of a leaf."""
    if flags and not tensor.is_leaf and _compat.base_of(tensor) is None:
        tensor.detach_()  # the forward wrote something with a gradient into its input
    if tensor.data_ptr() != data.data_ptr() or tensor.shape != data.shape:
        tensor.data = data
    if values is not None and not same(tensor.detach(), values):
        tensor.data.copy_(values)
    if flags and tensor.is_leaf:
        tensor.requires_grad_(flags[0])
        tensor.grad = flags[1]


def register_undo(undo: contextlib.ExitStack, values: Iterable[Any]) -> list[Tensor]:
    """Register the undo of each change in containers and objects. The tensors in them are returned instead."""
    tensors: list[Tensor] = []
    visited: set[int] = set()
    queue = [(value, 0) for value in values]
    for value, depth in queue:
        if id(value) in visited:
            continue
        visited.add(id(value))
        if isinstance(value, Tensor):
            if is_strided(value) and not nn.parameter.is_lazy(value):
                tensors.append(value)
        elif isinstance(value, nn.Module):
            # modules() of the model does not list one in a list or tuple.
            queue += [(vars(module), 0) for module in value.modules()] if depth <= _MAX_MODULE_DEPTH else []
        elif depth <= _MAX_DEPTH:
            containers: list[Any] = [value] if isinstance(value, (dict, list, set, deque, bytearray)) else []
            containers += [vars(value)] if _has_state(value) else []
            fixed = isinstance(value, (tuple, types.MethodType, functools.partial))
            items = gc.get_referents(value) if fixed else []
            for container in containers:
                content = _content(container)
                undo.callback(_refill, container, content)
                items += content
            _register_undo_of_leaf(undo, value)
            if depth < 2 or len(items) <= _MAX_LENGTH:
                queue += [(item, depth + 1) for item in items if type(item) not in _HOLD_NOTHING]
    return tensors


def _has_state(value: Any) -> bool:
    """Whether a value has attributes to undo. Not torch's own functions, which cache in them, and not queues and locks,
    for whose content threads wait."""
    package = type(value).__module__.partition(".")[0]
    excluded = package in _THREADING_PACKAGES or (callable(value) and package == "torch")
    no_object = isinstance(value, (type, types.ModuleType, types.FunctionType, types.MethodType))
    return hasattr(value, "__dict__") and not excluded and not no_object


def _register_undo_of_leaf(undo: contextlib.ExitStack, value: Any) -> None:
    """Register the undo of a random generator or a numpy array."""
    numpy: Any = sys.modules.get("numpy")
    if isinstance(value, random.Random) and not isinstance(value, random.SystemRandom):  # has no state
        undo.callback(value.setstate, value.getstate())
    elif isinstance(value, torch.Generator) or (numpy and isinstance(value, numpy.random.RandomState)):
        undo.callback(value.set_state, value.get_state())
    elif numpy and isinstance(value, numpy.random.Generator):
        undo.callback(setattr, value.bit_generator, "state", value.bit_generator.state)
    elif numpy and isinstance(value, numpy.ndarray) and value.flags.writeable:
        undo.callback(value.__setitem__, ..., value.copy())


def _content(container: Any) -> list[Any]:
    """The elements of a container; of a dictionary, keys and values in turn."""
    return [x for item in container.items() for x in item] if isinstance(container, dict) else list(container)


def _refill(container: Any, content: list[Any]) -> None:
    """Put the content back into the same container: handles of hooks refer to it."""
    if list(map(id, _content(container))) == list(map(id, content)):
        return
    container.clear()
    if isinstance(container, dict):
        for key, value in zip(content[::2], content[1::2], strict=True):  # not update(): a Counter would add
            container[key] = value
    elif isinstance(container, set):
        container.update(content)
    else:
        container.extend(content)
