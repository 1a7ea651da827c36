"""The public contract of CMIM: what a user's training loop, checkpoints and model may rely on."""

import contextlib
import copy
import gc
import io
import itertools
import math
import pickle
import random
import warnings
from collections import Counter
from functools import partial

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.multiprocessing.reductions import StorageWeakRef
from torch.utils.checkpoint import checkpoint

from bireal import BIREAL
from bodies import BODIES, full_precision
from cmim_plugin import CMIM, CMIMError, CMIMWarning, find_binary_activations, info_nce, nce
from irnet import IRNET

METHODS = {"IR-Net": IRNET, "Bi-Real": BIREAL}
each_method = pytest.mark.parametrize("recipe", METHODS.values(), ids=METHODS)
each_instance = pytest.mark.parametrize("instances", ["image", "position"])


# -- networks and batches ------------------------------------------------------------------------------------------


def network(recipe=BIREAL, seed=0, **sizes) -> nn.Module:
    """Two binarized convolutions unless told otherwise."""
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        return BODIES["resnet8"](recipe, 4, in_channels=2, **{"stages": 2, "units": 1, "width": 4, **sizes})


def batch(n=6, seed=1) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(n, 2, 4, 4, generator=generator), torch.arange(n) % 4


X, Y = batch()


class Sign(torch.autograd.Function):
    """Keeps a mask for its backward pass and not x, so that x may be overwritten."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x.abs() < 1)
        return torch.where(x >= 0, 1.0, -1.0)

    @staticmethod
    def backward(ctx, grad):
        return grad * ctx.saved_tensors[0]


class SignModule(nn.Module):
    def forward(self, x):
        return Sign.apply(x)


class Shared(nn.Module):
    """One activation module called twice."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1)
        self.sign = SignModule()
        self.first = nn.Conv2d(4, 6, 3, padding=1)
        self.second = nn.Conv2d(6, 5, 3, padding=1)

    def forward(self, x):
        x = self.first(self.sign(self.stem(x)))
        return self.second(self.sign(x)).mean((2, 3))


class Overwriting(nn.Module):
    """Its latent is overwritten in place as soon as the convolution is done."""

    def __init__(self, in_place=True):
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.sign = SignModule()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.in_place = in_place

    def forward(self, x):
        x = self.norm(self.stem(x))
        out = self.conv(self.sign(x))
        if self.in_place:
            x += out
            return F.relu_(x).mean((2, 3))
        return F.relu(x + out).mean((2, 3))


