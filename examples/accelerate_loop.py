"""CMIM in a loop with Hugging Face Accelerate: gradient accumulation, mixed precision, checkpoints.

accelerate launch examples/accelerate_loop.py
accelerate launch examples/accelerate_loop.py --mixed-precision bf16 --accumulation 2 --output checkpoint
accelerate launch --cpu --num_processes 2 examples/accelerate_loop.py
"""

from __future__ import annotations

import argparse

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import nn
from torch.utils.data import DataLoader

from bireal import ResNet
from cmim_plugin import CMIM
from digits import digits


def train(
    *,
    epochs: int = 5,
    batch_size: int = 32,
    accumulation: int = 1,
    mixed_precision: str = "no",
    train_size: int = 1440,
    width: int = 16,
    output: str | None = None,
    resume: str | None = None,
) -> tuple[nn.Module, CMIM]:
    """Train on the digits; save the whole state to the folder `output`, or first restore it from `resume`."""
    accelerator = Accelerator(mixed_precision=mixed_precision, gradient_accumulation_steps=accumulation)
    train_set, test_set = digits(train_size)
    loader = DataLoader(train_set, batch_size, shuffle=True)
    test_loader = DataLoader(test_set, batch_size)
    model = ResNet(units=2, in_channels=1, width=width).to(accelerator.device)
    optimizer = torch.optim.Adam(model.parameters(), lr=1e-3)
    # On the model itself, before `prepare` wraps it. CMIM is not prepared: it follows the processes by itself.
    cmim = CMIM(model, torch.zeros(2, 1, 8, 8, device=accelerator.device))
    model, optimizer, loader, test_loader = accelerator.prepare(model, optimizer, loader, test_loader)
    accelerator.register_for_checkpointing(cmim)  # save_state() and load_state() now include the heads
    if resume:
        accelerator.load_state(resume)

    for epoch in range(epochs):
        model.train()
        for x, y in loader:
            with accelerator.accumulate(model):
                loss = F.cross_entropy(model(x), y)
                loss += cmim(model)
                accelerator.backward(loss)
                optimizer.step()
                optimizer.zero_grad()

        model.eval()
        right = []
        for x, y in test_loader:
            with torch.no_grad():
                right.append(accelerator.gather_for_metrics(model(x).argmax(1) == y))
        accuracy = torch.cat(right).float().mean()
        bound = cmim.scalars()["cmim/bound"]
        accelerator.print(f"epoch {epoch}: test accuracy {100 * accuracy:.1f} %, mean bound {bound:.2f} nats")
    if output:
        accelerator.save_state(output)
    return model, cmim


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=32, help="of one process and one backward pass")
    parser.add_argument("--accumulation", type=int, default=1, help="backward passes a step")
    parser.add_argument("--mixed-precision", choices=["no", "bf16", "fp16"], default="no")
    parser.add_argument("--output", help="folder to save the state to")
    parser.add_argument("--resume", help="folder to restore it from")
    train(**vars(parser.parse_args()))
