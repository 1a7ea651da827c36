"""Attaching to a model: what is tapped, what is refused, and that the model stays as it was."""

import copy
import gc
import pickle
import random

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import nn

from cmim_plugin import CMIM, NCE, CMIMError, CMIMWarning, find_binary_activations
from cmim_plugin.text import folded
from networks import (
    BIREAL,
    METHODS,
    Binary,
    BinaryConv,
    X,
    Y,
    a_loss,
    assert_same,
    batch,
    everything,
    leftover_hooks,
    network,
    random_states,
    teacher,
    told,
    waiting,
)

each_method = pytest.mark.parametrize("recipe", METHODS.values(), ids=METHODS)


class Shared(nn.Module):
    """One activation module called twice."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1)
        self.sign = Binary()
        self.first = nn.Conv2d(4, 6, 3, padding=1)
        self.second = nn.Conv2d(6, 5, 3, padding=1)

    def forward(self, x):
        x = self.first(self.sign(self.stem(x)))
        return self.second(self.sign(x)).mean((2, 3))


class TwoInputs(nn.Module):
    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1)
        self.sign = Binary()
        self.conv = nn.Conv2d(4, 4, 3, padding=1)

    def forward(self, image, shift):
        return self.conv(self.sign(self.stem(image) + shift[:, None, None, None])).mean((2, 3))


class Eventful(nn.Module):
    """Whatever a forward pass can move, it moves."""

    def __init__(self):
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1)
        self.norm = nn.BatchNorm2d(4)
        self.frozen = nn.BatchNorm2d(4)
        self.dropout = nn.Dropout(0.3)
        self.sign = Binary()
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


def no_op(module, args, output):
    pass


def eventful() -> nn.Module:
    model = Eventful()
    model.frozen.eval()
    model.dropout.eval()
    model.register_forward_hook(no_op)
    model.stem.weight.grad = torch.randn_like(model.stem.weight)
    model.conv.bias.requires_grad_(False)
    return model


# -- the lines of the README ---------------------------------------------------------------------------------------


@each_method
def test_one_line_to_attach_and_one_in_the_loop_train_network_and_heads(recipe):
    with told() as warned:
        model = network(recipe)
        optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        cmim = CMIM(model, X)
        stem, heads = model.conv1.weight.clone(), cmim.heads.weights.clone()
        for _ in range(3):
            loss = F.cross_entropy(model(X), Y)
            loss += cmim(model)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        assert loss.isfinite()
        assert not torch.equal(model.conv1.weight, stem)
        assert (cmim.heads.weights != heads).all()
    assert not warned


def test_it_has_no_parameters_to_optimize_clip_decay_or_wrap():
    cmim = CMIM(network(), X, queue_size=4, teacher=teacher())
    assert list(cmim.parameters()) == []
    assert list(cmim.modules()) and not any(isinstance(module, nn.Conv2d) for module in cmim.modules())


# -- what is tapped ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("method, part", [("IR-Net", "conv"), ("Bi-Real", "binary")])
def test_taps_come_in_forward_order_with_their_names_and_channels(method, part):
    model = network(METHODS[method], stages=3, units=2)
    modules = ["layer1.0", "layer1.1", "layer2.0", "layer2.1", "layer3.0", "layer3.1"]
    expected = [(f"{module}.{part}", width) for module, width in zip(modules, [4, 4, 4, 8, 8, 16], strict=True)]
    cmim = CMIM(model, X)
    assert isinstance(cmim.taps, tuple)
    assert [(tap.name, tap.channels) for tap in cmim.taps] == expected
    cmim.remove()
    found = find_binary_activations(model, X)
    assert [(f.name, f.channels, f.tapped, f.reason) for f in found] == [(*e, True, None) for e in expected]


def test_a_module_called_twice_gives_two_taps():
    model = Shared()
    cmim = CMIM(model, X)
    assert [(tap.name, tap.channels) for tap in cmim.taps] == [("sign", 4), ("sign#2", 6)]
    loss = a_loss(model, cmim)
    assert set(cmim.metrics) == {"sign", "sign#2"}
    loss.backward()
    assert model.stem.weight.grad.any()


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
    assert CMIM(network(), X).taps == CMIM(network(), (X,)).taps


def test_other_examples_are_refused():
    with pytest.raises(CMIMError, match=r"tuple of positional inputs or a dict .* found"):
        CMIM(network(), "a batch")
    with pytest.raises(CMIMError, match=r"model's forward raised TypeError.*Pass an example_input"):
        CMIM(network(), (X, X))
    with pytest.raises(CMIMError, match="example_input holds no tensor"):
        CMIM(network(), ())
    with pytest.raises(CMIMError, match=r"dry run failed.*RuntimeError") as raised:
        CMIM(network(), torch.randn(2, 5, 4, 4))
    assert isinstance(raised.value.__cause__, RuntimeError)


def test_a_network_without_binary_activation_is_refused_with_what_came_nearest():
    with pytest.raises(CMIMError, match=r"was found in this Sequential.*\n  \(none: binary weights"):
        CMIM(teacher(), X)
    with pytest.raises(CMIMError, match="network's input that is binarized") as raised:
        CMIM(nn.Sequential(Binary(), nn.Conv2d(2, 4, 3)), X)
    assert "\n  0: " in str(raised.value)


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
        (["layer9.binary"], r"taps= names \['layer9.binary'\](.|\n)*layer1.0.binary: can be tapped"),
        ([], r"taps= chose none(.|\n)*layer1.0.binary: can be tapped"),
        ("layer1.0.binary", r"a list of names, or a function of .*; found 'layer1.0.binary'"),
        (iter(["layer1.0.binary"]), r"a list of names, or a function of .*; found <list_iterator"),
        (lambda name, module: False, r"chose none(.|\n)*layer1.0.binary: can be tapped"),
    ],
    ids=["unknown", "empty", "string", "iterator", "callable"],
)
def test_unknown_taps_are_refused_with_those_that_exist(taps, said):
    with pytest.raises(CMIMError, match=said):
        CMIM(network(), X, taps=taps)


def test_a_network_with_an_untappable_activation_trains_on_the_others():
    model = nn.Sequential(Binary(), nn.Conv2d(2, 4, 3, padding=1), Binary(), nn.Conv2d(4, 4, 3))
    cmim = CMIM(model, X)
    assert [tap.name for tap in cmim.taps] == ["2"]
    with pytest.raises(CMIMError, match=r"names \['0'\], none of which can be tapped"):
        CMIM(copy.deepcopy(model), X, taps=["0"])
    assert a_loss(model, cmim).isfinite()


def test_printing_shows_what_is_tapped_and_what_is_not_and_why():
    model = nn.Sequential(Binary(), nn.Conv2d(2, 4, 3), Binary(), nn.Conv2d(4, 5, 1), Binary(), nn.Conv2d(5, 6, 1))
    cmim = CMIM(model, X, taps=["2"], instances="image", weight=0.25)
    title, header, *rows = str(cmim).splitlines()
    assert "1 of 3" in title and "one instance = one image" in title and "weight 0.25" in title
    assert header.split()[:3] == ["tap", "channels", "share"]
    assert [row.split()[0] for row in rows] == ["2", "0", "4"]
    assert rows[0].split()[1:3] == ["4", "1.000"] and "its latent" in rows[0]
    assert "input that is binarized" in rows[1]
    assert "not chosen by taps=" in rows[2]
    assert "not attached" not in title
    cmim.remove()
    assert "not attached" in str(cmim)


def test_printing_says_how_many_taps_a_step_has():
    assert "4 of 4 binary activations tapped, one instance" in str(CMIM(network(units=2), X))
    assert "4 of 4 binary activations tapped, 3 of them a step, one" in str(CMIM(network(units=2), X, taps_per_step=3))


# -- settings ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "setting, said",
    [
        ({"instances": "patch"}, "found 'patch'"),
        ({"weight": -1}, "weight must be a number, zero or more, or a 0-d tensor; found -1"),
        ({"weight": "0.3"}, "weight must be a number, zero or more, or a 0-d tensor; found '0.3'"),
        ({"heads_lr": -1}, "heads_lr must be a number, zero or more; found -1"),
        ({"num_positions": 0}, "num_positions must be an integer, 1 or more; found 0"),
        ({"taps_per_step": 0}, "taps_per_step must be an integer, 1 or more, or None for all; found 0"),
        ({"embed_dim": 0}, "embed_dim must be an integer, 1 or more, or None; found 0"),
        ({"batch_size": 0}, "batch_size must be an integer, 1 or more, or None; found 0"),
        ({"queue_size": -1}, "queue_size must be an integer, 0 or more; found -1"),
        ({"objective": NCE}, r"a function such as InfoNCE\(\) or NCE\(num_samples=...\); found <class .*NCE"),
        ({"temperature": 0.0}, "temperature must be positive; found 0.0"),
        ({"layer_decay": 0.0}, r"layer_decay must be in \(0, 1\]; found 0.0"),
        ({"layer_decay": 1.5}, "found 1.5"),
    ],
)
def test_settings_out_of_range_are_refused(setting, said):
    with pytest.raises(CMIMError, match=said):
        CMIM(network(), X, **setting)


@pytest.mark.parametrize("weight", [-0.1, float("nan"), float("inf"), None, True, "0.1", torch.ones(1)])
def test_a_weight_that_no_loss_can_have_is_refused_at_any_time(weight):
    cmim = CMIM(network(), X)
    with pytest.raises(CMIMError, match="weight must be a number, zero or more, or a 0-d tensor; found"):
        cmim.weight = weight
    assert cmim.weight == 0.1


def test_numbers_of_numpy_are_numbers():
    model = network()
    numbers = {"weight": np.float32(0.1), "num_positions": np.int64(32), "embed_dim": np.int32(8)}
    cmim = CMIM(model, X, queue_size=np.int64(4), taps_per_step=np.int64(2), temperature=np.float64(0.2), **numbers)
    cmim.weight = np.float32(0.2)
    assert type(cmim.weight) is float  # for torch.compile, to which numbers of numpy are tensors
    assert a_loss(model, cmim).dtype == torch.float32 and cmim.draws.shape == (len(cmim.taps), 32)


@pytest.mark.parametrize("width, expected", [(900, 128), (1500, 64), (2500, 32)])
def test_embeddings_are_128_wide_and_narrower_where_the_heads_would_outweigh_a_small_network(width, expected):
    cmim = CMIM(nn.Sequential(nn.Conv2d(2, width, 1), Binary(), nn.Conv2d(width, 1, 1)), X)
    assert [tuple(side.shape) for side in cmim.heads.weights_of(0)] == [(width, expected)] * 2


def test_a_second_plug_in_on_the_same_model_is_refused():
    model = network()
    cmim = CMIM(model, X)
    with pytest.raises(CMIMError, match=r"attached to this model already: call its remove\(\)"):
        CMIM(model, X)
    with pytest.raises(CMIMError, match="already"):
        CMIM(model.layer1, torch.randn(2, 4, 4, 4))
    assert a_loss(model, cmim).isfinite()


def test_a_plug_in_that_is_out_of_reach_can_be_removed():
    model = network()
    kept = [CMIM(model, X)]  # as the traceback of an interrupted cell keeps it
    CMIM.remove_from(model)
    assert a_loss(model, CMIM(model, X)).isfinite()
    with pytest.raises(CMIMError, match="removed from its model"):
        kept[0](model)


def test_a_copied_model_can_be_freed_of_the_hooks_that_do_nothing_in_it():
    def hooks(model):
        kinds = ("_forward_pre_hooks", "_forward_hooks", "_load_state_dict_post_hooks")
        flags = ("_forward_pre_hooks_with_kwargs", "_forward_hooks_with_kwargs", "_forward_hooks_always_called")
        return [list(getattr(m, name)) for m in model.modules() for name in (*kinds, *flags)]

    model = network()
    handle = model.conv1.register_forward_hook(lambda *args: None, with_kwargs=False)
    bare = hooks(model)
    cmim = CMIM(model, X)
    copied = copy.deepcopy(model)
    assert hooks(copied) != bare
    CMIM.remove_from(copied)
    assert hooks(copied) == bare and handle.id in model.conv1._forward_hooks
    assert a_loss(model, cmim).isfinite()


def test_data_parallel_is_taken_on_one_device_and_refused_on_several():
    model = network()
    alone = nn.DataParallel(model)  # without a GPU: no device at all
    several = nn.DataParallel(model)
    several.device_ids = [0, 1]
    with pytest.raises(CMIMError, match=r"on 2 devices .*DistributedDataParallel.*model\.module without"):
        CMIM(several, X)
    cmim = CMIM(alone, X)
    alone(X)
    with pytest.raises(CMIMError, match="on 2 devices"):
        cmim(several)
    cmim(alone).backward()
    assert model.conv1.weight.grad.any()


# -- the model is as it was ----------------------------------------------------------------------------------------


@pytest.mark.parametrize("recipe, instances", [(METHODS["IR-Net"], "position"), (METHODS["Bi-Real"], "image")])
def test_outputs_are_bit_identical_to_those_without(recipe, instances):
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


@pytest.mark.parametrize("training", [True, False])
def test_the_dry_run_attaching_and_removing_leave_everything_as_it_was(training):
    model = eventful()
    if not training:
        model.training = False
        model.norm.training = False
    before = everything(model)
    assert [f.name for f in find_binary_activations(model, X) if f.tapped] == ["sign"]
    assert everything(model) == before
    CMIM(model, X, queue_size=8).remove()
    assert everything(model) == before


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
    model.fails = True
    before = everything(model)
    with pytest.raises(CMIMError, match="ValueError: a shape does not fit"):
        CMIM(model, X)
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


def test_neither_attaching_nor_training_moves_the_random_generators():
    model = network()
    before = random_states()
    cmim = CMIM(model, X, queue_size=4)
    assert random_states() == before
    for _ in range(3):
        a_loss(model, cmim, labels=Y).backward()
    assert random_states() == before


def test_the_seed_fixes_heads_and_positions_which_are_drawn_anew_for_each_step():
    losses = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        model = network()
        cmim = CMIM(model, X, num_positions=8, heads_lr=0)
        losses.append([a_loss(model, cmim).item() for _ in range(3)])
    assert losses[0] == losses[1] != losses[2]
    assert len(set(losses[0])) == 3


# -- off and on again ----------------------------------------------------------------------------------------------


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
    with first.paused():
        pass
    assert a_loss(model, second).isfinite()


def test_paused_takes_the_hooks_off_and_puts_them_back():
    model = network()
    before = pickle.dumps(model)
    cmim = CMIM(model, X)
    with cmim.paused():
        assert not leftover_hooks(model)
        assert pickle.dumps(model) == before
    model(X)
    with cmim.paused():  # forgets that pass
        assert "not attached" in str(cmim)
        model(X)
        with pytest.raises(CMIMError, match="is paused: leave the"):
            cmim(model)
    with pytest.raises(CMIMError, match="No forward pass"):
        cmim(model)
    assert a_loss(model, cmim).isfinite()


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
    cmim = CMIM(model, X, teacher=teacher(BIREAL))
    a_loss(model, cmim).backward()
    del cmim
    gc.collect()
    assert not leftover_hooks(model)
    assert model(X).isfinite().all()


def test_a_default_device_does_not_reach_the_dry_run_or_the_loss():
    model = network()
    with torch.device("meta"):
        cmim = CMIM(model, X, queue_size=8)
        loss = a_loss(model, cmim, labels=Y)
        loss.backward()
        bounds = [metrics["bound"].item() for metrics in cmim.metrics.values()]
    assert loss.device.type == "cpu" and all(np.isfinite(bounds))


def test_a_default_dtype_does_not_reach_state_or_loss():
    losses, states = [], []
    for default in (torch.float32, torch.float64):
        torch.manual_seed(0)
        model = network()
        torch.set_default_dtype(default)
        try:
            cmim = CMIM(model, X, queue_size=8)
            losses.append([a_loss(model, cmim) for _ in range(2)][-1])
            losses[-1].backward()
            states.append(cmim.state_dict())
        finally:
            torch.set_default_dtype(torch.float32)
    assert_same(losses[1], losses[0])
    assert_same(states[1], states[0])


def test_a_module_that_is_gone_after_a_pause_is_named_by_the_loss():
    model = network()
    cmim = CMIM(model, X)
    with cmim.paused():
        del model.layer1[0]
    model(X)
    with pytest.warns(CMIMWarning, match=r"Tap layer1\.0.*: the forward pass did not reach it"):
        assert cmim(model) > 0
    cmim.remove()
    assert not leftover_hooks(model)


class Wrapped(nn.Module):
    """As torch's checkpoint_wrapper: parameters and hooks of the module inside have longer names."""

    def __init__(self, module):
        super().__init__()
        self.inner = module

    def forward(self, x):
        return self.inner(x)


