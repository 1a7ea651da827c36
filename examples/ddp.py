"""CMIM under plain DistributedDataParallel: the same three lines, with the wrapped model passed in.

    torchrun --nproc_per_node=2 examples/ddp.py

Negatives come from all processes, and the heads are kept the same in all of them, by cmim itself.
"""

from __future__ import annotations

import os

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, DistributedSampler

from bireal import BIREAL
from bodies import BODIES
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
    model = BODIES["resnet8"](BIREAL, 10, in_channels=1, width=width).to(device)

    optimizer = torch.optim.SGD(model.parameters(), lr=0.05, momentum=0.9)
    cmim = CMIM(model, next(iter(loader))[0].to(device))
    optimizer.add_param_group({"params": cmim.parameters()})
    ddp_model = DistributedDataParallel(model)  # after CMIM was attached to the model itself

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
    train()
    dist.destroy_process_group()
