"""A model compiled after attaching: one graph, no second compilation, the loss of the eager model."""

from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch._dynamo.utils import counters

from bireal import BIREAL
from bodies import BODIES, full_precision
from cmim_plugin import CMIM, CMIMError, info_nce, nce
from irnet import IRNET

X = torch.randn(6, 2, 8, 8)


def network(recipe):
    return BODIES["resnet8"](recipe, 4, in_channels=2, stages=2, units=1, width=4)


@pytest.mark.parametrize("taps_per_step", [None, 1], ids=["all taps", "some taps"])
@pytest.mark.parametrize("instances", ["image", "position"])
@pytest.mark.parametrize("recipe", [IRNET, BIREAL], ids=["IR-Net", "Bi-Real"])
def test_the_compiled_model_gives_the_loss_of_the_eager_one(recipe, instances, taps_per_step):
    """Of all taps: each choice of some would be compiled anew."""
    torch._dynamo.reset()
    counters.clear()
    model = network(recipe)
    cmim = CMIM(model, X, instances=instances, taps_per_step=taps_per_step)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        state = cmim.state_dict()
        logits, loss = compiled(X), cmim(compiled)
        gradients = torch.autograd.grad(loss, [p for n, p in model.named_parameters() if n.startswith("conv1")])
        cmim.load_state_dict(state)  # the same positions again
        cmim._hooks.chosen = None
        assert torch.equal(model(X), logits)
        expected = cmim(model)
        torch.testing.assert_close(loss, expected)
        wanted = torch.autograd.grad(expected, [p for n, p in model.named_parameters() if n.startswith("conv1")])
        torch.testing.assert_close(gradients, wanted)
    assert counters["stats"]["unique_graphs"] == 1


def test_with_a_teacher_a_network_compiled_in_parts_has_all_taps_too():
    """The teacher runs outside of what is compiled."""
    torch._dynamo.reset()
    losses = []
    for compiled in (False, True):
        torch.manual_seed(0)
        model, teacher = network(BIREAL), network(full_precision(BIREAL))
        settings = {"instances": "image", "teacher": teacher, "taps_per_step": 1 if compiled else None}
        cmim = CMIM(model, X, **settings)
        if compiled:
            for block in (*model.layer1, *model.layer2):
                block.compile(backend="aot_eager")
        losses.append([(model(X), cmim(model))[1].item() for _ in range(4)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_attached_after_the_first_compiled_call_the_loss_is_refused():
    torch._dynamo.reset()
    model = network(BIREAL)
    compiled = torch.compile(model, backend="aot_eager")
    compiled(X)
    cmim = CMIM(compiled, X)
    compiled(X)
    with pytest.raises(CMIMError, match="attach first"):
        cmim(compiled)


@pytest.mark.parametrize("labels", [None, torch.tensor([0, 1, 0, 2, 1, 1])], ids=["unlabelled", "labelled"])
@pytest.mark.parametrize("objective", [info_nce, partial(nce, num_samples=50)], ids=["info", "nce"])
def test_the_objectives_compile_into_one_graph(objective, labels):
    torch._dynamo.reset()
    z = [torch.randn(6, 5, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    compiled = torch.compile(objective, fullgraph=True, backend="aot_eager")
    found, expected = compiled(*z, labels=labels), objective(*z, labels=labels)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, z), torch.autograd.grad(expected, z))


@pytest.mark.parametrize("taps_per_step", [None, 1], ids=["all taps", "some taps"])
@pytest.mark.parametrize("whole", [False, True], ids=["the loss", "the whole step"])
def test_a_compiled_loss_is_that_of_the_eager_one(whole, taps_per_step):
    torch._dynamo.reset()
    model = network(BIREAL)
    cmim = CMIM(model, X, taps_per_step=taps_per_step)

    def step(loss_of):
        logits = model(X)
        return F.cross_entropy(logits, torch.arange(6) % 4) + loss_of(model)

    compiled = torch.compile(step, backend="aot_eager") if whole else step
    compiled_loss = cmim if whole else torch.compile(cmim, backend="aot_eager")
    for _ in range(4):  # counters of steps change from constants to variables
        compiled(compiled_loss)
    counters.clear()
    for _ in range(3):
        state = cmim.state_dict()
        assert len(cmim.taps) == 2 and cmim._hooks.chosen is None
        loss = compiled(compiled_loss)
        gradients = torch.autograd.grad(loss, list(cmim.parameters()))
        cmim.load_state_dict(state)
        expected = step(cmim)
        torch.testing.assert_close(loss, expected)
        torch.testing.assert_close(gradients, torch.autograd.grad(expected, list(cmim.parameters())))
    assert not counters["stats"]["unique_graphs"]  # nothing was compiled again


def test_a_compiled_evaluation_is_not_compiled_again_for_each_choice_of_taps():
    torch._dynamo.reset()
    counters.clear()
    model = network(BIREAL)
    cmim = CMIM(model, X, taps_per_step=1)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for _ in range(6):
        model.train()
        model(X)
        cmim(model).backward()
        model.eval()
        with torch.no_grad():
            compiled(X)
    assert counters["stats"]["unique_graphs"] == 1


def test_a_compiled_loss_is_not_compiled_again_for_each_size_of_batch():
    torch._dynamo.reset()
    model = network(BIREAL)
    cmim = CMIM(model, X)
    compiled = torch.compile(cmim, backend="aot_eager")
    for size in (6, 6, 5, 6, 4):  # sizes and counters of steps change from constants to variables
        model(X[:size])
        compiled(model).backward()
    counters.clear()
    for size in (3, 6, 2):
        model(X[:size])
        compiled(model).backward()
    assert not counters["stats"]["unique_graphs"]
