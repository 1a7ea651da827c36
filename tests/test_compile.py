"""A model compiled after attaching: one graph, no second compilation, the loss of the eager model."""

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch._dynamo.utils import counters
from torch.utils.checkpoint import checkpoint

import nets
from cmim_plugin import CMIM, NCE, CMIMError, InfoNCE
from networks import IRNET, METHODS, MaskedSign, X, Y, gradients, network, teacher, told


@pytest.fixture(autouse=True)
def nothing_compiled():
    torch._dynamo.reset()
    counters.clear()


def graphs() -> int:
    return counters["stats"]["unique_graphs"]


def attached(recipe=IRNET, **settings):
    torch.manual_seed(0)
    model = network(recipe)
    return model, CMIM(model, X, **settings)


def train(model, cmim, steps, forward=None, loss_of=None) -> list:
    """Losses and gradients of some steps, without a step of the network's."""
    results = []
    for _ in range(steps):
        model.zero_grad()
        logits = (model if forward is None else forward)(X)
        loss = (cmim if loss_of is None else loss_of)(model)
        (F.cross_entropy(logits, Y) + loss).backward()
        results.append([logits.detach(), loss.detach(), *gradients(model, cmim)])
    return results


def assert_close(found, expected):
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize(
    "method, instances, taps_per_step",
    [
        ("IR-Net", "position", 1),
        pytest.param("Bi-Real", "position", None, marks=pytest.mark.slow),
        pytest.param("Bi-Real", "image", 1, marks=pytest.mark.slow),
    ],
)
def test_a_compiled_model_gives_the_losses_and_gradients_of_the_eager_one_with_all_taps(
    method, instances, taps_per_step
):
    """Of all taps: each choice of some would be compiled anew."""
    recipe = METHODS[method]
    expected = train(*attached(recipe, instances=instances), 3)
    model, cmim = attached(recipe, instances=instances, taps_per_step=taps_per_step)
    compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
    assert_close(train(model, cmim, 3, compiled), expected)
    assert graphs() == 1


def test_what_cannot_be_captured_in_a_compiled_forward_is_told_by_the_loss_and_the_forward_runs():
    model, cmim = attached()
    expected = model(X).detach()
    for parameter in (*model.conv1.parameters(), *model.bn1.parameters()):
        parameter.requires_grad_(False)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    with told() as warned:
        torch.testing.assert_close(compiled(X).detach(), expected)
        cmim(model)
    assert len(warned) == 1 and "its binary activation came without a gradient" in warned[0]
    model.requires_grad_(False)
    torch.testing.assert_close(compiled(X).detach(), expected)
    with pytest.raises(CMIMError, match="its binary activation came without a gradient"):
        cmim(model)


@pytest.mark.slow
def test_compiled_in_half_precision_with_channels_last_the_gradients_are_finite_and_near_those_of_eager_mode():
    """Inductor makes NaN on a CPU where a gradient of another memory format comes in."""

    def gradients_of(compiled):
        torch.manual_seed(0)
        x = torch.randn(50, 3, 32, 32)
        model = nets.BODIES["resnet8"](nets.METHODS["bireal"].recipe, 50, 3, width=16).to(
            memory_format=torch.channels_last
        )
        cmim = CMIM(model, x, weight=1)
        forward = torch.compile(model) if compiled else model
        with torch.autocast("cpu", torch.bfloat16):
            loss = F.cross_entropy(forward(x), torch.arange(50)) + cmim(model)
        loss.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters()])

    found, expected = gradients_of(True), gradients_of(False)
    assert F.cosine_similarity(found, expected, 0) > 0.8  # bits flip: bfloat16 is rounded at other places


