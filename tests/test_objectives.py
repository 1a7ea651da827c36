"""The objectives against double loops over anchors and candidates, written with the math module alone."""

import math
from functools import partial

import pytest
import torch
from torch import Tensor
from torch.autograd import forward_ad

from cmim_plugin import NCE, CMIMError, InfoNCE, count_negatives

SAMPLES = 50
DTYPES = {torch.float64: 1e-9, torch.float32: 1e-5, torch.bfloat16: 1e-5, torch.float16: 1e-5}
# What is excluded and what is added; -1 is no label.
LABELS = [0, 1, -1, 2, 0, -1, 1]
MASK = [True, False, True, True, True, False, True]
QUEUE_LABELS = [1, -1, 0, 4, -1]

info_nce, nce = InfoNCE(), NCE(num_samples=SAMPLES)
each_objective = pytest.mark.parametrize("objective", [info_nce, nce], ids=["info", "nce"])
# All choices of labels, mask and queue, which exclude candidates together, and each pair with objective and dtype.
each_mixture = pytest.mark.parametrize(
    "objective, dtype, labels, mask, queued",
    [
        (info_nce, torch.float64, None, None, False),
        (nce, torch.float64, LABELS, MASK, True),
        (nce, torch.float32, None, MASK, False),
        (info_nce, torch.float32, LABELS, None, True),
        (nce, torch.bfloat16, None, None, True),
        (info_nce, torch.bfloat16, LABELS, MASK, False),
        (info_nce, torch.float16, None, MASK, True),
        (nce, torch.float16, LABELS, None, False),
    ],
    ids=[
        *("info", "nce, all", "nce, mask", "info, labels and queue", "nce, queue", "info, labels and mask"),
        *("info, mask and queue", "nce, labels"),
    ],
)


def critic(anchor: list[float], candidate: list[float], temperature: float) -> float:
    return sum(a * c for a, c in zip(anchor, candidate, strict=True)) / temperature


def positive_and_negatives(anchors, candidates, queue, labels, queue_labels, temperature, mask):
    """For each anchor the score of its positive and the scores of its negatives."""
    for i, anchor in enumerate(anchors):
        if not mask[i]:
            continue
        negatives = []
        for j, candidate in enumerate(candidates):
            if j != i and mask[j] and (labels is None or labels[i] == -1 or labels[j] != labels[i]):
                negatives.append(critic(anchor, candidate, temperature))
        for j, candidate in enumerate(queue):
            if labels is None or labels[i] == -1 or queue_labels[j] != labels[i]:
                negatives.append(critic(anchor, candidate, temperature))
        yield critic(anchor, candidates[i], temperature), negatives


def info_nce_term(positive: float, negatives: list[float]) -> float:
    highest = max([positive, *negatives])
    total = math.exp(positive - highest)
    for score in negatives:
        total += math.exp(score - highest)
    return -(positive - highest - math.log(total))


def nce_term(positive: float, negatives: list[float], num_samples: int) -> float:
    if not negatives:
        return 0.0
    noise = len(negatives) / num_samples
    loss = math.log1p(noise * math.exp(-positive))  # -log h
    for score in negatives:
        loss += math.log1p(math.exp(score) / noise)  # -log (1 - h)
    return loss


def oracle(term, z_b, z_f, temperature, labels=None, queue_b=(), queue_f=(), queue_labels=(), mask=None):
    """The mean over both directions of the mean over the anchors."""
    mask = mask or [True] * len(z_b)
    directions = []
    for anchors, candidates, queue in ((z_b, z_f, queue_f), (z_f, z_b, queue_b)):
        losses = []
        for positive, negatives in positive_and_negatives(
            anchors, candidates, queue, labels, queue_labels, temperature, mask
        ):
            losses.append(term(positive, negatives))
        directions.append(sum(losses) / len(losses))
    return sum(directions) / 2


def unit(rows: int, dtype: torch.dtype = torch.float64) -> Tensor:
    z = torch.randn(rows, 6, dtype=torch.float64)
    return (z / z.norm(dim=1, keepdim=True)).to(dtype)


