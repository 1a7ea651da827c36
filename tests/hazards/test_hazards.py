"""What training loops in the wild do to a library of hooks: handled, or refused with an error that says what to do.

The table in README.md lists every hazard with its promise and its test, here or in another file.
"""

from __future__ import annotations

import contextlib
import copy
import functools
import gc
import itertools
import re
import warnings
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from functorch.compile import aot_module
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.autograd import forward_ad
from torch.func import functional_call, grad, jacrev, jvp, vmap
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils.checkpoint import (
    CheckpointPolicy,
    checkpoint,
    create_selective_checkpoint_contexts,
    set_checkpoint_early_stop,
)

from cmim_plugin import CMIM, CMIMError, CMIMWarning, InfoNCE
from hazards.nets import Activations, Binary, batch, equal, gradients, hooks_on, network

X, Y = batch()
NO_PASS = "No forward pass"

# Taps of modules, and of functions within one, which are captured by other means.
each_way = pytest.mark.parametrize("inside", [False, True], ids=["by a module", "in the convolution"])
each_instance = pytest.mark.parametrize("instances", ["image", "position"])
each_mixture = pytest.mark.parametrize("inside, instances", [(False, "image"), (True, "position")])


def attached(inside: bool = False, norm: str = "group", **settings: Any) -> tuple[nn.Module, CMIM]:
    """The same weights, heads and positions every time."""
    torch.manual_seed(0)
    model = network(inside, norm=norm)
    return model, CMIM(model, X, **{"num_positions": 20, **settings})


def step(model: nn.Module, cmim: CMIM, x: Tensor = X, y: Tensor = Y) -> Tensor:
    """The loss of a training step, as the README writes it."""
    loss = F.cross_entropy(model(x), y)
    loss += cmim(model)
    return loss


def captures_nothing(model: nn.Module, cmim: CMIM) -> bool:
    try:
        cmim(model)
    except CMIMError as error:
        return NO_PASS in str(error)
    return False


def works_as_if_new(model: nn.Module, cmim: CMIM, reference: tuple[nn.Module, CMIM]) -> bool:
    """The next ordinary step gives the gradients of one that nothing came before."""
    for m in (model, reference[0]):
        m.zero_grad()
    step(model, cmim).backward()
    step(*reference).backward()
    return equal(gradients(model, cmim), gradients(*reference))


# -- activation checkpointing --------------------------------------------------------------------------------------


class Checkpointed(nn.Module):
    """All but the first layer is recomputed in the backward pass."""

    def __init__(self, inside: bool, reentrant: bool | None) -> None:
        super().__init__()
        self.body = network(inside)
        self.reentrant = reentrant

    def forward(self, x: Tensor) -> Tensor:
        x = self.body[0](x)
        return (
            self.body[1:](x) if self.reentrant is None else checkpoint(self.body[1:], x, use_reentrant=self.reentrant)
        )


@each_way
def test_reentrant_checkpointing_is_refused_at_attaching(inside):
    model = Checkpointed(inside, reentrant=True)
    with pytest.raises(CMIMError, match="made without a gradient"):
        CMIM(model, X)
    assert not hooks_on(model)


@each_way
def test_reentrant_checkpointing_switched_on_later_is_refused(inside):
    torch.manual_seed(0)
    model = Checkpointed(inside, reentrant=None)
    cmim = CMIM(model, X)
    reference = copy.deepcopy(model)
    model.reentrant = True
    model(X).sum().backward()
    with pytest.raises(CMIMError, match="pass use_reentrant=False"):
        cmim(model)
    model.reentrant = False
    assert works_as_if_new(model, cmim, (reference, CMIM(reference, X)))


def all_but_norms(context, operation, *args, **kwargs):
    recompute = operation == torch.ops.aten.native_group_norm.default
    return CheckpointPolicy.PREFER_RECOMPUTE if recompute else CheckpointPolicy.MUST_SAVE


