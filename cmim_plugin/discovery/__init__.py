"""TEMPORARY shim until the rebuilt discovery is merged."""

from dataclasses import dataclass
from typing import Any

import torch

from .find import BinaryActivation, codes
from .find import find_binary_activations as _find
from .layout import Layout
from .trace import Sample, Site, as_inputs, tensors_in
from .trace import generators_kept as preserve_generators
from .trace import uncompiled as force_eager


@dataclass(frozen=True)
class BatchSource:
    def of(self, args, kwargs):
        return next((t.shape[0] for _, t in tensors_in((args, kwargs)) if t.ndim), None)


@dataclass(frozen=True)
class Discovery:
    found: tuple
    batch: Any


def discover(model, example_input, batch_size=None):
    return Discovery(tuple(_find(model, example_input)), BatchSource())


def find_binary_activations(model, example_input, *, batch_size=None):
    return list(discover(model, example_input, batch_size).found)


def is_two_valued(activation, layout):
    some = activation[:8]
    index = torch.arange(some.numel())
    return codes(Sample(some.shape, some.dtype, some.flatten(), index)) is not None