def queue_arguments(dtype: torch.dtype) -> dict[str, Tensor]:
    rows = len(QUEUE_LABELS)
    return {"queue_b": unit(rows, dtype), "queue_f": unit(rows, dtype), "queue_labels": torch.tensor(QUEUE_LABELS)}


def tensors(labels=None, mask=None) -> dict[str, Tensor]:
    given = {"labels": labels, "mask": mask}
    return {name: torch.tensor(value) for name, value in given.items() if value is not None}


@each_mixture
def test_the_loss_agrees_with_a_double_loop(objective, dtype, labels, mask, queued):
    for temperature in (0.01, 0.07, 1.0):
        z_b, z_f = unit(7, dtype), unit(7, dtype)
        queue = queue_arguments(dtype) if queued else {}
        loss = objective(z_b, z_f, temperature=temperature, **tensors(labels, mask), **queue)
        term = info_nce_term if objective is info_nce else partial(nce_term, num_samples=SAMPLES)
        lists = {name: tensor.tolist() for name, tensor in queue.items()}
        expected = oracle(term, z_b.tolist(), z_f.tolist(), temperature, labels, **lists, mask=mask)
        assert loss.shape == ()
        assert loss.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
        assert loss.item() == pytest.approx(expected, rel=DTYPES[dtype], abs=DTYPES[dtype])


@each_mixture
def test_gradients_agree_with_finite_differences(objective, dtype, labels, mask, queued):
    queue = queue_arguments(torch.float64) if queued else {}
    z_b, z_f = unit(7).requires_grad_(), unit(7).requires_grad_()
    loss = partial(objective, **tensors(labels, mask), **queue)
    assert torch.autograd.gradcheck(lambda b, f: loss(b, f, temperature=0.07), (z_b, z_f))
    assert torch.autograd.gradcheck(lambda b, f: loss(b, f, temperature=1.0), (z_b, z_f))


@pytest.mark.parametrize("objective, labels", [(info_nce, LABELS), (nce, None)])
def test_gradients_of_gradients_agree_with_finite_differences(objective, labels):
    z_b, z_f = unit(5).requires_grad_(), unit(5).requires_grad_()
    labels = None if labels is None else torch.tensor(labels[:5])
    assert torch.autograd.gradgradcheck(lambda b, f: objective(b, f, temperature=0.3, labels=labels), (z_b, z_f))


@each_objective
def test_transforms_of_torch_func_and_forward_mode_differentiate_the_loss(objective):
    z_b, z_f = unit(7).requires_grad_(), unit(7)
    expected, direction = torch.autograd.grad(objective(z_b, z_f), z_b)[0], unit(7)
    torch.testing.assert_close(torch.func.grad(objective)(z_b.detach(), z_f), expected)
    stacked = torch.func.vmap(torch.func.grad(objective))(z_b.detach().expand(2, -1, -1), z_f.expand(2, -1, -1))
    torch.testing.assert_close(stacked, expected.expand(2, -1, -1))
    with forward_ad.dual_level():
        slope = forward_ad.unpack_dual(objective(forward_ad.make_dual(z_b.detach(), direction), z_f)).tangent
    torch.testing.assert_close(slope, (expected * direction).sum())


def test_a_temperature_may_be_learned():
    z_b, z_f, temperature = unit(7), unit(7), torch.tensor(0.3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda t: info_nce(z_b, z_f, temperature=t), temperature)


def problems(labels, queued, mask=None) -> list[dict[str, Tensor]]:
    """Three sets of embeddings that share nothing."""
    found = []
    for shift in range(3):
        arguments = {"z_b": unit(7), "z_f": unit(7), **(queue_arguments(torch.float64) if queued else {})}
        if labels is not None:
            arguments["labels"] = torch.tensor(labels).roll(shift)
        elif queued:
            del arguments["queue_labels"]
        if mask is not None:
            arguments["mask"] = torch.tensor(mask).roll(shift)
        found.append(arguments)
    return found


@each_mixture
def test_problems_side_by_side_are_each_their_own(objective, dtype, labels, mask, queued):
    single = problems(labels, queued, mask)
    together = objective(**{name: torch.stack([p[name] for p in single]) for name in single[0]})
    assert together.shape == (3,)
    for loss, arguments in zip(together, single, strict=True):
        assert loss.item() == pytest.approx(objective(**arguments).item(), abs=1e-12)


