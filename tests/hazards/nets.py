"""The smallest binary networks that every hazard can be tried on, and what the tests look at."""

from __future__ import annotations

import gc
import itertools
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from cmim_plugin import CMIM

CLASSES = 3


class Sign(torch.autograd.Function):
    """Written so that torch.func and forward-mode differentiation take it."""

    generate_vmap_rule = True

    @staticmethod
    def forward(x: Tensor) -> Tensor:
        return torch.where(x >= 0, 1.0, -1.0).to(x.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: tuple[Tensor], output: Tensor) -> None:
        ctx.save_for_backward(*inputs)
        ctx.save_for_forward(*inputs)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grad * (x.abs() <= 1)

    @staticmethod
    def jvp(ctx: Any, tangent: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return tangent * (x.abs() <= 1)


class Binary(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        return Sign.apply(x)


class BinaryConv(nn.Conv2d):
    """Binarizes within its own forward, where no hook on a module sees it."""

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(Sign.apply(x), self.weight, self.bias, self.stride, self.padding)


def network(inside: bool, channels: tuple[int, ...] = (4, 6), norm: str = "group", in_channels: int = 2) -> nn.Module:
    """A stem, then one binarization for each entry of `channels`: inside the convolution, or in a module before it."""
    widths = [*channels, channels[-1]]
    layers: list[nn.Module] = [nn.Conv2d(in_channels, widths[0], 3, padding=1)]
    for before, after in itertools.pairwise(widths):
        layers.append(nn.GroupNorm(2, before) if norm == "group" else nn.BatchNorm2d(before))
        conv = (BinaryConv if inside else nn.Conv2d)(before, after, 3, padding=1)
        layers.append(conv if inside else nn.Sequential(Binary(), conv))
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(widths[-1], CLASSES))


def batch(n: int = 6, size: int = 4, seed: int = 1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 2, size, size, generator=generator), torch.arange(n) % CLASSES


def gradients(*modules: nn.Module) -> list[Tensor]:
    """Of all parameters, and of the heads of a plug-in, which are none."""
    leaves = [[m.heads.weights] if isinstance(m, CMIM) else m.parameters() for m in modules]
    return [p.grad.clone() for p in itertools.chain(*leaves) if p.grad is not None]


def equal(found: list[Tensor], expected: list[Tensor]) -> bool:
    """Bit by bit."""
    return len(found) == len(expected) and all(torch.equal(f, e) for f, e in zip(found, expected, strict=True))


def hooks_on(model: nn.Module) -> int:
    return sum(len(value) for m in model.modules() for key, value in vars(m).items() if "hooks" in key and value)


class Activations:
    """Weak references to the storages of all modules' outputs, from the time it is put on a model."""

    def __init__(self, model: nn.Module) -> None:
        self.references: list[StorageWeakRef] = []
        self.handles = [module.register_forward_hook(self._see) for module in model.modules()]

    def _see(self, module: nn.Module, args: Any, output: Tensor) -> None:
        self.references.append(StorageWeakRef(output.untyped_storage()))

    def alive(self) -> int:
        assert self.references
        gc.collect()
        return sum(not reference.expired() for reference in self.references)

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()
