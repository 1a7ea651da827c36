"""The published variant against a loop over anchors and bank entries, written from its description."""

import io
import math

import pytest
import torch
from torch import nn

from cmim_plugin import CMIM, CMIMError, CMIMWarning, PublishedCMIM, find_binary_activations
from networks import Binary, assert_same, network, teacher

TARGETS = torch.tensor([7, 2, 7, 4, 2, 2, 4, 7, 7, 4])
SAMPLES = len(TARGETS)
X = torch.randn(4, 2, 8, 8, generator=torch.Generator().manual_seed(0))


def start(**settings):
    torch.manual_seed(0)
    model, other = network(), teacher()
    settings = {"targets": TARGETS, "num_negatives": 6, "embed_dim": 5, "weight": 1.0, **settings}
    cmim = PublishedCMIM(model, X, teacher=other, **settings)
    return model.double(), other.double(), cmim.double()


def unit(row: list[float]) -> list[float]:
    length = math.sqrt(sum(v * v for v in row) + 1e-12)
    return [v / length for v in row]


def dot(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def embeddings(model, other, cmim, x):
    """Pooled activations of the last binarization, on both sides, under the heads."""
    seen = {}
    module, same = (net.get_submodule(cmim.taps[0].module) for net in (model, other))
    handles = [
        module.register_forward_hook(lambda m, i, o: seen.update(b=o)),
        same.register_forward_hook(lambda m, i, o: seen.update(f=o)),
    ]
    with torch.no_grad(), cmim.paused():
        model(x), other(x)
    for handle in handles:
        handle.remove()
    rows = []
    for side, weight in zip("bf", cmim.heads.weights_of(0), strict=True):
        pooled = seen[side].mean((2, 3))
        rows.append([unit(row) for row in (pooled @ weight).tolist()])
    return rows


def loop(anchors, bank, chosen, normalizer, temperature=0.1):
    total = 0.0
    for anchor, row in zip(anchors, chosen, strict=True):
        noise = (len(row) - 1) / SAMPLES
        for place, entry in enumerate(row):
            p = math.exp(dot(anchor, bank[entry]) / temperature) / normalizer
            total -= math.log((p if place == 0 else noise) / (p + noise + 1e-7))
    return total / len(anchors)


def drawn(cmim, indices: list[int]) -> list[list[int]]:
    """The negatives that the next loss draws: each from a random sequence of its own, read by the next sample."""
    state, found = cmim.bank.draws.tolist(), []
    for i in indices:
        others = [j for j in range(SAMPLES) if TARGETS[j] != TARGETS[i]]
        # In the order of the classes.
        others.sort(key=lambda j: TARGETS[j].item())
        row = []
        for n, value in enumerate(state):
            value = (value * 6364136223846793005 + 1442695040888963407) % 2**64
            state[n] = value - 2**64 if value >= 2**63 else value
            row.append(others[(state[n] // 2**32) % len(others)])
        found.append(row)
    return found


def test_two_steps_agree_with_a_loop():
    model, other, cmim = start()
    banks = cmim.bank.entries[0].tolist()
    normalizers = None
    for step, indices in enumerate(([3, 0, 9, 4], [5, 3, 1, 7])):
        x = X.double() + step
        z_b, z_f = embeddings(model, other, cmim, x)
        chosen = [[i, *row] for i, row in zip(indices, drawn(cmim, indices), strict=True)]
        model(x)
        loss = cmim(model, indices=torch.tensor(indices))
        if normalizers is None:  # frozen from the first batch
            normalizers = []
            for anchors, bank in ((z_b, banks[1]), (z_f, banks[0])):
                scores = [
                    math.exp(dot(anchor, bank[entry]) / 0.1)
                    for anchor, row in zip(anchors, chosen, strict=True)
                    for entry in row
                ]
                normalizers.append(sum(scores) / len(scores) * SAMPLES)
        expected = loop(z_b, banks[1], chosen, normalizers[0]) + loop(z_f, banks[0], chosen, normalizers[1])
        assert loss.item() == pytest.approx(expected, rel=1e-6)
        (bound,) = (metrics["bound"].item() for metrics in cmim.metrics.values())
        assert bound == pytest.approx(math.log(6) - expected, rel=1e-5)
        for bank, rows in zip(banks, (z_b, z_f), strict=True):
            for i, row in zip(indices, rows, strict=True):
                bank[i] = unit([0.5 * old + 0.5 * new for old, new in zip(bank[i], row, strict=True)])
        assert_same(cmim.bank.entries[0].shape, torch.Size([2, SAMPLES, 5]))
        torch.testing.assert_close(cmim.bank.entries[0], torch.tensor(banks, dtype=torch.float64), rtol=0, atol=1e-9)


def test_negatives_are_all_the_samples_of_other_classes():
    _, _, cmim = start(num_negatives=2000)
    for i, row in enumerate(cmim.bank.negatives(torch.arange(SAMPLES)).tolist()):
        assert set(row) == {j for j in range(SAMPLES) if TARGETS[j] != TARGETS[i]}


def test_the_last_tap_is_contrasted_and_the_heads_stay_as_drawn_unless_asked():
    last = CMIM(network(), X).taps[-1].name
    for train_heads in (False, True):
        model, _, cmim = start(train_heads=train_heads)
        assert [tap.name for tap in cmim.taps] == [last]
        before = cmim.heads.weights.detach().clone()
        for _ in range(2):
            model(X.double())
            cmim(model, indices=torch.tensor([0, 1, 2, 3])).backward()
        assert model.conv1.weight.grad.any()
        assert torch.equal(cmim.heads.weights, before) is not train_heads


@pytest.mark.parametrize("train_heads", [False, True])
def test_a_resumed_run_repeats_the_unbroken_one_bit_by_bit(train_heads):
    model, _, cmim = start(train_heads=train_heads)
    x, losses = X.double(), []

    def step():
        model(x)
        loss = cmim(model, indices=torch.tensor([1, 2, 3, 4]))
        loss.backward()
        return loss.item()

    for number in range(4):
        if number == 2:
            file = io.BytesIO()
            torch.save([model.state_dict(), cmim.state_dict()], file)
        losses.append(step())
    file.seek(0)
    for part, state in zip((model, cmim), torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(state)
    assert [step() for _ in range(2)] == losses[2:]


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"targets": torch.zeros(4, dtype=torch.int64)}, "one class only"),
        ({"targets": torch.rand(4)}, "integer classes"),
        ({"momentum": 1.0}, "momentum must be in"),
        ({"num_negatives": 0}, "num_negatives must be"),
        ({"model": nn.Conv2d(2, 2, 1), "teacher": nn.Conv2d(2, 2, 1)}, "No binary activation"),
    ],
)
def test_settings_that_do_not_fit_are_refused_and_the_model_has_no_hook(settings, said):
    settings = {"model": network(), "teacher": teacher(), "targets": TARGETS, **settings}
    model = settings.pop("model")
    with pytest.raises(CMIMError, match=said):
        PublishedCMIM(model, X, **settings)
    assert not model._forward_hooks and not model._forward_pre_hooks


class Skipping(nn.Module):
    """Two activations, of which the second can be left out."""

    def __init__(self, activation):
        super().__init__()
        self.conv1, self.conv2, self.conv3 = nn.Conv2d(2, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 3, 1)
        self.first, self.second = activation(), activation()
        self.skip = False

    def forward(self, x):
        x = self.first(self.conv1(x))
        return self.conv3(x if self.skip else self.second(self.conv2(x))).mean((2, 3))


def test_a_tap_that_a_pass_did_not_reach_adds_nothing():
    model = Skipping(Binary)
    names = [found.name for found in find_binary_activations(model, X)]
    cmim = PublishedCMIM(model, X, teacher=Skipping(nn.ReLU), targets=TARGETS, taps=names)
    model.skip = True
    model(X)
    with pytest.warns(CMIMWarning, match=f"Tap {names[1]}: the forward pass did not reach it"):
        loss = cmim(model, indices=torch.arange(4))
    assert loss.isfinite() and list(cmim.metrics) == names[:1]


def test_autocast_does_not_reach_heads_and_critic():
    losses = []
    for autocast in (False, True):
        model, _, cmim = (part.float() for part in start(num_negatives=64))  # float64 is none of autocast's business
        model(X)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            losses.append(cmim(model, indices=torch.arange(4)).item())
    assert losses[0] == losses[1]


@pytest.mark.parametrize(
    "indices, said",
    [
        (torch.tensor([0, 1, 2, 10]), "indices must be those of the 10 samples of targets; found 0 to 10"),
        (torch.tensor([0, -1, 2, 3]), "found -1 to 3"),
        (torch.rand(4), r"indices must be a tensor of \(B,\) integers"),
        ([0, 1, 2, 3], r"indices must be a tensor of \(B,\) integers"),
        (torch.tensor([True, False, True, False]), r"indices must be a tensor of \(B,\) integers"),
        (torch.arange(5), "indices"),
    ],
    ids=["too large", "negative", "floating point", "a list", "booleans", "too many"],
)
def test_indices_are_checked(indices, said):
    model, _, cmim = start()
    model(X.double())
    with pytest.raises(CMIMError, match=said):
        cmim(model, indices=indices)


@pytest.mark.parametrize("dtype", [torch.uint8, torch.int16])
def test_indices_may_be_of_any_integer_dtype(dtype):
    losses = []
    for kind in (torch.int64, dtype):
        model, _, cmim = start()
        model(X.double())
        losses.append(cmim(model, indices=torch.tensor([3, 0, 9, 4]).to(kind)).item())
    assert losses[0] == losses[1]


def test_the_bank_stays_in_single_precision():
    model, _, cmim = start()
    cmim.to(torch.bfloat16)
    model(X.double())
    assert cmim(model, indices=torch.arange(4)).isfinite() and cmim.bank.entries.dtype == torch.float32


def test_the_bank_does_not_start_as_the_heads():
    _, _, cmim = start(num_negatives=3)
    heads, entries = cmim.heads.weights.detach().flatten(), cmim.bank.entries.flatten()
    n = min(len(heads), len(entries))
    assert torch.corrcoef(torch.stack([heads[:n], entries[:n]]))[0, 1].abs() < 0.5


def test_the_papers_reading_is_not_of_this_class():
    with pytest.raises(CMIMError, match=r"The paper's plain reading is CMIM\.paper"):
        PublishedCMIM.paper(network(), X, 10)


def test_a_bank_that_does_not_fit_leaves_no_hook():
    model = network()
    with pytest.raises(RuntimeError) as kept:  # the traceback keeps the plug-in alive, as in a notebook
        PublishedCMIM(model, X, teacher=teacher(), targets=TARGETS, num_negatives=10**15)
    assert kept and not model._forward_hooks and not model._forward_pre_hooks


def test_indices_go_by_their_name_and_class_labels_are_not_taken_for_them():
    model, _, cmim = start()
    model(X.double())
    for arguments in ((torch.arange(4),), ()):
        with pytest.raises(TypeError):
            cmim(model, *arguments)
    with pytest.raises(TypeError, match="labels"):
        cmim(model, labels=torch.arange(4))
    cmim(model, indices=torch.arange(4))


def test_a_default_dtype_and_device_do_not_reach_the_bank():
    torch.manual_seed(0)
    model, other = network(), teacher()
    torch.set_default_dtype(torch.float64)
    try:
        with torch.device("meta"):
            cmim = PublishedCMIM(model, X, teacher=other, targets=TARGETS, num_negatives=6)
            model(X)
            loss = cmim(model, indices=torch.arange(4, device="cpu"))
    finally:
        torch.set_default_dtype(torch.float32)
    assert cmim.bank.entries.dtype == torch.float32 and cmim.bank.entries.device.type == "cpu"
    assert loss.isfinite()
