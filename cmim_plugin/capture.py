"""Hooks on the model: one forward pass becomes rows of a_B and a_F, tap by tap.

What these hooks promise:

- They change nothing that the model returns, and raise nothing. What goes wrong is kept beside the tap's name, in the
  pass, and told when the loss is asked for.
- They learn nothing. Where each activation is picked up was decided in the dry run; what belongs to one pass is one
  :class:`Pass` object, one a thread.
- They keep nothing of an activation but the sampled or pooled rows, taken within the hook: the network may overwrite
  the activation right after it.
"""

from __future__ import annotations

import sys
import threading
import weakref
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from . import _compat
from .discovery import BatchSource, BinaryActivation, Layout, Site
from .errors import CMIMError, warn_once
from .sampling import BackwardRule, Schedule, sampled, stratified_indices

BINARY, LATENT = 0, 1
# Passes in a row without a loss (an adversarial attack takes dozens) before that is told.
_FORGOTTEN = 100
_FORGOTTEN_WARNING = (
    f"CMIM captured {_FORGOTTEN} forward passes and was asked for no loss. Add cmim(model) to the loss of each "
    "training step, or call cmim.remove()."
)


@dataclass(frozen=True)
class Tap:
    """A binary activation that is contrasted. Everything about it was decided in the dry run.

    Attributes:
        name: of the binarization, as :func:`find_binary_activations` gives it.
        channels: channels of a_B.
        latent_channels: channels of what it is contrasted with: a_F, or the teacher's activation.
        module: qualified name of the module that binarizes.
        binary, latent: where a_B and a_F are picked up; no latent where a teacher stands in for it.
        layouts: how both are read.
    """

    name: str
    channels: int
    latent_channels: int
    module: str
    binary: Site
    latent: Site | None
    layouts: tuple[Layout, Layout]

    @classmethod
    def of(cls, found: BinaryActivation) -> Tap:
        """The tap of a binary activation that can be tapped."""
        assert found.binary and found.binary_layout and found.latent_layout
        layouts = (found.binary_layout, found.latent_layout)
        return cls(found.name, found.channels, found.latent_channels, found.module, found.binary, found.latent, layouts)


class Pair:
    """What one pass left of one tap.

    Attributes:
        rows: ``(n, C_b)`` of a_B and ``(n, C_f)`` of a_F, in the autograd graph; None until seen.
        index: ``(n,)`` the positions that the rows come from, counted over the batch; None for pooled samples.
        spatial: the dimensions that the positions of one row of the batch are counted over.
        total: positions of the whole batch.
        batch: samples of the batch.
        windows: whether a sample is cut into several rows of the first dimension.
    """

    def __init__(self) -> None:
        self.rows: list[Tensor | None] = [None, None]
        self.index: Tensor | None = None
        self.spatial: torch.Size | None = None
        self.total = 0
        self.batch = 0
        self.windows = False

    @property
    def complete(self) -> bool:
        """Whether both sides were seen."""
        return self.rows[BINARY] is not None and self.rows[LATENT] is not None


