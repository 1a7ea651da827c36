"""The dry run believes the example, puts everything back, and finds what is there, whatever the structure."""

import copy
import functools
import math
import queue
import random
import threading
import time
import types
import warnings
import weakref
from collections import Counter, OrderedDict, UserDict, defaultdict, deque, namedtuple

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from cmim_plugin import CMIM, CMIMError, CMIMWarning, find_binary_activations
from cmim_plugin.discovery.find import discover
from cmim_plugin.passes import Pass
from networks import waiting


class Sign(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return torch.where(x >= 0, 1.0, -1.0).to(x.dtype)

    @staticmethod
    def backward(ctx, g):
        (x,) = ctx.saved_tensors
        return g * (x.abs() <= 1)


class Of(nn.Module):
    """A module from a function of (module, *inputs)."""

    def __init__(self, function, **attributes):
        super().__init__()
        self.function = function
        for name, value in attributes.items():
            setattr(self, name, value)

    def forward(self, *args, **kwargs):
        return self.function(self, *args, **kwargs)


class Binary(nn.Module):
    def forward(self, x):
        return Sign.apply(x)


class BinaryLinear(nn.Linear):
    def forward(self, x):
        return F.linear(Sign.apply(x), self.weight, self.bias)


class BinaryConv(nn.Conv2d):
    def forward(self, x):
        return F.conv2d(Sign.apply(x), self.weight, self.bias, self.stride, self.padding)


def net():
    return nn.Sequential(
        nn.Conv2d(3, 8, 3, padding=1),
        *(nn.GroupNorm(2, 8), BinaryConv(8, 8, 3, padding=1), nn.GroupNorm(2, 8), BinaryConv(8, 8, 3, padding=1)),
        *(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(8, 4)),
    )


X = torch.randn(6, 3, 8, 8, generator=torch.Generator().manual_seed(0))
X8 = torch.randn(8, 8, generator=torch.Generator().manual_seed(0))


def tapped(model, example, **options):
    return [f.name for f in find_binary_activations(model, example, **options) if f.tapped]


def reasons(model, example, **options):
    return {f.name: f.reason for f in find_binary_activations(model, example, **options) if not f.tapped}


# -- inputs ------------------------------------------------------------------------------------------------------


def tokens(width=16):
    return nn.ModuleDict({"a": nn.Linear(5, width), "n": nn.LayerNorm(width), "b": BinaryLinear(width, width)})


def features(m, x):
    return m.t["b"](m.t["n"](m.t["a"](x)))


def speech():
    def forward(m, x, lengths):
        packed = nn.utils.rnn.pack_padded_sequence(features(m, x), lengths, batch_first=True)
        return m.r(packed)[1]

    return Of(forward, t=tokens(), r=nn.GRU(16, 8, batch_first=True))


class Bag(nn.Module):
    def __init__(self):
        super().__init__()
        self.e, self.n, self.b = nn.EmbeddingBag(50, 16), nn.LayerNorm(16), BinaryLinear(16, 4)

    def forward(self, text, offsets):
        return self.b(self.n(self.e(text, offsets)))


def sparse_graph():
    return Of(lambda m, x, adjacency: torch.sparse.mm(adjacency, features(m, x)), t=tokens())


def detector():
    def forward(m, images, targets):
        size = max(i.shape[-1] for i in images)
        batch = torch.stack([F.pad(i, (0, size - i.shape[-1], 0, size - i.shape[-2])) for i in images])
        for target, image in zip(targets, images, strict=False):
            assert (target["boxes"] < image.shape[-1]).all() and target["boxes"].shape[-1] == 4
        return m.net(batch)

    return Of(forward, net=net())


def detector_with_a_batch_of_its_own():
    def forward(m, images):
        batch = images[0].new_zeros(len(images), 3, 8, 8)
        for image, place in zip(images, batch, strict=True):
            place[:, : image.shape[1], : image.shape[2]].copy_(image)
        return m.net(batch)

    return Of(forward, net=net())


def segments():
    def forward(m, x, cumulative):
        assert cumulative[-1] == x.shape[1] and (cumulative.diff() > 0).all()
        return features(m, x)

    return Of(forward, t=tokens())


def spectra():
    return Of(lambda m, x: features(m, torch.view_as_real(x).flatten(-2)[..., :5]), t=tokens())


def nested():
    return Of(lambda m, x: features(m, torch.nested.to_padded_tensor(x, 0.0)), t=tokens())


Batch = namedtuple("Batch", "x")


class Text(nn.Module):
    def __init__(self):
        super().__init__()
        self.e, self.p, self.n = nn.Embedding(20, 16), nn.Parameter(torch.randn(9, 16)), nn.LayerNorm(16)
        self.b = BinaryLinear(16, 16)

    def forward(self, ids, mask=None):
        assert mask is None or set(mask.unique().tolist()) <= {0.0, 1.0}
        x = self.n(self.e(ids) + self.p[: ids.shape[1]])
        return self.b(x if mask is None else x * mask[..., None])


INPUTS = {
    "lengths": (speech, (torch.randn(6, 12, 5), torch.tensor([12, 11, 9, 7, 4, 3])), 6),
    "lengths_of_two": (speech, (torch.zeros(2, 12, 5), torch.tensor([12, 3])), 2),
    "offsets": (Bag, (torch.randint(50, (20,)), torch.tensor([0, 4, 9, 13])), 4),
    "offsets_by_keyword": (Bag, {"text": torch.zeros(9, dtype=torch.long), "offsets": torch.tensor([0, 4])}, 2),
    "sparse": (sparse_graph, (torch.randn(7, 5), torch.eye(7).to_sparse()), 7),
    "images_and_boxes": (
        detector,
        (
            [torch.rand(3, 8, 8), torch.rand(3, 6, 8)],
            [{"boxes": torch.tensor([[1.0, 1, 5, 5]])}, {"boxes": torch.zeros(0, 4)}],
        ),
        2,
    ),
    "images_copied_into_a_batch": (
        detector_with_a_batch_of_its_own, ([torch.rand(3, 8, 8), torch.rand(3, 6, 8)],), 2
    ),
    "cumulative_lengths": (segments, (torch.randn(3, 8, 5), torch.tensor([0, 3, 8])), 3),
    "complex": (spectra, torch.randn(4, 6, 3, dtype=torch.complex64), 4),
    "nested": (nested, torch.nested.nested_tensor([torch.randn(3, 5), torch.randn(6, 5)]), 2),
    "ids": (Text, torch.randint(20, (4, 9)), 4),
    "ids_of_one_sample": (Text, torch.randint(20, (1, 9)), 1),
    "ids_that_are_zero": (Text, torch.zeros(2, 9, dtype=torch.long), 2),
    "ids_and_a_mask_of_ones": (Text, {"ids": torch.randint(20, (4, 9)), "mask": torch.ones(4, 9)}, 4),
    "zeros": (net, torch.zeros(2, 3, 32, 32), 2),
    "one_image": (net, torch.zeros(1, 3, 16, 16), 1),
    "ones": (net, torch.ones(5, 3, 8, 8), 5),
    "beside_an_empty_list_and_a_number": (
        lambda: Of(lambda m, x, more, time: m.net(x * time), net=net()),
        (torch.rand(4, 3, 8, 8), [], torch.tensor(0.5)),
        4,
    ),
    "uint8": (lambda: Of(lambda m, x: m.net(x.float() / 255), net=net()), torch.randint(256, (4, 3, 8, 8)).byte(), 4),
}  # fmt: skip


@pytest.mark.parametrize("build, example, samples", INPUTS.values(), ids=INPUTS)
def test_every_kind_of_input_is_given_to_the_model_as_it_may_be(build, example, samples):
    model = build()
    found, source = discover(model, example)
    expected = 1 if not any(isinstance(m, BinaryConv) for m in model.modules()) else 2
    assert [(f.tapped, f.mixed) for f in found] == [(True, None)] * expected, found
    args, kwargs = ((), example) if isinstance(example, dict) else (example, {})
    args = (args,) if isinstance(args, torch.Tensor) else args
    assert source.of(args, kwargs) == samples


def test_the_first_pass_gets_the_example_itself():
    seen = []
    discover(Of(lambda m, x: seen.append(x) or m.net(x), net=net()), X)
    assert seen[0] is X


def test_a_later_pass_has_one_sample_more_where_the_model_takes_it():
    for most in (21, 20):
        seen = []

        def forward(m, x, seen=seen, most=most):
            assert len(x) <= most, "too many samples"
            seen.append(len(x))
            return m.net(x)

        assert tapped(Of(forward, net=net()), torch.randn(20, 3, 8, 8)) == ["net.2", "net.4"]
        assert seen == [20, most]


def test_the_batch_may_be_a_named_tuple():
    seen = []
    model = Of(lambda m, batch: seen.append(len(batch.x)) or m.net(batch.x), net=net())
    assert tapped(model, (Batch(X),)) == ["net.2", "net.4"]
    assert seen[-1] == 7


def test_what_was_made_up_is_not_blamed_on_the_example():
    def picky(m, x):
        assert torch.equal(x, X), "another input"
        return m.net(x)

    assert tapped(Of(picky, net=net()), X) == ["net.2", "net.4"]


def test_a_forward_that_fails_on_the_example_is_told():
    with pytest.raises(CMIMError, match="ValueError: no such luck"):
        discover(Of(lambda m, x: (_ for _ in ()).throw(ValueError("no such luck")), net=net()), X)


def test_the_number_of_samples_is_read_by_position_and_by_keyword():
    _, source = discover(Text(), {"ids": torch.zeros(4, 9, dtype=torch.long)})
    assert source.of((torch.zeros(7, 2),), {}) == source.of((), {"ids": torch.zeros(7, 2)}) == 7
    assert source.of((), {}) is None and source.of((None,), {}) is None


def test_an_unclear_number_of_samples_is_asked_for():
    def forward(m, a, b):
        return m.t["b"](m.t["n"](m.t["a"](a))).mean() + m.u["b"](m.u["n"](m.u["a"](b))).mean()

    model = Of(forward, t=tokens(), u=tokens())
    example = torch.randn(4, 5), torch.randn(6, 5)
    with pytest.raises(CMIMError, match="batch_size="):
        discover(model, example)
    assert tapped(model, example, batch_size=4)[0] == "t.b"
    with pytest.raises(CMIMError, match="no input has a length"):
        discover(Of(lambda m, x: m.t["a"](x.expand(4, 5)), t=tokens()), torch.tensor(1.0))


def test_a_size_beside_the_images_is_no_list_of_samples():
    seen = []
    model = Of(lambda m, x, size: seen.append(len(x)) or m.net(F.interpolate(x, size)), net=net())
    assert tapped(model, (X, (12, 12))) == ["net.2", "net.4"]
    assert seen == [6, 7]


@pytest.mark.parametrize("layer", [nn.GRU(16, 16), nn.MultiheadAttention(16, 2)])
def test_the_first_dimension_is_not_the_batch_where_it_is_time(layer):
    def forward(m, x):
        x = m.t["n"](m.t["a"](x))
        return m.t["b"](m.r(*[x] * (3 if isinstance(m.r, nn.MultiheadAttention) else 1))[0])

    model = Of(forward, t=tokens(), r=layer)
    (found,) = find_binary_activations(model, torch.randn(12, 4, 5))
    assert found.tapped and "is time" in found.mixed


@pytest.mark.parametrize("shape", [(4, 12, 5), (4, 4, 5), (4, 5)])
def test_a_layer_that_takes_time_first_may_get_what_has_it_there(shape):
    """Also where there are as many steps as samples, or where the samples are one sequence."""

    def forward(m, x):
        x = m.t["n"](m.t["a"](x))
        return m.t["b"](m.r(x.transpose(0, -2))[0].transpose(0, -2))

    (found,) = find_binary_activations(Of(forward, t=tokens(), r=nn.GRU(16, 16)), torch.randn(shape))
    assert found.tapped and found.mixed is None


def windows(m, x, major):
    x = m.stem(x)
    B, C, H, W = x.shape
    x = x.view(B, C, H // 4, 4, W // 4, 4).permute(0, 2, 4, 3, 5, 1)
    if not major:
        x = x.permute(1, 2, 0, 3, 4, 5)
    return m.b(m.n(x.reshape(-1, 16, C)))


@pytest.mark.parametrize("example", [torch.randn(4, 3, 8, 8), torch.zeros(2, 3, 16, 8), torch.zeros(1, 3, 8, 8)])
def test_rows_of_windows_belong_to_their_images_or_to_none(example):
    for major in (True, False):
        parts = {"stem": nn.Conv2d(3, 16, 1), "n": nn.LayerNorm(16), "b": BinaryLinear(16, 16)}
        (found,) = find_binary_activations(Of(lambda m, x, major=major: windows(m, x, major), **parts), example)
        assert found.tapped and (found.mixed is None) == major, found.reason
        assert all((layout.windowed, layout.mixed) == (major, not major) for layout in found.layouts)


# -- structure ---------------------------------------------------------------------------------------------------


def skipping(draw, rate):
    def forward(m, x):
        x = m.stem(x)
        for block in m.blocks:
            if not (m.training and draw() < rate):
                x = x + block(x)
        return x

    blocks = [nn.Sequential(nn.BatchNorm2d(8), Binary(), nn.Conv2d(8, 8, 3, padding=1)) for _ in range(6)]
    return Of(forward, stem=nn.Conv2d(3, 8, 3, padding=1), blocks=nn.ModuleList(blocks))


@pytest.mark.parametrize(
    "draw, rate",
    [(lambda: torch.rand(()), 0.1), (random.random, 0.5), (np.random.rand, 0.1)],
    ids=["torch", "python", "np"],
)
def test_layers_skipped_at_random_are_all_found_in_order(draw, rate):
    for seed in range(2):
        torch.manual_seed(seed)
        random.seed(seed)
        assert tapped(skipping(draw, rate), X) == [f"blocks.{i}.1" for i in range(6)]


def test_layers_skipped_by_numbers_that_are_drawn_at_once_are_all_found():
    def forward(m, x):
        x = m.stem(x)
        for skip, block in zip(torch.rand(6) < 0.5, m.blocks, strict=True):
            x = x if skip else x + block(x)
        return x

    model = Of(forward, **dict(skipping(None, 0).named_children()))
    assert tapped(model, X) == [f"blocks.{i}.1" for i in range(6)]


def test_a_sign_behind_a_random_number_of_steps_is_tapped():
    def forward(m, x):
        x = m.first(x)
        for _ in range(1 + (random.random() < 0.5)):
            x = m.norm(m.step(x))
        return m.last(Sign.apply(x))

    parts = {"first": nn.Linear(8, 16), "step": nn.Linear(16, 16), "norm": nn.LayerNorm(16), "last": nn.Linear(16, 4)}
    assert tapped(Of(forward, **parts), X8) == ["(model)"]


def test_a_layer_before_the_sign_may_be_skipped_at_random():
    def forward(m, x):
        x = m.first(x)
        return m.last(Sign.apply(m.layer(x) if random.random() < 0.5 else x))

    parts = {"first": nn.Linear(8, 16), "layer": nn.Linear(16, 16), "last": nn.Linear(16, 4)}
    assert tapped(Of(forward, **parts), X8) == ["(model)"]


def test_what_is_cropped_at_random_before_its_sign_changes_from_pass_to_pass():
    act = Of(lambda m, x: Sign.apply(x[..., 1:] if random.random() < 0.5 else x))
    assert "from pass to pass" in reasons(wide(act), X[:2, :, :4, :4])["2"]


def test_a_module_that_is_never_called_costs_no_further_pass():
    passes = []
    model = Of(lambda m, x: passes.append(1) or m.net(F.dropout(x, 0.1)), net=net(), unused=nn.Linear(3, 3))
    discover(model, X)
    assert len(passes) == 2


def test_a_forward_that_calls_itself_without_gradients_has_plain_names():
    def forward(m, x, guess=None):
        if guess is None:
            with torch.no_grad():
                guess = m(x, torch.zeros(len(x), 4))
        return m.net(x + m.cond(guess)[:, :, None, None])

    found = find_binary_activations(Of(forward, net=net(), cond=nn.Linear(4, 3)), X)
    assert [(f.name, f.reason, f.binary.call) for f in found] == [("net.2", None, 0), ("net.4", None, 0)]


def test_a_forward_may_return_nothing_and_keep_its_output():
    model = Of(lambda m, x: setattr(m, "out", m.net(x)), net=net())
    model(X)
    kept = model.out
    assert tapped(model, X) == ["net.2", "net.4"]
    assert model.out is kept and kept.grad_fn is not None


def compiled_forward():
    model = net()
    model.forward = torch.compile(model.forward, backend="eager")
    return model


def compiled_block():
    model = net()
    model[2] = torch.compile(model[2], backend="eager")
    return model


def compiled_module():
    model = net()
    model[2].compile(backend="eager", fullgraph=True)
    return model


def compiled_function():
    function = torch.compile(lambda m, x: F.conv2d(Sign.apply(x), m.w), backend="eager")
    return nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), Of(function, w=nn.Parameter(torch.randn(8, 8, 1, 1))))


