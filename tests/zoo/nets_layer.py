"""Shapes B and D: a convolution or linear layer binarizes inside its own forward, at times in place."""

import torch
import torch.nn.functional as F
from torch import nn

from .common import Net, Sign


class InPlaceConv2d(nn.Conv2d):
    """BinaryNet as it is most often copied: the data of input and weight are replaced, autograd is not told.
    The float weight lives on as an attribute of the parameter, made in the first forward."""

    def forward(self, input):
        if input.size(1) != 3:
            input.data = input.data.sign()
        if not hasattr(self.weight, "org"):
            self.weight.org = self.weight.data.clone()
        self.weight.data = self.weight.org.sign()
        return F.conv2d(input, self.weight, None, self.stride, self.padding)


class InPlaceLinear(nn.Linear):
    def forward(self, input):
        if input.size(1) != 48:
            input.data = input.data.sign()
        if not hasattr(self.weight, "org"):
            self.weight.org = self.weight.data.clone()
        self.weight.data = self.weight.org.sign()
        out = F.linear(input, self.weight)
        if self.bias is not None:
            self.bias.org = self.bias.data.clone()
            out += self.bias.view(1, -1).expand_as(out)
        return out


class BinaryNetMLP(nn.Module):
    """Linear, BatchNorm, Hardtanh, in place; the first layer's input (48 features) stays as it is."""

    def __init__(self):
        super().__init__()
        self.fc1, self.fc2, self.fc3 = InPlaceLinear(48, 32), InPlaceLinear(32, 32), InPlaceLinear(32, 10)
        self.bn1, self.bn2 = nn.BatchNorm1d(32), nn.BatchNorm1d(32)
        self.htanh1, self.htanh2 = nn.Hardtanh(), nn.Hardtanh()
        self.drop = nn.Dropout(0.2)

    def forward(self, x):
        x = x.view(-1, 48)
        x = self.htanh1(self.bn1(self.fc1(x)))
        x = self.drop(self.htanh2(self.bn2(self.fc2(x))))
        return self.fc3(x)


class BinaryNetCNN(nn.Module):
    """The convolutional form; max-pooling before the norm, no shortcut."""

    def __init__(self, width=8):
        super().__init__()
        self.stem = nn.Sequential(InPlaceConv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), nn.Hardtanh())
        self.features = nn.Sequential(
            InPlaceConv2d(width, width, 3, padding=1), nn.MaxPool2d(2), nn.BatchNorm2d(width), nn.Hardtanh(),
            InPlaceConv2d(width, width, 3, padding=1), nn.BatchNorm2d(width), nn.Hardtanh(),
        )  # fmt: skip
        self.fc = nn.Linear(width, 10)

    def forward(self, x):
        return self.fc(self.features(self.stem(x)).mean((2, 3)))


def binarize(tensor, mode):
    if mode == "det":
        return tensor.sign()
    return tensor.add(1).div(2).add(torch.rand(tensor.size()).add(-0.5)).clamp(0, 1).round().mul(2).add(-1)


class Binarize(torch.autograd.Function):
    """The Function form of BinaryNet, deterministic or stochastic."""

    @staticmethod
    def forward(ctx, x, mode="det"):
        ctx.save_for_backward(x)
        return binarize(x, mode)

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * (x.abs() <= 1), None


