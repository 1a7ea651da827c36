"""What the loss is made of: weights, labels, masks, queue, some taps a step, and the figures of a step."""

import math

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from cmim_plugin import CMIM, NCE, CMIMError, CMIMWarning, InfoNCE, stratified_indices
from networks import BIREAL, IRNET, Binary, X, Y, a_loss, assert_same, batch, gradients, network, teacher, told

each_instance = pytest.mark.parametrize("instances", ["image", "position"])
each_mixture = pytest.mark.parametrize("recipe, instances", [(IRNET, "position"), (BIREAL, "image")])

ONE = {"taps": ["layer1.0.binary"], "embed_dim": 5}  # its map is 4 x 4
ALL = {"num_positions": 1000}


class Recording(InfoNCE):
    """InfoNCE that keeps what it was called with, for a plug-in with one tap."""

    def __init__(self, calls: list[dict]) -> None:
        object.__setattr__(self, "calls", calls)

    def __call__(self, z_b, z_f, **arguments):
        tensors = {"z_b": z_b.detach(), "z_f": z_f.detach(), **arguments}
        self.calls.append({name: t[0] for name, t in tensors.items() if isinstance(t, Tensor)})
        return super().__call__(z_b, z_f, **arguments)


@each_instance
def test_the_loss_is_a_float32_scalar_with_gradients_to_heads_and_network(instances):
    model = network()
    cmim = CMIM(model, X, instances=instances)
    loss = a_loss(model, cmim)
    assert loss.shape == () and loss.dtype == torch.float32 and loss.requires_grad
    loss.backward()
    assert cmim.heads.weights.grad.isfinite().all() and cmim.heads.weights.grad.all()
    for name in ("conv1.weight", "bn1.weight", "layer1.0.conv.weight"):
        assert model.get_parameter(name).grad.any(), name
    # After the last tap there is nothing to learn from it.
    assert model.fc.weight.grad is None


@pytest.mark.parametrize("decay, expected", [(1.0, [1 / 4] * 4), (0.5, [1 / 15, 2 / 15, 4 / 15, 8 / 15])])
def test_layer_weights_grow_towards_the_output_and_sum_to_one(decay, expected):
    model = network(units=2)
    cmim = CMIM(model, X, layer_decay=decay, weight=0.7)
    assert cmim.contrast.layer_weights == pytest.approx(expected)
    loss = a_loss(model, cmim)
    total = 0.0
    for share, metrics in zip(expected, cmim.metrics.values(), strict=True):
        total += share * metrics["loss"].item()
    assert loss.item() == pytest.approx(0.7 * total, rel=1e-6)


def test_the_weight_may_be_changed_at_any_time():
    model = network()
    cmim = CMIM(model, X, heads_lr=0)
    draws = cmim.draws.clone()
    losses = []
    for weight in (0.1, 0.4, 0):
        cmim.draws.copy_(draws)
        cmim.weight = weight
        losses.append(a_loss(model, cmim).item())
    assert losses[1] == pytest.approx(4 * losses[0]) and losses[2] == 0


def test_the_scale_of_the_loss_does_not_depend_on_depth():
    for units in (1, 2, 3):
        model = network(units=units)
        # Embeddings of length zero: each tap's loss is the logarithm of the number of candidates.
        cmim = CMIM(model, X, instances="image", weight=2.0)
        with torch.no_grad():
            cmim.heads.weights.zero_()
        assert a_loss(model, cmim).item() == pytest.approx(2 * math.log(6), rel=1e-5)


def test_embeddings_have_unit_length():
    calls = []
    model = network()
    a_loss(model, CMIM(model, X, objective=Recording(calls), **ONE))
    for side in ("z_b", "z_f"):
        torch.testing.assert_close(calls[0][side].norm(dim=1), torch.ones(len(calls[0][side])))


def test_draws_fix_the_positions_and_move_on_with_each_loss():
    calls = []
    model = network()
    cmim = CMIM(model, X, objective=Recording(calls), num_positions=8, heads_lr=0, **ONE)
    assert cmim.draws.shape == (1, 8) and cmim.draws.dtype == torch.int64
    draws = cmim.draws.clone()
    a_loss(model, cmim)
    moved = cmim.draws.clone()
    cmim.draws.copy_(draws)
    a_loss(model, cmim)
    a_loss(model, cmim)
    assert_same(calls[1], calls[0])
    assert_same(cmim.draws != moved, torch.ones(1, 8, dtype=torch.bool))
    assert not torch.equal(calls[2]["z_b"], calls[0]["z_b"])
    # A pass whose loss is not asked for takes nothing from them.
    cmim.draws.copy_(moved)
    model(X)
    assert_same(cmim.draws, moved)


