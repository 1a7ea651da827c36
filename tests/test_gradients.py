"""Gradients against an oracle that shares no code with the library or the networks, in float64.

The oracle is a forward pass written out by hand, with autograd functions of its own, and loops over rows, dimensions,
anchors and candidates for heads, unit length, critic and loss.
"""

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from cmim_plugin import CMIM
from networks import BIREAL, IRNET, network, teacher

TEMPERATURE = 0.2
DIMENSIONS = 3
WEIGHT = 0.6
# Three images of two classes, so that labels exclude some pairs and not all.
LABELS = torch.tensor([0, 1, 0])


# -- the forward pass, by hand -------------------------------------------------------------------------------------


class BiRealSign(torch.autograd.Function):
    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return (x >= 0).double() * 2 - 1

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        rising = ((x >= -1) & (x < 0)).double() * (2 + 2 * x)
        falling = ((x >= 0) & (x < 1)).double() * (2 - 2 * x)
        return grad * (rising + falling)


class ClippedSign(torch.autograd.Function):
    @staticmethod
    def forward(ctx, w):
        ctx.save_for_backward(w)
        return (w >= 0).double() * 2 - 1

    @staticmethod
    def backward(ctx, grad):
        (w,) = ctx.saved_tensors
        return torch.where((w > -1) & (w < 1), grad, torch.zeros_like(grad))


class ErrorDecaySign(torch.autograd.Function):
    """IR-Net's estimator at the start of training: t = 0.1, k = 10."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return (x >= 0).double() * 2 - 1

    @staticmethod
    def backward(ctx, grad):
        (x,) = ctx.saved_tensors
        return grad * 10 * 0.1 / torch.cosh(0.1 * x) ** 2


def batch_norm(x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
    mean = x.mean((0, 2, 3), keepdim=True)
    variance = ((x - mean) ** 2).mean((0, 2, 3), keepdim=True)
    return (x - mean) / torch.sqrt(variance + 1e-5) * weight[:, None, None] + bias[:, None, None]


def hardtanh(x: Tensor) -> Tensor:
    return torch.where(x > 1, 1.0, torch.where(x < -1, -1.0, x))


def unchanged(x: Tensor) -> Tensor:
    return x


def bireal_weight(w: Tensor) -> Tensor:
    return ClippedSign.apply(w) * w.detach().abs().mean((1, 2, 3), keepdim=True)


def irnet_weight(w: Tensor) -> Tensor:
    count = w[0].numel()
    w = w - w.mean((1, 2, 3), keepdim=True)
    w = w / torch.sqrt((w**2).sum((1, 2, 3), keepdim=True) / (count - 1))
    scale = torch.pow(2.0, torch.round(torch.log2(w.detach().abs().mean((1, 2, 3), keepdim=True))))
    return ErrorDecaySign.apply(w) * scale


# sign of the activation, binary weight, nonlinearity
METHODS = {
    "IR-Net": (IRNET, ErrorDecaySign.apply, irnet_weight, hardtanh),
    "Bi-Real": (BIREAL, BiRealSign.apply, bireal_weight, unchanged),
}
each_mixture = pytest.mark.parametrize("method, instances", [("IR-Net", "position"), ("Bi-Real", "image")])


def activations(method: str, p: dict[str, Tensor], x: Tensor) -> list[tuple[Tensor, Tensor]]:
    """(a_B, a_F) of the network's two binarizations, by hand."""
    _, sign, binary_weight, nonlinearity = METHODS[method]
    x = nonlinearity(batch_norm(F.conv2d(x, p["conv1.weight"], padding=1), p["bn1.weight"], p["bn1.bias"]))
    first = sign(x)
    out = F.conv2d(first, binary_weight(p["layer1.0.conv.weight"]), padding=1)
    y = nonlinearity(batch_norm(out, p["layer1.0.bn.weight"], p["layer1.0.bn.bias"]) + x)
    return [(first, x), (sign(y), y)]


