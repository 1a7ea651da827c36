"""What a trained binary network looks like inside: dead channels, entropy and correlation of its codes, gradients."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from data import Data
from nets import BinaryConv2d, BinarySign

IMAGES = 500  # that the codes are measured on


def code_statistics(code: Tensor) -> dict[str, float]:
    """Of a binary activation (n, C, H, W), over images and positions.

    dead: share of channels that are constant
    entropy: of a channel's bit, mean over channels, in bits
    correlation: mean absolute correlation of two channels, over the channels that are not constant
    """
    rows = code.transpose(0, 1).flatten(1).float()
    mean, var = rows.mean(1), rows.var(1, correction=0)
    p = (mean + 1) / 2
    bits = torch.special.entr(p) + torch.special.entr(1 - p)
    alive = rows[var > 0] - mean[var > 0, None]
    unit = F.normalize(alive, dim=1)
    c = len(alive)
    off_diagonal = ((unit @ unit.T).abs().sum() - c) / (c * (c - 1)) if c > 1 else torch.tensor(float("nan"))
    return {
        "dead": (var == 0).float().mean().item(),
        "entropy": (bits.mean() / torch.log(torch.tensor(2.0))).item(),
        "correlation": off_diagonal.item(),
    }


@torch.no_grad()
def codes(model: nn.Module, data: Data) -> dict[str, dict[str, float]]:
    """`code_statistics` of each binary activation on held-out images, in eval mode."""
    found: dict[str, dict[str, float]] = {}
    handles = [
        module.register_forward_hook(
            lambda _, args, output, name=name: found.update({name: code_statistics(output)}),
        )
        for name, module in model.named_modules()
        if isinstance(module, BinarySign)
    ]
    try:
        model.eval()
        model(data.normalise(data.x_test[:IMAGES]))
    finally:
        for handle in handles:
            handle.remove()
    return found


def gradient_norms(model: nn.Module, data: Data) -> dict[str, float]:
    """Of the task's loss on 128 training images, for the weight of each binary convolution, relative to its norm.

    In training mode; the running statistics of batch norm are put back.
    """
    kept = {name: buffer.clone() for name, buffer in model.named_buffers()}
    weights = {name: m.weight for name, m in model.named_modules() if isinstance(m, BinaryConv2d)}
    if not weights:
        return {}
    model.train()
    loss = F.cross_entropy(model(data.normalise(data.x_train[:128])), data.y_train[:128])
    gradients = torch.autograd.grad(loss, list(weights.values()))
    model.eval()
    with torch.no_grad():
        for name, buffer in model.named_buffers():
            buffer.copy_(kept[name])
        norms = [g.norm() / w.norm() for g, w in zip(gradients, weights.values(), strict=True)]
    return dict(zip(weights, torch.stack(norms).tolist(), strict=True))


def look(model: nn.Module, data: Data) -> dict[str, dict[str, Any]]:
    return {"codes": codes(model, data), "gradient_norms": gradient_norms(model, data)}