class Eventful(nn.Module):
    """Whatever a forward pass can move, it moves."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.frozen = nn.BatchNorm2d(4)
        self.dropout = nn.Dropout(0.3)
        self.sign = SignModule()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)
        self.scale = None
        self.calls = 0
        self.history = []
        self.register_buffer("average", torch.zeros(4))
        self.register_buffer("largest", None)
        self.fails = False

    def forward(self, x):
        self.calls += 1
        self.history.append(random.random() + np.random.rand())  # noqa: NPY002
        x = self.frozen(self.norm(self.stem(x)))
        if self.scale is None:
            self.scale = x.detach().abs().mean()
        self.average.mul_(0.9).add_(x.detach().mean((0, 2, 3)))
        self.average = self.average + 1
        self.largest = x.detach().amax()
        self.conv.weight.data.clamp_(-0.1, 0.1)
        if self.fails:
            raise ValueError("a shape does not fit")
        return self.conv(self.sign(self.dropout(x) / self.scale)).mean((2, 3))


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1)
        self.sign = SignModule()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, image, shift):
        return self.conv(self.sign(self.stem(image) + shift[:, None, None, None])).mean((2, 3))


class Failing(nn.Module):
    """A network whose forward fails on demand, after its taps have been passed."""

    def __init__(self):
        super().__init__()
        self.body = network()
        self.fails = False

    def forward(self, x):
        x = self.body(x)
        if self.fails:
            raise ValueError("out of memory")
        return x


# -- what tests look at --------------------------------------------------------------------------------------------


def leftover_hooks(model: nn.Module) -> list[str]:
    return [
        f"{name}.{attribute}"
        for name, module in model.named_modules()
        for attribute, value in vars(module).items()
        if "hooks" in attribute and value
    ]


def random_states() -> tuple:
    kind, keys, *rest = np.random.get_state()  # noqa: NPY002
    return torch.get_rng_state().tolist(), random.getstate(), kind, keys.tolist(), rest


def everything(model: nn.Module) -> list:
    """What a user could see of a model, and of the world around it, bit by bit."""
    seen = [pickle.dumps(model), random_states()]
    for name, module in model.named_modules():
        seen.append((name, id(module), module.training, list(vars(module))))
        seen.append([(key, id(value)) for key, value in vars(module).items() if isinstance(value, (dict, list))])
    for name, tensor in [*model.named_parameters(), *model.named_buffers()]:
        seen.append((name, id(tensor), tensor.data_ptr(), tensor.requires_grad, id(tensor.grad)))
        if tensor.grad is not None:
            seen.append(tensor.grad.tolist())
    return seen


def raised_warnings(record: list[warnings.WarningMessage]) -> list[str]:
    return [str(warning.message) for warning in record if issubclass(warning.category, CMIMWarning)]


@pytest.fixture
def recorded():
    with warnings.catch_warnings(record=True) as record:
        warnings.simplefilter("always")
        yield record


def gradients(model: nn.Module) -> list[Tensor]:
    return [parameter.grad.clone() for parameter in model.parameters() if parameter.grad is not None]


def assert_same(found, expected):
    torch.testing.assert_close(found, expected, rtol=0, atol=0)


def a_loss(model: nn.Module, cmim: CMIM, x: Tensor = X, **arguments) -> Tensor:
    model(x)
    return cmim(model, **arguments)


# -- three lines ---------------------------------------------------------------------------------------------------


@each_method
def test_three_lines_train_network_and_heads(recipe, recorded):
    model = network(recipe)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    cmim = CMIM(model, X)
    optimizer.add_param_group({"params": cmim.parameters()})
    stem, head = model.conv1.weight.clone(), next(cmim.parameters()).clone()
    for _ in range(3):
        loss = F.cross_entropy(model(X), Y)
        loss += cmim(model)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    assert loss.isfinite()
    assert not torch.equal(model.conv1.weight, stem)
    assert not torch.equal(next(cmim.parameters()), head)
    assert not raised_warnings(recorded)


RESNET8 = [("layer1.0", 4), ("layer1.1", 4), ("layer2.0", 4), ("layer2.1", 8), ("layer3.0", 8), ("layer3.1", 16)]
VGG = [("layer1", 4), ("layer2", 4), ("layer3", 8), ("layer4", 8), ("layer5", 16)]


@pytest.mark.parametrize("body, expected", [("resnet8", RESNET8), ("vgg_small", VGG)], ids=["resnet", "vgg"])
@pytest.mark.parametrize("recipe, part", [(IRNET, "conv"), (BIREAL, "binary")], ids=METHODS)
def test_taps_come_in_forward_order_with_their_names_and_channels(body, expected, recipe, part):
    model = BODIES[body](recipe, 10, width=4)
    cmim = CMIM(model, torch.randn(2, 3, 16, 16))
    expected = [(f"{module}.{part}", channels) for module, channels in expected]
    assert isinstance(cmim.taps, tuple)
    assert [(tap.name, tap.channels) for tap in cmim.taps] == expected
    cmim.remove()
    found = find_binary_activations(model, torch.randn(2, 3, 16, 16))
    assert [(f.name, f.channels, f.tapped, f.reason) for f in found] == [(*e, True, None) for e in expected]


def test_a_module_called_twice_gives_two_taps():
    model = Shared()
    cmim = CMIM(model, X)
    assert [(tap.name, tap.channels) for tap in cmim.taps] == [("sign", 4), ("sign#2", 6)]
    loss = a_loss(model, cmim)
    assert set(cmim.metrics) == {"sign", "sign#2"}
    loss.backward()
    assert model.stem.weight.grad.any()


@each_instance
def test_the_loss_is_a_float32_scalar_with_gradients_to_heads_and_network(instances):
    model = network()
    cmim = CMIM(model, X, instances=instances)
    loss = a_loss(model, cmim)
    assert loss.shape == () and loss.dtype == torch.float32 and loss.requires_grad
    loss.backward()
    for name, parameter in cmim.named_parameters():
        assert parameter.grad.isfinite().all() and parameter.grad.any(), name
    for name in ("conv1.weight", "bn1.weight", "layer1.0.conv.weight"):
        assert model.get_parameter(name).grad.any(), name
    # After the last tap there is nothing to learn from it.
    assert model.fc.weight.grad is None


def test_the_example_may_be_a_tensor_a_tuple_or_a_dict():
    shift = torch.randn(6)
    for example, call in [
        ((X, shift), lambda model: model(X, shift)),
        ({"image": X, "shift": shift}, lambda model: model(image=X, shift=shift)),
    ]:
        torch.manual_seed(0)
        model = TwoInputs()
        cmim = CMIM(model, example)
        assert [(tap.name, tap.channels) for tap in cmim.taps] == [("sign", 4)]
        call(model)
        cmim(model).backward()
        assert model.stem.weight.grad.any()
    tensor = CMIM(network(), X)
    one_tuple = CMIM(network(), (X,))
    assert tensor.taps == one_tuple.taps


def test_other_examples_are_refused():
    with pytest.raises(CMIMError, match=r"tuple of positional inputs or a dict .* found str"):
        CMIM(network(), "a batch")
    with pytest.raises(CMIMError, match="no tensor with a batch dimension"):
        CMIM(network(), ())


def test_an_example_that_the_model_does_not_take_is_refused_with_what_it_raised():
    with pytest.raises(CMIMError, match=r"dry run failed.*RuntimeError.*Pass an example_input") as raised:
        CMIM(network(), torch.randn(2, 5, 4, 4))
    assert isinstance(raised.value.__cause__, RuntimeError)


# -- the model is as it was ----------------------------------------------------------------------------------------


@each_method
@each_instance
def test_logits_are_bit_identical_to_those_without(recipe, instances):
    results = []
    for attached in (False, True):
        torch.manual_seed(0)
        model = nn.Sequential(nn.Dropout(0.2), network(recipe))
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
        cmim = CMIM(model, X, instances=instances) if attached else None
        logits = []
        for step in range(3):
            logits.append(model(batch(seed=step)[0]))
            if cmim is not None:
                cmim(model)
            optimizer.zero_grad()
            F.cross_entropy(logits[-1], Y).backward()
            optimizer.step()
        model.eval()
        logits.append(model(X))
        results.append([*logits, *model.state_dict().values(), torch.rand(3)])
    assert_same(results[1], results[0])


def eventful() -> nn.Module:
    model = Eventful()
    model.frozen.eval()
    model.dropout.eval()
    model.register_forward_hook(report)
    model.stem.weight.grad = torch.randn_like(model.stem.weight)
    model.conv.bias.requires_grad_(False)
    return model


def report(module, args, output):
    pass


@pytest.mark.parametrize("training", [True, False])
def test_the_dry_run_leaves_everything_as_it_was(training):
    model = eventful()
    if not training:
        model.training = False
        model.norm.training = False
    before = everything(model)
    assert [f.name for f in find_binary_activations(model, X) if f.tapped] == ["sign"]
    assert everything(model) == before


@pytest.mark.parametrize("training", [True, False])
def test_attaching_and_removing_leaves_everything_as_it_was(training):
    model = eventful()
    model.training = training
    before = everything(model)
    CMIM(model, X, queue_size=8).remove()
    assert everything(model) == before


def test_hooks_of_the_user_stay_removable_after_the_dry_run():
    model, calls = network(), []
    handle = model.conv1.register_forward_hook(lambda *_: calls.append("forward"))
    cmim = CMIM(model, X)
    calls.clear()
    a_loss(model, cmim)
    assert calls == ["forward"]
    handle.remove()
    a_loss(model, cmim)
    assert calls == ["forward"]
    cmim.remove()
    assert not leftover_hooks(model)


def test_a_constructor_that_raises_leaves_everything_as_it_was():
    model, misfit = eventful(), nn.Sequential(nn.Conv2d(2, 4, 3))
    before = everything(model)
    for arguments in (
        {"taps": ["nothing"]},
        {"taps": lambda name, module: False},
        {"temperature": 0},
        {"instances": "patch"},
        {"teacher": misfit},
        {"teacher_modules": {"sign": "sign"}},
    ):
        with pytest.raises(CMIMError):
            CMIM(model, X, **arguments)
        assert everything(model) == before, arguments


def test_a_forward_that_fails_in_the_dry_run_leaves_everything_as_it_was():
    model = eventful()
    model.fails = True
    before = everything(model)
    with pytest.raises(CMIMError, match="ValueError: a shape does not fit"):
        CMIM(model, X)
    assert everything(model) == before


def test_building_heads_does_not_move_the_random_generators():
    model = network()
    before = random_states()
    CMIM(model, X, queue_size=4)
    assert random_states() == before


def test_training_with_it_does_not_move_the_random_generators():
    model = network()
    cmim = CMIM(model, X, queue_size=4)
    before = random_states()
    for _ in range(3):
        a_loss(model, cmim, labels=Y).backward()
    assert random_states() == before


def test_the_same_seed_gives_the_same_heads_and_positions():
    losses = []
    for _ in range(2):
        model = network()
        cmim = CMIM(model, X, num_positions=8)
        losses.append([a_loss(model, cmim).item() for _ in range(3)])
    assert losses[0] == losses[1]
    # Positions are drawn anew for each step.
    assert len(set(losses[0])) == 3


@each_method
def test_after_remove_no_hook_is_left_and_the_pickled_model_is_identical(recipe):
    model = network(recipe)
    before = pickle.dumps(model)
    cmim = CMIM(model, X)
    assert leftover_hooks(model)
    cmim.remove()
    cmim.remove()
    assert not leftover_hooks(model)
    assert pickle.dumps(model) == before
    with pytest.raises(CMIMError, match="was removed from its model: build a new one"):
        a_loss(model, cmim)


def test_after_remove_another_can_be_attached():
    model = network()
    first = CMIM(model, X)
    first.remove()
    second = CMIM(model, X)
    first.remove()
    assert a_loss(model, second).isfinite()


def test_paused_takes_the_hooks_off_and_puts_them_back():
    model = network()
    before = pickle.dumps(model)
    cmim = CMIM(model, X)
    with cmim.paused():
        assert not leftover_hooks(model)
        assert pickle.dumps(model) == before
        assert "not attached" in str(cmim)
        model(X)
        with pytest.raises(CMIMError, match="is paused: leave the"):
            cmim(model)
    with pytest.raises(CMIMError, match="No forward pass"):
        cmim(model)
    assert a_loss(model, cmim).isfinite()


def test_pausing_forgets_a_forward_pass_that_came_before():
    model = network()
    cmim = CMIM(model, X)
    model(X)
    with cmim.paused():
        pass
    with pytest.raises(CMIMError, match="No forward pass"):
        cmim(model)


def test_paused_puts_the_hooks_back_after_an_error_and_within_another_pause():
    model = network()
    cmim = CMIM(model, X)
    with pytest.raises(ZeroDivisionError), cmim.paused():
        _ = 1 / 0
    assert a_loss(model, cmim).isfinite()
    with cmim.paused():
        with cmim.paused():
            pass
        assert not leftover_hooks(model)
    assert a_loss(model, cmim).isfinite()


def test_paused_does_not_bring_back_what_was_removed():
    model = network()
    cmim = CMIM(model, X)
    with cmim.paused():
        cmim.remove()
    assert not leftover_hooks(model)
    with cmim.paused():
        pass
    assert not leftover_hooks(model)


def test_dropping_the_last_reference_takes_the_hooks_off():
    model = network()
    cmim = CMIM(model, X, teacher=network(full_precision(BIREAL)))
    a_loss(model, cmim).backward()
    del cmim
    gc.collect()
    assert not leftover_hooks(model)
    assert model(X).isfinite().all()


# -- state ---------------------------------------------------------------------------------------------------------


def test_the_state_holds_heads_and_queue_and_nothing_of_the_model():
    model, teacher = network(), network(full_precision(BIREAL))
    keys = list(model.state_dict())
    cmim = CMIM(model, X, embed_dim=8, queue_size=5, teacher=teacher)
    assert list(model.state_dict()) == keys
    state = cmim.state_dict()
    assert {key.split(".")[0] for key in state} == {"heads", "queues", "_extra_state"}
    widths = Counter(tap.channels for tap in cmim.taps)
    assert [(width, tuple(w.shape)) for width, w in state.items() if width.endswith("weight")] == [
        (f"heads.{width}.weight", (taps * 2 * 8, width)) for width, taps in widths.items()
    ]
    own = {id(parameter) for network in (model, teacher) for parameter in network.parameters()}
    assert not own & {id(parameter) for parameter in cmim.parameters()}
    assert [module for module in cmim.modules() if module in {*model.modules(), *teacher.modules()}] == []


def test_the_state_of_other_taps_is_refused_even_where_its_shapes_fit():
    model = network(units=2)
    names = [f.name for f in find_binary_activations(model, X)]
    widths = [f.channels for f in find_binary_activations(model, X)]
    assert widths[1] == widths[2] != widths[3]
    cmim = CMIM(model, X, taps=[names[1], names[2], names[3]])
    state = cmim.state_dict()
    state["_extra_state"]["taps"] = dict(reversed(state["_extra_state"]["taps"].items()))
    with pytest.raises(CMIMError, match="other taps"):
        cmim.load_state_dict(state)


@pytest.mark.parametrize(
    "settings",
    [{"instances": "image"}, {"num_positions": 10}, {"taps_per_step": 1}],
    ids=["image", "position", "some taps"],
)
@pytest.mark.parametrize("queue_size", [0, 17])
def test_a_resumed_run_repeats_the_unbroken_one_bit_by_bit(settings, queue_size):
    def start(seed):
        model = network(seed=seed)
        cmim = CMIM(model, X, queue_size=queue_size, **settings)
        return model, cmim, torch.optim.SGD([*model.parameters(), *cmim.parameters()], lr=0.1, momentum=0.9)

    def train(model, cmim, optimizer, steps):
        losses = []
        for step in steps:
            x, y = batch(seed=step)
            loss = F.cross_entropy(model(x), y)
            loss += cmim(model, labels=y)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses

    unbroken = start(seed=0)
    train(*unbroken, range(3))
    file = io.BytesIO()
    torch.save([part.state_dict() for part in unbroken], file)
    expected = train(*unbroken, range(3, 6))

    resumed = start(seed=77)
    file.seek(0)
    for part, state in zip(resumed, torch.load(file, weights_only=True), strict=True):
        part.load_state_dict(state)
    assert train(*resumed, range(3, 6)) == expected
    assert_same(list(resumed[1].state_dict().values())[1:], list(unbroken[1].state_dict().values())[1:])


def copies(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    yield copy.deepcopy(model)
    yield pickle.loads(pickle.dumps(model))
    yield torch.load(file, weights_only=False)
    yield torch.optim.swa_utils.AveragedModel(model)


@each_method
def test_a_copy_is_a_plain_model_and_the_original_goes_on(recipe):
    reference_model = network(recipe)
    reference = CMIM(reference_model, X)
    model = network(recipe)
    cmim = CMIM(model, X)
    for duplicate in copies(model):
        expected = reference_model(X)
        assert_same(model(X), expected)
        other = batch(seed=9)[0]
        assert_same(duplicate.train()(other), copy.deepcopy(reference_model)(other))
        with pytest.raises(CMIMError, match=r"attached to another model than the .* passed in"):
            cmim(duplicate)
        # The pass of the copy has not taken the place of the original's.
        assert_same(cmim(model), reference(reference_model))
        duplicate(X)
        with pytest.raises(CMIMError, match="No forward pass"):
            cmim(model)


def test_a_copy_can_be_trained_with_a_plug_in_of_its_own():
    model = network()
    cmim = CMIM(model, X)
    duplicate = copy.deepcopy(model)
    own = CMIM(duplicate, X)
    model(X)
    duplicate(X)
    own(duplicate).backward()
    assert not gradients(model)
    cmim(model).backward()
    assert gradients(model)
    cmim.remove()
    assert not leftover_hooks(model)
    assert a_loss(duplicate, own).isfinite()


def test_a_copy_outlives_the_original():
    model = network()
    cmim = CMIM(model, X)
    duplicate = copy.deepcopy(model)
    expected = model(X)
    del model, cmim
    gc.collect()
    assert_same(duplicate(X), expected)


# -- when a forward pass counts ------------------------------------------------------------------------------------


def test_a_loss_without_a_forward_pass_is_refused():
    model = network()
    cmim = CMIM(model, X)
    with pytest.raises(CMIMError, match=r"No forward pass .* Call model\(x\) in training mode"):
        cmim(model)


def test_one_forward_pass_gives_one_loss():
    model = network()
    cmim = CMIM(model, X)
    a_loss(model, cmim)
    with pytest.raises(CMIMError, match="one forward pass gives one loss"):
        cmim(model)


@each_method
def test_a_failed_forward_captures_nothing(recipe):
    model = Failing()
    model.body = network(recipe)
    cmim = CMIM(model, X)
    model.fails = True
    with pytest.raises(ValueError, match="out of memory"):
        model(X)
    with pytest.raises(CMIMError, match="No forward pass"):
        cmim(model)
    model.fails = False
    assert a_loss(model, cmim).isfinite()


@each_method
def test_a_forward_that_fails_within_a_tapped_module_captures_nothing(recipe):
    model = network(recipe)
    cmim = CMIM(model, X)
    with pytest.raises(RuntimeError):
        model(torch.randn(2, 5, 4, 4))
    layer = model.layer2[0].conv
    weight, layer.weight = layer.weight, nn.Parameter(torch.randn(8, 3, 3, 3))
    with pytest.raises(RuntimeError):
        model(X)
    assert torch.overrides._get_current_function_mode_stack() == []
    with pytest.raises(CMIMError, match="No forward pass"):
        cmim(model)
    layer.weight = weight
    assert a_loss(model, cmim).isfinite()


def test_a_failed_forward_does_not_bring_back_the_one_before():
    model = Failing()
    cmim = CMIM(model, X)
    model(X)
    model.fails = True
    with pytest.raises(ValueError, match="out of memory"):
        model(X)
    with pytest.raises(CMIMError, match="No forward pass"):
        cmim(model)


@pytest.fixture
def clean_stack():
    """Takes down what a failing test would leave to all others."""
    yield
    while torch.overrides._get_current_function_mode_stack():
        torch.overrides._pop_mode()


@each_method
def test_an_interrupted_forward_captures_nothing_and_leaves_nothing_behind(recipe, clean_stack):
    model, reference = network(recipe), network(recipe)
    cmim, undisturbed = CMIM(model, X), CMIM(reference, X)

    def interrupt(*_):
        raise KeyboardInterrupt

    handle = model.layer2[0].conv.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(X)
    handle.remove()
    model.eval()
    assert_same(model(X), copy.deepcopy(model)(X))
    model.train()
    with pytest.raises(CMIMError, match="No forward pass"):
        cmim(model)
    assert_same(a_loss(model, cmim), a_loss(reference, undisturbed))
    assert torch.overrides._get_current_function_mode_stack() == []


def test_a_forward_in_eval_mode_captures_nothing():
    model = network()
    cmim = CMIM(model, X)
    model.eval()
    model(X)
    model.train()
    with pytest.raises(CMIMError, match="No forward pass"):
        cmim(model)


@pytest.mark.parametrize("without", [torch.no_grad, torch.inference_mode])
def test_a_forward_without_gradients_captures_nothing(without):
    model = network()
    cmim = CMIM(model, X)
    with without():
        model(X)
    with pytest.raises(CMIMError, match="No forward pass"):
        cmim(model)


def test_an_evaluation_between_forward_and_loss_changes_nothing():
    losses = []
    for evaluated in (False, True):
        model = network()
        cmim = CMIM(model, X)
        model(X)
        if evaluated:
            with torch.no_grad():
                model(batch(seed=5)[0][:3])
        losses.append(cmim(model))
    assert_same(losses[1], losses[0])


def test_the_loss_in_eval_mode_is_refused():
    model = network()
    cmim = CMIM(model, X)
    model(X)
    model.eval()
    with pytest.raises(CMIMError, match=r"eval mode.*call model\.train\(\) first"):
        cmim(model)


def test_another_model_is_refused():
    model = network()
    cmim = CMIM(model, X)
    model(X)
    with pytest.raises(CMIMError, match="another model than the Sequential"):
        cmim(network())
    with pytest.raises(CMIMError, match="another model than the Unit"):
        cmim(model.layer1[0])


def test_a_forward_of_a_part_of_the_model_captures_nothing():
    model = network()
    cmim = CMIM(model, X)
    model.layer1(torch.randn(2, 4, 4, 4))
    with pytest.raises(CMIMError, match="No forward pass"):
        cmim(model)


def test_a_second_plug_in_on_the_same_model_is_refused():
    model = network()
    cmim = CMIM(model, X)
    with pytest.raises(CMIMError, match=r"attached to this model already: call remove\(\)"):
        CMIM(model, X)
    with pytest.raises(CMIMError, match="already"):
        CMIM(model.layer1, torch.randn(2, 4, 4, 4))
    assert a_loss(model, cmim).isfinite()


def test_data_parallel_is_refused():
    model = network()
    with pytest.raises(CMIMError, match="use DistributedDataParallel"):
        CMIM(nn.DataParallel(model), X)
    cmim = CMIM(model, X)
    with pytest.raises(CMIMError, match="use DistributedDataParallel"):
        cmim(nn.DataParallel(model))


@pytest.mark.parametrize(
    "labels, found",
    [
        (torch.zeros(5, dtype=torch.int64), r"labels must be 6 integers.*\(5,\), torch.int64"),
        (torch.zeros(5, 4, 4, dtype=torch.int64), r"labels must be 6 integers.*\(5, 4, 4\), torch.int64"),
        (torch.zeros(6), r"labels must be 6 integers.*\(6,\), torch.float32"),
        (torch.tensor(1), r"labels must be 6 integers.*\(\), torch.int64"),
    ],
)
@each_instance
def test_labels_of_the_wrong_shape_are_refused(instances, labels, found):
    model = network()
    cmim = CMIM(model, X, instances=instances)
    with pytest.raises(CMIMError, match=found):
        a_loss(model, cmim, labels=labels)


def test_maps_of_labels_that_do_not_lie_over_the_instances_are_refused():
    model = network()
    cmim = CMIM(model, X, instances="image")
    with pytest.raises(CMIMError, match=r"one label an image, 6 integers; found shape \(6, 4, 4\)"):
        a_loss(model, cmim, labels=torch.zeros(6, 4, 4, dtype=torch.int64))
    cmim.remove()
    cmim = CMIM(model, X)
    with pytest.raises(CMIMError, match=r"shape \(6, 4\), does not lie over the positions of tap layer1.0.binary"):
        a_loss(model, cmim, labels=torch.zeros(6, 4, dtype=torch.int64))


# -- what is tapped ------------------------------------------------------------------------------------------------


def test_a_network_without_binary_activation_is_refused():
    with pytest.raises(CMIMError, match=r"was found in this Sequential.*\n  \(none\)"):
        CMIM(network(full_precision(BIREAL)), X)
    with pytest.raises(CMIMError, match="No binary activation"):
        CMIM(nn.Identity(), X)


def test_the_refusal_lists_what_came_nearest():
    with pytest.raises(CMIMError, match="the network's input that is binarized") as raised:
        CMIM(nn.Sequential(SignModule(), nn.Conv2d(2, 4, 3)), X)
    assert "  0: " in str(raised.value)


def test_taps_are_chosen_by_name_and_stay_in_forward_order():
    model = network(units=2)
    cmim = CMIM(model, X, taps=["layer2.1.binary", "layer1.0.binary"])
    assert [tap.name for tap in cmim.taps] == ["layer1.0.binary", "layer2.1.binary"]
    a_loss(model, cmim)
    assert list(cmim.metrics) == ["layer1.0.binary", "layer2.1.binary"]


def test_taps_are_chosen_by_a_callable_that_gets_name_and_module():
    model, asked = network(units=2), {}

    def last_stage(name, module):
        asked[name] = module
        return name.startswith("layer2")

    cmim = CMIM(model, X, taps=last_stage)
    assert [tap.name for tap in cmim.taps] == ["layer2.0.binary", "layer2.1.binary"]
    assert asked == {
        f"layer{i}.{j}.binary": model.get_submodule(f"layer{i}.{j}.binary") for i in (1, 2) for j in (0, 1)
    }


@pytest.mark.parametrize(
    "taps, said",
    [
        (["layer9.binary"], r"taps= names \['layer9.binary'\]"),
        ([], "taps= names nothing"),
        ("layer1.0.binary", r"not one string: taps=\['layer1.0.binary'\]"),
        (lambda name, module: False, "chose none"),
    ],
    ids=["unknown", "empty", "string", "callable"],
)
def test_unknown_taps_are_refused_with_those_that_exist(taps, said):
    with pytest.raises(CMIMError, match=said) as raised:
        CMIM(network(), X, taps=taps)
    if taps != "layer1.0.binary":
        assert "layer1.0.binary: can be tapped" in str(raised.value)


def test_a_network_with_an_untappable_activation_trains_on_the_others():
    model = nn.Sequential(SignModule(), nn.Conv2d(2, 4, 3, padding=1), SignModule(), nn.Conv2d(4, 4, 3))
    cmim = CMIM(model, X)
    assert [tap.name for tap in cmim.taps] == ["2"]
    with pytest.raises(CMIMError, match=r"names \['0'\], which cannot be tapped"):
        CMIM(copy.deepcopy(model), X, taps=["0"])
    assert a_loss(model, cmim).isfinite()


def test_printing_shows_what_is_tapped_and_what_is_not_and_why():
    model = nn.Sequential(
        SignModule(), nn.Conv2d(2, 4, 3, padding=1), SignModule(), nn.Conv2d(4, 5, 3), SignModule(), nn.Conv2d(5, 6, 1)
    )
    cmim = CMIM(model, X, taps=["2"], instances="image", weight=0.25)
    title, header, *rows = str(cmim).splitlines()
    assert "1 of 3" in title and "one instance = one image" in title and "weight 0.25" in title
    assert header.split()[:3] == ["tap", "channels", "weight"]
    assert [row.split()[0] for row in rows] == ["2", "0", "4"]
    assert rows[0].split()[1:3] == ["4", "1.000"] and "latent activation" in rows[0]
    assert "input that is binarized" in rows[1]
    assert "not chosen by taps=" in rows[2]
    assert "not attached" not in title
    cmim.remove()
    assert "not attached" in str(cmim)


@pytest.mark.parametrize(
    "setting, said",
    [
        ({"instances": "patch"}, "found 'patch'"),
        ({"weight": -1}, "weight must be a number, zero or more; found -1"),
        ({"weight": "0.3"}, "weight must be a number, zero or more; found '0.3'"),
        ({"num_positions": 0}, "num_positions must be an integer, 1 or more; found 0"),
        ({"taps_per_step": 0}, "taps_per_step must be an integer, 1 or more, or None for all; found 0"),
        ({"embed_dim": 0}, "embed_dim must be an integer, 1 or more; found 0"),
        ({"embed_dim": 3.5}, "found 3.5"),
        ({"queue_size": -1}, "queue_size must be an integer, 0 or more; found -1"),
        ({"objective": "nce"}, "objective must be a function such as cmim_plugin.info_nce; found 'nce'"),
        ({"objective": nce}, "nce needs the size of the training set"),
        ({"temperature": 0.0}, "temperature must be positive; found 0.0"),
        ({"layer_decay": 0.0}, r"layer_decay must be in \(0, 1\]; found 0.0"),
        ({"layer_decay": 1.5}, "found 1.5"),
    ],
)
def test_settings_out_of_range_are_refused(setting, said):
    with pytest.raises(CMIMError, match=said):
        CMIM(network(), X, **setting)


# -- some taps a step ----------------------------------------------------------------------------------------------


def test_the_first_step_contrasts_all_taps_and_each_further_one_as_many_as_asked_for():
    model = network(units=2)
    cmim = CMIM(model, X, taps_per_step=3)
    seen = []
    for step in range(41):
        cmim.zero_grad()
        a_loss(model, cmim).backward()
        # Whoever waits for the gradients of all heads gets them: zeros.
        assert all(p.grad is not None for p in cmim.parameters())
        gradients = [p.grad for p in cmim.parameters()]
        seen.append([k for k in range(4) if any(part.any() for head in cmim.heads.of(k, gradients) for part in head)])
        assert len(seen[-1]) == (4 if step == 0 else 3)
    counts = [sum(k in taps for taps in seen[1:]) for k in range(4)]
    assert sum(counts) == 120 and all(20 < count <= 40 for count in counts)


@each_instance
def test_the_mean_over_all_choices_of_taps_is_the_loss_of_all_with_its_gradients(instances):
    model = network(units=2)
    cmim = CMIM(model, X, taps_per_step=2, instances=instances, layer_decay=0.5)
    state = cmim.state_dict()

    def loss_of(chosen):
        cmim.load_state_dict(state)  # the same positions again
        cmim._hooks.chosen = None if chosen is None else frozenset(chosen)
        loss = a_loss(model, cmim)
        parameters = [*model.parameters(), *cmim.parameters()]
        found = torch.autograd.grad(loss, parameters, allow_unused=True)
        return loss, [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]

    expected, expected_gradients = loss_of(None)
    losses, found = zip(*[loss_of(pair) for pair in itertools.combinations(range(4), 2)], strict=True)
    torch.testing.assert_close(torch.stack(losses).mean(), expected)
    for each, wanted in zip(zip(*found, strict=True), expected_gradients, strict=True):
        torch.testing.assert_close(torch.stack(each).mean(0), wanted, rtol=1e-4, atol=1e-6)


def test_a_network_of_no_more_taps_contrasts_all_of_them_in_each_step():
    losses = []
    for taps_per_step in (None, 2, 6):
        model = network()
        cmim = CMIM(model, X, taps_per_step=taps_per_step)
        losses.append([a_loss(model, cmim).item() for _ in range(3)])
    assert losses[0] == losses[1] == losses[2]


def test_metrics_are_those_of_the_last_step_that_chose_the_tap():
    model = network(units=2)
    cmim = CMIM(model, X, taps_per_step=1)
    a_loss(model, cmim)
    expected = {name: metrics["bound"].item() for name, metrics in cmim.metrics.items()}
    assert list(expected) == [tap.name for tap in cmim.taps]
    for _ in range(4):
        (k,) = cmim._hooks.chosen
        a_loss(model, cmim)
        found = {name: metrics["bound"].item() for name, metrics in cmim.metrics.items()}
        name = cmim.taps[k].name
        assert found[name] != expected[name]
        assert found == {**expected, name: found[name]}
        expected = found
    other = CMIM(network(units=2), X, taps_per_step=1)
    other.load_state_dict(cmim.state_dict())
    assert {name: metrics["bound"].item() for name, metrics in other.metrics.items()} == expected


def test_a_chosen_tap_that_was_not_reached_gives_zero_and_a_warning(recorded):
    class Sometimes(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(2, 4, 3, padding=1)
            self.first, self.second = (nn.Sequential(SignModule(), nn.Conv2d(4, 4, 3, padding=1)) for _ in range(2))
            self.short = False

        def forward(self, x):
            x = self.first(self.stem(x))
            return (x if self.short else self.second(x)).mean((2, 3))

    model = Sometimes()
    cmim = CMIM(model, X, taps_per_step=1)
    a_loss(model, cmim)
    model.short = True
    for labels in (None, Y):
        losses = []
        for chosen in (0, 1):
            cmim._hooks.chosen = frozenset([chosen])
            logits = model(X)
            losses.append(cmim(model, labels=labels))
            (F.cross_entropy(logits, Y) + losses[-1]).backward()
        assert losses[0] > 0 and losses[1] == 0 and losses[1].requires_grad
    assert raised_warnings(recorded) == ["The forward pass did not reach tap second.0: it adds nothing to the loss."]


def test_printing_says_how_many_taps_a_step_has():
    model = network(units=2)
    assert "4 of 4 binary activations tapped, one instance" in str(CMIM(model, X))
    assert "4 of 4 binary activations tapped, 3 of them a step, one" in str(CMIM(network(units=2), X, taps_per_step=3))


def test_what_is_not_chosen_is_not_looked_at():
    model = network(IRNET)
    cmim = CMIM(model, X, taps_per_step=1)
    a_loss(model, cmim)
    (chosen,) = cmim._hooks.chosen
    model(X)
    for k, pair in enumerate(cmim._hooks.pairs):
        assert all((rows is not None) is (k == chosen) for rows in pair.rows)


# -- weights and metrics -------------------------------------------------------------------------------------------


@pytest.mark.parametrize("decay, expected", [(1.0, [1 / 4] * 4), (0.5, [1 / 15, 2 / 15, 4 / 15, 8 / 15])])
def test_layer_weights_grow_towards_the_output_and_sum_to_one(decay, expected):
    model = network(units=2)
    cmim = CMIM(model, X, layer_decay=decay, weight=0.7)
    assert cmim.layer_weights == pytest.approx(expected)
    loss = a_loss(model, cmim)
    total = 0.0
    for share, metrics in zip(expected, cmim.metrics.values(), strict=True):
        total += share * metrics["loss"].item()
    assert loss.item() == pytest.approx(0.7 * total, rel=1e-6)


def test_the_scale_of_the_loss_does_not_depend_on_depth():
    for units in (1, 2, 3):
        model = network(units=units)
        # Identical rows everywhere: each layer's loss is the logarithm of the number of candidates.
        cmim = CMIM(model, X, instances="image", weight=2.0)
        with torch.no_grad():
            for name, parameter in cmim.named_parameters():
                parameter.fill_(1.0 if name.endswith("bias") else 0.0)
        assert a_loss(model, cmim).item() == pytest.approx(2 * math.log(6), rel=1e-5)


@each_instance
@pytest.mark.parametrize("labels", [None, Y], ids=["unlabelled", "labelled"])
@pytest.mark.parametrize("objective", [info_nce, partial(nce, num_samples=100)], ids=["info", "nce"])
def test_metrics_are_detached_finite_and_follow_their_formula(objective, labels, instances):
    model = network()
    cmim = CMIM(model, X, instances=instances, objective=objective, num_positions=1000)
    assert cmim.metrics == {}
    a_loss(model, cmim, labels=labels)
    assert list(cmim.metrics) == [tap.name for tap in cmim.taps]
    for metrics in cmim.metrics.values():
        assert set(metrics) == {"loss", "bound"}
        for value in metrics.values():
            assert value.shape == () and value.isfinite() and not value.requires_grad and value.grad_fn is None
        # 6 images of classes 0 1 2 3 0 1; both taps are on maps of 4 x 4.
        positions = 16 if instances == "position" else 1
        logs = []
        for i in range(6):
            if labels is None:
                negatives = 6 * positions - 1
            else:
                negatives = positions * sum(Y[j] != Y[i] for j in range(6)).item()
            logs.append(math.log(negatives + 1 if objective is info_nce else negatives))
        expected = sum(logs) / 6 - metrics["loss"].item()
        assert metrics["bound"].item() == pytest.approx(expected, rel=1e-5, abs=1e-5)


def test_metrics_of_the_users_own_objective_are_its_loss():
    model, seen = network(), []

    def objective(z_b, z_f, *, temperature, labels, queue_b=None, queue_f=None, queue_labels=None):
        seen.append((z_b.shape, z_f.shape, temperature, labels, queue_b))
        return (z_b - z_f).square().mean((1, 2))

    cmim = CMIM(model, X, objective=objective, embed_dim=7, num_positions=11, temperature=0.4)
    a_loss(model, cmim).backward()
    assert seen == [((2, 11, 7), (2, 11, 7), 0.4, None, None)]
    assert all(set(metrics) == {"loss"} for metrics in cmim.metrics.values())


def recording(calls: list[dict]):
    """info_nce that keeps what it was called with, for a plug-in with one tap."""

    def objective(z_b, z_f, **arguments):
        tensors = {"z_b": z_b.detach(), "z_f": z_f.detach(), **arguments}
        calls.append({name: t[0] for name, t in tensors.items() if isinstance(t, torch.Tensor)})
        return info_nce(z_b, z_f, **arguments)

    return objective


def test_labels_follow_the_image_of_their_position():
    calls = []
    model = network()
    cmim = CMIM(model, X, objective=recording(calls), num_positions=1000, taps=["layer1.0.binary"])
    a_loss(model, cmim, labels=torch.tensor([0, 1, 2, 3, 4, 5]))
    assert torch.bincount(calls[0]["labels"]).tolist() == [16] * 6


@pytest.mark.parametrize("size", [2, 4, 8, 7])
def test_a_map_of_labels_gives_each_position_the_label_at_its_middle(size):
    calls = []
    model = network()
    cmim = CMIM(model, X, objective=recording(calls), num_positions=1000, taps=["layer1.0.binary"])
    labels = torch.randint(5, (6, size, size), generator=torch.Generator().manual_seed(3))
    a_loss(model, cmim, labels=labels)
    expected = []
    for sample in range(6):
        for row in range(4):  # the tap's map is 4 x 4
            for column in range(4):
                expected.append(labels[sample, int((row + 0.5) * size / 4), int((column + 0.5) * size / 4)].item())
    assert calls[0]["labels"].tolist() == expected


def test_embeddings_have_unit_length():
    calls = []
    model = network()
    a_loss(model, CMIM(model, X, objective=recording(calls), taps=["layer2.0.binary"]))
    for call in calls:
        for side in ("z_b", "z_f"):
            assert torch.allclose(call[side].norm(dim=1), torch.ones(len(call[side])), atol=1e-5)


# -- the queue -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("labelled", [False, True])
def test_the_queue_grows_and_wraps_first_in_first_out(labelled):
    calls = []
    model = network()
    cmim = CMIM(
        model, X, objective=recording(calls), instances="image", queue_size=10, taps=["layer1.0.binary"], embed_dim=5
    )
    past: list[tuple] = []
    for step, n in enumerate((4, 4, 4, 6, 13, 1, 2)):
        x, y = batch(n, seed=step)
        a_loss(model, cmim, x, labels=y if labelled else None).backward()
        call = calls[-1]
        kept = past[-10:]
        entries = [
            (tuple(b), tuple(f), label)
            for b, f, label in zip(
                call["queue_b"].tolist(), call["queue_f"].tolist(), call["queue_labels"].tolist(), strict=True
            )
        ]
        assert sorted(entries) == sorted(kept)
        assert not call["queue_b"].requires_grad and not call["queue_f"].requires_grad
        labels = y.tolist() if labelled else [-1] * n
        past += [
            (tuple(b), tuple(f), label)
            for b, f, label in zip(call["z_b"].tolist(), call["z_f"].tolist(), labels, strict=True)
        ]


def test_the_queue_of_positions_keeps_the_labels_of_their_images():
    calls = []
    model = network()
    cmim = CMIM(
        model, X, objective=recording(calls), num_positions=1000, queue_size=96, taps=["layer1.0.binary"], embed_dim=5
    )
    labels = torch.tensor([0, 1, 2, 3, 4, 5])
    for _ in range(2):
        a_loss(model, cmim, labels=labels).backward()
    assert torch.equal(calls[1]["queue_labels"], calls[0]["labels"])


def test_the_bound_counts_what_is_queued():
    model = network()
    cmim = CMIM(model, X, instances="image", queue_size=10)
    for candidates in (6, 12, 16, 16):
        a_loss(model, cmim)
        for metrics in cmim.metrics.values():
            expected = math.log(candidates) - metrics["loss"].item()
            assert metrics["bound"].item() == pytest.approx(expected, abs=1e-5)


def test_a_batch_of_one_has_negatives_once_the_queue_is_filled(recorded):
    model = network()
    cmim = CMIM(model, X, instances="image", queue_size=4)
    a_loss(model, cmim)
    assert a_loss(model, cmim, X[:1]).item() > 0
    assert not raised_warnings(recorded)


# -- batches without negatives -------------------------------------------------------------------------------------


def test_a_batch_of_one_gives_zero_with_its_graph_and_one_warning(recorded):
    model = network()
    cmim = CMIM(model, X, instances="image")
    for _ in range(3):
        loss = a_loss(model, cmim, X[:1])
        assert loss.item() == 0 and loss.requires_grad
        loss.backward()
    assert all(not gradient.any() for gradient in gradients(model) + gradients(cmim))
    assert gradients(model) and gradients(cmim)
    assert len(raised_warnings(recorded)) == 1
    assert "no negatives" in raised_warnings(recorded)[0]


@each_instance
def test_a_batch_of_one_class_gives_zero_with_its_graph_and_one_warning(recorded, instances):
    model = network()
    cmim = CMIM(model, X, instances=instances)
    for _ in range(3):
        loss = a_loss(model, cmim, labels=torch.full((6,), 3))
        assert loss.item() == pytest.approx(0, abs=1e-6) and loss.requires_grad
        loss.backward()
    assert all(gradient.abs().max() < 1e-6 for gradient in gradients(model) + gradients(cmim))
    assert len(raised_warnings(recorded)) == 1
    assert a_loss(model, cmim, labels=Y).item() > 0


def test_the_positions_of_one_image_are_negatives_of_each_other(recorded):
    model = network()
    cmim = CMIM(model, X)
    assert a_loss(model, cmim, X[:1]).item() > 0
    assert not raised_warnings(recorded)


def test_identical_channels_and_constant_inputs_give_finite_gradients():
    model = network()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.fill_(0.5)
    cmim = CMIM(model, X)
    for x in (X, torch.zeros(6, 2, 4, 4)):
        loss = a_loss(model, cmim, x)
        loss.backward()
        assert loss.isfinite()
        assert all(gradient.isfinite().all() for gradient in gradients(model) + gradients(cmim))


# -- forgotten heads -----------------------------------------------------------------------------------------------


def train_steps(optimizer, model, cmim, steps, accumulate=1):
    for step in range(steps):
        loss = F.cross_entropy(model(X), Y)
        loss += cmim(model)
        loss.backward()
        if step % accumulate == accumulate - 1:
            optimizer.step()
            optimizer.zero_grad()


OPTIMIZERS = {"SGD": partial(torch.optim.SGD, lr=0.1), "AdamW": partial(torch.optim.AdamW, lr=0.1)}
each_optimizer = pytest.mark.parametrize("make", OPTIMIZERS.values(), ids=OPTIMIZERS)


@each_optimizer
@pytest.mark.parametrize("accumulate", [1, 3])
def test_forgotten_heads_are_warned_about_once(recorded, make, accumulate):
    model = network()
    cmim = CMIM(model, X)
    train_steps(make(model.parameters()), model, cmim, 8 * accumulate, accumulate)
    assert len(raised_warnings(recorded)) == 1
    assert 'optimizer.add_param_group({"params": cmim.parameters()})' in raised_warnings(recorded)[0]


@each_optimizer
@pytest.mark.parametrize("accumulate", [1, 3])
def test_trained_heads_are_not_warned_about(recorded, make, accumulate):
    model = network()
    cmim = CMIM(model, X)
    optimizer = make(model.parameters())
    optimizer.add_param_group({"params": cmim.parameters()})
    train_steps(optimizer, model, cmim, 8 * accumulate, accumulate)
    assert not raised_warnings(recorded)


def test_heads_with_an_optimizer_of_their_own_are_not_warned_about(recorded):
    model = network()
    cmim = CMIM(model, X)
    optimizers = [torch.optim.SGD(part.parameters(), lr=0.1) for part in (model, cmim)]
    for _ in range(8):
        (F.cross_entropy(model(X), Y) + cmim(model)).backward()
        for optimizer in optimizers:
            optimizer.step()
    assert not raised_warnings(recorded)


def test_a_network_that_is_not_trained_is_not_warned_about(recorded):
    model = network()
    cmim = CMIM(model, X)
    train_steps(torch.optim.SGD(cmim.parameters(), lr=0.1), model, cmim, 8)
    for _ in range(8):
        a_loss(model, cmim)
    assert not raised_warnings(recorded)


# -- dtypes, memory formats, in-place functions --------------------------------------------------------------------


@each_method
@each_instance
def test_autocast_forwards_give_a_float32_loss(recipe, instances):
    model = network(recipe)
    cmim = CMIM(model, X, instances=instances)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = a_loss(model, cmim)
    assert loss.dtype == torch.float32 and loss.isfinite()
    loss.backward()
    assert all(gradient.isfinite().all() for gradient in gradients(model) + gradients(cmim))


def test_autocast_does_not_reach_heads_and_critic():
    losses = []
    for enabled in (False, True):
        model = network()
        cmim = CMIM(model, X)
        model(X)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            losses.append(cmim(model))
    assert_same(losses[1], losses[0])


def test_attaching_under_autocast_finds_the_same_taps():
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cmim = CMIM(network(), X)
    assert [tap.name for tap in cmim.taps] == ["layer1.0.binary", "layer2.0.binary"]


@each_method
def test_a_bfloat16_model_gives_a_float32_loss(recipe):
    model = network(recipe).bfloat16()
    cmim = CMIM(model, X.bfloat16())
    assert len(cmim.taps) == 2
    loss = a_loss(model, cmim, X.bfloat16())
    assert loss.dtype == torch.float32 and loss.isfinite()
    loss.backward()
    assert model.conv1.weight.grad.dtype == torch.bfloat16 and model.conv1.weight.grad.any()


@each_instance
def test_in_float64_everything_is_float64(instances):
    single, double = network(), network().double()
    first = CMIM(single, X, instances=instances, queue_size=8)
    second = CMIM(double, X.double(), instances=instances, queue_size=8).double()
    for seed in (1, 2):
        x = batch(seed=seed)[0]
        loss = a_loss(double, second, x.double())
        assert loss.dtype == torch.float64
        assert loss.item() == pytest.approx(a_loss(single, first, x).item(), rel=1e-3)
    loss.backward()
    assert double.conv1.weight.grad.any()


@each_method
@each_instance
def test_channels_last_changes_nothing(recipe, instances):
    losses, found = [], []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        model = network(recipe).to(memory_format=memory_format)
        x = X.contiguous(memory_format=memory_format)
        cmim = CMIM(model, x, instances=instances, num_positions=20)
        losses.append(a_loss(model, cmim, x))
        losses[-1].backward()
        found.append(gradients(model) + gradients(cmim))
    torch.testing.assert_close(losses[1], losses[0], rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(found[1], found[0], rtol=1e-3, atol=1e-4)


@each_instance
def test_a_function_in_place_after_the_tap_does_not_change_the_loss(instances):
    losses, found = [], []
    for in_place in (False, True):
        torch.manual_seed(0)
        model = Overwriting(in_place)
        cmim = CMIM(model, X, instances=instances)
        assert [tap.name for tap in cmim.taps] == ["sign"]
        losses.append(a_loss(model, cmim))
        losses[-1].backward()
        found.append(gradients(model) + gradients(cmim))
    assert_same(losses[1], losses[0])
    torch.testing.assert_close(found[1], found[0])


def test_another_batch_size_and_resolution_than_the_example_is_taken():
    model = network()
    cmim = CMIM(model, X)
    for shape in ((2, 2, 4, 4), (9, 2, 6, 8), (3, 2, 3, 5)):
        assert a_loss(model, cmim, torch.randn(shape)).item() > 0


class Checkpointed(nn.Module):
    def __init__(self, recipe, enabled):
        super().__init__()
        self.body = network(recipe)
        self.enabled = enabled

    def forward(self, x):
        stem, rest = self.body[:3], self.body[3:]
        return checkpoint(rest, stem(x), use_reentrant=False) if self.enabled else rest(stem(x))


@each_method
@each_instance
def test_activation_checkpointing_changes_neither_loss_nor_gradients(recipe, instances):
    losses, found = [], []
    for enabled in (False, True):
        model = Checkpointed(recipe, enabled)
        cmim = CMIM(model, X, instances=instances)
        losses.append(F.cross_entropy(model(X), Y))
        losses[-1] = losses[-1] + cmim(model)
        losses[-1].backward()
        found.append(gradients(model) + gradients(cmim))
        # Recomputation in the backward pass is no forward pass of the model.
        with pytest.raises(CMIMError, match="No forward pass"):
            cmim(model)
    torch.testing.assert_close(losses[1], losses[0])
    torch.testing.assert_close(found[1], found[0])


def test_a_wrapper_of_torch_compile_is_the_same_model():
    losses = []
    for compiled in (False, True):
        model = network()
        cmim = CMIM(model, X)
        called = torch.compile(model, backend="eager") if compiled else model
        called(X)
        losses.append(cmim(called))
    torch.testing.assert_close(losses[1], losses[0])


# -- memory --------------------------------------------------------------------------------------------------------


class Storages:
    """Weak references to the storages of every module's output, from the time it is put on a model."""

    def __init__(self, model: nn.Module):
        self.references: list[StorageWeakRef] = []
        self.handles = [module.register_forward_hook(self.see) for module in model.modules()]

    def see(self, module, args, output):
        self.references.append(StorageWeakRef(output.untyped_storage()))

    def alive(self) -> int:
        gc.collect()
        return sum(not reference.expired() for reference in self.references)

    def __len__(self) -> int:
        return len(self.references)


