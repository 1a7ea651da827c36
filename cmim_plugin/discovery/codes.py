"""Whether a tensor is two-valued, and which of its two values each element has: its sign pattern."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from .layout import Layout

# Relative: `sign(x).detach() - x.detach() + x` is off the exact codes by up to 2e-7 in float32, more if x is large.
_TOLERANCE = {torch.float16: 2e-3, torch.bfloat16: 2e-2}
_DEFAULT_TOLERANCE = 1e-5
# Fewer elements than 6 may have two values by chance; 4 are enough if there are 8 groups or more.
_MIN_GROUP, _MIN_GROUP_OF_MANY, _MANY_GROUPS = 6, 4, 8
_MIN_SHARE = 0.125  # of the groups that must have both values: the others are constant, which shows nothing
_MAX_CODE = 1e5  # beside larger values, as the -1e9 of an attention mask, all others look equal
_QUICK_TEST, _REPORT_ROWS = 64, 64  # elements of a group for the quick test; rows for a report


def sign_pattern(x: Tensor, index: Tensor) -> Tensor | None:
    """int8 at ``index`` of the flattened tensor: -1 for the smaller of its two values, +1 for the larger; or None.

    The two values may be those of the whole tensor or differ by sample, channel, sample and channel, token or pixel.
    Zeros between ``-a`` and ``a``, from dropout, padding or ``sign(0)``, are 0 in the pattern. In a group with a single
    value, it is the sign of that value.
    """
    if x.dtype == torch.bool:
        if x.numel() < _MIN_GROUP or is_constant(x):
            return None
        return 2 * x.take(index).to(torch.int8) - 1
    tolerance = _TOLERANCE.get(x.dtype, _DEFAULT_TOLERANCE)
    x = x.detach() if x.dtype in (torch.float32, torch.float64) else x.detach().float()
    for group_dims in _groupings(x.ndim):
        reduced = [d for d in range(x.ndim) if d not in group_dims]
        group_size = torch.Size(x.shape[d] for d in reduced).numel()
        min_group = _MIN_GROUP_OF_MANY if x.numel() >= _MANY_GROUPS * group_size else _MIN_GROUP
        if group_size < min_group or not _is_plausible(x, group_dims):
            continue
        low, high = x.amin(reduced, keepdim=True), x.amax(reduced, keepdim=True)
        size = torch.maximum(low.abs(), high.abs())
        if bool(size.max() > _MAX_CODE):
            return None
        noise = tolerance * size
        has_both = high - low > 10 * noise
        if has_both.float().mean() >= _MIN_SHARE and _holds_only(x, low, high, noise, reduced):
            low, high, noise, has_both, x = (t.expand(x.shape).take(index) for t in (low, high, noise, has_both, x))
            pattern = (x >= high - noise).to(torch.int8) - (x <= low + noise).to(torch.int8)
            return torch.where(has_both, pattern, x.sign().to(torch.int8))
    return None


def is_constant(x: Tensor) -> bool:
    """Whether all elements are equal, up to the noise of a detach trick."""
    low, high = (x.view(torch.uint8) if x.dtype == torch.bool else x.detach()).aminmax()
    noise = _TOLERANCE.get(x.dtype, _DEFAULT_TOLERANCE) * torch.maximum(low.abs(), high.abs())
    return bool((high - low <= noise) & noise.isfinite())  # masked scores have an infinite one


def is_two_valued(x: Tensor, layout: Layout) -> bool:
    """Whether an activation can be a binary one: each channel of each sample has two values, and zero between.

    Constant channels pass. A report asks this: in eval mode, a site may hold another tensor than in the dry run.
    """
    some = x[:_REPORT_ROWS]
    if sign_pattern(some, torch.zeros(1, dtype=torch.int64, device=x.device)) is not None:  # at any index
        return True
    some = layout.channel_vectors(some.float())
    low, high = some.amin(1, keepdim=True), some.amax(1, keepdim=True)
    return _holds_only(some, low, high, 1e-2 * torch.maximum(low.abs(), high.abs()), [1])


def is_split_by_threshold(values: Tensor, pattern: Tensor, index: Tensor, shape: torch.Size) -> bool:
    """Whether values are larger where the pattern is +1 than where it is -1, or the reverse. Both are taken at
    ``index`` of a flattened tensor of this shape. A pattern of 0 and infinite values are left out.

    The threshold may be one for the tensor, or differ by sample, channel, sample and channel, token or pixel.
    """
    signed = (pattern != 0) & values.isfinite()
    values, is_high = values[signed].float(), pattern[signed] > 0
    coordinates = torch.unravel_index(index[signed], shape)
    for group_dims in _groupings(len(shape)):
        group = torch.zeros_like(is_high, dtype=torch.int64)
        for d in group_dims:
            group = group * shape[d] + coordinates[d]
        num_groups = math.prod(shape[d] for d in group_dims)
        # With few values in each group a threshold splits anything.
        if num_groups > 1 and len(values) < 4 * num_groups:
            continue
        # By group, then by value: a threshold splits a group in which the code changes at most once.
        order = values.argsort()
        order = order[group[order].argsort(stable=True)]
        changes = (group[order].diff() == 0) & (is_high[order][1:] != is_high[order][:-1])
        ties = changes & (values[order].diff() == 0)  # a value with both codes: nothing splits these
        if not bool(ties.any()) and bool((group[order][1:][changes].bincount() <= 1).all()):
            return True
    return False


def _groupings(ndim: int) -> list[tuple[int, ...]]:
    """Sets of dimensions by which the two values may differ, as ``(1,)`` for those by channel: few groups first."""
    last = ndim - 1
    wanted = [(), (0,), (1,), (last,), (0, 1), (0, last), tuple(range(last)), (0, *range(2, ndim))]
    return list(dict.fromkeys(dims for dims in wanted if len(set(dims)) == len(dims) < ndim))


def _is_plausible(x: Tensor, group_dims: Sequence[int]) -> bool:
    """Whether some elements of three groups allow for two values: a quick test that rules out most tensors."""
    for divisor in (2, 3, 5):  # the groups at 1/2, 1/3 and 1/5 of each dimension
        group = x
        for d in group_dims:
            group = group.narrow(d, x.shape[d] // divisor, 1)
        step = max(1, group.numel() // _QUICK_TEST) | 1  # odd: not the same column of every row
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
    # NaN compares false, and so is neither value.
    return bool(((distance >= half - noise) | ((middle.abs() <= noise) & (distance <= 2 * noise))).all())
