"""What one forward pass of the model leaves: rows of a_B and a_F, tap by tap, and what could not be captured.

Of an activation only the rows are kept, taken or pooled at once: the network may overwrite it later.
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
from .discovery.inputs import part_of
from .discovery.layout import Layout
from .discovery.trace import Site
from .errors import CMIMError, warn_once
from .sampling import BackwardRule, Schedule, indices_among, take_elements, upper_half

BINARY, LATENT = 0, 1  # the two sides of a pair, as indices
# A tap that adds nothing to the loss. ERROR: cmim(model) raises. UNUSABLE: it warns, and raises if no tap is left.
# ABSENT, where the pass did not reach the tap or calls do not match: it warns.
ERROR, UNUSABLE, ABSENT = "error", "unusable", "absent"
_MISCOUNTED = "functions or modules were not called as often as in the dry run, or in another order"
_NO_GRADIENT = (
    "its binary activation came without a gradient. Layers that were frozen do that (where all are, leave cmim(model) "
    "out), and reentrant activation checkpointing (pass use_reentrant=False to checkpoint)"
)
# A score at or below this is masked. Masks are -inf, the lowest number (float16: -65504) or about -10000.
_MASKED_SCORE = -5000.0


class Pair:
    """The rows of one tap in one forward pass, and where they come from. Row i of both sides has the same origin."""

    index: Tensor | None = None  # (n,) the position of each row, counted over the batch; None for images
    spatial: torch.Size | None = None  # spatial shape of one entry of the first dimension
    total = 0  # positions of the whole batch
    batch_size = 0  # samples of the batch
    tokens = 0  # length of a sample's sequence, 0 where it is none
    unpadded: Tensor | None = None  # (n,) bool, False where the model's attention_mask says that the row is padding
    left_out: tuple[str, str] | None = None  # ERROR, UNUSABLE or ABSENT, and why

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

    k: int  # the number of the tap
    side: int
    site: Site


class Call(TorchFunctionMode):
    """A running call of a hooked module. Where functions are to be picked up, it is a mode on torch's stack."""

    def __init__(self, running: Pass, hook: object, pickups: Sequence[Pickup] = ()) -> None:
        super().__init__()
        self._running = running
        self.hook = hook
        self.pickups = pickups
        self._functions = [p.site.function for p in pickups if p.site.function is not None]
        self.watches_functions = len(self._functions) > 0
        #: Function -> its calls so far: those with gradients; in a report, which has none, all.
        self._counts: dict[Any, int] = {}
        self._with_gradients = torch.is_grad_enabled()
        self._error_before = _current_error()

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        # The dry run counts calls with gradients. torch.compile runs the backward of an autograd.Function through here.
        uncounted = self._with_gradients and not torch.is_grad_enabled()
        if self._running.muted or uncounted or func not in self._functions:
            return func(*args, **kwargs)
        nth = self._counts.get(func, 0)
        self._counts[func] = nth + 1
        pickups = [
            p
            for p in self.pickups
            if p.site.function == func
            and nth == (p.site.function_call if self._with_gradients else p.site.function_call_of_all)
        ]
        self._running.pick_up(pickups, "argument", (args, kwargs))
        result = func(*args, **kwargs)
        self._running.pick_up(pickups, "result", result)
        return result

    def raised(self) -> bool:
        """Whether an exception ended the call: torch runs ``always_call`` hooks while it handles the exception."""
        return _current_error() != self._error_before

    def miscounted(self) -> list[int]:
        """The taps of which a function was called more or less often than in the dry run."""
        pickups = [p for p in self.pickups if p.site.function is not None]
        return [p.k for p in pickups if self._counts.get(p.site.function, 0) != p.site.function_calls]


