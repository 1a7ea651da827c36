"""The losses beside the task's: CMIM through the plug-in, and controls that have no pair to learn from."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import cmim_plugin
from nets import BinarySign

# What the weight is multiplied by, from the share of the epochs that are done.
WEIGHT_SCHEDULES: dict[str, Callable[[float], float]] = {
    "constant": lambda progress: 1.0,
    "rise": lambda progress: progress,
    "fall": lambda progress: 1 - progress,
}


class Contrast:
    """CMIM. Its heads train themselves, or (`user_heads`) are trained by the network's optimizer."""

    def __init__(
        self,
        model: nn.Module,
        example: Tensor,
        *,
        labels: bool = False,
        user_heads: bool = False,
        weight_schedule: str = "constant",
        published_targets: Tensor | None = None,
        **options: Any,
    ) -> None:
        self.labels, self.user_heads = labels, user_heads
        self.indexed = published_targets is not None
        if self.indexed:
            self.cmim = cmim_plugin.PublishedCMIM(model, example, targets=published_targets, **options)
        else:
            self.cmim = cmim_plugin.CMIM(model, example, **options, **({"heads_lr": 0} if user_heads else {}))
        self.weight, self.factor = self.cmim.weight, WEIGHT_SCHEDULES[weight_schedule]

    def start_epoch(self, progress: float) -> None:
        self.cmim.weight = self.weight * self.factor(progress)

    def loss(self, model: nn.Module, y: Tensor, index: Tensor) -> Tensor:
        if self.indexed:
            return self.cmim(model, indices=index)
        return self.cmim(model, labels=y) if self.labels else self.cmim(model)

    def bounds(self) -> dict[str, Tensor]:
        # An objective of one's own has no bound.
        return {tap: metrics["bound"] for tap, metrics in self.cmim.metrics.items() if "bound" in metrics}

    def parameters(self) -> Iterable[Tensor]:
        if not self.user_heads:
            return []
        weights = self.cmim.heads.weights
        return [weights] if isinstance(weights, Tensor) else list(weights)

    def generators(self) -> Iterable[torch.Generator]:
        return []

    def remove(self) -> None:
        self.cmim.remove()


def shuffled(z_b: Tensor, z_f: Tensor, **options: Any) -> Tensor:
    """Control: the default's loss on pairs of different images.

    Half the rows away, for neighbouring rows can share an image. No head can fit such pairs, so the loss soon stays at
    its maximum, and so does its gradient near zero. `entropy` and `Balance` are the controls with a full gradient.
    """
    return cmim_plugin.InfoNCE()(z_b, z_f.roll(z_f.shape[-2] // 2, -2), **options)


def entropy(z_b: Tensor, z_f: Tensor, **options: Any) -> Tensor:
    """Control: the default's loss between the code and itself.

    Same rows, heads, temperature and negatives; only the latent is gone. It maximises a lower bound of the code's own
    entropy, with a full gradient on a_B and none on the latent's side.
    """
    return cmim_plugin.InfoNCE()(z_b, z_b, **options)


OBJECTIVES: dict[str, Callable[..., Tensor]] = {"shuffled": shuffled, "entropy": entropy}


class Balance:
    """Control: bit balance and decorrelation of the sampled codes themselves, without heads, critic or latent.

    For each binary activation, over `num_positions` rows of the batch: the mean square of a channel's mean plus the
    mean square of the covariance of two channels. It reads the codes by hooks of its own: an objective of the plug-in
    sees embeddings, whose heads could balance them without any change to the codes.
    """

    def __init__(self, model: nn.Module, weight: float, num_positions: int = 256, seed: int = 0) -> None:
        self.weight, self.num_positions = weight, num_positions
        self.found: list[Tensor] = []
        signs = [module for module in model.modules() if isinstance(module, BinarySign)]
        self.handles = [module.register_forward_hook(self._keep) for module in signs]
        where = next(model.parameters()).device
        self.generator = torch.Generator(where).manual_seed(seed)

    def start_epoch(self, progress: float) -> None:
        pass

    def _keep(self, module: nn.Module, args: tuple[Any, ...], output: Tensor) -> None:
        if module.training:
            self.found.append(output)

    def loss(self, model: nn.Module, y: Tensor, index: Tensor) -> Tensor:
        total = torch.zeros((), device=y.device)
        for code in self.found:
            rows = code.permute(0, 2, 3, 1).flatten(0, 2)
            draws = torch.randint(len(rows), (self.num_positions,), generator=self.generator, device=rows.device)
            total = total + code_redundancy(rows[draws].float())
        mean = total / len(self.found)
        self.found.clear()
        return self.weight * mean

    def bounds(self) -> dict[str, Tensor]:
        return {}

    def parameters(self) -> Iterable[Tensor]:
        return []

    def generators(self) -> Iterable[torch.Generator]:
        return [self.generator]

    def remove(self) -> None:
        for handle in self.handles:
            handle.remove()


class Together:
    """Several of these losses, added up."""

    def __init__(self, parts: list[Contrast | Balance]) -> None:
        self.parts = parts

    def start_epoch(self, progress: float) -> None:
        for part in self.parts:
            part.start_epoch(progress)

    def loss(self, model: nn.Module, y: Tensor, index: Tensor) -> Tensor:
        return torch.stack([part.loss(model, y, index) for part in self.parts]).sum()

    def bounds(self) -> dict[str, Tensor]:
        return {tap: bound for part in self.parts for tap, bound in part.bounds().items()}

    def parameters(self) -> Iterable[Tensor]:
        return [tensor for part in self.parts for tensor in part.parameters()]

    def generators(self) -> Iterable[torch.Generator]:
        return [generator for part in self.parts for generator in part.generators()]

    def remove(self) -> None:
        for part in self.parts:
            part.remove()


def code_redundancy(rows: Tensor) -> Tensor:
    """Mean square of the channels' means plus mean square of the covariances of two channels; rows (n, C) of +-1."""
    mean = rows.mean(0)
    covariance = (rows - mean).T @ (rows - mean) / len(rows)
    off_diagonal = covariance - torch.diag(covariance.diagonal())
    c = rows.shape[1]
    return mean.square().mean() + off_diagonal.square().sum() / max(1, c * (c - 1))


def distillation(teacher: nn.Module, weight: float, temperature: float = 4.0):
    """Hinton et al., arXiv 1503.02531: cross-entropy plus T^2 KL(teacher || student) of the softened outputs."""

    def loss(x: Tensor, y: Tensor, logits: Tensor) -> Tensor:
        with torch.no_grad():
            target = F.softmax(teacher(x).float() / temperature, 1)
        divergence = F.kl_div(F.log_softmax(logits.float() / temperature, 1), target, reduction="batchmean")
        return F.cross_entropy(logits, y) + weight * temperature**2 * divergence

    return loss


def smoothed(amount: float):
    """Cross-entropy with label smoothing (Szegedy et al., arXiv 1512.00567)."""

    def loss(x: Tensor, y: Tensor, logits: Tensor) -> Tensor:
        return F.cross_entropy(logits, y, label_smoothing=amount)

    return loss
