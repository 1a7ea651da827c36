"""The networks of the scripts beside this file."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn


class Sign(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x: Tensor) -> Tensor:
        ctx.save_for_backward(x)
        return torch.where(x >= 0, 1.0, -1.0)

    @staticmethod
    def backward(ctx, grad: Tensor) -> Tensor:
        (x,) = ctx.saved_tensors
        return grad * (x.abs() <= 1)


class BinaryConv2d(nn.Conv2d):
    """Binarizes its input and its weight."""

    def forward(self, x: Tensor) -> Tensor:
        return self._conv_forward(Sign.apply(x), Sign.apply(self.weight), self.bias)


def resnet(width: int = 8) -> nn.Module:
    def unit(a: int, b: int, stride: int) -> nn.Module:
        return nn.Sequential(BinaryConv2d(a, b, 3, stride, 1, bias=False), nn.BatchNorm2d(b), nn.Hardtanh())

    return nn.Sequential(
        *(nn.Conv2d(3, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width), nn.Hardtanh()),
        *(unit(width, width, 1), unit(width, 2 * width, 2), unit(2 * width, 2 * width, 1)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(2 * width, 10)),
    )


class ReActUnit(nn.Module):
    def __init__(self, channels: int, binary_weights: bool, full_precision: bool):
        super().__init__()
        self.binary_weights, self.full_precision = binary_weights, full_precision
        self.threshold = nn.Parameter(torch.zeros(channels, 1, 1))
        self.conv = nn.Conv2d(channels, channels, 3, 1, 1, bias=False)
        self.bn, self.prelu = nn.BatchNorm2d(channels), nn.PReLU(channels)

    def forward(self, x: Tensor) -> Tensor:
        shifted, weight = x + self.threshold, self.conv.weight
        activation = F.relu(shifted) if self.full_precision else Sign.apply(shifted)
        if self.binary_weights:
            weight = Sign.apply(weight) * weight.detach().abs().mean((1, 2, 3), keepdim=True)
        return self.prelu(self.bn(F.conv2d(activation, weight, padding=1)) + x)


def reactnet(binary_weights: bool = False, full_precision: bool = False, width: int = 8) -> nn.Module:
    return nn.Sequential(
        *(nn.Conv2d(3, width, 3, 2, 1, bias=False), nn.BatchNorm2d(width)),
        *(ReActUnit(width, binary_weights, full_precision) for _ in range(2)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(width, 10)),
    )


class BinaryLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(Sign.apply(x), Sign.apply(self.weight) * self.weight.detach().abs().mean(), self.bias)


class Block(nn.Module):
    def __init__(self, dim: int, heads: int, dropout: float):
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value, self.out = (BinaryLinear(dim, dim) for _ in range(4))
        self.norm1, self.norm2 = nn.LayerNorm(dim), nn.LayerNorm(dim)
        self.mlp = nn.Sequential(BinaryLinear(dim, 2 * dim), nn.PReLU(), BinaryLinear(2 * dim, dim))
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, mask: Tensor) -> Tensor:
        def split(x: Tensor) -> Tensor:
            return x.unflatten(2, (self.heads, -1)).transpose(1, 2)

        q, k, v = split(self.query(x)), split(self.key(x)), split(self.value(x))
        attended = F.scaled_dot_product_attention(q, k, v, attn_mask=mask[:, None, None, :].bool())
        x = self.norm1(x + self.dropout(self.out(attended.transpose(1, 2).flatten(2))))
        return self.norm2(x + self.dropout(self.mlp(x)))


class BinaryTransformer(nn.Module):
    def __init__(self, vocabulary: int = 30, dim: int = 16, heads: int = 2, layers: int = 2, classes: int = 2):
        super().__init__()
        self.embedding = nn.Embedding(vocabulary, dim)
        self.positions = nn.Parameter(torch.randn(1, 64, dim))
        self.blocks = nn.ModuleList(Block(dim, heads, dropout=0.1) for _ in range(layers))
        self.classifier = nn.Linear(dim, classes)

    def forward(self, input_ids: Tensor, attention_mask: Tensor) -> Tensor:
        x = self.embedding(input_ids) + self.positions[:, : input_ids.shape[1]]
        for block in self.blocks:
            x = block(x, attention_mask)
        return self.classifier(x[:, 0])