@dataclass(eq=False, repr=False)
class Pass:
    """One forward pass of the model, from its first hook to its last, and until cmim(model)."""

    taps: Sequence[Tap]
    schedule: InitVar[Schedule]
    all_taps: InitVar[bool]  # capture all taps, not those of the schedule
    training: bool
    batch_size: int | None
    attention_mask: Tensor | None  # (B, ...), the model's own input
    observer: Callable[[Pass, int, Tensor], None] | None  # gets the pass, the number of the tap, the whole a_B

    muted = False  # within a hook of ours: our own torch calls are not the model's

    def __post_init__(self, schedule: Schedule, all_taps: bool) -> None:
        self.scheduled = tuple(range(len(self.taps))) if all_taps else schedule.taps
        draws = schedule.draws_of(len(self.scheduled))
        self.position_draws = None if draws is None else upper_half(draws)  # (taps, n); None for whole images
        self.device = schedule.draws.device
        widest = max(max(tap.channels, tap.latent_channels) for tap in self.taps)
        #: For all index computations of the pass.
        self.arange = torch.arange(1 + max(widest, 0 if draws is None else draws.shape[-1]), device=self.device)
        self.compiled = torch.compiler.is_compiling()
        self.pairs = {k: Pair(self.taps[k]) for k in self.scheduled}
        self.miscounted: list[int] = []  # taps of which a function was not called as often as in the dry run
        self.open_calls: list[Call] = []  # the innermost last
        self.calls: dict[str, int] = {}  # module name -> its calls so far
        #: Modules that were called with other gradients than the pass: without, in training. These calls do not count.
        self.without_gradients: set[str] = set()
        self.with_gradients = torch.is_grad_enabled()
        self.backward_rule = BackwardRule()
        self._elements: dict[Any, tuple[Tensor, Tensor]] = {}  # (layout, shape) -> positions and elements of all taps
        self._zeros: dict[torch.dtype, Tensor] = {}  # dtype -> a zero, for take_elements()

    @property
    def padding_mask(self) -> Tensor | None:
        """The model's attention_mask if it is (B, tokens) and not of floats, which may be additive: 0 and -inf."""
        mask = self.attention_mask
        return mask if mask is not None and mask.ndim == 2 and not mask.is_floating_point() else None

    def pickups_of_call(self, pickups: Sequence[Pickup]) -> list[Pickup]:
        """A module is called: its pickups of this call and of the taps of this pass."""
        name = pickups[0].site.module
        if torch.is_grad_enabled() != self.with_gradients:
            self.without_gradients.add(name)
            return []
        call_number = self.calls.get(name, 0)
        self.calls[name] = call_number + 1
        return [p for p in pickups if p.site.call == call_number and p.k in self.pairs]

    def pick_up(self, pickups: Sequence[Pickup], kind: str, tree: Any) -> None:
        """Take the rows of the activations that are picked up at sites of this kind. An error is kept for check()."""
        for p in pickups:
            if p.site.kind != kind or not self._in_order(p):
                continue
            was_muted, self.muted = self.muted, True
            try:
                with _compat.unrecorded():
                    self._take(p.k, p.side, part_of(tree, p.site.path))
            except Exception as error:
                why = str(error) if isinstance(error, CMIMError) else f"{type(error).__name__}: {error}"
                self.leave_out(p.k, ERROR, why)
            finally:
                self.muted = was_muted

    def _in_order(self, pickup: Pickup) -> bool:
        """Whether the module of the other side was called as often by now as in the dry run. Two calls that change
        places would pair the codes of one with the latent of the other."""
        tap = self.taps[pickup.k]
        other = tap.latent if pickup.side == BINARY else tap.binary
        if tap.in_one_call or other is None or self.calls.get(other.module, 0) == pickup.site.other_calls:
            return True
        self.leave_out(pickup.k, ABSENT, _MISCOUNTED)
        return False

    def leave_out(self, k: int, kind: str, why: str) -> None:
        """Note why a tap adds nothing; the first reason stays. (torch 2.6 does not compile a raise here.)"""
        self.pairs[k].left_out = self.pairs[k].left_out or (kind, why)

    def close(self, hook: object) -> Call | None:
        """Close the innermost call of a hook's module, and all calls that were opened within it."""
        if not any(call.hook is hook for call in self.open_calls):
            return None
        while True:
            call = self.open_calls.pop()
            if call.watches_functions:
                _compat.switch_mode(call, on=False)
            if call.hook is hook:
                return call

    def close_all(self) -> None:
        """Close all calls of a pass that will not end."""
        while self.open_calls:
            self.close(self.open_calls[-1].hook)

    def check(self, owner: object, may_skip_all: bool, is_hooked: Callable[[], bool]) -> None:
        """Raise CMIMError where an activation could not be captured, or where no tap is left to train. Warn once, for
        ``owner``, of each tap that adds nothing. ``may_skip_all``: layers that are skipped may leave no tap;
        ``is_hooked``: whether all hooks are still there."""
        self._check_counts()
        for k, pair in self.pairs.items():
            binary = pair.tap.binary
            if binary and binary.module in self.without_gradients and pair.rows[BINARY] is None:
                self.leave_out(k, UNUSABLE, _NO_GRADIENT)
        kinds = [pair.left_out[0] for pair in self.pairs.values() if pair.left_out]
        reached = any(pair.complete for pair in self.pairs.values())
        # Where a step captures some taps only, the others may still train.
        unusable = UNUSABLE in kinds and not reached
        if ERROR in kinds or (unusable and len(self.scheduled) == len(self.taps)):
            raise CMIMError("\n".join(["The forward pass could not be captured.", *self.troubles()]))
        for k, pair in self.pairs.items():
            if not pair.complete:
                self.leave_out(k, ABSENT, "the forward pass did not reach it")
        lines = self.troubles()
        mismatch = any(pair.left_out == (ABSENT, _MISCOUNTED) for pair in self.pairs.values())
        if not (reached or unusable or ((mismatch or may_skip_all) and is_hooked())):
            raise CMIMError(
                "The forward pass reached none of the taps. Was the model compiled and run before CMIM was attached "
                "(attach first, or call torch._dynamo.reset()), were modules replaced or hooks cleared (attach again), "
                "or do these inputs take another way through it?\n" + "\n".join(lines)
            )
        warn_once(owner, *(f"{line} It adds nothing to the loss." for line in lines))

    def troubles(self) -> list[str]:
        """What went wrong, a line each."""
        return [f"Tap {pair.tap.name}: {pair.left_out[1]}." for pair in self.pairs.values() if pair.left_out]

    def _check_counts(self) -> None:
        """Leave out the taps whose sides may not belong together. That is so if a watched function was called more or
        less often than in the dry run; or if a module was, and the sides come from two calls or the tap has failed."""
        for k, pair in self.pairs.items():
            sites = [site for site in (pair.tap.binary, pair.tap.latent) if site is not None]
            calls_differ = any(self.calls.get(site.module, 0) != site.module_calls for site in sites)
            failed = pair.left_out is not None and pair.left_out[0] == ERROR
            if k in self.miscounted or (calls_differ and (failed or not pair.tap.in_one_call)):
                pair.rows = [None, None]
                pair.left_out = ABSENT, _MISCOUNTED

    def require_one_backward(self) -> None:
        """Raise if the contrast and the network's loss get two backward passes."""
        taken = [rows for pair in self.pairs.values() for rows in pair.rows if rows is not None]
        if taken:
            self.backward_rule.require_one_backward(taken[0])

    def _take(self, k: int, side: int, x: Any) -> None:
        """Take the rows of one side of a tap out of its activation ``x``."""
        pair = self.pairs[k]
        layout = pair.tap.layouts[side]
        trouble = self._trouble(pair, side, x)
        if trouble is not None:
            self.leave_out(k, *trouble)
            return
        if side == BINARY and self.observer is not None:
            self.observer(self, k, x)
        # Windowed or mixed, the first dimension is not the batch.
        pair.batch_size = (self.batch_size or 0) if layout.windowed or layout.mixed else len(x)
        if self.position_draws is None:
            rows = layout.pooled(_without_masked_scores(x, side, layout), pair.batch_size)
        else:
            rows = _without_masked_scores(self._sampled(k, x, layout), side, layout)
        if side == BINARY:
            self.backward_rule.watch(x, rows)
            if pair.index is not None and self.padding_mask is not None:
                # Not in the loss: where only the loss is compiled, each number of tokens would compile it again.
                pair.unpadded = mask_of(pair, self.padding_mask.to(x.device))
        pair.rows[side] = rows

    def _sampled(self, k: int, x: Tensor, layout: Layout) -> Tensor:
        """The rows at random positions of an activation: ``(n, C)``."""
        assert self.position_draws is not None
        pair = self.pairs[k]
        pair.total, pair.spatial = layout.positions(x.shape), layout.spatial_shape(x.shape)
        pair.tokens = layout.tokens(x.shape)
        slot = self.scheduled.index(k)
        if torch.compiler.is_compiling():
            pair.index = indices_among(self.position_draws[slot], pair.total, self.arange)
            return layout.rows(x)[pair.index]
        # One computation for all taps of this layout and shape: fewer kernels.
        key = layout, x.shape
        if key not in self._elements:
            indices = indices_among(self.position_draws, pair.total, self.arange)
            self._elements[key] = indices, layout.elements(indices, x.shape, self.arange)
        if x.dtype not in self._zeros:
            self._zeros[x.dtype] = x.new_zeros(())
        pair.index, elements = (of_all_taps[slot] for of_all_taps in self._elements[key])
        return take_elements(x, elements, self._zeros[x.dtype])

    def _trouble(self, pair: Pair, side: int, x: Any) -> tuple[str, str] | None:
        """Why the rows of an activation cannot be taken: ERROR or UNUSABLE, and a message."""
        if not isinstance(x, Tensor):
            why = f"a tensor was expected, found a {type(x).__name__}"
            return ERROR, f"{why}. Attach again with an example_input like the training batches"
        if x.device != self.device:
            remedy = f"call cmim.to({str(x.device)!r}), or attach after moving the model"
            return ERROR, f"it is on {x.device}, the heads are on {self.device}: {remedy}"
        if side == BINARY and self.observer is None and not x.requires_grad:
            return UNUSABLE, _NO_GRADIENT
        tap, layout = pair.tap, pair.tap.layouts[side]
        wanted, channels = (tap.channels if side == BINARY else tap.latent_channels), layout.channels(x.shape)
        if channels != wanted and layout.scores:
            why = f"its channels are the tokens of the batch, which were {wanted} when CMIM was attached"
            return UNUSABLE, f"{why}: pad to one length, or leave it out of taps="
        if channels != wanted:
            why = f"it has {channels} channels, and had {wanted} when CMIM was attached"
            return ERROR, f"{why}. After pruning, or after another change of the layers, attach again"
        if layout.windowed and len(x) and (not self.batch_size or len(x) % self.batch_size):
            return UNUSABLE, "its rows are not a whole number of windows for each sample of the batch"
        other, total = pair.rows[1 - side], layout.positions(x.shape)
        if other is not None and self.position_draws is None and not layout.windowed and len(other) != len(x):
            return ERROR, f"its two sides have {len(other)} and {len(x)} samples in this batch"
        if other is not None and self.position_draws is not None and pair.total != total:
            remedy = "Leave it out of taps=" if tap.latent else "Name another module with teacher_modules="
            why = f"its two sides have {pair.total} and {total} positions in this batch"
            return ERROR, f'{why}. {remedy}, or use instances="image"'
        return None