def test_with_a_teacher_a_network_compiled_in_parts_has_the_losses_of_the_eager_one():
    """The teacher runs outside of what is compiled."""
    losses = []
    for compiled in (False, True):
        model, cmim = attached(instances="image", teacher=teacher(IRNET))
        if compiled:
            for block in (*model.layer1, *model.layer2):
                block.compile(backend="eager")
        losses.append([step[1].item() for step in train(model, cmim, 2)])
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def test_a_network_compiled_in_parts_contrasts_all_taps_and_is_not_compiled_for_each_choice_of_some():
    model, cmim = attached(taps_per_step=1)
    for block in (*model.layer1, *model.layer2):
        block.compile(backend="eager")
    train(model, cmim, 3)
    assert cmim.scheduled == tuple(tap.name for tap in cmim.taps)
    counters.clear()
    train(model, cmim, 3)
    assert graphs() == 0
    # A resumed run goes on with all taps, from its first step on.
    resumed = CMIM(network(IRNET), X, taps_per_step=1)
    assert resumed.scheduled != cmim.scheduled
    resumed.load_state_dict(cmim.state_dict())
    assert resumed.scheduled == cmim.scheduled


def test_attached_after_the_first_compiled_call_the_loss_is_refused():
    model = network()
    compiled = torch.compile(model, backend="eager")
    compiled(X)
    cmim = CMIM(compiled, X)
    compiled(X)
    with pytest.raises(CMIMError, match="attach first"):
        cmim(compiled)


@pytest.mark.parametrize(
    "objective, labels", [(InfoNCE(), torch.tensor([0, 1, 0, 2, 1, 1])), (NCE(num_samples=50), None)]
)
def test_the_objectives_compile_into_one_graph(objective, labels):
    z = [torch.randn(6, 5, dtype=torch.float64, requires_grad=True) for _ in range(2)]
    compiled = torch.compile(lambda *z: objective(*z, labels=labels), fullgraph=True, backend="aot_eager")
    found, expected = compiled(*z), objective(*z, labels=labels)
    torch.testing.assert_close(found, expected)
    torch.testing.assert_close(torch.autograd.grad(found, z), torch.autograd.grad(expected, z))


def test_a_compiled_loss_is_that_of_the_eager_one_and_is_not_compiled_again():
    # The first pass runs before anything is compiled, with the taps whose turn it is: heads that it trained differ.
    expected = train(*attached(heads_lr=0), 7)
    model, cmim = attached(taps_per_step=1, heads_lr=0)
    compiled = torch.compile(cmim, backend="eager")
    found = train(model, cmim, 4, loss_of=compiled)  # counters of steps change from constants to variables
    counters.clear()
    found += train(model, cmim, 3, loss_of=compiled)
    assert graphs() == 0
    for step in range(1, 7):
        torch.testing.assert_close(found[step][1], expected[step][1], rtol=1e-3, atol=1e-4)


@pytest.mark.parametrize(
    "taps_per_step", [pytest.param(None, marks=pytest.mark.slow), 1], ids=["all taps", "some taps"]
)
def test_a_whole_step_compiled_is_the_eager_one_and_is_not_compiled_again(taps_per_step):
    def step(model, cmim):
        return F.cross_entropy(model(X), Y) + cmim(model)

    losses = []
    for compiled in (False, True):
        model, cmim = attached(taps_per_step=taps_per_step if compiled else None)
        run = torch.compile(step, backend="eager") if compiled else step
        losses.append([])
        for number in range(7):
            if number == 4:
                counters.clear()
            loss = run(model, cmim)
            loss.backward()
            losses[-1].append(loss.item())
        assert cmim.scheduled == tuple(tap.name for tap in cmim.taps)
    assert graphs() == 0
    assert losses[1] == pytest.approx(losses[0], rel=1e-3)


def test_a_compiled_evaluation_is_not_compiled_again_for_each_choice_of_taps():
    model, cmim = attached(taps_per_step=1)
    compiled = torch.compile(model, fullgraph=True, backend="eager")
    for _ in range(5):
        model.train()
        model(X)
        cmim(model).backward()
        model.eval()
        with torch.no_grad():
            compiled(X)
    assert graphs() == 1


def test_a_compiled_loss_is_not_compiled_again_for_each_size_of_batch():
    model, cmim = attached(num_positions=16)  # fewer than even one image has
    compiled = torch.compile(cmim, backend="eager")
    for size in (6, 5, 6, 4):  # sizes and counters of steps change from constants to variables
        model(X[:size])
        compiled(model).backward()
    counters.clear()
    for size in (3, 6, 2):
        model(X[:size])
        compiled(model).backward()
    assert graphs() == 0


