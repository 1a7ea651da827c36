"""Train a timm model, binarized, with CMIM on a folder of images: ROOT/train/CLASS/*.jpg, ROOT/val/CLASS/*.jpg

    python examples/timm_train.py ROOT --model resnet18
    torchrun --nproc_per_node=2 examples/timm_train.py ROOT --model vit_tiny_patch16_224 --lr 5e-4

Model, data, optimizer, schedule and EMA come from timm's factories. The lines that CMIM adds are marked with "CMIM".
For ImageNet and CIFAR-100, other methods and runs of days, see tools/imagenet.py.
"""

from __future__ import annotations

import argparse
import sys
from pathlib import Path

import torch
import torch.distributed as dist
import torch.nn.functional as F
from timm import create_model
from timm.data import create_dataset, create_loader, resolve_data_config
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3, ParseKwargs, distribute_bn, init_distributed_device, random_seed
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel

from bireal import BinaryActivation, BinaryWeightConv2d
from cmim_plugin import CMIM  # CMIM


class BinaryConv2d(BinaryWeightConv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(BinaryActivation()(x))


class BinaryLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        weight = self.weight.detach().abs().mean(1, keepdim=True) * BinaryActivation()(self.weight)
        return F.linear(BinaryActivation()(x), weight, self.bias)


def binarize(model: nn.Module) -> None:
    """Make every convolution and linear layer binary, in place, but the first and the classifier."""
    ends: set[str] = set()
    for key in ("first_conv", "classifier"):
        names = model.pretrained_cfg.get(key) or ()
        ends |= {names} if isinstance(names, str) else set(names)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.ReLU):  # behind it every sign is +1
            model.set_submodule(name, nn.PReLU())
        elif isinstance(module, nn.BatchNorm2d) and not module.weight.any():  # behind it the residual branch is zero
            nn.init.ones_(module.weight)
        elif type(module) is nn.Conv2d and name not in ends:
            module.__class__ = BinaryConv2d
        elif type(module) is nn.Linear and name not in ends:
            module.__class__ = BinaryLinear


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("root", help="folder with train/CLASS/* and val/CLASS/*")
    parser.add_argument("--model", default="resnet18", help="any name that timm.create_model knows")
    parser.add_argument("--model-kwargs", nargs="*", default={}, action=ParseKwargs, help="such as img_size=64 depth=4")
    parser.add_argument("--img-size", type=int, help="side of the images, where not the model's usual")
    parser.add_argument("--batch-size", type=int, default=128, help="of one process")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--warmup-epochs", type=int, default=5)
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--amp", action="store_true", help="autocast to bfloat16")
    parser.add_argument("--cmim-weight", type=float, default=0.1, help="0: the baseline")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--output", type=Path, default=Path("checkpoint.pt"))
    parser.add_argument("--resume", type=Path, help="a file that --output wrote")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    device = init_distributed_device(args)  # sets args.rank, args.world_size and args.distributed
    random_seed(args.seed, args.rank)

    train_set = create_dataset("", args.root, split="train")
    class_map = train_set.reader.class_to_idx
    val_set = create_dataset("", args.root, split="val", class_map=class_map)
    if len(train_set) < args.batch_size * args.world_size:  # the last, incomplete batch of an epoch is left out
        sys.exit(f"{len(train_set)} training images for {args.world_size} x {args.batch_size}: lower --batch-size")

    model = create_model(args.model, num_classes=len(class_map), **args.model_kwargs)
    binarize(model)
    model.to(device)
    config = resolve_data_config({"img_size": args.img_size}, model=model)
    keys = ("input_size", "interpolation", "mean", "std", "crop_pct")
    common = {key: config[key] for key in keys} | {"batch_size": args.batch_size, "device": device}
    common |= {"num_workers": args.workers, "persistent_workers": args.workers > 0, "distributed": args.distributed}
    loader, val_loader = create_loader(train_set, is_training=True, **common), create_loader(val_set, **common)

    cmim = CMIM(model, torch.zeros(2, *config["input_size"], device=device), weight=args.cmim_weight)  # CMIM
    if args.rank == 0:
        print(cmim)
    optimizer = create_optimizer_v2(model, "adamw", args.lr, weight_decay=1e-2)
    timing = {"warmup_epochs": args.warmup_epochs, "updates_per_epoch": len(loader), "step_on_epochs": False}
    scheduler, epochs = create_scheduler_v2(optimizer, "cosine", args.epochs, **timing)
    trained = DistributedDataParallel(model) if args.distributed else model
    ema = ModelEmaV3(model, decay=0.9998, use_warmup=True)  # a copy, without hooks
    parts = {"model": model, "ema": ema, "optimizer": optimizer, "cmim": cmim}  # CMIM

    start = 0
    if args.resume:
        checkpoint = torch.load(args.resume, map_location="cpu", weights_only=True)
        for name, part in parts.items():
            part.load_state_dict(checkpoint[name])
        start = checkpoint["epoch"]
    step = start * len(loader)
    scheduler.step_update(step)

    for epoch in range(start, epochs):
        if args.distributed:
            loader.sampler.set_epoch(epoch)
        trained.train()
        for x, y in loader:
            with torch.autocast(device.type, torch.bfloat16, enabled=args.amp):
                loss = F.cross_entropy(trained(x), y)
                loss += cmim(trained)  # CMIM
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            ema.update(model, step)
            scheduler.step_update(step)

        if args.distributed:  # each process has seen other images
            distribute_bn(model, args.world_size, reduce=True)
            distribute_bn(ema, args.world_size, reduce=True)
        plain, averaged = (accuracy(network, val_loader) for network in (model, ema.module))
        bound = cmim.scalars()["cmim/bound"]
        if args.rank == 0:
            print(f"epoch {epoch}: loss {loss:.3f}, mean bound {bound:.2f} nats", end=", ")
            print(f"accuracy {plain:.2f} %, of the EMA {averaged:.2f} %", flush=True)
            torch.save({name: part.state_dict() for name, part in parts.items()} | {"epoch": epoch + 1}, args.output)
    if args.distributed:
        dist.destroy_process_group()


@torch.no_grad()
def accuracy(model: nn.Module, loader: object) -> float:
    """In %, over the images of all processes."""
    model.eval()
    counts = sum(torch.stack([(model(x).argmax(1) == y).sum(), torch.ones_like(y).sum()]) for x, y in loader)
    if dist.is_initialized():
        dist.all_reduce(counts)
    return 100 * float(counts[0] / counts[1])


if __name__ == "__main__":
    main()
