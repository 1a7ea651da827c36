"""A full-precision network whose activations stand in for the latents."""

import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cmim_plugin import CMIM, CMIMError, CMIMWarning, find_binary_activations
from networks import (
    BIREAL,
    IRNET,
    Binary,
    X,
    a_loss,
    assert_same,
    batch,
    everything,
    gradients,
    leftover_hooks,
    network,
    teacher,
)


class WithSpare(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = teacher()
        self.spare = nn.Linear(3, 3)

    def forward(self, x):
        return self.body(x)


@pytest.mark.parametrize("recipe, instances", [(IRNET, "position"), (BIREAL, "image")])
def test_a_teacher_matched_by_name_stands_in_for_the_latents_and_stays_as_it_was(recipe, instances):
    model, other = network(recipe), teacher(recipe, width=8)
    before = copy.deepcopy(other.state_dict())
    cmim = CMIM(model, X, teacher=other, instances=instances)
    assert [(tap.channels, tap.latent_channels) for tap in cmim.taps] == [(4, 8), (4, 8)]
    assert "a_B against the teacher's" in str(cmim)
    loss = a_loss(model, cmim)
    loss.backward()
    assert loss.item() > 0 and model.conv1.weight.grad.any()
    assert not gradients(other)
    assert_same(other.state_dict(), before)
    assert not other.training
    cmim.remove()
    assert not leftover_hooks(model) and not leftover_hooks(other)


def test_a_teacher_that_changes_its_inputs_changes_a_copy():
    class Normalizing(nn.Module):
        def __init__(self, body):
            super().__init__()
            self.body = body

        def forward(self, batch):
            return self.body(batch.pop("image").sub_(0.5))

    def inputs():
        return ({"image": batch(seed=8)[0].clone()},)

    model = Normalizing(network())
    expected = copy.deepcopy(model)(*inputs())
    cmim = CMIM(model, inputs(), teacher=Normalizing(teacher()))
    assert_same(model(*inputs()), expected)
    assert cmim(model).isfinite()


def test_a_teacher_runs_once_on_the_batch_of_the_step_without_gradients():
    model, other = network(), teacher()
    cmim = CMIM(model, X, teacher=other)
    seen = []
    other.register_forward_pre_hook(lambda module, args: seen.append((args[0], torch.is_grad_enabled())))
    x = batch(seed=8)[0]
    a_loss(model, cmim, x)
    assert len(seen) == 1 and torch.equal(seen[0][0], x) and seen[0][1] is False
    with torch.no_grad():
        model(x)  # a pass that is not captured needs no teacher
    assert len(seen) == 1


def test_a_teacher_is_matched_by_an_explicit_mapping():
    model, other = network(), teacher(units=2)
    cmim = CMIM(model, X, teacher=other, teacher_modules={"layer2.0.binary": "layer2.1.binary"}, instances="image")
    assert [tap.latent_channels for tap in cmim.taps] == [4, 8]
    assert a_loss(model, cmim).item() > 0


@pytest.mark.parametrize(
    "arguments, said",
    [
        ({"teacher_modules": {"layer9": "fc"}}, r"taps that do not exist: \['layer9'\]. .*layer1.0.binary"),
        ({"teacher_modules": {"layer1.0.binary": "body"}}, "no module for these taps.*'body'.*teacher_modules="),
        ({"teacher": WithSpare()}, "no module for these taps: .*layer1.0.binary.*body.layer1"),
        (
            {
                "teacher": WithSpare(),
                "teacher_modules": {"layer1.0.binary": "spare", "layer2.0.binary": "body.layer2.0.binary"},
            },
            "The teacher's module 'spare' did not run in its forward",
        ),
        ({"teacher_modules": {"layer1.0.binary": "fc"}}, r"layer1.0.binary has shape \(6, 8\).*2 spatial dimensions"),
        ({"teacher": None, "teacher_modules": {"layer1.0.binary": "fc"}}, "without a teacher"),
    ],
    ids=["unknown tap", "unknown module", "other names", "did not run", "another rank", "no teacher"],
)
def test_a_teacher_that_does_not_fit_is_refused(arguments, said):
    model, arguments = network(), {"teacher": teacher(), **arguments}
    before = everything(model)
    with pytest.raises(CMIMError, match=said):
        CMIM(model, X, **arguments)
    assert everything(model) == before


def test_the_network_itself_is_refused_as_its_teacher():
    model = network()
    with pytest.raises(CMIMError, match="The teacher is the binary network itself"):
        CMIM(model, X, teacher=model)


def test_a_teacher_with_another_number_of_positions_pairs_by_image_only():
    # The pooled map of the teacher has one position, the tap has 16.
    arguments = {"teacher": teacher(), "teacher_modules": {"layer1.0.binary": "pool"}}
    model = network()
    with pytest.raises(CMIMError, match=r"layer1\.0\.binary.* positions"):
        a_loss(model, CMIM(model, X, **arguments))
    model = network()
    assert a_loss(model, CMIM(model, X, instances="image", **arguments)).item() > 0


def test_a_teacher_in_training_mode_is_refused_by_the_loss_and_not_by_the_models_forward():
    model, other = network(), teacher()
    cmim = CMIM(model, X, teacher=other)
    other.train()
    expected = copy.deepcopy(model)(X)
    assert_same(model(X), expected)
    with pytest.raises(CMIMError, match=r"training mode.*call teacher\.eval\(\)"):
        cmim(model)
    other.eval()
    assert a_loss(model, cmim).item() > 0


def test_a_module_of_the_teacher_that_a_pass_skips_is_told_by_the_loss():
    model, other = network(), teacher()
    cmim = CMIM(model, X, teacher=other)
    other.layer2[0].forward = lambda x: x[..., ::2, ::2].repeat(1, 2, 1, 1)
    model(X)
    with pytest.warns(CMIMWarning, match=r"Tap layer2\.0\.binary: the forward pass did not reach it"):
        assert cmim(model).isfinite()


def test_a_teacher_that_raises_beside_a_compiled_model_is_told_by_the_loss_and_not_by_the_models_forward():
    torch._dynamo.reset()
    model, other = network(), teacher()
    cmim = CMIM(model, X, teacher=other)

    def broken(module, args):
        raise ValueError("broken")

    other.register_forward_pre_hook(broken)
    assert torch.compile(model, backend="eager")(X).isfinite().all()
    with pytest.raises(CMIMError, match="ValueError: broken"):
        cmim(model)


def test_a_teacher_that_fails_is_told_by_the_loss_and_not_by_the_models_forward():
    model, other = network(), teacher()
    cmim = CMIM(model, X, teacher=other)
    handle = other.register_forward_pre_hook(lambda module, args: args[0].expand(-1, 9, -1, -1))
    assert model(X).isfinite().all()
    with pytest.raises(CMIMError, match="RuntimeError: The expanded size"):
        cmim(model)
    handle.remove()
    assert a_loss(model, cmim).item() > 0


class TwoCalls(nn.Module):
    """Two activations, of 4 and of 8 channels: of one module under two names, or of two modules."""

    def __init__(self, first, second=None):
        super().__init__()
        self.conv1, self.conv2, self.conv3 = nn.Conv2d(2, 4, 1), nn.Conv2d(4, 8, 1), nn.Conv2d(8, 3, 1)
        self.first = first
        self.second = second or first

    def forward(self, x):
        x = self.first(self.conv1(x))
        return self.conv3(self.second(self.conv2(x))).mean((2, 3))


@pytest.mark.parametrize(
    "other, modules",
    [
        (TwoCalls(nn.ReLU()), ["first", "first"]),
        (TwoCalls(nn.ReLU()), ["second", "second"]),
        (TwoCalls(nn.ReLU(), nn.ReLU()), ["first", "second"]),
        (TwoCalls(nn.ReLU()), ["conv2", "conv3"]),
    ],
    ids=["call by call", "by its other name", "two modules", "what a convolution is given"],
)
def test_an_activation_that_is_called_twice_is_paired_call_by_call(other, modules):
    model = TwoCalls(Binary())
    names = [found.name for found in find_binary_activations(model, X)]
    cmim = CMIM(model, X, teacher=other, teacher_modules=dict(zip(names, modules, strict=True)))
    assert [(tap.channels, tap.latent_channels) for tap in cmim.taps] == [(4, 4), (8, 8)]
    assert a_loss(model, cmim).isfinite()


class SharedBlock(nn.Module):
    """One module runs both layers: it binarizes in its own forward, and hands the codes to another child each time."""

    class Block(nn.Module):
        def __init__(self, activation):
            super().__init__()
            self.activation = activation
            self.convs = nn.ModuleList([nn.Conv2d(4, 8, 1), nn.Conv2d(8, 6, 1)])

        def forward(self, x, layer):
            return self.convs[layer](self.activation(x))

    def __init__(self, activation):
        super().__init__()
        self.stem, self.block = nn.Conv2d(2, 4, 1), self.Block(activation)

    def forward(self, x):
        return self.block(self.block(self.stem(x), 0), 1).mean((2, 3))


def test_the_call_of_the_teachers_module_is_that_of_the_module_that_binarizes():
    cmim = CMIM(SharedBlock(Binary().forward), X, teacher=SharedBlock(torch.relu))
    assert [(tap.module, tap.channels, tap.latent_channels) for tap in cmim.taps] == [("block", 4, 4), ("block", 8, 8)]


class Conv(nn.Module):
    """A convolution whose parameter has a name of its own, and that may binarize its input."""

    def __init__(self, channels, out, activation):
        super().__init__()
        self.kernel = nn.Parameter(0.1 * torch.randn(out, channels, 3, 3))
        self.activation = activation

    def forward(self, x):
        return F.conv2d(self.activation(x), self.kernel, padding=1)


class TwoSigns(nn.Module):
    """A block that binarizes in its own forward, twice; the plain one has a convolution more behind them."""

    def __init__(self, activation, more=0):
        super().__init__()
        self.norm, self.conv1, self.conv2 = nn.BatchNorm2d(4), nn.Conv2d(4, 8, 1), nn.Conv2d(8, 4, 1)
        self.after = nn.Sequential(*(nn.Conv2d(4, 4, 1) for _ in range(more)))
        self.activation = activation

    def forward(self, x):
        return x + self.after(self.conv2(self.activation(self.conv1(self.activation(self.norm(x))))))


def of(*layers):
    return nn.Sequential(nn.Conv2d(2, 4, 1), *layers, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 3))


