"""Handwritten digits (they come with scikit-learn, nothing is downloaded) for the scripts with a loop of their own."""

from __future__ import annotations

import torch
from sklearn.datasets import load_digits
from torch import Tensor
from torch.utils.data import TensorDataset


def digits(train_size: int = 1440) -> tuple[TensorDataset, TensorDataset]:
    """Training and test set of images float (1, 8, 8) in [-1, 1] and labels int64; 1797 images in all."""
    pixels, labels = load_digits(return_X_y=True)
    images: Tensor = torch.tensor(pixels, dtype=torch.float32).view(-1, 1, 8, 8) / 8 - 1
    order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
    train, test = order[:train_size], order[1440:]
    targets = torch.tensor(labels)
    return TensorDataset(images[train], targets[train]), TensorDataset(images[test], targets[test])