def test_scaled_rows_are_contrasted_as_they_are():
    z_b, z_f = 3 * unit(5), 0.2 * unit(5)
    expected = oracle(info_nce_term, z_b.tolist(), z_f.tolist(), 0.5)
    assert info_nce(z_b, z_f, temperature=0.5).item() == pytest.approx(expected, rel=1e-9)


def test_both_directions_count_alike():
    z_b, z_f = unit(6), unit(6)
    queue = queue_arguments(torch.float64)
    swapped = {"queue_b": queue["queue_f"], "queue_f": queue["queue_b"]}
    there = info_nce(z_b, z_f, queue_b=queue["queue_b"], queue_f=queue["queue_f"])
    assert there.item() == pytest.approx(info_nce(z_f, z_b, **swapped).item(), rel=1e-12)


def test_the_default_temperature_is_a_tenth():
    z_b, z_f = unit(5), unit(5)
    assert torch.equal(info_nce(z_b, z_f), info_nce(z_b, z_f, 0.1))
    assert torch.equal(nce(z_b, z_f), nce(z_b, z_f, 0.1))


@pytest.mark.parametrize("dtype", [torch.int64, torch.int32, torch.uint16, torch.uint8, torch.bool], ids=str)
def test_entries_without_label_are_negatives_whatever_the_dtype_of_the_labels(dtype):
    z_b, z_f, queue = unit(3), unit(3), {"queue_b": unit(2), "queue_f": unit(2)}
    label = 255 if dtype == torch.uint8 else 1
    labels = torch.tensor([label, 0, label]).to(dtype)
    loss = info_nce(z_b, z_f, labels=labels, queue_labels=torch.tensor([-1, -1]), **queue)
    lists = {name: tensor.tolist() for name, tensor in queue.items()}
    expected = oracle(info_nce_term, z_b.tolist(), z_f.tolist(), 0.1, [1, 0, 1], **lists, queue_labels=[-1, -1])
    assert loss.item() == pytest.approx(expected, rel=1e-9)


# -- without negatives ---------------------------------------------------------------------------------------------


@each_objective
def test_masked_rows_get_no_gradient_and_may_hold_anything_finite(objective):
    z_b, z_f = unit(7).requires_grad_(), unit(7).requires_grad_()
    losses = []
    for content in (1.0, 1e3):
        given = [torch.where(torch.tensor(MASK)[:, None], z, content) for z in (z_b, z_f)]
        losses.append(objective(*given, mask=torch.tensor(MASK), temperature=1.0))
    assert losses[0].item() == pytest.approx(losses[1].item(), abs=1e-12)
    for z, grad in zip(
        (z_b, z_f), torch.autograd.grad(objective(z_b, z_f, **tensors(mask=MASK)), (z_b, z_f)), strict=True
    ):
        assert [bool(row.any()) for row in grad] == MASK
        assert z.shape == grad.shape


@pytest.mark.parametrize("objective, kept", [(info_nce, 0), (nce, 1)])
def test_a_mask_that_leaves_no_negative_gives_zero(objective, kept):
    z_b, z_f = unit(4).requires_grad_(), unit(4).requires_grad_()
    loss = objective(z_b, z_f, mask=torch.arange(4) < kept)
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-12)
    assert z_b.grad.abs().max() < 1e-12 and z_f.grad.abs().max() < 1e-12


@each_objective
@pytest.mark.parametrize("rows, labels", [(1, None), (4, [2, 2, 2, 2])], ids=["one", "class"])
def test_without_negatives_loss_and_gradient_are_zero(objective, rows, labels):
    z_b, z_f = unit(rows).requires_grad_(), unit(rows).requires_grad_()
    loss = objective(z_b, z_f, labels=None if labels is None else torch.tensor(labels))
    loss.backward()
    assert loss.item() == pytest.approx(0, abs=1e-12)
    for z in (z_b, z_f):
        assert z.grad.isfinite().all()
        assert z.grad.abs().max() < 1e-12