@each_method
@each_instance
def test_no_activation_outlives_an_ordinary_step(recipe, instances):
    model = network(recipe)
    cmim = CMIM(model, X, instances=instances, queue_size=8)
    storages = Storages(model)
    loss = F.cross_entropy(model(X), Y)
    loss += cmim(model)
    assert storages.alive() > 0  # the graph is still there
    loss.backward()
    del loss
    assert len(storages) and storages.alive() == 0


@each_method
def test_no_activation_outlives_a_loss_that_is_dropped(recipe):
    model = network(recipe)
    cmim = CMIM(model, X, queue_size=8)
    storages = Storages(model)
    a_loss(model, cmim)
    assert len(storages) and storages.alive() == 0


@each_method
def test_no_activation_outlives_a_failed_forward(recipe):
    model = Failing()
    model.body = network(recipe)
    cmim = CMIM(model, X)
    model.fails = True
    storages = Storages(model)
    with contextlib.suppress(ValueError):
        model(X)
    assert len(storages) and storages.alive() == 0
    assert cmim.metrics == {}


@each_method
def test_no_activation_outlives_a_forward_in_eval_mode(recipe):
    model = network(recipe)
    cmim = CMIM(model, X)
    storages = Storages(model)
    model.eval()
    model(X)
    assert len(storages) and storages.alive() == 0
    assert cmim.metrics == {}


