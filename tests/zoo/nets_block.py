"""Shape C and whole architectures: blocks that sign in their forward, transformers, point sets, images out."""

import math

import torch
import torch.nn.functional as F
from torch import nn

from .common import BinaryWeightConv2d, Sign
from .nets_layer import BinaryConv1d, BinaryConvTranspose2d, BinaryLinear, IRConv2d
from .nets_module import LearnableBias, MaskSign, RPReLU


class SignAndMean(torch.autograd.Function):
    """XNOR-Net's Function returns two tensors."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.sign(), x.abs().mean(1, keepdim=True)

    @staticmethod
    def backward(ctx, grad, grad_mean):
        (x,) = ctx.saved_tensors
        grad = grad.clone()
        grad[x.ge(1)] = 0
        grad[x.le(-1)] = 0
        return grad


class XNORBlock(nn.Module):
    """XNOR-Net (arXiv 1603.05279): norm, sign, dropout ({-2, 0, 2}), then a plain nn.Conv2d."""

    def __init__(self, width=8, dropout=0.0):
        super().__init__()
        self.bn = nn.BatchNorm2d(width, eps=1e-4, momentum=0.1)
        self.dropout_ratio, self.dropout = dropout, nn.Dropout(dropout)
        self.conv = nn.Conv2d(width, width, 3, padding=1)
        self.relu = nn.ReLU(inplace=True)

    def forward(self, x):
        x = self.bn(x)
        x, _ = SignAndMean.apply(x)
        if self.dropout_ratio != 0:
            x = self.dropout(x)
        return self.relu(self.conv(x))


class SignInRoot(nn.Module):
    """A network that signs in its own forward: the innermost module is the network, whose name is empty."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(48, 32), nn.BatchNorm1d(32))
        self.fc2, self.bn2, self.fc3 = nn.Linear(32, 32), nn.BatchNorm1d(32), nn.Linear(32, 10)

    def forward(self, x):
        x = self.stem(x.flatten(1))
        x = self.bn2(self.fc2(Sign.apply(x)))
        return self.fc3(x + (torch.where(x >= 0, 1, -1) - x).detach())


class UnusedBranch(nn.Module):
    """A binarized branch that nothing of the output needs."""

    def __init__(self, width=8):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width))
        self.act, self.conv, self.side_act = MaskSign(), BinaryWeightConv2d(width, width), MaskSign()
        self.side_conv, self.fc = BinaryWeightConv2d(width, 4, 1), nn.Linear(width, 10)

    def forward(self, x):
        x = self.stem(x)
        self.side_conv(self.side_act(x))
        return self.fc(self.conv(self.act(x)).mean((2, 3)))


