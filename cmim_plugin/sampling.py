"""Which positions of an activation are taken, how their channels are read, and how their gradient gets back."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from . import _compat, distributed
from .errors import CMIMError, check_saved

# Knuth's MMIX constants of a linear congruential generator modulo 2 ** 64, which is how int64 wraps around.
_MULTIPLIER, _INCREMENT = 6364136223846793005, 1442695040888963407


def seeded_generator(stream: int = 0) -> torch.Generator:
    """A generator of the CPU, seeded from ``torch.initial_seed()``. Each stream gives other numbers."""
    return torch.Generator("cpu").manual_seed((torch.initial_seed() + stream) % 2**63)


def new_draws(size: tuple[int, ...], generator: torch.Generator) -> Tensor:
    """Random numbers over all of int64, on the CPU."""
    return torch.randint(-(2**63), 2**63 - 1, size, generator=generator, dtype=torch.int64, device="cpu")


def advance_draws(draws: Tensor) -> None:
    """Replace random numbers by the next ones, in place: each entry is a random sequence of its own.

    A generator in a tensor is saved with the state, gives the same numbers on every device and rank, never waits for
    the host, and works in compiled code and CUDA graphs.
    """
    draws.mul_(_MULTIPLIER).add_(_INCREMENT)


class Schedule(nn.Module):
    """Which taps the next pass captures, and at which positions. ``positions``: number for each tap, on all ranks
    together if ``shared`` (training), else on each (reports); None for whole images. ``generator``: of the first draws.
    """

    draws: Tensor  # (count, positions) int64; a pass of m taps uses the first m rows
    steps_taken = 0  # calls of cmim(model) so far, in eager mode
    all_taps = False  # ignore taps_per_step: each choice of taps would be compiled again

    def __init__(
        self,
        count: int,
        taps_per_step: int | None,
        positions: int | None,
        generator: torch.Generator,
        shared: bool = True,
    ) -> None:
        super().__init__()
        self.count = count
        self.taps_per_step = taps_per_step
        self.positions = positions
        self.shared = shared
        self.register_buffer("draws", new_draws((count, positions or 0), generator))

    @property
    def taps(self) -> tuple[int, ...]:
        """The taps of the next pass: evenly spread over the network, each as often as any other."""
        number = self.taps_per_step
        if number is None or number >= self.count or self.all_taps:
            return tuple(range(self.count))
        return tuple(sorted((self.steps_taken + i * self.count // number) % self.count for i in range(number)))

    def draws_of(self, taps: int) -> Tensor | None:
        """This rank's columns of the draws, for a pass that captures so many taps; None for whole images."""
        if self.positions is None:
            return None
        ranks, rank = (distributed.ranks(), distributed.rank()) if self.shared else (1, 0)
        return self.draws[:taps, self.positions * rank // ranks : self.positions * (rank + 1) // ranks]

    def advance(self) -> None:
        """Go on to the draws and the taps of the next step."""
        advance_draws(self.draws)
        if torch.compiler.is_compiling():
            self.all_taps = True
        else:
            self.steps_taken += 1

    def _load_from_state_dict(self, state: Mapping[str, Any], prefix: str, *args: Any) -> None:
        counts = state.get(prefix + "draws", self.draws).shape[-1], self.positions
        check_saved("num_positions", *(count or 'None (instances="image")' for count in counts))
        super()._load_from_state_dict(state, prefix, *args)  # type: ignore[arg-type]

    def get_extra_state(self) -> Tensor:
        return torch.tensor([self.steps_taken, self.all_taps], device="cpu")

    def set_extra_state(self, state: Tensor) -> None:
        self.steps_taken, self.all_taps = int(state[0]), bool(state[1])


def stratified_indices(draws: Tensor, total: int) -> Tensor:
    """Distinct random positions among ``total``: one in each of ``n`` intervals of (almost) equal length.

    Independent draws repeat themselves, and a repeated position would be its own negative. Ranks that each apply their
    share of the draws to their share of the batch take what one process would. For ``total`` between ``n`` and
    ``2 * n`` some intervals hold one position, which is then always drawn.

    Args:
        draws: ``(..., n)`` int64, uniform over all its values.
        total: number of positions.

    Returns:
        ``(..., min(n, total))`` int64 below ``total``, in rising order.
    """
    return indices_among(upper_half(draws), total, torch.arange(draws.shape[-1] + 1, device=draws.device))


def upper_half(draws: Tensor) -> Tensor:
    """The upper 32 bits: the lower ones have short periods."""
    return draws >> 32


def indices_among(random: Tensor, total: int, arange: Tensor) -> Tensor:
    """:func:`stratified_indices` by the :func:`upper_half` of the draws; ``arange``: 0, 1, ..., n, made once."""
    count = min(random.shape[-1], total)
    random = random[..., :count]
    if not torch.compiler.is_compiling() and count and total % count == 0:  # the same with half as many kernels
        length = total // count
        return torch.add(random.remainder(length), arange[:count], alpha=length)
    edges = arange[: count + 1] * total // max(count, 1)
    start = edges[:-1]
    return start + random.remainder(edges[1:] - start)


class BackwardRule:
    """What the gradient hooks of one forward pass share: whether contrast and network must have one backward pass, and
    whether a backward pass ran without the contrast."""

    #: The graph node of a leaf that a tap was computed from. If set, the gradients of the contrast and of the network's
    #: loss must come in one backward pass; where they come in two, the second raises CMIMError.
    leaf: Any = None
    ran_without = False  # a backward pass ran without the contrast, and most likely freed the graph

    def require_one_backward(self, x: Tensor) -> None:
        """Set the leaf: the first one found that ``x`` was computed from."""
        node: Any = x.grad_fn
        while node is not None and not hasattr(node, "variable"):
            node = next((before for before, _ in node.next_functions if before is not None), None)
        self.leaf = node

    def watch(self, x: Tensor, rows: Tensor) -> None:
        """Apply the rule to the backward passes that reach ``x``; ``rows`` were taken of it for the contrast."""
        if x.requires_grad and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            hook = _WatchBackward(self)
            rows.register_hook(hook.contrast_came)
            x.register_hook(hook)


class _WatchBackward:
    """The hook on an activation's gradient that tells backward passes with the contrast from those without."""

    _with_contrast = False  # in the backward pass that runs

    def __init__(self, rule: BackwardRule) -> None:
        self.rule = rule
        self._seen: set[bool] = set()  # whether the passes had the contrast

    def contrast_came(self, grad_of_rows: Tensor) -> None:
        self._with_contrast = True

    def __call__(self, grad: Tensor) -> None:
        with_contrast, self._with_contrast = self._with_contrast, False
        self.rule.ran_without |= not with_contrast
        if self.rule.leaf is not None and _compat.accumulates(self.rule.leaf):
            self._seen.add(with_contrast)
            if len(self._seen) > 1:
                raise CMIMError(
                    "Two backward passes ran, one of them without cmim's loss. DistributedDataParallel averages the "
                    "gradients of the first only. Add the losses: (loss + cmim(model)).backward()."
                )


def take_elements(x: Tensor, elements: Tensor, zero: Tensor) -> Tensor:
    """``x.take(elements)``. Its backward costs as much as the elements, not as much as ``x``.

    Plain autograd would fill a tensor of x's size with a gradient that is zero nearly everywhere. Here the backward
    gives ``x`` one expanded zero. Autograd adds it to the network's gradient, then calls our hook on ``x``, which adds
    the gradient of the elements in place. A dense gradient is used where this would be seen: by a hook that was
    registered before, which would miss the elements, by deterministic algorithms, or by a subclass of Tensor.

    ``elements``: int64, distinct places in the flattened ``x``; ``zero``: 0-d, of x's dtype and device.
    """
    hook = None
    if (
        elements.numel()
        and x.requires_grad
        and torch.is_grad_enabled()
        and type(x) is Tensor
        and not torch.are_deterministic_algorithms_enabled()
        and all(isinstance(other, (AddElementsGradient, _WatchBackward)) for other in _compat.gradient_hooks(x))
    ):
        hook = AddElementsGradient(elements, zero)
        x.register_hook(hook)
    return _TakeElements.apply(x, elements, hook)


class _TakeElements(torch.autograd.Function):
    """``x.take(elements)``. Autograd's own keeps ``x``, and raises where the network overwrites it later."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, elements: Tensor, hook: AddElementsGradient | None) -> Tensor:
        # Attributes, not saved tensors, which checkpointing counts: see passes._without_masked_scores().
        ctx.elements, ctx.shape, ctx.hook = elements, x.shape, hook
        return x.take(elements)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
        hook = ctx.hook
        if hook is None or torch.is_grad_enabled():  # take_elements() made no hook, or create_graph=True
            return grad.new_zeros(ctx.shape).put(ctx.elements, grad, accumulate=True), None, None
        hook.elements_grad = grad
        return hook.zero.expand(ctx.shape), None, None


class AddElementsGradient:
    """The hook on an activation's gradient: adds the gradient of the taken elements, in place.

    That is safe: autograd summed our expanded zero and the network's gradient into a tensor that nobody else holds.
    """

    elements_grad: Tensor | None = None  # set in the backward pass that runs

    def __init__(self, elements: Tensor, zero: Tensor) -> None:
        self.elements = elements
        self.zero = zero

    def __call__(self, grad: Tensor) -> Tensor | None:
        elements_grad, self.elements_grad = self.elements_grad, None
        if elements_grad is None:
            return None
        if not any(grad.stride()):  # our expanded zero itself: the network's loss sent nothing
            grad = grad.new_zeros(grad.shape)
        return grad.put_(self.elements, elements_grad.to(grad.dtype), accumulate=True)