@pytest.mark.parametrize("build", [compiled_forward, compiled_block, compiled_module, compiled_function])
def test_what_is_compiled_already_runs_eagerly(build):
    model = build()
    if build is compiled_forward:
        model(X)
    assert len(tapped(model, X)) == (1 if build is compiled_function else 2)


def test_a_forward_may_take_a_gradient_itself():
    def energy_and_force(m, x):
        x = x.detach().requires_grad_()
        (force,) = torch.autograd.grad(m.energy(x.exp()).sum(), x, create_graph=True)
        return m.act(force)

    model = nn.Sequential(Of(energy_and_force, energy=nn.Linear(4, 4), act=Binary()), nn.Linear(4, 3))
    assert tapped(model, torch.randn(16, 4)) == ["0.act"]


def test_no_activation_outlives_its_use():
    alive = []

    def forward(m, x):
        hidden = m.act(m.layer(x).sin())
        seen = weakref.ref(hidden)
        out = m.last(hidden).exp().sum()
        del hidden
        alive.append(seen() is not None)
        return out

    model = Of(forward, layer=nn.Linear(4, 8), act=Binary(), last=nn.Linear(8, 3))
    model(torch.randn(8, 4))
    assert alive == [True]  # the graph of a training step keeps it
    alive.clear()
    assert tapped(model, torch.randn(8, 4)) == ["act"]
    assert alive and not any(alive)


def test_a_gradient_for_what_a_hook_collected_in_the_dry_run_is_refused():
    model = nn.Sequential(nn.Linear(4, 8), Binary(), nn.Linear(8, 3))
    collected = []
    model[1].register_forward_hook(lambda module, args, output: collected.append(output))
    assert tapped(model, torch.randn(8, 4)) == ["1"]
    with pytest.raises(CMIMError, match="clear what they collected"):
        collected[-1].sum().backward()


# -- frozen parts ------------------------------------------------------------------------------------------------


def test_what_follows_a_frozen_stem_is_tapped():
    for frozen in ([0], [0, 3], [3]):
        model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), Binary(), nn.Conv2d(8, 8, 3), nn.ReLU())
        for i in frozen:
            model[i].requires_grad_(False)
        assert tapped(model, X) == ["2"]


def test_what_is_frozen_up_to_the_sign_is_listed():
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), Binary(), nn.Conv2d(8, 8, 3), nn.BatchNorm2d(8))
    model[:2].requires_grad_(False)
    assert "frozen" in reasons(model, X)["2"]

    # Also where a weight was binarized before it.
    def convolve(m, x):
        weight = Sign.apply(m.weight)
        return F.conv2d(Sign.apply(x), weight)

    layer = Of(convolve, weight=nn.Parameter(torch.randn(8, 8, 3, 3)))
    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), layer)
    model[:2].requires_grad_(False)
    assert "frozen" in reasons(model, X)["2"]


def test_a_frozen_model_is_an_error():
    with pytest.raises(CMIMError, match="frozen"):
        discover(net().requires_grad_(False), X)


# -- put back ----------------------------------------------------------------------------------------------------


class Meter:
    def __init__(self):
        self.sum, self.seen = 0.0, {"a": [1]}


def test_everything_that_a_forward_changes_is_put_back():
    def forward(m, x):
        out = m.net(
            x + 0.01 * torch.randn(x.shape, generator=m.g) * m.numpy.random() * m.old.rand() * m.python.random()
        )
        m.bank.append(out.detach())
        m.counts["calls"] += 1
        m.lists["a"].append(3)
        m.order.move_to_end("a")
        m.names.add("new")
        m.array += 1
        m.meter.sum += 1
        m.meter.seen["a"].append(2)
        m.pair[0].append(1)
        m.cache[0].add_(1)
        m.ema.data.mul_(0.9).add_(out.detach().mean())
        with torch.no_grad():
            m.scale += 1
            m.assigned.data = m.assigned.data + 1
        m.scale.requires_grad_(False)
        m.steps += 1
        return out

    model = Of(
        forward, net=net(), g=torch.Generator().manual_seed(0), numpy=np.random.default_rng(0), python=random.Random(0),
        old=np.random.RandomState(0), bank=deque(maxlen=64), counts=Counter(calls=2), lists=defaultdict(list, a=[1]),
        order=OrderedDict(a=1, b=2), names={"old"}, array=np.zeros(3), meter=Meter(), pair=([], 1), steps=0,
        cache=[torch.zeros(2)], ema=nn.Parameter(torch.zeros(3)), scale=nn.Parameter(torch.ones(2)),
        assigned=nn.Parameter(torch.ones(2)),
    )  # fmt: skip
    held = model.bank, model.counts, model.lists["a"], model.assigned.data_ptr()
    states = model.g.get_state(), model.numpy.bit_generator.state, model.python.getstate(), model.old.get_state()[2]
    weights = {name: p.clone() for name, p in model.named_parameters()}
    assert tapped(model, X) == ["net.2", "net.4"]
    assert (not model.bank, model.counts, dict(model.lists)) == (True, Counter(calls=2), {"a": [1]})
    assert (list(model.order), model.names, model.steps) == (["a", "b"], {"old"}, 0)
    assert not model.array.any() and vars(model.meter) == {"sum": 0.0, "seen": {"a": [1]}}
    assert model.pair == ([], 1) and not model.cache[0].any()
    assert all(torch.equal(p, weights[name]) and p.requires_grad for name, p in model.named_parameters())
    assert held[0] is model.bank and held[1] is model.counts and held[2] is model.lists["a"]
    assert held[3] == model.assigned.data_ptr()
    again = model.g.get_state(), model.numpy.bit_generator.state, model.python.getstate(), model.old.get_state()[2]
    assert torch.equal(again[0], states[0]) and again[1:] == states[1:]


def test_gradients_and_the_renormalized_rows_of_an_embedding_are_put_back():
    def forward(m, ids):
        x = m.e(ids)
        m.side(x.detach()).sum().backward()
        return m.b(m.n(x))

    parts = {
        "e": nn.Embedding(9, 16, max_norm=0.1),
        "side": nn.Linear(16, 1),
        "n": nn.LayerNorm(16),
        "b": BinaryLinear(16, 4),
    }
    model = Of(forward, **parts)
    model.side.weight.grad = torch.ones(1, 16)
    before = model.e.weight.clone()
    assert tapped(model, torch.randint(9, (5, 7))) == ["b"]
    assert torch.equal(model.e.weight, before)
    assert torch.equal(model.side.weight.grad, torch.ones(1, 16)) and model.side.bias.grad is None


# -- codes -------------------------------------------------------------------------------------------------------


def wide(act, *behind, width=16):
    return nn.Sequential(nn.Conv2d(3, width, 3, padding=1), nn.BatchNorm2d(width), act, *behind, nn.Conv2d(width, 8, 3))


SHIFTS = {
    "scalar": (lambda m, x: Sign.apply(x - m.p), torch.tensor(0.0)),
    "channel": (lambda m, x: Sign.apply(x + m.p), torch.zeros(1, 16, 1, 1)),
    "vector": (lambda m, x: Sign.apply(x + m.p[:, None, None]), torch.zeros(16)),
    "scaled": (lambda m, x: Sign.apply(x * 2 - m.p), torch.zeros(1)),
}


@pytest.mark.parametrize("function, start", SHIFTS.values(), ids=SHIFTS)
def test_a_threshold_that_starts_at_zero_keeps_its_place(function, start):
    parts = [nn.Conv2d(3, 16, 3, padding=1), nn.BatchNorm2d(16)]
    for _ in range(5):
        act = Of(function, p=nn.Parameter(start.clone()))
        parts += [nn.LeakyReLU(0.25), act, nn.Conv2d(16, 16, 3, padding=1), nn.BatchNorm2d(16)]
    assert tapped(nn.Sequential(*parts), X) == [str(i) for i in range(3, 23, 4)]


SCALES = {
    "token": lambda m, x: Sign.apply(x) * x.abs().mean(-1, keepdim=True).detach(),
    "token_opaque": lambda m, x: torch.einsum("bnc,bn->bnc", Sign.apply(x), x.abs().mean(-1).detach()),
    "token_and_channel": lambda m, x: Sign.apply(x) * x.abs().mean(-1, keepdim=True) * m.p,
    "place": lambda m, x: Sign.apply(x) / x.abs().amax((0, 2), keepdim=True).detach(),
    "expanded": lambda m, x: x.abs().mean((1, 2), keepdim=True).expand_as(x) * Sign.apply(x),
}


@pytest.mark.parametrize(
    "function, shape",
    zip(SCALES.values(), [(4, 64, 8), (2, 197, 8), (4, 64, 8), (2, 197, 8), (2, 197, 8)], strict=True),
    ids=SCALES,
)
def test_codes_may_have_a_scale_for_each_token(function, shape):
    act = Of(function, p=nn.Parameter(torch.rand(64) + 0.5))
    assert tapped(nn.Sequential(nn.Linear(8, 64), nn.LayerNorm(64), act, nn.Linear(64, 8)), torch.zeros(shape)) == ["2"]


def test_codes_may_have_a_scale_for_each_pixel():
    act = Of(lambda m, x: Sign.apply(x) * x.abs().mean(1, keepdim=True).detach())
    assert tapped(wide(act), torch.zeros(4, 3, 24, 24)) == ["2"]


@pytest.mark.parametrize(
    "move",
    [
        lambda x: x.flip(-1),
        lambda x: -x,
        lambda x: x.repeat(1, 1, 2, 1),
        lambda x: x.index_select(2, torch.tensor([3, 1, 2])),
        lambda x: x.masked_fill(torch.arange(8) > 5, 0),
        lambda x: F.dropout2d(x, 0.3),
        lambda x: F.channel_shuffle(x, 2),
        lambda x: torch.cat([x[:, :4].roll(1, 2), x[:, 4:]], 1),  # half of the channels are shifted
    ],
)
def test_codes_with_a_scale_for_each_pixel_and_channel_may_be_moved(move):
    def forward(m, x):
        x = m.norm(m.first(x))
        return m.last(move(Sign.apply(x) * x.abs().mean(1, keepdim=True).detach() * m.alpha))

    layers = {"first": nn.Conv2d(3, 8, 1), "norm": nn.BatchNorm2d(8), "last": nn.Conv2d(8, 4, 1)}
    model = Of(forward, alpha=nn.Parameter(torch.randn(8, 1, 1)), **layers)
    assert [f.channels for f in find_binary_activations(model, X) if f.tapped] == [8]


