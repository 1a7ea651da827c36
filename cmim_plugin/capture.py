"""Hooks on the model: one forward pass becomes rows of a_B and a_F, tap by tap.

The hooks change nothing that the model returns, and raise nothing: the next cmim(model) raises what went wrong.
Where each activation is picked up was decided in the dry run. Two things alone change in training: once a part of the
model runs compiled, every pass captures all taps; and our hooks move behind those that others add.
"""

from __future__ import annotations

import contextlib
import sys
import weakref
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import InitVar, dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from . import _compat
from ._compat import thread
from .discovery.dry_run import is_dry_run
from .discovery.find import Tap
from .discovery.inputs import BatchSource, is_strided, positional_names
from .errors import CMIMError, CMIMWarning, warn_once
from .passes import BINARY, LATENT, Call, Pass, Pickup
from .sampling import Schedule
from .teacher import Teacher

# After this number of training passes in a row without a loss we warn. (An adversarial attack takes dozens.)
_FORGOTTEN = 100
# Every capture that was attached and is alive: a second plug-in on one model is refused.
_CAPTURES: weakref.WeakSet[Capture] = weakref.WeakSet()


@dataclass(eq=False, repr=False)
class Capture:
    """The hooks of one plug-in on one model, held by a weak reference, and the forward passes captured."""

    model: InitVar[nn.Module]
    taps: tuple[Tap, ...]
    schedule: Schedule
    batch_source: BatchSource | None
    #: For reports: gets the pass, the number of the tap and the whole a_B, also in passes without gradients.
    observer: Callable[[Pass, int, Tensor], None] | None = None
    teacher: Teacher | None = None
    #: The modules that get hooks, by their names in the dry run: later they may have others.
    modules: dict[str, weakref.ref[nn.Module]] = field(default_factory=dict)

    passes_without_loss = 0  # eager passes in training mode since the last cmim(model)
    attached = False  # the hooks are on the model
    removed = False  # the hooks are off for good
    loss_taken = False  # no pass began since the last cmim(model)
    begin_error = ""  # the error that kept the last pass from being captured
    model_was_loaded = False  # the model loaded a state_dict since the hooks were put on it

    def __post_init__(self, model: nn.Module) -> None:
        self.model_ref = weakref.ref(model)
        self.running: dict[int, Pass] = {}  # thread id -> the pass that runs
        self._waiting: dict[int, Pass] = {}  # thread id -> the complete pass that waits for cmim(model)
        self.handles: list[RemovableHandle] = []
        self._after_others: list[RemovableHandle] = []  # those that make_last() moves
        names = positional_names(model)
        #: Index of attention_mask among the positional inputs; beyond all of them without one.
        self._mask_index = names.index("attention_mask") if "attention_mask" in names else sys.maxsize
        self._plan: dict[str, list[Pickup]] = defaultdict(list)  # module name -> what is picked up there
        for k, tap in enumerate(self.taps):
            for side, site in ((BINARY, tap.binary), (LATENT, tap.latent)):
                if site is not None:
                    self._plan[site.module].append(Pickup(k, side, site))
        if not self.modules:
            all_modules = model.named_modules(remove_duplicate=False)
            self.modules.update({name: weakref.ref(module) for name, module in all_modules if name in self._plan})

    # -- on and off ----------------------------------------------------------------------------------------------

    def attach(self) -> None:
        """Put the hooks on the model."""
        model = self.model_ref()
        if model is None or self.attached:
            return
        self.attached = True
        _CAPTURES.add(self)
        root = _RootHook(self, model)
        # The first pre-hook and the last hook of the model: the hooks of others run within the pass.
        self.handles.append(model.register_forward_pre_hook(root.enter, prepend=True, with_kwargs=True))
        for name, pickups in self._plan.items():
            module = self.modules[name]()
            if module is None:  # it was taken out of the model: the loss says that no pass reaches it
                continue
            hook = _ModuleHook(self, module, pickups)
            opening = module.register_forward_pre_hook(hook.enter, with_kwargs=True)
            hook.closing = module.register_forward_hook(hook.leave, with_kwargs=True, always_call=True)
            self.handles += [opening, hook.closing]
            # A hook that ends a count of functions is not moved: those that hooks of others call must not count.
            watches_functions = any(p.site.function is not None for p in pickups)
            self._after_others += [opening] if watches_functions else [opening, hook.closing]
        closing = model.register_forward_hook(root.leave, with_kwargs=True, always_call=True)
        self.handles += [closing, model.register_load_state_dict_post_hook(root.loaded)]
        self._after_others.append(closing)

    def make_last(self) -> None:
        """Move our hooks behind those that others registered since: these may replace inputs and outputs."""
        for handle in self._after_others:
            hooks: Any = handle.hooks_dict_ref() or {}
            if handle.id in hooks and next(reversed(hooks)) != handle.id:
                hooks.move_to_end(handle.id)

    def detach(self) -> None:
        """Take the hooks off, and discard all passes: an interrupted one may have modes on torch's stack."""
        self.attached, self.begin_error = False, ""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()
        self._after_others.clear()
        for running in self.running.values():
            running.close_all()
        self.running.clear()
        self._waiting.clear()

    # -- one pass ------------------------------------------------------------------------------------------------

    def begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], hook: _RootHook) -> None:
        """Start to capture a forward pass of the model."""
        compiling, this_thread = torch.compiler.is_compiling(), thread()
        self.begin_error, self.loss_taken = "", False
        # Compiled code and CUDA graphs would repeat the taps of this one step for ever.
        all_taps = compiling or (torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing())
        batch_size = None if self.batch_source is None else self.batch_source.of(args, kwargs)
        mask: Any = args[self._mask_index] if self._mask_index < len(args) else kwargs.get("attention_mask")
        # As in transformers: (samples, tokens), zero for padding. Pass.padding_mask and Contrast test it further.
        if not isinstance(mask, Tensor) or not is_strided(mask) or mask.ndim < 2 or len(mask) != batch_size:
            mask = None
        started = Pass(self.taps, self.schedule, all_taps, model.training, batch_size, mask, self.observer)
        started.open_calls.append(Call(started, hook))
        if not compiling:
            waiting = self._waiting.get(this_thread)
            # In eval mode a pass does not replace a training pass, unless a backward pass has used that one's graph.
            if waiting is not None and (started.training or not waiting.training or waiting.backward_rule.ran_without):
                self.discard_waiting()  # at once: it keeps the activations of its graph alive
            if self._waiting.keys() - {this_thread}:  # discard what ended threads left
                alive = sys._current_frames()
                for ended in [other for other in self._waiting if other not in alive]:
                    del self._waiting[ended]
        if self.teacher is not None:
            self.teacher.deliver(started, args, kwargs)
        self.running[this_thread] = started

    def end(self) -> None:
        """The pass of this thread is complete. It waits for cmim(model), unless begin() let another one wait on."""
        ended = self.running.pop(thread())
        if torch.compiler.is_compiling():
            self._waiting[thread()] = ended
        elif thread() not in self._waiting:
            self._waiting[thread()] = ended
            self.passes_without_loss += int(ended.training)
            if self.passes_without_loss == _FORGOTTEN:
                with contextlib.suppress(CMIMWarning):  # with warnings as errors, the user's forward does not raise
                    warn_once(
                        self,
                        f"{_FORGOTTEN} forward passes ran with gradients, and cmim(model) was called after none of "
                        "them. Add cmim(model) to the loss of each training step, or call cmim.remove().",
                    )

    def discard_running(self) -> None:
        """Discard the pass that runs in this thread; in training mode also one that waits, of an older batch."""
        running = self.running.pop(thread(), None)
        if running is not None:
            running.close_all()
            if running.training:
                self.discard_waiting()

    def is_hooked(self) -> bool:
        """Whether all hooks are still on the model: other code may have cleared some."""
        return all(map(_is_on, self.handles))

    def discard_waiting(self) -> None:
        """Discard the pass of this thread that waits."""
        self._waiting.pop(thread(), None)

    def pop(self) -> Pass:
        """Hand over the pass of this thread that waits. Raises CMIMError where there is none."""
        if self.removed:
            raise CMIMError("This CMIM was removed from its model: build a new one to go on.")
        if not self.attached:
            raise CMIMError("This CMIM is paused: leave the `with cmim.paused()` block before asking for the loss.")
        self.passes_without_loss = 0
        key = thread()
        if not torch.compiler.is_compiling():
            self.discard_running()  # a pass that was interrupted
            if key not in self._waiting:
                # Compiled code keeps its pass under the thread that compiled it: thread() is a constant there.
                key = next((other for other, waiting in self._waiting.items() if waiting.compiled), key)
        waiting = self._waiting.pop(key, None)
        if waiting is not None:
            self.loss_taken = True
            return waiting
        if self.begin_error:
            why = f"capturing it raised {self.begin_error.rstrip('.')}"
        elif not torch.is_grad_enabled():
            why = (
                "under torch.no_grad() nothing is captured. In a function that both trains and validates, add the loss "
                "where it trains: (loss + cmim(model)).backward()"
            )
        elif self._waiting:
            why = "the model ran in another thread. Call cmim(model) in the thread that runs the model"
        elif self.loss_taken:
            why = (
                "the loss of the last one was taken already, and one pass gives one loss. Keep it, as in "
                "aux = cmim(model), or call model(x) again, with gradients enabled"
            )
        else:
            why = (
                "call model(x), with gradients enabled, before each cmim(model): one pass gives one loss. Not "
                "captured: a pass that has not ended yet, one under torch.no_grad(), one that raised, one through "
                "model.forward(x), one of a model that was compiled before CMIM was attached (attach first, or call "
                "torch._dynamo.reset()), or whose hooks other code cleared (attach again)"
            )
        raise CMIMError(f"No forward pass to take the loss of: {why}.")