class RecurrentCell(nn.Module):
    """A binarized recurrent layer, called once a time step."""

    class Cell(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.i, self.h = nn.Linear(width, width), nn.Linear(width, width)

        def forward(self, x, h):
            return torch.tanh(self.i(x) + self.h(Sign.apply(h)))

    def __init__(self, width=16):
        super().__init__()
        self.stem = nn.Sequential(nn.Linear(64, width), nn.LayerNorm(width))
        self.cell, self.fc = self.Cell(width), nn.Linear(width, 10)

    def forward(self, x):
        steps = self.stem(x.flatten(2))
        h = steps[:, 0]
        for i in range(3):
            h = self.cell(steps[:, i], h)
        return self.fc(h)


class ZeroOne(torch.autograd.Function):
    """BiBERT's attention binarizer: {0, 1}, gradient inside [-1, 1]."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        out = torch.sign(x)
        out[out == -1] = 0
        return out

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * (x.abs() <= 1)


def split_heads(x, heads):
    return x.view(*x.shape[:2], heads, -1).permute(0, 2, 1, 3)


class BiBERTAttention(nn.Module):
    """BiBERT (arXiv 2203.06390): query, key, value and the attention map binarized in the block's forward."""

    def __init__(self, width=16, heads=2):
        super().__init__()
        self.heads = heads
        self.query, self.key, self.value = (BinaryLinear(width, width) for _ in range(3))
        self.dropout, self.dense, self.norm = nn.Dropout(0.1), BinaryLinear(width, width), nn.LayerNorm(width)

    def forward(self, hidden_states, attention_mask):
        layers = (self.query, self.key, self.value)
        q, k, v = (split_heads(layer(hidden_states), self.heads) for layer in layers)
        q, k, v = Sign.apply(q), Sign.apply(k), Sign.apply(v)
        scores = torch.matmul(q, k.transpose(-1, -2)) / math.sqrt(q.shape[-1])
        probs = self.dropout(ZeroOne.apply(scores + attention_mask))
        context = torch.matmul(probs, v).permute(0, 2, 1, 3).flatten(2)
        return self.norm(self.dense(context) + hidden_states)


class BiBERT(nn.Module):
    def __init__(self, width=16):
        super().__init__()
        self.embeddings, self.norm = nn.Embedding(20, width), nn.LayerNorm(width)
        self.attention = BiBERTAttention(width)
        self.intermediate, self.output = BinaryLinear(width, 32), BinaryLinear(32, width)
        self.classifier = nn.Linear(width, 10)

    def forward(self, input_ids, attention_mask):
        x = self.norm(self.embeddings(input_ids))
        x = self.attention(x, (1.0 - attention_mask[:, None, None, :]) * -100.0)
        x = x + self.output(F.gelu(self.intermediate(x)))
        return {"logits": self.classifier(x[:, 0]), "hidden": x}


class LazyScale(nn.Parameter):
    """BiT's step size: a subclass of Parameter that is set in the first forward and remembers that; it
    cannot be deep-copied, since its constructor takes one argument only."""

    def __new__(cls, data):
        return super().__new__(cls, data)

    def __init__(self, data):
        self.initialized = False

    def set_once(self, value):
        if not self.initialized:
            self.data.copy_(value)
            self.initialized = True


class Elastic(torch.autograd.Function):
    """BiT (arXiv 2205.13016): {-a, a}, or {0, a} for what is not negative, with a learned a."""

    @staticmethod
    def forward(ctx, x, alpha, signed):
        alpha.set_once((2 if signed else 4) * x.abs().mean())
        ctx.save_for_backward(x, alpha)
        ctx.signed = signed
        code = x.sign() if signed else (x / alpha).round().clamp(0, 1)
        return code * alpha

    @staticmethod
    def backward(ctx, grad):
        x, alpha = ctx.saved_tensors
        q = x / alpha
        inside = (q.abs() <= 1) if ctx.signed else (q >= 0) & (q <= 1)
        code = x.sign() if ctx.signed else q.round().clamp(0, 1)
        grad_alpha = ((code - q * inside) * grad).sum() / math.sqrt(x.numel())
        return grad * inside, grad_alpha.view(alpha.shape), None


class ElasticLinear(nn.Linear):
    def __init__(self, c_in, c_out):
        super().__init__(c_in, c_out)
        self.move = nn.Parameter(0.1 * torch.randn(c_in))
        self.input_scale = LazyScale(torch.tensor(1.0))

    def forward(self, input):
        input = Elastic.apply(input + self.move.expand_as(input), self.input_scale, True)
        weight = Sign.apply(self.weight - self.weight.mean()) * self.weight.abs().mean().detach()
        out = F.linear(input, weight)
        out += self.bias.view(1, -1).expand_as(out)
        return out


class BiT(nn.Module):
    """Elastic binarization; after the ReLU and on the attention map the codes are {0, a}."""

    class Attention(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.qkv = ElasticLinear(width, 3 * width)
            self.scales = nn.ParameterList(LazyScale(torch.tensor(1.0)) for _ in range(4))

        def forward(self, x):
            q, k, v = (split_heads(t, 2) for t in self.qkv(x).chunk(3, -1))
            q, k, v = (Elastic.apply(t, s, True) for t, s in zip((q, k, v), self.scales, strict=False))
            probs = torch.softmax(4 * q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1]), -1)
            probs = Elastic.apply(probs, self.scales[3], False)
            return (probs @ v).transpose(1, 2).flatten(2)

    class UnsignedLinear(ElasticLinear):
        def forward(self, input):
            input = Elastic.apply(input, self.input_scale, False)
            return F.linear(input, Sign.apply(self.weight), self.bias)

    def __init__(self, width=16):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 2, 2), nn.Flatten(2))
        self.norm1, self.norm2 = nn.LayerNorm(width), nn.LayerNorm(width)
        self.attention = self.Attention(width)
        self.up, self.down = ElasticLinear(width, 32), self.UnsignedLinear(32, width)
        self.fc = nn.Linear(width, 10)

    def forward(self, x):
        x = self.stem(x).transpose(1, 2)
        x = x + self.attention(self.norm1(x))
        x = x + self.down(F.relu(self.up(self.norm2(x))))
        return self.fc(x.mean(1))