def test_products_inside_a_custom_function_count():
    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, w):
            ctx.save_for_backward(x, w)
            return F.linear(x, w) if x.ndim > 2 else x.mm(w.t())

        @staticmethod
        def backward(ctx, g):
            x, w = ctx.saved_tensors
            return g.mm(w), g.t().mm(x)

    class Both(Product):
        @staticmethod
        def forward(ctx, x, w):
            b = torch.sign(x)
            ctx.save_for_backward(b, w)
            return b @ w.t()

    def linear(function=Product):
        return Of(lambda m, x: function.apply(x, m.w), w=nn.Parameter(torch.randn(16, 16)))

    for shape in ((8, 16), (4, 5, 16)):
        norm = nn.LayerNorm(16)
        assert tapped(nn.Sequential(linear(), norm, Binary(), linear()), torch.randn(shape)) == ["2"]
    # Its sign is hidden in the function: there is no gradient of a_B that the user chose.
    assert "2" in reasons(nn.Sequential(linear(), nn.BatchNorm1d(16), linear(Both)), torch.randn(8, 16))


JOINS = {
    "codes_and_products": lambda m, b: torch.cat([-b * b.roll(1, -1), b], 1),
    "codes_twice": lambda m, b: torch.cat([b, -b], 1),
    "codes_and_padding": lambda m, b: torch.cat([b, torch.ones_like(b)], 1),
    "halves": lambda m, b: torch.cat([b[:, 8:], b[:, :8], b], 1),
    "stacked": lambda m, b: torch.stack([b, b.flip(-1)], 2).flatten(1, 2),
}


@pytest.mark.parametrize("join", JOINS.values(), ids=JOINS)
def test_a_join_is_not_paired_with_the_latent_of_a_part(join):
    model = nn.Sequential(nn.Conv1d(3, 16, 1), nn.BatchNorm1d(16), Binary(), Of(join), nn.LazyConv1d(8, 1))
    example = torch.randn(8, 3, 20)
    model(example)
    found = [f for f in find_binary_activations(model, example) if f.tapped]
    assert [(f.name, f.channels, f.latent_channels) for f in found] == [("2", 16, 16)]


CONSTANT = {
    "shifted": lambda m, x: Sign.apply(x + 9),
    "after_relu": lambda m, x: Sign.apply(F.relu(x)),
    "detach_trick": lambda m, x: x + ((x > 9).float() - x).detach(),
    "scaled": lambda m, x: Sign.apply(x - 9) * 0.3,
    "of_two": lambda m, x: Sign.apply(x + 9) * Sign.apply(x + 8),
    "rounded": lambda m, x: x + (x.clamp(0, 1).mul(0.1).round() - x).detach(),
    "clamped": lambda m, x: (x * 1e6 + 1e9).clamp(-1, 1),
}


@pytest.mark.parametrize("function", CONSTANT.values(), ids=CONSTANT)
def test_a_sign_that_is_constant_is_listed_as_dead(function):
    (found,) = reasons(wide(Of(function)), X).items()
    assert found[0] == "2" and "a dead sign" in found[1]


SUMS = {
    "residual": (lambda m, x: (a := Sign.apply(x)) * 0.8 + Sign.apply(x - 0.8 * a) * 0.4, 2),
    "sign_and_noise": (lambda m, x: Sign.apply(x) + 0.1 * torch.randn_like(x), 1),
    "bases": (lambda m, x: sum(b * Sign.apply(x + s) for b, s in ((0.5, -0.5), (0.7, 0.0), (0.9, 0.5))), 3),
    "stacked": (lambda m, x: torch.stack([Sign.apply(x - 0.5), Sign.apply(x + 0.5)]).mean(0), 2),
}


@pytest.mark.parametrize("function, count", SUMS.values(), ids=SUMS)
def test_the_codes_in_a_sum_are_tapped_each(function, count):
    found = find_binary_activations(wide(Of(function)), X)
    assert [f.reason for f in found] == [None] * count


def test_a_sum_with_something_continuous_is_no_binary_operand():
    assert find_binary_activations(wide(Of(lambda m, x: Sign.apply(x) + F.gelu(x))), X) == []


def test_a_product_of_two_codes_has_no_latent():
    act = Of(lambda m, x: Sign.apply(x) * Sign.apply(x.roll(1, 1)))
    assert reasons(wide(act), X) == {"2": "no tensor in the graph was found that it is the sign of"}


def test_an_input_of_few_grey_levels_is_not_listed():
    assert reasons(net(), torch.randint(5, (4, 3, 16, 16)) / 4) == {}


def test_a_weight_that_is_the_product_of_zeros_is_no_dead_sign():
    """As in LoRA."""
    weights = {"a": nn.Parameter(torch.randn(8, 2)), "b": nn.Parameter(torch.zeros(2, 16))}
    model = Of(
        lambda m, x: m.encoder(m.first(x) + x @ (m.a @ m.b)), first=nn.Linear(8, 16), encoder=encoder(16), **weights
    )
    assert [f.reason for f in find_binary_activations(model, X8)] == [None]


def test_a_part_of_the_codes_may_be_constant_by_chance():
    norm, layers = nn.BatchNorm1d(16), nn.ModuleList(nn.Linear(2, 4) for _ in range(8))
    nn.init.constant_(norm.bias[:2].data, 9.0)

    def forward(m, x):
        return sum(
            layer(part) for layer, part in zip(m.layers, Sign.apply(m.norm(m.first(x))).chunk(8, 1), strict=True)
        )

    model = Of(forward, first=nn.Linear(8, 16), norm=norm, layers=layers)
    assert [f.reason for f in find_binary_activations(model, X8)] == [None]


def test_a_sign_may_be_dead_in_one_of_the_passes():
    assert tapped(wide(Of(lambda m, x: Sign.apply(x + 99 * (len(x) > len(X))))), X) == ["2"]


@pytest.mark.parametrize("rare", [(0.0, 1.0), (-1.0, 3.0)])
def test_a_quantizer_is_listed_wherever_its_rare_values_lie(rare):
    def act(m, x):
        hard = torch.where(x > 0, *map(torch.tensor, (2.0, rare[0])))
        hard = torch.where(x > x.amax() * 0.98, torch.tensor(rare[1]), hard)
        return x + (hard - x).detach()

    (found,) = find_binary_activations(wide(Of(act)), torch.randn(4, 3, 40, 40))
    assert not found.tapped and "3 values" in found.reason


def test_what_its_latent_does_not_tell_is_no_sign_of_it():
    def act(m, x):
        other = torch.randn(x.shape, generator=torch.Generator().manual_seed(1)) + 0 * x.detach()
        return x + ((other > 0).float() * 2 - 1 - x).detach()

    assert tapped(wide(Of(act)), X) == []


def test_codes_that_follow_their_latent_in_most_places_are_no_sign_of_it():
    """As the product of its sign with another code that is +1 more often than not."""

    def act(m, x):
        flipped = torch.arange(x.numel()).view_as(x) % 10 == 3
        latent = x.detach()
        return x + (torch.where(flipped, -latent, latent).sign() - latent)

    (found,) = find_binary_activations(wide(Of(act)), X)
    assert found.reason == "no threshold splits its latent into its two values"


@pytest.mark.parametrize("value", [-1e9, -torch.inf])
def test_a_latent_may_be_masked(value):
    def act(m, x):
        masked = torch.arange(x.numel()).view_as(x) % 301 == 0
        return Sign.apply(x.masked_fill(masked, value))

    assert tapped(wide(Of(act)), X) == ["2"]


def test_an_attention_mask_of_the_smallest_number_hides_no_latent():
    def attention(m, x):
        mask = torch.zeros(x.shape[1])
        mask[-2:] = torch.finfo(x.dtype).min
        return Sign.apply(m.query(x) @ m.key(x).transpose(1, 2) + mask) @ x

    parts = {name: nn.Linear(16, 16) for name in ("query", "key")}
    assert tapped(nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), Of(attention, **parts)), torch.randn(4, 9, 8)) == [
        "2"
    ]


# -- names -------------------------------------------------------------------------------------------------------


def test_names_say_where_in_a_forward():
    def attention(m, x):
        q, k, v = (Sign.apply(layer(x)) for layer in (m.query, m.key, m.value))
        return (q @ k.transpose(1, 2)) @ v

    parts = {name: nn.Linear(16, 16) for name in ("query", "key", "value")}
    model = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), Of(attention, **parts))
    assert tapped(model, torch.randn(4, 6, 8)) == ["2: query", "2: key", "2: value"]


@pytest.mark.parametrize(
    "norm, example", [(nn.LayerNorm(16), torch.randn(4, 6, 8)), (nn.BatchNorm1d(16), torch.zeros(4, 8))]
)
def test_equal_codes_of_one_latent_are_one_tap(norm, example):
    layers = {name: BinaryLinear(16, 16) for name in ("query", "key", "value")}
    model = nn.Sequential(
        nn.Linear(8, 16, bias=False), norm, Of(lambda m, x: m.query(x) * m.key(x) + m.value(x), **layers)
    )
    assert tapped(model, example) == ["2.query"]


def test_equal_codes_of_two_latents_are_two_taps():
    layers = {name: BinaryLinear(16, 16) for name in ("query", "key")}
    norm = nn.LayerNorm(16)
    nn.init.constant_(norm.bias, 2.0)  # few values are below zero, where the two latents differ
    both = Of(lambda m, x: m.query(x) * m.key(F.leaky_relu(x)), **layers)
    assert tapped(nn.Sequential(nn.Linear(8, 16), norm, both), torch.randn(4, 64, 8)) == ["2.query", "2.key"]


def test_names_are_unique():
    def forward(m, x):
        for _ in range(3):
            x = m.conv(m.act(m.norm(x)))
        return x

    parts = {"norm": nn.BatchNorm2d(3), "act": Binary(), "conv": nn.Conv2d(3, 3, 1)}
    assert tapped(nn.Sequential(nn.Conv2d(3, 3, 1), Of(forward, **parts)), X) == ["1.act", "1.act#2", "1.act#3"]


# -- what others ran into ----------------------------------------------------------------------------------------


def encoder(first=8):
    return nn.Sequential(nn.Linear(first, 16), nn.LayerNorm(16), Binary(), nn.Linear(16, 8))


