"""What one forward pass of the model leaves: rows of a_B and a_F, tap by tap, and what could not be captured.

Nothing is kept of an activation but the sampled or pooled rows, taken at once: the network may overwrite it later.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Sequence
from dataclasses import InitVar, dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from . import _compat
from .discovery.find import Tap
from .discovery.inputs import Path, part_of
from .discovery.layout import Layout
from .discovery.trace import Site
from .errors import CMIMError, warn_once
from .sampling import BackwardRule, Schedule, indices_among, sampled, upper_half

BINARY, LATENT = 0, 1
# Why a tap adds nothing to the loss, which then raises (FAILED), raises if no other tap is left (EXCUSED), or warns
# (MISSED: the forward pass did not reach the tap).
FAILED, EXCUSED, MISSED = "failed", "excused", "missed"
_MISCOUNTED = "functions or modules were not called as often as in the dry run, or in another order"
_NO_GRADIENT = (
    "its binary activation came without a gradient. Layers that were frozen do that (nothing is left to train there), "
    "and reentrant activation checkpointing (pass use_reentrant=False to checkpoint)"
)
# Below this, a latent was masked: float16 has -65504, and many write -10000.
_MASKED = -5000.0


class Pair:
    """What one pass left of one tap."""

    index: Tensor | None = None  # (n,) the positions that the rows come from, over the batch; None for pooled samples
    spatial: torch.Size | None = None  # the dimensions that the positions of one row of the batch are counted over
    total = 0  # positions of the whole batch
    batch_size = 0  # its samples
    tokens = 0  # of a sample, 0 where its positions are no sequence
    unpadded: Tensor | None = None  # (n,) bool, what the mask that the model was given says of each row
    left_out: tuple[str, str] | None = None  # FAILED, EXCUSED or MISSED, and why, where it adds nothing to the loss

    def __init__(self, tap: Tap) -> None:
        self.tap = tap
        #: ``(n, C_b)`` of a_B and ``(n, C_f)`` of a_F, in the autograd graph; None until seen.
        self.rows: list[Tensor | None] = [None, None]

    @property
    def complete(self) -> bool:
        """Whether both sides were seen."""
        return self.rows[BINARY] is not None and self.rows[LATENT] is not None

    @property
    def sides(self) -> tuple[Tensor, Tensor]:
        """The rows of a complete pair."""
        binary, latent = self.rows
        assert binary is not None and latent is not None
        return binary, latent


class Pickup(NamedTuple):
    """One side of one tap, picked up at one site."""

    tap: int
    side: int
    site: Site


class Call(TorchFunctionMode):
    """A call of a module that runs. As a mode it sees the torch functions that are called meanwhile."""

    def __init__(self, running: Pass, hook: object, pickups: Sequence[Pickup] = ()) -> None:
        super().__init__()
        self._running = running
        self.hook = hook
        self.pickups = pickups
        self._functions = [p.site.function for p in pickups if p.site.function is not None]
        self.listens = len(self._functions) > 0
        #: How often each function was called so far, with gradients. In a report, where none has, how often in all.
        self._counts: dict[Any, int] = {}
        self._with_gradients = torch.is_grad_enabled()
        self._error = _current_error()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # torch.compile runs the backward of an autograd.Function through here, too: without gradients.
        without = self._with_gradients and not torch.is_grad_enabled()
        if self._running.muted or without or func not in self._functions:
            return func(*args, **kwargs)
        nth = self._counts.get(func, 0)
        self._counts[func] = nth + 1
        of_func = [p for p in self.pickups if p.site.function == func]
        pickups = [
            p for p in of_func if (p.site.function_call if self._with_gradients else p.site.function_call_of_all) == nth
        ]
        self._running.pick_up(pickups, "argument", (args, kwargs))
        result = func(*args, **kwargs)
        self._running.pick_up(pickups, "result", result)
        return result

    def raised(self) -> bool:
        """Whether the call ended with an exception: torch runs ``always_call`` hooks while it handles that one."""
        return _current_error() != self._error

    def miscounted(self) -> list[int]:
        """The taps of which a function was called more or less often than in the dry run."""
        of_functions = [p for p in self.pickups if p.site.function is not None]
        return [p.tap for p in of_functions if self._counts.get(p.site.function, 0) != p.site.function_calls]


@dataclass(eq=False, repr=False)
class Pass:
    """One forward pass of the model, from its first hook to its last, and until its loss is asked for."""

    taps: Sequence[Tap]
    schedule: InitVar[Schedule]
    every_tap: InitVar[bool]  # whatever the schedule says
    training: bool
    batch_size: int | None
    mask: Tensor | None  # (B, ...), which the model itself was given
    observer: Callable[[Pass, int, Tensor], None] | None  # gets the tap and a_B as a whole, before rows are taken

    muted = False  # within a hook of ours: our own torch calls are not the model's

    def __post_init__(self, schedule: Schedule, every_tap: bool) -> None:
        self.scheduled = tuple(range(len(self.taps))) if every_tap else schedule.taps
        draws = schedule.draws_of(len(self.scheduled))
        self.random = None if draws is None else upper_half(draws)
        self.device = schedule.draws.device
        widest = max(max(tap.channels, tap.latent_channels) for tap in self.taps)
        #: 0, 1, 2, ...: to count positions and channels with.
        self.numbers = torch.arange(1 + max(widest, 0 if draws is None else draws.shape[-1]), device=self.device)
        self.compiled = torch.compiler.is_compiling()
        self.pairs = {k: Pair(self.taps[k]) for k in self.scheduled}
        #: Taps of which a function was called another number of times than in the dry run.
        self.miscounted: list[int] = []
        #: Calls of modules that run, the innermost last, and how often each module was called so far.
        self.open: list[Call] = []
        self.calls: dict[str, int] = {}
        #: Modules that were called without gradients in a pass with gradients. These calls do not count.
        self.without_gradients: set[str] = set()
        self.with_gradients = torch.is_grad_enabled()
        self.backward = BackwardRule()
        self._elements: dict[Any, tuple[Tensor, Tensor]] = {}
        self._zeros: dict[torch.dtype, Tensor] = {}

    @property
    def usable_mask(self) -> Tensor | None:
        """The mask, if it is one of tokens, of integers or booleans. One of floats may be additive, of 0 and -inf."""
        readable = self.mask is not None and self.mask.ndim == 2 and not self.mask.is_floating_point()
        return self.mask if readable else None

    def pickups_of_call(self, pickups: Sequence[Pickup]) -> list[Pickup]:
        """A module is called: those of its pickups that are for this call, and for a tap of this pass."""
        name = pickups[0].site.module
        if torch.is_grad_enabled() != self.with_gradients:
            self.without_gradients.add(name)
            return []
        number = self.calls.get(name, 0)
        self.calls[name] = number + 1
        return [p for p in pickups if p.site.call == number and p.tap in self.pairs]

    def pick_up(self, pickups: Sequence[Pickup], kind: str, tree: Any) -> None:
        """Take the rows of those activations that are picked up at sites of this kind."""
        for p in pickups:
            if p.site.kind == kind and self._in_order(p):
                self._try_to_take(p.tap, p.side, tree, p.site.path)

    def _in_order(self, pickup: Pickup) -> bool:
        """Whether the module of the other side was called as often as in the dry run until here. Two calls of a module
        that change places would pair the codes of one with the latent of the other."""
        tap = self.taps[pickup.tap]
        other = tap.latent if pickup.side == BINARY else tap.binary
        if tap.in_one_call or other is None or self.calls.get(other.module, 0) == pickup.site.other_calls:
            return True
        self.leave_out(pickup.tap, MISSED, _MISCOUNTED)
        return False

    def _try_to_take(self, k: int, side: int, tree: Any, path: Path = ()) -> None:
        """Take the rows of one side of a tap. What goes wrong is kept, and the model goes on."""
        was_muted, self.muted = self.muted, True
        try:
            with _compat.unrecorded():
                self.take(k, side, part_of(tree, path))
        except Exception as error:
            why = str(error) if isinstance(error, CMIMError) else f"{type(error).__name__}: {error}"
            self.leave_out(k, FAILED, why)
        finally:
            self.muted = was_muted

    def leave_out(self, k: int, how: str, why: str) -> None:
        """A tap adds nothing to the loss. Not by an exception: torch 2.6 does not compile those."""
        self.pairs[k].left_out = self.pairs[k].left_out or (how, why)

    def close(self, hook: object) -> Call | None:
        """The innermost call of a hook's module ends, with all that was opened within it."""
        if not any(call.hook is hook for call in self.open):
            return None
        while True:
            call = self.open.pop()
            if call.listens:
                _compat.switch_mode(call, on=False)
            if call.hook is hook:
                return call

    def abandon(self) -> None:
        """The pass did not come to its end."""
        while self.open:
            self.close(self.open[-1].hook)

    def check(self, plugin: object, may_reach_none: bool) -> None:
        """Raise CMIMError where something could not be captured or nothing is left to train; warn ``plugin`` once about
        each tap that adds nothing. ``may_reach_none``: accept a pass without a tap, as one that skips layers."""
        self._check_counts()
        for k, pair in self.pairs.items():
            binary = pair.tap.binary
            if binary and binary.module in self.without_gradients and pair.rows[BINARY] is None:
                self.leave_out(k, EXCUSED, _NO_GRADIENT)
        left_out = [pair.left_out[0] for pair in self.pairs.values() if pair.left_out]
        reached = any(pair.complete for pair in self.pairs.values())
        # Of some taps, those of this step may be frozen; of all, none is left to train.
        frozen = EXCUSED in left_out and not reached
        if FAILED in left_out or (frozen and len(self.scheduled) == len(self.taps)):
            raise CMIMError("\n".join(["The forward pass could not be captured.", *self.troubles()]))
        for k, pair in self.pairs.items():
            if not pair.complete:
                self.leave_out(k, MISSED, "the forward pass did not reach it")
        lines = self.troubles()
        astray = any(pair.left_out == (MISSED, _MISCOUNTED) for pair in self.pairs.values())
        if not (reached or frozen or astray or may_reach_none):
            raise CMIMError(
                "The forward pass reached none of the taps. Was the model compiled and run before CMIM was attached "
                "(attach first, or call torch._dynamo.reset()), were modules replaced or hooks cleared (attach again), "
                "or do these inputs take another way through it?\n" + "\n".join(lines)
            )
        warn_once(plugin, *(f"{line} It adds nothing to the loss." for line in lines))

    def troubles(self) -> list[str]:
        """What went wrong, a line each."""
        return [f"Tap {pair.tap.name}: {pair.left_out[1]}." for pair in self.pairs.values() if pair.left_out]

    def _check_counts(self) -> None:
        """Leave out the taps whose two sides may not belong together. That is so where a function was called more or
        less often than in the dry run, or a module was and the sides are not picked up in one call."""
        for k, pair in self.pairs.items():
            sites = [site for site in (pair.tap.binary, pair.tap.latent) if site is not None]
            other_calls = any(self.calls.get(site.module, 0) != site.module_calls for site in sites)
            failed = pair.left_out is not None and pair.left_out[0] == FAILED
            if k in self.miscounted or (other_calls and (failed or not pair.tap.in_one_call)):
                pair.rows = [None, None]
                pair.left_out = MISSED, _MISCOUNTED

    def ask_for_one_pass(self) -> None:
        """The gradients of the contrast and of the network's loss are to come in one backward pass."""
        rows = [rows for pair in self.pairs.values() for rows in pair.rows if rows is not None]
        if rows:
            self.backward.watch_leaf_of(rows[0])

    def take(self, k: int, side: int, x: Any) -> None:
        """Take the rows of one side of a tap out of its activation."""
        pair = self.pairs[k]
        layout = pair.tap.layouts[side]
        trouble = self._trouble(pair, side, x)
        if trouble is not None:
            self.leave_out(k, *trouble)
            return
        if side == BINARY and self.observer is not None:
            self.observer(self, k, x)
        pair.batch_size = (self.batch_size or 0) if layout.windowed or layout.mixed else len(x)
        if self.random is None:
            pair.rows[side] = layout.pooled(_without_masked_scores(x, side, layout), pair.batch_size)
            return
        pair.total, pair.spatial = layout.positions(x.shape), layout.spatial_shape(x.shape)
        pair.tokens = layout.tokens(x.shape)
        slot = self.scheduled.index(k)
        if torch.compiler.is_compiling():
            pair.index = indices_among(self.random[slot], pair.total, self.numbers)
            rows = layout.rows(x)[pair.index]
        else:
            # Of all taps at once, for each shape: two small operations instead of two for each tap and side.
            key = layout, x.shape
            if key not in self._elements:
                of_all = indices_among(self.random, pair.total, self.numbers)
                self._elements[key] = of_all, layout.elements(of_all, x.shape, self.numbers)
            if x.dtype not in self._zeros:
                self._zeros[x.dtype] = x.new_zeros(())
            pair.index, elements = (of_all[slot] for of_all in self._elements[key])
            rows = sampled(x, elements, self._zeros[x.dtype], self.backward)
        pair.rows[side] = _without_masked_scores(rows, side, layout)
        if side == BINARY and self.usable_mask is not None:
            # Here, for a loss that is compiled by itself would be compiled anew for each number of tokens.
            pair.unpadded = mask_of(pair, self.usable_mask.to(x.device))

    def _trouble(self, pair: Pair, side: int, x: Any) -> tuple[str, str] | None:
        """Why the rows of an activation cannot be taken: FAILED or EXCUSED, and a message."""
        if not isinstance(x, Tensor):
            why = f"a tensor was expected, found a {type(x).__name__}"
            return FAILED, f"{why}. Attach again with an example_input like the training batches"
        if x.device != self.device:
            remedy = f"call cmim.to({str(x.device)!r}), or attach after moving the model"
            return FAILED, f"it is on {x.device}, the heads are on {self.device}: {remedy}"
        if side == BINARY and self.observer is None and not x.requires_grad:
            return EXCUSED, _NO_GRADIENT
        tap, layout = pair.tap, pair.tap.layouts[side]
        wanted, found = (tap.channels if side == BINARY else tap.latent_channels), layout.channels(x.shape)
        if found != wanted and layout.scores:
            why = f"its channels are the tokens of the batch, which were {wanted} when CMIM was attached"
            return EXCUSED, f"{why}: pad to one length, or leave it out with taps="
        if found != wanted:
            why = f"it has {found} channels, and had {wanted} when CMIM was attached"
            return FAILED, f"{why}. After pruning, or after another change of the layers, attach again"
        if layout.windowed and len(x) and (not self.batch_size or len(x) % self.batch_size):
            return EXCUSED, "its rows are not a whole number of windows for each sample of the batch"
        other, total = pair.rows[1 - side], layout.positions(x.shape)
        if other is not None and self.random is None and not layout.windowed and len(other) != len(x):
            return FAILED, f"its two sides have {len(other)} and {len(x)} samples in this batch"
        if other is not None and self.random is not None and pair.total != total:
            remedy = "Leave it out with taps=" if tap.latent else "Name another module with teacher_modules="
            why = f"its two sides have {pair.total} and {total} positions in this batch"
            return FAILED, f'{why}. {remedy}, or use instances="image"'
        return None


