"""The networks of the benchmarks: bodies (ResNet, VGG-Small) and the methods that binarize them.

A method is a `Recipe`, and a body is built from it. The same body built from `full_precision(recipe)` has the same
module names, so that it can be a teacher matched by name. The stem, the shape-changing shortcuts and the classifier
stay in full precision. Every binary activation is the output of a `BinarySign` module.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial

import torch
from torch import Tensor, nn

# --- signs and their straight-through gradients ----------------------------------------------------------------------


def sign(x: Tensor) -> Tensor:
    """sign(x) with sign(0) = 1."""
    return (x >= 0).to(x.dtype) * 2 - 1


def polynomial(x: Tensor, grad: Tensor) -> Tensor:
    return grad * (2 - 2 * x.abs()).clamp(min=0)


def clipped(x: Tensor, grad: Tensor) -> Tensor:
    return grad * (x.abs() < 1).to(x.dtype)


def decaying(x: Tensor, grad: Tensor, t: Tensor, k: Tensor) -> Tensor:
    return grad * (k * t * (1 - torch.tanh(t * x) ** 2)).to(grad.dtype)


def fuse() -> None:
    """Make one kernel of each of these functions: in a CUDA graph they are most of what moves through memory."""
    torch._dynamo.config.recompile_limit = 64  # dtypes and memory formats

    def compiled(function: Callable[..., Tensor]) -> Callable[..., Tensor]:
        one_kernel = torch.compile(function, dynamic=True)
        return lambda *tensors: one_kernel(*(tensor.detach() for tensor in tensors))

    for function in (sign, polynomial, clipped, decaying):
        globals()[function.__name__] = compiled(function)


class PolynomialSign(torch.autograd.Function):
    """Bi-Real Net: the slope of 2x - x|x| on [-1, 1], 0 outside."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return sign(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return polynomial(x, grad)


class ClippedSign(torch.autograd.Function):
    """The common straight-through estimator: the slope of clip(x, -1, 1)."""

    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return sign(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return clipped(x, grad)


class DecayingSign(torch.autograd.Function):
    """IR-Net's error decay estimator: the slope of k tanh(t x)."""

    @staticmethod
    def forward(ctx, x: Tensor, t: Tensor, k: Tensor) -> Tensor:
        ctx.save_for_backward(x, t, k)
        return sign(x)

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        x, t, k = ctx.saved_tensors
        return decaying(x, grad, t, k), None, None


class BinarySign(nn.Module):
    """Base of the modules whose output is a binary activation, for hooks that look at all of them."""


class ApproxSign(BinarySign):
    """Bi-Real Net's activation."""

    def forward(self, x: Tensor) -> Tensor:
        return PolynomialSign.apply(x)


class EDESign(BinarySign):
    """IR-Net's activation, and the state of its estimator.

    `t` and `k` are 0-d buffers that `anneal` fills in place. As Python numbers they would be constants of a compiled
    graph, which would be compiled again in every epoch. They follow from the epoch, so no checkpoint holds them.
    """

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("t", torch.tensor(0.1), persistent=False)
        self.register_buffer("k", torch.tensor(10.0), persistent=False)

    def forward(self, x: Tensor) -> Tensor:
        return DecayingSign.apply(x, self.t, self.k)


# --- methods ---------------------------------------------------------------------------------------------------------


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


class BinaryConv2d(nn.Conv2d):
    """A convolution whose weight is binarized; with `real_weight` it is not, as in the first of two steps."""

    real_weight = False

    def binary_weight(self) -> Tensor:
        raise NotImplementedError

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(x, self.weight if self.real_weight else self.binary_weight(), self.bias)


def libra(weight: Tensor, signs: Callable[[Tensor], Tensor]) -> Tensor:
    """IR-Net's Libra parameter binarization: the weight of each output channel as a power of two times +-1."""
    within = tuple(range(1, weight.ndim))
    w = weight - weight.mean(within, keepdim=True)  # as many +1 as -1: the most entropy
    w = w / w.std(within, keepdim=True)
    with torch.no_grad():  # a power of two is a bit shift at inference
        scale = torch.exp2(w.abs().mean(within, keepdim=True).log2().round())
    return signs(w) * scale


class IRConv2d(BinaryConv2d):
    """IR-Net (Qin et al., arXiv 1909.10788): the convolution binarizes its input inside its own forward."""

    def __init__(self, *args, **options):
        super().__init__(*args, **options)
        self.sign = EDESign()

    def binary_weight(self) -> Tensor:
        return libra(self.weight, lambda w: DecayingSign.apply(w, self.sign.t, self.sign.k))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.sign(x))


