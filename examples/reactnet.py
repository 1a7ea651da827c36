"""ReActNet with and without CMIM. Liu et al., "ReActNet: Towards Precise Binary Neural Network with
Generalized Activation Functions", ECCV 2020, https://arxiv.org/abs/2003.03488

    python examples/reactnet.py
    python examples/reactnet.py --data cifar10 --epochs 100 --seeds 0 1 2

Bi-Real Net with two learned activation functions (ReActNet's ResNet form, without its distillation).
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

import training
from bireal import BIREAL, ApproxSign
from bodies import Recipe


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

if __name__ == "__main__":
    training.main("ReActNet", REACTNET)
