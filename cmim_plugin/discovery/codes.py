"""Whether a tensor is two-valued, and which of its two values each element has: its sign pattern."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .layout import Layout

# The two values of a detach trick differ by up to 2e-7 of their size from exact ones.
_TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 2e-2}
_DEFAULT_TOLERANCE = 1e-5
# Fewer elements than this can hold two values by chance; four of each of eight groups hardly can.
_SMALLEST_GROUP, _FEW, _MANY_GROUPS = 6, 4, 8
# A group of which all elements are equal says nothing. At least this share of the groups must hold both values.
_SMALLEST_SHARE = 0.125
# Beside the -1e9 of an attention mask all else looks alike: larger numbers than this are no codes.
_LARGEST_CODE = 1e5
# Elements of a group that are looked at before the whole tensor is.
_FIRST_LOOK = 64
# Rows of an activation that a report looks at.
_ROWS = 64


def sign_pattern(x: Tensor, index: Tensor) -> Tensor | None:
    """-1 and +1 for the smaller and the larger of a tensor's two values, int8, at ``index`` of the flattened tensor;
    None if it has more.

    The two values may be those of the whole tensor or differ by sample, channel, sample and channel, token or pixel.
    Zeros between ``-a`` and ``a``, from dropout, padding or ``sign(0)``, are 0 in the pattern. Elements of a group that
    holds a single value count as its sign.
    """
    if x.dtype == torch.bool:
        return None if x.numel() < _SMALLEST_GROUP or is_constant(x) else 2 * x.take(index).to(torch.int8) - 1
    tolerance = _TOLERANCE.get(x.dtype, _DEFAULT_TOLERANCE)
    x = x.detach() if x.dtype in (torch.float32, torch.float64) else x.detach().float()
    for shared in _groupings(x.ndim):
        reduced = [d for d in range(x.ndim) if d not in shared]
        group = torch.Size(x.shape[d] for d in reduced).numel()
        enough = group >= _SMALLEST_GROUP or (group >= _FEW and x.numel() >= _MANY_GROUPS * group)
        if not enough or not _is_plausible(x, shared):
            continue
        low, high = x.amin(reduced, keepdim=True), x.amax(reduced, keepdim=True)
        size = torch.maximum(low.abs(), high.abs())
        if bool(size.max() > _LARGEST_CODE):
            return None
        noise = tolerance * size
        two = high - low > 10 * noise
        if two.float().mean() >= _SMALLEST_SHARE and _holds_only(x, low, high, noise, reduced):
            low, high, noise, two, x = (t.expand(x.shape).take(index) for t in (low, high, noise, two, x))
            pattern = (x >= high - noise).to(torch.int8) - (x <= low + noise).to(torch.int8)
            return torch.where(two, pattern, x.sign().to(torch.int8))
    return None


def is_constant(x: Tensor) -> bool:
    """Whether all elements are equal, up to the noise of a detach trick."""
    low, high = (x.view(torch.uint8) if x.dtype == torch.bool else x.detach()).aminmax()
    return bool(high - low <= _TOLERANCE.get(x.dtype, _DEFAULT_TOLERANCE) * torch.maximum(low.abs(), high.abs()))


def is_two_valued(x: Tensor, layout: Layout) -> bool:
    """Whether an activation can be a binary one: each channel of each sample has two values, and zero between.

    Channels that are constant count: a network may take another way in eval mode than in the dry run.
    """
    some = x[:_ROWS]
    if sign_pattern(some, torch.zeros(1, dtype=torch.int64, device=x.device)) is not None:
        return True
    some = layout.channel_vectors(some.float())
    low, high = some.amin(1, keepdim=True), some.amax(1, keepdim=True)
    return _holds_only(some, low, high, 1e-2 * torch.maximum(low.abs(), high.abs()), [1])


def is_split_by_threshold(values: Tensor, pattern: Tensor, index: Tensor, shape: torch.Size) -> bool:
    """Whether values are larger where the pattern is +1 than where it is -1, or the reverse, all three at ``index`` of
    the flattened tensor. A pattern of 0 and infinite values are left out.

    The threshold may be one for the tensor, or differ by sample, channel, sample and channel, token or pixel.
    """
    signed = (pattern != 0) & values.isfinite()
    values, is_high, place = values[signed].float(), pattern[signed] > 0, torch.unravel_index(index[signed], shape)
    for shared in _groupings(len(shape)):
        group = torch.zeros_like(is_high, dtype=torch.int64)
        for d in shared:
            group = group * shape[d] + place[d]
        groups = math.prod(shape[d] for d in shared)
        # With few values in each group a threshold splits anything.
        if groups > 1 and len(values) < 4 * groups:
            continue
        order = values.argsort()
        order = order[group[order].argsort(stable=True)]
        changes = (group[order].diff() == 0) & (is_high[order][1:] != is_high[order][:-1])
        has_both = changes & (values[order].diff() == 0)  # a value with both codes: nothing splits these
        if not bool(has_both.any()) and bool((group[order][1:][changes].bincount() <= 1).all()):
            return True
    return False


def _groupings(ndim: int) -> list[tuple[int, ...]]:
    """Dimensions by which two values may differ, from one group to many."""
    last = ndim - 1
    wanted = [(), (0,), (1,), (last,), (0, 1), (0, last), tuple(range(last)), (0, *range(2, ndim))]
    return list(dict.fromkeys(shared for shared in wanted if len(set(shared)) == len(shared) < ndim))


def _is_plausible(x: Tensor, shared: Sequence[int]) -> bool:
    """Whether some values of three groups allow for two values: most tensors are ruled out at little cost."""
    for part in (2, 3, 5):
        group = x
        for d in shared:
            group = group.narrow(d, x.shape[d] // part, 1)
        step = max(1, group.numel() // _FIRST_LOOK) | 1  # odd: not the same column of every row
        values = group.take(torch.arange(0, group.numel(), step, device=x.device)).tolist()
        low, high = min(values), max(values)
        noise = 2e-2 * max(abs(low), abs(high))
        if not all(min(v - low, high - v, abs(v)) <= noise for v in values):
            return False
    return True


def _holds_only(x: Tensor, low: Tensor, high: Tensor, noise: Tensor, reduced: list[int]) -> bool:
    """Whether all elements are the lower or the higher value, or zero halfway between the two, up to noise.

    ``low``, ``high`` and ``noise`` have length 1 in the dimensions ``reduced``.
    """
    middle, half = (low + high) / 2, (high - low) / 2
    distance = (x - middle).abs_()
    # A minimum takes a fifth of the time of a comparison of each element. NaN compares false, and so is neither value.
    if bool((distance.amin(reduced, keepdim=True) >= half - noise).all()):
        return True
    return bool(((distance >= half - noise) | ((middle.abs() <= noise) & (distance <= 2 * noise))).all())
