"""Train a binary network on ImageNet or CIFAR-100 with CMIM, for days: a run that was killed goes on where it was.

    python examples/tools/imagenet.py ROOT --config examples/tools/configs/imagenet_resnet18.yaml
    python examples/tools/imagenet.py data --config examples/tools/configs/cifar100_resnet18.yaml --download
    torchrun --nproc_per_node=8 examples/tools/imagenet.py ROOT --model resnet50 --method bireal --amp bf16

The variant of the code published with the paper, with a full-precision network that is trained first as its teacher:

    python examples/tools/imagenet.py data --config CONFIG --full-precision --output runs/full
    python examples/tools/imagenet.py data --config CONFIG --published --teacher runs/full/last.pt

The network is one of timm's or, as bodies.NAME, one of bodies.py; --method says how it is binarized (binarize.py). A
config file has options as keys; the command line overrides it. OUTPUT/log.csv has a line an epoch; with the package
tensorboard there are curves too. OUTPUT/last.pt has all of the run, and the same command goes on from it. What chance
does depends on the seed and the place in the run alone: on a CPU the end is that of a run without interruption, bit by
bit. The CMIM lines are in `main`.
"""

from __future__ import annotations

import argparse
import csv
import hashlib
import os
import sys
from collections.abc import Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
import torch.nn.functional as F
import yaml
from timm import create_model
from timm.data import create_dataset, create_transform, resolve_data_config
from timm.data.loader import PrefetchLoader, fast_collate
from timm.optim import create_optimizer_v2
from timm.scheduler import create_scheduler_v2
from timm.utils import ModelEmaV3, ParseKwargs, distribute_bn, init_distributed_device, random_seed
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, Dataset, Sampler
from torchmetrics import MetricCollection
from torchmetrics.classification import MulticlassAccuracy
from torchvision.transforms import Compose, PILToTensor, RandomCrop, RandomHorizontalFlip
from tqdm import tqdm

from binarize import METHODS, binarize
from bodies import BODIES, full_precision
from cmim_plugin import CMIM, PublishedCMIM, Report

AMP = {"none": None, "bf16": torch.bfloat16, "fp16": torch.float16}
# With these changed a run is still the same.
FREE = ("root", "output", "config", "workers", "device", "download", "checkpoint_every", "report_batches")

# --- options ---------------------------------------------------------------------------------------------


