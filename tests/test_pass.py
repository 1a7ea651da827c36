"""Which forward pass a loss is taken of."""

import copy
import gc
import io
import pickle
import random
import threading
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint

from cmim_plugin import CMIM, CMIMError, CMIMWarning, find_binary_activations
from cmim_plugin.discovery.layout import Layout
from cmim_plugin.passes import LATENT, _without_masked_scores
from networks import METHODS, Binary, BinaryConv, X, Y, a_loss, assert_same, batch, gradients, network, told, waiting

each_method = pytest.mark.parametrize("recipe", METHODS.values(), ids=METHODS)


class Failing(nn.Module):
    """Fails on demand, after its taps have been passed."""

    def __init__(self):
        super().__init__()
        self.body = network(METHODS["IR-Net"])
        self.fails = False

    def forward(self, x):
        x = self.body(x)
        if self.fails:
            raise ValueError("out of memory")
        return x


@pytest.fixture
def clean_stack():
    """No mode is left on torch's stack; what a failing test would leave is taken down."""
    yield
    left = torch.overrides._get_current_function_mode_stack()
    for _ in list(left):
        torch.overrides._pop_mode()
    assert left == []


def assert_nothing_captured(model, cmim):
    with pytest.raises(CMIMError, match="No forward pass"):
        cmim(model)


