"""Checkpoints, copies and moves of the plug-in."""

import copy
import io
import itertools
import pickle
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cmim_plugin import CMIM, CMIMError, CMIMWarning, find_binary_activations
from networks import X, Y, a_loss, assert_same, batch, network, teacher

SETTINGS = {
    "image": {"instances": "image"},
    "position": {"num_positions": 10},
    "some taps": {"num_positions": 10, "taps_per_step": 1},
    "queue": {"num_positions": 10, "queue_size": 17, "taps_per_step": 2},
    "own optimizer": {"num_positions": 10, "heads_lr": 0},
}


class Whole(nn.Module):
    """What a training framework checkpoints: a module that holds model and plug-in."""

    def __init__(self, seed=0, **settings):
        super().__init__()
        self.model = network(seed=seed, units=2)
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.cmim = CMIM(self.model, X, **settings)


def training(seed=0, **settings):
    whole = Whole(seed, **settings)
    return whole, torch.optim.SGD(whole.model.parameters(), lr=0.1, momentum=0.9)


def train(whole, optimizer, steps) -> list:
    """Everything that a step shows, bit by bit."""
    seen = []
    for step in steps:
        x, y = batch(seed=step)
        scheduled = whole.cmim.scheduled
        loss = F.cross_entropy(whole.model(x), y)
        loss += whole.cmim(whole.model, labels=y)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        metrics = {tap: {key: v.item() for key, v in whole.cmim.metrics[tap].items()} for tap in scheduled}
        seen.append((scheduled, loss.item(), metrics))
    return seen


def stored(states):
    """Through a file, as only tensors may be loaded from it."""
    file = io.BytesIO()
    torch.save(states, file)
    file.seek(0)
    return torch.load(file, weights_only=True)


def test_an_evaluation_in_inference_mode_may_move_model_and_plug_in_and_save_them():
    model = network()
    cmim = CMIM(model, X, queue_size=5)
    loss = a_loss(model, cmim)
    torch.autograd.backward(loss, create_graph=True)
    with torch.inference_mode():
        cmim.to("cpu", torch.float64).float()
        cmim.state_dict()
    assert not any(tensor.is_inference() for tensor in (*cmim.state_dict().values(), cmim.heads.weights.grad))
    for _ in range(2):
        (model(X).sum() + cmim(model)).backward()


def test_every_value_of_the_state_is_a_tensor_and_nothing_of_the_model_is_in_it():
    model, other = network(), teacher()
    keys = list(model.state_dict())
    cmim = CMIM(model, X, embed_dim=8, queue_size=5, teacher=other)
    assert list(model.state_dict()) == keys
    state = cmim.state_dict()
    assert all(isinstance(value, Tensor) for value in state.values())
    assert sum(value.numel() for value in state.values()) < 2000
    # Four heads of 4 channels, two moments for each of their weights, steps, and the channels themselves.
    assert sum(value.numel() for key, value in state.items() if ".heads." in key) == 3 * 4 * 4 * 8 + 1 + 4
    own = {tensor.data_ptr() for net in (model, other) for tensor in net.state_dict().values()}
    assert not own & {tensor.data_ptr() for tensor in state.values()}
    assert not {*cmim.modules()} & {*model.modules(), *other.modules()}


def test_a_run_that_loads_the_model_alone_is_told_once_that_the_heads_start_anew():
    states = network(seed=1).state_dict(), CMIM(network(seed=1), X).state_dict()
    model = network()
    cmim = CMIM(model, X)
    nn.ModuleDict({"model": model}).load_state_dict({f"model.{key}": value for key, value in states[0].items()})
    with pytest.warns(CMIMWarning, match="its heads start anew.*save cmim.state_dict") as told:
        a_loss(model, cmim)
        a_loss(model, cmim)
    assert len(told) == 1
    # Not where both are loaded, in any order, and not where weights are exchanged in training, as for an average.
    with warnings.catch_warnings(action="error"):
        for first in (0, 1):
            model = network()
            cmim = CMIM(model, X)
            for i in (first, 1 - first):
                (model, cmim)[i].load_state_dict(states[i])
            a_loss(model, cmim)
        model = network()
        cmim = CMIM(model, X)
        a_loss(model, cmim)
        model.load_state_dict(states[0])
        a_loss(model, cmim)
        cmim.remove()
        assert not model._load_state_dict_post_hooks