class Pass:
    """One forward pass of the model, from its first hook to its last, and until its loss is asked for.

    Args:
        taps: all of them.
        scheduled: which are captured.
        draws: ``(len(scheduled), n)`` int64 random numbers to choose positions by; None to pool over all positions.
        training: whether the model is in training mode.
    """

    def __init__(self, taps: Sequence[Tap], scheduled: Sequence[int], draws: Tensor | None, training: bool) -> None:
        self.taps = taps
        self.scheduled = tuple(scheduled)
        self.draws = draws
        #: Samples in the batch, where the inputs tell.
        self.batch: int | None = None
        self.training = training
        self.compiled = torch.compiler.is_compiling()
        self.pairs = {k: Pair() for k in self.scheduled}
        #: What went wrong: tap, or None for the pass as a whole -> message.
        self.failures: dict[int | None, str] = {}
        #: Whether any module with a tap ran.
        self.entered = False
        #: Taps whose binary activation came without a gradient.
        self.without_gradient: set[int] = set()
        #: The mask that the model itself got.
        self.mask: Tensor | None = None
        #: Calls of modules that run, the innermost last, and how often each module was called so far.
        self.open: list[_Call] = []
        self.calls: dict[str, int] = {}
        #: The exception that was being handled when the pass started.
        self.error = _current_error()
        #: Within a hook of ours: our own torch calls are not the model's.
        self.muted = False
        #: Given the tap, a_B as a whole and its layout, before rows are taken.
        self.observer: Callable[[int, Tensor, Layout], None] | None = None
        #: What is asked of the backward passes.
        self.backward = BackwardRule()
        self._elements: dict[Any, tuple[Tensor, Tensor]] = {}
        self._zeros: dict[Any, Tensor] = {}

    def pick_up(self, pickups: Sequence[_Pickup], kind: str, tree: Any) -> None:
        """Take the rows of those activations that are picked up at sites of this kind."""
        for p in pickups:
            if p.site.kind == kind:
                self.attempt(p.tap, partial(self._take_at, p, tree))

    def _take_at(self, p: _Pickup, tree: Any) -> None:
        self.take(p.tap, p.side, _at(tree, p.site.path))

    def attempt(self, tap: int | None, action: Callable[[], None]) -> None:
        """Do something for a tap (None: for the pass). What goes wrong is kept, and the model goes on."""
        if torch.compiler.is_compiling():
            try:
                action()
            except CMIMError as error:
                self.failures.setdefault(tap, error.args[0])
            return
        before, self.muted = self.muted, True
        try:
            action()
        except Exception as error:
            told = str(error) if isinstance(error, CMIMError) else f"{type(error).__name__}: {error}"
            self.failures.setdefault(tap, told)
        finally:
            self.muted = before

    def close(self, hook: _Hook) -> _Call | None:
        """The innermost call of a hook's module ends, with all that was opened within it."""
        if not any(call.hook is hook for call in self.open):
            return None
        while True:
            call = self.open.pop()
            if call.listener is not None:
                _exit(call.listener)
            if call.hook is hook:
                return call

    def abandon(self) -> None:
        """The pass did not come to its end."""
        while self.open:
            self.close(self.open[-1].hook)

    def check(self, plugin: object) -> None:
        """Tell what could not be captured; warn once for each plug-in of what adds nothing to the loss.

        Raises:
            CMIMError: something went wrong, or nothing is left to train.
        """
        failures = {k: why for k, why in self.failures.items() if k is not None}
        lines = [f"Tap {self.taps[k].name}: {why}." for k, why in failures.items()]
        reached = [k for k, pair in self.pairs.items() if pair.complete and k not in self.without_gradient]
        if None in self.failures or not self.without_gradient.issuperset(failures) or (lines and not reached):
            whole = [self.failures[None]] if None in self.failures else []
            raise CMIMError("\n".join(["The forward pass could not be captured.", *whole, *lines]))
        if not self.entered:
            raise CMIMError(
                "The forward pass reached none of the taps. A model that was compiled and run before CMIM was attached "
                "does that (attach first, or call torch._dynamo.reset()), inputs that take another way through it, "
                "modules that were replaced, and hooks that other code cleared (attach again)."
            )
        missing = [k for k in self.pairs if k not in reached and k not in failures]
        lines += [f"The forward pass did not reach tap {self.taps[k].name}." for k in missing]
        for line in lines:
            warn_once(plugin, f"{line} It adds nothing to the loss.")

    def take(self, k: int, side: int, x: Tensor) -> None:
        """Take the rows of one side of a tap out of its activation."""
        tap, pair = self.taps[k], self.pairs[k]
        layout = tap.layouts[side]
        if side == BINARY and self.observer is not None:
            self.observer(k, x, layout)
        if side == BINARY and self.observer is None and not x.requires_grad:
            self.without_gradient.add(k)
            raise CMIMError(
                "its binary activation came without a gradient. Layers that were frozen do that (nothing is left to "
                "train there), and reentrant activation checkpointing (pass use_reentrant=False to checkpoint)"
            )
        wanted = tap.channels if side == BINARY else tap.latent_channels
        if (found := layout.channels(x.shape)) != wanted:
            raise CMIMError(
                f"it has {found} channels, and had {wanted} when CMIM was attached. After pruning, or after another "
                "change of the layers, attach again"
            )
        rows = x.shape[0]
        pair.batch = rows
        if layout.windowed:
            pair.windows = True
            if rows and (not self.batch or rows % self.batch):
                raise CMIMError(f"its {rows} rows are not a whole number of windows for each of {self.batch} samples")
            pair.batch = self.batch or 0
        if self.draws is None:
            pair.rows[side] = layout.pooled(x, pair.batch)
            return
        if x.device != self.draws.device:
            raise CMIMError(
                f"it is on {x.device}, the heads are on {self.draws.device}: call cmim.to({str(x.device)!r}), or "
                "attach after moving the model"
            )
        total = layout.positions(x.shape)
        if pair.rows[1 - side] is not None and pair.total != total:
            raise CMIMError(
                f"its two sides have {pair.total} and {total} positions in this batch, and cannot be paired position "
                'by position. Leave it out with taps=, or use instances="image"'
            )
        index, elements = self._positions(k, layout, x)
        pair.total, pair.index, pair.spatial = total, index, layout.spatial_shape(x.shape)
        pair.rows[side] = sampled(x, elements, self._zero(x), self.backward)

    def _positions(self, k: int, layout: Layout, x: Tensor) -> tuple[Tensor, Tensor]:
        """The positions of a tap, ``(n,)``, and where their channels stand in the activation, ``(n, C)``."""
        assert self.draws is not None
        total, slot = layout.positions(x.shape), self.scheduled.index(k)
        if torch.compiler.is_compiling():
            index = stratified_indices(self.draws[slot], total)
            return index, layout.elements(index, x.shape)
        # Of all taps at once, for each shape: two small operations instead of two for each tap and side.
        key = layout, x.shape
        if key not in self._elements:
            of_all = stratified_indices(self.draws, total)
            self._elements[key] = of_all, layout.elements(of_all, x.shape)
        index, elements = self._elements[key]
        return index[slot], elements[slot]

    def _zero(self, x: Tensor) -> Tensor:
        key = x.dtype, x.device
        if key not in self._zeros:
            self._zeros[key] = x.new_zeros(())
        return self._zeros[key]