def mask_of(pair: Pair, mask: Tensor) -> Tensor:
    """Whether each row counts: what the mask says of its token. All count where a tap has other samples or tokens."""
    samples, rest = samples_of(pair)
    if pair.tokens != mask.shape[1] or pair.batch_size != mask.shape[0]:
        return torch.ones_like(rest, dtype=torch.bool)
    return mask[samples, rest % pair.tokens] != 0


def samples_of(pair: Pair) -> tuple[Tensor, Tensor]:
    """The sample of each row, and its position within the sample."""
    assert pair.index is not None
    each = pair.total // max(pair.batch_size, 1)
    return pair.index // max(each, 1), pair.index % max(each, 1)


def _without_masked_scores(values: Tensor, side: int, layout: Layout) -> Tensor:
    """Zero where a latent with its channels last was masked, as attention scores are: by minus infinity, or by a number
    far below all others."""
    if side != LATENT or layout.spatial is not None:
        return values
    if torch.compiler.is_compiling():
        return values.masked_fill(values <= _MASKED, 0)
    # Checkpointing counts what is saved, and misses ours when it recomputes: hooks of our own hide the mask from it.
    with torch.autograd.graph.saved_tensors_hooks(lambda mask: mask, lambda mask: mask):
        return values.masked_fill(values <= _MASKED, 0)


def _current_error() -> int:
    """The id of the exception that is being handled, 0 for none."""
    return 0 if torch.compiler.is_compiling() else id(sys.exc_info()[1])
