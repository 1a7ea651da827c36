"""Hooks that hand over the instances of both sides of every tap, and take nothing else out of the forward pass.

What is kept of an activation is (n, C): pooled or sampled inside the hook, because in-place functions may overwrite the
activation right after it. A pair passes through here only in training: the model in training mode, gradients enabled,
within a forward pass of the model that was attached to. (A report measures with taps of its own, in eval mode.)

Two things are learned in the first pass, because a small operation between two convolutions finds the caches full of
other things and takes ten times as long. An activation that the network itself keeps to the end of the pass, and leaves
as it is, is sampled there from then on. And where the output of a module keeps for its backward pass the very tensor
that was listened for, no function of that module is listened to any more.
"""

from __future__ import annotations

import weakref
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.autograd import forward_ad
from torch.overrides import TorchFunctionMode
from torch.utils.hooks import RemovableHandle

from .discovery import BatchSource, BinaryActivation, Site
from .errors import CMIMError
from .instances import Grid, Layout, Scatter, spread

BINARY, LATENT = 0, 1
# Older versions of torch do not tell what takes the tensors that are saved.
_top_hooks = getattr(torch._C._autograd, "_top_saved_tensors_default_hooks", None)
# Shapes of activations that are remembered: batches may differ in size without end.
_GRIDS = 64


