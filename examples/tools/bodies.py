"""Binary networks for the tools: three methods (IR-Net, Bi-Real Net, ReActNet) and the bodies they are put into.

A method is a `Recipe`, a body is built from it. The same body built from `full_precision(recipe)` has the same module
names, so it can serve as a teacher. The stem, the shape-changing shortcuts and the classifier stay in full precision.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn


class Sign(torch.autograd.Function):
    """Forward: sign(x), with sign(0) = 1. Backward: the gradient times `slope(x)`.

    Straight-through estimators differ in their slope only, so each method brings its own.
    """

    @staticmethod
    def forward(ctx, x: Tensor, slope: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.save_for_backward(x)
        ctx.slope = slope
        return (x >= 0).to(x.dtype) * 2 - 1

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return grad * ctx.slope(x), None


def identity(channels: int) -> nn.Module:
    return nn.Identity()


@dataclass(frozen=True)
class Recipe:
    """How a method binarizes: what stands at, before and after each inner convolution.

    conv: (in_channels, out_channels, kernel_size, stride, padding) -> the convolution
    binary: channels -> activation module before it (none where the convolution binarizes its own input)
    nonlinearity: channels -> module after the shortcut
    """

    conv: Callable[[int, int, int, int, int], nn.Module]
    binary: Callable[[int], nn.Module] = identity
    nonlinearity: Callable[[int], nn.Module] = identity


def full_precision(recipe: Recipe) -> Recipe:
    """The recipe without its binarizations: plain convolutions, ReLU where an activation was binarized."""
    binary = identity if recipe.binary is identity else lambda channels: nn.ReLU()
    return replace(recipe, conv=partial(nn.Conv2d, bias=False), binary=binary)


# --- IR-Net (Qin et al., arXiv 1909.10788) ----------------------------------------------------------------------------


def libra(weight: Tensor, slope: Callable[[Tensor], Tensor]) -> Tensor:
    """Libra parameter binarization (section 3.2): the weight of each output channel as a power of two times +-1."""
    within = tuple(range(1, weight.ndim))
    w = weight - weight.mean(within, keepdim=True)  # balanced: as many +1 as -1, the most entropy
    w = w / w.std(within, keepdim=True)
    with torch.no_grad():  # a power of two: a bit shift at inference
        scale = 2 ** w.abs().mean(within, keepdim=True).log2().round()
    return Sign.apply(w, slope) * scale


class EDE:
    """The error decay estimator (section 3.3), which a layer has for both of its signs."""

    t, k = 0.1, 10.0  # where `anneal` starts

    def slope(self, x: Tensor) -> Tensor:
        """Derivative of g(x) = k tanh(t x), which stands in for sign in the backward pass."""
        return self.k * self.t * (1 - torch.tanh(self.t * x) ** 2)


class IRConv2d(EDE, nn.Conv2d):
    """Weight by `libra`, both signs with the error decay estimator."""

    def forward(self, x: Tensor) -> Tensor:
        binary_w = libra(self.weight, self.slope)
        binary_x = Sign.apply(x, self.slope)
        return self._conv_forward(binary_x, binary_w, self.bias)  # with this layer's stride, padding, groups, ...


def anneal(model: nn.Module, epoch: int, epochs: int) -> None:
    """EDE's schedule: from nearly the identity, which updates all, to nearly sign."""
    t = 0.1 * 10 ** (epoch / epochs * 2)  # t_min = 0.1, t_max = 10
    for module in model.modules():
        if isinstance(module, EDE):
            module.t, module.k = t, max(1 / t, 1.0)


IRNET = Recipe(conv=partial(IRConv2d, bias=False), nonlinearity=lambda channels: nn.Hardtanh())

# --- Bi-Real Net (Liu et al., arXiv 1808.00278) -----------------------------------------------------------------------


def polynomial_slope(x: Tensor) -> Tensor:
    """Derivative of the piecewise polynomial 2x - x|x| on [-1, 1], close to sign there; 0 outside."""
    return (2 - 2 * x.abs()).clamp(min=0)


def clipped_slope(w: Tensor) -> Tensor:
    """Derivative of clip(w, -1, 1): the common straight-through estimator."""
    return (w.abs() < 1).to(w.dtype)


class ApproxSign(nn.Module):
    """Sign with the gradient of a piecewise polynomial."""

    def forward(self, x: Tensor) -> Tensor:
        return Sign.apply(x, polynomial_slope)


def magnitude_aware(weight: Tensor) -> Tensor:
    """mean|w| sign(w), mean over an output channel, so that the gradient knows the size of w."""
    scale = weight.detach().abs().mean(tuple(range(1, weight.ndim)), keepdim=True)
    return Sign.apply(weight, clipped_slope) * scale


