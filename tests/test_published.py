"""The published variant against a loop over anchors and bank entries, written from its description."""

import math

import pytest
import torch
from torch import nn

from bireal import BIREAL
from bodies import BODIES, full_precision
from cmim_plugin import CMIM, CMIMError, PublishedCMIM

TARGETS = torch.tensor([7, 2, 7, 4, 2, 2, 4, 7, 7, 4])
SAMPLES = len(TARGETS)
X = torch.randn(4, 2, 8, 8, generator=torch.Generator().manual_seed(0))


def body(recipe):
    return BODIES["resnet8"](recipe, 4, in_channels=2, stages=2, units=1, width=4)


def start(**settings):
    torch.manual_seed(0)
    model, teacher = body(BIREAL), body(full_precision(BIREAL)).eval()
    cmim = PublishedCMIM(
        model, X, teacher=teacher, targets=TARGETS, **{"num_negatives": 6, "embed_dim": 5, "weight": 1.0, **settings}
    )
    return model.double(), teacher.double(), cmim.double()


def unit(row: list[float]) -> list[float]:
    length = math.sqrt(sum(v * v for v in row))
    return [v / length for v in row]


def dot(a: list[float], b: list[float]) -> float:
    return sum(x * y for x, y in zip(a, b, strict=True))


def embeddings(model, teacher, cmim, x):
    """Pooled activations of the last binarization, on both sides, under the heads."""
    seen = {}
    module, other = (net.get_submodule(cmim.taps[0].module) for net in (model, teacher))
    handles = [
        module.register_forward_hook(lambda m, i, o: seen.update(b=o)),
        other.register_forward_hook(lambda m, i, o: seen.update(f=o)),
    ]
    with torch.no_grad(), cmim.paused():
        model(x), teacher(x)
    for handle in handles:
        handle.remove()
    rows = []
    for side, (weight, bias) in zip("bf", cmim.heads.of(0), strict=True):
        pooled = seen[side].mean((2, 3))
        rows.append([unit(row) for row in (pooled @ weight.T + bias).tolist()])
    return rows


def loop(anchors, bank, chosen, normalizer, temperature=0.1):
    total = 0.0
    for anchor, row in zip(anchors, chosen, strict=True):
        noise = (len(row) - 1) / SAMPLES
        for place, entry in enumerate(row):
            p = math.exp(dot(anchor, bank[entry]) / temperature) / normalizer
            total -= math.log((p if place == 0 else noise) / (p + noise + 1e-7))
    return total / len(anchors)


def test_two_steps_agree_with_a_loop(monkeypatch):
    model, teacher, cmim = start()
    drawn = []
    negatives = PublishedCMIM._negatives
    monkeypatch.setattr(PublishedCMIM, "_negatives", lambda self, i: drawn.append(negatives(self, i)) or drawn[-1])
    banks = cmim.banks[0].tolist()
    normalizers = None
    for step, indices in enumerate(([3, 0, 9, 4], [5, 3, 1, 7])):
        x = X.double() + step
        z_b, z_f = embeddings(model, teacher, cmim, x)
        model(x)
        loss = cmim(model, torch.tensor(indices))
        chosen = [[i, *row] for i, row in zip(indices, drawn[-1].tolist(), strict=True)]
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
        assert torch.allclose(cmim.banks[0], torch.tensor(banks, dtype=torch.float64), atol=1e-9)


def test_negatives_are_all_the_samples_of_other_classes():
    _, _, cmim = start(num_negatives=2000)
    indices = torch.arange(SAMPLES)
    for i, row in zip(indices.tolist(), cmim._negatives(indices).tolist(), strict=True):
        assert set(row) == {j for j in range(SAMPLES) if TARGETS[j] != TARGETS[i]}


def test_the_last_tap_is_contrasted_and_the_heads_stay_as_drawn_unless_asked():
    model, _, cmim = start()
    everything = CMIM(body(BIREAL), X)
    assert [tap.name for tap in cmim.taps] == [everything.taps[-1].name]
    model(X.double())
    cmim(model, torch.tensor([0, 1, 2, 3])).backward()
    assert all(p.grad is None for p in cmim.parameters())
    assert model.conv1.weight.grad.any()
    model, _, cmim = start(train_heads=True)
    model(X.double())
    cmim(model, torch.tensor([0, 1, 2, 3])).backward()
    assert all(p.grad.any() for p in cmim.parameters())


def test_the_state_resumes_banks_and_draws():
    model, _, cmim = start()
    x, losses = X.double(), []
    for step in range(4):
        if step == 2:
            state = torch.load(_saved(cmim.state_dict()), weights_only=True)
        model(x)
        losses.append(cmim(model, torch.tensor([1, 2, 3, 4])).item())
    cmim.load_state_dict(state)
    for expected in losses[2:]:
        model(x)
        assert cmim(model, torch.tensor([1, 2, 3, 4])).item() == expected


def _saved(state):
    import io

    buffer = io.BytesIO()
    torch.save(state, buffer)
    buffer.seek(0)
    return buffer


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"targets": torch.zeros(4, dtype=torch.int64)}, "one class only"),
        ({"targets": torch.rand(4)}, "integer classes"),
        ({"momentum": 1.0}, "momentum must be in"),
        ({"num_negatives": 0}, "num_negatives must be"),
    ],
)
def test_settings_that_do_not_fit_are_refused_and_the_model_has_no_hook(settings, said):
    model, teacher = body(BIREAL), body(full_precision(BIREAL)).eval()
    with pytest.raises(CMIMError, match=said):
        PublishedCMIM(model, X, **{"teacher": teacher, "targets": TARGETS, **settings})
    assert not model._forward_hooks
    CMIM(model, X)


def test_autocast_does_not_reach_heads_and_critic():
    losses = []
    for autocast in (False, True):
        model, _, cmim = (part.float() for part in start(num_negatives=64))  # float64 is none of autocast's business
        model(X)
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            losses.append(cmim(model, torch.arange(4)).item())
    assert losses[0] == losses[1]


def test_indices_are_asked_for_and_checked():
    model, _, cmim = start()
    model(X.double())
    with pytest.raises(CMIMError, match="indices in the training set"):
        cmim(model)
    with pytest.raises(CMIMError, match="indices must be those of the 10 samples"):
        cmim(model, torch.tensor([0, 1, 2, 10]))


def test_a_network_without_binary_activation_is_refused():
    with pytest.raises(CMIMError, match="No binary activation"):
        PublishedCMIM(nn.Conv2d(2, 2, 1), X, teacher=nn.Conv2d(2, 2, 1), targets=TARGETS)