@pytest.mark.parametrize(
    "build",
    [
        lambda activation, more: Conv(4, 4, activation),
        TwoSigns,
    ],
    ids=["a convolution of their own", "signs in the forward of a block"],
)
def test_what_stands_in_for_a_latent_is_what_the_teachers_product_receives(build):
    seen = []

    def relu(x):
        seen.append(x.relu())
        return seen[-1]

    torch.manual_seed(0)
    model, other = of(build(Binary().forward, 0)), of(build(relu, 2))
    x = torch.randn(6, 2, 4, 4)
    if isinstance(other[1], Conv):
        # Made within the forward: no hook can pick it up.
        with pytest.raises(CMIMError, match=r"'1' has nothing in the place of tap 1.*teacher_modules="):
            CMIM(model, x, teacher=other)
        other[1].activation = nn.ReLU()
        other[1].activation.register_forward_hook(lambda module, args, output: seen.append(output))
    cmim = CMIM(model, x, teacher=other, num_positions=10**4)
    seen.clear()
    model(x)
    (captured,) = cmim._capture._waiting.values()
    assert len(seen) == len(cmim.taps) == len(captured.pairs)
    for k, activation in enumerate(seen):
        assert torch.equal(captured.pairs[k].rows[1], activation.permute(0, 2, 3, 1).flatten(0, 2))
    assert cmim(model).isfinite()