@pytest.mark.parametrize(
    "settings, assign", zip(SETTINGS.values(), itertools.cycle([False, True]), strict=False), ids=SETTINGS
)
def test_a_resumed_run_repeats_the_unbroken_one_bit_by_bit(settings, assign):
    unbroken = training(seed=0, **settings)
    train(*unbroken, range(3))
    states = stored([part.state_dict() for part in unbroken])
    expected = train(*unbroken, range(3, 6))

    whole, optimizer = training(seed=77, **settings)
    whole.load_state_dict(states[0], assign=assign)
    if assign:  # the parameters are others now
        optimizer = torch.optim.SGD(whole.model.parameters(), lr=0.1, momentum=0.9)
    optimizer.load_state_dict(states[1])
    assert whole.cmim.metrics == {}
    assert train(whole, optimizer, range(3, 6)) == expected
    assert_same(dict(whole.state_dict()), dict(unbroken[0].state_dict()))


def test_a_checkpoint_between_backward_and_the_next_loss_holds_the_step_that_is_due():
    whole = Whole()
    for _ in range(2):
        a_loss(whole.model, whole.cmim).backward()
    state = stored(whole.cmim.state_dict())
    assert state["contrast.heads.steps"] == 2
    twin = Whole(seed=5)
    twin.model.load_state_dict(whole.model.state_dict())
    twin.cmim.load_state_dict(state)
    assert_same(a_loss(twin.model, twin.cmim), a_loss(whole.model, whole.cmim))


def test_loading_drops_the_gradient_that_was_left_and_keeps_the_weights_trainable():
    whole, _ = training(num_positions=10)
    state = stored(whole.cmim.state_dict())
    for assign in (False, True):
        a_loss(whole.model, whole.cmim).backward()
        whole.cmim.load_state_dict(state, assign=assign)
        whole.cmim.heads.step()
        assert whole.cmim.heads.steps == 0
        assert_same(whole.cmim.heads.weights.detach(), state["contrast.heads.weights"])
        a_loss(whole.model, whole.cmim).backward()
        whole.cmim.heads.step()
        assert whole.cmim.heads.steps == 1
        state = stored(Whole(num_positions=10).cmim.state_dict())


def test_the_state_of_other_taps_is_refused_even_where_its_shapes_fit():
    names = [f.name for f in find_binary_activations(network(units=2), X)]
    states = {}
    for taps in (names[1:], names[:3]):  # channels 4 4 8 and 4 4 4
        cmim = CMIM(network(units=2), X, taps=taps)
        states[tuple(taps)] = cmim.state_dict()
    with pytest.raises(CMIMError, match=r"other taps(.|\n)*Found:  \[\[4, 4\], \[4, 4\], \[8, 8\]\]"):
        cmim.load_state_dict(states[tuple(names[1:])])
    state = cmim.state_dict()
    cmim.load_state_dict(state)


@pytest.mark.parametrize(
    "settings, said",
    [
        ({"num_positions": 9}, "saved with num_positions=10, this CMIM has 9"),
        ({"instances": "image"}, r'saved with num_positions=10, this CMIM has None \(instances="image"\)'),
        ({"num_positions": 10, "embed_dim": 7}, "saved with embed_dim=128, this CMIM has 7"),
    ],
)
def test_the_state_of_other_settings_is_refused_by_their_names(settings, said):
    state = CMIM(network(), X, num_positions=10).state_dict()
    with pytest.raises(CMIMError, match=said):
        CMIM(network(), X, **settings).load_state_dict(state)


def test_other_names_of_the_same_taps_are_taken():
    """A wrapper around the model puts a prefix before them."""
    plain = network()
    state = CMIM(plain, X).state_dict()
    wrapped = nn.Sequential(network())
    CMIM(wrapped, X).load_state_dict(state)


def test_an_average_over_the_module_that_holds_model_and_plug_in_takes_their_states():
    whole, optimizer = training()
    average = torch.optim.swa_utils.AveragedModel(whole, use_buffers=True)
    train(whole, optimizer, range(2))
    average.update_parameters(whole)
    for name, tensor in average.module.state_dict().items():
        assert torch.isfinite(tensor).all(), name
    assert_same(average.module.model(X), copy.deepcopy(average.module.model)(X))
    whole.cmim.load_state_dict(average.module.cmim.state_dict())
    train(whole, optimizer, range(1))


