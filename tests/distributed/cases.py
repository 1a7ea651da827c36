"""What is trained on several ranks and, as a reference, in one process; run by torchrun, it leaves the former in files.

torchrun --nproc_per_node=2 tests/distributed/cases.py OUT
"""

from __future__ import annotations

import contextlib
import os
import sys
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from cmim_plugin import CMIM, nce
from hazards.nets import Binary, BinaryConv

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
    "nce": ({"num_positions": 16, "objective": partial(nce, num_samples=100), "layer_decay": 0.5}, {"labels": True}),
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
    optimizer.add_param_group({"params": cmim.parameters()})
    losses = []
    for step in range(STEPS):
        optimizer.zero_grad()
        for part in range(accumulate):
            x, y = (share(t, rank, world, uneven) for t in batch(10 * step + part))
            skip = world > 1 and not shard and part < accumulate - 1
            with wrapped.no_sync() if skip else contextlib.nullcontext():
                logits = wrapped(x)
                contrast = cmim(wrapped, labels=y if how.get("labels") else None)
                # The mean over ranks is not the mean over samples where they have different numbers of them.
                task = F.cross_entropy(logits, y) if not uneven else 0 * logits.sum()
                (task + contrast).backward()
            losses.append(contrast.item())
        optimizer.step()

    return {
        "losses": losses,
        "gradients": [whole(p.grad) for p in [*model.parameters(), *cmim.parameters()]],
        "weights": [whole(p.detach()) for p in [*model.parameters(), *cmim.parameters()]],
        "buffers": [b.clone() for b in cmim.buffers()],
        "bounds": [m["bound"].item() for m in cmim.metrics.values()],
    }


class Whole(nn.Module):
    """Network and heads in one module, as Lightning wraps them."""

    def __init__(self, model: nn.Module, cmim: CMIM) -> None:
        super().__init__()
        self.model, self.cmim = model, cmim

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        return F.cross_entropy(self.model(x), y) + self.cmim(self.model)


def train_wrapped_heads(rank: int = 0, world: int = 1) -> list[Tensor]:
    """The weights after some steps."""
    whole = Whole(*attached("some taps", rank))
    wrapped = DistributedDataParallel(whole) if world > 1 else whole
    optimizer = torch.optim.SGD(whole.parameters(), lr=0.5, momentum=0.9)
    for step in range(STEPS):
        optimizer.zero_grad()
        wrapped(*(share(t, rank, world, uneven=False) for t in batch(step))).backward()
        optimizer.step()
    return [p.detach() for p in whole.parameters()]


def train_with_other_ways(rank: int, world: int, taps_per_step: int | None, steps: int) -> dict[str, Any]:
    """A tap that only some ranks reach, in the second step; with one tap a step, in some later steps, at last none."""
    torch.manual_seed(0)
    model = Sometimes()
    cmim = CMIM(model, torch.rand(4, 2, 6, 6), taps_per_step=taps_per_step)
    ddp = DistributedDataParallel(model, find_unused_parameters=True)
    losses = []
    for step, positive in enumerate([True, *[rank == 0] * (steps - 2), rank == 0 and taps_per_step is None]):
        if step == steps - 1 and taps_per_step is not None:
            cmim._hooks.chosen = frozenset([1])
        x = torch.rand(4, 2, 6, 6) + 0.1
        logits = ddp(x if positive else -x)
        loss = cmim(ddp)
        (logits.sum() + loss).backward()
        losses.append(loss.item())
    gradients = [whole(p.grad) for p in cmim.parameters()]
    return {"losses": losses, "gradients": gradients, "taps": len(cmim.metrics)}


def main(out: Path) -> None:
    rank, world = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    torch.set_num_threads(1)
    model, cmim = attached("images", rank)
    chosen_alone = attached("some taps", rank)
    train("some taps", *chosen_alone)
    chosen_alone[1]._hooks.chosen = frozenset([rank % 3])
    dist.init_process_group("gloo")
    results = {"attached before the group": train("images", model, cmim, rank, world)}
    results["taps chosen before the group"] = train("some taps", *chosen_alone, rank, world)
    for name in CASES:
        results[name] = train(name, *attached(name, rank), rank, world)
    for name in SHARDED:
        results[f"sharded {name}"] = train(name, *attached(name, rank), rank, world, shard=True)
    results["wrapped heads"] = train_wrapped_heads(rank, world)
    results["other ways"] = train_with_other_ways(rank, world, None, steps=2)
    results["other ways, one tap a step"] = train_with_other_ways(rank, world, 1, steps=8)
    torch.save(results, out / f"{world}-{rank}.pt")
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]))