@each_method
def test_no_activation_outlives_a_step_without_its_loss(recipe):
    model = network(recipe)
    cmim = CMIM(model, X)
    storages = Storages(model)
    F.cross_entropy(model(X), Y).backward()
    assert len(storages) and storages.alive() == 0
    assert cmim.metrics == {}


def test_a_pass_that_nobody_asked_for_is_forgotten_by_the_next():
    model = network()
    cmim = CMIM(model, X)
    storages = Storages(model)
    model(X)
    for handle in storages.handles:
        handle.remove()
    loss = a_loss(model, cmim)
    assert len(storages) and storages.alive() == 0
    loss.backward()


def test_the_plug_in_does_not_keep_the_model_alive():
    model = network()
    cmim = CMIM(model, X)
    storages = [StorageWeakRef(buffer.untyped_storage()) for buffer in model.buffers()]
    a_loss(model, cmim).backward()
    del model
    gc.collect()
    assert all(storage.expired() for storage in storages)
    with pytest.raises(CMIMError, match="another model"):
        cmim(network())


# -- a teacher -----------------------------------------------------------------------------------------------------


def teacher(recipe=BIREAL, **sizes) -> nn.Module:
    return network(full_precision(recipe), seed=3, **sizes)


@each_method
@each_instance
def test_a_teacher_matched_by_name_stands_in_for_the_latents(recipe, instances):
    model, other = network(recipe), teacher(recipe, width=8)
    before = copy.deepcopy(other.state_dict())
    cmim = CMIM(model, X, teacher=other, instances=instances)
    assert [(tap.channels, tap.latent_channels) for tap in cmim.taps] == [(4, 8), (4, 8)]
    assert "teacher's activation" in str(cmim)
    loss = a_loss(model, cmim)
    loss.backward()
    assert loss.item() > 0 and model.conv1.weight.grad.any()
    assert not gradients(other)
    assert_same(other.state_dict(), before)
    assert not other.training
    assert not leftover_hooks(other)
    cmim.remove()
    assert not leftover_hooks(model) and not leftover_hooks(other)