class Dropped(nn.Module):
    """Layers that are skipped at random, with a sign in the forward around them."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Linear(8, 16), nn.Linear(16, 4)
        self.layers = nn.ModuleList(nn.Sequential(nn.Linear(16, 16), nn.LayerNorm(16)) for _ in range(4))

    def forward(self, x):
        x = self.stem(x)
        for layer in self.layers:
            if random.random() > 0.3:
                x = x + layer(Sign.apply(x))
        return self.head(x)


class Varied(nn.Module):
    """Steps over time, then one sign in the forward."""

    def __init__(self):
        super().__init__()
        self.wx, self.wh, self.norm, self.head = nn.Linear(8, 16), nn.Linear(16, 16), nn.LayerNorm(16), nn.Linear(16, 4)

    def forward(self, x):
        h = x.new_zeros(len(x), 16)
        for t in range(x.shape[1]):
            h = self.norm(self.wx(x[:, t]) + self.wh(h))
        return self.head(Sign.apply(h))


class Summed(nn.Module):
    """A sum over time, then the detach trick in the forward."""

    def __init__(self):
        super().__init__()
        self.stem, self.head = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x):
        h = x.new_zeros(len(x), 16)
        for step in x.unbind(1):
            h += self.stem(step)
        return self.head(h + (torch.where(h >= 0, 1.0, -1.0) - h).detach())


class DrawnAtOnce(Dropped):
    def forward(self, x):
        x = self.stem(x)
        for keep, layer in zip(torch.rand(4) > 0.3, self.layers, strict=True):
            if keep:
                x = x + layer(Sign.apply(x))
        return self.head(x)


@pytest.mark.parametrize(
    "build, example, inputs",
    [
        (Dropped, torch.randn(8, 8), [torch.randn(8, 8)] * 30),
        (DrawnAtOnce, torch.randn(8, 8), [torch.randn(8, 8)] * 30),
        (Varied, torch.randn(4, 5, 8), [torch.randn(4, steps, 8) for steps in (5, 9, 5, 3, 5)]),
        (Summed, torch.randn(4, 5, 8), [torch.randn(4, steps, 8) for steps in (5, 9, 5, 3, 5)]),
    ],
    ids=["skipped", "skipped, drawn at once", "recurrent", "sum over time"],
)
def test_no_code_is_contrasted_with_the_latent_of_another_call(build, example, inputs, monkeypatch):
    seen, take = {}, Pass._take

    def see(self, k, side, x):
        seen[k, side] = x.detach()
        take(self, k, side, x)

    monkeypatch.setattr(Pass, "_take", see)
    torch.manual_seed(0)
    random.seed(0)
    model = build()
    cmim = CMIM(model, example, taps_per_step=None)
    contrasted = 0
    for x in inputs:
        seen.clear()
        model(x)
        captured = waiting(cmim)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            cmim(model)
        for k, pair in captured.pairs.items():
            if pair.complete:
                contrasted += 1
                assert torch.equal(seen[k, 0] > 0, seen[k, 1] >= 0), cmim.taps[k].name
    assert contrasted >= len(inputs) // 2


def test_a_shared_module_that_is_called_a_random_number_of_times_is_not_tapped():
    widths = [8, 8, 8, 16, 16]

    def forward(m, x):
        for layer in m.layers:
            if layer[0].in_features != layer[0].out_features:
                x = layer(m.act(x))
            elif random.random() > 0.5:
                x = x + layer(m.act(x))
        return x

    layers = [nn.Sequential(nn.Linear(a, b), nn.LayerNorm(b)) for a, b in zip([8, *widths], widths, strict=False)]
    model = nn.Sequential(nn.Linear(8, 8), Of(forward, act=Binary(), layers=nn.ModuleList(layers)))
    assert any("from pass to pass" in reason for reason in reasons(model, torch.randn(8, 8)).values())


@pytest.mark.parametrize("drawn", [lambda: random.random(), lambda: float(torch.rand(1))], ids=["random", "torch"])
def test_a_size_or_a_flip_drawn_in_the_forward_hides_no_tap(drawn):
    class Conv(nn.Conv2d):
        def __init__(self):
            super().__init__(8, 8, 3, padding=1)
            self.norm = nn.BatchNorm2d(8)

        def forward(self, x):
            return F.conv2d(Sign.apply(self.norm(x)), self.weight, self.bias, padding=1)

    def forward(m, x):
        x = F.interpolate(x, size=int(8 + 16 * drawn()))
        return m.net(x.flip(-1) if drawn() < 0.5 else x)

    model = Of(forward, net=nn.Sequential(nn.Conv2d(3, 8, 3), Conv(), nn.BatchNorm2d(8), Binary(), nn.Conv2d(8, 8, 3)))
    assert tapped(model, torch.randn(4, 3, 8, 8)) == ["net.1", "net.3"]


def test_branches_that_are_alike_as_they_are_initialised_are_taps_of_their_own():
    class Block(nn.Module):
        def __init__(self):
            super().__init__()
            self.layer, self.alpha = nn.Linear(16, 16), nn.Parameter(torch.zeros(1))

        def forward(self, x):
            return x + self.alpha * self.layer(Sign.apply(x))

    assert tapped(nn.Sequential(nn.Linear(8, 16), *[Block() for _ in range(3)]), torch.randn(8, 8)) == ["1", "2", "3"]

    class Shifted(nn.Module):
        def __init__(self):
            super().__init__()
            self.shift, self.layer = nn.Parameter(torch.zeros(16)), nn.Linear(16, 16)

        def forward(self, x):
            return self.layer(Sign.apply(x + self.shift))

    parts = {name: Shifted() for name in ("query", "key", "value")}
    attention = Of(lambda m, x: (m.query(x) @ m.key(x).mT).softmax(-1) @ m.value(x), **parts)
    model = nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16), attention)
    assert tapped(model, torch.randn(4, 6, 8)) == ["2.query", "2.key", "2.value"]


def test_siamese_text_of_equal_ids_is_two_taps():
    text = nn.Sequential(nn.Embedding(20, 8), nn.LayerNorm(8), Binary(), nn.Linear(8, 8))
    ids = torch.zeros(2, 6, dtype=torch.long)
    model = Of(lambda m, a, b: (m.text(a) * m.text(b)).sum(), text=text)
    assert tapped(model, (ids, ids.clone())) == ["text.2", "text.2#2"]


def test_a_permutation_that_is_drawn_stays_one():
    drawn = []

    def forward(m, x):
        drawn.append(torch.randperm(x.shape[1]))
        return m.encoder(x[:, drawn[-1]])

    assert tapped(Of(forward, encoder=encoder()), torch.randn(3, 8)) == ["encoder.2"]
    assert all(sorted(p.tolist()) == list(range(8)) for p in drawn)


def test_a_thread_that_waits_for_what_the_model_holds_waits_on():
    model = Of(lambda m, x: (m.queue.put(1), m.encoder(x))[1], encoder=encoder(), queue=queue.Queue())
    done = []

    def drain():
        while model.queue.get() is not None:
            done.append(1)

    thread = threading.Thread(target=drain, daemon=True)
    thread.start()
    time.sleep(0.05)  # until it waits
    assert tapped(model, torch.randn(4, 8)) == ["encoder.2"]
    model.queue.put(None)
    thread.join(timeout=10)
    assert not thread.is_alive()


def test_attributes_of_any_kind_are_in_nobodys_way():
    class Gone:
        pass

    class Frozen(dict):
        """As diffusers keeps the configuration of a model."""

        def clear(self):
            raise TypeError

    gone = Gone()
    proxy = weakref.proxy(gone)
    del gone
    nested = torch.nested.nested_tensor([torch.zeros(2)])
    model = Of(lambda m, x: m.encoder(x), encoder=encoder(), things=[proxy, random.SystemRandom(), nested, Frozen(a=1)])
    model.meta, model.constant = torch.empty(2, device="meta"), np.broadcast_to(np.zeros(1), 3)
    assert tapped(model, torch.randn(4, 8)) == ["encoder.2"]


@pytest.mark.parametrize("samples", [2, 5])
def test_one_example_for_both_inputs_of_a_siamese_network_hides_neither(samples):
    x = torch.randn(samples, 8)
    model = Of(lambda m, a, b: m.encoder(a) - m.encoder(b), encoder=encoder())
    assert tapped(model, (x, x)) == ["encoder.2", "encoder.2#2"]


def test_a_forward_may_copy_a_module():
    def forward(m, x):
        if m.target is None:
            m.target = copy.deepcopy(m.online).requires_grad_(False)
        with torch.no_grad():
            target = m.target(x)
        return (m.online(x) - target).square().mean()

    for samples in (4, 8):
        model = Of(forward, online=encoder(), target=None)
        assert tapped(model, torch.randn(samples, 8)) == ["online.2"]
        assert model.target is None


def test_the_first_layer_may_be_recurrent():
    rest = nn.Sequential(nn.LayerNorm(8), Binary(), nn.Linear(8, 4))
    model = Of(lambda m, x: m.rest(m.first(x)[0]), first=nn.LSTM(8, 8, batch_first=True), rest=rest)
    assert tapped(model, torch.randn(4, 5, 8)) == ["rest.1"]


def test_the_first_layer_may_be_a_table():
    def forward(m, ids):
        return m.last(m.act(m.norm(m.table[ids])))

    table = nn.Parameter(torch.randn(20, 8))
    model = Of(forward, table=table, norm=nn.LayerNorm(8), act=Binary(), last=nn.Linear(8, 4))
    assert tapped(model, torch.randint(20, (4, 5))) == ["act"]


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: torch.func.vmap(lambda w: x * w)(m.scales).sum(0) + m.encoder(x),
        lambda m, x: m.encoder(x.to(torch.float8_e4m3fn).float()),
        lambda m, x: m.encoder(m.scripted(x)),
    ],
    ids=["vmap", "float8", "TorchScript"],
)
def test_what_cannot_be_read_is_passed_over(function):
    scales = nn.Parameter(torch.randn(3, 8))
    model = Of(function, encoder=encoder(), scales=scales, scripted=torch.jit.script(nn.Linear(8, 8)))
    assert tapped(model, torch.randn(8, 8)) == ["encoder.2"]


def test_an_example_without_values_is_refused():
    with pytest.raises(CMIMError, match="meta device"):
        CMIM(net(), torch.zeros(2, 3, 8, 8, device="meta"))


def test_inputs_without_a_tensor_are_refused():
    batch = types.SimpleNamespace(x=torch.randn(4, 8))
    with pytest.raises(CMIMError, match="tuples, lists and dicts"):
        find_binary_activations(Of(lambda m, b: m.encoder(b.x), encoder=encoder()), (batch,), batch_size=4)


def test_callable_objects_and_those_of_bound_methods_are_put_back():
    class Average:
        def __init__(self):
            self.mean, self.calls = torch.zeros(()), 0

        def __call__(self, x):
            self.mean, self.calls = 0.9 * self.mean + 0.1 * x.detach().mean(), self.calls + 1
            return x - self.mean

    averages = [Average() for _ in range(3)]
    called = (averages[0], averages[1].__call__, functools.partial(averages[2]))
    model = Of(lambda m, x: m.encoder(called[0](called[1](called[2](x)))), encoder=encoder(), averages=called)
    assert tapped(model, torch.randn(8, 8)) == ["encoder.2"]
    assert [average.calls for average in averages] == [0, 0, 0]
    assert not any(average.mean for average in averages)


def test_modules_that_are_hidden_in_a_list_are_put_back():
    hidden = nn.Sequential(nn.Sequential(nn.Linear(8, 8), nn.BatchNorm1d(8)))
    model = Of(lambda m, x: m.encoder(m.hidden[0](x)), encoder=encoder(), hidden=[hidden])
    before = {name: tensor.clone() for name, tensor in hidden.state_dict().items()}
    assert tapped(model, torch.randn(8, 8)) == ["encoder.2"]
    assert all(torch.equal(before[name], tensor) for name, tensor in hidden.state_dict().items())


@pytest.mark.parametrize("product", [torch.linalg.matmul, lambda a, b: torch.chain_matmul(a, b)])
def test_products_of_other_names_are_products(product):
    model = Of(
        lambda m, x: product(m.encoder(x), m.weight), encoder=encoder()[:3], weight=nn.Parameter(torch.randn(16, 4))
    )
    assert tapped(model, torch.randn(4, 8)) == ["encoder.2"]


def test_a_forward_may_catch_that_a_gradient_cannot_be_taken():
    def forward(m, x):
        x = x.detach().requires_grad_()
        try:
            (grad,) = torch.autograd.grad(m.first(x).tanh().sum(), x)
        except Exception:
            return x.sum()
        return m.encoder(x + grad)

    assert tapped(Of(forward, first=nn.Linear(8, 1), encoder=encoder()), torch.randn(8, 8)) == ["encoder.2"]


def test_a_module_that_raises_within_the_forward_ends_there():
    class Stop(Exception):
        pass

    def stop(m, x):
        raise Stop

    def forward(m, x):
        x = m.first(x)
        try:
            m.stop(x)
        except Stop:
            x = x + 1
        return F.linear(Sign.apply(m.norm(x)), m.weight)

    parts = {"first": nn.Linear(8, 8), "norm": nn.LayerNorm(8), "weight": nn.Parameter(torch.randn(4, 8))}
    assert tapped(Of(forward, stop=Of(stop), **parts), torch.randn(8, 8)) == ["(model)"]


def test_an_example_that_the_forward_overwrites_is_put_back():
    for samples in (4, 8):
        model = Of(lambda m, x: m.encoder(x.sub_(1).div_(2)), encoder=encoder())
        example = torch.randn(samples, 8)
        expected = example.clone()
        assert tapped(model, example) == ["encoder.2"]
        assert torch.equal(example, expected)


@pytest.mark.parametrize(
    "overwrite",
    [
        lambda m, x: F.relu(x, inplace=True),
        lambda m, x: F.dropout(x, inplace=True),
        lambda m, x: setattr(x, "data", x.sign()) or x,
        lambda m, x: x.requires_grad_(),
        lambda m, x: x.unsqueeze_(1).squeeze(1),
        lambda m, x: x.mul_(m.encoder[0].weight[0]),
        lambda m, x: F.hardtanh(m.encoder[0].weight.data, -0.01, 0.01, inplace=True) is None or x,
    ],
)
def test_what_is_written_by_a_keyword_or_an_attribute_is_put_back(overwrite):
    model = Of(lambda m, x: m.encoder(overwrite(m, x)), encoder=encoder())
    example = torch.randn(4, 8)
    storage, before = example.data_ptr(), [t.clone() for t in (example, *model.parameters())]
    tapped(model, example)
    assert all(map(torch.equal, before, (example, *model.parameters())))
    assert example.data_ptr() == storage and not example.requires_grad


def test_a_part_of_a_batch_may_be_overwritten_with_what_is_trained():
    model = Of(lambda m, x: m.encoder(x.add_(m.encoder[0].weight[0])), encoder=encoder())
    batch = torch.randn(6, 8)
    before = batch.clone()
    assert tapped(model, batch[:4]) == ["encoder.2"]
    assert torch.equal(batch, before)


def test_a_long_list_of_the_model_is_put_back_and_one_deeper_is_not_looked_into():
    def forward(m, x):
        m.bank[0].append(1)
        m.trainer.data["train"][0].append(1)
        return m.encoder(x)

    long = lambda: [[] for _ in range(5000)]  # noqa: E731
    model = Of(forward, encoder=encoder(), bank=long(), trainer=types.SimpleNamespace(data={"train": long()}))
    assert tapped(model, torch.randn(8, 8)) == ["encoder.2"]
    assert model.bank[0] == [] and model.trainer.data["train"][0]


def test_hooks_on_the_model_may_compute():
    model = encoder()
    model.register_forward_pre_hook(lambda module, args: (args[0] * 2,))
    model.register_forward_hook(lambda module, args, output: output * 2)
    assert tapped(model, torch.randn(8, 8)) == ["2"]


@pytest.mark.parametrize(
    "hidden",
    [lambda x: torch.where(x > 20, x, 0), lambda x: x * (x > 20).float(), lambda x: torch.where(x != x, x, 0 * x)],
)
def test_what_happens_to_be_all_zero_is_no_dead_sign(hidden):
    model = Of(
        lambda m, x: m.last(Sign.apply(m.norm(m.hidden(hidden(m.first(x)))))),
        first=nn.Linear(8, 16),
        hidden=nn.Linear(16, 16),
        norm=nn.BatchNorm1d(16),
        last=nn.Linear(16, 4),
    )
    with torch.no_grad():
        model.hidden.weight.zero_()
    assert tapped(model, torch.randn(8, 8)) == ["(model)"]


@pytest.mark.parametrize(
    "codes",
    [lambda x: torch.from_numpy(np.sign(x.detach().numpy())), lambda x: torch.stack([-x, x]).argmax(0).float()],
)
def test_the_latent_of_codes_made_outside_torch_does_not_contain_them(codes):
    parts = {name: nn.Linear(16, 16) for name in ("between", "one", "other")}

    def forward(m, x):
        m.latent = m.norm(m.first(x))
        between = m.between(m.latent)
        one, other = (codes(m.latent) + m.latent - m.latent.detach() for _ in range(2))
        return m.one(one) + m.other(other) + between

    model = Of(forward, first=nn.Linear(8, 16), norm=nn.BatchNorm1d(16), **parts)
    cmim = CMIM(model, torch.zeros(8, 8), num_positions=8)
    assert len(cmim.taps) == 1
    model(X8)
    captured = waiting(cmim)
    assert torch.equal(captured.pairs[0].rows[1], model.latent)


@pytest.mark.parametrize("gate", [lambda x: (x.abs() > 0.3).float(), lambda x: x.abs() > 0.3])
def test_codes_times_a_gate_of_their_size_have_three_values(gate):
    model = nn.Sequential(
        nn.Linear(8, 16), nn.BatchNorm1d(16), Of(lambda m, x: Sign.apply(x) * gate(x)), nn.Linear(16, 4)
    )
    assert list(reasons(model, X8).values()) == ["it has three values: its zeros are not only signs of zero"]


def shifted(x):
    b, moved = Sign.apply(x), torch.zeros_like(x)
    moved[:, :2, 1:], moved[:, 2:, :-1] = b[:, :2, :-1], b[:, 2:, 1:]
    return moved


def padded_by_hand(x):
    b = Sign.apply(x)
    padded = b.new_ones(*b.shape[:2], b.shape[2] + 2, b.shape[3] + 2)
    padded[:, :, 1:-1, 1:-1] = b
    return padded


def by_masks(x):
    codes = x.clone()
    codes[codes >= 0] = 1
    codes[codes < 0] = -1
    return x + (codes - x).detach()


def by_fills(x):
    codes = x.clone()
    codes.masked_fill_(codes >= 0, 1).masked_fill_(codes < 0, -1)
    return x + (codes - x).detach()


def in_the_graph(x):
    codes = x.clone()
    codes[codes >= 0] = 1
    codes[codes < 0] = -1
    return codes


@pytest.mark.parametrize("written", [shifted, padded_by_hand, by_masks, by_fills, in_the_graph])
def test_codes_that_are_written_into_a_tensor_have_the_latent_that_was_signed(written):
    def forward(m, x):
        m.latent = m.norm(m.stem(x))
        return m.last(written(m.latent))

    parts = {"stem": nn.Conv2d(3, 8, 3, padding=1), "norm": nn.BatchNorm2d(8), "last": nn.Conv2d(8, 4, 1)}
    model = Of(forward, **parts)
    cmim = CMIM(model, X)
    assert [tap.channels for tap in cmim.taps] == [8]
    model(X)
    captured = waiting(cmim)
    binary, latent = captured.pairs[0].sides
    assert torch.equal(binary, latent.sign())
    positions = model.latent.movedim(1, -1).reshape(-1, 8)
    assert torch.equal(positions[captured.pairs[0].index], latent)


@pytest.mark.parametrize("scales", [(1.0, 1.0), (1.0, 1.0, 1.0)])
def test_a_sum_of_codes_of_one_scale_has_a_tap_for_each(scales):
    model = Of(
        lambda m, x: m.last(sum(scale * Sign.apply(m.norm(m.stem(x)) - i / 2) for i, scale in enumerate(scales))),
        stem=nn.Conv2d(3, 8, 3, padding=1),
        norm=nn.BatchNorm2d(8),
        last=nn.Conv2d(8, 4, 1),
    )
    assert len(tapped(model, X)) == len(scales)


@pytest.mark.parametrize("padding", [0, 4])
def test_tokens_of_two_kinds_show_all_taps(padding):
    class PlainSign(Sign):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            return x.sign()

    binary = [Of(lambda m, x: PlainSign.apply(x)) for _ in range(3)]
    layers = [layer for b in binary for layer in (nn.LayerNorm(16), b, nn.Linear(16, 16))]
    ids = torch.ones(4, 12, dtype=torch.long)
    ids[:, 12 - padding :] = 0
    assert tapped(nn.Sequential(nn.Embedding(30, 16), *layers), ids) == ["2", "5", "8"]


def test_a_latent_of_another_rank_is_named():
    class Reshaped(Sign):
        @staticmethod
        def forward(ctx, x, shape):
            return x.sign().view(shape)

        @staticmethod
        def backward(ctx, g):
            return g.flatten(0, 1).flatten(1), None

    def forward(m, x):
        return m.last(Reshaped.apply(m.first(x).flatten(0, 1).flatten(1), (len(x), 8, 6, 6)))

    first = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8))
    model = Of(forward, first=first, last=nn.Conv2d(8, 4, 3))
    assert list(reasons(model, torch.randn(4, 3, 6, 6)).values()) == [
        "its latent has another rank: (32, 36) for (4, 8, 6, 6)"
    ]


def test_of_two_compared_tensors_the_latent_is_the_one_that_the_codes_follow():
    def forward(m, x):
        x, threshold = m.norm(m.first(x)), 0.01 * m.norm(m.other(x))
        return m.last(torch.where(threshold < x, 1.0, -1.0) + x - x.detach())

    layers = {"first": nn.Conv2d(3, 8, 1), "other": nn.Conv2d(3, 8, 1)}
    model = Of(forward, norm=nn.BatchNorm2d(8), last=nn.Conv2d(8, 4, 3), **layers)
    cmim = CMIM(model, X)
    model(X)
    captured = waiting(cmim)
    binary, latent = captured.pairs[0].sides
    assert ((binary > 0) == (latent > 0)).float().mean() > 0.95


def test_a_reentrant_checkpoint_that_ends_with_its_product_is_no_function_of_both():
    body = nn.Sequential(nn.BatchNorm2d(8), Binary(), nn.Conv2d(8, 4, 1))
    model = Of(lambda m, x: checkpoint(m.body, m.first(x), use_reentrant=True), first=nn.Conv2d(3, 8, 1), body=body)
    (reason,) = reasons(model, X).values()
    assert reason.startswith("it is made without a gradient")


def test_a_sign_and_its_product_in_one_function_are_named():
    class BinaryDense(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight):
            ctx.save_for_backward(x, weight)
            return x.sign() @ weight.sign().t()

        @staticmethod
        def backward(ctx, g):
            x, weight = ctx.saved_tensors
            return g @ weight.sign() * (x.abs() < 1), g.t() @ x.sign()

    model = Of(
        lambda m, x: BinaryDense.apply(m.norm(m.first(x)), m.weight),
        first=nn.Linear(8, 16),
        norm=nn.BatchNorm1d(16),
        weight=nn.Parameter(torch.randn(4, 16)),
    )
    (reason,) = reasons(model, X8).values()
    assert reason == "its sign and its product are in one autograd.Function: take the sign in a Function of its own"


def test_a_product_without_gradients_beside_the_trained_one_is_no_function_of_both():
    def forward(m, x):
        x = m.first(x)
        with torch.no_grad():
            target = F.linear(Sign.apply(x), m.last.weight)
        return m.last(x) - target

    (reason,) = reasons(Of(forward, first=encoder()[:2], last=nn.Linear(16, 4)), X8).values()
    assert reason.startswith("it is made without a gradient")


def test_a_call_without_gradients_is_not_listed_if_another_is_tapped():
    def forward(m, x):
        x = m.first(x)
        with torch.no_grad():
            target = m.rest(x)
        return m.rest(x) - target

    model = Of(forward, first=nn.Linear(8, 8), rest=encoder())
    assert [f.reason for f in find_binary_activations(model, X8)] == [None]


def test_codes_made_outside_torch_may_be_rare():
    def codes(x):
        x = x.detach().numpy()
        return torch.from_numpy((x == x.max()).astype("float32"))

    act = Of(lambda m, x: codes(x) + x - x.detach())
    model = nn.Sequential(nn.Conv2d(3, 8, 1), Of(lambda m, x: x + m.conv(x), conv=nn.Conv2d(8, 8, 1)), act)
    assert tapped(nn.Sequential(model, nn.Conv2d(8, 4, 1)), torch.randn(4, 3, 40, 40)) == ["0.2"]


def test_an_addend_that_is_zero_at_first_is_no_part_of_the_codes():
    def forward(m, x):
        codes = m.act(m.first(x))
        return m.last(codes + m.alpha * m.layer(x))

    layers = {"act": Binary(), "layer": nn.Linear(8, 16), "last": nn.Linear(16, 4)}
    model = Of(forward, first=encoder()[:2], alpha=nn.Parameter(torch.zeros(1)), **layers)
    (found,) = find_binary_activations(model, X8)
    assert (found.reason, found.binary.module) == (None, "act")


@pytest.mark.parametrize("nested", [True, False])
def test_codes_that_no_torch_function_returns_belong_to_the_forward_that_hands_them_on(nested):
    class Kernel(Sign):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            with torch._C.DisableTorchFunction():  # as in C++
                return x.sign()

    def forward(m, x):
        x = m.first(x)
        side = m.side(x)
        return m.last(Kernel.apply(x)) + m.other(Kernel.apply(x)) + m.last(side)

    layers = {"side": nn.Linear(16, 16), "last": nn.Linear(16, 4), "other": nn.Linear(16, 4)}
    model = Of(forward, first=encoder()[:2], **layers)
    assert tapped(nn.Sequential(model) if nested else model, X8) == ["0" if nested else "(model)"]


def test_codes_made_outside_torch_may_have_a_threshold_for_each_channel():
    class Kernel(Sign):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            high = x.numpy() > np.linspace(-1, 1, 8)[:, None, None]
            return torch.from_numpy(np.where(high, 1, -1).astype("float32"))

    model = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), Of(lambda m, x: Kernel.apply(x)), nn.Conv2d(8, 4, 1))
    (found,) = find_binary_activations(model, X)
    assert found.tapped, found.reason


def over_tokens(function, **more):
    return Of(function, first=nn.Linear(8, 16), norm=nn.LayerNorm(16), last=BinaryLinear(16, 4), **more)


@pytest.mark.parametrize("samples, length", [(3, 3), (3, 4), (4, 4), (4, 5), (8, 5)])
def test_time_that_is_as_long_as_the_batch_is_still_not_the_batch(samples, length):
    model = over_tokens(lambda m, x: m.last(m.norm(m.first(x)).transpose(0, 1)))
    (found,) = find_binary_activations(model, torch.randn(samples, length, 8), batch_size=samples)
    assert found.tapped and found.mixed.startswith("the batch is not its first dimension")


@pytest.mark.parametrize("steps", [11, 12])
def test_time_before_the_batch_in_all_inputs_is_read_by_the_number_that_is_stated(steps):
    model = over_tokens(lambda m, x, padding: m.last(m.norm(m.first(x)) * (~padding).t().unsqueeze(-1) + 1e-3))
    padding = torch.zeros(4, steps, dtype=torch.bool)
    cmim = CMIM(model, (torch.randn(steps, 4, 8), padding), batch_size=4)
    assert cmim.taps[0].mixed
    for samples in (4, 3):
        model(torch.randn(steps, samples, 8), padding[:samples])
        assert cmim(model).isfinite()
    model(torch.randn(steps, 4, 8), padding)
    with pytest.raises(CMIMError, match="Labels are of samples, which these taps mix"):
        cmim(model, torch.arange(4))
    model(torch.randn(steps, 4, 8), padding)
    with pytest.warns(CMIMWarning, match="The mask is not applied"):
        cmim(model, mask=~padding)


def some_rows(m, x):
    """As experts, or as the boxes of a detector: another number of rows in each pass."""
    x = m.norm(m.first(x)).flatten(0, 1)
    return m.last(x[m.first.weight.new_tensor(range(len(x))).long()[: len(x) * 2 // 3 - 1]])


NO_ORDER_OF_SAMPLES = {
    "time before the batch": (lambda m, x: m.last(m.norm(m.first(x)).transpose(0, 1)), "the batch is not its first"),
    "time, folded": (lambda m, x: m.last(m.norm(m.first(x)).transpose(0, 1).flatten(0, 1)), "the rows of one sample"),
    "joined views": (lambda m, x: m.last(m.norm(m.first(torch.cat([x, x.roll(1, -1)])))), "the rows of one sample"),
    "some rows": (some_rows, "the batch is not its first"),
}


@pytest.mark.parametrize("case", NO_ORDER_OF_SAMPLES)
def test_positions_are_contrasted_where_the_rows_do_not_follow_the_samples(case):
    function, why = NO_ORDER_OF_SAMPLES[case]
    model = over_tokens(function)
    cmim = CMIM(model, torch.randn(4, 7, 8), num_positions=16)
    assert cmim.taps[0].mixed.startswith(why) and str(cmim).endswith("a_B against its latent, samples mixed")
    for samples in (4, 9, 3):
        model(torch.randn(samples, 7, 8))
        captured = waiting(cmim)
        binary, latent = captured.pairs[0].sides
        assert len(binary) == min(16, captured.pairs[0].total) and torch.equal(binary, Sign.apply(latent))
        cmim(model).backward()
        assert cmim.heads.weights.grad.any()
    model(torch.randn(4, 7, 8))
    with pytest.raises(CMIMError, match="Labels are of samples, which these taps mix"):
        cmim(model, torch.arange(4))
    for wrong in ([1] * 4, torch.ones(4, dtype=torch.bool), torch.ones(4, 7)):
        model(torch.randn(4, 7, 8))
        with pytest.raises(CMIMError, match="mask must be"):
            cmim(model, mask=wrong)
    model(torch.randn(4, 7, 8))
    with pytest.warns(CMIMWarning, match="The mask is not applied to these taps, which mix the samples"):
        cmim(model, mask=torch.ones(4, 7, dtype=torch.bool))
    cmim.remove()
    with pytest.raises(CMIMError, match=why):
        CMIM(model, torch.randn(4, 7, 8), instances="image")


def test_labels_are_refused_at_once_where_a_tap_that_mixes_the_samples_has_its_turn_later():
    blocks = [nn.Sequential(nn.BatchNorm2d(3), Binary(), nn.Conv2d(3, 3, 1)) for _ in range(2)]
    model = nn.Sequential(nn.Conv2d(3, 3, 1), *blocks)
    joined = Of(lambda m, x: m.last(m.norm(torch.cat([m.first(x)] * 2))), first=model, norm=nn.BatchNorm2d(3))
    joined.last = BinaryConv(3, 3, 1)
    cmim = CMIM(joined, torch.randn(4, 3, 8, 8), taps_per_step=1)
    assert [bool(tap.mixed) for tap in cmim.taps] == [False, False, True]
    joined(torch.randn(4, 3, 8, 8))
    with pytest.raises(CMIMError, match="Labels are of samples, which these taps mix"):
        cmim(joined, torch.arange(4))


@pytest.mark.parametrize(
    "function",
    [
        lambda m, x: (m.last.weight @ Sign.apply(m.norm(m.first(x)).t())).t(),
        lambda m, x: m.last(m.norm(m.first(x - x.mean()).mean(0, keepdim=True))),
    ],
    ids=["channels first", "mean over the batch"],
)
def test_what_has_no_position_of_its_own_for_each_sample_is_refused(function):
    (reason,) = reasons(over_tokens(function), torch.randn(6, 8)).values()
    assert reason.startswith("the batch is not its first dimension")


@pytest.mark.parametrize(
    "scaled, samples",
    [
        (lambda m, x: m.norm(Sign.apply(x)), 4),
        (lambda m, x: Sign.apply(x) * m.scale[None] + m.shift[None], 4),
        (lambda m, x: Sign.apply(x) * m.scale[None] + m.shift[None], 64),
        (lambda m, x: x + (x.sign() * x.abs().mean(0, keepdim=True) - x).detach(), 4),
    ],
)
def test_vectors_whose_two_values_differ_by_channel_are_tapped(scaled, samples):
    scale, shift = nn.Parameter(0.5 + torch.rand(32)), nn.Parameter(torch.rand(32))
    of = Of(scaled, norm=nn.BatchNorm1d(32), scale=scale, shift=shift)
    model = nn.Sequential(nn.Linear(8, 32), nn.BatchNorm1d(32), of, nn.Linear(32, 4))
    assert tapped(model, torch.randn(samples, 8)) == ["2"]


@pytest.mark.parametrize("binarize, samples", [(Sign.apply, 32), (lambda x: x + (x.sign() - x).detach(), 4)])
def test_a_latent_that_has_two_values_in_the_example_is_one(binarize, samples):
    def forward(m, x, labels):
        return m.last(torch.cat([Sign.apply(m.norm(m.first(x))), binarize(m.table(labels))], 1))

    parts = {"first": nn.Linear(8, 16), "norm": nn.LayerNorm(16), "table": nn.Embedding(5, 16)}
    model = Of(forward, last=nn.Linear(32, 4), **parts)
    labels = torch.tensor([0, 1]).repeat(samples // 2)
    assert len(tapped(model, (torch.randn(samples, 8), labels))) == 2


@pytest.mark.parametrize("convert", [torch.jit.script, lambda module: torch.jit.trace(module, X[:, [0] * 8])])
def test_a_part_in_torchscript_is_put_back(convert):
    model = nn.Sequential(nn.Conv2d(3, 8, 1), convert(nn.BatchNorm2d(8)), BinaryConv(8, 8, 1)).eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert tapped(model, X) == ["2"]
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())
    assert not any(module.training for module in model.modules())


@pytest.mark.parametrize("change", [dict.pop, lambda batch, key: batch.setdefault(key + "s", batch[key] * 2)])
def test_a_forward_may_change_the_dictionary_of_its_input(change):
    model = Of(lambda m, batch: m.encoder(change(batch, "image")), encoder=encoder())
    example = ({"image": torch.randn(4, 8)},)
    for _ in range(2):
        assert tapped(model, example) == ["encoder.2"]
    assert list(example[0]) == ["image"]


@pytest.mark.parametrize("by_name", [True, False])
def test_query_key_and_value_of_an_attention_may_be_codes(by_name):
    def forward(m, x):
        q, k, v = (Sign.apply(part) for part in m.norm(m.first(x)).chunk(3, -1))
        attend = F.scaled_dot_product_attention
        return m.last(attend(query=q, key=k, value=v) if by_name else attend(q, k, v))

    parts = {"first": nn.Linear(8, 48), "norm": nn.LayerNorm(48), "last": nn.Linear(16, 4)}
    assert len(tapped(Of(forward, **parts), torch.randn(4, 6, 8))) == 3


def test_masks_and_addends_are_no_operands():
    def forward(m, x, mask):
        x = Sign.apply(m.norm(m.first(x)))
        return m.last(F.scaled_dot_product_attention(x, x + 1, x - 1, attn_mask=mask[:, None].bool()))

    parts = {"first": nn.Linear(8, 16), "norm": nn.LayerNorm(16), "last": nn.Linear(16, 4)}
    found = find_binary_activations(Of(forward, **parts), (torch.randn(4, 6, 8), torch.tensor([[1] * 3 + [0] * 3] * 4)))
    assert [f.reason for f in found] == [None]
    added = Of(lambda m, x: torch.baddbmm(Sign.apply(m.first(x)), x, x.mT @ x), first=nn.Linear(8, 8))
    assert not tapped(added, torch.randn(4, 6, 8))


@pytest.mark.parametrize("samples", [2, 8])
def test_windows_of_a_model_that_takes_one_number_of_samples_are_tapped(samples):
    def forward(m, x):
        x = m.first(x.view(samples, 6, 8)).unflatten(1, (2, 3)).flatten(0, 1)
        return m.last(Sign.apply(m.norm(x))).unflatten(0, (samples, 2)).mean((1, 2))

    model = Of(forward, first=nn.Linear(8, 16), norm=nn.LayerNorm(16), last=nn.Linear(16, 4))
    found = find_binary_activations(model, torch.randn(samples, 6, 8))
    assert [(f.tapped, bool(f.mixed)) for f in found] == [(True, samples == 2)], found


def test_a_deformable_convolution_is_a_product():
    ops = pytest.importorskip("torchvision.ops")
    parts = {"first": nn.Conv2d(3, 8, 1), "norm": nn.BatchNorm2d(8), "offset": nn.Conv2d(8, 18, 3, padding=1)}

    def forward(m, x):
        x = m.norm(m.first(x))
        return ops.deform_conv2d(Sign.apply(x), m.offset(x), m.weight, padding=1)

    assert tapped(Of(forward, weight=nn.Parameter(torch.randn(8, 8, 3, 3)), **parts), X) == ["(model)"]


def test_repeated_samples_do_not_hide_the_latent():
    model = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), Binary(), nn.Linear(16, 4))
    assert tapped(model, torch.randn(2, 8).repeat(2, 1)) == ["2"]


def test_codes_added_to_frozen_activations_are_no_codes():
    model = nn.Sequential(
        nn.Linear(8, 16), nn.BatchNorm1d(16), Of(lambda m, x: Sign.apply(x + m.shift) + x), nn.Linear(16, 4)
    )
    model[2].shift = nn.Parameter(torch.zeros(16))
    model[:2].requires_grad_(False)
    assert tapped(model, X8) == []


def test_a_layer_that_takes_the_batch_for_time_hides_no_map():
    def forward(m, x):
        return m.layer(m.conv(x).permute(0, 3, 1, 2).flatten(2))[0]

    conv = nn.Sequential(nn.Conv2d(3, 8, 1), nn.BatchNorm2d(8), BinaryConv(8, 8, 1))
    (found,) = find_binary_activations(Of(forward, conv=conv, layer=nn.LSTM(64, 8)), torch.randn(4, 3, 8, 8))
    assert found.tapped and found.mixed is None


STRAIGHT = "one autograd.Function passes it straight to another: put a module between the two, as nn.Identity()"


@pytest.mark.parametrize("between, expected", [(nn.Identity(), None), (None, STRAIGHT)])
def test_codes_between_two_autograd_functions_need_a_module(between, expected):
    class Product(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight):
            ctx.save_for_backward(x, weight)
            return x.mm(weight.t())

        @staticmethod
        def backward(ctx, grad):
            x, weight = ctx.saved_tensors
            return grad.mm(weight), grad.t().mm(x)

    def forward(m, x):
        codes = Sign.apply(m.first(x))
        return Product.apply(codes if m.between is None else m.between(codes), m.weight)

    first = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16))
    model = Of(forward, first=first, between=between, weight=nn.Parameter(torch.randn(4, 16)))
    (found,) = find_binary_activations(model, X8)
    assert found.reason == expected


@pytest.mark.parametrize(
    "detached",
    [lambda x: Sign.apply(x).detach(), lambda x: x.sign().data, lambda x: F.pad(Sign.apply(x).detach(), (1, 1))],
)
def test_codes_that_were_cut_off_the_graph_are_made_without_a_gradient(detached):
    model = Of(
        lambda m, x: m.last(detached(m.norm(m.first(x)))),
        first=nn.Linear(8, 8),
        norm=nn.LayerNorm(8),
        last=nn.LazyLinear(4),
    )
    model(torch.randn(4, 8))
    assert list(reasons(model, torch.randn(4, 8)).values()) == [
        "it is made without a gradient: under no_grad, detached, in an autograd.Function, or in a reentrant checkpoint"
    ]


@pytest.mark.parametrize("spatial", [True, False])
def test_a_hard_gate_is_no_code(spatial):
    def forward(m, x):
        x = m.norm(m.first(x))
        p = m.gate(x if spatial else x.mean((2, 3), keepdim=True)).sigmoid()
        return m.last(Sign.apply(x) * ((p > 0.5).float() - p.detach() + p))

    layers = {"first": nn.Conv2d(3, 16, 3), "norm": nn.BatchNorm2d(16), "last": nn.Conv2d(16, 16, 3)}
    model = Of(forward, gate=nn.Conv2d(16, 1 if spatial else 16, 1), **layers)
    found = find_binary_activations(model, torch.randn(4, 3, 12, 12))
    assert [(f.tapped, f.channels) for f in found] == [(True, 16)]


@pytest.mark.parametrize(
    "binarize",
    [lambda t, x: torch.copysign(t.expand_as(x), x), lambda t, x: torch.where(t.expand_as(x) < x, 1.0, -1.0)],
)
def test_a_scale_or_threshold_of_the_size_of_the_latent_is_not_the_latent(binarize):
    def forward(m, x):
        x, clipped = m.norm(m.first(x)), m.norm(m.first(x)).clamp(-1, 1)
        return m.last(binarize(m.t, x).detach() - clipped.detach() + clipped)

    parts = {"first": nn.Conv2d(3, 16, 3), "norm": nn.BatchNorm2d(16), "last": nn.Conv2d(16, 16, 3)}
    model = Of(forward, t=nn.Parameter(0.1 + torch.rand(1, 16, 1, 1)), **parts)
    cmim = CMIM(model, torch.randn(4, 3, 12, 12))
    model(torch.randn(4, 3, 12, 12))
    captured = waiting(cmim)
    latent = captured.pairs[0].rows[1]
    assert not (latent == latent[0]).all()


@pytest.mark.parametrize("shift", [lambda b: b, lambda b: b.view(1, 1, -1)], ids=["parameter", "view"])
def test_trained_shifts_of_one_latent_make_taps_of_their_own(shift):
    def forward(m, x):
        x = m.norm(m.first(x))
        return sum(m.layers[i](Sign.apply(x + shift(m.shifts[i]))) for i in range(3))

    parts = {
        "first": nn.Linear(5, 16),
        "norm": nn.LayerNorm(16),
        "layers": nn.ModuleList(nn.Linear(16, 8) for _ in range(3)),
    }
    model = Of(forward, shifts=nn.ParameterList(torch.zeros(16) for _ in range(3)), **parts)
    assert len(tapped(model, torch.randn(4, 9, 5))) == 3


def test_what_points_into_the_batch_stays_within_it():
    def forward(m, x, edges):
        largest.append((len(x), int(edges.max())))
        return m.last(torch.zeros(len(x), 8).index_add(0, edges[1], m.encoder(x)[edges[0]]))

    largest = []
    model = Of(forward, encoder=encoder(), last=nn.Linear(8, 2))
    assert tapped(model, (torch.randn(30, 8), torch.randint(30, (2, 64)))) == ["encoder.2"]
    assert all(last < nodes for nodes, last in largest)


def test_regions_keep_the_numbers_of_their_images():
    def forward(m, images, regions):
        seen.append(regions[:, 0].clone())
        return m.net(images) + regions[:, 1:].mean()

    seen, regions = [], torch.cat([torch.arange(8.0).repeat(2)[:, None], 50 * torch.rand(16, 4)], 1)
    assert len(tapped(Of(forward, net=net()), (torch.randn(8, 3, 8, 8), regions))) == 2
    assert all(torch.equal(numbers, regions[:, 0]) for numbers in seen)


@pytest.mark.parametrize("mask", [torch.ones(6, 6).triu(1).bool(), torch.ones(6, 6, dtype=torch.uint16)])
def test_masks_of_any_type_beside_the_samples_are_taken(mask):
    model = Of(lambda m, x, mask: m.encoder(x).sum() + mask.sum(), encoder=encoder())
    assert tapped(model, (torch.randn(8, 8), mask)) == ["encoder.2"]


# -- examples of many samples, beside other inputs, and of several kinds of rows --------------------------------------


def experts(count=4):
    """Each sample goes to one expert, by a gate."""

    def forward(m, x):
        x = m.first(x)
        share, chosen = m.gate(x).softmax(-1).max(-1)
        y = torch.zeros_like(x)
        for i, expert in enumerate(m.experts):
            rows = (chosen == i).nonzero()[:, 0]
            if len(rows):
                y = y.index_add(0, rows, expert(x[rows]) * share[rows, None])
        return m.last(y)

    parts = {"first": nn.Linear(8, 16), "gate": nn.Linear(16, count), "last": nn.Linear(16, 4)}
    return Of(forward, experts=nn.ModuleList(BinaryLinear(16, 16) for _ in range(count)), **parts)


def test_experts_that_get_one_of_the_first_samples_are_tapped():
    torch.manual_seed(0)
    model, x = experts(), torch.randn(64, 8)
    used = model.gate(model.first(x)).argmax(-1).bincount(minlength=4)
    assert used.min() > 3
    assert tapped(model, x) == [f"experts.{i}" for i in range(4)]
    cmim = CMIM(model, x, taps_per_step=None)
    model(x)
    assert cmim(model) > 0


def test_codes_that_are_drawn_from_their_latent_are_tapped_however_few_they_are():
    def forward(m, x):
        p = torch.sigmoid(m.first(x))
        return m.last(torch.bernoulli(p.detach()) + p - p.detach())

    for seed in range(20):
        torch.manual_seed(seed)
        assert tapped(Of(forward, first=nn.Linear(64, 8), last=nn.Linear(8, 4)), torch.rand(4, 64)), seed


def test_codes_drawn_by_a_comparison_with_random_numbers_are_tapped():
    """At the start all probabilities are near one half, so that the codes tell little of them."""

    def forward(m, x):
        p = torch.sigmoid(m.first(x))
        return m.last((torch.rand_like(p) < p).float() + p - p.detach())

    for seed in range(5):
        torch.manual_seed(seed)
        first = nn.Linear(64, 8)
        nn.init.normal_(first.weight, std=0.01)
        assert tapped(Of(forward, first=first, last=nn.Linear(8, 4)), torch.rand(64, 64)), seed


@pytest.mark.parametrize(
    "binarize",
    [
        lambda x: x + ((x / 0.8).round().clamp(0, 1) - x).detach(),
        lambda x: ((x / 0.8).round() - x / 0.8).detach().add(x / 0.8).clamp(0, 1) * 0.8,
        lambda x: (x / 0.8).round().clamp(0, 1),
    ],
    ids=["whole", "round", "bare"],
)
def test_the_latent_of_what_is_rounded_and_then_clamped_is_not_the_rounded_one(binarize):
    model = wide(Of(lambda m, x: binarize(x)))
    cmim = CMIM(model, X)
    model(X)
    captured = waiting(cmim)
    assert len(captured.pairs[0].rows[1].unique()) > 100


@pytest.mark.parametrize(
    "estimate",
    [
        lambda x: x.sign() + (x - x.detach()),
        lambda x: x - x.detach() + x.sign(),
        lambda x: 0.7 * (x.sign() + (x.tanh() - x.tanh().detach())),
    ],
)
def test_of_a_sign_and_its_estimator_the_sum_is_tapped(estimate):
    """The bare sign has a gradient of zero."""
    model = wide(Of(lambda m, x: estimate(x)))
    cmim = CMIM(model, X)
    model(X)
    captured = waiting(cmim)
    captured.pairs[0].rows[0].square().sum().backward()
    assert model[0].weight.grad.any()


def test_the_first_hidden_state_of_a_packed_sequence_may_be_codes():
    def forward(m, x):
        state = Sign.apply(m.norm(m.first(x[:, 0])))[None]
        packed = nn.utils.rnn.pack_padded_sequence(x, [5] * len(x), batch_first=True)
        return m.rnn(packed, state)[1]

    layers = {"first": nn.Linear(4, 16), "norm": nn.BatchNorm1d(16), "rnn": nn.GRU(4, 16, batch_first=True)}
    assert tapped(Of(forward, **layers), torch.randn(6, 5, 4)) == ["(model)"]


def test_noise_for_weights_of_zero_does_not_stay_in_the_cache_of_autocast():
    """As of a LoRA, or of a last layer, that starts at zero."""
    model = net()
    nn.init.zeros_(model[-1].weight)
    with torch.autocast("cpu", torch.bfloat16):
        find_binary_activations(model, X)
        assert torch.equal(model(X), model[-1].bias.bfloat16().expand(6, 4))


def test_a_multiple_of_the_identity_minus_a_flat_attention_map_is_no_code():
    """As in Nystromformer: at the start the map is so flat that the difference looks two-valued."""

    def forward(m, x):
        scores = (m.q(x) @ m.k(x).mT * 1e-3).softmax(-1)
        product = scores @ scores.mT
        return product @ (15 * torch.eye(16) - product @ (7 * torch.eye(16) - product)) @ x

    model = Of(forward, q=nn.Linear(16, 16), k=nn.Linear(16, 16))
    assert set(reasons(model, torch.randn(4, 16, 16)).values()) == {"it is one-hot: a choice, not a code"}


def test_sparse_codes_are_not_one_hot_by_chance():
    """In four samples each may have a single one."""

    def forward(m, x):
        h = m.first(x) - 0.6
        return m.last(h.clamp(0, 1) + ((h > 0).float() - h.clamp(0, 1)).detach())

    for seed in range(30):
        torch.manual_seed(seed)
        assert tapped(Of(forward, first=nn.Linear(20, 3), last=nn.Linear(3, 4)), torch.randn(64, 20)), seed


@pytest.mark.parametrize("value", [torch.zeros, torch.randn])
def test_images_beside_a_map_of_labels_may_be_zeros(value):
    def forward(m, images, labels):
        seen.append(bool(images.any()))
        x = m.c(m.b(m.a(images)))
        return F.cross_entropy(x, labels), x

    seen = []

    model = Of(forward, a=nn.Conv2d(3, 8, 3, padding=1), b=nn.BatchNorm2d(8), c=BinaryConv(8, 5, 3, padding=1))
    assert tapped(model, {"images": value(4, 3, 8, 8), "labels": torch.zeros(4, 8, 8, dtype=torch.long)}) == ["c"]
    assert any(seen)


@pytest.mark.parametrize("padded", [0, 3])
def test_a_mask_beside_token_ids_stays(padded):
    def forward(m, ids, mask):
        seen.append(mask)
        return m.text(ids)

    seen, mask = [], torch.ones(9)
    mask[9 - padded :] = 0
    assert tapped(Of(forward, text=Text()), (torch.randint(20, (4, 9)), mask.expand(4, 9))) == ["text.b"]
    assert all((given == mask).all() for given in seen)


def test_boxes_beside_a_list_of_images_are_not_shuffled():
    """As torchvision's detectors take them, which refuse boxes of no height."""

    def forward(m, images, targets):
        assert all((t["boxes"][:, 2:] > t["boxes"][:, :2]).all() for t in targets)
        seen.add(float(images[0].sum()))
        rows = torch.stack(images).flatten(2).mT.flatten(0, 1)
        return m.b(m.a(rows[rows[:, 0] > rows[:, 1]]))  # some of them, as regions that are likely

    seen = set()
    targets = [{"boxes": torch.tensor([[5.0, 5, 30, 30], [10, 20, 60, 60]])} for _ in range(4)]
    model, images = Of(forward, a=nn.Linear(3, 16), b=BinaryLinear(16, 4)), [torch.randn(3, 6, 6) for _ in range(4)]
    found = find_binary_activations(model, (images, targets), batch_size=4)
    assert [(f.name, f.tapped, bool(f.mixed)) for f in found] == [("b", True, True)]
    assert len(seen) > 1