def test_a_weight_of_zero_leaves_what_the_task_does_not_reach_without_a_gradient():
    """The task's loss is taken of the stem alone; an infinite latent has a finite code."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4), BinaryConv(4, 4, 1))
    cmim = CMIM(model, X, weight=0)
    task = model[0](X).sum()
    model[1].register_forward_hook(lambda module, x, y: y / (y > 0).to(y.dtype))
    model(X)
    loss = task + cmim(model)
    loss.backward()
    assert loss == task and model[0].weight.grad.isfinite().all()
    assert [p.grad for p in model[1:].parameters()] == [None] * 4


def test_looking_for_binary_activations_leaves_the_pass_that_waits():
    model, reference = network(), network()
    cmim, other = CMIM(model, X), CMIM(reference, X)
    model(X)
    reference(X)
    assert find_binary_activations(model, batch(seed=7)[0])
    assert_same(cmim(model), other(reference))


class Block(nn.Module):
    """The latent is the output of ``norm``, or, where ``conv`` binarizes, the input of that."""

    def __init__(self, inside):
        super().__init__()
        self.norm, self.conv = nn.BatchNorm2d(4), BinaryConv(4, 4, 1) if inside else nn.Conv2d(4, 4, 1)
        self.sign = nn.Identity() if inside else Binary().forward

    def forward(self, x):
        return self.conv(self.sign(self.norm(x)))


@pytest.mark.parametrize("inside", [False, True])
def test_hooks_of_others_that_change_activations_may_come_after_ours(inside):
    """Manifold mixup registers a hook in each step."""

    def mixed(module, x, y=None):
        x = x[0] if y is None else y
        return 0.3 * x + 0.7 * x.flip(0)

    model = nn.Sequential(nn.Conv2d(2, 4, 1), Block(inside))
    cmim = CMIM(model, X)
    if inside:
        model[1].conv.register_forward_pre_hook(mixed)
    else:
        model[1].norm.register_forward_hook(mixed)
    for _ in range(2):
        model(X)
        captured = waiting(cmim)
        binary, latent = captured.pairs[0].sides
        assert torch.equal(binary, latent.detach().sign())
        assert cmim(model).isfinite()


def test_a_hook_on_an_output_may_call_what_the_module_calls():
    """The convolution binarizes by ``sub``, and a hook that comes later centres what it returns."""

    class Detach(nn.Conv2d):
        def forward(self, x):
            x = torch.sub(x, 0.1)
            return F.conv2d(torch.where(x >= 0, 1.0, -1.0).detach() + x - x.detach(), self.weight)

    model = nn.Sequential(nn.Conv2d(2, 4, 1), nn.BatchNorm2d(4), Detach(4, 4, 1))
    cmim = CMIM(model, X)
    assert cmim.taps[0].latent.function is torch.sub
    model[2].register_forward_hook(lambda module, x, y: torch.sub(y, y.mean()))
    for _ in range(2):
        assert a_loss(model, cmim) > 0


def test_a_tap_that_meets_another_layers_activation_is_left_out():
    """One binarizer for all layers, of which one is skipped: its calls move on to layers of another width."""

    class Shared(nn.Module):
        def __init__(self):
            super().__init__()
            self.act = Binary()
            self.convs = nn.ModuleList([nn.Conv2d(2, 4, 1), nn.Conv2d(4, 4, 1), nn.Conv2d(4, 8, 1), nn.Conv2d(8, 8, 1)])
            self.skip = False

        def forward(self, x):
            x = self.convs[0](x)
            for i, conv in enumerate(self.convs[1:]):
                x = x if i == 0 and self.skip else conv(self.act(x))
            return x

    model = Shared()
    cmim = CMIM(model, X)
    assert [tap.channels for tap in cmim.taps] == [4, 4, 8]
    model.skip = True
    model(X)
    with pytest.warns(CMIMWarning, match="not called as often as in the dry run"):
        assert cmim(model).isfinite()
    assert set(cmim.metrics) == {"act"}  # its call #2 has another width now, and call #3 did not come


def test_a_first_pass_that_by_chance_skips_all_taps_adds_nothing():
    class Skipping(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.block = nn.Conv2d(2, 4, 1), nn.Sequential(nn.BatchNorm2d(4), BinaryConv(4, 4, 1))
            self.skip = lambda: random.random() < 0.5

        def forward(self, x):
            x = self.stem(x)
            return x if self.skip() else x + self.block(x)

    model = Skipping()
    cmim = CMIM(model, X)
    assert cmim.taps[0].skipped
    model.skip = lambda: True
    model(X)
    with pytest.warns(CMIMWarning, match="did not reach it"):
        assert cmim(model) == 0


class TwoDomains(nn.Module):
    """A norm for each domain, and one convolution for both, or the reverse. The sign is taken between the two."""

    def __init__(self, shares):
        super().__init__()
        self.stem, self.sign = nn.Conv2d(2, 4, 1), Binary()
        two, one = (nn.BatchNorm2d, nn.Conv2d) if shares == "conv" else (nn.Conv2d, nn.BatchNorm2d)
        sizes = {nn.BatchNorm2d: (4,), nn.Conv2d: (4, 4, 1)}
        self.of_domain = nn.ModuleDict({key: two(*sizes[two]) for key in ("clean", "noisy")})
        self.shared = one(*sizes[one])
        self.shares = shares

    def forward(self, **parts):
        out = 0
        for key, x in parts.items():
            own, x = self.of_domain[key], self.stem(x)
            norm, conv = (own, self.shared) if self.shares == "conv" else (self.shared, own)
            out = out + conv(self.sign.forward(norm(x)))
        return out


@pytest.mark.parametrize("shares", ["conv", "norm"])
def test_calls_that_change_places_are_left_out(shares):
    """Else the codes of one domain meet the latent of the other: each module is called as often as before."""
    model = TwoDomains(shares)
    cmim = CMIM(model, {"clean": X, "noisy": X.flip(0)})
    assert len(cmim.taps) == 2
    model(clean=X, noisy=X.flip(1))
    assert cmim(model) > 0
    model(noisy=X, clean=X.flip(1))
    with pytest.warns(CMIMWarning, match="in another order"):
        assert cmim(model) == 0


def test_calls_without_gradients_do_not_count():
    """A fixed point is found without gradients, in as many steps as it takes; the last one is with them."""

    class FixedPoint(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.block = nn.Conv2d(2, 4, 1), nn.Sequential(nn.BatchNorm2d(4), BinaryConv(4, 4, 1))
            self.steps = 3

        def forward(self, x):
            x = self.stem(x)
            z = torch.zeros_like(x)
            with torch.no_grad():
                for _ in range(self.steps):
                    z = self.block(z + x)
            return self.block(z + x)

    model = FixedPoint()
    cmim = CMIM(model, X)
    assert [tap.name for tap in cmim.taps] == ["block.1"]
    for model.steps in (3, 5, 0):
        model(X)
        captured = waiting(cmim)
        binary, latent = captured.pairs[0].sides
        assert latent.requires_grad and torch.equal(binary, latent.detach().sign())
        assert cmim(model) > 0
    assert cmim.report(model, [X]).taps[0].name == "block.1"


def test_a_first_pass_that_sets_something_up_is_left_out_and_the_next_ones_are_not():
    """As BiPointNet sets a scale: the function that receives the codes is called more often then."""

    class Scaled(nn.Linear):
        scale = None

        def forward(self, x):
            if self.scale is None:
                self.scale = F.linear(x, self.weight).std() / F.linear(x.sign(), self.weight.sign()).std()
                self.scale = self.scale.detach()
            return F.linear(Binary().forward(x), self.weight) * self.scale

    for example in (torch.zeros(8, 12), torch.randn(8, 12)):
        model = nn.Sequential(nn.Linear(12, 16), nn.BatchNorm1d(16), Scaled(16, 16))
        cmim = CMIM(model, example)
        model(torch.randn(8, 12))
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", CMIMWarning)
            first = cmim(model)
        for _ in range(2):
            model(torch.randn(8, 12))
            assert cmim(model) > 0
        assert first.isfinite()


# -- one pass, one loss --------------------------------------------------------------------------------------------


def test_a_loss_without_a_forward_pass_is_refused_and_one_pass_gives_one_loss():
    model = network()
    cmim = CMIM(model, X)
    with pytest.raises(CMIMError, match=r"No forward pass .* call model\(x\), with gradients enabled"):
        cmim(model)
    a_loss(model, cmim)
    with pytest.raises(CMIMError, match="taken already, and one pass gives one loss"):
        cmim(model)


def test_a_pass_in_eval_mode_is_captured_too():
    model = network().eval()
    cmim = CMIM(model, X)
    model(X)
    cmim(model).backward()
    assert model.conv1.weight.grad.any()


def test_a_pass_in_eval_mode_does_not_replace_one_in_training_mode_that_waits_for_its_loss():
    losses = []
    for evaluated in (False, True):
        model = network()
        cmim = CMIM(model, X)
        model(X)
        if evaluated:
            model.eval()
            model(batch(seed=7)[0])  # with gradients, as an adversarial attack or a saliency map takes it
            model.train()
        losses.append(cmim(model))
        assert_nothing_captured(model, cmim)
    assert_same(losses[1], losses[0])


@pytest.mark.parametrize("without", [torch.no_grad, torch.inference_mode])
def test_a_pass_without_gradients_is_not_captured_and_does_not_replace_one_that_waits(without):
    losses = []
    for evaluated in (False, True):
        model = network()
        cmim = CMIM(model, X)
        if evaluated:
            with without():
                model(X)
            assert_nothing_captured(model, cmim)
        model(X)
        if evaluated:
            with without():
                model.eval()(batch(seed=5)[0][:3])
            model.train()
        losses.append(cmim(model))
    assert_same(losses[1], losses[0])


def test_a_loss_asked_for_without_gradients_says_how_to_leave_it_out_of_the_validation():
    model = network()
    cmim = CMIM(model, X)
    with torch.no_grad():
        model.eval()(X)
        with pytest.raises(
            CMIMError, match=r"under torch\.no_grad\(\).*it trains: \(loss \+ cmim\(model\)\)\.backward"
        ):
            cmim(model)


def test_another_model_and_a_part_of_the_model_are_refused():
    model = network()
    cmim = CMIM(model, X)
    model(X)
    with pytest.raises(
        CMIMError, match="another model than the Sequential passed in: pass the model that you attached to"
    ):
        cmim(network())
    with pytest.raises(CMIMError, match="another model than the Unit"):
        cmim(model.layer1[0])
    cmim(model)
    model.layer1(torch.randn(2, 4, 4, 4))
    assert_nothing_captured(model, cmim)


def test_wrappers_are_seen_through():
    losses = []
    for wrap in (lambda model: model, lambda model: torch.compile(model, backend="eager"), nn.DataParallel):
        model = network()
        cmim = CMIM(wrap(model), X)
        called = wrap(model)
        called(X)
        losses.append(cmim(called))
    assert_same(losses[1:], losses[:1] * 2)


def test_another_batch_size_and_resolution_than_the_examples_is_taken():
    model = network()
    cmim = CMIM(model, X)
    for shape in ((2, 2, 4, 4), (9, 2, 6, 8), (3, 2, 3, 5)):
        assert a_loss(model, cmim, torch.randn(shape)).item() > 0


# -- passes that do not come to their end --------------------------------------------------------------------------


def test_a_pass_that_raised_is_not_captured_and_does_not_bring_back_the_one_before(clean_stack):
    model = Failing()
    cmim = CMIM(model, X)
    model(X)
    model.fails = True
    with pytest.raises(ValueError, match="out of memory"):
        model(X)
    assert_nothing_captured(model, cmim)
    model.fails = False
    assert a_loss(model, cmim).isfinite()


@each_method
def test_an_interrupted_pass_is_not_captured_and_the_next_one_is(recipe, clean_stack):
    model, reference = network(recipe), network(recipe)
    cmim, undisturbed = CMIM(model, X), CMIM(reference, X)

    def interrupt(*_):
        raise KeyboardInterrupt

    handle = model.layer2[0].conv.register_forward_pre_hook(interrupt)
    with pytest.raises(KeyboardInterrupt):
        model(X)
    handle.remove()
    assert_nothing_captured(model, cmim)
    with torch.no_grad():
        assert_same(model.eval()(X), copy.deepcopy(model)(X))
    model.train()
    assert_nothing_captured(model, cmim)
    assert_same(a_loss(model, cmim), a_loss(reference, undisturbed))


# -- passes of other shapes ----------------------------------------------------------------------------------------


class CallsItself(nn.Module):
    """The second call, within the first, computes the stem."""

    def __init__(self, recursive):
        super().__init__()
        self.stem = nn.Conv2d(2, 4, 3, padding=1)
        self.first, self.second = (BinaryConv(4, 4, 3, padding=1) for _ in range(2))
        self.recursive = recursive

    def forward(self, x, inner=False):
        if inner:
            return self.first(self.stem(x))
        return self.second(self(x, inner=True) if self.recursive else self.first(self.stem(x)))


def test_a_forward_that_calls_itself_is_one_pass():
    losses = []
    for recursive in (True, False):
        torch.manual_seed(0)
        model = CallsItself(recursive)
        cmim = CMIM(model, X)
        losses.append(a_loss(model, cmim))
        assert list(cmim.metrics) == ["first", "second"]
        assert_nothing_captured(model, cmim)
    assert_same(losses[1], losses[0])


def in_a_thread(function):
    found = []
    thread = threading.Thread(target=lambda: found.append(function()))
    thread.start()
    thread.join()
    return found[0]


def test_each_thread_has_a_pass_of_its_own():
    model, reference = network(), network()
    cmim, alone = CMIM(model, X, heads_lr=0), CMIM(reference, X, heads_lr=0)
    other = batch(seed=5)[0]
    model(X)
    in_a_thread(lambda: model(other))
    assert_same(cmim(model), a_loss(reference, alone))
    with pytest.raises(CMIMError, match="the model ran in another thread"):
        cmim(model)
    assert in_a_thread(lambda: a_loss(model, cmim, other)).isfinite()


def test_a_chosen_tap_that_was_not_reached_gives_zero_with_its_graph_and_one_warning():
    class Sometimes(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem = nn.Conv2d(2, 4, 3, padding=1)
            self.first, self.second = (nn.Sequential(Binary(), nn.Conv2d(4, 4, 3, padding=1)) for _ in range(2))
            self.short = False

        def forward(self, x):
            x = self.first(self.stem(x))
            return (x if self.short else self.second(x)).mean((2, 3))

    with told() as warned:
        model = Sometimes()
        cmim = CMIM(model, X, taps_per_step=1)
        model.short = True
        for labels in (None, Y):
            losses = {}
            for _ in range(2):
                (name,) = cmim.scheduled
                logits = model(X)
                losses[name] = cmim(model, labels=labels)
                (F.cross_entropy(logits, Y) + losses[name]).backward()
            assert losses["first.0"] > 0
            assert losses["second.0"] == 0 and losses["second.0"].requires_grad
    assert warned == ["Tap second.0: the forward pass did not reach it. It adds nothing to the loss."]


def test_pruned_channels_are_told_by_the_taps_name_and_not_by_the_models_forward():
    model = nn.Sequential(nn.Conv2d(2, 4, 3), Binary(), nn.Conv2d(4, 4, 1), Binary(), nn.Conv2d(4, 3, 1))
    cmim = CMIM(model, X)
    model[2], model[4] = nn.Conv2d(4, 3, 1), nn.Conv2d(3, 3, 1)
    assert model(X).shape[1] == 3
    with pytest.raises(CMIMError, match=r"Tap 3: it has 3 channels, and had 4 when CMIM was attached.*attach again"):
        cmim(model)


def test_hooks_that_others_cleared_are_told():
    model = network()
    cmim = CMIM(model, X)
    for module in model.modules():
        module._forward_hooks.clear()
        module._forward_pre_hooks.clear()
    model(X)
    with pytest.raises(CMIMError, match="hooks other code cleared"):
        cmim(model)


# -- copies of the model -------------------------------------------------------------------------------------------


def copies(model):
    file = io.BytesIO()
    torch.save(model, file)
    file.seek(0)
    yield copy.deepcopy(model)
    yield pickle.loads(pickle.dumps(model))
    yield torch.load(file, weights_only=False)
    yield torch.optim.swa_utils.AveragedModel(model)


def test_a_copy_is_a_plain_model_and_the_original_goes_on():
    reference_model, model = network(), network()
    reference, cmim = CMIM(reference_model, X), CMIM(model, X)
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
        assert_nothing_captured(model, cmim)


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
    assert a_loss(duplicate, own).isfinite()


def test_a_copy_outlives_the_original_which_the_plug_in_does_not_keep_alive():
    model = network()
    cmim = CMIM(model, X)
    duplicate = copy.deepcopy(model)
    expected = model(X)
    cmim(model).backward()
    del model
    gc.collect()
    with pytest.raises(CMIMError, match="or its model is gone"):
        cmim(duplicate)
    assert_same(duplicate(X), expected)


# -- what was forgotten is told ------------------------------------------------------------------------------------


def test_a_pass_in_eval_mode_takes_the_place_of_one_whose_loss_nobody_asked_for():
    model = network()
    cmim = CMIM(model, X)
    model(X).sum().backward()  # warming up without CMIM
    model.eval()  # to keep BatchNorm as it is
    (model(X).sum() + cmim(model)).backward()


def test_passes_without_a_loss_are_told_once_after_a_hundred():
    model = network()
    cmim = CMIM(model, X)
    with warnings.catch_warnings():
        warnings.simplefilter("error", CMIMWarning)
        for _ in range(99):
            model(X)
        cmim(model)
        for _ in range(99):
            model(X)
        with torch.no_grad():
            model(X)
    with told() as warned:
        for _ in range(110):
            model(X)
    assert len(warned) == 1 and "100 forward passes ran" in warned[0] and "cmim.remove()" in warned[0]
    assert a_loss(model, cmim).isfinite()


def test_the_loss_within_the_forward_of_the_model_itself_is_refused_with_the_reason():
    class Asking(nn.Module):
        def __init__(self):
            super().__init__()
            self.net, self.cmim = network(), []

        def forward(self, x):
            out = self.net(x)
            return out.sum() + (self.cmim[0](self) if self.cmim else 0)

    model = Asking()
    model.cmim.append(CMIM(model, X))
    with pytest.raises(CMIMError, match=r"Not captured: a pass that has not ended yet"):
        model(X)


class SkippingAll(nn.Module):
    """Skips its one binary layer in every other pass."""

    def __init__(self):
        super().__init__()
        self.stem, self.head, self.passes = nn.Linear(6, 8), nn.Linear(8, 3), 0
        self.layer = nn.Sequential(nn.LayerNorm(8), Binary(), nn.Linear(8, 8))

    def forward(self, x):
        x = self.stem(x)
        self.passes += 1
        return self.head(x + self.layer(x) if self.passes % 2 else x)


def test_a_pass_that_by_chance_reaches_no_tap_adds_nothing():
    model = SkippingAll()
    cmim = CMIM(model, torch.randn(8, 6))
    losses = []
    for _ in range(4):
        logits = model(torch.randn(8, 6))
        with warnings.catch_warnings(record=True) as caught:
            warnings.simplefilter("always")
            loss = cmim(model)
        losses.append(loss.item())
        (logits.sum() + loss).backward()
    assert losses[0] > 0 and losses[2] > 0 and losses[1] == losses[3] == 0
    assert caught == []  # told once


def test_a_pass_that_reaches_no_tap_since_other_code_cleared_the_hooks_is_refused():
    model = SkippingAll()
    cmim = CMIM(model, torch.randn(8, 6))
    model(torch.randn(8, 6))
    cmim(model)
    for module in model.layer.modules():
        module._forward_pre_hooks.clear()
    model(torch.randn(8, 6))
    with pytest.raises(CMIMError, match="reached none of the taps"):
        cmim(model)


class Scores(nn.Module):
    """Attention whose masked scores are binarized, as BiBERT's are."""

    def __init__(self, masked):
        super().__init__()
        self.masked = masked
        self.embed, self.query = nn.Embedding(20, 16), nn.Linear(16, 16)
        self.value, self.head, self.act = nn.Linear(16, 16), nn.Linear(16, 5), Binary()

    def forward(self, ids, attention_mask):
        x = self.embed(ids)
        mask = torch.zeros(len(ids), 1, ids.shape[1]).masked_fill(attention_mask[:, None] == 0, self.masked)
        scores = self.act(self.query(x) @ x.mT + mask)
        return self.head(((scores + 1) / 2 @ self.value(x)).mean(1))