class _Hook:
    """The model holds bound methods of this class. A copied or pickled model gets hooks that do nothing."""

    closing: RemovableHandle | None = None  # the handle of leave(); others may clear the hook

    def __init__(
        self, capture: Capture | None = None, module: nn.Module | None = None, pickups: Sequence[Pickup] = ()
    ) -> None:
        self._capture = capture
        self._module = None if module is None else weakref.ref(module)
        self._pickups = pickups

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()

    def capture_of(self, module: nn.Module) -> Capture | None:
        """The capture; None if another module calls this hook: a replica shares the hooks of the original."""
        return self._capture if self._module is not None and self._module() is module else None

    # torch.ao.quantization registers hooks again without with_kwargs: the defaults keep the model running.
    def leave(self, module: nn.Module, args: Any, kwargs: Any = None, output: Any = None) -> None:
        """A call of the module ends. The call of the model itself ends the pass."""
        capture = self.capture_of(module)
        running = None if capture is None else capture.running.get(thread())
        call = None if running is None else running.close(self)
        if capture is None or running is None or call is None:
            return
        if not call.raised():
            running.pick_up(call.pickups, "output", output)
            running.miscounted += call.miscounted()
        if not running.open_calls:
            if call.raised():
                capture.discard_running()
            else:
                capture.end()