@dataclass(frozen=True)
class _Pickup:
    """One side of one tap, picked up at one site."""

    tap: int
    side: int
    site: Site


class Capture:
    """The hooks of one plug-in on one model.

    Args:
        model: not kept alive by this object.
        taps: what to capture.
        schedule: which of them the next pass captures, and at which positions.
        batch: where the number of samples is read off the model's inputs.
        observer: called with tap, a_B as a whole and its layout. With it every pass is captured, in eval mode and
            without gradients too.

    Attributes:
        before: called with the pass and the inputs of the model, before the model runs.
        unasked: passes that were captured since a loss was asked for.
    """

    def __init__(
        self,
        model: nn.Module,
        taps: tuple[Tap, ...],
        schedule: Schedule,
        batch: BatchSource | None,
        observer: Callable[[int, Tensor, Layout], None] | None = None,
    ) -> None:
        self.taps = taps
        self.schedule = schedule
        self.batch = batch
        self.observer = observer
        self.before: Callable[[Pass, tuple[Any, ...], dict[str, Any]], None] | None = None
        self.unasked = 0
        self.model = weakref.ref(model)
        # Thread -> its pass that runs, and its pass that waits for its loss to be asked for.
        self.running: dict[int, Pass] = {}
        self._waiting: dict[int, Pass] = {}
        self._handles: list[RemovableHandle] = []
        self._on = False
        self._plan: dict[str, dict[int, list[_Pickup]]] = defaultdict(lambda: defaultdict(list))
        for k, tap in enumerate(taps):
            for side, site in ((BINARY, tap.binary), (LATENT, tap.latent)):
                if site is not None:
                    self._plan[site.module][site.call].append(_Pickup(k, side, site))

    # -- on and off ----------------------------------------------------------------------------------------------

    @property
    def attached(self) -> bool:
        """Whether the hooks are on the model."""
        return self._on

    def attach(self) -> None:
        """Put the hooks on the model."""
        model = self.model()
        if model is None or self.attached:
            return
        modules = dict(model.named_modules(remove_duplicate=False))
        self._on = True
        root = _RootHook(self, model)
        # Around all others: first in, last out.
        self._handles.append(model.register_forward_pre_hook(root.enter, prepend=True, with_kwargs=True))
        for name, plan in self._plan.items():
            hook = _ModuleHook(self, modules[name], name, {call: tuple(found) for call, found in plan.items()})
            self._handles.append(modules[name].register_forward_pre_hook(hook.enter, with_kwargs=True))
            hook.closing = modules[name].register_forward_hook(hook.leave, with_kwargs=True, always_call=True)
            self._handles.append(hook.closing)
        root.closing = model.register_forward_hook(root.leave, with_kwargs=True, always_call=True)
        self._handles.append(root.closing)

    def detach(self) -> None:
        """Take the hooks off the model, and forget what was captured."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._on = False
        self.forget()

    def forget(self) -> None:
        """Forget what was captured, and leave no mode of ours on torch's stack, also after an interrupt."""
        for running in self.running.values():
            running.abandon()
        self.running.clear()
        self._waiting.clear()

    # -- one pass ------------------------------------------------------------------------------------------------

    def begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward pass of the model starts, and is to be captured."""
        every = torch.compiler.is_compiling() or _recording_a_graph()
        scheduled = tuple(range(len(self.taps))) if every else self.schedule.taps
        draws = self.schedule.draws_of(len(scheduled))
        found = Pass(self.taps, scheduled, draws, model.training)
        source = self.batch
        if source is not None:
            found.attempt(None, lambda: setattr(found, "batch", source.of(args, kwargs)))
        found.observer = self.observer
        mask = kwargs.get("attention_mask")
        if isinstance(mask, Tensor) and mask.ndim == 2:
            found.mask = mask
        self.running[_thread()] = found
        self._forget_dead_threads()
        before = self.before
        if before is not None:
            found.attempt(None, partial(before, found, args, kwargs))

    def end(self) -> None:
        """The pass of this thread has come to its end, and waits for its loss to be asked for."""
        thread = _thread()
        found = self.running.pop(thread)
        if torch.compiler.is_compiling():
            self._waiting[thread] = found
            return
        found.abandon()  # what is open still: others cleared the hooks that would have closed it
        waiting = self._waiting.get(thread)
        # A pass in eval mode does not take the place of one in training mode that waits.
        if found.training or waiting is None or not waiting.training:
            self._waiting[thread] = found
            self.unasked += 1
            if self.unasked == _FORGOTTEN:
                found.attempt(None, lambda: warn_once(self, _FORGOTTEN_WARNING))

    def drop(self) -> None:
        """The pass of this thread did not come to its end."""
        found = self.running.pop(_thread(), None)
        if found is not None:
            found.abandon()
            if found.training:
                self._waiting.pop(_thread(), None)

    def pop(self) -> Pass:
        """The last pass of this thread, which is then forgotten here.

        Raises:
            CMIMError: there is none.
        """
        self.unasked = 0
        thread = _thread()
        if not torch.compiler.is_compiling():
            self.drop()  # a pass that was interrupted
            if thread not in self._waiting:
                # Compiled code leaves its pass to the thread that compiled it.
                thread = next((key for key, waiting in self._waiting.items() if waiting.compiled), thread)
        found = self._waiting.pop(thread, None)
        if found is not None:
            return found
        if not torch.is_grad_enabled():
            raise CMIMError(
                "No forward pass to take the loss of: under torch.no_grad() nothing is captured, and there is nothing "
                "to train. In a function that both trains and validates, write: "
                "if model.training: loss = loss + cmim(model)"
            )
        if self._waiting:
            raise CMIMError(
                "No forward pass of this thread to take the loss of: the model ran in another one. Call cmim(model) in "
                "the thread that runs the model."
            )
        raise CMIMError(
            "No forward pass to take the loss of. Call model(x) with gradients enabled before each cmim(model); one "
            "forward pass gives one loss. (Not captured: a pass under torch.no_grad(), one that raised, one through "
            "model.forward(x) or a replica of nn.DataParallel, one of a model that was compiled and run before CMIM "
            "was attached (attach first, or call torch._dynamo.reset()), one of a model whose hooks other code cleared "
            "(attach again).)"
        )

    def _forget_dead_threads(self) -> None:
        """Drop what threads left that have ended: nobody can ask for the loss of it."""
        if torch.compiler.is_compiling() or not self._waiting.keys() - {_thread()}:
            return
        alive = sys._current_frames()
        for thread in [thread for thread in self._waiting if thread not in alive]:
            del self._waiting[thread]


# -- hooks -----------------------------------------------------------------------------------------------------------


class _Hook:
    """Its bound methods are what a model holds.

    Copied or pickled with the model it turns into a hook without effect: the copy is a plain model, and never writes
    into the original's plug-in.
    """

    def __init__(self, capture: Capture | None = None, module: nn.Module | None = None) -> None:
        self.capture = capture
        #: Of the hook that closes what :meth:`enter` opens.
        self.closing: RemovableHandle | None = None
        self._module = None if module is None else weakref.ref(module)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Hook:
        return type(self)()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()

    def serves(self, module: nn.Module) -> bool:
        """Whether this is the module that the hook was made for: a replica shares its hooks with the original."""
        return self._module is not None and self._module() is module

    def running(self, module: nn.Module) -> Pass | None:
        """This thread's pass."""
        return self.capture.running.get(_thread()) if self.capture is not None and self.serves(module) else None

    def will_close(self) -> bool:
        """Whether the closing hook is still on the module: others may have cleared it."""
        if torch.compiler.is_compiling():
            return True
        return self.closing is not None and self.closing.id in (self.closing.hooks_dict_ref() or ())


