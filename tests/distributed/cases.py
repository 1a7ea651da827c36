"""What is trained on several ranks and, as a reference, in one process; run by torchrun, it leaves the former in files.

torchrun --nproc_per_node=2 tests/distributed/cases.py OUT
"""

from __future__ import annotations

import contextlib
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from cmim_plugin import CMIM, NCE, CMIMError, PublishedCMIM
from networks import Binary, BinaryConv

BATCH = 8
STEPS = 3


class Sometimes(nn.Module):
    """A network whose second binary layer is not run on inputs of a negative mean: it may differ from rank to rank."""

    def __init__(self) -> None:
        super().__init__()
        self.stem = nn.Conv2d(2, 6, 3, padding=1)
        self.first = BinaryConv(6, 6, 3, padding=1)
        self.second = BinaryConv(6, 6, 3, padding=1)
        self.fc = nn.Linear(6, 3)

    def forward(self, x: Tensor) -> Tensor:
        x = x + 0
        y = self.first(self.stem(x))
        if x[0, 0, 0, 0] > 0:
            y = self.second(y)
        return self.fc(y.mean((2, 3)))


def network() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(
        nn.Conv2d(2, 6, 3, padding=1),
        Binary(),
        nn.Conv2d(6, 8, 3, padding=1, stride=2),
        BinaryConv(8, 8, 3, padding=1),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        Binary(),
        nn.Linear(8, 3),
    ).double()


def batch(step: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(BATCH, 2, 6, 6, generator=generator, dtype=torch.float64)
    return x, torch.randint(3, (BATCH,), generator=generator)


# Name: options of CMIM, and of `train`. All positions: more are asked for than there are.
ALL = {"num_positions": 4096}
CASES: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "positions": ({"num_positions": 48}, {}),
    "positions of few": (ALL, {}),
    "images": ({"instances": "image"}, {}),
    "labelled positions": ({"num_positions": 48}, {"labels": True}),
    "labelled images": ({"instances": "image"}, {"labels": True}),
    "queue": ({"instances": "image", "queue_size": 20}, {"labels": True}),
    "queue of positions": ({"num_positions": 16, "queue_size": 40}, {}),
    "nce": ({"num_positions": 16, "objective": NCE(num_samples=100), "layer_decay": 0.5}, {"labels": True}),
    "masked": ({"num_positions": 48}, {"masked": True}),
    "masked on some ranks": ({"num_positions": 48}, {"masked": "second half"}),
    "accumulation": ({"num_positions": 48}, {"accumulate": 2}),
    "some taps": ({"num_positions": 48, "taps_per_step": 1, "layer_decay": 0.5}, {}),
    "some taps, labelled, with a queue": (
        {"instances": "image", "queue_size": 20, "taps_per_step": 2},
        {"labels": True},
    ),
    "uneven images": ({"instances": "image", "queue_size": 20}, {"labels": True, "uneven": True}),
    "uneven positions": (ALL, {"labels": True, "uneven": True}),
}


# FSDP2 runs on the CPU since torch 2.7 or so.
SHARDED = ("positions", "labelled images") if hasattr(torch.cpu.Stream, "record_event") else ()


def share(x: Tensor, rank: int, world: int, uneven: bool) -> Tensor:
    """The part of a rank of a batch; uneven: the last rank has a single sample."""
    if not uneven or world == 1:
        return x.chunk(world)[rank]
    parts = list(x[:-1].tensor_split(world - 1))
    return [*parts, x[-1:]][rank]


def attached(name: str, rank: int = 0) -> tuple[nn.Module, CMIM]:
    model = network()
    # Other seeds on other ranks: heads and positions have to be those of rank 0 nevertheless.
    torch.manual_seed(100 + rank)
    return model, CMIM(model, batch(0)[0], **CASES[name][0]).double()


def whole(t: Tensor) -> Tensor:
    return t.full_tensor() if hasattr(t, "full_tensor") else t


def train(
    name: str, model: nn.Module, cmim: CMIM, rank: int = 0, world: int = 1, shard: bool = False
) -> dict[str, Any]:
    """Some steps; the losses, gradients of the last step and weights after it."""
    how = CASES[name][1]
    uneven, accumulate = how.get("uneven", False), how.get("accumulate", 1)
    wrapped: Any = model
    if shard:
        from torch.distributed.fsdp import fully_shard

        for layer in model:
            if isinstance(layer, nn.Conv2d):
                fully_shard(layer)
        fully_shard(model)
    elif world > 1:
        wrapped = DistributedDataParallel(model)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.5, momentum=0.9)
    losses, bounds, scheduled = [], [], []
    for step in range(STEPS):
        optimizer.zero_grad()
        for part in range(accumulate):
            x, y = batch(10 * step + part)
            mask = x[:, 0, 0] > 0  # by the first pixels: some of each sample's
            if how.get("masked") == "second half":
                mask[: len(mask) // 2] = True
            x, y, mask = (share(t, rank, world, uneven) for t in (x, y, mask))
            masked = how.get("masked") and not mask.all()
            skip = world > 1 and not shard and part < accumulate - 1
            scheduled.append(cmim.scheduled)
            with wrapped.no_sync() if skip else contextlib.nullcontext():
                logits = wrapped(x)
                labels = y if how.get("labels") else None
                contrast = cmim(wrapped, labels=labels, mask=mask if masked else None)
                # The mean over ranks is not the mean over samples where they have different numbers of them.
                task = F.cross_entropy(logits, y) if not uneven else 0 * logits.sum()
                (task + contrast).backward()
            losses.append(contrast.item())
            bounds += [m["bound"].item() for m in cmim.metrics.values()]
        optimizer.step()

    return {
        "losses": losses,
        "scheduled": scheduled,
        "gradients": [whole(p.grad) for p in model.parameters()],
        "weights": [whole(p.detach()) for p in model.parameters()],
        "state": {name: value for name, value in cmim.state_dict().items() if value.is_floating_point()},
        "draws": cmim.draws.clone(),
        "bounds": bounds,
    }


class Whole(nn.Module):
    """Network and plug-in in one module, as Lightning wraps them."""

    def __init__(self, model: nn.Module, cmim: CMIM) -> None:
        super().__init__()
        self.model, self.cmim = model, cmim

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self.model(x), y) + self.cmim(self.model)


