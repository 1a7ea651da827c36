"""What the zoo's networks share: a stem, a classifier, a sign, binary weights. Nothing of cmim_plugin."""

import torch
import torch.nn.functional as F
from torch import nn


class Sign(torch.autograd.Function):
    """sign with the clipped straight-through gradient of BinaryNet (arXiv 1602.02830)."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.sign(x)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * (x.abs() <= 1).to(grad.dtype)


class SignModule(nn.Module):
    def forward(self, x):
        return Sign.apply(x)


class BinaryWeightConv2d(nn.Conv2d):
    """A convolution that binarizes its weight only: magnitude-aware, by the detach trick (Bi-Real net)."""

    def __init__(self, c_in, c_out, kernel=3, stride=1):
        super().__init__(c_in, c_out, kernel, stride, kernel // 2, bias=False)

    def forward(self, x):
        scale = self.weight.abs().mean((1, 2, 3), keepdim=True).detach()
        clipped = self.weight.clamp(-1, 1)
        weight = (scale * self.weight.sign() - clipped).detach() + clipped
        return F.conv2d(x, weight, None, self.stride, self.padding)


class Net(nn.Module):
    """Full-precision stem -> body -> mean over the positions -> full-precision classifier."""

    def __init__(self, *body, width_in=8, width_out=8, dims=2):
        super().__init__()
        conv, norm = (nn.Conv2d, nn.BatchNorm2d) if dims == 2 else (nn.Conv3d, nn.BatchNorm3d)
        self.stem = nn.Sequential(conv(3, width_in, 3, padding=1, bias=False), norm(width_in))
        self.body = nn.Sequential(*body)
        self.fc = nn.Linear(width_out, 10)

    def forward(self, x):
        return self.fc(self.body(self.stem(x)).flatten(2).mean(2))


class ActConvNorm(nn.Module):
    """An activation module, a convolution with binary weights, a norm and a shortcut."""

    def __init__(self, act, width=8):
        super().__init__()
        self.act = act
        self.conv = BinaryWeightConv2d(width, width)
        self.norm = nn.BatchNorm2d(width)

    def forward(self, x):
        return self.norm(self.conv(self.act(x))) + x
