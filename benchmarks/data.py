"""Image sets as tensors on the device, and the augmentation of a whole batch there."""

from __future__ import annotations

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

# Name: (torchvision's name, largest shift in augmentation, mirror in augmentation)
DATASETS = {
    "digits": (None, 1, False),
    "fashion_mnist": ("FashionMNIST", 2, True),
    "cifar10": ("CIFAR10", 4, True),
    "cifar100": ("CIFAR100", 4, True),
}


def device() -> torch.device:
    if torch.accelerator.is_available():
        return torch.accelerator.current_accelerator()
    return torch.device("cpu")


@dataclass
class Data:
    """Images uint8 (N, H, W, C), labels int64 (N,); `shift` and `flip` say what augmentation suits them."""

    x_train: Tensor
    y_train: Tensor
    x_test: Tensor
    y_test: Tensor
    shift: int
    flip: bool

    def __post_init__(self) -> None:
        # From whole sums: a float copy of 50,000 images would take 600 MB.
        channels = self.x_train.flatten(0, 2)
        counts = torch.stack([channels[:, c].int().bincount(minlength=256) for c in range(channels.shape[1])]).double()
        values = torch.arange(256, device=counts.device, dtype=torch.float64)
        mean = counts @ values / len(channels)
        var = counts @ values**2 / len(channels) - mean**2
        self.mean, self.std = mean.float(), var.sqrt().float()
        self.num_classes = int(torch.cat((self.y_train, self.y_test)).max()) + 1
        self.in_channels = self.x_train.shape[3]
        self.x_padded = torch.nn.functional.pad(self.x_train, [0, 0] + [self.shift] * 4)

    def normalise(self, x: Tensor) -> Tensor:
        """uint8 (n, H, W, C) -> float (n, C, H, W) in the channels_last memory format."""
        return ((x - self.mean) / self.std).permute(0, 3, 1, 2)

    def augmented(self, index: Tensor, generator: torch.Generator) -> Tensor:
        """Training images (n,) -> uint8 (n, H, W, C): cropped at random out of the zero-padded image, half mirrored.

        generator: of the data's device; one gather, and no copy from the host
        """
        n, (h, w), where = len(index), self.x_train.shape[1:3], index.device
        shifts = torch.randint(2 * self.shift + 1, (2, n, 1), generator=generator, device=where)
        rows = shifts[0] + torch.arange(h, device=where)
        cols = shifts[1] + torch.arange(w, device=where)
        if self.flip:
            mirrored = torch.rand(n, 1, generator=generator, device=where) < 0.5
            cols = torch.where(mirrored, cols.flip(1), cols)
        return self.x_padded[index[:, None, None], rows[:, :, None], cols[:, None, :]]


def load_data(name: str, root: str | None = None, train_size: int | None = None, held_out: int = 0) -> Data:
    """`digits` comes with scikit-learn; the others from ROOT/NAME.npz if it exists, else from torchvision.

    train_size: keeps that many training images, the same ones in every run
    held_out: tests on that many other images of the training set, and leaves the test set alone
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
        tensors[key] = tensors[key].reshape(*tensors[key].shape[:3], -1)
    for key in ("y_train", "y_test"):
        tensors[key] = tensors[key].flatten().long()
    available = len(tensors["x_train"])
    if train_size or held_out:
        # The held-out images stand behind the training images of the test split, where those are not all.
        kept = min(train_size or available, available - held_out)
        order = torch.randperm(available, generator=torch.Generator().manual_seed(0))
        parts = {"train": order[:kept], "test": order[kept : kept + held_out]} if held_out else {"train": order[:kept]}
        x, y = tensors["x_train"], tensors["y_train"]
        for part, chosen in parts.items():
            tensors |= {f"x_{part}": x[chosen], f"y_{part}": y[chosen]}
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
