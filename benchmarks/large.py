"""Binary networks for large images, a ReActNet-A and a ViT: inputs (batch, 3, 224, 224), outputs (batch, 1000)."""

from __future__ import annotations

from collections import OrderedDict

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nets import ApproxSign, MagnitudeAwareConv2d, RPReLU, RSign, magnitude_aware

# Output channels and stride of each block of ReActNet-A.
BLOCKS = [(64, 1), (128, 2), (128, 1), (256, 2), (256, 1), (512, 2), *[(512, 1)] * 5, (1024, 2), (1024, 1)]


class ReActBlock(nn.Module):
    """A 3x3 and a 1x1 binary convolution with a shortcut around each. Twice the channels are two 1x1 convolutions."""

    def __init__(self, in_channels: int, out_channels: int, stride: int):
        super().__init__()
        self.sign1, self.sign2 = RSign(in_channels), RSign(in_channels)
        self.conv3 = MagnitudeAwareConv2d(in_channels, in_channels, 3, stride, 1, bias=False)
        self.bn1 = nn.BatchNorm2d(in_channels)
        self.pool = nn.AvgPool2d(stride) if stride > 1 else nn.Identity()
        self.prelu1, self.prelu2 = RPReLU(in_channels), RPReLU(out_channels)
        halves = out_channels // in_channels
        self.conv1 = nn.ModuleList(
            [MagnitudeAwareConv2d(in_channels, in_channels, 1, bias=False) for _ in range(halves)]
        )
        self.bn2 = nn.ModuleList([nn.BatchNorm2d(in_channels) for _ in range(halves)])

    def forward(self, x: Tensor) -> Tensor:
        x = self.prelu1(self.bn1(self.conv3(self.sign1(x))) + self.pool(x))
        binary = self.sign2(x)
        halves = [bn(conv(binary)) + x for conv, bn in zip(self.conv1, self.bn2, strict=True)]
        return self.prelu2(torch.cat(halves, 1) if len(halves) > 1 else halves[0])


def reactnet_a() -> nn.Module:
    """ReActNet-A (Liu et al., arXiv 2003.03488), built on MobileNet; weights scaled as in Bi-Real Net."""
    layers: list[nn.Module] = [nn.Conv2d(3, 32, 3, 2, 1, bias=False), nn.BatchNorm2d(32)]
    channels = 32
    for out_channels, stride in BLOCKS:
        layers.append(ReActBlock(channels, out_channels, stride))
        channels = out_channels
    return nn.Sequential(*layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(channels, 1000))


class MagnitudeAwareLinear(nn.Linear):
    """Binary weights; the module before it binarizes the tokens."""

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x, magnitude_aware(self.weight), self.bias)


def binary_vit(name: str = "vit_small_patch16_224") -> nn.Module:
    """A ViT of timm with the linear layers of its blocks binarized as in Bi-Real Net."""
    import timm

    net = timm.create_model(name, pretrained=False)
    for path, layer in list(net.blocks.named_modules()):
        if isinstance(layer, nn.Linear):
            linear = MagnitudeAwareLinear(layer.in_features, layer.out_features, layer.bias is not None)
            net.blocks.set_submodule(path, nn.Sequential(OrderedDict(binary=ApproxSign(), linear=linear)))
    return net
