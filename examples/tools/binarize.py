"""Binarize a network that knows nothing of it, in place: the layers of IR-Net, Bi-Real Net and ReActNet, by name."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from bodies import (
    BIREAL,
    EDE,
    IRNET,
    REACTNET,
    IRConv2d,
    MagnitudeAwareConv2d,
    Recipe,
    Sign,
    anneal,
    libra,
    magnitude_aware,
    polynomial_slope,
)


class BinaryConv2d(MagnitudeAwareConv2d):
    def forward(self, x: Tensor) -> Tensor:
        return super().forward(Sign.apply(x, polynomial_slope))


class BinaryLinear(nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(Sign.apply(x, polynomial_slope), magnitude_aware(self.weight), self.bias)


class IRLinear(EDE, nn.Linear):
    def forward(self, x: Tensor) -> Tensor:
        return F.linear(Sign.apply(x, self.slope), libra(self.weight, self.slope), self.bias)


class ShiftedConv2d(BinaryConv2d):
    """ReActNet's: a learned threshold for each channel."""

    def add_parameters(self) -> None:
        self.threshold = nn.Parameter(torch.zeros(self.in_channels, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + self.threshold)


class ShiftedLinear(BinaryLinear):
    def add_parameters(self) -> None:
        self.threshold = nn.Parameter(torch.zeros(self.in_features))

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x + self.threshold)


@dataclass(frozen=True)
class Method:
    """recipe: for the bodies of bodies.py
    conv, linear: layers that binarize their own input and weight, for other networks
    nonlinearity: in place of ReLU there
    on_epoch: (model, epoch, epochs), called before each epoch
    """

    recipe: Recipe
    conv: type[nn.Conv2d]
    linear: type[nn.Linear]
    nonlinearity: type[nn.Module] = nn.PReLU
    on_epoch: Callable[[nn.Module, int, int], None] = lambda model, epoch, epochs: None


METHODS = {
    "irnet": Method(IRNET, IRConv2d, IRLinear, nn.Hardtanh, anneal),
    "bireal": Method(BIREAL, BinaryConv2d, BinaryLinear),
    # RPReLU's shifts are left out: there is a norm before most activations, and a threshold behind.
    "reactnet": Method(REACTNET, ShiftedConv2d, ShiftedLinear),
}


def binarize(model: nn.Module, method: str = "bireal") -> None:
    """Make every convolution and linear layer of a timm model binary, in place, but the first and the classifier.

    Signs must vary to carry anything. Behind a ReLU all are +1: it becomes the method's nonlinearity. Behind a residual
    branch that starts at zero, nearly all are: its normalization starts at one.
    """
    ends = _names(model.pretrained_cfg.get("first_conv")) | _names(model.pretrained_cfg.get("classifier"))
    chosen = METHODS[method]
    for name, module in list(model.named_modules(remove_duplicate=False)):
        if isinstance(module, (nn.ReLU, nn.ReLU6)):
            model.set_submodule(name, chosen.nonlinearity())
        elif isinstance(module, nn.BatchNorm2d) and not module.weight.any():
            nn.init.ones_(module.weight)
        # A subclass brings a forward of its own: left alone.
        elif type(module) in (nn.Conv2d, nn.Linear) and name not in ends:
            # All but the forward stays: weights, stride, padding, groups, ...
            module.__class__ = chosen.conv if type(module) is nn.Conv2d else chosen.linear
            if hasattr(module, "add_parameters"):
                module.add_parameters()


def _names(names: str | Iterable[str] | None) -> set[str]:
    return {names} if isinstance(names, str) else set(names or ())