@each_way
def test_selective_checkpointing_saves_nothing_of_ours(inside):
    class Shifted(Checkpointed):
        def shifted(self, x):
            for layer in self.body[1:]:
                x = layer(x * 1.5 + 0.1)
            return x

        def forward(self, x):
            x = self.body[0](x)
            contexts = functools.partial(create_selective_checkpoint_contexts, all_but_norms)
            selective = {"use_reentrant": False, "context_fn": contexts}
            return self.shifted(x) if self.reentrant is None else checkpoint(self.shifted, x, **selective)

    torch.manual_seed(0)
    model, reference = Shifted(inside, reentrant=False), Shifted(inside, reentrant=None)
    reference.load_state_dict(model.state_dict())
    cmim, plain = CMIM(model, X), CMIM(reference, X)
    step(model, cmim).backward()
    step(reference, plain).backward()
    assert equal(gradients(model, cmim), gradients(reference, plain))


@pytest.mark.parametrize(
    "inside, reentrant, early_stop",
    [(True, True, True), (True, False, True), (True, False, False), (False, False, True)],
    ids=["reentrant", "stopped early", "to the end", "stopped early, by a module"],
)
def test_recomputing_the_whole_model_is_no_forward_pass(inside, reentrant, early_stop):
    model, cmim = attached(inside)
    activations = Activations(model)
    with set_checkpoint_early_stop(early_stop):
        checkpoint(model, X.clone().requires_grad_(), use_reentrant=reentrant).sum().backward()
    if not reentrant:
        cmim(model)  # of the pass before the backward pass
    activations.remove()
    assert captures_nothing(model, cmim)
    assert activations.alive() == 0


# -- torch.func and forward-mode differentiation -------------------------------------------------------------------


def named(model: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach() for name, p in model.named_parameters()}


def of_a_batch(model: nn.Module) -> Any:
    return lambda p: functional_call(model, p, (X,)).square().sum()


def of_a_sample(model: nn.Module) -> Any:
    return lambda p, x, y: F.cross_entropy(functional_call(model, p, (x[None],)), y[None])


def dual(model: nn.Module) -> Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(model(forward_ad.make_dual(X, torch.ones_like(X)))).tangent


TRANSFORMS = {
    "grad": lambda model: grad(of_a_batch(model))(named(model)),
    "vmap": lambda model: vmap(model)(torch.stack([X, 2 * X])),
    "gradients of each sample": lambda model: vmap(grad(of_a_sample(model)), (None, 0, 0))(named(model), X, Y),
    "jvp": lambda model: jvp(model, (X,), (torch.ones_like(X),)),
    "jacrev": lambda model: jacrev(model)(X),
    "grad of grad": lambda model: grad(lambda x: grad(lambda z: model(z).square().sum())(x).square().sum())(X),
    "forward mode": dual,
}


@pytest.mark.parametrize(
    "inside, transform", zip(itertools.cycle([True, False]), TRANSFORMS.values(), strict=False), ids=TRANSFORMS
)
def test_a_transformed_model_gives_the_same_and_captures_nothing(inside, transform):
    model, cmim = attached(inside)
    torch.testing.assert_close(transform(model), transform(copy.deepcopy(model)), rtol=0, atol=0)
    assert captures_nothing(model, cmim)
    assert works_as_if_new(model, cmim, attached(inside))


def test_the_loss_within_a_transform_is_refused():
    model, cmim = attached()

    def loss(parameters: dict[str, Tensor]) -> Tensor:
        functional_call(model, parameters, (X,))
        return cmim(model)

    with pytest.raises(CMIMError, match=NO_PASS):
        grad(loss)(named(model))


def test_gradients_of_a_functional_call_reach_the_parameters_given():
    model, cmim = attached()
    parameters = {name: p.requires_grad_() for name, p in named(model).items()}
    functional_call(model, parameters, (X,))
    cmim(model).backward()
    reference, other = attached()
    reference(X)
    other(reference).backward()
    assert not gradients(model) and parameters["0.weight"].grad.any()
    for name, p in reference.named_parameters():
        assert (p.grad is None) == (parameters[name].grad is None)
        assert p.grad is None or torch.equal(p.grad, parameters[name].grad)


# -- modules replaced or wrapped -----------------------------------------------------------------------------------


@pytest.mark.parametrize("inside, when", [(True, "before"), (False, "after")])
def test_batch_norm_may_become_sync_batch_norm(inside, when):
    reference = attached(inside, norm="batch")
    torch.manual_seed(0)
    model = network(inside, norm="batch")
    if when == "before":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    cmim = CMIM(model, X, num_positions=20)
    if when == "after":
        model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    assert any(isinstance(module, nn.SyncBatchNorm) for module in model)
    assert works_as_if_new(model, cmim, reference)


