"""Shape A: a module of its own binarizes, beside the convolution or nested somewhere in it."""

import torch
import torch.nn.functional as F
from torch import nn

from .common import ActConvNorm, BinaryWeightConv2d, Net, Sign, SignModule


class MaskSign(nn.Module):
    """Bi-Real net (arXiv 1808.00278): sign with the piecewise polynomial gradient, written with masks."""

    def forward(self, x):
        hard = torch.sign(x)
        low, mid, high = ((x < t).type(torch.float32) for t in (-1, 0, 1))
        soft = (-1) * low + (x * x + 2 * x) * (1 - low)
        soft = soft * mid + (-x * x + 2 * x) * (1 - mid)
        soft = soft * high + 1 * (1 - high)
        return hard.detach() - soft.detach() + soft


class ClampSign(nn.Module):
    """The detach trick around a clamp."""

    def forward(self, x):
        hard, soft = torch.sign(x), torch.clamp(x, -1.3, 1.3)
        return hard.detach() - soft.detach() + soft


class BiRealBlock(nn.Module):
    def __init__(self, width_in, width_out, stride=1):
        super().__init__()
        self.binary_activation = MaskSign()
        self.binary_conv = BinaryWeightConv2d(width_in, width_out, 3, stride)
        self.bn = nn.BatchNorm2d(width_out)
        self.downsample = nn.Sequential()
        if stride != 1:
            self.downsample = nn.Sequential(
                nn.AvgPool2d(2), nn.Conv2d(width_in, width_out, 1, bias=False), nn.BatchNorm2d(width_out)
            )

    def forward(self, x):
        out = self.bn(self.binary_conv(self.binary_activation(x)))
        out += self.downsample(x)
        return out


class BiRealBottleneck(nn.Module):
    """One activation object called three times in one forward."""

    def __init__(self, width=8):
        super().__init__()
        self.act = ClampSign()
        self.conv1 = BinaryWeightConv2d(width, width, 1)
        self.conv2 = BinaryWeightConv2d(width, width)
        self.conv3 = BinaryWeightConv2d(width, width, 1)
        self.bns = nn.ModuleList(nn.BatchNorm2d(width) for _ in range(3))

    def forward(self, x):
        out = self.bns[0](self.conv1(self.act(x))) + x
        out = self.bns[1](self.conv2(self.act(out))) + out
        return self.bns[2](self.conv3(self.act(out))) + x