def test_a_teacher_runs_on_the_batch_of_the_step():
    model, other = network(), teacher()
    cmim = CMIM(model, X, teacher=other)
    seen = []
    other.register_forward_pre_hook(lambda module, args: seen.append((args[0], torch.is_grad_enabled())))
    x = batch(seed=8)[0]
    a_loss(model, cmim, x)
    assert len(seen) == 1 and seen[0][0] is x and seen[0][1] is False
    model.eval()
    model(x)
    assert len(seen) == 1


def test_a_teacher_is_matched_by_an_explicit_mapping():
    model, other = network(), teacher(units=2)
    cmim = CMIM(model, X, teacher=other, teacher_modules={"layer2.0.binary": "layer2.1.binary"}, instances="image")
    assert [tap.latent_channels for tap in cmim.taps] == [4, 8]
    assert a_loss(model, cmim).item() > 0


class WithSpare(nn.Module):
    def __init__(self):
        super().__init__()
        self.body = teacher()
        self.spare = nn.Linear(3, 3)

    def forward(self, x):
        return self.body(x)


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
            r"did not run in its forward: \['spare'\]",
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


def test_a_teacher_with_another_number_of_positions_is_refused():
    # The pooled map of the teacher has one position, the tap has 16.
    arguments = {"teacher": teacher(), "teacher_modules": {"layer1.0.binary": "pool"}}
    model = network()
    with pytest.raises(CMIMError, match=r"layer1\.0\.binary have .* positions"):
        cmim = CMIM(model, X, **arguments)
        a_loss(model, cmim)
    model = network()
    assert a_loss(model, CMIM(model, X, instances="image", **arguments)).item() > 0