# -- labels and masks ----------------------------------------------------------------------------------------------


def test_labels_follow_the_image_of_their_position():
    calls = []
    model = network()
    cmim = CMIM(model, X, objective=Recording(calls), **ALL, **ONE)
    a_loss(model, cmim, labels=torch.tensor([0, 1, 2, 3, 4, 5]))
    assert torch.bincount(calls[0]["labels"]).tolist() == [16] * 6


@pytest.mark.parametrize("size", [2, 7])
def test_a_map_of_labels_gives_each_position_the_label_at_its_middle(size):
    calls = []
    model = network()
    cmim = CMIM(model, X, objective=Recording(calls), **ALL, **ONE)
    labels = torch.randint(5, (6, size, size), generator=torch.Generator().manual_seed(3))
    a_loss(model, cmim, labels=labels)
    expected = []
    for sample in range(6):
        for row in range(4):
            for column in range(4):
                expected.append(labels[sample, int((row + 0.5) * size / 4), int((column + 0.5) * size / 4)].item())
    assert calls[0]["labels"].tolist() == expected


@pytest.mark.parametrize(
    "instances, labels, found",
    [
        ("image", torch.zeros(5, dtype=torch.int64), r"labels must be 6 integers.*\(5,\), torch.int64"),
        ("position", torch.zeros(5, 4, 4, dtype=torch.int64), r"labels must be 6 integers.*\(5, 4, 4\), torch.int64"),
        ("image", torch.zeros(6), r"labels must be 6 integers.*\(6,\), torch.float32"),
        ("position", torch.tensor(1), r"labels must be 6 integers.*\(\), torch.int64"),
        ("image", [0, 1, 0, 1, 0, 1], "labels must be 6 integers, .* found list"),
    ],
)
def test_labels_of_the_wrong_shape_are_refused(instances, labels, found):
    model = network()
    with pytest.raises(CMIMError, match=found):
        a_loss(model, CMIM(model, X, instances=instances), labels=labels)


def test_maps_of_labels_that_do_not_lie_over_the_instances_are_refused():
    model = network()
    cmim = CMIM(model, X, instances="image")
    with pytest.raises(CMIMError, match=r"6 integers, one an image .*; found shape \(6, 4, 4\)"):
        a_loss(model, cmim, labels=torch.zeros(6, 4, 4, dtype=torch.int64))
    cmim.remove()
    cmim = CMIM(model, X)
    with pytest.raises(CMIMError, match=r"shape \(6, 4\), does not lie over the positions of tap layer1.0.binary"):
        a_loss(model, cmim, labels=torch.zeros(6, 4, dtype=torch.int64))


class Tokens(nn.Module):
    """One binary layer over tokens; the mask is not used but passed along, as transformers do."""

    def __init__(self):
        super().__init__()
        self.embed, self.binary, self.head = nn.Linear(3, 4), Binary(), nn.Linear(4, 2)

    def forward(self, x, attention_mask=None):
        return self.head(self.binary(self.embed(x)))


TOKENS = torch.randn(3, 5, 3, generator=torch.Generator().manual_seed(2))
MASK = torch.tensor([[1, 1, 1, 0, 0], [1, 1, 1, 1, 1], [1, 0, 0, 0, 0]])


@pytest.mark.parametrize(
    "given, dtype", [("to the loss", torch.bool), ("to the model", torch.int64), ("to both", torch.int64)]
)
def test_padding_is_no_instance(given, dtype):
    calls = []
    model, mask = Tokens(), MASK.to(dtype)
    cmim = CMIM(model, TOKENS, objective=Recording(calls), embed_dim=5, weight=1, **ALL)
    if given == "to the loss":
        model(TOKENS)
    else:
        model(TOKENS, attention_mask=mask if given == "to the model" else torch.ones_like(mask))
    loss = cmim(model, mask=None if given == "to the model" else mask)
    kept = [i for i in range(15) if MASK.flatten()[i]]
    z_b, z_f = calls[0]["z_b"][kept], calls[0]["z_f"][kept]
    assert loss.item() == pytest.approx(InfoNCE()(z_b, z_f).item(), rel=1e-5)
    # Nine tokens are left.
    (metrics,) = cmim.metrics.values()
    assert metrics["bound"].item() == pytest.approx(math.log(9) - loss.item(), rel=1e-5)


