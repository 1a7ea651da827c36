"""CMIM in a LightningModule. As a submodule it is in the checkpoints, and it moves to the device with the network.

python examples/lightning_module.py
"""

from __future__ import annotations

import argparse

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

from bireal import ResNet
from cmim_plugin import CMIM
from digits import digits


class BinaryClassifier(L.LightningModule):
    """A binary network for images (batch, 1, 8, 8) of ten classes, trained with CMIM."""

    def __init__(self, width: int = 16, lr: float = 1e-3, cmim_weight: float = 0.1) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model = ResNet(units=2, in_channels=1, width=width)
        # Here, not in a later hook: it has to exist when Lightning restores a checkpoint.
        self.cmim = CMIM(self.model, torch.zeros(2, 1, 8, 8), weight=cmim_weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        loss = F.cross_entropy(self.model(x), y)
        loss += self.cmim(self.model)
        self.log("loss", loss)
        self.log_dict(self.cmim.scalars(all_taps=True))
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor]) -> None:
        x, y = batch
        self.log("accuracy", (self.model(x).argmax(1) == y).float().mean(), prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.Adam(self.parameters(), lr=self.hparams.lr)  # CMIM has no parameters


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--epochs", type=int, default=5)
    args = parser.parse_args()
    train_set, test_set = digits()
    trainer = L.Trainer(max_epochs=args.epochs, log_every_n_steps=10)
    trainer.fit(BinaryClassifier(), DataLoader(train_set, 32, shuffle=True), DataLoader(test_set, 32))
