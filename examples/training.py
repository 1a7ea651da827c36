"""The training loop that all examples share; CMIM is three lines of `train`.

`main` is a script's command line: the same seeds without and with CMIM, and a table of both.
"""

from __future__ import annotations

import argparse
import math
import sys
import time
from collections import defaultdict
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from tqdm import tqdm

from bodies import BODIES, Recipe
from cmim_plugin import CMIM

# Name: (torchvision's name, largest shift in augmentation, mirror in augmentation)
DATASETS = {
    "digits": (None, 1, False),
    "fashion_mnist": ("FashionMNIST", 2, True),
    "cifar10": ("CIFAR10", 4, True),
    "cifar100": ("CIFAR100", 4, True),
}


# --- data ------------------------------------------------------------------------------------------------


@dataclass
class Data:
    """Images uint8 (N, C, H, W), labels int64 (N,); `shift` and `flip` say what augmentation suits them."""

    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor
    shift: int
    flip: bool

    def __post_init__(self) -> None:
        pixels = self.x_train.float()
        self.mean = pixels.mean((0, 2, 3), keepdim=True)
        self.std = pixels.std((0, 2, 3), keepdim=True)
        self.num_classes = int(torch.cat((self.y_train, self.y_test)).max()) + 1
        self.in_channels = self.x_train.shape[1]

    def normalise(self, x: Tensor) -> Tensor:
        return (x - self.mean) / self.std

    def augment(self, x: Tensor, generator: torch.Generator) -> Tensor:
        """Crop each image at random out of its zero-padded self and mirror half of them, where that suits."""
        n, c, h, w = x.shape
        rows = torch.randint(2 * self.shift + 1, (n, 1), generator=generator) + torch.arange(h)
        cols = torch.randint(2 * self.shift + 1, (n, 1), generator=generator) + torch.arange(w)
        if self.flip:
            cols = torch.where(torch.rand(n, 1, generator=generator) < 0.5, cols, cols.flip(1))
        image, channel = torch.arange(n)[:, None, None, None], torch.arange(c)[:, None, None]
        index = (image, channel, rows[:, None, :, None], cols[:, None, None, :])
        return F.pad(x, [self.shift] * 4)[tuple(i.to(x.device) for i in index)]


def load_data(name: str, root: str | None = None, train_size: int | None = None) -> Data:
    """`digits` comes with scikit-learn; the others from ROOT/NAME.npz if it exists, else from torchvision.

    `train_size` keeps that many training images, the same ones in every run.
    """
    torchvision_name, shift, flip = DATASETS[name]
    if torchvision_name is None:
        arrays = load_digits()
    elif root and (path := Path(root, f"{name}.npz")).exists():
        arrays = np.load(path)
    else:
        arrays = download(torchvision_name, root or "data")
    tensors = {}
    for key in ("x_train", "y_train", "x_test", "y_test"):
        if key not in arrays:
            sys.exit(f"{name}.npz holds {sorted(arrays)}; it needs x_train, y_train, x_test and y_test")
        tensors[key] = torch.from_numpy(arrays[key])
    for key in ("x_train", "x_test"):
        images = tensors[key]
        tensors[key] = images[:, None] if images.ndim == 3 else images.permute(0, 3, 1, 2)
    for key in ("y_train", "y_test"):
        tensors[key] = tensors[key].flatten().long()
    if train_size:
        order = torch.randperm(len(tensors["x_train"]), generator=torch.Generator().manual_seed(0))
        for key in ("x_train", "y_train"):
            tensors[key] = tensors[key][order[:train_size]]
    return Data(**{key: t.contiguous().to(device()) for key, t in tensors.items()}, shift=shift, flip=flip)


def load_digits() -> dict[str, np.ndarray]:
    from sklearn.datasets import load_digits
    from sklearn.model_selection import train_test_split

    digits = load_digits()
    images = (digits.images * 255 / 16).astype(np.uint8)
    split = train_test_split(images, digits.target, test_size=0.4, stratify=digits.target, random_state=0)
    return dict(zip(("x_train", "x_test", "y_train", "y_test"), split, strict=True))


def download(name: str, root: str) -> dict[str, np.ndarray]:
    import torchvision

    arrays = {}
    for part in ("train", "test"):
        dataset = getattr(torchvision.datasets, name)(root, train=part == "train", download=True)
        arrays[f"x_{part}"], arrays[f"y_{part}"] = np.asarray(dataset.data), np.asarray(dataset.targets)
    return arrays


