"""IR-Net with and without CMIM. Qin et al., "Forward and Backward Information Retention for Accurate Binary
Neural Networks", CVPR 2020, https://arxiv.org/abs/1909.10788

    python examples/irnet.py
    python examples/irnet.py --data cifar10 --epochs 100 --seeds 0 1 2

The convolution binarizes its input inside its own forward. The CMIM lines are in training.py, in `train`.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

import torch
from torch import Tensor, nn

import training
from bodies import Recipe, Sign


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

if __name__ == "__main__":
    training.main("IR-Net", IRNET, on_epoch=anneal)