def test_padding_changes_nothing_whatever_is_in_it():
    losses = []
    for content in (0.0, 7.0):
        torch.manual_seed(0)
        model = Tokens()
        cmim = CMIM(model, TOKENS, **ALL)
        model(torch.where(MASK[..., None] > 0, TOKENS, content), attention_mask=MASK)
        losses.append(cmim(model))
    assert_same(losses[1], losses[0])


def test_a_mask_leaves_taps_without_such_tokens_as_they_are():
    model = network()
    cmim = CMIM(model, X, **ALL, heads_lr=0)
    expected = a_loss(model, cmim)
    torch.testing.assert_close(a_loss(model, cmim, mask=torch.zeros(6, 7, dtype=torch.bool)), expected)


def test_a_mask_of_the_wrong_shape_and_one_beside_a_queue_are_refused():
    model = Tokens()
    cmim = CMIM(model, TOKENS)
    for mask, found in (
        (MASK[:2], r"mask must be \(3, tokens\).* found shape \(2, 5\)"),
        (MASK[0], r"found shape \(5,\)"),
        (torch.zeros(3, 5), r"booleans or integers.* found shape \(3, 5\), torch.float32"),
        ([1], "found list"),
    ):
        model(TOKENS)
        with pytest.raises(CMIMError, match=found):
            cmim(model, mask=mask)
    cmim.remove()
    cmim = CMIM(model, TOKENS, queue_size=4)
    model(TOKENS)
    with pytest.raises(CMIMError, match="queue_size=0"):
        cmim(model, mask=MASK)


# -- figures -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "objective, labels, instances",
    [
        (InfoNCE(), None, "image"),
        (InfoNCE(), Y, "position"),
        (NCE(num_samples=100), None, "position"),
        (NCE(num_samples=100), Y, "image"),
    ],
)
def test_metrics_are_detached_finite_and_follow_their_formula(objective, labels, instances):
    model = network()
    cmim = CMIM(model, X, instances=instances, objective=objective, **ALL)
    assert cmim.metrics == {} and cmim.scalars() == {}
    loss = a_loss(model, cmim, labels=labels)
    assert list(cmim.metrics) == [tap.name for tap in cmim.taps]
    bounds = []
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
            logs.append(math.log(negatives + 1 if objective == InfoNCE() else negatives))
        bounds.append(sum(logs) / 6 - metrics["loss"].item())
        assert metrics["bound"].item() == pytest.approx(bounds[-1], rel=1e-5, abs=1e-5)
    figures = {"cmim/loss": loss.item(), "cmim/bound": sum(bounds) / 2, "cmim/worst_bound": min(bounds)}
    assert cmim.scalars() == pytest.approx(figures, rel=1e-4)
    figures |= {f"cmim/bound/{name}": bound for name, bound in zip(cmim.metrics, bounds, strict=True)}
    assert cmim.scalars(all_taps=True) == pytest.approx(figures, rel=1e-4)
    assert all(type(value) is float for value in cmim.scalars(all_taps=True).values())


def test_an_objective_of_the_users_own_gets_all_taps_side_by_side_and_has_its_loss_for_metrics():
    model, seen = network(), []

    def objective(z_b, z_f, *, temperature, labels):
        seen.append((z_b.shape, z_f.shape, temperature, labels))
        return (z_b - z_f).square().mean((1, 2))

    cmim = CMIM(model, X, objective=objective, embed_dim=7, num_positions=11, temperature=0.4)
    a_loss(model, cmim).backward()
    assert seen == [((2, 11, 7), (2, 11, 7), 0.4, None)]
    assert all(set(metrics) == {"loss"} for metrics in cmim.metrics.values())
    assert set(cmim.scalars()) == {"cmim/loss"}


def test_an_objective_with_a_bound_of_its_own_gives_bounds():
    class Own(InfoNCE):
        def bound(self, loss, num_negatives):
            return num_negatives.sum() - loss

    model = network()
    cmim = CMIM(model, X, objective=Own(), num_positions=11)
    a_loss(model, cmim)
    for metrics in cmim.metrics.values():
        assert metrics["bound"].item() == pytest.approx(110 - metrics["loss"].item())