def train_wrapped_together(rank: int = 0, world: int = 1) -> list[Tensor]:
    """The weights of network and heads after some steps."""
    whole = Whole(*attached("some taps", rank))
    wrapped = DistributedDataParallel(whole) if world > 1 else whole
    optimizer = torch.optim.SGD(whole.parameters(), lr=0.5, momentum=0.9)
    for step in range(STEPS):
        optimizer.zero_grad()
        wrapped(*(share(t, rank, world, uneven=False) for t in batch(step))).backward()
        optimizer.step()
    whole.cmim.heads.step()
    return [*(p.detach() for p in whole.parameters()), whole.cmim.heads.weights.detach()]


def train_published(rank: int = 0, world: int = 1) -> list[float]:
    """Losses of the published variant: its bank is that of rank 0."""
    model, teacher = network(), network()
    targets = torch.arange(40) % 3
    torch.manual_seed(100 + rank)
    cmim = PublishedCMIM(
        model, batch(0)[0], teacher=teacher, targets=targets, num_negatives=6, train_heads=True
    ).double()
    ddp = DistributedDataParallel(model, find_unused_parameters=True) if world > 1 else model
    losses = []
    for step in range(STEPS):
        x, _ = (share(t, rank, world, uneven=False) for t in batch(step))
        indices = share(torch.arange(BATCH) + step, rank, world, uneven=False)
        logits = ddp(x)
        loss = cmim(ddp, indices=indices)
        (0 * logits.sum() + loss).backward()
        losses.append(loss.item())
    return losses


def two_backward_passes(rank: int, world: int) -> dict[str, str]:
    """What a backward pass of the network's loss, and then one of the contrast, say, in either order."""
    said = {}
    for name in ("synchronized", "the other way round", "within no_sync"):
        model, cmim = attached("positions", rank)
        ddp = DistributedDataParallel(model)
        x, y = (share(t, rank, world, uneven=False) for t in batch(0))
        with ddp.no_sync() if name == "within no_sync" else contextlib.nullcontext():
            logits = ddp(x)
            losses = [F.cross_entropy(logits, y), cmim(ddp)]
            if name == "the other way round":
                losses.reverse()
            losses[0].backward(retain_graph=True)
            try:
                losses[1].backward()
            except CMIMError as error:
                said[name] = str(error)
            else:
                said[name] = ""
    return said


def train_with_other_ways(rank: int, world: int, taps_per_step: int | None) -> dict[str, Any]:
    """The first rank reaches both taps in each step, the others the second one only in the first two steps, at last
    none does."""
    torch.manual_seed(0)
    model = Sometimes()
    cmim = CMIM(model, torch.rand(4, 2, 6, 6), taps_per_step=taps_per_step)
    ddp = DistributedDataParallel(model, find_unused_parameters=True)
    losses = []
    for step in range(8):
        positive = step < 2 or (rank == 0 and step < 6)
        x = torch.rand(4, 2, 6, 6) + 0.1
        only_second = cmim.scheduled == ("second",)
        logits = ddp(x if positive else -x)
        loss = cmim(ddp)
        (logits.sum() + loss).backward()
        losses.append((only_second and step >= 6, loss.item()))
    cmim.heads.step()
    return {"losses": losses, "heads": cmim.heads.weights.detach(), "taps": len(cmim.metrics)}


def load_on_the_first_rank_alone(rank: int) -> str:
    """What the loss says then, with a state that contrasts all taps."""
    model, cmim = attached("some taps", rank)
    state = cmim.state_dict() | {"schedule._extra_state": torch.tensor([0, 1])}
    if rank == 0:
        cmim.load_state_dict(state)
    model(batch(0)[0])
    try:
        cmim(model)
    except CMIMError as error:
        return str(error)
    return ""


def main(out: Path) -> None:
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    model, cmim = attached("images", rank)
    alone = attached("some taps", rank)
    for _ in range(rank):  # as many steps alone as no other rank, so that it is the turn of other taps
        alone[0](batch(0)[0])
        alone[1](alone[0]).backward()
    alone[0].zero_grad()
    dist.init_process_group("gloo")
    results: dict[str, Any] = {"attached before the group": train("images", model, cmim, rank, world)}
    results["trained before the group"] = train("some taps", *alone, rank, world)
    for name in CASES:
        results[name] = train(name, *attached(name, rank), rank, world)
    for name in SHARDED:
        results[f"sharded {name}"] = train(name, *attached(name, rank), rank, world, shard=True)
    results["wrapped together"] = train_wrapped_together(rank, world)
    results["published"] = train_published(rank, world)
    results["loaded on the first"] = load_on_the_first_rank_alone(rank)
    results["two backward passes"] = two_backward_passes(rank, world)
    results["other ways"] = train_with_other_ways(rank, world, None)
    results["other ways, one tap a step"] = train_with_other_ways(rank, world, 1)
    torch.save(results, out / f"{world}-{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