class LearnableBias(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.bias = nn.Parameter(0.1 * torch.randn(1, width, 1, 1))

    def forward(self, x):
        return x + self.bias.expand_as(x)


class RPReLU(nn.Module):
    def __init__(self, width):
        super().__init__()
        self.shift_x, self.prelu, self.shift_y = LearnableBias(width), nn.PReLU(width), LearnableBias(width)

    def forward(self, x):
        return self.shift_y(self.prelu(self.shift_x(x)))


class ReActBlock(nn.Module):
    """ReActNet (arXiv 2003.03488): RSign is a bias before a shared activation object; where the block
    doubles the width, two pointwise convolutions read the same binary tensor."""

    def __init__(self, width, double):
        super().__init__()
        self.move1, self.move2 = LearnableBias(width), LearnableBias(width)
        self.binary_activation = MaskSign()
        self.conv3x3 = BinaryWeightConv2d(width, width, 3, 2 if double else 1)
        self.bn1, self.rprelu = nn.BatchNorm2d(width), RPReLU(width)
        self.pointwise = nn.ModuleList(BinaryWeightConv2d(width, width, 1) for _ in range(1 + double))
        self.bn2 = nn.ModuleList(nn.BatchNorm2d(width) for _ in self.pointwise)
        self.pool = nn.AvgPool2d(2) if double else nn.Identity()

    def forward(self, x):
        out = self.conv3x3(self.binary_activation(self.move1(x)))
        out = self.rprelu(self.bn1(out) + self.pool(x))
        binary = self.binary_activation(self.move2(out))
        pairs = zip(self.bn2, self.pointwise, strict=True)
        return torch.cat([bn(conv(binary)) + out for bn, conv in pairs], 1)


class RoundSTE(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return torch.round(x)

    @staticmethod
    def backward(ctx, grad):
        return grad


class DoReFaActivation(nn.Module):
    """DoReFa-Net (arXiv 1606.06160) with one-bit activations: codes {0, 1}."""

    def forward(self, x):
        return RoundSTE.apply(torch.clamp(x, 0, 1))


class AdaBinActivation(nn.Module):
    """AdaBin (arXiv 2208.08084): codes {b - a, b + a}, learned."""

    def __init__(self):
        super().__init__()
        self.a, self.b = nn.Parameter(torch.tensor(0.8)), nn.Parameter(torch.tensor(0.13))

    def forward(self, x):
        x = (x - self.b) / self.a
        return Sign.apply(x) * self.a + self.b


class HardSign(nn.Module):
    """BNext (arXiv 2211.12933): a temperature buffer that is annealed while training."""

    def __init__(self):
        super().__init__()
        self.register_buffer("temperature", torch.ones(1))

    def forward(self, x):
        replace = x.clamp(-1.5, 1.5)
        x = x.div(self.temperature.clamp(min=1e-8)).clamp(-1, 1)
        return (x.sign() - replace).detach() + replace


class BNextBlock(nn.Module):
    """A 3x3 branch, then two 1x1 branches that each binarize the same latent with objects of their own; the
    scale of each is adaptive (squeeze and expand), mixing the latent in."""

    class Processor(nn.Module):
        def __init__(self, width, kernel):
            super().__init__()
            self.move, self.binary_activation = LearnableBias(width), HardSign()
            self.binary_conv = BinaryWeightConv2d(width, width, kernel)
            self.norm, self.prelu = nn.BatchNorm2d(width), nn.PReLU(width)
            self.scale = nn.Parameter(torch.full((1, width, 1, 1), 0.5))
            self.se = nn.Sequential(
                nn.AdaptiveAvgPool2d(1), nn.Conv2d(width, 4, 1), nn.ReLU(), nn.Conv2d(4, width, 1), nn.Sigmoid()
            )

        def forward(self, x):
            out = self.prelu(self.norm(self.binary_conv(self.binary_activation(self.move(x)))))
            if self.training:
                self.scale.data.clamp_(0, 1)
            return self.se(self.scale * x + (1 - self.scale) * out) * out + x

    def __init__(self, width=8):
        super().__init__()
        self.attention = self.Processor(width, 3)
        self.ffn_1, self.ffn_2 = self.Processor(width, 1), self.Processor(width, 1)

    def forward(self, x):
        x = self.attention(x)
        return torch.cat((self.ffn_1(x), self.ffn_2(x)), dim=1)


def ghost_binarize(x, temperature):
    replace = x.clamp(-1, 1)
    with torch.no_grad():
        binary = F.hardtanh(x / temperature).sign()
    return (binary - replace).detach() + replace


class GhostSign(nn.Module):
    """BoolNet (arXiv 2106.06991): (B, C, H, W) -> (B, S, C, H, W), one slice a threshold."""

    def __init__(self):
        super().__init__()
        self.register_buffer("temperature", torch.ones(1))
        self.slices = torch.tensor([-0.5, -0.25, 0.25, 0.5]).reshape(1, -1, 1, 1, 1)

    def forward(self, x):
        return ghost_binarize(x.unsqueeze(1) + self.slices, self.temperature)


class BoolNetBlock(nn.Module):
    """The block signs a normalised copy itself, for its zero points, then hands on to the ghost signs; the
    convolution takes two of the four slices, pads by replication and is called by keyword."""

    def __init__(self, width=8):
        super().__init__()
        self.bn1, self.bn2 = nn.BatchNorm2d(width), nn.BatchNorm2d(width)
        self.zero_point = nn.Sequential(BinaryWeightConv2d(width, width), nn.AdaptiveAvgPool2d(1))
        self.ghost_sign = GhostSign()
        self.weight = nn.Parameter(0.1 * torch.randn(width, width, 3, 3))
        self.pad, self.bn3 = nn.ReplicationPad2d(1), nn.BatchNorm2d(width)

    def forward(self, x):
        y = ghost_binarize(self.bn2(x), 1.0)
        z = self.ghost_sign(self.bn1(x) + self.zero_point(y))
        z = z[:, 1:3].reshape(z.size(0), -1, *z.shape[-2:])
        weight = ghost_binarize(self.weight, 1.0)
        out = F.conv2d(input=self.pad(z), weight=weight, bias=None, stride=1, padding=0, groups=2)
        return self.bn3(out) + x


class StoredSign(nn.Module):
    """bitorch's sign: no zeros."""

    def forward(self, x):
        return x + (torch.where(torch.sign(x) == 0, 1.0, torch.sign(x)) - x).detach()


class QActivation(nn.Module):
    def __init__(self):
        super().__init__()
        self.activation_function = StoredSign()

    def forward(self, input_tensor):
        return self.activation_function(input_tensor)


class QConv2d(nn.Conv2d):
    """bitorch: activation object inside the convolution, padding with -1 after it."""

    def __init__(self, width=8):
        super().__init__(width, width, 3, padding=1, bias=False)
        self.activation = QActivation()

    def forward(self, input):
        padded = F.pad(self.activation(input), self._reversed_padding_repeated_twice, "constant", -1.0)
        return F.conv2d(input=padded, weight=Sign.apply(self.weight), bias=None, padding=0)


class BrevitasIdentity(nn.Module):
    """The nesting of brevitas: every level returns the same tensor, in a tuple from the third level in, and
    the delay wrapper below the binarizer passes the finished tensor through once more."""

    class Delay(nn.Module):
        def forward(self, x, y):
            return y

    class BinaryQuant(nn.Module):
        def __init__(self):
            super().__init__()
            self.register_buffer("scale", torch.tensor(0.1))
            self.delay_wrapper = BrevitasIdentity.Delay()

        def forward(self, x):
            y = Sign.apply(x) * self.scale
            y = self.delay_wrapper(x, y)
            return y, self.scale, torch.tensor(0.0), torch.tensor(1.0)

    class Fused(nn.Module):
        def __init__(self):
            super().__init__()
            self.activation_impl, self.tensor_quant = nn.Identity(), BrevitasIdentity.BinaryQuant()

        def forward(self, x):
            return self.tensor_quant(self.activation_impl(x))

    class Proxy(nn.Module):
        def __init__(self):
            super().__init__()
            self.fused_activation_quant_proxy = BrevitasIdentity.Fused()

        def forward(self, x):
            return self.fused_activation_quant_proxy(x)

    def __init__(self):
        super().__init__()
        self.act_quant = self.Proxy()

    def forward(self, x):
        return self.act_quant(x)[0]


class RBOConv2d(nn.Conv2d):
    """RBONN (arXiv 2209.01542): the weight is corrected with the gradient of the step before, so the second
    step takes another path through forward than the first."""

    def __init__(self, width=8):
        super().__init__(width, width, 3, padding=1, bias=False)
        self.scale = nn.Parameter(torch.rand(width, 1, 1, 1) + 0.1)
        self.u = nn.Parameter(0.2 * torch.ones(width, 1, 1, 1))

    def forward(self, x):
        weight = self.weight
        if self.weight.grad is not None and self.training:
            density = (self.scale.abs() < self.scale.abs().mean()).float()
            weight = weight - self.u * density * self.weight.grad.clone()
        return F.conv2d(x, Sign.apply(weight) * self.scale.abs(), None, self.stride, self.padding)


class RBONNBlock(nn.Module):
    def __init__(self, width=8):
        super().__init__()
        self.move, self.binary_activation, self.conv = LearnableBias(width), MaskSign(), RBOConv2d(width)
        self.bn, self.act = nn.BatchNorm2d(width), RPReLU(width)

    def forward(self, x):
        out = self.bn(self.conv(self.binary_activation(self.move(x))))
        out += x
        return self.act(out)


class SharedActivation(nn.Module):
    """One activation instance handed to every layer: named_modules() gives it one name."""

    def __init__(self, width=8):
        super().__init__()
        act = ClampSign()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, padding=1, bias=False), nn.BatchNorm2d(width))
        self.layers = nn.ModuleList(ActConvNorm(act, width) for _ in range(3))
        self.fc = nn.Linear(width, 10)

    def forward(self, x):
        x = self.stem(x)
        for layer in self.layers:
            x = layer(x)
        return self.fc(x.mean((2, 3)))


