"""The heads against loops over rows, dimensions and channels, in float64; and their training against torch's Adam."""

import copy
import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cmim_plugin import CMIM
from cmim_plugin.heads import Heads
from networks import Binary, X, Y, assert_same, batch, network

# Three taps: two widths, a tap that reads one of them on both sides, other numbers of rows.
CHANNELS = [(3, 4), (4, 4), (3, 4)]
ROWS = [5, 2, 5]
DIMENSIONS = 3
CHOICES = [[0, 1, 2], [2, 0]]


def start(dtype: torch.dtype = torch.float64) -> tuple[Heads, list[tuple[Tensor, Tensor]]]:
    heads = Heads(CHANNELS, DIMENSIONS, 1e-2, torch.Generator().manual_seed(0)).double()
    rows = [
        tuple(torch.randn(n, width, dtype=torch.float64).to(dtype).requires_grad_() for width in pair)
        for n, pair in zip(ROWS, CHANNELS, strict=True)
    ]
    return heads, rows


def joined(sides: list[Tensor]) -> Tensor:
    return torch.cat(sides).view(2, -1, sides[0].shape[-1])


def oracle(heads: Heads, taps: list[int], rows: list[tuple[Tensor, Tensor]]) -> Tensor:
    """All a_B, tap by tap, then all a_F."""
    sides = []
    for side in (0, 1):
        embeddings = []
        for tap in taps:
            weight = heads.weights_of(tap, heads.weights)[side]
            for row in rows[tap][side]:
                z = []
                for d in range(DIMENSIONS):
                    total = 0.0
                    for c in range(len(row)):
                        total = total + weight[c, d] * row[c].double()
                    z.append(total)
                length = (sum(value * value for value in z) + 1e-12).sqrt()
                embeddings.append(torch.stack([value / length for value in z]))
        sides.append(torch.stack(embeddings))
    return torch.stack(sides)


def gradients_of(z: Tensor, heads: Heads, rows: list[tuple[Tensor, Tensor]], **settings) -> list[Tensor | None]:
    towards = torch.randn(z.shape, dtype=z.dtype, generator=torch.Generator().manual_seed(1))
    wanted = [t for t in [heads.weights, *(row for pair in rows for row in pair)] if t.requires_grad]
    return list(torch.autograd.grad(z, wanted, towards, allow_unused=True, **settings))


def assert_agrees(found: list[Tensor | None], expected: list[Tensor | None]) -> None:
    for f, e in zip(found, expected, strict=True):
        assert (f is None) == (e is None)
        if e is not None:
            torch.testing.assert_close(f, e, rtol=1e-9, atol=1e-9)


# -- embeddings ----------------------------------------------------------------------------------------------------


def test_each_side_of_each_tap_has_weights_of_its_own_which_are_views_of_one_tensor():
    heads, _ = start()
    sides = [side for k in range(3) for side in heads.weights_of(k)]
    assert [tuple(side.shape) for side in sides] == [(width, DIMENSIONS) for pair in CHANNELS for width in pair]
    assert sum(side.numel() for side in sides) == heads.weights.numel()
    heads.weights.detach().zero_()
    for number, side in enumerate(sides, 1):
        assert not side.any()
        side.fill_(number)


@pytest.mark.parametrize("taps", CHOICES, ids=str)
def test_embeddings_and_their_gradients_agree_with_loops(taps):
    heads, rows = start()
    z, expected = joined(heads(taps, [rows[k] for k in taps])), oracle(heads, taps, rows)
    torch.testing.assert_close(z, expected, rtol=1e-9, atol=1e-9)
    assert_agrees(gradients_of(z, heads, rows), gradients_of(expected, heads, rows))


def test_gradients_and_their_gradients_agree_with_differences():
    heads, rows = start()

    def embedded(weights: Tensor, *given: Tensor) -> Tensor:
        return joined(heads([0, 2], list(zip(given[::2], given[1::2], strict=True)), weights))

    tensors = [heads.weights, *rows[0], *rows[2]]
    assert torch.autograd.gradcheck(embedded, tensors)
    assert torch.autograd.gradgradcheck(embedded, tensors)


def test_an_embedding_too_short_to_have_a_direction_is_not_stretched_to_unit_length():
    heads, rows = start()
    heads.weights.detach().mul_(1e-9)
    z, expected = joined(heads([0, 1, 2], rows)), oracle(heads, [0, 1, 2], rows)
    assert z.norm(dim=2).max() < 0.1
    torch.testing.assert_close(z, expected, rtol=1e-9, atol=1e-12)
    for f, e in zip(gradients_of(z, heads, rows), gradients_of(expected, heads, rows), strict=True):
        torch.testing.assert_close(f, e, rtol=1e-9, atol=1e-12)


