"""IR-Net on CIFAR-10, with CMIM. Qin et al., "Forward and Backward Information Retention for Accurate Binary Neural
Networks", CVPR 2020, https://arxiv.org/abs/1909.10788

    python examples/irnet.py                              CIFAR-10, which torchvision downloads into data/
    python examples/irnet.py --root DIR                   CIFAR-10 from DIR/cifar10.npz, offline
    python examples/irnet.py --data digits --epochs 20    8 x 8 pixels, from scikit-learn: half a minute on a CPU
    python examples/irnet.py --cmim-weight 0              the baseline, to the last bit

The lines that CMIM adds are marked with "CMIM".
"""

from __future__ import annotations

import argparse
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, Dataset
from torchvision import datasets
from torchvision.transforms import v2

from cmim_plugin import CMIM  # CMIM

# --- the method ----------------------------------------------------------------------------------------------


class Sign(torch.autograd.Function):
    """sign(x) with sign(0) = 1; backward by the error decay estimator, the derivative of k tanh(t x)."""

    @staticmethod
    def forward(ctx, x: Tensor, t: float, k: float) -> Tensor:
        ctx.save_for_backward(x)
        ctx.t, ctx.k = t, k
        return (x >= 0).to(x.dtype) * 2 - 1

    @staticmethod
    def backward(ctx, grad: Tensor) -> tuple[Tensor, None, None]:
        (x,) = ctx.saved_tensors
        return grad * ctx.k * ctx.t * (1 - torch.tanh(ctx.t * x) ** 2), None, None


class IRConv2d(nn.Conv2d):
    """Binarizes its input, and its weight by Libra parameter binarization (section 3.2)."""

    t, k = 0.1, 10.0  # of the estimator, set by `anneal`

    def forward(self, x: Tensor) -> Tensor:
        w = self.weight - self.weight.mean((1, 2, 3), keepdim=True)  # balanced: the most entropy
        w = w / w.std((1, 2, 3), keepdim=True)
        scale = 2 ** w.detach().abs().mean((1, 2, 3), keepdim=True).log2().round()  # a bit shift
        return self._conv_forward(Sign.apply(x, self.t, self.k), Sign.apply(w, self.t, self.k) * scale, self.bias)


def anneal(model: nn.Module, epoch: int, epochs: int) -> None:
    """The estimator's schedule (section 3.3): from nearly the identity, which updates all weights, to nearly sign."""
    t = 0.1 * 10 ** (2 * epoch / epochs)
    for module in model.modules():
        if isinstance(module, IRConv2d):
            module.t, module.k = t, max(1 / t, 1.0)


# --- the network ---------------------------------------------------------------------------------------------


class Unit(nn.Module):
    """A binary convolution with a shortcut of its own."""

    def __init__(self, channels_in: int, channels: int):
        super().__init__()
        self.stride = 1 if channels == channels_in else 2
        self.conv = IRConv2d(channels_in, channels, 3, self.stride, 1, bias=False)
        self.bn = nn.BatchNorm2d(channels)

    def forward(self, x: Tensor) -> Tensor:
        out = self.bn(self.conv(x))
        shortcut = x[:, :, :: self.stride, :: self.stride]
        shortcut = F.pad(shortcut, [0, 0, 0, 0, 0, out.shape[1] - x.shape[1]])  # zeros for the new channels
        return F.hardtanh(out + shortcut)


class ResNet(nn.Module):
    """Three stages of `units` binary convolutions: 6 for ResNet-20, 2 for ResNet-8. First and last layer are real."""

    def __init__(self, units: int = 6, in_channels: int = 3, classes: int = 10, width: int = 16):
        super().__init__()
        widths = [width] * (units + 1) + [2 * width] * units + [4 * width] * units
        self.stem = nn.Sequential(
            nn.Conv2d(in_channels, width, 3, padding=1, bias=False), nn.BatchNorm2d(width), nn.Hardtanh()
        )
        self.units = nn.Sequential(*[Unit(a, b) for a, b in pairwise(widths)])
        self.fc = nn.Linear(4 * width, classes)

    def forward(self, x: Tensor) -> Tensor:
        return self.fc(self.units(self.stem(x)).mean((2, 3)))