def test_an_objective_that_returns_something_else_is_refused():
    model = network()
    cmim = CMIM(model, X, objective=lambda z_b, z_f, **_: (z_b - z_f).square().mean())
    with pytest.raises(CMIMError, match=r"losses, shape \(2,\); found torch.Size\(\[\]\)"):
        a_loss(model, cmim)


# -- the queue -----------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("labelled", [False, True])
def test_the_queue_grows_and_wraps_first_in_first_out(labelled):
    calls = []
    model = network()
    cmim = CMIM(model, X, objective=Recording(calls), instances="image", queue_size=10, **ONE)

    def entries(call, names):
        return [
            (tuple(b), tuple(f), label) for b, f, label in zip(*(call[name].tolist() for name in names), strict=True)
        ]

    past: list[tuple] = []
    for step, n in enumerate((4, 4, 4, 6, 13, 1, 2)):
        x, y = batch(n, seed=step)
        a_loss(model, cmim, x, labels=y if labelled else None).backward()
        call = calls[-1]
        assert sorted(entries(call, ("queue_b", "queue_f", "queue_labels"))) == sorted(past[-10:])
        assert not call["queue_b"].requires_grad and not call["queue_f"].requires_grad
        call.setdefault("labels", torch.full((n,), -1))
        past += entries(call, ("z_b", "z_f", "labels"))


def test_the_queue_of_positions_keeps_the_labels_of_their_images():
    calls = []
    model = network()
    cmim = CMIM(model, X, objective=Recording(calls), queue_size=96, **ALL, **ONE)
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


def test_one_batch_of_nan_does_not_spoil_the_queue():
    model = network().eval()
    cmim = CMIM(model, X, queue_size=100)
    a_loss(model, cmim, X * math.nan)
    assert a_loss(model, cmim).isfinite()


# -- batches without negatives -------------------------------------------------------------------------------------


def test_a_batch_of_one_gives_zero_with_its_graph_and_one_warning():
    model = network()
    cmim = CMIM(model, X, instances="image")
    with told() as warned:
        for _ in range(3):
            loss = a_loss(model, cmim, X[:1])
            assert loss.item() == 0 and loss.requires_grad
            loss.backward()
            assert gradients(model) and not any(gradient.any() for gradient in gradients(model, cmim))
    assert len(warned) == 1 and "no negatives" in warned[0]


def test_a_batch_of_one_has_negatives_in_the_queue_or_in_its_own_positions():
    with told() as warned:
        model = network()
        cmim = CMIM(model, X, instances="image", queue_size=4)
        a_loss(model, cmim)
        assert a_loss(model, cmim, X[:1]).item() > 0
        model = network()
        assert a_loss(model, CMIM(model, X), X[:1]).item() > 0
    assert not warned


@each_instance
def test_a_batch_of_one_class_gives_zero_with_its_graph_and_one_warning(instances):
    model = network()
    cmim = CMIM(model, X, instances=instances)
    with told() as warned:
        for _ in range(3):
            loss = a_loss(model, cmim, labels=torch.full((6,), 3))
            assert loss.item() == pytest.approx(0, abs=1e-6) and loss.requires_grad
            loss.backward()
            assert all(gradient.abs().max() < 1e-6 for gradient in gradients(model))
    assert len(warned) == 1
    assert a_loss(model, cmim, labels=Y).item() > 0


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
        assert all(gradient.isfinite().all() for gradient in gradients(model, cmim))


# -- some taps a step ----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("taps_per_step", [2, 4])
def test_taps_take_turns_evenly_spread_and_each_as_often_as_any_other(taps_per_step):
    model = network(stages=3, units=2)
    cmim = CMIM(model, X, taps_per_step=taps_per_step)
    names, seen = [tap.name for tap in cmim.taps], []
    for _ in range(6):
        scheduled = [names.index(name) for name in cmim.scheduled]
        cmim.heads.weights.grad.zero_()
        a_loss(model, cmim).backward()
        grad = cmim.heads.weights.grad
        assert scheduled == [k for k in range(6) if any(side.any() for side in cmim.heads.weights_of(k, grad))]
        assert scheduled == sorted(scheduled) and len(scheduled) == taps_per_step
        gaps = [(b - a) % 6 or 6 for a, b in zip(scheduled, [*scheduled[1:], scheduled[0]], strict=True)]
        assert max(gaps) - min(gaps) <= (6 % taps_per_step > 0)
        seen += scheduled
    assert [seen.count(k) for k in range(6)] == [taps_per_step] * 6