class BinaryViTAttention(nn.Module):
    """BinaryViT (arXiv 2306.16678): learned shifts before every sign; the map's gradient is that of softmax
    while its value is a step of the scores."""

    def __init__(self, width=16, heads=2):
        super().__init__()
        self.heads = heads
        self.moves = nn.ParameterList(0.1 * torch.randn(width) for _ in range(3))
        self.query, self.key, self.value = (BinaryLinear(width, width) for _ in range(3))
        self.norm = nn.LayerNorm(width)

    def forward(self, x):
        layers = (self.query, self.key, self.value)
        q, k, v = (Sign.apply(layer(x) + x + move) for layer, move in zip(layers, self.moves, strict=True))
        q, k, v = (split_heads(t, self.heads) for t in (q, k, v))
        scores = q.matmul(k.transpose(-1, -2)) / math.sqrt(q.shape[-1])
        soft = torch.softmax(scores, -1)
        probs = soft - soft.detach() + ZeroOne.apply(scores).detach()
        return self.norm(probs.matmul(v).permute(0, 2, 1, 3).contiguous().flatten(2)) + x


class BinaryViT(nn.Module):
    def __init__(self, width=16):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 2, 2))
        self.cls = nn.Parameter(torch.randn(1, 1, width))
        self.attention, self.mlp = BinaryViTAttention(width), BinaryLinear(width, width)
        self.fc = nn.Linear(width, 10)

    def forward(self, x):
        x = self.stem(x).flatten(2).transpose(1, 2)
        x = self.attention(torch.cat([self.cls.expand(x.shape[0], -1, -1), x], 1))
        return self.fc((x + self.mlp(x))[:, 0])


class FusedAttention(nn.Module):
    """Binary query and key into scaled_dot_product_attention, then an einsum of two binary operands."""

    class Fused(nn.Module):
        def forward(self, q, k, v):
            return F.scaled_dot_product_attention(Sign.apply(q), Sign.apply(k), v)

    def __init__(self, width=16):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 2, 2), nn.BatchNorm2d(width))
        self.q, self.k, self.v, self.a, self.b = (nn.Linear(width, width) for _ in range(5))
        self.attend, self.fc = self.Fused(), nn.Linear(width, 10)

    def forward(self, x):
        x = self.stem(x).flatten(2).transpose(1, 2)
        x = x + self.attend(self.q(x), self.k(x), self.v(x))
        a, b = Sign.apply(self.a(x)), Sign.apply(self.b(x))
        gram = torch.einsum("btc,bsc->bts", a, b) / 16
        return self.fc((gram @ x).mean(1))