class _RootHook(_Hook):
    def enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        capture = self.capture
        if capture is None or not self.serves(module):
            return
        running = self.running(module)
        if running is not None:
            # A forward that calls itself; or the pass before was interrupted (torch calls no hook then).
            if _compat.running_calls(module) > 1 + sum(call.hook is self for call in running.open):
                running.open.append(_Call(self, ()))
                return
            capture.drop()
        if self.will_close() and (capture.observer is not None or (torch.is_grad_enabled() and not _aside())):
            capture.begin(module, args, kwargs)

    def leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        running = self.running(module)
        if running is None:
            return
        assert self.capture is not None
        if running.close(self) is None:
            if _current_error() != running.error:
                self.capture.drop()
            else:
                self.capture.end()


class _ModuleHook(_Hook):
    def __init__(
        self,
        capture: Capture | None = None,
        module: nn.Module | None = None,
        name: str = "",
        plan: dict[int, tuple[_Pickup, ...]] | None = None,
    ) -> None:
        super().__init__(capture, module)
        self._name = name
        self._plan = plan or {}
        # Not a frozenset, for which torch 2.6 compiles no guard.
        self._taps = tuple({p.tap for pickups in self._plan.values() for p in pickups})

    def enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        running = self.running(module)
        if running is None:
            return
        running.entered = True
        if not any(k in running.scheduled for k in self._taps) or not self.will_close():
            return
        number = running.calls.get(self._name, 0)
        running.calls[self._name] = number + 1
        call = _Call(self, [p for p in self._plan.get(number, ()) if p.tap in running.pairs])
        if any(p.site.function is not None for p in call.pickups):
            call.listener = _Listener(running, call.pickups)
        running.pick_up(call.pickups, "input", (args, kwargs))
        running.open.append(call)
        if call.listener is not None:
            call.listener.__enter__()

    def leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        running = self.running(module)
        call = None if running is None else running.close(self)
        if running is not None and call is not None and _current_error() == call.error:
            running.pick_up(call.pickups, "output", output)