class SignedNorm(nn.BatchNorm2d):
    """A BatchNorm that is a tap: what turns it into another module takes the hook away."""

    def forward(self, x: Tensor) -> Tensor:
        return Binary()(super().forward(x))


def test_a_tap_that_a_conversion_replaced_is_refused():
    model = nn.Sequential(nn.Conv2d(2, 4, 3), SignedNorm(4), nn.Conv2d(4, 3, 1), nn.AdaptiveAvgPool2d(1), nn.Flatten())
    cmim = CMIM(model, X)
    model = nn.SyncBatchNorm.convert_sync_batchnorm(model)
    model(X)
    with pytest.raises(CMIMError, match="reached none of the taps"):
        cmim(model)


@each_way
def test_a_replaced_module_is_warned_about_and_all_of_them_are_refused(inside):
    model, cmim = attached(inside)
    model[2] = copy.deepcopy(model[2])
    told = rf"Tap {cmim.taps[0].name}: the forward pass did not reach it\. It adds nothing"
    with pytest.warns(CMIMWarning, match=told):
        step(model, cmim).backward()
    assert list(cmim.metrics) == [cmim.taps[1].name]
    model[4] = copy.deepcopy(model[4])
    model(X)
    with pytest.raises(CMIMError, match="reached none of the taps"):
        cmim(model)


class Wrapper(nn.Module):
    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, x: Tensor) -> Tensor:
        return self.module(x)


def rewrapped(model: nn.Module, how: str) -> nn.Module:
    if how == "module":
        return Wrapper(model)
    if how == "_orig_mod":
        return nn.Sequential(torch.compile(model, backend="eager"))
    wrapper = pytest.importorskip("torch.distributed.algorithms._checkpoint.checkpoint_wrapper")
    return nn.Sequential(wrapper.checkpoint_wrapper(model))


@pytest.mark.parametrize(
    "inside, how",
    [
        (False, "module"),
        (True, "module"),
        pytest.param(True, "_orig_mod", marks=pytest.mark.slow),
        (False, "_checkpoint_wrapped_module"),
    ],
)
def test_wrapped_parts_have_their_prefix_in_the_names_and_the_loss_of_bare_ones(inside, how):
    model, reference = attached(inside)
    names = [tap.name for tap in reference.taps]
    reference.remove()
    whole = rewrapped(model, how)
    cmim = CMIM(whole, X, num_positions=20)
    prefix = how if how == "module" else f"0.{how}"
    assert [tap.name for tap in cmim.taps] == [f"{prefix}.{name}" for name in names]
    bare, other = attached(inside)
    assert cmim.load_state_dict(other.state_dict())
    assert works_as_if_new(whole, cmim, (bare, other))


def test_a_part_of_a_bigger_model_is_trained_within_it():
    part, cmim = attached(inside=True)
    whole = nn.Sequential(nn.Identity(), part)
    reference, other = attached(inside=True)
    whole(X)
    reference(X)
    loss = cmim(part)
    assert torch.equal(loss, other(reference))
    whole(X)
    with pytest.raises(CMIMError, match="attached to another model than the Sequential"):
        cmim(whole)


# -- export --------------------------------------------------------------------------------------------------------


def traced(model: nn.Module) -> list[str]:
    return [node.kind() for node in torch.jit.trace(model, X, check_trace=False).inlined_graph.nodes()]


EXPORTS = {
    "torch.export": lambda model: str(torch.export.export(model, (X,)).graph),
    "torch.jit.trace": traced,
    "make_fx": lambda model: str(make_fx(model)(X).graph),
}


@pytest.mark.filterwarnings("ignore")  # tracing warns of what it cannot see
@pytest.mark.parametrize("inside, export", zip([True, False, True], EXPORTS.values(), strict=True), ids=EXPORTS)
def test_what_is_exported_within_a_pause_is_the_bare_model(inside, export):
    model, cmim = attached(inside)
    bare = copy.deepcopy(model)
    try:
        expected = export(bare)
    except torch._dynamo.exc.Unsupported:
        pytest.skip("this release of torch cannot export the network itself")
    with cmim.paused():
        found = export(model)
    assert found == expected
    assert captures_nothing(model, cmim)
    assert works_as_if_new(model, cmim, attached(inside))