class BernoulliSign(nn.Module):
    """Stochastic binarization (arXiv 1602.02830, equation 2): +1 with probability hard_sigmoid(x)."""

    def forward(self, x):
        p = ((x + 1) / 2).clamp(0, 1)
        return p * 2 - 1 + (torch.bernoulli(p) * 2 - p * 2).detach()


class RandCompareSign(nn.Module):
    def forward(self, x):
        p = torch.sigmoid(x)
        return p + ((torch.rand_like(p) < p).type_as(p) - p).detach()


class InPlaceFunction(torch.autograd.Function):
    """Masked assignment in the Function's forward."""

    @staticmethod
    def forward(ctx, x):
        out = x.clone()
        out[out >= 0] = 1
        out[out < 0] = -1
        return out

    @staticmethod
    def backward(ctx, grad):
        return grad.clamp(-1, 1)


class NewTensorFunction(torch.autograd.Function):
    """Codes {0, 1} written into a new tensor, no sign-like call at all."""

    @staticmethod
    def forward(ctx, x):
        out = torch.zeros_like(x)
        out[x.ge(0.2)] = 1
        return out

    @staticmethod
    def backward(ctx, grad):
        return grad


bound_early = NewTensorFunction.apply


class Act(nn.Module):
    """Any function of a tensor, as a module."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


ACTIVATIONS = {
    "where": lambda x: x + (torch.where(x >= 0, 1.0, -1.0) - x).detach(),
    "compare": lambda x: x + ((x > 0).float() * 2 - 1 - x).detach(),
    "masked_assignment": InPlaceFunction.apply,
    "new_tensor": bound_early,
    "heaviside": lambda x: x + (torch.heaviside(x, torch.zeros(())) - x).detach(),
    "relu_then_sign": lambda x: Sign.apply(torch.relu(x)),
    "per_sample_scale": lambda x: Sign.apply(x) * x.abs().mean((1, 2, 3), keepdim=True),
    "per_channel_scale": lambda x: Sign.apply(x) * x.abs().mean((0, 2, 3), keepdim=True),
    "ceil_of_tanh": lambda x: torch.tanh(x) + (torch.ceil(torch.tanh(x)) * 2 - 1 - torch.tanh(x)).detach(),
}


class CountingSign(nn.Module):
    """Counts its calls in a plain Python number and lets the gradient's width follow it, as schedules do."""

    def __init__(self):
        super().__init__()
        self.calls = 0

    def forward(self, x):
        if self.training:
            self.calls += 1
        soft = torch.tanh(x * (1 + 0.1 * self.calls))
        return soft + (x.sign() - soft).detach()


