"""A model compiled after attaching: one graph, no second compilation, the loss of the eager model."""

import pytest
import torch
from torch._dynamo.utils import counters

from bireal import BIREAL
from bodies import BODIES
from cmim_plugin import CMIM, CMIMError
from irnet import IRNET

X = torch.randn(6, 2, 8, 8)


def network(recipe):
    return BODIES["resnet8"](recipe, 4, in_channels=2, stages=2, units=1, width=4)


@pytest.mark.parametrize("instances", ["image", "position"])
@pytest.mark.parametrize("recipe", [IRNET, BIREAL], ids=["IR-Net", "Bi-Real"])
def test_the_compiled_model_gives_the_loss_of_the_eager_one(recipe, instances):
    torch._dynamo.reset()
    counters.clear()
    model = network(recipe)
    cmim = CMIM(model, X, instances=instances)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    for _ in range(3):
        state = cmim.state_dict()
        logits, loss = compiled(X), cmim(compiled)
        gradients = torch.autograd.grad(loss, [p for n, p in model.named_parameters() if n.startswith("conv1")])
        cmim.load_state_dict(state)  # the same positions again
        assert torch.equal(model(X), logits)
        expected = cmim(model)
        torch.testing.assert_close(loss, expected)
        wanted = torch.autograd.grad(expected, [p for n, p in model.named_parameters() if n.startswith("conv1")])
        torch.testing.assert_close(gradients, wanted)
    assert counters["stats"]["unique_graphs"] == 1


def test_attached_after_the_first_compiled_call_the_loss_is_refused():
    torch._dynamo.reset()
    model = network(BIREAL)
    compiled = torch.compile(model, backend="aot_eager")
    compiled(X)
    cmim = CMIM(compiled, X)
    compiled(X)
    with pytest.raises(CMIMError, match="attach first"):
        cmim(compiled)