@pytest.mark.filterwarnings("ignore")
@each_way
def test_tracing_with_the_hooks_on_captures_nothing(inside):
    model, cmim = attached(inside)
    for trace in (traced, EXPORTS["make_fx"]):
        assert trace(model) == trace(copy.deepcopy(model))
        assert captures_nothing(model, cmim)


@each_way
def test_where_a_pass_cannot_begin_the_model_runs_and_the_loss_says_why(inside):
    """As of fake tensors, with which other tensors do not go together."""
    model, cmim = attached(inside)
    expected = model(X)
    assert torch.equal(aot_module(model, lambda graph, _: graph)(X), expected)
    with pytest.raises(CMIMError, match="capturing it raised AssertionError"):
        cmim(model)
    assert works_as_if_new(model, cmim, attached(inside))


@each_way
def test_a_pass_of_fake_tensors_leaves_nothing_to_the_next(inside):
    model, cmim = attached(inside)
    with FakeTensorMode(allow_non_fake_inputs=True) as mode:
        model(mode.from_tensor(X))
    assert works_as_if_new(model, cmim, attached(inside))


# -- copies --------------------------------------------------------------------------------------------------------


class Both(nn.Module):
    """A module that holds the model and its plug-in, as a LightningModule does."""

    def __init__(self) -> None:
        super().__init__()
        self.model, self.cmim = attached()


def test_a_copied_plug_in_is_refused_and_does_not_disturb_the_original():
    original = Both()
    duplicate = copy.deepcopy(original)
    duplicate.model(X)
    with pytest.raises(CMIMError, match="belongs to no model: it is a copy"):
        duplicate.cmim(duplicate.model)
    original.model(X)
    with pytest.raises(CMIMError, match="belongs to no model: it is a copy"):
        duplicate.cmim(original.model)
    duplicate.cmim.remove()
    with duplicate.cmim.paused():
        assert works_as_if_new(original.model, original.cmim, attached())
    del duplicate
    gc.collect()
    assert step(original.model, original.cmim).isfinite()


# -- mixed precision -----------------------------------------------------------------------------------------------


@each_mixture
def test_gradients_of_a_scaled_loss_are_the_scaled_gradients(inside, instances):
    found = []
    for scale in (1.0, 2.0**10):
        model, cmim = attached(inside, instances=instances)
        scaler = torch.amp.GradScaler("cpu", init_scale=scale)
        scaler.scale(step(model, cmim)).backward()
        found.append([g / scale for g in gradients(model, cmim)])
    assert found[0] and equal(found[1], found[0])


def test_a_step_that_the_scaler_skips_leaves_nothing_behind():
    model, cmim = attached(queue_size=30)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = [p.detach().clone() for p in (*model.parameters(), cmim.heads.weights)]
    activations = Activations(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**127)
    scaler.scale(1000 * step(model, cmim)).backward()
    scaler.step(optimizer)
    scaler.update()
    activations.remove()
    assert scaler.get_scale() == 2.0**126
    assert activations.alive() == 0
    optimizer.zero_grad()
    loss = step(model, cmim)
    assert equal([p.detach() for p in (*model.parameters(), cmim.heads.weights)], before)
    loss.backward()
    assert loss.isfinite() and all(g.isfinite().all() for g in gradients(model, cmim))


@pytest.mark.parametrize(
    "instances, labels, dtype",
    [
        ("image", None, torch.float16),
        ("image", Y, torch.bfloat16),
        ("position", None, torch.bfloat16),
        ("position", Y, torch.float16),
    ],
)
def test_a_temperature_of_a_hundredth_does_not_overflow_in_half_precision(instances, labels, dtype):
    model, cmim = attached(instances=instances, temperature=0.01, weight=1.0, queue_size=30)
    for _ in range(2):
        with torch.autocast("cpu", dtype=dtype):
            model(X)
            loss = cmim(model, labels)
        # Scores reach 100: exp(100) is beyond float32 even.
        assert loss.dtype == torch.float32 and loss.isfinite() and loss > 0
        loss.backward()
        assert all(g.isfinite().all() and g.dtype == torch.float32 for g in gradients(model, cmim))
    assert gradients(model)[0].any()