def test_a_row_of_zeros_has_no_direction_and_gets_no_gradient():
    """Its unit length would multiply the gradient by a million."""
    heads = Heads([(3, 3)], 4, 3e-3, torch.Generator().manual_seed(0))
    rows = torch.zeros(2, 3, requires_grad=True)
    z_b, z_f = heads([0], [(rows, torch.ones(2, 3))])
    (z_b * z_f.detach()).sum().backward()
    assert not z_b.any() and not rows.grad.any()


def test_rows_in_half_precision_are_embedded_in_that_of_the_heads_and_get_gradients_of_their_own():
    heads, rows = start(torch.float16)
    z, expected = joined(heads([0, 1, 2], rows)), oracle(heads, [0, 1, 2], rows)
    torch.testing.assert_close(z, expected, rtol=1e-9, atol=1e-9)
    for f, e in zip(gradients_of(z, heads, rows), gradients_of(expected, heads, rows), strict=True):
        assert f.dtype == e.dtype
        # The loops round at every step.
        close = 1e-9 if f.dtype == torch.float64 else 0.05
        torch.testing.assert_close(f, e, rtol=close, atol=close)


# -- training: an Adam of their own --------------------------------------------------------------------------------

X64 = X.double()


def a_loss(model: torch.nn.Module, cmim: CMIM, x: Tensor = X64) -> Tensor:
    model(x.double())
    return cmim(model)


class Reference:
    """torch's Adam on a copy of the heads' weights, given the gradients that the heads got, in float64."""

    def __init__(self, cmim: CMIM, lr: float = 3e-3) -> None:
        self.weights = cmim.heads.weights.detach().clone()
        self.adam = torch.optim.Adam([self.weights], lr, eps=1e-12)

    def step(self, cmim: CMIM) -> None:
        grad = cmim.heads.weights.grad.detach()
        self.weights.grad = grad / grad.abs().sum().float()
        self.adam.step()

    def agrees(self, cmim: CMIM) -> None:
        cmim.state_dict()  # takes the step that is due
        torch.testing.assert_close(cmim.heads.weights.detach(), self.weights, rtol=1e-9, atol=1e-9)
        if state := self.adam.state[self.weights]:
            torch.testing.assert_close(cmim.heads.exp_avg, state["exp_avg"], rtol=1e-9, atol=0)
            torch.testing.assert_close(cmim.heads.exp_avg_sq, state["exp_avg_sq"], rtol=1e-9, atol=0)
            assert cmim.heads.steps == state["step"]
        else:
            assert cmim.heads.steps == 0


def attached(**settings) -> tuple[torch.nn.Module, CMIM, Reference]:
    model = network().double()
    cmim = CMIM(model, X64, **settings).double()
    return model, cmim, Reference(cmim, settings.get("heads_lr", 3e-3))


@pytest.mark.parametrize("optimizer, weight", [(None, 0.1), (torch.optim.SGD, 1e-4), (torch.optim.AdamW, 30.0)])
def test_heads_take_the_steps_of_adam_whatever_trains_the_network(optimizer, weight):
    model, cmim, adam = attached(weight=weight)
    trained = None if optimizer is None else optimizer(model.parameters(), 0.01)
    for seed in range(12):
        x, y = batch(seed=seed)
        (F.cross_entropy(model(x.double()), y) + cmim(model)).backward()
        if trained is not None:
            trained.step()
            trained.zero_grad()
        adam.step(cmim)
    adam.agrees(cmim)


def test_a_step_is_taken_when_the_next_loss_is_asked_for_or_the_state():
    model, cmim, adam = attached()
    start = cmim.heads.weights.detach().clone()
    a_loss(model, cmim).backward()
    model(X64)
    assert_same(cmim.heads.weights.detach(), start)
    adam.step(cmim)
    cmim(model).backward()
    torch.testing.assert_close(cmim.heads.weights.detach(), adam.weights)
    adam.step(cmim)
    assert_same(cmim.state_dict()["contrast.heads.weights"], cmim.heads.weights)
    adam.agrees(cmim)


def test_the_gradients_of_several_losses_and_backward_passes_add_up_to_one_step():
    model, cmim, adam = attached()
    first = a_loss(model, cmim)
    second = a_loss(model, cmim)
    first.backward(retain_graph=True)
    second.backward()
    first.backward()
    twice = cmim.heads.weights.grad.clone()
    assert twice.any()
    adam.step(cmim)
    adam.agrees(cmim)
    assert cmim.heads.steps == 1
    assert not cmim.heads.weights.grad.any()