# --- the data ------------------------------------------------------------------------------------------------


class Images(Dataset):
    def __init__(self, images: np.ndarray, labels: np.ndarray, transform: v2.Transform):
        """images (N, H, W, C) uint8"""
        self.images, self.labels = torch.from_numpy(images).permute(0, 3, 1, 2), torch.as_tensor(labels).long()
        self.transform = transform

    def __len__(self) -> int:
        return len(self.labels)

    def __getitem__(self, i: int) -> tuple[Tensor, Tensor]:
        return self.transform(self.images[i]), self.labels[i]


def load(data: str, root: Path) -> tuple[Images, Images]:
    if data == "digits":
        from sklearn.datasets import load_digits

        pixels, labels = load_digits(return_X_y=True)
        images = (pixels * 255 / 16).astype(np.uint8).reshape(-1, 8, 8, 1)
        order = np.random.RandomState(0).permutation(len(images))
        (x_train, x_test), (y_train, y_test) = np.split(images[order], [1000]), np.split(labels[order], [1000])
        augmentation = [v2.RandomCrop(8, padding=1)]
    else:
        if (file := root / "cifar10.npz").exists():
            arrays = np.load(file)
            x_train, y_train, x_test, y_test = (arrays[key] for key in ("x_train", "y_train", "x_test", "y_test"))
        else:
            train, test = (datasets.CIFAR10(root, train=part, download=True) for part in (True, False))
            x_train, y_train, x_test, y_test = train.data, train.targets, test.data, test.targets
        augmentation = [v2.RandomCrop(32, padding=4), v2.RandomHorizontalFlip()]
    pixels = x_train.reshape(-1, x_train.shape[-1]) / np.float32(255)
    mean, std = pixels.mean(0).tolist(), pixels.std(0).tolist()
    scaled = [v2.ToDtype(torch.float32, scale=True), v2.Normalize(mean, std)]
    return Images(x_train, y_train, v2.Compose(augmentation + scaled)), Images(x_test, y_test, v2.Compose(scaled))


# --- training ------------------------------------------------------------------------------------------------


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data", choices=["cifar10", "digits"], default="cifar10")
    parser.add_argument("--root", type=Path, default=Path("data"))
    parser.add_argument("--units", type=int, default=6, help="convolutions a stage: 6 for ResNet-20, 2 for ResNet-8")
    parser.add_argument("--epochs", type=int, default=200)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--lr", type=float, default=0.1)
    parser.add_argument("--workers", type=int, default=0, help="processes that augment images")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cmim-weight", type=float, default=0.1, help="0: the baseline")
    args = parser.parse_args()

    torch.manual_seed(args.seed)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    train_set, test_set = load(args.data, args.root)
    loader = DataLoader(train_set, args.batch_size, shuffle=True, num_workers=args.workers)
    test_loader = DataLoader(test_set, 500, num_workers=args.workers)
    shape = train_set[0][0].shape

    model = ResNet(args.units, in_channels=shape[0]).to(device)
    optimizer = torch.optim.SGD(model.parameters(), args.lr, momentum=0.9, weight_decay=1e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, args.epochs)
    cmim = CMIM(model, torch.zeros(2, *shape, device=device), weight=args.cmim_weight)  # CMIM
    print(cmim)  # which binary activations were found

    for epoch in range(args.epochs):
        anneal(model, epoch, args.epochs)
        model.train()
        for x, y in loader:
            x, y = x.to(device), y.to(device)
            loss = F.cross_entropy(model(x), y)
            loss += cmim(model)  # CMIM
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
        schedule.step()

        model.eval()
        with torch.no_grad():
            right = sum((model(x.to(device)).argmax(1).cpu() == y).sum().item() for x, y in test_loader)
        bound = cmim.scalars()["cmim/bound"]
        print(f"epoch {epoch + 1}: test accuracy {100 * right / len(test_set):.2f} %, mean bound {bound:.2f} nats")


if __name__ == "__main__":
    main()
