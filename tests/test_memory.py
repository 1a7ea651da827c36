"""What is kept of an activation, what may be done to it, and gradients that other code looks at."""

import contextlib
import gc
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from cmim_plugin import CMIM, CMIMError
from networks import (
    BIREAL,
    IRNET,
    Binary,
    BinaryConv,
    MaskedSign,
    Storages,
    X,
    Y,
    a_loss,
    assert_same,
    gradients,
    network,
)

each_instance = pytest.mark.parametrize("instances", ["image", "position"])
each_mixture = pytest.mark.parametrize("recipe, instances", [(IRNET, "position"), (BIREAL, "image")])


# -- nothing outlives its use --------------------------------------------------------------------------------------


@each_mixture
def test_no_activation_outlives_an_ordinary_step(recipe, instances):
    model = network(recipe)
    cmim = CMIM(model, X, instances=instances, queue_size=8)
    storages = Storages(model)
    loss = F.cross_entropy(model(X), Y)
    loss += cmim(model)
    assert storages.alive() > 0  # the graph is still there
    loss.backward()
    del loss
    assert storages.alive() == 0


@pytest.mark.parametrize(
    "recipe, what",
    [(BIREAL, "a loss that is dropped"), (IRNET, "a pass without gradients"), (IRNET, "a pass that raised")],
)
def test_no_activation_outlives(recipe, what):
    model = nn.Sequential(network(recipe), nn.Identity())
    cmim = CMIM(model, X, queue_size=8)
    storages = Storages(model)
    if what == "a pass that raised":
        model[1].forward = lambda x: x.no_such_method()
    with contextlib.suppress(AttributeError), torch.set_grad_enabled(what != "a pass without gradients"):
        model(X)
    if what == "a loss that is dropped":
        cmim(model)
    assert storages.alive() == 0


def test_a_pass_that_nobody_asked_for_is_forgotten_by_the_next():
    model = network()
    cmim = CMIM(model, X)
    storages = Storages(model)
    model(X)
    storages.remove()
    loss = a_loss(model, cmim)
    assert storages.alive() == 0
    loss.backward()


def test_the_plug_in_does_not_keep_the_model_or_its_parameters_alive():
    model = network()
    cmim = CMIM(model, X)
    a_loss(model, cmim).backward()
    replaced = StorageWeakRef(model.conv1.weight.untyped_storage())
    model.load_state_dict({name: tensor.clone() for name, tensor in model.state_dict().items()}, assign=True)
    gc.collect()
    assert replaced.expired()
    a_loss(model, cmim).backward()
    storages = [StorageWeakRef(tensor.untyped_storage()) for tensor in model.state_dict().values()]
    del model
    gc.collect()
    assert all(storage.expired() for storage in storages)


# -- what the network does to its activations ----------------------------------------------------------------------


class Then(nn.Module):
    """Something is done to the latent as soon as the convolution has run."""

    def __init__(self, then, inside=False):
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.sign = nn.Identity() if inside else Binary()
        self.conv = (BinaryConv if inside else nn.Conv2d)(4, 4, 3, padding=1)
        self.then = then

    def forward(self, x):
        x = self.norm(self.stem(x))
        out = self.conv(self.sign(x))
        self.then(x)
        return out.mean((2, 3))


def nothing(x):
    pass


def overwrite(x):
    x.detach().zero_()


def replace_data(x):
    x.data = torch.zeros_like(x)


def empty(x):
    x.data = x.new_empty(0)


def free(x):
    x.untyped_storage().resize_(0)


@pytest.mark.parametrize(
    "then, inside, instances",
    [
        (overwrite, False, "image"),
        (overwrite, True, "position"),
        (replace_data, False, "position"),
        (empty, True, "image"),
        (free, True, "position"),
        (free, False, "image"),
    ],
)
def test_a_latent_that_is_overwritten_or_freed_after_the_tap_gives_the_same_loss_and_gradients(then, inside, instances):
    results = []
    for what, passes in ((nothing, 1), (then, 1), (then, 2)):
        torch.manual_seed(0)
        # Only the branch of the convolution goes on: backward needs nothing of the latent.
        model = Then(what, inside).eval()
        cmim = CMIM(model, X, instances=instances)
        draws = cmim.draws.clone()
        for _ in range(passes):
            cmim.draws.copy_(draws)
            model(X)
        loss = cmim(model)
        results.append([loss.detach()])
        if then is overwrite:
            loss.backward()
            results[-1] += gradients(model, cmim)
    assert_same(results[1:], results[:1] * 2)


class InPlaceShortcut(nn.Module):
    def __init__(self, in_place):
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.sign = Binary()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.in_place = in_place

    def forward(self, x):
        x = self.norm(self.stem(x))
        out = self.conv(self.sign(x))
        if self.in_place:
            x += out
            return F.relu_(x).mean((2, 3))
        return F.relu(x + out).mean((2, 3))