class _Call:
    """A call of a module that runs."""

    def __init__(self, hook: _Hook, pickups: Sequence[_Pickup]) -> None:
        self.hook = hook
        self.pickups = pickups
        self.listener: _Listener | None = None
        #: The exception that was being handled when the call started: a call that raised ends with another one.
        self.error = _current_error()


class _Listener(TorchFunctionMode):
    """Sees the torch functions that are called while one module runs, and picks up the tensors that were planned."""

    def __init__(self, running: Pass, pickups: Sequence[_Pickup]) -> None:
        super().__init__()
        self._running = running
        self._pickups = [p for p in pickups if p.site.function is not None]
        self._functions = [p.site.function for p in self._pickups]
        self._calls: dict[Any, int] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._running.muted or func not in self._functions:
            return func(*args, **kwargs)
        nth = self._calls.get(func, 0)
        self._calls[func] = nth + 1
        pickups = [p for p in self._pickups if p.site.function == func and p.site.nth == nth]
        self._running.pick_up(pickups, "argument", (args, kwargs))
        result = func(*args, **kwargs)
        self._running.pick_up(pickups, "result", result)
        return result


def _exit(listener: _Listener) -> None:
    if torch.compiler.is_compiling():
        listener.__exit__(None, None, None)
    else:
        _compat.leave_mode(listener)