def test_losses_in_one_backward_pass_give_one_step_with_the_sum_of_their_gradients():
    model, cmim, _ = attached()
    losses = [a_loss(model, cmim, batch(seed=seed)[0]) for seed in (1, 2)]
    apart = [torch.autograd.grad(loss, cmim.heads.weights, retain_graph=True)[0] for loss in losses]
    sum(losses).backward()
    torch.testing.assert_close(cmim.heads.weights.grad, apart[0] + apart[1])


def test_accumulated_micro_batches_train_the_heads_with_each():
    model, cmim, adam = attached()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    for step in range(6):
        a_loss(model, cmim, batch(seed=step)[0]).backward()
        adam.step(cmim)
        if step % 3 == 2:
            optimizer.step()
            optimizer.zero_grad()
    adam.agrees(cmim)
    assert cmim.heads.steps == 6


def test_the_graph_of_a_loss_stays_valid_after_the_step():
    model, cmim, _ = attached(heads_lr=0.5)
    loss = a_loss(model, cmim)
    expected = torch.autograd.grad(loss, [model.conv1.weight, cmim.heads.weights], retain_graph=True)
    loss.backward(retain_graph=True)
    cmim.state_dict()
    found = torch.autograd.grad(loss, [model.conv1.weight, cmim.heads.weights])
    assert_same(found, expected)


def test_the_gradient_of_the_network_alone_leaves_the_heads():
    model, cmim, adam = attached()
    for _ in range(3):
        torch.autograd.grad(a_loss(model, cmim), model.conv1.weight)
    adam.agrees(cmim)


def test_a_penalty_on_gradients_trains_the_heads_too():
    model, cmim, adam = attached()
    for _ in range(2):
        loss = a_loss(model, cmim)
        (grad,) = torch.autograd.grad(loss, model.conv1.weight, create_graph=True)
        (loss + grad.square().sum()).backward()
        adam.step(cmim)
    adam.agrees(cmim)


def test_a_backward_pass_with_create_graph_keeps_no_graph_beyond_the_step():
    model, cmim, adam = attached()
    for _ in range(2):
        a_loss(model, cmim).backward(create_graph=True)
        adam.step(cmim)
    adam.agrees(cmim)
    assert not cmim.heads.weights.grad.requires_grad


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_a_gradient_that_is_not_finite_is_skipped(value):
    model, cmim, adam = attached()
    for scale in (1.0, value, 1.0):
        loss = a_loss(model, cmim)
        (scale * loss).backward()
        if scale == 1:
            adam.step(cmim)
    adam.agrees(cmim)
    assert cmim.heads.steps == 2


def test_a_gradient_of_zero_is_skipped():
    model, cmim, adam = attached()
    for weight in (0.1, 0, 0.1):
        cmim.weight = weight
        a_loss(model, cmim).backward()
        if weight:
            adam.step(cmim)
    adam.agrees(cmim)
    assert cmim.heads.steps == 2


def test_a_grad_scaler_that_overflows_skips_heads_and_network_alike():
    model, cmim, adam = attached()
    optimizer = torch.optim.SGD(model.parameters(), 0.1)
    scaler = torch.amp.GradScaler("cpu")
    for step in range(5):
        before = model.conv1.weight.detach().clone()
        optimizer.zero_grad()
        loss = F.cross_entropy(model(X64), Y) + cmim(model)
        scaler.scale(loss * (math.inf if step == 2 else 1)).backward()
        scaler.step(optimizer)
        scaler.update()
        assert torch.equal(model.conv1.weight, before) == (step == 2)
        if step != 2:
            adam.step(cmim)
    adam.agrees(cmim)
    assert cmim.heads.steps == 4


def test_a_learning_rate_of_zero_leaves_the_training_of_the_weights_to_the_user():
    model, cmim, _ = attached(heads_lr=0)
    optimizer = torch.optim.SGD([cmim.heads.weights], 0.5)
    weights = cmim.heads.weights.detach().clone()
    for _ in range(2):
        a_loss(model, cmim).backward()
    cmim.state_dict()
    assert_same(cmim.heads.weights.detach(), weights)
    optimizer.step()
    torch.testing.assert_close(cmim.heads.weights.detach(), weights - 0.5 * cmim.heads.weights.grad)


def test_somebody_who_takes_the_gradient_away_costs_a_step_and_no_more():
    model, cmim, adam = attached()
    a_loss(model, cmim).backward()
    cmim.heads.weights.grad = None
    for _ in range(2):
        a_loss(model, cmim).backward()
        adam.step(cmim)
    adam.agrees(cmim)