@pytest.mark.parametrize("instances, dtype", [("image", torch.float16), ("position", torch.bfloat16)])
def test_a_model_in_half_precision_is_trained(instances, dtype):
    torch.manual_seed(0)
    model = network(False).to(dtype)

    def objective(z_b: Tensor, z_f: Tensor, **arguments: Any) -> Tensor:
        # Float32 from the projection on: lengths of one, which half precision misses by a thousandth.
        for z in (z_b, z_f):
            torch.testing.assert_close(z.norm(dim=-1), torch.ones(z.shape[:-1]), rtol=0, atol=1e-6)
            assert not torch.equal(z, z.to(dtype).float())
        return InfoNCE()(z_b, z_f, **arguments)

    cmim = CMIM(model, X.to(dtype), instances=instances, queue_size=30, objective=objective)
    for _ in range(2):
        loss = F.cross_entropy(model(X.to(dtype)), Y)
        loss += cmim(model)
        loss.backward()
    assert loss.dtype == dtype and loss.isfinite()
    assert all(g.dtype == dtype and g.isfinite().all() for g in gradients(model))
    assert all(g.dtype == torch.float32 and g.isfinite().all() for g in gradients(cmim))
    assert model[0].weight.grad.any()


# -- numbers that are none -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("instances, bad", [("image", float("nan")), ("position", float("inf"))])
def test_one_batch_of_bad_numbers_is_seen_and_then_over(instances, bad):
    model, cmim = attached(instances=instances, queue_size=100)
    step(model, cmim)
    x = X.clone()
    x[0, 0] = bad
    activations = Activations(model)
    model(x)
    loss = cmim(model)
    assert not loss.isfinite()
    loss.backward()
    del loss
    activations.remove()
    assert activations.alive() == 0
    model.zero_grad()
    for _ in range(2):
        loss = step(model, cmim)
        loss.backward()
        assert loss.isfinite() and all(g.isfinite().all() for g in gradients(model, cmim))


@each_instance
def test_embeddings_of_no_length_give_finite_gradients(instances):
    model, cmim = attached(instances=instances)
    with torch.no_grad():
        cmim.heads.weights.zero_()
    loss = step(model, cmim)
    loss.backward()
    assert loss.isfinite() and all(g.isfinite().all() for g in gradients(model, cmim))


# -- what is kept --------------------------------------------------------------------------------------------------


def storages(tensors: Iterable[Tensor]) -> dict[int, int]:
    """Address and bytes of what they stand on."""
    return {t.untyped_storage().data_ptr(): t.untyped_storage().nbytes() for t in tensors}


def tensors_alive() -> list[Tensor]:
    gc.collect()
    return [o for o in gc.get_objects() if type(o) is Tensor]


@pytest.mark.parametrize("inside, settings", [(False, {"instances": "image"}), (True, {"num_positions": 20})])
def test_only_rows_are_kept_of_an_activation(inside, settings):
    x = batch(size=32)[0]
    # Rows, or where in memory those of both taps lie, as int64.
    activation, rows = 6 * 4 * 32 * 32 * 4, 2 * 20 * 6 * 8
    saved: list[list[int]] = []
    reachable: list[list[int]] = []
    for with_cmim in (False, True):
        torch.manual_seed(0)
        model = network(inside)
        cmim = CMIM(model, X, **settings) if with_cmim else None
        packed: list[Tensor] = []

        def pack(tensor: Tensor, packed: list[Tensor] = packed) -> Tensor:
            packed.append(tensor)
            return tensor

        before = storages(tensors_alive())
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            logits = model(x)
        saved.append(sorted(storages(packed).values()))
        packed.clear()
        after = storages(tensors_alive())
        reachable.append(sorted(size for address, size in after.items() if address not in before))
        logits.sum().backward()
        del logits
        # Without its loss, the pass is over for the plug-in too.
        gone = storages(tensors_alive())
        assert all(size <= rows for address, size in gone.items() if address not in before)
        assert (cmim is not None) == (hooks_on(model) > 0)
    # What autograd saves: the very same activations with and without.
    big = [[size for size in sizes if size > rows] for sizes in saved]
    assert big[1] == big[0] and max(big[0]) >= activation
    # What Python objects hold: besides that, rows alone.
    more = [size for size in reachable[1] if size > rows]
    assert more == [size for size in reachable[0] if size > rows]
    assert len(reachable[1]) > len(reachable[0])


# -- which pass counts ---------------------------------------------------------------------------------------------