@each_objective
def test_one_class_in_batch_and_queue_leaves_no_negative(objective):
    z_b, z_f = unit(3).requires_grad_(), unit(3).requires_grad_()
    queue = {"queue_b": unit(2), "queue_f": unit(2), "queue_labels": torch.tensor([7, 7])}
    loss = objective(z_b, z_f, labels=torch.tensor([7, 7, 7]), **queue)
    assert loss.item() == pytest.approx(0, abs=1e-12)
    loss.backward()
    assert z_b.grad.abs().max() < 1e-12 and z_f.grad.abs().max() < 1e-12


@each_objective
def test_identical_rows_give_a_finite_loss_and_gradient(objective):
    z = torch.ones(6, 4) / 2
    z_b, z_f = z.clone().requires_grad_(), z.clone().requires_grad_()
    loss = objective(z_b, z_f, temperature=0.01)
    loss.backward()
    assert loss.isfinite() and z_b.grad.isfinite().all() and z_f.grad.isfinite().all()


@each_objective
def test_scores_beyond_the_range_of_exp_stay_finite(objective):
    z_b, z_f = unit(5, torch.float32).requires_grad_(), unit(5, torch.float32).requires_grad_()
    loss = objective(z_b, z_f, temperature=1e-3)
    loss.backward()
    assert loss.isfinite() and z_b.grad.isfinite().all() and z_f.grad.isfinite().all()


# -- bounds --------------------------------------------------------------------------------------------------------


def test_uninformative_embeddings_bound_the_information_by_about_zero():
    same = torch.ones(16, 4, dtype=torch.float64) / 2
    assert info_nce.bound(info_nce(same, same), 15).item() == pytest.approx(0, abs=1e-6)
    independent = info_nce.bound(info_nce(unit(400), unit(400), 1.0), 399).item()
    assert -0.3 < independent < 0.05


def test_perfect_embeddings_bound_the_information_by_the_log_of_the_candidates():
    z = torch.eye(16, dtype=torch.float64)
    assert info_nce.bound(info_nce(z, z, 0.02), 15).item() == pytest.approx(math.log(16), abs=1e-6)
    # With a queue of negatives that are as easily told apart, more can be said.
    queue = -torch.eye(16, dtype=torch.float64)
    loss = info_nce(z, z, 0.02, queue_b=queue, queue_f=queue)
    assert info_nce.bound(loss, 31).item() == pytest.approx(math.log(32), abs=1e-6)


def test_perfect_embeddings_bound_the_information_of_nce_by_the_log_of_the_negatives():
    # Two classes at opposite poles, and only the other class is a negative.
    z = torch.tensor([[1.0, 0.0]] * 4 + [[-1.0, 0.0]] * 4, dtype=torch.float64)
    labels = torch.tensor([0] * 4 + [1] * 4)
    assert nce.bound(nce(z, z, 0.01, labels), 4).item() == pytest.approx(math.log(4), abs=1e-6)


@pytest.mark.parametrize("count", [1, 4096])
def test_bounds_follow_their_formulas(count):
    loss = torch.tensor(0.75)
    assert info_nce.bound(loss, count).item() == pytest.approx(math.log(count + 1) - 0.75, rel=1e-6)
    assert nce.bound(loss, count).item() == pytest.approx(math.log(count) - 0.75, rel=1e-6, abs=1e-6)
    assert info_nce.bound(0.75, count).item() == info_nce.bound(loss, count).item()


def test_bounds_average_over_anchors_with_different_numbers_of_negatives():
    counts = [1, 3, 8]
    expected = sum(math.log(n + 1) for n in counts) / 3 - 0.5
    assert info_nce.bound(0.5, torch.tensor(counts)).item() == pytest.approx(expected, rel=1e-6)
    expected = sum(math.log(n) for n in counts) / 3 - 0.5
    assert nce.bound(0.5, torch.tensor(counts)).item() == pytest.approx(expected, rel=1e-6)


def test_bounds_without_negatives_are_finite():
    assert info_nce.bound(torch.tensor(0.0), torch.tensor([0, 0])).item() == 0
    assert nce.bound(torch.tensor(0.0), torch.tensor([0, 0])).item() == 0


