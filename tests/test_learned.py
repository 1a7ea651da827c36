"""What taps learn in their first pass, and what becomes of it in a later pass that is another."""

from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef

from cmim_plugin import CMIM, CMIMError, CMIMWarning
from hazards.nets import network

TOLD = hasattr(torch._C._autograd, "_top_saved_tensors_default_hooks")
where_it_is_told = pytest.mark.skipif(
    not TOLD,
    reason="this torch does not tell whether something takes what is saved, and nothing is learned",
)
X = torch.randn(4, 2, 3, 3, generator=torch.Generator().manual_seed(1))


class Sign(torch.autograd.Function):
    """With a mask, x may be overwritten; without, it lives until the backward pass."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, masked: bool) -> Tensor:
        ctx.save_for_backward(x.abs() < 1 if masked else x)
        return torch.where(x >= 0, 1.0, -1.0).to(x.dtype)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        (saved,) = ctx.saved_tensors
        return grad * (saved if saved.dtype == torch.bool else saved.abs() < 1), None


class Convolution(nn.Conv2d):
    """Binarizes within its forward; what follows may be something else than the convolution of that."""

    listeners = -1

    def forward(self, x: Tensor) -> Tensor:
        self.listeners = len(torch.overrides._get_current_function_mode_stack())
        return self.ending(F.conv2d(Sign.apply(x, True), self.weight, self.bias, padding=1))

    def ending(self, out: Tensor) -> Tensor:
        return out


def again(out: Tensor) -> Tensor:
    return F.conv2d(out, torch.ones(4, 4, 3, 3), padding=1)


class Network(nn.Module):
    """Its latent is kept to the end of the pass by a list or by autograd; ``then`` does something to it before."""

    def __init__(self, masked: bool = True, inside: bool = False) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1)
        self.sign = nn.Identity() if inside else Binary(masked)
        self.conv = (Convolution if inside else nn.Conv2d)(4, 4, 3, padding=1)
        self.kept: list[Tensor] = []
        self.then: Callable[[Tensor], Any] = lambda x: None

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        out = self.conv(self.sign(x))
        if getattr(self.sign, "masked", True):
            self.kept[:] = [x]
        self.then(x)
        del x
        return out.mean((2, 3))


class Binary(nn.Module):
    def __init__(self, masked: bool) -> None:
        super().__init__()
        self.masked = masked

    def forward(self, x: Tensor) -> Tensor:
        return Sign.apply(x, self.masked)


def attached(draw: float = 0.0, **how: bool) -> tuple[Network, CMIM]:
    """Two positions of each tap, at that part of either half of the batch."""
    torch.manual_seed(0)
    model = Network(**how)
    cmim = CMIM(model, X, num_positions=2)
    at(cmim, draw)
    return model, cmim


def at(cmim: CMIM, draw: float) -> None:
    cmim._hooks.draws = torch.full((1, 2), draw)


def result(model: Network, cmim: CMIM) -> list[Tensor]:
    """Loss and gradients of the next pass."""
    model.zero_grad(), cmim.zero_grad()
    model(X)
    loss = cmim(model)
    loss.backward()
    return [loss.detach(), *(p.grad.clone() for m in (model, cmim) for p in m.parameters() if p.grad is not None)]


def assert_same(found: list[Tensor], expected: list[Tensor]) -> None:
    assert expected[0] > 0
    torch.testing.assert_close(found, expected)


def overwrite(x: Tensor) -> None:
    x.detach().zero_()


def overwrite_unnoticed(x: Tensor) -> None:
    x.data = torch.zeros_like(x)


def overwrite_what_was_not_sampled(x: Tensor) -> None:
    first = x.detach()[[0, 2], :, 0, 0]
    x.detach().zero_()[[0, 2], :, 0, 0] = first


@pytest.mark.parametrize("then", [overwrite, overwrite_unnoticed, overwrite_what_was_not_sampled])
def test_a_latent_that_is_overwritten_before_the_end_of_the_pass_is_sampled_before_that(then):
    expected = result(*attached(0.5))
    model, cmim = attached()
    model.then = then
    model(X)
    at(cmim, 0.5)
    assert_same(result(model, cmim), expected)


@where_it_is_told
def test_a_latent_that_is_overwritten_later_only_never_gives_a_wrong_loss():
    model, cmim = attached()
    model(X)
    model.then = overwrite
    model(X)
    with pytest.raises(CMIMError, match="another way"):
        cmim(model)
    # From then on it is sampled before.
    expected = result(*attached(0.5))
    at(cmim, 0.5)
    assert_same(result(model, cmim), expected)


def test_a_latent_that_autograd_hands_to_something_else_is_not_kept_until_the_end():
    model, cmim = attached(masked=False)
    alive: list[bool] = []
    model.then = lambda x: alive.append(StorageWeakRef(x.untyped_storage()))
    model(X)
    assert not alive.pop().expired()
    last = model.register_forward_hook(lambda *_: alive.append(alive.pop().expired()), prepend=True)
    with torch.autograd.graph.saved_tensors_hooks(torch.clone, lambda tensor: tensor):
        model(X)
    last.remove()
    assert alive == [True]
    expected = result(*attached(masked=False))
    model.then = lambda x: None
    at(cmim, 0.0)
    assert_same(result(model, cmim), expected)


@where_it_is_told
def test_a_module_is_listened_to_once_where_the_graph_holds_what_was_listened_for():
    model, cmim = attached(inside=True)
    assert [tap.name for tap in cmim.taps] == ["conv"]
    listeners = []
    for _ in range(3):
        model(X)
        listeners.append(model.conv.listeners)
    assert listeners == [1, 0, 0]


@pytest.mark.parametrize("ending", [torch.neg, partial(F.group_norm, num_groups=2), again])
def test_a_module_whose_output_is_computed_from_something_else_is_listened_to_always(ending):
    results = []
    for passes in (1, 2):
        torch.manual_seed(0)
        model = Network(inside=True)
        model.conv.ending = ending
        cmim = CMIM(model, X, num_positions=2)
        for _ in range(passes):
            at(cmim, 0.5)
            results.append(result(model, cmim))
        assert model.conv.listeners == 1
    assert_same(results[2], results[0])


# With the first two, something else stands where the operand did.
@where_it_is_told
@pytest.mark.parametrize("ending", [again, partial(F.group_norm, num_groups=2), torch.neg])
def test_a_module_whose_output_is_computed_otherwise_later_never_gives_a_wrong_loss(ending):
    model, cmim = attached(inside=True)
    model(X)
    model.conv.ending = ending
    model(X)
    with pytest.raises(CMIMError, match="another way"):
        cmim(model)
    expected_model, expected_cmim = attached(0.5, inside=True)
    expected_model.conv.ending = ending
    at(cmim, 0.5)
    assert_same(result(model, cmim), result(expected_model, expected_cmim))


@where_it_is_told
def test_a_module_that_returns_its_input_later_never_gives_a_wrong_loss():
    model, cmim = attached(inside=True)
    model(X)
    forward, model.conv.forward = model.conv.forward, lambda x: x
    model(X)
    with pytest.raises(CMIMError, match="another way"):
        cmim(model)
    model.conv.forward = forward
    at(cmim, 0.5)
    assert_same(result(model, cmim), result(*attached(0.5, inside=True)))


def test_a_module_that_returns_the_output_of_its_like_later_adds_nothing_to_the_loss():
    results = []
    for passes in (0, 1):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), *(Convolution(4, 4, 3) for _ in range(2)))
        cmim = CMIM(model, X, num_positions=2)
        assert len(cmim.taps) == 2
        for _ in range(passes):
            model(X)
        model[2].forward = lambda x: x
        model(X)
        with pytest.warns(CMIMWarning, match=f"did not reach tap {cmim.taps[1].name}"):
            results.append([cmim(model)])
    assert_same(results[1], results[0])


class Block(nn.Module):
    """Convolves with the weight of a part."""

    def __init__(self) -> None:
        super().__init__()
        self.part = nn.Conv2d(4, 4, 3)

    def forward(self, x: Tensor) -> Tensor:
        return F.conv2d(Sign.apply(x, True), self.part.weight, padding=1)


@pytest.mark.parametrize("passes", [0, 1])
def test_a_part_of_a_module_that_is_frozen_later_is_refused_at_once(passes):
    model = Network(inside=True)
    model.conv = Block()
    cmim = CMIM(model, X, num_positions=2)
    for _ in range(passes):
        model(X)
    model.requires_grad_(False)
    with pytest.raises(CMIMError, match="layers frozen since"):
        model(X)
    assert cmim.taps


def test_taps_that_share_a_latent_are_both_sampled_in_every_pass():
    results = []
    for passes in (0, 2):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Conv2d(2, 4, 3, padding=1), Branches())
        cmim = CMIM(model, X, num_positions=2)
        assert len(cmim.taps) == 2
        for _ in range(passes):
            model(X)
        model.zero_grad()
        model(X)
        loss = cmim(model)
        loss.backward()
        assert len(cmim._hooks._lasting) == 4
        results.append(
            [loss.detach(), *(p.grad for p in [*model.parameters(), *cmim.parameters()] if p.grad is not None)]
        )
    if TOLD:
        assert all(cmim._hooks._lasting.values())
    assert_same(results[1], results[0])


class Branches(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.left, self.right = (nn.Sequential(Binary(False), nn.Conv2d(4, 4, 3)) for _ in range(2))

    def forward(self, x: Tensor) -> Tensor:
        return self.left(x) + self.right(x)


@pytest.mark.parametrize("inside", [False, True])
def test_a_model_may_change_its_dtype_after_the_first_pass(inside):
    results = []
    for passes in (0, 1):
        model, cmim = attached(inside=inside)
        for _ in range(passes):
            model(X)
        model.double(), cmim.double()
        model(X.double())
        results.append([cmim(model)])
    assert_same(results[1], results[0])


def double(grad: Tensor) -> Tensor:
    return 2 * grad


@pytest.mark.parametrize("masked", [False, True])
def test_a_hook_that_the_network_puts_on_an_activation_sees_the_gradient_of_the_contrast(masked):
    results = []
    for passes in (0, 1):
        model, cmim = attached(masked=masked)
        model.then = lambda x: x.register_hook(double)
        for _ in range(passes):
            model(X)
        results.append(result(model, cmim))
    assert_same(results[1], results[0])


def empty(x: Tensor) -> None:
    x.data = x.new_empty(0)


def free(x: Tensor) -> None:
    x.untyped_storage().resize_(0)


@where_it_is_told
@pytest.mark.parametrize("then", [empty, free])
@pytest.mark.parametrize("passes", [0, 1])
def test_an_activation_that_is_freed_before_the_end_of_the_pass_is_not_read_there(then, passes):
    model, cmim = attached()
    for _ in range(passes):
        model(X)
    model.then = then
    for refused in [True] * passes + [False]:
        model(X)
        if refused:
            with pytest.raises(CMIMError, match="another way"):
                cmim(model)
    at(cmim, 0.5)
    model(X)
    expected_model, expected_cmim = attached(0.5)
    expected_model(X)
    assert torch.equal(cmim(model), expected_cmim(expected_model))


@where_it_is_told
def test_a_module_that_packs_what_it_saves_later_never_gives_a_wrong_loss():
    model, cmim = attached(inside=True)
    model(X)
    forward = model.conv.forward

    def packing(x: Tensor) -> Tensor:
        with torch.autograd.graph.saved_tensors_hooks(lambda tensor: tensor.detach().clone(), lambda tensor: tensor):
            return forward(x)

    model.conv.forward = packing
    model(X)
    with pytest.raises(CMIMError, match="another way"):
        cmim(model)
    at(cmim, 0.5)
    assert_same(result(model, cmim), result(*attached(0.5, inside=True)))


def test_batches_of_many_sizes_are_not_remembered_without_end():
    model, cmim = attached()
    for n in range(2, 150):
        model(torch.zeros(n, 2, 3, 3))
    assert 0 < len(cmim._hooks._grids) < 100


def test_where_the_channels_lie_is_found_for_the_taps_of_a_shape_alone():
    torch.manual_seed(0)
    model = network(inside=False, channels=(4, 6, 6))
    cmim = CMIM(model, X, taps_per_step=None)
    for _ in range(2):
        model(X)
        assert sorted(len(taps) for taps in cmim._hooks._positions.values()) == [1, 2]