class PooledSign(nn.Module):
    """Max-pooling, channel shuffle and dropout between the sign and the convolution: still one binary tensor."""

    def __init__(self, width=8):
        super().__init__()
        self.act, self.conv, self.norm = SignModule(), BinaryWeightConv2d(width, width), nn.BatchNorm2d(width)

    def forward(self, x):
        b = F.max_pool2d(self.act(x), 2)
        n, c, h, w = b.shape
        b = b.view(n, 2, c // 2, h, w).transpose(1, 2).reshape(n, c, h, w)
        return self.norm(self.conv(F.dropout(b, 0.2, self.training)))


class ConcatSigns(nn.Module):
    """Two binary tensors, concatenated, feed one convolution: two taps."""

    def __init__(self, width=8):
        super().__init__()
        self.act1, self.act2 = ClampSign(), SignModule()
        self.mix = nn.Conv2d(width, width, 1)
        self.conv, self.norm = BinaryWeightConv2d(2 * width, width), nn.BatchNorm2d(width)

    def forward(self, x):
        return self.norm(self.conv(torch.cat([self.act1(x), self.act2(self.mix(x))], 1)))


def bireal():
    return Net(BiRealBlock(8, 8), BiRealBlock(8, 16, stride=2), width_out=16)


def reactnet():
    return Net(ReActBlock(8, double=False), ReActBlock(8, double=True), width_out=16)
