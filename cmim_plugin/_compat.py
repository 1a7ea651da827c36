"""Every use of torch API that is private, or that only some releases have: what it is for, and what we do without it.

Each is looked up once, under a name of this module. A test takes them away one by one.
"""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable
from types import FrameType
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode

# torch 2.6 to 2.14 have all of these but the last, which 2.14 introduced.
_current_graph_task_id = getattr(torch._C, "_current_graph_task_id", None)
_functorch_transforms_active = getattr(torch._C, "_are_functorch_transforms_active", None)
_jit_tracing_state = getattr(torch._C, "_get_tracing_state", None)
_mode_stack_length = getattr(torch._C, "_len_torch_function_stack", None)
_pop_mode = getattr(torch._C, "_pop_torch_function_stack", None)
_push_mode = getattr(torch._C, "_push_on_torch_function_stack", None)
_will_execute = getattr(torch._C, "_will_engine_execute_node", None)
_dispatch_modes = getattr(torch._C, "_len_torch_dispatch_stack", None)
_dispatch_mode = getattr(torch._C, "_get_dispatch_mode", None)
_proxy_mode = getattr(getattr(torch._C, "_TorchDispatchModeKey", None), "PROXY", None)
_all_gather_single = getattr(dist, "all_gather_single", None)


def is_no_training_step() -> bool:
    """Whether this thread is within a backward pass (a checkpoint is recomputed), a torch.func transform, forward-mode
    differentiation, torch.jit.trace, make_fx or torch.export: a forward pass is then none of a training step.

    Without them: False, and such a pass is captured like any other.
    """
    if torch.compiler.is_compiling():
        # Not is_exporting(), which torch 2.11 takes for True in all that it compiles.
        return bool(getattr(torch.compiler, "_is_exporting_flag", False))
    return (
        (_current_graph_task_id is not None and _current_graph_task_id() != -1)
        or (_functorch_transforms_active is not None and _functorch_transforms_active())
        or getattr(forward_ad, "_current_level", -1) >= 0
        or (_jit_tracing_state is not None and _jit_tracing_state() is not None)
        or (_dispatch_mode is not None and _proxy_mode is not None and _dispatch_mode(_proxy_mode) is not None)
    )


def accumulates(node: Any) -> bool:
    """Whether the backward pass that runs adds to the ``grad`` of a leaf, by its node, unlike ``torch.autograd.grad``.
    Without it: True, and an ``autograd.grad`` of one of two losses counts as a backward pass."""
    if _will_execute is None:
        return True
    try:
        return bool(_will_execute(node))
    except RuntimeError:  # "a leaf node was passed, but we are currently running autograd.grad()"
        return False


def gradient_hooks(tensor: Tensor) -> list[Any] | None:
    """The hooks that were registered on a tensor's gradient. Without it: None, and no way is taken that needs it."""
    try:
        return list((tensor._backward_hooks or {}).values())
    except AttributeError:
        return None


def base_of(tensor: Tensor) -> Tensor | None:
    """The tensor that this one is a view of. Without it: None, and a write into a view is not seen in the rest."""
    return getattr(tensor, "_base", None)


def drop_hooks(module: nn.Module, mine: Callable[[Any], bool]) -> None:
    """Take those hooks off a module that are ``mine``, without their handles. Without it: they stay."""
    for name in ("_forward_pre_hooks", "_forward_hooks", "_load_state_dict_post_hooks"):
        hooks = getattr(module, name, {})
        for key in [key for key, hook in hooks.items() if mine(hook)]:
            del hooks[key]
            for flags in ("_with_kwargs", "_always_called"):
                getattr(module, name + flags, {}).pop(key, None)


def running_calls(module: nn.Module) -> int:
    """How many calls of a module are on this thread's Python stack. Without it: 0, and a nested call starts anew."""
    call = getattr(nn.Module, "_call_impl", None)
    code = getattr(call, "__code__", None)
    count = 0
    frame: FrameType | None = sys._getframe()
    while frame is not None and code is not None:
        if frame.f_code is code and frame.f_locals.get("self") is module:
            count += 1
        frame = frame.f_back
    return count


def enter_mode_below(mode: TorchFunctionMode) -> None:
    """Put a mode on this thread's stack, below all that lie there: an interrupt then ends the modes of others first.
    Without it, and in compiled code: on top."""
    if torch.compiler.is_compiling() or _mode_stack_length is None or _pop_mode is None or _push_mode is None:
        mode.__enter__()
        return
    above = [_pop_mode() for _ in range(_mode_stack_length())]
    for each in (mode, *reversed(above)):
        _push_mode(each)


def leave_mode(mode: TorchFunctionMode) -> None:
    """Take a mode off this thread's stack, wherever it lies. Without it, and in compiled code: the one on top."""
    if torch.compiler.is_compiling() or _mode_stack_length is None or _pop_mode is None or _push_mode is None:
        mode.__exit__(None, None, None)
        return
    above = []
    while _mode_stack_length():
        top = _pop_mode()
        if top is mode:
            break
        above.append(top)
    for other in reversed(above):
        _push_mode(other)


def all_gather(output: Tensor, input: Tensor) -> None:
    """Gather tensors of one shape from all ranks into one. torch 2.14 renamed ``all_gather_into_tensor``."""
    (_all_gather_single or dist.all_gather_into_tensor)(output, input)


def constant_when_compiled(function: Callable[[], int]) -> Callable[[], int]:
    """``torch.compiler.assume_constant_result``, without its import of ``torch._dynamo``, which takes seconds. Where a
    release reads another mark, the function is traced."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def force_eager() -> contextlib.AbstractContextManager[Any]:
    """What was compiled with ``torch.compile`` runs as plain Python. Without it: compiled code hides its calls.

    ``set_stance`` imports ``torch._dynamo``, which takes seconds; where that was not imported yet, nothing is compiled.
    """
    set_stance = getattr(torch.compiler, "set_stance", contextlib.nullcontext)
    return set_stance("force_eager") if "torch._dynamo" in sys.modules else contextlib.nullcontext()


def unseen() -> contextlib.AbstractContextManager[Any]:
    """Torch functions called within are seen by no torch-function mode. Without it: they are, which costs time."""
    return getattr(torch._C, "DisableTorchFunction", contextlib.nullcontext)()


def unrecorded() -> contextlib.AbstractContextManager[Any]:
    """Operations called within are not recorded by selective activation checkpointing: when it recomputes, it would
    return their results in the place of the model's own. Without it: they are recorded."""
    if torch.compiler.is_compiling() or _dispatch_modes is None or not _dispatch_modes():
        return contextlib.nullcontext()
    from torch.utils import _python_dispatch, checkpoint

    recorder = getattr(checkpoint, "_CachingTorchDispatchMode", ())
    modes: list[Any] = getattr(_python_dispatch, "_get_current_dispatch_mode_stack", list)()
    if not any(isinstance(mode, recorder) for mode in modes):
        return contextlib.nullcontext()
    return getattr(_python_dispatch, "_disable_current_modes", contextlib.nullcontext)()
