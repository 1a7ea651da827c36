"""Positions, rows and pooling against plain loops."""

import math

import pytest
import torch
from torch import Tensor

from cmim_plugin import CMIMError, stratified_indices
from cmim_plugin.discovery.layout import Layout
from cmim_plugin.sampling import BackwardRule, advance_draws, take_elements
from networks import assert_same

# -- random numbers ------------------------------------------------------------------------------------------------


def draws(*shape: int, seed: int = 5) -> Tensor:
    return torch.randint(-(2**63), 2**63 - 1, shape, generator=torch.Generator().manual_seed(seed))


def test_random_numbers_advance_as_a_loop_of_integers_modulo_2_to_the_64():
    found = draws(5)
    expected = found.tolist()
    for _ in range(3):
        advance_draws(found)
        for i, value in enumerate(expected):
            value = (value * 6364136223846793005 + 1442695040888963407) % 2**64
            expected[i] = value - 2**64 if value >= 2**63 else value
    assert found.tolist() == expected


def test_over_the_steps_every_position_of_an_interval_is_drawn_equally_often():
    n, total = 5, 13
    number, steps = draws(n), 8000
    seen = [0] * total
    for _ in range(steps):
        advance_draws(number)
        for position in stratified_indices(number, total).tolist():
            seen[position] += 1
    start = 0
    for interval in range(n):
        end = (interval + 1) * total // n
        assert end - start in (total // n, -(-total // n))
        share = 1 / (end - start)
        deviation = math.sqrt(steps * share * (1 - share))
        for position in range(start, end):
            assert abs(seen[position] - steps * share) <= 5 * deviation, position
        start = end


@pytest.mark.parametrize("n, total", [(5, 13), (7, 7), (256, 3000), (9, 4), (3, 0)])
def test_positions_are_distinct_rising_and_in_range(n, total):
    found = stratified_indices(draws(50, n), total)
    assert found.shape == (50, min(n, total))
    for positions in found.tolist():
        assert positions == sorted(set(positions))
        assert all(0 <= position < total for position in positions)
        if n >= total:
            assert positions == list(range(total))


def test_the_extremes_of_the_random_numbers_stay_in_range():
    for total in (1, 2, 13, 1000, 2**24 + 1, 800_000):
        for value in (-(2**63), -1, 0, 2**63 - 1):
            positions = stratified_indices(torch.full((5,), value), total).tolist()
            assert len(set(positions)) == min(5, total)
            assert all(0 <= position < total for position in positions)


def test_ranks_that_share_the_draws_draw_what_one_process_would():
    draw = draws(12)
    whole = stratified_indices(draw, 60).tolist()
    for ranks in (2, 3, 4):
        parts = []
        for rank in range(ranks):
            share = draw[rank * 12 // ranks : (rank + 1) * 12 // ranks]
            parts += [rank * 60 // ranks + position for position in stratified_indices(share, 60 // ranks).tolist()]
        assert parts == whole


# -- layouts -------------------------------------------------------------------------------------------------------

# shape, layout, channels, positions of a sample, and the index in the tensor of (sample, position, channel), by hand
CASES = {
    "features": ((4, 3), Layout(None), 3, 1, lambda s, p, c: (s, c)),
    "maps": ((4, 3, 2, 5), Layout(2), 3, 10, lambda s, p, c: (s, c, p // 5, p % 5)),
    "maps, one position": ((4, 3, 1, 1), Layout(2), 3, 1, lambda s, p, c: (s, c, 0, 0)),
    "tokens in rows": ((4, 2, 5, 3), Layout(None), 3, 10, lambda s, p, c: (s, p // 5, p % 5, c)),
    "volumes": ((2, 3, 2, 2, 2), Layout(3), 3, 8, lambda s, p, c: (s, c, p // 4, p // 2 % 2, p % 2)),
    "flattened groups": ((4, 2, 3, 2, 2), Layout(2), 6, 4, lambda s, p, c: (s, c // 3, c % 3, p // 2, p % 2)),
    "windows of tokens": ((8, 5, 3), Layout(None, windowed=True), 3, 10, lambda s, p, c: (2 * s + p // 5, p % 5, c)),
    "windows of maps": (
        (6, 3, 2, 2),
        Layout(2, windowed=True),
        3,
        8,
        lambda s, p, c: (2 * s + p // 4, c, p % 4 // 2, p % 4 % 2),
    ),
}
each_case = pytest.mark.parametrize("shape, layout, channels, positions, at", CASES.values(), ids=CASES)


def memory_formats(shape):
    x = torch.randn(shape, dtype=torch.float64)
    yield x
    if len(shape) == 4:
        yield x.contiguous(memory_format=torch.channels_last)
    yield x.transpose(0, -1).contiguous().transpose(0, -1)


def samples(shape, layout) -> int:
    return shape[0] // (2 if layout.windowed else 1)


def rows_of(x: Tensor, layout: Layout, index: Tensor) -> Tensor:
    """As taps take them."""
    return take_elements(x, layout.elements(index, x.shape, torch.arange(x.numel())), x.new_zeros(()))


@each_case
def test_pooling_is_the_mean_over_the_positions_of_each_sample(shape, layout, channels, positions, at):
    for x in memory_formats(shape):
        pooled = layout.pooled(x, samples(shape, layout))
        assert pooled.shape == (samples(shape, layout), channels)
        for sample in range(len(pooled)):
            for channel in range(channels):
                total = 0.0
                for position in range(positions):
                    total += x[at(sample, position, channel)].item()
                assert pooled[sample, channel].item() == pytest.approx(total / positions, abs=1e-12)


@each_case
def test_sampling_takes_the_channels_at_positions_counted_over_the_batch(shape, layout, channels, positions, at):
    total = samples(shape, layout) * positions
    assert layout.positions(torch.Size(shape)) == total
    assert layout.channels(torch.Size(shape)) == channels
    index = torch.randperm(total)[: max(1, total // 2)]
    for x in memory_formats(shape):
        rows = rows_of(x, layout, index)
        assert rows.shape == (len(index), channels)
        for row, place in enumerate(index.tolist()):
            for channel in range(channels):
                assert rows[row, channel].item() == x[at(place // positions, place % positions, channel)].item()


@each_case
def test_gradients_reach_the_activation(shape, layout, channels, positions, at):
    for x in memory_formats(shape):
        x.requires_grad_()
        (gradient,) = torch.autograd.grad(layout.pooled(x, samples(shape, layout)).sum(), x)
        assert torch.allclose(gradient, torch.full_like(x, 1 / positions))
        index = torch.tensor([0, samples(shape, layout) * positions - 1])
        rows = rows_of(x, layout, index)
        (gradient,) = torch.autograd.grad((rows * torch.tensor([[1.0], [2.0]])).sum(), x)
        expected = torch.zeros_like(x)
        for channel in range(channels):
            expected[at(0, 0, channel)] += 1
            expected[at(samples(shape, layout) - 1, positions - 1, channel)] += 2
        assert torch.equal(gradient, expected)


# -- the gradient of a sample --------------------------------------------------------------------------------------


def test_the_gradient_of_an_overlapping_or_gapped_activation_is_right():
    for x in (torch.randn(4, 3, 5, 10)[..., ::2], torch.randn(4, 1, 5, 5).expand(4, 3, 5, 5)):
        x = x.detach().requires_grad_()
        rows = rows_of(x, Layout(2), torch.tensor([7, 99]))
        (gradient,) = torch.autograd.grad(rows.sum(), x)
        expected = torch.zeros(4, 3, 5, 5)
        expected[0, :, 1, 2] = 1
        expected[3, :, 4, 4] = 1
        assert torch.equal(gradient, expected)


@pytest.mark.parametrize("channels_last", [False, True])
def test_a_gradient_that_lies_in_memory_in_another_way_than_the_activation_gets_its_entries(channels_last):
    formats = [torch.contiguous_format, torch.channels_last]
    x = torch.randn(2, 3, 2, 4).contiguous(memory_format=formats[channels_last]).requires_grad_()
    activation = x * 1
    towards = torch.randn(2, 3, 2, 4).contiguous(memory_format=formats[not channels_last])
    rows = rows_of(activation, Layout(2), torch.tensor([1, 6, 11]))
    ((activation * towards).sum() + 3 * rows.sum()).backward()
    expected = towards.clone()
    for position in (1, 6, 11):
        image, place = divmod(position, 8)
        expected[image, :, place // 4, place % 4] += 3
    torch.testing.assert_close(x.grad, expected)


def test_gradients_of_gradients_pass_through_the_sampling():
    x = torch.randn(4, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    index = torch.tensor([1, 6, 15])
    assert torch.autograd.gradgradcheck(lambda t: rows_of(t, Layout(2), index).pow(3), x)
    # Of a sum with what the network makes of the activation.
    assert torch.autograd.gradgradcheck(lambda t: rows_of(t * 2, Layout(2), index).pow(3).sum() + t.pow(3).sum(), x)


def test_what_shares_the_gradient_of_the_activation_stays_as_it_is():
    # Addition hands one and the same gradient to both of its arguments.
    a, b = (torch.randn(4, 3, 2, 2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    x, shortcut = a * 2, b * 3
    rows = rows_of(x, Layout(2), torch.tensor([0, 7, 15]))
    weight = torch.randn(4, 3, 2, 2, dtype=torch.float64)
    kept = weight.clone()
    ((x + shortcut) * weight).sum().add(rows.sum()).backward()
    assert torch.equal(weight, kept)
    assert torch.equal(b.grad, 3 * weight)
    expected = 2 * weight
    for sample, row, column in ((0, 0, 0), (1, 1, 1), (3, 1, 1)):
        expected[sample, :, row, column] += 2
    assert torch.allclose(a.grad, expected)


def test_a_gradient_that_the_user_passes_in_is_not_written_into():
    x = torch.randn(2, 3, requires_grad=True) * 1
    rows = rows_of(x, Layout(None), torch.tensor([1]))
    given = torch.ones(2, 3)
    torch.autograd.backward([x, rows], [given, torch.ones(1, 3)])
    assert_same(given, torch.ones(2, 3))


def test_two_samples_of_one_activation_both_count_and_a_second_backward_adds_the_same():
    a = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    x = a * 2
    first, second = (rows_of(x, Layout(None), torch.tensor(index)) for index in ([0, 2], [2, 3]))
    loss = first.sum() + 10 * second.sum() + x.sum()
    expected = torch.tensor([4.0, 2.0, 24.0, 22.0], dtype=torch.float64)[:, None].expand(4, 6)
    for times in (1, 2):
        loss.backward(retain_graph=True)
        assert torch.allclose(a.grad, times * expected)
    # Of the sample alone, and of the rest alone.
    (alone,) = torch.autograd.grad(first.sum(), a, retain_graph=True)
    assert torch.equal(alone[:, 0], torch.tensor([2.0, 0, 2, 0], dtype=torch.float64))
    (rest,) = torch.autograd.grad(x.sum(), a)
    assert torch.equal(rest, torch.full_like(a, 2))


@pytest.mark.parametrize("shape", [(1, 1), (3, 1)], ids=str)
def test_an_activation_of_one_element_or_channel_gets_its_gradient(shape):
    a = torch.randn(shape, requires_grad=True)
    rows = rows_of(a * 2, Layout(None), torch.tensor([0]))
    rows.sum().backward()
    expected = torch.zeros(shape)
    expected[0] = 2
    assert_same(a.grad, expected)


def test_backward_holds_no_whole_map_for_a_sample_before_the_network_needs_it():
    x = (torch.randn(4, 3, 32, 32, requires_grad=True) * 1).sigmoid()
    rows = rows_of(x, Layout(2), torch.tensor([1, 2]))
    held = []
    rows.grad_fn.register_hook(lambda gradients, _: held.append(gradients[0].untyped_storage().nbytes()))
    rows.sum().backward()
    assert held == [4]


@pytest.mark.parametrize("sampled", [True, False])
def test_where_one_backward_pass_is_asked_for_a_second_one_is_refused(sampled):
    for order in (0, 1):
        rule = BackwardRule()
        a = torch.randn(4, 6, requires_grad=True)
        x = a * 2
        elements = Layout(None).elements(torch.tensor([1, 2]), x.shape, torch.arange(9))
        rows = take_elements(x, elements, x.new_zeros(())) if sampled else x.sum(1)
        rule.watch(x, rows)
        rule.require_one_backward(rows)
        losses = [x.sum(), rows.sum()]
        for loss in losses:
            torch.autograd.grad(loss, a, retain_graph=True)  # adds to no gradient
        losses[order].backward(retain_graph=True)
        with pytest.raises(CMIMError, match=r"Add the losses: \(loss \+ cmim\(model\)\)\.backward\(\)"):
            losses[1 - order].backward()


def test_a_gradient_of_one_element_is_not_written_into_the_zero_that_others_share():
    zero = torch.zeros(())
    for _ in range(2):
        x = torch.ones(1, 1, requires_grad=True)
        rows = take_elements(x * 1, torch.zeros(1, 1, dtype=torch.int64), zero)
        rows.sum().backward()
        assert x.grad.item() == 1 and zero.item() == 0
