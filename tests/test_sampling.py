"""Positions and pooling against plain loops."""

import math

import pytest
import torch

from cmim_plugin.instances import Grid, Layout, spread

# -- spread --------------------------------------------------------------------------------------------------------

SIZES = [(5, 13), (4, 12), (1, 7), (7, 7), (256, 3000), (9, 4), (3, 1)]
each_size = pytest.mark.parametrize("n, total", SIZES, ids=lambda value: str(value))


def draws(count: int, n: int) -> torch.Tensor:
    return torch.rand(count, n, generator=torch.Generator().manual_seed(5))


@each_size
def test_positions_are_distinct_and_in_range(n, total):
    for draw in draws(50, n):
        positions = spread(draw, total).tolist()
        assert len(positions) == min(n, total)
        assert len(set(positions)) == len(positions)
        assert all(0 <= position < total for position in positions)


@pytest.mark.parametrize("n, total", [(5, 13), (4, 12), (1, 7), (6, 11), (10, 97)])
def test_every_position_of_an_interval_is_equally_likely_and_intervals_are_equally_long(n, total):
    repeats = 4000
    seen = [0] * total
    for position in spread(draws(repeats, n), total).flatten().tolist():
        seen[position] += 1
    start = 0
    for interval in range(n):
        end = (interval + 1) * total // n
        assert end - start in (total // n, -(-total // n))
        share = 1 / (end - start)
        deviation = math.sqrt(repeats * share * (1 - share))
        for position in range(start, end):
            assert abs(seen[position] - repeats * share) <= 5 * deviation, position
        start = end


def test_ranks_that_share_the_draws_draw_what_one_process_would():
    draw = draws(1, 12)[0]
    whole = spread(draw, 60).tolist()
    for ranks in (2, 3, 4):
        parts = []
        for rank in range(ranks):
            share = draw[rank * 12 // ranks : (rank + 1) * 12 // ranks]
            parts += [rank * 60 // ranks + position for position in spread(share, 60 // ranks).tolist()]
        assert parts == whole


def test_the_extremes_of_the_generator_stay_in_range():
    highest = 1 - 2**-24  # the largest float32 that torch.rand gives
    for total in (1, 2, 13, 1000, 2**24 + 1, 800_000):
        for value in (0.0, highest):
            positions = spread(torch.full((5,), value), total).tolist()
            assert len(set(positions)) == min(5, total)
            assert all(0 <= position < total for position in positions)


@pytest.mark.parametrize("n", [7, 8, 100])
def test_a_batch_with_fewer_positions_than_wanted_gives_each_once(n):
    for draw in draws(20, n):
        assert sorted(spread(draw, 7).tolist()) == list(range(7))


def test_the_same_numbers_give_the_same_positions():
    draw = draws(1, 8)[0]
    assert torch.equal(spread(draw, 50), spread(draw.clone(), 50))


# -- layouts -------------------------------------------------------------------------------------------------------


def sampled(layout: Layout, x: torch.Tensor, index: torch.Tensor) -> torch.Tensor:
    """As taps do."""
    return layout.sampled(x, index, Grid(layout, x.shape, x.stride(), x.device).offsets(index))


# shape, layout, channels, and the index within the tensor of (sample, position, channel), by hand
CASES = {
    "features": ((4, 3), Layout(None), 3, 1, lambda s, p, c: (s, c)),
    "maps": ((4, 3, 2, 5), Layout(2), 3, 10, lambda s, p, c: (s, c, p // 5, p % 5)),
    "maps, one position": ((4, 3, 1, 1), Layout(2), 3, 1, lambda s, p, c: (s, c, 0, 0)),
    "tokens": ((4, 5, 3), Layout(None), 3, 5, lambda s, p, c: (s, p, c)),
    "tokens in rows": ((4, 2, 5, 3), Layout(None), 3, 10, lambda s, p, c: (s, p // 5, p % 5, c)),
    "sequences": ((4, 3, 6), Layout(1), 3, 6, lambda s, p, c: (s, c, p)),
    "volumes": ((2, 3, 2, 2, 2), Layout(3), 3, 8, lambda s, p, c: (s, c, p // 4, p // 2 % 2, p % 2)),
    "flattened groups": ((4, 2, 3, 2, 2), Layout(2), 6, 4, lambda s, p, c: (s, c // 3, c % 3, p // 2, p % 2)),
    "windows of tokens": ((8, 5, 3), Layout(None, fold=2), 3, 10, lambda s, p, c: (2 * s + p // 5, p % 5, c)),
    "windows of maps": (
        (6, 3, 2, 2),
        Layout(2, fold=2),
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


@each_case
def test_pooling_is_the_mean_over_the_positions_of_each_sample(shape, layout, channels, positions, at):
    for x in memory_formats(shape):
        pooled = layout.pooled(x)
        assert pooled.shape == (shape[0] // layout.fold, channels)
        for sample in range(len(pooled)):
            for channel in range(channels):
                total = 0.0
                for position in range(positions):
                    total += x[at(sample, position, channel)].item()
                assert pooled[sample, channel].item() == pytest.approx(total / positions, abs=1e-12)


@each_case
def test_sampling_takes_the_channels_at_positions_counted_over_the_batch(shape, layout, channels, positions, at):
    total = shape[0] // layout.fold * positions
    assert shape[0] * layout.positions(torch.Size(shape)) == total
    index = torch.randperm(total)[: max(1, total // 2)]
    for x in memory_formats(shape):
        rows = sampled(layout, x, index)
        assert rows.shape == (len(index), channels)
        for row, place in enumerate(index.tolist()):
            for channel in range(channels):
                assert rows[row, channel].item() == x[at(place // positions, place % positions, channel)].item()


@each_case
def test_channels_are_counted(shape, layout, channels, positions, at):
    assert layout.channels(torch.Size(shape)) == channels


@each_case
def test_gradients_reach_the_activation(shape, layout, channels, positions, at):
    for x in memory_formats(shape):
        x.requires_grad_()
        (gradient,) = torch.autograd.grad(layout.pooled(x).sum(), x)
        assert torch.allclose(gradient, torch.full_like(x, 1 / positions))
        index = torch.tensor([0, shape[0] // layout.fold * positions - 1])
        rows = sampled(layout, x, index)
        (gradient,) = torch.autograd.grad((rows * torch.tensor([[1.0], [2.0]])).sum(), x)
        expected = torch.zeros_like(x)
        for channel in range(channels):
            expected[at(0, 0, channel)] += 1
            expected[at(shape[0] // layout.fold - 1, positions - 1, channel)] += 2
        assert torch.equal(gradient, expected)
        assert gradient.stride() == x.stride()


def test_the_gradient_of_an_overlapping_or_gapped_activation_is_right():
    for x in (torch.randn(4, 3, 5, 10)[..., ::2], torch.randn(4, 1, 5, 5).expand(4, 3, 5, 5)):
        x = x.detach().requires_grad_()
        layout = Layout(2)
        rows = sampled(layout, x, torch.tensor([7, 99]))
        (gradient,) = torch.autograd.grad(rows.sum(), x)
        expected = torch.zeros(4, 3, 5, 5)
        expected[0, :, 1, 2] = 1
        expected[3, :, 4, 4] = 1
        assert torch.equal(gradient, expected)


@pytest.mark.parametrize("channels_last", [False, True])
def test_a_gradient_that_lies_in_memory_in_another_way_than_the_activation_gets_its_rows(channels_last):
    formats = [torch.contiguous_format, torch.channels_last]
    x = torch.randn(2, 3, 2, 4).contiguous(memory_format=formats[channels_last]).requires_grad_()
    activation = x * 1
    towards = torch.randn(2, 3, 2, 4).contiguous(memory_format=formats[not channels_last])
    strides = []
    rows = sampled(Layout(spatial=2), activation, torch.tensor([1, 6, 11]))
    activation.register_hook(lambda grad: strides.append(grad.stride()))
    ((activation * towards).sum() + 3 * rows.sum()).backward()
    assert strides == [towards.stride()] and towards.stride() != x.stride()
    expected = towards.clone()
    for position in (1, 6, 11):
        image, place = divmod(position, 8)
        expected[image, :, place // 4, place % 4] += 3
    torch.testing.assert_close(x.grad, expected)


def test_gradients_of_gradients_pass_through_the_sampling():
    x = torch.randn(4, 3, 2, 2, dtype=torch.float64, requires_grad=True)
    layout = Layout(2)
    index = torch.tensor([1, 6, 15])
    assert torch.autograd.gradgradcheck(lambda t: sampled(layout, t, index).pow(3), x)


def test_what_shares_the_gradient_of_the_activation_stays_as_it_is():
    # Addition hands one and the same gradient to both of its arguments.
    a, b = (torch.randn(4, 3, 2, 2, dtype=torch.float64, requires_grad=True) for _ in range(2))
    x, shortcut = a * 2, b * 3
    layout = Layout(2)
    rows = sampled(layout, x, torch.tensor([0, 7, 15]))
    weight = torch.randn(4, 3, 2, 2, dtype=torch.float64)
    ((x + shortcut) * weight).sum().add(rows.sum()).backward()
    assert torch.equal(b.grad, 3 * weight)
    expected = 2 * weight
    for sample, row, column in ((0, 0, 0), (1, 1, 1), (3, 1, 1)):
        expected[sample, :, row, column] += 2
    assert torch.allclose(a.grad, expected)


def test_two_samples_of_one_activation_both_count_and_a_second_backward_adds_the_same():
    a = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    x = a * 2
    layout = Layout(None)
    first, second = (sampled(layout, x, torch.tensor(index)) for index in ([0, 2], [2, 3]))
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


def test_backward_holds_no_whole_map_for_a_sample_before_the_network_needs_it():
    x = (torch.randn(4, 3, 32, 32, requires_grad=True) * 1).sigmoid()
    layout = Layout(2)
    rows = sampled(layout, x, torch.tensor([1, 2]))
    held = []
    rows.grad_fn.register_hook(lambda gradients, _: held.append(gradients[0].untyped_storage().nbytes()))
    rows.sum().backward()
    assert held == [4]
