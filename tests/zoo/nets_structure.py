"""What was found on public models beyond one sign in front of one product: sums, joins, scales, random structure."""

import torch
import torch.nn.functional as F
from torch import nn

from .common import ActConvNorm, BinaryWeightConv2d, Net, Sign, SignModule


class SkippedLayers(nn.Module):
    """Stochastic depth that skips whole blocks (arXiv 1603.09382)."""

    def __init__(self, width=8, blocks=5, rate=0.1):
        super().__init__()
        self.blocks, self.rate = nn.ModuleList(ActConvNorm(SignModule(), width) for _ in range(blocks)), rate

    def forward(self, x):
        for block in self.blocks:
            if not (self.training and torch.rand(()) < self.rate):
                x = block(x)
        return x


class ResidualBinarization(nn.Module):
    """Two codes, the second of what the first left, in one operand (arXiv 1711.10725)."""

    def __init__(self, width=8):
        super().__init__()
        self.conv, self.norm = BinaryWeightConv2d(width, width), nn.BatchNorm2d(width)

    def forward(self, x):
        first = Sign.apply(x)
        second = Sign.apply(x - 0.8 * first)
        return self.norm(self.conv(0.8 * first + 0.4 * second))


class NoisySign(nn.Module):
    def forward(self, x):
        return Sign.apply(x) + 0.05 * torch.randn_like(x)


class CodesAndProducts(nn.Module):
    """Codes beside products of codes, joined into one operand."""

    def __init__(self, width=8):
        super().__init__()
        self.act, self.conv, self.norm = SignModule(), BinaryWeightConv2d(2 * width, width), nn.BatchNorm2d(width)

    def forward(self, x):
        b = self.act(x)
        return self.norm(self.conv(torch.cat([-b * b.roll(1, -1), b], 1)))


class TokenScale(nn.Module):
    """Tokens that are scaled by their own mean magnitude after the sign."""

    def __init__(self, width=16):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 2, 2), nn.Flatten(2))
        self.norm, self.lin, self.fc = nn.LayerNorm(width), nn.Linear(width, width), nn.Linear(width, 10)

    def forward(self, x):
        x = self.norm(self.stem(x).transpose(1, 2))
        x = self.lin(Sign.apply(x) * x.abs().mean(-1, keepdim=True).detach())
        return self.fc(x.mean(1))


class PixelScale(nn.Module):
    """XNOR-Net's scale for each pixel (arXiv 1603.05279)."""

    def forward(self, x):
        return Sign.apply(x) * x.abs().mean(1, keepdim=True).detach()


class ZeroThreshold(nn.Module):
    def __init__(self):
        super().__init__()
        self.threshold = nn.Parameter(torch.tensor(0.0))

    def forward(self, x):
        return Sign.apply(x - self.threshold)


class DeadSign(nn.Module):
    """Constant: the latent never changes its sign."""

    def forward(self, x):
        return Sign.apply(x + 9)


class HiddenProduct(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, w):
        ctx.save_for_backward(x, w)
        return F.conv2d(x, w, padding=1)

    @staticmethod
    def backward(ctx, grad):
        x, w = ctx.saved_tensors
        return (
            torch.nn.grad.conv2d_input(x.shape, w, grad, padding=1),
            torch.nn.grad.conv2d_weight(x, w.shape, grad, padding=1),
        )


class HiddenConv2d(nn.Conv2d):
    """A product inside a custom autograd function."""

    def __init__(self, width=8):
        super().__init__(width, width, 3, padding=1, bias=False)

    def forward(self, x):
        return HiddenProduct.apply(x, self.weight)


class LazyGenerator(nn.Module):
    """Dither from a generator of its own, and a history in a deque-like list."""

    def __init__(self, width=8):
        super().__init__()
        self.generator, self.history = torch.Generator().manual_seed(0), []
        self.block = ActConvNorm(SignModule(), width)

    def forward(self, x):
        out = self.block(x + 0.01 * torch.randn(x.shape, generator=self.generator))
        self.history.append(out.detach().mean())
        return out


def frozen_stem():
    net = Net(ActConvNorm(SignModule()), ActConvNorm(SignModule()))
    net.stem[0].requires_grad_(False)
    return net


class Packed(nn.Module):
    """A recurrent network on packed sequences: lengths in falling order."""

    def __init__(self, width=16):
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(5, width), nn.LayerNorm(width))
        self.lin, self.rnn, self.fc = nn.Linear(width, width), nn.GRU(width, 8, batch_first=True), nn.Linear(8, 10)

    def forward(self, x, lengths):
        x = self.lin(Sign.apply(self.stem(x)))
        packed = nn.utils.rnn.pack_padded_sequence(x, lengths, batch_first=True)
        return self.fc(self.rnn(packed)[1][0])
