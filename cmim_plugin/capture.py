"""Hooks on the model: one forward pass becomes rows of a_B and a_F, tap by tap.

The hooks change nothing that the model returns, and raise nothing: what goes wrong is told when the loss is asked for.
Where each activation is picked up was decided in the dry run. A pass changes two things, for good: once a part of the
model ran compiled, every pass captures all taps; and hooks that others registered since come before ours.
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
# Those that were ever attached and are still in use: two plug-ins on one model are refused.
_CAPTURES: weakref.WeakSet[Capture] = weakref.WeakSet()


@dataclass(eq=False, repr=False)
class Capture:
    """The hooks of one plug-in on one model, which they do not keep alive, and the passes that they captured."""

    model: InitVar[nn.Module]
    taps: tuple[Tap, ...]
    schedule: Schedule
    batch_source: BatchSource | None
    #: Called with the pass, the tap and a_B as a whole. With it, passes without gradients are captured too.
    observer: Callable[[Pass, int, Tensor], None] | None = None
    teacher: Teacher | None = None
    #: The modules that get hooks, by their names in the dry run: later they may have others.
    modules: dict[str, weakref.ref[nn.Module]] = field(default_factory=dict)

    unasked = 0  # passes that were captured since a loss was asked for
    attached = False  # the hooks are on the model
    removed = False  # the hooks are off for good
    not_begun = ""  # why the last pass could not be captured at all
    model_was_loaded = False  # the model loaded a state_dict since the hooks were put on it

    def __post_init__(self, model: nn.Module) -> None:
        self.model_ref = weakref.ref(model)
        # Thread -> its pass that runs, and its pass that waits for its loss to be asked for.
        self.running: dict[int, Pass] = {}
        self._waiting: dict[int, Pass] = {}
        self.handles: list[RemovableHandle] = []
        self._last: list[RemovableHandle] = []  # of those, the ones that come behind the hooks of others
        names = positional_names(model)
        #: Which positional input of the model is its mask; past all of them where none is.
        self._mask_at = names.index("attention_mask") if "attention_mask" in names else sys.maxsize
        self._plan: dict[str, list[Pickup]] = defaultdict(list)  # by module
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
        # Registered first and last: all other hooks of the model run inside the pass.
        self.handles.append(model.register_forward_pre_hook(root.enter, prepend=True, with_kwargs=True))
        for name, pickups in self._plan.items():
            module = self.modules[name]()
            if module is None:  # it was taken out of the model: the loss says that no pass reaches it
                continue
            hook = _ModuleHook(self, module, pickups)
            opening = module.register_forward_pre_hook(hook.enter, with_kwargs=True)
            hook.closing = module.register_forward_hook(hook.leave, with_kwargs=True, always_call=True)
            self.handles += [opening, hook.closing]
            # What hooks of others call on an output is not to be counted among the functions that the module calls.
            listens = any(p.site.function is not None for p in pickups)
            self._last += [opening] if listens else [opening, hook.closing]
        closing = model.register_forward_hook(root.leave, with_kwargs=True, always_call=True)
        self.handles += [closing, model.register_load_state_dict_post_hook(root.loaded)]
        self._last.append(closing)

    def make_last(self) -> None:
        """Move the hooks behind those that others registered since: these may change what modules get and return."""
        for handle in self._last:
            hooks: Any = handle.hooks_dict_ref() or {}
            if handle.id in hooks and next(reversed(hooks)) != handle.id:
                hooks.move_to_end(handle.id)

    def detach(self) -> None:
        """Take the hooks off, forget what was captured, and leave no mode on torch's stack, also after an interrupt."""
        self.attached, self.not_begun = False, ""
        for handle in self.handles:
            handle.remove()
        self.handles.clear()
        self._last.clear()
        for running in self.running.values():
            running.abandon()
        self.running.clear()
        self._waiting.clear()

    # -- one pass ------------------------------------------------------------------------------------------------

    def begin(self, model: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], hook: _RootHook) -> None:
        """A forward pass of the model starts, and is to be captured."""
        compiling, own = torch.compiler.is_compiling(), thread()
        self.not_begun = ""
        # In what is compiled, and in a CUDA graph that is being recorded, a choice of taps would be frozen.
        every = compiling or (torch.cuda.is_initialized() and torch.cuda.is_current_stream_capturing())
        batch_size = None if self.batch_source is None else self.batch_source.of(args, kwargs)
        mask: Any = args[self._mask_at] if self._mask_at < len(args) else kwargs.get("attention_mask")
        # As transformers has it: (samples, tokens), zero for padding. Without samples it is not one of padding.
        if not isinstance(mask, Tensor) or not is_strided(mask) or mask.ndim < 2 or len(mask) != batch_size:
            mask = None
        started = Pass(self.taps, self.schedule, every, model.training, batch_size, mask, self.observer)
        started.open.append(Call(started, hook))
        if not compiling:
            waiting = self._waiting.get(own)
            # A pass in eval mode does not take the place of one in training mode that waits.
            if waiting is not None and (started.training or not waiting.training or waiting.backward.network_only):
                self.forget()  # now, for it holds the activations of its graph
            if self._waiting.keys() - {own}:  # nobody can ask for what threads left that have ended
                alive = sys._current_frames()
                for ended in [other for other in self._waiting if other not in alive]:
                    del self._waiting[ended]
        if self.teacher is not None:
            self.teacher.deliver(started, args, kwargs)
        self.running[own] = started

    def end(self) -> None:
        """The pass of this thread is complete, and waits for its loss to be asked for."""
        ended = self.running.pop(thread())
        if torch.compiler.is_compiling():
            self._waiting[thread()] = ended
        elif thread() not in self._waiting:
            self._waiting[thread()] = ended
            self.unasked += ended.training
            if self.unasked == _FORGOTTEN:
                with contextlib.suppress(CMIMWarning):  # where warnings are errors: not within the user's forward
                    warn_once(
                        self,
                        f"{_FORGOTTEN} forward passes ran with gradients, and cmim(model) was called after none of "
                        "them. Add cmim(model) to the loss of each training step, or call cmim.remove().",
                    )

    def drop(self) -> None:
        """The pass of this thread did not come to its end."""
        running = self.running.pop(thread(), None)
        if running is not None:
            running.abandon()
            if running.training:
                self.forget()

    @property
    def hooked(self) -> bool:
        """Whether all hooks are still on the model: other code may have cleared some."""
        return all(map(_is_on, self.handles))

    def forget(self) -> None:
        """The pass of this thread that waits gives no loss."""
        self._waiting.pop(thread(), None)

    def pop(self) -> Pass:
        """The last pass of this thread, which is then forgotten here. Raises CMIMError where there is none."""
        if self.removed:
            raise CMIMError("This CMIM was removed from its model: build a new one to go on.")
        if not self.attached:
            raise CMIMError("This CMIM is paused: leave the `with cmim.paused()` block before asking for the loss.")
        self.unasked = 0
        key = thread()
        if not torch.compiler.is_compiling():
            self.drop()  # a pass that was interrupted
            if key not in self._waiting:
                # Compiled code leaves its pass to the thread that compiled it.
                key = next((other for other, waiting in self._waiting.items() if waiting.compiled), key)
        waiting = self._waiting.pop(key, None)
        if waiting is not None:
            return waiting
        if self.not_begun:
            why = f"capturing it raised {self.not_begun.rstrip('.')}"
        elif not torch.is_grad_enabled():
            why = (
                "under torch.no_grad() nothing is captured. In a function that both trains and validates, write: "
                "if torch.is_grad_enabled(): loss = loss + cmim(model)"
            )
        elif self._waiting:
            why = "the model ran in another thread. Call cmim(model) in the thread that runs the model"
        else:
            why = (
                "call model(x), with gradients enabled, before each cmim(model): one pass gives one loss. Not "
                "captured: a pass that has not ended yet, one under torch.no_grad(), one that raised, one through "
                "model.forward(x), one of a model that was compiled before CMIM was attached (attach first, or call "
                "torch._dynamo.reset()), or whose hooks other code cleared (attach again)"
            )
        raise CMIMError(f"No forward pass to take the loss of: {why}.")