def anneal(model: nn.Module, epoch: int, epochs: int) -> None:
    """IR-Net's schedule, before each epoch: from nearly the identity, which updates all weights, to nearly sign."""
    t = 0.1 * 10 ** (epoch / epochs * 2)  # from 0.1 to 10
    for module in model.modules():
        if isinstance(module, EDESign):
            module.t.fill_(t)
            module.k.fill_(max(1 / t, 1.0))


def magnitude_aware(weight: Tensor) -> Tensor:
    """Bi-Real Net's weight: mean|w| sign(w), mean over an output channel, so that the gradient knows the size of w."""
    scale = weight.detach().abs().mean(tuple(range(1, weight.ndim)), keepdim=True)
    return ClippedSign.apply(weight) * scale


class MagnitudeAwareConv2d(BinaryConv2d):
    """Bi-Real Net (Liu et al., arXiv 1808.00278): the module before the convolution binarizes the activation."""

    def binary_weight(self) -> Tensor:
        return magnitude_aware(self.weight)


class Shift(nn.Module):
    """x + b, b learned for each channel."""

    def __init__(self, channels: int):
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bias


class RSign(ApproxSign):
    """ReActNet (Liu et al., arXiv 2003.03488): sign with a learned threshold for each channel."""

    def __init__(self, channels: int):
        super().__init__()
        self.shift = Shift(channels)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.shift(x))


class RPReLU(nn.Sequential):
    """ReActNet: PReLU with a learned shift of its input and of its output for each channel."""

    def __init__(self, channels: int):
        super().__init__(Shift(channels), nn.PReLU(channels), Shift(channels))


IRNET = Recipe(conv=partial(IRConv2d, bias=False), nonlinearity=lambda channels: nn.Hardtanh())
BIREAL = Recipe(conv=partial(MagnitudeAwareConv2d, bias=False), binary=lambda channels: ApproxSign())
REACTNET = Recipe(conv=BIREAL.conv, binary=RSign, nonlinearity=RPReLU)


@dataclass(frozen=True)
class Method:
    """A recipe, what is called before each epoch, and the optimizer that its paper trains with."""

    recipe: Recipe
    on_epoch: Callable[[nn.Module, int, int], None] | None
    optimizer: str


METHODS = {
    "irnet": Method(IRNET, anneal, "sgd"),
    "bireal": Method(BIREAL, None, "adam"),
    "reactnet": Method(REACTNET, None, "adam"),
}


def binarize_weights(model: nn.Module, binary: bool) -> None:
    """Switch the binary convolutions of a network between binary and real weights."""
    for module in model.modules():
        if isinstance(module, BinaryConv2d):
            module.real_weight = not binary


# --- bodies ----------------------------------------------------------------------------------------------------------


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


def stem(recipe: Recipe, in_channels: int, width: int) -> dict[str, nn.Module]:
    return {
        "conv1": nn.Conv2d(in_channels, width, 3, padding=1, bias=False),
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
    recipe: Recipe, num_classes: int, in_channels: int = 3, *, stages: int, units: int | Sequence[int], width: int
) -> nn.Sequential:
    """ResNet (He et al., arXiv 1512.03385) for small images: `units` convolutions a stage, widths doubling.

    Input (batch, in_channels, height, width) float, output (batch, num_classes).
    """
    modules = stem(recipe, in_channels, width)
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
    "vgg_small": partial(vgg_small, width=128),
}