@pytest.mark.parametrize(
    "change", [lambda m: m.insert(0, nn.BatchNorm2d(2)), lambda m: m.__setitem__(2, Wrapped(m[2]))]
)
def test_a_pause_and_a_report_keep_to_the_modules_whatever_their_names_are_by_then(change):
    model = nn.Sequential(nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4), BinaryConv(4, 4, 1))
    cmim = CMIM(model, X)
    change(model)
    with cmim.paused():
        pass
    model(X)
    captured = waiting(cmim)
    binary, latent = captured.pairs[0].sides
    assert torch.equal(binary, latent.detach().sign())
    assert cmim(model) > 0
    assert [tap.name for tap in cmim.report(model, [X]).taps] == ["2"]


def test_another_plug_in_attached_within_a_pause_stays_and_the_first_says_so():
    model = network()
    cmim = CMIM(model, X)
    with pytest.warns(CMIMWarning, match="Another CMIM was attached"), cmim.paused():
        other = CMIM(model, X)
    model(X)
    assert other(model).isfinite()


def test_models_that_a_dry_run_would_break_are_refused():
    class FSDPModule(nn.Module):  # what fully_shard() makes of each module's class, by that name
        pass

    class Sharded(FSDPModule, nn.Sequential):
        pass

    with pytest.raises(CMIMError, match="attach CMIM first, then call fully_shard"):
        CMIM(Sharded(network()), X)
    with pytest.raises(CMIMError, match="on the meta device"):
        CMIM(network().to("meta"), X)
    with torch.inference_mode(), pytest.raises(CMIMError, match=r"outside of torch.inference_mode\(\)"):
        CMIM(network(), X)


def test_names_of_a_resnet_fold_stage_by_stage():
    rows = [(f"layer{stage}.{block}.binary", "16") for stage, block in [(1, 0), (1, 1), (1, 2), (2, 0), (3, 4)]]
    assert folded(rows) == [("layer1.0-2.binary (3)", "16"), ("layer2.0.binary", "16"), ("layer3.4.binary", "16")]


def test_names_whose_numbers_cannot_be_counted_stay_as_they_are():
    rows = [("conv01", "4"), ("conv1", "4"), ("{x}.0", "4"), ("{x}.1", "4")]
    assert folded(rows) == [("conv01", "4"), ("conv1", "4"), ("{x}.0-1 (2)", "4")]