# -- hooks -----------------------------------------------------------------------------------------------------------


class _Hook:
    """The model holds bound methods of this class. If the model is copied or pickled, the copy's hooks do nothing."""

    closing: RemovableHandle | None = None  # of leave(), which others may clear

    def __init__(
        self, capture: Capture | None = None, module: nn.Module | None = None, pickups: Sequence[Pickup] = ()
    ) -> None:
        self._capture = capture
        self._module = None if module is None else weakref.ref(module)
        self._pickups = pickups

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()

    def capture_of(self, module: nn.Module) -> Capture | None:
        """The capture, if the hook was made for this module: a replica shares its hooks with the original."""
        return self._capture if self._module is not None and self._module() is module else None

    # torch.ao.quantization registers hooks again without `with_kwargs`: what it leaves out has a default.
    def leave(self, module: nn.Module, args: Any, kwargs: Any = None, output: Any = None) -> None:
        """A call of the module ends; with that of the model itself, the pass does."""
        capture = self.capture_of(module)
        running = None if capture is None else capture.running.get(thread())
        call = None if running is None else running.close(self)
        if capture is None or running is None or call is None:
            return
        if not call.raised():
            running.pick_up(call.pickups, "output", output)
            running.miscounted += call.miscounted()
        if not running.open:
            if call.raised():
                capture.drop()
            else:
                capture.end()


