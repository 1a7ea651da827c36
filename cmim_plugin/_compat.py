"""Every use of torch API that is private, or that only some releases have: what it is for, and the fallback without it.

torch 2.6 to 2.14 have all of it. tests/test_compat.py removes each in turn.
"""

from __future__ import annotations

import contextlib
import sys
import threading
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode


def _private(name: str, without: Any) -> Callable[..., Any]:
    """A function of torch's C++ module; where a release lacks it, one that returns ``without``."""
    return getattr(torch._C, name, lambda *args: without)


_current_graph_task_id = _private("_current_graph_task_id", -1)
_are_functorch_transforms_active = _private("_are_functorch_transforms_active", False)
_get_tracing_state = _private("_get_tracing_state", None)
_get_dispatch_mode = _private("_get_dispatch_mode", None)
_len_torch_dispatch_stack = _private("_len_torch_dispatch_stack", 0)
_will_engine_execute_node = _private("_will_engine_execute_node", True)
_len_torch_function_stack = getattr(torch._C, "_len_torch_function_stack", None)
_pop_torch_function_stack = getattr(torch._C, "_pop_torch_function_stack", None)
_push_on_torch_function_stack = getattr(torch._C, "_push_on_torch_function_stack", None)


def outside_training_step() -> bool:
    """Whether this thread is within a backward pass (a checkpoint is recomputed), a torch.func transform, forward-mode
    differentiation, torch.jit.trace, make_fx or torch.export. A forward pass is then not one of a training step.

    Fallback: False, and such a pass is captured like any other.
    """
    if torch.compiler.is_compiling():
        # Not is_exporting(), which torch 2.11 takes for True in all that it compiles.
        return bool(getattr(torch.compiler, "_is_exporting_flag", False))
    proxy_mode = getattr(getattr(torch._C, "_TorchDispatchModeKey", None), "PROXY", None)
    return bool(
        _current_graph_task_id() != -1
        or is_transformed()
        or getattr(forward_ad, "_current_level", -1) >= 0
        or _get_tracing_state() is not None
        or (proxy_mode is not None and _get_dispatch_mode(proxy_mode) is not None)
    )


def is_transformed() -> bool:
    """Whether a torch.func transform runs, such as vmap. Fallback: False, and a tap within one raises."""
    return bool(_are_functorch_transforms_active())


def accumulates(node: Any) -> bool:
    """Whether the running backward pass adds to the ``grad`` of a leaf, given by its graph node: ``backward()`` does,
    ``autograd.grad()`` does not. Fallback: True, and an ``autograd.grad()`` of one of two losses counts, too."""
    try:
        return bool(_will_engine_execute_node(node))
    except RuntimeError:  # "a leaf node was passed, but we are currently running autograd.grad()"
        return False


def gradient_hooks(tensor: Tensor) -> list[Any]:
    """The hooks that were registered on a tensor's gradient. Fallback: ``[None]``, which is no hook of ours."""
    return list((getattr(tensor, "_backward_hooks", {0: None}) or {}).values())


def base_of(tensor: Tensor) -> Tensor | None:
    """The tensor that this one is a view of. Fallback: None, and a write into a view is not seen in the rest."""
    return getattr(tensor, "_base", None)


def remove_hooks(module: nn.Module, mine: Callable[[Any], bool]) -> None:
    """Take those hooks off a module that are ``mine``, without their handles. Fallback: they stay."""
    for name in ("_forward_pre_hooks", "_forward_hooks", "_load_state_dict_post_hooks"):
        hooks = getattr(module, name, {})
        for key in [key for key, hook in hooks.items() if mine(hook)]:
            del hooks[key]
            for flags in ("_with_kwargs", "_always_called"):
                getattr(module, name + flags, {}).pop(key, None)


def running_calls(module: nn.Module) -> int:
    """How many calls of a module are on this thread's Python stack. Fallback: 0, and a nested call starts anew."""
    code = getattr(getattr(nn.Module, "_call_impl", None), "__code__", None)
    count = 0
    frame: FrameType | None = sys._getframe()
    while frame is not None and code is not None:
        count += frame.f_code is code and frame.f_locals.get("self") is module
        frame = frame.f_back
    return count


def switch_mode(mode: TorchFunctionMode, on: bool) -> None:
    """Put a mode at the bottom of this thread's stack, or take it off from anywhere: after an interrupt it stays there,
    and others must find their own modes on top. Fallback, and in compiled code: put it on top, or take off the top."""
    length, pop, push = _len_torch_function_stack, _pop_torch_function_stack, _push_on_torch_function_stack
    if torch.compiler.is_compiling() or length is None or pop is None or push is None:
        if on:
            mode.__enter__()
        else:
            mode.__exit__(None, None, None)
        return
    others = [other for other in (pop() for _ in range(length())) if other is not mode]  # the top one first
    for each in reversed([*others, mode] if on else others):
        push(each)


def all_gather(output: Tensor, input: Tensor) -> None:
    """Gather tensors of one shape from all ranks into one. Fallback for ``all_gather_single``, which 2.14 introduced:
    ``all_gather_into_tensor``, its name before."""
    gather = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
    gather(output, input)


def thread() -> int:
    """The id of this thread. In compiled code: of the thread that compiled it, a constant. Fallback: it is traced."""
    return threading.get_ident()


# As torch.compiler.assume_constant_result does, which imports torch._dynamo, and that takes seconds.
thread._dynamo_marked_constant = True  # type: ignore[attr-defined]


def force_eager() -> contextlib.AbstractContextManager[Any]:
    """What was compiled with ``torch.compile`` runs as plain Python. Fallback: compiled code hides its calls.

    ``set_stance`` imports ``torch._dynamo``, which takes seconds; where that was not imported yet, nothing is compiled.
    """
    set_stance = getattr(torch.compiler, "set_stance", contextlib.nullcontext)
    return set_stance("force_eager") if "torch._dynamo" in sys.modules else contextlib.nullcontext()


def unseen() -> contextlib.AbstractContextManager[Any]:
    """Torch functions called within are seen by no torch-function mode. Fallback: they are, which costs time."""
    return getattr(torch._C, "DisableTorchFunction", contextlib.nullcontext)()


def unrecorded() -> contextlib.AbstractContextManager[Any]:
    """Operations called within are not recorded by selective activation checkpointing: when it recomputes, it would
    return their results in the place of the model's own. Fallback: they are recorded."""
    if torch.compiler.is_compiling() or not _len_torch_dispatch_stack():
        return contextlib.nullcontext()
    from torch.utils import _python_dispatch, checkpoint

    recorder = getattr(checkpoint, "_CachingTorchDispatchMode", ())
    modes: list[Any] = getattr(_python_dispatch, "_get_current_dispatch_mode_stack", list)()
    recorded = any(isinstance(mode, recorder) for mode in modes)
    without_modes = getattr(_python_dispatch, "_disable_current_modes", contextlib.nullcontext)
    return without_modes() if recorded else contextlib.nullcontext()
