"""How a binary activation is read: its channels, its codes, and what is said of what is not one."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cmim_plugin import CMIM, CMIMError, find_binary_activations
from networks import Binary


class Sign(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        return x.sign()

    @staticmethod
    def backward(ctx, grad):
        return grad


class Ternary(Sign):
    @staticmethod
    def forward(ctx, x):
        return x.sign() * (x.abs() > 0.3)


class SignModule(nn.Module):
    def forward(self, x):
        return Sign.apply(x)


class Net(nn.Module):
    """A convolution, then a function of its 8 channels and of a weight of 6 rows."""

    def __init__(self, function, width):
        super().__init__()
        self.conv = nn.Conv2d(3, 8, 3)
        self.weight = nn.Parameter(torch.randn(6, width))
        self.function = function

    def forward(self, x):
        return self.function(self.conv(x), self.weight)


X = torch.randn(2, 3, 16, 16)

PRODUCTS = {
    "einsum": (8, lambda x, w: torch.einsum("oc,bchw->bohw", w, Sign.apply(x)), 8),
    "weight @ positions": (8, lambda x, w: w @ Sign.apply(x).flatten(2), 8),
    "weight @ unfolded": (72, lambda x, w: w @ F.unfold(Sign.apply(x), 3), 8),
    "weight @ sign of unfolded": (72, lambda x, w: w @ Sign.apply(F.unfold(x, 3)), 72),
    "linear over all": (8 * 14 * 14, lambda x, w: F.linear(Sign.apply(x).flatten(1), w), 8),
    "linear over columns": (14, lambda x, w: F.linear(Sign.apply(x), w), 14),
}


@pytest.mark.parametrize("width, function, channels", PRODUCTS.values(), ids=PRODUCTS)
def test_channels_are_what_is_contracted_with_the_weight(width, function, channels):
    (found,) = find_binary_activations(Net(function, width), X)
    assert (found.reason, found.channels, found.latent_channels) == (None, channels, channels)


BINARY_WEIGHTS = {
    "weight @ unfolded": (72, lambda x, w: Sign.apply(w[:2]) @ F.unfold(Sign.apply(x), 3)),
    "linear": (8, lambda x, w: F.linear(Sign.apply(x).permute(0, 2, 3, 1), Sign.apply(w[:2]))),
}


@pytest.mark.parametrize("width, function", BINARY_WEIGHTS.values(), ids=BINARY_WEIGHTS)
def test_a_binary_weight_of_as_many_rows_as_samples_is_no_activation(width, function):
    (found,) = find_binary_activations(Net(function, width), X)
    assert (found.reason, found.channels, found.layouts[0].scores) == (None, 8, False)


MEETING = {
    "sums": lambda a, b: (a + a, b),
    "choices": lambda a, b: (torch.where(a > b, a, b), torch.where(a > b, b, a)),
    "sums of several values": lambda a, b: (a + a.roll(1, 1), b),
}


@pytest.mark.parametrize("layer", MEETING.values(), ids=MEETING)
def test_branches_that_meet_again_many_times_are_each_followed_once(layer):
    """Each twice as often as the one before it would be 2**30 times."""

    def function(x, weight):
        a, b = Sign.apply(x), Sign.apply(x.roll(1, 1))
        for _ in range(30):
            a, b = layer(a, b)
        return F.conv2d(a, weight[:, :, None, None])

    assert find_binary_activations(Net(function, 8), X)


def test_layers_that_binarize_one_latent_are_one_tap_also_where_it_holds_nan():
    class Branches(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Linear(16, 16)
            self.branches = nn.ModuleList(nn.Sequential(Binary(), nn.Linear(16, 16)) for _ in range(3))

        def forward(self, x):
            latent = torch.where(x[..., :1].isnan(), x[..., :1], self.stem(x))
            return sum(branch(latent) for branch in self.branches)

    x = torch.randn(8, 10, 16)
    x[3, 7:] = torch.nan
    assert [found.name for found in find_binary_activations(Branches(), x)] == ["branches.0.0"]


def test_a_ternary_activation_is_listed_and_not_tapped():
    net = Net(lambda x, w: F.conv2d(Ternary.apply(x), w[:, :, None, None]), 8)
    (found,) = find_binary_activations(net, X)
    assert not found.tapped and "three values" in found.reason
    with pytest.raises(CMIMError, match="three values"):
        CMIM(net, X)


@pytest.mark.parametrize("example", [torch.zeros(1, 3, 16, 16), torch.full((2, 3, 16, 16), torch.nan)])
def test_only_the_shape_of_the_example_matters(example):
    (found,) = find_binary_activations(Net(*reversed(PRODUCTS["einsum"][:2])), example)
    assert found.channels == 8


def test_the_teacher_is_another_network():
    net = Net(*reversed(PRODUCTS["einsum"][:2]))
    with pytest.raises(CMIMError, match="the binary network itself"):
        CMIM(net, X, teacher=net)
    assert net.training


def test_a_model_compiled_before_attaching_is_watched_as_plain_python():
    net = Net(*reversed(PRODUCTS["einsum"][:2]))
    net.compile(fullgraph=True, backend="eager")
    cmim = CMIM(net, X)
    net(X)
    assert cmim(net).isfinite()


def test_a_quantizer_of_two_bits_is_what_came_nearest():
    class TwoBits(Sign):
        @staticmethod
        def forward(ctx, x):
            return (x.clamp(0, 1) * 3).round() / 3

    net = Net(lambda x, w: F.conv2d(TwoBits.apply(x), w[:, :, None, None]), 8)
    with pytest.raises(CMIMError, match="a conv2d receives 4 values, not two"):
        CMIM(net, X)


def test_two_models_may_share_a_module():
    first = Net(*reversed(PRODUCTS["einsum"][:2]))
    second = nn.Sequential(nn.Conv2d(3, 3, 1), first.conv, SignModule(), nn.Conv2d(8, 4, 1))
    third = nn.Sequential(nn.Conv2d(3, 8, 1), second[2], nn.Conv2d(8, 4, 1))
    plug_ins = [CMIM(model, X) for model in (second, third)]
    for model, cmim in zip((second, third), plug_ins, strict=True):
        model(X)
        assert cmim(model).isfinite()


def test_a_branch_that_starts_at_zero_hides_nothing_and_stays_zero():
    class Branch(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm = nn.BatchNorm2d(8)
            nn.init.zeros_(self.norm.weight)
            self.conv = nn.Conv2d(8, 8, 3)

        def forward(self, x):
            return self.conv(Sign.apply(self.norm(x)))

    model = nn.Sequential(nn.Conv2d(3, 8, 3), Branch())
    assert [found.name for found in find_binary_activations(model, torch.randn(4, 3, 8, 8)) if found.tapped] == ["1"]
    assert not model[1].norm.weight.any()