def test_the_heads_step_when_asked_to():
    model, cmim, adam = attached()
    a_loss(model, cmim).backward()
    adam.step(cmim)
    cmim.heads.step()
    cmim.heads.step()
    adam.agrees(cmim)


def test_heads_learn_where_the_network_is_trained_by_sgd():
    model = network(width=8)
    cmim = CMIM(model, X, num_positions=32)
    optimizer = torch.optim.SGD(model.parameters(), 0.05)
    bounds = []
    for seed in range(60):
        x, y = batch(seed=seed % 4)
        loss = F.cross_entropy(model(x), y) + cmim(model)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        bounds.append(cmim.scalars()["cmim/bound"])
    assert sum(bounds[-10:]) > sum(bounds[:10]) + 5


@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16], ids=str)
def test_moved_to_another_dtype_the_heads_take_the_step_that_is_due_and_stay_in_float32_at_least(dtype):
    model = network()
    cmim = CMIM(model, X)
    model(X)
    cmim(model).backward()
    before = cmim.heads.weights.detach().clone()
    cmim.to(dtype)
    heads, expected = cmim.heads, torch.promote_types(dtype, torch.float32)
    assert {t.dtype for t in (heads.weights, heads.exp_avg, heads.exp_avg_sq)} == {expected}
    assert heads.steps.dtype == torch.float32  # the optimizer's kernel on a GPU would read other numbers
    assert heads.steps == 1
    difference = (heads.weights.detach() - before).abs()
    assert 2e-3 < difference.median() < 4e-3
    model(X)
    cmim(model).backward()
    heads.step()
    assert heads.steps == 2 and heads.weights.is_leaf and heads.weights.requires_grad


def test_a_copy_of_the_heads_trains_on_its_own():
    heads, rows = start()
    twin = copy.deepcopy(heads)
    before = heads.weights.detach().clone()
    joined(twin(range(3), rows)).sum().backward()
    twin.step()
    heads.step()
    assert twin.weights.is_leaf and twin.weights.requires_grad
    assert twin.steps == 1 and heads.steps == 0
    assert_same(heads.weights.detach(), before)
    assert not torch.equal(twin.weights, before)


# -- heads that do not learn are told ------------------------------------------------------------------------------


def tiny() -> tuple[torch.nn.Module, Tensor]:
    return torch.nn.Sequential(torch.nn.Linear(3, 4), Binary(), torch.nn.Linear(4, 2)), torch.randn(4, 3)


def test_layer_weights_are_not_rounded_by_a_cast_to_half_precision():
    cmim = CMIM(network(), X, layer_decay=0.7)
    exact = cmim.contrast._layer_weights_on_device.clone()
    cmim.bfloat16()
    assert len(exact) == 2 and torch.equal(cmim.contrast._layer_weights_on_device.float(), exact)


def test_an_optimizer_of_the_users_keeps_the_heads():
    model, x = tiny()
    cmim = CMIM(model, x, heads_lr=0)
    weights = cmim.heads.weights
    cmim.to("cpu")
    cmim.zero_grad()
    torch.optim.SGD([weights], lr=0.1).zero_grad()
    cmim.load_state_dict(cmim.state_dict())
    model(x)
    cmim(model).backward()
    assert cmim.heads.weights is weights and weights.grad.any()


def test_the_scale_of_the_loss_and_changes_of_it_do_not_matter_to_the_heads():
    trained = []
    for scales in ([1.0] * 6, [2.0**16, 2.0**16, 2.0**12, 1.0, 1e-3, 1e-3]):
        model = network()
        cmim = CMIM(model, X)
        for scale in scales:
            model(X)
            (scale * cmim(model)).backward()
        cmim.heads.step()
        trained.append(cmim.heads.weights.detach())
    torch.testing.assert_close(*trained, rtol=1e-5, atol=1e-6)


def test_rows_of_zeros_get_no_gradient_and_the_others_theirs():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(6, 8), Binary(), nn.Linear(8, 3))
    heads = CMIM(model, torch.randn(8, 6)).heads
    rows = (torch.rand(5, 8) < 0.3).float()
    rows[2] = 0
    gradients = []
    for kept in (torch.arange(5), torch.tensor([0, 1, 3, 4])):
        x = rows[kept].clone().requires_grad_()
        z = joined(heads([0], [(x, x.detach())]))
        z[0].pow(3).sum().backward()
        gradients.append(x.grad)
    assert not gradients[0][2].any()
    assert torch.equal(gradients[0][[0, 1, 3, 4]], gradients[1])