class WindowNet(nn.Module):
    """Windows as in Swin: the layers see (B * windows, T, C), sample by sample."""

    def __init__(self, width=16):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 1), nn.BatchNorm2d(width))
        self.qkv, self.proj = BinaryLinear(width, 3 * width), BinaryLinear(width, width)
        self.fc = nn.Linear(width, 10)

    def forward(self, x):
        x = self.stem(x)
        B, C, H, W = x.shape
        windows = x.view(B, C, H // 4, 4, W // 4, 4).permute(0, 2, 4, 3, 5, 1).reshape(-1, 16, C)
        q, k, v = self.qkv(windows).chunk(3, -1)
        windows = self.proj(torch.softmax(q @ k.transpose(1, 2) / 4, -1) @ v)
        x = windows.view(B, H // 4, W // 4, 4, 4, C).permute(0, 5, 1, 3, 2, 4).reshape(B, C, H, W)
        return self.fc(x.mean((2, 3)))


class BiPointNet(nn.Module):
    """BiPointNet (arXiv 2010.05501): points folded into the batch (B * N, C) for the shared linear layer, a
    Conv1d, a bmm with a learned transform, then a binarized linear layer on (B, C): a shifted maximum."""

    class SharedMLP(nn.Module):
        def __init__(self, c_in, c_out, linear):
            super().__init__()
            self.lin = linear(c_in, c_out)

        def forward(self, x):
            B, C, N = x.shape
            x = x.permute(0, 2, 1).contiguous().view(-1, C)
            return self.lin(x).view(B, N, -1).permute(0, 2, 1).contiguous()

    class Transform(nn.Module):
        def __init__(self, width):
            super().__init__()
            self.lin, self.width = nn.Linear(width, width * width), width

        def forward(self, x):
            matrix = self.lin(x.max(2)[0]).view(-1, self.width, self.width) + torch.eye(self.width)
            return torch.bmm(Sign.apply(x.transpose(2, 1)), matrix).transpose(2, 1)

    def __init__(self, width=16):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv1d(3, width, 1), nn.BatchNorm1d(width), nn.Hardtanh())
        self.transform = self.Transform(width)
        self.conv2, self.bn2 = self.SharedMLP(width, width, BinaryLinear), nn.BatchNorm1d(width)
        self.conv3, self.bn3 = BinaryConv1d(width, 32, 1), nn.BatchNorm1d(32)
        self.fc1, self.bn4, self.fc2 = BinaryLinear(32, 16), nn.BatchNorm1d(16), nn.Linear(16, 10)

    def forward(self, x):
        x = self.transform(self.stem(x))
        x = F.hardtanh(self.bn2(self.conv2(x)))
        x = self.bn3(self.conv3(x)).max(2)[0] - 1.4
        return {"out": F.log_softmax(self.fc2(F.hardtanh(self.bn4(self.fc1(x)))), -1), "pooled": x}


class SuperResolution(nn.Module):
    """A binarized super-resolution net (after BBCU, arXiv 2210.00405): no norm, image out, a global shortcut."""

    class Unit(nn.Module):
        def __init__(self, width, out):
            super().__init__()
            self.move, self.binary_activation = LearnableBias(width), MaskSign()
            self.conv, self.act = BinaryWeightConv2d(width, out), RPReLU(out)
            self.repeat = out // width

        def forward(self, x):
            return self.act(self.conv(self.binary_activation(self.move(x)))) + x.repeat(1, self.repeat, 1, 1)

    def __init__(self, width=8):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, padding=1))
        self.body = nn.Sequential(self.Unit(width, width), self.Unit(width, width))
        self.up, self.last = self.Unit(width, 4 * width), nn.Conv2d(width, 3, 3, padding=1)

    def forward(self, x):
        out = self.stem(x)
        out = F.pixel_shuffle(self.up(self.body(out) + out), 2)
        return self.last(out) + F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)


class Segmentation(nn.Module):
    """Encoder and decoder with a skip connection; the decoder's upsampling is a binarized transposed
    convolution; two heads out."""

    def __init__(self, width=8):
        super().__init__()
        self.stem = nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width))
        self.down = nn.Sequential(IRConv2d(width, 16, stride=2), nn.BatchNorm2d(16))
        self.up = BinaryConvTranspose2d(16, width, 2, stride=2)
        self.fuse = nn.Sequential(IRConv2d(2 * width, width), nn.BatchNorm2d(width))
        self.head, self.aux = nn.Conv2d(width, 5, 1), nn.Conv2d(16, 5, 1)

    def forward(self, x):
        skip = self.stem(x)
        low = self.down(skip)
        out = self.fuse(torch.cat([self.up(low), skip], 1))
        return self.head(out), self.aux(low)
