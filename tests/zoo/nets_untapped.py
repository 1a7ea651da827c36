"""What must not be tapped: binary weights, masks, gates, inputs, coincidences, binarization without gradient."""

import torch
import torch.nn.functional as F
from torch import nn
from torch.nn.utils import parametrize

from .common import ActConvNorm, BinaryWeightConv2d, Net, Sign, SignModule


class NoGradEncoder(nn.Module):
    """A binary activation of the network's own features, made under no_grad: nothing to train through it."""

    def forward(self, x):
        with torch.no_grad():
            return torch.where(x > 0, 1.0, -1.0)


class NoGradBranch(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.encode, self.conv = NoGradEncoder(), nn.Conv2d(width, width, 1)
        self.main = ActConvNorm(SignModule())

    def forward(self, x):
        return self.main(x) + self.conv(self.encode(x))


class Thermometer(nn.Module):
    """FracBNN's input layer: the image against a ladder of thresholds, detached."""

    def forward(self, x):
        ladder = torch.linspace(-1, 1, 4).view(1, 1, -1, 1, 1)
        return ((ladder < x.unsqueeze(2)).float() * 2 - 1).flatten(1, 2).detach()


class ThermometerNet(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.encoder = Thermometer()
        self.stem = nn.Sequential(BinaryWeightConv2d(12, width), nn.BatchNorm2d(width))
        self.block, self.fc = ActConvNorm(SignModule()), nn.Linear(width, 10)

    def forward(self, x):
        return self.fc(self.block(self.stem(self.encoder(x))).mean((2, 3)))


class BinaryImage(nn.Module):
    """The first convolution binarizes the image as every other one does its input."""

    class Conv(nn.Conv2d):
        def forward(self, x):
            return F.conv2d(Sign.apply(x), Sign.apply(self.weight), None, self.stride, self.padding)

    def __init__(self, width=8):
        super().__init__()
        self.stem = nn.Sequential(self.Conv(3, width, 3, padding=1), nn.BatchNorm2d(width))
        self.conv, self.fc = self.Conv(width, width, 3, padding=1), nn.Linear(width, 10)

    def forward(self, x):
        return self.fc(self.conv(self.stem(x)).mean((2, 3)))


class MixtureOfExperts(nn.Module):
    """Hard gates with a straight-through gradient, one-hot and an operand of einsum; the experts are binarized
    by one activation module in front of them."""

    def __init__(self, width=8, experts=4):
        super().__init__()
        self.gate, self.act = nn.Linear(width, experts), SignModule()
        self.experts = nn.ModuleList(BinaryWeightConv2d(width, width) for _ in range(experts))

    def forward(self, x):
        soft = torch.softmax(self.gate(x.mean((2, 3))), -1)
        gate = F.one_hot(soft.argmax(-1), soft.shape[-1]).float() - soft.detach() + soft
        binary = self.act(x)
        outs = torch.stack([expert(binary) for expert in self.experts], 1)
        return torch.einsum("be,bechw->bchw", gate, outs) + x


class GumbelGate(nn.Module):
    """A hard gumbel-softmax over two choices: codes {0, 1} with a gradient, multiplied in by matmul."""

    def __init__(self, width=8):
        super().__init__()
        self.gate, self.mix = nn.Linear(width, 2), nn.Linear(2, width)

    def forward(self, x):
        gate = F.gumbel_softmax(self.gate(x.mean((2, 3))), hard=True)
        return x * self.mix(gate)[:, :, None, None]


class MaskNet(nn.Module):
    """Masks that are no activations: a top-k channel mask, a spatial mask, dropout on a constant, a causal matrix
    as an operand. No binarization at all."""

    def __init__(self, width=8):
        super().__init__()
        self.score, self.conv = nn.Linear(width, width), nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x):
        score = torch.sigmoid(self.score(x.mean((2, 3))))
        keep = (score >= score.topk(4, 1)[0][:, -1:]).float()
        x = self.conv(x * (keep - score.detach() + score)[:, :, None, None])
        x = x * (x.mean(1, keepdim=True) > 0).float() * F.dropout(torch.ones_like(x), 0.1)
        causal = torch.tril(torch.ones(x.shape[-1], x.shape[-1]))
        return torch.matmul(x, causal)


class GraphNet(nn.Module):
    """A {0, 1} adjacency matrix and one-hot node types come in as inputs and are operands of matmuls; the hidden
    layer alone is binarized."""

    def __init__(self, width=16):
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(5, width), nn.LayerNorm(width))
        self.embed, self.lin = nn.Linear(4, width, bias=False), nn.Linear(width, width)
        self.fc = nn.Linear(width, 10)

    def forward(self, nodes, kinds, adjacency):
        x = self.stem(nodes) + self.embed(F.one_hot(kinds, 4).float())
        x = torch.tanh(adjacency @ x)
        x = self.lin(Sign.apply(x))
        return self.fc((adjacency @ x).mean(1))


