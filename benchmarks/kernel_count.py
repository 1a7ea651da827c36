"""Which kernels does CMIM add to a training step?

    python benchmarks/kernel_count.py
    python benchmarks/kernel_count.py --method irnet --body resnet18 --taps-per-step 16

Counts the operations that torch dispatches in a step of the network alone and in a step with CMIM, stage by stage, and
lists those that CMIM adds. Views and allocations are left out: on a GPU each of the others launches a kernel, most of
them exactly one. The count is the same on every machine, whatever else runs on it. ``rms_norm``, which a CPU computes
in many operations, counts as on a GPU: one kernel forward and one backward.
"""

from __future__ import annotations

import argparse
from collections import Counter
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.overrides import TorchFunctionMode
from torch.utils._python_dispatch import TorchDispatchMode

from cmim_plugin import CMIM
from nets import BODIES, METHODS

STAGES = ("forward", "loss", "backward", "optimizer")
ALLOCATIONS = {"empty", "empty_like", "empty_strided", "new_empty", "new_empty_strided"}
# Views by what they do, not by their schema.
VIEWS = {"_unsafe_view", "_reshape_alias"}
# Operators of the plug-in's own, into which a dispatch mode does not see: the kernels that each launches.
OWN = {"adam_step": 3}


@torch.library.custom_op("benchmarks::rms_norm", mutates_args=())
def rms_norm(x: Tensor, weight: Tensor, eps: float) -> Tensor:
    return F.rms_norm(x, weight.shape, weight, eps)


@torch.library.custom_op("benchmarks::rms_norm_backward", mutates_args=())
def rms_norm_backward(grad: Tensor, x: Tensor, weight: Tensor, eps: float) -> Tensor:
    inverse = (x.square().mean(-1, keepdim=True) + eps).rsqrt()
    scaled = grad * weight
    return inverse * (scaled - inverse**2 * x * (scaled * x).mean(-1, keepdim=True))


def _backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None, None]:
    return rms_norm_backward(grad, *ctx.saved_tensors, ctx.eps), None, None


def _setup_context(ctx: Any, inputs: tuple[Tensor, Tensor, float], output: Tensor) -> None:
    ctx.save_for_backward(*inputs[:2])
    ctx.eps = inputs[2]


rms_norm.register_autograd(_backward, setup_context=_setup_context)


class OneRMSNorm(TorchFunctionMode):
    """``rms_norm`` becomes one operation in each direction."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func is F.rms_norm:
            return rms_norm(args[0], kwargs["weight"], kwargs["eps"])
        return func(*args, **(kwargs or {}))


class Kernels(TorchDispatchMode):
    """Counts operations by stage and name; ``stage`` is set from outside."""

    def __init__(self) -> None:
        super().__init__()
        self.stage = ""
        self.counts: Counter[tuple[str, str]] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        if not is_view(func) and name not in ALLOCATIONS | VIEWS:
            self.counts[self.stage, name] += OWN.get(name, 1)
        return func(*args, **(kwargs or {}))


def is_view(func: Any) -> bool:
    """Whether an operation returns its input's memory without writing to it."""
    aliases = [returned.alias_info for returned in func._schema.returns]
    return any(alias is not None and not alias.is_write for alias in aliases)


def step_kernels(model: nn.Module, cmim: nn.Module | None, x: Tensor, warmup: int = 2) -> Counter[tuple[str, str]]:
    """``{(stage, operation): count}`` of one training step, after some."""
    optimizer = torch.optim.SGD(model.parameters(), lr=1e-3, momentum=0.9)
    y = torch.zeros(len(x), dtype=torch.int64, device=x.device)

    def step(kernels: Kernels) -> None:
        kernels.stage = "forward"
        logits = model(x)
        kernels.stage = "loss"
        loss = F.cross_entropy(logits, y)
        if cmim is not None:
            loss = loss + cmim(model)
        kernels.stage = "backward"
        optimizer.zero_grad()
        loss.backward()
        kernels.stage = "optimizer"
        optimizer.step()

    for _ in range(warmup):
        step(Kernels())
    with OneRMSNorm(), Kernels() as kernels:
        step(kernels)
    return kernels.counts


def added_kernels(method: str, body: str, batch: int = 4, **settings: Any) -> tuple[int, Counter[tuple[str, str]]]:
    """Kernels of a step of the network alone, and those that CMIM adds, by stage and operation."""
    torch.manual_seed(0)
    model = BODIES[body](METHODS[method].recipe, 10)
    x = torch.randn(batch, 3, 32, 32)
    bare = step_kernels(model, None, x)
    cmim = CMIM(model, x, **settings)
    found = step_kernels(model, cmim, x)
    cmim.remove()
    found.subtract(bare)
    return bare.total(), Counter({key: count for key, count in found.items() if count})


def main(arguments: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--method", choices=METHODS, default="bireal")
    parser.add_argument("--body", choices=BODIES, default="resnet20")
    parser.add_argument("--taps-per-step", type=int, default=6, help="0 for all taps")
    parser.add_argument("--instances", choices=("position", "image"), default="position")
    args = parser.parse_args(arguments)
    settings = {"taps_per_step": args.taps_per_step or None, "instances": args.instances}
    bare, added = added_kernels(args.method, args.body, **settings)
    print(f"{args.method} {args.body}: {bare} kernels a step, {added.total()} more with CMIM")
    for stage in STAGES:
        of_stage = Counter({name: count for (s, name), count in added.items() if s == stage})
        if of_stage:
            listed = ", ".join(f"{name} {count}" for name, count in of_stage.most_common())
            print(f"  {stage} {of_stage.total():+d}: {listed}")


if __name__ == "__main__":
    main()