class LayerConv2d(nn.Conv2d):
    """Base of the layers below: 3x3, same size, no bias."""

    def __init__(self, width_in=8, width_out=8, stride=1, kernel=3):
        super().__init__(width_in, width_out, kernel, stride, kernel // 2, bias=False)

    def conv(self, a, w):
        return F.conv2d(a, w, self.bias, self.stride, self.padding, self.dilation, self.groups)


class BinarizeConv2d(LayerConv2d):
    def __init__(self, width=8, mode="det"):
        super().__init__(width, width)
        self.mode = mode

    def forward(self, x):
        return self.conv(Binarize.apply(x, self.mode), Binarize.apply(self.weight))


class EDE(torch.autograd.Function):
    """IR-Net's error decay estimator."""

    @staticmethod
    def forward(ctx, x, k, t):
        ctx.save_for_backward(x, k, t)
        return torch.sign(x)

    @staticmethod
    def backward(ctx, grad):
        x, k, t = ctx.saved_tensors
        return k * t * (1 - torch.tanh(x * t) ** 2) * grad, None, None


class IRConv2d(LayerConv2d):
    """IR-Net (arXiv 1909.10788): the weight is balanced, standardised and scaled by a power of two."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self.k, self.t = torch.tensor([10.0]), torch.tensor([0.1])

    def forward(self, input):
        w = self.weight - self.weight.mean((1, 2, 3), keepdim=True)
        w = w / w.std((1, 2, 3), keepdim=True)
        scale = 2.0 ** w.abs().mean((1, 2, 3), keepdim=True).log2().round()
        return self.conv(EDE.apply(input, self.k, self.t), EDE.apply(w, self.k, self.t) * scale.detach())


class IRBlock(nn.Module):
    """The shortcut's convolution signs the same latent again: two taps."""

    def __init__(self):
        super().__init__()
        self.conv1, self.bn1 = IRConv2d(8, 16, stride=2), nn.BatchNorm2d(16)
        self.conv2, self.bn2 = IRConv2d(16, 16), nn.BatchNorm2d(16)
        self.shortcut = nn.Sequential(IRConv2d(8, 16, stride=2, kernel=1), nn.BatchNorm2d(16))

    def forward(self, x):
        out = F.hardtanh(self.bn1(self.conv1(x)))
        out = self.bn2(self.conv2(out))
        out += self.shortcut(x)
        return F.hardtanh(out)


class RBNNConv2d(LayerConv2d):
    """RBNN (arXiv 2009.13055): weight and activation are standardised, the weight is rotated by a bilinear
    pair of orthogonal matrices; what is signed is not what came in."""

    def __init__(self, width=8):
        super().__init__(width, width)
        self.R1, self.R2 = (torch.linalg.qr(torch.randn(n, n))[0] for n in (8, 9))
        self.rotate = nn.Parameter(torch.ones(1))
        self.k, self.t = torch.tensor([10.0]), torch.tensor([0.1])

    def forward(self, input):
        a1 = input - input.mean([1, 2, 3], keepdim=True)
        a2 = a1 / a1.std([1, 2, 3], keepdim=True)
        a3 = a2 / torch.sqrt(a2.var([1, 2, 3], keepdim=True) + 1e-5)
        w1 = self.weight - self.weight.mean([1, 2, 3], keepdim=True)
        X = w1.view(w1.shape[0], 8, 9)
        w2 = w1 + self.rotate.abs() * ((self.R1.t() @ X @ self.R2).sign().view_as(w1) - w1).detach()
        return self.conv(EDE.apply(a3, self.k, self.t), EDE.apply(w2, self.k, self.t))


class ReCUConv2d(LayerConv2d):
    """ReCU (arXiv 2103.12369): weights outside the quantiles are clamped; the activation is scaled in front
    of the sign."""

    def __init__(self, width=8):
        super().__init__(width, width)
        self.alpha = nn.Parameter(torch.rand(width, 1, 1))
        self.register_buffer("tau", torch.tensor(0.9))

    def forward(self, input):
        w = self.weight - self.weight.mean([1, 2, 3], keepdim=True)
        w = w / torch.sqrt(w.var([1, 2, 3], keepdim=True) + 1e-5)
        quantiles = torch.quantile(w.detach().flatten(1), torch.stack([1 - self.tau, self.tau]), dim=1)
        low, high = quantiles.view(2, -1, 1, 1, 1)
        w = torch.max(torch.min(w, high), low)
        a = input / torch.sqrt(input.var([1, 2, 3], keepdim=True) + 1e-5)
        return self.conv(Sign.apply(a), Sign.apply(w)) * self.alpha


class SiMaNConv2d(LayerConv2d):
    """SiMaN (arXiv 2102.07981): the weight's code marks the larger half of |w|, kept in a parameter without
    gradient that every training forward rewrites; each sample is standardised by itself before the sign."""

    def __init__(self, width=8):
        super().__init__(width, width)
        self.alpha = nn.Parameter(self.weight.abs().mean([1, 2, 3]).view(-1, 1, 1).detach().clone())
        self.B = nn.Parameter((self.weight.detach() > 0).float(), requires_grad=False)

    def forward(self, input):
        self.weight.data = self.weight.data - self.weight.data.mean([1, 2, 3], keepdim=True)
        w = self.weight / torch.sqrt(self.weight.var([1, 2, 3], keepdim=True) + 1e-5)
        a = input - input.mean([1, 2, 3], keepdim=True)
        a = a / torch.sqrt(a.var([1, 2, 3], keepdim=True) + 1e-5)
        if self.training:
            size = w.abs().detach().flatten(1)
            self.B.data = (size > size.median(1, keepdim=True)[0]).float().view_as(w)
        bw = w.abs() - w.abs().detach() + self.B.mul(2).sub(1)
        return self.conv(Sign.apply(a), bw) * self.alpha


class ReSTE(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, t, o):
        ctx.save_for_backward(x, t, o)
        return torch.sign(x)

    @staticmethod
    def backward(ctx, grad):
        x, t, o = ctx.saved_tensors
        slope = x.abs().clamp(min=0.1).pow((1 - o) / o) / o
        return grad * slope * (x.abs() <= t), None, None


class ReSTEConv2d(LayerConv2d):
    """ReSTE (arXiv 2308.06689): the gradient of a power function; activation standardised in the layer."""

    def __init__(self, width=8):
        super().__init__(width, width)
        self.t, self.o = torch.tensor(1.5), torch.tensor(2.0)

    def forward(self, input):
        w = self.weight - self.weight.mean([1, 2, 3], keepdim=True)
        a = input - input.mean([1, 2, 3], keepdim=True)
        a = a / torch.sqrt(a.var([1, 2, 3], keepdim=True) + 1e-5)
        return self.conv(ReSTE.apply(a, self.t, self.o), ReSTE.apply(w, self.t, self.o))


class AdaBinConv2d(LayerConv2d):
    """AdaBin (arXiv 2208.08084), inside the convolution: learned centre and distance, {b - a, b + a}."""

    def __init__(self, width=8):
        super().__init__(width, width)
        self.a, self.b = nn.Parameter(torch.ones(1) * 0.7), nn.Parameter(torch.ones(1) * 0.2)

    def forward(self, inputs):
        inputs = (inputs - self.b) / self.a
        inputs = Sign.apply(inputs)
        inputs = inputs * self.a + self.b
        w = self.weight
        std, mean = w.std([1, 2, 3], keepdim=True), w.mean([1, 2, 3], keepdim=True)
        return self.conv(inputs, Sign.apply((w - mean) / std) * std + mean)


class ABCConv2d(LayerConv2d):
    """ABC-Net (arXiv 1711.11294): several binary bases of one latent, each with a threshold of its own."""

    def __init__(self, width=8):
        super().__init__(width, width)
        self.shift, self.beta = nn.Parameter(torch.tensor([-0.5, 0.0, 0.5])), nn.Parameter(torch.ones(3))

    def forward(self, x):
        w = Sign.apply(self.weight)
        return sum(b * self.conv(Sign.apply(x + s), w) for b, s in zip(self.beta, self.shift, strict=True))


class FastSign(nn.Module):
    def forward(self, x):
        hard, soft = torch.sign(x), torch.clamp(x, -1.3, 1.3)
        return hard.detach() - soft.detach() + soft


class GreaterThan(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x, threshold):
        return torch.gt(x, threshold).float()

    @staticmethod
    def backward(ctx, grad):
        return grad, None


class FracBinaryConv2d(LayerConv2d):
    """FracBNN (arXiv 2012.12206): one sign object binarizes first the weight, then the input; a {0, 1}
    mask gates the second, finer convolution. The mask is no operand, the weight no activation."""

    def __init__(self, width=8):
        super().__init__(width, width)
        self.binarize = FastSign()
        self.threshold = nn.Parameter(torch.zeros(1, width, 1, 1))
        self.num_high = torch.zeros(1)  # a plain tensor: neither parameter nor buffer

    def forward(self, input):
        weight = self.binarize(self.weight)
        out_msb = self.conv(self.binarize(input), weight) * 2 / 3
        mask = GreaterThan.apply(torch.sigmoid(5.0 * (out_msb - self.threshold)), 0.5)
        self.num_high.fill_((mask > 0).sum().item())
        return (1 - mask) * out_msb + mask * self.conv(input, weight)


class OneHot(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return (x == x.max(dim=1, keepdim=True)[0]).type_as(x)

    @staticmethod
    def backward(ctx, grad):
        return grad


class ExpertConv2d(nn.Module):
    """Expert binary networks (arXiv 2010.03558): a one-hot gate, itself an operand of a matmul, picks each
    sample's weight; batch and channels are folded for one grouped convolution, after the sign."""

    def __init__(self, width=8, experts=4):
        super().__init__()
        self.width, self.experts = width, experts
        self.weight = nn.Parameter(0.1 * torch.randn(experts, width, width, 3, 3))
        self.fc = nn.Linear(width, experts)

    def forward(self, x):
        B, C, H, W = x.size()
        gate = OneHot.apply(torch.sigmoid(self.fc(F.adaptive_avg_pool2d(x, 1).flatten(1))))
        weight = torch.matmul(gate, self.weight.view(self.experts, -1)).view(B * self.width, C, 3, 3)
        x = Sign.apply(x).view(1, B * C, H, W)
        out = F.conv2d(x, Sign.apply(weight), None, padding=1, groups=B)
        return out.permute([1, 0, 2, 3]).view(B, self.width, H, W)


class FoldedConv2d(nn.Module):
    """The sign comes after the fold: the batch can no longer be told from the channels."""

    def __init__(self, width=8):
        super().__init__()
        self.weight = nn.Parameter(0.1 * torch.randn(width, width, 3, 3))

    def forward(self, x):
        B, C, H, W = x.size()
        x = Sign.apply(x.view(1, B * C, H, W))
        return F.conv2d(x, self.weight.repeat(B, 1, 1, 1), None, padding=1, groups=B).view(B, C, H, W)


class UnfoldConv2d(LayerConv2d):
    """im2col and a matmul: the binary tensor is the right operand, with zeros at the border."""

    def forward(self, x):
        cols = F.unfold(Sign.apply(x), 3, padding=1)
        return (Sign.apply(self.weight).flatten(1) @ cols).view(x.shape[0], -1, *x.shape[2:])


class BinaryConv3d(nn.Conv3d):
    def forward(self, x):
        return F.conv3d(Sign.apply(x), Sign.apply(self.weight), None, self.stride, self.padding)


class BinaryConvTranspose2d(nn.ConvTranspose2d):
    def forward(self, x):
        a = x - x.mean((1, 2, 3), keepdim=True)
        return F.conv_transpose2d(Sign.apply(a), Sign.apply(self.weight), self.bias, self.stride)


class BinaryConv1d(nn.Conv1d):
    def forward(self, x):
        return F.conv1d(Sign.apply(x), Sign.apply(self.weight), self.bias)


class BinaryLinear(nn.Linear):
    """By the detach trick; on (B, C), (B, T, C) or (B * N, C)."""

    def forward(self, x):
        clipped = x.clamp(-1, 1)
        w = self.weight - self.weight.mean(-1, keepdim=True)
        scale = w.abs().mean(1, keepdim=True).detach()
        return F.linear(clipped + (x.sign() - clipped).detach(), Sign.apply(w) * scale, self.bias)


def two(layer, **kwargs):
    """A network of two such layers, each with its norm; their taps are body.0 and body.3."""
    body = [layer(**kwargs), nn.BatchNorm2d(8), nn.Hardtanh(), layer(**kwargs), nn.BatchNorm2d(8)]
    return Net(*body)


def conv3d():
    return Net(BinaryConv3d(8, 8, 3, padding=1), nn.BatchNorm3d(8), dims=3)


def transposed():
    return Net(BinaryConvTranspose2d(8, 8, 2, stride=2), nn.BatchNorm2d(8))