@pytest.mark.parametrize(
    "masked, instances", [(-1e4, "position"), (torch.finfo(torch.float32).min, "image"), (-torch.inf, "position")]
)
def test_masked_scores_leave_loss_and_gradients_finite(masked, instances):
    ids, mask = torch.randint(20, (4, 12)), torch.ones(4, 12, dtype=torch.long)
    mask[:, 8:] = 0
    model = Scores(masked)
    cmim = CMIM(model, {"ids": ids, "attention_mask": mask}, instances=instances)
    model(ids=ids, attention_mask=mask)
    loss = cmim(model)
    loss.backward()
    assert loss.isfinite() and loss > 0
    assert all(p.grad.isfinite().all() for p in model.parameters() if p.grad is not None)
    assert model.query.weight.grad.any()


def test_the_gradient_of_a_masked_score_is_zero_and_the_others_are_as_without_it():
    x = torch.tensor([[0.3, -torch.inf, -2.0]], requires_grad=True)
    rows = _without_masked_scores(x, LATENT, Layout(None))
    assert rows.tolist() == [[pytest.approx(0.3), 0.0, -2.0]]
    rows.sum().backward()
    assert x.grad.tolist() == [[1.0, 0.0, 1.0]]


@pytest.mark.parametrize(
    "mask",
    [torch.nested.nested_tensor([torch.ones(3), torch.ones(5)]), torch.ones(2, 5).to_sparse()],
    ids=["nested", "sparse"],
)
def test_an_attention_mask_that_cannot_be_read_is_left_alone(mask):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.body = nn.Sequential(nn.Linear(8, 8), Binary(), nn.Linear(8, 4))

        def forward(self, x, attention_mask=None):
            return self.body(x)

    model, x = Model(), torch.randn(2, 5, 8)
    cmim = CMIM(model, x)
    model(x, attention_mask=mask)
    assert cmim(model).isfinite()