def test_what_the_teacher_overwrites_later_is_contrasted_as_its_product_received_it():
    class Block(nn.Module):
        def __init__(self, activation):
            super().__init__()
            self.conv, self.activation = nn.Conv2d(4, 4, 1), activation

        def forward(self, x):
            x = self.activation(x)
            received.append(x.detach().clone())
            y = self.conv(x)
            return x.add_(y) if self.activation is torch.relu else x + y

    received = []
    model, other = of(Block(Binary().forward)), of(Block(torch.relu))
    cmim = CMIM(model, X, teacher=nn.DataParallel(other), num_positions=10**4)
    received.clear()
    model(X)
    (captured,) = cmim._capture._waiting.values()
    assert torch.equal(captured.pairs[0].rows[1], received[0].permute(0, 2, 3, 1).flatten(0, 2))


def test_a_teacher_may_draw_random_numbers():
    class Noisy(nn.Module):
        def forward(self, x):
            return torch.relu(x + 0.1 * torch.randn_like(x))

    assert CMIM(of(Binary(), nn.Conv2d(4, 4, 1)), X, teacher=of(Noisy(), nn.Conv2d(4, 4, 1))).taps


def test_a_teacher_that_is_binary_itself_is_told():
    with pytest.warns(CMIMWarning, match=r"activations for these taps are binary themselves: \['layer1.0.binary'"):
        CMIM(network(), X, teacher=network(seed=1))


def test_of_a_module_whose_weight_has_one_dimension_the_output_is_taken():
    model = nn.Sequential(nn.Conv2d(2, 4, 1), Binary(), nn.Conv2d(4, 3, 4), nn.Flatten())
    other = nn.Sequential(nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4), nn.ReLU())
    nn.init.zeros_(other[1].weight)  # its output is zero, its input is not
    cmim = CMIM(model, X, teacher=other, instances="image", queue_size=8)
    a_loss(model, cmim)
    assert cmim.contrast.queues[0].embeddings[0].any()
    assert not cmim.contrast.queues[0].embeddings[1].any()


def test_a_teacher_that_does_not_take_the_example_is_refused():
    def fail(x):
        raise ValueError("no such input")

    failing = teacher()
    failing.forward = fail
    with pytest.raises(CMIMError, match="teacher's forward raised ValueError on example_input: no such input"):
        CMIM(network(), X, teacher=failing)
    with pytest.raises(CMIMError, match=r"teacher must be a torch.nn.Module or None; found 'resnet'"):
        CMIM(network(), X, teacher="resnet")
