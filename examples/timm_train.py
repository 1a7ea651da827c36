"""Train a timm model, binarized, with CMIM on a folder of images: ROOT/train/CLASS/*.jpg, ROOT/val/CLASS/*.jpg

    python examples/timm_train.py ROOT --model resnet18
    torchrun --nproc_per_node=2 examples/timm_train.py ROOT --model vit_tiny_patch16_224 --opt adamw --lr 5e-4

Model, data, optimizer, schedule and EMA come from timm's factories. The inner layers are binarized as in Bi-Real Net
(binarize.py). The CMIM lines are in `main`. For other methods, and runs of days, see imagenet.py.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable
from contextlib import AbstractContextManager, nullcontext
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
from tqdm import tqdm

from binarize import binarize
from cmim_plugin import CMIM


def options(description: str) -> argparse.ArgumentParser:
    """Those that imagenet.py has too."""
    parser = argparse.ArgumentParser(description=description, allow_abbrev=False)
    parser.add_argument("root", help="folder with train/CLASS/* and val/CLASS/*")
    parser.add_argument("--model", default="resnet18", help="any name that timm.create_model knows")
    parser.add_argument("--model-kwargs", nargs="*", default={}, action=ParseKwargs, help="such as img_size=64 depth=4")
    switch = argparse.BooleanOptionalAction
    parser.add_argument("--pretrained", action=switch, default=False, help="start from the full-precision weights")
    parser.add_argument("--img-size", type=int, help="side of the images, where not the model's usual")
    parser.add_argument("--batch-size", type=int, default=128, help="of one process")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--epochs", type=int, default=100)
    parser.add_argument("--warmup-epochs", type=int, default=5)
    parser.add_argument("--opt", default="adamw")
    parser.add_argument("--sched", default="cosine")
    parser.add_argument("--lr", type=float, default=1e-3)
    parser.add_argument("--weight-decay", type=float, default=1e-2)
    parser.add_argument("--ema-decay", type=float, default=0.9998)
    parser.add_argument("--cmim-weight", type=float, default=0.1)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    return parser


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = options(__doc__.splitlines()[0])
    parser.add_argument("--amp", action="store_true", help="autocast to bfloat16")
    parser.add_argument("--output", type=Path, default=Path("checkpoint.pt"))
    parser.add_argument("--resume", type=Path, help="a file that --output wrote")
    return parser.parse_args(argv)


def main(argv: list[str] | None = None) -> None:
    args = parse(argv)
    device = init_distributed_device(args)  # sets args.rank, args.world_size and args.distributed
    random_seed(args.seed, args.rank)
    autocast = torch.autocast(device.type, torch.bfloat16) if args.amp else nullcontext()

    train_set = create_dataset("", args.root, split="train")
    class_map = train_set.reader.class_to_idx
    val_set = create_dataset("", args.root, split="val", class_map=class_map)
    if len(train_set) < args.batch_size * args.world_size:  # the last, incomplete batch of an epoch is left out
        sys.exit(f"{len(train_set)} training images for {args.world_size} x {args.batch_size}: lower --batch-size")

    model = create_model(args.model, pretrained=args.pretrained, num_classes=len(class_map), **args.model_kwargs)
    binarize(model)
    model.to(device)

    size = {"input_size": (3, args.img_size, args.img_size)} if args.img_size else {}
    config = resolve_data_config(size, model=model)
    options = {key: config[key] for key in ("input_size", "interpolation", "mean", "std", "crop_pct")}
    options |= {"batch_size": args.batch_size, "num_workers": args.workers, "persistent_workers": args.workers > 0}
    options |= {"distributed": args.distributed, "device": device}
    loader = create_loader(train_set, is_training=True, **options)
    val_loader = create_loader(val_set, **options)

    optimizer = create_optimizer_v2(model, opt=args.opt, lr=args.lr, weight_decay=args.weight_decay)
    cmim = CMIM(model, torch.randn(8, *config["input_size"], device=device), weight=args.cmim_weight)
    optimizer.add_param_group({"params": cmim.parameters()})
    if args.rank == 0:
        print(cmim)

    # After CMIM: the schedule counts the optimizer's groups. A copy of the model has no hooks, DDP passes through them.
    scheduler, epochs = create_scheduler_v2(
        optimizer,
        sched=args.sched,
        num_epochs=args.epochs,
        warmup_epochs=args.warmup_epochs,
        updates_per_epoch=len(loader),
        step_on_epochs=False,
    )
    trained = DistributedDataParallel(model) if args.distributed else model
    ema = ModelEmaV3(model, decay=args.ema_decay, use_warmup=True)

    start = 0
    if args.resume:
        checkpoint = torch.load(args.resume, map_location="cpu", weights_only=True)
        for name, part in ("model", model), ("ema", ema), ("cmim", cmim), ("optimizer", optimizer):
            part.load_state_dict(checkpoint[name])
        start = checkpoint["epoch"]
    step = start * len(loader)
    scheduler.step_update(step)

    for epoch in range(start, epochs):
        if args.distributed:
            loader.sampler.set_epoch(epoch)
        trained.train()
        for x, y in tqdm(loader, desc=f"epoch {epoch}", disable=None if args.rank == 0 else True):
            with autocast:
                loss = F.cross_entropy(trained(x), y)
                loss += cmim(trained)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            step += 1
            ema.update(model, step)
            scheduler.step_update(step)

        if args.distributed:  # each process has seen other images
            distribute_bn(model, args.world_size, reduce=True)
            distribute_bn(ema, args.world_size, reduce=True)
        plain, averaged = (accuracy(network, val_loader, autocast) for network in (model, ema.module))
        if args.rank == 0:
            bound = sum(float(metrics["bound"]) for metrics in cmim.metrics.values()) / len(cmim.metrics)
            print(
                f"epoch {epoch}: loss {loss.detach():.3f}, mean bound {bound:.2f} nats, "
                f"accuracy {plain:.2f} %, of the EMA {averaged:.2f} %",
                flush=True,
            )
            parts = {"model": model, "ema": ema, "cmim": cmim, "optimizer": optimizer}
            torch.save({name: part.state_dict() for name, part in parts.items()} | {"epoch": epoch + 1}, args.output)
    if args.distributed:
        dist.destroy_process_group()


@torch.no_grad()
def accuracy(
    model: nn.Module, loader: Iterable[tuple[Tensor, Tensor]], autocast: AbstractContextManager[object]
) -> float:
    """In %, over the images of all processes."""
    model.eval()
    counts: Tensor | float = 0.0
    for x, y in loader:
        with autocast:
            right = model(x).argmax(1) == y
        counts += torch.stack([right.sum(), torch.ones_like(y).sum()])
    if dist.is_initialized():
        dist.all_reduce(counts)
    return 100 * float(counts[0] / counts[1])


if __name__ == "__main__":
    main()