@pytest.mark.parametrize("batch_size", [None, 30, 5])
def test_nodes_and_graphs_are_both_tapped(batch_size):
    def forward(m, x, edges, graph):
        x = m.last(Sign.apply(m.norm(m.first(x))))
        x = x.index_add(0, edges[1], x[edges[0]])
        return m.head(Sign.apply(m.norm(x.new_zeros(5, 16).index_add(0, graph, x))))

    parts = {"first": nn.Linear(8, 16), "norm": nn.LayerNorm(16), "last": nn.Linear(16, 16), "head": nn.Linear(16, 3)}
    inputs = torch.randn(30, 8), torch.randint(0, 30, (2, 40)), torch.arange(5).repeat_interleave(6)
    found = find_binary_activations(Of(forward, **parts), inputs, batch_size=batch_size)
    assert [(f.tapped, f.channels) for f in found] == [(True, 16)] * 2, found


# -- what is binarized, and where it goes ------------------------------------------------------------------------------


def test_each_binarization_of_an_input_of_the_network_is_called_that():
    model = Of(lambda m, a, b: m.first(a) + m.short(b), first=BinaryConv(3, 8, 3), short=BinaryConv(3, 8, 3))
    assert [reason.split(" that")[0] for reason in reasons(model, (X, X)).values()] == ["it is the network's input"] * 2