def device() -> torch.device:
    if torch.accelerator.is_available():
        return torch.accelerator.current_accelerator()
    return torch.device("cpu")


# --- training --------------------------------------------------------------------------------------------


@dataclass
class History:
    """One run, an entry an epoch (accuracies in %; test accuracy is NaN in epochs without a test)."""

    train_loss: list[float] = field(default_factory=list)
    train_accuracy: list[float] = field(default_factory=list)
    test_accuracy: list[float] = field(default_factory=list)
    # Tap -> nats: means over the steps, in each of which a tap counts with its last value.
    bounds: dict[str, list[float]] = field(default_factory=lambda: defaultdict(list))
    predictions: Tensor | None = None  # int64 (N,), of the test images after the last epoch
    seconds: float = 0.0  # of training, without tests


def cross_entropy(model: nn.Module, x: Tensor, y: Tensor, logits: Tensor, label_smoothing: float = 0.0) -> Tensor:
    return F.cross_entropy(logits, y, label_smoothing=label_smoothing)


def train(
    model: nn.Module,
    data: Data,
    *,
    epochs: int,
    batch_size: int = 128,
    lr: float = 3e-3,
    seed: int = 0,
    cmim_weight: float = 0.0,
    cmim_options: dict[str, Any] | None = None,
    cmim_labels: bool = False,
    loss_fn: Callable[[nn.Module, Tensor, Tensor, Tensor], Tensor] = cross_entropy,
    on_epoch: Callable[[nn.Module, int, int], None] | None = None,
    eval_every: int = 1,
    label: str = "",
) -> History:
    """Train in place with Adam and a cosine schedule.

    loss_fn: (model, x, y, logits) -> 0-d loss, before CMIM's is added
    on_epoch: (model, epoch, epochs), called before each epoch
    cmim_weight, cmim_options: as in CMIM; weight 0 trains without
    cmim_labels: tell CMIM the labels, so that images of the same class are no negatives
    eval_every: epochs from test to test; the last epoch is always tested
    """
    # Batches and augmentation draw from their own generator: runs of one seed see the same ones.
    generator = torch.Generator().manual_seed(seed)
    optimizer = torch.optim.Adam(model.parameters(), lr)
    cmim = None
    if cmim_weight:
        cmim = CMIM(model, data.normalise(data.x_train[:16]), weight=cmim_weight, **(cmim_options or {}))
        optimizer.add_param_group({"params": cmim.parameters()})
    steps = epochs * math.ceil(len(data.x_train) / batch_size)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, steps)

    history = History()
    progress = tqdm(range(epochs), desc=label, disable=None)  # None: quiet where the output is no terminal
    for epoch in progress:
        if on_epoch:
            on_epoch(model, epoch, epochs)
        model.train()
        start = time.perf_counter()
        sums: dict[str, Tensor | float] = defaultdict(float)
        batches = torch.randperm(len(data.x_train), generator=generator).split(batch_size)
        for batch in batches:
            batch = batch.to(data.x_train.device)
            x, y = data.normalise(data.augment(data.x_train[batch], generator)), data.y_train[batch]
            logits = model(x)
            loss = loss_fn(model, x, y, logits)
            sums["loss"] += loss.detach() * len(y)
            sums["correct"] += (logits.argmax(1) == y).sum()
            if cmim:
                loss += cmim(model, labels=y if cmim_labels else None)
                for name, metrics in cmim.metrics.items():
                    if "bound" in metrics:  # an objective of one's own has none
                        sums[name] += metrics["bound"]
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()

        history.train_loss.append(float(sums.pop("loss")) / len(data.x_train))
        history.train_accuracy.append(100 * float(sums.pop("correct")) / len(data.x_train))
        for name, total in sums.items():
            history.bounds[name].append(float(total) / len(batches))
        history.seconds += time.perf_counter() - start  # after the sums' transfer, which waits for the device
        if epoch == epochs - 1 or (epoch + 1) % eval_every == 0:
            history.predictions = predict(model, data)
            history.test_accuracy.append(100 * (history.predictions == data.y_test).float().mean().item())
        else:
            history.test_accuracy.append(float("nan"))
        progress.set_postfix(train=history.train_accuracy[-1], test=history.test_accuracy[-1])
    if cmim:
        cmim.remove()
    return history


@torch.no_grad()
def predict(model: nn.Module, data: Data) -> Tensor:
    """Classes int64 (N,) of the test images."""
    model.eval()
    return torch.cat([model(data.normalise(x)).argmax(1) for x in data.x_test.split(500)])