@each_instance
def test_a_function_in_place_after_the_tap_changes_neither_loss_nor_gradients(instances):
    results = []
    for in_place in (False, True):
        torch.manual_seed(0)
        model = InPlaceShortcut(in_place)
        cmim = CMIM(model, X, instances=instances)
        loss = F.cross_entropy(model(X), Y)
        loss = loss + cmim(model)
        loss.backward()
        results.append([loss.detach(), *gradients(model, cmim)])
    torch.testing.assert_close(results[1], results[0])


# -- hooks on gradients --------------------------------------------------------------------------------------------


class Hooked(nn.Module):
    """A hook on the gradient of its latent, registered before or after the latent is picked up."""

    def __init__(self, hook, before):
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1)
        self.sign = Binary()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.hook = hook
        self.before = before

    def forward(self, x):
        x = self.stem(x)
        if self.before:
            x.register_hook(self.hook)
        out = self.conv(self.sign(x))
        if not self.before:
            x.register_hook(self.hook)
        return out.mean((2, 3))


@pytest.mark.parametrize("instances, before", [("position", True), ("position", False), ("image", False)])
def test_a_hook_of_the_networks_on_an_activation_sees_the_whole_gradient_and_may_replace_it(instances, before):
    def run(hook):
        torch.manual_seed(0)
        model = Hooked(hook, before)
        cmim = CMIM(model, X, instances=instances)
        loss = F.cross_entropy(model(X), Y) + cmim(model)
        loss.backward()
        return model.stem.weight.grad

    seen, own = [], torch.randn(6, 4, 4, 4)
    kept = own.clone()
    plain = run(lambda grad: seen.append(grad.clone()))
    torch.testing.assert_close(run(lambda grad: 2 * grad), 2 * plain)
    (wanted,) = seen[-1:]
    assert wanted.any()
    expected = torch.nn.grad.conv2d_weight(X, (4, 2, 3, 3), wanted, padding=1)
    torch.testing.assert_close(plain, expected, rtol=1e-4, atol=1e-5)
    # What a hook returned is the gradient, and is not written into.
    replaced = run(lambda grad: own)
    assert_same(own, kept)
    torch.testing.assert_close(
        replaced, torch.nn.grad.conv2d_weight(X, (4, 2, 3, 3), own, padding=1), rtol=1e-4, atol=1e-5
    )


# -- activation checkpointing --------------------------------------------------------------------------------------


class Checkpointed(nn.Module):
    def __init__(self, recipe, enabled):
        super().__init__()
        self.body = network(recipe)
        self.enabled = enabled

    def forward(self, x):
        stem, rest = self.body[:3], self.body[3:]
        return checkpoint(rest, stem(x), use_reentrant=False) if self.enabled else rest(stem(x))


@each_mixture
def test_activation_checkpointing_changes_neither_loss_nor_gradients(recipe, instances):
    results = []
    for enabled in (False, True):
        torch.manual_seed(0)
        model = Checkpointed(recipe, enabled)
        cmim = CMIM(model, X, instances=instances)
        loss = F.cross_entropy(model(X), Y)
        loss = loss + cmim(model)
        loss.backward()
        results.append([loss.detach(), *gradients(model, cmim)])
        # Recomputation in the backward pass is no forward pass of the model.
        with pytest.raises(CMIMError, match="No forward pass"):
            cmim(model)
    torch.testing.assert_close(results[1], results[0])


def test_a_checkpoint_around_the_whole_model_is_one_pass():
    results = []
    for enabled in (False, True):
        torch.manual_seed(0)
        model = network()
        cmim = CMIM(model, X)
        logits = checkpoint(model, X, use_reentrant=False) if enabled else model(X)
        loss = F.cross_entropy(logits, Y) + cmim(model)
        loss.backward()
        results.append([loss.detach(), *gradients(model, cmim)])
        with pytest.raises(CMIMError, match="No forward pass"):
            cmim(model)
    torch.testing.assert_close(results[1], results[0])


# -- the ends of modules -------------------------------------------------------------------------------------------


class EndsWith(nn.Conv2d):
    """Binarizes within its forward; what it returns is computed from the convolution's output."""

    ending = staticmethod(lambda out: out)

    def forward(self, x):
        return self.ending(F.conv2d(MaskedSign.apply(x), self.weight, self.bias, padding=1))


@pytest.mark.parametrize(
    "ending",
    [partial(F.group_norm, num_groups=2), lambda out: F.conv2d(out, torch.ones(4, 4, 3, 3), padding=1)],
    ids=["normalized", "convolved again"],
)
def test_a_module_that_goes_on_after_its_convolution_has_the_same_operands(ending):
    results = []
    for then in (None, ending):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), EndsWith(4, 4, 3))
        if then is not None:
            model[1].ending = then
        cmim = CMIM(model, X)
        assert [tap.name for tap in cmim.taps] == ["1"]
        a_loss(model, cmim).backward()
        results.append(gradients(model, cmim))
    assert_same(results[1], results[0])