@_compat.constant_when_compiled
def _thread() -> int:
    return threading.get_ident()


def _current_error() -> int:
    """Which exception is being handled: while it is that of a forward, torch calls the hooks that are always called."""
    return 0 if torch.compiler.is_compiling() else id(sys.exc_info()[1])


def _recording_a_graph() -> bool:
    """Whether a CUDA graph is being recorded, in which a choice of taps would be frozen."""
    return torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing()


def _aside() -> bool:
    """Whether the pass that starts is none of a training step.

    Recomputation of a checkpointed model within a backward pass, torch.func, forward-mode differentiation, torch.jit.
    """
    if torch.compiler.is_compiling():
        return False
    return (
        _compat.in_backward_pass()
        or _compat.under_functorch()
        or _compat.under_forward_ad()
        or _compat.under_jit_tracing()
    )


def _at(tree: Any, path: tuple[Any, ...]) -> Tensor:
    for key in path:
        tree = tree[key]
    if not isinstance(tree, Tensor):
        raise CMIMError(
            f"the forward went another way than in the dry run: a tensor was expected, found a {type(tree).__name__}. "
            "Attach again with an example_input like the training batches"
        )
    return tree


def attached_to(model: nn.Module) -> bool:
    """Whether a living plug-in is on this very model, on a part of it, or on a model that it is a part of.

    Not: on another model that shares modules with this one, where the two do not meet.
    """
    for module in model.modules():
        for hook in _compat.forward_pre_hooks(module):
            owner = getattr(hook, "__self__", None)
            if isinstance(owner, _Hook) and owner.capture is not None and owner.serves(module):
                other = owner.capture.model()
                if other is not None and (_has(other, model) or _has(model, other)):
                    return True
    return False


def _has(model: nn.Module, part: nn.Module) -> bool:
    return any(module is part for module in model.modules())