def test_a_teacher_in_training_mode_is_refused():
    model, other = network(), teacher()
    cmim = CMIM(model, X, teacher=other)
    other.train()
    with pytest.raises(CMIMError, match=r"training mode.*call teacher\.eval\(\)"):
        model(X)
    other.eval()
    assert a_loss(model, cmim).item() > 0


# -- copies and defaults -------------------------------------------------------------------------------------------


def test_pickling_the_plug_in_is_refused_with_what_to_do_instead():
    model = network()
    with pytest.raises(CMIMError, match=r"Save cmim\.state_dict\(\)"):
        pickle.dumps(CMIM(model, X))


def test_a_module_that_holds_network_and_plug_in_can_be_copied_and_the_original_goes_on():
    whole = nn.Module()
    whole.model = network()
    whole.cmim = CMIM(whole.model, X)
    twin = copy.deepcopy(whole)
    assert torch.equal(twin.model.eval()(X), whole.model.eval()(X))
    twin.model.train()(X)
    with pytest.raises(CMIMError):
        twin.cmim(twin.model)
    assert a_loss(whole.model.train(), whole.cmim).requires_grad


def test_a_default_device_does_not_reach_the_dry_run_or_the_loss():
    model = network()
    with torch.device("meta"):
        cmim = CMIM(model, X, queue_size=8)
        loss = a_loss(model, cmim, labels=Y)
        loss.backward()
        bounds = [metrics["bound"].item() for metrics in cmim.metrics.values()]
    assert loss.device.type == "cpu" and all(math.isfinite(bound) for bound in bounds)
