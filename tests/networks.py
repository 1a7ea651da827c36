"""The binary networks that tests train, and what tests look at.

A small ResNet in three ways to binarize (IR-Net, Bi-Real Net, ReActNet) with a full-precision twin of the same module
names, and networks that do one awkward thing each.
"""

from __future__ import annotations

import gc
import pickle
import random
import warnings
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from cmim_plugin import CMIM, CMIMWarning
from cmim_plugin.passes import Pass

# -- layers --------------------------------------------------------------------------------------------------------


class Sign(torch.autograd.Function):
    """Sign with sign(0) = 1; backward: the gradient times ``slope(x)``."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, slope: Callable[[Tensor], Tensor]) -> Tensor:
        ctx.save_for_backward(x)
        ctx.slope = slope
        return (x >= 0).to(x.dtype) * 2 - 1

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (x,) = ctx.saved_tensors
        return grad * ctx.slope(x), None


def clipped(x: Tensor) -> Tensor:
    return (x.abs() < 1).to(x.dtype)


def polynomial(x: Tensor) -> Tensor:
    return (2 - 2 * x.abs()).clamp(min=0)


def error_decay(x: Tensor) -> Tensor:
    """IR-Net's estimator at the start of training: t = 0.1, k = 10."""
    return 1 - torch.tanh(0.1 * x) ** 2


class IRConv2d(nn.Conv2d):
    """IR-Net: binarizes weight and input in its own forward."""

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        w = w / w.std((1, 2, 3), keepdim=True)
        scale = 2 ** w.detach().abs().mean((1, 2, 3), keepdim=True).log2().round()
        return self._conv_forward(Sign.apply(x, error_decay), Sign.apply(w, error_decay) * scale, self.bias)


class BinaryWeightConv2d(nn.Conv2d):
    """Bi-Real Net: binarizes its weight; the module before it binarizes the activation."""

    def forward(self, x: Tensor) -> Tensor:
        scale = self.weight.detach().abs().mean((1, 2, 3), keepdim=True)
        return self._conv_forward(x, Sign.apply(self.weight, clipped) * scale, self.bias)


