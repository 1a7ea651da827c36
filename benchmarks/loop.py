"""The training loop of the benchmarks: eager float32, or fast (compiled, bf16 autocast). Nothing in an epoch waits for
the device: data, augmentation and sums stay there, and numbers are read after the epoch's last step."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterable
from dataclasses import dataclass, field
from typing import Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data import Data

# Learning rate and weight decay where none are given.
OPTIMIZERS = {"sgd": {"lr": 0.1, "weight_decay": 1e-4}, "adam": {"lr": 3e-3, "weight_decay": 0.0}}
BOUNDS_PER_EPOCH = 8  # steps whose bounds are recorded


@dataclass(frozen=True)
class Schedule:
    """How a network is trained. Each optimizer follows a cosine to zero, step by step.

    fast: torch.compile's mode ("default" is its usual one), with bf16 autocast; None for eager float32
    eval_every: epochs from test to test; the last epoch is always tested
    """

    epochs: int
    batch_size: int
    optimizer: str
    lr: float
    weight_decay: float
    fast: str | None = None
    eval_every: int = 1


class Auxiliary(Protocol):
    """A loss beside the task's, of the last forward pass."""

    def start_epoch(self, progress: float) -> None:
        """`progress`: share of the epochs that are done."""

    def loss(self, model: nn.Module, y: Tensor, index: Tensor) -> Tensor: ...

    def bounds(self) -> dict[str, Tensor]: ...

    def parameters(self) -> Iterable[Tensor]:
        """What the network's optimizer is to train as well."""

    def remove(self) -> None: ...


@dataclass
class History:
    """One training, an entry an epoch (accuracies in %; test accuracy is NaN in epochs without a test)."""

    train_loss: list[float] = field(default_factory=list)
    train_accuracy: list[float] = field(default_factory=list)
    test_accuracy: list[float] = field(default_factory=list)
    bounds: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))  # tap -> nats
    seconds: list[float] = field(default_factory=list)  # of training, without tests; the first epoch compiles


def make_optimizer(model: nn.Module, schedule: Schedule) -> torch.optim.Optimizer:
    common = {"lr": schedule.lr, "weight_decay": schedule.weight_decay, "fused": True if schedule.fast else None}
    if schedule.optimizer == "sgd":
        return torch.optim.SGD(model.parameters(), momentum=0.9, **common)
    return torch.optim.Adam(model.parameters(), **common)


def cross_entropy(x: Tensor, y: Tensor, logits: Tensor) -> Tensor:
    return F.cross_entropy(logits, y)


def train(
    model: nn.Module,
    data: Data,
    schedule: Schedule,
    seed: int,
    *,
    attach: Callable[[], Auxiliary | None] = lambda: None,
    criterion: Callable[[Tensor, Tensor, Tensor], Tensor] = cross_entropy,
    on_epoch: Callable[[nn.Module, int, int], None] | None = None,
) -> History:
    """Train in place.

    seed: of batches and augmentation, which all arms of a seed share whatever else they draw
    attach: makes the auxiliary loss, before the network is compiled
    criterion: (x, y, logits) -> 0-d loss, before the auxiliary loss
    on_epoch: (model, epoch, epochs), called before each epoch
    """
    where = data.x_train.device
    generator = torch.Generator(where).manual_seed(seed)
    auxiliary = attach()
    optimizer = make_optimizer(model, schedule)
    if auxiliary and (more := list(auxiliary.parameters())):
        optimizer.add_param_group({"params": more})
    size = min(schedule.batch_size, len(data.x_train))
    steps = len(data.x_train) // size  # only full batches: another shape would be compiled as well
    cosine = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, schedule.epochs * steps)
    forward: Callable[[Tensor], Tensor] = model
    if schedule.fast:
        torch.compiler.reset()  # graphs of the process's earlier runs count towards a limit
        mode = None if schedule.fast == "default" else schedule.fast
        forward, criterion = torch.compile(model, mode=mode), torch.compile(criterion, mode=mode)

    history = History()
    for epoch in range(schedule.epochs):
        if on_epoch:
            on_epoch(model, epoch, schedule.epochs)
        if auxiliary:
            auxiliary.start_epoch(epoch / schedule.epochs)
        model.train()
        start = time.perf_counter()
        sums = torch.zeros(2, device=where)
        bounds: dict[str, list[Tensor]] = defaultdict(list)
        order = torch.randperm(len(data.x_train), generator=generator, device=where)
        for step in range(steps):
            index = order[step * size : (step + 1) * size]
            x, y = data.normalise(data.augmented(index, generator)), data.y_train[index]
            with torch.autocast(where.type, torch.bfloat16, enabled=bool(schedule.fast)):
                logits = forward(x)
                loss = criterion(x, y, logits)
                sums += torch.stack((loss.detach(), (logits.argmax(1) == y).float().mean()))
                if auxiliary:
                    loss = loss + auxiliary.loss(model, y, index)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            cosine.step()
            if auxiliary and step % max(1, steps // BOUNDS_PER_EPOCH) == 0:
                for name, bound in auxiliary.bounds().items():
                    bounds[name].append(bound.detach().clone())
        mean_loss, mean_accuracy = (sums / steps).tolist()  # waits for the device
        history.seconds.append(time.perf_counter() - start)
        history.train_loss.append(mean_loss)
        history.train_accuracy.append(100 * mean_accuracy)
        for name, values in bounds.items():
            history.bounds[name].append(torch.stack(values).mean().item())
        tested = epoch == schedule.epochs - 1 or (epoch + 1) % schedule.eval_every == 0
        history.test_accuracy.append(accuracy(model, data) if tested else float("nan"))
    if auxiliary:
        auxiliary.remove()
    return history


@torch.no_grad()
def accuracy(model: nn.Module, data: Data) -> float:
    """Test accuracy in %, eager and in float32, however the network was trained."""
    model.eval()
    parts = zip(data.x_test.split(500), data.y_test.split(500), strict=True)
    right = torch.stack([(model(data.normalise(x)).argmax(1) == y).sum() for x, y in parts])
    return 100 * right.sum().item() / len(data.y_test)