@pytest.mark.parametrize("instances", ["image", pytest.param("position", marks=pytest.mark.slow)])
def test_a_compiled_step_with_labels_is_not_compiled_again_for_each_size_of_batch(instances):
    torch._dynamo.reset()
    model, cmim = attached(num_positions=16, instances=instances)

    @torch.compile(backend="eager")
    def loss(x, y):
        return model(x).sum() + cmim(model, labels=y)

    y = torch.tensor([0, 1, 2, 0, 1, 2])
    for size in (6, 5, 6, 4):
        loss(X[:size], y[:size]).backward()
    counters.clear()
    for size in (3, 6, 2):
        loss(X[:size], y[:size]).backward()
    assert graphs() == 0


@pytest.mark.slow
def test_a_compiled_loss_is_not_compiled_again_for_each_length_of_padded_batches():
    torch.manual_seed(0)
    model = Tokens()
    cmim = CMIM(model, (torch.randn(4, 12, 8), torch.ones(4, 12, dtype=torch.int64)), num_positions=16)
    compiled = torch.compile(cmim, backend="eager")

    def step(length):
        mask = torch.ones(4, length, dtype=torch.int64)
        mask[0, length // 2 :] = 0
        loss = model(torch.randn(4, length, 8), mask).mean() + compiled(model)
        loss.backward()

    for length in (12, 9, 7):
        step(length)
    counters.clear()
    for length in (11, 6, 10):
        step(length)
    assert graphs() == 0


class Tokens(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem, self.norm, self.head = nn.Linear(8, 16), nn.LayerNorm(16), nn.Linear(16, 4)

    def forward(self, x, attention_mask=None):
        return self.head(MaskedSign.apply(self.norm(self.stem(x))))


def eager_and_compiled(network_of) -> list:
    """Loss and gradients of one step, of both."""
    results = []
    x = torch.randn(4, 12, 8)
    for compile in (lambda model: model, lambda model: torch.compile(model, fullgraph=True, backend="aot_eager")):
        torch.manual_seed(0)
        model = network_of()
        cmim = CMIM(model, x)
        forward = compile(model)
        loss = forward(x).square().mean() + cmim(model)
        loss.backward()
        results.append([loss.detach(), *gradients(model, cmim)])
    return results


@pytest.mark.skipif(torch.__version__ < "2.12", reason="torch traces the backward pass of the sign with gradients")
def test_a_sign_that_is_scaled_where_it_is_made_compiles_into_one_graph():
    class Scaled(Tokens):
        def forward(self, x, attention_mask=None):
            return F.linear(MultipliedSign.apply(self.norm(self.stem(x))) * 0.5, self.head.weight)

    assert_close(*eager_and_compiled(Scaled))


class MultipliedSign(torch.autograd.Function):
    """A sign whose forward and backward multiply, as the network does around it."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return (x >= 0).to(x.dtype) * 2 - 1

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * (x.abs() <= 1)


def test_a_loss_with_a_queue_compiles_into_one_graph_and_is_that_of_the_eager_one():
    model, cmim = attached(queue_size=20)
    other, eager = attached(queue_size=20, taps_per_step=None)
    compiled = torch.compile(cmim, fullgraph=True, backend="aot_eager")
    model(X)
    other(X)
    assert_close(compiled(model), eager(other))


@pytest.mark.skipif(
    not hasattr(torch._dynamo.config, "skip_fwd_side_effects_in_bwd_under_checkpoint"), reason="not in this release"
)
def test_checkpoints_compile_with_the_model_by_a_setting_of_torch(monkeypatch):
    monkeypatch.setattr(torch._dynamo.config, "skip_fwd_side_effects_in_bwd_under_checkpoint", True)

    class Checkpointed(Tokens):
        def forward(self, x, attention_mask=None):
            return checkpoint(super().forward, x, use_reentrant=False)

    assert_close(*eager_and_compiled(Checkpointed))


def test_a_compiled_forward_without_gradients_leaves_the_pass_that_waits():
    model, cmim = attached()
    compiled = torch.compile(model, backend="eager")
    compiled(X)
    with torch.no_grad():
        compiled(X[:3])
    loss = cmim(compiled)
    reference, other = attached()
    reference(X)
    assert_close(loss, other(reference))
