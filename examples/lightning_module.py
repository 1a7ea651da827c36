"""CMIM in a LightningModule: heads in the optimizer and in the checkpoint, the bound of each tap logged.

python examples/lightning_module.py
"""

from __future__ import annotations

import lightning as L
import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.data import DataLoader

from bireal import BIREAL
from bodies import BODIES
from cmim_plugin import CMIM
from digits import digits


class BinaryClassifier(L.LightningModule):
    """A binary network for images (batch, 1, 8, 8) of ten classes, trained with CMIM."""

    def __init__(self, width: int = 16, lr: float = 0.05, cmim_weight: float = 0.1) -> None:
        super().__init__()
        self.save_hyperparameters()
        self.model = BODIES["resnet8"](BIREAL, 10, in_channels=1, width=width)
        # Not in a later hook: here the heads are in self.parameters(), move to the device with the network, and exist
        # when Lightning restores a checkpoint. CMIM does not hold the network: nothing is registered twice.
        self.cmim = CMIM(self.model, torch.randn(8, 1, 8, 8), weight=cmim_weight)

    def forward(self, x: Tensor) -> Tensor:
        return self.model(x)

    def training_step(self, batch: tuple[Tensor, Tensor]) -> Tensor:
        x, y = batch
        loss = F.cross_entropy(self.model(x), y)
        loss += self.cmim(self.model)
        self.log("loss", loss)
        self.log_dict({f"bound/{tap}": metrics["bound"] for tap, metrics in self.cmim.metrics.items()})
        return loss

    def validation_step(self, batch: tuple[Tensor, Tensor]) -> None:
        x, y = batch
        self.log("accuracy", (self.model(x).argmax(1) == y).float().mean(), prog_bar=True)

    def configure_optimizers(self) -> torch.optim.Optimizer:
        # The network's and the heads', since self.cmim is a submodule.
        return torch.optim.SGD(self.parameters(), lr=self.hparams.lr, momentum=0.9)


if __name__ == "__main__":
    train_set, test_set = digits()
    trainer = L.Trainer(max_epochs=5, log_every_n_steps=10)
    trainer.fit(BinaryClassifier(), DataLoader(train_set, 32, shuffle=True), DataLoader(test_set, 32))
