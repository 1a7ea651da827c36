"""A report says what the binary activations hold, against plain loops over them, and moves nothing of the training."""

import csv
import math
import pickle
import random
import sys
from functools import partial

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

import networks
from cmim_plugin import CMIM, NCE, CMIMError, CMIMWarning, InfoNCE, Report, distributed
from cmim_plugin import report as inside
from networks import BIREAL, IRNET, REACTNET, assert_same, full_precision, random_states

each_instance = pytest.mark.parametrize("instances", ["image", "position"])
each_mixture = pytest.mark.parametrize(
    "recipe, instances",
    [(IRNET, "image"), (BIREAL, "position"), (REACTNET, "image")],
    ids=["IR-Net, images", "Bi-Real, positions", "ReActNet, images"],
)

# As many positions a batch as those whose codes a report keeps: 4 images of 4 x 4.
BATCH, PLACES = 4, 16


def batches(count=3, seed=1) -> list[tuple[Tensor, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    return [
        (torch.randn(BATCH, 2, 4, 4, generator=generator), torch.randint(4, (BATCH,), generator=generator))
        for _ in range(count)
    ]


HELD_OUT = batches()
X = HELD_OUT[0][0]


def network(recipe=BIREAL, seed=0) -> nn.Module:
    """Two binary activations of 4 channels at 4 x 4 places, in a network whose running statistics have moved."""
    model = networks.network(recipe, seed=seed)
    with torch.no_grad():
        for x, _ in batches(4, seed=9):
            model(2 * x + 0.3)
    return model


def attached(recipe=BIREAL, **settings) -> tuple[nn.Module, CMIM]:
    model = network(recipe)
    return model, CMIM(model, X, **settings)


def trained(model: nn.Module, cmim: CMIM, steps=3, between=lambda: None) -> list[float]:
    """Some steps of training; the losses."""
    optimizer = torch.optim.SGD(model.parameters(), 0.5, momentum=0.9)
    losses = []
    for x, y in batches(steps, seed=5):
        between()
        loss = nn.functional.cross_entropy(model.train()(x), y)
        between()
        loss = loss + 3 * cmim(model)
        between()
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(loss.item())
    return losses


def activations(model: nn.Module, module: str, loader, side="input") -> list[Tensor]:
    """What a module of the model was given (or gave), batch by batch, seen by a hook of the test's own."""
    seen = []

    def hook(module, args, output):
        seen.append((args[0] if side == "input" else output).clone())

    handle = model.get_submodule(module).register_forward_hook(hook)
    modes = [m.training for m in model.modules()]
    model.eval()
    with torch.no_grad():
        for x, _ in loader:
            model(x)
    handle.remove()
    for m, mode in zip(model.modules(), modes, strict=True):
        m.training = mode
    return seen


def latents(model, tap, recipe, loader=HELD_OUT) -> list[Tensor]:
    """a_F of a tap: ReActNet shifts what the module is given, channel by channel, before it takes the sign."""
    found = activations(model, tap.module, loader)
    if recipe is REACTNET:
        shift = model.get_submodule(tap.module).shift.bias.detach()
        found = [x + shift for x in found]
    return found


# -- the figures, against plain loops ------------------------------------------------------------------------------


def instances_of(x: Tensor, instances: str) -> list[list[float]]:
    """The channels of each image, averaged, or of each position."""
    rows = []
    for image in x.tolist():
        places = list(zip(*[[v for line in channel for v in line] for channel in image], strict=True))
        if instances == "position":
            rows += [list(place) for place in places]
        else:
            rows.append([sum(values) / len(values) for values in zip(*places, strict=True)])
    return rows


def embedded(rows: list[list[float]], head: Tensor) -> list[list[float]]:
    found = []
    for row in rows:
        z = [sum(w * v for w, v in zip(weights, row, strict=True)) for weights in head.T.tolist()]
        length = max(math.sqrt(sum(v * v for v in z)), 1e-6)
        found.append([v / length for v in z])
    return found


def loop_info_nce(scores: list[list[float]]) -> float:
    n = len(scores)
    loss = 0.0
    for i in range(n):
        loss -= math.log(math.exp(scores[i][i]) / sum(math.exp(scores[i][j]) for j in range(n)))
        loss -= math.log(math.exp(scores[i][i]) / sum(math.exp(scores[j][i]) for j in range(n)))
    return math.log(n) - loss / (2 * n)


def loop_nce(scores: list[list[float]], num_samples: int) -> float:
    n = len(scores)
    loss = 0.0
    for i in range(n):
        for j in range(n):
            h = math.exp(scores[i][j]) / (math.exp(scores[i][j]) + (n - 1) / num_samples)
            # Each pair once for its row and once for its column.
            loss -= 2 * (math.log(h) if i == j else math.log(1 - h))
    return math.log(n - 1) - loss / (2 * n)


def loop_retrieved(scores: list[float], own: int) -> float:
    """1 where its own is the nearest, one in k where k are as near: clipped latents are often the same."""
    if any(score > scores[own] + 1e-6 for score in scores):
        return 0.0
    return 1 / sum(score > scores[own] - 1e-6 for score in scores)


def loop_contrast(cmim, k, latent, instances, bound=loop_info_nce, binary=None) -> tuple[float, float]:
    """Bound in nats and retrieval, each batch counted by its instances."""
    bounds = found = count = 0.0
    for a_f, a_b in zip(latent, binary or [torch.where(x >= 0, 1.0, -1.0) for x in latent], strict=True):
        of_b, of_f = cmim.heads.weights_of(k)
        z_b = embedded(instances_of(a_b, instances), of_b)
        z_f = embedded(instances_of(a_f, instances), of_f)
        near = [[sum(p * q for p, q in zip(b, f, strict=True)) for f in z_f] for b in z_b]
        bounds += len(z_b) * bound([[s / cmim.contrast.temperature for s in row] for row in near])
        found += sum(loop_retrieved(row, i) for i, row in enumerate(near))
        count += len(z_b)
    return bounds / count, found / count


@each_mixture
def test_bound_and_retrieval_are_those_of_a_plain_loop_in_eval_mode(recipe, instances):
    model, cmim = attached(recipe, instances=instances, temperature=0.2, embed_dim=6, num_positions=BATCH * PLACES)
    trained(model, cmim)
    loader = [*HELD_OUT, (X[:3] + 1, None)]
    report = cmim.report(model, loader)
    assert (report.samples, report.batches) == (15, 4)
    assert [tap.name for tap in report.taps] == [tap.name for tap in cmim.taps]
    assert len(report.taps) == 2
    for k, tap in enumerate(report.taps):
        bound, retrieval = loop_contrast(cmim, k, latents(model, cmim.taps[k], recipe, loader), instances)
        assert tap.bound == pytest.approx(bound, abs=1e-4)
        assert tap.retrieval == pytest.approx(retrieval, abs=1e-5)
        each = PLACES if instances == "position" else 1
        sizes = [4 * each] * 3 + [3 * each]
        assert tap.ceiling == pytest.approx(sum(n * math.log(n) for n in sizes) / sum(sizes))
        assert tap.kept == tap.bound / tap.ceiling


def test_the_bound_is_that_of_the_objective():
    model, cmim = attached(instances="image", objective=NCE(num_samples=50), temperature=0.3)
    report = cmim.report(model, HELD_OUT)
    for k, tap in enumerate(report.taps):
        bound, _ = loop_contrast(
            cmim, k, latents(model, cmim.taps[k], BIREAL), "image", partial(loop_nce, num_samples=50)
        )
        assert tap.bound == pytest.approx(bound, abs=1e-4)


@each_instance
def test_with_a_teacher_its_activations_stand_in_for_the_latents(instances):
    other = network(full_precision(BIREAL), seed=3)
    model, cmim = attached(instances=instances, teacher=other, num_positions=64)
    before = pickle.dumps(other)
    report = cmim.report(model, HELD_OUT)
    assert pickle.dumps(other) == before
    for k, tap in enumerate(report.taps):
        bound, retrieval = loop_contrast(
            cmim,
            k,
            activations(other, tap.name, HELD_OUT, "output"),
            instances,
            binary=[torch.where(x >= 0, 1.0, -1.0) for x in latents(model, cmim.taps[k], BIREAL)],
        )
        assert (tap.bound, tap.retrieval) == pytest.approx((bound, retrieval), abs=1e-3)


def test_positions_are_sampled_as_many_as_in_training_and_the_same_ones_by_every_report():
    model, cmim = attached(num_positions=10)
    first = cmim.report(model, HELD_OUT)
    trained(model, cmim, steps=1)  # moves the positions of the training
    model.load_state_dict(network().state_dict())
    cmim.load_state_dict(attached(num_positions=10)[1].state_dict())
    second = cmim.report(model, HELD_OUT)
    assert second.taps == first.taps
    assert all(tap.ceiling == pytest.approx(math.log(10)) for tap in first.taps)
    twice = cmim.report(model, [HELD_OUT[0], HELD_OUT[0]])
    once = cmim.report(model, [HELD_OUT[0]])
    assert twice.taps[0].bound != once.taps[0].bound  # other positions in each batch


@pytest.mark.parametrize("recipe", [IRNET, REACTNET], ids=["IR-Net", "ReActNet"])
def test_plus_dead_and_saturated_are_those_of_a_plain_loop_over_all_positions(recipe):
    model, cmim = attached(recipe, num_positions=3)
    with torch.no_grad():
        model.bn1.bias[0] = 100.0  # after the nonlinearity still above zero, everywhere
        model.bn1.bias[2] = -100.0
        model.bn1.bias[3] = 0.7
    report = cmim.report(model, HELD_OUT)
    for tap, found in zip(cmim.taps, report.taps, strict=True):
        higher, total = [0] * tap.channels, 0
        for a_f in latents(model, tap, recipe):
            for image in a_f.tolist():
                for channel, lines in enumerate(image):
                    higher[channel] += sum(v >= 0 for line in lines for v in line)
                total += PLACES
        assert found.channels == tap.channels
        assert found.plus == pytest.approx(sum(higher) / (total * tap.channels), abs=1e-12)
        assert found.dead == sum(count == 0 for count in higher)
        assert found.saturated == sum(count == total for count in higher)
    assert (report.taps[0].dead, report.taps[0].saturated) == (1, 1)


class Codes(torch.autograd.Function):
    """What `codes` makes of +1 and -1, and a straight-through gradient."""

    @staticmethod
    def forward(ctx, x, codes):
        return codes(torch.where(x >= 0, 1.0, -1.0))

    @staticmethod
    def backward(ctx, grad):
        return grad, None


class Binarize(nn.Module):
    def __init__(self, codes):
        super().__init__()
        self.codes = codes

    def forward(self, x):
        return Codes.apply(x, self.codes)


SCALES = torch.tensor([0.1, 3.0, 1.0, 0.5])[:, None, None]
CODES = {
    "-1, 1": lambda s: s,
    "0, 1": lambda s: (s + 1) / 2,
    "both above zero": lambda s: 0.7 + 0.6 * s,
    "both below zero": lambda s: -0.7 + 0.6 * s,
    "a scale a channel": lambda s: SCALES * s,
    "zero and a scale a channel": lambda s: SCALES * (s + 1),
    "a scale a sample": lambda s: torch.tensor([0.2, 1.0, 4.0, 0.6])[: len(s), None, None, None] * s,
    "in half precision": lambda s: (0.7 + 0.6 * s).half().float(),
}


@pytest.mark.parametrize("codes", CODES.values(), ids=CODES)
def test_the_higher_code_is_found_whatever_the_two_values_are(codes):
    model = nn.Sequential(nn.Conv2d(2, 4, 3), Binarize(codes), nn.Conv2d(4, 3, 2), nn.Flatten())
    model[0].bias.data[1] += 0.5
    loader = [(x.repeat(1, 1, 2, 2),) for x, _ in HELD_OUT]
    # A batch of 8 for the dry run has no scales a sample here: it takes the example's.
    cmim = CMIM(model, loader[0][0], instances="image")
    report = cmim.report(model, loader)
    above = torch.cat([model[0](x) >= 0 for (x,) in loader])
    assert report.taps[0].plus == pytest.approx(above.double().mean().item(), abs=1e-9)
    assert 0.2 < report.taps[0].plus < 0.8


def test_tokens_have_their_channels_last():
    model = nn.Sequential(nn.Linear(3, 5), Binarize(CODES["-1, 1"]), nn.Linear(5, 2))
    x = torch.randn(6, 7, 3)
    model[0].bias.data[:] = torch.tensor([99.0, -99.0, -99.0, 0.0, 0.0])
    report = CMIM(model, x).report(model, [x])
    assert (report.taps[0].saturated, report.taps[0].dead) == (1, 2)
    assert report.taps[0].plus == pytest.approx((model[0](x) >= 0).double().mean().item(), abs=1e-9)


class Padded(nn.Sequential):
    def forward(self, x, attention_mask=None):
        return super().forward(x)


def test_padding_is_neither_counted_nor_contrasted():
    torch.manual_seed(0)
    model = Padded(nn.Linear(3, 5), Binarize(CODES["-1, 1"]), nn.Linear(5, 2))
    x, mask = torch.randn(6, 7, 3), torch.ones(6, 7, dtype=torch.int64)
    mask[1:, 4:] = 0
    cmim = CMIM(model, x, num_positions=42)

    def report(padding: float) -> Report:
        batch = {"x": torch.where(mask[..., None] > 0, x, padding), "attention_mask": mask}
        return cmim.report(model, [batch], inputs=dict)

    found = report(0.0)
    assert found.taps == report(99.0).taps
    counted = mask.bool()
    assert found.taps[0].plus == pytest.approx((model[0](x)[counted] >= 0).double().mean().item(), abs=1e-9)
    assert found.taps[0].ceiling == pytest.approx(math.log(int(counted.sum())))
    # A mask of floats may be additive, and is not read.
    as_floats = {"x": x, "attention_mask": mask.float()}
    assert cmim.report(model, [as_floats], inputs=dict).taps[0].ceiling == pytest.approx(math.log(42))


@pytest.mark.parametrize("codes", ["-1, 1", "0, 1"])
@pytest.mark.parametrize("bias", [99.0, -99.0])
def test_a_layer_of_one_code_is_dead_or_saturated_by_its_sign(codes, bias):
    model = nn.Sequential(nn.Linear(3, 5), Binarize(CODES[codes]), nn.Linear(5, 2))
    x = torch.randn(6, 7, 3)
    cmim = CMIM(model, x)
    nn.init.constant_(model[0].bias, bias)
    tap = cmim.report(model, [x]).taps[0]
    assert (tap.dead, tap.saturated) == ((0, 5) if bias > 0 else (5, 0))


def test_a_layer_that_tells_nothing_apart_has_a_bound_of_zero_and_retrieves_by_chance():
    model, cmim = attached(instances="image")
    model.conv1.weight.data.zero_()
    report = cmim.report(model, HELD_OUT)
    assert report.taps[0].bound == pytest.approx(0, abs=1e-5)
    assert report.taps[0].retrieval == pytest.approx(1 / BATCH)
    assert report.taps[0].dead + report.taps[0].saturated == 4


def test_retrieval_of_rows_that_are_as_near_as_each_other_is_that_of_a_plain_loop():
    z_b, z_f = nn.functional.normalize(torch.randn(2, 23, 6), dim=2)
    z_f[5:8] = z_b[6]  # three are as near as each other
    z_b[20], z_b[1] = z_f[20], z_f[1]
    found = inside._retrieved(z_b, z_f)
    near = [[sum(p * q for p, q in zip(b, f, strict=True)) for f in z_f.tolist()] for b in z_b.tolist()]
    assert found == pytest.approx(sum(loop_retrieved(row, i) for i, row in enumerate(near)))
    assert found % 1 == pytest.approx(1 / 3) and found > 2


def test_batches_of_one_instance_have_codes_but_nothing_to_contrast():
    model, cmim = attached(instances="image")
    report = cmim.report(model, [X[:1], X[1:2]])
    for tap in report.taps:
        assert (tap.bound, tap.ceiling, tap.retrieval, tap.kept) == (None, None, None, None)
        assert 0 < tap.plus < 1
    assert report.worst == "" and "loses" not in str(report)
    mixed = cmim.report(model, [X[:1], X])
    assert mixed.taps[0].bound == pytest.approx(cmim.report(model, [X]).taps[0].bound)


def test_an_objective_of_the_users_own_has_no_bound_and_the_retrieval_says_who_loses():
    def own(z_b, z_f, *, temperature, labels):
        raise AssertionError("not asked for")

    model, cmim = attached(objective=own)
    report = cmim.report(model, HELD_OUT)
    assert [tap.bound for tap in report.taps] == [None, None]
    assert report.worst == min(report.taps, key=lambda tap: tap.retrieval).name
    assert not any(key.endswith("/bound") for key in report.scalars())


def test_a_bound_of_the_users_own_gets_the_number_of_negatives_as_a_tensor_as_in_training():
    class Own(InfoNCE):
        def bound(self, loss, num_negatives):
            return num_negatives.log1p().mean() - loss

    model, cmim = attached(objective=Own())
    trained(model, cmim, steps=1)
    plain = attached()
    trained(*plain, steps=1)
    assert cmim.scalars() == pytest.approx(plain[1].scalars())
    assert cmim.report(model, HELD_OUT) == plain[1].report(plain[0], HELD_OUT)


@pytest.mark.filterwarnings("error:Casting complex")
@pytest.mark.parametrize(
    "read, x",
    [
        (lambda x: x.to_dense(), torch.eye(8).to_sparse()),
        (lambda x: x.to_padded_tensor(0.0), torch.nested.nested_tensor([X[0].view(-1, 8), X[1:3].reshape(-1, 8)])),
        (lambda x: torch.view_as_real(x).flatten(1), torch.arange(16).view(4, 4) * 1j),
    ],
    ids=["sparse", "nested", "complex"],
)
def test_inputs_of_any_layout_are_reported_on(read, x):
    model = nn.Sequential(nn.Linear(8, 5), Binarize(CODES["-1, 1"]), nn.Linear(5, 2))
    model.register_forward_pre_hook(lambda module, args: read(*args))
    cmim = CMIM(model, x)
    report = cmim.report(model, [(x, None)])
    assert report.taps[0].channels == 5 and 0 < report.taps[0].plus < 1


def test_a_pickled_report_is_the_same_report():
    model, cmim = attached()
    report = cmim.report(model, HELD_OUT)
    loaded = pickle.loads(pickle.dumps(report))
    assert loaded == report and str(loaded) == str(report)


# -- nothing of the training moves ---------------------------------------------------------------------------------


def everything(model: nn.Module, cmim: CMIM) -> list:
    """What a report could move, bit by bit."""
    seen = [pickle.dumps(model), random_states(), [m.training for m in cmim.modules()]]
    state = cmim.state_dict()
    seen.append({key: value.tolist() for key, value in state.items() if isinstance(value, Tensor)})
    seen.append({name: {key: v.item() for key, v in row.items()} for name, row in cmim.metrics.items()})
    for name, module in model.named_modules():
        hooks = {key: list(value) for key, value in vars(module).items() if "hooks" in key}
        seen.append((name, module.training, hooks))
    for p in model.parameters():
        seen.append((id(p), p._version, p.requires_grad, None if p.grad is None else p.grad.tolist()))
    return seen


class Noisy(TensorDataset):
    """Augments with each of the generators that there are."""

    def __getitem__(self, index):
        x, y = super().__getitem__(index)
        return x + 0.1 * torch.randn(()) + 0.1 * np.random.rand() + 0.1 * random.random(), y  # noqa: NPY002


@pytest.mark.parametrize("instances, training", [("image", False), ("position", True)])
def test_a_report_moves_nothing(instances, training):
    model, cmim = attached(instances=instances, queue_size=6, num_positions=6)
    trained(model, cmim)
    model.train(training)
    model.bn1.train(not training)
    x, y = (torch.cat(parts) for parts in zip(*HELD_OUT, strict=True))
    before = everything(model, cmim)
    cmim.report(model, DataLoader(Noisy(x, y), 4, shuffle=True))
    assert everything(model, cmim) == before


def test_a_report_that_fails_moves_nothing():
    model, cmim = attached()
    trained(model, cmim)
    before = everything(model, cmim)
    with pytest.raises(RuntimeError):
        cmim.report(model, [X, X[:, :1]])
    assert everything(model, cmim) == before

    def interrupted():
        yield X
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        cmim.report(model, interrupted())
    assert everything(model, cmim) == before


@pytest.mark.parametrize("recipe, instances", [(IRNET, "position"), (BIREAL, "image")])
def test_training_goes_on_bit_by_bit_wherever_a_report_is_made(recipe, instances):
    losses, states = [], []
    for reported in (False, True):
        model, cmim = attached(recipe, instances=instances, queue_size=6, num_positions=6)
        reports = []

        def between(model=model, cmim=cmim, reports=reports, reported=reported):
            if reported:
                reports.append(cmim.report(model, HELD_OUT))

        losses.append(trained(model, cmim, 2, between))
        states.append([*model.state_dict().values(), *cmim.state_dict().values()])
        assert len(reports) == 6 * reported
    assert losses[1] == losses[0]
    assert_same(states[1], states[0])


def test_a_report_runs_without_gradients_and_leaves_no_graph():
    model, cmim = attached()
    seen = []
    model.fc.register_forward_hook(lambda module, args, output: seen.append(output))
    cmim.report(model, HELD_OUT)
    assert len(seen) == 3 and not any(output.requires_grad for output in seen)
    assert all(p.grad is None for p in model.parameters())
    assert not cmim.heads.weights.grad.any()


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_the_mode_of_the_model_and_around_it_makes_no_difference(training):
    model, cmim = attached()
    expected = cmim.report(model, HELD_OUT)
    model.train(training)
    assert cmim.report(model, HELD_OUT) == expected
    with cmim.paused():
        assert cmim.report(model, HELD_OUT) == expected
    with torch.inference_mode():
        assert cmim.report(model, HELD_OUT) == expected
    with torch.device("meta"):  # a default device does not reach it
        assert cmim.report(model, HELD_OUT) == expected


def test_float64_and_autocast_do_not_change_how_the_figures_are_made():
    model, cmim = attached()
    expected = cmim.report(model, HELD_OUT)
    double = attached()
    report = double[1].double().report(double[0].double(), [x.double() for x, _ in HELD_OUT])
    for tap, other in zip(report.taps, expected.taps, strict=True):
        assert tap.bound == pytest.approx(other.bound, abs=1e-4)
        assert tap.retrieval == pytest.approx(other.retrieval, abs=1e-5)
    z_f = nn.functional.normalize(torch.randn(300, 3), dim=1)
    z_b = nn.functional.normalize(z_f + 0.02 * torch.randn(300, 3), dim=1)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert all(tap.bound is not None for tap in cmim.report(model, HELD_OUT).taps)
        found = inside._retrieved(z_b, z_f)
    assert found == inside._retrieved(z_b, z_f) > 100


def test_figures_of_nan_are_not_those_of_a_good_layer():
    model, cmim = attached()
    cmim.heads.weights_of(0)[1].fill_(math.nan)
    tap = cmim.report(model, HELD_OUT).taps[0]
    assert math.isnan(tap.bound) and tap.retrieval == 0


def test_the_queue_gives_no_negatives():
    plain, queued = (attached(instances="image", queue_size=size) for size in (0, 8))
    trained(*queued, steps=2)
    queued[0].load_state_dict(plain[0].state_dict())
    queued[1].heads.load_state_dict(plain[1].heads.state_dict())
    assert queued[1].report(queued[0], HELD_OUT).taps == plain[1].report(plain[0], HELD_OUT).taps


# -- loaders -------------------------------------------------------------------------------------------------------


class Shifted(nn.Module):
    """Two inputs."""

    def __init__(self):
        super().__init__()
        self.body = network()

    def forward(self, image, shift):
        return self.body(image + shift)


@pytest.mark.parametrize(
    "form",
    [
        lambda x, y: x,
        lambda x, y: [x, y, "name"],
        lambda x, y: {"image": x, "label": y},
        lambda x, y: ((x,), y),
        lambda x, y: ({"input": x}, y),
    ],
    ids=["x", "[x, y, ...]", "dict", "((x,), y)", "(keywords, y)"],
)
def test_the_first_element_of_a_batch_is_the_input(form):
    model, cmim = attached()
    assert cmim.report(model, [form(x, y) for x, y in HELD_OUT]) == cmim.report(model, HELD_OUT)


@pytest.mark.parametrize(
    "inputs",
    [
        lambda batch: (batch["a"], batch["b"]),
        lambda batch: {"shift": batch["b"], "image": batch["a"]},
    ],
    ids=["positional", "keywords"],
)
def test_inputs_makes_the_input_of_any_other_batch(inputs):
    model = Shifted()
    cmim = CMIM(model, (X, X), num_positions=64)
    report = cmim.report(model, [{"label": y, "a": x, "b": x.flip(0)} for x, y in HELD_OUT], inputs=inputs)
    expected = [(x + x.flip(0), None) for x, _ in HELD_OUT]
    bound, _ = loop_contrast(cmim, 0, activations(model.body, "layer1.0.binary", expected), "position")
    assert report.taps[0].bound == pytest.approx(bound, abs=1e-4)


def test_max_batches_takes_so_many_and_no_more():
    model, cmim = attached()
    loader = iter(HELD_OUT)
    assert cmim.report(model, loader, max_batches=2) == cmim.report(model, HELD_OUT[:2])
    assert next(loader) is HELD_OUT[2]
    assert cmim.report(model, HELD_OUT, max_batches=99).batches == 3


@pytest.mark.parametrize(
    "arguments, said",
    [
        ({"loader": []}, "no batch"),
        ({"loader": ["text"]}, "the first element of a batch is a str"),
        ({"loader": [(3, X)]}, "the first element of a batch is a int"),
        (
            {"loader": [(torch.zeros(4, dtype=torch.long), X)]},
            r"forward raised RuntimeError: (.|\n)*the first element alone",
        ),
        ({"loader": [X], "inputs": lambda batch: None}, "inputs= returned a NoneType"),
        ({"loader": [X], "max_batches": 0}, "max_batches must be an integer, 1 or more, or None for all; found 0"),
        ({"loader": [X], "model": nn.Linear(2, 2)}, "another model than the Linear"),
    ],
)
def test_what_does_not_fit_is_refused(arguments, said):
    model, cmim = attached()
    with pytest.raises(CMIMError, match=said):
        cmim.report(**{"model": model, **arguments})


# -- models --------------------------------------------------------------------------------------------------------


def test_a_compiled_model_is_seen_through():
    torch._dynamo.reset()
    model, cmim = attached()
    expected = cmim.report(model, HELD_OUT)
    model.eval()
    compiled = torch.compile(model, backend="eager")
    with torch.no_grad():
        compiled(X)
    assert cmim.report(compiled, HELD_OUT) == expected
    model.layer1.compile(backend="eager")
    with torch.no_grad(), cmim.paused():
        model(X)  # compiled without any hook
    assert cmim.report(model, HELD_OUT) == expected


class Merging(nn.Conv2d):
    """Adds a correction to its weight in eval mode, and takes it out in training mode, as LoRA does."""

    def train(self, mode=True):
        if mode != self.training:
            self.weight.data += 1.0 if self.training else -1.0
        return super().train(mode)


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_a_module_that_does_something_when_its_mode_changes_is_told_of_both_changes(training):
    model = nn.Sequential(Merging(2, 4, 3), Binarize(CODES["-1, 1"]), nn.Conv2d(4, 3, 2), nn.Flatten()).train(training)
    cmim = CMIM(model, X)
    before = model[0].weight.clone()
    cmim.report(model, HELD_OUT)
    torch.testing.assert_close(model[0].weight, before)


@pytest.fixture
def group(tmp_path):
    dist.init_process_group("gloo", store=dist.FileStore(str(tmp_path / "store"), 1), rank=0, world_size=1)
    yield
    dist.destroy_process_group()


def test_a_model_in_ddp_is_seen_through(group):
    model, cmim = attached()
    expected = cmim.report(model, HELD_OUT)
    wrapped = DistributedDataParallel(model)
    assert cmim.report(wrapped, HELD_OUT) == expected
    assert "rank" not in str(expected)


def test_each_rank_reports_its_own_data_and_says_so(monkeypatch):
    model, cmim = attached()
    expected = cmim.report(model, HELD_OUT)
    monkeypatch.setattr(distributed, "ranks", lambda: 4)
    monkeypatch.setattr(distributed, "rank", lambda: 1)
    # No process group: whatever waited for other ranks would raise.
    report = cmim.report(model, HELD_OUT)
    assert report.taps == expected.taps and (report.rank, report.ranks) == (1, 4)
    assert "the data of rank 1 of 4 alone" in str(report).splitlines()[0]


class OtherWay(nn.Module):
    """Two binarized layers; in eval mode the second one, or both, go another way than in training."""

    def __init__(self, other):
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1)
        self.first = Binarize(CODES["-1, 1"])
        self.mid = nn.Conv2d(4, 4, 3, padding=1)
        self.second = Binarize(CODES["-1, 1"])
        self.last = nn.Conv2d(4, 4, 3, padding=1)
        self.other = other

    def forward(self, x):
        x = self.stem(x)
        x = self.mid(self.first(x) if self.training or self.other != "skips both" else x)
        if self.training:
            x = self.second(x)
        elif self.other == "leaves binarization out":
            self.second.codes = lambda s: x
            x = self.second(x)
            self.second.codes = CODES["-1, 1"]
        return self.last(x).mean((2, 3))


@pytest.mark.parametrize("other", ["skips it", "leaves binarization out"])
def test_a_tap_that_eval_mode_goes_around_is_left_out_with_a_warning(other):
    model = OtherWay(other)
    cmim = CMIM(model, X)
    assert len(cmim.taps) == 2
    with pytest.warns(CMIMWarning, match=r"not found in eval mode: \['second'\]"):
        report = cmim.report(model, HELD_OUT)
    assert [tap.name for tap in report.taps] == ["first"]


class OtherSign(nn.Conv2d):
    """Binarizes in its own forward, by other functions in eval mode."""

    def forward(self, x):
        x = Codes.apply(torch.mul(x, 2.0), CODES["-1, 1"]) if self.training else (x + x).sign()
        return super().forward(x)


def test_a_tap_whose_latent_is_not_found_in_eval_mode_is_left_out_with_a_warning():
    first = [nn.Conv2d(2, 4, 3), Binarize(CODES["-1, 1"])]
    model = nn.Sequential(*first, nn.Conv2d(4, 4, 1), OtherSign(4, 4, 1), nn.Flatten())
    cmim = CMIM(model, X)
    assert [tap.name for tap in cmim.taps] == ["1", "3"]
    with pytest.warns(CMIMWarning, match=r"not found in eval mode: \['3'\]"):
        report = cmim.report(model, HELD_OUT)
    assert [tap.name for tap in report.taps] == ["1"]


def test_a_tap_whose_channels_were_pruned_is_told_of_or_left_out():
    model = nn.Sequential(nn.Conv2d(2, 4, 1), Binarize(CODES["-1, 1"]), nn.Conv2d(4, 3, 1))
    model.extend([Binarize(CODES["-1, 1"]), nn.Conv2d(3, 3, 1), nn.Flatten()])
    cmim = CMIM(model, X)
    model[0], model[2] = nn.Conv2d(2, 3, 1), nn.Conv2d(3, 3, 1)
    with pytest.warns(CMIMWarning, match=r"\['1'\]"):
        assert [tap.name for tap in cmim.report(model, HELD_OUT).taps] == ["3"]
    model[2], model[4] = nn.Conv2d(3, 2, 1), nn.Conv2d(2, 3, 1)
    with pytest.raises(CMIMError, match="it has 3 channels, and had 4 when CMIM was attached"):
        cmim.report(model, HELD_OUT)


def test_a_model_that_goes_around_all_taps_in_eval_mode_is_refused():
    model = OtherWay("skips both")
    with pytest.raises(CMIMError, match="no tap had both"):
        CMIM(model, X).report(model, HELD_OUT)


# -- output --------------------------------------------------------------------------------------------------------


@pytest.fixture
def reports() -> tuple[Report, Report]:
    """Two epochs of one network."""
    model, cmim = attached()
    earlier = cmim.report(model, HELD_OUT)
    trained(model, cmim)
    return earlier, cmim.report(model, HELD_OUT)


def test_the_table_has_a_line_a_tap_and_marks_the_one_that_loses_the_most(reports):
    for report in reports:
        title, head, *lines = str(report).splitlines()
        assert title.startswith("Report on 12 samples in 3 batches, one instance = one position, bounds in nats")
        assert title.endswith("say nothing") != report.heads_trained
        assert " ".join(head.split()) == "tap channels bound at most kept retrieval +1 dead saturated"
        for line, tap in zip(lines, report.taps, strict=True):
            shown = line.replace("<- loses the most", "").split()
            figures = [
                f"{tap.bound:.2f}",
                f"{tap.ceiling:.2f}",
                f"{100 * tap.kept:.0f}%",
                f"{100 * tap.retrieval:.1f}%",
            ]
            codes = [f"{100 * tap.plus:.1f}%", str(tap.dead), str(tap.saturated)]
            assert shown == [tap.name, "4", *figures, *codes]
            assert ("loses the most" in line) == (tap.name == report.worst and report.heads_trained)
        assert report.worst == min(report.taps, key=lambda tap: tap.bound / tap.ceiling).name
        assert sum("loses the most" in line for line in lines) == report.heads_trained


def test_csv_holds_every_figure(reports, tmp_path):
    for report in reports:
        report.to_csv(tmp_path / "report.csv")
        with open(tmp_path / "report.csv", newline="") as file:
            rows = list(csv.DictReader(file))
        assert len(rows) == 2
        for row, tap in zip(rows, report.taps, strict=True):
            assert row.pop("name") == tap.name
            assert set(row) == set(vars(tap)) - {"name"}
            for key, text in row.items():
                value = getattr(tap, key)
                assert text == "" if value is None else float(text) == value


def test_scalars_are_flat_floats(reports):
    for report in reports:
        scalars = report.scalars()
        for tap in report.taps:
            for key in ("bound", "retrieval", "plus", "dead", "saturated"):
                value = getattr(tap, key)
                assert scalars.pop(f"{tap.name}/{key}", None) == value
                assert value is None or type(report.scalars()[f"{tap.name}/{key}"]) is float
        assert not scalars


def test_heads_that_took_no_step_are_told_and_no_tap_is_called_the_worst():
    model = network()
    cmim = CMIM(model, X)
    report = cmim.report(model, [X])
    assert not report.heads_trained
    assert "the heads are not trained yet" in repr(report) and "loses the most" not in repr(report)
    for _ in range(2):
        model(X)
        cmim(model).backward()
    report = cmim.report(model, [X])
    assert report.heads_trained and "not trained" not in repr(report) and "loses the most" in repr(report)
    cmim.remove()
    assert CMIM(model, X, heads_lr=0).report(model, [X]).heads_trained  # by whom, we do not know


def test_the_figure_shows_the_figures_of_each_tap(reports, tmp_path):
    for name, report in zip("ab", reports, strict=True):
        path = tmp_path / f"{name}.png"
        figure = report.plot(path)
        assert path.read_bytes().startswith(b"\x89PNG")
        drawn = [[bar.get_width() for bar in axes.patches] for axes in figure.axes]
        wanted = [
            (tap.bound, 100 * tap.retrieval, 100 * tap.plus, 100 * (tap.dead + tap.saturated) / tap.channels)
            for tap in report.taps
        ]
        assert drawn == [pytest.approx(figures) for figures in zip(*wanted, strict=True)]
        labels = [label.get_text() for label in figure.axes[0].get_yticklabels()]
        assert labels == [tap.name for tap in report.taps]
        (ceilings,) = figure.axes[0].lines
        assert list(ceilings.get_xdata()) == pytest.approx([tap.ceiling for tap in report.taps])


def test_without_matplotlib_the_table_works_and_the_figure_says_what_to_install(reports, tmp_path, monkeypatch):
    for name in [name for name in sys.modules if name.partition(".")[0] == "matplotlib"]:
        monkeypatch.setitem(sys.modules, name, None)
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    with pytest.raises(CMIMError, match="pip install matplotlib"):
        reports[1].plot(tmp_path / "report.png")
    assert str(reports[1]) and reports[1].scalars()
    reports[1].to_csv(tmp_path / "report.csv")
    assert not (tmp_path / "report.png").exists()


def test_a_single_tensor_in_place_of_a_loader_is_refused():
    model = network()
    with pytest.raises(CMIMError, match=r"pass \[x\]"):
        CMIM(model, X).report(model, X)


def test_a_teacher_in_training_mode_is_named_when_nothing_could_be_reported():
    model, teacher = networks.network(BIREAL), networks.network(full_precision(BIREAL))
    cmim = CMIM(model, networks.X, teacher=teacher, instances="image")
    teacher.train()
    with pytest.raises(CMIMError, match="teacher is in training mode"):
        cmim.report(model, [networks.X])


def test_a_batch_without_samples_is_passed_over():
    model = networks.network()
    cmim = CMIM(model, networks.X)
    expected = cmim.report(model, [networks.X])
    report = cmim.report(model, [networks.X, networks.X[:0]])
    assert report.batches == 2 and report.samples == expected.samples
    assert report.taps == expected.taps


def test_padding_is_left_out_where_heads_of_attention_come_before_the_tokens():
    class Split(nn.Module):
        def __init__(self):
            super().__init__()
            self.a, self.n, self.b = nn.Linear(4, 16), nn.LayerNorm(16), nn.Linear(8, 8)

        def forward(self, x, attention_mask):
            x = self.n(self.a(x)).unflatten(-1, (2, 8)).transpose(1, 2)  # (B, heads, T, 8)
            return self.b(x.sign().detach() - x.detach() + x)

    torch.manual_seed(0)
    model, x = Split(), torch.randn(3, 6, 4)
    mask = (torch.arange(6) < torch.tensor([[6], [4], [2]])).long()
    cmim = CMIM(model, (x, torch.ones(3, 6, dtype=torch.long)))
    with torch.no_grad():
        codes = model.n(model.a(x)).unflatten(-1, (2, 8)).transpose(1, 2) > 0
    kept = torch.cat([codes[i, :, : mask[i].sum()].flatten(0, 1) for i in range(3)])
    report = cmim.report(model, [((x, mask),)])
    assert report.taps[0].plus == pytest.approx(kept.float().mean().item())


def test_a_model_of_several_inputs_is_told_of_inputs():
    class Two(nn.Module):
        def __init__(self):
            super().__init__()
            self.net = nn.Sequential(nn.Linear(4, 8), Binarize(lambda codes: codes), nn.Linear(8, 4))

        def forward(self, x, y):
            return self.net(x) + y

    model, batch = Two(), (torch.randn(3, 4), torch.randn(3, 4))
    cmim = CMIM(model, batch)
    with pytest.raises(CMIMError, match=r"raised TypeError.* For another, pass inputs="):
        cmim.report(model, [batch])
    assert cmim.report(model, [batch], inputs=lambda batch: batch).samples == 3


def test_the_figure_shows_another_report_of_the_same_taps_beside_this_one(reports, tmp_path):
    earlier, later = reports
    figure = later.plot(tmp_path / "both.png", before=earlier)
    drawn = [bar.get_width() for bar in figure.axes[2].patches]
    assert drawn == pytest.approx([100 * tap.plus for report in (earlier, later) for tap in report.taps])
    model, cmim = attached(taps=["layer2.0.binary"])
    with pytest.raises(CMIMError, match=r"report of the same taps: found .* wanted \['layer2"):
        cmim.report(model, HELD_OUT).plot(tmp_path / "other.png", before=earlier)
