"""The channels of a binary tensor are the dimension that its product contracts, whatever the lengths are."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cmim_plugin import find_binary_activations
from networks import MaskedSign

sign = MaskedSign.apply


class Net(nn.Module):
    """A trained layer and a norm, then ``function`` of this module and their activation, of 16 channels."""

    def __init__(self, layer, norm, function):
        super().__init__()
        self.layer, self.norm, self.function = layer, norm, function
        self.weight = nn.Parameter(0.1 * torch.randn(16, 16))
        self.conv1, self.conv2, self.linear = nn.Conv1d(16, 16, 1), nn.Conv2d(16, 16, 1), nn.Linear(16, 16)
        self.flat, self.wide, self.patches = nn.Linear(16 * 9, 4), nn.Linear(32, 4), nn.Linear(64, 4)
        self.deep, self.conv3 = nn.Conv2d(32, 4, 1), nn.Conv3d(16, 4, 1)

    def forward(self, x):
        return self.function(self, self.norm(self.layer(x)))


def maps(function, width=16):
    return Net(nn.Conv2d(3, 16, 1), nn.BatchNorm2d(16), function), torch.randn(4, 3, width, width)


def signals(function, length=16):
    return Net(nn.Conv1d(3, 16, 1), nn.BatchNorm1d(16), function), torch.randn(4, 3, length)


def tokens(function, length=16):
    return Net(nn.Linear(3, 16), nn.LayerNorm(16), function), torch.randn(4, length, 3)


PICKED = torch.randint(20, (4, 5, 6), generator=torch.Generator().manual_seed(0))


def vectors(function):
    return Net(nn.Linear(3, 16), nn.LayerNorm(16), function), torch.randn(4, 3)


def by_hand(function, shape):
    return Net(nn.Identity(), nn.Identity(), function), torch.randn(shape)


def shuffled(m, x):
    return m.conv2(sign(x).unflatten(1, (4, 4)).transpose(1, 2).flatten(1, 2))


def context(m, x):
    q, k, v = (part.unflatten(-1, (2, 8)).transpose(1, 2) for part in (x, x + 1, x.flip(-1)))
    return sign(F.scaled_dot_product_attention(q, k, v).transpose(1, 2))  # (B, T, heads, 8)


def keys(m, x):
    query, key = (part.unflatten(-1, (2, 8)).transpose(1, 2) for part in (x, x + 1))
    return query @ sign(key.transpose(-2, -1))


# Name -> network and input, and where the channels of its binary tensor are: 1 or -1 for the dimension, and how many.
def two(m, x):
    codes = sign(x)
    mixed = m.linear(codes.transpose(2, 3)).transpose(2, 3)  # contracts a dimension of space: cannot be tapped
    return mixed + m.conv2(codes)


PRODUCTS = {
    "of two products the second": (maps(two), 1, 16),
    "heads that are flattened": (tokens(lambda m, x: m.linear(context(m, x).flatten(2)), 9), -1, 8),
    "heads in an einsum": (
        tokens(lambda m, x: torch.einsum("bthd,hde->bte", context(m, x), m.weight.view(2, 8, 16)), 9),
        -1,
        8,
    ),
    "windows of time by unfold": (signals(lambda m, x: sign(x).unfold(-1, 4, 1) @ m.weight[:4], 20), 1, 16),
    "einsum": (maps(lambda m, x: torch.einsum("bchw,oc->bohw", sign(x), m.weight)), 1, 16),
    "einsum with dots": (tokens(lambda m, x: torch.einsum("...c,oc->...o", sign(x), m.weight)), -1, 16),
    "einsum without a result": (maps(lambda m, x: torch.einsum("bchw,oc", sign(x), m.weight)), 1, 16),
    "a permuted map": (maps(lambda m, x: m.conv2(sign(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2))), -1, 16),
    "einsum of three": (
        tokens(lambda m, x: torch.einsum("bnc,cd,bnd->bn", x, m.weight, sign(x)), 9),
        -1,
        16,
    ),
    "a product with an addend": (vectors(lambda m, x: torch.addmm(m.linear.bias, sign(x), m.weight)), -1, 16),
    "the first token moved to the end": (
        tokens(lambda m, x: m.linear(torch.cat([(codes := sign(x)).flip(1)[:, :-1], codes[:, 0][:, None]], 1))),
        -1,
        16,
    ),
    "a flattened map of a layer by hand": (
        by_hand(lambda m, x: m.flat(sign((m.weight @ x.flatten(2)).view_as(x)).flatten(1)), (4, 16, 3, 3)),
        1,
        16,
    ),
    "tokens of a layer by hand, joined": (
        by_hand(lambda m, x: m.wide(sign(x @ m.weight).view(4, 8, 32)), (4, 16, 16)),
        -1,
        16,
    ),
    "a weight from the left": (signals(lambda m, x: m.weight @ sign(x)), 1, 16),
    "tokens as a map": (tokens(lambda m, x: m.conv2(sign(x).transpose(1, 2).reshape(4, 16, 4, 4))), -1, 16),
    "a signal as a map": (signals(lambda m, x: m.conv2(sign(x).unsqueeze(2)), 20), 1, 16),
    "joined heads": (tokens(lambda m, x: m.linear(sign(x.unflatten(-1, (4, 4))).flatten(2))), -1, 4),
    "patches joined": (
        maps(
            lambda m, x: m.patches(
                sign(x.permute(0, 2, 3, 1)).reshape(4, 7, 2, 7, 2, 16).permute(0, 1, 3, 2, 4, 5).flatten(3)
            ),
            14,
        ),
        -1,
        16,
    ),
    "space to depth": (
        maps(lambda m, x: m.deep(sign(x).view(4, 16, 8, 4, 2).permute(0, 1, 4, 2, 3).reshape(4, 32, 8, 4)), 8),
        1,
        16,
    ),
    "windows by hand": (
        maps(lambda m, x: m.flat(sign(x).unfold(2, 3, 1).unfold(3, 3, 1).permute(0, 2, 3, 1, 4, 5).flatten(3)), 8),
        1,
        16,
    ),
    "a stack of codes": (
        maps(lambda m, x: m.conv3(torch.stack([sign(x), sign(x)], 2)), 8),
        1,
        16,
    ),
    "einsum of a list": (tokens(lambda m, x: torch.einsum("bnc,oc->bno", [sign(x), m.weight]), 10), -1, 16),
    "a matrix that joins samples": (vectors(lambda m, x: torch.ones(4, 4) @ sign(x)), -1, 16),
    "a flattened map": (maps(lambda m, x: m.flat(sign(x).flatten(1)), 3), 1, 16),
    "shuffled channels": (maps(shuffled), 1, 16),
    "a padded, scaled slice": (maps(lambda m, x: m.conv2(0.5 * F.pad(sign(x), (1, 1, 1, 1))[..., 1:])), 1, 16),
    "transposed keys": (tokens(keys, 9), 1, 16),
    "picked rows": (
        signals(lambda m, x: m.linear(sign(x).permute(0, 2, 1)[torch.arange(4)[:, None, None], PICKED]), 20),
        1,
        16,
    ),
    "attention on a map": (maps(lambda m, x: sign(x).flatten(2).mT @ x.flatten(2), 12), 1, 16),
    "linear attention": (signals(lambda m, x: torch.einsum("bdn,ben->bde", sign(x), x), 20), 1, 16),
    "nodes of a graph": (tokens(lambda m, x: torch.ones(9, 9) @ sign(x), 9), -1, 16),
    "frequencies": (maps(lambda m, x: torch.randn(8, 8) @ sign(x) @ torch.ones(8, 8), 8), 1, 16),
    "a flattened map with its channels last": (
        maps(lambda m, x: m.flat(sign(x.permute(0, 2, 3, 1)).flatten(1)), 3),
        -1,
        16,
    ),
    "a map of scores": (tokens(lambda m, x: sign((x @ x.mT).softmax(-1) - 0.1) @ x, 9), -1, 9),
}


@pytest.mark.parametrize("made, dim, channels", PRODUCTS.values(), ids=PRODUCTS)
def test_channels_are_what_the_product_contracts(made, dim, channels):
    (found,) = find_binary_activations(*made)
    assert found.tapped, found.reason
    assert (found.channels, found.layouts[0].spatial is None) == (channels, dim == -1)


def test_channels_are_followed_through_what_takes_a_dimension_away():
    def last_step(m, x, n):
        return m.linear(sign(m.conv(x))[torch.arange(len(x)), :, n])

    class Sequences(nn.Module):
        def __init__(self, forward):
            super().__init__()
            self.conv = nn.Sequential(nn.Conv1d(3, 16, 3, padding=1), nn.BatchNorm1d(16))
            self.linear, self.function = nn.Linear(16, 4), forward

        def forward(self, *inputs):
            return self.function(self, *inputs)

    for length in (7, 16):
        x, steps = torch.randn(4, 3, length), torch.randint(length, (4,))
        for function, example in ((lambda m, x: m.linear(sign(m.conv(x) - 1).amax(-1)), x), (last_step, (x, steps))):
            (found,) = find_binary_activations(Sequences(function), example)
            assert (found.reason, found.channels, found.layouts[0].spatial) == (None, 16, 1)
        (found,) = find_binary_activations(*tokens(lambda m, x: m.linear(sign(x - 1).amax(1)), length))
        assert (found.reason, found.channels, found.layouts[0].spatial) == (None, 16, None)


def test_channels_first_with_the_batch_second_are_refused():
    def forward(m, x):
        return torch.einsum("oc,cbl->obl", m.weight, sign(x).transpose(0, 1))

    def turned(m, x):
        return torch.einsum("oc,cbl->obl", m.weight, sign(x.transpose(0, 1)))

    (found,) = find_binary_activations(*signals(forward, 7))
    assert (found.reason, found.channels) == (None, 16)
    (found,) = find_binary_activations(*signals(turned, 7))
    assert found.reason.startswith("the batch is not its first dimension")


def test_a_tensordot_is_listed_with_what_to_use_in_its_place():
    (found,) = find_binary_activations(*maps(lambda m, x: torch.tensordot(sign(x), m.weight, ([1], [1])), 12))
    assert found.reason == "which dimensions a tensordot contracts is not known: use matmul, linear or einsum"


def test_channels_that_are_neither_last_nor_next_to_the_batch_are_refused():
    def frames(m, x):
        return m.conv2(sign(x.transpose(1, 2)).flatten(0, 1))

    video = Net(nn.Conv3d(3, 16, 1), nn.BatchNorm3d(16), frames)
    (found,) = find_binary_activations(video, torch.randn(4, 3, 5, 8, 8))
    assert found.reason == "its channels are dimension 2 of (4, 5, 16, 8, 8): neither the last nor next to the batch"


def test_codes_of_a_recurrent_layer_are_tapped():
    class Recurrent(Net):
        def forward(self, x):
            return self.function(sign(self.norm(self.layer(x))))[0]

    model = Recurrent(nn.Linear(3, 16), nn.LayerNorm(16), nn.GRU(16, 8, batch_first=True))
    (found,) = find_binary_activations(model, torch.randn(4, 7, 3))
    assert (found.reason, found.channels) == (None, 16)
    model.function = nn.GRU(16, 8)
    (found,) = find_binary_activations(model, torch.randn(4, 7, 3))
    assert found.tapped and "time, not the batch" in found.mixed


def test_a_long_way_from_the_product_is_followed_back():
    def far(m, x):
        x = sign(x)
        for _ in range(600):
            x = x.unsqueeze(1).squeeze(1)
        return m.linear(x)

    (found,) = find_binary_activations(*tokens(far))
    assert (found.reason, found.channels) == (None, 16)


def test_a_sparse_matrix_is_no_weight():
    """It has no values that a dry run could show; neither has a parameter."""
    matrix = torch.rand(9, 9).to_sparse()

    def forward(m, x):
        x = sign(x).permute(1, 0, 2).reshape(9, -1)
        return m.linear((matrix @ x).view(9, -1, 16).permute(1, 0, 2))

    (found,) = find_binary_activations(*tokens(forward, 9))
    assert found.channels == 16 and found.layouts[0].spatial is None


def test_of_maps_that_are_flattened_in_part_the_channels_are_those_of_the_layer():
    net = Net(nn.Conv2d(3, 16, 1), nn.BatchNorm2d(16), lambda m, x: m.flat3(sign(x).flatten(2)))
    net.flat3 = nn.Linear(9, 4)
    (found,) = find_binary_activations(net, torch.randn(4, 3, 3, 3))
    assert found.channels == 16 and found.layouts[0].spatial == 2


def test_of_maps_over_time_that_are_flattened_no_side_of_a_map_is_taken_for_channels():
    def forward(m, x):
        return m.flat(sign(x.movedim(1, 2)).flatten(2))

    net = Net(nn.Conv3d(3, 16, 1), nn.BatchNorm3d(16), forward)
    (found,) = find_binary_activations(net, torch.randn(4, 3, 2, 3, 3))
    assert not found.tapped and found.reason.startswith("its channels are dimension 2 of")


def test_samples_that_are_folded_into_the_groups_of_a_convolution_are_no_channels():
    def forward(m, x):
        weight = m.conv2.weight.repeat(len(x), 1, 1, 1)
        return F.conv2d(sign(x).flatten(0, 1)[None], weight, groups=len(x)).unflatten(1, (len(x), -1))[0]

    (found,) = find_binary_activations(*maps(forward, 8))
    assert found.channels == 16 and found.layouts[0].spatial == 2