@pytest.mark.skipif(
    not hasattr(torch.compiler, "_is_exporting_flag"), reason="this torch does not tell that it exports"
)
def test_an_exported_model_is_the_bare_one_and_the_pass_that_waits_stays():
    def nodes(model, **options):
        return [node.target for node in torch.export.export(model, (X,), **options).graph.nodes]

    bare = network().eval()
    batch_of_any_size = {"dynamic_shapes": ({0: torch.export.Dim("batch", min=2)},)}
    expected = nodes(bare), nodes(bare, **batch_of_any_size)
    model = network().eval()
    cmim = CMIM(model, X)
    model(X)
    assert (nodes(model), nodes(model, **batch_of_any_size)) == expected
    loss = cmim(model)
    assert type(loss) is torch.Tensor and loss > 0


def test_a_pass_of_another_length_says_why_a_tap_is_left_out():
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.norm, self.act, self.head = nn.LayerNorm(8), Binary(), nn.Linear(8, 3)
            self.stem, self.last = nn.Linear(8, 8), nn.Sequential(nn.Linear(8, 8), Binary(), nn.Linear(8, 3))

        def forward(self, x):
            h = self.stem(x[:, 0])
            for step in x.unbind(1):
                h = self.norm(h + step)
            return self.head(torch.where(h >= 0, 1.0, -1.0) - h.detach() + h) + self.last(h)

    model = Model()
    cmim = CMIM(model, torch.randn(4, 5, 8))
    assert len(cmim.taps) == 2
    model(torch.randn(4, 7, 8))
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        assert cmim(model) > 0
    assert "not called as often as in the dry run" in str(caught[0].message)