class MagnitudeAwareConv2d(nn.Conv2d):
    """Binary weights; the module before it binarizes the activation."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, magnitude_aware(self.weight), self.bias)


BIREAL = Recipe(conv=partial(MagnitudeAwareConv2d, bias=False), binary=lambda channels: ApproxSign())

# --- ReActNet (Liu et al., arXiv 2003.03488) --------------------------------------------------------------------------


class Shift(nn.Module):
    """x + b, b learned for each channel."""

    def __init__(self, channels: int):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bias


class RSign(ApproxSign):
    """Sign with a learned threshold for each channel."""

    def __init__(self, channels: int):
        super().__init__()
        self.shift = Shift(channels)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.shift(x))


class RPReLU(nn.Sequential):
    """PReLU with a learned shift of its input and of its output for each channel."""

    def __init__(self, channels: int):
        super().__init__(Shift(channels), nn.PReLU(channels), Shift(channels))


REACTNET = Recipe(conv=BIREAL.conv, binary=RSign, nonlinearity=RPReLU)

# --- bodies -----------------------------------------------------------------------------------------------------------


class Unit(nn.Module):
    """binary -> conv -> batch norm -> + shortcut -> nonlinearity: a shortcut around *every* convolution."""

    def __init__(self, recipe: Recipe, in_channels: int, out_channels: int, stride: int = 1):
        super().__init__()
        self.binary = recipe.binary(in_channels)
        self.conv = recipe.conv(in_channels, out_channels, 3, stride, 1)
        self.bn = nn.BatchNorm2d(out_channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != out_channels:
            self.shortcut = nn.Sequential(
                nn.AvgPool2d(stride, ceil_mode=True),
                nn.Conv2d(in_channels, out_channels, 1, bias=False),
                nn.BatchNorm2d(out_channels),
            )
        self.nonlinearity = recipe.nonlinearity(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.nonlinearity(self.bn(self.conv(self.binary(x))) + self.shortcut(x))


def stem(recipe: Recipe, in_channels: int, width: int, large: bool = False) -> dict[str, nn.Module]:
    """For large images ResNet's own, which leaves a quarter of their size. Its pool comes before its norm here: nearly
    every maximum has the sign +1, which the norm undoes."""
    first: dict[str, nn.Module] = {"conv1": nn.Conv2d(in_channels, width, 3, padding=1, bias=False)}
    if large:
        first = {
            "conv1": nn.Conv2d(in_channels, width, 7, stride=2, padding=3, bias=False),
            "pool1": nn.MaxPool2d(3, stride=2, padding=1),
        }
    return {
        **first,
        "bn1": nn.BatchNorm2d(width),
        "nonlinearity1": recipe.nonlinearity(width),
    }


def classifier(channels: int, size: int, num_classes: int) -> dict[str, nn.Module]:
    """Pool to `size` x `size` places, then one linear layer."""
    return {
        "pool": nn.AdaptiveAvgPool2d(size),
        "flatten": nn.Flatten(),
        "fc": nn.Linear(channels * size**2, num_classes),
    }


def resnet(
    recipe: Recipe,
    num_classes: int,
    in_channels: int = 3,
    *,
    stages: int,
    units: int | Sequence[int],
    width: int,
    large: bool = False,
) -> nn.Sequential:
    """ResNet (He et al., arXiv 1512.03385): `units` convolutions a stage, widths doubling.

    Input (batch, in_channels, height, width) float, output (batch, num_classes). `large`: images of some 224 pixels.
    """
    modules = stem(recipe, in_channels, width, large)
    in_width = width
    for stage, count in enumerate([units] * stages if isinstance(units, int) else units):
        out_width = width * 2**stage
        first = Unit(recipe, in_width, out_width, stride=1 if stage == 0 else 2)
        rest = [Unit(recipe, out_width, out_width) for _ in range(count - 1)]
        modules[f"layer{stage + 1}"] = nn.Sequential(first, *rest)
        in_width = out_width
    modules.update(classifier(in_width, 1, num_classes))
    return nn.Sequential(OrderedDict(modules))


def vgg_small(recipe: Recipe, num_classes: int, in_channels: int = 3, *, width: int) -> nn.Sequential:
    """The VGG of BinaryConnect with one classifier layer, as binary networks have it; shapes as above."""
    modules = stem(recipe, in_channels, width)
    widths = [width, width, 2 * width, 2 * width, 4 * width, 4 * width]
    for i in range(1, 6):
        modules[f"layer{i}"] = nn.Sequential(
            OrderedDict(
                binary=recipe.binary(widths[i - 1]),
                conv=recipe.conv(widths[i - 1], widths[i], 3, 1, 1),
                # Pooled before the next sign: nearly every maximum of signs would be +1.
                pool=nn.MaxPool2d(2) if i % 2 else nn.Identity(),
                bn=nn.BatchNorm2d(widths[i]),
                nonlinearity=recipe.nonlinearity(widths[i]),
            )
        )
    modules.update(classifier(widths[-1], 4, num_classes))
    return nn.Sequential(OrderedDict(modules))


# Each takes (recipe, num_classes, in_channels=3) and, by keyword, another width.
BODIES = {
    "resnet8": partial(resnet, stages=3, units=2, width=16),
    "resnet20": partial(resnet, stages=3, units=6, width=16),
    "resnet18": partial(resnet, stages=4, units=4, width=64),
    "resnet18_224": partial(resnet, stages=4, units=4, width=64, large=True),
    "resnet34_224": partial(resnet, stages=4, units=(6, 8, 12, 6), width=64, large=True),
    "vgg_small": partial(vgg_small, width=128),
}
