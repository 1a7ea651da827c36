"""The method as one would first write it, to compare the plug-in's cost and its loss with. Shares no code with it."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from nets import BinarySign


class Naive(nn.Module):
    """Hooks keep whole activations; then a Python loop over the layers, each with linear heads and InfoNCE of its own.

    Positions come from a permutation of all of the batch's. The loss is that of CMIM with the same arguments and heads.
    """

    def __init__(
        self,
        model: nn.Module,
        x: Tensor,
        instances: str,
        num_positions: int = 64,
        embed_dim: int = 128,
        temperature: float = 0.1,
        weight: float = 0.1,
    ):
        super().__init__()
        self.instances, self.num_positions = instances, num_positions
        self.temperature, self.weight = temperature, weight
        self.kept: list[tuple[Tensor, Tensor]] = []
        for module in model.modules():
            if isinstance(module, BinarySign):
                module.register_forward_hook(self.keep)
        with torch.no_grad():
            model(x)
        heads = []
        for latent, _ in self.kept:
            channels = latent.shape[1] if latent.ndim == 4 else latent.shape[-1]
            heads.append(
                nn.ModuleDict({side: nn.Linear(channels, embed_dim, bias=False) for side in ("binary", "latent")})
            )
        self.heads = nn.ModuleList(heads).to(x.device)
        self.kept.clear()

    def keep(self, module: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
        self.kept.append((inputs[0], output))

    def forward(self, model: nn.Module) -> Tensor:
        losses = []
        for heads, (latent, binary) in zip(self.heads, self.kept, strict=True):
            # (samples, positions, channels): feature maps have their channels second, tokens last.
            sides = [a.flatten(2).transpose(1, 2) if a.ndim == 4 else a for a in (binary, latent)]
            if self.instances == "image":
                rows = [a.mean(1) for a in sides]
            else:
                total = sides[0].shape[0] * sides[0].shape[1]
                chosen = torch.randperm(total, device=latent.device)[: self.num_positions]
                rows = [a.reshape(total, -1)[chosen] for a in sides]
            z_b, z_f = unit(heads["binary"](rows[0])), unit(heads["latent"](rows[1]))
            losses.append(naive_info_nce(z_b, z_f, self.temperature))
        self.kept.clear()
        return self.weight * sum(losses) / len(losses)


def unit(z: Tensor) -> Tensor:
    """Rows of unit length; shorter where they have (almost) no direction."""
    return z / (z.square().sum(1, keepdim=True) + 1e-12).sqrt()


def naive_info_nce(
    z_b: Tensor,
    z_f: Tensor,
    temperature: float = 0.1,
    queue_b: Tensor | None = None,
    queue_f: Tensor | None = None,
) -> Tensor:
    """Row i of either side is to be told from all rows of the other, and of its queue."""
    target = torch.arange(len(z_b), device=z_b.device)
    losses = []
    for anchors, candidates, queue in ((z_b, z_f, queue_f), (z_f, z_b, queue_b)):
        if queue is not None:
            candidates = torch.cat([candidates, queue])
        losses.append(F.cross_entropy(anchors @ candidates.T / temperature, target))
    return (losses[0] + losses[1]) / 2