class _RootHook(_Hook):
    def enter(self, module: nn.Module, args: Any, kwargs: Any = None) -> None:
        capture = self.capture_of(module)
        if capture is None:
            return
        running, compiling = capture.running.get(thread()), torch.compiler.is_compiling()
        # The frames of an eager pass are not to be looked for in what is compiled.
        if running is not None and (running.compiled or not compiling):
            if _compat.running_calls(module) > sum(call.hook is self for call in running.open):
                running.open.append(Call(running, self))  # the forward calls itself
                return
            capture.drop()  # it was interrupted without closing hooks
        if capture.observer is None and (not torch.is_grad_enabled() or _compat.is_no_training_step()):
            return
        if not compiling:
            if is_dry_run():
                return
            capture.make_last()
        try:
            with _compat.unrecorded():
                capture.begin(module, args, kwargs or {}, self)
        except Exception as error:  # as of fake tensors
            if module.training:
                capture.forget()
            capture.not_begun = f"{type(error).__name__}: {error}"

    def loaded(self, module: nn.Module, incompatible: Any) -> None:
        capture = self.capture_of(module)
        if capture is not None:
            capture.model_was_loaded = True


class _ModuleHook(_Hook):
    def enter(self, module: nn.Module, args: Any, kwargs: Any = None) -> None:
        capture, compiling = self.capture_of(module), torch.compiler.is_compiling()
        running = None if capture is None else capture.running.get(thread())
        if capture is None or running is None:
            return
        if compiling and not running.compiled:  # a part of the model alone is compiled
            capture.schedule.all_taps = True
        pickups = running.pickups_of_call(self._pickups)
        if not compiling and (self.closing is None or not _is_on(self.closing)):
            return
        call = Call(running, self, pickups)
        running.pick_up(call.pickups, "input", (args, kwargs))
        running.open.append(call)
        if call.listens:
            _compat.switch_mode(call, on=True)


def _is_on(handle: RemovableHandle) -> bool:
    """Whether a hook is still where it was registered: others may have cleared it."""
    return handle.id in (handle.hooks_dict_ref() or ())


def attached_to(model: nn.Module) -> bool:
    """Whether a living plug-in is on this very model, on a part of it, or on a model that it is a part of.

    Not: on another model that shares modules with this one, where the two do not meet.
    """
    for capture in list(_CAPTURES):
        other = capture.model_ref()
        related = other is not None and (model in set(other.modules()) or other in set(model.modules()))
        if related and any(map(_is_on, capture.handles[:-1])):  # the last one is not for forward passes
            return True
    return False


def clear(model: nn.Module) -> None:
    """Take all hooks of this library off a model, those that do nothing in a copy too."""
    modules = set(model.modules())
    for capture in list(_CAPTURES):
        if capture.model_ref() in modules:
            capture.removed = True
            capture.detach()
    for module in modules:
        _compat.drop_hooks(module, lambda hook: isinstance(getattr(hook, "__self__", None), _Hook))
