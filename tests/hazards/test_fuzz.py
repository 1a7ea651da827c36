"""Networks, batches and settings at random: finite, nothing leaks, and the network does not notice."""

from __future__ import annotations

import contextlib
import copy
import warnings
from functools import partial
from typing import Any

import hypothesis.strategies as st
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from torch import Tensor, nn

from cmim_plugin import CMIM, NCE, CMIMError, CMIMWarning, InfoNCE
from hazards.nets import CLASSES, Activations, equal, gradients, hooks_on, network

fuzzed = partial(settings, derandomize=True, deadline=None, suppress_health_check=[HealthCheck.too_slow])

networks = st.fixed_dictionaries(
    {
        "inside": st.booleans(),
        "channels": st.lists(st.sampled_from([2, 4, 6, 10]), min_size=1, max_size=3).map(tuple),
        "norm": st.sampled_from(["group", "batch"]),
    }
)
# One sample at least, also after the stem; batch norm needs more than one value a channel.
shapes = st.tuples(st.integers(1, 9), st.just(2), st.integers(2, 9), st.integers(2, 9))
options = st.fixed_dictionaries(
    {
        "instances": st.sampled_from(["image", "position"]),
        "num_positions": st.integers(1, 200),
        "queue_size": st.sampled_from([0, 1, 7, 100]),
        "temperature": st.sampled_from([0.01, 0.07, 0.1, 1.0]),
        "embed_dim": st.sampled_from([1, 16]),
        "layer_decay": st.sampled_from([0.5, 1.0]),
        "objective": st.sampled_from([InfoNCE(), NCE(50)]),
    }
)
dtypes = st.sampled_from([torch.float32, torch.float64, torch.bfloat16])
formats = st.sampled_from([torch.contiguous_format, torch.channels_last])
labellings = st.sampled_from(["none", "image", "pixel", "one class"])


def labels_for(how: str, shape: tuple[int, ...], instances: str) -> Tensor | None:
    if how == "none":
        return None
    if how == "one class":
        return torch.zeros(shape[0], dtype=torch.int64)
    if how == "pixel" and instances == "position":
        return torch.randint(CLASSES, (shape[0], 5, 3), dtype=torch.int32)
    return torch.randint(CLASSES, shape[:1])


@fuzzed(max_examples=40)
@given(networks, shapes, options, dtypes, formats, labellings)
def test_the_loss_is_finite_and_the_network_does_not_notice(net, shape, how, dtype, memory_format, labelling) -> None:
    torch.manual_seed(0)
    model = network(**net).to(dtype=dtype, memory_format=memory_format)
    plain = copy.deepcopy(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", CMIMWarning)  # batches without negatives
        cmim = CMIM(model, torch.randn(2, *shape[1:], dtype=dtype), **how)
        assert len(cmim.taps) == len(net["channels"])
        # Another size the second time, a loss that is dropped the third time.
        for rows, trained in ((shape[0], True), (shape[0] + 1, True), (shape[0], False)):
            x = torch.randn(rows, *shape[1:]).to(dtype=dtype, memory_format=memory_format)
            activations = Activations(model)
            logits = model(x)
            loss = cmim(model, labels_for(labelling, (rows, *shape[1:]), how["instances"]))
            assert torch.equal(logits, plain(x))
            assert loss.isfinite() and loss.ndim == 0 and loss.requires_grad
            assert loss.dtype == torch.float32 and loss >= -1e-6
            if trained:
                loss.backward()
                assert all(g.isfinite().all() for g in gradients(model, cmim))
                assert not list(cmim.parameters())
                assert list(cmim.metrics) == [tap.name for tap in cmim.taps]
            activations.remove()
            del logits, loss
            assert activations.alive() == 0
    buffers = [dict(m.named_buffers()) for m in (model, plain)]
    assert equal(list(buffers[0].values()), list(buffers[1].values()))
    cmim.remove()
    assert not hooks_on(model)


class Failing(nn.Module):
    def __init__(self, inside: bool) -> None:
        super().__init__()
        self.body = network(inside)
        self.fails = False

    def forward(self, x: Tensor) -> Tensor:
        x = self.body(x)
        if self.fails:
            raise ValueError("out of memory")
        return x


def train(model: Any, cmim: CMIM, x: Tensor) -> None:
    model(x)


def evaluate(model: Any, cmim: CMIM, x: Tensor) -> None:
    model.eval()
    model(x)
    model.train()


def without_gradients(model: Any, cmim: CMIM, x: Tensor) -> None:
    with torch.no_grad():
        model(x)


def fail(model: Any, cmim: CMIM, x: Tensor) -> None:
    model.fails = True
    with contextlib.suppress(ValueError):
        model(x)
    model.fails = False


def run_a_copy(model: Any, cmim: CMIM, x: Tensor) -> None:
    copy.deepcopy(model)(x)


def run_a_part(model: Any, cmim: CMIM, x: Tensor) -> None:
    model.body(x)


def pause(model: Any, cmim: CMIM, x: Tensor) -> None:
    with cmim.paused():
        model(x)


def save(model: Any, cmim: CMIM, x: Tensor) -> None:
    cmim.load_state_dict(cmim.state_dict())


# What a loop may do between two losses, and which pass then waits for its loss, given which waited before it.
DEEDS = {
    train: lambda waiting, x: (x, True),
    evaluate: lambda waiting, x: waiting if waiting and waiting[1] else (x, False),
    fail: lambda waiting, x: None,
    pause: lambda waiting, x: None,
    without_gradients: lambda waiting, x: waiting,
    run_a_copy: lambda waiting, x: waiting,
    run_a_part: lambda waiting, x: waiting,
    save: lambda waiting, x: waiting,
}


@fuzzed(max_examples=20)
@given(st.booleans(), st.lists(st.lists(st.sampled_from([*DEEDS]), max_size=4), min_size=1, max_size=3))
def test_a_loss_is_that_of_the_last_training_pass_whatever_came_between(inside, steps) -> None:
    torch.manual_seed(0)
    model, reference = Failing(inside), Failing(inside)
    reference.load_state_dict(model.state_dict())
    x = torch.randn(4, 2, 3, 3)
    cmim, undisturbed = CMIM(model, x, num_positions=9), CMIM(reference, x, num_positions=9)
    undisturbed.load_state_dict(cmim.state_dict())
    for deeds in steps:
        waiting = None
        for deed in deeds:
            given_to = torch.randn(4, 2, 3, 3)
            deed(model, cmim, given_to)
            waiting = DEEDS[deed](waiting, given_to)
        if waiting is None:
            with pytest.raises(CMIMError, match="No forward pass"):
                cmim(model)
            continue
        reference(waiting[0])
        assert torch.equal(cmim(model), undisturbed(reference))
        with pytest.raises(CMIMError, match="No forward pass"):
            cmim(model)