class ApproxSign(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Sign.apply(x, polynomial)


class Shift(nn.Module):
    def __init__(self, channels: int) -> None:
        super().__init__()
        self.bias = nn.Parameter(torch.zeros(1, channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return x + self.bias


class RSign(ApproxSign):
    """ReActNet: a learned threshold for each channel."""

    def __init__(self, channels: int) -> None:
        super().__init__()
        self.shift = Shift(channels)

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(self.shift(x))


class RPReLU(nn.Sequential):
    def __init__(self, channels: int) -> None:
        super().__init__(Shift(channels), nn.PReLU(channels), Shift(channels))


class MaskedSign(torch.autograd.Function):
    """Keeps a mask for its backward pass and not x, so that x may be overwritten."""

    @staticmethod
    def forward(ctx: Any, x: Tensor) -> Tensor:
        ctx.save_for_backward(x.abs() < 1)
        return (x >= 0).to(x.dtype) * 2 - 1

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        return grad * ctx.saved_tensors[0]


class Binary(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return MaskedSign.apply(x)


class BinaryConv(nn.Conv2d):
    """Binarizes within its own forward, where no hook on a module sees it."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(MaskedSign.apply(x), self.weight, self.bias, self.stride, self.padding)


# -- a ResNet ------------------------------------------------------------------------------------------------------


def identity(channels: int) -> nn.Module:
    return nn.Identity()


@dataclass(frozen=True)
class Recipe:
    """How a method binarizes: what stands at, before and after each inner convolution."""

    conv: Callable[..., nn.Module]
    binary: Callable[[int], nn.Module] = identity
    nonlinearity: Callable[[int], nn.Module] = identity


IRNET = Recipe(partial(IRConv2d, bias=False), nonlinearity=lambda channels: nn.Hardtanh())
BIREAL = Recipe(partial(BinaryWeightConv2d, bias=False), binary=lambda channels: ApproxSign())
REACTNET = Recipe(BIREAL.conv, binary=RSign, nonlinearity=RPReLU)
METHODS = {"IR-Net": IRNET, "Bi-Real": BIREAL}


def full_precision(recipe: Recipe) -> Recipe:
    """Plain convolutions, ReLU where an activation was binarized."""
    binary = identity if recipe.binary is identity else lambda channels: nn.ReLU()
    return replace(recipe, conv=partial(nn.Conv2d, bias=False), binary=binary)


class Unit(nn.Module):
    """binary -> conv -> batch norm -> + shortcut -> nonlinearity."""

    def __init__(self, recipe: Recipe, in_channels: int, out_channels: int, stride: int = 1) -> None:
        super().__init__()
        self.binary = recipe.binary(in_channels)
        self.conv = recipe.conv(in_channels, out_channels, 3, stride, 1)
        self.bn = nn.BatchNorm2d(out_channels)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1:
            self.shortcut = nn.Sequential(nn.AvgPool2d(stride, ceil_mode=True), nn.Conv2d(in_channels, out_channels, 1))
        self.nonlinearity = recipe.nonlinearity(out_channels)

    def forward(self, x: Tensor) -> Tensor:
        return self.nonlinearity(self.bn(self.conv(self.binary(x))) + self.shortcut(x))


def network(
    recipe: Recipe = BIREAL, *, stages: int = 2, units: int = 1, width: int = 4, classes: int = 4, seed: int = 0
) -> nn.Sequential:
    """``stages * units`` binarized convolutions on maps of two channels."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        modules: dict[str, nn.Module] = {
            "conv1": nn.Conv2d(2, width, 3, padding=1, bias=False),
            "bn1": nn.BatchNorm2d(width),
            "nonlinearity1": recipe.nonlinearity(width),
        }
        before = width
        for stage in range(stages):
            after = width * 2**stage
            first = Unit(recipe, before, after, 2 if stage else 1)
            modules[f"layer{stage + 1}"] = nn.Sequential(first, *(Unit(recipe, after, after) for _ in range(units - 1)))
            before = after
        modules |= {"pool": nn.AdaptiveAvgPool2d(1), "flatten": nn.Flatten(), "fc": nn.Linear(before, classes)}
        return nn.Sequential(OrderedDict(modules))


def teacher(recipe: Recipe = BIREAL, **sizes: int) -> nn.Sequential:
    """A full-precision network whose modules have the names of the binary one's."""
    return network(full_precision(recipe), **{"seed": 3, **sizes})


def batch(n: int = 6, seed: int = 1, size: int = 4) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 2, size, size, generator=generator), torch.arange(n) % 4


X, Y = batch()


# -- what tests look at --------------------------------------------------------------------------------------------


def a_loss(model: nn.Module, cmim: CMIM, x: Tensor = X, **arguments: Any) -> Tensor:
    """The loss of a forward pass."""
    model(x)
    return cmim(model, **arguments)


def waiting(cmim: CMIM) -> Pass:
    """The one pass that waits for its loss: its pairs show what was captured."""
    (captured,) = cmim._capture._waiting.values()
    return captured


def gradients(*parts: nn.Module) -> list[Tensor]:
    """Of networks and, for a plug-in, of its heads."""
    found = []
    for part in parts:
        tensors = [part.heads.weights] if isinstance(part, CMIM) else part.parameters()
        found += [tensor.grad.clone() for tensor in tensors if tensor.grad is not None]
    return found


def assert_same(found: Any, expected: Any) -> None:
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def leftover_hooks(model: nn.Module) -> list[str]:
    return [
        f"{name}.{attribute}"
        for name, module in model.named_modules()
        for attribute, value in vars(module).items()
        if "hooks" in attribute and value
    ]


def random_states() -> tuple[Any, ...]:
    kind, keys, *rest = np.random.get_state()  # noqa: NPY002
    return torch.get_rng_state().tolist(), random.getstate(), kind, keys.tolist(), rest


def everything(model: nn.Module) -> list[Any]:
    """What a user could see of a model, and of the world around it, bit by bit."""
    seen: list[Any] = [pickle.dumps(model), random_states()]
    for name, module in model.named_modules():
        seen.append((name, id(module), module.training, list(vars(module))))
        seen.append([(key, id(value)) for key, value in vars(module).items() if isinstance(value, (dict, list))])
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        seen.append((name, id(tensor), tensor.data_ptr(), tensor.requires_grad, id(tensor.grad)))
        if tensor.grad is not None:
            seen.append(tensor.grad.tolist())
    return seen


@contextmanager
def told() -> Iterator[list[str]]:
    """The warnings of the library, filled in at the end."""
    messages: list[str] = []
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        try:
            yield messages
        finally:
            messages += [str(w.message) for w in record if issubclass(w.category, CMIMWarning)]


class Storages:
    """Weak references to the storages of every module's output, from the time it is put on a model."""

    def __init__(self, model: nn.Module) -> None:
        self.references: list[StorageWeakRef] = []
        self.handles = [module.register_forward_hook(self._see) for module in model.modules()]

    def _see(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.references.append(StorageWeakRef(output.untyped_storage()))

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()

    def alive(self) -> int:
        assert self.references
        gc.collect()
        return sum(not reference.expired() for reference in self.references)