def mask_of(pair: Pair, mask: Tensor) -> Tensor:
    """``(n,)`` bool: whether the token of each row is no padding. All True where a tap has other samples or tokens."""
    samples, within = samples_of(pair)
    if pair.tokens != mask.shape[1] or pair.batch_size != mask.shape[0]:
        return torch.ones_like(within, dtype=torch.bool)
    return mask[samples, within % pair.tokens] != 0


def samples_of(pair: Pair) -> tuple[Tensor, Tensor]:
    """The sample of each row, and its position within the sample."""
    assert pair.index is not None
    per_sample = pair.total // max(pair.batch_size, 1)
    return pair.index // max(per_sample, 1), pair.index % max(per_sample, 1)


def _without_masked_scores(values: Tensor, side: int, layout: Layout) -> Tensor:
    """Set masked attention scores to zero: values at or below _MASKED_SCORE in any latent with channels last."""
    if side != LATENT or layout.spatial is not None:
        return values
    if torch.compiler.is_compiling():
        return values.masked_fill(values <= _MASKED_SCORE, 0)
    # Checkpointing compares the number of saved tensors with that of the recomputation, where we capture nothing. With
    # hooks of our own, it does not count this one.
    with torch.autograd.graph.saved_tensors_hooks(lambda saved: saved, lambda saved: saved):
        return values.masked_fill(values <= _MASKED_SCORE, 0)


def _current_error() -> int:
    """The id of the exception that is being handled, 0 for none."""
    return 0 if torch.compiler.is_compiling() else id(sys.exc_info()[1])