def parse(argv: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    switch = argparse.BooleanOptionalAction
    parser.add_argument("root", help="folder with train/CLASS/* and val/CLASS/*")
    parser.add_argument("--model", default="resnet18", help="any name that timm.create_model knows")
    parser.add_argument("--model-kwargs", nargs="*", default={}, action=ParseKwargs, help="such as img_size=64 depth=4")
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
    switch = argparse.BooleanOptionalAction
    parser.add_argument("--config", type=Path, help="YAML file of options; the command line overrides it")
    parser.add_argument("--method", choices=METHODS, default="irnet")
    parser.add_argument("--dataset", default="", help="as timm names it, such as torch/cifar100; a folder of images")
    parser.add_argument("--download", action=switch, default=False, help="let the dataset download itself into ROOT")
    parser.add_argument("--data-kwargs", nargs="*", default={}, action=ParseKwargs, help="such as crop_pct=0.95")
    parser.add_argument("--augment", nargs="*", default={}, action=ParseKwargs, help="of timm.data.create_transform")
    parser.add_argument("--pad-crop", type=int, help="instead: mirror, and crop from it and so many reflected pixels")
    parser.add_argument("--opt-kwargs", nargs="*", default={}, action=ParseKwargs, help="such as momentum=0.95")
    parser.add_argument("--amp", choices=AMP, default="none")
    parser.add_argument("--channels-last", action=switch, default=False)
    parser.add_argument("--cmim-kwargs", nargs="*", default={}, action=ParseKwargs, help="such as instances=image")
    parser.add_argument("--cmim-labels", action=switch, default=False, help="same class: no negatives of each other")
    parser.add_argument("--full-precision", action=switch, default=False, help="do not binarize: to train a teacher")
    parser.add_argument("--teacher", metavar="FILE", help="contrast with the network that --full-precision left there")
    parser.add_argument("--published", action=switch, default=False, help="PublishedCMIM; weight 3.2 if not given")
    parser.add_argument("--report-batches", type=int, default=0, help="look inside each tap on so many test batches")
    parser.add_argument("--output", type=Path, default=Path("runs/imagenet"))
    parser.add_argument("--checkpoint-every", type=int, default=1000, metavar="STEPS", help="and after each epoch")
    if config := parser.parse_known_args(argv)[0].config:
        # Last comes an option of one value: words of the file could swallow ROOT.
        argv = [*words(yaml.safe_load(config.read_text())), f"--config={config}", *argv]
    args = parser.parse_args(argv)
    if args.full_precision or args.published:
        parser.set_defaults(cmim_weight=0.0 if args.full_precision else 3.2)
        args = parser.parse_args(argv)
    of_cmim = [args.teacher, args.published, args.cmim_labels, args.report_batches]
    if args.full_precision and (args.cmim_weight or any(of_cmim)):
        parser.error("--full-precision has no binary activation to contrast: leave the options of CMIM out")
    if args.teacher and not Path(args.teacher).is_file():
        parser.error(f"--teacher {args.teacher}: there is no such file")
    if args.report_batches < 0:
        parser.error("--report-batches is a number of batches, 0 for no report")
    if any(of_cmim) and not args.cmim_weight:
        parser.error("without CMIM (--cmim-weight 0) leave its other options out")
    if args.published and (not args.teacher or args.cmim_labels):
        parser.error("--published needs --teacher, and knows the labels without --cmim-labels")
    if args.model.startswith("bodies.") and (args.pretrained or args.model.removeprefix("bodies.") not in BODIES):
        parser.error(f"--model {args.model}: bodies.py has {', '.join(BODIES)}, none of them pretrained")
    return args


def words(config: dict[str, Any]) -> Iterator[str]:
    """The command line that says the same: its names, types and choices are then checked as any other's."""
    for name, value in config.items():
        if isinstance(value, bool):
            yield f"--{name}" if value else f"--no-{name}"
        elif isinstance(value, (list, dict)):
            yield f"--{name}"
            yield from (f"{k}={v}" for k, v in value.items()) if isinstance(value, dict) else map(str, value)
        else:
            yield f"--{name}={value}"


# --- data ------------------------------------------------------------------------------------------------


class Batches(Sampler[list[tuple[int, int]]]):
    """The (index, seed) of each image in each batch of this process, from batch `first` of `epoch` on.

    All processes together see the same batches as one would see with their batch size times their number.
    """

    def __init__(self, images: int, args: argparse.Namespace):
        self.images, self.args = images, args
        self.epoch = self.first = 0

    def __len__(self) -> int:
        """Of a whole epoch; the last, incomplete one is left out."""
        return self.images // (self.args.batch_size * self.args.world_size)

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        generator = np.random.default_rng((self.args.seed, self.epoch))
        drawn = np.stack((generator.permutation(self.images), generator.integers(2**32, size=self.images)), 1)
        size, world = self.args.batch_size, self.args.world_size
        for step in range(self.first, len(self)):
            start = (step * world + self.args.rank) * size
            yield [tuple(pair) for pair in drawn[start : start + size].tolist()]


class Seeded(Dataset[Any]):
    """Image, and both its label and its index.

    An image is augmented by the seed that comes with its index: not by which worker has it, and what that did before.
    """

    def __init__(self, dataset: Dataset[Any]):
        self.dataset = dataset

    def __getitem__(self, place: tuple[int, int]) -> Any:
        index, seed = place
        random_seed(seed)
        image, label = self.dataset[index]
        return image, np.array([label, index])


def targets_of(dataset: Any) -> torch.Tensor:
    """The label of each training image, in the order of their indices."""
    labels = dataset.targets if hasattr(dataset, "targets") else [label for _, label in dataset.reader.samples]
    return torch.as_tensor(labels)


def load(args: argparse.Namespace) -> tuple[Dataset[Any], Dataset[Any], int]:
    """Images to train and to test on, and the number of classes."""
    if not args.dataset:
        check_folders(Path(args.root))
    create = partial(create_dataset, args.dataset, args.root, download=args.download)
    train = create(split="train")
    if args.dataset:
        return train, create(split="val"), len(train.classes)
    return train, create(split="val", class_map=train.reader.class_to_idx), len(train.reader.class_to_idx)


def check_folders(root: Path) -> None:
    """timm takes all of ROOT for a split whose folder it does not find, and leaves out classes of one split alone."""
    classes = {}
    for names in (("train",), ("val", "validation")):
        folder = next((root / name for name in names if (root / name).is_dir()), None)
        if folder is None:
            sys.exit(f"{root} has no folder {names[0]}/ with one of images for each class.")
        classes[folder] = {path.name for path in folder.iterdir() if path.is_dir()}
    if len({frozenset(names) for names in classes.values()}) > 1:
        odd = sorted(set.symmetric_difference(*classes.values()))
        sys.exit(f"{' and '.join(map(str, classes))} have other classes; in one of them only: {', '.join(odd[:10])}.")


Loaders = tuple[PrefetchLoader, PrefetchLoader]


def loaders(train: Any, test: Any, batches: Batches, config: dict[str, Any], args: argparse.Namespace) -> Loaders:
    """As timm.data.create_loader makes them, but for the order of the images, and for testing on each of them once."""
    normalise = {key: config[key] for key in ("mean", "std")}
    transform = {"input_size": config["input_size"], "interpolation": config["interpolation"], "use_prefetcher": True}
    train.transform = create_transform(**transform, **normalise, is_training=True, **args.augment)
    if args.pad_crop is not None:
        crop = RandomCrop(config["input_size"][1:], args.pad_crop, padding_mode="reflect")
        train.transform = Compose([crop, RandomHorizontalFlip(), PILToTensor()])
    test.transform = create_transform(**transform, **normalise, crop_pct=config["crop_pct"])
    device = torch.device(args.device)
    common = {"num_workers": args.workers, "persistent_workers": args.workers > 0, "pin_memory": device.type == "cuda"}
    loader = partial(DataLoader, collate_fn=fast_collate, **common)
    share = range(args.rank, len(test), args.world_size)
    both = loader(Seeded(train), batch_sampler=batches), loader(test, args.batch_size, sampler=share)
    return tuple(PrefetchLoader(one, **normalise, device=device) for one in both)


# --- training --------------------------------------------------------------------------------------------


def build(args: argparse.Namespace, classes: int, binary: bool = True) -> nn.Module:
    """The network, or its full-precision twin, whose modules have the same names."""
    if args.model.startswith("bodies."):
        recipe = METHODS[args.method].recipe
        body = BODIES[args.model.removeprefix("bodies.")]
        return body(recipe if binary else full_precision(recipe), classes, **args.model_kwargs)
    model = create_model(args.model, pretrained=args.pretrained, num_classes=classes, **args.model_kwargs)
    if binary:
        binarize(model, args.method)
    return model


def attach(args: argparse.Namespace, model: nn.Module, train_set: Any, classes: int, size: list[int]) -> CMIM:
    device = next(model.parameters()).device
    example = torch.zeros(2, *size, device=device)
    settings = {"weight": args.cmim_weight, **args.cmim_kwargs}
    if args.teacher:
        teacher = build(args, classes, binary=False).to(device).eval().requires_grad_(False)
        checkpoint = torch.load(args.teacher, map_location="cpu", weights_only=True)
        wanted = {name: getattr(args, name) for name in ("model", "model_kwargs", "method")} | {"full_precision": True}
        if other := [name for name in wanted if checkpoint["settings"].get(name) != wanted[name]]:
            trained = ", ".join(f"{name} {checkpoint['settings'].get(name)}" for name in other)
            sys.exit(f"{args.teacher} is no teacher of this network, with {trained}: train one with --full-precision.")
        teacher.load_state_dict(checkpoint["model"])
        settings["teacher"] = teacher
    if args.published:
        return PublishedCMIM(model, example, targets=targets_of(train_set), **settings)
    return CMIM(model, example, **settings)


def main(argv: list[str] | None = None) -> None:
    args = parse(sys.argv[1:] if argv is None else argv)
    settings = {name: value for name, value in vars(args).items() if name not in FREE}
    device = init_distributed_device(args)  # sets args.rank, args.world_size and args.distributed
    settings["processes"] = args.world_size
    if args.teacher:  # wherever the file is
        settings["teacher"] = hashlib.sha256(Path(args.teacher).read_bytes()).hexdigest()
    random_seed(args.seed)
    torch.backends.cudnn.benchmark = True
    layout = torch.channels_last if args.channels_last else torch.contiguous_format
    autocast = partial(torch.autocast, device.type, AMP[args.amp], enabled=args.amp != "none")

    train_set, test_set, classes = load(args)
    batches = Batches(len(train_set), args)
    if not (steps := len(batches)):
        sys.exit(f"{len(train_set)} training images for {args.world_size} x {args.batch_size}: lower --batch-size")
    model = build(args, classes, binary=not args.full_precision).to(device, memory_format=layout)
    config = resolve_data_config({"img_size": args.img_size, **args.data_kwargs}, model=model)
    loader, test_loader = loaders(train_set, test_set, batches, config, args)

    optimizer = create_optimizer_v2(model, args.opt, args.lr, args.weight_decay, **args.opt_kwargs)
    cmim = None
    if args.cmim_weight:
        cmim = attach(args, model, train_set, classes, config["input_size"])

    timing = {"warmup_epochs": args.warmup_epochs, "updates_per_epoch": steps, "step_on_epochs": False}
    scheduler, epochs = create_scheduler_v2(optimizer, args.sched, args.epochs, **timing)
    trained = DistributedDataParallel(model) if args.distributed else model
    ema = ModelEmaV3(model, decay=args.ema_decay, use_warmup=True)
    scaler = torch.amp.GradScaler(device.type, enabled=args.amp == "fp16")

    parts = {"model": model, "ema": ema, "optimizer": optimizer, "scaler": scaler} | ({"cmim": cmim} if cmim else {})
    last = args.output / "last.pt"
    start, first, sums, log = resume(last, parts, settings)
    if args.rank == 0:
        place = f"epoch {start}, step {first} of {steps}" if start < epochs else f"{last}: all epochs are done"
        print(cmim or "without CMIM", place, sep="\n", flush=True)
        args.output.mkdir(parents=True, exist_ok=True)
        writer = summary_writer(args.output, start)

    def save(epoch: int, step: int) -> None:
        if args.rank == 0:  # which speaks for all: DDP gives its weights and statistics to them
            place = {"epoch": epoch, "step": step, "sums": sums, "log": log, "settings": settings}
            write({name: part.state_dict() for name, part in parts.items()} | place, last)

    for epoch in range(start, epochs):
        batches.epoch, batches.first = epoch, first
        METHODS[args.method].on_epoch(model, epoch, epochs)
        trained.train()
        progress = tqdm(loader, f"epoch {epoch}", steps, initial=first, disable=None if args.rank == 0 else True)
        for step, (x, labels) in enumerate(progress, first + 1):
            y, indices = labels.unbind(1)
            update = epoch * steps + step
            random_seed(int(np.random.SeedSequence((args.seed, args.rank, update)).generate_state(1)[0]))  # for dropout
            scheduled = cmim.scheduled if cmim else ()
            with autocast():
                loss = F.cross_entropy(trained(x.contiguous(memory_format=layout)), y)
                seen = {"loss": loss.detach().clone()}
                if args.published:
                    loss += cmim(trained, indices=indices)
                elif cmim:
                    loss += cmim(trained, labels=y if args.cmim_labels else None)
                if cmim:
                    bounds = {tap: m["bound"] for tap, m in cmim.metrics.items() if tap in scheduled and "bound" in m}
                    seen |= {f"bound/{tap}": bound for tap, bound in bounds.items()}
            optimizer.zero_grad()
            scaler.scale(loss).backward()
            scaler.step(optimizer)
            scaler.update()
            ema.update(model, update)
            scheduler.step_update(update)
            # Each with the number of steps that had it.
            sums |= {name: sums.get(name, 0) + torch.stack([v, torch.ones_like(v)]) for name, v in seen.items()}
            if step % args.checkpoint_every == 0 and step < steps:
                save(epoch, step)

        if args.distributed:  # the statistics of rank 0, as DDP does before each pass
            distribute_bn(model, args.world_size)
            distribute_bn(ema, args.world_size)
        line = {"epoch": epoch, "lr": optimizer.param_groups[0]["lr"]}
        line |= {name: float(total / count) for name, (total, count) in sums.items()}  # of the first process's batches
        line |= evaluate({"": model, "ema_": ema.module}, test_loader, classes, autocast)
        first, sums = 0, {}
        log.append(line)
        if args.rank == 0:
            write_log(log, args.output / "log.csv", writer)
            if cmim and args.report_batches:
                report = cmim.report(model, test_loader, max_batches=args.report_batches)
                write_report(report, epoch, args.output / "report.csv", writer)
            print(*(f"{name} {value:.5g}" for name, value in line.items() if "/" not in name), sep=", ", flush=True)
        save(epoch + 1, 0)
    if args.distributed:
        dist.destroy_process_group()


@torch.no_grad()
def evaluate(models: dict[str, nn.Module], loader: PrefetchLoader, classes: int, autocast: Any) -> dict[str, float]:
    """Accuracies in %, over the images of all processes; `models` by the prefix of their accuracies' names."""
    metrics = {}
    for prefix, model in models.items():
        top1, top5 = (MulticlassAccuracy(classes, top_k=min(k, classes), average="micro") for k in (1, 5))
        both = MetricCollection({"top1": top1, "top5": top5}, prefix=prefix)
        metrics[prefix] = both.to(next(model.eval().parameters()).device)
    for x, y in loader:
        with autocast():
            for prefix, model in models.items():
                metrics[prefix].update(model(x), y)
    return {name: 100 * float(value) for both in metrics.values() for name, value in both.compute().items()}


# --- checkpoint and logs ---------------------------------------------------------------------------------


def resume(path: Path, parts: dict[str, Any], settings: dict[str, Any]) -> tuple[int, int, dict[str, Any], list[Any]]:
    """Epoch, steps of it that are done, their sums, and the lines of the log so far."""
    if not path.exists():
        return 0, 0, {}, []
    checkpoint = torch.load(path, map_location="cpu", weights_only=True)
    if other := [name for name in settings if settings[name] != checkpoint["settings"].get(name)]:
        changes = (f"{name} {checkpoint['settings'].get(name)} and not {settings[name]}" for name in other)
        sys.exit(f"{path} is of another run, with {', '.join(changes)}: give another --output, or go on with the same.")
    for name, part in parts.items():
        part.load_state_dict(checkpoint[name])
    device = next(parts["model"].parameters()).device
    sums = {name: total.to(device) for name, total in checkpoint["sums"].items()}
    return checkpoint["epoch"], checkpoint["step"], sums, checkpoint["log"]


def write(checkpoint: dict[str, Any], path: Path) -> None:
    """Killed in the middle of this, a run still has the checkpoint before."""
    part = path.with_suffix(".part")
    with part.open("wb") as file:
        torch.save(checkpoint, file)
        file.flush()
        os.fsync(file.fileno())
    part.replace(path)


def summary_writer(folder: Path, epoch: int) -> Any:
    """None without the package; what was written of `epoch` and later, after the checkpoint, is dropped."""
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        print("No curves for TensorBoard, which is not installed (pip install tensorboard); log.csv has all of them.")
        return None
    return SummaryWriter(folder, purge_step=epoch)


def write_log(log: list[dict[str, float]], path: Path, writer: Any) -> None:
    """All lines anew, so that it says what the checkpoint does."""
    with path.open("w", newline="") as file:
        table = csv.DictWriter(file, log[-1])
        table.writeheader()
        table.writerows(log)
    if writer:
        for name, value in log[-1].items():
            writer.add_scalar(name, value, log[-1]["epoch"])
        writer.flush()


def write_report(report: Report, epoch: int, path: Path, writer: Any) -> None:
    """Of the last epoch as a table, of all of them as curves. (Flips are missing in the first of this process.)"""
    report.to_csv(path)
    if writer:
        for name, value in report.scalars().items():
            writer.add_scalar(f"report/{name}", value, epoch)
        writer.flush()


if __name__ == "__main__":
    main()