class _RootHook(_Hook):
    """The hooks on the model itself."""

    def enter(self, module: nn.Module, args: Any, kwargs: Any = None) -> None:
        capture = self.capture_of(module)
        if capture is None:
            return
        running, compiling = capture.running.get(thread()), torch.compiler.is_compiling()
        # What is compiled leaves an eager pass alone: its calls are not on the stack.
        if running is not None and (running.compiled or not compiling):
            if _compat.running_calls(module) > sum(call.hook is self for call in running.open_calls):
                running.open_calls.append(Call(running, self))  # the forward calls the model again
                return
            capture.discard_running()  # an interrupt ended it without our closing hooks
        if capture.observer is None and (not torch.is_grad_enabled() or _compat.outside_training_step()):
            return
        if not compiling:
            if is_dry_run():
                return
            capture.make_last()
        try:
            with _compat.unrecorded():
                capture.begin(module, args, kwargs or {}, self)
        except Exception as error:  # for example, with fake tensors
            if module.training:
                capture.discard_waiting()
            capture.begin_error = f"{type(error).__name__}: {error}"

    def loaded(self, module: nn.Module, incompatible: Any) -> None:
        capture = self.capture_of(module)
        if capture is not None:
            capture.model_was_loaded = True


class _ModuleHook(_Hook):
    """The hooks on a module that has something to pick up."""

    def enter(self, module: nn.Module, args: Any, kwargs: Any = None) -> None:
        capture, compiling = self.capture_of(module), torch.compiler.is_compiling()
        running = None if capture is None else capture.running.get(thread())
        if capture is None or running is None:
            return
        if compiling and not running.compiled:  # only a part of the model is compiled: its taps must not change
            capture.schedule.all_taps = True
        pickups = running.pickups_of_call(self._pickups)
        if not compiling and (self.closing is None or not _is_on(self.closing)):
            return  # our closing hook was cleared: the call would never be closed
        call = Call(running, self, pickups)
        running.pick_up(call.pickups, "input", (args, kwargs))
        running.open_calls.append(call)
        if call.watches_functions:
            _compat.switch_mode(call, on=True)


def _is_on(handle: RemovableHandle) -> bool:
    """Whether a hook is still registered: others may have cleared it."""
    return handle.id in (handle.hooks_dict_ref() or ())


def attached_to(model: nn.Module) -> bool:
    """Whether a living plug-in is on this very model, on a part of it, or on a model that it is a part of.

    Two models that merely share modules are not related.
    """
    for capture in list(_CAPTURES):
        other = capture.model_ref()
        related = other is not None and (model in set(other.modules()) or other in set(model.modules()))
        if related and any(map(_is_on, capture.handles[:-1])):  # the last is on load_state_dict
            return True
    return False


def remove_all_hooks(model: nn.Module) -> None:
    """Take all hooks of this library off a model, also those that do nothing in a copy."""
    modules = set(model.modules())
    for capture in list(_CAPTURES):
        if capture.model_ref() in modules:
            capture.removed = True
            capture.detach()
    for module in modules:
        _compat.remove_hooks(module, lambda hook: isinstance(getattr(hook, "__self__", None), _Hook))