@pytest.mark.parametrize("mask", [None, MASK], ids=["unmasked", "masked"])
def test_negatives_are_counted_as_a_loop_counts_them(mask):
    expected, kept = [], mask or [True] * 7
    for i in range(len(LABELS)):
        count = 0
        for j in range(len(LABELS)):
            count += j != i and kept[j] and (LABELS[i] == -1 or LABELS[j] != LABELS[i])
        for label in QUEUE_LABELS:
            count += LABELS[i] == -1 or label != LABELS[i]
        expected.append(count)
    given = None if mask is None else torch.tensor(mask)
    found = count_negatives(7, torch.tensor(LABELS), torch.tensor(QUEUE_LABELS), len(QUEUE_LABELS), given)
    assert found.tolist() == expected
    assert count_negatives(7).tolist() == [6] * 7
    assert count_negatives(7, queue=5).tolist() == [11] * 7
    assert count_negatives(3, torch.tensor([1, 1, 1])).tolist() == [0, 0, 0]


# -- autocast ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("objective, dtype", [(info_nce, torch.bfloat16), (nce, torch.float32)])
def test_autocast_does_not_change_the_loss_or_its_gradient(objective, dtype):
    results = []
    start_b, start_f, queue = unit(7, dtype), unit(7, dtype), queue_arguments(torch.float32)
    for enabled in (False, True):
        z_b, z_f = start_b.clone().requires_grad_(), start_f.clone().requires_grad_()
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            loss = objective(z_b, z_f, temperature=0.07, labels=torch.tensor(LABELS), **queue)
        loss.backward()
        results.append((loss, z_b.grad, z_f.grad))
    for plain, autocast in zip(*results, strict=True):
        assert plain.dtype == autocast.dtype
        assert torch.equal(plain, autocast)


# -- errors --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "arguments, said",
    [
        ({"z_f": unit(5)}, r"\(7, 6\) and \(5, 6\)"),
        ({"z_b": torch.zeros(7), "z_f": torch.zeros(7)}, r"\(7,\) and \(7,\)"),
        ({"z_b": torch.zeros(7, 6, dtype=torch.int64)}, "floating point; found torch.int64 and torch.float64"),
        ({"temperature": 0}, "temperature must be positive; found 0"),
        ({"temperature": math.nan}, "found nan"),
        ({"labels": torch.zeros(6, dtype=torch.int64)}, r"of shape \(7,\), one a row; found shape \(6,\)"),
        ({"labels": torch.zeros(7)}, r"found shape \(7,\), torch.float32"),
        (
            {"mask": torch.ones(6, dtype=torch.bool)},
            r"mask must be bool of shape \(7,\), one a row; found shape \(6,\)",
        ),
        ({"mask": torch.ones(7)}, r"found shape \(7,\), torch.float32"),
        ({"z_b": torch.zeros(0, 6), "z_f": torch.zeros(0, 6)}, "there is no instance to contrast"),
        ({"z_b": torch.zeros(7, 6)}, "both be float64 or neither"),
        ({"queue_b": unit(3)}, "go together"),
        ({"queue_f": unit(3)}, "go together"),
        ({"queue_b": unit(3), "queue_f": unit(4)}, r"\(3, 6\) and \(4, 6\)"),
        ({"queue_b": torch.zeros(6), "queue_f": torch.zeros(6)}, r"\(entries, 6\); found \(6,\) and \(6,\)"),
        ({"queue_b": torch.zeros(3, 5), "queue_f": torch.zeros(3, 5)}, r"\(entries, 6\); found \(3, 5\)"),
        (
            {"queue_b": unit(3), "queue_f": unit(3), "labels": torch.tensor(LABELS)},
            r"need queue_labels, integers of shape \(3,\) .* found None",
        ),
        (
            {"queue_b": unit(3), "queue_f": unit(3), "labels": torch.tensor(LABELS), "queue_labels": torch.zeros(2)},
            r"need queue_labels, integers of shape \(3,\) .* found \(2,\)",
        ),
    ],
)
def test_what_does_not_fit_is_named(arguments, said):
    with pytest.raises(CMIMError, match=said):
        info_nce(**{"z_b": unit(7), "z_f": unit(7), **arguments})


def test_nce_needs_a_positive_number_of_training_samples():
    with pytest.raises(CMIMError, match="num_samples must be a positive number, of the training set; found 0"):
        NCE(0)
