"""The heads against loops over rows, dimensions and channels, in float64."""

import pytest
import torch
from torch import Tensor

from cmim_plugin.heads import Heads

# Three taps: two widths, a tap that reads one of them on both sides, other numbers of rows.
CHANNELS = [(3, 4), (4, 4), (3, 4)]
ROWS = [5, 2, 5]
DIMENSIONS = 3
CHOICES = [[0, 1, 2], [0, 2], [1], [2, 0]]
each_choice = pytest.mark.parametrize("taps", CHOICES, ids=str)


def start(dtype: torch.dtype = torch.float64) -> tuple[Heads, list[tuple[Tensor, Tensor]]]:
    heads = Heads(CHANNELS, DIMENSIONS).double()
    rows = [
        tuple(torch.randn(n, width, dtype=torch.float64).to(dtype).requires_grad_() for width in pair)
        for n, pair in zip(ROWS, CHANNELS, strict=True)
    ]
    return heads, rows


def oracle(heads: Heads, taps: list[int], rows: list[tuple[Tensor, Tensor]]) -> Tensor:
    """All a_B, tap by tap, then all a_F."""
    sides = []
    for side in (0, 1):
        embeddings = []
        for tap in taps:
            weight, bias = heads.of(tap)[side]
            for row in rows[tap][side]:
                z = []
                for d in range(DIMENSIONS):
                    total = bias[d]
                    for c in range(len(row)):
                        total = total + weight[d, c] * row[c].double()
                    z.append(total)
                length = sum(value * value for value in z).sqrt()
                # Below that it divides, and has no part in the gradient.
                length = length if length >= 1e-6 else 1e-6
                embeddings.append(torch.stack([value / length for value in z]))
        sides.append(torch.stack(embeddings))
    return torch.stack(sides)


def gradients(z: Tensor, heads: Heads, rows: list[tuple[Tensor, Tensor]], **settings) -> list[Tensor | None]:
    towards = torch.randn(z.shape, dtype=z.dtype, generator=torch.Generator().manual_seed(1))
    wanted = [t for t in [*heads.parameters(), *(row for pair in rows for row in pair)] if t.requires_grad]
    return list(torch.autograd.grad(z, wanted, towards, allow_unused=True, **settings))


def assert_agrees(found: list[Tensor | None], expected: list[Tensor | None]) -> None:
    for f, e in zip(found, expected, strict=True):
        assert (f is None) == (e is None)
        if e is not None:
            torch.testing.assert_close(f, e, rtol=1e-9, atol=1e-9)


@each_choice
def test_embeddings_and_their_gradients_agree_with_loops(taps):
    heads, rows = start()
    z, expected = heads(taps, [rows[k] for k in taps]), oracle(heads, taps, rows)
    torch.testing.assert_close(z, expected, rtol=1e-9, atol=1e-9)
    wanted = gradients(expected, heads, rows)
    for i, parameter in enumerate(heads.parameters()):
        # Of a width that no chosen tap reads, too: every parameter takes part in every step.
        wanted[i] = torch.zeros_like(parameter) if wanted[i] is None else wanted[i]
    assert_agrees(gradients(z, heads, rows), wanted)


@each_choice
def test_gradients_and_their_gradients_agree_with_differences(taps):
    heads, rows = start()
    tensors = [*heads.parameters(), *(row for k in taps for row in rows[k])]

    def embedded(*tensors: Tensor) -> Tensor:
        given = tensors[len(list(heads.parameters())) :]
        return heads(taps, list(zip(given[::2], given[1::2], strict=True)), tensors[: -len(given)])

    assert torch.autograd.gradcheck(embedded, tensors)
    assert torch.autograd.gradgradcheck(embedded, tensors)


def test_with_a_graph_of_it_the_gradient_is_the_same_where_one_side_is_computed_from_the_other():
    heads, rows = start()
    row = rows[1][0]
    towards = torch.randn(2, len(row), DIMENSIONS, dtype=torch.float64)
    for other in (row, row.sin()):
        plain, with_graph = (
            torch.autograd.grad(heads([1], [(row, other)]), row, towards, retain_graph=True, create_graph=create_graph)
            for create_graph in (False, True)
        )
        torch.testing.assert_close(with_graph, plain)


def test_an_embedding_too_short_to_have_a_direction_is_divided_by_a_constant():
    heads, rows = start()
    with torch.no_grad():
        for parameter in heads.parameters():
            parameter.mul_(1e-9)
    z, expected = heads([0, 1, 2], rows), oracle(heads, [0, 1, 2], rows)
    assert z.norm(dim=2).max() < 0.1
    torch.testing.assert_close(z, expected, rtol=1e-9, atol=1e-12)
    for f, e in zip(gradients(z, heads, rows), gradients(expected, heads, rows), strict=True):
        torch.testing.assert_close(f, e, rtol=1e-9, atol=1e-12)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
def test_rows_in_half_precision_are_embedded_in_that_of_the_heads_and_get_gradients_of_their_own(dtype):
    heads, rows = start(dtype)
    z, expected = heads([0, 1, 2], rows), oracle(heads, [0, 1, 2], rows)
    torch.testing.assert_close(z, expected, rtol=1e-9, atol=1e-9)
    found, wanted = gradients(z, heads, rows), gradients(expected, heads, rows)
    for f, e in zip(found, wanted, strict=True):
        assert f.dtype == e.dtype
        # The loops round at every step.
        close = 1e-9 if f.dtype == torch.float64 else 0.05
        torch.testing.assert_close(f, e, rtol=close, atol=close)


def test_what_is_frozen_gets_no_gradient_and_changes_no_other():
    heads, rows = start()
    expected = dict(zip(range(10), gradients(heads([0, 1, 2], rows), heads, rows), strict=True))
    frozen = {0, 5}
    for i, tensor in enumerate([*heads.parameters(), *(row for pair in rows for row in pair)]):
        tensor.requires_grad_(i not in frozen)
    found = gradients(heads([0, 1, 2], rows), heads, rows)
    assert_agrees(found, [gradient for i, gradient in expected.items() if i not in frozen])


def test_a_backward_pass_within_autocast_gives_the_same_gradients():
    heads, rows = start(torch.float32)
    heads.float()
    z = heads([0, 1, 2], rows)
    expected = gradients(z, heads, rows, retain_graph=True)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        found = gradients(z, heads, rows)
    assert all(torch.equal(f, e) for f, e in zip(found, expected, strict=True))