@pytest.mark.parametrize("instances", ["position", "image"])
def test_tokens_may_be_checkpointed(instances):
    class Model(nn.Module):
        def __init__(self):
            super().__init__()
            self.stem, self.head = nn.Linear(8, 16), nn.Linear(16, 4)
            self.block = nn.Sequential(nn.LayerNorm(16), Binary(), nn.Linear(16, 16))

        def forward(self, x):
            return self.head(checkpoint(self.block, self.stem(x), use_reentrant=False))

    model, x = Model(), torch.randn(4, 6, 8)
    cmim = CMIM(model, x, instances=instances)
    (model(x).square().mean() + cmim(model)).backward()
    assert model.stem.weight.grad.any()


def test_batches_padded_to_another_length_leave_the_attention_maps_out():
    ids, mask = torch.randint(20, (4, 12)), torch.ones(4, 12, dtype=torch.long)
    model = Scores(-1e4)
    model.head = nn.Sequential(nn.Linear(16, 16), Binary(), nn.Linear(16, 5))
    cmim = CMIM(model, {"ids": ids, "attention_mask": mask})
    assert len(cmim.taps) == 2
    with told() as warned:
        for length in (9, 8, 10):
            model(ids=ids[:, :length], attention_mask=mask[:, :length])
            assert cmim(model) > 0
    assert len(warned) == 1 and "its channels are the tokens of the batch, which were 12" in warned[0]