def test_of_several_passes_the_last_one_counts():
    model, cmim = attached(inside=True)
    reference, other = attached(inside=True)
    model(batch(9, seed=4)[0])
    model(X)
    reference(X)
    assert torch.equal(cmim(model), other(reference))
    assert captures_nothing(model, cmim)


def test_gradients_of_accumulated_batches_add_up():
    """Of the network; the heads take a step after each batch."""
    parts = [batch(seed=2), batch(3, seed=3)]
    model, cmim = attached()
    single, other = attached()
    expected = None
    for x, y in parts:
        step(model, cmim, x, y).backward()
        single.zero_grad()
        step(single, other, x, y).backward()
        new = gradients(single)
        expected = new if expected is None else [e + n for e, n in zip(expected, new, strict=True)]
    torch.testing.assert_close(gradients(model), expected)
    assert torch.equal(cmim.heads.weights, other.heads.weights)


class Generator(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.body = network(True)[:-3]
        self.out = nn.Conv2d(6, 2, 1)

    def forward(self, z: Tensor) -> Tensor:
        return self.out(self.body(z))


def test_two_models_with_a_plug_in_each_train_jointly():
    def trained(*which: str) -> list[Tensor]:
        torch.manual_seed(0)
        generator, discriminator = Generator(), network(False)
        cmims = {"generator": CMIM(generator, X), "discriminator": CMIM(discriminator, X)}
        loss = discriminator(generator(X)).square().mean()
        for name in which:
            loss = loss + cmims[name](generator if name == "generator" else discriminator)
        loss.backward()
        return gradients(generator, discriminator)

    neither, first, second = trained(), trained("generator"), trained("discriminator")
    joint = trained("discriminator", "generator")
    expected = [f + s - n for f, s, n in zip(first, second, neither, strict=True)]
    torch.testing.assert_close(joint, expected)
    assert not equal(first, neither) and not equal(second, neither)


# -- kinds of backward passes --------------------------------------------------------------------------------------


def test_a_retained_graph_gives_the_same_gradients_again():
    model, cmim = attached(queue_size=30)
    step(model, cmim)
    loss = step(model, cmim)
    loss.backward(retain_graph=True)
    once = gradients(model, cmim)
    loss.backward()
    assert equal(gradients(model, cmim), [2 * g for g in once])


@each_mixture
def test_gradients_of_gradients_agree_with_differences(inside, instances):
    """Of the squared length of the gradient, along one direction of all heads."""
    torch.manual_seed(0)
    model = network(inside).double()
    cmim = CMIM(model, X.double(), instances=instances, num_positions=20).double()
    state = copy.deepcopy(cmim.state_dict())
    heads = cmim.heads.weights
    direction = torch.randn_like(heads)

    def squared(shift: float) -> Tensor:
        cmim.load_state_dict(state)  # the same positions again
        with torch.no_grad():
            heads.add_(direction, alpha=shift)
        model(X.double())
        found = torch.autograd.grad(cmim(model), [model[0].weight, heads], create_graph=True)
        return sum((g**2).sum() for g in found)

    (exact,) = torch.autograd.grad(squared(0.0), heads)
    slope = (exact * direction).sum().item()
    difference = (squared(1e-5) - squared(-1e-5)).item() / 2e-5
    assert abs(slope) > 1e-4
    assert slope == pytest.approx(difference, rel=1e-5)


@contextlib.contextmanager
def deterministic():
    """Memory that nothing wrote to is NaN, and what depends on the order of threads raises."""
    torch.use_deterministic_algorithms(True)
    try:
        yield
    finally:
        torch.use_deterministic_algorithms(False)


@pytest.mark.parametrize(
    "inside, instances, mode",
    [
        (False, "image", deterministic),
        (True, "position", deterministic),
        (False, "position", torch.autograd.detect_anomaly),
        (True, "image", torch.autograd.detect_anomaly),
    ],
)
@pytest.mark.filterwarnings("ignore:Anomaly Detection")
def test_debugging_modes_of_torch_change_nothing(inside, instances, mode):
    found = []
    for within in (contextlib.nullcontext, mode):
        with within():
            model, cmim = attached(inside, instances=instances, queue_size=30)
            for _ in range(2):
                step(model, cmim).backward()
            found.append(gradients(model, cmim))
    assert equal(found[1], found[0])


# -- frozen parts --------------------------------------------------------------------------------------------------


@each_way
def test_a_network_frozen_after_attaching_still_runs_and_its_loss_is_refused(inside):
    model, cmim = attached(inside)
    model.requires_grad_(False)
    model(X)
    with pytest.raises(CMIMError, match="frozen"):
        cmim(model)
    model.requires_grad_(True)
    assert works_as_if_new(model, cmim, attached(inside))


@each_way
def test_a_tap_of_layers_frozen_after_attaching_adds_nothing_and_is_warned_about(inside):
    model, cmim = attached(inside)
    model[:2].requires_grad_(False)
    with pytest.warns(CMIMWarning, match=rf"Tap {cmim.taps[0].name}: .*frozen.* adds nothing"):
        step(model, cmim).backward()
    assert model[2].get_parameter("weight" if inside else "1.weight").grad.any()
    with warnings.catch_warnings():
        warnings.simplefilter("error", CMIMWarning)
        step(model, cmim)


def test_where_all_taps_of_a_step_are_frozen_training_goes_on():
    """Of eight taps two take turns, and all but the last are frozen."""
    torch.manual_seed(0)
    blocks = [nn.Sequential(nn.BatchNorm2d(4), Binary(), nn.Conv2d(4, 4, 1)) for _ in range(8)]
    model = nn.Sequential(nn.Conv2d(3, 4, 1), *blocks)
    cmim = CMIM(model, torch.zeros(2, 3, 8, 8), taps_per_step=2)
    model[:8].requires_grad_(False)
    losses = []
    with warnings.catch_warnings(record=True) as warned:
        warnings.simplefilter("always", CMIMWarning)
        for _ in range(8):
            model(torch.randn(4, 3, 8, 8))
            losses.append(cmim(model))
            losses[-1].backward()
    assert [bool(loss) for loss in losses].count(True) == 2  # the steps with the last tap
    frozen = [line for warning in warned for line in str(warning.message).splitlines()]
    assert len(frozen) == 7 and all("frozen" in line for line in frozen)


@each_way
def test_binarizations_of_layers_frozen_before_are_left_out(inside):
    torch.manual_seed(0)
    model = network(inside)
    for frozen in model[:2]:
        frozen.requires_grad_(False)
    cmim = CMIM(model, X)
    assert [tap.name.split(".")[0] for tap in cmim.taps] == ["4"]
    step(model, cmim).backward()
    assert model[0].weight.grad is None and model[2].get_parameter("weight" if inside else "1.weight").grad.any()


# -- moved and switched --------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "instances, dtype", [("image", torch.float64), ("position", torch.float16), ("image", torch.bfloat16)]
)
def test_the_plug_in_may_have_another_dtype_than_the_model(instances, dtype):
    expected = step(*attached(instances=instances, queue_size=30)).item()
    model, cmim = attached(instances=instances, queue_size=30)
    cmim.to(dtype)
    assert step(model, cmim).item() == pytest.approx(expected, rel=0.01)
    step(model, cmim).backward()  # with what is in the queue
    assert cmim.heads.weights.grad.dtype == torch.promote_types(dtype, torch.float32)
    assert {g.dtype for g in gradients(model)} == {torch.float32}


@pytest.mark.parametrize("inside, moved", [(False, "plug-in"), (True, "model")])
def test_a_plug_in_on_another_device_than_the_model_is_refused(inside, moved):
    model, cmim = attached(inside)
    (cmim if moved == "plug-in" else model).to("meta")
    model(X.to(model[0].weight.device))
    with pytest.raises(CMIMError, match=rf"call cmim\.to\('{model[0].weight.device}'\), or attach after"):
        cmim(model)


def test_eval_mode_of_the_plug_in_changes_nothing():
    model, cmim = attached()
    cmim.eval()
    assert works_as_if_new(model, cmim, attached())


# -- the table -----------------------------------------------------------------------------------------------------


def test_the_tests_that_the_table_names_exist():
    here = Path(__file__).parent
    missing = []
    for file, name in re.findall(r"`(\w+)::(\w+)`", (here / "README.md").read_text()):
        path = here / f"test_{file}.py"
        path = path if path.exists() else here.parent / f"test_{file}.py"
        if f"def {name}(" not in path.read_text():
            missing.append(f"{file}::{name}")
    assert not missing