@pytest.mark.parametrize("instances, taps_per_step", [("image", 1), ("position", 3)])
def test_over_as_many_steps_as_taps_mean_loss_and_gradient_are_those_of_all_taps(instances, taps_per_step):
    results = []
    for some in (taps_per_step, None):
        torch.manual_seed(0)
        model = network(units=2)
        cmim = CMIM(model, X, taps_per_step=some, instances=instances, layer_decay=0.5, heads_lr=0, **ALL)
        loss = sum(a_loss(model, cmim) for _ in range(4)) / 4
        loss.backward()
        results.append([loss.detach(), *gradients(model, cmim)])
    torch.testing.assert_close(results[0], results[1], rtol=1e-4, atol=1e-6)


def test_a_network_of_no_more_taps_contrasts_all_of_them_in_each_step():
    losses = []
    for taps_per_step in (None, 2, 6):
        torch.manual_seed(0)
        model = network()
        cmim = CMIM(model, X, taps_per_step=taps_per_step)
        losses.append([a_loss(model, cmim).item() for _ in range(3)])
    assert losses[0] == losses[1] == losses[2]


def test_metrics_are_those_of_the_last_step_that_had_the_tap():
    model = network(units=2)
    cmim = CMIM(model, X, taps_per_step=1)
    expected = {}
    for _ in range(6):
        (name,) = cmim.scheduled
        a_loss(model, cmim)
        found = {name: metrics["bound"].item() for name, metrics in cmim.metrics.items()}
        assert found[name] != expected.get(name)
        assert found == {**expected, name: found[name]}
        expected = found
    assert len(expected) == 4


# -- dtypes and memory formats -------------------------------------------------------------------------------------


@each_mixture
def test_a_forward_under_autocast_gives_a_float32_loss(recipe, instances):
    model = network(recipe)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        cmim = CMIM(model, X, instances=instances)
        assert len(cmim.taps) == 2
        loss = a_loss(model, cmim)
    assert loss.dtype == torch.float32 and loss.isfinite()
    loss.backward()
    assert all(gradient.isfinite().all() for gradient in gradients(model, cmim))


def test_autocast_does_not_reach_heads_and_critic():
    losses = []
    for enabled in (False, True):
        model = network()
        cmim = CMIM(model, X)
        model(X)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=enabled):
            losses.append(cmim(model))
    assert_same(losses[1], losses[0])


@pytest.mark.parametrize("recipe, dtype", [(IRNET, torch.bfloat16), (BIREAL, torch.float16)])
def test_a_model_in_half_precision_gives_a_float32_loss(recipe, dtype):
    model = network(recipe).to(dtype)
    cmim = CMIM(model, X.to(dtype))
    loss = a_loss(model, cmim, X.to(dtype))
    assert loss.dtype == torch.float32 and loss.isfinite()
    loss.backward()
    assert model.conv1.weight.grad.dtype == dtype and model.conv1.weight.grad.any()


@each_instance
def test_a_plug_in_in_float64_gives_a_float64_loss(instances):
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


@each_mixture
def test_channels_last_changes_nothing(recipe, instances):
    results = []
    for memory_format in (torch.contiguous_format, torch.channels_last):
        torch.manual_seed(0)
        model = network(recipe).to(memory_format=memory_format)
        x = X.contiguous(memory_format=memory_format)
        cmim = CMIM(model, x, instances=instances, num_positions=20)
        loss = a_loss(model, cmim, x)
        loss.backward()
        results.append([loss.detach(), *gradients(model, cmim)])
    torch.testing.assert_close(results[1], results[0], rtol=1e-3, atol=1e-4)


def test_a_teacher_with_other_positions_in_a_batch_is_refused():
    model, other = network(), teacher()
    cmim = CMIM(model, X, teacher=other, **ALL)
    other.conv1.stride = (2, 2)
    assert model(X).isfinite().all()
    with pytest.raises(CMIMError, match=r"Tap layer1.0.binary: its two sides have .* positions"):
        cmim(model)


def test_the_heads_get_the_rows_at_the_drawn_positions_and_no_others():
    model = network()
    cmim = CMIM(model, X, num_positions=7, taps=["layer1.0.binary"])
    (index,) = stratified_indices(cmim.draws, 6 * 16).tolist()
    seen = []
    model.layer1[0].binary.register_forward_hook(
        lambda module, args, output: seen.append(output) or output.retain_grad()
    )
    logits = model(X)
    (cmim(model) + 0 * F.cross_entropy(logits, Y)).backward()
    touched = seen[0].grad.abs().sum(1).flatten().nonzero().flatten().tolist()
    assert touched == sorted(index)