def compare(
    build: Callable[[], nn.Module],
    data: Data,
    seeds: Sequence[int],
    cmim_weight: float,
    label: str = "",
    **options: Any,
) -> dict[str, list[History]]:
    """Train each seed without and with CMIM: same initial weights, same batches. Options are `train`'s."""
    arms = {"without": 0.0, "with CMIM": cmim_weight} if cmim_weight else {"without": 0.0}
    runs: dict[str, list[History]] = {arm: [] for arm in arms}
    for seed in seeds:
        for arm, weight in arms.items():
            torch.manual_seed(seed)
            title = f"{label} {arm}, seed {seed}"
            model = build().to(data.x_train.device)
            runs[arm].append(train(model, data, seed=seed, cmim_weight=weight, label=title, **options))
    return runs


# --- report ----------------------------------------------------------------------------------------------


def paired_difference(a: Sequence[float], b: Sequence[float]) -> tuple[float, float]:
    """Mean of b - a and the half width of its 95 % interval (Student's t), NaN for a single pair."""
    from scipy import stats

    differences = np.subtract(b, a)
    if len(differences) < 2:
        return float(differences.mean()), float("nan")
    half = stats.t.ppf(0.975, len(differences) - 1) * stats.sem(differences)
    return float(differences.mean()), float(half)


def report(runs: dict[str, list[History]]) -> str:
    """Table of the accuracies after the last epoch (not the best one), and what their difference shows."""
    accuracies = {arm: [history.test_accuracy[-1] for history in runs[arm]] for arm in runs}
    lines = ["            test accuracy (%)   train (%)   s/epoch   each seed"]
    for arm, values in accuracies.items():
        spread = f"± {np.std(values, ddof=1):.2f}" if len(values) > 1 else ""
        trained = np.mean([history.train_accuracy[-1] for history in runs[arm]])
        seconds = np.mean([history.seconds / len(history.train_loss) for history in runs[arm]])
        each = " ".join(f"{value:.2f}" for value in values)
        lines.append(f"{arm:10}  {np.mean(values):8.2f} {spread:8}   {trained:9.2f} {seconds:9.2f}   {each}")
    if len(accuracies) == 2:
        mean, half = paired_difference(*accuracies.values())
        if np.isnan(half):
            lines.append(f"difference  {mean:+8.2f}, of one seed: shows nothing; try --seeds 0 1 2 3 4")
        else:
            low, high = mean - half, mean + half
            verdict = "contains zero: no difference shown" if low <= 0 <= high else "does not contain zero"
            lines.append(f"difference  {mean:+8.2f}, 95 % interval {low:+.2f} to {high:+.2f}, {verdict}")
    return "\n".join(lines)


def main(title: str, recipe: Recipe, on_epoch: Callable[[nn.Module, int, int], None] | None = None) -> None:
    """Command line of one method's script."""
    parser = argparse.ArgumentParser(description=f"Train {title} without and with CMIM.")
    parser.add_argument("--data", choices=DATASETS, default="digits")
    parser.add_argument("--root", help="folder with NAME.npz, or where torchvision keeps its downloads")
    parser.add_argument("--train-size", type=int, help="train on that many images only")
    parser.add_argument("--model", choices=BODIES, help="resnet8 for digits, else resnet20")
    parser.add_argument("--width", type=int, help="channels of the first layer, where not the model's usual")
    parser.add_argument("--epochs", type=int, default=20)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=3e-3)
    parser.add_argument("--cmim-weight", type=float, default=0.1, help="0: train without only")
    parser.add_argument("--seed", "--seeds", type=int, nargs="+", default=[0], dest="seeds")
    parser.add_argument("--eval-every", type=int, default=1, help="epochs from test to test")
    args = parser.parse_args()

    data = load_data(args.data, args.root, args.train_size)
    name = args.model or ("resnet8" if args.data == "digits" else "resnet20")
    width = {"width": args.width} if args.width else {}

    def build() -> nn.Module:
        return BODIES[name](recipe, data.num_classes, data.in_channels, **width)

    print(f"{title}, {name}, {args.data}: {len(data.x_train)} training, {len(data.x_test)} test images")
    runs = compare(
        build,
        data,
        args.seeds,
        args.cmim_weight,
        label=title,
        epochs=args.epochs,
        batch_size=args.batch_size,
        lr=args.lr,
        on_epoch=on_epoch,
        eval_every=args.eval_every,
    )
    print(report(runs))