class Hash(nn.Module):
    """Deep hashing: the code is classified, and the latent returned for a loss of its own."""

    def __init__(self):
        super().__init__()
        self.conv, self.classifier = nn.Conv2d(2, 4, 1), nn.Conv2d(4, 3, 1)

    def forward(self, x):
        latent = torch.tanh(self.conv(x))
        return self.classifier(latent.detach().sign() - latent.detach() + latent), latent


def test_a_latent_that_the_model_returns_is_captured():
    model = Hash()
    cmim = CMIM(model, X)
    assert cmim.taps[0].latent.module == "" and cmim.taps[0].latent.kind == "output"
    for _ in range(2):
        model(X)
        captured = waiting(cmim)
        binary, latent = captured.pairs[0].sides
        assert torch.equal(binary.detach().sign(), latent.detach().sign())
        assert cmim(model) > 0


def test_modules_that_were_replaced_are_told_where_code_and_latent_are_of_two_modules():
    """As in brevitas, which builds new modules when it loads a state."""

    class Scaled(nn.Module):
        def __init__(self):
            super().__init__()
            self.alpha = nn.Parameter(torch.ones(()))

        def forward(self, x):
            return x.sign() * self.alpha

    class Net(nn.Sequential):
        def forward(self, x):
            return self[2](self[1](self[0](x).detach())) + self[0](x).sum()

    model = Net(nn.Sequential(nn.Linear(8, 16), nn.LayerNorm(16)), Scaled(), nn.Linear(16, 4))
    cmim = CMIM(model, torch.randn(8, 8))
    model(torch.randn(8, 8))
    assert cmim(model) > 0
    model[1] = Scaled()
    model(torch.randn(8, 8))
    with pytest.raises(CMIMError, match="were modules replaced"):
        cmim(model)