@pytest.mark.parametrize("cell", [nn.RNNCell, nn.GRUCell])
def test_a_binary_hidden_state_is_tapped_step_by_step(cell):
    def forward(m, x):
        state = x.new_zeros(len(x), 16)
        for step in x.unbind(1):
            state = Sign.apply(m.cell(step, state))
        return m.last(state)

    assert len(tapped(Of(forward, cell=cell(6, 16), last=nn.Linear(16, 3)), torch.zeros(4, 5, 6))) == 5


def test_codes_of_which_some_are_set_to_zero_are_tapped():
    def forward(m, x):
        kept = torch.arange(x.shape[1]) < x.shape[1] - 2
        return m.last(torch.where(kept[:, None], Sign.apply(m.norm(m.first(x))), 0.0))

    parts = {"first": nn.Linear(8, 16), "norm": nn.LayerNorm(16), "last": nn.Linear(16, 4)}
    assert tapped(Of(forward, **parts), torch.zeros(4, 9, 8)) == ["(model)"]


@pytest.mark.skipif(not hasattr(F, "grouped_mm"), reason="not in this release")
def test_a_grouped_product_is_a_product():
    def forward(m, x):
        codes = Sign.apply(m.norm(m.first(x))).to(torch.bfloat16)
        ends = torch.tensor([len(x) // 2, len(x)], dtype=torch.int32)
        return F.grouped_mm(codes, m.weight.to(torch.bfloat16), offs=ends)

    parts = {"first": nn.Linear(8, 16), "norm": nn.LayerNorm(16), "weight": nn.Parameter(torch.randn(2, 16, 8))}
    assert [f.channels for f in find_binary_activations(Of(forward, **parts), torch.randn(4, 8)) if f.tapped] == [16]


@pytest.mark.parametrize("draw", [random.random, lambda: np.random.rand(), lambda: torch.rand(()).item()])  # noqa: NPY002
def test_a_layer_that_the_first_passes_skip_by_chance_is_found(draw):
    """The passes call the same modules at first: that numbers were drawn says that there may be more."""

    def forward(m, x):
        x = m.first(x)
        return m.last(m.norm(m.rare(x)) if draw() < 0.43 else x)

    parts = {"first": nn.Linear(8, 16), "norm": nn.LayerNorm(16), "last": nn.Linear(16, 4)}
    assert tapped(Of(forward, rare=BinaryLinear(16, 16), **parts), torch.randn(4, 8)) == ["rare"]


def test_noise_does_not_hide_which_rows_are_of_one_sample():
    """Of two equal samples the windows are alike, for both get the same noise."""

    def forward(m, x):
        x = m.first(x).unflatten(1, (2, 3)).flatten(0, 1)
        x = m.last(Sign.apply(m.norm(x + 3 * torch.rand(x.shape))))
        return x.unflatten(0, (-1, 2)).mean((1, 2))

    parts = {"first": nn.Linear(8, 16), "norm": nn.LayerNorm(16), "last": nn.Linear(16, 4)}
    (found,) = find_binary_activations(Of(forward, **parts), torch.randn(8, 6, 8))
    assert found.tapped and found.mixed is None and found.layouts[0].windowed


def test_codes_that_are_handed_on_by_where_may_be_smaller_than_its_result():
    def forward(m, x):
        h = m.norm(m.first(x))
        codes = Sign.apply(h[:, 0])[:, None]
        return m.last(torch.where(h > 0, codes, -codes))

    parts = {"first": nn.Linear(8, 16), "norm": nn.LayerNorm(16), "last": nn.Linear(16, 4)}
    assert find_binary_activations(Of(forward, **parts), torch.randn(4, 9, 8))


@pytest.mark.parametrize("padded", [0, 3])
def test_a_mask_of_floats_beside_the_input_stays(padded):
    def forward(m, x, pad):
        seen.append(pad)
        return m.last(Sign.apply(m.norm(m.first(x).masked_fill(pad.bool()[..., None], 0))))

    parts = {"first": nn.Linear(8, 16), "norm": nn.LayerNorm(16), "last": nn.Linear(16, 4)}
    seen, pad = [], torch.zeros(9)
    pad[9 - padded :] = 1
    assert tapped(Of(forward, **parts), (torch.randn(4, 9, 8), pad.expand(4, 9))) == ["(model)"]
    assert all((given == pad).all() for given in seen)


def test_samples_that_are_last_are_no_channels():
    def forward(m, x):
        return m.last(Sign.apply(m.norm(m.first(x)).T)).mean(0)

    model = Of(forward, first=nn.Linear(8, 16), norm=nn.LayerNorm(16), last=nn.Linear(4, 3))
    (found,) = find_binary_activations(model, torch.randn(4, 8))
    assert not found.tapped


@pytest.mark.parametrize(
    "binarize",
    [
        Sign.apply,
        lambda x: (torch.where(x >= 0, 1.0, -1.0) - x).detach() + x,
        lambda x: (torch.where(x >= 0, 1.0, -1.0) - x.clamp(-1, 1)).detach() + x.clamp(-1, 1),
    ],
    ids=["function", "detach", "clipped"],
)
def test_the_sign_of_a_sum_of_codes_is_tapped_and_not_its_parts(binarize):
    model = Of(
        lambda m, x: m.last(m.sign(Sign.apply(m.a(x)) + Sign.apply(m.b(x)))),
        a=encoder()[:2],
        b=encoder()[:2],
        sign=Of(lambda m, x: binarize(x)),
        last=nn.Linear(16, 4),
    )
    (tap,) = find_binary_activations(model, X8)
    assert (tap.name, tap.reason) == ("sign", None)
    assert (tap.binary.kind, tap.latent.kind) == ("output", "input")


def test_codes_of_integers_are_told_from_what_the_clipped_estimator_clips():
    clipped = lambda x: (torch.where(x >= 0, 1.0, -1.0) - x.clamp(-1, 1)).detach() + x.clamp(-1, 1)  # noqa: E731
    model = Of(
        lambda m, x: m.last(m.sign(F.linear(Sign.apply(m.first(x)), Sign.apply(m.weight)))),
        first=encoder()[:2],
        weight=nn.Parameter(torch.randn(16, 16)),
        sign=Of(lambda m, x: clipped(x)),
        last=nn.Linear(16, 4),
    )
    tap = next(f for f in find_binary_activations(model, X8) if f.name == "sign")
    assert tap.tapped and tap.binary.kind == "output"


@pytest.mark.parametrize("channels", [8, 64])
def test_the_threshold_of_drawn_codes_is_not_their_latent(channels):
    class Draw(torch.autograd.Function):
        @staticmethod
        def forward(ctx, threshold, x):
            return torch.bernoulli(torch.sigmoid(4 * threshold + 4 * x)) * 2 - 1

        @staticmethod
        def backward(ctx, g):
            return g, g

    draw = Of(
        lambda m, x: Draw.apply(m.threshold.expand_as(x), x),
        threshold=nn.Parameter(torch.linspace(-0.3, 0.3, channels)),
    )
    model = nn.Sequential(nn.Linear(8, channels), nn.BatchNorm1d(channels), draw, nn.Linear(channels, 4))
    (tap,) = find_binary_activations(model, X8)
    assert tap.tapped and (tap.latent.module, tap.latent.kind) == ("2", "input")


def test_an_input_that_is_cropped_is_an_input():
    for crop in (slice(None), slice(1, -1), torch.randperm(8)):
        model = Of(
            lambda m, x, crop=crop: m.conv(Sign.apply(m.norm(x)[..., crop])),
            norm=nn.BatchNorm2d(3),
            conv=nn.Conv2d(3, 8, 3),
        )
        (found,) = find_binary_activations(model, X)
        assert "network's input" in found.reason


@pytest.mark.parametrize(
    "change",
    [
        lambda m, codes: codes * ((torch.rand_like(codes) > 0.1).float() * 2 - 1),
        lambda m, codes: torch.where(torch.rand_like(codes) < 0.1, -codes, codes),
        lambda m, codes: codes * m.scale,
        lambda m, codes: codes * torch.tanh(m.gate(codes)),
    ],
    ids=["bit errors by a product", "bit errors by where", "scale of both signs", "gate of both signs"],
)
def test_codes_that_change_sign_afterwards_are_tapped_where_they_were_made(change):
    model = Of(
        lambda m, x: m.last(change(m, m.sign(m.first(x)))),
        first=encoder()[:2],
        sign=Binary(),
        scale=nn.Parameter(torch.linspace(-1, 1, 16)),
        gate=nn.Linear(16, 1),
        last=nn.Linear(16, 4),
    )
    (tap,) = find_binary_activations(model, X8)
    assert (tap.name, tap.reason, tap.binary.kind) == ("sign", None, "output")


def test_two_samples_of_zeros_show_what_more_do():
    """Over two samples, batch normalization gives two values by itself."""
    layers = [nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), Binary(), nn.Conv2d(8, 8, 3), nn.Flatten()]
    for width in (288, 16):
        layers += [nn.Linear(width, 16), nn.BatchNorm1d(16), nn.Hardtanh(), Binary()]
    for seed in range(5):
        torch.manual_seed(seed)
        model = nn.Sequential(*copy.deepcopy(layers), nn.Linear(16, 4))
        assert tapped(model, torch.zeros(2, 3, 10, 10)) == ["2", "8", "12"]


def test_a_layer_within_an_autograd_function_is_a_layer():
    class Layer(torch.autograd.Function):
        @staticmethod
        def forward(ctx, x, weight):
            ctx.save_for_backward(x, weight)
            return x.sign() @ weight

        @staticmethod
        def backward(ctx, g):
            x, weight = ctx.saved_tensors
            return g @ weight.T, x.sign().T @ g

    def forward(m, x):
        return m.last(Sign.apply(m.norm(Layer.apply(x, m.weight))))

    model = Of(forward, norm=nn.BatchNorm1d(16), last=nn.Linear(16, 4), weight=nn.Parameter(torch.randn(8, 16)))
    assert tapped(model, X8) == ["(model)"]


def test_scales_that_the_first_batch_sets_up_are_not_those_of_zeros():
    def forward(m, x):
        x = m.first(x)
        if not m.scale:
            m.scale.copy_(x.detach().std())
        return m.encoder(x * m.scale)

    first = nn.Linear(8, 8, bias=False)
    assert tapped(Of(forward, first=first, scale=torch.tensor(0.0), encoder=encoder()), torch.zeros(4, 8)) == [
        "encoder.2"
    ]


class Graph:
    """As a torch_geometric Data, which is no mapping."""

    def __init__(self, **fields):
        self.fields = fields

    def keys(self):
        return list(self.fields)

    def __getattr__(self, key):
        if key == "fields" or key not in self.fields:
            raise AttributeError(key)
        return self.fields[key]

    def __getitem__(self, key):
        return self.fields[key]

    def __setitem__(self, key, value):
        self.fields = {**self.fields, key: value}


@pytest.mark.parametrize("batch", [Graph, UserDict])
def test_an_object_with_keys_is_varied_and_stays_of_its_type(batch):
    seen = set()

    def forward(m, graph):
        assert isinstance(graph, batch)
        seen.add(float(graph["x"][0, 0]))
        return m.encoder(graph["x"])

    example = batch(x=torch.randn(6, 8), edges=torch.zeros(2, 3, dtype=torch.long))
    assert tapped(Of(forward, encoder=encoder()), (example,)) == ["encoder.2"]
    assert len(seen) > 1


def test_a_model_that_loops_over_its_samples_has_no_tap_for_each():
    def forward(m, x):
        return torch.cat([m.last(Sign.apply(m.first(image[None]))) for image in x])

    model = Of(forward, first=nn.Conv2d(3, 8, 3), last=nn.Conv2d(8, 4, 3))
    found = reasons(model, X)
    assert len(found) == 7 and all("the batch is not its first dimension" in reason for reason in found.values())


@pytest.mark.parametrize("kind", [namedtuple("Projected", "queries keys"), types.SimpleNamespace])
def test_what_has_keys_may_be_no_mapping(kind):
    act = Of(lambda m, given, of: given.queries + given.keys)
    model = Of(
        lambda m, x: m.encoder(m.act(kind(queries=m.first(x), keys=m.first(-x)), dict)),
        first=nn.Linear(8, 16),
        act=act,
        encoder=encoder(16),
    )
    assert tapped(model, X8) == ["encoder.2"]


def test_the_names_within_a_wrapper_are_those_that_are_chosen_by():
    model = encoder()
    (found,) = find_binary_activations(nn.DataParallel(model), X8)
    assert [tap.name for tap in CMIM(model, X8, taps=[found.name]).taps] == ["2"]


def test_a_noise_level_for_each_sample_and_a_bias_with_minus_infinity_stay():
    def forward(m, x, level, bias):
        seen.append((level, bias))
        scores = (m.first(x) @ m.first(x).mT + bias).softmax(-1)
        return m.encoder(m.first(x) / level.log1p().sqrt()[:, None, None]), scores

    seen, level, bias = [], torch.full((4,), 0.5), torch.arange(25.0).view(1, 5, 5).repeat(4, 1, 1)
    bias[:, :, 4] = -math.inf
    model = Of(forward, first=nn.Linear(8, 16), encoder=encoder(16))
    assert tapped(model, (torch.randn(4, 5, 8), level, bias)) == ["encoder.2"]
    assert all((given == 0.5).all() and (b == bias[:1]).all() for given, b in seen)


def test_a_batch_by_keyword_is_read_where_an_input_is_positional_only():
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.encoder = encoder()

        def forward(self, scale, /, x):
            return self.encoder(x * scale)

    _, source = discover(Net(), (torch.tensor(2.0), X8))
    assert source.of((torch.tensor(2.0),), {"x": X8[:3]}) == 3


def test_a_sign_of_codes_has_the_latent_of_the_codes():
    def forward(m, x):
        m.latent = m.first(x)
        return m.last(Sign.apply(m.latent.detach().sign() + m.latent - m.latent.detach()))

    model = Of(forward, first=encoder()[:2], last=nn.Linear(16, 4))
    cmim = CMIM(model, X8, num_positions=8)
    model(X8)
    assert torch.equal(waiting(cmim).pairs[0].rows[1], model.latent)


def test_codes_may_be_written_by_out():
    class Written(Sign):
        @staticmethod
        def forward(ctx, x):
            ctx.save_for_backward(x)
            codes = torch.empty_like(x)
            torch.sign(x, out=codes)
            return codes

    assert tapped(nn.Sequential(*encoder()[:2], Of(lambda m, x: Written.apply(x)), nn.Linear(16, 4)), X8) == ["2"]


def test_weights_may_be_plain_tensors():
    weights = {name: torch.randn(shape, requires_grad=True) for name, shape in (("a", (8, 16)), ("b", (16, 4)))}
    assert tapped(Of(lambda m, x: Sign.apply(x @ m.a) @ m.b, **weights), X8) == ["(model)"]


def test_an_empty_tensor_beside_the_input_is_no_batch():
    model = Of(lambda m, x, boxes: m.net(x.flatten(0, 1)), net=net())
    assert tapped(model, (torch.randn(4, 3, 3, 8, 8), torch.zeros(0, 8))) == ["net.2", "net.4"]


def test_a_model_that_returns_its_latents_names_the_layers_that_they_come_from():
    def forward(m, x):
        query, key = m.query(x), m.key(x)
        return m.a(Sign.apply(query)) * m.b(Sign.apply(key)), query, key

    layers = {name: nn.Linear(8, 8) for name in ("query", "key", "a", "b")}
    assert tapped(Of(forward, **layers), X8) == ["(model): query", "(model): key"]


def test_points_that_are_picked_from_the_input_are_the_input():
    def forward(m, x):
        nearest = torch.cdist(x, x).topk(2, largest=False)[1]
        return m.last(Sign.apply(m.norm(x[nearest].mean(1))))

    (reason,) = reasons(Of(forward, norm=nn.BatchNorm1d(8), last=nn.Linear(8, 4)), X8).values()
    assert "network's input" in reason


def test_a_small_shift_from_the_input_may_be_added_to_scaled_codes():
    def forward(m, x):
        x = m.norm(m.first(x))
        shift = m.shift(x.mean((2, 3)))[..., None, None]
        return m.last(Sign.apply(x) * x.abs().mean(1, keepdim=True) + shift)

    layers = {"first": nn.Conv2d(3, 8, 1), "norm": nn.BatchNorm2d(8), "shift": nn.Linear(8, 8)}
    assert tapped(Of(forward, last=nn.Conv2d(8, 4, 1), **layers), X) == ["(model)"]


def test_lazy_buffers_are_filled_in_by_the_dry_run():
    model = nn.Sequential(nn.Conv2d(3, 8, 1), nn.LazyBatchNorm2d(affine=False), Binary(), nn.Conv2d(8, 4, 1))
    assert tapped(model, X) == ["2"]


def test_windows_of_a_model_that_takes_threes_of_samples_are_told_apart():
    def forward(m, x):
        assert len(x) % 3 == 0
        rows = m.norm(m.first(x)).unflatten(1, (3, 4)).flatten(0, 1)
        return m.last(Sign.apply(rows))

    layers = {"first": nn.Linear(8, 16), "norm": nn.LayerNorm(16), "last": nn.Linear(16, 4)}
    (found,) = find_binary_activations(Of(forward, **layers), torch.randn(3, 12, 8))
    assert found.tapped and found.mixed is None


@pytest.mark.parametrize(
    "kind",
    [
        types.MappingProxyType,
        type("Frozen", (Graph,), {"keys": lambda self, layer: [layer]}),
        type("Layers", (Graph,), {"keys": nn.Linear(2, 2)}),
    ],
)
def test_objects_with_other_keys_are_in_nobodys_way(kind):
    given = kind({"x": 1}) if kind is types.MappingProxyType else kind(x=1)
    model = Of(lambda m, x: m.encoder(m.act(x, given)), act=Of(lambda m, x, given: x), encoder=encoder())
    assert tapped(model, X8) == ["encoder.2"]