class SqueezeExcite(nn.Module):
    """Two hidden units after a ReLU: on an example of one image they may well hold [0, v]."""

    def __init__(self, width=8):
        super().__init__()
        self.reduce, self.expand = nn.Linear(width, 2), nn.Linear(2, width)
        with torch.no_grad():  # one unit dead and one alive on most images
            self.reduce.bias.copy_(torch.tensor([1.0, -1.0]))

    def forward(self, x):
        return x * torch.sigmoid(self.expand(F.relu(self.reduce(x.mean((2, 3))))))[:, :, None, None]


class NormOfPooled(nn.Module):
    """BatchNorm of (B, C): with an example of two images its output is exactly +-1."""

    def __init__(self, width=8):
        super().__init__()
        self.norm, self.lin = nn.BatchNorm1d(width, eps=1e-12, affine=False), nn.Linear(width, width)

    def forward(self, x):
        return x + self.lin(self.norm(x.mean((2, 3))))[:, :, None, None]


class SaturatedGate(nn.Module):
    """A hard tanh far into saturation: three values in four are -1 or 1, yet nothing is binarized."""

    def __init__(self, width=8):
        super().__init__()
        self.gain, self.conv = nn.Parameter(torch.tensor(3.0)), nn.Conv2d(width, width, 1)

    def forward(self, x):
        return x + self.conv(F.hardtanh(x * self.gain))


class SignParametrization(nn.Module):
    def forward(self, w):
        return Sign.apply(w) * w.abs().mean()


class ComputedWeight(nn.Module):
    """A binary weight that is computed: a low-rank product, normalised, then signed; called as F.linear."""

    def __init__(self, width=8):
        super().__init__()
        self.u, self.v = nn.Parameter(torch.randn(width, 3)), nn.Parameter(torch.randn(3, width))
        self.binarize = SignModule()

    def forward(self, x):
        w = self.binarize(F.normalize(self.u @ self.v, dim=1))
        return F.linear(x.transpose(1, 3), w).transpose(1, 3)


def binary_weights():
    conv = nn.Conv2d(8, 8, 3, padding=1)
    parametrize.register_parametrization(conv, "weight", SignParametrization())
    norms = nn.BatchNorm2d(8), nn.BatchNorm2d(8)
    return Net(BinaryWeightConv2d(8, 8), norms[0], nn.ReLU(), conv, norms[1], ComputedWeight())


def relu_net():
    return Net(nn.Conv2d(8, 8, 3, padding=1), nn.BatchNorm2d(8), nn.ReLU(inplace=True), nn.Conv2d(8, 8, 1))


class AdditiveNoise(nn.Module):
    """The sign modelled by additive uniform noise while training: the operand never has two values."""

    def forward(self, x):
        x = x.clamp(-1, 1)
        return x + torch.rand_like(x) - 0.5 if self.training else x.sign()


def additive_noise():
    return Net(ActConvNorm(AdditiveNoise()), ActConvNorm(AdditiveNoise()))