# -- what a mask means ----------------------------------------------------------------------------------------------


def masked_loss(*args: Tensor, **inputs: Tensor) -> float:
    torch.manual_seed(0)
    model = Tokens()
    cmim = CMIM(model, TOKENS)
    model(TOKENS, *args, **inputs)
    return cmim(model).item()


def test_the_mask_of_the_model_is_read_only_where_it_tells_samples_and_tokens():
    plain = masked_loss()
    padding = torch.tensor([[1, 1, 1, 0, 0]] * 3)
    assert masked_loss(attention_mask=padding) != plain
    assert masked_loss(attention_mask=padding.bool()) == masked_loss(attention_mask=padding)
    for other in (torch.ones(5, 5).tril(), torch.zeros(3, 5), torch.ones(5, 5, dtype=torch.bool).tril()):
        assert masked_loss(attention_mask=other) == plain


def test_the_mask_of_the_model_is_read_where_it_comes_by_position():
    padding = torch.tensor([[1, 1, 1, 0, 0]] * 3)
    assert masked_loss(padding) == masked_loss(attention_mask=padding) != masked_loss()


class AnyInputs(Tokens):
    def forward(self, *inputs: Tensor, attention_mask: Tensor | None = None) -> Tensor:
        return super().forward(inputs[0], attention_mask)


def test_a_mask_that_comes_by_its_name_alone_is_not_looked_for_by_position():
    torch.manual_seed(0)
    model, token_types = AnyInputs(), torch.tensor([[0, 0, 0, 1, 1]] * 3)
    cmim = CMIM(model, (TOKENS, token_types))
    losses = []
    for arguments in ((TOKENS, token_types), (TOKENS,)):
        model(*arguments)
        draws = cmim.draws.clone()
        losses.append(cmim(model).item())
        cmim.draws.copy_(draws)
    assert losses[0] == losses[1]


def test_an_attention_mask_of_floats_is_told_for_it_may_be_additive():
    with pytest.warns(CMIMWarning, match="attention_mask of floats is not read: pass mask="):
        masked_loss(attention_mask=torch.zeros(3, 5))


def test_an_attention_mask_of_pairs_of_tokens_is_told():
    mask = torch.ones(3, 1, 5, 5, dtype=torch.bool).tril()
    with pytest.warns(CMIMWarning, match="attention_mask of 4 dimensions is not read: pass mask="):
        masked_loss(attention_mask=mask)


def test_a_mask_for_maps_which_have_no_tokens_is_warned_about():
    model = network()
    cmim = CMIM(model, X)
    model(X)
    with pytest.warns(CMIMWarning, match="The mask is not applied to these taps, .* tokens a sample, than the mask"):
        cmim(model, mask=torch.ones(len(X), 16, dtype=torch.bool))


def test_a_mask_with_other_tokens_is_warned_about_once_and_counts_nothing_out():
    model = Tokens()
    cmim = CMIM(model, TOKENS)
    with told() as warned:
        for tokens in (4, 3, 6):  # batches are padded to lengths of their own
            model(TOKENS)
            cmim(model, mask=torch.ones(3, tokens, dtype=torch.bool))
    assert len(warned) == 1 and "than the mask: ['binary']" in warned[0]


def test_a_mask_that_leaves_nothing_gives_no_bound():
    model = Tokens()
    cmim = CMIM(model, TOKENS)
    model(TOKENS)
    with pytest.warns(CMIMWarning, match="no negatives"):
        assert cmim(model, mask=torch.zeros(3, 5, dtype=torch.bool)).item() == 0
    assert "bound" not in cmim.metrics["binary"] and "cmim/bound" not in cmim.scalars()


def test_the_logged_loss_is_the_one_returned_where_taps_never_give_one():
    """Of frozen layers."""
    model = network(stages=3)
    cmim = CMIM(model, X, taps_per_step=None)
    model[:3].requires_grad_(False)
    model(X)
    with pytest.warns(CMIMWarning, match="adds nothing"):
        loss = cmim(model)
    assert cmim.scalars()["cmim/loss"] == pytest.approx(loss.item())