def teacher_activations(method: str, p: dict[str, Tensor], x: Tensor) -> list[Tensor]:
    """What the teacher's second convolutions consume, its batch norms in eval mode after no training at all."""
    nonlinearity = METHODS[method][3]

    def relu(t):
        # In IR-Net the nonlinearity comes after the shortcut, and the convolution takes what comes from there.
        return t if method == "IR-Net" else torch.where(t > 0, t, 0.0)

    x = nonlinearity(F.conv2d(x, p["conv1.weight"], padding=1) / (1 + 1e-5) ** 0.5)
    first = relu(x)
    out = F.conv2d(first, p["layer1.0.conv.weight"], padding=1) / (1 + 1e-5) ** 0.5
    return [first, relu(nonlinearity(out + x))]


# -- heads and loss, in loops --------------------------------------------------------------------------------------


def rows_of(activation: Tensor, positions: list[int] | None) -> list[Tensor]:
    """Channel vectors: one an image, or one for each of the positions, counted over the batch."""
    batch, _, height, width = activation.shape
    rows = []
    if positions is None:
        for image in range(batch):
            total = 0.0
            for y in range(height):
                for x in range(width):
                    total = total + activation[image, :, y, x]
            rows.append(total / (height * width))
    else:
        for position in positions:
            image, place = divmod(position, height * width)
            rows.append(activation[image, :, place // width, place % width])
    return rows


def embedding(row: Tensor, weight: Tensor) -> list[Tensor]:
    z = []
    for d in range(DIMENSIONS):
        total = 0.0
        for c in range(len(row)):
            total = total + weight[c, d] * row[c]
        z.append(total)
    square = 0.0
    for value in z:
        square = square + value * value
    length = (square + 1e-12).sqrt()  # no direction where it is short: not stretched
    return [value / length for value in z]


def one_direction(anchors, candidates, queue, labels, queue_labels) -> Tensor:
    total = 0.0
    for i, anchor in enumerate(anchors):
        scores = []
        for j, candidate in enumerate([*candidates, *queue]):
            queued = j >= len(candidates)
            if labels is not None and j != i:
                label = queue_labels[j - len(candidates)] if queued else labels[j]
                if label == labels[i]:
                    continue
            score = 0.0
            for a, c in zip(anchor, candidate, strict=True):
                score = score + a * c
            scores.append((i == j, score / TEMPERATURE))
        denominator = 0.0
        for _, score in scores:
            denominator = denominator + score.exp()
        for positive, score in scores:
            if positive:
                total = total - (score - denominator.log())
    return total / len(anchors)


def oracle(pairs, heads, shares, chosen, labels=None, queues=None):
    """The weighted loss and, for the queue of the next step, the embeddings; `heads`: both sides of each tap."""
    total, embeddings = 0.0, []
    for k, (a_b, a_f) in enumerate(pairs):
        positions = chosen[k]
        z_b, z_f = [], []
        for z, activation, weight in zip((z_b, z_f), (a_b, a_f), heads[k], strict=True):
            for row in rows_of(activation, positions):
                z.append(embedding(row, weight))
        row_labels = labels
        if labels is not None and positions is not None:
            row_labels = [labels[position // (a_b.shape[2] * a_b.shape[3])] for position in positions]
        queue_b, queue_f, queue_labels = queues[k] if queues else ([], [], [])
        there = one_direction(z_b, z_f, queue_f, row_labels, queue_labels)
        back = one_direction(z_f, z_b, queue_b, row_labels, queue_labels)
        total = total + shares[k] * (there + back) / 2
        detached = [[[value.detach() for value in z] for z in side] for side in (z_b, z_f)]
        embeddings.append((*detached, row_labels or [-1] * len(z_b)))
    return WEIGHT * total, embeddings


# -- the comparison ------------------------------------------------------------------------------------------------


def start(method: str, **settings):
    torch.manual_seed(0)
    model = network(METHODS[method][0], classes=2, stages=1, units=2, width=3).double()
    with torch.no_grad():
        for name, parameter in model.named_parameters():
            if "bn" in name:
                parameter.add_(torch.randn_like(parameter) / 4)
    settings = {"weight": WEIGHT, "temperature": TEMPERATURE, "embed_dim": DIMENSIONS, "heads_lr": 0, **settings}
    cmim = CMIM(model, torch.randn(3, 2, 2, 3).double(), **settings).double()
    assert len(cmim.taps) == 2
    return model, cmim


def batch(seed: int) -> Tensor:
    return torch.randn(3, 2, 2, 3, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))


def everywhere(instances: str) -> list[list[int] | None]:
    """The positions of each tap when there are not more than asked for. Their order does not matter."""
    return [None, None] if instances == "image" else [list(range(3 * 6))] * 2


def parameters_of(model, cmim) -> tuple[dict[str, Tensor], list[list[Tensor]]]:
    """Copies, to be differentiated by: of the network's, and of both sides' heads of each tap."""
    network = {name: p.detach().clone().requires_grad_() for name, p in model.named_parameters()}
    heads = [[side.clone().requires_grad_() for side in cmim.heads.weights_of(k)] for k in range(len(cmim.taps))]
    return network, heads


def assert_agrees(loss, model, cmim, expected, network, heads):
    assert loss.item() == pytest.approx(expected.item(), abs=1e-9)
    model.zero_grad()
    cmim.heads.weights.grad.zero_()
    for copied in [*network.values(), *(side for tap in heads for side in tap)]:
        copied.grad = None
    loss.backward()
    expected.backward()
    close = {"rtol": 1e-9, "atol": 1e-9}
    for name, parameter in model.named_parameters():
        wanted = network[name].grad
        if wanted is None:
            assert parameter.grad is None, name
        else:
            torch.testing.assert_close(parameter.grad, wanted, **close, msg=lambda m, n=name: f"{n}: {m}")
    for k, tap in enumerate(heads):
        for found, side in zip(cmim.heads.weights_of(k, cmim.heads.weights.grad), tap, strict=True):
            torch.testing.assert_close(found, side.grad, **close, msg=lambda m, n=k: f"head of tap {n}: {m}")
    # Weights before the taps, and not only beside them.
    for name in ("conv1.weight", "layer1.0.conv.weight", "bn1.weight"):
        assert model.get_parameter(name).grad.abs().max() > 1e-4, name


@pytest.mark.parametrize(
    "method, instances, labels",
    [
        ("IR-Net", "image", None),
        ("IR-Net", "position", LABELS),
        ("Bi-Real", "image", LABELS),
        ("Bi-Real", "position", None),
    ],
)
def test_gradients_agree_with_loops(method, instances, labels):
    model, cmim = start(method, instances=instances)
    network, heads = parameters_of(model, cmim)
    x = batch(1)
    model(x)
    loss = cmim(model, labels=labels)
    pairs = activations(method, network, x)
    expected, _ = oracle(pairs, heads, [0.5, 0.5], everywhere(instances), None if labels is None else labels.tolist())
    assert_agrees(loss, model, cmim, expected, network, heads)


def test_gradients_of_a_sample_of_the_positions_agree_with_loops():
    method = "IR-Net"
    model, cmim = start(method, num_positions=5)
    network, heads = parameters_of(model, cmim)
    x = batch(1)
    for _ in range(2):
        # As the library says: 5 intervals of the 18 positions, in each the one that the upper half of the draw leaves.
        chosen = []
        edges = [0, 3, 7, 10, 14, 18]
        for draws in cmim.draws.tolist():
            chosen.append([edges[i] + (draw // 2**32) % (edges[i + 1] - edges[i]) for i, draw in enumerate(draws)])
        assert all(len(set(positions)) == 5 for positions in chosen)
        model(x)
        loss = cmim(model)
        expected, _ = oracle(activations(method, network, x), heads, [0.5, 0.5], chosen)
        assert_agrees(loss, model, cmim, expected, network, heads)


@pytest.mark.parametrize(
    "method, instances, labels",
    [
        ("IR-Net", "position", (None, None)),
        ("Bi-Real", "image", (LABELS, torch.tensor([1, 2, 1]))),
        ("Bi-Real", "position", (LABELS, torch.tensor([1, 2, 1]))),
        ("IR-Net", "image", (None, LABELS)),
    ],
    ids=["unlabelled", "labelled images", "labelled positions", "labelled from the second on"],
)
def test_gradients_of_the_step_after_the_first_with_a_queue_agree_with_loops(method, instances, labels):
    model, cmim = start(method, instances=instances, queue_size=20)
    network, heads = parameters_of(model, cmim)
    queues = None
    for step in range(2):
        x = batch(step)
        model(x)
        now = labels[step]
        loss = cmim(model, labels=now)
        expected, queues = oracle(
            activations(method, network, x),
            heads,
            [0.5, 0.5],
            everywhere(instances),
            None if now is None else now.tolist(),
            queues,
        )
    assert_agrees(loss, model, cmim, expected, network, heads)


@each_mixture
def test_gradients_with_layer_decay_agree_with_loops(method, instances):
    model, cmim = start(method, instances=instances, layer_decay=1 / 3)
    network, heads = parameters_of(model, cmim)
    x = batch(1)
    model(x)
    expected, _ = oracle(activations(method, network, x), heads, [0.25, 0.75], everywhere(instances))
    assert_agrees(cmim(model), model, cmim, expected, network, heads)


@each_mixture
def test_gradients_with_a_teacher_agree_with_loops(method, instances):
    other = teacher(METHODS[method][0], classes=2, stages=1, units=2, width=5).double()
    frozen = {name: p.detach().clone() for name, p in other.named_parameters()}
    model, cmim = start(method, instances=instances, teacher=other)
    network, heads = parameters_of(model, cmim)
    x = batch(1)
    model(x)
    pairs = [
        (a_b, a_t)
        for (a_b, _), a_t in zip(activations(method, network, x), teacher_activations(method, frozen, x), strict=True)
    ]
    expected, _ = oracle(pairs, heads, [0.5, 0.5], everywhere(instances))
    assert_agrees(cmim(model), model, cmim, expected, network, heads)
    assert all(parameter.grad is None for parameter in other.parameters())


@each_mixture
def test_the_gradients_of_task_and_plug_in_add_up_in_one_backward_pass_and_in_two(method, instances):
    x, y = batch(1), torch.tensor([0, 1, 0])
    results = []
    for losses in ("task", "plug-in", "one pass", "two passes", "two passes, the other way round"):
        model, cmim = start(method, instances=instances)
        task = F.cross_entropy(model(x), y)
        parts = {"task": task, "plug-in": cmim(model)}
        if losses in parts:
            parts[losses].backward()
        elif losses == "one pass":
            sum(parts.values()).backward()
        else:
            first, second = parts.values() if losses == "two passes" else reversed(parts.values())
            first.backward(retain_graph=True)
            second.backward()
        results.append([torch.zeros_like(p) if p.grad is None else p.grad for p in model.parameters()])
    task, contrast, *together = results
    for found in together:
        for f, t, c in zip(found, task, contrast, strict=True):
            torch.testing.assert_close(f, t + c, rtol=1e-9, atol=1e-9)


def test_gradients_of_gradients_agree_with_loops():
    method = "Bi-Real"
    model, cmim = start(method)
    network, heads = parameters_of(model, cmim)
    x = batch(1)
    model(x)
    expected, _ = oracle(activations(method, network, x), heads, [0.5, 0.5], everywhere("position"))
    name = "conv1.weight"
    results = []
    for loss, weight in ((cmim(model), model.get_parameter(name)), (expected, network[name])):
        (grad,) = torch.autograd.grad(loss, weight, create_graph=True)
        results.append(torch.autograd.grad(grad.square().sum(), weight)[0])
    assert results[1].abs().max() > 1e-4
    torch.testing.assert_close(results[0], results[1], rtol=1e-9, atol=1e-9)
