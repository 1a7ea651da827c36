"""Whether a tensor is two-valued, and which of its two values each element has: its sign pattern."""

from __future__ import annotations

import torch
from torch import Tensor

from .layout import Layout

# The two values of a detach trick differ by up to 2e-7 of their size from exact ones.
_TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 2e-2}
_DEFAULT_TOLERANCE = 1e-5
# Fewer elements than this can hold two values by chance.
SMALLEST_GROUP = 6
# A group of which all elements are equal says nothing. At least this share of the groups must hold both values.
_SMALLEST_SHARE = 0.125
# Elements of a group that are looked at before the whole tensor is.
_FIRST_LOOK = 64
# Rows of an activation that a report looks at.
_ROWS = 64


def sign_pattern(x: Tensor, index: Tensor | None = None) -> Tensor | None:
    """-1 and +1 for the smaller and the larger of a tensor's two values; None if it has more.

    The two values may be those of the whole tensor or differ by sample, channel, sample and channel, token or pixel.
    Zeros between ``-a`` and ``a``, from dropout, padding or ``sign(0)``, are 0 in the pattern.

    Args:
        x: of any shape.
        index: positions in the flattened tensor; None for all.

    Returns:
        int8, ``(n,)``. Elements of a group that holds a single value count as its sign.
    """
    x = x.detach()
    if index is None:
        index = torch.arange(x.numel(), device=x.device)
    if x.dtype == torch.bool:
        both = bool(x.any()) and not bool(x.all())
        return x.take(index).to(torch.int8) * 2 - 1 if both else None
    tolerance = _TOLERANCE.get(x.dtype, _DEFAULT_TOLERANCE)
    if x.dtype not in (torch.float32, torch.float64):
        x = x.float()
    if x.numel() < SMALLEST_GROUP or not _plausible(x, (0, *range(2, x.ndim)), (*range(x.ndim - 1),), (0, 1)):
        return None
    for shared in _groupings(x.ndim):
        reduced = tuple(d for d in range(x.ndim) if d not in shared)
        if _size(x, reduced) >= SMALLEST_GROUP and _plausible(x, shared):
            pattern = _pattern_by_group(x, reduced, tolerance, index)
            if pattern is not None:
                return pattern
    return None


def is_constant(x: Tensor) -> bool:
    """Whether all elements are equal, up to the noise of a detach trick."""
    if x.dtype == torch.bool:
        return bool(x.all()) or not bool(x.any())
    low, high = x.detach().aminmax()
    return bool(high - low <= _TOLERANCE.get(x.dtype, _DEFAULT_TOLERANCE) * torch.maximum(low.abs(), high.abs()))


def is_two_valued(x: Tensor, layout: Layout) -> bool:
    """Whether an activation can be a binary one: each channel of each sample has two values, and zero between.

    Channels that are constant count: a network may take another way in eval mode than in the dry run.
    """
    some = x[:_ROWS]
    if sign_pattern(some) is not None:
        return True
    some = layout.channel_vectors(some.float())
    low, high = some.amin(1, keepdim=True), some.amax(1, keepdim=True)
    near = 1e-2 * torch.maximum(low.abs(), high.abs())
    zero = (some.abs() <= near) & ((low + high).abs() <= near)
    return bool((((some - low).abs() <= near) | ((some - high).abs() <= near) | zero).all())


def is_split_by_threshold(latent: Tensor, pattern: Tensor, index: Tensor, shape: torch.Size) -> bool:
    """Whether the latent is larger where the pattern is +1 than where it is -1, or the reverse.

    The threshold may be one for the tensor, or differ by sample, by channel or by both.

    Args:
        latent, pattern: ``(n,)`` values of both at the same positions; pattern 0 is left out.
        index: ``(n,)`` these positions in the flattened tensor.
        shape: of the tensor.
    """
    signed = (pattern != 0) & latent.isfinite()
    latent, up, index = latent[signed].float(), pattern[signed] > 0, index[signed]
    for shared in _groupings(len(shape))[:6]:
        group, groups = torch.zeros_like(index), 1
        for d in shared:
            group = group * shape[d] + index // shape[d + 1 :].numel() % shape[d]
            groups *= shape[d]
        # With few values in each group a threshold splits anything.
        if groups > 1 and len(latent) < 4 * groups:
            continue

        def is_larger(values: Tensor, group: Tensor = group, groups: int = groups) -> Tensor:
            least, most = values.new_full((groups,), torch.inf), values.new_full((groups,), -torch.inf)
            least = least.scatter_reduce(0, group[up], values[up], "amin")
            return least >= most.scatter_reduce(0, group[~up], values[~up], "amax")

        if bool((is_larger(latent) | is_larger(-latent)).all()):
            return True
    return False


def _groupings(ndim: int) -> list[tuple[int, ...]]:
    """Dimensions by which the two values may differ, from one group to many."""
    last = ndim - 1
    wanted = [(), (0,), (1,), (last,), (0, 1), (0, last), tuple(range(last)), (0, *range(2, ndim))]
    found: list[tuple[int, ...]] = []
    for shared in wanted:
        if len(set(shared)) == len(shared) < max(ndim, 1) and max(shared, default=0) <= last and shared not in found:
            found.append(shared)
    return found


def _plausible(x: Tensor, *groupings: tuple[int, ...]) -> bool:
    """Whether, by one of the groupings, three groups are two-valued as far as a few values tell: few tensors are."""
    large = False
    for shared in groupings:
        if max(shared, default=0) >= x.ndim or len(shared) == x.ndim:
            continue
        if _size(x, tuple(d for d in range(x.ndim) if d not in shared)) >= SMALLEST_GROUP:
            large = True
            if all(_is_two_valued(_line(x, shared, part)) for part in (2, 3, 5)):
                return True
    return not large


def _line(x: Tensor, shared: tuple[int, ...], part: int) -> list[float]:
    """Some values of the group that lies at this part (half, third, fifth) of the dimensions ``shared``."""
    for d in shared:
        x = x.narrow(d, x.shape[d] // part, 1)
    step = max(1, x.numel() // _FIRST_LOOK) | 1  # odd: not the same column of every row
    return x.take(torch.arange(0, x.numel(), step, device=x.device)).tolist()


def _is_two_valued(values: list[float]) -> bool:
    low, high = min(values), max(values)
    noise = 2e-2 * max(abs(low), abs(high))
    return all(v - low <= noise or high - v <= noise or abs(v) <= noise for v in values)


def _size(x: Tensor, dims: tuple[int, ...]) -> int:
    return torch.Size(x.shape[d] for d in dims).numel()


def _pattern_by_group(x: Tensor, reduced: tuple[int, ...], tolerance: float, index: Tensor) -> Tensor | None:
    """The pattern at these positions if each group, over the dimensions ``reduced``, is two-valued in the tensor."""
    low, high = x.amin(reduced, keepdim=True), x.amax(reduced, keepdim=True)
    noise = tolerance * torch.maximum(low.abs(), high.abs())
    two = high - low > 10 * noise
    if two.float().mean() < _SMALLEST_SHARE:
        return None
    is_high = x >= high - noise
    is_zero = ((low + high).abs() <= 2 * noise) & (x.abs() <= noise)
    # NaN compares false, and so is never one of the two values.
    if not bool((is_high | (x <= low + noise) | is_zero).all()):
        return None
    is_high, is_zero, two, some = (t.expand(x.shape).take(index) for t in (is_high, is_zero, two, x))
    pattern = torch.where(is_high, 1, -1).masked_fill(is_zero, 0)
    return torch.where(two, pattern, some.sign()).to(torch.int8)
