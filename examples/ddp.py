"""CMIM under plain DistributedDataParallel: the same two lines; pass the wrapped model in.

    torchrun --nproc_per_node=2 examples/ddp.py

Negatives come from all processes, and CMIM keeps its heads the same in all of them: do not wrap it.
"""

from __future__ import annotations

import argparse
import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

from bireal import ResNet
from cmim_plugin import CMIM
from digits import digits


def train(
    *, epochs: int = 5, batch_size: int = 32, train_size: int = 1440, width: int = 16
) -> tuple[DistributedDataParallel, CMIM]:
    """Train on the digits; `batch_size` is that of one process. Needs what torchrun puts into the environment."""
    dist.init_process_group()
    device = torch.device("cpu")
    if torch.cuda.is_available():
        device = torch.device("cuda", int(os.environ["LOCAL_RANK"]))
        torch.cuda.set_device(device)
    train_set, test_set = digits(train_size)
    sampler = DistributedSampler(train_set)
    loader = DataLoader(train_set, batch_size, sampler=sampler)

    model = ResNet(units=2, in_channels=1, width=width).to(device)
    cmim = CMIM(model, torch.zeros(2, 1, 8, 8, device=device))  # on the model itself, on its device
    ddp_model = DistributedDataParallel(model)
    optimizer = torch.optim.Adam(ddp_model.parameters(), 1e-3)

    for epoch in range(epochs):
        sampler.set_epoch(epoch)
        ddp_model.train()
        for x, y in loader:
            x, y = x.to(device), y.to(device)
            loss = F.cross_entropy(ddp_model(x), y)
            loss += cmim(ddp_model)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()

        if dist.get_rank() == 0:
            model.eval()
            with torch.no_grad():
                images, labels = (t.to(device) for t in test_set.tensors)
                accuracy = (model(images).argmax(1) == labels).float().mean()
            print(f"epoch {epoch}: loss {loss.detach():.3f}, test accuracy {100 * accuracy:.1f} %", flush=True)
    return ddp_model, cmim


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=5)
    parser.add_argument("--batch-size", type=int, default=32, help="of one process")
    args = parser.parse_args()
    if "LOCAL_RANK" not in os.environ:
        parser.error("start it by torchrun: torchrun --nproc_per_node=2 examples/ddp.py")
    train(**vars(args))
    dist.destroy_process_group()
