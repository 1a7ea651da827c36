"""Bi-Real Net with and without CMIM. Liu et al., "Bi-Real Net: Enhancing the Performance of 1-bit CNNs with
Improved Representational Capability and Advanced Training Algorithm", ECCV 2018, https://arxiv.org/abs/1808.00278

    python examples/bireal.py
    python examples/bireal.py --data cifar10 --epochs 100 --seeds 0 1 2

A module of its own binarizes the activations. The CMIM lines are in training.py, in `train`.
"""

from __future__ import annotations

from functools import partial

from torch import Tensor, nn

import training
from bodies import Recipe, Sign


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

if __name__ == "__main__":
    training.main("Bi-Real Net", BIREAL)
