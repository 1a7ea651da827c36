"""The training loop of the benchmarks: eager float32, or fast (compiled, or recorded in a CUDA graph; bf16 autocast).
Nothing in an epoch waits for the device: data, augmentation and sums stay there, and numbers are read after the epoch's
last step. The loop is a generator that stops every few steps, so that one GPU can train several networks in turn."""

from __future__ import annotations

import contextlib
import math
import queue
import threading
import time
from collections import defaultdict
from collections.abc import Callable, Generator, Iterable
from concurrent.futures import Executor, Future
from dataclasses import dataclass, field
from typing import Any, Protocol, TypeVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from data import Data

# Learning rate and weight decay where none are given.
OPTIMIZERS = {"sgd": {"lr": 0.1, "weight_decay": 1e-4}, "adam": {"lr": 3e-3, "weight_decay": 0.0}}
BOUNDS_PER_EPOCH = 8  # steps whose bounds are recorded
STEPS_A_TURN = 50  # of one network, where several train in turn
GRAPH = "graph"  # the name of that fast mode

T = TypeVar("T")


@dataclass(frozen=True)
class Schedule:
    """How a network is trained. Each optimizer follows a cosine to zero, step by step.

    fast: with bf16 autocast: torch.compile's mode ("default" is its usual one), or "graph" for steps that are recorded
        in a CUDA graph and replayed, operation by operation as in eager mode; None for eager float32
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

    def generators(self) -> Iterable[torch.Generator]:
        """What the loss draws from, on the device."""

    def remove(self) -> None: ...


@dataclass
class History:
    """One training, an entry an epoch (accuracies in %; test accuracy is NaN in epochs without a test)."""

    train_loss: list[float] = field(default_factory=list)
    train_accuracy: list[float] = field(default_factory=list)
    test_accuracy: list[float] = field(default_factory=list)
    bounds: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))  # tap -> nats
    seconds: list[float] = field(default_factory=list)  # of training, without tests; the first epoch compiles


def make_optimizer(model: nn.Module, schedule: Schedule, more: list[Tensor]) -> torch.optim.Optimizer:
    """For the parameters of the network, and for `more`."""
    # A number would be a constant of the graph.
    lr = torch.tensor(schedule.lr, device=next(model.parameters()).device) if schedule.fast == GRAPH else schedule.lr
    common: dict[str, Any] = {"weight_decay": schedule.weight_decay, "fused": True if schedule.fast else None}
    groups = [{"params": list(params), "lr": lr + 0} for params in (model.parameters(), more) if params]
    if schedule.optimizer == "sgd":
        return torch.optim.SGD(groups, lr, momentum=0.9, **common)
    return torch.optim.Adam(groups, lr, capturable=schedule.fast == GRAPH, **common)


class DeviceCosine:
    """CosineAnnealingLR whose place and rates are tensors, so that a CUDA graph can hold it."""

    def __init__(self, optimizer: torch.optim.Optimizer, total: int) -> None:
        self.rates = [group["lr"] for group in optimizer.param_groups]
        self.first = [rate.clone() for rate in self.rates]
        self.done = torch.zeros_like(self.rates[0])
        self.total = total

    def step(self) -> None:
        self.done += 1
        factor = (torch.cos(self.done * (math.pi / self.total)) + 1) / 2
        for rate, first in zip(self.rates, self.first, strict=True):
            torch.mul(first, factor, out=rate)


class Recorded:
    """A training step on a static batch: run as it is at first, then recorded in a CUDA graph, then replayed.

    Without a GPU it always runs as it is.

    Args:
        step: takes the indices of the batch's images.
        generators: what it draws from, on the device.
    """

    WARMUP = 3

    def __init__(self, step: Callable[[Tensor], None], index: Tensor, generators: list[torch.Generator]) -> None:
        self.step, self.index, self.calls = step, torch.empty_like(index), 0
        self.graph = torch.cuda.CUDAGraph() if index.is_cuda else None
        for generator in generators if self.graph else ():
            self.graph.register_generator_state(generator)

    def __call__(self, index: Tensor) -> None:
        self.index.copy_(index)
        self.calls += 1
        if self.graph is None or self.calls <= self.WARMUP:
            self.step(self.index)
            return
        if self.calls == self.WARMUP + 1:
            with torch.cuda.graph(self.graph, stream=torch.cuda.current_stream()):
                self.step(self.index)
        self.graph.replay()


def cross_entropy(x: Tensor, y: Tensor, logits: Tensor) -> Tensor:
    return F.cross_entropy(logits, y)


def training(
    model: nn.Module,
    data: Data,
    schedule: Schedule,
    seed: int,
    *,
    attach: Callable[[], Auxiliary | None] = lambda: None,
    criterion: Callable[[Tensor, Tensor, Tensor], Tensor] = cross_entropy,
    on_epoch: Callable[[nn.Module, int, int], None] | None = None,
) -> Generator[None, None, History]:
    """Train in place, some steps between two values of the generator.

    seed: of batches and augmentation, which all arms of a seed share whatever else they draw
    attach: makes the auxiliary loss, before the network is compiled
    criterion: (x, y, logits) -> 0-d loss, before the auxiliary loss
    on_epoch: (model, epoch, epochs), called before each epoch
    """
    where = data.x_train.device
    generator = torch.Generator(where).manual_seed(seed)
    auxiliary = attach()
    optimizer = make_optimizer(model, schedule, list(auxiliary.parameters()) if auxiliary else [])
    size = min(schedule.batch_size, len(data.x_train))
    steps = len(data.x_train) // size  # only full batches: another shape would be compiled as well
    cosine = (DeviceCosine if schedule.fast == GRAPH else CosineAnnealingLR)(optimizer, schedule.epochs * steps)
    forward: Callable[[Tensor], Tensor] = model
    if schedule.fast and schedule.fast != GRAPH:
        torch.compiler.reset()  # graphs of the process's earlier runs count towards a limit
        mode = None if schedule.fast == "default" else schedule.fast
        forward, criterion = torch.compile(model, mode=mode), torch.compile(criterion, mode=mode)

    sums = torch.zeros(2, device=where)

    def step_on(index: Tensor) -> None:
        x, y = data.normalise(data.augmented(index, generator)), data.y_train[index]
        with torch.autocast(where.type, torch.bfloat16, enabled=schedule.fast is not None):
            logits = forward(x)
            loss = criterion(x, y, logits)
            sums.add_(torch.stack((loss.detach(), (logits.argmax(1) == y).float().mean())))
            if auxiliary:
                loss = loss + auxiliary.loss(model, y, index)
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        cosine.step()

    if schedule.fast == GRAPH:
        generators = [generator, *(auxiliary.generators() if auxiliary else ())]
        step_on = Recorded(step_on, torch.zeros(size, dtype=torch.int64, device=where), generators)
    history = History()
    for epoch in range(schedule.epochs):
        if on_epoch:
            on_epoch(model, epoch, schedule.epochs)
        if auxiliary:
            auxiliary.start_epoch(epoch / schedule.epochs)
        model.train()
        start = time.perf_counter()
        sums.zero_()
        bounds: dict[str, list[Tensor]] = defaultdict(list)
        order = torch.randperm(len(data.x_train), generator=generator, device=where)
        for step in range(steps):
            step_on(order[step * size : (step + 1) * size])
            if auxiliary and step % max(1, steps // BOUNDS_PER_EPOCH) == 0:
                for name, bound in auxiliary.bounds().items():
                    bounds[name].append(bound.detach().clone())
            if (epoch * steps + step) % STEPS_A_TURN == STEPS_A_TURN - 1:
                yield
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


def train(*args: Any, **options: Any) -> History:
    """`training` to its end."""
    return to_the_end(training(*args, **options))


# --- one network after another, or in turn ---------------------------------------------------------------------------


def stream() -> contextlib.AbstractContextManager[Any]:
    """A CUDA stream, for nothing can be recorded on the default one."""
    return torch.cuda.stream(torch.cuda.Stream()) if torch.cuda.is_available() else contextlib.nullcontext()


def to_the_end(work: Generator[None, None, T]) -> T:
    """What a generator returns."""
    with stream():
        while True:
            try:
                next(work)
            except StopIteration as stop:
                return stop.value


class SideBySide(Executor):
    """Runs generators in one thread, a turn of each after another, each on a CUDA stream of its own.

    A GPU works on all of them at once: a small network alone leaves it idle. One more starts each round, so that those
    that run already keep the GPU busy meanwhile.
    """

    def __init__(self) -> None:
        self.submitted: queue.SimpleQueue[tuple[Future, Generator] | None] = queue.SimpleQueue()
        self.thread = threading.Thread(target=self.run, daemon=True)
        self.thread.start()

    def submit(self, fn: Callable[..., Generator], /, *args: Any, **options: Any) -> Future:
        future: Future = Future()
        self.submitted.put((future, fn(*args, **options)))
        return future

    def shutdown(self, wait: bool = True, *, cancel_futures: bool = False) -> None:
        self.submitted.put(None)
        if wait:
            self.thread.join()

    def run(self) -> None:
        running: list[tuple[Future, Generator, contextlib.AbstractContextManager[Any]]] = []
        more = True
        while running or more:
            if more and (not running or not self.submitted.empty()):
                job = self.submitted.get()
                if job is None:
                    more = False
                    continue
                running.append((*job, stream()))
            for future, work, of_its_own in list(running):
                try:
                    with of_its_own:
                        next(work)
                except StopIteration as stop:
                    future.set_result(stop.value)
                except BaseException as error:
                    future.set_exception(error)
                if future.done():
                    running.remove((future, work, of_its_own))


@torch.no_grad()
def accuracy(model: nn.Module, data: Data) -> float:
    """Test accuracy in %, eager and in float32, however the network was trained."""
    model.eval()
    parts = zip(data.x_test.split(500), data.y_test.split(500), strict=True)
    right = torch.stack([(model(data.normalise(x)).argmax(1) == y).sum() for x, y in parts])
    return 100 * right.sum().item() / len(data.y_test)