@dataclass(frozen=True)
class Tap:
    """A binary activation that is contrasted.

    Attributes:
        name: qualified name of the module that binarizes, "#2" for its second binarization in one forward.
        channels: channels of a_B.
        latent_channels: channels of what it is contrasted with: a_F, or the teacher's activation.
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
        # fold 0: read off each batch.
        layouts = tuple(
            Layout(side.spatial, int(not side.windowed)) for side in (found.binary_layout, found.latent_layout)
        )
        return cls(
            found.name,
            found.channels,
            found.latent_channels,
            found.module,
            found.binary,
            found.latent,
            (layouts[0], layouts[1]),
        )


@dataclass
class Pair:
    """What one forward pass left of one tap.

    Attributes:
        rows: ``(n, C_b)`` of a_B and ``(n, C_f)`` of a_F, in the autograd graph; None until seen.
        index: ``(n,)`` the positions that the rows come from, counted over the whole batch; None for pooled samples.
        places: the dimensions that the positions of one sample are counted over, where they are those of an image.
        total: positions of the whole batch.
        batch: samples in the batch.
    """

    rows: list[Tensor | None]
    index: Tensor | None = None
    places: torch.Size | None = None
    total: int = 0
    batch: int = 0

    def samples(self) -> Tensor:
        """Which sample of the batch each row of sampled positions belongs to: ``(n,)``."""
        assert self.index is not None
        return self.index // (self.total // self.batch)


@dataclass(frozen=True)
class _Capture:
    tap: int
    side: int
    site: Site
    layout: Layout


@dataclass(frozen=True)
class _Seen:
    """An activation as it passed a hook."""

    tap: int
    side: int
    layout: Layout
    state: tuple[int, ...]

    def stays(self, activation: Tensor) -> bool:
        """Whether neither its values nor its hooks were changed since, as far as that is counted."""
        return _state(activation) == self.state


class Taps:
    """The hooks of one plug-in on one model.

    Args:
        model: the model; not kept alive by this object.
        taps: what to tap.
        look: called with tap, a_B as a whole and its layout. With it every pass is captured: in eval mode and without
            gradients too.
    """

    def __init__(
        self,
        model: nn.Module,
        taps: tuple[Tap, ...],
        look: Callable[[int, Tensor, Layout], None] | None = None,
    ) -> None:
        self.taps = taps
        self.look = look
        # (taps, n) uniform numbers in [0, 1) that the next pass draws its positions from; None: pool over all.
        self.draws: Tensor | None = None
        # The taps that the next pass captures, chosen by the owner between steps; None for all.
        self.chosen: frozenset[int] | None = None
        # A pass was compiled, at least in part: each choice of taps would be compiled anew.
        self.compiled = False
        self.pairs: list[Pair] = []
        # Where the number of samples is read, and what it was in this pass.
        self.source: BatchSource | None = None
        self.samples: int | None = None
        # A complete forward pass was captured and not asked for yet.
        self.fresh = False
        # Within a forward pass of the model that is captured.
        self.active = False
        # Within a capture: our own torch calls must not count as the model's.
        self.muted = False
        # Called with the positional and keyword inputs of the model before each captured forward.
        self.before: Callable[[tuple[Any, ...], dict[str, Any]], None] | None = None
        self.model = weakref.ref(model)
        # By what an activation looks like: its grid, and, of this pass, the positions of each tap there.
        self._grids: dict[Any, Grid] = {}
        self._positions: dict[Any, dict[int, tuple[Tensor, Tensor | None]]] = {}
        # (tap, side): whether the network keeps that activation to the end of the pass, and leaves it as it is.
        self._lasting: dict[tuple[int, int], bool] = {}
        # Of this pass: activations to sample at its end, and sampled ones of which that is not known yet.
        self._later: list[tuple[_Seen, Tensor]] = []
        self._tried: list[tuple[_Seen, weakref.ref[Tensor]]] = []
        self._hooks: list[_Hook] = []
        self._handles: list[RemovableHandle] = []
        self._plan: dict[str, dict[int, list[_Capture]]] = defaultdict(lambda: defaultdict(list))
        for index, tap in enumerate(taps):
            for side, site in ((BINARY, tap.binary), (LATENT, tap.latent)):
                if site is not None:
                    self._plan[site.module][site.call].append(_Capture(index, side, site, tap.layouts[side]))

    @property
    def attached(self) -> bool:
        """Whether the hooks are on the model."""
        return bool(self._handles)

    def attach(self) -> None:
        """Put the hooks on the model."""
        model = self.model()
        if model is None or self.attached:
            return
        modules = dict(model.named_modules(remove_duplicate=False))
        around = _RootHook(self, model)
        # Around all others: first in, last out.
        self._handles.append(model.register_forward_pre_hook(around.enter, prepend=True, with_kwargs=True))
        self._hooks = [around]
        for name, plan in self._plan.items():
            hook = _ModuleHook(self, modules[name], {call: tuple(captures) for call, captures in plan.items()})
            self._hooks.append(hook)
            self._handles.append(modules[name].register_forward_pre_hook(hook.enter, with_kwargs=True))
            self._handles.append(modules[name].register_forward_hook(hook.leave, with_kwargs=True, always_call=True))
        self._handles.append(model.register_forward_hook(around.leave, with_kwargs=True, always_call=True))

    def detach(self) -> None:
        """Take the hooks off the model."""
        for handle in self._handles:
            handle.remove()
        self._handles.clear()
        self._hooks.clear()
        self._lasting.clear()
        self.clear()

    def clear(self) -> None:
        """Forget what was captured."""
        self.pairs = []
        self._later, self._tried = [], []
        self._positions = {}
        self.fresh = False
        self.active = False

    def take(self) -> list[Pair]:
        """The pairs of the last forward pass, which are then forgotten here. Empty where there was none."""
        pairs = self.pairs if self.fresh else []
        self.clear()
        return pairs

    def abandon(self) -> None:
        """A pass did not come to its end."""
        for hook in self._hooks:
            hook.reset()
        self.clear()

    def begin(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """A forward pass of the model starts that is to be captured."""
        self.clear()
        self.pairs = [Pair([None, None]) for _ in self.taps]
        self.active = True
        for hook in self._hooks:
            hook.reset()
        self.samples = None if self.source is None else self.source.of(args, kwargs)
        if self.before is not None:
            self.before(args, kwargs)

    def end(self) -> None:
        """The forward pass has come to its end."""
        self.active = False
        later, tried = self._later, self._tried
        self._later, self._tried = [], []
        for seen, activation in later:
            if seen.stays(activation):
                self._take(seen.tap, seen.side, activation, seen.layout)
            else:
                # Unlike in the first pass. Too late for this one.
                self._lasting[seen.tap, seen.side] = False
        for seen, kept in tried:
            self._lasting[seen.tap, seen.side] = self._lasts(seen, kept())
        self.fresh = True

    def _lasts(self, seen: _Seen, activation: Tensor | None) -> bool:
        pair = self.pairs[seen.tap]
        rows = pair.rows[seen.side]
        if activation is None or rows is None or pair.index is None or not seen.stays(activation):
            return False
        # Values too: x.data.clamp_() counts no version.
        return torch.equal(seen.layout.rows(activation.detach(), pair.index), rows)

    def wants(self, tap: int) -> bool:
        """Whether this pass captures the tap."""
        return self.chosen is None or tap in self.chosen

    def keep(self, tap: int, side: int, activation: Tensor, layout: Layout) -> None:
        """Take the instances of one side out of an activation, at once or at the end of the pass."""
        compiling = torch.compiler.is_compiling()
        if compiling:
            self.compiled = True
        lasting: bool | None = False
        # Only tensors that have values: no fake ones.
        plain = not compiling and type(activation) is Tensor and not activation.is_meta
        if plain and self.look is None and self.draws is not None:
            lasting = self._lasting.get((tap, side))
        if lasting and not _packed():
            self._later.append((_Seen(tap, side, layout, _state(activation)), activation))
            return
        self._take(tap, side, activation, layout)
        if lasting is None:
            self._tried.append((_Seen(tap, side, layout, _state(activation)), weakref.ref(activation)))

    def _take(self, tap: int, side: int, activation: Tensor, layout: Layout) -> None:
        if side == BINARY and self.look is not None:
            self.look(tap, activation, layout)
        elif side == BINARY and not activation.requires_grad:
            raise CMIMError(
                f"The binary activation of tap {self.taps[tap].name} came without a gradient, which it had in the dry "
                "run. Reentrant activation checkpointing does that (pass use_reentrant=False to checkpoint), or layers "
                "frozen since (attach again, after freezing them)."
            )
        pair = self.pairs[tap]
        shape = activation.shape
        if not layout.fold:
            layout = Layout(layout.spatial, shape[0] // (self.samples or shape[0]))
        pair.batch = shape[0] // layout.fold
        if self.draws is None:
            pair.rows[side] = layout.pooled(activation)
            return
        total = shape[0] * layout.positions(shape)
        if pair.rows[1 - side] is None:
            pair.total = total
        elif pair.total != total:
            raise CMIMError(
                f"The two sides of tap {self.taps[tap].name} have {pair.total} and {total} positions in this batch and "
                'cannot be paired position by position: leave it out with taps=, or use instances="image".'
            )
        if torch.compiler.is_compiling():
            draws = self.draws[tap].to(activation.device, non_blocking=True)
            pair.index, offsets = spread(draws, total), None
        else:
            pair.index, offsets = self._drawn(tap, activation, layout)
        if layout.spatial is not None and layout.fold == 1:
            pair.places = layout.places(shape)
        pair.rows[side] = layout.sampled(activation, pair.index, offsets)

    def _drawn(self, tap: int, activation: Tensor, layout: Layout) -> tuple[Tensor, Tensor | None]:
        """The positions of a tap, counted over the batch, and where in memory their channels lie, if that is known."""
        assert self.draws is not None
        key = layout, activation.shape, activation.stride(), activation.device
        known = self._positions.setdefault(key, {})
        if tap not in known:
            grid = self._grids.get(key)
            if grid is None:
                grid = Grid(*key)
                if len(self._grids) == _GRIDS:
                    self._grids.clear()
                if type(activation) is Tensor:  # not a fake one, whose grid would be fake, too
                    self._grids[key] = grid
            grid.taps.add(tap)
            # Of all that are there at once: from the second pass on.
            taps = [k for k in sorted(grid.taps) if self.wants(k) and k not in known]
            index = grid.spread(self.draws[taps])
            offsets = grid.offsets(index)
            each = [None] * len(taps) if offsets is None else offsets.unbind()
            known.update(zip(taps, zip(index.unbind(), each, strict=True), strict=True))
        return known[tap]


class _Hook:
    """Bound methods of it are what a model holds.

    Copied or pickled with the model it turns into a hook without effect: the copy is a plain model and never writes
    into the original's plug-in.
    """

    def __init__(self, taps: Taps | None = None, module: nn.Module | None = None) -> None:
        self.taps = taps
        self._module = None if module is None else weakref.ref(module)

    def __deepcopy__(self, memo: dict[int, Any]) -> _Hook:
        return type(self)()

    def __reduce__(self) -> tuple[Any, ...]:
        return type(self), ()

    def serves(self, module: nn.Module) -> bool:
        """Whether this is the module that it was made for: a replica shares its hooks with the original."""
        return self._module is not None and self._module() is module

    def reset(self) -> None:
        """A forward pass of the model starts."""


class _RootHook(_Hook):
    def enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        if self.taps is None or not self.serves(module):
            return
        if self.taps.active:
            # The pass before was interrupted (KeyboardInterrupt): torch calls no hook then.
            self.taps.abandon()
        if self.taps.look is not None or (module.training and torch.is_grad_enabled() and not _aside()):
            self.taps.begin(args, kwargs)

    def leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        taps = self.taps
        if taps is None or not taps.active or not self.serves(module):
            return
        if output is None:
            taps.clear()  # the forward raised, and this is the call that is made always
        else:
            taps.end()


class _Call(NamedTuple):
    """A call of a module: which of the pass, and what decides how autograd records it."""

    number: int
    gradients: bool
    autocast: bool
    trained: tuple[bool, ...]


class _ModuleHook(_Hook):
    def __init__(
        self,
        taps: Taps | None = None,
        module: nn.Module | None = None,
        plan: dict[int, tuple[_Capture, ...]] | None = None,
    ) -> None:
        super().__init__(taps, module)
        self._plan: dict[int, Sequence[_Capture]] = dict(plan or {})
        self._taps_here = frozenset(c.tap for captures in self._plan.values() for c in captures)
        # What is planned for this pass; empty for most modules, which are then done with at once.
        self._now: dict[int, Sequence[_Capture]] = {}
        self._calls = 0
        self._running: list[tuple[_Call | None, int, Sequence[_Capture], _Listener | None]] = []
        # What computes the module's output from the tensor that was listened for, which then stands in the graph; None
        # where something else does.
        self._in_graph: dict[_Call, _Origin | None] = {}

    def reset(self) -> None:
        chosen = None if self.taps is None else self.taps.chosen
        if chosen is None:
            self._now = self._plan
        elif chosen.isdisjoint(self._taps_here):
            self._now = {}
        else:
            wanted = {call: [c for c in captures if c.tap in chosen] for call, captures in self._plan.items()}
            self._now = {call: captures for call, captures in wanted.items() if captures}
        self._calls = 0
        for *_, listener in reversed(self._running):
            if listener is not None:
                listener.__exit__(None, None, None)
        self._running = []

    def enter(self, module: nn.Module, args: Any, kwargs: Any) -> None:
        taps = self.taps
        # In this order: a compiled pass that captures nothing must not be compiled again for each choice of taps.
        if taps is None or not taps.active or not self._now or not self.serves(module):
            return
        number = self._calls
        captures = self._now.get(number, [])
        self._calls += 1
        _capture(taps, captures, "input", (args, kwargs))
        functions = [c.site.function for c in captures if c.site.function is not None]
        call = listener = None
        since = 0
        if functions:
            if not torch.compiler.is_compiling() and not _packed():
                # Each way of computing it is learned by itself.
                modes = torch.is_grad_enabled(), torch._C._is_any_autocast_enabled()
                trained = (p is not None and p.requires_grad for p in module._parameters.values())
                call = _Call(number, *modes, tuple(trained))
                since = torch.autograd._get_sequence_nr()  # type: ignore[attr-defined]
            if call is None or self._in_graph.get(call) is None:
                listener = _Listener(taps, captures, functions)
                listener.__enter__()
        self._running.append((call, since, captures, listener))

    def leave(self, module: nn.Module, args: Any, kwargs: Any, output: Any) -> None:
        taps = self.taps
        if taps is None or not self._running or not self.serves(module):
            return
        call, since, captures, listener = self._running.pop()
        if listener is not None:
            listener.__exit__(None, None, None)
        if output is None:
            return
        _capture(taps, captures, "output", output)
        if call is None:
            return
        if listener is None:
            origin, operand = _origin(output, since)
            if operand is None or origin != self._in_graph[call]:
                # Unlike in the first pass. Too late for this one.
                self._in_graph[call] = None
                return
            for c in captures:
                if c.site.function is not None:
                    _keep(taps, c, operand)
        elif call not in self._in_graph:
            origin, operand = _origin(output, since)
            functions = [c for c in self._plan[call.number] if c.site.function is not None]
            # What a module with parts computes may depend on more than _Call tells.
            simple = len(functions) == 1 and not module._modules
            self._in_graph[call] = origin if simple and any(operand is tensor for tensor in listener.found) else None


class _Listener(TorchFunctionMode):
    """Sees the torch functions called while one module runs, and picks up the operands that were planned."""

    def __init__(self, taps: Taps, captures: Sequence[_Capture], functions: list[Callable[..., Any]]) -> None:
        super().__init__()
        self._taps = taps
        self._captures = captures
        self._functions = functions
        self._calls = [0] * len(functions)
        #: What was picked up.
        self.found: list[Tensor] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if self._taps.muted or func not in self._functions:
            return func(*args, **kwargs)
        which = self._functions.index(func)
        nth = self._calls[which]
        self._calls[which] += 1
        captures = [c for c in self._captures if c.site.function == func and c.site.nth == nth]
        self.found += _capture(self._taps, captures, "argument", (args, kwargs))
        result = func(*args, **kwargs)
        self.found += _capture(self._taps, captures, "result", result)
        return result


def _capture(taps: Taps, captures: Sequence[_Capture], kind: str, tree: Any) -> list[Tensor]:
    found = []
    for c in captures:
        if c.site.kind == kind:
            tensor = _at(tree, c.site.path)
            found.append(tensor)
            _keep(taps, c, tensor)
    return found


def _keep(taps: Taps, capture: _Capture, activation: Tensor) -> None:
    taps.muted = True
    try:
        taps.keep(capture.tap, capture.side, activation, capture.layout)
    finally:
        taps.muted = False


# The names of the nodes that computed it, and that computed what it keeps.
_Origin = tuple[str, str | None]


def _origin(output: Any, since: int) -> tuple[_Origin | None, Tensor | None]:
    """What computed an output, and the input that it keeps for its backward pass: as it is, no hook has packed it.

    ``since``: the number of a node of the graph; older ones were not computed by this module.
    """
    node = getattr(output, "grad_fn", None)
    saved = getattr(node, "_raw_saved_input", None)
    # Older versions of torch do not tell without unpacking it, which may compute a checkpointed part again.
    operand = getattr(saved, "data", None)
    if node is None or not isinstance(operand, Tensor) or getattr(saved, "unpack_hook", None) is not None:
        return None, None
    if node._sequence_nr() < since:
        return None, None
    return (node.name(), None if operand.grad_fn is None else operand.grad_fn.name()), operand


def _state(activation: Tensor) -> tuple[int, ...]:
    """What changes when an activation is overwritten, replaced or freed, or gets a hook: ours is to come before it."""
    hooks = activation._backward_hooks or {}
    others = sum(not isinstance(hook, Scatter) for hook in hooks.values())
    return activation._version, activation.data_ptr(), others


def _packed() -> bool:
    """Whether what is saved for the backward pass is handed to something else (checkpointing, offloading)."""
    return _top_hooks is None or _top_hooks(True) is not None


def _aside() -> bool:
    """Whether the pass that starts is none of a training step.

    Recomputation of a checkpointed model within a backward pass, torch.func, forward-mode differentiation, torch.jit.
    """
    if torch.compiler.is_compiling():
        return False
    return (
        torch._C._current_graph_task_id() != -1
        or torch._C._are_functorch_transforms_active()
        or forward_ad._current_level >= 0
        or torch._C._get_tracing_state() is not None
    )


def _at(tree: Any, path: tuple[Any, ...]) -> Tensor:
    for key in path:
        tree = tree[key]
    if not isinstance(tree, Tensor):
        raise CMIMError(
            f"The forward of the model took another way than in the dry run: a tensor was expected, found "
            f"{type(tree).__name__}. Attach again with an example_input like the training batches."
        )
    return tree


def attached_to(model: nn.Module) -> bool:
    """Whether a living plug-in is on this very model, on a part of it, or on a model that it is a part of.

    Not: on another model that shares modules with this one, where the two do not meet.
    """
    for module in model.modules():
        for hook in module._forward_hooks.values():
            owner = getattr(hook, "__self__", None)
            if isinstance(owner, _Hook) and owner.taps is not None and owner.serves(module):
                other = owner.taps.model()
                if other is not None and (_has(other, model) or _has(model, other)):
                    return True
    return False


def _has(model: nn.Module, part: nn.Module) -> bool:
    return any(module is part for module in model.modules())