def test_a_copy_of_model_and_plug_in_gives_no_loss_and_the_original_goes_on():
    whole, twin_of = Whole(), Whole()
    a_loss(whole.model, whole.cmim).backward()
    twin = copy.deepcopy(whole)
    assert_same(dict(twin.state_dict()), dict(whole.state_dict()))
    assert_same(twin.model.eval()(X), whole.model.eval()(X))
    twin.model.train()(X)
    with pytest.raises(CMIMError):
        twin.cmim(twin.model)
    a_loss(twin_of.model, twin_of.cmim).backward()
    assert_same(a_loss(whole.model.train(), whole.cmim), a_loss(twin_of.model, twin_of.cmim))
    # The state of the copy can be loaded where training goes on.
    whole.cmim.load_state_dict(twin.cmim.state_dict())
    assert a_loss(whole.model, whole.cmim).requires_grad


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda cmim: pickle.loads(pickle.dumps(cmim))])
def test_a_copy_of_the_plug_in_holds_its_state_alone(copied):
    model, other = network(), teacher()
    cmim = CMIM(model, X, teacher=other)
    a_loss(model, cmim).backward()
    twin = copied(cmim)
    assert_same(dict(twin.state_dict()), dict(cmim.state_dict()))
    assert not {*map(id, other.modules())} & {*map(id, twin.modules())} and [tap.name for tap in twin.taps] == [
        tap.name for tap in cmim.taps
    ]
    assert "a_B against the teacher's" in str(twin)
    with pytest.raises(CMIMError, match="belongs to no model: it is a copy"):
        twin(model)
    for tensor in twin.to("cpu").state_dict(keep_vars=True).values():  # as averages do
        tensor.zero_()
    assert a_loss(model, cmim) > 0


def test_a_shallow_copy_leaves_the_heads_of_the_original_in_training():
    model = network()
    cmim = CMIM(model, X)
    copy.copy(cmim)
    before = cmim.heads.weights.detach().clone()
    for _ in range(2):
        a_loss(model, cmim).backward()
    assert not torch.equal(cmim.heads.weights, before)


@pytest.mark.parametrize("move", [lambda c: c.to("cpu"), lambda c: c.double().float()])
def test_moving_the_plug_in_changes_neither_positions_nor_schedule_nor_loss(move):
    runs = []
    for moved in (False, True):
        whole, optimizer = training(num_positions=10, taps_per_step=1, queue_size=7)
        seen = train(whole, optimizer, range(2))
        if moved:
            move(whole.cmim)
        runs.append(seen + train(whole, optimizer, range(2, 5)))
    assert [step[0] for step in runs[0]] == [step[0] for step in runs[1]]
    for found, expected in zip(*runs, strict=True):
        assert found[1] == pytest.approx(expected[1], rel=1e-6)
        assert found[2].keys() == expected[2].keys()


def test_positions_written_into_draws_after_a_move_or_a_load_are_those_of_the_next_pass():
    whole, _ = training(num_positions=10, heads_lr=0)
    draws = whole.cmim.draws.clone()
    expected = a_loss(whole.model, whole.cmim)
    for change in (
        lambda: whole.cmim.double().float(),
        lambda: whole.cmim.load_state_dict(stored(whole.cmim.state_dict())),
        lambda: whole.cmim.load_state_dict(stored(whole.cmim.state_dict()), assign=True),
    ):
        change()
        whole.cmim.draws.copy_(draws)
        assert_same(a_loss(whole.model, whole.cmim), expected)


def test_training_goes_on_in_eval_mode_of_the_plug_in_and_after_zero_grad():
    whole, _ = training(num_positions=10)
    whole.cmim.eval()
    whole.cmim.requires_grad_(True)
    for _ in range(2):
        a_loss(whole.model, whole.cmim, labels=Y).backward()
        whole.zero_grad()
    whole.cmim.heads.step()
    assert whole.cmim.heads.steps == 2


class Transposed(nn.Module):
    """Its latent is picked up at an attribute of a tensor, which cannot be pickled."""

    def __init__(self):
        super().__init__()
        self.first, self.last = nn.Linear(8, 16), nn.Linear(16, 4)

    def forward(self, x):
        latent = self.first(x).mT.mT
        return self.last(torch.sign(latent).detach() - latent.detach() + latent)


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda cmim: pickle.loads(pickle.dumps(cmim))])
def test_a_plug_in_is_copied_wherever_its_taps_are_picked_up(copied):
    cmim = CMIM(Transposed(), torch.zeros(2, 5, 8))
    assert cmim.taps[0].latent.function is not None
    assert_same(copied(cmim).heads.state_dict(), cmim.heads.state_dict())


def test_figures_after_a_state_was_loaded_are_those_of_the_taps_since():
    model = network()
    cmim = CMIM(model, X, taps_per_step=1, weight=1)
    state = cmim.state_dict()
    for _ in range(2):
        a_loss(model, cmim)
    cmim.load_state_dict(state)
    a_loss(model, cmim)
    ((_, of_tap),) = cmim.metrics.items()
    assert cmim.scalars()["cmim/loss"] == pytest.approx(of_tap["loss"].item())
